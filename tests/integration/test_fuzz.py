"""Whatever comes in has a clear outcome: what a service records, what is set, what others write into the tables.

`HYPOTHESIS_PROFILE=thorough` runs ten times as many examples.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any
from uuid import uuid4

import msgpack
import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox import InvalidEvent, publish
from outbox.errors import DamagedBatch, InvalidSetting
from outbox.event import encode
from outbox.relay import Relay
from outbox.settings import FIELDS, Settings, load
from outbox.streams import decode
from tests.integration.box import Box
from tests.roles import as_owner
from tests.service import Counted

MANY = 10 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1


def fuzz(examples: int) -> Any:
    return settings(max_examples=examples * MANY, deadline=None, suppress_health_check=[*HealthCheck])


def noise(length: int) -> str:
    """Return a text that no index can compress."""
    dice = random.Random(length)
    return "".join(chr(dice.randrange(0x10000, 0x10FFFF)) for _ in range(length))


any_text = st.text(st.characters(codec=None))
storable = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner),
    max_leaves=8,
)


# -- what a service records -------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"
    ODD = b"odd"


class Broken:
    """A model whose own code fails."""

    def model_dump(self, **_: Any) -> Any:
        raise RuntimeError("no good")


class Endless:
    """A model that is made of models for ever."""

    def model_dump(self, **_: Any) -> Any:
        return Endless()


HUGE = 10**5000  # more digits than Python writes
odd_times = st.datetimes(timezones=st.none() | st.timezones()) | st.builds(
    lambda moment, seconds: moment.replace(tzinfo=timezone(timedelta(seconds=seconds))),
    st.datetimes(),
    st.floats(-86399, 86399),
)
odd = st.one_of(
    json_like,
    st.binary(),
    st.sets(st.integers()),
    st.uuids(),
    st.decimals(),
    st.complex_numbers(),
    st.sampled_from([*Colour, Broken(), Endless(), object(), HUGE, Session, float("nan"), {HUGE: 1}]),
    odd_times,
    st.dates(),
    st.times(),
    st.dictionaries(st.none() | st.booleans() | st.floats() | st.integers() | st.uuids(), st.none()),
)
NAMES = st.sampled_from(["customer", "{shop}:customer", "a/b.c-d_e"]) | any_text | odd
OPTIONS = {
    "stream": NAMES,
    "type": st.just("T") | NAMES,
    "key": NAMES,
    "priority": st.integers(-(2**15), 2**15 - 1) | odd,
    "headers": st.dictionaries(st.from_regex(r"\A[a-z]{1,9}\Z") | any_text, any_text) | odd,
    "available_at": odd_times | odd,
    "event_id": st.uuids() | st.uuids().map(str) | odd,
}
FIELDS_OF_AN_EVENT = ("event", "stream", "type", "key", "priority", "headers", "available_at", "event_id")
FAR_EAST = datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=20)))  # farther than PostgreSQL knows


@pytest.fixture
def session(engine: Any) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@fuzz(200)
@given(
    payload=st.dictionaries(any_text, odd) | odd,
    options=st.fixed_dictionaries({}, optional=OPTIONS),
)
@example(payload={"a": Endless()}, options={})
@example(payload={"a": Broken()}, options={})
@example(payload={}, options={"key": HUGE})
@example(payload={}, options={"key": noise(1000)})
@example(payload={}, options={"priority": HUGE})
@example(payload={}, options={"event_id": HUGE})
@example(payload={}, options={"headers": {"a": HUGE}})
@example(payload={}, options={"available_at": HUGE})
@example(payload={}, options={"available_at": FAR_EAST})
@example(payload={}, options={"available_at": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))})
def test_an_event_is_recorded_as_it_is_or_refused_by_the_name_of_its_field(session, payload, options) -> None:
    options = {"stream": "s", "type": "T"} | options
    event_id = options.pop("event_id", None) or uuid4()
    try:
        recorded = encode(payload, event_id=event_id, **options)
    except InvalidEvent:
        with pytest.raises(InvalidEvent) as caught:
            publish(session, payload, event_id=event_id, **options)
        kind = options["type"] if isinstance(options["type"], str) else "type"
        assert str(caught.value).startswith((*FIELDS_OF_AN_EVENT, kind))
        str(caught.value).encode()  # it can be printed and logged
        assert not session.in_transaction()
        publish(session, Counted(1))  # the session is as it was
        session.rollback()
        return
    publish(session, payload, event_id=event_id, **options)
    session.commit()
    with as_owner(session.get_bind()).begin() as connection:
        found = connection.execute(
            text(
                "DELETE FROM outbox RETURNING event_id, stream, type, key, priority, available_at, "
                "payload::text, headers::text"
            )
        ).one()
    parts = msgspec.structs.astuple(recorded)
    assert [*found] == [
        str(bytes(part), "utf-8") if isinstance(part, msgspec.Raw) else part for part in parts
    ]


# -- rows that somebody else has written ------------------------------------------------------------------


@st.composite
def rows_of_others(draw: Any) -> dict[str, Any]:
    names = storable | st.sampled_from(["", "k", noise(1000), noise(5000)])
    headers = st.none() | json_like | st.dictionaries(st.sampled_from(["a", "id", "correlationid"]), storable)
    moments = st.sampled_from(["now", "infinity", "-infinity", "0044-03-15 BC", "294276-01-01"])
    return {
        "stream": draw(st.sampled_from(["s", "broken", "no name", "outbox:state"]) | names),
        "type": draw(names),
        "key": draw(st.none() | names),
        "priority": draw(st.integers(-(2**15), 2**15 - 1)),
        "created_at": draw(moments),
        "available_at": draw(st.none() | moments),
        "payload": json.dumps(draw(json_like)),
        "headers": json.dumps(draw(headers)),
        "attempts": draw(st.sampled_from([0, 0, 1, 9, -1, 2**31 - 1, -(2**31)])),
        "last_error": draw(st.none() | storable),
    }


NOT_LET_IN = (psycopg.errors.DataError, psycopg.errors.ProgramLimitExceeded)  # by PostgreSQL itself


def begin_anew(box: Box) -> None:
    box.redis.flushall()
    box.sql.execute("DELETE FROM outbox; DELETE FROM outbox_dead; DELETE FROM outbox_journal")
    box.sql.execute("UPDATE outbox_relay SET batch = 0, batches_lost = 0")


def arrived(box: Box) -> list[str]:
    """Return the ids of all entries of all streams."""
    keys = [key for key in box.redis.scan_iter() if box.redis.type(key) == b"stream"]
    return [entry[b"id"].decode() for key in keys for _, entry in box.redis.xrange(key)]


@fuzz(50)
@given(found=st.lists(rows_of_others(), max_size=6))
@example(found=[{"stream": "broken", "key": noise(1000)}])
@example(found=[{"stream": noise(5000)}])
@example(found=[{"stream": "broken", "attempts": 2**31 - 1}])
@example(found=[{"stream": "broken", "attempts": -(2**31)}])
def test_each_row_of_somebody_else_is_published_or_dead_or_not_due(box: Box, found) -> None:
    begin_anew(box)
    box.redis.set("broken", "no stream")
    state = f"outbox:{box.value('SELECT outbox_id FROM outbox_relay')}"
    expected = []
    for row in found:
        if row["stream"] == "outbox:state":
            row = row | {"stream": state}
        with contextlib.suppress(*NOT_LET_IN):
            expected.append(box.add("odd", **row))
    expected.append(box.add("even", stream="even", priority=-(2**15), created_at="294276-01-01"))
    relay = box.relay(max_attempts=2)
    relay.drain(timeout_seconds=0)
    assert not relay._store.due()
    relay.close()
    # For its time, or behind one of its key that does.
    waiting = [str(row[0]) for row in box.sql.execute("SELECT event_id FROM outbox")]
    dead = [str(row[0]) for row in box.sql.execute("SELECT event_id FROM outbox_dead WHERE reason <> ''")]
    assert sorted(arrived(box) + waiting + dead) == sorted(expected)
    assert len(box.lane("even:backfill")) == 1


# -- a journal that was damaged ---------------------------------------------------------------------------


def damaged_bodies() -> Any:
    """Return bodies that are no journal's: noise, what is cut off, and MessagePack of other shapes."""
    whole = msgpack.packb(["source", ["s"], [[2, 0, "1", "an id", "T", "now", "0", "1", None, "a", "b"]]])
    leaf = (
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    )
    value = st.recursive(
        leaf, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9
    )
    event = st.tuples(
        st.sampled_from([0, 1, 2, 3, 2**40, "2"]),
        st.sampled_from([0, -1, 0.5, "0"]),
        st.lists(st.just("1") | leaf, max_size=11),
    ).map(lambda parts: [*parts[:2], *parts[2]])
    return st.one_of(
        st.binary(max_size=60),
        st.integers(0, len(whole) - 1).map(lambda length: whole[:length]),
        value.map(msgpack.packb),
        st.tuples(leaf, st.lists(st.just("s") | leaf), st.lists(event | value)).map(msgpack.packb),
    )


