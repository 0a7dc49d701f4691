r"""SPR, Successive Policy Re-weighting (NeurIPS 2024 FITML workshop, Algorithm 2): weighted supervised fine-tuning.

For each prompt x the policy π_k writes N responses y_1 … y_N. The next policy is fitted to them, weighted by rewards:

    π_{k+1}  =  argmax over π of  Σ_i exp((r(x, y_i) − W(x)) / β) log π(y_i | x),    W(x) = β log Σ_i exp(r(x, y_i) / β)

so that π_{k+1} approaches π_k exp((r − W) / β) (Theorem 1; Algorithm 2 prints argmin by mistake). β → 0 is Best-of-N.
A demonstration counts as one more sample of its prompt, which the theorem does not cover. With --weighting uniform and
--num-samples 0 the script is supervised fine-tuning on demonstrations.

ReMax has these parts, which this script does not need:
- several models at once: the reward model is loaded only while it scores, the initial policy only in an evaluation;
- a KL penalty and its reference policy: the weights multiply π_k, so π_{k+1} stays near it;
- the policy gradient: fitting is supervised learning, which may pass over its responses more than once.

One CPU:     python spr.py
One GPU:     python spr.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8
Eight GPUs:  deepspeed spr.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8 \
                 --batch-size 1024 --zero-stage 2 --gradient-checkpointing

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
    eval_every: NonNegativeInt = 1
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
    total_episodes: PositiveInt | None = None
    """Prompts in the whole run, over all ranks; None for 1,024, or with --num-samples 0 for --num-epochs passes."""
    batch_size: PositiveInt = 256
    """Prompts per update, over all ranks."""
    micro_batch_size: PositiveInt = 32
    """Rows per forward and backward on one rank; changes memory, and results only by rounding."""
    learning_rate: PositiveFloat = 2e-4
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

    # Successive policy re-weighting
    num_samples: NonNegativeInt = 8
    """Sampled responses per prompt; an update samples --batch-size times this."""
    beta: PositiveFloat = 1.0
    """Temperature of the weights, in reward units; towards 0 only the best counts."""
    weighting: Literal["spr", "best-of-n", "uniform"] = "spr"
    """Weights of a prompt's responses: exp((r − W) / β), or 1 for the best (ties share it), or equal ones."""
    num_epochs: PositiveInt = 2
    """Passes over the responses of an update; with --num-samples 0 over the data set."""
    num_minibatches: PositiveInt = 4
    """Optimizer steps per pass; each takes an equal share of the responses."""
    completion_column: str = "completion"
    """Column that holds demonstrations, as texts or as chat messages; where the data has none, none are used."""


# ---------------------------------------------------------------- The algorithm


def reference_value(rewards_BN, beta):
    """W(x) = β log Σ_i exp(r_i / β) over a prompt's N responses -> W_B, float64. beta: above 0, in reward units."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}; expected a finite number above 0")
    return beta * (rewards_BN.detach().double() / beta).logsumexp(1)  # eq. 15: the sum, so that weights add up to 1


def sample_weights(rewards_BN, reference_B, beta):
    """exp((r − W) / β) -> weights_BN, float64 (in float32 a β far below the differences of the rewards breaks it)."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}; expected a finite number above 0")
    return ((rewards_BN.detach().double() - reference_B.detach().double()[:, None]) / beta).exp()  # eq. 13


def weights_of(rewards_BN, weighting, beta):
    """-> weights_BN, float64; each prompt's weights sum to 1."""
    if weighting == "spr":
        return sample_weights(rewards_BN, reference_value(rewards_BN, beta), beta)
    is_best_BN = rewards_BN == rewards_BN.amax(1, keepdim=True)
    counts_BN = (is_best_BN | (weighting == "uniform")).double()
    return counts_BN / counts_BN.sum(1, keepdim=True)


def weighted_nll(logprobs_BT, weights, mask_BT, denominator):
    """−Σ weight · log π / denominator -> scalar, differentiable in logprobs_BT. weights: (B,) or (B, T).

    A row's tokens are summed. The denominator is a number of prompts.
    """
    weights_BT = weights.detach().to(logprobs_BT).view(len(logprobs_BT), -1)
    mask_BT = mask_BT.to(logprobs_BT)
    return -(weights_BT * mask_BT * logprobs_BT / denominator).sum()  # eq. 13, as a loss


