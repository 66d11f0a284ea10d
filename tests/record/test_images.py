import math

import pytest
import torch

from bthooks import attach
from bthooks.record import images
from bthooks.record.images import heat_map, reliability_diagram

from ..conftest import BACKENDS, read
from ..models import Transformer, batch

CELL = images._CELL


def left(image, heads):
    """Where the first cell begins, behind the names."""
    return image.shape[1] - images._KEY - CELL * heads


def cell(image, layer, head, heads=3):
    """The colour in the middle of a cell."""
    x = left(image, heads) + CELL * head + CELL // 2
    return tuple(image[CELL * (layer + 1) + CELL // 2, x].tolist())


def is_written(part):
    return bool((part < 128).any())


def test_each_cell_has_the_colour_of_its_head():
    rows = {"a": [0.05, 2.0, 4.0], "b": [1.0, math.nan]}
    image = heat_map(rows, 0.1)
    assert image.dtype == torch.uint8
    assert cell(image, 0, 0) == (214, 39, 40), "collapsed"
    assert cell(heat_map(rows, 0.01), 0, 0) == (68, 5, 87), "not below that threshold"
    assert cell(image, 0, 1) == (33, 145, 140), "the middle of the scale of 4 nats"
    assert cell(image, 0, 2) == (253, 231, 37), "its top"
    assert cell(image, 1, 0) == (59, 82, 139)
    assert cell(image, 1, 1) == (225, 225, 225), "no value"
    assert cell(image, 1, 2) == (255, 255, 255), "no such head"


def test_layers_have_their_names_heads_their_numbers_and_colours_their_meaning():
    image = heat_map({"blocks.0.attn": [1.0] * 3, "blocks.1.attn": [1.0] * 3}, 0.1)
    for layer in range(2):
        rows = image[CELL * (layer + 1) : CELL * (layer + 2)]
        assert is_written(rows[:, : left(image, 3)]), layer
    assert not is_written(image[CELL * 3 :, : left(image, 3)])
    for head in range(3):
        start = left(image, 3) + CELL * head
        assert is_written(image[:CELL, start : start + CELL]), head
    key = image[:, -images._KEY :]
    for colour in (214, 39, 40), (225, 225, 225), images._RAMP[-1]:
        assert (key == torch.tensor(colour, dtype=torch.uint8)).all(-1).any(), colour
    assert is_written(key[:, 26:])


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("root", "root"),
        ("model.layers.11.self_attn", "model.layers.11.self_attn"),
        ("encoder.block.3.layer.0.SelfAttention", "encoder.block.3.layer.0.SelfAtte"),
        ("vision model.layers.2/1", "vision_model.layers.2/1"),
        ("x" * 50, "x" * 32),
        ("ab." * 30 + "c", "ab." * 10 + "ab"),
    ],
)
def test_a_long_name_keeps_the_number_of_its_layer(path, short):
    assert images._short(path) == short


def test_many_layers_and_heads_and_large_entropies_are_drawn():
    rows = {f"layers.{layer}": (torch.rand(120) * 12).tolist() for layer in range(100)}
    image = heat_map(rows, 0.1)
    assert image.shape[0] == CELL * 101 + 6
    assert 0 < left(image, 120) < 100
    assert cell(image, 99, 119, heads=120) != (255, 255, 255)


@pytest.mark.parametrize("bins", [1, 15, 300])
def test_a_diagram_has_its_axes_and_the_counts_below(bins):
    values = torch.tensor([[8.0, 6.0, 4.0, 0.0, 0.0]]).repeat(bins, 1)
    values[bins // 2 + 1 :] = 0
    image = reliability_diagram(values)
    x, bottom = images._LEFT, images._TOP + images._PLOT
    assert is_written(image[images._TOP :, :x])
    assert is_written(image[bottom + images._COUNTS + 8 :, x:])
    counts = image[bottom + 8 : bottom + 8 + images._COUNTS, x:]
    assert tuple(counts[0, 0].tolist()) == (60, 60, 60), "as many as in any other"
    assert bins == 1 or tuple(counts[-1, -20].tolist()) == (255, 255, 255), "none"


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
