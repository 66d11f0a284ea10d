"""Calibration: whether a model is right as often as it says. Pure.

An error of calibration is not the mean of those of its batches, so each batch gives sums per bin of
confidence, `(bins, 5)`: added over batches and ranks they give the statistics of them all.
"""

import math

import torch
from torch import Tensor

from .. import checks
from .dtypes import widened, widest

BINS = 15
_LEAST = torch.finfo(torch.float64).eps  # the least probability in a log, as in scikit-learn


def calibration_stats(
    probabilities: Tensor, targets: Tensor, bins: int = BINS
) -> dict[str, Tensor]:
    """How well the probabilities fit what is true, as 0-d tensors.

    Args:
        probabilities: `(batch, classes)`, or with further dimensions between; not logits.
        targets: `(batch)`, class indices; rows whose target is no class, as -100 for padding, are
            left out.
        bins: how many, of equal width: [0, 1/bins) to [1 - 1/bins, 1]; empty ones are left out.

    | name | what |
    | --- | --- |
    | `ece` | expected calibration error: abs(accuracy - confidence), mean of the bins by count |
    | `mce` | maximum calibration error: that of the worst bin |
    | `brier` | mean of the squared distance to the true class, 0 to 2 |
    | `nll` | nats: mean of -log p(true class) |
    | `accuracy`, `confidence` | fraction that is right; mean probability of the predicted class |
    | `gap` | confidence - accuracy: above 0 is over-confident |

    Naeini et al. (2015) have the first two, Brier (1950) the third.

    >>> stats = calibration_stats(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
    >>> round(stats["ece"].item(), 4), round(stats["gap"].item(), 4)
    (0.4, 0.3)

    Raises:
        ValueError: other shapes, or `bins` is no whole number from 1.
        TypeError: probabilities are no tensor of floats, or targets none of whole numbers.
    """
    return calibration_of(calibration_bins(probabilities, targets, bins))


@torch.no_grad()
def calibration_bins(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """The sums that `calibration_of` takes: `(bins, 5)`, float64 (float32 on mps).

    They merge by adding: over the batches of a validation set, over ranks by one `all_reduce`.
    Their columns: count, sum of confidences, right ones, sum of Brier scores, sum of -log p.

    >>> p, targets = torch.rand(100, 10).softmax(-1), torch.randint(10, (100,))
    >>> halves = calibration_bins(p[:50], targets[:50]) + calibration_bins(p[50:], targets[50:])
    >>> torch.allclose(halves, calibration_bins(p, targets))
    True
    """
    checks.classes("calibration", probabilities, targets)
    checks.whole("calibration", "bins", bins, 1)
    wide = widest(probabilities.device)
    p = probabilities.detach().flatten(0, -2).to(wide)  # (N, C)
    target = targets.detach().flatten().to(p.device, torch.int64)[:, None]
    confidence, predicted = p.max(-1)
    counts = ((target >= 0) & (target < p.shape[1])).to(wide)  # (N, 1)
    true = p.gather(-1, target.clamp(0, p.shape[1] - 1))[:, 0]
    brier = p.square().sum(-1) - 2 * true + 1
    right = (predicted == target[:, 0]).to(wide)
    columns = (torch.ones_like(true), confidence, right, brier, -true.clamp(min=_LEAST).log())
    # In the type of the confidences: 0.2 in float32 is not below the edge 0.2. linspace is: of 15
    # bins it puts six edges beside the nearest float32.
    edges = torch.arange(bins + 1, dtype=wide, device=p.device) / bins
    edges = edges.to(widened(probabilities.dtype)).to(wide)
    index = torch.bucketize(confidence, edges, right=True).sub(1).clamp(0, bins - 1)
    return torch.zeros(bins, 5, dtype=wide, device=p.device).index_add_(
        0, index, torch.stack(columns, dim=1) * counts
    )


@torch.no_grad()
def calibration_of(bins: Tensor) -> dict[str, Tensor]:
    """The statistics of merged bins, as `calibration_stats` names them.

    >>> torch.isnan(calibration_of(torch.zeros(15, 5))["ece"])  # of nothing
    tensor(True)
    """
    count, confidence, right, brier, nll = bins.unbind(1)
    n = count.sum()
    gaps = (confidence - right).abs()
    accuracy, mean = right.sum() / n, confidence.sum() / n
    return {
        "ece": gaps.sum() / n,
        "mce": torch.where(count > 0, gaps / count, 0).amax() + 0 / n,
        "brier": brier.sum() / n,
        "nll": nll.sum() / n,
        "accuracy": accuracy,
        "confidence": mean,
        "gap": mean - accuracy,
    }


@torch.no_grad()
def error_by_chance(bins: Tensor) -> Tensor:
    """The `ece` that chance alone may give a model that is right as often as it says, 0-d.

    Over 32 samples that is 0.2 on average. How many of a bin are right is close to a normal
    variable around what the bin says: this is the mean of the distance and two deviations.
    """
    count, confidence, *_ = bins.unbind(1)
    mean = (confidence / count.clamp(min=1)).clamp(0, 1)
    variance, share = mean * (1 - mean) * count, 2 / math.pi  # of a half-normal's mean squared
    expected = (share * variance).sqrt().sum()
    return (expected + 2 * ((1 - share) * variance.sum()).sqrt()) / count.sum()


@torch.no_grad()
def ranking_stats(uncertainty: Tensor, probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Whether the model is unsure where it is wrong, as `log_calibration` takes and names it.

    `auroc` is the probability that a wrong one is less sure than a right one, NaN where all are
    right or all wrong; `aurc`, of Geifman and El-Yaniv (2017), the error rate of the k surest, mean
    over all k. Ties count half, and share their mean rank and risk.
    """
    p = probabilities.detach().flatten(0, -2)
    wide = widest(p.device)
    target = targets.detach().flatten().to(p.device, torch.int64)[:, None]
    u = uncertainty.detach().flatten().to(p.device, wide)
    wrong = (p.argmax(-1) != target[:, 0]).to(wide)
    rank, low, high = _ranks(u)
    many, n = wrong.sum(), len(u)
    auroc = ((rank * wrong).sum() - many * (many + 1) / 2) / (many * (n - many))
    error, _, _ = _ranks(-p.gather(-1, target)[:, 0].to(wide))
    x, y = rank - rank.mean(), error - error.mean()
    spearman = (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
    # Within a tie every order is as likely: each has the error rate of all.
    order = u.argsort()
    summed = torch.nn.functional.pad(wrong[order].cumsum(0), (1, 0))
    low, high = low[order], high[order]
    shared = (summed[high] - summed[low]) / (high - low)
    risk = shared.cumsum(0) / torch.arange(1, n + 1, dtype=wide, device=p.device)
    return {"auroc": auroc, "spearman": spearman, "aurc": risk.mean()}


def _ranks(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks from 1, ties sharing their mean; the first and one past the last place of each."""
    ordered = values.sort().values
    low = torch.searchsorted(ordered, values)
    high = torch.searchsorted(ordered, values, right=True)
    return (low + high + 1).to(values.dtype) / 2, low, high
