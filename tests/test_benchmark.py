"""The benchmarks run, on a model of no size, and what they say of themselves is consistent."""

import json
import sys

import pytest
from conftest import ROOT, assert_ok, run_script, together

sys.path.insert(0, str(ROOT / "benchmark"))


def test_the_parts_of_a_step_add_up_and_have_a_floor(tmp_path):
    flags = "--workload tiny --steps 2 --ppo-epochs 2 --results".split()
    cases = [("benchmark/step.py", "--script", s, *flags, tmp_path / s) for s in ("remax", "reinforce", "ppo", "spr")]
    for result in together(run_script, *cases):
        assert_ok(result)
    for script in ("remax", "reinforce", "ppo"):
        row = json.loads((tmp_path / script).read_text())
        assert row["name"].startswith(script) and row["workload"] == "tiny" and row["n"] == 2 and row["device"] == "cpu"
        parts = [row[part] for part in ("rollout", "scoring", "reference", "training", "rest")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(row["cpu_s"], rel=0.3, abs=0.02)
        floor = [value for name, value in row.items() if name.startswith("floor_") and name[6:] not in ("s", "cpu_s")]
        assert sum(floor) == pytest.approx(row["floor_cpu_s"], abs=1e-3) and row["peak_rss_mb"] > 100


def test_memory_and_scaling_print_their_tables(tmp_path, monkeypatch, capfd):
    import memory
    import scaling

    assert memory.bytes_per_parameter("remax", bf16=False) == 24 and memory.bytes_per_parameter("ppo", bf16=False) == 40
    assert memory.bytes_per_parameter("ppo", True, 2, 8) == 2 * (2 + 14 / 8) + 4
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):  # of a group that this process joined
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "MODELS", dict(spr=(1, 0), remax=(1, 2), ppo=(2, 2)))
    monkeypatch.setattr(scaling, "BASE", dict(width=16, batch_size=4, response_length=4, vocab_size=50))
    monkeypatch.setattr(scaling, "SWEEPS", dict(batch_size=(2, 4)))
    monkeypatch.setattr(sys, "argv", ["memory.py", "--workload", "tiny", "--results", str(tmp_path / "m")])
    memory.main()
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--steps", "1", "--results", str(tmp_path / "s")])
    scaling.main()
    out = capfd.readouterr().out
    assert "| ppo | 40 | 1.00 |" in out and "| 8 | 3 | yes |" in out and "| batch_size | 2: " in out
    rows = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
    assert [row["batch_size"] for row in rows] == [2, 4]


def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib", reason="only the figures need it")
    assert_ok(run_script("benchmark/figures.py", "--folder", tmp_path))
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < 80_000
