r"""PPO for language models: clipped importance ratios, a value model and generalized advantage estimation.

For each prompt x the policy π writes one response y, sampled. Its tokens' advantages A_t come from the rewards and a
value model V; then the policy takes several steps on the same responses, each of which maximises

    mean over tokens of  min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t),   ρ_t = π(y_t | x, y_<t) / π_old(y_t | x, y_<t)

(Schulman et al. 2017, arXiv 1707.06347, eq. 7). A_t is GAE(γ, λ) of each token's reward: minus its KL penalty, plus
r(x, y) at the last token (Schulman et al. 2016, arXiv 1506.02438, eq. 16); whitened over all tokens of the batch.

PPO has these parts, which ReMax does without:
- a value model, its optimizer, GAE: a second model to train and to keep in memory, with flags of its own;
- importance ratios, clipping, old log-probabilities: they correct for the steps since the responses were sampled;
- epochs, minibatches, whitened advantages: several steps for one rollout, and more flags to tune.

One CPU:     python ppo.py
One GPU:     python ppo.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --value-learning-rate 1e-5 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8
Eight GPUs:  deepspeed ppo.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --value-learning-rate 1e-5 \
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

    # PPO
    num_epochs: PositiveInt = 4
    """Passes over the responses of an update."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps per pass; each takes an equal share of the responses."""
    clip_range: PositiveFloat = 0.2
    """How far an importance ratio may leave 1 before moving further earns nothing."""
    clip_range_value: PositiveFloat = 0.2
    """How far a value may move from its value at rollout time before its loss stops falling, in reward units."""
    gae_lambda: Fraction = 0.95
    """Decay of generalized advantage estimation per token; 1 trusts the rewards, 0 the value model."""
    value_learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the value model; about 1e-5 for models of billions of parameters."""


# ---------------------------------------------------------------- The algorithm


def advantages(rewards_B, values_BT, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef, gamma, gae_lambda):
    """Generalized advantage estimates, not whitened -> (advantages_BT, returns_BT), detached, 0 after a response's end.

    rewards_B: rewards of the sampled responses. values_BT: the return that the value model expects before token t.
    logprobs_BT, ref_logprobs_BT: log π_old and log π_ref of the sampled tokens, in nats. kl_coef: reward units per nat.
    gamma: discount per token.
    """
    rewards_B = 1.0 * rewards_B.detach()  # whole numbers become floats
    # The penalty is a reward, so it is detached: its own gradient has mean 0.
    log_ratios_BT = (logprobs_BT - ref_logprobs_BT).detach().to(rewards_B)  # their mean over samples estimates the KL
    mask_BT = mask_BT.to(rewards_B)
    values_BT = values_BT.detach().to(rewards_B) * mask_BT  # nothing is expected after the last token

    shaped_BT = -kl_coef * log_ratios_BT * mask_BT
    last_B1 = mask_BT.long().sum(1, keepdim=True) - 1
    shaped_BT.scatter_add_(1, last_B1, rewards_B[:, None])  # the reward comes with the last token
    advantages_BT = torch.zeros_like(shaped_BT)
    advantage_B = next_value_B = torch.zeros_like(rewards_B)
    for t in reversed(range(shaped_BT.shape[1])):
        delta_B = shaped_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * gae_lambda * advantage_B  # A_t = Σ_{s≥t} (γλ)^{s−t} δ_s
        advantages_BT[:, t] = advantage_B
        next_value_B = values_BT[:, t]
    return advantages_BT * mask_BT, (advantages_BT + values_BT) * mask_BT


def policy_loss(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip_range, denominator):
    """−Σ min(ρ A, clip(ρ) A) / denominator -> scalar, differentiable in logprobs_BT.

    The denominator is a number of real tokens.
    """
    advantages_BT = advantages_BT.detach().to(logprobs_BT)
    old_logprobs_BT = old_logprobs_BT.detach().to(logprobs_BT)
    mask_BT = mask_BT.to(logprobs_BT)
    ratios_BT = ((logprobs_BT - old_logprobs_BT) * mask_BT).exp()
    clipped_BT = ratios_BT.clamp(1 - clip_range, 1 + clip_range)
    objective_BT = torch.min(ratios_BT * advantages_BT, clipped_BT * advantages_BT)  # arXiv 1707.06347, eq. 7
    return -(objective_BT * mask_BT / denominator).sum()


def value_loss(values_BT, old_values_BT, returns_BT, mask_BT, clip_range_value, denominator):
    """Σ ½ max((V − R)², (clip(V) − R)²) / denominator -> scalar, differentiable in values_BT."""
    old_values_BT = old_values_BT.detach().to(values_BT)
    returns_BT = returns_BT.detach().to(values_BT)
    mask_BT = mask_BT.to(values_BT)
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range_value, clip_range_value)
    errors_BT = (values_BT - returns_BT) * mask_BT
    clipped_errors_BT = (clipped_BT - returns_BT) * mask_BT
    return (0.5 * torch.max(errors_BT**2, clipped_errors_BT**2) / denominator).sum()


def whiten(advantages_BT, mask_BT):
    """Mean 0 and standard deviation 1 over all real tokens of the global batch -> advantages_BT, 0 after the end."""
    mean = common.global_means(mean=advantages_BT[mask_BT == 1])["mean"]
    centred_BT = (advantages_BT - mean) * mask_BT
    variance = common.global_means(variance=centred_BT[mask_BT == 1] ** 2)["variance"]
    return centred_BT / (variance**0.5 + 1e-8)


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
    shares = backend.world_size * args.num_minibatches
    minibatch_size, num_updates = common.plan_updates(args.total_episodes, args.batch_size, shares)
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
    value = common.load_value_model(args.reward_model, args.model, sampling, backend)
    value = common.train_engine(value, backend, args.max_grad_norm)
    reference = common.load_reference(policy, backend)

    def evaluate(policy):
        return common.evaluate(policy, reference, eval_prompts, reward_functions, args.micro_batch_size)

    run = common.Run(  # with --resume it loads the engines
        output_dir=args.output_dir,
        resume=args.resume,
        save_every=args.save_every,
        flags=vars(args),
        num_updates=num_updates,
        engines=[policy.engine, value],
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
        sampled = common.rollout(policy, batch, num_samples=1, greedy=False)
        mask_BT = sampled.mask_BT
        clock.lap("rollout")

        # 4. Score
        rewards_B = reward(sampled)
        clock.lap("score")

        # 5. Update: several steps, all measured against the policy and the values at rollout time
        ref_logprobs_BT = common.all_logprobs(reference, sampled, args.micro_batch_size)
        logprobs_BT = common.all_logprobs(policy, sampled, args.micro_batch_size)
        values_BT = common.all_values(value, sampled, args.micro_batch_size)
        advantages_BT, returns_BT = advantages(
            rewards_B, values_BT, logprobs_BT, ref_logprobs_BT, mask_BT, args.kl_coef, args.gamma, args.gae_lambda
        )
        advantages_BT = whiten(advantages_BT, mask_BT)
        learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, update, num_updates)
        value_learning_rate = learning_rate * args.value_learning_rate / args.learning_rate  # the same schedule
        losses = []
        value_losses, log_ratios, grad_norms = [], [], []
        minibatches = [part for _ in range(args.num_epochs) for part in torch.randperm(B).split(minibatch_size)]
        for minibatch in minibatches:
            num_tokens = common.global_means(mean=mask_BT[minibatch].sum())["mean"]  # the engine averages over ranks
            for positions, is_last in common.micro_batches(mask_BT[minibatch].sum(1), args.micro_batch_size):
                rows = minibatch[positions].tolist()
                mask_MT, old_logprobs_MT, advantages_MT = mask_BT[rows], logprobs_BT[rows], advantages_BT[rows]
                logprobs_MT = common.logprobs(policy, sampled[rows])
                loss = policy_loss(logprobs_MT, old_logprobs_MT, advantages_MT, mask_MT, args.clip_range, num_tokens)
                common.backward(policy.engine, loss, is_last)
                losses.append(loss.detach())
                values_MT = common.values(value, sampled[rows])
                old_values_MT, returns_MT = values_BT[rows], returns_BT[rows]
                loss = value_loss(values_MT, old_values_MT, returns_MT, mask_MT, args.clip_range_value, num_tokens)
                common.backward(value, loss, is_last)
                value_losses.append(loss.detach())
                log_ratios.append((logprobs_MT.detach() - old_logprobs_MT)[mask_MT == 1])
            grad_norm, policy_skipped = common.optimizer_step(policy.engine, learning_rate)
            _, value_skipped = common.optimizer_step(value, value_learning_rate)
            grad_norms.append(grad_norm)
        grad_norm = sum(grad_norms) / len(grad_norms)
        skipped_updates = policy_skipped + value_skipped
        clock.lap("train")

        # 6. Log, evaluate, checkpoint
        log_ratios_N = torch.cat(log_ratios)
        means = dict(
            reward=rewards_B,
            reward_std=common.standard_deviation(rewards_B),
            kl=((logprobs_BT - ref_logprobs_BT) * mask_BT).sum(1),
            entropy=-logprobs_BT[mask_BT == 1],  # estimated by the sampled tokens
            response_length=mask_BT.sum(1),
            truncated_fraction=~sampled.ended_B,
            loss=torch.stack(losses).sum() / len(grad_norms),
            value_loss=torch.stack(value_losses).sum() / len(grad_norms),
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
