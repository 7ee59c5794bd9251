"""The command `consume`: find the consumer of a service, and run it."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import logging
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

import click

from outbox.command import Failed, failure, with_settings
from outbox.consumer import AsyncConsumer, Consumer
from outbox.loop import Stop, stop_on_signals
from outbox.report import start_logging
from outbox.settings import Settings

CONSUMERS = (Consumer, AsyncConsumer)


@click.command(short_help="Run a consumer of a service until stopped.")
@click.argument("where", metavar="MODULE:CONSUMER")
@with_settings("log_level", "log_format")
def consume(config: Settings, where: str) -> None:
    """Run a consumer of a service until stopped.

    MODULE is found in the current directory, too. CONSUMER is a Consumer or AsyncConsumer in it,
    or a function that makes one. The first SIGTERM or Ctrl-C finishes the event in hand, goes on
    with what was read ahead for up to 5 s, and exits with 0; the second exits at once. Servers
    that cannot be reached are tried again.

    \b
    Examples:
      outbox-relay consume shop.billing:consumer
      outbox-relay consume shop.billing:make_consumer --log-format json
    """
    start_logging(config.log_level, config.log_format)
    logging.getLogger(where.partition(":")[0].partition(".")[0]).setLevel(config.log_level.upper())
    consumer = find_consumer(where)
    with stop_on_signals(_ConsumerStop(consumer)):
        if isinstance(consumer, AsyncConsumer):
            asyncio.run(consumer.run())
        else:
            consumer.run()


class _ConsumerStop(Stop):
    """A stop that a consumer hears of."""

    def __init__(self, consumer: Consumer | AsyncConsumer) -> None:
        super().__init__()
        self._consumer = consumer

    def set(self) -> None:
        super().set()
        self._consumer.stop()


def find_consumer(where: str) -> Consumer | AsyncConsumer:
    """Return the consumer that `MODULE:CONSUMER` names, or that the function of this name makes.

    Raises UsageError when there is none, Failed for an error of the service's code.
    """
    path, _, name = where.partition(":")
    if not (path and name):
        raise click.UsageError(f"MODULE:CONSUMER is needed, as in shop.billing:consumer, not {where!r}.")
    found = _attribute(_module(path, name), name)
    if not isinstance(found, CONSUMERS) and _needs_no_arguments(found):
        with _their_errors(f"{where} fails"):
            found = found()
    if not isinstance(found, CONSUMERS):
        raise click.UsageError(f"{where} is neither a Consumer nor a function that makes one.")
    return found


def _module(path: str, name: str) -> ModuleType:
    module = path.removesuffix(".py").removeprefix("./").replace("/", ".")
    if module != path:
        raise click.UsageError(f"{path} is a file. Did you mean {module}:{name}?")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _their_errors(f"{path} cannot be imported"):
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if not f"{path}.".startswith(f"{missing}."):
                raise  # it is another one, which this one imports
    package, dot, last = missing.rpartition(".")
    # Not from all that is installed: among so many names, some are near to any.
    places = getattr(sys.modules[package], "__path__", []) if package else [os.getcwd()]
    near = _nearest(last, [known.name for known in pkgutil.iter_modules(places)], package + dot)
    raise click.UsageError(f"There is no module {missing}.{near}")


def _attribute(module: ModuleType, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    consumers = [other for other, value in vars(module).items() if isinstance(value, CONSUMERS)]
    makers = [other for other, value in vars(module).items() if _may_make_one(value, module)]
    near = _nearest(name, consumers or makers, f"{module.__name__}:", 0.0 if consumers else 0.6)
    raise click.UsageError(f"{module.__name__} has no {name}.{near}")


def _nearest(wrong: str, known: Iterable[str], before: str, alike: float = 0.6) -> str:
    near = difflib.get_close_matches(wrong, known, 1, alike)
    return f" Did you mean {before}{near[0]}?" if near else ""


def _may_make_one(value: Any, module: ModuleType) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__ and _needs_no_arguments(value)


def _needs_no_arguments(found: Any) -> bool:
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError):
        return False
    return True


@contextmanager
def _their_errors(what: str) -> Iterator[None]:
    """Tell errors of the service's code from ours."""
    try:
        yield
    except (Exception, SystemExit) as error:
        failed = failure(error)
        error.__traceback__ = _theirs(error.__traceback__)
        raise Failed(f"{what}: {failed.message}", failed.exit_code) from error


def _theirs(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the first frame on that is neither ours nor of the import itself."""
    ours = (
        __file__,
        importlib.__file__,
        "<frozen importlib._bootstrap>",
        "<frozen importlib._bootstrap_external>",
    )
    while trace and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace
