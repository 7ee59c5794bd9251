"""What every command has: settings as options, and for each error one sentence and an exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from contextlib import closing
from typing import Any

import click

from outbox import settings
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
from outbox.settings import Settings, redact
from outbox.store import Store

DATABASE = ("database_url", "schema")
REDIS = ("redis_url", "redis_prefix")
DEBUG = "outbox.debug"  # in click's meta: whether tracebacks are wanted

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
            said = str(error).rstrip(".")
            end = "" if said.endswith("?") else "."
            return Failed(f"{said}{end} {advice}".strip(), exit_code)
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
                shown = (error.__cause__ if isinstance(error, Failed) else None) or error
                click.echo(redact("".join(traceback.format_exception(shown))), err=True, nl=False)
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
        wrapped = _config_option(debug_option(wrapped))
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


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_debug, help="show tracebacks"
)
_config_option = click.option("--config", metavar="FILE", help="TOML file with settings")


def open_store(config: Settings) -> closing[Store]:
    need_database(config)
    return closing(Store(config.database_url, schema=config.schema))


def need_database(config: Settings) -> None:
    if not config.database_url:
        raise InvalidSetting(
            "OUTBOX_DATABASE_URL is not set; an example: postgresql://user@127.0.0.1:5432/name"
        )
