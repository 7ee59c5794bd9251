"""The command line on real servers: exit codes, output, signals, and that no password shows."""

from __future__ import annotations

import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

from outbox import cli
from outbox.report import Lines
from outbox.settings import FIELDS, safe_url
from outbox.store import Store
from tests.faults.proxy import Proxy
from tests.integration.box import Box
from tests.integration.conftest import Invoke, Start
from tests.roles import as_role, role_url

NOWHERE = "127.0.0.1:1"  # nothing listens there
DEAD_ID = "6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c"
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
PATIENCE_SECONDS = 30
PROMPT = b"? [y/N]: "


pytestmark = pytest.mark.usefixtures("no_settings")


@pytest.fixture
def stream() -> str:
    return f"cli-{uuid4().hex}"


@pytest.fixture
def variables(database_url: str, redis_url: str) -> dict[str, str]:
    return {"OUTBOX_DATABASE_URL": as_role(database_url, "relay"), "OUTBOX_REDIS_URL": redis_url}


def read_until(process: subprocess.Popen[str], part: str, stream: str = "stderr") -> str:
    """Return the output up to the first line with `part` in it."""
    lines = []
    for line in getattr(process, stream):
        lines.append(line)
        if part in line:
            return "".join(lines)
    raise AssertionError(f"it ended without {part!r}: {''.join(lines)}")


def eventually(question: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (answer := question()):
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)
    return answer


def execute(database_url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with connect(database_url) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def connect(database_url: str) -> psycopg.Connection[Any]:
    url = make_url(database_url).set(drivername="postgresql")
    return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)


def record(database_url: str, stream: str, *, priority: int = 0, more: str = "") -> None:
    columns, _, value = more.partition("=")
    execute(
        database_url,
        f"INSERT INTO outbox (stream, type, key, priority, payload{columns and ', ' + columns}) "
        f"VALUES (%s, 'Note', 'k', %s, '{{}}'{value and ', ' + value})",
        stream,
        priority,
    )


def bury(database_url: str, event_id: str, stream: str, payload: str = "{}") -> None:
    execute(
        database_url,
        "INSERT INTO outbox_dead (event_id, stream, type, key, priority, created_at, payload, "
        "attempts, reason) VALUES (%s, %s, 'Note', '[red]key', 7, now(), %s, 10, %s)",
        event_id,
        stream,
        payload,
        "ERR refused \x1b[31m for a reason",
    )


# -- help and usage --------------------------------------------------------------------------------


