"""REINFORCE, RLOO, ReMax and PPO side by side on the default task, over several seeds.

    python benchmark/compare.py [--seeds 5] [--total-episodes 3200] [--jobs 1]

Every run is a subprocess of the script with its default flags, one thread; all see equal numbers of prompts, except
that RLOO with two responses per prompt also runs at equal numbers of responses, on half the prompts. Appends one JSON
line per run to benchmark/results/compare.jsonl (a run that is already there is not repeated) and prints the table.
"""

import concurrent.futures
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass
class Args:
    seeds: int = 5
    """Seeds 1 … this."""
    total_episodes: int = 3200
    """Prompts per run."""
    jobs: int = 1
    """Runs at a time; one for timings that compare."""
    results: Path = HERE / "results" / "compare.jsonl"
    """File that the results are appended to."""


def methods(total_episodes: int) -> dict[str, list[str]]:
    prompts = ["--total-episodes", str(total_episodes)]
    half = ["--total-episodes", str(total_episodes // 2), "--batch-size", "32"]
    leave_one_out = ["reinforce.py", "--baseline", "leave-one-out", "--num-samples", "2"]
    return {
        "REINFORCE": ["reinforce.py", *prompts],
        "RLOO, N = 2, equal prompts": [*leave_one_out, *prompts],
        "RLOO, N = 2, equal responses": [*leave_one_out, *half],
        "ReMax": ["remax.py", *prompts],
        "PPO, 1 epoch": ["ppo.py", *prompts, "--num-epochs", "1"],
        "PPO, 4 epochs": ["ppo.py", *prompts],
    }


def run(method: str, command: list[str], seed: int) -> dict:
    script, *flags = command
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        flags += ["--seed", str(seed), "--output-dir", str(out), "--eval-every", "1000000", "--eval-size", "200"]
        flags += ["--gold-reward-function", str(ROOT / "examples/reviews/sentiment.py:reward")]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        subprocess.run([sys.executable, str(ROOT / script), *flags], env=environment, check=True, capture_output=True)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    updates, last = rows[1:], rows[-1]
    tenth = updates[-max(1, len(updates) // 10) :]
    means = {name: statistics.fmean(row[name] for row in tenth) for name in ("reward", "gold_reward", "kl")}
    parts = ("rollout", "score", "train")
    elapsed = list(itertools.accumulate(sum(row[f"seconds_{part}"] for part in parts) for row in updates))
    held_out = {name: last[name] for name in ("eval_reward", "eval_gold_reward", "eval_win_rate")}
    curve = [  # prompts, reward, gold reward, seconds
        [row["episodes"], round(row["reward"], 3), round(row["gold_reward"], 3), round(seconds, 2)]
        for row, seconds in zip(updates, elapsed, strict=True)
    ]
    row = dict(method=method, seed=seed, command=" ".join(command), **means, **held_out)
    return row | dict(seconds=elapsed[-1], curve=curve)


def table(results: list[dict]) -> str:
    columns = dict(reward="reward", gold_reward="gold reward", kl="KL", eval_reward="greedy reward")
    columns |= dict(eval_gold_reward="greedy gold", seconds="seconds")
    lines = ["| method | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in results):
        rows = [row for row in results if row["method"] == method]
        cells = []
        for name in columns:
            values = [row[name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            digits = 0 if name == "seconds" else 2
            cells.append(f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {method} ({len(rows)} seeds) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    path = args.results
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["command"], row["seed"]) for row in results}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        todo = [
            pool.submit(run, method, command, seed)
            for seed in range(1, args.seeds + 1)
            for method, command in methods(args.total_episodes).items()
            if (" ".join(command), seed) not in done
        ]
        for future in concurrent.futures.as_completed(todo):
            results.append(future.result())
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print(
                f"{results[-1]['method']}, seed {results[-1]['seed']}: reward {results[-1]['reward']:.2f}", flush=True
            )
    order = list(methods(args.total_episodes))
    print("\n" + table(sorted(results, key=lambda row: (order.index(row["method"]), row["seed"]))))


if __name__ == "__main__":
    main()
