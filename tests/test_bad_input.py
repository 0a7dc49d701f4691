"""Bad input ends with one line that names what and where, status 2 (1 in training), and loses nothing."""

import dataclasses
import importlib
import json
import shutil
import sys
import typing

import pytest
import transformers
from conftest import SCRIPTS, SHARED, read_metrics, run_script, tiny_model
from script_worker import run

import common

POLICY, REWARD_MODEL = common.EXAMPLE / "policy", common.EXAMPLE / "reward_model"
SHORT = "--total-episodes 8 --batch-size 4 --eval-every 0 --max-prompt-length 16".split()


def one_line(capsys) -> str:
    """The error line, which must be the only one."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


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
    Args, tried = importlib.import_module(script).Args, 0
    for field in dataclasses.fields(Args):
        kinds = [kind for kind in (field.type, *typing.get_args(field.type)) if wrong_values(kind) is not None]
        flag = f"--{field.name.replace('_', '-')}"
        for value in wrong_values(kinds[0]):
            monkeypatch.setattr(sys, "argv", [f"{script}.py", flag, value])
            with pytest.raises(SystemExit) as error:
                common.parse_args(Args)
            assert error.value.code == 2 and flag in capsys.readouterr().err, (flag, value)
            tried += 1
    assert tried > 40


# ---------------------------------------------------------------- Data

DEEP = "[" * 100_000
PROMPT_FILES = {  # name: (content, what is said)
    "utf16.jsonl": ('{"prompt": "x"}\n'.encode("utf-16"), "utf16.jsonl:1: not UTF-8"),
    "gzip.jsonl": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "gzip.jsonl:1: not UTF-8"),
    "nul.jsonl": (b'{"prompt": "x"}\n\x00\x00\n', "nul.jsonl:2: "),
    "deep.jsonl": (f'{{"prompt": "x"}}\n{DEEP}'.encode(), "deep.jsonl:2: "),
    "digits.jsonl": (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "digits.jsonl:1: "),
    "mac.jsonl": (b'{"prompt": "x"}\r{"prompt": "y"}', "mac.jsonl:1: "),
    "quotes.jsonl": (b"{'prompt': 'x'}", "quotes.jsonl:1: "),
    "two.jsonl": (b'{"prompt": "x"} {"prompt": "y"}', "two.jsonl:1: "),
    "string.jsonl": (b'"The plot"', "string.jsonl:1: a str"),
    "object.json": (b'{"prompt": {"a": 1}}', "object.json: entry 1: a str"),
    "number.json": (b"3", "number.json: "),
    "null.json": (b"null", "null.json: "),
    "empty.json": (b"", "empty.json: "),
    "half.json": (b'[{"prompt": "x"}, {"prompt', "half.json: "),
    "boolean.jsonl": (b'{"prompt": true}', "boolean.jsonl:1: 'prompt' is a bool"),
    "case.jsonl": (b'{"Prompt": "x"}', "case.jsonl:1: no column 'prompt'; there are: Prompt"),
    "messages.jsonl": (b'{"prompt": [{"role": "user", "content": null}]}', "messages.jsonl:1: 'prompt' is a list"),
    "parts.jsonl": (b'{"prompt": [{"role": "user", "content": [1]}]}', "parts.jsonl:1: 'prompt' is a list"),
    "open.csv": (b'prompt\nx\n"y\nz\n', "open.csv:3: unexpected end of data"),
    "wide.csv": (b"prompt,n\nx,1\ny,2,3\n", "wide.csv:3: not 2 columns"),
    "header.csv": (b"prompt,n\n", "header.csv: no rows"),
    "empty.csv": (b"", "empty.csv: no rows"),
    "spaces.csv": (b"prompt\n  \n", "spaces.csv: every prompt is empty"),
    "broken.parquet": (b"PAR1", "broken.parquet: "),
    "empty.parquet": (b"", "empty.parquet: "),
    "prompts.txt": (b"The plot\n", "prompts.txt: "),
}


@pytest.fixture
def chat_tokenizer():
    tokenizer = common.load_tokenizer(str(POLICY))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_broken_files_of_prompts(tmp_path, capsys, monkeypatch, chat_tokenizer, name):
    content, wanted = PROMPT_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        common.load_prompts(str(tmp_path / name), "train", "prompt", chat_tokenizer, 8)
    assert error.value.code == 2 and wanted in one_line(capsys)


def test_a_folder_is_no_file_of_prompts(tmp_path, capsys, tokenizer):
    (tmp_path / "p.jsonl").mkdir()
    with pytest.raises(SystemExit):
        common.load_prompts(str(tmp_path / "p.jsonl"), "train", "prompt", tokenizer, 8)
    assert "p.jsonl: Is a directory" in one_line(capsys)


def test_sound_files_that_look_odd_are_read_whole(tmp_path, tokenizer):
    texts = [
        "a\u2028b",
        "a\x85b",
        "a\x0bb",
        "<|endoftext|>",
        "🎬",
        " x ",
    ]  # line breaks of Unicode break no line of jsonl
    path = tmp_path / "p.JSONL"
    path.write_text("".join(json.dumps(dict(prompt=text), ensure_ascii=False) + "\n\n" for text in texts))
    assert [prompt.text for prompt in common.load_prompts(str(path), "train", "prompt", tokenizer, 8)] == texts


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


MODELS = {  # how it is made: (scripts, what is said)
    bert: ("remax ppo", "is not causal"),
    t5: ("remax", "no model could be loaded"),
    without_eos: ("remax reward_model", "EOS token"),
    with_nan: ("remax", "not finite"),
    truncated: ("remax reward_model", "no model could be loaded"),
    a_reward_model: ("remax reinforce", "is a reward model"),
    no_weights: ("remax", "no model could be loaded"),
    no_tokenizer: ("remax reward_model", "no tokenizer could be loaded"),
    broken_config: ("remax", "could be loaded"),
    few_tokens: ("remax reward_model", "tokens"),
}


@pytest.mark.parametrize("script, make", [(s, make) for make, (names, _) in MODELS.items() for s in names.split()])
def test_models_that_cannot_be_trained(tmp_path, capsys, tokenizer, script, make):
    (tmp_path / "m").mkdir()
    make(tmp_path / "m", common.load_tokenizer(str(POLICY)))
    found = run(script, [*SHORT, "--model", tmp_path / "m", "--output-dir", tmp_path / "r"])
    line = one_line(capsys)
    assert found["status"] == 2 and MODELS[make][1] in line and str(tmp_path / "m") in line, line
    assert not (tmp_path / "r").exists()


def test_a_reward_model_whose_tokenizer_has_more_tokens_than_it(tmp_path, capsys, tokenizer):
    config = transformers.GPT2Config(vocab_size=len(tokenizer) - 5, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    for script in ("remax", "ppo"):
        found = run(script, [*SHORT, "--reward-model", tmp_path / "rm", "--output-dir", tmp_path / "r"])
        assert found["status"] == 2 and f"{tmp_path / 'rm'}: " in one_line(capsys)


def test_a_model_that_sees_what_follows_is_no_policy(capsys):
    model = tiny_model("llama")

    def peek(module, inputs, output):
        output.last_hidden_state += output.last_hidden_state.mean(1, keepdim=True)

    model.model.register_forward_hook(peek)
    with pytest.raises(SystemExit):
        common.ResponseLogprobs(model)
    assert "LlamaForCausalLM is not causal" in one_line(capsys)


def test_flash_attention_without_its_package(tmp_path, capsys):
    found = run("remax", [*SHORT, "--attention", "flash_attention_2", "--output-dir", tmp_path / "r"])
    assert found["status"] == 2 and "no model could be loaded" in one_line(capsys)


# ---------------------------------------------------------------- Rewards

CODE = {  # body: (status, what is said)
    "raise ValueError('no such film')": (1, "raised ValueError: no such film"),
    "return [float('nan')] * len(responses)": (1, "returned nan for the response"),
    "return [1e300] * len(responses)": (1, "returned 1e+300 for the response"),
    "return [1.0]": (1, "returned 1 rewards for"),
    "return ['good'] * len(responses)": (1, "raised ValueError: could not convert"),
    "return [None] * len(responses)": (1, "raised TypeError"),
    "raise SystemExit(0)": (1, "raised SystemExit"),
}


@pytest.mark.parametrize("body", CODE)
@pytest.mark.parametrize("flag", ["--reward-function", "--gold-reward-function"])
def test_reward_functions_that_misbehave_in_training(tmp_path, capsys, body, flag):
    (tmp_path / "f.py").write_text(f"def reward(prompts, responses, **columns):\n    {body}\n")
    found = run("remax", [*SHORT, flag, f"{tmp_path}/f.py:reward", "--output-dir", tmp_path / "r"])
    status, wanted = CODE[body]
    line = one_line(capsys)
    assert found["status"] == status and f"{tmp_path}/f.py:reward {wanted}" in line


def test_a_reward_file_that_exits_when_it_is_imported(tmp_path, capsys):
    (tmp_path / "f.py").write_text("import sys\ndef reward(prompts, responses): ...\nsys.exit(0)\n")
    found = run("remax", [*SHORT, "--reward-function", f"{tmp_path}/f.py:reward", "--output-dir", tmp_path / "r"])
    assert found["status"] == 2 and "SystemExit" in one_line(capsys)


# ---------------------------------------------------------------- Folders


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name}


@pytest.mark.parametrize("name", ["policy/model.safetensors", "metrics.jsonl", "notes.txt"])
def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path, capsys, name):
    (tmp_path / "r" / name).parent.mkdir(parents=True)
    (tmp_path / "r" / name).write_text("precious")
    found = run("remax", [*SHORT, "--output-dir", tmp_path / "r"])
    assert found["status"] == 2 and f"--output-dir {tmp_path / 'r'} " in one_line(capsys)
    assert contents(tmp_path / "r") == {tmp_path / "r" / name: b"precious"}


def test_an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file", tmp_path / "file" / "r"):
        assert run("remax", [*SHORT, "--output-dir", output])["status"] == 2
        assert f"--output-dir {output}: " in one_line(capsys)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_folder_that_cannot_be_made_with_two_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script("remax.py", *SHORT, "--output-dir", tmp_path / "file" / "r", ranks=2)
    assert result.returncode != 0 and result.stderr.count(f"error: --output-dir {tmp_path / 'file' / 'r'}: ") == 1
    assert 'remax.py", line' not in result.stderr  # the launcher's traceback is the only one


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a") / "run"
    assert run("remax", [*SHORT, "--save-every", "1", "--output-dir", folder])["status"] == 0
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


@pytest.mark.parametrize(
    "spoil", [spoil_args, no_args, args_list, no_checkpoint, no_update, spoil_latest, spoil_checkpoint]
)
def test_runs_that_cannot_be_resumed(tmp_path, capsys, a_run, spoil):
    shutil.copytree(a_run, tmp_path / "r")
    spoil(tmp_path / "r")
    before = contents(tmp_path / "r")
    found = run("remax", ["--resume", tmp_path / "r"])
    assert found["status"] == 2 and f"--resume {tmp_path / 'r'}: " in one_line(capsys)
    assert contents(tmp_path / "r") == before


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "remax"])
def test_a_run_is_resumed_by_its_own_script_only(tmp_path, capsys, a_run, script):
    before = contents(a_run)
    found = run(script, ["--resume", a_run])
    assert found["status"] == 2 and "of another script" in one_line(capsys) and contents(a_run) == before


# ---------------------------------------------------------------- The broken files of the development data, whole runs

REFUSED = "blank_lines_only csv_named_jsonl empty json_array malformed_middle missing_prompt_column not_utf8".split()
REFUSED += ["null_values", "truncated_last_line", "wrong_types"]
REFUSED_PAIRS = [*REFUSED, "missing_rejected_one_row", "chosen_equals_rejected_all"]
NO_PROMPTS = "label_strings label_numeric_strings label_out_of_range one_class".split()
NO_PAIRS = [*NO_PROMPTS, "empty_prompts", "prompt_200k_chars", "special_tokens_in_text", "gsm8k_odd_answers"]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "bad").is_dir(), reason="needs the development data beside the project")
@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_on_the_broken_files_of_the_development_data(tmp_path, capsys, script):
    pairs, tried = script == "reward_model", 0
    model = ["--max-prompt-length", "8"] if pairs else ["--max-prompt-length", "8", "--response-length", "4"]
    for path in sorted((SHARED / "data" / "bad").glob("*.jsonl")):
        output = tmp_path / path.stem
        flags = ["--dataset", path, "--total-episodes", 4, "--batch-size", 2, "--eval-every", 0, *model]
        found = run(script, [*flags, "--eval-size", "1", "--output-dir", output])
        refused = path.stem in (REFUSED_PAIRS + NO_PAIRS if pairs else REFUSED + NO_PROMPTS)
        if refused or pairs and path.stem == "one_row":
            assert found["status"] == 2 and str(path) in one_line(capsys), path
            assert not output.exists()
        elif found["status"]:  # responses are longer than the tiny model's context: nothing is left, and it is said
            assert pairs and "too long, dropped" in one_line(capsys), path
        else:
            assert len(read_metrics(output)) == 2
        tried += 1
    assert tried == 27
