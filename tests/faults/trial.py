"""A trial: one fault, again and again, on servers of its own under load, for the product or for the control."""

from __future__ import annotations

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Literal, NamedTuple

import redis as redis_client
from sqlalchemy import make_url

from outbox import migrate, testing
from tests.acceptance.harness import LANES, Findings, Harness, RelayProcess, wait_until
from tests.faults.proxy import Proxy

START_SECONDS = 30
LOG_END = 1000  # characters
LONGEST_SAID = 5000  # characters of what none may say, and its traceback
WORSE = {
    "batch_damaged", "batches_lost", "bury_failed", "commits_lost", "consumer_bug", "entry_lost", "event_dead",
    "housekeeper_bug", "state_damaged", "streams_lost",
}  # fmt: skip
Between = Literal["nobody", "relays", "everybody"]


OF_ENTRIES = ("lost", "repeated", "phantom", "out of order")
OF_EFFECTS = ("effects lost", "applied twice", "without event", "out of order")


class Outcome(NamedTuple):
    """What a trial has shown: of the entries in the lanes, or of the effects that consumers had."""

    times: int
    findings: Findings
    passed_over: int | None  # violations of priority; None where there is no journal, or not the whole of it
    recoveries: list[float]  # seconds
    stuck: int
    complaints: list[str]
    of_effects: bool = False

    def wrong(self) -> dict[str, int]:
        """Return what should not have happened, and how often."""
        names = OF_EFFECTS if self.of_effects else OF_ENTRIES
        counts = dict(zip(names, self.findings.faults(), strict=True))
        counts |= {"passed over": self.passed_over or 0, "stuck": self.stuck}
        counts |= dict.fromkeys(self.complaints, 1)
        return {name: count for name, count in counts.items() if count}


