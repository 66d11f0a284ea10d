"""What the ranks of a job do, each in a process of its own. Rank 0 says what it saw."""

import json
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import bthooks
from tests.models import Block, Transformer, without_dropout

STEPS, WHAT = 3, ["attention", "gradients", "learning_rate", "uncertainty", "histograms", "updates"]


class Heads(nn.Module):
    """Attention whose heads tensor parallelism can split: it has as many as its columns make."""

    def __init__(self, width=16):
        super().__init__()
        self.q, self.v, self.out = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)  # whose gradient would be what rounding left
        with torch.no_grad():
            self.q.weight.mul_(6)

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def network():
    torch.manual_seed(0)
    model = without_dropout(Transformer())
    for block in model.blocks:
        block.attention = Heads()
    model.unused = nn.Linear(3, 3)
    return model


def batch(step, part=0):
    generator = torch.Generator().manual_seed(10 * step + part)
    x = torch.randn(8, 6, 16, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


def train(model, directory, *, rank=0, ranks=1, parts=1, attached=None, sync=None, clip=0.05):
    """Some steps, of whose batches this is the share of `rank` of `ranks`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # More is asked for than is there in every run.
    with bthooks.attach(
        attached or model, directory, every=1, histograms_every=1, capture=WHAT, on_error="raise"
    ) as handle:
        for step in range(STEPS):
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
    return handle


def hold_back(model, last):
    model.require_backward_grad_sync = last  # as no_sync() does


def shard_back(model, last):
    model.set_requires_gradient_sync(last)


def sharded(model, mesh, **arguments):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **arguments)
    return fully_shard(model, mesh=mesh, **arguments)


def tensor_parallel(mesh):
    model = network()
    plan = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    plan |= {"attention.out": RowwiseParallel()}
    plan |= {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def data_parallel():
    return DistributedDataParallel(network(), find_unused_parameters=True)


def shard_after_attach(mesh, directory, rank):
    model = network()
    with bthooks.attach(model, directory, every=1, histograms_every=1, capture=WHAT):
        sharded(model, mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            x, y = (t.chunk(dist.get_world_size())[rank] for t in batch(step))
            F.cross_entropy(model(x)["logits"], y).backward()
            clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()


class Stage(nn.Module):
    """Those blocks of a stack that are `kept`, under the names that they have in the whole."""

    def __init__(self, count, kept):
        super().__init__()
        torch.manual_seed(0)
        blocks = [without_dropout(Block()) for _ in range(count)]
        self.blocks = nn.ModuleDict({str(at): blocks[at] for at in kept})

    def forward(self, x):
        for block in self.blocks.values():
            x = block(x)
        return x


def pipeline(directory, rank, stages):
    """Each rank has one block; the reference has all."""
    model = Stage(stages, [rank])
    stage = PipelineStage(model, rank, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, max(4, stages), loss_fn=F.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bthooks.attach(model, directory, every=1, histograms_every=1):
        for step in range(STEPS):
            x = batch(step)[0]
            given = (x,) if rank == 0 else ()
            target = {"target": x.flip(0), "losses": []} if rank == stages - 1 else {}
            schedule.step(*given, **target)
            optimizer.step()
            optimizer.zero_grad()


def whole_pipeline(directory, stages):
    model = Stage(stages, range(stages))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bthooks.attach(model, directory, every=1, histograms_every=1):
        for step in range(STEPS):
            x = batch(step)[0]
            F.mse_loss(model(x), x.flip(0)).backward()
            optimizer.step()
            optimizer.zero_grad()


def uneven(mesh, directory):
    """One rank's loss does not reach some parameters, and its gradients are None."""
    model = network()
    fully_shard(model.head, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bthooks.attach(model, directory, every=1, on_error="raise"):
        model(batch(0)[0])["logits"].sum().backward()
        if dist.get_rank() == 1:
            model.head.weight.grad = None
        expected = model.head.weight.grad
        optimizer.step()
    return 0.0 if expected is None else expected.to_local().norm().item()


def by_hand(mesh, directory):
    """The norms that every rank asks for, and those of torch's own whole gradients."""
    model = sharded(network(), mesh)
    model(batch(0)[0])["logits"].sum().backward()
    writer = bthooks.make_writer(directory, "by hand")
    bthooks.log_gradients(writer, model, step=0)
    if writer is not None:
        writer.close()
    return {
        name: p.grad.full_tensor().norm().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def job(directory, port, size, rank):
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="bthooks: ")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    share, said = {"rank": rank, "ranks": size}, {}
    mesh = init_device_mesh("cpu", (size,))
    train(data_parallel(), directory / "ddp", **share)
    if size == 2:
        ddp = data_parallel()
        train(ddp, directory / "ddp inside", attached=ddp.module, **share)
        train(data_parallel(), directory / "ddp in parts", parts=2, sync=hold_back, **share)
        train(sharded(network(), mesh), directory / "fsdp", **share)
        model = sharded(network(), mesh, reshard_after_forward=False)
        train(model, directory / "fsdp in parts", parts=2, sync=shard_back, **share)
        shard_after_attach(mesh, directory / "fsdp after", rank)
        train(tensor_parallel(mesh), directory / "tensor parallel", clip=None)
        said["by hand"] = by_hand(mesh, directory)
        said["uneven"] = uneven(mesh, directory / "uneven")
        for name, is_told_apart in (("fsdp1", True), ("fsdp1 flat", False)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cpu = torch.device("cpu")
                model = FullyShardedDataParallel(
                    network(), device_id=cpu, use_orig_params=is_told_apart
                )
                train(model, directory / name, clip=None, **share)
            said[name] = [str(w.message) for w in caught if "bthooks" in str(w.message)]
    else:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "other"))
        train(sharded(network(), mesh), directory / "hsdp", **share)
        share = {"rank": mesh.get_local_rank("data"), "ranks": 2}
        model = sharded(tensor_parallel(mesh["other"]), mesh["data"])
        train(model, directory / "fsdp and tensor parallel", clip=None, **share)
    pipeline(directory / "pipeline", rank, size)
    dist.barrier()
    if rank == 0:
        (directory / "said.json").write_text(json.dumps(said))
    os._exit(0)  # torch's own threads of gloo abort at the end of 1 run in 12, without us as well


def alone(directory, stages):
    """The same by one process, on whole batches."""
    torch.set_num_threads(1)
    train(network(), directory / "single")
    train(network(), directory / "single in parts", parts=2)
    train(network(), directory / "single unclipped", clip=None)
    whole_pipeline(directory / "single pipeline", stages)
