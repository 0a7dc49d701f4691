"""Seconds per update, by part, and peak memory of a script, beside the floor: the time of its unavoidable parts alone.

    python benchmark/step.py --script remax|reinforce|ppo|grpo|spr|… --workload W1|W2 --steps 5

It runs the script's own main() on random weights (or on the model that you name) and times the functions of common.py
that main() calls. No token ends a response, so all responses have full length. Then it measures the floor in the same
process: one decode loop with a cache, one forward of the reward model, one of the reference over response positions
only, and per epoch a forward, a backward and an optimizer step. Each is written with bare calls of transformers and
torch, without masks, text or engine. `product_cpu_s`: the update's multiply-adds at the speed of a
large matrix product, which nothing undercuts. Compare CPU seconds (`cpu_s`) on a CPU, wall seconds
(`median_s`) on a GPU.

An update of `grpo`, `spr` and `spr_token` is one pass over two samples per prompt, as many as ReMax generates, in one
optimizer step (two of spr_token.py's value model). SPR's scoring reads the reward model from disk. `sft` is spr.py on
as many demonstrations; `reward_model` and `dpo` read a pair for each prompt. dpo.py's forward of its reference comes
before the first update and does not count.
"""

import functools
import json
import resource
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
import workloads
from rows import RESULTS, Run, append_row, commit, given_flags, markdown_table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402

PARTS = ("rollout", "scoring", "reference", "training", "rest")
TWO_ROWS = ("grpo", "spr", "spr_token", "sft", "reward_model", "dpo")  # two rows of each prompt are trained on
PAIRS = ("reward_model", "dpo")
WITH_REFERENCE = ("remax", "reinforce", "ppo", "grpo")  # it is asked in each update


@dataclass
class Args:
    script: Literal["remax", "reinforce", "ppo", "grpo", "spr", "spr_token", "sft", "reward_model", "dpo"] = "remax"
    """Script to measure."""
    workload: Literal["W1", "W2", "M1", "G1", "G2", "G3", "G4", "tiny"] = "W1"
    """Model and batch, see workloads.py."""
    steps: int = 5
    """Updates to take the median of, after one to warm up."""
    ppo_epochs: int = 4
    """Epochs of ppo.py."""
    model: str | None = None
    """Folder or hub name of a causal language model in place of the workload's."""
    batch_size: int | None = None
    """Prompts per update in place of the workload's."""
    micro_batch_size: int | None = None
    """Rows per forward and backward; default all prompts of an update."""
    prompt_length: int | None = None
    """Prompt tokens in place of the workload's."""
    response_length: int | None = None
    """Response tokens in place of the workload's."""
    flags: str = ""
    """Further flags of the script, as in --flags="--dtype bfloat16 --gradient-checkpointing"."""
    floor: bool = True
    """Measure the floor, too."""
    results: Path = RESULTS / "step.jsonl"
    """File that the result is appended to."""


def now() -> torch.Tensor:
    """-> (wall seconds, CPU seconds)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Clock:
    """Adds up the time inside wrapped functions, for each update; set_seed begins an update."""

    def __init__(self):
        self.starts: list[torch.Tensor] = []
        self.seconds: list[dict[str, torch.Tensor]] = []
        self.inside = False  # a wrapped function may call another

    def begin(self) -> None:
        self.starts.append(now())
        self.seconds.append({part: torch.zeros(2, dtype=torch.float64) for part in PARTS})

    def wrap(self, owner, name: str, part: str | None = None) -> None:
        """Counts owner.name as that part; without a part, as the reference if its module is frozen, else training."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            if self.inside or not self.seconds:
                return function(*args, **kwargs)
            of = part
            if of is None:
                module = args[0].engine if isinstance(args[0], common.Policy) else args[0]
                is_trained = any(parameter.requires_grad for parameter in module.parameters())
                of = "training" if is_trained else "reference"
            self.inside, start = True, now()
            result = function(*args, **kwargs)
            self.seconds[-1][of] += now() - start
            self.inside = False
            return result

        setattr(owner, name, timed)

    def steps(self) -> list[dict[str, torch.Tensor]]:
        """(wall, CPU) seconds of each part, without the first update, which warms up, and the last, which saves."""
        steps = []
        for i in range(1, len(self.starts) - 1):
            parts = self.seconds[i]
            rest = self.starts[i + 1] - self.starts[i] - sum(parts.values())
            steps.append(parts | dict(rest=rest))
        return steps


