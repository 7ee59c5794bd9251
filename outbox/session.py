"""The write side: `publish` and `RecordsEvents` put events into the outbox with the session's own flush.

What has been recorded waits in the session until its next flush, and is inserted by that flush after the
business rows: the writers of one key take turns on those, so their events are numbered in turn. From then on
PostgreSQL undoes and keeps it, savepoints included. Until then a pending object of the session, of the service or
else of ours, makes sure of the flush, before a savepoint, a commit, or a query.

An event shares the fate of its object's columns. An object that is new when a transaction is rolled back becomes
transient again, with all it holds; its events become its own again with it, and are recorded when it is added or
merged once more. So do the events of an object that is expunged before the flush that would write it, and of one
that is in no session when the transaction ends: it was merged, expunged, or the session is closed without a
rollback. The rollback expires what stays in the session, and its events are forgotten. (An `expire` of the service's
own drops the columns that were changed, and no event.)
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy import (
    JSON,
    Connection,
    Integer,
    Text,
    bindparam,
    cast,
    column,
    event,
    func,
    inspect,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import InvalidRequestError, UnboundExecutionError
from sqlalchemy.orm import InstanceState, Mapper, Session, SessionTransaction, object_session, registry
from sqlalchemy.orm.interfaces import MapperProperty

from outbox.errors import InvalidEvent, first_line
from outbox.event import Recorded, encode
from outbox.tables import outbox

S = TypeVar("S")

# A key in a session's __dict__: `info` is the service's, and may be copied or cleared.
RECORDER = "_outbox_recorder"
OWN = "_outbox_own"  # key in an aggregate's __dict__
PAGE = 1000  # events that one statement inserts
# Of payload and headers, after which it takes no more; PostgreSQL's messages end at 1 GB.
PAGE_BYTES = 64 << 20


def publish(
    session: Any,
    event: object,
    *,
    priority: int | None = None,
    headers: Mapping[str, str] | None = None,
    available_at: datetime | None = None,
    event_id: UUID | str | None = None,
    type: str | None = None,
    stream: str | None = None,
    key: object = None,
) -> UUID:
    """Record an event in the session's transaction; return its id.

    `session` is a Session, an AsyncSession (nothing is awaited), or a scoped one of either. `event` is an
    instance of a class marked with `@event`, or a dict, which needs `type` and `stream`. `priority` beats the
    scope of `processing_priority`. `available_at` (with a time zone) is the earliest time to publish it. An
    `event_id` of the caller's own makes a repeated recording harmless while the first is still waiting.

    Raises InvalidEvent, which names the field, before any SQL; the session stays usable. Raises SQLAlchemy's
    InvalidRequestError where the session can run no SQL: in a hook after its commit, say.
    """
    row = encode(
        event,
        priority=priority,
        headers=headers,
        available_at=available_at,
        event_id=event_id,
        type=type,
        stream=stream,
        key=key,
    )
    _recorder(_sync_session(session)).add(row)
    return row.event_id


class RecordsEvents:
    """Mixin of a mapped class: `self.record(event)` lands in the outbox with the flush that writes the object.

    On an object of no session the event waits with the object. An object that is garbage before it is added
    takes its events with it, as it does its columns; so does one that is expunged before its flush.
    """

    def record(self, event: object, **options: Any) -> UUID:
        """Record an event, with the options of `publish`; the priority is that of the scope in force now."""
        own = _Own(encode(event, **options))
        if session := object_session(self):
            _recorder(session).take(own, self)
        self.__dict__.setdefault(OWN, []).append(own)
        return own.row.event_id


class _Own:
    """An event of an object; `taken` while a session has it."""

    __slots__ = ("row", "taken")

    def __init__(self, row: Recorded) -> None:
        self.row, self.taken = row, False


class _Recorder:
    """What one session has recorded in its current transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: dict[int, Recorded] = {}  # since the last flush, by identity, in order
        self._dirt: InstanceState[_Dirt] | None = None
        # Events of objects in this transaction, in order, and how many there were at each savepoint.
        self._owned: list[tuple[_Own, weakref.ref[Any]]] = []
        self._marks: dict[SessionTransaction, int] = {}
        self._undone: SessionTransaction | None = None  # the savepoint that was rolled back last

    def add(self, row: Recorded) -> None:
        """Have the row inserted with the next flush."""
        self._ensure_flush()
        self._waiting[id(row)] = row

    def _ensure_flush(self) -> None:
        """Give the session something to flush, if it has no new object."""
        executing = self._session._warn_on_events  # its flush takes no more objects; the rows go with it
        if not executing and not self._session._new:  # `new` would copy it
            with suppress(UnboundExecutionError):  # which the flush raises, too
                bind = self._session.get_bind(clause=outbox)
                if bind is not self._session.bind:  # whose connection the flush would open, if there is one
                    self._session.bind_mapper(_Dirt, bind)
            dirt = _Dirt()
            self._session.add(dirt)
            self._dirt = inspect(dirt)

    def take(self, own: _Own, owner: Any) -> None:
        """Add an event of an object."""
        self.add(own.row)
        own.taken = True
        self._owned.append((own, weakref.ref(owner)))

    def give_back(self, state: InstanceState[Any]) -> None:
        """Leave the events to an object that is expunged before the flush that would insert them."""
        for own in state.dict.get(OWN, ()):
            if self._waiting.pop(id(own.row), None):
                own.taken = False
        if self._waiting and self._session.is_active:  # not while a rollback expunges what is new
            self._ensure_flush()

    def mark(self, savepoint: SessionTransaction) -> None:
        """Note where a savepoint begins. What still waits was recorded before it, and is inserted before it."""
        if self._waiting and savepoint.parent:  # whose connection has not been told of the savepoint yet
            self._insert(savepoint.parent.connection(None, clause=outbox))
        self._marks[savepoint] = len(self._owned)

    def insert(self) -> None:
        """Insert what has been recorded, in order."""
        if self._waiting:
            self._insert(self._session.connection(bind_arguments={"clause": outbox}))

    def _insert(self, connection: Connection) -> None:
        rows, self._waiting = [*self._waiting.values()], {}
        self._drop_dirt()  # it came too late for this flush, and needs no other
        for page in _pages(rows):
            connection.execute(INSERT, {"events": _json(page)})

    def _drop_dirt(self) -> None:
        if self._dirt and self._dirt.pending:
            self._session.expunge(self._dirt.obj())
        self._dirt = None

    def keep(self) -> None:
        """Note that the innermost savepoint, or the whole transaction, was committed."""
        if savepoint := self._session.get_nested_transaction():
            self._marks.pop(savepoint, None)
            return
        for _, reference in self._owned:
            if (owner := reference()) is not None:
                owner.__dict__[OWN] = [own for own in owner.__dict__[OWN] if not own.taken]
        self._owned.clear()

    def undo(self) -> None:
        """Note that the innermost savepoint, if there is one, was rolled back."""
        self._undone = self._session.get_nested_transaction()

    def end(self, transaction: SessionTransaction) -> None:
        """Forget what a transaction or savepoint has recorded that ends without a commit."""
        start = self._marks.pop(transaction, None) if transaction.nested else 0
        if start is None or (transaction.nested and transaction is not self._undone):
            return  # committed, or closed with an outer one, which takes all that is inside with it
        self._undone = None
        self._waiting.clear()
        self._drop_dirt()
        for own, reference in self._owned[start:]:
            if own.taken:
                owner = reference()
                own.taken = owner is None or owner in self._session
        del self._owned[start:]


