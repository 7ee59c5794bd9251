"""`outbox-relay bench` on real servers: what it prints, and that nothing of it is left, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import statistics
import subprocess
import termios
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

from outbox import measure
from tests.acceptance.harness import wait_until
from tests.faults.proxy import Proxy
from tests.integration.box import Box
from tests.integration.conftest import Invoke, Start
from tests.pgbouncer import PGBOUNCER, pgbouncer
from tests.roles import role_url

PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def short(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure briefly: what comes out is not looked at."""
    for name, value in {"ROUNDS": 3, "PROBES": 10, "SINGLE_COMMITS": 5}.items():
        monkeypatch.setattr(measure, name, value)


@pytest.fixture
def variables(database_url: str, redis_url: str) -> dict[str, str]:
    return {"OUTBOX_DATABASE_URL": database_url, "OUTBOX_REDIS_URL": redis_url}


@pytest.fixture
def bench(invoke: Invoke) -> Invoke:
    return partial(invoke, "bench", "--events", "1000")


@pytest.fixture
def long_bench(start: Start) -> Callable[[], subprocess.Popen[str]]:
    return partial(start, "bench", "--events", "50000")


def left(box: Box) -> list[str]:
    """Return the schemas and the keys of measurements."""
    schemas = box.sql.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'outbox\\_bench%'")
    return [*(name for (name,) in schemas), *(key.decode() for key in box.redis.scan_iter("*outbox_bench*"))]


def publishes(box: Box) -> bool:
    """Return whether the relay of a measurement has published something."""
    return any(key.endswith((":events", ":backfill")) and box.redis.xlen(key) for key in left(box))


# -- what it prints --------------------------------------------------------------------------------


def test_it_says_what_it_measured_and_what_bounds_it(bench: Invoke) -> None:
    result = bench("--bytes", "100")
    assert result.exit_code == 0, result.output
    for part in ("database: PostgreSQL ", "redis: ", "round trip", "commit ", "entries/s", "latency: p50",
                 "3 rounds of 1,000 events of 100 bytes", "PostgreSQL works on statements", "bound"):  # fmt: skip
        assert part in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110
    assert result.stderr == ""


def test_its_json_adds_up_and_its_help_documents_the_keys(bench: Invoke) -> None:
    result = bench("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["relay"]["events_per_second"] == round(statistics.median(found["relay"]["rounds"]))
    assert len(found["relay"]["rounds"]) == 3
    assert found["relay"]["batches"] >= 3
    assert found["latency"]["events"] == 5
    assert all(0 <= share <= 1 for share in found["shares"].values())
    text = bench("--help").stdout
    for key, value in found.items():
        assert key in text
        for inner in value if isinstance(value, dict) else ():
            assert inner in text


def test_a_redis_that_does_not_tell_its_cpu_leaves_that_share_unknown(
    bench: Invoke, redis_url: str, redis: Any
) -> None:
    user = f"bench-{uuid4().hex}"
    redis.execute_command("ACL", "SETUSER", user, "on", ">canary", "~*", "&*", "+@all", "-info")
    try:
        url = make_url(redis_url).set(username=user, password="canary")
        result = bench("--json", OUTBOX_REDIS_URL=url.render_as_string(hide_password=False))
    finally:
        redis.execute_command("ACL", "DELUSER", user)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shares"]["redis"] is None
    assert "canary" not in result.output


@pytest.mark.parametrize("rule", [{"OUTBOX_THRESHOLD": "200"}, {"OUTBOX_LANES": "off"}], ids=str)
def test_it_follows_the_rule_of_the_lanes(bench: Invoke, box: Box, rule: dict[str, str]) -> None:
    result = bench(**rule)
    assert result.exit_code == 0, result.output
    assert left(box) == []


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")
def test_it_works_behind_a_transaction_pooling_proxy(bench: Invoke, box: Box, database_url: str) -> None:
    with pgbouncer(database_url, connections=5) as behind:
        result = bench("--json", OUTBOX_DATABASE_URL=behind)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shares"]["postgresql"] is not None
    assert left(box) == []


def test_a_slow_network_is_seen(bench: Invoke, database_url: str, redis_url: str) -> None:
    database, cache = make_url(database_url), make_url(redis_url)
    assert database.port
    assert cache.port
    with Proxy(database.port) as to_database, Proxy(cache.port) as to_cache:
        to_database.delay_seconds = to_cache.delay_seconds = 0.01
        urls = (database.set(port=to_database.port), cache.set(port=to_cache.port))
        behind = [url.render_as_string(hide_password=False) for url in urls]
        result = bench("--json", OUTBOX_DATABASE_URL=behind[0], OUTBOX_REDIS_URL=behind[1])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["postgresql"]["round_trip_ms"] >= 20
    assert found["redis"]["round_trip_ms"] >= 20
    assert found["shares"]["between"] == max(share for share in found["shares"].values() if share is not None)


# -- what it refuses, before it makes anything -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--events", "0"], "--events"),
        (["--events", "many"], "--events"),
        (["--bytes", "1000000"], "--bytes"),
        (["--events", "1000000", "--bytes", "60000"], "--events times --bytes"),
        (["--batch-size", "0"], "--batch-size"),
        (["--schema", "x"], "--schema"),
        (["--redis-prefix", "a key"], "--redis-prefix"),
    ],
)
def test_wrong_arguments_are_refused_by_name(bench: Invoke, arguments: list[str], part: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    assert part in result.stderr


def test_a_role_that_may_not_make_a_schema_is_told_what_it_needs(
    bench: Invoke, box: Box, roles: dict[str, str], database_url: str
) -> None:
    result = bench(OUTBOX_DATABASE_URL=role_url(database_url, "relay"))
    assert result.exit_code == 1
    assert f"GRANT CREATE ON DATABASE {make_url(database_url).database} TO " in result.stderr.replace('"', "")
    assert left(box) == []


def test_a_redis_user_who_may_not_delete_its_keys_is_refused(
    bench: Invoke, box: Box, redis_url: str, redis: Any
) -> None:
    user = f"bench-{uuid4().hex}"
    redis.execute_command("ACL", "SETUSER", user, "on", ">canary", "~*", "&*", "+@all", "-unlink")
    try:
        url = make_url(redis_url).set(username=user, password="canary")
        result = bench(OUTBOX_REDIS_URL=url.render_as_string(hide_password=False))
    finally:
        redis.execute_command("ACL", "DELUSER", user)
    assert result.exit_code == 3
    assert "unlink" in result.stderr
    assert left(box) == []


def test_a_read_only_database_is_refused_with_5(bench: Invoke, box: Box, database_url: str) -> None:
    name = make_url(database_url).database
    box.sql.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    result = bench()
    assert result.exit_code == 5
    assert "read-only" in result.stderr


@pytest.mark.parametrize(
    ("info", "code", "part"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, 5, "allkeys-lru"),
        ({"maxmemory": 1_000_000, "used_memory": 500_000}, 3, "--events"),
    ],
    ids=["evicts", "full"],
)
def test_a_redis_that_evicts_or_is_full_is_refused(
    bench: Invoke, box: Box, monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], code: int, part: str
) -> None:
    # The settings of a server that other tests use are not to be changed.
    monkeypatch.setattr("redis.Redis.info", lambda *_: info)
    result = bench()
    assert result.exit_code == code, result.output
    assert part in result.stderr
    assert left(box) == []


