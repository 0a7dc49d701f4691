"""spr.py: its pure functions against closed forms and enumeration, and the script as a user runs it."""

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_ok, read_metrics, run_script, script_environment, together
from safetensors.torch import load_file
from test_algorithm import VOCABULARY, Language, batch, padded, sentences
from test_resume import finish, started, told

import common
import spr

DRAW = torch.Generator().manual_seed(0)


# ---------------------------------------------------------------- Pure functions


@pytest.mark.parametrize("beta", [0.01, 1.0, 30.0])
def test_empirical_weights_are_a_softmax_and_do_not_mind_a_constant(beta):
    rewards = torch.randn(6, 5, generator=DRAW) * 3
    weights = spr.sample_weights(rewards, spr.reference_value(rewards, beta), beta)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, (rewards.double() / beta).softmax(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
    shifted = rewards.double() + 17.0
    torch.testing.assert_close(spr.sample_weights(shifted, spr.reference_value(shifted, beta), beta), weights)
    wanted = [beta * math.log(sum(math.exp(r / beta) for r in row)) for row in (rewards / 10).tolist()]
    torch.testing.assert_close(spr.reference_value(rewards / 10, beta).tolist(), wanted)


def test_the_limits_of_beta_are_best_of_n_and_uniform():
    rewards = torch.randn(7, 4, generator=DRAW)
    rewards[0, 1] = rewards[0, 3] = 9.0  # a tie
    for beta, weighting in ((1e-4, "best-of-n"), (1e6, "uniform")):
        beta = beta * (rewards.max() - rewards.min()).item()
        limit = spr.weights_of(rewards, weighting, beta=math.nan)
        torch.testing.assert_close(spr.weights_of(rewards, "spr", beta), limit, rtol=0, atol=1e-5)
    assert spr.weights_of(rewards, "best-of-n", 1.0)[0].tolist() == [0, 0.5, 0, 0.5]
    assert (spr.weights_of(rewards, "uniform", 1.0) == 0.25).all()


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_beta_that_is_no_temperature_is_refused(beta):
    rewards = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="beta"):
        spr.reference_value(rewards, beta)
    with pytest.raises(ValueError, match="beta"):
        spr.sample_weights(rewards, torch.zeros(1), beta)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_linex_loss_is_least_at_the_closed_form(beta):
    rewards = torch.randn(5, 6, generator=DRAW, dtype=torch.float64)
    reference = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([reference], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = spr.linex_loss(rewards, reference, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = beta * ((rewards / beta).logsumexp(1) - math.log(6))
    torch.testing.assert_close(reference.detach(), wanted, rtol=1e-6, atol=1e-6)
    # With β log N more, it is the sum form, whose weights add up to 1.
    weights = spr.sample_weights(rewards, reference + beta * math.log(6), beta)
    torch.testing.assert_close(weights, spr.weights_of(rewards, "spr", beta), rtol=1e-5, atol=1e-6)


def test_the_linex_loss_is_finite_far_away_and_its_gradient_keeps_its_sign():
    reference = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    loss = spr.linex_loss(torch.tensor([[1e6], [-1e6], [6.0]]), reference, 1.0)
    (gradient,) = torch.autograd.grad(loss, reference)
    assert loss.isfinite() and gradient.isfinite().all()
    assert gradient[0] < 0 < gradient[1] and gradient[2] == pytest.approx(-(math.exp(5) - 1) / 3)
    inside = spr.linex_loss(torch.tensor([[5.0, -2.0]]), torch.zeros(1), 1.0).item()
    assert inside == pytest.approx((math.exp(5) - 6 + math.exp(-2) + 1) / 2)


def test_weighted_nll_matches_a_slow_reference_and_adds_up():
    _, _, logprobs, noise, mask = batch()
    generator = torch.Generator().manual_seed(3)
    rows, tokens = torch.rand(5, generator=generator, dtype=torch.float64), torch.rand(5, 7, generator=generator)
    for weights in (rows, tokens):
        wanted = 0.0
        for i, t in mask.nonzero().tolist():
            wanted -= (weights[i] if weights.dim() == 1 else weights[i, t]).item() * logprobs[i, t].item() / 3
        found = spr.weighted_nll(logprobs, weights, mask, 3)
        assert found.item() == pytest.approx(wanted, rel=1e-5) and found.dtype == torch.float32
        parts = [spr.weighted_nll(logprobs[i : i + 2], weights[i : i + 2], mask[i : i + 2], 3) for i in (0, 2, 4)]
        assert sum(parts).item() == pytest.approx(wanted, rel=1e-5)
        hidden = logprobs + 1e4 * noise * (1 - mask)
        assert spr.weighted_nll(hidden, weights, mask.bool(), torch.tensor(3)).item() == found.item()
        weights.requires_grad_()
        assert torch.autograd.grad(
            spr.weighted_nll(logprobs, weights, mask, 3).requires_grad_(), weights, allow_unused=True
        ) == (None,)


def test_exact_updates_follow_theorem_1_and_never_lose_expected_reward():
    """On a language that can be enumerated: the weighted likelihood is greatest at the closed form, again and again."""
    policy, beta = Language(0), 0.7
    rewards = torch.randn(len(sentences()), generator=DRAW, dtype=torch.float64)
    masks_BT = torch.cat([padded(torch.ones(len(s)), 0) for s in sentences()])
    expected = []
    for _ in range(6):
        old_B = torch.stack([policy.logprobs(s).sum() for s in sentences()]).detach()
        expected.append((old_B.exp() * rewards).sum().item())
        reference = beta * (old_B + rewards / beta).logsumexp(0)  # eq. 8: the expectation under π_k
        weights_B = old_B.exp() * spr.sample_weights(rewards[None], reference[None], beta)[0]
        new_B = old_B.exp() * ((rewards - reference) / beta).exp()  # Theorem 1
        assert new_B.sum().item() == pytest.approx(1)
        for context, i in policy.row.items():  # the closed form, as the logits of each context
            for word in range(VOCABULARY):
                follows = [s[: len(context) + 1] == (*context, word) for s in sentences()]
                policy.logits.data[i, word] = new_B[torch.tensor(follows)].sum().log()
        logprobs_BT = torch.cat([padded(policy.logprobs(s), 3.0) for s in sentences()])
        (gradient,) = torch.autograd.grad(spr.weighted_nll(logprobs_BT, weights_B, masks_BT, 1), policy.logits)
        assert gradient.abs().max() < 1e-12
    assert all(b > a for a, b in itertools.pairwise(expected)) and expected[-1] > expected[0] + 0.5


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_repeated_targets_are_the_returns_of_dynamic_programming(gamma):
    rewards, _, _, values, mask = batch()
    wanted = torch.zeros_like(values)
    for i, n in enumerate(mask.sum(1).tolist()):
        for t in range(n):
            wanted[i, t] = gamma ** (n - 1 - t) * rewards[i]
    for sweep in range(1, 9):
        values = spr.value_targets(rewards, values, mask, gamma) + 5.0 * (1 - mask)  # masked values do not matter
        for i, n in enumerate(mask.sum(1).tolist()):
            known = slice(max(0, n - sweep), n)  # each sweep carries the reward back by one token
            torch.testing.assert_close(values[i, known], wanted[i, known])


# ---------------------------------------------------------------- The script

SMALL = "--iterations 2 --prompts-per-iteration 16 --batch-size 8 --epochs-per-iteration 1 --num-samples 4".split()
SMALL += "--response-length 12 --eval-size 7 --eval-every 1 --learning-rate 1e-3".split()
DEMONSTRATIONS = str(common.EXAMPLE / "demonstrations.jsonl")
SFT = ("--weighting", "uniform", "--num-samples", "0", "--dataset", DEMONSTRATIONS, "--response-length", "48")
SFT += ("--reward-model", "nowhere")  # is never loaded


def weights(folder) -> dict:
    return load_file(folder / "policy" / "model.safetensors")


def assert_equal_weights(a, b, **tolerance) -> None:
    a, b = weights(a), weights(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or dict(rtol=0, atol=0)))


def samples_of(folder, k: int) -> list[dict]:
    return common.read_rows(folder / f"iteration-{k}" / "samples.jsonl")


def test_it_learns_and_reports(tmp_path):
    flags = "--iterations 2 --prompts-per-iteration 128 --batch-size 32 --num-samples 4 --learning-rate 1e-3".split()
    flags += "--eval-size 64 --eval-every 1 --response-length 32 --gold-reward-function".split()
    gold = common.EXAMPLE / "sentiment.py:reward"
    result = run_script("spr.py", *flags, gold, "--output-dir", tmp_path / "r")
    assert_ok(result)
    rows = read_metrics(tmp_path / "r")
    assert [row["update"] for row in rows] == list(range(17))
    first, middle, last = rows[0], rows[8], rows[16]
    assert first["eval_win_rate"] == 0.5 and first["eval_kl"] == pytest.approx(0, abs=1e-4)
    assert last["reward"] > middle["reward"] + 0.7 and last["eval_reward"] > first["eval_reward"] + 1
    assert last["eval_win_rate"] > 0.6 and "eval_gold_reward" in last and last["episodes"] == 256
    for row in (middle, last):
        assert row["reward"] < row["weighted_reward"] < row["best_reward"] and 1 < row["weight_ess"] < 4
        assert row["seconds_rollout"] > 0 and row["seconds_score"] > 0 and row["seconds_train"] > 0
        assert row["peak_memory_bytes"] >= max(r["peak_memory_bytes"] for r in rows[1:8])  # of all phases
    assert "on held-out data" in result.stdout and "Win rate:" in result.stdout
    for k in (1, 2):
        rows = samples_of(tmp_path / "r", k)
        rewards = torch.tensor([row["reward"] for row in rows]).view(-1, 4).double()
        found = torch.tensor([row["weight"] for row in rows], dtype=torch.float64).view(-1, 4)
        torch.testing.assert_close(found, rewards.softmax(1), rtol=1e-5, atol=1e-8)  # β is 1
    prompts = [[row["prompt"] for row in samples_of(tmp_path / "r", k)[::4]] for k in (1, 2)]
    assert len(prompts[0]) == 128 and not set(prompts[0]) & set(prompts[1])  # the next slice


def test_the_limits_of_beta_train_the_same_models(tmp_path):
    cases = dict(best=("--weighting", "best-of-n"), cold=("--beta", "1e-4"))
    cases |= dict(uniform=("--weighting", "uniform"), hot=("--beta", "1e7"))
    flags = [*SMALL, "--iterations", "1", "--eval-every", "0"]
    runs = [("spr.py", *flags, *more, "--output-dir", tmp_path / name) for name, more in cases.items()]
    for result in together(run_script, *runs):
        assert_ok(result)
    assert_equal_weights(tmp_path / "best", tmp_path / "cold", rtol=1e-4, atol=1e-6)
    assert_equal_weights(tmp_path / "uniform", tmp_path / "hot", rtol=1e-4, atol=1e-5)
    difference = [
        (a - b).abs().max() for a, b in zip(*(weights(tmp_path / n).values() for n in ("best", "hot")), strict=True)
    ]
    assert max(difference) > 1e-4


def test_supervised_fine_tuning_does_not_depend_on_ranks_stages_and_micro_batches(tmp_path):
    flags = ("spr.py", *SMALL, *SFT)
    cases = [(*flags, "--micro-batch-size", "8", "--output-dir", tmp_path / "one")]
    cases += [(*flags, "--micro-batch-size", "3", "--output-dir", tmp_path / "small")]
    for result in together(run_script, *cases):
        assert_ok(result)
    assert_ok(run_script(*flags, "--zero-stage", "3", "--output-dir", tmp_path / "two", ranks=2))
    for name in ("small", "two"):
        assert_equal_weights(tmp_path / "one", tmp_path / name, rtol=1e-4, atol=5e-5)

    # The loss is the mean negative log-likelihood of whole demonstrations, EOS included, here by transformers alone.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(common.EXAMPLE / "policy").eval()
    rows = samples_of(tmp_path / "one", 1)
    indices = common.shuffled_indices(16, 1 + 1, 0, 8)
    tokenizer, total = common.load_tokenizer(str(common.EXAMPLE / "policy")), 0.0
    for row in (rows[i] for i in indices):
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert row["tokens"] == tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1).gather(1, torch.tensor(row["tokens"])[:, None]).sum().item()
    metrics = read_metrics(tmp_path / "one")
    assert metrics[1]["loss"] == pytest.approx(total / 8, rel=1e-4)
    assert "reward" not in metrics[2] and "eval_reward" not in metrics[-1] and "eval_kl" in metrics[-1]


