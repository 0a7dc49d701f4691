"""The pure functions of the scripts against exact enumeration and slow references."""

import inspect
import itertools
import math
import statistics
import textwrap
import types

import pytest
import torch
from conftest import start_backend

import dpo
import grpo
import ppo
import reinforce
import remax
import reward_model
import spr
import spr_token

# ---------------------------------------------------------------- A language small enough to enumerate

VOCABULARY, LENGTH, EOS = 3, 3, 0
# S sentences: each ends at EOS or after LENGTH tokens.
SENTENCES = [
    tokens
    for length in range(1, LENGTH + 1)
    for tokens in itertools.product(range(VOCABULARY), repeat=length)
    if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == LENGTH)
]
MASK_ST = torch.tensor([[t < len(s) for t in range(LENGTH)] for s in SENTENCES])


def draw(*shape, seed=2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Language:
    """A policy with one row of logits per context, so that every expectation is a finite sum."""

    def __init__(self, seed: int):
        self.contexts = sorted({s[:t] for s in SENTENCES for t in range(len(s))})
        self.logits = draw(len(self.contexts), VOCABULARY, seed=seed).requires_grad_()

    def logprobs(self, fill: float) -> torch.Tensor:
        """-> logprobs_ST, with `fill` at masked entries, which may hold anything."""
        logprobs = self.logits.log_softmax(-1)
        rows = [[logprobs[self.contexts.index(s[:t]), s[t]] for t in range(len(s))] for s in SENTENCES]
        return torch.stack([torch.stack(row + [torch.tensor(fill).double()] * (LENGTH - len(row))) for row in rows])

    def greedy(self) -> int:
        """The number of the greedy sentence."""
        tokens = ()
        while tokens not in SENTENCES:
            tokens += (self.logits[self.contexts.index(tokens)].argmax().item(),)
        return SENTENCES.index(tokens)


def probabilities(logprobs_ST):
    return sentence_logprobs(logprobs_ST).exp()


def sentence_logprobs(logprobs_ST):
    return (logprobs_ST * MASK_ST).sum(1)


def objective(logprobs_ST, ref_logprobs_ST, rewards_S, kl_coef):
    """E[r] − kl_coef · KL(π ‖ π_ref), exactly."""
    log_ratios_S = ((logprobs_ST - ref_logprobs_ST) * MASK_ST).sum(1)
    return (probabilities(logprobs_ST) * (rewards_S - kl_coef * log_ratios_S)).sum()


def test_the_language_is_whole():
    assert len(SENTENCES) == 15
    assert probabilities(Language(0).logprobs(-5.0)).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("baseline", [0.0, 1.7, -30.0])
def test_expected_gradient_is_that_of_the_kl_regularised_objective_for_any_baseline(baseline):
    policy, kl_coef, rewards_S = Language(0), 0.3, draw(len(SENTENCES))
    logprobs_ST, ref_logprobs_ST = policy.logprobs(-5.0), Language(1).logprobs(9.0).detach()
    baselines_S = torch.full_like(rewards_S, baseline)
    advantages_ST = remax.advantages(rewards_S, baselines_S, logprobs_ST, ref_logprobs_ST, MASK_ST, kl_coef, 1.0)
    weights_S1 = probabilities(logprobs_ST).detach()[:, None]
    loss = remax.policy_loss(logprobs_ST, weights_S1 * advantages_ST, MASK_ST, 1)

    objective_value = objective(logprobs_ST, ref_logprobs_ST, rewards_S, kl_coef)
    (expected,) = torch.autograd.grad(objective_value, policy.logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss, policy.logits)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(-found, expected, rtol=1e-10, atol=1e-12)


def step_4(script, **names) -> dict:
    """Runs the lines of step 4 of the script's main(), as they stand there -> its variables."""
    source = inspect.getsource(script.main)
    lines = source[source.index("        # 4. Score\n") : source.index('        clock.lap("score")')]
    variables = vars(script) | names
    exec(textwrap.dedent(lines), variables)
    return variables


def rollouts(num_samples: int, kl_coef: float = 0.3):
    """Two policies; each possible tuple of samples of a policy is a prompt of its own, with adjacent rows.

    -> (policies, logprobs_BT, ref_logprobs_BT, mask_BT, rewards_B, greedy_rewards_P, probabilities_B, objective_value)
    """
    policies, ref_logprobs_ST = [Language(0), Language(3)], Language(1).logprobs(9.0).detach()
    tuples_PN = torch.cartesian_prod(*[torch.arange(len(SENTENCES))] * num_samples).view(-1, num_samples)
    rows_B = tuples_PN.flatten()
    parts, objective_value = [], 0.0
    for seed, policy in enumerate(policies):
        rewards_S = draw(len(SENTENCES), seed=5 + seed)
        logprobs_ST = policy.logprobs(-5.0)
        objective_value = objective_value + objective(logprobs_ST, ref_logprobs_ST, rewards_S, kl_coef)
        probabilities_P = probabilities(logprobs_ST).detach()[tuples_PN].prod(1)
        greedy_rewards_P = rewards_S[policy.greedy()].expand(len(tuples_PN))
        part = (logprobs_ST[rows_B], ref_logprobs_ST[rows_B], MASK_ST[rows_B], rewards_S[rows_B], greedy_rewards_P)
        parts.append((*part, probabilities_P.repeat_interleave(num_samples)))
    return policies, *map(torch.cat, zip(*parts, strict=True)), objective_value


def assert_unbiased(policies, loss, objective_value):
    parameters = [policy.logits for policy in policies]
    expected = torch.autograd.grad(objective_value, parameters, retain_graph=True)
    found = [-gradient for gradient in torch.autograd.grad(loss, parameters)]
    assert min(gradient.abs().max() for gradient in expected) > 0.01
    torch.testing.assert_close(found, list(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_samples_that_share_their_prompt_s_greedy_baseline_are_unbiased(num_samples):
    policies, logprobs_BT, ref_logprobs_BT, mask_BT, rewards_B, greedy_P, weights_B, value = rollouts(num_samples)
    names = dict(B=len(rewards_B), args=types.SimpleNamespace(num_samples=num_samples))
    rewards_R = torch.cat([rewards_B, greedy_P])  # a rollout's order
    scored = step_4(remax, responses=rewards_R, reward=lambda responses: responses, **names)
    assert torch.equal(scored["rewards_B"], rewards_B)
    half = len(rewards_B) // 2  # the rows of the first policy
    assert greedy_P[0] != greedy_P[-1]
    assert (scored["baselines_B"][:half] == greedy_P[0]).all() and (scored["baselines_B"][half:] == greedy_P[-1]).all()

    inputs = (scored["rewards_B"], scored["baselines_B"], logprobs_BT, ref_logprobs_BT, mask_BT)
    advantages_BT = weights_B[:, None] * remax.advantages(*inputs, 0.3, 1.0)
    assert_unbiased(policies, remax.policy_loss(logprobs_BT, advantages_BT, mask_BT, num_samples), value)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_samples_whose_baseline_is_the_mean_of_the_others_are_unbiased(num_samples):
    policies, logprobs_BT, ref_logprobs_BT, mask_BT, rewards_B, _, weights_B, value = rollouts(num_samples)
    args = types.SimpleNamespace(num_samples=num_samples, baseline="leave-one-out")
    scored = step_4(reinforce, sampled=rewards_B, reward=lambda responses: responses, args=args)
    advantages_BT = reinforce.advantages(scored["rewards_B"], logprobs_BT, ref_logprobs_BT, mask_BT, 0.3, 1.0)
    advantages_BT = weights_B[:, None] * (advantages_BT - scored["baselines_B"][:, None] * mask_BT)
    assert_unbiased(policies, reinforce.policy_loss(logprobs_BT, advantages_BT, mask_BT, num_samples), value)


def test_with_a_discount_only_a_baseline_that_is_not_discounted_leaves_the_gradient_as_it_is():
    policies, logprobs_BT, ref_logprobs_BT, mask_BT, rewards_B, _, weights_B, _ = rollouts(2)
    baselines_B = reinforce.leave_one_out(rewards_B, 2)

    def gradient(rewards_B, baselines_B):
        advantages_BT = reinforce.advantages(rewards_B, logprobs_BT, ref_logprobs_BT, mask_BT, 0.3, gamma=0.8)
        advantages_BT = weights_B[:, None] * (advantages_BT - baselines_B[:, None] * mask_BT)
        loss = reinforce.policy_loss(logprobs_BT, advantages_BT, mask_BT, 2)
        return torch.autograd.grad(loss, policies[0].logits, retain_graph=True)[0]

    expected = gradient(rewards_B, torch.zeros_like(rewards_B))
    torch.testing.assert_close(gradient(rewards_B, baselines_B), expected, rtol=1e-10, atol=1e-12)
    discounted = gradient(rewards_B - baselines_B, torch.zeros_like(rewards_B))
    assert (discounted - expected).norm() > 0.01 * expected.norm()


# ---------------------------------------------------------------- remax.py


def batch(B=5, T=7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, T + 1, (B,), generator=generator)
    lengths_B[0], lengths_B[1] = 1, T
    mask_BT = (torch.arange(T) < lengths_B[:, None]).long()
    shapes = ((B,), (B,), (B, T), (B, T))
    return *(torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes), mask_BT


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.int32, torch.float32])
def test_advantages_match_a_slow_reference(gamma, mask_type):
    rewards, baselines, logprobs, ref_logprobs, mask = batch()
    kl_coef = 0.2
    expected = torch.zeros_like(logprobs)
    for i in range(len(rewards)):
        last = int(mask[i].sum()) - 1
        for t in range(last + 1):
            for s in range(t, last + 1):
                shaped = -kl_coef * (logprobs[i, s] - ref_logprobs[i, s]) + (rewards[i] if s == last else 0)
                expected[i, t] += gamma ** (s - t) * shaped
            expected[i, t] -= baselines[i]
    found = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask.to(mask_type), kl_coef, gamma)
    torch.testing.assert_close(found, expected)
    assert (found[mask == 0] == 0).all()


