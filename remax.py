r"""ReMax: reinforcement learning from human feedback without a value model (arXiv 2310.10505, Section 4, Algorithm 1).

For each prompt x the policy π writes y, sampled (--num-samples of them), and ȳ, greedy, whose reward is y's baseline:

    gradient  ≈  mean over sampled responses of  Σ_t (R_t − r(x, ȳ)) ∇ log π(y_t | x, y_<t)

R_t is the reward r(x, y) of the whole response less the KL penalties from token t on (for γ = 1). A token's penalty is
kl_coef · log(π / π_ref); Algorithm 1 has no penalty. The baseline does not depend on y, so the gradient stays unbiased,
and a baseline near the expected reward makes it less noisy. ȳ is decoded and scored, but not trained on.

PPO has these parts, which this script does not need:
- a value model, its optimizer, GAE: the environment is deterministic (the next state is the text plus the chosen token)
  and a response's reward comes at its end. So one number per prompt can be the baseline, and no value per token;
- importance ratios, clipping, old log-probabilities: each rollout serves one optimizer step, so the policy that takes
  the step is the one that sampled;
- epochs, minibatches, whitened advantages: there is one step per rollout, and advantages stay in reward units.

One CPU:     python remax.py
One GPU:     python remax.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8
Eight GPUs:  deepspeed remax.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8 \
                 --batch-size 128 --zero-stage 2 --gradient-checkpointing

Names carry shapes: B rows, M rows of a micro-batch, T response tokens. Masks include the first EOS.
"""

from dataclasses import dataclass
from typing import Literal

import common  # before torch: some settings must come before it is imported
from common import Fraction, NonNegativeFloat, NonNegativeInt, PathOrName, PositiveFloat, PositiveInt

# isort: split
import torch

# ---------------------------------------------------------------- Flags


@dataclass
class Args:
    # The run
    seed: int = 1
    """Seed of everything that is random."""
    output_dir: PathOrName | None = None
    """Folder of the run; by default runs/<script>__<seed>__<time> in the current directory."""
    resume: PathOrName | None = None
    """Resume the run in this folder from its last checkpoint; no other flag is needed."""
    save_every: NonNegativeInt = 0
    """Updates between checkpoints for --resume; 0 writes one only when the run is interrupted."""

    # Model and data
    model: PathOrName = "examples/reviews/policy"
    """Causal language model to start from: a local folder or a hub name."""
    dataset: PathOrName = "examples/reviews/prompts.jsonl"
    """Training data: a .jsonl, .ndjson, .json, .csv, .tsv (also .gz) or .parquet file, a folder, or a hub name."""
    dataset_config: str | None = None
    """Configuration of a folder or hub data set, such as gsm8k's main; files have none."""
    dataset_split: str = "train"
    """Split of a folder or hub data set; files have none."""
    prompt_column: str = "prompt"
    """Column that holds the prompts, as texts or as chat messages."""
    eval_dataset: PathOrName | None = "examples/reviews/prompts_test.jsonl"
    """Held-out rows, in the same form; None to hold out --eval-size rows of --dataset."""
    eval_every: NonNegativeInt = 25
    """Updates between evaluations, also before the first and after the last update; 0 for none."""
    eval_size: PositiveInt = 64
    """Held-out rows per evaluation."""
    max_prompt_length: PositiveInt = 64
    """Prompt tokens; longer prompts lose their beginning."""
    response_length: PositiveInt = 48
    """Maximum number of tokens of a response."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    rollout_batch_size: PositiveInt | None = None
    """Rows that one rank decodes at once, at least those of one prompt; default 128, or what fits a 16 GiB cache."""

    # Reward
    reward_model: PathOrName | None = "examples/reviews/reward_model"
    """Sequence-classification model that scores prompt + response; it may have its own tokenizer."""
    reward_function: PathOrName | None = None
    """Python function file.py:name that scores texts in place of the reward model."""
    gold_reward_function: PathOrName | None = None
    """Python function file.py:name whose rewards are logged and never trained on."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Reward units taken from a response that does not end."""

    # Optimization
    total_episodes: PositiveInt = 6400
    """Prompts in the whole run, over all ranks, rounded down to whole updates; the data set repeats as needed."""
    batch_size: PositiveInt = 64
    """Prompts per update, over all ranks."""
    micro_batch_size: PositiveInt = 32
    """Rows per forward and backward on one rank; changes memory, and results only by rounding."""
    learning_rate: PositiveFloat = 7e-4
    """Peak learning rate of AdamW; with billions of parameters about 1e-6, for demonstrations and rewards 1e-5."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after warm-up: constant, or falling towards 0 in a line or a half cosine."""
    warmup_ratio: Fraction = 0.05
    """Share of the schedule in which the learning rate rises from 0 to its peak."""
    max_grad_norm: PositiveFloat = 50.0
    """Clip the gradient norm to this; where a loss sums over a response's tokens, norms grow with its length."""
    kl_coef: NonNegativeFloat = 0.2
    """Weight of the KL penalty against the initial policy, in reward units per nat."""
    gamma: Fraction = 1.0
    """Discount per token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; master weights are float32, and with --zero-stage 1 to 3 so are summed gradients."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 0 shards nothing over ranks, 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep optimizer state, and frozen models that stay loaded, in CPU memory between uses."""
    lora_rank: NonNegativeInt = 0
    """Train adapters of this rank in place of the weights (give 3 to 10 times the learning rate); 0 for none."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward, to save memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of transformers; eager if a model lacks sdpa; flash_attention_2 copies padded caches at each token."""

    # ReMax
    num_samples: PositiveInt = 1
    """Sampled responses per prompt; an update samples --batch-size times this."""


