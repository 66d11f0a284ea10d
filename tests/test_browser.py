"""What a user sees: the tabs of TensorBoard, started by `python -m bthooks`, in Chromium."""

import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import bthooks

from .conftest import BACKENDS, DEADLINE, read
from .models import Transformer, batch

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="neither Chromium nor its driver is installed"
)

TEXT = """
function text(node) {
    if (node.nodeType === Node.TEXT_NODE) return node.textContent;
    if (['STYLE', 'SCRIPT', 'TEMPLATE', 'DOM-MODULE'].includes(node.nodeName)) return '';
    if (node.nodeType === 1 && getComputedStyle(node).display === 'none') return '';
    const inside = node.shadowRoot ? [...node.shadowRoot.childNodes] : [];
    return [...inside, ...node.childNodes].map(text).join(' ');
}
return text(document.body).replace(/\\s+/g, ' ');
"""
# Ticks the metric of the HParams tab: of a run with many scalars it shows the first five of itself.
TICK = """
function each(node, found) {
    if (node.nodeName === 'PAPER-CHECKBOX') found.push(node);
    if (node.shadowRoot) each(node.shadowRoot, found);
    node.childNodes.forEach(child => each(child, found));
    return found;
}
each(document.body, [])
    .filter(box => box.textContent.includes('hparams/accuracy') && !box.checked)
    .forEach(box => box.click());
"""
# tab -> what must be there; {entropy} is that of block 0 at the last step.
TABS = {
    "timeseries": [r"attention/entropy /blocks.0.attention", "{entropy}"],
    "scalars": [
        r"tag: attention/entropy/blocks.1.attention",
        r"calibration \d",
        "learning_rate train",
    ],
    "custom_scalars": [
        "Is this run healthy",
        r"loss [^M]*Matches \(1\)",
        r"attention entropy by layer, nats .healthy: 0.5 to 2.0. [^M]*Matches \(4\)",
        r"gradient norm, before clipping and as applied [^M]*Matches \(2\)",
        r"learning rate [^M]*Matches \(1\)",
    ],
    "images": ["tag: attention/head_entropy", "tag: calibration/reliability"],
    "histograms": ["tag: gradients/distribution/blocks.0.attention.out.bias"],
    "text": ["exploding_gradients: head: step 1: the norm of all gradients", "a sample"],
    "hparams": [r"hparams/accuracy", r"0.2500", r"0.7500"],
}


def log(writer):
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    large = bthooks.Thresholds(growth=1e-3)
    with bthooks.attach(model, writer, every=1, histograms_every=1, thresholds=large) as handle:
        for step in range(4):
            loss = 1e3 * model(batch(step)[0])["logits"].sum()
            optimizer.zero_grad()
            loss.backward()
            bthooks.log_metrics(writer, {"loss": loss}, handle.step)
            optimizer.step()
    p = torch.rand(50, 3).softmax(-1)
    bthooks.log_calibration(writer, p, torch.randint(3, (50,)), 3)
    bthooks.log_text(writer, "notes", "a sample", 3)
    bthooks.log_hparams(writer, {"rate": 0.25}, {"accuracy": 0.75})


@pytest.fixture(scope="module", params=BACKENDS)
def served(request, tmp_path_factory):
    """The directory of a run, and the address where it is shown."""
    directory = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    with (
        bthooks.make_writer(directory, "run", backend=request.param) as writer,
        pytest.warns(RuntimeWarning, match="exploding_gradients"),
    ):
        log(writer)
    command = [sys.executable, "-m", "bthooks", str(directory)]
    viewer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = next(line for line in viewer.stdout if line.startswith("http"))
    yield directory, line.split()[0]
    viewer.kill()
    viewer.wait()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless", "no-sandbox", "disable-gpu", "window-size=1500,3000"):
        options.add_argument(f"--{argument}")
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as found:
        yield found


@pytest.mark.parametrize("tab", TABS)
def test_a_tab_shows_what_was_logged(tab, served, browser):
    directory, address = served
    entropy = read(directory).value("attention/entropy/blocks.0.attention", 3)
    expected = [pattern.replace("{entropy}", f"{entropy:.4g}") for pattern in TABS[tab]]
    browser.get("about:blank")
    browser.get(f"{address}#{tab}")
    until = time.monotonic() + DEADLINE
    while missing := [p for p in expected if not re.search(p, browser.execute_script(TEXT))]:
        if tab == "hparams":
            browser.execute_script(TICK)
        assert time.monotonic() < until, (missing, browser.execute_script(TEXT))
        time.sleep(0.5)
