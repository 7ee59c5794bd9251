"""Settings: where they come from, which one wins, and what is refused by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outbox.errors import InvalidSetting
from outbox.settings import FIELDS, Settings, load, redact, safe_url


def toml(folder: Path, text: str) -> str:
    path = folder / "relay.toml"
    path.write_text(text)
    return str(path)


def refusal(flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None,
            config: str | None = None) -> str:  # fmt: skip
    with pytest.raises(InvalidSetting) as caught:
        load(flags or {}, environ or {}, config)
    return str(caught.value)


def test_flags_come_before_variables_and_variables_before_the_file(tmp_path: Path) -> None:
    config = toml(tmp_path, 'batch_size = 1\nthreshold = 1\nsource = "file"')
    environ = {"OUTBOX_THRESHOLD": "2", "OUTBOX_BATCH_SIZE": "2"}
    found = load({"batch_size": 3, "threshold": None}, environ, config)
    assert (found.batch_size, found.threshold, found.source) == (3, 2, "file")
    assert found.backfill_suffix == "backfill"


def test_the_file_may_be_named_by_a_variable_and_have_a_table(tmp_path: Path) -> None:
    config = toml(tmp_path, "[outbox]\npoll_seconds = 2\nlanes = false")
    found = load({}, {"OUTBOX_CONFIG": config})
    assert (found.poll_seconds, found.lanes) == (2.0, "off")


def test_variables_of_others_are_left_alone() -> None:
    environ = {"OUTBOX_TEST_DATABASE_URL": "x", "PATH": "x", "OUTBOXES": "x"}
    assert load({}, environ) == Settings()


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"OUTBOX_BATCH_SZE": "1"}, ["OUTBOX_BATCH_SZE", "did you mean OUTBOX_BATCH_SIZE?"]),
        ({"OUTBOX_QQQQ": "1"}, ["OUTBOX_QQQQ: there is no such setting"]),
        ({"OUTBOX_BATCH_SIZE": "many"}, ["OUTBOX_BATCH_SIZE", "an integer", "'many'"]),
        ({"OUTBOX_BATCH_SIZE": "1.5"}, ["OUTBOX_BATCH_SIZE", "an integer"]),
        ({"OUTBOX_BATCH_SIZE": "0"}, ["OUTBOX_BATCH_SIZE", "at least 1"]),
        ({"OUTBOX_BATCH_SECONDS": "0.021"}, ["OUTBOX_BATCH_SECONDS", "at most 0.02"]),
        ({"OUTBOX_BATCH_SECONDS": "-0.001"}, ["OUTBOX_BATCH_SECONDS", "at least 0"]),
        ({"OUTBOX_REDIS_MEMORY_PERCENT": "800"}, ["OUTBOX_REDIS_MEMORY_PERCENT", "at most 100"]),
        ({"OUTBOX_POLL_SECONDS": "nan"}, ["OUTBOX_POLL_SECONDS", "at least"]),
        ({"OUTBOX_POLL_SECONDS": "inf"}, ["OUTBOX_POLL_SECONDS"]),
        ({"OUTBOX_LANES": "onn"}, ["OUTBOX_LANES", "on or off", "did you mean on?"]),
        ({"OUTBOX_ON_REDIS_RESET": "replya"}, ["OUTBOX_ON_REDIS_RESET", "did you mean replay?"]),
        ({"OUTBOX_BACKFILL_SUFFIX": "a b"}, ["OUTBOX_BACKFILL_SUFFIX", "'a b'"]),
        ({"OUTBOX_SCHEMA": ""}, ["OUTBOX_SCHEMA", "empty"]),
        ({"OUTBOX_SCHEMA": "50%s"}, ["OUTBOX_SCHEMA", "a %"]),
        ({"OUTBOX_SOURCE": ""}, ["OUTBOX_SOURCE", "empty"]),
        ({"OUTBOX_DATABASE_URL": "mysql://h/d"}, ["OUTBOX_DATABASE_URL", "PostgreSQL"]),
        ({"OUTBOX_REDIS_URL": ""}, ["OUTBOX_REDIS_URL", "redis://"]),
        ({"OUTBOX_REDIS_URL": "http://h"}, ["OUTBOX_REDIS_URL", "redis://"]),
        ({"OUTBOX_REDIS_URL": "redis://h/zero"}, ["OUTBOX_REDIS_URL", "number of a database"]),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(environ: dict[str, str], parts: list[str]) -> None:
    message = refusal(environ=environ)
    for part in parts:
        assert part in message


def test_a_variable_that_only_begins_as_that_of_the_file_does_is_refused() -> None:
    assert "OUTBOX_CONFIG_FILE" in refusal(environ={"OUTBOX_CONFIG_FILE": "/etc/relay.toml"})


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_a_batch_may_take_any_time_up_to_the_longest(seconds: float) -> None:
    assert Settings(batch_seconds=seconds).batch_seconds == seconds


def test_a_wrong_flag_is_refused_by_its_name() -> None:
    assert refusal({"batch_size": 0}).startswith("--batch-size: ")


def test_a_wrong_setting_in_code_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidSetting, match=r"^batch_size: "):
        Settings(batch_size=0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch_sze = 1", ["batch_sze", "did you mean batch_size?"]),
        ("batch_size = 1.5", ["batch_size", "an integer"]),
        ("batch_size = true", ["batch_size", "an integer"]),
        ("batch_size = 0", ["batch_size", "at least 1"]),
        ("source = 1", ["source", "a text"]),
        ("outbox = 1", ["outbox", "a table"]),
        ("batch_size = ", ["is no TOML"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(config=toml(tmp_path, text))
    for part in ["relay.toml", *parts]:
        assert part in message


def test_a_missing_file_is_refused() -> None:
    assert "no/such.toml" in refusal(config="no/such.toml")


URLS = [
    "postgresql://u:{}@h/d",
    "postgresql+asyncpg://u:{}@h:5432/d?sslmode=require",
    "postgresql://u@h/d?password={}",
    "postgresql://u@h/d?sslpassword={}&sslmode=require",
    "redis://:{}@h:6379/0",
    "rediss://u:{}@h:6379/0",
    "redis://h:6379/0?db=1&password={}",
    "unix://u:{}@/run/redis.sock?db=1",
]
PASSWORDS = ["canary", "canary%40canary", "canary@canary", "canary/canary", "canary:canary",
             "canary?canary", "canary canary", "canary#canary"]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_never_shows(url: str, password: str) -> None:
    whole = url.format(password)
    assert "canary" not in safe_url(whole)
    if " " not in password:
        assert "canary" not in redact(f"cannot connect to {whole} now")
    name = "redis_url" if whole.startswith(("redis", "unix")) else "database_url"
    try:
        shown = repr(load({name: whole}, {}))
    except InvalidSetting as error:
        shown = str(error)
    assert "canary" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://postgres@127.0.0.1:5432/d",
        "postgresql+psycopg://h/d?host=/run/postgresql",
        "redis://127.0.0.1:6379/0",
    ],
)
def test_a_url_without_password_is_shown_as_it_is(url: str) -> None:
    assert safe_url(url) == url
    assert redact(f"at {url}, for me@example.org") == f"at {url}, for me@example.org"


@pytest.mark.parametrize(
    "setting",
    [
        {"database_url": "postgresql://u:a@b@h/d"},
        {"database_url": "postgresql://u:a@b/c@h/d"},
        {"database_url": "postgresql://h:1/d?password=a@b"},
        {"redis_url": "redis://:1/a@h:6379/0"},
        {"redis_url": "redis://:1#a@h:6379/0"},
        {"redis_url": "redis://:1?a@h:6379/0"},
        {"redis_url": "redis://:a/b@h:6379/0"},
    ],
)
def test_a_password_that_would_be_taken_for_a_host_is_refused(setting: dict[str, str]) -> None:
    assert "percent-encoded" in refusal(setting)


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.metadata["doc"] for field in FIELDS.values())