def test_return_of_the_last_token_is_the_reward_exactly():
    rewards, baselines, logprobs, _, mask = batch()
    found = remax.advantages(rewards, baselines, logprobs, logprobs, mask, 0.5, 0.9)
    last = found[torch.arange(len(rewards)), mask.sum(1) - 1]
    assert torch.equal(last, rewards - baselines)


@pytest.mark.parametrize("script", [remax, reinforce, ppo])
def test_whole_numbers_as_rewards_are_those_numbers(script):
    _, _, logprobs, ref_logprobs, mask = batch()
    others = dict(logprobs_BT=logprobs, ref_logprobs_BT=ref_logprobs, mask_BT=mask, kl_coef=0.3, gamma=0.9)
    if script is ppo:
        others |= dict(values_BT=torch.rand_like(logprobs), gae_lambda=0.9)
    if script is remax:
        others |= dict(baseline_rewards_B=torch.rand(len(mask)))
    whole = torch.arange(len(mask))
    found, expected = (script.advantages(rewards_B=rewards, **others) for rewards in (whole, whole.float()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_whole_numbers_as_rewards_are_those_numbers_in_groups():
    whole = torch.tensor([1, 2, 4, 4])
    found, expected = (grpo.advantages(rewards, 2, "grpo") for rewards in (whole, whole.float()))
    assert torch.equal(found, expected)


def test_greedy_equal_to_sampled_and_no_kl_gives_no_gradient():
    rewards, _, logprobs, ref_logprobs, mask = batch()
    assert (remax.advantages(rewards, rewards, logprobs, ref_logprobs, mask, 0.0, 1.0) == 0).all()


def test_drift_from_the_reference_lowers_the_advantage():
    _, _, logprobs, _, mask = batch()
    zeros = torch.zeros(len(mask))
    found = remax.advantages(zeros, zeros, logprobs, logprobs - 1, mask, 0.1, 1.0)  # log π − log π_ref = +1 everywhere
    assert (found[mask == 1] < 0).all()


def test_advantages_are_detached_and_masked_entries_do_not_matter():
    rewards, baselines, logprobs, ref_logprobs, mask = batch()
    logprobs.requires_grad_()
    found = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask, 0.1, 1.0)
    assert not found.requires_grad and found.dtype == logprobs.dtype
    noise = 1e6 * torch.randn_like(ref_logprobs) * (1 - mask)
    again = remax.advantages(rewards, baselines, logprobs + noise, ref_logprobs - noise, mask, 0.1, 1.0)
    assert torch.equal(found, again)
    loss = remax.policy_loss(logprobs, found, mask, 3)
    assert torch.equal(loss, remax.policy_loss(logprobs + noise, found, mask, 3))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -found * mask / 3)


