"""How noisy is the gradient of one update with each baseline, at the same parameters and on the same responses?

    python benchmark/gradient_variance.py [--tasks reviews rule] [--batches 50]

Policies: the initial one, and those after 1,600 and 3,200 prompts of ReMax at its setting in restraints.jsonl (two
runs, made in runs/benchmark). For each policy it takes many batches of 64 prompts with one sampled and one greedy
response each, and their gradients by remax.py's `advantages` and `policy_loss` with each baseline; and as many batches
that generate as many responses, 32 prompts with four samples each, for the baselines that are made of siblings: RLOO,
OPO and shrinkage. It prints the trace of each gradient's covariance, divided by the trace without a baseline, with a
bootstrap interval over batches, and the squared length of the expected gradient, divided likewise: 1 for an unbiased
gradient but for the noise of this estimate. Appends to benchmark/results/gradient_variance.jsonl.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import tasks  # noqa: E402
import tuned  # noqa: E402
from choice import Setting  # noqa: E402
from fitted import fitted_baselines, mean_of_others  # noqa: E402
from rows import ENVIRONMENT, RESULTS, Run, append_row, commit, markdown_table, read_rows  # noqa: E402

import common  # noqa: E402
import reinforce  # noqa: E402
import remax  # noqa: E402


@dataclass
class Args:
    tasks: tuple[str, ...] = ("reviews", "rule")
    """Names of tasks of tuned.py."""
    episodes: tuple[int, ...] = (0, 1600, 3200)
    """Prompts that the policies have been trained on."""
    batches: int = 50
    """Batches per policy."""
    batch_size: int = 64
    """Prompts per batch."""
    results: Path = RESULTS / "gradient_variance.jsonl"
    """File that the results are appended to."""


def baselines(rewards_B, greedy_B) -> dict[str, torch.Tensor]:
    mean_B, greedy_mean_B = mean_of_others(rewards_B), mean_of_others(greedy_B)
    return {
        "no baseline": torch.zeros_like(rewards_B),
        "batch mean": mean_B,
        "greedy (ReMax)": greedy_B,
        "greedy, c = 1/2": mean_B + (greedy_B - greedy_mean_B) / 2,
        "greedy, c = 1": mean_B + greedy_B - greedy_mean_B,
        "greedy, c fitted": fitted_baselines(rewards_B, greedy_B),
    }


def opo(rewards_B, lengths_B, num_samples) -> torch.Tensor:
    """OPO (arXiv 2505.23585), Σ_j l_j r_j / Σ_j l_j over a prompt's N samples -> baselines_B.

    That is the baseline of least variance if a gradient's squared length grows with the response's length l and is
    independent of its reward. Sample i's own reward is in its baseline, so the gradient is biased: with equal lengths
    it is (N − 1) / N of the unbiased one, and for that reason alone its variance is the square of that.
    """
    rewards_XN, lengths_XN = rewards_B.view(-1, num_samples), lengths_B.view(-1, num_samples)  # X prompts
    baselines_X = (lengths_XN * rewards_XN).sum(1) / lengths_XN.sum(1)
    return baselines_X.repeat_interleave(num_samples)


def opo_of_others(rewards_B, lengths_B, num_samples) -> torch.Tensor:
    """The same without the sample's own reward and length, so that the gradient is unbiased -> baselines_B."""
    rewards_XN, lengths_XN = rewards_B.view(-1, num_samples), lengths_B.view(-1, num_samples)
    products_XN = lengths_XN * rewards_XN
    sums_XN = products_XN.sum(1, keepdim=True) - products_XN
    return (sums_XN / (lengths_XN.sum(1, keepdim=True) - lengths_XN)).view(-1)


