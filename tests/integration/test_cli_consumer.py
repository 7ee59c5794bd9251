"""The command line of the consumer's side: `consume`, `dlq`, and what `status` tells of consumer groups."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import make_url

from outbox import Consumer
from outbox.dlq import PAGE, DeadLetters
from tests.integration.box import Box
from tests.integration.conftest import Invoke, Start
from tests.integration.test_cli import NOWHERE, PATIENCE_SECONDS, eventually, on_terminal, read_until

Ids = list[str]

UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
STREAM, BACKFILL = "customer", "customer:backfill"
SERVICE = """
import logging, os, threading
from outbox import AsyncConsumer, Consumer

URL = os.environ["OUTBOX_REDIS_URL"]
consumer = Consumer(URL, group="billing", streams=["customer"])
release = threading.Event()

@consumer.on_any
def bill(event):
    logging.getLogger(__name__).info("billing %s", event.key)
    if event.key == "slow":
        release.wait()

def make():
    made = AsyncConsumer(URL, group="mail", streams=["customer"])
    @made.on_any
    async def mail(event):
        logging.getLogger(__name__).info("mailing %s", event.key)
    return made

def broken():
    raise RuntimeError("no good: redis://:canary@h/0")
"""

TOOLS = """
import json
from shutil import get_terminal_size

def make(): ...
def make_for(group): ...
"""


@pytest.fixture(autouse=True)
def environment(no_settings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting but those of a test; a service in the current directory, which is imported anew."""
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "__init__.py").touch()
    (shop / "billing.py").write_text(SERVICE)
    (shop / "tools.py").write_text(TOOLS)
    (shop / "bad.py").write_text("import no_such_package\n")
    (shop / "ends.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def variables(redis_url: str) -> dict[str, str]:
    return {"OUTBOX_REDIS_URL": redis_url}


def publish(redis: Any, lane: str = STREAM, key: str = "c1", **more: Any) -> str:
    """Add an event to a lane as the relay does; return its id."""
    fields = {"specversion": "1.0", "id": str(uuid4()), "type": "Note", "subject": key, "priority": "7",
              "time": "2026-01-02T03:04:05Z", "data": '{"n":  1.10}'} | more  # fmt: skip
    redis.xadd(lane, fields)
    return str(fields["id"])


def give_up(redis_url: str, group: str = "billing", streams: tuple[str, ...] = (STREAM,)) -> None:
    """Have a group fail with all that is in the lanes."""
    consumer = Consumer(redis_url, group=group, streams=streams, max_deliveries=1)

    @consumer.on_any
    def fail(event: Any) -> None:
        raise ValueError(f"no account \x1b[31m of {event.key}")

    consumer.drain()
    consumer.close()


def bury(redis: Any, lane: str, count: int, group: str = "billing") -> Ids:
    """Add many dead letters; return their event ids."""
    ids = [str(UUID(int=number)) for number in range(1, count + 1)]
    with redis.pipeline() as pipeline:
        for event_id in ids:
            pipeline.xadd(
                f"{lane}:dlq",
                {"id": event_id, "type": "Note", "data": "{}", "dlq:group": group, "dlq:error": "E",
                 "dlq:deliveries": 3, "dlq:entry": "1-1", "dlq:died_at": "2026-01-01T00:00:00.000+00:00"},
            )  # fmt: skip
        pipeline.execute()
    return ids


def ids_in(redis: Any, key: str) -> Ids:
    return [entry[b"id"].decode() for _, entry in redis.xrange(key)]


# -- consume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "said"),
    [("shop.billing:consumer", "billing c1"), ("shop.billing:make", "mailing c1")],
)
def test_consume_handles_events_until_the_first_signal(
    start: Start, redis: Any, where: str, said: str
) -> None:
    publish(redis)
    process = start("consume", where)
    assert f"INFO shop.billing {said}" in read_until(process, said)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert "consumer_stopped handled=1" in errors


