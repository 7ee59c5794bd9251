"""The command `status`: what waits, what was lost, who leads and who reads, of both servers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from outbox.command import DATABASE, REDIS, failure, open_store, with_settings
from outbox.errors import RedisUnavailable, Unavailable
from outbox.groups import DEAD
from outbox.loop import Stop, stop_on_signals
from outbox.report import Columns, Report, counted, server_version, shown, to_json
from outbox.settings import Settings, redact
from outbox.streams import Streams, memory_used

LANE_SETTINGS = ("lanes", "threshold", "backfill_suffix", "lane_max_entries", "redis_memory_percent")
WATCH_SECONDS = 2.0
LEADER = ("batch", "leader", "led_at", "asleep", "streams_lost", "batches_lost")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.option("--watch", is_flag=True, help="show it again every 2 s, until Ctrl-C")
@with_settings(*DATABASE, *REDIS, *LANE_SETTINGS)
def status(config: Settings, as_json: bool, watch: bool) -> None:
    """Show what waits, what was lost, who leads and who reads.

    Reads the pending events once, which takes about 0.3 s for a million of them. Without Redis
    it shows PostgreSQL's half and exits with 3.

    \b
    Keys of --json:
      pending, scheduled, retrying, dead  numbers of events
      oldest_seconds                      age of the oldest that is due, or null
      priorities                          [{priority, lane, pending, scheduled,
                                            retrying, oldest_seconds}]
      lanes                               {name: {entries, pending, dead_letters,
                                            groups, waits}}; pending is in
                                          PostgreSQL, the rest in Redis: null
                                          where unknown; waits: nothing more is
                                          published until Redis has room
      ... groups                          [{name, consumers, lag, pending,
                                            oldest_seconds}]; lag was not given
                                          to a consumer yet, pending was and is
                                          not finished; oldest is of both; []
                                          where no group reads the lane
      batch, leader, led_at, asleep       the last batch, and who published it;
                                          asleep: the relay sleeps, and the
                                          next insert notifies it
      streams_lost, batches_lost          what Redis has lost until now
      journal                             {batches, bytes, oldest_seconds};
                                          bytes of disk
      redis                               {version, batch, memory_used, error};
                                          memory_used of maxmemory, 0 to 1

    \b
    Examples:
      outbox-relay status --watch
      outbox-relay status --json | jq .pending
    """
    if watch:
        _watch(config, as_json)
        return
    state = read_status(config)
    if as_json:
        click.echo(to_json(state))
    else:
        status_report(state).show()
    if error := state["redis"]["error"]:
        raise failure(RedisUnavailable(error))


def _watch(config: Settings, as_json: bool) -> None:
    stop = Stop()
    redraw = sys.stdout.isatty() and not as_json
    live = Live(console=Console(), auto_refresh=False) if redraw else None
    with stop_on_signals(stop), live or nullcontext():
        while not stop.is_set():
            started = time.monotonic()
            _look(config, as_json, live)
            # At most a tenth of the time, so that watching a large backlog is no load.
            stop.wait(max(WATCH_SECONDS, 9 * (time.monotonic() - started)))


def _look(config: Settings, as_json: bool, live: Live | None) -> None:
    """Show the status once; that a server is down is what there is to see then."""
    try:
        state = read_status(config)
        report = status_report(state)
    except Unavailable as error:
        state = {"error": failure(error).message}
        report = Report(state)
    if live:
        live.update(report.rich(), refresh=True)
    elif as_json:
        click.echo(to_json(state, indent=None))
    else:
        report.show()
        click.echo()


def read_status(config: Settings) -> dict[str, Any]:
    """Return what `status --json` prints; without Redis, its half is null and `error` says why."""
    with open_store(config) as store:
        leader, waiting = store.status(), store.pending()
    rule = config.lane_rule()
    for row in waiting:
        row["lane"] = rule.lane(row.pop("stream"), row["priority"])
    redis, lanes = _read_redis(config, leader["outbox_id"], {row["lane"] for row in waiting})
    return {
        **{name: sum(row[name] for row in waiting) for name in ("pending", "scheduled", "retrying")},
        "dead": leader["dead"],
        "oldest_seconds": max(filter(None, (row["oldest_seconds"] for row in waiting)), default=None),
        "priorities": waiting,
        "lanes": {
            lane: {
                "entries": None,
                "pending": sum(row["pending"] for row in waiting if row["lane"] == lane),
                "dead_letters": None,
                "groups": None,
                "waits": None,
            }
            | lanes.get(lane, {})
            for lane in sorted({*lanes, *(row["lane"] for row in waiting)})
        },
        **{name: leader[name] for name in LEADER},
        "journal": {
            "batches": leader["batches"],
            "bytes": leader["bytes"],
            "oldest_seconds": leader["journal_age"],
        },
        "redis": redis,
    }


def _read_redis(
    config: Settings, outbox_id: str, lanes: Iterable[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what Redis says of itself and of the lanes, those included that it alone knows."""
    with closing(Streams(config.redis_url, prefix=config.redis_prefix)) as streams:
        try:
            batch, known = streams.state(outbox_id)
            found = {lane: _read_lane(streams, lane) for lane in sorted({*lanes, *known})}
            info = streams.server()
        except RedisUnavailable as error:
            return {"version": None, "batch": None, "memory_used": None, "error": redact(str(error))}, {}
    used, rule = memory_used(info), config.lane_rule()
    entries = {lane: facts["entries"] for lane, facts in found.items()}
    pause = rule.pause(entries, config.lane_max_entries, used, config.redis_memory_percent / 100)
    for lane, facts in found.items():
        facts["waits"] = rule.waits(lane, pause)
    return {"version": server_version(info), "batch": batch, "memory_used": used, "error": None}, found


