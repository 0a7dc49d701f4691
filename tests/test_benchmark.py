"""The benchmarks run, on a model of no size, and their numbers are consistent."""

import collections
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, assert_ok, fields_of, forked, run_script, together

sys.path.insert(0, str(ROOT / "benchmark"))
import choice  # noqa: E402
import rows  # noqa: E402


@pytest.mark.slow
def test_the_parts_of_a_step_add_up_and_have_a_floor(tmp_path):
    flags = "--workload tiny --steps 2 --ppo-epochs 2 --results".split()
    names = ("remax", "ppo", "grpo", "spr_token", "sft", "dpo")
    cases = [("benchmark/step.py", "--script", name, *flags, tmp_path / name) for name in names]
    flags = "--tasks rule --episodes 0 --batches 3 --batch-size 4 --results".split()
    cases += [("benchmark/gradient_variance.py", *flags, tmp_path / "variance")]
    for result in together(run_script, *cases):
        assert_ok(result)
    parts = ("rollout", "scoring", "reference", "training", "rest")
    absent = dict(spr_token={"reference"}, sft={"scoring", "reference"}, dpo={"rollout", "scoring", "reference"})
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
    ratios = {row["method"]: row["ratio"] for row in rows.read_rows(tmp_path / "variance")}
    assert len(ratios) == 10 and ratios["no baseline"] == 1 and all(ratio > 0 for ratio in ratios.values())
    assert ratios["greedy, c = 1/2"] != ratios["greedy (ReMax)"] != ratios["batch mean"]


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


def test_baselines_of_siblings_are_those_of_their_papers():
    """Against plain loops, sample by sample; rewards and lengths are drawn."""
    import torch
    from gradient_variance import opo, opo_of_others, shrinkage

    generator = torch.Generator().manual_seed(0)
    X, N = 5, 3
    rewards_B = torch.randn(X * N, generator=generator, dtype=torch.float64)
    lengths_B = torch.randint(1, 9, (X * N,), generator=generator).double()
    rewards, lengths = rewards_B.view(X, N).tolist(), lengths_B.view(X, N).tolist()
    for x in range(X):
        others = [rewards[y] for y in range(X) if y != x]
        means = [statistics.fmean(group) for group in others]
        v = statistics.fmean(statistics.variance(group) / N for group in others)
        part = v / (v + statistics.pvariance(means) + 1e-6)
        for i in range(N):
            row, js = x * N + i, [j for j in range(N) if j != i]
            sums = [lengths[x][j] * rewards[x][j] for j in range(N)]
            assert opo(rewards_B, lengths_B, N)[row].item() == pytest.approx(sum(sums) / sum(lengths[x]))
            expected = sum(sums[j] for j in js) / sum(lengths[x][j] for j in js)
            assert opo_of_others(rewards_B, lengths_B, N)[row].item() == pytest.approx(expected)
            expected = (1 - part) * statistics.fmean(rewards[x][j] for j in js) + part * statistics.fmean(means)
            assert shrinkage(rewards_B, N)[row].item() == pytest.approx(expected)


def test_only_opo_s_own_sample_biases_the_gradient():
    """By enumeration: three prompts, two samples each, responses of unequal probability, length and reward."""
    import torch
    from gradient_variance import opo, opo_of_others, shrinkage

    logits_A = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    tables_XA = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [2.0, 2.0, -1.0]], dtype=torch.float64)
    logprobs_A, lengths_A = logits_A.log_softmax(0), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    exact_A = torch.autograd.grad((logprobs_A.exp() * tables_XA).sum(1).mean(), logits_A, retain_graph=True)[0]
    rows_B = torch.tensor([0, 0, 1, 1, 2, 2])
    sums = dict.fromkeys(("opo", "opo_of_others", "shrinkage"), 0.0)
    for drawn in itertools.product(range(3), repeat=6):
        drawn_B = torch.tensor(drawn)
        rewards_B, lengths_B = tables_XA[rows_B, drawn_B], lengths_A[drawn_B]
        found = dict(opo=opo(rewards_B, lengths_B, 2), opo_of_others=opo_of_others(rewards_B, lengths_B, 2))
        found["shrinkage"] = shrinkage(rewards_B, 2)
        probability = logprobs_A.detach()[drawn_B].sum().exp()
        for name, baselines_B in found.items():
            sums[name] += (probability * (rewards_B - baselines_B) * logprobs_A[drawn_B]).mean()
    for name, surrogate in sums.items():
        found_A = torch.autograd.grad(surrogate, logits_A, retain_graph=True)[0]
        assert torch.allclose(found_A, exact_A, atol=1e-9) == (name != "opo")
        assert found_A.norm() < 0.8 * exact_A.norm() or name != "opo"


