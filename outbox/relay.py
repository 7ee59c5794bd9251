"""The relay: a loop that takes events from PostgreSQL, in the order of their priority, to Redis Streams.

One step is one PostgreSQL transaction round one call of Redis:

    begin, lock the leader's row ── another leads ──> stand by
      claim the first due events, or take what was claimed ahead
      publish, if Redis stands at our batch number; while it does, claim ahead for the next step
        added   ──> journal, batch number + 1, commit
        ahead   ──> a leader died before its commit, or PostgreSQL lost commits: adopt what is in Redis
        behind  ──> Redis forgot its newest batches: send those again, from the journal
        gone    ──> Redis lost whole lanes: fill them again, from the journal
        refused ──> some of what was sent again was refused: make dead letters of it

What follows an answer is decided in `protocol`, and done here.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from outbox.errors import (
    DamagedBatch,
    DatabaseUnavailable,
    OutboxError,
    RedisUnavailable,
    Unavailable,
    Unsuitable,
)
from outbox.event import Waiting
from outbox.housekeeper import Housekeeper
from outbox.lanes import BEYOND, NO_PAUSE, Pause
from outbox.loop import Backoff, Every, Stop, backoff_seconds
from outbox.protocol import (
    Added,
    Adopt,
    Answer,
    Bury,
    Fill,
    Gone,
    Halt,
    Move,
    Refusal,
    SendAgain,
    decide,
    is_dead,
    send_next,
    settle,
    sift,
)
from outbox.settings import LONGEST_BATCH_SECONDS, Settings
from outbox.store import Back, Claim, Lead, Listener, Store, may_wait
from outbox.streams import EMPTY, Batch, Streams, decode, encode, faults, may_touch
from outbox.trace import Trace

log = logging.getLogger("outbox.relay")

CATCH_UP = 100  # journal batches that are sent again in one step
EXPECTED = 25_000  # events a second: a step that is slower is slow whatever its batch, and needs a large one


class Pace(NamedTuple):
    """How long a step takes in a backlog, in seconds: whatever its batch, and for each event of it."""

    fixed: float
    each: float

    def seen(self, fixed: float, each: float) -> Pace:
        """Return the pace after one more step."""
        return Pace(self.fixed + 0.2 * (fixed - self.fixed), self.each + 0.2 * (each - self.each))

    def rows(self, seconds: float) -> int:
        """Return the size of a batch that takes so long; two thirds of the time are for its events, at least.

        A smaller one would hardly be faster where the step itself is slow: a slow disk, a far or busy server. Part of
        that is in `each`, too, and the more so the smaller the batch: so it has no fewer than are to be expected.
        """
        return int(max(EXPECTED * seconds, (seconds - self.fixed) / self.each, 2 * self.fixed / self.each))


class Prepared(NamedTuple):
    """What was claimed ahead: the events, those that can be published, those that cannot, and the batch."""

    events: list[Waiting]
    fit: list[Waiting]
    faulty: list[Refusal[Waiting]]
    batch: Batch


class Relay:
    """Publish an outbox. `run` until stopped, or step by step with `run_once`.

    Any number of relays may run for one outbox: each step, one of them leads. Nothing that happens to
    PostgreSQL or Redis ends `run`; it waits, with backoff, until they are back.
    """

    def __init__(self, settings: Settings, stop: Stop | None = None) -> None:
        self.stop = stop or Stop()
        self.published = 0  # events since the start
        self._settings = settings
        self._lane = settings.lane_rule().lane
        self._replay = settings.on_redis_reset == "replay"
        self._store = Store(
            settings.database_url, schema=settings.schema, takeover_seconds=settings.takeover_seconds
        )
        # Shorter than the leader's lock can last, so that a Redis that does not answer is noticed first.
        self._streams = Streams(
            settings.redis_url,
            prefix=settings.redis_prefix,
            timeout_seconds=settings.takeover_seconds * 0.4,
        )
        self._trace = Trace(settings.trace)
        self._prepared = Prepared([], [], [], EMPTY)
        self._pace: Pace | None = None  # not known yet
        self._reached: int | None = None  # the priority at which the last batch of a backlog ended
        self._urgent_at = float("-inf")  # when an event of a higher one came, by the monotonic clock
        self._in_doubt: Batch | None = None  # where Redis stands is to be asked first, and about its lanes
        self._housekeeper = Housekeeper(settings, self.stop)
        self._keeping: threading.Thread | None = None
        self._behind_again = 0.0  # when to look behind what waits, by the monotonic clock
        self._listener: Listener | None = None
        self._listen_again = Every(30)
        self._check_redis = Every(30)
        self._outage = Backoff(0.1, 5.0)
        self._empty_steps = 0
        self._leading = True

    def check(self) -> None:
        """Connect to both servers and refuse what an outbox must not use.

        Raises Unsuitable (a replica, an evicting Redis), NotMigrated, or Unavailable.
        """
        self._store.check()
        self._streams.check()

    def run(self) -> None:
        """Relay until stopped, finishing the batch in hand. Blocks."""
        self._keeping = threading.Thread(target=self._housekeeper.run, daemon=True)
        self._keeping.start()
        while not self.stop.is_set():
            try:
                self._listen()
                moved = self.run_once(ahead=True)
            except OutboxError as error:
                self._back_off(error)
            else:
                self._recovered()
                if not moved:
                    self._rest()
        self._store.rollback()  # what was claimed ahead is for others now
        self._keeping.join(timeout=1)
        self.close()

    def drain(self, timeout_seconds: float = 30.0) -> int:
        """Relay until nothing due is left, whoever publishes it, or until stopped; return how many this call did.

        What would fill Redis is left. Nothing is purged or trimmed. Connections stay open until `close`. Raises the
        last Unavailable after `timeout_seconds` of it.
        """
        before = self.published
        failing_since: float | None = None
        while not self.stop.is_set():
            try:
                self._listen()
                if self._housekeeper.pressure_again.due():
                    self._housekeeper.look_at_pressure()
                    self._housekeeper.look_for_lost()
                moved = self.run_once(ahead=True)
                if not moved and not self._store.due(self._housekeeper.pause):
                    break
            except Unavailable as error:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > timeout_seconds:
                    raise
                self._back_off(error)
                continue
            failing_since = None
            self._recovered()
            if not moved:
                self._store.forget_positions()
                self.stop.wait(0.05)
        self._store.rollback()
        return self.published - before

    def run_once(self, *, ahead: bool = False) -> int:
        """Take one step; return how many events it settled, 0 when there is nothing to do or another leads.

        With `ahead`, claim for the next step too, which must follow soon: until then, those events are locked.
        Raises Unavailable when a server cannot do its part: the step is undone, no attempt is spent.
        """
        try:
            if self._check_redis.due():
                self._check_policy()
            return self._step(ahead)
        except BaseException:
            self._store.rollback()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._store.close()
        self._streams.close()
        if not (self._keeping and self._keeping.is_alive()):
            self._housekeeper.close()
        self._stop_listening()
        self._trace.close()

    # -- one step ---------------------------------------------------------------------------------------

    def _step(self, ahead: bool) -> int:
        started, rows = time.monotonic(), self._rows()
        if self._housekeeper.pause.floor >= BEYOND:
            raise RedisUnavailable("Redis is nearly full: nothing is published until it has room")
        lead = self._lead()
        if lead is None:
            return 0
        if self._in_doubt is not None:
            answer = self._look(lead, self._in_doubt)
            if not isinstance(answer, Added):
                return self._recover(lead, answer)
            self._in_doubt = None
        moved = self._move(lead, rows, ahead, started)
        return self._step(ahead) if moved is None else moved

    def _move(self, lead: Lead, rows: int, ahead: bool, started: float) -> int | None:
        """Claim a batch and publish it; return how many events that settled.

        None: the step is undone, and another is to begin at once. `started` is when this one did, by the
        monotonic clock.
        """
        goes_on, led = self._store.goes_on(), time.monotonic()
        claim = self._claim(lead, rows)
        claimed = time.monotonic()
        if claim.swamped:
            # What was claimed ahead must wait: more urgent events have come than go into a batch.
            self._store.rollback()
            return None
        if not claim.events:
            self._reached = None  # a backlog ends here, if its last batch was full
            if self._listener and self._empty_steps > 0 and not lead.asleep:
                self._store.say_asleep()
            self._store.commit()
            return 0
        self._empty_steps = 0
        fit, faulty, batch = self._prepare(claim.events)
        meanwhile = partial(self._claim_ahead, lead, rows) if ahead else None
        answer = self._publish(lead.outbox_id, lead.batch, batch, meanwhile=meanwhile)
        if not isinstance(answer, Added):
            # The claim goes back, and the lock with it: what is to be done depends on what Redis says then.
            self._store.rollback()
            self._in_doubt = batch
            return None
        worked = self._settle(lead, fit, faulty, batch, answer)
        full = self._store.goes_on() or len(claim.events) >= rows
        self._look_for_urgent(claim.events, full)
        if full:
            # What was claimed ahead has taken its time in the step before.
            since = claimed if goes_on else led
            fixed, each = since - started + time.monotonic() - worked, (worked - since) / len(claim.events)
            self._pace = self._pace.seen(fixed, each) if self._pace else Pace(fixed, each)
        return len(claim.events)

    def _look_for_urgent(self, events: list[Waiting], full: bool) -> None:
        """Note when events come that are more urgent than a backlog; `full`: there is more of it than this batch."""
        if self._reached is not None and events[0].priority > self._reached:
            self._urgent_at = time.monotonic()
        self._reached = events[-1].priority if full else None

    def _settle(
        self,
        lead: Lead,
        fit: list[Waiting],
        faulty: list[Refusal[Waiting]],
        batch: Batch,
        answer: Added,
    ) -> float:
        """Journal what Redis has added, put back the rest, and commit; return when the commit began."""
        published, refused = settle(fit, answer)
        if refused:
            batch = self._encode(published)
        self._store.record_batch(lead.batch + 1, len(published), batch.body)
        self._put_back(faulty + refused)
        worked = time.monotonic()
        self._commit(lead, {lead.batch + 1: batch.ids})
        self.published += len(published)
        return worked

    def _rows(self) -> int:
        """Return how many events the next batch may have: what takes a hundredth of the calm before it.

        An urgent event waits for the batch that is on its way as it commits, and for its own. The longer the last one
        ago, the rarer they are.
        """
        most, calm = self._settings.batch_size, time.monotonic() - self._urgent_at
        seconds = min(LONGEST_BATCH_SECONDS, max(self._settings.batch_seconds, calm / 100))
        return max(1, min(most, self._pace.rows(seconds))) if self._pace else most

    def _claim(self, lead: Lead, rows: int) -> Claim:
        """Claim a batch, of what need not wait until Redis has room again."""
        pause = self._housekeeper.pause
        if not pause.lanes:
            return self._claim_but(lead, rows, pause)
        # What waits must be passed row by row. No primary event should wait for that, so it has a tenth of the time.
        started = time.monotonic()
        above = pause._replace(floor=max(pause.floor, self._settings.threshold))
        claim = self._claim_but(lead, rows, above)
        if not claim.events and started >= self._behind_again:
            claim = self._claim_but(lead, rows, pause)
            self._behind_again = time.monotonic() + 9 * (time.monotonic() - started)
        return claim

    def _claim_but(self, lead: Lead, rows: int, pause: Pause) -> Claim:
        return self._store.claim(lead, rows, self._settings.batch_bytes, pause)

    def _lead(self) -> Lead | None:
        """Begin a step as the leader, or end it: another leads."""
        lead = self._store.begin()
        self._leading = lead is not None
        if lead is None:
            self._store.commit()  # of nothing: the store need not forget where its claims stopped
            return None
        connected = self._streams.connect()
        lost, self._housekeeper.lost = self._housekeeper.lost, []
        if self._in_doubt is None and (connected or lost):
            self._in_doubt = EMPTY._replace(lanes=lost)
        if self._store.goes_on() and (self._in_doubt is not None or self._waits_for_room()):
            # Recovering commits, and would delete what was claimed ahead before it is published; and some of that may
            # have to wait until Redis has room again.
            self._store.rollback()
            return self._lead()
        if connected:
            lead = self._store.lead()  # see `Streams.connect`
        self._trace("lead", batch=lead.batch)
        return lead

    def _waits_for_room(self) -> bool:
        return self._housekeeper.pause.waiting != NO_PAUSE.waiting

    def _encode(self, events: list[Waiting]) -> Batch:
        return encode(self._settings.source, events, self._lane) if events else EMPTY

    def _claim_ahead(self, lead: Lead, rows: int) -> None:
        if not self._waits_for_room():
            events = self._store.claim_ahead(lead, rows, self._settings.batch_bytes)
            self._prepared = Prepared(events, *self._prepare(events))

    def _prepare(self, events: list[Waiting]) -> tuple[list[Waiting], list[Refusal[Waiting]], Batch]:
        """Return what can be published, what cannot, and the batch; they may have been prepared already."""
        if events is self._prepared.events:
            return self._prepared[1:]
        fit, faulty = sift(events, faults(events))
        return fit, faulty, self._encode(fit)

    def _publish(
        self,
        outbox_id: str,
        known: int,
        batch: Batch,
        again: int | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Answer:
        """Give Redis a batch; with `again`, one of the journal, that brings Redis to this number."""
        self._trace("publish", known=known, batch=again or known + 1, ids=batch.ids, again=bool(again))
        answer = self._streams.publish(outbox_id, known, batch, again, meanwhile)
        self._trace("answer", kind=type(answer).__name__, told=answer)
        return answer

    def _commit(self, lead: Lead, batches: dict[int, str], adopted: bool = False) -> None:
        self._trace("commit", known=lead.batch, batches=batches, adopted=adopted)
        self._store.commit()
        self._trace("committed")

    def _put_back(self, refusals: list[Refusal[Waiting]]) -> None:
        """Give each refused event a later attempt, or none when it has had them all."""
        settings, back = self._settings, []
        for refusal in refusals:
            event, error = refusal
            attempts = event.attempts + 1
            if error is None:
                back.append(Back(event))
            elif is_dead(refusal, settings.max_attempts) or not may_wait(event):
                self._store.bury(event, error, attempts)
                log.error(
                    "event %s of %s is a dead letter after %d attempts: %s",
                    event.event_id, event.stream, attempts, error, extra={"action": "event_dead"},
                )  # fmt: skip
            else:
                wait = backoff_seconds(attempts, settings.backoff_seconds, settings.backoff_max_seconds)
                back.append(Back(event, error, wait))
                log.warning(
                    "event %s of %s was refused, attempt %d: %s",
                    event.event_id, event.stream, attempts, error, extra={"action": "event_refused"},
                )  # fmt: skip
        self._store.put_back(back)

    # -- when Redis does not stand where PostgreSQL does ------------------------------------------------

    def _look(self, lead: Lead, batch: Batch) -> Answer:
        self._trace("look", known=lead.batch)
        answer = self._streams.look(lead.outbox_id, lead.batch, batch)
        self._trace("answer", kind=type(answer).__name__, told=answer)
        return answer

    def _recover(self, lead: Lead, answer: Answer) -> int:
        """Do what an answer asks for. The next step asks again, until Redis stands where PostgreSQL does."""
        move, adopted = decide(lead.batch, answer, self._replay), {}
        if isinstance(move, Adopt):
            adopted = self._adopt(lead, move)
        else:
            self._perform(lead, move)
        self._commit(lead, adopted, adopted=bool(adopted))
        if isinstance(move, Bury):
            self._streams.forget_refusals(lead.outbox_id, move.note)
        return 1

    def _perform(self, lead: Lead, move: Move) -> None:
        match move:
            case SendAgain(known):
                self._send_again(lead, known)
            case Fill(lanes, stands):
                self._fill(lead, lanes, stands)
            case Bury(batch, reasons):
                self._bury(batch, reasons)
            case Halt(reason):
                raise Unsuitable(
                    f"{reason}, and OUTBOX_ON_REDIS_RESET=halt: nothing is published until that is changed "
                    "to replay"
                )

    def _adopt(self, lead: Lead, move: Adopt) -> dict[int, str]:
        """Take for published what Redis has, and PostgreSQL has not committed; return it by batch."""
        adopted, events, missing = {}, 0, 0
        for number, marks in sorted(move.batches.items()):
            found = self._store.adopt(marks)
            batch = self._encode(found)
            self._store.record_batch(number, len(found), batch.body)
            adopted[number] = batch.ids
            events += len(found)
            missing += len(marks) - len(found)
        log.warning(
            "adopting %d events of batches %d to %d: they were published, but not committed",
            events, lead.batch + 1, max(adopted), extra={"action": "batch_adopted"},
        )  # fmt: skip
        if missing or move.unknown or len(adopted) > 1:
            log.error(
                "PostgreSQL has lost commits: Redis stands at batch %d, PostgreSQL stood at %d. In the streams "
                "are %d events that PostgreSQL does not have: their transactions may be lost. Of %d batches "
                "Redis does not remember what is in them: what still waits of them is published again",
                max(adopted), lead.batch, missing, move.unknown, extra={"action": "commits_lost"},
            )  # fmt: skip
        return adopted

    def _send_again(self, lead: Lead, known: int) -> None:
        """Send again what Redis has forgotten: the journal's batches after the last that it knows."""
        log.error(
            "Redis has forgotten batches %d to %d: sending them again", known + 1, lead.batch,
            extra={"action": "redis_behind"},
        )  # fmt: skip
        start, lost = known, 0
        for _ in range(CATCH_UP):
            if known >= lead.batch or self.stop.is_set():
                break
            found = self._store.journal_after(known)
            following = send_next(known, lead.batch, found[0] if found else None)
            batch = _read(*found) if found else EMPTY
            damaged = batch is None
            answer = self._publish(lead.outbox_id, known, batch or EMPTY, following.number)
            if isinstance(answer, Gone):
                self._perform(lead, decide(known, answer, self._replay))
                break
            known, lost = following.number, following.lost + damaged
            if lost or not _whole(answer):  # what is lost is counted before anything else can go wrong
                break
        # With those that a step which then failed had sent.
        self._store.keep_longer(start - CATCH_UP, known, self._settings.journal_retention_seconds)
        if lost:
            log.error(
                "%d batches that Redis has forgotten cannot be read in the journal: they cannot be known",
                lost, extra={"action": "batches_lost"},
            )  # fmt: skip
            self._store.count_losses(batches=lost)

    def _fill(self, lead: Lead, lanes: Sequence[str], stands: int) -> None:
        """Fill lanes that were deleted or evicted again, with all that the journal holds of them."""
        log.error(
            "Redis has lost %s: filling it from the journal",
            ", ".join(lanes),
            extra={"action": "streams_lost"},
        )
        number = damaged = 0
        sent = dict.fromkeys(lanes, 0)
        while (found := self._store.journal_after(number)) and found[0] <= stands:
            if self.stop.is_set():
                return
            number = found[0]
            if not may_touch(found[1], lanes):  # most of the journal, it may be, and publishing waits
                continue
            batch = _read(*found)
            damaged += batch is None
            if batch is None:
                continue
            for lane in {*lanes} & {*batch.lanes}:
                # Redis remembers how far we have come.
                answer = self._streams.restore(lead.outbox_id, stands, lane, sent[lane], number, batch)
                sent[lane] = number
                if not _whole(answer) or self.stop.is_set():
                    return
        for lane in lanes:
            last = EMPTY._replace(lanes=[lane])
            if not _whole(self._streams.restore(lead.outbox_id, stands, lane, sent[lane], 0, last)):
                return
        self._store.count_losses(streams=len(lanes), batches=damaged)

    def _bury(self, batch: int, reasons: Mapping[int, str]) -> None:
        """Make dead letters of events of the journal that were refused when they were sent again."""
        number, body = self._store.journal_after(batch - 1) or (0, b"")
        events = decode(body)[1] if number == batch and _read(number, body) else []
        if not events or not {*reasons} <= {*range(len(events))}:
            self._store.count_losses(batches=1)
            return
        for place, reason in reasons.items():
            event = self._of_stream(events[place])
            self._store.bury(event, f"refused when it was sent again: {reason}", 1)
            log.error(
                "event %s of %s is a dead letter, it was refused when it was sent again: %s",
                event.event_id, event.stream, reason, extra={"action": "event_dead"},
            )  # fmt: skip

    def _of_stream(self, event: Waiting) -> Waiting:
        """Return an event of the journal, which tells its lane, with its stream."""
        stream = event.stream.removesuffix(f":{self._settings.backfill_suffix}")
        return event._replace(stream=stream) if self._lane(stream, event.priority) == event.stream else event

    # -- between steps ----------------------------------------------------------------------------------

    def _rest(self) -> None:
        """Wait for something to do: briefly at first, then asleep, until woken or the next look is due."""
        if not self._leading:
            self.stop.wait(self._settings.takeover_seconds * random.uniform(0.05, 0.1))
            return
        self._empty_steps += 1
        if self._empty_steps <= 2:
            # After the first empty step, more may be on its way; after the second, we have just said that
            # we sleep, and who committed before that has not notified.
            self.stop.wait(0.002 if self._empty_steps == 1 else 0)
            return
        # A writer that asked before we slept, and commits now, does not notify: look soon, then less often.
        pause = min(self._settings.poll_seconds, 0.01 * 2.0 ** min(self._empty_steps - 3, 32))
        if self._listener is None:
            self.stop.wait(pause)
        elif self.stop.wait(pause, self._listener.fileno()):
            self._hear()

    def _listen(self) -> None:
        if self._listener or self._settings.wake == "poll" or not self._listen_again.due():
            return
        try:
            self._listener = self._store.listen()
        except DatabaseUnavailable:
            return
        if self._listener is None:
            self._listen_again.restart(float("inf"))
            log.warning(
                "notifications do not come through (a transaction-pooling proxy?): polling every %g s",
                self._settings.poll_seconds, extra={"action": "wake_by_polling"},
            )  # fmt: skip

    def _hear(self) -> None:
        if self._listener is None:
            return
        try:
            self._listener.drain()
        except DatabaseUnavailable:
            self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None

    def _check_policy(self) -> None:
        try:
            self._streams.check()
        except Unsuitable:
            self._check_redis.restart(0)  # until it is right again
            raise
        self._check_redis.restart(30)

    def _back_off(self, error: OutboxError) -> None:
        pause = self._outage.next()
        log.warning("%s; next try in %.1f s", error, pause, extra={"action": "relay_backoff"})
        self.stop.wait(pause)

    def _recovered(self) -> None:
        if self._outage.failures:
            log.info("both servers answer again", extra={"action": "relay_recovered"})
        self._outage.reset()


def _whole(answer: Answer) -> bool:
    """Return whether Redis took all that was sent again; what it refused is the next step's."""
    if not isinstance(answer, Added):
        raise Unavailable(f"Redis has changed while batches were sent again: {answer}")
    return not answer.refused


def _read(number: int, body: bytes) -> Batch | None:
    """Return a batch of the journal, or None where it is damaged."""
    try:
        return decode(body)[0]
    except DamagedBatch as error:
        log.error(
            "batch %d of the journal is damaged, it cannot be sent again: %s",
            number, error, extra={"action": "batch_damaged"},
        )  # fmt: skip
        return None
