"""The demo: its oracle sees every kind of fault, its verdict is what the oracle found, and nothing outlives it."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from outbox import demo
from outbox.demo import ALERT, BOOKING, IMPORT, KINDS, Commit, Entry, Event, Findings, Gap, Outcome
from outbox.errors import NoServer

ZEROS = "lost 0, repeated 0, out of order 0"
HIGH, NORMAL = 50, 0
GIVEN = ("OUTBOX_TEST_DATABASE_URL", "OUTBOX_TEST_REDIS_URL")


def event(number: int, key: str = "b1", stream: str = "booking") -> Event:
    return Event(stream, key, number)


def entry(event: Event, priority: int = NORMAL, at: float = 0.0, lane: str = "booking") -> Entry:
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
    found = demo.check([FIRST], [entry(FIRST), entry(FIRST, lane="booking:backfill")])
    assert (found.repeated, found.out_of_order) == (1, 0)


def test_the_same_number_of_another_stream_or_key_is_another_event():
    others = [event(1), event(1, key="b2"), event(1, stream="alert")]
    assert demo.check(others, list(map(entry, others))).clean
    assert demo.check(others, [entry(others[0])] * 3) == Findings(3, 3, 2, 2, 0, 0)


def test_order_is_that_of_a_lane_a_key_and_a_priority():
    assert demo.check([FIRST, SECOND], [entry(SECOND, HIGH), entry(FIRST, NORMAL)]).clean
    other = event(1, key="b2")
    assert demo.check([SECOND, other], [entry(SECOND), entry(other)]).clean
    alert = event(1, stream="alert")
    assert demo.check([SECOND, alert], [entry(SECOND), entry(alert, lane="alert")]).clean
    assert demo.check([FIRST, SECOND], [entry(SECOND, HIGH), entry(FIRST, HIGH)]).out_of_order == 1


def test_an_event_is_late_by_its_first_arrival_and_a_lost_one_by_nothing():
    commits = [Commit(BOOKING, 10.0, [FIRST, SECOND]), Commit(BOOKING, 10.5, [THIRD])]
    entries = [entry(THIRD, at=10.75), entry(FIRST, at=11.0), entry(FIRST, at=99.0)]
    found = demo.latencies(commits, entries, Gap(0.0, 0.0))
    assert found == {name: [] for name in (*KINDS, "gap")} | {BOOKING.name: [0.25, 1.0]}


def test_only_live_events_of_the_gap_are_set_apart():
    alert, airport = event(1, "EDDF", "alert"), event(1, "EDDF", "airport")
    entries = [entry(FIRST, at=19.5), entry(SECOND, at=21.0), entry(alert, at=22.0), entry(airport, at=23.0)]
    commits = [Commit(BOOKING, 19.0, [FIRST]), Commit(BOOKING, 20.0, [SECOND])]
    commits += [Commit(ALERT, 21.0, [alert]), Commit(IMPORT, 20.0, [airport])]
    found = demo.latencies(commits, entries, Gap(20.0, 21.0))
    assert (found["gap"], found[ALERT.name], found[BOOKING.name]) == ([1.0], [1.0], [0.5])
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


@pytest.mark.parametrize(
    ("with_lanes", "last_line", "code"),
    [
        (Findings(5, 5, 0, 0, 0, 0), ZEROS, 0),
        (Findings(5, 4, 1, 0, 0, 0), "lost 1, repeated 0, out of order 0", 1),
        (Findings(5, 7, 0, 2, 0, 0), "lost 0, repeated 2, out of order 0", 1),
        (Findings(5, 5, 0, 0, 3, 0), "lost 0, repeated 0, out of order 3", 1),
        (Findings(5, 6, 0, 0, 0, 1), ZEROS, 1),  # not in the line, and yet no success
    ],
)
def test_the_last_line_and_the_exit_code_are_what_was_found_with_lanes(
    monkeypatch, with_lanes, last_line, code
):
    found = {True: with_lanes, False: Findings(5, 5, 0, 0, 0, 0)}
    assert played(monkeypatch, found) == (code, last_line)


def test_the_comparison_never_reaches_the_last_line(monkeypatch):
    found = {True: Findings(5, 5, 0, 0, 0, 0), False: Findings(5, 8, 1, 4, 2, 0)}
    assert played(monkeypatch, found)[1] == ZEROS


def played(monkeypatch: pytest.MonkeyPatch, found: dict[bool, Findings]) -> tuple[int, str]:
    """Run the demo with these findings in place of its two plays; return the exit code and the last line."""

    def play(console: Console, database_url: str, redis_url: str, lanes: bool) -> Outcome:
        return Outcome(found[lanes], {name: [0.1] for name in (*KINDS, "gap")}, Gap(1.0, 2.0))

    monkeypatch.setattr(demo, "play", play)
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    output = io.StringIO()
    code = demo.run(Console(file=output, width=100))
    return code, output.getvalue().splitlines()[-1]


def test_a_redis_with_anything_in_it_is_left_alone(redis_url, redis):
    redis.set("somebody", "else")
    with pytest.raises(NoServer, match="not empty"), demo._empty_redis(redis_url):
        pass
    assert redis.get("somebody") == b"else"


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
    # Once with lanes and once without, the relay that is killed is the one that was at work, and another goes on.
    kills = re.findall(r"kill -9 (\d+)\b.*relay (\d+) starts", output)
    starts = re.findall(r"relay (\d+) starts", output)
    assert starts == [pid for kill in kills for pid in kill]
    assert len(set(starts)) == 4
    (committed,) = re.findall(r"^ *committed +([\d,]+) +([\d,]+)", output, re.MULTILINE)
    (in_streams,) = re.findall(r"^ *in streams +([\d,]+) +([\d,]+)", output, re.MULTILINE)
    assert committed == in_streams
    assert all(int(count.replace(",", "")) > demo.AIRPORTS for count in committed)


@pytest.mark.parametrize(
    ("line", "number", "code"),
    [
        pytest.param("airports imported", signal.SIGINT, 130, id="Ctrl-C, no relay yet"),
        pytest.param(r"kill -9 \d+", signal.SIGINT, 130, id="Ctrl-C, second relay"),
        pytest.param(r"relay \d+ starts", signal.SIGKILL, -9, id="kill -9"),
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
    assert len(folders) == 3, "of PostgreSQL, Redis and the relay"
    assert [folder for folder in folders if folder.exists()] == []


def folders_of(family: list[psutil.Process]) -> list[Path]:
    """Return the temporary folders that the supervisors among the processes keep."""
    commands = (" ".join(child.cmdline()) for child in family if child.is_running())
    return [Path(folder) for command in commands for folder in re.findall(r'"folder": "([^"]+)"', command)]
