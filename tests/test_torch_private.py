"""Each private name of torch behaves as we rely on it: one test for each function of the room.

Where a new torch fails here, the function of that name is what has to be mended, and nothing else.
"""

import ast
import contextlib
import dataclasses
import functools
import re
import sys
import warnings
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp.fully_sharded_data_parallel import FSDP_WRAPPED_MODULE
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bthooks
from bthooks import torch_private as room
from bthooks.capture.operators import role
from bthooks.names import unwrapped

TREE = ast.parse(Path(room.__file__).read_text())
FUNCTIONS = {
    node.name: node
    for node in TREE.body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
}
MAY_FAIL = [name for name, node in FUNCTIONS.items() if node.decorator_list]


class Calls(nn.Module):
    """Calls `inner`, then `look`, whose results it keeps."""

    def __init__(self, look, inner=None):
        super().__init__()
        self.inner, self.look, self.seen = inner, look, []

    def forward(self, x):
        if self.inner is not None:
            x = self.inner(x)
        self.seen.append(self.look())
        return x * 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_has_a_test_and_says_since_which_torch(name):
    assert f"test_{name}" in globals()
    assert re.search(r"torch <= \d\.\d+", ast.get_docstring(FUNCTIONS[name]) or "")


def test_innermost():
    child = Calls(lambda: room.innermost({root, child}))
    root = Calls(lambda: room.innermost({root, child}), nn.Sequential(child))
    root(torch.ones(2))
    assert (child.seen, root.seen) == ([child], [root])
    child.look = lambda: room.innermost({root})
    root(torch.ones(2))
    assert child.seen[1] is root
    assert room.innermost({root, child}) is None

    seen = []

    def backend(graph, inputs):
        def run(*args):
            seen.append(room.innermost({compiled}))
            return graph(*args)

        return run

    class Compiled(nn.Module):
        def forward(self, x):
            return x.exp()

    compiled = Compiled()
    compiled.compile(backend=backend)
    compiled(torch.ones(2))
    assert seen == [compiled]


def test_call_of():
    def look():
        """Twice by the same line, once by another; a frame is the same one as long as it lives."""
        calls.extend(room.call_of(model) for _ in range(2))
        calls.append(room.call_of(model))
        assert len({frame for frame, *_ in calls[-3:]}) == 1

    calls = []
    model, x = Calls(look), torch.ones(2)
    model(x), model(x=x)
    (_, given, one), (_, _, same), (_, _, other), (_, named, again), *_ = calls
    assert (given, named) == (((x,), {}), ((), {"x": x}))
    assert one == same != other
    assert again == one
    with pytest.raises(RuntimeError, match="not called"):
        room.call_of(model)

    # A graph that is interpreted, as activation checkpointing does: a line for all of its nodes.
    def look_at(func, args, kwargs):
        calls.append(room.call_of(model))
        return func(*args, **kwargs)

    graph = torch.fx.symbolic_trace(lambda x: x.exp().exp())
    model.look = lambda: torch.fx.Interpreter(graph).run(x)
    with room.dispatch_mode(look_at):
        model(x), model(x)
    places = [place for *_, place in calls[-6:]]  # exp, exp, mul, twice
    assert places[:2] == places[3:5]
    assert places[0] != places[1]


def test_calls_on_stack(monkeypatch):
    class Recursive(nn.Module):
        def forward(self, depth):
            return self(depth - 1) if depth else room.calls_on_stack(self)

    assert [Recursive()(depth) for depth in (0, 1, 4)] == [1, 2, 5]
    assert room.calls_on_stack(Recursive()) == 0
    found = []

    def look(module, args):
        found.append(room.calls_on_stack(module))

    root = nn.Linear(2, 2)
    for hooked in (root, nn.DataParallel(root), torch.compile(nn.Linear(2, 2), backend="eager")):
        hooked.register_forward_pre_hook(look)
        hooked(torch.ones(2))
    with register_module_forward_pre_hook(look):
        nn.TransformerEncoderLayer(2, 1, 2).eval()(torch.ones(2, 2))
    assert len(found) > 4
    assert all(found)
    assert not room.calls_on_stack(root)

    class Other(nn.Linear):
        """Its hooks are run by another function, as if torch had renamed it."""

        _call_impl = FunctionType(nn.Module._call_impl.__code__.replace(), vars(module))

    other = Other(2, 2)
    other.register_forward_pre_hook(look)
    other(torch.ones(2))
    assert not found[-1]
    monkeypatch.setattr(nn.Module, "_call_impl", len)
    with pytest.raises(RuntimeError, match="calls_on_stack"):
        room.calls_on_stack(root)  # in C
    monkeypatch.delattr(nn.Module, "_call_impl")
    with pytest.raises(RuntimeError, match="calls_on_stack"):
        room.calls_on_stack(root)  # renamed


