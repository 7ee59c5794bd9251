"""What an event is: classes marked with `@event`, checked and encoded once, when they are recorded.

`encode` makes the row that the outbox stores; `Received` and `decoder` read the entry of a stream.
"""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from functools import cache, cached_property, partial
from itertools import islice
from math import isfinite
from time import time_ns
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec

from outbox.errors import InvalidEvent, first_line
from outbox.lanes import STREAM_NAME
from outbox.priority import check_priority, current_priority, handling, headers_of_cause

C = TypeVar("C", bound=type)

MAX_DEPTH = 64
MAX_BYTES = 256 * 1024
MAX_NAME = 255  # characters of a type or a header's name
MAX_KEY = 1024  # characters of a key
MAX_KEY_BYTES = 2048  # an index of PostgreSQL holds little more

# Fields of a stream entry that the relay writes itself (CloudEvents 1.0 attributes, and ours).
ENVELOPE = frozenset(
    {
        *("specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema"),
        *("data", "priority", "correlationid", "causationid"),
    }
)
ENVELOPE_BYTES = frozenset(name.encode() for name in ENVELOPE)
HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_HEADERS = 64


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """One event as the outbox stores it; the fields are columns of the table `outbox`."""

    event_id: UUID
    stream: str
    type: str
    key: str | None
    priority: int
    available_at: datetime | None
    payload: msgspec.Raw  # JSON, the very text that becomes `data` in the stream
    headers: msgspec.Raw | None  # a JSON object of strings


class Waiting(NamedTuple):
    """One event as the relay finds it in the outbox; times and JSON are text, as PostgreSQL wrote them."""

    id: int
    event_id: str
    stream: str
    type: str
    key: str | None
    priority: int
    created_at: str  # ISO 8601 in UTC, "2026-01-31 12:00:00.123456+00"
    payload: str
    headers: str | None
    attempts: int
    last_error: str | None


class EventType(NamedTuple):
    """What `@event` says of a class."""

    stream: str
    type: str
    key: str | None  # name of the field that holds the key
    max_bytes: int
    max_depth: int


_registered: dict[type, EventType] = {}
_classes: dict[tuple[str, str], type] = {}  # by stream and type


def event(
    *,
    stream: str,
    key: str | None = None,
    type: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
) -> Callable[[C], C]:
    """Mark a class as an event of `stream`, so that `publish` and `record` take its instances.

    The class is a dataclass, a pydantic model, a msgspec Struct or an attrs class. `key` names the field
    whose value orders the events (events of one key keep their order), `type` defaults to the name of
    the class. `max_bytes` bounds the encoded payload, `max_depth` its nesting.

    Raises InvalidEvent when the stream's name is malformed, the class is of another kind, or has no such
    field.
    """
    check_stream(stream)

    def register(cls: C) -> C:
        name = check_text("type", type or cls.__name__, MAX_NAME)
        fields = _field_names(cls)
        if key is not None and key not in fields:
            raise InvalidEvent(f"key: {cls.__name__} has no field {key!r}{_near(key, fields)}")
        _registered[cls] = EventType(stream, name, key, max_bytes, max_depth)
        _classes[stream, name] = cls
        return cls

    return register


def encode(
    event: object,
    *,
    priority: int | None = None,
    headers: Mapping[str, str] | None = None,
    available_at: datetime | None = None,
    event_id: UUID | str | None = None,
    type: str | None = None,
    stream: str | None = None,
    key: object = None,
) -> Recorded:
    """Check an event and everything said of it, and encode it; the scope's priority is read here.

    Raises InvalidEvent, which names the field, for whatever PostgreSQL, JSON or Redis could not hold.
    """
    kind = _kind_of(event, stream, type)
    payload = _payload(event, kind)
    if key is None and kind.key is not None:
        key = payload.get(kind.key) if isinstance(event, Mapping) else getattr(event, kind.key)
    return Recorded(
        event_id=_check_id(event_id),
        stream=kind.stream,
        type=kind.type,
        key=None if key is None else _check_key(key),
        priority=current_priority() if priority is None else check_priority(priority),
        available_at=_check_moment(available_at),
        payload=msgspec.Raw(_to_json(payload, kind.type, kind.max_bytes, kind.max_depth)),
        headers=_encode_headers(headers),
    )


