"""Which KL does a penalty descend? Five penalties beside the gradient of KL(π ‖ π_ref), by enumeration in float64.

    python benchmark/which_kl.py

π and π_ref write four tokens of a vocabulary of five, so all 625 responses can be enumerated and no gradient has any
noise. Each context has its own logits. Those of π_ref are Gaussian; π adds Gaussian noise to them, whose scale sets the
distance. Of each penalty this takes the expected gradient on policy (one optimizer step per rollout). Its rows, means
over ten pairs of policies at each scale, replace benchmark/results/which_kl.jsonl; figures.py draws them.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from rows import RESULTS, ROOT, append_row, commit, given_flags

sys.path.insert(0, str(ROOT))
import grpo
import remax

VOCABULARY, LENGTH = 5, 4
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.4, 3.2, 4.8, 6.4)
PAIRS = 10
RESPONSES_BT = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


def context_numbers():
    """-> contexts_BT: the row of logits that predicts each token; a row for each beginning of a response."""
    numbers = {}
    contexts = []
    for tokens in RESPONSES_BT.tolist():
        contexts.append([numbers.setdefault(tuple(tokens[:t]), len(numbers)) for t in range(LENGTH)])
    return torch.tensor(contexts)


CONTEXTS_BT = context_numbers()


def logprobs(logits_CV):
    """-> logprobs_BT of all responses."""
    return logits_CV.log_softmax(-1)[CONTEXTS_BT, RESPONSES_BT]


# Each penalty as a loss: its mean over responses of the policy, each weighted by its probability.


def reward_path(logprobs_BT, ref_logprobs_BT, weights_B):
    """remax.py and ppo.py: k1, part of the return, so that a token answers for the later ones, too."""
    nothing_B = torch.zeros_like(weights_B)
    ones_BT = torch.ones_like(logprobs_BT)
    advantages_BT = remax.advantages(
        nothing_B, nothing_B, logprobs_BT, ref_logprobs_BT, ones_BT, kl_coef=1.0, gamma=1.0
    )
    return remax.policy_loss(logprobs_BT, weights_B[:, None] * advantages_BT, ones_BT, denominator=1)


def k1_in_the_loss(logprobs_BT, ref_logprobs_BT, weights_B):
    return (weights_B[:, None] * (logprobs_BT - ref_logprobs_BT)).sum()


def k2_in_the_loss(logprobs_BT, ref_logprobs_BT, weights_B):
    return (weights_B[:, None] * 0.5 * (logprobs_BT - ref_logprobs_BT) ** 2).sum()


def k3_in_the_loss(logprobs_BT, ref_logprobs_BT, weights_B):
    """grpo.py with advantages of 0."""
    nothing_B = torch.zeros_like(weights_B)
    ones_BT = torch.ones_like(logprobs_BT)
    inputs = (logprobs_BT, logprobs_BT.detach(), ref_logprobs_BT, nothing_B, ones_BT)
    return grpo.policy_loss(*inputs, beta=1.0, clip_range=0.2, weights_B=weights_B)


def corrected_k3(logprobs_BT, ref_logprobs_BT, weights_B):
    """k3 times the importance ratio, which is 1 but has a gradient: the default of TRL 1.16."""
    log_ratios_BT = ref_logprobs_BT - logprobs_BT
    ratios_BT = (logprobs_BT - logprobs_BT.detach()).exp()
    return (weights_B[:, None] * ratios_BT * (log_ratios_BT.exp() - 1 - log_ratios_BT)).sum()


PENALTIES = {
    "k1 in the reward": reward_path,
    "k1 in the loss": k1_in_the_loss,
    "k2 in the loss": k2_in_the_loss,
    "k3 in the loss": k3_in_the_loss,
    "k3 × ratio in the loss": corrected_k3,
}


def gradients(scale, seed) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    """-> KL(π ‖ π_ref) in nats, its gradient in the logits of π, and each penalty's expected gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = (int(CONTEXTS_BT.max()) + 1, VOCABULARY)
    ref_logits_CV, noise_CV = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    logits_CV = (ref_logits_CV + scale * noise_CV).requires_grad_()
    ref_logprobs_BT = logprobs(ref_logits_CV)

    logprobs_BT = logprobs(logits_CV)
    kl = (logprobs_BT.sum(1).exp() * (logprobs_BT - ref_logprobs_BT).sum(1)).sum()
    (true,) = torch.autograd.grad(kl, logits_CV)
    found = {}
    for name, penalty in PENALTIES.items():
        logprobs_BT = logprobs(logits_CV)
        loss = penalty(logprobs_BT, ref_logprobs_BT, logprobs_BT.detach().sum(1).exp())
        (found[name],) = torch.autograd.grad(loss, logits_CV)
    return kl.item(), true, found


def measure(scale) -> list[dict]:
    """-> one row per penalty: means over the pairs of policies; the cosine is None for a gradient of 0."""
    distances, cosines, lengths = [], {name: [] for name in PENALTIES}, {name: [] for name in PENALTIES}
    for seed in range(1, PAIRS + 1):
        kl, true, found = gradients(scale, seed)
        distances.append(kl)
        for name, gradient in found.items():
            length = (gradient.norm() / true.norm()).item()
            lengths[name].append(length)
            if length > 1e-9:
                cosines[name].append(((gradient * true).sum() / gradient.norm() / true.norm()).item())
    rows = []
    for name in PENALTIES:
        cosine = round(statistics.fmean(cosines[name]), 4) if cosines[name] else None
        row = dict(method=name, scale=scale, kl=round(statistics.fmean(distances), 4), cosine=cosine)
        rows.append(row | dict(length=round(statistics.fmean(lengths[name]), 4)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=RESULTS / "which_kl.jsonl")
    args = parser.parse_args()
    args.results.unlink(missing_ok=True)
    shared = dict(task="which kl", seed=1, tuning=False, commit=commit())
    shared |= dict(script="benchmark/which_kl.py", flags=given_flags())
    for scale in SCALES:
        for row in measure(scale):
            append_row(args.results, shared | row)
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
