"""The consumer: it drains the primary lanes, and takes from backfill only while they are empty.

Any number of workers, each of which handles one event at a time, share what this process has in hand:

    fresh primary entries, a few milliseconds' worth  ─┐
    entries to be tried again, each at its time       ─┤
    Redis: primary first, else one entry of backfill  ─┴──> worker ──> handler, inbox, commit ──> ack
                                                              │
                                            failed: try again │ given up: <lane>:dlq
    The keeper renews what is in hand, and claims what dead consumers have left. Another purges the inbox.

There is one implementation for blocking and for asyncio services. It is written in coroutines; those of a
blocking consumer never suspend (see `groups`).
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeVar

from outbox.errors import (
    AlreadyInHand,
    InvalidEvent,
    InvalidHandler,
    InvalidSetting,
    OutboxError,
    RedisUnavailable,
    Reject,
    Retry,
    Unavailable,
    first_line,
)
from outbox.event import (
    Kind,
    Received,
    check_stream,
    check_text,
    class_of,
    decoder,
    kind_in,
    kind_of,
)
from outbox.groups import FOR_GROUP, Entry, GroupMissing, Groups, Lost
from outbox.hand import MOST_WAITING, Hand
from outbox.inbox import Inbox, Interrupted
from outbox.lanes import STREAM_NAME, Lanes
from outbox.loop import (
    AsyncStop,
    Backoff,
    Every,
    Stop,
    backoff_seconds,
    finish,
    is_of_asyncio,
    makes_coroutines,
    settled,
    stop_on_signals,
)
from outbox.settings import redact

H = TypeVar("H", bound=Callable[..., Any])
T = TypeVar("T")
log = logging.getLogger("outbox.consumer")

PREFETCH = 100  # entries of a lane, at the most
PREFETCH_SECONDS = 0.05  # how long handling what is read at once should take
ACK_SECONDS = 0.05  # how long an ack may wait for others to go with it
ACKED_AT_ONCE = 1000  # entries: with so many, an ack waits no longer
TIDY_SECONDS = 60.0  # between two looks for dead consumers, and old rows of the inbox
WAIT_SECONDS = 1.0  # how long an idle worker blocks: stop is no later than that
DRAIN_SECONDS = 5.0  # how long a stopped worker goes on with what was read already
INBOX_MARGIN = timedelta(hours=1)  # between the clocks of PostgreSQL and Redis, and for the relay's journal

OUTCOMES = ("handled", "repeated", "skipped", "failed", "dead")

_names = itertools.count(1)


class Handler(NamedTuple):
    """A function, the events it takes (None: all), and the class it wants their data as (None: as is marked)."""

    function: Callable[..., Any]
    stream: str | None
    type: str | None
    cls: Any

    def takes(self, kind: Kind) -> bool:
        return self.type in (None, kind.type) and self.stream in (None, kind.stream)


# The handlers of an event; with each, what decodes the data for it, and then the data.
Takers = list[tuple[Callable[..., Any], Callable[[bytes], Any]]]
Calls = list[tuple[Callable[..., Any], Any]]
# What is done now and then; true: there is more to do at once.
Chore = Callable[[Groups], Coroutine[Any, Any, bool | None]]


class _Core:
    """What a blocking and an asyncio consumer share: all but how to wait, and how to run several at once."""

    _asynchronous = False

    def __init__(
        self,
        redis_url: str,
        *,
        group: str,
        streams: Sequence[str],
        sessions: Callable[[], Any] | None = None,
        name: str | None = None,
        concurrency: int = 1,
        unknown: Literal["dead", "skip"] = "dead",
        max_deliveries: int = 10,
        backoff: timedelta = timedelta(seconds=1),
        backoff_max: timedelta = timedelta(seconds=300),
        claim_idle: timedelta = timedelta(seconds=30),
        inbox_retention: timedelta = timedelta(days=7),
        backfill_suffix: str = "backfill",
    ) -> None:
        spans = {"claim_idle": claim_idle, "backoff": backoff, "backoff_max": backoff_max}
        _check(
            group=group, name=name, concurrency=concurrency, unknown=unknown, max_deliveries=max_deliveries
        )
        _check(inbox_retention=inbox_retention, **spans)
        if isinstance(streams, str) or not streams:
            raise InvalidSetting("streams: a list of at least one stream's name is needed")
        self.group, self.name = group, name or _unique_name()
        self._counts: list[Counter[str]] = []  # one a worker, so that none is counted by two at once
        self._for_us = group.encode()
        self._primary = [check_stream(stream) for stream in dict.fromkeys(streams)]
        lanes = Lanes(suffix=backfill_suffix)
        self._backfill = [lanes.lane(stream, -1) for stream in self._primary]
        if both := {*self._primary} & {*self._backfill}:
            raise InvalidSetting(
                f"streams: {min(both)} is the backfill lane of another; name the stream alone"
            )
        self._stream_of = dict(zip(self._primary + self._backfill, self._primary * 2, strict=True))
        self._lost = Counter(dict.fromkeys(self._stream_of, 0))
        self._redis_url = redis_url
        self._inbox = None if sessions is None else Inbox(sessions, group)
        self._concurrency = concurrency
        self._unknown = unknown
        self._max_deliveries = max_deliveries
        self._backoff = (backoff.total_seconds(), backoff_max.total_seconds())
        self._idle_seconds = claim_idle.total_seconds()
        self._inbox_retention = inbox_retention
        self._handlers: list[Handler] = []
        self._kinds: dict[tuple[str, bytes | None, bytes | None], tuple[Kind, Takers]] = {}
        self._hand = Hand(self._idle_seconds, lambda lane: lane in self._primary)
        # Of `run_once`.
        self._keep_again, self._tidy_again = Every(self._idle_seconds / 3), Every(TIDY_SECONDS)
        self._say_full_again = Every(60)
        self._claim_from = dict.fromkeys(self._stream_of, "0-0")
        self._begun = False
        self._pid = os.getpid()
        self._single: Worker | None = None  # of `run_once`
        make_stop = AsyncStop if self._asynchronous else Stop
        self._stop: Stop | AsyncStop = make_stop()
        self._ended: Stop | AsyncStop = make_stop()  # all workers have
        self._first = self._groups()  # of the first worker; refuses a wrong URL now

    @property
    def counts(self) -> Counter[str]:
        """How many events there were since the start: handled, repeated (the inbox knew them), skipped, failed
        (each time), dead, lost (somebody has deleted them)."""
        return sum(self._counts, Counter(lost=self._lost.total()))

    # -- handlers ------------------------------------------------------------------------------------------

    def on(self, event: type | str) -> Callable[[H], H]:
        """Make the decorated function a handler of an event: a class marked with `@event`, or a type's name.

        It is called with `(event, session)` where the consumer has `sessions`, else with `(event)`. All handlers of
        an event run one after the other, in one transaction.

        Raises InvalidEvent when the class is not marked, or cannot be decoded; InvalidHandler for a function that
        cannot be called so.
        """
        if isinstance(event, str):
            return self._register(None, check_text("event", event, 255), None)
        kind = kind_of(event)
        decoder(event)  # refuses a class that cannot be decoded now, not when the first event comes
        return self._register(kind.stream, kind.type, event)

    def on_any(self, handler: H) -> H:
        """Make the decorated function a handler of all events; `event.data` is of the event's class if it is known."""
        return self._register(None, None, None)(handler)

    def _register(self, stream: str | None, type_: str | None, cls: type[Any] | None) -> Callable[[H], H]:
        def register(handler: H) -> H:
            self._check_handler(handler)
            self._handlers.append(Handler(handler, stream, type_, cls))
            self._kinds.clear()
            return handler

        return register

    def _check_handler(self, handler: Callable[..., Any]) -> None:
        given = ("event",) if self._inbox is None else ("event", "session")
        try:
            inspect.signature(handler).bind(*given)
        except TypeError:
            wanted = ", ".join(given)
            name = getattr(handler, "__qualname__", repr(handler))
            raise InvalidHandler(f"{name}: a handler of this consumer is called with ({wanted})") from None
        except ValueError:  # a builtin that does not tell
            pass

    # -- a worker ------------------------------------------------------------------------------------------

    async def _begin(self, groups: Groups) -> None:
        """Create the groups, and take up what was left pending under this name: primary before backfill."""
        await self._create(groups)
        self._hand.line_up()
        for lane in groups.lanes:
            self._hand.adopt(lane, [id_ async for id_ in groups.pending(lane)])
        self._begun = True

    async def _create(self, groups: Groups) -> None:
        if created := await groups.create():
            log.info(
                "created the group %s at the first entry of %s", self.group, ", ".join(created),
                extra={"action": "group_created"},
            )  # fmt: skip

    async def _work(self, worker: Worker) -> None:
        """Handle events until stopped, whatever happens to Redis and PostgreSQL."""
        outage = Backoff(0.1, 5.0)
        try:
            while not self._stop.is_set():
                await self._step(worker, outage)
            with suppress(OutboxError):
                await worker.end()
        finally:
            with suppress(OutboxError):
                await worker.flush()
            await worker.close()

    async def _step(self, worker: Worker, outage: Backoff) -> None:
        """Handle what is there, then wait for more."""
        try:
            if not self._begun:
                await self._begin(worker.groups)
            while self._goes_on() and await worker.step():
                if outage.failures:
                    log.info("the servers answer again", extra={"action": "consumer_recovered"})
                    outage.reset()
            if self._goes_on():
                await worker.wait()
        except OutboxError as error:
            if isinstance(error, RedisUnavailable):
                self._begun = False  # the group may be gone, or a reply with entries that are ours
            await self._back_off(error, outage)
        except Exception as error:
            log.exception("a bug of the consumer", extra={"action": "consumer_bug"})
            await self._back_off(Unavailable(repr(error)), outage)
        else:
            outage.reset()

    def _goes_on(self) -> bool:
        return self._begun and not self._stop.is_set()

    async def _back_off(self, error: OutboxError, outage: Backoff) -> None:
        pause = outage.next()
        log.warning("%s; next try in %.1f s", error, pause, extra={"action": "consumer_backoff"})
        await self._wait(pause)

    # -- one event -----------------------------------------------------------------------------------------

    async def _handle(self, worker: Worker, entry: Entry) -> None:
        """Handle one entry, or see to it that it is handled later, or given up. Raises Unavailable."""
        if entry.fields.get(FOR_GROUP, self._for_us) != self._for_us:
            worker.finished(entry, "skipped")  # replayed, for another group
            return
        try:
            event, calls = self._read(entry)
            done = await self._apply(worker, event, calls) if calls else "skipped"
        except Unavailable:
            raise
        except AlreadyInHand as error:
            wait = backoff_seconds(1, *self._backoff)
            log.warning("%s; again in %.1f s", error, wait, extra={"action": "event_in_hand"})
            self._hand.put_back(entry, time.monotonic() + wait)
        except (Reject, InvalidEvent) as error:
            await self._give_up(worker, entry, redact(str(error)))
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and self._is_cancelled():
                raise
            await self._fail(worker, entry, error)
        else:
            worker.finished(entry, done)

    def _read(self, entry: Entry) -> tuple[Received, Calls]:
        """Return the event of an entry, and its handlers, each with the data as it wants it.

        Raises Reject or InvalidEvent for what should not be handled.
        """
        # One more than a handler that fails has: the first may have been a read alone, ahead of its handler.
        if entry.deliveries > self._max_deliveries + 1:
            raise Reject("its handler has never come to an end: the process died, or was replaced")
        fields = entry.fields
        written = (entry.lane, fields.get(b"type"), fields.get(b"priority"))
        if (known := self._kinds.get(written)) is None:
            known = self._learn(entry)
            if len(self._kinds) < 1000:  # the types of a stream are few, or it is somebody's mischief
                self._kinds[written] = known
        kind, takers = known
        event = Received(fields, kind, entry.deliveries)
        return event, [(function, event.decode(decode)) for function, decode in takers]

    def _learn(self, entry: Entry) -> tuple[Kind, Takers]:
        """Return the kind of an entry's event, and its handlers. Raises Reject or InvalidEvent."""
        lane = "primary" if entry.lane in self._primary else "backfill"
        kind = kind_in(entry.fields, self._stream_of[entry.lane], lane)
        marked = class_of(kind.stream, kind.type)
        takers = [
            (handler.function, decoder(handler.cls or marked))
            for handler in self._handlers
            if handler.takes(kind)
        ]
        if not takers and self._unknown == "dead":
            raise Reject(f"no handler takes the type {kind.type!r} of {kind.stream}")
        return kind, takers

    async def _apply(self, worker: Worker, event: Received, calls: Calls) -> str:
        """Run the handlers under the event's priority, trace and, with an inbox, transaction; return what was done."""
        with event.scope():
            if self._inbox is None:
                for function, event.data in calls:
                    if (result := function(event)) is not None:
                        await self._settle(worker, result)
                return "handled"

            async def effects(session: Any) -> None:
                for function, event.data in calls:
                    if (result := function(event, session)) is not None:
                        await self._settle(worker, result)

            return "handled" if await self._inbox.apply(event.id, effects) else "repeated"

    async def _fail(self, worker: Worker, entry: Entry, error: BaseException) -> None:
        """Leave the entry pending, to be tried again after a backoff; give it up after the last delivery."""
        reason = redact(f"{type(error).__name__}: {first_line(error)}")
        if entry.deliveries >= self._max_deliveries:
            await self._give_up(worker, entry, reason, error)
            return
        wait = error.after_seconds if isinstance(error, Retry) else None
        if wait is None:
            wait = backoff_seconds(entry.deliveries, *self._backoff)
        worker.counts["failed"] += 1
        self._hand.retry(entry, time.monotonic() + wait)
        log.warning(
            "%s %s has failed, delivery %d of %d: %s; again in %.1f s",
            entry.lane, entry.id, entry.deliveries, self._max_deliveries, reason, wait,
            extra={"action": "event_failed"}, exc_info=None if isinstance(error, Retry) else error,
        )  # fmt: skip

    async def _give_up(
        self, worker: Worker, entry: Entry, reason: str, error: BaseException | None = None
    ) -> None:
        """Move the entry to the dead letters, in one step with its ack."""
        died_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            buried = await worker.groups.bury(entry, reason[:1000], died_at)
        except RedisUnavailable as refusal:  # of the dead letters alone, it may be: others go on
            log.error(
                "%s %s: no dead letter: %s", entry.lane, entry.id, refusal, extra={"action": "bury_failed"}
            )
            self._hand.put_back(entry, time.monotonic() + self._backoff[1])
            self._begun = False  # what the connection was still to answer, when it was dropped, is pending
            return
        self._hand.drop(entry.lane, [entry.id])
        if isinstance(buried, Lost):
            self._report_lost(*buried)
        elif buried:
            worker.counts["dead"] += 1
            log.error(
                "%s %s is a dead letter after delivery %d: %s", entry.lane, entry.id, entry.deliveries, reason,
                extra={"action": "event_dead"}, exc_info=error,
            )  # fmt: skip

    def _report_lost(self, lane: str, *ids: str) -> None:
        self._hand.drop(lane, ids)
        self._lost[lane] += len(ids)
        for id_ in ids:
            log.error(
                "%s %s was deleted by somebody before it was handled: it is lost", lane, id_,
                extra={"action": "entry_lost"},
            )  # fmt: skip

    def _say_full(self) -> None:
        if self._say_full_again.due():
            log.warning(
                "%d primary events wait to be tried again: nothing new is read meanwhile", MOST_WAITING,
                extra={"action": "hand_full"},
            )  # fmt: skip

    # -- the keeper, and who tidies up ---------------------------------------------------------------------

    async def _regularly(self, seconds: float, do: Chore) -> None:
        """Do something every so often, on a connection of its own, until the workers have ended."""
        groups = self._groups()
        try:
            while not self._ended.is_set():
                await settled(self._ended.wait(await self._do_or_log(groups, seconds, do)))
        finally:
            await groups.close()

    async def _do_or_log(self, groups: Groups, seconds: float, do: Chore) -> float:
        """Do it once, whatever happens; return the seconds until the next time."""
        try:
            if await do(groups):
                return min(seconds, 0.1)  # there may be more
        except GroupMissing:  # until a worker has begun
            return min(seconds, 1.0)
        except OutboxError as error:
            log.warning("%s", error, extra={"action": "keeper_failed"})
            return min(seconds, 1.0)
        except Exception:
            log.exception("a bug of the consumer", extra={"action": "consumer_bug"})
        return seconds

    async def _keep_once(self, groups: Groups) -> bool:
        """Renew what is in hand, and claim; return whether there may be more to claim.

        After the stop, what the handlers are still at is renewed, and nothing else done. Whatever may wait for
        PostgreSQL is none of the keeper's: without its heartbeat, what is in hand goes to others.
        """
        started = time.monotonic()
        for lane, ids in self._hand.held().items():
            try:
                gone, lost = await groups.renew(lane, ids)
            except GroupMissing:  # the workers may be busy in other lanes
                await self._create(groups)
                gone, lost = ids, []
            self._hand.drop(lane, gone)
            self._report_lost(lane, *lost)
        self._hand.renewed_at = started
        if self._stop.is_set():
            return False
        claimed = 0
        for lane in groups.lanes:
            if not self._hand.is_full(groups.is_primary(lane)):
                claimed += await self._claim(groups, lane)
        return bool(claimed)

    async def _tidy_once(self, groups: Groups) -> None:
        """Remove consumers that are dead, and old rows of the inbox. What fails is not urgent: it has its next time."""
        try:
            await groups.forget(idle_seconds=10 * self._idle_seconds)
            await self._purge(groups)
        except OutboxError as error:
            log.warning("%s", error, extra={"action": "tidying_failed"})

    async def _claim(self, groups: Groups, lane: str) -> int:
        """Take up what consumers that are dead or frozen have left in a lane; return how many entries."""
        while True:
            start, ids, lost = await groups.claim(lane, self._idle_seconds, self._claim_from[lane])
            self._claim_from[lane] = start
            if ids or lost or start == "0-0":  # else it has looked at many that are in the hands of others
                break
        self._hand.adopt(lane, ids)
        self._report_lost(lane, *lost)
        if ids:
            log.warning(
                "claimed %d entries of %s from consumers that were silent for %g s", len(ids), lane,
                self._idle_seconds, extra={"action": "entries_claimed"},
            )  # fmt: skip
        return len(ids) + len(lost)

    async def _purge(self, groups: Groups) -> None:
        """Delete old rows of the inbox: of no event that Redis still has, or the relay may send again."""
        if self._inbox is None:
            return
        before = datetime.now(UTC) - self._inbox_retention
        if (oldest_ms := await groups.oldest_ms()) is not None:
            before = min(before, datetime.fromtimestamp(oldest_ms / 1000, UTC) - INBOX_MARGIN)
        until = time.monotonic() + TIDY_SECONDS / 10  # it is a load
        await self._inbox.purge(before, lambda: self._stop.is_set() or time.monotonic() > until)

    # -- what differs --------------------------------------------------------------------------------------

    def _groups(self) -> Groups:
        return Groups(
            self._redis_url,
            group=self.group,
            consumer=self.name,
            primary=self._primary,
            backfill=self._backfill,
            asynchronous=self._asynchronous,
        )

    def _refuse_fork(self) -> None:
        """Refuse to run in a copy of the process: its connections and pipes are those of the other."""
        if os.getpid() != self._pid:
            raise InvalidSetting("a consumer runs in the process that has made it: make it after the fork")

    async def _step_once(self) -> int:
        self._refuse_fork()
        worker = self._single = self._single or Worker(self, self._first, most=1)
        try:
            if not self._begun:
                await self._begin(self._first)
            if self._keep_again.due():
                await self._keep_once(self._first)
            if self._tidy_again.due():
                await self._tidy_once(self._first)
            try:
                return await worker.step()
            finally:
                await worker.flush()
        except RedisUnavailable:
            self._begun = False
            raise

    async def _leave(self) -> None:
        """Remove this consumer from the group, where nothing is pending for it."""
        with suppress(OutboxError):
            await self._first.forget()
        if self._single:
            await self._single.close()
        await self._first.close()
        self._begun = False

    def _say_started(self) -> None:
        log.info(
            "%s of group %s reads %s", self.name, self.group, ", ".join(self._primary),
            extra={"action": "consumer_started"},
        )  # fmt: skip

    def _say_stopped(self) -> None:
        log.info("", extra={"action": "consumer_stopped", "fields": dict(self.counts)})

    async def _wait(self, seconds: float) -> None:
        await settled(self._stop.wait(max(0.0, seconds)))

    def _is_cancelled(self) -> bool:
        """Return whether this task of ours is cancelled, and not merely something that a handler awaits."""
        task = asyncio.current_task() if self._asynchronous else None
        return task is not None and task.cancelling() > 0

    async def _settle(self, worker: Worker, result: Any) -> None:
        """Await what a handler has returned, if it is a coroutine."""
        raise NotImplementedError


