"""The command line, `outbox-relay`: settings, logs, tables and exit codes round the relay.

| exit code | what it means |
|---|---|
| 0 | done; `run` and `status --watch` also after a first SIGTERM or Ctrl-C |
| 1 | anything else: an unknown event id, a bug; `--debug` shows the traceback |
| 2 | a setting or an argument is wrong; the message names it |
| 3 | a server cannot be reached, or cannot do its work (`run` goes on trying, but for `--once`) |
| 4 | the tables are missing or older than this package: `outbox-relay migrate` makes them |
| 5 | a server must not be used: a read-only PostgreSQL, a Redis that evicts streams |
| 128+n | signal n ended it: the second one of `run`, the first one of the others |
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
import logging
import os
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from typing import Any
from uuid import UUID

import click
from rich.console import Console
from rich.live import Live

from outbox import grants, settings
from outbox.errors import (
    DatabaseUnavailable,
    InvalidSetting,
    NotMigrated,
    OutboxError,
    RedisUnavailable,
    Unavailable,
    Unsuitable,
    first_line,
)
from outbox.loop import Backoff, Stop, stop_on_signals
from outbox.relay import Relay
from outbox.report import Columns, Report, counted, printable, progress, shown, start_logging, to_json
from outbox.settings import Settings, is_local, redact, safe_url
from outbox.store import APPLICATION, Store, database_in_clear
from outbox.streams import Streams, redis_in_clear

log = logging.getLogger("outbox.cli")

CONNECTION = ("database_url", "redis_url", "schema", "redis_prefix")
WATCH_SECONDS = 2.0
DEBUG = "outbox.debug"  # in click's meta: whether tracebacks are wanted
EPILOG = """\b
Exit codes:
  0      done; after a first SIGTERM or Ctrl-C of `run`, too
  1      anything else; --debug shows the traceback
  2      a setting or an argument is wrong; the message names it
  3      a server cannot be reached, or cannot do its work
  4      tables are missing: outbox-relay migrate
  5      a server must not be used: read-only, or a Redis that evicts streams
  128+n  signal n ended it: the second one of `run`, the first one elsewhere

Every setting is also an OUTBOX_ variable (OUTBOX_DATABASE_URL) and a key of the TOML file
that --config or OUTBOX_CONFIG names. Flags come before variables, variables before the file.
"""

# -- errors and exit codes -------------------------------------------------------------------------


class Failed(Exception):
    """Raised to end the command with one sentence and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message, self.exit_code = message, exit_code


EXITS: tuple[tuple[type[OutboxError], int, str], ...] = (  # the first that fits
    (InvalidSetting, 2, ""),
    (NotMigrated, 4, ""),
    (Unsuitable, 5, ""),
    (DatabaseUnavailable, 3, "Check that PostgreSQL is up and OUTBOX_DATABASE_URL is right."),
    (RedisUnavailable, 3, "Check that Redis is up and OUTBOX_REDIS_URL is right."),
    (Unavailable, 3, ""),
)


def failure(error: BaseException) -> Failed:
    """Return what the user sees of an error."""
    if isinstance(error, Failed):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Failed("interrupted", 128 + signal.SIGINT)
    for kind, exit_code, advice in EXITS:
        if isinstance(error, kind):
            return Failed(f"{str(error).rstrip('.')}. {advice}".strip(), exit_code)
    if isinstance(error, OutboxError):
        return Failed(str(error), 1)
    return Failed(f"{type(error).__name__}: {first_line(error)} (--debug shows where)", 1)


