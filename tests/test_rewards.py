"""Reward models, reward functions, and evaluations."""

import json
import os
import random
import sys

import numpy as np
import pytest
import torch
from conftest import (
    EXAMPLE,
    number_tokenizer,
    others_are_slow,
    policy_of,
    read_metrics,
    run_here,
    start_backend,
    tiny_model,
    without_machine,
)

import common

SHORT = "--total-episodes 8 --batch-size 4 --eval-every 2 --eval-size 3 --micro-batch-size 3".split()
ROLLOUT = [*SHORT, "--response-length", "6"]
SMALL = {  # flags of a run of seconds
    "remax": ROLLOUT,
    "reinforce": ROLLOUT,
    "ppo": [*ROLLOUT, *"--num-minibatches 2 --num-epochs 2".split()],
    "spr": [*ROLLOUT, *"--num-samples 2 --num-minibatches 2 --num-epochs 1".split()],
    "spr_token": [*ROLLOUT, *"--num-samples 2 --num-minibatches 2 --num-epochs 1".split()],
    "dpo": [*ROLLOUT[:-1], "30"],
}


def responses(texts, ended=None, prompts=("Well", "The plot"), columns=None) -> common.Responses:
    rows = [common.Prompt(prompts[i % len(prompts)], [], {}) for i in range(len(texts))]
    for i, row in enumerate(rows):
        row.columns = {name: values[i] for name, values in (columns or {}).items()}
    return common.Responses(rows, texts, None, None, None, None, torch.tensor(ended or [True] * len(texts)))


# ---------------------------------------------------------------- Reward functions


def reward_file(tmp_path, code: str, penalty=0.0) -> common.Reward:
    (tmp_path / "f.py").write_text(code)
    return common.Reward(function=f"{tmp_path}/f.py:reward", missing_eos_penalty=penalty)


def test_functions_get_prompts_responses_and_columns_row_by_row(tmp_path):
    code = """
def reward(prompts, responses, label, **columns):
    assert prompts == ["Well", "Well", "The plot"] and label == ["x", "x", "y"] and not columns
    return [len(response) for response in responses]
"""
    reward = reward_file(tmp_path, code, penalty=0.5)
    prompts, columns = ("Well", "Well", "The plot"), dict(label=["x", "x", "y"])
    found = reward(responses(["a", "bb", ""], [True, False, True], prompts, columns))
    assert found.dtype == torch.float32 and found.tolist() == [1.0, 1.5, 0.0]  # the penalty is for a missing EOS


def test_a_column_that_only_some_rows_have_arrives_with_none_for_the_others(tmp_path):
    code = "def reward(prompts, responses, a, b):\n    assert (a, b) == ([1, None], [None, 2])\n    return [0, 0]\n"
    batch = responses(["x", "y"])
    batch.prompts[0].columns, batch.prompts[1].columns = dict(a=1), dict(b=2)
    assert reward_file(tmp_path, code)(batch).tolist() == [0, 0]


def test_a_function_s_file_is_read_once_and_keeps_its_state(tmp_path):
    code = """
import math
calls = 0
def helper(text):
    return math.sqrt(len(text)) + calls
def reward(prompts, responses):
    global calls
    calls += 1
    return map(helper, responses)
"""
    reward = reward_file(tmp_path, code)
    (tmp_path / "f.py").unlink()
    assert [reward(responses(["", "four"])).tolist() for _ in range(2)] == [[1.0, 3.0], [2.0, 4.0]]


def test_a_function_cannot_change_the_responses(tmp_path):
    code = "def reward(prompts, responses):\n    responses[:] = ['spoiled'] * 2\n    return [0, 0]\n"
    batch = responses(["x", "y"])
    reward_file(tmp_path, code)(batch)
    assert batch.texts == ["x", "y"]


TAKEN = ("common", "json", "my-reward", "v1.2")  # a new process cannot import a file by these names


@pytest.mark.parametrize("start, name", [("spawn", "a"), ("forkserver", "b"), *(("fork", name) for name in TAKEN)])
def test_process_pools_and_pickle_find_what_the_file_defines(tmp_path, start, name):
    code = f"""
from __future__ import annotations
import dataclasses, multiprocessing, pickle
from concurrent.futures import ProcessPoolExecutor
@dataclasses.dataclass
class Verdict:
    score: float
def judge(response):
    return Verdict(float(len(response)))
def reward(prompts, responses):
    context = multiprocessing.get_context({start!r})
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        verdicts = list(pool.map(judge, responses))
    return [pickle.loads(pickle.dumps(verdict)).score for verdict in verdicts]
"""
    if name not in TAKEN:
        name = f"judge_{name}_{tmp_path.name}"  # no other test's module has this name
    (tmp_path / f"{name}.py").write_text(code)
    reward = common.Reward(function=f"{tmp_path}/{name}.py:reward")
    assert reward(responses(["a", "bbb"])).tolist() == [1.0, 3.0]
    assert sys.modules["common"] is common and json.dumps(1) == "1"


def test_two_files_of_one_name_are_two_modules_and_one_file_is_read_once(tmp_path):
    found = []
    for number, folder in enumerate(("a", "b", "a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "same.py"
        if not path.exists():
            path.write_text(f"calls = []\ndef reward(prompts, responses):\n    calls.append(0)\n    return [{number}]")
        reward = common.Reward(function=f"{path}:reward")
        assert reward(responses(["x"])).tolist() == [number % 2]
        found.append(sys.modules[reward.function.__module__])
    assert found[0] is found[2] is not found[1]
    assert len(found[0].calls) == 2 and len(found[1].calls) == 1


def test_a_file_is_read_anew_even_if_its_bytecode_seems_fresh(tmp_path, monkeypatch):
    """A file of the same size and second: Python would take the bytecode that it has written before."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "fresh.py"
    for number in (1, 2):
        path.write_text(f"def reward(prompts, responses): return [{number}]")
        os.utime(path, (1e9, 1e9))
        common.load_function.cache_clear()
        common.load_module.cache_clear()
        sys.modules.pop("fresh", None)
        assert common.Reward(function=f"{path}:reward")(responses(["x"])).tolist() == [number]


@pytest.mark.parametrize("file", ["the_helper.py", "the_helper/__init__.py"])
def test_neighbours_of_one_name_in_two_folders_are_refused(tmp_path, capsys, monkeypatch, file):
    monkeypatch.delitem(sys.modules, "the_helper", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in ("a", "b"):
        (tmp_path / folder / file).parent.mkdir(parents=True)
        (tmp_path / folder / file).write_text(f"NAME = {folder!r}")
        code = "import json, the_helper\ndef reward(prompts, responses): return [len(the_helper.NAME)]"
        (tmp_path / folder / f"of_{folder}.py").write_text(code)
    assert common.Reward(function=f"{tmp_path}/a/of_a.py:reward")(responses(["x"])).tolist() == [1]
    with pytest.raises(SystemExit) as end:
        common.Reward(function=f"{tmp_path}/b/of_b.py:reward")
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "imports the_helper, but would get " in err


@pytest.mark.parametrize("name", ["datasets", "json", "sys"])
def test_a_neighbour_that_is_named_like_an_installed_package_does_no_harm(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('read')")
    reward = reward_file(tmp_path, f"import {name}\ndef reward(prompts, responses): return [len({name}.__name__)]")
    assert reward(responses(["x"])).tolist() == [len(name)]


def test_a_decorated_function_is_called_as_its_wrapper_is(tmp_path):
    code = """
import functools
def adapted(trl):
    @functools.wraps(trl)
    def reward(prompts, responses, **columns):
        return trl(completions=responses, prompts=prompts, **columns)
    return reward
@adapted
def reward(completions, **columns):
    return [len(text) for text in completions]
"""
    assert reward_file(tmp_path, code)(responses(["a", "bb"])).tolist() == [1, 2]


ORDERS = ["responses, prompts", "completions, prompts=None", "completions", "response, prompt", "outputs, inputs"]


@pytest.mark.parametrize("names", ORDERS)
def test_arguments_in_another_order_are_refused(tmp_path, capsys, names):
    with pytest.raises(SystemExit):
        reward_file(tmp_path, f"def reward({names}, **columns): return [0]")
    names = names.replace("=None", "")
    said = f"takes ({names}, columns), but it is called as reward(prompts, responses, **columns)"
    assert said in capsys.readouterr().err


SETTINGS = [
    "torch.set_default_dtype(torch.bfloat16)",
    "torch.set_default_dtype(torch.float64)",
    "torch.set_grad_enabled(False)",
    "torch.set_default_device('meta')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.set_num_threads(torch.get_num_threads() + 1)",
    "torch.use_deterministic_algorithms(True)",
]


def settings_of_torch():
    return (
        torch.get_default_dtype(),
        torch.get_default_device().type,
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("when", ["file", "call"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_function_sets_in_torch_does_not_reach_us(tmp_path, setting, when):
    in_file, in_call = (setting, "") if when == "file" else ("", setting)
    (tmp_path / "f.py").write_text(f"""
import torch
{in_file}
def reward(prompts, responses):
    {in_call}
    return [100 + len(response) / 100 for response in responses]
""")
    before = settings_of_torch()
    reward = common.Reward(function=f"{tmp_path}/f.py:reward", missing_eos_penalty=0.25)
    rewards_B = reward(responses(["a", "bb", "ccc", "dddd"], [True, True, True, False]))
    assert rewards_B.dtype == torch.float32 and rewards_B.device.type == "cpu"
    assert rewards_B.tolist() == torch.tensor([100.01, 100.02, 100.03, 99.79]).tolist()
    assert settings_of_torch() == before and before[:3] == (torch.float32, "cpu", True)


def test_settings_are_restored_after_an_error(tmp_path, capsys):
    code = "import torch\ndef reward(prompts, responses):\n    torch.set_default_dtype(torch.float64)\n    1 / 0\n"
    with pytest.raises(SystemExit):
        reward_file(tmp_path, code)(responses(["x"]))
    assert torch.get_default_dtype() == torch.float32


DRAWING = """
import random
import numpy
import torch
def draw():
    return [random.random(), numpy.random.rand(), torch.rand(()).item()]
random.seed(7), numpy.random.seed(7), torch.manual_seed(7), draw()
seen = []
def reward(prompts, responses, **columns):
    seen.append(draw())
    random.seed(8), numpy.random.seed(8), torch.manual_seed(8), draw()
    return [float(len(set(response))) for response in responses]
"""


def test_a_function_that_draws_or_seeds_changes_no_random_number_of_ours(tmp_path):
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    common.set_seed(3)
    expected = [draws() for _ in range(3)]
    common.set_seed(3)
    found = [draws()]
    reward = reward_file(tmp_path, DRAWING)
    found.append(draws())
    reward(responses(["x"]))
    found.append(draws())
    assert found == expected


@pytest.mark.parametrize("script", others_are_slow(["remax", "spr", "dpo"], soon="remax"))
def test_training_does_not_depend_on_a_function_s_random_numbers(tmp_path, script):
    """Through each script: twice the same rewards, once from a file that seeds and draws."""
    quiet = "def reward(prompts, responses, **columns):\n    return [float(len(set(text))) for text in responses]\n"
    runs = []
    for name, code in (("quiet", quiet), ("drawing", DRAWING)):
        (tmp_path / f"{name}.py").write_text(code)
        flag = "--gold-reward-function" if script == "dpo" else "--reward-function"
        flags = [*SMALL[script], flag, f"{tmp_path}/{name}.py:reward", "--output-dir", tmp_path / name]
        assert run_here(script, *flags) == 0
        runs.append([without_machine(row) for row in read_metrics(tmp_path / name)])
    assert runs[0] == runs[1] and len(runs[0]) == 3


NUMBERS = {  # what a function returns for responses of 1 and 2 letters: the rewards
    "[1, 2]": [1, 2],
    "(True, False)": [1, 0],
    "[numpy.True_, numpy.float16(2)]": [1, 2],
    "numpy.array([1.5, 2])": [1.5, 2],
    "numpy.array([[1.5], [2]])": [1.5, 2],
    "numpy.array([True, False])": [1, 0],
    "torch.tensor([1.5, 2], dtype=torch.bfloat16)": [1.5, 2],
    "torch.tensor([[1.5], [2]], requires_grad=True)": [1.5, 2],
    "[torch.tensor(1.5), torch.tensor([2])]": [1.5, 2],
    "[decimal.Decimal('0.1'), fractions.Fraction(1, 4)]": [0.1, 0.25],
    "{'x': 1, 'y': 2}.values()": [1, 2],
    "(len(response) for response in responses)": [1, 2],
    "[16777217, 0.1]": [16777216, 0.1],
    "numpy.ma.masked_invalid([1.5, 2])": [1.5, 2],
}
NOT_NUMBERS = {  # what a function returns: what is said
    "{1.0: 2.0, 3.0: 4.0}": "returned {1.0: 2.0, 3.0: 4.0}; expected a number for each response",
    "{1.0, 3.0}": "expected a number for each response",
    "'12'": "returned 12; expected a number for each response",
    "['1', '2']": "returned ['1', '2']; expected",
    "b'12'": "returned b'12'; expected",
    "bytearray(b'12')": "expected a number",
    "[[1.0], [2.0]]": "returned [[1.0], [2.0]]; expected",
    "[[1.0, 2.0]]": "expected a number",
    "numpy.ones((2, 2))": "returned [[1. 1.] [1. 1.]]; expected",
    "torch.ones(2, 2)": "returned tensor([[1., 1.], [1., 1.]]); expected",
    "torch.tensor(1.0)": "returned tensor(1.); expected",
    "3.0": "returned 3.0; expected",
    "[1 + 0j, 2 + 0j]": "expected a number",
    "numpy.array([1, 2], dtype=numpy.complex64)": "expected a number",
    "torch.tensor([1, 2], dtype=torch.complex64)": "expected a number",
    "numpy.array(['1', '2'])": "expected a number",
    "numpy.ma.array([1, 2], mask=[True, False])": "expected a number",
    "numpy.array([1, 2], dtype='timedelta64[ns]')": "expected a number",
    "memoryview(b'12')": "expected a number",
    "[10**400, 1]": "returned a whole number that is too large",
    "[10**5000, 1]": "returned a whole number that is too large",
    "[1, 1e39]": "returned 1e+39 for the response 'bb'",
    "[1, numpy.nan]": "returned nan for the response 'bb'",
    "[1, 2, 3]": "returned 3 rewards for 2 responses",
    "[]": "returned 0 rewards for 2 responses",
}


def returning(tmp_path, value) -> common.Reward:
    imports = "import decimal, fractions, numpy, torch\n"
    return reward_file(tmp_path, f"{imports}def reward(prompts, responses):\n    return {value}\n")


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_of_any_library_are_rewards_in_float32(tmp_path, value):
    found = returning(tmp_path, value)(responses(["a", "bb"]))
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.tolist() == torch.tensor(NUMBERS[value], dtype=torch.float32).tolist()


def test_a_function_that_normalises_its_batch_passes_the_trial_of_one_row(tmp_path):
    code = "[(len(text) - mean) / std for text in responses]"
    head = "import numpy\ndef reward(prompts, responses):\n    lengths = [len(text) for text in responses]\n"
    body = "    mean, std = numpy.mean(lengths), numpy.std(lengths)\n"
    (tmp_path / "its.py").write_text(f"{head}{body}    return {code}\n")
    reward = common.Reward(function=f"{tmp_path}/its.py:reward", prompt=common.Prompt("a", [1], columns={}))
    assert reward(responses(["a", "bbb"])).tolist() == [-1, 1]
    with pytest.raises(SystemExit):
        returning(tmp_path, "[1, 2]").score([common.Prompt("a", [1], columns={})], ["b"])


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_not_one_number_per_response_is_refused_in_one_line(tmp_path, value, capsys):
    with pytest.raises(SystemExit) as end:
        returning(tmp_path, value)(responses(["a", "bb"]))
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.count("\n") == 1, err
    assert err.startswith(f"error: {tmp_path}/f.py:reward returned ") and NOT_NUMBERS[value] in err


def test_columns_that_are_named_like_arguments_arrive_with_an_underscore(tmp_path):
    code = "def reward(prompts, responses, **columns):\n    assert columns == EXPECTED, columns\n    return [0.0]\n"
    columns = {"prompts": 1, "responses": 2, "answers": 4, "messages": 5, "two words": 6}
    chat = [dict(role="user", content="Hi")]
    expected = {"prompts_": [1], "responses_": [2], "answers": [4], "messages_": [5], "two words": [6]}
    (tmp_path / "f.py").write_text(f"EXPECTED = {expected | dict(messages=[chat])}\n{code}")
    prompt = common.Prompt("Hi", [], columns, messages=chat)
    assert common.Reward(function=f"{tmp_path}/f.py:reward").score([prompt], [""]).tolist() == [0.0]


def test_a_function_cannot_change_messages_and_columns(tmp_path):
    """A judge's prompt is often made by appending to the chat."""
    code = """
def reward(prompts, responses, messages, labels):
    for chat, response, label in zip(messages, responses, labels):
        chat.append(dict(role="assistant", content=response))
        chat[0]["content"] = "spoiled"
        label.append(3)
    return [len(chat) for chat in messages]
"""
    prompt = common.Prompt("Hi", [], dict(labels=[1]), messages=[dict(role="user", content="Hi")])
    batch = responses(["x", "y"])
    batch.prompts = [prompt, prompt]  # two samples of one prompt
    assert reward_file(tmp_path, code)(batch).tolist() == [2.0, 2.0]
    assert prompt.messages == [dict(role="user", content="Hi")] and prompt.columns == dict(labels=[1])


# ---------------------------------------------------------------- Reward models


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_a_reward_model_reads_its_head_at_the_last_real_token(pad):
    import transformers

    torch.manual_seed(0)
    config = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1)
    config = transformers.GPT2Config(**config, bos_token_id=1, eos_token_id=1, pad_token_id=pad, initializer_range=0.3)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.score = common.ScalarHead(model.score.weight)
    rows = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1]]
    found = common.scores(common.ScalarOutputs(model).eval(), rows, torch.device("cpu"))
    for score, row in zip(found, rows, strict=True):
        hidden = model.transformer(torch.tensor([row])).last_hidden_state
        torch.testing.assert_close(score, (model.score.weight @ hidden[0, -1])[0])


