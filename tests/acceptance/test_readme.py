"""What the README says is so: its programs run as they stand, and its tables are complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from outbox.cli import cli
from outbox.settings import FIELDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


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