def test_the_share_without_a_signal_is_that_of_tied_groups():
    import learning_signal
    import torch

    success_XN = torch.rand(3, 40_000, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.5], [0.9], [0]])
    shares = learning_signal.without_signal(success_XN.float(), torch.tensor([1.0, 1.0, 0.0]))
    for name, size in dict(grpo=8, rloo=4).items():
        expected = [2 * 0.5**size, 0.9**size + 0.1**size, 1]
        assert shares[name].tolist() == pytest.approx(expected, abs=0.02)
    assert shares["remax"].tolist() == pytest.approx([0.5, 0.9, 1], abs=0.02)  # a sample equals the greedy response


def test_shorter_runs_and_their_settings_come_from_tuned_s_rows(tmp_path):
    import learning_signal
    import tasks
    import tuned

    files = [tmp_path / "new", tmp_path / "old"]
    for path, methods in zip(files, (("remax",), ("remax", "reinforce"))):
        for method in methods:
            run = tasks.run_of(
                "rule", method, choice.Setting(1e-3 if path == files[1] else 3e-4, 0.05), 1, tuning=False
            )
            rows.append_row(path, run.row("abc1234"))
    found = [learning_signal.setting(files, method) for method in ("remax", "reinforce", "grpo")]
    assert found == [(3e-4, 0.05), (1e-3, 0.05), (1e-3, 0.05)]
    run = tasks.run_of("rule", "remax", found[0], 2, tuning=False)
    assert "--total-episodes 1600 " in learning_signal.part_of(run, 0.5).flags
    assert tuned.setting_of(learning_signal.part_of(run, 0.5).row("")) == found[0]


@dataclasses.dataclass
class Trial:
    """A method's grid as choice.py sees it; gold reward and KL are functions of the setting and the seed."""

    gold: typing.Callable
    kl: typing.Callable = lambda rate, restraint, seed: 1.0
    rates: tuple = (1, 2, 3)
    restraints: tuple = (1, 2, 3)
    most_kl: float = 5.0

    def run(self):
        """Follows the rule to its end -> the chosen setting, and the runs in their order."""
        rates = choice.Axis((0, 1, 2, 3, 4, 5), self.rates)
        restraints = choice.Axis((0, 1, 2, 3, 4, 5), self.restraints)
        results = {}
        while True:
            step = choice.next_step(results, rates, restraints, self.most_kl)
            if not step.missing:
                return step.chosen, list(results)
            for setting, seed in step.missing:
                assert (setting, seed) not in results
                results[setting, seed] = choice.Result(self.gold(*setting, seed), self.kl(*setting, seed))


def near(rate, restraint):
    """A gold reward that is highest at this setting."""
    return lambda r, c, seed: -((r - rate) ** 2) - (c - restraint) ** 2


def test_the_grid_runs_on_one_seed_and_its_four_best_settings_on_a_second():
    chosen, runs = Trial(near(2, 2)).run()
    assert chosen == (2, 2)
    assert len(runs) == 9 + 4
    assert {setting for setting, seed in runs if seed == choice.FIRST_SEED} == set(
        itertools.product((1, 2, 3), repeat=2)
    )
    second = {setting for setting, seed in runs if seed == choice.SECOND_SEED}
    assert (2, 2) in second and second < {(2, 2), (1, 2), (3, 2), (2, 1), (2, 3)}


