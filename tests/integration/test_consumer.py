"""The consumer on a real Redis, in all its kinds: the order of the lanes, waking up, taking up, and ending."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from outbox import Consumer, InvalidEvent, InvalidHandler, Reject, Retry
from outbox.errors import InvalidSetting, RedisUnavailable
from outbox.groups import Found, Groups, _entries
from outbox.loop import Every
from tests.integration.bank import KINDS, Bank, Made, entry, wait_until


@pytest.fixture(params=KINDS)
def bank(request, database_url, redis_url) -> Iterator[Bank]:
    bank = Bank(database_url, redis_url, request.param)
    yield bank
    bank.close()


# -- the order of the lanes -------------------------------------------------------------------------------

LANES = ("s", "s:backfill", "t", "t:backfill")
lanes = st.sampled_from(LANES)
# An event: its lane, whether its handler asks for another try, and where its handler adds events in turn.
events = st.tuples(lanes, st.booleans(), st.lists(lanes, max_size=3))
MIXED = [
    ("s:backfill", False, ["s"]),
    ("s", False, []),
    ("t:backfill", True, ["t"]),
    ("s:backfill", False, []),
]


def check_order(bank: Bank, plan: list[tuple[str, bool, list[str]]]) -> None:
    """Run a plan; each backfill event may begin only when all primary events that were there are done."""
    bank.redis.flushall()
    bank.handled.clear()
    open_primary: set[str] = set()
    plans = {}

    def add(lane: str, fails: bool, then: list[str]) -> None:
        name = f"{lane} {len(plans)}"
        plans[name] = [lane, fails, then]
        if lane in ("s", "t"):
            open_primary.add(name)
        bank.add(name, lane)

    def act(event) -> None:
        lane, fails, then = plans[event.data]
        if event.lane == "backfill":
            waiting.append((event.data, sorted(open_primary)))
        if fails:
            plans[event.data][1] = False
            raise Retry(after=0)
        for lane in then:
            add(lane, False, [])
        open_primary.discard(event.data)
        done.add(event.data)
        if len(done) == len(plans):
            made.it.stop()

    waiting, done = [], set()
    for step in plan:
        add(*step)
    made = bank.consumer(act, streams=["s", "t"])
    made.run()
    assert len(done) == len(plans)
    assert all(primary == [] for _, primary in waiting), waiting


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(events, min_size=1, max_size=12))
@example(plan=MIXED)
def test_no_backfill_event_begins_while_primary_has_any(bank, plan):
    check_order(bank, plan)


def test_one_read_of_both_lanes_does_not_keep_the_order(bank, monkeypatch):
    async def both(self, count, done, *, backfill=True):
        await self.ack(done)
        to_read = [*self.lanes, *(">" for _ in self.lanes)]
        command = ("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", 1, "STREAMS", *to_read)
        since = time.monotonic()
        return Found(_entries(await self._run(*command) or [], since), [])

    monkeypatch.setattr(Groups, "next", both)
    with pytest.raises(AssertionError, match="s:backfill"):
        check_order(bank, MIXED)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_primary_event_takes_the_next_free_slot_whatever_the_backlog(bank, monkeypatch, concurrency):
    """No worker that asks after a primary event was added gets backfill before somebody gets that event."""
    added, reads, most_pending = {}, [], []
    following = Groups.next

    async def noted(groups, *arguments, **named):
        began = time.monotonic()
        found = await following(groups, *arguments, **named)
        reads.append((began, time.monotonic(), [entry.fields[b"data"] for entry in found.entries]))
        return found

    def act(event) -> None:
        if event.lane == "primary":
            if len(added) >= 30:
                made.it.stop()
            return
        most_pending.append(bank.redis.xpending("s:backfill", "g")["pending"])
        if len(most_pending) % 10 == 0:
            name = f"primary {len(most_pending)}"
            bank.add(name)
            added[json.dumps(name).encode()] = time.monotonic()

    with bank.redis.pipeline(transaction=False) as pipeline:
        for n in range(100_000):
            pipeline.xadd("s:backfill", entry("bulk", "s:backfill", id=f"{n:032x}"))
        pipeline.execute()
    monkeypatch.setattr(Groups, "next", noted)
    made = bank.consumer(act, concurrency=concurrency)
    made.run()
    gotten = {data: began for began, _, found in reads for data in found}
    for name, since in added.items():
        if name in gotten:
            between = [read for read in reads if read[0] > since and read[1] < gotten[name] and read[2]]
            assert between == [], name
    assert len(gotten.keys() & added.keys()) >= 25
    assert max(most_pending) <= concurrency


def test_no_worker_pauses_while_another_has_taken_what_it_read(bank, monkeypatch):
    """A reader hands its entry to the queue of all; it must not wait for a newer one when that is taken."""
    asked = []
    wait = Groups.wait

    async def recorded(self, newest, seconds):
        asked.append(list(newest))
        return await wait(self, newest, seconds)

    def act(event) -> None:
        if len(bank.handled) == 2000:
            made.it.stop()

    monkeypatch.setattr(Groups, "wait", recorded)
    for n in range(2000):
        bank.add(f"bulk {n}", "s:backfill")
    made = bank.consumer(act, concurrency=4)
    made.run()
    assert ["$", "$"] not in asked


def test_the_backfill_lanes_take_turns(bank):
    for lane in ("s:backfill", "t:backfill", "u:backfill"):
        for n in range(4):
            bank.add(f"{lane} {n}", lane)
    made = bank.consumer(streams=["s", "t", "u"])
    assert made.drain() == 12
    rounds = [[name[0] for name in bank.handled[n : n + 3]] for n in range(0, 12, 3)]
    assert rounds == rounds[:1] * 4
    assert {*rounds[0]} == {*"stu"}


# -- waking up --------------------------------------------------------------------------------------------


def test_an_idle_consumer_is_woken_by_any_lane(bank, monkeypatch):
    commands = []
    run = Groups._run

    async def recorded(self, *command):
        mine = [command, None]
        commands.append(mine)
        mine[1] = await run(self, *command)
        return mine[1]

    monkeypatch.setattr(Groups, "_run", recorded)
    made = bank.consumer(streams=["s", "t"])
    with made.running():
        for lane in LANES:
            wait_until(lambda: any("b" in info["flags"] for info in bank.redis.client_list()), "an idle one")
            bank.add(lane, lane)
            wait_until(lambda lane=lane: lane in bank.handled)
    blocking = [(command, answer) for command, answer in commands if "BLOCK" in command]
    assert {answer[0][0].decode() for _, answer in blocking if answer} == set(LANES)
    for command, _ in blocking:
        assert command[command.index("BLOCK") + 1] > 0
        assert set(LANES) <= set(command)
    assert all("BLOCK" not in command for command, _ in commands if command[0] == "XREADGROUP")


def test_what_waits_for_its_time_does_not_keep_primary_from_being_read(bank, monkeypatch):
    monkeypatch.setattr("outbox.hand.MOST_WAITING", 3)

    def act(event) -> None:
        if event.lane == "backfill":
            raise Retry(after=timedelta(hours=1))

    for n in range(5):
        bank.add(f"bulk {n}", "s:backfill")
    made = bank.consumer(act)
    assert made.drain() == 3
    bank.add("a")
    assert made.drain() == 1
    assert bank.handled == ["bulk 0", "bulk 1", "bulk 2", "a"]


def test_no_more_of_primary_is_read_than_can_wait_for_its_time(bank, monkeypatch):
    monkeypatch.setattr("outbox.hand.MOST_WAITING", 3)

    def act(event) -> None:
        raise Retry(after=timedelta(hours=1))

    for n in range(5):
        bank.add(f"e{n}")
    assert bank.consumer(act).drain() == 3
    assert len(bank.pending()) == 3


def test_a_backfill_event_that_is_due_outlives_a_read_that_fails(bank, monkeypatch):
    following, failures = Groups.next, ["Redis: it is away"]

    async def cut_off(self, *arguments, **named):
        if bank.handled and failures:
            raise RedisUnavailable(failures.pop())
        return await following(self, *arguments, **named)

    def act(event) -> None:
        if event.deliveries == 1:
            raise Retry(after=0)

    monkeypatch.setattr(Groups, "next", cut_off)
    bank.add("a", "s:backfill")
    made = bank.consumer(act)
    made.run_once()
    with pytest.raises(RedisUnavailable):
        made.run_once()
    assert made.drain() == 1
    assert bank.handled == ["a", "a"]


# -- taking up what is pending ----------------------------------------------------------------------------


def give(bank: Bank, consumer: str, *lanes: str) -> None:
    """Deliver what is in the lanes to a consumer that never comes back."""
    for lane in lanes:
        with suppress(Exception):
            bank.redis.xgroup_create(lane, "g", "0", mkstream=True)
        bank.redis.xreadgroup("g", consumer, {lane: ">"})


def test_its_own_pending_entries_come_first_primary_before_backfill(bank):
    for lane in ("s:backfill", "s"):
        bank.add(f"pending 1 {lane}", lane)
        bank.add(f"pending 2 {lane}", lane)
    give(bank, "me", "s:backfill", "s")
    bank.add("new s:backfill", "s:backfill")
    bank.add("new s")
    made = bank.consumer(name="me")
    assert made.drain() == 6
    assert bank.handled == [
        *("pending 1 s", "pending 2 s", "new s"),
        *("pending 1 s:backfill", "pending 2 s:backfill", "new s:backfill"),
    ]
    assert bank.pending() == bank.pending("s:backfill") == made.it._hand.held() == {}


def test_deliveries_are_counted_by_redis_and_only_of_what_is_handled(bank):
    def act(event) -> None:
        if event.data == "poison":
            raise SystemExit  # as near to the end of a process as a test can get

    for name in ("poison", "behind 1", "behind 2"):
        bank.add(name)
    give(bank, "me", "s")
    for delivery in range(2, 6):  # four times, as the first was a read that no handler came after
        made = bank.consumer(act, name="me", max_deliveries=4)
        with pytest.raises(SystemExit):
            made.run_once()
        assert bank.pending() == {"poison": delivery, "behind 1": 1, "behind 2": 1}
    made = bank.consumer(act, name="me", max_deliveries=4)
    assert made.drain() == 3
    assert bank.handled[4:] == ["behind 1", "behind 2"]
    assert bank.dead()[0]["dlq:error"].startswith("its handler has never come to an end")
    assert bank.dead()[0]["dlq:deliveries"] == "6"


def test_what_a_dead_consumer_had_only_read_is_handled_even_if_it_is_delivered_once(bank):
    bank.add("a")
    give(bank, "me", "s")
    assert bank.consumer(name="me", max_deliveries=1).drain() == 1
    assert (bank.handled, bank.dead()) == (["a"], [])


def test_what_a_silent_consumer_has_is_claimed_in_both_lanes(bank):
    bank.add("a")
    bank.add("b", "s:backfill")
    give(bank, "dead", "s", "s:backfill")
    with bank.consumer(claim_idle=timedelta(milliseconds=50)).running():
        wait_until(lambda: sorted(bank.handled) == ["a", "b"])
        wait_until(lambda: bank.pending() == bank.pending("s:backfill") == {})


def test_many_that_are_claimed_are_each_handled_once(bank):
    names = [f"e{n}" for n in range(350)]
    for name in names:
        bank.add(name)
    give(bank, "dead", "s")
    with bank.consumer(claim_idle=timedelta(milliseconds=50), concurrency=2).running():
        wait_until(lambda: len(bank.handled) >= 350)
        wait_until(lambda: bank.pending() == {})
    assert sorted(bank.handled) == sorted(names)


def claiming(bank: Bank, act=None) -> Made:
    """Make a consumer that looks for what others have left before each event."""
    made = bank.consumer(act, name="me", claim_idle=timedelta(milliseconds=1))
    made.it._keep_again = Every(0)
    return made


def test_what_was_deleted_while_a_silent_consumer_had_it_is_counted_as_lost(bank):
    id_ = bank.add("a")
    give(bank, "dead", "s")
    bank.redis.xdel("s", id_)
    made = claiming(bank)
    wait_until(lambda: made.run_once() + 1 and made.it.counts["lost"])
    assert bank.pending() == {}


def test_what_was_deleted_while_it_waited_to_be_tried_again_is_counted_as_lost(bank):
    """By the heartbeat, as Redis forgets that it is pending when that comes."""

    def act(event) -> None:
        raise Retry(after=timedelta(hours=1))

    id_ = bank.add("a")
    made = claiming(bank, act)
    assert made.run_once() == 1
    bank.redis.xdel("s", id_)
    assert made.drain() == 0
    assert made.it.counts["lost"] == 1
    assert bank.pending() == made.it._hand.held() == {}


def test_what_was_deleted_before_it_was_given_up_is_counted_as_lost(bank):
    def act(event) -> None:
        bank.redis.xdel("s", id_)
        raise Reject("no good")

    id_ = bank.add("a")
    made = bank.consumer(act)
    assert made.run_once() == 1
    assert (made.it.counts["lost"], made.it.counts["dead"], bank.dead()) == (1, 0, [])
    assert bank.pending() == made.it._hand.held() == {}


def test_what_a_dead_consumer_has_is_found_behind_much_that_others_have(bank):
    """One look of Redis' at the pending entries ends after a thousand."""
    for n in range(1100):
        bank.add(f"e{n}")
    give(bank, "alive", "s")
    ids = [row["message_id"] for row in bank.redis.xpending_range("s", "g", "-", "+", 2000)]
    bank.redis.xclaim("s", "g", "dead", 0, ids[-1:], idle=60_000)
    made = bank.consumer(claim_idle=timedelta(seconds=30))
    assert made.run_once() == 1
    assert bank.handled == ["e1099"]


