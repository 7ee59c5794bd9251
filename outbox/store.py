"""Every SQL statement of the relay. It knows PostgreSQL and no Redis.

| table | what the relay does with it |
|---|---|
| outbox | `claim` and `adopt` delete rows and return them; `put_back` inserts the refused again |
| outbox_relay | `lead` locks its row, `record_batch` moves its batch number, `say_asleep` asks to be woken |
| outbox_journal | `record_batch` adds a batch, `journal_after` reads, `purge` deletes by age |
| outbox_dead | `bury` adds; the command line lists, retries and drops |

A step of the relay is one transaction: `begin`, `lead`, `claim`, `record_batch`, `commit`. While Redis works on
its batch, `claim_ahead` opens the transaction of the next step, on a second connection, and claims for it; the next
`begin` goes on in that one. All that a session must be is set in the transaction itself, and no statement needs a
session's lock, so that it works behind a transaction-pooling proxy.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, LiteralString, NamedTuple
from uuid import UUID, uuid4

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo, TransactionStatus
from psycopg.rows import dict_row
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from outbox.errors import (
    DatabaseUnavailable,
    InvalidSetting,
    NotMigrated,
    OutboxError,
    Unsuitable,
    first_line,
)
from outbox.event import Waiting
from outbox.lanes import BEYOND, NO_PAUSE, Pause
from outbox.priority import LOWEST
from outbox.protocol import Mark

TABLES = {
    "outbox": "outbox",
    "relay": "outbox_relay",
    "journal": "outbox_journal",
    "dead": "outbox_dead",
}
CHANNEL = "outbox"
APPLICATION = "outbox-relay"
PREPARE_AFTER = 5  # executions of a statement

# The plan of a queue must not depend on statistics that were gathered while it was empty: the claim walks its
# index. It is the same whatever the parameters, and is not made anew for each. A relay that is frozen or cut off
# loses its lock by the timeouts. (One statement with all of them has to be planned, which costs three times as much.)
BEGIN: LiteralString = """
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL idle_in_transaction_session_timeout = {idle_ms};
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL client_connection_check_interval = {check_ms};
SET LOCAL tcp_user_timeout = {idle_ms};
SET LOCAL TimeZone = 'UTC';
SET LOCAL DateStyle = 'ISO';
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_sort = off;
SET LOCAL jit = off;
SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL plan_cache_mode = force_generic_plan;
"""
# A commit of the relay is durable whatever the role's default, or a crash of PostgreSQL would leave Redis ahead of it.
DURABLE: LiteralString = (
    "set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), true)"
)
LOCK: LiteralString = f"SELECT {DURABLE} FROM {{relay}} WHERE partition = 0 FOR UPDATE SKIP LOCKED;"

# A claim ahead may meet rows of another relay's; it must neither pass them nor hold up the step beside it, whose
# transaction is idle meanwhile.
NO_LONG_WAIT: LiteralString = "SET LOCAL lock_timeout = 100; SET LOCAL statement_timeout = {ahead_ms};"
# Nobody has led since the claim, or what it claimed may have to wait for an event that was refused.
GO_ON: LiteralString = """
SELECT set_config('lock_timeout', NULL, true), set_config('statement_timeout', '{statement_ms}', true)
FROM {relay} WHERE partition = 0 AND batch = %s FOR UPDATE SKIP LOCKED
"""

# A statement of its own after the lock: its snapshot has all that the leader before has committed. The lock gives the
# transaction its id; one that was not given the lock has none, and finds nothing.
LEAD: LiteralString = """
SELECT batch, outbox_id::text, asleep, EXISTS (SELECT FROM {outbox} WHERE attempts > 0),
       pg_current_snapshot()::text, pg_current_xact_id()::text,
       (transaction_timestamp() - interval '1 second')::text
FROM {relay} WHERE partition = 0 AND pg_current_xact_id_if_assigned() IS NOT NULL
"""
GET_ID: LiteralString = f"SELECT {DURABLE}, pg_current_xact_id();"

# Due, and not behind a refused event of its key. The second part is left out while nothing is refused.
DUE: LiteralString = "(o.available_at IS NULL OR o.available_at <= clock_timestamp())"
FREE: LiteralString = """
 AND NOT EXISTS (SELECT FROM {outbox} r
                 WHERE r.attempts > 0 AND r.stream = o.stream AND r.key = o.key
                   AND (r.created_at, r.id) < (o.created_at, o.id))
"""

# Not of a lane that waits until Redis has room again.
FLOWING: LiteralString = """
 AND o.priority >= %(floor)s
 AND (CASE WHEN o.priority < %(threshold)s THEN o.stream || %(suffix)s ELSE o.stream END <> ALL (%(lanes)s))