def test_consume_ends_after_the_event_in_hand_with_ctrl_c(start: Start, redis: Any) -> None:
    process = start("consume", "shop.billing:consumer", "--log-format", "json")
    actions = [json.loads(line)["action"] for line in read_until(process, "group_created").splitlines()]
    assert actions == ["consumer_started", "group_created"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert json.loads(errors.splitlines()[-1])["action"] == "consumer_stopped"


def test_the_second_signal_ends_consume_at_once_and_the_event_stays_pending(start: Start, redis: Any) -> None:
    publish(redis, key="slow")
    process = start("consume", "shop.billing:consumer")
    read_until(process, "billing slow")
    process.send_signal(signal.SIGTERM)
    # Not just once: of two that come in one moment, a thread may get one while the main thread goes on waiting.
    eventually(lambda: process.send_signal(signal.SIGINT) or process.poll())
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert redis.xpending(STREAM, "billing")["pending"] == 1


def test_consume_stays_up_while_redis_is_unreachable(start: Start) -> None:
    url = f"redis://:canary@{NOWHERE}"
    process = start("consume", "shop.billing:consumer", env={"OUTBOX_REDIS_URL": url})
    read_until(process, "consumer_backoff")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert "canary" not in output + errors


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("shop.billing", ["MODULE:CONSUMER"]),
        ("shop.biling:consumer", ["no module shop.biling", "shop.billing?"]),
        ("shpo.billing:consumer", ["no module shpo", "shop?"]),
        ("shop.billing.more:consumer", ["no module shop.billing.more"]),
        ("nope:consumer", ["no module nope.\n"]),
        ("shop.tools:maek", ["has no maek. Did you mean shop.tools:make?\n"]),
        ("shop.tools:mak_for", ["has no mak_for.\n"]),
        ("shop.tools:jsn", ["has no jsn.\n"]),
        ("shop.tools:get_terminal_siz", ["has no get_terminal_siz.\n"]),
        ("shop/billing.py:consumer", ["is a file", "shop.billing:consumer?"]),
        ("shop.billing:consumr", ["has no consumr", "shop.billing:consumer?"]),
        ("shop.billing:app", ["has no app", "shop.billing:consumer?"]),
        ("shop.billing:bill", ["neither a Consumer"]),
        ("shop.billing:URL", ["neither a Consumer"]),
    ],
)
def test_no_such_consumer_ends_with_2_and_the_near_miss(invoke: Invoke, where: str, parts: list[str]) -> None:
    result = invoke("consume", where)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("where", "reason", "frame"),
    [
        ("shop.bad:consumer", "No module named 'no_such_package'", "bad.py"),
        ("shop.ends:consumer", "SystemExit", "ends.py"),
        ("shop.billing:broken", "no good: redis://:***@h/0", "billing.py"),
    ],
)
def test_an_error_of_the_service_is_one_sentence_and_with_debug_its_own_traceback(
    invoke: Invoke, where: str, reason: str, frame: str
) -> None:
    result = invoke("consume", where)
    assert result.exit_code == 1, result.output
    assert len(result.stderr.splitlines()) == 1
    assert reason in result.stderr
    traceback = invoke("consume", where, "--debug").stderr.splitlines()
    assert traceback[0].startswith("Traceback")
    assert frame in traceback[1]
    assert "canary" not in "".join(traceback)


def test_a_consumer_with_a_wrong_setting_ends_with_2(invoke: Invoke) -> None:
    result = invoke("consume", "shop.billing:consumer", OUTBOX_REDIS_URL="redis://h?nonsense=canary")
    assert result.exit_code == 2, result.output
    assert "redis_url" in result.stderr
    assert "canary" not in result.output


# -- dlq list and show -----------------------------------------------------------------------------


