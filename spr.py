r"""SPR, Successive Policy Re-weighting (NeurIPS 2024 FITML workshop): reinforcement learning as weighted fine-tuning.

To each prompt x the policy π_k gives N responses y_1 … y_N. Their rewards become weights, and the next policy is
fitted to the weighted responses by maximum likelihood:

    π_{k+1}  =  argmax over π of  Σ_i exp((r(x, y_i) − W(x)) / β) log π(y_i | x),    W(x) = β log Σ_i exp(r(x, y_i) / β)

which follows π_k(y | x) exp((r − W) / β), the best policy near π_k (Theorem 1; line 5 of Algorithm 2 prints argmin by
mistake). The paper gives β no value: it is a temperature, in reward units. Towards 0 only the best response counts
(Best-of-N), towards ∞ all count alike. Demonstrations, where the data has them, are weighted like samples; they are no
draws from π_k, so that is a heuristic. --weighting uniform --num-samples 0 is supervised fine-tuning on them alone.

What ReMax has and this script has not, and why it may be left out here:
- several models at once: generating, scoring and fitting come one after the other, each in a process of its own that
  holds one model and hands over through files, so the peak of the memory is that of supervised fine-tuning;
- a KL penalty and its reference policy: by the form of the update π_{k+1} is near π_k;
- the policy gradient: fitting is supervised learning, which may pass over its responses more than once.

--level token (Algorithm 1) gives each token its weight exp((Q − W) / β): Q is fitted by temporal differences, in
--td-sweeps fits per iteration, and W to Q. Demonstrations are not used there.

One CPU:     python spr.py
One GPU:     python spr.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8
Eight GPUs:  deepspeed spr.py --model M --reward-model R --dataset D --eval-dataset E --learning-rate 1e-6 \
                 --max-prompt-length 512 --response-length 256 --dtype bfloat16 --micro-batch-size 8 \
                 --batch-size 128 --zero-stage 2 --gradient-checkpointing

Names carry shapes: B rows, N responses of a prompt, P prompt tokens, T response tokens. Logits at position t predict
token t + 1. Masks are over response tokens, up to and including the first EOS. What does not teach the algorithm is in
common.py.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
from common import Fraction, NonNegativeFloat, NonNegativeInt, PathOrName, PositiveFloat, PositiveInt

# ---------------------------------------------------------------- Flags


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
    """Training data: a .jsonl, .json, .csv or .parquet file, or a hub name."""
    dataset_split: str = "train"
    """Split of the hub data sets; files have none."""
    prompt_column: str = "prompt"
    """Column that holds the prompts, as texts or as chat messages."""
    eval_dataset: PathOrName | None = str(common.EXAMPLE / "prompts_test.jsonl")
    """Held-out rows, in the same form; None to hold out --eval-size rows of --dataset."""
    eval_every: NonNegativeInt = 25
    """Updates between evaluations, which also come first and last; 0 for never."""
    eval_size: PositiveInt = 64
    """Held-out rows per evaluation."""
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
    """Gradient norm to clip to; where the loss sums over tokens, the norm is about --response-length times a mean's."""
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

    # Successive policy re-weighting
    iterations: PositiveInt = 4
    """Rounds of sampling, scoring and re-weighted supervised learning."""
    prompts_per_iteration: PositiveInt = 256
    """Prompts of one iteration, over all ranks; the next iteration takes the next ones, and the data set repeats."""
    num_samples: NonNegativeInt = 8
    """Sampled responses per prompt; the rows of an update are --batch-size times this."""
    epochs_per_iteration: PositiveInt = 2
    """Passes over an iteration's responses, rounded down to whole updates."""
    beta: PositiveFloat = 1.0
    """Temperature of the weights exp((r − W) / β), in reward units; towards 0 only the best response counts."""
    weighting: Literal["spr", "best-of-n", "uniform"] = "spr"
    """Weights of a prompt's responses: exp((r − W) / β), or 1 for the best (ties share it), or equal ones."""
    reference: Literal["empirical", "learned"] = "empirical"
    """The reference W: computed from a prompt's responses, or fitted by a network that reads the prompt."""
    completion_column: str = "completion"
    """Column that holds demonstrations, as texts or as chat messages; where the data has none, none are used."""
    sampling_threshold: NonNegativeInt = 0
    """Iterations at the beginning that train on demonstrations alone."""
    level: Literal["sequence", "token"] = "sequence"
    """One weight per response (Algorithm 2), or one per token, from a fitted Q (Algorithm 1)."""
    td_sweeps: PositiveInt = 8
    """Fits of Q to the targets of the fit before, per iteration; each carries the reward back by one token."""


