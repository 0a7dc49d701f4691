"""Each script is written down a second time, in plain torch, a row at a time, without padding and without common.py.

Of the recorded run a second writing takes the tokens that were drawn, the order of the data and the dealing out of rows
to minibatches. It computes all the rest itself: every metric, every evaluation and the final weights must agree.
"""

import dataclasses
import importlib.util
import json
import math
import statistics
from unittest.mock import patch

import pytest
import torch
from conftest import EXAMPLE, assert_equal_training, read_metrics, run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common

UPDATES, BATCH, EVAL, MAX_PROMPT, LENGTH = 4, 6, 5, 9, 12
SEED, RATES = 3, (0.5, 1.0, 1.0, 1.0)  # constant, over four steps of which two are warm-up
RATE, VALUE_RATE, TEMPERATURE, GAMMA, KL_COEF, PENALTY = 1.5e-3, 3e-3, 0.8, 0.97, 0.1, 1.5
FLAGS = f"""
    --batch-size {BATCH} --eval-every 3 --eval-size {EVAL} --max-prompt-length {MAX_PROMPT} --micro-batch-size 4
    --learning-rate {RATE} --lr-schedule constant --warmup-ratio 0.5 --seed {SEED}
""".split()
ROLLOUT_FLAGS = f"""
    --response-length {LENGTH} --temperature {TEMPERATURE} --missing-eos-penalty {PENALTY} --rollout-batch-size 4
    --gold-reward-function {EXAMPLE / "sentiment.py:reward"} --reward-model {EXAMPLE / "reward_model"}
    --eval-dataset {EXAMPLE / "prompts_test.jsonl"}
""".split()
POLICY_FLAGS = f"--gamma {GAMMA} --kl-coef {KL_COEF} --total-episodes {UPDATES * BATCH}".split()


# ---------------------------------------------------------------- The recorded run


@dataclasses.dataclass
class Recorded:
    metrics: list[dict]
    samples: list[dict]
    folder: object
    engines: list  # in the order in which they were made
    rollouts: list  # (prompt ids, sampled responses, greedy response or None), in the order in which they were drawn
    permutations: list
    batches: list


def record(script, flags, folder) -> Recorded:
    engines, rollouts, permutations, batches = [], [], [], []
    functions = {name: getattr(common, name) for name in ("generate", "train_engine", "shuffled_batch")}
    randperm = torch.randperm

    def generate(model, prompts_BP, prompt_mask_BP, eos_ids, sampling, num_samples, greedy):
        inputs = (prompts_BP, prompt_mask_BP, eos_ids, sampling, num_samples, greedy)
        tokens_RT = functions["generate"](model, *inputs)
        if not eos_ids:  # the check of a model that was loaded
            return tokens_RT
        rows = [row[: row.index(0) + 1] if 0 in row else row for row in tokens_RT.tolist()]  # EOS is 0
        assert tokens_RT.shape[1] == LENGTH
        prompts = [ids[mask == 1].tolist() for ids, mask in zip(prompts_BP, prompt_mask_BP)]
        for i, prompt in enumerate(prompts):
            sampled = rows[i * num_samples : (i + 1) * num_samples]
            rollouts.append((prompt, sampled, rows[len(prompts) * num_samples + i] if greedy else None))
        return tokens_RT

    def train_engine(*args):
        engines.append(functions["train_engine"](*args))
        return engines[-1]

    def shuffled_batch(*args):
        batches.append(functions["shuffled_batch"](*args))
        assert len(batches[-1]) == BATCH
        return batches[-1]

    def recorded_randperm(*args, **kwargs):
        if "generator" not in kwargs:
            permutations.append(randperm(*args, **kwargs).tolist())
            return torch.tensor(permutations[-1])
        return randperm(*args, **kwargs)

    with (
        patch.multiple(common, generate=generate, train_engine=train_engine, shuffled_batch=shuffled_batch),
        patch.object(torch, "randperm", recorded_randperm),
    ):
        assert run_here(script, *FLAGS, *flags, "--output-dir", folder) == 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return Recorded(read_metrics(folder), samples, folder, engines, rollouts, permutations, batches)


def assert_agree(recorded, metrics, samples, weights) -> None:
    """weights: {name: tensor} of the saved model."""
    measured = ("second", "memory")
    for found, expected in zip(recorded.metrics, metrics, strict=True):
        found = {name: value for name, value in found.items() if not any(word in name for word in measured)}
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (name, found["update"])
    assert len(recorded.samples) == len(samples)
    for found, expected in zip(recorded.samples, samples, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    (path,) = recorded.folder.glob("*/model.safetensors")
    assert_equal_training(load_file(path), weights, RATE)


# ---------------------------------------------------------------- What the second writings have in common


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adamw(model, rate):
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)


