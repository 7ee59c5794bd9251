"""The settings of the daemon: from flags, `OUTBOX_*` variables and a TOML file, in that order."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from outbox.errors import InvalidSetting
from outbox.lanes import STREAM_NAME, Lanes

PREFIX = "OUTBOX_"
# The variables of this prefix that are no settings of the daemon.
CONFIG, TEST = "OUTBOX_CONFIG", "OUTBOX_TEST_"


USERINFO = re.compile(r"(://[^\s:/?#@]*):\S*@")
QUERY_SECRET = re.compile(r"(?i)([?&][a-z_]*pass[a-z]*=)[^&\s]*")
ENCODE = "a special character of a password must be percent-encoded: @ is %40, / is %2F"


MOST = 500_000_000  # of seconds, rows or bytes; what is made of them must fit an integer of PostgreSQL
LONGEST_BATCH_SECONDS = 0.02  # the next urgent event waits for a batch, and so do others in Redis


def _setting(
    default: Any, doc: str, least: float | None = None, most: float = MOST, shown: bool = True
) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "least": least, "most": most}, repr=shown)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set, checked as a whole. Times are in seconds, sizes in bytes.

    Raises InvalidSetting, which names the setting.
    """

    database_url: str = _setting("", "PostgreSQL, as postgresql://user@host/name", shown=False)
    redis_url: str = _setting("redis://127.0.0.1:6379/0", "Redis, as redis://host:6379/0", shown=False)
    schema: str = _setting("public", "schema of the outbox's tables")
    redis_prefix: str = _setting("outbox", "start of the state's key; {tag}:outbox in a Redis Cluster")
    lanes: Literal["on", "off"] = _setting("on", "off: one stream a name, whatever the priority")
    threshold: int = _setting(0, "priorities from here on go to the primary stream")
    backfill_suffix: str = _setting("backfill", "the backfill stream is <stream>:<suffix>")
    source: str = _setting("outbox", "CloudEvents source of every entry")
    batch_size: int = _setting(2000, "most events in a batch", 1)
    batch_bytes: int = _setting(1024 * 1024, "most bytes of payload in a batch", 1)
    batch_seconds: float = _setting(
        0.003,
        f"how long a batch takes while urgent events keep coming; up to {LONGEST_BATCH_SECONDS} in a calm",
        0,
        LONGEST_BATCH_SECONDS,
    )
    max_attempts: int = _setting(10, "refusals after which an event is a dead letter", 1)
    backoff_seconds: float = _setting(1.0, "pause after an event's first refusal; doubles", 0)
    backoff_max_seconds: float = _setting(300.0, "longest pause between an event's attempts", 0)
    journal_retention_seconds: float = _setting(3600.0, "how long published batches can be sent again", 0)
    trim: Literal["on", "off"] = _setting("on", "drop from the lanes what all consumer groups have finished")
    stream_retention_seconds: float = _setting(3600.0, "how long finished entries stay in the lanes", 0)
    lane_max_entries: int = _setting(0, "a backfill lane waits from so many entries on; 0: no limit", 0)
    redis_memory_percent: float = _setting(
        80.0, "backfill waits when Redis has used this of its maxmemory", 1, 100
    )
    on_redis_reset: Literal["replay", "halt"] = _setting(
        "replay", "when Redis comes back empty: send the journal again, or stop publishing"
    )
    takeover_seconds: float = _setting(5.0, "a frozen relay is replaced within this time", 1, 86400)
    wake: Literal["auto", "poll"] = _setting("auto", "auto: LISTEN/NOTIFY where it works; poll: never")
    poll_seconds: float = _setting(1.0, "longest pause between two looks at an idle outbox", 0.001)
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "least to be logged")
    log_format: Literal["text", "json"] = _setting("text", "a line of text or of JSON an event")
    trace: str = _setting("off", "file that every action of a step is appended to, or off")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            if least is not None and value > field.metadata["most"]:
                raise InvalidSetting(f"{field.name}: at most {field.metadata['most']} is allowed")
            if least is not None and not value >= least:
                raise InvalidSetting(f"{field.name}: at least {least} is needed, not {value}")
        for name in ("backfill_suffix", "redis_prefix"):
            value = getattr(self, name)
            if not STREAM_NAME.fullmatch(value):
                raise InvalidSetting(f"{name}: {value!r} cannot be part of a key's name")
        for name in ("schema", "source"):
            if not getattr(self, name):
                raise InvalidSetting(f"{name}: it is empty")
        if "%" in self.schema:
            raise InvalidSetting("schema: a % is more than the driver takes in a name")
        if self.database_url:
            _check_database_url(self.database_url)
        _check_redis_url(self.redis_url)

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
    """Return the settings from flags (None: not given), then `OUTBOX_*`, then a TOML file.

    The file is named by `config` or by `OUTBOX_CONFIG`; its keys stand at the top level or under
    `[outbox]`. Raises InvalidSetting for an unknown or wrong one, named as the user wrote it.
    """
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for name, value, source in _given(flags, environ, config):
        values[name] = _parse(name, value, source)
        written[name] = source
    try:
        return Settings(**values)
    except InvalidSetting as error:
        name, _, reason = str(error).partition(": ")
        raise InvalidSetting(f"{written.get(name, name)}: {reason}") from None