def test_scores_are_float32_whatever_the_model_computes_in():
    """Scores near 6 that differ by 1/100, which bfloat16 would round away."""
    head = torch.nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    head = common.ScalarHead(head.weight)
    head.weight.data[:] = torch.tensor([6.0, 0.01, 0.0, 0.0])
    scores_B = head(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0]], dtype=torch.bfloat16))
    assert scores_B.dtype == torch.float32 and 0.009 < scores_B.diff() < 0.011


def test_the_text_of_a_reward_model_ends_with_one_eos_and_is_cut_on_the_left(tokenizer):
    eos = tokenizer.eos_token_id
    plot, nothing = (common.Prompt(text, [], {}) for text in ("The plot", ""))
    ids = common.reward_model_ids(tokenizer, plot, " was good.", 100)
    assert ids == [*tokenizer("The plot was good.")["input_ids"], eos]
    assert common.reward_model_ids(tokenizer, plot, " was good.<|endoftext|>", 100) == ids
    assert common.reward_model_ids(tokenizer, plot, " was good.", 3) == ids[-3:]
    assert common.reward_model_ids(tokenizer, nothing, "", 100) == [eos]


def test_a_text_that_is_longer_than_a_reward_model_reads_is_told_once(tokenizer, capsys):
    reward = common.Reward(model=str(EXAMPLE / "reward_model"), backend=start_backend())
    prompts = [common.Prompt(text, [], {}) for text in ("The plot", "The plot " * 200)]
    assert reward.score(prompts[:1], [" was good."]).shape == (1,) and "note" not in capsys.readouterr().out
    for _ in range(2):
        reward.score(prompts, [" was good.", " was good."])
    assert capsys.readouterr().out.count("reads 128 tokens; longer texts lose their beginning") == 1


