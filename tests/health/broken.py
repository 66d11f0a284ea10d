"""Runs with one planted fault each: what is to be told of it, and where.

`told` is the condition (any of several) with a glob of the place. A fault that is `late`
is planted at the step that its run is made with; the others are there from the first one on.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

from .healthy import (
    WIDTH,
    Attention,
    Run,
    ViT,
    adam,
    batch,
    classifier,
    diabetes,
    digits,
    mlp,
    stepping,
)

Maker = Callable[[int], Run]


class Fault(NamedTuple):
    make: Maker
    told: tuple[str, ...]  # conditions, of which one is to be told
    where: str  # a glob
    late: bool


BROKEN: dict[str, Fault] = {}


def broken(*told: str, where: str = "*", late: bool = False) -> Callable[..., Maker]:
    def known(make: Maker) -> Maker:
        BROKEN[make.__name__] = Fault(make, told, where, late)
        return make

    return known


@dataclass
class Clock:
    """What knows the step."""

    step: int = 0


def timed(run: Run, clock: Clock) -> Run:
    inner = run.step

    def step(number: int) -> Tensor:
        clock.step = number
        return inner(number)

    run.step = step
    return run


class Recurrent(nn.Module):
    """A recurrent matrix far beyond 1."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 64, batch_first=True), nn.Linear(64, 1)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@broken("exploding_gradients", where="rnn")
def unclipped_recurrent(fault: int) -> Run:
    model = Recurrent()

    def loss_of() -> Tensor:
        x = torch.randn(32, 40, 4)
        return F.mse_loss(model(x), 3 * x[:, 0, :1])

    return Run(model, stepping(adam(model, 1e-2), loss_of))


@broken("exploding_gradients", where="4")
def one_layer_far_above(fault: int) -> Run:
    model = mlp(64, 64, 64, 64)
    for p in model[4].parameters():
        p.register_hook(lambda g: g * 1e4)
    return classifier(model, torch.optim.SGD(model.parameters(), 1e-5))


@broken("exploding_gradients", where="4")
def one_layer_far_above_adam(fault: int) -> Run:
    model = mlp(64, 64, 64, 64)
    for p in model[4].parameters():
        p.register_hook(lambda g: g * 1e4)
    return classifier(model, adam(model))


@broken("exploding_gradients", late=True)
def a_bad_batch_that_stays(fault: int) -> Run:
    model, clock = mlp(64, 64, 64), Clock()

    def loss_of() -> Tensor:
        x, y = batch()
        return F.cross_entropy(model(x * (1000.0 if clock.step >= fault else 1.0)), y)

    return timed(Run(model, stepping(adam(model), loss_of)), clock)


def never_zeroed(model: nn.Module, optimizer: torch.optim.Optimizer) -> Run:
    def step(number: int) -> Tensor:
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Run(model, step)


@broken("exploding_gradients")
def forgotten_zero_grad(fault: int) -> Run:
    model = mlp(64, 64, 64)
    return never_zeroed(model, torch.optim.SGD(model.parameters(), 0.1))


@broken("exploding_gradients")
def forgotten_zero_grad_adam(fault: int) -> Run:
    model = mlp(64, 64, 64)
    return never_zeroed(model, adam(model))


@broken("exploding_gradients")
def negated_loss(fault: int) -> Run:
    model = mlp(64, 64, 64)

    def loss_of() -> Tensor:
        x, y = batch()
        return -F.cross_entropy(model(x), y)

    return Run(model, stepping(adam(model), loss_of))


@broken("exploding_gradients")
def forgotten_mean(fault: int) -> Run:
    model = mlp(64, 64, 64)
    return classifier(model, torch.optim.SGD(model.parameters(), 0.1), size=256, reduction="sum")


