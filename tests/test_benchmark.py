"""The benchmarks run, on a model of no size, and their numbers are consistent."""

import json
import re
import sys

import pytest
from conftest import ROOT, SCRIPTS, assert_ok, flags_of, run_script, together

sys.path.insert(0, str(ROOT / "benchmark"))


def test_the_parts_of_a_step_add_up_and_have_a_floor(tmp_path):
    flags = "--workload tiny --steps 2 --ppo-epochs 2 --results".split()
    names = ("remax", "ppo", "spr", "spr_token", "sft", "reward_model", "dpo")
    cases = [("benchmark/step.py", "--script", name, *flags, tmp_path / name) for name in names]
    flags = "--tasks rule --episodes 0 --batches 3 --batch-size 4 --results".split()
    cases += [("benchmark/gradient_variance.py", *flags, tmp_path / "variance")]
    for result in together(run_script, *cases):
        assert_ok(result)
    parts = ("rollout", "scoring", "reference", "training", "rest")
    absent = dict(spr={"reference"}, spr_token={"reference"}, sft={"scoring", "reference"})
    absent |= dict.fromkeys(("reward_model", "dpo"), {"rollout", "scoring", "reference"})
    for name in names:
        row = json.loads((tmp_path / name).read_text())
        assert row["method"].startswith(name) and row["task"] == "tiny" and row["n"] == 2 and row["device"] == "cpu"
        assert row["flags"] == f"--script {name} --workload tiny --steps 2 --ppo-epochs 2"  # and no path of a machine
        assert {part for part in parts if row[part] < 1e-4} == absent.get(name, set())
        assert sum(row[part] for part in parts) == pytest.approx(row["cpu_s"], rel=0.3, abs=0.02)
        floor = [value for key, value in row.items() if key.startswith("floor_") and key[6:] not in ("s", "cpu_s")]
        assert sum(floor) == pytest.approx(row["floor_cpu_s"], abs=1e-3) and row["peak_rss_mb"] > 100
        # Nothing is as fast as a large product; the tiny model's products are far from it.
        assert 0 < row["product_cpu_s"] < row["floor_cpu_s"]
    rows = {row["method"]: row for row in map(json.loads, (tmp_path / "variance").read_text().splitlines())}
    assert len(rows) == 7 and rows["no baseline"]["ratio"] == 1 and all(row["ratio"] > 0 for row in rows.values())
    assert rows["greedy, c = 1/2"]["ratio"] != rows["greedy (ReMax)"]["ratio"] != rows["batch mean"]["ratio"]


def test_the_multiply_adds_of_an_update_are_those_of_its_matrix_products():
    """Counted by torch, of the floor's parts: forward and backward through all positions, logits of some."""
    import step
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=64, bos_token_id=0)
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config)
    tokens_BL = torch.randint(60, (6, 5 + 7))
    with FlopCounterMode(display=False) as counter:
        step.nll(model, tokens_BL, 7).backward()
    # FlopCounterMode counts attention over all pairs of tokens; a causal one needs about half of them.
    pairs = 3 * 6 * 2 * 32 * 12**2
    for script in ("sft", "dpo"):  # both train on two rows of each prompt
        ours = step.multiply_adds(step.Args(script=script), config, B=3, P=5, T=7) + pairs
        assert ours == pytest.approx(counter.get_total_flops() / 2, rel=0.03)


