"""Flattened: the parameters of FSDP1 and DeepSpeed, of whose units a rank has a slice."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..measure.sharded import Part

FLAT = (
    "left out: FSDP1 accumulates the gradients of a unit in one flat parameter, and tells of no end"
)


class Flattened(Exception):
    """Which slice of a parameter this rank has can't be told."""


def slices_of(root: nn.Module) -> dict[Tensor, Part]:
    """Which part of each parameter of FSDP1 this rank has.

    Raises:
        Flattened: they are not to be told apart, as with `use_orig_params=False`, or in DeepSpeed.
    """
    found: dict[Tensor, Part | None] = {}
    for module in root.modules():
        package, name = type(module).__module__, type(module).__name__
        is_fsdp1 = name == "FullyShardedDataParallel" and package.startswith("torch.")
        if not is_fsdp1 and package.partition(".")[0] != "deepspeed":
            continue
        own = dict(module.named_parameters())
        if not is_fsdp1 or any(n.endswith("_flat_param") for n in own):
            raise Flattened(
                f"not measured under {name}: a rank holds slices of flattened parameters, of which "
                "every norm would be partial; FSDP1 with use_orig_params=True is measured, and so "
                "is torch's fully_shard (FSDP2)"
            )
        group: Any = module.process_group
        ranks = tuple(dist.get_process_group_ranks(group))
        is_whole = getattr(module.sharding_strategy, "name", "") == "NO_SHARD"
        part = None if is_whole else Part(ranks, dist.get_rank(group), len(ranks))
        found |= dict.fromkeys(own.values(), part)  # one inside it comes later, for its own
    return {p: part for p, part in found.items() if part is not None}