def test_without_a_database_the_variable_is_named(bench: Invoke) -> None:
    result = bench(OUTBOX_DATABASE_URL="")
    assert result.exit_code == 2
    assert "OUTBOX_DATABASE_URL" in result.stderr


def test_an_unreachable_database_ends_with_3(bench: Invoke) -> None:
    result = bench(OUTBOX_DATABASE_URL="postgresql://u@127.0.0.1:1/d")
    assert result.exit_code == 3
    assert "Error: PostgreSQL" in result.stderr


def test_an_unreachable_redis_ends_with_3(bench: Invoke, box: Box) -> None:
    result = bench(OUTBOX_REDIS_URL="redis://127.0.0.1:1")
    assert result.exit_code == 3
    assert "Redis" in result.stderr
    assert left(box) == []


# -- what is left ----------------------------------------------------------------------------------


def test_it_leaves_nothing_and_touches_no_other_outbox(bench: Invoke, box: Box) -> None:
    box.add("mine")
    box.redis.xadd("s", {"mine": "too"})
    before = (box.waiting(), box.batch(), box.photograph())
    assert bench().exit_code == 0
    assert left(box) == []
    assert (box.waiting(), box.batch(), box.photograph()) == before


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_leaves_nothing(
    long_bench: Callable[[], subprocess.Popen[str]], box: Box, number: signal.Signals, times: int
) -> None:
    process = long_bench()
    wait_until(lambda: publishes(box))
    for _ in range(times):
        process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (128 + number, "")
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert left(box) == []


def test_a_terminal_that_is_closed_leaves_nothing(start: Start, box: Box) -> None:
    master, slave = pty.openpty()
    process = start(
        "bench", "--events", "50000", stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    wait_until(lambda: publishes(box))
    os.close(master)
    process.wait(PATIENCE_SECONDS)
    assert left(box) == []


def test_a_hangup_that_nohup_ignores_is_ignored(start: Start, box: Box) -> None:
    process = start(
        "bench", "--events", "50000", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_until(lambda: publishes(box))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert left(box) == []


def test_a_second_signal_ends_a_stage_that_hangs_and_leaves_nothing(
    long_bench: Callable[[], subprocess.Popen[str]], box: Box
) -> None:
    def signal_again() -> None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # at a signal every 0.1 s, psycopg goes on waiting and lets no handler run

    def waits(statement: str) -> bool:
        query = "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return any(waiting.startswith(statement) for (waiting,) in box.sql.execute(query))

    process = long_bench()
    wait_until(lambda: publishes(box))
    with psycopg.connect(box.database_url.replace("+psycopg", "")) as blocker:
        blocker.execute(f"LOCK TABLE {left(box)[0]}.outbox IN SHARE UPDATE EXCLUSIVE MODE")
        wait_until(lambda: waits("VACUUM"))
        process.send_signal(signal.SIGINT)
        wait_until(lambda: signal_again() or waits("DROP SCHEMA"))
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert left(box) == []


def test_an_error_in_the_middle_leaves_nothing(
    long_bench: Callable[[], subprocess.Popen[str]], box: Box
) -> None:
    process = long_bench()
    wait_until(lambda: publishes(box))
    box.sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'outbox-relay-bench' AND datname = current_database()"
    )
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 3, errors
    assert "PostgreSQL" in errors
    assert "Traceback" not in errors
    assert left(box) == []


def test_what_a_kill_leaves_would_be_seen(long_bench: Callable[[], subprocess.Popen[str]], box: Box) -> None:
    process = long_bench()
    wait_until(lambda: publishes(box))
    process.kill()
    process.communicate()
    schema, *keys = left(box)
    assert keys
    box.sql.execute(f"DROP SCHEMA {schema} CASCADE")
    box.redis.unlink(*keys)
    assert left(box) == []
