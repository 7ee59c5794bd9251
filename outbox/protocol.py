"""What a relay does next: the decisions of a step, as plain functions of plain values.

Nothing here reads, writes or looks at a clock. The relay performs what these functions decide; `tests/model` runs
the very same ones through every order in which relays, crashes and failing servers can meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar


class Event(Protocol):
    """What the decisions need to know of an event."""

    @property
    def stream(self) -> str: ...
    @property
    def key(self) -> str | None: ...
    @property
    def attempts(self) -> int: ...


E = TypeVar("E", bound=Event)


class Mark(NamedTuple):
    """How Redis remembers an event: its row, and both ends of its id, as the time of a UUID is in some at the start.

    The row alone would not do: a PostgreSQL that has lost commits gives the same numbers to other events.
    """

    row: int
    ends: str


# -- what Redis answers to a batch ----------------------------------------------------------------------------


class Added(NamedTuple):
    """The batch is in Redis, but for what it refused (place in the batch, why) or held back (place)."""

    refused: Mapping[int, str]
    held: Sequence[int]


class Ahead(NamedTuple):
    """Redis stands at a later batch, and remembers what is in the last ones."""

    batch: int
    kept: Mapping[int, Sequence[Mark]]


class Behind(NamedTuple):
    """Redis knows fewer batches; 0 when it knows none."""

    batch: int


class Gone(NamedTuple):
    """These lanes have lost their entries while the state survived."""

    lanes: Sequence[str]


class Refused(NamedTuple):
    """Redis has refused events of a journal batch that was sent again; `note` is where it says so."""

    batch: int
    refused: Mapping[int, str]
    held: Sequence[int]
    note: bytes


Answer = Added | Ahead | Behind | Gone | Refused


# -- what follows ---------------------------------------------------------------------------------------------


class Adopt(NamedTuple):
    """Take these batches for published; of `unknown` ones nobody can say what is in them."""

    batches: Mapping[int, Sequence[Mark]]
    unknown: int


class SendAgain(NamedTuple):
    """Send the journal's batches after this one again."""

    known: int


class Fill(NamedTuple):
    """Fill these lanes with what the journal holds of them, up to the batch at which Redis stands."""

    lanes: Sequence[str]
    stands: int


class Bury(NamedTuple):
    """Make dead letters of these places of a journal batch, for these reasons, then clear the note in Redis."""

    batch: int
    reasons: Mapping[int, str]
    note: bytes


class Halt(NamedTuple):
    """Publish nothing until somebody decides."""

    reason: str


Move = Adopt | SendAgain | Fill | Bury | Halt


def decide(expected: int, answer: Answer, replay: bool) -> Move:
    """Return what follows an answer that is not Added, for a relay that expected Redis at this batch.

    It must have asked after it locked the leader's row and read the batch, and still hold that lock: then it
    knows all that the leaders before have committed, and nobody newer exists. A Redis that stands ahead was
    brought there by a leader that died before its commit, or by commits that PostgreSQL has lost. `replay` is
    whether what Redis has lost is sent again.
    """
    match answer:
        case Ahead(batch, kept):
            # The last one is always recorded, so that PostgreSQL comes to stand where Redis does.
            return Adopt({**kept, batch: kept.get(batch, ())}, batch - expected - len(kept))
        case Behind(0) if not replay:
            return Halt(f"Redis has lost its state, {expected} batches have been published")
        case Gone(lanes) if not replay:
            return Halt(f"Redis has lost {', '.join(lanes)}")
        case Behind(batch):
            return SendAgain(batch)
        case Gone(lanes):
            return Fill(lanes, expected)
        case Refused(batch, refused, held, note):
            return Bury(
                batch, {**dict.fromkeys(held, "behind an event of its key that was refused"), **refused}, note
            )
    raise AssertionError(answer)


class Again(NamedTuple):
    """What sending one journal batch again comes to: where Redis stands then, and how many were skipped."""

    number: int
    lost: int


def send_next(known: int, expected: int, found: int | None) -> Again:
    """Return what comes after `known`, when the journal's next batch is `found` (None: it has no more)."""
    if found is None:
        return Again(expected, expected - known)
    return Again(found, found - known - 1)


# -- refused events -------------------------------------------------------------------------------------------


class Refusal(NamedTuple, Generic[E]):
    """An event that was refused, or (error None) held back behind one of its key."""

    event: E
    error: str | None = None


def sift(events: Sequence[E], faults: Mapping[int, str]) -> tuple[list[E], list[Refusal[E]]]:
    """Part what can be published from what has a fault (by its place), and from what must not pass that."""
    stopped: set[tuple[str, str]] = set()
    held = []
    for place, event in enumerate(events if faults else ()):
        if event.key is None:
            continue
        if place in faults:
            stopped.add((event.stream, event.key))
        elif (event.stream, event.key) in stopped:
            held.append(place)
    return settle(events, Added(faults, held))


def settle(events: Sequence[E], answer: Added) -> tuple[list[E], list[Refusal[E]]]:
    """Part what was published from what is to be put back."""
    if not answer.refused and not answer.held:
        return list(events), []
    refusals = [Refusal(events[place], error) for place, error in answer.refused.items()]
    refusals += [Refusal(events[place]) for place in answer.held]
    left_out = {*answer.refused, *answer.held}
    return [event for place, event in enumerate(events) if place not in left_out], refusals


def is_dead(refusal: Refusal[E], max_attempts: int) -> bool:
    """Return whether a refused event has had all its attempts. One that is held back spends none."""
    return refusal.error is not None and refusal.event.attempts + 1 >= max_attempts
