"""The demo: its oracle sees every kind of fault, its verdict is what the oracle found, and nothing outlives it."""

import io
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from outbox import demo
from outbox.cli import cli
from outbox.command import Failed
from outbox.demo import (
    ALERT,
    HIT,
    IMPORT,
    KINDS,
    Applied,
    Commit,
    Effect,
    Entry,
    Event,
    Findings,
    Gap,
    Outcome,
)
from outbox.demo_service import BOOKING
from outbox.errors import NoServer

ZEROS = "lost 0, repeated 0, out of order 0"
HIGH, NORMAL = 50, 0
GIVEN = ("OUTBOX_TEST_DATABASE_URL", "OUTBOX_TEST_REDIS_URL")


def event(number: int, key: str = "b1") -> Event:
    return Event(key, number)


def entry(event: Event, priority: int = NORMAL, at: float = 0.0, lane: str = "airline") -> Entry:
    return Entry(lane, event, priority, at)


FIRST, SECOND, THIRD = map(event, (1, 2, 3))


# -- the oracle, on doctored input -----------------------------------------------------------------


def test_what_arrived_in_order_is_clean():
    found = demo.check([FIRST, SECOND], [entry(FIRST), entry(SECOND)])
    assert found == Findings(2, 2, lost=0, repeated=0, out_of_order=0, never_committed=0)
    assert found.clean
    assert str(found) == ZEROS


@pytest.mark.parametrize(
    ("streamed", "faults"),
    [
        pytest.param([FIRST, THIRD], {"lost": 1}, id="lost"),
        pytest.param([], {"lost": 3}, id="all lost"),
        pytest.param([FIRST, SECOND, THIRD, THIRD], {"repeated": 1}, id="repeated"),
        pytest.param([FIRST, THIRD, SECOND], {"out_of_order": 1}, id="out of order"),
        pytest.param([THIRD, FIRST, SECOND], {"out_of_order": 2}, id="two behind a later one"),
        pytest.param([FIRST, SECOND, FIRST, THIRD], {"repeated": 1, "out_of_order": 1}, id="again, and late"),
        pytest.param([FIRST, SECOND, THIRD, event(4)], {"never_committed": 1}, id="never committed"),
        pytest.param([FIRST, SECOND, event(4)], {"lost": 1, "never_committed": 1}, id="another in its place"),
    ],
)
def test_each_fault_is_counted_as_what_it_is(streamed, faults):
    found = demo.check([FIRST, SECOND, THIRD], list(map(entry, streamed)))
    none = dict.fromkeys(("lost", "repeated", "out_of_order", "never_committed"), 0)
    assert found == Findings(3, len(streamed), **(none | faults))
    assert not found.clean


def test_a_repetition_in_the_other_lane_is_one():
    found = demo.check([FIRST], [entry(FIRST), entry(FIRST, lane="airline:backfill")])
    assert (found.repeated, found.out_of_order) == (1, 0)


def test_the_same_number_of_another_key_is_another_event():
    others = [event(1), event(1, key="b2"), event(1, key="b3")]
    assert demo.check(others, list(map(entry, others))).clean
    assert demo.check(others, [entry(others[0])] * 3) == Findings(3, 3, 2, 2, 0, 0)


def test_order_is_that_of_a_lane_a_key_and_a_priority():
    assert demo.check([FIRST, SECOND], [entry(SECOND, HIGH), entry(FIRST, NORMAL)]).clean
    other = event(1, key="b2")
    assert demo.check([SECOND, other], [entry(SECOND), entry(other)]).clean
    assert demo.check([FIRST, SECOND], [entry(SECOND), entry(FIRST, lane="airline:backfill")]).clean
    assert demo.check([FIRST, SECOND], [entry(SECOND, HIGH), entry(FIRST, HIGH)]).out_of_order == 1


@pytest.mark.parametrize(
    ("handled", "faults"),
    [
        pytest.param([FIRST, THIRD, SECOND], {}, id="clean, in any order"),
        pytest.param([FIRST, THIRD], {"effects_lost": 1}, id="lost"),
        pytest.param([], {"effects_lost": 3}, id="all lost"),
        pytest.param([FIRST, SECOND, THIRD, SECOND], {"applied_twice": 1}, id="twice"),
        pytest.param([FIRST, SECOND, SECOND], {"effects_lost": 1, "applied_twice": 1}, id="another twice"),
        pytest.param([FIRST, SECOND, THIRD, event(4)], {"without_event": 1}, id="of nothing"),
    ],
)
def test_each_fault_of_the_effects_is_counted_as_what_it_is(handled, faults):
    found = demo.check_effects([FIRST, SECOND, THIRD], [Effect(event, 0.0) for event in handled])
    none = dict.fromkeys(("effects_lost", "applied_twice", "without_event"), 0)
    assert found == Applied(len(handled), **(none | faults))
    assert found.clean == (not faults)


