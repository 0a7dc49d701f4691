"""Flags that no result of a short run shows, such as those that save memory: each is looked for where it acts."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    EXAMPLE,
    PAIRS,
    SCRIPTS,
    few_pairs,
    others_are_slow,
    read_metrics,
    run_here,
    short_flags,
    without_machine,
)
from safetensors.torch import load_file

import common
import spr_token

SEED = 5
FLAGS = f"--total-episodes 8 --batch-size 8 --eval-size 7 --eval-every 1 --seed {SEED}".split()
FORWARDS = (common.TokenLogprobs, common.ScalarOutputs, spr_token.TokenValues)


@dataclasses.dataclass
class Seen:
    """What a run did."""

    engines: list = dataclasses.field(default_factory=list)  # in training
    frozen: list = dataclasses.field(default_factory=list)  # modules
    decoded_rows: list[int] = dataclasses.field(default_factory=list)  # of each call of `generate`
    read_rows: list[int] = dataclasses.field(default_factory=list)  # of each forward
    layers_in_backward: list[int] = dataclasses.field(default_factory=list)  # forwards of them, by backward
    in_backward: bool = False
    seeds: set[int] = dataclasses.field(default_factory=set)  # of torch, in a backward
    rows: list = dataclasses.field(default_factory=list)  # of the data set
    batch: list = dataclasses.field(default_factory=list)  # of the last update
    room: list[int] = dataclasses.field(default_factory=list)  # bytes that were looked for on the disk


def with_flags(script, *flags) -> list:
    return [*FLAGS, *short_flags(script, 8), *SCRIPTS[script].one_step.split(), *flags]


def count_layers(model, seen):
    """Forwards of the first layer that begin while gradients are computed."""

    def count(*args):
        if seen.in_backward:
            seen.layers_in_backward[-1] += 1

    (layers,) = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    first_part = next(layers[0].children())  # hooks of a layer itself are not called when it is computed again
    first_part.register_forward_pre_hook(count)


@pytest.fixture
def seen(monkeypatch):
    seen = Seen()
    train_engine = common.train_engine
    freeze = common.freeze
    generate = common.generate
    backward = common.backward
    shuffled_batch = common.shuffled_batch
    writing = common.writing

    def watched_train_engine(module, *args):
        count_layers(module.model, seen)
        seen.engines.append(train_engine(module, *args))
        return seen.engines[-1]

    def watched_freeze(module, *args):
        seen.frozen.append(module)
        return freeze(module, *args)

    def watched_generate(*args, **kwargs):
        tokens_RT = generate(*args, **kwargs)
        seen.decoded_rows.append(len(tokens_RT))
        return tokens_RT

    def watched_backward(*args):
        seen.layers_in_backward.append(0)
        seen.seeds.add(torch.initial_seed())
        seen.in_backward = True
        backward(*args)
        seen.in_backward = False

    def watched_shuffled_batch(rows, *args):
        seen.rows = rows
        seen.batch = shuffled_batch(rows, *args)
        return seen.batch

    def watched_writing(folder, num_bytes=0):
        seen.room.append(num_bytes)
        return writing(folder, num_bytes)

    def watched(forward):
        def watched_forward(module, ids_BL, *args):
            seen.read_rows.append(len(ids_BL))
            return forward(module, ids_BL, *args)

        return watched_forward

    monkeypatch.setattr(common, "train_engine", watched_train_engine)
    monkeypatch.setattr(common, "freeze", watched_freeze)
    monkeypatch.setattr(common, "generate", watched_generate)
    monkeypatch.setattr(common, "backward", watched_backward)
    monkeypatch.setattr(common, "shuffled_batch", watched_shuffled_batch)
    monkeypatch.setattr(common, "writing", watched_writing)
    for kind in FORWARDS:
        monkeypatch.setattr(kind, "forward", watched(kind.forward))
    return seen


@pytest.fixture
def own(tmp_path) -> dict[str, str]:
    """Copies of the example's models."""
    folders = {}
    for name in ("policy", "reward_model"):
        folders[name] = str(tmp_path / name)
        shutil.copytree(EXAMPLE / name, folders[name])
    return folders


