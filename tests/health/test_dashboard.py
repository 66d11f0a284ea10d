import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from transformers import BertConfig, BertModel

import bthooks

from ..conftest import read
from ..models import Transformer, batch


def charts(directory):
    """Title -> the regular expressions of its tags, as TensorBoard reads the layout of a run."""
    events = EventAccumulator(str(directory)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    ((title, found),) = [(category.title, category.chart) for category in layout.category]
    assert title == "Is this run healthy?"
    return {chart.title: list(chart.multiline.tag) for chart in found}


def shown(patterns, tags):
    """The tags in a chart; TensorBoard's server matches so."""
    return {tag for tag in tags for pattern in patterns if re.match(pattern, tag)}


@pytest.mark.parametrize("prefix", ["", "student"])
def test_a_run_has_one_layout_whose_charts_show_its_tags(prefix, tmp_path, backend):
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with (
        bthooks.make_writer(tmp_path, "run", backend=backend) as writer,
        bthooks.attach(model, writer, every=1, prefix=prefix) as handle,
    ):
        for step in range(3):
            loss = model.train()(batch(step)[0])["logits"].square().mean()
            loss.backward()
            for split in ("train", "val"):
                metrics = {"loss": loss, "accuracy": 0.5, "gloss": 0.0}
                bthooks.log_metrics(writer, metrics, handle.step, prefix=split)
            optimizer.step()
            model.eval()(batch(step)[0])
    found, tags = charts(tmp_path / "run"), read(tmp_path).scalars
    start = f"{prefix}/" if prefix else ""
    for title, expected in {
        "loss": {"train/loss", "val/loss"},
        "attention entropy": {
            f"{start}attention/{name}"
            for name in (
                *(f"entropy/blocks.{at}.attention" for at in range(2)),
                *(f"healthy_entropy/{end}" for end in ("low", "high")),
            )
        },
        "gradient norm, ": {
            f"{start}gradients/{name}" for name in ("total_norm", "total_norm_before_clip")
        },
        "learning rate": {f"{start}learning_rate/0"},
        "health": {tag for tag in tags if "health/" in tag and "val/" not in tag},
        "uncertainty": {
            *(f"{start}uncertainty/{kind}" for kind in ("epistemic", "aleatoric", "total")),
            *("train/accuracy", "val/accuracy"),
        },
    }.items():
        (patterns,) = [found[chart] for chart in found if chart.startswith(title)]
        assert shown(patterns, tags) == expected, title
    assert all(shown(patterns, tags) for patterns in found.values())


def test_of_what_a_run_has_not_there_is_no_chart(tmp_path):
    model = nn.Linear(2, 2)
    with bthooks.attach(model, tmp_path):
        model(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(model.parameters(), 1e-3).step()
    found = charts(tmp_path)
    assert not any("attention" in title or "uncertainty" in title for title in found)
    assert len(found) == 5


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 12), torch.randn(2, 8, 16)


def bert():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=32, num_hidden_layers=12, **sizes)
    return BertModel(config, add_pooling_layer=False), torch.ones(2, 8, dtype=torch.long)


@pytest.mark.parametrize("make", [encoder, bert])
def test_a_model_of_12_layers_has_fewer_than_400_scalars(make, tmp_path):
    model, x = make()
    with bthooks.attach(model, tmp_path):
        found = model(x)
        found = found if isinstance(found, torch.Tensor) else found.last_hidden_state
        found.square().mean().backward()
        torch.optim.SGD(model.parameters(), 1e-3).step()
    tags = read(tmp_path).scalars
    assert len([tag for tag in tags if tag.startswith("attention/entropy/")]) == 12
    assert len(tags) < 400
