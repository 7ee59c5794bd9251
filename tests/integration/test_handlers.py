"""What becomes of an event that a handler gets: decoded, traced, tried again, given up."""

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from outbox import (
    AsyncConsumer,
    Consumer,
    InvalidEvent,
    Priority,
    Reject,
    Retry,
    current_priority,
    event,
    grants,
    publish,
)
from outbox.errors import RedisUnavailable
from tests.integration.bank import KINDS, Bank, entry, wait_until
from tests.roles import ROLES, UNDER_ROLES


@pytest.fixture(params=KINDS)
def bank(request, database_url, redis_url) -> Iterator[Bank]:
    bank = Bank(database_url, redis_url, request.param)
    yield bank
    bank.close()


def raising(*errors):
    """Return what a handler does that fails with these, one a delivery, and then succeeds."""
    left = list(errors)

    def act(event) -> None:
        if left and (error := left.pop(0)):
            raise error

    return act


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_failed_event_comes_back_and_holds_nothing_up(bank):
    made = bank.consumer(raising(ValueError("not yet")))
    bank.add("a")
    bank.add("b")
    assert made.drain() == 2
    assert bank.handled == ["a", "b"]
    assert bank.pending() == {"a": 1}
    assert made.it.counts == {"failed": 1, "handled": 1}


def test_what_was_handled_once_is_acked_before_the_next(bank):
    bank.add("a")
    bank.consumer().run_once()
    assert bank.pending() == {}


@pytest.mark.parametrize("bank", ["blocking", "blocking, async handlers"], indirect=True)
def test_an_event_whose_handler_was_interrupted_comes_back_as_a_new_delivery(bank):
    deliveries = []

    def act(event) -> None:
        deliveries.append(event.deliveries)
        if len(deliveries) == 1:
            raise KeyboardInterrupt

    made = bank.consumer(act, backoff=timedelta(milliseconds=1))
    bank.add("a")
    with pytest.raises(KeyboardInterrupt):
        made.run_once()
    wait_until(lambda: made.run_once() + 1 and len(deliveries) == 2)
    assert deliveries == [1, 2]


def test_a_handler_chooses_when_it_is_called_again(bank):
    made = bank.consumer(raising(Retry(after=0), Retry(after=timedelta(0)), Retry(after=timedelta(hours=1))))
    bank.add("a")
    assert made.drain() == 3
    assert bank.pending() == {"a": 3}


def test_no_password_in_a_rejection_is_kept(bank):
    made = bank.consumer(raising(Reject("no answer of postgresql://u:canary@h/d")))
    bank.add("a")
    assert made.drain() == 1
    assert bank.dead()[0]["dlq:error"] == "no answer of postgresql://u:***@h/d"


def test_what_is_rejected_is_a_dead_letter_at_once_and_says_why(bank, caplog):
    made = bank.consumer(raising(Reject("no such customer")))
    id_ = bank.add("a", subject="k", tenant="eu")
    assert made.drain() == 1
    (letter,) = bank.dead()
    assert letter["dlq:error"] == "no such customer"
    assert (letter["dlq:group"], letter["dlq:deliveries"], letter["dlq:entry"]) == ("g", "1", id_)
    assert datetime.fromisoformat(letter["dlq:died_at"]).tzinfo
    assert (letter["data"], letter["subject"], letter["tenant"]) == ('"a"', "k", "eu")
    assert bank.pending() == {}
    assert made.it._hand.held() == {}
    assert "event_dead" in [record.action for record in caplog.records]


def test_after_the_last_delivery_it_is_a_dead_letter_of_its_own_lane(bank):
    made = bank.consumer(raising(*[Retry(after=0)] * 2, KeyError("gone")), max_deliveries=3)
    bank.add("a", lane="s:backfill")
    assert made.drain() == 3
    (letter,) = bank.dead("s:backfill")
    assert (letter["dlq:error"], letter["dlq:deliveries"]) == ("KeyError: 'gone'", "3")
    assert bank.dead("s") == []


def test_an_error_shows_no_more_than_its_first_line_and_no_password(bank):
    made = bank.consumer(raising(ValueError("at redis://u:secret@h/0\nDETAIL: row (1)")), max_deliveries=1)
    bank.add("a")
    made.drain()
    (letter,) = bank.dead()
    assert letter["dlq:error"] == "ValueError: at redis://u:***@h/0"


def test_dead_letters_that_redis_refuses_stay_pending_and_others_go_on(bank):
    bank.redis.set("s:dlq", "no stream")
    made = bank.consumer(raising(Reject("no")))
    bank.add("a")
    bank.add("b")
    assert made.drain() == 2
    assert bank.handled == ["a", "b"]
    assert bank.pending() == {"a": 1}


