"""The measures and what writes them, held against what a user would call instead."""

import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import summary
from torch.utils.tensorboard.summary import make_histogram

import bthooks
from bthooks.measure.histograms import raw
from bthooks.measure.readings import Readings
from bthooks.record.backend import hand_over
from bthooks.record.event import Event
from bthooks.record.transfer import read

from ..measure.test_histograms import Record, rank_error
from . import peers
from .models import GPT, with_gradients
from .timing import AGAIN, Row, Timings, Work, factor, row, side_by_side

BACKENDS = ("torch", "tensorboardX")


def rows(quick: bool) -> Iterator[Row]:
    yield from norms(quick)
    yield from histograms(quick)
    yield from scalars(quick)
    yield from attention(quick)
    yield importing(quick)


def norms(quick: bool) -> Iterator[Row]:
    limit, loop, lightning = "one read of the bytes", ".item() loop", "Lightning grad_norm"
    model = GPT()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    flat = torch.cat([g.flatten() for g in gradients.values()])
    ways: dict[str, Work | None] = {
        "bthooks": lambda: read_norms(model),
        limit: flat.sum,
        limit + AGAIN: flat.sum,
        loop: lambda: [g.norm().item() for g in gradients.values()],
        "torch get_total_norm": lambda: get_total_norm(list(gradients.values())).item(),
        lightning: peers.lightning_grad_norm(model),
        "Ignite GradsScalarHandler, which writes": peers.ignite_grads_scalar(model),
    }
    found = side_by_side(ways, 5 if quick else 15)
    exact = {name: g.double().norm().item() for name, g in gradients.items()}
    ours = read_norms(model)
    naive = {name: g.norm().item() for name, g in gradients.items()}
    note = f"error {off(ours, exact):.0e}, theirs {off(naive, exact):.0e}"
    work = f"gradient norms, {flat.numel() / 1e6:.0f} M in {len(exact)} tensors"
    yield from row(found, work, limit, 1.15)
    for peer in list(ways)[3:]:
        yield from row(found, work, peer, note=note if peer == loop else "")

    model = with_gradients(2000, 1000)
    ways = {
        "bthooks": lambda: read_norms(model),
        loop: lambda: [p.grad.norm().item() for p in model.parameters()],
        loop + AGAIN: lambda: [p.grad.norm().item() for p in model.parameters()],
        lightning: peers.lightning_grad_norm(model),
    }
    found = side_by_side(ways, 20 if quick else 60)
    yield from row(found, "gradient norms, 2000 x 1 k", loop, 1 / 1.5)
    yield from row(found, "gradient norms, 2000 x 1 k", lightning, 1 / 2.5)


def read_norms(model: nn.Module) -> Mapping[str, float]:
    return read(Readings(norms=bthooks.gradient_norms(model))).norms


def off(found: Mapping[str, float], exact: Mapping[str, float]) -> float:
    return max(abs(found[name] / value - 1) for name, value in exact.items())


def histograms(quick: bool) -> Iterator[Row]:
    model = GPT(layers=8, width=384, heads=6, tokens=256, length=128) if quick else GPT()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    work = "histograms of parameters and gradients, "
    of_model = f"{work}{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M"
    found = side_by_side(histogram_ways(model, wandb=True), 2 if quick else 3)
    ours, theirs, size = quality(model)
    note = f"rank error {ours:.2%}, theirs {theirs:.0%}; {size / 1e3:.1f} kB a record at most"
    yield from row(found, of_model, "torch add_histogram", 1 / 6, note=note)
    ours_x = "bthooks on tensorboardX"
    yield from row(found, of_model, "tensorboardX add_histogram", 1 / 6, ours=ours_x)
    yield from row(found, of_model, "wandb.watch", 1 / 7)
    for elements in (100, 1000, 10_000):
        found = side_by_side(
            histogram_ways(with_gradients(100, elements)), 5 if quick else 15, least=0
        )
        for backend, way in zip(BACKENDS, ("bthooks", ours_x), strict=True):
            peer = f"{backend} add_histogram"
            yield from row(found, f"{work}100 x {elements}", peer, 1.0, ours=way)


def histogram_ways(model: nn.Module, wandb: bool = False) -> dict[str, Work | None]:
    writers = {
        name: bthooks.make_writer(tempfile.mkdtemp(), "run", backend=name) for name in BACKENDS
    }

    def add_histogram(name: str) -> None:
        for tag, parameter in model.named_parameters():
            writers[name].add_histogram(f"parameters/{tag}", parameter, 0)
            writers[name].add_histogram(f"gradients/{tag}", parameter.grad, 0)

    return {
        "bthooks": lambda: bthooks.log_model_histograms(writers["torch"], model, 0),
        "bthooks on tensorboardX": lambda: bthooks.log_model_histograms(
            writers["tensorboardX"], model, 0
        ),
        "torch add_histogram": lambda: add_histogram("torch"),
        f"torch add_histogram{AGAIN}": lambda: add_histogram("torch"),
        "tensorboardX add_histogram": lambda: add_histogram("tensorboardX"),
        "wandb.watch": peers.wandb_watch(model) if wandb else None,
    }


def quality(model: nn.Module) -> tuple[float, float, int]:
    """The largest rank errors, ours and add_histogram's, and the bytes of our largest record."""
    ours = theirs = 0.0
    size = 0
    bins = bthooks.make_writer(tempfile.mkdtemp()).default_bins
    for parameter in model.parameters():
        for values in (parameter.detach(), parameter.grad):
            flat = values.flatten()
            record: Any = raw(bthooks.histogram(flat))
            made = make_histogram(flat.numpy().astype(float), bins)
            other = Record(
                min=made.min,
                max=made.max,
                num=made.num,
                bucket_limits=list(made.bucket_limit),
                bucket_counts=list(made.bucket),
            )
            if record["min"] < record["max"]:
                points = np.linspace(record["min"], record["max"], 31)
                ours = max(ours, rank_error(record, flat, points))
                theirs = max(theirs, rank_error(other, flat, points))
            size = max(size, summary.histogram_raw("", **record).value[0].histo.ByteSize())
    return ours, theirs, size


