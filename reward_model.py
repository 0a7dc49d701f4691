r"""A Bradley-Terry reward model, trained on pairs of responses of which one was preferred.

    loss  =  mean over pairs of  −log σ(r(x, y_w) − r(x, y_l))

(SPR, NeurIPS 2024 FITML workshop, eq. 22). The model is a language model (start from the SFT model) with a scalar head,
read at the last real token; a reward model goes on from its own head. It reads prompt + response + EOS, here and where
remax.py scores with it. Only differences of scores are learned, so afterwards the mean score of the held-out chosen
responses is stored (config.reward_mean) as the zero of all later scores.

What to look at while it trains: held-out accuracy and margin; the spread of the scores; and their correlation with the
responses' length, since a model that merely likes long answers is the commonest failure. The last lines are a
calibration table: of the pairs that it claims to know with 80% certainty it should get 80% right.

One CPU:     python reward_model.py
One GPU:     python reward_model.py --model M --dataset D --learning-rate 1e-5 --max-prompt-length 512 \
                 --dtype bfloat16 --micro-batch-size 8
Eight GPUs:  deepspeed reward_model.py --model M --dataset D --learning-rate 1e-5 --max-prompt-length 512 \
                 --dtype bfloat16 --micro-batch-size 8 --batch-size 128 --zero-stage 2 --gradient-checkpointing

Names carry shapes: B pairs on this rank, M pairs of a micro-batch. The rest is in common.py.
"""

from dataclasses import dataclass
from typing import Literal

import common  # before torch: some settings must come before it is imported
from common import Fraction, NonNegativeInt, PathOrName, PositiveFloat, PositiveInt

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
    dataset: PathOrName = "examples/reviews/preferences.jsonl"
    """Training data: a .jsonl, .ndjson, .json, .csv, .tsv (also .gz) or .parquet file, a folder, or a hub name."""
    dataset_config: str | None = None
    """Configuration of a folder or hub data set, such as gsm8k's main; files have none."""
    dataset_split: str = "train"
    """Split of a folder or hub data set; files have none."""
    prompt_column: str = "prompt"
    """Column that holds the prompts, as texts or as chat messages."""
    eval_dataset: PathOrName | None = None
    """Held-out rows, in the same form; None to hold out --eval-size rows of --dataset."""
    eval_every: NonNegativeInt = 25
    """Updates between evaluations, also before the first and after the last update; 0 for none."""
    eval_size: PositiveInt = 200
    """Held-out rows per evaluation."""
    max_prompt_length: PositiveInt = 64
    """Prompt tokens; longer prompts lose their beginning."""

    # Optimization
    total_episodes: PositiveInt | None = None
    """Prompts in the whole run, over all ranks, rounded down to whole updates; the data set repeats as needed."""
    batch_size: PositiveInt = 32
    """Prompts per update, over all ranks."""
    micro_batch_size: PositiveInt = 64
    """Rows per forward and backward on one rank; changes memory, and results only by rounding."""
    learning_rate: PositiveFloat = 1e-3
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

    # Preferences
    chosen_column: str = "chosen"
    """Column that holds the better response, as text or as chat messages."""
    rejected_column: str = "rejected"
    """Column that holds the worse response, as text or as chat messages."""
    num_epochs: PositiveInt = 2
    """Passes over the data set."""


# ---------------------------------------------------------------- The algorithm


def preference_loss(chosen_B, rejected_B):
    """−log σ(chosen − rejected), mean -> scalar. chosen_B, rejected_B: scores of the better and the worse responses."""
    return -F.logsigmoid(chosen_B - rejected_B).mean()  # SPR, eq. 22


# ---------------------------------------------------------------- Data and evaluation

USAGE = """
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(".")
model = transformers.AutoModelForSequenceClassification.from_pretrained(".")
model.config.pad_token_id = None  # else transformers reads the last token that is no padding, which may miss EOS
ids = tokenizer("A prompt" + " and its response" + tokenizer.eos_token, return_tensors="pt")
print(model(**ids).logits.item() - model.config.reward_mean)  # held-out chosen responses have mean 0
"""


@dataclass
class Pair:
    """A prompt, its chosen and its rejected response: their texts, and the token ids that `scores` takes."""

    prompt: common.Prompt
    responses: tuple[str, str]
    ids: tuple[list[int], list[int]]

    @property
    def digest(self) -> str:
        return self.prompt.digest


def load_pairs(path, layout, tokenizer, max_prompt_length, max_length) -> list[Pair]:
    """Prompts are cut on the left, responses never. Pairs that teach nothing are dropped and counted."""
    too_long = f"of more than {max_length} tokens, dropped"
    pairs, counts = [], {"of equal responses, dropped": 0, too_long: 0}
    prompts = common.load_prompts(path, layout, tokenizer, max_prompt_length)
    for prompt in prompts:
        responses = tuple(prompt.answers[column] for column in layout.answer_columns)
        ids = tuple(common.reward_model_ids(tokenizer, prompt, text) for text in responses)
        if ids[0] == ids[1]:
            counts["of equal responses, dropped"] += 1
        elif max(map(len, ids)) > max_length:
            counts[too_long] += 1
        else:
            pairs.append(Pair(prompt, responses, ids))
    common.report(path, len(pairs), "pairs", counts)
    return pairs


