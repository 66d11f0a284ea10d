"""Others: the other ranks, as the one that writes knows them: who they are and what they sent."""

from collections.abc import Collection, Set
from dataclasses import dataclass, field
from typing import Any

from ..measure.readings import Readings
from ..report import Ledger
from .mail import Mail, read, remove, take


@dataclass
class _Other:
    """Another rank."""

    number: int  # in the order of the announcements
    first: int  # step, when it announced itself
    taken: int = 0  # messages
    reached: dict[str, int] = field(default_factory=dict)  # by prefix: the last step that is over
    is_over: bool = False  # its attachment
    validates: bool = False
    is_alone: bool = False  # it has tensors of which there is no copy

    def owes(self, step: int, prefix: str, may_validate: bool = False) -> bool:
        """Whether what it measured of a step is still to come.

        Of a validation if it trains no further, and is known to validate or `may_validate`.
        """
        if self.is_over or self.first > step or self.reached.get(prefix, -1) >= step:
            return False
        trains_on = self.reached.get("", -1) > step
        return not prefix or ((self.validates or may_validate) and not trains_on)


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
        self._known: dict[int, _Other] = {}  # by rank
        self._met = 0  # how many announcements
        self.boxes: dict[tuple[int, str], dict[int, Readings]] = {}  # by step and prefix
        self.written: dict[str, int] = {}  # by prefix, the last step
        self._copies: Set[int] = frozenset()  # ranks whose parameters are copies of others'
        self.without: dict[str, _Without] = {}  # by reason

    def take(self) -> bool:
        """Take the next message of each rank that has sent one; whether any has."""
        self._meet()
        known = {rank: other for rank, other in self._known.items() if not other.is_over}
        keys = {r: f"{self._nonce}/{other.number}/{other.taken}" for r, other in known.items()}
        if not keys:
            return False
        are_there = self._store.check([*keys.values()])  # one question, nearly always
        there = [rank for rank, key in keys.items() if are_there or self._store.check([key])]
        for rank in there:
            known[rank].taken += 1
            if (mail := take(self._store, keys[rank])) is not None:
                self._put(rank, known[rank], mail)
        return bool(there)

    def _meet(self) -> None:
        """Get to know those that have announced themselves."""
        for number in range(self._met, self._store.add(f"{self._nonce}/count", 0)):
            if (found := read(self._store, f"{self._nonce}/joined/{number}")) is None:
                break
            rank, first = map(int, found.split())
            self._known[rank] = _Other(number, first)  # again, if its attachment is another
            self._met = number + 1

    def _put(self, rank: int, other: _Other, mail: Mail) -> None:
        if mail.step < 0:
            other.is_over = True
            return
        other.validates |= bool(mail.prefix)
        if mail.is_over:
            last = other.reached.get(mail.prefix, -1)
            other.reached[mail.prefix] = max(last, mail.step)
        if mail.step >= self.written.get(mail.prefix, 0):
            box = self.boxes.setdefault((mail.step, mail.prefix), {})
            box.setdefault(rank, Readings()).merge(mail.readings)

    def adopt(self, former: "Others") -> None:
        """Go on with what was sent by way of another process group, which has ended."""
        self.boxes, self.written, self.without = former.boxes, former.written, former.without

    def are_in(self, step: int, prefix: str, may_validate: bool) -> bool:
        """Whether all have sent what they measured of a step."""
        return not any(other.owes(step, prefix, may_validate) for other in self._known.values())

    def may_be_met(self, waiting: str) -> bool:
        """Whether one that is not known waits for this one, as is counted under that key."""
        return len(self._known) + 1 < self._size and self._store.add(waiting, 0) > 0

    def of_step(self, step: int, prefix: str) -> dict[int, Readings]:
        """What they sent of a step that is written now; what comes later of it is not."""
        found = self.boxes.get((step, prefix), {})
        self.boxes = {at: box for at, box in self.boxes.items() if at[0] > step or at[1] != prefix}
        is_new = self.written.get(prefix, -1) < step
        self.written[prefix] = step
        if is_new and not prefix:
            self._miss(step, found)
        return found

    def _miss(self, step: int, found: Collection[int]) -> None:
        """Say which ranks a training step is written without."""
        for rank in sorted({*range(self._size)} - {self._rank, *found}):
            other = self._known.get(rank)
            if other is None or other.first > step:
                why = "not attached"
            elif other.reached.get("", -1) > step:
                why = "that log other steps"
            elif other.is_over:
                why = "detached before"
            else:
                why = "from which nothing came"
            without = self.without.setdefault(why, _Without(step))
            without.count += without.last < step or not without.ranks
            without.last = step
            without.ranks.add(rank)

    def say(self, is_end: bool = False) -> None:
        """Say, once for each reason, which ranks the steps that were written are without."""
        for why, without in self.without.items():
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
        copies = (self._known.keys() & ranks) - {*alone}
        if copies != self._copies:
            self._copies = copies
            self._store.set(f"{self._nonce}/copies", " ".join(map(str, sorted(copies))))

    def end(self) -> None:
        """Take away all that is in the store under the nonce."""
        self.say(is_end=True)
        self._meet()
        for other in self._known.values():
            while remove(self._store, f"{self._nonce}/{other.number}/{other.taken}"):
                other.taken += 1
        for number in range(self._met):
            self._store.delete_key(f"{self._nonce}/joined/{number}")
        for rank in range(self._size):
            self._store.delete_key(f"{self._nonce}/rank/{rank}")
        for name in ("count", "copies"):
            self._store.delete_key(f"{self._nonce}/{name}")
