"""Bad input ends with one line that names it and its place, status 2 (1 in training), and loses nothing.

No code but the reward function's is loaded, nothing is fetched unasked, and secrets stay where they are.
"""

import dataclasses
import gzip
import importlib
import json
import shutil
import socket
import sys
import typing

import pytest
import torch
import transformers
from conftest import (
    EXAMPLE,
    EXAMPLE_DATA,
    EXAMPLE_PAIRS,
    PAIRS,
    ROOT,
    SCRIPTS,
    SHARED,
    example_tokenizer,
    fields_of,
    one_error,
    others_are_slow,
    read_metrics,
    run_here,
    run_script,
    short_flags,
    start_backend,
    tiny_model,
)
from safetensors.torch import load_file, save_file

import common

POLICY, REWARD_MODEL = EXAMPLE / "policy", EXAMPLE / "reward_model"
SHORT = "--total-episodes 8 --batch-size 4 --eval-every 0 --max-prompt-length 16".split()


# ---------------------------------------------------------------- Flags


def wrong_values(kind) -> list[str]:
    name = next((name for name, value in vars(common).items() if value == kind), "")
    if typing.get_origin(kind) is typing.Literal:
        return ["nonsense", ""]
    return {
        "PositiveInt": ["0", "-1", "1.5", "x", ""],
        "NonNegativeInt": ["-1", "0.5", "x"],
        "PositiveFloat": ["0", "-1", "nan", "inf", "x"],
        "NonNegativeFloat": ["-0.1", "nan", "inf", "x"],
        "Fraction": ["-0.1", "1.1", "nan", "x"],
        "PathOrName": [""],
    }.get(name, {int: ["x", "1.5"], bool: [], str: []}.get(kind))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_out_of_range(script, capsys, monkeypatch):
    """A flag that remax.py has, too, is tried there."""
    Args = importlib.import_module(script).Args
    common_flags = [(field.name, field.type) for field in fields_of("remax").values()] if script != "remax" else []
    tried = 0
    for field in dataclasses.fields(Args):
        if (field.name, field.type) in common_flags:
            continue
        kinds = [kind for kind in (field.type, *typing.get_args(field.type)) if wrong_values(kind) is not None]
        flag = f"--{field.name.replace('_', '-')}"
        for value in wrong_values(kinds[0]):
            monkeypatch.setattr(sys, "argv", [f"{script}.py", flag, value])
            with pytest.raises(SystemExit) as error:
                common.parse_args(Args)
            assert error.value.code == 2 and flag in capsys.readouterr().err, (flag, value)
            tried += 1
    assert tried > (40 if script == "remax" else 0)


WRONG_FLAGS = {  # script: flags | what is said
    "remax": """
        --batch-size 0 | Input should be greater than 0
        --learning-rate nan | Input should be a finite number
        --gamma 1.5 | Input should be less than or equal to 1
        --kl-coef -1 | Input should be greater than or equal to 0
        --num-samples 0 | Input should be greater than 0
        --zero-stage 4 | zero-stage
        --no-such-flag 1 | no-such-flag
        --total-episodes 4 --batch-size 8 | --total-episodes 4 is less than one update
        --model no/such/model --dataset examples/reviews/prompts.jsonl | no folder no/such/model here, and no hub model
        --dataset no.jsonl | no.jsonl: No such file
        --eval-dataset no.jsonl | no.jsonl: No such file
        --prompt-column text | no column 'text'; there are: prompt
        --response-length 200 | is more than the 128 positions of
        --reward-function nothing.py:f | no such reward function
        --gold-reward-function nothing.py:f | no such reward function
        --reward-model examples/reviews/policy | score.weight
        --offload | needs --zero-stage
        --attention flash_attention_2 | --attention flash_attention_2 computes in 16 bits only
        --attention flash_attention_2 --dtype bfloat16 | no model could be loaded
        --output-dir /proc/nothing | --output-dir /proc/nothing: 
        --resume no/such/run | no readable args.json""",
    "reinforce": "--baseline leave-one-out | --baseline leave-one-out needs --num-samples 2 or more",
    "ppo": """
        --num-minibatches 5 | (times --num-minibatches)
        --response-length 65 | is more than the 128 positions of""",
    "grpo": """
        --num-samples 1 | --num-samples 1: the rewards of a prompt's responses are compared
        --num-minibatches 5 | (times --num-minibatches)
        --beta -1 | beta
        --variant rloo | variant
        --kl-coef 0.1 | kl-coef
        --gamma 1 | gamma""",
    "spr": """
        --num-samples 0 | 'completion'
        --offload | needs --zero-stage 1, 2 or 3
        --batch-size 2000 | --total-episodes 1024 is less than
        --num-minibatches 5 | (times --num-minibatches)
        --beta 0 | Input should be greater than 0
        --weighting best | weighting
        --response-length 65 | is more than the 128 positions of
        --reward-model nowhere | no folder nowhere here
        --reward-function nowhere.py:reward | no such reward function""",
    "spr_token": """
        --num-samples 0 | Input should be greater than 0
        --num-minibatches 5 | (times --num-minibatches)
        --td-lambda 2 | Input should be less than or equal to 1
        --weighting uniform | weighting
        --response-length 65 | is more than the 128 positions of""",
    "reward_model": """
        --chosen-column best | no column 'best'; there are:
        --dataset examples/reviews/prompts.jsonl | no column 'chosen'; there are: prompt
        --model no/such/model --dataset examples/reviews/preferences.jsonl | no folder no/such/model here""",
    "dpo": """
        --chosen-column best | no column 'best'; there are:
        --response-length 3 | no pairs are left
        --response-length 65 | is more than the 128 positions of
        --beta 0 | Input should be greater than 0
        --gold-reward-function nowhere.py:reward | no such reward function""",
}
CASES = [(script, *line.split(" | ")) for script, lines in WRONG_FLAGS.items() for line in lines.strip().splitlines()]


