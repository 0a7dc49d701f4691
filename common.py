"""Code that the scripts share. Nothing here knows an algorithm.

About learning: 1 prompts and responses · 2 rollout · 3 log-probabilities, values, scores · 4 rewards · 5 the update ·
6 evaluation. Below the double line is plumbing: 7 models · 8 data · 9 the run · 10 flags and processes.

Names carry their shape: B rows, P prompt tokens (left-padded), T response tokens (right-padded), L = P + T, V
vocabulary, D width, R all rows of a rollout, N any number. Logits at t predict token t + 1. Response masks include the
first EOS.
"""

import ast
import atexit
import collections
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
import inspect
import io
import itertools
import json
import logging
import math
import numbers
import os
import random
import re
import resource
import shlex
import shutil
import signal
import site
import sys
import sysconfig
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
# Torch's threads spin while they wait for each other, by default for milliseconds, and starve other processes on the
# same cores. Beside two of them an update took ten times as long. What a user has set goes first.
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
import tokenizers
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

# What the imports have made stays. Each collection of garbage would look through it, which takes 0.1 to 0.2 seconds.
gc.freeze()


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
    answers: dict[str, str | None] = dataclasses.field(default_factory=dict)  # column -> a response to learn from
    num_cut: int = 0  # ids that it lost at its beginning
    digest: str = ""  # a hash of the prompt and its answers


@dataclasses.dataclass
class Sampling:
    """How a policy answers prompts."""

    max_prompt_length: int
    response_length: int
    temperature: float
    batch_size: int | None  # rows that are decoded at once; `load_policy` replaces None


