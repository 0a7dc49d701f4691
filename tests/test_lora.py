"""--lora-rank: adapters are trained, the weights are frozen, and the reference is the model below the adapters."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    EXAMPLE,
    PAIRS,
    ROOT,
    SCRIPTS,
    TINY,
    number_tokenizer,
    others_are_slow,
    policy_of,
    run_here,
    short_flags,
    start_backend,
    tiny_model,
)
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

import common

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[11, 12, 1], [13, 14, 15, 1], [16, 1]]
SAMPLING = common.Sampling(max_prompt_length=8, response_length=8, temperature=0.7, batch_size=8)


def responses_of(policy) -> common.Responses:
    prompts = [common.Prompt(str(row), row, {}) for row in PROMPTS]
    return common.as_responses(policy, prompts, RESPONSES)


def plain_policy(model) -> common.Policy:
    policy = policy_of(model, number_tokenizer(), SAMPLING)
    policy.engine.eval()  # a model from a folder has dropout
    return policy


def trained_policy(model, folder, rank=4, **flags) -> common.Policy:
    """A policy with adapters after three steps, from a folder as in a run."""
    model.save_pretrained(folder)
    backend = start_backend(lora_rank=rank, **flags)
    policy = common.load_policy(str(folder), number_tokenizer(), SAMPLING, backend)
    policy.engine = common.train_engine(policy.engine, backend, 1.0)
    rows = responses_of(policy)
    for _ in range(3):
        loss = -(common.logprobs(policy, rows) * rows.mask_BT).sum()
        common.backward(policy.engine, loss, is_last=True)
        common.optimizer_step(policy.engine, 1e-2)
    return policy


def real_logprobs(policy) -> torch.Tensor:
    rows = responses_of(policy)
    return common.all_logprobs(policy, rows, 8)[rows.mask_BT == 1]


def test_the_reference_is_the_model_before_training_to_the_last_bit(model, tmp_path):
    start_backend()
    before = real_logprobs(plain_policy(model))
    policy = trained_policy(model, tmp_path)
    reference = common.load_reference(policy, start_backend(lora_rank=4))
    assert torch.equal(real_logprobs(reference), before)
    assert (real_logprobs(policy) - before).abs().max() > 0.1
    for name, weight in model.state_dict().items():
        assert torch.equal(reference.decoder.state_dict()[name], weight)


def test_the_reference_and_the_policy_share_their_weights(model, tmp_path):
    policy = trained_policy(model, tmp_path)
    reference = common.load_reference(policy, start_backend(lora_rank=4))
    of_the_policy = {weight.data_ptr() for weight in policy.engine.parameters()}
    assert all(weight.data_ptr() in of_the_policy for weight in reference.engine.parameters())


def test_a_policy_begins_as_the_reference_and_every_linear_layer_has_an_adapter(model, tmp_path):
    model.save_pretrained(tmp_path)
    policy = common.load_policy(str(tmp_path), number_tokenizer(), SAMPLING, start_backend(lora_rank=2))
    assert torch.equal(real_logprobs(policy), real_logprobs(plain_policy(model)))
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    expected = [name for name, layer in model.base_model.named_modules() if isinstance(layer, linear)]
    adapted = policy.engine.model.base_model.named_modules()
    assert [name for name, layer in adapted if hasattr(layer, "base_layer")] == expected
    trained = [weight.shape for weight in policy.engine.parameters() if weight.requires_grad]
    assert len(trained) == 2 * len(expected)
    assert all(2 in shape for shape in trained)


def test_the_saved_policy_is_the_adapted_one_and_peft_reads_the_adapter(model, tmp_path):
    import peft

    policy = trained_policy(model, tmp_path / "base")
    expected = real_logprobs(policy)
    (tmp_path / "run").mkdir()
    common.save_and_check(policy.engine, number_tokenizer(), tmp_path / "run" / "policy", start_backend(lora_rank=4))
    merged = type(model).from_pretrained(tmp_path / "run" / "policy")
    assert {*merged.state_dict()} == {*model.state_dict()}
    torch.testing.assert_close(real_logprobs(plain_policy(merged)), expected, atol=1e-5, rtol=0)

    base = type(model).from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        with torch.no_grad():
            logits = adapted(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
        found.append(logits.log_softmax(-1)[range(len(response)), response])
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=0)


def test_the_change_of_a_matrix_is_32_over_the_rank_times_b_times_a(tmp_path):
    model = tiny_model("llama")
    policy = trained_policy(model, tmp_path, rank=8)
    layer = policy.engine.module.model.model.layers[0].mlp.up_proj
    change = 32 / 8 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = dict(common.merged_weights(policy.engine.module.model))["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(merged, model.model.layers[0].mlp.up_proj.weight + change)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_bfloat16_trains_float32_masters_of_the_adapters(zero_stage, tmp_path):
    """A hundred steps of 1e-5 are each below the type's resolution of A, but they must arrive."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    backend = start_backend(lora_rank=4, dtype="bfloat16", zero_stage=zero_stage)
    policy = common.load_policy(str(tmp_path), number_tokenizer(), SAMPLING, backend)
    policy.engine = common.train_engine(policy.engine, backend, 1.0)
    layer = policy.engine.module.model.model.layers[0].mlp.up_proj
    before = layer.lora_A["default"].weight.clone()
    layer.lora_B["default"].weight.data.fill_(0.1)  # else A has no gradient yet
    rows = responses_of(policy)
    for _ in range(100):
        loss = -(common.logprobs(policy, rows) * rows.mask_BT).sum()
        common.backward(policy.engine, loss, is_last=True)
        common.optimizer_step(policy.engine, 1e-5)
    moved = layer.lora_A["default"].weight != before
    assert moved.float().mean() > 0.3
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert not layer.base_layer.weight.requires_grad


