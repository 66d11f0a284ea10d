"""The C++ fast paths of torch.nn stay on, and what they attend to is measured."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bthooks import attach

from ..conftest import read
from ..models import entropy


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


PADDING = torch.zeros(2, 6, dtype=torch.bool)
PADDING[1, 4:] = True
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": CAUSAL},
    "float": {"mask": torch.zeros(6, 6).masked_fill(CAUSAL, -torch.inf)},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDING},
}


def encoder(norm_first, nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    with torch.no_grad():
        for part in model.layers:
            part.self_attn.in_proj_weight.mul_(4)
            part.self_attn.in_proj_bias.normal_()
            part.norm1.weight.normal_(1, 0.3)
    return model


@torch.no_grad()
def truth(model, x, mask=None, src_key_padding_mask=None, drop_padding=False):
    """The entropies by layer, from the weights that each layer's attention returns."""
    entropies = {}
    for index, layer in enumerate(model.layers):
        seen = layer.norm1(x) if layer.norm_first else x
        q, k, _ = nn.functional.linear(
            seen, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        ).chunk(3, -1)
        q, k = (part.unflatten(-1, (4, 4)).transpose(1, 2).double() for part in (q, k))
        scores = q @ k.mT / 2
        if mask is not None:
            hidden = mask if mask.dtype == torch.bool else mask.isinf()
            scores = scores.masked_fill(hidden, -torch.inf)
        if src_key_padding_mask is not None:
            scores = scores.masked_fill(src_key_padding_mask[:, None, None], -torch.inf)
        rows = torch.special.entr(scores.softmax(-1)).sum(-1)  # (B, H, L)
        if drop_padding:
            rows = rows.transpose(1, 2)[~src_key_padding_mask]
        entropies[f"layers.{index}.self_attn"] = rows.mean().item()
        layer.train().self_attn.dropout = 0.0
        for module in layer.modules():
            module.p = 0.0
        x = layer(x, mask, src_key_padding_mask)
        layer.eval()
    return entropies


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_an_encoder_in_eval(mask, norm_first, context, tmp_path):
    model, x = encoder(norm_first, nested=not norm_first), torch.randn(2, 6, 16) * 2
    with context():
        with Operators() as plain:
            expected = model(x, **MASKS[mask])
        with attach(model, tmp_path, every=1, on_error="raise"), Operators() as attached:
            output = model(x, **MASKS[mask])
    assert "_transformer_encoder_layer_fwd" in plain.names
    assert attached.names == plain.names
    assert torch.equal(output, expected)
    found = read(tmp_path).group("val/attention/entropy/", 0)
    nested = mask == "padding" and not norm_first
    assert found == pytest.approx(truth(model, x, **MASKS[mask], drop_padding=nested), abs=1e-4)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_in_eval(need_weights, tmp_path):
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    model, x = nn.ModuleDict({"attention": attention}).eval(), torch.randn(2, 6, 16) * 4
    model.forward = lambda x: attention(
        x, x, x, key_padding_mask=PADDING, need_weights=need_weights, average_attn_weights=False
    )
    with torch.no_grad():
        with Operators() as plain:
            expected = model(x)
        with attach(model, tmp_path, every=1, on_error="raise"):
            output = model(x)
    assert "_native_multi_head_attention" in plain.names
    assert torch.equal(output[0], expected[0])
    attention.in_proj_weight.requires_grad_(True)
    weights = attention(x, x, x, key_padding_mask=PADDING, average_attn_weights=False)[1]
    assert read(tmp_path).group("val/attention/entropy/", 0) == pytest.approx(
        {"attention": entropy(weights.double())}, abs=1e-4
    )


def test_a_root_that_is_such_a_layer_keeps_its_fast_path(tmp_path):
    model, x = encoder(False, True).layers[0], torch.randn(2, 6, 16)
    with torch.no_grad():
        expected = model(x)
        with attach(model, tmp_path, every=1, on_error="raise"), Operators() as attached:
            output = model(x)
        with pytest.warns(UserWarning, match="replaces the former"):
            attach(model, None), attach(model, None).detach()
    assert attached.names == ["_transformer_encoder_layer_fwd"]
    assert torch.equal(output, expected)
    assert read(tmp_path).group("val/attention/entropy/", 0).keys() == {"self_attn"}
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_training_and_eval_have_one_name(tmp_path):
    model, x = encoder(False, True), torch.randn(2, 6, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(model, tmp_path, every=1):
        model.train()
        model(x).sum().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad(), contextlib.nullcontext():
            model(x)
    run = read(tmp_path)
    names = {"layers.0.self_attn", "layers.1.self_attn"}
    assert run.group("attention/entropy/", 0).keys() == names
    assert run.group("val/attention/entropy/", 0).keys() == names