def test_policy_loss_adds_up_over_micro_batches_and_leaves_its_inputs_alone():
    rewards, baselines, logprobs, ref_logprobs, mask = batch()
    copies = [x.clone() for x in (rewards, baselines, logprobs, ref_logprobs, mask)]
    found = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask, 0.1, 1.0)
    whole = remax.policy_loss(logprobs, found, mask, torch.tensor(5))
    parts = sum(remax.policy_loss(logprobs[i : i + 2], found[i : i + 2], mask[i : i + 2], 5) for i in (0, 2, 4))
    torch.testing.assert_close(whole, parts)
    for before, after in zip(copies, (rewards, baselines, logprobs, ref_logprobs, mask), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logprobs, advantages, mask: remax.policy_loss(logprobs, advantages, mask, 3),
        lambda logprobs, advantages, mask: reinforce.policy_loss(logprobs, advantages, mask, 3),
        lambda logprobs, advantages, mask: ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 3),
        lambda logprobs, advantages, mask: grpo.policy_loss(
            logprobs, advantages, -3 * advantages, advantages[:, 0], mask, 0.1, 0.2, torch.ones(5)
        ),
        lambda logprobs, advantages, mask: ppo.value_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 3),
        lambda logprobs, advantages, mask: spr.weighted_nll(logprobs, advantages, mask, 3),
        lambda logprobs, advantages, mask: spr_token.value_loss(two_heads(logprobs), advantages, mask, 0.7, 3),
    ],
    ids="remax reinforce ppo grpo values spr token-values".split(),
)
def test_masked_entries_of_no_input_of_a_loss_matter(loss):
    _, _, logprobs, advantages, mask = batch()
    clean, noise = (fill * (1 - mask) for fill in (0.0, 1e4))
    results = []
    for fill in (clean, noise):
        inputs = (logprobs * mask + fill).requires_grad_()
        value = loss(inputs, advantages * mask - fill, mask)
        results.append((value, *torch.autograd.grad(value, inputs)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert (results[1][1][mask == 0] == 0).all()


def two_heads(x_BT):
    return torch.stack([x_BT, 0.5 * x_BT], 1)


def test_types_follow_the_first_argument():
    rewards, baselines, logprobs, ref_logprobs, mask = batch()
    found = remax.advantages(rewards.double(), baselines, logprobs, ref_logprobs, mask, 0.1, 1.0)
    assert found.dtype == torch.float64
    loss = remax.policy_loss(logprobs, found, mask.bool(), torch.tensor(3.0, dtype=torch.float64))
    assert loss.dtype == torch.float32 and loss.shape == ()
    half = logprobs.bfloat16()
    assert remax.policy_loss(half, found, mask.double(), 3).dtype == torch.bfloat16
    assert ppo.policy_loss(half, logprobs, found, mask.double(), 0.2, 3).dtype == torch.bfloat16
    assert ppo.value_loss(half, logprobs, logprobs, mask.double(), 0.2, 3).dtype == torch.bfloat16
    inputs = (half, logprobs, logprobs, rewards.double(), mask.double(), 0.1, 0.2, rewards.double())
    assert grpo.policy_loss(*inputs).dtype == torch.bfloat16
    assert spr.weighted_nll(half, rewards.double(), mask.double(), 3).dtype == torch.bfloat16


# ---------------------------------------------------------------- reinforce.py


def test_a_baseline_of_zero_is_no_baseline():
    rewards, _, logprobs, ref_logprobs, mask = batch()
    for kl_coef, gamma in ((0.0, 1.0), (0.2, 0.9)):
        rest = (logprobs, ref_logprobs, mask, kl_coef, gamma)
        zeros = torch.zeros_like(rewards)
        assert torch.equal(reinforce.advantages(rewards, *rest), remax.advantages(rewards, zeros, *rest))
    found = reinforce.advantages(rewards, logprobs, ref_logprobs, mask, 0.2, 0.9)
    loss = reinforce.policy_loss(logprobs, found, mask, 5)
    assert torch.equal(loss, remax.policy_loss(logprobs, found, mask, 5))


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert reinforce.leave_one_out(rewards, 3).tolist() == [4.0, 3.5, 1.5, 1.5, 1.5, 0.0]
    assert reinforce.leave_one_out(rewards, 2).tolist() == [2.0, 1.0, 0.0, 6.0, 3.0, 0.0]


# ---------------------------------------------------------------- ppo.py


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_gae_matches_a_slow_reference(gamma, gae_lambda):
    rewards, _, logprobs, ref_logprobs, mask = batch()
    values = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(9))
    kl_coef = 0.2
    expected = torch.zeros_like(logprobs)
    for i in range(len(rewards)):
        n = int(mask[i].sum())
        value = [values[i, t] if t < n else 0.0 for t in range(n + 1)]
        for t in range(n):
            for s in range(t, n):
                shaped = -kl_coef * (logprobs[i, s] - ref_logprobs[i, s]) + (rewards[i] if s == n - 1 else 0)
                expected[i, t] += (gamma * gae_lambda) ** (s - t) * (shaped + gamma * value[s + 1] - value[s])
    found, returns = ppo.advantages(rewards, values, logprobs, ref_logprobs, mask, kl_coef, gamma, gae_lambda)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_gae_with_lambda_one_and_no_values_is_the_return():
    rewards, _, logprobs, ref_logprobs, mask = batch()
    zeros = torch.zeros_like(logprobs)
    found, returns = ppo.advantages(rewards, zeros, logprobs, ref_logprobs, mask, 0.2, 0.9, 1.0)
    expected = reinforce.advantages(rewards, logprobs, ref_logprobs, mask, 0.2, 0.9)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(returns, expected)


def test_gae_with_exact_values_has_the_gradient_of_the_objective():
    """Any λ is unbiased where V is the true value: by enumeration."""
    policy, kl_coef, rewards_S = Language(0), 0.3, draw(len(SENTENCES))
    logprobs_ST, ref_logprobs_ST = policy.logprobs(0.0), Language(1).logprobs(0.0).detach()
    values_ST = torch.full(MASK_ST.shape, 7.0, dtype=torch.float64)
    for i, sentence in enumerate(SENTENCES):
        for t in range(len(sentence)):
            rows = [j for j, other in enumerate(SENTENCES) if other[:t] == sentence[:t]]
            tails = logprobs_ST.detach()[rows, t:]
            log_ratios = (tails - ref_logprobs_ST[rows, t:]).sum(1)
            values_ST[i, t] = (tails.sum(1).exp() * (rewards_S[rows] - kl_coef * log_ratios)).sum()
    inputs = (values_ST, logprobs_ST, ref_logprobs_ST, MASK_ST)
    advantages_ST, _ = ppo.advantages(rewards_S, *inputs, kl_coef, gamma=1.0, gae_lambda=0.4)
    advantages_ST = advantages_ST * probabilities(logprobs_ST).detach()[:, None]
    loss = ppo.policy_loss(logprobs_ST, logprobs_ST.detach(), advantages_ST, MASK_ST, 0.2, 1)
    assert_unbiased([policy], loss, objective(logprobs_ST, ref_logprobs_ST, rewards_S, kl_coef))


def test_clipped_losses_match_slow_references_and_stop_where_clipped():
    _, _, logprobs, old_logprobs, mask = batch()
    generator = torch.Generator().manual_seed(5)
    advantages, values, old_values, returns = torch.randn(4, *mask.shape, generator=generator)
    logprobs = (old_logprobs + 0.5 * logprobs).requires_grad_()
    policy, value, free = 0.0, 0.0, torch.zeros_like(mask, dtype=torch.bool)
    for i, t in mask.nonzero().tolist():
        ratio, a = (logprobs[i, t] - old_logprobs[i, t]).exp().item(), advantages[i, t].item()
        policy -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / 3
        free[i, t] = not (a > 0 and ratio > 1.2 or a < 0 and ratio < 0.8)
        v, old, r = values[i, t].item(), old_values[i, t].item(), returns[i, t].item()
        value += 0.5 * max((v - r) ** 2, (old + min(max(v - old, -0.2), 0.2) - r) ** 2) / 3
    loss = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, 0.2, 3)
    assert loss.item() == pytest.approx(policy, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.equal(gradient != 0, free) and 0 < free.sum() < mask.sum()
    assert ppo.value_loss(values, old_values, returns, mask, 0.2, 3).item() == pytest.approx(value, rel=1e-5)
    huge = values + 1e20 * (1 - mask)
    assert ppo.value_loss(huge, old_values - huge * (1 - mask), returns, mask, 0.2, 3).item() == pytest.approx(value)


def test_at_ratio_one_the_clipped_loss_has_the_gradient_of_the_plain_one():
    rewards, baselines, logprobs, ref_logprobs, mask = batch()
    advantages = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask, 0.1, 1.0)
    logprobs.requires_grad_()
    one = torch.autograd.grad(ppo.policy_loss(logprobs, logprobs, advantages, mask, 0.2, 5), logprobs)
    other = torch.autograd.grad(remax.policy_loss(logprobs, advantages, mask, 5), logprobs)
    torch.testing.assert_close(one, other)


