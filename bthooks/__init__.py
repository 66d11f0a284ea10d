"""bthooks: true attention, gradient and uncertainty numbers from an unmodified PyTorch model.

The map of the house; numbers run from the top to the bottom, and each file says why it is so:

    attach.py -> handle.py            the one call, and what the user holds
    wiring.py, schedule.py            when: torch's callbacks; which step it is, what is logged
    capture/    sees                  attention, softmax, fused, operators (names); gradients,
                                      optimizers, updates; forward, nonfinite
    measure/    computes              the same nouns: pure functions of tensors; readings (of a
                                      step, on the device), figures (on the host, by name)
    health/     judges                the same nouns, and loss, rates, unlearned, calibration:
                                      figures in, findings out; conditions (all of them),
                                      thresholds, alerts (each told once), dashboard
    record/     writes                recorder, turns (one write at a time), transfer (device ->
                                      host), event (names -> tags), folders, writers, images,
                                      backend (all that differs between the two)
    log.py                            the functions for scripts
    runs.py, __main__.py              event files read back; python -m bthooks
    names, checks, report, torch_private   the ground, which imports nothing of ours

Imports follow the data (tests/test_house.py). A private name of torch is in torch_private.py alone.
"""

from .attach import attach
from .handle import Handle
from .health.alerts import Alert
from .health.thresholds import Thresholds
from .log import (
    log_activations,
    log_attention_stats,
    log_calibration,
    log_gradients,
    log_hparams,
    log_learning_rate,
    log_metrics,
    log_model_histograms,
    log_text,
    log_uncertainty_metrics,
)
from .measure.attention import attention_stats
from .measure.calibration import calibration_bins, calibration_of, calibration_stats
from .measure.gradients import gradient_norms
from .measure.histograms import Histogram, histogram
from .measure.uncertainty import decompose_uncertainty, mc_dropout
from .record.writers import Writer, make_writer
from .report import Report

__all__ = [
    "Alert",
    "Handle",
    "Histogram",
    "Report",
    "Thresholds",
    "Writer",
    "attach",
    "attention_stats",
    "calibration_bins",
    "calibration_of",
    "calibration_stats",
    "decompose_uncertainty",
    "gradient_norms",
    "histogram",
    "log_activations",
    "log_attention_stats",
    "log_calibration",
    "log_gradients",
    "log_hparams",
    "log_learning_rate",
    "log_metrics",
    "log_model_histograms",
    "log_text",
    "log_uncertainty_metrics",
    "make_writer",
    "mc_dropout",
]