def paths(command: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    for name, sub in getattr(command, "commands", {}).items():
        yield from paths(sub, *words, name)


@pytest.mark.parametrize("words", list(paths(cli.cli)), ids=" ".join)
def test_every_command_has_help_with_an_example_that_fits_the_screen(
    invoke: Invoke, words: tuple[str, ...]
) -> None:
    result = invoke(*words, "--help", COLUMNS="80")
    assert result.exit_code == 0
    assert f"\n    outbox-relay {' '.join(words)}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_documents_the_exit_codes() -> None:
    text = CliRunner().invoke(cli.cli, ["run", "--help"]).stdout
    assert cli.__doc__
    for code in ("0", "1", "2", "3", "4", "5", "128+n"):
        assert f"\n    {code} " in text
        assert f"| {code} |" in cli.__doc__


def test_run_has_an_option_for_every_setting(invoke: Invoke) -> None:
    text = invoke("run", "--help").stdout
    for name in FIELDS:
        assert f"--{name.replace('_', '-')} " in text


@pytest.mark.parametrize(
    "arguments",
    [["migrate"], ["dead", "list"], ["dead", "show", DEAD_ID], ["dead", "retry", "--all"],
     ["dead", "drop", "--all", "--yes"]],
    ids=" ".join,
)  # fmt: skip
def test_a_command_without_redis_has_no_flag_for_it_and_does_not_mind_its_settings(
    invoke: Invoke, database_url: str, stream: str, tmp_path: Path, arguments: list[str]
) -> None:
    bury(database_url, DEAD_ID, stream)
    for flag, value in (("--redis-url", f"redis://{NOWHERE}"), ("--redis-prefix", "p")):
        refused = invoke(*arguments, flag, value)
        assert refused.exit_code == 2
        assert "No such option" in refused.stderr
        assert flag in refused.stderr
    config = tmp_path / "relay.toml"
    config.write_text('redis_prefix = "p"')
    env = {"OUTBOX_DATABASE_URL": database_url, "OUTBOX_REDIS_URL": f"redis://{NOWHERE}"}
    result = invoke(*arguments, "--config", str(config), **env)
    assert result.exit_code == 0, result.output


def test_grants_connect_to_no_redis_and_have_no_flag_for_its_url(invoke: Invoke) -> None:
    text = invoke("grants", "--help").stdout
    assert "--redis-prefix " in text
    assert "--redis-url " not in text


def test_help_of_status_documents_the_keys_of_its_json(invoke: Invoke) -> None:
    text = invoke("status", "--help").stdout
    for key in json.loads(invoke("status", "--json").stdout):
        assert key in text


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"outbox-relay {cli.version()}\n"


@pytest.mark.parametrize(
    ("arguments", "env", "parts"),
    [
        (["rnu"], {}, ["rnu", "'run'"]),
        (["run", "--batch-sise", "3"], {}, ["--batch-sise", "--batch-size"]),
        (["run", "--batch-size", "many"], {}, ["--batch-size", "many"]),
        (["run", "--batch-size", "0"], {}, ["--batch-size", "at least 1"]),
        (["run", "--timeout", "3"], {}, ["--timeout", "--once"]),
        (["run", "--config", "no/such.toml"], {}, ["no/such.toml"]),
        (["status"], {"OUTBOX_BATCH_SISE": "3"}, ["OUTBOX_BATCH_SISE", "mean OUTBOX_BATCH_SIZE?\n"]),
        (
            ["run"],
            {"OUTBOX_TRACE": "/no/such"},
            ["Error: OUTBOX_TRACE: '/no/such' cannot be opened: No such file or directory.\n"],
        ),
        (["status"], {"OUTBOX_BATCH_SIZE": "x"}, ["OUTBOX_BATCH_SIZE", "'x'"]),
        (["status"], {"OUTBOX_REDIS_URL": "redis://h?nonsense=1"}, ["redis_url"]),
        (
            ["status"],
            {"OUTBOX_DATABASE_URL": "postgresql://h/d?nonsense=1"},
            ["database_url", "nonsense"],
        ),
        (["dead", "show", "x"], {}, ["EVENT_ID", "UUID"]),
        (["dead", "retry", "x"], {}, ["EVENT_ID", "UUID"]),
        (["dead", "retry"], {}, ["--all"]),
        (["dead", "retry", UNKNOWN_ID, "--all"], {}, ["--all"]),
        (["dead", "drop", "--all"], {}, ["--yes"]),
    ],
)
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(
    invoke: Invoke, arguments: list[str], env: dict[str, str], parts: list[str]
) -> None:
    result = invoke(*arguments, **env)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "--once"], ["migrate"], ["status"], ["prune"], ["dead", "list"],
     ["dead", "drop", "--all", "--yes"]],
    ids=" ".join,
)  # fmt: skip
def test_without_a_database_the_variable_is_named(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments, OUTBOX_DATABASE_URL="")
    assert result.exit_code == 2
    assert "OUTBOX_DATABASE_URL" in result.stderr
    assert "postgresql://" in result.stderr


