"""What is done for the first run on a GPU, without one: counted calls, simulated bytes and functions that pretend."""

import dataclasses
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, left_padded, number_tokenizer, run_here, start_backend, tiny_model
from test_frozen_models import FLAGS, OWN
from workers.engine_worker import as_policy, data, loss_of

import common

sys.path.insert(0, str(ROOT / "benchmark"))
import leaving  # noqa: E402

SAMPLING = common.Sampling(max_prompt_length=8, response_length=8, temperature=1.0, batch_size=None)


def load(folder, sampling=SAMPLING, **flags) -> common.Policy:
    sampling = dataclasses.replace(sampling)  # load_policy sets its batch size
    return common.load_policy(str(folder), number_tokenizer(), sampling, start_backend(**flags))


# ---------------------------------------------------------------- Attention and gradients


def test_cudnn_s_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    start_backend()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_gradients_of_many_micro_batches_add_up_in_float32(zero_stage):
    """16 micro-batches of the same row: in bfloat16 their sum would be rounded each time."""
    from deepspeed.utils import safe_get_full_grad

    gradients = []
    for count in (1, 16):
        backend = start_backend(zero_stage=zero_stage, dtype="bfloat16")
        engine = common.train_engine(as_policy(tiny_model("llama").bfloat16()).engine, backend, 1.0)
        for i in range(count):
            common.backward(engine, loss_of(engine, slice(0, 1), data()), is_last=i + 1 == count)
        gradients.append([safe_get_full_grad(weight).float() for weight in engine.module.parameters()])
    for one, many in zip(*gradients):
        assert (many / 16 - one).norm() <= 0.001 * one.norm()


# ---------------------------------------------------------------- Memory is told before it is gone