def data_flags(script) -> list:
    """The example's data, to be named beside a model of one's own."""
    if script in PAIRS:
        return ["--dataset", few_pairs()]
    return ["--dataset", EXAMPLE / "prompts.jsonl", "--eval-dataset", EXAMPLE / "prompts_test.jsonl"]


def folders_of(modules, kind) -> set[str]:
    """Where the models inside of modules come from."""
    return {module.model.name_or_path for module in modules if isinstance(module, kind)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_save_memory_are_at_work(tmp_path, seen, own, script):
    flags = with_flags(script, "--micro-batch-size", 4, "--gradient-checkpointing", "--attention", "eager")
    flags += ["--zero-stage", 2, "--offload", "--dtype", "bfloat16", "--max-grad-norm", 0.25]
    flags += ["--model", own["policy"], *data_flags(script)]
    if script not in PAIRS:
        flags += ["--rollout-batch-size", 4, "--reward-model", own["reward_model"]]
    assert run_here(script, *flags, "--output-dir", tmp_path / "r") == 0

    assert len(seen.engines) == SCRIPTS[script].models
    assert max(seen.read_rows) == 4
    assert min(seen.layers_in_backward) == 1  # each layer is computed again
    if script != "reward_model":
        assert max(seen.decoded_rows) == 4
    for engine in seen.engines:
        assert engine.zero_optimization_stage() == 2
        assert engine.zero_offload_optimizer().device == "cpu"
        assert engine.gradient_clipping() == 0.25
    modules = [engine.module for engine in seen.engines] + seen.frozen
    for module in modules:
        assert module.model.config._attn_implementation == "eager"
        assert {weight.dtype for weight in module.model.parameters()} == {torch.bfloat16}
    scorer = "policy" if script == "reward_model" else "reward_model"
    if script != "reward_model":
        assert folders_of(modules, common.TokenLogprobs) == {own["policy"]}
    if script != "dpo":
        assert folders_of(modules, common.ScalarOutputs) == {own[scorer]}

    # The update has the seed's data and the seed's random numbers.
    numbers = common.shuffled_indices(len(seen.rows), SEED, 0, 8)
    assert seen.batch == [seen.rows[i] for i in numbers]
    common.set_seed(SEED, 1, 0)
    assert seen.seeds == {torch.initial_seed()}
    if script == "dpo":  # of these pairs alone log π_ref was computed
        known = [i for i, pair in enumerate(seen.rows) if pair.ref_logprobs != (0.0, 0.0)]
        assert known == sorted(numbers)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_these_flags_nothing_is_done_for_them(tmp_path, seen, own, script):
    """And adapters, which do not go with all of them, are what is trained.

    Without evaluations there is no row of them. With a reward function a value model starts from the policy.
    """
    flags = with_flags(script, "--micro-batch-size", 32, "--lora-rank", 2, "--eval-every", 0, "--save-every", 1)
    flags += ["--model", own["policy"], *data_flags(script)]
    if script not in PAIRS:
        flags += ["--reward-function", f"{EXAMPLE}/sentiment.py:reward"]
    assert run_here(script, *flags, "--output-dir", tmp_path / "r") == 0

    (row,) = read_metrics(tmp_path / "r")
    assert row["update"] == 1
    assert not any(name.startswith("eval_") for name in row)
    assert (tmp_path / "r" / "checkpoint" / "latest").read_text() == "1"
    model_bytes, checkpoint_bytes = common.saved_sizes(seen.engines)
    assert seen.room[0] == model_bytes + 2 * checkpoint_bytes
    assert {engine.module.model.name_or_path for engine in seen.engines} == {own["policy"]}
    assert max(seen.layers_in_backward) == 0
    assert max(seen.read_rows) > 4
    for engine in seen.engines:
        trained = [name for name, weight in engine.module.named_parameters() if weight.requires_grad]
        assert trained and all("lora" in name or "score" in name or "head" in name for name in trained)
        assert engine.zero_optimization_stage() == 0
        assert engine.module.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("script", SCRIPTS)
def test_data_are_read_as_the_flags_say(tmp_path, monkeypatch, script):
    """A hub data set whose columns have other names. A policy would have room for what they are cut to.

    One answer is too long for --response-length. Where the first model would be loaded, the run ends.
    """
    asked = []
    planned = []
    found = []
    loaded = []
    plan_updates = common.plan_updates
    train_and_held_out = common.train_and_held_out

    def load_rows(*args):
        asked.append(args)
        rows = [dict(text=f"The plot of the film {i}", good=" was good.", bad=" was bad.") for i in range(8)]
        rows[3]["good"] = 3 * " was good."
        return [(f"row {i}", row) for i, row in enumerate(rows)]

    def watched_plan_updates(total_episodes, *args):
        planned.append(total_episodes)
        return plan_updates(total_episodes, *args)

    def watched_train_and_held_out(*args):
        found.extend(train_and_held_out(*args))
        return found

    def stop(*args, **kwargs):
        loaded.append(args)
        raise SystemExit(3)

    monkeypatch.setattr(common, "load_rows", load_rows)
    monkeypatch.setattr(common, "plan_updates", watched_plan_updates)
    monkeypatch.setattr(common, "train_and_held_out", watched_train_and_held_out)
    monkeypatch.setattr(common, "Reward", lambda *args, **kwargs: None)
    monkeypatch.setattr(common, "load_policy", stop)
    monkeypatch.setattr(common, "load_classifier", stop)
    flags = "--dataset org/some --eval-dataset org/other --dataset-config main --dataset-split test".split()
    flags += "--prompt-column text --max-prompt-length 4 --eval-size 3 --batch-size 8".split()
    if script in PAIRS:
        flags += "--chosen-column good --rejected-column bad --num-epochs 5".split()
    if script != "reward_model":
        flags += "--response-length 9".split()
    if script == "spr":
        flags += "--completion-column good".split()
    assert run_here(script, *flags, "--output-dir", tmp_path / "r") == 3

    rows, held_out = found
    assert asked == [("org/some", "main", "test"), ("org/other", "main", "test")]
    assert len(rows) == (7 if script in ("spr", "dpo") else 8)
    assert len(held_out) == 3
    for row in rows:
        prompt = row.prompt if script in PAIRS else row
        assert prompt.text.startswith("The plot")
        assert len(prompt.ids) == 4
        if script in PAIRS:
            assert row.responses[0].startswith(" was good.")
            assert row.responses[1] == " was bad."
        if script == "spr":
            assert prompt.answers == dict(good=" was good.")
    if script in PAIRS:
        assert planned == [5 * len(rows)]
    if script != "reward_model":
        ((_, _, sampling, _),) = loaded
        assert sampling.max_prompt_length == 4
        assert sampling.response_length == 9


BFLOAT16 = [("remax", 0), ("reinforce", 1), ("grpo", 3), ("ppo", 2), ("spr_token", 0)]


@pytest.mark.parametrize("script, zero_stage", others_are_slow(BFLOAT16, soon="remax ppo grpo"))
def test_a_run_in_bfloat16_resumes_with_its_master_weights(tmp_path, script, zero_stage):
    """Masters that were made from the 16 bits again would end in other weights: most steps are below these bits."""
    flags = with_flags(script, "--total-episodes", 32, "--eval-every", 0, "--save-every", 3, "--learning-rate", 1e-4)
    flags += ["--dtype", "bfloat16", "--zero-stage", zero_stage, "--output-dir", tmp_path / "r"]
    assert run_here(script, *flags) == 0
    metrics, weights = ended(tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "policy")

    assert (tmp_path / "r" / "checkpoint" / "latest").read_text() == "3"
    assert run_here(script, "--resume", tmp_path / "r") == 0  # the last update once more
    again, found = ended(tmp_path / "r")
    assert again == metrics
    for name in weights:
        assert torch.equal(found[name], weights[name]), name


def ended(folder: Path) -> tuple[dict, dict]:
    """-> (the last update's metrics that do not depend on the machine, the saved weights)"""
    last = read_metrics(folder)[-1]
    return without_machine(last), load_file(folder / "policy" / "model.safetensors")