"""

# Not claimed by the step that this claim is ahead of, in its open transaction.
OTHERS: LiteralString = " AND o.xmax <> %(mine)s::xid8::xid"

# `known` holds the priorities seen so far, highest first, each with the position where the claim last
# stopped and the next lower one known. Of each: what follows the position, then the priorities in
# between. No position is later than `since`: see `Positions`.
# Rows are found in the order of the index, so the byte count runs in the order of the claim.
CLAIM: LiteralString = """
WITH since AS MATERIALIZED (
    SELECT least(%(seen_at)s::timestamptz, (
        SELECT min(began) FROM unnest(%(running)s::xid8[], %(began)s::timestamptz[]) AS t (xid, began)
        WHERE pg_visible_in_snapshot(xid, pg_current_snapshot())
    )) AS at
), chosen AS MATERIALIZED (
    SELECT ARRAY(
        SELECT place FROM (
            SELECT place, sum(bytes) OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
            FROM (
                SELECT due.place, due.bytes
                FROM (
                    SELECT priority, below, least(created_at, (SELECT at FROM since)) AS created_at,
                           CASE WHEN created_at > (SELECT at FROM since) THEN 0 ELSE id END AS id
                    FROM unnest(%(priority)s::int[], %(below)s::int[],
                                %(created_at)s::timestamptz[], %(id)s::bigint[])
                         AS position (priority, below, created_at, id)
                ) AS known
                CROSS JOIN LATERAL (
                    (SELECT o.ctid AS place, {size} AS bytes FROM {outbox} o
                     WHERE o.priority = known.priority
                       AND (o.created_at, o.id) > (known.created_at, known.id) AND {due}
                     ORDER BY o.created_at, o.id LIMIT %(rows)s)
                    UNION ALL
                    (SELECT o.ctid AS place, {size} AS bytes FROM {outbox} o
                     WHERE o.priority < known.priority AND o.priority > known.below AND {due}
                     ORDER BY o.priority DESC, o.created_at, o.id LIMIT %(rows)s)
                ) AS due
                LIMIT %(rows)s
            ) AS first
        ) AS sized
        WHERE coalesce(before, 0) < %(bytes)s
    ) AS places
)
DELETE FROM {outbox} WHERE ctid = ANY ((SELECT places FROM chosen)::tid[])
RETURNING (SELECT cardinality(places) FROM chosen), (SELECT at::text FROM since), {columns}
"""

ADOPT: LiteralString = """
DELETE FROM {outbox} USING unnest(%s::bigint[], %s::text[]) AS published (row_id, ends)
WHERE id = row_id AND left(event_id::text, 8) || right(event_id::text, 8) = ends RETURNING {columns}
"""
SIZE: LiteralString = "pg_column_size(o.payload) + coalesce(pg_column_size(o.headers), 0)"
COLUMNS: LiteralString = (
    "id, event_id::text, stream, type, key, priority, created_at::text, payload::text, headers::text, "
    "least(greatest(attempts, 0), 2147483646), last_error"  # somebody may have set them: one more must fit
)

RECORD_BATCH: LiteralString = """
WITH leader AS (
    UPDATE {relay} SET batch = %(batch)s, asleep = false, leader = %(leader)s, led_at = clock_timestamp()
    WHERE partition = 0
)
INSERT INTO {journal} (partition, batch, events, body) VALUES (0, %(batch)s, %(events)s, %(body)b)
"""

PUT_BACK: LiteralString = """
INSERT INTO {outbox} (id, event_id, stream, type, key, priority, created_at, payload, headers,
                      attempts, last_error, available_at)
SELECT id, event_id, stream, type, key, priority, created_at, payload, headers, attempts, last_error,
       clock_timestamp() + wait * interval '1 second'
FROM unnest(%s::bigint[], %s::uuid[], %s::text[], %s::text[], %s::text[], %s::int[], %s::timestamptz[],
            %s::json[], %s::json[], %s::int[], %s::text[], %s::float8[])
     AS back (id, event_id, stream, type, key, priority, created_at, payload, headers, attempts, last_error, wait)
"""

# An event with an id of the caller's own may die again.
BURY: LiteralString = """
INSERT INTO {dead} (event_id, stream, type, key, priority, created_at, payload, headers, attempts, reason)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (event_id) DO UPDATE SET (attempts, reason, died_at)
    = (EXCLUDED.attempts, EXCLUDED.reason, EXCLUDED.died_at)
"""

# Looks at the oldest only: the journal is in the order of its batches.
PURGE: LiteralString = """
DELETE FROM {journal} WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM (
        SELECT ctid, batch, published_at FROM {journal} WHERE partition = 0 ORDER BY batch LIMIT 50
    ) AS oldest
    WHERE published_at < clock_timestamp() - %s * interval '1 second' AND batch <= %s))