def run_script(args: Args, folder: Path, flags: list[str]) -> list[dict[str, torch.Tensor]]:
    """Runs main() -> the time of each part, by update."""
    clock, set_seed, load_policy = Clock(), common.set_seed, common.load_policy

    def begin_and_set_seed(*numbers):
        clock.begin()
        set_seed(*numbers)

    def load_policy_without_end(*args):
        policy = load_policy(*args)
        policy.eos_ids = [-1]  # no token ends a response
        return policy

    common.set_seed, common.load_policy = begin_and_set_seed, load_policy_without_end
    clock.wrap(common, "rollout", "rollout")
    for name in ("__init__", "__call__"):  # spr.py loads the reward model anew in each update
        clock.wrap(common.Reward, name, "scoring")
    for name in ("logprobs", "values", "all_logprobs", "all_values", "backward", "optimizer_step"):
        clock.wrap(common, name)
    script = import_module("spr" if args.script == "sft" else args.script)
    if args.script in PAIRS:
        clock.wrap(script, "scores", "training")  # reward_model.py's forward
    command, sys.argv = sys.argv, [f"{args.script}.py", *flags, "--output-dir", str(folder / "run")]
    script.main()
    sys.argv = command
    return clock.steps()


def decode(model, prompts_BP: torch.Tensor, length: int, greedy: bool) -> torch.Tensor:
    """Sampled rows, and a greedy row per prompt beside them: one prefill, one cache."""
    cache, tokens_BL = transformers.DynamicCache(config=model.config), prompts_BP
    logits_BV = model(prompts_BP, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    if greedy:
        rows = torch.arange(len(prompts_BP), device=prompts_BP.device).repeat(2)
        cache.reorder_cache(rows)
        logits_BV, tokens_BL = logits_BV[rows], prompts_BP[rows]
    while True:
        token_B = common.sample(logits_BV[: len(prompts_BP)].float())
        token_B = torch.cat([token_B, logits_BV[len(prompts_BP) :].argmax(-1)])
        tokens_BL = torch.cat([tokens_BL, token_B[:, None]], 1)
        if tokens_BL.shape[1] == prompts_BP.shape[1] + length:
            return tokens_BL
        logits_BV = model(token_B[:, None], past_key_values=cache).logits[:, -1]


def nll(model, tokens_BL: torch.Tensor, length: int) -> torch.Tensor:
    logits_BTV = model(tokens_BL, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BL[:, -length:].flatten(), reduction="sum")


def floor(args: Args, saved: dict, model: str, reward_model: str, prompts_BP, length) -> dict:
    """The median (wall, CPU) seconds of each unavoidable part alone. `saved`: flags of the script's run."""
    causal, classifier = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    kwargs = dict(dtype=getattr(torch, saved["dtype"]), attn_implementation=saved["attention"])
    policy = causal.from_pretrained(model, **kwargs).eval().to(prompts_BP.device)
    reward = classifier.from_pretrained(reward_model, **kwargs).eval().to(prompts_BP.device)
    epochs = args.ppo_epochs if args.script == "ppo" else 1
    if args.script in TWO_ROWS:
        prompts_BP = prompts_BP.repeat_interleave(2, 0)
    trains_policy = args.script != "reward_model"
    trains_reward = args.script in ("ppo", "spr_token", "reward_model")  # the value model has the reward model's shape
    models = [policy] * trains_policy + [reward] * trains_reward
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=1e-5, fused=True)
    micro = saved["micro_batch_size"]
    tokens_BL = None

    @torch.no_grad()
    def rollout():
        nonlocal tokens_BL
        tokens_BL = decode(policy, prompts_BP, length, greedy=args.script == "remax")

    @torch.no_grad()
    def scoring():
        for rows in tokens_BL.split(micro):
            reward.score(reward.base_model(rows, use_cache=False)[0][:, -1])

    @torch.no_grad()
    def reference():
        for rows in tokens_BL[: len(prompts_BP)].split(micro):
            nll(policy, rows, length)

    def training():
        for model in models:
            model.zero_grad()
        for rows in tokens_BL[: len(prompts_BP)].split(micro):
            if trains_policy:
                nll(policy, rows, length).backward()
            if trains_reward:
                hidden_BTH = reward.base_model(rows, use_cache=False)[0]
                reward.score(hidden_BTH[:, -length - 1 : -1]).sum().backward()

    def step():
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), 1.0)
        optimizer.step()

    parts, times_of = {}, {rollout: 1, scoring: 1, reference: 1, training: epochs, step: epochs * len(models)}
    if args.script not in WITH_REFERENCE:
        del times_of[reference]
    if args.script == "spr_token":
        times_of[step] += 1  # its value model makes two
    if args.script in ("sft", *PAIRS):
        rollout()  # for the tokens
        times_of = {training: 1, step: 1}
    for part, times in times_of.items():
        seconds = []
        for _ in range(args.steps + 1):
            start = now()
            part()
            seconds.append(now() - start)
        parts[part.__name__] = times * torch.stack(seconds[1:]).median(0).values
    return parts


