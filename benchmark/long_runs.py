"""Are baselines per prompt gamed more easily? Gold reward against reward in long runs that little holds back.

    python benchmark/long_runs.py [--methods remax "rloo, N = 4" …] [--seeds 1 2 3] [--restraint 0.0125] [--table]

Three times the episodes of tuned.py, on reviews with the example's own reward model, all methods at one learning rate
and one small KL coefficient (GRPO: β), so that they can go where the reward model is wrong. Measured as tuned.py does,
at more points. Appends one row per run to benchmark/results/long_runs.jsonl (a run that is there is not repeated) and
prints the table: the best point and the end, mean ± standard deviation over the seeds.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import tuned
import tyro
from choice import Setting
from rows import RESULTS, markdown_table, read_rows, run_missing, with_spread
from tasks import TITLES, run_of

TASK = "reviews for long, all pairs"
DIGITS = dict(gold=2, reward=2, kl=0)


@dataclass
class Args:
    methods: tuple[str, ...] = ("remax", "rloo, N = 4", "grpo", "reinforce, normalised")
    """Names of METHODS of tasks.py."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    learning_rate: float = 3e-4
    """Of all methods: what ReMax has chosen on reviews."""
    restraint: float = 0.0125
    """KL coefficient, GRPO's β; the table is of these rows."""
    jobs: int = 1
    """Runs at a time, of one thread each."""
    table: bool = False
    """Run nothing, print the table."""
    results: Path = RESULTS / "long_runs.jsonl"
    """File that the results are appended to."""


def table(results: list[dict], restraint: float) -> str:
    lines = []
    results = [row for row in results if "failed" not in row and tuned.setting_of(row).restraint == restraint]
    for method in dict.fromkeys(row["method"] for row in results):
        rows = [row for row in results if row["method"] == method]
        bests = [max(row["points"], key=lambda point: point["gold"]) for row in rows]
        cells = [f"{TITLES[method]} ({len(rows)} seeds)"]
        for ends in (bests, rows):
            cells += [with_spread([end[name] for end in ends], digits) for name, digits in DIGITS.items()]
        lines.append(cells)
    titles = ["method", "best gold", "its reward", "its KL", "gold at the end", "reward", "KL"]
    return markdown_table(titles, lines)


def main() -> None:
    args = tyro.cli(Args)
    if not args.table:
        tuned.UPDATES = (0, 2, 4, 6, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100)  # times three
        setting = Setting(args.learning_rate, args.restraint)
        pairs = itertools.product(args.seeds, args.methods)
        runs = [run_of(TASK, method, setting, seed, tuning=False) for seed, method in pairs]
        run_missing(runs, tuned.measure, args.results, args.jobs, tuned.shown)
    print(table(read_rows(args.results), args.restraint))


if __name__ == "__main__":
    main()
