"""The commands on dead letters: `dead` for what Redis refuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from uuid import UUID

import click

from outbox.command import CONNECTION, Failed, need_database, open_store, with_settings
from outbox.report import Columns, Report, counted, shown, to_json
from outbox.settings import Settings

EVENT_IDS = click.argument("event_ids", type=click.UUID, nargs=-1, metavar="[EVENT_ID]...")
ALL = click.option("--all", "everything", is_flag=True, help="all dead letters")


@click.group()
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
    with open_store(config) as store:
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
    with open_store(config) as store:
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
    with open_store(config) as store:
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
    need_database(config)
    if not yes:
        _confirm_drop(wanted)
    with open_store(config) as store:
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
