r"""SPR, Successive Policy Re-weighting (NeurIPS 2024 FITML workshop, Algorithm 2): weighted supervised fine-tuning.

To each prompt x the policy π_k gives N responses y_1 … y_N. Their rewards become weights, and the next policy is
fitted to the weighted responses by maximum likelihood:

    π_{k+1}  =  argmax over π of  Σ_i exp((r(x, y_i) − W(x)) / β) log π(y_i | x),    W(x) = β log Σ_i exp(r(x, y_i) / β)

so that π_{k+1} approaches π_k(y | x) exp((r − W) / β), the best policy near π_k (Theorem 1; Algorithm 2 prints argmin
by mistake). The paper gives β no value: it is a temperature, in reward units. Towards 0 only the best response counts
(Best-of-N), towards ∞ all count alike. A demonstration, where the data has one, is one of the N; it is no draw of π_k,
so that is a heuristic. --weighting uniform --num-samples 0 is supervised fine-tuning on the demonstrations alone.

This script does without these parts of ReMax:
- several models at once: the reward model is read for the moment of scoring, the initial policy for an evaluation;
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

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run begins, ctrl-C ends the script without a traceback

import time
from dataclasses import dataclass
from typing import Literal

import torch

import common
from common import Fraction, NonNegativeFloat, NonNegativeInt, PathOrName, PositiveFloat, PositiveInt

# ---------------------------------------------------------------- Flags


@dataclass
class Args:
    # The run
    seed: int = 1
    """Seed of everything that is random."""
    output_dir: PathOrName | None = None
    """Folder of the run; by default runs/<script>__<seed>__<time> where you stand."""
    resume: PathOrName | None = None
    """Folder of a run to go on with from its last checkpoint; no other flag is needed."""
    save_every: NonNegativeInt = 0
    """Updates between checkpoints for --resume; 0 for none."""

    # Model and data
    model: PathOrName = "examples/reviews/policy"
    """Causal language model to start from: a local folder or a hub name."""
    dataset: PathOrName = "examples/reviews/prompts.jsonl"
    """Training data: a .jsonl, .json, .csv or .parquet file, or a hub name."""
    dataset_config: str | None = None
    """Configuration of a hub data set, such as gsm8k's main; files have none."""
    dataset_split: str = "train"
    """Split of the hub data sets; files have none."""
    prompt_column: str = "prompt"
    """Column that holds the prompts, as texts or as chat messages."""
    eval_dataset: PathOrName | None = "examples/reviews/prompts_test.jsonl"
    """Held-out rows, in the same form; None to hold out --eval-size rows of --dataset."""
    eval_every: NonNegativeInt = 1
    """Updates between evaluations, which also come first and last; 0 for none."""
    eval_size: PositiveInt = 64
    """Held-out rows per evaluation."""
    max_prompt_length: PositiveInt = 64
    """Prompt tokens; longer prompts lose their beginning."""
    response_length: PositiveInt = 48
    """Maximum number of tokens of a response."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    rollout_batch_size: PositiveInt = 128
    """Rows that one rank decodes at once, at least those of one prompt; changes memory, not the distribution."""

    # Reward
    reward_model: PathOrName | None = "examples/reviews/reward_model"
    """Sequence-classification model that scores prompt + response; its tokenizer may be another."""
    reward_function: PathOrName | None = None
    """Python function file.py:name that scores texts in place of the reward model."""
    gold_reward_function: PathOrName | None = None
    """Python function file.py:name that is logged and never trained on."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Reward units taken from a response that does not end."""

    # Optimization
    total_episodes: PositiveInt = 1024
    """Prompts in the whole run, over all ranks, rounded down to whole updates; the data set repeats as needed."""
    batch_size: PositiveInt = 256
    """Prompts per update, over all ranks."""
    micro_batch_size: PositiveInt = 32
    """Rows per forward and backward on one rank; changes memory, not results."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate of AdamW; about 1e-6 for models of billions of parameters."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after warm-up; linear and cosine fall towards 0."""
    warmup_ratio: Fraction = 0.05
    """Share of the schedule's steps in which the learning rate rises from 0."""
    max_grad_norm: PositiveFloat = 50.0
    """Gradient norm to clip to; the gradient of a sum over n tokens is n times the gradient of their mean."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; master weights are float32 in both."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 0 shards nothing over ranks, 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep optimizer state and frozen models in CPU memory between uses."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward, to save memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers; eager for models that have no sdpa."""

    # Successive policy re-weighting
    num_samples: NonNegativeInt = 8
    """Sampled responses per prompt; an update samples --batch-size times this."""
    beta: PositiveFloat = 1.0
    """Temperature of the weights, in reward units; towards 0 only the best counts."""
    weighting: Literal["spr", "best-of-n", "uniform"] = "spr"
    """Weights of a prompt's responses: exp((r − W) / β), or 1 for the best (ties share it), or equal ones."""
    num_epochs: PositiveInt = 2
    """Passes over the responses of an update."""
    num_minibatches: PositiveInt = 4
    """Optimizer steps per pass; each takes an equal share of the prompts."""
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
    counts_BN = torch.ones_like(rewards_BN, dtype=torch.float64)
    if weighting == "best-of-n":
        counts_BN = (rewards_BN == rewards_BN.amax(1, keepdim=True)).double()
    return counts_BN / counts_BN.sum(1, keepdim=True)


