"""A model that is attached, its copies, and all other models are compiled, exported and traced as
they are without us: the same results, and as many graphs."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from bthooks import attach

from ..conftest import read


class Several(nn.Module):
    """Takes and returns what has other types than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(
        self, x: Tensor, shift: float = 0.5, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if mask is not None:
            x = x * mask
        y = self.inner(x) + shift
        return y, {"y": y}


def double(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output * 2


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_forward_hook(double)
    return model


MODELS = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
    "several": Several,
    "with a hook": hooked,
    "layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(MODELS["layer"](), 2, enable_nested_tensor=False),
}


def saved(model):
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "average": averaged,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "of a copy": lambda model: copy.deepcopy(saved(model)),
    "inside": lambda model: nn.Sequential(model),
}


def vmapped(model, x):
    parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
    called = lambda p, b, x: torch.func.functional_call(model, (p, b), (x,))  # noqa: E731  # short
    return torch.vmap(called, (0, 0, None))(parameters, buffers, x)


def compiled(model, x):
    """Its output, and how many graphs; the model is called again once compiled."""
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    return run(x), run(x), counter.frame_count, counter.op_count


WAYS: dict[str, Callable] = {
    "call": lambda model, x: model(x),
    "script": lambda model, x: torch.jit.script(model)(x),
    "script, named": lambda model, x: torch.jit.script(model)(input=x),
    "trace": lambda model, x: torch.jit.trace(model, x, strict=False)(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module()(x),
    "symbolic trace": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "make_fx": lambda model, x: make_fx(model)(x)(x),
    "functional_call": lambda model, x: torch.func.functional_call(
        model, dict(model.named_parameters()), (x,)
    ),
    "vmap": vmapped,
    "compile": compiled,
}


def found(build, way, duplicate, attached):
    """What becomes of the model, or the kind of error: torch can't do everything with each."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 5, 8)
    handle = attach(model, None, every=1, on_error="raise") if attached else None
    try:
        # A layer of torch is traced on its slow path while it is attached: with grad it always is.
        with torch.set_grad_enabled(way in (compiled, WAYS["strict export"])):
            model(x)
            return torch.utils._pytree.tree_leaves(way(duplicate(model), x))
    except Exception as error:
        return [type(error), str(error).splitlines()[0]]
    finally:
        if handle is not None:
            handle.detach()


IGNORED = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*deprecated", "ignore:.*enable_nested_tensor"
)


@IGNORED
@pytest.mark.parametrize(
    ("way", "duplicate"),
    [(way, c) for way in WAYS for c in COPIES if way == "script" or c in ("itself", "torch.save")],
)
@pytest.mark.parametrize("model", MODELS)
def test_what_works_without_us_works_with_us(model, way, duplicate):
    arguments = MODELS[model], WAYS[way], COPIES[duplicate]
    plain, attached = (found(*arguments, attached=on) for on in (False, True))
    assert_same(plain, attached)


def assert_same(expected, got):
    assert len(expected) == len(got)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, (one, other)


@IGNORED
@pytest.mark.parametrize("way", ["script", "strict export", "compile"])
@pytest.mark.parametrize("model", MODELS)
def test_another_model_is_none_of_our_business(model, way):
    other, x = MODELS["several"](), torch.randn(2, 5, 8)

    def run():
        torch._dynamo.reset()
        return torch.utils._pytree.tree_leaves(WAYS[way](other, x))

    plain = run()
    with attach(MODELS[model](), None, every=1, on_error="raise"):
        attached = run()
    assert_same(plain, attached)


@pytest.mark.parametrize("model", MODELS)
def test_what_was_compiled_before_is_not_compiled_again(model):
    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.randn(2, 5, 8)
    run = torch.compile(nn.Sequential(nn.Linear(8, 8)), backend=counter)
    run(x)
    root = MODELS[model]().eval()
    with attach(root, None, every=1, on_error="raise"), torch.no_grad():
        root(x)
        with torch.enable_grad():
            run(x)
    run(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("model", ["several", "layer"])
@pytest.mark.parametrize("duplicate", ["deepcopy", "average", "pickle", "torch.save", "of a copy"])
def test_copies_have_no_hook(model, duplicate):
    model = MODELS[model]()
    own = model.register_forward_pre_hook(len_of, with_kwargs=True)
    with attach(model, None):
        other = COPIES[duplicate](model)
    assert [*other._forward_pre_hooks] == [own.id]
    assert not other._forward_hooks


def len_of(*given):
    assert len(given) == 3


@pytest.mark.parametrize("training", [True, False])
def test_each_call_of_a_layer_is_seen_also_after_one_that_raises(training, tmp_path):
    layer, x = MODELS["layer"]().train(training), torch.randn(2, 5, 8)
    with attach(layer, tmp_path, every=1) as handle, torch.set_grad_enabled(training):
        for _ in range(3):
            if training:
                layer(x).sum().backward()
                torch.optim.SGD(layer.parameters(), 0.1).step()
            else:
                layer(x)
            with pytest.raises(AttributeError):
                layer(None)
        assert handle.step == 3
    start = "attention/mean_entropy" if training else "val/attention/mean_entropy"
    assert [step for step, _ in read(tmp_path).scalars[start]] == [0, 1, 2]
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks
