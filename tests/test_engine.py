"""Stages, micro-batches, ranks, nodes and offloading do not change the mathematics of the engine or of a script."""

import functools
import itertools
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from unittest.mock import patch

import pytest
import torch
import transformers
from conftest import (
    EXAMPLE,
    ROOT,
    SCRIPTS,
    assert_equal_gradients,
    assert_equal_training,
    assert_ok,
    forked,
    launch,
    logprobs_of,
    read_metrics,
    recorded_batches,
    script_environment,
    short_flags,
    start_backend,
    tiny_model,
)
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file, save_file
from workers.engine_worker import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    POISONS,
    PlainWeights,
    as_policy,
    bfloat16_gradients,
    copy_weights,
    data,
    loss_of,
    on_this_rank,
    with_plain_torch,
    with_the_engine,
)
from workers.script_worker import run, run_all

import common

STAGES = [0, 1, 2, 3]
ROUNDED_GRADIENT = 60 * 2**-9  # bfloat16 rounds by 2^-9, and some 60 operations lie between a weight and the loss


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert_equal_training(found[1], expected[1], LEARNING_RATE)


# ---------------------------------------------------------------- The engine against plain torch


@pytest.mark.parametrize("kind, micro_batch_size", [("gpt2", 1), ("llama", 3), ("llama", 8)])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_stages_and_micro_batches_equal_plain_torch(kind, zero_stage, micro_batch_size):
    expected = with_plain_torch(tiny_model(kind))
    assert min(expected[0]) > 1  # so that clipping is at work
    found = with_the_engine(tiny_model(kind), zero_stage, micro_batch_size)
    assert_same(found, expected)
    assert found[2] == [0] * 5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloading_changes_nothing(zero_stage):
    assert_same(
        with_the_engine(tiny_model("llama"), zero_stage, 3, offload=True), with_plain_torch(tiny_model("llama"))
    )


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_gradient_checkpointing_changes_nothing(zero_stage):
    found = with_the_engine(tiny_model("llama"), zero_stage, 3, gradient_checkpointing=True)
    assert_same(found, with_plain_torch(tiny_model("llama")))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_reset_optimizer_is_a_new_one(zero_stage, offload):
    """Moments and the count of steps are 0 again; master weights stay as they are."""
    found = with_the_engine(tiny_model("llama"), zero_stage, 3, restart=3, offload=offload and zero_stage > 0)
    assert_same(found, with_plain_torch(tiny_model("llama"), restart=3))
    on = with_plain_torch(tiny_model("llama"))[1]["lm_head.weight"]
    assert (found[1]["lm_head.weight"] - on).abs().max() > LEARNING_RATE / 10  # else this shows nothing


def share_of_equal_weights(found, expected) -> float:
    """Of the tensor in which the fewest agree with the rounded `expected` to the last bit."""
    shares = [(found[name] == weights.bfloat16()).float().mean() for name, weights in expected.items()]
    return min(shares).item()


@pytest.mark.parametrize("restart", [None, 3])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_bfloat16_trains_float32_master_weights(zero_stage, restart):
    """Plain torch steps on the engine's own gradients, so that rounding in bfloat16 is the same on both sides.

    Float32 arithmetic is left. It differs between processors by some 2^-24 of a weight, and neighbours in bfloat16 are
    2^-8 apart, so about one weight in 2^16 is rounded to the other side.
    """
    engine = trained(tiny_model("llama"), 0, 0.0, zero_stage=zero_stage, dtype="bfloat16")
    model = tiny_model("llama")
    for p in model.parameters():  # not buffers, such as rotary frequencies
        p.data = p.data.bfloat16()
    module = as_policy(model).engine
    plain, never_restarted = PlainWeights(model), PlainWeights(model)
    for update in range(5):
        if update == restart:
            common.reset_optimizer(engine)
            plain.restart()
        common.backward(engine, loss_of(engine, slice(None), data()), True)
        names = dict(engine.module.model.named_parameters())
        gradients = {name: safe_get_full_grad(p).clone() for name, p in names.items()}
        model.zero_grad()
        loss_of(module, slice(None), data()).backward()
        for name, p in model.named_parameters():
            assert (gradients[name] - p.grad).norm() < ROUNDED_GRADIENT * p.grad.norm(), name
        norm, skipped = common.optimizer_step(engine, LEARNING_RATE)
        assert norm == pytest.approx(plain.step(gradients), rel=1e-5) and norm > MAX_GRAD_NORM and not skipped
        never_restarted.step(gradients)
        with common.gathered(engine):
            found = {name: p.detach().clone() for name, p in engine.module.model.named_parameters()}
        assert share_of_equal_weights(found, plain.named) > 0.9  # the smallest tensors have 32 weights
        for name, weights in plain.named.items():  # each is the nearest number or its neighbour
            torch.testing.assert_close(found[name].float(), weights, rtol=2**-7, atol=LEARNING_RATE / 100)
        copy_weights(model, found)
    assert (share_of_equal_weights(found, never_restarted.named) > 0.9) == (restart is None)


