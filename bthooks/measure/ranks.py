"""Ranks: what the ranks of a job measured of one step, put together. Pure, on the host.

Of a tensor that every rank has whole (DDP) there are as many copies as ranks; of one in parts
(FSDP2, tensor parallel) a copy is the parts of the ranks of a mesh. Two copies of one name are of
two tensors (local experts, slices of a pipeline that count from 0) where their own norms differ.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention
from .histograms import Histogram, merged
from .readings import Drawn, Readings
from .sharded import Part

_SAME, _ALIKE = 1e-6, 1e-3  # relative: norms of one tensor, of a gradient that was reduced


@dataclass
class Copy:
    """A copy of a tensor: by the index of each of its `count` parts, the first rank that has it."""

    count: int
    holders: dict[int, int] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The first one that has a part of it."""
        return self.holders[0] if self.count == 1 else min(self.holders.values())


class Series(NamedTuple):
    """A name, and what the tags of its series end with: "/rank<k>" where it stands for several."""

    name: str
    suffix: str = ""


class Job:
    """What the ranks measured of one step, by the tensors that their names stand for.

    Attributes:
        copies: the first copy of each tensor that is whole.
        partial: names of which no copy is.
        differing: names of copies of one tensor with different gradients, with two of the ranks.
        alone: ranks that have a tensor, or a part of one, of which there is one copy.
        is_reduced_late: whether copies differed at the end of the backward pass.
    """

    def __init__(self, by_rank: Mapping[int, Readings]) -> None:
        self.by_rank = by_rank
        self.copies: dict[Series, Copy] = {}
        self.partial: list[str] = []
        self.differing: dict[str, tuple[int, int]] = {}
        self.alone: set[int] = set()
        self.is_reduced_late = False
        self._alike: set[frozenset[int]] = set()  # ranks with a gradient that is the same
        # Of names that stand for several tensors: the suffixes by rank.
        self._suffixes: dict[str, dict[int, str]] = {}
        self._whole = {rank: Copy(1, {0: rank}) for rank in self.by_rank}
        tensors = {name: self._tensors(name) for name in self._settle_copies()}
        # Of what is all zeros or ones at first the norm tells nothing; other tensors may.
        apart = {
            frozenset((one[0].rank, other[0].rank))
            for found in tensors.values()
            for at, one in enumerate(found)
            for other in found[:at]
        }
        for name, found in tensors.items():
            self._settle(name, self._parted(name, found, apart))

    def _settle_copies(self) -> list[str]:
        """See to what is whole on each rank and the same on all, as nearly all is.

        Returns:
            the other names.
        """
        first: dict[str, int] = {}  # the rank
        shared: set[str] = set()
        others = dict.fromkeys(n for readings in self.by_rank.values() for n in readings.parts)
        for rank, readings in self.by_rank.items():
            norms, sizes = readings.norms, readings.sizes
            for name in norms | sizes if norms.keys() != sizes.keys() else norms:
                known = first.setdefault(name, rank)
                if known == rank or name in others:
                    continue
                shared.add(name)
                one = self.by_rank[known]
                if not (
                    _is_close(one.sizes.get(name), sizes.get(name), _SAME)
                    and _is_close(one.norms.get(name), norms.get(name), _ALIKE)
                ):
                    others[name] = None
                    continue
                before = one.norms_before_clip.get(name), readings.norms_before_clip.get(name)
                self.is_reduced_late |= not _is_close(*before, _ALIKE)
                if norms.get(name):
                    self._alike.add(frozenset((known, rank)))
        for name, rank in first.items():
            if name not in others:
                self.copies[Series(name)] = self._whole[rank]
                if name not in shared:
                    self.alone.add(rank)
        return [*others]

    def _tensors(self, name: str) -> list[list[Copy]]:
        """The copies of `name` that are whole, those of one tensor together."""
        copies: dict[tuple[int, ...], Copy] = {}
        for rank, readings in self.by_rank.items():
            part = readings.parts.get(name)
            if part is None and (name in readings.norms or name in readings.sizes):
                part = Part((rank,), 0, 1)
            if part is not None:
                copy = copies.setdefault(part.ranks, Copy(part.parts))
                copy.holders.setdefault(part.place, rank)
        whole = [copy for copy in copies.values() if len(copy.holders) == copy.count]
        if not whole:
            self.partial.append(name)
        return self._grouped(name, whole, "sizes", _SAME)

    def _parted(
        self, name: str, tensors: list[list[Copy]], apart: Collection[frozenset[int]]
    ) -> list[list[Copy]]:
        """The same, copies with different gradients parted if other tensors of their ranks are."""
        found: list[list[Copy]] = []
        for tensor in tensors:
            if len(tensor) == 1:
                found.append(tensor)
                continue
            groups = self._grouped(name, tensor, "norms", _ALIKE)
            first, *others = [group[0].rank for group in groups]
            pairs = {frozenset((first, other)) for other in others}
            # Where all gradients differ, those of copies may be reduced in the optimizer's step.
            if not pairs.isdisjoint(apart) or not pairs.isdisjoint(self._alike):
                found += groups
            else:
                found.append(tensor)
                if others:
                    self.differing[name] = first, others[0]
                    self.alone.update(copy.rank for copy in tensor)
        return found

    def _grouped(
        self, name: str, copies: list[Copy], of: str, tolerance: float
    ) -> list[list[Copy]]:
        """Those together whose norms are close."""
        if len(copies) == 1:  # nearly always
            return [copies]
        groups: list[tuple[float | None, list[Copy]]] = []
        for copy in copies:
            norm = self._norm(name, copy, of)
            for other, group in groups:
                if _is_close(norm, other, tolerance):
                    group.append(copy)
                    break
            else:
                groups.append((norm, [copy]))
        return [group for _, group in groups]

    def _settle(self, name: str, tensors: list[list[Copy]]) -> None:
        for tensor in tensors:
            ranks = [rank for copy in tensor for rank in copy.holders.values()]
            suffix = f"/rank{min(ranks)}" if len(tensors) > 1 else ""
            self.copies[Series(name, suffix)] = tensor[0]
            if suffix:
                self._suffixes.setdefault(name, {}).update(dict.fromkeys(ranks, suffix))
            if len(tensor) == 1:
                self.alone.update(ranks)

    def _norm(self, name: str, copy: Copy, of: str) -> float | None:
        """The norm of a whole; None where no rank has one, as of a gradient that is None."""
        if copy.count == 1:  # nearly always
            norm = getattr(self.by_rank[copy.rank], of).get(name)
            return None if norm is None or norm < 0 else float(norm)
        there = [getattr(self.by_rank[rank], of).get(name, -1.0) for rank in copy.holders.values()]
        known = [float(norm) for norm in there if not norm < 0]
        return math.hypot(*known) if known else None

    def norms(self, of: str) -> dict[Series, float]:
        """The norms of whole tensors: of what the field `of` of the readings holds."""
        if not any(getattr(readings, of) for readings in self.by_rank.values()):
            return {}
        found = {series: self._norm(series.name, copy, of) for series, copy in self.copies.items()}
        return {series: norm for series, norm in found.items() if norm is not None}

    def maps(self) -> tuple[dict[str, Tensor], list[str]]:
        """The accumulators of attention by path, and the paths of which a rank's heads are missing.

        Those of several ranks add up; heads that a rank alone has stand beside the others'.
        """
        found, missing = {}, []
        for series, ranks in self._by_path(lambda r: r.attention).items():
            rows: dict[int, Tensor] = {}
            count = 1
            for rank in ranks:
                readings = self.by_rank[rank]
                part = readings.heads.get(series.name, Part((), 0, 1))
                sums, count = readings.attention[series.name], part.parts
                at = part.place
                rows[at] = attention.merge(rows[at], sums) if at in rows else sums
            if len(rows) == count:
                blocks = [rows[at] for at in sorted(rows)]
                found["".join(series)] = blocks[0] if count == 1 else torch.cat(blocks, dim=1)
            else:
                missing.append("".join(series))
        return found, missing

    def histograms(self) -> dict[Drawn, Histogram]:
        """The histograms of whole tensors, and of what the ranks' forwards made."""
        found: dict[Drawn, Histogram] = {}
        groups = dict.fromkeys(d.group for r in self.by_rank.values() for d in r.histograms)
        for group in groups:

            def names(readings: Readings, group: str = group) -> list[str]:
                return [drawn.name for drawn in readings.histograms if drawn.group == group]

            for series, ranks in self._by_path(names).items():
                drawn = Drawn(group, series.name)
                if group == "uncertainty":
                    ranks = self.distinct(ranks)
                if group in ("parameters", "gradients"):
                    ranks = self._holders(series, group, ranks)
                parts = [self.by_rank[rank].histograms[drawn] for rank in ranks]
                if parts:
                    found[Drawn(group, "".join(series))] = merged(parts)
        return found

    def distinct(self, ranks: Collection[int]) -> list[int]:
        """Of the `ranks` those with other data: ranks that share the heads of a map share it."""
        shared = {r for r in ranks if any(part.place for part in self.by_rank[r].heads.values())}
        return [rank for rank in ranks if rank not in shared] or [*ranks]

    def _holders(self, series: Series, group: str, ranks: list[int]) -> list[int]:
        """Those of `ranks` that have one copy of a tensor between them; none if it is partial."""
        if series.name in self.partial:
            return []
        copy = self.copies.get(series)
        if copy is None:  # of what no optimizer holds no norms are known
            return ranks[:1]
        holders = [*copy.holders.values()]
        if group == "gradients":  # some may have none
            holders = [r for r in holders if r in ranks or series.name in self.by_rank[r].norms]
        return holders if all(rank in ranks for rank in holders) else []

    def _by_path(self, keys: Callable[[Readings], Iterable[str]]) -> dict[Series, list[int]]:
        """The ranks that measured something of each module or parameter."""
        found: dict[Series, list[int]] = {}
        for rank, readings in self.by_rank.items():
            for path in keys(readings):
                found.setdefault(Series(path, self.suffix(path, rank)), []).append(rank)
        return found

    def suffix(self, path: str, rank: int) -> str:
        """That of a module, or a parameter, on `rank`."""
        if not self._suffixes:  # nearly always
            return ""
        if path in self._suffixes:
            return self._suffixes[path].get(rank, "")
        start = "" if path == "root" else f"{path.partition('/')[0]}."
        under = (of for name, of in self._suffixes.items() if name.startswith(start))
        return next(under, {}).get(rank, "")


def _is_close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two norms are, or one is not known."""
    if a is None or b is None or a == b or (math.isnan(a) and math.isnan(b)):
        return True
    return math.isclose(a, b, rel_tol=tolerance)
