"""SPR's two algorithms in turn, with their default flags, over several seeds: spr.py and spr_token.py.

    python benchmark/token_level.py --seeds 5 --gold-reward-function examples/reviews/sentiment.py:reward

Every run is a process of its own, with one thread; flags that this program does not know go to both scripts. Appends
one row per run to benchmark/results/token_level.jsonl (a run that is there is not repeated) and prints the table of
these flags. CPU seconds are those of the whole process: imports, iterations and evaluations.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, Run, markdown_table, run_missing, run_script, with_spread

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


def measure(run: Run, folder: Path) -> dict:
    done = run_script(run, folder)
    return done | dict(cpu_seconds=round(done["cpu_seconds"], 1))


def table(results: list[dict]) -> str:
    """Mean ± standard deviation over the seeds, at the end."""
    lines = []
    for script in dict.fromkeys(row["script"] for row in results):
        rows = [row for row in results if row["script"] == script]
        ends = [row["metrics"][-1] for row in rows]
        cells = [with_spread([end[name] for end in ends if name in end]) for name in COLUMNS]
        seconds = with_spread([row["cpu_seconds"] for row in rows])
        lines.append([f"{script} ({len(rows)} seeds)", *cells, seconds])
    return markdown_table(["script", *COLUMNS.values(), "CPU seconds"], lines)


def main() -> None:
    args, flags = tyro.cli(Args, return_unknown_args=True)
    runs = [
        Run(args.task, script, script, " ".join([*flags, "--seed", str(seed)]), seed)
        for seed in range(1, args.seeds + 1)
        for script in args.scripts
    ]

    def shown(row: dict) -> str:
        return f"{row['script']} seed {row['seed']}: greedy reward {row['metrics'][-1]['eval_reward']:.2f}"

    rows = run_missing(runs, measure, args.results, show=shown)
    print("\n" + table(sorted(rows, key=lambda row: (row["script"], row["seed"]))))


if __name__ == "__main__":
    main()