@broken("exploding_gradients", "nonfinite", "nonfinite_gradients", "loss")
def forgotten_mean_regression(fault: int) -> Run:
    x, y = diabetes()
    y = (y - y.mean()) / y.std()
    model = mlp(10, 64, last=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Run(model, stepping(optimizer, lambda: (model(x) - y).square().sum()))


@broken("exploding_gradients", where="head", late=True)
def exploding_head(fault: int) -> Run:
    model, clock = ViT(), Clock()
    for p in model.head.parameters():
        p.register_hook(lambda g: g * (200 if clock.step >= fault else 1))
    return timed(classifier(model, adam(model), clip=0.1, wrong=0.3), clock)


@broken("vanishing_gradients", where="0")
def deep_sigmoids(fault: int) -> Run:
    model = mlp(*[64] * 17, act=nn.Sigmoid)
    return classifier(model, adam(model, 5e-3))


@broken("vanishing_gradients", where="0")
def deep_sigmoids_sgd(fault: int) -> Run:
    model = mlp(*[64] * 17, act=nn.Sigmoid)
    return classifier(model, torch.optim.SGD(model.parameters(), 0.1))


@broken("vanishing_gradients", where="blocks.1*")
def stuck_branch(fault: int) -> Run:
    """What a branch makes is next to nothing, and stays so."""
    model = ViT()
    model.blocks[1].gammas = [1e-9, 1e-9]
    return classifier(model, torch.optim.AdamW(model.parameters(), 3e-3))


@broken("vanishing_gradients", "dead_activations", where="*0*")
def dead_relu(fault: int) -> Run:
    model = mlp(64, 64, 64)
    nn.init.constant_(model[2].bias, -100.0)
    return classifier(model, adam(model), options={"capture": ["gradients", "activations"]})


@broken("collapsed_gradients", where="root")
def normalised_each(fault: int) -> Run:
    model = mlp(64, 64, 64, 64, 64)
    for p in model.parameters():
        p.register_hook(lambda g: 0.1 * g / g.norm().clamp_min(1e-12))
    return classifier(model, adam(model))


@broken("attention_collapse", where="blocks.0.attention")
def saturated_queries(fault: int) -> Run:
    model = ViT()
    first = model.blocks[0]
    for frozen in (model.row, first.norm1, first.attention):
        frozen.requires_grad_(False)
    model.position.requires_grad_(False)
    first.attention.qkv.weight[:WIDTH] *= 1000
    return classifier(model, adam(model))


@broken("attention_collapse", "attention_logits", where="blocks.1.attention")
def forgotten_scale(fault: int) -> Run:
    """Scores that are not divided by the square root, of inputs that are not normalised."""
    model = ViT()

    class Unscaled(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(20 * x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.out(
                F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)
            )

    model.blocks[1].attention = Unscaled()
    return classifier(model, adam(model))


@broken("attention_logits", "attention_collapse", where="blocks.1.attention", late=True)
def shifted_keys(fault: int) -> Run:
    model, clock = ViT(), Clock()
    run = classifier(model, adam(model))
    inner = run.step

    def step(number: int) -> Tensor:
        if number == fault:
            with torch.no_grad():
                model.blocks[1].attention.qkv.bias[WIDTH : 2 * WIDTH] += 1000
        return inner(number)

    run.step = step
    return timed(run, clock)


class Late(nn.Module):
    """What it wraps, and `function` of the result from a step on."""

    def __init__(self, inner: nn.Module, fault: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function, self.left = inner, function, fault

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        y = self.inner(x)
        return self.function(y) if self.left < 0 else y


@broken("nonfinite", where="blocks.1.mlp", late=True)
def log_of_negatives(fault: int) -> Run:
    model = ViT()
    model.blocks[1].mlp = Late(model.blocks[1].mlp, fault, torch.log)
    return classifier(model, adam(model))


@broken("nonfinite_gradients", where="blocks.1.mlp*", late=True)
def root_of_0(fault: int) -> Run:
    model = ViT()
    model.blocks[1].mlp = Late(model.blocks[1].mlp, fault, lambda y: (y * 0).sqrt())
    return classifier(model, adam(model))


@broken("nonfinite", late=True)
def nan_in_the_data(fault: int) -> Run:
    model, clock = mlp(64, 64, 64), Clock()

    def loss_of() -> Tensor:
        x, y = batch()
        if clock.step >= fault:
            x = x.masked_fill(torch.rand_like(x) < 1e-2, torch.nan)
        return F.cross_entropy(model(x), y)

    return timed(Run(model, stepping(adam(model), loss_of)), clock)


@broken("learning_rate", late=True)
def rate_at_0(fault: int) -> Run:
    model = mlp(64, 64, 64)
    optimizer = adam(model)
    return classifier(model, optimizer, schedules.LambdaLR(optimizer, lambda s: float(s < fault)))


@broken("learning_rate", late=True)
def rate_that_jumps(fault: int) -> Run:
    model = mlp(64, 64, 64)
    optimizer = adam(model, 1e-4)
    jumps = schedules.LambdaLR(optimizer, lambda s: 1.0 if s < fault else 30.0)
    return classifier(model, optimizer, jumps)


@broken("learning_rate")
def schedule_of_epochs_stepped_per_batch(fault: int) -> Run:
    """Decays by a tenth every batch."""
    model = mlp(64, 64, 64)
    optimizer = adam(model)
    return classifier(model, optimizer, schedules.ExponentialLR(optimizer, 0.9))


@broken("learning_rate")
def steps_of_epochs_stepped_per_batch(fault: int) -> Run:
    model = mlp(64, 64, 64)
    optimizer = adam(model)
    return classifier(model, optimizer, schedules.StepLR(optimizer, 10, 0.1))


@broken("miscalibration", where="val/calibration/ece")
def over_confident(fault: int) -> Run:
    model = mlp(64, 64, 64)
    images, labels = digits()

    def validate() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = 20 * model.eval()(images[1500:])
        targets = labels[1500:].clone()
        targets[::2] = (targets[::2] + 1) % 10
        return logits.softmax(-1), targets

    return classifier(model, adam(model), validate=validate)


@broken("miscalibration", where="val/calibration/ece")
def under_confident(fault: int) -> Run:
    """A temperature of ten."""
    model = mlp(64, 64, 64)
    images, labels = digits()

    def validate() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return (model.eval()(images[1500:]) / 10).softmax(-1), labels[1500:]

    return classifier(model, adam(model, 2e-2), validate=validate, validate_every=10)


@broken("unlearned", where="trunk*")
def detached_trunk(fault: int) -> Run:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = mlp(64, 64, last=64), mlp(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x).detach())

    model = Net()
    return classifier(model, adam(model))


@broken("unlearned", where="*row*")
def detached_embedding(fault: int) -> Run:
    """Half of a ViT behind a `no_grad` that was left from an evaluation."""
    model = ViT()

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row, self.blocks = model.row, model.blocks[:1]
            self.rest, self.norm, self.head = model.blocks[1], model.norm, model.head

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.blocks(self.row(x.unflatten(-1, (8, 8))))
            return self.head(self.norm(self.rest(x).mean(1)))

    whole = Frozen()
    return classifier(whole, adam(whole))


@broken("unlearned", where="2*")
def forgotten_in_the_optimizer(fault: int) -> Run:
    model = mlp(64, 64, 64)
    known = [p for at, part in enumerate(model) for p in part.parameters() if at != 2]
    return classifier(model, torch.optim.Adam(known, 3e-3))


@broken("unlearned", where="head*")
def a_head_that_came_too_late(fault: int) -> Run:
    model = ViT()
    optimizer = adam(model)
    model.head = nn.Linear(WIDTH, 10)
    return classifier(model, optimizer)


@broken("unlearned", where="*")
def optimizer_of_a_copy(fault: int) -> Run:
    """One of the two parts is trained by an optimizer that holds a copy of it."""
    model = mlp(64, 64, 64)
    other = copy.deepcopy(model)
    held = [*model[4].parameters(), *other[0].parameters(), *other[2].parameters()]
    return classifier(model, torch.optim.Adam(held, 3e-3))


@broken("dead_rows", where="blocks*attention")
def inverted_padding_mask(fault: int) -> Run:
    model = ViT()

    class Inverted(Attention):
        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.where(torch.rand(len(x), 1) < 0.7, 8, torch.randint(4, 8, (len(x), 1)))
            real = torch.arange(8) < lengths
            qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv, attn_mask=~real[:, None, None, :])
            return self.out(y.transpose(1, 2).flatten(2))

    for block in model.blocks:
        block.attention = Inverted()
    return classifier(model, adam(model))


@broken("dead_rows", where="blocks*attention")
def inverted_padding_few(fault: int) -> Run:
    """Lengths as they come: in each batch one sample or a few are of full length."""
    model = ViT()

    class Inverted(Attention):
        def forward(self, x: Tensor) -> Tensor:
            real = torch.arange(8) < torch.randint(3, 9, (len(x), 1))
            qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv, attn_mask=~real[:, None, None, :])
            return self.out(y.transpose(1, 2).flatten(2))

    for block in model.blocks:
        block.attention = Inverted()
    return classifier(model, adam(model))


def with_loss(change: Callable[[Tensor], Tensor], fault: int) -> Run:
    """A healthy run, whose loss is another thing from a step on, as it is logged."""
    model = mlp(64, 64, 64)
    run = classifier(model, adam(model))
    inner = run.step

    def step(number: int) -> Tensor:
        loss = inner(number)
        return change(loss) if number >= fault else loss

    run.step = step
    return run


@broken("loss", where="train/loss", late=True)
def loss_is_nan(fault: int) -> Run:
    return with_loss(lambda loss: loss * torch.nan, fault)


@broken("loss", where="train/loss", late=True)
def loss_jumps(fault: int) -> Run:
    return with_loss(lambda loss: loss * 10 + 20, fault)


@broken("loss", "exploding_gradients", "nonfinite", late=True)
def rate_too_large_all_at_once(fault: int) -> Run:
    """A rate that was reset, ten thousand times too large, in a group that is not logged."""
    model = mlp(64, 64, 64)
    run = classifier(model, adam(model))
    inner = run.step

    def step(number: int) -> Tensor:
        if number == fault:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))
        return inner(number)

    run.step = step
    return run
