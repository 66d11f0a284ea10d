"""Job: which of the ranks of `torch.distributed` this process is, as it is now."""

import torch


def rank() -> int:
    """This process's rank; 0 where there is no process group."""
    ranks = torch.distributed
    is_group = ranks.is_available() and ranks.is_initialized()
    return ranks.get_rank() if is_group else 0


def size() -> int:
    """How many ranks there are; 1 where there is no process group."""
    ranks = torch.distributed
    is_group = ranks.is_available() and ranks.is_initialized()
    return ranks.get_world_size() if is_group else 1
