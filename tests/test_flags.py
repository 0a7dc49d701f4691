"""Flags that change memory, speed or precision alone: no result shows them, so each is looked for where it acts."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, SCRIPTS, read_metrics, run_here, short_flags, without_machine
from safetensors.torch import load_file

import common
import spr_token

FLAGS = "--total-episodes 8 --batch-size 8 --eval-size 7 --eval-every 1".split()
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
        seen.in_backward = True
        backward(*args)
        seen.in_backward = False

    def watched(forward):
        def watched_forward(module, ids_BL, *args):
            seen.read_rows.append(len(ids_BL))
            return forward(module, ids_BL, *args)

        return watched_forward

    monkeypatch.setattr(common, "train_engine", watched_train_engine)
    monkeypatch.setattr(common, "freeze", watched_freeze)
    monkeypatch.setattr(common, "generate", watched_generate)
    monkeypatch.setattr(common, "backward", watched_backward)
    for kind in FORWARDS:
        monkeypatch.setattr(kind, "forward", watched(kind.forward))
    return seen


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_save_memory_are_at_work(tmp_path, seen, script):
    flags = with_flags(script, "--micro-batch-size", 4, "--gradient-checkpointing", "--attention", "eager")
    flags += ["--zero-stage", 2, "--offload", "--dtype", "bfloat16", "--max-grad-norm", 0.25]
    if script not in PAIRS:
        flags += ["--rollout-batch-size", 4]
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
    for module in [engine.module for engine in seen.engines] + seen.frozen:
        assert module.model.config._attn_implementation == "eager"
        assert {weight.dtype for weight in module.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_these_flags_nothing_is_done_for_them(tmp_path, seen, script):
    """And adapters, which do not go with all of them, are what is trained."""
    flags = with_flags(script, "--micro-batch-size", 32, "--lora-rank", 2)
    assert run_here(script, *flags, "--output-dir", tmp_path / "r") == 0

    assert max(seen.layers_in_backward) == 0
    assert max(seen.read_rows) > 4
    for engine in seen.engines:
        trained = [name for name, weight in engine.module.named_parameters() if weight.requires_grad]
        assert trained and all("lora" in name or "score" in name or "head" in name for name in trained)
        assert engine.zero_optimization_stage() == 0
        assert engine.module.model.config._attn_implementation == "sdpa"


SLOW = pytest.mark.slow
BFLOAT16 = [("remax", 1), ("ppo", 2), ("spr_token", 0)]
BFLOAT16 += [pytest.param("remax", 0, marks=SLOW), pytest.param("remax", 3, marks=SLOW)]


@pytest.mark.parametrize("script, zero_stage", BFLOAT16)
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
