"""The commands on dead letters: `dead` for what Redis refused, `dlq` for what consumers gave up."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Any
from uuid import UUID

import click
from rich.console import Console

from outbox.command import DATABASE, Failed, failure, need_database, open_store, with_settings
from outbox.dlq import DeadLetter, DeadLetters, readable
from outbox.errors import RedisUnavailable
from outbox.event import ENVELOPE
from outbox.lanes import STREAM_NAME, Lanes
from outbox.report import Columns, Report, counted, progress, shown, to_json
from outbox.settings import Settings

EVENT_IDS = click.argument("event_ids", type=click.UUID, nargs=-1, metavar="[EVENT_ID]...")
ALL = click.option("--all", "everything", is_flag=True, help="all dead letters")
LIMIT = click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N",
                     help="most to list; the newest come first")  # fmt: skip
YES = click.option("--yes", is_flag=True, help="do not ask; needed where nobody can answer")

# -- of the relay, in PostgreSQL ---------------------------------------------------------------------------


@click.group()
def dead() -> None:
    """List, show, retry or drop what Redis refuses.

    \b
    Examples:
      outbox-relay dead list
      outbox-relay dead retry --all
    """


@dead.command("list")
@LIMIT
@click.option("--json", "as_json", is_flag=True, help="print JSON: a list of objects")
@with_settings(*DATABASE)
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
@with_settings(*DATABASE)
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
    payload, headers = row.pop("payload"), row.pop("headers") or "null"
    _echo_spliced(row, payload=payload, headers=headers)


@dead.command("retry")
@EVENT_IDS
@ALL
@with_settings(*DATABASE)
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
@YES
@with_settings(*DATABASE)
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


# -- of consumers, in Redis --------------------------------------------------------------------------------

COLUMNS = ("event_id", "lane", "group", "type", "key", "deliveries", "error", "died_at")
WIDE = 170  # characters, from which on the columns have room


def _name(ctx: click.Context, option: click.Parameter, given: Any) -> Any:
    """Refuse what is no name: an empty one, of an unset variable, must not come to mean all."""
    for name in given if isinstance(given, tuple) else (given,):
        if name is not None and not STREAM_NAME.fullmatch(name):
            raise click.BadParameter(f"{name!r} is no name: letters, digits or any of _ . : / {{ }} -")
    return given


def _with_dead_letters(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command options to choose dead letters by; it gets a DeadLetters, and their choice in words."""

    @click.option("--stream", "streams", metavar="NAME", multiple=True, callback=_name,
                  help="only of this stream and its backfill; may be repeated")  # fmt: skip
    @click.option("--group", metavar="NAME", callback=_name, help="only of this consumer group")
    @with_settings("redis_url", "backfill_suffix")
    @functools.wraps(function)
    def command(config: Settings, streams: tuple[str, ...], group: str | None, **given: Any) -> None:
        backfill = Lanes(suffix=config.backfill_suffix)
        lanes = {lane: None for stream in streams for lane in (stream, backfill.lane(stream, -1))}
        chosen = (f" of {', '.join(streams)}" if streams else "") + (f" of group {group}" if group else "")
        with DeadLetters(config.redis_url, list(lanes) or None, group) as letters:
            function(letters, chosen, **given)

    return command


@click.group()
def dlq() -> None:
    """List, show, replay or drop what consumers gave up.

    An event whose handler fails too often, or rejects it, is moved to the stream <lane>:dlq in Redis.

    \b
    Examples:
      outbox-relay dlq list --group billing
      outbox-relay dlq replay --all --stream customer
    """