def shrinkage(rewards_B, num_samples) -> torch.Tensor:
    """The shrinkage baseline (arXiv 2511.03710): the mean of a sample's siblings, drawn to the mean of other prompts.

    b_i = (1 − λ) · mean of the other N − 1 samples + λ · mean of all samples of the other prompts -> baselines_B,
    λ = v / (v + s). Over the other prompts, v is the mean of their rewards' variances (unbiased) divided by N, s the
    variance of their means (not unbiased). Nothing of λ depends on the prompt's own samples, so the gradient is
    unbiased. As in the authors' code.
    """
    rewards_XN = rewards_B.view(-1, num_samples)
    means_X = rewards_XN.mean(1)
    mean_X = mean_of_others(means_X)
    v_X = mean_of_others(rewards_XN.var(1) / num_samples)
    s_X = mean_of_others(means_X.square()) - mean_X.square()
    lambda_X = v_X / (v_X + s_X.clamp(min=0) + 1e-6)
    siblings_XN = reinforce.leave_one_out(rewards_B, num_samples).view(-1, num_samples)
    return torch.lerp(siblings_XN, mean_X[:, None], lambda_X[:, None]).view(-1)


def baselines_of_siblings(rewards_B, lengths_B, num_samples) -> dict[str, torch.Tensor]:
    return {
        "RLOO, N = 4, as many responses": reinforce.leave_one_out(rewards_B, num_samples),
        "OPO, N = 4, as many responses": opo(rewards_B, lengths_B, num_samples),
        "OPO without the own sample, N = 4": opo_of_others(rewards_B, lengths_B, num_samples),
        "shrinkage, N = 4, as many responses": shrinkage(rewards_B, num_samples),
    }


def setting_of_remax(task) -> Setting:
    """The learning rate and KL coefficient of ReMax's final runs."""
    return tuned.setting_of(tuned.final_rows(read_rows(RESULTS / "restraints.jsonl"), task, "remax")[-1])


def trained(task, setting, episodes) -> str:
    """The folder of a policy that ReMax has trained on this many prompts."""
    if episodes == 0:
        return str(ROOT / tasks.TASKS[task].policy)
    folder = ROOT / tasks.MADE / f"{task}_{episodes}_{setting.learning_rate}_{setting.restraint}"
    if not folder.exists():
        run = tasks.run_of(task, "remax", setting, seed=1, tuning=False)
        flags = run.flags.replace("--total-episodes 3200", f"--total-episodes {episodes}").split()
        command = [sys.executable, run.script, *flags, "--eval-every", "0", "--output-dir", str(folder)]
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return str(folder / "policy")


def gradient(policy, sampled, ref_logprobs_BT, rewards_B, baselines_B, kl_coef) -> torch.Tensor:
    """One update's, as one vector."""
    logprobs_BT, mask_BT = common.logprobs(policy, sampled), sampled.mask_BT
    rest = (logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef, 1.0)
    advantages_BT = remax.advantages(rewards_B, baselines_B, *rest)
    loss = remax.policy_loss(logprobs_BT, advantages_BT, mask_BT, len(rewards_B))
    parts = torch.autograd.grad(loss, list(policy.engine.parameters()))
    return torch.cat([part.flatten() for part in parts])


def trace_of_covariance(gram: torch.Tensor) -> torch.Tensor:
    """From the inner products of n gradients: (Σ|g|² − |Σg|²/n) / (n − 1)."""
    n = len(gram)
    return (gram.diagonal().sum() - gram.sum() / n) / (n - 1)


def squared_length(gram: torch.Tensor) -> torch.Tensor:
    """Of the expected gradient, unbiased: the mean inner product of two different gradients."""
    n = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))


def table(results: list[dict]) -> str:
    """The newest row of each method and policy: variance relative to no baseline, with its interval."""
    cells = {}
    for row in results:
        cell = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        cells[row["method"], row["task"], row["episodes"]] = "1" if row["method"] == "no baseline" else cell
    policies = sorted({(task, episodes) for _, task, episodes in cells})
    methods = dict.fromkeys(method for method, _, _ in cells)
    titles = [f"{task}, {episodes or 'initial'}" for task, episodes in policies]
    lines = [[method, *(cells[method, *policy] for policy in policies)] for method in methods]
    return markdown_table(["baseline", *titles], lines)


