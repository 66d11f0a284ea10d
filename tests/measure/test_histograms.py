"""Histograms: exact counts, the rank error of what TensorBoard draws, no read to the host."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorboardX
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorboard import context
from tensorboard.backend.event_processing import (
    data_provider,
    event_accumulator,
    plugin_event_multiplexer,
)
from tensorboard.plugins import base_plugin
from tensorboard.plugins.histogram import histograms_plugin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter

from bthooks.measure.histograms import Histogram, histogram, raw

Record = dict[str, Any]
LARGEST = float(np.finfo(np.float32).max)
FEW, MANY = 3000, 100_000  # sorted; counted in fine bins
SOME = {
    "mixed": [3.0, -1.5, 0.0, -0.0, 1e30, -1e-38, 1e-45, math.nan, math.inf, -math.inf],
    "largest": [LARGEST, -LARGEST, math.inf, -math.inf, -math.nan],
    "largest alone": [LARGEST, math.nan],
    "constant": [0.1],
    "zeros": [0.0, -0.0],
    "near 1": [1.0, 1.0 + 2**-23, 1.0 - 2**-24, math.inf],
    "negative": [-2.0, -1.0, math.nan],
}


def distribution(name: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, generator=generator)
    uniform = torch.rand(n, generator=generator)
    made: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: 0.02 * normal,
        "layer norm": lambda: 1 + 0.02 * normal,
        "narrow": lambda: 1 + 0.001 * normal,
        "relu": lambda: normal.clamp(min=0) * (uniform > 0.2),
        "cauchy": lambda: (torch.pi * (uniform.double() - 0.5)).tan().float(),
        "log-uniform": lambda: 10 ** (12 * uniform - 8),
        "bimodal": lambda: torch.where(uniform < 0.5, -1.0, 1.0) + 0.02 * normal,
        "uniform": lambda: uniform,
        "zero 1 %": lambda: torch.where(uniform < 0.01, 0.0, normal),
        "clipped": lambda: normal.clamp(-2, 2),
        "huge": lambda: 1e30 * normal,
        "tiny": lambda: 1e-38 * normal,
    }
    return made[name]()


def as_float32(tensor: Tensor) -> np.ndarray:
    """The finite values, by another way: numpy, clipped where float32 ends."""
    values = tensor.detach().double().numpy().ravel()
    finite: np.ndarray = values[np.isfinite(values)].clip(-LARGEST, LARGEST).astype(np.float32)
    return finite


def check_exact(tensor: Tensor) -> None:
    limits, counts, summary = histogram(tensor)
    finite = as_float32(tensor)
    assert len(limits) == len(counts) <= 300
    assert (limits.dtype, counts.dtype) == (torch.float64, torch.int64)
    assert bool((limits.diff() >= 0).all())
    # The number of values in (left, right] of every bucket, and none outside.
    below = np.searchsorted(np.sort(finite), limits.numpy(), side="right")
    np.testing.assert_array_equal(counts, np.diff(below, prepend=0))
    assert int(counts.sum()) == len(finite)
    double = finite.astype(np.float64)
    low, high, num, total, squares, nonfinite = summary.tolist()
    assert (num, nonfinite) == (len(finite), tensor.numel() - len(finite))
    if len(finite):
        assert (low, high) == (double.min(), double.max())
    assert total == pytest.approx(double.sum(), rel=1e-12, abs=1e-12 * abs(double).sum())
    assert squares == pytest.approx(double @ double, rel=1e-12)


def drawn(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Edges and the fraction up to each, as TensorBoard's reader makes them."""
    counts = np.array(record["bucket_counts"])
    (occupied,) = counts.nonzero()
    inner = record["bucket_limits"][occupied[0] : occupied[-1]]
    mass = np.cumsum(counts[occupied[0] : occupied[-1] + 1]) / record["num"]
    return np.array([record["min"], *inner, record["max"]]), np.array([0.0, *mass])


def record_of(tensor: Tensor) -> Record:
    record = raw(histogram(tensor))
    assert record is not None
    return dict(record)