def check_stream(name: object) -> str:
    """Return the stream's name, or raise InvalidEvent when it is empty or malformed."""
    if not isinstance(name, str) or not STREAM_NAME.fullmatch(name):
        raise InvalidEvent(
            f"stream: {_shown(name)} is no name of a stream: 1 to 200 letters, digits or any of _ . : / {{ }} -"
        )
    return name


def check_text(field: str, value: object, longest: int) -> str:
    """Return a text that PostgreSQL can hold, or raise InvalidEvent that names the field."""
    if not isinstance(value, str):
        raise InvalidEvent(f"{field}: a string is needed, not {_shown(value)}")
    if not 0 < len(value) <= longest:
        raise InvalidEvent(f"{field}: 1 to {longest} characters are needed, not {len(value)}")
    if fault := _text_fault(value):
        raise InvalidEvent(f"{field}: {fault}")
    return value


def _kind_of(event: object, stream: str | None, type: str | None) -> EventType:
    """Return the kind of an event: as registered, with what the call says put over it."""
    if isinstance(event, dict):
        if stream is None or type is None:
            missing = "stream" if stream is None else "type"
            raise InvalidEvent(f"{missing}: a dict needs a type and a stream: publish(..., {missing}=...)")
        kind = EventType(stream, type, None, MAX_BYTES, MAX_DEPTH)
    else:
        kind = kind_of(event.__class__)
        if stream is None and type is None:  # checked when the class was marked
            return kind
        kind = kind._replace(
            stream=kind.stream if stream is None else stream, type=kind.type if type is None else type
        )
    check_stream(kind.stream)
    check_text("type", kind.type, MAX_NAME)
    return kind


def _field_names(cls: type) -> list[str]:
    for attribute in ("__dataclass_fields__", "model_fields", "__struct_fields__"):
        if hasattr(cls, attribute):
            return list(getattr(cls, attribute))
    if hasattr(cls, "__attrs_attrs__"):
        return [field.name for field in cls.__attrs_attrs__]
    raise InvalidEvent(
        f"event: {cls.__name__} is no dataclass, pydantic model, msgspec Struct or attrs class"
    )


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _payload(event: object, kind: EventType) -> dict[str, Any]:
    """Return the event's fields; what stands deeper is converted as it is encoded."""
    try:
        fields: dict[str, Any] = _fields(event)
        return fields
    except InvalidEvent:
        raise
    except Exception as error:  # a model's own serializers may raise anything
        raise InvalidEvent(f"{kind.type}: {error}") from error


def _fields(value: Any) -> Any:
    """Return the fields of an object as a dict, or raise TypeError when its class has none.

    The class is asked, as an object may claim anything of itself: a mock is made of mocks without end.
    """
    cls: Any = type(value)
    return _reader(cls)(value)


@cache
def _reader(cls: Any) -> Callable[[Any], Any]:
    """Return the function that reads the fields of a class, or raise TypeError when it has none."""
    if issubclass(cls, dict):
        return lambda value: value
    if hasattr(cls, "model_dump"):
        return lambda value: value.model_dump(mode="json")
    if hasattr(cls, "__struct_fields__"):
        return lambda value: msgspec.to_builtins(value, enc_hook=_plain)
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
    elif hasattr(cls, "__attrs_attrs__"):
        names = [field.name for field in cls.__attrs_attrs__]
    else:
        raise TypeError(f"a {cls.__name__} cannot be encoded as JSON")
    return lambda value: {name: getattr(value, name) for name in names}


def _plain(value: Any) -> Any:
    """Return what JSON knows for a value that it does not know, or raise TypeError or ValueError."""
    cls = type(value)
    if issubclass(cls, UUID):
        return str(value)
    if issubclass(cls, (datetime, date, time)):
        return value.isoformat()
    if issubclass(cls, Decimal):
        if not value.is_finite():
            raise ValueError(f"{value} is no number in JSON")
        return str(value)
    if issubclass(cls, Enum):
        return value.value
    return _fields(value)


# A value that holds itself ends the recursion.
_encoder = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain, check_circular=False
).encode