class Commands(click.Group):
    """The commands, whose errors become one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except click.UsageError as error:
            raise click.UsageError(redact(error.format_message()), error.ctx) from None
        except (click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            # What is still buffered has no reader: Python would complain of it when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(128 + signal.SIGPIPE)
        except (Exception, KeyboardInterrupt) as error:
            if ctx.meta.get(DEBUG):
                click.echo(redact("".join(traceback.format_exception(error))), err=True, nl=False)
            failed = failure(error)
            click.echo(f"Error: {redact(failed.message)}", err=True)
            ctx.exit(failed.exit_code)


# -- settings as options ---------------------------------------------------------------------------


def with_settings(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command options for these settings, `--config` and `--debug`; it gets the Settings."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(config: str | None, **given: Any) -> Any:
            flags = {name: given.pop(name) for name in names}
            return function(settings.load(flags, config=config), **given)

        wrapped: Callable[..., Any] = command
        wrapped = _config_option(_debug_option(wrapped))
        for name in reversed(names):
            wrapped = _option(name)(wrapped)
        return wrapped

    return decorate


def _option(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    field, kind = settings.FIELDS[name], settings.TYPES[name]
    choices = typing.get_args(kind)
    default = "required" if field.default == "" else f"default: {field.default}"
    metavar = {"url": "URL", "seconds": "SECONDS"}.get(name.rpartition("_")[2])
    return click.option(
        "--" + name.replace("_", "-"),
        name,
        type=click.Choice(choices) if choices else kind,
        metavar=metavar or (None if choices else {int: "N", float: "NUMBER", str: "TEXT"}[kind]),
        help=f"{field.metadata['doc']}  [{default}]",
    )


def _debug(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    ctx.meta[DEBUG] = wanted


_debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_debug, help="show tracebacks"
)
_config_option = click.option("--config", metavar="FILE", help="TOML file with settings")


def _open_store(config: Settings) -> closing[Store]:
    _need_database(config)
    return closing(Store(config.database_url, schema=config.schema))


def _need_database(config: Settings) -> None:
    if not config.database_url:
        raise InvalidSetting(
            "OUTBOX_DATABASE_URL is not set; an example: postgresql://user@127.0.0.1:5432/name"
        )


# -- the commands ----------------------------------------------------------------------------------


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"outbox-relay {version()}")
        ctx.exit()


def version() -> str:
    """Return the version of the installed package."""
    try:
        return importlib.metadata.version("outbox-relay")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version,
    help="Show the version and exit.",
)  # fmt: skip
def cli() -> None:
    """Move events from the outbox in PostgreSQL to the lanes of Redis Streams.

    \b
    Examples:
      export OUTBOX_DATABASE_URL=postgresql://shop@127.0.0.1:5432/shop
      outbox-relay migrate
      outbox-relay run
    """


@cli.command(epilog=EPILOG)
@click.option("--once", is_flag=True, help="publish what is due, then exit")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS",
    help="with --once: how long a server may be unreachable  [default: 30]",
)  # fmt: skip
@with_settings(*settings.FIELDS)
def run(config: Settings, once: bool, timeout: float | None) -> None:
    """Relay events until stopped.

    The first SIGTERM or Ctrl-C finishes the batch in hand and exits with 0, the second exits
    at once. Servers that cannot be reached are tried again until they answer.

    \b
    Examples:
      outbox-relay run
      outbox-relay run --once --timeout 10
      outbox-relay run --config relay.toml --log-format json
    """
    if timeout is not None and not once:
        raise click.UsageError("--timeout needs --once: without it, run never gives up.")
    _need_database(config)
    start_logging(config.log_level, config.log_format)
    relay = Relay(config)
    with stop_on_signals(relay.stop), closing(relay):
        _say_started(config)
        if once:
            _run_once(relay, config, 30.0 if timeout is None else timeout)
        else:
            _await_servers(relay, 0)
            relay.run()
    log.info("", extra={"action": "relay_stopped", "fields": {"published": relay.published}})


def _say_started(config: Settings) -> None:
    fields = {
        "version": version(),
        "database": safe_url(config.database_url),
        "redis": safe_url(config.redis_url),
        **{name: getattr(config, name) for name in ("schema", "lanes", "threshold", "batch_size")},
    }
    log.info("", extra={"action": "relay_started", "fields": fields})
    _warn_of_clear_text("database_url", database_in_clear(config.database_url), "sslmode=verify-full")
    _warn_of_clear_text("redis_url", redis_in_clear(config.redis_url), "rediss://")


def _warn_of_clear_text(name: str, hosts: Iterable[str], cure: str) -> None:
    if beyond := [host for host in hosts if not is_local(host)]:
        log.warning(
            "%s: passwords and events may go to %s in clear text; %s encrypts them",
            name, ", ".join(beyond), cure, extra={"action": "clear_text"},
        )  # fmt: skip


def _await_servers(relay: Relay, seconds: float) -> Unavailable | None:
    """Refuse servers that must not be used; return what is still wrong with others after a while.

    Raises Unsuitable or NotMigrated.
    """
    pauses, deadline = Backoff(0.1, 2.0), time.monotonic() + seconds
    while not relay.stop.is_set():
        try:
            relay.check()
            break
        except Unsuitable:
            raise
        except Unavailable as error:
            log.warning("%s; trying until it answers", error, extra={"action": "relay_waits"})
            if time.monotonic() >= deadline:
                return error
            relay.stop.wait(min(pauses.next(), deadline - time.monotonic()))
    return None


def _run_once(relay: Relay, config: Settings, timeout: float) -> None:
    try:
        if error := _await_servers(relay, timeout):
            raise error
        with progress(lambda: f"{counted(relay.published, 'event')} published ..."):
            relay.drain(timeout)
    except Unsuitable:
        raise
    except Unavailable as error:
        failed = failure(error)
        done = f"Gave up after {timeout:g} s, with {counted(relay.published, 'event')} published."
        raise Failed(f"{failed.message} {done}", failed.exit_code) from error
    click.echo(f"published {counted(relay.published, 'event')}")
    if relay.stop.is_set():
        click.echo(f"stopped by a signal: {_left(config)}")


def _left(config: Settings) -> str:
    try:
        with _open_store(config) as store:
            left = sum(row["pending"] for row in store.pending())
    except OutboxError:
        return "how many events still wait is not known"
    return f"{counted(left, 'event')} left undone"


@cli.command("migrate")
@click.option("--sql", is_flag=True, help="print the SQL and touch no database")
@with_settings(*CONNECTION)
def migrate_command(config: Settings, sql: bool) -> None:
    """Create the tables, or bring them up to date.

    May be repeated, and run beside a service's own migrations: it has a version table of its own.

    \b
    Examples:
      outbox-relay migrate --database-url postgresql://shop@127.0.0.1:5432/shop
      outbox-relay migrate --sql > outbox.sql
    """
    # Inside, because a relay that runs for months has no need of alembic in its memory.
    from sqlalchemy.exc import DBAPIError

    from outbox import migrate

    if sql:
        migrate.upgrade("", schema=config.schema, sql_to=sys.stdout)
        return
    _need_database(config)
    if click.get_current_context().meta.get(DEBUG):
        start_logging(config.log_level, config.log_format)
        logging.getLogger("alembic").setLevel(logging.INFO)
    # libpq reads these where the URL says nothing.
    os.environ.setdefault("PGAPPNAME", APPLICATION)
    os.environ.setdefault("PGCONNECT_TIMEOUT", "5")
    try:
        before = migrate.revision_of(config.database_url, schema=config.schema)
        migrate.upgrade(config.database_url, schema=config.schema)
        after = migrate.revision_of(config.database_url, schema=config.schema)
    except DBAPIError as error:
        raise DatabaseUnavailable(f"PostgreSQL: {first_line(error.orig or error)}") from error
    where = f"the schema {printable(config.schema)}"
    if before == after:
        click.echo(f"already at {after}: {where}")
    else:
        click.echo(f"migrated from {before or 'nothing'} to {after}: {where}")


@cli.command("grants", short_help="Print the least rights of each role, as SQL.")
@click.option("--service", metavar="ROLE", help="records events, and can read none")
@click.option("--relay", metavar="ROLE", help="runs the relay; needs no right elsewhere")
@click.option("--reader", metavar="ROLE", help="for status: sees no payload, headers or key")
@click.option("--consumer", metavar="ROLE", help="keeps the inbox of its group")
@click.option("--apply", "wanted", is_flag=True, help="run the SQL, as the owner of the tables")
@click.option("--redis", "for_redis", is_flag=True, help="print users of Redis instead")
@click.option("--stream", "streams", metavar="NAME", multiple=True,
              help="with --redis: the only streams to use; may be repeated")  # fmt: skip
@with_settings(*CONNECTION, "lanes", "backfill_suffix")
def grants_command(
    config: Settings, wanted: bool, for_redis: bool, streams: tuple[str, ...], **given: str | None
) -> None:
    """Print the SQL that gives each role its rights and no more.

    The roles must exist; a role may play several. What is printed takes no right away, and may be
    repeated. With --redis it is a user of Redis for each, whose password you fill in.

    \b
    Examples:
      outbox-relay grants --service shop --relay outbox_relay | psql
      outbox-relay grants --reader dashboards --apply
      outbox-relay grants --redis --relay outbox-relay --stream customer
    """
    roles = {role: name for role, name in given.items() if name}
    if not roles:
        raise click.UsageError("Name a role: --service, --relay, --reader or --consumer.")
    if for_redis:
        if wanted or "service" in roles:
            raise click.UsageError("--redis only prints, and a service needs no Redis.")
        users = grants.redis_users(
            roles, prefix=config.redis_prefix, streams=streams, rule=config.lane_rule()
        )
        click.echo("\n".join(users))
        return
    given_rights = list(grants.statements(roles, schema=config.schema))
    if wanted:
        _need_database(config)
        grants.apply(config.database_url, given_rights)
    click.echo("\n".join(f"{statement.as_string()};" for statement in given_rights))


@cli.command()
@with_settings(*CONNECTION, "journal_retention_seconds")
def prune(config: Settings) -> None:
    """Purge journal batches that are older than the retention.

    A running relay does it by itself; this is for a database whose relay has been off.

    \b
    Example:
      outbox-relay prune
    """
    purged = 0
    with _open_store(config) as store, progress(lambda: f"{counted(purged, 'batch')} purged ..."):
        while some := store.purge(config.journal_retention_seconds):
            purged += some
    age = f"{config.journal_retention_seconds:g} s"
    click.echo(f"purged {counted(purged, 'batch')} of the journal, older than {age}")


@cli.command(short_help="Show the outbox at work, on servers of its own.")
def demo() -> None:
    """Show the outbox at work, on servers of its own that are gone afterwards.

    Imports the airports of the world under low priority while bookings and alerts keep coming,
    kills the relay halfway, and shows what arrived, how late, and the same without lanes.

    \b
    Example:
      outbox-relay demo
    """
    try:
        # Inside, because the demo needs extra packages, which no relay in production has.
        from outbox import demo as show
    except ImportError as error:
        raise Failed(
            f"the demo needs the package {error.name}; install its extras: pip install 'outbox-relay[demo]'",
            1,
        ) from error
    click.get_current_context().exit(show.run(Console()))


# -- status ----------------------------------------------------------------------------------------


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.option("--watch", is_flag=True, help="show it again every 2 s, until Ctrl-C")
@with_settings(*CONNECTION, "lanes", "threshold", "backfill_suffix")
def status(config: Settings, as_json: bool, watch: bool) -> None:
    """Show what waits, what was lost, and who leads.

    Reads the pending events once, which takes about 0.3 s for a million of them. Without Redis
    it shows PostgreSQL's half and exits with 3.

    \b
    Keys of --json:
      pending, scheduled, retrying, dead  numbers of events
      oldest_seconds                      age of the oldest that is due, or null
      priorities                          [{priority, lane, pending, scheduled,
                                            retrying, oldest_seconds}]
      lanes                               {name: {entries, pending}}; entries is
                                          null where Redis has another type
      batch, leader, led_at, asleep       the last batch, and who published it
      streams_lost, batches_lost          what Redis has lost until now
      journal                             {batches, bytes, oldest_seconds};
                                          bytes of disk
      redis                               {version, batch, error}

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
    with _open_store(config) as store:
        leader, waiting = store.status(), store.pending()
    rule = config.lane_rule()
    for row in waiting:
        row["lane"] = rule.lane(row.pop("stream"), row["priority"])
    redis, entries = _read_redis(config, leader["outbox_id"], {row["lane"] for row in waiting})
    return {
        **{name: sum(row[name] for row in waiting) for name in ("pending", "scheduled", "retrying")},
        "dead": leader["dead"],
        "oldest_seconds": max(filter(None, (row["oldest_seconds"] for row in waiting)), default=None),
        "priorities": waiting,
        "lanes": {
            lane: {
                "entries": entries.get(lane),
                "pending": sum(row["pending"] for row in waiting if row["lane"] == lane),
            }
            for lane in sorted({*entries, *(row["lane"] for row in waiting)})
        },
        **{name: leader[name] for name in LEADER},
        "journal": {
            "batches": leader["batches"],
            "bytes": leader["bytes"],
            "oldest_seconds": leader["journal_age"],
        },
        "redis": redis,
    }