# ---------------------------------------------------------------- The algorithm

TARGET_SHARE = 0.5  # α of Algorithm 1: the share of the new Q in the next Q̄


def reference_value(rewards_BN, beta):
    """W(x) = β log Σ_i exp(r_i / β) over a prompt's N responses -> W_B, float64. beta: above 0, in reward units."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; wanted is a finite number above 0")
    return beta * (rewards_BN.detach().double() / beta).logsumexp(1)  # eq. 15: the sum, so that weights add up to 1


def sample_weights(rewards_BN, reference_B, beta):
    """exp((r − W) / β) -> weights_BN, float64 (in float32 a β far below the differences of the rewards breaks it)."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; wanted is a finite number above 0")
    return ((rewards_BN.detach().double() - reference_B.detach().double()[:, None]) / beta).exp()  # eq. 13


def linex_loss(rewards_BN, reference_B, beta):
    """mean of exp(z) − z − 1, z = (r − W) / β -> scalar, differentiable in reference_B.

    It is least where W = β log mean_i exp(r_i / β) (eq. 8). Above z = 5 the exponential goes on as its tangent: finite,
    and the gradient keeps its sign.
    """
    z_BN = (rewards_BN.detach() - reference_B.to(rewards_BN)[:, None]) / beta
    exp_BN = z_BN.clamp(max=5).exp() * (1 + (z_BN - 5).clamp(min=0))
    return (exp_BN - z_BN - 1).mean()  # eq. 19


def weighted_nll(logprobs_BT, weights, mask_BT, denominator):
    """−Σ weight · log π / denominator -> scalar, differentiable in logprobs_BT. weights: (B,) or (B, T).

    A row's tokens are summed. The denominator is the number of prompts of the global batch.
    """
    weights_BT = weights.detach().to(logprobs_BT).view(len(logprobs_BT), -1)
    return -(weights_BT * mask_BT.to(logprobs_BT) * logprobs_BT / denominator).sum()  # eq. 13, as a loss


def value_targets(rewards_B, values_BT, mask_BT, gamma):
    """r_t + γ Q̄(s_{t+1}, y_{t+1}) -> targets_BT (eq. 14). The reward comes with the last token; nothing comes after."""
    next_BT = F.pad((gamma * values_BT.detach() * mask_BT.to(values_BT))[:, 1:], (0, 1))
    last_B1 = mask_BT.long().sum(1, keepdim=True) - 1
    return next_BT.scatter_add(1, last_B1, rewards_B[:, None].to(next_BT))


# ---------------------------------------------------------------- Training


