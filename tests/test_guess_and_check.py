"""The second example: its data, its rule, its policy, and that its page tells the truth."""

import json
import re
import runpy
import shlex

import pytest
from conftest import ROOT, assert_ok, read_metrics, run_here, run_script, start_backend

import common

EXAMPLE = ROOT / "examples" / "guess_and_check"
RULE = "--reward-function examples/guess_and_check/rule.py:reward"
PAGE = (EXAMPLE / "README.md").read_text(encoding="utf-8")


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text().splitlines()]


def rule():
    return common.load_function(f"{EXAMPLE / 'rule.py'}:reward")


def test_the_data_is_what_make_writes_and_the_policy_is_small(tmp_path):
    make_data = runpy.run_path(str(EXAMPLE / "make.py"))["make_data"]
    make_data.__globals__["HERE"] = tmp_path
    make_data()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in EXAMPLE.glob("*.jsonl")}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (EXAMPLE / path.name).read_bytes()
    assert sum(path.stat().st_size for path in (EXAMPLE / "policy").iterdir()) < 1e6


def test_held_out_questions_occur_nowhere_else():
    held_out = {row["prompt"] for row in rows_of("prompts_test")}
    assert len(held_out) == 100 and len(rows_of("prompts")) == 440
    for name in ("prompts", "demonstrations", "preferences"):
        assert not held_out & {row["prompt"] for row in rows_of(name)}


def test_demonstrations_and_preferences_are_as_the_page_says():
    rows = rows_of("demonstrations")
    for row in rows:
        addend, total = map(int, re.findall(r"\d+", row["prompt"]))
        *guesses, last = [tuple(map(int, re.findall(r"\d+", part))) for part in row["completion"].split(", ")]
        assert all(guess + a == found and a == addend for guess, a, found in [*guesses, last])
        assert all(found != total for _, _, found in guesses)
        assert row["completion"][-1] == ("!" if last[2] == total else "?")
        following = [guess % 9 + 1 for guess, _, _ in guesses]
        assert following == [guess for guess, _, _ in [*guesses, last][1:]]
    success = [row["completion"].endswith("!") for row in rows]
    assert sum(success) / len(rows) == pytest.approx(0.6 / 9 + 0.4 * 5.5 / 9, abs=0.02)  # patience for k finds k of 9
    for row in rows_of("preferences"):
        assert rule()([""] * 2, [row["chosen"], row["rejected"]], [row["answer"]] * 2) == [1, 0]


@pytest.mark.parametrize(
    "response, expected",
    [
        ("8+20=28!", 1),
        ("7+20=27, 8+20=28!", 1),
        ("7+20=27, 8+20=28?", 0),  # right, but gives up
        ("7+20=27!", 0),
        ("7+20=28!", 0),  # the total that was asked for, and a wrong sum
        ("8+21=29!", 0),  # a right sum of other numbers
        ("18+20=28!", 0),
        ("8+20=28!, 9+20=29?", 0),  # only the last guess counts
        ("8+20=28", 0),
        ("", 0),
    ],
)
def test_the_rule(response, expected):
    assert rule()(["20 plus what is 28: "], [response], answer=["8+20=28"], more=[0]) == [expected]


def test_the_policy_answers_like_the_demonstrations():
    backend = start_backend()
    path = str(EXAMPLE / "policy")
    tokenizer = common.load_tokenizer(path)
    policy = common.load_policy(path, tokenizer, common.Sampling(64, 60, 1.0, 900), backend)
    data = str(EXAMPLE / "prompts_test.jsonl")
    prompts = common.load_prompts(data, common.Layout(), tokenizer, 64)
    common.set_seed(0)
    responses = common.rollout(policy, prompts, num_samples=8, greedy=False)
    success = common.Reward(None, f"{EXAMPLE / 'rule.py'}:reward", 0.0, backend)(responses).mean().item()
    assert responses.ended_B.float().mean() > 0.99
    assert success == pytest.approx(0.311, abs=0.06)
    patient = sum(", " in text for text in responses.texts) / len(responses.texts)
    assert patient == pytest.approx(0.4 * 8 / 9, abs=0.06)


def test_the_page_s_command_teaches_persistence(tmp_path, monkeypatch):
    """As it stands on the page and in the README, only shorter."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith("python remax.py")]
    assert line in (ROOT / "README.md").read_text()
    monkeypatch.chdir(ROOT)
    _, script, *flags = shlex.split(line)
    short = ("--total-episodes", 896, "--eval-every", 100, "--output-dir", tmp_path / "run")
    assert script == "remax.py" and run_here("remax", *flags, *short) == 0
    first, *_, last = read_metrics(tmp_path / "run")
    assert first["eval_reward"] < 0.2 and last["eval_reward"] > 0.8
    assert last["eval_response_length"] > 3 * first["eval_response_length"]


def test_the_page_s_table_and_commands_are_those_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    import guess_and_check

    results = [json.loads(line) for line in guess_and_check.Args.results.read_text().splitlines()]
    assert guess_and_check.table(results) in PAGE
    for method, command in guess_and_check.METHODS.items():
        assert "python " + command.replace("RULE", RULE) in PAGE.splitlines()
        assert {row["seed"] for row in results if row["method"] == method} == {1, 2, 3, 4, 5}


def test_the_exercises_on_the_page_pay_what_it_says():
    for block, expected in zip(
        re.findall(r"```python\n(.*?)```", PAGE, re.S), [[1, 0.5, -1], [0.95, -0.1, -0.05]], strict=True
    ):
        names = {}
        exec(block, names)
        responses = ["8+20=28!", "3+20=23, 4+20=24?", "3+20=23!"]
        assert names["reward"]([""] * 3, responses, ["8+20=28"] * 3) == pytest.approx(expected)


@pytest.mark.slow
def test_a_committed_row_is_measured_again(tmp_path):
    flags = ("--methods", "before", "--seeds", 1, "--results", tmp_path / "rows")
    assert_ok(run_script("benchmark/guess_and_check.py", *flags))
    path = ROOT / "benchmark" / "results" / "guess_and_check.jsonl"
    rows = [json.loads(file.read_text().splitlines()[0]) for file in (path, tmp_path / "rows")]
    for name, value in rows[0].items():
        if isinstance(value, float):
            assert rows[1][name] == pytest.approx(value, abs=0.01), name
