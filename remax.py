"""ReMax: reinforcement learning from human feedback with no value model (arXiv 2310.10505, Section 4, Algorithm 1).

For each prompt x the policy π writes two responses: y, sampled, and ȳ, greedy. The reward of ȳ is the baseline of y:

    gradient  =  mean over prompts of  Σ_t  (R_t − r(x, ȳ)) ∇ log π(y_t | x, y_<t)

where R_t is the reward r(x, y) of the whole response, less the KL penalty of token t and of the tokens after it. The baseline does not
depend on the sampled tokens, so the gradient stays unbiased; and it is near the expected reward, so the gradient is less noisy than
REINFORCE's, at least while the greedy response is not yet the best one.

What PPO has and this script has not, and why that is right here:
- a value model, its optimizer and GAE: the environment is deterministic and its reward comes once, at the end, so one more response of
  the same policy tells what to expect, and tells it without a second model to train and to hold in memory;
- importance ratios, clipping and old log-probabilities: each rollout is used for one optimizer step only, so the policy that is
  differentiated is the one that sampled;
- epochs, minibatches and whitened advantages: likewise one step, on rewards as they are.

One CPU      python remax.py
One GPU      python remax.py --model M --reward-model R --dataset D.jsonl --eval-dataset E.jsonl --dtype bfloat16 --learning-rate 1e-6
Eight GPUs   deepspeed remax.py --model M --reward-model R --dataset D.jsonl --eval-dataset E.jsonl --dtype bfloat16 \
                 --learning-rate 1e-6 --zero-stage 2 --gradient-checkpointing --batch-size 128 --micro-batch-size 4

Names carry shapes: B rows, P prompt tokens, T response tokens. Logits at position t predict token t + 1. Masks are over response tokens,
first EOS included. Files, models, rollout, rewards and logging are in common.py.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM

import common
from common import Fraction, NonNegativeFloat, NonNegativeInt, PathOrName, PositiveFloat, PositiveInt

# ---------------------------------------------------------------- 1. Flags


@dataclass
class Args:
    # The run
    seed: int = 1
    """Seed of prompt order and sampling."""
    output_dir: PathOrName | None = None
    """Folder of the run; by default runs/<script>__<seed>__<time> where you stand."""
    resume: PathOrName | None = None
    """Folder of a run to go on with from its last checkpoint; no other flag is needed."""
    save_every: NonNegativeInt = 0
    """Updates between checkpoints for --resume; 0 for none."""

    # Model and data
    model: PathOrName = str(common.EXAMPLE / "policy")
    """Causal language model to start from: a local folder or a hub name."""
    dataset: PathOrName = str(common.EXAMPLE / "prompts.jsonl")
    """Training prompts: a .jsonl, .json, .csv or .parquet file, or a hub name."""
    dataset_split: str = "train"
    """Split of the hub data sets; files have none."""
    prompt_column: str = "prompt"
    """Column that holds the prompts, as texts or as chat messages."""
    eval_dataset: PathOrName | None = str(common.EXAMPLE / "prompts_test.jsonl")
    """Held-out prompts, in the same form; None for no evaluation."""
    eval_every: NonNegativeInt = 25
    """Updates between evaluations, which also come first and last; 0 for never."""
    eval_size: PositiveInt = 64
    """Held-out prompts per evaluation."""
    max_prompt_length: PositiveInt = 64
    """Prompt tokens; longer prompts lose their beginning."""
    response_length: PositiveInt = 48
    """Most tokens of a response."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in every log-probability."""

    # Reward
    reward_model: PathOrName = str(common.EXAMPLE / "reward_model")
    """Sequence-classification model that scores prompt + response; its tokenizer may be another."""
    reward_function: PathOrName | None = None
    """Python function file.py:name that scores texts in place of the reward model."""
    gold_reward_function: PathOrName | None = None
    """Python function file.py:name that is logged and never trained on."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Reward units taken from a response that does not end."""

    # Optimization
    total_episodes: PositiveInt = 6400
    """Prompts in the whole run, over all ranks; the data set is repeated as often as needed."""
    batch_size: PositiveInt = 64
    """Prompts per update over all ranks; the rollout decodes a rank's share of them at once."""
    micro_batch_size: PositiveInt = 32
    """Rows per forward and backward on one rank; changes memory, not results."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate of AdamW; about 1e-6 for models of billions of parameters."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after warm-up; linear and cosine end at 0."""
    warmup_ratio: Fraction = 0.05
    """Share of the updates in which the learning rate rises from 0."""
    max_grad_norm: PositiveFloat = 50.0
    """Gradient norm that is clipped to; the loss sums over tokens, so the norm is about T times that of a token mean."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL penalty against the initial policy, in reward units per nat."""
    gamma: Fraction = 1.0
    """Discount per token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; master weights are float32 in both."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: what is sharded over ranks: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep optimizer state and frozen models in CPU memory between uses."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward, to save memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


# ---------------------------------------------------------------- 2. The algorithm


def advantages(rewards_B, baseline_rewards_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef, gamma):
    """Return of each token minus the greedy response's reward -> advantages_BT, detached, 0 where masked.

    rewards_B, baseline_rewards_B: r(x, y) of the sampled and of the greedy responses. logprobs_BT, ref_logprobs_BT: log π and log π_ref of
    the sampled tokens, in nats. mask_BT: 1 on real tokens. kl_coef: reward units per nat. gamma: discount per token.
    """
    mask_BT = mask_BT.to(logprobs_BT.dtype)
    shaped_BT = -kl_coef * (logprobs_BT.detach() - ref_logprobs_BT.detach()) * mask_BT
    last_B1 = mask_BT.long().sum(1, keepdim=True) - 1
    shaped_BT = shaped_BT.scatter_add(1, last_B1, rewards_B.detach().to(shaped_BT.dtype)[:, None])
    returns_BT = torch.empty_like(shaped_BT)
    return_B = torch.zeros_like(shaped_BT[:, 0])
    for t in reversed(range(shaped_BT.shape[1])):
        return_B = shaped_BT[:, t] + gamma * return_B  # R_t = Σ_{s≥t} γ^{s−t} shaped_s
        returns_BT[:, t] = return_B
    # The baseline is not discounted: γ^{T−t} would make it depend on where the sampled response ends.
    return (returns_BT - baseline_rewards_B.detach().to(returns_BT.dtype)[:, None]) * mask_BT  # ReMax, Algorithm 1


def policy_loss(logprobs_BT, advantages_BT, mask_BT, denominator):
    """−Σ advantage · log π / denominator -> scalar. The denominator is the number of rows of the global batch, not of tokens, so a
    row's weight does not depend on how long the others are."""
    # No ratio and no clip: these are the log-probabilities of the policy that sampled.
    return -(advantages_BT.detach() * logprobs_BT * mask_BT).sum() / denominator