def test_whitening_counts_real_tokens_only():
    start_backend()
    _, _, values, _, mask = batch(B=4, T=6)
    white = ppo.whiten(values, mask)
    real = white[mask == 1]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (white[mask == 0] == 0).all()
    assert (ppo.whiten(torch.ones(4, 6), mask) == 0).all()  # no spread: no NaN


# ---------------------------------------------------------------- grpo.py


def test_advantages_compare_the_responses_to_a_prompt():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    assert grpo.advantages(rewards, 3, "dr-grpo").tolist() == [-2, -1, 3, 0, 0, 0]
    spread = math.sqrt(14 / 3) + 1e-4
    expected = [-2 / spread, -1 / spread, 3 / spread, 0, 0, 0]
    assert grpo.advantages(rewards, 3, "grpo").tolist() == pytest.approx(expected, rel=1e-12)
    assert not grpo.advantages(rewards.requires_grad_(), 3, "grpo").requires_grad


@pytest.mark.parametrize("num_samples", [2, 3])
def test_without_divisions_the_expected_gradient_is_the_true_one_but_for_a_factor(num_samples):
    """Since the mean holds the own reward: (N − 1) / N."""
    policies, logprobs_BT, ref_logprobs_BT, mask_BT, rewards_B, _, weights_B, value = rollouts(num_samples, kl_coef=0)
    loss = grpo.policy_loss(
        logprobs_BT,
        logprobs_BT.detach(),
        ref_logprobs_BT,
        grpo.advantages(rewards_B, num_samples, "dr-grpo"),
        mask_BT,
        beta=0.0,
        clip_range=0.2,
        weights_B=weights_B / num_samples,
    )
    assert_unbiased(policies, loss * num_samples / (num_samples - 1), value)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_with_divisions_the_expected_gradient_is_its_own_closed_form(num_samples):
    """Σ_y π(y) E[A of y among N − 1 others] ∇ (mean of log π over the tokens of y)."""
    policies, logprobs_BT, ref_logprobs_BT, mask_BT, rewards_B, _, weights_B, _ = rollouts(num_samples)
    loss = grpo.policy_loss(
        logprobs_BT,
        logprobs_BT.detach(),
        ref_logprobs_BT,
        grpo.advantages(rewards_B, num_samples, "grpo"),
        mask_BT,
        beta=0.0,
        clip_range=0.2,
        weights_B=weights_B / num_samples / mask_BT.sum(1),
    )
    expected = 0.0
    for seed, policy in enumerate(policies):
        rewards = draw(len(SENTENCES), seed=5 + seed).tolist()
        logprobs_ST = policy.logprobs(0.0)
        chances = probabilities(logprobs_ST).tolist()
        for i in range(len(SENTENCES)):
            advantage = 0.0
            for others in itertools.product(range(len(SENTENCES)), repeat=num_samples - 1):
                group = [rewards[i]] + [rewards[j] for j in others]
                relative = (rewards[i] - statistics.fmean(group)) / (statistics.pstdev(group) + 1e-4)
                advantage += math.prod(chances[j] for j in others) * relative
            expected = expected + chances[i] * advantage * logprobs_ST[i].sum() / len(SENTENCES[i])
    assert_unbiased(policies, loss, expected)


