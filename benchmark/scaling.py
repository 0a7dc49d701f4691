"""How the cost of an update grows with model size, prompts per batch, response length and vocabulary.

    python benchmark/scaling.py [--script remax]

Four points each around a GPT-2 of width 192 with 32 prompts of 16 tokens, 48 response tokens and 1,000 token ids; each
in a process of its own (step.py). The exponent of a part is the slope of log seconds over log size between the last
two points, where fixed costs matter least; 1 is linear. Appends to benchmark/results/scaling.jsonl.
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
import workloads
from rows import RESULTS, Run, append_row, commit, markdown_table, measure_step

PARTS = ("cpu_s", "rollout", "scoring", "reference", "training")
BASE = dict(width=192, batch_size=32, response_length=48, vocab_size=1000)
SWEEPS = dict(
    width=(96, 192, 384, 768),
    batch_size=(16, 32, 64, 128),
    response_length=(24, 48, 96, 192),
    vocab_size=(1000, 4000, 16000, 64000),
)


@dataclass
class Args:
    script: str = "remax"
    """Script to measure."""
    steps: int = 3
    """Updates to take the median of."""
    results: Path = RESULTS / "scaling.jsonl"
    """File that the results are appended to."""


def measure(script: str, steps: int, width: int, batch_size: int, response_length: int, vocab_size: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        shape = dict(n_embd=width, n_layer=4, n_head=4, n_positions=256, vocab_size=vocab_size)
        workloads.save_policy(Path(folder, "policy"), "gpt2", **shape)
        flags = ["--script", script, "--model", Path(folder, "policy"), "--no-floor", "--steps", steps]
        flags += ["--batch-size", batch_size, "--response-length", response_length, "--prompt-length", 16]
        return measure_step(*flags)


def size_of(knob: str, value: int) -> float:
    """The number that the cost should be linear in; for the width it is the number of parameters in the blocks."""
    return 12 * 4 * value**2 if knob == "width" else value


def main() -> None:
    args = tyro.cli(Args)
    head, lines = commit(), []
    for knob, values in SWEEPS.items():
        rows = []
        for value in values:
            point = BASE | {knob: value}
            row = measure(args.script, args.steps, **point)
            flags = f"--script {args.script} --steps {args.steps}"
            run = Run(f"scaling, {knob}", args.script, "benchmark/scaling.py", flags)
            numbers = {name: row[name] for name in (*PARTS, "peak_rss_mb", "device")}
            rows.append(run.row(head, **point, **numbers))
            append_row(args.results, rows[-1])
        growth = math.log(size_of(knob, rows[-1][knob]) / size_of(knob, rows[-2][knob]))
        slopes = {part: math.log(max(rows[-1][part], 1e-9) / max(rows[-2][part], 1e-9)) / growth for part in PARTS}
        points = ", ".join(f"{row[knob]}: {row['cpu_s']:.2f}" for row in rows)
        lines.append([knob, points, *(f"{slopes[part]:.2f}" for part in PARTS)])
    print(markdown_table(["what grows", "seconds per update", "all", *PARTS[1:]], lines))


if __name__ == "__main__":
    main()