class _Dirt:
    """A pending object that makes a session flush. It is mapped to no table, so nothing is written of it."""

    def __init__(self) -> None:
        self.id = next(_numbers)


_numbers = itertools.count()
_nowhere = select(literal_column("0", Integer).label("id")).subquery()
registry().map_imperatively(_Dirt, _nowhere, primary_key=[_nowhere.c.id])


def _insert() -> Any:
    """Build the statement that inserts any number of events, in order, from a JSON array of objects.

    One parameter costs less than one a column; what stands in a column of JSON is taken as it is written.
    """
    columns = [column(name, outbox.c[name].type) for name in Recorded.__struct_fields__]
    events = cast(bindparam("events", type_=Text()), JSON)
    rows = func.json_to_recordset(events).table_valued(*columns).render_derived(with_types=True)
    return (
        insert(outbox)
        .from_select(Recorded.__struct_fields__, select(*rows.c))
        .on_conflict_do_nothing(index_elements=["event_id"])
    )


INSERT = _insert()


def _pages(rows: Iterable[Recorded]) -> Iterator[list[Recorded]]:
    """Yield the rows in order, as many at a time as one statement inserts."""
    page: list[Recorded] = []
    size = 0
    for row in rows:
        page.append(row)
        size += len(row.payload) + len(row.headers or b"")
        if len(page) == PAGE or size >= PAGE_BYTES:
            yield page
            page, size = [], 0
    if page:
        yield page


def _json(rows: Sequence[Recorded]) -> str:
    """Return the rows as INSERT takes them."""
    return msgspec.json.encode(rows, enc_hook=_plain).decode()