def test_on_policy_the_penalty_has_the_gradient_of_the_forward_kl_of_each_token():
    policy, reference = Language(0), Language(1)
    logprobs_ST, ref_logprobs_ST = policy.logprobs(-5.0), reference.logprobs(9.0)
    weights_S = probabilities(logprobs_ST).detach()
    nothing_S = torch.zeros_like(weights_S)
    inputs = (logprobs_ST, logprobs_ST.detach(), ref_logprobs_ST, nothing_S, MASK_ST)
    loss = grpo.policy_loss(*inputs, beta=0.7, clip_range=0.2, weights_B=weights_S)
    forward_kl = 0.0
    for row, context in enumerate(policy.contexts):
        passes = torch.tensor([sentence[: len(context)] == context for sentence in SENTENCES])
        ref_logprobs_W = reference.logits[row].detach().log_softmax(0)
        log_ratios_W = ref_logprobs_W - policy.logits[row].log_softmax(0)
        forward_kl = forward_kl + weights_S[passes].sum() * (ref_logprobs_W.exp() * log_ratios_W).sum()
    assert_unbiased([policy], loss, -0.7 * forward_kl)


def test_the_penalty_on_a_token_is_never_steeper_than_beta():
    logprobs = torch.full((1, 2), -1.0, dtype=torch.float64).requires_grad_()
    far = torch.tensor([[-1.7, -40.0]], dtype=torch.float64)
    loss = grpo.policy_loss(logprobs, logprobs, far, torch.zeros(1), torch.ones(1, 2), 0.3, 0.2, torch.ones(1))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([0.3 * (1 - math.exp(-0.7)), 0.3])


def test_clipping_and_the_penalty_match_a_slow_reference_and_add_up():
    advantages, weights, noise, old_logprobs, mask = batch()
    generator = torch.Generator().manual_seed(5)
    ref_logprobs = old_logprobs + torch.randn(mask.shape, generator=generator)
    logprobs = (old_logprobs + 0.5 * noise).requires_grad_()
    expected, slopes = 0.0, torch.zeros(mask.shape)
    clipped = 0
    for i, t in mask.nonzero().tolist():
        ratio, a = (logprobs[i, t] - old_logprobs[i, t]).exp().item(), advantages[i].item()
        distance = (ref_logprobs[i, t] - logprobs[i, t]).item()
        objective = min(ratio * a, min(max(ratio, 0.8), 1.2) * a) - 0.3 * (math.exp(distance) - 1 - distance)
        expected -= weights[i].item() * objective
        stopped = a > 0 and ratio > 1.2 or a < 0 and ratio < 0.8
        clipped += stopped
        slopes[i, t] = -weights[i] * ((0 if stopped else ratio * a) - 0.3 * (1 - math.exp(distance)))
    assert 0 < clipped < mask.sum()

    def loss(rows):
        inputs = (logprobs[rows], old_logprobs[rows], ref_logprobs[rows], advantages[rows], mask[rows])
        return grpo.policy_loss(*inputs, beta=0.3, clip_range=0.2, weights_B=weights[rows])

    whole = loss(slice(None))
    assert whole.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(whole, logprobs)
    torch.testing.assert_close(gradient, slopes, rtol=1e-4, atol=1e-6)
    assert sum(loss(slice(i, i + 2)).item() for i in (0, 2, 4)) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- spr.py


