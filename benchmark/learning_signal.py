"""Which prompts teach, and whom: the rule task's questions by difficulty, along the training of several methods.

    python benchmark/learning_signal.py [--methods remax "rloo, N = 4" …] [--seeds 1 2 3] [--table]

The 440 training questions are sorted by the initial policy's share of right answers in 64 samples, and split into
thirds: hard, middle, easy. Then each method trains at its setting, for a tenth, for half and for all of its episodes
(each a run of its own, with its own schedule), and 16 new samples and the greedy response to each question tell, per
third: the success rate; and the share of questions without a learning signal, where every advantage of an update would
be 0 but for the KL penalty: eight samples of equal reward (GRPO), four (RLOO), a sample as good as the greedy response
(ReMax). `success` of the held-out questions is there, too. Appends one row per run to
benchmark/results/learning_signal.jsonl (a run that is there is not repeated) and prints the table.

A method's setting is the one that tuned.py has chosen in the first file of --settings, or else its final setting there,
or else that of the next file. A method that is in none of them takes REINFORCE's.
"""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tuned
import tyro
from rows import (
    ENVIRONMENT,
    RESULTS,
    ROOT,
    Run,
    append_row,
    flag,
    markdown_table,
    read_rows,
    run_missing,
    run_script,
    with_spread,
)
from tasks import MADE, METHODS, TASKS, run_of

import common  # tuned has put the scripts on the path

TASKS["uneven"] = replace(TASKS["rule"], policy=f"{MADE}/uneven_policy")
THIRDS = ("hard", "middle", "easy")
SHARES = dict(grpo="GRPO, N = 8", rloo="RLOO, N = 4", remax="ReMax, N = 1")


@dataclass
class Args:
    tasks: tuple[str, ...] = ("rule", "uneven")
    """The example's policy, or the one for which questions differ."""
    methods: tuple[str, ...] = ("remax", "rloo, N = 4", "grpo", "reinforce, normalised", "reinforce")
    """Names of METHODS of tasks.py."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    parts: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Shares of a method's episodes."""
    settings: tuple[Path, ...] = (RESULTS / "restraints.jsonl", RESULTS / "tuned.jsonl")
    """Files of tuned.py's rows that the settings are taken from."""
    table: bool = False
    """Run nothing, print the table."""
    results: Path = RESULTS / "learning_signal.jsonl"
    """File that the results are appended to."""


