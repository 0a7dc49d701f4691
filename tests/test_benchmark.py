"""The benchmarks run, on a model of no size, and their numbers are consistent."""

import json
import re
import sys

import pytest
from conftest import ROOT, assert_ok, run_script, together

sys.path.insert(0, str(ROOT / "benchmark"))


def test_the_parts_of_a_step_add_up_and_have_a_floor(tmp_path):
    flags = "--workload tiny --steps 2 --ppo-epochs 2 --results".split()
    names = ("remax", "ppo", "spr", "sft")
    cases = [("benchmark/step.py", "--script", name, *flags, tmp_path / name) for name in names]
    cases += [("benchmark/gradient_variance.py", "--batches", 3, "--batch-size", 4, "--results", tmp_path / "variance")]
    for result in together(run_script, *cases):
        assert_ok(result)
    parts = ("rollout", "scoring", "reference", "training", "rest")
    absent = dict(spr={"reference"}, sft={"scoring", "reference"})
    for name in names:
        row = json.loads((tmp_path / name).read_text())
        assert row["name"].startswith(name) and row["workload"] == "tiny" and row["n"] == 2 and row["device"] == "cpu"
        assert {part for part in parts if row[part] < 1e-4} == absent.get(name, set())
        assert sum(row[part] for part in parts) == pytest.approx(row["cpu_s"], rel=0.3, abs=0.02)
        floor = [value for key, value in row.items() if key.startswith("floor_") and key[6:] not in ("s", "cpu_s")]
        assert sum(floor) == pytest.approx(row["floor_cpu_s"], abs=1e-3) and row["peak_rss_mb"] > 100
    row = json.loads((tmp_path / "variance").read_text())
    assert 0 < row["ratio"] == pytest.approx(row["trace_remax"] / row["trace_reinforce"])


@pytest.mark.slow
def test_memory_and_scaling_print_their_tables(tmp_path, monkeypatch, capfd):
    import memory
    import scaling

    assert memory.bytes_per_parameter("remax", bf16=False) == 24 and memory.bytes_per_parameter("ppo", bf16=False) == 40
    assert memory.bytes_per_parameter("ppo", True, 2, 8) == 2 * (2 + 14 / 8) + 4 / 8 + 4
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of a group that we have joined
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(scaling, "BASE", dict(width=16, batch_size=4, response_length=4, vocab_size=50))
    monkeypatch.setattr(scaling, "SWEEPS", dict(batch_size=(2, 4)))
    flags = ["--scripts", "spr", "--workload", "tiny", "--micro-batch-size", "2", "--results", str(tmp_path / "m")]
    monkeypatch.setattr(sys, "argv", ["memory.py", *flags])
    memory.main()
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--steps", "1", "--results", str(tmp_path / "s")])
    scaling.main()
    out = capfd.readouterr().out
    assert re.search(r"\| spr \| 16 \| \d+ \| \d+, \d+ \| 1\.000 \|", out)
    assert "| 8 | 3 | yes |" in out and "| batch_size | 2: " in out
    rows = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
    assert [row["batch_size"] for row in rows] == [2, 4]


@pytest.mark.slow
def test_learning_benchmarks_print_their_tables(tmp_path, monkeypatch, capfd):
    import compare
    import token_level
    import weighting

    monkeypatch.setattr(compare, "methods", lambda episodes: {"ReMax": ["remax.py", "--total-episodes", str(episodes)]})
    flags = ["--seeds", "1", "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags, "--total-episodes", "64"])
    compare.main()
    flags += "--task t --num-samples 2 --betas 1 --total-episodes 8 --batch-size 8 --num-minibatches 1".split()
    monkeypatch.setattr(sys, "argv", ["weighting.py", *flags[:2], "--results", str(tmp_path / "more"), *flags[4:]])
    weighting.main()
    flags = [*flags[:2], "--results", str(tmp_path / "token"), *flags[-6:]]
    monkeypatch.setattr(sys, "argv", ["token_level.py", *flags])
    token_level.main()
    out = capfd.readouterr().out
    assert "| ReMax (1 seeds) |" in out and "| 2 | uniform (1 seeds) |" in out
    assert "| spr.py (1 seeds) |" in out and "| spr_token.py (1 seeds) |" in out
    assert len((tmp_path / "more").read_text().splitlines()) == 3


def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib", reason="only the figures need it")
    assert_ok(run_script("benchmark/figures.py", "--folder", tmp_path))
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < 80_000