@pytest.mark.parametrize("script, flags, message", CASES)
def test_wrong_flags_are_told_in_one_line(tmp_path, monkeypatch, capsys, script, flags, message):
    output = [] if "output-dir" in flags or "resume" in flags else ["--output-dir", tmp_path / "r"]
    monkeypatch.chdir(ROOT)
    assert run_here(script, *flags.split(), *output) == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())  # tyro draws a box
    assert message.strip() in text and "Traceback" not in text
    assert not (tmp_path / "r").exists()  # so that the same command, mended, runs


def test_wrong_flags_are_told_by_one_rank_only(monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # another rank than 0 replaces it
        for flags, message in (("--batch-size 0", "Input should be greater than 0"), ("--no-such-flag 1", "no-such")):
            assert run_here("remax", *flags.split()) == 2
            assert (message in capsys.readouterr().err) == lines


# ---------------------------------------------------------------- Data

HI = '{"role": "user", "content": "Hi"}'
PROMPT_FILES = {  # name: (content, what is said)
    "none.jsonl": (None, "none.jsonl: No such file"),
    "blank.jsonl": (" \n\n", "blank.jsonl: no rows"),
    "utf16.jsonl": ('{"prompt": "x"}\n'.encode("utf-16"), "utf16.jsonl:1: not UTF-8"),
    "latin.jsonl": (b'{"prompt": "x"}\n{"prompt": "\xe9"}\n', "latin.jsonl:2: not UTF-8"),
    "latin.csv": (b"prompt\nx\n\xe9\n", "latin.csv:3: not UTF-8"),
    "gzip.jsonl": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "gzip.jsonl:1: not UTF-8"),
    "broken.jsonl.gz": ('{"prompt": "x"}\n', "broken.jsonl.gz: Not a gzipped file"),
    "half.jsonl.gz": (gzip.compress(b'{"prompt": "x"}')[:-9], "half.jsonl.gz: "),
    "latin.jsonl.gz": (gzip.compress(b'{"prompt": "x"}\n\xe9'), "latin.jsonl.gz:2: not UTF-8"),
    "narrow.tsv": ("prompt\tn\nx\t1\ny\n", "narrow.tsv:3: not 2 columns"),
    "half.ndjson": ('{"prompt": "x"}\n{"prompt": "y\n', "half.ndjson:2: "),
    "surrogate.jsonl": ('{"prompt": "\\ud800"}\n', "surrogate.jsonl:1: "),
    "nul.jsonl": ('{"prompt": "x"}\n\x00\x00\n', "nul.jsonl:2: "),
    "half.jsonl": ('{"prompt": "x"}\n{"prompt": "y\n', "half.jsonl:2: "),
    "deep.jsonl": ('{"prompt": "x"}\n' + "[" * 100_000, "deep.jsonl:2: "),
    "digits.jsonl": ('{"prompt": "x", "n": ' + "9" * 5000 + "}", "digits.jsonl:1: "),
    "mac.jsonl": ('{"prompt": "x"}\r{"prompt": "y"}', "mac.jsonl:1: "),
    "quotes.jsonl": ("{'prompt': 'x'}", "quotes.jsonl:1: "),
    "two.jsonl": ('{"prompt": "x"} {"prompt": "y"}', "two.jsonl:1: "),
    "string.jsonl": ('"The plot"', "string.jsonl:1: a str"),
    "list.jsonl": ('{"prompt": "x"}\n\n["y"]\n', "list.jsonl:3: a list"),
    "missing.jsonl": ('{"prompt": "x"}\n{}', "missing.jsonl:2: no column 'prompt'"),
    "case.jsonl": ('{"Prompt": "x"}', "case.jsonl:1: no column 'prompt'; there are: Prompt"),
    "null.jsonl": ('{"prompt": "x"}\n{"prompt": null}', "null.jsonl:2: 'prompt' is None"),
    "number.jsonl": ('{"prompt": 3}', "number.jsonl:1: 'prompt' is 3"),
    "boolean.jsonl": ('{"prompt": true}', "boolean.jsonl:1: 'prompt' is True"),
    "empty.jsonl": ('{"prompt": ""}\n{"prompt": " "}', "empty.jsonl: no prompts are left ("),
    "messages.jsonl": ('{"prompt": []}', "messages.jsonl:1: "),
    "words.jsonl": ('{"prompt": ["x"]}', "words.jsonl:1: 'prompt' holds x;"),
    "content.jsonl": ('{"prompt": [{"role": "user"}]}', "content.jsonl:1: 'prompt' holds {'role': 'user'};"),
    "nulls.jsonl": (
        '{"prompt": [{"role": "user", "content": null}]}',
        "nulls.jsonl:1: 'prompt' holds {'role': 'user', 'content': None};",
    ),
    "parts.jsonl": (
        '{"prompt": [{"role": "user", "content": [1]}]}',
        "parts.jsonl:1: 'prompt' holds {'role': 'user', 'content': [1]};",
    ),
    "later.jsonl": (f'{{"prompt": [{HI}, {{"role": "user"}}]}}', "later.jsonl:1: 'prompt' holds {'role': 'user'};"),
    "object.json": ('{"prompt": {"a": 1}}', "object.json: "),
    "number.json": ("3", "number.json: "),
    "null.json": ("null", "null.json: "),
    "numbers.json": ("[1, 2]", "numbers.json: "),
    "many.json": ('{"prompt": "x"}\n{"prompt": "y"', "many.json:2: no valid JSON"),
    "values.json": ('[{"prompt": "x"}, {"prompt": 3}]', "values.json: row 2: 'prompt' is 3"),
    "empty.json": ("", "empty.json: "),
    "half.json": ('[{"prompt": "x"}, {"prompt', "half.json: "),
    "latin.json": (b'[{"prompt": "\xe9"}]', "latin.json"),
    "open.csv": ('prompt\nx\n"y\nz\n', "open.csv:3: unexpected end of data"),
    "wide.csv": ("prompt,n\nx,1\ny,2,3\n", "wide.csv:3: not 2 columns"),
    "narrow.csv": ("prompt,n\nx,1\ny\n", "narrow.csv:3: not 2 columns"),
    "header.csv": ("prompt,n\n", "header.csv: no rows"),
    "empty.csv": ("", "empty.csv: no rows"),
    "spaces.csv": ("prompt\n  \n", "spaces.csv: no prompts are left ("),
    "broken.parquet": ("PAR1", "broken.parquet: "),
    "empty.parquet": ("", "empty.parquet: "),
    "prompts.txt": ("The plot\n", "prompts.txt: "),
}


