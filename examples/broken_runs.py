"""Runs that go wrong on purpose, one fault each, and what bthooks says of them.

    python examples/broken_runs.py

| run | what is done to it | what is told |
| --- | --- | --- |
| healthy | nothing | nothing |
| exploding | the head's gradient times 200 in steps 30 to 39, and clipped | exploding_gradients |
| shifted | the keys of one layer moved by 1000 at step 30 | attention_logits |
| saturated | the queries of one layer, which is frozen, times 1000 | attention_collapse |
| depth | 16 sigmoid layers | vanishing_gradients |
| nan | log of what may be negative, from step 30 on | nonfinite |
| root | a square root at 0: its gradient is inf, then all is NaN | nonfinite_gradients, nonfinite |
| normalized | every parameter's gradient scaled to the norm 0.1 | collapsed_gradients |
| dead | a ReLU whose bias is far below 0 | dead_activations, vanishing_gradients |
| schedule | a rate that is 0 from step 75 on | learning_rate |
| confident | validated with twenty times the logits and half of the labels wrong | miscalibration |
| detached | the first block and all before it run under `no_grad()` | unlearned |
| forgotten | the head is in no optimizer | unlearned |
| decayed | a rate that is cut by 30 % every step, not every epoch | learning_rate |
| inverted | a padding mask that hides all but the padding | dead_rows, vanishing_gradients |
| spike | the loss that is logged is twenty more, from step 30 on | loss |
| undefined | it is NaN from step 30 on, and nothing else is | loss |

Every fault is planted, and does not wait for training to diverge: where that leads hangs on the
last bit of each product, and so on the processor.
"""

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler

import bthooks

STEPS, FAULT, WIDTH = 100, 30, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.hidden: Tensor | None = None  # (8,), True where a key is

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        hidden = None
        if self.hidden is not None and self.training:
            hidden = self.hidden.expand(len(x), -1)
        x = x + self.attention(y, y, y, key_padding_mask=hidden, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (B, 8, 8), whose rows are the tokens, to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.position = nn.Linear(8, WIDTH), nn.Parameter(torch.randn(8, WIDTH) / 2)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.is_detached = False

    def forward(self, images: Tensor) -> Tensor:
        first, *others = self.blocks
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_detached):
            x = first(self.row(images) + self.position)
        for block in others:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


class Deep(nn.Module):
    """An MLP of sigmoids."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(16)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images.flatten(1)))


class Broken(nn.Module):
    """What it wraps, and `function` of the result from step FAULT on."""

    def __init__(self, inner: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function, self.forwards = inner, function, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += self.training
        y = self.inner(x)
        return self.function(y) if self.forwards > FAULT else y


def normalize(gradient: Tensor) -> Tensor:
    return 0.1 * gradient / gradient.norm().clamp_min(1e-12)


def train(name: str, log_dir: str, backend: str) -> bthooks.Handle:
    """Train one run, with its fault."""
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target)
    model = Deep() if name == "depth" else ViT()
    trained = [p for n, p in model.named_parameters() if name != "forgotten" or "head" not in n]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    warmup: LRScheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    capture = None
    if name == "exploding":
        for parameter in model.head.parameters():
            parameter.register_hook(lambda g: g * 200 if FAULT <= handle.step < FAULT + 10 else g)
    elif name == "saturated":
        first = model.blocks[0]  # frozen with all before it: its scores stay what they are
        for frozen in (model.row, model.position, first.norm1, first.attention):
            frozen.requires_grad_(False)
        first.attention.in_proj_weight[:WIDTH] *= 1000
    elif name == "nan":
        model.blocks[2].mlp = Broken(model.blocks[2].mlp, torch.log)
    elif name == "root":
        model.blocks[2].mlp = Broken(model.blocks[2].mlp, lambda y: (y * 0).sqrt())
    elif name == "normalized":
        for parameter in model.parameters():
            parameter.register_hook(normalize)
    elif name == "dead":
        nn.init.constant_(model.blocks[0].mlp[0].bias, -100.0)
        capture = ("attention", "gradients", "learning_rate", "activations")
    elif name == "schedule":
        warmup = LambdaLR(optimizer, lambda step: float(step < 75))
    elif name == "decayed":
        warmup = ExponentialLR(optimizer, 0.7)
    elif name == "detached":
        model.is_detached = True
    elif name == "inverted":
        model.blocks[1].hidden = ~torch.zeros(8, dtype=torch.bool)

    with bthooks.make_writer(log_dir, name, backend=backend) as writer:
        handle = bthooks.attach(
            model, writer, capture=capture, every=5, histograms_every=10, on_alert=print
        )
        for _ in range(STEPS):
            batch = torch.randint(1500, (64,))
            loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if name == "exploding":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            logged = loss.detach()
            if handle.step >= FAULT:
                logged = logged + {"spike": 20.0, "undefined": torch.nan}.get(name, 0.0)
            bthooks.log_metrics(writer, {"loss": logged}, handle.step)
            optimizer.step()
            warmup.step()
            if name == "shifted" and handle.step == FAULT:
                with torch.no_grad():  # a softmax does not see it: what all keys share cancels out
                    model.blocks[1].attention.in_proj_bias[WIDTH : 2 * WIDTH] += 1000
            if handle.step % 50 == 0:
                with torch.no_grad():
                    logits = model.eval()(images[1500:])
                targets = labels[1500:].clone()
                if name == "confident":
                    logits = 20 * logits
                    targets[::2] = (targets[::2] + 1) % 10
                if logits.isfinite().all():
                    bthooks.log_calibration(
                        writer, logits.softmax(-1), targets, handle.step - 1, prefix="val"
                    )
        handle.detach()
    return handle


NAMES = ("healthy", "exploding", "shifted", "saturated", "depth", "nan", "root", "normalized")
NAMES += ("dead", "schedule", "confident", "detached", "forgotten", "decayed", "inverted")
NAMES += ("spike", "undefined")


def main(arguments: list[str] | None = None) -> dict[str, tuple[bthooks.Alert, ...]]:
    """The alerts of each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--backend", choices=["torch", "tensorboardX"], default="torch")
    parser.add_argument("--log-dir", default="runs/broken")
    args = parser.parse_args(arguments)
    found = {}
    for name in args.runs:
        print(f"{name}:")
        found[name] = train(name, args.log_dir, args.backend).alerts
    return found


if __name__ == "__main__":
    main()