def sound(body: bytes) -> bool:
    """Return whether a body is, by chance, one that a relay may have written."""
    try:
        decode(body)
    except DamagedBatch:
        return False
    return True


@fuzz(40)
@given(body=damaged_bodies())
@example(body=b"")
@example(body=msgpack.packb(["x", ["s"], [[2, 0, "1"]]]))
@example(body=msgpack.packb(["x", ["other"], [[2, 0, "1"]]]))
@example(body=msgpack.packb(["x", ["s"], [[3, 0, *["1"] * 7]]]))
@example(body=msgpack.packb(["x", ["s"], [[2, 0, *["1"] * 6, ["1"]]]]))
@pytest.mark.parametrize("lost", ["everything", "the lane"])
def test_a_damaged_batch_is_counted_as_lost_and_the_others_are_sent_again(box: Box, body, lost: str) -> None:
    begin_anew(box)
    relay = box.relay()
    for name in "abc":
        box.add(name)
        relay.run_once()
    box.sql.execute("UPDATE outbox_journal SET body = %s WHERE batch = 2", (body,))
    box.redis.delete(*(["s"] if lost == "the lane" else box.redis.keys()))
    box.add("d")
    relay.drain(timeout_seconds=0)
    relay.close()
    arrived = [entry[b"data"] for _, entry in box.redis.xrange("s")]
    assert [data for data in arrived if data in (b'"a"', b'"c"', b'"d"')] == [b'"a"', b'"c"', b'"d"']
    if not sound(body):
        assert len(arrived) == 3
        # A batch whose head says that it has nothing of the lane is not looked at for its sake.
        counts = lost == "everything" or not is_of_other_lanes(body)
        assert box.value("SELECT batches_lost FROM outbox_relay") == counts