def test_the_fitted_baseline_is_least_squares_without_the_row():
    import torch
    from fitted import fitted_baselines

    generator = torch.Generator().manual_seed(0)
    greedy_B = torch.randn(9, generator=generator)
    for slope in (-1.0, 0.4, 2.0):
        rewards_B = slope * greedy_B + torch.randn(9, generator=generator) / 3 + 5
        baselines_B = fitted_baselines(rewards_B, greedy_B)
        for i in range(9):
            others = [j for j in range(9) if j != i]
            x_N1 = torch.stack([greedy_B[others], torch.ones(8)], 1)
            fitted = torch.linalg.lstsq(x_N1, rewards_B[others, None]).solution[0, 0].clamp(0, 1)
            assert (0 < fitted < 1) == (slope == 0.4)
            expected = fitted * greedy_B[i] + (rewards_B[others] - fitted * greedy_B[others]).mean()
            assert baselines_B[i].item() == pytest.approx(expected.item(), abs=1e-5)
            changed_B = rewards_B.clone()
            changed_B[i] += 100  # a row's own sample plays no part in its baseline, so the gradient stays unbiased
            assert fitted_baselines(changed_B, greedy_B)[i].item() == pytest.approx(baselines_B[i].item(), abs=1e-4)
    same_B = torch.ones(4)
    assert fitted_baselines(torch.tensor([0.0, 1, 2, 3]), same_B).tolist() == pytest.approx([2, 5 / 3, 4 / 3, 1])


def test_the_setting_with_the_highest_gold_reward_below_the_limit_of_kl_is_chosen():
    import tuned

    def row(rate, seed, gold, kl, **more):
        names = dict(task="rule", method="remax", learning_rate=rate, beta=None, seed=seed, tuning=True)
        return names | dict(gold=gold, kl=kl) | more

    rows = [row(1e-4, 101, 0.5, 1.0), row(1e-4, 102, 0.6, 1.0), row(3e-4, 101, 0.7, 1.0), row(3e-4, 102, 0.6, 4.9)]
    rows += [
        row(1e-3, 101, 0.9, 1.0),
        row(1e-3, 102, 0.9, 5.1),
        row(3e-3, 101, 0.9, 1.0),
        row(3e-3, 102, 0, 0, failed=""),
    ]
    assert tuned.chosen(rows, "rule", "remax") == (3e-4, None)
    assert tuned.chosen([r | dict(kl=1.0) for r in rows], "rule", "remax") == (1e-3, None)
    assert tuned.chosen(rows[:4] + rows[4:5] + [row(3e-4, 1, 9, 1) | dict(tuning=False)], "rule", "remax") == (
        3e-4,
        None,
    )


def test_gold_rewards_are_compared_at_equal_kl():
    import tuned

    points = [dict(kl=0.0, gold=0.0), dict(kl=2.0, gold=0.5), dict(kl=1.0, gold=0.6), dict(kl=4.0, gold=0.9)]
    assert [tuned.gold_at(points, kl) for kl in (0.5, 2, 3, 5)] == pytest.approx([0.125, 0.5, 0.8, 0.9])
    far = [dict(kl=4.0, points=points), dict(kl=4.0, points=points)]
    near = [dict(kl=1.0, points=[dict(kl=0.0, gold=0.0), dict(kl=1.0, gold=gold)]) for gold in (0.1, 0.3)]
    assert tuned.lead(near, far) == "-0.05 ± 0.10" and tuned.lead(far, near) == "+0.05 ± 0.10"


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
def test_spr_s_two_algorithms_make_rows_and_a_table(tmp_path, monkeypatch, capfd):
    import token_level

    flags = ["--seeds", "1", "--results", str(tmp_path / "rows")]
    flags += "--total-episodes 8 --batch-size 8 --num-minibatches 1".split()
    monkeypatch.setattr(sys, "argv", ["token_level.py", *flags])
    for _ in range(2):  # the second time nothing is run
        token_level.main()
        out = capfd.readouterr().out
        assert "| spr.py (1 seeds) |" in out and "| spr_token.py (1 seeds) |" in out
    assert len((tmp_path / "rows").read_text().splitlines()) == 2


