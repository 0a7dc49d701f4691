"""Curves of any runs: a panel for each metric, a line for each run. It needs matplotlib: pip install matplotlib

python examples/plot.py runs/*
python examples/plot.py runs/A runs/B --metrics reward kl entropy --output comparison.png
"""

import itertools
import json
import math
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import tyro

USUAL = ("reward", "gold_reward", "kl", "eval_reward", "eval_gold_reward", "eval_accuracy", "eval_loss")
COLOURS = ("#000000", "#b02a2a", "#5f8fe0", "#b8b8b8")  # black to light: lines differ in grey, too
DASHES = ("-", "--", "-.", ":")
STYLES = [(COLOURS[i % 4], DASHES[(i + i // 4) % 4]) for i in range(16)]


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    runs: tuple[Path, ...]
    """Folders of runs."""
    metrics: tuple[str, ...] = ()
    """Columns of metrics.jsonl; by default rewards, KL, accuracy and held-out loss, as far as the runs have them."""
    x: str = "episodes"
    """Column of the horizontal axis."""
    output: Path = Path("curves.png")
    """File of the picture."""


def fail(message) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run; a run in progress may have written only half of its last line."""
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        fail(f"{folder}: no such folder")
    if not path.is_file():
        fail(f"{folder}: it has no metrics.jsonl; give the folder of a run")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            fail(f"{path}:{number}: not a JSON object")
    return rows


def draw(plt, runs: dict[Path, list[dict]], metrics, x):
    num_columns = min(3, len(metrics))
    num_rows = math.ceil(len(metrics) / num_columns)
    size = (3.4 * num_columns, 2.4 * num_rows + 0.2 * len(runs))
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for axis, name in itertools.zip_longest(axes.flat, metrics):
        if name is None:
            axis.remove()
            continue
        for (folder, rows), (colour, dash) in zip(runs.items(), itertools.cycle(STYLES)):
            points = [row for row in rows if row.get(x) is not None and row.get(name) is not None]
            style = dict(color=colour, linestyle=dash, linewidth=1.2)
            if name.startswith("eval_"):
                style |= dict(marker="o", markersize=3)
            axis.plot([row[x] for row in points], [row[name] for row in points], label=str(folder), **style)
        axis.set_xlabel(x, fontsize=8)
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", frameon=False)
    return figure


def main() -> None:
    args = tyro.cli(Args)
    if not args.runs:
        fail("give one run or more, as in: plot.py runs/*")
    runs = {folder: read_metrics(folder) for folder in args.runs}
    columns = list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row))
    metrics = args.metrics or [name for name in USUAL if name in columns] or ["reward"]
    for name in (args.x, *metrics):
        if name not in columns:
            fail(f"no run has the metric {name!r}; there are: {', '.join(columns)}")
    try:
        import matplotlib
    except ImportError:
        fail("plot.py needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    figure = draw(plt, runs, metrics, args.x)
    try:
        figure.savefig(args.output, dpi=110)
    except (OSError, ValueError) as error:
        fail(f"--output {args.output}: {error}")
    print(args.output)


if __name__ == "__main__":
    main()
