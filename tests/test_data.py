"""Reading prompts: formats, truncation, chat messages, and errors that name the file and the line."""

import collections
import json

import pytest
from conftest import SHARED

import common


def write(path, *lines: str):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def refused(capsys, call, *args) -> str:
    with pytest.raises(SystemExit) as error:
        call(*args)
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


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
    for path in files.values():
        assert [row for _, row in common.load_rows(path)] == ROWS


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_mark_and_windows_line_ends(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ending.join(map(json.dumps, ROWS)).encode())
    assert [where for where, _ in common.load_rows(str(path))] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "y\n', "a.jsonl:2: "),
        ("a.jsonl", b'{"prompt": "x"}\n\n["y"]\n', "a.jsonl:3: a list"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xe9"}\n', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", b" \n\n", "a.jsonl: no rows"),
        ("a.json", b'{"prompt": "x"}', "a.json: entry 1: a str"),
        ("a.json", b"[1", "a.json: "),
        ("a.csv", b"prompt,label\nx,1\ny\n", "a.csv:3: not 2 columns"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "a.jsonl:1: "),
        ("a.parquet", b"PAR", "a.parquet: "),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, capsys, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    assert wanted in refused(capsys, common.load_rows, str(tmp_path / name))


def test_missing_file(tmp_path, capsys):
    assert "No such file" in refused(capsys, common.load_rows, str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "row, wanted",
    [
        ("{}", "a.jsonl:2: no column 'prompt'"),
        ('{"prompt": null}', "a.jsonl:2: 'prompt' is null"),
        ('{"prompt": 3}', "a.jsonl:2: 'prompt' is a int"),
        ('{"prompt": []}', "a.jsonl:2: 'prompt' is a list"),
        ('{"prompt": [{"role": "user"}]}', "a.jsonl:2: 'prompt' is a list"),
        ('{"prompt": [{"role": "user", "content": "Hi"}]}', "has no chat template"),
    ],
)
def test_bad_prompts_are_refused_by_line(tmp_path, capsys, tokenizer, row, wanted):
    path = write(tmp_path / "a.jsonl", '{"prompt": "x"}', row)
    assert wanted in refused(capsys, common.load_prompts, path, "train", "prompt", tokenizer, 8)


def test_prompts_are_cut_on_the_left_and_empty_ones_dropped_and_counted(tmp_path, capsys, tokenizer):
    long = "The acting in this film was a joy and the rest was a mess"
    path = write(tmp_path / "a.jsonl", *(json.dumps(dict(prompt=p)) for p in ("", long, " \n", "The plot")))
    prompts = common.load_prompts(path, "train", "prompt", tokenizer, 5)
    assert [p.text for p in prompts] == [long, "The plot"]  # rewards see the whole text
    assert prompts[0].ids == tokenizer(long)["input_ids"][-5:]
    assert "2 prompts" in (out := capsys.readouterr().out) and "2 empty, dropped, 1 cut to 5 tokens" in out
    path = write(tmp_path / "b.jsonl", '{"prompt": ""}')
    assert "every prompt is empty" in refused(capsys, common.load_prompts, path, "train", "prompt", tokenizer, 5)


def test_a_bos_stays_in_front_when_a_prompt_is_cut():
    assert common.cut_left([9, 1, 2, 3, 4], 3, bos_id=9) == [9, 3, 4]
    assert common.cut_left([9, 1, 2, 3, 4], 3, bos_id=None) == [2, 3, 4]
    assert common.cut_left([9, 1, 2, 3, 4], 1, bos_id=9) == [4]
    assert common.cut_left([9, 1], 3, bos_id=9) == [9, 1]


def test_chat_messages_go_through_the_template_without_a_second_bos(tmp_path, tokenizer):
    tokenizer = common.load_tokenizer(str(common.EXAMPLE / "policy"))
    tokenizer.chat_template = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
    path = write(tmp_path / "a.jsonl", json.dumps(dict(prompt=[dict(role="user", content="Hi")])))
    prompts = common.load_prompts(path, "train", "prompt", tokenizer, 64)
    assert prompts[0].text == "<|endoftext|>user: Hi\nbot:"
    assert prompts[0].ids.count(tokenizer.eos_token_id) == 1