def test_demonstrations_join_the_samples_after_the_threshold(tmp_path):
    flags = ("--dataset", DEMONSTRATIONS, "--sampling-threshold", "1", "--response-length", "48")
    assert_ok(run_script("spr.py", *SMALL, *flags, "--eval-dataset", DEMONSTRATIONS, "--output-dir", tmp_path / "r"))
    first, second = samples_of(tmp_path / "r", 1), samples_of(tmp_path / "r", 2)
    assert len(first) == 16 and all(row["weight"] == pytest.approx(1) for row in first)
    assert len(second) == 16 * 5
    known = {(row["prompt"], row["completion"]) for row in map(json.loads, open(DEMONSTRATIONS))}
    assert all((row["prompt"], row["response"]) in known for row in first + second[4::5])
    assert 0 <= read_metrics(tmp_path / "r")[-1]["eval_win_rate_reference"] <= 1


def start(*flags) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "spr.py"), *map(str, flags)]
    return subprocess.Popen(
        command, env=script_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(path, lines: int) -> None:
    for _ in range(1200):
        if path.exists() and len(path.read_bytes().splitlines()) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {lines} lines")


def comparable(folder) -> list[dict]:
    return [{k: v for k, v in r.items() if "seconds" not in k and "memory" not in k} for r in read_metrics(folder)]


def test_a_killed_run_goes_on_without_generating_anything_again(tmp_path):
    flags = [*SMALL, "--prompts-per-iteration", "64", "--save-every", "2"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    reference = start(*flags, "--output-dir", whole)
    process = start(*flags, "--output-dir", torn)
    path = torn / "iteration-1" / "samples.jsonl"
    wait_for(path, 16)
    process.kill()  # in the middle of generating
    process.communicate()
    time.sleep(0.3)  # its child dies with it
    kept = path.read_bytes()
    assert 0 < len(kept.splitlines()) < 256
    path.write_bytes(kept + b'{"prompt": "torn')
    process = start("--resume", torn)
    wait_for(torn / "metrics.jsonl", 5)
    process.kill()  # in the middle of training
    process.communicate()
    process = start("--resume", torn)
    wait_for(torn / "iteration-2" / "samples.jsonl", 16)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert process.returncode == 143 and f"--resume {torn}" in out and "Traceback" not in out
    assert_ok(run_script("spr.py", "--resume", torn))
    reference.communicate()
    assert reference.returncode == 0
    assert_equal_weights(whole, torn)
    assert comparable(whole) == comparable(torn)
    for k in (1, 2):
        assert samples_of(whole, k) == samples_of(torn, k)
    first = [json.loads(line)["response"] for line in kept.splitlines()]
    assert first == [row["response"] for row in samples_of(torn, 1)[: len(first)]]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--level token --weighting uniform", "--level token weights samples"),
        ("--reference learned --weighting best-of-n", "--reference learned needs --weighting spr"),
        ("--num-samples 0", "demonstrations are wanted, but there is no column 'completion'"),
        ("--offload", "needs --zero-stage 1, 2 or 3"),
        ("--batch-size 600", "--batch-size 600 is more than"),
        ("--beta 0", "is not a number above 0"),
        ("--reward-model nowhere", "nowhere: no tokenizer could be loaded"),
        ("--reward-function nowhere.py:reward", "no such reward function"),
    ],
)
def test_wrong_flags_are_told_in_one_line(flags, message, tmp_path):
    result = run_script("spr.py", *flags.split(), "--output-dir", tmp_path / "r")
    text = " ".join(result.stderr.replace("│", " ").split())
    assert result.returncode == 2 and message in text and "Traceback" not in text
    assert not (tmp_path / "r").exists()  # so that the same command, mended, runs