def test_the_mean_of_both_seeds_decides_among_the_four():
    golds = {(2, 2): (0.9, 0.1), (2, 1): (0.8, 0.7), (1, 2): (0.7, 0.3), (3, 2): (0.6, 0.3), (1, 1): (0.5, 9.0)}

    def gold(rate, restraint, seed):
        first, second = golds.get((rate, restraint), (0.0, 9.0))
        return first if seed == choice.FIRST_SEED else second

    chosen, runs = Trial(gold, restraints=(0, 1, 2, 3)).run()
    assert chosen == (2, 1)  # the fifth would have won on the second seed
    assert ((1, 1), choice.SECOND_SEED) not in runs


@pytest.mark.parametrize(
    "best, most, count",
    [((4, 2), (4, 2), 9 + 3 + 3), ((0, 0), (0, 0), 9 + 7), ((2, 4), (2, 4), 9 + 3 + 3), ((9, 9), (5, 5), 9 + 7 + 9)],
)
def test_a_grid_grows_as_long_as_the_best_setting_is_at_its_end(best, most, count):
    """9 settings, then a row or a column or both at a time, until the best is inside or the scale ends."""
    chosen, runs = Trial(near(*best)).run()
    assert chosen == most
    assert len([setting for setting, seed in runs if seed == choice.FIRST_SEED]) == count


def test_a_setting_that_goes_too_far_on_either_seed_is_not_chosen():
    def kl(rate, restraint, seed):
        if (rate, restraint) == (2, 2):
            return 5.0 if seed == choice.SECOND_SEED else 4.9  # the limit itself is too far
        return 5.1 if rate == 3 else 1.0

    chosen, runs = Trial(near(2.2, 2), kl=kl, rates=(0, 1, 2, 3)).run()
    assert chosen == (2, 1)
    assert len([setting for setting, seed in runs if seed == choice.SECOND_SEED]) == 5  # the next one took its place
    assert not [setting for setting, seed in runs if seed == choice.SECOND_SEED and setting.learning_rate == 3]


def test_where_all_go_too_far_the_grid_grows_to_slower_and_nearer_settings():
    chosen, runs = Trial(near(2, 2), kl=lambda rate, restraint, seed: 9.0 if rate > 0 else 1.0).run()
    assert chosen is not None and chosen.learning_rate == 0
    chosen, runs = Trial(near(2, 2), kl=lambda *_: float("inf")).run()  # all diverge
    assert chosen is None


def test_rows_of_the_results_decide_what_is_run_next():
    """By the flags of the rows; a method without a restraint has learning rates alone; failed runs are too far."""
    import tasks
    import tuned

    def row(rate, seed, gold, kl=1.0, **more):
        run = tasks.run_of("rule", "best-of-n", choice.Setting(rate, None), seed, tuning=True)
        return run.row("abc", gold=gold, kl=kl) | more

    rows = [row(1e-4, 101, 0.5), row(3e-4, 101, 0.7), row(1e-3, 101, 0.9, kl=5.1)]
    assert tuned.tuning_step(rows, "rule", "best-of-n").missing == [((3e-3, None), 101)]
    failed = row(3e-3, 101, 9.0)
    del failed["gold"], failed["kl"]
    rows.append(failed | dict(failed="the policy's logits are not finite"))
    step = tuned.tuning_step(rows, "rule", "best-of-n")
    assert step.missing == [((3e-4, None), 102), ((1e-4, None), 102)]
    rows += [row(1e-4, 102, 0.5), row(3e-4, 102, 0.6)]
    rows += [row(1e-4, 1, 9.0) | dict(tuning=False), row(1e-4, 101, 9.0) | dict(task="reviews")]
    assert tuned.chosen(rows, "rule", "best-of-n") == tuned.chosen(rows, "rule", "best-of-n, N = 4") == (3e-4, None)
    with pytest.raises(SystemExit, match="rule, spr: no setting is chosen yet"):
        tuned.chosen(rows, "rule", "spr, N = 16")