def multiply_adds(args: Args, config, B: int, P: int, T: int) -> float:
    """Of one update: all products with weights and with the keys and values of earlier tokens."""
    L, D, V, S = config.num_hidden_layers, config.hidden_size, config.vocab_size, P + T
    block = 12 * D * D  # GPT-2's: 4 of attention, 8 of the perceptron

    def forward(rows, start=0, end=S, head=0):  # tokens start … end, logits of `head` of them
        return rows * ((end - start) * L * block + L * D * (end**2 - start**2) + head * D * V)

    greedy = 2 if args.script == "remax" else 1
    rows = 2 * B if args.script in TWO_ROWS else B
    epochs = args.ppo_epochs if args.script == "ppo" else 1
    total = 3 * epochs * forward(rows, head=0 if args.script == "reward_model" else T)  # backward is two more
    if args.script not in ("sft", *PAIRS):
        total += forward(B, 0, P) + forward(greedy * rows, P, S, head=T) + forward(greedy * rows)  # rollout, scores
    if args.script in WITH_REFERENCE:
        total += forward(rows, head=T)  # the reference
    if args.script == "spr_token":
        total += 2 * forward(rows) + 3 * forward(rows)  # Q and W before and after their fit, and the fit
    if args.script == "ppo":
        total += forward(rows, head=T) + forward(rows) + 3 * epochs * forward(rows)  # old log π, values, value model
    return float(total)


