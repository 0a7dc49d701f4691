"""One step of TRL's trainers on the work of step.py, for comparison. This project does not depend on TRL.

In an environment of its own, with torch and transformers as in requirements.txt, accelerate, datasets and trl==1.16.0
(RLOO; for its former PPO trl==1.12.0, the last release that has it):

    python benchmark/trl_step.py rloo|ppo1|ppo4 W1|W2|G1|G2 [--steps 5] [--bf16]

RLOO generates two responses per prompt, as many as ReMax, and trains on both. No gradient checkpointing, no text
cleaning, no end of text, one optimizer step per batch and epoch. Appends to
benchmark/results/peers.jsonl.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "false" if Path("/dev/nvidia0").exists() else "true")
import torch
import transformers
import trl
import workloads
from datasets import Dataset
from rows import RESULTS, Run, append_row, commit, given_flags

parser = argparse.ArgumentParser()
parser.add_argument("algorithm", choices=("rloo", "ppo1", "ppo4"))
parser.add_argument("workload", choices=workloads.WORKLOADS)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--micro-batch-size", type=int, help="rows per forward and backward of RLOO; default all")
parser.add_argument("--results", type=Path, default=RESULTS / "peers.jsonl")
args = parser.parse_args()

kind, shape, batch_size, prompt_length, response_length = workloads.WORKLOADS[args.workload]
gpu, times, steps = torch.cuda.is_available(), [], args.steps + 2


class Clock(transformers.TrainerCallback):
    def on_train_begin(self, *_, **__):
        if gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter(), time.process_time()))

    on_step_end = on_train_begin


folder = Path(tempfile.mkdtemp())
workloads.save_policy(folder / "policy", kind, **shape)
workloads.save_reward_model(folder / "reward_model", folder / "policy")
tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
classifier = transformers.AutoModelForSequenceClassification.from_pretrained
policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy")
prompts = workloads.random_prompts(shape["vocab_size"], steps * batch_size, prompt_length)
suppressed = [workloads.EOS, workloads.PAD]
config = dict(output_dir=str(folder / "out"), learning_rate=1e-5, lr_scheduler_type="constant", bf16=args.bf16)
config |= dict(gradient_checkpointing=False, use_cpu=not gpu, report_to=[], save_strategy="no", disable_tqdm=True)
config |= dict(seed=0, temperature=1.0)
if args.algorithm == "rloo":
    micro = args.micro_batch_size or 2 * batch_size
    config |= dict(per_device_train_batch_size=micro, gradient_accumulation_steps=2 * batch_size // micro)
    config |= dict(num_generations=2, num_iterations=1, beta=0.05)
    config |= dict(max_completion_length=response_length, top_p=1.0, top_k=0, max_steps=steps)
    trainer = trl.RLOOTrainer(
        model=policy,
        reward_funcs=classifier(folder / "reward_model"),
        args=trl.RLOOConfig(generation_kwargs=dict(suppress_tokens=suppressed), **config),
        train_dataset=Dataset.from_dict(dict(prompt=tokenizer.batch_decode(prompts))),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[Clock()],
    )
else:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config |= dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=1)
    config |= dict(num_mini_batches=1, num_ppo_epochs=int(args.algorithm[3:]))
    config |= dict(local_rollout_forward_batch_size=batch_size, response_length=response_length, kl_coef=0.05)
    policy.generation_config.suppress_tokens = suppressed
    dataset = Dataset.from_dict(dict(input_ids=prompts.tolist()))
    trainer = PPOTrainer(
        args=PPOConfig(total_episodes=steps * batch_size, num_sample_generations=0, **config),
        processing_class=tokenizer,
        model=policy,
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_model=classifier(folder / "reward_model"),
        value_model=classifier(folder / "reward_model"),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(batch_size)),
        callbacks=[Clock()],
    )
trainer.train()
wall, cpu = ([b[i] - a[i] for a, b in zip(times[2:], times[3:], strict=False)] for i in range(2))  # two to warm up
peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
method = f"TRL {trl.__version__} {args.algorithm}"
row = Run(args.workload, method, "benchmark/trl_step.py", given_flags(), seed=42).row(commit())
row |= dict(median_s=statistics.median(wall), cpu_s=statistics.median(cpu), n=len(wall))
row |= dict(peak_rss_mb=peak / 2**20, threads=torch.get_num_threads())
row |= dict(device=torch.cuda.get_device_name() if gpu else "cpu")
row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
append_row(args.results, row)
print(json.dumps(row))
