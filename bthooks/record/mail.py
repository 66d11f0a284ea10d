"""Mail: what one rank measured of a step, as a message in the store of the process group.

What is longer than 1 MiB goes in pieces: over 8 MiB the server cuts the connection. Never `get` or
`wait`: for a key that is absent, as one that another rank has just deleted, they wait, and hold the
`set` of another thread up (for 2.8 s).
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
_NO_VALUE = "?"


class Mail(NamedTuple):
    """What a rank measured of a step, or of a part of it."""

    step: int  # -1: its attachment has ended
    readings: Readings
    prefix: str = ""
    is_over: bool = True  # whether nothing more of this step is expected


def read(store: Any, key: str) -> bytes | None:
    """What is under `key`, None if nothing is; it never waits."""
    # Nothing is compared with what no value is: what is there comes back, or this if nothing is.
    found: bytes = store.compare_set(key, _NO_VALUE, _NO_VALUE)
    return None if found == _NO_VALUE.encode() else found


def put(store: Any, key: str, mail: Mail) -> None:
    """Put `mail` under `key`, which is there once all is."""
    data = pack(mail)
    pieces = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
    for number, piece in enumerate(pieces[1:], 1):
        store.set(f"{key}/{number}", piece)
    store.set(key, b"%d " % len(pieces) + pieces[0])


def take(store: Any, key: str) -> Mail | None:
    """Take the mail that is under `key` out of the store; None where it is not, or not all."""
    if (found := read(store, key)) is None:
        return None
    count, data = found.split(b" ", 1)
    pieces = [data, *(read(store, f"{key}/{number}") for number in range(1, int(count)))]
    remove(store, key)
    return unpack(b"".join(filter(None, pieces))) if None not in pieces else None


def remove(store: Any, key: str) -> bool:
    """Delete what is under `key`; whether anything was."""
    found = store.check([key])  # a FileStore says of any key that it has deleted it
    store.delete_key(key)
    number = 1
    while store.check([f"{key}/{number}"]):
        store.delete_key(f"{key}/{number}")
        number += 1
    return bool(found)


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
