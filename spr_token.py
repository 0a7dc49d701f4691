r"""SPR, Successive Policy Re-weighting (NeurIPS 2024 FITML workshop, Algorithm 1): a weight for each token.

For each prompt x the policy π_k writes N responses. Their rewards r teach a value model: Q(s_t, y_t) is the reward to
expect once token t is chosen in state s_t, which is the prompt and the tokens before t. The next policy is fitted to
the weighted tokens by maximum likelihood:

    π_{k+1}  =  argmax over π of  Σ_i Σ_t exp((Q(s_t, y_t) − W(s_t)) / β) log π(y_t | s_t)

so that π_{k+1} approaches π_k(y_t | s_t) exp((Q − W) / β), the best policy near π_k (Theorem 1; Algorithm 1 prints
argmin by mistake). W(s) = β log E exp(Q(s, y) / β) over tokens y of π_k (eq. 8), so a state's weights have mean 1: a
natural policy gradient step. With V the expected reward, Q(s_t, y_t) = V(s_{t+1}), and a response's weights multiply to

    Π_t exp((Q(s_t, y_t) − W(s_t)) / β)  =  exp((r(x, y) − V(s_0)) / β) · exp(−Σ_t (W(s_t) − V(s_t)) / β)

The second factor is absent from Algorithm 2 (spr.py): here a response pays for each state whose tokens differ in value.

Lines 5 and 6 of Algorithm 1 are as printed. So is line 4 with --td-lambda 0, line 7 with α = 1; but then an iteration
carries the reward back by one token only, so by default Q is fitted to the reward itself, whose mean it is.
Line 10 adds to older responses; here each iteration has only its own, since eq. 13 wants responses of π_k.

ReMax has these parts, which this script does not need:
- several models at once: the reward model is loaded only while it scores, the initial policy only in an evaluation;
  but the policy and the value model stay, with Adam's moments (the paper loads one model at a time);
- a KL penalty and its reference policy: the weights multiply π_k, so π_{k+1} stays near it;
- the policy gradient: fitting is supervised learning, which may pass over its responses more than once.

One CPU:     python spr_token.py
One GPU:     python spr_token.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8
Eight GPUs:  deepspeed spr_token.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8 \
                 --batch-size 1024 --zero-stage 2 --gradient-checkpointing

Names carry shapes: B rows, M rows of a micro-batch, T response tokens. Masks include the first EOS.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import common  # before torch: some settings must come before it is imported
from common import Fraction, NonNegativeFloat, NonNegativeInt, PathOrName, PositiveFloat, PositiveInt

# isort: split
import torch
import torch.nn.functional as F

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
    total_episodes: PositiveInt = 1024
    """Prompts in the whole run, over all ranks, rounded down to whole updates; the data set repeats as needed."""
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

    # Successive policy re-weighting
    num_samples: PositiveInt = 8
    """Sampled responses per prompt; an update samples --batch-size times this."""
    beta: PositiveFloat = 1.0
    """Temperature of the weights, in reward units; towards 0 only the best counts."""
    num_epochs: PositiveInt = 2
    """Passes over the responses of an update."""
    num_minibatches: PositiveInt = 4
    """Optimizer steps per pass; each takes an equal share of the responses."""
    value_epochs: PositiveInt = 2
    """Passes of the value model over an update's responses, each in --num-samples times as many steps as a policy's."""
    value_learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the value model; about 1e-5 for models of billions of parameters."""
    td_lambda: Fraction = 1.0
    """Decay of the returns that Q is fitted to, per token; 1 trusts the rewards, 0 the value model."""


# ---------------------------------------------------------------- The algorithm


class TokenValues(common.ScalarOutputs):
    """A value model with a second head: it gives Q(s_t, y_t) where token t has been read, and W(s_t) before that."""

    def __init__(self, model, zero):
        super().__init__(model, zero)
        self.reference_head = copy.deepcopy(model.score)

    def forward(self, ids_BL, mask_BL, states_BT):
        """-> values_B2T, float32: Q and W. states_BT: where in ids_BL the states s_t have been read."""
        outputs = self.model.base_model(**common.model_inputs(ids_BL, mask_BL), use_cache=False)
        rows_B1 = torch.arange(len(ids_BL), device=ids_BL.device)[:, None]
        values_BT = self.model.score(outputs.last_hidden_state[rows_B1, states_BT + 1])
        reference_BT = self.reference_head(outputs.last_hidden_state[rows_B1, states_BT])
        return torch.stack([values_BT, reference_BT], 1) - self.zero


