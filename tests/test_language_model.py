import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import read

SCRIPT = Path(__file__).parents[1] / "examples" / "language_model.py"
TINY = {"steps": 540, "batch-size": 4, "width": 16, "layers": 1, "eval-every": 100}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("language_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """The directory and the result of an uninterrupted run."""
    log_dir = tmp_path_factory.mktemp("runs")
    best = script.main(arguments(log_dir, experiment="whole"))
    return log_dir / "whole", best


def arguments(log_dir, **options):
    options = {**TINY, "log-dir": log_dir, **options}
    return [f"--{name}={value}" for name, value in options.items()]


def steps(run):
    return {
        tag: [step for step, _ in points]
        for kind in (run.scalars, run.histograms, run.texts)
        for tag, points in kind.items()
    }


@pytest.mark.trains
def test_every_number_has_its_steps_and_the_loss_falls(script, whole):
    directory, best = whole
    run = read(directory)
    found = steps(run)
    expected = {"train/loss": range(0, 540, 10), "learning_rate/0": range(0, 540, 10)}
    evaluated = [*range(99, 540, 100), 539]
    expected |= {"val/loss": evaluated, "sample/text_summary": evaluated}
    expected["gradients/total_norm"] = range(0, 540, 100)
    for name, _ in script.GPT(width=16, layers=1).named_parameters():
        expected[f"gradients/norm/{name}"] = range(0, 540, 100)
        expected[f"gradients/layer_mean/{name.rpartition('.')[0]}"] = range(0, 540, 100)
        expected[f"parameters/{name}"] = expected[f"gradients/distribution/{name}"] = (0, 500)
    assert found == {tag: list(at) for tag, at in expected.items()}
    assert run.files == 1

    losses = [loss for _, loss in run.scalars["val/loss"]]
    assert losses[-1] < math.log(script.CHARACTERS) - 1  # of all alike; it is 2.1 below by then
    assert best == pytest.approx(min(losses))
    assert all(norm < 1.0001 for _, norm in run.scalars["gradients/total_norm"])
    rates = dict(run.scalars["learning_rate/0"])
    assert rates[0] < rates[50] < rates[90] > rates[300] > rates[530] > 0


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    script, whole, backend, tmp_path, monkeypatch, capsys
):
    log_metrics = script.bthooks.log_metrics

    def dying(writer, metrics, step, **options):
        log_metrics(writer, metrics, step, **options)
        if step == 510:
            raise KeyboardInterrupt

    killed = arguments(tmp_path, experiment="killed", backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(script.bthooks, "log_metrics", dying)
        with pytest.raises(KeyboardInterrupt):
            script.main(killed)
    last = {tag: found[-1] for tag, found in steps(read(tmp_path / "killed")).items()}
    assert last["train/loss"] == 510, "nothing was written after the checkpoint of step 500"
    assert last["gradients/total_norm"] == last["parameters/head.bias"] == 500

    with pytest.raises(SystemExit):
        script.main(killed)
    assert "go on with --resume" in capsys.readouterr().err
    time.sleep(1)  # event files are read in the order of their names, which count in seconds
    directory, best = whole
    assert script.main([*killed, "--resume"]) == pytest.approx(best, rel=1e-5)

    expected, resumed = read(directory), read(tmp_path / "killed")
    assert resumed.files == 2
    assert steps(resumed) == steps(expected)
    assert resumed.texts == expected.texts
    for tag, points in expected.scalars.items():
        np.testing.assert_allclose(resumed.scalars[tag], points, rtol=1e-5, err_msg=tag)
    for tag, points in expected.histograms.items():
        for (_, a), (_, b) in zip(points, resumed.histograms[tag], strict=True):
            moments = [(h.num, h.min, h.max, h.sum_squares) for h in (a, b)]
            np.testing.assert_allclose(*moments, rtol=1e-5, err_msg=tag)


def test_the_best_and_the_last_three_checkpoints_stay(script, whole):
    directory, best = whole
    kept = {path.name: torch.load(path) for path in (directory / "checkpoints").iterdir()}
    assert {name: state["step"] for name, state in kept.items() if name != "best.pt"} == {
        f"last-0000{step}.pt": step for step in (400, 500, 540)
    }
    model = script.GPT(width=16, layers=1).eval()
    model.load_state_dict(kept["best.pt"]["model"])
    with torch.no_grad():
        assert model.loss(script.corpus()[1]).item() == pytest.approx(best, rel=1e-5)