def is_of_other_lanes(body: bytes) -> bool:
    """Return whether the first of the three parts of a body are a text and a list of texts, none of them "s"."""
    unpacker = msgpack.Unpacker(io.BytesIO(body))
    try:
        parts, source, lanes = unpacker.read_array_header(), unpacker.unpack(), unpacker.unpack()
    except (ValueError, msgpack.UnpackException):
        return False
    named = isinstance(lanes, (list, dict, str)) and all(isinstance(part, str) for part in (source, *lanes))
    return parts == 3 and named and bool(lanes) and "s" not in [*lanes]


# -- settings ---------------------------------------------------------------------------------------------

plain_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
pieces = st.sampled_from(
    ["postgresql", "redis", "rediss", "unix", "://", ":", "@", "/", "?", "&", "=", "#", "%", "%00", "h", "1", "[::1]",
     "[", "]", ",", "host", "port", "password", "sslmode", "db", "protocol", "decode_responses", "connect_timeout",
     "+asyncpg", "user", "true", "\n", " ", "é"]
)  # fmt: skip
urls = st.lists(pieces | plain_text, max_size=12).map("".join)
database_urls = urls | urls.map(lambda rest: f"postgresql://h/d?{rest}") | urls.map("postgresql://h{}".format)
redis_urls = urls | urls.map(lambda rest: f"redis://h/0?{rest}") | urls.map("redis://h{}".format)


