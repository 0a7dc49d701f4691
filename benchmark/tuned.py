"""Each method at its own best learning rate (and β), at equal numbers of generated responses.

    python benchmark/tuned.py --stage tuning [--tasks reviews rule] [--methods …] [--jobs 2]
    python benchmark/tuned.py --stage final [--tasks reviews] [--seeds 1 2 3 4 5]
    python benchmark/tuned.py --table [--tasks reviews]

The rules are in benchmark/README.md. `tuning` runs the grid on the seeds 101 and 102, `final` the chosen settings on
fresh seeds; a run whose row is there is not repeated. At each evaluation the run's policy gives two samples to each of
the task's held-out prompts: gold reward, reward, win rate and KL to the initial policy are measured on these, in the
same way for all methods. Rows go to benchmark/results/tuned.jsonl; their script and flags repeat the training (the
folders in runs/benchmark that some flags name are made when a run needs them).
"""

import concurrent.futures
import itertools
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rows import RESULTS, ROOT, append_row, commit, read_rows

HERE = Path(__file__).resolve().parent
MADE = "runs/benchmark"  # reward models that the tasks below need
sys.path.insert(0, str(ROOT))


@dataclass
class Task:
    """Paths are relative to the project; `pairs` and `lengths` are flags."""

    dataset: str
    scoring: tuple[str | None, str | None]  # reward model, reward function
    pairs: str
    policy: str
    held_out: str
    gold: str
    kl_coef: float
    most_kl: float  # of settings that may be chosen
    betas: dict[str, tuple]
    length: int = 48  # tokens of the responses that are measured
    lengths: str = ""
    like: str = ""  # the task whose chosen settings are used
    times: int = 1  # how many times the episodes of METHODS


def example(folder, lengths="", **more) -> Task:
    return Task(
        dataset=f"{folder}/prompts.jsonl",
        pairs=f"--dataset {folder}/preferences.jsonl{lengths}",
        policy=f"{folder}/policy",
        held_out=f"{folder}/prompts_test.jsonl",
        lengths=lengths,
        **more,
    )


def reviews(reward_model="examples/reviews/reward_model", times=1) -> Task:
    return example(
        "examples/reviews",
        scoring=(reward_model, None),
        gold="examples/reviews/sentiment.py:reward",
        kl_coef=0.05,
        most_kl=20.0,
        betas=dict(spr=(0.3, 1.0, 3.0), dpo=(0.03, 0.1, 0.3)),
        like="reviews",
        times=times,
    )


