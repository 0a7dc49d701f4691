"""Each method at its own best learning rate (and β), on two tasks, at equal numbers of generated responses.

    python benchmark/tuned.py --stage tuning [--tasks reviews rule] [--methods …] [--jobs 2]
    python benchmark/tuned.py --stage final

The rules are in benchmark/README.md, "Tuned". `tuning` runs the grid on the seeds 101 and 102, `final` the chosen
settings on the seeds 1 to 5; a run whose row is there is not repeated. At each evaluation the run's policy gives two
samples to each of the task's held-out prompts: gold reward, reward and KL to the initial policy are measured on these,
in the same way for all methods. Rows go to benchmark/results/tuned.jsonl; `command` repeats the training.
"""

import concurrent.futures
import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

REVIEWS, RULE = "examples/reviews", "examples/guess_and_check"
GOLD = dict(reviews=f"{REVIEWS}/sentiment.py:reward", rule=f"{RULE}/rule.py:reward")
DATA = dict(
    reviews=f"--dataset {REVIEWS}/prompts.jsonl --reward-model {REVIEWS}/reward_model",
    rule=f"--dataset {RULE}/prompts.jsonl --reward-function {GOLD['rule']} --response-length 60",
)
PAIRS = dict(reviews=f"--dataset {REVIEWS}/preferences.jsonl", rule=f"--dataset {RULE}/preferences.jsonl")
POLICY = dict(reviews=f"{REVIEWS}/policy", rule=f"{RULE}/policy")
HELD_OUT = dict(reviews=f"{REVIEWS}/prompts_test.jsonl", rule=f"{RULE}/prompts_test.jsonl")
KL_COEF = dict(reviews=0.05, rule=0.0)
MOST_KL = dict(reviews=20.0, rule=5.0)

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
BETAS = dict(spr=dict(reviews=(0.3, 1.0, 3.0), rule=(0.1, 0.3, 1.0)))
BETAS["dpo"] = dict(reviews=(0.03, 0.1, 0.3), rule=(0.03, 0.1, 0.3))
# 6,400 generated responses, greedy ones included: 100 updates of 64, or 4 iterations of 1,600.
METHODS = {
    "reinforce": "reinforce.py --batch-size 64 --total-episodes 6400",
    "rloo, N = 4": "reinforce.py --baseline leave-one-out --num-samples 4 --batch-size 16 --total-episodes 1600",
    "remax": "remax.py --batch-size 32 --total-episodes 3200",
    "remax, N = 3": "remax.py --num-samples 3 --batch-size 16 --total-episodes 1600",
    "ppo, 1 epoch": "ppo.py --num-epochs 1 --batch-size 64 --total-episodes 6400",
    "ppo, 4 epochs": "ppo.py --num-epochs 4 --batch-size 64 --total-episodes 6400",
    "spr": "spr.py --num-samples 8 --batch-size 200 --total-episodes 800",
    "best-of-n": "spr.py --weighting best-of-n --num-samples 8 --batch-size 200 --total-episodes 800",
    "dpo": "dpo.py",
}


@dataclass
class Args:
    stage: Literal["tuning", "final"] = "tuning"
    """The grid on the tuning seeds, or the chosen settings on fresh ones."""
    tasks: tuple[str, ...] = ("reviews", "rule")
    """Tasks, in turn."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of METHODS."""
    jobs: int = 2
    """Runs at a time, of one thread each."""
    results: Path = HERE / "results" / "tuned.jsonl"
    """File that the results are appended to."""


def command_of(task, method, rate, beta, seed) -> str:
    script, *flags = METHODS[method].split()
    flags += PAIRS[task].split() if method == "dpo" else DATA[task].split()
    flags += ["--response-length", "60"] if (method, task) == ("dpo", "rule") else []
    flags += ["--kl-coef", KL_COEF[task]] if script in ("remax.py", "reinforce.py", "ppo.py") else []
    flags += ["--beta", beta] if beta else []
    flags += ["--model", POLICY[task], "--learning-rate", rate, "--seed", seed]
    if method != "dpo":  # whose held-out rows are pairs of its data
        flags += ["--eval-dataset", HELD_OUT[task]]
    return " ".join(map(str, ["python", script, *flags]))


# ---------------------------------------------------------------- One run


