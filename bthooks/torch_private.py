"""Every private name of torch that bthooks touches: the room for what a new torch may break.

Each function has one test in `tests/test_torch_private.py`, which fails by its name. It says what
it does, why nothing public does, since which torch its names are there (<= 2.11: the least that is
supported, or older), and how it would fail if they changed. Nothing private is touched at import.
A name that is gone is an error with the version of torch (`_private`): its callers report what
rests on it as not measured.
"""

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import optimizer
from torch.utils.hooks import RemovableHandle

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _private(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`function`, which fails by naming the version of torch that lacks what it touches."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except (AttributeError, ImportError, TypeError) as error:
            what = f"{function.__name__}: {type(error).__name__}: {error}"
            raise RuntimeError(f"torch {torch.__version__} is not known here: {what}") from error

    return call


# What runs in this thread, from its Python frames: no hook, so nothing that would switch off a fast
# path or recompile a graph.


def _frames() -> Iterator[FrameType]:
    """The Python stack of this thread, from the innermost frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@_private
def innermost(modules: Container[nn.Module]) -> nn.Module | None:
    """The innermost of `modules` that is called.
    Public global module hooks cost new graphs under `torch.compile`. `_call_impl` and
    `_wrapped_call_impl`, torch <= 2.11. Renamed, or written in C: an error. If another function
    called the modules: None, and `calls_on_stack` would be 0."""
    calls = nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__
    called = (frame.f_locals["self"] for frame in _frames() if frame.f_code in calls)
    return next((module for module in called if module in modules), None)


@_private
def call_of(module: nn.Module) -> tuple[int, Any, int]:
    """The innermost call of `module`: its frame's number, what it was given, and by which lines it
    came here, which is equal for the same lines.
    In compiled code, where no call inside `module` is on the stack, each operator of the graph has
    a line, or is a node that is interpreted (activation checkpointing). As `innermost`, and the `n`
    of `torch.fx.Interpreter.run_node`, torch <= 2.11. The latter renamed: an error."""
    calls = nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__
    lines: list[int] = []
    for frame in _frames():
        if frame.f_code in calls and frame.f_locals["self"] is module:
            given = frame.f_locals["args"], frame.f_locals["kwargs"]
            return id(frame), given, hash(tuple(lines))
        lines += id(frame.f_code), frame.f_lasti
        if frame.f_code is torch.fx.Interpreter.run_node.__code__:
            lines.append(id(frame.f_locals["n"]))
    raise RuntimeError("it is not called")


@_private
def calls_on_stack(module: nn.Module) -> int:
    """How many calls of `module` run in this thread; as `innermost` (torch <= 2.11), 0 for None."""
    call = nn.Module._call_impl.__code__
    return sum(frame.f_code is call and frame.f_locals["self"] is module for frame in _frames())


def steps_on_stack() -> int:
    """How many optimizers' steps run in this thread, each within the one before.
    Nothing public tells. All run in a `wrapper` of `torch.optim.optimizer`, with torch's hooks
    around them, torch <= 2.11. Renamed or elsewhere: 0."""
    return sum(
        frame.f_globals is vars(optimizer) and frame.f_code.co_name == "wrapper"
        for frame in _frames()
    )


def is_running(function: Callable[..., Any]) -> bool:
    """Whether a call of `function` runs in this thread: Python alone, no name of torch <= 2.14."""
    return any(frame.f_code is function.__code__ for frame in _frames())


@_private
def find_scaler() -> GradScaler | None:
    """The loss scaler that called the optimizer whose step runs in this thread.
    An optimizer does not know it. `step` or `_maybe_opt_step` calls it, and `_scale` is
    None until there is one, torch <= 2.11. The former renamed: None; the latter: an error."""
    for frame in _frames():
        # Of no other frame: f_locals keeps a frame's objects alive as long as the frame lives.
        if frame.f_code.co_name in ("step", "_maybe_opt_step"):
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, GradScaler) and scaler.is_enabled() and scaler._scale is not None:
                return scaler
    return None


@_private
def scaler_state(scaler: GradScaler) -> tuple[Tensor, Tensor, float]:
    """The scale of `scaler` and its clean steps, on their device, and the scale it began with.
    The public `get_scale` and `state_dict` wait for the device. `_scale`, `_growth_tracker` and
    `_init_scale`, torch <= 2.11. Renamed: an error."""
    scale: Any = scaler._scale
    clean: Any = scaler._growth_tracker
    return scale, clean, scaler._init_scale


def is_captured() -> bool:
    """Whether what runs is recorded into a CUDA graph: public, torch <= 2.11; on the CPU never."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@_private
def is_traced() -> bool:
    """Whether what runs is traced into a graph, of which ours must not become a part.
    `torch.compiler.is_compiling` does not know `make_fx` and fake tensors. `_get_dispatch_mode` and
    `_TorchDispatchModeKey`, torch <= 2.11. Renamed: an error."""
    if is_captured():
        return True
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY))
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # it is public
    return traced or any(mode is not None for mode in modes)