# ---------------------------------------------------------------- The algorithm


def advantages(rewards_B, baseline_rewards_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef, gamma):
    """Each token's return minus the reward of the greedy response -> advantages_BT, detached, 0 after a response's end.

    rewards_B, baseline_rewards_B: rewards of the sampled and of the greedy responses. logprobs_BT, ref_logprobs_BT:
    log π and log π_ref of the sampled tokens, in nats. kl_coef: reward units per nat. gamma: discount per token.
    """
    rewards_B = 1.0 * rewards_B.detach()  # whole numbers become floats
    baseline_rewards_B = baseline_rewards_B.detach().to(rewards_B)
    # The penalty is a reward, so it is detached: its own gradient has mean 0.
    log_ratios_BT = (logprobs_BT - ref_logprobs_BT).detach().to(rewards_B)  # their mean over samples estimates the KL
    mask_BT = mask_BT.to(rewards_B)

    shaped_BT = -kl_coef * log_ratios_BT * mask_BT
    last_B1 = mask_BT.long().sum(1, keepdim=True) - 1
    shaped_BT.scatter_add_(1, last_B1, rewards_B[:, None])  # the reward comes with the last token
    returns_BT = torch.zeros_like(shaped_BT)
    return_B = torch.zeros_like(rewards_B)
    for t in reversed(range(shaped_BT.shape[1])):
        return_B = shaped_BT[:, t] + gamma * return_B  # R_t = Σ_{s≥t} γ^{s−t} shaped_s
        returns_BT[:, t] = return_B
    # The baseline is not discounted: γ^(length − t) depends on the rest of y, so it would bias the gradient.
    return (returns_BT - baseline_rewards_B[:, None]) * mask_BT  # ReMax, Algorithm 1


def policy_loss(logprobs_BT, advantages_BT, mask_BT, denominator):
    """−Σ advantage · log π / denominator -> scalar, differentiable in logprobs_BT.

    The denominator is a number of rows, so that no row's weight depends on the others' lengths.
    """
    advantages_BT = advantages_BT.detach().to(logprobs_BT)
    mask_BT = mask_BT.to(logprobs_BT)
    # No ratio, no clip: these are the log-probabilities of the policy that sampled.
    return -(advantages_BT * mask_BT * logprobs_BT / denominator).sum()


# ---------------------------------------------------------------- Training


