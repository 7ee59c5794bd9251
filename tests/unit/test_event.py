"""What can be recorded, and that all else is refused by the name of the field."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import count, repeat
from time import time_ns
from typing import Any
from unittest.mock import MagicMock
from uuid import RFC_4122, UUID

import pydantic
import pytest

from outbox import InvalidEvent, event
from outbox.event import ENVELOPE, MAX_DEPTH, MAX_HEADERS, decoder, encode
from outbox.lanes import Lanes


@event(stream="s", key="id")
@dataclass
class Named:
    id: Any
    value: Any = None


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def payload(event: object) -> str:
    return bytes(encode(event).payload).decode()


CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)


class Endless(Mapping[str, Any]):
    """A mapping that never ends, and denies it."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return map("h{}".format, count())

    def __getitem__(self, name: str) -> str:
        return name


class Pretender:
    """An object that has every attribute, can be called, and gives itself whenever it is asked."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return Pretender()

    def __iter__(self) -> Iterator[Any]:
        return repeat(self)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("a\0b", "Named.value: a NUL character"),
        ("\ud800", "Named.value: a lone surrogate ('\\ud800')"),
        (float("nan"), "Named.value: nan is no number"),
        (float("-inf"), "Named.value: -inf is no number"),
        (Decimal("NaN"), "Named.value: NaN is no number"),
        (Decimal("Infinity"), "Named.value: Infinity is no number"),
        ([1, {"a": (2, "\0")}], "Named.value[1].a[1]: a NUL"),
        ({"\ud800": 1}, "Named.value.'\\ud800': a lone surrogate"),
        ({"a\0": 1}, "Named.value.'a\\x00': a NUL"),
        ({float("nan"): 1}, "Named.value.nan: nan is no number"),
        ({(1, 2): 1}, "Named.value.(1, 2): a name must be a string, not a tuple"),
        ({1, 2}, "Named.value: a set cannot be encoded"),
        (b"x", "Named.value: a bytes cannot be encoded"),
        ([object()], "Named.value[0]: a object cannot be encoded"),
        (CIRCULAR, "it is nested too deeply"),
        (nested(MAX_DEPTH), "it is nested too deeply"),
        (nested(100_000), "it is nested too deeply"),
        ("x" * 262_144, "Named: 262165 bytes are more than the 262144"),
        (MagicMock(), "Named.value: a MagicMock cannot be encoded"),
        ([MagicMock(spec=dict)], "Named.value[0]: a MagicMock cannot be encoded"),
        (Endless(), "Named.value: a Endless cannot be encoded"),
        (Pretender(), "Named.value: a Pretender cannot be encoded"),
        ([MagicMock(spec=str)], "Named.value[0]: a MagicMock cannot be encoded"),
        (MagicMock(spec=UUID), "Named.value: a MagicMock cannot be encoded"),
    ],
)
def test_bad_payloads(value, fault):
    with pytest.raises(InvalidEvent, match=re.escape(fault)) as caught:
        encode(Named("k", value))
    str(caught.value).encode()  # can be printed and logged


def test_an_id_tells_its_time_and_is_random_at_its_end() -> None:
    before = time_ns() // 1_000_000
    ids = [encode(Named("k")).event_id for _ in range(1000)]
    after = time_ns() // 1_000_000
    assert {(id_.version, id_.variant) for id_ in ids} == {(7, RFC_4122)}
    assert all(before <= id_.int >> 80 <= after for id_ in ids)
    assert len({str(id_)[-8:] for id_ in ids}) > 990


def test_as_deep_as_allowed():
    assert payload(Named("k", nested(MAX_DEPTH - 1))).count("[") == MAX_DEPTH - 1


def test_brackets_in_a_text_are_no_depth_and_a_backslash_is_no_nul():
    assert payload(Named("k", "[{" * 100)).count("[") == 100
    assert payload(Named("k", "\\u0000")) == '{"id":"k","value":"\\\\u0000"}'


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"stream": ""}, "stream: ''"),
        ({"stream": "a b"}, "stream: 'a b'"),
        ({"stream": "é"}, "stream: "),
        ({"stream": "s" * 201}, "stream: "),
        ({"stream": 5}, "stream: 5"),
        ({"type": ""}, "type: 1 to 255 characters"),
        ({"type": "a\0"}, "type: a NUL"),
        ({"type": 5}, "type: a string is needed"),
        ({"key": ""}, "key: 1 to 1024 characters"),
        ({"key": "\ud800"}, "key: a lone surrogate"),
        ({"key": 1.5}, "key: a string is needed"),
        ({"key": True}, "key: a string is needed"),
        ({"headers": "a"}, "headers: a mapping"),
        ({"headers": {"": "x"}}, "headers: ''"),
        ({"headers": {"a b": "x"}}, "headers: 'a b'"),
        ({"headers": {"a": 5}}, "headers.a: a string is needed"),
        ({"headers": {"a": "\0"}}, "headers.a: a NUL"),
        ({"headers": {f"h{n}": "" for n in range(MAX_HEADERS + 1)}}, "headers: more than the 64"),
        ({"headers": Endless()}, "headers: more than the 64"),
        ({"headers": MagicMock()}, "headers: a mapping of strings is needed"),
        ({"key": MagicMock()}, "key: a string is needed"),
        ({"type": MagicMock()}, "type: a string is needed"),
        ({"stream": MagicMock()}, "stream: <MagicMock"),
        ({"priority": MagicMock()}, "priority: "),
        ({"available_at": MagicMock()}, "available_at: "),
        ({"event_id": MagicMock()}, "event_id: "),
        ({"headers": {"a": "x" * 300_000}}, "headers: more than"),
        ({"available_at": datetime(2026, 1, 1)}, "available_at: a datetime with a time zone"),
        ({"available_at": "now"}, "available_at: "),
        ({"event_id": "abc"}, "event_id: 'abc' is no UUID"),
        ({"event_id": 5}, "event_id: 5 is no UUID"),
    ],
)
def test_bad_options(options, fault):
    with pytest.raises(InvalidEvent, match="^" + re.escape(fault)):
        encode(Named("k"), **options)


@pytest.mark.parametrize("name", sorted(ENVELOPE | {"ID", "Data"}))
def test_headers_of_the_envelope_are_refused_in_any_case(name):
    with pytest.raises(InvalidEvent, match=f"^headers.{name}: the name belongs to the envelope"):
        encode(Named("k"), headers={name: "x"})


def test_a_dict_names_its_type_and_stream():
    with pytest.raises(InvalidEvent, match="^stream: a dict needs"):
        encode({}, type="T")
    with pytest.raises(InvalidEvent, match="^type: a dict needs"):
        encode({}, stream="s")


def test_a_class_that_is_not_marked_is_refused_and_a_subclass_of_one_that_is():
    @dataclass
    class Child(Named):
        pass

    for stranger in (Child("k"), 5, "text", [1], None, Named):
        with pytest.raises(InvalidEvent, match=r"is no event; mark the class with @event"):
            encode(stranger)


def test_what_claims_to_be_an_event_is_refused():
    with pytest.raises(InvalidEvent, match="^Named: a MagicMock cannot be encoded"):
        encode(MagicMock(spec=Named))


def test_marking_what_cannot_be_an_event_is_refused_at_once():
    with pytest.raises(InvalidEvent, match="^event: Plain is no dataclass"):

        @event(stream="s")
        class Plain:
            pass

    with pytest.raises(
        InvalidEvent, match=r"^key: Misspelt has no field 'custmer'; did you mean 'customer'\?"
    ):

        @event(stream="s", key="custmer")
        @dataclass
        class Misspelt:
            customer: str

    with pytest.raises(InvalidEvent, match="^stream: ''"):
        event(stream="")


def test_the_type_defaults_to_the_name_of_the_class_and_the_key_to_its_field():
    recorded = encode(Named(7))
    assert (recorded.type, recorded.stream, recorded.key) == ("Named", "s", "7")
    assert encode(Named(None)).key is None
    other = encode(Named("a"), key="b", type="Other", stream="t")
    assert (other.stream, other.type, other.key) == ("t", "Other", "b")


def test_the_bounds_of_an_event_are_its_own():
    @event(stream="s", max_bytes=20, max_depth=2)
    @dataclass
    class Small:
        value: Any

    assert payload(Small([1])) == '{"value":[1]}'
    with pytest.raises(InvalidEvent, match="more than the 20"):
        encode(Small("x" * 20))
    with pytest.raises(InvalidEvent, match=r"Small.value\[0\]: it is nested too deeply"):
        encode(Small([[1]]))


@pytest.mark.parametrize(
    ("lanes", "priority", "lane"),
    [
        (Lanes(), 0, "s"),
        (Lanes(), -1, "s:backfill"),
        (Lanes(threshold=50), 49, "s:backfill"),
        (Lanes(threshold=50, suffix="later"), 49, "s:later"),
        (Lanes(on=False), -100, "s"),
    ],
)
def test_the_lane_of_a_priority(lanes, priority, lane):
    assert lanes.lane("s", priority) == lane


class ByAlias(pydantic.BaseModel):
    customer_id: str = pydantic.Field(alias="customerId")


@event(stream="s", key="of")
class Aliased(pydantic.BaseModel):
    of: str = pydantic.Field(validation_alias="OF", serialization_alias="Of")
    deeper: ByAlias


class Strict(pydantic.BaseModel, strict=True):
    id: UUID


@event(stream="s")
@dataclass
class Holds:
    strict: Strict
    aliased: ByAlias


@pytest.mark.parametrize(
    "made",
    [
        Aliased(OF="k", deeper=ByAlias(customerId="c")),
        Holds(Strict(id=UUID(int=7)), ByAlias(customerId="c")),
    ],
)
def test_a_model_comes_back_from_the_names_of_its_fields(made: Any) -> None:
    text = payload(made)
    assert '"customer_id":"c"' in text
    assert decoder(type(made))(text.encode()) == made
