"""The README's commands and links, the flags and the layout are true."""

import dataclasses
import importlib
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys

import pytest
import tyro
from conftest import EXAMPLE, ROOT, SCRIPTS, run_here

import common

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
MODULES = {f"{name}.py": importlib.import_module(name) for name in SCRIPTS}


def commands(text: str) -> list[list[str]]:
    """Every command line that runs a Python file."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if re.search(r"(python|deepspeed|torchrun)\S* .*\.py", part)]


def test_the_readme_begins_with_the_two_command_lines():
    run, tests, *_ = (text for kind, text in BLOCKS if kind == "bash")
    assert all(len(text.splitlines()) == 1 and "-m venv" in text for text in (run, tests))
    assert "remax.py" in run and "pytest" in tests


def test_every_command_parses():
    texts = [text for kind, text in BLOCKS if kind == "bash"]
    texts += [re.sub(r"\w+ \w+: +", "", module.__doc__) for module in MODULES.values()]
    parsed = 0
    for words in (words for text in texts for words in commands(text)):
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).exists(), words
        if script in MODULES:
            tyro.cli(MODULES[script].Args, args=words[words.index(script) + 1 :])
            parsed += 1
    assert parsed >= 3 * len(SCRIPTS)


def test_the_three_commands_work_on_a_user_s_own_data(tmp_path, monkeypatch):
    """As they stand in the README, in a folder with the user's files; only made short."""
    stages = ("spr", "reward_model", "remax")  # supervised fine-tuning, a reward model, reinforcement learning
    blocks = [commands(text) for kind, text in BLOCKS if kind == "bash"]
    (block,) = [block for block in blocks if [words[1] for words in block] == [f"{stage}.py" for stage in stages]]
    own = dict(demonstrations="demonstrations", preferences="preferences", prompts="prompts", held_out="prompts_test")
    for name, example in own.items():
        lines = (EXAMPLE / f"{example}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:80]))
    lengths = "--max-prompt-length 64 --response-length 48"  # of the tiny model
    short = dict(spr=f"--num-epochs 1 --batch-size 16 --eval-size 8 {lengths}")
    short |= dict(reward_model="--total-episodes 64 --eval-size 8")
    short |= dict(remax=f"--total-episodes 32 --batch-size 16 --eval-size 8 {lengths}")
    monkeypatch.chdir(tmp_path)
    for stage, (_, _, *flags) in zip(stages, block):
        flags = [flag.replace("path/to/base-model", str(EXAMPLE / "policy")) for flag in flags]
        assert run_here(stage, *flags, *short[stage].split()) == 0, stage
    folders = [path.parent for path in tmp_path.rglob("model.safetensors")]
    assert sorted(path.name for path in folders) == ["policy", "policy", "reward_model"]
    assert len({path.parent for path in folders}) == 3
    # Each stage has begun with the models of the stages before it.
    (folder,) = [path.parent for path in folders if json.loads((path.parent / "args.json").read_text()).get("kl_coef")]
    saved = json.loads((folder / "args.json").read_text())
    assert {saved["model"], saved["reward_model"]} == {str(path) for path in folders} - {str(folder / "policy")}


def test_the_readme_s_table_and_line_of_code_are_those_of_the_scripts():
    rows = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", README, re.M)
    assert {*rows} == {*MODULES, "common.py"}
    (line, *_) = [text.strip() for kind, text in BLOCKS if kind == "python"]
    assert line in (ROOT / "remax.py").read_text() and "baseline_rewards_B" in line


def test_the_readme_s_figures_are_those_of_the_rows():
    def rows(name):
        return [json.loads(line) for line in (ROOT / "benchmark" / "results" / name).read_text().splitlines()]

    def ends(method, task, name):
        found = [row for row in rows(name) if (row["method"], row["task"], row["tuning"]) == (method, task, False)]
        assert len(found) >= (3 if task == "imdb" else 5)
        return found

    def gold(method, task="reviews", name="restraints.jsonl"):
        return f"{statistics.fmean(row['gold'] for row in ends(method, task, name)):.2f}"

    def gold_before(method, task="reviews"):
        return gold(method, task, "tuned.jsonl")

    def nats(method):
        return f"{statistics.fmean(row['kl'] for row in ends(method, 'reviews', 'restraints.jsonl')):.0f}"

    def noise(task, episodes):
        key = (task, episodes, "greedy (ReMax)")
        ratios = [r["ratio"] for r in rows("gradient_variance.jsonl") if (r["task"], r["episodes"], r["method"]) == key]
        return f"{ratios[-1]:.2f}"

    def ratio(name, task, key, method, other):
        of_task = [row for row in rows(name) if row["task"] == task and "--lora-rank" not in row["flags"]]
        values = [[row[key] for row in of_task if row["method"] == one] for one in (method, other)]
        first, second = (sum(v) / len(v) for v in values)
        return first / second

    def first_run(method, name, updates):
        """Mean over these updates and the five seeds."""
        values = [row["curves"][name][updates] for row in rows("first_run.jsonl") if row["method"] == method]
        assert len(values) == 5
        return f"{statistics.fmean(itertools.chain(*values)):.2f}"

    falls = [row["best"] - row["last"] for row in rows("first_run.jsonl") if row["method"] == "remax"]
    first, last, end = slice(1, 11), slice(-10, None), slice(-1, None)  # the row before is the initial policy's
    free = "remax, no KL penalty"
    assert sorted(row["kl"] > 40 for row in ends("remax, N = 3", "imdb", "restraints.jsonl")) == [False, False, True]
    raised = "reviews, rewards + 9.3"
    times = [f"{ratio('step.jsonl', 'W2', 'cpu_s', ppo, 'remax'):.1f}" for ppo in ("ppo1", "ppo4")]
    for sentence in (
        f"rises from {first_run('remax', 'gold_reward', first)} in the first tenth of the updates to "
        f"{first_run('remax', 'gold_reward', last)} in the last (mean of five seeds on one thread; none ends more than "
        f"{math.ceil(100 * max(falls)) / 100:.2f} below its best tenth)",
        f"the reward rises further, to {float(first_run(free, 'reward', last)):.1f}, the gold reward falls to "
        f"{first_run(free, 'gold_reward', last)}, greedy responses end at a gold reward of "
        f"{first_run(free, 'eval_gold_reward', end)} (by default {first_run('remax', 'eval_gold_reward', end)})",
        f"**smaller here**: {1 - ratio('memory.jsonl', 'M1', 'peak_rss_mb', 'remax', 'ppo'):.0%}, at 124M",
        f"**depends on PPO's epochs**: one {times[0]}, four {times[1]}",
        f"**holds**: {ratio('memory.jsonl', 'M1', 'peak_rss_mb', 'spr', 'sft'):.2f} times",
        f"reviews {noise('reviews', 0)} of REINFORCE's at first, {noise('reviews', 3200)} at the end; "
        f"rule {noise('rule', 0)}, {noise('rule', 1600)} halfway, {noise('rule', 3200)} at the end",
        f"above ReMax (reviews {gold('reinforce')} and {gold('remax')}, rule {gold('reinforce', 'rule')} and "
        f"{gold('remax', 'rule')}, real text {gold('reinforce', 'imdb')} and {gold('remax', 'imdb')})",
        f"raised by 9.3 it falls from {gold_before('reinforce')} to {gold_before('reinforce', raised)}, "
        f"ReMax from {gold_before('remax')} to {gold_before('remax', raised)}",
        f"reviews {gold('remax, N = 3')} at {nats('remax, N = 3')} nats, PPO {gold('ppo, 1 epoch')} at "
        f"{nats('ppo, 1 epoch')}; rule {gold('remax, N = 3', 'rule')}, {gold('ppo, 1 epoch', 'rule')}; real text "
        f"{gold('remax, N = 3', 'imdb')}, {gold('ppo, 1 epoch', 'imdb')}, but one of three seeds runs off; "
        f"with one sample {gold('remax')}, "
        f"{gold('remax', 'rule')} and {gold('remax', 'imdb')}",
        f"reviews {gold('spr')}, {gold('dpo')}; rule {gold('spr', 'rule')}, {gold('dpo', 'rule')}; on real text they "
        f"are level, {gold('spr', 'imdb')} and {gold('dpo', 'imdb')}; Best-of-N is level with SPR everywhere, "
        f"{gold('best-of-n')}, {gold('best-of-n', 'rule')} and {gold('best-of-n', 'imdb')}",
        f"{gold_before('spr, N = 4')}, {gold_before('spr')}, {gold_before('spr, N = 16')} with N = 4, 8, 16",
    ):
        assert sentence in " ".join(README.split())


def test_linked_files_exist():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if not link.startswith("http")]
    assert links and all((ROOT / link.partition("#")[0]).exists() for link in links)