class Worker:
    """Handles one event at a time, on a connection of its own."""

    def __init__(self, core: _Core, groups: Groups, most: int = PREFETCH) -> None:
        self.groups = groups
        self.loop: asyncio.Runner | None = None  # of a blocking worker with handlers of asyncio
        self._core, self._hand, self._most = core, core._hand, most
        self._done: dict[str, list[str]] = defaultdict(list)
        self._done_since = float("inf")
        self._newest: list[Any] = []
        self._seconds = PREFETCH_SECONDS  # that handling an event takes
        self.counts = Counter(dict.fromkeys(OUTCOMES, 0))  # never a new one, as others look at them
        core._counts.append(self.counts)

    async def step(self) -> int:
        """Handle the next event, primary first; return 1, or 0 when there is none. Raises Unavailable."""
        entry = self._hand.primary() or await self._read()
        if entry is None:
            return 0
        started = time.monotonic()
        try:
            if started - self._done_since > ACK_SECONDS:
                await self.flush()
            if not self._hand.surely_ours(entry, started):
                taken = await self.groups.take(entry.lane, entry.id)
                if not isinstance(taken, Entry):
                    self._not_ours(entry, taken)
                    return 1
                taken.interrupted = entry.interrupted
                entry = taken
            await self._core._handle(self, entry)
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)
        except Interrupted:
            # It may be what ends the connection each time: from the second on, others pass it.
            times, entry.interrupted = entry.interrupted, entry.interrupted + 1
            at = time.monotonic() + backoff_seconds(times, *self._core._backoff) if times else 0.0
            self._hand.put_back(entry, at)
            raise
        except Unavailable:
            self._hand.put_back(entry)
            raise
        except BaseException:  # this task is cancelled, say: the delivery counts
            self._hand.retry(entry, time.monotonic() + self._core._backoff[0])
            raise
        return 1

    async def wait(self) -> None:
        """Block until there is something in a lane, or to try again; not for long, as stop must be heard."""
        await self.flush()
        seconds = min(WAIT_SECONDS, self._hand.next_at() - time.monotonic())
        if seconds > 0:
            await self.groups.wait(self._newest or ["$"] * len(self.groups.lanes), seconds)

    def finished(self, entry: Entry, how: str) -> None:
        """Note that an entry is to be acked, with the next read or soon; until then it stays in hand."""
        if not self._done:
            self._done_since = time.monotonic()
        self._done[entry.lane].append(entry.id)
        self.counts[how] += 1

    async def flush(self) -> None:
        """Ack what is finished."""
        if self._done:
            await self.groups.ack(self._done)
            self._acked()

    async def end(self) -> None:
        """Finish what was read already, for a while."""
        until = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < until:
            entry = self._hand.fresh() or self._hand.read(await self.groups.rest())
            if entry is None:
                break
            if self._hand.surely_ours(entry, time.monotonic()):
                await self._core._handle(self, entry)

    async def close(self) -> None:
        """Drop the connection, and the event loop."""
        await self.groups.close()
        if self.loop:
            self.loop.close()
            self.loop = None

    async def _read(self) -> Entry | None:
        """Read, with nothing of primary in hand: its next entry, or else the oldest of backfill."""
        hand = self._hand
        while True:
            waiting = hand.due(primary=False)
            if hand.is_full(primary=True):
                self._core._say_full()
                self._newest = []  # of the last look at the lanes: to wait for what is newer would be no wait
                return waiting
            backfill = waiting is None and not hand.is_full(primary=False)
            worth = int(PREFETCH_SECONDS / max(self._seconds, 1e-9))
            count = max(1, min(self._most, worth))
            try:
                if sum(map(len, self._done.values())) >= ACKED_AT_ONCE:
                    await self.flush()
                read = await self.groups.more(count)
                if len(read) >= PREFETCH and worth >= 2 * PREFETCH:
                    await self.groups.ask(PREFETCH)  # Redis looks them up while these are handled
                if not read:
                    read, self._newest = await self.groups.next(count, self._done, backfill=backfill)
                    self._acked()
            except BaseException:
                if waiting:
                    hand.put_back(waiting)
                raise
            if not read:
                return waiting
            if waiting:
                hand.put_back(waiting)
            if entry := hand.read(read) or hand.primary():  # else all of it was in hand already
                return entry

    def _acked(self) -> None:
        for lane, ids in self._done.items():
            self._hand.drop(lane, ids)
        self._done.clear()
        self._done_since = float("inf")

    def _not_ours(self, entry: Entry, taken: Lost | None) -> None:
        if taken:
            self._core._report_lost(entry.lane, entry.id)
        else:
            self._hand.drop(entry.lane, [entry.id])