@pytest.mark.parametrize("beta", [0.01, 1.0, 30.0])
def test_weights_are_a_softmax_and_do_not_mind_a_constant(beta):
    rewards_BN = 3 * draw(6, 5).float()
    weights_BN = spr.sample_weights(rewards_BN, spr.reference_value(rewards_BN, beta), beta)
    assert weights_BN.dtype == torch.float64
    torch.testing.assert_close(weights_BN, (rewards_BN.double() / beta).softmax(1))
    torch.testing.assert_close(weights_BN.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(spr.weights_of(rewards_BN, "spr", beta), weights_BN)
    shifted_BN = rewards_BN.double() + 17.0
    torch.testing.assert_close(spr.sample_weights(shifted_BN, spr.reference_value(shifted_BN, beta), beta), weights_BN)
    expected = [beta * math.log(sum(math.exp(r / beta) for r in row)) for row in (rewards_BN / 10).tolist()]
    torch.testing.assert_close(spr.reference_value(rewards_BN / 10, beta).tolist(), expected)


def test_weights_stay_exact_for_a_beta_far_below_the_differences_of_the_rewards():
    rewards_BN = torch.tensor([[1000.0, 1000.5, -1000.0]])
    weights_BN = spr.weights_of(rewards_BN, "spr", 1e-6)
    assert weights_BN.tolist() == [[0, 1, 0]]


def test_the_limits_of_beta_are_best_of_n_and_uniform():
    rewards_BN = draw(7, 4).float()
    rewards_BN[0, 1] = rewards_BN[0, 3] = 9.0  # a tie
    for beta, weighting in ((1e-6, "best-of-n"), (1e6, "uniform")):
        beta = beta * (rewards_BN.max() - rewards_BN.min()).item()
        limit_BN = spr.weights_of(rewards_BN, weighting, beta=math.nan)
        torch.testing.assert_close(limit_BN.sum(1), torch.ones(7, dtype=torch.float64))
        torch.testing.assert_close(spr.weights_of(rewards_BN, "spr", beta), limit_BN, rtol=0, atol=1e-5)
    assert spr.weights_of(rewards_BN, "best-of-n", 1.0)[0].tolist() == [0, 0.5, 0, 0.5]
    assert (spr.weights_of(rewards_BN, "uniform", 1.0) == 0.25).all()


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_beta_that_is_no_temperature_is_refused(beta):
    rewards_BN = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="beta"):
        spr.reference_value(rewards_BN, beta)
    with pytest.raises(ValueError, match="beta"):
        spr.sample_weights(rewards_BN, torch.zeros(1), beta)


def test_weighted_nll_matches_a_slow_reference_and_adds_up():
    _, _, logprobs, noise, mask = batch()
    generator = torch.Generator().manual_seed(3)
    rows, tokens = torch.rand(5, generator=generator, dtype=torch.float64), torch.rand(5, 7, generator=generator)
    for weights in (rows, tokens):
        expected = 0.0
        for i, t in mask.nonzero().tolist():
            expected -= (weights[i] if weights.dim() == 1 else weights[i, t]).item() * logprobs[i, t].item() / 3
        found = spr.weighted_nll(logprobs, weights, mask, 3)
        assert found.item() == pytest.approx(expected, rel=1e-5) and found.dtype == torch.float32
        parts = [spr.weighted_nll(logprobs[i : i + 2], weights[i : i + 2], mask[i : i + 2], 3) for i in (0, 2, 4)]
        assert sum(parts).item() == pytest.approx(expected, rel=1e-5)
        hidden = logprobs + 1e4 * noise * (1 - mask)
        assert spr.weighted_nll(hidden, weights, mask.bool(), torch.tensor(3)).item() == found.item()
        assert not spr.weighted_nll(logprobs, weights.requires_grad_(), mask, 3).requires_grad


def test_exact_updates_follow_theorem_1_and_never_lose_expected_reward():
    """The weighted likelihood is greatest at the closed form, again and again."""
    policy, beta, rewards_S = Language(0), 0.7, draw(len(SENTENCES), seed=6)
    rewards_before = []
    for _ in range(6):
        old_S = (policy.logprobs(3.0) * MASK_ST).sum(1).detach()
        rewards_before.append((old_S.exp() * rewards_S).sum().item())
        reference = beta * (old_S + rewards_S / beta).logsumexp(0)  # eq. 8: the expectation under π_k
        weights_S = old_S.exp() * spr.sample_weights(rewards_S[None], reference[None], beta)[0]
        new_S = old_S.exp() * ((rewards_S - reference) / beta).exp()  # Theorem 1
        assert new_S.sum().item() == pytest.approx(1)
        for i, context in enumerate(policy.contexts):  # the closed form, as the logits of each context
            for word in range(VOCABULARY):
                follows = [s[: len(context) + 1] == (*context, word) for s in SENTENCES]
                policy.logits.data[i, word] = new_S[torch.tensor(follows)].sum().log()
        (gradient,) = torch.autograd.grad(spr.weighted_nll(policy.logprobs(3.0), weights_S, MASK_ST, 1), policy.logits)
        assert gradient.abs().max() < 1e-12
    assert all(b > a for a, b in itertools.pairwise(rewards_before)) and rewards_before[-1] > rewards_before[0] + 0.5


# ---------------------------------------------------------------- spr_token.py