def test_a_template_that_refuses_a_conversation_is_told_by_line(tmp_path, capsys):
    tokenizer = common.load_tokenizer(str(common.EXAMPLE / "policy"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "a.jsonl", json.dumps(dict(prompt=[dict(role="user", content="Hi")])))
    assert "a.jsonl:1: the chat template" in refused(capsys, common.load_prompts, path, "train", "prompt", tokenizer, 8)


def test_a_text_gets_one_bos_at_the_most():
    tokenizer = common.load_tokenizer(str(common.EXAMPLE / "policy"))
    tokenizer.bos_token = "<|pad|>"
    ids = tokenizer("<|pad|><|pad|>The plot")["input_ids"]
    assert ids[0] == ids[1] == tokenizer.bos_token_id
    assert common.encode(tokenizer, "<|pad|><|pad|>The plot") == ids[1:]
    assert common.encode(tokenizer, "<|pad|>The plot") == ids[1:]


def test_padding():
    ids, mask = common.left_pad([[8], [6, 7]], "cpu")
    assert ids[:, 1].tolist() == [8, 7] and mask.tolist() == [[0, 1], [1, 1]]
    ids, mask = common.right_pad([[8], [6, 7]], "cpu")
    assert ids[:, 0].tolist() == [8, 6] and mask.tolist() == [[1, 0], [1, 1]]


def test_rows_are_held_out_where_no_evaluation_data_is_given(capsys):
    files = dict(a=list(range(10)), b=[10, 11, 12], one=[0])
    assert common.train_and_held_out(files.get, "a", "b", 2) == (files["a"], [10, 11])
    train, held_out = common.train_and_held_out(files.get, "a", None, 3)
    assert len(held_out) == 3 and sorted(train + held_out) == files["a"]
    assert len(common.train_and_held_out(files.get, "a", None, 64)[1]) == 5
    assert common.train_and_held_out(files.get, "a", "b", 0) == (files["a"], [])  # in their order
    assert "its one row" in refused(capsys, common.train_and_held_out, files.get, "one", None, 3)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_the_stream_of_indices_shuffles_every_epoch_and_may_be_entered_anywhere(size):
    stream = common.shuffled_indices(size, 7, 0, 40 * size)
    assert collections.Counter(stream) == {i: 40 for i in range(size)}
    assert all(sorted(stream[e * size : (e + 1) * size]) == list(range(size)) for e in range(40))
    assert stream[13:29] == common.shuffled_indices(size, 7, 13, 16)
    assert size < 10 or len({tuple(stream[e * size : (e + 1) * size]) for e in range(40)}) == 40
    assert size < 10 or stream != common.shuffled_indices(size, 8, 0, 40 * size)


BAD_PROMPT_FILES = {
    "blank_lines_only.jsonl": "no rows",
    "csv_named_jsonl.jsonl": ":1: ",
    "empty.jsonl": "no rows",
    "json_array.jsonl": ":1: ",
    "malformed_middle.jsonl": ":6: ",
    "missing_prompt_column.jsonl": ":1: no column 'prompt'; there are: question",
    "not_utf8.jsonl": ":4: not UTF-8",
    "null_values.jsonl": ":6: 'prompt' is null",
    "truncated_last_line.jsonl": ":6: ",
    "wrong_types.jsonl": ":6: 'prompt' is a int",
}


@pytest.mark.skipif(not (SHARED / "data" / "bad").is_dir(), reason="needs the development data beside the project")
def test_the_broken_files_of_the_development_data(capsys, tokenizer):
    for path in sorted((SHARED / "data" / "bad").glob("*.jsonl")):
        if path.name in BAD_PROMPT_FILES:
            line = refused(capsys, common.load_prompts, str(path), "train", "prompt", tokenizer, 32)
            assert f"{path}" in line and BAD_PROMPT_FILES[path.name] in line
        elif "label" not in path.name and path.name != "one_class.jsonl":  # those have no prompts
            prompts = common.load_prompts(str(path), "train", "prompt", tokenizer, 32)
            assert prompts and max(len(p.ids) for p in prompts) <= 32


def test_a_csv_column_without_a_name_is_just_a_column(tmp_path, tokenizer):
    """As exported with its index: it holds no demonstrations."""
    (tmp_path / "p.csv").write_text(",prompt\n0,The plot\n1,The cast\n")
    prompts = common.load_prompts(str(tmp_path / "p.csv"), "train", "prompt", tokenizer, 64)
    assert [prompt.text for prompt in prompts] == ["The plot", "The cast"] and not prompts[0].demonstrations