@pytest.fixture
def chat_tokenizer():
    tokenizer = example_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


def refused(capsys, path, tokenizer) -> str:
    with pytest.raises(SystemExit) as error:
        common.load_prompts(str(path), common.Layout(), tokenizer, 8)
    assert error.value.code == 2
    return one_error(capsys)


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_broken_files_of_prompts(tmp_path, capsys, chat_tokenizer, name):
    content, message = PROMPT_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in refused(capsys, tmp_path / name, chat_tokenizer)


def test_a_folder_is_no_file_of_prompts(tmp_path, capsys, tokenizer):
    (tmp_path / "p.jsonl").mkdir()
    assert "p.jsonl: Is a directory" in refused(capsys, tmp_path / "p.jsonl", tokenizer)


def test_messages_need_a_template_that_takes_them(tmp_path, capsys, tokenizer, chat_tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{{"prompt": [{HI}]}}\n')
    assert "p.jsonl:2: 'prompt' holds chat messages, but" in refused(capsys, path, tokenizer)
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    line = refused(capsys, path, chat_tokenizer)
    assert "p.jsonl:2: 'prompt': the chat template" in line and "roles must alternate" in line


REFUSED = {  # of the development data, as prompts
    "blank_lines_only": "no rows",
    "csv_named_jsonl": ":1: ",
    "empty": "no rows",
    "json_array": ":1: ",
    "malformed_middle": ":6: ",
    "missing_prompt_column": ":1: no column 'prompt'; there are: question",
    "not_utf8": ":4: not UTF-8",
    "null_values": ":6: 'prompt' is None",
    "truncated_last_line": ":6: ",
    "wrong_types": ":6: 'prompt' is ",
}
NO_PROMPTS = "label_strings label_numeric_strings label_out_of_range one_class".split()
needs_broken_files = pytest.mark.skipif(
    not (SHARED / "data" / "bad").is_dir(), reason="needs the development data beside the project"
)


@needs_broken_files
def test_the_broken_files_of_the_development_data(capsys, tokenizer):
    for path in sorted((SHARED / "data" / "bad").glob("*.jsonl")):
        if path.stem in REFUSED:
            line = refused(capsys, path, tokenizer)
            assert str(path) in line and REFUSED[path.stem] in line
        elif path.stem in NO_PROMPTS:
            assert "no column 'prompt'" in refused(capsys, path, tokenizer)
        else:
            prompts = common.load_prompts(str(path), common.Layout(), tokenizer, 32)
            assert prompts and max(len(prompt.ids) for prompt in prompts) <= 32


REFUSED_PAIRS = [*REFUSED, "missing_rejected_one_row", "chosen_equals_rejected_all", "one_row", *NO_PROMPTS]
REFUSED_PAIRS += "empty_prompts prompt_200k_chars special_tokens_in_text gsm8k_odd_answers".split()


@pytest.mark.slow
@needs_broken_files
@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_on_the_broken_files_of_the_development_data(tmp_path, capsys, script):
    pairs, tried = script in PAIRS, 0
    own = [] if pairs else ["--response-length", 4]
    own += SCRIPTS[script].one_step.split()
    for path in sorted((SHARED / "data" / "bad").glob("*.jsonl")):
        flags = ["--dataset", path, "--total-episodes", 4, "--batch-size", 2, "--eval-every", 0, "--eval-size", 1]
        flags += ["--max-prompt-length", 8, *own]
        status = run_here(script, *flags, "--output-dir", tmp_path / path.stem)
        if path.stem in (REFUSED_PAIRS if pairs else [*REFUSED, *NO_PROMPTS]):
            assert status == 2 and str(path) in one_error(capsys), path
            assert not (tmp_path / path.stem).exists()
        elif status:  # responses are longer than the tiny model's context: nothing is left, and a line says so
            assert pairs and "dropped" in one_error(capsys), path
        else:
            assert len(read_metrics(tmp_path / path.stem)) == 2
        tried += 1
    assert tried == 27


# ---------------------------------------------------------------- Models


def gpt2(folder, tokenizer, **changes):
    sizes = dict(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0, pad_token_id=0) | changes
    tiny_model("gpt2", **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert(folder, tokenizer):
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    config = transformers.BertConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.5, pad_token_id=0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def t5(folder, tokenizer):
    shape = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def without_eos(folder, tokenizer):
    gpt2(folder, tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        if (folder / name).exists():
            values = json.loads((folder / name).read_text())
            values = {key: value for key, value in values.items() if not key.startswith(("eos", "pad", "bos"))}
            (folder / name).write_text(json.dumps(values | dict(eos_token_id=None)))


def with_nan(folder, tokenizer):
    model = tiny_model("gpt2", vocab_size=len(tokenizer), eos_token_id=0)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def truncated(folder, tokenizer):
    gpt2(folder, tokenizer)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def a_reward_model(folder, tokenizer):
    shutil.copytree(REWARD_MODEL, folder, dirs_exist_ok=True)


def no_weights(folder, tokenizer):
    gpt2(folder, tokenizer)
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder, tokenizer):
    tiny_model("gpt2").save_pretrained(folder)


def broken_config(folder, tokenizer):
    gpt2(folder, tokenizer)
    (folder / "config.json").write_text('{"model_type": "gpt2",')


def few_tokens(folder, tokenizer):
    gpt2(folder, tokenizer, vocab_size=len(tokenizer) - 5)


def recurrent(folder, tokenizer):
    """Its state reads the padding."""
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, lru_width=32)
    config = transformers.RecurrentGemmaConfig(**shape, vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.RecurrentGemmaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def added_tokens(folder, tokenizer):
    """An added token has no row in the model's embeddings."""
    gpt2(folder, tokenizer)
    tokenizer.add_tokens(["of the"])
    tokenizer.save_pretrained(folder)


MODELS = {  # how it is made: (scripts, what is said)
    bert: ("remax ppo", "is not causal"),
    t5: ("remax", "no model could be loaded"),
    without_eos: ("remax reward_model dpo", "EOS token"),
    with_nan: ("remax spr", "not finite"),
    truncated: ("remax reward_model", "no model could be loaded"),
    a_reward_model: ("remax reinforce spr dpo", "is a reward model"),
    no_weights: ("remax", "no model could be loaded"),
    no_tokenizer: ("remax reward_model", "tokenizer"),
    broken_config: ("remax", "could be loaded"),
    few_tokens: ("remax reward_model", "tokens"),
    recurrent: ("remax", "RecurrentGemmaForCausalLM is not supported"),
    added_tokens: ("remax spr reward_model dpo", "has no embedding of 'of the'"),
}


@pytest.mark.parametrize("script, make", [(s, make) for make, (names, _) in MODELS.items() for s in names.split()])
def test_models_that_cannot_be_trained(tmp_path, capsys, script, make):
    (tmp_path / "m").mkdir()
    make(tmp_path / "m", example_tokenizer())
    data = EXAMPLE_PAIRS if script in PAIRS else EXAMPLE_DATA
    assert run_here(script, *SHORT, "--model", tmp_path / "m", *data, "--output-dir", tmp_path / "r") == 2
    line = one_error(capsys)
    assert MODELS[make][1] in line and str(tmp_path / "m") in line, line
    assert not (tmp_path / "r").exists()


def few_reward_tokens(folder, tokenizer):
    config = transformers.GPT2Config(vocab_size=len(tokenizer) - 5, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def no_reward_tokenizer(folder, tokenizer):
    shutil.copytree(REWARD_MODEL, folder, dirs_exist_ok=True)
    for path in folder.glob("*token*"):
        path.unlink()


def bert_classifier(folder, tokenizer):
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=1)
    config = transformers.BertConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def two_labels(folder, tokenizer):
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=2)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rewritten(folder, change):
    """The example's reward model with other tensors."""
    shutil.copytree(REWARD_MODEL, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))


