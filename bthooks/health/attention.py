"""Attention: heads that look at one key alone, scores that grow, queries that see nothing."""

import math
from dataclasses import dataclass, field

from ..measure.attention import Head
from ..measure.figures import Figures
from .findings import Finding, Judge, below, of_ranks
from .thresholds import Thresholds

_RESTS = 0.9  # of the weight, on one key where a healthy head may have it


@dataclass
class Attention(Judge):
    """What is wrong with the attention maps of a run."""

    first_logits: dict[str, float] = field(default_factory=dict)  # by module, of its first step

    def logits(self, figures: Figures, limits: Thresholds) -> list[Finding]:
        """Scores that are large, and twice those of the first step."""
        found = []
        for path, statistics in figures.attention.items():
            if (logit := statistics.get("max_logit")) is not None:
                first = self.first_logits.setdefault(path, logit)
                growth = logit / first if first > 0 else math.inf
                severity = min(logit / limits.logit, growth / 2)
                found.append(Finding(path, severity, f"its largest score is {logit:.3g}"))
        return found


def collapse(figures: Figures, limits: Thresholds) -> list[Finding]:
    """Heads that see enough keys, look at one alone, and whose scores are out of all proportion.

    A low entropy alone is none: heads that find the one marked token have it, those of Voita et
    al. (2019) that look at the token before or behind, and those that rest on the first one (a
    sink, Xiao et al., 2023). Their scores stay below 51, collapsed ones reach 125 to 3e5.
    """
    return [
        Finding(
            path,
            _severity(head, limits),
            f"its entropy is {head.entropy:.2g} nats over {head.keys:.0f} keys"
            + (f", its largest score {head.logit:.3g}" if _is_known(head.logit) else ""),
            ", ".join(filter(None, (f"head {number}", part))),
        )
        for part, of_rank in of_ranks(figures)
        for path, heads in of_rank.heads.items()
        for number, head in heads.items()
        if head.keys > limits.keys
    ]


def _severity(head: Head, limits: Thresholds) -> float:
    if max(head.neighbour, head.sink) >= _RESTS:
        return 0.0
    low = below(limits.entropy, head.entropy)
    return min(low, head.logit / limits.logit) if _is_known(head.logit) else low


def _is_known(logit: float) -> bool:
    """Not of weights alone; nor where the scores of a row are shifted, by its largest one."""
    return math.isfinite(logit) and logit != 0


def dead_rows(figures: Figures, limits: Thresholds) -> list[Finding]:
    """Queries that see no key, more than any intended mask makes: as where it is inverted.

    Under a mask of the keys that is inverted, samples without padding have no key, and no sample
    has the first one: so are those told from samples that are empty.
    """
    found = []
    for path, statistics in figures.attention.items():
        if (share := statistics.get("dead_rows")) is not None:
            severity = share / limits.dead_rows
            if statistics.get("sink") == 0:
                empty = statistics.get("dead_samples", 0.0) / limits.dead_samples
                severity = max(severity, empty)
            message = f"{share:.0%} of its queries see no key: is its mask inverted?"
            found.append(Finding(path, severity, message))
    return found
