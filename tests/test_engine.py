"""The DeepSpeed engine against plain torch: stages, micro-batches and ranks do not change the mathematics."""

import math

import pytest
import torch
from conftest import run_script, tiny_model
from engine_worker import POISONS, ROWS, data, losses, with_plain_torch, with_the_engine

import common

CPU = torch.device("cpu")
STAGES = [0, 1, 2, 3]


def assert_same(found, wanted, rtol=1e-5, atol=1e-5):
    """atol is a hundredth of a step: Adam turns the rounding noise of gradients that are 0 (key biases) into steps."""
    assert found[0] == pytest.approx(wanted[0], rel=rtol)
    for name, weights in wanted[1].items():
        torch.testing.assert_close(found[1][name], weights, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_stages_and_micro_batches_equal_plain_torch(kind, zero_stage, micro_batch_size):
    wanted = with_plain_torch(tiny_model(kind))
    assert min(wanted[0]) > 1  # so that clipping is at work
    found = with_the_engine(tiny_model(kind), zero_stage, micro_batch_size)
    assert_same(found, wanted)
    assert found[2] == [0] * 5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloading_changes_nothing(zero_stage):
    assert_same(
        with_the_engine(tiny_model("llama"), zero_stage, 3, offload=True), with_plain_torch(tiny_model("llama"))
    )


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_gradient_checkpointing_changes_nothing(zero_stage):
    assert_same(
        with_the_engine(tiny_model("llama"), zero_stage, 3, checkpointing=True), with_plain_torch(tiny_model("llama"))
    )


def test_two_ranks_equal_plain_torch(tmp_path):
    cases = [(0, 8), (0, 1), (1, 3), (2, 2), (3, 3)]
    result = run_script("tests/engine_worker.py", tmp_path / "out.pt", *(n for case in cases for n in case), ranks=2)
    assert result.returncode == 0, result.stderr[-2000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    # ZeRO-3 with several chunks of logits, which both ranks take in equal number: else the first of them hangs.
    assert found.pop("widths") == [(12, 12), (1, 1)] * 2
    clean = with_plain_torch(tiny_model("llama"), updates=2)
    for key in [key for key in found if key[0] == "poisoned"]:
        assert_skipped(found.pop(key), clean)
    assert len(found) == 2 * len(cases)
    for (kind, _, _), values in found.items():
        assert_same(values, with_plain_torch(tiny_model(kind)))


def assert_skipped(poisoned, clean):
    """The second of three updates has changed nothing, weights and optimizer state; the others are those of `clean`."""
    norms, weights, skipped = poisoned
    assert skipped == [0, 1, 1] and not math.isfinite(norms[1])
    assert_same(([norms[0], norms[2]], weights), clean)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_or_gradient_that_is_not_finite_is_skipped_and_counted(zero_stage, dtype, poison):
    clean = with_the_engine(tiny_model("llama"), zero_stage, 4, dtype, updates=2)
    assert_skipped(with_the_engine(tiny_model("llama"), zero_stage, 4, dtype, updates=3, poison=poison), clean)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_bfloat16_keeps_float32_master_weights(zero_stage):
    wanted = with_plain_torch(tiny_model("llama"), updates=1)
    found = with_the_engine(tiny_model("llama"), zero_stage, 8, "bfloat16", updates=1)
    before = tiny_model("llama").lm_head.weight
    old, *new = (w.bfloat16().float() for w in (before, wanted[1]["lm_head.weight"], found[1]["lm_head.weight"]))
    sizes = [(w - old).abs().mean().item() for w in new]  # one step has the size that Adam gives it
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_small_steps_are_not_rounded_away_in_bfloat16(zero_stage):
    """A step of 1e-5 is below bfloat16's resolution of weights near 0.3, but a hundred of them must arrive."""
    model = tiny_model("llama")
    before = model.lm_head.weight.detach().bfloat16().clone()
    common.start_processes()
    placement = common.Placement(CPU, "bfloat16", "sdpa", zero_stage, False, ROWS)
    engine = common.train_engine(common.ResponseLogprobs(model), placement, ROWS, 1.0, False)
    for _ in range(100):
        common.backward(engine, losses(engine, slice(None), data()), True)
        common.optimizer_step(engine, 1e-5)
    with common.whole_model(engine, CPU) as whole:
        moved = (whole.lm_head.weight != before).float().mean().item()
    assert moved > 0.3


@pytest.mark.parametrize("zero_stage", STAGES)
def test_rotary_frequencies_stay_float32(zero_stage):
    model = tiny_model("llama")
    wanted = model.model.rotary_emb.inv_freq.clone()
    placement = common.Placement(CPU, "bfloat16", "sdpa", zero_stage, False, ROWS)
    common.start_processes()
    engine = common.train_engine(common.ResponseLogprobs(model), placement, ROWS, 1.0, False)
    assert torch.equal(engine.module.model.model.rotary_emb.inv_freq, wanted)
    assert torch.equal(engine.module.whole.model.rotary_emb.inv_freq, wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])  # tied and untied embeddings
@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_models_are_what_was_trained(tmp_path, tokenizer, kind, zero_stage, dtype):
    import transformers

    common.start_processes()
    placement = common.Placement(CPU, dtype, "sdpa", zero_stage, False, ROWS)
    module = common.ResponseLogprobs(tiny_model(kind, vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0))
    engine = common.train_engine(module, placement, ROWS, 1.0, False)
    for _ in range(3):
        common.backward(engine, losses(engine, slice(None), data()), True)
        common.optimizer_step(engine, 1e-2)
    common.save_model(engine, tokenizer, tmp_path / "policy", CPU)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert saved.dtype == getattr(torch, dtype)
    prompts, prompt_mask, tokens, mask, *_ = data()
    with torch.no_grad():
        trained = engine(prompts, prompt_mask, tokens, 1.0)
        torch.testing.assert_close(common.ResponseLogprobs(saved).eval()(prompts, prompt_mask, tokens, 1.0), trained)

    # The script's own check passes, and fails for other weights.
    responses = common.Responses([None] * ROWS, [""] * ROWS, prompts, prompt_mask, tokens, mask, mask.any(1))
    common.check_saved(engine, tmp_path / "policy", responses, 1.0, placement)
    tiny_model(kind, vocab_size=len(tokenizer)).to(getattr(torch, dtype)).save_pretrained(tmp_path / "policy")
    with pytest.raises(SystemExit) as error:
        common.check_saved(engine, tmp_path / "policy", responses, 1.0, placement)
    assert error.value.code == 1


def test_learning_rate_schedules():
    rates = lambda schedule, warmup: [common.scheduled(2.0, schedule, warmup, u, 10) for u in range(1, 11)]  # noqa: E731
    assert rates("constant", 0) == [2.0] * 10
    assert rates("constant", 0.2)[:3] == [1.0, 2.0, 2.0]
    assert rates("linear", 0) == pytest.approx([2 - 0.2 * i for i in range(10)])
    assert rates("cosine", 0)[5] == pytest.approx(1.0) and 0 < rates("cosine", 0)[-1] < 0.1
    assert all(r > 0 for schedule in ("linear", "cosine") for w in (0, 0.5, 1) for r in rates(schedule, w))