@pytest.mark.parametrize("flags", [["--zero-stage", 3], ["--zero-stage", 2, "--offload"]])
def test_stages_that_shard_or_move_weights_are_refused(flags, tmp_path, capsys):
    assert run_here("remax", "--lora-rank", 4, *flags, "--output-dir", tmp_path / "r") == 2
    assert "--lora-rank shares weights" in capsys.readouterr().err


def test_a_rank_above_the_width_is_refused(tmp_path, capsys):
    assert run_here("remax", "--lora-rank", 97, "--output-dir", tmp_path / "r") == 2
    assert "--lora-rank 97 is more than the width of" in capsys.readouterr().err


def test_a_reward_model_trains_adapters_and_its_whole_head(tmp_path, capsys):
    flags = ["--dataset", EXAMPLE / "preferences.jsonl", "--total-episodes", 64, "--eval-size", 20, "--lora-rank", 2]
    assert run_here("reward_model", *flags, "--output-dir", tmp_path / "r") == 0
    config = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    merged = load_file(tmp_path / "r" / "reward_model" / "model.safetensors")
    assert config["task_type"] == "SEQ_CLS" and config["r"] == 2
    assert torch.equal(weights["base_model.model.score.weight"], merged["score.weight"])
    assert "Adapters of rank 2" in capsys.readouterr().out
    assert not any("lora" in name for name in merged)
    assert Path(tmp_path / "r" / "reward_model" / "README.md").exists()


def tiny_run(script, folder, *flags) -> None:
    data = [] if script in PAIRS else ["--gold-reward-function", EXAMPLE / "sentiment.py:reward"]
    flags = [*tiny_flags(script), *data, *flags, "--lora-rank", 2, "--output-dir", folder]
    assert run_here(script, *flags) == 0


def tiny_flags(script) -> list[str]:
    flags = list(TINY)
    at = flags.index("--response-length")
    flags[at : at + 2] = short_flags(script, 12)
    return [*flags, *SCRIPTS[script].one_step.split()]


WITH_REFERENCE = ["remax", "ppo", "spr", "spr_token", "dpo"]  # reinforce.py and grpo.py load it as remax.py does


@pytest.mark.parametrize("script", others_are_slow(WITH_REFERENCE, soon="remax spr dpo"))
def test_after_a_run_its_references_are_the_initial_policy_and_no_second_copy(script, tmp_path, monkeypatch):
    policies = []
    references = []
    load_reference = common.load_reference

    def remembered(policy, backend):
        policies.append(policy)
        references.append(load_reference(policy, backend))
        return references[-1]

    monkeypatch.setattr(common, "load_reference", remembered)
    tiny_run(script, tmp_path / "r")
    initial = load_file(EXAMPLE / "policy" / "model.safetensors")
    for policy, reference in zip(policies, references, strict=True):
        weights = dict(reference.decoder.named_parameters())
        assert {*weights} == {*initial}
        assert all(torch.equal(weights[name], initial[name]) for name in initial)
        of_the_policy = {weight.data_ptr() for weight in policy.decoder.parameters()}
        assert all(weight.data_ptr() in of_the_policy for weight in weights.values())
    saved = load_file(tmp_path / "r" / "policy" / "model.safetensors")
    assert any(not torch.equal(saved[name], initial[name]) for name in initial)


