"""The rows of benchmark/results: what a run is, how its row is made, kept and shown. Needs the standard library only.

A row is one JSON object on a line. Each has task, method, seed, tuning (whether it served to choose a setting),
commit, script and flags: `python SCRIPT FLAGS` at that commit measures it again.
"""

import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1")  # of the processes below, before this one joins a group


@dataclass
class Run:
    """`python SCRIPT FLAGS`. The flags hold the seed, too."""

    task: str
    method: str
    script: str
    flags: str
    seed: int = 1
    tuning: bool = False

    def command(self) -> tuple[str, str]:
        return self.script, self.flags

    def row(self, commit: str, **measured) -> dict:
        return asdict(self) | dict(commit=commit) | measured


# ---------------------------------------------------------------- Rows


def commit() -> str:
    """The commit of the code that runs. Ask before the first run: others may be committed meanwhile."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def given_flags() -> str:
    """The flags on the command line, without the name of the results' file."""
    words = sys.argv[1:]
    if "--results" in words:
        at = words.index("--results")
        del words[at : at + 2]
    return shlex.join(words)


def flag(flags: str, name: str) -> float | None:
    """The number after a flag in a row's flags; None where the flag is absent."""
    words = flags.split()
    return float(words[words.index(name) + 1]) if name in words else None


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_row(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- Runs


def run_missing(runs: list[Run], measure, path: Path, jobs: int = 1, show=None) -> list[dict]:
    """Makes the rows that are not in the file yet, `jobs` at a time -> the rows of all runs, in the order of `runs`.

    measure(run, folder) returns what it has measured as a dict; the folder is temporary and belongs to this run alone.
    A row is appended as soon as it is measured, so after an error or ctrl-C the same command goes on from there.
    `show(row)` is printed for each new row.
    """
    head = commit()
    rows = {(row["script"], row["flags"]): row for row in read_rows(path)}
    missing = {run.command(): run for run in runs if run.command() not in rows}

    def measured(run: Run) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            return measure(run, Path(folder))

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    futures = {pool.submit(measured, run): run for run in missing.values()}
    try:
        for future in concurrent.futures.as_completed(futures):
            run = futures[future]
            row = run.row(head, **future.result())
            append_row(path, row)
            rows[run.command()] = row
            if show:
                print(show(row), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error: what has not begun does not begin
    return [rows[command] for command in dict.fromkeys(run.command() for run in runs)]


def run_script(run: Run, folder: Path, threads: int = 1) -> dict:
    """Runs it in folder/run, its console goes to folder/output -> CPU seconds of the whole process, and its metrics."""
    words = [sys.executable, run.script, *run.flags.split(), "--output-dir", str(folder / "run")]
    with open(folder / "output", "w") as output:
        environment = ENVIRONMENT | dict(OMP_NUM_THREADS=str(threads))
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)  # the seconds of this process alone, whatever runs beside it
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{run.script} {run.flags}\n{(folder / 'output').read_text()[-2000:]}")
    return dict(cpu_seconds=usage.ru_utime + usage.ru_stime, metrics=read_rows(folder / "run" / "metrics.jsonl"))


def measure_step(*flags) -> dict:
    """The row that step.py makes with these flags, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "rows")
        words = [sys.executable, ROOT / "benchmark" / "step.py", *flags, "--results", results]
        subprocess.run([*map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return read_rows(results)[0]


# ---------------------------------------------------------------- Tables


def markdown_table(titles: list[str], lines: list[list[str]]) -> str:
    texts = ["| " + " | ".join(cells) + " |" for cells in [titles, *lines]]
    texts.insert(1, "|---" * len(titles) + "|")
    return "\n".join(texts)


def mean_and_spread(values) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the deviation of one seed is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def with_spread(values, digits: int = 2) -> str:
    """0.55 ± 0.02; without ± where there is one value, empty where there is none."""
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"