class Consumer(_Core):
    """Run the handlers of a service: `Consumer(redis_url, group="billing", streams=["customer"])`.

    Each event of a stream goes to one consumer of each group. Primary events come first: backfill is taken one at a
    time, and only while the primary lanes are empty. Handlers run under the priority of their event.

    `sessions` is a sessionmaker: the handler's session is then one transaction with the event's row in the inbox, and
    its effects are applied exactly once; without it, at least once. With an `async_sessionmaker`, an AsyncConsumer
    is made. `name` identifies this process within the group, and must be no other's at the same time; what was
    pending under it is taken up at the start. The default is host and process id: containers that share both, on the
    network of their host, need names. Consumers of a group that share an inbox read the same streams: each purges it
    by what the streams that it reads still have.

    `concurrency` handlers run at once, in threads. A handler that fails is called again after `backoff`, doubling up
    to `backoff_max`; after `max_deliveries` the entry moves to `<lane>:dlq`. `unknown` says what becomes of an
    event that no handler takes: "dead" (a dead letter) or "skip". Entries of a consumer that is silent for
    `claim_idle` are claimed by the others. Rows of the inbox are kept for `inbox_retention`, and for as long as
    Redis has the entry.

    Raises InvalidSetting, which names the argument.
    """

    def __new__(cls, redis_url: str, **arguments: Any) -> Any:
        if is_of_asyncio(arguments.get("sessions"), "async_sessionmaker", "async_scoped_session"):
            return AsyncConsumer(redis_url, **arguments)
        return super().__new__(cls)

    _broken: BaseException | None = None  # what has ended a thread of `run`

    def run(self) -> None:
        """Handle events until stopped, whatever happens to Redis and PostgreSQL. Blocks.

        Raises what a handler has raised to end its thread (SystemExit), when all has ended.

        In the main thread of a process that does not handle SIGTERM itself, the first SIGTERM or Ctrl-C stops it, as
        `stop` does, and a second one ends the process at once.
        """
        self._refuse_fork()
        ours = threading.current_thread() is threading.main_thread()
        ours = ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with stop_on_signals(self._stop) if ours else nullcontext():
            self._say_started()
            keeper = self._thread(self._regularly(self._idle_seconds / 3, self._keep_once))
            self._thread(self._regularly(TIDY_SECONDS, self._tidy_once))  # nobody waits for its end
            others = [
                self._thread(self._work(Worker(self, self._groups()))) for _ in range(self._concurrency - 1)
            ]
            try:
                finish(self._work(Worker(self, self._first)))
            finally:  # a Ctrl-C, say, that is not ours to handle: the others end too
                self._stop.set()
                for thread in others:
                    thread.join()
                self._ended.set()  # or the keeper would keep for ever what nobody handles
                keeper.join()
                finish(self._leave())
                self._say_stopped()
        if self._broken:
            raise self._broken

    def _thread(self, work: Coroutine[Any, Any, None]) -> threading.Thread:
        """Start a thread; what ends it before its time, a handler's `sys.exit` say, ends `run`."""

        def run() -> None:
            try:
                finish(work)
            except BaseException as error:
                log.exception("a thread of the consumer has ended", extra={"action": "consumer_bug"})
                self._broken = error
                self._stop.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def run_once(self) -> int:
        """Handle the next event that is there, primary first; return 1, or 0 when there is none.

        Raises Unavailable when Redis or PostgreSQL cannot do its part; the event stays pending.
        """
        return finish(self._step_once())

    def drain(self) -> int:
        """Handle events until none is there to be handled now; return how many. Raises Unavailable."""
        return sum(iter(self.run_once, 0))

    def stop(self) -> None:
        """Ask `run` to return after the events in hand, and what was read ahead, for up to 5 s.

        May be called from anywhere, and repeated.
        """
        self._stop.set()

    def close(self) -> None:
        """Leave the group, if nothing is pending here: after `run_once`; `run` does it by itself."""
        finish(self._leave())

    async def _settle(self, worker: Worker, result: Any) -> None:
        if inspect.isawaitable(result):
            worker.loop = worker.loop or asyncio.Runner()
            worker.loop.run(settled(result), context=contextvars.copy_context())


