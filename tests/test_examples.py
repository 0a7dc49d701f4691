"""The programs beside the examples: what they show is what the scripts have measured."""

import io
import json
import re
import runpy
import signal
import subprocess
import sys
import types

import pytest
from conftest import (
    EXAMPLE,
    ROOT,
    TINY,
    assert_ok,
    launch_command,
    read_metrics,
    run_script,
    script_environment,
    tiny_model,
)

LINE = re.compile(r"^(?:([A-Z]) (sampled|greedy ) +(-?\d+\.\d\d)|  prompt  {7})  ?▸(.*)$")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    gold = f"{EXAMPLE / 'sentiment.py'}:reward"
    assert_ok(run_script("remax.py", *TINY, "--gold-reward-function", gold, "--output-dir", folder))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A policy with a chat template, whose tokenizer knows digits alone and passes over all else."""
    import transformers
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("models") / "digits"
    vocabulary = {character: i for i, character in enumerate("01x23456789")}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="x")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} 7{% endfor %}"
    tokenizer.save_pretrained(folder)
    tiny_model("gpt2", vocab_size=11, bos_token_id=2, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    return folder


def program(name: str, monkeypatch, *flags) -> dict:
    """The names of a program, whose command line is `flags`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def refusal(name: str, monkeypatch, capsys, *flags) -> str:
    """The one line with which a program refuses its command line."""
    names = program(name, monkeypatch, *flags)
    with pytest.raises(SystemExit) as error:
        names["main"]()
    (line,) = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and line.startswith("error: ")
    return line


# ---------------------------------------------------------------- compare.py


def shown(out: str) -> list[tuple[str, dict]]:
    """What compare.py has printed -> [(prompt, {(policy, kind): [(reward, text), …]}), …]."""
    blocks = []
    for letter, kind, score, text in (match.groups() for match in map(LINE.match, out.splitlines()) if match):
        if letter is None:
            blocks.append((text, {}))
        else:
            blocks[-1][1].setdefault((letter, kind.strip()), []).append((float(score), text))
    return blocks


@pytest.mark.xdist_group("examples")
def test_compare_shows_the_responses_and_rewards_that_the_run_has_measured(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    policies = (EXAMPLE / "policy", run, run / "policy")
    flags = "--num-prompts 7 --num-samples 2".split()  # the response length is the run's
    result = run_script("examples/compare.py", *policies, *flags)
    assert_ok(result)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    rows = read_metrics(run)
    blocks = shown(result.stdout)
    assert len(blocks) == 7
    for letter, row in (("A", rows[0]), ("B", rows[-1])):
        wanted = [sample for sample in samples if sample["update"] == row["update"]]
        for (prompt, texts), sample in zip(blocks, wanted, strict=True):
            ((score, text),) = texts[letter, "greedy"]
            assert prompt == sample["prompt"] and score == pytest.approx(sample["reward"], abs=0.0051)
            assert text.removesuffix(" […]") == sample["response"]
            assert sample["response_length"] == 12 or not text.endswith(" […]")
        assert re.search(rf"^{letter} greedy +{row['eval_reward']:.2f}$", result.stdout, re.M)  # the mean
    assert any(text.endswith(" […]") for _, texts in blocks for rows in texts.values() for _, text in rows)
    for _, texts in blocks:
        assert texts["B", "sampled"] == texts["C", "sampled"]  # of one policy, by one seed
        assert len(set(texts["B", "sampled"])) == 2


@pytest.mark.xdist_group("examples")
def test_compare_reads_typed_prompts(digits, tmp_path):
    command = launch_command("examples/compare.py", EXAMPLE / "policy", digits, "--typed", "--max-prompt-length", 16)
    environment = script_environment() | dict(COLUMNS="60")
    typed = b"In 12 films \xff there\nno number\n\n4 two"
    result = subprocess.run(command, input=typed, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    out = result.stdout.decode()
    assert result.returncode == 0, result.stderr.decode()
    assert [prompt for prompt, _ in shown(out)] == ["In 12 films � there", "4 two"]
    assert all(texts.keys() == {("A", "greedy"), ("B", "greedy")} for _, texts in shown(out))
    responses = out[out.index("prompt") :].splitlines()
    assert max(map(len, responses)) <= 60 and any(line.startswith(" " * 18) for line in responses)


@pytest.mark.xdist_group("examples")
def test_a_typed_message_goes_through_the_chat_template(digits, monkeypatch):
    from tokenizers import processors

    import common

    tokenizer = common.load_tokenizer(str(digits))
    tokenizer.num_embeddings = 11
    bos = processors.TemplateProcessing(single="x $A", special_tokens=[("x", 2)])
    tokenizer.backend_tokenizer.post_processor = bos
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"is it 8 or 9?\n"), encoding="utf-8"))
    names = program("compare", monkeypatch)
    for max_length, wanted in ((16, "897"), (2, "97")):
        sys.stdin.seek(0)
        args = types.SimpleNamespace(chat=True, max_prompt_length=max_length)
        (((prompt,)),) = names["typed_prompts"](args, [tokenizer])
        assert prompt.text == "user: is it 8 or 9? 7"
        assert prompt.ids == tokenizer.convert_tokens_to_ids(list(wanted))  # the template writes its own special tokens


