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
from tasks import TITLES

PARTS = dict(rollout="#2f5fa8", scoring="#a8dba8", reference="#8e6bb0", training="#f2b179", rest="#777777")
NAMES = {"sft": "supervised fine-tuning", "spr": "SPR", "spr_token": "SPR, Algorithm 1", "dpo": "DPO"}
NAMES |= {"reward_model": "reward model", "reinforce": "REINFORCE", "remax": "ReMax", "ppo": "PPO"}
NAMES |= {"grpo": "GRPO", "ppo1": "PPO, 1 epoch", "ppo4": "PPO, 4 epochs"}
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
IN_THE_PICTURE = ("reinforce", "rloo, N = 4", "remax", "remax, N = 3", "grpo", "ppo, 1 epoch", "spr", "dpo")
RULE_METHODS = dict(remax=("ReMax", 1, "#d65f5f"), rloo=("RLOO, N = 2", 2, "#6acc65"))  # samples per prompt
RULE_METHODS |= dict(ppo=("PPO, 1 epoch", 1, "#4878cf"), spr=("SPR, N = 8", 8, "#b47cc7"))
RULE_METHODS |= dict(uniform=("uniform weights, N = 8", 8, "#999999"))


def read(name: str) -> list[dict]:
    return read_rows(RESULTS / name)


def step_time(workloads: list[str]):
    """CPU seconds per update, the parts of our scripts, and the floor; the median run where there are several."""
    runs = {}
    for row in read("step.jsonl") + read("peers.jsonl"):
        if "--lora-rank" not in row["flags"]:  # rows with adapters have the same method
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


def envelopes():
    """Gold reward against KL at the ends of all tuning runs: each method's upper envelope."""
    results = read("restraints.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    titles = dict(reviews="reviews: gold reward (−1 to 1)", rule="rule: share of right answers")
    for axis, (task, title) in zip(axes, titles.items(), strict=True):
        for method in IN_THE_PICTURE:
            colour, line, marker = STYLES[method]
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


def over_optimisation():
    """Gold reward against the trained-on reward in long runs, one panel per size of the reward model's training set."""
    results = read("tuned.jsonl")
    sizes = {"300": "250 pairs", "1000": "950 pairs", "all": "2,200 pairs"}  # the rest was held out
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), sharey=True, layout="constrained")
    for axis, (size, title) in zip(axes, sizes.items(), strict=True):
        for method in ("remax", "ppo, 1 epoch", "spr", "best-of-n"):
            rows = tuned.final_rows(results, f"reviews for long, {size} pairs", method)
            draw(axis, [row["points"] for row in rows], "reward", "gold", TITLES[method], *STYLES[method])
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
    args.folder.mkdir(parents=True, exist_ok=True)
    figures = dict(
        first_run=first_run(),
        step=step_time(["W1", "W2"]),
        over_optimisation=over_optimisation(),
        guess_and_check=guess_and_check(),
        which_kl=which_kl(),
        envelopes=envelopes(),
    )
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