def test_the_cache_is_told_as_large_as_it_gets(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    policy = load(tmp_path)
    assert policy.sampling.batch_size == 128
    cache = common.roomy_cache(model.config, room=8)
    prompts_BP, mask_BP = left_padded([[5] * 8] * 128)
    with torch.no_grad():
        policy.decoder(input_ids=prompts_BP, attention_mask=mask_BP, past_key_values=cache, use_cache=True)
    num_bytes = sum(layer.key_buffer.nbytes + layer.value_buffer.nbytes for layer in cache.layers)
    assert f"Rollout: 128 rows at once, whose cache takes up to {common.gib(num_bytes)}\n" in capsys.readouterr().out


def test_the_default_is_as_many_rows_as_have_a_cache_of_16_gib(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    of_llama_2_7b = 2 * 32 * 4096 * 2  # keys and values, layers, width, bytes
    monkeypatch.setattr(common, "cache_bytes_per_token", lambda model: of_llama_2_7b)
    sampling = dataclasses.replace(SAMPLING, max_prompt_length=24, response_length=8)
    assert load(tmp_path, sampling).sampling.batch_size == 128
    monkeypatch.setattr(common, "cache_bytes_per_token", lambda model: 24 * of_llama_2_7b)  # as 768 tokens have
    assert load(tmp_path, sampling).sampling.batch_size == 42
    monkeypatch.setattr(common, "cache_bytes_per_token", lambda model: 2**40)
    assert load(tmp_path, sampling).sampling.batch_size == 1
    assert load(tmp_path, dataclasses.replace(sampling, batch_size=500)).sampling.batch_size == 500


@pytest.mark.parametrize("free, status", [(2**20, None), (2**10, 1)])
def test_a_cache_that_does_not_fit_is_refused_by_its_flag_on_a_gpu(model, tmp_path, monkeypatch, capsys, free, status):
    model.save_pretrained(tmp_path)
    backend = dataclasses.replace(start_backend(), device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
    sampling = dataclasses.replace(SAMPLING, batch_size=3)
    if status is None:
        common.load_policy(str(tmp_path), number_tokenizer(), sampling, backend)
    else:
        with pytest.raises(SystemExit) as end:
            common.load_policy(str(tmp_path), number_tokenizer(), sampling, backend)
        assert end.value.code == status
        assert "--rollout-batch-size 3: a cache of" in capsys.readouterr().err


def test_offload_tells_what_the_host_needs(model, capsys):
    backend = start_backend(zero_stage=2, offload=True)
    common.train_engine(as_policy(model).engine, backend, 1.0)
    num_bytes = 20 * sum(weight.numel() for weight in model.parameters())
    assert f"Offload: a trained model takes {common.gib(num_bytes)} of CPU memory" in capsys.readouterr().out
    assert common.gib(20 * 6.74e9) == "126 GiB" and common.gib(2**20) == "0.00098 GiB"
    common.train_engine(as_policy(tiny_model("llama")).engine, start_backend(zero_stage=2), 1.0)
    assert "Offload" not in capsys.readouterr().out


# ---------------------------------------------------------------- The load check


@pytest.mark.parametrize("script", ["spr", "dpo"])
def test_the_load_check_runs_once_however_many_evaluations_follow(tmp_path, monkeypatch, script):
    checked = []
    check_policy = common.check_policy

    def counted(policy):
        checked.append(policy.decoder.name_or_path)
        check_policy(policy)

    monkeypatch.setattr(common, "check_policy", counted)
    assert run_here(script, *FLAGS, *OWN.get(script, []), "--output-dir", tmp_path / "r") == 0
    assert len(checked) == 1


@pytest.mark.parametrize("steps, is_refused", [(1, False), (64, True)])
def test_the_load_check_grants_a_step_of_the_type_and_no_more(tmp_path, monkeypatch, steps, is_refused):
    """Logits near 32 have steps of 1/4 in bfloat16, and another kernel may give the next one."""
    model = tiny_model("llama")
    model.lm_head.weight.data *= 32 / model(torch.tensor([[0, 1]])).logits.abs().max()
    model.bfloat16().save_pretrained(tmp_path)
    forward = common.TokenLogprobs.forward

    def moved(self, *args):
        return forward(self, *args) + steps * 0.25

    monkeypatch.setattr(common.TokenLogprobs, "forward", moved)
    if is_refused:
        with pytest.raises(SystemExit):
            load(tmp_path, dtype="bfloat16")
    else:
        load(tmp_path, dtype="bfloat16")


# ---------------------------------------------------------------- Rows leave when a tenth has ended


@pytest.mark.parametrize("kind", leaving.KINDS)
def test_leaving_rows_move_the_bytes_of_the_simulation(monkeypatch, kind):
    """40 rows end at drawn lengths; counted in the decoding loop itself."""
    lengths_N = torch.tensor(leaving.lengths_of(kind, rows=40, room=48))
    model = tiny_model("gpt2").eval()
    moved = []
    reorder_cache = common.RoomyLayer.reorder_cache

    def counted(layer, rows_N):
        reorder_cache(layer, rows_N)
        moved.append(2 * layer.key_buffer.nbytes)

    in_batch = [torch.arange(40)]  # row numbers, which leave as the cache's rows do

    def end_by_length(logits_NV):
        step[0] += 1
        while len(in_batch[-1]) > len(logits_NV):
            going_N = lengths_N[in_batch[-1]] >= step[0]
            in_batch.append(in_batch[-1][going_N])
        return torch.where(lengths_N[in_batch[-1]] <= step[0], 1, 5)

    step = [0]
    monkeypatch.setattr(common.RoomyLayer, "reorder_cache", counted)
    monkeypatch.setattr(common, "sample", end_by_length)
    prompts_BP, mask_BP = left_padded([[3, 4]] * 40)
    sampling = dataclasses.replace(SAMPLING, response_length=48)
    common.generate(model, prompts_BP, mask_BP, [1], sampling, num_samples=1, greedy=False)
    per_token = model.config.n_embd * 4  # keys of a layer, float32
    of_leaving = moved[model.config.n_layer :: model.config.n_layer]  # without the copies of the prompts, one layer
    _, expected = leaving.traffic(lengths_N.tolist(), prompt_length=2, room=48, share=0.9)
    assert sum(of_leaving) == expected * per_token
    _, at_once = leaving.traffic(lengths_N.tolist(), prompt_length=2, room=48, share=1.0)
    assert expected < at_once


# ---------------------------------------------------------------- The end of a process


def test_a_process_leaves_its_group_however_it_ends():
    with patch.object(common.atexit, "register") as register:
        start_backend()
    assert common.leave_processes in [call.args[0] for call in register.call_args_list]
    with patch.object(common.dist, "destroy_process_group") as destroy:
        common.leave_processes()
    assert destroy.call_count == 1
