"""Explicit attention is found by what its scores descend from, and nothing else is."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bthooks import attach

from ..conftest import read
from ..models import batch, entropy
from ..zoo import TRAPS


class Explicit(nn.Module):
    """Attention with a softmax of its own; `kind` says how it is written."""

    def __init__(self, kind: str, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mix = nn.Parameter(torch.randn(heads, heads))
        self.register_buffer("sparse", torch.eye(heads).to_sparse())  # as whisper has
        self.softmax, self.drop = nn.Softmax(-1), nn.Dropout(0.3)
        self.weights: torch.Tensor | None = None

    def forward(self, x):
        b, length, _ = x.shape
        q, k, v = self.qkv(x * 3).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if self.kind == "bmm":
            q, k, v = (part.reshape(b * self.heads, length, -1) for part in (q, k, v))
            scores = torch.baddbmm(torch.randn(length, length), q, k.mT, alpha=0.5)
            weights = F.softmax(scores, dim=2)
            y = torch.bmm(self.drop(self.keep(weights)), v).view(b, self.heads, length, -1)
        elif self.kind == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(hidden, -torch.inf)
            weights = self.keep(self.softmax(scores / 2))
            y = torch.einsum("bhij,bhjd->bhid", self.drop(weights), v)
        elif self.kind == "talking heads":
            scores = torch.einsum("bhij,hg->bgij", q @ k.mT, self.mix)
            weights = self.keep(scores.softmax(dim=-1))
            y = torch.einsum("bhij,hg->bgij", weights, self.mix) @ v
        elif self.kind == "capped":
            scores = torch.tanh(q @ k.transpose(-1, -2) / 20) * 20
            scores = torch.where(hidden, torch.finfo(scores.dtype).min, scores)
            weights = self.keep(F.softmax(scores.float(), dim=-1).to(q.dtype))
            y = torch.matmul(weights, v)
        elif self.kind == "in place":
            scores = torch.matmul(q, k.mT)
            scores *= 0.3
            scores += torch.zeros(length, length).masked_fill(hidden, torch.finfo(x.dtype).min)
            weights = self.keep(scores.softmax(-1))
            y = weights @ v
        elif self.kind == "right operand":
            weights = self.keep((k.mT.mT @ q.mT).mT.softmax(-1))
            y = (v.mT @ weights.mT).mT
        elif self.kind == "windows":
            q, k, v = (part.unflatten(2, (3, -1)).transpose(1, 2) for part in (q, k, v))
            scores = q @ k.mT  # (B, W, H, L / W, L / W)
            weights = self.keep(scores.softmax(-1))
            y = (weights @ v).transpose(1, 2).flatten(2, 3)
        elif self.kind == "one head":
            q, k, v = (part[0, 0] for part in (q, k, v))
            weights = self.keep((q @ k.t()).softmax(-1))
            y = (weights @ v).expand(b, self.heads, -1, -1)
        elif self.kind == "sinks":
            sinks = self.mix[0].view(1, -1, 1, 1).expand(b, -1, length, -1)
            scores = torch.cat([(q @ k.mT).masked_fill(hidden, -torch.inf), sinks], -1)
            weights = self.keep(scores.softmax(-1)[..., :-1])
            y = self.drop(weights) @ v
        elif self.kind == "re-attention":  # DeepViT
            weights = self.keep((q @ k.mT).softmax(-1))
            mixed = torch.einsum("bhij,hg->bijg", weights, self.mix)
            y = F.layer_norm(mixed, mixed.shape[-1:]).permute(0, 3, 1, 2) @ v
        elif self.kind == "convolved heads":
            scores = F.conv2d(q @ k.mT, self.mix[..., None, None])
            weights = self.keep(scores.softmax(-1))
            y = F.conv2d(weights, self.mix[..., None, None]) @ v
        elif self.kind == "distances":
            weights = self.keep((-torch.cdist(q, k).square()).softmax(-1))
            y = weights @ v
        elif self.kind == "written out":
            scores = (q @ k.mT).masked_fill(hidden, -torch.inf)
            raised = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = self.keep(raised / raised.sum(-1, keepdim=True))
            y = weights @ v
        elif self.kind == "written out in place":
            raised = (q @ k.mT).exp_()
            weights = self.keep(raised * (1 / (raised.sum(dim=-1, keepdim=True) + 1e-9)))
            y = weights @ v
        elif self.kind in ("masked once raised", "masked once normal"):
            scores = q @ k.mT / 2
            raised = (scores - scores.amax(-1, keepdim=True)).exp()
            raised = raised if self.kind == "masked once raised" else scores.softmax(-1)
            raised = raised * ~hidden
            weights = self.keep(raised / raised.sum(-1, keepdim=True))
            y = weights @ v
        elif self.kind == "in a buffer":
            scores = torch.zeros(b * self.heads, length, length)
            scores.baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT)
            weights = self.keep(scores.softmax(-1))
            y = (weights @ v.flatten(0, 1)).unflatten(0, (b, -1))
            scores.copy_(torch.rand(length, length))  # no scores any more
            y = y + (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (b, -1))
        elif self.kind == "into itself":
            with torch.no_grad():
                scores = q @ k.mT / 2
                weights = self.keep(torch.softmax(scores, -1, out=scores))
            y = weights @ v
        elif self.kind == "logsumexp":
            scores = torch.max(q @ k.mT, torch.tensor(-50.0)).masked_fill(hidden, -1e9)
            weights = self.keep((scores - scores.logsumexp(-1, keepdim=True)).exp())
            y = weights @ v
        elif self.kind == "log softmax":
            weights = self.keep(F.log_softmax((q @ k.mT).abs(), -1).exp())
            y = weights @ v
        elif self.kind == "one key":
            weights = self.keep(torch.einsum("bhid,bhjd->bhij", q, k[:, :, :1]).softmax(-1))
            y = torch.einsum("bhij,bhjd->bhid", weights, v[:, :, :1])
        elif self.kind == "local and global":  # two products side by side
            scores = torch.cat([q @ k[:, :, :4].mT, q @ k[:, :, 4:].mT], -1)
            weights = self.keep(scores.softmax(-1))
            y = weights[..., :4] @ v[:, :, :4] + weights[..., 4:] @ v[:, :, 4:]
        elif self.kind == "twice":
            weights = self.keep((q @ k.mT).softmax(-1))
            y = weights @ v + weights @ k
        else:  # math: dropout sends SDPA to plain operators on the CPU
            self.keep((q.double() @ k.double().mT / 2).softmax(-1))
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        return self.out(y.transpose(1, 2).flatten(2))

    def keep(self, weights):
        self.weights = weights.detach().clone()
        return weights


KINDS = [
    "bmm", "einsum", "talking heads", "capped", "in place", "right operand", "windows",
    "one head", "sinks", "twice", "math", "re-attention", "convolved heads", "distances",
    "written out", "written out in place", "logsumexp", "log softmax", "one key",
    "local and global", "masked once raised", "masked once normal", "in a buffer",
    "into itself",
]  # fmt: skip
CONTEXTS = {"train": contextlib.nullcontext, "eval": torch.no_grad, "infer": torch.inference_mode}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_explicit_attention_is_found_and_its_entropy_true(kind, context, tmp_path):
    model = nn.Sequential(Explicit(kind)).train(context == "train")
    x, _ = batch(0)
    with torch.random.fork_rng(), CONTEXTS[context]():
        plain = model(x)
    with attach(model, tmp_path, every=1, on_error="raise"), CONTEXTS[context]():
        seen = model(x)
    assert torch.equal(seen, plain)
    run = read(tmp_path)
    found = run.group("attention/entropy/" if context == "train" else "val/attention/entropy/", 0)
    assert found == pytest.approx({"0": entropy(model[0].weights.double())}, abs=1e-4)


WEIGHTS = {
    "bayesian": lambda w, b: w + torch.log1p(torch.exp(b)) * torch.randn_like(b),
    "noise in a buffer": lambda w, b: w + b.exp() * torch.empty_like(b).normal_(),
    "adapter": lambda w, b: w + 0.5 * (b[:, :4] @ b[:4] @ b[:16]),
    "normalized": lambda w, b: F.normalize(w, dim=-1) * 3,
    "standardized": lambda w, b: F.layer_norm(w, w.shape[-1:]) * 0.5,
    "quantized": lambda w, b: torch.round(w * 8) / 8,
    "cast": lambda w, b: w.double().to(w.dtype),
}


class Computed(nn.Module):
    """Projections by weights that are made of parameters; then a router by such a weight."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.w = nn.Parameter(torch.randn(48, 16) * 0.5)
        self.b = nn.Parameter(torch.randn(48, 16) * 0.1 - 1)

    def forward(self, x):
        w = WEIGHTS[self.kind](self.w, self.b)
        q, k, v = F.linear(x, w).chunk(3, -1)
        self.weights = (q @ k.mT / 4).softmax(-1)
        x = x + self.weights @ v
        gate = F.linear(x, w[:4]).softmax(-1)  # (B, L, E)
        return torch.einsum("ble,bled->bld", gate, x[:, :, None] * torch.ones(4, 1))


