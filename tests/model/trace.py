"""Hold a trace of relays (`OUTBOX_TRACE`) against the model: could its lines have come about in this order?

A relay writes a line before it asks a server for a change, and one after the answer. The change happens at any time
in between, or, when the relay has been killed, perhaps never. So a trace is followed in all the ways that it can have
gone, `Way` by way, by the model's own Redis; it is refused at the first line that no way leads past. The trace is of
servers that lost nothing, and of events that were not refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from outbox.protocol import Added
from tests.model.world import Event, Redis, ask


class Refused(Exception):
    """Raised for the first line that cannot be; says which, and why."""


class Asked(NamedTuple):
    """A change that a relay has asked for."""

    relay: str
    action: str  # publish, look or commit
    known: int  # the batch that it goes out from
    batches: tuple[tuple[int, tuple[str, ...]], ...] = ()
    happened: bool = False


class Way(NamedTuple):
    """One way in which it can have gone so far."""

    redis: Redis = Redis()
    batch: int = 0  # of PostgreSQL
    asked: tuple[Asked, ...] = ()


class Acceptor:
    """Follows a trace, line by line; `accept` raises Refused."""

    def __init__(self) -> None:
        self._ways = [Way()]
        self._owner: dict[str, int] = {}  # the batch of every event that was committed
        self._since: dict[str, tuple[int, int]] = {}  # a relay's last line: where Redis and PostgreSQL stood
        self._leads: dict[str, int] = {}  # the batch that a relay has read
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
            done = asked.known == way.batch and asked.batches
            return way._replace(batch=max(n for n, _ in asked.batches)) if done else None
        ((number, ids),) = asked.batches
        events = [Event(mark, "", 0) for mark in ids]  # type: ignore[arg-type]
        redis, answer = ask(way.redis, asked.known, number, events)
        if not isinstance(answer, Added):
            return None
        for mark in ids:
            if self._owner.get(mark, number) != number:
                self._why = f"{mark} is published with batch {number}, and was with {self._owner[mark]}"
                return None
        return way._replace(redis=redis._replace(lanes=((), ()), last=(0, 0)))

    def _differing(self, ways: Iterable[Way]) -> list[Way]:
        return [*{(way.redis.batch, way.redis.ids[-3:], *way[1:]): way for way in ways}.values()]

    # -- the lines ------------------------------------------------------------------------------------------

    def _lead(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        self._leads[relay] = line["batch"]
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
        else:
            ids = tuple(line["ids"].split())
            yield way._replace(asked=(*way.asked, Asked(relay, "publish", known, ((number, ids),))))

    def _answer(self, way: Way, relay: str, line: dict[str, Any], least: tuple[int, int]) -> Iterator[Way]:
        mine = [a for a in way.asked if a.relay == relay][-1]
        answered = way._replace(asked=tuple(a for a in way.asked if a is not mine))
        stood = range(least[0], way.redis.batch + 1)  # where Redis stood since the question
        if line["kind"] == "Added" and (mine.happened or (mine.action == "look" and mine.known in stood)):
            yield answered
        elif line["kind"] == "Ahead" and not mine.happened and line["told"][0] in stood:
            had, (_, kept) = dict(way.redis.ids), line["told"]
            told = {int(n): tuple(f"{row}:{start}" for row, start in ids) for n, ids in kept.items()}
            if all(had[n] == ids for n, ids in told.items()):
                yield answered
            else:
                self._why = f"{relay} is told of other events than Redis has"
        elif not self._why:
            self._why = f"{relay} is told {line['kind']}, and Redis stands at {way.redis.batch}"

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
            yield way._replace(asked=(*way.asked, Asked(relay, "commit", line["known"], batches)))

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