def safe_url(url: str) -> str:
    """Return a URL without its password, fit for a log."""
    return redact(url) if re.fullmatch(r"\S+", url) else "<a URL that cannot be read>"


def redact(text: str) -> str:
    """Return a text without the passwords of the URLs in it."""
    return USERINFO.sub(r"\1:***@", QUERY_SECRET.sub(r"\1***", text))


def is_local(host: str) -> bool:
    """Return whether what is said to a host stays on this machine."""
    if host in ("", "localhost") or host.startswith(("/", "@")):  # the latter two are Unix sockets
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _given(
    flags: Mapping[str, Any], environ: Mapping[str, str], config: str | None
) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value, and the name as it was written; the last of a name counts."""
    path = config or environ.get(CONFIG)
    for name, value in _read(path).items() if path else ():
        yield name, value, f"{path}: {name}"
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and not variable.startswith(TEST) and variable != CONFIG:
            name = variable.removeprefix(PREFIX).lower()
            _known(name, variable, lambda near: PREFIX + near.upper())
            yield name, text, variable
    for name, value in flags.items():
        if value is not None:
            yield name, value, "--" + name.replace("_", "-")


def _read(path: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSetting(f"config: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not only TOML's own: a number of thousands of digits
        raise InvalidSetting(f"config: {path} is no TOML: {error}") from None
    table = content.pop("outbox", {})
    if not isinstance(table, dict):
        raise InvalidSetting(f"{path}: outbox: a table of settings is needed")
    content |= table
    for name in content:
        _known(name, f"{path}: {name}", str)
    return content


def _known(name: str, written: str, write: Callable[[str], str]) -> None:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, [*FIELDS, "config"], 1)
        hint = f"; did you mean {write(near[0])}?" if near else ""
        raise InvalidSetting(f"{written}: there is no such setting{hint}")


def _parse(name: str, value: Any, written: str) -> Any:
    """Return the value in the setting's type. Raises InvalidSetting, named as `written`."""
    kind = TYPES[name]
    if choices := typing.get_args(kind):
        return _choose(choices, value, written)
    # A flag or a variable is text; TOML has types, of which a number may be whole.
    if type(value) not in {int: (int, str), float: (int, float, str), str: (str,)}[kind]:
        raise _wrong(name, value, written)
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise _wrong(name, value, written) from None


def _choose(choices: tuple[str, ...], value: Any, written: str) -> str:
    if isinstance(value, bool):
        value = "on" if value else "off"
    if value in choices:
        return str(value)
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InvalidSetting(f"{written}: {' or '.join(choices)} is needed, not {value!r}{hint}")


def _wrong(name: str, value: Any, written: str) -> InvalidSetting:
    shown = "this" if name.endswith("url") else repr(value)
    return InvalidSetting(f"{written}: {_article(TYPES[name])} is needed, not {shown}")


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number", str: "a text"}[kind]


def _check_database_url(url: str) -> None:
    example = "an example: postgresql://user@host:5432/name"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidSetting(f"database_url: this is no URL; {example}") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise InvalidSetting(f"database_url: a URL of PostgreSQL is needed; {example}")
    if re.search(r"[@?].*@", url):  # SQLAlchemy would take a part of the password for the host
        raise InvalidSetting(f"database_url: {ENCODE}")


def _check_redis_url(url: str) -> None:
    """Refuse what the driver would take for something else: it ignores a path that is no number."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidSetting(f"redis_url: this is no URL, or {ENCODE}") from None
    if parts.scheme == "unix" and parts.path:
        return
    if parts.scheme not in ("redis", "rediss") or not (parts.hostname or port):
        raise InvalidSetting("redis_url: this is no URL of Redis; an example: redis://127.0.0.1:6379/0")
    if parts.fragment or ("@" not in parts.netloc and "@" in parts.path + parts.query):
        raise InvalidSetting(f"redis_url: {ENCODE}")
    if not re.fullmatch(r"(/\d*)?", parts.path):
        raise InvalidSetting("redis_url: its path must be the number of a database, as in /0")
