"""Peak memory of each script beside the arithmetic, and the arithmetic for models of 1.3B and 7B parameters.

    python benchmark/memory.py [--scripts sft spr spr_token reinforce remax ppo reward_model dpo] [--repeats 1]

Each script runs in a process of its own (step.py) for three updates of two or more micro-batches on random weights, so
that Adam's moments and accumulated gradients are in memory; the reward model is as large as the policy. The arithmetic
counts resident bytes per parameter. A trained model has weights, gradients and Adam's two moments (float32: 4 + 4 + 8;
bfloat16: 2 + 2 and 12 for float32 master weights and moments; during its step also a float32 copy of the gradients, 4);
a frozen one has weights alone. It leaves out activations, the cache of a rollout, logits and the imports. Appends to
benchmark/results/memory.jsonl.
"""

import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, ROOT, Run, append_row, commit, markdown_table, measure_step

# script: (models that are trained, models that are frozen), all of one size. spr.py and spr_token.py have their reward
# model in memory only while gradients are not, and dpo.py asks its reference before it trains.
MODELS = dict(sft=(1, 0), spr=(1, 0), spr_token=(2, 0), reinforce=(1, 2), remax=(1, 2), ppo=(2, 2))
MODELS |= dict(reward_model=(1, 0), dpo=(1, 0))
SIZES = {"1.3B": 1.3e9, "7B": 6.7e9}


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(MODELS)
    """Scripts to measure, in turn."""
    repeats: int = 1
    """Runs of each script."""
    workload: str = "M1"
    """See workloads.py."""
    micro_batch_size: int = 8
    """Rows per forward and backward."""
    flags: str = ""
    """Further flags of the scripts."""
    results: Path = RESULTS / "memory.jsonl"
    """File that the results are appended to."""


def bytes_with_adapters(script: str, bf16: bool) -> int:
    """Resident bytes per parameter where adapters are trained, which are too few to count: frozen weights alone."""
    trained, frozen = MODELS[script]
    shared = 1 if frozen == 2 else 0  # the reference is the policy's own weights
    return (2 if bf16 else 4) * (trained + frozen - shared)


def bytes_per_parameter(script: str, bf16: bool, zero_stage: int = 0, ranks: int = 1, offload: bool = False) -> float:
    """Resident bytes on one device, per parameter of the policy.

    ZeRO shards optimizer state (stage 1), gradients (2) and weights (3); but rollouts gather the policy's weights.
    With offload the device holds no optimizer state and one frozen model at a time. One model steps at a time.
    """
    trained, frozen = MODELS[script]
    weights, gradients, state, copy = (2, 2, 12, 4) if bf16 else (4, 4, 8, 0)
    gathered = weights * (1 - 1 / ranks) if zero_stage == 3 else 0
    optimizer = 0 if offload else (trained * state + copy) / (ranks if zero_stage >= 1 else 1)
    gradients /= ranks if zero_stage >= 2 else 1
    weights /= ranks if zero_stage == 3 else 1
    return trained * (weights + gradients) + optimizer + (min(frozen, 1) if offload else frozen) * weights + gathered


def extrapolated() -> str:
    """Gigabytes on each device in bfloat16, by model size: SPR (and SFT), ReMax (and REINFORCE), PPO."""
    titles = [f"{size}: {name}" for size in SIZES for name in ("SPR", "ReMax", "PPO")]
    lines = []
    for ranks in (1, 4, 8):
        for zero_stage in (0, 1, 2, 3):
            for offload in (False, True) if zero_stage else (False,):
                if ranks == 1 and zero_stage in (1, 3):
                    continue  # nothing to shard
                settings = dict(bf16=True, zero_stage=zero_stage, ranks=ranks, offload=offload)
                cells = [
                    f"{bytes_per_parameter(script, **settings) * n / 1e9:.0f}"
                    for n in SIZES.values()
                    for script in ("spr", "remax", "ppo")
                ]
                lines.append([str(ranks), str(zero_stage), "yes" if offload else "no", *cells])
    return markdown_table(["devices", "ZeRO", "offload", *titles], lines)


def imports_mb() -> float:
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"
    command = [sys.executable, "-c", f"import resource, common; print({peak})"]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)


def main() -> None:
    args = tyro.cli(Args)
    head = commit()
    imports = round(imports_mb(), 1)
    measured = ["--workload", args.workload, "--micro-batch-size", str(args.micro_batch_size), f"--flags={args.flags}"]
    bytes_of = bytes_with_adapters if "--lora-rank" in args.flags else bytes_per_parameter
    arithmetic = {script: bytes_of(script, bf16="bfloat16" in args.flags) for script in args.scripts}
    peaks = {script: [] for script in args.scripts}
    for _ in range(args.repeats):
        for script in args.scripts:
            step = measure_step("--script", script, *measured, "--ppo-epochs", "1", "--steps", "1", "--no-floor")
            peaks[script].append(step["peak_rss_mb"])
            run = Run(args.workload, script, "benchmark/memory.py", shlex.join(["--scripts", script, *measured]))
            row = run.row(
                head,
                peak_rss_mb=step["peak_rss_mb"],
                whole_run_rss_mb=step["whole_run_rss_mb"],
                device=step["device"],
                imports_mb=imports,
                bytes_per_parameter=arithmetic[script],
            )
            append_row(args.results, row)
    first = statistics.median(peaks[args.scripts[0]])
    lines = []
    for script, values in peaks.items():
        median = statistics.median(values)
        ends = f"{min(values):,.0f}, {max(values):,.0f}"
        lines.append([script, f"{arithmetic[script]:.0f}", f"{median:,.0f}", ends, f"{median / first:.3f}"])
    titles = ["script", "bytes per parameter", "peak MB: median", "lowest, highest", f"/ {args.scripts[0]}"]
    print(markdown_table(titles, lines))
    print("\nResident gigabytes on each device, bfloat16, without activations:\n\n" + extrapolated())


if __name__ == "__main__":
    main()
