"""The steps of gpu.sh. Each measures one thing and appends its rows as they come, so that a kill loses one row at most.

    python benchmark/gpu.py speed|weights|decode|update|smoke|failed|table [--workload G1] [--script remax] [--flags=…]

speed: a copy's bandwidth and a bfloat16 matrix product. weights: random ones, made on the device, into --folder.
decode: tokens per second of our loop and of transformers' `generate`, and the share of the copy's bandwidth (weights
and half of the final cache, read once a token). update: seconds and peak memory of the updates of a script, and FLOP/s
of its training part as a share of the product's (2 per parameter and token for a forward, 6 to train, 4 with adapters,
2 more with gradient checkpointing, without attention). smoke: two updates of a small model, whose finite gradients are
counted. Prompts have unequal lengths, so that masks are at work. failed: a row for a step that was killed. table: all
rows.
"""

import argparse
import json
import random
import shlex
import sys
import time
from importlib import import_module
from pathlib import Path

from rows import Run, append_row, commit, given_flags, markdown_table, read_rows

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
REWARD = """
def reward(prompts, responses, **columns):
    return [len(set(response)) / 100 for response in responses]
"""
# Flags without which a script would take defaults of its example, or more than one optimizer step an update.
OWN = dict(
    ppo="--num-epochs 1",
    grpo="--num-samples 2",
    spr="--num-samples 2 --num-epochs 1 --num-minibatches 1",
    spr_token="--num-samples 2 --num-epochs 1 --value-epochs 1 --num-minibatches 1",
)
PAIRS = ("reward_model", "dpo")
SMOKE = ("llama", dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2), 16, 40, 24)
SMOKE[1].update(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)  # 40 + 24 tokens: #196678


def workload(name: str) -> tuple:
    import workloads

    return SMOKE if name == "smoke" else workloads.WORKLOADS[name]


def add_row(args, **measured) -> None:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    values = {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in measured.items()}
    row = Run(args.workload, args.name, "benchmark/gpu.py", given_flags()).row(commit(), **values)
    append_row(args.results, row | dict(step=args.step, device=device))
    print(json.dumps(values), flush=True)


