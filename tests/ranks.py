"""What two ranks do, under torchrun: `ranks.py DIRECTORY`. Rank 0 writes what it saw as JSON."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import bthooks
from tests.models import Transformer, without_dropout

PARTS = 2


def network():
    torch.manual_seed(0)
    model = without_dropout(Transformer())
    model.unused = nn.Linear(3, 3)
    return model


def batch(step, part=0):
    generator = torch.Generator().manual_seed(10 * step + part)
    x = torch.randn(8, 6, 16, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


def train(model, directory, *, ranks=1, parts=1, attached=None, sync=None, clip=0.05):
    """Three steps; each rank takes its share of every batch."""
    rank = dist.get_rank() if ranks > 1 else 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = bthooks.attach(attached or model, directory, every=1, on_error="raise")
    for step in range(3):
        for part in range(parts):
            if sync is not None:
                sync(model, part == parts - 1)
            x, y = (t.chunk(ranks)[rank] for t in batch(step, part))
            loss = F.cross_entropy(model(x)["logits"], y) / parts
            loss.backward()
        if clip:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and attached is not None:
            with torch.no_grad():  # a validation on one rank alone
                attached.eval()(batch(9)[0])
                attached.train()
    handle.detach()
    return handle


def counted(run):
    """How many reductions of ours `run` makes on this rank."""
    original, calls = dist.all_reduce, []
    dist.all_reduce = lambda *args, **named: (calls.append(1), original(*args, **named))[1]
    try:
        run()
    finally:
        dist.all_reduce = original
    return len(calls)


def hold_back(model, last):
    model.require_backward_grad_sync = last  # as no_sync() does


def shard_back(model, last):
    model.set_requires_gradient_sync(last)


def sharded(mesh, **arguments):
    model = network()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **arguments)
    return fully_shard(model, mesh=mesh, **arguments)


def shard_after_attach(mesh, directory):
    model = network()
    handle = bthooks.attach(model, directory, every=1, on_error="raise")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x, y = (t.chunk(2)[dist.get_rank()] for t in batch(step))
        F.cross_entropy(model(x)["logits"], y).backward()
        clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    handle.detach()


def tensor_parallel(mesh):
    model = network()
    plan = {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def uneven(mesh, directory):
    """One rank's loss does not reach some parameters, and its gradients are None."""
    model = network()
    fully_shard(model.head, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = bthooks.attach(model, directory, every=1, on_error="raise")
    model(batch(0)[0])["logits"].sum().backward()
    if dist.get_rank() == 1:
        model.head.weight.grad = None
    expected = model.head.weight.grad
    optimizer.step()
    handle.detach()
    return 0.0 if expected is None else expected.to_local().norm().item()


def main(directory):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    said = {}
    if rank == 0:
        train(network(), directory / "single")
        train(network(), directory / "single in parts", parts=PARTS)
        train(network(), directory / "single unclipped", clip=None)
    dist.barrier()
    ddp = DistributedDataParallel(network(), find_unused_parameters=True)
    said["ddp"] = counted(lambda: train(ddp, directory / "ddp", ranks=2))
    ddp = DistributedDataParallel(network(), find_unused_parameters=True)
    train(ddp, directory / "ddp inside", ranks=2, attached=ddp.module)
    ddp = DistributedDataParallel(network(), find_unused_parameters=True)
    train(ddp, directory / "ddp in parts", ranks=2, parts=PARTS, sync=hold_back)
    model = sharded(mesh)
    said["fsdp"] = counted(lambda: train(model, directory / "fsdp", ranks=2))
    train(sharded(mesh), directory / "fsdp in parts", ranks=2, parts=PARTS, sync=shard_back)
    shard_after_attach(mesh, directory / "fsdp after")
    train(tensor_parallel(mesh), directory / "tensor parallel", clip=None)
    model = sharded(mesh)
    model(batch(0)[0])["logits"].sum().backward()
    writer = bthooks.make_writer(directory, "by hand")
    bthooks.log_gradients(writer, model, step=0)
    if writer is not None:
        writer.close()
    said["by hand"] = {
        name: p.grad.full_tensor().norm().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    said["uneven"] = uneven(mesh, directory / "uneven")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
        train(model, directory / "fsdp1", ranks=2, clip=None)
    said["fsdp1"] = [str(w.message) for w in caught if "bthooks" in str(w.message)]
    if rank == 0:
        (directory / "said.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("error", message="bthooks: (?!histograms)")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
