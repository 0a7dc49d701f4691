"""The figures of the READMEs, drawn from the result files; nothing else here needs matplotlib.

python benchmark/figures.py [--folder benchmark/results]
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = dict(rollout="#4878cf", scoring="#6acc65", reference="#b47cc7", training="#d65f5f", rest="#999999")
NAMES = {"remax": "ReMax", "reinforce": "REINFORCE", "ppo1": "PPO, 1 epoch", "ppo4": "PPO, 4 epochs"}
NAMES |= {"TRL 1.16.0 rloo": "TRL RLOO, N = 2", "TRL 1.12.0 ppo1": "TRL PPO, 1 epoch"}
NAMES |= {"TRL 1.12.0 ppo4": "TRL PPO, 4 epochs"}
METHODS = {"REINFORCE": "#999999", "RLOO, N = 2, equal prompts": "#6acc65", "ReMax": "#d65f5f"}
METHODS |= {"PPO, 1 epoch": "#4878cf", "PPO, 4 epochs": "#b47cc7"}
RULE_METHODS = dict(remax=("ReMax", 1, "#d65f5f"), rloo=("RLOO, N = 2", 2, "#6acc65"))  # samples per prompt
RULE_METHODS |= dict(ppo=("PPO, 1 epoch", 1, "#4878cf"), spr=("SPR, N = 8", 8, "#b47cc7"))
RULE_METHODS |= dict(uniform=("uniform weights, N = 8", 8, "#999999"))


def read(name: str) -> list[dict]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def step_time(workloads: list[str]):
    """CPU seconds per update, the parts of our scripts, and the floor; the median run where there are several."""
    runs = {}
    for row in read("step.jsonl") + read("peers.jsonl"):
        runs.setdefault((row["workload"], row["name"]), []).append(row)
    rows = {key: sorted(group, key=lambda row: row["cpu_s"])[len(group) // 2] for key, group in runs.items()}
    figure, axes = plt.subplots(1, len(workloads), figsize=(9, 3), layout="constrained")
    for axis, workload in zip(axes, workloads, strict=True):
        shown = [rows[workload, name] for name in NAMES if (workload, name) in rows][::-1]
        for y, row in enumerate(shown):
            left = 0.0
            for part, colour in PARTS.items():
                if part in row:
                    axis.barh(y, row[part], left=left, color=colour, label=part if y == len(shown) - 1 else None)
                    left += row[part]
            if "rollout" not in row:
                axis.barh(y, row["cpu_s"], color="#d0d0d0")
            axis.text(row["cpu_s"], y, f" {row['cpu_s']:.3g}", va="center", fontsize=8)
            if "floor_cpu_s" in row:
                axis.plot(
                    [row["floor_cpu_s"]] * 2, [y - 0.4, y + 0.4], "k", label="floor" if row is shown[-1] else None
                )
        axis.set_yticks(range(len(shown)), [NAMES[row["name"]] for row in shown], fontsize=8)
        axis.set_title(f"{workload}: CPU seconds per update, one thread", fontsize=9)
        axis.margins(x=0.12)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    return figure


def memory():
    """Peak resident memory of the scripts, with and without the imports, beside bytes per parameter; medians."""
    runs = {}
    for row in read("memory.jsonl"):
        if row["workload"] == "M1" and not row["flags"]:
            runs.setdefault(row["name"], []).append(row)
    rows = [sorted(group, key=lambda row: row["peak_rss_mb"])[len(group) // 2] for group in runs.values()]
    figure, axis = plt.subplots(figsize=(4.5, 2.4), layout="constrained")
    for y, row in enumerate(rows[::-1]):
        axis.barh(y, row["imports_mb"] / 1e3, color="#d0d0d0")
        axis.barh(y, (row["peak_rss_mb"] - row["imports_mb"]) / 1e3, left=row["imports_mb"] / 1e3, color="#4878cf")
        label = f" {row['peak_rss_mb'] / 1e3:.1f} GB; {row['bytes_per_parameter']:.0f} bytes per parameter"
        axis.text(row["imports_mb"] / 1e3 + 0.05, y, label, va="center", fontsize=8, color="white")
    axis.set_yticks(range(len(rows)), [NAMES.get(row["name"], row["name"].upper()) for row in rows[::-1]], fontsize=8)
    axis.set_title("peak memory, GPT-2 124M, float32 (grey: imports)", fontsize=9)
    return figure


def first_run():
    """Reward and gold reward in the README's first command: sampled responses of training, greedy held-out ones."""
    rows = read("first_run.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    titles = dict(reward="reward, which is trained on", gold_reward="gold reward, the truth")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        sampled = [(row["episodes"], row[name]) for row in rows if name in row]
        greedy = [(row["episodes"], row[f"eval_{name}"]) for row in rows if f"eval_{name}" in row]
        axis.plot(*zip(*sampled), color="#4878cf", linewidth=1, label="sampled responses")
        axis.plot(*zip(*greedy), "o-", color="#d65f5f", linewidth=1, label="greedy responses to held-out prompts")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("prompts", fontsize=8)
    axes[0].legend(fontsize=7)
    return figure


def learning():
    """Reward of sampled responses against episodes and against seconds: mean and standard deviation over seeds."""
    rows = read("compare.jsonl")
    columns = {0: "prompts", 3: "seconds of rollout, scoring and training"}
    columns = {i: name for i, name in columns.items() if all(len(row["curve"][0]) > i for row in rows)}  # old files: 3
    figure, axes = plt.subplots(1, len(columns), figsize=(4.5 * len(columns), 2.8), sharey=True, layout="constrained")
    axes = np.atleast_1d(axes)
    for method, colour in METHODS.items():
        curves = [row["curve"] for row in rows if row["method"] == method]
        for axis, column in zip(axes, columns, strict=True):
            x, mean, low, high = [], [], [], []
            for points in zip(*curves, strict=True):  # one point of each seed
                window = [point[1] for point in points]
                spread = statistics.stdev(window) if len(window) > 1 else 0.0
                x.append(statistics.fmean(point[column] for point in points))
                mean.append(statistics.fmean(window))
                low.append(mean[-1] - spread)
                high.append(mean[-1] + spread)
            axis.plot(x, mean, color=colour, label=method, linewidth=1)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for axis, name in zip(axes, columns.values(), strict=True):
        axis.set_xlabel(name, fontsize=8)
    axes[0].set_title("reward, mean ± standard deviation over seeds", fontsize=9)
    axes[0].legend(fontsize=7)
    return figure


def guess_and_check():
    """Success and length of the responses sampled in training on the second example: mean and range over seeds."""
    runs = {}
    for row in read("guess_and_check.jsonl"):
        runs.setdefault(row["method"], []).append(row.get("curve"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    titles = dict(reward="success of sampled responses", response_length="their tokens")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for method, (label, num_samples, colour) in RULE_METHODS.items():
            episodes = runs[method][0]["episodes"][:-1]  # before each update
            size = 5 if len(episodes) > 10 else 1  # updates to a point
            starts = range(0, len(episodes), size)
            x = [num_samples * statistics.fmean(episodes[i : i + size]) for i in starts]
            curves = [[statistics.fmean(curve[name][1:][i : i + size]) for i in starts] for curve in runs[method]]
            values = list(zip(*curves, strict=True))  # of each seed
            axis.plot(x, list(map(statistics.fmean, values)), ".-", color=colour, label=label, linewidth=1)
            axis.fill_between(x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)
        axis.set_title(f"{title}, mean and range over seeds", fontsize=9)
        axis.set_xlabel("sampled responses so far", fontsize=8)
    axes[1].legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the PNG files go")
    args = parser.parse_args()
    figures = dict(first_run=first_run(), step=step_time(["W1", "W2"]), memory=memory(), learning=learning())
    figures["guess_and_check"] = guess_and_check()
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(args.folder / f"{name}.png", dpi=110)
        print(args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
