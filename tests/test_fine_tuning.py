"""spr.py without samples: supervised fine-tuning, beside a loop in plain torch that reads the files itself."""

import json

import pytest
import torch
from conftest import EXAMPLE, assert_ok, read_metrics, recorded_batches, run_here, run_script, without_machine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common

ROWS, BATCH, MINIBATCH, EPOCHS, RATE, SEED = 22, 8, 4, 2, 2e-3, 5
STEPS = 10  # two passes over 22 rows are five whole updates of two steps
FLAGS = f"""
    --weighting uniform --num-samples 0 --num-epochs {EPOCHS} --batch-size {BATCH} --num-minibatches 2 --seed {SEED}
    --learning-rate {RATE} --lr-schedule cosine --warmup-ratio 0.2 --max-grad-norm 10
    --max-prompt-length 48 --response-length 80 --micro-batch-size 3 --eval-every 2 --eval-size 6
""".split()


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    """Flags that name demonstrations to learn from and others that are held out."""
    lines = (EXAMPLE / "demonstrations.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:ROWS]))
    (tmp_path / "held_out.jsonl").write_text("".join(lines[-6:]))
    return ["--dataset", tmp_path / "train.jsonl", "--eval-dataset", tmp_path / "held_out.jsonl"]


def negative_log_likelihood(model, tokenizer, row):
    """Of a whole demonstration with its EOS, in nats; and its number of tokens."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    response = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + response])
    labels = torch.tensor([[-100] * len(prompt) + response])
    return model(ids, labels=labels).loss * len(response), len(response)


def rate_of(step) -> float:
    """Linear over two of the ten steps, then half a cosine over the other eight."""
    if step <= 2:
        return RATE * step / 2
    angle = torch.tensor(torch.pi * (step - 3) / 8)
    return RATE * (0.5 + 0.5 * angle.cos().item())


def test_held_out_rows_without_demonstrations_are_told(tmp_path, data, capsys):
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "The plot", "answer": " was good."}')
    assert run_here("spr", *FLAGS, *data, "--output-dir", tmp_path / "r") == 0
    assert (
        "these have no demonstration, unlike those that are trained on: there is no eval_loss"
        in capsys.readouterr().out
    )
    assert not any("eval_loss" in row for row in read_metrics(tmp_path / "r"))


def test_fine_tuning_is_one_fit_as_in_plain_torch(tmp_path, data, monkeypatch):
    """The same rows in the same order, one AdamW and one schedule from the first step to the last."""
    batches = recorded_batches(monkeypatch)
    assert run_here("spr", *FLAGS, *data, "--output-dir", tmp_path / "r") == 0
    metrics = read_metrics(tmp_path / "r")
    assert [row["update"] for row in metrics] == [0, 1, 2, 3, 4, 5]
    assert [row["update"] for row in metrics if "eval_loss" in row] == [0, 2, 4, 5]

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "policy")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    known = {(row["prompt"], row["completion"]): row for row in rows_of(tmp_path / "train.jsonl")}
    seen = []
    for update in range(1, 6):
        batch = [known[prompt.text, prompt.answers["completion"]] for prompt in batches[update - 1]]
        seen += batch
        common.set_seed(SEED, update, 0)
        order = torch.randperm(BATCH).tolist()
        losses = []
        for part in (order[:MINIBATCH], order[MINIBATCH:]):
            loss = sum(negative_log_likelihood(model, tokenizer, batch[i])[0] for i in part) / MINIBATCH
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
            step = 2 * (update - 1) + len(losses) + 1
            for group in optimizer.param_groups:
                group["lr"] = rate_of(step)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert metrics[update]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
        assert metrics[update]["learning_rate"] == pytest.approx(rate_of(step))
    assert step == STEPS
    assert not list((tmp_path / "r").glob("iteration-*"))  # nothing was sampled
    texts = [row["completion"] for row in seen]
    assert len(set(texts[:ROWS])) == ROWS  # a pass takes each row once
    weights = load_file(tmp_path / "r" / "policy" / "model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-5, atol=0.01 * RATE)

    # The held-out loss is the mean over demonstrations of their nats per token.
    with torch.no_grad():
        pairs = [negative_log_likelihood(model, tokenizer, row) for row in rows_of(tmp_path / "held_out.jsonl")]
    per_token = [(nats / length).item() for nats, length in pairs]
    assert metrics[-1]["eval_loss"] == pytest.approx(sum(per_token) / 6, rel=1e-3)
    assert metrics[-1]["eval_loss"] != pytest.approx(metrics[0]["eval_loss"], rel=0.01)


@pytest.mark.parametrize("more, updates", [([], 5), (["--num-epochs", 4], 11), (["--total-episodes", 17], 2)])
def test_the_length_of_fine_tuning_needs_no_counting(tmp_path, data, more, updates):
    """Two passes over 22 rows are 44, five whole updates of 8; four are 88. --total-episodes goes first."""
    assert run_here("spr", *FLAGS, *data, *more, "--eval-every", 0, "--output-dir", tmp_path / "r") == 0
    metrics = read_metrics(tmp_path / "r")
    assert [row["update"] for row in metrics] == list(range(1, updates + 1))
    assert metrics[-1]["episodes"] == updates * BATCH


def test_runs_with_samples_have_1024_prompts_by_default(tmp_path, monkeypatch):
    planned = []

    def plan_updates(total_episodes, batch_size, parts):
        planned.append(total_episodes)
        raise SystemExit(0)

    monkeypatch.setattr(common, "plan_updates", plan_updates)
    assert run_here("spr", "--output-dir", tmp_path / "r") == 0
    assert planned == [1024]


@pytest.mark.parametrize("ranks, zero_stage", [(1, 0), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_fine_tuning_goes_on_exactly_from_any_of_its_updates(tmp_path, data, ranks, zero_stage):
    """From a checkpoint after the third update: Adam's moments and the schedule are in their middle."""
    flags = [*FLAGS, *data, "--zero-stage", zero_stage, "--save-every", 3]
    whole = tmp_path / "whole"
    assert_ok(run_script("spr.py", *flags, "--output-dir", whole, ranks=ranks))
    before = (read_metrics(whole), load_file(whole / "policy" / "model.safetensors"))
    assert (whole / "checkpoint" / "latest").read_text() == "3"
    assert_ok(run_script("spr.py", "--resume", whole, ranks=ranks))
    for found, expected in zip(read_metrics(whole), before[0], strict=True):
        assert without_machine(found) == without_machine(expected)
    again = load_file(whole / "policy" / "model.safetensors")
    assert all(torch.equal(again[name], before[1][name]) for name in again)


def test_ctrl_c_stops_fine_tuning_between_its_updates(tmp_path, data, monkeypatch, capsys):
    show = common.Run.show

    def interrupted(self, numbers):
        if numbers.get("step") == 5:  # the first step of the third update
            self.hear(2, None)
        show(self, numbers)

    monkeypatch.setattr(common.Run, "show", interrupted)
    assert run_here("spr", *FLAGS, *data, "--output-dir", tmp_path / "r") == 130
    captured = capsys.readouterr()
    assert "Stopped after update 3. To go on" in captured.out
    assert "3/5" in captured.err  # the bar counts updates, so it knows how long the rest takes
    assert read_metrics(tmp_path / "r")[-1]["update"] == 3
    assert (tmp_path / "r" / "checkpoint" / "latest").read_text() == "3"