def main() -> None:
    args = tyro.cli(Args)
    flags = dict(dtype="float32", attention="sdpa", zero_stage=0, offload=False, gradient_checkpointing=False)
    backend = common.start_processes(**flags)
    head = commit()
    for task in args.tasks:
        where = tasks.TASKS[task]
        setting = setting_of_remax(task)
        tokenizer = common.load_tokenizer(where.policy)
        sampling = common.Sampling(64, where.length, 1.0, 128)
        prompts = common.load_prompts(str(ROOT / where.dataset), common.Layout(), tokenizer, 64)
        reward = common.Reward(*where.scoring, backend=backend, micro_batch_size=args.batch_size)
        reference = common.load_policy(where.policy, tokenizer, sampling, backend)
        for episodes in args.episodes:
            policy = common.load_policy(trained(task, setting, episodes), tokenizer, sampling, backend)
            gradients, rewards, greedy_rewards = {}, [], []

            for batch in range(args.batches):
                common.set_seed(0, batch)
                numbers = common.shuffled_indices(len(prompts), 0, batch * args.batch_size, args.batch_size)
                some = [prompts[i] for i in numbers]
                responses = common.rollout(policy, some, num_samples=1, greedy=True)
                rewards_B, greedy_B = reward(responses).chunk(2)  # the sampled rows, then the greedy rows
                sampled = responses[: args.batch_size]
                ref_logprobs_BT = common.all_logprobs(reference, sampled, args.batch_size)
                for name, baselines_B in baselines(rewards_B, greedy_B).items():
                    vector = gradient(policy, sampled, ref_logprobs_BT, rewards_B, baselines_B, setting.restraint)
                    gradients.setdefault(name, []).append(vector)
                four = common.rollout(policy, some[::2], num_samples=4, greedy=False)
                fours_B = reward(four)
                ref_logprobs_BT = common.all_logprobs(reference, four, args.batch_size)
                lengths_B = four.mask_BT.sum(1).to(fours_B)
                for name, baselines_B in baselines_of_siblings(fours_B, lengths_B, 4).items():
                    vector = gradient(policy, four, ref_logprobs_BT, fours_B, baselines_B, setting.restraint)
                    gradients.setdefault(name, []).append(vector)
                rewards.append(rewards_B)
                greedy_rewards.append(greedy_B)

            grams = {name: torch.stack(vectors) for name, vectors in gradients.items()}
            grams = {name: (stacked @ stacked.T).double() for name, stacked in grams.items()}
            generator = torch.Generator().manual_seed(0)
            picks = [torch.randint(args.batches, (args.batches,), generator=generator) for _ in range(2000)]
            nones = [trace_of_covariance(grams["no baseline"][pick][:, pick]) for pick in picks]
            whole = trace_of_covariance(grams["no baseline"])
            for name, gram in grams.items():
                ratio = trace_of_covariance(gram) / whole
                signal = squared_length(gram) / squared_length(grams["no baseline"])
                draws = sorted(trace_of_covariance(gram[p][:, p]) / none for p, none in zip(picks, nones))
                run = Run(task, name, "benchmark/gradient_variance.py", f"--tasks {task}", seed=0)
                row = run.row(
                    head,
                    episodes=episodes,
                    batches=args.batches,
                    batch_size=args.batch_size,
                    ratio=ratio.item(),
                    low=draws[50].item(),
                    high=draws[1949].item(),
                    signal=signal.item(),
                    reward=torch.cat(rewards).mean().item(),
                    reward_std=torch.cat(rewards).std().item(),
                    greedy_reward=torch.cat(greedy_rewards).mean().item(),
                )
                append_row(args.results, row)
                print(f"{task}, {episodes}: {name} {ratio:.3f} ({draws[50]:.3f} to {draws[1949]:.3f})", flush=True)
    print("\n" + table(read_rows(args.results)))


if __name__ == "__main__":
    main()