MASTERS = """
import sys, torch, common
from pathlib import Path
rank, _, device = common.start_processes()
placement = common.Placement(device, "bfloat16", "sdpa", int(sys.argv[2]), False, 2)
def engine():
    return common.train_engine(common.load_policy(str(common.EXAMPLE / "policy"), placement), placement, 2, 1.0, False)
first, inputs = engine(), (torch.arange(8).view(2, 4), torch.ones(2, 4).long(), torch.arange(10).view(2, 5), 1.0)
def step(engine):
    common.backward(engine, -engine(*inputs).mean(), True)
    common.optimizer_step(engine, 1e-6)
step(first)
folder = Path(sys.argv[1])
common.save_master_weights(first, folder / "one.safetensors")
second = engine()
common.load_master_weights(second, folder / "one.safetensors")
common.save_master_weights(second, folder / "two.safetensors")
step(second)
common.save_master_weights(second, folder / "three.safetensors")
"""


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_float32_masters_are_handed_over_unrounded(zero_stage, tmp_path):
    command = [sys.executable, "-c", MASTERS, str(tmp_path), str(zero_stage)]
    result = subprocess.run(command, env=script_environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert_ok(result)
    one, two, three = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two", "three"))
    name = "model.transformer.h.0.mlp.c_fc.weight"
    assert all(torch.equal(one[key], two[key]) for key in one) and one[name].dtype == torch.float32
    assert (one[name] != one[name].bfloat16().float()).any()  # what the saved model rounds
    assert 0 < (three[name] - one[name]).abs().max() < 1e-5  # and what is trained goes on from there


@pytest.mark.slow
def test_bfloat16_goes_on_from_the_masters(tmp_path):
    flags = [*SMALL, "--dtype", "bfloat16", "--save-every", "1"]
    assert_ok(run_script("spr.py", *flags, "--output-dir", tmp_path / "r"))
    assert not list((tmp_path / "r" / "policy").glob("masters*"))
    assert read_metrics(tmp_path / "r")[-1]["update"] == 4


@pytest.mark.slow
def test_a_reward_function_that_computes_in_parallel_at_import_does_not_hang(tmp_path):
    """Its threads must not be started in the process that forks the others."""
    (tmp_path / "mine.py").write_text(
        "import torch\nTABLE = torch.ones(4_000_000).add(1.0)\n"
        "def reward(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n"
    )
    flags = [*SMALL, "--iterations", "1", "--eval-every", "0", "--reward-function", f"{tmp_path / 'mine.py'}:reward"]
    command = [sys.executable, str(ROOT / "spr.py"), *flags, "--output-dir", str(tmp_path / "r")]
    environment = script_environment() | dict(OMP_NUM_THREADS="2")
    assert_ok(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200))