RULE, SHARED = "examples/guess_and_check", "../shared"
TASKS = dict(
    reviews=reviews(),
    rule=example(
        RULE,
        lengths=" --response-length 60",
        scoring=(None, f"{RULE}/rule.py:reward"),
        gold=f"{RULE}/rule.py:reward",
        kl_coef=0.0,
        most_kl=5.0,
        betas=dict(spr=(0.1, 0.3, 1.0), dpo=(0.03, 0.1, 0.3)),
        length=60,
        like="rule",
    ),
    # Real text, which is not in the repository: a reward model of real preferences, judged by a counted sentiment.
    imdb=Task(
        dataset=f"{SHARED}/data/imdb_prompts.jsonl",
        scoring=(f"{MADE}/reward_model_imdb", None),
        lengths=" --max-prompt-length 32 --response-length 24",
        pairs=f"--dataset {SHARED}/data/imdb_preferences.jsonl --response-length 96",
        policy=f"{SHARED}/models/imdb-mini",
        held_out=f"{SHARED}/data/imdb_preferences_8words.jsonl",
        gold=f"{SHARED}/rewards/imdb_sentiment.py:reward",
        kl_coef=0.05,
        most_kl=20.0,
        betas=dict(spr=(0.1,), dpo=(0.1,)),
        length=24,
        like="imdb",
    ),
)
SHIFTS = {"reviews, rewards + 3.1": 3.1, "reviews, rewards + 9.3": 9.3}  # one and three standard deviations
TASKS |= {task: reviews(f"{MADE}/reward_model_plus_{shift}") for task, shift in SHIFTS.items()}
PAIRS = {"reviews for long, 300 pairs": 300, "reviews for long, 1000 pairs": 1000}
TASKS |= {task: reviews(f"{MADE}/reward_model_of_{pairs}", times=3) for task, pairs in PAIRS.items()}
TASKS["reviews for long, all pairs"] = reviews(times=3)

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
UPDATES = (0, 2, 4, 6, 8, 10, 12, 15, 20, 30, 50, 100)  # after which a path is measured, where an update is a step
# 6,400 generated responses, greedy ones included: 100 updates of 64, or 4 iterations of 1,600. Flags, then episodes.
METHODS = {
    "reinforce": ("reinforce.py --batch-size 64", 6400),
    "rloo, N = 4": ("reinforce.py --baseline leave-one-out --num-samples 4 --batch-size 16", 1600),
    "remax": ("remax.py --batch-size 32", 3200),
    "remax, N = 3": ("remax.py --num-samples 3 --batch-size 16", 1600),
    "remax, fitted": ("benchmark/fitted.py --batch-size 32", 3200),
    "ppo, 1 epoch": ("ppo.py --num-epochs 1 --batch-size 64", 6400),
    "ppo, 4 epochs": ("ppo.py --num-epochs 4 --batch-size 64", 6400),
    "spr": ("spr.py --num-samples 8 --batch-size 200", 800),
    "best-of-n": ("spr.py --weighting best-of-n --num-samples 8 --batch-size 200", 800),
    "dpo": ("dpo.py", 0),
}
SIZES = {  # at the settings that were chosen for N = 8
    "spr, N = 4": ("spr.py --num-samples 4 --batch-size 400", 1600),
    "spr, N = 16": ("spr.py --num-samples 16 --batch-size 100", 400),
    "best-of-n, N = 4": ("spr.py --weighting best-of-n --num-samples 4 --batch-size 400", 1600),
    "best-of-n, N = 16": ("spr.py --weighting best-of-n --num-samples 16 --batch-size 100", 400),
}


@dataclass
class Args:
    stage: Literal["tuning", "final"] = "tuning"
    """The grid on the tuning seeds, or the chosen settings on fresh ones."""
    tasks: tuple[str, ...] = ("reviews", "rule")
    """Names of TASKS."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of METHODS or SIZES."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the final runs."""
    jobs: int = 2
    """Runs at a time, of one thread each."""
    table: bool = False
    """Run nothing, print the table of the final rows."""
    results: Path = RESULTS / "tuned.jsonl"
    """File that the results are appended to."""


def command_of(task, method, rate, beta, seed) -> tuple[str, str]:
    """-> script, flags."""
    flags, episodes = (METHODS | SIZES)[method]
    script, _, flags = flags.partition(" ")
    where = TASKS[task]
    model, function = where.scoring
    reward = f"--reward-model {model}" if model else f"--reward-function {function}"
    prompts = f"--total-episodes {episodes * where.times} --dataset {where.dataset} {reward}{where.lengths}"
    words = ([flags] if flags else []) + [prompts if episodes else where.pairs]
    words += [f"--kl-coef {where.kl_coef}"] if script not in ("spr.py", "dpo.py") else []
    words += [f"--beta {beta}"] if beta else []
    words += [f"--model {where.policy} --learning-rate {rate} --seed {seed}"]
    words += [f"--eval-dataset {where.held_out}"] if episodes else []  # dpo.py's held-out rows are pairs of its data
    return script, " ".join(words)


# ---------------------------------------------------------------- One run