def written(number: float) -> str:
    return "1" * 5000 if number is HUGE else str(number)


numbers = st.integers() | st.floats() | st.sampled_from([HUGE, 2**31, 2**63, 1e300])
SET = {name: plain_text | numbers.map(written) for name in FIELDS}
SET |= {"database_url": database_urls, "redis_url": redis_urls}


@pytest.mark.parametrize(
    "environ",
    [
        {"OUTBOX_BATCH_SIZE": str(10**12)},
        {"OUTBOX_BATCH_BYTES": str(10**12)},
        {"OUTBOX_TAKEOVER_SECONDS": "1e12"},
        {"OUTBOX_POLL_SECONDS": "inf"},
        {"OUTBOX_REDIS_URL": "redis://h/0?max_connections=-1"},
    ],
)
def test_what_a_server_or_the_driver_would_refuse_is_refused_at_once(environ: dict[str, str]) -> None:
    with pytest.raises(InvalidSetting):
        usable(load({}, environ))


@pytest.mark.parametrize(
    "name", ["batch_size", "batch_bytes", "takeover_seconds", "journal_retention_seconds", "poll_seconds"]
)
def test_the_largest_that_is_allowed_works(box: Box, name: str) -> None:
    box.add("a")
    relay = box.relay(**{name: FIELDS[name].metadata["most"]})
    relay.check()
    relay.drain(timeout_seconds=0)
    relay._store.purge(relay._settings.journal_retention_seconds, 10**6)
    assert box.lane() == ["a"]


def test_what_a_url_says_of_the_form_of_answers_changes_nothing(box: Box) -> None:
    box.add("a")
    box.relay(redis_url=box.redis_url + "?decode_responses=true&protocol=3").drain(timeout_seconds=0)
    assert box.lane() == ["a"]


def usable(config: Settings) -> None:
    """Make what the settings are for; nothing is connected to."""
    database_url = config.database_url or "postgresql://h/d"
    Relay(
        replace(config, database_url=database_url, trace="off")
    ).close()  # a trace would be a file of any name


@fuzz(300)
@given(environ=st.dictionaries(st.sampled_from(list(FIELDS)), st.none(), max_size=3), data=st.data())
def test_variables_are_settings_or_refused(environ, data) -> None:
    values = {f"OUTBOX_{name.upper()}": data.draw(SET[name], name) for name in environ}
    with contextlib.suppress(InvalidSetting):
        usable(load({}, values))


toml_values = st.one_of(
    plain_text.map(json.dumps), st.integers().map(str), st.floats().map(str), st.sampled_from(["true", "false"]),
    st.sampled_from(["1" * 5000, "[" * 5000, "1979-05-27", "{}", "0x1", "''", '"""', "[[outbox]]"]),
)  # fmt: skip
lines = st.tuples(
    st.sampled_from([*FIELDS, "outbox", "outbox.schema", "[outbox]", ""]) | plain_text, toml_values
)


@fuzz(200)
@given(
    content=st.binary()
    | st.lists(lines.map(" = ".join), max_size=4).map(lambda found: "\n".join(found).encode())
)
@example(content=b"batch_size = " + b"1" * 5000)
@example(content=b"source = " + b"[" * 5000)
def test_files_are_settings_or_refused(tmp_path_factory, content) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content)
    with contextlib.suppress(InvalidSetting):
        usable(load({}, {}, str(path)))