def synchronized_seconds(function, repeats: int) -> float:
    """Wall seconds of a call, after one that warms up."""
    import torch

    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def speed(args) -> None:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a = torch.randn(args.size, args.size, device=device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / synchronized_seconds(lambda: b.copy_(a), 20)  # bytes read and written
    product = 2 * args.size**3 / synchronized_seconds(lambda: torch.mm(a, a, out=b), 20)
    add_row(args, bandwidth=bandwidth, product=product)


def weights(args) -> None:
    """A policy, a reward model of its size or a function, and data, in the folder."""
    import transformers
    import workloads

    kind, shape, batch_size, prompt_length, response_length = workload(args.workload)
    start = time.perf_counter()
    workloads.save_policy(args.folder / "policy", kind, "bfloat16", **shape)
    if not args.reward_function:
        workloads.save_reward_model(args.folder / "reward_model", str(args.folder / "policy"), "bfloat16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / "policy")
    generator = random.Random(0)

    def text(length):
        return tokenizer.decode([generator.randrange(2, len(tokenizer)) for _ in range(length)])

    with open(args.folder / "data.jsonl", "w") as file:
        for i in range(batch_size):
            length = prompt_length if i == 0 else generator.randint(prompt_length // 2, prompt_length)
            answers = [text(generator.randint(response_length // 2, response_length - 1)) for _ in range(2)]
            row = dict(prompt=text(length), chosen=answers[0], rejected=answers[1])
            file.write(json.dumps(row) + "\n")
    (args.folder / "reward.py").write_text(REWARD)
    add_row(args, seconds=time.perf_counter() - start)


def decode(args) -> None:
    import torch
    import transformers

    import common

    _, _, batch_size, prompt_length, response_length = workload(args.workload)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / "policy")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as start_processes does
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(args.folder / "policy", dtype=torch.bfloat16).eval()
    per_token = common.cache_bytes_per_token(model)
    model.to(device)
    rows = min(batch_size, 128)
    lines = (args.folder / "data.jsonl").read_text().splitlines()[:rows]
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    prompts_BP, mask_BP = common.pad(ids, "left", device)
    sampling = common.Sampling(prompt_length, response_length, 1.0, rows)

    def ours():
        common.generate(model, prompts_BP, mask_BP, [-1], sampling, num_samples=1, greedy=False)

    def theirs():
        settings = dict(do_sample=True, top_k=0, max_new_tokens=response_length, min_new_tokens=response_length)
        model.generate(prompts_BP, attention_mask=mask_BP, pad_token_id=1, **settings)

    cache = rows * (prompt_length + response_length / 2) * per_token
    num_bytes = response_length * (sum(weight.nbytes for weight in model.parameters()) + cache)
    for who, function in (("ours", ours), ("generate", theirs)):
        seconds = synchronized_seconds(function, args.repeats)
        args.name = f"decode, {who}"
        add_row(args, tokens_per_second=rows * response_length / seconds, bytes_per_second=num_bytes / seconds)


def flags_of(args) -> list[str]:
    """A script's flags for the folder's model and data."""
    _, _, batch_size, prompt_length, response_length = workload(args.workload)
    episodes = str(batch_size * (args.updates + 1))  # the run is left after the last update that is measured
    flags = ["--model", str(args.folder / "policy"), "--dataset", str(args.folder / "data.jsonl")]
    flags += ["--total-episodes", episodes, "--batch-size", str(batch_size), "--eval-every", "0"]
    flags += ["--max-prompt-length", str(prompt_length), "--learning-rate", "1e-6", "--dtype", "bfloat16"]
    if args.script in PAIRS:
        flags += ["--eval-dataset", str(args.folder / "data.jsonl"), "--eval-size", "1"]
    elif (args.folder / "reward_model").exists():
        flags += ["--reward-model", str(args.folder / "reward_model")]
    else:
        flags += ["--reward-function", f"{args.folder / 'reward.py'}:reward"]
    if args.script != "reward_model":
        flags += ["--response-length", str(response_length)]
    output = args.folder / "runs" / f"{args.name}-{time.time():.0f}"
    return [*flags, *OWN.get(args.script, "").split(), *shlex.split(args.flags), "--output-dir", str(output)]


def run(args, log) -> None:
    """The script's main(), until `log` ends it; `log` takes the place of Run.log."""
    import common

    common.Run.log = log
    sys.argv = [f"{args.script}.py", *flags_of(args)]
    import_module(args.script).main()


def update(args) -> None:
    """A row for each update after the first, which warms up. No token ends a response."""
    import common

    _, _, batch_size, prompt_length, response_length = workload(args.workload)
    load_policy, kept = common.load_policy, common.Run.log
    sizes = {}

    def load_policy_without_end(*parameters):
        policy = load_policy(*parameters)
        policy.eos_ids = [-1]
        sizes["parameters"] = sum(weight.numel() for weight in policy.decoder.parameters())
        return policy

    def log(self, number, metrics):
        kept(self, number, metrics)
        if number < 2:
            return
        train = metrics["seconds_train"]
        is_ppo = args.script == "ppo"
        work = 4 if "lora" in args.flags else 6  # frozen weights have no gradients
        work += 2 if "checkpointing" in args.flags else 0
        work = work * (2 if is_ppo else 1) + (6 if is_ppo else 2)  # forwards: the reference; old policy and values
        tokens = batch_size * (0.75 * prompt_length + response_length)
        seconds = {name: value for name, value in metrics.items() if name.startswith("seconds_")}
        peak = self.rows[-1]["peak_memory_bytes"] / 1e9
        flops = work * sizes["parameters"] * tokens / train
        add_row(args, update=number, seconds=sum(seconds.values()), **seconds, peak_gb=peak, flops_per_second=flops)
        if number > args.updates:
            sys.stdout.flush()
            raise SystemExit(0)

    common.load_policy = load_policy_without_end
    run(args, log)


def smoke(args) -> None:
    """Counts the tensors of gradients that are finite, of all trained ones, in each step of two updates."""
    import common

    optimizer_step, kept = common.optimizer_step, common.Run.log
    found = dict(finite=0, tensors=0)

    def counted_step(engine, learning_rate):
        from deepspeed.utils import safe_get_full_grad

        for weight in engine.module.parameters():
            if weight.requires_grad:
                gradient = safe_get_full_grad(weight)
                found["tensors"] += 1
                found["finite"] += int(gradient is not None and bool(gradient.isfinite().all()))
        return optimizer_step(engine, learning_rate)

    def log(self, number, metrics):
        kept(self, number, metrics)
        if number > 0:
            norm = float(metrics["grad_norm"])
            add_row(args, update=number, grad_norm=norm, skipped=int(metrics["skipped_updates"]), **found)

    common.optimizer_step = counted_step
    run(args, log)  # to the end, with the saved model's check


def failed(args) -> None:
    """Without torch: the step is known by its flags, which stand in the row."""
    row = Run(args.workload, args.name, "benchmark/gpu.py", args.flags).row(commit(), step="failed", status=args.status)
    append_row(args.results, row)


def table(args) -> None:
    rows = read_rows(args.results)
    limits = [row for row in rows if row["step"] == "speed"]
    if limits:
        print(f"copy {limits[-1]['bandwidth'] / 1e9:.0f} GB/s, product {limits[-1]['product'] / 1e12:.2f} TFLOP/s\n")
    lines = []
    for row in rows:
        if row["step"] in ("speed", "weights"):
            continue
        told = ""
        share = ""
        if row["step"] == "failed":
            told = f"ended by status {row['status']} (137: killed)"
        elif row["step"] == "smoke":
            told = f"{row['finite']} of {row['tensors']} gradients finite, norm {row['grad_norm']:.3g}"
        elif row["step"] == "decode":
            told = f"{row['tokens_per_second']:,.0f} tokens/s"
            share = f"{row['bytes_per_second'] / limits[-1]['bandwidth']:.0%} of the copy" if limits else ""
        elif "median_s" in row:  # trl_step.py
            told = f"{row['median_s']:.2f} s, {row['peak_rss_mb'] * 2**20 / 1e9:.1f} GB"
        else:
            told = f"update {row['update']}: {row['seconds']:.2f} s, {row['peak_gb']:.1f} GB"
            share = f"{row['flops_per_second'] / limits[-1]['product']:.0%} of the product" if limits else ""
        lines.append([row["method"], row["task"], told, share])
    print(markdown_table(["what", "workload", "measured", "share"], lines))


STEPS = dict(speed=speed, weights=weights, decode=decode, update=update, smoke=smoke, failed=failed, table=table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--name", default="", help="of the row")
    parser.add_argument("--workload", default="smoke", help="see workloads.py")
    parser.add_argument("--script", default="remax")
    parser.add_argument("--flags", default="", help="further flags of the script")
    parser.add_argument("--updates", type=int, default=3, help="to measure, after one to warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--reward-function", action="store_true", help="no reward model, which may not fit beside")
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("work"))
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.name = args.name or f"{args.step} {args.script}"
    STEPS[args.step](args)


if __name__ == "__main__":
    main()
