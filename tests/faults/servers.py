"""Faults of PostgreSQL and Redis themselves."""

from __future__ import annotations

from outbox import testing
from tests.acceptance.harness import LANES, SERVICE
from tests.faults.aof import cut_tail
from tests.faults.scenario import Scenario
from tests.faults.trial import Trial

ON_DISK = {"appendonly": "yes", "appendfsync": "everysec", "auto-aof-rewrite-percentage": "0"}
LONGEST_SECONDS = 8.0  # of a freeze: longer than a relay waits for a server, or another for its lock
OF_RELAYS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name <> %s
"""


def postgres_killed(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            trial.wait_for_publish()
            trial.database.kill()
            trial.database.restart()
            trial.recovers()


def backends_terminated(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            trial.wait_for_publish()
            trial.sql(OF_RELAYS, SERVICE)
            trial.recovers()


def redis_killed(trial: Trial) -> None:
    """What its log has may not be sent twice; what it had not written yet may not be lost."""
    with trial.under_load():
        for n in trial.rounds():
            if n % 2:
                trial.wait_for_publish()
            trial.broker.kill()
            trial.broker.restart()
            trial.recovers()


def tail_cut(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            trial.broker.kill()
            cut_tail(trial.broker.folder, trial.chance)
            trial.broker.restart()
            trial.recovers()


def tail_torn(trial: Trial) -> None:
    """The cut goes through a script; a second restart shows whether its half has come back."""
    with trial.under_load():
        for _ in trial.rounds():
            trial.broker.kill()
            cut_tail(trial.broker.folder, trial.chance, inside=not trial.naive)
            trial.broker.restart()
            trial.recovers()
            trial.broker.kill()
            trial.broker.restart()
            trial.recovers()


def postgres_frozen(trial: Trial) -> None:
    """All its processes; every other time the relay is killed meanwhile, in the middle of what it has sent."""
    freeze(trial, trial.database)


def redis_frozen(trial: Trial) -> None:
    """What was sent before it froze arrives when it thaws, though its relay has given up, or is dead."""
    freeze(trial, trial.broker)


def freeze(trial: Trial, server: testing.Server) -> None:
    with trial.under_load():
        for n in trial.rounds():
            trial.wait_for_publish()
            server.freeze()
            trial.lasts(trial.chance.uniform(0.0, LONGEST_SECONDS))
            if n % 2:
                trial.replace(trial.relays[0])
                trial.lasts(trial.chance.uniform(0.0, 1.0))
            server.thaw()
            trial.recovers()


def redis_emptied(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            trial.broker.kill()
            trial.broker.restart()
            trial.recovers()


def redis_down(trial: Trial) -> None:
    """`times` is the length of the outage in seconds."""
    with trial.under_load():
        trial.let_pass(500)
        trial.wait_for_publish()
        trial.broker.kill()
        trial.lasts(trial.times)
        attempts = trial.sql("SELECT coalesce(sum(attempts), 0)::int FROM outbox")[0][0]
        trial.complain_unless(attempts == 0, "attempts spent")
        trial.broker.restart()
        trial.recovers()
        trial.done = trial.times


def out_of_memory(trial: Trial) -> None:
    """Room for a few entries more, so that it ends in the middle of a batch."""
    with trial.under_load():
        for _ in trial.rounds():
            used = trial.redis.info("memory")["used_memory"]
            trial.redis.config_set("maxmemory", used + trial.chance.randint(1_000, 30_000))
            trial.lasts(1)
            trial.redis.config_set("maxmemory", 0)
            trial.recovers()


def lane_deleted(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            lane = trial.chance.choice(LANES)
            trial.redis.delete(lane)
            trial.recovers()
            trial.let_pass(200)


def clients_killed(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            if trial.chance.random() < 0.5:
                trial.wait_for_publish()
            trial.redis.client_kill_filter(_type="normal", skipme=True)
            trial.recovers()


def scripts_flushed(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            trial.redis.script_flush()
            trial.recovers()


SCENARIOS = (
    Scenario(
        name="postgres-killed",
        what="kill -9 of PostgreSQL, crash recovery",
        inflict=postgres_killed, short=6, long=60, control="repeated", commits_may_fail=True,
    ),
    Scenario(
        name="backends-terminated",
        what="pg_terminate_backend of the relay's connections",
        inflict=backends_terminated, short=15, long=300, control="repeated",
    ),
    Scenario(
        name="redis-killed",
        what="kill -9 of Redis, which keeps its log",
        inflict=redis_killed, short=8, long=100, control="repeated", control_times=40, redis=ON_DISK,
    ),
    Scenario(
        name="redis-tail-cut",
        what="kill -9 of Redis, and the tail of its log cut away",
        inflict=tail_cut, short=8, long=100, control="lost", redis=ON_DISK,
    ),
    Scenario(
        name="redis-tail-torn",
        what="the same, cut inside a script, and a second restart",
        inflict=tail_torn, short=5, long=50, control="lost", redis=ON_DISK,
    ),
    Scenario(
        name="postgres-frozen",
        what="SIGSTOP of PostgreSQL, for up to 8 s, and kill -9 of the relay",
        inflict=postgres_frozen, short=4, long=50, control="repeated", control_times=8,
    ),
    Scenario(
        name="redis-frozen",
        what="SIGSTOP of Redis, for up to 8 s, and kill -9 of the relay",
        inflict=redis_frozen, short=4, long=50, control="repeated", control_times=8,
    ),
    Scenario(
        name="redis-emptied",
        what="Redis restarted empty",
        inflict=redis_emptied, short=3, long=20, control="lost",
    ),
    Scenario(
        name="redis-down",
        what="an outage of Redis",
        inflict=redis_down, short=20, long=600, unit=" s", control="repeated", redis=ON_DISK,
    ),
    Scenario(
        name="redis-out-of-memory",
        what="Redis out of memory in the middle of a batch",
        inflict=out_of_memory, short=4, long=40, control="repeated",
    ),
    Scenario(
        name="lane-deleted",
        what="one stream deleted, the state survives",
        inflict=lane_deleted, short=4, long=30, control="lost", may_say={"streams_lost"},
    ),
    Scenario(
        name="clients-killed",
        what="CLIENT KILL of the relay's connections",
        inflict=clients_killed, short=15, long=300, control="", why="Redis runs a short pipeline in one go",
    ),
    Scenario(
        name="scripts-flushed",
        what="SCRIPT FLUSH",
        inflict=scripts_flushed, short=10, long=200, control="", why="a naive relay has no script",
    ),
)  # fmt: skip