def test_a_reward_model_may_have_any_tokenizer_and_its_mean_is_subtracted(tmp_path):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator([], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=other, eos_token="</s>")
    config = dict(vocab_size=len(other), n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1)
    config = transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    texts = ["a", " was good", "ü", ""]  # of different lengths, in micro-batches of two
    for mean in (0.0, 2.5):
        model.config.reward_mean = mean
        model.save_pretrained(tmp_path / "rm")
        other.save_pretrained(tmp_path / "rm")
        found = common.Reward(str(tmp_path / "rm"), backend=start_backend(), micro_batch_size=2)(responses(texts))
        for score, prompt, response in zip(found, ["Well", "The plot"] * 2, texts, strict=True):
            ids = torch.tensor([[*other(prompt + response)["input_ids"], 0]])
            with torch.no_grad():
                expected = model.score(model.transformer(ids).last_hidden_state[0, -1])[0] - mean
            torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("script", others_are_slow([name for name in SMALL if name != "dpo"], soon="remax ppo spr"))
def test_a_reward_model_reads_micro_batches_in_each_script(tmp_path, script, monkeypatch):
    sizes = []
    forward = common.ScalarOutputs.forward

    def watched(self, ids_BL, mask_BL, read_BK):
        sizes.append(len(ids_BL))
        return forward(self, ids_BL, mask_BL, read_BK)

    monkeypatch.setattr(common.ScalarOutputs, "forward", watched)
    assert run_here(script, *SMALL[script], "--output-dir", tmp_path / "r") == 0
    assert max(sizes) == 3 and sum(size == 3 for size in sizes) >= len(sizes) / 3


