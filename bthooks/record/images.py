"""Images: small tensors -> RGB. Pure.

In: a few numbers on the host. Out: `(height, width, 3)`, uint8, ready to be written.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CELL, _MARGIN, _ZOOM = 28, 26, 2  # pixels: a cell, the labels' strip, a dot of the font
_WHITE, _INK, _GREY, _RED = (255, 255, 255), (60, 60, 60), (225, 225, 225), (214, 39, 40)
_BLUE, _PINK = (31, 119, 180), (246, 178, 172)
_PLOT, _COUNTS = 240, 40  # pixels: the side of the diagram, the height of the counts below it
_COLLAPSED = 0.1  # nats
# viridis at 0, 1/4, ..., 1 (Smith and van der Walt, 2015)
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_DIGITS = {  # 3 x 5 dots, a row an octal digit
    **{"0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711"},
    **{"5": "74717", "6": "74757", "7": "71244", "8": "75757", "9": "75717"},
}


def heat_map(rows: Sequence[Tensor]) -> Tensor:
    """Draw one row of cells per layer, one cell per head: `(height, width, 3)`, uint8.

    Layers are numbered from the top, heads from the left. The bar at the right is the scale, from
    0 to the next whole number of nats; a head below 0.1 nats is red, one without a value grey.

    Args:
        rows: entropies in nats, `(heads,)` each, on the CPU.

    >>> heat_map([torch.tensor([0.0, 1.5]), torch.tensor([0.7, 0.9])]).shape
    torch.Size([84, 140, 3])
    """
    heads = max(len(row) for row in rows)
    finite = [value for row in rows for value in row.tolist() if math.isfinite(value)]
    top = max(1, math.ceil(max(finite, default=1)))
    height = _MARGIN + len(rows) * _CELL + 2
    left = _MARGIN + heads * _CELL + 2  # of the scale
    image = _pixel(_WHITE).repeat(height, left + 2 * _CELL, 1)

    for y, row in enumerate(rows):
        _label(image, str(y), _MARGIN + y * _CELL + 9, 2)
        for x, value in enumerate(row.tolist()):
            below, right = _MARGIN + y * _CELL, _MARGIN + x * _CELL
            cell = image[below : below + _CELL - 1, right : right + _CELL - 1]
            cell[:] = _pixel(_colour(value, top))
    for x in range(heads):
        _label(image, str(x), 8, _MARGIN + x * _CELL + 6)
    for y in range(_MARGIN, height - 2):
        share = (height - 2 - y) / (height - 2 - _MARGIN)
        image[y, left + 4 : left + 16] = _pixel(_colour(share * top, top))
    _label(image, str(top), _MARGIN, left + 20)
    _label(image, "0", height - 13, left + 20)
    return image


def reliability_diagram(bins: Tensor) -> Tensor:
    """Draw accuracy over confidence, a bar a bin: `(height, width, 3)`, uint8.

    Perfect is the diagonal. What lies between the accuracy of a bin and its mean confidence is
    pink. Below, how many fall into each bin.

    Args:
        bins: `(bins, 5)` as `calibration_bins` gives them, on the CPU.

    >>> reliability_diagram(torch.ones(15, 5)).shape
    torch.Size([320, 274, 3])
    """
    wide = max(2, _PLOT // len(bins))
    size, left, top = wide * len(bins), _MARGIN, 8
    image = _pixel(_WHITE).repeat(top + _PLOT + 6 + _COUNTS + _MARGIN, left + size + 8, 1)
    plot = image[top : top + _PLOT, left : left + size]
    counts = image[top + _PLOT + 6 : top + _PLOT + 6 + _COUNTS, left : left + size]

    def line(share: float) -> int:
        return min(_PLOT - 1, round((1 - share) * _PLOT))

    for quarter in range(5):
        plot[line(quarter / 4)] = _pixel(_GREY)
    most = max(bins[:, 0].max().item(), 1.0)
    for x, (count, confidence, right, *_) in enumerate(bins.tolist()):
        if count:
            bar = plot[:, x * wide : (x + 1) * wide - 1]
            low, high = sorted((line(right / count), line(confidence / count)))
            bar[line(right / count) :] = _pixel(_BLUE)
            bar[low:high] = _pixel(_PINK)
            share = counts[_COUNTS - max(1, round(count / most * _COUNTS)) :]
            share[:, x * wide : (x + 1) * wide - 1] = _pixel(_INK)
    for x in range(size):
        plot[line((x + 0.5) / size), x] = _pixel(_INK)
    _label(image, "1", top, 8)
    _label(image, "0", top + _PLOT - 10, 8)
    _label(image, "0", image.shape[0] - 18, left)
    _label(image, "1", image.shape[0] - 18, left + size - 6)
    return image


def _pixel(colour: tuple[int, ...]) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8, device="cpu")  # the user may have set another


def _colour(value: float, top: float) -> tuple[int, ...]:
    if not math.isfinite(value):
        return _GREY
    if value < _COLLAPSED:
        return _RED
    at = min(value / top, 1.0) * (len(_RAMP) - 1)
    index = min(int(at), len(_RAMP) - 2)
    share = at - index
    low, high = _RAMP[index], _RAMP[index + 1]
    return tuple(round(a + share * (b - a)) for a, b in zip(low, high, strict=True))


def _label(image: Tensor, text: str, y: int, x: int) -> None:
    """Write digits with their upper left corner at (y, x); what does not fit is cut off."""
    for place, digit in enumerate(text):
        for line, octal in enumerate(_DIGITS[digit]):
            for column in range(3):
                if int(octal, 8) >> (2 - column) & 1:
                    down = y + line * _ZOOM
                    right = x + (place * 4 + column) * _ZOOM
                    image[down : down + _ZOOM, right : right + _ZOOM] = _pixel(_INK)
