"""What a new user meets: mistakes are told, results are seen, and nothing is used in silence."""

import json
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import (
    EXAMPLE,
    EXAMPLE_DATA,
    ROOT,
    example_tokenizer,
    launch_command,
    read_metrics,
    run_here,
    script_environment,
    start_backend,
)

import common
import remax

SHORT = "--total-episodes 8 --batch-size 4 --eval-every 0 --response-length 8".split()
SENTIMENT = f"{EXAMPLE}/sentiment.py:reward"


# ---------------------------------------------------------------- A run that went wrong

USUAL = dict(entropy=1.0, truncated_fraction=0.4, kl=20.0, reward_std=1.0)


def rows_of(**changes) -> list[dict]:
    return [dict(update=update) | USUAL | changes for update in range(1, 4)]


@pytest.mark.parametrize(
    "changes, flag",
    [
        (dict(entropy=0.0), "--learning-rate"),
        (dict(truncated_fraction=0.9), "--response-length"),
        (dict(kl=400.0), "--learning-rate"),
        (dict(eval_log_ratio=400.0), "--learning-rate"),
        (dict(reward_std=0.0), "samples.jsonl"),
        (dict(skipped_updates=2), "(2): lower --learning-rate"),
    ],
)
def test_each_trouble_is_one_sentence_with_the_flag_to_turn(changes, flag):
    assert common.troubles(rows_of()) == {}
    (sentence,) = common.troubles(rows_of(**changes)).values()
    assert flag in sentence
    if not {"eval_log_ratio", "skipped_updates"} & changes.keys():
        assert common.troubles([*rows_of(**changes)[:2], *rows_of()[:1]]) == {}  # one bad update is none


def test_fine_tuning_may_go_as_far_as_it_likes():
    assert common.troubles(rows_of(eval_log_ratio=400.0, eval_loss=1.0)) == {}


def test_one_response_has_no_deviation_and_is_no_trouble(tmp_path, capsys):
    start_backend()
    assert common.standard_deviation(torch.tensor([3.0])).isnan()
    assert common.standard_deviation(torch.tensor([3.0, 5.0])).item() == 1
    flags = "--total-episodes 4 --batch-size 1 --eval-every 0 --response-length 8".split()
    assert run_here("remax", *flags, "--output-dir", tmp_path / "r") == 0
    assert "one reward" not in capsys.readouterr().out
    assert [row["reward_std"] for row in read_metrics(tmp_path / "r")] == 4 * [None]


def warnings_of(row, but=()) -> set[str]:
    """The names of all troubles in the course of a run, from its curves."""
    curves = {name: values for name, values in row["curves"].items() if name not in but}
    rows = []
    for update, values in enumerate(zip(*curves.values())):
        metrics = dict(zip(curves, values), update=update)
        rows.append({name: value for name, value in metrics.items() if value is not None})
    return {name for end in range(1, len(rows) + 1) for name in common.troubles(rows[:end])}


def test_a_reward_that_is_gamed_is_seen_in_the_gold_reward():
    """Without its KL penalty the first run is gamed on four of five seeds or more; with it, on none."""
    lines = (ROOT / "benchmark/results/first_run.jsonl").read_text().splitlines()
    gamed = 0
    for row in map(json.loads, lines):
        warned = warnings_of(row)
        assert len(warned) == row["warnings"]
        assert "gold" not in warnings_of(row, but=["gold_reward", "eval_gold_reward"])
        if row["method"] == "remax":
            assert warned == set() and row["last"] > row["best"] - 0.03 > 0.6
        if row["method"] == "remax, no KL penalty":
            gamed += "gold" in warned
    assert len(lines) >= 10 and gamed >= 4


def test_a_destroyed_policy_is_not_reported_as_a_success(tmp_path, capsys):
    flags = "--total-episodes 40 --batch-size 8 --eval-every 0 --response-length 12 --learning-rate 5".split()
    assert run_here("remax", *flags, "--output-dir", tmp_path / "r") == 0
    out, err = capsys.readouterr()
    assert "Warning: the policy has collapsed" in out
    assert "Warning: most sampled responses" not in out  # longer ones would not help
    told = re.findall(r"warning, update \d+: (.*)", out + err)
    assert len(told) == len(set(told)) >= 2  # each once


