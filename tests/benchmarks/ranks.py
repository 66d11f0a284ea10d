"""What the exchange of a step between ranks costs, without training; of many ranks, simulated."""

import socket
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bthooks.measure.attention import Columns
from bthooks.measure.figures import figures_of
from bthooks.measure.readings import Readings
from bthooks.record.mail import Mail, pack, put
from bthooks.record.others import Others
from bthooks.record.ranks import Ranks
from bthooks.report import Ledger

STEPS = 40
HEAD = ("ranks", "layers", "kB a rank", "ms to send", "ms to take", "ms to put together")


class Cost(NamedTuple):
    """A row of the table; of each step the median."""

    ranks: str
    layers: int
    kilobytes: float  # that a rank sends
    send: float  # ms, on a rank that sends
    take: float  # ms, on the rank that writes
    figures: float  # ms, there

    def cells(self) -> list[str]:
        numbers = (f"{self.kilobytes:.0f}", *(f"{ms:.2f}" for ms in self[3:]))
        return [self.ranks, str(self.layers), *numbers]


def readings(layers: int, heads: int = 12) -> Readings:
    """As of a transformer of that many layers, with twelve parameters each, under DDP."""
    parameters = [
        f"blocks.{at}.part{number}.weight" for at in range(layers) for number in range(12)
    ]
    generator = torch.Generator().manual_seed(0)
    norms = dict(
        zip(parameters, torch.rand(len(parameters), generator=generator).tolist(), strict=True)
    )
    return Readings(
        learning_rates={"0": 1e-3},
        norms=norms,
        norms_before_clip=dict(norms),
        sizes=dict(norms),
        attention={
            f"blocks.{at}.attention": torch.rand(len(Columns._fields), heads).double()
            for at in range(layers)
        },
    )


def work(rank: int, size: int, layers: int, port: int, directory: str) -> None:
    """What one process does: it sends, or takes, a step after the other."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ranks, own = Ranks(0, "", False, Ledger(strict=True)), readings(layers)
    ranks.look(0)
    dist.barrier()
    times: list[tuple[float, float]] = []
    for step in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        if rank:
            ranks.send(Mail(step, own.settled()))
            times.append((time.perf_counter() - start, 0.0))
            dist.barrier()
            continue
        dist.barrier()
        start = time.perf_counter()
        assert ranks.are_in(step, "")
        found, _ = ranks.with_others(step, "", own)
        taken = time.perf_counter()
        assert len(found) == size
        figures_of(found)
        times.append((taken - start, time.perf_counter() - taken))
    torch.save(torch.tensor(times).median(0).values * 1e3, f"{directory}/{rank}")
    dist.barrier()
    if rank:
        ranks.end()
    dist.barrier()
    if not rank:
        ranks.end()
    dist.destroy_process_group()


def measured(size: int, layers: int) -> Cost:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (size, layers, port, directory), nprocs=size)
        take, figures = torch.load(f"{directory}/0").tolist()
        send = max(torch.load(f"{directory}/{rank}")[0].item() for rank in range(1, size))
    kilobytes = len(pack(Mail(0, readings(layers)))) / 1e3
    return Cost(str(size), layers, kilobytes, send, take, figures)


def simulated(size: int, layers: int) -> Cost:
    """One process with a store of its own, to which all that `size` ranks send is put."""
    store, nonce = dist.HashStore(), "simulated"
    data, own = Mail(0, readings(layers)), readings(layers)
    others = Others(store, nonce, 0, size, Ledger(strict=True))
    start = time.perf_counter()
    for rank in range(1, size):
        number = store.add(f"{nonce}/count", 1) - 1
        store.set(f"{nonce}/joined/{number}", f"{rank} 0")
        put(store, f"{nonce}/{rank}/0", data)
    sent = time.perf_counter()
    while others.take():
        pass
    found = {0: own} | others.of_step(0, "")
    taken = time.perf_counter()
    assert len(found) == size
    figures_of(found)
    end = time.perf_counter()
    kilobytes = len(pack(data)) / 1e3
    return Cost(
        f"{size}, simulated",
        layers,
        kilobytes,
        (sent - start) / (size - 1) * 1e3,
        (taken - sent) * 1e3,
        (end - taken) * 1e3,
    )


def rows(quick: bool) -> Iterator[Cost]:
    for size in (2, 4) if quick else (2, 4, 8):
        for layers in (12, 96):
            yield measured(size, layers)
    for size in (64,) if quick else (64, 128, 1024):
        yield simulated(size, 96)