@pytest.mark.xdist_group("examples")
def test_compare_shows_prompts_that_all_tokenizers_can_read(digits, tmp_path):
    """And the rewards of a function, which gets the columns of the prompt's own row."""
    rows = [dict(prompt=text, number=i) for i, text in enumerate(("The plot", "12 films", "no films", "3 films"))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text("def reward(prompts, responses, number):\n    return number\n")
    flags = "--dataset p.jsonl --reward-function r.py:reward --max-prompt-length 16 --response-length 4".split()
    result = run_script("examples/compare.py", EXAMPLE / "policy", digits, digits, *flags, cwd=tmp_path)
    assert_ok(result)
    assert [prompt for prompt, _ in shown(result.stdout)] == ["12 films", "3 films"]
    for (_, texts), number in zip(shown(result.stdout), (1, 3)):
        assert [score for scores in texts.values() for score, _ in scores] == [number] * 3
        assert texts["B", "greedy"] == texts["C", "greedy"] != texts["A", "greedy"]  # each reads its own ids


def test_compare_refuses_in_one_line(monkeypatch, capsys, tmp_path):
    assert "give 1 to 26 policies" in refusal("compare", monkeypatch, capsys)
    assert "nowhere" in refusal("compare", monkeypatch, capsys, tmp_path / "nowhere")
    assert "no.jsonl" in refusal("compare", monkeypatch, capsys, EXAMPLE / "policy", "--dataset", "no.jsonl")
    (tmp_path / "own.jsonl").write_text('{"prompt": "The plot"}')
    line = refusal("compare", monkeypatch, capsys, EXAMPLE / "policy", "--dataset", tmp_path / "own.jsonl")
    assert "--reward-model or --reward-function: give one" in line  # the example's is not for these prompts


@pytest.fixture
def own(tmp_path):
    """What two runs would leave: a policy and the flags, without training."""
    import shutil

    (tmp_path / "own.jsonl").write_text('{"question": "The plot", "number": 3}\n{"question": "The end", "number": 8}\n')
    (tmp_path / "r.py").write_text("def reward(prompts, responses, number):\n    return number\n")
    (tmp_path / "s.py").write_text("def reward(prompts, responses, **columns):\n    return [-1.0] * len(prompts)\n")
    saved = dict(dataset=str(EXAMPLE / "prompts.jsonl"), eval_dataset=f"{tmp_path}/own.jsonl", temperature=0.5)
    saved |= dict(dataset_config=None, dataset_split="train", prompt_column="question", max_prompt_length=9)
    saved |= dict(response_length=5, reward_model=None)
    for name, reward in (("one", "r.py"), ("two", "s.py"), ("tuned", None)):
        shutil.copytree(EXAMPLE / "policy", tmp_path / name / "policy")
        function = f"{tmp_path}/{reward}:reward" if reward else None
        (tmp_path / name / "args.json").write_text(json.dumps(saved | dict(reward_function=function)))
    return tmp_path


def test_compare_judges_a_run_by_its_own_data_and_reward(own):
    result = run_script("examples/compare.py", EXAMPLE / "policy", own / "one", own / "tuned", "--num-samples", 1)
    assert_ok(result)
    assert [prompt for prompt, _ in shown(result.stdout)] == ["The plot", "The end"]
    for (_, texts), number in zip(shown(result.stdout), (3, 8)):
        assert {score for scores in texts.values() for score, _ in scores} == {number}
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("As in ")]
    assert f"As in {own / 'one'}" in line and f"--dataset {own / 'own.jsonl'}" in line
    assert "--response-length 5" in line and "--temperature 0.5" in line


def test_compare_takes_a_run_s_penalty_off_and_has_no_notes_on_the_example(own):
    saved = json.loads((own / "one" / "args.json").read_text())
    (own / "one" / "args.json").write_text(json.dumps(saved | dict(missing_eos_penalty=5.0, response_length=1)))
    result = run_script("examples/compare.py", own / "one", "--reward-function", f"{own / 's.py'}:reward")
    assert_ok(result)
    assert "A greedy   -6.00" in result.stdout and "note" not in result.stdout


