"""Faults of consumers, of what stands between them and the servers, and of the servers under them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from outbox import supervisor, testing
from tests.acceptance.consumers import CLAIM_IDLE, POINTS
from tests.acceptance.harness import wait_until
from tests.faults.aof import cut_tail
from tests.faults.applier import GROUP
from tests.faults.effects import ConsumerTrial
from tests.faults.scenario import Scenario
from tests.faults.servers import ON_DISK

# One is reached in a long backlog of primary events alone, which `tests/acceptance/test_consumer_kill.py` makes.
REACHED = [point for point in POINTS if point != "after an ask"]
CONTROL_POINT = "between commit and ack"
FROZEN_AT = ("in the handler", "before the commit", "between commit and ack")
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
TERMINATE_WAITING = f"{TERMINATE} AND wait_event = 'SyncRep'"


def killed(trial: ConsumerTrial) -> None:
    """One or both; every other time they come back under new names, and what was in hand must be claimed."""
    with trial.consuming():
        for n in trial.rounds():
            names = trial.chance.sample([*trial.consumers], trial.chance.randint(1, 2))
            for name in names:
                trial.end(name)
            for place, name in enumerate(names):
                trial.start(f"c{n}-{place}" if n % 2 else name, concurrency=1 + n % 3)
            trial.is_relieved(*names)


def killed_at_points(trial: ConsumerTrial) -> None:
    """It finds what the one before has left in hand, and reaches a point by that; "in the claim" it is another one."""
    with trial.consuming(consumers=1):
        for n in trial.rounds():
            trial.wait_until_holding("c0", 5)
            trial.end("c0")
            point = CONTROL_POINT if trial.control else REACHED[n % len(REACHED)]
            name = "other" if point == "in the claim" else "c0"
            status = trial.start(name, point).wait_for_death()
            trial.complain_unless(status == -9, f"{point}: a consumer ended with {status}")
            trial.end(name)
            trial.start("c0")
            trial.is_relieved("c0", "other")


def frozen(trial: ConsumerTrial) -> None:
    """At any time, or in the middle of an event, until the other one has claimed its entries."""
    with trial.consuming():
        for n in trial.rounds():
            trial.wait_until_holding("c0", 5)
            if n % 2:
                trial.end("c0")
                trial.start("c0", FROZEN_AT[n // 2 % len(FROZEN_AT)], by="SIGSTOP").wait_until_frozen()
            else:
                trial.consumers["c0"].process.send_signal(signal.SIGSTOP)
            trial.is_relieved("c0")
            trial.let_pass(100)
            trial.consumers["c0"].process.send_signal(signal.SIGCONT)
            trial.let_pass(100)


def cut(trial: ConsumerTrial) -> None:
    """All connections to one server; every other time with a reply on its way."""
    with trial.consuming():
        for n in trial.rounds():
            link = (trial.to_database, trial.to_broker)[n % 2]
            if n % 4 < 2:
                link.lose = 1.0
                trial.lasts(0.05)
                link.lose = 0.0
            link.cut()
            trial.is_relieved(*trial.consumers)


def replies_lost(trial: ConsumerTrial) -> None:
    """`times` is how long it lasts in seconds."""
    with trial.consuming():
        trial.let_pass(100)
        trial.to_broker.lose = trial.to_database.lose = 0.05
        trial.lasts(trial.times)
        trial.to_broker.lose = trial.to_database.lose = 0.0
        trial.is_relieved(*trial.consumers)
        trial.done = trial.times


def tail_cut(trial: ConsumerTrial) -> None:
    """The group goes back in time, and the relay sends entries again under new entry ids."""
    with trial.consuming():
        trial.let_pass(200)  # so that the groups are not in the tail
        for _ in trial.rounds():
            trial.broker.kill()
            cut_tail(trial.broker.folder, trial.chance)
            trial.broker.restart()
            trial.is_relieved(*trial.consumers)


def postgres_killed(trial: ConsumerTrial) -> None:
    """A commit whose record is on its way to the disk is kept, and nobody hears of it; that is why fsync is on."""
    with trial.consuming():
        for _ in trial.rounds():
            trial.wait_for_publish()
            kill_at_once(trial.database)
            trial.database.restart()
            trial.is_relieved(*trial.consumers)


def kill_at_once(server: testing.Server) -> None:
    """Kill all processes of PostgreSQL in one moment, as the end of its container does.

    When its first process alone is killed, the others still answer the commits that they are in.
    """
    server.freeze()
    assert server.pid is not None
    for pid in supervisor.children(server.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.kill()


def backends_terminated(trial: ConsumerTrial) -> None:
    """In a commit that waits for a standby, which is kept and never answered; and, in turns, at any time.

    A commit that waits for nobody is answered before its connection ends, so the control gets through those unharmed.
    """
    with trial.consuming():
        for n in trial.rounds():
            if n % 2:
                trial.wait_for_publish()
                trial.sql(TERMINATE, GROUP)
            else:
                wait_until(lambda: terminated_in_commit(trial), "a commit that waits for the standby")
            trial.is_relieved(*trial.consumers)


def terminated_in_commit(trial: ConsumerTrial) -> bool:
    """Terminate the consumers' connections that wait for a standby; return whether there was one."""
    with standby_away(trial):
        trial.lasts(0.05)
        return bool(trial.sql(TERMINATE_WAITING, GROUP))