def test_every_method_has_a_grid_of_three_or_more_values_and_its_flags_are_the_script_s():
    import tasks
    import tuned

    for task, method in itertools.product(("reviews", "rule"), tasks.METHODS):
        rates, restraints = tasks.grid(task, method)
        assert len(rates.values) >= 3
        assert len(restraints.values) >= 3 or method == "best-of-n"
        setting = choice.Setting(rates.values[0], restraints.values[-1])
        row = tasks.run_of(task, method, setting, 101, tuning=True).row("abc")
        assert tuned.setting_of(row) == setting
        module = row["script"].removesuffix(".py")
        if module in SCRIPTS:
            flags = re.findall(r" --([a-z0-9-]+)", f" {row['flags']}")
            missing = {flag.replace("-", "_") for flag in flags} - fields_of(module).keys()
            assert missing <= {"lora_rank"}, row["flags"]


def test_the_newest_final_setting_is_the_one_that_tables_show():
    import tasks
    import tuned

    def row(kl_coef, seed, **more):
        setting = choice.Setting(1e-3, kl_coef)
        return tasks.run_of("reviews", "remax", setting, seed, tuning=False).row("abc", **more)

    rows = [row(0.05, 1), row(0.05, 2), row(0.2, 1), row(0.2, 2, failed="…"), row(0.2, 3)]
    assert tuned.final_rows(rows, "reviews", "remax") == [rows[2], rows[4]]
    assert tuned.final_rows(rows, "rule", "remax") == []


@dataclasses.dataclass
class Measured:
    """A measure for run_missing that notes what it was asked for."""

    calls: list = dataclasses.field(default_factory=list)
    bad: str = ""

    def __call__(self, run, folder):
        assert folder.is_dir() and not list(folder.iterdir())
        (folder / "run").mkdir()
        self.calls.append(run.flags)
        if run.flags == self.bad:
            raise RuntimeError(run.flags)
        return dict(number=len(self.calls))


def test_rows_that_are_there_are_not_measured_again_and_an_error_keeps_those_before_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    runs = [rows.Run("t", "m", "remax.py", f"--seed {seed}", seed) for seed in (1, 2, 3, 4)]
    monkeypatch.setattr(rows, "commit", lambda: "abc1234")
    with pytest.raises(RuntimeError, match="--seed 3"):
        rows.run_missing(runs, Measured(bad="--seed 3"), path)
    assert [row["seed"] for row in rows.read_rows(path)] == [1, 2]
    again = Measured()
    made = rows.run_missing(runs + runs[:1], again, path, jobs=2, show=lambda row: f"made {row['seed']}")
    assert sorted(again.calls) == ["--seed 3", "--seed 4"]
    assert [row["seed"] for row in made] == [1, 2, 3, 4]
    assert "made 3" in capsys.readouterr().out
    keys = dict(task="t", method="m", script="remax.py", flags="--seed 1", seed=1, tuning=False, commit="abc1234")
    assert rows.read_rows(path)[0] == keys | dict(number=1)


def test_means_have_the_spread_of_their_seeds_and_tables_are_markdown():
    assert rows.mean_and_spread([1, 2, 6]) == (3, pytest.approx(7**0.5))
    assert rows.with_spread([1, 2, 6], 1) == "3.0 ± 2.6"
    assert rows.with_spread([0.125], 3) == "0.125"
    assert rows.with_spread([]) == ""
    assert rows.markdown_table(["a", "b"], [["1", ""], ["2", "3"]]) == "| a | b |\n|---|---|\n| 1 |  |\n| 2 | 3 |"
    assert rows.flag("--beta 0.3 --kl-coef 1e-2", "--kl-coef") == 0.01 and rows.flag("--beta 1", "--kl-coef") is None