def _to_json(payload: dict[str, Any], name: str, max_bytes: int, max_depth: int) -> str:
    """Encode, and look for the field at fault only when there is a sign of one."""
    try:
        text = _encoder(payload)
        size = len(text.encode())
    except Exception as error:  # a model's own serializers may raise anything
        _raise_fault(payload, name, max_depth)
        raise InvalidEvent(f"{name}: {error}") from error
    if "\\u0000" in text or text.count("{") + text.count("[") > max_depth:
        _raise_fault(payload, name, max_depth)
    if text == "null":
        raise InvalidEvent(f"{name}: null is no payload")
    if size > max_bytes:
        raise InvalidEvent(f"{name}: {size} bytes are more than the {max_bytes} that an event may have")
    return text


def _raise_fault(payload: object, name: str, max_depth: int) -> None:
    try:
        path, fault = next(_faults(payload, name, max_depth), (name, None))
    except Exception:  # a model of models without end, a number that cannot be written: then not where it is
        return
    if fault:
        raise InvalidEvent(f"{path}: {fault}")


def _faults(value: Any, path: str, levels: int) -> Iterator[tuple[str, str]]:
    """Yield where a value cannot be stored, and why; `levels` more of nesting are allowed."""
    kind = type(value)
    if issubclass(kind, str):
        if fault := _text_fault(value):
            yield path, fault
    elif issubclass(kind, float):
        if not isfinite(value):
            yield path, f"{value} is no number in JSON"
    elif issubclass(kind, (dict, list, tuple)):
        if levels == 0:
            yield path, "it is nested too deeply"
        elif issubclass(kind, dict):
            for key, item in value.items():
                if fault := _name_fault(key):
                    yield f"{path}.{key!a}", fault
                yield from _faults(item, f"{path}.{key}", levels - 1)
        else:
            for index, item in enumerate(value):
                yield from _faults(item, f"{path}[{index}]", levels - 1)
    elif value is not None and not issubclass(kind, int):
        try:
            plain = _plain(value)
        except Exception as error:
            yield path, str(error)
        else:
            yield from _faults(plain, path, levels)


def _name_fault(name: object) -> str | None:
    if isinstance(name, str):
        return _text_fault(name)
    if isinstance(name, float) and not isfinite(name):
        return f"{name} is no number in JSON"
    if name is None or isinstance(name, (int, float)):
        return None
    return f"a name must be a string, not a {name.__class__.__name__}"


