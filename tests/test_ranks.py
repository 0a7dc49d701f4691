"""Ranks, ZeRO stages and micro-batches do not change the mathematics of any script."""

import json

import pytest
import torch
from conftest import SCRIPTS, assert_ok, run_script
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
