"""Each method at its own best learning rate and restraint, at equal numbers of generated responses.

    python benchmark/tuned.py --stage tuning [--tasks reviews rule] [--methods …] [--jobs 2]
    python benchmark/tuned.py --stage final [--tasks reviews] [--seeds 1 2 3 4 5]
    python benchmark/tuned.py --table [--tasks reviews]

The rules are in benchmark/README.md. `tuning` runs each method's grid as choice.py asks for it, `final` the chosen
settings on fresh seeds; a run whose row is there is not repeated, so a stopped program goes on where it was. In the
background: `nohup nice -n 19 python benchmark/tuned.py --stage tuning > tuned.log &`. At each evaluation the run's
policy gives two samples to each of the task's held-out prompts: gold reward, reward, win rate and KL to the initial
policy are measured on these, in the same way for all methods. Rows go to benchmark/results/restraints.jsonl; their
script and flags repeat the training (the folders in runs/benchmark that some flags name are made when a run needs
them). tuned.jsonl has the rows of the round before, in which the KL coefficient was not tuned.
"""

import itertools
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import choice
import tyro
from choice import Result, Setting, Step
from rows import ENVIRONMENT, RESULTS, ROOT, Run, append_row, flag, markdown_table, read_rows, run_missing, with_spread
from tasks import METHODS, SIZES, TASKS, TITLES, grid, make_reward_model, run_of

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

UPDATES = (0, 2, 4, 6, 8, 10, 12, 15, 20, 30, 50, 100)  # after which a path is measured, where an update is a step
KL_LIMITS = (2, 5, 10, 20)  # nats, of the table of envelopes
ITERATIVE = ("spr.py", "spr_token.py", "dpo.py")  # few evaluations: all are measured


@dataclass
class Args:
    stage: Literal["tuning", "final"] = "tuning"
    """The grids on the tuning seeds, or the chosen settings on fresh ones."""
    tasks: tuple[str, ...] = ("reviews", "rule")
    """Names of TASKS."""
    methods: tuple[str, ...] = tuple(method for method in METHODS if method != "remax, fitted")
    """Names of METHODS or, in the final stage, of SIZES."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the final runs."""
    jobs: int = 2
    """Runs at a time, of one thread each."""
    table: bool = False
    """Run nothing, print the table of the final rows."""
    results: Path = RESULTS / "restraints.jsonl"
    """File that the results are appended to."""


# ---------------------------------------------------------------- One run


def watch(task, path, numbers, script, *flags) -> None:
    """Runs the script; at its evaluations with these numbers, or at all if there are none, adds a line to `path`."""
    import common

    where = TASKS[task]
    numbers = list(map(int, numbers.split()))
    evaluate = common.evaluate
    kept = dict(calls=0, started=time.process_time())

    def begin(policy, reference, prompts, rewards, micro_batch_size):
        kept["rows"] = evaluate(policy, reference, prompts, rewards, micro_batch_size)  # in place of all later ones
        backend = common.Backend(
            rank=0,
            world_size=1,
            device=policy.device,
            dtype="float32",
            attention="sdpa",
            zero_stage=0,
            offload=False,
            gradient_checkpointing=False,
            lora_rank=0,
        )
        length = policy.sampling.max_prompt_length
        data = common.load_prompts(str(ROOT / where.held_out), common.Layout(), policy.tokenizer, length)
        kept["prompts"] = data[:200]
        kept["reward"] = common.Reward(*where.scoring, backend=backend, micro_batch_size=micro_batch_size)
        kept["gold"] = common.Reward(function=where.gold)

    def measure(policy, reference) -> dict[str, float]:
        common.set_seed(7)
        usual, policy.sampling.response_length = policy.sampling.response_length, where.length
        responses = common.rollout(policy, kept["prompts"], num_samples=2, greedy=True)
        policy.sampling.response_length = usual
        sampled = responses[: 2 * len(kept["prompts"])]
        logprobs_BT, ref_logprobs_BT = (common.all_logprobs(model, sampled, 64) for model in (policy, reference))
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
        kept["started"] += time.process_time() - before  # measuring does not count as the run's time
        return kept["rows"]

    common.evaluate = watched
    sys.argv = [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def measure(run: Run, folder: Path) -> dict:
    """Trains, and measures the policy at the evaluations: where it ends, and in a final run its path, too."""
    numbers = [] if run.tuning or run.script in ITERATIVE else [TASKS[run.task].times * update for update in UPDATES]
    every = 1_000_000 if run.tuning else 13 if run.script == "dpo.py" else 1
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import tuned; tuned.watch(*sys.argv[1:])"
    words = [sys.executable, "-c", code, run.task, f"{folder}/points.jsonl", " ".join(map(str, numbers))]
    words += [run.script, *run.flags.split(), "--eval-every", str(every), "--output-dir", f"{folder}/run"]
    environment = ENVIRONMENT | dict(HF_HUB_OFFLINE="1")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][-200:]
        if done.returncode != 1 or "not finite" not in message:
            raise RuntimeError(f"{run.script} {run.flags}\n{done.stderr[-2000:]}")
        return dict(failed=message)  # the policy has diverged, which is a result
    points, metrics = read_rows(folder / "points.jsonl"), read_rows(folder / "run" / "metrics.jsonl")
    return points[-1] | dict(peak_memory_mb=round(metrics[-1]["peak_memory_bytes"] / 2**20), points=points)


# ---------------------------------------------------------------- Which runs


