"""What a person reads of the command line: log lines, tables, progress. No password shows in any."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import NoneType
from typing import Any, Literal, NamedTuple

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from outbox.settings import redact

# -- logs ------------------------------------------------------------------------------------------


COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


class Lines(logging.Handler):
    """Write each record as one line to stderr: time, level, action, message. No password shows."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception as error:  # of a log call that is not ours: its arguments do not fit, say
            message = f"{record.pathname}:{record.lineno}: a message that cannot be written: {error!r}"
            instead: dict[str, Any] = {"msg": message, "args": (), "fields": {}, "exc_info": None}
            line = self._line(logging.makeLogRecord(record.__dict__ | instead))
        if sys.stderr:  # None where it was closed before the start
            with suppress(OSError):  # that nobody reads the log is no reason to stop
                sys.stderr.write(line + "\n")
                sys.stderr.flush()

    def _line(self, record: logging.LogRecord) -> str:
        return self._json(record) if self._as_json else redact(self._text(record))

    def _text(self, record: logging.LogRecord) -> str:
        level, colour = record.levelname, COLOURS.get(record.levelname)
        if colour and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            level = click.style(level, fg=colour)
        return f"{_moment(record)} {level} {_action(record)} {printable(_message(record))}"

    def _json(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _moment(record),
            "level": record.levelname,
            "action": _action(record),
            "message": _message(record),
        }
        fields |= getattr(record, "fields", {})
        # Value by value: in the line, what follows a password would be taken for a part of it.
        return json.dumps({name: _plain(value) for name, value in fields.items()})


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, NoneType)) else redact(str(value))


def _moment(record: logging.LogRecord) -> str:
    return utc(datetime.fromtimestamp(record.created, UTC))


def _action(record: logging.LogRecord) -> str:
    return str(getattr(record, "action", record.name))


def _message(record: logging.LogRecord) -> str:
    """Return the message, with the fields of an event that is made of them, and any traceback."""
    fields = getattr(record, "fields", {})
    parts = [record.getMessage(), *(f"{name}={value}" for name, value in fields.items())]
    if record.exc_info:
        parts.append(logging.Formatter().formatException(record.exc_info))
    return " ".join(part for part in parts if part)


def start_logging(level: str, form: str) -> None:
    """Log to stderr from now on, other libraries' warnings included."""
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if isinstance(handler, Lines)]
    for handler in ours:
        root.removeHandler(handler)
    root.addHandler(Lines(form == "json"))
    logging.getLogger("outbox").setLevel(level.upper())


def utc(moment: datetime) -> str:
    """Return a time as RFC 3339, to the millisecond."""
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


# -- output: tables on a terminal, plain lines elsewhere -------------------------------------------


class Columns(NamedTuple):
    """A table: what it is of, the names of its columns, and its rows."""

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Report(NamedTuple):
    """What a command shows: facts, then tables."""

    facts: dict[str, Any]
    tables: Sequence[Columns] = ()

    def rich(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for name, value in self.facts.items():
            grid.add_row(Text(name, style="bold"), Text(printable(str(value))))
        return Group(*([grid] if self.facts else []), *map(_rich_table, self.tables))

    def plain(self) -> Iterator[str]:
        for name, value in self.facts.items():
            yield f"{name}: {printable(str(value))}"
        for table in self.tables:
            yield from _aligned(table)

    def show(self) -> None:
        """Print to stdout."""
        if sys.stdout.isatty():
            Console().print(self.rich())
        else:
            for line in self.plain():
                click.echo(line)


def printable(text: str) -> str:
    """Return a text in which nothing moves the cursor or ends the line: it may be anybody's."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _rich_table(table: Columns) -> Table:
    rich = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(table.names):
        numbers = all(isinstance(row[place], int) for row in table.rows)
        justify: Literal["left", "right"] = "right" if numbers else "left"
        rich.add_column(name, justify=justify, overflow="fold", no_wrap=place == 0)  # to be copied
    for row in table.rows:
        rich.add_row(*(Text(printable(shown(value))) for value in row))
    return rich


def _aligned(table: Columns) -> Iterator[str]:
    cells = [table.names, *([printable(shown(value)) for value in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells if table.rows else ():
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()


def shown(value: Any) -> str:
    """Return a cell of a table: a dash for nothing, times as RFC 3339."""
    return "-" if value is None else utc(value) if isinstance(value, datetime) else str(value)


def server_version(info: Mapping[str, Any]) -> str | None:
    """Return name and version of the Redis that says this of itself; None where INFO is not for us."""
    name = info.get("server_name", "redis")
    number = info.get(f"{name}_version", info.get("redis_version"))
    return f"{name} {number}" if number else None


def to_json(value: Any, indent: int | None = 2) -> str:
    """Return JSON, with times as RFC 3339 and ids as text."""
    return json.dumps(value, default=shown, ensure_ascii=False, indent=indent)


@contextmanager
def progress(say: Callable[[], str]) -> Iterator[None]:
    """Keep a line on stderr up to date while the block runs; nothing where it is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Live(console=console, get_renderable=lambda: Text(say()), transient=True):
        console.show_cursor()  # a second signal ends the process here, with the cursor as it is
        yield


def counted(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"
