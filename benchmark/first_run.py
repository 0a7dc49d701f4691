"""The README's first command on five seeds, and the same without a KL penalty.

    python benchmark/first_run.py [--scripts remax reinforce ppo grpo] [--jobs 2]
    python benchmark/first_run.py --threads 2 --results benchmark/results/first_run_two_threads.jsonl

Appends one row per run to the file of results (a run that is there is not repeated) and prints the table. Gold rewards
are those of sampled responses in training, means over tenths of the run.
"""

import functools
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, Run, markdown_table, run_missing, run_script, with_spread

GOLD = "--gold-reward-function examples/reviews/sentiment.py:reward"
CURVES = ("reward", "gold_reward", "kl", "truncated_fraction", "eval_reward", "eval_gold_reward")
COLUMNS = dict(last="gold, last tenth", best="gold, best tenth", kl="KL", cut="cut off", warnings="warnings")


@dataclass
class Args:
    scripts: tuple[str, ...] = ("remax",)
    """Scripts whose default run is measured."""
    jobs: int = 1
    """Runs at a time."""
    threads: int = 1
    """Threads of each run. The rows do not name them: give other numbers than 1 another file."""
    results: Path = RESULTS / "first_run.jsonl"
    """File that the results are appended to."""


def measure(run: Run, folder: Path, threads: int) -> dict:
    done = run_script(run, folder, threads)
    metrics = done["metrics"]
    updates = [row for row in metrics if row["update"] > 0]
    size = len(updates) // 10
    golds = [row["gold_reward"] for row in updates]
    tenths = [statistics.fmean(golds[i : i + size]) for i in range(0, 10 * size, size)]
    curves = {name: [None if row.get(name) is None else round(row[name], 4) for row in metrics] for name in CURVES}
    return dict(
        last=round(tenths[-1], 4),
        best=round(max(tenths), 4),
        kl=round(statistics.fmean(row["kl"] for row in updates[-size:]), 2),
        cut=round(statistics.fmean(row["truncated_fraction"] for row in updates[-size:]), 4),
        warnings=(folder / "output").read_text().count("warning, update"),
        cpu_seconds=round(done["cpu_seconds"], 1),
        curves=curves,
    )


def runs_of(script: str, seed: int) -> list[Run]:
    runs = [Run("reviews", script, f"{script}.py", f"{GOLD} --seed {seed}", seed)]
    if script == "remax":
        flags = f"{GOLD} --kl-coef 0 --seed {seed}"
        runs.append(Run("reviews", "remax, no KL penalty", "remax.py", flags, seed))
    return runs


def shown(row: dict) -> str:
    return f"{row['method']}, seed {row['seed']}: " + ", ".join(f"{COLUMNS[name]} {row[name]}" for name in COLUMNS)


def table(rows: list[dict]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        cells = [with_spread([row[name] for row in group]) for name in ("last", "best")]
        cells += [with_spread([row["kl"] for row in group], 1), with_spread([row["cut"] for row in group])]
        seeds = f"{len(group)} seeds" if len(group) > 1 else "1 seed"
        lines.append([f"{method} ({seeds})", *cells, str(sum(row["warnings"] > 0 for row in group))])
    return markdown_table(["run", *list(COLUMNS.values())[:-1], "runs with a warning"], lines)


def main() -> None:
    args = tyro.cli(Args)
    runs = [run for seed in (1, 2, 3, 4, 5) for script in args.scripts for run in runs_of(script, seed)]
    measure_run = functools.partial(measure, threads=args.threads)
    print("\n" + table(run_missing(runs, measure_run, args.results, args.jobs, shown)))


if __name__ == "__main__":
    main()