def value_targets(rewards_B, values_BT, mask_BT, gamma):
    """r_t + γ Q(s_{t+1}, y_{t+1}) -> targets_BT, detached. The reward comes with the last token, nothing after it."""
    values_BT = values_BT.detach() * mask_BT.to(values_BT)
    targets_BT = F.pad(gamma * values_BT[:, 1:], (0, 1))
    last_B1 = mask_BT.long().sum(1, keepdim=True) - 1
    rewards_B1 = rewards_B.detach().to(targets_BT)[:, None]
    return targets_BT.scatter_add(1, last_B1, rewards_B1)  # eq. 14


def lambda_returns(rewards_B, values_BT, mask_BT, gamma, td_lambda):
    """G_t = r_t + γ ((1 − λ) Q(s_{t+1}, y_{t+1}) + λ G_{t+1}) -> returns_BT, detached."""
    returns_BT = values_BT
    for _ in range(mask_BT.shape[1]):  # each time G is right for one more token
        returns_BT = value_targets(rewards_B, values_BT.lerp(returns_BT, td_lambda), mask_BT, gamma)
    return returns_BT


def linex_loss(values_BN, reference_B, beta):
    """mean of exp(z) − z − 1, z = (Q − W) / β -> scalar, differentiable in reference_B.

    It is least at W = β log mean_i exp(Q_i / β). Above z = 5 the tangent goes on: finite, and of the right sign.
    """
    z_BN = (values_BN.detach() - reference_B[:, None]) / beta
    exp_BN = z_BN.clamp(max=5).exp()
    exp_BN = exp_BN.where(z_BN <= 5, exp_BN * (z_BN - 4))
    return (exp_BN - z_BN - 1).mean()  # eq. 19


def value_loss(values_B2T, targets_BT, mask_BT, beta, denominator):
    """Σ (Q − target)² + 2 β² (exp(z) − z − 1) / denominator -> scalar. The factor makes the second about (Q − W)²."""
    values_N, reference_N = values_B2T.movedim(1, 0)[:, mask_BT == 1]
    errors_N = values_N - targets_BT.detach()[mask_BT == 1]
    linex = linex_loss(values_N[:, None], reference_N, beta)
    return (errors_N.square().mean() + 2 * beta**2 * linex) * len(errors_N) / denominator


def token_weights(values_B2T, mask_BT, beta):
    """exp((Q − W) / β) -> weights_BT, float64, 0 after a response's end."""
    values_BT, reference_BT = values_B2T.detach().double().unbind(1)
    return ((values_BT - reference_BT) / beta).exp().where(mask_BT == 1, 0)  # eq. 13


def weighted_nll(logprobs_BT, weights, mask_BT, denominator):
    """−Σ weight · log π / denominator -> scalar, differentiable in logprobs_BT. weights: (B,) or (B, T).

    A row's tokens are summed. The denominator is a number of prompts.
    """
    weights_BT = weights.detach().to(logprobs_BT).view(len(logprobs_BT), -1)
    mask_BT = mask_BT.to(logprobs_BT)
    return -(weights_BT * mask_BT * logprobs_BT / denominator).sum()  # eq. 13, as a loss


