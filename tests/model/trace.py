"""Hold a trace of relays (`OUTBOX_TRACE`) against the model: could its lines have come about in this order?

A relay writes a line before it asks a server for a change, and one after the answer. The change happens at any time
in between, or, when the relay has been killed, perhaps never. So a trace is followed in all the ways that it can have
gone, `Way` by way, by the model's own Redis; it is refused at the first line that no way leads past. The trace is of
servers that lost nothing, but may have refused events, from relays that give these up as soon as the model does (see
`MAX_ATTEMPTS`). What Redis has refused of a batch is open until a relay is told, which may be a successor of the one
that sent it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from outbox.protocol import Added
from tests.model.world import Event, Map, Redis, ask, settled

ALL_ADDED = Added(Map(), ())


class Refused(Exception):
    """Raised for the first line that cannot be; says which, and why."""


class Asked(NamedTuple):
    """A change that a relay has asked for."""

    relay: str
    action: str  # publish, look or commit
    known: int  # the batch that it goes out from
    batches: tuple[tuple[int, tuple[str, ...]], ...] = ()
    happened: bool = False
    sent: tuple[str, ...] = ()  # what Redis was given of the batch that is committed
    answer: Added = ALL_ADDED  # and what it said


class Way(NamedTuple):
    """One way in which it can have gone so far."""

    redis: Redis = Redis()
    batch: int = 0  # of PostgreSQL
    asked: tuple[Asked, ...] = ()
    untold: frozenset[int] = frozenset()  # batches of which nobody knows yet what Redis has refused
    back: Map = Map()  # events that were sent, but must be in PostgreSQL still; and their attempts
    dead: frozenset[str] = frozenset()  # dead letters

    def events(self, marks: Iterable[str]) -> list[Event]:
        return [Event(mark, "", 0, self.back.get(mark, 0)) for mark in marks]  # type: ignore[arg-type]

    def told(self, number: int, kept: tuple[str, ...]) -> Way | None:
        """Return the way when somebody is told what Redis has of a batch, or None if it cannot have that."""
        had = dict(self.redis.ids)
        may_have = tuple(mark for mark in had[number] if mark in kept or number not in self.untold)
        if may_have != kept:
            return None
        left_out = [mark for mark in had[number] if mark not in kept]
        return self._replace(
            redis=self.redis._replace(ids=tuple((had | {number: kept}).items())),
            untold=self.untold - {number},
            back=Map(dict.fromkeys(left_out, 0) | self.back),
        )

    def committed(self, asked: Asked) -> Way:
        """Return the way when a commit has happened: batches, and refused events put back or dead letters."""
        change = settled(asked.known, self.events(asked.sent), asked.answer)
        back = self.back | dict(change.back)
        gone = {*change.dead} | {mark for _, marks in asked.batches for mark in marks}
        return self._replace(
            batch=max(number for number, _ in asked.batches),
            back=Map({mark: attempts for mark, attempts in back.items() if mark not in gone}),
            dead=self.dead | {*change.dead},
        )


class Acceptor:
    """Follows a trace, line by line; `accept` raises Refused."""

    def __init__(self) -> None:
        self._ways = [Way()]
        self._owner: dict[str, int] = {}  # the batch of every event that was committed
        self._since: dict[str, tuple[int, int]] = {}  # a relay's last line: where Redis and PostgreSQL stood
        self._leads: dict[str, int] = {}  # the batch that a relay has read
        self._added: dict[str, tuple[tuple[str, ...], Added]] = {}  # what it has sent since, and the answer
        self._why = ""

    def accept(self, line: dict[str, Any]) -> None:
        relay, self._why = line["relay"], ""
        self._ways = [way for start in self._ways for way in self._on(start)]
        follow = getattr(self, "_" + line["action"])
        least = self._since.get(relay, (0, 0))
        self._ways = self._differing(found for way in self._ways for found in follow(way, relay, line, least))
        if not self._ways:
            raise Refused(self._why)
        self._since[relay] = (
            min(way.redis.batch for way in self._ways),
            min(way.batch for way in self._ways),
        )

    def ends(self) -> set[tuple[Map, frozenset[str]]]:
        """Return all that can have become of the events that are in no lane: `back` and `dead` of each way."""
        return {(way.back, way.dead) for start in self._ways for way in self._on(start)}

    # -- what may have happened meanwhile -----------------------------------------------------------------

    def _on(self, way: Way) -> Iterator[Way]:
        """Yield the way as it is, and with changes that were asked for and happened by now."""
        yield way
        for place, asked in enumerate(way.asked):
            following = None if asked.happened else self._happen(way, asked)
            if following:
                rest = (*way.asked[:place], asked._replace(happened=True), *way.asked[place + 1 :])
                yield from self._on(following._replace(asked=rest))

    def _happen(self, way: Way, asked: Asked) -> Way | None:
        """Return the way after the change, or None if it would change nothing."""
        if asked.action == "look":
            return None
        if asked.action == "commit":
            return way.committed(asked) if asked.known == way.batch and asked.batches else None
        ((number, ids),) = asked.batches
        redis, answer = ask(way.redis, asked.known, number, way.events(ids))
        if not isinstance(answer, Added):
            return None
        for mark in ids:
            if self._owner.get(mark, number) != number:
                self._why = f"{mark} is published with batch {number}, and was with {self._owner[mark]}"
                return None
        redis = redis._replace(lanes=((), ()), last=(0, 0))
        return way._replace(redis=redis, untold=way.untold | {number})

    def _differing(self, ways: Iterable[Way]) -> list[Way]:
        return [*{(way.redis.batch, way.redis.ids[-3:], *way[1:]): way for way in ways}.values()]

    # -- the lines ------------------------------------------------------------------------------------------

    def _lead(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        self._leads[relay] = line["batch"]
        self._added.pop(relay, None)
        if least[1] <= line["batch"] <= way.batch:
            # A commit happens before the lock is free again, or never; a publish may still be on its way.
            mine = [a for a in way.asked if a.relay == relay and (a.action == "commit" or a.happened)]
            yield way._replace(asked=tuple(a for a in way.asked if a not in mine))
        else:
            self._why = f"{relay} reads batch {line['batch']}, and PostgreSQL stands at {way.batch}"

    def _look(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        yield way._replace(asked=(*way.asked, Asked(relay, "look", line["known"])))

    def _publish(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        known, number = line["known"], line["batch"]
        if number != known + 1:
            self._why = f"batch {number} is published after {known}"
        elif known != self._leads.get(relay):
            self._why = f"{relay} publishes after batch {known}, and has read {self._leads.get(relay)}"
        elif dead := way.dead & {*(ids := tuple(line["ids"].split()))}:
            self._why = f"{min(dead)} is published, and is a dead letter"
        else:
            yield way._replace(asked=(*way.asked, Asked(relay, "publish", known, ((number, ids),))))

    def _answer(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        mine = [a for a in way.asked if a.relay == relay][-1]
        answered = way._replace(asked=tuple(a for a in way.asked if a is not mine))
        stood = range(least[0], way.redis.batch + 1)  # where Redis stood since the question
        kept: dict[int, tuple[str, ...]] | None = None  # what Redis says that it has
        if line["kind"] == "Added" and mine.happened:
            kept = self._kept(way, relay, mine, line["told"])
        elif line["kind"] == "Added" and mine.action == "look" and mine.known in stood:
            kept = {}
        elif line["kind"] == "Ahead" and not mine.happened and line["told"][0] in stood:
            told = line["told"][1].items()
            kept = {int(n): tuple(f"{row}:{digits}" for row, digits in ids) for n, ids in told}
        if kept is None:
            self._why = self._why or f"{relay} is told {line['kind']}, and Redis stands at {way.redis.batch}"
            return
        for number, ids in kept.items():
            if (following := answered.told(number, ids)) is None:
                self._why = f"{relay} is told of other events than Redis has of batch {number}"
                return
            answered = following
        yield answered

    def _kept(self, way: Way, relay: str, mine: Asked, told: list[Any]) -> dict[int, tuple[str, ...]]:
        """Return what Redis has of the batch that it was given, by what it says that it has refused and held back."""
        ((number, sent),) = mine.batches
        answer = Added(Map({int(place): why for place, why in told[0].items()}), tuple(told[1]))
        self._added[relay] = sent, answer
        return dict(settled(number - 1, way.events(sent), answer).batches)  # type: ignore[arg-type]

    def _commit(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        batches = tuple((int(n), tuple(ids.split())) for n, ids in line["batches"].items())
        had, numbers = dict(way.redis.ids), [n for n, _ in batches]
        if line["known"] != self._leads.get(relay):
            self._why = f"{relay} commits after batch {line['known']}, and has read {self._leads.get(relay)}"
        elif numbers != [*range(line["known"] + 1, line["known"] + 1 + len(numbers))]:
            self._why = f"batches {numbers} are committed after {line['known']}"
        elif wrong := [n for n, ids in batches if {*had.get(n, ())} != {*ids}]:
            what = "adopted" if line["adopted"] else "committed"
            self._why = f"batch {wrong[0]} is {what} with other events than Redis has of it"
        else:
            self._owner |= {mark: n for n, ids in batches for mark in ids}
            added = () if line["adopted"] else self._added.get(relay, ())
            yield way._replace(
                asked=(*way.asked, Asked(relay, "commit", line["known"], batches, False, *added))
            )

    def _committed(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        mine = [a for a in way.asked if a.relay == relay][-1]
        if mine.happened or not mine.batches:
            yield way._replace(asked=tuple(a for a in way.asked if a is not mine))
        else:
            self._why = f"{relay} has committed, and another has led: PostgreSQL stands at {way.batch}"


def accept(lines: Iterable[str]) -> int:
    """Follow a whole trace; return the number of its lines. Raises Refused, with the line's number."""
    acceptor, number = Acceptor(), 0
    for number, line in enumerate(lines, 1):
        try:
            acceptor.accept(json.loads(line))
        except Refused as refused:
            raise Refused(f"line {number}: {refused}") from None
    return number