def test_dlq_list_shows_the_newest_of_all_lanes_first(invoke: Invoke, redis: Any, redis_url: str) -> None:
    assert invoke("dlq", "list").stdout == "no dead letters\n"
    redis.xadd("theirs:dlq", {"id": "a stream of somebody else"})
    redis.set("set:dlq", "no stream")
    first = publish(redis)
    give_up(redis_url)
    second = publish(redis, "order:backfill", subject="o1")
    give_up(redis_url, "mail", ("order",))
    rows = json.loads(invoke("dlq", "list", "--json").stdout)
    assert [row["event_id"] for row in rows] == [second, first]
    assert rows[1].pop("died_at").endswith("Z")
    assert rows[1].pop("entry")
    assert rows[1] == {
        "event_id": first, "lane": STREAM, "group": "billing", "type": "Note", "key": "c1", "priority": 7,
        "created_at": "2026-01-02T03:04:05Z", "deliveries": 1,
        "error": "ValueError: no account \x1b[31m of c1",
    }  # fmt: skip
    lines = invoke("dlq", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["event_id", second, first]
    limited = json.loads(invoke("dlq", "list", "--json", "--limit", "1").stdout)
    assert [row["event_id"] for row in limited] == [second]


@pytest.mark.parametrize(
    ("options", "lanes"),
    [
        (["--stream", STREAM], [STREAM, BACKFILL]),
        (["--stream", BACKFILL], [BACKFILL]),
        (["--stream", STREAM, "--stream", "order", "--stream", STREAM], [STREAM, BACKFILL, "order"]),
        (["--group", "mail"], ["order"]),
        (["--group", "mail", "--stream", STREAM], []),
    ],
)
def test_dlq_list_of_a_stream_has_both_lanes_and_each_once(
    invoke: Invoke, redis: Any, options: list[str], lanes: list[str]
) -> None:
    bury(redis, STREAM, 1)
    bury(redis, BACKFILL, 1)
    bury(redis, "order", 1, group="mail")
    rows = json.loads(invoke("dlq", "list", "--json", *options).stdout)
    assert sorted(row["lane"] for row in rows) == lanes


def test_dlq_list_goes_through_all_pages(invoke: Invoke, redis: Any) -> None:
    ids = bury(redis, STREAM, 2 * PAGE + 1)
    rows = json.loads(invoke("dlq", "list", "--json", "--limit", "10000").stdout)
    assert [row["event_id"] for row in rows] == ids[::-1]


@pytest.mark.parametrize(
    ("data", "as_json"),
    [
        ('{"price":  1.10, "big": 12345678901234567890123.5}', None),
        ('{"name": "Ada\\u0000 \u00e9"}', None),
        ("not json", '"not json"'),
        ("NaN", '"NaN"'),
        (b"\xff", r'"\\xff"'),
    ],
)
def test_dlq_show_gives_the_payload_as_it_was_published(
    invoke: Invoke, redis: Any, redis_url: str, data: Any, as_json: str | None
) -> None:
    bury(redis, STREAM, PAGE + 1)
    event_id = publish(redis, data=data, tenant="eu", traceparent="00-1")
    give_up(redis_url)
    bury(redis, STREAM, PAGE + 1)
    shown = invoke("dlq", "show", event_id, "--json").stdout
    assert f'"payload": {as_json or data}' in shown
    assert json.loads(shown)["headers"] == {"tenant": "eu", "traceparent": "00-1"}
    assert json.loads(shown)["key"] == "c1"
    plain = invoke("dlq", "show", event_id).stdout
    assert "error: " in plain
    assert "tenant" in plain


def test_dlq_show_of_an_entry_that_anybody_wrote(invoke: Invoke, redis: Any) -> None:
    redis.xadd(
        f"{STREAM}:dlq", {"id": UNKNOWN_ID, "dlq:group": "g", "dlq:deliveries": "many", b"\xff": b"\xfe"}
    )
    shown = json.loads(invoke("dlq", "show", UNKNOWN_ID, "--json").stdout)
    assert (shown["payload"], shown["deliveries"], shown["headers"]) == (None, None, {"\\xff": "\\xfe"})
    assert invoke("dlq", "show", UNKNOWN_ID).exit_code == 0


@pytest.mark.parametrize("columns", [80, 200])
def test_what_a_dead_letter_holds_cannot_move_the_cursor(
    variables: dict[str, str], redis: Any, redis_url: str, columns: int
) -> None:
    event_id = publish(redis, key="[red]key")
    give_up(redis_url)
    env = variables | {"COLUMNS": str(columns), "PYTHONPATH": os.pathsep.join(sys.path)}
    for arguments in (["list"], ["show", event_id]):
        code, shown = on_terminal(["dlq", *arguments], env)
        assert code == 0
        assert "\x1b[31m" not in shown
        assert event_id in shown  # in one piece, to be copied
        assert "[red]key" in shown
        assert "ValueError" in shown


# -- dlq replay and drop ---------------------------------------------------------------------------


def test_a_replay_keeps_the_event_and_is_for_the_group_that_gave_up(
    invoke: Invoke, redis: Any, redis_url: str
) -> None:
    event_id = publish(redis, BACKFILL, tenant="eu")
    ((_, before),) = redis.xrange(BACKFILL)
    give_up(redis_url)
    give_up(redis_url, "mail")
    result = invoke("dlq", "replay", event_id, "--group", "billing")
    assert (result.exit_code, result.stdout) == (0, "replayed: 1 dead letter\n")
    _, (_, after) = redis.xrange(BACKFILL)
    assert after == before | {b"dlq:group": b"billing"}
    ((_, left),) = redis.xrange(f"{BACKFILL}:dlq")
    assert left[b"dlq:group"] == b"mail"

    handled = []
    for group in ("billing", "mail"):
        consumer = Consumer(redis_url, group=group, streams=[STREAM])
        consumer.on_any(lambda event, group=group: handled.append((group, str(event.id), event.headers)))
        consumer.drain()
        consumer.close()
    assert handled == [("billing", event_id, {"tenant": "eu"})]
    assert [redis.xpending(BACKFILL, group)["pending"] for group in ("billing", "mail")] == [0, 0]


def test_what_fails_again_has_one_group_and_can_be_replayed_again(
    invoke: Invoke, redis: Any, redis_url: str
) -> None:
    event_id = publish(redis)
    for _ in range(2):
        give_up(redis_url)
        assert invoke("dlq", "replay", event_id).exit_code == 0
    _, fields = redis.execute_command("XREVRANGE", STREAM, "+", "-", "COUNT", 1)[0]
    names = [*fields]
    assert names.count(b"dlq:group") == 1
    assert not [name for name in names if name.startswith(b"dlq:") and name != b"dlq:group"]


@pytest.mark.parametrize(
    ("options", "moved"),
    [(["--all"], 3), (["--all", "--stream", STREAM], 2), (["--all", "--group", "mail"], 1)],
)
def test_dlq_replays_all_that_is_chosen(invoke: Invoke, redis: Any, options: list[str], moved: int) -> None:
    bury(redis, STREAM, 1)
    bury(redis, BACKFILL, 1)
    bury(redis, "order", 1, group="mail")
    redis.xadd("theirs:dlq", {"id": "a stream of somebody else"})
    result = invoke("dlq", "replay", *options)
    assert f"replayed: {moved} dead letter" in result.stdout
    assert sum(map(redis.xlen, (STREAM, BACKFILL, "order"))) == moved
    assert sum(redis.xlen(f"{lane}:dlq") for lane in (STREAM, BACKFILL, "order")) == 3 - moved
    assert (redis.xlen("theirs"), redis.xlen("theirs:dlq")) == (0, 1)


def test_a_replay_goes_through_all_pages_in_order(invoke: Invoke, redis: Any) -> None:
    ids = bury(redis, STREAM, 3 * PAGE)
    assert invoke("dlq", "replay", ids[-1], ids[PAGE]).exit_code == 0
    assert ids_in(redis, STREAM) == [ids[PAGE], ids[-1]]
    assert "298 dead letters" in invoke("dlq", "replay", "--all").stdout
    assert ids_in(redis, STREAM)[2:] == [id_ for id_ in ids if id_ not in (ids[-1], ids[PAGE])]
    assert redis.xlen(f"{STREAM}:dlq") == 0


NAIVE = """
import os, redis
client = redis.Redis.from_url(os.environ["OUTBOX_REDIS_URL"])
for entry, fields in client.xrange("customer:dlq"):
    client.xadd("customer", fields)
client.delete("customer:dlq")
"""


@pytest.mark.parametrize(
    ("command", "repeats"), [(["-m", "outbox", "dlq", "replay", "--all"], False), (["-c", NAIVE], True)]
)
def test_a_replay_that_is_killed_repeats_nothing_and_a_naive_one_does(
    variables: dict[str, str], redis: Any, command: list[str], repeats: bool
) -> None:
    count = 200 * PAGE
    ids = bury(redis, STREAM, count)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    with subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE) as process:
        eventually(lambda: redis.xlen(STREAM))
        process.kill()
    assert 0 < redis.xlen(STREAM) < count
    subprocess.run([sys.executable, *command], env=env, stdout=subprocess.PIPE, check=True)
    assert redis.xlen(f"{STREAM}:dlq") == 0
    arrived = ids_in(redis, STREAM)
    assert (arrived != ids) == (len(arrived) > count) == repeats