def test_dead_letters_that_redis_refuses_are_tried_again(bank):
    bank.redis.set("s:dlq", "no stream")
    brief = timedelta(milliseconds=1)
    made = bank.consumer(raising(*[Reject("no")] * 2), backoff=brief, backoff_max=brief)
    bank.add("a")
    made.run_once()
    bank.redis.delete("s:dlq")
    wait_until(lambda: made.run_once() + 1 and bank.dead())
    assert bank.pending() == {}


def test_what_a_handler_cancels_is_its_own_failure(bank):
    made = bank.consumer(raising(asyncio.CancelledError("of something it awaits")))
    bank.add("a")
    assert made.drain() == 1
    assert made.it.counts == {"failed": 1}
    assert bank.pending() == {"a": 1}


@pytest.mark.parametrize("bank", ["asyncio"], indirect=True)
def test_a_consumer_that_is_cancelled_ends_and_leaves_its_event_pending(bank):
    bank.add("a")
    consumer = AsyncConsumer(bank.redis_url, group="g", streams=["s"], max_deliveries=1)

    async def cancel_in_the_handler() -> None:
        begun = asyncio.Event()

        @consumer.on_any
        async def handle(event) -> None:
            begun.set()
            await asyncio.Event().wait()

        running = asyncio.create_task(consumer.run())
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await running

    asyncio.run(cancel_in_the_handler())
    assert bank.pending() == {"a": 1}
    assert bank.dead() == []


# -- what nobody can handle ----------------------------------------------------------------------------------------


def test_an_event_that_no_handler_takes_is_dead_or_skipped(bank):
    for unknown, dead in (("dead", 1), ("skip", 0)):
        made = bank.consumer(on="Other", unknown=unknown, group=unknown)
        bank.add("a")
        bank.redis.delete("s:dlq")
        made.drain()
        assert len(bank.dead()) == dead, unknown
        assert bank.pending(group=unknown) == {}
    assert bank.handled == []


def test_a_handler_that_comes_later_takes_what_comes_later(bank):
    made = bank.consumer(on="Other", unknown="skip")
    bank.add("a")
    made.drain()
    made.it.on("T")(made.it._handlers[0].function)
    bank.add("b")
    made.drain()
    assert bank.handled == ["b"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"data": "{"}, "data: "),
        ({"priority": "high"}, "priority: "),
        ({"priority": "99999"}, "priority: "),
        ({"type": b"\xff"}, "type"),
        ({"data": b"\xff\xfe"}, "data: "),
    ],
)
def test_what_cannot_be_read_is_a_dead_letter_that_names_the_field(bank, fields, why):
    made = bank.consumer()
    bank.add("a", **fields)
    bank.add("b")
    assert made.drain() == 2
    assert bank.handled == ["b"]
    assert why in bank.dead()[0]["dlq:error"]


@pytest.mark.parametrize("left_out", ["type", "data"])
def test_what_lacks_a_field_is_a_dead_letter_that_names_it(bank, left_out):
    made = bank.consumer()
    fields = entry("a")
    del fields[left_out]
    bank.redis.xadd("s", fields)
    bank.redis.xadd("s", {"hello": "world"})
    bank.redis.xadd("s", {f"field {n}": n for n in range(5000)})
    assert made.drain() == 3
    assert f"{left_out}: it is missing" in bank.dead()[0]["dlq:error"]
    assert len(bank.dead()) == 3


def test_an_entry_that_was_deleted_while_it_was_pending_is_counted_as_lost(bank, caplog):
    made = bank.consumer(raising(Retry(after=0)))
    id_ = bank.add("a")
    assert made.run_once() == 1
    bank.redis.xdel("s", id_)
    made.drain()
    assert made.it.counts["lost"] == 1
    assert bank.pending() == made.it._hand.held() == {}
    assert "entry_lost" in [record.action for record in caplog.records]


def test_a_group_that_is_gone_is_created_again_at_the_first_entry(bank, caplog):
    caplog.set_level(logging.INFO)
    made = bank.consumer()
    bank.add("a")
    made.drain()
    bank.redis.xgroup_destroy("s", "g")
    with pytest.raises(RedisUnavailable, match="NOGROUP"):
        made.run_once()
    assert made.drain() == 1
    assert bank.handled == ["a", "a"]
    assert [record.action for record in caplog.records].count("group_created") == 2


# -- decoded -------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Part:
    weight: Decimal
    colour: Colour | None = None


@event(stream="s", key="id")
@dataclass(frozen=True)
class AsDataclass:
    id: UUID
    at: datetime
    day: date
    parts: list[Part] = field(default_factory=list)
    note: str | None = None


@event(stream="s")
@attrs.frozen
class AsAttrs:
    id: UUID
    weight: Decimal


@event(stream="s")
class AsStruct(msgspec.Struct, frozen=True):
    id: UUID
    colour: Colour