PARAMETRIZATIONS = {
    "spectral norm": torch.nn.utils.parametrizations.spectral_norm,
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
}


class Parametrized(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.q, self.k, self.gate = (
            PARAMETRIZATIONS[kind](nn.Linear(16, width)) for width in (16, 16, 4)
        )

    def forward(self, x):
        self.weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        x = x + self.weights @ x
        gate = self.gate(x).softmax(-1)
        return torch.einsum("ble,bled->bld", gate, x[:, :, None] * torch.ones(4, 1))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", [*WEIGHTS, *PARAMETRIZATIONS])
def test_weights_made_of_parameters_are_parameters(kind, context, tmp_path):
    model = (Computed if kind in WEIGHTS else Parametrized)(kind).train(context == "train")
    x = batch(0)[0] * 3
    with attach(model, tmp_path, every=1, on_error="raise"), CONTEXTS[context]():
        model(x)
    run = read(tmp_path)
    found = run.group("attention/entropy/" if context == "train" else "val/attention/entropy/", 0)
    assert found == pytest.approx({"root": entropy(model.weights.double())}, abs=1e-4)


class AfterAnother(nn.Module):
    """A linear attention or one by squares, which leave products; a router; true attention."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(16, 48), nn.Linear(16, 48)
        self.gate, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16))
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.first(x).chunk(3, -1)
        if self.kind == "linear":
            x = x + self.out(q @ (k.mT @ v))
        elif self.kind == "state":
            x = x + self.out(q @ x.new_zeros(len(x), 16, 16) + x * 0)
        else:
            x = x + F.relu(q @ k.mT).square() @ v / 9
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        gate = self.gate(y).softmax(-1)
        x = x + torch.einsum("ble,bled->bld", gate, torch.stack([y * e for e in self.experts], -2))
        q, k, v = self.second(x).chunk(3, -1)
        self.weights = (q @ k.mT / 5).softmax(-1)
        return self.weights @ v


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["linear", "state", "squares"])
@pytest.mark.parametrize("size", [2, 16])  # the batch is as large as the width, too
def test_products_end_where_features_are_mixed(kind, context, size, tmp_path):
    model = AfterAnother(kind).train(context == "train")
    x, _ = batch(0, size=size)
    with attach(model, tmp_path, every=1, on_error="raise"), CONTEXTS[context]():
        model(x)
    run = read(tmp_path)
    found = run.group("attention/entropy/" if context == "train" else "val/attention/entropy/", 0)
    assert found == pytest.approx({"root": entropy(model.weights.double())}, abs=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_no_attention_is_not_flagged(trap, context, tmp_path):
    model = trap().train(context == "train")
    x, _ = batch(0)
    expected = model(x)
    with attach(model, tmp_path, every=1, on_error="raise") as handle, CONTEXTS[context]():
        assert torch.equal(model(x), expected)
    assert "attention" in handle.report().missed
    assert not [tag for tag in read(tmp_path).scalars if "attention" in tag]


def test_nothing_of_the_trace_outlives_the_forward():
    import gc
    import weakref

    model = Explicit("einsum").eval()
    with attach(model, None, every=1), torch.no_grad():
        alive = []

        def remember(module, args, output):
            alive.append(weakref.ref(output.untyped_storage()))

        model.softmax.register_forward_hook(remember)
        model(batch(0)[0])
        gc.collect()
        assert [reference() for reference in alive] == [None]
