"""The scope in which events are recorded: their priority, and the event whose handler records them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from enum import IntEnum
from types import TracebackType
from typing import ParamSpec, TypeVar

from outbox.errors import InvalidPriority

P = ParamSpec("P")
R = TypeVar("R")

LOWEST, HIGHEST = -32768, 32767  # the range of a smallint


class Priority(IntEnum):
    """The named priorities. Any integer from -32768 to 32767 is as good."""

    BULK = -100
    LOW = -50
    NORMAL = 0
    HIGH = 50
    CRITICAL = 100


def check_priority(priority: object) -> int:
    """Return `priority`, or raise InvalidPriority. A bool and a float are no priorities."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InvalidPriority(f"priority: an integer is needed, not {priority!r}")
    if not LOWEST <= priority <= HIGHEST:
        shown = priority if priority.bit_length() < 64 else "this"  # Python writes no number of any length
        raise InvalidPriority(f"priority: {shown} is not between {LOWEST} and {HIGHEST}")
    return priority


# Makes the headers that an event carries on from the one that has caused it.
Cause = Callable[[], dict[str, str]]


class _Level:
    """One entered scope, and the object that has entered it."""

    __slots__ = ("cause", "owner", "priority")

    def __init__(self, priority: int, cause: Cause | None, owner: object = None) -> None:
        self.priority, self.cause, self.owner = priority, cause, owner


# The scopes that are open in this context, innermost last. A tuple, so that a task or thread that has
# copied the context keeps its own view when the scope ends elsewhere.
_open: ContextVar[tuple[_Level, ...]] = ContextVar("outbox_priority", default=())


def current_priority() -> int:
    """Return the priority of the innermost open scope, or `Priority.NORMAL` (0) outside of any."""
    levels = _open.get()
    return levels[-1].priority if levels else Priority.NORMAL


class processing_priority:
    """Give every event recorded in the `with` block this priority.

    Scopes nest, the innermost wins, and the previous one is restored however the block ends. Tasks, and
    threads started by `asyncio.to_thread`, inherit the scope; `executor.submit` and `loop.run_in_executor`
    do not, and what they record would flood the primary lane: wrap their function in `carry_priority`.
    Round a `yield` of an asynchronous generator it needs `contextlib.aclosing`: asyncio closes one that was left
    early in another context, which cannot end the scope in this one.

    Raises InvalidPriority when the priority is no integer of a smallint.
    """

    def __init__(self, priority: int) -> None:
        self._priority = check_priority(priority)

    def __enter__(self) -> None:
        _open.set((*_open.get(), _Level(self._priority, _current_cause(), self)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Not by a token: a generator may be closed after scopes that were opened later, or in another context.
        # Nor by what the object remembers: other threads and tasks may be inside it too.
        levels = _open.get()
        for n in reversed(range(len(levels))):
            if levels[n].owner is self:
                _open.set(levels[:n] + levels[n + 1 :])
                return


def _current_cause() -> Cause | None:
    levels = _open.get()
    return levels[-1].cause if levels else None


def headers_of_cause() -> dict[str, str]:
    """Return the headers that an event recorded now gets from the event whose handler is running."""
    cause = _current_cause()
    return cause() if cause else {}


class handling(_Level):
    """Record everything in the `with` block under a priority, and as caused by an event: what a handler runs in."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _open.set((*_open.get(), self))

    def __exit__(self, *_: object) -> None:
        _open.reset(self._before)


def carry_priority(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` bound to the priority in force now, and to the event whose handler is running.

    For `executor.submit(carry_priority(f), ...)` and `loop.run_in_executor(None, carry_priority(f))`,
    which lose context variables.
    """
    priority, cause = current_priority(), _current_cause()

    @functools.wraps(function)
    def carried(*args: P.args, **kwargs: P.kwargs) -> R:
        with handling(priority, cause):
            return function(*args, **kwargs)

    return carried
