"""Reward models and reward functions."""

import pytest
import torch
from conftest import tiny_model

import common

CPU = common.Placement(torch.device("cpu"), "float32", "sdpa", 0, False, 2)


def responses(texts, ended=None, prompts=("Well", "The plot"), columns=None) -> common.Responses:
    rows = [common.Prompt(prompts[i % len(prompts)], [], {}) for i in range(len(texts))]
    for i, row in enumerate(rows):
        row.columns = {name: values[i] for name, values in (columns or {}).items()}
    return common.Responses(rows, texts, None, None, None, None, torch.tensor(ended or [True] * len(texts)))


def reward_file(tmp_path, code: str, penalty=0.0) -> common.Reward:
    (tmp_path / "f.py").write_text(code)
    return common.Reward(None, f"{tmp_path}/f.py:reward", penalty, CPU)


def test_functions_get_prompts_responses_and_columns_row_by_row(tmp_path):
    code = "def reward(prompts, responses, label, **columns):\n    assert label == ['x', 'x', 'y'], label\n"
    code += (
        "    assert prompts == ['Well', 'Well', 'The plot'] and not columns\n    return [len(r) for r in responses]\n"
    )
    reward = reward_file(tmp_path, code, penalty=0.5)
    found = reward(
        responses(["a", "bb", ""], [True, False, True], ("Well", "Well", "The plot"), dict(label=["x", "x", "y"]))
    )
    assert found.dtype == torch.float32 and found.tolist() == [1.0, 1.5, 0.0]  # the penalty is for a missing EOS


@pytest.mark.parametrize(
    "body, wanted",
    [
        ("raise KeyError('x')", "raised KeyError"),
        ("return [float('nan')] * len(responses)", "returned nan for the response 'a'"),
        ("return [1.0]", "returned 1 rewards for 2 responses"),
        ("return ['good'] * len(responses)", "could not convert"),
        ("return None", "TypeError"),
    ],
)
def test_functions_that_misbehave_end_the_run_with_one_line(tmp_path, capsys, body, wanted):
    reward = reward_file(tmp_path, f"def reward(prompts, responses, **columns):\n    {body}\n")
    with pytest.raises(SystemExit) as error:
        reward(responses(["a", "b"]))
    err = capsys.readouterr().err
    assert error.value.code == 1 and wanted in err and "f.py:reward" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "spec, code, wanted",
    [
        ("none.py:reward", "", "no such reward function"),
        ("f.py", "", "no such reward function"),
        ("f.py:other", "def reward(): pass", "no function 'other'"),
        ("f.py:reward", "import nothing_like_this", "ModuleNotFoundError"),
    ],
)
def test_functions_that_are_not_there(tmp_path, capsys, spec, code, wanted):
    (tmp_path / "f.py").write_text(code)
    with pytest.raises(SystemExit) as error:
        common.Reward(None, f"{tmp_path}/{spec}", 0.0, CPU)
    assert error.value.code == 2 and wanted in capsys.readouterr().err


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_a_reward_model_reads_its_head_at_the_last_real_token(pad):
    import transformers

    torch.manual_seed(0)
    config = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1)
    config = transformers.GPT2Config(**config, bos_token_id=1, eos_token_id=1, pad_token_id=pad, initializer_range=0.3)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    rows = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1]]
    found = common.LastTokenScore(model).eval()(*common.right_pad(rows, torch.device("cpu")))
    for score, row in zip(found, rows, strict=True):
        hidden = model.transformer(torch.tensor([row])).last_hidden_state
        torch.testing.assert_close(score, model.score(hidden[0, -1])[0])


def test_what_a_reward_model_reads_ends_with_one_eos_and_is_cut_on_the_left(tokenizer):
    eos = tokenizer.eos_token_id
    ids = common.reward_model_ids(tokenizer, "The plot", " was good.", 100)
    assert ids == [*tokenizer("The plot was good.")["input_ids"], eos]
    assert common.reward_model_ids(tokenizer, "The plot", " was good.<|endoftext|>", 100) == ids
    assert common.reward_model_ids(tokenizer, "The plot", " was good.", 3) == ids[-3:]
    assert common.reward_model_ids(tokenizer, "", "", 100) == [eos]


def test_a_reward_model_may_have_any_tokenizer_and_its_mean_is_subtracted(tmp_path, tokenizer):
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
    for mean in (0.0, 2.5):
        model.config.reward_mean = mean
        model.save_pretrained(tmp_path / "rm")
        other.save_pretrained(tmp_path / "rm")
        found = common.Reward(str(tmp_path / "rm"), None, 0.0, CPU)(responses(["a", " was good", "ü", ""]))
        for score, prompt, response in zip(found, ["Well", "The plot"] * 2, ["a", " was good", "ü", ""], strict=True):
            ids = torch.tensor([[*other(prompt + response)["input_ids"], 0]])
            with torch.no_grad():
                wanted = model.score(model.transformer(ids).last_hidden_state[0, -1])[0] - mean
            torch.testing.assert_close(score, wanted)


def test_a_language_model_is_no_reward_model(tmp_path, tokenizer, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as error:
        common.Reward(str(tmp_path), None, 0.0, CPU)
    assert error.value.code == 2 and "score.weight" in capsys.readouterr().err


def test_pickled_weights_are_not_loaded(tmp_path, tokenizer, capsys):
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit) as error:
        common.load_policy(str(tmp_path), CPU)
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_dropout_is_off_in_every_module(tmp_path):
    import transformers

    config = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.5, resid_pdrop=0.5)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=1, eos_token_id=1)).save_pretrained(
        tmp_path
    )
    module = common.load_policy(str(tmp_path), CPU)
    ids, ones = torch.arange(6)[None], torch.ones(1, 3, dtype=torch.long)
    assert module.training
    once, again = (module(ids[:, :3], ones, ids[:, 3:], 1.0) for _ in range(2))
    assert torch.equal(once, again)


def test_dropout_that_is_no_module_is_off_too(tmp_path):
    import transformers

    shape = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16)
    config = transformers.OPTConfig(**shape, word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.5)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    module = common.load_policy(str(tmp_path), CPU)
    ids, ones = torch.arange(6)[None], torch.ones(1, 3, dtype=torch.long)
    once, again = (module(ids[:, :3], ones, ids[:, 3:], 1.0) for _ in range(2))
    assert module.training and torch.equal(once, again)