def main() -> None:
    args = common.parse_args(Args)
    backend = common.start_processes(  # this rank among the others, and how models compute on it
        dtype=args.dtype,
        attention=args.attention,
        zero_stage=args.zero_stage,
        offload=args.offload,
        gradient_checkpointing=args.gradient_checkpointing,
        lora_rank=args.lora_rank,
    )
    prompts_per_rank, num_updates = common.plan_updates(args.total_episodes, args.batch_size, backend.world_size)
    B = prompts_per_rank * args.num_samples  # sampled rows on this rank

    # 1. Data
    tokenizer = common.load_tokenizer(args.model)
    layout = common.Layout(
        config=args.dataset_config,
        split=args.dataset_split,
        prompt_column=args.prompt_column,
    )

    def load_prompts(path):
        return common.load_prompts(path, layout, tokenizer, args.max_prompt_length)

    eval_size = args.eval_size if args.eval_every else 0
    prompts, eval_prompts = common.train_and_held_out(load_prompts, args.dataset, args.eval_dataset, eval_size)

    # 2. Models: the reward, the policy in training, and the frozen reference (the policy before training)
    scoring = dict(
        model=args.reward_model,
        function=args.reward_function,
        missing_eos_penalty=args.missing_eos_penalty,
        prompt=prompts[0],
        micro_batch_size=args.micro_batch_size,
    )
    reward = common.Reward(backend=backend, **scoring)
    reward_functions = dict(reward=reward)
    if args.gold_reward_function:
        reward_functions["gold_reward"] = common.Reward(function=args.gold_reward_function, prompt=prompts[0])
    sampling = common.Sampling(
        max_prompt_length=args.max_prompt_length,
        response_length=args.response_length,
        temperature=args.temperature,
        batch_size=args.rollout_batch_size,
    )
    policy = common.load_policy(args.model, tokenizer, sampling, backend)
    policy.engine = common.train_engine(policy.engine, backend, args.max_grad_norm)
    reference = common.load_reference(policy, backend)

    def evaluate(policy):
        return common.evaluate(policy, reference, eval_prompts, reward_functions, args.micro_batch_size)

    run = common.Run(  # with --resume it loads the engines
        output_dir=args.output_dir,
        resume=args.resume,
        save_every=args.save_every,
        flags=vars(args),
        num_updates=num_updates,
        engines=[policy.engine],
    )
    if eval_prompts:
        initial_rows = evaluate(reference)  # the win rate compares with these
        if run.last_checkpoint == 0:
            run.log(0, dict(episodes=0) | common.evaluation_metrics(initial_rows, initial_rows))
            run.log_samples(0, initial_rows)

    for update in range(run.last_checkpoint + 1, num_updates + 1):
        common.set_seed(args.seed, update, backend.rank)
        clock = common.Clock()

        # 3. Rollout: responses of the policy as it is now
        batch = common.shuffled_batch(prompts, args.seed, update, args.batch_size)  # this rank's share
        responses = common.rollout(policy, batch, num_samples=args.num_samples, greedy=True)
        sampled = responses[:B]  # all sampled rows, grouped by prompt; one greedy row per prompt follows
        mask_BT = sampled.mask_BT
        clock.lap("rollout")

        # 4. Score
        rewards_R = reward(responses)  # R rows: the sampled and the greedy ones
        rewards_B = rewards_R[:B]
        baselines_B = rewards_R[B:].repeat_interleave(args.num_samples)  # all samples of a prompt have one baseline
        clock.lap("score")

        # 5. Update: one step. The policy is still the one that sampled: its log-probabilities give loss and KL penalty.
        ref_logprobs_BT = common.all_logprobs(reference, sampled, args.micro_batch_size)
        logprobs_BT = torch.empty_like(ref_logprobs_BT)  # the loop fills it, for the metrics
        learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, update, num_updates)
        losses = []
        for rows, is_last in common.micro_batches(mask_BT.sum(1), args.micro_batch_size):
            logprobs_MT = common.logprobs(policy, sampled[rows])
            logprobs_BT[rows] = logprobs_MT.detach()
            ref_logprobs_MT = ref_logprobs_BT[rows]
            mask_MT = mask_BT[rows]
            advantages_MT = advantages(
                rewards_B[rows], baselines_B[rows], logprobs_MT, ref_logprobs_MT, mask_MT, args.kl_coef, args.gamma
            )
            loss = policy_loss(logprobs_MT, advantages_MT, mask_MT, denominator=B)  # the engine averages over ranks
            common.backward(policy.engine, loss, is_last)
            losses.append(loss.detach())
        grad_norm, skipped_updates = common.optimizer_step(policy.engine, learning_rate)
        clock.lap("train")

        # 6. Log, evaluate, checkpoint
        means = dict(
            reward=rewards_B,
            reward_std=common.standard_deviation(rewards_B),
            baseline_reward=baselines_B,
            tied_fraction=(rewards_B - baselines_B).abs() < 1e-4,  # only KL teaches
            kl=((logprobs_BT - ref_logprobs_BT) * mask_BT).sum(1),
            entropy=-logprobs_BT[mask_BT == 1],  # estimated by the sampled tokens
            response_length=mask_BT.sum(1),
            truncated_fraction=~sampled.ended_B,
            loss=torch.stack(losses).sum(),
        )
        if args.gold_reward_function:
            means["gold_reward"] = reward_functions["gold_reward"](sampled)
        metrics = dict(episodes=update * args.batch_size) | common.global_means(**means)
        metrics |= dict(grad_norm=grad_norm, learning_rate=learning_rate, skipped_updates=skipped_updates)
        metrics |= clock.seconds
        metrics["tokens_per_second"] = metrics["response_length"] * B * backend.world_size / clock.total()
        if eval_prompts and (update % args.eval_every == 0 or update == num_updates):
            eval_rows = evaluate(policy)
            metrics |= common.evaluation_metrics(eval_rows, initial_rows)
            run.log_samples(update, eval_rows)
        run.log(update, metrics)
        if args.save_every and update % args.save_every == 0:
            run.save_checkpoint(update)
        run.stop_if_asked(update)

    # 7. Save, and check that the saved weights are the trained ones
    common.save_and_check(policy.engine, tokenizer, run.folder / "policy", backend)
    run.finish("policy", common.LANGUAGE_MODEL)


if __name__ == "__main__":
    main()
