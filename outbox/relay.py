"""The relay: a loop that takes events from PostgreSQL, in the order of their priority, to Redis Streams.

One step is one PostgreSQL transaction round one call of Redis:

    begin, lock the leader's row ── another leads ──> stand by
      claim the first due events
      publish, if Redis stands at our batch number
        added   ──> journal, batch number + 1, commit
        ahead   ──> a leader died between its publish and its commit: adopt what it published
        behind  ──> Redis forgot its newest batches: send those again, from the journal
        gone    ──> Redis lost whole lanes: fill them again, from the journal
        fenced  ──> there is a newer leader: roll back, connect again
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence

from outbox.errors import DamagedBatch, DatabaseUnavailable, OutboxError, Unavailable, Unsuitable
from outbox.event import Waiting
from outbox.loop import Backoff, Every, Stop, backoff_seconds
from outbox.settings import Settings
from outbox.store import Lead, Listener, Refusal, Store, may_wait
from outbox.streams import (
    EMPTY,
    Added,
    Ahead,
    Answer,
    Batch,
    Behind,
    Fenced,
    Gone,
    Streams,
    decode,
    encode,
    publishable,
)

log = logging.getLogger("outbox.relay")

CATCH_UP = 100  # journal batches that are sent again in one step


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
        self._store = _store(settings)
        # Shorter than the leader's lock can last, so that a Redis that does not answer is noticed first.
        self._streams = Streams(
            settings.redis_url,
            prefix=settings.redis_prefix,
            timeout_seconds=settings.takeover_seconds * 0.4,
        )
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
        purger = threading.Thread(target=_purge, args=(self._settings, self.stop), daemon=True)
        purger.start()
        while not self.stop.is_set():
            try:
                self._listen()
                moved = self.run_once()
            except OutboxError as error:
                self._back_off(error)
            else:
                self._recovered()
                if not moved:
                    self._rest()
        purger.join(timeout=1)
        self.close()

    def drain(self, timeout_seconds: float = 30.0) -> int:
        """Relay until nothing due is left, whoever publishes it, or until stopped; return how many we did.

        Raises the last Unavailable after `timeout_seconds` of it.
        """
        failing_since: float | None = None
        while not self.stop.is_set():
            try:
                self._listen()
                moved = self.run_once()
                if not moved and not self._store.due():
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
        return self.published

    def run_once(self) -> int:
        """Take one step; return how many events it settled, 0 when there is nothing to do or another leads.

        Raises Unavailable when a server cannot do its part: the step is undone, no attempt is spent.
        """
        try:
            if self._check_redis.due():
                self._check_unless_unreadable()
            return self._step()
        except BaseException:
            self._store.rollback()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._store.close()
        self._streams.close()
        self._stop_listening()

    # -- one step ---------------------------------------------------------------------------------------

    def _step(self) -> int:
        lead = self._lead()
        if lead is None:
            return 0
        settings = self._settings
        events = self._store.claim(lead, settings.batch_size, settings.batch_bytes)
        if not events:
            if self._listener and self._empty_steps > 0 and not lead.asleep:
                self._store.say_asleep()
            self._store.commit()
            return 0
        self._empty_steps = 0
        fit, refusals = _sift(events)
        batch = encode(settings.source, fit, self._lane) if fit else EMPTY
        answer: Answer = self._streams.publish(lead.outbox_id, lead.batch, batch)
        if isinstance(answer, Added):
            return self._settle(lead, fit, batch, answer, refusals)
        self._store.rollback()
        return self._recover(lead, answer)

    def _lead(self, expected: int | None = None) -> Lead | None:
        """Begin a step as the leader, or end it: another leads, or has led since (see `expected`)."""
        self._leading = self._store.begin()
        lead = self._store.lead() if self._leading else None
        if lead is None or expected not in (None, lead.batch):
            self._store.commit()  # of nothing: the store need not forget where its claims stopped
            return None
        return lead

    def _settle(
        self, lead: Lead, fit: list[Waiting], batch: Batch, answer: Added, refusals: list[Refusal]
    ) -> int:
        """Journal what Redis has added, put back what it has not, and commit."""
        if answer.refused or answer.held:
            refusals += [Refusal(fit[place], error) for place, error in answer.refused.items()]
            refusals += [Refusal(fit[place]) for place in answer.held]
            left_out = {*answer.refused, *answer.held}
            fit = [event for place, event in enumerate(fit) if place not in left_out]
            batch = encode(self._settings.source, fit, self._lane)
        self._store.record_batch(lead.batch + 1, len(fit), batch.body)
        if refusals:
            self._put_back(refusals)
        self._store.commit()
        self.published += len(fit)
        return len(fit) + len(refusals)

    def _put_back(self, refusals: list[Refusal]) -> None:
        """Give each refused event a later attempt, or none when it has had them all."""
        settings, back = self._settings, []
        for event, error, _ in refusals:
            attempts = event.attempts + 1
            if error is None:
                back.append(Refusal(event))
            elif attempts >= settings.max_attempts or not may_wait(event):
                self._store.bury(event, error, attempts)
                log.error(
                    "event %s of %s is a dead letter after %d attempts: %s",
                    event.event_id, event.stream, attempts, error, extra={"action": "event_dead"},
                )  # fmt: skip
            else:
                wait = backoff_seconds(attempts, settings.backoff_seconds, settings.backoff_max_seconds)
                back.append(Refusal(event, error, wait))
                log.warning(
                    "event %s of %s was refused, attempt %d: %s",
                    event.event_id, event.stream, attempts, error, extra={"action": "event_refused"},
                )  # fmt: skip
        self._store.put_back(back)

    # -- when Redis does not stand where PostgreSQL does ------------------------------------------------

    def _recover(self, lead: Lead, answer: Answer) -> int:
        match answer:
            case Ahead(ids):
                return self._adopt(lead.batch, ids)
            case Behind(batch):
                return self._catch_up(lead.batch, batch)
            case Gone(lanes):
                return self._fill(lead.batch, lanes)
            case Fenced(batch):
                self._store.close()
                raise Unavailable(
                    f"Redis has seen batch {batch} of this outbox and PostgreSQL {lead.batch}: there is a "
                    "newer leader, or PostgreSQL has lost commits"
                )
        raise AssertionError(answer)

    def _adopt(self, expected: int, ids: Sequence[int]) -> int:
        """Finish the batch of a leader that died after its publish: its events are in Redis already."""
        lead = self._lead(expected)
        if lead is None:
            return 1  # somebody has led since: look again at once
        events = self._store.adopt(ids)
        batch = encode(self._settings.source, events, self._lane)
        self._store.record_batch(expected + 1, len(events), batch.body)
        self._store.commit()
        log.warning(
            "adopted batch %d: its %d events were published, but not committed",
            expected + 1, len(events), extra={"action": "batch_adopted"},
        )  # fmt: skip
        return len(events) or 1

    def _catch_up(self, expected: int, known: int) -> int:
        """Send again what Redis has forgotten: the journal's batches after the last that it knows."""
        if known == 0 and self._settings.on_redis_reset == "halt":
            raise Unsuitable(
                f"Redis has lost its state, {expected} batches have been published, and "
                "OUTBOX_ON_REDIS_RESET=halt: nothing is published until that is changed to replay"
            )
        lead = self._lead(expected)
        if lead is None:
            return 1
        log.error(
            "Redis has forgotten batches %d to %d: sending them again", known + 1, expected,
            extra={"action": "redis_behind"},
        )  # fmt: skip
        lost = 0
        for _ in range(CATCH_UP):
            if known >= expected or self.stop.is_set():
                break
            found = self._store.journal_after(known)
            number = found[0] if found else expected
            kept = _read(*found) if found else None
            batch, events = kept or (EMPTY, [])
            answer = self._streams.publish(lead.outbox_id, known, batch, number)
            if not isinstance(answer, Added):
                if isinstance(answer, Gone):
                    self._store.rollback()
                    return self._fill(expected, answer.lanes, known)
                raise Unavailable(f"Redis has changed while batches were sent again: {answer}")
            behind = dict.fromkeys(answer.held, "behind an event of its key that was refused")
            self._bury_all(events, behind | answer.refused)
            lost += number - known - (1 if kept else 0)
            known = number
        if lost:
            log.error(
                "%d batches that Redis has forgotten cannot be read in the journal: they cannot be known",
                lost, extra={"action": "batches_lost"},
            )  # fmt: skip
            self._store.count_losses(batches=lost)
        self._store.commit()
        return 1

    def _fill(self, expected: int, lanes: Sequence[str], known: int | None = None) -> int:
        """Fill lanes that were deleted or evicted again, with all that the journal holds of them."""
        names = ", ".join(lanes)
        if self._settings.on_redis_reset == "halt":
            raise Unsuitable(
                f"Redis has lost {names}, and OUTBOX_ON_REDIS_RESET=halt: nothing is published until that "
                "is changed to replay"
            )
        lead = self._lead(expected)
        if lead is None:
            return 1
        stands = expected if known is None else known
        log.error(
            "Redis has lost %s: filling it from the journal",
            names,
            extra={"action": "streams_lost"},
        )
        number = damaged = 0
        while (found := self._store.journal_after(number)) and found[0] <= stands:
            if self.stop.is_set():
                self._store.commit()
                return 0  # Redis remembers how far we have come
            number = found[0]
            kept = _read(*found)
            damaged += 0 if kept else 1
            batch, events = kept or (EMPTY, [])
            for lane in {*lanes} & {*batch.lanes}:
                self._restore(lead, stands, lane, number, batch, events)
        for lane in lanes:
            self._restore(lead, stands, lane, 0, EMPTY._replace(lanes=[lane]), [])
        self._store.count_losses(streams=len(lanes), batches=damaged)
        self._store.commit()
        return 1

    def _restore(
        self, lead: Lead, stands: int, lane: str, number: int, batch: Batch, events: Sequence[Waiting]
    ) -> None:
        answer = self._streams.restore(lead.outbox_id, stands, lane, number, batch)
        if not isinstance(answer, Added):
            raise Unavailable(f"Redis has changed while {lane} was filled: {answer}")
        self._bury_all(events, answer.refused)

    def _bury_all(self, events: Sequence[Waiting], refused: dict[int, str]) -> None:
        for place, error in refused.items():
            self._store.bury(events[place], f"refused when it was sent again: {error}", 1)

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
            self._listen_again = Every(float("inf"))
            self._listen_again.due()
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

    def _check_unless_unreadable(self) -> None:
        try:
            self._streams.check()
        except Unsuitable:
            self._check_redis = Every(0)  # until it is right again
            raise
        self._check_redis = Every(30)
        self._check_redis.due()

    def _back_off(self, error: OutboxError) -> None:
        pause = self._outage.next()
        log.warning("%s; next try in %.1f s", error, pause, extra={"action": "relay_backoff"})
        self.stop.wait(pause)

    def _recovered(self) -> None:
        if self._outage.failures:
            log.info("both servers answer again", extra={"action": "relay_recovered"})
        self._outage.reset()