class Trial(Harness):
    """A harness with servers of its own, and notes of what has been seen.

    `chance` decides all that is random; `times` is how often the fault is to happen, or for how many seconds.
    """

    def __init__(
        self,
        database: testing.Server,
        broker: testing.Server,
        *,
        naive: bool,
        times: int,
        within: float,
        chance: random.Random,
        between: tuple[Proxy, Proxy] | None,
        whom: Between,
        resources: ExitStack,
    ) -> None:
        urls = direct = (database.url, broker.url)
        if between is not None:
            urls = (at_port(database.url, between[0].port), at_port(broker.url, between[1].port))
            self.to_database, self.to_broker = between
        self.direct = direct
        seen_by_service = urls if whom == "everybody" else direct
        super().__init__(*seen_by_service, naive=naive, relays_see=urls)
        self.database, self.broker = database, broker
        self.times, self.within, self.chance = times, within, chance
        self.done = 0
        self.enter = resources.enter_context  # of what is to last as long as the trial
        self.relays: list[RelayProcess] = []
        self.recoveries: list[float] = []
        self.stuck = 0
        self.complaints: list[str] = []
        self.said: Counter[str] = Counter()  # actions in the logs, from warnings on

    # -- relays -----------------------------------------------------------------------------------------

    @contextmanager
    def under_load(self, relays: int = 1, **settings: object) -> Iterator[None]:
        """Keep the service writing and so many relays running while the block runs; they may be replaced."""
        with ExitStack() as stack, self.writing(seed=self.chance.randint(0, 999)):
            stack.callback(self._end_relays)
            self._start = partial(self.relay, **settings)
            self.relays = [self._start() for _ in range(relays)]
            for relay in self.relays:
                relay.wait_until_connected()
            yield

    def replace(self, relay: RelayProcess, **arguments: str) -> RelayProcess:
        """Kill a relay with signal 9, and start another in its place; the arguments are those of `relay`."""
        relay.__exit__()
        place = self.relays.index(relay)
        self.relays[place] = self._start(**arguments)
        return self.relays[place]

    def leader(self) -> RelayProcess:
        """Return the relay that has led last; of the control the first, as all of them work at once."""
        (name,) = self.sql("SELECT leader FROM outbox_relay")[0]
        ours = [relay for relay in self.relays if name and name.endswith(f":{relay.process.pid}")]
        return (ours or self.relays)[0]

    def _end_relays(self) -> None:
        for relay in self.relays:
            relay.__exit__()
        self.relays = []

    # -- time -------------------------------------------------------------------------------------------

    def rounds(self) -> Iterator[int]:
        """Yield as often as the fault is to happen, each time after some more events have been published."""
        while self.done < self.times:
            self.let_pass(self.chance.randint(1, 400))
            yield self.done
            self.done += 1

    def let_pass(self, entries: int) -> None:
        """Block until so many more entries are in the lanes; a relay that does not publish is replaced."""
        goal = self.progress() + entries
        self.wait_for(lambda: self.progress() >= goal, seconds=START_SECONDS)

    def progress(self) -> int:
        """Return the number that grows while nothing is wrong."""
        return self.entries()

    def wait_for_publish(self) -> None:
        """Block until an entry has been added this very moment: its relay stands between it and its commit."""
        with suppress(redis_client.RedisError):
            self.redis.xread(dict.fromkeys(LANES, "$"), block=1000)

    def lasts(self, seconds: float) -> None:
        """Let a fault go on for some time."""
        time.sleep(seconds)

    def recovers(self) -> None:
        """Block until something is published again, and note how long it took from now."""
        since = int(time.time() * 1000)
        first: list[int] = []

        def published() -> bool:
            first[:] = [milliseconds for lane in LANES for milliseconds in self._entries_after(lane, since)]
            return bool(first)

        if self.wait_for(published, self.within):
            self.recoveries.append((min(first) - since) / 1000)

    def wait_for(self, condition: Callable[[], object], seconds: float) -> bool:
        """Block until the condition holds, and return True; what does not come true in time is stuck."""
        try:
            wait_until(lambda: answers(condition), seconds=seconds)
        except AssertionError:
            self.stuck += 1
            self.start_over()
            return False
        return True

    def start_over(self) -> None:
        """Replace all relays, and show what they have said."""
        for relay in list(self.relays):
            show_log(relay)
            self.replace(relay)

    def _entries_after(self, lane: str, milliseconds: int) -> list[int]:
        found = self.redis.xrange(lane, min=str(milliseconds + 1), count=1)
        return [int(entry_id.partition(b"-")[0]) for entry_id, _ in found]

    # -- judging ----------------------------------------------------------------------------------------

    def complain_unless(self, right: object, complaint: str) -> None:
        """Note that something is not as it should be, once."""
        if not right and complaint not in self.complaints:
            self.complaints.append(complaint)

    def complain_of_processes(self, may_say: Set[str] = frozenset()) -> None:
        """Complain of processes that have died by themselves, of writers that have ended before their time, and of what
        the logs say; of what none may say, show the first, with its traceback.
        """
        died = [process.died for process in self.processes]
        self.complain_unless(not any(died), f"died by themselves: {sum(died)}")
        self.complain_unless(not self.ended_writers, f"writers have ended: {self.ended_writers[:1]}")
        for log in (process.log for process in self.processes):
            said = Counter(re.findall(r"^\S+ (?:WARNING|ERROR) (\w+)", log, re.MULTILINE))
            for action in WORSE & said.keys() - may_say - self.said.keys():
                self.complain_unless(False, f"in the logs: {action}")
                start = log.index(action)
                print(f"in a log: {log[start : start + LONGEST_SAID]}", file=sys.stderr)
            self.said += said

    def judge(self, commits_may_fail: bool, journal_is_whole: bool) -> Outcome:
        """Let what is left be published, and return what the trial has shown."""
        self.complain_unless(commits_may_fail or not self.failed_commits, "commits of the service failed")
        try:
            findings = self.settle()
        except AssertionError:
            self.stuck += 1
            findings = self.findings()
        if journal_is_whole and not self.naive:
            self.complain_unless(self.journal_is_right(), "the lanes are not what the journal holds")
        self.complain_unless(not self.sql("SELECT FROM outbox_dead"), "dead letters")
        passed_over = None if self.naive else self.passed_over()
        return Outcome(self.done, findings, passed_over, self.recoveries, self.stuck, self.complaints)


def answers(condition: Callable[[], object]) -> object:
    """Return what the condition says; one that a server does not answer does not hold."""
    try:
        return condition()
    except (redis_client.RedisError, OSError):
        return False


def show_log(process: RelayProcess) -> None:
    """Print how the log of a process that is stuck ends."""
    print(f"stuck; its log ends with:\n{process.log[-LOG_END:]}", file=sys.stderr)


def at_port(url: str, port: int) -> str:
    """Return a URL with another port."""
    if url.startswith("redis"):
        return f"redis://127.0.0.1:{port}/0"
    return make_url(url).set(port=port).render_as_string(hide_password=False)


@contextmanager
def open_trial(
    kind: type[Trial] = Trial,
    *,
    naive: bool,
    times: int,
    within: float,
    seed: str,
    postgres: dict[str, str],
    redis: dict[str, str],
    between: Between,
) -> Iterator[Trial]:
    """Start servers and proxies for a trial, and remove them in the end."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        database = stack.enter_context(testing.postgres(postgres))
        broker = stack.enter_context(testing.redis(redis))
        migrate.upgrade(database.url)
        proxies = None
        if between != "nobody":
            assert database.port is not None
            assert broker.port is not None
            # Each with a chance of its own, as their threads draw from it as often as data comes.
            proxies = tuple(
                stack.enter_context(Proxy(port, random.Random(chance.random())))
                for port in (database.port, broker.port)
            )
        trial = kind(
            database, broker, naive=naive, times=times, within=within, chance=chance,
            between=proxies, whom=between,
            resources=stack,
        )  # fmt: skip
        yield stack.enter_context(trial)