def biased_head(folder, tokenizer):
    rewritten(folder, lambda tensors: tensors.update({"score.bias": torch.ones(1)}))


def mlp_head(folder, tokenizer):
    """As some reward models on the hub have it: score is a Sequential."""

    def change(tensors):
        width = tensors.pop("score.weight").shape[1]
        tensors["score.0.weight"] = torch.ones(width, width)
        tensors["score.2.weight"] = torch.ones(1, width)

    rewritten(folder, change)


def value_head(folder, tokenizer):
    """As TRL's and OpenRLHF's classes save it."""

    def change(tensors):
        tensors["value_head.weight"] = tensors.pop("score.weight")

    rewritten(folder, change)


def quantised(folder, tokenizer):
    shutil.copytree(REWARD_MODEL, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="bitsandbytes", load_in_4bit=True)
    (folder / "config.json").write_text(json.dumps(config))


def adapters(folder, tokenizer):
    (folder / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", base_model_name_or_path="m")))
    tokenizer.save_pretrained(folder)


def adapters_with_config(folder, tokenizer):
    """With peft installed, transformers would add the adapters to the model."""
    shutil.copytree(REWARD_MODEL, folder, dirs_exist_ok=True)
    adapters(folder, tokenizer)


HEADS = {  # what neither scores nor goes on training: what is said
    two_labels: "its head `score` has 2 outputs; a reward model has one",
    biased_head: "its head has score.bias; only `score`, one linear layer without bias",
    mlp_head: "its head has score.0.weight, score.2.weight; only `score`",
    value_head: "its head has value_head.weight; only `score`",
    bert_classifier: "BertForSequenceClassification has no linear head",
    quantised: "its weights are quantised and cannot be trained",
    adapters: "holds adapters (LoRA); merge them into their model first: peft.AutoPeft",
    adapters_with_config: "holds adapters (LoRA); merge them",
}


@pytest.mark.parametrize("make", HEADS)
def test_reward_models_that_cannot_be_trained_further(tmp_path, capsys, make):
    (tmp_path / "m").mkdir()
    make(tmp_path / "m", example_tokenizer())
    flags = ["--model", tmp_path / "m", *EXAMPLE_PAIRS, "--output-dir", tmp_path / "r"]
    assert run_here("reward_model", *SHORT, *flags) == 2
    line = one_error(capsys)
    assert f"{tmp_path / 'm'}: {HEADS[make]}" in line, line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("make", [mlp_head, quantised, adapters, adapters_with_config])
def test_these_are_not_policies(tmp_path, capsys, make):
    (tmp_path / "m").mkdir()
    make(tmp_path / "m", example_tokenizer())
    assert run_here("remax", *SHORT, "--model", tmp_path / "m", *EXAMPLE_DATA, "--output-dir", tmp_path / "r") == 2
    expected = "is a reward model" if make == mlp_head else HEADS[make]
    assert f"{tmp_path / 'm'}: {expected}" in one_error(capsys)


REWARD_MODELS = HEADS | {
    gpt2: "has no weights for score.weight",  # a language model
    few_reward_tokens: "tokens",
    without_eos: "EOS token",
    no_reward_tokenizer: "tokenizer",
    truncated: "no model could be loaded",
}


@pytest.mark.parametrize("script", ["remax", "ppo", "spr"])
@pytest.mark.parametrize("make", REWARD_MODELS)
def test_models_that_cannot_score(tmp_path, capsys, make, script):
    (tmp_path / "rm").mkdir()
    make(tmp_path / "rm", example_tokenizer())
    assert run_here(script, *SHORT, "--reward-model", tmp_path / "rm", "--output-dir", tmp_path / "r") == 2
    line = one_error(capsys)
    assert f"{tmp_path / 'rm'}: " in line and REWARD_MODELS[make] in line, line
    assert not (tmp_path / "r").exists()


def changed_logits(model):
    def hook(module, inputs, output):
        output.logits = 2 * (output.logits / 2).tanh()

    model.register_forward_hook(hook)


def seen_future(model):
    def hook(module, inputs, output):
        output.last_hidden_state += output.last_hidden_state.mean(1, keepdim=True)

    model.model.register_forward_hook(hook)


def noise(model):
    def hook(module, inputs, output):
        output.last_hidden_state += module.training * torch.randn_like(output.last_hidden_state)

    model.model.register_forward_hook(hook)


def seen_padding(model, only_decoding=False):
    def hook(module, inputs, kwargs):
        if kwargs["attention_mask"] is not None and (kwargs["input_ids"].shape[1] == 1 or not only_decoding):
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return inputs, kwargs

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def seen_padding_in_decoding(model):
    seen_padding(model, only_decoding=True)


@pytest.mark.parametrize("spoil", [changed_logits, seen_future, noise, seen_padding, seen_padding_in_decoding])
def test_models_whose_log_probabilities_would_be_wrong(monkeypatch, capsys, spoil):
    sampling = common.Sampling(8, 8, 1.0, 8)
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: model)
    model = tiny_model("llama")
    common.load_policy("m", example_tokenizer(), sampling, start_backend())
    spoil(model)
    with pytest.raises(SystemExit) as error:
        common.load_policy("m", example_tokenizer(), sampling, start_backend())
    line = one_error(capsys)
    assert error.value.code == 2 and "m: a LlamaForCausalLM is not supported: it " in line
    assert ("when it decodes" in line) == (spoil == seen_padding_in_decoding)


