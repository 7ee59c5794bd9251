"""The housekeeper does each chore by itself, says what a server refuses, and outlives every error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from outbox import grants, housekeeper
from outbox.errors import RedisUnavailable
from outbox.housekeeper import Housekeeper
from outbox.loop import Stop
from outbox.settings import Settings
from tests.integration.box import Box, before
from tests.integration.test_answers import kill_backends
from tests.integration.test_wakeup import PATIENCE_SECONDS, wait_until
from tests.roles import role_url

NOWHERE = "127.0.0.1:1"  # nothing listens there
Keep = Callable[..., "Rounds"]


class Rounds:
    """A housekeeper at work in a thread of its own, and how often it has begun each chore."""

    def __init__(self, settings: Settings) -> None:
        self.keeper = Housekeeper(settings, Stop())
        self.begun = {"look_at_pressure": 0, "purge": 0, "trim": 0}
        for chore in self.begun:
            before(self.keeper, chore, lambda chore=chore: self._count(chore), times=1_000_000)
        self._thread = threading.Thread(target=self.keeper.run)

    def _count(self, chore: str) -> None:
        self.begun[chore] += 1

    def start(self) -> None:
        self._thread.start()

    def wait(self, rounds: int = 3) -> None:
        """Wait until each chore has been done so many times more, by a housekeeper that is alive."""
        goal = {chore: count + rounds for chore, count in self.begun.items()}
        wait_until(lambda: all(self.begun[chore] > goal[chore] for chore in goal) or not self.is_alive())
        assert self.is_alive()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self.keeper._stop.set()
        self._thread.join(PATIENCE_SECONDS)
        assert not self.is_alive()


@pytest.fixture
def keep(box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Keep]:
    """Make a housekeeper that does every chore in each round."""
    monkeypatch.setattr(housekeeper, "TRIM_SECONDS", 0.0)
    monkeypatch.setattr(housekeeper, "PRESSURE_SECONDS", 0.02)
    caplog.set_level(logging.WARNING, "outbox")
    made: list[Rounds] = []

    def keep(**settings: Any) -> Rounds:
        named = {"database_url": box.database_url, "redis_url": box.redis_url, "lane_max_entries": 1}
        made.append(Rounds(Settings(**named | settings)))
        return made[-1]

    yield keep
    for rounds in made:
        rounds.end()


@pytest.fixture
def published(box: Box) -> Box:
    """A lane that is full, and two batches in the journal that are old enough to be purged."""
    relay = box.relay(batch_size=1)
    for name in "ab":
        box.add(name)
    relay.drain()
    box.sql.execute("UPDATE outbox_journal SET published_at = now() - interval '2 hours'")
    return box


@pytest.fixture
def limited(box: Box) -> Iterator[str]:
    """The URL of a user of Redis who may not run XTRIM."""
    user = f"housekeeper-{uuid4().hex}"
    box.redis.execute_command("ACL", "SETUSER", user, "on", ">canary", "~*", "&*", "+@all", "-xtrim")
    url = make_url(box.redis_url).set(username=user, password="canary")
    yield url.render_as_string(hide_password=False)
    box.redis.acl_deluser(user)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of chores that fail."""
    return [
        f"{record.action}: {record.getMessage()}"
        for record in caplog.records
        if record.action.startswith("housekeep")
    ]


def journal(box: Box) -> int:
    return int(box.value("SELECT count(*) FROM outbox_journal"))


