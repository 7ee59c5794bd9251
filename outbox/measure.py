"""A short measurement of the relay on somebody's own servers, and what bounds it there.

It has an outbox of its own (`site`), touches nothing else, and the relay that it measures is the daemon's.

Where the time of a relay goes is told by those who spend it, while it drains a backlog:

| share | of the time, this much ... |
|---|---|
| `postgresql` | one of the relay's connections was at work in PostgreSQL, at moments chosen at random |
| `commit` | none was, and one waited for its log to be on disk or on a standby |
| `redis` | the thread of Redis used its CPU, whoever for |
| `python` | this process used the CPU, the measurement's own share taken off |
| `between` | is left, at least: the network, the disk of Redis, waiting for a CPU |

The shares of a relay that does two things at once add up to more than one. Whatever else is made faster, a relay can do
no more than its rate divided by a share.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, LiteralString, NamedTuple
from uuid import uuid4

import redis

from outbox.errors import OutboxError
from outbox.relay import Relay
from outbox.report import server_version
from outbox.settings import Settings
from outbox.site import Site, temporary_site

# They show what is being done, and may raise to end it: a text; what is done to events, and to how many.
Say = Callable[[str], None]
Tell = Callable[[str, int], None]

ROUNDS, ENOUGH_SECONDS = 5, 15.0  # no further round starts after so long
WARM_UP_EVENTS, FILL_EVENTS = 1000, 20_000  # the latter in one transaction
PROBES, PROBE_SECONDS = 200, 1.5
SCRIPT_ENTRIES, SCRIPT_BYTES, SCRIPT_CALLS = 500, 2**20, 20  # the first two are the most of one call
SINGLE_COMMITS, PAUSE_SECONDS = 200, 0.02
PATIENCE_SECONDS = 10
ENTRY_BYTES = 400  # of Redis' memory, beside the payload

# An id as `publish` makes it, of UUID version 7: a random one, with the time in place of its first 48 bits.
NEW_ID: LiteralString = """encode(set_bit(set_bit(overlay(
    uuid_send(gen_random_uuid())
    PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1
), 52, 1), 53, 1), 'hex')::uuid"""
# Mixed priorities and 10,007 keys.
FILL: LiteralString = f"""
INSERT INTO {{schema}}.outbox (event_id, stream, type, key, priority, payload)
SELECT {NEW_ID}, %(stream)s, 'Measured', 'key-' || n %% 10007, (ARRAY[-100, -50, 0, 50, 100])[1 + n %% 5],
       (head || left(repeat(md5(n::text), %(bytes)s / 32 + 1), %(bytes)s - length(head) - 2) || '"}}}}')::json
FROM (SELECT n, '{{{{"n": ' || n || ', "text": "' AS head
      FROM generate_series(%(first)s::int, %(last)s::int) AS n) AS made
"""

SINGLE: LiteralString = """
INSERT INTO {schema}.outbox (stream, type, key, payload) VALUES (%s, 'Measured', 'key', '{{"n": 1}}')
"""

# Sleeps in the server: this process may be kept from asking just when the relay computes. The moment is in one of
# three states; null where PostgreSQL does not show them.
MOMENT: LiteralString = """
SELECT pg_sleep(random() * 0.016);
SELECT CASE WHEN bool_or(active AND NOT flushes) THEN 'postgresql'
            WHEN bool_or(active) THEN 'commit'
            WHEN bool_and(shown) THEN 'elsewhere' END
FROM (SELECT state <> 'disabled' AS shown,
             state = 'active' AND wait_event_type IS DISTINCT FROM 'Client' AS active,
             coalesce(wait_event ~* '^(wal.*(sync|write)|syncrep)', false) AS flushes
      FROM pg_stat_activity
      WHERE application_name = {name} AND datname = current_database()) AS relay