# ---------------------------------------------------------------- Rewards

CODE = {  # body: (status, what is said)
    "raise ValueError('no such film')": (1, "raised ValueError: no such film"),
    "raise KeyError('film')": (1, "raised KeyError: 'film'"),
    "return 1 / 0": (1, "raised ZeroDivisionError"),
    "return b'\\xff'.decode()": (1, "raised UnicodeDecodeError"),
    "return [float('nan')] * len(responses)": (1, "returned nan for the response"),
    "return [float('-inf')] * len(responses)": (1, "returned -inf for the response"),
    "return [1e300] * len(responses)": (1, "returned 1e+300 for the response"),
    "return [1.0]": (1, "returned 1 rewards for"),
    "return ['good'] * len(responses)": (1, "returned ['good']; expected a number for each response"),
    "return [None] * len(responses)": (1, "returned [None]; expected a number for each response"),
    "return None": (1, "returned None; expected a number for each response"),
    "raise SystemExit(0)": (1, "raised SystemExit"),
}


@pytest.mark.parametrize("body", CODE)
@pytest.mark.parametrize("script, flag", [("remax", "--reward-function"), ("spr", "--gold-reward-function")])
def test_reward_functions_that_misbehave_in_training(tmp_path, capsys, body, script, flag):
    (tmp_path / "f.py").write_text(f"def reward(prompts, responses, **columns):\n    {body}\n")
    spec = f"{tmp_path}/f.py:reward"
    found = run_here(script, *SHORT, flag, spec, "--output-dir", tmp_path / "r")
    status, message = CODE[body]
    assert f"{spec} {message}" in one_error(capsys) and found == status