def rank_error(record: Record, tensor: Tensor, points: np.ndarray) -> float:
    ordered = np.sort(tensor.double().numpy())
    estimate = np.interp(points, *drawn(record))
    least = np.searchsorted(ordered, points, side="left") / len(ordered)
    most = np.searchsorted(ordered, points, side="right") / len(ordered)
    return float(np.maximum(least - estimate, estimate - most).max())


@pytest.mark.parametrize("copies", [1, 6000])
@pytest.mark.parametrize("values", SOME.values(), ids=SOME)
def test_every_count_is_exact(values: list[float], copies: int) -> None:
    check_exact(torch.tensor(values * copies, dtype=torch.float32))
    check_exact(torch.tensor([values * copies, [7.0] * len(values) * copies], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32)),
    st.sampled_from([1, 3000]),
)
def test_every_count_is_exact_for_any_bits(values: np.ndarray, copies: int) -> None:
    check_exact(torch.from_numpy(values).repeat(copies))


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "layer norm",
        "narrow",
        "relu",
        "cauchy",
        "log-uniform",
        "bimodal",
        "uniform",
        "zero 1 %",
        "clipped",
        "huge",
        "tiny",
    ],
)
def test_less_than_a_thousandth_is_misplaced(name: str, n: int) -> None:
    tensor = distribution(name, n)
    check_exact(tensor)
    record = record_of(tensor)
    bins = np.linspace(record["min"], record["max"], 31)
    assert rank_error(record, tensor, bins) <= 0.001
    if n == MANY:  # among few values the quantiles themselves are steps
        quantiles = np.quantile(tensor, np.linspace(0, 1, 101), method="inverted_cdf")
        assert rank_error(record, tensor, quantiles) <= 0.001


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize(("name", "at"), [("relu", 0.0), ("zero 1 %", 0.0), ("clipped", 2.0)])
def test_point_masses_keep_to_themselves(name: str, at: float, n: int) -> None:
    tensor = distribution(name, n)
    record = record_of(tensor)
    edges, mass = drawn(record)
    bucket = int(np.searchsorted(edges, at, side="left"))
    share = float((tensor == at).double().mean())
    if at != record["min"]:
        assert edges[bucket] - edges[bucket - 1] <= abs(at) / 128 + 1e-38
        assert mass[bucket] - mass[bucket - 1] == pytest.approx(share, rel=0.1)
    else:
        assert edges[1] == at
        assert mass[1] == pytest.approx(share)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
)
@pytest.mark.parametrize("n", [FEW, MANY])
def test_types(dtype: torch.dtype, n: int) -> None:
    check_exact((distribution("normal", n) * 500).clamp(0, 200).to(dtype))


def test_shapes_layouts_and_modes() -> None:
    few = distribution("normal", 24).view(2, 3, 4)
    expected = histogram(few)

    def same(found: Histogram) -> bool:
        torch.testing.assert_close(found.summary, expected.summary)  # sums in another order
        return all(map(torch.equal, found[:2], expected[:2]))

    assert same(histogram(few.permute(2, 0, 1)))
    assert same(histogram(few.clone().requires_grad_()))
    assert same(histogram(torch.view_as_complex(few.view(12, 2)).conj().conj()))
    assert same(histogram(few.to_sparse()))
    with torch.inference_mode():
        assert same(histogram(few.clone()))
    with torch.autocast("cpu"), torch.device("meta"):
        assert same(histogram(few))
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        assert same(histogram(few))
        many = distribution("cauchy", MANY)
        assert all(map(torch.equal, histogram(many), histogram(many)))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    check_exact(torch.tensor(3.0))
    assert few.is_contiguous()


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf] * FEW * 10])
def test_nothing_finite_is_no_record(values: list[float]) -> None:
    found = histogram(torch.tensor(values))
    assert raw(found) is None
    assert found.summary[5] == len(values)
    assert found.counts.sum() == 0
    assert not found.limits.isnan().any()


def test_float64_beyond_float32_is_finite() -> None:
    tensor = torch.tensor([1e300, -1e300, 1e-300, math.inf, math.nan], dtype=torch.float64)
    check_exact(tensor)
    assert record_of(tensor)["sum_squares"] == pytest.approx(2 * LARGEST**2)