def test_an_event_is_late_by_its_first_effect_and_a_lost_one_by_nothing():
    commits = [Commit(BOOKING, 10.0, [FIRST, SECOND]), Commit(BOOKING, 10.5, [THIRD])]
    effects = [Effect(THIRD, 10.75), Effect(FIRST, 99.0), Effect(FIRST, 11.0)]
    found = demo.latencies(commits, effects, Gap(0.0, 0.0))
    assert found == {name: [] for name in (*KINDS, HIT)} | {BOOKING.name: [0.25, 1.0]}


def test_only_live_events_that_a_kill_has_hit_are_set_apart():
    alert, airport = event(1, "EDDF"), event(1, "DE")
    effects = [Effect(FIRST, 19.5), Effect(SECOND, 21.0), Effect(alert, 22.0), Effect(airport, 23.0)]
    commits = [Commit(BOOKING, 19.0, [FIRST]), Commit(BOOKING, 20.0, [SECOND])]
    commits += [Commit(ALERT, 21.0, [alert]), Commit(IMPORT, 20.0, [airport])]
    found = demo.latencies(commits, effects, Gap(20.0, 21.0))
    assert (found[HIT], found[ALERT.name], found[BOOKING.name]) == ([1.0], [1.0], [0.5])
    assert found[IMPORT.name] == [3.0]
    found = demo.latencies(commits, effects, Gap(0.0, 0.0), in_hand={alert, airport})
    assert (found[HIT], found[ALERT.name], found[BOOKING.name]) == ([1.0], [], [0.5, 1.0])
    assert found[IMPORT.name] == [3.0]


def test_the_gap_begins_before_the_last_batch_of_one_relay_and_ends_with_the_first_of_the_next():
    entries = [entry(event(number), at=at) for number, at in enumerate([1.0, 2.0, 2.0, 7.0, 3.0, 3.0, 8.0])]
    assert demo.gap_round(5.0, entries) == Gap(2.0, 7.0)
    assert demo.gap_round(2.5, entries[:1]) == Gap(1.0, float("inf"))