def exact_values(policy, rewards_S, beta, soft=False):
    """-> (Q_ST, W_ST, V_ST) of the state before each token; `soft`: Q(s, y) is W of the next state, in place of V."""
    probabilities_CW = policy.logits.detach().softmax(-1)

    def state(context):
        """-> (V, W, Q of each word)"""
        values = []
        for word in range(VOCABULARY):
            after = (*context, word)
            V, W, _ = (rewards_S[SENTENCES.index(after)],) * 2 + (None,) if after in SENTENCES else state(after)
            values.append(W if soft else V)
        probabilities, values = probabilities_CW[policy.contexts.index(context)], torch.stack(values)
        W = beta * (probabilities * (values / beta).exp()).sum().log()  # eq. 8
        return (probabilities * values).sum(), W, values

    parts = torch.full((3, *MASK_ST.shape), 50.0, dtype=torch.float64)  # masked entries may hold anything
    for i, t in MASK_ST.nonzero().tolist():
        V, W, values = state(SENTENCES[i][:t])
        parts[:, i, t] = torch.stack([values[SENTENCES[i][t]], W, V])
    return parts


def test_with_exact_values_the_update_is_the_closed_form_and_not_that_of_algorithm_2():
    policy, beta, rewards_S = Language(0), 0.7, draw(len(SENTENCES), seed=6)
    old_ST = policy.logprobs(3.0).detach()
    Q_ST, W_ST, V_ST = exact_values(policy, rewards_S, beta)
    weights_ST = spr_token.token_weights(torch.stack([Q_ST, W_ST], 1), MASK_ST, beta)
    assert weights_ST.dtype == torch.float64 and (weights_ST[~MASK_ST] == 0).all()

    # Over the tokens of a state they have mean 1, so over those of π_k, too.
    logits = policy.logits.data.log_softmax(-1)
    for context in policy.contexts:
        row = policy.contexts.index(context)
        firsts = [next(i for i, s in enumerate(SENTENCES) if s[: len(context) + 1] == (*context, w)) for w in range(3)]
        weights_W = weights_ST[firsts, len(context)]
        assert (logits[row].exp() * weights_W).sum().item() == pytest.approx(1)
        policy.logits.data[row] = logits[row] + weights_W.log()  # Theorem 1
    probabilities_S1 = probabilities(old_ST)[:, None]
    loss = spr_token.weighted_nll(policy.logprobs(3.0), probabilities_S1 * weights_ST, MASK_ST, 1)
    (gradient,) = torch.autograd.grad(loss, policy.logits)
    assert gradient.abs().max() < 1e-12

    # What it is of whole responses, and that it is not what spr.py does.
    products_S = weights_ST.where(MASK_ST, 1).prod(1)
    detours_S = ((W_ST - V_ST) * MASK_ST).sum(1)
    torch.testing.assert_close(products_S, ((rewards_S - V_ST[0, 0] - detours_S) / beta).exp())
    torch.testing.assert_close(probabilities(policy.logprobs(3.0)).detach(), probabilities_S1[:, 0] * products_S)
    reference = beta * (probabilities_S1[:, 0] * (rewards_S / beta).exp()).sum().log()
    whole_S = spr.sample_weights(rewards_S[None], reference[None], beta)[0]
    assert (products_S - whole_S).abs().max() > 0.05
    Q_ST, W_ST, _ = exact_values(Language(0), rewards_S, beta, soft=True)
    soft_ST = spr_token.token_weights(torch.stack([Q_ST, W_ST], 1), MASK_ST, beta)
    torch.testing.assert_close(soft_ST.where(MASK_ST, 1).prod(1), whole_S)


def test_the_linex_loss_is_least_at_the_log_mean_exp():
    values_BN = 2 * draw(4, 6, seed=8)
    for beta in (0.5, 1.0, 20.0):
        reference_B = (beta * ((values_BN / beta).logsumexp(1) - math.log(6))).requires_grad_()  # eq. 8's mean
        loss = spr_token.linex_loss(values_BN, reference_B, beta)
        z_BN = (values_BN - reference_B[:, None]) / beta
        assert z_BN.max() < 5
        torch.testing.assert_close(loss, (z_BN.exp() - z_BN - 1).mean())
        (gradient_B,) = torch.autograd.grad(loss, reference_B)
        assert gradient_B.abs().max() < 1e-12
        for sign in (-1, 1):
            assert spr_token.linex_loss(values_BN, reference_B + 0.01 * sign, beta) > loss


def test_far_from_its_minimum_the_linex_loss_is_finite_and_points_to_it():
    values_B1 = torch.tensor([[5.0], [5.001], [1e4], [-1e4]], requires_grad=True)
    reference_B = torch.zeros(4, requires_grad=True)
    loss = spr_token.linex_loss(values_B1, reference_B, 1.0)
    (gradient_B,) = torch.autograd.grad(loss, reference_B)
    expected = [(1 - math.exp(5)) / 4] * 3 + [0.25]  # the tangent has the slope of z = 5
    assert gradient_B.tolist() == pytest.approx(expected) and loss.isfinite()
    assert not spr_token.linex_loss(values_B1, reference_B.detach(), 1.0).requires_grad


@pytest.mark.parametrize("td_lambda", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.float32])
def test_lambda_returns_match_a_slow_reference(td_lambda, gamma, mask_type):
    rewards, _, values, noise, mask = batch()
    expected = torch.zeros_like(values)
    for i in range(len(rewards)):
        length = int(mask[i].sum())
        for t in range(length):
            # Σ_n (1 − λ) λ^(n−1) · n-step return; the last of them is the whole sampled return.
            for n in range(1, length - t + 1):
                last = n == length - t
                ahead = gamma ** (n - 1) * rewards[i] if last else gamma**n * values[i, t + n]
                expected[i, t] += td_lambda ** (n - 1) * (1 if last else 1 - td_lambda) * ahead
    values.requires_grad_()
    hidden = values + 1e4 * noise * (1 - mask)
    found = spr_token.lambda_returns(rewards, hidden, mask.to(mask_type), gamma, td_lambda)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and (found[mask == 0] == 0).all()
    if td_lambda == 0:
        assert torch.equal(found, spr_token.value_targets(rewards, values, mask, gamma))


