r"""GRPO for language models: PPO's clipped ratios, with a group of responses as baseline in place of a value model.

For each prompt x the policy π writes N responses y_1 … y_N. A_i, one number for all tokens of y_i, is its reward
less the mean of the N rewards, divided by their standard deviation. The policy takes one step or more that maximise

    mean over responses of  1/|y_i| Σ_t (min(ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i) − β k_t),   ρ_t = π(y_t) / π_old(y_t)

(arXiv 2402.03300, eq. 3) with k_t = π_ref/π − 1 − log(π_ref/π), "k3". --variant dr-grpo (arXiv 2503.20783) leaves out
the standard deviation and 1/|y_i|. What differs from ReMax, and what follows from it:
- the baseline: the mean of N sampled rewards, and no greedy response. It includes the response's own reward, so the
  expected gradient (without the divisions) is (N − 1)/N of the true one;
- the standard deviation: prompts whose rewards hardly differ count as much as those whose rewards differ a lot;
- 1/|y_i|: of right responses short ones gain the most per token, of wrong ones long ones lose the least;
- the KL in the loss: on average k3 pulls like the forward KL(π_ref ‖ π) of each token. On a token that π prefers it
  pulls with less than β, however far π has gone; in ReMax the pull grows with log(π/π_ref);
- importance ratios, clipping, old log-probabilities: they correct for the steps since the responses were sampled;
  with one step per rollout, the default, all ratios are 1.

One CPU:     python grpo.py
One GPU:     python grpo.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8
Eight GPUs:  deepspeed grpo.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
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

    # GRPO
    num_samples: PositiveInt = 8
    """Sampled responses per prompt; an update samples --batch-size times this."""
    variant: Literal["grpo", "dr-grpo"] = "grpo"
    """dr-grpo does not divide advantages by their standard deviation, nor losses by the response's length."""
    beta: NonNegativeFloat = 0.2
    """Weight of the KL penalty against the initial policy, which is in the loss: advantage per nat."""
    num_epochs: PositiveInt = 1
    """Passes over the responses of an update."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps per pass; each takes an equal share of the responses."""
    clip_range: PositiveFloat = 0.2
    """How far an importance ratio may leave 1 before moving further earns nothing."""


# ---------------------------------------------------------------- The algorithm


def advantages(rewards_B, num_samples, variant):
    """Each reward less the mean of its prompt's -> advantages_B, detached. A prompt's rows are adjacent."""
    rewards_XN = 1.0 * rewards_B.detach().view(-1, num_samples)  # X prompts; whole numbers become floats
    advantages_XN = rewards_XN - rewards_XN.mean(1, keepdim=True)
    if variant == "grpo":
        advantages_XN = advantages_XN / (rewards_XN.std(1, keepdim=True, correction=0) + 1e-4)
    return advantages_XN.view(-1)


def policy_loss(logprobs_BT, old_logprobs_BT, ref_logprobs_BT, advantages_B, mask_BT, beta, clip_range, weights_B):
    """−Σ weight · (min(ρ A, clip(ρ) A) − β k3) -> scalar, differentiable in logprobs_BT.

    weights_B: 1 / (number of rows), for GRPO also / (tokens of the row).
    """
    advantages_BT = advantages_B.detach().to(logprobs_BT)[:, None].expand_as(logprobs_BT)
    old_logprobs_BT = old_logprobs_BT.detach().to(logprobs_BT)
    mask_BT = mask_BT.to(logprobs_BT)
    ratios_BT = ((logprobs_BT - old_logprobs_BT) * mask_BT).exp()
    clipped_BT = ratios_BT.clamp(1 - clip_range, 1 + clip_range)
    objective_BT = torch.min(ratios_BT * advantages_BT, clipped_BT * advantages_BT)  # arXiv 1707.06347, eq. 7
    ref_log_ratios_BT = (ref_logprobs_BT.detach().to(logprobs_BT) - logprobs_BT) * mask_BT
    kl_BT = ref_log_ratios_BT.exp() - 1 - ref_log_ratios_BT  # k3: arXiv 2402.03300, eq. 4
    weights_BT = weights_B.detach().to(logprobs_BT)[:, None] * mask_BT
    return -((objective_BT - beta * kl_BT) * weights_BT).sum()


