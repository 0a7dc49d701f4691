"""Reading data: formats, truncation, the forms of rows, ends of turns, held-out rows and the stream of batches."""

import collections
import copy
import csv
import dataclasses
import gzip
import json
import os
import shutil
import types

import pytest
import tokenizers
import torch
from conftest import EXAMPLE, example_tokenizer, number_tokenizer, run_here, start_backend
from tokenizers.processors import TemplateProcessing

import common
import dpo
import reward_model
import spr

PAIRS = common.Layout(answer_columns=["chosen", "rejected"])
DEMONSTRATIONS = common.Layout(answer_columns=["completion"])


def write(path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def load(path, tokenizer, max_length=64) -> list[common.Prompt]:
    return common.load_prompts(str(path), common.Layout(), tokenizer, max_length)


# ---------------------------------------------------------------- Files

ROWS = [dict(prompt="It was", label="a, b"), dict(prompt='They "said"', label="ü\u2028x")]


def test_all_formats_give_the_same_rows(tmp_path):
    import datasets

    files = dict(
        jsonl=write(tmp_path / "a.jsonl", *map(json.dumps, ROWS), "  "),
        json=write(tmp_path / "a.json", json.dumps(ROWS)),
        csv=write(tmp_path / "a.csv", "prompt,label", 'It was,"a, b"', '"They ""said""",ü\u2028x'),
        parquet=str(tmp_path / "a.parquet"),
    )
    datasets.Dataset.from_list(ROWS).to_parquet(files["parquet"])
    files["ndjson"] = write(tmp_path / "a.ndjson", *map(json.dumps, ROWS))
    files["tsv"] = write(tmp_path / "a.tsv", "prompt\tlabel", "It was\ta, b", '"They ""said"""\tü\u2028x')
    for kind in ("jsonl", "ndjson", "json", "csv", "tsv"):
        packed = tmp_path / f"b.{kind}.gz"
        packed.write_bytes(gzip.compress((tmp_path / f"a.{kind}").read_bytes()))
        files[packed.name] = str(packed)
    for path in files.values():
        assert [row for _, row in common.load_rows(path)] == ROWS


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.xlsx", "prompts.jsonl.zip"])
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path, capsys, name):
    (tmp_path / name).write_text("The plot\n")
    with pytest.raises(SystemExit):
        common.load_rows(str(tmp_path / name))
    assert f"{name}: not a .jsonl, .ndjson, .json, .csv, .tsv file" in capsys.readouterr().err


def test_images_that_cannot_be_decoded_do_no_harm_where_nobody_reads_them(tmp_path, tokenizer):
    import datasets

    image = dict(bytes=b"no image", path=None)
    rows = [
        dict(prompt="The plot", image=image, images=[image], more=dict(image=image), label=3, pdf=image, many=[image])
    ]
    kinds = dict(prompt=datasets.Value("string"), image=datasets.Image(), images=datasets.List(datasets.Image()))
    kinds |= dict(more=dict(image=datasets.Image()), label=datasets.Value("int64"), pdf=datasets.Pdf())
    kinds |= dict(many=datasets.LargeList(datasets.Image()))
    path = str(tmp_path / "p.parquet")
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(path)
    (prompt,) = load(path, tokenizer)
    assert prompt.text == "The plot" and prompt.columns["label"] == 3 and prompt.columns["image"] == image


def test_columns_of_mixed_types_are_what_the_file_says(tmp_path):
    """`datasets` keeps such columns as JSON, from files in a folder and in parquet files that it has written."""
    import datasets

    rows = [dict(prompt='Say "hi"\nnow', completion=" ok", tests=dict(f=1), was="was")]
    rows += [dict(prompt="b", completion=[dict(role="assistant", content="x")], tests=dict(g="x"), was=7)]
    path = write(tmp_path / "train.jsonl", *map(json.dumps, rows))
    assert [row for _, row in common.load_rows(path)] == rows
    assert [row for _, row in common.load_rows(str(tmp_path))] == rows
    path = str(tmp_path / "p.parquet")
    datasets.load_dataset(str(tmp_path), split="train").to_parquet(path)
    assert [row for _, row in common.load_rows(path)] == rows


