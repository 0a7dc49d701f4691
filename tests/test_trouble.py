"""Numerical trouble and odd responses; what is saved is what was trained."""

import json
import zlib

import pytest
import torch
from conftest import (
    EXAMPLE,
    PAIRS,
    SCRIPTS,
    logprobs_of,
    others_are_slow,
    read_metrics,
    short_flags,
    start_backend,
)
from workers.script_worker import run

import common
import ppo

FLAGS = "--batch-size 4 --eval-every 0 --lr-schedule constant --warmup-ratio 0".split()
# One engine and two, prompts and pairs.
EACH = others_are_slow(SCRIPTS, soon="remax ppo dpo")


def run_flags(script, folder, updates, *more) -> list:
    own = [*short_flags(script, 6), *SCRIPTS[script].one_step.split()]
    return [*FLAGS, "--total-episodes", 4 * updates, *own, *more, "--output-dir", f"{folder}/r"]


@pytest.mark.parametrize("script", EACH)
def test_two_bad_updates_are_skipped_counted_and_leave_no_trace(tmp_path, script):
    found = run(script, run_flags(script, tmp_path, 4), poisoned=((2, 3), "loss"))
    rows = read_metrics(tmp_path / "r")
    steps = SCRIPTS[script].models
    assert found["status"] == 0 and [row["skipped_updates"] for row in rows] == [0, steps, 2 * steps, 2 * steps]
    assert [row["loss"] is None for row in rows] == [row["grad_norm"] is None for row in rows] == [0, 1, 1, 0]
    assert all(weights.isfinite().all() for weights in found["weights"].values())


HOWS = [("remax", "gradient"), ("ppo", "loss"), ("spr", "loss"), ("dpo", "loss")]


@pytest.mark.parametrize("script, how", others_are_slow(HOWS, soon="remax dpo"))
def test_ten_bad_updates_in_a_row_end_the_run_and_say_what_was_first(tmp_path, capsys, script, how):
    found = run(script, run_flags(script, tmp_path, 14), poisoned=(range(3, 99), how))
    first = dict(loss="loss", gradient="grad_norm")[how]
    line = f"error: ten updates in a row were skipped: {first} is not finite since update 3\n"
    assert found["status"] == 1 and capsys.readouterr().err.count(line) == 1
    assert len(read_metrics(tmp_path / "r")) == 12


@pytest.mark.parametrize("script", EACH)
def test_a_model_that_has_diverged_ends_the_run_with_a_line(tmp_path, capsys, script):
    assert run(script, run_flags(script, tmp_path, 4, "--learning-rate", "1e30"))["status"] == 1
    err = capsys.readouterr().err
    assert ("outputs are not finite" if script in PAIRS else "logits are not finite") in err


def test_nine_bad_updates_in_a_row_do_not(tmp_path):
    bad = [*range(2, 11), *range(12, 21)]
    assert run("remax", run_flags("remax", tmp_path, 22), poisoned=(bad, "loss"))["status"] == 0
    assert read_metrics(tmp_path / "r")[-1]["skipped_updates"] == 18


@pytest.mark.parametrize("script", others_are_slow(SCRIPTS, soon="remax spr reward_model"))
@pytest.mark.parametrize("dtype, zero_stage", [("float32", 0), pytest.param("bfloat16", 3, marks=pytest.mark.slow)])
def test_success_is_claimed_only_of_a_saved_model_that_is_the_trained_one(tmp_path, capsys, script, dtype, zero_stage):
    flags = [*run_flags(script, tmp_path, 1), "--dtype", dtype, "--zero-stage", zero_stage]
    assert run(script, [*flags, "--output-dir", tmp_path / "sound"])["status"] == 0
    assert "Saved: " in capsys.readouterr().out
    assert run(script, flags, spoiled=True)["status"] == 1
    out, err = capsys.readouterr()
    assert "is not the trained one" in err and "Saved: " not in out


def function(folder, code) -> list:
    path = folder / f"f{zlib.crc32(code.encode())}.py"  # a process reads a file once
    path.write_text(f"def reward(prompts, responses, **columns):\n    return {code}\n")
    return ["--reward-function", f"{path}:reward"]