"""

# An entry has the fields of a relay's.
ADD_ENTRIES = """
for i = 1, ARGV[1] do
    redis.call('XADD', KEYS[1], '*', 'specversion', '1.0', 'id', ARGV[3], 'source', 'outbox', 'type', 'Measured',
        'time', '2026-01-01T00:00:00.000000Z', 'datacontenttype', 'application/json', 'priority', '0',
        'data', ARGV[2], 'correlationid', ARGV[3], 'subject', 'key')
end
"""

# -- what is found ---------------------------------------------------------------------------------


class Server(NamedTuple):
    """A server by itself. `times` says what it is good at, in seconds a time; `facts` how it is set up."""

    version: str | None
    round_trip: float
    facts: dict[str, str]
    times: dict[str, float]


@dataclass(frozen=True)
class Round:
    """A backlog that was drained. CPU is in seconds, None where nobody tells; `moments` counts what was seen."""

    events: int
    batches: int
    seconds: float
    python: float
    redis: float | None
    machine: float | None  # the share of this machine's CPUs that was in use
    moments: Counter[str | None]


class Shares(NamedTuple):
    """What share of the relay's time each has: see above; None where it is not known."""

    postgresql: float | None
    commit: float | None
    redis: float | None
    python: float
    between: float  # and of those that are not known

    def bounds(self) -> list[tuple[str, float]]:
        """Return who may bound the relay, the largest share first; PostgreSQL and its commits take turns."""
        joined = self._asdict() | {"postgresql": (self.postgresql or 0) + (self.commit or 0)}
        del joined["commit"]
        return sorted(((who, share or 0) for who, share in joined.items()), key=lambda item: -item[1])


@dataclass(frozen=True)
class Findings:
    """All that was measured."""

    postgresql: Server
    redis: Server
    payload_bytes: int
    rounds: Sequence[Round]
    latencies: Sequence[float]  # seconds from commit to a reader, sorted

    @property
    def rates(self) -> list[float]:
        """The events a second of each round."""
        return [one.events / one.seconds for one in self.rounds]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def machine(self) -> float | None:
        """The share of this machine's CPUs that was in use, by whomever; None where it does not tell."""
        known = [one.machine for one in self.rounds if one.machine is not None]
        return statistics.median(known) if known else None

    def latency(self, share: float) -> float:
        """Return the shortest time in which at least this share of the single events was there."""
        return self.latencies[max(0, math.ceil(share * len(self.latencies)) - 1)]

    def moments(self) -> Counter[str | None]:
        return sum((one.moments for one in self.rounds), Counter())

    def shares(self) -> Shares:
        """Return where the time of the relay went, over all rounds."""
        moments, seconds = self.moments(), sum(one.seconds for one in self.rounds)
        shown = sum(moments[state] for state in ("postgresql", "commit", "elsewhere"))
        postgresql, commit = (moments[state] / shown if shown else None for state in ("postgresql", "commit"))
        told = [one.redis for one in self.rounds if one.redis is not None]
        busy = min(1.0, sum(told) / seconds) if len(told) == len(self.rounds) else None
        python = min(1.0, sum(one.python for one in self.rounds) / seconds)
        known = (postgresql or 0) + (commit or 0) + (busy or 0) + python
        return Shares(postgresql, commit, busy, python, max(0.0, 1 - known))


# -- the measurement -------------------------------------------------------------------------------


def measure(config: Settings, events: int, payload_bytes: int, say: Say) -> Findings:
    """Measure the servers of these settings, by themselves and with a relay between them; takes half a minute.

    Raises Unavailable, Unsuitable, or OutboxError for a lack of rights. Nothing of it is left then, either.
    """
    most = max(events, _script_entries(payload_bytes) * (SCRIPT_CALLS + 1))
    with temporary_site(config, most * (payload_bytes + ENTRY_BYTES), say) as site:
        database, cache = _probe_database(site, say), _probe_redis(site, payload_bytes, say)
        rounds = _drain_backlogs(site, events, payload_bytes, say)
        found = Findings(database, cache, payload_bytes, rounds, _commit_singly(site, say))
        say("removing the schema and the keys ...")
        return found


