"""Our losses beside those of TRL's trainers, on the same data; TRL is no dependency of this project.

In an environment of its own, with requirements.txt, accelerate and trl==1.16.0:

    python benchmark/trl_losses.py [--pairs 32]

GRPO: one loss and its gradient, of the same completions, advantages, old and reference log-probabilities. TRL's dr_grpo
also divides by the maximum length of a response: here ours is divided by it, too. TRL multiplies k3 by the importance
ratio (use_bias_correction_kl), which DeepSeekMath's eq. 4 does not: here it is off. DPO and reward model: the losses
of six optimizer steps, each on all pairs. Appends to benchmark/results/losses.jsonl.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
import datasets
import torch
import transformers
import trl
from rows import RESULTS, ROOT, append_row, commit, given_flags

sys.path.insert(0, str(ROOT))
import grpo

parser = argparse.ArgumentParser()
parser.add_argument("--pairs", type=int, default=32)
parser.add_argument("--results", type=Path, default=RESULTS / "losses.jsonl")
args = parser.parse_args()

EXAMPLE = ROOT / "examples" / "reviews"
STEPS, LEARNING_RATE, BETA = 6, 1e-3, 0.1
COMMIT = commit()
folder = Path(tempfile.mkdtemp())
tokenizer = transformers.AutoTokenizer.from_pretrained(EXAMPLE / "policy")


def settings(name, **more) -> dict:
    """Of a trainer: those of our scripts."""
    optimizer = dict(adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.0, max_grad_norm=50.0)
    schedule = dict(learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_steps=STEPS)
    quiet = dict(output_dir=str(folder / name), report_to=[], save_strategy="no", disable_tqdm=True)
    plain = dict(bf16=False, use_cpu=True, gradient_checkpointing=False)
    return optimizer | schedule | quiet | plain | more


def report(method, peer, ours: list[float], theirs: list[float], **more) -> None:
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    row = dict(task="reviews", method=method, seed=1, tuning=False, commit=COMMIT)
    row |= dict(script="benchmark/trl_losses.py", flags=given_flags(), peer=f"TRL {trl.__version__} {peer}")
    row |= dict(ours=ours, peers=theirs, largest_difference=difference) | more
    append_row(args.results, row)
    print(f"{method:24} largest difference {difference:.1e} of {ours} {more or ''}")


# ---------------------------------------------------------------- GRPO


@dataclasses.dataclass
class Completions:
    """Rows of prompts, all of one length, and responses, right-padded."""

    prompts_BP: torch.Tensor
    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    advantages_B: torch.Tensor


def completions(model, num_samples=4) -> Completions:
    """Sampled from the model by transformers' own `generate`."""
    texts = [json.loads(line)["prompt"] for line in open(EXAMPLE / "prompts.jsonl", encoding="utf-8")]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    # TRL gives no positions to the model, so GPT-2's are wrong where a prompt is padded: no prompt is padded here.
    prompts_XP = torch.tensor([ids for ids in prompts if len(ids) == len(prompts[0])][:8])
    torch.manual_seed(1)
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=24, num_return_sequences=num_samples)
    ids_BL = model.generate(prompts_XP, attention_mask=torch.ones_like(prompts_XP), **sampling)
    tokens_BT = ids_BL[:, prompts_XP.shape[1] :]
    is_eos_BT = (tokens_BT == tokenizer.eos_token_id).long()
    mask_BT = (is_eos_BT.cumsum(1) - is_eos_BT == 0).long()
    advantages_B = grpo.advantages(torch.randn(len(tokens_BT)), num_samples, "grpo")
    return Completions(prompts_XP.repeat_interleave(num_samples, 0), tokens_BT, mask_BT, advantages_B)


def logprobs(model, data: Completions):
    """-> logprobs_BT, by nothing but transformers."""
    logits_BLV = model(input_ids=torch.cat([data.prompts_BP, data.tokens_BT], 1)).logits
    predicted_BTV = logits_BLV[:, data.prompts_BP.shape[1] - 1 : -1].log_softmax(-1)
    return predicted_BTV.gather(-1, data.tokens_BT[..., None]).squeeze(-1)


def moved_policy(seed, size):
    """Another policy nearby, so that ratios differ from 1."""
    other = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn_like(parameter)
    return other


