"""Draws the figures of the READMEs from the result files. Only this program needs matplotlib.

python benchmark/figures.py [--folder benchmark/results]
"""

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tuned
from PIL import Image
from rows import RESULTS, mean_and_spread, read_rows
from tasks import METHODS, SIZES, TITLES

PARTS = dict(rollout="#2f5fa8", scoring="#a8dba8", reference="#8e6bb0", training="#f2b179", rest="#777777")
NAMES = {"sft": "supervised fine-tuning", "spr": "SPR", "spr_token": "SPR, Algorithm 1", "dpo": "DPO"}
NAMES |= {"reward_model": "reward model", "reinforce": "REINFORCE", "remax": "ReMax", "ppo": "PPO"}
NAMES |= {"ppo1": "PPO, 1 epoch", "ppo4": "PPO, 4 epochs"}
NAMES |= {"TRL 1.16.0 rloo": "TRL RLOO, N = 2", "TRL 1.12.0 ppo1": "TRL PPO, 1 epoch"}
NAMES |= {"TRL 1.12.0 ppo4": "TRL PPO, 4 epochs"}
# Colour, line and marker of each method of tuned.py.
STYLES = {
    "reinforce": ("#999999", ":", "o"),
    "reinforce, normalised": ("#999999", "-", "p"),
    "rloo, N = 4": ("#59a14f", "-", "s"),
    "remax": ("#c0182a", "-", "o"),
    "remax, N = 3": ("#c0182a", "--", "v"),
    "remax, fitted": ("#f28e2b", "-", "^"),
    "remax, LoRA rank 1": ("#e8838d", ":", "<"),
    "remax, LoRA rank 8": ("#e8838d", "-", ">"),
    "grpo": ("#8c6d31", "-", "h"),
    "dr-grpo": ("#8c6d31", "--", "H"),
    "ppo, 1 epoch": ("#2f5fa8", "--", "D"),
    "ppo, 4 epochs": ("#2f5fa8", "-", "D"),
    "spr": ("#6a2c91", "-", "P"),
    "spr, token level": ("#6a2c91", ":", "d"),
    "best-of-n": ("#b59ac9", "--", "X"),
    "dpo": ("#000000", "-", "*"),
}
RULE_METHODS = dict(remax=("ReMax", 1, "#d65f5f"), rloo=("RLOO, N = 2", 2, "#6acc65"))  # samples per prompt
RULE_METHODS |= dict(ppo=("PPO, 1 epoch", 1, "#4878cf"), spr=("SPR, N = 8", 8, "#b47cc7"))
RULE_METHODS |= dict(uniform=("uniform weights, N = 8", 8, "#999999"))


def read(name: str) -> list[dict]:
    return read_rows(RESULTS / name)


