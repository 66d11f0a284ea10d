"""How the cost grows: with parameters, tensors, length and layers."""

from collections.abc import Iterator
from functools import partial

import torch

from .measures import Attention, attended, histogram_ways, read_norms
from .models import GPT, with_gradients
from .steps import NEVER, PLAIN, compared
from .timing import Row, row, side_by_side


def rows(quick: bool) -> Iterator[Row]:
    for millions in (0.1, 1, 10, 100)[: 3 if quick else 4]:
        model = with_gradients(100, round(millions * 1e4))
        flat = torch.cat([p.grad for p in model.parameters()])
        read = "one read of the bytes"
        found = side_by_side({"bthooks": partial(read_norms, model), read: flat.sum}, 5)
        yield from row(found, f"norms, {millions:g} M in 100 tensors", read)
        if millions < 100:
            found = side_by_side(histogram_ways(model), 2, least=0)
            work = f"histograms, {millions:g} M in 100 tensors, twice"
            yield from row(found, work, "torch add_histogram")
    for tensors in (10, 100, 500, 2000):
        model = with_gradients(tensors, 1000)
        found = side_by_side(
            {
                "bthooks": partial(read_norms, model),
                ".item() loop": lambda m=model: [p.grad.norm().item() for p in m.parameters()],
            },
            10,
        )
        yield from row(found, f"norms, {tensors} tensors of 1 k", ".item() loop")
    for length in (128, 512, 2048, 8192)[: 3 if quick else 4]:
        x = torch.randn(1, length, 512)
        model = Attention()
        with torch.no_grad():
            ways = attended(Attention(), x) | {"plain forward": partial(model, x)}
            found = side_by_side(ways, 5)
        for taken in ("128 rows", "all rows"):
            yield from row(found, f"attention, L = {length}, {taken}", "plain forward", ours=taken)
    for layers in (2, 8, 24, 48)[: 2 if quick else 4]:
        model = GPT(layers=layers, width=256, heads=4, tokens=256, length=128)
        found = compared(model, (4, 128), 5, every=1, histograms_every=NEVER)
        yield from row(found, f"a logged step, {layers} layers of 256, 4 x 128", PLAIN)