def _text_fault(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character cannot be stored"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"a lone surrogate ({text[error.start]!a}) cannot be stored"
    return None


def _shown(value: object) -> str:
    """Return a value for a message: it may be long, or of a kind that cannot be written."""
    try:
        text = repr(value)
    except Exception:
        return f"a {value.__class__.__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_key(key: object) -> str:
    text = check_text("key", _key_text(key), MAX_KEY)
    if len(text.encode()) > MAX_KEY_BYTES:
        raise InvalidEvent(f"key: more than {MAX_KEY_BYTES} bytes")
    return text


def _key_text(key: object) -> object:
    """Return a key as text; numbers and UUIDs are common keys, anything else must be a string."""
    if isinstance(key, Enum):
        key = key.value
    if isinstance(key, (UUID, int)) and not isinstance(key, bool):
        try:
            return str(key)
        except ValueError as error:  # Python writes no integer of thousands of digits
            raise InvalidEvent(f"key: {error}") from None
    return key


def _check_id(event_id: UUID | str | None) -> UUID:
    if event_id is None:
        return _new_id()
    if isinstance(event_id, UUID):
        return event_id
    try:
        return UUID(event_id)
    except (ValueError, AttributeError, TypeError):
        raise InvalidEvent(f"event_id: {_shown(event_id)} is no UUID") from None


def _new_id() -> UUID:
    """Return a UUIDv7 (RFC 9562): ids of one time are neighbours in an index, as they come and as they go."""
    milliseconds = time_ns() // 1_000_000
    value = milliseconds << 80 | int.from_bytes(os.urandom(10), "big")
    return UUID(int=value & ~(0xF << 76 | 0b11 << 62) | 7 << 76 | 0b10 << 62)  # its version and variant


def _check_moment(moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise InvalidEvent(f"available_at: a datetime with a time zone is needed, not {_shown(moment)}")
    try:
        return moment.astimezone(UTC)  # PostgreSQL knows fewer offsets than Python
    except OverflowError:
        raise InvalidEvent(f"available_at: {moment} is out of range in UTC") from None


def _encode_headers(headers: Mapping[str, str] | None) -> msgspec.Raw | None:
    """Return the headers as JSON, with those that tell of the event's cause and of the current trace."""
    carried = headers_of_cause() | current_trace()
    for name, value in carried.items():  # somebody else may have written the entry that they are of
        if fault := _text_fault(value):
            raise InvalidEvent(f"headers.{name}: {fault}")
    if headers is not None:
        carried |= _check_headers(headers)
    if not carried:
        return None
    text = _encoder(carried)
    if len(text.encode()) > MAX_BYTES:
        raise InvalidEvent(f"headers: more than {MAX_BYTES} bytes")
    return msgspec.Raw(text)


def _check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise InvalidEvent(f"headers: a mapping of strings is needed, not {_shown(headers)}")
    found = list(islice(headers.items(), MAX_HEADERS + 1))
    if len(found) > MAX_HEADERS:
        raise InvalidEvent(f"headers: more than the {MAX_HEADERS} that are allowed")
    for name, value in found:
        if not isinstance(name, str) or not HEADER_NAME.fullmatch(name):
            raise InvalidEvent(f"headers: {_shown(name)} is no name: 1 to 64 letters, digits or any of _ . -")
        if name.lower() in ENVELOPE:
            raise InvalidEvent(f"headers.{name}: the name belongs to the envelope of every event")
        if not isinstance(value, str):
            raise InvalidEvent(f"headers.{name}: a string is needed, not {_shown(value)}")
        if fault := _text_fault(value):
            raise InvalidEvent(f"headers.{name}: {fault}")
    return dict(found)


# -- the W3C trace context ---------------------------------------------------------------------------------

TRACE = ("traceparent", "tracestate")


def current_trace() -> dict[str, str]:
    """Return the current span as headers; none where OpenTelemetry is not in use."""
    if "opentelemetry.trace" not in sys.modules:  # nobody has begun a span
        return {}
    carrier: dict[str, str] = {}
    _propagator().inject(carrier)
    return carrier


@contextmanager
def _traced(scope: AbstractContextManager[None], headers: Mapping[str, str]) -> Iterator[None]:
    """Enter a scope, and make the span that the headers name the current one, where OpenTelemetry is installed."""
    with scope:
        try:
            context = importlib.import_module("opentelemetry.context")
        except ImportError:
            yield
            return
        token = context.attach(_propagator().extract(dict(headers)))
        try:
            yield
        finally:
            context.detach(token)


@cache
def _propagator() -> Any:
    module = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
    return module.TraceContextTextMapPropagator()


# -- received ----------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What the events of one lane, type and priority have in common, as their handlers get it."""

    stream: str
    lane: str
    type: str
    priority: int


def kind_in(fields: Mapping[bytes, bytes], stream: str, lane: str) -> Kind:
    """Return the kind of an entry's event. Raises InvalidEvent."""
    type_ = _text_of(fields, b"type")
    try:
        priority = check_priority(int(fields.get(b"priority", 0)))
    except ValueError as error:
        raise InvalidEvent(f"priority: {error}") from error
    return Kind(stream, lane, type_, priority)


def _text_of(fields: Mapping[bytes, bytes], name: bytes) -> str:
    try:
        return fields[name].decode()
    except KeyError:
        raise InvalidEvent(f"{name.decode()}: it is missing") from None
    except UnicodeDecodeError as error:
        raise InvalidEvent(f"{name!a}: {error}") from error


class Received:
    """An event as its handler gets it: an entry of a stream.

    `data` is an instance of the event's class where the class is known, else what JSON made of it. `lane` is
    "primary" or "backfill"; `deliveries` how often the group was given the event, this time included: a consumer
    that died may have read it, and no more. The rest is read when it is asked for: anybody may have written the
    entry, so each raises InvalidEvent, which names the field, where an outbox would have written something else.
    """

    data: Any = None

    def __init__(self, fields: Mapping[bytes, bytes], kind: Kind, deliveries: int) -> None:
        self._fields, self.deliveries = fields, deliveries
        self.stream, self.lane, self.type, self.priority = kind

    def __repr__(self) -> str:
        return f"<Received {self.type} of {self.stream}, {self.data!r}>"

    def decode(self, decode: Callable[[bytes], Any]) -> Any:
        """Return the data, decoded. Raises InvalidEvent."""
        try:
            return decode(self._fields[b"data"])
        except KeyError:
            raise InvalidEvent("data: it is missing") from None
        except (ValueError, TypeError) as error:
            raise InvalidEvent(f"data: {first_line(error)}") from error

    @cached_property
    def id(self) -> UUID:
        """The id that `publish` returned."""
        try:
            return UUID(self._text(b"id"))
        except ValueError as error:
            raise InvalidEvent(f"id: {error}") from error

    @cached_property
    def key(self) -> str | None:
        """The key, whose events keep their order."""
        return self._text(b"subject") if b"subject" in self._fields else None

    @cached_property
    def created_at(self) -> datetime:
        """When the event was recorded, by the clock of PostgreSQL, with a time zone."""
        try:
            return datetime.fromisoformat(self._text(b"time"))
        except ValueError as error:
            raise InvalidEvent(f"time: {error}") from error

    @cached_property
    def headers(self) -> dict[str, str]:
        """The headers that it was recorded with, and the trace context."""
        names = [name for name in self._fields if name not in ENVELOPE_BYTES and b":" not in name]
        return {name.decode(errors="replace"): self._text(name) for name in names}

    @cached_property
    def correlation_id(self) -> str:
        """The id of the first event of the chain that this one belongs to."""
        return self._text(b"correlationid" if b"correlationid" in self._fields else b"id")

    @cached_property
    def causation_id(self) -> str | None:
        """The id of the event whose handler has recorded this one, or None."""
        return self._text(b"causationid") if b"causationid" in self._fields else None

    def caused(self) -> dict[str, str]:
        """Return the headers that the events its handler records carry on."""
        trace = {name: self.headers[name] for name in TRACE if name in self.headers}
        return {"correlationid": self.correlation_id, "causationid": str(self.id), **trace}

    def scope(self) -> AbstractContextManager[None]:
        """Return what its handlers run in: its priority, itself as the cause of what they record, and its trace."""
        scope = handling(self.priority, self.caused)
        return _traced(scope, self.headers) if b"traceparent" in self._fields else scope

    def _text(self, name: bytes) -> str:
        return _text_of(self._fields, name)


def class_of(stream: str, type: str) -> builtins.type | None:
    """Return the class that is marked as this type of this stream, or None."""
    return _classes.get((stream, type))


def kind_of(cls: builtins.type) -> EventType:
    """Return what `@event` says of a class. Raises InvalidEvent when it is not marked."""
    if cls not in _registered:
        raise InvalidEvent(f"event: {cls.__name__} is no event; mark the class with @event(stream=...)")
    return _registered[cls]


def decoder(cls: builtins.type | None) -> Callable[[bytes], Any]:
    """Return the function from an event's `data` to an instance of the class; None: to plain JSON values.

    The function raises ValueError. Raises InvalidEvent when the fields of the class cannot be decoded at all.
    """
    if cls is None:
        return msgspec.json.decode
    if hasattr(cls, "model_validate_json"):
        return _validator(cls)
    try:
        return msgspec.json.Decoder(cls, dec_hook=_convert).decode
    except (TypeError, NameError) as error:
        raise InvalidEvent(f"event: {cls.__name__} cannot be decoded: {error}") from error


def _convert(cls: Any, value: Any) -> Any:
    """Decode a field of a class that msgspec does not know."""
    if hasattr(cls, "model_validate_json"):
        return _validator(cls)(msgspec.json.encode(value))
    return cls(value)


@cache
def _validator(cls: Any) -> Callable[[bytes], Any]:
    """Return what makes an instance of a pydantic model from JSON: by the names of its fields, as it is encoded.

    Until pydantic 2.11, a model with aliases has to allow that itself (`populate_by_name`).
    """
    validate: Callable[..., Any] = cls.model_validate_json
    names = {"by_alias": True, "by_name": True}
    return partial(validate, **names) if "by_name" in inspect.signature(validate).parameters else validate
