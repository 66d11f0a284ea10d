"""A character transformer on Python's own documentation, logged from a plain loop: no attach.

    python examples/language_model.py
    python examples/language_model.py --resume    # after a kill: the same charts go on

| tag | when |
| --- | --- |
| `train/loss`, `learning_rate/0` | every 10 steps |
| `gradients/...`, clipped: as the optimizer applies them | every 100 steps |
| `parameters/...`, `gradients/distribution/...` | every 500 steps |
| `val/loss`, `sample` (text), and a checkpoint | every `--eval-every` steps, and at the end |
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import bthooks

CHARACTERS, CONTEXT, HEADS = 128, 64, 4  # ASCII; how many of them the model sees


class Block(nn.Module):
    """Causal self-attention, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, L, D/H)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), 0.1, self.training)


class GPT(nn.Module):
    """Scores of the next character at every position: (B, L) -> (B, L, CHARACTERS)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, windows: Tensor) -> Tensor:
        """Nats per character over windows (B, L + 1)."""
        return F.cross_entropy(self(windows[:, :-1]).mT, windows[:, 1:])

    def sample(self, length: int = 200) -> str:
        """Text by the model, as a code block in Markdown."""
        generator = torch.Generator().manual_seed(0)  # of its own: training's draws stay the same
        tokens = torch.tensor([[ord("\n")]])
        for _ in range(length):
            probabilities = self(tokens[:, -CONTEXT:])[:, -1].softmax(-1)
            tokens = torch.cat([tokens, probabilities.multinomial(1, generator=generator)], 1)
        return bytes(tokens[0].tolist()).decode().replace("\n", "\n    ")


def corpus() -> tuple[Tensor, Tensor]:
    """The text for training, and its held-out last tenth in windows (B, L + 1)."""
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))  # topics quote topics
    data = torch.tensor(list("\n\n".join(paragraphs).encode("ascii", "replace")))
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:].unfold(0, CONTEXT + 1, CONTEXT)


def main(argv: list[str] | None = None) -> float:
    """Train, and return the best validation loss in nats per character."""
    parser = argparse.ArgumentParser()
    options = {"steps": 1200, "batch-size": 16, "width": 128, "layers": 4, "eval-every": 150}
    options |= {"log-dir": "runs", "experiment": "language_model", "backend": "torch"}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default}")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args(argv)
    run = Path(args.log_dir, args.experiment)
    if run.exists() and not args.resume:
        parser.error(f"{run} exists: go on with --resume, or name another --experiment")

    torch.manual_seed(0)
    text, held_out = corpus()
    model = GPT(args.width, args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = LambdaLR(optimizer, lambda s: min((s + 1) / 100, 1 - s / args.steps))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start, best = 0, float("inf")
    checkpoints = run / "checkpoints"
    if kept := sorted(checkpoints.glob("last-*.pt")):
        state = torch.load(kept[-1])
        start, best = state["step"], state["best"]
        torch.set_rng_state(state["random"])  # the next batches and dropout masks
        for name, part in parts.items():
            part.load_state_dict(state[name])

    with bthooks.make_writer(  # what was written after that checkpoint is hidden, and comes again
        args.log_dir, args.experiment, backend=args.backend, purge_step=start
    ) as writer:
        checkpoints.mkdir(exist_ok=True)
        bar = tqdm(range(start, args.steps), initial=start, total=args.steps)
        for step in bar:
            begins = torch.randint(len(text) - CONTEXT, (args.batch_size, 1))
            loss = model.train().loss(text[begins + torch.arange(CONTEXT + 1)])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step % 10 == 0:
                bthooks.log_metrics(writer, {"loss": loss}, step, prefix="train")
                bthooks.log_learning_rate(writer, optimizer, step)
            if step % 100 == 0:
                bthooks.log_gradients(writer, model, step)
            if step % 500 == 0:
                bthooks.log_model_histograms(writer, model, step)
            optimizer.step()
            scheduler.step()
            if (step + 1) % args.eval_every and step + 1 < args.steps:
                continue
            with torch.no_grad():
                val_loss = model.eval().loss(held_out).item()
                bthooks.log_text(writer, "sample", model.sample(), step)
            bthooks.log_metrics(writer, {"loss": val_loss}, step, prefix="val")
            bar.set_postfix(val_loss=val_loss)
            best = min(best, val_loss)
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "best": best, "random": torch.get_rng_state()}
            for name in ["best"] * (val_loss == best) + [f"last-{step + 1:07}"]:
                torch.save(state, checkpoints / "new")
                writer.flush()  # the charts before the checkpoint: a kill in between leaves no gap
                (checkpoints / "new").replace(checkpoints / f"{name}.pt")  # whole or not at all
            for old in sorted(checkpoints.glob("last-*.pt"))[:-3]:
                old.unlink()
    print(f"best val loss {best:.3f} nats per character: python -m bthooks {args.log_dir}")
    return best


if __name__ == "__main__":
    main()