def product_speed(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(wall, CPU) seconds of a multiply-add in a large matrix product."""
    size, seconds = 2048 if device.type == "cpu" else 8192, []
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(4):
        start = now()
        a @ a
        seconds.append(now() - start)
    return torch.stack(seconds[1:]).median(0).values / size**3


def table(rows: list[dict]) -> str:
    """CPU seconds where there is no GPU, else wall seconds."""
    lines = []
    for row in rows:
        seconds, floor = ("cpu_s", "floor_cpu_s") if row["device"] == "cpu" else ("median_s", "floor_s")
        cells = [row["method"], row["task"], *(f"{row[key]:.3g}" for key in (seconds, *PARTS))]
        cells += [f"{row[floor]:.3g}", f"{row[seconds] / row[floor]:.2f}"] if floor in row else ["", ""]
        lines.append([*cells, f"{row['peak_rss_mb']:.0f}"])
    return markdown_table(["script", "workload", "seconds", *PARTS, "floor", "step / floor", "peak MB"], lines)


def main() -> None:
    args = tyro.cli(Args)
    head = commit()
    kind, shape, batch_size, prompt_length, response_length = workloads.WORKLOADS[args.workload]
    batch_size, prompt_length = args.batch_size or batch_size, args.prompt_length or prompt_length
    response_length = args.response_length or response_length
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        dtype = "bfloat16" if "bfloat16" in args.flags else "float32"  # of the saved models: large ones fill the disk
        if not args.model:
            workloads.save_policy(folder / "policy", kind, dtype, **shape)
        model = args.model or str(folder / "policy")
        workloads.save_reward_model(folder / "reward_model", model, dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        prompts_BP = workloads.random_prompts(len(tokenizer), batch_size, prompt_length)
        texts = tokenizer.batch_decode(prompts_BP)
        numbers = (2 * batch_size, response_length - 1)
        responses_NT = workloads.random_prompts(len(tokenizer), *numbers).flip(1)  # else they could repeat the prompts
        responses = tokenizer.batch_decode(responses_NT)
        rows = [
            dict(prompt=texts[i], completion=responses[i], chosen=responses[i], rejected=responses[batch_size + i])
            for i in range(batch_size)
        ]
        if args.script != "sft":  # else spr.py would learn from the completions, too
            for row in rows:
                del row["completion"]
        (folder / "data.jsonl").write_text(common.json_lines(rows))
        prompts_per_update = batch_size * 2 if args.script == "sft" else batch_size
        micro_batch_size = args.micro_batch_size or batch_size * (2 if args.script in TWO_ROWS else 1)
        flags = ["--model", model, "--dataset", str(folder / "data.jsonl"), "--eval-every", "0"]
        flags += ["--total-episodes", str(prompts_per_update * (args.steps + 2))]
        flags += ["--batch-size", str(prompts_per_update), "--micro-batch-size", str(micro_batch_size)]
        flags += f"--learning-rate 1e-5 --max-grad-norm 1.0 --max-prompt-length {prompt_length}".split()
        if args.script in PAIRS:
            flags += ["--eval-dataset", str(folder / "data.jsonl"), "--eval-size", "1"]
        else:
            flags += ["--reward-model", str(folder / "reward_model")]
        if args.script != "reward_model":
            flags += ["--response-length", str(response_length)]
        if args.script == "ppo":
            flags += ["--num-epochs", str(args.ppo_epochs)]
        elif args.script in ("grpo", "spr"):
            flags += "--num-samples 2 --num-epochs 1 --num-minibatches 1".split()
        elif args.script == "spr_token":
            flags += "--num-samples 2 --num-epochs 1 --value-epochs 1 --num-minibatches 1".split()
        elif args.script == "sft":
            flags += "--num-samples 0 --weighting uniform --num-epochs 1 --num-minibatches 1".split()
        steps = run_script(args, folder, flags + shlex.split(args.flags))
        whole_run_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # the saved model's check included
        saved = json.loads((folder / "run" / "args.json").read_text())
        metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        name = args.script + (str(args.ppo_epochs) if args.script == "ppo" else "")
        on = 0 if torch.cuda.is_available() else 1  # the parts in wall seconds on a GPU, in CPU seconds on a CPU
        totals = torch.stack([sum(step.values()) for step in steps]).median(0).values.tolist()
        row = Run(args.workload, name, "benchmark/step.py", given_flags()).row(head)
        row |= dict(median_s=totals[0], cpu_s=totals[1], n=len(steps))
        row |= dict(peak_rss_mb=json.loads(metrics[-1])["peak_memory_bytes"] / 2**20)  # in training
        row |= dict(whole_run_rss_mb=whole_run_rss_mb)
        row |= {part: statistics.median(float(step[part][on]) for step in steps) for part in PARTS}
        if args.floor:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            parts = floor(args, saved, model, str(folder / "reward_model"), prompts_BP.to(device), response_length)
            row |= dict(zip(("floor_s", "floor_cpu_s"), sum(parts.values()).tolist(), strict=True))
            row |= {f"floor_{part}": float(seconds[on]) for part, seconds in parts.items()}
            if kind == "gpt2" and not args.model:
                config = transformers.AutoConfig.from_pretrained(model)
                operations = multiply_adds(args, config, batch_size, prompt_length, response_length)
                seconds = operations * product_speed(device, getattr(torch, saved["dtype"]))
                row |= dict(zip(("product_s", "product_cpu_s"), seconds.tolist()))
    row |= dict(batch_size=batch_size, prompt_length=prompt_length, response_length=response_length)
    row |= dict(threads=torch.get_num_threads(), device=torch.cuda.get_device_name() if not on else "cpu")
    row = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
    append_row(args.results, row)
    print(json.dumps(row))
    print(table([row]))


if __name__ == "__main__":
    main()
