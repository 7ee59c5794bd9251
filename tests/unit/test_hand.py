"""What is in hand: whom an entry belongs to by the time that it is handled, and what comes first."""

import time

import pytest

from outbox.groups import Entry
from outbox.hand import Hand

IDLE_SECONDS = 3600.0


@pytest.fixture
def hand() -> Hand:
    return Hand(IDLE_SECONDS, lambda lane: lane == "s")


def read(*ids: str, since: float) -> list[Entry]:
    return [Entry("s", id_, {b"type": b"T"}, 1, since) for id_ in ids]


def test_what_was_just_read_is_surely_ours_and_keeps_its_order(hand):
    now = time.monotonic()
    first = hand.read(read("1", "2", "3", since=now))
    entries = [first, hand.primary(), hand.primary()]
    assert [entry.id for entry in entries] == ["1", "2", "3"]
    assert all(hand.surely_ours(entry, now) for entry in entries)
    assert hand.primary() is None


def test_what_was_long_on_its_way_is_delivered_once_more(hand):
    """Another consumer may have claimed it; a heartbeat in between has not renewed what was not in hand."""
    now = time.monotonic()
    hand.renewed_at = now
    assert hand.read(read("1", "2", since=now - IDLE_SECONDS / 2)) is None
    entries = [hand.primary(), hand.primary()]
    assert [(entry.id, entry.deliveries) for entry in entries] == [("1", 0), ("2", 0)]
    assert not any(hand.surely_ours(entry, now) for entry in entries)
    assert hand.held() == {"s": ["1", "2"]}


def test_what_another_worker_takes_up_meanwhile_is_handled_by_one_of_them(hand):
    asked_at = time.monotonic()
    hand.adopt("s", ["1", "2"])
    assert hand.primary().id == "1"
    hand.drop("s", ["1"])  # it is done
    assert hand.read(read("1", "2", "3", since=asked_at)) is None
    entries = [hand.primary(), hand.primary(), hand.primary()]
    assert [(entry.id, entry.deliveries) for entry in entries] == [("2", 0), ("1", 0), ("3", 0)]


def test_what_was_read_comes_before_what_is_taken_up_later(hand):
    first = hand.read(read("1", "2", "3", since=time.monotonic()))
    hand.put_back(first)
    hand.line_up()
    hand.adopt("s", ["4"])
    entries = [hand.primary() for _ in range(5)]
    assert [entry and (entry.id, entry.deliveries) for entry in entries] == [
        *(("1", 1), ("2", 1), ("3", 1), ("4", 0)),
        None,
    ]


def test_an_entry_that_others_had_and_that_was_claimed_back_may_be_put_back_twice(hand):
    """By the worker that had it when this process froze, and by the one that has got it since: PostgreSQL is away."""
    old = hand.read(read("1", since=time.monotonic()))
    hand.drop("s", ["1"])
    hand.adopt("s", ["1"])
    new = hand.primary()
    hand.put_back(old)
    hand.put_back(new)
    assert [hand.primary(), hand.primary(), hand.primary()] == [old, new, None]


def test_what_could_not_be_handled_comes_before_what_is_to_be_delivered_again(hand):
    hand.adopt("s", ["1", "2"])
    one = hand.primary()
    hand.put_back(one)
    assert hand.primary() is one
    hand.retry(one, time.monotonic() + IDLE_SECONDS)
    assert hand.primary().id == "2"
    assert hand.primary() is None