def test_counts_beyond_float32() -> None:
    n = 2**24 + 3
    found = histogram(torch.ones(n, dtype=torch.bool))
    assert int(found.counts.sum()) == int(found.counts.max()) == int(found.summary[2]) == n


class HostReadError(AssertionError):
    """A value went to the host."""


class NoHostRead(TorchDispatchMode):
    """Raises where an accelerator would have to wait for the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        moves = name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device
        if masks or moves or name.strip("_").startswith(tuple(n.strip("_") for n in self.names)):
            raise HostReadError(str(func))
        return func(*args, **kwargs)


@pytest.mark.parametrize("n", [FEW, MANY])
def test_no_host_read(n: int) -> None:
    # Nothing can be read of a tensor without values: this runs the accelerators' branch.
    with NoHostRead():
        found = histogram(torch.empty(n, device="meta"))
    assert {t.device.type for t in found} == {"meta"}


@pytest.mark.parametrize(
    "read",
    [
        Tensor.item,
        Tensor.nonzero,
        Tensor.unique,
        bool,
        lambda x: x[x > 0],
        lambda x: x.to("meta"),
    ],
)
def test_a_host_read_is_noticed(read: Callable[[Tensor], object]) -> None:
    x = torch.ones(1)
    with NoHostRead(), pytest.raises(HostReadError):
        read(x)


def test_empty_buckets_only_as_left_edges() -> None:
    def tensors(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    limits = [0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    counts = [0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 1.0, 0.0]
    found = raw(Histogram(tensors(limits), tensors(counts), tensors([1, 5, 6, 20, 80, 0])))
    assert found == {
        "min": 1.0,
        "max": 5.0,
        "num": 6,
        "sum": 20.0,
        "sum_squares": 80.0,
        "bucket_limits": [0.0, 1.0, 3.0, 4.0, 5.0],
        "bucket_counts": [0, 2, 0, 3, 1],
    }


@pytest.fixture(params=[SummaryWriter, tensorboardX.SummaryWriter], ids=["torch", "tensorboardX"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    writer = request.param(str(tmp_path))
    yield writer
    writer.close()


@pytest.mark.parametrize(
    "tensor",
    [
        distribution("layer norm", FEW),
        distribution("relu", MANY),
        torch.zeros(5),
        torch.tensor(3.0),
    ],
    ids=["layer norm", "relu", "zeros", "one"],
)
def test_read_back_and_drawn(writer: Any, tmp_path: Path, tensor: Tensor) -> None:
    record = record_of(tensor)
    writer.add_histogram_raw("h", **record, global_step=3)
    writer.close()

    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Histograms("h")
    value = event.histogram_value
    assert event.step == 3
    assert (value.min, value.max, value.num) == (record["min"], record["max"], tensor.numel())
    assert list(value.bucket_limit) == record["bucket_limits"]
    assert list(value.bucket) == record["bucket_counts"]

    multiplexer = plugin_event_multiplexer.EventMultiplexer({"run": str(tmp_path)})
    provider = data_provider.MultiplexerDataProvider(multiplexer.Reload(), str(tmp_path))
    plugin = histograms_plugin.HistogramsPlugin(base_plugin.TBContext(data_provider=provider))
    events_drawn, _ = plugin.histograms_impl(
        context.RequestContext(), "h", "run", experiment="", downsample_to=10
    )
    ((_, step, buckets),) = events_drawn
    left, right, counts = np.array(buckets).T
    assert step == 3
    assert (left[0], right[-1]) == (np.float32(record["min"]), np.float32(record["max"]))
    assert (left[1:] == right[:-1]).all()
    assert (left <= right).all()
    assert counts.sum() == tensor.numel()


def test_a_record_is_small(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_histogram_raw("h", **record_of(distribution("normal", MANY)))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 5000


def test_a_view_of_negated_values():
    values = torch.randn(1000, dtype=torch.complex64)
    assert histogram(values.conj().imag).summary[0] == -values.imag.max()
