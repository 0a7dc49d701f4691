"""Reading prompts: formats, truncation, chat messages, held-out rows and the stream of batches."""

import collections
import dataclasses
import gzip
import json

import pytest
from conftest import example_tokenizer, start_backend

import common


def write(path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def load(path, tokenizer, max_length=64) -> list[common.Prompt]:
    return common.load_prompts(str(path), (None, "train"), "prompt", tokenizer, max_length)


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
    for path in files.values():
        assert [row for _, row in common.load_rows(path)] == ROWS


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
    assert "prompts: 2 (texts; 2 empty, dropped)" in out
    assert "warning: 1 of 2 prompts are longer than --max-prompt-length 5 and lose their beginning" in out


def test_a_bos_stays_in_front_when_a_prompt_is_cut():
    assert common.cut_left([9, 1, 2, 3, 4], 3, bos_id=9) == [9, 3, 4]
    assert common.cut_left([9, 1, 2, 3, 4], 3, bos_id=None) == [2, 3, 4]
    assert common.cut_left([9, 1, 2, 3, 4], 1, bos_id=9) == [4]
    assert common.cut_left([9, 1], 3, bos_id=9) == [9, 1]


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


# ---------------------------------------------------------------- Held-out rows and batches


@dataclasses.dataclass(frozen=True)
class Row:
    number: int
    digest: str


def rows_with(digests: str) -> list[Row]:
    return [Row(number, digest) for number, digest in enumerate(digests)]


def test_rows_are_held_out_where_no_evaluation_data_is_given(capsys):
    a, b, one = rows_with("9371fc"), rows_with("052"), rows_with("3")
    files = dict(a=a, b=b, one=one, same=rows_with("33"), high=rows_with("9c"), low=rows_with("120"))
    assert common.train_and_held_out(files.get, "a", "b", 2) == (a, b[:2])
    assert common.train_and_held_out(files.get, "a", None, 2) == ([a[0], a[2], a[4], a[5]], [a[3], a[1]])
    assert common.train_and_held_out(files.get, "a", "b", 0) == (a, [])
    for name in ("high", "low"):  # one row on each side is always left
        train, held_out = common.train_and_held_out(files.get, name, None, 64)
        assert train and held_out and len(train + held_out) == len(files[name])
    for name in ("one", "same"):
        with pytest.raises(SystemExit) as error:
            common.train_and_held_out(files.get, name, None, 3)
        assert error.value.code == 2 and "its one row" in capsys.readouterr().err


@pytest.mark.parametrize("size", [3, 30])
def test_appended_rows_never_turn_a_trained_row_into_a_held_out_one(tmp_path, tokenizer, size):
    lines = [json.dumps(dict(prompt=f"The plot {number}", number=number)) for number in range(80)]
    path = tmp_path / "p.jsonl"
    trained = set()
    for length in (24, 25, 40, 80):
        write(path, *lines[:length], lines[3])  # one row is there twice
        train, held_out = common.train_and_held_out(lambda path: load(path, tokenizer), str(path), None, size)
        assert 0 < len(held_out) <= size
        numbers = {prompt.columns["number"] for prompt in held_out}
        assert not numbers & trained
        trained |= {prompt.columns["number"] for prompt in train}
        assert not numbers & trained and len(train) + len(held_out) in (length, length + 1)
    write(path, *reversed(lines), lines[3])  # nor does the order count
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
