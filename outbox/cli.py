"""The command line, `outbox-relay`: settings, logs, tables and exit codes round the relay.

| exit code | what it means |
|---|---|
| 0 | done; `run`, `consume` and `status --watch` also after a first SIGTERM or Ctrl-C |
| 1 | anything else: an unknown event id, a bug; `--debug` shows the traceback |
| 2 | a setting or an argument is wrong; the message names it |
| 3 | a server cannot be reached, or cannot do its work (`run` goes on trying, but for `--once`) |
| 4 | the tables are missing or older than this package: `outbox-relay migrate` makes them |
| 5 | a server must not be used: a read-only PostgreSQL, a Redis that evicts streams |
| 128+n | signal n ended it: the second one of `run` and `consume`, the first one of the others |
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing

import click
from rich.console import Console

from outbox import grants, letters, settings
from outbox.bench import bench
from outbox.command import (
    DATABASE,
    DEBUG,
    REDIS,
    Commands,
    Failed,
    debug_option,
    failure,
    need_database,
    open_store,
    with_settings,
)
from outbox.consume import consume
from outbox.errors import DatabaseUnavailable, OutboxError, Unavailable, Unsuitable, first_line
from outbox.loop import stop_on_signals
from outbox.relay import Relay
from outbox.report import counted, printable, progress, start_logging
from outbox.settings import Settings, is_local, safe_url
from outbox.status import status
from outbox.store import APPLICATION, database_in_clear
from outbox.streams import Streams, redis_in_clear

log = logging.getLogger("outbox.cli")

URL_FLAGS = ("--database-url", "--redis-url")
EPILOG = """\b
Exit codes:
  0      done; after a first SIGTERM or Ctrl-C of what is endless, too
  1      anything else; --debug shows the traceback
  2      a setting or an argument is wrong; the message names it
  3      a server cannot be reached, or cannot do its work
  4      tables are missing: outbox-relay migrate
  5      a server must not be used: read-only, or a Redis that evicts streams
  128+n  signal n ended it: the second of what is endless, else the first

Every setting is also an OUTBOX_ variable (OUTBOX_DATABASE_URL) and a key of the TOML file
that --config or OUTBOX_CONFIG names. Flags come before variables, variables before the file.
"""

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
    need_database(config)
    start_logging(config.log_level, config.log_format)
    relay = Relay(config)
    with stop_on_signals(relay.stop), closing(relay):
        _say_started(config)
        _refuse_unsuitable(relay)
        if once:
            _run_once(relay, config, 30.0 if timeout is None else timeout)
        else:
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


def _refuse_unsuitable(relay: Relay) -> None:
    """Refuse servers that must not be used; the relay itself waits for one that is away.

    Raises Unsuitable or NotMigrated.
    """
    try:
        relay.check()
    except Unsuitable:
        raise
    except Unavailable:
        pass


def _run_once(relay: Relay, config: Settings, timeout: float) -> None:
    try:
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
        with open_store(config) as store:
            left = sum(row["pending"] for row in store.pending())
    except OutboxError:
        return "how many events still wait is not known"
    return f"{counted(left, 'event')} left undone"


@cli.command("migrate")
@click.option("--sql", is_flag=True, help="print the SQL and touch no database")
@with_settings(*DATABASE)
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
    need_database(config)
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
@click.option("--reader", metavar="ROLE", help="for status: sees no payload, headers or key in PostgreSQL")
@click.option("--consumer", metavar="ROLE", help="keeps the inbox of its group")
@click.option("--operator", metavar="ROLE", help="for dead and dlq: sees what failed, and moves or drops it")
@click.option("--apply", "wanted", is_flag=True, help="run the SQL, as the owner of the tables")
@click.option("--redis", "for_redis", is_flag=True, help="print users of Redis instead")
@click.option("--stream", "streams", metavar="NAME", multiple=True,
              help="with --redis: the only streams to use; may be repeated")  # fmt: skip
@with_settings(*DATABASE, "redis_prefix", "lanes", "backfill_suffix")
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
    roles = {role: name for role, name in given.items() if name is not None}
    if not roles:
        raise click.UsageError("Name a role: --service, --relay, --reader, --consumer or --operator.")
    for role, name in roles.items():
        if not name:  # of an unset variable, say
            raise click.UsageError(f"--{role}: the name is empty.")
    if streams and not for_redis:
        raise click.UsageError("--stream needs --redis: in PostgreSQL all streams are in one table.")
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
        need_database(config)
        grants.apply(config.database_url, given_rights)
    click.echo("\n".join(f"{statement.as_string()};" for statement in given_rights))
    if wanted:
        names = ", ".join(dict.fromkeys(roles.values()))
        click.echo(printable(f"granted to {names} in the schema {config.schema}"), err=True)


@cli.command()
@with_settings(*DATABASE, *REDIS, "journal_retention_seconds")
def prune(config: Settings) -> None:
    """Purge journal batches that are older than the retention, and that Redis has.

    A running relay does it by itself; this is for a database whose relay has been off.

    \b
    Example:
      outbox-relay prune
    """
    purged = 0
    with (
        open_store(config) as store,
        closing(Streams(config.redis_url, prefix=config.redis_prefix)) as streams,
        progress(lambda: f"{counted(purged, 'batch')} purged ..."),
    ):
        outbox_id = store.outbox_id()
        last, lost = streams.purgeable(outbox_id, streams.state(outbox_id)[1])
        if lost:
            raise Failed(
                f"Redis has lost {', '.join(lost)}: a relay fills it again, from what would be purged.", 3
            )
        while some := store.purge(config.journal_retention_seconds, last):
            purged += some
    age = f"{config.journal_retention_seconds:g} s"
    click.echo(f"purged {counted(purged, 'batch')} of the journal, older than {age}")


@cli.command(short_help="Show the outbox at work, on servers of its own.")
@debug_option
def demo() -> None:
    """Show the outbox at work, on servers of its own that are gone afterwards.

    Imports the airports of the world under low priority while bookings and alerts keep coming,
    kills a relay and a consumer on the way, and shows what arrived, how late, and the same
    without lanes.

    \b
    Example:
      outbox-relay demo
    """
    try:
        # Inside, because the demo needs extra packages, which no relay in production has.
        from outbox import demo as show
    except ImportError as error:
        raise Failed(
            f'the demo needs the package {error.name}: pip install ".[demo]" in a checkout of outbox', 1
        ) from error
    click.get_current_context().exit(show.run(Console()))


cli.add_command(bench)
cli.add_command(consume)
cli.add_command(letters.dead)
cli.add_command(letters.dlq)
cli.add_command(status)

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
    """Part the flags of URLs, as variables, from the other arguments.

    One that its command does not have stays where it is, to be refused.
    """
    kept: list[str] = []
    urls: dict[str, str] = {}
    command: click.Command = cli
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if argument == "--":
            kept += [argument, *rest]
        elif flag not in URL_FLAGS or not any(flag in option.opts for option in command.params):
            kept.append(argument)
            if isinstance(command, click.Group):
                command = command.commands.get(argument, command)
        elif equals or (value := next(rest, "")):
            urls[settings.PREFIX + flag[2:].replace("-", "_").upper()] = value
        else:
            kept.append(argument)
    return kept, urls


if __name__ == "__main__":
    main()