# -- each server by itself -------------------------------------------------------------------------


def _median_seconds(act: Callable[[], Any], most: int | None = None) -> float:
    """Return the median of what a call takes, of some calls; the first does not count."""
    act()
    taken: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS
    while len(taken) < (most or PROBES) and (not taken or time.perf_counter() < end):
        started = time.perf_counter()
        act()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _probe_database(site: Site, say: Say) -> Server:
    names = ("server_version", "fsync", "synchronous_commit")
    rows = site.run("SELECT current_setting(unnest(%s::text[]))", (list(names),)).fetchall()
    version, *settings = (value for (value,) in rows)
    say("PostgreSQL: round trips ...")
    round_trip = _median_seconds(lambda: site.run("SELECT 1"))
    say("PostgreSQL: commits ...")
    commit = _median_seconds(lambda: site.run("INSERT INTO {schema}.probe VALUES (1)"))
    facts = dict(zip(names[1:], settings, strict=True))
    return Server(f"PostgreSQL {version.split()[0]}", round_trip, facts, {"commit": commit})


def _probe_redis(site: Site, payload_bytes: int, say: Say) -> Server:
    info, add = _info(site), site.redis.register_script(ADD_ENTRIES)
    entries = _script_entries(payload_bytes)
    arguments: list[Any] = [entries, "x" * payload_bytes, str(uuid4())]
    say("Redis: round trips ...")
    round_trip = _median_seconds(site.redis.ping)
    say("Redis: entries of a stream ...")
    call = _median_seconds(lambda: add([site.probe], arguments), SCRIPT_CALLS)
    site.redis.unlink(site.probe)
    facts = {"appendonly": "on" if info["aof_enabled"] else "off"} if "aof_enabled" in info else {}
    return Server(server_version(info), round_trip, facts, {"entry": call / entries})