@dlq.command("list")
@LIMIT
@click.option("--json", "as_json", is_flag=True, help="print JSON: a list of objects")
@_with_dead_letters
def dlq_list(letters: DeadLetters, chosen: str, limit: int, as_json: bool) -> None:
    """List dead letters of consumers, the newest first, and why they died.

    Without --stream it looks for all streams whose name ends in :dlq.

    \b
    Examples:
      outbox-relay dlq list --stream customer --limit 20
      outbox-relay dlq list --json | jq -r '.[].event_id'
    """
    rows = [_described(letter) for letter in islice(letters.newest_first(), limit)]
    if as_json:
        click.echo(to_json(rows))
    elif rows:
        _table(rows).show()
    else:
        click.echo(f"no dead letters{chosen}")


@dlq.command("show")
@click.argument("event_id", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="print JSON: an object")
@_with_dead_letters
def dlq_show(letters: DeadLetters, chosen: str, event_id: UUID, as_json: bool) -> None:
    """Show a dead letter of a consumer with its payload, headers and error.

    Of several with one id, which two groups gave up, say, it is the newest.

    \b
    Examples:
      outbox-relay dlq show 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
      outbox-relay dlq show --json 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
    """
    letter = next((found for found in letters.newest_first() if found.text("id") == str(event_id)), None)
    if letter is None:
        raise Failed(_no_such([event_id], chosen), 1)
    row, payload, headers = _described(letter), letter.text("data"), _headers(letter)
    if as_json:
        _echo_spliced(row, payload=_as_json(payload), headers=to_json(headers, indent=None))
    else:
        row |= {"payload": payload, "headers": to_json(headers, indent=None) if headers else None}
        Report({name: shown(value) for name, value in row.items()}).show()


@dlq.command("replay")
@EVENT_IDS
@ALL
@_with_dead_letters
def dlq_replay(letters: DeadLetters, chosen: str, event_ids: tuple[UUID, ...], everything: bool) -> None:
    """Put dead letters of consumers back into their lanes.

    Only the group that gave up handles the event again; others skip it. It keeps its id, key and
    priority, and comes behind what is in the lane. Where it is ended, it may be started again:
    nothing is replayed twice. What belongs to a group that is gone is left.

    \b
    Examples:
      outbox-relay dlq replay 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
      outbox-relay dlq replay --all --stream customer --group billing
    """
    wanted = _wanted(event_ids, everything)
    _say_each("replayed", wanted, letters.replay(_texts(wanted)), letters, chosen)


@dlq.command("drop")
@EVENT_IDS
@ALL
@YES
@_with_dead_letters
def dlq_drop(
    letters: DeadLetters, chosen: str, event_ids: tuple[UUID, ...], everything: bool, yes: bool
) -> None:
    """Delete dead letters of consumers for good. Their groups will not get these events.

    \b
    Examples:
      outbox-relay dlq drop 6f1c1f4e-8f5b-4c39-9a4e-0a3f8a1f2b3c
      outbox-relay dlq drop --all --group billing --yes
    """
    wanted = _wanted(event_ids, everything)
    if not yes:
        _confirm_drop(wanted, chosen)
    _say_each("dropped", wanted, letters.drop(_texts(wanted)), letters, chosen)


def _table(rows: list[dict[str, Any]]) -> Report:
    """Return a table; on a terminal too narrow for so many columns, a sentence for each dead letter."""
    title = "Dead letters of consumers"
    if sys.stdout.isatty() and Console().width < WIDE:
        return Report(
            {}, [Columns(title, ("event_id", "what"), [(row["event_id"], _say(row)) for row in rows])]
        )
    return Report({}, [Columns(title, COLUMNS, [[row[name] for name in COLUMNS] for row in rows])])


def _say(row: dict[str, Any]) -> str:
    key = f", key {row['key']}" if row["key"] is not None else ""
    return (
        f"{row['type']}{key}, in {row['lane']}; group {row['group']} gave up "
        f"at {row['died_at']}, delivery {row['deliveries']}: {row['error']}"
    )