def clipped_step(model, optimizer, rate, max_grad_norm) -> float:
    """-> the gradient norm before clipping."""
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    for p in model.parameters():
        p.grad *= min(1.0, max_grad_norm / norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


@dataclasses.dataclass
class Row:
    """A response: its tokens, its log-probabilities under the frozen initial policy, and its rewards."""

    prompt: list[int]
    response: list[int]
    ref_logprobs: torch.Tensor
    reward: float
    gold_reward: float


class Second:
    """The models, the data, and the recorded rollouts in the order in which they are read."""

    def __init__(self, recorded, train_rows):
        self.recorded, self.rollouts, self.samples = recorded, list(recorded.rollouts), []
        self.tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "policy")
        self.policy, self.reference = (AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy") for _ in range(2))
        self.reward_model = AutoModelForSequenceClassification.from_pretrained(EXAMPLE / "reward_model", num_labels=1)
        self.reward_tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "reward_model")
        spec = importlib.util.spec_from_file_location("sentiment", EXAMPLE / "sentiment.py")
        self.sentiment = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.sentiment)
        held_out = rows_of(EXAMPLE / "prompts_test.jsonl")[:EVAL]
        self.texts = {tuple(self.cut(row["prompt"])): row["prompt"] for row in [*train_rows, *held_out]}
        assert len(self.texts) == len(train_rows) + EVAL  # so that tokens tell the text
        self.train_texts, self.held_out = ([row["prompt"] for row in rows] for rows in (train_rows, held_out))
        assert any(len(self.tokenizer(text)["input_ids"]) > MAX_PROMPT for text in self.train_texts)
        self.drawn, self.initial, self.scored, self.temperature = [], None, True, TEMPERATURE

    def cut(self, text) -> list[int]:
        return self.tokenizer(text)["input_ids"][-MAX_PROMPT:]

    def text(self, response) -> str:
        return self.tokenizer.decode(response[:-1] if response[-1] == 0 else response)

    def take(self, count) -> list:
        taken, self.rollouts = self.rollouts[:count], self.rollouts[count:]
        return taken

    def batch(self) -> list:
        """An update's rollouts. Prompts are training prompts, and none comes twice before all have come."""
        rollouts = self.take(BATCH)
        self.drawn += [self.texts[tuple(prompt)] for prompt, *_ in rollouts]
        for start in range(0, len(self.drawn), len(self.train_texts)):
            epoch = self.drawn[start : start + len(self.train_texts)]
            assert set(epoch) <= set(self.train_texts) and len(set(epoch)) == len(epoch)
        return rollouts

    def logprobs(self, model, prompt, response):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return (logits / self.temperature).log_softmax(-1)[range(len(response)), response]

    @torch.no_grad()
    def rewards(self, prompt, response) -> tuple[float, float]:
        """-> (reward, gold reward)"""
        text, answer = self.texts[tuple(prompt)], self.text(response)
        ids = self.reward_tokenizer(text + answer)["input_ids"] + [self.reward_tokenizer.eos_token_id]
        score = self.reward_model(torch.tensor([ids])).logits.item() - self.reward_model.config.reward_mean
        return score - PENALTY * (response[-1] != 0), self.sentiment.reward([text], [answer])[0]

    def row(self, prompt, response) -> Row:
        with torch.no_grad():
            ref_logprobs = self.logprobs(self.reference, prompt, response)
        return Row(prompt, response, ref_logprobs, *self.rewards(prompt, response))

    def assert_greedy(self, prompt, response) -> None:
        with torch.no_grad():
            logits = self.policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert (logits[range(len(response)), response] > logits.amax(1) - 1e-4).all()

    @torch.no_grad()
    def evaluation(self, update) -> dict:
        rows = []
        for prompt, sampled, response in self.take(EVAL):
            assert sampled == []
            self.assert_greedy(prompt, response)
            row = self.row(prompt, response)
            text = dict(prompt=self.texts[tuple(prompt)], response=self.text(response))
            log_ratio = (self.logprobs(self.policy, prompt, response) - row.ref_logprobs).sum().item()
            numbers = dict(gold_reward=row.gold_reward, log_ratio=log_ratio, response_length=len(response))
            rows.append(text | (dict(reward=row.reward) if self.scored else {}) | numbers)
        assert [row["prompt"] for row in rows] == self.held_out
        self.samples += [dict(update=update) | row for row in rows]
        self.initial = self.initial or rows
        means = {f"eval_{name}": mean(row[name] for row in rows) for name in rows[0] if name not in text}
        if not self.scored:
            return means
        wins = [(a["reward"] > b["reward"]) + (a["reward"] == b["reward"]) / 2 for a, b in zip(rows, self.initial)]
        return means | dict(eval_win_rate=mean(wins))

    def evaluated(self, metrics, update, updates) -> dict:
        if update == 0:
            return dict(update=0, episodes=0) | self.evaluation(0)
        metrics = dict(update=update, episodes=update * BATCH, skipped_updates=0) | metrics
        return metrics | (self.evaluation(update) if update in (3, updates) else {})

    def rollout_metrics(self, rows, logprobs) -> dict:
        """What remax, reinforce and ppo say of the sampled rows; logprobs: of the policy that sampled."""
        return dict(
            reward=mean(row.reward for row in rows),
            reward_std=statistics.pstdev(row.reward for row in rows),
            gold_reward=mean(row.gold_reward for row in rows),
            kl=mean((logprob - row.ref_logprobs).sum() for row, logprob in zip(rows, logprobs)),
            entropy=-torch.cat(logprobs).mean().item(),
            response_length=mean(len(row.response) for row in rows),
            truncated_fraction=mean(row.response[-1] != 0 for row in rows),
        )


def shaped_rewards(row, logprobs, reward) -> list[float]:
    shaped = [-KL_COEF * (a - b).item() for a, b in zip(logprobs, row.ref_logprobs)]
    shaped[-1] += reward
    return shaped


