"""The command `bench`: what a relay does on the user's own servers, and what bounds it there."""

from __future__ import annotations

import shutil
import textwrap
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from outbox.command import Failed, need_database, with_settings
from outbox.loop import signals_handled_by
from outbox.report import Columns, Report, counted, progress, start_logging, to_json
from outbox.settings import Settings

if TYPE_CHECKING:
    from outbox.measure import Findings, Shares

HANGS_SECONDS = 5  # after a signal; then another one ends the stage, too
MOST_BYTES = 2**29  # of payload, in a backlog
MEASURED = ("database_url", "redis_url", "redis_prefix", "batch_size")


@click.command(short_help="Measure the relay on your servers, and say what bounds it.")
@click.option("--events", type=click.IntRange(1000, 1_000_000), default=20_000, metavar="N",
              help="events in the backlog of each round  [default: 20000]")  # fmt: skip
@click.option("--bytes", "payload_bytes", type=click.IntRange(40, 65_536), default=300, metavar="N",
              help="bytes of payload of each event  [default: 300]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@with_settings(*MEASURED)
def bench(config: Settings, events: int, payload_bytes: int, as_json: bool) -> None:
    """Measure the relay on your own servers, and say what bounds it there.

    Takes about half a minute: round trips, commits, up to five backlogs that a relay drains, and
    single events on an idle relay. It makes a schema outbox_bench_... and keys that begin with
    <redis prefix>:outbox_bench_..., and touches nothing else. Both are removed when it ends, by an
    error or a signal, too; only a kill -9 leaves them.

    The role needs the right to make a schema. Run it where the relay is to run, and know that it is
    a load: by default PostgreSQL writes some 130 MB of log, and Redis holds some 10 MB. Whatever
    else uses the servers is slower meanwhile, and counts in the figures.

    \b
    Keys of --json:
      postgresql          {version, round_trip_ms, commit_ms, fsync,
                          synchronous_commit}; commit_ms is of one row
      redis               {version, round_trip_ms, entries_per_second,
                          appendonly}; entries are added by a script
      relay               {events, payload_bytes, events_per_second, rounds,
                          batches, batch_ms}; rounds has the rate of each
      latency             {events, p50_ms, p99_ms, max_ms}, from commit to a
                          reader of the stream, on an idle relay
      shares              of the relay's time, 0 to 1, or null where unknown:
                          {postgresql, commit, redis, python, between}; they
                          overlap if the relay does two things at once
      machine_cpu         share of this machine's CPUs in use, 0 to 1, or null
      moments             how often PostgreSQL was looked at for the shares
      bound, verdict      the largest share, and what that means

    \b
    Examples:
      outbox-relay bench --database-url postgresql://shop@db.internal/shop
      outbox-relay bench --events 100000 --bytes 2000 --json
    """
    # Inside, because no other command needs it.
    from outbox.measure import measure

    if events * payload_bytes > MOST_BYTES:
        raise click.UsageError(f"--events times --bytes: at most {MOST_BYTES} bytes of payload are allowed.")
    need_database(config)
    start_logging(config.log_level, config.log_format)
    stage = _Stage()
    with signals_handled_by(stage.on_signal, hangup=True), progress(lambda: stage.text):
        try:
            found = measure(config, events, payload_bytes, stage.say)
        except KeyboardInterrupt as error:
            raise stage.interrupted() from error
    state = summary(found)
    if as_json:
        click.echo(to_json(state))
    else:
        report(state).show()
        width = min(100, shutil.get_terminal_size().columns)
        click.echo("\n" + textwrap.fill(state["verdict"], width))


class _Stage:
    """What is being measured. A signal ends that between two stages, where nothing is half done."""

    def __init__(self) -> None:
        self.text = "..."
        self._signal, self._deadline = 0, 0.0

    def say(self, text: str) -> None:
        """Enter a stage. Raises Failed after a signal."""
        if self._signal:
            raise self.interrupted()
        self.text = text

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask for the end. Raises KeyboardInterrupt where the last signal has not brought it for a while."""
        again, now = bool(self._signal), time.monotonic()
        if again and now < self._deadline:
            return
        self._signal, self._deadline = number, now + HANGS_SECONDS
        if again:
            raise KeyboardInterrupt

    def interrupted(self) -> Failed:
        return Failed("interrupted; the schema and the keys are removed", 128 + self._signal)


# -- what is shown ---------------------------------------------------------------------------------

SPENT = {
    "postgresql": "PostgreSQL works on statements",
    "commit": "a commit waits for PostgreSQL's disk",
    "redis": "Redis uses its CPU",
    "python": "Python computes",
    "between": "none of them: the network, waiting",
}
WHO = {
    "postgresql": "PostgreSQL",
    "redis": "Redis",
    "python": "Python",
    "between": "the way between them",
}
CROWDED = 0.9  # of the CPUs of this machine


def summary(found: Findings) -> dict[str, Any]:
    """Return what `bench --json` prints."""
    postgresql, cache, rounds, shares = found.postgresql, found.redis, found.rounds, found.shares()
    batches = sum(one.batches for one in rounds)
    return {
        "postgresql": {
            "version": postgresql.version,
            "round_trip_ms": _ms(postgresql.round_trip),
            "commit_ms": _ms(postgresql.times["commit"]),
            **postgresql.facts,
        },
        "redis": {
            "version": cache.version,
            "round_trip_ms": _ms(cache.round_trip),
            "entries_per_second": round(1 / cache.times["entry"]),
            **cache.facts,
        },
        "relay": {
            "events": rounds[0].events,
            "payload_bytes": found.payload_bytes,
            "events_per_second": round(found.rate),
            "rounds": [round(rate) for rate in found.rates],
            "batches": batches,
            "batch_ms": _ms(sum(one.seconds for one in rounds) / batches),
        },
        "latency": {
            "events": len(found.latencies),
            "p50_ms": _ms(found.latency(0.5)),
            "p99_ms": _ms(found.latency(0.99)),
            "max_ms": _ms(found.latency(1.0)),
        },
        "shares": {name: _rounded(share) for name, share in shares._asdict().items()},
        "machine_cpu": _rounded(found.machine),
        "moments": found.moments().total(),
        "bound": "machine" if (found.machine or 0) >= CROWDED else shares.bounds()[0][0],
        "verdict": verdict(found),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 3)


def verdict(found: Findings) -> str:
    """Return the sentences that say what bounds the relay, and what rate that allows at most."""
    shares = found.shares()
    (by, share), (following, next_share), *_ = shares.bounds()
    unknown = [WHO[name] for name in ("postgresql", "redis") if getattr(shares, name) is None]
    if (found.machine or 0) >= CROWDED:
        return (
            f"This machine bounds it, or hides what does: {_percent(found.machine)} of its CPUs were in use, whoever "
            "for, and the shares include the wait for one. Measure again while nothing else runs here."
        )
    if by == "between" and unknown:
        return (
            f"What bounds it cannot be told: {_percent(share)} of the time are left, "
            f"and {' and '.join(unknown)} may not be asked."
        )
    return (
        f"{WHO[by][0].upper()}{WHO[by][1:]} bounds it: {_because(by, share, shares, found)}. "
        f"Next is {WHO[following]}, with {_percent(next_share)}. "
        f"Whatever else is made faster, that allows {found.rate / share:,.0f} events/s at most."
    )


def _because(by: str, share: float, shares: Shares, found: Findings) -> str:
    often = f"{_percent(share)} of the time"
    match by:
        case "postgresql":
            return f"it is at work for the relay {often}, {_percent(shares.commit)} at its disk for commits"
        case "redis":
            return f"its thread is busy {often}, whoever for"
        case "python":
            return f"the relay's process computes {often}"
    to_postgresql, to_redis = found.postgresql.round_trip * 1000, found.redis.round_trip * 1000
    return (
        f"at least {often} neither server nor Python works; a round trip to PostgreSQL takes {to_postgresql:.2f} ms, "
        f"one to Redis {to_redis:.2f} ms"
    )


def report(state: dict[str, Any]) -> Report:
    """Return for people what `bench --json` prints, but for the verdict."""
    postgresql, cache, relay, latency = (state[name] for name in ("postgresql", "redis", "relay", "latency"))
    rate, size, rounds = relay["events_per_second"], relay["payload_bytes"], relay["rounds"]
    set_up = f"fsync {postgresql['fsync']}, synchronous_commit {postgresql['synchronous_commit']}"
    facts = {
        "database": f"{postgresql['version']}, round trip {postgresql['round_trip_ms']:.2f} ms, "
        f"commit {postgresql['commit_ms']:.2f} ms ({set_up})",
        "redis": f"{cache['version'] or 'version unknown'}, round trip {cache['round_trip_ms']:.2f} ms, "
        f"{cache['entries_per_second']:,} entries/s (appendonly {cache.get('appendonly', 'unknown')})",
        "relay": f"{rate:,} events/s, {min(rounds):,} to {max(rounds):,} "
        f"({counted(len(rounds), 'round')} of {relay['events']:,} events of {size} bytes)",
        "batch": f"{relay['events'] * len(rounds) / relay['batches']:,.0f} events in {relay['batch_ms']:.1f} ms",
        "latency": f"p50 {latency['p50_ms']:.1f} ms, p99 {latency['p99_ms']:.1f} ms, max {latency['max_ms']:.1f} ms "
        f"({latency['events']} single commits, to a reader)",
    }
    if state["machine_cpu"] is not None:
        facts["machine"] = f"{_percent(state['machine_cpu'])} of its CPUs in use"
    rows = [
        (SPENT[name], _percent(share), f"{rate / share:,.0f}" if share else None)
        for name, share in state["shares"].items()
    ]
    return Report(
        facts,
        [Columns("Where the relay's time goes", ("what takes its time", "share", "most events/s"), rows)],
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"
