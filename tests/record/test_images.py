import math

import torch

from bthooks import attach
from bthooks.record.images import heat_map

from ..conftest import BACKENDS, read
from ..models import Transformer, batch


def cell(image, layer, head):
    """The colour in the middle of a cell."""
    return tuple(image[26 + 28 * layer + 14, 26 + 28 * head + 14].tolist())


def test_each_cell_has_the_colour_of_its_head():
    rows = [torch.tensor([0.05, 2.0, 4.0]), torch.tensor([1.0, math.nan])]
    image = heat_map(rows)
    assert image.dtype == torch.uint8
    assert cell(image, 0, 0) == (214, 39, 40), "collapsed"
    assert cell(image, 0, 1) == (33, 145, 140), "the middle of the scale of 4 nats"
    assert cell(image, 0, 2) == (253, 231, 37), "its top"
    assert cell(image, 1, 0) == (59, 82, 139)
    assert cell(image, 1, 1) == (225, 225, 225), "no value"
    assert cell(image, 1, 2) == (255, 255, 255), "no such head"


def test_many_layers_and_heads_and_large_entropies_are_drawn():
    image = heat_map([torch.rand(120) * 12 for _ in range(100)])
    assert image.shape == (26 + 28 * 100 + 2, 26 + 28 * 120 + 2 + 56, 3)


def test_a_run_has_its_heat_map_at_the_cadence_of_histograms(tmp_path):
    for backend in BACKENDS:
        torch.manual_seed(0)
        model = Transformer()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model, tmp_path / backend, backend=backend, every=1, histograms_every=2):
            for step in range(3):
                model(batch(step)[0])["logits"].sum().backward()
                optimizer.step()
    found = [read(tmp_path / backend).images for backend in BACKENDS]
    assert found[0] == found[1]
    assert [step for step, _ in found[0]["attention/head_entropy"]] == [0, 2]
