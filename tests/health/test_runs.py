"""Healthy runs are silent over their length, broken ones are named at their place.

All of them, at their full length and with several seeds: `python -m tests.health.runs --seeds 3`.
"""

import warnings

import pytest

from .broken import BROKEN
from .healthy import HEALTHY
from .runs import EVERY, FAULT, SHORT, WHOLE, has_learnt, is_named, train

# Left to the script, as they take long; and what examples/broken_runs.py has.
LONG = {
    *("accumulated", "deep_transformer", "language_clipped", "zero_initialised_heads", "re_zero"),
    *("copy_the_one_before", "unused_pooler", "tiny_key_gradients", "padded_batches"),
    *("recurrent_clipped", "contrastive", "denoising", "noisy_labels", "q_learning"),
    *("large_targets_summed", "scaled_loss", "own_average", "physics_informed"),
}
IN_EXAMPLES = {
    *("exploding_head", "stuck_branch", "saturated_queries", "forgotten_scale", "shifted_keys"),
    *("log_of_negatives", "root_of_0", "deep_sigmoids", "normalised_each", "dead_relu"),
    *("rate_at_0", "over_confident", "detached_embedding", "a_head_that_came_too_late"),
}


@pytest.mark.parametrize("name", [name for name in HEALTHY if name not in LONG])
def test_a_healthy_run_learns_and_nothing_is_told_of_it(name):
    run = HEALTHY[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of schedulers
        told = train(run, EVERY, None if name in WHOLE else min(run.steps, SHORT))
    assert told.alerts == dict.fromkeys(EVERY, ())
    assert has_learnt(told), (told.start, told.end)


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in IN_EXAMPLES])
def test_a_broken_run_is_named_at_its_place(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = train(BROKEN[name].make(FAULT), (5,), 200)
    assert is_named(told.alerts[5], name, FAULT), told.alerts