def _script_entries(payload_bytes: int) -> int:
    return max(1, min(SCRIPT_ENTRIES, SCRIPT_BYTES // payload_bytes))


def _info(site: Site) -> dict[str, Any]:
    """Return what INFO says; nothing where we have no right to ask."""
    try:
        return dict(site.redis.info())
    except redis.ResponseError:
        return {}


# -- a relay between them --------------------------------------------------------------------------


@contextmanager
def _running(relay: Relay) -> Iterator[ThreadPoolExecutor]:
    """Give the relay a thread; at the end it is stopped, and waited for."""
    with closing(relay), ThreadPoolExecutor(1) as thread:
        try:
            yield thread
        finally:
            relay.stop.set()


def _drain_backlogs(site: Site, events: int, payload_bytes: int, say: Say) -> list[Round]:
    relay, end = Relay(site.settings), time.monotonic() + ENOUGH_SECONDS
    done: list[Round] = []
    with _running(relay) as thread:
        relay.check()
        _fill(site, min(WARM_UP_EVENTS, events), payload_bytes, partial(_tell, say, "a first few events"))
        thread.submit(relay.drain, PATIENCE_SECONDS).result()
        while len(done) < ROUNDS and (not done or time.monotonic() < end):
            tell = partial(_tell, say, f"round {len(done) + 1} of {ROUNDS}")
            _fill(site, events, payload_bytes, tell)
            done.append(_drain(site, relay, thread, events, tell))
    return done


def _tell(say: Say, what: str, done: str, events: int) -> None:
    say(f"{what}: {events:,} events {done} ...")


def _fill(site: Site, events: int, payload_bytes: int, tell: Tell) -> None:
    """Record a backlog, with nothing left of the one before it in the lanes."""
    for lane in site.lanes:
        while site.redis.xtrim(lane, maxlen=0, approximate=True):
            pass  # a few thousand are dropped at once, so that nobody waits long for it
    for first in range(1, events + 1, FILL_EVENTS):
        tell("recorded", first - 1)
        last = min(events, first + FILL_EVENTS - 1)
        site.run(FILL, {"stream": site.stream, "first": first, "last": last, "bytes": payload_bytes})
    site.run("VACUUM (ANALYZE) {schema}.outbox")


def _drain(site: Site, relay: Relay, thread: ThreadPoolExecutor, events: int, tell: Tell) -> Round:
    """Have the relay drain the backlog, and look at both servers and at ourselves meanwhile."""
    published, batch = relay.published, _batch(site)
    before, moments = _used(site), Counter[str | None]()
    own, python = time.thread_time(), time.process_time()
    job = thread.submit(_timed, relay)
    while True:
        moment = _moment(site)
        if job.done():
            break
        moments[moment] += 1
        tell("published", relay.published - published)
    python = time.process_time() - python - (time.thread_time() - own)
    seconds, after, done = job.result(), _used(site), relay.published - published
    if done != events:
        raise OutboxError(f"of {events} events only {done} were published, and no rate can be told of that")
    return Round(
        events=done,
        batches=_batch(site) - batch,
        seconds=seconds,
        python=python,
        redis=None if before.redis is None or after.redis is None else after.redis - before.redis,
        machine=_share(before.machine, after.machine),
        moments=moments,
    )


def _timed(relay: Relay) -> float:
    started = time.perf_counter()
    relay.drain(PATIENCE_SECONDS)
    return time.perf_counter() - started


def _moment(site: Site) -> str | None:
    cursor = site.run(MOMENT)
    cursor.nextset()
    row = cursor.fetchone()
    return row[0] if row else None


def _batch(site: Site) -> int:
    row = site.run("SELECT batch FROM {schema}.outbox_relay WHERE partition = 0").fetchone()
    return int(row[0]) if row else 0


class Used(NamedTuple):
    """CPU until now: of Redis, in seconds, and of this machine, as (in use, all); None where nobody tells."""

    redis: float | None
    machine: tuple[float, float] | None


def _used(site: Site) -> Used:
    info, stat = _info(site), Path("/proc/stat")
    thread = [
        info.get(f"used_cpu_{kind}_main_thread", info.get(f"used_cpu_{kind}")) for kind in ("user", "sys")
    ]
    machine = None
    if stat.exists():
        times = [float(ticks) for ticks in stat.read_text().split("\n", 1)[0].split()[1:9]]
        machine = (sum(times) - times[3] - times[4], sum(times))  # those two are idle
    return Used(None if None in thread else sum(float(seconds or 0) for seconds in thread), machine)


def _share(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _commit_singly(site: Site, say: Say) -> list[float]:
    """Commit one event after the other beside an idle relay; return how long each took to a reader, sorted."""
    relay, taken = Relay(site.settings), []
    lane = site.settings.lane_rule().lane(site.stream, 0)
    last = site.redis.xinfo_stream(lane)["last-generated-id"]
    with _running(relay) as thread:
        relay.check()
        job = thread.submit(relay.run)
        for number in range(SINGLE_COMMITS + 1):
            say(f"single commits: {number} of {SINGLE_COMMITS}")
            site.run(SINGLE, (site.stream,))
            committed = time.perf_counter()
            last = _next_entry(site, lane, last, job)
            taken.append(time.perf_counter() - committed)
            time.sleep(PAUSE_SECONDS)
    return sorted(taken[1:])  # with the first, the relay has connected


def _next_entry(site: Site, lane: str, last: bytes, job: Future[None]) -> bytes:
    """Return the id of the next entry. Raises what has ended the relay, or OutboxError if nothing comes."""
    found: Any = site.redis.xread({lane: last}, count=1, block=PATIENCE_SECONDS * 1000)
    if found:
        return bytes(found[0][1][0][0])
    if job.done():
        job.result()
    raise OutboxError(f"an event that was committed was not published within {PATIENCE_SECONDS} s")
