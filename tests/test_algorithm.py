"""The estimator of remax.py against exact enumeration of a tiny language and a slow reference."""

import itertools

import pytest
import torch

import remax

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