def _described(letter: DeadLetter) -> dict[str, Any]:
    died_at = letter.text("dlq:died_at")
    return {
        "event_id": letter.text("id"),
        "lane": letter.lane,
        "group": letter.text("dlq:group"),
        "type": letter.text("type"),
        "key": letter.text("subject"),
        "priority": _number(letter.text("priority")),
        "created_at": letter.text("time"),
        "entry": letter.text("dlq:entry"),
        "deliveries": _number(letter.text("dlq:deliveries")),
        "error": letter.text("dlq:error"),
        "died_at": died_at and died_at.replace("+00:00", "Z"),
    }


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _headers(letter: DeadLetter) -> dict[str, str]:
    """Return what is no attribute of the event itself: tracing, and the service's own."""
    fields = {readable(name): readable(value) for name, value in letter.fields.items()}
    kept = ENVELOPE - {"correlationid", "causationid"}
    return {name: value for name, value in fields.items() if name not in kept and not name.startswith("dlq:")}


def _as_json(payload: str | None) -> str:
    """Return a payload as it was written; as a JSON string where anybody has written something else."""
    try:
        json.loads(payload or "", parse_int=str, parse_constant=int)  # which refuses NaN
    except (ValueError, RecursionError):
        return json.dumps(payload)
    return str(payload)


def _say_each(
    what: str, wanted: list[UUID] | None, done: Iterator[str], letters: DeadLetters, chosen: str
) -> None:
    """Do what is to be done with each, and say how far it has come."""
    ids: list[str] = []
    try:
        with progress(lambda: f"{counted(len(ids), 'dead letter')} {what} ..."):
            ids.extend(done)
    except RedisUnavailable as error:
        failed = failure(error)
        so_far = f"{what} until then: {counted(len(ids), 'dead letter')}."
        raise Failed(f"{failed.message} {so_far}", failed.exit_code) from error
    if letters.left:
        why = "their lane has no such group any more, or they were too large to be kept whole"
        click.echo(f"{counted(len(letters.left), 'dead letter')} left where they are: {why}", err=True)
    _say_done(what, [each for each in _texts(wanted) or () if each not in letters.left], ids, chosen)
    if letters.left:
        sys.exit(1)


def _texts(event_ids: list[UUID] | None) -> list[str] | None:
    return None if event_ids is None else [str(event_id) for event_id in event_ids]


# -- what both have in common ------------------------------------------------------------------------------


def _echo_spliced(row: dict[str, Any], **more: str) -> None:
    """Print JSON of a row, and more JSON in it as it was recorded: a parser would change the numbers."""
    spliced = "".join(f',\n  "{name}": {text}' for name, text in more.items())
    click.echo(to_json(row).removesuffix("\n}") + spliced + "\n}")


def _wanted(event_ids: tuple[UUID, ...], everything: bool) -> list[UUID] | None:
    """Return the ids that were asked for; None: all."""
    if bool(event_ids) == everything:
        raise click.UsageError("Give event ids, or --all.")
    return None if everything else list(dict.fromkeys(event_ids))


def _confirm_drop(wanted: list[UUID] | None, of: str = "") -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("Nobody can be asked here: add --yes to drop them for good.")
    what = "all dead letters" if wanted is None else counted(len(wanted), "dead letter")
    try:
        click.confirm(f"Drop {what}{of} for good?", abort=True)
    except click.Abort as abort:
        # The answer no is one, and so is Ctrl-C, which click hides in it.
        if isinstance(abort.__context__, KeyboardInterrupt):
            click.echo(err=True)
            raise KeyboardInterrupt from None
        raise


def _say_done(what: str, wanted: Iterable[object] | None, done: Collection[object], of: str = "") -> None:
    click.echo(f"{what}: {counted(len(done), 'dead letter')}")
    found = set(done)
    if missing := [event_id for event_id in wanted or () if event_id not in found]:
        raise Failed(_no_such(missing, of), 1)


def _no_such(event_ids: Iterable[object], of: str = "") -> str:
    return f"there is no dead letter{of} with the id {', '.join(map(str, event_ids))}"
