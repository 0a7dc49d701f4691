"""Compares the results of gpu.sh with the speed of the device itself.

    python benchmark/gpu.py benchmark/results/gpu.jsonl [--size 8192]

Measures the bandwidth of a copy and the speed of a bfloat16 matrix product, then prints for each row of step.py:
samples per second; decode bandwidth (weights and half of the final cache, read once per token) over the copy's; FLOP/s
of the training part (6 per parameter and token, 8 with gradient checkpointing, without attention) over the product's.
"""

import argparse
import time
from pathlib import Path

import torch
import transformers
import workloads
from rows import markdown_table, read_rows


def seconds(function, device: torch.device, repeats: int = 20) -> float:
    for i in range(2 * repeats):
        if i == repeats:
            torch.cuda.synchronize() if device.type == "cuda" else None
            start = time.perf_counter()
        function()
    torch.cuda.synchronize() if device.type == "cuda" else None
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a = torch.randn(args.size, args.size, device=device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / seconds(lambda: b.copy_(a), device)  # bytes read and written
    product = 2 * args.size**3 / seconds(lambda: torch.mm(a, a, out=b), device)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, product {product / 1e12:.2f} TFLOP/s\n")
    lines = []
    for row in read_rows(args.results):
        kind, shape, B, P, T = workloads.WORKLOADS[row["task"]]
        cells = [f"{B / row['median_s']:.1f}", "", "", f"{row['peak_rss_mb'] * 2**20 / 1e9:.1f}"]
        if "rollout" in row:  # ours
            config = transformers.AutoConfig.for_model(kind, **shape)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            parameters = sum(p.numel() for p in model.parameters())
            is_ppo = row["method"].startswith("ppo")
            rows, epochs = B * (2 if row["method"] == "remax" else 1), int(row["method"][3:]) if is_ppo else 1
            kv = 4 * config.num_hidden_layers * config.hidden_size * rows * (P + T / 2)  # keys and values, 2 bytes each
            cells[1] = f"{T * (2 * parameters + kv) / row['rollout'] / bandwidth:.0%}"
            work = (8 if "checkpointing" in row["flags"] else 6) * epochs * (2 if is_ppo else 1)
            work += 4 if is_ppo else 0  # log-probabilities and values of the old policy
            cells[2] = f"{work * parameters * B * (P + T) / row['training'] / product:.0%}"
        lines.append([row["method"], row["task"], *cells])
    titles = ["method", "workload", "samples / s", "decode / copy", "training / product", "peak GB"]
    print(markdown_table(titles, lines))


if __name__ == "__main__":
    main()
