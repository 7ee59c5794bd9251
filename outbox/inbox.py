"""The idempotent consumer: a row for each event that a group has handled, in the transaction of its effects.

Methods are coroutines that never suspend with the sessions of a blocking service: see `outbox.loop.finish`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import Select, Text, Uuid, bindparam, delete, event, exists, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from outbox.errors import AlreadyInHand, DatabaseUnavailable, InvalidHandler, first_line
from outbox.loop import settled
from outbox.tables import outbox_inbox

T = TypeVar("T")

PURGED_AT_ONCE = 5000  # rows
# SQLSTATEs that end the connection of a handler that was idle in a transaction, or was in one at all, for too long.
TOO_SLOW = ("25P03", "25P04")
# Of those that begin with 53, what is of the whole server: its disk is full, it has too many connections.
OF_SERVER = ("08", "57P", "531", "533")
STATE, FAILED = "info", 3  # where both psycopgs tell the status of a transaction, and how
PROBE = select(1)


class Interrupted(DatabaseUnavailable):
    """Raised when PostgreSQL has gone in the middle of a handler's work, which may be what has ended it."""


class Inbox:
    """What a group has handled. `sessions` makes Sessions or AsyncSessions of the service.

    Methods raise DatabaseUnavailable for whatever no event is to blame for: a lost connection, missing tables.
    """

    def __init__(self, sessions: Callable[[], Any], group: str) -> None:
        self._sessions, self._group = sessions, group
        # Once: to build it, and to find what it compiles to, takes longer than to run it.
        self._note = _note(group)

    async def apply(self, event_id: UUID, effects: Callable[[Any], Awaitable[None]]) -> bool:
        """Note an event, and await `effects(session)` in the same transaction; return whether it was the first time.

        The second time nothing is done. Raises AlreadyInHand when another transaction has noted the event, and has
        not ended; Interrupted when it was PostgreSQL that ended the effects.
        """

        async def transact(session: Any) -> bool:
            row = {"event_id": event_id, "lock": f"{self._group} {event_id}"}
            noted = await self._execute(session, self._note, row)
            is_ours, is_new = noted.one()
            if not is_ours:
                raise AlreadyInHand(f"event {event_id} is in the hands of another consumer")
            if is_new:
                with _only_we_commit(session), _translated(Interrupted):
                    await effects(session)
                await _refuse_failed(session)
            return bool(is_new)

        return await self._in_transaction(transact)

    async def purge(self, before: datetime, is_enough: Callable[[], bool]) -> None:
        """Delete the rows from before a time, some thousands a transaction, until there are none or it `is_enough`."""
        table = outbox_inbox
        oldest = (
            select(table.c.event_id)
            .where(table.c.consumer_group == self._group, table.c.handled_at < before)
            .order_by(table.c.handled_at)
            .limit(PURGED_AT_ONCE)
        )
        purge = delete(table).where(table.c.consumer_group == self._group, table.c.event_id.in_(oldest))
        while not is_enough():
            done = await self._in_transaction(lambda session: self._execute(session, purge))
            if done.rowcount < PURGED_AT_ONCE:
                break

    async def _in_transaction(self, use: Callable[[Any], Awaitable[T]]) -> T:
        with _translated():
            session = self._sessions()
            try:
                await settled(session.begin())
                result = await use(session)
                await settled(session.commit())
                return result
            finally:
                await settled(session.close())

    async def _execute(self, session: Any, statement: Any, values: Any = None) -> Any:
        try:
            return await settled(session.execute(statement, values))
        except (DBAPIError, OSError) as error:  # the tables are missing, say; asyncpg cannot connect
            reason = first_line(getattr(error, "orig", None) or error)
            raise DatabaseUnavailable(f"the inbox: {reason}") from error


def _note(group: str) -> Select[tuple[bool, bool]]:
    """Return the statement that notes an event: is it ours to handle, and is it the first time?

    The lock is what a second transaction sees of the first. Without it, the row itself would let the second wait
    for the first, for as long as the process of the first is frozen.
    """
    key = func.hashtextextended(bindparam("lock", type_=Text()), 0)
    ours = select(func.pg_try_advisory_xact_lock(key).label("ours")).cte("ours")
    row = select(literal(group), bindparam("event_id", type_=Uuid())).where(ours.c.ours)
    key_columns = ["consumer_group", "event_id"]
    noted = (
        insert(outbox_inbox)
        .from_select(key_columns, row)
        .on_conflict_do_nothing(index_elements=key_columns)  # without its key, an error
        .returning(outbox_inbox.c.event_id)
        .cte("noted")
    )
    return select(ours.c.ours, exists(select(noted.c.event_id)))


# A key in a session's __dict__: `info` is the service's, and may be copied or cleared.
HANDLING = "_outbox_handling"


@contextmanager
def _only_we_commit(session: Any) -> Iterator[None]:
    """Refuse a handler's own commit or rollback: the inbox's row would part from the rest of its effects."""
    session = getattr(session, "sync_session", session)
    transaction = session.get_transaction()
    vars(session)[HANDLING] = True
    try:
        yield
    finally:
        del vars(session)[HANDLING]
    if session.get_transaction() is not transaction:
        raise InvalidHandler(
            "a handler has rolled back the session that its consumer commits: use begin_nested()"
        )


async def _refuse_failed(session: Any) -> None:
    """Refuse a transaction in which a statement has failed: PostgreSQL rolls it back at the COMMIT without a word."""
    connection = getattr(session, "sync_session", session).connection(bind_arguments={"clause": outbox_inbox})
    if connection.invalidated:
        return  # which the commit finds out
    state = getattr(connection.connection.driver_connection, STATE, None)
    try:
        if state is None:  # of asyncpg: its errors are told by the next statement alone
            await settled(session.execute(PROBE, bind_arguments={"clause": outbox_inbox}))
        failed = state is not None and state.transaction_status == FAILED
    except DBAPIError as error:
        failed = getattr(error.orig, "sqlstate", None) == "25P02"
        if not failed:
            raise
    if failed:
        raise InvalidHandler(
            "a handler has gone on after an error of PostgreSQL, which undoes the whole transaction: what may fail "
            "needs begin_nested()"
        )


@event.listens_for(Session, "before_commit")
def _refuse_commit(session: Session) -> None:
    if HANDLING in vars(session) and not session.in_nested_transaction():
        raise InvalidHandler("a handler must not commit its session: its consumer does, with the inbox's row")


@contextmanager
def _translated(unavailable: type[DatabaseUnavailable] = DatabaseUnavailable) -> Iterator[None]:
    """Turn errors of the connection to PostgreSQL, which no event is to blame for, into `unavailable`."""
    try:
        yield
    except PoolTimeout as error:
        raise unavailable(f"PostgreSQL: {first_line(error)}") from error
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        # Without a state, one that has a statement is of the driver, and of what it was given: too many parameters.
        of_connection = isinstance(error, (OperationalError, InterfaceError)) and (
            error.statement is None if state is None else state.startswith(OF_SERVER)
        )
        if state in TOO_SLOW or not (error.connection_invalidated or of_connection):
            raise
        raise unavailable(f"PostgreSQL: {first_line(error.orig or error)}") from error
