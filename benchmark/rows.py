"""The rows of benchmark/results: one JSON object per line.

Each has task, method, seed, tuning (whether it served to choose a setting), commit, script and flags: `python SCRIPT
FLAGS` at that commit measures it again. Needs the standard library only.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"


def commit() -> str:
    """Of the code that runs: to be asked before the first run, since others may be committed meanwhile."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def given_flags() -> str:
    """The command line's, without the name of a file of results."""
    words = sys.argv[1:]
    if "--results" in words:
        at = words.index("--results")
        del words[at : at + 2]
    return shlex.join(words)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_row(path, row) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