def setting_of(row: dict) -> Setting:
    """The learning rate, and the KL coefficient or β, of a row."""
    kl_coef, beta = flag(row["flags"], "--kl-coef"), flag(row["flags"], "--beta")
    return Setting(flag(row["flags"], "--learning-rate"), beta if kl_coef is None else kl_coef)


def tuning_rows(results: list[dict], task: str, method: str) -> list[dict]:
    return [row for row in results if row["tuning"] and (row["task"], row["method"]) == (task, method)]


def tuning_step(results: list[dict], task: str, method: str) -> Step:
    """What the rule of choice.py asks for next, or has chosen."""
    ends = {}
    for row in tuning_rows(results, task, method):
        gold, kl = row.get("gold", float("-inf")), row.get("kl", float("inf"))
        ends[setting_of(row), row["seed"]] = Result(gold, kl)
    return choice.next_step(ends, *grid(task, method), TASKS[task].most_kl)


def tune(args: Args) -> None:
    """Round by round: what the rule asks for depends on the rows of the round before."""
    pairs = list(itertools.product(args.tasks, args.methods))
    while True:
        results = read_rows(args.results)
        steps = {pair: tuning_step(results, *pair) for pair in pairs}
        runs = [
            run_of(task, method, setting, seed, tuning=True)
            for (task, method), step in steps.items()
            for setting, seed in step.missing
        ]
        if not runs:
            break
        run_missing(runs, measure, args.results, args.jobs, shown)
    for (task, method), step in steps.items():
        print(f"{task}, {method}: {step.chosen or 'no setting stays within the limit of KL'}")


def chosen(results: list[dict], task: str, method: str) -> Setting:
    """The tuned setting of the task and method, or of those that they take theirs from."""
    like, base = TASKS[task].like, method.split(",")[0] if method in SIZES else method
    setting = tuning_step(results, like, base).chosen
    if setting is None:
        sys.exit(f"{like}, {base}: no setting is chosen yet; run benchmark/tuned.py --stage tuning")
    return setting


def final_rows(results: list[dict], task: str, method: str) -> list[dict]:
    """The final runs at the newest setting, without those that have failed."""
    rows = [row for row in results if not row["tuning"] and (row["task"], row["method"]) == (task, method)]
    return [row for row in rows if setting_of(row) == setting_of(rows[-1]) and "failed" not in row]


def shown(row: dict) -> str:
    end = row.get("failed") or f"gold {row['gold']:.2f}, KL {row['kl']:.1f}"
    return f"{row['task']}, {row['method']}, {setting_of(row)}, seed {row['seed']}: {end}"


# ---------------------------------------------------------------- The table


def table(results: list[dict], task: str) -> str:
    """Mean ± standard deviation over the seeds, at the end; the first line is the policy from which all start."""
    columns = dict(gold="gold reward", kl="KL", win_rate="win rate", greedy_gold="greedy gold", length="tokens")
    columns |= dict(cpu_seconds="CPU seconds")
    digits = dict(kl=1, length=1, cpu_seconds=0)

    def cells(ends: list[dict]) -> list[str]:
        values = {name: [end[name] for end in ends if name in end] for name in columns}
        return [with_spread(values[name], digits.get(name, 2)) for name in columns]

    lines = []
    for method in METHODS:
        rows = final_rows(results, task, method)
        if rows and not lines:
            lines.append(["before", *cells([rows[0]["points"][0]]), "", ""])
        if rows:
            setting = setting_of(rows[0])
            restraint = "" if setting.restraint is None else f"{setting.restraint:g}"
            lines.append([TITLES[method], *cells(rows), f"{setting.learning_rate:g}", restraint])
    return markdown_table(["method", *columns.values(), "learning rate", "KL coefficient or β"], lines)


def envelope(results: list[dict], task: str, method: str) -> list[dict]:
    """The ends of the method's tuning runs that no nearer one surpasses in gold reward, from the nearest on."""
    ends = [row for row in tuning_rows(results, task, method) if "failed" not in row]
    upper = []
    for end in sorted(ends, key=lambda end: end["kl"]):
        if not upper or end["gold"] > upper[-1]["gold"]:
            upper.append(end)
    return upper


def envelope_table(results: list[dict], task: str) -> str:
    """The highest gold reward of a tuning run that ended at no more than so many nats, and the number of runs."""
    lines = []
    for method in METHODS:
        upper = envelope(results, task, method)
        cells = []
        for limit in KL_LIMITS:
            golds = [end["gold"] for end in upper if end["kl"] <= limit]
            cells.append(f"{golds[-1]:.2f}" if golds else "–")
        if upper:
            lines.append([TITLES[method], *cells, str(len(tuning_rows(results, task, method)))])
    return markdown_table(["method", *(f"≤ {limit} nats" for limit in KL_LIMITS), "runs"], lines)


def main() -> None:
    args = tyro.cli(Args)
    if args.table:
        results = read_rows(args.results)
        for task in args.tasks:
            print(f"{task}\n\n{table(results, task)}\n\n{envelope_table(results, task)}\n")
        return
    for task in args.tasks:
        if not (ROOT / TASKS[task].held_out).exists():
            sys.exit(f"{task}: needs {TASKS[task].held_out}, development data that is not in this repository")
        make_reward_model(task)
    if args.stage == "tuning":
        tune(args)
        return
    results = read_rows(args.results)
    runs = [
        run_of(task, method, chosen(results, task, method), seed, tuning=False)
        for task, method, seed in itertools.product(args.tasks, args.methods, args.seeds)
    ]
    run_missing(runs, measure, args.results, args.jobs, shown)


if __name__ == "__main__":
    main()