@event(stream="s")
class AsModel(pydantic.BaseModel):
    id: UUID
    at: datetime
    parts: list[Decimal]


NOW = datetime(2026, 1, 31, 12, 30, tzinfo=UTC)
EVENTS = [
    AsDataclass(uuid4(), NOW, NOW.date(), [Part(Decimal("1.50"), Colour.RED), Part(Decimal("2"))], "né"),
    AsDataclass(uuid4(), NOW, NOW.date()),
    AsAttrs(uuid4(), Decimal("0.10")),
    AsStruct(uuid4(), Colour.RED),
    AsModel(id=uuid4(), at=NOW, parts=[Decimal("1.1")]),
]


def test_what_was_published_arrives_as_it_was(box, Session):
    got = []
    consumer = Consumer(box.redis_url, group="g", streams=["s"])
    for cls in (AsDataclass, AsAttrs, AsStruct, AsModel):
        consumer.on(cls)(lambda event: got.append(event.data))
    consumer.on("Note")(lambda event: got.append(event.data))
    with Session() as session:
        ids = [publish(session, event, headers={"tenant": "eu"}) for event in EVENTS]
        ids.append(publish(session, {"any": ["dict", 1.5, None]}, type="Note", stream="s", key="k"))
        session.commit()
    box.relay().drain()
    seen = []
    consumer.on_any(seen.append)
    assert consumer.drain() == len(ids)
    assert got == [*EVENTS, {"any": ["dict", 1.5, None]}]
    assert [event.id for event in seen] == ids
    assert seen[0].key == str(EVENTS[0].id)
    assert {event.headers["tenant"] for event in seen[:-1]} == {"eu"}
    assert (seen[0].lane, seen[0].stream, seen[0].type) == ("primary", "s", "AsDataclass")
    assert seen[0].data == EVENTS[0]
    consumer.close()


def test_a_class_that_is_no_event_is_refused_at_once(redis_url):
    with pytest.raises(InvalidEvent, match="Part is no event"):
        Consumer(redis_url, group="g", streams=["s"]).on(Part)


# -- through three services ----------------------------------------------------------------------------------------


def hop(box, Session, stream, to):
    """Make a service that reacts to each event of a stream by one of another."""
    if UNDER_ROLES:  # one role plays both
        grants.apply(box.database_url, grants.statements({"consumer": ROLES["service"]}))
    consumer = Consumer(box.redis_url, group="g", streams=[stream], sessions=Session)
    seen = []

    @consumer.on_any
    def react(event, session) -> None:
        seen.append(event)
        span = trace.get_current_span().get_span_context()
        seen[-1].seen_in = (current_priority(), span.trace_id)
        publish(session, {}, type="Next", stream=to)

    return consumer, seen


@pytest.mark.parametrize("traced", [True, False])
def test_priority_correlation_and_trace_go_on_through_three_services(box, Session, traced):
    tracer = TracerProvider().get_tracer("test")
    with Session() as session:
        if traced:
            with tracer.start_as_current_span("first") as span:
                first = publish(session, {}, type="First", stream="one", priority=Priority.LOW)
            trace_id = span.get_span_context().trace_id
        else:
            first = publish(session, {}, type="First", stream="one", priority=Priority.LOW)
            trace_id = 0
        session.commit()
    events = []
    for stream, to in (("one", "two"), ("two", "three"), ("three", "four")):
        box.relay().drain()
        consumer, seen = hop(box, Session, stream, to)
        assert consumer.drain() == 1
        consumer.close()
        events += seen
    assert [event.priority for event in events] == [Priority.LOW] * 3
    assert [event.lane for event in events] == ["backfill"] * 3
    assert [event.seen_in for event in events] == [(Priority.LOW, trace_id)] * 3
    assert [event.correlation_id for event in events] == [str(first)] * 3
    assert [event.causation_id for event in events] == [None, str(first), str(events[1].id)]
    with Session() as session:
        assert current_priority() == Priority.NORMAL
        publish(session, {}, type="Unrelated", stream="five")
        session.commit()
    headers = box.sql.execute("SELECT headers FROM outbox WHERE stream = 'five'").fetchone()[0]
    assert json.dumps(headers) == "null"


def test_without_opentelemetry_the_trace_context_is_handed_on(box, Session, monkeypatch):
    monkeypatch.setattr(sys.modules["outbox.event"], "current_trace", dict)
    parent = f"00-{uuid4().hex}-00f067aa0ba902b7-01"
    with Session() as session:
        publish(session, {}, type="First", stream="one", headers={"traceparent": parent})
        session.commit()
    box.relay().drain()
    consumer, _ = hop(box, Session, "one", "two")
    assert consumer.drain() == 1
    consumer.close()
    headers = box.sql.execute("SELECT headers FROM outbox WHERE stream = 'two'").fetchone()[0]
    assert headers["traceparent"] == parent
