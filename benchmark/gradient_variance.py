"""How noisy are the gradients of REINFORCE and of ReMax at the same parameters, on the same sampled responses?

    python benchmark/gradient_variance.py --policies examples/reviews/policy runs/…/policy [--batches 100]

For each policy: the gradient of many batches, once with each script's own `advantages` and `policy_loss`; the trace of
their covariance (the expected squared distance from the mean gradient); the ratio ReMax / REINFORCE with a bootstrap
interval over batches. Below 1 the greedy baseline helps. Appends to benchmark/results/gradient_variance.jsonl.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import reinforce  # noqa: E402
import remax  # noqa: E402


@dataclass
class Args:
    policies: tuple[str, ...] = (str(HERE.parent / "examples/reviews/policy"),)
    """Folders of the policies at which to compare; the reference is always the example's initial one."""
    batches: int = 100
    """Batches per policy."""
    batch_size: int = 64
    """Prompts per batch."""
    results: Path = HERE / "results" / "gradient_variance.jsonl"
    """File that the results are appended to."""


def flat_gradient(loss: torch.Tensor, parameters: list) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def trace_of_covariance(gram: torch.Tensor) -> torch.Tensor:
    """From the inner products of n gradients: (Σ|g|² − |Σg|²/n) / (n − 1)."""
    n = len(gram)
    return (gram.diagonal().sum() - gram.sum() / n) / (n - 1)


def main() -> None:
    args = tyro.cli(Args)
    flags = remax.Args(micro_batch_size=args.batch_size)
    common.check_flags(flags)  # makes the example's paths absolute
    backend = common.start_processes(flags)
    tokenizer = common.load_tokenizer(flags.model)
    sampling = common.Sampling(flags.max_prompt_length, flags.response_length, 1.0, 2 * args.batch_size)
    reference = common.freeze(common.load_policy(flags.model, tokenizer, sampling, backend), backend)
    prompts = common.load_prompts(flags.dataset, (None, "train"), "prompt", tokenizer, flags.max_prompt_length)
    reward = common.Reward(flags.reward_model, None, 0.0, backend)
    for path in args.policies:
        policy = common.load_policy(path, tokenizer, sampling, backend).to(backend.device)
        parameters = list(policy.parameters())
        gradients = {"reinforce": [], "remax": []}
        baselines, rewards = [], []
        for batch in range(args.batches):
            common.set_seed(0, batch)
            indices = common.shuffled_indices(len(prompts), 0, batch * args.batch_size, args.batch_size)
            batch_prompts = [prompts[i] for i in indices]
            both = common.rollout(policy, batch_prompts, num_samples=1, greedy=True)
            rewards_B, baseline_rewards_B = reward(both).chunk(2)  # the sampled rows, then the greedy rows
            sampled = both[: args.batch_size]
            logprobs_BT, mask_BT = common.forward(policy, sampled), sampled.mask_BT
            ref_logprobs_BT = common.forward_all(reference, sampled, args.batch_size)
            rest = (logprobs_BT, ref_logprobs_BT, mask_BT, flags.kl_coef, flags.gamma)
            plain_BT = reinforce.advantages(rewards_B, *rest)
            less_BT = remax.advantages(rewards_B, baseline_rewards_B, *rest)
            for name, script, advantages_BT in (("reinforce", reinforce, plain_BT), ("remax", remax, less_BT)):
                loss = script.policy_loss(logprobs_BT, advantages_BT, mask_BT, args.batch_size)
                gradients[name].append(flat_gradient(loss, parameters))
            rewards.append(rewards_B)
            baselines.append(baseline_rewards_B)
        grams = {}
        for name, vectors in gradients.items():
            stacked = torch.stack(vectors)
            grams[name] = (stacked @ stacked.T).double()
        ratio = (trace_of_covariance(grams["remax"]) / trace_of_covariance(grams["reinforce"])).item()
        generator, draws = torch.Generator().manual_seed(0), []
        for _ in range(2000):
            pick = torch.randint(args.batches, (args.batches,), generator=generator)
            traces = [trace_of_covariance(grams[name][pick][:, pick]) for name in ("remax", "reinforce")]
            draws.append((traces[0] / traces[1]).item())
        low, high = (sorted(draws)[i] for i in (50, 1949))
        mean, baseline = torch.cat(rewards).mean().item(), torch.cat(baselines).mean().item()
        row = dict(policy=path, batches=args.batches, batch_size=args.batch_size, ratio=ratio, low=low, high=high)
        row |= {f"trace_{name}": trace_of_covariance(gram).item() for name, gram in grams.items()}
        row |= dict(reward=mean, reward_std=torch.cat(rewards).std().item(), greedy_reward=baseline)
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{path}: variance of ReMax / REINFORCE {ratio:.2f} (95% interval {low:.2f} to {high:.2f}),", end=" ")
        print(f"reward {mean:.2f} ± {row['reward_std']:.2f}, greedy {baseline:.2f}", flush=True)


if __name__ == "__main__":
    main()
