"""Real processes over gloo: their one event file is that of one process on the whole batch."""

import json
import socket
from bisect import bisect_right

import pytest

from .conftest import read

ALONE = {  # by size and run: the run of one process
    (2, "ddp"): "single",
    (2, "ddp inside"): "single",
    (2, "ddp in parts"): "single in parts",
    (2, "fsdp"): "single",
    (2, "fsdp in parts"): "single in parts",
    (2, "fsdp after"): "single",
    (2, "fsdp1"): "single unclipped",
    (2, "tensor parallel"): "single unclipped",
    (2, "pipeline"): "single pipeline",
    (4, "ddp"): "single",
    (4, "hsdp"): "single",
    (4, "fsdp and tensor parallel"): "single unclipped",
    (4, "pipeline"): "single pipeline",
}


# Where there is no `total_norm_before_clip`: gradients of FSDP1 are of one flat parameter.
OTHER_BEFORE = {"fsdp1"}


ALONE_PROGRAM = """
import pathlib, sys
from tests.ranks import alone
alone(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
"""
JOB_PROGRAM = """
import pathlib, sys
from tests.ranks import job
job(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
"""


@pytest.fixture(scope="session")
def ran(once, programs):
    def run(directory, size):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        found = programs.run(ALONE_PROGRAM, directory, size, folder=directory)
        found += programs.run(JOB_PROGRAM, directory, port, size, folder=directory, count=size)
        assert [status for status, _ in found] == [0] * (size + 1), found

    return lambda size: once(f"ranks{size}", lambda directory: run(directory, size))


def below(drawn, value):
    """Which fraction of a histogram is up to `value`, spread evenly within buckets."""
    limits, total = drawn.bucket_limit, sum(drawn.bucket)
    at = bisect_right(limits, value)
    if at == len(limits):
        return 1.0
    left = limits[at - 1] if at else min(drawn.min, limits[0])
    inside = (value - left) / (limits[at] - left) if limits[at] > left else 1.0
    return (sum(drawn.bucket[:at]) + drawn.bucket[at] * max(inside, 0.0)) / total


@pytest.mark.parametrize(("size", "name"), ALONE)
def test_the_file_is_that_of_one_process(size, name, ran):
    directory = ran(size)
    job, alone = read(directory / name), read(directory / ALONE[size, name])
    assert job.files == 1
    for run in (job, alone):
        for tag in [*run.scalars, *run.histograms]:
            is_other = name in OTHER_BEFORE and "before_clip" in tag
            # FSDP1 gives a gradient of zeros to what is not used.
            if is_other or tag.startswith("val/") or (name == "fsdp1" and "unused" in tag):
                run.scalars.pop(tag, None)
                run.histograms.pop(tag, None)
    expected = {(tag, at): v for tag, points in alone.scalars.items() for at, v in points}
    assert {tag.partition("/")[0] for tag, _ in expected} >= {"attention", "gradients"}
    found = {(tag, step): job.value(tag, step) for tag, step in expected}
    # Of a mean over the rows of all ranks, of norms of sums: float32, in another order.
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert job.scalars.keys() == alone.scalars.keys()
    assert job.histograms.keys() == alone.histograms.keys()
    for tag, points in alone.histograms.items():
        for (step, whole), (same, drawn) in zip(points, job.histograms[tag], strict=True):
            assert (same, drawn.num) == (step, whole.num), tag
            near = (whole.max - whole.min) * 1e-3
            for at in range(1, 30):  # where TensorBoard's bins meet
                edge = whole.min + (whole.max - whole.min) * at / 30
                low, high = below(whole, edge - near), below(whole, edge + near)
                assert low - 2e-3 <= below(drawn, edge) <= high + 2e-3, (tag, step, at)


def said(directory):
    return json.loads((directory / "said.json").read_text())


def test_a_rank_without_gradients_contributes_zero(ran):
    found = read(ran(2) / "uneven").value("gradients/norm/head.weight", 0)
    assert found == pytest.approx(said(ran(2))["uneven"], rel=1e-5)


def test_a_validation_on_one_rank_is_written_and_not_missed(ran):
    points = read(ran(2) / "ddp inside").scalars["val/attention/mean_entropy"]
    assert [step for step, _ in points] == [0, 1, 2]


def test_flattened_parameters_are_said_and_not_measured(ran):
    warning, *_ = said(ran(2))["fsdp1 flat"]
    assert "gradients: not measured under FullyShardedDataParallel" in warning
    run = read(ran(2) / "fsdp1 flat")
    assert run.scalars["learning_rate/0"]
    assert not [tag for tag in run.scalars if tag.startswith("gradients/")]
    assert not [tag for tag in run.histograms if tag.startswith("parameters/")]


def test_log_gradients_on_every_rank(ran):
    found = read(ran(2) / "by hand").group("gradients/norm/", 0)
    assert found == pytest.approx(said(ran(2))["by hand"], rel=1e-5)