def test_a_script_that_fails_is_told_and_makes_no_row(tmp_path):
    import tuned

    (tmp_path / "broken.py").write_text("raise SystemExit('error: no-such-flag')")
    run = rows.Run("rule", "remax", f"{tmp_path}/broken.py", "--no-such-flag 1")
    for measure in (rows.run_script, tuned.measure):
        with pytest.raises(RuntimeError, match="no-such-flag"):
            measure(run, tmp_path)


def test_normalised_advantages_have_mean_0_and_deviation_1_over_all_real_tokens(tmp_path):
    import torch
    from normalised import normalised

    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    advantages_BT = torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0], [4.0, 5.0, 9.0]])
    scaled_BT = normalised(advantages_BT, mask_BT)
    mean, deviation = 4.0, (40 / 6) ** 0.5  # of 1, 2, 3, 4, 5 and 9
    assert scaled_BT[mask_BT == 1].tolist() == pytest.approx([(x - mean) / deviation for x in (1, 2, 3, 4, 5, 9)])
    assert (scaled_BT[mask_BT == 0] == 0).all()
    (tmp_path / "letters.py").write_text(
        "def reward(prompts, responses, **columns): return [float(len(r)) for r in responses]\n"
        "def affine(prompts, responses, **columns): return [10.0 * len(r) + 7 for r in responses]\n"
    )
    flags = "--response-length 6 --eval-every 0 --kl-coef 0 --batch-size 8 --total-episodes 16".split()
    losses = {}
    for name in ("reward", "affine"):
        more = ["--reward-function", f"{tmp_path / 'letters.py'}:{name}", "--output-dir", tmp_path / name]
        assert_ok(run_script("benchmark/normalised.py", *flags, *more, "--micro-batch-size", 8))
        losses[name] = [row["loss"] for row in rows.read_rows(tmp_path / name / "metrics.jsonl")]
    assert len(losses["reward"]) == 2 and losses["affine"] == pytest.approx(losses["reward"], rel=1e-3)
    result = run_script("benchmark/normalised.py", *flags, "--micro-batch-size", 4)
    assert result.returncode == 2 and "holds all rows of an update" in result.stderr


