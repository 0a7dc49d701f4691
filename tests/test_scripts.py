"""The scripts as a user runs them: they learn, say so, run under the launchers, and save what others can read."""

import functools
import json
import shutil

import pytest
import torch
from conftest import (
    EXAMPLE,
    EXAMPLE_PAIRS,
    ROOT,
    SHARED,
    TINY,
    assert_equal_gradients,
    assert_equal_training,
    assert_ok,
    launch,
    read_metrics,
    run_here,
    run_script,
    start_backend,
    tiny_model,
    together,
    values_of,
)
from safetensors.torch import load_file
from workers.script_worker import run

import common
import dpo
import reward_model
import spr_token

GOLD = ("--gold-reward-function", EXAMPLE / "sentiment.py:reward")
with_deepspeed = functools.partial(launch, launcher="deepspeed")
LEARN = "--learning-rate 1e-3 --eval-every 0 --response-length 24".split()


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(folder) -> dict:
    return load_file(folder / "policy" / "model.safetensors")


def mean(rows, name) -> float:
    return sum(row[name] for row in rows) / len(rows)


def learned(folder, rise: float) -> bool:
    rows = read_metrics(folder)[1:]
    return mean(rows[-4:], "reward") > mean(rows[:4], "reward") + rise


# ---------------------------------------------------------------- remax.py, and what is common to all


