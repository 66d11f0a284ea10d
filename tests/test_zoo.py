import contextlib
import functools

import pytest
import torch
import transformers

from bthooks import attach

from . import zoo
from .conftest import read

CONTEXTS = {"train": contextlib.nullcontext, "eval": torch.no_grad, "infer": torch.inference_mode}


@functools.cache
def implementations(name):
    """The model's implementations of attention that run on the CPU."""
    configuration = getattr(transformers, f"{name}Config")(**zoo.ZOO[name])
    kind = transformers.AutoModel._model_mapping[type(configuration)]
    return ("eager", "sdpa") if kind._supports_sdpa else ("eager",)


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
    with CONTEXTS[context]():
        plain = model(**batch)[0]
        state = torch.get_rng_state()
        with attach(model, tmp_path, every=1, attention_rows=None, on_error="raise"):
            seen = model(**batch)[0]
    assert torch.equal(seen, plain)
    assert torch.equal(torch.get_rng_state(), state)
    start = "attention/entropy/" if context == "train" else "val/attention/entropy/"
    run = read(tmp_path)
    found = [points[0][1] for tag, points in run.scalars.items() if tag.startswith(start)]
    assert found == pytest.approx(truth, abs=1e-4)
