"""Commands: one transaction each, joined by what is inside, rolled back as a whole."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import types
from contextlib import suppress
from dataclasses import dataclass

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import scoped_session, sessionmaker

from outbox import (
    AsyncDomain,
    Domain,
    InvalidCommand,
    Priority,
    RolledBack,
    processing_priority,
    publish,
)
from outbox.errors import InvalidSetting
from tests.service import Base, Counted, Customer, rows


@dataclass
class CreateCustomer:
    name: str


@dataclass
class Fail:
    pass


@dataclass
class Outer:
    swallow: bool


@pytest.fixture
def domain(engine, Session):
    Base.metadata.create_all(engine)
    domain = Domain(Session)

    @domain.handles(CreateCustomer)
    def create(command: CreateCustomer, session: OrmSession) -> str:
        session.add(Customer.register(command.name, command.name))
        return command.name

    @domain.handles(Fail)
    def fail(command: Fail, session: OrmSession) -> None:
        publish(session, Counted(1))
        raise RuntimeError("failed")

    @domain.handles(Outer)
    def outer(command: Outer, session: OrmSession) -> None:
        publish(session, Counted(2))
        try:
            domain.process(Fail())
        except RuntimeError:
            if not command.swallow:
                raise

    return domain


async def of_asyncio(command: object, session: object) -> None:
    pass


@pytest.mark.parametrize("wrong", [None, scoped_session(sessionmaker()), OrmSession, lambda: OrmSession()])
def test_a_domain_of_no_sessionmaker_is_refused(wrong):
    with pytest.raises(InvalidSetting, match=r"^sessions: a sessionmaker or async_sessionmaker is needed"):
        Domain(wrong)


def test_a_handler_that_nobody_would_await_is_refused():
    with pytest.raises(InvalidCommand, match=r"of_asyncio.*does not await"):
        Domain(sessionmaker()).handles(Fail)(of_asyncio)
    with pytest.raises(InvalidCommand, match=r"awaits"):
        Domain(async_sessionmaker()).handles(Fail)(lambda command, session: None)
    Domain(async_sessionmaker()).handles(Fail)(of_asyncio)


def customers(engine) -> int:
    with engine.connect() as connection:
        return connection.execute(text("SELECT count(*) FROM customer")).scalar_one()


def test_the_example_of_the_readme(engine, domain):
    with processing_priority(Priority.LOW):
        assert domain.process(CreateCustomer(name="Migration User")) == "Migration User"
    domain.process(CreateCustomer(name="Ada"))
    assert [(row.key, row.priority) for row in rows(engine)] == [("Migration User", -50), ("Ada", 0)]


def test_the_priority_of_a_command_beats_the_scope_and_ends_with_it(engine, domain):
    with processing_priority(Priority.LOW):
        domain.process(CreateCustomer("a"), priority=Priority.CRITICAL)
        domain.process(CreateCustomer("b"))
    assert [row.priority for row in rows(engine)] == [100, -50]


@pytest.mark.parametrize("swallow", [False, True])
def test_a_command_that_fails_takes_all_with_it(engine, domain, swallow):
    with pytest.raises(RolledBack if swallow else RuntimeError, match="failed"):
        domain.process(Outer(swallow))
    assert rows(engine) == []
    domain.process(CreateCustomer("after"))
    assert customers(engine) == 1


def test_a_command_inside_another_joins_its_transaction(engine, domain):
    sessions = []

    @dataclass
    class Both:
        pass

    @domain.handles(Both)
    def both(command: Both, session: OrmSession) -> None:
        sessions.append(session.get_transaction())
        for name in "ab":
            domain.process(CreateCustomer(name))
            sessions.append(session.get_transaction())
        assert customers(engine) == 0

    domain.process(Both())
    assert len({*sessions}) == 1
    assert [row.key for row in rows(engine)] == ["a", "b"]


def test_another_thread_has_a_transaction_of_its_own(engine, domain):
    @dataclass
    class InAThread:
        pass

    @domain.handles(InAThread)
    def in_a_thread(command: InAThread, session: OrmSession) -> None:
        context = contextvars.copy_context()
        worker = threading.Thread(target=context.run, args=(domain.process, CreateCustomer("committed")))
        worker.start()
        worker.join()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        domain.process(InAThread())
    assert [row.key for row in rows(engine)] == ["committed"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_that_a_handler_has_started_joins_no_transaction_that_has_ended(engine, domain, fails):
    tasks = []

    @dataclass
    class StartATask:
        pass

    @domain.handles(StartATask)
    def start_a_task(command: StartATask, session: OrmSession) -> None:
        async def later() -> None:
            domain.process(CreateCustomer("later"))

        tasks.append(asyncio.create_task(later()))
        if fails:
            raise RuntimeError

    async def main() -> None:
        with suppress(RuntimeError):
            domain.process(StartATask())
        await tasks[0]

    asyncio.run(main())
    assert [row.key for row in rows(engine)] == ["later"]


def test_a_coroutine_that_is_run_in_an_old_context_joins_no_transaction_that_has_ended(engine, database_url):
    Base.metadata.create_all(engine)

    @types.coroutine
    def within(context, coroutine):
        with suppress(StopIteration):
            while True:
                yield context.run(coroutine.send, None)

    async def main() -> None:
        asynchronous = create_async_engine(database_url)
        domain = AsyncDomain(async_sessionmaker(asynchronous))

        @domain.handles(CreateCustomer)
        async def create(command, session):
            session.add(Customer.register(command.name))
            return contextvars.copy_context()

        context = await domain.process(CreateCustomer("a"))
        await within(context, domain.process(CreateCustomer("b")))
        await asynchronous.dispose()

    asyncio.run(main())
    assert [row.key for row in rows(engine)] == ["a", "b"]


def test_a_command_without_a_handler_is_refused_and_a_second_handler_too(domain):
    with pytest.raises(InvalidCommand, match="int has no handler"):
        domain.process(5)
    with pytest.raises(InvalidCommand, match="CreateCustomer has a handler already"):
        domain.handles(CreateCustomer)(lambda command, session: None)


@pytest.mark.parametrize("make", [Domain, AsyncDomain])
def test_an_asynchronous_domain_does_alike(engine, database_url, make):
    Base.metadata.create_all(engine)

    async def main() -> None:
        asynchronous = create_async_engine(database_url)
        domain = make(async_sessionmaker(asynchronous))
        assert isinstance(domain, AsyncDomain)

        @domain.handles(CreateCustomer)
        async def create(command, session):
            session.add(Customer.register(command.name))

        @domain.handles(Fail)
        async def fail(command, session):
            await domain.process(CreateCustomer("joined"))
            raise RuntimeError

        @domain.handles(Outer)
        async def outer(command, session):
            if command.swallow:
                with pytest.raises(RuntimeError):
                    await domain.process(Fail())
            else:  # tasks share no session: each has a transaction of its own
                await asyncio.gather(*(domain.process(CreateCustomer(name)) for name in "xy"))

        with processing_priority(Priority.LOW):
            await domain.process(CreateCustomer("a"))
        await domain.process(CreateCustomer("b"), priority=7)
        with pytest.raises(RuntimeError):
            await domain.process(Fail())
        await domain.process(Outer(swallow=False))
        with pytest.raises(RolledBack):
            await domain.process(Outer(swallow=True))
        await asynchronous.dispose()

    asyncio.run(main())
    found = [(row.key, row.priority) for row in rows(engine)]
    assert found[:2] == [("a", -50), ("b", 7)]
    assert sorted(found[2:]) == [("x", 0), ("y", 0)]
