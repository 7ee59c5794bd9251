"""The inbox: an event that comes twice takes effect once, in each kind of consumer."""

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest

from outbox.errors import DatabaseUnavailable
from tests.integration.bank import KINDS, Bank, wait_until


@pytest.fixture(params=KINDS)
def bank(request, database_url, redis_url) -> Iterator[Bank]:
    bank = Bank(database_url, redis_url, request.param)
    yield bank
    bank.close()


def test_an_event_that_comes_twice_takes_effect_once(bank):
    made = bank.consumer(inbox=True)
    for _ in range(2):
        bank.add("a", id="4eeda19d-de48-49ff-aeb4-32b8b654002c")
    bank.add("b", id=str(uuid4()))
    assert made.drain() == 3
    assert bank.effects() == ["a", "b"]
    assert made.it.counts == {"handled": 2, "repeated": 1}


def test_a_missing_table_spends_no_delivery(bank):
    made = bank.consumer(inbox=True)
    bank.sql.execute("ALTER TABLE outbox_inbox RENAME TO elsewhere")
    bank.add("a")
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable, match="inbox"):
            made.run_once()
    bank.sql.execute("ALTER TABLE elsewhere RENAME TO outbox_inbox")
    assert made.drain() == 1
    assert bank.effects() == ["a"]
    assert bank.dead() == []


def test_the_handlers_own_commit_is_refused_and_nothing_of_it_stays(bank):
    made = bank.consumer(lambda event, session: session.commit(), inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert bank.effects() == []
    assert "must not commit" in bank.dead()[0]["dlq:error"]


def test_the_handlers_own_rollback_is_refused(bank):
    made = bank.consumer(lambda event, session: session.rollback(), inbox=True, max_deliveries=1)
    bank.add("a")
    assert made.drain() == 1
    assert "begin_nested" in bank.dead()[0]["dlq:error"]


def test_a_savepoint_is_the_handlers_own(bank):
    def act(event, session) -> None:
        with session.begin_nested():
            pass

    made = bank.consumer(act, inbox=True)
    bank.add("a")
    assert made.drain() == 1
    assert bank.effects() == ["a"]


def test_what_another_consumers_transaction_has_in_hand_is_not_waited_for(bank):
    """It may be frozen for long; what is behind its event goes on, and the event comes back without a new delivery."""
    id_, deliveries = "4eeda19d-de48-49ff-aeb4-32b8b654002c", []
    made = bank.consumer(
        lambda event, session: deliveries.append(event.deliveries),
        inbox=True,
    )
    bank.add("a", id=id_)
    bank.add("b")
    with psycopg.connect(bank.database_url.replace("+psycopg", "")) as frozen:
        frozen.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"g {id_}",))
        frozen.execute("INSERT INTO outbox_inbox (consumer_group, event_id) VALUES ('g', %s)", (id_,))
        wait_until(lambda: made.run_once() + 1 and bank.effects() == ["b"])
        frozen.rollback()
    wait_until(lambda: made.run_once() + 1 and bank.effects() == ["a", "b"])
    assert deliveries == [1, 1]
