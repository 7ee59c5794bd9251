"""The faults of a soak: each happens once, at a moment of its choice, and ends before it returns."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.acceptance.harness import LANES, SERVICE, RelayProcess, wait_until
from tests.faults.aof import cut_tail
from tests.faults.servers import OF_RELAYS

if TYPE_CHECKING:
    from tests.faults.soak import Soak

ASIDE = "aside:"  # where a lane is while something else has its name


def relay_killed(soak: Soak) -> None:
    """If it comes to lead soon, then while it leads."""
    relay = soak.relays[1]
    with suppress(AssertionError):
        wait_until(lambda: soak.naive or soak.leader() is relay, seconds=3)
    if soak.chance.random() < 0.5:
        soak.wait_for_publish()
    soak.replace(relay)


def relay_frozen(soak: Soak) -> None:
    frozen(soak, soak.leader(), most=8)


def consumer_killed(soak: Soak) -> None:
    soak.replace_consumer()


def consumer_frozen(soak: Soak) -> None:
    frozen(soak, soak.chance.choice(soak.consumers), most=6)


def frozen(soak: Soak, process: RelayProcess, most: float) -> None:
    """It may be for longer than a takeover takes, or a claim."""
    process.process.send_signal(signal.SIGSTOP)
    soak.lasts(soak.chance.uniform(0.2, most))
    process.process.send_signal(signal.SIGCONT)


def backends_terminated(soak: Soak) -> None:
    soak.wait_for_publish()
    soak.sql(OF_RELAYS, SERVICE)


def clients_killed(soak: Soak) -> None:
    soak.wait_for_publish()
    soak.redis.client_kill_filter(_type="normal", skipme=True)


def scripts_flushed(soak: Soak) -> None:
    soak.redis.script_flush()


def connections_cut(soak: Soak) -> None:
    soak.wait_for_publish()
    soak.chance.choice((soak.to_database, soak.to_broker)).cut()


def network_withheld(soak: Soak) -> None:
    """Nothing comes through to one of the servers, and then all of it at once."""
    proxy = soak.chance.choice((soak.to_database, soak.to_broker))
    proxy.withhold()
    soak.lasts(soak.chance.uniform(0.2, 6))
    proxy.flow()


def replies_lost(soak: Soak) -> None:
    soak.to_broker.lose, soak.to_database.lose = 0.3, 0.03
    soak.lasts(soak.chance.uniform(1, 3))
    soak.to_broker.lose = soak.to_database.lose = 0.0


def events_refused(soak: Soak) -> None:
    """A lane's name is taken by what is no stream; the events that were refused are due again a little later.

    Not while Redis is sent again what it has forgotten: what it refuses of that is a dead letter at once.
    """
    wait_until(soak.redis_stands)
    lane = soak.chance.choice(LANES)
    with soak.not_judged_by_priority():
        rename(soak, lane, ASIDE + lane, instead="no stream")
        with suppress(AssertionError):
            wait_until(lambda: refused(soak), seconds=5)
        put_back(soak, lane)


def put_back(soak: Soak, lane: str) -> None:
    """Give a lane its name back, and wait for the events that were refused."""
    rename(soak, ASIDE + lane, lane)
    wait_until(lambda: not refused(soak))


def rename(soak: Soak, old: str, new: str, instead: str = "") -> None:
    """Rename a key, over another if need be, and put something else in its place, in one step."""
    with soak.redis.pipeline(transaction=True) as pipeline:
        pipeline.rename(old, new)
        if instead:
            pipeline.set(old, instead)
        pipeline.execute()


def refused(soak: Soak) -> int:
    return soak.sql("SELECT count(*) FROM outbox WHERE attempts > 0")[0][0]


def out_of_memory(soak: Soak) -> None:
    """Room for a few entries more, so that it ends in the middle of a batch."""
    used = soak.redis.info("memory")["used_memory"]
    soak.redis.config_set("maxmemory", used + soak.chance.randint(1_000, 30_000))
    soak.lasts(1)
    soak.redis.config_set("maxmemory", 0)


def postgres_killed(soak: Soak) -> None:
    soak.wait_for_publish()
    with soak.commits_may_fail():
        soak.database.kill()
        soak.database.restart()


def redis_killed(soak: Soak) -> None:
    soak.wait_for_publish()
    soak.broker.kill()
    soak.restart_broker()
    soak.doubt()


def redis_tail_cut(soak: Soak) -> None:
    """Redis goes back in time by some of its newest commands."""
    soak.broker.kill()
    cut_tail(soak.broker.folder, soak.chance)
    soak.restart_broker()
    for lane in LANES:  # the end of `events_refused` may have been among them
        if soak.redis.exists(ASIDE + lane):
            with soak.not_judged_by_priority():
                put_back(soak, lane)
    soak.doubt()


FAULTS = {
    "kill -9 of a relay": relay_killed,
    "SIGSTOP of the leading relay": relay_frozen,
    "kill -9 of a consumer": consumer_killed,
    "SIGSTOP of a consumer": consumer_frozen,
    "pg_terminate_backend": backends_terminated,
    "CLIENT KILL": clients_killed,
    "SCRIPT FLUSH": scripts_flushed,
    "connections cut": connections_cut,
    "a network that drops everything": network_withheld,
    "replies lost": replies_lost,
    "events refused": events_refused,
    "Redis out of memory": out_of_memory,
    "kill -9 of PostgreSQL": postgres_killed,
    "kill -9 of Redis": redis_killed,
    "kill -9 of Redis, its tail cut": redis_tail_cut,
}