def discounted(rewards, gamma) -> list[float]:
    return [sum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


@pytest.fixture
def data(tmp_path):
    """Eleven prompts, so that the updates pass over them more than twice -> (rows, flags)"""
    return write(tmp_path / "prompts.jsonl", rows_of(EXAMPLE / "prompts.jsonl")[:1100:100])


def write(path, rows) -> tuple[list[dict], list]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, ["--dataset", path]


def accuracy_metrics(margins) -> dict:
    """Of held-out pairs: the accuracy is a mean of n numbers, whose 95% interval is ±1.96 √(p(1 − p) / n)."""
    right = mean((x > 0) + (x == 0) / 2 for x in margins)
    half = 1.96 * math.sqrt(right * (1 - right) / len(margins))
    return dict(eval_accuracy=right, eval_accuracy_interval=half, eval_margin=mean(margins))


def assert_telling(metrics, max_grad_norm, values=("kl", "truncated_fraction")) -> None:
    """The run is one in which mistakes show."""
    assert max(row["grad_norm"] for row in metrics[1:]) > 1.2 * max_grad_norm
    for name in values:
        assert any(0 < row[name] != 1 for row in metrics[1:]), name
    assert abs(metrics[-1]["eval_log_ratio"]) > 0.1 and metrics[-1].get("eval_win_rate") != 0.5


# ---------------------------------------------------------------- The second writings


@pytest.mark.parametrize(
    "script, more, num_samples",
    [
        ("remax", [], 1),
        ("remax", ["--num-samples", "2"], 2),
        ("reinforce", [], 1),
        ("reinforce", ["--baseline", "leave-one-out", "--num-samples", "3"], 3),
    ],
)
def test_remax_and_reinforce(tmp_path, data, script, more, num_samples):
    flags = [*ROLLOUT_FLAGS, *POLICY_FLAGS, *data[1], "--max-grad-norm", "10", *more]
    recorded = record(script, flags, tmp_path / "r")
    second = Second(recorded, data[0])
    policy, optimizer = second.policy, adamw(second.policy, RATE)
    metrics = [second.evaluated({}, 0, UPDATES)]
    for update in range(1, UPDATES + 1):
        rows, baselines = [], []
        for prompt, responses, greedy in second.batch():
            assert len(responses) == num_samples and (greedy is not None) == (script == "remax")
            rows += [second.row(prompt, response) for response in responses]
            rewards = [row.reward for row in rows[-num_samples:]]
            if script == "remax":
                second.assert_greedy(prompt, greedy)
                baselines += num_samples * [second.rewards(prompt, greedy)[0]]
            elif num_samples > 1:
                baselines += [(sum(rewards) - reward) / (num_samples - 1) for reward in rewards]
            else:
                baselines += [0.0]
        loss, logprobs = 0.0, []
        for row, baseline in zip(rows, baselines):
            logprobs.append(second.logprobs(policy, row.prompt, row.response))
            returns = discounted(shaped_rewards(row, logprobs[-1], row.reward), GAMMA)
            advantages = [value - baseline for value in returns]  # the baseline is not discounted
            loss -= (torch.tensor(advantages) * logprobs[-1]).sum() / len(rows)
        loss.backward()
        found = second.rollout_metrics(rows, [logprob.detach() for logprob in logprobs]) | dict(loss=loss.item())
        if script == "remax" or num_samples > 1:
            found["baseline_reward"] = mean(baselines)
        if script == "remax":
            found["tied_fraction"] = mean(abs(row.reward - b) < 1e-4 for row, b in zip(rows, baselines))
        if script == "reinforce" and num_samples > 1:
            groups = [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]
            spreads = [statistics.pstdev(row.reward for row in group) for group in groups]
            found["tied_fraction"] = mean(spread < 1e-4 for spread in spreads)
        found["learning_rate"] = RATE * RATES[update - 1]
        found["grad_norm"] = clipped_step(policy, optimizer, found["learning_rate"], 10)
        metrics.append(second.evaluated(found, update, UPDATES))
    assert not second.rollouts
    assert_telling(metrics, 10)
    assert_agree(recorded, metrics, second.samples, policy.state_dict())


def test_ppo(tmp_path, data):
    epochs, minibatches, clip, value_clip, lam, max_grad_norm = 2, 2, 0.1, 0.3, 0.9, 1.0
    flags = f"--num-epochs {epochs} --num-minibatches {minibatches} --clip-range {clip} --gae-lambda {lam}".split()
    flags += f"--clip-range-value {value_clip} --value-learning-rate {VALUE_RATE}".split()
    flags += [*ROLLOUT_FLAGS, *POLICY_FLAGS, *data[1], "--max-grad-norm", max_grad_norm]
    recorded = record("ppo", flags, tmp_path / "r")
    second = Second(recorded, data[0])
    policy, optimizer = second.policy, adamw(second.policy, RATE)
    value = AutoModelForSequenceClassification.from_pretrained(EXAMPLE / "reward_model", num_labels=1)
    value_optimizer = adamw(value, VALUE_RATE)
    permutations = iter(recorded.permutations)

    def values_of(row):
        hidden = value.base_model(torch.tensor([row.prompt + row.response])).last_hidden_state
        return value.score(hidden[0, len(row.prompt) - 1 : -1])[:, 0] - value.config.reward_mean

    value_clipped, metrics = 0, [second.evaluated({}, 0, UPDATES)]
    for update in range(1, UPDATES + 1):
        rows = []
        for prompt, (response,), greedy in second.batch():
            assert greedy is None
            rows.append(second.row(prompt, response))
        with torch.no_grad():
            old_logprobs = [second.logprobs(policy, row.prompt, row.response) for row in rows]
            old_values = [values_of(row) for row in rows]
        advantages, returns = [], []
        for row, logprobs, values in zip(rows, old_logprobs, old_values):
            rewards, following = shaped_rewards(row, logprobs, row.reward), [*values.tolist()[1:], 0.0]
            deltas = [r + GAMMA * v - u for r, v, u in zip(rewards, following, values.tolist())]
            advantages.append(torch.tensor(discounted(deltas, GAMMA * lam)))
            returns.append(advantages[-1] + values)
        everything = torch.cat(advantages).tolist()
        centre, spread = statistics.mean(everything), statistics.pstdev(everything)
        advantages = [(advantage - centre) / (spread + 1e-8) for advantage in advantages]

        losses, value_losses, norms, clipped, kls = [], [], [], [], []
        for _ in range(epochs):
            order = next(permutations)
            assert sorted(order) == list(range(BATCH))
            for part in (order[: BATCH // 2], order[BATCH // 2 :]):
                tokens = sum(len(rows[i].response) for i in part)
                loss = value_loss = 0.0
                for i in part:
                    logprobs = second.logprobs(policy, rows[i].prompt, rows[i].response)
                    ratios = (logprobs - old_logprobs[i]).exp()
                    bounded = ratios.clamp(1 - clip, 1 + clip)
                    loss -= torch.minimum(ratios * advantages[i], bounded * advantages[i]).sum() / tokens
                    values = values_of(rows[i])
                    near = torch.minimum(torch.maximum(values, old_values[i] - value_clip), old_values[i] + value_clip)
                    value_clipped += (values != near).sum().item()
                    worse = torch.maximum((values - returns[i]) ** 2, (near - returns[i]) ** 2)
                    value_loss += 0.5 * worse.sum() / tokens
                    clipped += [float(abs(ratio - 1) > clip) for ratio in ratios.tolist()]
                    kls += [ratio - 1 - math.log(ratio) for ratio in ratios.tolist()]
                (loss + value_loss).backward()
                norms.append(clipped_step(policy, optimizer, RATE * RATES[update - 1], max_grad_norm))
                clipped_step(value, value_optimizer, VALUE_RATE * RATES[update - 1], max_grad_norm)
                losses.append(loss.item())
                value_losses.append(value_loss.item())
        found = second.rollout_metrics(rows, old_logprobs) | dict(loss=mean(losses), value_loss=mean(value_losses))
        found |= dict(clip_fraction=mean(clipped), approx_kl=mean(kls))
        found |= dict(learning_rate=RATE * RATES[update - 1], grad_norm=mean(norms))
        metrics.append(second.evaluated(found, update, UPDATES))
    assert not second.rollouts and not list(permutations)
    assert_telling(metrics, max_grad_norm, ("kl", "truncated_fraction", "clip_fraction"))
    assert value_clipped
    assert_agree(recorded, metrics, second.samples, policy.state_dict())
    trained = dict(recorded.engines[1].module.model.named_parameters())
    assert_equal_training(trained, value.state_dict(), VALUE_RATE)


@pytest.mark.parametrize("variant", ["grpo", "dr-grpo"])
def test_grpo(tmp_path, data, variant):
    epochs, minibatches, clip, beta, samples, max_grad_norm = 2, 2, 0.05, 0.3, 3, 0.5
    flags = f"--num-epochs {epochs} --num-minibatches {minibatches} --clip-range {clip} --beta {beta}".split()
    flags += f"--num-samples {samples} --variant {variant} --total-episodes {UPDATES * BATCH}".split()
    flags += [*ROLLOUT_FLAGS, *data[1], "--max-grad-norm", max_grad_norm]
    recorded = record("grpo", flags, tmp_path / "r")
    second = Second(recorded, data[0])
    policy, optimizer = second.policy, adamw(second.policy, RATE)
    permutations = iter(recorded.permutations)
    metrics = [second.evaluated({}, 0, UPDATES)]
    for update in range(1, UPDATES + 1):
        rows, advantages, tied = [], [], []
        for prompt, responses, greedy in second.batch():
            assert len(responses) == samples and greedy is None
            group = [second.row(prompt, response) for response in responses]
            rewards = [row.reward for row in group]
            spread = statistics.pstdev(rewards)
            divisor = spread + 1e-4 if variant == "grpo" else 1
            advantages += [(reward - statistics.fmean(rewards)) / divisor for reward in rewards]
            tied.append(spread < 1e-4)
            rows += group
        with torch.no_grad():
            old_logprobs = [second.logprobs(policy, row.prompt, row.response) for row in rows]

        losses, norms, clipped, kls = [], [], [], []
        for _ in range(epochs):
            order = next(permutations)
            assert sorted(order) == list(range(BATCH * samples))
            half = len(order) // minibatches
            for part in (order[:half], order[half:]):
                loss = 0.0
                for i in part:
                    logprobs = second.logprobs(policy, rows[i].prompt, rows[i].response)
                    ratios = (logprobs - old_logprobs[i]).exp()
                    bounded = ratios.clamp(1 - clip, 1 + clip)
                    gains = torch.minimum(ratios * advantages[i], bounded * advantages[i])
                    distances = rows[i].ref_logprobs - logprobs
                    gains = gains - beta * (distances.exp() - 1 - distances)
                    loss -= (gains.mean() if variant == "grpo" else gains.sum()) / len(part)
                    clipped += [float(abs(ratio - 1) > clip) for ratio in ratios.tolist()]
                    kls += [ratio - 1 - math.log(ratio) for ratio in ratios.tolist()]
                loss.backward()
                norms.append(clipped_step(policy, optimizer, RATE * RATES[update - 1], max_grad_norm))
                losses.append(loss.item())
        found = second.rollout_metrics(rows, old_logprobs) | dict(loss=mean(losses), tied_fraction=mean(tied))
        found |= dict(clip_fraction=mean(clipped), approx_kl=mean(kls))
        found |= dict(learning_rate=RATE * RATES[update - 1], grad_norm=mean(norms))
        metrics.append(second.evaluated(found, update, UPDATES))
    assert not second.rollouts and not list(permutations)
    assert_telling(metrics, max_grad_norm, ("kl", "truncated_fraction", "clip_fraction"))
    assert_agree(recorded, metrics, second.samples, policy.state_dict())


@pytest.mark.parametrize(
    "weighting, num_samples, demonstrations",
    [("spr", 3, False), ("spr", 2, True), ("best-of-n", 3, False), ("uniform", 0, True)],
)
def test_spr(tmp_path, data, weighting, num_samples, demonstrations):
    epochs, minibatches, beta, max_grad_norm, updates = 2, 2, 0.7, 10, 2
    rows, flags = data
    if demonstrations:
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "policy")
        known = {row["prompt"]: row for row in rows_of(EXAMPLE / "demonstrations.jsonl")[::9]}
        completions = {prompt: tokenizer(row["completion"])["input_ids"] + [0] for prompt, row in known.items()}
        rows = [row for prompt, row in known.items() if len(completions[prompt]) <= LENGTH][:8]
        long = [row for prompt, row in known.items() if len(completions[prompt]) == LENGTH + 1][:3]
        _, flags = write(tmp_path / "demonstrations.jsonl", long + rows)  # the long ones are dropped
    flags += f"--weighting {weighting} --num-samples {num_samples} --beta {beta} --num-epochs {epochs}".split()
    flags += f"--num-minibatches {minibatches} --total-episodes {updates * BATCH}".split()
    recorded = record("spr", [*ROLLOUT_FLAGS, *flags, "--max-grad-norm", max_grad_norm], tmp_path / "r")
    second = Second(recorded, rows)
    permutations = iter(recorded.permutations)
    second.scored = num_samples > 0
    metrics = [second.evaluated({}, 0, updates)]
    for update in range(1, updates + 1):
        batch = [prompt.text for prompt in recorded.batches[update - 1]]
        groups = [[] for _ in batch]
        if num_samples:
            for group, (prompt, responses, greedy), text in zip(groups, second.batch(), batch):
                assert len(responses) == num_samples and greedy is None and second.texts[tuple(prompt)] == text
                group += [second.row(prompt, response) for response in responses]
        if demonstrations:
            assert len(long) == 3 and set(batch) <= {row["prompt"] for row in rows}
            for group, text in zip(groups, batch):
                group.append(second.row(second.cut(text), completions[text]))
        weights = []
        for group in groups:
            rewards = [row.reward for row in group]
            if weighting == "spr":
                powers = [math.exp((reward - max(rewards)) / beta) for reward in rewards]
            else:
                powers = [float(weighting == "uniform" or reward == max(rewards)) for reward in rewards]
            weights.append([power / sum(powers) for power in powers])
        is_one_fit = num_samples == 0  # over all updates; else each iteration is a fit of its own
        if update == 1 or not is_one_fit:
            optimizer = adamw(second.policy, RATE)
        rates = RATES[2 * update - 2 : 2 * update] if is_one_fit else RATES
        losses, norms = [], []
        for _ in range(1 if is_one_fit else epochs):
            order = next(permutations)
            assert sorted(order) == list(range(BATCH))
            for part in (order[: BATCH // 2], order[BATCH // 2 :]):
                loss = 0.0
                for i in part:
                    for row, weight in zip(groups[i], weights[i]):
                        logprobs = second.logprobs(second.policy, row.prompt, row.response)
                        loss -= weight * logprobs.sum() / len(part)
                loss.backward()
                losses.append(loss.item())
                norms.append(clipped_step(second.policy, optimizer, RATE * rates[len(norms)], max_grad_norm))
        everything = [row for group in groups for row in group]
        found = dict(
            gold_reward=mean(row.gold_reward for row in everything),
            response_length=mean(len(row.response) for row in everything),
            truncated_fraction=mean(row.response[-1] != 0 for row in everything),
            weight_ess=mean(1 / sum(weight**2 for weight in group) for group in weights),
            loss=mean(losses),
            grad_norm=mean(norms),
            learning_rate=RATE * rates[-1],
        )
        if second.scored:
            found["reward"] = mean(row.reward for row in everything)
            found["reward_std"] = statistics.pstdev(row.reward for row in everything)
            found["best_reward"] = mean(max(row.reward for row in group) for group in groups)
            pairs = [zip(group, each) for group, each in zip(groups, weights)]
            found["weighted_reward"] = mean(sum(row.reward * weight for row, weight in pair) for pair in pairs)
        metrics.append(second.evaluated(found, update, updates))
        if not num_samples:
            continue
        written = rows_of(recorded.folder / f"iteration-{update}.jsonl")
        for line, row, weight in zip(written, everything, sum(weights, []), strict=True):
            expected = dict(prompt=second.texts[tuple(row.prompt)], response=second.text(row.response))
            expected |= dict(reward=row.reward) if second.scored else {}
            assert line == pytest.approx(
                expected | dict(gold_reward=row.gold_reward, weight=weight), rel=1e-3, abs=1e-4
            )
    assert not second.rollouts and not list(permutations)
    assert_telling(metrics, max_grad_norm, ["truncated_fraction"] if num_samples else [])
    assert_agree(recorded, metrics, second.samples, second.policy.state_dict())


def test_spr_token(tmp_path, data):
    epochs, value_epochs, minibatches, num_samples, beta, lam, max_grad_norm, updates = 2, 2, 2, 2, 0.7, 0.6, 8, 2
    flags = f"--num-epochs {epochs} --num-minibatches {minibatches} --num-samples {num_samples} --beta {beta}".split()
    flags += f"--td-lambda {lam} --gamma {GAMMA} --total-episodes {updates * BATCH}".split()
    flags += f"--value-epochs {value_epochs} --value-learning-rate {VALUE_RATE} --max-grad-norm {max_grad_norm}".split()
    recorded = record("spr_token", [*ROLLOUT_FLAGS, *flags, *data[1]], tmp_path / "r")
    second = Second(recorded, data[0])
    value = AutoModelForSequenceClassification.from_pretrained(EXAMPLE / "reward_model", num_labels=1)
    value.other_head = torch.nn.Linear(value.score.in_features, 1, bias=False)
    value.other_head.weight.data = value.score.weight.data.clone()
    permutations = iter(recorded.permutations)

    def values_of(row):
        """-> (Q after each token, W before each token)"""
        hidden = value.base_model(torch.tensor([row.prompt + row.response])).last_hidden_state[0, len(row.prompt) - 1 :]
        heads = (value.score(hidden[1:]), value.other_head(hidden[:-1]))
        return [head[:, 0] - value.config.reward_mean for head in heads]

    def parts_of(size):
        """The next pass over the data."""
        order = next(permutations)
        assert sorted(order) == list(range(size))
        step = BATCH // minibatches
        return [order[i : i + step] for i in range(0, size, step)]

    value_norms, metrics = [], [second.evaluated({}, 0, updates)]
    for update in range(1, updates + 1):
        rows = []
        for prompt, responses, greedy in second.batch():
            assert len(responses) == num_samples and greedy is None
            rows += [second.row(prompt, response) for response in responses]
        returns = []
        for row in rows:
            with torch.no_grad():
                ahead = values_of(row)[0].tolist()
            found = [row.reward]
            for q in reversed(ahead[1:]):
                found.insert(0, GAMMA * ((1 - lam) * q + lam * found[0]))
            returns.append(torch.tensor(found))

        value_parts = [part for _ in range(value_epochs) for part in parts_of(len(rows))]
        policy_parts = [part for _ in range(epochs) for part in parts_of(BATCH)]
        optimizer, value_losses = adamw(value, VALUE_RATE), []
        for step, part in enumerate(value_parts):
            loss, tokens = 0.0, sum(len(rows[i].response) for i in part)
            for i in part:
                q, w = values_of(rows[i])
                z = (q.detach() - w) / beta
                exponential = torch.where(z > 5, math.exp(5) * (z - 4), z.exp())
                loss += ((q - returns[i]) ** 2 + 2 * beta**2 * (exponential - z - 1)).sum() / tokens
            loss.backward()
            value_losses.append(loss.item())
            warmup = len(value_parts) // 2
            rate = min((step + 1) / warmup, 1)
            value_norms.append(clipped_step(value, optimizer, VALUE_RATE * rate, max_grad_norm))

        def weights_of(row):
            with torch.no_grad():
                q, w = values_of(row)
            return [math.exp((a - b) / beta) for a, b in zip(q.tolist(), w.tolist())]

        weights = [weights_of(row) for row in rows]
        found = dict(
            reward=mean(row.reward for row in rows),
            gold_reward=mean(row.gold_reward for row in rows),
            best_reward=mean(max(a.reward, b.reward) for a, b in zip(rows[::2], rows[1::2])),
            reward_std=statistics.pstdev(row.reward for row in rows),
            response_length=mean(len(row.response) for row in rows),
            truncated_fraction=mean(row.response[-1] != 0 for row in rows),
            value_loss=mean(value_losses),
            weight_ess=mean(sum(ws) ** 2 / sum(w**2 for w in ws) / len(ws) for ws in weights),
            weight_max=max(w for ws in weights for w in ws),
        )
        new = []
        for prompt, responses, _ in second.take(EVAL):
            assert second.texts[tuple(prompt)] == second.held_out[len(new)] and len(responses) == 1
            new.append(second.row(prompt, responses[0]))
        found["held_out_weight"] = mean(w for row in new for w in weights_of(row))
        with torch.no_grad():
            values = [values_of(row)[0].tolist() for row in new]
        variance = statistics.pvariance([row.reward for row in new])
        for percent in (25, 50, 75, 100):
            last = [q[max(0, math.floor(len(q) * percent / 100) - 1)] for q in values]
            error = mean((row.reward - q) ** 2 for row, q in zip(new, last))
            found[f"explained_{percent}"] = 1 - error / variance

        optimizer, losses, norms = adamw(second.policy, RATE), [], []
        for part, rate in zip(policy_parts, RATES, strict=True):
            loss = 0.0
            for i in (num_samples * prompt + n for prompt in part for n in range(num_samples)):
                logprobs = second.logprobs(second.policy, rows[i].prompt, rows[i].response)
                loss -= (torch.tensor(weights[i]) * logprobs).sum() / num_samples / len(part)
            loss.backward()
            losses.append(loss.item())
            norms.append(clipped_step(second.policy, optimizer, RATE * rate, max_grad_norm))
        found |= dict(loss=mean(losses), grad_norm=mean(norms), learning_rate=RATE * RATES[-1])
        metrics.append(second.evaluated(found, update, updates))
        written = rows_of(recorded.folder / f"iteration-{update}.jsonl")
        for line, row, ws in zip(written, rows, weights, strict=True):
            found_weights = line.pop("weights")
            assert found_weights[: len(ws)] == pytest.approx(ws, rel=1e-3) and not any(found_weights[len(ws) :])
            expected = dict(prompt=second.texts[tuple(row.prompt)], response=second.text(row.response))
            assert line == pytest.approx(expected | dict(reward=row.reward, gold_reward=row.gold_reward), rel=1e-3)
    assert not second.rollouts and not list(permutations)
    assert_telling(metrics, max_grad_norm, ["truncated_fraction"])
    assert max(value_norms) > 1.2 * max_grad_norm
    assert_agree(recorded, metrics, second.samples, second.policy.state_dict())
    trained = dict(recorded.engines[1].module.model.named_parameters())
    trained["other_head.weight"] = recorded.engines[1].module.reference_head.weight
    assert (trained["other_head.weight"] - trained["score.weight"]).abs().max() > VALUE_RATE
    assert_equal_training(trained, value.state_dict(), VALUE_RATE)


def test_reward_model(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "policy")
    pairs = rows_of(EXAMPLE / "preferences.jsonl")
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs[500:520]))
    pairs, flags = write(tmp_path / "pairs.jsonl", pairs[:440:40])
    flags += ["--eval-dataset", tmp_path / "held_out.jsonl", "--total-episodes", UPDATES * BATCH]
    recorded = record("reward_model", [*flags, "--max-grad-norm", "2"], tmp_path / "r")
    held_out = rows_of(tmp_path / "held_out.jsonl")[:EVAL]

    model = AutoModelForSequenceClassification.from_pretrained(EXAMPLE / "policy", num_labels=1)
    torch.manual_seed(SEED)
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(96 + 1))
    optimizer = adamw(model, RATE)

    def ids_of(prompt, response):
        """Prompts are cut on the left, responses never."""
        lost = max(0, len(tokenizer(prompt)["input_ids"]) - MAX_PROMPT)
        return tokenizer(prompt + response)["input_ids"][lost:] + [0]

    def score(prompt, response):
        hidden = model.base_model(torch.tensor([ids_of(prompt, response)])).last_hidden_state[0, -1]
        return model.score(hidden)[0]

    samples = []

    @torch.no_grad()
    def evaluation(update):
        rows = []
        for pair in held_out:
            for name in ("chosen", "rejected"):
                row = dict(update=update, prompt=pair["prompt"], response=pair[name], chosen=name == "chosen")
                reward = score(pair["prompt"], pair[name]).item()
                length = len(ids_of(pair["prompt"], pair[name])) - len(
                    tokenizer(pair["prompt"])["input_ids"][-MAX_PROMPT:]
                )
                rows.append(row | dict(reward=reward, length=length))
        samples.extend(rows)
        rewards = [row["reward"] for row in rows]
        margins = [a - b for a, b in zip(rewards[::2], rewards[1::2])]
        return dict(
            **accuracy_metrics(margins),
            eval_score=mean(rewards),
            eval_score_std=statistics.stdev(rewards),
            eval_length_correlation=statistics.correlation(rewards, [float(row["length"]) for row in rows]),
        )

    metrics, drawn = [dict(update=0, episodes=0) | evaluation(0)], []
    for update in range(1, UPDATES + 1):
        batch = [(pair.prompt.text, *pair.responses) for pair in recorded.batches[update - 1]]
        drawn += batch
        loss, margins = 0.0, []
        for prompt, chosen, rejected in batch:
            margin = score(prompt, chosen) - score(prompt, rejected)
            loss += (1 + (-margin).exp()).log() / BATCH
            margins.append(margin.item())
        loss.backward()
        rate = RATE * RATES[update - 1]
        row = dict(update=update, episodes=update * BATCH, skipped_updates=0, loss=loss.item(), margin=mean(margins))
        row |= dict(accuracy=mean((x > 0) + (x == 0) / 2 for x in margins), learning_rate=rate)
        row["grad_norm"] = clipped_step(model, optimizer, rate, 2)
        metrics.append(row | (evaluation(update) if update in (3, UPDATES) else {}))
    assert set(drawn[: len(pairs)]) == {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs}
    assert max(row["grad_norm"] for row in metrics[1:]) > 2.4
    assert_agree(recorded, metrics, samples, model.state_dict())
    chosen = mean(row["reward"] for row in samples[-2 * EVAL :: 2])
    config = json.loads((tmp_path / "r" / "reward_model" / "config.json").read_text())
    assert config["reward_mean"] == pytest.approx(chosen, abs=1e-4)


def test_dpo(tmp_path, capsys):
    beta, max_grad_norm = 0.4, 1.0
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "policy")

    def ids_of(response):
        return tokenizer(response)["input_ids"] + [0]

    rows = rows_of(EXAMPLE / "preferences.jsonl")[:1200]  # each prompt once
    lengths = [max(len(ids_of(row[name])) for name in ("chosen", "rejected")) for row in rows]
    short, long = ([row for row, n in zip(rows, lengths) if n in kept] for kept in (range(LENGTH + 1), [LENGTH + 1]))
    prompts = rows_of(EXAMPLE / "prompts_test.jsonl")
    held_out, more = write(tmp_path / "held_out.jsonl", [row | p for row, p in zip(short[-EVAL - 2 :], prompts)])
    held_out = held_out[:EVAL]
    pairs, flags = short[:30], write(tmp_path / "pairs.jsonl", [*long[:2], *short[:30]])[1]  # long ones are dropped
    flags += ["--eval-dataset", more[1], "--total-episodes", UPDATES * BATCH, "--response-length", LENGTH]
    flags += ["--gold-reward-function", EXAMPLE / "sentiment.py:reward", "--beta", beta]
    recorded = record("dpo", [*flags, "--max-grad-norm", max_grad_norm], tmp_path / "r")
    second = Second(recorded, pairs)
    second.scored, second.temperature = False, 1.0
    policy, optimizer = second.policy, adamw(second.policy, RATE)

    def logprob(model, prompt, response):
        return second.logprobs(model, second.cut(prompt), ids_of(response)).sum()

    def log_ratio(prompt, response):
        with torch.no_grad():
            ref_logprob = logprob(second.reference, prompt, response)
        return logprob(policy, prompt, response) - ref_logprob

    @torch.no_grad()
    def evaluation():
        texts = [(pair["prompt"], pair[name]) for pair in held_out for name in ("chosen", "rejected")]
        rewards = [beta * log_ratio(*text).item() for text in texts]
        margins = [a - b for a, b in zip(rewards[::2], rewards[1::2])]
        certainties.append([1 / (1 + math.exp(-abs(margin))) for margin in margins])
        logprobs = [logprob(policy, *text).item() for text in texts]
        lengths = [float(len(ids_of(response))) for _, response in texts]
        return dict(
            **accuracy_metrics(margins),
            eval_chosen_logprob=mean(logprobs[::2]),
            eval_rejected_logprob=mean(logprobs[1::2]),
            eval_score=mean(rewards),
            eval_score_std=statistics.stdev(rewards),
            eval_length_correlation=statistics.correlation(rewards, lengths) if any(rewards) else None,
        )

    certainties = []
    metrics, drawn = [second.evaluated({}, 0, UPDATES) | evaluation()], []
    for update in range(1, UPDATES + 1):
        batch = [(pair.prompt.text, *pair.responses) for pair in recorded.batches[update - 1]]
        drawn += batch
        loss, margins = 0.0, []
        for prompt, chosen, rejected in batch:
            margin = beta * (log_ratio(prompt, chosen) - log_ratio(prompt, rejected))
            loss += (1 + (-margin).exp()).log() / BATCH
            margins.append(margin.item())
        loss.backward()
        found = dict(loss=loss.item(), margin=mean(margins), learning_rate=RATE * RATES[update - 1])
        found |= dict(accuracy=mean((x > 0) + (x == 0) / 2 for x in margins))
        found["grad_norm"] = clipped_step(policy, optimizer, found["learning_rate"], max_grad_norm)
        found = second.evaluated(found, update, UPDATES)
        metrics.append(found | (evaluation() if "eval_log_ratio" in found else {}))
    for rows in (metrics, recorded.metrics):  # at first all margins are 0, but for rounding
        assert abs(rows[1].pop("accuracy") - 0.5) <= 0.5
    assert set(drawn) < {
        (row["prompt"], row["chosen"], row["rejected"]) for row in pairs
    }  # the others need no log π_ref
    assert not second.rollouts
    table = [line for line in capsys.readouterr().out.splitlines() if line[3:7] == " to "]  # 0.5 to 0.6, 0.6 to 0.7, …
    counts = [int(line.split()[3]) for line in table]
    tenths = [min(int(10 * certainty), 9) for certainty in certainties[-1]]
    assert counts == [tenths.count(i) for i in range(5, 10)] and counts[0] < EVAL
    assert 0 < metrics[-1]["accuracy"] <= 1 and metrics[-1]["eval_margin"] != 0
    assert_telling(metrics, max_grad_norm, [])
    assert_agree(recorded, metrics, second.samples, policy.state_dict())