def main() -> None:
    args = common.parse_args(Args)
    if args.level == "token" and (args.weighting != "spr" or args.num_samples == 0 or args.sampling_threshold):
        common.fail("--level token weights samples: no other --weighting, no --num-samples 0, no --sampling-threshold")
    if args.reference == "learned" and args.weighting != "spr":
        common.fail(f"--reference learned needs --weighting spr: {args.weighting} weights have no reference")
    if args.batch_size > args.epochs_per_iteration * args.prompts_per_iteration:
        common.fail(f"--batch-size {args.batch_size} is more than all the prompts that an iteration passes over")
    phases = common.Phases()
    phases.run(check, args)

    # 1. Models: none in this process. Each phase below is a process of its own, which holds one model, hands over to
    #    the next through files and returns what it has measured. A journal has the finished ones; --resume skips them.

    # 2. Data
    data = dict(split=args.dataset_split, column=args.prompt_column, max_length=args.max_prompt_length)
    if args.level == "sequence":
        data |= dict(completion_column=args.completion_column, max_completion=args.response_length)
    load_prompts = functools.partial(common.load_prompts, tokenizer=common.load_tokenizer(args.model), **data)
    held_out = (args.eval_dataset, args.eval_size if args.eval_every else 0)
    prompts, eval_prompts = common.train_and_held_out(load_prompts, args.dataset, *held_out)
    if not prompts[0].demonstrations and (args.num_samples == 0 or args.sampling_threshold > 0):
        common.fail(f"{args.dataset}: demonstrations are wanted, but there is no column {args.completion_column!r}")

    if not args.resume:
        args.resume = args.output_dir = phases.run(common.open_run, args, __file__)
    phase = functools.partial(phases.run_once, Path(args.resume))
    metrics = dict(episodes=0)
    for k in range(1, args.iterations + 2):
        start, size = (k - 1) * args.prompts_per_iteration, args.prompts_per_iteration * (k <= args.iterations)
        indices = common.shuffled_indices(len(prompts), args.seed, start, size)
        it = Iteration(args, k, [prompts[i] for i in indices], eval_prompts)

        # 3. Rollout: N responses of the policy as it is now to each prompt of the slice
        measured = phase(generate, args, it)

        # 4. Score; and log the iteration before, whose policy has been evaluated now
        if it.eval_prompts:
            phase(measure_kl, args, it)
        measured |= phase(score, args, it, metrics)
        if k > args.iterations:
            break

        # 5. Update: the weights, if they wait for a fitted W, and weighted maximum likelihood
        if args.level == "token":
            for sweep in range((k - 1) * args.td_sweeps, k * args.td_sweeps):
                phase(write_targets, args, it, sweep)
                measured |= phase(fit_action_values, args, it, sweep)
        if it.fits_reference:
            measured |= phase(fit_reference, args, it)
        metrics = measured | phase(train, args, it)

        # 6. Log: `train` has logged its updates but the last, which waits for the evaluation

    # 7. Save. That what was saved is what was trained, `train` has checked.
    phases.run(save, args, it)


def check(args) -> None:
    """What is wrong is better told now than after the first rollout."""
    _, world_size, _ = common.start_processes()
    common.exact_division(args.batch_size, world_size, "the number of ranks", "--batch-size")
    if args.offload and args.zero_stage == 0:
        common.fail("--offload keeps the optimizer state in CPU memory, which needs --zero-stage 1, 2 or 3")
    for function in filter(None, (args.reward_function, args.gold_reward_function)):
        common.function_from_file(function)
    if is_scored(args) and not args.reward_function:
        common.load_tokenizer(args.reward_model)


def is_scored(args) -> bool:
    return args.num_samples > 0 or args.weighting != "uniform"  # else it is supervised fine-tuning


class Iteration:
    """What the phases of iteration k need to know."""

    def __init__(self, args, k: int, prompts: list[common.Prompt], eval_prompts: list[common.Prompt]):
        self.k, self.prompts = k, prompts
        self.folder, self.before = (Path(args.resume) / f"iteration-{i}" for i in (k, k - 1))
        self.policy = args.model if k == 1 else str(self.before / "policy")  # π_k
        self.num_updates = args.epochs_per_iteration * args.prompts_per_iteration // args.batch_size
        self.updates_before = (k - 1) * self.num_updates
        every, since = max(1, args.eval_every), self.updates_before - self.num_updates
        is_due = self.updates_before // every > since // every  # a multiple of it has passed
        self.eval_prompts = eval_prompts if is_due or k > args.iterations else []
        self.num_samples = args.num_samples if k > args.sampling_threshold else 0
        demonstrations = bool(prompts and prompts[0].demonstrations)
        self.rows_per_prompt = self.num_samples + demonstrations  # the demonstration is the last
        self.fits_reference = args.level == "token" or args.reference == "learned"


