"""Rights, secrets, encryption, and code that stored data could run."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import hashlib
import json
import shutil
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
import pytest
import redis as redis_client
from click.testing import CliRunner, Result
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import Session, sessionmaker

import outbox
from outbox import Consumer, cli, publish, testing
from tests.integration.box import Box
from tests.integration.test_wakeup import wait_until
from tests.roles import PASSWORD, ROLES, role_url
from tests.service import Counted

SECRET = "sesame"  # stands in the payload, the headers and the key


def run(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments, env=env, prog_name="outbox-relay")


# -- the roles of PostgreSQL ------------------------------------------------------------------------------


def flags(names: dict[str, str]) -> list[str]:
    return [part for role, name in names.items() for part in (f"--{role}", name)]


@pytest.fixture
def granted(database_url: str, roles: dict[str, str], box: Box) -> Callable[[str], psycopg.Connection[Any]]:
    """Have `grants --apply` run on an outbox that holds a secret; connect as a role."""
    box.sql.execute("CREATE TABLE business (id int)")
    box.sql.execute(
        "INSERT INTO outbox_dead (event_id, stream, type, key, priority, created_at, payload, headers, attempts, "
        "reason) VALUES (gen_random_uuid(), 's', 'T', %s, 0, now(), '1', '{}', 10, %s)",
        (SECRET, SECRET),
    )
    box.add(SECRET, key=SECRET, headers=json.dumps({"a": SECRET}), last_error=SECRET)
    result = run("grants", "--apply", *flags(roles), OUTBOX_DATABASE_URL=database_url)
    assert result.exit_code == 0, result.output
    return lambda role: psycopg.connect(role_url(database_url, role).replace("+psycopg", ""), autocommit=True)


TABLES = ("outbox", "outbox_relay", "outbox_journal", "outbox_dead", "outbox_inbox", "business",
          "outbox_alembic_version")  # fmt: skip
ANY_ROW = "event_id, stream, type, payload"
ROW = "(gen_random_uuid(), 's', 'T', '1')"
REFUSED = [
    ("service", "SELECT payload FROM outbox"),
    ("service", "SELECT headers, key FROM outbox"),
    ("service", "DELETE FROM outbox"),
    ("service", "UPDATE outbox SET priority = 1"),
    ("service", "SELECT FROM outbox FOR UPDATE"),
    ("service", "TRUNCATE outbox"),
    ("service", "LOCK TABLE outbox IN SHARE MODE"),
    ("service", "ALTER TABLE outbox DISABLE TRIGGER outbox_wake"),
    ("service", f"INSERT INTO outbox ({ANY_ROW}, created_at) VALUES {ROW[:-1]}, '-infinity')"),
    ("service", f"INSERT INTO outbox ({ANY_ROW}, id) VALUES {ROW[:-1]}, 99)"),
    ("service", f"INSERT INTO outbox ({ANY_ROW}, attempts) VALUES {ROW[:-1]}, 1)"),
    *(("service", f"SELECT FROM {table}") for table in TABLES if table != "outbox"),
    ("relay", "UPDATE outbox SET payload = '2'"),
    ("relay", "UPDATE outbox_journal SET body = ''"),
    ("relay", "UPDATE outbox_relay SET outbox_id = gen_random_uuid()"),
    ("relay", "DELETE FROM outbox_relay"),
    ("relay", "DROP TABLE outbox"),
    *(("relay", f"SELECT FROM {table}") for table in ("business", "outbox_inbox", "outbox_alembic_version")),
    *(("relay", f"DELETE FROM {table}") for table in ("business", "outbox_inbox")),
    *(("reader", f"SELECT {column} FROM outbox") for column in ("payload", "headers", "key", "last_error")),
    *(("reader", f"SELECT {column} FROM outbox_dead") for column in ("payload", "headers", "key", "reason")),
    ("reader", "SELECT body FROM outbox_journal"),
    ("reader", "SELECT * FROM outbox"),
    *(("reader", f"DELETE FROM {table}") for table in TABLES),
    *(("reader", f"SELECT FROM {table}") for table in ("business", "outbox_inbox")),
    *(("consumer", f"SELECT FROM {table}") for table in TABLES if table != "outbox_inbox"),
    ("consumer", "UPDATE outbox_inbox SET handled_at = now()"),
    *(("operator", f"SELECT {column} FROM outbox") for column in ("payload", "headers", "key", "last_error")),
    ("operator", "DELETE FROM outbox"),
    ("operator", f"INSERT INTO outbox ({ANY_ROW}, attempts) VALUES {ROW[:-1]}, 1)"),
    ("operator", "UPDATE outbox_dead SET payload = '2'"),
    ("operator", "SELECT FROM outbox_relay FOR UPDATE"),
    *(("operator", f"SELECT FROM {table}") for table in ("outbox_journal", "outbox_inbox", "business")),
]  # fmt: skip


@pytest.mark.parametrize(("role", "statement"), REFUSED)
def test_what_a_role_may_not_do(granted, role: str, statement: str) -> None:
    with granted(role) as connection, pytest.raises(InsufficientPrivilege), connection.transaction():
        connection.execute(statement)


@pytest.mark.parametrize("statement", dict.fromkeys(statement for _, statement in REFUSED))
def test_the_owner_may_do_all_that_a_role_may_not(granted, box: Box, statement: str) -> None:
    """The control: what is refused above is refused for want of a right."""
    with box.sql.transaction(force_rollback=True):
        box.sql.execute(statement)


def test_a_service_that_may_only_insert_records_and_wakes_the_relay(granted, database_url, box) -> None:
    box.sql.execute("UPDATE outbox_relay SET asleep = true")
    box.sql.execute("LISTEN outbox")
    engine = create_engine(role_url(database_url, "service"))
    event_id = uuid4()
    with Session(engine) as session:
        for _ in range(2):
            publish(session, Counted(1), event_id=event_id, headers={"a": "b"})
            session.flush()
        session.commit()
    engine.dispose()
    assert [note.payload for note in box.sql.notifies(timeout=10, stop_after=1)] == ["public"]
    assert box.value("SELECT count(*) FROM outbox WHERE event_id = %s", event_id) == 1


def test_a_service_gains_nothing_by_what_stands_first_on_its_path(granted, box: Box) -> None:
    """The trigger's function runs with its owner's rights: no name in it may be taken for another."""
    box.sql.execute(f"GRANT CREATE ON SCHEMA public TO {ROLES['service']}")
    box.sql.execute("UPDATE outbox_relay SET asleep = true")
    box.sql.execute("LISTEN outbox")
    with granted("service") as connection:
        connection.execute(
            "CREATE TEMP TABLE outbox_relay (asleep bool); INSERT INTO outbox_relay VALUES (true)"
        )
        for signature in ("text, text", "text, name"):
            connection.execute(
                f"CREATE FUNCTION public.pg_notify({signature}) RETURNS void LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'taken in as %', current_user; END $$"
            )
        connection.execute("SET search_path = pg_temp, public, pg_catalog")
        connection.execute(f"INSERT INTO public.outbox ({ANY_ROW}) VALUES {ROW}")
    assert [note.payload for note in box.sql.notifies(timeout=10, stop_after=1)] == ["public"]


def test_a_relay_that_may_touch_nothing_else_does_all_its_work(granted, database_url, box: Box) -> None:
    env = {"OUTBOX_DATABASE_URL": role_url(database_url, "relay"), "OUTBOX_REDIS_URL": box.redis_url}
    box.redis.set("broken", "no stream")
    box.add("bad", stream="broken")
    assert run("run", "--once", "--max-attempts", "1", **env).exit_code == 0
    assert (box.lane(), box.waiting()) == ([SECRET], [])
    for command in (["status"], ["dead", "list"], ["dead", "retry", "--all"], ["prune"],
                    ["dead", "drop", "--all", "--yes"]):  # fmt: skip
        result = run(*command, **env)
        assert result.exit_code == 0, result.output


def test_a_reader_shows_the_status_and_sees_no_secret(granted, database_url, box: Box) -> None:
    env = {"OUTBOX_DATABASE_URL": role_url(database_url, "reader"), "OUTBOX_REDIS_URL": box.redis_url}
    box.relay().drain()
    box.add(SECRET)
    result = run("status", "--json", **env)
    assert result.exit_code == 0, result.output
    state = json.loads(result.stdout)
    assert (state["pending"], state["dead"], state["batch"], state["journal"]["batches"]) == (1, 1, 1, 1)
    assert SECRET not in result.output
    refused = run("dead", "list", **env)
    assert refused.exit_code == 3
    assert "permission denied" in refused.output


def test_an_operator_reads_retries_and_drops_dead_letters(granted, database_url, box: Box) -> None:
    env = {"OUTBOX_DATABASE_URL": role_url(database_url, "operator"), "OUTBOX_REDIS_URL": box.redis_url}
    dead = str(box.value("SELECT event_id FROM outbox_dead"))
    shown = [run("dead", *command, **env) for command in (["list"], ["show", dead])]
    assert all(SECRET in result.output for result in shown)
    assert run("dead", "retry", dead, **env).exit_code == 0
    assert box.value("SELECT count(*) FROM outbox WHERE event_id = %s", dead) == 1
    assert run("dead", "drop", "--all", "--yes", **env).exit_code == 0


def test_a_consumer_keeps_its_inbox(granted) -> None:
    insert = (
        "INSERT INTO outbox_inbox (consumer_group, event_id) VALUES ('g', %s) ON CONFLICT DO NOTHING "
        "RETURNING event_id"
    )
    event_id = uuid4()
    with granted("consumer") as connection:
        assert [connection.execute(insert, (event_id,)).rowcount for _ in range(2)] == [1, 0]
        assert connection.execute("DELETE FROM outbox_inbox").rowcount == 1


def test_grants_print_sql_that_does_the_same(granted, database_url, box: Box, roles) -> None:
    printed = run("grants", *flags(roles))
    assert printed.exit_code == 0
    rights = (
        "SELECT relname, relacl::text FROM pg_class WHERE relname LIKE 'outbox%' AND relkind = 'r' ORDER BY 1"
    )
    before = box.sql.execute(rights).fetchall()
    box.sql.execute(f"DROP OWNED BY {', '.join(roles.values())}")
    assert box.sql.execute(rights).fetchall() != before
    box.sql.execute(printed.stdout)
    assert box.sql.execute(rights).fetchall() == before


def test_grants_that_are_applied_say_so_beside_the_sql(box: Box, database_url: str, roles) -> None:
    names = ["--service", roles["service"], "--relay", roles["relay"], "--reader", roles["relay"]]
    applied = run("grants", *names, "--apply", OUTBOX_DATABASE_URL=database_url)
    assert applied.stderr == f"granted to {roles['service']}, {roles['relay']} in the schema public\n"
    printed = run("grants", *names)
    assert (printed.stdout, printed.stderr) == (applied.stdout, "")


@pytest.mark.parametrize("role", ["relay", "service"])
def test_who_may_not_give_rights_away_is_told(granted, database_url, box: Box, role: str) -> None:
    """PostgreSQL itself warns of it, where the role has some right of its own, and goes on."""
    result = run(
        "grants", "--reader", ROLES["consumer"], "--apply", OUTBOX_DATABASE_URL=role_url(database_url, role)
    )
    assert (result.exit_code, "owner" in result.stderr or "denied" in result.stderr) == (1, True), (
        result.output
    )


ODD = 'a "b"; DROP TABLE outbox; --'


def test_names_are_quoted(box: Box, database_url: str) -> None:
    result = run("grants", "--relay", ODD, "--apply", OUTBOX_DATABASE_URL=database_url)
    assert (result.exit_code, "does not exist" in result.stderr) == (1, True), result.output
    assert box.value("SELECT count(*) FROM outbox") == 0
    assert '"a ""b""; DROP TABLE outbox; --"' in run("grants", "--relay", ODD, "--schema", ODD).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "Name a role"),
        (["--relay", "r", "--apply"], 2, "OUTBOX_DATABASE_URL"),
        (["--service", "s", "--redis"], 2, "needs no Redis"),
        (["--relay", "r", "--redis", "--apply"], 2, "only prints"),
        (["--relay", "a b", "--redis"], 2, "'a b'"),
        (["--relay", "r", "--service", ""], 2, "--service: the name is empty"),
        (["--relay", "r", "--stream", "s"], 2, "--stream needs --redis"),
        (["--relay", "r", "--redis", "--stream", "*"], 2, "'*'"),
        (["--relay", "r", "--apply", "--database-url", "postgresql://u@127.0.0.1:1/d"], 3, "PostgreSQL"),
    ],
)
def test_grants_refuse_what_they_cannot_do(arguments: list[str], code: int, part: str) -> None:
    result = run("grants", *arguments)
    assert (result.exit_code, part in result.stderr) == (code, True), result.output


def test_grants_without_tables_say_what_to_do(empty_database_url: str, roles) -> None:
    result = run("grants", "--relay", ROLES["relay"], "--apply", OUTBOX_DATABASE_URL=empty_database_url)
    assert (result.exit_code, "migrate" in result.stderr) == (4, True)


# -- the users of Redis -----------------------------------------------------------------------------------


@pytest.fixture
def users(redis: redis_client.Redis) -> Iterator[Callable[..., str]]:
    """Make a user as `grants --redis` says; return its URL for the Redis of the test."""
    made: list[str] = []

    def make(url: str, role: str, *arguments: str) -> str:
        user = f"{role}-{uuid4().hex}"
        printed = run("grants", "--redis", f"--{role}", user, *arguments).stdout.strip()
        with pytest.raises(redis_client.ResponseError, match="password"):
            redis.execute_command(printed)  # nobody gets a password that everybody knows
        password = hashlib.sha256(b"canary").hexdigest()
        redis.execute_command(printed.replace("sha256-of-the-password", password))
        made.append(user)
        return make_url(url).set(username=user, password="canary").render_as_string(hide_password=False)

    yield make
    for user in made:
        redis.acl_deluser(user)


@pytest.mark.parametrize("arguments", [[], ["--stream", "s"]])
def test_the_relay_does_all_its_work_as_the_user_of_redis_that_is_printed(
    box: Box, users, redis_url: str, arguments: list[str]
) -> None:
    url = users(redis_url, "relay", *arguments)
    box.redis.script_flush()
    for name in ("a", "b"):
        box.add(name, priority=-1)
    relay = box.relay(batch_size=1, redis_url=url)
    relay.check()
    relay.run_once()
    before = box.photograph()
    relay.drain()
    box.go_back_to(before)  # BEHIND, at the next publish
    box.add("c")
    relay.drain()
    box.redis.delete("s:backfill")  # GONE
    box.add("d", priority=-1)
    relay.drain()
    assert (box.lane("s:backfill"), box.lane()) == (["a", "b", "d"], ["c"])
    env = {"OUTBOX_DATABASE_URL": box.database_url, "OUTBOX_REDIS_URL": url}
    state = run("status", "--json", **env)
    assert state.exit_code == 0, state.output
    assert json.loads(state.stdout)["redis"]["batch"] == 4


@pytest.mark.parametrize("role", ["relay", "reader", "consumer", "operator"])
@pytest.mark.parametrize(
    "command",
    ["FLUSHALL", "KEYS *", "DEL s", "GET x", "CONFIG GET *", "ACL LIST", "XDEL s 1-0", "SHUTDOWN"],
)
def test_what_a_user_of_redis_may_not_do(users, redis_url: str, role: str, command: str) -> None:
    client = redis_client.Redis.from_url(users(redis_url, role))
    with pytest.raises(redis_client.exceptions.NoPermissionError):
        client.execute_command(*command.split())
    client.close()


def test_a_user_of_redis_with_streams_uses_no_other_key(users, redis_url: str, redis) -> None:
    client = redis_client.Redis.from_url(users(redis_url, "relay", "--stream", "s", "--lanes", "off"))
    assert client.xadd("s", {"a": "b"})
    for key in ("s2", "s:backfill"):
        with pytest.raises(redis_client.exceptions.NoPermissionError):
            client.xadd(key, {"a": "b"})
    client.close()


@pytest.mark.parametrize("lanes", ["on", "off"])
def test_a_consumer_does_all_its_work_as_its_role_and_its_user(
    granted, database_url: str, box: Box, users, redis_url: str, caplog: pytest.LogCaptureFixture, lanes: str
) -> None:
    box.relay().drain()
    box.add("bad")
    box.relay().drain()
    engine = create_engine(role_url(database_url, "consumer"))
    url = users(redis_url, "consumer", "--stream", "s", "--lanes", lanes)
    consumer = Consumer(url, group="g", streams=["s"], sessions=sessionmaker(engine), max_deliveries=1)

    @consumer.on_any
    def handle(event: Any, session: Any) -> None:
        if event.data == "bad":
            raise ValueError("bad")

    thread = threading.Thread(target=consumer.run)
    thread.start()
    try:
        assert wait_until(lambda: box.redis.xlen("s:dlq") and box.value("SELECT count(*) FROM outbox_inbox"))
    finally:
        consumer.stop()
        thread.join()
    engine.dispose()
    assert "permission" not in caplog.text
    assert box.redis.xpending("s", "g")["pending"] == 0


@pytest.mark.parametrize("lanes", ["on", "off"])
@pytest.mark.parametrize("arguments", [[], ["--stream", "s"]])
def test_an_operator_does_all_that_there_is_to_do_with_what_consumers_gave_up(
    users, redis_url: str, redis: redis_client.Redis, arguments: list[str], lanes: str, monkeypatch
) -> None:
    monkeypatch.setenv("OUTBOX_LANES", lanes)
    url, ids = users(redis_url, "operator", *arguments), [str(uuid4()) for _ in range(4)]
    for event_id in ids:
        redis.xadd("s:backfill:dlq", {"id": event_id, "data": "1", "dlq:group": "g", "dlq:error": SECRET})
    redis.script_flush()

    def dlq(*command: str) -> str:
        result = run("dlq", *command, *arguments, OUTBOX_REDIS_URL=url)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert [row["event_id"] for row in json.loads(dlq("list", "--json"))] == ids[::-1]
    assert SECRET in dlq("show", ids[0])
    dlq("replay", ids[0])
    dlq("drop", ids[1], "--yes")
    dlq("replay", "--all")
    assert [entry[b"id"].decode() for _, entry in redis.xrange("s:backfill")] == [ids[0], *ids[2:]]
    assert redis.xlen("s:backfill:dlq") == 0


@pytest.mark.parametrize("arguments", [[], ["--stream", "s"]])
@pytest.mark.parametrize(
    "command",
    ["XRANGE s - +", "XREVRANGE s + -", "XREAD STREAMS s 0", "XTRIM s:dlq MAXLEN 0", "XGROUP CREATE s g 0",
     "HGETALL outbox:state", "EVAL return(redis.call('XDEL',KEYS[1],'1-0')) 1 s"],
)  # fmt: skip
def test_an_operator_of_redis_touches_dead_letters_alone(
    users, redis_url: str, arguments: list[str], command: str
) -> None:
    client = redis_client.Redis.from_url(users(redis_url, "operator", *arguments))
    with pytest.raises(redis_client.ResponseError, match="permission|can't (access|run)"):
        client.execute_command(*command.split())
    client.close()


def test_an_operator_of_some_streams_sees_the_name_of_no_other_key(users, redis_url: str, redis) -> None:
    url = users(redis_url, "operator", "--stream", "s")
    redis.xadd("other:dlq", {"id": "1", "dlq:group": "g"})
    for arguments in ([], ["--stream", "other"]):
        result = run("dlq", "list", *arguments, OUTBOX_REDIS_URL=url)
        assert (result.exit_code, "permission" in result.stderr) == (3, True), result.output


def test_a_reader_of_redis_shows_the_status(box: Box, users, redis_url: str) -> None:
    box.add("a")
    box.relay().drain()
    env = {"OUTBOX_DATABASE_URL": box.database_url, "OUTBOX_REDIS_URL": users(redis_url, "reader")}
    result = run("status", "--json", **env)
    (lane,) = json.loads(result.stdout)["lanes"].values()
    assert (lane["entries"], lane["pending"], lane["groups"]) == (1, 0, []), result.output


# -- secrets in what is said and kept ---------------------------------------------------------------------

CANARY = "canary"
URLS = [
    ("database_url", "postgresql://u:{}@127.0.0.1:1/d"),
    ("database_url", "postgresql://u:{}@/d?host=/nowhere"),
    ("database_url", "postgresql+asyncpg://u@127.0.0.1:1/d?password={}&sslpassword={}"),
    ("database_url", "postgresql://u:{}@db.invalid/d"),
    ("redis_url", "redis://u:{}@127.0.0.1:1/0"),
    ("redis_url", "redis://redis.invalid/0?password={}"),
    ("redis_url", "rediss://:{}@127.0.0.1:1/0?ssl_password={}"),
    ("redis_url", "unix://u:{}@/nowhere?db=1"),
]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[Result], str]:
    """Return all that a command has said, libraries that write past Python's streams included."""
    return lambda result: result.output + "".join(capfd.readouterr())


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("place", ["flag", "variable", "file"])
@pytest.mark.parametrize(("name", "url"), URLS)
def test_a_password_shows_nowhere_wherever_it_was_given(
    tmp_path: Path, said, name: str, url: str, place: str, form: str
) -> None:
    local = {"database_url": "postgresql://u@127.0.0.1:1/d", "redis_url": "redis://127.0.0.1:1/0"}
    whole = url.replace("{}", f"%63{CANARY}%40")  # percent-encoded in part
    arguments = ["run", "--once", "--timeout", "0", "--debug", "--log-level", "debug", "--log-format", form]
    env = {f"OUTBOX_{other.upper()}": value for other, value in local.items() if other != name}
    if place == "flag":
        arguments += [f"--{name.replace('_', '-')}", whole]
    elif place == "variable":
        env[f"OUTBOX_{name.upper()}"] = whole
    else:
        (tmp_path / "relay.toml").write_text(f"{name} = {json.dumps(whole)}")
        arguments += ["--config", str(tmp_path / "relay.toml")]
    result = run(*arguments, **env)
    assert result.exit_code == 3
    assert "relay_started" in result.stderr
    assert CANARY not in said(result)


