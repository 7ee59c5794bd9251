"""Every order in which two relays, a service, crashes and failing servers can meet keeps the promise.

And each rule of the protocol is needed: without it, the search finds a way to break the promise, and prints the
shortest.
"""

import os

import pytest

from outbox import protocol
from outbox.protocol import SendAgain
from tests.model.search import search
from tests.model.world import Event, Rules, World

FULL = os.environ.get("OUTBOX_TEST_MODEL") == "full"

# Two of one key and priority, and one of another key that goes first; two of one key of which the later goes first.
ORDERED = (Event(0, "a", -1), Event(1, "a", -1), Event(2, "b", 1))
CROSSED = (Event(0, "a", -1), Event(1, "a", 1), Event(2, "b", -1))


def world(events=ORDERED, **faults: int) -> World:
    return World(events, **({"crashes": 0, "losses": 0, "freezes": 0, "spoils": 0} | faults))


def keeps_the_promise(start: World) -> None:
    found = search(start)
    print(f"{found.states:,} states, {found.depth} deep")
    assert not found.broken, f"\n{found.broken}"


@pytest.mark.parametrize("events", [ORDERED, CROSSED], ids=["ordered", "crossed"])
@pytest.mark.parametrize(
    "faults",
    [
        {"crashes": 2, "losses": 1, "freezes": 1},
        {"losses": 1, "spoils": 1},
        {"freezes": 1, "spoils": 1},
        {"crashes": 1, "failovers": 1},
    ],
    ids=lambda faults: " ".join(f"{number} {fault}" for fault, number in faults.items()),
)
def test_the_promise_is_kept(events, faults):
    keeps_the_promise(world(events, **faults))


@pytest.mark.skipif(not FULL, reason="set OUTBOX_TEST_MODEL=full")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("events", [ORDERED, CROSSED], ids=["ordered", "crossed"])
@pytest.mark.parametrize("crashes", [1, 2])
def test_the_promise_is_kept_whatever_comes_together(events, crashes):
    keeps_the_promise(world(events, crashes=crashes, losses=1, freezes=1, spoils=1))


@pytest.mark.parametrize(
    ("rule", "faults", "ending"),
    [
        ("compare_and_set", {"crashes": 1}, "is in a stream twice"),
        ("publish_first", {"spoils": 1}, "is lost"),
        ("one_leader", {}, "comes after a later event of its key and priority"),
        ("journal_outlives_loss", {"losses": 1}, "is lost"),
        ("adopt_by_ids", {"crashes": 1}, "is lost"),
        ("ask_again", {"crashes": 1, "losses": 1, "freezes": 1}, "is e1 e2 in Redis, and e1 in PostgreSQL"),
        ("same_connection", {"losses": 1, "freezes": 1}, "is lost"),
        ("remember_batches", {"failovers": 1}, "is in a stream twice"),
        ("note_refusals", {"losses": 1, "spoils": 1}, "is lost"),
    ],
)
def test_without_this_rule_the_promise_is_broken(rule, faults, ending):
    start = world(**faults)
    found = search(start, Rules()._replace(**{rule: False}))
    print(f"without {rule}, after {found.states:,} states:\n{found.broken}")
    assert found.broken.endswith(ending)
    assert not search(start).broken


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