@contextmanager
def standby_away(trial: ConsumerTrial) -> Iterator[None]:
    """Let all commits wait for a synchronous standby that does not come, while the block runs."""
    trial.sql("ALTER SYSTEM SET synchronous_standby_names = 'away'")
    trial.sql("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        trial.sql("ALTER SYSTEM RESET synchronous_standby_names")
        trial.sql("SELECT pg_reload_conf()")


def postgres_frozen(trial: ConsumerTrial) -> None:
    """For so long that what each has in hand looks as if it had been left."""
    with trial.consuming():
        for _ in trial.rounds():
            trial.wait_for_publish()
            trial.database.freeze()
            trial.lasts(CLAIM_IDLE.total_seconds() * trial.chance.uniform(1.2, 3.0))
            trial.database.thaw()
            trial.is_relieved(*trial.consumers)


SCENARIOS = (
    Scenario(
        name="consumer-killed",
        what="kill -9 of one or both of two consumers",
        inflict=killed, kind=ConsumerTrial, short=10, long=500, control="applied twice", control_times=25,
    ),
    Scenario(
        name="consumer-killed-at-points",
        what="kill -9 of a consumer at each point of an event",
        inflict=killed_at_points, kind=ConsumerTrial, short=len(REACHED), long=20 * len(REACHED),
        control="applied twice",
    ),
    Scenario(
        name="consumer-frozen",
        what="SIGSTOP of a consumer of two until its entries are claimed, then SIGCONT",
        inflict=frozen, kind=ConsumerTrial, short=4, long=100, control="applied twice", within=10,
    ),
    Scenario(
        name="consumer-network-cut",
        what="a consumer's connections cut, to either server",
        inflict=cut, kind=ConsumerTrial, short=16, long=300, control="applied twice", between="relays",
    ),
    Scenario(
        name="consumer-replies-lost",
        what="5 % of the replies to consumers lost",
        inflict=replies_lost, kind=ConsumerTrial, short=10, long=60, unit=" s", control="applied twice",
        between="relays",
    ),
    Scenario(
        name="consumer-postgres-killed",
        what="kill -9 of all of PostgreSQL at once under consumers, crash recovery",
        inflict=postgres_killed, kind=ConsumerTrial, short=6, long=60, control="applied twice",
        control_times=12, postgres={"fsync": "on"}, commits_may_fail=True,
    ),
    Scenario(
        name="consumer-backends-terminated",
        what="pg_terminate_backend of consumers' connections, every other time in a commit without a reply",
        inflict=backends_terminated, kind=ConsumerTrial, short=10, long=200, control="applied twice",
    ),
    Scenario(
        name="consumer-postgres-frozen",
        what="SIGSTOP of PostgreSQL under consumers, for longer than `claim_idle`",
        inflict=postgres_frozen, kind=ConsumerTrial, short=4, long=50, control="applied twice",
    ),
    Scenario(
        name="consumer-redis-tail-cut",
        what="kill -9 of Redis under consumers, and the tail of its log cut away",
        inflict=tail_cut, kind=ConsumerTrial, short=6, long=100, control="applied twice", redis=ON_DISK,
    ),
)  # fmt: skip