def test_it_learns_from_any_folder_and_says_so(tmp_path):
    flags = "--total-episodes 768 --batch-size 32 --learning-rate 5e-4 --eval-every 12 --eval-size 32".split()
    result = launch("remax.py", *flags, *GOLD, cwd=tmp_path)
    assert_ok(result)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("remax__1__")
    rows = read_metrics(folder)
    assert [row["update"] for row in rows] == list(range(25))
    for name, rise in (("reward", 1.5), ("gold_reward", 0.15)):
        assert mean(rows[-4:], name) > mean(rows[1:5], name) + rise
    first = rows[1]
    assert abs(first["kl"]) < 1e-5 and first["learning_rate"] == pytest.approx(5e-4 / 2)  # reference = policy at first
    assert rows[0]["eval_win_rate"] == 0.5 and rows[0]["eval_log_ratio"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["eval_win_rate"] > 0.6 and rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 1
    assert rows[-1]["episodes"] == 768 and rows[-1]["skipped_updates"] == 0
    assert first["entropy"] > 0 and 0 <= first["truncated_fraction"] <= 1 and first["peak_memory_bytes"] > 1e8

    # The console: clean, and its last lines tell what was learned and where it is.
    lines = result.stdout.strip().splitlines()
    assert lines[-1].split() == ["Curves:", "tensorboard", "--logdir", str(folder.parent)]
    assert "eval_win_rate" in result.stdout
    assert "arning:" not in result.stdout + result.stderr and "[WARNING]" not in result.stdout + result.stderr
    assert sum("▸" in line for line in lines) == 9
    samples = rows_of(folder / "samples.jsonl")
    assert len(samples) == 3 * 32 and {"prompt", "response", "reward", "gold_reward", "log_ratio"} <= samples[0].keys()
    assert list(folder.glob("events.out.tfevents.*"))
    args = json.loads((folder / "args.json").read_text())
    assert args["learning_rate"] == 5e-4 and args["ranks"] == 1

    # The saved folder is a plain one.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder / "policy", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len({path.stat().st_mode for path in (folder / "policy").iterdir()}) == 1  # others may read the weights, too
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    last = [row for row in samples if row["update"] == 24][0]
    ids = tokenizer(last["prompt"], return_tensors="pt")
    tokens = model.generate(**ids, do_sample=False, max_new_tokens=48, pad_token_id=1)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == last["response"]


@pytest.mark.parametrize(
    "launcher, zero_stage", [("torchrun", 0), pytest.param("deepspeed", 3, marks=pytest.mark.slow)]
)
def test_two_ranks(tmp_path, launcher, zero_stage):
    # Seven held-out prompts do not divide by two; responses end at different lengths on the two ranks.
    flags = [*TINY, "--total-episodes", 16, "--zero-stage", zero_stage, "--output-dir", tmp_path / "r"]
    result = launch("remax.py", *flags, ranks=2, launcher=launcher)
    assert_ok(result)
    rows = read_metrics(tmp_path / "r")
    assert len(rows) == 3 and abs(rows[1]["kl"]) < 1e-5
    assert result.stdout.count(", prompts: ") == 2  # rank 0 alone speaks
    assert_ok(run_script("remax.py", *TINY, "--total-episodes", 8, "--output-dir", tmp_path / "alone"))
    samples, alone = (rows_of(tmp_path / name / "samples.jsonl")[:7] for name in ("r", "alone"))
    assert [row["response"] for row in samples] == [row["response"] for row in alone]  # update 0, in the same order


@pytest.mark.parametrize("start", [run_script, pytest.param(with_deepspeed, marks=pytest.mark.slow)])
def test_a_failure_on_one_rank_ends_all(tmp_path, start):
    code = """
import os
def reward(prompts, responses, **columns):
    return [1 / int(os.environ["RANK"]) for prompt in prompts]
"""
    (tmp_path / "f.py").write_text(code)
    flags = ("--reward-function", f"{tmp_path}/f.py:reward", "--output-dir", tmp_path / "r")
    result = start("remax.py", *TINY, *flags, ranks=2)
    assert result.returncode != 0 and "f.py:reward raised ZeroDivisionError" in result.stderr


def test_wrong_input_makes_no_traceback(tmp_path):
    result = run_script("remax.py", "--dataset", "no.jsonl", "--output-dir", tmp_path / "r")
    assert result.returncode == 2 and result.stderr.strip() == "error: no.jsonl: No such file or directory"


def test_other_models_data_and_rewards(tmp_path, tokenizer):
    """A Llama policy with two EOS ids, csv prompts, a penalty, bfloat16, a temperature, a discount."""
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=[0, 5], pad_token_id=None)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "p.csv").write_text('text,label\nThe plot,1\n"The music, the rest",2\n')
    flags = ["--model", tmp_path / "m", "--dataset", tmp_path / "p.csv", "--eval-dataset", tmp_path / "p.csv"]
    flags += ["--reward-model", EXAMPLE / "reward_model"]
    flags += "--prompt-column text --missing-eos-penalty 100 --dtype bfloat16 --max-prompt-length 8".split()
    flags += "--temperature 0.7 --gamma 0.99 --gradient-checkpointing --output-dir".split()
    assert run_here("remax", *TINY, *flags, tmp_path / "r") == 0
    rows = read_metrics(tmp_path / "r")
    assert rows[1]["truncated_fraction"] > 0 and rows[1]["reward"] < -40
    assert abs(rows[1]["kl"]) < 1e-5  # policy and reference share temperature and dtype


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "models" / "imdb-mini").is_dir(), reason="needs the development data beside the project"
)
def test_real_prompts_with_a_real_small_model(tmp_path):
    flags = ["--model", SHARED / "models/imdb-mini", "--dataset", SHARED / "data/imdb_prompts.jsonl"]
    flags += ["--eval-dataset", SHARED / "data/imdb_preferences_8words.jsonl", "--output-dir", tmp_path / "r"]
    flags += ["--reward-function", SHARED / "rewards/imdb_sentiment.py:reward", "--kl-coef", "0.0075"]
    flags += "--learning-rate 1e-3 --total-episodes 640 --batch-size 32 --response-length 24 --eval-every 20".split()
    assert_ok(run_script("remax.py", *flags))
    rows = read_metrics(tmp_path / "r")
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.03


def test_a_shift_of_all_rewards_changes_nothing(tmp_path):
    """A Bradley-Terry loss cannot see the zero of its scores, so neither may what is learned from them."""
    code = """
def reward(prompts, responses, **columns):
    return [len(response) / 20 for response in responses]
def shifted(prompts, responses, **columns):
    return [score + 3 for score in reward(prompts, responses)]
"""
    (tmp_path / "f.py").write_text(code)
    flags = "--total-episodes 24 --batch-size 8 --response-length 12 --eval-every 0 --learning-rate 1e-3".split()
    weights = {}
    for script in ("remax", "reinforce"):
        for name in ("reward", "shifted"):
            folder = tmp_path / f"{script}-{name}"
            function = f"{tmp_path}/f.py:{name}"
            assert run_here(script, *flags, "--reward-function", function, "--output-dir", folder) == 0
            weights[script, name] = load_file(folder / "policy" / "model.safetensors")
    rewards = [read_metrics(tmp_path / f"remax-{name}")[0]["reward"] for name in ("reward", "shifted")]
    assert rewards[1] == pytest.approx(rewards[0] + 3, abs=1e-5)
    assert_equal_training(weights["remax", "shifted"], weights["remax", "reward"], 1e-3)
    with pytest.raises(AssertionError):  # without a baseline the shift is learned from
        assert_equal_training(weights["reinforce", "shifted"], weights["reinforce", "reward"], 1e-3)