@dataclasses.dataclass
class Policy:
    """A language model that answers prompts, in training or frozen, and what it needs for that."""

    engine: nn.Module  # gives log-probabilities of responses: TokenLogprobs, in training inside a DeepSpeed engine
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
        indices = range(len(self.texts))[rows] if isinstance(rows, slice) else rows
        return Responses(
            prompts=[self.prompts[i] for i in indices],
            texts=[self.texts[i] for i in indices],
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
    """Pads prompts and the token ids of their responses."""
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
    return (is_eos_BT.cumsum(1) - is_eos_BT == 0).long()  # no EOS stands before the token


def decode(tokenizer, tokens: list[list[int]], dropped_ids=()) -> list[str]:
    """Texts of responses as they stand after a prompt. Some tokenizers drop the space with which a text begins.

    Special tokens are part of the text, except `dropped_ids`. Spaces stay as they are, so that a text gives its ids
    again wherever the tokenizer allows it.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]  # with it in front a text keeps its first space
    rows = [anchor]
    for row in tokens:
        rows.append(anchor + [token for token in row if token not in dropped_ids])
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


def rollout(policy, prompts: list[Prompt], num_samples, greedy) -> Responses:
    """Each prompt's `num_samples` sampled rows, then its demonstration if it has one; all greedy rows come last."""
    prompts_BP, prompt_mask_BP = pad([prompt.ids for prompt in prompts], "left", policy.device)
    rows_per_prompt = num_samples + int(greedy)
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
        if prompt.demonstration:
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

    # Prompts go through the model once. Then the cache repeats a prompt's entries for each of its rows.
    cache = roomy_cache(model.config, room=T)
    inputs = model_inputs(prompts_BP, prompt_mask_BP)
    outputs = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits_NV = outputs.logits[index_R, -1]
    cache.reorder_cache(index_R)
    mask_NL = torch.cat([prompt_mask_BP[index_R], prompt_mask_BP.new_ones(R, T)], 1)
    first_position_N1 = inputs["position_ids"][index_R, -1:] + 1

    eos_E = torch.tensor(eos_ids, device=device)
    tokens_RT = torch.empty(R, T, dtype=torch.long, device=device)
    rows_N = torch.arange(R, device=device)  # the N rows that go through the model
    going_N = torch.ones(R, dtype=torch.bool, device=device)
    for t in range(T):
        if not logits_NV.amax(-1).isfinite().all():
            fail("the policy's logits are not finite: it has diverged; lower --learning-rate", status=1)
        token_N = logits_NV.argmax(-1)  # of the greedy rows, which come last
        token_N[:num_sampled] = sample(logits_NV[:num_sampled].float() / sampling.temperature)
        token_N = torch.where(going_N, token_N, tokens_RT[rows_N, t])  # a row that has ended repeats its EOS
        tokens_RT[rows_N, t:] = token_N[:, None]  # to the end: an ended row has its EOS there already

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
            first_position_N1 = first_position_N1[kept_N]
            cache.reorder_cache(kept_N)
        outputs = model(
            input_ids=token_N[:, None],
            attention_mask=mask_NL[:, : P + t + 1],
            position_ids=first_position_N1 + t,
            past_key_values=cache,
            use_cache=True,
        )
        logits_NV = outputs.logits[:, -1]
    return tokens_RT


def sample(logits_NV):
    """-> tokens_N. One random number picks a point on a row's cumulative distribution.

    (`multinomial` draws a random number for each entry of the vocabulary.)
    """
    cumulative_NV = logits_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
    points_N1 = cumulative_NV[:, -1:] * torch.rand_like(cumulative_NV[:, -1:])
    return torch.searchsorted(cumulative_NV, points_N1, right=True).squeeze(1)


# ---------------------------------------------------------------- 3. Log-probabilities, values, scores
#
# What models compute for given tokens. main() calls the functions; the classes below them are what an engine trains,
# since DeepSpeed needs a module whose forward is the whole computation.


def logprobs(policy, rows: Responses):
    """log π of a micro-batch's response tokens, in nats -> logprobs_BT, float32; mask them before use.

    Every rank must call it, with a micro-batch of its own.
    """
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
    order = []
    parts = []
    for some, _ in micro_batches(rows.mask_BT.sum(1), micro_batch_size):
        order += some
        parts.append(logprobs(policy, rows[some]))
    return torch.cat(parts)[torch.tensor(order).argsort()]  # back in the order of the rows


@torch.no_grad()
def all_values(value, rows: Responses, micro_batch_size):
    """`values` of any number of rows, without gradients -> values_BT."""
    order = []
    parts = []
    for some, _ in micro_batches(rows.mask_BT.sum(1), micro_batch_size):
        order += some
        parts.append(values(value, rows[some]))
    return torch.cat(parts)[torch.tensor(order).argsort()]  # back in the order of the rows


def scores(scorer, ids: list[list[int]], device):
    """What a reward model gives to whole texts -> scores_B, float32: its head at the last token."""
    ids_BL, mask_BL = pad(ids, "right", device)
    last_B1 = mask_BL.sum(1, keepdim=True) - 1  # transformers looks for the last id that is no pad, and may miss EOS
    return scorer(ids_BL, mask_BL, last_B1).squeeze(1)


def joined(rows: Responses):
    """Prompts and responses side by side -> (ids_BL, mask_BL, number of response tokens in a row).

    The width is that of the longest response over all ranks. With equal widths all ranks call the head equally often,
    and under ZeRO-3 each call gathers weights from all of them.
    """
    longest = rows.mask_BT.sum(1).max()
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    num_tokens = int(longest)
    tokens_BT = F.pad(rows.tokens_BT, (0, num_tokens - rows.tokens_BT.shape[1]))  # a negative padding cuts
    ids_BL = torch.cat([rows.prompts_BP, tokens_BT], 1)
    # What follows EOS counts as text here: the loss masks it, and no token before sees it.
    mask_BL = torch.cat([rows.prompt_mask_BP, torch.ones_like(tokens_BT)], 1)
    return ids_BL, mask_BL, num_tokens


def model_inputs(ids_BL, mask_BL) -> dict:
    """What every forward needs. Learned position embeddings must not count padding."""
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    return dict(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_BL)


class TokenLogprobs(nn.Module):
    """A causal language model whose output is the log-probabilities of response tokens: policy and reference alike.

    Backbone and head are called apart, so that the logits of all tokens are never in memory at once.
    """

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
        outputs = self.model.base_model(**model_inputs(ids_BL, mask_BL), use_cache=False)
        # Logits at t predict token t + 1.
        hidden_ND = outputs.last_hidden_state[:, -num_tokens - 1 : -1].flatten(0, 1)
        tokens_N = ids_BL[:, -num_tokens:].flatten()
        head = self.model.get_output_embeddings()

        def chunk_logprobs(hidden_ND, tokens_N):
            logits_NV = head(hidden_ND).float()
            if self.softcap:
                logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
            return -F.cross_entropy(logits_NV / self.divisor, tokens_N, reduction="none")

        # The vocabulary dwarfs all else, so a chunk has at most 2^25 logits (128 MiB). Backward computes chunks again.
        size = max(1, 2**25 // self.model.config.get_text_config().vocab_size)
        chunks = list(zip(hidden_ND.split(size), tokens_N.split(size)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            parts = [checkpoint(chunk_logprobs, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [chunk_logprobs(*chunk) for chunk in chunks]
        return torch.cat(parts).view(-1, num_tokens)


class ScalarOutputs(nn.Module):
    """A sequence classification model whose output is numbers, read where it is asked: rewards, or values of states."""

    def __init__(self, model, zero=0.0):
        super().__init__()
        self.model = model.train()
        self.zero = zero  # is taken from every output; reward units

    def forward(self, ids_BL, mask_BL, read_BK):
        """-> outputs_BK, float32. read_BK: the K positions of each row to read at."""
        outputs = self.model.base_model(**model_inputs(ids_BL, mask_BL), use_cache=False)
        rows_B1 = torch.arange(len(ids_BL), device=ids_BL.device)[:, None]
        return self.model.score(outputs.last_hidden_state[rows_B1, read_BK]) - self.zero


# ---------------------------------------------------------------- 4. Rewards
#
# A reward is a number for a text. So a reward model may have any tokenizer, and a Python function may take its place.


class Reward:
    """Rewards of responses, by a reward model or a Python function; a response without EOS pays a penalty.

    `model`: a folder or hub name. `function`: file.py:name, which takes its place. `prompt`: one that the function is
    tried on. `micro_batch_size`: rows that a reward model reads at once. Without `stays_loaded` the model is loaded for
    each scoring and freed after it.
    """

    def __init__(
        self,
        model=None,
        function=None,
        missing_eos_penalty=0.0,
        backend=None,
        prompt: Prompt | None = None,
        micro_batch_size=1,
        stays_loaded=True,
    ):
        if not model and not function:
            fail("--reward-model or --reward-function: give one; the example's is for its own model and data")
        self.name = function or model
        self.has_cut = False
        self.missing_eos_penalty = missing_eos_penalty
        self.micro_batch_size = micro_batch_size
        self.backend = backend
        self.function = load_function(function) if function else None
        if not function:
            scorer, self.tokenizer = self.load_scorer()  # a model that cannot be used shows now, not after a rollout
            self.scorer = scorer if stays_loaded else None
        elif prompt:
            # An error in the function shows now, too. Its number is not checked: one that normalises its batch may give
            # NaN for a single row.
            call_function(self.function, self.name, [prompt], [""])

    def load_scorer(self):
        classifier, tokenizer = load_classifier(self.name, self.backend)
        zero = getattr(classifier.config, "reward_mean", 0.0)
        return freeze(ScalarOutputs(classifier, zero), self.backend), tokenizer

    def __call__(self, responses: Responses):
        """-> rewards_B, float32."""
        rewards_B = self.score(responses.prompts, responses.texts).to(responses.ended_B.device)
        rewards_B[~responses.ended_B] -= self.missing_eos_penalty
        return rewards_B

    def score(self, prompts: list[Prompt], texts: list[str]):
        """-> scores_B, float32: one finite number per response, without the penalty."""
        if self.function:
            scores_B = call_function(self.function, self.name, prompts, texts)
        else:
            scores_B = self.model_scores(prompts, texts)
        usable_B = scores_B.abs() < torch.finfo(torch.float32).max  # false for NaN, too
        if not usable_B.all():
            first = int(usable_B.int().argmin())
            fail(f"{self.name} returned {scores_B[first].item()} for the response {texts[first]!r}", status=1)
        return scores_B.float()

    @torch.no_grad()
    def model_scores(self, prompts: list[Prompt], texts: list[str]):
        """-> scores_B, float32."""
        scorer = self.scorer or self.load_scorer()[0]
        length = self.tokenizer.num_positions
        ids = [reward_model_ids(self.tokenizer, prompt, text, sys.maxsize) for prompt, text in zip(prompts, texts)]
        if max(map(len, ids)) > length and not self.has_cut:
            self.has_cut = True
            tqdm.write(f"note: {self.name} reads {length} tokens; longer texts lose their beginning")
        ids = [cut_left(row, length, self.tokenizer.bos_token_id) for row in ids]
        lengths_B = torch.tensor([len(row) for row in ids])
        scores_B = torch.empty(len(ids), dtype=torch.float32, device=self.backend.device)
        for rows, _ in micro_batches(lengths_B, self.micro_batch_size):
            scores_B[rows] = scores(scorer, [ids[i] for i in rows], self.backend.device)
        return scores_B


# ---------------------------------------------------------------- 5. The update
#
# An optimizer step may have several micro-batches, which save memory and change results by rounding alone: a loss is a
# sum over rows, divided by a denominator that all micro-batches share, and their gradients add up.


def micro_batches(lengths_B, size):
    """Rows of about equal length together, to save padding -> (row numbers, whether it is the last micro-batch)."""
    # The longest come first, so that running out of memory shows at once.
    order = lengths_B.argsort(descending=True, stable=True).tolist()
    for start in range(0, len(order), size):
        yield order[start : start + size], start + size >= len(order)


def train_engine(module, backend, max_grad_norm):
    """A DeepSpeed engine that trains `module` by AdamW on float32 (master) weights."""
    dist.barrier()  # fails at once where a rank has ended; the engine's new group would wait for it, for hours
    prepare_training(module, backend)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=0.0,  # optimizer_step sets the rate
        betas=(0.9, 0.95),
        eps=1e-5,  # a smaller one lets the rounding differences between ranks and micro-batches grow
        weight_decay=0.0,
        fused=True,
    )
    config = deepspeed_config(backend, max_grad_norm)
    with contextlib.redirect_stdout(io.StringIO()):  # ZeRO-1 prints its memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if backend.zero_stage == 0 and backend.world_size == 1:  # one rank need not copy gradients to average them
        engine.enable_backward_allreduce = False
    reset_optimizer(engine)  # bfloat16 ZeRO-0 begins with a step on zeros, which would spoil Adam's bias correction
    return engine


def backward(engine, loss, is_last):
    """Adds the gradients of a micro-batch; after the last one the engine averages their sum over the ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    # A loss that is not finite may have finite gradients. Times NaN they are NaN, and the step is skipped.
    factor = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
    engine.backward(loss * factor, scale_wrt_gas=False)


def optimizer_step(engine, learning_rate) -> tuple[float, int]:
    """Clips and steps -> (gradient norm before clipping, number of steps so far whose norm was not finite: skipped)."""
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
    warmup = math.ceil(warmup_ratio * num_steps - 1e-9)  # 0.07 * 100 is 7.000000000000001
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / (num_steps - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * (0.5 + 0.5 * math.cos(math.pi * done))
    return peak


def reset_optimizer(engine):
    """Resets Adam's moments and step count, and frees frozen models that are no longer used."""
    gc.collect()  # modules refer to each other in circles
    for state in engine.basic_optimizer.state.values():
        for value in state.values():
            value.zero_()


# ---------------------------------------------------------------- 6. Evaluation
#
# Greedy responses to held-out prompts: of the policy, beside those of the initial one.


def evaluate(policy, reference, prompts: list[Prompt], rewards, micro_batch_size) -> list[dict]:
    """Greedy responses to held-out prompts -> a dict each, on every rank. `rewards`: {name: function of responses}."""
    share = deal_out(prompts)
    responses = rollout(policy, share, num_samples=0, greedy=True)
    num_demonstrations = len(responses.texts) - len(share)  # they come before the greedy rows
    if num_demonstrations not in (0, len(share)):
        raise ValueError(f"{num_demonstrations} of {len(share)} prompts have a demonstration; expected all or none")
    greedy = responses[num_demonstrations:]
    logprobs_RT = all_logprobs(policy, responses, micro_batch_size)
    ref_logprobs_BT = all_logprobs(reference, greedy, micro_batch_size)
    columns = dict(
        log_ratio=((logprobs_RT[num_demonstrations:] - ref_logprobs_BT) * greedy.mask_BT).sum(1),
        response_length=greedy.mask_BT.sum(1),
    )
    if num_demonstrations > 0:
        means_R = (logprobs_RT * responses.mask_BT).sum(1) / responses.mask_BT.sum(1)
        columns["loss"] = -means_R[:num_demonstrations]  # nats per token of the demonstrations
    for name, reward in rewards.items():
        rewards_R = reward(responses)
        columns[name] = rewards_R[num_demonstrations:]
        if num_demonstrations > 0:
            columns[f"demonstration_{name}"] = rewards_R[:num_demonstrations]
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
    """How often a row's reward is the greater one; a tie counts ½."""
    wins = 0.0
    for row, reward in zip(rows, rewards):
        if row["reward"] > reward:
            wins += 1.0
        elif row["reward"] == reward:
            wins += 0.5
    return wins / len(rows)


# ================================================================ Below is plumbing.


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

    def unsharded(self) -> "Backend":
        """For models that come and go: DeepSpeed never frees one that it has sharded."""
        return dataclasses.replace(self, zero_stage=0, offload=False)


# Loading


def load_tokenizer(path):
    """The tokenizer, which also learns what else its model says about texts: their limits and what ends them."""
    if Path(path, "adapter_config.json").is_file():
        merge = "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        fail(f"{path}: holds adapters (LoRA); merge them into their model first: {merge}")
    absent = f"no folder {path} here, and no hub model of that name could be reached"
    with fails_with(f"{path}: no tokenizer could be loaded" if Path(path).is_dir() else absent):
        whole_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        config = whole_config.get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        try:
            generation = transformers.GenerationConfig.from_pretrained(path)
        except OSError:  # there is none, and transformers makes one
            if Path(path, "generation_config.json").exists():
                raise
            generation = transformers.GenerationConfig.from_model_config(whole_config)
    if getattr(whole_config, "quantization_config", None):
        fail(f"{path}: its weights are quantised and cannot be trained: give the model without quantisation")
    if not 0 < tokenizer.vocab_size <= config.vocab_size:  # 0 where the tokenizer's files are missing
        fail(f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, but the model {config.vocab_size:,}")
    tokenizer.num_embeddings = config.vocab_size  # added tokens may lie beyond them: `encode` looks
    tokenizer.num_positions = num_positions(config)
    eos_ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    tokenizer.eos_ids = sorted({*eos_ids, tokenizer.eos_token_id} - {None})
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= tokenizer.num_embeddings:
        fail(f"{path}: has no embedding of {tokenizer.eos_token!r}, its EOS: resize the model's embeddings")
    ids = tokenizer(A_TEXT, add_special_tokens=False)["input_ids"]
    note_another_reading(path, type(tokenizer).__name__, tuple(ids))
    return tokenizer


A_TEXT = "The film of 1995 isn't bad:\n  Zoë, 7/10  (DVD)"


@functools.cache  # spr.py loads its reward model's again and again
def note_another_reading(path, name, ids: tuple[int]):
    """For some types of models transformers builds a tokenizer of its own from a file that says something else."""
    file = Path(path, "tokenizer.json")
    if not file.is_file():  # a hub name, or a tokenizer of another kind
        return
    as_saved = tokenizers.Tokenizer.from_file(str(file))
    as_saved.no_truncation()
    as_saved.no_padding()
    if as_saved.encode(A_TEXT, add_special_tokens=False).ids != list(ids):
        print(
            f"note: {path}: transformers' {name} splits texts in another way than the folder's tokenizer.json; "
            "if the model was trained with that file, its tokenizer class is the wrong one"
        )


HEADS = ("score.", "classifier.", "reward_head.", "value_head.", "v_head.")  # how reward models' files name them


def load_model(path, auto_class, max_length, backend, new_head=False, **kwargs):
    """A model from safetensors, without noise, that takes texts of `max_length` tokens.

    `new_head`: a model without a head `score` gets one of zeros; one that is there is kept.
    """
    with fails_with(f"{path}: no model could be loaded"):
        model, info = auto_class.from_pretrained(
            path,
            dtype=getattr(torch, backend.dtype),
            attn_implementation=backend.attention,
            use_safetensors=True,  # a pickle could run any code
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # transformers then lists them, and we can say which
            output_loading_info=True,
            **kwargs,
        )
    check_head(path, auto_class, info)
    missing = set(info["missing_keys"])
    if new_head and "score.weight" in missing:
        missing.remove("score.weight")
        print(f"{path}: has no head `score`, so it gets a new one")
        nn.init.zeros_(model.score.weight)
    if missing:
        names = ", ".join(sorted(missing)[:3])
        fail(f"{path}: has no weights for {names}, so it is not saved for {auto_class.__name__}")
    positions = num_positions(model.config.get_text_config())
    if max_length > positions:
        fail(f"--max-prompt-length + --response-length, {max_length}, is more than the {positions} positions of {path}")
    remove_noise(model)
    return model


def num_positions(config) -> int:
    """The number of tokens that a text may have."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # after these positions the keys would depend on the longest row
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def remove_noise(model):
    """Dropout and router jitter would make the policy that learns another than the one that has sampled.

    They are switched off in the modules: the fields of configs differ from one architecture to the next.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


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
    if not tokenizer.eos_ids:
        fail(f"{model.name_or_path}: neither generation_config nor tokenizer names an EOS token")
    return Policy(
        engine=TokenLogprobs(model, sampling.temperature),
        decoder=same_weights(model),
        tokenizer=tokenizer,
        eos_ids=tokenizer.eos_ids,
        sampling=sampling,
        device=device,
    )


def load_policy(path, tokenizer, sampling: Sampling, backend) -> Policy:
    """A causal language model, checked to be one that we can train."""
    model = with_adapters(load_language_model(path, sampling, backend), backend.lora_rank)
    policy = new_policy(model, tokenizer, sampling, backend.device)
    with fails_with(f"{path}: a {type(model).__name__} is not supported"), eager_attention(model):
        check_policy(policy)
        token_bytes = cache_bytes_per_token(model)
    policy.sampling = with_rollout_batch(sampling, token_bytes, backend)
    return policy


def load_reference(policy: Policy, backend) -> Policy:
    """The policy as it was before training, frozen. `load_policy` has checked its model."""
    if not any(parameter.requires_grad for parameter in policy.engine.parameters()):
        return policy  # it is one itself
    if backend.lora_rank:
        model = without_adapters(policy.decoder)  # no second copy: its weights are the policy's own
    else:
        model = load_language_model(policy.decoder.name_or_path, policy.sampling, backend)
    reference = new_policy(model, policy.tokenizer, policy.sampling, policy.device)
    reference.engine = freeze(reference.engine, backend)
    return reference


def same_weights(model):
    """A second module around the same weights, to decode: without training mode, checkpointing or ZeRO-3's hooks."""
    shared = {}
    for thing in (*model.parameters(), *model.buffers(), model.config):
        shared[id(thing)] = thing  # deepcopy takes what it finds here as already copied
    return copy.deepcopy(model, shared).eval()


# DeepSpeed
#
# In training a model is inside a DeepSpeed engine. A frozen one is, too, where it is sharded or in CPU memory.


def prepare_training(module, backend):
    """What a module needs before it becomes an engine."""
    limit_threads(module)
    if backend.offload:
        tell_offload(module, backend)
    if backend.gradient_checkpointing:
        module.model.activation_checkpointing_enable()
    module.register_state_dict_post_hook(drop_frozen)  # of what a checkpoint holds


def deepspeed_config(backend, max_grad_norm) -> dict:
    zero = dict(stage=backend.zero_stage)
    if backend.offload:
        zero["offload_optimizer"] = dict(device="cpu", pin_memory=backend.device.type == "cuda")
    # In bfloat16 the sum of many micro-batches' gradients would be rounded at each of them. ZeRO-0 cannot avoid that.
    adds_in_float32 = backend.dtype == "bfloat16" and backend.zero_stage > 0
    return dict(
        train_micro_batch_size_per_gpu=1,  # DeepSpeed only reports it
        gradient_accumulation_steps=2,  # any but 1, which is wrong at ZeRO-1 and 2: `backward` marks the boundaries
        gradient_clipping=max_grad_norm,
        bf16=dict(enabled=backend.dtype == "bfloat16"),
        data_types=dict(grad_accum_dtype="fp32" if adds_in_float32 else None),
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )


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


@contextlib.contextmanager
def gathered(engine) -> Iterator[None]:
    """Inside the block every rank has all of the weights. Only ZeRO-3 shards them."""
    sharded = [weight for weight in engine.parameters() if hasattr(weight, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def limit_threads(module):
    """A small model gains nothing from many threads: at each operation they wait for the slowest of them."""
    if "OMP_NUM_THREADS" not in os.environ:  # of a user or a launcher
        parameters = sum(p.numel() for p in module.parameters())
        torch.set_num_threads(min(torch.get_num_threads(), max(4, parameters // 1_000_000)))


def tell_offload(module, backend):
    # Measured: float32 weights, Adam's two moments and gradients (16), and two copies in the model's type (4).
    num_bytes = 20 * sum(weight.numel() for weight in module.parameters())
    pinned = "; pinned memory grows in powers of two" if backend.device.type == "cuda" else ""
    print(f"Offload: a trained model takes {gib(num_bytes)} of CPU memory, over all ranks{pinned}")


def drop_frozen(module, weights, prefix, _):
    """Takes frozen weights out of a state_dict; DeepSpeed would keep the second name of a tied one."""
    for name, weight in module.named_parameters(prefix=prefix.removesuffix("."), remove_duplicate=False):
        if not weight.requires_grad:
            weights.pop(name, None)


# Reward models and value models


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


class ScalarHead(nn.Module):
    """A linear head with one output, computed in float32: in bfloat16 a score of 5 has steps of 1/32."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight  # (1, D), under the name that it has in the model's files

    def forward(self, hidden_BKD):
        return F.linear(hidden_BKD.float(), self.weight.float()).squeeze(-1)


def load_value_model(reward_model_path, policy_path, sampling: Sampling, backend) -> ScalarOutputs:
    """Starts from a reward model that has the policy's tokenizer, else from the policy with a head of zeros."""
    path = policy_path
    if reward_model_path:
        ours = load_tokenizer(policy_path)
        its = load_tokenizer(reward_model_path)
        if (ours.get_vocab(), ours.chat_template) == (its.get_vocab(), its.chat_template):
            path = reward_model_path
    max_length = sampling.max_prompt_length + sampling.response_length
    model, _ = load_classifier(path, backend, max_length=max_length, new_head=path == policy_path)
    zero = getattr(model.config, "reward_mean", 0.0)
    return ScalarOutputs(with_adapters(model, backend.lora_rank), zero)


# The check before training
#
# Architectures differ in ways that nobody can list. So a model is compared with itself: the log-probabilities that we
# train must be those of its plain forward, and so must those of the tokens that we decode.


@torch.no_grad()
def check_policy(policy: Policy):
    """Raises ValueError where a model would be trained on other log-probabilities than those of its plain forward.

    It runs on the CPU, on a short text: left-padded, in training mode, and decoded with a cache.
    """
    # On one thread 124 million weights take 0.7 to 0.9 seconds (float32 or bfloat16, with AVX-512), so 7 billion take
    # about 45. Without AVX-512's bfloat16 they take a minute or more. A run does it once.
    model = policy.decoder
    if model.config.model_type == "phimoe":
        raise ValueError("its router is sampled in training and reads its jitter everywhere")
    if policy.engine.model.base_model is policy.engine.model:
        raise ValueError("it has no backbone below its head")
    text_BL = torch.tensor([[0, 1]])
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


@contextlib.contextmanager
def eager_attention(model) -> Iterator[None]:
    """Inside the block the model computes on the CPU, where flash attention does not run."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(usual)


# The cache of decoding
#
# transformers copies the whole cache at each new token. Ours has room for the whole response from the start.


DEFAULT_CACHE_BYTES = 16 * 2**30


def with_rollout_batch(sampling: Sampling, token_bytes, backend) -> Sampling:
    """With a number of rows whose cache has room; `token_bytes`: what one token of one row takes."""
    row_bytes = token_bytes * (sampling.max_prompt_length + sampling.response_length)
    num_rows = sampling.batch_size
    if num_rows is None:
        num_rows = max(1, min(128, DEFAULT_CACHE_BYTES // max(1, row_bytes)))
    cache_bytes = num_rows * row_bytes
    print(f"Rollout: {num_rows} rows at once, whose cache takes up to {gib(cache_bytes)}")
    if backend.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        if cache_bytes > free_bytes:
            fail(
                f"--rollout-batch-size {num_rows}: a cache of {gib(cache_bytes)} does not fit "
                f"into the {gib(free_bytes)} that are free on the GPU; lower it or --response-length",
                status=1,  # other ranks may have room
            )
    return dataclasses.replace(sampling, batch_size=num_rows)


def gib(num_bytes) -> str:
    size = num_bytes / 2**30
    return f"{size:,.0f} GiB" if size >= 10 else f"{size:.2g} GiB"


@torch.no_grad()
def cache_bytes_per_token(model) -> int:
    """What a row's cache grows by with each token, measured; layers with a window are counted as if they had none."""
    cache = transformers.DynamicCache(config=model.config)
    model(torch.tensor([[0, 1]]), past_key_values=cache, use_cache=True)
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


# Adapters
#
# Policy and reference share one set of frozen weights: the reference is the same modules without their adapters.


def with_adapters(model, rank):
    """A second module around the same weights, all frozen; each linear layer adds a trained B·A of this rank.

    (LoRA, arXiv 2106.09685, eq. 3.) B begins at 0, so the model begins unchanged. A scalar head is trained whole.
    """
    if rank == 0:
        return model
    import peft  # only needed here

    width = model.get_input_embeddings().embedding_dim
    if rank > width:
        cheaper = "training all weights costs less"
        fail(f"--lora-rank {rank} is more than the width of {model.name_or_path}, {width}: {cheaper}")
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that GPT-2's matrices lie transposed, and sees to it
        # Not PeftModel, which would hide base_model. Where peft sees a model's config it wraps some models' experts,
        # in another way than linear layers; the container has none.
        peft.inject_adapter_in_model(config, nn.Sequential(adapted))
    adapted.peft_config = dict(default=config)
    if hasattr(adapted, "score"):
        adapted.score.requires_grad_(True)
    tell_adapters(model, adapted, rank)
    return adapted


def tell_adapters(model, adapted, rank):
    """The share of weights that is trained, and the kinds of layers that are not."""
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    print(f"Adapters of rank {rank}: {trained:,} weights are trained, {trained / total:.2%} of the model's")
    without = set()
    for layer in adapted.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):  # a base layer, a part of an adapter, a head or a table
            continue
        if any(weight.dim() > 1 and not weight.requires_grad for weight in layer.parameters(recurse=False)):
            without.add(type(layer).__name__)
    without -= {"Conv1D"}  # GPT-2's linear layer
    if without:
        print(f"warning: these layers get no adapter and are not trained: {', '.join(sorted(without))}")


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
    shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")  # others may read it, too


# Saving
#
# A run of days must not end in a folder that nobody can load, so what was saved is read again and compared.


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
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            if hasattr(model, "peft_config"):
                with writing(folder.parent):
                    save_adapter(model, folder.with_name("adapter"))
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


# A user's reward function
#
# It is the only code that comes from a path. It may do anything, except change the training by accident.


@functools.cache  # read once, also where two flags name the file
def load_function(spec):
    """`path/to/file.py:name` -> the function. No other code is ever loaded from a path."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{spec}: no such reward function; expected an existing file and a name, as in path/to/file.py:name")
    refuse_another_neighbour(Path(path).resolve())
    with users_code(spec):
        module = load_module(Path(path).resolve())
    function = getattr(module, name, None)
    if not callable(function):
        fail(f"{spec}: the file has no function {name!r}")
    with contextlib.suppress(TypeError, ValueError):  # some callables do not tell their arguments
        names = list(inspect.signature(function, follow_wrapped=False).parameters)
        is_reversed = names[:1] and names[0].rstrip("s") in ("response", "completion", "output", "answer")
        if is_reversed or names[1:2] in (["prompt"], ["prompts"]):
            fail(f"{spec}: takes ({', '.join(names)}), but it is called as {name}(prompts, responses, **columns)")
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
        # Not from bytecode: that of a file of the same second and size may be older.
        exec(compile(path.read_bytes(), path, "exec"), vars(sys.modules[name]))
    return sys.modules[name]


def refuse_another_neighbour(path: Path):
    """Ends the run if the file imports one beside it, but would get a file of that name from another folder."""
    installed = [sysconfig.get_path("stdlib"), site.getusersitepackages(), *site.getsitepackages()]
    for name, files in imported_neighbours(path).items():
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.has_location or any(Path(spec.origin).is_relative_to(each) for each in installed):
            continue
        if Path(spec.origin).resolve() != files[0].resolve():
            fail(f"{path}: imports {name}, but would get {spec.origin}: rename one of the two")


def imported_neighbours(path: Path) -> dict[str, list[Path]]:
    """-> {name: files} of what a Python file imports from its own folder, also through another of these.

    A module has one file; a package with an `__init__.py` begins with that.
    """
    path = path.resolve()
    found = {}
    files = [path]
    for file in files:
        names = []
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # which the import will tell
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Import):
                    names += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names.append(node.module)
        for name in names:
            name = name.partition(".")[0]
            package = path.with_name(name) / "__init__.py"
            module = path.with_name(f"{name}.py")
            if name in found:
                continue
            if package.is_file():
                found[name] = [package, *sorted(package.parent.rglob("*.py"))]
                files.append(package)
            elif module.is_file():
                found[name] = [module]
                files.append(module)
    return found


@contextlib.contextmanager
def users_code(spec, note="") -> Iterator[None]:
    """Runs the user's code. What it sets in torch and the random numbers that it draws do not reach the training.

    An error in it ends the run: the traceback as Python prints it, then one line.
    """
    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    gradients = torch.is_grad_enabled()
    precision = torch.get_float32_matmul_precision()
    num_threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
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
            torch.set_float32_matmul_precision(precision)
            if torch.are_deterministic_algorithms_enabled() != deterministic:
                torch.use_deterministic_algorithms(deterministic)
            if torch.get_num_threads() != num_threads:
                torch.set_num_threads(num_threads)
            if torch.get_default_device() != device:
                torch.set_default_device(device)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def call_function(function, name, prompts: list[Prompt], texts: list[str]):
    """-> scores_B, float64, so that a number that float32 does not have can be told.

    The function gets copies of everything: what it changes stays with it.
    """
    columns = function_columns(prompts)
    with users_code(name, f" (columns: {', '.join(columns) or 'none'})"):
        found = function([prompt.text for prompt in prompts], list(texts), **columns)
        if isinstance(found, Iterator):  # such as a generator, which runs only now
            found = list(found)
    try:
        scores = as_floats(found)
    except OverflowError:
        fail(f"{name} returned a whole number that is too large for a float", status=1)
    except (TypeError, ValueError, RuntimeError):
        words = " ".join(str(found).split())[:80]  # one line; tensors print several
        fail(f"{name} returned {words}; expected a number for each response", status=1)
    if len(scores) != len(prompts):
        fail(f"{name} returned {len(scores)} rewards for {len(prompts)} responses", status=1)
    return torch.tensor(scores, dtype=torch.float64)


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
    if isinstance(found, str | bytes | bytearray | memoryview | Mapping | Set):
        raise TypeError  # a dict's keys are no scores, a set has no order
    floats = []
    for score in found:
        if score is np.ma.masked or isinstance(score, np.timedelta64 | np.datetime64):
            raise TypeError  # one has no value, the others would become nanoseconds
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
# A prompt is a text or chat messages, and so is an answer (chosen, rejected, completion). `read_row` tells the
# forms of a row apart by their shape and checks what it assumes; the data's line says which forms it found:
#
#   prompt     answers                    read as
#   text       texts                      they are
#   text       whole conversations        the conversation is the prompt; the text must be a user's message of it
#   messages   texts or messages          the last message is the answer; earlier ones must be the prompt's
#   the same column                       the last message is the answer, the earlier ones are the prompt
#   no column  two conversations          the earlier messages, which must be the same, are the prompt
#   no column  two texts                  their common beginning, up to its last white space, is the prompt
#                                         (up to "Assistant:", where one is empty)


FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "document")
# How a list of chat messages begins as a text, whether it is JSON or Python's own form, which pandas writes.
LIKE_MESSAGES = re.compile(r"\s*\[\s*\{(?=.*['\"]role['\"]\s*:)(?=.*['\"]content['\"]\s*:)", re.DOTALL)


@dataclasses.dataclass
class Layout:
    """What `load_prompts` reads of a data set."""

    config: str | None = None  # of a folder or hub data set
    split: str = "train"  # of a folder or hub data set
    prompt_column: str = "prompt"
    answer_columns: typing.Sequence[str] = ()  # a row may lack a single answer, but not one of two


def load_rows(path, config=None, split="train") -> list[tuple[str, dict]]:
    """Rows of a file (FILES, also with .gz, or .parquet), a folder or a hub data set -> [(where it stands, row)]."""
    suffix = data_suffix(path)
    if Path(path).is_dir() and suffix not in FILES:
        rows = read_folder(path, config, split)
    elif suffix in (*FILES, ".parquet"):
        rows = read_file(path)
    elif Path(path).is_file():
        fail(f"{path}: not a {', '.join(FILES)} file (each may be packed as .gz), nor a .parquet file")
    else:
        rows = read_hub(path, config, split)
    if not rows:
        fail(f"{path}: no rows")
    return rows


def data_suffix(path) -> str:
    return Path(path.lower().removesuffix(".gz")).suffix


def read_folder(path, config, split) -> list[tuple[str, dict]]:
    """`datasets` finds the files of the splits. They are read as if each were named, since `datasets` would turn dates
    into times and 007 into 7.
    """
    datasets = datasets_library()
    if re.search(r"[*?[]", path):
        fail(f"{path}: `datasets` takes * ? [ in a folder's name for a pattern: rename the folder")
    with fails_with(path):
        settings = datasets.load_dataset_builder(path, config).config
    splits = {str(name): files for name, files in (settings.data_files or {}).items()}
    suffixes = {data_suffix(file) for files in splits.values() for file in files}
    if not suffixes or not suffixes <= {*FILES, ".parquet"}:
        return read_hub(path, config, split)
    refuse_settings(path, settings, suffixes)
    rows = {}
    for name, files in splits.items():
        rows[name] = []
        if not re.search(rf"\b{re.escape(name)}\b", split):  # it may be train[:1000], or train+test
            continue
        print(f"{os.path.relpath(path)}, split {name!r}: {names_in(path, files)}")
        for file in files:
            rows[name] += read_file(file)
    with fails_with(path):
        sizes = {name: len(of_split) for name, of_split in rows.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def refuse_settings(path, settings, suffixes: set[str]):
    """A folder's README.md may say how its files are read, such as without a header. We do not read it."""
    known = ["name", "version", "data_dir", "data_files", "description", "features"]
    if suffixes == {".tsv"}:
        known.append("sep")  # which `datasets` sets itself
    told = []
    for field in dataclasses.fields(settings):
        if field.name not in known and getattr(settings, field.name) != field.default:
            told.append(field.name)
    if told:
        fail(f"{path}: its README.md sets {', '.join(told)}, which is not read: name a file, not the folder")


def names_in(folder, files) -> str:
    """The names of a folder's files, three at most."""
    names = [os.path.relpath(file, folder) for file in files]
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + others


def read_parquet(path) -> list[tuple[str, dict]]:
    import pyarrow.parquet

    # `from_parquet` takes a name for a pattern, and a file of the same time for the one in its cache.
    with fails_with(path), open(path, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file).read()
        return table_rows(path, datasets_library().Dataset(table, fingerprint="unused"))


def read_hub(path, config, split) -> list[tuple[str, dict]]:
    with fails_with(path):
        return table_rows(path, datasets_library().load_dataset(path, config, split=split))


def datasets_library():
    """`datasets`, which stays silent. It is slow to import, and only needed here."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def table_rows(path, table) -> list[tuple[str, dict]]:
    if len(table) == 0:
        return []
    table = table.to_iterable_dataset().cast(undecoded(table.features))
    return [(f"{path}: row {number}", row) for number, row in enumerate(table, start=1)]


def undecoded(feature):
    """The features of a data set, in which images, audio and such stay bytes: one that nobody reads may be broken."""
    import datasets

    if getattr(feature, "decode", None) is True and not isinstance(feature, datasets.Json):
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=undecoded(feature.feature))
    if isinstance(feature, dict):
        return type(feature)({name: undecoded(inner) for name, inner in feature.items()})
    return feature


def read_file(path) -> list[tuple[str, dict]]:
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return read_parquet(path)
    # Our own reading, since `datasets` does not know the line of an error, and parses dates.
    with fails_with(path):
        data = Path(path).read_bytes()
        if path.lower().endswith(".gz"):
            data = gzip.decompress(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1  # without a byte order mark
        fail(f"{path}:{line}: not UTF-8: convert the file to UTF-8")
    if suffix in (".csv", ".tsv"):
        return list(read_csv(path, text, delimiter="\t" if suffix == ".tsv" else ","))
    return list(read_json(path, text, has_lines=suffix != ".json" or has_objects_in_lines(text)))


def has_objects_in_lines(text) -> bool:
    """Whether a .json file is one of JSON lines, as some data sets name them."""
    first, _, rest = text.strip().partition("\n")
    return first[:1] == "{" and first.rstrip()[-1:] == "}" and rest.lstrip()[:1] == "{"


def read_json(path, text, has_lines) -> Iterator[tuple[str, dict]]:
    with fails_with(path):
        lines = text.split("\n") if has_lines else json_rows(path, json.loads(text))
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}" if has_lines else f"{path}: row {number}"
            with fails_with(where):
                row = json.loads(line)
            with fails_with(f"{where}: a text holds half a character (a lone surrogate)"):
                json.dumps(row, ensure_ascii=False).encode()
            if not isinstance(row, dict):
                fail(f"{where}: a {type(row).__name__}; expected a JSON object")
            yield where, row


def json_rows(path, value) -> list[str]:
    """The rows of a .json file as lines."""
    if not isinstance(value, list):
        fail(f"{path}: a {type(value).__name__}; expected a list of JSON objects")
    return [json.dumps(row) for row in value]


def read_csv(path, text, delimiter) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            fail(f"{path}:1: two columns have the same name")
        for row in reader:
            if None in row or None in row.values():
                fail(f"{path}:{reader.line_num}: not {len(reader.fieldnames)} columns, as in the first line")
            if delimiter == "\t" and any(holds_rows(value, len(names)) for value in row.values()):
                fail(f"{path}:{reader.line_num}: a quotation mark before this line swallows whole lines: double it")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:  # such as a quote that is never closed, which would swallow the rest of the file
        fail(f"{path}:{reader.line_num + 1}: {error}")


def holds_rows(text, num_columns) -> bool:
    """Whether a quoted field holds lines of the table itself: some programs write tsv without quoting."""
    lines = text.split("\n")[1:]
    whole = lines[:-1] or lines  # the last one ends where the next quotation mark stands
    if num_columns == 1 or not lines:
        return False
    return all(line.count("\t") == num_columns - 1 and not line[:1].isspace() for line in whole)


def read_value(row, column, where) -> str | list[dict]:
    """A text or chat messages. csv files hold messages as a text of JSON."""
    if column not in row:
        names = ", ".join(map(str, row)) or "no others"
        fail(f"{where}: no column {column!r}; there are: {names} (the flags in -column name them)")
    value = row[column]
    if isinstance(value, str) and LIKE_MESSAGES.match(value):  # as a text it would teach the brackets
        with fails_with(f"{where}: {column!r} holds chat messages, but not as JSON: write the column with json.dumps"):
            value = json.loads(value)
    if isinstance(value, str):
        if is_another_chat(value):
            fail(f"{where}: {column!r} holds a chat as JSON: write it as a list of {{role, content}} messages")
        return value
    messages = value if isinstance(value, list) and value else [None]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            found = f"is {str(value)[:40]}" if message is None else f"holds {str(message)[:60]}"
            fail(f"{where}: {column!r} {found}; expected a text or a list of {{role, content}} messages")
        if message["role"] not in ROLES:
            fail(f"{where}: {column!r} has the role {message['role']!r}; expected one of {', '.join(ROLES)}")
    return messages


def is_another_chat(text) -> bool:
    """Whether a text is JSON of a chat in another form, such as ShareGPT's; other JSON is just a text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, dict):
        value = value.get("messages") or value.get("conversations") or [value]
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict):
        return False
    if "content" in first:
        return first.get("role") in ROLES
    return "value" in first and first.get("from") in ("system", "human", "user", "gpt", "assistant")


def read_row(row, where, layout: Layout, has_prompt) -> tuple[str | list[dict], dict[str, str | None], str]:
    """-> (the prompt, the answers by column, the name of the row's form). Answers share a prompt without a column."""
    column = layout.prompt_column
    answers = {}
    earlier = {}  # what stands before an answer in its column, if that holds messages
    for name in layout.answer_columns:
        answers[name], messages = read_answer(row, name, where, layout)
        if messages is not None:
            earlier[name] = messages
    conversation = next(filter(None, earlier.values()), None)

    prompt = read_value(row, column, where) if has_prompt else conversation
    form = "conversations" if conversation or isinstance(prompt, list) else "texts"
    if not has_prompt:
        names = " and ".join(layout.answer_columns)
        if not earlier:
            shared = os.path.commonprefix(list(answers.values()))
            following = [text[len(shared) :] for text in answers.values()]
            is_whole = not any(text and not text[0].isspace() for text in following)
            # An empty answer ends with its speaker, such as a line "Assistant:".
            if not (is_whole and re.search(r"(\A|\n)\W*\w+:\Z", shared)):
                shared = re.sub(r"\S*\Z", "", shared)  # its last word may be the beginning of two others
            prompt = shared.rstrip()
            answers = {name: text.removeprefix(prompt) for name, text in answers.items()}
        if prompt is None or (prompt == "" and len(set(answers.values())) > 1):
            fail(f"{where}: no column {column!r}, and {names} share no beginning that could be the prompt")
        form += f"; the prompt is what {names} share"
    elif isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
            form += "; their last messages are the answers" if column in answers else " without their last answers"
        if not prompt:
            fail(f"{where}: {column!r} holds an answer alone; expected the messages before it")
    elif column in answers:
        fail(f"{where}: {column!r} is a text; a column that holds prompt and answer must hold chat messages")
    elif conversation:
        questions = [message["content"].strip() for message in conversation if message["role"] == "user"]
        if prompt.strip() not in questions:
            fail(f"{where}: {column!r} is no message of the user in the conversations of {', '.join(earlier)}")
        prompt = conversation
        form += f"; {column!r} is a user's message of each"

    for name, messages in earlier.items():
        if messages and contents(messages) != contents(prompt):
            fail(f"{where}: the messages of {name!r} before its answer are not the prompt's")
    return prompt, answers, form


def read_answer(row, column, where, layout: Layout) -> tuple[str | None, list[dict] | None]:
    """-> (the text of an answer, the messages before it). Either is None if the row has none."""
    may_lack = len(layout.answer_columns) == 1
    if may_lack and row.get(column) is None:
        return None, None
    value = read_value(row, column, where)
    if isinstance(value, str):
        return value, None
    if value[-1]["role"] == "assistant":
        for name in ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call"):
            if value[-1].get(name):
                fail(f"{where}: the answer in {column!r} has {name!r}, which is not read: write it into its content")
        return value[-1]["content"], value[:-1]
    if may_lack and column == layout.prompt_column:
        return None, None
    fail(f"{where}: {column!r} ends with a message of the {value[-1]['role']}; expected the assistant's answer")


def contents(messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def load_prompts(path, layout: Layout, tokenizer, max_length) -> list[Prompt]:
    """Prompts cut on the left to `max_length` tokens (a BOS stays in front), with the texts of their answers.

    Rows with an empty prompt or answer are dropped. If rows may lack an answer and all do, the prompts stay without.
    """
    rows = load_rows(path, layout.config, layout.split)
    # Two answers may share their prompt, but not if the user has named its column, or if some row has it.
    may_share = layout.prompt_column == "prompt" and len(layout.answer_columns) == 2
    has_prompt = not may_share or any("prompt" in row for _, row in rows)
    columns = dict.fromkeys(name for _, row in rows for name in row if name != layout.prompt_column)
    prompts = []
    counts = collections.Counter()
    num_repeating = 0
    num_changed = 0
    for where, row in rows:
        asked, answers, form = read_row(row, where, layout, has_prompt)
        prompt = make_prompt(asked, tokenizer, max_length, f"{where}: {layout.prompt_column!r}")
        asked_texts = [asked] if isinstance(asked, str) else [message["content"] for message in asked]
        if not any(text.strip() for text in asked_texts) or not prompt.ids:
            continue
        prompt.where = where
        prompt.columns = {name: row.get(name) for name in columns}  # a reward function gets all of them each time
        for column, answer in answers.items():
            prompt.answers[column] = answer if answer and answer.strip() else None
            if answer and answer.startswith(prompt.text):
                num_repeating += 1
        said = json.dumps([asked, answers], sort_keys=True, default=str)
        prompt.digest = hashlib.sha256(said.encode()).hexdigest()  # it stays when a file grows or its rows move
        prompts.append(prompt)
        counts[form] += 1
        asked_for = [message["content"] for message in prompt.messages or [] if message["role"] in ("system", "user")]
        if any(text.strip() not in prompt.text for text in asked_for):
            num_changed += 1
    if any(prompt.messages and prompt.columns.get("tools") for prompt in prompts):
        print(f"note: {os.path.relpath(path)} has a column 'tools', which the chat template does not get")

    answered = [prompt for prompt in prompts if None not in prompt.answers.values()]
    if not answered and len(layout.answer_columns) == 1:
        answered = prompts
    counts["with an empty prompt, dropped"] = len(rows) - len(prompts)
    counts["without an answer, dropped"] = len(prompts) - len(answered)
    counts["answers repeat their prompt, which is then read twice"] = num_repeating
    counts["with a message that the chat template drops or changes"] = num_changed
    too_long = f"longer than --max-prompt-length {max_length}, without their beginning"
    counts[too_long] = sum(prompt.num_cut > 0 for prompt in answered)
    report(path, len(answered), "prompts", counts)
    return answered


def make_prompt(value, tokenizer, max_length, place) -> Prompt:
    """A text, or chat messages by the tokenizer's template, as a prompt; `place` is for error messages."""
    messages = None if isinstance(value, str) else value
    text = chat_text(tokenizer, messages, place, add_generation_prompt=True) if messages else value
    ids = encode(tokenizer, text, add_special_tokens=not messages)  # a chat template writes its own
    kept_ids = cut_left(ids, max_length, tokenizer.bos_token_id)
    return Prompt(text, kept_ids, columns={}, messages=messages, num_cut=len(ids) - len(kept_ids))


def chat_text(tokenizer, messages, where, **kwargs) -> str:
    if not tokenizer.chat_template:
        fail(f"{where} holds chat messages, but the model's tokenizer has no chat template")
    with fails_with(f"{where}: the chat template refuses the messages"):  # such as an order of roles
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def report(path, size, rows, counts: dict[str, int]):
    """The data's line: how many rows there are, their forms, and what was dropped. Without any row the run ends."""
    notes = "; ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    if size == 0:
        fail(f"{path}: no {rows} are left ({notes})")
    print(f"{os.path.relpath(path)}, {rows}: {size:,} ({notes or 'all'})")


def train_and_held_out(load, dataset, eval_dataset, size) -> tuple[list, list]:
    """-> (training rows, held-out rows); without an evaluation data set, up to `size` rows are held out.

    They are those with the least digests, and only from the lower half of all possible digests, so that about half of a
    small file stays. Rows that are added later may replace held-out rows, but they never turn a row that was trained on
    into a held-out one, and equal rows are never on both sides.
    """
    print("Data:")
    rows = load(dataset)
    if not size:
        return rows, []
    print("Held-out data:")
    if eval_dataset:
        held_out = load(eval_dataset)[:size]
        digests = {row.digest for row in rows}
        num_trained = sum(row.digest in digests for row in held_out)
        if num_trained:
            print(f"note: {num_trained:,} of the first {len(held_out):,} are in the data that is trained on, too")
        note_shared_prompts(rows, [row for row in held_out if row.digest not in digests])
        have_demonstrations = [getattr(some[0], "demonstration", None) is not None for some in (rows, held_out)]
        if have_demonstrations == [True, False]:
            print("note: these have no demonstration, unlike those that are trained on: there is no eval_loss")
        return rows, held_out
    candidates = [row for row in rows if row.digest < "8"]  # of hexadecimal digits: the lower half
    held_out = sorted(candidates, key=lambda row: row.digest)[:size]
    digests = {row.digest for row in held_out}
    trained = [row for row in rows if row.digest not in digests]
    if not held_out or not trained:
        fail(f"{dataset}: too few rows to hold some out: give --eval-dataset")
    print(f"{len(held_out):,} of them, which are not trained on")
    note_shared_prompts(trained, held_out)
    return trained, held_out


def note_shared_prompts(trained, held_out):
    """Rows of one prompt may be on both sides, with other answers: then a model is judged on prompts that it knows."""
    texts = [[getattr(row, "prompt", row).text for row in rows] for rows in (trained, held_out)]
    known = set(texts[0])
    num_shared = sum(text in known for text in texts[1])
    if num_shared:
        print(f"note: {num_shared:,} held-out rows have a prompt that is trained on, too, with another answer or none")


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


def encode_answers(tokenizer, prompts: list[Prompt], column) -> list[list[int]]:
    """The ids of a column's answers as the policy should write them after their prompts, with an EOS at the end.

    An answer in a chat ends as the chat template ends it. Some templates rewrite answers (those of reasoning models
    drop or move the thoughts): such an answer is read as it is, with the tokenizer's EOS, and a line says so.
    """
    eos_texts = [text for text in map(tokenizer.decode, tokenizer.eos_ids) if text]
    rows = []
    num_cut = 0
    num_rewritten = 0
    for prompt in prompts:
        answer = prompt.answers[column]
        turn = answer
        if prompt.messages:
            messages = [*prompt.messages, dict(role="assistant", content=answer)]
            whole = chat_text(tokenizer, messages, prompt.where)
            turn = whole.removeprefix(prompt.text)
            core = answer.strip()  # templates may cut off white space
            before = turn.partition(core)[0]
            is_cut = any(eos in before for eos in eos_texts)
            if turn == whole or whole.count(core) == prompt.text.count(core) or is_cut:
                num_rewritten += 1
                turn = answer
        rows.append(encode_response(tokenizer, turn))
        if any(eos in answer.removesuffix(eos) for eos in eos_texts):
            num_cut += 1
    if num_cut:
        print(f"{num_cut:,} of {column!r} hold {' or '.join(map(repr, eos_texts))} before their end, and are cut there")
    if num_rewritten:
        reason = "since the chat template would change them"
        print(f"{num_rewritten:,} of {column!r} are read as they are and end with {tokenizer.eos_token}, {reason}")
    return rows


def reward_model_ids(tokenizer, prompt: Prompt, response, max_length=None) -> list[int]:
    """The ids that a reward model reads, in training and in scoring.

    They are cut on the left: to `max_length`, or without it by what the prompt has lost.

    Without a chat template: prompt + response as one text, then EOS. A chat goes through the reward model's own
    template, if it has one, which ends the response in its own way.
    """
    if prompt.messages and tokenizer.chat_template:
        messages = [*prompt.messages, dict(role="assistant", content=response)]
        ids = encode(tokenizer, chat_text(tokenizer, messages, tokenizer.name_or_path), add_special_tokens=False)
    else:
        ids = encode(tokenizer, prompt.text + response)
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    if max_length is None:
        max_length = len(ids) - prompt.num_cut
    return cut_left(ids, max_length, tokenizer.bos_token_id)


def encode_response(tokenizer, text) -> list[int]:
    """The ids of a text as it stands after a prompt, up to its first EOS; one follows if it has none.

    Some tokenizers begin a text alone with a space, which is not in it.
    """
    if tokenizer.eos_token_id is None:
        fail(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, which ends a response")
    ids = encode(tokenizer, text, add_special_tokens=False)
    if decode(tokenizer, [ids]) != [text]:
        anchor = encode(tokenizer, "\n", add_special_tokens=False)
        with_anchor = encode(tokenizer, "\n" + text, add_special_tokens=False)
        if with_anchor[: len(anchor)] == anchor:  # else the text's own newlines have merged with it
            ids = with_anchor[len(anchor) :]
    for i, token in enumerate(ids):
        if token in tokenizer.eos_ids:  # after a turn's end a template may write more
            return ids[: i + 1]
    return [*ids, tokenizer.eos_token_id]


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

    def __init__(self, *, output_dir, resume, save_every, flags: dict, num_updates, engines: list):
        self.flags = flags | dict(output_dir=None, resume=None)  # a run's folder may be moved
        self.engines = engines
        self.is_main = dist.get_rank() == 0
        self.last_checkpoint = 0
        self.rows = []  # of metrics.jsonl, without the values that are not finite
        self.warned = set()
        self.take_folder(output_dir, is_new=not resume)
        if resume:
            self.read_checkpoint()
            print(f"Resumed after update {self.last_checkpoint} of {num_updates}")
        model_bytes, self.checkpoint_bytes = saved_sizes(engines)
        num_bytes = model_bytes
        if save_every:
            num_bytes += self.checkpoint_bytes * (1 if resume else 2)  # the old one goes when the new one is whole
        if self.is_main:
            self.remove_checkpoints_but(self.last_checkpoint)  # a torn one takes room
        dist.barrier()  # every rank has read what is there before rank 0 writes
        with writing(self.folder, num_bytes):
            if self.is_main:
                self.write_beginning()
        for name in ("model", "reward_model", "reward_function", "gold_reward_function"):
            if self.flags.get(name):
                print(f"{name.replace('_', ' ').capitalize()}: {os.path.relpath(self.flags[name])}")
        self.bar = tqdm(total=num_updates, initial=self.last_checkpoint, unit="update", disable=not self.is_main)
        self.signal = 0
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is ignored under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self.hear)

    # The folder

    def take_folder(self, output_dir, is_new):
        """Refuses a folder that holds something else, and locks it. The kernel frees the lock with the process."""
        folders = [Path(output_dir).absolute()]
        dist.broadcast_object_list(folders)  # a default name has the time in it, and the ranks' clocks may differ
        self.folder = folders[0]
        with fails_with(f"--output-dir {self.folder}"):  # all ranks try, so that all fail alike
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir()} - {"lock"}
            if is_new and names and "args.json" not in names:
                fail(f"--output-dir {self.folder} already holds other files: choose another folder")
            self.lock = open(self.folder / "lock", "w")
        is_taken = [False]
        if self.is_main:
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                is_taken = [True]
            except OSError:
                pass  # some network file systems have no locks
        dist.broadcast_object_list(is_taken)
        if is_taken[0]:
            fail(f"{self.folder}: another process is running in this folder: wait for its end, or choose another one")
        if is_new and any(row["update"] for row in read_rows(self.folder / "metrics.jsonl")):
            fail(f"--output-dir {self.folder} already holds a run: choose another folder, or --resume it")

    def write_beginning(self):
        """The files of a run that begins or goes on; what an earlier process wrote after the checkpoint is dropped."""
        if self.last_checkpoint == 0:  # else args.json is there, and --resume has compared it
            record = self.flags | dict(ranks=dist.get_world_size(), inputs=input_digests(self.flags, self.folder))
            write_whole(self.folder / "args.json", json.dumps(record, indent=2) + "\n")
            for path in self.folder.glob("events.*"):
                path.unlink()
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows = read_rows(self.folder / name) if self.last_checkpoint else []
            kept = [row for row in rows if row["update"] <= self.last_checkpoint]
            write_whole(self.folder / name, json_lines(kept))
        self.writer = SummaryWriter(str(self.folder), purge_step=self.last_checkpoint + 1)

    def read_checkpoint(self):
        folder = self.folder / "checkpoint"
        with fails_with(f"--resume {self.folder}: there is no whole checkpoint (a run writes them with --save-every)"):
            self.last_checkpoint = int((folder / "latest").read_text())
            target = str(folder / f"update-{self.last_checkpoint}")
            for i, engine in enumerate(self.engines):
                # Not strict: a checkpoint has the trained weights alone.
                path, _ = engine.load_checkpoint(target, tag=f"engine-{i}", load_module_strict=False)
                if path is None:
                    raise FileNotFoundError(target)
        rows = read_rows(self.folder / "metrics.jsonl")
        self.rows = [finite_numbers(row) for row in rows if row["update"] <= self.last_checkpoint]

    def save_checkpoint(self, update):
        """Written into a folder of the update's own, then named by `latest` in one atomic step: never torn."""
        folder = self.folder / "checkpoint"
        target = str(folder / f"update-{update}")
        with writing(self.folder, self.checkpoint_bytes):
            for i, engine in enumerate(self.engines):
                engine.save_checkpoint(target, f"engine-{i}", save_latest=False)
        dist.barrier()
        if self.is_main:
            write_whole(folder / "latest", str(update))
            self.remove_checkpoints_but(update)
        self.last_checkpoint = update

    def remove_checkpoints_but(self, update):
        for folder in self.folder.glob("checkpoint/update-*"):
            if folder.name != f"update-{update}":
                shutil.rmtree(folder)

    def write_rows(self, name, rows: list[dict], size):
        """All ranks' rows to a file of their own, in groups of `size` that stay together."""
        groups = gather_rows([rows[i : i + size] for i in range(0, len(rows), size)])
        if self.is_main:
            write_whole(self.folder / name, json_lines([row for group in groups for row in group]))

    # The console

    def log(self, update, metrics: dict[str, float]):
        """A row of metrics.jsonl (null for what is not finite), points of TensorBoard's curves, the progress bar."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        metrics = dict(update=update, peak_memory_bytes=max(gather_rows([peak]))) | metrics
        finite = finite_numbers(metrics)
        self.rows.append(finite)
        if self.is_main:
            append_rows(self.folder / "metrics.jsonl", [dict.fromkeys(metrics) | finite])
            with writing(self.folder):
                for name, value in metrics.items():
                    group = "eval" if name.startswith("eval_") else "train"
                    self.writer.add_scalar(f"{group}/{name}", value, update)
            names = ("reward", "gold_reward", "kl", "entropy") if "reward" in metrics else ("accuracy", "loss")
            self.show({name: metrics[name] for name in names if name in metrics})
            self.bar.update(update > 0)
            for name, sentence in troubles(self.rows).items():
                if name not in self.warned:
                    tqdm.write(f"warning, update {update}: {sentence}")
                    self.warned.add(name)
        # A run that has diverged would go on for hours to no end.
        skipped = [0] + [row.get("skipped_updates", 0) for row in self.rows[-11:]]
        steps = [after - before for before, after in itertools.pairwise(skipped)]
        if len(steps) >= 10 and min(steps[-10:]) > 0:
            name = next((name for name in metrics if name not in finite), "a gradient")
            begin = self.rows[-10]["update"]
            fail(f"ten updates in a row were skipped: {name} is not finite since update {begin}", status=1)

    def show(self, numbers: dict[str, float]):
        """Numbers beside the progress bar."""
        self.bar.set_postfix({name: f"{number:.2f}" for name, number in numbers.items()}, refresh=False)

    def log_samples(self, update, rows: list[dict], title="greedy responses to held-out prompts"):
        """All rows of an evaluation to samples.jsonl, three of them and the mean rewards to the console."""
        if not self.is_main:
            return
        append_rows(self.folder / "samples.jsonl", [dict(update=update) | row for row in rows])
        for name in ("reward", "gold_reward"):
            if name in rows[0]:
                mean = sum(row[name] for row in rows) / len(rows)
                title += f", mean {name.replace('_', ' ')} {mean:.2f}"
        tqdm.write(f"\nAfter {update} updates: {title}, such as")
        for row in rows[:3]:
            reward = f"[{row['reward']:6.2f}] " if "reward" in row else ""
            prompt = row["prompt"].replace("\r", "").replace("\n", "⏎")
            response = row["response"].replace("\r", "").replace("\n", "⏎")
            if len(prompt) > 120:
                prompt = f"…{prompt[-120:]}"  # a response goes on from the prompt's end
            if len(response) > 400:
                response = f"{response[:400]}…"
            tqdm.write(f"    {reward}{prompt} ▸{response}")

    # The end

    def hear(self, number, frame):
        """The first ctrl-C, SIGTERM or closed terminal ends the run after its update. A second one ends it at once."""
        now = time.monotonic()
        if not self.signal:
            self.signal = number
            self.heard = now
            if self.is_main:
                print("\nStopping after this update … (a second ctrl-C stops at once)", file=sys.stderr)
        elif now > self.heard + 1:  # within a second it is the launcher's copy of the first
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def stop_if_asked(self, update):
        """After a signal at any rank: a checkpoint, a line that says how to go on, exit status 128 + its number."""
        number = max(gather_rows([self.signal]))
        if number and update < self.bar.total:  # the last one is followed by the end
            if update > self.last_checkpoint:  # else it is there, and a kill would tear it
                self.save_checkpoint(update)
            launcher = "python" if dist.get_world_size() == 1 else "the same launcher and number of ranks,"
            self.close()
            words = shlex.join([sys.argv[0], "--resume", str(self.folder)])
            tqdm.write(f"Stopped after update {update}. To go on: {launcher} {words}")
            raise SystemExit(128 + number)

    def finish(self, model, usage):
        """A model card, and the console's last lines: first and last evaluation, warnings, and where the files are."""
        self.close()
        if not self.is_main:
            return
        write_whole(self.folder / model / "README.md", model_card(self.flags, self.rows[-1], usage))
        for name, value in self.rows[-1].items():
            if name.startswith("eval_"):  # a curve may rise and fall between first and last
                values = [row[name] for row in self.rows if name in row]
                print(f"{name:24} {values[0]:6.2f} → {value:6.2f} (from {min(values):.2f} to {max(values):.2f})")
        for sentence in troubles(self.rows).values():
            print(f"Warning: {sentence}")
        print(f"Saved:   {self.folder / model} (checked; transformers' from_pretrained reads it)")
        print(f"Samples: {self.folder / 'samples.jsonl'}")
        print(f"Curves:  tensorboard --logdir {self.folder.parent}")

    def close(self):
        self.bar.close()
        if self.is_main:
            with writing(self.folder):
                self.writer.close()
        dist.barrier()
        dist.destroy_process_group()


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
    is_fine_tuning = "eval_loss" in last  # which is meant to go far
    if last_are("kl", 100, math.inf) or (last.get("eval_log_ratio", 0) > 100 and not is_fine_tuning):
        found["drift"] = "the policy is over 100 nats from the initial one: lower --learning-rate"
    if last.get("skipped_updates", 0) > 0:
        count = f"{last['skipped_updates']:g}"
        found["skipped"] = f"steps without a finite loss and gradient were skipped ({count}): lower --learning-rate"
    if last_are("reward_std", -1, 1e-6):
        found["reward"] = "all sampled responses have one reward, so nothing can be learned: look at samples.jsonl"
    if "eval_gold_reward" in last and "eval_reward" in last:
        evaluations = [row for row in rows if "eval_gold_reward" in row]
        golds = [row["eval_gold_reward"] for row in evaluations]
        best = evaluations[golds.index(max(golds))]
        # Smaller falls come and go: they are greedy responses to some prompts only.
        fell = max(golds) - golds[-1] > 0.5 * (max(golds) - min(golds))
        if len(golds) > 2 and fell and last["eval_reward"] > best["eval_reward"]:
            change = f"eval_gold_reward fell from {max(golds):.2f} to {golds[-1]:.2f} since update {best['update']}"
            found["gold"] = f"the policy games its reward: {change}, while eval_reward rose; train less"
    return found


# How a model is used, for its card.
LANGUAGE_MODEL = """
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(".")
model = transformers.AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("A prompt", return_tensors="pt")  # a chat: tokenizer.apply_chat_template
settings = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)  # the temperature is one of the flags below
print(tokenizer.decode(model.generate(**ids, **settings, max_new_tokens=64)[0]))
"""


def model_card(flags: dict, metrics: dict, usage) -> str:
    """The README.md of a model's folder, as on the hub; `usage`: lines of Python that use the model."""
    script = Path(sys.argv[0])
    shown = {}
    for name, value in flags.items():
        is_path = isinstance(value, str) and os.path.isabs(value)
        shown[name] = Path(value).name if is_path else value  # this machine's folders are nobody's business
    data = huggingface_hub.ModelCardData(
        library_name="transformers",
        base_model=shown["model"],
        datasets=[shown["dataset"]],
        tags=[script.stem],
    )
    text = f"---\n{data.to_yaml()}\n---\n# {shown['model']} after {script.name}\n"
    text += f"\nIn this folder:\n\n```\n{usage.strip()}\n```\n"
    text += f"\nFlags:\n\n```\n{json.dumps(shown, indent=2)}\n```\n"
    text += f"\nMetrics:\n\n```\n{json.dumps(metrics, indent=2)}\n```\n"
    return text


# Files


def finite_numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None and math.isfinite(value)}


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path) -> list[dict]:
    """The lines of a file of ours, none if there is no file; a last line that was torn off is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def append_rows(path, rows: list[dict]):
    with writing(path.parent), open(path, "a", encoding="utf-8") as file:
        file.write(json_lines(rows))


def write_whole(path, text):
    """Atomic: readers see the old text or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with writing(path.parent):
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


@contextlib.contextmanager
def writing(folder, num_bytes=0) -> Iterator[None]:
    """Looks for the room first. What cannot be written ends the run with one line that says how much room is left."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        fail(f"{folder}: the disk has {free:,} bytes left; what is to be saved needs {num_bytes:,}", status=1)
    try:
        yield
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        free = shutil.disk_usage(folder).free
        fail(f"{folder}: could not write, the disk has {free:,} bytes left: {first_line(error)}", status=1)


def saved_sizes(engines) -> tuple[int, int]:
    """-> (bytes of the first engine's model, at most so many of a checkpoint of all engines), over all ranks."""
    model = 0
    checkpoint = 0
    for engine in engines:
        for weight in engine.module.parameters():
            numel = getattr(weight, "ds_numel", weight.numel())  # under ZeRO-3 a rank holds a part
            if engine is engines[0]:
                model += numel * weight.element_size()
            if weight.requires_grad:
                checkpoint += numel * 16  # the weight, a float32 copy of it and Adam's two moments
    return model, checkpoint


def input_digests(flags: dict, run_folder) -> dict[str, str]:
    """-> {file: hash of its content} for the files that --resume reads again; what is on a hub has none."""
    digests = {}
    paths = [file_of(flags[name]) for name in INPUTS if flags.get(name)]
    for path in list(paths):
        if path.suffix == ".py" and path.is_file():
            paths += itertools.chain(*imported_neighbours(path).values())
    for path in paths:
        for file in [path, *sorted(path.rglob("*"))]:
            is_input = file.suffix != ".md" and ".git" not in file.parts and not file.is_relative_to(run_folder)
            if file.is_file() and is_input:
                digest = hashlib.sha256()
                with fails_with(file), open(file, "rb") as content:
                    while block := content.read(2**20):
                        digest.update(block)
                digests[str(file)] = digest.hexdigest()
    return digests


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
    raise SystemExit(status)


@contextlib.contextmanager
def fails_with(message, status=2) -> Iterator[None]:
    """An error inside ends the run with one line: the message, then the error's first line."""
    try:
        yield
    except Exception as error:
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


# The flags whose files --resume reads again.
INPUTS = ("model", "dataset", "eval_dataset", "reward_model", "reward_function", "gold_reward_function")

# Types of flags: tyro parses them, pydantic knows their bounds.
PositiveInt = pydantic.PositiveInt
NonNegativeInt = pydantic.NonNegativeInt
PositiveFloat = typing.Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = typing.Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = typing.Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
PathOrName = typing.Annotated[str, pydantic.Field(min_length=1)]


def make_paths_absolute(args):
    """So that --resume works from any folder; what does not exist here is a hub name."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None or field.type not in (PathOrName, PathOrName | None):
            continue
        is_ours = is_of_the_example(field, value)
        folder = HERE if is_ours else Path.cwd()  # the example lies beside this file
        if file_of(folder / value).exists():
            setattr(args, field.name, os.path.abspath(folder / value))
        elif is_ours:
            flag = f"--{field.name.replace('_', '-')}"
            fail(f"{flag}: {HERE} has no {value}: give --model, --dataset and a reward of your own")


def file_of(value) -> Path:
    """The path in a path flag, which may be a function of a file: path/to/file.py:name."""
    file, _, _ = str(value).rpartition(":")
    return Path(file if file.endswith(".py") else value)


def given_flags() -> list[str]:
    """The words of the command line without what follows a `=`; flags as __name."""
    return [word.partition("=")[0].replace("-", "_") for word in sys.argv]


def is_of_the_example(field: dataclasses.Field, value) -> bool:
    """Whether a flag has its default; a path that is named means the one in the current folder."""
    is_named = field.type in (PathOrName, PathOrName | None) and f"__{field.name}" in given_flags()
    return value == field.default and not (is_named and Path.cwd() != HERE)


def forget_example(args):
    """Takes back the example's paths where they do not fit: beside the user's own model, data or reward."""
    given = given_flags()
    own = set()
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, str):
            value = value.rstrip("/")  # which completion by the shell adds
        if value is not None and not is_of_the_example(field, value):
            own.add(field.name)
    forgotten = []
    if "model" in own or "dataset" in own:
        forgotten = ["dataset", "eval_dataset", "reward_model"]
    elif "reward_function" in own:
        forgotten = ["reward_model"]
    for name in forgotten:
        if hasattr(args, name) and f"__{name}" not in given:
            setattr(args, name, None)
    if not args.dataset:
        fail(f"--model {args.model} is your own: give --dataset, too (the example's is for the example's model)")
    for name in ("dataset", "reward_model", "reward_function"):
        if name not in own or "model" in own or not hasattr(args, "model"):
            continue
        if not file_of(getattr(args, name)).resolve().is_relative_to(HERE / "examples"):
            flag = f"--{name.replace('_', '-')}"
            print(f"note: {flag} is your own, but --model is the example's, which only knows short film reviews")


def parse_args(Args):
    """The command line as an `Args`. `--resume D` takes D/args.json for defaults and refuses a flag that differs."""
    refuse_tasks_without_ranks()
    args = parse_flags(Args)
    if not args.resume:
        forget_example(args)
        make_paths_absolute(args)
        if not args.output_dir:
            args.output_dir = f"runs/{Path(sys.argv[0]).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
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
        if new != old:
            longer = "; to train longer, start a run from its policy" if name == "total_episodes" else ""
            fail(f"--{name.replace('_', '-')} {new} differs from the run in {folder}, which had {old}{longer}")
    digests = input_digests(vars(args), folder)
    for file in sorted(inputs | digests):
        if inputs.get(file) != digests.get(file):
            if not Path(file).exists():
                fail(f"--resume {folder}: {file} is gone since the run began")
            change = "has changed since" if file in inputs else "was not an input when"
            fail(f"--resume {folder}: {file} {change} the run began")
    return args


def parse_flags(Args, **kwargs):
    """The command line. All ranks see the same flags, so rank 0 alone prints what is wrong with them."""
    # The launcher `deepspeed` adds --local_rank to our flags; the environment says the same.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    is_main = os.environ.get("RANK", "0") == "0"
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = Output(sys.stderr, spare=open(os.devnull, "w"))
    if not is_main:
        sys.stdout = open(os.devnull, "w")  # errors of any rank still go to standard error
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output that is not UTF-8 shows ? for signs that it does not have
        sys.stdout = Output(sys.stdout, spare=sys.stderr)
    if "--help" in sys.argv or "-h" in sys.argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends when head does, without a traceback
    with contextlib.redirect_stderr(sys.stderr if is_main else io.StringIO()):
        args = tyro.cli(Args, prog=Path(sys.argv[0]).name, **kwargs)
        try:
            pydantic.TypeAdapter(Args).validate_python(vars(args))
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            fail(f"--{wrong['loc'][0].replace('_', '-')} {wrong['input']!r}: {wrong['msg']}")
    return args


class Output:
    """Standard output or error. When it cannot be written any more, what follows goes to `spare`.

    Such as when ctrl-C ends the `tee` that reads it, too, when a terminal is closed, or a log file's disk is full.
    """

    def __init__(self, stream, spare):
        self.stream = stream
        self.spare = spare

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.stream = self.spare
            self.stream.write(text)
        return len(text)


def refuse_tasks_without_ranks():
    """Several tasks of a scheduler that nobody has given ranks would each do the whole run, as if they were alone."""
    has_rank = "RANK" in os.environ  # by torchrun or deepspeed, also where srun has started these
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        count = int(os.environ.get(name) or 1)
        if count > 1 and not has_rank:
            launcher = f"torchrun --nproc_per_node GPUS {Path(sys.argv[0]).name}"
            fail(f"{name}={count}, but no launcher: run `{launcher} …` in one task a node, or unset {name}")


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
    # A CPU computes slowly with numbers below 1e-38, such as the gradients of rows of little weight. They made a run
    # take five times as long, so they count as 0.
    torch.set_flush_denormal(True)
    # Set by torchrun and deepspeed; without a launcher this process is alone, and takes any free port.
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    # Ranks wait for hours, because one may check, score or read a disk for long while the others have nothing to do.
    # A rank that dies is noticed in another way: gloo sees its connection closed, torchrun and deepspeed end the other
    # ranks. Where neither watches, NCCL's own watchdog does (TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC).
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(hours=6))
    atexit.register(leave_processes)
    # From 2.11 on torch prefers cuDNN's attention on H100 and H200 where there is a mask. Its backward may give NaN
    # where a row's length is 64 more than a multiple of 128 (pytorch#196678), and it plans anew for each length
    # (pytorch#155958). Without it torch takes the flash kernel where no mask is needed (prompts of one length), else
    # the memory-efficient one.
    torch.backends.cuda.enable_cudnn_sdp(False)
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
    return [row for turn in zip(*parts, strict=True) for row in turn]


def standard_deviation(x):
    """Of the entries of all ranks -> a scalar; NaN for one entry, whose deviation says nothing."""
    entries_N = x.new_tensor(gather_rows(x.tolist()))
    return entries_N.std(correction=0) if entries_N.numel() > 1 else x.new_tensor(math.nan)


def global_means(**tensors) -> dict[str, float]:
    """The mean of each tensor's entries over all ranks, by name."""
    totals = torch.stack([x.sum().double() for x in tensors.values()])
    counts = torch.tensor([x.numel() for x in tensors.values()]).to(totals)
    dist.all_reduce(totals)
    dist.all_reduce(counts)
    return dict(zip(tensors, (totals / counts).tolist()))
