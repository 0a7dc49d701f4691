"""Peak memory of each script beside the arithmetic, and what that arithmetic says of 1.3B and 7B models.

    python benchmark/memory.py [--workload W2]

Each script runs in a process of its own, two updates on random weights (step.py). The arithmetic counts bytes per
parameter of what must be resident: a trained model has weights, gradients and Adam's two moments (float32: 4 + 4 + 8;
bfloat16: 2 + 2 and 12 for float32 master weights and moments), a frozen one has weights. Activations, the cache of a
rollout, logits and what the imports take come on top of it. Appends to benchmark/memory.jsonl.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent

# script: (models that are trained, models that are frozen), all of one size. Phases of spr.py have one model each.
MODELS = dict(sft=(1, 0), spr=(1, 0), reinforce=(1, 2), remax=(1, 2), ppo=(2, 2))
SIZES = {"1.3B": 1.3e9, "7B": 6.7e9}


@dataclass
class Args:
    workload: str = "W2"
    """See workloads.py."""
    results: Path = HERE / "memory.jsonl"
    """File that the results are appended to."""


def bytes_per_parameter(script: str, bf16: bool, zero_stage: int = 0, ranks: int = 1, offload: bool = False) -> float:
    """Resident bytes on one device, per parameter of the policy.

    ZeRO shards optimizer state (stage 1), gradients (2) and weights (3); but rollouts gather the policy's weights.
    Offloading leaves on the device no optimizer state, and one frozen model at a time.
    """
    trained, frozen = MODELS[script]
    weights, gradients, state = (2, 2, 12) if bf16 else (4, 4, 8)
    gathered = weights * (1 - 1 / ranks) if zero_stage == 3 else 0
    state = 0 if offload else state / (ranks if zero_stage >= 1 else 1)
    gradients /= ranks if zero_stage >= 2 else 1
    weights /= ranks if zero_stage == 3 else 1
    return trained * (weights + gradients + state) + (min(frozen, 1) if offload else frozen) * weights + gathered


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
    imports = float(output("-c", "import common; print(common._peak_bytes() / 2**20)"))
    flags = ("--workload", args.workload, "--steps", "1", "--no-floor", "--results", "/dev/null")
    rows = []
    for script in MODELS:
        lines = output(HERE / "step.py", "--script", script, *flags, "--ppo-epochs", "1").splitlines()
        row = next(json.loads(line) for line in lines if line.startswith("{"))
        row = dict(name=script, workload=args.workload, peak_rss_mb=row["peak_rss_mb"], device=row["device"])
        row |= dict(imports_mb=imports, bytes_per_parameter=bytes_per_parameter(script, bf16=False))
        rows.append(row)
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    ppo = rows[-1]
    print("| script | bytes per parameter | / PPO | peak MB | / PPO | less imports | / PPO |\n" + "|---" * 7 + "|")
    for row in rows:
        net, ppo_net = row["peak_rss_mb"] - imports, ppo["peak_rss_mb"] - imports
        cells = [f"{row['bytes_per_parameter']:.0f}", row["bytes_per_parameter"] / ppo["bytes_per_parameter"]]
        cells += [f"{row['peak_rss_mb']:.0f}", row["peak_rss_mb"] / ppo["peak_rss_mb"], f"{net:.0f}", net / ppo_net]
        cells = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
        print("| " + " | ".join([row["name"], *cells]) + " |")
    print("\nResident gigabytes on each device, bfloat16, without activations:\n\n" + extrapolated())


if __name__ == "__main__":
    main()