# ---------------------------------------------------------------- The example's defaults hold together or not at all


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["remax.py", *map(str, flags)])
    return common.parse_args(remax.Args)


def test_a_model_of_one_s_own_needs_data_of_one_s_own(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        parsed(monkeypatch, "--model", tmp_path)
    assert error.value.code == 2 and "give --dataset, too" in capsys.readouterr().err


def test_a_path_that_is_named_is_the_one_here_even_if_the_example_has_its_name(monkeypatch, tmp_path):
    path = tmp_path / "examples" / "reviews" / "prompts.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"prompt": "A"}')
    monkeypatch.chdir(tmp_path)
    args = parsed(monkeypatch, "--dataset", "examples/reviews/prompts.jsonl")
    assert (args.dataset, args.eval_dataset, args.reward_model) == (str(path), None, None)
    assert parsed(monkeypatch).dataset == str(EXAMPLE / "prompts.jsonl")


def test_the_example_s_model_may_end_with_a_slash(monkeypatch):
    args = parsed(monkeypatch, "--model", "examples/reviews/policy/")
    assert args.dataset.endswith("prompts.jsonl") and args.reward_model


@pytest.mark.parametrize("script, how", [("remax", []), ("ppo", []), ("spr", []), ("spr", ["--num-samples", "2"])])
def test_data_of_one_s_own_needs_a_reward_and_is_held_out_from(tmp_path, capsys, script, how):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "The plot {number}"}}\n' for number in range(16)))
    flags = [*SHORT, "--eval-every", 1, "--eval-size", 3, "--dataset", path, "--output-dir", tmp_path / "r", *how]
    assert run_here(script, *flags) == 2
    assert "error: --reward-model or --reward-function: give one" in capsys.readouterr().err
    if script == "remax":
        assert run_here(script, *flags, "--reward-model", "examples/reviews/reward_model") == 0
        out = capsys.readouterr().out
        assert "Held-out data:\n3 of them, which are not trained on" in out
        assert "Model: examples/reviews/policy\nReward model: examples/reviews/reward_model\n" in out


def test_the_example_s_reward_model_is_not_used_beside_a_function(monkeypatch):
    assert parsed(monkeypatch).reward_model == str(EXAMPLE / "reward_model")
    assert parsed(monkeypatch, "--reward-function", SENTIMENT).reward_model is None
    args = parsed(monkeypatch, "--reward-function", SENTIMENT, "--reward-model", EXAMPLE / "reward_model")
    assert args.reward_model == str(EXAMPLE / "reward_model")
    args = parsed(monkeypatch, "--model", EXAMPLE, *EXAMPLE_DATA)
    assert (args.eval_dataset, args.reward_model) == (str(EXAMPLE_DATA[3]), str(EXAMPLE_DATA[5]))