def test_no_more_is_claimed_than_can_be_in_hand(bank, monkeypatch):
    monkeypatch.setattr("outbox.hand.MOST_WAITING", 50)

    def act(event) -> None:
        raise Retry(after=timedelta(hours=1))

    for n in range(250):
        bank.add(f"e{n}")
    give(bank, "dead", "s")
    made = claiming(bank, act)
    wait_until(lambda: made.run_once() + 1 and len(bank.handled) >= 100)
    assert made.drain() == 0
    assert len(bank.handled) == 100


def test_a_consumer_with_its_hands_full_does_not_wait_for_what_is_there_already(bank, monkeypatch, caplog):
    """It would be told of it at once, again and again."""
    monkeypatch.setattr("outbox.hand.MOST_WAITING", 1)

    def act(event) -> None:
        raise Retry(after=timedelta(hours=1))

    made = claiming(bank, act)
    assert made.drain() == 0
    assert made.it._single._newest == [b"0-0", b"0-0"]
    bank.add("a")
    give(bank, "dead", "s")
    wait_until(lambda: made.run_once() + 1 and bank.handled == ["a"])
    bank.add("b")
    assert made.drain() == 0
    assert made.it._single._newest == []
    assert "hand_full" in [getattr(record, "action", None) for record in caplog.records]