# ---------------------------------------------------------------- 3. Training


def main() -> None:
    args = common.parse_args(Args)
    rank, world_size, device = common.start_processes()
    B, num_updates = common.plan_updates(args.total_episodes, args.batch_size, world_size)  # B rows on this rank

    # 3.1 Models: the policy that is trained, the frozen policy that it began as, and what gives the reward
    tokenizer = common.load_tokenizer(args.model)
    models = [common.load_model(args.model, AutoModelForCausalLM, args.dtype, args.attention) for _ in range(2)]
    common.check_length(models[0], args.max_prompt_length, args.response_length)
    eos_ids = common.eos_ids(models[0], tokenizer)
    policy = common.train_engine(
        common.ResponseLogprobs(models[0]),
        device,
        learning_rate=args.learning_rate,
        max_grad_norm=args.max_grad_norm,
        dtype=args.dtype,
        zero_stage=args.zero_stage,
        offload=args.offload,
        gradient_checkpointing=args.gradient_checkpointing,
        micro_batch_size=args.micro_batch_size,
        micro_batches=-(-B // args.micro_batch_size),
    )
    reference = common.freeze(common.ResponseLogprobs(models[1]), device, args.zero_stage, args.offload)
    if args.reward_function:
        reward = common.Reward(common.load_reward_function(args.reward_function), args.reward_function, args.missing_eos_penalty)
    else:
        placement = (device, args.dtype, args.attention, args.zero_stage, args.offload, args.micro_batch_size)
        reward = common.Reward(common.load_reward_model(args.reward_model, *placement), args.reward_model, args.missing_eos_penalty)
    gold_reward = None
    if args.gold_reward_function:
        gold_reward = common.Reward(common.load_reward_function(args.gold_reward_function), args.gold_reward_function, 0.0)

    # 3.2 Data and evaluation
    load_prompts = functools.partial(
        common.load_prompts, split=args.dataset_split, column=args.prompt_column, tokenizer=tokenizer, max_length=args.max_prompt_length
    )
    prompts = load_prompts(args.dataset)
    rollout = functools.partial(
        common.rollout, tokenizer=tokenizer, length=args.response_length, temperature=args.temperature, eos_ids=eos_ids
    )
    logprobs_of = functools.partial(common.response_logprobs, temperature=args.temperature, micro_batch_size=args.micro_batch_size)
    evaluating = args.eval_dataset is not None and args.eval_every > 0
    if evaluating:
        eval_prompts = load_prompts(args.eval_dataset)
        evaluate = functools.partial(
            common.evaluate, prompts=eval_prompts, size=args.eval_size, batch_size=B, device=device, rollout=rollout, reward=reward,
            gold_reward=gold_reward, reference=reference, logprobs=logprobs_of,
        )  # fmt: skip

    run = common.Run(args, __file__, num_updates)
    first_update = run.load_checkpoint(policy)
    if evaluating:
        initial_rows = evaluate(reference)
        if first_update == 1:
            rows = evaluate(policy)
            run.log(0, dict(episodes=0) | common.evaluation_metrics(rows, initial_rows))
            run.log_samples(0, rows)

    for update in range(first_update, num_updates + 1):
        common.set_seed(args.seed, update, rank)
        clock = common.Clock()

        # 3.3 Rollout: to each prompt one sampled and one greedy response of the policy as it is now, in one decode loop
        indices = common.shuffled_indices(len(prompts.ids), args.seed, (update - 1) * args.batch_size, args.batch_size)
        responses = rollout(policy, prompts.batch(indices[rank::world_size], device), num_samples=1, greedy=True)
        sampled = responses[:B]
        seconds_rollout = clock.lap()

        # 3.4 Score: the greedy responses' rewards are the baseline
        rewards_B, baseline_rewards_B = reward(responses).chunk(2)
        seconds_score = clock.lap()

        # 3.5 One optimizer step. The policy's log-probabilities are computed once: differentiated in the loss, detached in the advantages.
        ref_logprobs_BT = logprobs_of(reference, sampled)
        denominator = args.batch_size
        losses, logprobs = [], []
        for rows, last in common.micro_batches(B, args.micro_batch_size):
            micro = sampled[rows]
            logprobs_BT = policy(micro.prompts_BP, micro.prompt_mask_BP, micro.tokens_BT, args.temperature)
            advantages_BT = advantages(
                rewards_B[rows], baseline_rewards_B[rows], logprobs_BT, ref_logprobs_BT[rows], micro.mask_BT, args.kl_coef, args.gamma
            )
            loss = policy_loss(logprobs_BT, advantages_BT, micro.mask_BT, denominator)
            common.backward(policy, loss * world_size, last)  # the engine averages over ranks, the denominator counts all of them
            losses.append(loss.detach())
            logprobs.append(logprobs_BT.detach())
        learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, update, num_updates)
        grad_norm, skipped = common.optimizer_step(policy, learning_rate)
        seconds_train = clock.lap()

        # 3.6 Log, evaluate, checkpoint
        logprobs_BT = torch.cat(logprobs)
        means = common.global_means(
            device,
            reward=rewards_B,
            baseline_reward=baseline_rewards_B,
            kl=((logprobs_BT - ref_logprobs_BT) * sampled.mask_BT).sum(1),
            entropy=(-logprobs_BT, sampled.mask_BT),
            response_length=sampled.mask_BT.sum(1),
            truncated_fraction=~sampled.ended_B,
            loss=torch.stack(losses).sum() * world_size,
            tokens_per_second=responses.mask_BT.sum() * world_size / (seconds_rollout + seconds_score + seconds_train),
            **(dict(gold_reward=gold_reward(sampled)) if gold_reward else {}),
        )
        metrics = dict(
            episodes=update * args.batch_size,
            **means,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped_updates=int(skipped),
            seconds_rollout=seconds_rollout,
            seconds_score=seconds_score,
            seconds_train=seconds_train,
        )
        if evaluating and (update % args.eval_every == 0 or update == num_updates):
            rows = evaluate(policy)
            metrics |= common.evaluation_metrics(rows, initial_rows)
            run.log_samples(update, rows)
        run.log(update, metrics)
        if args.save_every and update % args.save_every == 0:
            run.save_checkpoint(update, policy)
        run.stop_if_asked(update, device, policy)

    # 3.7 Save, and check that what was saved is what was trained
    common.save_model(policy, tokenizer, run.folder / "policy", device)
    probe = rollout(policy, prompts.batch([0], device), num_samples=0, greedy=True)
    common.check_saved(policy, run.folder / "policy", probe, args.temperature, args.dtype, args.attention)
    run.finish("policy")


if __name__ == "__main__":
    main()