def test_resumed_without_the_example(tmp_path, capsys, monkeypatch):
    """The flags' defaults are not there, but the run has its own; one of them is None."""
    data, flags = EXAMPLE_DATA[:4], [*SHORT, "--save-every", 1, "--reward-function", SENTIMENT]
    assert run_here("remax", *flags, *data, "--model", EXAMPLE / "policy", "--output-dir", tmp_path / "r") == 0
    monkeypatch.setattr(common, "HERE", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run_here("remax", "--resume", tmp_path / "r") == 0
    assert "Resumed after update 2 of 2" in capsys.readouterr().out


def test_copied_without_the_example(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(common, "HERE", tmp_path)
    with pytest.raises(SystemExit) as error:
        parsed(monkeypatch)
    assert error.value.code == 2
    assert (
        f"error: --model: {tmp_path} has no examples/reviews/policy: give --model, --dataset and a reward"
        in capsys.readouterr().err
    )


# ---------------------------------------------------------------- Chats

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
HI, HELLO = dict(role="user", content="The plot"), dict(role="assistant", content=" was good.")


@pytest.fixture
def chat_tokenizer():
    tokenizer = example_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_conversation_loses_the_answer_at_its_end(tmp_path, capsys, chat_tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(dict(messages=m)) + "\n" for m in ([HI], [HI, HELLO], [HI, HELLO, HI])))
    prompts = common.load_prompts(str(path), common.Layout(prompt_column="messages"), chat_tokenizer, 64)
    first = "<user>The plot<assistant>"
    assert [prompt.text for prompt in prompts] == [first, first, f"{first} was good.{first}"]
    assert [prompt.messages for prompt in prompts] == [[HI], [HI], [HI, HELLO, HI]]
    assert "prompts: 3 (2 conversations; 1 conversations without their last answers)" in capsys.readouterr().out
    path.write_text(json.dumps(dict(messages=[HELLO])))
    with pytest.raises(SystemExit):
        common.load_prompts(str(path), common.Layout(prompt_column="messages"), chat_tokenizer, 64)
    assert f"{path}:1: 'messages' holds an answer alone" in capsys.readouterr().err


def test_a_reward_model_reads_a_chat_through_its_own_template(tmp_path, chat_tokenizer):
    """In scoring; the policy's template is another one."""
    folder = tmp_path / "rm"
    model, _ = common.load_classifier(str(EXAMPLE / "reward_model"), start_backend())
    model.save_pretrained(folder)
    chat_tokenizer.chat_template = TEMPLATE + "."
    chat_tokenizer.save_pretrained(folder)
    prompts = [common.Prompt("[policy's template]", [], {}, messages=[HI])]
    prompts.append(common.Prompt("The plot", [], dict(messages=[HI])))  # a column of that name is no chat
    rows = common.Responses(prompts, [" was good."] * 2, None, None, None, None, torch.tensor([True, True]))
    found = common.Reward(str(folder), None, 0.0, start_backend())(rows)
    for score, text in zip(found, ["<user>The plot<assistant> was good..", "The plot was good.<|endoftext|>"]):
        ids = torch.tensor([chat_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = model.score(model.transformer(ids).last_hidden_state[0, -1]) - model.config.reward_mean
        torch.testing.assert_close(score, expected)


def test_a_reward_model_of_chats_is_trained_as_it_scores(tmp_path, chat_tokenizer):
    import dpo
    import reward_model

    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(dict(prompt=[HI], chosen=[HI, HELLO], rejected=" was bad.")) + "\n")
    layout = common.Layout(answer_columns=["chosen", "rejected"])
    (pair,) = reward_model.load_pairs(str(path), layout, chat_tokenizer, 64, 128)
    texts = [chat_tokenizer.decode(ids) for ids in pair.ids]
    assert texts == ["<user>The plot<assistant> was good.", "<user>The plot<assistant> was bad."]
    (pair,) = dpo.load_pairs(str(path), layout, chat_tokenizer, 64, 128)
    texts = [chat_tokenizer.decode(ids) for ids in (pair.prompt.ids, *pair.ids)]
    assert texts == ["<user>The plot<assistant>", " was good.<|endoftext|>", " was bad.<|endoftext|>"]
    path.write_text(json.dumps(dict(prompt="The plot", messages=[HI, HELLO], chosen=[HELLO], rejected=" was bad.")))
    (pair,) = reward_model.load_pairs(str(path), layout, chat_tokenizer, 64, 128)
    assert chat_tokenizer.decode(pair.ids[0]) == "The plot was good.<|endoftext|>"  # that column is not the prompt


def test_values_start_from_a_reward_model_with_the_same_template_only(tmp_path, chat_tokenizer):
    sampling, backend = common.Sampling(8, 8, 1.0, 8), start_backend()
    model, _ = common.load_classifier(str(EXAMPLE / "reward_model"), backend)
    model.save_pretrained(tmp_path)
    for template, starts_there in ((None, True), (TEMPLATE, False)):
        chat_tokenizer.chat_template = template
        chat_tokenizer.save_pretrained(tmp_path)
        for path in tmp_path.glob("*.jinja") if template is None else []:
            path.unlink()
        values = common.load_value_model(str(tmp_path), str(EXAMPLE / "policy"), sampling, backend)
        assert bool(values.model.score.weight.any()) == starts_there


# ---------------------------------------------------------------- Reward functions


def test_an_error_in_a_reward_function_shows_its_own_lines_before_anything_expensive(tmp_path, capsys, monkeypatch):
    (tmp_path / "f.py").write_text("def reward(prompts, responses, **columns):\n    return [columns['number']]\n")
    monkeypatch.setattr(common, "load_policy", None)
    spec = f"{tmp_path}/f.py:reward"
    assert run_here("remax", *SHORT, "--reward-function", spec, "--output-dir", tmp_path / "r") == 1
    err = capsys.readouterr().err
    assert f'File "{tmp_path}/f.py", line 2, in reward' in err and "Traceback (most recent call last)" in err
    assert f"error: {spec} raised KeyError: 'number' (columns: none)" in err and not (tmp_path / "r").exists()


def test_a_reward_function_sees_the_messages_and_is_tried_on_a_real_prompt(tmp_path):
    (tmp_path / "f.py").write_text("""
seen = []
def reward(prompts, responses, messages, label):
    seen.append((prompts, responses, messages, label))
    return [0.0] * len(prompts)
""")
    prompt = common.Prompt("<user>The plot", [], dict(label=3), messages=[HI])
    reward = common.Reward(function=f"{tmp_path}/f.py:reward", prompt=prompt)
    assert sys.modules[reward.function.__module__].seen == [(["<user>The plot"], [""], [[HI]], [3])]


def test_a_folder_without_a_finished_update_is_used_again(tmp_path, capsys):
    flags = [*SHORT, "--eval-every", 1, "--eval-size", 4, "--output-dir", tmp_path / "r"]
    (tmp_path / "f.py").write_text("def reward(prompts, responses):\n    return [0] if len(prompts) == 1 else 1 / 0\n")
    assert run_here("remax", *flags, "--reward-function", f"{tmp_path}/f.py:reward") == 1
    assert (tmp_path / "r" / "args.json").exists()
    (tmp_path / "r" / "metrics.jsonl").write_text('{"update": 0}\n')  # what an evaluation would have left
    assert run_here("remax", *flags, "--reward-function", SENTIMENT) == 0
    assert len(list((tmp_path / "r").glob("events.*"))) == 1
    assert [row["update"] for row in read_metrics(tmp_path / "r")] == [0, 1, 2]
    assert run_here("remax", *flags) == 2 and "already holds a run" in capsys.readouterr().err


# ---------------------------------------------------------------- Data


def test_broken_json_has_one_place(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y" 3}\n')
    (tmp_path / "a.json").write_text('[{"prompt": "x"},\n{"prompt": "y" 3}]\n')
    for name, place in (("a.jsonl", "a.jsonl:2: no valid JSON: Expecting ',' delimiter (column 16)"), ("a.json", "2")):
        with pytest.raises(SystemExit):
            common.load_rows(str(tmp_path / name))
        assert (place if name == "a.jsonl" else "(line 2, column 16)") in capsys.readouterr().err


def test_a_configuration_of_a_hub_data_set(monkeypatch):
    import datasets

    asked, table = [], datasets.Dataset.from_list([dict(a=1)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or table)
    assert common.load_rows("openai/gsm8k", "main", "test") == [("openai/gsm8k: row 1", dict(a=1))]
    assert asked == [(("openai/gsm8k", "main"), dict(split="test"))]


# ---------------------------------------------------------------- What is seen of a run


def code_of(card: str) -> str:
    return card.split("```\n")[1]


def test_a_policy_s_card_works_and_curves_are_grouped(tmp_path, monkeypatch, capsys):
    flags = [*SHORT, "--eval-every", 2, "--eval-size", 4, "--gold-reward-function", SENTIMENT]
    assert run_here("remax", *flags, "--output-dir", tmp_path / "r") == 0
    assert f"tensorboard --logdir {tmp_path}\n" in capsys.readouterr().out
    card = (tmp_path / "r" / "policy" / "README.md").read_text()
    assert '"learning_rate": 0.0007' in card and '"eval_reward": ' in card
    assert card.startswith("---\nbase_model: policy\n")
    monkeypatch.chdir(tmp_path / "r" / "policy")
    exec(code_of(card), {})
    assert capsys.readouterr().out.startswith("A prompt")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "r")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/reward", "train/kl", "train/seconds_rollout", "train/loss", "eval/eval_reward"} <= tags
    assert [event.step for event in events.Scalars("eval/eval_reward")] == [0, 2]


def test_a_reward_model_s_card_scores_as_the_scripts_do(tmp_path, monkeypatch, capsys):
    flags = "--total-episodes 16 --batch-size 8 --eval-every 0 --eval-size 4".split()
    assert run_here("reward_model", *flags, "--output-dir", tmp_path / "r") == 0
    monkeypatch.chdir(tmp_path / "r" / "reward_model")
    config = json.loads(Path("config.json").read_text())
    Path("config.json").write_text(json.dumps(config | dict(pad_token_id=config["eos_token_id"])))
    capsys.readouterr()
    exec(code_of((tmp_path / "r" / "reward_model" / "README.md").read_text()), {})
    reward = common.Reward(str(tmp_path / "r" / "reward_model"), None, 0.0, start_backend())
    (expected,) = reward.score([common.Prompt("A prompt", [], {})], [" and its response"])
    assert float(capsys.readouterr().out) == pytest.approx(expected, abs=1e-5)


def test_supervised_fine_tuning_shows_its_loss_and_held_out_loss(tmp_path, capsys):
    flags = "--weighting uniform --num-samples 0 --total-episodes 16 --batch-size 16 --eval-every 1 --eval-size 4"
    data = ["--dataset", EXAMPLE / "demonstrations.jsonl", "--eval-dataset", EXAMPLE / "demonstrations.jsonl"]
    assert run_here("spr", *flags.split(), *data, "--output-dir", tmp_path / "r") == 0
    captured = capsys.readouterr()
    first = read_metrics(tmp_path / "r")[0]
    assert "eval_loss" in captured.out and "loss=" in captured.err
    tokenizer, model = example_tokenizer(), common.transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy")
    expected = []
    for line in (EXAMPLE / "demonstrations.jsonl").read_text().splitlines()[:4]:
        row = json.loads(line)
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        labels = torch.tensor([[-100] * len(prompt) + response + [tokenizer.eos_token_id]])
        with torch.no_grad():
            expected.append(
                model.eval()(
                    labels.clamp(min=0) + (labels < 0) * torch.tensor([prompt + response + [tokenizer.eos_token_id]]),
                    labels=labels,
                ).loss.item()
            )
    assert first["eval_loss"] == pytest.approx(sum(expected) / 4, abs=1e-4)


def test_an_evaluation_compares_with_the_demonstrations():
    rows = [
        dict(prompt="x", response="y", reward=r, demonstration_reward=d) for r, d in ((1, 0), (2, 2), (0, 3), (1, 3))
    ]
    metrics = common.evaluation_metrics(rows, [dict(reward=0)] * 4)
    assert metrics["eval_win_rate_reference"] == 1.5 / 4 and metrics["eval_win_rate"] == 3.5 / 4


# ---------------------------------------------------------------- Stopping


@pytest.mark.parametrize("seconds", [0.5, 2.5])
def test_ctrl_c_in_the_first_seconds_ends_without_a_traceback(tmp_path, seconds):
    command = launch_command("remax.py", "--output-dir", tmp_path / "r")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, env=script_environment(), text=True, **pipes)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err
