"""Two real processes over gloo: their norms are those of one process on the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DEADLINE, read


@pytest.fixture(scope="module")
def ran(once):
    return once("ranks", run)


def run(directory):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*torchrun, "--tee=3", "-m", "tests.ranks", str(directory)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    said = finished.stdout + finished.stderr
    # torch's own threads of gloo abort at the end of 1 run in 12, without us as well.
    is_aborted = "terminate called without an active exception" in said
    is_whole = (directory / "said.json").exists()  # which is written last
    assert finished.returncode == 0 or (is_aborted and is_whole), said[-8000:]


LIKE = {
    "ddp": "single",
    "ddp inside": "single",
    "ddp in parts": "single in parts",
    "fsdp": "single",
    "fsdp in parts": "single in parts",
    "fsdp after": "single",
    "tensor parallel": "single unclipped",
}


@pytest.mark.parametrize("name", LIKE)
def test_norms_are_those_of_one_process(name, ran):
    run, alone = read(ran / name), read(ran / LIKE[name])
    for step in range(3):
        expected = alone.group("gradients/", step)
        assert "total_norm_before_clip" in expected
        assert run.group("gradients/", step) == pytest.approx(expected, rel=1e-4)
    clipped = (
        alone.value("gradients/total_norm", 1),
        alone.value("gradients/total_norm_before_clip", 1),
    )
    if LIKE[name] != "single unclipped":
        assert clipped[0] == pytest.approx(0.05, rel=1e-3)
        assert clipped[1] > 0.1
    assert not [tag for tag in run.scalars if "module" in tag or "unused" in tag]


def test_ddp_adds_no_reduction_and_fsdp_one_a_step(ran):
    said = json.loads((ran / "said.json").read_text())
    assert (said["ddp"], said["fsdp"]) == (0, 3)


def test_a_rank_without_gradients_contributes_zero(ran):
    said = json.loads((ran / "said.json").read_text())
    run = read(ran / "uneven")
    assert run.value("gradients/norm/head.weight", 0) == pytest.approx(said["uneven"], rel=1e-5)


def test_a_validation_on_one_rank_does_not_hang(ran):
    points = read(ran / "ddp inside").scalars["val/attention/mean_entropy"]
    assert [step for step, _ in points] == [0, 1, 2]


def test_flattened_parameters_are_said_and_not_measured(ran):
    (warning,) = json.loads((ran / "said.json").read_text())["fsdp1"]
    assert "gradients: not measured under FullyShardedDataParallel" in warning
    run = read(ran / "fsdp1")
    assert run.scalars["learning_rate/0"]
    assert not [tag for tag in run.scalars if tag.startswith("gradients/")]
    assert not [tag for tag in run.histograms if tag.startswith("parameters/")]


def test_log_gradients_on_every_rank(ran):
    said = json.loads((ran / "said.json").read_text())
    found = read(ran / "by hand").group("gradients/norm/", 0)
    assert found == pytest.approx(said["by hand"], rel=1e-5)