@pytest.mark.slow
def test_a_step_that_does_not_end_is_killed_and_leaves_its_row(tmp_path):
    """The program below ignores the first signal, as a script does until its update ends."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
        if [ "$2" = speed ]; then trap '' TERM; for i in $(seq 600); do sleep 0.1; done; fi
        exec {sys.executable} "$@"
        """
    )
    python.chmod(0o755)
    environment = os.environ | dict(PYTHON=str(python), RESULTS=str(tmp_path / "rows"), LIMIT="1", TINY="1")
    environment["WORK"] = str(tmp_path)
    command = ["bash", str(ROOT / "benchmark" / "gpu.sh"), "speed"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    (row,) = rows.read_rows(tmp_path / "rows")
    assert set(KEYS) <= set(row)
    assert row["step"] == "failed" and row["status"] == 137
    assert "ended by status 137" in result.stdout


def test_gradients_that_are_not_finite_are_not_counted_as_finite(tmp_path):
    found = forked(smoke_with_nan, str(tmp_path))
    assert [row["tensors"] - row["finite"] for row in found] == [5, 10]  # in the first update, and in both


def smoke_with_nan(folder) -> list[dict]:
    """The smoke test of remax.py, in which the gradients of all norms are NaN: two in each layer, and the last."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    import deepspeed
    import gpu

    full_gradient = deepspeed.utils.safe_get_full_grad

    def poisoned(weight):
        gradient = full_gradient(weight)
        return gradient * float("nan") if gradient.dim() == 1 else gradient

    deepspeed.utils.safe_get_full_grad = poisoned
    results = f"{folder}/rows"
    for step in ("weights", "smoke"):
        sys.argv = ["gpu.py", step, "--folder", folder, "--results", results, "--updates", "1"]
        gpu.main()
    return [row for row in rows.read_rows(Path(results)) if row["step"] == "smoke"]


def test_the_page_says_that_no_gpu_has_run_as_long_as_there_are_no_rows():
    page = (ROOT / "benchmark" / "README.md").read_text()
    assert ("No GPU has run this" in page) == (not (ROOT / "benchmark" / "results" / "gpu.jsonl").exists())


def allocated(**flags) -> tuple[int, int, int]:
    """-> (parameters, peak, and what is there before the last step), in bytes that allocations of a training count."""
    import gc
    import tempfile

    import torch
    import transformers
    from conftest import start_backend
    from torch.profiler import ProfilerActivity, profile, record_function
    from workers.engine_worker import as_policy, data, loss_of

    import common

    backend = start_backend(**flags)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        shape = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4)
        config = transformers.LlamaConfig(**shape, vocab_size=1000, max_position_embeddings=64)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, flags["dtype"]))
        parameters = sum(weight.numel() for weight in model.parameters())  # ZeRO-3 empties them
        engine = common.train_engine(as_policy(model).engine, backend, 1.0)
        for _ in range(2):
            common.backward(engine, loss_of(engine, slice(0, 4), data()), is_last=False)
            common.backward(engine, loss_of(engine, slice(4, 8), data()), is_last=True)
            with record_function("before the step"):
                torch.empty(1)
            common.optimizer_step(engine, 1e-3)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.load(open(file.name))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    step = [event["ts"] for event in events if event.get("name") == "before the step"][-1]
    totals = [event["args"]["Total Allocated"] - before for event in memory]
    at_step = [total for event, total in zip(memory, totals) if event["ts"] < step][-1]
    return parameters, max(totals), at_step


@pytest.mark.parametrize("dtype, zero_stage", [("float32", 0), pytest.param("bfloat16", 3, marks=pytest.mark.slow)])
def test_the_arithmetic_of_memory_is_what_a_training_allocates(dtype, zero_stage):
    import memory

    parameters, peak, _ = forked(allocated_with, dtype, zero_stage, False)
    shape = memory.Shape(parameters, layers=4, width=512, keys=512, middle=2048, vocabulary=1000)
    setting = memory.Setting("sft", bf16=dtype == "bfloat16", zero_stage=zero_stage, micro_batch_size=4, tokens=14)
    parts = memory.device_bytes(shape, setting)
    del parts["cache"]
    assert peak == pytest.approx(sum(parts.values()), rel=0.06)


def test_offload_takes_20_bytes_of_the_host_per_parameter():
    parameters, _, at_step = forked(allocated_with, "bfloat16", 2, True)
    on_the_device = 2 + 2  # weights, and gradients of the last backward
    assert at_step / parameters - on_the_device == pytest.approx(20, abs=0.5)


def allocated_with(dtype, zero_stage, offload):
    return allocated(dtype=dtype, zero_stage=zero_stage, offload=offload)


def test_adapters_take_2_bytes_of_a_frozen_weight_and_20_of_a_trained_one():
    import memory

    shape = memory.SHAPES["7B"]
    parts = memory.device_bytes(shape, memory.Setting(lora_rank=16, reward_model=False))
    assert parts["frozen"] == 2 * shape.parameters
    assert parts["trained"] == 20 * 39_976_960  # of peft on Llama-2-7B, all linear layers
    both = memory.device_bytes(shape, memory.Setting(lora_rank=16))
    assert both["frozen"] == 4 * shape.parameters  # the reward model, too
    assert both["trained"] == parts["trained"]


def test_the_tables_of_tuned_methods_are_those_of_the_rows():
    import tuned

    page = (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")
    results = rows.read_rows(rows.RESULTS / "restraints.jsonl")
    for task, seeds in dict(reviews=5, rule=5, imdb=3).items():
        assert tuned.table(results, task) in page
        for method in {row["method"] for row in results if row["task"] == task and not row["tuning"]}:
            ends = tuned.final_rows(results, task, method)
            assert len(ends) == seeds
            assert tuned.setting_of(ends[0]) == tuned.tuning_step(results, task, method).chosen
    assert tuned.envelope_table(results, "reviews") in page


def table_of(page: str, title: str) -> dict[str, list[str]]:
    """The table whose first column has this title: first cell of a line -> its other cells, without bold."""
    lines = page[page.index(f"| {title} |") :].split("\n\n")[0].replace("**", "").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: others for first, *others in cells}


def rows_by_method(name: str, task: str) -> dict[str, list[dict]]:
    """Rows of a task in a file of results. Rows with adapters have the script's name as method, too: it gets a +."""
    groups = {}
    for row in rows.read_rows(rows.RESULTS / name):
        if row["task"] == task:
            method = row["method"] + "+" * ("--lora-rank" in row["flags"])
            groups.setdefault(method, []).append(row)
    return groups


def listed(values, digits=2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


SPEED = {
    "ReMax": "remax",
    "ReMax, `--lora-rank 8`": "remax+",
    "REINFORCE": "reinforce",
    "GRPO, N = 2": "grpo",
    "PPO, 1 epoch": "ppo1",
    "PPO, 4 epochs": "ppo4",
    "SPR, N = 2": "spr",
    "SPR, Algorithm 1, N = 2": "spr_token",
}
PEERS = dict(remax="TRL 1.16.0 rloo", ppo1="TRL 1.12.0 ppo1", ppo4="TRL 1.12.0 ppo4")


def test_the_table_of_speed_is_that_of_the_rows():
    """A cell with several numbers has a row for each round; the peer's rows are in the same order."""
    page = (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")
    table = table_of(page, "update")
    assert table.keys() == SPEED.keys()
    for at, task in ((0, "W1"), (3, "W2")):
        ours = rows_by_method("step.jsonl", task)
        peers = rows_by_method("peers.jsonl", task)
        assert ours.keys() == set(SPEED.values()) and peers.keys() == set(PEERS.values())
        for title, method in SPEED.items():
            seconds = [row["cpu_s"] for row in ours[method]]
            expected = [", ".join(f"{x:.3g}" if x > 10 else f"{x:.2f}" for x in seconds), ""]
            if method in PEERS:
                pairs = zip(seconds, peers[PEERS[method]], strict=True)
                expected[1] = listed(x / peer["cpu_s"] for x, peer in pairs)
            expected.append(listed(row["cpu_s"] / row["floor_cpu_s"] for row in ours[method]))
            assert table[title][at : at + 3] == expected, title
            if task == "W2":
                remax = statistics.fmean(row["cpu_s"] for row in ours["remax"])
                assert float(table[title][6]) == round(statistics.fmean(seconds) / remax, 2), title


MEMORY = {
    "ReMax, `--lora-rank 8`": "remax+",
    "reward model": "reward_model",
    "DPO": "dpo",
    "SPR": "spr",
    "supervised fine-tuning (spr.py)": "sft",
    "REINFORCE": "reinforce",
    "ReMax": "remax",
    "GRPO, N = 2": "grpo",
    "SPR, Algorithm 1": "spr_token",
    "PPO": "ppo",
}


def test_the_table_of_memory_is_that_of_the_rows():
    page = (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")
    groups = rows_by_method("memory.jsonl", "M1")
    sft, ppo = groups["sft"][-1]["peak_rss_mb"], groups["ppo"][-1]["peak_rss_mb"]
    expected = []
    for method, group in groups.items():
        row = group[-1]
        peak = row["peak_rss_mb"]
        cells = [f"{row['bytes_per_parameter']:.0f}", f"{peak:,.0f}", f"{peak / sft:.3f}", f"{peak / ppo:.2f}"]
        expected.append((peak, method, cells))
    found = table_of(page, "script | bytes per parameter, by arithmetic")
    assert [method for _, method, _ in sorted(expected)] == [MEMORY[title] for title in found]
    assert [cells for _, _, cells in sorted(expected)] == list(found.values())


def test_the_benchmark_s_table_of_gradients_is_that_of_its_rows():
    import gradient_variance

    results = rows.read_rows(rows.RESULTS / "gradient_variance.jsonl")
    assert gradient_variance.table(results) in (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_first_run_is_that_of_its_rows():
    import first_run

    results = rows.read_rows(rows.RESULTS / "first_run.jsonl")
    assert first_run.table(results) in (ROOT / "benchmark" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_long_runs_is_that_of_its_rows():
    import long_runs
    import tuned

    results = rows.read_rows(rows.RESULTS / "long_runs.jsonl")
    page = " ".join((ROOT / "benchmark" / "README.md").read_text(encoding="utf-8").split())
    assert " ".join(long_runs.table(results, 0.0125).split()) in page
    free = [row for row in results if tuned.setting_of(row).restraint == 0]
    assert sorted(collections.Counter(row["method"] for row in free).values()) == [3, 3, 3, 3]
    golds = sorted(row["gold"] for row in free)
    kls = sorted(row["kl"] for row in free)
    assert f"end at {golds[0]:.2f} to {golds[-1]:.2f} and {kls[0]:.0f} to {kls[-1]:.0f} nats (three seeds)" in page


def test_the_readme_shows_the_table_that_memory_prints():
    import memory

    assert memory.cards() in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_memory_and_scaling_print_their_tables(tmp_path, monkeypatch, capfd):
    import memory
    import scaling

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
    assert [row["batch_size"] for row in rows.read_rows(tmp_path / "s")] == [2, 4]


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
    import tasks
    import tuned

    monkeypatch.setitem(tasks.METHODS, "remax", tasks.Method("remax.py --batch-size 8", 16))
    monkeypatch.setattr(tasks.TASKS["rule"], "rates", choice.Axis((1e-4, 1e-3), (1e-4, 1e-3)))
    monkeypatch.setitem(tasks.TASKS["rule"].restraints, "kl-coef", choice.Axis((0.0, 0.05), (0.0, 0.05)))
    flags = ["tuned.py", "--tasks", "rule", "--methods", "remax"]
    for path, more in (
        (tmp_path / "a", []),
        (tmp_path / "b", []),
        (tmp_path / "b", ["--stage", "final", "--seeds", "1"]),
    ):
        monkeypatch.setattr(sys, "argv", [*flags, *more, "--results", str(path)])
        tuned.main()
    a, b = rows.read_rows(tmp_path / "a"), rows.read_rows(tmp_path / "b")

    def numbers(row):
        seconds = ("cpu_seconds", "peak_memory_mb", "points", "commit")
        return {name: value for name, value in row.items() if name not in seconds}

    assert sorted(map(str, map(numbers, a))) == sorted(map(str, map(numbers, b[:8])))
    assert len({row["flags"] for row in b}) == 9 and [row["tuning"] for row in b] == [True] * 8 + [False]
    assert {row["seed"] for row in b} == {101, 102, 1}
    assert b[8]["points"][0]["kl"] == pytest.approx(0, abs=1e-4) and b[8]["points"][0]["win_rate"] == 0.5
    monkeypatch.setattr(sys, "argv", [*flags, "--table", "--results", str(tmp_path / "b")])
    tuned.main()
    assert "| ReMax |" in capfd.readouterr().out


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
                assert {flag.replace("-", "_") for flag in flags} <= fields_of(module).keys(), row["flags"]
            count += 1
    assert count > 400


def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib", reason="only the figures need it")
    assert_ok(run_script("benchmark/figures.py", "--folder", tmp_path))
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < 80_000
