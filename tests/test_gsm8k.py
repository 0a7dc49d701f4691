"""The rule for GSM8K, against answers that people have judged: those written here and the data set's own."""

import json

import pytest
from conftest import ROOT, SHARED, assert_ok, read_metrics, run_script

import common

DATA = SHARED / "data" / "gsm8k.jsonl"  # 3,000 rows; its answers are numbers, its solutions end as the hub's answers do


@pytest.fixture
def reward():
    return common.load_function(f"{ROOT / 'examples' / 'gsm8k.py'}:reward")


@pytest.mark.parametrize(
    "response, number, expected",
    [
        (" She pays 18", "18", 1),
        (" She pays $18.", "18", 1),
        (" 16 - 3 - 4 = 9, and 9 * 2 = 18.\n#### 18", "18", 1),
        (" The answer is **18**!", "18", 1),
        (r" \boxed{18}", "18", 1),
        (r" \boxed{1{,}234}", "1,234", 1),
        (r" \(1,\!234\)", "1,234", 1),
        (" In the end: 18.00 dollars", "18", 1),
        (" 1,080", "1080", 1),
        (" 1080.", "1,080", 1),
        (" $1,234,567.50", "1234567.5", 1),
        (" .5", "0.5", 1),
        (" it is...5", "5", 1),
        (" so it loses -$7", "-7", 1),
        (" so it loses $-7.", "-7", 1),
        (" −7 degrees", "-7", 1),
        (" x=-7", "-7", 1),
        (" 12-7", "7", 1),  # a subtraction or a range: its last number is 7
        (" choose 3,4", "4", 1),  # a list of two numbers
        (" He has 18 apples and eats 2", "18", 0),  # the last number counts
        (" 17", "18", 0),
        (" 180", "18", 0),
        (" 1.8", "18", 0),
        (" 7", "-7", 0),
        (" -7", "7", 0),
        (" 1,08", "1080", 0),
        (" 80", "1080", 0),
        (" 18.5", "18", 0),
        (" eighteen", "18", 0),
        ("", "18", 0),
        (" " + "9" * 400, "18", 0),
    ],
)
def test_the_last_number_of_a_response_is_compared_with_the_answer_s(reward, response, number, expected):
    answer = f"Half of 36 is <<36/2={number}>>{number}, not 99.\n#### {number}"
    assert reward(["?"], [response], [answer], question=["?"]) == [expected]
    assert reward(["?"], [response], [number]) == [expected]  # a column that holds the number alone


def test_an_answer_without_a_number_is_refused(reward):
    with pytest.raises(ValueError, match="no number in the answer 'many'"):
        reward(["?", "?"], [" 1", " 2"], ["#### 1", "many"])


def test_the_data_set_s_own_solutions_are_right_and_spoilt_ones_wrong(reward):
    if not DATA.exists():
        pytest.skip("needs 3,000 rows of GSM8K, development data that is not in this repository")
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    answers = [row["solution"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    numbers = [float(row["answer"]) for row in rows]
    assert reward(prompts, answers, answers) == [1.0] * 3000
    for right in ("The answer is ${:,.2f}.", "{:,.1f}", "#### {}"):
        assert reward(prompts, [right.format(number) for number in numbers], answers) == [1.0] * 3000
    for wrong in (lambda x: x + 1, lambda x: -x - 1, lambda x: 10 * x + 1, lambda x: x + 0.5):
        assert reward(prompts, [f"It is {wrong(number):,}." for number in numbers], answers) == [0.0] * 3000


def test_remax_trains_on_it_with_the_data_set_s_columns(tmp_path):
    rows = [dict(question=f"What is {i} and {i}?", answer=f"It is {2 * i}.\n#### {2 * i}") for i in range(12)]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(common.json_lines(rows))
    flags = (
        "--total-episodes 8 --batch-size 4 --eval-size 4 --response-length 8 --model examples/reviews/policy".split()
    )
    flags += ["--dataset", path, "--prompt-column", "question", "--reward-function", "examples/gsm8k.py:reward"]
    assert_ok(run_script("remax.py", *flags, "--output-dir", tmp_path / "run"))
    assert {row["reward"] for row in read_metrics(tmp_path / "run") if "reward" in row} <= {0, 0.25, 0.5, 0.75, 1}