@pytest.mark.parametrize("script, engines", [("ppo", 2), ("reward_model", 1)])
def test_a_checkpoint_holds_adapters_heads_and_their_moments_only(script, engines, tmp_path):
    tiny_run(script, tmp_path / "r", "--save-every", 2)
    (folder,) = (tmp_path / "r" / "checkpoint").glob("update-*")
    weights = {}
    num_moments = 0
    for i in range(engines):
        states = torch.load(folder / f"engine-{i}" / "mp_rank_00_model_states.pt", weights_only=False)
        weights |= {f"{i}.{name}": weight for name, weight in states["module"].items()}
        for moments in states["optimizer"]["state"].values():
            num_moments += moments["exp_avg"].numel() + moments["exp_avg_sq"].numel()
    heads = [name for name in weights if ".lora_" not in name]
    assert heads == [f"{engines - 1}.model.score.weight"]
    num_weights = sum(weight.numel() for weight in weights.values())
    assert num_moments == 2 * num_weights
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert num_bytes < 4 * (num_weights + num_moments) + 200_000


@pytest.mark.parametrize("path", ["reward_model", "policy"])
def test_a_value_model_has_adapters_and_a_whole_head(path):
    backend = start_backend(lora_rank=2)
    value = common.load_value_model(str(EXAMPLE / path), str(EXAMPLE / "policy"), SAMPLING, backend)
    trained = [name for name, weight in value.named_parameters() if weight.requires_grad]
    assert [name for name in trained if ".lora_" not in name] == ["model.score.weight"]
    assert len(trained) > 10


def test_gradient_checkpointing_computes_activations_again_and_gives_the_same_gradients(model, tmp_path):
    plain = calls_and_gradients(model, tmp_path, gradient_checkpointing=False)
    again = calls_and_gradients(model, tmp_path, gradient_checkpointing=True)
    assert (plain[0], again[0]) == (1, 2)
    for expected, found in zip(plain[1], again[1], strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(found, expected)


def calls_and_gradients(model, folder, **flags) -> tuple[int, list[torch.Tensor]]:
    """How often the first adapted layer computes in an update, and the gradients of all adapters."""
    policy = trained_policy(model, folder, **flags)
    adapted = [layer for layer in policy.engine.modules() if hasattr(layer, "base_layer")]
    calls = []
    adapted[0].register_forward_hook(lambda *_: calls.append(1))
    rows = responses_of(policy)
    loss = -(common.logprobs(policy, rows) * rows.mask_BT).sum()
    common.backward(policy.engine, loss, is_last=True)
    return len(calls), [safe_get_full_grad(p).clone() for p in policy.engine.parameters() if p.requires_grad]


def test_layers_that_get_no_adapter_are_named(tmp_path, capsys):
    """Mixtral's experts are one parameter of three dimensions, and its router is no linear layer."""
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    policy = common.load_policy(str(tmp_path), number_tokenizer(), SAMPLING, start_backend(lora_rank=2))
    out = capsys.readouterr().out
    assert "warning: these layers get no adapter and are not trained: MixtralExperts, MixtralTopKRouter\n" in out
    trained = [weight.numel() for weight in policy.engine.parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 4  # A and B of four matrices of attention in two layers
    assert sum(trained) == 2 * 4 * 2 * (32 + 32)
    assert f"Adapters of rank 2: {sum(trained):,} weights are trained" in out


def test_dense_models_get_no_warning(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    common.load_policy(str(tmp_path), number_tokenizer(), SAMPLING, start_backend(lora_rank=2))
    assert "no adapter" not in capsys.readouterr().out


def test_without_the_flag_peft_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(ImportError):
        import peft  # noqa: F401
    runpy.run_path(str(ROOT / "common.py"))
    assert run_here("remax", *tiny_flags("remax"), "--output-dir", tmp_path / "r") == 0


def test_a_trained_head_is_not_told_as_untrained(capsys):
    backend = dataclasses.replace(start_backend(), lora_rank=2)
    sampling = common.Sampling(max_prompt_length=8, response_length=8, temperature=1.0, batch_size=4)
    common.load_value_model(str(EXAMPLE / "reward_model"), str(EXAMPLE / "policy"), sampling, backend)
    out = capsys.readouterr().out
    assert "Adapters of rank 2" in out and "get no adapter" not in out