def _sift(events: Sequence[Waiting]) -> tuple[list[Waiting], list[Refusal]]:
    """Part the events that can be published from those that cannot, and what must not pass them."""
    fit: list[Waiting] = []
    refusals: list[Refusal] = []
    stopped: set[tuple[str, str | None]] = set()
    for event in events:
        if error := publishable(event):
            refusals.append(Refusal(event, error))
            stopped |= {(event.stream, event.key)} if event.key is not None else set()
        elif stopped and (event.stream, event.key) in stopped:
            refusals.append(Refusal(event))
        else:
            fit.append(event)
    return fit, refusals


def _read(number: int, body: bytes) -> tuple[Batch, list[Waiting]] | None:
    """Return a batch of the journal with its events, or None where it is damaged."""
    try:
        return decode(body)
    except DamagedBatch as error:
        log.error(
            "batch %d of the journal is damaged, it cannot be sent again: %s",
            number, error, extra={"action": "batch_damaged"},
        )  # fmt: skip
        return None


def _store(settings: Settings) -> Store:
    return Store(
        settings.database_url,
        schema=settings.schema,
        takeover_seconds=settings.takeover_seconds,
    )


def _purge(settings: Settings, stop: Stop) -> None:
    """Delete old journal batches, a few at a time, beside the relay and on a connection of its own."""
    store = _store(settings)
    while not stop.is_set():
        try:
            purged = store.purge(settings.journal_retention_seconds)
        except OutboxError:
            purged = 0  # the relay itself reports what ails the server
        if not purged:
            stop.wait(min(10.0, max(0.1, settings.journal_retention_seconds / 10)))
    store.close()
