import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bthooks
from bthooks.__main__ import main

from .conftest import DEADLINE

LARGE = bthooks.Thresholds(growth=1e-3)  # a gradient that is, is an explosion
PYTHON = [sys.executable, "-m", "bthooks"]


def run(*arguments):
    """The command in this process: starting another takes 3 s."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as ended:
            code = ended.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def trained(directory, backend, weight=1.0):
    """A run whose gradients explode if the weight is large, and are well again at the end."""
    with bthooks.make_writer(directory, f"run_{weight:g}", backend=backend) as writer:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 1e-9)
        handle = bthooks.attach(model, writer, every=1, thresholds=LARGE)
        for step in range(8):
            loss = model(torch.ones(1, 2)).mean() * (1 if step > 5 else weight)
            optimizer.zero_grad()
            loss.backward()
            bthooks.log_metrics(writer, {"loss": loss}, handle.step)
            optimizer.step()
            if weight > 100 and step == 5:
                break
        handle.detach()


@pytest.mark.filterwarnings("ignore:bthooks. exploding_gradients")
def test_the_report(tmp_path, backend):
    trained(tmp_path, backend)
    told = run(tmp_path, "--report")
    assert told.returncode == 0, told.stderr
    assert "run_1: step 7" in told.stdout
    assert re.search(r"train/loss -?\d", told.stdout)
    assert "no alerts" in told.stdout
    assert told.stdout.endswith("runs: 1, open alerts: 0\n")

    trained(tmp_path, backend, 100.0)
    told = run(tmp_path, "--report")
    assert told.returncode == 0
    assert "over  exploding_gradients: root: step 1: the norm" in told.stdout
    assert "cleared: exploding_gradients: root: step 7" in told.stdout

    trained(tmp_path, backend, 1000.0)
    told = run(tmp_path, "--report")
    assert told.returncode == 1
    assert "health/exploding_gradients 50% at step 5" in told.stdout
    assert told.stdout.endswith("runs: 3, open alerts: 1\n")
    (tmp_path / "run_1").rename(tmp_path / "run_ü")
    ascii_only = subprocess.run(
        [*PYTHON, tmp_path, "--report"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert "\nrun_\\xfc: step 7\n" in ascii_only.stdout, ascii_only.stderr
    (line,) = [line for line in told.stdout.splitlines() if line.startswith("  OPEN")]
    assert line.startswith("  OPEN  exploding_gradients: root: step 1: the norm")
    assert told.stderr == ""


def test_links_are_followed_and_each_run_is_told_once(tmp_path):
    trained(tmp_path / "there", "torch")
    (tmp_path / "shown" / "run").mkdir(parents=True)
    (tmp_path / "shown" / "linked").symlink_to(tmp_path / "there" / "run_1")
    for name in "latest", "again", "run/up":
        (tmp_path / "shown" / name).symlink_to(tmp_path / "shown")
    (tmp_path / "there" / "run_1" / "events.out.tfevents.0").symlink_to("nowhere")
    told = run(tmp_path / "shown", "--report")
    assert told.stdout.count(": step 7") == told.stdout.count("linked: step 7") == 1
    assert told.stdout.endswith("runs: 1, open alerts: 0\n"), told.stderr


def judged(directory, weights, state=None):
    """Steps whose gradients are as large as the weights, in a process of its own."""
    with bthooks.make_writer(directory, "run") as writer:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 1e-9)
        handle = bthooks.attach(model, writer, every=1, thresholds=LARGE)
        if state is not None:
            handle.load_state_dict(state)
        for weight in weights:
            optimizer.zero_grad()
            (model(torch.ones(1, 2)).mean() * weight).backward()
            optimizer.step()
        handle.detach()
        return handle.state_dict()


@pytest.mark.filterwarnings("ignore:bthooks. exploding_gradients")
def test_a_run_started_anew_has_no_alerts_of_before_and_a_resumed_one_has(tmp_path):
    state = judged(tmp_path / "a", [1000.0] * 5)
    judged(tmp_path / "a", [1000.0] * 2, state)
    resumed = run(tmp_path / "a" / "run", "--report")
    assert resumed.returncode == 1, resumed.stderr
    assert resumed.stdout.startswith("run: step 6\n")
    assert "OPEN  exploding_gradients: root: step 1" in resumed.stdout

    judged(tmp_path / "a", [1.0] * 4)
    anew = run(tmp_path / "a", "--report")
    assert anew.returncode == 0
    assert anew.stdout.endswith("runs: 1, open alerts: 0\n")

    # A writer beside it says nothing of it.
    with bthooks.make_writer(tmp_path / "b", "run") as beside:
        judged(tmp_path / "b", [1000.0] * 5)
        bthooks.log_metrics(beside, {"loss": 1.0}, 0)
    assert run(tmp_path / "b", "--report").returncode == 1


def test_a_reader_that_ends_early_gets_no_traceback(tmp_path):
    trained(tmp_path, "torch")
    command = [*PYTHON, str(tmp_path), "--report"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as report:
        report.stdout.close()
        assert report.stderr.read() == b""
    assert report.returncode == 141


@pytest.mark.parametrize("more", [[], ["--report"]])
def test_nothing_to_show_is_said(more, tmp_path):
    told = run(tmp_path / "nonsense", *more)
    assert (told.returncode, told.stdout) == (2, "")
    assert f"there is no directory {tmp_path / 'nonsense'}" in told.stderr
    (tmp_path / "a file").write_text("")
    assert "is a file" in run(tmp_path / "a file", *more).stderr
    told = run(tmp_path, *more)
    assert told.returncode == 2
    assert "there are no event files" in told.stderr
    bthooks.make_writer(tmp_path, "empty").close()
    bthooks.make_writer(tmp_path, "empty_2", backend="tensorboardX").close()
    told = run(tmp_path, *more)
    assert told.returncode == 2
    assert "nothing has been logged yet" in told.stderr
    assert told.stderr.count("\n") == 1


def test_nonsense_is_refused_and_help_is_complete(tmp_path):
    trained(tmp_path, "torch")
    for port in 70000, "x":
        told = run(tmp_path, "--port", port)
        assert f"a port is a number from 1 to 65535, got {port}" in told.stderr
    told = run(tmp_path, "--host", "no.such.host.invalid")
    assert told.returncode == 2
    assert "can't serve on no.such.host.invalid" in told.stderr
    assert told.stderr.count("\n") == 1
    assert "can't serve on .x" in run(tmp_path, "--host", ".x").stderr
    with socket.create_server(("localhost", 65535)):
        told = run(tmp_path, "--port", 65535)
        assert told.returncode == 2
        assert "can't serve on localhost, port 65535" in told.stderr
        assert "already in use" in told.stderr
    told = run("--help")
    assert told.returncode == 0
    for option in ("logdir", "--report", "--host", "--port", "6006", "exit status"):
        assert option in told.stdout


def test_it_serves_beside_another_program_until_ctrl_c(tmp_path):
    trained(tmp_path, "torch")
    until = time.monotonic() + DEADLINE
    with contextlib.ExitStack() as stack:
        taken = ""
        with contextlib.suppress(OSError):  # another program has it, and may give it up
            stack.enter_context(socket.create_server(("localhost", 6006)))
            taken = "6006"
        viewer = subprocess.Popen(
            [*PYTHON, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            # What a shell starts in the background, as CI may be, does not hear Ctrl-C.
            preexec_fn=None if os.name == "nt" else hear_ctrl_c,
        )
        stack.callback(viewer.kill)
        line = next((line for line in viewer.stdout if line.startswith("http")), "")
        found = re.match(r"(http://localhost:(\d+)/) shows ", line)
        assert found, line + viewer.stderr.read()
        assert found[2] != taken
        while b"train/loss" not in fetched(f"{found[1]}data/plugin/scalars/tags"):
            assert time.monotonic() < until
            time.sleep(0.1)
        viewer.send_signal(getattr(signal, "CTRL_C_EVENT", signal.SIGINT))
        assert viewer.communicate(timeout=DEADLINE)[1] == ""
        assert viewer.returncode == 0


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def fetched(address):
    """What a server answers; nothing where it does not yet."""
    try:
        return urllib.request.urlopen(address, timeout=DEADLINE).read()
    except OSError:
        return b""