def step_time(workloads: list[str]):
    """CPU seconds per update, the parts of our scripts, and the floor; the median run where there are several."""
    runs = {}
    for row in read("step.jsonl") + read("peers.jsonl"):
        runs.setdefault((row["task"], row["method"]), []).append(row)
    rows = {key: sorted(group, key=lambda row: row["cpu_s"])[len(group) // 2] for key, group in runs.items()}
    figure, axes = plt.subplots(1, len(workloads), figsize=(9, 3), layout="constrained")
    for axis, workload in zip(axes, workloads, strict=True):
        shown = [rows[workload, name] for name in NAMES if (workload, name) in rows][::-1]
        for y, row in enumerate(shown):
            left = 0.0  # where the next part begins
            for part, colour in PARTS.items():
                if part in row:
                    axis.barh(y, row[part], left=left, color=colour, label=part if y == len(shown) - 1 else None)
                    left += row[part]
            if "rollout" not in row:
                axis.barh(y, row["cpu_s"], color="#d0d0d0")
            right = max(row["cpu_s"], left, row.get("floor_cpu_s", 0))
            axis.text(right, y, f"  {row['cpu_s']:.3g}", va="center", fontsize=8)
            if "floor_cpu_s" in row:
                axis.plot(
                    [row["floor_cpu_s"]] * 2, [y - 0.4, y + 0.4], "k", label="floor" if row is shown[-1] else None
                )
        axis.set_yticks(range(len(shown)), [NAMES[row["method"]] for row in shown], fontsize=8)
        axis.set_title(f"{workload}: CPU seconds per update, one thread", fontsize=9)
        axis.margins(x=0.12)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    return figure


def memory():
    """Peak resident memory of the scripts, with and without the imports, beside bytes per parameter; medians."""
    runs = {}
    for row in read("memory.jsonl"):
        if row["task"] == "M1":
            runs.setdefault(row["method"], []).append(row)
    shown = [runs[name] for name in NAMES if name in runs][::-1]
    rows = [sorted(group, key=lambda row: row["peak_rss_mb"])[len(group) // 2] for group in shown]
    figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for y, row in enumerate(rows):
        imports, peak = row["imports_mb"] / 1e3, row["peak_rss_mb"] / 1e3
        axis.barh(y, imports, color="#d0d0d0")
        axis.barh(y, peak - imports, left=imports, color="#2f5fa8")
        label = f" {peak:.1f} GB; {row['bytes_per_parameter']:.0f} bytes per parameter"
        axis.text(peak, y, label, va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [NAMES[row["method"]] for row in rows], fontsize=8)
    axis.set_xlabel("gigabytes, of which imports grey", fontsize=8)
    axis.set_xlim(0, 11)
    axis.set_title("peak memory of the process, GPT-2 of 124 million parameters, float32", fontsize=9)
    return figure


def first_run():
    """Rewards of sampled responses in the README's first command and without a KL penalty: mean and range of seeds."""
    rows = read("first_run.jsonl")
    styles = {"remax": ("default", "#000000", "-"), "remax, no KL penalty": ("--kl-coef 0", "#9a6a2f", "--")}
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.7), layout="constrained")
    titles = dict(reward="reward, which is trained on", gold_reward="gold reward, the truth")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for method, (label, colour, line) in styles.items():
            curves = [row["curves"][name][1:] for row in rows if row["method"] == method]
            smooth = [[statistics.fmean(curve[i : i + 5]) for i in range(0, 100, 5)] for curve in curves]
            seeds = list(zip(*smooth, strict=True))
            updates = range(3, 100, 5)
            axis.plot(updates, [statistics.fmean(values) for values in seeds], line, color=colour, label=label)
            low, high = [min(values) for values in seeds], [max(values) for values in seeds]
            axis.fill_between(updates, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("updates", fontsize=9)
    axes[0].legend(fontsize=9, frameon=False)
    return figure


def draw(axis, runs: list[list[dict]], x: str, y: str, label: str, colour: str, line: str, marker: str):
    """A line through the runs' means; at its end a marker with the standard deviations."""
    points = list(zip(*runs, strict=True))  # at each point of the paths, those of all runs
    xs = [mean_and_spread([point[x] for point in of_runs]) for of_runs in points]
    ys = [mean_and_spread([point[y] for point in of_runs]) for of_runs in points]
    axis.plot(
        [mean for mean, _ in xs],
        [mean for mean, _ in ys],
        color=colour,
        linestyle=line,
        linewidth=1.3,
        marker=".",
        markersize=3,
    )
    (last_x, x_spread), (last_y, y_spread) = xs[-1], ys[-1]
    axis.errorbar(
        last_x,
        last_y,
        xerr=x_spread,
        yerr=y_spread,
        elinewidth=0.7,
        color=colour,
        marker=marker,
        markersize=6,
        linestyle=line,
        label=label,
    )


def tuned_runs(task: str) -> dict[str, list[dict]]:
    """Method -> the final rows of tuned.jsonl at its newest setting."""
    results = read("tuned.jsonl")
    runs = {method: tuned.final_rows(results, task, method) for method in METHODS | SIZES}
    return {method: rows for method, rows in runs.items() if rows}


def envelopes():
    """Gold reward against KL at the ends of all tuning runs: each method's upper envelope."""
    results = read("restraints.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    titles = dict(reviews="reviews: gold reward (−1 to 1)", rule="rule: share of right answers")
    for axis, (task, title) in zip(axes, titles.items(), strict=True):
        for method, (colour, line, marker) in STYLES.items():
            upper = tuned.envelope(results, task, method)
            if upper:
                x = [end["kl"] for end in upper]
                y = [end["gold"] for end in upper]
                style = dict(color=colour, linestyle=line, marker=marker, markersize=5, linewidth=1.3)
                axis.plot(x, y, label=TITLES[method], **style)
        axis.set_title(title, fontsize=9)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlabel("KL to the initial policy, nats per response", fontsize=9)
        axis.grid(alpha=0.25)
    axes[1].set_ylim(bottom=0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center", frameon=False)
    return figure


def samples():
    """SPR and Best-of-N with 4, 8 and 16 samples per prompt, beside DPO and PPO, over generated responses."""
    runs = tuned_runs("reviews")
    lines = {"spr, N = 4": ("SPR, N = 4", "#b59ac9", "-", "v"), "spr": ("SPR, N = 8", "#6a2c91", "-", "P")}
    lines |= {"spr, N = 16": ("SPR, N = 16", "#2b0f3f", "-", "^")}
    lines |= {"best-of-n, N = 4": ("Best-of-N, N = 4", "#f5b981", "--", "v")}
    lines |= {"best-of-n": ("Best-of-N, N = 8", "#f28e2b", "--", "P")}
    lines |= {"best-of-n, N = 16": ("Best-of-N, N = 16", "#a4540b", "--", "^")}
    for method in ("ppo, 1 epoch", "ppo, 4 epochs"):
        lines[method] = (TITLES[method], *STYLES[method])
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    titles = dict(gold="gold reward (−1 to 1)", win_rate="win rate over the initial policy (gold)")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for method, style in lines.items():
            if method in runs:
                points = [row["points"] for row in runs[method]]
                seen = [64 * update for update in tuned.UPDATES] if method.startswith("ppo") else range(0, 6401, 1600)
                points = [[point | dict(seen=x) for x, point in zip(seen, run, strict=True)] for run in points]
                draw(axis, points, "seen", name, *style)
        if "dpo" in runs:
            mean = statistics.fmean(row[name] for row in runs["dpo"])
            axis.axhline(mean, color="black", linewidth=0.8, linestyle="-.", label="DPO, at its end")
        axis.set_xlabel("generated responses", fontsize=9)
        axis.set_ylabel(title, fontsize=9)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center", frameon=False)
    return figure


def over_optimisation():
    """Gold reward against the trained-on reward in long runs, one panel per size of the reward model's training set."""
    sizes = {"300": "300 pairs", "1000": "1,000 pairs", "all": "all 2,083 pairs"}
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), sharey=True, layout="constrained")
    for axis, (size, title) in zip(axes, sizes.items(), strict=True):
        runs = tuned_runs(f"reviews for long, {size} pairs")
        for method in ("remax", "ppo, 1 epoch", "spr", "best-of-n"):
            if method in runs:
                points = [row["points"] for row in runs[method]]
                draw(axis, points, "reward", "gold", TITLES[method], *STYLES[method])
        axis.set_title(f"reward model trained on {title}", fontsize=9)
        axis.set_xlabel("its reward, sampled responses", fontsize=9)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("gold reward of sampled responses (−1 to 1)", fontsize=9)
    figure.legend(*axes[-1].get_legend_handles_labels(), fontsize=8, loc="outside right center", frameon=False)
    return figure


def guess_and_check():
    """Success and length of the sampled responses while training on the second example: mean and range over seeds."""
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


def which_kl():
    """Cosine and length of each penalty's expected gradient beside the true one, over the distance."""
    styles = {
        "k1 in the reward": dict(color="#000000", linestyle="-", marker="o"),
        "k2 in the loss": dict(color="#2f5fa8", linestyle="--", marker=""),
        "k3 × ratio in the loss": dict(color="#2f5fa8", linestyle="", marker="s", markerfacecolor="white"),
        "k3 in the loss": dict(color="#c0182a", linestyle="-.", marker="v"),
        "k1 in the loss": dict(color="#888888", linestyle=":", marker="x"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for name, style in styles.items():
        rows = [row for row in read("which_kl.jsonl") if row["method"] == name]
        for axis, key in zip(axes, ("cosine", "length"), strict=True):
            shown = [row for row in rows if row[key] is not None]  # a gradient of 0 has no direction
            x = [row["kl"] for row in shown]
            axis.plot(x, [row[key] for row in shown], label=name, linewidth=1.3, markersize=4.5, **style)
    axes[0].set_title("cosine with the gradient of KL(π ‖ π_ref)", fontsize=9)
    axes[1].set_title("length, relative to that gradient", fontsize=9)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("KL(π ‖ π_ref), nats", fontsize=8)
    axes[1].legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the PNG files go")
    args = parser.parse_args()
    figures = dict(first_run=first_run(), step=step_time(["W1", "W2"]), memory=memory())
    figures |= dict(guess_and_check=guess_and_check(), samples=samples(), over_optimisation=over_optimisation())
    figures["which_kl"] = which_kl()
    figures["envelopes"] = envelopes()
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        path = args.folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        Image.open(path).quantize(128).save(path, optimize=True)  # a third of the bytes
        print(path)


if __name__ == "__main__":
    main()