LEADER = ("batch", "leader", "led_at", "asleep", "streams_lost", "batches_lost")


def _read_redis(
    config: Settings, outbox_id: str, lanes: Iterable[str]
) -> tuple[dict[str, Any], dict[str, int | None]]:
    """Return what Redis says of itself and of the lanes, those included that it alone knows."""
    with closing(Streams(config.redis_url, prefix=config.redis_prefix)) as streams:
        try:
            batch, known = streams.state(outbox_id)
            entries = streams.lengths(sorted({*lanes, *known}))
            version = _version_of(streams.server())
            return {"version": version, "batch": batch, "error": None}, entries
        except RedisUnavailable as error:
            return {"version": None, "batch": None, "error": redact(str(error))}, {}


def _version_of(info: dict[str, Any]) -> str | None:
    """Return name and version of the server; None where INFO is not for us."""
    name = info.get("server_name", "redis")
    number = info.get(f"{name}_version", info.get("redis_version"))
    return f"{name} {number}" if number else None


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
        ("lane", "entries", "pending"),
        [(name, lane["entries"], lane["pending"]) for name, lane in state["lanes"].items()],
    )
    return Report(facts, [table for table in (waiting, lanes) if table.rows])


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{max(0.0, seconds):.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min" if minutes < 120 else f"{hours} h" if hours < 48 else f"{hours // 24} d"


# -- dead letters ----------------------------------------------------------------------------------

EVENT_IDS = click.argument("event_ids", type=click.UUID, nargs=-1, metavar="[EVENT_ID]...")
ALL = click.option("--all", "everything", is_flag=True, help="all dead letters")


@cli.group()
def dead() -> None:
    """List, show, retry or drop what Redis refuses.

    \b
    Examples:
      outbox-relay dead list
      outbox-relay dead retry --all
    """


@dead.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N",
              help="most to list; the newest come first")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print JSON: a list of objects")
@with_settings(*CONNECTION)
def dead_list(config: Settings, limit: int, as_json: bool) -> None:
    """List dead letters, the newest first, and why they died.

    \b
    Examples:
      outbox-relay dead list --limit 20
      outbox-relay dead list --json | jq -r '.[].event_id'
    """
    with _open_store(config) as store:
        rows = store.dead_list(limit)
    if as_json:
        click.echo(to_json(rows))
    elif rows:
        names = ("event_id", "stream", "type", "key", "reason")
        table = Columns("Dead letters", names, [[row[name] for name in names] for row in rows])
        Report({}, [table]).show()
    else:
        click.echo("no dead letters")


@dead.command("show")
@click.argument("event_id", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="print JSON: an object")
@with_settings(*CONNECTION)
def dead_show(config: Settings, event_id: UUID, as_json: bool) -> None:
    """Show a dead letter with its payload, headers and reason.

    \b
    Examples:
      outbox-relay dead show 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
      outbox-relay dead show --json 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
    """
    with _open_store(config) as store:
        row = store.dead_show(event_id)
    if row is None:
        raise Failed(_no_such([event_id]), 1)
    if not as_json:
        Report({name: shown(value) for name, value in row.items()}).show()
        return
    # Spliced in as they were recorded: a parser would change the numbers.
    payload, headers = row.pop("payload"), row.pop("headers") or "null"
    fields = to_json(row).removesuffix("\n}")
    click.echo(f'{fields},\n  "payload": {payload},\n  "headers": {headers}\n}}')


@dead.command("retry")
@EVENT_IDS
@ALL
@with_settings(*CONNECTION)
def dead_retry(config: Settings, event_ids: tuple[UUID, ...], everything: bool) -> None:
    """Move dead letters back to the outbox, as if new.

    They come behind what was recorded meanwhile under their key and priority, if that has been
    published already.

    \b
    Examples:
      outbox-relay dead retry 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
      outbox-relay dead retry --all
    """
    wanted = _wanted(event_ids, everything)
    with _open_store(config) as store:
        _say_done("moved back to the outbox", wanted, store.dead_retry(wanted))


@dead.command("drop")
@EVENT_IDS
@ALL
@click.option("--yes", is_flag=True, help="do not ask; needed where nobody can answer")
@with_settings(*CONNECTION)
def dead_drop(config: Settings, event_ids: tuple[UUID, ...], everything: bool, yes: bool) -> None:
    """Delete dead letters for good. Nobody will get these events.

    \b
    Examples:
      outbox-relay dead drop 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
      outbox-relay dead drop --all --yes
    """
    wanted = _wanted(event_ids, everything)
    _need_database(config)
    if not yes:
        _confirm_drop(wanted)
    with _open_store(config) as store:
        _say_done("dropped", wanted, store.dead_drop(wanted))


def _wanted(event_ids: tuple[UUID, ...], everything: bool) -> list[UUID] | None:
    """Return the ids that were asked for; None: all."""
    if bool(event_ids) == everything:
        raise click.UsageError("Give event ids, or --all.")
    return None if everything else list(dict.fromkeys(event_ids))


def _confirm_drop(wanted: list[UUID] | None) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("Nobody can be asked here: add --yes to drop them for good.")
    what = "all dead letters" if wanted is None else counted(len(wanted), "dead letter")
    click.confirm(f"Drop {what} for good?", abort=True)


def _say_done(what: str, wanted: list[UUID] | None, done: list[UUID]) -> None:
    click.echo(f"{what}: {counted(len(done), 'dead letter')}")
    if missing := [event_id for event_id in wanted or () if event_id not in done]:
        raise Failed(_no_such(missing), 1)


def _no_such(event_ids: Sequence[UUID]) -> str:
    return f"there is no dead letter with the id {', '.join(map(str, event_ids))}"


# -- the process -----------------------------------------------------------------------------------


def main() -> None:
    """Run the command line and exit."""
    _hide_passwords()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="outbox-relay")


def _hide_passwords() -> None:
    """Start this process again with its URLs in the environment, if their passwords are in its
    arguments: those are there for every user of the machine to read."""
    kept, urls = _take_urls(sys.argv[1:])
    if all(safe_url(url) == url for url in urls.values()):
        return
    interpreter = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    os.execve(sys.executable, [*interpreter, *kept], os.environ | urls)


def _take_urls(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part the flags of URLs, as variables, from the other arguments."""
    kept: list[str] = []
    urls: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if argument == "--":
            kept += [argument, *rest]
        elif flag not in ("--database-url", "--redis-url"):
            kept.append(argument)
        elif equals or (value := next(rest, "")):
            urls[settings.PREFIX + flag[2:].replace("-", "_").upper()] = value
        else:
            kept.append(argument)
    return kept, urls


if __name__ == "__main__":
    main()