def watch(task, path, numbers, script, *flags) -> None:
    """The script's own run; at its evaluations of these numbers (or at all of them) a line to the file at `path`."""
    import common

    where = TASKS[task]
    numbers = list(map(int, numbers.split()))
    evaluate = common.evaluate
    kept = dict(calls=0, started=time.process_time())

    def begin(policy, reference, prompts, rewards, micro_batch_size):
        kept["rows"] = evaluate(policy, reference, prompts, rewards, micro_batch_size)  # in place of all later ones
        backend = common.Backend(0, 1, policy.device, "float32", "sdpa", 0, False, False)
        length = policy.sampling.max_prompt_length
        data = common.load_prompts(str(ROOT / where.held_out), (None, "train"), "prompt", policy.tokenizer, length)
        kept["prompts"] = data[:200]
        kept["reward"] = common.Reward(*where.scoring, backend=backend, micro_batch_size=micro_batch_size)
        kept["gold"] = common.Reward(function=where.gold)

    def measure(policy, reference) -> dict[str, float]:
        common.set_seed(7)
        usual, policy.sampling.response_length = policy.sampling.response_length, where.length
        responses = common.rollout(policy, kept["prompts"], num_samples=2, greedy=True)
        policy.sampling.response_length = usual
        sampled = responses[: 2 * len(kept["prompts"])]
        logprobs_BT, ref_logprobs_BT = (common.forward_all(model, sampled, 64) for model in (policy, reference))
        golds_R = kept["gold"](responses)
        golds_B = golds_R[: len(sampled.texts)]
        initial = kept.setdefault("initial", golds_B.tolist())
        return dict(
            gold=golds_B.mean().item(),
            reward=kept["reward"](sampled).mean().item(),
            win_rate=common.win_rate([dict(reward=gold) for gold in golds_B.tolist()], initial),
            kl=((logprobs_BT - ref_logprobs_BT) * sampled.mask_BT).sum(1).mean().item(),
            greedy_gold=golds_R[len(sampled.texts) :].mean().item(),
            length=sampled.mask_BT.sum(1).float().mean().item(),
        )

    def watched(policy, reference, *args):
        before = time.process_time()
        if kept["calls"] == 0:
            begin(policy, reference, *args)
        if not numbers or kept["calls"] in numbers:
            point = measure(policy, reference) | dict(cpu_seconds=before - kept["started"])
            append_row(path, {name: round(value, 4) for name, value in point.items()})
        kept["calls"] += 1
        kept["started"] += time.process_time() - before  # measuring is no part of the run
        return kept["rows"]

    common.evaluate = watched
    sys.argv = [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run(task, method, rate, beta, seed, tuning) -> dict:
    script, flags = command_of(task, method, rate, beta, seed)
    numbers = [TASKS[task].times * update for update in UPDATES]
    every = 1_000_000 if tuning else 13 if script == "dpo.py" else 1
    if tuning or script in ("spr.py", "dpo.py"):
        numbers = []
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import tuned; tuned.watch(*sys.argv[1:])"
        words = [sys.executable, "-c", code, task, f"{folder}/points.jsonl", " ".join(map(str, numbers))]
        words += [script, *flags.split(), "--eval-every", str(every), "--output-dir", f"{folder}/run"]
        environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:  # such as a policy that has diverged
            return dict(failed=done.stderr.strip().splitlines()[-1][-200:])
        points, metrics = read_rows(Path(folder, "points.jsonl")), read_rows(Path(folder, "run", "metrics.jsonl"))
    return points[-1] | dict(peak_memory_mb=round(metrics[-1]["peak_memory_bytes"] / 2**20), points=points)


def make_reward_model(task) -> None:
    """The example's reward model with all scores shifted, or one that has learned from other pairs."""
    model = TASKS[task].scoring[0]
    if not model or not model.startswith(MADE) or (ROOT / model).exists():
        return
    folder = ROOT / model
    folder.parent.mkdir(parents=True, exist_ok=True)
    if task in SHIFTS:
        shutil.copytree(ROOT / "examples/reviews/reward_model", folder)
        config = json.loads((folder / "config.json").read_text())
        config["reward_mean"] -= SHIFTS[task]  # which is taken from every score
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        return
    if task in PAIRS:
        pairs = folder.with_suffix(".jsonl")
        lines = (ROOT / "examples/reviews/preferences.jsonl").read_text().splitlines(keepends=True)
        pairs.write_text("".join(lines[: PAIRS[task]]))
        flags = ["--dataset", str(pairs), "--eval-size", "50"]
    else:
        flags = f"--dataset {SHARED}/data/imdb_preferences.jsonl --eval-size 400 --num-epochs 2".split()
        flags += ["--learning-rate", "3e-4"]
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "reward_model.py", *flags, "--output-dir", out, "--model", TASKS[task].policy]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
        shutil.copytree(f"{out}/reward_model", folder)


# ---------------------------------------------------------------- Which runs


def grid(task, method) -> list[tuple]:
    """(learning rate, β or None), all that are tried first."""
    return list(itertools.product(RATES, TASKS[task].betas.get(method, [None])))


