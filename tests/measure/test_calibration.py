import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import stats
from sklearn import metrics
from torchmetrics.classification import MulticlassCalibrationError

import bthooks
from bthooks import calibration_bins, calibration_of, calibration_stats
from bthooks.measure.calibration import ranking_stats
from bthooks.record import images

from ..conftest import read


def predictions(n, classes, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * sharpness
    return logits.softmax(-1), torch.randint(classes, (n,), generator=generator)


def number(value):
    return value.item()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    classes=st.integers(2, 12),
    seed=st.integers(0, 10**6),
    sharpness=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    bins=st.sampled_from([1, 5, 15, 40]),
)
def test_agrees_with_the_references(n, classes, seed, sharpness, bins):
    p, targets = predictions(n, classes, seed, sharpness)
    p = p.clamp(max=1 - 1e-7)  # torchmetrics has a bin of its own for confidence 1
    found = {name: number(v) for name, v in calibration_stats(p, targets, bins).items()}
    for name, norm in (("ece", "l1"), ("mce", "max")):
        reference = MulticlassCalibrationError(classes, n_bins=bins, norm=norm)
        assert found[name] == pytest.approx(number(reference(p, targets)), abs=1e-6)
    onehot = np.eye(classes)[targets]
    double = p.double().numpy()
    assert found["brier"] == pytest.approx(((double - onehot) ** 2).sum(1).mean(), abs=1e-6)
    summed = double / double.sum(1, keepdims=True)  # scikit-learn warns of less
    expected = metrics.log_loss(targets, summed, labels=range(classes))
    assert found["nll"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    accuracy = metrics.accuracy_score(targets, p.argmax(-1))
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["confidence"] == pytest.approx(double.max(1).mean())
    assert found["gap"] == pytest.approx(double.max(1).mean() - accuracy)


def test_confidence_one_and_zero_probability_count():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    found = calibration_stats(p, torch.tensor([0, 1, 1, 0]))
    # Three at 1, two of them right; one at 0.5, right.
    assert number(found["ece"]) == pytest.approx(3 / 4 * (1 - 2 / 3) + 1 / 4 * 0.5)
    assert number(found["mce"]) == pytest.approx(0.5)
    assert number(found["nll"]) == pytest.approx((math.log(2) - math.log(2**-52)) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [5, 10, 15, 20, 30])
def test_an_edge_belongs_to_the_bin_above_it(dtype, bins):
    for k in range(1, bins):
        p = torch.full((1, 100), (1 - k / bins) / 99, dtype=dtype)
        p[0, 0] = k / bins
        found = calibration_bins(p, torch.tensor([0]), bins)
        assert found[:, 0].nonzero().tolist() == [[k]]


def test_an_edge_in_half_precision():
    p = torch.tensor([[0.8, 0.2]], dtype=torch.float16)  # which has 0.79980
    assert calibration_bins(p, torch.tensor([0]), 5)[:, 0].nonzero().tolist() == [[3]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 10**6))
def test_bins_merge(sizes, seed):
    p, targets = predictions(sum(sizes), 4, seed)
    parts = zip(p.split(sizes), targets.split(sizes), strict=True)
    merged = sum(calibration_bins(*part) for part in parts)
    assert merged.shape == (15, 5)
    for name, value in calibration_of(merged).items():
        assert number(value) == pytest.approx(number(calibration_stats(p, targets)[name]))


def test_padding_counts_nothing():
    p, targets = predictions(40, 3)
    targets[::4] = -100
    kept = targets >= 0
    expected = calibration_stats(p[kept], targets[kept])
    for name, value in calibration_stats(p, targets).items():
        assert number(value) == pytest.approx(number(expected[name])), name


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(2, 200), elements=st.integers(0, 20).map(float)),
    st.integers(0, 10**6),
)
def test_uncertainty_against_error_agrees_with_the_references(uncertainty, seed):
    p, targets = predictions(len(uncertainty), 3, seed)
    found = ranking_stats(torch.from_numpy(uncertainty), p, targets)
    wrong = (p.argmax(-1) != targets).numpy()
    if 0 < wrong.sum() < len(wrong):
        expected = metrics.roc_auc_score(wrong, uncertainty)
        assert number(found["auroc"]) == pytest.approx(expected, abs=1e-6)
    else:
        assert math.isnan(number(found["auroc"]))
    if np.ptp(uncertainty):
        improbable = -p[torch.arange(len(p)), targets].double().numpy()
        expected = stats.spearmanr(uncertainty, improbable).statistic
        assert number(found["spearman"]) == pytest.approx(expected, abs=1e-6)
    orders = [np.random.default_rng(i).permutation(len(wrong)) for i in range(300)]
    areas = []
    for order in orders:  # ties in random orders
        sorted_ = wrong[order][np.argsort(uncertainty[order], kind="stable")]
        areas.append((np.cumsum(sorted_) / np.arange(1, len(wrong) + 1)).mean())
    spread = np.std(areas) / math.sqrt(len(areas))
    assert number(found["aurc"]) == pytest.approx(np.mean(areas), abs=6 * spread + 1e-9)