"""

# Redis may forget once more what it was given again, before it is on its disk.
KEEP_LONGER: LiteralString = """
UPDATE {journal} SET published_at = clock_timestamp()
WHERE partition = 0 AND batch > %s AND batch <= %s
    AND published_at < clock_timestamp() - %s * interval '0.5 second'
"""

STATUS: LiteralString = """
SELECT outbox_id::text, batch, leader, led_at, asleep, streams_lost, batches_lost, dead, batches, bytes,
       extract(epoch FROM clock_timestamp() - published_at)::float8 AS journal_age
FROM {relay},
     (SELECT count(*) AS dead FROM {dead}) AS dead,
     (SELECT count(*) AS batches, pg_total_relation_size({journal_name}) AS bytes,
             min(published_at) AS published_at FROM {journal}) AS journal
WHERE partition = 0
"""

PENDING: LiteralString = """
SELECT priority, stream, count(*) AS pending,
       count(*) FILTER (WHERE attempts > 0) AS retrying,
       count(*) FILTER (WHERE attempts = 0 AND available_at > clock_timestamp()) AS scheduled,
       extract(epoch FROM clock_timestamp() - min(created_at) FILTER (
           WHERE attempts > 0 OR available_at IS NULL OR available_at <= clock_timestamp()
       ))::float8 AS oldest_seconds
FROM {outbox} GROUP BY priority, stream ORDER BY priority DESC, stream
"""

DEAD_LIST: LiteralString = """
SELECT event_id, stream, type, key, priority, created_at, died_at, attempts, reason
FROM {dead} ORDER BY died_at DESC, event_id LIMIT %s
"""
DEAD_SHOW: LiteralString = """
SELECT event_id, stream, type, key, priority, created_at, died_at, attempts, reason,
       payload::text, headers::text
FROM {dead} WHERE event_id = %s
"""
DEAD_DROP: LiteralString = """
DELETE FROM {dead} WHERE %s::uuid[] IS NULL OR event_id = ANY (%s) RETURNING event_id
"""
DEAD_RETRY: LiteralString = """
WITH gone AS (
    DELETE FROM {dead} WHERE %s::uuid[] IS NULL OR event_id = ANY (%s) RETURNING *
), back AS (
    INSERT INTO {outbox} (event_id, stream, type, key, priority, created_at, payload, headers)
    SELECT event_id, stream, type, key, priority, created_at, payload, headers
    FROM gone ORDER BY created_at, event_id
    ON CONFLICT (event_id) DO NOTHING
)
SELECT event_id FROM gone
"""

LONGEST_STATEMENT_MS = 3_600_000
MANY = 10_000  # running transactions that are remembered one by one
INDEXED_BYTES = 2500  # of stream and key, that the index of refused events can hold
BELOW = LOWEST - 1  # as BEYOND is above: no priority is there
EVER = "-infinity"


class Lead(NamedTuple):
    """What the leader's row says, and what else is so at the start of a step."""

    batch: int  # number of the last batch
    outbox_id: str
    asleep: bool
    refused: bool  # some event waits for its retry
    snapshot: str  # which transactions were running: xmin:xmax:xid,xid,...
    xid: str  # of the step's own transaction
    seen_at: str  # the database's clock as the step began, less a second for a clock that is set back


class Claim(NamedTuple):
    """What a step has claimed, in order."""

    events: list[Waiting]
    swamped: bool = False  # by more urgent ones than go into a batch: the step must be rolled back


class NextStep(NamedTuple):
    """What was claimed for the next step, in the transaction that it goes on in."""

    lead: Lead  # what the leader's row must say by then
    events: list[Waiting]


class Positions:
    """Where the claim last stopped, priority by priority: a hint, so that it does not read dead rows again.

    A row may be committed behind a position, by a transaction that was running when the position was
    taken, and a later row of its key may follow at once. So a claim starts no later than the first write
    of any transaction that has ended since the step before: the claim itself sees in its own snapshot
    which have. One that is still running has added nothing yet; one that began later writes later rows.
    A transaction's first write is no earlier than the last step that had not seen it.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[str, int]] = {}
        self._running: dict[str, str] = {}  # transactions, and when they had not begun to write yet
        self._seen_at = EVER

    def forget(self) -> None:
        """Let the next claim scan from the top."""
        self._last.clear()

    def parameters(self, from_top: bool = False, above: int = BELOW) -> dict[str, str]:
        """Return the claim's parameters that say where it starts, and above which priority it ends."""
        known = [] if from_top else sorted((known for known in self._last if known > above), reverse=True)
        return {
            "priority": _array([BEYOND, *known]),
            "below": _array([*known, above]),
            "created_at": _array([EVER, *(self._last[priority][0] for priority in known)]),
            "id": _array([0, *(self._last[priority][1] for priority in known)]),
            "running": _array(self._running),
            "began": _array(self._running.values()),
            "seen_at": self._seen_at,
        }

    def advance(self, events: Sequence[Waiting]) -> None:
        """Remember where a claim has stopped."""
        for event in events:
            self._last[event.priority] = (event.created_at, event.id)

    def moved(self, lead: Lead, events: Sequence[Waiting], since: str, reached: int) -> None:
        """Remember a claim that `lead` came before, and that started no later than `since`.

        It has not come to the priorities below `reached`: there, what ended transactions have written behind
        the position is still to be found.
        """
        self.advance(events)
        for priority, position in self._last.items():
            if priority < reached:
                self._last[priority] = min(position, (since, 0))
        _, end, listed = lead.snapshot.split(":")
        # A snapshot ends behind the last transaction that has ended: of what began since, it lists nothing.
        unlisted = range(int(end), int(lead.xid))
        if len(unlisted) > MANY:  # savepoints: the next claim starts where this one did
            return
        running = [xid for xid in listed.split(",") if xid] + [str(xid) for xid in unlisted]
        self._running = {xid: self._running.get(xid, self._seen_at) for xid in running}
        self._seen_at = lead.seen_at