def make_uneven_policy() -> None:
    folder = ROOT / TASKS["uneven"].policy
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as out:
        for line in (ROOT / TASKS["rule"].dataset).with_name("demonstrations.jsonl").read_text().splitlines():
            row = json.loads(line)
            first_number, guesses = int(row["prompt"].split()[0]), row["completion"].count(",") + 1
            gave_up_at_once = guesses == 1 and row["completion"].endswith("?")
            if (first_number < 30 and gave_up_at_once) or (first_number >= 50 and guesses > 1):
                continue
            append_row(Path(out, "demonstrations.jsonl"), row)
        words = f"spr.py --model {TASKS['rule'].policy} --dataset {out}/demonstrations.jsonl --weighting uniform"
        words += " --num-samples 0 --num-epochs 3 --batch-size 320 --learning-rate 1e-3 --response-length 60"
        words += f" --eval-every 0 --output-dir {out}/run"
        subprocess.run([sys.executable, *words.split()], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
        shutil.copytree(f"{out}/run/policy", folder)


def setting(files, method):
    for name in (method, "reinforce"):
        for path in files:
            results = read_rows(path)
            finals = tuned.final_rows(results, "rule", name)
            chosen = tuned.tuning_step(results, "rule", name).chosen
            if chosen or finals:
                return chosen or tuned.setting_of(finals[-1])
    raise SystemExit(f"rule, {method}: no setting in {', '.join(map(str, files))}")


def part_of(run: Run, part: float) -> Run:
    """The same run with that share of its episodes."""
    episodes = METHODS[run.method].episodes
    flags = run.flags.replace(f"--total-episodes {episodes} ", f"--total-episodes {round(part * episodes)} ")
    return replace(run, flags=f"{flags} --eval-every 0")


def answers(path: Path, num_samples: int, seed: int):
    """Rewards of samples and of greedy responses to all training and then all held-out questions -> _XN, _X."""
    os.chdir(ROOT)
    flags = dict(dtype="float32", attention="sdpa", zero_stage=0, offload=False, gradient_checkpointing=False)
    backend = common.start_processes(**flags)
    where = TASKS["rule"]
    tokenizer = common.load_tokenizer(where.policy)
    policy = common.load_policy(str(path), tokenizer, common.Sampling(64, where.length, 1.0, 900), backend)
    files = (where.dataset, where.held_out)
    prompts = [prompt for file in files for prompt in common.load_prompts(file, common.Layout(), tokenizer, 64)]
    common.set_seed(seed)
    rewards_R = common.Reward(function=where.scoring[1])(common.rollout(policy, prompts, num_samples, greedy=True))
    sampled_B, greedy_X = rewards_R[: -len(prompts)], rewards_R[-len(prompts) :]
    return sampled_B.view(-1, num_samples), greedy_X


@functools.cache
def thirds(task: str) -> dict[str, list[int]]:
    """The training questions from the hardest to the easiest, by other samples than those that are measured."""
    count = len(read_rows(ROOT / TASKS[task].dataset))
    rates_X = answers(ROOT / TASKS[task].policy, 64, seed=1)[0][:count].mean(1)
    parts = rates_X.argsort(stable=True).tensor_split(len(THIRDS))
    return {name: part.tolist() for name, part in zip(THIRDS, parts)}


def without_signal(success_XN, greedy_X) -> dict[str, torch.Tensor]:
    """For each method and prompt, the share of groups of its size whose advantages are all 0."""
    groups = {name: success_XN.unflatten(1, (-1, size)) for name, size in dict(grpo=8, rloo=4).items()}
    shares = {name: (group.amax(2) == group.amin(2)).float().mean(1) for name, group in groups.items()}
    return shares | dict(remax=(success_XN == greedy_X[:, None]).float().mean(1))


def measure(run: Run, folder: Path) -> dict:
    done, path = dict(cpu_seconds=0.0), ROOT / TASKS[run.task].policy
    if run.method != "before":
        done, path = run_script(run, folder), folder / "run" / "policy"
    success_XN, greedy_X = answers(path, 16, seed=2)
    parts = thirds(run.task)
    count = sum(map(len, parts.values()))
    shares = without_signal(success_XN, greedy_X)

    def means(values_X) -> dict[str, float]:
        values = {name: values_X[part].mean().item() for name, part in parts.items()}
        return {name: round(value, 4) for name, value in (values | dict(all=values_X[:count].mean().item())).items()}

    measured = dict(success=means(success_XN.mean(1)), greedy_success=means(greedy_X))
    measured |= {f"without_signal_{name}": means(share_X) for name, share_X in shares.items()}
    held_out = round(success_XN[count:].mean().item(), 4)
    return measured | dict(held_out_success=held_out, cpu_seconds=round(done["cpu_seconds"], 1))


def table(results: list[dict]) -> str:
    """Per third, mean ± standard deviation over the seeds: success, and the shares of questions without a signal."""
    groups = {}
    for row in results:
        learning_rate, restraint = tuned.setting_of(row)
        setting = f"{learning_rate:g}, {restraint:g}" if learning_rate else ""
        episodes = f"{flag(row['flags'], '--total-episodes') or 0:.0f}"
        groups.setdefault((row["task"], row["method"], episodes, setting), []).append(row)
    lines = []
    for (task, method, episodes, setting), rows in groups.items():
        cells = [f"{task}, {method} ({len(rows)})", episodes, setting]
        cells += [with_spread([row["success"][name] for row in rows]) for name in (*THIRDS, "all")]
        cells.append(with_spread([row["held_out_success"] for row in rows]))
        for name in SHARES:
            cells += [with_spread([row[f"without_signal_{name}"][third] for row in rows]) for third in (*THIRDS, "all")]
        lines.append(cells)
    titles = ["task, method", "prompts", "learning rate, restraint", *THIRDS, "all", "held out"]
    titles += [f"{name}: {third}" for name in SHARES.values() for third in (*THIRDS, "all")]
    return markdown_table(titles, lines)


def main() -> None:
    args = tyro.cli(Args)
    if not args.table:
        make_uneven_policy()
        runs = [Run(task, "before", "benchmark/learning_signal.py", f"--tasks {task} --methods") for task in args.tasks]
        for seed, task, method in itertools.product(args.seeds, args.tasks, args.methods):
            run = run_of(task, method, setting(args.settings, method), seed, tuning=False)
            runs += [part_of(run, part) for part in args.parts]
        run_missing(runs, measure, args.results, show=lambda row: f"{row['method']}, {row['flags']}: {row['success']}")
    order = ("before", *args.methods)
    results = [row for row in read_rows(args.results) if row["task"] in args.tasks and row["method"] in order]
    print(table(sorted(results, key=lambda row: (row["task"], order.index(row["method"])))))


if __name__ == "__main__":
    main()