@pytest.mark.parametrize(("share", "value"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_percentile_is_one_of_the_values(share, value):
    assert demo.percentile([float(n) for n in range(1, 101)], share) == value
    assert demo.percentile([7.0], share) == 7.0
    assert demo.percentile([], share) == 0.0


# -- the verdict -----------------------------------------------------------------------------------


CLEAN, APPLIED = Findings(5, 5, 0, 0, 0, 0), Applied(5, 0, 0, 0)


@pytest.mark.parametrize(
    ("findings", "applied", "last_line", "code"),
    [
        (CLEAN, APPLIED, ZEROS, 0),
        (Findings(5, 4, 1, 0, 0, 0), APPLIED, "lost 1, repeated 0, out of order 0", 1),
        (Findings(5, 7, 0, 2, 0, 0), APPLIED, "lost 0, repeated 2, out of order 0", 1),
        (Findings(5, 5, 0, 0, 3, 0), APPLIED, "lost 0, repeated 0, out of order 3", 1),
        (Findings(5, 6, 0, 0, 0, 1), APPLIED, ZEROS, 1),  # not in the line, and yet no success
        (CLEAN, Applied(4, 1, 0, 0), ZEROS, 1),  # in a line of its own
        (CLEAN, Applied(6, 0, 1, 0), ZEROS, 1),
        (CLEAN, Applied(6, 0, 0, 1), ZEROS, 1),
    ],
)
def test_the_last_line_and_the_exit_code_are_what_was_found_with_lanes(
    monkeypatch, findings, applied, last_line, code
):
    assert played(monkeypatch, (findings, applied), (CLEAN, APPLIED))[::2] == (code, last_line)


def test_the_effects_have_their_own_line(monkeypatch):
    _, line, _ = played(monkeypatch, (CLEAN, Applied(7, 1, 3, 0)), (CLEAN, APPLIED))
    assert line == "Effects: 5 events, 7 effects; lost 1, applied twice 3."


@pytest.mark.parametrize("off", [(Findings(5, 8, 1, 4, 2, 0), APPLIED), (CLEAN, Applied(6, 0, 1, 0))])
def test_the_comparison_never_reaches_the_last_lines_and_yet_counts(monkeypatch, off):
    expected = (1, "Effects: 5 events, 5 effects; lost 0, applied twice 0.", ZEROS)
    assert played(monkeypatch, (CLEAN, APPLIED), off) == expected


def played(
    monkeypatch: pytest.MonkeyPatch, on: tuple[Findings, Applied], off: tuple[Findings, Applied]
) -> tuple[int, str, str]:
    """Run the demo with these findings in place of its two plays; return the exit code and the last two lines."""

    def play(console: Console, database_url: str, redis_url: str, lanes: bool) -> Outcome:
        return Outcome(*(on if lanes else off), {name: [0.1] for name in (*KINDS, HIT)})

    monkeypatch.setattr(demo, "play", play)
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    output = io.StringIO()
    code = demo.run(Console(file=output, width=100))
    effects, last = output.getvalue().splitlines()[-2:]
    return code, effects, last


def test_a_redis_with_anything_in_it_is_left_alone(redis_url, redis):
    redis.set("somebody", "else")
    with pytest.raises(NoServer, match="not empty"), demo._empty_redis(redis_url):
        pass
    assert redis.get("somebody") == b"else"


# -- what it does not get over ---------------------------------------------------------------------


def test_a_demo_that_stands_still_ends_with_a_sentence(monkeypatch):
    servers = SimpleNamespace(handled=lambda: 3, published=Counter)
    commits = [Commit(BOOKING, 0.0, [FIRST] * 1005)]
    monkeypatch.setattr(demo, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(
        demo,
        "run",
        lambda console: demo.Watch(console, servers, {"primary": [commits]}).until(lambda now: False),
    )
    result = CliRunner().invoke(cli, ["demo"])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: the demo cannot go on: nothing has moved for 0 s, and 1,002 events wait\n"
    )


def test_a_producer_that_fails_is_named_in_a_sentence():
    environ = {name: value for name, value in os.environ.items() if name != "OUTBOX_DATABASE_URL"}
    with (
        demo.Producer("import", environ) as producer,
        pytest.raises(Failed, match="of the import has failed"),
    ):
        producer.stop()


# -- as a process ----------------------------------------------------------------------------------


@contextmanager
def running() -> Iterator[subprocess.Popen[str]]:
    """Run `outbox-relay demo` in a pipe, on servers of its own; gone with the block, whatever happens."""
    environ = {name: value for name, value in os.environ.items() if name not in (*GIVEN, "COLUMNS")}
    command = [sys.executable, "-m", "outbox.cli", "demo"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_from_start_to_end():
    with running() as process:
        output, errors = process.communicate()
    print(output)
    assert (process.returncode, errors) == (0, "")
    assert output.splitlines()[-1] == ZEROS
    assert output.splitlines().count(ZEROS) == 1, "the comparison must not be taken for the product"
    # Once with lanes and once without, what is killed is what was at work, and another goes on.
    kills = re.findall(r"kill -9 (\d+)\b.*(?:relay|consumer) (\d+) starts", output)
    relays = re.findall(r"relay (\d+) starts", output)
    consumers = re.findall(r"consumers (\d+) and", output) + re.findall(r"consumer (\d+) starts", output)
    assert len(kills) == 4
    assert sorted(relays + consumers) == sorted(pid for kill in kills for pid in kill)
    assert len(set(relays + consumers)) == 8
    found = dict(re.findall(r"^ *([a-z ]+?) +([\d,]+ +[\d,]+) *$", output, re.MULTILINE))
    assert found["committed"].split() == found["in streams"].split() == found["effects"].split()
    assert all(int(count.replace(",", "")) > demo.ANNOUNCED for count in found["committed"].split())
    assert found["applied twice"].split() == found["effects lost"].split() == ["0", "0"]


@pytest.mark.parametrize(
    ("line", "number", "code"),
    [
        pytest.param("airports announced", signal.SIGINT, 130, id="Ctrl-C, no relay yet"),
        pytest.param(r"consumer \d+ starts", signal.SIGINT, 130, id="Ctrl-C, third consumer"),
        pytest.param(r"consumers \d+ and \d+ start", signal.SIGKILL, -9, id="kill -9"),
    ],
)
def test_nothing_is_left_when_it_is_ended_midway(line, number, code):
    with running() as process:
        assert process.stdout is not None
        assert any(re.search(line, printed) for printed in process.stdout), "it ended before that line"
        family = psutil.Process(process.pid).children(recursive=True)
        folders = folders_of(family)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    if number == signal.SIGINT:  # after kill -9 nobody is there to hush the others
        assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    assert len(folders) == 5, "of PostgreSQL, Redis, the relay and two consumers"
    assert [folder for folder in folders if folder.exists()] == []


def folders_of(family: list[psutil.Process]) -> list[Path]:
    """Return the temporary folders that the supervisors among the processes keep."""
    commands = (" ".join(command_of(child)) for child in family)
    return [Path(folder) for command in commands for folder in re.findall(r'"folder": "([^"]+)"', command)]


def command_of(process: psutil.Process) -> list[str]:
    """Return the command of a process; none of one that has just been killed."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