def watch(task, path, script, *flags) -> None:
    """The script's own run; at each evaluation a line to the file at `path`."""
    import common

    started, spent, evaluate, held_out = time.process_time(), [0.0], common.evaluate, []

    def watched(policy, reference, prompts, rewards, micro_batch_size):
        rows = evaluate(policy, reference, prompts, rewards, micro_batch_size)
        before = time.process_time()
        if not held_out:
            backend = common.Backend(0, 1, policy.device, "float32", "sdpa", 0, False, False, micro_batch_size)
            length = policy.sampling.max_prompt_length
            data = common.load_prompts(str(ROOT / HELD_OUT[task]), (None, "train"), "prompt", policy.tokenizer, length)
            model = None if task == "rule" else str(ROOT / REVIEWS / "reward_model")
            gold = str(ROOT / GOLD[task])
            held_out.append((data, common.Reward(model, None if model else gold, 0.0, backend), gold, backend))
        data, reward, gold, backend = held_out[0]
        common.set_seed(7)
        responses = common.rollout(policy, data, num_samples=2, greedy=True)
        sampled = responses[: 2 * len(data)]
        logprobs_BT, ref_logprobs_BT = (common.forward_all(model, sampled, 64) for model in (policy, reference))
        golds_R = common.Reward(None, gold, 0.0, backend)(responses)
        point = dict(
            gold=golds_R[: len(sampled.texts)].mean().item(),
            reward=reward(sampled).mean().item(),
            kl=((logprobs_BT - ref_logprobs_BT) * sampled.mask_BT).sum(1).mean().item(),
            greedy_gold=golds_R[len(sampled.texts) :].mean().item(),
            length=sampled.mask_BT.sum(1).float().mean().item(),
            cpu_seconds=before - started - spent[0],
        )
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({name: round(value, 4) for name, value in point.items()}) + "\n")
        spent[0] += time.process_time() - before
        return rows

    common.evaluate = watched
    sys.argv = [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run(task, method, rate, beta, seed, tuning) -> dict:
    command = command_of(task, method, rate, beta, seed)
    every = dict(spr=1, dpo=13).get(METHODS[method].split(".")[0], 10)
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import tuned; tuned.watch(*sys.argv[1:])"
        words = [sys.executable, "-c", code, task, f"{folder}/points.jsonl", *command.split()[1:]]
        words += ["--eval-every", str(1_000_000 if tuning else every), "--output-dir", f"{folder}/run"]
        environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:  # such as a policy that has diverged
            return dict(failed=done.stderr.strip().splitlines()[-1][-200:])
        points = [json.loads(line) for line in Path(folder, "points.jsonl").read_text().splitlines()]
        metrics = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return points[-1] | dict(peak_memory_mb=round(metrics[-1]["peak_memory_bytes"] / 2**20), points=points)


# ---------------------------------------------------------------- Which runs


def grid(task, method) -> list[tuple]:
    """(learning rate, β or None), all that are tried first."""
    betas = BETAS[method][task] if method in BETAS else [None]
    return list(itertools.product(RATES, betas))


def chosen(results, task, method) -> tuple:
    """The setting with the highest mean gold reward of samples, of those whose KL stays below the task's limit."""
    means = {}
    for setting in grid(task, method):
        rows = [row for row in results if row["tuning"] and (row["task"], row["method"]) == (task, method)]
        rows = [row for row in rows if (row["learning_rate"], row["beta"]) == setting]
        if len(rows) == 2 and not any("failed" in row or row["kl"] >= MOST_KL[task] for row in rows):
            means[setting] = statistics.fmean(row["gold"] for row in rows)
    return max(means, key=means.get)


def main() -> None:
    args = tyro.cli(Args)
    path = args.results
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    done = {row["command"] for row in results}
    tuning = args.stage == "tuning"
    seeds = (101, 102) if tuning else range(1, 6)
    todo = []
    for task, method in itertools.product(args.tasks, args.methods):
        settings = grid(task, method) if tuning else [chosen(results, task, method)]
        todo += [(task, method, *setting, seed) for seed, setting in itertools.product(seeds, settings)]
    todo = [key for key in todo if command_of(*key) not in done]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(run, *key, tuning): key for key in todo}
        for future in concurrent.futures.as_completed(runs):
            names = ("task", "method", "learning_rate", "beta", "seed")
            row = dict(zip(names, runs[future])) | dict(tuning=tuning, commit=git.stdout.strip())
            row |= dict(command=command_of(*runs[future])) | future.result()
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print({name: row.get(name) for name in (*names, "gold", "kl", "failed")}, flush=True)


if __name__ == "__main__":
    main()
