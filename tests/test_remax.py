"""remax.py as a user runs it: it learns, resumes, stops when asked, runs on ranks, and refuses what it cannot use."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHARED, TINY, assert_ok, read_metrics, run_script, script_environment, tiny_model

import remax

GOLD = ("--gold-reward-function", ROOT / "examples/reviews/sentiment.py:reward")


def test_it_learns_from_any_folder_and_says_so(tmp_path):
    flags = "--total-episodes 1280 --batch-size 32 --learning-rate 5e-4 --eval-every 20 --eval-size 32".split()
    result = run_script("remax.py", *flags, *GOLD, cwd=tmp_path)
    assert_ok(result)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("remax__1__")
    rows = read_metrics(folder)
    assert [row["update"] for row in rows] == list(range(41))
    mean = lambda name, part: sum(row[name] for row in part) / len(part)  # noqa: E731
    for name, rise in (("reward", 1.5), ("gold_reward", 0.15)):
        assert mean(name, rows[-4:]) > mean(name, rows[1:5]) + rise
    first = rows[1]
    assert abs(first["kl"]) < 1e-5 and first["learning_rate"] == pytest.approx(5e-4 / 2)  # reference = policy at first
    assert rows[0]["eval_win_rate"] == 0.5 and rows[0]["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["eval_win_rate"] > 0.6 and rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 1
    assert rows[-1]["episodes"] == 1280 and rows[-1]["skipped_updates"] == 0
    assert first["entropy"] > 0 and 0 <= first["truncated_fraction"] <= 1 and first["peak_memory_bytes"] > 1e8

    # The console: clean, and its last lines tell what was learned and where it is.
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == f"Curves:      tensorboard --logdir {folder}" and "Win rate" in result.stdout
    assert "Warning" not in result.stderr and "[WARNING]" not in result.stdout + result.stderr
    assert sum("▸" in line for line in lines) == 9
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 32 and {"prompt", "response", "reward", "gold_reward", "kl"} <= samples[0].keys()
    assert list(folder.glob("events.out.tfevents.*"))
    args = json.loads((folder / "args.json").read_text())
    assert args["learning_rate"] == 5e-4 and args["ranks"] == 1

    # The saved folder is a plain one.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder / "policy", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    last = [row for row in samples if row["update"] == 40][0]
    ids = tokenizer(last["prompt"], return_tensors="pt")
    tokens = model.generate(**ids, do_sample=False, max_new_tokens=48, pad_token_id=1)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == last["response"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_update_with_a_checkpoint(tmp_path, number, status):
    command = [
        sys.executable,
        str(ROOT / "remax.py"),
        *TINY,
        "--total-episodes",
        "8000",
        "--output-dir",
        str(tmp_path / "r"),
    ]
    process = subprocess.Popen(command, env=script_environment(), stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "r" / "metrics.jsonl").exists() or len(read_metrics(tmp_path / "r")) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    process.send_signal(number)  # a second one is ignored
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"To go on: python {ROOT / 'remax.py'} --resume {tmp_path / 'r'}" in out.strip().splitlines()[-1]
    done = read_metrics(tmp_path / "r")[-1]["update"]
    assert int((tmp_path / "r" / "checkpoint" / "latest").read_text()) == done


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_ranks(tmp_path, zero_stage):
    # Seven held-out prompts do not divide by two; responses end at different lengths on the two ranks.
    result = run_script("remax.py", *TINY, "--zero-stage", zero_stage, "--output-dir", tmp_path / "r", ranks=2)
    assert_ok(result)
    rows = read_metrics(tmp_path / "r")
    assert len(rows) == 5 and abs(rows[1]["kl"]) < 1e-5
    samples = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    alone = run_script("remax.py", *TINY, "--output-dir", tmp_path / "alone")
    assert_ok(alone)
    alone = [json.loads(line) for line in (tmp_path / "alone" / "samples.jsonl").read_text().splitlines()]
    assert [s["response"] for s in samples[:7]] == [s["response"] for s in alone[:7]]  # update 0, in the same order
    assert result.stdout.count("prompts from") == 2  # rank 0 alone speaks


def test_a_failure_on_one_rank_ends_all(tmp_path):
    code = "import os\ndef reward(prompts, responses, **columns):\n    return [1 / int(os.environ['RANK'])] * 16\n"
    (tmp_path / "f.py").write_text(code)
    flags = ("--reward-function", f"{tmp_path}/f.py:reward", "--output-dir", tmp_path / "r")
    result = run_script("remax.py", *TINY, *flags, ranks=2)
    assert result.returncode != 0 and "f.py:reward raised ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--batch-size 0", "is not a whole number above 0"),
        ("--learning-rate nan", "is not a number above 0"),
        ("--gamma 1.5", "is not a number from 0 to 1"),
        ("--kl-coef -1", "is not a number, 0 or above"),
        ("--zero-stage 4", "zero-stage"),
        ("--no-such-flag 1", "no-such-flag"),
        ("--total-episodes 4 --batch-size 8", "--total-episodes 4 is less than one update"),
        ("--model no/such/model", "no/such/model: no tokenizer could be loaded"),
        ("--dataset no.jsonl", "no.jsonl: No such file"),
        ("--prompt-column text", "no column 'text'; there are: prompt"),
        ("--response-length 200", "is more than the model's 128 positions"),
        ("--reward-function nothing.py:f", "no such reward function"),
        ("--reward-model examples/reviews/policy", "score.weight"),
        ("--offload", "needs --zero-stage"),
        ("--output-dir /proc/nothing", "--output-dir /proc/nothing: "),
        ("--resume no/such/run", "no readable args.json"),
    ],
)
def test_wrong_input_gets_one_clear_line_and_status_2(tmp_path, monkeypatch, capsys, flags, wanted):
    output = [] if "output-dir" in flags or "resume" in flags else ["--output-dir", str(tmp_path / "r")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "remax.py"), *flags.split(), *output])
    with pytest.raises(SystemExit) as error:
        remax.main()
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())  # tyro draws a box
    assert error.value.code == 2 and wanted in text
    assert not (tmp_path / "r").exists()  # nothing is left behind


def test_wrong_flags_are_told_by_one_rank_only(tmp_path):
    result = run_script("remax.py", "--batch-size", "0", ranks=2)
    assert result.returncode != 0 and result.stderr.count("is not a whole number above 0") == 1


def test_wrong_input_makes_no_traceback(tmp_path):
    result = run_script("remax.py", "--dataset", "no.jsonl", "--output-dir", tmp_path / "r")
    assert result.returncode == 2 and result.stderr.strip() == "error: no.jsonl: No such file or directory"


def test_other_models_data_and_rewards(tmp_path, tokenizer):
    """A Llama policy with two EOS ids, csv prompts, a penalty, bfloat16, a temperature, a discount."""
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=[0, 5], pad_token_id=None).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "p.csv").write_text('text,label\nThe plot,1\n"The music, the rest",2\n')
    flags = ["--model", tmp_path / "m", "--dataset", tmp_path / "p.csv", "--eval-dataset", tmp_path / "p.csv"]
    flags += [
        "--prompt-column",
        "text",
        "--missing-eos-penalty",
        "100",
        "--dtype",
        "bfloat16",
        "--max-prompt-length",
        "8",
    ]
    flags += ["--temperature", "0.7", "--gamma", "0.99", "--gradient-checkpointing", "--output-dir", tmp_path / "r"]
    assert_ok(run_script("remax.py", *TINY, *flags))
    rows = read_metrics(tmp_path / "r")
    assert rows[1]["truncated_fraction"] > 0 and rows[1]["reward"] < -40
    assert abs(rows[1]["kl"]) < 1e-5  # policy and reference share temperature and dtype


@pytest.mark.skipif(
    not (SHARED / "models" / "imdb-mini").is_dir(), reason="needs the development data beside the project"
)
def test_real_prompts_with_a_real_small_model(tmp_path):
    flags = ["--model", SHARED / "models/imdb-mini", "--dataset", SHARED / "data/imdb_prompts.jsonl"]
    flags += ["--eval-dataset", SHARED / "data/imdb_preferences_8words.jsonl", "--output-dir", tmp_path / "r"]
    flags += ["--reward-function", SHARED / "rewards/imdb_sentiment.py:reward", "--kl-coef", "0.0075"]
    flags += "--learning-rate 3e-4 --total-episodes 1600 --batch-size 32 --response-length 24 --eval-every 50".split()
    assert_ok(run_script("remax.py", *flags))
    rows = read_metrics(tmp_path / "r")
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.03
