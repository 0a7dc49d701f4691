"""Peak memory of each script beside the arithmetic, and the arithmetic for models of 1.3B and 7B parameters.

    python benchmark/memory.py [--scripts sft spr spr_token reinforce remax ppo reward_model dpo] [--repeats 1]

Each script runs in a process of its own (step.py), three updates of two or more micro-batches on random weights, so
that Adam's moments and accumulated gradients are alive; the reward model is as large as the policy. The arithmetic
counts resident bytes per parameter. A trained model has weights, gradients and Adam's two moments (float32: 4 + 4 + 8;
bfloat16: 2 + 2 and 12 for float32 master weights and moments; during its step also a float32 copy of the gradients, 4);
a frozen one has weights. It leaves out activations, the cache of a rollout, logits and the imports. Appends to
benchmark/results/memory.jsonl.
"""

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, append_row, commit

HERE = Path(__file__).resolve().parent

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


def bytes_per_parameter(script: str, bf16: bool, zero_stage: int = 0, ranks: int = 1, offload: bool = False) -> float:
    """Resident bytes on one device, per parameter of the policy.

    ZeRO shards optimizer state (stage 1), gradients (2) and weights (3); but rollouts gather the policy's weights.
    Offloading leaves on the device no optimizer state, and one frozen model at a time. One model steps at a time.
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
    lines = ["| devices | ZeRO | offload | " + " | ".join(titles) + " |", "|---" * (3 + len(titles)) + "|"]
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
                lines.append(
                    "| " + " | ".join([str(ranks), str(zero_stage), "yes" if offload else "no", *cells]) + " |"
                )
    return "\n".join(lines)


def output(*command) -> str:
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent).stdout


def main() -> None:
    args = tyro.cli(Args)
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"
    head = commit()
    imports = float(output("-c", f"import resource, common; print({peak})"))
    measured = ["--workload", args.workload, "--micro-batch-size", str(args.micro_batch_size), f"--flags={args.flags}"]
    flags = [*measured, "--ppo-epochs", "1", "--steps", "1", "--no-floor", "--results", "/dev/null"]
    peaks = {script: [] for script in args.scripts}
    for _ in range(args.repeats):
        for script in args.scripts:
            lines = output(HERE / "step.py", "--script", script, *flags).splitlines()
            row = next(json.loads(line) for line in lines if line.startswith("{"))
            peaks[script].append(row["peak_rss_mb"])
            key = dict(task=args.workload, method=script, seed=1, tuning=False, commit=head)
            key |= dict(script="benchmark/memory.py", flags=shlex.join(["--scripts", script, *measured]))
            row = key | dict(peak_rss_mb=row["peak_rss_mb"], device=row["device"], imports_mb=round(imports, 1))
            row |= dict(bytes_per_parameter=bytes_per_parameter(script, bf16="bfloat16" in args.flags))
            append_row(args.results, row)
    first = statistics.median(peaks[args.scripts[0]])
    titles = ["script", "bytes per parameter", "peak MB: median", "lowest, highest", f"/ {args.scripts[0]}"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for script, values in peaks.items():
        median = statistics.median(values)
        cells = [script, f"{bytes_per_parameter(script, bf16='bfloat16' in args.flags):.0f}", f"{median:,.0f}"]
        cells += [f"{min(values):,.0f}, {max(values):,.0f}", f"{median / first:.3f}"]
        print("| " + " | ".join(cells) + " |")
    print("\nResident gigabytes on each device, bfloat16, without activations:\n\n" + extrapolated())


if __name__ == "__main__":
    main()