@pytest.mark.slow
def test_tuned_runs_its_grid_then_the_chosen_setting_and_repeats_to_the_same_numbers(tmp_path, monkeypatch, capfd):
    import tuned

    monkeypatch.setattr(tuned, "METHODS", dict(remax=("remax.py --batch-size 8", 16)))
    monkeypatch.setattr(tuned, "RATES", (1e-4, 1e-3))
    flags = ["tuned.py", "--tasks", "rule", "--methods", "remax"]
    for path, more in (
        (tmp_path / "a", []),
        (tmp_path / "b", []),
        (tmp_path / "b", ["--stage", "final", "--seeds", "1"]),
    ):
        monkeypatch.setattr(sys, "argv", [*flags, *more, "--results", str(path)])
        tuned.main()
    a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "a", tmp_path / "b"))

    def numbers(row):
        seconds = ("cpu_seconds", "peak_memory_mb", "points", "commit")
        return {name: value for name, value in row.items() if name not in seconds}

    assert sorted(map(str, map(numbers, a))) == sorted(map(str, map(numbers, b[:4])))
    assert len({row["flags"] for row in b}) == 5 and [row["tuning"] for row in b] == [True] * 4 + [False]
    assert b[4]["points"][0]["kl"] == pytest.approx(0, abs=1e-4) and b[4]["points"][0]["win_rate"] == 0.5
    monkeypatch.setattr(sys, "argv", [*flags, "--table", "--results", str(tmp_path / "b")])
    tuned.main()
    assert "| remax (1 seeds) |" in capfd.readouterr().out


KEYS = ("task", "method", "seed", "tuning", "commit", "script", "flags")


def test_only_a_penalty_in_the_reward_has_the_gradient_of_the_kl():
    import torch
    import which_kl

    distance, true, found = which_kl.gradients(scale=2.4, seed=1)
    assert distance > 1
    torch.testing.assert_close(found["k1 in the reward"], true, rtol=1e-10, atol=1e-12)
    assert found["k1 in the loss"].abs().max() < 1e-12
    torch.testing.assert_close(found["k3 × ratio in the loss"], found["k2 in the loss"], rtol=1e-10, atol=1e-12)
    for name in ("k2 in the loss", "k3 in the loss"):
        assert torch.cosine_similarity(found[name].flatten(), true.flatten(), dim=0) < 0.95


def test_the_table_of_penalties_is_that_of_the_rows():
    rows = [json.loads(line) for line in (ROOT / "benchmark/results/which_kl.jsonl").read_text().splitlines()]
    page = (ROOT / "benchmark" / "README.md").read_text()
    header = re.search(r"\| penalty \|(.*)\|", page)[1]
    distances = re.findall(r"KL ([\d.]+)", header)
    assert len(distances) == 4
    for method in {row["method"] for row in rows}:
        shown = [row for row in rows if row["method"] == method and f"{row['kl']:.2f}" in distances]
        cells = [f"{row['cosine']:.2f}, {row['length']:.2f}" if row["length"] else "no gradient" for row in shown]
        assert f"| {method} | {' | '.join(cells)} |" in page


def test_losses_equal_those_of_a_peer():
    rows = [json.loads(line) for line in (ROOT / "benchmark/results/losses.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"grpo", "dr-grpo", "dpo", "reward_model"}
    for row in rows:
        assert row["peer"].startswith("TRL 1.16.0") and row["largest_difference"] < 1e-6
        assert row["ours"] == pytest.approx(row["peers"], abs=1e-6)


def test_every_row_of_the_results_says_how_it_is_measured_again():
    count = 0
    for path in (ROOT / "benchmark" / "results").glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            assert set(KEYS) <= set(row), path
            assert (ROOT / row["script"]).exists() and re.fullmatch("[0-9a-f]{7,}", row["commit"]), row
            module = row["script"].removesuffix(".py")
            if module in SCRIPTS:  # and no flag has been renamed or removed since
                flags = re.findall(r" --([a-z0-9-]+)", f" {row['flags']}")
                assert {flag.replace("-", "_") for flag in flags} <= flags_of(module).keys(), row["flags"]
            count += 1
    assert count > 400


def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib", reason="only the figures need it")
    assert_ok(run_script("benchmark/figures.py", "--folder", tmp_path))
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < 80_000
