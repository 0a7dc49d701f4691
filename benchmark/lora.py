"""Adapters beside full fine-tuning on the default task: remax.py with its default flags, rank 1 and rank 8.

    python benchmark/lora.py [--ranks 1 8] [--seeds 1 2 3 4 5]

Each rank takes that of three learning rates whose gold reward is highest on seed 11; full fine-tuning has its default.
Each run is a process of its own, with one thread. Appends one row per run to benchmark/results/lora.jsonl (a run that
is there is not repeated) and prints the table. Gold reward, reward and KL are means over the samples of the last ten
updates; CPU seconds are those of the whole process.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, Run, flag, markdown_table, run_missing, run_script, with_spread

RATES = (7e-4, 2e-3, 6e-3)  # ten times 2e-4, the default when the rows were made, and a factor of three up and down
TUNING_SEED = 11
COLUMNS = dict(gold_reward="gold reward", reward="reward", kl="KL")
GOLD = "--gold-reward-function examples/reviews/sentiment.py:reward"


@dataclass
class Args:
    ranks: tuple[int, ...] = (1, 8)
    """Ranks of the adapters."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the runs at the chosen learning rates."""
    results: Path = RESULTS / "lora.jsonl"
    """File that the results are appended to."""


def run_of(rank: int, learning_rate: float | None, seed: int, tuning: bool = False) -> Run:
    flags = f"{GOLD} --seed {seed}"
    if rank:
        flags += f" --lora-rank {rank} --learning-rate {learning_rate}"
    method = f"LoRA, rank {rank}" if rank else "full"
    return Run("reviews", method, "remax.py", flags, seed, tuning)


def measure(run: Run, folder: Path) -> dict:
    done = run_script(run, folder)
    ends = [row for row in done["metrics"] if row["update"] > 0][-10:]
    means = {name: round(statistics.fmean(row[name] for row in ends), 4) for name in COLUMNS}
    return means | dict(cpu_seconds=round(done["cpu_seconds"], 1), metrics=done["metrics"][-1])


def shown(row: dict) -> str:
    return f"{row['flags']}: gold {row['gold_reward']:.3f}, KL {row['kl']:.1f}, {row['cpu_seconds']:.0f} CPU seconds"


def table(rows: list[dict]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        rate = flag(group[0]["flags"], "--learning-rate")
        cells = [with_spread([row[name] for row in group]) for name in COLUMNS]
        seconds = with_spread([row["cpu_seconds"] for row in group], 0)
        lines.append([f"{method} ({len(group)} seeds)", "default" if rate is None else f"{rate:g}", *cells, seconds])
    return markdown_table(["method", "learning rate", *COLUMNS.values(), "CPU seconds"], lines)


def main() -> None:
    args = tyro.cli(Args)
    chosen = {0: None}
    for rank in args.ranks:
        tuning = [run_of(rank, rate, TUNING_SEED, tuning=True) for rate in RATES]
        rows = run_missing(tuning, measure, args.results, show=shown)
        best = max(rows, key=lambda row: row["gold_reward"])
        chosen[rank] = flag(best["flags"], "--learning-rate")
    finals = [run_of(rank, rate, seed) for seed in args.seeds for rank, rate in chosen.items()]
    print("\n" + table(run_missing(finals, measure, args.results, show=shown)))


if __name__ == "__main__":
    main()