def test_what_fails_again_meanwhile_is_left_for_the_next_replay(redis: Any, redis_url: str) -> None:
    ids = bury(redis, STREAM, 3 * PAGE)
    with DeadLetters(redis_url) as letters:
        replayed = letters.replay(None)
        first = next(replayed)
        give_up(redis_url)
        assert [first, *replayed] == ids
    assert ids_in(redis, f"{STREAM}:dlq") == ids[:PAGE]


def test_a_dead_letter_whose_entry_was_too_large_to_keep_is_left(invoke: Invoke, redis: Any) -> None:
    redis.xadd(f"{STREAM}:dlq", {"dlq:group": "billing", "dlq:error": "E"})
    result = invoke("dlq", "replay", "--all")
    assert ("0 dead letters" in result.stdout, "too large" in result.stderr) == (True, True)
    assert (redis.xlen(STREAM), redis.xlen(f"{STREAM}:dlq")) == (0, 1)
    assert "1 dead letter" in invoke("dlq", "drop", "--all", "--yes").stdout
    assert redis.xlen(f"{STREAM}:dlq") == 0


def test_a_dead_letter_of_a_group_that_is_gone_is_left(invoke: Invoke, redis: Any) -> None:
    """The others would skip it; without any, it waits in the lane for the group to be made again."""
    (event_id,) = bury(redis, STREAM, 1, group="gone")
    redis.xgroup_create(STREAM, "billing", "0", mkstream=True)
    for arguments in (["--all"], [event_id]):
        result = invoke("dlq", "replay", *arguments)
        assert (result.exit_code, "no such group" in result.stderr) == (1, True), result.output
    assert (redis.xlen(STREAM), redis.xlen(f"{STREAM}:dlq")) == (0, 1)
    redis.xgroup_destroy(STREAM, "billing")
    assert invoke("dlq", "replay", "--all").exit_code == 0
    assert ids_in(redis, STREAM) == [event_id]