def test_a_password_that_postgresql_refuses_shows_nowhere(database_url: str, said) -> None:
    url = make_url(database_url).set(password=CANARY).render_as_string(hide_password=False)
    result = run("status", "--debug", OUTBOX_DATABASE_URL=url)
    assert (result.exit_code, "password authentication failed" in result.stderr) == (3, True)
    assert CANARY not in said(result)


def test_a_password_is_kept_in_no_table(granted, database_url: str, box: Box, users, said) -> None:
    box.redis.set("broken", "no stream")
    for name in ("a", "b"):
        box.add(name, stream="broken")
    url = users(box.redis_url, "relay", "--stream", "s")
    env = {"OUTBOX_DATABASE_URL": role_url(database_url, "relay"), "OUTBOX_REDIS_URL": url}
    results = [run("run", "--once", "--max-attempts", str(most), **env) for most in (2, 1)]
    results += [run(*command, **env) for command in (["status", "--json"], ["dead", "list", "--json"])]
    kept = [str(row) for table in TABLES for row in box.sql.execute(f"SELECT t::text FROM {table} t")]
    assert len(kept) > 4
    for secret in (CANARY, PASSWORD):
        assert secret not in "".join([*kept, *map(said, results)])


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_values_of_rows_in_an_error_of_postgresql_show_nowhere(box: Box, said, form: str) -> None:
    """PostgreSQL's DETAIL has the whole row, its CONTEXT the parameters."""
    box.sql.execute("ALTER TABLE outbox ADD CONSTRAINT first CHECK (attempts = 0)")
    box.redis.set("broken", "no stream")
    box.add(SECRET, stream="broken", key=SECRET)
    env = {"OUTBOX_DATABASE_URL": box.database_url, "OUTBOX_REDIS_URL": box.redis_url}
    arguments = ["run", "--once", "--timeout", "0", "--debug", "--log-level", "debug", "--log-format", form]
    result = run(*arguments, **env)
    assert (result.exit_code, "first" in result.output, "Traceback" in result.output) == (3, True, True)
    assert SECRET not in said(result)


