"""Replicas that take over, of both servers. Clients follow by a proxy, as by an address that moves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psycopg
from redis import Redis
from sqlalchemy import make_url

from outbox import testing
from tests.acceptance.harness import wait_until
from tests.faults.proxy import Proxy
from tests.faults.scenario import Scenario
from tests.faults.trial import Trial, at_port

AT_ONCE = {"repl-diskless-sync-delay": "0"}


def redis_lags(trial: Trial) -> None:
    """The replica does not hear of the newest batches before it takes over."""
    link = trial.enter(Proxy(trial.broker.port))
    master, replica = trial.broker, trial.enter(testing.redis(AT_ONCE))
    with trial.under_load():
        for _ in trial.rounds():
            link.target = master.port
            follow(replica, master, link)
            link.withhold()
            trial.let_pass(trial.chance.randint(50, 400))
            trial.wait_for_publish()
            master.kill()
            link.cut()
            link.flow()
            with Redis.from_url(replica.url) as client:
                client.replicaof("NO", "ONE")
            trial.to_broker.target = replica.port
            trial.to_broker.cut()
            trial.recovers()
            master.restart()
            master, replica = replica, master


def follow(replica: testing.Server, master: testing.Server, link: Proxy) -> None:
    """Make a Redis the replica of another, and wait until it has all that this one has."""
    with Redis.from_url(replica.url) as to, Redis.from_url(master.url) as of:
        to.replicaof("127.0.0.1", str(link.port))
        wait_until(lambda: to.info("replication")["master_link_status"] == "up", "the replica")
        goal = of.info("replication")["master_repl_offset"]
        wait_until(lambda: to.info("replication")["slave_repl_offset"] >= goal, "the replica's offset")


def postgres_fails_over(trial: Trial) -> None:
    """Each commit waits for the standby, so that none is lost."""
    primary = trial.database
    with trial.under_load():
        for _ in trial.rounds():
            standby = standby_of(trial, primary, trial.enter(Proxy(primary.port)))
            execute(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'")
            execute(primary, "SELECT pg_reload_conf()")
            state = "SELECT sync_state FROM pg_stat_replication"
            wait_until(lambda: execute(primary, state) == [("sync",)], "the standby")  # noqa: B023
            trial.let_pass(100)
            trial.wait_for_publish()
            promote(trial, standby, instead_of=primary)
            primary = standby


def postgres_loses_commits(trial: Trial) -> None:
    """The standby does not hear of the newest commits before it takes over: Redis is ahead by some batches."""
    primary = trial.database
    with trial.under_load():
        for _ in trial.rounds():
            link = trial.enter(Proxy(primary.port))
            standby = standby_of(trial, primary, link)
            behind = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn) FROM pg_stat_replication"
            wait_until(lambda: execute(primary, behind), "the standby")  # noqa: B023
            link.withhold()
            trial.let_pass(60)
            primary.kill()
            link.cut()
            link.flow()
            promote(trial, standby, instead_of=primary)
            primary = standby


def promote(trial: Trial, standby: testing.Server, instead_of: testing.Server) -> None:
    """Kill a primary, and have its standby take its place."""
    instead_of.kill()
    execute(standby, "SELECT pg_promote()")
    trial.to_database.target = standby.port
    trial.to_database.cut()
    trial.recovers()


def standby_of(trial: Trial, primary: testing.Server, link: Proxy) -> testing.Server:
    """Start a PostgreSQL on a copy of another's data, which follows it through the link."""
    standby = trial.enter(testing.postgres())
    standby.kill()
    data = standby.folder / "data"
    owner = data.stat()
    shutil.rmtree(data)
    url = make_url(primary.url)
    program = Path(testing.find_postgres().path).with_name("pg_basebackup")
    subprocess.run(
        [program, "-D", data, "-h", url.host, "-p", str(link.port), "-U", url.username, "-R", "-c", "fast"],
        env=os.environ | {"PGPASSWORD": url.password},
        check=True,
        capture_output=True,
    )
    for path in (data, *data.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
    standby.url = at_port(primary.url, standby.port)
    standby.restart()
    return standby


def execute(server: testing.Server, query: str) -> list[tuple]:
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


SCENARIOS = (
    Scenario(
        name="redis-failover",
        what="a Redis replica that lags is promoted",
        inflict=redis_lags, short=4, long=50, control="lost", between="everybody", redis=AT_ONCE,
    ),
    Scenario(
        name="postgres-failover",
        what="a synchronous PostgreSQL standby is promoted",
        inflict=postgres_fails_over, short=3, long=20, control="repeated", control_times=8,
        between="everybody", commits_may_fail=True,
    ),
    Scenario(
        name="postgres-loses-commits",
        what="a PostgreSQL standby that lags is promoted",
        inflict=postgres_loses_commits, short=1, long=10, control="repeated",
        between="everybody", commits_may_fail=True, journal_is_whole=False, forgets=True, within=10,
    ),
)  # fmt: skip
