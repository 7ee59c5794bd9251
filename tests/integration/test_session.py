"""The write side on real transactions: what is recorded, when, in which order, and what is refused."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Column,
    ForeignKey,
    Sequence,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, InvalidRequestError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    registry,
    relationship,
    scoped_session,
    sessionmaker,
)

import outbox
from outbox import InvalidEvent, Priority, RecordsEvents, processing_priority, publish
from tests.roles import UNDER_ROLES, as_owner
from tests.service import Base, Counted, Customer, CustomerRegistered, rows


@pytest.fixture(autouse=True)
def tables(engine):
    Base.metadata.create_all(engine)


@pytest.fixture
def session(engine):
    with Session(engine) as session:
        yield session


@pytest.fixture
def statements(engine):
    """The SQL that the engine has run."""
    seen: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
    return seen


def counted(engine) -> list[int]:
    return [json.loads(row.data)["n"] for row in rows(engine)]


def keys(engine) -> list[str]:
    return [row.key for row in rows(engine)]


# -- when an event is recorded ----------------------------------------------------------------------------


def test_an_event_is_recorded_with_the_flush_and_kept_with_the_commit(engine, session):
    event_id = publish(session, CustomerRegistered("c1", "Ada"), headers={"tenant": "eu"})
    session.flush()
    assert session.scalar(text("SELECT count(*) FROM outbox")) == 1
    assert rows(engine) == []
    session.commit()
    (row,) = rows(engine)
    assert (row.event_id, row.stream, row.type, row.key) == (event_id, "customer", "CustomerRegistered", "c1")
    assert (row.data, row.headers) == ('{"customer_id":"c1","name":"Ada"}', {"tenant": "eu"})
    assert (row.priority, row.attempts, row.available_at) == (0, 0, None)


def test_what_is_rolled_back_never_was(engine, session):
    publish(session, Counted(1))
    session.rollback()
    publish(session, Counted(2))
    session.flush()
    session.rollback()
    session.commit()
    publish(session, Counted(3))
    session.commit()
    assert counted(engine) == [3]


def test_a_savepoint_takes_its_events_with_it(engine, session):
    publish(session, Counted(1))
    with pytest.raises(RuntimeError), session.begin_nested():
        publish(session, Counted(2))
        with session.begin_nested():
            publish(session, Counted(3))
        raise RuntimeError
    with session.begin_nested():
        publish(session, Counted(4))
    session.commit()
    assert counted(engine) == [1, 4]


def test_an_event_recorded_before_a_savepoint_survives_its_rollback(engine, session):
    publish(session, Counted(1))
    session.begin_nested().rollback()
    session.commit()
    assert counted(engine) == [1]


def test_an_outer_rollback_takes_what_a_released_savepoint_held(engine, session):
    with session.begin_nested():
        publish(session, Counted(1))
    session.rollback()
    session.commit()
    assert counted(engine) == []


def test_a_failed_flush_in_a_savepoint_takes_only_its_own(engine, session):
    session.add(Customer(id="c1"))
    publish(session, Counted(1))
    with pytest.raises(IntegrityError), session.begin_nested():
        publish(session, Counted(2))
        session.execute(insert(Customer).values(id="c1", name=""))
    session.commit()
    assert counted(engine) == [1]


def test_a_constraint_that_fails_at_the_commit_takes_the_event_too(engine, session):
    session.execute(text("CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
    session.commit()
    session.execute(text("INSERT INTO late VALUES (1), (1)"))
    publish(session, Counted(1))
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    assert counted(engine) == []


@pytest.mark.parametrize("options", [{"autoflush": False}, {"expire_on_commit": False}, {"twophase": True}])
def test_sessions_of_every_kind(engine, options):
    with Session(engine, **options) as session:
        session.add(Customer.register("c1"))
        publish(session, Counted(2))
        session.commit()
    assert [row.type for row in rows(engine)] == ["CustomerRegistered", "Counted"]


def test_what_is_published_stays_recorded_when_all_objects_are_expunged(engine, session):
    publish(session, Counted(1))
    session.expunge_all()
    session.commit()
    assert counted(engine) == [1]


def test_what_waits_when_all_objects_are_expunged_stays_before_the_next_savepoint(engine, session):
    publish(session, Counted(1))
    session.expunge_all()
    with pytest.raises(RuntimeError), session.begin_nested():
        publish(session, Counted(2))
        raise RuntimeError
    session.commit()
    assert counted(engine) == [1]


def test_what_is_published_beside_a_new_object_is_flushed_without_it(engine, session):
    customer = Customer(id="c1")
    session.add(customer)
    publish(session, Counted(1))
    session.expunge(customer)
    session.flush()
    assert session.scalar(text("SELECT count(*) FROM outbox")) == 1
    assert not session.new
    session.commit()
    assert counted(engine) == [1]


def test_what_a_hook_of_the_commit_publishes_stays_recorded_when_it_expunges_all(engine, session):
    @event.listens_for(session, "before_commit", once=True)
    def publish_and_expunge(session):
        session.add(Customer(id="c1"))
        publish(session, Counted(1))
        session.expunge_all()

    session.commit()
    assert counted(engine) == [1]


@pytest.mark.filterwarnings("error::sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("finish", [Session.rollback, Session.close])
def test_a_transaction_that_is_given_up_leaves_nothing_to_flush(engine, session, finish):
    session.add(Customer(id="c1"))
    publish(session, Counted(1))
    finish(session)
    assert not session.new
    session.commit()
    assert counted(engine) == []


def test_a_session_that_is_closed_has_recorded_nothing(engine):
    with Session(engine) as session:
        publish(session, Counted(1))
        session.flush()
        publish(session, Counted(2))
    assert counted(engine) == []


def test_statements_that_flush_nothing_are_accompanied_by_publish(engine, session):
    session.execute(insert(Customer), [{"id": "c1", "name": ""}, {"id": "c2", "name": ""}])
    session.execute(update(Customer).values(name="x"))
    publish(session, Counted(1))
    session.commit()
    assert counted(engine) == [1]


def test_a_session_in_a_scope(engine):
    scoped = scoped_session(sessionmaker(engine))
    publish(scoped, Counted(1))
    scoped.commit()
    scoped.remove()
    assert counted(engine) == [1]


def test_asynchronous_sessions_record_alike(database_url, engine):
    async def record() -> None:
        asynchronous = create_async_engine(database_url)
        sessions = async_sessionmaker(asynchronous)
        async with AsyncSession(asynchronous) as session, session.begin():
            session.add(Customer.register("c1"))
            publish(session, Counted(1))
            async with session.begin_nested() as savepoint:
                publish(session, Counted(2))
                await savepoint.rollback()
        scoped = async_scoped_session(sessions, asyncio.current_task)
        publish(scoped, Counted(3))
        await scoped.commit()
        await scoped.remove()
        await asynchronous.dispose()

    asyncio.run(record())
    assert [json.loads(row.data).get("n") for row in rows(engine)] == [None, 1, 3]


# -- objects ----------------------------------------------------------------------------------------------


def test_an_object_added_again_after_a_rollback_brings_its_events_again(engine, session):
    customer = Customer.register("c1")
    for finish in (session.rollback, lambda: (session.flush(), session.rollback()), session.commit):
        session.add(customer)
        finish()
    assert keys(engine) == ["c1"]


def test_an_object_added_again_after_a_flush_that_failed(engine, session):
    session.add(Customer(id="c1"))
    session.commit()
    customer = Customer.register("c1")
    session.add(customer)
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    customer.id = "c2"
    session.add(customer)
    session.commit()
    assert len(rows(engine)) == 1


def test_an_object_of_a_closed_session_brings_its_events_to_the_next(engine):
    customer = Customer.register("c1")
    with Session(engine) as first:
        first.add(customer)
    with Session(engine) as second:
        second.add(customer)
        second.commit()
        second.commit()
    assert keys(engine) == ["c1"]


def test_merge_carries_events_once(engine, session):
    customer = Customer.register("c1")
    session.merge(customer)
    session.merge(customer)
    session.commit()
    session.merge(customer)
    session.commit()
    assert keys(engine) == ["c1"]


def test_merge_carries_events_again_after_a_rollback(engine, session):
    customer = Customer.register("c1")
    session.merge(customer)
    session.flush()
    session.rollback()
    session.merge(customer)
    session.commit()
    assert keys(engine) == ["c1"]


@pytest.mark.parametrize("finish", [Session.rollback, Session.close])
def test_merge_carries_the_events_of_a_detached_object_until_a_commit(engine, session, finish):
    session.add(Customer(id="c1"))
    session.commit()
    customer = session.get_one(Customer, "c1")
    session.close()
    customer.name = "new"
    customer.record(Counted(1))
    for end in (finish, finish, Session.commit, Session.commit):
        session.merge(customer)
        session.flush()
        end(session)
    assert (session.get_one(Customer, "c1").name, counted(engine)) == ("new", [1])


def changed(session):
    """Return an object that is in the database, with a change and its event that are not."""
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    customer.name = "new"
    customer.record(Counted(1))
    return customer


@pytest.mark.parametrize("leave", ["close", "expunge"])
def test_merge_carries_what_left_a_session_without_a_commit(engine, session, leave):
    customer = changed(session)
    session.flush()
    if leave == "expunge":
        session.expunge(customer)
        session.rollback()
    session.close()
    session.merge(customer)
    session.commit()
    assert (session.get_one(Customer, "c1").name, counted(engine)) == ("new", [1])


@pytest.mark.parametrize("undo", ["rollback", "delete", "failed flush"])
def test_what_a_rollback_has_expired_brings_no_events_to_the_next_session(engine, session, undo):
    customer = changed(session)
    if undo == "delete":
        session.delete(customer)
    session.flush()
    if undo == "failed flush":
        session.execute(insert(Customer).values(id="c2", name=""))
        session.add(Customer(id="c2"))
        with pytest.raises(IntegrityError):
            session.flush()
    else:
        session.rollback()
    session.close()
    session.add(customer)
    session.commit()
    assert (customer.name, counted(engine)) == ("", [])


def test_merge_carries_the_events_of_what_hangs_on_an_object(engine, session):
    class Own(DeclarativeBase):
        pass

    class Line(RecordsEvents, Own):
        __tablename__ = "line"
        id: Mapped[int] = mapped_column(primary_key=True)
        order_id: Mapped[int] = mapped_column(ForeignKey("order.id"))

    class Order(RecordsEvents, Own):
        __tablename__ = "order"
        id: Mapped[int] = mapped_column(primary_key=True)
        lines: Mapped[list[Line]] = relationship()

    Own.metadata.create_all(engine)
    order = Order(id=1, lines=[Line(id=1), Line(id=2)])
    for n, line in enumerate(order.lines, 1):
        line.record(Counted(n))
    session.merge(order)
    session.commit()
    assert sorted(counted(engine)) == [1, 2]


def test_an_event_on_a_clean_persistent_object_lands_and_a_rollback_forgets_it(engine, session):
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    customer.record(Counted(1))
    session.rollback()
    customer.record(Counted(2))
    session.commit()
    session.commit()
    assert counted(engine) == [2]


def test_a_deleted_object_may_say_so(engine, session):
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    customer.record(Counted(1))
    session.delete(customer)
    session.commit()
    assert counted(engine) == [1]


def test_events_recorded_in_the_services_own_flush_hooks(engine, session):
    customer = Customer(id="c1")
    session.add(customer)
    event.listen(session, "before_flush", lambda *_: customer.record(Counted(1)), once=True)
    session.commit()
    assert counted(engine) == [1]


def test_events_recorded_while_a_flush_is_at_work_land_with_it(engine, session):
    event.listen(Customer, "after_insert", lambda *_: publish(session, Counted(1)), once=True)
    event.listen(session, "after_flush", lambda *_: publish(session, Counted(2)), once=True)
    session.add(Customer(id="c1"))
    session.flush()
    session.expunge_all()
    session.commit()
    assert counted(engine) == [1, 2]


def test_mappings_of_every_kind(engine, session):
    class Own(MappedAsDataclass, DeclarativeBase):
        pass

    class Dataclassed(RecordsEvents, Own):
        __tablename__ = "dataclassed"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Plain(DeclarativeBase):
        pass

    class Parent(Plain, RecordsEvents):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "parent"}  # noqa: RUF012

    class Child(Parent):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(ForeignKey("parent.id"), primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "child"}  # noqa: RUF012

    class Concrete(Parent):
        __tablename__ = "concrete"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        __mapper_args__ = {"polymorphic_identity": "concrete", "concrete": True}  # noqa: RUF012

    class Imperative(RecordsEvents):
        def __init__(self, id: str) -> None:
            self.id = id

    mapped = registry()
    mapped.map_imperatively(
        Imperative, Table("imperative", mapped.metadata, Column("id", String, primary_key=True))
    )
    for metadata in (Own.metadata, Plain.metadata, mapped.metadata):
        metadata.create_all(engine)
    kinds = (
        Dataclassed(id=1),
        Parent(id=1),
        Parent(id=3),
        Child(id=2),
        Imperative(id="x"),
        Concrete(id=4, kind=""),
    )
    for n, made in enumerate(kinds, 1):
        made.record(Counted(n))
        session.add(made) if n % 2 else session.merge(made)
    session.commit()
    assert counted(engine) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("all_objects", [False, True])
def test_a_new_object_that_is_expunged_takes_its_events_along(engine, session, all_objects):
    customer = Customer.register("c1")
    session.add(customer)
    publish(session, Counted(1))
    session.expunge_all() if all_objects else session.expunge(customer)
    session.commit()
    assert [row.type for row in rows(engine)] == ["Counted"]
    session.add(customer)
    session.commit()
    assert [row.type for row in rows(engine)] == ["Counted", "CustomerRegistered"]


def test_a_change_that_is_expunged_takes_its_events_along_and_brings_them_back(engine, session):
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    for n, finish in enumerate((session.commit, session.rollback, session.close)):
        customer.name = f"{n}"
        customer.record(Counted(n))
        session.expunge(customer)
        finish()
        assert counted(engine) == [*range(n)]
        session.add(customer)
        session.commit()
        assert counted(engine) == [*range(n + 1)]


def test_an_object_without_changes_leaves_its_events_behind_when_it_is_expunged(engine, session):
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    session.execute(update(Customer).values(name="x"))
    customer.record(Counted(1))
    session.expunge(customer)
    session.commit()
    session.add(customer)
    session.commit()
    assert counted(engine) == [1]


def test_what_was_flushed_stays_recorded_when_its_object_is_expunged(engine, session):
    customer = Customer.register("c1")
    session.add(customer)
    session.flush()
    session.expunge(customer)
    session.commit()
    session.add(customer)
    session.commit()
    assert keys(engine) == ["c1"]


def test_a_flush_after_all_events_were_expunged_is_not_the_last_one(engine, session):
    customer = Customer.register("c1")
    session.add(customer)
    session.expunge(customer)
    session.flush()
    publish(session, Counted(1))
    session.flush()
    assert session.scalar(text("SELECT count(*) FROM outbox")) == 1


@pytest.mark.parametrize("bring", [Session.add, Session.delete, Session.merge])
def test_an_object_of_no_session_brings_its_events(engine, session, bring):
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    session.close()
    customer.record(Counted(1))
    bring(session, customer)
    session.commit()
    assert counted(engine) == [1]


@pytest.mark.parametrize("inside", ["outer", "inner"])
def test_an_outer_savepoint_rolled_back_with_an_inner_one_open_gives_events_back(engine, session, inside):
    customer = Customer(id="c1")
    outer = session.begin_nested()
    if inside == "outer":
        session.add(customer)
        customer.record(Counted(1))
    session.begin_nested()
    session.add(customer)
    customer.record(Counted(2))
    publish(session, Counted(3))
    outer.rollback()
    session.add(customer)
    session.commit()
    assert counted(engine) == ([1, 2] if inside == "outer" else [2])


@pytest.mark.parametrize("at_once", [False, True])
def test_what_a_savepoint_has_undone_does_not_come_back_with_an_outer_one(engine, session, at_once):
    customer = Customer(id="c1")
    outer = session.begin_nested()
    session.add(customer)
    customer.record(Counted(1))
    inner = session.begin_nested()
    customer.record(Counted(2))
    if at_once:  # from the innermost outwards
        session.rollback()
    else:
        inner.rollback()
        outer.rollback()
    session.add(customer)
    session.commit()
    assert counted(engine) == [1]


# -- hooks of the service's own ---------------------------------------------------------------------------

ENDED = r"^no event can be recorded .*: publish before the commit, or in a new transaction \(This "


@pytest.mark.parametrize("hook", ["after_commit", "after_rollback"])
@pytest.mark.parametrize("nested", [False, True])
def test_after_a_commit_or_rollback_recording_is_refused(engine, session, hook, nested):
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    end = session.begin_nested() if nested else session.begin()
    refused = []

    @event.listens_for(session, hook, once=True)
    def record_late(session):
        for record in (lambda: publish(session, Counted(1)), lambda: customer.record(Counted(2))):
            with pytest.raises(InvalidRequestError, match=ENDED) as caught:
                record()
            refused.append(caught)

    end.commit() if hook == "after_commit" else end.rollback()
    assert len(refused) == 2
    publish(session, Counted(3))
    session.commit()
    assert counted(engine) == [3]


def test_a_refusal_that_no_hook_expects_reaches_who_commits(engine, session):
    event.listen(session, "after_commit", lambda session: publish(session, Counted(1)))
    publish(session, Counted(2))
    with pytest.raises(InvalidRequestError, match=ENDED):
        session.commit()
    assert counted(engine) == [2]


def test_asynchronous_hooks_are_refused_alike(database_url, engine):
    async def record() -> None:
        asynchronous = create_async_engine(database_url)
        async with AsyncSession(asynchronous) as session:
            event.listen(session.sync_session, "before_commit", lambda _: publish(session, Counted(1)))
            event.listen(session.sync_session, "after_commit", lambda _: publish(session, Counted(2)))
            with pytest.raises(InvalidRequestError, match=ENDED):
                await session.commit()
        await asynchronous.dispose()

    asyncio.run(record())
    assert counted(engine) == [1]


def test_between_prepare_and_commit_recording_is_refused(engine):
    with Session(engine, twophase=True) as session:
        publish(session, Counted(1))
        session.prepare()
        with pytest.raises(InvalidRequestError, match=ENDED):
            publish(session, Counted(2))
        session.commit()
    assert counted(engine) == [1]


def test_between_a_flush_that_failed_and_its_rollback_recording_is_refused(engine, session):
    session.add(Customer(id="c1"))
    session.commit()
    session.add(Customer(id="c1"))
    with pytest.raises(IntegrityError):
        session.flush()
    with pytest.raises(InvalidRequestError, match=ENDED + ".*first issue Session.rollback"):
        publish(session, Counted(1))
    session.rollback()
    publish(session, Counted(2))
    session.commit()
    assert counted(engine) == [2]


@pytest.mark.parametrize(
    "hook", ["after_begin", "before_flush", "after_flush", "after_flush_postexec", "before_commit"]
)
@pytest.mark.parametrize("first", [False, True])
def test_what_hooks_of_a_transaction_record_lands_with_it(engine, session, hook, first):
    if not first:
        session.begin_nested().commit()
        session.commit()
    event.listen(session, hook, lambda session, *_: publish(session, Counted(1)), once=True)
    session.add(Customer(id="c1"))
    session.commit()
    assert counted(engine) == [1]


def test_a_hook_may_record_with_every_flush(engine, session):
    event.listen(session, "after_flush", lambda session, *_: publish(session, Counted(1)))
    session.add(Customer(id="c1"))
    session.commit()
    session.add(Customer(id="c2"))
    session.commit()
    assert counted(engine) == [1, 1]


@pytest.mark.parametrize("finish", [Session.commit, Session.rollback])
def test_what_is_recorded_when_a_transaction_has_ended_belongs_to_the_next(engine, session, finish):
    session.add(Customer(id="c1"))

    @event.listens_for(session, "after_transaction_end")
    def record(session, transaction):
        if transaction.parent is None and not session.in_transaction() and not keys(engine):
            publish(session, Counted(1))

    finish(session)
    assert counted(engine) == []
    session.commit()
    assert counted(engine) == [1]


def test_what_is_recorded_when_a_flush_or_savepoint_has_ended_belongs_to_what_is_around_it(engine, session):
    numbers = iter(range(9))

    @event.listens_for(session, "after_transaction_end")
    def record(session, transaction):
        if transaction.parent is not None and (n := next(numbers)) < 2:
            publish(session, Counted(n))

    session.add(Customer(id="c1"))
    session.commit()
    assert counted(engine) == [0, 1]


def test_what_is_recorded_after_a_rollback_belongs_to_the_next_transaction(engine, session):
    event.listen(session, "after_soft_rollback", lambda session, _: publish(session, Counted(1)), once=True)
    session.add(Customer(id="c1"))
    session.rollback()
    session.commit()
    assert counted(engine) == [1]


@pytest.mark.parametrize("hook", ["after_commit", "after_rollback"])
def test_an_object_with_events_is_not_added_after_a_commit_or_rollback(engine, session, hook):
    customer = Customer.register("c1")

    @event.listens_for(session, hook, once=True)
    def add_late(session):
        session.add(Customer(id="c2"))
        with pytest.raises(InvalidRequestError, match=ENDED):
            session.add(customer)
        assert customer not in session

    session.connection()
    session.commit() if hook == "after_commit" else session.rollback()
    session.commit()
    assert keys(engine) == []
    session.add(customer)
    session.commit()
    assert keys(engine) == ["c1"]


# -- priority, order, cost --------------------------------------------------------------------------------


def test_the_priority_is_that_of_the_scope_at_the_time_of_recording(engine, session):
    customer = Customer(id="c1")
    session.add(customer)
    with processing_priority(Priority.LOW):
        customer.record(Counted(1))
        customer.record(Counted(2), priority=Priority.CRITICAL)
        publish(session, Counted(3), priority=7)
    with processing_priority(Priority.HIGH):
        session.commit()
    assert [row.priority for row in rows(engine)] == [-50, 100, 7]


def test_what_a_late_hook_of_a_commit_publishes_and_then_expires_is_recorded(engine, session):
    customer = Customer(id="c1", name="Ada")
    session.add(customer)
    session.commit()

    @event.listens_for(session, "before_commit", once=True)
    def publish_late(session):
        customer.name = "Eve"
        publish(session, CustomerRegistered("c1", "Eve"))
        session.expire(customer)

    session.connection()
    session.commit()
    assert keys(engine) == ["c1"]


def test_a_savepoint_within_a_hook_of_a_flush_is_fine(engine, session):
    @event.listens_for(session, "after_flush", once=True)
    def use_savepoint(session, context):
        with session.begin_nested():
            session.execute(text("SELECT 1"))

    session.add(Customer(id="c1", name="Ada"))
    publish(session, CustomerRegistered("c1", "Ada"))
    session.commit()
    assert keys(engine) == ["c1"]


def test_a_session_that_cannot_begin_records_nothing(engine):
    with Session(engine, autobegin=False) as session:
        with pytest.raises(InvalidRequestError, match="[Aa]utobegin"):
            publish(session, CustomerRegistered("c1", "Ada"))
        with session.begin():
            publish(session, CustomerRegistered("c2", "Eve"))
    assert keys(engine) == ["c2"]


def test_subclasses_of_what_a_column_holds_are_stored_as_what_they_are(engine, session):
    class Word(str):
        pass

    class Number(int):
        pass

    class Moment(datetime):
        pass

    at = Moment(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    publish(
        session,
        {"n": 1},
        type=Word("Note"),
        stream=Word("s"),
        key=Word("k"),
        priority=Number(7),
        available_at=at,
    )
    session.commit()
    (row,) = rows(engine)
    assert (row.type, row.stream, row.key, row.priority, row.available_at) == ("Note", "s", "k", 7, at)


def test_ids_are_in_the_order_of_recording(engine, session):
    first, second = Customer(id="c1"), Customer(id="c2")
    session.add_all([first, second])
    for n in range(0, 9, 3):
        second.record(Counted(n))
        publish(session, Counted(n + 1))
        if n == 3:
            session.flush()
        first.record(Counted(n + 2))
    session.commit()
    assert counted(engine) == list(range(9))
    times = [row.created_at for row in rows(engine)]
    assert times == sorted(times)


def test_events_are_inserted_after_the_rows_on_which_writers_take_turns(engine, session, statements):
    customer = Customer(id="c1")
    session.add(customer)
    session.commit()
    customer.name = "new"
    customer.record(Counted(1))
    session.add(Customer.register("c2"))
    del statements[:]
    session.commit()
    writes = [statement for statement in statements if not statement.startswith("SELECT")]
    assert "outbox" in writes[-1]
    assert [("customer" in write) for write in writes[:-1]] == [True, True]


def test_a_thousand_events_are_one_insert(engine, session, statements):
    for n in range(1000):
        publish(session, Counted(n))
    session.commit()
    assert len([statement for statement in statements if "outbox" in statement]) == 1
    assert counted(engine) == list(range(1000))


def test_any_number_of_events_keeps_its_order(engine, session):
    for n in range(2500):
        publish(session, Counted(n))
    session.commit()
    assert counted(engine) == list(range(2500))


def test_large_events_are_inserted_a_few_at_a_time(engine, session, statements, monkeypatch):
    monkeypatch.setattr("outbox.session.PAGE_BYTES", 150)
    for n in range(7):
        options = {"headers": {"h": "x" * 80}} if n > 3 else {}
        publish(session, {"n": n, "text": "x" * (300 if n == 2 else 80)}, type="T", stream="s", **options)
    session.commit()
    assert len([statement for statement in statements if "outbox" in statement]) == 5
    assert counted(engine) == list(range(7))
    with as_owner(engine).connect() as connection:
        assert connection.scalar(text("SELECT count(DISTINCT xmin::text) FROM outbox")) == 1


def test_an_event_beside_a_business_row_adds_one_statement_and_nothing_else(engine, session, statements):
    session.add(Customer.register("c1"))
    session.commit()
    assert ["customer" in statements[0], "outbox" in statements[1]] == [True, True]
    assert len(statements) == 2


def test_every_column_comes_back_as_it_was_said(engine, session):
    odd = '"quoted", {braced}, [back\\slashed], é\U0001f600, \x7f\t\n, null'
    moment = datetime(2030, 1, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    publish(
        session,
        {"odd": odd},
        type=odd,
        stream="a/b:{c}",
        key=odd,
        priority=Priority.BULK,
        headers={"odd": odd},
        available_at=moment,
    )
    publish(session, {}, type="null", stream="s")
    session.commit()
    first, second = rows(engine)
    assert (first.type, first.stream, first.key, first.priority) == (odd, "a/b:{c}", odd, -100)
    assert (json.loads(first.data), first.headers, first.available_at) == ({"odd": odd}, {"odd": odd}, moment)
    assert (second.type, second.key, second.available_at, second.headers) == ("null", None, None, None)


def test_an_id_of_the_callers_own_that_waits_already_is_recorded_once(engine, session):
    own = uuid4()
    assert publish(session, Counted(1), event_id=own) == own
    session.commit()
    publish(session, Counted(2), event_id=str(own))
    publish(session, Counted(3))
    session.commit()
    assert counted(engine) == [1, 3]


def test_an_event_may_wait_for_its_time(engine, session):
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    publish(session, Counted(1), available_at=moment)
    session.commit()
    assert rows(engine)[0].available_at == moment


def test_tables_in_a_schema_of_their_own(empty_database_url):
    from sqlalchemy import create_engine

    from outbox import migrate

    migrate.upgrade(empty_database_url, schema="my messages")
    engine = create_engine(empty_database_url).execution_options(schema_translate_map={None: "my messages"})
    with Session(engine) as session:
        publish(session, Counted(1))
        session.commit()
        assert session.scalar(text('SELECT count(*) FROM "my messages".outbox')) == 1
    engine.dispose()


# -- payloads ---------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


class Size(StrEnum):
    BIG = "big"


class Level(IntEnum):
    ONE = 1


FIELDS: dict[str, Any] = {
    "id": UUID(int=7),
    "at": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    "price": Decimal("10.50"),
    "colour": Colour.RED,
    "tags": ["é", "\U0001f600"],
}
ENCODED = (
    '{"id":"00000000-0000-0000-0000-000000000007","at":"2026-01-02T03:04:05.000006+00:00","price":"10.50",'
    '"colour":"red","tags":["é","\U0001f600"]}'
)


@outbox.event(stream="s", key="id")
@dataclass(slots=True)
class OfDataclass:
    id: UUID
    at: datetime
    price: Decimal
    colour: Colour
    tags: list[str]


@outbox.event(stream="s", key="id")
class OfPydantic(pydantic.BaseModel):
    id: UUID
    at: datetime
    price: Decimal
    colour: Colour
    tags: list[str]


@outbox.event(stream="s", key="id")
class OfMsgspec(msgspec.Struct, frozen=True):
    id: UUID
    at: datetime
    price: Decimal
    colour: Colour
    tags: list[str]


@outbox.event(stream="s", key="id")
@attrs.frozen
class OfAttrs:
    id: UUID
    at: datetime
    price: Decimal
    colour: Colour
    tags: list[str]


@pytest.mark.parametrize("kind", [OfDataclass, OfPydantic, OfMsgspec, OfAttrs, dict])
def test_every_kind_of_payload(engine, session, kind):
    options = {"type": "T", "stream": "s", "key": FIELDS["id"]} if kind is dict else {}
    publish(session, kind(**FIELDS), **options)
    session.commit()
    (row,) = rows(engine)
    assert row.key == str(FIELDS["id"])
    assert json.loads(row.data) | {"at": ""} == json.loads(ENCODED) | {"at": ""}
    assert datetime.fromisoformat(json.loads(row.data)["at"]) == FIELDS["at"]
    if kind in (OfDataclass, OfAttrs, dict):
        assert row.data == ENCODED


def test_what_stands_inside_is_encoded_too(engine, session):
    inside = {
        "size": Size.BIG,
        "level": Level.ONE,
        "day": date(2026, 1, 2),
        "nested": [(1, OfAttrs(**FIELDS))],
    }
    publish(session, inside, type="T", stream="s")
    session.commit()
    assert rows(engine)[0].data == f'{{"size":"big","level":1,"day":"2026-01-02","nested":[[1,{ENCODED}]]}}'


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec=None)), inner),
    max_leaves=10,
)


@pytest.mark.skipif(UNDER_ROLES, reason="it reads in the service's own transaction")
@settings(max_examples=300, deadline=None, suppress_health_check=[*HealthCheck])
@given(value=st.dictionaries(st.text(st.characters(codec=None)), JSON_LIKE))
@example(value={"a": "\\u0000"})
@example(value={"a": [[]] * 70})
@example(value={"a": 10**5000})
def test_what_is_not_refused_comes_back_as_it_was(session, value):
    try:
        publish(session, value, type="T", stream="s")
    except InvalidEvent:
        session.rollback()
        return
    session.flush()
    data = session.scalar(select(text("payload::text FROM outbox")))
    session.rollback()
    assert json.loads(data) == value


# -- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [{"a": "\0"}, {"a": float("nan")}, {"a": {"b": "\ud800"}}, {"a": "x" * 300_000}]
)
def test_bad_input_runs_no_sql_and_leaves_the_session_usable(engine, session, statements, bad):
    publish(session, Counted(1))
    with pytest.raises(InvalidEvent):
        publish(session, bad, type="T", stream="s")
    assert statements == []
    publish(session, Counted(2))
    session.commit()
    assert counted(engine) == [1, 2]


@pytest.mark.parametrize(
    "wrong", [object(), Session, sessionmaker(), async_sessionmaker(), lambda: Session()]
)
def test_what_is_no_session_is_refused(wrong):
    with pytest.raises(InvalidEvent, match=r"^session: a Session or AsyncSession is needed"):
        publish(wrong, Counted(1))


def test_what_a_service_keeps_in_the_info_of_its_session_is_its_own(engine, session):
    publish(session, Counted(1))
    session.info.clear()
    with Session(engine, info=session.info) as other:
        publish(other, Counted(2))
        other.commit()
    assert counted(engine) == [2]
    session.commit()
    assert counted(engine) == [2, 1]


def test_a_session_that_has_an_engine_for_each_class_needs_none_for_anything_else(engine):
    outbox_table = outbox.metadata.tables["outbox"]
    with Session(binds={Base: engine, outbox_table: engine}) as session, session.begin():
        publish(session, Counted(1))
    elsewhere = create_engine("postgresql+psycopg://u@127.0.0.1:1/nowhere")
    with Session(elsewhere, binds={Base: engine, outbox_table: engine}) as session, session.begin():
        publish(session, Counted(2))
    assert [json.loads(row.data)["n"] for row in rows(engine)] == [1, 2]


def test_a_session_of_one_engine_looks_for_no_other(engine):
    """To look for it would cost each later statement some time, and fail for those that name no table."""
    with Session(engine) as session:
        publish(session, Counted(1))
        session.execute(text("CREATE SEQUENCE numbers"))
        assert session.scalar(Sequence("numbers")) == 1


def test_a_session_without_an_engine_says_so_when_it_is_flushed():
    with Session() as session:
        publish(session, Counted(1))
        with pytest.raises(UnboundExecutionError):
            session.flush()