def _plain(value: Any) -> Any:
    """Return what a column holds for a value of a subclass, which the encoder does not know."""
    if isinstance(value, str):
        return str.__str__(value)
    return value.isoformat() if isinstance(value, datetime) else int(value)


def _sync_session(session: Any) -> Session:
    """Return the Session behind an AsyncSession or a scoped one, or raise InvalidEvent."""
    if not isinstance(session, Session):
        if hasattr(session, "registry"):  # a scoped session; what makes sessions is callable, too
            session = session()
        session = getattr(session, "sync_session", session)
    if not isinstance(session, Session):
        raise InvalidEvent(f"session: a Session or AsyncSession is needed, not {session!r}")
    return session


def _recorder(session: Session) -> _Recorder:
    """Return the session's recorder, or raise InvalidRequestError where no flush would follow."""
    if not session.is_active:
        try:
            session.connection(bind_arguments={"clause": outbox})
        except InvalidRequestError as error:
            if error.code != "isce":  # the transaction is just getting its connection, in `after_begin`
                raise InvalidRequestError(
                    "no event can be recorded when the session's transaction has ended: publish before the "
                    f"commit, or in a new transaction ({first_line(error)})"
                ) from error
    recorder = _recorder_of(session)
    if recorder is None:
        recorder = vars(session)[RECORDER] = _Recorder(session)
    return recorder


def _recorder_of(session: Session) -> _Recorder | None:
    """Return the session's recorder; None: it has recorded nothing yet."""
    return vars(session).get(RECORDER)


def _take_all(session: Session, owner: Any, values: Mapping[str, Any]) -> None:
    """Have the session take the events of an object that no session has."""
    for own in values.get(OWN, ()):
        if not own.taken:
            _recorder(session).take(own, owner)


# -- the session's events; each is a look into a dict for sessions that record nothing ----------------------


@event.listens_for(Session, "after_flush_postexec")
def _on_flush(session: Session, context: Any) -> None:
    if recorder := _recorder_of(session):
        recorder.insert()


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    """Insert what `expunge_all` has kept from the flush, after the rows that the commit would flush."""
    if recorder := _recorder_of(session):
        if not session._flushing:  # a savepoint within a hook of a flush
            session.flush()
        recorder.insert()


@event.listens_for(Session, "after_transaction_create")
def _on_savepoint(session: Session, transaction: SessionTransaction) -> None:
    if transaction.nested:
        _recorder(session).mark(transaction)


@event.listens_for(Session, "after_commit")
def _on_commit(session: Session) -> None:
    if recorder := _recorder_of(session):
        recorder.keep()


@event.listens_for(Session, "after_rollback")
def _on_rollback(session: Session) -> None:
    if recorder := _recorder_of(session):
        recorder.undo()


# It comes before the hooks of others, which may record in the next transaction.
@event.listens_for(Session, "after_transaction_end", insert=True)
def _on_end(session: Session, transaction: SessionTransaction) -> None:
    if recorder := _recorder_of(session):
        around = transaction.parent
        if transaction.nested or around is None:
            recorder.end(transaction)
        elif not session.is_active:  # a flush that failed has rolled it back; a close would expunge all first
            recorder.end(around)


@event.listens_for(Session, "after_attach")
def _on_add(session: Session, instance: Any) -> None:
    try:
        _take_all(session, instance, instance.__dict__)
    except InvalidRequestError:  # a later flush would write the object without its events
        session.expunge(instance)
        raise


@event.listens_for(Session, "pending_to_transient", raw=True)
def _on_expunge(session: Session, state: InstanceState[Any]) -> None:
    if recorder := _recorder_of(session):
        recorder.give_back(state)


@event.listens_for(Session, "persistent_to_detached", raw=True)
def _on_detach(session: Session, state: InstanceState[Any]) -> None:
    if state.modified:  # what is not changed has no flush to wait for
        _on_expunge(session, state)


class _Events(MapperProperty[Any]):
    """Lets `session.merge` carry an object's events along with its columns."""

    def merge(
        self,
        session: Session,
        source_state: Any,
        source_dict: Any,
        dest_state: Any,
        dest_dict: Any,
        load: bool,
        _recursive: Any,
        _resolve_conflict_map: Any,
    ) -> None:
        _take_all(session, source_state.obj(), source_dict)


@event.listens_for(RecordsEvents, "after_mapper_constructed", propagate=True)
def _on_mapped(mapper: Mapper[Any], cls: type) -> None:
    # One of concrete inheritance has a placeholder for what its parent has.
    inherited = mapper.has_property(OWN) and mapper.get_property(OWN, _configure_mappers=False)
    if not isinstance(inherited, _Events):
        mapper.add_property(OWN, _Events())
