"""The pure functions of remax.py, reinforce.py and ppo.py against exact enumeration and slow references."""

import itertools
import math

import pytest
import torch

import ppo
import reinforce
import remax
import reward_model

VOCABULARY, LENGTH, EOS = 3, 3, 0


def sentences() -> list[tuple[int, ...]]:
    """Every response of the language: it ends at EOS or at LENGTH tokens."""
    found = []
    for length in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == LENGTH):
                found.append(tokens)
    return found


class Language:
    """A policy with one row of logits per context, so that every expectation is a finite sum."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.contexts = {s[:i]: None for s in sentences() for i in range(len(s))}
        self.row = {context: i for i, context in enumerate(self.contexts)}
        self.logits = torch.randn(len(self.row), VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()

    def logprobs(self, tokens: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([self.logits.log_softmax(-1)[self.row[tokens[:i]], t] for i, t in enumerate(tokens)])


def padded(values: torch.Tensor, fill: float) -> torch.Tensor:
    return torch.cat([values, values.new_full((LENGTH - len(values),), fill)])[None]


@pytest.mark.parametrize("baseline", [0.0, 1.7, -30.0])
def test_expected_gradient_is_that_of_the_kl_regularised_objective_for_any_baseline(baseline):
    policy, reference, kl_coef = Language(0), Language(1), 0.3
    generator = torch.Generator().manual_seed(2)
    rewards = {s: torch.randn((), generator=generator, dtype=torch.float64) for s in sentences()}

    objective, surrogate = 0.0, 0.0
    for s in sentences():
        logprobs, ref_logprobs = policy.logprobs(s), reference.logprobs(s).detach()
        probability = logprobs.sum().exp()
        objective = objective + probability * (rewards[s] - kl_coef * (logprobs - ref_logprobs).sum())
        mask_BT = padded(torch.ones(len(s)), 0)
        logprobs_BT, ref_BT = padded(logprobs, -5.0), padded(ref_logprobs, 9.0)  # masked entries hold anything
        advantages_BT = remax.advantages(
            rewards[s][None], torch.tensor([baseline], dtype=torch.float64), logprobs_BT, ref_BT, mask_BT, kl_coef, 1.0
        )
        surrogate = surrogate + probability.detach() * remax.policy_loss(logprobs_BT, advantages_BT, mask_BT, 1)

    (wanted,) = torch.autograd.grad(objective, policy.logits, retain_graph=True)
    (found,) = torch.autograd.grad(surrogate, policy.logits)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(-found, wanted, rtol=1e-10, atol=1e-12)


def batch(B=5, T=7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0], lengths[1] = 1, T
    mask = (torch.arange(T) < lengths[:, None]).long()
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return draw(B), draw(B), draw(B, T), draw(B, T), mask


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.int32, torch.float32])
def test_advantages_match_a_slow_reference(gamma, mask_type):
    rewards, baselines, logprobs, ref_logprobs, mask = batch()
    kl_coef = 0.2
    wanted = torch.zeros_like(logprobs)
    for i in range(len(rewards)):
        last = int(mask[i].sum()) - 1
        for t in range(last + 1):
            for s in range(t, last + 1):
                shaped = -kl_coef * (logprobs[i, s] - ref_logprobs[i, s]) + (rewards[i] if s == last else 0)
                wanted[i, t] += gamma ** (s - t) * shaped
            wanted[i, t] -= baselines[i]
    found = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask.to(mask_type), kl_coef, gamma)
    torch.testing.assert_close(found, wanted)
    assert (found[mask == 0] == 0).all()


def test_return_of_the_last_token_is_the_reward_exactly():
    rewards, baselines, logprobs, _, mask = batch()
    found = remax.advantages(rewards, baselines, logprobs, logprobs, mask, 0.5, 0.9)
    last = found[torch.arange(len(rewards)), mask.sum(1) - 1]
    assert torch.equal(last, rewards - baselines)


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


# ---------------------------------------------------------------- reinforce.py


def test_reinforce_is_remax_without_a_baseline():
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
    wanted = torch.zeros_like(logprobs)
    for i in range(len(rewards)):
        n = int(mask[i].sum())
        value = [values[i, t] if t < n else 0.0 for t in range(n + 1)]
        for t in range(n):
            for s in range(t, n):
                shaped = -kl_coef * (logprobs[i, s] - ref_logprobs[i, s]) + (rewards[i] if s == n - 1 else 0)
                wanted[i, t] += (gamma * gae_lambda) ** (s - t) * (shaped + gamma * value[s + 1] - value[s])
    found, returns = ppo.advantages(rewards, values, logprobs, ref_logprobs, mask, kl_coef, gamma, gae_lambda)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(returns, (wanted + values) * mask)


def test_gae_with_lambda_one_and_no_values_is_reinforce():
    rewards, _, logprobs, ref_logprobs, mask = batch()
    zeros = torch.zeros_like(logprobs)
    found, returns = ppo.advantages(rewards, zeros, logprobs, ref_logprobs, mask, 0.2, 0.9, 1.0)
    wanted = reinforce.advantages(rewards, logprobs, ref_logprobs, mask, 0.2, 0.9)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(returns, wanted)


def test_gae_with_exact_values_has_the_gradient_of_the_objective():
    """Any λ is unbiased where V is the true value: by enumeration."""
    policy, reference, kl_coef = Language(0), Language(1), 0.3
    generator = torch.Generator().manual_seed(2)
    rewards = {s: torch.randn((), generator=generator, dtype=torch.float64) for s in sentences()}

    def expected_return(context):
        total = 0.0
        for s in sentences():
            if s[: len(context)] == context:
                tail = (policy.logprobs(s) - reference.logprobs(s)).detach()[len(context) :]
                total += policy.logprobs(s).detach()[len(context) :].sum().exp() * (rewards[s] - kl_coef * tail.sum())
        return total

    objective, surrogate = 0.0, 0.0
    for s in sentences():
        logprobs, ref_logprobs = policy.logprobs(s), reference.logprobs(s).detach()
        probability = logprobs.sum().exp()
        objective = objective + probability * (rewards[s] - kl_coef * (logprobs - ref_logprobs).sum())
        values = torch.stack([expected_return(s[:t]) for t in range(len(s))])
        mask_BT = padded(torch.ones(len(s)), 0)
        inputs = (padded(values, 7.0), padded(logprobs.detach(), -5.0), padded(ref_logprobs, 9.0), mask_BT)
        advantages_BT, _ = ppo.advantages(rewards[s][None], *inputs, kl_coef, 1.0, 0.4)
        logprobs_BT = padded(logprobs, -5.0)
        loss = ppo.policy_loss(logprobs_BT, logprobs_BT.detach(), advantages_BT, mask_BT, 0.2, 1)
        surrogate = surrogate + probability.detach() * loss
    (wanted,) = torch.autograd.grad(objective, policy.logits, retain_graph=True)
    (found,) = torch.autograd.grad(surrogate, policy.logits)
    torch.testing.assert_close(-found, wanted, rtol=1e-8, atol=1e-10)


def test_ppo_losses_match_slow_references_and_stop_where_clipped():
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


def test_at_ratio_one_the_gradient_of_ppo_is_that_of_remax_s_loss():
    rewards, baselines, logprobs, ref_logprobs, mask = batch()
    advantages = remax.advantages(rewards, baselines, logprobs, ref_logprobs, mask, 0.1, 1.0)
    logprobs.requires_grad_()
    one = torch.autograd.grad(ppo.policy_loss(logprobs, logprobs, advantages, mask, 0.2, 5), logprobs)
    other = torch.autograd.grad(remax.policy_loss(logprobs, advantages, mask, 5), logprobs)
    torch.testing.assert_close(one, other)


def test_whitening_counts_real_tokens_only():
    import common

    common.start_processes()
    _, _, values, _, mask = batch(B=4, T=6)
    white = ppo.whiten(values, mask)
    real = white[mask == 1]
    assert real.mean().item() == pytest.approx(0, abs=1e-6) and real.std(correction=0).item() == pytest.approx(
        1, abs=1e-5
    )
    assert (white[mask == 0] == 0).all()
    assert (ppo.whiten(torch.ones(4, 6), mask) == 0).all()  # no spread: no NaN


# ---------------------------------------------------------------- reward_model.py


def test_preference_loss_is_the_negative_log_likelihood_of_bradley_terry():
    chosen, rejected = torch.tensor([1.0, -2.0, 80.0, -80.0]), torch.tensor([0.5, 3.0, -80.0, 80.0])
    found = reward_model.preference_loss(chosen, rejected)
    wanted = [math.log1p(math.exp(-(c - r))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert found.item() == pytest.approx(sum(wanted) / 4, rel=1e-6)
