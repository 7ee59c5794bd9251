"""Replicas that take over, of both servers. Clients follow by a proxy, as by an address that moves."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from redis import Redis, RedisError
from sqlalchemy import make_url

from outbox import testing
from tests.acceptance.harness import wait_until
from tests.faults.proxy import Proxy
from tests.faults.scenario import Scenario
from tests.faults.trial import Trial, at_port

AT_ONCE = {"repl-diskless-sync-delay": "0"}
MAIN = "main"  # the sentinels' name of the master
SENTINEL = """
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor {name} 127.0.0.1 {master} 2
sentinel down-after-milliseconds {name} 1000
sentinel failover-timeout {name} 2000
"""


def redis_lags(trial: Trial) -> None:
    """The replica does not hear of the newest batches before it takes over."""
    link = trial.enter(Proxy(trial.broker.port))
    master, replica = trial.broker, trial.enter(testing.redis(AT_ONCE))
    with trial.under_load():
        for _ in trial.rounds():
            link.target = master.port
            follow(replica, master, link.port)
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


def follow(replica: testing.Server, master: testing.Server, port: int) -> None:
    """Make a Redis the replica of another, through this port, and wait until it has all that this one has."""
    with Redis.from_url(replica.url) as to, Redis.from_url(master.url) as of:
        to.replicaof("127.0.0.1", str(port))
        wait_until(lambda: to.info("replication")["master_link_status"] == "up", "the replica")
        goal = of.info("replication")["master_repl_offset"]
        wait_until(lambda: to.info("replication")["slave_repl_offset"] >= goal, "the replica's offset")


def sentinels_fail_over(trial: Trial) -> None:
    """By force, while the old master goes on for a moment, and by kill -9 of the master; in turns."""
    one, other = trial.broker, trial.enter(testing.redis(AT_ONCE))
    follow(other, one, one.port)
    sentinels = [trial.enter(sentinel(one.port)) for _ in range(3)]
    trial.enter(followed(trial.to_broker, sentinels[0]))
    with trial.under_load():
        for n in trial.rounds():
            master, replica = (one, other) if trial.to_broker.target == one.port else (other, one)
            with Redis.from_url(sentinels[0].url) as client:
                wait_until(lambda: is_ready(client), "a replica that the sentinels may promote")
                trial.wait_for_publish()
                if n % 2:
                    master.kill()
                else:
                    client.sentinel_failover(MAIN)
            wait_until(lambda: trial.to_broker.target == replica.port, "a failover")  # noqa: B023
            trial.recovers()
            if n % 2:
                master.restart()
                follow(master, replica, replica.port)


def sentinel(port: int) -> testing.Server:
    """Start a sentinel for the master on a port."""
    binary = testing.find_redis()

    def start(own_port: int) -> testing.Server:
        folder = testing._folder("sentinel")
        settings = folder / "sentinel.conf"  # which it writes to
        settings.write_text(SENTINEL.format(port=own_port, folder=folder, name=MAIN, master=port))
        server = testing._Redis(binary.source)
        server.port, server.url = own_port, f"redis://127.0.0.1:{own_port}/0"
        server._supervise([binary.path, str(settings), "--sentinel"], folder, testing._Account())
        return server

    return testing._on_free_port(start)


def is_ready(client: Redis) -> bool:
    """Return whether enough sentinels agree on the master, and on a replica that is well."""
    with suppress(RedisError):
        client.execute_command("SENTINEL", "CKQUORUM", MAIN)
        master, replicas = client.sentinel_master(MAIN), client.sentinel_slaves(MAIN)
        flags = [replica["flags"] for replica in replicas if replica["master-link-status"] == "ok"]
        return master["flags"] == "master" and flags == ["slave"] and int(master["num-other-sentinels"]) == 2
    return False


@contextmanager
def followed(proxy: Proxy, sentinel: testing.Server) -> Iterator[None]:
    """Let a proxy lead to the master that a sentinel names, while the block runs."""
    end = threading.Event()

    def follow_it() -> None:
        with Redis.from_url(sentinel.url) as client:
            while not end.wait(0.05):
                port = int(client.sentinel_get_master_addr_by_name(MAIN)[1])
                if port != proxy.target:
                    proxy.target = port
                    proxy.cut()

    thread = threading.Thread(target=follow_it)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


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
        name="redis-sentinels",
        what="sentinels promote a Redis replica: by force, and as the master is killed",
        inflict=sentinels_fail_over, short=4, long=50, control="lost", between="everybody", redis=AT_ONCE,
        within=30,
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
        may_say={"commits_lost"},
    ),
)  # fmt: skip