# ---------------------------------------------------------------- reinforce.py and ppo.py


def test_the_siblings_learn(tmp_path):
    cases = dict(
        plain=["reinforce.py", "--batch-size", "32"],
        loo=["reinforce.py", "--batch-size", "16", "--baseline", "leave-one-out", "--num-samples", "2"],
        ppo=["ppo.py", "--batch-size", "32", "--num-epochs", "2"],
        group=["grpo.py", "--batch-size", "8", "--num-samples", "4"],
    )
    flags = []
    for name, case in cases.items():
        updates = ["--total-episodes", 12 * int(case[2])]
        flags.append([*case, *updates, *LEARN, "--output-dir", tmp_path / name])
    for result in together(run_script, *flags):
        assert_ok(result)
    for name in cases:
        assert learned(tmp_path / name, rise=0.7), name  # with other seeds 1.4 to 2.3
    assert "baseline_reward" not in read_metrics(tmp_path / "plain")[-1]
    last = read_metrics(tmp_path / "loo")[-1]
    assert last["baseline_reward"] == pytest.approx(last["reward"])
    last = read_metrics(tmp_path / "ppo")[-1]
    assert last["approx_kl"] > 0 and 0 <= last["clip_fraction"] < 0.5 and last["value_loss"] > 0


def test_ppo_with_one_step_per_rollout_has_ratio_one(tmp_path):
    assert run_here("ppo", *TINY, "--num-epochs", 1, "--micro-batch-size", 3, "--output-dir", tmp_path / "r") == 0
    for row in read_metrics(tmp_path / "r")[1:]:
        assert row["approx_kl"] < 1e-6 and row["clip_fraction"] == 0 and abs(row["loss"]) < 1e-5


TIED = [("remax", []), ("grpo", []), ("reinforce", ["--baseline", "leave-one-out"])]