class Back(NamedTuple):
    """An event to put back: held behind another of its key (error None), or refused, with a wait in seconds."""

    event: Waiting
    error: str | None = None
    wait: float = 0.0


class Store:
    """The relay's PostgreSQL: a connection, and one more to claim ahead, opened at need, dropped after any error.

    `url` is any SQLAlchemy URL of PostgreSQL. `takeover_seconds` is how long a frozen leader may keep its
    lock, at most. Methods raise DatabaseUnavailable for whatever the server as a whole is to blame for,
    and NotMigrated when a table or column is missing.
    """

    def __init__(self, url: str, *, schema: str = "public", takeover_seconds: float = 5.0) -> None:
        self._connect_to = connection_arguments(url, takeover_seconds)
        self._schema = schema
        self._idle_ms = max(100, int(takeover_seconds * 600))
        self._statement_ms = max(30_000, 6 * self._idle_ms)
        self._check_ms = 0  # not every server can look, in a statement, whether its client is there still
        self._connection: psycopg.Connection | None = None
        self._spare: psycopg.Connection | None = None  # has the transaction of the next step, or none
        self._ahead: NextStep | None = None
        self._ahead_again = 0.0  # when to claim ahead again, after that has failed
        self._statements: dict[tuple[str, ...], bytes] = {}
        self._positions = Positions()
        self._full = False  # there was more than the last claim could take
        self._from_top_at = 0.0
        self._refused_before = False
        self._paused_before: tuple[str, ...] = ()
        self._leader = f"{socket.gethostname()}:{os.getpid()}"
        self._session_is_ours = False  # unknown: no prepared statements behind a transaction-pooling proxy

    # -- the step ---------------------------------------------------------------------------------------

    def begin(self) -> Lead | None:
        """Open the transaction of a step, connecting first if need be; return what the leader's row says.

        None: another relay leads. Otherwise the row is locked from here to the end of the step. What was claimed ahead
        is given back where another relay holds the row, or has led meanwhile.
        """
        with self._translated():
            if self._ahead:
                self._connection, self._spare = self._spare, self._connection
                if self._connected().execute(self._sql(GO_ON), (self._ahead.lead.batch,)).rowcount == 1:
                    return self._ahead.lead
                self.rollback()
            return self._begin(self._connected(), LOCK)

    def goes_on(self) -> bool:
        """Return whether the step that has begun holds what was claimed ahead, and has not taken it yet."""
        return self._ahead is not None

    def lead(self) -> Lead:
        """Return once more what the leader's row says: who can ask leads still."""
        return Lead._make(self._run(LEAD)[0])

    def claim(self, lead: Lead, rows: int, size: int, pause: Pause = NO_PAUSE) -> Claim:
        """Delete and return the first due events: up to `rows`, and up to `size` bytes of payload or one.

        They come in order: highest priority, then oldest, then lowest id. While any event is refused,
        those that must wait for one of their key are passed over; so is what is to `pause`. What was claimed
        ahead comes with all of a higher priority that has come since; where nothing has, it is the very list
        that `claim_ahead` has returned.
        """
        with self._translated():
            ahead, self._ahead = self._ahead, None
            if not ahead:
                return Claim(self._claim(self._connected(), lead, rows, size, pause))
            if pause.lanes != self._paused_before:
                self._positions.forget()
            limits = _limits(rows, size, pause)
            above = self._positions.parameters(above=ahead.events[-1].priority)
            urgent, _ = self._claimed(self._connected(), lead.refused, above | limits)
            self._positions.advance(urgent)
            if not urgent:
                return Claim(ahead.events)
            return Claim(sort(urgent + ahead.events), swamped=_is_full(urgent, rows, size))

    def claim_ahead(self, lead: Lead, rows: int, size: int) -> list[Waiting]:
        """Claim what follows this step's claim, if that was full, for the next step to go on with.

        Its transaction sees nothing of this step's, which is open yet: what that one puts back gives up the claim
        ahead. One that fails, or finds nothing, is given up too. While an event waits for its retry, there is none:
        in the transaction that has claimed it, what must wait for it would be free. Raises nothing of PostgreSQL's.
        """
        now = time.monotonic()
        if not self._full or lead.refused or now < self._ahead_again or now >= self._from_top_at:
            return []
        try:
            self._spare = self._spare or self._connect()
            seen = self._begin(self._spare, NO_LONG_WAIT + GET_ID)
            if seen and not seen.refused:
                events = self._claim(self._spare, seen, rows, size, NO_PAUSE, mine=lead.xid)
                self._ahead = NextStep(seen._replace(batch=lead.batch + 1), events)
        except (psycopg.Error, UnicodeDecodeError, OutboxError):
            self._ahead_again = time.monotonic() + 1
        if time.monotonic() - now > self._idle_ms / 2000:  # a pool that is full, say
            self._ahead_again = time.monotonic() + 60
        if self._ahead and self._ahead.events:
            return self._ahead.events
        self._give_up_ahead()
        return []

    def _give_up_ahead(self) -> None:
        if self._ahead and self._ahead.events:
            self.forget_positions()  # the claimed rows are back, behind the positions
        self._ahead = None
        if not _rolled_back(self._spare):
            self._spare = None

    def _begin(self, connection: psycopg.Connection, first: LiteralString) -> Lead | None:
        """Open a transaction, and read the leader's row after the first statements, all in one round trip."""
        cursor = connection.execute(self._sql(BEGIN + first + LEAD), prepare=False)
        while cursor.nextset():
            pass
        row = cursor.fetchone()
        return Lead._make(row) if row else None

    def _claim(self, connection: psycopg.Connection, lead: Lead, rows: int, size: int, pause: Pause,
               mine: str | None = None) -> list[Waiting]:  # fmt: skip
        started = time.monotonic()
        if lead.refused or self._refused_before or pause.lanes != self._paused_before:
            self._positions.forget()  # what had to wait may be free now, in any priority
        from_top = started >= self._from_top_at
        parameters = self._positions.parameters(from_top) | _limits(rows, size, pause) | {"mine": mine}
        events, since = self._claimed(connection, lead.refused, parameters)
        if from_top:
            # Rows that were not due when a claim passed them are found from the top only. While an old
            # snapshot is held, that reads every dead row: a twentieth of the time is its share. The
            # positions stay, or the next claims would read the dead rows of all higher priorities.
            self._from_top_at = time.monotonic() + 19 * (time.monotonic() - started)
        self._full = _is_full(events, rows, size)
        self._positions.moved(lead, events, since, events[-1].priority if self._full else pause.floor)
        self._refused_before, self._paused_before = lead.refused, pause.lanes
        return events

    def _claimed(
        self, connection: psycopg.Connection, refused: bool, parameters: dict[str, Any]
    ) -> tuple[list[Waiting], str]:
        """Delete due rows; return them in order, and the time that the claim started at.

        Raises DatabaseUnavailable where somebody has changed one of them while the claim waited for it: it is not
        deleted, and those behind it must not pass.
        """
        due = DUE
        if refused:
            due += FREE
        if parameters["floor"] > LOWEST or parameters["lanes"]:
            due += FLOWING
        if parameters.get("mine"):
            due += OTHERS
        rows = connection.execute(self._sql(CLAIM, due), parameters).fetchall()
        if not rows:
            return [], EVER
        chosen, since = rows[0][:2]
        if len(rows) < chosen:
            raise DatabaseUnavailable("an event was changed by somebody else while it was claimed")
        return in_order(row[2:] for row in rows), since

    def forget_positions(self) -> None:
        """Let the next claim scan from the top."""
        self._positions.forget()

    def adopt(self, marks: Sequence[Mark]) -> list[Waiting]:
        """Delete and return the events that these marks name, in order: they have been published."""
        rows, ends = zip(*marks, strict=True) if marks else ((), ())
        return in_order(self._run(ADOPT, (list(rows), list(ends))))

    def record_batch(self, batch: int, events: int, body: bytes) -> None:
        """Write the batch into the journal and move the leader's row to it.

        Raises Unsuitable where the journal has such a batch, which no leader has committed: one of the tables was
        changed by hand, or restored without the other. What it holds may be the only copy, so it is left.
        """
        try:
            self._run(RECORD_BATCH, {"batch": batch, "events": events, "body": body, "leader": self._leader})
        except DatabaseUnavailable as error:
            if not isinstance(error.__cause__, pg.UniqueViolation):
                raise
            raise Unsuitable(
                f"outbox_journal has a batch {batch}, which is newer than the last of outbox_relay: nothing is "
                "published until it is purged by its age, or by hand: "
                "DELETE FROM outbox_journal WHERE batch > (SELECT batch FROM outbox_relay)"
            ) from error

    def put_back(self, events: Iterable[Back]) -> None:
        """Insert claimed events again: those with an error count one attempt more and wait for their retry."""
        columns = zip(*(_put_back_row(back) for back in events), strict=True)
        if parameters := [list(column) for column in columns]:
            self._run(PUT_BACK, parameters)
            self.forget_positions()  # these are behind them
            if self._ahead:  # in it may be what must wait for these
                self._give_up_ahead()

    def bury(self, event: Waiting, reason: str, attempts: int) -> None:
        """Move a claimed event to the dead letters."""
        self._run(BURY, (*event[1:9], attempts, reason))

    def journal_after(self, batch: int) -> tuple[int, bytes] | None:
        """Return the first journal batch after this one, as (number, body), or None. None that no leader committed."""
        rows = self._run(
            "SELECT batch, body FROM {journal} WHERE partition = 0 AND batch > %b "
            "AND batch <= (SELECT batch FROM {relay} WHERE partition = 0) ORDER BY batch LIMIT 1",
            (batch,),
        )
        return (rows[0][0], bytes(rows[0][1])) if rows else None

    def keep_longer(self, after: int, last: int, retention_seconds: float) -> None:
        """Have the journal keep the batches between as if they were new, if half of their time is over."""
        self._run(KEEP_LONGER, (after, last, retention_seconds))

    def count_losses(self, *, streams: int = 0, batches: int = 0) -> None:
        """Add to the totals that `status` shows."""
        self._run(
            "UPDATE {relay} SET streams_lost = streams_lost + %s, batches_lost = batches_lost + %s "
            "WHERE partition = 0",
            (streams, batches),
        )

    def say_asleep(self) -> None:
        """Ask writers to notify: from the commit on, an insert into the outbox wakes the listener."""
        self._run("UPDATE {relay} SET asleep = true WHERE partition = 0")

    def commit(self) -> None:
        """End the step. Raises DatabaseUnavailable when the outcome is unknown or the step is lost."""
        with self._translated():
            if self._connected().execute("COMMIT", prepare=False).statusmessage != "COMMIT":
                raise DatabaseUnavailable("PostgreSQL rolled the step back")

    def rollback(self) -> None:
        """Give the step up, and what was claimed ahead; drop a connection where that fails. Raises nothing."""
        self.forget_positions()
        self._give_up_ahead()
        if not _rolled_back(self._connection):
            self._connection = None

    def close(self) -> None:
        """Close the connections; the next step opens others."""
        for connection in (self._connection, self._spare):
            if connection is not None:
                connection.close()
        self._connection = self._spare = self._ahead = None
        self.forget_positions()

    # -- beside the step --------------------------------------------------------------------------------

    def check(self) -> None:
        """Connect, and make sure that this server can hold an outbox that is migrated."""
        with self._translated():
            self._connected()

    def due(self, pause: Pause = NO_PAUSE) -> bool:
        """Return whether an event is due that need not wait until Redis has room, whoever is going to publish it."""
        query: LiteralString = "SELECT EXISTS (SELECT FROM {outbox} o WHERE {due})"
        found = self._run(query, pause._asdict() | {"lanes": list(pause.lanes)}, due=DUE + FREE + FLOWING)
        return bool(found[0][0])

    def purge(self, retention_seconds: float, last: int) -> int:
        """Delete a few journal batches that are older, and none after `last`; return how many."""
        with self._translated():
            query = self._sql(PURGE)
            return self._connected().execute(query, (retention_seconds, last)).rowcount

    def outbox_id(self) -> str:
        """Return the id of this outbox, by which Redis knows it."""
        return str(self._run("SELECT outbox_id::text FROM {relay} WHERE partition = 0")[0][0])

    def listen(self) -> Listener | None:
        """Return a listener for the wake-up, or None where a notification does not come through.

        Where it does, the session is ours alone, and statements are prepared from now on.
        """
        with self._translated():
            connection = psycopg.connect(**self._connect_to, autocommit=True)
            heard = False
            try:
                listener = Listener(connection)
                probe = uuid4().hex
                self._connected().execute("SELECT pg_notify(%s, %s)", (CHANNEL, probe))
                heard = listener.hears(probe)
            finally:
                if not heard:
                    connection.close()
            self._session_is_ours = heard
            for own in filter(None, (self._connection, self._spare)):
                own.prepare_threshold = self._threshold()
            return listener if heard else None

    # -- the command line -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the state of the leader, the journal and the dead letters; reads no event."""
        return self._dicts(STATUS)[0]

    def pending(self) -> list[dict[str, Any]]:
        """Return what waits, by priority and stream, highest first.

        One pass over the table, which holds pending events only: 0.3 s for a million of them.
        """
        return self._dicts(PENDING)

    def dead_list(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest dead letters, without what they carry."""
        return self._dicts(DEAD_LIST, (limit,))

    def dead_show(self, event_id: UUID) -> dict[str, Any] | None:
        """Return a dead letter with its payload and headers as text, byte for byte."""
        rows = self._dicts(DEAD_SHOW, (event_id,))
        return rows[0] if rows else None

    def dead_retry(self, event_ids: Sequence[UUID] | None) -> list[UUID]:
        """Move dead letters (None: all) back to the outbox, with all attempts; return their ids.

        One that is pending again already is pending once.
        """
        return [row["event_id"] for row in self._dicts(DEAD_RETRY, (event_ids,) * 2)]

    def dead_drop(self, event_ids: Sequence[UUID] | None) -> list[UUID]:
        """Delete dead letters (None: all) for good; return their ids."""
        return [row["event_id"] for row in self._dicts(DEAD_DROP, (event_ids,) * 2)]

    # -- inside -----------------------------------------------------------------------------------------

    def _connected(self) -> psycopg.Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> psycopg.Connection:
        connection = psycopg.connect(**self._connect_to, autocommit=True, prepare_threshold=self._threshold())
        try:
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _threshold(self) -> int | None:
        return PREPARE_AFTER if self._session_is_ours else None

    def _check(self, connection: psycopg.Connection) -> None:
        row = connection.execute(
            "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool, "
            "(SELECT bool_and(to_regclass(format('%%I.%%I', %s::text, name)) IS NOT NULL) "
            " FROM unnest(%s::text[]) AS name), "
            "current_setting('server_version_num')::int",
            (self._schema, list(TABLES.values())),
        ).fetchone()
        assert row is not None
        if row[2] < 140000:
            raise Unsuitable(f"PostgreSQL 14 or newer is needed, this is {row[2] // 10000}")
        if row[0]:
            raise Unsuitable("the PostgreSQL server is read-only: a replica, or in recovery")
        if not row[1]:
            raise NotMigrated(
                f"the outbox has no tables in the schema {self._schema!r}; run: outbox-relay migrate"
            )
        if connection.execute(self._sql("SELECT FROM {relay} WHERE partition = 0")).rowcount == 0:
            # A service that pulls `outbox.metadata` into its own history creates the table without its row.
            connection.execute(self._sql("INSERT INTO {relay} (partition) VALUES (0) ON CONFLICT DO NOTHING"))

    def _sql(self, query: LiteralString, due: LiteralString = DUE) -> bytes:
        """Name the tables, and say what is due, in a statement."""
        if (query, due) not in self._statements:
            names = {name: sql.Identifier(self._schema, table) for name, table in TABLES.items()}
            composed = sql.SQL(query).format(
                **names,
                journal_name=sql.Literal(names["journal"].as_string()),
                due=sql.SQL(due).format(**names),
                columns=sql.SQL(COLUMNS),
                size=sql.SQL(SIZE),
                idle_ms=sql.Literal(self._idle_ms),
                statement_ms=sql.Literal(self._statement_ms),
                check_ms=sql.Literal(self._check_ms),
                ahead_ms=sql.Literal(self._idle_ms // 3),
            )
            self._statements[query, due] = composed.as_bytes()  # as the driver would at each execution
        return self._statements[query, due]

    def _run(
        self, query: LiteralString, parameters: Any = None, due: LiteralString = DUE
    ) -> list[tuple[Any, ...]]:
        with self._translated():
            cursor = self._connected().execute(self._sql(query, due), parameters)
            return cursor.fetchall() if cursor.description else []

    def _dicts(self, query: LiteralString, parameters: Any = None) -> list[dict[str, Any]]:
        with self._translated(), self._connected().cursor(row_factory=dict_row) as cursor:
            return cursor.execute(self._sql(query), parameters).fetchall()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the driver's errors into the two that the relay knows; the connection is not used again."""
        try:
            yield
        except (pg.UndefinedTable, pg.UndefinedColumn, pg.InvalidSchemaName) as error:
            self.close()
            raise NotMigrated(f"{first_line(error)}; run: outbox-relay migrate") from error
        except psycopg.Error as error:
            self.close()
            if isinstance(error, pg.QueryCanceled):
                # A claim from the top passes all dead rows that a snapshot holds: the next one may take longer, but
                # not keep the lock for as long when this process is killed meanwhile.
                self._statement_ms = min(2 * self._statement_ms, LONGEST_STATEMENT_MS)
                self._check_ms = self._idle_ms
                self._statements.clear()
            error.args = (first_line(error),)  # in a traceback, too
            raise DatabaseUnavailable(f"PostgreSQL: {error}") from error
        except UnicodeDecodeError as error:  # a database without an encoding holds any bytes
            self.close()
            raise DatabaseUnavailable(f"PostgreSQL: {error}") from error


class Listener:
    """A connection that hears when an event has been recorded while the relay sleeps."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))

    def fileno(self) -> int:
        return self._connection.fileno()

    def hears(self, payload: str, seconds: float = 1.0) -> bool:
        """Return whether this very notification arrives within the time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for notification in self._connection.notifies(timeout=left, stop_after=1):
                if notification.payload == payload:
                    return True
        return False

    def drain(self) -> None:
        """Forget what has been heard. Raises DatabaseUnavailable when the connection is lost."""
        try:
            for _ in self._connection.notifies(timeout=0):
                pass
        except (psycopg.Error, UnicodeDecodeError) as error:  # a database without an encoding holds any bytes
            self.close()
            raise DatabaseUnavailable(f"PostgreSQL: {first_line(error)}") from error

    def close(self) -> None:
        self._connection.close()


def connection_arguments(url: str, takeover_seconds: float) -> dict[str, Any]:
    """Return psycopg's arguments for an SQLAlchemy URL, with timeouts for a connection that is cut off."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidSetting(
            "database_url: this is no URL; an example: postgresql://user@host/name"
        ) from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise InvalidSetting(
            f"database_url: a URL of PostgreSQL is needed, not of {parsed.get_backend_name()}"
        )
    dialect = parsed.set(drivername="postgresql+psycopg").get_dialect()()
    arguments = dict(dialect.create_connect_args(parsed)[1])
    try:
        make_conninfo(**arguments)
    except psycopg.ProgrammingError as error:
        raise InvalidSetting(f"database_url: {first_line(error)}") from None
    seconds = max(1, round(takeover_seconds / 3))
    return {
        "connect_timeout": max(2, round(takeover_seconds)),
        "application_name": APPLICATION,
        "client_encoding": "utf8",
        "keepalives_idle": seconds,
        "keepalives_interval": seconds,
        "keepalives_count": 2,
        "tcp_user_timeout": int(takeover_seconds * 1000),
    } | arguments


def database_in_clear(url: str) -> list[str]:
    """Return the hosts that a connection may speak to in clear text, folders of sockets included."""
    # Where the URL says nothing, libpq's variables do (PGHOST, PGSSLMODE).
    defaults = {option.keyword.decode(): (option.val or b"").decode() for option in Conninfo.get_defaults()}
    arguments = defaults | connection_arguments(url, takeover_seconds=5.0)
    if arguments["sslmode"] in ("require", "verify-ca", "verify-full"):
        return []
    return str(arguments["hostaddr"] or arguments["host"]).split(",")


def database_refused(error: OutboxError) -> bool:
    """Return whether PostgreSQL has answered a statement with an error, and neither ended the session nor was away."""
    cause = error.__cause__
    return isinstance(cause, psycopg.Error) and cause.diag.severity_nonlocalized == "ERROR"


def in_order(rows: Iterable[tuple[Any, ...]]) -> list[Waiting]:
    """Return claimed rows in the order of the promise; RETURNING gives them in none."""
    return sort([*map(Waiting._make, rows)])


def sort(events: list[Waiting]) -> list[Waiting]:
    """Return the events, sorted in place: highest priority first, then oldest, then lowest id."""
    events.sort(key=attrgetter("created_at", "id"))
    events.sort(key=attrgetter("priority"), reverse=True)
    return events


def _is_full(events: Sequence[Waiting], rows: int, size: int) -> bool:
    """Return whether a claim may have left something: it has come to one of its limits."""
    if len(events) == rows:
        return True
    return sum(len(f"{event.payload}{event.headers or ''}".encode()) + 16 for event in events) >= size


def _limits(rows: int, size: int, pause: Pause) -> dict[str, Any]:
    return {"rows": rows, "bytes": size, **pause._asdict(), "lanes": list(pause.lanes)}


def _rolled_back(connection: psycopg.Connection | None) -> bool:
    """End a transaction, if there is one; return whether the connection is of use."""
    if connection is None:
        return False
    try:
        if connection.info.transaction_status != TransactionStatus.IDLE:
            connection.execute("ROLLBACK", prepare=False)
        return True
    except psycopg.Error:
        connection.close()
        return False


def _array(values: Iterable[int | str]) -> str:
    """Return numbers or times as PostgreSQL writes an array; for six lists, the driver takes half a round trip."""
    return f"{{{','.join(map(str, values))}}}"


def may_wait(event: Waiting) -> bool:
    """Return whether a refused event can wait for its retry: nothing of its key may pass it, which needs an index."""
    return len(f"{event.stream}{event.key or ''}".encode()) <= INDEXED_BYTES


def _put_back_row(back: Back) -> tuple[Any, ...]:
    event, error, wait = back
    if error is None:
        return (*event, None)
    return (*event[:9], event.attempts + 1, error, wait)