def assert_rounded_sum(found, rows_BN, eps):
    """The sum of the rows, where each addition has rounded by `eps` at most.

    The rows themselves may have been rounded once more than in the sum: some processors add a product to the sum before
    they round. One eps more is for the errors of errors.
    """
    bound_N = (len(rows_BN) + 2) * eps * rows_BN.abs().sum(0)
    assert ((found - rows_BN.sum(0)).abs() <= bound_N).all()


@pytest.mark.parametrize(
    "kind, zero_stage, more",
    [
        ("gpt2", 0, {}),
        ("llama", 0, {}),
        ("llama", 2, dict(offload=True)),
        ("llama", 3, dict(gradient_checkpointing=True)),
    ],
)
def test_micro_batches_change_bfloat16_gradients_by_rounding_alone(kind, zero_stage, more):
    """A row at a time is computed as if it were alone, and only the sum is rounded: by 2^-9 in bfloat16, else by 2^-24.

    With several rows at a time each of the operations before the sum may be rounded to the other side, too.
    """
    rows_BN, (one, *several) = bfloat16_gradients(kind, zero_stage, [1, 2, 4, 8], **more)
    assert_rounded_sum(one, rows_BN, 2**-9 if zero_stage == 0 else 2**-24)
    bound = ROUNDED_GRADIENT * rows_BN.norm(dim=1).sum()
    for gradient in several:
        assert (gradient - rows_BN.sum(0)).norm() <= bound
    for rows, _ in common.micro_batches(data()[3].sum(1), 4):
        assert rows_BN[rows].sum(0).norm() > bound  # a half that is lost would show


def test_two_ranks_equal_plain_torch():
    cases = [(0, 8), (0, 1), (1, 3), (2, 2), (3, 3)]
    cases = [dict(zero_stage=stage, micro_batch_size=micro) for stage, micro in cases]
    cases += [dict(zero_stage=stage, micro_batch_size=2, offload=True, restart=2) for stage in (1, 2, 3)]
    found = forked(on_this_rank, cases, ranks=2)
    for case, results in zip(cases, found["cases"]):
        for kind, values in results.items():
            assert_same(values, with_plain_torch(tiny_model(kind), restart=case.get("restart")))
    for rows_BN, (gradient,) in found["bfloat16"]:  # ranks add their sums in bfloat16
        assert_rounded_sum(gradient, rows_BN, 2**-9)
    # ZeRO-3 with several chunks of logits, which both ranks take in equal number: else the first of them hangs.
    assert found["widths"] == [(12, 12), (1, 1)] * 2
    clean = with_plain_torch(tiny_model("llama"), updates=2)
    assert len(found["poisoned"]) == len(STAGES) * len(POISONS)
    for poisoned in found["poisoned"]:
        assert_skipped(poisoned, clean)


def assert_skipped(poisoned, clean):
    """The second of three updates has changed nothing, weights and optimizer state; the others are those of `clean`."""
    norms, weights, skipped = poisoned
    assert skipped == [0, 1, 1] and not math.isfinite(norms[1])
    assert_same(([norms[0], norms[2]], weights), clean)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("dtype, poison", zip(["float32", "bfloat16"], POISONS))
def test_a_loss_or_gradient_that_is_not_finite_is_skipped_and_counted(zero_stage, dtype, poison):
    clean = with_the_engine(tiny_model("llama"), zero_stage, 4, updates=2, dtype=dtype)
    poisoned = with_the_engine(tiny_model("llama"), zero_stage, 4, updates=3, poison=poison, dtype=dtype)
    assert_skipped(poisoned, clean)