def test_a_heartbeat_counts_from_before_it_was_sent(bank, monkeypatch):
    """This process may be frozen before it reads the answer: what it had may be another's by then."""
    sent, renew = [], Groups.renew

    async def noted(self, lane, ids):
        sent.append(time.monotonic())
        return await renew(self, lane, ids)

    monkeypatch.setattr(Groups, "renew", noted)
    bank.add("a")
    give(bank, "me", "s")
    made = bank.consumer(name="me")
    made.run_once()
    assert 0 < made.it._hand.renewed_at <= sent[0]


def run_two_with_a_long_handler(bank: Bank, until) -> None:
    """Hold a handler of the one consumer until a condition of the other is true."""
    looks, held = [], threading.Event()
    bank.add("long")
    claim = Groups.claim

    async def counted(self, *arguments):
        looks.append(self._consumer)
        return await claim(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(Groups, "claim", counted)
        options = {"claim_idle": timedelta(seconds=2)}
        stack.enter_context(bank.consumer(lambda event: held.wait(30), name="one", **options).running())
        wait_until(lambda: bank.handled)
        stack.enter_context(bank.consumer(lambda event: held.wait(30), name="two", **options).running())
        stack.callback(held.set)  # before they are stopped
        wait_until(lambda: until(looks))


def test_the_heartbeat_keeps_the_entry_of_a_long_handler(bank):
    run_two_with_a_long_handler(bank, lambda looks: looks.count("two") >= 14)  # 7 looks of 2 lanes: 4 s
    assert bank.handled == ["long"]


def test_without_the_heartbeat_another_takes_it(bank, monkeypatch):
    async def nothing(self, lane, ids):
        return [], []

    monkeypatch.setattr(Groups, "renew", nothing)
    run_two_with_a_long_handler(bank, lambda looks: len(bank.handled) == 2)


def test_the_heartbeat_goes_on_after_the_stop_until_the_last_handler_has_ended(bank, monkeypatch):
    beats, held, renew = [], threading.Event(), Groups.renew

    async def counted(self, lane, ids):
        beats.append(ids)
        return await renew(self, lane, ids)

    monkeypatch.setattr(Groups, "renew", counted)
    bank.add("long")
    made = bank.consumer(lambda event: held.wait(30), claim_idle=timedelta(milliseconds=300))
    with made.running():
        wait_until(lambda: bank.handled)
        made.it.stop()
        seen = len(beats)
        wait_until(lambda: len(beats) > seen + 3)
        held.set()
    assert bank.pending() == {}


@pytest.mark.parametrize("stops", [False, True])
def test_what_was_claimed_from_it_while_it_was_frozen_is_not_handled_from_memory(bank, monkeypatch, stops):
    """The heartbeat comes first after the thaw, and must not make it sure of what it has lost."""
    beats = []
    renew = Groups.renew

    async def counted(self, lane, ids):
        result = await renew(self, lane, ids)
        beats.append(lane)
        return result

    def act(event) -> None:
        if event.data == "warm 49":  # by now a read takes many
            with bank.redis.pipeline() as pipeline:
                for n in range(10):
                    pipeline.xadd("s", entry(f"e{n}"))
                pipeline.execute()
        if event.data == "e0":
            ids = [row["message_id"] for row in bank.redis.xpending_range("s", "g", "-", "+", 100)]
            stolen.extend(ids)
            bank.redis.xclaim("s", "g", "other", 0, ids, justid=True)
            seen = len(beats)
            wait_until(lambda: len(beats) > seen, "a heartbeat")
            if stops:
                made.it.stop()

    stolen: list[bytes] = []
    monkeypatch.setattr(Groups, "renew", counted)
    for n in range(50):
        bank.add(f"warm {n}")
    made = bank.consumer(act, name="me", claim_idle=timedelta(seconds=4))
    with made.running():
        wait_until(lambda: len(stolen) > 2 and not bank.redis.xpending_range("s", "g", "-", "+", 9, "me"))
        bank.add("after")
        wait_until(lambda: made.it._stop.is_set() if stops else "after" in bank.handled)
    assert "e0" in bank.handled
    assert not {f"e{n}" for n in range(1, len(stolen))} & set(bank.handled)


def test_no_entry_is_left_behind_when_redis_is_away_as_it_is_taken(bank, monkeypatch):
    bank.add("a")
    give(bank, "me", "s")
    take, cuts = Groups.take, []

    async def cut_off(self, lane, id_):
        if not cuts:
            cuts.append(id_)
            raise RedisUnavailable("Redis: it is away")
        return await take(self, lane, id_)

    monkeypatch.setattr(Groups, "take", cut_off)
    made = bank.consumer(name="me")
    with pytest.raises(RedisUnavailable):
        made.run_once()
    assert made.drain() == 1
    assert bank.handled == ["a"]
    assert bank.pending() == {}


def test_no_entry_is_left_behind_when_redis_is_away_as_others_are_acked(bank, monkeypatch):
    monkeypatch.setattr("outbox.consumer.ACK_SECONDS", 0.0)
    ack, cuts = Groups.ack, []

    async def cut_off(self, done):
        if done and len(bank.handled) > 50 and not cuts:
            cuts.append(done)
            raise RedisUnavailable("Redis: it is away")
        return await ack(self, done)

    names = [f"e{n}" for n in range(300)]
    for name in names:
        bank.add(name)
    monkeypatch.setattr(Groups, "ack", cut_off)
    with bank.consumer().running():
        wait_until(lambda: len(bank.handled) >= 300)
        wait_until(lambda: bank.pending() == {})
    assert cuts
    assert bank.handled == names


def test_a_group_that_is_gone_while_it_runs_is_created_again(bank):
    with bank.consumer().running():
        bank.add("a")
        wait_until(lambda: bank.handled)
        bank.redis.delete("s", "s:backfill")  # as a Redis that was restarted empty
        bank.add("b")
        bank.add("c", "s:backfill")
        wait_until(lambda: {"b", "c"} <= {*bank.handled})


def test_a_backfill_group_that_is_gone_stops_no_heartbeat_of_primary(bank, monkeypatch):
    """No worker reads backfill meanwhile, and creates it again."""
    beats, held, renew = [], threading.Event(), Groups.renew

    async def counted(self, lane, ids):
        beats.append(lane)
        return await renew(self, lane, ids)

    def act(event) -> None:
        if event.lane == "backfill":
            raise Retry(after=timedelta(hours=1))
        held.wait(30)

    monkeypatch.setattr(Groups, "renew", counted)
    bank.add("later", "s:backfill")
    made = bank.consumer(act, claim_idle=timedelta(milliseconds=300))
    with made.running():
        wait_until(lambda: bank.handled == ["later"])
        bank.add("long")
        wait_until(lambda: len(bank.handled) == 2)
        bank.redis.xgroup_destroy("s:backfill", "g")
        beats.clear()
        wait_until(lambda: beats.count("s") > 3)
        held.set()


def test_an_idle_consumer_waits_no_longer_than_its_url_allows(bank, caplog):
    bank.redis_url += "?socket_timeout=0.4"
    with bank.consumer().running():
        bank.add("a")
        wait_until(lambda: bank.handled == ["a"])
        before = bank.redis.info("commandstats")["cmdstat_xread"]["calls"]
        wait_until(lambda: bank.redis.info("commandstats")["cmdstat_xread"]["calls"] > before + 5)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("method", ["next", "wait", "claim", "renew"])
def test_a_bug_of_its_own_ends_no_consumer(bank, monkeypatch, caplog, method):
    original, failures = getattr(Groups, method), ["the first call"]

    async def fails_once(self, *arguments, **named):
        if failures:
            raise ValueError(failures.pop())
        return await original(self, *arguments, **named)

    monkeypatch.setattr(Groups, method, fails_once)
    bank.add("a")
    give(bank, "dead", "s")
    with bank.consumer(claim_idle=timedelta(milliseconds=200)).running():
        bank.add("b")
        wait_until(lambda: sorted(bank.handled) == ["a", "b"])
        wait_until(lambda: not failures and bank.pending() == {})
    assert "consumer_bug" in [getattr(record, "action", None) for record in caplog.records]


def test_what_is_done_is_acked_though_more_was_read(bank, monkeypatch):
    monkeypatch.setattr("outbox.consumer.ACK_SECONDS", 0.0)
    still_pending = []

    def act(event) -> None:
        if event.data in ("e150", "e151"):  # by now a read takes many
            still_pending.append([*bank.pending()])
        if event.data == "e151":
            made.it.stop()

    with bank.redis.pipeline() as pipeline:
        for n in range(200):
            pipeline.xadd("s", entry(f"e{n}"))
        pipeline.execute()
    made = bank.consumer(act)
    made.run()
    assert still_pending[0][:2] == ["e150", "e151"]
    assert still_pending[1][0] == "e151"


# -- reading ahead ----------------------------------------------------------------------------------------


@pytest.fixture
def asks(monkeypatch) -> list[str]:
    """Make consumers read ahead however slow their handlers are; return the list of those that have."""
    asks = []
    ask = Groups.ask

    async def noted(groups, count):
        await ask(groups, count)
        asks.append(groups._consumer)

    monkeypatch.setattr("outbox.consumer.PREFETCH_SECONDS", 3600.0)
    monkeypatch.setattr(Groups, "ask", noted)
    return asks


def add_many(bank: Bank, count: int) -> list[str]:
    names = [f"e{n}" for n in range(count)]
    with bank.redis.pipeline() as pipeline:
        for name in names:
            pipeline.xadd("s", entry(name))
        pipeline.execute()
    return names


def handle(bank: Bank, count: int, then: Callable[[], object] = list) -> None:
    """Run a consumer until there are so many handled; call `then` in each handler."""

    def act(event) -> None:
        then()
        if len(bank.handled) >= count:
            made.it.stop()

    made = bank.consumer(act)
    made.run()


def test_what_is_read_ahead_keeps_its_order_and_leaves_nothing_behind(bank, asks):
    names = add_many(bank, 600)
    handle(bank, 200)
    assert asks
    assert bank.handled == names[: len(bank.handled)]
    assert bank.pending() == {}
    handle(bank, 600)
    assert bank.handled == names


def test_what_was_read_ahead_is_not_lost_with_its_connection(bank, asks):
    def cut() -> None:
        if asks and not cuts:
            ids = [client["id"] for client in bank.redis.client_list() if client["name"] == "outbox-consumer"]
            cuts.extend(bank.redis.client_kill_filter(_id=id_) for id_ in ids)

    cuts: list[int] = []
    names = add_many(bank, 600)
    handle(bank, 600, then=cut)
    assert len(cuts) >= 2
    assert bank.handled == names
    assert bank.pending() == {}


def test_what_was_read_ahead_is_not_left_behind_by_a_dead_letter_that_is_refused(bank, asks):
    """The connection on which the next entries are to come is dropped with the one that was refused."""

    def refuse() -> None:
        if asks and not refused:
            refused.append(bank.handled[-1])
            raise Reject("no good")

    refused: list[str] = []
    bank.redis.set("s:dlq", "no stream")
    names = add_many(bank, 600)
    handle(bank, 600, then=refuse)
    assert bank.handled == names
    assert list(bank.pending()) == refused


def others_handle_what_is_read_ahead(bank: Bank, asks: list[str]) -> set[str]:
    """Have all that is pending finished by others, in a long handler; return what of it is handled after that."""
    looks, finished, before = [], [], []
    claim = Groups.claim

    async def counted(self, *arguments):
        looks.append(self._consumer)
        return await claim(self, *arguments)

    def act(event) -> None:
        if asks and not finished:
            finished.extend(bank.pending())
            before.extend(bank.handled)
            ids = [row["message_id"] for row in bank.redis.xpending_range("s", "g", "-", "+", 1000)]
            bank.redis.xack("s", "g", *ids)
            seen = len(looks)
            wait_until(lambda: len(looks) > seen + 8, "heartbeats for longer than an entry is surely ours")
            bank.add("last")
        if event.data == "last":
            made.it.stop()

    add_many(bank, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "claim", counted)
        made = bank.consumer(act, claim_idle=timedelta(seconds=1))
        made.run()
    assert len(finished) > 100
    return set(bank.handled[len(before) :]) & set(finished)


def test_what_others_have_finished_before_it_was_read_is_left_to_them(bank, asks):
    assert others_handle_what_is_read_ahead(bank, asks) == set()


def test_without_a_look_at_its_age_it_is_handled_once_more(bank, asks, monkeypatch):
    rest = Groups.rest

    async def as_if_just_read(self):
        return [replace(entry, since=time.monotonic()) for entry in await rest(self)]

    monkeypatch.setattr(Groups, "rest", as_if_just_read)
    assert len(others_handle_what_is_read_ahead(bank, asks)) == 100


def test_a_group_that_goes_back_over_all_that_waits_here_reads_on(database_url, redis_url):
    """Each read finds what is in hand already, more often than calls can be nested."""

    def act(event) -> None:
        if event.data != "last":
            raise Retry(after=timedelta(hours=1))

    with closing(Bank(database_url, redis_url, "blocking")) as bank:
        made = bank.consumer(act)
        names = add_many(bank, 1100)
        assert made.drain() == 1100
        bank.redis.xgroup_setid("s", "g", "0")
        bank.add("last")
        assert made.drain() == 1
        assert bank.handled == [*names, "last"]


# -- ending -----------------------------------------------------------------------------------------------


def test_a_handler_that_ends_its_thread_ends_the_consumer(database_url, redis_url):
    """`sys.exit()` in the main thread does so too; in another one nobody would hear of it."""

    def act(event) -> None:
        if threading.current_thread().daemon:  # the first worker is in the thread that runs the consumer
            raise SystemExit

    with closing(Bank(database_url, redis_url, "blocking")) as bank, ThreadPoolExecutor() as executor:
        made = bank.consumer(act, concurrency=2)
        running = executor.submit(made.run)
        wait_until(lambda: bank.add("e") and running.done())
        assert isinstance(running.exception(), SystemExit)


def test_what_ends_the_first_worker_is_in_nobodys_hand_any_more(database_url, redis_url):
    """The process may live on: its keeper must not."""

    def act(event) -> None:
        raise SystemExit

    with closing(Bank(database_url, redis_url, "blocking")) as bank:
        bank.add("e")
        before = threading.active_count()
        made = bank.consumer(act)
        with pytest.raises(SystemExit):
            made.run()
        wait_until(lambda: threading.active_count() <= before)


def test_a_consumer_is_not_run_in_a_fork_of_its_process(database_url, redis_url):
    """Both would read each other's answers."""
    with closing(Bank(database_url, redis_url, "blocking")) as bank:
        made = bank.consumer()
        made.it.stop()  # or a child that ran it would not end
        for run in (made.run, made.run_once):
            child = os.fork()
            if child == 0:
                status = 2
                try:
                    run()
                except InvalidSetting as error:
                    status = int("after the fork" in str(error))
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_stopped_consumer_leaves_the_group_but_not_its_pending_entries(bank):
    def act(event) -> None:
        if event.data == "b":
            raise Retry(after=timedelta(hours=1))

    made = bank.consumer(act, name="leaves")
    with made.running():
        bank.add("a")
        wait_until(lambda: bank.handled)
        assert bank.consumers() == {"leaves"}
    assert bank.consumers() == set()
    made = bank.consumer(act, name="stays")
    with made.running():
        bank.add("b")
        wait_until(lambda: "b" in bank.handled)
    assert bank.consumers() == {"stays"}
    assert bank.pending() == {"b": 1}


def test_silent_consumers_are_removed_once_nothing_is_pending_for_them(bank, monkeypatch):
    bank.add("a")
    give(bank, "has one pending", "s")
    bank.redis.xgroup_createconsumer("s", "g", "empty")
    monkeypatch.setattr("outbox.consumer.TIDY_SECONDS", 0.05)
    made = bank.consumer(claim_idle=timedelta(milliseconds=20), name="me")
    with made.running():
        wait_until(lambda: bank.consumers() == {"me"} and bank.handled)
    assert bank.handled == ["a"]


def test_who_removes_silent_consumers_never_removes_itself(bank):
    bank.add("a")
    made = bank.consumer(name="me")
    made.drain()
    bank.redis.xgroup_createconsumer("s", "g", "empty")
    made._finish(made.it._first.forget(idle_seconds=0))
    assert bank.consumers() == {"me"}


def test_a_consumer_that_was_heard_of_lately_stays(bank):
    bank.redis.xgroup_create("s", "g", "0", mkstream=True)
    bank.redis.xgroup_createconsumer("s", "g", "empty")
    bank.consumer(name="me").run_once()
    assert "empty" in bank.consumers()


def test_default_names_are_unique(bank):
    assert len({bank.consumer().it.name for _ in range(5)}) == 5


@pytest.mark.parametrize("concurrency", [1, 3])
def test_stop_before_the_start_and_twice(bank, concurrency):
    bank.add("a")
    made = bank.consumer(concurrency=concurrency)
    made.it.stop()
    made.it.stop()
    made.run()
    assert bank.handled == []


def test_what_was_read_is_finished_before_the_end(bank):
    with bank.redis.pipeline() as pipeline:
        for n in range(500):
            pipeline.xadd("s", entry(f"e{n}"))
        pipeline.execute()

    def act(event) -> None:
        if len(bank.handled) == 100:
            made.it.stop()

    made = bank.consumer(act)
    made.run()
    assert 100 <= len(bank.handled) <= 300
    assert bank.pending() == {}


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"streams": []}, "streams"),
        ({"streams": "s"}, "streams"),
        ({"streams": ["no name"]}, "stream"),
        ({"streams": ["s", "s:backfill"]}, "streams"),
        ({"group": ""}, "group"),
        ({"name": "no name"}, "name"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": True}, "concurrency"),
        ({"max_deliveries": 0}, "max_deliveries"),
        ({"unknown": "ack"}, "unknown"),
        ({"claim_idle": 30}, "claim_idle"),
        ({"backoff": timedelta(0)}, "backoff"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(options, word):
    with pytest.raises((InvalidSetting, InvalidEvent), match=f"^{word}: "):
        Consumer("redis://127.0.0.1:1/0", **({"group": "g", "streams": ["s"]} | options))


def test_a_wrong_url_is_refused_without_saying_it():
    with pytest.raises(InvalidSetting, match="redis_url") as refusal:
        Consumer("redis://:s3cret@host:port/0", group="g", streams=["s"])
    assert "s3cret" not in str(refusal.value)


def test_a_handler_that_cannot_be_called_so_is_refused(bank):
    made = bank.consumer()
    with pytest.raises(InvalidHandler, match=r"\(event\)"):
        made.it.on("T")(lambda: None)
    if bank.kind == "asyncio":
        with pytest.raises(InvalidHandler, match="async def"):
            made.it.on("T")(lambda event: None)
    with pytest.raises(InvalidEvent, match="mark the class"):
        made.it.on(dict)
