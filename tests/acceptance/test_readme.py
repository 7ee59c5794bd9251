"""What the README and the pages say is so: programs run as they stand, tables are complete, links lead somewhere."""

import ast
import inspect
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from outbox import Consumer
from outbox.cli import cli
from outbox.settings import FIELDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language, without their indentation in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def test_the_quick_start_prints_what_it_says(tmp_path):
    (program,) = [block for block in blocks("python") if "testing.postgres() as database" in block]
    after = README.split(program, 1)[1]
    promised = re.search(r"```console\n(.*?)```", after, re.DOTALL)
    assert promised is not None
    script = tmp_path / "quickstart.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == (promised[1], "")


@pytest.mark.parametrize("block", blocks("python"))
def test_every_program_compiles(block):
    compile(block, "README.md", "exec")


def test_the_table_of_settings_is_that_of_the_code():
    rows = re.findall(r"^\| `OUTBOX_(\w+)` \| (\S+) \| (.*) \|$", README, re.MULTILINE)
    expected = []
    for name, field in FIELDS.items():
        default = f"{field.default:g}" if isinstance(field.default, float) else field.default
        shown = f"`{default}`" if default != "" else "required"
        expected.append((name.upper(), shown, field.metadata["doc"]))
    assert rows == expected


def test_every_command_it_shows_exists():
    shown = {line.split("#")[0] for line in re.findall(r"^\$ outbox-relay (.*)$", README, re.MULTILINE)}
    assert shown
    for line in shown:
        words = line.split(">")[0].split()
        options = [word for word in words if word.startswith("--")]
        names = [word for word in words[:2] if word in {*cli.commands, "list", "retry", "show", "drop"}]
        help_text = CliRunner().invoke(cli, [*names, "--help"]).output
        assert help_text.startswith("Usage: ")
        assert all(option in help_text for option in options), line


def test_the_table_of_the_consumer_s_arguments_is_that_of_the_code():
    of_consumers = README.split("\n## Consuming\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .* \|$", of_consumers, re.MULTILINE)
    _, *arguments = inspect.signature(Consumer.__init__).parameters.values()
    assert rows == [(argument.name, _shown(argument.default)) for argument in arguments]


def _shown(default):
    if isinstance(default, timedelta):
        return f"{default.days} days" if default.days else f"{default.total_seconds():g} s"
    return {None: "none", inspect.Parameter.empty: "required"}.get(default, f"`{default}`")


def test_the_actions_to_be_alerted_of_are_those_of_the_code():
    """All errors are among them, and nothing that is not logged so."""
    rows = re.findall(r"^\| (`.*?`) \| (error|warning|info) \|", OPERATIONS, re.MULTILINE)
    shown = {(action, level) for names, level in rows for action in re.findall(r"`(\w+)`", names)}
    logged = {
        found for path in (ROOT / "outbox").glob("*.py") for found in _logged(ast.parse(path.read_text()))
    }
    assert shown <= logged
    assert {action for action in logged if action[1] == "error"} <= shown


def _logged(tree):
    """Yield the action and level of each call of a logger."""
    for call in ast.walk(tree):
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level), keywords=keywords):
                actions = [ast.literal_eval(word.value.values[0]) for word in keywords if word.arg == "extra"]
                yield from ((action, "error" if level == "exception" else level) for action in actions)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not heading or heading in _headings(found.read_text()), target


def _headings(text: str) -> set[str]:
    """Return the names by which a link may lead to the headings of a page."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