def test_who_may_not_delete_a_dead_letter_puts_none_back(invoke: Invoke, redis: Any, redis_url: str) -> None:
    bury(redis, STREAM, 1)
    user = f"cli-{uuid4().hex}"
    redis.execute_command("ACL", "SETUSER", user, "on", ">canary", "~*", "&*", "+@all", "-xdel")
    url = make_url(redis_url).set(username=user, password="canary").render_as_string(hide_password=False)
    assert invoke("dlq", "replay", "--all", OUTBOX_REDIS_URL=url).exit_code == 3
    assert (redis.xlen(STREAM), redis.xlen(f"{STREAM}:dlq")) == (0, 1)
    redis.acl_deluser(user)


def test_a_lane_that_takes_no_entry_ends_with_3_and_says_how_far_it_came(invoke: Invoke, redis: Any) -> None:
    bury(redis, "a", 2)
    bury(redis, "b", 1)
    redis.set("b", "no stream")
    result = invoke("dlq", "replay", "--all")
    assert result.exit_code == 3
    assert "WRONGTYPE" in result.stderr
    assert "replayed until then: 2 dead letters" in result.stderr
    assert redis.xlen("b:dlq") == 1


def test_dlq_drop_deletes_only_what_was_asked_for(invoke: Invoke, redis: Any) -> None:
    first, second = bury(redis, STREAM, 2)
    assert invoke("dlq", "drop", first).exit_code == 2  # nobody to ask
    assert redis.xlen(f"{STREAM}:dlq") == 2
    assert invoke("dlq", "drop", first, "--yes").stdout == "dropped: 1 dead letter\n"
    assert ids_in(redis, f"{STREAM}:dlq") == [second]
    assert redis.exists(STREAM) == 0


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 1, 1), ("y\n", 0, 0)])
def test_dlq_drop_asks_on_a_terminal_and_says_of_what(
    variables: dict[str, str], redis: Any, answer: str, code: int, left: int
) -> None:
    bury(redis, STREAM, 1)
    env = variables | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended, shown = on_terminal(["dlq", "drop", "--all", "--group", "billing"], env, answer)
    assert "Drop all dead letters of group billing for good?" in shown
    assert ended == code
    assert redis.xlen(f"{STREAM}:dlq") == left


