"""Each private name of torch that the capture rests on, so that a new torch fails here by name."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bthooks.torch_private import (
    as_outside_modes,
    dispatch_mode,
    leave,
    own_tensors,
    schema,
    storage_of,
)


def seeing(seen):
    def handle(func, args, kwargs):
        seen.append(func)
        return func(*args, **kwargs)

    return dispatch_mode(handle)


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


def test_leave():
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen, other = [], Other()
    mode = seeing(seen)
    mode.__enter__()
    with other:
        leave(mode)  # from below another
        leave(mode)  # and again
        torch.ones(1)
    assert not seen
    assert torch._C._len_torch_dispatch_stack() == 0


def test_as_outside_modes():
    layer, x = nn.Linear(64, 16), torch.randn(7, 4, 64).transpose(0, 1)

    def handle(func, args, kwargs):
        with as_outside_modes():
            return func(*args, **kwargs)

    def products(context):
        with torch.inference_mode(), torch.autograd.profiler.profile() as profile, context:
            layer(x)
        return {e.name for e in profile.function_events} & {"aten::mm", "aten::bmm"}

    assert products(dispatch_mode(handle)) == products(contextlib.nullcontext()) == {"aten::mm"}
    assert products(seeing([])) == {"aten::bmm"}  # what it is there for
    with as_outside_modes():  # and where nothing is excluded
        assert torch.equal(layer(x), layer(x))


def test_own_tensors():
    class Overriding(nn.BatchNorm1d):
        def named_parameters(self, *args, **kwargs):
            return iter(())

    model = nn.Sequential(Overriding(3), nn.Linear(3, 2, bias=False))
    parameters, buffers = own_tensors(list(model.modules()))
    norm, linear = model
    assert list(map(id, parameters)) == list(map(id, (norm.weight, norm.bias, linear.weight)))
    assert [b.shape for b in buffers] == [(3,), (3,), ()]


def test_schema():
    found = schema(torch.ops.aten.softmax.int)
    assert (found.name, found.overload_name, found.is_mutable) == ("aten::softmax", "int", False)
    assert [(a.name, a.default_value) for a in found.arguments] == [
        ("self", None),
        ("dim", None),
        ("dtype", None),
    ]
    assert schema(torch.ops.aten.add_.Tensor).is_mutable
    assert schema(torch.ops.higher_order.flex_attention) is None
    assert schema(torch.softmax) is None


def test_storage_of():
    x = torch.randn(4, 4)
    address, storage = storage_of(x)
    assert storage.data_ptr() == x.data_ptr()
    assert storage_of(x[1:].T)[0] == address
    assert storage_of(x.clone())[0] != address
    empty = torch.empty(0), torch.empty(0)
    assert storage_of(empty[0])[0] != storage_of(empty[1])[0]
    assert storage_of(torch.eye(3).to_sparse()) is None
    inside = []
    torch.func.grad(lambda x: (inside.append(storage_of(x)), x.sum())[1])(x)
    assert inside[0][0] == address
