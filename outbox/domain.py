"""Commands: each runs with what it causes in one transaction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from outbox.errors import InvalidCommand, InvalidSetting, RolledBack
from outbox.loop import is_of_asyncio, makes_coroutines
from outbox.priority import processing_priority

if TYPE_CHECKING:  # it needs greenlet, which a synchronous service has no need of
    from sqlalchemy.ext.asyncio import async_sessionmaker

H = TypeVar("H", bound=Callable[..., Any])


class _Running:
    """A transaction that a command has open; commands inside it join it."""

    def __init__(self, session: Any, runner: object) -> None:
        self.session, self.runner = session, runner
        self.failed: BaseException | None = None
        self.over = False  # a task that a handler has started keeps its copy of the context

    def refuse_after_failure(self) -> None:
        if self.failed is not None:
            raise RolledBack(
                f"a command inside this one has failed ({self.failed!r}): neither can be committed"
            ) from self.failed


class _Commands:
    """The handlers by the class of their command, and the transaction that is open in this context."""

    _asynchronous = False

    def __init__(self, sessions: Any) -> None:
        self._sessions = sessions
        self._handlers: dict[type, Callable[..., Any]] = {}
        self._running: ContextVar[_Running | None] = ContextVar("outbox_running", default=None)

    def handles(self, command: type) -> Callable[[H], H]:
        """Make the decorated function the handler of a class of commands: `handler(command, session)`.

        Raises InvalidCommand when there is one already, or for a function that this domain cannot run: one of asyncio's
        handlers are coroutine functions, the other's are none.
        """

        def register(handler: H) -> H:
            self._check(handler)
            if command in self._handlers:
                raise InvalidCommand(f"{command.__name__} has a handler already: {self._handlers[command]!r}")
            self._handlers[command] = handler
            return handler

        return register

    def _check(self, handler: Callable[..., Any]) -> None:
        """Refuse a function that this domain cannot run."""
        if makes_coroutines(handler) is not self._asynchronous:
            fault = (
                "no `async def`, which a domain of an async_sessionmaker awaits"
                if self._asynchronous
                else "an `async def`, which a domain of a sessionmaker does not await"
            )
            raise InvalidCommand(f"{handler!r} is {fault}")

    def _handler(self, command: object) -> Callable[..., Any]:
        try:
            return self._handlers[command.__class__]
        except KeyError:
            raise InvalidCommand(f"{command.__class__.__name__} has no handler in this domain") from None

    def _joined(self, runner: object) -> _Running | None:
        """Return the open transaction, unless it belongs to another thread or task: a session is for one."""
        running = self._running.get()
        return running if running and running.runner == runner and not running.over else None


class Domain(_Commands):
    """Run each command and what it causes in one transaction: `Domain(sessionmaker(engine))`.

    An exception rolls all of it back and reaches the caller. With an `async_sessionmaker`, an AsyncDomain is
    made. Raises InvalidSetting for what is neither: a scoped session holds its own as `session_factory`.
    """

    def __new__(cls, sessions: sessionmaker[Session] | async_sessionmaker[Any]) -> Any:
        if isinstance(sessions, sessionmaker):
            return super().__new__(cls)
        if is_of_asyncio(sessions, "async_sessionmaker"):
            return AsyncDomain(sessions)
        raise InvalidSetting(
            f"sessions: a sessionmaker or async_sessionmaker is needed, not {type(sessions).__name__}"
        )

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        super().__init__(sessions)

    def process(self, command: object, *, priority: int | None = None) -> Any:
        """Run the command's handler and commit; return what it returned. Inside another command, join it.

        `priority` beats the scope. Raises InvalidCommand when there is no handler, and RolledBack when the
        handler went on after a command inside it had failed.
        """
        handler = self._handler(command)
        with _scope(priority):
            if running := self._joined(threading.get_ident()):
                try:
                    return handler(command, running.session)
                except BaseException as error:
                    running.failed = error
                    raise
            with self._sessions.begin() as session:
                running = _Running(session, threading.get_ident())
                token = self._running.set(running)
                try:
                    result = handler(command, session)
                finally:
                    running.over = True
                    self._running.reset(token)
                running.refuse_after_failure()
                return result


class AsyncDomain(_Commands):
    """Domain for `async_sessionmaker`: handlers are coroutine functions, and `process` is awaited."""

    _asynchronous = True

    async def process(self, command: object, *, priority: int | None = None) -> Any:
        """Run the command's handler and commit; see `Domain.process`. Another task has its own transaction."""
        handler = self._handler(command)
        with _scope(priority):
            if running := self._joined(asyncio.current_task()):
                try:
                    return await handler(command, running.session)
                except BaseException as error:
                    running.failed = error
                    raise
            async with self._sessions.begin() as session:
                running = _Running(session, asyncio.current_task())
                token = self._running.set(running)
                try:
                    result = await handler(command, session)
                finally:
                    running.over = True
                    self._running.reset(token)
                running.refuse_after_failure()
                return result


def _scope(priority: int | None) -> AbstractContextManager[None]:
    return nullcontext() if priority is None else processing_priority(priority)