def test_the_last_position_of_the_model_can_be_used(tmp_path):
    flags = "--iterations 1 --prompts-per-iteration 4 --batch-size 4 --epochs-per-iteration 1 --num-samples 1".split()
    flags += "--eval-every 0 --max-prompt-length 64 --response-length 64".split()
    token = ("--level", "token", "--output-dir", tmp_path / "token")
    one, other = together(run_script, ("spr.py", *flags, "--output-dir", tmp_path / "r"), ("spr.py", *flags, *token))
    assert_ok(one)
    assert other.returncode == 2 and "is more than the model's 128 positions" in other.stderr


# ---------------------------------------------------------------- Fitted values


def test_fitted_values_approach_those_of_dynamic_programming(tmp_path):
    """The real phases, on all sentences of a language of three words, each as often as the policy says it."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "spr_worker.py"), str(tmp_path)],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_ok(result)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["spread"] > 0.5  # there is something to fit
    for name in ("q_error", "w_error", "sequence_w_error"):
        assert report[name] < 0.12 * report["spread"], report
    assert report["weight_error"] < 0.15


def test_token_level_and_learned_reference_run_end_to_end(tmp_path):
    token = ("--level", "token", "--td-sweeps", "2", "--output-dir", tmp_path / "token")
    learned = ("--reference", "learned", "--output-dir", tmp_path / "learned")
    for result in together(run_script, ("spr.py", *SMALL, *token), ("spr.py", *SMALL, *learned)):
        assert_ok(result)
    for name in ("token", "learned"):  # the fits lose none of the rows that were there
        rows = read_metrics(tmp_path / name)
        assert [row["update"] for row in rows] == list(range(5)) and all("eval_reward" in rows[i] for i in (0, 2, 4))
        evaluated = [row["update"] for row in common.read_rows(tmp_path / name / "samples.jsonl")]
        assert evaluated == [0] * 7 + [2] * 7 + [4] * 7
        assert not (tmp_path / name / "values").exists()
    row = samples_of(tmp_path / "token", 2)[0]
    assert len(row["weight"]) == len(row["tokens"]) and all(w > 0 for w in row["weight"])
    assert all(row["weight"] > 0 for row in samples_of(tmp_path / "learned", 2))
    phases = [row["phase"] for row in common.read_rows(tmp_path / "token" / "phases.jsonl")]
    assert phases.count("fit_action_values") == 4 and phases.count("fit_reference") == 2
    for name in ("token", "learned"):
        assert {"reward", "weighted_reward", "weight_ess", "value_loss"} <= read_metrics(tmp_path / name)[-1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("ranks, zero_stage", [(1, 0), (1, 3), (2, 0), (2, 2), (2, 3)])
def test_killed_again_and_again(tmp_path, ranks, zero_stage):
    """SIGKILLs at random moments, of all processes at once, until it is done; then as a run that was left alone."""
    flags = [*SMALL, "--save-every", "1", "--zero-stage", zero_stage, "--output-dir"]
    whole, parts, kills = tmp_path / "whole", tmp_path / "parts", 0
    while not (parts / "policy").exists():
        if parts.exists() and not (parts / "args.json").exists():  # killed while it opened its folder
            parts = parts.with_name(f"{parts.name}-again")
        command = ["--resume", parts] if parts.exists() else [*flags, parts]
        with started([ROOT / "spr.py", *command], ranks) as processes:
            end = time.time() + random.uniform(4, 10)
            while time.time() < end and None in (codes := [process.poll() for process in processes]):
                time.sleep(0.02)
            assert set(codes) <= {None, 0}, told(processes)
            kills += None in codes
    finish([ROOT / "spr.py", "--resume", parts], ranks)
    finish([ROOT / "spr.py", *flags, whole], ranks)
    print(f"{kills} kills")
    assert kills and comparable(whole) == comparable(parts)
    assert_equal_weights(whole, parts)
    assert all(samples_of(whole, k) == samples_of(parts, k) for k in (1, 2))