def test_a_parquet_file_s_name_is_no_pattern_and_its_time_says_nothing(tmp_path):
    import datasets

    for folder, name, text in (
        ("a[1]", "b?.parquet", "right"),
        ("a1", "bb.parquet", "wrong"),
        ("a1", "b?.parquet", ""),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        datasets.Dataset.from_list([dict(prompt=text)]).to_parquet(tmp_path / folder / name)
    path = tmp_path / "a[1]" / "b?.parquet"
    for text in ("right", "new"):
        os.utime(path, (1e9, 1e9))
        assert common.load_rows(str(path)) == [(f"{path}: row 1", dict(prompt=text))]
        datasets.Dataset.from_list([dict(prompt="new")]).to_parquet(path)


def test_a_folder_s_files_are_read_as_if_they_were_named(tmp_path, capsys):
    """`datasets` would make a time of the date and 7 of 007, and keep what it has read of a file of the same time."""
    files = {
        "train-1.jsonl": '{"prompt": "a", "answer": "2012-03-04"}\n',
        "train-2.jsonl": '{"prompt": "b", "answer": 1}\n',
        "test.json": '{"prompt": "c"}\n{"prompt": "d"}\n',  # JSON lines by another name
        "more.jsonl": "no JSON",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = str(tmp_path)
    expected = [dict(prompt="a", answer="2012-03-04"), dict(prompt="b", answer=1)]
    assert [row for _, row in common.load_rows(path)] == expected
    assert "split 'train': train-1.jsonl, train-2.jsonl\n" in capsys.readouterr().out
    assert [row for _, row in common.load_rows(path, split="test")] == [dict(prompt="c"), dict(prompt="d")]
    (tmp_path / "train-2.jsonl").write_text('{"prompt": "b"\n')
    with pytest.raises(SystemExit):
        common.load_rows(path)
    assert "train-2.jsonl:1: no valid JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        common.load_rows(path, split="validation")
    assert "validation" in capsys.readouterr().err


def test_splits_of_a_folder_may_be_cut_and_joined_and_files_may_be_empty(tmp_path):
    texts = {"train-0": ["a", "b"], "train-1": [], "test": ["c"]}
    for name, prompts in texts.items():
        write(tmp_path / f"{name}.jsonl", *(json.dumps(dict(prompt=text)) for text in prompts))
    for split, expected in {"train": "ab", "train[:1]": "a", "train[50%:]+test": "bc", "test": "c"}.items():
        assert "".join(row["prompt"] for _, row in common.load_rows(str(tmp_path), split=split)) == expected


def test_a_folder_that_says_how_it_is_read_is_refused(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("a,3\nb,4")
    settings = "---\nconfigs:\n- config_name: default\n  data_files: x.csv\n  column_names: [prompt, answer]\n---\n"
    (tmp_path / "README.md").write_text(settings)
    with pytest.raises(SystemExit):
        common.load_rows(str(tmp_path))
    assert "its README.md sets names, column_names, which is not read" in capsys.readouterr().err


@pytest.mark.parametrize("name, comma", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_folder_of_csv_files_keeps_its_zeros(tmp_path, name, comma):
    (tmp_path / name).write_text(f"prompt{comma}answer\nc{comma}007\n")
    assert common.load_rows(str(tmp_path)) == [(f"{tmp_path}/{name}:2", dict(prompt="c", answer="007"))]


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path, capsys):
    (tmp_path / "a[1]").mkdir()
    with pytest.raises(SystemExit):
        common.load_rows(str(tmp_path / "a[1]"))
    assert "takes * ? [ in a folder's name for a pattern" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_mark_and_windows_line_ends(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ending.join(map(json.dumps, ROWS)).encode())
    assert [where for where, _ in common.load_rows(str(path))] == [f"{path}:1", f"{path}:2"]


def test_sound_files_that_look_odd_are_read_whole(tmp_path, tokenizer):
    texts = ["a\u2028b", "a\x85b", "a\x0bb", "<|endoftext|>", "🎬", " x "]  # Unicode's line breaks end no line of jsonl
    path = tmp_path / "p.JSONL"
    path.write_text("".join(json.dumps(dict(prompt=text), ensure_ascii=False) + "\n\n" for text in texts))
    assert [prompt.text for prompt in load(path, tokenizer)] == texts


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_values_are_what_the_file_says(tmp_path, tokenizer, suffix):
    """A text that looks like a date stays a text, a whole number a whole number, an object without a key without it."""
    rows = [dict(prompt="2020-01-01 10:00:00", day="2020-01-01", n=1, more=dict(a=1))]
    rows += [dict(prompt="2020-01-02 10:00:00", day="2020-01-02", n=2.5, more=dict(b=[2, "x"]))]
    lines = [json.dumps(rows)] if suffix == "json" else map(json.dumps, rows)
    prompts = load(write(tmp_path / f"p.{suffix}", *lines), tokenizer)
    assert [dict(prompt=prompt.text) | prompt.columns for prompt in prompts] == rows
    assert isinstance(prompts[0].columns["n"], int)


def test_a_csv_column_without_a_name_is_just_a_column(tmp_path, tokenizer):
    """As exported with its index: it holds no demonstrations."""
    (tmp_path / "p.csv").write_text(",prompt\n0,The plot\n1,The cast\n")
    prompts = load(tmp_path / "p.csv", tokenizer)
    assert [prompt.text for prompt in prompts] == ["The plot", "The cast"] and prompts[0].demonstration is None
    assert prompts[1].columns == {"": "1"}


# ---------------------------------------------------------------- Prompts


def test_prompts_are_cut_on_the_left_and_empty_ones_dropped_and_counted(tmp_path, capsys, tokenizer):
    long = "The acting in this film was a joy and the rest was a mess"
    path = write(tmp_path / "a.jsonl", *(json.dumps(dict(prompt=p)) for p in ("", long, " \n", "The plot")))
    prompts = load(path, tokenizer, 5)
    assert [p.text for p in prompts] == [long, "The plot"]  # rewards see the whole text
    assert prompts[0].ids == tokenizer(long)["input_ids"][-5:]
    assert [p.where for p in prompts] == [f"{path}:2", f"{path}:4"]
    out = capsys.readouterr().out
    assert "prompts: 2 (2 texts; 2 with an empty prompt, dropped; 1 longer than --max-prompt-length 5, without" in out


def test_a_bos_stays_in_front_when_a_prompt_is_cut():
    assert common.cut_left([9, 1, 2, 3, 4], 3, bos_id=9) == [9, 3, 4]
    assert common.cut_left([9, 1, 2, 3, 4], 3, bos_id=None) == [2, 3, 4]
    assert common.cut_left([9, 1, 2, 3, 4], 1, bos_id=9) == [4]
    assert common.cut_left([9, 1], 3, bos_id=9) == [9, 1]


@dataclasses.dataclass
class Additions:
    """What a tokenizer adds around a text, as ids of the example's two special tokens."""

    front: list[int]
    end: list[int]

    def tokenizer(self):
        tokenizer = example_tokenizer()
        names = {0: "<|endoftext|>", 1: "<|pad|>"}
        form = [names[token] for token in self.front] + ["$A"] + [names[token] for token in self.end]
        ids = [(name, token) for token, name in names.items()]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=" ".join(form), special_tokens=ids)
        if self.front:
            tokenizer.bos_token = names[self.front[0]]
        return tokenizer


ADDITIONS = {
    "nothing": Additions([], []),
    "EOS": Additions([], [0]),
    "SEP": Additions([], [1]),
    "SEP and EOS": Additions([], [1, 0]),
    "BOS = EOS in front": Additions([0], []),
    "BOS = EOS on both sides": Additions([0], [0]),
    "CLS ... SEP": Additions([1], [0]),
}
PAIR = dict(prompt="The plot of the film", chosen=" was good.", rejected=" was bad.", completion=" was good.")


@pytest.mark.parametrize("name", ADDITIONS)
def test_prompts_end_where_they_end(tmp_path, name):
    """Whatever the tokenizer adds at the end of a text; what it adds in front stays. All scripts agree."""
    tokenizer, front = ADDITIONS[name].tokenizer(), ADDITIONS[name].front
    plain = example_tokenizer()
    prompt, chosen = (plain(PAIR[column])["input_ids"] for column in ("prompt", "chosen"))
    assert tokenizer(PAIR["prompt"])["input_ids"] == front + prompt + ADDITIONS[name].end
    path = write(tmp_path / "p.jsonl", json.dumps(PAIR))
    (policy_prompt,) = load(path, tokenizer)
    (pair,) = dpo.load_pairs(path, PAIRS, tokenizer, 64, 48)
    (scored,) = reward_model.load_pairs(path, PAIRS, tokenizer, 64, 128)
    demonstrated = common.load_prompts(path, DEMONSTRATIONS, tokenizer, 64)
    (demonstrated,) = spr.with_demonstrations(path, demonstrated, "completion", tokenizer, 48)
    assert policy_prompt.ids == pair.prompt.ids == demonstrated.ids == scored.prompt.ids == front + prompt
    assert pair.ids[0] == demonstrated.demonstration == chosen + [0]
    assert scored.ids[0] == front + plain(PAIR["prompt"] + PAIR["chosen"])["input_ids"] + [0]
    assert common.reward_model_ids(tokenizer, policy_prompt, PAIR["chosen"], 128) == scored.ids[0]


def test_special_tokens_at_the_end_of_the_text_itself_stay(tmp_path):
    for text, expected in (("The plot<|endoftext|>", [0]), ("The plot<|pad|><|endoftext|>", [1, 0])):
        (prompt,) = load(write(tmp_path / "p.jsonl", json.dumps(dict(prompt=text))), ADDITIONS["EOS"].tokenizer())
        assert prompt.ids == example_tokenizer()("The plot")["input_ids"] + expected


def test_a_bos_stays_in_front_in_every_caller(tmp_path):
    tokenizer = ADDITIONS["BOS = EOS on both sides"].tokenizer()
    path = write(tmp_path / "p.jsonl", json.dumps(PAIR))
    plain = example_tokenizer()
    whole = plain(PAIR["prompt"] + PAIR["chosen"])["input_ids"]
    size = len(plain(PAIR["prompt"])["input_ids"])
    kept = [0, *whole[size - 2 : size]]
    (prompt,) = load(path, tokenizer, max_length=3)
    (pair,) = dpo.load_pairs(path, PAIRS, tokenizer, 3, 48)
    (scored,) = reward_model.load_pairs(path, PAIRS, tokenizer, 3, 128)
    assert prompt.ids == pair.prompt.ids == kept and prompt.num_cut == size + 1 - 3
    assert scored.ids[0] == [0, *whole[size - 2 :], 0]
    assert common.reward_model_ids(tokenizer, prompt, PAIR["chosen"], len(whole)) == [0, *whole[2:], 0]


def test_a_text_gets_one_bos_at_the_most():
    tokenizer = example_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    ids = tokenizer("<|pad|><|pad|>The plot")["input_ids"]
    assert ids[0] == ids[1] == tokenizer.bos_token_id
    assert common.encode(tokenizer, "<|pad|><|pad|>The plot") == ids[1:]
    assert common.encode(tokenizer, "<|pad|>The plot") == ids[1:]


def test_chat_messages_go_through_the_template_without_a_second_bos(tmp_path):
    tokenizer = example_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
    messages = [dict(role="system", content="Be brief"), dict(role="user", content="Hi")]
    (prompt,) = load(write(tmp_path / "a.jsonl", json.dumps(dict(prompt=messages, label=3))), tokenizer)
    assert prompt.text == "<|endoftext|>system: Be brief\n<|endoftext|>user: Hi\nbot:"
    assert prompt.ids.count(tokenizer.eos_token_id) == 2 and (prompt.columns, prompt.messages) == (
        dict(label=3),
        messages,
    )


# ---------------------------------------------------------------- Forms of rows


def user(text) -> dict:
    return dict(role="user", content=text)


def bot(text) -> dict:
    return dict(role="assistant", content=text)


SYSTEM, ASK, GOOD, BAD = dict(role="system", content="Be brief"), user("Was it good?"), bot("Yes."), bot("No.")
TALK = [SYSTEM, user("Hi"), bot("Hello."), ASK]  # before the answer
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Was it good?\n\nAssistant:"


@dataclasses.dataclass
class Form:
    """A row of a preference file, the row that says the same plainly, and what the data's line says of it."""

    row: dict
    plain: dict
    said: str
    prompt_column: str = "prompt"


PLAIN_CHAT = dict(prompt=TALK, chosen="Yes.", rejected="No.")
SHORT_CHAT = dict(prompt=[ASK], chosen="Yes.", rejected="No.")
PLAIN_TEXT = dict(prompt=DIALOGUE, chosen=" It was good.", rejected=" I hated it.")
FORMS = {
    "texts": Form(PLAIN_TEXT, PLAIN_TEXT, "(1 texts)"),
    "HH": Form(
        dict(chosen=DIALOGUE + " It was good.", rejected=DIALOGUE + " I hated it."),
        PLAIN_TEXT,
        "(1 texts; the prompt is what chosen and rejected share)",
    ),
    "HH with a common beginning of a word": Form(
        dict(chosen="Q: Why?\nA: It isn't", rejected="Q: Why?\nA: It is"),
        dict(prompt="Q: Why?\nA: It", chosen=" isn't", rejected=" is"),
        "(1 texts; the prompt is what chosen and rejected share)",
    ),
    "HH with an answer that begins the other": Form(
        dict(chosen=DIALOGUE + " It was", rejected=DIALOGUE + " It was good."),
        dict(prompt=DIALOGUE + " It", chosen=" was", rejected=" was good."),
        "(1 texts; the prompt is what chosen and rejected share)",
    ),
    "one more column": Form(PLAIN_TEXT | dict(question=ASK), PLAIN_TEXT, "(1 texts)"),
    "an answer alone as messages": Form(PLAIN_TEXT | dict(chosen=[bot(" It was good.")]), PLAIN_TEXT, "(1 texts)"),
    "UltraFeedback": Form(
        dict(prompt=ASK["content"], chosen=[ASK, GOOD], rejected=[ASK, BAD]),
        SHORT_CHAT,
        "(1 conversations; 'prompt' is a user's message of each)",
    ),
    "UltraFeedback, several turns": Form(
        dict(prompt="Hi", chosen=[*TALK, GOOD], rejected=[*TALK, BAD]),
        PLAIN_CHAT,
        "(1 conversations; 'prompt' is a user's message of each)",
    ),
    "a text beside a conversation and an answer alone": Form(
        dict(prompt=ASK["content"], chosen=[ASK, GOOD], rejected=[BAD]),
        SHORT_CHAT,
        "(1 conversations; 'prompt' is a user's message of each)",
    ),
    "messages": Form(dict(prompt=TALK, chosen=[GOOD], rejected=[BAD]), PLAIN_CHAT, "(1 conversations)"),
    "messages and texts": Form(dict(prompt=TALK, chosen=[GOOD], rejected="No."), PLAIN_CHAT, "(1 conversations)"),
    "whole conversations": Form(
        dict(prompt=TALK, chosen=[*TALK, GOOD], rejected=[*TALK, BAD]), PLAIN_CHAT, "(1 conversations)"
    ),
    "conversations alone": Form(
        dict(chosen=[*TALK, GOOD], rejected=[*TALK, BAD]),
        PLAIN_CHAT,
        "(1 conversations; the prompt is what chosen and rejected share)",
    ),
    "conversations under another flag": Form(
        dict(prompt="x", chosen=[*TALK, GOOD], rejected=[*TALK, BAD]),
        PLAIN_CHAT,
        "(1 conversations; their last messages are the answers)",
        prompt_column="chosen",
    ),
    "messages as texts of JSON": Form(
        {name: json.dumps(value) for name, value in dict(prompt=TALK, chosen=[GOOD], rejected=[*TALK, BAD]).items()},
        PLAIN_CHAT,
        "(1 conversations)",
    ),
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chat_tokenizer(template=CHATML, *tokens):
    tokenizer = example_tokenizer()
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<|im_start|>", "<|im_end|>", *tokens]))
    tokenizer.num_embeddings = len(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def as_both(path, row, prompt_column="prompt") -> list[tuple]:
    """What dpo.py and reward_model.py read."""
    write(path, json.dumps(row))
    layout = dataclasses.replace(PAIRS, prompt_column=prompt_column)
    tokenizer = chat_tokenizer()
    (pair,) = dpo.load_pairs(str(path), layout, tokenizer, 200, 48)
    (scored,) = reward_model.load_pairs(str(path), layout, tokenizer, 200, 400)
    prompts = [pair.prompt, scored.prompt]
    return [(prompt.text, prompt.ids, prompt.messages) for prompt in prompts] + [pair.ids, scored.ids, pair.responses]


@pytest.mark.parametrize("name", FORMS)
def test_pairs_of_every_form_are_read_as_the_plain_row_is(tmp_path, capsys, name):
    form = FORMS[name]
    found = as_both(tmp_path / "form.jsonl", form.row, form.prompt_column)
    assert f"form.jsonl, prompts: 1 {form.said}\n" in capsys.readouterr().out
    assert found == as_both(tmp_path / "plain.jsonl", form.plain)
    assert found[0][0].startswith(("<|im_start|>", "\n\nHuman", "Q: "))
    assert found[4] == (form.plain["chosen"], form.plain["rejected"])


def test_a_file_of_several_forms_says_how_many_there_are_of_each(tmp_path, capsys):
    rows = [FORMS[name].row for name in ("texts", "messages", "texts")]
    rows += [dict(prompt="It", chosen="It is", rejected="No")]
    path = write(tmp_path / "p.jsonl", *map(json.dumps, rows))
    dpo.load_pairs(path, PAIRS, chat_tokenizer(), 200, 48)
    said = "prompts: 4 (3 texts; 1 conversations; 1 answers repeat their prompt, which is then read twice)"
    assert said in capsys.readouterr().out


WRONG_ROWS = {  # what is said: the row
    "'chosen' ends with a message of the user": dict(prompt=[ASK], chosen=[ASK, GOOD, user("Bye")], rejected="No."),
    "the messages of 'rejected' before its answer are not": dict(prompt=[ASK], chosen=[GOOD], rejected=[SYSTEM, BAD]),
    "the messages of 'chosen' before its answer are not": dict(prompt=TALK, chosen=[ASK, GOOD], rejected=[BAD]),
    "'prompt' is no message of the user in the conversations of chosen": dict(
        prompt="Hi", chosen=[ASK, GOOD], rejected=[ASK, BAD]
    ),
    "the messages of 'rejected' before": dict(chosen=[*TALK, GOOD], rejected=[ASK, BAD]),
    "'rejected' ends with a message of the user": dict(chosen=[ASK, GOOD], rejected=[ASK, user("No.")]),
    "chosen and rejected share no": dict(chosen="Yes.", rejected=[BAD]),
    "no column 'prompt', and chosen and rejected share no beginning": dict(q="x", chosen=" Yes.", rejected=" No."),
    "no column 'rejected'; there are: prompt, chosen": dict(prompt="x", chosen="y"),
    "'rejected' is None": dict(prompt="x", chosen="y", rejected=None),
    "'prompt' has the role 'model'": dict(prompt=[ASK, dict(role="model", content="Yes.")], chosen="y", rejected="z"),
    "'prompt' holds chat messages, but not as JSON": dict(prompt=str([ASK]), chosen="y", rejected="z"),
    "'chosen' holds chat messages, but not as JSON": dict(prompt=[ASK], chosen=json.dumps([GOOD])[:-5], rejected="z"),
    "'prompt' holds a chat as JSON: ": dict(prompt='[{"from": "human", "value": "Hi"}]', chosen="y", rejected="z"),
    "'prompt' holds a chat as JSON": dict(prompt=json.dumps(dict(messages=[ASK])), chosen="y", rejected="z"),
    "'chosen' holds a chat as JSON": dict(prompt=[ASK], chosen=json.dumps(GOOD), rejected="z"),
    "the answer in 'chosen' has 'tool_calls'": dict(prompt=[ASK], chosen=[GOOD | dict(tool_calls=[1])], rejected=[BAD]),
    "the answer in 'rejected' has 'reasoning_content'": dict(
        prompt=[ASK], chosen=[GOOD], rejected=[BAD | dict(reasoning_content="Hm")]
    ),
}


@pytest.mark.parametrize("message", WRONG_ROWS)
def test_rows_that_are_no_form_are_refused_by_file_and_line(tmp_path, capsys, message):
    rows = [dict(chosen=[ASK, GOOD], rejected=[ASK, BAD]), WRONG_ROWS[message]]
    if "prompt" in rows[1]:
        rows[0]["prompt"] = [ASK]
    path = write(tmp_path / "p.jsonl", *map(json.dumps, rows))
    with pytest.raises(SystemExit) as error:
        reward_model.load_pairs(path, PAIRS, chat_tokenizer(), 200, 400)
    err = capsys.readouterr().err
    assert error.value.code == 2 and f"{path}:2: " in err and message in err


def test_a_prompt_column_that_the_user_names_must_be_there(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", json.dumps(FORMS["HH"].row))
    with pytest.raises(SystemExit):
        dpo.load_pairs(path, dataclasses.replace(PAIRS, prompt_column="question"), chat_tokenizer(), 200, 48)
    assert "p.jsonl:1: no column 'question'; there are: chosen, rejected" in capsys.readouterr().err


def test_texts_that_only_look_like_messages_stay_texts(tmp_path, tokenizer):
    texts = ["[1, 2] is a list", "[]", "[[1]]", '[{"a": 1}]', "[The plot]", "[" * 100_000]
    texts += ['{"from": "USD", "to": "EUR", "value": 100}', '{"role": "engineer", "content": "x"}', '{"messages": [1]}']
    path = write(tmp_path / "p.jsonl", *(json.dumps(dict(prompt=text)) for text in texts))
    assert [prompt.text for prompt in load(path, tokenizer)] == texts


def test_messages_of_a_csv_are_messages(tmp_path):
    path = tmp_path / "p.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "label"], [json.dumps(TALK), "3"]])
    (prompt,) = load(path, chat_tokenizer())
    assert prompt.messages == TALK and prompt.columns == dict(label="3")


def test_an_empty_answer_in_hh_s_form_is_dropped(tmp_path, capsys, tokenizer):
    rows = [dict(chosen=DIALOGUE, rejected=DIALOGUE + " I hated it."), dict(chosen="Q: a\nA: b", rejected="Q: a\nA: c")]
    rows.append(dict(chosen="Q: a\nA: Two ideas:", rejected="Q: a\nA: Two ideas:\n1. b"))  # no speaker
    path = write(tmp_path / "p.jsonl", *map(json.dumps, rows))
    layout = common.Layout(answer_columns=("chosen", "rejected"))
    prompt, another = common.load_prompts(path, layout, tokenizer, 200)
    assert (prompt.text, prompt.answers) == ("Q: a\nA:", dict(chosen=" b", rejected=" c"))
    assert another.answers == dict(chosen=" ideas:", rejected=" ideas:\n1. b")
    assert "1 without an answer, dropped" in capsys.readouterr().out


def test_a_chat_without_a_word_is_dropped(tmp_path, capsys):
    rows = [dict(prompt=[dict(role="user", content=" ")]), dict(prompt=TALK)]
    path = write(tmp_path / "p.jsonl", *map(json.dumps, rows))
    assert [prompt.messages for prompt in load(path, chat_tokenizer())] == [TALK]
    assert "1 with an empty prompt, dropped" in capsys.readouterr().out


# ---------------------------------------------------------------- Demonstrations


def demonstrations(path, *rows, column="completion", prompt_column="prompt", tokenizer=None) -> list[common.Prompt]:
    write(path, *map(json.dumps, rows))
    tokenizer = tokenizer or chat_tokenizer()
    layout = common.Layout(prompt_column=prompt_column, answer_columns=[column])
    prompts = common.load_prompts(str(path), layout, tokenizer, 200)
    return spr.with_demonstrations(str(path), prompts, column, tokenizer, 48)


def test_demonstrations_are_looked_for_in_every_row(tmp_path, capsys, tokenizer):
    rows = [dict(prompt="The plot"), dict(prompt="The cast", completion=" was good.")]
    rows += [dict(prompt="A", completion=None), dict(prompt="B", completion=""), dict(prompt="C", completion=" bad")]
    found = demonstrations(tmp_path / "p.jsonl", *rows)
    assert [prompt.text for prompt in found] == ["The cast", "C"]
    assert found[0].demonstration == tokenizer(" was good.")["input_ids"] + [0]
    said = "prompts: 2 (5 texts; 3 without an answer, dropped)"
    assert said in capsys.readouterr().out


def test_a_completion_column_that_no_row_has_is_refused_if_the_user_names_it(tmp_path, capsys):
    data = write(tmp_path / "p.jsonl", *[json.dumps(dict(prompt=f"The plot {i}", completion="x")) for i in range(8)])
    flags = ["--dataset", data, "--reward-model", EXAMPLE / "reward_model", "--completion-column", "completions"]
    assert run_here("spr", *flags, "--output-dir", tmp_path / "r") == 2
    assert "p.jsonl: no row has a demonstration in the column 'completions'" in capsys.readouterr().err


def test_the_last_answer_of_messages_is_a_demonstration(tmp_path, capsys):
    rows = [dict(messages=[*TALK, GOOD]), dict(messages=TALK), dict(messages=[ASK, BAD])]
    found = demonstrations(tmp_path / "p.jsonl", *rows, column="messages", prompt_column="messages")
    said = "2 conversations; their last messages are the answers; 1 conversations; 1 without an answer"
    assert said in capsys.readouterr().out
    plain = [dict(prompt=TALK, completion="Yes."), dict(prompt=[ASK], completion="No.")]
    expected = demonstrations(tmp_path / "plain.jsonl", *plain)
    assert [(p.text, p.ids, p.demonstration) for p in found] == [(p.text, p.ids, p.demonstration) for p in expected]
    with pytest.raises(SystemExit):
        demonstrations(tmp_path / "p.jsonl", dict(text="x"), column="text", prompt_column="text")
    assert "p.jsonl:1: 'text' is a text; a column that holds prompt and answer" in capsys.readouterr().err


GEMMA = "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
GEMMA += "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
GEMMA += "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
LLAMA_2 = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
LLAMA_2 += "<|endoftext|>{% endif %}{% endfor %}"
LLAMA_3 = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
LLAMA_3 += "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>\n\n{% endif %}"
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
BARE += "{% if add_generation_prompt %}assistant:{% endif %}"


@dataclasses.dataclass
class Ending:
    """A chat template, the policy's EOS tokens, and where the assistant's turn ends."""

    template: str
    eos: list[str]
    end: str


ENDINGS = {
    "Gemma": Ending(GEMMA, ["<|endoftext|>", "<|im_end|>"], "<|im_end|>"),
    "ChatML": Ending(CHATML, ["<|im_end|>"], "<|im_end|>"),
    "ChatML on a base model": Ending(CHATML, ["<|endoftext|>"], "<|im_end|>\n<|endoftext|>"),
    "Llama 2": Ending(LLAMA_2, ["<|endoftext|>"], " <|endoftext|>"),
    "Llama 3": Ending(LLAMA_3, ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "no end": Ending(BARE, ["<|endoftext|>"], "\n<|endoftext|>"),
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("answer", ["Yes.", "The plot was\n\ngood.", " Yes. "])
def test_a_turn_ends_as_the_template_ends_it(tmp_path, capsys, name, answer):
    ending = ENDINGS[name]
    tokenizer = chat_tokenizer(ending.template, "<|im_sep|>")
    eos_ids = tokenizer.convert_tokens_to_ids(ending.eos)
    tokenizer.eos_ids = eos_ids
    row = dict(prompt=[user("Hi")], completion=answer, chosen=answer, rejected=[bot("No.")])
    path = write(tmp_path / "p.jsonl", json.dumps(row))
    prompts = common.load_prompts(path, DEMONSTRATIONS, tokenizer, 200)
    (prompt,) = spr.with_demonstrations(path, prompts, "completion", tokenizer, 48)
    (pair,) = dpo.load_pairs(path, PAIRS, tokenizer, 200, 48)
    assert pair.ids[0] == prompt.demonstration and "since the chat template" not in capsys.readouterr().out

    ids = tokenizer.apply_chat_template([user("Hi"), bot(answer)], return_dict=False)
    ends = [i for i in range(len(prompt.ids), len(ids)) if ids[i] in eos_ids]
    expected = ids[: ends[0] + 1] if ends else [*ids, tokenizer.eos_token_id]
    assert prompt.ids + prompt.demonstration == expected
    assert tokenizer.decode(prompt.demonstration).endswith(ending.end)


THINKING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
THINKING += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENED = CHATML.replace("assistant\n{%", "assistant\n<think>{%")


TURN_END = "<|im_end|>\n<|endoftext|>"
REWRITTEN = {  # the template: the texts of the demonstrations
    THINKING: ["<think>Hm</think>Yes.<|endoftext|>", "Yes." + TURN_END],
    OPENED: ["Hm</think>Yes." + TURN_END, "Yes.<|endoftext|>"],
    CHATML: ["<think>Hm</think>Yes." + TURN_END, "Yes." + TURN_END],
}


@pytest.mark.parametrize("template", REWRITTEN)
def test_an_answer_that_the_template_would_rewrite_is_read_as_it_is(tmp_path, capsys, template):
    """As templates of reasoning models do: they drop the thoughts, or begin them in the prompt."""
    rows = [dict(prompt=[user("Hi")], completion=text) for text in ("<think>Hm</think>Yes.", "Yes.")]
    tokenizer = chat_tokenizer(template)
    found = demonstrations(tmp_path / "p.jsonl", *rows, tokenizer=tokenizer)
    assert [tokenizer.decode(prompt.demonstration) for prompt in found] == REWRITTEN[template]
    said = "1 of 'completion' are read as they are and end with <|endoftext|>, since the chat template would change"
    assert (said in capsys.readouterr().out) == (template != CHATML)


def test_an_eos_that_a_template_writes_before_an_answer_does_not_end_it(tmp_path, capsys):
    template = "{% for m in messages %}<{{ m.role }}><|endoftext|>{{ m.content }}<|endoftext|>{% endfor %}"
    tokenizer = chat_tokenizer(template)
    row = dict(prompt=[user("Hi")], completion="Yes.")
    (prompt,) = demonstrations(tmp_path / "p.jsonl", row, tokenizer=tokenizer)
    assert tokenizer.decode(prompt.demonstration) == "Yes.<|endoftext|>"
    assert "1 of 'completion' are read as they are" in capsys.readouterr().out


def test_the_ids_that_end_a_response_are_the_policy_s(tmp_path):
    model = common.transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy")
    tokenizer = example_tokenizer()
    for ids in (5, [5, 7], None):
        model.generation_config.eos_token_id = ids
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded = common.load_tokenizer(str(tmp_path))
        policy = common.load_policy(str(tmp_path), loaded, common.Sampling(8, 8, 1.0, 8), start_backend())
        assert policy.eos_ids == ([0] if ids is None else sorted([0, *(ids if isinstance(ids, list) else [ids])]))
    (tmp_path / "generation_config.json").unlink()  # then the model's config is asked
    assert common.load_tokenizer(str(tmp_path)).eos_ids == [0]


# ---------------------------------------------------------------- Special tokens


@pytest.mark.parametrize("text", ["<think>Hm</think> Yes.", " <think>", "It was<tool> good"])
def test_special_tokens_are_seen_and_what_is_decoded_encodes_to_itself(text):
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<think>", "</think>", "<tool>"]))
    tokenizer.num_embeddings = len(tokenizer)
    policy = types.SimpleNamespace(tokenizer=tokenizer, eos_ids=[0, 9], device=torch.device("cpu"))
    ids = tokenizer(text)["input_ids"]
    prompt = common.Prompt("The plot", [5], {})
    for end in ([0], [9], [], [1, 1, 0]):
        (found,) = common.as_responses(policy, [prompt], [ids + end]).texts
        assert found == text
    assert common.encode_response(tokenizer, text) == ids + [0]


def test_decoding_leaves_the_spaces_before_signs():
    """Some tokenizers of words ask for "great?" where the text has "great ?", which they do not know again."""
    words = ["</s>", "<unk>", "a", "was", "great", "?", "I", "'m"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = common.transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.num_embeddings = len(words)
    tokenizer.eos_ids = [0]
    assert common.decode(tokenizer, [[3, 4, 5, 6, 7, 0]], [0]) == [" was great ? I 'm"]
    assert common.encode_response(tokenizer, " was great ? I 'm") == [3, 4, 5, 6, 7, 0]


# ---------------------------------------------------------------- Held-out rows and batches


@dataclasses.dataclass(frozen=True)
class Row:
    number: int
    digest: str

    @property
    def text(self) -> str:
        return f"{self.number} {self.digest}"


def rows_with(digests: str) -> list[Row]:
    return [Row(number, digest) for number, digest in enumerate(digests)]


def test_rows_are_held_out_where_no_evaluation_data_is_given(capsys):
    a, b = rows_with("9371fc"), rows_with("052")
    files = dict(a=a, b=b, one=rows_with("3"), same=rows_with("33"), high=rows_with("9c"), low=rows_with("120"))
    assert common.train_and_held_out(files.get, "a", "b", 2) == (a, b[:2])
    assert "note" not in capsys.readouterr().out
    assert common.train_and_held_out(files.get, "low", "b", 3) == (files["low"], b)
    assert "note: 2 of the first 3 are in the data that is trained on, too" in capsys.readouterr().out
    assert common.train_and_held_out(files.get, "a", None, 2) == ([a[0], a[2], a[4], a[5]], [a[3], a[1]])
    assert common.train_and_held_out(files.get, "a", None, 64) == ([a[0], a[4], a[5]], [a[3], a[1], a[2]])
    assert common.train_and_held_out(files.get, "low", None, 2) == (
        [files["low"][1]],
        [files["low"][2], files["low"][0]],
    )
    assert common.train_and_held_out(files.get, "a", "b", 0) == (a, [])
    for name in ("one", "same", "high", "low"):  # one side would be empty
        with pytest.raises(SystemExit) as error:
            common.train_and_held_out(files.get, name, None, 3)
        assert error.value.code == 2 and f"{name}: too few rows to hold some out" in capsys.readouterr().err


@pytest.mark.parametrize("size", [3, 30])
def test_appended_rows_never_turn_a_trained_row_into_a_held_out_one(tmp_path, tokenizer, size):
    lines = [json.dumps(dict(prompt=f"The plot {number}", number=number)) for number in range(80)]
    path = tmp_path / "p.jsonl"
    trained = set()
    for length in (24, 25, 40, 80):
        write(path, *lines[:length], *lines[:12])  # some rows are there twice
        train, held_out = common.train_and_held_out(lambda path: load(path, tokenizer), str(path), None, size)
        assert 0 < len(held_out) <= size
        numbers = {prompt.columns["number"] for prompt in held_out}
        assert not numbers & trained
        trained |= {prompt.columns["number"] for prompt in train}
        assert not numbers & trained and len(numbers | trained) == length
    write(path, *reversed(lines), *lines[:12])  # nor does the order count
    again = common.train_and_held_out(lambda path: load(path, tokenizer), str(path), None, size)[1]
    assert [prompt.text for prompt in again] == [prompt.text for prompt in held_out]


@pytest.mark.parametrize("size", [1, 3, 10])
def test_the_stream_of_indices_shuffles_every_epoch_and_may_be_entered_anywhere(size):
    stream = common.shuffled_indices(size, 7, 0, 40 * size)
    assert collections.Counter(stream) == {i: 40 for i in range(size)}
    assert all(sorted(stream[e * size : (e + 1) * size]) == list(range(size)) for e in range(40))
    assert stream[13:29] == common.shuffled_indices(size, 7, 13, 16)
    assert size < 10 or len({tuple(stream[e * size : (e + 1) * size]) for e in range(40)}) == 40
    assert size < 10 or stream != common.shuffled_indices(size, 8, 0, 40 * size)


def test_batches_follow_one_another_in_the_stream(monkeypatch):
    start_backend()
    items, stream = list("abcde"), common.shuffled_indices(5, 3, 0, 24)
    batches = [common.shuffled_batch(items, 3, update, 4) for update in range(1, 7)]
    assert [item for batch in batches for item in batch] == [items[i] for i in stream]
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(common.dist, "get_rank", lambda rank=rank: rank)
        shares.append([common.shuffled_batch(items, 3, update, 4) for update in range(1, 7)])
    for whole, *parts in zip(batches, *shares):  # the ranks share the same batch
        assert sorted(parts[0] + parts[1]) == sorted(whole) and len(parts[0]) == len(parts[1]) == 2


def test_updates_are_whole_ones(capsys):
    assert common.plan_updates(100, 8, 2) == (4, 12)
    for arguments, message in (
        ((100, 9, 2), "--batch-size 9 is not divisible by"),
        ((7, 8, 2), "--total-episodes 7 is less than one update of --batch-size 8"),
    ):
        with pytest.raises(SystemExit) as error:
            common.plan_updates(*arguments)
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_an_answer_that_goes_on_after_an_eos_is_cut_and_told(tmp_path, capsys):
    eos = "<|endoftext|>"
    rows = [dict(prompt="a", completion=text) for text in (f" b{eos} c", f" b{eos}", " b")]
    found = demonstrations(tmp_path / "p.jsonl", *rows)
    assert "1 of 'completion' hold '<|endoftext|>' before their end, and are cut there" in capsys.readouterr().out
    assert found[0].demonstration == found[1].demonstration == found[2].demonstration


def test_an_eos_that_is_a_line_break_is_told_as_well(tmp_path, capsys, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_ids = [tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]]
    path = write(tmp_path / "p.jsonl", json.dumps(dict(prompt="a", completion=" b\n c")))
    spr.with_demonstrations(path, common.load_prompts(path, DEMONSTRATIONS, tokenizer, 64), "completion", tokenizer, 48)
    assert "1 of 'completion' hold" in capsys.readouterr().out


def test_what_a_chat_template_leaves_out_is_told(tmp_path, capsys):
    row = dict(prompt=[dict(role="system", content="Answer in French."), ASK], tools=[dict(name="f")])
    path = write(tmp_path / "p.jsonl", json.dumps(row))
    common.load_prompts(path, common.Layout(), chat_tokenizer(), 200)
    out = capsys.readouterr().out
    assert "has a column 'tools', which the chat template does not get" in out and "drops or changes" not in out
    without_system = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    common.load_prompts(path, common.Layout(), chat_tokenizer(without_system), 200)
    assert "1 with a message that the chat template drops or changes" in capsys.readouterr().out


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path, capsys, tokenizer):
    def load_pairs(path):
        return reward_model.load_pairs(path, PAIRS, tokenizer, 64, 48)

    def pairs(name, numbers):
        rows = [dict(prompt=f"{n % 5}", chosen=f" good {n}", rejected=" bad") for n in numbers]
        return write(tmp_path / name, *map(json.dumps, rows))

    _, held_out = common.train_and_held_out(load_pairs, pairs("a.jsonl", range(50)), None, 7)
    said = "held-out rows have a prompt that is trained on, too, with another answer"
    assert f"note: {len(held_out)} {said}" in capsys.readouterr().out
    common.train_and_held_out(load_pairs, pairs("a.jsonl", range(0, 50, 5)), pairs("b.jsonl", (1, 2, 5)), 7)
    assert said not in capsys.readouterr().out
    common.train_and_held_out(load_pairs, pairs("a.jsonl", range(0, 50, 5)), pairs("b.jsonl", (1, 2, 55)), 7)
    out = capsys.readouterr().out
    assert f"note: 1 {said}" in out and "are in the data that is trained on" not in out


def test_a_tokenizer_that_is_not_what_its_file_says_is_told(tmp_path, capsys):
    """transformers gives all models of type qwen2 Qwen's own splitting of texts."""
    number_tokenizer().save_pretrained(tmp_path)
    for kind, is_told in (("gpt2", False), ("qwen2", True)):
        (tmp_path / "config.json").write_text(json.dumps(dict(model_type=kind, vocab_size=50)))
        common.load_tokenizer(str(tmp_path))
        note = "Qwen2Tokenizer splits texts in another way than the folder's tokenizer.json"
        assert (note in capsys.readouterr().out) == is_told


def test_an_eos_without_an_embedding_is_refused(tmp_path, capsys):
    tokenizer = example_tokenizer()
    tokenizer.add_special_tokens(dict(eos_token="<|im_end|>"))
    shutil.copytree(EXAMPLE / "policy", tmp_path / "p")
    tokenizer.save_pretrained(tmp_path / "p")
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path / "p"))
    assert "has no embedding of '<|im_end|>', its EOS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.csv", b"prompt,prompt\nA,B\n", "p.csv:1: two columns have the same name"),
        ("p.json", b'{"data": [{"prompt": "A"}]}', "p.json: a dict; expected a list of JSON objects"),
        ("p.csv", b"\xef\xbb\xbfprompt\nx\n\xe9\n", "p.csv:3: not UTF-8"),
        ("p.tsv", b'n\tprompt\n1\t"To be\n2\tor\n3\tnot"\n', "p.tsv:4: a quotation mark before this line swallows"),
        ("nope.parquet/no.parquet", None, "nope.parquet/no.parquet: No such file"),
    ],
)
def test_files_that_are_not_what_they_seem(tmp_path, capsys, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        common.load_rows(str(tmp_path / name))
    assert message in capsys.readouterr().err


def test_code_in_a_tsv_is_a_field(tmp_path):
    code = 'func main() {\n\tprintln("hi")\n\tprintln("you")\n}'
    path = tmp_path / "p.tsv"
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["n", "prompt"], ["1", code], ["2", "x"]])
    assert [row["prompt"] for _, row in common.load_rows(str(path))] == [code, "x"]


def test_a_reward_function_gets_each_column_of_the_file_with_each_batch(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_text('{"prompt": "The plot", "label": 1}\n{"prompt": "The music"}\n')
    _, second = common.load_prompts(str(tmp_path / "p.jsonl"), common.Layout(), tokenizer, 8)
    assert common.function_columns([second]) == dict(label=[None])


def test_a_broken_generation_config_is_told(tmp_path, capsys):
    """Its EOS ids would be ignored."""
    shutil.copytree(EXAMPLE / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "generation_config.json").write_text('{"eos_token_id": [0, 5],}')
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path / "policy"))
    assert "generation_config.json" in capsys.readouterr().err