@pytest.mark.parametrize(
    "spec, code, message",
    [
        ("none.py:reward", "", "no such reward function"),
        ("f.py", "", "no such reward function"),
        ("f.py:other", "def reward(): pass", "no function 'other'"),
        ("f.py:reward", "reward = 3", "no function 'reward'"),
        ("f.py:reward", "def reward(:", "raised SyntaxError"),
        ("f.py:reward", "import nothing_like_this", "raised ModuleNotFoundError"),
        ("f.py:reward", "import sys\ndef reward(prompts, responses): ...\nsys.exit(0)", "raised SystemExit"),
    ],
)
def test_reward_functions_that_are_not_there(tmp_path, capsys, spec, code, message):
    (tmp_path / "f.py").write_text(code)
    flags = ["--reward-function", tmp_path / spec, "--output-dir", tmp_path / "r"]
    assert run_here("remax", *SHORT, *flags) == (1 if "raised" in message else 2)
    line = one_error(capsys)
    assert message in line and str(tmp_path / spec) in line and not (tmp_path / "r").exists()


# ---------------------------------------------------------------- Folders


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name}


@pytest.mark.parametrize("name", ["policy/model.safetensors", "metrics.jsonl", "notes.txt"])
def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path, capsys, name):
    (tmp_path / "r" / name).parent.mkdir(parents=True)
    (tmp_path / "r" / name).write_text("precious")
    assert run_here("remax", *SHORT, "--output-dir", tmp_path / "r") == 2
    assert f"--output-dir {tmp_path / 'r'} " in one_error(capsys)
    assert contents(tmp_path / "r") == {tmp_path / "r" / name: b"precious"}


