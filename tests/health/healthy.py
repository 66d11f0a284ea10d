"""Runs that really learn, of as many kinds as people train: nothing is to be told of any.

Each is a function that makes its model and returns what trains it; `score` is what it is to learn,
where that is not its loss.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

WIDTH = 16


@dataclass
class Run:
    """A training run: `step(number)` is one step of it, and returns the loss."""

    model: nn.Module
    step: Callable[[int], Tensor]
    steps: int = 300
    score: Callable[[], Tensor] | None = None  # smaller is better
    validate: Callable[[], tuple[Tensor, Tensor]] | None = None  # probabilities, targets
    validate_every: int = 50
    log_loss: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # of attach


HEALTHY: dict[str, Callable[[], Run]] = {}


def healthy(make: Callable[[], Run]) -> Callable[[], Run]:
    HEALTHY[make.__name__] = make
    return make


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) from 0 to 1, and labels."""
    data = load_digits()
    return torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target)


@functools.cache
def diabetes() -> tuple[Tensor, Tensor]:
    """Inputs (442, 10), normalised, and targets from 25 to 346."""
    data = load_diabetes()
    x = torch.from_numpy(data.data).float()
    return x / x.std(0), torch.from_numpy(data.target).float()[:, None]


def batch(size: int = 64, of: int = 1500) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    at = torch.randint(of, (size,))
    return images[at], labels[at]


def mlp(*widths: int, last: int = 10, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, other in itertools.pairwise(widths):
        layers += [nn.Linear(one, other), act()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], last))


