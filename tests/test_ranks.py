"""Ranks, ZeRO stages and micro-batches do not change the mathematics of any script."""

import json
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, assert_ok, read_metrics, run_script, script_environment
from safetensors.torch import load_file
from script_worker import run

FLAGS = "--total-episodes 40 --batch-size 8 --eval-every 0 --lr-schedule constant --warmup-ratio 0 --max-grad-norm 1"
OWN = dict(
    remax="--response-length 8",
    reinforce="--response-length 8 --num-samples 2 --baseline leave-one-out",
    ppo="--response-length 8 --num-epochs 2",
    reward_model="",
)


def case(script, folder, stage, micro, rate="1e-3"):
    flags = f"{FLAGS} {OWN[script]} --zero-stage {stage} --micro-batch-size {micro} --learning-rate {rate}".split()
    return dict(script=script, flags=[*flags, "--output-dir", f"{folder}/{script}-{stage}-{micro}-{rate}"], fixed=True)


def assert_same(found, wanted, rate="1e-3"):
    """Gradients of all steps to a relative 1e-5; weights to a hundredth of a step, since Adam enlarges noise."""
    assert found["status"] == wanted["status"] == 0
    for new, old in zip(found["gradients"], wanted["gradients"], strict=True):
        assert (new - old).norm() < 1e-5 * old.norm() and old.norm() > 0
    for name, weights in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weights, rtol=1e-6, atol=0.01 * float(rate))


def on_two_ranks(folder, cases):
    (folder / "cases.json").write_text(json.dumps(cases))
    assert_ok(run_script("tests/script_worker.py", folder / "out.pt", folder / "cases.json", ranks=2))
    return torch.load(folder / "out.pt", weights_only=True)


def test_two_ranks_equal_one(tmp_path):
    cells = [(script, stage, 2) for script, stage in zip(SCRIPTS, (3, 1, 2, 0), strict=True)]
    results = on_two_ranks(tmp_path, [case(cell[0], tmp_path / "two", *cell[1:]) for cell in cells])
    for (script, *_), found in zip(cells, results, strict=True):
        assert_same(found, run(**case(script, tmp_path / "one", 0, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["1e-3", "1e-6"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_all_stages_and_micro_batches_on_one_and_on_two_ranks(tmp_path, script, rate):
    wanted = run(**case(script, tmp_path, 0, 16, rate))
    cells = [(stage, micro) for stage in range(4) for micro in (1, 2, 8)]
    for found in on_two_ranks(tmp_path, [case(script, tmp_path / "two", *cell, rate) for cell in cells]):
        assert_same(found, wanted, rate)
    for cell in cells:
        assert_same(run(**case(script, tmp_path / "one", *cell, rate)), wanted, rate)


@pytest.mark.slow
def test_two_nodes_run_as_one(tmp_path):
    """Two launchers with a rank each, which meet on the loopback interface."""
    flags = [*FLAGS.split(), "--response-length", "8", "--zero-stage", "2", "--output-dir"]
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
    assert_ok(run_script("remax.py", *flags, tmp_path / "node", ranks=2))
    found, wanted = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("nodes", "node"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


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
    flags = [*FLAGS.split(), "--response-length", "8", "--zero-stage", zero_stage, "--output-dir", tmp_path / "r"]
    result = run_script("remax.py", *flags, "--reward-function", f"{tmp_path}/f.py:reward", ranks=2)
    assert result.returncode == 1 and time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert ("f.py:reward raised KeyError" if "raise" in end else "SIGKILL") in result.stderr
    assert [row["update"] for row in read_metrics(tmp_path / "r")] == [1, 2]