def test_an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file", tmp_path / "file" / "r"):
        assert run_here("remax", *SHORT, "--output-dir", output) == 2
        assert f"--output-dir {output}: " in one_error(capsys)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_folder_that_cannot_be_made_with_two_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script("remax.py", *SHORT, "--output-dir", tmp_path / "file" / "r", ranks=2)
    assert result.returncode != 0 and result.stderr.count(f"error: --output-dir {tmp_path / 'file' / 'r'}: ") == 1
    assert 'remax.py", line' not in result.stderr  # no traceback of ours


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a") / "run"
    assert run_here("remax", *SHORT, "--save-every", "1", "--output-dir", folder) == 0
    return folder


def spoil_args(folder):
    (folder / "args.json").write_text('{"seed": 1')


def no_args(folder):
    (folder / "args.json").unlink()


def args_list(folder):
    (folder / "args.json").write_text("[1]")


def no_checkpoint(folder):
    shutil.rmtree(folder / "checkpoint")


def no_update(folder):
    shutil.rmtree(folder / "checkpoint" / "update-2")


def spoil_latest(folder):
    (folder / "checkpoint" / "latest").write_text("two")


def spoil_checkpoint(folder):
    for path in (folder / "checkpoint" / "update-2").rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.xdist_group("a_run")
@pytest.mark.parametrize(
    "spoil", [spoil_args, no_args, args_list, no_checkpoint, no_update, spoil_latest, spoil_checkpoint]
)
def test_runs_that_cannot_be_resumed(tmp_path, capsys, a_run, spoil):
    shutil.copytree(a_run, tmp_path / "r")
    spoil(tmp_path / "r")
    before = contents(tmp_path / "r")
    assert run_here("remax", "--resume", tmp_path / "r") == 2
    assert f"--resume {tmp_path / 'r'}: " in one_error(capsys)
    assert contents(tmp_path / "r") == before


