"""bthooks: true attention, gradient and uncertainty numbers from an unmodified PyTorch model."""

from .attach import attach
from .handle import Handle
from .health.alerts import Alert
from .health.conditions import Thresholds
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