# ---------------------------------------------------------------- Training


def main() -> None:
    args = common.parse_args(Args)
    if args.num_samples == 1:
        common.fail("--num-samples 1: the rewards of a prompt's responses are compared, so give 2 or more")
    backend = common.start_processes(  # this rank among the others, and how models compute on it
        dtype=args.dtype,
        attention=args.attention,
        zero_stage=args.zero_stage,
        offload=args.offload,
        gradient_checkpointing=args.gradient_checkpointing,
        lora_rank=args.lora_rank,
    )
    shares = backend.world_size * args.num_minibatches
    minibatch_size, num_updates = common.plan_updates(args.total_episodes, args.batch_size, shares)
    minibatch_size *= args.num_samples  # rows
    B = minibatch_size * args.num_minibatches  # rows on this rank

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
        sampled = common.rollout(policy, batch, num_samples=args.num_samples, greedy=False)
        mask_BT = sampled.mask_BT
        clock.lap("rollout")

        # 4. Score
        rewards_B = reward(sampled)
        clock.lap("score")

        # 5. Update: one step or several, all measured against the policy at rollout time
        ref_logprobs_BT = common.all_logprobs(reference, sampled, args.micro_batch_size)
        logprobs_BT = common.all_logprobs(policy, sampled, args.micro_batch_size)
        advantages_B = advantages(rewards_B, args.num_samples, args.variant)
        weights_B = torch.full_like(rewards_B, 1 / minibatch_size)  # the engine averages over ranks
        if args.variant == "grpo":
            weights_B /= mask_BT.sum(1)
        learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, update, num_updates)
        losses = []
        log_ratios, grad_norms = [], []
        minibatches = [part for _ in range(args.num_epochs) for part in torch.randperm(B).split(minibatch_size)]
        for minibatch in minibatches:
            for positions, is_last in common.micro_batches(mask_BT[minibatch].sum(1), args.micro_batch_size):
                rows = minibatch[positions].tolist()
                mask_MT, old_logprobs_MT, ref_logprobs_MT = mask_BT[rows], logprobs_BT[rows], ref_logprobs_BT[rows]
                logprobs_MT = common.logprobs(policy, sampled[rows])
                loss = policy_loss(
                    logprobs_MT,
                    old_logprobs_MT,
                    ref_logprobs_MT,
                    advantages_B[rows],
                    mask_MT,
                    args.beta,
                    args.clip_range,
                    weights_B[rows],
                )
                common.backward(policy.engine, loss, is_last)
                losses.append(loss.detach())
                log_ratios.append((logprobs_MT.detach() - old_logprobs_MT)[mask_MT == 1])
            grad_norm, skipped_updates = common.optimizer_step(policy.engine, learning_rate)
            grad_norms.append(grad_norm)
        grad_norm = sum(grad_norms) / len(grad_norms)
        clock.lap("train")

        # 6. Log, evaluate, checkpoint
        log_ratios_N = torch.cat(log_ratios)
        means = dict(
            reward=rewards_B,
            reward_std=common.standard_deviation(rewards_B),
            tied_fraction=rewards_B.view(-1, args.num_samples).std(1, correction=0) < 1e-4,  # only KL teaches
            kl=((logprobs_BT - ref_logprobs_BT) * mask_BT).sum(1),
            entropy=-logprobs_BT[mask_BT == 1],  # estimated by the sampled tokens
            response_length=mask_BT.sum(1),
            truncated_fraction=~sampled.ended_B,
            loss=torch.stack(losses).sum() / len(grad_norms),
            clip_fraction=((log_ratios_N.exp() - 1).abs() > args.clip_range).float(),
            approx_kl=log_ratios_N.exp() - 1 - log_ratios_N,
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