class AsyncConsumer(_Core):
    """Consumer for services of asyncio: `run`, `run_once`, `drain` and `close` are awaited; handlers too.

    `concurrency` handlers run at once, as tasks. `run` handles no signal; a cancelled one leaves what it had in hand
    pending.
    """

    _asynchronous = True

    async def run(self) -> None:
        """Handle events until stopped, whatever happens to Redis and PostgreSQL."""
        self._refuse_fork()
        self._say_started()
        async with asyncio.TaskGroup() as keepers:
            keepers.create_task(self._regularly(self._idle_seconds / 3, self._keep_once))
            tidying = keepers.create_task(self._regularly(TIDY_SECONDS, self._tidy_once))
            async with asyncio.TaskGroup() as workers:
                for groups in (self._first, *(self._groups() for _ in range(self._concurrency - 1))):
                    workers.create_task(self._work(Worker(self, groups)))
            self._ended.set()
            tidying.cancel()  # it may wait for PostgreSQL
        await self._leave()
        self._say_stopped()

    async def run_once(self) -> int:
        """Handle the next event that is there; see `Consumer.run_once`."""
        return await self._step_once()

    async def drain(self) -> int:
        """Handle events until none is there to be handled now; return how many. Raises Unavailable."""
        done = 0
        while await self.run_once():
            done += 1
        return done

    def stop(self) -> None:
        """Ask `run` to return; see `Consumer.stop`."""
        self._stop.set()

    async def close(self) -> None:
        """Leave the group, if nothing is pending here."""
        await self._leave()

    def _check_handler(self, handler: Callable[..., Any]) -> None:
        super()._check_handler(handler)
        if not makes_coroutines(handler):
            name = getattr(handler, "__qualname__", repr(handler))
            raise InvalidHandler(f"{name}: a handler of an AsyncConsumer is an `async def`")

    async def _settle(self, worker: Worker, result: Any) -> None:
        await result


def _unique_name() -> str:
    """Return host and process id, and a number for the second consumer of a process and later ones."""
    number = next(_names)
    return f"{socket.gethostname()}:{os.getpid()}" + (f":{number}" if number > 1 else "")


def _check(**arguments: Any) -> None:
    """Raise InvalidSetting, which names the argument."""
    for name, value in arguments.items():
        if isinstance(value, timedelta):
            if value <= timedelta(0):
                raise InvalidSetting(f"{name}: more than 0 s is needed, not {value}")
        elif name in ("group", "name"):
            if value is not None and not (isinstance(value, str) and STREAM_NAME.fullmatch(value)):
                raise InvalidSetting(
                    f"{name}: {value!r} is no name: letters, digits or any of _ . : / {{ }} -"
                )
        elif name == "unknown":
            if value not in ("dead", "skip"):
                raise InvalidSetting(f"unknown: dead or skip is needed, not {value!r}")
        elif name in ("concurrency", "max_deliveries"):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidSetting(f"{name}: an integer of at least 1 is needed, not {value!r}")
        else:
            raise InvalidSetting(f"{name}: a timedelta is needed, not {value!r}")
