import importlib.util
from pathlib import Path

import pytest

from .conftest import read

SCRIPT = Path(__file__).parent.parent / "examples" / "digits.py"


@pytest.mark.trains
def test_the_main_example_in_short(tmp_path, backend, capsys):
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    figures = digits.main(["--epochs", "3", "--backend", backend, "--log-dir", str(tmp_path)])
    run = read(tmp_path)
    assert run.files == 1
    steps = [0, 20, 40, 60]  # 22 steps an epoch
    for tag in ("attention/entropy/blocks.2", "gradients/total_norm", "uncertainty/epistemic"):
        assert [s for s, _ in run.scalars[tag]] == steps, tag
    assert [s for s, _ in run.scalars["val/uncertainty/epistemic"]] == [21, 43, 65]
    assert [s for s, _ in run.histograms["parameters/position"]] == [0]
    assert "test/rotated/uncertainty/distribution/epistemic" in run.histograms
    rates = [rate for _, rate in run.scalars["learning_rate/0"]]
    assert rates[0] < max(rates) > rates[-1]
    assert run.value("hparams/upright_accuracy", 0) == pytest.approx(figures["upright_accuracy"])
    assert run.value("test/upright/accuracy", 66) == pytest.approx(figures["upright_accuracy"])
    assert figures["upright_accuracy"] > 0.3  # 0.1 by chance; it is 0.84 to 0.89 by then
    assert not any("alerts" in tag for tag in run.texts)
    for name in ("before", "after"):
        ece = run.value(f"test/{name}_temperature/calibration/ece", 66)
        assert ece == pytest.approx(figures[f"ece_{name}"])
    assert f"python -m bthooks {tmp_path}" in capsys.readouterr().out
