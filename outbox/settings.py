"""The settings of the daemon: from flags, `OUTBOX_*` variables and a TOML file, in that order."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import make_url

from outbox.errors import InvalidSetting
from outbox.lanes import STREAM_NAME, Lanes

PREFIX = "OUTBOX_"
# Variables of this prefix that are no settings of the daemon.
OTHERS = ("OUTBOX_CONFIG", "OUTBOX_TEST_")


def _setting(default: Any, doc: str, least: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "least": least})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set, checked as a whole. Times are in seconds, sizes in bytes.

    Raises InvalidSetting, which names the setting.
    """

    database_url: str = _setting("", "PostgreSQL with the outbox; any SQLAlchemy URL")
    redis_url: str = _setting("redis://127.0.0.1:6379/0", "Redis with the streams")
    schema: str = _setting("public", "schema of the outbox's tables")
    redis_prefix: str = _setting(
        "outbox", "start of the state's key; {tag}:outbox in a Redis Cluster"
    )
    lanes: Literal["on", "off"] = _setting("on", "off: one stream a name, whatever the priority")
    threshold: int = _setting(0, "priorities from here on go to the primary stream")
    backfill_suffix: str = _setting("backfill", "the backfill stream is <stream>:<suffix>")
    source: str = _setting("outbox", "CloudEvents source of every entry")
    batch_size: int = _setting(500, "most events in a batch", 1)
    batch_bytes: int = _setting(1024 * 1024, "most bytes of payload in a batch", 1)
    max_attempts: int = _setting(10, "refusals after which an event is a dead letter", 1)
    backoff_seconds: float = _setting(1.0, "pause after an event's first refusal; doubles", 0)
    backoff_max_seconds: float = _setting(300.0, "longest pause between an event's attempts", 0)
    journal_retention_seconds: float = _setting(
        3600.0, "how long published batches can be sent again", 0
    )
    on_redis_reset: Literal["replay", "halt"] = _setting(
        "replay", "when Redis comes back empty: send the journal again, or stop publishing"
    )
    takeover_seconds: float = _setting(5.0, "a frozen relay is replaced within this time", 1)
    wake: Literal["auto", "poll"] = _setting(
        "auto", "auto: LISTEN/NOTIFY where it works; poll: never"
    )
    poll_seconds: float = _setting(1.0, "longest pause between two looks at an idle outbox", 0.001)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            if least is not None and not least <= value < float("inf"):
                raise InvalidSetting(f"{field.name}: {value} is less than {least}, or not finite")
        for name in ("backfill_suffix", "redis_prefix"):
            if not STREAM_NAME.fullmatch(getattr(self, name)):
                raise InvalidSetting(
                    f"{name}: {getattr(self, name)!r} cannot be part of a key's name"
                )
        if not self.schema or not self.source:
            raise InvalidSetting(f"{'source' if self.schema else 'schema'}: it is empty")

    def lane_rule(self) -> Lanes:
        """Return the rule from stream and priority to lane."""
        return Lanes(self.threshold, self.backfill_suffix, self.lanes == "on")


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
TYPES = typing.get_type_hints(Settings)


def load(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    config: str | None = None,
) -> Settings:
    """Return the settings from flags (None: not given), then `OUTBOX_*`, then the TOML file `config`.

    The file is named by the flag or by `OUTBOX_CONFIG`; its keys stand at the top level or under
    `[outbox]`. Raises InvalidSetting for an unknown or wrong one, named as the user wrote it.
    """
    values: dict[str, Any] = {}
    path = config or environ.get("OUTBOX_CONFIG")
    if path:
        values |= {
            name: _parse(name, value, f"{path}: {name}") for name, value in _read(path).items()
        }
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and not variable.startswith(OTHERS):
            name = variable.removeprefix(PREFIX).lower()
            _known(name, variable, lambda near: PREFIX + near.upper())
            values[name] = _parse(name, text, variable)
    values |= {
        name: _parse(name, value, "--" + name.replace("_", "-"))
        for name, value in flags.items()
        if value is not None
    }
    return Settings(**values)


def safe_url(url: str) -> str:
    """Return a URL without its password, fit for a log."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except Exception:  # whatever is wrong with it, what it holds must not be shown
        return "<a URL that cannot be read>"


def _read(path: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InvalidSetting(f"config: {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"config: {path} is no TOML: {error}") from None
    content |= content.pop("outbox", {})
    for name in content:
        _known(name, f"{path}: {name}", str)
    return content


def _known(name: str, written: str, write: Callable[[str], str]) -> None:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, 1)
        hint = f"; did you mean {write(near[0])}?" if near else ""
        raise InvalidSetting(f"{written}: there is no such setting{hint}")


def _parse(name: str, value: Any, written: str) -> Any:
    """Return the value in the setting's type, or raise InvalidSetting with the name as it was written."""
    kind = TYPES[name]
    choices = typing.get_args(kind)
    if choices:
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidSetting(
                f"{written}: {' or '.join(choices)} is needed, not {value!r}{hint}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InvalidSetting(f"{written}: {_article(kind)} is needed, not {value!r}")
    if kind is str and not isinstance(value, str):
        raise InvalidSetting(f"{written}: a text is needed, not {value!r}")
    try:
        return kind(value)
    except ValueError:
        shown = "this" if name.endswith("url") else repr(value)
        raise InvalidSetting(f"{written}: {_article(kind)} is needed, not {shown}") from None


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number", str: "a text"}[kind]