def begin(args, it: Iteration, total: int = 0, unit: str = "update", done: int | None = None) -> tuple:
    """-> (run, placement, rank, number of ranks). `done`: updates whose rows of metrics are there to stay."""
    rank, world_size, device = common.start_processes()
    placement = common.Placement(
        device, args.dtype, args.attention, args.zero_stage, args.offload, args.micro_batch_size
    )
    done = it.updates_before if done is None else done
    return common.Run(args, __file__, total, unit, done), placement, rank, world_size


def generate(args, it: Iteration) -> dict:
    """Samples of π_k, by token ids (texts may become other tokens); its greedy responses to held-out prompts."""
    run, placement, rank, world_size = begin(args, it, len(it.prompts), "prompt", it.updates_before - 1)
    clock = common.Clock()
    B, N = args.batch_size // world_size, it.num_samples
    if N and it.prompts or it.eval_prompts:
        tokenizer = common.load_tokenizer(args.model)
        policy = common.load_policy(it.policy, placement)
        common.check_vocabulary(policy.model, tokenizer)
        eos_ids = common.eos_ids(policy.model, tokenizer)
        beyond = args.level == "token"  # the state after the last token has a value, too
        common.check_length(policy.model, args.max_prompt_length, args.response_length + beyond)
        policy = common.freeze(policy, placement)
        sampling = dict(tokenizer=tokenizer, eos_ids=eos_ids, length=args.response_length, temperature=args.temperature)
        rollout = functools.partial(common.rollout, policy, device=placement.device, **sampling)

    for name in ("policy", "reference_model"):  # what is no more needed
        shutil.rmtree(it.folder.with_name(f"iteration-{it.k - 2}") / name, ignore_errors=True)
    if it.eval_prompts:
        mine, rows = common.deal_out(it.eval_prompts), []
        for batch, _ in common.micro_batches(len(mine), B):
            responses = rollout(mine[batch], num_samples=0, greedy=True)
            rows += common.rows_of(responses, logprob=logprob_sums(policy, responses, args))
        common.write_rows(it.before / "held_out.jsonl", common.gather_rows(rows)[: len(it.eval_prompts)])

    # Chunks of prompts, B rows on each rank. What an interrupted process has left of them is not generated again.
    path, chunk = it.folder / "samples.jsonl", max(1, B // max(1, N)) * world_size
    rows = common.read_rows(path)
    done = len(rows) // max(1, it.rows_per_prompt)
    done -= done % chunk if done < len(it.prompts) else 0
    common.write_rows(path, rows[: done * it.rows_per_prompt])
    run.bar.update(done)
    for start in range(done, len(it.prompts), chunk):
        common.set_seed(args.seed, it.k, start, rank)
        prompts = it.prompts[start : start + chunk]
        mine = common.deal_out(prompts)
        rows = common.rows_of(rollout(mine, num_samples=N, greedy=False)) if N else []
        groups = [rows[i * N : (i + 1) * N] + prompt.demonstrations for i, prompt in enumerate(mine)]
        groups = common.gather_rows(groups)[: len(prompts)]
        common.write_rows(path, [row for group in groups for row in group], append=True)
        run.bar.update(len(prompts))
        run.stop_if_asked(it.updates_before, placement.device)
    run.close()
    return dict(seconds_rollout=clock.lap())


def logprob_sums(policy, responses, args) -> list[float]:
    logprobs_BT = common.forward_rows(policy, responses, args.micro_batch_size, temperature=args.temperature)
    return (logprobs_BT * responses.mask_BT).sum(1).tolist()


def measure_kl(args, it: Iteration) -> None:
    """log π_k, which `generate` has left, less log π of the initial policy, for the held-out responses."""
    run, placement, *_ = begin(args, it, done=it.updates_before - 1)
    policy = common.freeze(common.load_policy(args.model, placement), placement)
    rows = common.read_rows(it.before / "held_out.jsonl")
    sums_of = functools.partial(logprob_sums, policy, args=args)
    found = common.map_rows(sums_of, it.eval_prompts, rows, args.batch_size, placement.device)
    rows = [row | dict(kl=row["logprob"] - logprob) for row, logprob in zip(rows, found, strict=True)]
    common.write_rows(it.before / "held_out.jsonl", rows)
    run.close()


def score(args, it: Iteration, metrics: dict) -> dict:
    """Rewards of all responses; the samples' weights, unless W is to be fitted; the row of the iteration before."""
    run, placement, *_ = begin(args, it, done=it.updates_before - 1)
    clock = common.Clock()
    scorers = {}
    if is_scored(args):
        reward = (args.reward_model, args.reward_function, args.missing_eos_penalty)
        scorers["reward"] = common.Reward(*reward, placement)
    if args.gold_reward_function:
        scorers["gold_reward"] = common.Reward(None, args.gold_reward_function, 0.0, placement)

    def scored(prompts, rows):
        for name, scorer in scorers.items():
            found = common.map_rows(lambda r, s=scorer: s(r).tolist(), prompts, rows, args.batch_size, placement.device)
            rows = [row | {name: value} for row, value in zip(rows, found, strict=True)]
        return rows

    if it.eval_prompts:
        rows = scored(it.eval_prompts, common.read_rows(it.before / "held_out.jsonl"))
        common.write_rows(it.before / "held_out.jsonl", rows)
        initial_rows = common.read_rows(it.folder.with_name("iteration-0") / "held_out.jsonl")
        shown = [dict(prompt=row["prompt"], response=row["response"], kl=row["kl"]) for row in rows]
        shown = [a | {name: b[name] for name in scorers} for a, b in zip(shown, rows, strict=True)]
        lengths = dict(eval_response_length=sum(len(row["tokens"]) for row in rows) / len(rows))
        metrics |= common.evaluation_metrics(shown, initial_rows) | lengths
        if "reward" in scorers and it.eval_prompts[0].demonstrations:
            references = scored(it.eval_prompts, [prompt.demonstrations[0] for prompt in it.eval_prompts])
            metrics |= dict(eval_win_rate_reference=common.win_rate(rows, references))
        run.log_samples(it.updates_before, shown)
    if it.k > 1 or it.eval_prompts:
        run.log(it.updates_before, metrics)

    measured = {}
    if it.prompts:
        prompts, rows = samples(it)
        rows = scored(prompts, rows)
        own = [row for i, row in enumerate(rows) if i % it.rows_per_prompt < it.num_samples] or rows
        measured = {name: sum(row[name] for row in own) / len(own) for name in scorers}
        measured |= dict(response_length=sum(len(row["tokens"]) for row in own) / len(own))
        measured |= dict(truncated_fraction=sum(not row["ended"] for row in own) / len(own))
        if it.fits_reference:
            common.write_rows(it.folder / "samples.jsonl", rows)
        else:
            rewards = [row.get("reward", 0.0) for row in rows]  # none where nothing is scored
            rewards_BN = torch.tensor(rewards, dtype=torch.float64).view(-1, it.rows_per_prompt)
            measured |= write_weights(it, rows, weights_of(rewards_BN, args.weighting, args.beta).flatten().tolist())
    run.close()
    return measured | dict(seconds_score=clock.lap())


def samples(it: Iteration) -> tuple[list[common.Prompt], list[dict]]:
    """-> (prompts, rows) of samples.jsonl, of equal length."""
    prompts = [prompt for prompt in it.prompts for _ in range(it.rows_per_prompt)]
    return prompts, common.read_rows(it.folder / "samples.jsonl")


def weights_of(rewards_BN, weighting: str, beta: float):
    """-> weights_BN, float64, of which a prompt's add up to 1."""
    if weighting == "spr":
        return sample_weights(rewards_BN, reference_value(rewards_BN, beta), beta)
    best_BN = rewards_BN >= (rewards_BN.amax(1, keepdim=True) if weighting == "best-of-n" else -math.inf)
    return best_BN.double() / best_BN.sum(1, keepdim=True)


def write_weights(it: Iteration, rows: list[dict], weights: list) -> dict[str, float]:
    """Gives each row its weight or its tokens' weights -> metrics; those of tokens enter by their mean."""
    means = [sum(w) / len(w) if isinstance(w, list) else w for w in weights]
    if not all(map(math.isfinite, means)):
        common.fail("a fitted W is so far off that weights are not finite: raise --beta", status=1)
    common.write_rows(it.folder / "samples.jsonl", [row | dict(weight=w) for row, w in zip(rows, weights, strict=True)])
    shares_BN = torch.tensor(means, dtype=torch.float64).view(-1, it.rows_per_prompt)
    shares_BN = shares_BN / shares_BN.sum(1, keepdim=True).clamp(min=1e-300)
    metrics = dict(weight_ess=(1 / shares_BN.square().sum(1).clamp(min=1e-300)).mean().item())
    if "reward" in rows[0]:
        rewards_BN = torch.tensor([row["reward"] for row in rows]).view_as(shares_BN)
        metrics |= dict(best_reward=rewards_BN.amax(1).mean().item())
        metrics |= dict(weighted_reward=(shares_BN * rewards_BN).sum(1).mean().item())
    return metrics


def optimize(engine, args, it: Iteration, rows_of: Callable, loss_of: Callable, first: int = 1) -> Iterator[tuple]:
    """Passes over the prompts in random order -> after each step (step, loss, rate, gradient norm, skipped).

    rows_of(i): what there is to learn from prompt i. loss_of(rows): their share in the loss of the global batch.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(first, it.num_updates + 1):
        start = (step - 1) * args.batch_size
        indices = common.shuffled_indices(len(it.prompts), args.seed + it.k, start, args.batch_size)
        rows = [row for i in indices[rank::world_size] for row in rows_of(i)]
        rows.sort(key=lambda row: -len(row[1]["tokens"]))  # rows of like length together: little padding
        losses = []
        for batch, last in common.micro_batches(len(rows), args.micro_batch_size):
            loss = loss_of(rows[batch])
            common.backward(engine, loss * world_size, last)  # the engine averages over ranks: make it a sum
            losses.append(loss.detach())
        learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, step, it.num_updates)
        grad_norm, skipped = common.optimizer_step(engine, learning_rate)
        yield step, torch.stack(losses).sum() * world_size, learning_rate, grad_norm, skipped
    if skipped == it.num_updates:
        common.fail(f"iteration {it.k}: no step had a finite loss and gradient: lower --learning-rate", status=1)


def train(args, it: Iteration) -> dict:
    """π_{k+1}, from π_k on. Each iteration is a fit of its own, with its own optimizer and learning rate schedule."""
    run, placement, _, world_size = begin(args, it, args.iterations * it.num_updates)
    clock = common.Clock()
    device, n = placement.device, it.rows_per_prompt
    tokenizer = common.load_tokenizer(args.model)
    rows_per_step = args.batch_size // world_size * n
    policy = common.load_policy(it.policy, placement)
    policy = common.train_engine(policy, placement, rows_per_step, args.max_grad_norm, args.gradient_checkpointing)
    if args.dtype == "bfloat16" and it.k > 1:
        common.load_master_weights(policy, it.before / "policy" / "masters.safetensors")
    first = max(run.load_checkpoint(policy) - it.updates_before, 1)
    run.bar.update(it.updates_before + first - 1 - run.bar.n)
    lines = (it.folder / "samples.jsonl").read_bytes().splitlines()

    def rows_of(i):
        return [(it.prompts[i], json.loads(line)) for line in lines[i * n : (i + 1) * n]]

    def loss_of(pairs):
        prompts, rows = zip(*pairs, strict=True)
        responses = common.responses_of(prompts, rows, device)
        logprobs_BT = common.per_token(policy, responses, temperature=args.temperature)
        weights = [row["weight"] for row in rows]
        token_level = args.level == "token"
        weights = common.from_lists(weights, responses.mask_BT) if token_level else torch.tensor(weights, device=device)
        return weighted_nll(logprobs_BT, weights, responses.mask_BT, denominator=args.batch_size)

    for step, loss, learning_rate, grad_norm, skipped in optimize(policy, args, it, rows_of, loss_of, first):
        update = it.updates_before + step
        metrics = dict(episodes=it.k * len(it.prompts)) | common.global_means(device, loss=loss)
        metrics |= dict(grad_norm=grad_norm, learning_rate=learning_rate, skipped_updates=skipped)
        if step < it.num_updates:
            run.log(update, metrics)
            if args.save_every and update % args.save_every == 0:
                run.save_checkpoint(update, policy)
            run.stop_if_asked(update, device, policy)
    common.save_model(policy, tokenizer, it.folder / "policy", device)
    if args.dtype == "bfloat16" and it.k < args.iterations:
        common.save_master_weights(policy, it.folder / "policy" / "masters.safetensors")
    probe = common.responses_of(*zip(*rows_of(0)[:1], strict=True), device)
    common.check_saved(policy, it.folder / "policy", probe, args.temperature, placement)
    run.close()
    return metrics | dict(seconds_train=clock.lap())


def save(args, it: Iteration) -> None:
    run, *_ = begin(args, it)
    if run.main and Path(it.policy).exists():
        Path(it.policy).rename(run.folder / "policy")
        for folder in (it.before / "reference_model", run.folder / "values"):
            shutil.rmtree(folder, ignore_errors=True)
    run.finish("policy")


# ---------------------------------------------------------------- Fitted values: --reference learned, --level token


def state_values(model, responses) -> torch.Tensor:
    """-> values of s_0 … s_T, the prompt with its first t tokens: W(s_t) is entry t, Q(s_t, y_t) entry t + 1."""
    return model(responses.prompts_BP, responses.prompt_mask_BP, F.pad(responses.tokens_BT, (0, 1)))


def token_values(model, prompts, rows, entry: int, size: int, device) -> list[list[float]]:
    """Of the real tokens of each row, W (entry 0) or Q (entry 1)."""

    @torch.no_grad()
    def values_of(responses):
        values_BT = state_values(model, responses)[:, entry : entry + responses.tokens_BT.shape[1]]
        return common.to_lists(values_BT, responses.mask_BT)

    with common.resident(model, device):
        return common.map_rows(values_of, prompts, rows, size, device)


def fit_values(args, it: Iteration, placement, start: Path, path: Path, triples: list, loss_of: Callable):
    """Fits a model with a scalar head to (prompt, row, values) of all samples, from `start` on -> engine, metrics."""
    n, device = it.rows_per_prompt, placement.device
    model = common.load_value_model(str(start) if start.exists() else None, args.model, placement)
    rows_per_step = args.batch_size // dist.get_world_size() * n
    engine = common.train_engine(model, placement, rows_per_step, args.max_grad_norm, args.gradient_checkpointing)

    def loss_of_rows(triples):
        prompts, rows, values = zip(*triples, strict=True)
        responses = common.responses_of(prompts, rows, device)
        values_BT = common.from_lists(values, responses.mask_BT)
        loss = loss_of(state_values(engine, responses), values_BT, responses.mask_BT.bool())
        return loss / (args.batch_size * n)

    *_, last = optimize(engine, args, it, lambda i: triples[i * n : (i + 1) * n], loss_of_rows)
    common.save_model(engine, common.load_tokenizer(args.model), path, device)
    return engine, common.global_means(device, value_loss=last[1])


def fit_reference(args, it: Iteration) -> dict:
    """W of each state, to Q (Algorithm 1, line 5), or, one step long, of the prompt, to r (Algorithm 2, line 4)."""
    run, placement, *_ = begin(args, it)
    prompts, rows = samples(it)
    values, states, offset = common.read_rows(it.folder / "q_values.jsonl"), rows, 0.0
    if args.level == "sequence":  # one state, in which the whole response is chosen
        values, states = [[row["reward"]] for row in rows], [row | dict(tokens=row["tokens"][:1]) for row in rows]
        offset = args.beta * math.log(it.rows_per_prompt)  # from the loss's mean over responses to eq. 15's sum

    def loss_of(state_values_BS, values_BT, mask_BT):
        reference_BT = state_values_BS[:, :-1]
        return linex_loss(values_BT[mask_BT][:, None], reference_BT[mask_BT], args.beta) * mask_BT.sum()

    start, path = it.before / "reference_model", it.folder / "reference_model"
    triples = list(zip(prompts, states, values, strict=True))
    model, metrics = fit_values(args, it, placement, start, path, triples, loss_of)
    references = token_values(model, prompts, states, 0, args.micro_batch_size, placement.device)
    pairs = ((torch.tensor(v), torch.tensor(w) + offset) for v, w in zip(values, references, strict=True))
    weights = [
        sample_weights(values_T[:, None], reference_T, args.beta).flatten().tolist() for values_T, reference_T in pairs
    ]
    weights = weights if args.level == "token" else [weight for (weight,) in weights]
    metrics |= write_weights(it, rows, weights)
    run.close()
    return metrics


def write_targets(args, it: Iteration, sweep: int) -> None:
    """Q̄ ← α Q + (1 − α) Q̄ (Algorithm 1, line 7), on disk; then what Q is to be fitted to, to disk."""
    run, placement, *_ = begin(args, it)
    folder, device = run.folder / "values", placement.device
    path = folder / f"target-{sweep}"
    if sweep > 0 and run.main:
        common.average_models(folder / f"q-{sweep - 1}", folder / f"target-{sweep - 1}", TARGET_SHARE, path)
        for name in (f"q-{sweep - 2}", f"target-{sweep - 2}"):  # what is no more needed
            shutil.rmtree(folder / name, ignore_errors=True)
    dist.barrier()
    model = common.load_value_model(str(path) if sweep > 0 else None, args.model, placement)
    model = common.freeze(model, placement)
    if sweep == 0:
        common.save_model(model, common.load_tokenizer(args.model), path, device)
    prompts, rows = samples(it)
    values = token_values(model, prompts, rows, 1, args.micro_batch_size, device)
    pairs = [(torch.tensor([row["reward"]]), torch.tensor([v])) for row, v in zip(rows, values, strict=True)]
    targets = [value_targets(*pair, torch.ones_like(pair[1]), args.gamma)[0].tolist() for pair in pairs]
    common.write_rows(it.folder / "targets.jsonl", targets)
    run.close()


def fit_action_values(args, it: Iteration, sweep: int) -> dict:
    """One sweep of temporal differences (Algorithm 1, line 4)."""
    run, placement, *_ = begin(args, it)
    prompts, rows = samples(it)

    def loss_of(state_values_BS, targets_BT, mask_BT):
        return (state_values_BS[:, 1:] - targets_BT)[mask_BT].square().sum()

    triples = list(zip(prompts, rows, common.read_rows(it.folder / "targets.jsonl"), strict=True))
    start, path = run.folder / "values" / f"q-{sweep - 1}", run.folder / "values" / f"q-{sweep}"
    model, metrics = fit_values(args, it, placement, start, path, triples, loss_of)
    values = token_values(model, prompts, rows, 1, args.micro_batch_size, placement.device)
    common.write_rows(it.folder / "q_values.jsonl", values)
    run.close()
    return metrics


if __name__ == "__main__":
    main()
