"""SPR at several β, Best-of-N and uniform weights, at equal numbers of samples, over several seeds.

    python benchmark/weighting.py --task reviews --num-samples 4 8 16 --betas 0.3 1 3 --total-episodes 384 \
        --batch-size 128 --num-epochs 2 --num-minibatches 4 --learning-rate 5e-4 \
        --gold-reward-function examples/reviews/sentiment.py:reward

Every run is a subprocess of spr.py, one thread; flags that are not of this script go to it. Appends one JSON line per
run to benchmark/results/weighting.jsonl (a run that is already there is not repeated) and prints the table of the task.
"""

import concurrent.futures
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
    task: str
    """Name of the task in the results."""
    num_samples: tuple[int, ...] = (8,)
    """Samples per prompt."""
    betas: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Temperatures of the weights, in reward units."""
    seeds: int = 3
    """Seeds 1 … this."""
    jobs: int = 1
    """Runs at a time."""
    results: Path = HERE / "results" / "weighting.jsonl"
    """File that the results are appended to."""


def run(task: str, method: str, num_samples: int, seed: int, flags: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [sys.executable, str(ROOT / "spr.py"), *flags, "--seed", str(seed), "--output-dir", str(out)]
        command += ["--num-samples", str(num_samples), "--eval-every", "1", "--eval-size", "200"]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        subprocess.run(command, env=environment, check=True, capture_output=True)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = "reward gold_reward best_reward weight_ess eval_reward eval_gold_reward eval_win_rate eval_log_ratio"
    evaluations = [{name: row[name] for name in names.split() if name in row} for row in rows if "eval_reward" in row]
    key = dict(task=task, method=method, num_samples=num_samples, seed=seed, flags=" ".join(flags))
    return key | dict(evaluations=evaluations)


def table(results: list[dict]) -> str:
    columns = dict(eval_reward="greedy reward", eval_gold_reward="greedy gold", weight_ess="effective samples")
    columns = {name: title for name, title in columns.items() if name in results[0]["evaluations"][-1]}
    lines = ["| N | weights | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for num_samples, method in dict.fromkeys((row["num_samples"], row["method"]) for row in results):
        last = [r["evaluations"][-1] for r in results if (r["num_samples"], r["method"]) == (num_samples, method)]
        values = [[evaluation[name] for evaluation in last] for name in columns]
        spread = [statistics.stdev(v) if len(v) > 1 else float("nan") for v in values]
        cells = [f"{statistics.fmean(v):.3f} ± {s:.3f}" for v, s in zip(values, spread, strict=True)]
        lines.append(f"| {num_samples} | {method} ({len(last)} seeds) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args, flags = tyro.cli(Args, return_unknown_args=True)
    methods = {f"SPR, β = {beta:g}": ["--beta", str(beta)] for beta in args.betas}
    methods |= {"Best-of-N": ["--weighting", "best-of-n"], "uniform": ["--weighting", "uniform"]}
    path = args.results
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    results = [row for row in results if row["task"] == args.task]
    done = {(row["method"], row["num_samples"], row["seed"]) for row in results}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        todo = [
            pool.submit(run, args.task, method, num_samples, seed, more + flags)
            for seed in range(1, args.seeds + 1)
            for num_samples in args.num_samples
            for method, more in methods.items()
            if (method, num_samples, seed) not in done
        ]
        for future in concurrent.futures.as_completed(todo):
            results.append(future.result())
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1], ensure_ascii=False) + "\n")
            print(*(results[-1][name] for name in ("num_samples", "method", "seed")), "done", flush=True)
    order = list(methods)
    print("\n" + table(sorted(results, key=lambda r: (r["num_samples"], order.index(r["method"]), r["seed"]))))


if __name__ == "__main__":
    main()
