"""Ranks: what goes from rank to rank, so that one of them writes for the whole job.

It goes through the store of the process group, by a connection of our own: no collective, so that
nothing that one rank does or omits holds another up.

| key | who sets it | what |
| --- | --- | --- |
| `bthooks/<slot>/<prefix>` | the writer | nonce, rank, whether it was given a writer object |
| `bthooks/<slot>/<prefix>/waiting` | all | how many have found none that writes, so far |
| `<nonce>/count`, `<nonce>/joined/<n>` | the n-th to announce itself | rank, first step |
| `<nonce>/<n>/<k>` | the same | its k-th `Mail` |
| `<nonce>/rank/<rank>` | a rank | that it has announced itself once |
| `<nonce>/copies` | the writer | the ranks whose parameters are copies of others' |
"""

import contextlib
import math
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from .. import job
from ..measure.histograms import compact
from ..measure.readings import Readings
from ..names import tag
from ..report import Ledger
from ..torch_private import default_group, own_store
from .mail import Mail, put, read, remove
from .others import Others

GRACE = 1.0  # seconds that the end of another attachment waits for one that writes
_PAUSE = 0.1  # between two questions whether there is one, at 0.1 ms
_HELD, _UNTAKEN = 16, 64  # messages kept while no rank writes, and before one that takes none
_NONE = b"-"  # instead of the claim of an attachment that has ended


class _Claim(NamedTuple):
    """The attachment that writes."""

    nonce: str
    rank: int
    has_writer: bool  # an object, that its rank was given


