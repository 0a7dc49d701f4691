"""spr.py, spr_token.py and dpo.py keep no frozen model between uses: not on the device, and not in CPU memory."""

import gc
import weakref

import pytest
from conftest import EXAMPLE, run_here, short_flags

import common

FLAGS = "--total-episodes 8 --batch-size 4 --eval-every 1 --eval-size 4".split()
OWN = dict(spr="--num-samples 2 --num-epochs 1 --num-minibatches 2".split())
OWN["spr_token"] = [*OWN["spr"], "--value-epochs", "1"]
TRAINED = dict(spr=1, spr_token=2, dpo=1)
FINE_TUNING = f"--weighting uniform --num-samples 0 --dataset {EXAMPLE / 'demonstrations.jsonl'}".split()


CASES = [("spr", ""), ("spr", "--zero-stage 2 --offload"), ("spr_token", "--zero-stage 3"), ("dpo", "")]
SLOW_CASES = [("spr", "--zero-stage 3"), ("spr_token", ""), ("dpo", "--zero-stage 3")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


@pytest.mark.parametrize("script, flags", CASES)
def test_only_what_is_trained_is_in_memory_in_a_backward(tmp_path, monkeypatch, script, flags):
    assert_only_trained_models_are_alive(script, [*OWN.get(script, []), *flags.split()], tmp_path, monkeypatch)


def test_fine_tuning_holds_one_model(tmp_path, monkeypatch):
    assert_only_trained_models_are_alive("spr", FINE_TUNING, tmp_path, monkeypatch)


def assert_only_trained_models_are_alive(script, flags, folder, monkeypatch) -> None:
    loaded, alive = [], []
    load_model, backward = common.load_model, common.backward

    def remembered(*args, **kwargs):
        model = load_model(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    def counted(*args):
        alive.append(sum(model() is not None for model in loaded))
        backward(*args)

    monkeypatch.setattr(common, "load_model", remembered)
    monkeypatch.setattr(common, "backward", counted)
    gc.disable()  # nothing waits for the collector
    try:
        assert run_here(script, *FLAGS, *short_flags(script, 8), *flags, "--output-dir", folder / "r") == 0
    finally:
        gc.enable()
    assert set(alive) == {TRAINED[script]}
    assert len(loaded) > 2 * TRAINED[script]  # others were loaded, and are gone