def with_demonstrations(path, prompts, column, tokenizer, max_length):
    """Prompts get their answers, as token ids with EOS -> those whose answer is not too long."""
    if prompts[0].answers[column] is None:  # then no row has one
        return prompts
    for prompt, ids in zip(prompts, common.encode_answers(tokenizer, prompts, column)):
        prompt.demonstration = ids
    kept = [prompt for prompt in prompts if len(prompt.demonstration) <= max_length]  # a cut one teaches not to end
    common.report(path, len(kept), "demonstrations", {"over --response-length, dropped": len(prompts) - len(kept)})
    return kept


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

    # 1. Data
    tokenizer = common.load_tokenizer(args.model)
    layout = common.Layout(
        config=args.dataset_config,
        split=args.dataset_split,
        prompt_column=args.prompt_column,
        answer_columns=[args.completion_column],
    )

    def load_prompts(path):
        prompts = common.load_prompts(path, layout, tokenizer, args.max_prompt_length)
        return with_demonstrations(path, prompts, args.completion_column, tokenizer, args.response_length)

    eval_size = args.eval_size if args.eval_every else 0
    prompts, eval_prompts = common.train_and_held_out(load_prompts, args.dataset, args.eval_dataset, eval_size)
    has_demonstrations = prompts[0].demonstration is not None
    if not has_demonstrations and (args.num_samples == 0 or args.completion_column != Args.completion_column):
        common.fail(f"{args.dataset}: no row has a demonstration in the column {args.completion_column!r}")
    N = args.num_samples + has_demonstrations  # responses per prompt
    total_episodes = args.total_episodes or (1024 if args.num_samples > 0 else args.num_epochs * len(prompts))
    shares = backend.world_size * args.num_minibatches
    minibatch_size, num_updates = common.plan_updates(total_episodes, args.batch_size, shares)
    X = minibatch_size * args.num_minibatches  # prompts on this rank
    B = X * N  # rows on this rank
    num_epochs = args.num_epochs if args.num_samples > 0 else 1  # in an update
    num_steps = num_epochs * args.num_minibatches * (1 if args.num_samples > 0 else num_updates)  # in a fit

    # 2. Models: what is trained stays in memory; the others are loaded when needed
    scoring = dict(
        model=args.reward_model,
        function=args.reward_function,
        missing_eos_penalty=args.missing_eos_penalty,
        prompt=prompts[0],
        micro_batch_size=args.micro_batch_size,
    )
    reward_functions = {}
    if args.num_samples > 0 or args.weighting != "uniform":  # else nothing is scored: it is supervised fine-tuning
        reward_functions["reward"] = common.Reward(backend=backend.unsharded(), stays_loaded=False, **scoring)
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

    def evaluate(policy):
        reference = common.load_reference(policy, backend.unsharded())
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
        initial_rows = evaluate(common.load_reference(policy, backend.unsharded()))  # the win rate compares with these
        if run.last_checkpoint == 0:
            run.log(0, dict(episodes=0) | common.evaluation_metrics(initial_rows, initial_rows))
            run.log_samples(0, initial_rows)

    for update in range(run.last_checkpoint + 1, num_updates + 1):
        common.set_seed(args.seed, update, backend.rank)
        clock = common.Clock()

        # 3. Rollout: responses of the policy as it is now
        batch = common.shuffled_batch(prompts, args.seed, update, args.batch_size)  # this rank's share
        responses = common.rollout(policy, batch, num_samples=args.num_samples, greedy=False)
        mask_BT = responses.mask_BT
        clock.lap("rollout")

        # 4. Score
        scores = {name: function(responses) for name, function in reward_functions.items()}
        rewards_XN = scores.get("reward", torch.zeros(B, device=backend.device)).view(X, N)
        weights_XN = weights_of(rewards_XN, args.weighting, args.beta)  # each prompt's sum to 1
        weights_B = weights_XN.flatten()
        if args.num_samples > 0:
            run.write_rows(f"iteration-{update}.jsonl", responses.rows(**scores, weight=weights_B), N)
        clock.lap("score")

        # 5. Update: a fit of its own, with new moments of Adam and its own schedule; without samples, a part of one fit
        minibatches = [part for _ in range(num_epochs) for part in torch.randperm(X).split(minibatch_size)]
        first_step = (update - 1) * len(minibatches) % num_steps + 1
        if first_step == 1:
            common.reset_optimizer(policy.engine)
        losses = []
        grad_norms = []
        for step, minibatch in enumerate(minibatches, start=first_step):
            numbers = (minibatch[:, None] * N + torch.arange(N)).flatten()  # of the rows of its prompts
            # Rows of weight 0 teach nothing. All ranks keep equally many, since they must take equal steps.
            num_positive = int((weights_B[numbers] > 0).sum())
            num_kept = max(common.gather_rows([num_positive]))
            order = weights_B[numbers].argsort(descending=True, stable=True)
            numbers = numbers[order[:num_kept].tolist()]
            for positions, is_last in common.micro_batches(mask_BT[numbers].sum(1), args.micro_batch_size):
                rows = numbers[positions].tolist()
                logprobs_MT = common.logprobs(policy, responses[rows])
                loss = weighted_nll(logprobs_MT, weights_B[rows], mask_BT[rows], denominator=minibatch_size)
                common.backward(policy.engine, loss, is_last)
                losses.append(loss.detach())
            learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, step, num_steps)
            grad_norm, skipped_updates = common.optimizer_step(policy.engine, learning_rate)
            grad_norms.append(grad_norm)
            run.show(dict(step=step, loss=sum(losses) / len(grad_norms)))
        grad_norm = sum(grad_norms) / len(grad_norms)
        clock.lap("train")

        # 6. Log, evaluate, checkpoint
        means = scores | dict(
            weight_ess=1 / weights_XN.square().sum(1),
            response_length=mask_BT.sum(1),
            truncated_fraction=~responses.ended_B,
            loss=torch.stack(losses).sum() / len(grad_norms),
        )
        if "reward" in scores:
            means |= dict(best_reward=rewards_XN.amax(1), weighted_reward=(weights_XN * rewards_XN).sum(1))
            means["reward_std"] = common.standard_deviation(rewards_XN)
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