class Ranks:
    """The attachments of one prefix on all ranks, as the one on this rank sees them.

    Of several attachments of one prefix on a rank each has its `slot`: they are made in the same
    order on every rank. Rank 0 writes, unless others have a writer object and it has none: then the
    first of these.

    Attributes:
        writes: whether it is this rank, as far as is known.
        is_patient: whether it waits for those that have found none that writes.
    """

    def __init__(self, slot: int, prefix: str, has_writer: bool, ledger: Ledger) -> None:
        self.slot, self.rank, self.size, self.writes = slot, 0, 1, True
        self._key = f"bthooks/{slot}/{tag(prefix)}"
        self._has_writer, self._ledger = has_writer, ledger
        self._group: object = None
        self._store: Any = None
        self._claim: _Claim | None = None  # of this attachment, or of the one that it sends to
        self._others: Others | None = None  # where this rank writes
        self._held: deque[Mail] = deque()  # to be sent
        self._sent, self._lost = 0, 0
        self._number, self._is_known = 0, False  # of its announcement; whether there was any
        self.is_patient = True
        self._waits = False  # whether it has said that it has found none that writes
        self._asked = -math.inf  # when it was last asked for a rank that writes

    @property
    def are_several(self) -> bool:
        return self._store is not None

    @property
    def is_held_up(self) -> bool:
        """Whether something is kept for a rank that writes."""
        return bool(self._held)

    def look_first(self, step: int) -> None:
        """Be known to the others before anything is sent, if there is a process group by now."""
        if default_group() is not self._group:
            self.look(step)

    def look(self, step: int) -> None:
        """See which rank this is and which one writes; announce this one to it, from `step` on."""
        with self._guarded():
            group, former = default_group(), None
            if group is not None and group is not self._group:
                while self.take():
                    pass
                former, self._others = self._others, None
                self._group, self._claim, self._waits = group, None, False
                self.rank, self.size = job.rank(), job.size()
                self.writes = self.rank == 0
                self._store = own_store() if self.size > 1 else None
            while self._store is not None:
                found, claim = read(self._store, self._key), None
                if found not in (None, _NONE):
                    nonce, rank, has_writer = found.decode().split()
                    claim = _Claim(nonce, int(rank), has_writer == "True")
                self.writes = self._is_mine(claim)
                if self.writes:
                    is_known = self._others is not None and claim == self._claim
                    if not (is_known or self._publish(found)):
                        continue  # another was quicker
                    if former is not None and self._others is not None:
                        self._others.adopt(former)
                elif claim is None:
                    self._forget()
                    self._wait(True)
                elif claim != self._claim:
                    self._forget()
                    self._join(claim, step)
                    self._wait(False)
                return

    def _is_mine(self, claim: _Claim | None) -> bool:
        """Whether it is this rank that writes, where `claim` is what is claimed."""
        if claim is None or claim.rank == self.rank:
            return self._has_writer or self.rank == 0
        if self._has_writer:
            return not claim.has_writer or self.rank < claim.rank
        return self.rank == 0 and not claim.has_writer

    def _publish(self, found: bytes | None) -> bool:
        """Claim to write, in place of what was `found`; whether nothing else is there by now."""
        if self._others is None:
            self._claim = _Claim(uuid.uuid4().hex, self.rank, self._has_writer)
            self._others = Others(
                self._store, self._claim.nonce, self.rank, self.size, self._ledger
            )
        value = " ".join(map(str, self._claim or ()))
        expected = "" if found is None else found.decode()
        return bool(self._store.compare_set(self._key, expected, value) == value.encode())

    def _join(self, claim: _Claim, step: int) -> None:
        """Announce this rank; where an attachment before this one has, with what is sent first.

        For it is the former one's, as a rule, and ends.
        """
        once = f"{claim.nonce}/rank/{self.rank}"
        if self._held or not self._store.check([once]):
            self._store.set(once, "")
            self._number = self._store.add(f"{claim.nonce}/count", 1) - 1
            first = min((mail.step for mail in self._held if mail.step >= 0), default=step)
            self._store.set(f"{claim.nonce}/joined/{self._number}", f"{self.rank} {first}")
            self._claim, self._is_known = claim, True

    def _wait(self, waits: bool) -> None:
        """Say that this rank has found none that writes, or no longer waits for one.

        Ranks attach in any order, and the one that writes may have a single step: it waits for
        those that wait for it.
        """
        if waits != self._waits:
            self._waits = waits
            self._store.add(f"{self._key}/waiting", 1 if waits else -1)

    def _forget(self) -> None:
        """Leave the attachment that writes no more; what it has not taken is no one's."""
        if self._others is not None:
            self._others.end()
        elif self._claim is not None:
            for number in range(max(0, self._sent - _UNTAKEN), self._sent):
                remove(self._store, f"{self._claim.nonce}/{self._number}/{number}")
        self._claim, self._others, self._sent = None, None, 0

    def send(self, mail: Mail) -> None:
        """Send what was measured of a step; it is kept for a while where no rank writes."""
        self._held.append(mail)
        while len(self._held) > _HELD:
            self._held.popleft()
            self._lost += 1
        self.deliver(now=True)

    def deliver(self, now: bool = False) -> None:
        """Send what is kept, if there is a rank that takes it, of which it is not always asked."""
        if not self._held or (not now and time.monotonic() < self._asked + _PAUSE):
            return
        self._asked = time.monotonic()
        self.look(max(0, self._held[0].step))
        with self._guarded():
            while self._held and self._claim is not None and self._others is None:
                start = f"{self._claim.nonce}/{self._number}"
                if self._sent >= _UNTAKEN and self._store.check(
                    [f"{start}/{self._sent - _UNTAKEN}"]
                ):
                    return
                put(self._store, f"{start}/{self._sent}", self._lightened(self._held.popleft()))
                self._sent += 1

    def _lightened(self, mail: Mail) -> Mail:
        """Without what the one that writes has itself: of parameters that are copies."""
        readings, copies = mail.readings, f"{self._claim and self._claim.nonce}/copies"
        told = read(self._store, copies) if readings.histograms else None
        is_copy = told is not None and str(self.rank) in told.decode().split()
        kept = {
            drawn: compact(found)
            for drawn, found in readings.histograms.items()
            if not (is_copy and drawn.group in ("parameters", "gradients"))
            or drawn.name in readings.parts
        }
        return mail._replace(readings=replace(readings, histograms=kept))

    def take(self) -> bool:
        """Take what the others have sent, a message of each; whether there was any."""
        with self._guarded():
            return self._others is not None and self._others.take()
        return False

    def are_in(self, step: int, prefix: str, may_validate: bool) -> bool:
        """Whether all that announced themselves have sent what they measured of a step.

        Of a validation: if they are known to validate, or all that may, as where it is the last.
        """
        is_any = True
        while self._others is not None and is_any:
            is_any = self.take()  # in which those are met that are new
            if self._others is not None and self._others.are_in(step, prefix, may_validate):
                return not (self.is_patient and self._others.may_be_met(f"{self._key}/waiting"))
        return self._others is None

    def with_others(
        self, step: int, prefix: str, own: Readings
    ) -> tuple[dict[int, Readings], bool]:
        """What all ranks measured of a step that is written now; whether no total lacks any."""
        while self.take():
            pass
        if self._others is None:
            return {self.rank: own}, True
        others = self._others.of_step(step, prefix)
        self._others.say()
        # Its own first: of what is the same on several ranks the first one's is written.
        found = {self.rank: own} | dict(sorted(others.items()))
        return found, not self._others.lacks(found)

    def judged(self, ranks: set[int], alone: set[int]) -> None:
        """Of `ranks`, of which a step was written, some are `alone`, with tensors of their own."""
        with self._guarded():
            if self._others is not None:
                self._others.judged(ranks, alone)

    def resume(self, step: int) -> None:
        """Go on at `step`: what was sent and not written is of steps that are abandoned."""
        self._held.clear()
        with self._guarded():
            if self._others is not None:
                self._others.end()
                self._others = None
                self.look(step)

    def end(self) -> None:
        """This attachment ends."""
        if self._store is None:
            return
        with self._guarded():
            self._wait(False)
        if self.writes:
            with self._guarded():
                if self._others is not None:
                    self._store.set(self._key, _NONE)
                    self._others.end()
        else:
            self._held.append(Mail(-1, Readings()))
            is_late = len(self._held) > 1 and not self._is_known  # rank 0 may be about to attach
            until = time.monotonic() + GRACE * is_late
            self.deliver(now=True)
            while self._held and self._store is not None and time.monotonic() < until:
                time.sleep(0.02)
                self.deliver(now=True)
            lost = self._lost + len(self._held) - 1
            if self._held and lost:
                why = "the attachment that writes had ended"
                if not self._is_known:
                    why = "no rank has an attachment that writes, as rank 0 has"
                self._ledger.warn_once(
                    "ranks",
                    f"{lost} messages of what rank {self.rank} measured are not written: {why}",
                )
        self._store = self._others = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What fails inside ends the exchange: it is said, and each rank goes on alone."""
        try:
            yield
        except Exception as error:
            self._store = self._others = self._claim = None
            if self.writes or self._held:  # else it ends behind the one that had the server
                self._ledger.failed("ranks", error)
