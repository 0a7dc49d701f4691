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


@dataclass
class Shape:
    """A language model's size, as far as memory depends on it."""

    parameters: float
    layers: int
    width: int
    keys: int  # width of a token's keys in a layer, all heads
    middle: int  # width between the two matrices of a perceptron
    vocabulary: int


SHAPES = {
    "0.5B": Shape(0.49e9, 24, 896, 128, 4864, 151_936),  # Qwen2.5
    "1.5B": Shape(1.54e9, 28, 1536, 256, 8960, 151_936),  # Qwen2.5
    "7B": Shape(6.74e9, 32, 4096, 4096, 11008, 32_000),  # Llama 2, whose cache is the largest of its size
}
BUCKET = 5e8  # DeepSpeed collects the gradients of so many weights before it reduces them
CACHE = 16 * 2**30  # bytes; the default of --rollout-batch-size


@dataclass
class Setting:
    """A run's flags, and what they meet. The reward model is as large as the policy."""

    script: str = "remax"
    reward_model: bool = True
    bf16: bool = True
    zero_stage: int = 0
    ranks: int = 1
    offload: bool = False
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    micro_batch_size: int = 8
    tokens: int = 512 + 256  # of a prompt and its response
    rollout_batch_size: int = 128

    def flags(self) -> str:
        words = [f"--zero-stage {self.zero_stage}"] if self.zero_stage else []
        words += ["--offload"] if self.offload else []
        words += ["--gradient-checkpointing"] if self.gradient_checkpointing else []
        words += [f"--micro-batch-size {self.micro_batch_size}"]
        words += [f"--rollout-batch-size {self.rollout_batch_size}"] if self.rollout_batch_size < 128 else []
        return " ".join(words)


def trained_bytes(bf16: bool, zero_stage: int, ranks: int, offload: bool) -> float:
    """Peak on one device per parameter of a model in training, as allocations count it (test_memory.py).

    ZeRO-0 has one copy of float32 gradients in its step (bfloat16). Stages 1 to 3 add up float32 gradients, and stages
    2 and 3 shard them. The optimizer state is float32: weights (bfloat16 only), two moments.
    """
    weights = 2 if bf16 else 4
    state = 12 if bf16 else 8
    if zero_stage == 0:
        return weights + state + (6 if bf16 else 4)
    if offload:
        return 2 * weights / (ranks if zero_stage == 3 else 1)  # weights, and gradients on their way to the host
    if zero_stage == 1:
        return weights + (8 if bf16 else 8) + (state + 4 * (not bf16)) / ranks
    if zero_stage == 2:
        return 2 * weights + (state + 4 + 4 * (not bf16)) / ranks
    return (25 if bf16 else 27) / ranks