# -- encryption -------------------------------------------------------------------------------------------

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="it makes certificates with openssl")
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


class Authority(NamedTuple):
    """A private certificate authority, and a certificate for the name localhost that it has signed."""

    ca: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("authority"))


def new_authority(folder: Path) -> Authority:
    def openssl(*arguments: str) -> None:
        subprocess.run([OPENSSL or "", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes")
    openssl(*new, "-x509", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2")
    openssl(*new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", "server.crt", "-days", "2", "-extfile", "names")  # fmt: skip
    return Authority(folder / "ca.crt", folder / "server.crt", folder / "server.key")


@contextlib.contextmanager
def terminator(authority: Authority, port: int, *, postgres: bool = False) -> Iterator[int]:
    """Speak TLS for a server on this machine that does not; the servers of the wheels know none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, asyncio.IncompleteReadError):
            if postgres:
                assert await reader.readexactly(8) == SSL_REQUEST
                writer.write(b"S")
            await writer.start_tls(context)
            to_server = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.wait(
                [
                    asyncio.create_task(pump(*ends))
                    for ends in ((reader, to_server[1]), (to_server[0], writer))
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
            to_server[1].close()
        writer.close()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.fixture
def encrypted(box: Box, authority: Authority) -> Iterator[Callable[[Path], dict[str, str]]]:
    """Return the variables of servers behind TLS, for a relay that trusts an authority."""
    database, redis = make_url(box.database_url), make_url(box.redis_url)
    assert database.port
    assert redis.port
    with (
        terminator(authority, database.port, postgres=True) as database_port,
        terminator(authority, redis.port) as redis_port,
    ):

        def variables(ca: Path) -> dict[str, str]:
            verified = {"sslmode": "verify-full", "sslrootcert": str(ca)}
            url = database.set(host="localhost", port=database_port, query=verified)
            return {
                "OUTBOX_DATABASE_URL": url.render_as_string(hide_password=False),
                "OUTBOX_REDIS_URL": f"rediss://localhost:{redis_port}/0?ssl_ca_certs={ca}",
            }

        yield variables


@needs_openssl
def test_both_servers_are_reached_by_tls_that_is_verified(box: Box, encrypted, authority: Authority) -> None:
    box.add("a")
    result = run("run", "--once", "--timeout", "5", **encrypted(authority.ca))
    assert result.exit_code == 0, result.output
    assert box.lane() == ["a"]
    assert "clear_text" not in result.output


@needs_openssl
@pytest.mark.parametrize("name", ["OUTBOX_DATABASE_URL", "OUTBOX_REDIS_URL"])
@pytest.mark.parametrize("fault", ["another authority", "another name"])
def test_a_server_that_cannot_prove_who_it_is_is_refused_with_one_sentence(
    box: Box, encrypted, authority: Authority, tmp_path: Path, name: str, fault: str
) -> None:
    box.add("a")
    variables = encrypted(authority.ca)
    if fault == "another authority":
        variables[name] = encrypted(new_authority(tmp_path).ca)[name]
    else:
        variables[name] = variables[name].replace("localhost", "127.0.0.1")
    result = run("run", "--once", "--timeout", "0", **variables)
    assert result.exit_code == 3, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "certificate" in errors[0]
    assert "Traceback" not in result.output
    assert box.lane() == []


def test_a_unix_socket_of_redis_will_do(box: Box, tmp_path: Path) -> None:
    path = str(tmp_path / "redis.sock")
    with testing.redis({"unixsocket": path}) as server:
        if server.source == "environment":
            pytest.skip("it needs a server of its own")
        box.add("a")
        url = f"unix://{path}?db=0"
        box.relay(redis_url=url).drain(timeout_seconds=0)
        consumer = Consumer(url, group="g", streams=["s"])
        seen: list[Any] = []
        consumer.on_any(lambda event: seen.append(event.data))
        consumer.drain()
        consumer.close()
        assert seen == ["a"]


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({"OUTBOX_DATABASE_URL": "postgresql://u@db.invalid/d"}, ["database_url"]),
        ({"OUTBOX_DATABASE_URL": "postgresql://u@/d?host=db.invalid"}, ["database_url"]),
        ({"OUTBOX_DATABASE_URL": "postgresql://u@localhost/d?hostaddr=192.0.2.1"}, ["database_url"]),
        ({"OUTBOX_DATABASE_URL": "postgresql:///d", "PGHOST": "db.invalid"}, ["database_url"]),
        ({"OUTBOX_DATABASE_URL": "postgresql://u@db.invalid/d?sslmode=prefer"}, ["database_url"]),
        ({"OUTBOX_DATABASE_URL": "postgresql://u@db.invalid/d?sslmode=verify-full"}, []),
        ({"OUTBOX_DATABASE_URL": "postgresql://u@db.invalid/d", "PGSSLMODE": "require"}, []),
        ({"OUTBOX_DATABASE_URL": "postgresql://u@127.0.0.2:1/d"}, []),
        ({"OUTBOX_DATABASE_URL": "postgresql://u@[::1]:1/d"}, []),
        ({"OUTBOX_DATABASE_URL": "postgresql:///d?host=/nowhere"}, []),
        ({"OUTBOX_DATABASE_URL": "postgresql:///d?host=/nowhere,db.invalid"}, ["database_url"]),
        ({"OUTBOX_REDIS_URL": "redis://redis.invalid"}, ["redis_url"]),
        ({"OUTBOX_REDIS_URL": "rediss://redis.invalid"}, []),
        ({"OUTBOX_REDIS_URL": "redis://localhost:1"}, []),
        ({"OUTBOX_REDIS_URL": "redis://[::1]:1"}, []),
        ({"OUTBOX_REDIS_URL": "unix:///nowhere"}, []),
    ],
)
def test_clear_text_beyond_this_machine_is_warned_of_once(
    variables: dict[str, str], warned: list[str]
) -> None:
    local = {
        "OUTBOX_DATABASE_URL": "postgresql://u@127.0.0.1:1/d",
        "OUTBOX_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    result = run("run", "--once", "--timeout", "0", **(local | variables))
    warnings = [line for line in result.stderr.splitlines() if " clear_text " in line]
    assert [line.split()[3].rstrip(":") for line in warnings] == warned, result.output


# -- no code out of data ----------------------------------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "code",
    "codeop",
    "runpy",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "import_module", "execfile", "unsafe_load"}
# The latter is a command of Redis, for this package's own scripts.
EXCEPTIONS = {"re.compile", "self._redis.eval"}


def named_by_the_source(name: ast.expr) -> bool:
    """Return whether a name, or each of two, is written out where it is used."""
    names = [name.body, name.orelse] if isinstance(name, ast.IfExp) else [name]
    return all(isinstance(each, ast.Constant) for each in names)


def offences(path: Path) -> Iterator[str]:
    """Yield what in a file could run code that data names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            if named := {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES:
                yield f"{path.name}:{node.lineno} imports {named}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] == "import_module" and (
                named_by_the_source(node.args[0])
                or path.name == "consume.py"  # which its user names on the command line
            ):
                continue
            if called.rpartition(".")[2] in FORBIDDEN_CALLS and called not in EXCEPTIONS:
                yield f"{path.name}:{node.lineno} calls {called}"


def test_nothing_that_is_stored_is_run_or_imported(tmp_path: Path) -> None:
    package = Path(outbox.__file__).parent
    files = [*package.rglob("*.py"), *(package.parent / "migrations").rglob("*.py")]
    assert len(files) > 20
    assert [offence for path in files for offence in offences(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "__import__(x)",
        "importlib.import_module(x)",
    ],
)
def test_the_search_finds_what_could_run(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(line)
    assert len([*offences(file)]) == 1
