"""Others: the other ranks, as the one that writes knows them: who they are and what they sent."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ..measure.readings import Readings
from ..report import Ledger
from .mail import Mail, remove, take


@dataclass
class _Other:
    """Another rank."""

    first: int  # step, when it announced itself
    taken: int = 0  # messages
    reached: int = -1  # the last step of which it sent all
    is_over: bool = False  # its attachment
    validates: bool = False
    is_alone: bool = False  # it has tensors of which there is no copy

    def owes(self, step: int) -> bool:
        """Whether what it measured of a training step is still to come."""
        return not self.is_over and self.first <= step and self.reached < step


@dataclass
class _Without:
    """The training steps that were written without some ranks."""

    first: int
    last: int = -1
    count: int = 0
    ranks: set[int] = field(default_factory=set)


class Others:
    """The mail of those that announced themselves under the `nonce` of an attachment."""

    def __init__(self, store: Any, nonce: str, rank: int, size: int, ledger: Ledger) -> None:
        self._store, self._nonce, self._ledger = store, nonce, ledger
        self._rank, self._size = rank, size
        self._known: dict[int, _Other] = {}  # by rank, in the order of their announcements
        self._boxes: dict[tuple[int, str], dict[int, Readings]] = {}  # by step and prefix
        self._written: dict[str, int] = {}  # by prefix, the last step
        self._are_copies_told = False
        self._without: dict[str, _Without] = {}  # by reason

    def take(self) -> bool:
        """Take the next message of each rank that has sent one; whether any has."""
        self._meet()
        known = {rank: other for rank, other in self._known.items() if not other.is_over}
        keys = {rank: f"{self._nonce}/{rank}/{other.taken}" for rank, other in known.items()}
        if not keys:
            return False
        are_there = self._store.check([*keys.values()])  # one question, nearly always
        there = [rank for rank, key in keys.items() if are_there or self._store.check([key])]
        for rank in there:
            known[rank].taken += 1
            self._put(rank, known[rank], take(self._store, keys[rank]))
        return bool(there)

    def _meet(self) -> None:
        """Get to know those that have announced themselves."""
        met = len(self._known)
        if met == self._size - 1:
            return
        for number in range(met, self._store.add(f"{self._nonce}/count", 0)):
            key = f"{self._nonce}/joined/{number}"
            if not self._store.check([key]):
                break
            rank, first = map(int, self._store.get(key).split())
            self._known[rank] = _Other(first)

    def _put(self, rank: int, other: _Other, mail: Mail) -> None:
        if mail.step < 0:
            other.is_over = True
            return
        if mail.prefix:
            other.validates = True
        elif mail.is_over:
            other.reached = max(other.reached, mail.step)
        if mail.step >= self._written.get(mail.prefix, 0):
            box = self._boxes.setdefault((mail.step, mail.prefix), {})
            box.setdefault(rank, Readings()).merge(mail.readings)

    def are_in(self, step: int, prefix: str) -> bool:
        """Whether all have sent what they measured of a step; one that never validates need not."""
        box = self._boxes.get((step, prefix), {})
        if prefix:
            late = (rank for rank, other in self._known.items() if other.validates)
            return all(rank in box or not self._known[rank].owes(step + 1) for rank in late)
        return not any(other.owes(step) for other in self._known.values())

    def of_step(self, step: int, prefix: str) -> dict[int, Readings]:
        """What they sent of a step that is written now; what comes later of it is not."""
        found = self._boxes.get((step, prefix), {})
        self._boxes = {
            at: box for at, box in self._boxes.items() if at[0] > step or at[1] != prefix
        }
        is_new = self._written.get(prefix, -1) < step
        self._written[prefix] = step
        if is_new and not prefix:
            self._miss(step, found)
        return found

    def _miss(self, step: int, found: Collection[int]) -> None:
        """Say which ranks a training step is written without."""
        for rank in sorted({*range(self._size)} - {self._rank, *found}):
            other = self._known.get(rank)
            if other is None or other.first > step:
                why = "not attached"
            elif other.reached > step:
                why = "that log other steps"
            elif other.is_over:
                why = "detached before"
            else:
                why = "from which nothing came"
            without = self._without.setdefault(why, _Without(step))
            without.count += without.last < step or not without.ranks
            without.last = step
            without.ranks.add(rank)

    def say(self, is_end: bool = False) -> None:
        """Say, once for each reason, which ranks the steps that were written are without."""
        for why, without in self._without.items():
            ranks, first, last, count = without.ranks, without.first, without.last, without.count
            # At the first step others may be on their way to `attach`.
            if why == "not attached" and count == 1 and not is_end:
                continue
            which = ", ".join(map(str, sorted(ranks)[:8])) + ", ..." * (len(ranks) > 8)
            steps = f"step {first}" if count == 1 else f"{count} steps from {first} to {last}"
            said = (
                f"{which} of {self._size}: written without, {steps}: means are those of the other "
                "ranks, and what would be partial is left out"
            )
            self._ledger.warn_once(f"ranks {why}", said)
            self._ledger.note(f"ranks {why}", said)

    def lacks(self, ranks: Collection[int]) -> bool:
        """Whether tensors of their own are missing if what is there is that of `ranks`."""
        return any(other.is_alone for rank, other in self._known.items() if rank not in ranks)

    def judged(self, ranks: Collection[int], alone: Collection[int]) -> None:
        """Of `ranks`, of which a step was written, some are `alone`, with tensors of their own."""
        for rank in self._known.keys() & ranks:
            self._known[rank].is_alone = rank in alone
        copies = sorted((self._known.keys() & ranks) - {*alone})
        if copies and not self._are_copies_told:
            self._are_copies_told = True
            self._store.set(f"{self._nonce}/copies", " ".join(map(str, copies)))

    def end(self) -> None:
        """Take away all that is in the store under the nonce."""
        self.say(is_end=True)
        self._meet()
        for rank, other in self._known.items():
            while remove(self._store, f"{self._nonce}/{rank}/{other.taken}"):
                other.taken += 1
        for number, rank in enumerate(self._known):
            self._store.delete_key(f"{self._nonce}/joined/{number}")
            self._store.delete_key(f"{self._nonce}/rank/{rank}")
        for name in ("count", "copies"):
            self._store.delete_key(f"{self._nonce}/{name}")
