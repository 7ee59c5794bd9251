"""What the store promises beyond the order of a claim: late rows, undone steps, the leader's lock, bounds."""

import json
import secrets
from contextlib import closing

import pytest

from outbox.errors import DatabaseUnavailable
from outbox.store import Store
from tests.integration.box import after
from tests.integration.test_answers import kill_backends


@pytest.fixture
def store(box):
    """A store that never scans from the top by itself, so that only its positions find a row."""
    store = Store(box.database_url)
    after(store, "claim", lambda: setattr(store, "_from_top_at", float("inf")), times=1000)
    yield store
    store.close()


def claim(store, rows=100, size=1_000_000):
    """Take a step and return the names of what it claimed."""
    assert store.begin()
    events = store.claim(store.lead(), rows, size).events
    store.commit()
    return [json.loads(event.payload)[:10] for event in events]


def setting(store, expression):
    """Return the value of an expression in the transaction of the step."""
    return store._connected().execute(f"SELECT {expression}").fetchone()[0]


def test_a_claim_that_was_cancelled_for_its_time_has_more_of_it_the_next_time(box, store):
    """Each walk past what a snapshot holds is as long as the last: with the same time none would come to its end."""
    box.add("a")
    store._statement_ms = 50
    with box.connect() as other:
        other.execute("SELECT FROM outbox FOR UPDATE")
        for patience in ("100ms", "200ms"):
            with pytest.raises(DatabaseUnavailable, match="statement timeout"):
                claim(store)
            store.begin()
            assert setting(store, "current_setting('statement_timeout')") == patience
            store.rollback()
    assert claim(store) == ["a"]


def test_a_late_row_of_a_priority_that_a_full_batch_did_not_reach_still_comes_first(box, store):
    box.add("first of all", priority=-50)
    claim(store)
    with box.connect() as writer:
        box.add("k1", key="k", priority=-50, on=writer)
        box.add("other", priority=-50)
        assert claim(store) == ["other"]
        box.sql.execute("SELECT pg_sleep(1.1)")  # past the second that is left for clocks set back
        writer.commit()
    box.add("k2", key="k", priority=-50)
    box.add("urgent 1", priority=50)
    box.add("urgent 2", priority=50)
    assert claim(store, rows=2) == ["urgent 1", "urgent 2"]
    assert claim(store) == ["k1", "k2"]


def test_a_late_row_that_a_batch_full_of_bytes_did_not_reach_still_comes_first(box, store):
    box.add("first of all", priority=-50)
    claim(store)
    with box.connect() as writer:
        box.add("k1", key="k", priority=-50, on=writer)
        box.add("other", priority=-50)
        assert claim(store) == ["other"]
        box.sql.execute("SELECT pg_sleep(1.1)")
        writer.commit()
    box.add("k2", key="k", priority=-50)
    box.add("x" * 5000, priority=50)
    assert claim(store, size=4000) == ["x" * 10]
    assert claim(store) == ["k1", "k2"]


def test_a_step_whose_connection_is_lost_leaves_nothing_behind_the_position(box, store):
    for day, name in enumerate("abc", start=1):
        box.add(name, key="k", created_at=f"2026-01-0{day}")
    assert store.begin()
    store.claim(store.lead(), 2, 1_000_000)
    kill_backends(box)
    with pytest.raises(DatabaseUnavailable):
        store.commit()
    store.rollback()
    assert claim(store) == ["a", "b", "c"]


def test_only_one_relay_leads_and_the_next_sees_what_it_committed(box, store):
    other = Store(box.database_url)
    box.add("refused")
    assert store.begin()
    assert not other.begin()
    other.rollback()
    box.sql.execute("UPDATE outbox SET attempts = 1")  # as the leader would, before its commit
    store.commit()
    assert other.begin()
    assert other.lead().refused
    other.close()


def test_who_leads_can_ask_once_more_and_who_does_not_cannot(box, store):
    assert not store.begin().refused
    box.add("refused", attempts=1)
    assert store.lead().refused
    kill_backends(box)
    with pytest.raises(DatabaseUnavailable):
        store.lead()


def test_a_relay_that_does_not_lead_spends_no_transaction_id(box, store):
    assert store.begin()
    other = Store(box.database_url)
    assert other.begin() is None
    assert setting(other, "pg_current_xact_id_if_assigned()") is None
    other.close()


@pytest.mark.parametrize("own", ["off", "local", "remote_apply"])
def test_a_step_is_durable_and_timed_whatever_the_defaults_are_and_so_is_the_next(box, own):
    box.sql.execute(f"ALTER DATABASE {box.sql.info.dbname} SET synchronous_commit = {own}")
    for name in "ab":
        box.add(name)
    with closing(Store(box.database_url, takeover_seconds=5)) as store:
        lead = store.begin()
        for goes_on in (False, True):
            assert store.goes_on() == goes_on
            events = store.claim(lead, 1, 1000).events
            assert setting(store, "current_setting('synchronous_commit')") == own.replace("off", "on")
            assert setting(store, "current_setting('idle_in_transaction_session_timeout')") == "3s"
            store._from_top_at = float("inf")
            store.claim_ahead(lead, 1, 1000)
            store.record_batch(lead.batch + 1, len(events), b"")
            store.commit()
            lead = store.begin()


def test_headers_count_among_the_bytes_of_a_batch(box, store):
    headers = json.dumps({f"h{n}": secrets.token_hex(200) for n in range(60)})
    for name in "abc":
        box.add(name, headers=headers)
    assert claim(store, size=20_000) == ["a"]
    assert store._full


def test_a_service_that_made_the_tables_itself_gets_the_leaders_row(box):
    box.sql.execute("DELETE FROM outbox_relay")
    box.add("a")
    box.relay().drain()
    assert box.lane() == ["a"]
