"""Reward models, reward functions, and evaluations."""

import pytest
import torch
from conftest import number_tokenizer, start_backend, tiny_model

import common


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
    found = common.LastTokenScore(model).eval()(*common.pad(rows, "right", torch.device("cpu")))
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


# ---------------------------------------------------------------- Evaluation


def test_an_evaluation_compares_the_policy_s_greedy_responses_with_the_reference():
    start_backend()
    sampling = common.Sampling(8, 6, temperature=0.7, batch_size=2)
    models = tiny_model("gpt2"), tiny_model("gpt2")
    for parameter in models[1].parameters():
        parameter.data *= 0.7  # another model
    policy, reference = (
        common.ResponseLogprobs(model, number_tokenizer(), sampling, torch.device("cpu")) for model in models
    )
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