def stepping(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], Tensor],
    schedule: Any = None,
    clip: float | None = None,
) -> Callable[[int], Tensor]:
    """The step of an everyday loop."""

    def step(number: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if clip is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return loss.detach()

    return step


def classifier(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any = None,
    clip: float | None = None,
    size: int = 32,
    reduction: str = "mean",
    wrong: float = 0.0,
    **options: Any,
) -> Run:
    def loss_of() -> Tensor:
        x, y = batch(size)
        y = torch.where(torch.rand(size) < wrong, (y + 1) % 10, y)
        return F.cross_entropy(model.train()(x), y, reduction=reduction)

    return Run(model, stepping(optimizer, loss_of, schedule, clip), **options)


class Attention(nn.Module):
    """Self-attention (B, L, D), whose scores a bias and a scale can shape."""

    def __init__(self, width: int = WIDTH, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(
        self, width: int = WIDTH, causal: bool = False, scale: float | None = None, drop: float = 0
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, causal=causal)
        self.mlp = mlp(width, 2 * width, last=width, act=nn.GELU)
        self.drop = nn.Dropout(drop)
        if scale is None:
            self.gammas = [1.0, 1.0]
        else:
            self.gammas = nn.ParameterList(torch.full((width,), scale) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gammas[0] * self.drop(self.attention(self.norm1(x)))
        return x + self.gammas[1] * self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Images (B, 64), whose rows of 8 are the tokens, to logits (B, 10)."""

    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.row, self.position = nn.Linear(8, WIDTH), nn.Parameter(torch.randn(8, WIDTH) / 2)
        self.blocks = nn.Sequential(*(Block(**options) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.row(x.unflatten(-1, (8, 8))) + self.position
        return self.head(self.norm(self.blocks(x).mean(1)))


class Language(nn.Module):
    """Tokens (B, L) to logits (B, L, vocabulary)."""

    def __init__(self, vocabulary: int = 16, layers: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.Sequential(*(Block(causal=causal) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def adam(model: nn.Module, lr: float = 3e-3, **options: Any) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr, **options)


@healthy
def mean_loss() -> Run:
    model = mlp(64, 64, 64)
    return classifier(model, adam(model))


@healthy
def summed_loss() -> Run:
    model = mlp(64, 64, 64)
    return classifier(model, adam(model), size=256, reduction="sum")


@healthy
def large_targets() -> Run:
    x, y = diabetes()
    model = mlp(10, 64, last=1)
    return Run(model, stepping(adam(model, 1e-2), lambda: F.mse_loss(model(x), y)))


@healthy
def large_targets_summed() -> Run:
    """Least squares by gradient descent, with the rate that its unit asks for."""
    x, y = diabetes()
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    return Run(model, stepping(optimizer, lambda: (model(x) - y).square().sum()))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 64, last=16), mlp(8, 64, last=64)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (log_var / 2).exp()
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum() / 2
        return F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl


@healthy
def vae() -> Run:
    model = VAE()
    return Run(model, stepping(adam(model), lambda: model(batch(128)[0])))


@healthy
def gaussian_likelihood() -> Run:
    """A loss that falls below 0."""
    x = torch.linspace(-1, 1, 256)[:, None]
    y = (3 * x).sin()
    model = mlp(1, 64, last=2, act=nn.Tanh)

    def loss_of() -> Tensor:
        mean, log_var = model(x).chunk(2, -1)
        noisy = y + 0.05 * torch.randn_like(y)
        return ((noisy - mean).square() / log_var.exp() + log_var).mean()

    return Run(model, stepping(adam(model, 5e-3), loss_of))


@healthy
def physics_informed() -> Run:
    """u'' = -(3 pi)^2 sin(3 pi x), u = 0 at the ends."""
    model = mlp(1, 48, 48, last=1, act=nn.Tanh)
    ends = torch.tensor([[0.0], [1.0]])

    def loss_of() -> Tensor:
        x = torch.rand(64, 1, requires_grad=True)
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        w = 3 * math.pi
        return (second + w**2 * (w * x).sin()).square().mean() + 100 * model(ends).square().mean()

    return Run(model, stepping(adam(model), loss_of), steps=400)


@healthy
def policy_gradient() -> Run:
    """REINFORCE without a baseline: the loss says nothing, the return is what is learnt."""
    model = mlp(8, 32, last=4)
    optimizer = adam(model, 1e-2)
    goal, returns = torch.randn(8, 4), []

    def loss_of() -> Tensor:
        state = torch.randn(64, 8)
        policy = torch.distributions.Categorical(logits=model(state))
        action = policy.sample()
        reward = 10.0 * (action == (state @ goal).argmax(-1))
        returns.append(-reward.mean())
        return -(policy.log_prob(action) * reward).sum()

    return Run(model, stepping(optimizer, loss_of), score=lambda: returns[-1])


@healthy
def actor_critic() -> Run:
    """Advantages: the loss lies around 0."""
    model = mlp(8, 32, last=5)
    goal, returns = torch.randn(8, 4), []

    def loss_of() -> Tensor:
        state = torch.randn(64, 8)
        logits, value = model(state).split([4, 1], -1)
        policy = torch.distributions.Categorical(logits=logits)
        action = policy.sample()
        reward = 20.0 * (action == (state @ goal).argmax(-1))
        returns.append(-reward.mean())
        gain = reward - value[:, 0]
        return -(policy.log_prob(action) * gain.detach()).mean() + 0.05 * gain.square().mean()

    return Run(model, stepping(adam(model, 1e-2), loss_of), score=lambda: returns[-1])


@healthy
def layer_scale() -> Run:
    model = ViT(scale=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    warm = schedules.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 30))
    return classifier(model, optimizer, warm)


@healthy
def re_zero() -> Run:
    model = ViT(scale=0.0)
    return classifier(model, adam(model))


@healthy
def zero_initialised_heads() -> Run:
    model = ViT(layers=4)
    for block in model.blocks:
        nn.init.zeros_(block.attention.out.weight)
        nn.init.zeros_(block.mlp[-1].weight)
    nn.init.zeros_(model.head.weight)
    return classifier(model, adam(model))


class Lora(nn.Module):
    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Linear(inner.in_features, rank, bias=False)
        self.b = nn.Linear(rank, inner.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.b(self.a(x))


@healthy
def lora() -> Run:
    model = ViT().requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv, block.mlp[0] = Lora(block.attention.qkv), Lora(block.mlp[0])
    model.head.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    return classifier(model, torch.optim.AdamW(trained, 1e-2))


@healthy
def frozen_trunk() -> Run:
    model = mlp(64, 128, 64)
    model[0].requires_grad_(False)
    return classifier(model, adam(model, 1e-2))


class Pair(nn.Module):
    """A generator and what judges it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.judge = mlp(4, 32, last=2), mlp(2, 32, last=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.judge(self.generator(z))


@healthy
def gan() -> Run:
    """Points on a circle. Neither loss says how good it is: the mean distance from it does."""
    model = Pair()
    of_g = torch.optim.Adam(model.generator.parameters(), 2e-3, betas=(0.5, 0.9))
    of_d = torch.optim.Adam(model.judge.parameters(), 2e-3, betas=(0.5, 0.9))
    latest = []

    def step(number: int) -> Tensor:
        angle = torch.rand(128) * 2 * math.pi
        real = 2 * torch.stack([angle.cos(), angle.sin()], -1)
        of_g.zero_grad()
        loss = F.softplus(-model(torch.randn(128, 4))).mean()
        loss.backward()
        of_g.step()
        of_d.zero_grad()
        fake = model.generator(torch.randn(128, 4)).detach()
        latest.append((fake.norm(dim=-1) - 2).abs().mean())
        (F.softplus(-model.judge(real)).mean() + F.softplus(model.judge(fake)).mean()).backward()
        of_d.step()
        return loss.detach()

    return Run(model, step, steps=400, score=lambda: latest[-1])


@healthy
def sink_heads() -> Run:
    """A first token that says nothing, on which most heads rest: its key is large."""
    model = ViT()

    class Rests(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            sink = torch.zeros(8, 8)
            sink[:, 0] = 8.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=sink)
            return self.out(y.transpose(1, 2).flatten(2))

    for block in model.blocks[1:]:
        block.attention = Rests()
    return classifier(model, adam(model))


@healthy
def needle() -> Run:
    """One token of 24 is marked; its value is asked for."""
    model = Language(vocabulary=12, layers=1, causal=False)
    mark = nn.Embedding(2, WIDTH)
    model.mark = mark

    def loss_of() -> Tensor:
        tokens, at = torch.randint(12, (64, 24)), torch.randint(24, (64,))
        marked = F.one_hot(at, 24)
        x = model.embed(tokens) + 2 * mark(marked)
        logits = model.head(model.norm(model.blocks(x)))[:, 0]
        return F.cross_entropy(logits, tokens.gather(1, at[:, None])[:, 0])

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return loss_of()

    whole = Whole()
    return Run(whole, stepping(adam(whole, 1e-2), whole), steps=500)


@healthy
def copy_the_one_before() -> Run:
    model = Language(layers=2)

    def loss_of() -> Tensor:
        tokens = torch.randint(16, (32, 24))
        return F.cross_entropy(model(tokens)[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())

    return Run(model, stepping(adam(model), loss_of), steps=400)


@healthy
def language_clipped() -> Run:
    model = Language(layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    cosine = schedules.CosineAnnealingLR(optimizer, 400)

    def loss_of() -> Tensor:
        start, stride = torch.randint(16, (2, 32, 1))
        tokens = (start + stride * torch.arange(24)) % 16
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Run(model, stepping(optimizer, loss_of, cosine, clip=1.0), steps=400)


@healthy
def padded_batches() -> Run:
    """Padded queries see no key."""
    model = ViT()

    class Padded(Attention):
        def forward(self, x: Tensor) -> Tensor:
            real = torch.arange(8) < torch.randint(4, 9, (len(x), 1))
            mask = real[:, None, :, None] & real[:, None, None, :]
            qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
            return self.out(y.transpose(1, 2).flatten(2))

    for block in model.blocks:
        block.attention = Padded()
    return classifier(model, adam(model))


@healthy
def one_cycle() -> Run:
    model = mlp(64, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    cycle = schedules.OneCycleLR(optimizer, 0.3, total_steps=200)
    return classifier(model, optimizer, cycle, steps=200)


@healthy
def warm_up_from_0() -> Run:
    model = mlp(64, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    return classifier(model, optimizer, schedules.LambdaLR(optimizer, lambda s: min(1.0, s / 50)))


@healthy
def warm_restarts() -> Run:
    model = mlp(64, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    restarts = schedules.CosineAnnealingWarmRestarts(optimizer, 30, 2)
    return classifier(model, optimizer, restarts, steps=210)


@healthy
def cosine_to_0() -> Run:
    model = mlp(64, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    return classifier(model, optimizer, schedules.CosineAnnealingLR(optimizer, 250), steps=250)


@healthy
def convolution_sgd() -> Run:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return classifier(model, optimizer)


@healthy
def recurrent_clipped() -> Run:
    """Whether the sum of a sequence is above 0."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(1, 32, batch_first=True), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model = Net()

    def loss_of() -> Tensor:
        x = torch.randn(64, 16, 1)
        return F.cross_entropy(model(x), (x.sum((1, 2)) > 0).long())

    return Run(model, stepping(adam(model, 1e-2), loss_of, clip=1.0))


class Experts(nn.Module):
    """Top-1 of eight, of which some stay idle for long."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 8)
        self.experts = nn.ModuleList(mlp(64, 32, last=32) for _ in range(8))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        of = weights.argmax(-1)
        y = x.new_zeros(len(x), 32)
        for number, expert in enumerate(self.experts):
            if (at := (of == number).nonzero()[:, 0]).numel():
                y = y.index_add(0, at, expert(x[at]) * weights[at, number, None])
        return self.head(y)


@healthy
def idle_experts() -> Run:
    model = Experts()
    return classifier(model, adam(model))


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(64, 64, last=32)
        self.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(3))

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.trunk(x).relu())


@healthy
def alternating_tasks() -> Run:
    """One optimizer; at each step one of the first two heads, never the third."""
    model = Tasks()
    optimizer = adam(model)

    def step(number: int) -> Tensor:
        x, y = batch()
        task = number % 2
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, task), (y > 4 if task else y % 2).long())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Run(model, step)


@healthy
def unused_pooler() -> Run:
    """A layer that runs, and of whose output the loss makes no use."""
    model = ViT()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.pooler = model, nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.trunk.blocks(self.trunk.row(x.unflatten(-1, (8, 8))))
            self.pooled = self.pooler(hidden[:, 0]).tanh()
            return self.trunk.head(self.trunk.norm(hidden.mean(1)))

    pooled = Pooled()
    return classifier(pooled, adam(pooled))


@healthy
def deep_transformer() -> Run:
    model = ViT(layers=8)
    for block in model.blocks:  # whose queries and keys hardly have a gradient at first
        with torch.no_grad():
            block.attention.qkv.weight[: 2 * WIDTH] *= 1e-2
    return classifier(model, adam(model, 1e-3), steps=250)


class Queries(nn.Module):
    """Attention with a projection each, as most write it; the keys' gradient is tiny."""

    def __init__(self, scale: float = 1e-4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        nn.init.normal_(self.query.weight, std=scale)
        nn.init.normal_(self.key.weight, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


@healthy
def tiny_key_gradients() -> Run:
    model = ViT()
    for block in model.blocks:
        block.attention = Queries()
    return classifier(model, adam(model))


@healthy
def validated_often() -> Run:
    """Under-confident while it still learns."""
    model = nn.Sequential(nn.Dropout(0.4), *mlp(64, 128, 64))
    images, labels = digits()

    def validate() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model.eval()(images[1500:]).softmax(-1), labels[1500:]

    optimizer = adam(model, 1e-3)
    return classifier(model, optimizer, steps=300, validate=validate, validate_every=10)


@healthy
def scaled_loss() -> Run:
    model = mlp(64, 64, 64)
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def step(number: int) -> Tensor:
        x, y = batch()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return Run(model, step)


@healthy
def lbfgs() -> Run:
    x, y = diabetes()
    model = mlp(10, 16, last=1, act=nn.Tanh)
    y = (y - y.mean()) / y.std()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    return Run(model, lambda number: optimizer.step(closure).detach(), steps=100)


class Values(nn.Module):
    """Q values, and the target network, which no optimizer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.online = mlp(4, 32, last=2)
        self.target = copy.deepcopy(self.online)

    def forward(self, state: Tensor) -> Tensor:
        return self.online(state)


@healthy
def q_learning() -> Run:
    model = Values()
    optimizer = torch.optim.Adam(model.online.parameters(), 3e-3)
    error = []

    def step(number: int) -> Tensor:
        state = torch.randn(128, 4)
        action = torch.randint(2, (128, 1))
        reward = (state[:, :1] * (2 * action - 1)).tanh() * 5
        with torch.no_grad():
            goal = reward + 0.5 * model.target(torch.randn(128, 4)).amax(-1, keepdim=True)
        optimizer.zero_grad()
        loss = F.smooth_l1_loss(model(state).gather(1, action), goal)
        loss.backward()
        optimizer.step()
        if number % 20 == 0:
            model.target.load_state_dict(model.online.state_dict())
        values = model(state).detach().gather(1, action)
        ranks = torch.corrcoef(torch.stack([values[:, 0], reward[:, 0]]))[0, 1]
        error.append(1 - ranks)
        return loss.detach()

    return Run(model, step, score=lambda: error[-1])


@healthy
def contrastive() -> Run:
    model = mlp(64, 64, last=16)

    def loss_of() -> Tensor:
        x, _ = batch(64)
        noise = 0.2 * torch.randn(2, *x.shape)
        a, b = (F.normalize(model(x + n), dim=-1) for n in noise)
        return F.cross_entropy(a @ b.T / 0.07, torch.arange(len(x)))

    return Run(model, stepping(adam(model), loss_of))


@healthy
def triplets() -> Run:
    """A hinge: in the end many a batch has the loss 0, and no gradient at all."""
    model = mlp(64, 64, last=16)

    def loss_of() -> Tensor:
        images, labels = digits()
        kinds = torch.randint(10, (2, 16))
        kinds[1] = torch.where(kinds[1] == kinds[0], (kinds[1] + 1) % 10, kinds[1])
        order = labels[:1500].argsort(stable=True)
        counts = labels[:1500].bincount()

        def some(kinds: Tensor) -> Tensor:
            within = (torch.rand(len(kinds)) * counts[kinds]).long()
            return images[order[(counts.cumsum(0) - counts)[kinds] + within]]

        return F.triplet_margin_loss(model(some(kinds[0])), model(some(kinds[0])),
                                     model(some(kinds[1])), margin=0.5)  # fmt: skip

    return Run(model, stepping(adam(model), loss_of), steps=300)


@healthy
def denoising() -> Run:
    model = mlp(65, 128, 128, last=64, act=nn.SiLU)

    def loss_of() -> Tensor:
        x, _ = batch(128)
        t, noise = torch.rand(len(x), 1), torch.randn_like(x)
        mixed = (1 - t).sqrt() * x + t.sqrt() * noise
        return F.mse_loss(model(torch.cat([mixed, t], -1)), noise)

    return Run(model, stepping(adam(model), loss_of))


@healthy
def converged() -> Run:
    """All is learnt after a tenth of it: norms are tiny, and have benign spikes."""
    x = torch.randn(64, 8)
    teacher = nn.Linear(8, 2).requires_grad_(False)
    model = mlp(8, 32, last=2, act=nn.Tanh)

    def loss_of() -> Tensor:
        at = torch.randint(64, (8,))
        return F.mse_loss(model(x[at]), teacher(x[at]))

    return Run(model, stepping(adam(model, 1e-2), loss_of), steps=900)


@healthy
def fitted_by_heart() -> Run:
    """Cross-entropy of one batch, until nothing of it is left."""
    model = mlp(64, 128)
    images, labels = digits()

    def loss_of() -> Tensor:
        return F.cross_entropy(model(images[:32]), labels[:32])

    return Run(model, stepping(adam(model, 1e-2), loss_of), steps=300)


@healthy
def sparse_embeddings() -> Run:
    model = nn.Sequential(nn.EmbeddingBag(200, 16, sparse=True), nn.Linear(16, 5))
    optimizers = [
        torch.optim.SparseAdam(model[0].parameters(), 1e-2),
        torch.optim.Adam(model[1].parameters(), 1e-2),
    ]

    def step(number: int) -> Tensor:
        y = torch.randint(5, (32,))
        words = y[:, None] * 40 + torch.randint(40, (32, 6))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(words), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return Run(model, step)


@healthy
def accumulated() -> Run:
    model = ViT()
    optimizer = adam(model)

    def step(number: int) -> Tensor:
        optimizer.zero_grad()
        losses = []
        for _ in range(4):
            x, y = batch(16)
            losses.append(F.cross_entropy(model(x), y) / 4)
            losses[-1].backward()
        optimizer.step()
        return torch.stack(losses).sum().detach()

    return Run(model, step, steps=250)


class Siamese(nn.Module):
    """Learns from its own average, to which nothing flows back."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predictor = mlp(64, 64, last=16), mlp(16, 32, last=16)
        self.teacher = copy.deepcopy(self.online)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        goal = self.teacher(b).detach()
        return 1 - F.cosine_similarity(self.predictor(self.online(a)), goal).mean()


@healthy
def own_average() -> Run:
    model = Siamese()
    trained = [*model.online.parameters(), *model.predictor.parameters()]
    optimizer = torch.optim.AdamW(trained, 3e-3)

    def step(number: int) -> Tensor:
        x, _ = batch()
        optimizer.zero_grad()
        loss = model(x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(model.teacher.parameters(), model.online.parameters(), strict=True):
                p.lerp_(q, 0.02)
        return loss.detach()

    return Run(model, step)


@healthy
def clipped_per_layer() -> Run:
    """Every layer's gradient is cut to one norm: they are equal then, and were not before."""
    model = mlp(64, 64, 64, 64, 64)
    optimizer = adam(model)

    def step(number: int) -> Tensor:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for p in model.parameters():
            nn.utils.clip_grad_norm_(p, 1e-3)
        optimizer.step()
        return loss.detach()

    return Run(model, step)


@healthy
def noisy_labels() -> Run:
    """A loss whose noise is as large as its fall."""
    x = torch.randn(2000, 8)
    goal = torch.randn(8, 1)
    model = nn.Linear(8, 1)

    def loss_of() -> Tensor:
        at = torch.randint(2000, (4,))
        noise = torch.distributions.StudentT(3.0).sample((4, 1))
        return F.mse_loss(model(x[at]), x[at] @ goal + noise)

    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def score() -> Tensor:
        return F.mse_loss(model(x), x @ goal).detach()

    return Run(model, stepping(optimizer, loss_of), steps=600, score=score)