def scalars(quick: bool) -> Iterator[Row]:
    """150 scalars of one step, on the thread that trains."""
    values = {f"gradients/norm/blocks.{at // 12}.layer.{at}.weight": at / 7 for at in range(150)}

    def add_scalar(writer: Any, step: int) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)

    for backend in BACKENDS:
        peer = f"{backend} add_scalar"
        ways = {
            "bthooks": lambda writer, step: hand_over(writer, Event(values), step),
            "log_metrics": lambda writer, step: bthooks.log_metrics(writer, values, step),
            peer: add_scalar,
            peer + AGAIN: add_scalar,
        }
        folders = {name: tempfile.mkdtemp() for name in ways}
        writers = {
            name: bthooks.make_writer(folder, "run", backend=backend)
            for name, folder in folders.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(40 if quick else 200):
            for name, way in ways.items():
                start = time.perf_counter()
                way(writers[name], step)
                seconds[name].append(time.perf_counter() - start)
                time.sleep(0.005)  # as long as a step: the writer's thread empties its queue
        for writer in writers.values():
            writer.close()
        size = {
            name: sum(file.stat().st_size for file in Path(folder).rglob("events*"))
            for name, folder in folders.items()
        }
        note = f"{1 - size['bthooks'] / size[peer]:.0%} fewer bytes (goal 35 %)"
        found = Timings(seconds)
        yield from row(found, "150 scalars of a step, handed over", peer, 1 / 10, note=note)
        work = "150 scalars, log_metrics"
        yield from row(found, work, peer, 1 / 10, ours="log_metrics")


class Attention(nn.Module):
    """A layer of attention with its projections."""

    def __init__(self, width: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).flatten(2))


def attention(quick: bool) -> Iterator[Row]:
    length = 2048 if quick else 4096
    x = torch.randn(1, length, 512)
    work = f"attention statistics, L = {length}, 8 heads"
    plain = "plain forward"
    with torch.no_grad():
        model = Attention()
        ways = attended(Attention(), x) | {
            plain: lambda: model(x),
            plain + AGAIN: lambda: model(x),
        }
        found = side_by_side(ways, 5 if quick else 15)
        yield from row(found, f"{work}, 128 rows", plain, 1.1, ours="128 rows")
        yield from row(found, f"{work}, all rows", plain, 2.2, ours="all rows")
        if (bert := peers.bert(length, "sdpa")) is None:
            return
        eager = "eager output_attentions=True"
        ways = attended(bert, x) | {
            plain: partial(bert, inputs_embeds=x),
            eager: peers.eager_attentions(length, x),
        }
        found = side_by_side(ways, 3 if quick else 9)
    base = memory("plain", length)
    sizes = [memory(way, length) - base for way in ("sampled", "exact", "eager")]
    work = f"{work}, a BERT layer"
    limit = f"the plain forward alone {factor(found.ratio(plain, eager))}"
    note = f"peak memory +{sizes[1]:.0f} MB, theirs +{sizes[2]:.0f} MB"
    yield from row(found, f"{work}, 128 rows", eager, 1 / 5, ours="128 rows", note=limit)
    yield from row(found, f"{work}, all rows", eager, ours="all rows", note=note)


def attended(model: nn.Module, x: Tensor) -> dict[str, Work | None]:
    """The forward of two copies of the model, with the attention of every call logged."""
    name = "inputs_embeds" if hasattr(model, "embeddings") else "x"
    ways: dict[str, Work | None] = {}
    for way, rows in (("128 rows", 128), ("all rows", None)):
        attached = copy.deepcopy(model)
        bthooks.attach(attached, None, capture=["attention"], every=1, attention_rows=rows)
        ways[way] = partial(attached, **{name: x})
    return ways


def memory(way: str, length: int) -> float:
    """The peak of a process that does one forward, in MB (Linux)."""
    code = f"from tests.benchmarks.measures import peak; print(peak({way!r}, {length}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return float(ran.stdout.split()[-1])


def peak(way: str, length: int) -> float:
    x = torch.randn(1, length, 512)
    model = peers.bert(length, "eager" if way == "eager" else "sdpa")
    ways = {
        "plain": partial(model, inputs_embeds=x),
        "eager": partial(model, inputs_embeds=x, output_attentions=True),
    }
    sampled, exact = attended(model, x).values()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    with torch.no_grad():
        (ways | {"sampled": sampled, "exact": exact})[way]()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def importing(quick: bool) -> Row:
    code = "import time, torch; a = time.perf_counter(); {}; print(time.perf_counter() - a)"

    def seconds(what: str) -> float:
        command = [sys.executable, "-c", code.format(what)]
        ran = subprocess.run(command, env=environment, capture_output=True, check=True)
        return float(ran.stdout)

    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds("import bthooks")  # writes the bytecode
    ours = sorted(seconds("import bthooks") for _ in range(3 if quick else 9))
    theirs = sorted(seconds("import torch.utils.tensorboard") for _ in range(3 if quick else 9))
    return Row(
        "`import bthooks` after `import torch`",
        "`import torch.utils.tensorboard`",
        ours[len(ours) // 2],
        theirs[len(theirs) // 2],
        None,
        goal=0.02,
    )