def test_what_a_role_may_not_purge_is_said_once_and_the_other_chores_go_on(
    published: Box, roles: dict[str, str], keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    url, role = published.database_url, roles["relay"]
    grants.apply(url, grants.statements({"relay": role}))
    published.sql.execute(f"REVOKE DELETE ON outbox_journal FROM {role}")
    rounds = keep(database_url=role_url(url, "relay"))
    rounds.start()
    rounds.wait()
    (line,) = said(caplog)
    assert line.startswith("housekeeping_failed: the journal cannot be purged: PostgreSQL: permission denied")
    assert (rounds.keeper.pause.lanes, journal(published)) == (("s",), 2)


def test_what_a_user_of_redis_may_not_trim_is_said_once_and_the_other_chores_go_on(
    published: Box, limited: str, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    published.redis.xgroup_create("s", "g", "$")
    rounds = keep(redis_url=limited)
    rounds.start()
    rounds.wait()
    (line,) = said(caplog)
    assert line.startswith("housekeeping_failed: the lanes cannot be trimmed: Redis: ")
    assert (rounds.keeper.pause.lanes, journal(published)) == (("s",), 0)


def test_a_lane_that_may_not_be_trimmed_does_not_hold_up_the_others(published: Box) -> None:
    published.add("c", stream="t")
    published.relay().drain()
    user = f"housekeeper-{uuid4().hex}"
    published.redis.execute_command("ACL", "SETUSER", user, "on", ">canary", "~t", "~outbox:*", "&*", "+@all")
    url = make_url(published.redis_url).set(username=user, password="canary")
    named = Settings(database_url=published.database_url, redis_url=url.render_as_string(hide_password=False))
    keeper = Housekeeper(named, Stop())
    for lane in "st":
        published.redis.xgroup_create(lane, "g", "0")
        published.redis.xreadgroup("g", "c", {lane: ">"})
        published.redis.xack(lane, "g", *[entry for entry, _ in published.redis.xrange(lane)])
    before(keeper, "_note_readers", lambda: seen.append(1), times=9)
    seen: list[int] = []
    with pytest.raises(RedisUnavailable, match="permission"):
        keeper.trim()
    assert seen == [1]  # of t
    keeper.close()
    published.redis.acl_deluser(user)


def test_each_chore_that_is_refused_is_said_again_after_a_time(
    published: Box,
    limited: str,
    keep: Keep,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(housekeeper, "SAY_AGAIN_SECONDS", 0.0)
    published.redis.xgroup_create("s", "g", "$")
    rounds = keep(redis_url=limited)
    rounds.start()
    rounds.wait()
    assert len(said(caplog)) > 1


def test_what_is_away_is_for_the_relay_to_report(keep: Keep, caplog: pytest.LogCaptureFixture) -> None:
    rounds = keep(database_url=f"postgresql://u@{NOWHERE}/d", redis_url=f"redis://{NOWHERE}")
    rounds.start()
    rounds.wait()
    assert said(caplog) == []


def test_a_connection_that_is_ended_is_no_refusal(
    published: Box, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = keep()
    rounds.start()
    rounds.wait()
    kill_backends(published)
    published.redis.client_kill_filter(skipme=True, _type="normal")
    published.redis.xtrim("s", maxlen=0)
    rounds.wait()
    assert (said(caplog), rounds.keeper.pause.lanes) == ([], ())


@pytest.mark.parametrize("away", [True, False])
def test_what_redis_has_not_got_is_kept_however_old_it_is(published: Box, keep: Keep, away: bool) -> None:
    """It went back by a batch, and may have been away since for longer than the journal is kept."""
    outbox_id = published.value("SELECT outbox_id FROM outbox_relay")
    published.redis.hset(f"outbox:{outbox_id}", "batch", 1)
    rounds = keep(redis_url=f"redis://{NOWHERE}") if away else keep()
    rounds.start()
    rounds.wait()
    assert journal(published) == (2 if away else 1)
    assert published.value("SELECT max(batch) FROM outbox_journal") == 2


def test_while_a_lane_is_lost_the_journal_is_kept_and_the_relay_is_told(published: Box, keep: Keep) -> None:
    """What it holds of the lane is all that there is; and nobody may publish there for days."""
    published.redis.delete("s")
    rounds = keep()
    rounds.start()
    rounds.wait()
    assert (journal(published), rounds.keeper.lost) == (2, ["s"])
    published.relay().drain()  # which asks for itself
    assert published.lane() == ["a", "b"]
    wait_until(lambda: not journal(published))
    assert rounds.keeper.lost == []


def test_a_lane_that_is_filled_again_is_lost_until_it_is_whole(published: Box, keep: Keep) -> None:
    """All that it was given so far may have been refused, so that it has no newest entry."""
    state = f"outbox:{published.value('SELECT outbox_id FROM outbox_relay')}"
    published.redis.delete("s")
    published.redis.hdel(state, "last:s")
    published.redis.hset(state, "restored:s", 1)
    rounds = keep()
    rounds.start()
    rounds.wait()
    assert (journal(published), rounds.keeper.lost) == (2, ["s"])


def test_a_batch_is_kept_while_events_of_it_that_were_refused_are_to_be_found_in_it(
    published: Box, keep: Keep
) -> None:
    outbox_id = published.value("SELECT outbox_id FROM outbox_relay")
    published.redis.hset(f"outbox:{outbox_id}", "refused", "a note")
    rounds = keep()
    rounds.start()
    rounds.wait()
    assert journal(published) == 2


@pytest.mark.parametrize("chore", ["look_at_pressure", "purge", "trim"])
def test_a_bug_in_a_chore_is_logged_once_with_its_traceback_and_ends_nothing(
    published: Box, keep: Keep, caplog: pytest.LogCaptureFixture, chore: str
) -> None:
    def stumble() -> None:
        raise RuntimeError("no good")

    rounds = keep()
    before(rounds.keeper, chore, stumble, times=3)
    rounds.start()
    rounds.wait(rounds=5)
    (line,) = said(caplog)
    assert line.startswith("housekeeper_bug: a bug of the housekeeper: ")
    assert "RuntimeError: no good" in caplog.text
    assert (rounds.keeper.pause.lanes, journal(published)) == (("s",), 0)