def weighted_nll(logprobs_BT, weights, mask_BT, denominator):
    """−Σ weight · log π / denominator -> scalar, differentiable in logprobs_BT. weights: (B,) or (B, T).

    A row's tokens are summed. The denominator is a number of prompts.
    """
    weights_BT = weights.detach().to(logprobs_BT).view(len(logprobs_BT), -1)
    mask_BT = mask_BT.to(logprobs_BT)
    return -(weights_BT * mask_BT * logprobs_BT / denominator).sum()  # eq. 13, as a loss


def read_demonstrations(path, prompts, column, tokenizer, eos_ids, max_length):
    """Gives prompts their demonstrations, as token ids with EOS -> the prompts that have one which is not too long."""
    missing = [prompt for prompt in prompts if prompt.answers[column] is None]
    if column == Args.completion_column and len(missing) == len(prompts):
        return prompts  # the data have no demonstrations, and nobody says that they do
    kept = [prompt for prompt in prompts if (prompt.answers[column] or "").strip()]
    if not kept:
        common.fail(f"{path}: no row has a demonstration in the column {column!r} (--completion-column names another)")
    num_empty = len(prompts) - len(kept) - len(missing)
    counts = {"of the prompts have none, dropped": len(missing), "empty, dropped": num_empty}
    common.report(path, len(kept), "demonstrations", counts)
    for prompt, ids in zip(kept, common.encode_answers(tokenizer, kept, column, eos_ids)):
        prompt.demonstration = ids
    lengths = [len(prompt.demonstration) for prompt in kept]
    common.report_lengths(lengths, max_length, "--response-length", "demonstrations", "are dropped")
    kept = [prompt for prompt in kept if len(prompt.demonstration) <= max_length]  # a cut one teaches not to end
    return kept or common.fail(f"every demonstration has more than --response-length {max_length} tokens")


# ---------------------------------------------------------------- Training


