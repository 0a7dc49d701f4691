"""SPR's two algorithms in turn, with their default flags, over several seeds: spr.py and spr_token.py.

    python benchmark/token_level.py --seeds 5 --gold-reward-function examples/reviews/sentiment.py:reward

Every run is a subprocess, one thread; flags that are not of this script go to both scripts. Appends one JSON line per
run to benchmark/results/token_level.jsonl (a run that is already there is not repeated) and prints the table of these
flags. CPU seconds are those of the whole process: imports, iterations and evaluations.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, ROOT, append_row, commit, read_rows

SCRIPTS = ("spr.py", "spr_token.py")
COLUMNS = dict(
    eval_reward="greedy reward",
    eval_gold_reward="greedy gold",
    eval_log_ratio="log-ratio",
    reward="reward of the last samples",
    gold_reward="gold of the last samples",
    eval_response_length="greedy tokens",
    explained_25="Q explains: ¼",
    explained_50="½",
    explained_75="¾",
    explained_100="end",
    held_out_weight="mean weight",
    weight_max="largest weight",
)


@dataclass
class Args:
    scripts: tuple[str, ...] = SCRIPTS
    """Scripts to run."""
    task: str = "reviews"
    """Name of the rows' task, which the flags describe."""
    seeds: int = 5
    """Seeds 1 … this."""
    results: Path = RESULTS / "token_level.jsonl"
    """File that the results are appended to."""


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(script: str, flags: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [sys.executable, str(ROOT / script), *flags.split(), "--output-dir", str(out)]
        before = children_seconds()
        subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS="1"), check=True, capture_output=True)
        seconds = children_seconds() - before
        return dict(cpu_seconds=round(seconds, 1), metrics=read_rows(out / "metrics.jsonl"))


def table(results: list[dict]) -> str:
    """Mean ± standard deviation over the seeds, at the end."""
    lines = ["| script | " + " | ".join(COLUMNS.values()) + " | CPU seconds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for script in dict.fromkeys(row["script"] for row in results):
        rows = [row for row in results if row["script"] == script]
        last = [row["metrics"][-1] | dict(cpu_seconds=row["cpu_seconds"]) for row in rows]
        cells = []
        for name in (*COLUMNS, "cpu_seconds"):
            values = [metrics[name] for metrics in last if name in metrics]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.fmean(values):.2f} ± {spread:.2f}" if values else "")
        lines.append(f"| {script} ({len(rows)} seeds) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args, flags = tyro.cli(Args, return_unknown_args=True)
    head, results, shown = commit(), read_rows(args.results), []
    for seed in range(1, args.seeds + 1):
        for script in args.scripts:
            words = " ".join([*flags, "--seed", str(seed)])
            rows = [row for row in results if (row["script"], row["flags"]) == (script, words)]
            if not rows:
                row = dict(task=args.task, method=script, seed=seed, tuning=False, commit=head)
                rows = [row | dict(script=script, flags=words) | run(script, words)]
                append_row(args.results, rows[0])
                print(script, f"seed {seed}: greedy reward {rows[0]['metrics'][-1]['eval_reward']:.2f}", flush=True)
            shown += rows
    print("\n" + table(sorted(shown, key=lambda row: (row["script"], row["seed"]))))


if __name__ == "__main__":
    main()
