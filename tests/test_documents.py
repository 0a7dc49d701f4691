"""The README's commands, the flags, the links and the layout are what they are said to be."""

import dataclasses
import re
import shlex
import sys

import pytest
import tyro
from conftest import ROOT, assert_ok, run_script

import common
import ppo
import reinforce
import remax
import reward_model
import spr

SCRIPTS = {"remax.py": remax, "reinforce.py": reinforce, "ppo.py": ppo, "spr.py": spr, "reward_model.py": reward_model}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every command line of the README and of the scripts' docstrings that runs a script of ours."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    texts = [*blocks, *(re.sub(r"\w+ \w+: +", "", module.__doc__) for module in SCRIPTS.values())]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part) if re.search(r"(python|deepspeed|torchrun)\S* .*\.py", part) else []
            found += [words] if words else []
    return found


def test_the_readme_begins_with_the_two_command_lines():
    blocks = re.findall(r"```(\w*)\n(.*?)```", README, re.S)[:2]
    assert [kind for kind, _ in blocks] == ["bash", "bash"]
    assert all(len(text.splitlines()) == 1 and "-m venv" in text for _, text in blocks)
    assert "remax.py" in blocks[0][1] and "pytest" in blocks[1][1]


def test_every_command_parses(monkeypatch):
    parsed = 0
    for words in commands():
        script = next(word for word in words if word.endswith(".py") and "tests" not in word)
        flags = words[words.index(script) + 1 :]
        tyro.cli(SCRIPTS[script].Args, args=flags)
        parsed += 1
    assert parsed >= 5


def test_the_three_commands_work_on_a_user_s_own_data(tmp_path):
    """As they stand in the README, in a folder with the user's files; only made short."""
    block = re.search(r"in three commands.*?```bash\n(.*?)```", README, re.S)[1]
    own = dict(demonstrations="demonstrations", preferences="preferences", prompts="prompts", held_out="prompts_test")
    for name, example in own.items():
        lines = (common.EXAMPLE / f"{example}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:80]))
    short = {"spr.py": "--iterations 1 --prompts-per-iteration 32 --epochs-per-iteration 1 --batch-size 16"}
    short |= {"reward_model.py": "--total-episodes 64 --eval-size 8"}
    short |= {"remax.py": "--total-episodes 32 --batch-size 16 --eval-size 8 --response-length 16"}
    for line in block.splitlines():
        _, script, *flags = shlex.split(line.replace("path/to/base-model", str(common.EXAMPLE / "policy")))
        result = run_script(script, *flags, *short[script].split(), cwd=tmp_path)
        assert_ok(result)
    assert (tmp_path / "rl" / "policy" / "model.safetensors").exists()


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_flag_is_dead(name):
    source = (ROOT / name).read_text() + (ROOT / "common.py").read_text()
    for field in dataclasses.fields(SCRIPTS[name].Args):
        assert re.search(rf"\bargs\.{field.name}\b", source), f"{name}: --{field.name} is never read"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_explained_in_one_sentence(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / name), "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as error:
        common.parse_args(SCRIPTS[name].Args)
    out = capsys.readouterr().out
    source = (ROOT / name).read_text()
    assert error.value.code == 0
    for field in dataclasses.fields(SCRIPTS[name].Args):
        assert "--" + field.name.replace("_", "-") in out
        (sentence,) = re.findall(rf'    {field.name}: .*\n    """(.*)"""', source)
        assert sentence.endswith(".") and sentence.count(". ") == 0
    assert "examples/reviews/policy" in out and str(ROOT) not in out  # defaults are shown as short paths


def test_layout():
    allowed = {"README.md", "requirements.txt", "LICENSE", "remax.py", "common.py", "examples", "benchmark", "tests"}
    allowed |= {"reinforce.py", "ppo.py", "spr.py", "reward_model.py"}
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top <= allowed
    assert all("==" in line for line in (ROOT / "requirements.txt").read_text().split())


def test_the_example_models_are_small_and_the_data_is_what_make_writes(tmp_path, monkeypatch):
    folder = ROOT / "examples" / "reviews"
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 3e6
    monkeypatch.syspath_prepend(str(folder))
    import make

    monkeypatch.setattr(make, "HERE", tmp_path)
    make.make_data()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"prompts.jsonl", "prompts_test.jsonl", "demonstrations.jsonl", "preferences.jsonl"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    train, test = (set((folder / f"{name}.jsonl").read_text().splitlines()) for name in ("prompts", "prompts_test"))
    assert not train & test