def test_steps_on_stack():
    found = []

    def look(*_):
        found.append(room.steps_on_stack())

    def closure():
        look()
        return torch.zeros(())

    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            look()

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)

    parameter = nn.Parameter(torch.ones(2))
    with register_optimizer_step_pre_hook(look), register_optimizer_step_post_hook(look):
        torch.optim.SGD([parameter]).step(closure)
        Own([parameter], {}).step()
        Twice([parameter]).step(closure)
    assert found == [1] * 6 + [1, 2, 2, 2, 1]
    assert not room.steps_on_stack()


def test_is_running():
    def inner():
        return room.is_running(outer), room.is_running(test_is_running)

    def outer():
        return inner()

    assert outer() == (True, True)
    assert inner() == (False, True)


# A fused one unscales by itself: the scaler's `step` calls it, and not `_maybe_opt_step`.
@pytest.mark.parametrize("kind", [torch.optim.SGD, functools.partial(torch.optim.SGD, fused=True)])
def test_find_scaler(kind):
    found = []
    parameter = nn.Parameter(torch.ones(2))
    optimizer = kind([parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with register_optimizer_step_post_hook(lambda *_: found.append(room.find_scaler())):
        scaler.scale(parameter.sum()).backward()
        scaler.step(optimizer)
        optimizer.step()
        off = torch.amp.GradScaler("cpu", enabled=False)
        off.scale(parameter.sum()).backward()
        off.step(optimizer)
    assert found == [scaler, None, None]


def test_scaler_state():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for loss, expected in ((parameter.sum(), (8, 1, 8)), (parameter.sum() * torch.inf, (4, 0, 8))):
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert room.scaler_state(scaler) == expected


def test_is_traced():
    found = []

    def look(x):
        found.append(room.is_traced())
        return x + 1

    look(torch.ones(2))
    make_fx(look)(torch.ones(2))
    make_fx(look, tracing_mode="fake")(torch.ones(2))
    torch.jit.trace(look, torch.ones(2), check_trace=False)
    look(torch.ones(2))
    assert found == [False, True, True, True, False]


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_without_modes():
    x = torch.ones(2)
    with Watch() as outer, Watch() as inner:
        with contextlib.suppress(KeyError), room.without_modes():
            x.exp()
            raise KeyError
        assert outer.seen == inner.seen == []
        with FlopCounterMode(display=False) as counter:
            with room.without_modes():
                torch.ones(2, 2) @ torch.ones(2, 2)
            assert counter.get_total_flops() == 0
            x.sin()
    assert outer.seen == inner.seen == [torch.ops.aten.sin.default]


def test_without_overrides():
    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *given):
            raise AssertionError

    x, own = torch.ones(2), torch.ones(2).as_subclass(Subclass)
    with Watch() as mode, WatchFunctions() as functions:
        first, second = room.without_overrides()
        with first, second:
            x.exp()
            torch.sin(own)
        assert mode.seen == functions.seen == []
        x.exp()
    assert len(mode.seen) == len(functions.seen) == 1


def test_is_compiled():
    assert not room.is_compiled(nn.Linear(2, 2))
    returned, in_place = torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2)
    in_place.compile()
    assert room.is_compiled(returned)
    assert room.is_compiled(in_place)


def test_is_compiled_in_place():
    returned, in_place = torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2)
    in_place.compile()
    assert not room.is_compiled_in_place(returned)
    assert room.is_compiled_in_place(in_place)


def test_is_normalization():
    norms = nn.BatchNorm1d(2), nn.InstanceNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d()
    assert all(map(room.is_normalization, norms))
    others = nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.RMSNorm(2), nn.Dropout()
    assert not any(map(room.is_normalization, others))