def test_flags_come_before_variables_before_the_file(invoke: Invoke, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text("batch_size = 11\nthreshold = 11\npoll_seconds = 1")
    result = invoke(
        "run", "--once", "--batch-size", "33", "--config", str(config),
        OUTBOX_BATCH_SIZE="22", OUTBOX_THRESHOLD="22",
    )  # fmt: skip
    assert "batch_size=33" in result.stderr
    assert "threshold=22" in result.stderr


# -- servers ---------------------------------------------------------------------------------------

DATABASE_COMMANDS = [
    ["run", "--once", "--timeout", "0"],
    ["migrate"],
    ["status"],
    ["prune"],
    ["dead", "list"],
    ["dead", "show", DEAD_ID],
    ["dead", "retry", "--all"],
    ["dead", "drop", "--all", "--yes"],
]


@pytest.mark.parametrize("arguments", DATABASE_COMMANDS, ids=" ".join)
def test_an_unreachable_database_ends_with_3_and_one_sentence(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments, OUTBOX_DATABASE_URL=f"postgresql://u@{NOWHERE}/d")
    assert result.exit_code == 3, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "PostgreSQL" in errors[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [["run"], *(command for command in DATABASE_COMMANDS if command != ["migrate"])],
    ids=" ".join,
)
def test_missing_tables_end_with_4_and_what_to_do(
    empty_database_url: str, invoke: Invoke, arguments: list[str]
) -> None:
    result = invoke(*arguments, OUTBOX_DATABASE_URL=empty_database_url)
    assert result.exit_code == 4, result.output
    assert "outbox-relay migrate" in result.stderr


def test_unreachable_redis_ends_run_once_with_3(invoke: Invoke, database_url: str, stream: str) -> None:
    record(database_url, stream)
    result = invoke("run", "--once", "--timeout", "0", OUTBOX_REDIS_URL=f"redis://{NOWHERE}")
    assert result.exit_code == 3
    assert "Redis" in result.stderr
    assert "0 events published" in result.stderr


@pytest.mark.parametrize("once", [[], ["--once"]])
def test_a_read_only_database_is_refused_with_5(invoke: Invoke, database_url: str, once: list[str]) -> None:
    name = make_url(database_url).database
    execute(database_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    result = invoke("run", *once)
    assert result.exit_code == 5
    assert "read-only" in result.stderr


@pytest.mark.parametrize("once", [[], ["--once"]])
def test_a_redis_that_evicts_is_refused_with_5(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, once: list[str]
) -> None:
    # The policy of a server that other tests use is not to be changed.
    info = {"maxmemory_policy": "allkeys-lru"}
    monkeypatch.setattr("redis.Redis.info", lambda *_: info)
    result = invoke("run", *once)
    assert result.exit_code == 5
    assert "allkeys-lru" in result.stderr


def test_a_redis_that_does_not_tell_its_policy_is_warned_of_once_and_used(
    invoke: Invoke, database_url: str, redis_url: str, redis: Any, stream: str
) -> None:
    record(database_url, stream)
    user = f"cli-{uuid4().hex}"
    redis.execute_command("ACL", "SETUSER", user, "on", ">canary", "~*", "&*", "+@all", "-info")
    try:
        url = make_url(redis_url).set(username=user, password="canary")
        restricted = url.render_as_string(hide_password=False)
        result = invoke("run", "--once", OUTBOX_REDIS_URL=restricted)
        state = json.loads(invoke("status", "--json", OUTBOX_REDIS_URL=restricted).stdout)
    finally:
        redis.execute_command("ACL", "DELUSER", user)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("redis_policy_unknown") == 1
    assert redis.xlen(stream) == 1
    assert state["redis"] == {"version": None, "batch": 1, "memory_used": 0.0, "error": None}


# -- run -------------------------------------------------------------------------------------------


def test_run_once_publishes_what_is_due_and_says_how_many(
    invoke: Invoke, database_url: str, redis: Any, stream: str
) -> None:
    for priority in (0, 0, -50):
        record(database_url, stream, priority=priority)
    result = invoke("run", "--once")
    assert result.exit_code == 0, result.output
    assert result.stdout == "published 3 events\n"
    assert (redis.xlen(stream), redis.xlen(f"{stream}:backfill")) == (2, 1)


def test_the_start_says_which_servers_and_how(invoke: Invoke, variables: dict[str, str]) -> None:
    database, redis = (safe_url(url) for url in variables.values())
    started = invoke("run", "--once", "--source", "shop").stderr.splitlines()[0]
    moment, level, action, *fields = started.split(" ")
    assert moment.endswith("Z")
    assert (level, action) == ("INFO", "relay_started")
    assert {f"database={database}", f"redis={redis}",
            "schema=public", "lanes=on", "threshold=0", "batch_size=2000",
            f"version={cli.version()}"} == {*fields}  # fmt: skip


def test_logs_may_be_json_and_quieter(invoke: Invoke) -> None:
    lines = invoke("run", "--once", "--log-format", "json").stderr.splitlines()
    records = [json.loads(line) for line in lines]
    assert [line["action"] for line in records] == ["relay_started", "relay_stopped"]
    assert {"time", "level", "action", "message"} <= records[0].keys()
    assert records[1]["published"] == 0
    assert invoke("run", "--once", "--log-level", "warning").stderr == ""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_call_of_somebody_that_cannot_be_written_raises_nothing(form: str, capsys: Any) -> None:
    handler = Lines(form == "json")
    for message, arguments, fields in (
        ("charged %d", ("12",), {}),
        ("paid", (), {"amount": Decimal("1.5"), "url": "postgresql://h/d?passfile=/canary"}),
    ):
        record = logging.makeLogRecord(
            {"msg": message, "args": arguments, "pathname": "shop.py", "fields": fields}
        )
        handler.emit(record)
    first, second = capsys.readouterr().err.splitlines()
    assert "shop.py:0: a message that cannot be written" in first
    assert ("1.5" in second, "canary" in second) == (True, False)
    if form == "json":
        assert json.loads(second)["url"].endswith("passfile=***")


def test_the_first_signal_ends_run_with_0(start: Start) -> None:
    process = start("run")
    read_until(process, "relay_started")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert "relay_stopped published=0" in errors


def test_ctrl_c_ends_run_with_0(start: Start) -> None:
    process = start("run")
    read_until(process, "relay_started")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 0


def test_the_second_signal_ends_run_at_once(start: Start, database_url: str, stream: str) -> None:
    record(database_url, stream)
    with connect(database_url) as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        process = start("run")
        eventually(
            lambda: execute(
                database_url,
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'outbox-relay' AND wait_event_type = 'Lock'",
            )
        )
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        # Which of two waiting signals is handled first is not said; the other ends it.
        assert process.wait(PATIENCE_SECONDS) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_run_stays_up_while_a_server_is_unreachable(start: Start) -> None:
    process = start("run", env={"OUTBOX_REDIS_URL": f"redis://{NOWHERE}"})
    read_until(process, "relay_backoff")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 0


def test_run_waits_for_a_database_that_is_unreachable_at_its_start(start: Start) -> None:
    process = start("run", env={"OUTBOX_DATABASE_URL": f"postgresql://u@{NOWHERE}/d"})
    read_until(process, "relay_backoff")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("once", [[], ["--once", "--timeout", "60"]], ids=["run", "run --once"])
@pytest.mark.parametrize("away", ["OUTBOX_DATABASE_URL", "OUTBOX_REDIS_URL"])
def test_a_server_that_is_away_at_the_start_is_said_to_be_back(
    start: Start, variables: dict[str, str], database_url: str, stream: str, away: str, once: list[str]
) -> None:
    record(database_url, stream)
    url = make_url(variables[away])
    assert url.port
    with Proxy(1) as proxy:
        behind = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        process = start("run", *once, env={away: behind})
        read_until(process, "relay_backoff")
        proxy.target = url.port
        read_until(process, "relay_recovered")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert "relay_stopped published=1" in errors


@pytest.mark.parametrize("name", ["OUTBOX_DATABASE_URL", "OUTBOX_REDIS_URL"])
def test_run_once_without_patience_does_not_say_that_it_tries_again(invoke: Invoke, name: str) -> None:
    url = {"OUTBOX_DATABASE_URL": f"postgresql://u@{NOWHERE}/d", "OUTBOX_REDIS_URL": f"redis://{NOWHERE}"}
    result = invoke("run", "--once", "--timeout", "0", **{name: url[name]})
    actions = [line.split()[2] for line in result.stderr.splitlines() if not line.startswith("Error")]
    assert (result.exit_code, actions) == (3, ["relay_started"]), result.output


def test_run_once_that_is_interrupted_says_what_is_left(start: Start, database_url: str, stream: str) -> None:
    record(database_url, stream)
    with connect(database_url) as leader, leader.transaction():
        leader.execute("SELECT 1 FROM outbox_relay FOR UPDATE")
        process = start("run", "--once")
        read_until(process, "relay_started")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    assert "published 0 events" in output
    assert "1 event left undone" in output


# -- status ----------------------------------------------------------------------------------------


def test_status_tells_what_waits_and_what_is_in_the_lanes(
    invoke: Invoke, database_url: str, redis: Any, stream: str
) -> None:
    record(database_url, stream)
    invoke("run", "--once")
    record(database_url, stream, priority=50)
    record(database_url, stream, priority=-50)
    record(database_url, stream, priority=-50, more="available_at=now() + interval '1 day'")
    record(database_url, stream, priority=-50, more="attempts=3")
    bury(database_url, DEAD_ID, stream)
    state = json.loads(invoke("status", "--json").stdout)
    counts = {name: state[name] for name in ("pending", "scheduled", "retrying", "dead", "batch")}
    assert counts == {"pending": 4, "scheduled": 1, "retrying": 1, "dead": 1, "batch": 1}
    rows = [
        (row["priority"], row["lane"], row["pending"], row["scheduled"], row["retrying"])
        for row in state["priorities"]
    ]
    assert rows == [(50, stream, 1, 0, 0), (-50, f"{stream}:backfill", 3, 1, 1)]
    assert state["lanes"] == {
        stream: {"entries": 1, "pending": 1, "dead_letters": 0, "groups": [], "waits": False},
        f"{stream}:backfill": {"entries": 0, "pending": 3, "dead_letters": 0, "groups": [], "waits": False},
    }
    assert state["oldest_seconds"] > 0
    assert state["leader"].endswith(f":{os.getpid()}")
    assert state["led_at"].endswith("Z")
    assert (state["streams_lost"], state["batches_lost"], state["asleep"]) == (0, 0, False)
    assert state["journal"]["batches"] == 1
    assert state["journal"]["bytes"] > 0
    assert state["redis"]["batch"] == 1
    assert state["redis"]["version"]


def test_the_age_of_the_oldest_is_of_what_is_due(invoke: Invoke, database_url: str, stream: str) -> None:
    record(database_url, stream, more="available_at=now() + interval '1 day'")
    assert json.loads(invoke("status", "--json").stdout)["oldest_seconds"] is None


def test_status_knows_lanes_that_have_nothing_pending(
    invoke: Invoke, database_url: str, redis: Any, stream: str
) -> None:
    record(database_url, stream)
    invoke("run", "--once")
    lane = json.loads(invoke("status", "--json").stdout)["lanes"][stream]
    assert (lane["entries"], lane["pending"]) == (1, 0)


def test_status_shows_a_lane_that_is_no_stream(
    invoke: Invoke, database_url: str, redis: Any, stream: str
) -> None:
    record(database_url, stream)
    redis.set(stream, "not a stream")
    result = invoke("status", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["lanes"] == {
        stream: {"entries": None, "pending": 1, "dead_letters": 0, "groups": None, "waits": False}
    }


def test_status_without_redis_shows_the_other_half_and_ends_with_3(
    invoke: Invoke, database_url: str, stream: str
) -> None:
    record(database_url, stream)
    result = invoke("status", "--json", OUTBOX_REDIS_URL=f"redis://{NOWHERE}")
    state = json.loads(result.stdout)
    assert (result.exit_code, state["pending"]) == (3, 1)
    assert "Redis" in state["redis"]["error"]
    assert "Redis" in result.stderr


def test_status_is_plain_lines_in_a_pipe(invoke: Invoke, database_url: str, stream: str) -> None:
    record(database_url, stream)
    lines = invoke("status").stdout.splitlines()
    assert "pending: 1" in lines
    assert "batch: 0" in lines
    assert not any("\x1b" in line or "─" in line for line in lines)


def test_status_is_a_table_on_a_terminal(variables: dict[str, str], database_url: str,
                                         stream: str) -> None:  # fmt: skip
    record(database_url, stream)
    code, shown = on_terminal(["status"], variables)
    assert code == 0
    assert "─" in shown
    assert "Pending, by priority" in shown


def test_status_watch_goes_on_until_ctrl_c(start: Start) -> None:
    process = start("status", "--watch", "--json")
    read_until(process, "pending", "stdout")
    read_until(process, "pending", "stdout")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors) == (0, "")


def test_status_watch_outlives_an_outage(start: Start) -> None:
    process = start("status", "--watch", "--json", env={"OUTBOX_DATABASE_URL": f"postgresql://u@{NOWHERE}/d"})
    read_until(process, "error", "stdout")
    read_until(process, "error", "stdout")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 0


def test_a_reader_that_goes_away_is_no_error(start: Start) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("status", stdout=write)
    os.close(write)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "")


# -- dead letters ----------------------------------------------------------------------------------


def test_dead_list_shows_the_newest_first(invoke: Invoke, database_url: str, stream: str) -> None:
    assert invoke("dead", "list").stdout == "no dead letters\n"
    bury(database_url, UNKNOWN_ID, stream)
    execute(database_url, "UPDATE outbox_dead SET died_at = now() - interval '1 hour'")
    bury(database_url, DEAD_ID, stream)
    rows = json.loads(invoke("dead", "list", "--json").stdout)
    assert [row["event_id"] for row in rows] == [DEAD_ID, UNKNOWN_ID]
    assert rows[0]["attempts"] == 10
    limited = json.loads(invoke("dead", "list", "--json", "--limit", "1").stdout)
    assert [row["event_id"] for row in limited] == [DEAD_ID]
    lines = invoke("dead", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["event_id", DEAD_ID, UNKNOWN_ID]


def test_dead_show_gives_the_payload_as_it_was_recorded(
    invoke: Invoke, database_url: str, stream: str
) -> None:
    payload = '{"price":  1.10, "big": 12345678901234567890123.5}'
    bury(database_url, DEAD_ID, stream, payload)
    shown = invoke("dead", "show", DEAD_ID, "--json").stdout
    assert f'"payload": {payload}' in shown
    assert json.loads(shown)["priority"] == 7
    plain = invoke("dead", "show", DEAD_ID).stdout
    assert f"payload: {payload}" in plain
    assert "key: [red]key" in plain


@pytest.mark.parametrize("arguments", [["list"], ["show", DEAD_ID]], ids=" ".join)
def test_what_an_event_holds_cannot_move_the_cursor(
    variables: dict[str, str], invoke: Invoke, database_url: str, stream: str, arguments: list[str]
) -> None:
    bury(database_url, DEAD_ID, stream)
    assert "\x1b" not in invoke("dead", *arguments).stdout
    code, shown = on_terminal(["dead", *arguments], variables)
    assert code == 0
    assert "\x1b[31m" not in shown
    assert DEAD_ID in shown  # in one piece, to be copied
    assert "[red]key" in shown


def test_dead_retry_moves_events_back_as_if_new(
    invoke: Invoke, database_url: str, redis: Any, stream: str
) -> None:
    bury(database_url, DEAD_ID, stream)
    result = invoke("dead", "retry", DEAD_ID)
    assert result.exit_code == 0
    assert "1 dead letter" in result.stdout
    query = "SELECT event_id::text, stream, key, priority, attempts, available_at FROM outbox"
    assert execute(database_url, query) == [(DEAD_ID, stream, "[red]key", 7, 0, None)]
    assert execute(database_url, "SELECT 1 FROM outbox_dead") == []
    invoke("run", "--once")
    assert redis.xlen(stream) == 1


def test_dead_retry_of_an_event_that_is_pending_again_leaves_one(
    invoke: Invoke, database_url: str, stream: str
) -> None:
    record(database_url, stream, more=f"event_id='{DEAD_ID}'")
    bury(database_url, DEAD_ID, stream)
    assert invoke("dead", "retry", "--all").exit_code == 0
    assert len(execute(database_url, "SELECT 1 FROM outbox")) == 1
    assert execute(database_url, "SELECT 1 FROM outbox_dead") == []


@pytest.mark.parametrize("arguments", [["retry", "--all"], ["drop", "--all", "--yes"]], ids=" ".join)
def test_dead_all_is_all(invoke: Invoke, database_url: str, stream: str, arguments: list[str]) -> None:
    for event_id in (DEAD_ID, UNKNOWN_ID):
        bury(database_url, event_id, stream)
    assert "2 dead letters" in invoke("dead", *arguments).stdout
    assert execute(database_url, "SELECT 1 FROM outbox_dead") == []
    assert "0 dead letters" in invoke("dead", *arguments).stdout


@pytest.mark.parametrize("arguments", [["show"], ["retry"], ["drop", "--yes"]], ids=" ".join)
def test_an_unknown_event_id_ends_with_1_and_is_named(
    invoke: Invoke, database_url: str, stream: str, arguments: list[str]
) -> None:
    bury(database_url, DEAD_ID, stream)
    result = invoke("dead", *arguments, UNKNOWN_ID)
    assert result.exit_code == 1
    assert UNKNOWN_ID in result.stderr
    assert len(execute(database_url, "SELECT 1 FROM outbox_dead")) == 1


def test_dead_drop_deletes_only_what_was_asked_for(invoke: Invoke, database_url: str, stream: str) -> None:
    for event_id in (DEAD_ID, UNKNOWN_ID):
        bury(database_url, event_id, stream)
    assert invoke("dead", "drop", DEAD_ID).exit_code == 2  # nobody to ask
    assert len(execute(database_url, "SELECT 1 FROM outbox_dead")) == 2
    assert invoke("dead", "drop", DEAD_ID, "--yes").exit_code == 0
    rows = execute(database_url, "SELECT event_id::text FROM outbox_dead")
    assert (rows, execute(database_url, "SELECT 1 FROM outbox")) == ([(UNKNOWN_ID,)], [])


@pytest.mark.parametrize(
    ("answer", "code", "left"), [("n\n", 1, 1), ("y\n", 0, 0), ("\x04", 1, 1), ("\x03", 130, 1)],
    ids=["no", "yes", "Ctrl-D", "Ctrl-C"],
)  # fmt: skip
def test_dead_drop_asks_on_a_terminal(
    variables: dict[str, str], database_url: str, stream: str, answer: str, code: int, left: int
) -> None:
    bury(database_url, DEAD_ID, stream)
    ended, shown = on_terminal(["dead", "drop", "--all"], variables, answer)
    assert "Drop all dead letters for good?" in shown
    assert ended == code
    assert len(execute(database_url, "SELECT 1 FROM outbox_dead")) == left


# -- prune and migrate -----------------------------------------------------------------------------


def test_prune_purges_what_is_older_than_the_retention_until_none_is_left(
    invoke: Invoke, database_url: str, redis: Any
) -> None:
    ((outbox_id,),) = execute(database_url, "SELECT outbox_id::text FROM outbox_relay")
    redis.hset(f"outbox:{outbox_id}", "batch", 110)
    execute(
        database_url,
        "INSERT INTO outbox_journal (partition, batch, events, published_at, body) "
        "SELECT 0, n, 1, now() - CASE WHEN n <= 120 THEN interval '2 hours' ELSE '0' END, 'x' "
        "FROM generate_series(1, 123) AS n",
    )
    result = invoke("prune")
    assert result.exit_code == 0
    assert "purged 110 batches" in result.stdout
    redis.hset(f"outbox:{outbox_id}", "batch", 123)  # it has got the others
    assert "purged 10 batches" in invoke("prune").stdout
    assert execute(database_url, "SELECT count(*) FROM outbox_journal") == [(3,)]


def test_prune_keeps_what_a_lane_that_is_lost_is_filled_from(invoke: Invoke, redis: Any, box: Box) -> None:
    box.add("a")
    box.relay().drain()
    redis.delete("s")
    result = invoke("prune", "--journal-retention-seconds", "0")
    assert (result.exit_code, "has lost s:" in result.stderr) == (3, True), result.output
    assert box.value("SELECT count(*) FROM outbox_journal") == 1


def test_migrate_needs_no_right_to_make_a_schema_that_is_there(
    empty_database_url: str, roles: dict[str, str]
) -> None:
    execute(empty_database_url, f"GRANT CREATE ON SCHEMA public TO {roles['service']}")
    execute(
        empty_database_url, f"REVOKE CREATE ON DATABASE {make_url(empty_database_url).database} FROM PUBLIC"
    )
    env = {"OUTBOX_DATABASE_URL": role_url(empty_database_url, "service")}
    for _ in range(2):
        result = CliRunner().invoke(cli.cli, ["migrate"], env=env)
        assert result.exit_code == 0, result.output
    assert execute(empty_database_url, "SELECT 1 FROM outbox") == []


def test_migrate_makes_the_tables_and_may_be_repeated(empty_database_url: str, redis_url: str) -> None:
    env = {"OUTBOX_DATABASE_URL": empty_database_url, "OUTBOX_SCHEMA": "Its own"}
    first, second = (CliRunner().invoke(cli.cli, ["migrate"], env=env) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert "from nothing to 0001" in first.stdout
    assert "already at 0001" in second.stdout
    assert first.stderr == ""
    assert execute(empty_database_url, 'SELECT 1 FROM "Its own".outbox') == []


def test_migrate_sql_needs_no_database() -> None:
    result = CliRunner().invoke(cli.cli, ["migrate", "--sql"])
    assert result.exit_code == 0, result.output
    assert "CREATE TABLE public.outbox " in result.stdout
    assert result.stderr == ""


# -- passwords -------------------------------------------------------------------------------------

CANARY = "canary"
DATABASE_URLS = [
    "postgresql://u:{}@127.0.0.1:1/d",
    "postgresql://u:{}@no-such-host.invalid/d",
    "postgresql://u@127.0.0.1:1/d?password={}",
    "postgresql://u:{}@127.0.0.1:1/d?nonsense=1",
    "postgresql://u:{}@127.0.0.1:port/d",
    "mysql://u:{}@127.0.0.1:1/d",
    "u:{}@127.0.0.1:1/d",
]
REDIS_URLS = [
    "redis://:{}@127.0.0.1:1/0",
    "redis://u:{}@no-such-host.invalid/0",
    "redis://127.0.0.1:1/0?password={}",
    "redis://:{}@127.0.0.1:1/0?nonsense=1",
    "redis://:{}@127.0.0.1:port/0",
    "http://:{}@127.0.0.1:1/0",
]
PASSWORDS = [
    "canary",
    "%63anary%40canary",
    "canary@canary",
    "canary/canary",
    "canary:canary",
    "1/canary",
    "canary?canary#canary",
    "canary canary",
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("url", [*DATABASE_URLS, *REDIS_URLS])
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_password_shows_in_no_error_and_in_no_traceback(
    invoke: Invoke, url: str, password: str, form: str
) -> None:
    name = "OUTBOX_DATABASE_URL" if url in DATABASE_URLS else "OUTBOX_REDIS_URL"
    arguments = ["run", "--once", "--timeout", "0", "--debug", "--log-format", form]
    result = invoke(*arguments, **{name: url.format(password)})
    assert result.exit_code in (2, 3)
    assert CANARY not in result.output


@pytest.mark.parametrize("arguments", DATABASE_COMMANDS, ids=" ".join)
@pytest.mark.parametrize("url", DATABASE_URLS)
def test_no_command_shows_the_password(invoke: Invoke, arguments: list[str], url: str) -> None:
    result = invoke(*arguments, "--debug", OUTBOX_DATABASE_URL=url.format(CANARY))
    assert result.exit_code in (2, 3)
    assert CANARY not in result.output


@pytest.mark.parametrize(
    "arguments",
    [["run", "postgresql://u:canary@h/d"], ["postgresql://u:canary@h/d"],
     ["run", "--batch-size", "redis://:canary@h"]],
    ids=" ".join,
)  # fmt: skip
def test_a_password_in_the_wrong_place_does_not_show(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert CANARY not in result.output


def test_a_password_that_the_server_refuses_does_not_show(invoke: Invoke, redis_url: str, redis: Any) -> None:
    url = make_url(redis_url).set(username="no-such-user", password=CANARY)
    restricted = url.render_as_string(hide_password=False)
    result = invoke("status", "--debug", OUTBOX_REDIS_URL=restricted)
    assert result.exit_code == 3
    assert CANARY not in result.output


def test_a_bug_is_one_sentence_unless_debug_is_asked_for(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Store) -> None:
        raise RuntimeError("no good: postgresql://u:canary@h/d\nsecond line")

    monkeypatch.setattr(Store, "status", broken)
    result = invoke("status")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: RuntimeError: no good: postgresql://u:***@h/d")
    assert len(result.stderr.splitlines()) == 1
    debugged = invoke("status", "--debug")
    assert "Traceback" in debugged.stderr
    assert CANARY not in debugged.output


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="it reads the process list")
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("in_query", [True, False])
def test_a_password_is_not_in_the_process_list(
    start: Start, database_url: str, joined: bool, in_query: bool
) -> None:
    secret = {"query": {"password": CANARY}} if in_query else {"password": CANARY}
    url = make_url(database_url).set(**secret).render_as_string(hide_password=False)
    redis = f"redis://:{CANARY}@{NOWHERE}"
    flags = (
        [f"--database-url={url}", f"--redis-url={redis}"]
        if joined
        else ["--database-url", url, "--redis-url", redis]
    )
    process = start("run", *flags, "--batch-size", "77", env={"OUTBOX_DATABASE_URL": "postgresql://h/other"})
    errors = read_until(process, "relay_backoff")
    command = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
    assert command[-4:] == ["run", "--batch-size", "77", ""]
    assert CANARY not in "".join(command) + errors
    assert "batch_size=77" in errors
    assert str(make_url(database_url).database) in errors  # the flag came before the variable
    assert NOWHERE in errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["dead", "list", "--redis-url", f"redis://:{CANARY}@{NOWHERE}"],
        ["migrate", "--sql", f"--redis-url=redis://:{CANARY}@{NOWHERE}"],
        ["dlq", "list", "--database-url", f"postgresql://u:{CANARY}@{NOWHERE}/d"],
        ["--redis-url", f"redis://:{CANARY}@{NOWHERE}", "status"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1][:8]}",
)
def test_a_password_does_not_make_a_flag_of_a_command_that_has_none(
    start: Start, arguments: list[str]
) -> None:
    process = start(*arguments)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (2, "")
    assert "No such option" in errors
    assert CANARY not in errors


# -- the demo --------------------------------------------------------------------------------------


def test_demo_ends_with_its_own_exit_code(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.demo", types.SimpleNamespace(run=lambda console: 7), raising=False)
    assert invoke("demo").exit_code == 7


def test_demo_shows_where_a_bug_is_if_debug_is_asked_for(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(console: Any) -> int:
        raise RuntimeError("no good")

    monkeypatch.setattr("outbox.demo", types.SimpleNamespace(run=broken), raising=False)
    assert invoke("demo").stderr == "Error: RuntimeError: no good (--debug shows where)\n"
    assert "in broken" in invoke("demo", "--debug").stderr


def test_demo_without_its_packages_says_what_to_install(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("outbox.demo", raising=False)
    monkeypatch.setitem(sys.modules, "outbox.demo", None)
    result = invoke("demo")
    assert result.exit_code == 1
    assert 'pip install ".[demo]" in a checkout of outbox' in result.stderr


def on_terminal(arguments: list[str], env: dict[str, str], typed: str = "") -> tuple[int, str]:
    """Run a command on a terminal of 80 columns, and type where it asks; return its exit code and what it showed."""
    process_id, terminal = pty.fork()
    if process_id == 0:
        command = [sys.executable, "-m", "outbox.cli", *arguments]
        os.execve(sys.executable, command, os.environ | env | {"COLUMNS": "80", "TERM": "xterm-256color"})
    shown, deadline = b"", time.monotonic() + PATIENCE_SECONDS
    try:
        while time.monotonic() < deadline:
            come = select.select([terminal], [], [], 2)[0]
            if come and not (part := os.read(terminal, 65536)):
                break
            shown += part if come else b""
            # Typed again where nothing comes of it: of a Ctrl-C just before it waits for a key, it hears at the next.
            if typed and (shown.endswith(PROMPT) or (PROMPT in shown and not come)):
                os.write(terminal, typed.encode())
    except OSError:
        pass  # how Linux says that the other side is closed
    finally:
        os.close(terminal)
        _, status = os.waitpid(process_id, 0)
    return os.waitstatus_to_exitcode(status), shown.decode()
