"""What every daemon's loop needs: a wait that stop can interrupt, signals, and backoff with jitter."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Stop:
    """A request to stop that any wait notices at once. `set()` may come twice, or before the start."""

    def __init__(self) -> None:
        self._set = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Ask to stop; safe in a signal handler."""
        if not self._set:
            self._set = True
            os.write(self._write, b"\0")

    def wait(self, seconds: float, *also: int) -> bool:
        """Block until stop, until one of the file descriptors `also` is readable, or for `seconds`.

        Returns whether something became readable, stop included.
        """
        poll = select.poll()  # select() knows no descriptor beyond 1023
        for descriptor in (self._read, *also):
            poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)


class AsyncStop:
    """Stop for coroutines: `set()` may come from any thread, or a signal handler."""

    def __init__(self) -> None:
        self._set = False
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float) -> bool:
        """Wait for the stop, or for so long; return whether it has come."""
        self._loop = asyncio.get_running_loop()
        if not self._set:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._event.wait()
        return self._set


@contextmanager
def signals_handled_by(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers, *, hangup: bool = False
) -> Iterator[None]:
    """Let SIGTERM and SIGINT be handled so while the block runs.

    With `hangup` SIGHUP, too, but where it is ignored: nohup has asked for that.
    """
    signals = [signal.SIGTERM, signal.SIGINT]
    if hangup and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    before = [signal.signal(number, handler) for number in signals]
    try:
        yield
    finally:
        for number, earlier in zip(signals, before, strict=True):
            signal.signal(number, earlier)


@contextmanager
def stop_on_signals(stop: Stop | AsyncStop) -> Iterator[None]:
    """Let SIGTERM and SIGINT ask for the stop; the second of them ends the process at once.

    The exit status of the second is 128 + the signal's number, as of a process that it killed.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    with signals_handled_by(on_signal):
        yield


def backoff_seconds(attempts: int, first: float, most: float) -> float:
    """Return the pause after so many failed attempts: doubling up to `most`, half of it random.

    Half is fixed, so that ten attempts always take minutes; half is random, so that many relays or
    events that failed together do not come back together.
    """
    full = min(most, first * 2.0 ** min(attempts - 1, 64))
    return full * random.uniform(0.5, 1.0)


class Backoff:
    """The pauses of one outage after another: `next()` grows, `reset()` starts over."""

    def __init__(self, first_seconds: float, most_seconds: float) -> None:
        self._first, self._most = first_seconds, most_seconds
        self.failures = 0

    def next(self) -> float:
        """Return the seconds to wait after one more failure."""
        self.failures += 1
        return backoff_seconds(self.failures, self._first, self._most)

    def reset(self) -> None:
        self.failures = 0


class Every:
    """A clock that is due at once and then every `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self) -> bool:
        """Return whether the time has come, and if so start the next interval."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True

    def restart(self, seconds: float) -> None:
        """Be due after `seconds`, and then every `seconds`: with 0 always, with inf never."""
        self._seconds, self._next = seconds, time.monotonic() + seconds


def is_of_asyncio(sessions: object, *classes: str) -> bool:
    """Return whether this is one of SQLAlchemy's for asyncio, which a blocking service need not have imported."""
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return module is not None and isinstance(sessions, tuple(getattr(module, name) for name in classes))


def makes_coroutines(function: object) -> bool:
    """Return whether a function, or an object that can be called, is an `async def`."""
    called = getattr(function, "__call__", None)  # noqa: B004 - of an object, which may be one
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, because all that it awaits is blocking."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise AssertionError("a coroutine of a blocking consumer was suspended")


async def settled(value: Any) -> Any:
    """Return a value, or what it comes to when it is awaitable: blocking and asyncio libraries look alike so."""
    if isinstance(value, (list, bytes, int)):  # the replies of a blocking client, most of the time
        return value
    return await value if inspect.isawaitable(value) else value