def test_version():
    x = torch.ones(2)
    before = room.version(x)
    x.detach()[0] = 2
    assert room.version(x) == before + 1
    x.exp()
    assert room.version(x) == before + 1
    with torch.inference_mode():
        assert room.version(torch.ones(2)) == -1


def test_is_in_functorch():
    found = []

    def look(x):
        found.append(room.is_in_functorch(x))
        return x.sum()

    grad(look)(torch.ones(2))
    vmap(look)(torch.ones(2, 2))
    look(nn.Parameter(torch.ones(2)))
    assert found == [True, True, False]


def test_has_values():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            return x.exp()

    def backend(graph, inputs):
        seen.extend(inputs)
        return graph

    torch.compile(Model(), backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend))(
        torch.ones(2)
    )
    functional = torch._subclasses.functional_tensor.FunctionalTensor
    with torch._subclasses.functional_tensor.FunctionalTensorMode():
        seen.append(functional.to_functional(torch.ones(2)))
    assert [room.has_values(x) for x in (*seen, torch.ones(2, device="meta"))] == [False] * 3
    assert room.has_values(nn.Parameter(torch.ones(2)))


def test_norm_of_each():
    large = torch.full((3,), 1e4, dtype=torch.float16)
    found = room.norm_of_each([large, torch.ones(4).half()], torch.float64)
    assert [norm.dtype for norm in found] == [torch.float64] * 2
    assert [norm.shape for norm in found] == [()] * 2
    torch.testing.assert_close(torch.stack(list(found)), torch.tensor([3e8**0.5, 2.0]).double())


class Pair(NamedTuple):
    a: object
    b: object


@dataclasses.dataclass
class Registered:
    x: object


torch.utils._pytree.register_dataclass(Registered)


def test_leaves_of():
    tree = {"a": [1, (2, None)], "b": Pair(3, Registered(4))}
    leaves, rebuilt = room.leaves_of(tree)
    assert [leaf for leaf in leaves if leaf is not None] == [1, 2, 3, 4]
    doubled = rebuilt([leaf and leaf * 2 for leaf in leaves])
    assert doubled == {"a": [2, (4, None)], "b": Pair(6, Registered(8))}


def test_after_backward():
    order = []
    first, last = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def accumulated(parameter):
        order.append("last")
        room.after_backward(lambda: order.append("ours"), former=None)

    def reduce(parameter):
        order.append("first")
        queue = torch.autograd.Variable._execution_engine.queue_callback  # as DDP and FSDP2 do
        queue(lambda: order.append("reduced"))

    last.register_post_accumulate_grad_hook(accumulated)
    first.register_post_accumulate_grad_hook(reduce)
    ((first * 2).exp() * last).sum().backward()
    assert order == ["last", "first", "reduced", "ours"]

    numbers, recomputed, ended = [None], [], []
    parameters = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def look(x):
        recomputed.append(torch._C._current_graph_task_id())
        return x.exp()

    def accumulated_again(_):
        numbers.append(room.after_backward(lambda: ended.append(numbers[-1]), numbers[-1]))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(accumulated_again)
    for _ in range(2):
        checkpoint(look, parameters[0] * parameters[1], use_reentrant=False).sum().backward()
    _, a, again, b, last_one = numbers
    assert -1 != a == again != b == last_one != -1
    assert recomputed == [-1, a, -1, b]
    assert ended == [a, b]


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_default_group(group):
    first = room.default_group()
    assert first is not None
    assert room.default_group() is first
    dist.destroy_process_group()
    assert room.default_group() is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert room.default_group() is not first


def test_own_store(group):
    one, other = room.own_store(), room.own_store()
    assert one is not other
    one.set("bthooks", "here")
    assert other.get("bthooks") == b"here"
    assert other.check(["bthooks"])
    assert not other.check(["bthooks", "absent"])
    assert other.delete_key("bthooks")


def test_is_rehearsed(group):
    child = Calls(lambda: (room.is_rehearsed(), torch.is_grad_enabled()), nn.Linear(2, 2))
    stage = PipelineStage(child, 0, 1, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)
    schedule.step(torch.ones(4, 2), target=torch.ones(4, 2), losses=[])
    assert child.seen[-2:] == [(False, True)] * 2
    # With grad is run what is no rehearsal, and nothing else.
    assert all(is_rehearsed or not has_grad for is_rehearsed, has_grad in child.seen[:-2])


@pytest.mark.parametrize("divides", [True, False])
def test_pipeline_divisor(divides, group):
    model, found = nn.Linear(2, 2), []
    model.weight.register_post_accumulate_grad_hook(lambda _: found.append(room.pipeline_divisor()))
    stage = PipelineStage(model, 0, 1, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 4, loss_fn=nn.functional.mse_loss, scale_grads=divides)
    schedule.step(torch.ones(4, 2), target=torch.ones(4, 2), losses=[])
    assert found[-4:] == [4 if divides else 1] * 4
    model(torch.ones(1, 2)).sum().backward()
    assert found[-1] == 1


def test_backward_pass():
    numbers = []
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_post_accumulate_grad_hook(lambda _: numbers.append(room.backward_pass()))
    for _ in range(2):
        parameter.sum().backward()
    first, second = numbers
    assert None not in numbers
    assert first != second
    assert room.backward_pass() is None
    numbers.clear()

    def forward(x):
        numbers.append(room.backward_pass())
        return x.exp()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert [number is None for number in numbers] == [True, False]


def test_is_captured():
    assert not room.is_captured()  # that it is true while capturing, tests/test_cuda.py says


def test_hook_first():
    order = []
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_post_accumulate_grad_hook(lambda p: order.append("before"))
    handle = room.hook_first(parameter, lambda p: order.append("ours"))
    parameter.register_post_accumulate_grad_hook(lambda p: order.append("after"))
    parameter.sum().backward()
    assert order == ["ours", "before", "after"]
    handle.remove()
    parameter.sum().backward()
    assert order[3:] == ["before", "after"]


def test_is_hooked_by_others():
    parameter = nn.Parameter(torch.ones(2))
    room.hook_first(parameter, lambda p: None)
    assert not room.is_hooked_by_others(parameter)
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    assert room.is_hooked_by_others(parameter)


def test_the_names_of_wrappers_are_known():
    for wrapper in (torch.compile(nn.Linear(2, 2)), checkpoint_wrapper(nn.Linear(2, 2))):
        names = [name for name, _ in wrapper.named_modules()]
        assert [*map(unwrapped, names)] == ["root", "root"]
    assert unwrapped(f"{FSDP_WRAPPED_MODULE}.weight") == "weight"


