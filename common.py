"""Code that the scripts share. Nothing here knows an algorithm, and functions share no state: copy what you need.

About learning: 1 prompts and responses · 2 rollout · 3 log-probabilities, values, scores · 4 rewards · 5 the update ·
6 evaluation. Below the double line is plumbing: 7 models · 8 data · 9 the run · 10 flags and processes.

Names carry their shape: B rows, P prompt tokens (left-padded), T response tokens (right-padded), L both, V vocabulary,
D width, R all rows of a rollout, N any number. Logits at t predict token t + 1. Response masks include the first EOS.
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import datetime
import decimal
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import math
import numbers
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import typing
import warnings
import zlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What must happen before torch is imported.
#
# Threads of torch spin while they wait for each other: by default for milliseconds, which other processes on the same
# cores then lack. An update beside two of them took ten times as long. What a user has set goes first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The import takes seconds. Where a script of this folder is the program, ctrl-C ends it without a traceback, until its
# run begins.
PROGRAM = getattr(sys.modules["__main__"], "__file__", None)
if PROGRAM and Path(PROGRAM).resolve().parent == HERE:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import huggingface_hub
import numpy as np
import pydantic
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found no GPU
with contextlib.redirect_stdout(io.StringIO()):  # deepspeed warns of ops that it cannot compile; we use none of them
    import deepspeed
deepspeed.utils.logger.handlers[0].setStream(sys.stderr)  # it has taken the stream of the block above
import transformers
from transformers.cache_utils import DynamicLayer

LANGUAGE_MODEL = """
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(".")
model = transformers.AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("A prompt", return_tensors="pt")  # a chat: tokenizer.apply_chat_template
print(tokenizer.decode(model.generate(**ids, do_sample=True, top_k=0, max_new_tokens=64)[0]))
"""


# ---------------------------------------------------------------- 1. Prompts and responses
#
# What goes into a policy and what comes out. Prompts are padded on the left and responses on the right, so that a
# prompt's last token stands beside the first token of its response. Masks tell padding from text: an EOS inside a
# prompt is a token like any other.


@dataclasses.dataclass
class Prompt:
    """A prompt: its whole text for rewards, its cut ids for the policy, and the other columns of its row."""

    text: str
    ids: list[int]
    columns: dict
    where: str = ""  # file:line, for error messages
    messages: list[dict] | None = None  # the prompt, where it was a chat
    demonstration: list[int] | None = None  # token ids of a response to learn from
    answers: dict[str, str | None] = dataclasses.field(default_factory=dict)  # of its row, by column: to learn from
    num_cut: int = 0  # ids that it lost at its beginning
    digest: str = ""  # a hash of the prompt and its answers


@dataclasses.dataclass
class Sampling:
    """How a policy answers prompts."""

    max_prompt_length: int
    response_length: int
    temperature: float
    batch_size: int | None  # rows that are decoded at once; None for what `load_policy` chooses


@dataclasses.dataclass
class Policy:
    """A language model that answers prompts, in training or frozen, and what it needs for that."""

    engine: nn.Module  # gives log-probabilities of responses: TokenLogprobs, frozen or inside a DeepSpeed engine
    decoder: nn.Module  # the same weights as a plain Hugging Face model, which writes responses
    tokenizer: transformers.PreTrainedTokenizerBase
    eos_ids: list[int]  # chat models often have several
    sampling: Sampling
    device: torch.device


@dataclasses.dataclass
class Responses:
    """Rows of a rollout; index with a slice or a list of row numbers."""

    prompts: list[Prompt]
    texts: list[str]  # without EOS and padding, but with the other special tokens
    prompts_BP: torch.Tensor
    prompt_mask_BP: torch.Tensor
    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor  # 1 up to and including the first EOS
    ended_B: torch.Tensor  # whether there is an EOS

    def __getitem__(self, rows: slice | list[int]) -> "Responses":
        numbers = range(len(self.texts))[rows] if isinstance(rows, slice) else rows
        return Responses(
            prompts=[self.prompts[i] for i in numbers],
            texts=[self.texts[i] for i in numbers],
            prompts_BP=self.prompts_BP[rows],
            prompt_mask_BP=self.prompt_mask_BP[rows],
            tokens_BT=self.tokens_BT[rows],
            mask_BT=self.mask_BT[rows],
            ended_B=self.ended_B[rows],
        )

    def rows(self, **columns) -> list[dict]:
        """One dict per row, for people to read; `columns`: more numbers of each row, as tensors."""
        rows = []
        for i, prompt in enumerate(self.prompts):
            row = dict(prompt=prompt.text, response=self.texts[i])
            for name, x_B in columns.items():
                row[name] = x_B[i].tolist()
            rows.append(row)
        return rows


def as_responses(policy, prompts: list[Prompt], tokens: list[list[int]]) -> Responses:
    """Rows of a prompt and the token ids of its response, padded."""
    prompts_BP, prompt_mask_BP = pad([prompt.ids for prompt in prompts], "left", policy.device)
    tokens_BT, mask_BT = pad(tokens, "right", policy.device)
    return Responses(
        prompts=prompts,
        texts=decode(policy.tokenizer, tokens, {*policy.eos_ids, policy.tokenizer.pad_token_id}),
        prompts_BP=prompts_BP,
        prompt_mask_BP=prompt_mask_BP,
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        ended_B=torch.tensor([row[-1] in policy.eos_ids for row in tokens], device=policy.device),
    )


def response_mask(tokens_BT, eos_ids: list[int]):
    """-> mask_BT, 1 up to and including the first EOS of any kind. Pad ids play no part."""
    is_eos_BT = torch.isin(tokens_BT, torch.tensor(eos_ids, device=tokens_BT.device)).long()
    return (is_eos_BT.cumsum(1) - is_eos_BT == 0).long()


def decode(tokenizer, tokens: list[list[int]], dropped_ids=()) -> list[str]:
    """Texts of responses as they stand after a prompt: some tokenizers drop the leading space of a text alone.

    Special tokens are part of the text, except `dropped_ids`. Spaces stay as they are, so that a text gives its ids
    again wherever the tokenizer allows it.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = [anchor + [token for token in row if token not in dropped_ids] for row in [[], *tokens]]
    start, *texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text[len(start) :] for text in texts]


def pad(rows: list[list[int]], side, device: torch.device):
    """-> (ids_BL, mask_BL). The mask alone tells padding from text: an EOS id inside a prompt is just a token."""
    ids = [torch.tensor(row) for row in rows]
    ids_BL = pad_sequence(ids, batch_first=True, padding_side=side)
    mask_BL = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return ids_BL.to(device), mask_BL.to(device)


# ---------------------------------------------------------------- 2. Rollout
#
# The decoding loop is our own: the greedy rows of ReMax are decoded in one batch with the sampled ones, and prompts go
# through the model once for both. The tests compare it with transformers' `generate`, which takes 1.4 times as long.


