"""reinforce.py, ppo.py and reward_model.py as a user runs them."""

import json

import pytest
import torch
from conftest import SHARED, TINY, assert_ok, read_metrics, run_script, together

import common
import reward_model


def learned(folder, rise: float) -> bool:
    rows = read_metrics(folder)[1:]
    return sum(row["reward"] for row in rows[-4:]) / 4 > sum(row["reward"] for row in rows[:4]) / 4 + rise


LEARN = "--total-episodes 960 --batch-size 32 --learning-rate 5e-4 --eval-every 0 --response-length 32".split()


def test_reinforce_learns(tmp_path):
    plain = ("reinforce.py", *LEARN, "--output-dir", tmp_path / "plain")
    flags = "--baseline leave-one-out --num-samples 2".split()
    for result in together(run_script, plain, ("reinforce.py", *LEARN, *flags, "--output-dir", tmp_path / "rloo")):
        assert_ok(result)
    assert learned(tmp_path / "plain", 1.0) and learned(tmp_path / "rloo", 1.0)
    assert "baseline_reward" not in read_metrics(tmp_path / "plain")[-1]
    last = read_metrics(tmp_path / "rloo")[-1]
    assert last["baseline_reward"] == pytest.approx(last["reward"])


def test_leave_one_out_with_one_sample_is_refused():
    result = run_script("reinforce.py", "--baseline", "leave-one-out")
    assert result.returncode == 2 and "needs --num-samples 2 or more" in result.stderr


def test_ppo_learns_and_its_first_step_is_on_policy(tmp_path):
    assert_ok(run_script("ppo.py", *LEARN, "--num-epochs", "2", "--output-dir", tmp_path / "r"))
    assert learned(tmp_path / "r", 1.5)
    row = read_metrics(tmp_path / "r")[-1]
    assert row["approx_kl"] > 0 and 0 <= row["clip_fraction"] < 0.5 and row["value_loss"] > 0


def test_ppo_with_one_step_per_rollout_has_ratio_one(tmp_path):
    assert_ok(
        run_script("ppo.py", *TINY, "--num-epochs", "1", "--micro-batch-size", "3", "--output-dir", tmp_path / "r")
    )
    for row in read_metrics(tmp_path / "r")[1:]:
        assert row["approx_kl"] < 1e-6 and row["clip_fraction"] == 0 and abs(row["loss"]) < 1e-5


def test_a_value_model_starts_from_the_reward_model_if_the_tokenizers_agree():
    placement = common.Placement(torch.device("cpu"), "float32", "sdpa", 0, False, 4)
    paths = (str(common.EXAMPLE / "reward_model"), str(common.EXAMPLE / "policy"))
    ids, ones = torch.arange(5, 11)[None], torch.ones(1, 3, dtype=torch.long)
    value = common.load_value_model(*paths, placement)
    with torch.no_grad():
        values = value(ids[:, :3], ones, ids[:, 3:])
        scorer = common.LastTokenScore(value.model)
        for t in range(3):  # the value of token t has seen what comes before it
            score = scorer(ids[:, : 3 + t], torch.ones(1, 3 + t, dtype=torch.long)) - value.model.config.reward_mean
            torch.testing.assert_close(values[:, t], score)
        value = common.load_value_model(None, paths[1], placement)
        assert (value(ids[:, :3], ones, ids[:, 3:]) == 0).all()


# ---------------------------------------------------------------- reward_model.py


def test_a_reward_model_is_trained_and_remax_uses_it(tmp_path):
    flags = "--total-episodes 1600 --eval-every 25 --learning-rate 2e-3".split()
    result = run_script("reward_model.py", *flags, "--output-dir", tmp_path / "r")
    assert_ok(result)
    rows = read_metrics(tmp_path / "r")
    assert rows[-1]["eval_accuracy"] > 0.7 > rows[0]["eval_accuracy"]
    assert "Certainty" in result.stdout and "observed" in result.stdout
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "r" / "reward_model"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    samples = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    chosen = [row["reward"] for row in samples if row["update"] == rows[-1]["update"] and row["chosen"]]
    assert model.config.reward_mean == pytest.approx(sum(chosen) / len(chosen), abs=1e-4) and len(chosen) == 200
    assert_ok(run_script("remax.py", *TINY, "--reward-model", folder, "--output-dir", tmp_path / "remax"))


def load(path, tokenizer, max_prompt_length=64, max_length=128):
    return reward_model.load_pairs(
        str(path), "train", ("prompt", "chosen", "rejected"), tokenizer, max_prompt_length, max_length
    )


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
    assert "2 pairs" in out and "1 with an empty response, dropped" in out
    assert "1 of equals, dropped" in out and "1 too long, dropped" in out
    whole = [tokenizer(long + end)["input_ids"] + [tokenizer.eos_token_id] for end in (" was good.", " was bad.")]
    prompt = len(tokenizer(long)["input_ids"])
    assert list(pairs[0].ids) == [ids[prompt - 4 :] for ids in whole]
    assert pairs[1].responses == (" good", " bad")


BAD = {
    "missing_rejected_one_row.jsonl": ":4: 'rejected' is missing",
    "null_values.jsonl": ":3: 'chosen' is null",
    "wrong_types.jsonl": ":2: 'chosen' is a list",
    "chosen_equals_rejected_all.jsonl": "no pair is left",
    "missing_prompt_column.jsonl": ":1: no column 'prompt'",
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data beside the project")
def test_broken_preferences_of_the_development_data(tokenizer, capsys):
    for name, wanted in BAD.items():
        with pytest.raises(SystemExit) as error:
            load(SHARED / "data" / "bad" / name, tokenizer)
        assert error.value.code == 2 and wanted in capsys.readouterr().err
    for name, dropped in (("chosen_equals_rejected.jsonl", "3 of equals"), ("empty_answers.jsonl", "2 with an empty")):
        assert load(SHARED / "data" / "bad" / name, tokenizer, max_length=4096)
        assert dropped in capsys.readouterr().out


def test_metrics_and_calibration():
    rows = [dict(reward=r, length=n) for r, n in ((2.0, 1), (0.0, 3), (1.0, 2), (1.0, 2), (0.0, 4), (3.0, 0))]
    metrics = reward_model.evaluation_metrics(rows)
    assert metrics["eval_accuracy"] == 0.5 and metrics["eval_margin"] == pytest.approx(-1 / 3)
    assert metrics["eval_length_correlation"] < -0.8
    table = reward_model.calibration_table(rows).splitlines()
    assert table[1].split() == ["0.5", "to", "0.6", "1", "0.50", "0.00"] and len(table) == 6
    assert table[4].split()[3:] == ["1", "0.88", "1.00"] and table[5].split()[3:] == ["1", "0.95", "0.00"]