def _read_lane(streams: Streams, lane: str) -> dict[str, Any]:
    lengths = streams.lengths([lane, lane + DEAD])
    return {
        "entries": lengths[lane],
        "dead_letters": lengths[lane + DEAD],
        "groups": streams.groups(lane),
    }


def status_report(state: dict[str, Any]) -> Report:
    """Return a status for people."""
    journal, redis = state["journal"], state["redis"]
    facts = {name: state[name] for name in ("pending", "scheduled", "retrying", "dead")}
    facts |= {
        "oldest": _age(state["oldest_seconds"]),
        "batch": state["batch"],
        "leader": f"{state['leader'] or 'none yet'}, last led {shown(state['led_at'])}",
        "asleep": "yes" if state["asleep"] else "no",
        "streams_lost": state["streams_lost"],
        "batches_lost": state["batches_lost"],
        "journal": f"{counted(journal['batches'], 'batch')}, {journal['bytes']} bytes, "
        f"oldest {_age(journal['oldest_seconds'])}",
        "redis": redis["error"] or f"{redis['version'] or 'version unknown'}, batch {redis['batch']}",
    }
    waiting = Columns(
        "Pending, by priority",
        ("priority", "lane", "pending", "scheduled", "retrying", "oldest"),
        [
            (*(row[name] for name in ("priority", "lane", "pending", "scheduled", "retrying")),
             _age(row["oldest_seconds"]))
            for row in state["priorities"]
        ],
    )  # fmt: skip
    lanes = Columns(
        "Lanes in Redis",
        ("lane", "entries", "pending", "dead_letters", "read_by"),
        [
            (name, lane["entries"], lane["pending"], lane["dead_letters"], _readers(lane))
            for name, lane in state["lanes"].items()
        ],
    )
    groups = Columns(
        "Consumer groups",
        ("lane", "group", "consumers", "lag", "pending", "oldest"),
        [
            (name, *(group[key] for key in ("name", "consumers", "lag", "pending")),
             _age(group["oldest_seconds"]))
            for name, lane in state["lanes"].items()
            for group in lane["groups"] or ()
        ],
    )  # fmt: skip
    return Report(facts, [table for table in (waiting, lanes, groups) if table.rows])


def _readers(lane: dict[str, Any]) -> str | None:
    if lane["waits"]:
        return "it is full: events wait"
    if lane["groups"]:
        return ", ".join(group["name"] for group in lane["groups"])
    return "no group reads it" if lane["groups"] == [] and lane["entries"] else None


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{max(0.0, seconds):.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min" if minutes < 120 else f"{hours} h" if hours < 48 else f"{hours // 24} d"
