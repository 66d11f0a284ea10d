"""What is compiled keeps its graphs, and the maps that come from one frame are told apart."""

import os

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bthooks import attach

from ..conftest import read


class Block(nn.Module):
    """Attention of two heads, as a kernel or written out, with or without dropout."""

    def __init__(self, kind: str = "fused") -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (6, -1)).transpose(1, 2).chunk(3, 1)
        if self.kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.mT * 0.3).softmax(-1)
            y = F.dropout(weights, 0.1) @ v if self.kind == "dropout" else weights @ v
        return F.layer_norm(x + y.transpose(1, 2).flatten(2), (16,))


class Stack(nn.Module):
    """Blocks that are called one by one: as they are, or recomputed in the backward pass."""

    def __init__(self, blocks=6, kind="fused", recomputed="nothing", times=1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))
        self.recomputed, self.times = recomputed, times
        with torch.no_grad():
            for index, block in enumerate(self.blocks):  # each attends in a way of its own
                block.qkv.weight.mul_(1 + index)

    def forward(self, x):
        if self.recomputed == "all":
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x):
        for _ in range(self.times):
            for block in self.blocks:
                each = self.recomputed == "each"
                x = checkpoint(block, x, use_reentrant=False) if each else block(x)
        return x


def entropies(model, tmp_path, steps=2, parts=1):
    """The entropies at each step, by path in the order of the model's maps."""
    torch.manual_seed(1)
    data = torch.randn(steps, 4, 9, 16).chunk(parts, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with attach(model, tmp_path, every=1, attention_rows=None, on_error="raise") as handle:
        for step in range(steps):
            for part in data:
                model(part[step]).pow(3).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle.step == steps
    run = read(tmp_path)
    return [run.group("attention/entropy/", step) for step in range(steps)]


def build(wrap=lambda model: model, **given):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return wrap(Stack(**given))


def assert_layers(found, expected, names):
    for at_step, values in zip(found, expected, strict=True):
        assert at_step == pytest.approx(dict(zip(names, values.values(), strict=True)), abs=1e-4)


LAYERS = ["root", *(f"root/{index}" for index in range(1, 6))]


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize(
    ("backend", "kind"),
    [(b, k) for b in ("eager", "aot_eager", "inductor") for k in ("fused", "explicit", "dropout")
     if k == "fused" or b != "inductor"],
)  # fmt: skip
@pytest.mark.parametrize("recomputed", ["nothing", "each", "all"])
def test_the_layers_of_a_compiled_model_are_told_apart(backend, kind, recomputed, tmp_path):
    expected = entropies(build(kind=kind), tmp_path / "plain")
    counter = CompileCounterWithBackend(backend)
    model = build(lambda m: torch.compile(m, backend=counter), kind=kind, recomputed=recomputed)
    found = entropies(model, tmp_path / "compiled")
    if kind == "dropout":  # which draws other numbers there
        expected, found = expected[:1], found[:1]
        assert [*found[0]] == LAYERS
        assert found[0]["root"] == pytest.approx(expected[0]["blocks.0"], abs=1e-4)
    else:
        assert_layers(found, expected, LAYERS)
    assert counter.frame_count == 1


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("inside", ["compile", "DDP"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_layers_under_ddp(inside, parts, tmp_path):
    def compiled(model):
        return torch.compile(model, backend="aot_eager")

    def distributed(model):
        return DistributedDataParallel(model)

    one, other = (compiled, distributed) if inside == "compile" else (distributed, compiled)
    expected = entropies(build(), tmp_path / "plain", parts=parts)
    found = entropies(build(lambda m: other(one(m))), tmp_path / "compiled", parts=parts)
    assert_layers(found, expected, LAYERS)


def first_and_last(model):
    """Compiles the blocks in the middle, as one."""
    blocks = model.blocks
    middle = torch.compile(nn.Sequential(*blocks[1:5]), backend="aot_eager")
    model.blocks = nn.ModuleList([blocks[0], middle, blocks[5]])
    return model


def by_its_forward(model):
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def by_a_function(model):
    model.run = torch.compile(model.run, backend="aot_eager")
    return model


MIDDLE = ["blocks.1", "blocks.1/1", "blocks.1/2", "blocks.1/3"]
PARTS = {
    first_and_last: ["blocks.0", *MIDDLE, "blocks.2"],
    by_its_forward: LAYERS,
    by_a_function: LAYERS,
}


@pytest.mark.parametrize("wrap", PARTS)
def test_a_compiled_part_is_told_apart_too(wrap, tmp_path):
    expected = entropies(build(), tmp_path / "plain")
    found = entropies(build(wrap), tmp_path / "compiled")
    assert_layers(found, expected, PARTS[wrap])


def blocks_in_place(model):
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


def blocks_replaced(model):
    blocks = (torch.compile(block, backend="aot_eager") for block in model.blocks)
    model.blocks = nn.ModuleList(blocks)
    return model


@pytest.mark.parametrize("wrap", [blocks_in_place, blocks_replaced])
@pytest.mark.parametrize("times", [1, 3, 6])
def test_compiled_blocks_are_measured_as_without_compile(wrap, times, tmp_path):
    expected = entropies(build(blocks=2, times=times), tmp_path / "plain")
    found = entropies(build(wrap, blocks=2, times=times), tmp_path / "compiled")
    assert found[0].keys() == expected[0].keys()
    assert_layers(found, expected, [*expected[0]])


class Looped(nn.Module):
    """Calls a compiled stack of layers again and again, as a decoder does."""

    def __init__(self, stack, times):
        super().__init__()
        self.stack, self.times = stack, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.stack(x)
        return x


def test_a_loop_over_a_compiled_stack_is_averaged_layer_by_layer(tmp_path):
    plain = entropies(build(lambda m: Looped(m, 5), blocks=3), tmp_path / "plain")
    wrap = lambda m: Looped(torch.compile(m, backend="aot_eager"), 5)  # noqa: E731  # short
    found = entropies(build(wrap, blocks=3), tmp_path / "compiled")
    assert_layers(found, plain, ["stack", "stack/1", "stack/2"])


def test_a_collapse_is_told_with_the_name_of_its_layer(tmp_path):
    def collapsing(model):
        with torch.no_grad():
            for index, block in enumerate(model.blocks):
                block.qkv.weight.normal_(0, 20 if index == 3 else 0.1)
        return torch.compile(model, backend="aot_eager")

    model = build(collapsing)
    entropies(model, tmp_path, steps=3)
    ((_, alert),) = read(tmp_path).texts["health/alerts/text_summary"]
    assert "attention_collapse: root/3" in alert


class Penalised(nn.Module):
    """Goes back through its checkpointed blocks inside its own forward."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x):
        x = x.clone().requires_grad_()
        gradient = torch.autograd.grad(self.stack(x).pow(3).sum(), x)[0]
        return self.stack.blocks[0].qkv(x).mean() + gradient.square().sum()


@pytest.mark.parametrize("recomputed", ["each", "all"])
def test_a_recomputation_is_no_further_map(recomputed, tmp_path):
    plain = entropies(build(Penalised, blocks=2), tmp_path / "plain")
    found = entropies(build(Penalised, blocks=2, recomputed=recomputed), tmp_path / "recomputed")
    assert_layers(found, plain, ["stack.blocks.0", "stack.blocks.1"])


def losses_of(model, steps=4):
    torch.manual_seed(1)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01), []
    for x in torch.randn(steps, 4, 9, 16):
        losses.append(model(x).pow(3).mean() / 100)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("compiled", ["before attach", "after attach", "after steps"])
@pytest.mark.parametrize("capture", [None, ["attention"]])
def test_a_root_compiled_in_place_is_said_at_once_and_left_alone(compiled, capture, tmp_path):
    def run(attached):
        counter, handle, losses = CompileCounterWithBackend("aot_eager"), None, []
        model = build()
        if compiled == "before attach":
            model.compile(backend=counter)
        if attached:
            handle = attach(model, tmp_path, capture=capture, every=1)
        if compiled == "after steps":
            losses += losses_of(model)
        model.compile(backend=counter)
        losses += losses_of(model)
        return losses, counter.frame_count, handle

    losses, frames, _ = run(attached=False)
    with pytest.warns(RuntimeWarning, match=r"forward: model\.compile\(\) .* attach to that") as w:
        found, also, handle = run(attached=True)
    assert len(w) == 1
    assert "torch.compile(model)" in handle.report().missed["attention"]
    handle.detach()
    assert torch.equal(torch.stack(found), torch.stack(losses))
    assert also == frames
    points = read(tmp_path).scalars.get("attention/mean_entropy", [])
    assert [step for step, _ in points] == ([0, 1, 2, 3] if compiled == "after steps" else [])
    # What the warning says to do.
    model = torch.compile(build(), backend="aot_eager")
    assert_layers(entropies(model, tmp_path / "so"), entropies(build(), tmp_path / "plain"), LAYERS)
