"""Images: a few numbers on the host -> `(height, width, 3)`, uint8, drawn by Pillow. Pure.

Pillow is imported where something is drawn, so that `import bthooks` does not take its time.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..names import tag

_CELL, _KEY, _LONG = 22, 96, 32  # pixels of a head, of the key to the colours; letters of a name
_LEFT, _TOP, _PLOT, _COUNTS = 44, 24, 240, 40  # pixels: where the diagram begins, how high it is
_INK, _GREY, _RED, _BLUE, _PINK = "#3c3c3c", "#e1e1e1", "#d62728", "#1f77b4", "#f6b2ac"
# viridis at 0, 1/4, ..., 1 (Smith and van der Walt, 2015), and at 1 again
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), *[(253, 231, 37)] * 2)


def heat_map(entropies: Mapping[str, Sequence[float]], collapsed: float) -> Tensor:
    """Draw a row of cells per layer, a cell per head, from module path -> nats.

    A head below `collapsed` nats is red, one without a value grey.

    >>> heat_map({"blocks.0": [1.0, 2.0], "blocks.1": [1.5, 0.0]}, 0.1).shape
    torch.Size([116, 196, 3])
    """
    names, rows = [*map(_short, entropies)], [*entropies.values()]
    top = max(1, math.ceil(max(v for row in rows for v in (0, *row) if math.isfinite(v))))
    left = 10 + math.ceil(max(map(_blank(1, 1)[1].textlength, names)))
    right, bottom = left + _CELL * max(map(len, rows)), _CELL * (1 + max(len(rows), 4))
    image, pen = _blank(right + _KEY, bottom + 6)
    for x in range(left, right, _CELL):
        _text(pen, x + _CELL / 2, 5, (x - left) // _CELL, 0.5)
    for y, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        _text(pen, 4, _CELL * y + 4, name)
        for x, value in enumerate(row):
            colour = _RED if value < collapsed else _colour(value / top)
            _fill(pen, left + _CELL * x, _CELL * (y + 1) - 1, _CELL - 1, _CELL - 1, colour)
    end = bottom - 2 * _CELL  # of the scale
    for y in range(_CELL, end):
        _fill(pen, right + 10, y + 1, 13, 1, _colour((end - y) / (end - _CELL)))
    _text(pen, right + 29, _CELL - 1, f"{top} nats")
    _text(pen, right + 29, end - 13, 0)
    for y, colour, text in (end + 8, _RED, f"< {collapsed:g} nats"), (end + 28, _GREY, "no value"):
        _fill(pen, right + 10, y + 13, 13, 13, colour)
        _text(pen, right + 29, y - 1, text)
    return _pixels(image)


def reliability_diagram(bins: Tensor) -> Tensor:
    """Draw accuracy over confidence, a bar for each bin of `calibration_bins`, and below its count.

    Perfect is the diagonal. Pink is what lies between a bin's accuracy and its mean confidence.

    >>> reliability_diagram(torch.ones(15, 5)).shape
    torch.Size([352, 300, 3])
    """
    rows, wide = bins.tolist(), max(2, _PLOT // len(bins))
    most = max(count for count, *_ in rows)
    width, bottom, floor = wide * len(rows), _TOP + _PLOT, _TOP + _PLOT + 8 + _COUNTS
    image, pen = _blank(_LEFT + width + 16, floor + 40)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - 1 - round(share * (_PLOT - 1))
        _fill(pen, _LEFT, y + 1, width, 1, _GREY)
        _text(pen, _LEFT - 6, y - 7, share, 1)
        _text(pen, _LEFT + share * width, floor + 4, share, 0.5)
    for x, (count, confidence, right, *_) in enumerate(rows):
        if count:
            left, (low, high) = _LEFT + wide * x, sorted((right / count, confidence / count))
            _fill(pen, left, bottom, wide - 1, high * _PLOT, _PINK)
            _fill(pen, left, bottom, wide - 1, low * _PLOT, _BLUE)
            _fill(pen, left, floor, wide - 1, count / most * _COUNTS, _INK)
    pen.line((_LEFT, bottom - 1, _LEFT + width - 1, _TOP), _INK)
    _text(pen, 4, 4, "accuracy")
    _fill(pen, _LEFT + width - 118, 18, 13, 13, _PINK)
    _text(pen, _LEFT + width, 4, "gap to confidence", 1)
    _text(pen, _LEFT - 6, floor - 15, "count", 1)
    _text(pen, _LEFT + width / 2, floor + 20, "confidence", 0.5)
    return _pixels(image)


def _blank(width: int, height: int) -> tuple[Any, Any]:
    """A white image, and what draws in it."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    with contextlib.suppress(TypeError, ImportError):  # before Pillow 10.1, and without FreeType
        pen.font = ImageFont.load_default(12)
    return image, pen


def _fill(pen: Any, x: int, bottom: int, width: int, height: float, colour: Any) -> None:
    pen.rectangle((x, bottom - max(1, round(height)), x + width - 1, bottom - 1), colour)


def _text(pen: Any, x: float, y: float, text: object, before: float = 0.0) -> None:
    """Write `text` with this share of it on the left of `x`."""
    pen.text((x - before * pen.textlength(f"{text}"), y), f"{text}", _INK)


def _pixels(image: Any) -> Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3)


def _short(path: str) -> str:
    """The name of a layer, its parts cut where it is long: the layer's number is in its middle.

    >>> _short("bert.encoder.layer.11.attention.self")
    'bert.encode.layer.11.attent.self'
    """
    cuts = (".".join(part[:n] for part in tag(path).split(".")) for n in range(_LONG, 0, -1))
    return next((cut for cut in cuts if len(cut) <= _LONG), path[:_LONG])


def _colour(share: float) -> Any:
    if not math.isfinite(share):
        return _GREY
    index, rest = divmod(share * 4, 1)
    pair = zip(_RAMP[int(index)], _RAMP[int(index) + 1], strict=True)
    return tuple(round(a + rest * (b - a)) for a, b in pair)
