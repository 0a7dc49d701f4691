"""Peak memory of each script beside the arithmetic, and the arithmetic for models of 1.3B and 7B parameters.

    python benchmark/memory.py [--scripts sft spr spr_token reinforce remax grpo ppo reward_model dpo] [--repeats 1]

Each script runs in a process of its own (step.py) for three updates of two or more micro-batches on random weights, so
that Adam's moments and accumulated gradients are in memory; the reward model is as large as the policy. The arithmetic
is `device_bytes`; `python benchmark/memory.py --scripts` prints its tables alone. Appends to
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
MODELS = dict(sft=(1, 0), spr=(1, 0), spr_token=(2, 0), reinforce=(1, 2), remax=(1, 2), grpo=(1, 2))
MODELS |= dict(ppo=(2, 2), reward_model=(1, 0), dpo=(1, 0))
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
BUCKET = 5e8  # weights whose gradients DeepSpeed collects before it reduces them
LIVE = 1e9  # weights of a frozen model in CPU memory that DeepSpeed has on the device at once
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
        words += [f"--micro-batch-size {self.micro_batch_size}"] if self.micro_batch_size != 8 else []
        words += [f"--rollout-batch-size {self.rollout_batch_size}"] if self.rollout_batch_size < 128 else []
        return " ".join(words)


def trained_bytes(bf16: bool, zero_stage: int, ranks: int, offload: bool) -> tuple[float, float]:
    """-> (resident bytes, more while it steps) on one device, per parameter of a model in training.

    As allocations count them (tests/test_benchmark.py): the optimizer state is float32 and has a copy of the weights
    but for float32 at ZeRO-0; stages 1 to 3 add up gradients in float32 and may shard them. Of several models in
    training one steps at a time. The gradients of the last backward, in the model's type, are with the bucket.
    """
    weights = 2 if bf16 else 4
    if offload:
        return weights / (ranks if zero_stage == 3 else 1), 0
    if zero_stage == 0:
        return (16, 4) if bf16 else (16, 0)
    if zero_stage == 1:
        return (8 + 12 / ranks, 2) if bf16 else (8 + 12 / ranks, 4 / ranks)
    if zero_stage == 2:
        return weights + 16 / ranks, 0 if bf16 else 4 / ranks
    return (19 / ranks, 4 / ranks) if bf16 else (23 / ranks, 4 / ranks)


def device_bytes(shape: Shape, setting: Setting) -> dict[str, float]:
    """Bytes on one device, by part. All of our arithmetic about memory is here and in `trained_bytes`."""
    weights = 2 if setting.bf16 else 4
    trained, frozen = MODELS[setting.script]
    frozen -= frozen > 0 and not setting.reward_model
    resident, in_step = trained_bytes(setting.bf16, setting.zero_stage, setting.ranks, setting.offload)
    sharded = setting.ranks if setting.zero_stage == 3 else 1
    parts = {}
    if setting.lora_rank:  # policy and reference share one frozen copy
        matrices = 2 * (shape.width + shape.width) + 2 * (shape.width + shape.keys) + 3 * (shape.width + shape.middle)
        adapters = setting.lora_rank * matrices * shape.layers
        parts["trained"] = adapters * (trained * resident + in_step)
        parts["frozen"] = (trained + max(0, frozen - 1)) * shape.parameters * weights
    else:
        gathered = weights * (1 - 1 / sharded)  # the policy, for a rollout
        parts["trained"] = shape.parameters * (trained * resident + in_step + gathered)
        parts["frozen"] = frozen * shape.parameters * weights / sharded
        if setting.offload:
            parts["frozen"] = min(frozen, 1) * min(shape.parameters, LIVE) * weights
    if setting.zero_stage:  # and with it the gradients of as many weights, from backward
        parts["bucket"] = (BUCKET + min(shape.parameters, BUCKET)) * weights
    row = setting.tokens * 2 * shape.layers * shape.keys * weights
    parts["cache"] = min(setting.rollout_batch_size, max(1, CACHE // row)) * row
    layer = (
        12 * shape.width + 2 * shape.keys + 4 * shape.middle
    ) * weights  # measured, of a token, as backward needs it
    layers = shape.layers * layer
    if setting.gradient_checkpointing:
        layers = shape.layers * shape.width * weights + layer
    parts["activations"] = setting.micro_batch_size * setting.tokens * layers
    parts["logits"] = min(2**25, setting.micro_batch_size * setting.tokens * shape.vocabulary) * 16
    return parts


def peak_gb(shape: Shape, setting: Setting) -> float:
    """Gigabytes, with one for CUDA itself. A rollout's cache and an update's activations do not meet."""
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
                return f"{gb:.0f}: `{setting.flags()}`" if setting.flags() else f"{gb:.0f}"
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


def resident_bytes(script: str, bf16: bool, parameters: float = 1, zero_stage=0, ranks=1, offload=False) -> float:
    """Weights, gradients and optimizer state on one device, of a policy of so many parameters."""
    shape = Shape(parameters=parameters, layers=1, width=1, keys=1, middle=1, vocabulary=1)
    setting = Setting(script=script, bf16=bf16, zero_stage=zero_stage, ranks=ranks, offload=offload)
    parts = device_bytes(shape, setting)
    return parts["trained"] + parts["frozen"]


def resident_bytes_with_adapters(script: str, bf16: bool) -> int:
    """Per parameter, where adapters are trained: they are too few to count, so these are the frozen weights alone."""
    trained, frozen = MODELS[script]
    shared = 1 if frozen == 2 else 0  # the reference is the policy's own weights
    return (2 if bf16 else 4) * (trained + frozen - shared)


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
                        cells.append(f"{resident_bytes(script, parameters=n, **settings) / 1e9:.0f}")
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
    bytes_of = resident_bytes_with_adapters if "--lora-rank" in args.flags else resident_bytes
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
    print_arithmetic()


if __name__ == "__main__":
    main()
