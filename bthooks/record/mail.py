"""Mail: what one rank measured of a step, as a message in the store of the process group.

What is longer than 1 MiB goes in pieces: over 8 MiB the server cuts the connection. Never `get` or
`wait` for a key that may be absent: one that waits held the `set` of another thread up for 2.8 s.
"""

import copyreg
import io
import pickle
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measure.readings import Readings

_PIECE = 1 << 20  # bytes


class Mail(NamedTuple):
    """What a rank measured of a step, or of a part of it."""

    step: int  # -1: its attachment has ended
    readings: Readings
    prefix: str = ""
    is_over: bool = True  # whether nothing more of this step is expected


def put(store: Any, key: str, mail: Mail) -> None:
    """Put `mail` under `key`, which is there once all is."""
    data = pack(mail)
    pieces = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
    for number, piece in enumerate(pieces[1:], 1):
        store.set(f"{key}/{number}", piece)
    store.set(key, b"%d " % len(pieces) + pieces[0])


def take(store: Any, key: str) -> Mail:
    """Take the mail that is under `key` out of the store."""
    count, data = store.get(key).split(b" ", 1)
    store.delete_key(key)
    for number in range(1, int(count)):
        data += store.get(f"{key}/{number}")
        store.delete_key(f"{key}/{number}")
    return unpack(data)


def remove(store: Any, key: str) -> bool:
    """Take out of the store, unread, what is under `key`; whether anything is."""
    if not store.check([key]):
        return False
    take(store, key)
    return True


def pack(mail: Mail) -> bytes:
    """`mail`, whose tensors are on the host, in bytes."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, pickle.HIGHEST_PROTOCOL)
    # A view would be pickled with the whole storage that it is of.
    pickler.dispatch_table = copyreg.dispatch_table | {Tensor: _reduced}
    pickler.dump(mail)
    return zlib.compress(stream.getbuffer(), 1)


def unpack(data: bytes) -> Mail:
    """The mail that `pack` made into `data`."""
    mail: Mail = pickle.loads(zlib.decompress(data))
    return mail


def _reduced(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    narrow = tensor.float()  # most are counts, or were measured as such
    is_exact = torch.equal(narrow.double().nan_to_num(), tensor.double().nan_to_num())
    values = (narrow if is_exact else tensor.double()).contiguous()
    return _tensor, (values.numpy().tobytes(), values.dtype, tensor.shape)


def _tensor(data: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.double().reshape(shape)