def scores(model, pairs):
    """-> (chosen_B, rejected_B), in one forward."""
    chosen = [pair.ids[0] for pair in pairs]
    rejected = [pair.ids[1] for pair in pairs]
    return common.scores(model, chosen + rejected, model.device).chunk(2)


@torch.no_grad()
def scores_of_all(model, pairs, pairs_at_once) -> list[tuple[float, float]]:
    """-> each pair's scores, the same on every rank."""
    share = common.deal_out(pairs)
    found = []
    for start in range(0, len(share), pairs_at_once):
        chosen_M, rejected_M = scores(model, share[start : start + pairs_at_once])
        found += zip(chosen_M.tolist(), rejected_M.tolist())
    return common.gather_rows(found)[: len(pairs)]


def evaluate(model, pairs, pairs_at_once) -> list[dict]:
    """-> one row per held-out response, chosen and rejected in turn."""
    rows = []
    for pair, found in zip(pairs, scores_of_all(model, pairs, pairs_at_once)):
        for i in (0, 1):
            row = dict(prompt=pair.prompt.text, response=pair.responses[i], chosen=i == 0, reward=found[i])
            rows.append(row | dict(length=len(pair.ids[i]) - len(pair.prompt.ids)))
    return rows


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
        answer_columns=[args.chosen_column, args.rejected_column],
    )

    def load(path):
        return load_pairs(path, layout, tokenizer, args.max_prompt_length, tokenizer.num_positions)

    pairs, eval_pairs = common.train_and_held_out(load, args.dataset, args.eval_dataset, args.eval_size)
    total_episodes = args.total_episodes or args.num_epochs * len(pairs)
    B, num_updates = common.plan_updates(total_episodes, args.batch_size, backend.world_size)  # pairs on this rank
    pairs_at_once = max(1, args.micro_batch_size // 2)  # two rows each

    # 2. Models: a language model that gets a new head, or a reward model, which keeps its own
    classifier, _ = common.load_classifier(args.model, backend, new_head=True)
    if not classifier.score.weight.any():  # a new head is 0
        torch.manual_seed(args.seed % 2**63)
        torch.nn.init.normal_(classifier.score.weight, std=(classifier.score.weight.shape[1] + 1) ** -0.5)
    classifier = common.with_adapters(classifier, backend.lora_rank)
    model = common.train_engine(common.ScalarOutputs(classifier), backend, args.max_grad_norm)

    def evaluated(update) -> dict[str, float]:
        rows = evaluate(model, eval_pairs, pairs_at_once)
        run.log_samples(update, rows, "held-out responses, a chosen and a rejected one in turn")
        return common.pair_metrics(rows)

    run = common.Run(  # with --resume it loads the engines
        output_dir=args.output_dir,
        resume=args.resume,
        save_every=args.save_every,
        flags=vars(args),
        num_updates=num_updates,
        engines=[model],
    )
    if run.last_checkpoint == 0 and args.eval_every:
        run.log(0, dict(episodes=0) | evaluated(update=0))

    for update in range(run.last_checkpoint + 1, num_updates + 1):
        common.set_seed(args.seed, update, backend.rank)
        clock = common.Clock()

        # 3, 4. Nothing to roll out and nothing to score: the data set has the responses and which was preferred.
        batch = common.shuffled_batch(pairs, args.seed, update, args.batch_size)

        # 5. Update: one step
        losses, chosen, rejected = [], [], []
        lengths_B = torch.tensor([max(map(len, pair.ids)) for pair in batch])
        for numbers, is_last in common.micro_batches(lengths_B, pairs_at_once):
            chosen_M, rejected_M = scores(model, [batch[i] for i in numbers])
            loss = preference_loss(chosen_M, rejected_M)
            loss = loss * len(numbers) / B  # the engine averages over ranks
            common.backward(model, loss, is_last)
            losses.append(loss.detach())
            chosen.append(chosen_M.detach())
            rejected.append(rejected_M.detach())
        learning_rate = common.scheduled(args.learning_rate, args.lr_schedule, args.warmup_ratio, update, num_updates)
        grad_norm, skipped_updates = common.optimizer_step(model, learning_rate)
        clock.lap("train")

        # 6. Log, evaluate, checkpoint
        margins_B = torch.cat(chosen) - torch.cat(rejected)
        means = dict(
            accuracy=common.accuracy(margins_B),
            margin=margins_B,
            loss=torch.stack(losses).sum(),
        )
        metrics = dict(episodes=update * args.batch_size) | common.global_means(**means)
        metrics |= dict(grad_norm=grad_norm, learning_rate=learning_rate, skipped_updates=skipped_updates)
        metrics |= clock.seconds
        if args.eval_every and (update % args.eval_every == 0 or update == num_updates):
            metrics |= evaluated(update)
        run.log(update, metrics)
        if args.save_every and update % args.save_every == 0:
            run.save_checkpoint(update)
        run.stop_if_asked(update)

    # 7. Save, and check that the saved weights are the trained ones
    rows = evaluate(model, eval_pairs, pairs_at_once)
    classifier.config.reward_mean = sum(row["reward"] for row in rows[::2]) / len(eval_pairs)
    common.save_and_check(model, tokenizer, run.folder / "reward_model", backend)
    print("\n" + common.calibration_table(rows))
    run.finish("reward_model", USAGE)


if __name__ == "__main__":
    main()