@_private
def _take_off_modes() -> tuple[list[Any], Callable[[Any], None]]:
    from torch.utils._python_dispatch import _pop_mode, _push_mode

    return [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())], _push_mode


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """No dispatch mode sees what runs inside: a FLOP counter counts the model and none of ours.
    Publicly none can be left but by whom entered it. `_pop_mode`, `_push_mode` and
    `_len_torch_dispatch_stack`, torch <= 2.11. Renamed: an error."""
    modes, push = _take_off_modes()
    try:
        yield
    finally:
        for mode in reversed(modes):
            push(mode)


@_private
def without_overrides() -> tuple[contextlib.AbstractContextManager[None], ...]:
    """Two contexts in which no mode, of dispatch or of functions, and no subclass sees what runs.
    Flags, at a quarter of the cost of `without_modes`; nothing public sets them.
    `DisableTorchFunction` and `_DisableTorchDispatch`, torch <= 2.11. Renamed: an error. If they
    left a mode on, it would see what is ours."""
    return torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch()


@functools.cache
def _watching() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        supports_higher_order_operators = True

        def __init__(self, handle: Callable[..., Any]) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # torch's, not annotated
            self.handle = handle

        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return self.handle(func, args, kwargs or {})

    return Watching


@_private
def dispatch_mode(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    """A context in which each operator of this thread becomes `handle(operator, args, kwargs)`.
    Forward hooks see modules and no operators, and `TorchFunctionMode` lies above autograd and
    switches torch.nn's fast paths off. `TorchDispatchMode` and its two switches, torch <= 2.11.
    Without `supports_higher_order_operators` flex_attention raises under a mode; without
    `ignore_compile_internals` compiled regions run eagerly, and those with fullgraph=True raise."""
    return _watching()(handle)


@_private
def is_entered(mode: Any) -> bool:
    """Whether `mode` is on the stack of modes: while it handles an operator, and in
    `without_modes`, it is off it, and `leave` does nothing. Nothing public tells, torch <= 2.14."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(entered is mode for entered in _get_current_dispatch_mode_stack())


@_private
def leave(mode: Any) -> None:
    """Take `mode` off the stack of modes, also from below others that an exception left behind.
    Publicly modes are only left in their order. As `without_modes`, torch <= 2.11, and an error."""
    modes, push = _take_off_modes()
    for other in reversed(modes):
        push(other)
        if other is mode:
            mode.__exit__(None, None, None)


@_private
def as_outside_modes() -> contextlib.AbstractContextManager[object]:
    """A context in which `linear` and `matmul`, which a mode is handed whole, run as without one.
    Under inference_mode, and inside a mode's handler, the views that they take of a weight lose its
    requires_grad, by which torch chooses between mm and bmm: results are 1e-7 apart. Nothing public
    does it. `_dispatch_tls_set_dispatch_key_excluded`, torch <= 2.11. Renamed: an error; if torch
    chose otherwise: outputs that differ in their last bits."""
    key = torch._C.DispatchKey.ADInplaceOrView
    exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
    if not torch._C._dispatch_tls_is_dispatch_key_excluded(key):
        return contextlib.nullcontext()
    after = contextlib.ExitStack()
    after.callback(exclude, key, True)
    exclude(key, False)
    return after


@_private
def is_compiled(module: nn.Module) -> bool:
    """Whether calls of `module` itself are compiled.
    Nothing public tells. `_orig_mod` is in what `torch.compile(module)` returns, torch <= 2.11.
    Renamed: False, and hooks are put on that are never called."""
    return is_compiled_in_place(module) or "_orig_mod" in module._modules


@_private
def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: its calls run no hooks but those that were traced.
    Nothing public tells. `_compiled_call_impl`, torch <= 2.11. Renamed: an error."""
    return module._compiled_call_impl is not None


@_private
def is_normalization(module: nn.Module) -> bool:
    """Whether `module` is a batch or instance norm, which keeps statistics while it trains.
    Libraries derive from a base that is private: `_NormBase`, torch <= 2.11. Renamed: an error."""
    return isinstance(module, nn.modules.batchnorm._NormBase)


@_private
def version(tensor: Tensor) -> int:
    """How often `tensor` was written in place; -1 under inference mode, which does not count.
    `torch.autograd.graph` only counts it up. `_version`, torch <= 2.11. Renamed: an error."""
    return -1 if tensor.is_inference() else tensor._version


@_private
def is_in_functorch(tensor: Tensor) -> bool:
    """Whether `tensor` stands for others inside `torch.func.grad` or `vmap`, and has no values.
    Nothing public tells. `is_functorch_wrapped_tensor`, torch <= 2.11. Renamed: an error."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


@functools.cache
def _stand_ins() -> tuple[type, ...]:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return FakeTensor, FunctionalTensor


@_private
def has_values(tensor: Tensor) -> bool:
    """Whether `tensor` is none that only stands for others: on the meta device, or in compilation.
    Operators of a compilation are shown to a mode under DDP. Publicly only modes tell of it, which
    need not be on. `FakeTensor`, `FunctionalTensor`, torch <= 2.11. Moved: an error."""
    return not (tensor.is_meta or isinstance(tensor, _stand_ins()))


@_private
def norm_of_each(tensors: list[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The L2 norm of each, computed and returned as `dtype`, 0-d: all in one kernel.
    `nn.utils.get_total_norm` has one for all. `_foreach_norm`, torch <= 2.11. Renamed: an error."""
    return torch._foreach_norm(tensors, dtype=dtype)


@_private
def leaves_of(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What lies in `tree`, also in containers that libraries have registered; what rebuilds it.
    There is no public pytree until 2.14. `_pytree`, torch <= 2.11. Moved: an error."""
    from torch.utils import _pytree

    leaves, spec = _pytree.tree_flatten(tree)
    return leaves, functools.partial(_pytree.tree_unflatten, treespec=spec)


@_private
def own_tensors(modules: Collection[nn.Module]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The parameters and the buffers that `modules` hold themselves.
    `named_parameters(recurse=False)` and `named_buffers` take 18 times as long (370 us for 82
    modules); models override them. `_parameters`, `_buffers`, torch <= 2.11. Renamed: an error."""
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    return parameters, [b for m in modules for b in m._buffers.values() if b is not None]


@_private
def schema(func: Any) -> torch.FunctionSchema | None:
    """The schema of an operator: its names, defaults, and whether it overwrites; None of others.
    Only its name and tags are public. `OpOverload`, `_schema`, torch <= 2.11. Gone: an error."""
    return func._schema if isinstance(func, torch._ops.OpOverload) else None


@_private
def storage_of(tensor: Tensor) -> tuple[int, torch.UntypedStorage] | None:
    """The storage of `tensor`, with what it is known by while it lives; None if it has none.
    Parameters inside `torch.func.grad` or `vmap` are wrappers, which no mode sees: unwrapped. The
    public `data_ptr` of empty ones is 0. `_functorch`, `_cdata`, torch <= 2.11. Gone: an error."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    try:
        storage = tensor.untyped_storage()
    except RuntimeError:  # a sparse tensor has none
        return None
    return storage._cdata, storage


def backward_pass() -> int | None:
    """The number of the backward pass that runs in this thread.
    A forward that runs within one is recomputed. Nothing public tells. `_current_graph_task_id`,
    torch <= 2.11. Renamed: an error. Not behind `_private`: it is asked at each step of each
    optimizer."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


@_private
def is_rehearsed() -> bool:
    """Whether a pipeline stage runs its module for the shapes alone, on memory that holds no data.
    torch 2.13 does so with grad; torch <= 2.11 without, as in a rollout. Nothing public tells.
    `_forward_metadata_inference` of `PipelineStage`. Renamed, or not there: False."""
    stage = sys.modules.get("torch.distributed.pipelining.stage")
    of_stage = getattr(stage, "PipelineStage", None)
    function = getattr(of_stage, "_forward_metadata_inference", None)
    return function is not None and is_running(function)


@_private
def pipeline_divisor() -> int:
    """By how much the pipeline's schedule that runs in this thread will divide the gradients.
    It adds up those of all micro-batches, and divides after the last backward pass. Nothing public
    tells. `_n_microbatches` and `scale_grads` of a schedule, torch <= 2.11. Renamed: 1."""
    schedules = sys.modules.get("torch.distributed.pipelining.schedules")
    for frame in _frames() if schedules is not None else ():
        if frame.f_globals is vars(schedules) and "self" in frame.f_code.co_varnames:
            schedule = frame.f_locals.get("self")
            if getattr(schedule, "scale_grads", False):
                return getattr(schedule, "_n_microbatches", 1)
    return 1


@_private
def default_group() -> Any:
    """The default process group, None where there is none.
    Nothing public tells whether it is another than before. `_get_default_group` of
    `distributed_c10d`, torch <= 2.11. Renamed: an error."""
    ranks = torch.distributed
    if not (ranks.is_available() and ranks.is_initialized()):
        return None
    return ranks.distributed_c10d._get_default_group()


@_private
def own_store() -> Any:
    """A connection of our own to the store of the default process group.
    Nothing public gives that store; on its own connection, which is locked, we would wait for what
    torch waits for. `_get_default_store` of `distributed_c10d`, torch <= 2.11. Renamed, or a store
    without `clone`: an error."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    return store.clone()


@_private
def after_backward(callback: Callable[[], None], former: int | None) -> int:
    """Call `callback` at the end of the backward pass that runs in this thread, once: its number.
    That is after DDP's and FSDP2's own, which reduce the gradients; the public
    `register_multi_grad_hook` comes before. Nothing is called for the pass of the number `former`.
    `queue_callback`, `_current_graph_task_id`, torch <= 2.11. Renamed: an error."""
    if (number := torch._C._current_graph_task_id()) != former:
        # What is queued at the end runs behind what was queued until then.
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(functools.partial(engine.queue_callback, callback))
    return number


@_private
def hook_first(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `hook` once the gradient of `parameter` is accumulated, before all that are called then.
    Publicly hooks are called in the order in which they are registered: an optimizer that steps in
    one may have freed the gradient. `_post_accumulate_grad_hooks`, torch <= 2.11. Renamed: an
    error."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
    hooks: Any = parameter._post_accumulate_grad_hooks
    for other in [key for key in hooks if key != handle.id]:
        hooks[other] = hooks.pop(other)  # torch reads it as a dict: move_to_end changes nothing
    return handle


@_private
def is_hooked_by_others(parameter: Tensor) -> bool:
    """Whether other hooks than one are called once the gradient of `parameter` is accumulated.
    As `hook_first`, torch <= 2.11."""
    hooks: Any = parameter._post_accumulate_grad_hooks
    return len(hooks) > 1


@_private
def hide_from_script() -> Callable[[], None]:
    """Let `torch.jit.script` pass over our hooks, until what is returned is called.
    It compiles all hooks of a module, to the very types of its forward, and puts them into what it
    makes; nothing public takes one out. `torch.jit._recursive.create_script_module`, torch <= 2.11.
    Renamed: an error; called by another way: a model that is attached can't be scripted."""
    room = torch.jit._recursive
    create: Callable[..., Any] = room.create_script_module

    @functools.wraps(create)
    def without_ours(nn_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as after:
            for module in nn_module.modules():
                for name in ("_forward_hooks", "_forward_pre_hooks"):
                    hooks = vars(module)[name]
                    others = {i: hook for i, hook in hooks.items() if not isinstance(hook, Hook)}
                    if len(others) < len(hooks):
                        after.callback(vars(module).__setitem__, name, hooks)
                        vars(module)[name] = others
            return create(nn_module, *args, **kwargs)

    def end() -> None:
        if room.create_script_module is without_ours:  # else another has wrapped it since
            room.create_script_module = create

    room.create_script_module = without_ours
    return end


class Hook:
    """A hook that copies as nothing: `nn.Module` keeps hooks where they are copied with it.
    deepcopy, pickle and torch.save carry `nullcontext().__exit__` in its place, which takes any
    arguments and does nothing: copies are silent, and load where bthooks is not installed."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def put(self, register: Callable[..., RemovableHandle], option: str) -> RemovableHandle:
        """Register it with an option that is True, so that not even that is left in copies.
        A module notes which hooks have an option in a dict behind that of the hooks, by which it is
        copied later: what stands there takes the hook out of the copy. Were it copied before, torch
        <= 2.11: copies that are silent only."""
        handle = register(self, **{option: True})
        hooks: Any = handle.hooks_dict_ref()
        for reference in handle.extra_dict_ref:
            if handle.id in (noted := reference()):
                noted[handle.id] = _Noted(hooks, handle.id)
        return handle


class _Noted:
    """That a hook has an option; in a copy, it takes that hook out of the copied `hooks`."""

    def __init__(self, hooks: dict[int, Any], number: int) -> None:
        self._hooks, self._number = hooks, number

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict.pop, (self._hooks, self._number, None)