def explained_shares(values_BT, rewards_B, mask_BT):
    """1 − (r − Q)² / Var(r) after ¼, ½, ¾ and all of the tokens -> {name: shares_B}; Var(r) is over all ranks."""
    mean = common.global_means(mean=rewards_B)["mean"]
    variance = common.global_means(variance=(rewards_B - mean) ** 2)["variance"]
    shares = {}
    for percent in (25, 50, 75, 100):
        last_B1 = mask_BT.sum(1, keepdim=True) * percent // 100 - 1
        values_B = values_BT.gather(1, last_B1.clamp(min=0)).squeeze(1)
        shares[f"explained_{percent}"] = 1 - (rewards_B - values_B) ** 2 / variance
    return shares


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
    )

    def load_prompts(path):
        return common.load_prompts(path, layout, tokenizer, args.max_prompt_length)

    eval_size = args.eval_size if args.eval_every else 0
    prompts, eval_prompts = common.train_and_held_out(load_prompts, args.dataset, args.eval_dataset, eval_size)
    N = args.num_samples  # responses per prompt
    shares = backend.world_size * args.num_minibatches
    minibatch_size, num_updates = common.plan_updates(args.total_episodes, args.batch_size, shares)
    X = minibatch_size * args.num_minibatches  # prompts on this rank
    B = X * N  # rows on this rank

    # 2. Models: what is trained stays in memory; the others are loaded when needed
    scoring = dict(
        model=args.reward_model,
        function=args.reward_function,
        missing_eos_penalty=args.missing_eos_penalty,
        prompt=prompts[0],
        micro_batch_size=args.micro_batch_size,
    )
    reward = common.Reward(backend=backend.unsharded(), stays_loaded=False, **scoring)
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
    value = common.train_engine(TokenValues(value.model, value.zero), backend, args.max_grad_norm)

    def evaluate(policy):
        reference = common.load_reference(policy, backend.unsharded())
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
        rewards_XN = scores["reward"].view(X, N)
        clock.lap("score")

        # 5. Update: fits of their own, with new moments of Adam and their own schedules: Q and W, then the policy
        common.reset_optimizer(value)
        values_BT = common.all_values(value, responses, args.micro_batch_size)[:, 0]
        targets_BT = lambda_returns(scores["reward"], values_BT, mask_BT, args.gamma, args.td_lambda)
        value_losses = []
        parts = [rows for _ in range(args.value_epochs) for rows in torch.randperm(B).split(minibatch_size)]
        minibatches = [part for _ in range(args.num_epochs) for part in torch.randperm(X).split(minibatch_size)]
        for step, part in enumerate(parts, start=1):
            num_tokens = common.global_means(mean=mask_BT[part].sum())["mean"]  # the engine averages over ranks
            for positions, is_last in common.micro_batches(mask_BT[part].sum(1), args.micro_batch_size):
                rows = part[positions].tolist()
                values_M2T = common.values(value, responses[rows])
                loss = value_loss(values_M2T, targets_BT[rows], mask_BT[rows], args.beta, num_tokens)
                common.backward(value, loss, is_last)
                value_losses.append(loss.detach())
            schedule = (args.lr_schedule, args.warmup_ratio, step, len(parts))
            value_learning_rate = common.scheduled(args.value_learning_rate, *schedule)
            _, value_skipped = common.optimizer_step(value, value_learning_rate)
        values_B2T = common.all_values(value, responses, args.micro_batch_size)
        weights_BT = token_weights(values_B2T, mask_BT, args.beta)
        run.write_rows(f"iteration-{update}.jsonl", responses.rows(**scores, weights=weights_BT), N)
        held_out = {}
        if eval_prompts:  # with the policy that Q and W belong to
            new = common.rollout(policy, common.deal_out(eval_prompts), num_samples=1, greedy=False)
            new_rewards_B = reward(new)
            values_B2T = common.all_values(value, new, args.micro_batch_size)
            once = len(eval_prompts[backend.rank :: backend.world_size])  # prompts that were dealt twice come last
            new_mask_BT = new.mask_BT[:once]
            held_out = explained_shares(values_B2T[:once, 0], new_rewards_B[:once], new_mask_BT)
            held_out["held_out_weight"] = token_weights(values_B2T[:once], new_mask_BT, args.beta)[new_mask_BT == 1]

        common.reset_optimizer(policy.engine)
        losses = []
        grad_norms = []
        num_steps = len(minibatches)
        for step, minibatch in enumerate(minibatches, start=1):
            numbers = (minibatch[:, None] * N + torch.arange(N)).flatten()  # of the rows of its prompts
            for positions, is_last in common.micro_batches(mask_BT[numbers].sum(1), args.micro_batch_size):
                rows = numbers[positions].tolist()
                logprobs_MT = common.logprobs(policy, responses[rows])
                loss = weighted_nll(logprobs_MT, weights_BT[rows] / N, mask_BT[rows], denominator=minibatch_size)
                common.backward(policy.engine, loss, is_last)
                losses.append(loss.detach())
            learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, step, num_steps)
            grad_norm, skipped_updates = common.optimizer_step(policy.engine, learning_rate)
            grad_norms.append(grad_norm)
            run.show(dict(step=step, loss=sum(losses) / len(grad_norms)))
        grad_norm = sum(grad_norms) / len(grad_norms)
        skipped_updates += value_skipped
        clock.lap("train")

        # 6. Log, evaluate, checkpoint
        shares_B = weights_BT.sum(1) ** 2 / weights_BT.square().sum(1) / mask_BT.sum(1)  # of tokens that count
        means = scores | dict(
            weight_ess=shares_B,
            response_length=mask_BT.sum(1),
            truncated_fraction=~responses.ended_B,
            loss=torch.stack(losses).sum() / len(grad_norms),
            value_loss=torch.stack(value_losses).sum() / len(parts),
            best_reward=rewards_XN.amax(1),
            reward_std=common.standard_deviation(rewards_XN),
        )
        means |= held_out
        metrics = dict(episodes=update * args.batch_size) | common.global_means(**means)
        metrics["weight_max"] = max(common.gather_rows([weights_BT.max().item()]))
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
