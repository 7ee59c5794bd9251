"""Run all benchmarks, and print each figure beside its goal.

    python bench                     in fifteen to forty minutes, by the machine
    python bench --full              from the backlogs that the goals name, in some hours
    python bench --only relay        one of them
    python bench --kept              nothing: show the newest figures of `bench/results/`

Each benchmark brings servers of its own, and keeps what it found, with versions and machine, in `bench/results/`.
A goal that is missed is no failure; a run that did not do what it measures is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, Goal, console, show_goals
from plots import Chart, show, show_summary

FOLDER = Path(__file__).parent
# The arguments of each; and those of --full.
BENCHMARKS = {
    "relay": (
        ["--held-runs", "2"],
        ["--events", "1000000", "--held-runs", "5", "--control-runs", "5", "--churn", "10000000"],
    ),
    "latency": ([], ["--runs", "5", "--seconds", "20"]),
    "recording": (["--seconds", "2"], ["--seconds", "5"]),
    "consumer": (["--seconds", "10"], []),
    "growth": (
        ["--runs", "2", "--backlogs", "10000", "100000", "300000"],
        ["--runs", "5", "--backlogs", "10000", "100000", "1000000", "10000000"],
    ),
}


def run(name: str, full: bool) -> list[Path]:
    """Run a benchmark; return the file of its results, none when it failed."""
    console.rule(name)
    before = set(RESULTS.glob(f"{name}-*.json"))
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--save", *BENCHMARKS[name][full]]
    subprocess.run(command, check=False)
    return list(set(RESULTS.glob(f"{name}-*.json")) - before)


def newest_kept(name: str) -> list[Path]:
    """Return the newest file of a benchmark that is kept, and of each part of it that was run alone, oldest first."""
    newest = {path.name.split("-")[0]: path for path in sorted(RESULTS.glob(f"{name}[-_]*.json"), key=_date)}
    return sorted(newest.values(), key=_date)


def _date(path: Path) -> str:
    return path.stem.partition("-")[2]


def read(path: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(BENCHMARKS), nargs="+", default=list(BENCHMARKS))
    parser.add_argument("--full", action="store_true", help="as the goals say, for hours")
    parser.add_argument("--kept", action="store_true", help="run nothing, show what was found last")
    options = parser.parse_args()
    failed: list[str] = []
    goals: list[Goal] = []
    charts: dict[str, Chart] = {}
    for name in options.only:
        paths = newest_kept(name) if options.kept else run(name, options.full)
        if not paths:
            failed.append(name)
        for results in map(read, paths):  # what is of the same is replaced by the newest
            rows = [row for result in results for row in result["goals"]]
            names = {row["goal"] for row in rows}
            goals = [row for row in goals if row["goal"] not in names] + rows
            charts |= {chart["file"]: chart for result in results for chart in result.get("charts", ())}
    for chart in charts.values() if options.kept else ():
        show(chart)
    console.rule("all")
    show_goals(goals)
    if options.only == list(BENCHMARKS):
        show_summary(goals)
    if failed:
        console.print(f"no figures of: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