def test_compare_says_that_a_run_has_not_ended(own, monkeypatch, capsys):
    (own / "one" / "policy").rename(own / "elsewhere")
    assert "it has not ended yet" in refusal("compare", monkeypatch, capsys, own / "one")


def test_flags_of_compare_go_before_those_of_a_run(own, monkeypatch, capsys):
    import common

    seen = {}

    def load_prompts(path, layout, tokenizer, max_length):
        seen.update(path=path, column=layout.prompt_column, max_length=max_length)
        common.fail("seen")

    monkeypatch.setattr(common, "load_prompts", load_prompts)
    flags = ["--prompt-column=text", "--max_prompt_length", "7"]
    assert "seen" in refusal("compare", monkeypatch, capsys, own / "one", *flags)
    assert seen == dict(path=f"{own}/own.jsonl", column="text", max_length=7)


def test_compare_refuses_runs_that_differ(own, monkeypatch, capsys):
    line = refusal("compare", monkeypatch, capsys, own / "one", own / "two")
    assert (
        f"{own / 'one'} and {own / 'two'} had different" in line and "give --reward-model or --reward-function" in line
    )
    assert "give one" in refusal("compare", monkeypatch, capsys, own / "tuned")  # not the example's reward
    saved = json.loads((own / "one" / "args.json").read_text())
    (own / "two" / "args.json").write_text(json.dumps(saved | dict(response_length=6)))
    line = refusal("compare", monkeypatch, capsys, own / "one", own / "two")
    assert "give --response-length" in line
    flags = ["--response-length", 4, "--dataset", own / "none.jsonl"]
    assert "none.jsonl: No such file" in refusal("compare", monkeypatch, capsys, own / "one", own / "two", *flags)
    (own / "two" / "args.json").write_text(json.dumps(saved | dict(missing_eos_penalty=5.0)))
    (own / "one" / "args.json").write_text(json.dumps(saved | dict(missing_eos_penalty=0.0)))
    line = refusal("compare", monkeypatch, capsys, own / "one", own / "two")
    assert "give --missing-eos-penalty" in line
    (own / "two" / "args.json").write_text("{")
    assert "args.json: no valid JSON" in refusal("compare", monkeypatch, capsys, own / "two")


# ---------------------------------------------------------------- plot.py


@pytest.mark.xdist_group("examples")
def test_plot_draws_every_run_into_every_panel(run, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot", reason="only plot.py and the benchmarks' figures need it")
    other = tmp_path / "other"
    other.mkdir()
    lines = [dict(episodes=0, eval_reward=1.0), dict(episodes=5, eval_reward=None), dict(episodes=9, eval_reward=2.5)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"episodes": 1')
    result = run_script("examples/plot.py", run, other, cwd=tmp_path)
    assert_ok(result)
    assert result.stdout == "curves.png\n" and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    names = program("plot", monkeypatch)
    runs = {folder: names["read_metrics"](folder) for folder in (run, other)}
    figure = names["draw"](plt, runs, ("reward", "eval_reward"), "episodes")
    for axis, name in zip(figure.axes, ("reward", "eval_reward"), strict=True):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("episodes", name)
        ours, others = axis.get_lines()
        wanted = [(row["episodes"], row[name]) for row in read_metrics(run) if name in row]
        assert ours.get_xydata().tolist() == [list(point) for point in wanted] and len(wanted) > 2
        assert ours.get_linestyle() != others.get_linestyle()  # grey keeps this difference
    assert others.get_xydata().tolist() == [[0, 1.0], [9, 2.5]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(run), str(other)]
    assert len(set(names["STYLES"])) == len(names["STYLES"]) == 16


@pytest.mark.xdist_group("examples")
def test_plot_refuses_in_one_line(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"reward": 1}\n3\n')
    line = refusal("plot", monkeypatch, capsys, run, "--metrics", "kl", "rewards")
    assert "'rewards'" in line and "eval_gold_reward" in line and "truncated_fraction" in line
    assert "give one run or more" in refusal("plot", monkeypatch, capsys)
    assert "no such folder" in refusal("plot", monkeypatch, capsys, run, tmp_path / "nowhere")
    assert "no metrics.jsonl" in refusal("plot", monkeypatch, capsys, run / "policy")
    assert "metrics.jsonl:2: not a JSON object" in refusal("plot", monkeypatch, capsys, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refusal("plot", monkeypatch, capsys, run)
