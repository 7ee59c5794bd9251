"""Every order in which two relays, a service, crashes and failing servers can meet keeps the promise.

And each rule of the protocol is needed: without it, the search finds a way to break the promise, and prints the
shortest.
"""

import os
from functools import cache

import pytest

from outbox import protocol
from outbox.protocol import SendAgain
from tests.model.search import Found, search
from tests.model.world import Event, Rules, World

FULL = os.environ.get("OUTBOX_TEST_MODEL") == "full"

# Two of one key and priority, and one of another key that goes first; two of one key of which the later goes first.
ORDERED = (Event(0, "a", -1), Event(1, "a", -1), Event(2, "b", 1))
CROSSED = (Event(0, "a", -1), Event(1, "a", 1), Event(2, "b", -1))

# Each in a batch of its own: two of one key that others go before, early and late; three of one lane.
OVERTAKEN = (Event(0, "b", 1), Event(1, "a", -1), Event(2, "a", -1), Event(3, "b", 1))
ALIKE = (Event(0, "a", -1), Event(1, "a", -1), Event(2, "a", -1))


def world(events=ORDERED, **faults: int) -> World:
    none = {"crashes": 0, "losses": 0, "freezes": 0, "spoils": 0}
    return World(events, **(none | faults), batch_size=1 if events in (OVERTAKEN, ALIKE) else 2)


def late(start: World) -> World:
    return start._replace(claims_late=True)


@cache
def search_with_all_rules(start: World) -> Found:
    return search(start)


def keeps_the_promise(start: World) -> None:
    found = search_with_all_rules(start)
    print(f"{found.states:,} states, {found.depth} deep")
    assert not found.broken, f"\n{found.broken}"


def named(faults: dict[str, int]) -> str:
    return " ".join(f"{number} {fault}" for fault, number in faults.items())


@pytest.mark.parametrize("events", [ORDERED, CROSSED], ids=["ordered", "crossed"])
@pytest.mark.parametrize(
    "faults",
    [
        {"crashes": 1, "losses": 1, "freezes": 1},
        {"losses": 1, "spoils": 1},
        {"crashes": 1, "failovers": 1},
    ],
    ids=named,
)
def test_the_promise_is_kept(events, faults):
    keeps_the_promise(world(events, **faults))


# Not of the crossed ones, which have no end: while all of a batch is refused, PostgreSQL may end an idle transaction
# again and again, and each time an empty batch is adopted.
def test_the_promise_is_kept_with_a_freeze_and_a_refusal():
    keeps_the_promise(world(ORDERED, freezes=1, spoils=1))


@pytest.mark.parametrize(
    ("events", "faults"),
    [
        (OVERTAKEN, {"crashes": 1, "losses": 1}),
        (OVERTAKEN, {"crashes": 1, "freezes": 1}),
        (ALIKE, {"deletions": 2, "freezes": 1}),
        (ALIKE, {"deletions": 1, "losses": 1}),
    ],
    ids=[
        "overtaken-1 crashes 1 losses",
        "overtaken-1 crashes 1 freezes",
        "alike-2 deletions 1 freezes",
        "alike-1 deletions 1 losses",
    ],
)
def test_the_promise_is_kept_batch_by_batch(events, faults):
    keeps_the_promise(world(events, **faults))


@pytest.mark.skipif(not FULL, reason="set OUTBOX_TEST_MODEL=full")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("crashes", [1, 2])
def test_the_promise_is_kept_whatever_comes_together(crashes):
    keeps_the_promise(late(world(ORDERED, crashes=crashes, losses=1, freezes=1, spoils=1)))


@pytest.mark.skipif(not FULL, reason="set OUTBOX_TEST_MODEL=full")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("events", [OVERTAKEN, ALIKE], ids=["overtaken", "alike"])
@pytest.mark.parametrize("faults", [{"failovers": 1}, {"spoils": 1}, {"crashes": 1}], ids=named)
def test_the_promise_is_kept_whatever_is_deleted(events, faults):
    keeps_the_promise(late(world(events, deletions=1, losses=1, freezes=1, **faults)))


@pytest.mark.parametrize(
    ("rule", "events", "faults", "ending"),
    [
        ("compare_and_set", ORDERED, {"crashes": 1}, "is in a stream twice"),
        ("publish_first", ORDERED, {"spoils": 1}, "is lost"),
        ("one_leader", ORDERED, {}, "comes after a later event of its key and priority"),
        ("journal_outlives_loss", ORDERED, {"losses": 1}, "is lost"),
        ("adopt_by_ids", ORDERED, {"crashes": 1}, "is lost"),
        (
            "ask_again",
            ORDERED,
            {"crashes": 1, "losses": 1, "freezes": 1},
            "is e1 e2 in Redis, and e1 in PostgreSQL",
        ),
        ("same_connection", ORDERED, {"losses": 1, "freezes": 1}, "is lost"),
        ("remember_batches", ORDERED, {"failovers": 1}, "is in a stream twice"),
        ("note_refusals", ORDERED, {"losses": 1, "spoils": 1}, "is lost"),
        ("wait_for_rows", OVERTAKEN, {"freezes": 1}, "comes after a later event of its key and priority"),
        ("wait_ahead", OVERTAKEN, {}, "comes after a later event of its key and priority"),
        ("refused_ends_ahead", ORDERED, {"spoils": 1}, "has passed e1, which was refused"),
        ("lead_again", OVERTAKEN, {"losses": 1}, "is lost"),
        ("read_again", OVERTAKEN, {"losses": 1}, "is lost"),
        ("recover_empty_handed", ORDERED, {"losses": 1}, "is lost"),
        ("compare_lanes", ORDERED, {"deletions": 1}, "is lost"),
        ("note_progress", ALIKE, {"deletions": 1, "crashes": 1}, "is in a stream twice"),
        ("fill_from_start", ALIKE, {"deletions": 2}, "is lost"),
        ("fill_the_lost_only", ALIKE, {"deletions": 1, "freezes": 1}, "is in a stream twice"),
        ("compare_progress", ALIKE, {"deletions": 2, "freezes": 1}, "is lost"),
        ("idle_timeout", ORDERED, {"freezes": 1}, "nobody ever comes to rest"),
    ],
)
def test_without_this_rule_the_promise_is_broken(rule, events, faults, ending):
    start = world(events, **faults)
    found = search(start, Rules()._replace(**{rule: False}))
    print(f"without {rule}, after {found.states:,} states:\n{found.broken}")
    assert found.broken.endswith(ending)
    assert not search_with_all_rules(start).broken


@pytest.mark.parametrize("events", [ORDERED, OVERTAKEN], ids=["ordered", "overtaken"])
@pytest.mark.parametrize("faults", [{"crashes": 1}, {"freezes": 1}], ids=named)
def test_the_promise_is_kept_when_the_claim_ahead_is_late(events, faults):
    keeps_the_promise(late(world(events, **faults)))


def test_every_rule_has_its_mutant():
    (mark,) = [
        mark for mark in test_without_this_rule_the_promise_is_broken.pytestmark if mark.name == "parametrize"
    ]
    assert {rule for rule, *_ in mark.args[1]} == {*Rules._fields}


def test_the_search_sees_a_relay_that_is_stuck(monkeypatch):
    """As one is that takes a Redis ahead of it for a newer leader's, for ever, instead of adopting."""
    monkeypatch.setattr(protocol, "decide", lambda expected, answer, replay: SendAgain(expected))
    found = search(world(crashes=1))
    assert found.broken.endswith("nobody ever comes to rest")