def test_what_is_logged(tmp_path, backend):
    p, targets = predictions(500, 5)
    unsure = 1 - p.amax(-1)
    with bthooks.make_writer(tmp_path, "run", backend=backend) as writer:
        bthooks.log_calibration(writer, p, targets, 3, uncertainty=unsure, prefix="val")
    run = read(tmp_path)
    expected = calibration_stats(p, targets) | ranking_stats(unsure, p, targets)
    assert len(expected) == 10
    assert run.group("val/calibration/", 3) == pytest.approx(
        {name: number(value) for name, value in expected.items()}, rel=1e-6
    )
    ((step, image),) = run.images["val/calibration/reliability"]
    assert step == 3
    assert Image.open(io.BytesIO(image)).size == (300, 352)


def test_a_diagram_shows_over_confidence_above_the_bars():
    bins = torch.zeros(15, 5)
    bins[-1] = torch.tensor([10.0, 9.5, 5.0, 0.0, 0.0])
    image = images.reliability_diagram(bins)
    column = image[images._TOP :, images._LEFT + 14 * 16 + 2].tolist()
    assert column[200] == [31, 119, 180]  # accuracy 0.5
    assert column[60] == [246, 178, 172]  # between it and the confidence 0.95
    assert column[5] != column[60]


def no_probabilities():
    p, targets = predictions(8, 3)
    return {
        "logits": (p.log(), targets, "logits"),
        "shape": (p[0], targets, "shape"),
        "class": (p, targets + 3, "indices 0 to 2"),
        "padding": (p, targets - 100, "leave out"),
        "float targets": (p, targets.float(), "class indices"),
        "empty": (p[:0], targets[:0], "shape"),
        "of one class": (p[:, 0], targets, r"torch.stack\(\[1 - p, p\], -1\)"),
        "one column": (p[:, :1], targets, r"torch.stack\(\[1 - p, p\], -1\)"),
    }


@pytest.mark.parametrize("case", no_probabilities())
def test_nonsense_is_refused(case, tmp_path):
    p, targets, said = no_probabilities()[case]
    with (
        bthooks.make_writer(tmp_path, "run") as writer,
        pytest.raises((ValueError, TypeError), match=said),
    ):
        bthooks.log_calibration(writer, p, targets, 0)


@pytest.mark.parametrize(
    "case", ["shape", "float targets", "empty", "of one class", "list", "bins"]
)
def test_nonsense_is_refused_by_the_measure_too(case):
    p, targets, said = no_probabilities().get(case, (*predictions(8, 3), "from 1"))
    if case == "list":
        p, said = p.tolist(), "probabilities are a tensor, got list"
    with pytest.raises((ValueError, TypeError), match=said):
        calibration_stats(p, targets, bins=0 if case == "bins" else 15)


def test_what_is_not_a_number_is_said_and_left_out(tmp_path):
    p, targets = predictions(64, 3)
    unsure, nan = torch.rand(64), torch.tensor([math.nan])
    with bthooks.make_writer(tmp_path, "run") as writer:
        with pytest.warns(UserWarning, match="1 of 64 rows of probabilities are NaN"):
            bthooks.log_calibration(
                writer, p.index_fill(0, torch.tensor([3]), math.nan), targets, 0
            )
        with pytest.warns(UserWarning, match="1 of 64 values of uncertainty are NaN"):
            bthooks.log_calibration(writer, p, targets, 1, uncertainty=torch.cat([nan, unsure[1:]]))
    run = read(tmp_path)
    assert run.group("calibration/", 0) == {}
    assert run.group("calibration/", 1).keys() == calibration_stats(p, targets).keys()


@pytest.mark.parametrize(
    "p",
    [
        (torch.randn(512, 10) * 2).bfloat16().softmax(-1).float(),  # off by 3e-3
        (torch.randn(512, 10) * 2).half().softmax(-1),
        torch.randn(512, 10).softmax(-1)[:1],
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32])
def test_what_validation_loops_hold_is_taken(p, dtype, tmp_path):
    targets = torch.zeros(len(p), dtype=dtype)
    with bthooks.make_writer(tmp_path, "run") as writer:
        bthooks.log_calibration(writer, p, targets, 0, uncertainty=1 - p.amax(-1))
    assert len(read(tmp_path).group("calibration/", 0)) >= 7