def trained(model, steps, learning_rate, **flags):
    """-> the engine after steps on the fixed data."""
    engine = common.train_engine(as_policy(model).engine, start_backend(**flags), 1.0)
    for _ in range(steps):
        common.backward(engine, loss_of(engine, slice(None), data()), True)
        common.optimizer_step(engine, learning_rate)
    return engine


@pytest.mark.parametrize("zero_stage", STAGES)
def test_small_steps_are_not_rounded_away_in_bfloat16(zero_stage):
    """A step of 1e-4 is below bfloat16's resolution of weights near 0.3, but ten of them must arrive."""
    model = tiny_model("llama")
    before = model.lm_head.weight.detach().bfloat16().clone()
    with common.gathered(trained(model, 10, 1e-4, zero_stage=zero_stage, dtype="bfloat16")):
        moved = (model.lm_head.weight != before).float().mean().item()
    assert moved > 0.3


@pytest.mark.parametrize("zero_stage", STAGES)
def test_rotary_frequencies_stay_float32(zero_stage):
    model = tiny_model("llama")
    expected = model.model.rotary_emb.inv_freq.clone()
    policy = as_policy(model)
    common.train_engine(policy.engine, start_backend(zero_stage=zero_stage, dtype="bfloat16"), 1.0)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert torch.equal(policy.decoder.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("zero_stage, offload", [(0, False), (1, False), (2, True), (3, False), (3, True)])
def test_a_frozen_model_computes_the_same_wherever_it_lies(zero_stage, offload):
    prompts, prompt_mask, tokens, *_ = data()
    with torch.no_grad():
        expected = logprobs_of(as_policy(tiny_model("llama")).engine, prompts, prompt_mask, tokens)
        policy = as_policy(tiny_model("llama"))
        frozen = common.freeze(policy.engine, start_backend(zero_stage=zero_stage, offload=offload))
        for _ in range(2):  # once before and once after its weights were gathered for a rollout
            torch.testing.assert_close(logprobs_of(frozen, prompts, prompt_mask, tokens), expected)
            with common.gathered(frozen):
                policy.decoder(torch.arange(4)[None])
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("kind, dtype", [("gpt2", "float32"), ("llama", "bfloat16")])  # tied and untied embeddings
@pytest.mark.parametrize("zero_stage", STAGES)
def test_saved_models_are_what_was_trained(tmp_path, tokenizer, kind, zero_stage, dtype):
    ids = dict(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)
    engine = trained(tiny_model(kind, **ids), 3, 1e-2, zero_stage=zero_stage, dtype=dtype)
    inputs = data()[:3]
    backend = start_backend(zero_stage=zero_stage, dtype=dtype)
    common.save_and_check(engine, tokenizer, tmp_path / "policy", backend)
    saved = as_policy(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")).engine.eval()
    assert saved.model.dtype == getattr(torch, dtype)
    with torch.no_grad():
        torch.testing.assert_close(logprobs_of(saved, *inputs), logprobs_of(engine, *inputs))


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_saved_weight_that_is_off_by_a_step_is_found(tmp_path, tokenizer, zero_stage, dtype):
    ids = dict(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)
    engine = trained(tiny_model("llama", **ids), 1, 1e-2, zero_stage=zero_stage, dtype=dtype)
    backend = start_backend(zero_stage=zero_stage, dtype=dtype)
    save_pretrained = transformers.LlamaForCausalLM.save_pretrained

    def save_almost(model, folder, **kwargs):
        save_pretrained(model, folder, **kwargs)
        weights = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        weights[name][0, 0] *= 1 + torch.finfo(weights[name].dtype).eps
        save_file(weights, folder / "model.safetensors", dict(format="pt"))

    with patch.object(transformers.LlamaForCausalLM, "save_pretrained", save_almost), pytest.raises(SystemExit) as end:
        common.save_and_check(engine, tokenizer, tmp_path / "policy", backend)
    assert end.value.code == 1
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("parameters, threads", [(10**5, 4), (30 * 10**6, 30), (10**9, 64)])
def test_a_small_model_gets_few_of_many_threads(monkeypatch, parameters, threads):
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    model = torch.nn.Linear(parameters // 100, 100, bias=False, device="meta")
    common.limit_threads(model)
    assert used == []  # OMP_NUM_THREADS is set, by conftest.py
    monkeypatch.delenv("OMP_NUM_THREADS")
    common.limit_threads(model)
    assert used == [threads]


@pytest.mark.parametrize(
    "own, spins",
    [({}, "1000"), (dict(GOMP_SPINCOUNT="77"), "77"), (dict(OMP_WAIT_POLICY="PASSIVE"), "0")],
)
def test_waiting_threads_spin_for_a_short_time(own, spins):
    """The threads' library itself says what it has read."""
    environment = script_environment() | dict(OMP_DISPLAY_ENV="verbose")
    environment.pop("GOMP_SPINCOUNT", None)  # of this process, which has imported common
    # tyro comes after torch: what common.py imports from there on would only take time.
    command = [sys.executable, "-c", "import sys; sys.modules['tyro'] = None; import common"]
    result = subprocess.run(command, cwd=ROOT, env=environment | own, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in result.stderr


def test_numbers_that_are_slow_on_a_cpu_count_as_0():
    start_backend()
    assert (torch.full((1,), 1e-38) / 100).item() == 0.0


def test_learning_rate_schedules():
    rates = lambda schedule, warmup: [common.scheduled(2.0, schedule, warmup, u, 10) for u in range(1, 11)]  # noqa: E731
    assert rates("constant", 0) == [2.0] * 10
    assert rates("constant", 0.2)[:3] == [1.0, 2.0, 2.0]
    assert rates("linear", 0) == pytest.approx([2 - 0.2 * i for i in range(10)])
    assert rates("cosine", 0)[5] == pytest.approx(1.0) and 0 < rates("cosine", 0)[-1] < 0.1
    assert common.scheduled(2.0, "constant", 0.07, 7, 100) == 2.0  # though 0.07 * 100 is a bit more than 7
    assert all(r > 0 for schedule in ("linear", "cosine") for w in (0, 0.5, 1) for r in rates(schedule, w))


# ---------------------------------------------------------------- The scripts

FLAGS = "--batch-size 8 --eval-every 5 --eval-size 7 --lr-schedule constant --warmup-ratio 0 --max-grad-norm 1"


def case(script, folder, stage, micro, rate="1e-3", more="", name=None):
    entry = SCRIPTS[script]
    short = " ".join(short_flags(script, 8))
    flags = f"{FLAGS} --total-episodes {entry.busy_episodes} {short} {entry.busy}"
    flags += f" --zero-stage {stage} --micro-batch-size {micro} --learning-rate {rate} {more}"
    if entry.data == "prompts":
        flags += f" --gold-reward-function {EXAMPLE / 'sentiment.py'}:reward"
    name = name or f"{script}-{stage}-{micro}-{rate}{more}"
    return dict(script=script, flags=[*flags.split(), "--output-dir", f"{folder}/{name}"], fixed=True)


def assert_same_training(found, expected, rate="1e-3"):
    """Gradients and weights are equal up to rounding, and metrics agree to a relative 1e-3.

    Seven held-out rows do not divide by two ranks, so one of them is dealt out twice.
    """
    assert found["status"] == expected["status"] == 0 and len(found["gradients"]) == len(expected["gradients"]) > 2
    assert_equal_gradients(found["gradients"], expected["gradients"])
    assert_equal_training(found["weights"], expected["weights"], float(rate))
    assert len(found["metrics"]) == len(expected["metrics"])
    for new, old in zip(found["metrics"], expected["metrics"]):
        if old.get("margin") == pytest.approx(0, abs=1e-6):  # DPO's first ones: rounding decides the accuracy
            new, old = new | dict(accuracy=None), old | dict(accuracy=None)
        assert new == pytest.approx(old, rel=1e-3, abs=1e-4)


@functools.cache
def on_one_rank(script):
    with tempfile.TemporaryDirectory() as folder:
        return run(**case(script, folder, 0, 16))


@pytest.mark.xdist_group("on_one_rank")
@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, offload):
    """With --offload the frozen models are ZeRO-3 engines whose parameters lie in CPU memory."""
    stages, more = ((1, 3, 2), "--offload") if offload else ((3, 1, 2, 0), "")
    stages = itertools.islice(itertools.cycle(stages), len(SCRIPTS))
    cases = [case(script, tmp_path / "two", stage, 3, more=more) for script, stage in zip(SCRIPTS, stages)]
    results = forked(run_all, cases, ranks=2)
    for script, found in zip(SCRIPTS, results, strict=True):
        assert_same_training(found, on_one_rank(script))


def test_two_ranks_equal_one_with_adapters(tmp_path):
    """The value model of ppo.py trains adapters and a whole head."""
    expected = run(**case("ppo", tmp_path / "one", 0, 16, more="--lora-rank 2"))
    (found,) = forked(run_all, [case("ppo", tmp_path / "two", 2, 3, more="--lora-rank 2")], ranks=2)
    assert_same_training(found, expected)


def test_supervised_fine_tuning_on_two_ranks_begins_with_the_loss_of_transformers(tmp_path, monkeypatch):
    batches = recorded_batches(monkeypatch)
    path = EXAMPLE / "demonstrations.jsonl"
    more = f"--weighting uniform --num-samples 0 --dataset {path} --reward-model nowhere"  # which is never loaded
    more += " --response-length 48 --num-epochs 1 --total-episodes 40"
    expected = run(**case("spr", tmp_path, 0, 16, more=more, name="one"))
    (found,) = forked(run_all, [case("spr", tmp_path, 3, 4, more=more, name="two")], ranks=2)
    assert_same_training(found, expected)

    # The mean over prompts of the negative log-likelihood of whole demonstrations, EOS included.
    policy = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(EXAMPLE / "policy")
    known = {(row["prompt"], row["completion"]) for row in map(json.loads, path.read_text().splitlines())}
    rows = [dict(prompt=prompt.text, response=prompt.answers["completion"]) for prompt in batches[0]]
    total = 0.0
    for row in rows:
        assert (row["prompt"], row["response"]) in known
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
        labels = torch.tensor([len(prompt) * [-100] + response + [tokenizer.eos_token_id]])
        ids = torch.tensor([prompt + response + [tokenizer.eos_token_id]])
        with torch.no_grad():
            total += policy(ids, labels=labels).loss.item() * (len(response) + 1)
    first = read_metrics(tmp_path / "one")[1]  # after an evaluation of the initial policy
    assert len(rows) == 8 and first["loss"] == pytest.approx(total / 8, rel=1e-4)
    assert not {"reward", "best_reward", "weighted_reward"} & first.keys()


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["1e-3", "1e-6"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_all_stages_and_micro_batches_on_one_and_on_two_ranks(tmp_path, script, rate):
    expected = run(**case(script, tmp_path, 0, 16, rate))
    cells = [(stage, micro, rate) for stage in range(4) for micro in (1, 2, 8)]
    cells += [(stage, 2, rate, "--offload") for stage in (1, 2, 3)]
    for found in forked(run_all, [case(script, tmp_path / "two", *cell) for cell in cells], ranks=2):
        assert_same_training(found, expected, rate)
    for found in forked(run_all, [case(script, tmp_path / "one", *cell) for cell in cells]):
        assert_same_training(found, expected, rate)


@pytest.mark.slow
def test_two_nodes_run_as_one(tmp_path):
    """Two launchers with a rank each, which meet on the loopback interface."""
    flags = [*FLAGS.split(), "--total-episodes", "40", "--response-length", "8", "--zero-stage", "2", "--output-dir"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        end_point = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", end_point, "--local_addr", "127.0.0.1"]
    command = [*launcher, str(ROOT / "remax.py"), *flags, str(tmp_path / "nodes")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=script_environment())
    nodes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert sorted("Saved:" in out for out in outs) == [False, True]  # rank 0 alone speaks
    assert_ok(launch("remax.py", *flags, tmp_path / "node", ranks=2))
    found, expected = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("nodes", "node"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise KeyError('no such film')"])
def test_a_rank_that_dies_ends_the_others_within_a_minute(tmp_path, end, rank, zero_stage):
    code = f"""
import os, time
calls = 0
def reward(prompts, responses, **columns):
    global calls
    calls += 1
    if calls == 3 and os.environ['RANK'] == '{rank}':
        open({str(tmp_path / "died")!r}, 'w').close()
        {end}
    return [float(len(text)) for text in responses]
"""
    (tmp_path / "f.py").write_text(code)
    flags = [*FLAGS.split(), "--eval-every", "0", "--total-episodes", "40", "--response-length", "8"]
    flags += ["--zero-stage", zero_stage, "--output-dir", tmp_path / "r"]
    flags += ["--reward-function", f"{tmp_path}/f.py:reward"]
    result = launch("remax.py", *flags, ranks=2)
    assert result.returncode == 1 and time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert ("f.py:reward raised KeyError" if "raise" in end else "SIGKILL") in result.stderr
    assert [row["update"] for row in read_metrics(tmp_path / "r")] == [1]  # the function is tried once before
