"""A Bayesian vision transformer learns handwritten digits, and shows what it does not know.

    python examples/digits.py --backend torch

Dropout stays on (MC dropout): passes over one image disagree where the model has seen nothing like
it, its epistemic uncertainty. A second head predicts the variance of the logits, for the aleatoric
uncertainty that more data would not remove. The training loop knows nothing of logging but the
line for its loss and accuracy.
"""

import argparse
import math

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import bthooks


class Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # on in eval mode too
        return F.dropout(x, 0.1, training=True)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), Dropout(), nn.Linear(2 * width, width)
        )
        self.drop = Dropout()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, L, H, d) -> (B, H, L, d)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(y))
        return x + self.drop(self.mlp(self.norm2(x)))


class BayesianViT(nn.Module):
    """Images `(B, 8, 8)` to probabilities `(B, 10)` and their uncertainties `(B,)`."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) / 2)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.mean, self.variance = nn.Linear(width, 10), nn.Linear(width, 10)
        nn.init.constant_(self.variance.bias, -3.0)

    def forward(self, images: Tensor, samples: int = 2) -> dict[str, Tensor]:
        x = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)  # (B, 16, 4)
        x = (self.patch(x) + self.position).repeat(samples, 1, 1)  # (S * B, 16, width)
        x = self.norm(self.blocks(x).mean(1))
        # The mean of softmax under a normal distribution of the logits, as MacKay (1992) has it.
        logits = self.mean(x) / (1 + math.pi / 8 * F.softplus(self.variance(x))).sqrt()
        p = logits.softmax(-1).unflatten(0, (samples, -1))  # (S, B, 10)
        found = bthooks.decompose_uncertainty(p)
        return {
            "probabilities": p.mean(0),
            "epistemic_uncertainty": found["epistemic"],  # what the passes disagree about
            "aleatoric_uncertainty": found["aleatoric"],
        }


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images `(N, 8, 8)` in 0..1 with their labels."""
    data = load_digits()
    split = train_test_split(
        data.images / 16, data.target, test_size=0.2, stratify=data.target, random_state=0
    )
    x, x_test, y, y_test = (torch.from_numpy(part) for part in split)
    return x.float(), y, x_test.float(), y_test


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, samples: int) -> dict[str, Tensor]:
    output = model.eval()(images, samples)
    return output | {"accuracy": (output["probabilities"].argmax(-1) == labels).float().mean()}


def temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The T for which softmax(log p / T) fits best (Guo et al., 2017)."""
    logits = probabilities.clamp_min(1e-9).log()
    candidates = torch.linspace(0.25, 4, 151)
    losses = [F.cross_entropy(logits / t, labels) for t in candidates]
    return candidates[torch.stack(losses).argmin()].item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["torch", "tensorboardX"], default="torch")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--log-dir", default="runs")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = BayesianViT()
    rate, batch_size = 3e-3, 64
    steps = args.epochs * (len(x) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    writer = bthooks.make_writer(args.log_dir, backend=args.backend)
    handle = bthooks.attach(model, writer, every=20, histograms_every=200)

    progress = tqdm(range(args.epochs), unit="epoch")
    for _ in progress:
        model.train()
        for batch in torch.randperm(len(x)).split(batch_size)[: len(x) // batch_size]:
            probabilities = model(x[batch])["probabilities"]
            loss = F.nll_loss(probabilities.clamp_min(1e-9).log(), y[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        accuracy = evaluate(model, x_test, y_test, samples=2)["accuracy"]
        bthooks.log_metrics(writer, {"loss": loss}, handle.step - 1)
        bthooks.log_metrics(writer, {"accuracy": accuracy}, handle.step - 1, prefix="val")
        progress.set_postfix(loss=f"{loss:.3f}", test_accuracy=f"{accuracy:.3f}")
    seconds = progress.format_dict["elapsed"]
    handle.detach()
    print(handle.report())

    figures = {}
    for name, images in (("upright", x_test), ("rotated", x_test.rot90(1, (1, 2)))):
        output, prefix = evaluate(model, images, y_test, samples=16), f"test/{name}"
        epistemic, aleatoric = output["epistemic_uncertainty"], output["aleatoric_uncertainty"]
        bthooks.log_metrics(writer, {"accuracy": output["accuracy"]}, steps, prefix=prefix)
        bthooks.log_uncertainty_metrics(
            writer, epistemic, steps, aleatoric=aleatoric, prefix=prefix
        )
        bthooks.log_calibration(
            writer, output["probabilities"], y_test, steps, uncertainty=epistemic, prefix=prefix
        )
        figures[f"{name}_accuracy"] = output["accuracy"].item()
        figures[f"{name}_epistemic"] = epistemic.mean().item()

    # Temperature scaling: fitted on one half of the test images, shown on the other.
    p, half = evaluate(model, x_test, y_test, samples=16)["probabilities"], len(y_test) // 2
    t = temperature(p[:half], y_test[:half])
    scaled = (p[half:].clamp_min(1e-9).log() / t).softmax(-1)
    for name, shown in (("before", p[half:]), ("after", scaled)):
        prefix = f"test/{name}_temperature"
        bthooks.log_calibration(writer, shown, y_test[half:], steps, prefix=prefix)
        figures[f"ece_{name}"] = bthooks.calibration_stats(shown, y_test[half:])["ece"].item()

    hparams = {"rate": rate, "batch_size": batch_size, "epochs": args.epochs, "dropout": 0.1}
    bthooks.log_hparams(writer, hparams, figures)
    writer.close()

    print(f"trained in {seconds:.0f} s, test accuracy {figures['upright_accuracy']:.1%}")
    print(
        f"epistemic uncertainty: {figures['upright_epistemic']:.3f} nats upright, "
        f"{figures['rotated_epistemic']:.3f} nats rotated"
    )
    print(
        f"expected calibration error: {figures['ece_before']:.3f}, "
        f"{figures['ece_after']:.3f} at temperature {t:.2f}"
    )
    print(f"python -m bthooks {args.log_dir}")
    return figures | {"seconds": seconds}


if __name__ == "__main__":
    main()