def rollout(policy, prompts: list[Prompt], num_samples=1, greedy=True, demonstrations=False) -> Responses:
    """Responses: `num_samples` sampled rows per prompt (adjacent, then its demonstration), and all greedy rows last."""
    prompts_BP, prompt_mask_BP = pad([prompt.ids for prompt in prompts], "left", policy.device)
    rows_per_prompt = num_samples + greedy
    sampled = []
    greedy_rows = []
    if rows_per_prompt > 0:  # supervised fine-tuning has demonstrations alone
        prompts_at_once = max(1, policy.sampling.batch_size // rows_per_prompt)
        with gathered(policy.engine):
            decoder = policy.decoder.to(policy.device)
            for start in range(0, len(prompts), prompts_at_once):
                chunk = slice(start, start + prompts_at_once)
                tokens_RT = generate(
                    decoder,
                    prompts_BP[chunk],
                    prompt_mask_BP[chunk],
                    policy.eos_ids,
                    policy.sampling,
                    num_samples,
                    greedy,
                )
                lengths_R = response_mask(tokens_RT, policy.eos_ids).sum(1).tolist()
                rows = [row[:length] for row, length in zip(tokens_RT.tolist(), lengths_R)]
                first_greedy = len(prompts[chunk]) * num_samples
                sampled += rows[:first_greedy]
                greedy_rows += rows[first_greedy:]

    row_prompts = []
    tokens = []
    for i, prompt in enumerate(prompts):
        tokens += sampled[i * num_samples : (i + 1) * num_samples]
        row_prompts += num_samples * [prompt]
        if demonstrations:
            tokens.append(prompt.demonstration)
            row_prompts.append(prompt)
    if greedy:
        tokens += greedy_rows
        row_prompts += prompts
    return as_responses(policy, row_prompts, tokens)


@torch.no_grad()
def generate(model, prompts_BP, prompt_mask_BP, eos_ids: list[int], sampling: Sampling, num_samples, greedy):
    """-> tokens_RT: `num_samples` sampled rows per prompt (adjacent), then, if `greedy`, a greedy row per prompt.

    Sampling is from softmax(logits / temperature), without top-k or top-p: what is sampled is what is scored.
    """
    device = prompts_BP.device
    B, P = prompts_BP.shape
    T = sampling.response_length
    index_R = torch.arange(B, device=device).repeat_interleave(num_samples)  # row -> its prompt
    num_sampled = len(index_R)  # the first rows are sampled, the rest are greedy
    if greedy:
        index_R = torch.cat([index_R, torch.arange(B, device=device)])
    R = len(index_R)

    # Prompts go through the model once. Then each row takes its own copy of its prompt's cache.
    cache = roomy_cache(model.config, room=T)
    positions_BP = (prompt_mask_BP.cumsum(1) - 1).clamp(min=0)
    outputs = model(
        input_ids=prompts_BP,
        attention_mask=prompt_mask_BP,
        position_ids=positions_BP,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_NV = outputs.logits[index_R, -1]
    cache.reorder_cache(index_R)
    mask_NL = torch.cat([prompt_mask_BP[index_R], prompt_mask_BP.new_ones(R, T)], 1)
    next_position_N1 = positions_BP[index_R, -1:] + 1

    eos_E = torch.tensor(eos_ids, device=device)
    tokens_RT = torch.empty(R, T, dtype=torch.long, device=device)
    rows_N = torch.arange(R, device=device)  # the N rows that go through the model
    going_N = torch.ones(R, dtype=torch.bool, device=device)
    for t in range(T):
        if not logits_NV.amax(-1).isfinite().all():
            fail("the policy's logits are not finite: it has diverged; lower --learning-rate", status=1)
        token_N = logits_NV.argmax(-1)
        token_N[:num_sampled] = sample(logits_NV[:num_sampled].float() / sampling.temperature)
        token_N = torch.where(going_N, token_N, tokens_RT[rows_N, t])
        tokens_RT[rows_N, t:] = token_N[:, None]  # a row that ends here keeps its EOS to the end

        going_N = ~torch.isin(token_N, eos_E)
        num_going = int(going_N.sum())
        if num_going == 0 or t + 1 == T:
            break
        # Dropping rows copies the cache of the others, so it waits until a tenth has ended.
        if num_going <= 0.9 * len(rows_N):
            kept_N = going_N.nonzero().squeeze(1)
            num_sampled = int((kept_N < num_sampled).sum())
            rows_N = rows_N[kept_N]
            going_N = going_N[kept_N]
            token_N = token_N[kept_N]
            mask_NL = mask_NL[kept_N]
            next_position_N1 = next_position_N1[kept_N]
            cache.reorder_cache(kept_N)
        outputs = model(
            input_ids=token_N[:, None],
            attention_mask=mask_NL[:, : P + t + 1],
            position_ids=next_position_N1 + t,
            past_key_values=cache,
            use_cache=True,
        )
        logits_NV = outputs.logits[:, -1]
    return tokens_RT


def sample(logits_NV):
    """-> tokens_N, by one random number each (`multinomial` draws one for each entry of the vocabulary)."""
    cumulative_NV = logits_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
    points_N1 = cumulative_NV[:, -1:] * torch.rand_like(cumulative_NV[:, -1:])
    return torch.searchsorted(cumulative_NV, points_N1, right=True).squeeze(1)


# ---------------------------------------------------------------- 3. Log-probabilities, values, scores
#
# What models say of tokens that are there. main() calls the first functions; the classes below them are what an engine
# trains, since DeepSpeed needs a module whose forward is the whole computation.


def logprobs(policy, rows: Responses):
    """log π of a micro-batch's response tokens, in nats -> logprobs_BT, float32; mask them before use."""
    ids_BL, mask_BL, num_tokens = joined(rows)
    logprobs_BT = policy.engine(ids_BL, mask_BL, num_tokens)
    return F.pad(logprobs_BT, (0, rows.tokens_BT.shape[1] - num_tokens))


def values(value, rows: Responses):
    """The value of the state before each response token, in reward units -> values_BT, float32; mask them before use.

    `value` is an engine around ScalarOutputs, or around a module with the same forward.
    """
    ids_BL, mask_BL, num_tokens = joined(rows)
    first_state = rows.prompts_BP.shape[1] - 1  # where the last prompt token has been read
    states_T = torch.arange(first_state, first_state + num_tokens, device=ids_BL.device)
    values_BT = value(ids_BL, mask_BL, states_T.expand(len(ids_BL), -1))
    return F.pad(values_BT, (0, rows.tokens_BT.shape[1] - num_tokens))


@torch.no_grad()
def all_logprobs(policy, rows: Responses, micro_batch_size):
    """`logprobs` of any number of rows, without gradients -> logprobs_BT."""
    logprobs_BT = torch.zeros(rows.tokens_BT.shape, device=policy.device)
    for some, _ in micro_batches(rows.mask_BT.sum(1), micro_batch_size):
        logprobs_BT[some] = logprobs(policy, rows[some])
    return logprobs_BT


@torch.no_grad()
def all_values(value, rows: Responses, micro_batch_size):
    """`values` of any number of rows, without gradients -> values_BT."""
    order = []
    parts = []
    for some, _ in micro_batches(rows.mask_BT.sum(1), micro_batch_size):
        order += some
        parts.append(values(value, rows[some]))
    return torch.cat(parts)[torch.tensor(order).argsort()]


def scores(scorer, ids: list[list[int]], device):
    """What a reward model gives to whole texts -> scores_B, float32: its head at the last token."""
    ids_BL, mask_BL = pad(ids, "right", device)
    last_B1 = mask_BL.sum(1, keepdim=True) - 1  # transformers looks for the last id that is no pad, and may miss EOS
    return scorer(ids_BL, mask_BL, last_B1).squeeze(1)


def joined(rows: Responses):
    """Prompts and responses side by side -> (ids_BL, mask_BL, number of response tokens in a row).

    The width is that of the longest response, over all ranks: under ZeRO-3 the ranks must take equal steps.
    """
    longest = rows.mask_BT.sum(1).max()
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    num_tokens = int(longest)
    tokens_BT = F.pad(rows.tokens_BT, (0, num_tokens - rows.tokens_BT.shape[1]))  # a negative padding cuts
    ids_BL = torch.cat([rows.prompts_BP, tokens_BT], 1)
    mask_BL = torch.cat([rows.prompt_mask_BP, torch.ones_like(tokens_BT)], 1)  # the loss masks what follows EOS
    return ids_BL, mask_BL, num_tokens


def positions_of(mask_BL):
    """Each token's position -> positions_BL. Learned position embeddings must not count padding."""
    return (mask_BL.cumsum(1) - 1).clamp(min=0)


class TokenLogprobs(nn.Module):
    """A causal language model whose output is the log-probabilities of response tokens: policy and reference alike."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model = model.train()  # gradient checkpointing works in training mode only; dropout is 0
        config = model.config.get_text_config()
        # Some models change the head's logits: Gemma 2 and nanochat cap them, Cohere and Granite scale them.
        self.softcap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        self.divisor = temperature * divisor / scale

    def forward(self, ids_BL, mask_BL, num_tokens):
        """-> logprobs_BT, float32, of the distribution that is sampled: softmax(logits / temperature)."""
        backbone = self.model.base_model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=positions_of(mask_BL),
            use_cache=False,
        )
        # Logits at t predict token t + 1.
        hidden_ND = backbone.last_hidden_state[:, -num_tokens - 1 : -1].flatten(0, 1)
        tokens_N = ids_BL[:, -num_tokens:].flatten()
        head = self.model.get_output_embeddings()

        def logprobs(hidden_ND, tokens_N):
            logits_NV = head(hidden_ND).float()
            if self.softcap:
                logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
            return -F.cross_entropy(logits_NV / self.divisor, tokens_N, reduction="none")

        # The vocabulary dwarfs all else: at most 2^25 logits (128 MiB) are alive, and backward computes them again.
        size = max(1, 2**25 // self.model.config.get_text_config().vocab_size)
        chunks = list(zip(hidden_ND.split(size), tokens_N.split(size)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            parts = [checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [logprobs(*chunk) for chunk in chunks]
        return torch.cat(parts).view(-1, num_tokens)


class ScalarOutputs(nn.Module):
    """A sequence classification model whose output is numbers, read where it is asked: rewards, or values of states."""

    def __init__(self, model, zero=0.0):
        super().__init__()
        self.model = model.train()
        self.zero = zero  # reward units; what counts as 0

    def forward(self, ids_BL, mask_BL, read_BK):
        """-> outputs_BK, float32. read_BK: where in ids_BL to read, since K tokens of a row have an output."""
        backbone = self.model.base_model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=positions_of(mask_BL),
            use_cache=False,
        )
        rows_B1 = torch.arange(len(ids_BL), device=ids_BL.device)[:, None]
        return self.model.score(backbone.last_hidden_state[rows_B1, read_BK]) - self.zero


class ScalarHead(nn.Module):
    """A linear head with one output, computed in float32: in bfloat16 a score of 5 has steps of 1/32."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight  # (1, D), under the name that it has in the model's files

    def forward(self, hidden_BD):
        return F.linear(hidden_BD.float(), self.weight.float()).squeeze(-1)


# ---------------------------------------------------------------- 4. Rewards
#
# A reward is a number for a text. So a reward model may have any tokenizer, and a Python function may take its place.


class Reward:
    """Rewards of responses, by a reward model or a Python function; a response without EOS pays a penalty.

    `model`: a folder or hub name. `function`: file.py:name, which takes its place. `micro_batch_size`: rows that a
    reward model reads at once. `prompt`: one that the function is tried on.
    """

    def __init__(
        self,
        model=None,
        function=None,
        missing_eos_penalty=0.0,
        backend=None,
        prompt: Prompt | None = None,
        micro_batch_size=1,
    ):
        if not model and not function:
            fail("--reward-model or --reward-function: give one; the example's is for its own model and data")
        self.name = function or model
        self.missing_eos_penalty = missing_eos_penalty
        self.micro_batch_size = micro_batch_size
        self.function = load_function(function) if function else None
        if not function:
            classifier, self.tokenizer = load_classifier(model, backend)
            zero = getattr(classifier.config, "reward_mean", 0.0)
            self.scorer = freeze(ScalarOutputs(classifier, zero), backend)
            self.device = backend.device
        elif prompt:
            self.scores([prompt], [""])  # an error in the function shows now, not after the first rollout

    def __call__(self, responses: Responses):
        """-> rewards_B, float32."""
        rewards_B = self.scores(responses.prompts, responses.texts).to(responses.ended_B.device)
        rewards_B[~responses.ended_B] -= self.missing_eos_penalty
        return rewards_B

    def scores(self, prompts: list[Prompt], texts: list[str]):
        """-> scores_B, float32: one finite number per response, without the penalty."""
        scores_B = self.function_scores(prompts, texts) if self.function else self.model_scores(prompts, texts)
        if len(scores_B) != len(prompts):
            fail(f"{self.name} returned {len(scores_B)} rewards for {len(prompts)} responses", status=1)
        usable_B = scores_B.abs() < torch.finfo(torch.float32).max  # false for NaN, too
        if not usable_B.all():
            first = int(usable_B.int().argmin())
            fail(f"{self.name} returned {scores_B[first].item()} for the response {texts[first]!r}", status=1)
        return scores_B.float()

    @torch.no_grad()
    def model_scores(self, prompts: list[Prompt], texts: list[str]):
        """-> scores_B, float32."""
        length = self.tokenizer.num_positions
        ids = [reward_model_ids(self.tokenizer, prompt, text, length) for prompt, text in zip(prompts, texts)]
        lengths_B = torch.tensor([len(row) for row in ids])
        scores_B = torch.empty(len(ids), dtype=torch.float32, device=self.device)
        for rows, _ in micro_batches(lengths_B, self.micro_batch_size):
            scores_B[rows] = scores(self.scorer, [ids[i] for i in rows], self.device)
        return scores_B

    def function_scores(self, prompts: list[Prompt], texts: list[str]):
        """-> scores_B, float64, until it is known that each number is one of float32.

        The function gets copies of everything: what it changes stays with it.
        """
        columns = function_columns(prompts)
        with users_code(self.name, f" (columns: {', '.join(columns) or 'none'})"):
            found = self.function([prompt.text for prompt in prompts], list(texts), **columns)
            if isinstance(found, Iterator):  # such as a generator, which runs only now
                found = list(found)
        try:
            return torch.tensor(as_floats(found), dtype=torch.float64)
        except OverflowError:
            fail(f"{self.name} returned a whole number that is too large for a float", status=1)
        except (TypeError, ValueError, RuntimeError):
            words = " ".join(str(found).split())[:80]  # one line; tensors print several
            fail(f"{self.name} returned {words}; expected a number for each response", status=1)


def reward_model_ids(tokenizer, prompt: Prompt, response, max_length) -> list[int]:
    """The ids that a reward model reads, always: prompt + response as one text, then EOS; cut on the left.

    A chat goes through the reward model's own template, if it has one, which ends the response in its own way.
    """
    if prompt.messages and tokenizer.chat_template:
        messages = [*prompt.messages, dict(role="assistant", content=response)]
        ids = encode(tokenizer, chat_text(tokenizer, messages, tokenizer.name_or_path), add_special_tokens=False)
    else:
        ids = encode(tokenizer, prompt.text + response)
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    return cut_left(ids, max_length, tokenizer.bos_token_id)


# ---------------------------------------------------------------- 5. The update
#
# An optimizer step may have several micro-batches, which save memory and change no result: a loss is a sum over rows,
# divided by a denominator that all micro-batches share, and their gradients add up.


def micro_batches(lengths_B, size):
    """Rows of like length together, so that there is little padding -> (row numbers, whether it is the last)."""
    # The longest come first, so that running out of memory shows at once.
    order = lengths_B.argsort(descending=True, stable=True).tolist()
    for start in range(0, len(order), size):
        yield order[start : start + size], start + size >= len(order)


def train_engine(module, backend, max_grad_norm):
    """A DeepSpeed engine that trains `module` by AdamW on float32 (master) weights."""
    limit_threads(module)
    dist.barrier()  # fails at once where a rank has ended; the engine's new group would wait for it, half an hour
    zero = dict(stage=backend.zero_stage)
    if backend.offload:
        zero["offload_optimizer"] = dict(device="cpu", pin_memory=backend.device.type == "cuda")
    gradient_type = None  # of the model
    if backend.dtype == "bfloat16" and backend.zero_stage > 0:  # ZeRO-0 cannot
        gradient_type = "fp32"  # a sum of many micro-batches would be rounded in each of them
    if backend.gradient_checkpointing:
        module.model.activation_checkpointing_enable()
    config = dict(
        train_micro_batch_size_per_gpu=1,  # DeepSpeed only reports it
        gradient_accumulation_steps=2,  # several backwards per step (1 is wrong at ZeRO-1 and 2); `backward` ends them
        gradient_clipping=max_grad_norm,
        bf16=dict(enabled=backend.dtype == "bfloat16"),
        data_types=dict(grad_accum_dtype=gradient_type),
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    # eps 1e-5: a smaller one lets the rounding differences between ranks and micro-batches grow.
    adamw = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    module.register_state_dict_post_hook(drop_frozen)  # of what a checkpoint holds
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, **adamw)  # optimizer_step sets the rate
    with contextlib.redirect_stdout(io.StringIO()):  # ZeRO-1 prints its memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if backend.zero_stage == 0 and backend.world_size == 1:  # one rank need not copy gradients to average them
        engine.enable_backward_allreduce = False
    reset_optimizer(engine)  # bfloat16 ZeRO-0 has taken a step on zeros, which would spoil Adam's bias correction
    return engine


def drop_frozen(module, weights, prefix, _):
    """Takes frozen weights out of a state_dict; DeepSpeed would keep the second name of a tied one."""
    for name, weight in module.named_parameters(prefix=prefix.removesuffix("."), remove_duplicate=False):
        if not weight.requires_grad:
            weights.pop(name, None)


def backward(engine, loss, is_last):
    """Accumulates a micro-batch's gradients, unscaled; with the last one the engine averages them over the ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    # A loss that is not finite may have finite gradients. NaN makes the step one that is skipped.
    factor = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
    engine.backward(loss * factor, scale_wrt_gas=False)


def optimizer_step(engine, learning_rate) -> tuple[float, int]:
    """Clips and steps -> (gradient norm before clipping, steps skipped so far because it was not finite)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm()), engine.skipped_steps
    # float32 ZeRO-0 neither reports the norm nor skips steps that are not finite.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.isfinite():
        engine.step()
    else:
        engine.zero_grad()
        engine.skipped_steps += 1  # checkpoints keep this number
    return norm.item(), engine.skipped_steps


def scheduled(peak, schedule, warmup_ratio, step, num_steps) -> float:
    """The learning rate of a step (1 … num_steps): linear warm-up, then constant, or down towards 0."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / (num_steps - warmup)
    if schedule == "constant":
        return peak
    return peak * (1 - done if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done))


def reset_optimizer(engine):
    """Adam's moments and its count of steps are 0 again; frozen models that nobody uses any more leave the memory."""
    gc.collect()  # modules refer to each other in circles
    for state in engine.basic_optimizer.state.values():
        for value in state.values():
            value.zero_()


@contextlib.contextmanager
def gathered(engine) -> Iterator[None]:
    """Inside the block every rank has all of the weights. Only ZeRO-3 shards them."""
    sharded = [weight for weight in engine.parameters() if hasattr(weight, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


# ---------------------------------------------------------------- 6. Evaluation
#
# Greedy responses to held-out prompts: of the policy, beside those of the initial one.


def evaluate(policy, reference, prompts: list[Prompt], rewards, micro_batch_size) -> list[dict]:
    """Greedy responses to held-out prompts -> a dict each, on every rank. `rewards`: {name: function of responses}."""
    share = deal_out(prompts)
    first = len(share) if share[0].demonstration else 0  # demonstrations come before the greedy rows
    responses = rollout(policy, share, num_samples=0, greedy=True, demonstrations=first > 0)
    rewards_R = {name: reward(responses) for name, reward in rewards.items()}
    logprobs_RT = all_logprobs(policy, responses, micro_batch_size)
    greedy = responses[first:]
    ref_logprobs_BT = all_logprobs(reference, greedy, micro_batch_size)
    columns = {name: scores_R[first:] for name, scores_R in rewards_R.items()}
    columns["log_ratio"] = ((logprobs_RT[first:] - ref_logprobs_BT) * greedy.mask_BT).sum(1)
    columns["response_length"] = greedy.mask_BT.sum(1)
    if first:
        means_R = (logprobs_RT * responses.mask_BT).sum(1) / responses.mask_BT.sum(1)
        columns["loss"] = -means_R[:first]  # nats per token
        columns |= {f"demonstration_{name}": scores_R[:first] for name, scores_R in rewards_R.items()}
    return gather_rows(greedy.rows(**columns))[: len(prompts)]


def evaluation_metrics(rows: list[dict], initial_rows: list[dict]) -> dict[str, float]:
    """Means of the rows, and how often their rewards beat the initial policy's and the demonstrations'."""
    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    metrics = {f"eval_{name}": sum(row[name] for row in rows) / len(rows) for name in names}
    if "reward" in names:
        metrics["eval_win_rate"] = win_rate(rows, [row["reward"] for row in initial_rows])
    if "demonstration_reward" in names:
        metrics["eval_win_rate_reference"] = win_rate(rows, [row["demonstration_reward"] for row in rows])
    return metrics


def win_rate(rows: list[dict], rewards: list[float]) -> float:
    wins = [(row["reward"] > r) + (row["reward"] >= r) for row, r in zip(rows, rewards)]  # a tie counts 1, a win 2
    return sum(wins) / len(wins) / 2


# ================================================================ Below is plumbing: nothing here is about learning.


# ---------------------------------------------------------------- 7. Models
#
# A model is loaded once for training and, where something is frozen, once more. What cannot be trained right is refused
# here: `check_policy` compares what we compute with the model's plain forward.


@dataclasses.dataclass
class Backend:
    """This process among the others, and how models compute on it."""

    rank: int
    world_size: int
    device: torch.device
    dtype: str
    attention: str
    zero_stage: int
    offload: bool
    gradient_checkpointing: bool
    lora_rank: int


def load_tokenizer(path):
    """The tokenizer, which also learns the numbers of the model's embeddings and positions."""
    if Path(path, "adapter_config.json").is_file():
        merge = "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        fail(f"{path}: holds adapters (LoRA); merge them into their model first: {merge}")
    absent = f"no folder {path} here, and no hub model of that name could be reached"
    with fails_with(f"{path}: no tokenizer could be loaded" if Path(path).is_dir() else absent):
        whole_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = whole_config.get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if getattr(whole_config, "quantization_config", None):
        fail(f"{path}: its weights are quantised and cannot be trained: give the model without quantisation")
    if not 0 < tokenizer.vocab_size <= config.vocab_size:  # 0 where the tokenizer's files are missing
        fail(f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, but the model {config.vocab_size:,}")
    tokenizer.num_embeddings = config.vocab_size  # added tokens may lie beyond them: `encode` looks
    tokenizer.num_positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return tokenizer


HEADS = ("score.", "classifier.", "reward_head.", "value_head.", "v_head.")  # how reward models' files name them


def load_model(path, auto_class, max_length, backend, new_head=False, **kwargs):
    """A model from safetensors, without noise, that takes texts of `max_length` tokens.

    `new_head`: a model without a head `score` gets one of zeros; one that is there is kept.
    """
    kwargs |= dict(dtype=getattr(torch, backend.dtype), attn_implementation=backend.attention)
    kwargs |= dict(use_safetensors=True, trust_remote_code=False)
    kwargs |= dict(ignore_mismatched_sizes=True)  # transformers then lists them, and we can say which
    with fails_with(f"{path}: no model could be loaded"):
        model, info = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    check_head(path, auto_class, info)
    if missing := sorted(info["missing_keys"] - ({"score.weight"} if new_head else set())):
        fail(f"{path}: has no weights for {', '.join(missing[:3])}, so it is not saved for {auto_class.__name__}")
    if new_head and "score.weight" in info["missing_keys"]:
        print(f"{path}: has no head `score`, so it gets a new one")
        nn.init.zeros_(model.score.weight)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or max_length
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # after these positions the keys would depend on the longest row
        positions = rope["original_max_position_embeddings"]
    if max_length > positions:
        fail(f"--max-prompt-length + --response-length, {max_length}, is more than the {positions} positions of {path}")
    for module in model.modules():  # not in the config, whose fields differ from one architecture to the next
        for name, value in list(vars(module).items()):
            is_noise = "drop" in name or "jitter" in name or isinstance(module, nn.Dropout) and name == "p"
            if isinstance(value, float) and is_noise:
                setattr(module, name, 0.0)
    return model


def check_head(path, auto_class, info):
    """Refuses heads that we would read in part or not at all. `info`: what transformers found in the files."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        if name == "score.weight":
            fail(f"{path}: its head `score` has {found[0]} outputs; a reward model has one")
        fail(f"{path}: {name} has the shape {tuple(found)}; its config.json says {tuple(expected)}")
    heads = sorted(name for name in info["unexpected_keys"] if name.startswith(HEADS))
    if heads and auto_class is transformers.AutoModelForCausalLM and heads[0].startswith("score."):
        fail(f"{path}: is a reward model; expected a language model")
    if heads and auto_class is transformers.AutoModelForSequenceClassification:
        fail(f"{path}: its head has {', '.join(heads[:4])}; only `score`, one linear layer without bias, is supported")


def load_language_model(path, sampling: Sampling, backend):
    max_length = sampling.max_prompt_length + sampling.response_length
    return load_model(path, transformers.AutoModelForCausalLM, max_length, backend)


def new_policy(model, tokenizer, sampling: Sampling, device) -> Policy:
    """A policy around a causal language model. Its engine is a plain module until `train_engine` or `freeze`."""
    eos_ids = model.generation_config.eos_token_id
    if not isinstance(eos_ids, list):
        eos_ids = [eos_ids]
    eos_ids = sorted({*eos_ids, tokenizer.eos_token_id} - {None})
    if not eos_ids:
        fail(f"{model.name_or_path}: neither generation_config nor tokenizer names an EOS token")
    return Policy(
        engine=TokenLogprobs(model, sampling.temperature),
        decoder=same_weights(model),
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        sampling=sampling,
        device=device,
    )


def load_policy(path, tokenizer, sampling: Sampling, backend) -> Policy:
    """A causal language model, checked to be one that we can train."""
    model = with_adapters(load_language_model(path, sampling, backend), backend.lora_rank)
    policy = new_policy(model, tokenizer, sampling, backend.device)
    with fails_with(f"{path}: a {type(model).__name__} is not supported"):
        check_policy(policy)
        row_bytes = cache_bytes_per_token(model) * (sampling.max_prompt_length + sampling.response_length)
    if sampling.batch_size is None:
        sampling.batch_size = max(1, min(128, DEFAULT_CACHE_BYTES // max(1, row_bytes)))
    cache_bytes = sampling.batch_size * row_bytes
    print(f"Rollout: {sampling.batch_size} rows at once, whose cache takes up to {gib(cache_bytes)}")
    if backend.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        if cache_bytes > free_bytes:
            fail(
                f"--rollout-batch-size {sampling.batch_size}: a cache of {gib(cache_bytes)} does not fit "
                f"into the {gib(free_bytes)} that are free on the GPU; lower it or --response-length"
            )
    return policy


def load_reference(policy: Policy, backend) -> Policy:
    """The policy as it was before training, frozen. `load_policy` has checked its model."""
    if backend.lora_rank:
        model = without_adapters(policy.decoder)  # no second copy: its weights are the policy's own
    else:
        model = load_language_model(policy.decoder.name_or_path, policy.sampling, backend)
    reference = new_policy(model, policy.tokenizer, policy.sampling, policy.device)
    reference.engine = freeze(reference.engine, backend)
    return reference


@torch.no_grad()
def check_policy(policy: Policy):
    """Raises ValueError where a model would be trained on other log-probabilities than those of its plain forward.

    It runs on the CPU, on a short text: left-padded, in training mode, and decoded with a cache.
    """
    model = policy.decoder
    if model.config.model_type == "phimoe":
        raise ValueError("its router is sampled in training and reads its jitter everywhere")
    if policy.engine.model.base_model is policy.engine.model:
        raise ValueError("it has no backbone below its head")
    text_BL = torch.tensor([[0, 1]])
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # flash attention does not run on a CPU
    if model(text_BL).logits.isnan().any():
        raise ValueError("its weights are not finite")

    prompts_BP = F.pad(text_BL, (6, 0))
    mask_BP = (torch.arange(8) >= 6).long()[None]
    sampling = dataclasses.replace(policy.sampling, response_length=8)
    greedy_BT = generate(model, prompts_BP, mask_BP, [], sampling, num_samples=0, greedy=True)
    logits_BTV = model(torch.cat([text_BL, greedy_BT], 1)).logits[:, 1:-1].float()
    plain_BTV = (logits_BTV / sampling.temperature).log_softmax(-1)
    plain_BT = plain_BTV.gather(-1, greedy_BT[..., None]).squeeze(-1)

    # Kernels may sum in another order, which moves a logit by a few of its type's steps.
    step = torch.finfo(model.dtype).eps * logits_BTV.abs().max().item() / sampling.temperature
    tolerance = 4 * step + (1e-3 if model.dtype == torch.float32 else 0.1)  # nats
    ids_BL = torch.cat([prompts_BP, greedy_BT], 1)
    mask_BL = torch.cat([mask_BP, torch.ones_like(greedy_BT)], 1)
    trained_BT = policy.engine(ids_BL, mask_BL, greedy_BT.shape[1])
    if not torch.allclose(trained_BT, plain_BT, atol=tolerance):
        raise ValueError("it is not causal, minds padding, is noisy, or changes its logits after the output embedding")
    if not torch.allclose(plain_BTV.amax(-1), plain_BT, atol=tolerance):
        raise ValueError("it minds padding when it decodes with a cache")
    model.set_attn_implementation(attention)


def same_weights(model):
    """A second module around the same weights, to decode: without training mode, checkpointing or ZeRO-3's hooks."""
    shared = {}
    for thing in (*model.parameters(), *model.buffers(), model.config):
        shared[id(thing)] = thing  # deepcopy takes what it finds here as already copied
    return copy.deepcopy(model, shared).eval()


DEFAULT_CACHE_BYTES = 16 * 2**30


def gib(num_bytes) -> str:
    return f"{num_bytes / 2**30:.2g} GiB"


@torch.no_grad()
def cache_bytes_per_token(model) -> int:
    """What a row's cache grows by with each token, measured; layers with a window are counted as if they had none."""
    cache = transformers.DynamicCache(config=model.config)
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model(torch.tensor([[0, 1]]), past_key_values=cache, use_cache=True)
    model.set_attn_implementation(attention)
    tensors = []
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:  # a layer with a state has none
            tensors += [layer.keys, layer.values]
    return sum(tensor.nbytes for tensor in tensors) // 2


def roomy_cache(config, room):
    """A cache for prompts and `room` more tokens. Layers that keep a window or a state stay transformers' own."""
    cache = transformers.DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(room)
    return cache


class RoomyLayer(DynamicLayer):
    """A layer of the cache with room for the response: a new token does not copy the earlier ones."""

    def __init__(self, room):
        super().__init__()
        self.room = room  # tokens

    def update(self, keys, values, *args, **kwargs):
        start = self.get_seq_length()
        end = start + keys.shape[2]
        if start == 0:
            self.lazy_initialization(keys, values)
            self.key_buffer = F.pad(keys, (0, 0, 0, self.room))
            self.value_buffer = F.pad(values, (0, 0, 0, self.room))
        self.key_buffer[:, :, start:end] = keys
        self.value_buffer[:, :, start:end] = values
        self.keys = self.key_buffer[:, :, :end]
        self.values = self.value_buffer[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, rows_N):
        end = self.get_seq_length()
        if end == 0:  # a layer that uses another's keys
            return
        self.key_buffer = self.key_buffer.index_select(0, rows_N)
        self.value_buffer = self.value_buffer.index_select(0, rows_N)
        self.keys = self.key_buffer[:, :, :end]
        self.values = self.value_buffer[:, :, :end]


def load_classifier(path, backend, max_length=0, new_head=False) -> tuple:
    """-> (a sequence classification model with one output, its tokenizer). `new_head`: as in `load_model`."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        fail(f"{path}: the tokenizer has no EOS token, which ends what a reward model reads")
    model = load_model(
        path,
        transformers.AutoModelForSequenceClassification,
        max_length=max_length,
        backend=backend,
        new_head=new_head,
        num_labels=1,
    )
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        fail(f"{path}: {type(model).__name__} has no linear head `score` without bias, so it is not a reward model")
    model.score = ScalarHead(head.weight)
    if model.config.pad_token_id is None:  # transformers takes batches only with one
        model.config.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


def load_value_model(reward_model, policy, sampling: Sampling, backend) -> ScalarOutputs:
    """Starts from a reward model that has the policy's tokenizer, else from the policy with a head of zeros."""
    path = policy
    if reward_model:
        ours = load_tokenizer(policy)
        its = load_tokenizer(reward_model)
        if (ours.get_vocab(), ours.chat_template) == (its.get_vocab(), its.chat_template):
            path = reward_model
    max_length = sampling.max_prompt_length + sampling.response_length
    model, _ = load_classifier(path, backend, max_length=max_length, new_head=path == policy)
    zero = getattr(model.config, "reward_mean", 0.0)
    return ScalarOutputs(with_adapters(model, backend.lora_rank), zero)


def limit_threads(module):
    """A small model gains nothing from many threads: at each operation they wait for the slowest of them."""
    if "OMP_NUM_THREADS" not in os.environ:  # of a user or a launcher
        parameters = sum(p.numel() for p in module.parameters())
        torch.set_num_threads(min(torch.get_num_threads(), max(4, parameters // 1_000_000)))


def freeze(module, backend) -> nn.Module:
    """A model that is only read: whole on the device, or sharded over the ranks (ZeRO-3) or in CPU memory (offload)."""
    module.requires_grad_(False).eval()
    if backend.zero_stage < 3 and not backend.offload:
        return module.to(backend.device)
    zero = dict(stage=3)
    if backend.offload:
        zero["offload_param"] = dict(device="cpu")
    config = dict(train_micro_batch_size_per_gpu=1, zero_optimization=zero)
    return deepspeed.initialize(model=module, config=config)[0]


def with_adapters(model, rank):
    """A second module around the same weights, all frozen; each linear layer adds a trained B·A of this rank.

    (LoRA, arXiv 2106.09685, eq. 3.) B begins at 0, so the model begins unchanged. A scalar head is trained whole.
    """
    if rank == 0:
        return model
    import peft  # only needed here

    adapted = same_weights(model).train()
    adapted.requires_grad_(False)
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    # Below the head: no output embedding and no `score`.
    names = [name for name, layer in adapted.base_model.named_modules() if isinstance(layer, linear)]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=32,  # the scale is 32 / rank: one learning rate suits all ranks
        lora_dropout=0.0,
        target_modules=names,
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
    )
    torch.manual_seed(0)  # every rank of the run begins with the same adapters
    with warnings.catch_warnings(action="ignore"):  # that GPT-2's matrices lie transposed; peft sees to it
        # Not PeftModel, which would hide base_model. Where peft sees a model's config it wraps some models' experts,
        # in another way than linear layers; the container has none.
        peft.inject_adapter_in_model(config, nn.Sequential(adapted))
    adapted.peft_config = dict(default=config)
    if hasattr(adapted, "score"):
        adapted.score.requires_grad_(True)

    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    print(f"Adapters of rank {rank}: {trained:,} weights are trained, {trained / total:.2%} of the model's")
    without = set()
    for layer in adapted.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):  # a base layer, a part of an adapter, a head or a table
            continue
        if any(weight.dim() > 1 for weight in layer.parameters(recurse=False)):
            without.add(type(layer).__name__)
    without -= {"Conv1D"}  # GPT-2's linear layer
    if without:
        print(f"warning: these layers get no adapter and are not trained: {', '.join(sorted(without))}")
    return adapted


def without_adapters(model):
    """A second module around the frozen weights alone: the model as it was before training."""
    plain = same_weights(model)
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, layer.base_layer)
    return plain


def merged_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's weights by the names that they have without adapters, which are added to them matrix by matrix."""
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            continue
        adapted, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            layer = model.get_submodule(adapted)
            a = layer.lora_A["default"].weight.cpu().float()  # on the device there may be no room
            b = layer.lora_B["default"].weight.cpu().float()
            change = layer.scaling["default"] * b @ a
            if layer.fan_in_fan_out:  # GPT-2's layers hold their matrix transposed
                change = change.T
            weight = (weight.cpu().float() + change).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def save_adapter(model, folder):
    """The adapters alone, in peft's format: peft.PeftModel.from_pretrained(base_model, folder) reads them."""
    import peft

    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = model.name_or_path
    config.inference_mode = True
    weights = {}
    for name, weight in peft.get_peft_model_state_dict(model).items():
        weights[f"base_model.model.{name}"] = weight.cpu().contiguous()
    if hasattr(model, "score"):
        config.modules_to_save = ["score"]
        weights["base_model.model.score.weight"] = model.score.weight.detach().cpu()
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata=dict(format="pt"))


def save_and_check(engine, tokenizer, folder, backend):
    """A plain Hugging Face folder from any ZeRO stage, which is read again: it must hold every trained weight."""
    with gathered(engine):
        if backend.rank == 0:
            model = engine.module.model
            aside = folder.with_name(folder.name + ".tmp")  # then renamed: the folder is whole or absent
            num_bytes = sum(weight.nbytes for weight in model.state_dict().values())
            with writing(folder.parent, num_bytes):
                model.save_pretrained(aside, state_dict=dict(merged_weights(model)))
                tokenizer.save_pretrained(aside)
            for path in aside.glob("*.safetensors"):  # which only their owner may read, so far
                shutil.copymode(aside / "config.json", path)
            check_saved(model, aside)
            if hasattr(model, "peft_config"):
                save_adapter(model, folder.with_name("adapter"))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    dist.barrier()


@torch.no_grad()
def check_saved(model, folder):
    """Ends the run unless from_pretrained gives back each of the weights; comparing them takes seconds."""
    with fails_with(f"{folder}: the saved model cannot be read", status=1):
        saved, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            fail(f"{folder}: the saved model has {problem.replace('_', ' ')}: {sorted(info[problem])[:3]}", status=1)
    if not saved(torch.tensor([[0, 1]])).logits.isfinite().all():  # two tokens, on the CPU
        fail(f"{folder}: the model's outputs are not finite: it has diverged; lower --learning-rate", status=1)
    saved_weights = saved.state_dict()
    for name, weight in merged_weights(model):  # merged again: a third copy might not fit into memory
        if not torch.equal(saved_weights[name], weight.cpu()):
            fail(f"{folder}: the saved {name} is not the trained one", status=1)


@functools.cache  # read once, also where two flags name the file
def load_function(spec):
    """`path/to/file.py:name` -> the function. No other code is ever loaded from a path."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{spec}: no such reward function; expected an existing file and a name, as in path/to/file.py:name")
    with users_code(spec):
        module = load_module(Path(path).resolve())
    function = getattr(module, name, None)
    if not callable(function):
        fail(f"{spec}: the file has no function {name!r}")
    return function


@functools.cache
def load_module(path: Path):
    """A file as a module with the file's name: process pools and pickle find its functions by that."""
    sys.path.append(str(path.parent))  # at the end: a neighbour of the file hides no installed package
    name = path.stem
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != path:
        # Another module has that name. This one, only this process knows: pools work as long as they fork.
        name = f"{name.replace('.', '_')}_{zlib.crc32(bytes(path)):08x}"
        spec = importlib.util.spec_from_file_location(name, path)
    if name not in sys.modules:  # else it is one of our own files
        sys.modules[name] = importlib.util.module_from_spec(spec)  # first: dataclasses look themselves up there
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextlib.contextmanager
def users_code(spec, note="") -> Iterator[None]:
    """Runs the user's code. What it sets in torch and the random numbers that it draws do not reach the training.

    An error in it ends the run: the traceback as Python prints it, then one line.
    """
    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    gradients = torch.is_grad_enabled()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        except (Exception, SystemExit) as error:
            tqdm.write(traceback.format_exc(), file=sys.stderr, end="")
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            fail(f"{spec} raised {what.removesuffix(': ')}{note}", status=1)
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            if torch.get_default_device() != device:
                torch.set_default_device(device)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def function_columns(prompts: list[Prompt]) -> dict[str, list]:
    """The data's columns as arguments of a reward function, None where a row has none; `messages` are those of chats.

    Columns that are named like the other arguments get an underscore.
    """
    names = {name: None for prompt in prompts for name in prompt.columns}  # in their order
    columns = {}
    for name in names:
        argument = f"{name}_" if name in ("prompts", "responses", "messages") else name
        columns[argument] = [copy.deepcopy(prompt.columns.get(name)) for prompt in prompts]
    if any(prompt.messages for prompt in prompts):
        columns["messages"] = [copy.deepcopy(prompt.messages) for prompt in prompts]
    return columns


def as_floats(found) -> list[float]:
    """Numbers of Python, numpy or torch as floats, else TypeError, ValueError, RuntimeError or OverflowError.

    float() alone takes too much for a number: digits in a text, bytes, and complex numbers without their second half.
    """
    if isinstance(found, str | bytes | bytearray | Mapping | Set):  # a dict's keys are no scores, a set has no order
        raise TypeError
    floats = []
    for score in found:
        if hasattr(score, "item"):  # numpy and torch; an error if it holds several
            score = score.item()
        if not isinstance(score, numbers.Real | decimal.Decimal):  # True and False are 1 and 0
            raise TypeError
        floats.append(float(score))
    return floats


# ---------------------------------------------------------------- 8. Data
#
# Files become rows, rows become prompts with the answers to learn from, and texts become token ids.
#
# A prompt is a text or chat messages, and so is an answer (chosen, rejected, completion). `load_prompts` tells the
# forms of a row apart by their shape, checks what it assumes, and says in the data's line which form it found:
#
#   prompt     answers                    read as
#   text       texts                      they are; where all answers of a file repeat their prompts, it is cut off
#   text       whole conversations        the conversation is the prompt; the text must be a user's message of it
#   messages   texts, last messages       they are
#   messages   whole conversations        the last message is the answer; the earlier ones must be the prompt's
#   the same column                       the last message is the answer, the earlier ones are the prompt
#   no column  two conversations          the earlier messages, which must be the same, are the prompt
#   no column  two texts                  their common beginning, up to its last white space, is the prompt


FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "document")


def load_rows(path, config=None, split="train") -> list[tuple[str, dict]]:
    """Rows of a local file (FILES, also with .gz, or .parquet) or of a hub data set -> [(where it stands, row)]."""
    name = Path(path).name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in FILES:  # `datasets` does not know the line of an error, and parses dates
        rows = read_file(path, suffix, is_packed=name.endswith(".gz"))
    elif suffix != ".parquet" and Path(path).is_file():
        fail(f"{path}: not a {', '.join(FILES)} file (each may be packed as .gz), nor a .parquet file")
    else:
        import datasets  # slow to import, and only needed here

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)
        with fails_with(path):
            is_file = suffix == ".parquet"
            table = datasets.Dataset.from_parquet(path) if is_file else datasets.load_dataset(path, config, split=split)
            for column, feature in table.features.items():
                if (raw := undecoded(feature)) != feature:
                    table = table.cast_column(column, raw)
            rows = [(f"{path}: row {number}", row) for number, row in enumerate(table, start=1)]
    if not rows:
        fail(f"{path}: no rows")
    return rows


def undecoded(feature):
    """The type of a hub data set's column, whose images, sounds and the like stay bytes: a broken one may pass."""
    import datasets

    if isinstance(feature, dict):
        return {name: undecoded(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(undecoded(feature.feature), length=feature.length)
    if hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
        return dataclasses.replace(feature, decode=False)
    return feature


def read_file(path, suffix, is_packed) -> list[tuple[str, dict]]:
    with fails_with(path):
        data = Path(path).read_bytes()
        if is_packed:
            data = gzip.decompress(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        fail(f"{path}:{line}: not UTF-8: convert the file to UTF-8")
    if suffix in (".csv", ".tsv"):
        return list(read_csv(path, text, delimiter="\t" if suffix == ".tsv" else ","))
    return list(read_json(path, text, has_lines=suffix != ".json"))


def read_json(path, text, has_lines) -> Iterator[tuple[str, dict]]:
    with fails_with(path):
        lines = text.split("\n") if has_lines else [json.dumps(row) for row in json.loads(text)]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}" if has_lines else f"{path}: row {number}"
            with fails_with(where):
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half a character (a lone surrogate) is no text
            if not isinstance(row, dict):
                fail(f"{where}: a {type(row).__name__}; expected a JSON object")
            yield where, row


def read_csv(path, text, delimiter) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                fail(f"{path}:{reader.line_num}: not {len(reader.fieldnames)} columns, as in the first line")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:  # such as a quote that is never closed, which would swallow the rest of the file
        fail(f"{path}:{reader.line_num + 1}: {error}")


def read_value(row, column, where) -> str | list[dict]:
    """A text or chat messages. csv files hold messages as a text of JSON."""
    if column not in row:
        fail_without_column(row, column, where)
    value = row[column]
    if isinstance(value, str):
        value = messages_in(value, column, where) or value
    if isinstance(value, str):
        return value
    try:
        texts = [message["role"] + message["content"] for message in value]
    except (TypeError, KeyError):
        texts = []
    if not texts:
        fail(f"{where}: {column!r} is {str(value)[:40]}; expected a text or a list of {{role, content}} messages")
    for message in value:
        if message["role"] not in ROLES:
            fail(f"{where}: {column!r} has the role {message['role']!r}; expected one of {', '.join(ROLES)}")
    return value


def messages_in(text, column, where) -> list[dict] | None:
    """The messages that a text of JSON holds; None where it is just a text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # Python's own form of a list, as pandas writes it, or a broken one: as a text it would teach the brackets.
        if re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", text):
            fail(f"{where}: {column!r} holds chat messages, but not as JSON: write the column with json.dumps")
        return None
    is_chat = isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    return value if is_chat and value else None


def fail_without_column(row, column, where, reason="") -> typing.NoReturn:
    names = ", ".join(map(str, row)) or "no others"
    fail(f"{where}: no column {column!r}{reason}; there are: {names} (the flags in -column name them)")


@dataclasses.dataclass
class Exchange:
    """What a row asks and how it is answered, whatever form it had."""

    prompt: str | list[dict]
    answers: dict[str, str | None]  # by column; None: the row has none
    form: str  # for people
    lost_answer: bool = False  # the prompt ended with an answer that nobody reads


def read_exchange(row, where, prompt_column, answer_columns, has_prompt, may_lack_answers) -> Exchange:
    """A row of any form. `has_prompt`: the prompt has a column; `may_lack_answers`: then an answer may be None."""
    prompt = read_value(row, prompt_column, where) if has_prompt else None
    values = {}
    for column in answer_columns:
        is_absent = may_lack_answers and row.get(column) is None
        values[column] = None if is_absent else read_value(row, column, where)

    lost_answer = False
    if prompt is None:
        prompt, values = shared_prompt(row, where, prompt_column, values)
        form = f"{kind_of(prompt)}; the prompt is what {' and '.join(answer_columns)} share"
    elif prompt_column in answer_columns:
        prompt, has_answer = conversation_before(prompt, prompt_column, where)
        form = "conversations; their last messages are the answers"
        if may_lack_answers and not has_answer:
            values[prompt_column] = None
    elif isinstance(prompt, list):
        prompt, lost_answer = conversation_before(prompt, prompt_column, where)
        form = "conversations"
    elif conversation := whole_conversation(prompt, prompt_column, values, where):
        prompt = conversation
        form = f"conversations; {prompt_column!r} is a user's message of each"
    else:
        form = "texts"
    answers = {column: read_answer(value, prompt, column, where) for column, value in values.items()}
    return Exchange(prompt, answers, form, lost_answer)


def kind_of(value) -> str:
    return "texts" if isinstance(value, str) else "conversations"


def conversation_before(value, column, where) -> tuple[list[dict], bool]:
    """-> (the messages without an answer at their end, whether there is one)."""
    if isinstance(value, str):
        fail(f"{where}: {column!r} is a text; a column that holds prompt and answer must hold chat messages")
    if value[-1]["role"] != "assistant":
        return value, False
    if len(value) == 1:
        fail(f"{where}: {column!r} holds an answer alone; expected the messages before it")
    return value[:-1], True


def whole_conversation(text, prompt_column, values, where) -> list[dict] | None:
    """What stands before the answer where answers are whole conversations; the prompt's text must be in it."""
    for column, value in values.items():
        if isinstance(value, list) and len(value) > 1:
            questions = [message["content"].strip() for message in value[:-1] if message["role"] == "user"]
            if text.strip() not in questions:
                fail(f"{where}: {column!r} is a conversation in which {prompt_column!r} is no message of the user")
            return value[:-1]
    return None


def shared_prompt(row, where, prompt_column, values) -> tuple:
    """-> (the prompt that two answers share, the answers, of texts without it)."""
    (first_column, first), (second_column, second) = values.items()
    if isinstance(first, list) and len(first) > 1:
        return first[:-1], values  # read_answer checks that the other has the same messages
    if isinstance(first, list) or isinstance(second, list):
        reason = f", and {first_column!r} and {second_column!r} are not both texts or both conversations"
        fail_without_column(row, prompt_column, where, reason)
    shared = os.path.commonprefix([first, second])
    spaces = [i for i, letter in enumerate(shared) if letter.isspace()]
    size = len(shared[: spaces[-1]].rstrip()) if spaces else 0
    if size == 0 and first != second:
        reason = f", and {first_column!r} and {second_column!r} have no common beginning that could be the prompt"
        fail_without_column(row, prompt_column, where, reason)
    return shared[:size], {first_column: first[size:], second_column: second[size:]}


def read_answer(value, prompt, column, where) -> str | None:
    """The text of an answer; of messages it is the last one, and the earlier ones must be the prompt's."""
    if value is None or isinstance(value, str):
        return value
    *earlier, last = value
    if last["role"] != "assistant":
        fail(f"{where}: {column!r} ends with a message of the {last['role']}; expected the assistant's answer")
    if earlier and (isinstance(prompt, str) or contents(earlier) != contents(prompt)):
        fail(f"{where}: the messages of {column!r} before its answer are not the prompt's")
    return last["content"]


def contents(messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def cut_repeated_prompts(exchanges: list[Exchange]) -> int:
    """Answers that repeat their prompt's text lose it, if all of a file do -> how many do, if only some."""
    num_repeating = num_others = 0
    for exchange in exchanges:
        for answer in exchange.answers.values():
            if answer is not None and isinstance(exchange.prompt, str) and exchange.prompt.strip():
                repeats = answer.startswith(exchange.prompt)
                num_repeating += repeats
                num_others += not repeats
    if num_others:  # by chance, or because the task is to repeat
        return num_repeating
    for exchange in exchanges if num_repeating else []:
        if isinstance(exchange.prompt, str):
            exchange.form = "texts; answers repeat the prompt, which is cut off"
            for column, answer in exchange.answers.items():
                exchange.answers[column] = answer and answer.removeprefix(exchange.prompt)
    return 0


def load_prompts(
    path, hub, prompt_column, tokenizer, max_length, answer_columns=(), may_lack_answers=False
) -> list[Prompt]:
    """Prompts cut on the left to `max_length` tokens (a BOS stays in front), with the texts of their answers.

    `hub`: (configuration, split). `may_lack_answers`: the answer of a row without one is None; else it is refused.
    """
    rows = load_rows(path, *hub)
    # Two answers may share their prompt. If the user names a column for it, it must be there.
    may_share = prompt_column == "prompt" and len(answer_columns) == 2
    has_prompt = not may_share or any(prompt_column in row for _, row in rows)
    columns = (prompt_column, answer_columns, has_prompt, may_lack_answers)
    exchanges = [read_exchange(row, where, *columns) for where, row in rows]
    num_repeating = cut_repeated_prompts(exchanges) if has_prompt else 0

    prompts, lengths, num_empty = [], [], 0
    for (where, row), exchange in zip(rows, exchanges):
        prompt = make_prompt(exchange.prompt, tokenizer, max_length, f"{where}: {prompt_column!r}")
        if not prompt.text.strip() or not prompt.ids:
            num_empty += 1
            continue
        prompt.where = where
        prompt.columns = {name: value for name, value in row.items() if name != prompt_column}
        prompt.answers = exchange.answers
        prompt.digest = digest_of(exchange)
        lengths.append(len(prompt.ids) + prompt.num_cut)
        prompts.append(prompt)
    if not prompts:
        fail(f"{path}: every prompt is empty")
    counts = {
        "empty, dropped": num_empty,
        "lost the answer at their end": sum(exchange.lost_answer for exchange in exchanges),
        "answers begin like their prompt, read as they are": num_repeating,
    }
    report(path, len(prompts), "prompts", counts, forms=[exchange.form for exchange in exchanges])
    report_lengths(lengths, max_length, "--max-prompt-length", "prompts", "lose their beginning")
    return prompts


def make_prompt(value, tokenizer, max_length, place) -> Prompt:
    """A text, or chat messages by the tokenizer's template, as a prompt; `place` is for error messages."""
    messages = None
    if isinstance(value, str):
        text = value
        ids = encode(tokenizer, text)
    else:
        messages = value
        text = chat_text(tokenizer, messages, place, add_generation_prompt=True)
        ids = encode(tokenizer, text, add_special_tokens=False)  # a chat template writes its own
    kept_ids = cut_left(ids, max_length, tokenizer.bos_token_id)
    return Prompt(text, kept_ids, columns={}, messages=messages, num_cut=len(ids) - len(kept_ids))


def digest_of(exchange: Exchange) -> str:
    """A hash of what is asked and answered; it stays when a file grows or its rows move."""
    prompt = exchange.prompt if isinstance(exchange.prompt, str) else contents(exchange.prompt)
    text = json.dumps([prompt, exchange.answers], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def chat_text(tokenizer, messages, where, **kwargs) -> str:
    if not tokenizer.chat_template:
        fail(f"{where} holds chat messages, but the model's tokenizer has no chat template")
    with fails_with(f"{where}: the chat template refuses the messages"):  # such as an order of roles
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def report(path, size, rows, counts: dict[str, int], forms: list[str] | None = None):
    """The data's line: how many rows there are, which forms they have, and what was dropped."""
    names = list(dict.fromkeys(forms or []))
    notes = names if len(names) < 2 else [f"{forms.count(name):,} {name}" for name in names]
    notes += [f"{count:,} {name}" for name, count in counts.items() if count]
    print(f"{os.path.relpath(path)}, {rows}: {size:,}" + (f" ({'; '.join(notes)})" if notes else ""))


def report_lengths(lengths: list[int], limit, flag, rows, loss):
    """Says how many rows are too long; if they are more than a tenth, as a warning."""
    count = sum(length > limit for length in lengths)
    if count:
        most = sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]
        sign = "warning: " if count > len(lengths) / 10 else ""
        found = f"{sign}{count:,} of {len(lengths):,} {rows} are longer than {flag} {limit} and {loss}"
        print(f"{found}; 95 % have at most {most:,} tokens")


def train_and_held_out(load, dataset, eval_dataset, size) -> tuple[list, list]:
    """-> (training rows, held-out rows); without an evaluation data set, up to `size` rows are held out.

    Rows have a `digest`. The least ones are held out, and only from the lower half of all possible ones: neither the
    number of rows nor their order counts, so rows that are added later may replace held-out rows, but never turn a row
    that was trained on into a held-out one. Equal rows are never on both sides.
    """
    print("Data:")
    rows = load(dataset)
    if not size:
        return rows, []
    print("Held-out data:")
    if eval_dataset:
        return rows, load(eval_dataset)[:size]
    ordered = sorted(rows, key=lambda row: row.digest)
    candidates = [row for row in ordered if row.digest < "8"] or ordered[:1]  # of hexadecimal digits: the lower half
    last = ordered[-1].digest  # something must be left to train on, even of two rows
    held_out = [row for row in candidates[:size] if row.digest != last]
    if not held_out:
        fail(f"{dataset}: its one row cannot be both trained on and held out: give --eval-dataset")
    digests = {row.digest for row in held_out}
    print(f"{len(held_out):,} of them, which are not trained on")
    return [row for row in rows if row.digest not in digests], held_out


def encode(tokenizer, text, add_special_tokens=True) -> list[int]:
    """The ids of a text that something may follow: what the tokenizer adds at its end (EOS, SEP) is left out.

    What it adds in front stays, but one BOS at the most: a text that a template has written may begin with its own.
    """
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_special_tokens_mask=True)
    ids = found["input_ids"]
    is_added = found["special_tokens_mask"]  # special tokens that the text itself holds are not marked
    while add_special_tokens and ids and is_added[len(ids) - 1]:
        ids = ids[:-1]
    if max(ids, default=0) >= tokenizer.num_embeddings:
        fail(f"{tokenizer.name_or_path}: has no embedding of {tokenizer.decode([max(ids)])!r}, which a text contains")
    return ids[1:] if ids[:2] == 2 * [tokenizer.bos_token_id] else ids


def encode_answers(tokenizer, prompts: list[Prompt], column, eos_ids: list[int]) -> list[list[int]]:
    """The ids of a column's answers as the policy should write them after their prompts, with an EOS at the end.

    An answer in a chat ends as the chat template ends it. Some templates rewrite answers (those of reasoning models
    drop or move the thoughts): such an answer is read as it is, with the tokenizer's EOS, and a line says so.
    """
    rows = []
    num_rewritten = 0
    for prompt in prompts:
        text = prompt.answers[column]
        ids = encode_turn(tokenizer, prompt, text, eos_ids) if prompt.messages else None
        if ids is None:
            num_rewritten += prompt.messages is not None
            ids = encode_response(tokenizer, text)
        rows.append(ids)
    if num_rewritten:
        reason = "since the chat template would change them"
        print(f"{num_rewritten:,} of {column!r} are read as they are and end with {tokenizer.eos_token}, {reason}")
    return rows


def encode_turn(tokenizer, prompt: Prompt, text, eos_ids: list[int]) -> list[int] | None:
    """The ids of the assistant's turn up to its EOS, by the chat template; None where that would rewrite the answer."""
    turns = []
    for answer in (text, "X0X"):
        messages = [*prompt.messages, dict(role="assistant", content=answer)]
        turns.append(chat_text(tokenizer, messages, prompt.where))
    whole, frame = turns
    # Another answer shows what the template writes around any answer. It may cut off white space.
    if whole not in (frame.replace("X0X", text), frame.replace("X0X", text.strip())):
        return None
    if not whole.startswith(prompt.text):
        return None
    prompt_ids = encode(tokenizer, prompt.text, add_special_tokens=False)
    ids = encode(tokenizer, whole, add_special_tokens=False)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # a token lies across the border, but the policy begins to write at it
        ids = encode_continuation(tokenizer, whole.removeprefix(prompt.text))
    for i, token in enumerate(ids):
        if token in eos_ids:  # what the template writes after it belongs to the next turn
            return ids[: i + 1]
    return [*ids, eos_id_of(tokenizer)]


def encode_response(tokenizer, text) -> list[int]:
    """The ids of a text as it stands after a prompt, with one EOS."""
    ids = encode_continuation(tokenizer, text)
    if ids[-1:] != [eos_id_of(tokenizer)]:
        ids.append(tokenizer.eos_token_id)
    return ids


def encode_continuation(tokenizer, text) -> list[int]:
    """The ids of a text as it stands after a prompt: some tokenizers begin a text alone with a space."""
    ids = encode(tokenizer, text, add_special_tokens=False)
    if decode(tokenizer, [ids]) == [text]:
        return ids
    anchor = encode(tokenizer, "\n", add_special_tokens=False)
    return encode(tokenizer, "\n" + text, add_special_tokens=False)[len(anchor) :]


def eos_id_of(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        fail(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, which ends a response")
    return tokenizer.eos_token_id


def load_eos_ids(path, tokenizer) -> list[int]:
    """The ids that end a policy's responses; chat models often have several."""
    try:
        config = transformers.GenerationConfig.from_pretrained(path)
    except OSError:  # there is none, and transformers makes one
        model_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = transformers.GenerationConfig.from_model_config(model_config)
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def cut_left(ids: list[int], max_length, bos_id) -> list[int]:
    """The last `max_length` ids, of which the first stays the BOS if it was one."""
    excess = len(ids) - max_length
    if excess > 0 and ids[0] == bos_id and max_length > 1:
        return ids[:1] + ids[excess + 1 :]
    return ids[max(0, excess) :]


def shuffled_indices(size, seed, start, count) -> list[int]:
    """Entries start … start + count of an endless stream of shuffled epochs: a position in the data is a number."""
    indices = []
    for epoch in range(start // size, (start + count - 1) // size + 1):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        indices += torch.randperm(size, generator=generator).tolist()
    return indices[start % size :][:count]


def shuffled_batch(items, seed, update, batch_size) -> list:
    """This rank's share of an update's items."""
    indices = shuffled_indices(len(items), seed, (update - 1) * batch_size, batch_size)
    return [items[i] for i in indices[dist.get_rank() :: dist.get_world_size()]]


# ---------------------------------------------------------------- 9. The run
#
# A run is a folder. All that a person or --resume needs is there, as text that can be read while the run goes on.
# A process may die at any moment: files are replaced as a whole, or they grow by lines of which the last may be torn.


# The flags whose files --resume reads again, and that a model card shows without their folders.
INPUTS = ("model", "dataset", "eval_dataset", "reward_model", "reward_function", "gold_reward_function")
INPUT_KINDS = ".json .jsonl .csv .parquet .arrow .safetensors .jinja .model .txt".split()
DISK_IS_FULL = ("No space left", "quota exceeded", "PytorchStreamWriter", "inline_container.cc", "iostream error")
GREATEST_IS_BEST = ("reward", "win_rate", "win_rate_reference", "accuracy", "margin")


class Clock:
    """Seconds of the parts of an update, under the names of their metrics."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, part):
        """Ends a part, which began with the clock or where the part before it ended."""
        now = time.perf_counter()
        self.seconds[f"seconds_{part}"] = now - self.last
        self.last = now

    def total(self) -> float:
        return sum(self.seconds.values())


class Run:
    """A run's folder (args.json, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoint/) and its console.

    `flags`: all of them, for args.json and the model card. `engines`: what a checkpoint holds; the first is the model
    that is saved at the end.
    """

    def __init__(self, *, script, flags: dict, output_dir, resume, seed, save_every, num_updates, engines: list):
        self.script = Path(script).name
        self.flags = flags | dict(resume=None, output_dir=None)
        self.engines = engines
        self.is_main = dist.get_rank() == 0
        self.folder = self.shared_folder(output_dir, seed)
        self.last_checkpoint = 0
        self.lock = self.take_folder(is_new=not resume)
        self.model_bytes, self.checkpoint_bytes = saved_sizes(engines)
        if resume:
            self.read_checkpoint()
        self.check_room(save_every)
        dist.barrier()  # every rank has looked before rank 0 writes
        if self.is_main:
            with fails_with(f"--output-dir {self.folder}"):
                self.write_beginning()
        self.open_console(num_updates)
        self.listen()

    # The folder

    def shared_folder(self, output_dir, seed) -> Path:
        """The run's folder, the same on all ranks; one of its own where the user names none."""
        name = output_dir or f"runs/{Path(self.script).stem}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        while not output_dir and Path(name).exists():  # another run of this second
            name += "x"
        names = [Path(name).absolute()]
        dist.broadcast_object_list(names)  # the ranks' clocks may differ
        return names[0]

    def take_folder(self, is_new):
        """Refuses a folder that holds something else, and locks it. The kernel frees the lock with the process."""
        holds = f"--output-dir {self.folder} already holds"
        with fails_with(f"--output-dir {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)  # by all ranks, so that all fail alike
            names = {path.name for path in self.folder.iterdir()} - {"lock"}
        if is_new and names and "args.json" not in names:
            fail(f"{holds} other files: choose another folder")
        lock = None
        taken = [False]
        if self.is_main:
            with fails_with(f"--output-dir {self.folder}"):
                lock = open(self.folder / "lock", "w")
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    taken = [True]
                except OSError as error:  # some network file systems have no locks
                    print(f"warning: {self.folder} cannot be locked ({error.strerror}): start no second run there")
        dist.broadcast_object_list(taken)
        if taken[0]:
            fail(f"{self.folder}: another process is running in this folder: wait for its end, or choose another one")
        has_learned = any(row["update"] for row in read_rows(self.folder / "metrics.jsonl"))
        if is_new and has_learned:
            fail(f"{holds} a run: choose another folder, or --resume it")
        return lock

    def check_room(self, save_every):
        """Before anything expensive: the disk has room for the saved model and, with --save-every, two checkpoints."""
        needed = self.model_bytes
        if save_every:
            needed += 2 * self.checkpoint_bytes  # the old one goes when the new one is whole
        if self.last_checkpoint:
            needed -= self.checkpoint_bytes  # one is there
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            fail(f"{self.folder}: the disk has {free:,} bytes left; the model and its checkpoints need {needed:,}")

    def write_beginning(self):
        """The files of a run that begins or goes on; what an earlier process wrote after the checkpoint is dropped."""
        ranks = dist.get_world_size()
        record = self.flags | dict(ranks=ranks, inputs=input_digests(self.flags))
        write_whole(self.folder / "args.json", json.dumps(record, indent=2) + "\n")
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            kept = [row for row in read_rows(path) if row["update"] <= self.last_checkpoint]
            write_whole(path, json_lines(kept))
        if self.last_checkpoint == 0:
            for path in self.folder.glob("events.*"):
                path.unlink()
        self.remove_checkpoints_but(self.last_checkpoint)  # a torn one takes room
        self.writer = SummaryWriter(str(self.folder), purge_step=self.last_checkpoint + 1)
        self.writer.add_text("flags", f"```\n{json.dumps(self.flags, indent=2)}\n```")

    # Checkpoints

    def read_checkpoint(self):
        with fails_with(f"--resume {self.folder}: there is no checkpoint (a run writes them with --save-every)"):
            self.last_checkpoint = int((self.folder / "checkpoint" / "latest").read_text())
        folder = self.folder / "checkpoint" / f"update-{self.last_checkpoint}"
        for i, engine in enumerate(self.engines):
            with fails_with(f"--resume {self.folder}: {folder} could not be read"):
                # Not strict: a checkpoint has the trained weights alone.
                path, _ = engine.load_checkpoint(str(folder), tag=f"engine-{i}", load_module_strict=False)
                if path is None:
                    raise OSError("it is not there or not whole")

    def save_checkpoint(self, update):
        """Written into a folder of the update's own, then named by `latest` in one atomic step: never torn."""
        folder = self.folder / "checkpoint"
        with writing(self.folder, self.checkpoint_bytes):
            for i, engine in enumerate(self.engines):
                engine.save_checkpoint(
                    str(folder / f"update-{update}"),
                    tag=f"engine-{i}",
                    save_latest=False,
                )
        dist.barrier()
        if self.is_main:
            write_whole(folder / "latest", str(update))
            self.remove_checkpoints_but(update)

    def remove_checkpoints_but(self, update):
        for folder in self.folder.glob("checkpoint/update-*"):
            if folder.name != f"update-{update}":
                shutil.rmtree(folder)

    # The console

    def open_console(self, num_updates):
        if self.last_checkpoint:
            print(f"Resumed after update {self.last_checkpoint} of {num_updates}")
        for name in ("model", "reward_model", "reward_function", "gold_reward_function"):
            if self.flags.get(name):
                print(f"{name.replace('_', ' ').capitalize()}: {os.path.relpath(self.flags[name])}")
        rows = read_rows(self.folder / "metrics.jsonl")
        self.rows = [finite_numbers(row) for row in rows]
        self.warned = set()
        self.skipped = sum(engine.skipped_steps for engine in self.engines)
        self.faults = []  # the updates in a row that have skipped a step
        self.bar = tqdm(total=num_updates, initial=self.last_checkpoint, unit="update", disable=not self.is_main)

    def log(self, update, metrics: dict[str, float]):
        """A row of metrics.jsonl (null for what is not finite), points of TensorBoard's curves, the progress bar."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
        metrics = dict(update=update, peak_memory_bytes=max(gather_rows([peak]))) | metrics
        finite = finite_numbers(metrics)
        if self.is_main:
            with writing(self.folder), open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json_lines([dict.fromkeys(metrics) | finite]))
            for name, value in metrics.items():
                group = "eval" if name.startswith("eval_") else "train"
                self.writer.add_scalar(f"{group}/{name}", value, update)
            self.rows.append(finite)
            names = ("reward", "gold_reward", "kl", "entropy") if "reward" in metrics else ("accuracy", "loss")
            self.show({name: metrics[name] for name in names if name in metrics})
            self.bar.update(update > 0)
            for name, sentence in troubles(self.rows).items():
                if name not in self.warned:
                    tqdm.write(f"warning, update {update}: {sentence}")
                    self.warned.add(name)
        self.count_faults(update, metrics, finite)

    def count_faults(self, update, metrics, finite):
        """Ten skipped updates in a row end the run: it has diverged, and would go on for hours to no end."""
        skipped = metrics.get("skipped_updates", 0)
        if skipped > self.skipped:
            self.faults.append(update)
        else:
            self.faults = []
        self.skipped = skipped
        if len(self.faults) == 10:
            name = next((name for name in metrics if name not in finite), "a gradient")
            fail(f"ten updates in a row were skipped: {name} is not finite since update {self.faults[0]}", status=1)

    def show(self, numbers: dict[str, float]):
        """Numbers beside the progress bar."""
        self.bar.set_postfix({name: f"{number:.2f}" for name, number in numbers.items()}, refresh=False)

    def log_samples(self, update, rows: list[dict], title=None):
        """All rows of an evaluation to samples.jsonl, ten to TensorBoard, three to the console."""
        if not self.is_main:
            return
        with writing(self.folder), open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json_lines([dict(update=update) | row for row in rows]))
        lines = []
        for row in rows[:10]:
            reward = f"[{row['reward']:6.2f}] " if "reward" in row else ""
            prompt = one_screen_line(row["prompt"], 120, end=True)  # a response goes on from the prompt's end
            lines.append(f"    {reward}{prompt} ▸{one_screen_line(row['response'], 400)}")
        self.writer.add_text("samples", "\n".join(lines), update)
        if not title:
            means = []
            for name in ("reward", "gold_reward"):
                values = [row[name] for row in rows if name in row]
                if values:
                    means.append(f"mean {name.replace('_', ' ')} {sum(values) / len(values):.2f}")
            title = "greedy responses to held-out prompts"
            if means:
                title = f"{', '.join(means)} of {title}"
        tqdm.write("\n".join([f"\nAfter {update} updates: {title}, such as", *lines[:3]]))

    def write_rows(self, name, rows: list[dict], size):
        """All ranks' rows to a file of their own, in groups of `size` that stay together."""
        groups = gather_rows([rows[i : i + size] for i in range(0, len(rows), size)])
        if self.is_main:
            write_whole(self.folder / name, json_lines([row for group in groups for row in group]))

    # The end

    def listen(self):
        self.signals = []  # (number, time)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.hear)

    def hear(self, number, frame):
        """The first signal ends the run after its update. A second one ends it at once."""
        now = time.monotonic()
        if self.signals and now > self.signals[0][1] + 1:  # within a second it is the launcher's copy of the first
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.is_main and not self.signals:
            print("\nStopping after this update … (a second ctrl-C stops at once)", file=sys.stderr)
        self.signals.append((number, now))

    def stop_if_asked(self, update):
        """After ctrl-C or SIGTERM at any rank: a checkpoint, a line that says how to go on, exit status 130 or 143."""
        heard = [number for number, _ in self.signals]
        number = max(gather_rows([max(heard, default=0)]))
        if number and update < self.bar.total:  # the last one is followed by the end
            self.save_checkpoint(update)
            launcher = "python" if dist.get_world_size() == 1 else "the same launcher and number of ranks,"
            self.close()
            tqdm.write(f"Stopped after update {update}. To go on: {launcher} {sys.argv[0]} --resume {self.folder}")
            raise SystemExit(128 + number)

    def finish(self, model, usage):
        """A model card, and the console's last lines: first and last evaluation, warnings, and where the files are."""
        self.close()
        if not self.is_main:
            return
        write_whole(self.folder / model / "README.md", model_card(self.script, self.flags, self.rows[-1], usage))
        for line in self.evaluation_lines():
            print(line)
        for sentence in troubles(self.rows).values():
            print(f"Warning: {sentence}")
        print(f"Saved:   {self.folder / model} (checked; transformers' from_pretrained reads it)")
        print(f"Samples: {self.folder / 'samples.jsonl'}")
        print(f"Curves:  tensorboard --logdir {self.folder.parent}")

    def evaluation_lines(self) -> Iterator[str]:
        """The first, last and best value of each held-out metric: a curve may rise and fall between the two."""
        first = self.rows[0]
        last = self.rows[-1]
        for name in first:
            if not name.startswith("eval_") or name not in last or name.endswith(("_length", "_interval")):
                continue
            line = f"{name:24} {first[name]:6.2f} → {last[name]:6.2f}"
            if f"{name}_interval" in last:
                line += f" ± {last[f'{name}_interval']:.2f}"
            values = {row["update"]: row[name] for row in self.rows if name in row}
            best = None
            if name == "eval_loss":
                best = min(values, key=values.get)
            elif name.removeprefix("eval_").removeprefix("gold_") in GREATEST_IS_BEST:
                best = max(values, key=values.get)
            if best is not None:
                line += f" (best {values[best]:.2f}, update {best})"
            yield line

    def close(self):
        self.bar.close()
        if self.is_main:
            self.writer.close()
        dist.barrier()
        dist.destroy_process_group()


def finite_numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None and math.isfinite(value)}


def saved_sizes(engines) -> tuple[int, int]:
    """-> (bytes of the first engine's model, bytes of a checkpoint of all engines, over all ranks)."""
    models = []
    checkpoint = 0
    for engine in engines:
        weights = 0
        for p in engine.module.parameters():
            size = getattr(p, "ds_numel", p.numel())  # under ZeRO-3 a rank holds a part
            weights += size * p.element_size()
            if p.requires_grad:
                checkpoint += 8 * size  # Adam's moments
                checkpoint += 4 * size if p.element_size() < 4 else 0  # float32 master weights
        models.append(weights)
    return models[0], sum(models) + checkpoint


def troubles(rows: list[dict]) -> dict[str, str]:
    """What has gone wrong, from a run's rows of metrics -> {name: a sentence that names the flag to turn}."""
    last = rows[-1]

    def last_are(metric, low, high):
        """Whether the last three rows all have the metric between these; one bad update is no trouble."""
        values = [row[metric] for row in rows[-3:] if metric in row]
        return len(values) == 3 and all(low < value < high for value in values)

    found = {}
    if last_are("entropy", -1, 0.02):
        found["entropy"] = "the policy has collapsed, it has one response to each prompt: lower --learning-rate"
    elif last_are("truncated_fraction", 0.5, 2):
        found["length"] = "most sampled responses are cut off: raise --response-length or --missing-eos-penalty"
    if last_are("kl", 100, math.inf) or last.get("eval_log_ratio", 0) > 100:
        found["drift"] = "the policy is over 100 nats from the initial one: lower --learning-rate"
    if last_are("reward_std", -1, 1e-6):
        found["reward"] = "all sampled responses have one reward, so nothing can be learned: look at samples.jsonl"
    if "eval_gold_reward" in last and "eval_reward" in last:
        evaluations = [row for row in rows if "eval_gold_reward" in row]
        golds = [row["eval_gold_reward"] for row in evaluations]
        best = evaluations[golds.index(max(golds))]
        fell = max(golds) - golds[-1] > 0.25 * (max(golds) - min(golds))
        if len(golds) > 2 and fell and last["eval_reward"] > best["eval_reward"]:
            change = f"eval_gold_reward fell from {max(golds):.2f} to {golds[-1]:.2f} since update {best['update']}"
            found["gold"] = f"the policy games its reward: {change}, while eval_reward rose; train less"
    return found


def one_screen_line(text, limit, end=False) -> str:
    """A text on one line, at most `limit` characters of its beginning or its end, with … where it is cut."""
    text = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎")
    if len(text) <= limit:
        return text
    return f"…{text[-limit:]}" if end else f"{text[:limit]}…"


def model_card(script, flags: dict, metrics: dict, usage) -> str:
    """The README.md of a model's folder, as on the hub; `usage`: lines of Python that use the model."""
    shown = {name: public_name(value) if name in INPUTS and value else value for name, value in flags.items()}
    data = huggingface_hub.ModelCardData(
        library_name="transformers",
        base_model=shown["model"],
        datasets=[shown["dataset"]],
        tags=[Path(script).stem],
    )
    text = f"---\n{data.to_yaml()}\n---\n# {shown['model']} after {script}\n"
    blocks = {"In this folder": usage, "Flags": json.dumps(shown, indent=2), "Metrics": json.dumps(metrics, indent=2)}
    for name, block in blocks.items():
        text += f"\n{name}:\n\n```\n{block.strip()}\n```\n"
    return text


def public_name(value) -> str:
    """A path flag as others may read it: a hub name, a path inside this project, or a last name without its folders."""
    path = file_of(value)
    if not path.is_absolute():
        return value
    shown = path.relative_to(HERE) if path.is_relative_to(HERE) else path.name
    return value.replace(str(path), str(shown))


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path) -> list[dict]:
    """The lines of a file of ours, none if there is no file; a last line that was torn off is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def write_whole(path, text):
    """Atomic: readers see the old text or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with writing(path.parent):
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


@contextlib.contextmanager
def writing(folder, num_bytes=0) -> Iterator[None]:
    """Looks for the room first. A full disk ends the run with one line, then or inside."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        fail(f"{folder}: the disk has {free:,} bytes left, {num_bytes:,} are needed", status=1)
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in DISK_IS_FULL):
            raise
        free = shutil.disk_usage(folder).free
        fail(f"{folder}: the disk is full, {free:,} bytes are left; could not write: {first_line(error)}", status=1)


def input_digests(flags: dict) -> dict[str, dict[str, str]]:
    """-> {flag: {file: hash of its content}}; a file of the flag's own is "", a hub name has none."""
    found = {}
    for flag in INPUTS:
        value = flags.get(flag)
        if not value:
            continue
        path = file_of(value)
        if path.is_file():
            found[flag] = {"": digest(path)}
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in INPUT_KINDS)
            found[flag] = {str(file.relative_to(path)): digest(file) for file in files}
    return found


def digest(path) -> str:
    """A hash of a file's content; of large weights, of the size and of sixteen pieces, so that it takes no time."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.suffix != ".safetensors" or size < 2**28:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for i in range(16):
            file.seek(size * i // 16)
            found.update(file.read(2**20))
        return found.hexdigest()


def check_inputs(folder, flags: dict, before: dict[str, dict[str, str]]):
    """Refuses to resume with other content than the run began with; where it lies does not matter."""
    now = input_digests(flags)
    for flag in INPUTS:
        old = before.get(flag, {})
        new = now.get(flag, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                file = file_of(flags[flag]) / name
                change = "has changed" if name in new and name in old else "is new" if name in new else "is missing"
                fail(f"--resume {folder}: {file} {change} since the run began (--{flag.replace('_', '-')})")


def pair_metrics(rows: list[dict]) -> dict[str, float]:
    """Of held-out pairs: `rows` are a chosen and a rejected response in turn, each with its reward and its length.

    The interval is half the width of the accuracy's 95% interval.
    """
    rewards = torch.tensor([row["reward"] for row in rows])
    lengths = torch.tensor([float(row["length"]) for row in rows])
    margins_B = rewards[::2] - rewards[1::2]
    right = accuracy(margins_B).mean().item()
    return dict(
        eval_accuracy=right,
        eval_accuracy_interval=1.96 * (right * (1 - right) / len(margins_B)) ** 0.5,
        eval_margin=margins_B.mean().item(),
        eval_score=rewards.mean().item(),
        eval_score_std=rewards.std().item(),
        eval_length_correlation=torch.corrcoef(torch.stack([rewards, lengths]))[0, 1].item(),
    )


def accuracy(margins_B):
    """1 where the chosen response has the greater score, ½ in a tie -> (B,)."""
    wins_B = (margins_B > 0).float()
    ties_B = (margins_B == 0).float()
    return wins_B + 0.5 * ties_B


def calibration_table(rows, bins: int = 5) -> str:
    """Of the held-out pairs that the model claims to know with some certainty: how often is it right?"""
    rewards = torch.tensor([row["reward"] for row in rows])
    margins_B = rewards[::2] - rewards[1::2]
    certainty_B = margins_B.abs().sigmoid()
    right_B = (margins_B > 0).float()
    lines = ["Certainty    pairs   predicted   observed"]
    for i in range(bins):
        low = 0.5 + 0.5 * i / bins
        high = low + 0.5 / bins
        inside_B = (certainty_B >= low) & ((certainty_B < high) | (i == bins - 1))
        means = [f"{x_B[inside_B].mean():.2f}" if inside_B.any() else "–" for x_B in (certainty_B, right_B)]
        lines.append(f"{low:.1f} to {high:.1f} {inside_B.sum():8} {means[0]:>11} {means[1]:>10}")
    return "\n".join(lines)


# ---------------------------------------------------------------- 10. Flags and processes
#
# Whatever a user may get wrong ends with one line that says what to do, before anything expensive has begun.


def fail(message, status=2) -> typing.NoReturn:
    """Ends with one line on standard error. Status 2 is bad input, which all ranks of a node see; one prints it."""
    if status != 2 or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"error: {message}", file=sys.stderr)
    raise Failure(status)


class Failure(SystemExit):
    """Raised by `fail` after it has printed its message."""


@contextlib.contextmanager
def fails_with(message, status=2) -> Iterator[None]:
    """An error inside, or an exit, ends the run with one line: the message, then the error's first line."""
    try:
        yield
    except Failure:
        raise
    except (Exception, SystemExit) as error:
        file = str(getattr(error, "filename", None) or "")
        if isinstance(error, OSError) and file.startswith(os.path.expanduser(huggingface_hub.constants.HF_HOME)):
            fail(f"{file}: {error.strerror}: the libraries' cache; set HF_HOME to a folder that you can write to")
        fail(f"{message}: {first_line(error)}", status)


def first_line(error) -> str:
    """What an error says, without the lines that only its author can use."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""  # the lines of a .jsonl file are read alone
        return f"no valid JSON: {error.msg} ({line}column {error.colno})"
    text = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, (OSError, ValueError)):  # these two speak for themselves
        text = f"{type(error).__name__}: {text}"
    return (text.strip() or type(error).__name__).splitlines()[0]


# Types of flags: tyro parses them, pydantic knows their bounds.
PositiveInt = pydantic.PositiveInt
NonNegativeInt = pydantic.NonNegativeInt
PositiveFloat = typing.Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = typing.Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = typing.Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
PathOrName = typing.Annotated[str, pydantic.Field(min_length=1)]


def check_bounds(args):
    """Refuses values that their types do not accept."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        try:
            pydantic.TypeAdapter(field.type).validate_python(value)
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            fail(f"--{field.name.replace('_', '-')} {value!r}: {reason}")


def make_paths_absolute(args):
    """So that --resume works from any folder; what does not exist here is a hub name."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None or field.type not in (PathOrName, PathOrName | None):
            continue
        folder = HERE if value == field.default else Path.cwd()  # the example lies beside this file
        if file_of(folder / value).exists():
            setattr(args, field.name, os.path.abspath(folder / value))
        elif value.startswith("examples/"):
            flag = f"--{field.name.replace('_', '-')}"
            fail(f"{flag}: {HERE} has no {value}: give --model, --dataset and a reward of your own")


def file_of(value) -> Path:
    """The path in a path flag, which may be a function of a file: path/to/file.py:name."""
    file, _, _ = str(value).rpartition(":")
    return Path(file if file.endswith(".py") else value)


def forget_example(args):
    """Takes back the example's paths where they do not fit: beside the user's own model, data or reward."""
    given = [word.partition("=")[0].replace("-", "_") for word in sys.argv]
    values = vars(args)
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    has_own = {name for name in INPUTS if values.get(name) != defaults.get(name)}
    forgotten = []
    if has_own & {"model", "dataset"}:
        forgotten = ["dataset", "eval_dataset", "reward_model"]
    elif "reward_function" in has_own:
        forgotten = ["reward_model"]
    for name in forgotten:
        if name in values and f"__{name}" not in given:
            setattr(args, name, None)
    if not args.dataset:
        fail(f"--model {args.model} is your own: give --dataset, too (the example's is for the example's model)")
    own = [name for name in ("dataset", "reward_model", "reward_function") if name in has_own and values[name]]
    own = [name for name in own if not Path(values[name]).absolute().is_relative_to(HERE / "examples")]
    if own and "model" not in has_own and args.model.startswith("examples/"):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in own)
        print(f"note: {flags} your own, but the model is the example's, which only knows short film reviews (--model)")


def parse_args(Args):
    """The command line as an `Args`. `--resume D` takes D/args.json for defaults and refuses a flag that differs."""
    refuse_tasks_without_ranks()
    args = parse_flags(Args)
    if not args.resume:
        forget_example(args)
        make_paths_absolute(args)
        return args
    folder = os.path.abspath(args.resume)
    with fails_with(f"--resume {folder}: no readable args.json there"):
        saved = dict(json.loads(Path(folder, "args.json").read_text(encoding="utf-8")))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if saved.pop("ranks", ranks) != ranks:
        fail(f"--resume {folder}: that run had another number of ranks than {ranks}")
    inputs = saved.pop("inputs", None)
    if inputs is None or saved.keys() != {field.name for field in dataclasses.fields(Args)}:
        fail(f"--resume {folder}: its args.json is of another script or version")
    begun = Args(**saved | dict(resume=folder, output_dir=folder))
    args = parse_flags(Args, default=begun)
    make_paths_absolute(args)
    for name, old in vars(begun).items():
        new = getattr(args, name)
        if new != old and name not in inputs:  # files may have moved: their content decides
            longer = "; to train longer, start a run from its policy" if name == "total_episodes" else ""
            fail(f"--{name.replace('_', '-')} {new} differs from the run in {folder}, which had {old}{longer}")
    check_inputs(folder, vars(args), inputs)
    return args


def parse_flags(Args, **kwargs):
    """The command line. All ranks see the same flags, so rank 0 alone prints what is wrong with them."""
    # The launcher `deepspeed` adds --local_rank to our flags; the environment says the same.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        sys.stdout = open(os.devnull, "w")  # errors of any rank still go to standard error
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output that is not UTF-8 shows ? for signs that it does not have
    with contextlib.redirect_stderr(sys.stderr if is_main else io.StringIO()):
        args = tyro.cli(Args, prog=Path(sys.argv[0]).name, **kwargs)
        check_bounds(args)
    return args


def refuse_tasks_without_ranks():
    """Several tasks of a scheduler that nobody has given ranks would each do the whole run, as if they were alone."""
    if "RANK" in os.environ:  # by torchrun or deepspeed, also where srun has started these
        return
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            program = Path(sys.argv[0]).name
            fail(
                f"{name}={os.environ[name]}, but no launcher has given ranks: start one task a node, and in it "
                f"`torchrun --nproc_per_node GPUS {program} …` (for one process unset {name})"
            )


def start_processes(*, dtype, attention, zero_stage, offload, gradient_checkpointing, lora_rank=0) -> Backend:
    """Joins the process group, also as the only process."""
    if attention == "flash_attention_2" and dtype == "float32":
        fail("--attention flash_attention_2 computes in 16 bits only: add --dtype bfloat16")
    if offload and zero_stage == 0:
        fail("--offload keeps the optimizer state in CPU memory, which needs --zero-stage 1, 2 or 3")
    if lora_rank and (zero_stage == 3 or offload):
        fail("--lora-rank shares weights between models, which --zero-stage 3 and --offload cannot do: leave them out")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it only speeds up CPUs, and compiles for a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Set by torchrun and deepspeed; without a launcher this process is alone, and takes any free port.
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    # Ranks wait for hours, because one may check, score or read a disk for long while the others have nothing to do.
    # A rank that dies is noticed in another way: gloo sees its connection closed, torchrun and deepspeed end the other
    # ranks. Where neither watches, NCCL's own limits are TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC and NCCL_TIMEOUT.
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(hours=6))
    atexit.register(leave_processes)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return Backend(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        dtype=dtype,
        attention=attention,
        zero_stage=zero_stage,
        offload=offload,
        gradient_checkpointing=gradient_checkpointing,
        lora_rank=lora_rank,
    )


def leave_processes():
    """At the end of a process, however it comes: NCCL warns of a group that nobody has destroyed."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_seed(*numbers):
    """Seeds torch, numpy and random from several numbers. Each update seeds its own: no random state is saved."""
    mixed = sum(number * 1_000_003**i for i, number in enumerate(numbers))
    generator = torch.Generator().manual_seed(mixed % 2**63)
    transformers.set_seed(int(torch.randint(2**32, (), generator=generator)))


def plan_updates(total_episodes, batch_size, parts) -> tuple[int, int]:
    """-> (prompts in each of a batch's equal parts, number of updates)."""
    if batch_size % parts:
        fail(f"--batch-size {batch_size} is not divisible by {parts}, the number of ranks (times --num-minibatches)")
    if total_episodes < batch_size:
        fail(f"--total-episodes {total_episodes} is less than one update of --batch-size {batch_size}")
    return batch_size // parts, total_episodes // batch_size


def deal_out(items) -> list:
    """This rank's share. Ranks must take equal steps: if the items do not divide evenly, the first are dealt twice."""
    world_size = dist.get_world_size()
    share = math.ceil(len(items) / world_size)
    return [items[i % len(items)] for i in range(dist.get_rank(), share * world_size, world_size)]


def gather_rows(rows) -> list:
    """All ranks' lists on every rank; dealt-out items return in their order, and those dealt twice stand last again."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for turn in zip(*parts) for row in turn]


def global_means(**tensors) -> dict[str, float]:
    """The mean of each tensor's entries over all ranks, by name."""
    totals = torch.stack([x.sum().double() for x in tensors.values()])
    counts = torch.tensor([x.numel() for x in tensors.values()]).to(totals)
    dist.all_reduce(totals)
    dist.all_reduce(counts)
    return dict(zip(tensors, (totals / counts).tolist()))
