"""bthooks: true attention, gradient and uncertainty numbers from an unmodified PyTorch model."""

from .alerts import Alert
from .attach import attach
from .attention import attention_stats
from .calibration import calibration_bins, calibration_of, calibration_stats
from .conditions import Thresholds
from .dropout import mc_dropout
from .gradients import gradient_norms
from .handle import Handle
from .histograms import Histogram, histogram
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
from .report import Report
from .uncertainty import decompose_uncertainty
from .writers import Writer, make_writer

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