@pytest.mark.xdist_group("a_run")
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(learning_rate=2e-5), "--learning-rate 0.0007 differs"),  # the run has the changed value
        (dict(ranks=2), "another number of ranks than 1"),
        (dict(zero_stage=2), "--zero-stage 0 differs"),
    ],
)
def test_a_run_is_resumed_with_its_own_flags_only(tmp_path, capsys, a_run, change, message):
    shutil.copytree(a_run, tmp_path / "r")
    saved = json.loads((tmp_path / "r" / "args.json").read_text())
    (tmp_path / "r" / "args.json").write_text(json.dumps(saved | change))
    before = contents(tmp_path / "r")
    flags = ["--learning-rate", "0.0007", "--zero-stage", "0"]
    assert run_here("remax", "--resume", tmp_path / "r", *flags) == 2
    assert message in one_error(capsys) and contents(tmp_path / "r") == before


@pytest.mark.xdist_group("a_run")
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "remax"])
def test_a_run_is_resumed_by_its_own_script_only(capsys, a_run, script):
    before = contents(a_run)
    assert run_here(script, "--resume", a_run) == 2
    assert "of another script" in one_error(capsys) and contents(a_run) == before


# ---------------------------------------------------------------- Code, network, secrets

WHOLE = "--total-episodes 8 --batch-size 4 --eval-size 2 --save-every 1".split()


@pytest.mark.parametrize("script", others_are_slow(SCRIPTS, soon="remax spr_token dpo"))
def test_no_network_and_no_secret_in_what_is_written(tmp_path, capsys, monkeypatch, script):
    secrets = dict(HF_TOKEN="hf_s3cr3t", WANDB_API_KEY="k3y-s3cr3t", AWS_SECRET_ACCESS_KEY="aws-s3cr3t")
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    start_backend()  # the process group, on the loopback interface
    asked = []

    def refuse(self, address, *args):
        asked.append(address)
        raise OSError(f"no network: {address}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: refuse(None, args))
    assert run_here(script, *WHOLE, *short_flags(script, 8), "--output-dir", tmp_path / "r") == 0
    assert not asked
    written = {path.name: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    assert {"args.json", "metrics.jsonl", "samples.jsonl"} <= written.keys() and len(written) > 8
    out, err = capsys.readouterr()
    for text in (*written.values(), out.encode(), err.encode()):
        assert b"s3cr3t" not in text


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(folder, boom):
    """Sound weights, but in a pickle, which could hold anything."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def code_of_a_model(folder, boom):
    """A model with classes of its own, under a name that transformers does not know."""
    (folder / "evil.py").write_text(f"open({str(boom)!r}, 'w')\nclass EvilConfig: ...\nclass Evil: ...\n")
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    auto_map = dict(AutoConfig="evil.EvilConfig") | {name: "evil.Evil" for name in names}
    (folder / "config.json").write_text(json.dumps(config | dict(model_type="evil", auto_map=auto_map)))


def code_of_a_tokenizer(folder, boom):
    code_of_a_model(folder, boom)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = dict(tokenizer_class="EvilTokenizer", auto_map=dict(AutoTokenizer=["evil.Evil", None]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))


@pytest.mark.parametrize("make", [pickled, code_of_a_model, code_of_a_tokenizer])
@pytest.mark.parametrize("role", ["--model", "--reward-model"])
def test_models_never_run_code_of_their_own(tmp_path, capsys, monkeypatch, role, make):
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # transformers asks where it is not told no
    folder, boom = tmp_path / "m", tmp_path / "boom"
    shutil.copytree(POLICY if role == "--model" else REWARD_MODEL, folder)
    make(folder, boom)
    assert run_here("remax", *WHOLE, role, folder, "--output-dir", tmp_path / "r") == 2
    assert str(folder) in one_error(capsys) and not boom.exists()


@pytest.mark.xdist_group("a_run")
def test_a_resumed_folder_is_the_exception(tmp_path, a_run):
    """The README's warning is true: a checkpoint is a pickle, and loading it runs the code that it holds."""
    shutil.copytree(a_run, tmp_path / "r")
    (path,) = (tmp_path / "r" / "checkpoint").rglob("mp_rank_00_model_states.pt")
    torch.save(Bomb(tmp_path / "boom"), path)
    run_here("remax", "--resume", tmp_path / "r")
    assert (tmp_path / "boom").exists()
