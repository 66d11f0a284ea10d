import contextlib
import functools

import pytest
import torch
import transformers
from packaging.version import Version

from bthooks import attach

from . import zoo
from .conftest import read

CONTEXTS = {"train": contextlib.nullcontext, "eval": torch.no_grad, "infer": torch.inference_mode}


@functools.cache
def implementations(name):
    """The model's implementations of attention that run on the CPU."""
    configuration = getattr(transformers, f"{name}Config")(**zoo.ZOO[name])
    kind = transformers.AutoModel._model_mapping[type(configuration)]
    if name == "Gemma2" and Version(transformers.__version__) < Version("5.21"):
        return ("eager",)  # until then its sdpa left the softcap out
    return ("eager", "sdpa") if kind._supports_sdpa else ("eager",)


def gradients(model, output):
    """The gradient of each parameter, if there are any."""
    if not output.requires_grad:
        return {}
    model.zero_grad()
    output.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_unchanged(model, run, context, tmp_path):
    """Hold output, gradients and RNG state of `run` against those under an attachment."""
    before = torch.get_rng_state()
    with CONTEXTS[context]():
        plain = run()
    state, expected = torch.get_rng_state(), gradients(model, plain)
    torch.set_rng_state(before)  # some draw even where nothing is dropped
    with attach(model, tmp_path, every=1, attention_rows=None, on_error="raise"):
        with CONTEXTS[context]():
            seen = run()
        assert torch.equal(torch.get_rng_state(), state)
        found = gradients(model, seen)
    assert torch.equal(seen, plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("name", "implementation"), [(n, i) for n in zoo.ZOO for i in implementations(n)]
)
def test_every_map_of_a_real_model_is_found_and_true(name, implementation, context, tmp_path):
    reference = zoo.build(name, "eager").train(context == "train")
    batch = zoo.inputs(reference)
    truth = zoo.entropies(reference, batch)
    assert min(truth) < 1.8, "attention is near uniform: a lost mask would not show"

    model = zoo.build(name, implementation).train(context == "train")
    assert_unchanged(model, lambda: model(**batch)[0], context, tmp_path)
    start = "attention/entropy/" if context == "train" else "val/attention/entropy/"
    run = read(tmp_path)
    found = [points[0][1] for tag, points in run.scalars.items() if tag.startswith(start)]
    assert found == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", zoo.TORCH)
def test_every_map_of_a_torch_model_is_found_and_true(name, context, tmp_path):
    model = zoo.build_torch(name)
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    truth = zoo.torch_entropies(model, x)
    assert min(truth) < 1.5, "attention is near uniform: a lost mask would not show"

    model.train(context == "train")
    assert_unchanged(model, lambda: model(x), context, tmp_path)
    start = "attention/entropy/" if context == "train" else "val/attention/entropy/"
    found = read(tmp_path).group(start, 0)
    assert list(found.values()) == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "T5"])
def test_generate_goes_on_as_without_us(name, tmp_path):
    configuration = getattr(transformers, f"{name}Config")(**zoo.ZOO[name])
    kind = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(configuration).eval()
    tokens = torch.randint(3, 99, (2, 6))
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": True, "pad_token_id": 2}

    def generate():
        torch.manual_seed(1)
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **arguments)

    plain = generate()
    state = torch.get_rng_state()
    with attach(model, tmp_path, every=1, on_error="raise") as handle:
        assert torch.equal(generate(), plain)
        assert torch.equal(torch.get_rng_state(), state)
    assert handle.report().captured["attention"]
    points = read(tmp_path).scalars["val/attention/mean_entropy"]
    assert [step for step, _ in points] == [0, 1, 2, 3, 4]