# -- dlq: arguments and servers --------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["show"], ["replay"], ["drop", "--yes"]], ids=" ".join)
def test_an_unknown_event_id_ends_with_1_and_is_named(
    invoke: Invoke, redis: Any, arguments: list[str]
) -> None:
    bury(redis, STREAM, 1)
    result = invoke("dlq", *arguments, UNKNOWN_ID)
    assert result.exit_code == 1
    assert UNKNOWN_ID in result.stderr
    assert redis.xlen(f"{STREAM}:dlq") == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["show", "x"], ["EVENT_ID", "UUID"]),
        (["replay"], ["--all"]),
        (["replay", UNKNOWN_ID, "--all"], ["--all"]),
        (["replay", "--stream", STREAM], ["--all"]),
        (["drop", "--all", "--group", "", "--yes"], ["--group", "''"]),
        (["drop", "--all", "--stream", "", "--yes"], ["--stream", "''"]),
        (["drop", "--all"], ["--yes"]),
        (["lst"], ["lst", "'list'"]),
    ],
)
def test_wrong_usage_ends_with_2_and_drops_nothing(
    invoke: Invoke, redis: Any, arguments: list[str], parts: list[str]
) -> None:
    bury(redis, STREAM, 1)
    result = invoke("dlq", *arguments)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr
    assert redis.xlen(f"{STREAM}:dlq") == 1


DLQ_COMMANDS = [["list"], ["show", UNKNOWN_ID], ["replay", "--all"], ["drop", "--all", "--yes"]]


