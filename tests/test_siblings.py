"""What the scripts share they share word for word, and what differs is no more than the algorithm."""

import dataclasses
import re
import subprocess

import pytest
from conftest import ROOT

import ppo
import reinforce
import remax
import reward_model
import spr

SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("remax", "reinforce", "ppo", "spr")}


def diff(a: str, b: str) -> list[str]:
    """The lines of `diff -U0 a.py b.py` after its two header lines."""
    command = ["diff", "-U0", f"{a}.py", f"{b}.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[2:]


def changed_lines(a: str, b: str) -> int:
    return sum(line[0] in "+-" for line in diff(a, b))


def test_the_diffs_stay_within_their_budgets():
    assert changed_lines("remax", "reinforce") <= 60
    assert changed_lines("remax", "ppo") <= 170


def help_of(name: str, source: str) -> str:
    return re.search(rf'    {name}: .*\n    """(.*)"""', source)[1]


@pytest.mark.parametrize("script", [reinforce, ppo])
def test_shared_flags_agree_in_type_default_help_and_order(script):
    flags = {field.name: field for field in dataclasses.fields(script.Args)}
    shared = [field.name for field in dataclasses.fields(remax.Args)]
    assert list(flags)[: len(shared)] == shared  # the algorithm's own come last
    for field in dataclasses.fields(remax.Args):
        assert (flags[field.name].type, flags[field.name].default) == (field.type, field.default)
        assert help_of(field.name, SOURCES[script.__name__]) == help_of(field.name, SOURCES["remax"])


def test_flags_of_the_reward_model_are_those_of_the_others():
    source = (ROOT / "reward_model.py").read_text()
    for other in (remax, ppo):
        fields = {field.name: field for field in dataclasses.fields(other.Args)}
        for field in dataclasses.fields(reward_model.Args):
            if field.name in fields:
                assert help_of(field.name, source) == help_of(field.name, SOURCES[other.__name__])
                if field.name != "total_episodes":  # by default --num-epochs passes
                    assert field.type == fields[field.name].type
    omitted = "response_length temperature reward_model reward_function gold_reward_function kl_coef gamma"
    assert not {field.name for field in dataclasses.fields(reward_model.Args)} & set(omitted.split())


def test_flags_of_spr_are_those_of_the_others():
    fields = {field.name: field for field in dataclasses.fields(spr.Args)}
    wanted = {field.name: field for field in dataclasses.fields(remax.Args)}
    assert [name for name in fields if name in wanted] == [n for n in wanted if n not in ("total_episodes", "kl_coef")]
    for name in fields.keys() & wanted.keys():
        assert (fields[name].type, fields[name].default) == (wanted[name].type, wanted[name].default)
        assert help_of(name, SOURCES["spr"]) == help_of(name, SOURCES["remax"])
    assert help_of("num_samples", SOURCES["spr"]) == help_of("num_samples", SOURCES["reinforce"])


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
@pytest.mark.parametrize(
    "start, end",
    [
        ("# The run\n", '"""Attention implementation of transformers."""\n'),
        ('        if args.gold_reward_function:\n            means["', "        if args.save_every"),
        ("    # 7. Save, and check", "\nif __name__"),
    ],
)
def test_sections_without_algorithm_are_the_same_text(name, start, end):
    texts = []
    for source in (SOURCES["remax"], SOURCES[name]):
        begin = source.index(start)
        texts.append(source[begin : source.index(end, begin + len(start))])
    assert texts[0] == texts[1] and texts[0]


def test_the_same_numbered_steps_in_the_same_order():
    steps = [re.findall(r"^ +# (\d)\. ([A-Z]\w+)", source, re.M) for source in SOURCES.values()]
    assert all(others == steps[0] for others in steps)
    assert [number for number, _ in steps[0]] == list("1234567")


def test_no_identifier_carries_the_name_of_an_algorithm():
    for name, source in SOURCES.items():
        code = re.sub(r'r?"""[\s\S]*?"""|#.*|"[^"\n]*"', "", source)
        assert not re.findall(r"\b\w*(?:remax|reinforce|ppo|spr)\w*\b", code, re.I), name


def test_the_paper_claims_that_ppo_has_more_than_four_hyper_parameters_more():
    more = {f.name for f in dataclasses.fields(ppo.Args)} - {f.name for f in dataclasses.fields(remax.Args)}
    names = "num_epochs num_minibatches clip_range clip_range_value gae_lambda value_learning_rate"
    assert more == set(names.split()) and len(more) > 4
    assert not {f.name for f in dataclasses.fields(remax.Args)} - {f.name for f in dataclasses.fields(ppo.Args)}


def test_the_diff_in_the_readme_is_the_real_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```diff\n(.*?)```", readme, re.S)[1].splitlines()
    assert shown == diff("reinforce", "remax")
