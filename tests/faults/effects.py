"""A trial of consumers: the service writes, the product's relay publishes, and what is judged are the effects."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.acceptance.harness import LANES, Findings, RelayProcess, wait_until
from tests.faults.applier import DATABASE_URL, GROUP, REDIS_URL, TOLD
from tests.faults.trial import START_SECONDS, Outcome, Trial, answers, show_log

FAR_BEHIND = 300  # entries
HELD_UP_SECONDS = 1


class ConsumerTrial(Trial):
    """A trial whose oracle is a table of effects, which takes the same event as often as it is applied.

    The proxies, where there are any, stand before the consumers. `control` says that these are the naive ones; the
    relay is the product's on either side. The service writes no faster than the consumers can follow.
    """

    def __init__(self, *servers: Any, naive: bool, **arguments: Any) -> None:
        super().__init__(*servers, naive=False, **arguments)
        self.control = naive
        self.consumers: dict[str, RelayProcess] = {}
        self.sql("CREATE TABLE effect (event_id uuid NOT NULL, consumer text NOT NULL)")

    # -- consumers --------------------------------------------------------------------------------------

    @contextmanager
    def consuming(self, consumers: int = 2) -> Iterator[None]:
        """Keep the service writing, a relay and so many consumers running while the block runs."""
        with self.under_load(see=self.direct):
            try:
                for number in range(consumers):
                    self.start(f"c{number}", concurrency=1 + number % 2)
                self.wait_for(lambda: len(self._groups()) == len(LANES), START_SECONDS)
                yield
            finally:
                for name in [*self.consumers]:
                    self.end(name)

    def start(self, name: str, die_at: str = "", by: str = "SIGKILL", concurrency: int = 1) -> RelayProcess:
        """Start a consumer; with `die_at` it gets the signal `by` at a point of its work."""
        database_url, redis_url = self._relays_see
        told = {"name": name, "control": self.control, "die_at": die_at, "by": by, "concurrency": concurrency}
        environment = {DATABASE_URL: database_url, REDIS_URL: redis_url, TOLD: json.dumps(told)}
        self.consumers[name] = self.launch(["-m", "tests.faults.applier"], environment)
        return self.consumers[name]

    def end(self, name: str) -> None:
        """Kill a consumer with signal 9."""
        self.consumers.pop(name).__exit__()

    def start_over(self) -> None:
        """Replace all consumers, and show what they have said."""
        for name, process in [*self.consumers.items()]:
            show_log(process)
            self.end(name)
            self.start(name)

    # -- time -------------------------------------------------------------------------------------------

    def progress(self) -> int:
        """Return how many entries the group has finished."""
        return sum((group["entries-read"] or 0) - group["pending"] for group in self._groups())

    def unfinished(self) -> int:
        """Return how many entries the group has not finished, or not even read."""
        return sum((group["lag"] or 0) + group["pending"] for group in self._groups())

    def in_hand(self, name: str) -> set[tuple[str, bytes]]:
        """Return the entries that are pending for a consumer, with their lanes."""
        return {
            (lane, entry["message_id"])
            for lane in LANES
            for entry in self.redis.xpending_range(lane, GROUP, "-", "+", 10_000, name)
        }

    def wait_until_holding(self, name: str, entries: int) -> None:
        """Block until so many entries are pending for a consumer."""
        wait_until(lambda: len(self.in_hand(name)) >= entries, f"{name} with {entries} entries in hand")

    def is_relieved(self, *names: str) -> None:
        """Block until what these consumers have in hand now is finished, or others have it; note how long it took."""
        had = {name: self.in_hand(name) for name in names}
        started = time.monotonic()
        if self.wait_for(lambda: not any(self.in_hand(name) & had[name] for name in names), self.within):
            self.recoveries.append(time.monotonic() - started)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for lane in LANES for group in self.redis.xinfo_groups(lane)]

    def _move_all(self, *arguments: Any, **named: Any) -> None:
        """Hold a writer up, not for long, while the consumers are far behind."""
        until = time.monotonic() + HELD_UP_SECONDS
        while time.monotonic() < until and (answers(self.unfinished) or 0) > FAR_BEHIND:
            time.sleep(0.01)
        super()._move_all(*arguments, **named)

    # -- judging ----------------------------------------------------------------------------------------

    def judge(self, commits_may_fail: bool, journal_is_whole: bool) -> Outcome:
        """Let what is left be published, then applied; return what the effects show."""
        of_lanes = super().judge(commits_may_fail, journal_is_whole)
        self.complain_unless(not any(of_lanes.findings.faults()), "the relay has done wrong")
        self.start("last")
        try:
            wait_until(lambda: not self.unfinished(), "lanes that are finished")
        except AssertionError:
            self.stuck += 1
            show_log(self.consumers["last"])
        self.end("last")
        dead = sum(self.redis.xlen(f"{lane}:dlq") for lane in LANES)
        self.complain_unless(not dead, "dead letters")
        return of_lanes._replace(findings=self.effects(), passed_over=None, stuck=self.stuck, of_effects=True)

    def effects(self) -> Findings:
        """Compare what has committed with the effects."""
        committed = {row[0] for row in self.sql("SELECT event_id FROM movement")}
        applied = Counter(row[0] for row in self.sql("SELECT event_id FROM effect"))
        return Findings(
            committed=len(committed),
            published=applied.total(),
            lost=len(committed - applied.keys()),
            repeated=applied.total() - len(applied),
            phantom=len(applied.keys() - committed),
            out_of_order=0,
        )