@pytest.mark.parametrize("arguments", DLQ_COMMANDS, ids=" ".join)
def test_unreachable_redis_ends_with_3_and_shows_no_password(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke("dlq", *arguments, "--debug", OUTBOX_REDIS_URL=f"redis://:canary@{NOWHERE}")
    assert result.exit_code == 3, result.output
    assert "Redis" in result.stderr
    assert "canary" not in result.output


# -- status ----------------------------------------------------------------------------------------


@pytest.fixture
def status(box: Box, invoke: Invoke, database_url: str) -> Callable[..., Any]:
    """Return `status --json` of an outbox that has published an event to `s` and another to `s:backfill`."""
    box.add("one")
    box.add("two", priority=-50)
    box.relay().drain()

    def lanes(**env: str) -> Any:
        result = invoke("status", "--json", OUTBOX_DATABASE_URL=database_url, **env)
        return json.loads(result.stdout)["lanes"]

    return lanes


def test_status_tells_how_far_each_group_is(status: Callable[..., Any], redis: Any, box: Box) -> None:
    assert status()["s"] == {"entries": 1, "pending": 0, "dead_letters": 0, "groups": [], "waits": False}
    for group in ("billing", "mail"):
        redis.xgroup_create("s", group, "0")
    redis.xreadgroup("mail", "process-1", {"s": ">"})
    billing, mail = status()["s"]["groups"]
    assert billing.pop("oldest_seconds") >= 0
    assert mail.pop("oldest_seconds") >= 0
    assert billing == {"name": "billing", "consumers": 0, "lag": 1, "pending": 0}
    assert mail == {"name": "mail", "consumers": 1, "lag": 0, "pending": 1}
    redis.xack("s", "mail", redis.xrange("s")[0][0])
    assert status()["s"]["groups"][1] == {
        "name": "mail", "consumers": 1, "lag": 0, "pending": 0, "oldest_seconds": None,
    }  # fmt: skip
    assert status()["s:backfill"]["groups"] == []


def test_the_age_is_of_the_oldest_that_is_pending_or_was_not_given_yet(
    status: Callable[..., Any], redis: Any
) -> None:
    seconds, _ = redis.time()
    redis.delete("s")
    for age in (300, 200, 100):
        redis.xadd("s", {"n": age}, id=f"{(seconds - age) * 1000}-0")
    redis.xgroup_create("s", "g", "0")
    redis.xreadgroup("g", "c", {"s": ">"}, count=2)
    assert status()["s"]["groups"][0]["oldest_seconds"] == pytest.approx(300, abs=60)
    redis.xack("s", "g", f"{(seconds - 300) * 1000}-0")
    assert status()["s"]["groups"][0]["oldest_seconds"] == pytest.approx(200, abs=60)
    redis.xack("s", "g", f"{(seconds - 200) * 1000}-0")
    assert status()["s"]["groups"][0]["oldest_seconds"] == pytest.approx(100, abs=60)


def test_status_counts_the_dead_letters_of_a_lane(status: Callable[..., Any], redis: Any) -> None:
    bury(redis, "s:backfill", 3)
    assert [lane["dead_letters"] for lane in status().values()] == [0, 3]


def test_status_reports_a_lane_that_nobody_reads(
    status: Callable[..., Any], invoke: Invoke, redis: Any, database_url: str
) -> None:
    redis.xgroup_create("s", "billing", "0")
    lines = invoke("status", OUTBOX_DATABASE_URL=database_url).stdout.splitlines()
    assert [*map(str.split, lines[-5:])] == [
        ["lane", "entries", "pending", "dead_letters", "read_by"],
        ["s", "1", "0", "0", "billing"],
        ["s:backfill", "1", "0", "0", "no", "group", "reads", "it"],
        ["lane", "group", "consumers", "lag", "pending", "oldest"],
        ["s", "billing", "0", "1", "0", lines[-1].split()[-2], "s"],
    ]


def test_status_without_the_right_to_look_at_groups_knows_none(
    status: Callable[..., Any], redis: Any, redis_url: str
) -> None:
    user = f"cli-{uuid4().hex}"
    redis.execute_command("ACL", "SETUSER", user, "on", ">canary", "~*", "&*", "+@all", "-xinfo")
    try:
        url = make_url(redis_url).set(username=user, password="canary")
        restricted = url.render_as_string(hide_password=False)
        assert status(OUTBOX_REDIS_URL=restricted)["s"] == {
            "entries": 1, "pending": 0, "dead_letters": 0, "groups": None, "waits": False,
        }  # fmt: skip
    finally:
        redis.execute_command("ACL", "DELUSER", user)