def main() -> None:
    args = common.parse_args(Args)
    backend = common.start_processes(args)  # this rank among the others, and how models compute on it
    shares = backend.world_size * args.num_minibatches
    minibatch_size, num_updates = common.plan_updates(args.total_episodes, args.batch_size, shares)
    X = minibatch_size * args.num_minibatches  # prompts on this rank

    # 1. Data
    tokenizer = common.load_tokenizer(args.model)
    eos_ids = common.load_eos_ids(args.model, tokenizer)

    def load_prompts(path):
        hub = (args.dataset_config, args.dataset_split)
        column = args.completion_column
        prompts = common.load_prompts(
            path, hub, args.prompt_column, tokenizer, args.max_prompt_length, [column], may_lack_answers=True
        )
        return read_demonstrations(path, prompts, column, tokenizer, eos_ids, args.response_length)

    eval_size = args.eval_size if args.eval_every else 0
    prompts, eval_prompts = common.train_and_held_out(load_prompts, args.dataset, args.eval_dataset, eval_size)
    has_demonstrations = prompts[0].demonstration is not None
    N = args.num_samples + has_demonstrations  # responses per prompt
    B = X * N  # rows on this rank
    if B == 0:
        common.fail(f"{args.dataset}: no column {args.completion_column!r} with demonstrations, and --num-samples is 0")

    # 2. Models: the policy stays in memory; the others are loaded when needed
    whole = common.Backend(**vars(backend) | dict(zero_stage=0, offload=False))  # DeepSpeed would keep what it shards
    scoring = (args.reward_model, args.reward_function, args.missing_eos_penalty)

    def load_reward():
        return common.Reward(*scoring, whole, prompts[0])

    rewards = {}
    if args.num_samples > 0 or args.weighting != "uniform":  # else nothing is scored: it is supervised fine-tuning
        load_reward()  # a bad flag fails now; then a reward model is in memory for each call only, a function stays
        rewards["reward"] = load_reward() if args.reward_function else lambda responses: load_reward()(responses)
    if args.gold_reward_function:
        rewards["gold_reward"] = common.Reward(None, args.gold_reward_function, 0.0, backend, prompts[0])
    sampling = common.Sampling(args.max_prompt_length, args.response_length, args.temperature, args.rollout_batch_size)

    def load_policy(path, backend):  # section 7 reads it once more, on the CPU
        return common.load_policy(path, tokenizer, sampling, backend)

    policy = common.train_engine(load_policy(args.model, backend), backend, args.max_grad_norm)

    def evaluate(policy):
        reference = common.freeze(load_policy(args.model, whole), whole)
        return common.evaluate(policy, reference, eval_prompts, rewards, args.micro_batch_size)

    run = common.Run(args, __file__, num_updates, policy)
    if eval_prompts:
        initial_rows = evaluate(common.freeze(load_policy(args.model, whole), whole))
        if run.last_checkpoint == 0:
            run.log(0, dict(episodes=0) | common.evaluation_metrics(initial_rows, initial_rows))
            run.log_samples(0, initial_rows)

    for update in range(run.last_checkpoint + 1, num_updates + 1):
        common.set_seed(args.seed, update, backend.rank)
        start_time = time.perf_counter()

        # 3. Rollout: responses of the policy as it is now
        batch = common.shuffled_batch(prompts, args.seed, update, args.batch_size)
        responses = common.rollout(policy, batch, args.num_samples, greedy=False, demonstrations=has_demonstrations)
        mask_BT = responses.mask_BT
        rollout_time = time.perf_counter()

        # 4. Score
        scores = {name: reward(responses) for name, reward in rewards.items()}
        rewards_XN = scores.get("reward", torch.zeros(B, device=backend.device)).view(X, N)
        weights_XN = weights_of(rewards_XN, args.weighting, args.beta)  # each prompt's sum to 1
        weights_B = weights_XN.flatten()
        run.write_rows(f"iteration-{update}.jsonl", responses.rows(**scores, weight=weights_B), N)
        score_time = time.perf_counter()

        # 5. Update: a fit of its own, with new moments of Adam and its own schedule
        common.reset_optimizer(policy)
        losses = []
        grad_norms = []
        minibatches = [part for _ in range(args.num_epochs) for part in torch.randperm(X).split(minibatch_size)]
        for step, minibatch in enumerate(minibatches, start=1):
            numbers = (minibatch[:, None] * N + torch.arange(N)).flatten()  # of the rows of its prompts
            # Rows of weight 0 teach nothing. All ranks keep equally many, since they must take equal steps.
            num_kept = max(common.gather_rows([int((weights_B[numbers] > 0).sum())]))
            kept = numbers[weights_B[numbers].argsort(descending=True, stable=True)[:num_kept].tolist()]
            for positions, is_last in common.micro_batches(mask_BT[kept].sum(1), args.micro_batch_size):
                rows = kept[positions].tolist()
                logprobs_MT = common.forward(policy, responses[rows])
                loss = weighted_nll(logprobs_MT, weights_B[rows], mask_BT[rows], denominator=minibatch_size)
                common.backward(policy, loss, is_last)
                losses.append(loss.detach())
            schedule = (args.lr_schedule, args.warmup_ratio, step, len(minibatches))
            learning_rate = common.scheduled(args.learning_rate, *schedule)
            grad_norm, skipped_updates = common.optimizer_step(policy, learning_rate)
            grad_norms.append(grad_norm)
            run.show(dict(step=step, loss=sum(losses) / step))
        grad_norm = sum(grad_norms) / len(grad_norms)
        train_time = time.perf_counter()

        # 6. Log, evaluate, checkpoint
        means = scores | dict(
            weight_ess=1 / weights_XN.square().sum(1),
            response_length=mask_BT.sum(1),
            truncated_fraction=~responses.ended_B,
            loss=torch.stack(losses).sum() / len(grad_norms),
        )
        if "reward" in scores:
            means |= dict(best_reward=rewards_XN.amax(1), weighted_reward=(weights_XN * rewards_XN).sum(1))
            means["reward_std"] = rewards_XN.new_tensor(common.gather_rows(rewards_XN.tolist())).std(correction=0)
        metrics = dict(episodes=update * args.batch_size) | common.global_means(**means)
        metrics |= dict(grad_norm=grad_norm, learning_rate=learning_rate, skipped_updates=skipped_updates)
        metrics |= dict(
            seconds_rollout=rollout_time - start_time,
            seconds_score=score_time - rollout_time,
            seconds_train=train_time - score_time,
            tokens_per_second=metrics["response_length"] * B * backend.world_size / (train_time - start_time),
        )
        if eval_prompts and (update % args.eval_every == 0 or update == num_updates):
            rows = evaluate(policy)
            metrics |= common.evaluation_metrics(rows, initial_rows)
            run.log_samples(update, rows)
        run.log(update, metrics)
        if args.save_every and update % args.save_every == 0:
            run.save_checkpoint(update)
        run.stop_if_asked(update)

    # 7. Save, and check that the saved model gives the same outputs
    response = common.rollout(policy, prompts[:1], num_samples=0, greedy=True)
    inputs = (response.prompts_BP, response.prompt_mask_BP, response.tokens_BT)
    common.save_and_check(policy, tokenizer, run.folder / "policy", load_policy, inputs, backend)
    run.finish("policy", common.LANGUAGE_MODEL)


if __name__ == "__main__":
    main()
