"""What the scripts share they share word for word, what differs is the algorithm, and that is short."""

import ast
import re
import subprocess

import pytest
from conftest import PAIRS, ROOT, SCRIPTS, fields_of

ROLLOUTS = [name for name in SCRIPTS if name not in PAIRS]
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in (*SCRIPTS, "common")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = {name: fields_of(name) for name in SCRIPTS}


def diff(a: str, b: str) -> list[str]:
    """The lines of `diff -U0 a.py b.py` after its two header lines."""
    command = ["diff", "-U0", f"{a}.py", f"{b}.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[2:]


# ---------------------------------------------------------------- Differences


def definitions() -> tuple[str, dict[str, str]]:
    """Of common.py -> (source outside of its functions and classes, {name: source})."""
    source = SOURCES["common"]
    rest, found = source, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
            rest = rest.replace(found[node.name], "")
    return rest, found


OUTSIDE, DEFINITIONS = definitions()


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\w+", text)) & DEFINITIONS.keys()


@pytest.mark.parametrize(
    "a, b, budget",
    [
        ("remax", "reinforce", 60),
        ("remax", "ppo", 170),
        ("reinforce", "grpo", 169),
        ("ppo", "grpo", 162),
        ("remax", "spr", 221),
        ("spr", "spr_token", 240),
        ("reward_model", "dpo", 118),
    ],
)
def test_diffs_stay_within_their_lines(a, b, budget):
    assert sum(line[0] in "+-" for line in diff(a, b)) <= budget


def test_a_function_is_shared_only_if_two_scripts_need_it():
    inside = names_in(OUTSIDE).union(*(names_in(text) - {name} for name, text in DEFINITIONS.items()))
    for name in DEFINITIONS.keys() - inside:
        users = [script for script in SCRIPTS if name in names_in(SOURCES[script])]
        assert len(users) > 1, f"{name} is used by {users}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_call_functions_by_their_names(name):
    assert "partial(" not in SOURCES[name]


# ---------------------------------------------------------------- The same words


def help_of(flag: str, script: str) -> str:
    return re.search(rf'    {flag}: .*\n    """(.*)"""', SOURCES[script])[1]


def test_shared_flags_agree_in_type_and_help():
    for flag in {flag for flags in FLAGS.values() for flag in flags}:
        scripts = [script for script in SCRIPTS if flag in FLAGS[script]]
        types = {script: FLAGS[script][flag].type for script in scripts}
        if flag == "num_samples":  # without samples, spr.py is supervised fine-tuning
            types.pop("spr")
        if flag == "beta":  # a weight, which may be 0; elsewhere it is a temperature
            types.pop("grpo")
        if flag == "total_episodes":  # None stands for --num-epochs passes over pairs or demonstrations
            some = (*PAIRS, "spr")
            types |= {name: next(kind for kind in types[name].__args__ if kind is not type(None)) for name in some}
        assert len(set(types.values())) == 1, flag
        helps = {help_of(flag, script) for script in scripts}
        # total_episodes: spr.py has two defaults. num_epochs: over a rollout, over the data set, or by --num-samples.
        # beta: of a weight, of a log-ratio, of a penalty.
        several = dict(total_episodes=2, num_epochs=3, beta=3)
        if flag in several:
            assert len(helps) == several[flag]
        else:
            assert len(helps) == 1, helps


@pytest.mark.parametrize("script", ["reinforce", "ppo", "grpo"])
def test_shared_flags_have_the_same_defaults_in_the_same_order(script):
    own = {"num_samples"}  # of remax.py
    shared = [flag for flag in FLAGS["remax"] if flag not in own]
    if script == "grpo":
        shared = [flag for flag in shared if flag not in ("kl_coef", "gamma")]  # its penalty is in the loss
    assert list(FLAGS[script])[: len(shared)] == shared  # the algorithm's own come last
    for flag in shared:
        assert FLAGS[script][flag].default == FLAGS["remax"][flag].default, flag


def test_flags_come_in_the_same_order_everywhere():
    for script in ("spr", "spr_token", *PAIRS):
        shared = [flag for flag in FLAGS["remax"] if flag in FLAGS[script]]
        assert [flag for flag in FLAGS[script] if flag in shared] == shared
    assert FLAGS["remax"].keys() - FLAGS["spr"].keys() == {"kl_coef", "gamma"}
    own = {"num_samples", "variant", "beta", "num_epochs", "num_minibatches", "clip_range"}
    assert FLAGS["grpo"].keys() - FLAGS["reinforce"].keys() == own - {"num_samples"}
    assert set(list(FLAGS["grpo"])[-len(own) :]) == own
    assert FLAGS["spr"].keys() - FLAGS["spr_token"].keys() == {"weighting", "completion_column"}
    more = {"gamma", "td_lambda", "value_learning_rate", "value_epochs"}
    assert FLAGS["spr_token"].keys() - FLAGS["spr"].keys() == more
    omitted = "response_length temperature reward_model reward_function gold_reward_function kl_coef gamma"
    assert not FLAGS["reward_model"].keys() & set(omitted.split())
    assert FLAGS["dpo"].keys() - FLAGS["reward_model"].keys() == {"response_length", "gold_reward_function", "beta"}
    assert not FLAGS["reward_model"].keys() - FLAGS["dpo"].keys()


EVERYWHERE = " ".join(list(SCRIPTS)[1:])
SECTIONS = [
    ("    backend = common.start_processes(", "\n    )\n", EVERYWHERE),
    ("    scoring = dict(", "\n    )\n", " ".join(ROLLOUTS[1:])),
    ("    sampling = common.Sampling(", "\n    )\n", " ".join(ROLLOUTS[1:])),
    ("        metrics = dict(episodes", "        if eval_prompts and (update % args", "reinforce ppo grpo"),
    ("        if eval_prompts and (update % args", "\n    # 7. Save", " ".join(ROLLOUTS[1:])),
    ("    # 7. Save, and check", "\nif __name__", " ".join(ROLLOUTS[1:])),
]


@pytest.mark.parametrize(
    "start, end, name", [(start, end, name) for start, end, names in SECTIONS for name in names.split()]
)
def test_sections_without_algorithm_are_the_same_text(start, end, name):
    texts = []
    for source in (SOURCES["remax"], SOURCES[name]):
        begin = source.index(start)
        texts.append(source[begin : source.index(end, begin + len(start))])
    assert texts[0] == texts[1] and texts[0]


def test_the_same_numbered_steps_in_the_same_order():
    steps = [re.findall(r"^ +# (\d)\. ([A-Z]\w+)", SOURCES[name], re.M) for name in ROLLOUTS]
    assert all(others == steps[0] for others in steps)
    assert [number for number, _ in steps[0]] == list("1234567")
    for name in PAIRS:
        numbers = re.findall(r"^ +# (\d)(?:, (\d))?\. ", SOURCES[name], re.M)
        assert "".join(a + b for a, b in numbers) == "1234567"


def test_no_identifier_carries_the_name_of_an_algorithm():
    for name, source in SOURCES.items():
        code = re.sub(r'r?"""[\s\S]*?"""|#.*|"[^"\n]*"', "", source)
        assert not re.findall(r"\b\w*(?:remax|reinforce|grpo|ppo|spr|dpo)\w*\b", code, re.I), name


def test_the_paper_claims_that_ppo_has_more_than_four_hyper_parameters_more():
    more = FLAGS["ppo"].keys() - FLAGS["remax"].keys()
    names = "num_epochs num_minibatches clip_range clip_range_value gae_lambda value_learning_rate"
    assert more == set(names.split()) and len(more) > 4
    assert FLAGS["remax"].keys() - FLAGS["ppo"].keys() == {"num_samples"}


def docstring_lines(script) -> set[str]:
    """Those of functions; the module's and the flags' come before the algorithm."""
    functions = [node for node in ast.walk(ast.parse(SOURCES[script])) if isinstance(node, ast.FunctionDef)]
    strings = [node.body[0] for node in functions if ast.get_docstring(node)]
    lines = SOURCES[script].splitlines()
    return {line for string in strings for line in lines[string.lineno - 1 : string.end_lineno] if line}


def test_the_diff_in_the_readme_is_the_real_one():
    """Its hunks of code, without docstrings: those that begin after the module's docstring and the flags."""
    first = next(i for i, line in enumerate(SOURCES["remax"].splitlines()) if line.endswith("--- The algorithm"))
    texts = {"-": docstring_lines("reinforce"), "+": docstring_lines("remax"), "@": set()}
    hunks = []
    for line in diff("reinforce", "remax"):
        if line.startswith("@@"):
            after = int(re.search(r"\+(\d+)", line)[1]) > first
        if after and line[1:] not in texts[line[0]]:
            hunks += [line]
    hunks = [line for line, following in zip(hunks, [*hunks[1:], "@@"]) if (line[:2], following[:2]) != ("@@", "@@")]
    shown = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    assert hunks and shown == hunks