def test_the_value_loss_matches_a_slow_reference_and_adds_up():
    rewards, _, values, reference, mask = batch()
    targets, beta, expected = rewards[:, None] * mask, 0.7, 0.0
    for i, t in mask.nonzero().tolist():
        z = (values[i, t] - reference[i, t]).item() / beta
        exponential = math.exp(z) if z < 5 else math.exp(5) * (z - 4)
        linex = 2 * beta**2 * (exponential - z - 1)
        expected += ((values[i, t] - targets[i, t]).item() ** 2 + linex) / 9
    heads = torch.stack([values, reference], 1).requires_grad_()
    whole = spr_token.value_loss(heads, targets, mask, beta, 9)
    assert whole.item() == pytest.approx(expected, rel=1e-5)
    parts = [spr_token.value_loss(heads[i : i + 2], targets[i : i + 2], mask[i : i + 2], beta, 9) for i in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-5)
    # W learns from Q, but Q from its target alone.
    (gradient,) = torch.autograd.grad(whole, heads)
    torch.testing.assert_close(gradient[:, 0], 2 * (values - targets) * mask / 9)
    assert (gradient[:, 1] * mask != 0).sum() == mask.sum()
    near = torch.stack([values, values - 1e-2], 1).double()  # near each other, the Linex loss is a square
    square = 1e-4 * mask.sum().item()
    assert spr_token.value_loss(near, values, mask, 3.0, 1).item() == pytest.approx(square, rel=1e-2)


def test_explained_shares_are_those_of_the_tokens_at_each_quarter():
    start_backend()
    mask = (torch.arange(8) < torch.tensor([[8], [5], [1]])).long()
    rewards = torch.tensor([1.0, 2.0, 6.0])  # of variance 14/3
    values = rewards[:, None] - torch.arange(8.0)  # the error at token t is t
    found = spr_token.explained_shares(values, rewards, mask)
    tokens = dict(explained_25=(1, 0, 0), explained_50=(3, 1, 0), explained_75=(5, 2, 0), explained_100=(7, 4, 0))
    assert found.keys() == tokens.keys()
    for name in tokens:
        assert found[name].tolist() == pytest.approx([1 - t**2 / (14 / 3) for t in tokens[name]])
    assert spr_token.explained_shares(values, torch.ones(3), mask)["explained_25"].shape == (3,)  # no spread: no error


# ---------------------------------------------------------------- reward_model.py


def test_preference_loss_is_the_negative_log_likelihood_of_bradley_terry():
    chosen, rejected = torch.tensor([1.0, -2.0, 80.0, -80.0]), torch.tensor([0.5, 3.0, -80.0, 80.0])
    found = reward_model.preference_loss(chosen, rejected)
    expected = [math.log1p(math.exp(-(c - r))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert found.item() == pytest.approx(sum(expected) / 4, rel=1e-6)


# ---------------------------------------------------------------- dpo.py


def test_preference_loss_of_log_ratios_and_its_gradient_are_the_formula():
    chosen, rejected, beta = draw(6, seed=3).requires_grad_(), draw(6, seed=4).requires_grad_(), 0.3
    loss = dpo.preference_loss(chosen, rejected, beta)
    margins = [beta * (c - r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 6, rel=1e-12)
    gradients = [g.tolist() for g in torch.autograd.grad(loss, (chosen, rejected))]
    expected = [beta / (1 + math.exp(margin)) / 6 for margin in margins]  # how wrong the policy is, times β
    assert gradients[0] == pytest.approx([-g for g in expected], rel=1e-12)
    assert gradients[1] == pytest.approx(expected, rel=1e-12)
    scores = (beta * chosen, beta * rejected)
    assert loss.item() == pytest.approx(reward_model.preference_loss(*scores).item(), rel=1e-12)


def test_the_limits_of_beta():
    chosen, rejected = draw(6, seed=3), draw(6, seed=4)
    small, large = dpo.preference_loss(chosen, rejected, 1e-6), dpo.preference_loss(chosen, rejected, 1e6)
    assert small.item() == pytest.approx(math.log(2) - 0.5e-6 * (chosen - rejected).mean().item(), rel=1e-12)
    assert large.item() / 1e6 == pytest.approx((rejected - chosen).clamp(min=0).mean().item(), rel=1e-6)


def test_preferences_drawn_from_a_reward_lead_to_the_policy_that_is_best_for_it():
    """All pairs of sentences, each weighted by the probability that the reward prefers its first one."""
    policy, beta, rewards_S = Language(0), 0.7, draw(len(SENTENCES), seed=6)
    ref_S = sentence_logprobs(Language(1).logprobs(9.0)).detach()
    first, second = torch.cartesian_prod(*2 * [torch.arange(len(SENTENCES))]).T
    preferred = (rewards_S[first] - rewards_S[second]).sigmoid()
    optimizer = torch.optim.LBFGS([policy.logits], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def expected_loss():
        optimizer.zero_grad()
        log_ratios_S = sentence_logprobs(policy.logprobs(-5.0)) - ref_S
        losses = torch.vmap(lambda *pair: dpo.preference_loss(*pair, beta))(log_ratios_S[first], log_ratios_S[second])
        loss = (preferred * losses).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    best_S = (ref_S + rewards_S / beta).softmax(0)  # π_ref exp(r / β) / Z
    assert (best_S - ref_S.exp()).abs().max() > 0.1
    torch.testing.assert_close(probabilities(policy.logprobs(-5.0)), best_S, rtol=1e-4, atol=1e-6)