@pytest.mark.parametrize("script", ["remax", "reinforce"])
def test_gradients_grow_with_the_rewards_up_to_ten_thousand(tmp_path, script):
    gradients = []
    for scale in (1, 1e4):
        rewards = function(tmp_path, f"[{scale} * (len(text) % 3 - 1) for text in responses]")
        flags = run_flags(script, tmp_path / str(scale), 1, "--kl-coef", "0", *rewards)
        gradients += run(script, flags, fixed=True)["gradients"]
    assert gradients[0].norm() > 0
    assert (gradients[1] / 1e4 - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_whitened_advantages_do_not_depend_on_the_size_of_the_rewards(tmp_path):
    gradients = []
    for scale in (1, 1e4):
        rewards = function(tmp_path, f"[{scale} * (len(text) % 3 - 1) for text in responses]")
        found = run("ppo", run_flags("ppo", tmp_path / str(scale), 1, "--kl-coef", "0", *rewards), fixed=True)
        gradients.append(found["gradients"][0])  # the policy's; the value model's is the second
        assert found["status"] == 0 and found["gradients"][1].isfinite().all()
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_equal_rewards_teach_nothing(tmp_path):
    rewards = function(tmp_path, "[7.0] * len(responses)")
    loo = ["--baseline", "leave-one-out", "--num-samples", "2"]
    for script, more in (("remax", []), ("reinforce", loo)):
        found = run(script, run_flags(script, tmp_path / script, 3, "--kl-coef", "0", *rewards, *more))
        assert found["status"] == 0 and all((gradient == 0).all() for gradient in found["gradients"])
        assert [row["grad_norm"] for row in read_metrics(tmp_path / script / "r")] == [0, 0, 0]
    start_backend()
    assert (ppo.whiten(torch.full((2, 3), 7.0), torch.tensor([[1, 1, 0], [1, 1, 1]])) == 0).all()


# ReMax: the greedy response is the same one. PPO: equal advantages are whitened to 0. SPR: weights sum to 1.
@pytest.mark.parametrize("script, factor", [("remax", 0), ("reinforce", 2), ("ppo", 0), ("grpo", 0), ("spr", 1)])
def test_empty_responses_to_prompts_of_one_token(tmp_path, monkeypatch, tokenizer, script, factor):
    """Every response is EOS alone: one token that is sampled, rewarded and learned from like any other."""
    texts = [" the", " a", " movie", " plot"]
    ids = torch.tensor([tokenizer(text)["input_ids"][:1] for text in texts])
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(prompt=tokenizer.decode(row))) + "\n" for row in ids))

    real_generate = common.generate

    def only_eos(model, prompts_BP, prompt_mask_BP, eos_ids, sampling, num_samples, greedy):
        if not eos_ids:  # the check of a model that was loaded
            return real_generate(model, prompts_BP, prompt_mask_BP, eos_ids, sampling, num_samples, greedy)
        assert prompts_BP.shape[1] == 1
        return torch.full((len(prompts_BP) * (num_samples + greedy), sampling.response_length), eos_ids[0])

    monkeypatch.setattr(common, "generate", only_eos)
    rewards = function(tmp_path, "[2.0 if text == '' else 1 / 0 for text in responses]")
    found = run(script, run_flags(script, tmp_path, 1, "--dataset", tmp_path / "p.jsonl", *rewards))
    (row,) = read_metrics(tmp_path / "r")
    assert found["status"] == 0 and row["response_length"] == 1 and row["truncated_fraction"] == 0
    assert row["reward"] == 2 and row.get("kl", 0) == pytest.approx(0, abs=1e-6)
    sampling = common.Sampling(max_prompt_length=1, response_length=1, temperature=1.0, batch_size=4)
    policy = common.load_policy(str(EXAMPLE / "policy"), tokenizer, sampling, start_backend())
    logprobs = logprobs_of(policy.engine, ids, torch.ones_like(ids), torch.full_like(ids, tokenizer.eos_token_id))
    (-factor * logprobs.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.engine.parameters()])
    torch.testing.assert_close(found["gradients"][0], expected, rtol=1e-4, atol=1e-6)