# ---------------------------------------------------------------- Evaluation


def test_an_evaluation_compares_the_policy_s_greedy_responses_with_the_reference():
    start_backend()
    sampling = common.Sampling(8, 6, temperature=0.7, batch_size=2)
    models = tiny_model("gpt2"), tiny_model("gpt2")
    for parameter in models[1].parameters():
        parameter.data *= 0.7  # another model
    policy, reference = (policy_of(model, number_tokenizer(), sampling) for model in models)
    policy.eos_ids = [1, *range(20, 32)]
    prompts = [common.Prompt(str(i), row, {}) for i, row in enumerate(([5, 6, 7], [8, 9], [12, 1, 13], [14]))]
    rewards = dict(reward=lambda batch: torch.tensor([float(len(text)) for text in batch.texts]))
    rows = common.evaluate(policy, reference, prompts, rewards, micro_batch_size=4)

    greedy = common.rollout(policy, prompts, num_samples=0, greedy=True)
    assert [row["prompt"] for row in rows] == list("0123") and [row["response"] for row in rows] == greedy.texts
    assert len({row["response_length"] for row in rows}) > 1
    for i, row in enumerate(rows):
        tokens = greedy.tokens_BT[i][greedy.mask_BT[i] == 1].tolist()
        ids, logprobs = torch.tensor([prompts[i].ids + tokens]), []
        for model in models:
            with torch.no_grad():
                logits = model.eval()(ids).logits[0, len(prompts[i].ids) - 1 : -1] / 0.7
            logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item())
        assert row["log_ratio"] == pytest.approx(logprobs[0] - logprobs[1], abs=1e-3) and abs(row["log_ratio"]) > 0.1
        assert row["response_length"] == len(tokens) and row["reward"] == len(row["response"])


def test_an_evaluation_s_metrics_are_means_and_a_tie_wins_half():
    rewards = [(1.0, 0.0), (2.0, 2.0), (3.0, 4.0), (5.0, 4.0)]
    rows = [dict(prompt="x", response="y", reward=a, log_ratio=2 * a) for a, _ in rewards]
    others = [dict(prompt="x", response="y", reward=b, log_ratio=0.0) for _, b in rewards]
    expected = dict(eval_reward=2.75, eval_log_ratio=5.5, eval_win_rate=0.625)
    assert common.evaluation_metrics(rows, others) == expected
    unscored = [{name: value for name, value in row.items() if name != "reward"} for row in rows]
    assert common.evaluation_metrics(unscored, unscored) == dict(eval_log_ratio=5.5)
