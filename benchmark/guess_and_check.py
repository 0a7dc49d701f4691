"""All methods on the second example, whose reward is a rule: held-out success before and after training.

    python benchmark/guess_and_check.py [--methods remax reinforce …] [--seeds 5]

Every run is the script in a process of its own, with one thread. Then its policy gives 8 samples to each held-out
question. Appends one row per run to benchmark/results/guess_and_check.jsonl (a run that is there is not repeated) and
prints the table. --reward-function trains on another rule; the example's own rule still measures the result.
"""

import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
from rows import RESULTS, Run, markdown_table, read_rows, run_missing, run_script, with_spread  # noqa: E402

import common  # noqa: E402

EXAMPLE = "examples/guess_and_check"
POLICY = f"--model {EXAMPLE}/policy"
DATA = f"--dataset {EXAMPLE}/prompts.jsonl --eval-dataset {EXAMPLE}/prompts_test.jsonl"
GRADIENT = "--total-episodes 3200 --learning-rate 4e-4 --kl-coef 0 --response-length 60 --eval-size 100 --eval-every 5"
GROUP = "--total-episodes 800 --batch-size 8 --num-samples 8 --learning-rate 1e-3 --beta 0.0125 --response-length 60"
FIT = "--total-episodes 880 --batch-size 220 --beta 0.3 --learning-rate 1e-3 --response-length 60 --eval-size 100"
METHODS = dict(
    remax=f"remax.py {POLICY} {DATA} RULE {GRADIENT}",
    reinforce=f"reinforce.py {POLICY} {DATA} RULE {GRADIENT}",
    rloo=f"reinforce.py {POLICY} {DATA} RULE {GRADIENT} --baseline leave-one-out --num-samples 2",
    grpo=f"grpo.py {POLICY} {DATA} RULE {GROUP} --eval-size 100 --eval-every 5",
    ppo=f"ppo.py {POLICY} {DATA} RULE {GRADIENT} --num-epochs 1",
    spr=f"spr.py {POLICY} {DATA} RULE {FIT}",
    best_of_n=f"spr.py {POLICY} {DATA} RULE {FIT} --weighting best-of-n",
    uniform=f"spr.py {POLICY} {DATA} RULE {FIT} --weighting uniform",
    spr_token=f"spr_token.py {POLICY} {DATA} RULE {FIT.replace('880', '660')}",
    dpo=f"dpo.py {POLICY} --dataset {EXAMPLE}/preferences.jsonl --response-length 60 --learning-rate 4e-4",
)


OF_BEFORE = "benchmark/guess_and_check.py --methods before"


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of METHODS, or `before` for the policy as it is."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the runs."""
    reward_function: str = f"{EXAMPLE}/rule.py:reward"
    """The rule that is trained on."""
    results: Path = RESULTS / "guess_and_check.jsonl"
    """File that the results are appended to."""


def measure(run: Run, folder: Path) -> dict:
    """Trains; -> success and more of the policy, CPU seconds, and a curve from metrics.jsonl."""
    if run.method == "before":
        return success(Path(EXAMPLE, "policy")) | dict(cpu_seconds=0.0)
    done = run_script(run, folder)
    names = ("episodes", "eval_reward", "eval_response_length", "reward", "response_length")
    curve = {name: [row.get(name) for row in done["metrics"]] for name in names}
    return success(folder / "run" / "policy") | dict(cpu_seconds=done["cpu_seconds"], curve=curve)


def success(path: Path) -> dict:
    """Success, length and KL of 8 sampled responses and the greedy one to each held-out question."""
    os.chdir(ROOT)
    initial = f"{EXAMPLE}/policy"
    flags = dict(dtype="float32", attention="sdpa", zero_stage=0, offload=False, gradient_checkpointing=False)
    backend = common.start_processes(**flags)
    tokenizer = common.load_tokenizer(initial)
    sampling = common.Sampling(64, 60, 1.0, 900)
    policy, reference = (common.load_policy(str(folder), tokenizer, sampling, backend) for folder in (path, initial))
    prompts = common.load_prompts(f"{EXAMPLE}/prompts_test.jsonl", common.Layout(), tokenizer, 64)
    reward = common.Reward(function=f"{EXAMPLE}/rule.py:reward")
    common.set_seed(0)
    responses = common.rollout(policy, prompts, num_samples=8, greedy=True)
    sampled = responses[: 8 * len(prompts)]
    logprobs_BT, ref_logprobs_BT = (common.all_logprobs(model, sampled, 100) for model in (policy, reference))
    success_R = reward(responses)
    success_X8 = success_R[: len(sampled.texts)].view(-1, 8)
    claims = torch.tensor([text.endswith("!") for text in sampled.texts])
    first_guesses = [text.split(", ")[0].rstrip("!?") for text in sampled.texts]
    answers = [prompt.columns["answer"] for prompt in sampled.prompts]
    return dict(
        greedy_success=success_R[len(sampled.texts) :].mean().item(),
        greedy_length=responses.mask_BT[len(sampled.texts) :].sum(1).float().mean().item(),
        success=success_X8.mean().item(),
        pass_at_8=success_X8.amax(1).mean().item(),
        length=sampled.mask_BT.sum(1).float().mean().item(),
        kl=((logprobs_BT - ref_logprobs_BT) * sampled.mask_BT).sum(1).mean().item(),
        wrong_claims=(claims & (success_X8.flatten() == 0)).float().mean().item(),
        first_guess=statistics.fmean(guess == answer for guess, answer in zip(first_guesses, answers, strict=True)),
    )


def table(results: list[dict]) -> str:
    columns = dict(greedy_success="greedy success", success="sampled", pass_at_8="pass@8", length="tokens", kl="KL")
    columns |= dict(wrong_claims="wrong “!”", first_guess="first guess right", cpu_seconds="CPU s")
    lines = []
    for method in dict.fromkeys(row["method"] for row in results):
        rows = [row for row in results if row["method"] == method]
        digits = dict(length=1, cpu_seconds=1)
        cells = [with_spread([row[name] for row in rows], digits.get(name, 2)) for name in columns]
        lines.append([f"{method} ({len(rows)})", *cells])
    return markdown_table(["method", *columns.values()], lines)


def run_of(method: str, seed: int, reward_function: str) -> Run:
    command = METHODS.get(method, OF_BEFORE).replace("RULE", f"--reward-function {reward_function}")
    script, flags = command.split(" ", 1)
    name = method if reward_function == Args.reward_function else f"{method}, {reward_function}"
    if method in METHODS:
        flags += f" --seed {seed}"
    return Run("guess_and_check", name, script, flags, seed)


def main() -> None:
    args = tyro.cli(Args)
    runs = [run_of(method, seed, args.reward_function) for seed in args.seeds for method in args.methods]

    def shown(row: dict) -> str:
        return f"{row['method']}, seed {row['seed']}: greedy success {row['greedy_success']:.2f}"

    run_missing(runs, measure, args.results, show=shown)
    print("\n" + table(read_rows(args.results)))


if __name__ == "__main__":
    main()