@pytest.mark.parametrize("name", MODULES)
def test_no_flag_is_dead(name):
    source = (ROOT / name).read_text() + (ROOT / "common.py").read_text()
    for field in dataclasses.fields(MODULES[name].Args):
        assert re.search(rf"\bargs\.{field.name}\b", source), f"{name}: --{field.name} is never read"


@pytest.mark.parametrize("name", MODULES)
def test_every_flag_is_explained_in_one_sentence(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / name), "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as error:
        common.parse_args(MODULES[name].Args)
    out = capsys.readouterr().out
    source = (ROOT / name).read_text()
    assert error.value.code == 0
    for field in dataclasses.fields(MODULES[name].Args):
        assert "--" + field.name.replace("_", "-") in out
        (sentence,) = re.findall(rf'    {field.name}: .*\n    """(.*)"""', source)
        assert sentence.endswith(".") and sentence.count(". ") == 0
    assert "examples/reviews/policy" in out and str(ROOT) not in out  # defaults are shown as short paths


def test_layout():
    allowed = "README.md requirements.txt LICENSE CITATION.cff common.py examples benchmark tests dpo.py spr_token.py"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top <= {*allowed.split(), *MODULES}
    assert all("==" in line for line in (ROOT / "requirements.txt").read_text().split())


def test_the_example_models_are_small_and_the_data_is_what_make_writes(tmp_path, monkeypatch):
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*.safetensors")) < 3e6
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import make

    monkeypatch.setattr(make, "HERE", tmp_path)
    make.make_data()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"prompts.jsonl", "prompts_test.jsonl", "demonstrations.jsonl", "preferences.jsonl"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()
    train, test = (set((EXAMPLE / f"{name}.jsonl").read_text().splitlines()) for name in ("prompts", "prompts_test"))
    assert not train & test