def device_bytes(shape: Shape, setting: Setting) -> dict[str, float]:
    """Bytes on one device by part; the peak is their sum, as if a rollout's cache met an update's activations.

    It does not: so `peak` takes the larger of the two.
    """
    weights = 2 if setting.bf16 else 4
    trained, frozen = MODELS[setting.script]
    frozen -= frozen > 0 and not setting.reward_model
    per_parameter = trained_bytes(setting.bf16, setting.zero_stage, setting.ranks, setting.offload)
    sharded = setting.ranks if setting.zero_stage == 3 else 1
    parts = {}
    if setting.lora_rank:  # policy and reference share one frozen copy
        per_layer = 4 * 2 * shape.width + 3 * (shape.width + shape.middle) - 2 * (shape.width - shape.keys)
        adapters = setting.lora_rank * per_layer * shape.layers
        copies = trained + (frozen - 1 if setting.reward_model else 0) * (frozen > 0)
        parts["trained"] = trained * adapters * per_parameter
        parts["frozen"] = copies * shape.parameters * weights
    else:
        alive = min(frozen, 1) if setting.offload else frozen
        parts["trained"] = trained * shape.parameters * per_parameter
        parts["frozen"] = alive * shape.parameters * weights / (1 if setting.offload else sharded)
        if setting.zero_stage == 3:  # a rollout gathers the policy
            parts["trained"] += shape.parameters * weights * (1 - 1 / sharded)
    if setting.zero_stage:
        parts["bucket"] = BUCKET * weights
    row = setting.tokens * 2 * shape.layers * shape.keys * weights
    parts["cache"] = min(setting.rollout_batch_size, max(1, CACHE // row)) * row
    layer = (12 * shape.width + 2 * shape.keys + 4 * shape.middle) * weights  # measured, of a token, as backward needs it
    layers = shape.layers * 2 * shape.width * weights / 2 + layer if setting.gradient_checkpointing else shape.layers * layer
    parts["activations"] = setting.micro_batch_size * setting.tokens * layers
    parts["logits"] = min(2**25, setting.micro_batch_size * setting.tokens * shape.vocabulary) * 16
    return parts


def peak_gb(shape: Shape, setting: Setting) -> float:
    """Gigabytes, with one for CUDA itself."""
    parts = device_bytes(shape, setting)
    of_a_rollout = parts.pop("cache")
    of_an_update = parts.pop("activations") + parts.pop("bucket", 0)
    return (sum(parts.values()) + max(of_a_rollout, of_an_update)) / 1e9 + 1


def first_that_fits(card: float, ranks: int, size: str, lora_rank: int, reward_model: bool) -> str:
    """Flags from the simplest on, for ReMax of 512 + 256 tokens in bfloat16; a tenth of the card stays free."""
    kinds = [dict()]
    if not lora_rank:
        stages = [dict(zero_stage=2), dict(zero_stage=3)] if ranks > 1 else []
        kinds += [*stages, dict(zero_stage=2, offload=True)]
    if lora_rank and ranks > 1:
        kinds = [dict(zero_stage=2)]
    smaller = [dict(), dict(gradient_checkpointing=True)]
    for micro_batch_size, rows in ((8, 64), (4, 32), (2, 16), (1, 8)):
        smaller += [dict(gradient_checkpointing=True, micro_batch_size=micro_batch_size, rollout_batch_size=rows)]
    for kind in kinds:
        for less in smaller:
            setting = Setting(ranks=ranks, lora_rank=lora_rank, reward_model=reward_model, **kind, **less)
            gb = peak_gb(SHAPES[size], setting)
            if gb <= 0.9 * card:
                return f"`{setting.flags()}`: {gb:.0f}"
    return "does not fit"


def cards() -> str:
    """The README's table: which flags fit, and the gigabytes that they take on each GPU."""
    titles = ["model", "trained", "reward", "one 24 GB card", "one 80 GB card", "eight of 80 GB"]
    lines = []
    for size in SHAPES:
        for lora_rank in (0, 16):
            for reward_model in (False, True):
                line = [size, "`--lora-rank 16`" if lora_rank else "all", "model" if reward_model else "function"]
                for card, ranks in ((24, 1), (80, 1), (80, 8)):
                    line.append(first_that_fits(card, ranks, size, lora_rank, reward_model))
                lines.append(line)
    return markdown_table(titles, lines)


def adapters() -> str:
    """Gigabytes of weights and optimizer state on one device in bfloat16, by how the policy is trained."""
    lines = []
    for size, shape in SHAPES.items():
        for reward_model in (False, True):
            line = [size, "model" if reward_model else "function"]
            for lora_rank in (0, 16, 64):
                parts = device_bytes(shape, Setting(lora_rank=lora_rank, reward_model=reward_model))
                line.append(f"{(parts['trained'] + parts['frozen']) / 1e9:.1f}")
            lines.append(line)
    return markdown_table(["model", "reward", "all weights", "`--lora-rank 16`", "`--lora-rank 64`"], lines)


def bytes_per_parameter(script: str, bf16: bool, zero_stage: int = 0, ranks: int = 1, offload: bool = False) -> float:
    """Weights and optimizer state on one device, per parameter of the policy."""
    shape = Shape(1, 0, 0, 1, 0, 0)
    setting = Setting(script=script, bf16=bf16, zero_stage=zero_stage, ranks=ranks, offload=offload)
    parts = device_bytes(shape, setting)
    return parts["trained"] + parts["frozen"]


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
                cells = []
                for n in SIZES.values():
                    for script in ("spr", "remax", "ppo"):
                        cells.append(f"{bytes_per_parameter(script, **settings) * n / 1e9:.0f}")
                lines.append([str(ranks), str(zero_stage), "yes" if offload else "no", *cells])
    return markdown_table(["devices", "ZeRO", "offload", *titles], lines)


def imports_mb() -> float:
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"
    command = [sys.executable, "-c", f"import resource, common; print({peak})"]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)


def print_arithmetic() -> None:
    print("\nWhat fits, by arithmetic: flags, and gigabytes on each GPU:\n\n" + cards())
    print("\nGigabytes of weights and optimizer state on one GPU, by arithmetic:\n\n" + adapters())


def main() -> None:
    args = tyro.cli(Args)
    if not args.scripts:
        print_arithmetic()
        return
    head = commit()
    imports = round(imports_mb(), 1)
    measured = ["--workload", args.workload, "--micro-batch-size", str(args.micro_batch_size), f"--flags={args.flags}"]
    arithmetic = {script: bytes_per_parameter(script, bf16="bfloat16" in args.flags) for script in args.scripts}
    peaks = {script: [] for script in args.scripts}
    for _ in range(args.repeats):
        for script in args.scripts:
            step = measure_step("--script", script, *measured, "--ppo-epochs", "1", "--steps", "1", "--no-floor")
            peaks[script].append(step["peak_rss_mb"])
            run = Run(args.workload, script, "benchmark/memory.py", shlex.join(["--scripts", script, *measured]))
            row = run.row(
                head,
                peak_rss_mb=step["peak_rss_mb"],
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
    print_arithmetic()


if __name__ == "__main__":
    main()