def chosen(results, task, method) -> tuple:
    """The setting with the highest mean gold reward of samples, of those whose KL stays below the task's limit."""
    task, method, means = TASKS[task].like, method.split(",")[0] if method in SIZES else method, {}
    for setting in grid(task, method):
        rows = [row for row in results if row["tuning"] and (row["task"], row["method"]) == (task, method)]
        rows = [row for row in rows if (row["learning_rate"], row["beta"]) == setting]
        if len(rows) == 2 and not any("failed" in row or row["kl"] >= TASKS[task].most_kl for row in rows):
            means[setting] = statistics.fmean(row["gold"] for row in rows)
    return max(means, key=means.get)


def gold_at(points, kl) -> float:
    """The gold reward where a run's path first reaches that KL, on a line between evaluations; its end if never."""
    for before, after in itertools.pairwise(points):
        if after["kl"] >= kl:
            part = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before["gold"] + part * (after["gold"] - before["gold"])
    return points[-1]["gold"]


def lead(group, others) -> str:
    """Of the mean gold reward at equal KL, with its standard error. The KL is the lower of the two mean final ones."""
    kl = min(statistics.fmean(row["kl"] for row in rows) for rows in (group, others))
    golds = [[gold_at(row["points"], kl) for row in rows] for rows in (group, others)]
    error = sum(statistics.variance(values) / len(values) for values in golds) ** 0.5
    return f"{statistics.fmean(golds[0]) - statistics.fmean(golds[1]):+.2f} ± {error:.2f}"


def table(results, task) -> str:
    """Mean ± standard deviation over the seeds, at the end; the first line is the policy from which all start."""
    columns = dict(gold="gold reward", reward="reward", kl="KL", win_rate="win rate", greedy_gold="greedy gold")
    columns |= dict(length="tokens", cpu_seconds="CPU seconds", peak_memory_mb="peak MB")
    digits = dict(kl=1, length=1, cpu_seconds=0, peak_memory_mb=0)
    titles = ["method", *columns.values(), "gold − ReMax's, at equal KL", "learning rate", "β"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    rows = [row for row in results if row["task"] == task and not row["tuning"] and "failed" not in row]
    remax = [row for row in rows if row["method"] == "remax"]
    for method in [None, *METHODS, *SIZES]:
        group = [row for row in rows if row["method"] == method] if method else rows[:1]
        if not group:
            continue
        ends = group if method else [rows[0]["points"][0] | dict(learning_rate=None, beta=None)]
        cells = []
        for name in columns:
            values = [end[name] for end in ends if name in end]
            spread = f" ± {statistics.stdev(values):.{digits.get(name, 2)}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits.get(name, 2)}f}{spread}" if values else "")
        cells += [lead(group, remax) if method not in (None, "remax") and min(len(group), len(remax)) > 1 else ""]
        cells += [f"{ends[0][name]:g}" if ends[0][name] else "" for name in ("learning_rate", "beta")]
        lines.append(f"| {f'{method} ({len(ends)} seeds)' if method else 'before'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    results = read_rows(args.results)
    if args.table:
        print("\n\n".join(f"{task}\n\n{table(results, task)}" for task in args.tasks))
        return
    head = commit()
    done = {(row["script"], row["flags"]) for row in results}
    tuning = args.stage == "tuning"
    todo = []
    for task, method in itertools.product(args.tasks, args.methods):
        if not (ROOT / TASKS[task].held_out).exists():
            sys.exit(f"{task}: needs {TASKS[task].held_out}, development data that is not in this repository")
        make_reward_model(task)
        settings = grid(task, method) if tuning else [chosen(results, task, method)]
        seeds = (101, 102) if tuning else args.seeds
        todo += [(task, method, *setting, seed) for seed, setting in itertools.product(seeds, settings)]
    todo = [key for key in todo if command_of(*key) not in done]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(run, *key, tuning): key for key in todo}
        for future in concurrent.futures.as_completed(runs):
            names = ("task", "method", "learning_rate", "beta", "seed")
            row = dict(zip(names, runs[future])) | dict(tuning=tuning, commit=head)
            row |= dict(zip(("script", "flags"), command_of(*runs[future]))) | future.result()
            append_row(args.results, row)
            print({name: row.get(name) for name in (*names, "gold", "kl", "failed")}, flush=True)


if __name__ == "__main__":
    main()