def compare_grpo(variant, loss_type) -> None:
    policy = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy")
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    data = completions(policy)
    with torch.no_grad():
        old_logprobs_BT = logprobs(moved_policy(2, 0.01).eval(), data)
        ref_logprobs_BT = logprobs(moved_policy(3, 0.02).eval(), data)
    rows, width = data.mask_BT.shape
    weights_B = torch.full_like(data.advantages_B, 1 / rows)
    weights_B /= data.mask_BT.sum(1) if variant == "grpo" else width
    frozen = (old_logprobs_BT, ref_logprobs_BT, data.advantages_B, data.mask_BT, BETA, 0.2, weights_B)

    texts = datasets.Dataset.from_dict(dict(prompt=["a"] * rows))
    more = dict(per_device_train_batch_size=rows, num_generations=4, max_completion_length=width, beta=BETA)
    more |= dict(use_bias_correction_kl=False)  # else TRL multiplies k3 by the importance ratio
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=trl.GRPOConfig(**settings(loss_type, loss_type=loss_type, epsilon=0.2, temperature=1.0, **more)),
        train_dataset=texts,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    names = dict(prompt_ids=data.prompts_BP, prompt_mask=torch.ones_like(data.prompts_BP))
    names |= dict(completion_ids=data.tokens_BT, completion_mask=data.mask_BT, advantages=data.advantages_B)
    names |= dict(old_per_token_logps=old_logprobs_BT, ref_per_token_logps=ref_logprobs_BT)

    def value_and_gradient(loss) -> tuple[float, torch.Tensor]:
        policy.zero_grad()
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

    ours, our_gradient = value_and_gradient(grpo.policy_loss(logprobs(policy, data), *frozen))
    theirs, their_gradient = value_and_gradient(trainer.compute_loss(policy, names))
    ratios_BT = (logprobs(policy, data) - old_logprobs_BT).exp()[data.mask_BT == 1]
    clipped = ((ratios_BT - 1).abs() > 0.2).float().mean().item()
    assert 0.05 < clipped < 0.95, clipped  # else the comparison would not see the clip
    distance = ((our_gradient - their_gradient).norm() / their_gradient.norm()).item()
    report(variant, f"GRPOTrainer, {loss_type}", [ours], [theirs], gradient_difference=distance)


# ---------------------------------------------------------------- Six steps of DPO and of a reward model


def recording(Trainer):
    """A trainer that remembers its losses; transformers logs them rounded."""

    class Recording(Trainer):
        def compute_loss(self, *inputs, **more):
            found = super().compute_loss(*inputs, **more)
            self.losses = [*getattr(self, "losses", []), (found[0] if isinstance(found, tuple) else found).item()]
            return found

    return Recording


def our_losses(script) -> list[float]:
    files = ["--dataset", folder / "pairs.jsonl", "--eval-dataset", folder / "pairs.jsonl"]
    flags = f"--batch-size {args.pairs} --micro-batch-size {2 * args.pairs} --num-epochs {STEPS} --eval-every 0"
    flags += f" --learning-rate {LEARNING_RATE} --lr-schedule constant --warmup-ratio 0 --max-grad-norm 50"
    flags += f" --model {EXAMPLE / 'policy'} --eval-size 2"
    command = [sys.executable, ROOT / f"{script}.py", *flags.split(), *files, "--output-dir", folder / script]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    lines = (folder / script / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def compare_pairs(script) -> None:
    pairs = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    common = dict(per_device_train_batch_size=args.pairs, max_length=128)
    if script == "dpo":
        trainer = recording(trl.DPOTrainer)(
            model=transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy"),
            args=trl.DPOConfig(**settings(script, beta=BETA, disable_dropout=True, **common)),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(EXAMPLE / "policy", num_labels=1)
        torch.manual_seed(1)  # as in reward_model.py
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
        trainer = recording(trl.RewardTrainer)(
            model=model,
            args=trl.RewardConfig(**settings(script, disable_dropout=True, **common)),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
    trainer.train()
    report(script, type(trainer).__bases__[0].__name__, our_losses(script), trainer.losses)


lines = (EXAMPLE / "preferences.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
(folder / "pairs.jsonl").write_text("".join(lines[: args.pairs]), encoding="utf-8")
compare_grpo("grpo", "grpo")
compare_grpo("dr-grpo", "dr_grpo")
compare_pairs("dpo")
compare_pairs("reward_model")