def test_nothing_private_is_touched_at_import():
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        names = [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
        names += [alias.name for alias in getattr(node, "names", ())]
        names += (getattr(node, "module", None) or "").split(".")
        assert not [name for name in names if re.match("_[a-z]", name)]


def test_a_name_that_is_gone_is_an_error_with_the_version(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_norm")
    with pytest.raises(
        RuntimeError, match=rf"^torch {re.escape(torch.__version__)} .*norm_of_each"
    ):
        room.norm_of_each([torch.ones(2)], torch.float32)


def seeing(seen):
    def handle(func, args, kwargs):
        seen.append(func)
        return func(*args, **kwargs)

    return room.dispatch_mode(handle)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_dispatch_mode():
    from torch.nn.attention.flex_attention import flex_attention

    x, seen = torch.randn(1, 2, 4, 8), []
    with seeing(seen):
        (x @ x.mT).softmax(-1)
        flex_attention(x, x, x)
    assert torch.ops.aten._softmax.default in seen
    assert torch.ops.higher_order.flex_attention in seen
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.sin() + 1, backend="aot_eager", fullgraph=True)
    with seeing([]):
        torch.testing.assert_close(compiled(x), x.sin() + 1)


def test_is_entered():
    seen = []

    def handle(func, args, kwargs):
        seen.append(room.is_entered(mode))
        return func(*args, **kwargs)

    mode = room.dispatch_mode(handle)
    assert not room.is_entered(mode)
    with mode, Watch():
        assert room.is_entered(mode)
        torch.ones(1)
        with room.without_modes():
            assert not room.is_entered(mode)
    assert seen == [False]


def test_leave():
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen, other = [], Other()
    mode = seeing(seen)
    mode.__enter__()
    with other:
        room.leave(mode)  # from below another
        room.leave(mode)  # and again
        torch.ones(1)
    assert not seen
    assert torch._C._len_torch_dispatch_stack() == 0


def test_as_outside_modes():
    layer, x = nn.Linear(64, 16), torch.randn(7, 4, 64).transpose(0, 1)

    def handle(func, args, kwargs):
        with room.as_outside_modes():
            return func(*args, **kwargs)

    def products(context):
        with torch.inference_mode(), torch.autograd.profiler.profile() as profile, context:
            layer(x)
        return {e.name for e in profile.function_events} & {"aten::mm", "aten::bmm"}

    assert (
        products(room.dispatch_mode(handle)) == products(contextlib.nullcontext()) == {"aten::mm"}
    )
    assert products(seeing([])) == {"aten::bmm"}  # what it is there for
    with room.as_outside_modes():  # and where nothing is excluded
        assert torch.equal(layer(x), layer(x))


def test_own_tensors():
    class Overriding(nn.BatchNorm1d):
        def named_parameters(self, *args, **kwargs):
            return iter(())

    model = nn.Sequential(Overriding(3), nn.Linear(3, 2, bias=False))
    parameters, buffers = room.own_tensors(list(model.modules()))
    norm, linear = model
    assert list(map(id, parameters)) == list(map(id, (norm.weight, norm.bias, linear.weight)))
    assert [b.shape for b in buffers] == [(3,), (3,), ()]


def test_schema():
    found = room.schema(torch.ops.aten.softmax.int)
    assert (found.name, found.overload_name, found.is_mutable) == ("aten::softmax", "int", False)
    assert [(a.name, a.default_value) for a in found.arguments] == [
        ("self", None),
        ("dim", None),
        ("dtype", None),
    ]
    assert room.schema(torch.ops.aten.add_.Tensor).is_mutable
    assert room.schema(torch.ops.higher_order.flex_attention) is None
    assert room.schema(torch.softmax) is None


def test_storage_of():
    x = torch.randn(4, 4)
    address, storage = room.storage_of(x)
    assert storage.data_ptr() == x.data_ptr()
    assert room.storage_of(x[1:].T)[0] == address
    assert room.storage_of(x.clone())[0] != address
    empty = torch.empty(0), torch.empty(0)
    assert room.storage_of(empty[0])[0] != room.storage_of(empty[1])[0]
    assert room.storage_of(torch.eye(3).to_sparse()) is None
    inside = []
    torch.func.grad(lambda x: (inside.append(room.storage_of(x)), x.sum())[1])(x)
    assert inside[0][0] == address


def test_hide_from_script():
    def own(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output * 2

    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    model[0].register_forward_hook(own)
    for hook in (model.register_forward_hook, model[0].register_forward_pre_hook):
        hook(room.Hook(print))
    create = torch.jit._recursive.create_script_module
    end = room.hide_from_script()
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model[0].forward(x) * 2)
    assert not scripted._forward_hooks
    assert [len(m._forward_hooks) for m in (model, model[0])] == [1, 1]
    assert len(model[0]._forward_pre_hooks) == 1
    end()
    assert torch.jit._recursive.create_script_module is create
    with pytest.raises(AttributeError, match="__name__"):
        torch.jit.script(model)


@pytest.mark.parametrize("name", MAY_FAIL)
def test_what_fails_is_said_and_training_goes_on(name, monkeypatch, tmp_path):
    met = []

    def gone(*args, **kwargs):
        met.append(name)
        raise RuntimeError("torch 9.9 is not known here")

    role.cache_clear()
    original = getattr(room, name)
    for ours in [m for key, m in sys.modules.items() if key.startswith("bthooks")]:
        if getattr(ours, name, None) is original:
            monkeypatch.setattr(ours, name, gone)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attend = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, again=True):
            x = self(x, again=False) if again else self.embed(x)
            return self.attend(x, x, x)[0]

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with bthooks.attach(model, tmp_path, every=1, histograms_every=1) as handle:
            for x in torch.rand(3, 4, 6, 8):
                scaler.scale(model(x).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                model(x * torch.nan)
            report = str(handle.report())
    assert not met or "torch 9.9" in report
    assert not met or any("torch 9.9" in str(warning.message) for warning in said)