@pytest.mark.parametrize("script, more", TIED)
def test_prompts_whose_responses_have_one_reward_are_counted(tmp_path, script, more):
    """Of each four prompts one is such a prompt; the rewards of its responses differ by rounding."""
    lines = [json.dumps(dict(prompt=text, tied=text == " the")) for text in (" the", " a movie", " plot", " actor")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    (tmp_path / "f.py").write_text("""
def reward(prompts, responses, tied):
    sizes = [sum(map(ord, response)) for response in responses]
    return [5 + 1e-11 * size if same else size / 1000 for size, same in zip(sizes, tied)]
""")
    flags = ["--dataset", tmp_path / "p.jsonl", "--reward-function", f"{tmp_path / 'f.py'}:reward", "--eval-every", 0]
    flags += "--batch-size 4 --total-episodes 8 --num-samples 4 --response-length 8".split()
    assert run(script, [*flags, *more, "--output-dir", tmp_path / "r"], fixed=True)["status"] == 0
    assert [row["tied_fraction"] for row in read_metrics(tmp_path / "r")] == [0.25, 0.25]


@pytest.mark.parametrize("script", ["spr", "spr_token"])
def test_an_evaluation_loads_one_reference(tmp_path, monkeypatch, script):
    """Also the first one, which evaluates the reference itself."""
    loaded = []
    load = common.load_language_model
    monkeypatch.setattr(common, "load_language_model", lambda path, *more: loaded.append(path) or load(path, *more))
    flags = "--num-samples 2 --total-episodes 8 --batch-size 8 --eval-size 2 --response-length 4".split()
    assert run_here(script, *flags, "--output-dir", tmp_path / "r") == 0
    assert len(loaded) == 3  # the policy, and a reference before and after the update


def test_grpo_with_one_step_per_rollout_has_ratio_one(tmp_path):
    flags = "--num-samples 3 --variant dr-grpo --beta 0 --micro-batch-size 5 --response-length 6".split()
    assert run_here("grpo", *TINY, *flags, "--output-dir", tmp_path / "r") == 0
    for row in read_metrics(tmp_path / "r")[1:]:
        assert row["approx_kl"] < 1e-6 and row["clip_fraction"] == 0 and row["grad_norm"] > 0


def test_a_value_model_starts_from_the_reward_model_if_the_tokenizers_agree():
    backend = start_backend()
    sampling = common.Sampling(max_prompt_length=3, response_length=3, temperature=1.0, batch_size=1)
    paths = (str(EXAMPLE / "reward_model"), str(EXAMPLE / "policy"))
    ids, ones = torch.arange(5, 11)[None], torch.ones(1, 3, dtype=torch.long)
    value = common.load_value_model(*paths, sampling, backend)
    with torch.no_grad():
        values = values_of(value, ids[:, :3], ones, ids[:, 3:])
        for t in range(3):  # the value of token t has seen what comes before it
            score = common.scores(value, ids[:, : 3 + t].tolist(), backend.device)
            torch.testing.assert_close(values[:, t], score)
        with_two_heads = spr_token.TokenValues(value.model, value.zero)
        two = values_of(with_two_heads, ids[:, :3], ones, ids[:, 3:])  # Q has seen token t, too
        torch.testing.assert_close(two[:, 1], values)
        torch.testing.assert_close(two[:, 0, :2], values[:, 1:])
        torch.testing.assert_close(two[:, 0, 2], common.scores(value, ids.tolist(), backend.device))
        value = common.load_value_model(None, paths[1], sampling, backend)
        assert (values_of(value, ids[:, :3], ones, ids[:, 3:]) == 0).all()


# ---------------------------------------------------------------- spr.py

SPR = (
    "--total-episodes 16 --batch-size 8 --num-epochs 1 --num-minibatches 2 --num-samples 4 --response-length 12".split()
)
SPR += "--eval-size 7 --eval-every 0 --learning-rate 1e-3".split()


def test_spr_learns_and_reports(tmp_path):
    flags = "--total-episodes 192 --batch-size 64 --num-samples 4 --learning-rate 1e-3 --response-length 32".split()
    result = run_script("spr.py", *flags, *GOLD, "--output-dir", tmp_path / "r")
    assert_ok(result)
    rows = read_metrics(tmp_path / "r")
    assert [row["update"] for row in rows] == [0, 1, 2, 3]
    first, *iterations = rows
    assert first["eval_win_rate"] == 0.5 and first["eval_log_ratio"] == pytest.approx(0, abs=1e-4)
    last = iterations[-1]
    assert last["reward"] > iterations[0]["reward"] + 1 and last["eval_reward"] > first["eval_reward"] + 1
    assert last["eval_win_rate"] > 0.6 and "eval_gold_reward" in last and last["episodes"] == 192
    for row in iterations:
        assert row["reward"] < row["weighted_reward"] < row["best_reward"] and 1 < row["weight_ess"] < 4
        assert row["seconds_rollout"] > 0 and row["seconds_score"] > 0 and row["seconds_train"] > 0
    assert "on held-out" in result.stdout or "held-out prompts" in result.stdout and "eval_win_rate" in result.stdout
    prompts = []
    for k in (1, 2, 3):
        samples = rows_of(tmp_path / "r" / f"iteration-{k}.jsonl")
        rewards = torch.tensor([row["reward"] for row in samples], dtype=torch.float64).view(-1, 4)
        found = torch.tensor([row["weight"] for row in samples], dtype=torch.float64).view(-1, 4)
        torch.testing.assert_close(found, rewards.softmax(1), rtol=1e-5, atol=1e-8)  # β is 1
        prompts += [row["prompt"] for row in samples[::4]]
        assert all(len({row["prompt"] for row in samples[i : i + 4]}) == 1 for i in range(0, len(samples), 4))
    assert len(prompts) == len(set(prompts)) == 192  # the next slice


def test_the_limits_of_beta_train_the_same_models(tmp_path):
    cases = dict(best=["--weighting", "best-of-n"], cold=["--beta", "1e-4"])
    cases |= dict(uniform=["--weighting", "uniform"], hot=["--beta", "1e7"])
    weights = {
        name: run("spr", [*SPR, *case, "--output-dir", tmp_path / name])["weights"] for name, case in cases.items()
    }
    assert_equal_training(weights["best"], weights["cold"], 1e-3)
    assert_equal_training(weights["uniform"], weights["hot"], 1e-3)
    with pytest.raises(AssertionError):
        assert_equal_training(weights["best"], weights["hot"], 1e-3)


def test_rows_of_weight_0_are_not_computed_and_would_change_nothing(tmp_path, monkeypatch):
    source = (ROOT / "spr.py").read_text(encoding="utf-8")
    line = "[:num_kept]"
    assert source.count(line) == 1
    (tmp_path / "all_rows.py").write_text(source.replace(line, ""))
    monkeypatch.syspath_prepend(tmp_path)
    logprobs, counts, found = common.logprobs, dict(spr=0, all_rows=0), {}
    for script in counts:

        def counted(policy, responses, script=script):
            counts[script] += len(responses.texts) * torch.is_grad_enabled()
            return logprobs(policy, responses)

        monkeypatch.setattr(common, "logprobs", counted)
        found[script] = run(script, [*SPR, "--weighting", "best-of-n", "--output-dir", tmp_path / script])
    assert counts == dict(spr=16, all_rows=16 * 4)
    assert_equal_gradients(found["spr"]["gradients"], found["all_rows"]["gradients"])
    assert_equal_training(found["spr"]["weights"], found["all_rows"]["weights"], 1e-3)


# That a reset optimizer is a new one at all stages, test_engine.py shows.
@pytest.mark.parametrize("zero_stage, dtype", [(0, "float32"), (1, "bfloat16")])
def test_each_iteration_is_a_fit_of_its_own(tmp_path, zero_stage, dtype):
    """Adam's moments are 0 before the first of its two steps, and the schedule begins anew."""
    flags = ["--zero-stage", zero_stage, "--dtype", dtype, "--total-episodes", 24, "--output-dir", tmp_path / "r"]
    found = run("spr", [*SPR, *flags])
    assert found["status"] == 0 and [moments > 0 for moments in found["moments"]] == 3 * [False, True]
    assert [row["learning_rate"] for row in read_metrics(tmp_path / "r")] == 3 * [pytest.approx(1e-3)]


@pytest.mark.parametrize("script", ["spr", "spr_token"])
def test_the_last_position_of_the_model_can_be_used(tmp_path, script):
    flags = "--max-prompt-length 64 --response-length 64 --total-episodes 4 --batch-size 4 --num-samples 1".split()
    assert run_here(script, *SPR, *flags, "--output-dir", tmp_path / "r") == 0


# ---------------------------------------------------------------- reward_model.py


def test_a_reward_model_is_trained_and_remax_uses_it(tmp_path):
    flags = "--total-episodes 960 --eval-every 30 --learning-rate 3e-3".split()
    result = run_script("reward_model.py", *flags, "--output-dir", tmp_path / "r")
    assert_ok(result)
    rows = read_metrics(tmp_path / "r")
    assert rows[-1]["eval_accuracy"] > 0.7 > rows[0]["eval_accuracy"]
    assert "Certainty" in result.stdout and "observed" in result.stdout
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "r" / "reward_model"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    chosen = [row for row in rows_of(tmp_path / "r" / "samples.jsonl") if row["chosen"]][-200:]
    assert {row["update"] for row in chosen} == {rows[-1]["update"]}
    assert model.config.reward_mean == pytest.approx(mean(chosen, "reward"), abs=1e-4)
    assert run_here("remax", *TINY, "--reward-model", folder, "--output-dir", tmp_path / "remax") == 0


def load(path, tokenizer, max_prompt_length=64, max_length=128):
    layout = common.Layout(answer_columns=["chosen", "rejected"])
    return reward_model.load_pairs(str(path), layout, tokenizer, max_prompt_length, max_length)


def test_pairs_are_cut_in_the_prompt_only_and_dropped_with_a_count(tmp_path, tokenizer, capsys):
    long = "The acting in this film was a joy and the rest was a mess and the plot"
    rows = [
        dict(prompt=long, chosen=" was good.", rejected=" was bad."),
        dict(prompt="The plot", chosen=" same", rejected=" same"),
        dict(prompt="The plot", chosen=" ", rejected=" bad"),
        dict(prompt="The plot", chosen=" good" * 60, rejected=" bad"),
        dict(prompt="The plot", chosen=[dict(role="assistant", content=" good")], rejected=" bad"),
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load(tmp_path / "p.jsonl", tokenizer, max_prompt_length=4, max_length=40)
    out = capsys.readouterr().out
    assert "pairs: 2 (" in out and "1 without an answer, dropped" in out
    assert "1 of equal responses, dropped" in out and "1 of more than 40 tokens, dropped" in out
    whole = [tokenizer(long + end)["input_ids"] + [tokenizer.eos_token_id] for end in (" was good.", " was bad.")]
    prompt = len(tokenizer(long)["input_ids"])
    assert list(pairs[0].ids) == [ids[prompt - 4 :] for ids in whole]
    assert pairs[0].prompt.text == long and pairs[1].responses == (" good", " bad")

    layout = common.Layout(answer_columns=["chosen", "rejected"])
    found = dpo.load_pairs(str(tmp_path / "p.jsonl"), layout, tokenizer, 4, 40)
    assert [(pair.prompt.text, pair.responses) for pair in found] == [(p.prompt.text, p.responses) for p in pairs]
    assert found[0].prompt.ids == tokenizer(long)["input_ids"][-4:]
    assert list(found[0].ids) == [tokenizer(end)["input_ids"] + [0] for end in (" was good.", " was bad.")]
    assert capsys.readouterr().out == out


BAD = {
    "missing_rejected_one_row.jsonl": ":4: no column 'rejected'",
    "null_values.jsonl": ":3: 'chosen' is None",
    "wrong_types.jsonl": ":2: 'chosen' holds a;",
    "chosen_equals_rejected_all.jsonl": "no pairs are left",
    "missing_prompt_column.jsonl": ":1: no column 'prompt'",
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data beside the project")
def test_broken_preferences_of_the_development_data(tokenizer, capsys):
    for name, expected in BAD.items():
        with pytest.raises(SystemExit) as error:
            load(SHARED / "data" / "bad" / name, tokenizer)
        assert error.value.code == 2 and expected in capsys.readouterr().err
    for name, dropped in (
        ("chosen_equals_rejected.jsonl", "3 of equal"),
        ("empty_answers.jsonl", "2 without an answer"),
    ):
        assert load(SHARED / "data" / "bad" / name, tokenizer, max_length=4096)
        assert dropped in capsys.readouterr().out


def test_a_reward_model_goes_on_from_its_own_head(tmp_path, capsys):
    """Its held-out accuracy and scores at update 0 are the given model's own; a shifted mean is measured again."""
    given = tmp_path / "given"
    shutil.copytree(EXAMPLE / "reward_model", given)
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps(config | dict(reward_mean=config["reward_mean"] + 100)))
    flags = "--total-episodes 64 --batch-size 32 --eval-size 100 --learning-rate 1e-5".split()
    assert run_here("reward_model", "--model", given, *EXAMPLE_PAIRS, *flags, "--output-dir", tmp_path / "r") == 0
    assert "new one" not in capsys.readouterr().out

    first, *_, last = read_metrics(tmp_path / "r")
    rows = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    start = [row for row in rows if row["update"] == 0]
    prompts = [common.Prompt(row["prompt"], [], {}) for row in start]
    reward = common.Reward(str(EXAMPLE / "reward_model"), backend=start_backend(), micro_batch_size=32)
    scores_B = reward.score(prompts, [row["response"] for row in start]) + config["reward_mean"]
    torch.testing.assert_close(torch.tensor([row["reward"] for row in start]), scores_B, atol=1e-4, rtol=1e-4)
    accuracy = (scores_B[::2] > scores_B[1::2]).float().mean().item()
    assert first["eval_accuracy"] == pytest.approx(accuracy, abs=1e-6) and accuracy > 0.8
    assert abs(last["eval_accuracy"] - accuracy) < 0.1

    saved = str(tmp_path / "r" / "reward_model")
    end = [row for row in rows if row["update"] == 2]
    chosen = common.Reward(saved, backend=start_backend(), micro_batch_size=32).score(
        [common.Prompt(row["prompt"], [], {}) for row in end[::2]], [row["response"] for row in end[::2]]
    )
    assert chosen.mean().item() == pytest.approx(0.0, abs=1e-4)  # the new zero


def test_metrics_and_calibration():
    rows = [dict(reward=r, length=n) for r, n in ((2.0, 1), (0.0, 3), (1.0, 2), (1.0, 2), (0.0, 4), (3.0, 0))]
    metrics = common.pair_metrics(rows)
    assert metrics["eval_accuracy"] == 0.5 and metrics["eval_margin"] == pytest.approx(-1 / 3)
    assert metrics["eval_length_correlation"] < -0.8
    table = common.calibration_table(rows).splitlines()
    assert table[1].split() == ["0.5", "to", "0.6", "1", "0.50", "0.00"] and len(table) == 6
    assert table[4].split()[3:] == ["1", "0.88", "1.00"] and table[5].split()[3:] == ["1", "0.95", "0.00"]
