"""Code that the scripts share. Nothing here knows an algorithm, and functions share no state: copy what you need.

About reinforcement learning: 1 rollout · 2 log-probabilities and values · 3 rewards · 4 evaluation.
About everything else: 5 models and DeepSpeed · 6 data · 7 the run · 8 flags, errors and processes.

Names carry their shape: B rows, P prompt tokens (left-padded), T response tokens (right-padded), L both, V vocabulary,
D width, R all rows of a rollout, N any number. Logits at t predict token t + 1. Response masks include the first EOS.
"""

import contextlib
import copy
import csv
import dataclasses
import gc
import gzip
import hashlib
import io
import json
import logging
import math
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found no GPU
import deepspeed  # noqa: E402
import transformers  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

HERE = Path(__file__).resolve().parent
LANGUAGE_MODEL = """
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(".")
model = transformers.AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("A prompt", return_tensors="pt")  # a chat: tokenizer.apply_chat_template
print(tokenizer.decode(model.generate(**ids, do_sample=True, top_k=0, max_new_tokens=64)[0]))
"""


# ---------------------------------------------------------------- 1. Rollout


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
    batch_size: int  # rows that are decoded at once


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
        prompts = [self.prompts[i] for i in numbers]
        texts = [self.texts[i] for i in numbers]
        tensors = [self.prompts_BP, self.prompt_mask_BP, self.tokens_BT, self.mask_BT, self.ended_B]
        return Responses(prompts, texts, *(tensor[rows] for tensor in tensors))

    def rows(self, **columns) -> list[dict]:
        """One dict per row, for people to read; `columns`: more numbers of each row, as tensors."""
        texts = dict(prompt=[prompt.text for prompt in self.prompts], response=self.texts)
        columns = texts | {name: x_B.tolist() for name, x_B in columns.items()}
        return [dict(zip(columns, values)) for values in zip(*columns.values())]


def rollout(policy, prompts: list[Prompt], num_samples=1, greedy=True, demonstrations=False) -> Responses:
    """The policy's responses: `num_samples` sampled rows per prompt (and its demonstration), then the greedy rows."""
    prompts_BP, prompt_mask_BP = pad([prompt.ids for prompt in prompts], "left", policy.device)
    chunk_size = max(1, policy.sampling.batch_size // max(1, num_samples + greedy))
    sampled, greedy_rows = [], []
    with whole_model(policy) as model:
        for start in range(0, len(prompts) if num_samples + greedy else 0, chunk_size):
            chunk = slice(start, start + chunk_size)
            inputs = (prompts_BP[chunk], prompt_mask_BP[chunk], policy.eos_ids, policy.sampling)
            tokens_RT = generate(model, *inputs, num_samples, greedy)
            lengths_R = response_mask(tokens_RT, policy.eos_ids).sum(1).tolist()
            rows = [row[:length] for row, length in zip(tokens_RT.tolist(), lengths_R)]
            first_greedy = len(prompts[chunk]) * num_samples
            sampled += rows[:first_greedy]
            greedy_rows += rows[first_greedy:]
    if demonstrations:
        for i in reversed(range(len(prompts))):
            sampled.insert((i + 1) * num_samples, prompts[i].demonstration)
    row_prompts = [prompt for prompt in prompts for _ in range(num_samples + demonstrations)]
    row_prompts += prompts if greedy else []
    return as_responses(policy, row_prompts, sampled + greedy_rows)


def as_responses(policy, prompts: list[Prompt], tokens: list[list[int]]) -> Responses:
    """Rows of a prompt and the token ids of its response, padded."""
    prompts_BP, prompt_mask_BP = pad([prompt.ids for prompt in prompts], "left", policy.device)
    tokens_BT, mask_BT = pad(tokens, "right", policy.device)
    ended_B = torch.tensor([row[-1] in policy.eos_ids for row in tokens], device=policy.device)
    texts = decode(policy.tokenizer, tokens, {*policy.eos_ids, policy.tokenizer.pad_token_id})
    return Responses(prompts, texts, prompts_BP, prompt_mask_BP, tokens_BT, mask_BT, ended_B)


class RoomyLayer(DynamicLayer):
    """A layer of the cache with room for the response: a new token does not copy the earlier ones."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def update(self, keys, values, *args, **kwargs):
        start = self.get_seq_length()
        end = start + keys.shape[2]
        if start == 0:
            self.lazy_initialization(keys, values)
            room = (0, 0, 0, self.room)
            self.buffers = [F.pad(keys, room), F.pad(values, room)]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, rows_N):
        end = self.get_seq_length()
        if end == 0:  # a layer that uses another's keys
            return
        self.buffers = [buffer.index_select(0, rows_N) for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


@torch.no_grad()
def generate(model, prompts_BP, prompt_mask_BP, eos_ids: list[int], sampling: Sampling, num_samples, greedy):
    """-> tokens_RT: `num_samples` sampled rows per prompt (adjacent), then, if `greedy`, a greedy row per prompt.

    Sampling is from softmax(logits / temperature), without top-k or top-p: what is sampled is what is scored.
    """
    device, (B, P) = prompts_BP.device, prompts_BP.shape
    index_R = torch.arange(B, device=device).repeat_interleave(num_samples)  # row -> its prompt
    S = len(index_R)  # the first S rows are sampled
    if greedy:
        index_R = torch.cat([index_R, torch.arange(B, device=device)])
    R, T = len(index_R), sampling.response_length

    # Prompts go through the model once; then each row takes its own copy of its prompt's cache.
    cache = transformers.DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(T) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    positions_BP = (prompt_mask_BP.cumsum(1) - 1).clamp(min=0)
    inputs = dict(input_ids=prompts_BP, attention_mask=prompt_mask_BP, position_ids=positions_BP, logits_to_keep=1)
    logits_NV = model(**inputs, past_key_values=cache, use_cache=True).logits[index_R, -1]
    cache.reorder_cache(index_R)
    mask_NL = torch.cat([prompt_mask_BP[index_R], prompt_mask_BP.new_ones(R, T)], 1)
    next_position_N1 = positions_BP[index_R, -1:] + 1

    eos_E = torch.tensor(eos_ids, device=device)
    rows_N = torch.arange(R, device=device)  # the N rows that have not ended; only they go through the model
    tokens_RT = torch.empty(R, T, dtype=torch.long, device=device)
    for t in range(T):
        if not logits_NV.amax(-1).isfinite().all():
            fail("the policy's logits are not finite: it has diverged; lower --learning-rate", status=1)
        token_N = logits_NV.argmax(-1)
        token_N[:S] = sample(logits_NV[:S].float() / sampling.temperature)
        tokens_RT[rows_N, t:] = token_N[:, None]  # a row that ends here keeps its EOS to the end
        going_N = ~torch.isin(token_N, eos_E)
        going = int(going_N.sum())
        if going == 0 or t + 1 == T:
            break
        if going < len(rows_N):
            kept_N = going_N.nonzero().squeeze(1)
            S = int((kept_N < S).sum())
            rows_N, token_N, mask_NL = rows_N[kept_N], token_N[kept_N], mask_NL[kept_N]
            next_position_N1 = next_position_N1[kept_N]
            cache.reorder_cache(kept_N)
        inputs = dict(input_ids=token_N[:, None], position_ids=next_position_N1 + t)
        inputs |= dict(attention_mask=mask_NL[:, : P + t + 1], past_key_values=cache, use_cache=True)
        logits_NV = model(**inputs).logits[:, -1]
    return tokens_RT


def sample(logits_NV):
    """-> tokens_N, by one random number each (`multinomial` draws one for each entry of the vocabulary)."""
    cumulative_NV = logits_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
    points_N1 = cumulative_NV[:, -1:] * torch.rand_like(cumulative_NV[:, -1:])
    return torch.searchsorted(cumulative_NV, points_N1, right=True).squeeze(1)


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


# ---------------------------------------------------------------- 2. Log-probabilities and values


def hidden_states(model, ids_BL, mask_BL):
    """-> hidden_BLD, the input of the model's heads."""
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)  # learned position embeddings must not count padding
    inputs = dict(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_BL, use_cache=False)
    return model.base_model(**inputs).last_hidden_state


def response_hidden_states(model, prompts_BP, prompt_mask_BP, responses_BT):
    """-> hidden_BTD; entry t has seen the prompt and the tokens before t, so token t is predicted there."""
    ids_BL = torch.cat([prompts_BP, responses_BT], 1)
    mask_BL = torch.cat([prompt_mask_BP, torch.ones_like(responses_BT)], 1)  # the loss masks the tokens after EOS
    return hidden_states(model, ids_BL, mask_BL)[:, prompts_BP.shape[1] - 1 : -1]


class ModelFunction(nn.Module):
    """A Hugging Face model whose forward is one function. `whole`, which decodes and is saved, is the same tensors."""

    def __init__(self, model):
        super().__init__()
        shared = [*model.parameters(), *model.buffers(), model.config]
        whole = copy.deepcopy(model, {id(thing): thing for thing in shared})
        # Set around nn.Module, not as a submodule: it never gets ZeRO-3's hooks or gradient checkpointing.
        self.__dict__["whole"] = whole.eval()
        self.model = model.train()  # gradient checkpointing works in training mode only; dropout is 0


class ResponseLogprobs(ModelFunction):
    """A causal language model as the log-probabilities of response tokens: policy and reference alike."""

    def __init__(self, model, tokenizer, sampling: Sampling, device):
        super().__init__(model)
        self.tokenizer = tokenizer  # an engine passes on the attributes of its module
        self.sampling = sampling
        self.device = device
        ids = model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]  # chat models often have several
        self.eos_ids = sorted({*ids, tokenizer.eos_token_id} - {None})
        if not self.eos_ids:
            fail(f"{model.name_or_path}: neither generation_config nor tokenizer names an EOS token")

    def forward(self, prompts_BP, prompt_mask_BP, responses_BT):
        """-> logprobs_BT, float32, of the distribution that is sampled: softmax(logits / temperature)."""
        hidden_ND = response_hidden_states(self.model, prompts_BP, prompt_mask_BP, responses_BT).flatten(0, 1)
        head = self.model.get_output_embeddings()

        def logprobs(hidden_ND, tokens_N):
            return -F.cross_entropy(head(hidden_ND).float() / self.sampling.temperature, tokens_N, reduction="none")

        # The vocabulary dwarfs all else: at most 2^25 logits (128 MiB) are alive, and backward computes them again.
        size = max(1, 2**25 // self.model.config.get_text_config().vocab_size)
        chunks = list(zip(hidden_ND.split(size), responses_BT.flatten().split(size)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            parts = [checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [logprobs(*chunk) for chunk in chunks]
        return torch.cat(parts).view_as(responses_BT)


class ScalarHead(nn.Linear):
    """The head of a reward or value model, in float32: in bfloat16 a score of 5 has steps of 1/32."""

    def forward(self, hidden_BD):
        return F.linear(hidden_BD.float(), self.weight.float()).squeeze(-1)


class ResponseValues(ModelFunction):
    """A sequence classification model: its head gives the value of the state before each response token."""

    def forward(self, prompts_BP, prompt_mask_BP, responses_BT):
        """-> values_BT, float32."""
        hidden_BTD = response_hidden_states(self.model, prompts_BP, prompt_mask_BP, responses_BT)
        return self.model.score(hidden_BTD) - getattr(self.model.config, "reward_mean", 0.0)


def forward(module, responses: Responses):
    """Log-probabilities or values of a micro-batch's response tokens -> outputs_BT; mask them before use."""
    width = responses.mask_BT.sum(1).max()
    dist.all_reduce(width, op=dist.ReduceOp.MAX)  # under ZeRO-3 ranks must take equal steps, chunks of logits included
    missing = int(width) - responses.tokens_BT.shape[1]  # mostly negative: then F.pad cuts
    tokens_BT = F.pad(responses.tokens_BT, (0, missing))
    outputs_BT = module(responses.prompts_BP, responses.prompt_mask_BP, tokens_BT)
    return F.pad(outputs_BT, (0, -missing))


@torch.no_grad()
def forward_all(module, responses: Responses, micro_batch_size):
    """`forward` of all rows, without gradients, by micro-batches -> outputs_BT, or (B, heads, T)."""
    batches = [rows for rows, _ in micro_batches(responses.mask_BT.sum(1), micro_batch_size)]
    outputs_BT = torch.cat([forward(module, responses[rows]) for rows in batches])
    return outputs_BT[torch.tensor(sum(batches, [])).argsort()]  # in the order of the rows


def micro_batches(lengths_B, size):
    """Rows of like length together, so that there is little padding -> (row numbers, whether it is the last)."""
    # The longest come first, so that running out of memory shows at once.
    order = lengths_B.argsort(descending=True, stable=True).tolist()
    for start in range(0, len(order), size):
        yield order[start : start + size], start + size >= len(order)


# ---------------------------------------------------------------- 3. Rewards


class LastTokenScore(ModelFunction):
    """A reward model as a function of right-padded token ids: its scalar head at the last real token."""

    def forward(self, ids_BL, mask_BL):
        """-> scores_B, float32. The mask finds the last real token: transformers' own rule misses it if pad = EOS."""
        hidden_BLD = hidden_states(self.model, ids_BL, mask_BL)
        rows_B = torch.arange(len(ids_BL), device=ids_BL.device)
        return self.model.score(hidden_BLD[rows_B, mask_BL.sum(1) - 1])


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


class Reward:
    """Rewards of responses, by a reward model or a Python function; a response without EOS pays a penalty."""

    def __init__(self, model, function, missing_eos_penalty, backend, prompt: Prompt | None = None):
        if not model and not function:
            fail("--reward-model or --reward-function: give one; the example's is for its own model and data")
        self.name = function or model
        self.missing_eos_penalty = missing_eos_penalty
        self.backend = backend
        self.function = function_from_file(function) if function else None
        if not function:
            classifier, self.tokenizer = load_classifier(model, backend)
            self.mean = getattr(classifier.config, "reward_mean", 0.0)
            self.scorer = freeze(LastTokenScore(classifier), backend)
        elif prompt:
            self.scores([prompt], [""])  # an error in the function shows now, not after the first rollout

    def __call__(self, responses: Responses):
        """-> rewards_B, float32."""
        scores = self.scores(responses.prompts, list(responses.texts))
        rewards_B = torch.tensor(scores, device=responses.ended_B.device)
        return rewards_B - self.missing_eos_penalty * ~responses.ended_B

    def scores(self, prompts: list[Prompt], texts: list[str]) -> list[float]:
        """One finite number per response."""
        scores = self.function_scores(prompts, texts) if self.function else self.model_scores(prompts, texts)
        if len(scores) != len(prompts):
            fail(f"{self.name} returned {len(scores)} rewards for {len(prompts)} responses", status=1)
        for score, text in zip(scores, texts):
            if not abs(score) < torch.finfo(torch.float32).max:  # nor NaN
                fail(f"{self.name} returned {score} for the response {text!r}", status=1)
        return scores

    def function_scores(self, prompts: list[Prompt], texts: list[str]) -> list[float]:
        names = {name for prompt in prompts for name in prompt.columns}
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        if any(prompt.messages for prompt in prompts):
            columns["messages"] = [prompt.messages for prompt in prompts]
        with shows_traceback(self.name, f" (columns: {', '.join(columns) or 'none'})"):
            scores = self.function([prompt.text for prompt in prompts], texts, **columns)
            scores = list(scores) if hasattr(scores, "__iter__") else scores
        try:
            return [float(score) for score in scores]
        except (TypeError, ValueError):
            fail(f"{self.name} returned {str(scores)[:80]}; expected a number for each response", status=1)

    @torch.no_grad()
    def model_scores(self, prompts: list[Prompt], texts: list[str]) -> list[float]:
        """A reward model reads texts, so it may have any tokenizer."""
        length = self.tokenizer.num_positions
        ids = [reward_model_ids(self.tokenizer, prompt, text, length) for prompt, text in zip(prompts, texts)]
        lengths_B = torch.tensor([len(row) for row in ids])
        scores_B = torch.empty(len(ids), device=self.backend.device)
        for rows, _ in micro_batches(lengths_B, self.backend.micro_batch_size):
            ids_BL, mask_BL = pad([ids[i] for i in rows], "right", self.backend.device)
            scores_B[rows] = self.scorer(ids_BL, mask_BL)
        return (scores_B - self.mean).tolist()


def function_from_file(spec) -> Callable[..., list[float]]:
    """`path/to/file.py:name` -> the function. No other code is ever loaded from a path."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{spec}: no such reward function; expected an existing file and a name, as in path/to/file.py:name")
    sys.path.append(str(Path(path).parent))  # it may import its neighbours
    with shows_traceback(spec):
        names = runpy.run_path(path)
    if not callable(names.get(name)):
        fail(f"{spec}: the file has no function {name!r}")
    return names[name]


@contextlib.contextmanager
def shows_traceback(spec, note="") -> Iterator[None]:
    """An error inside ends the run with the traceback of the user's file alone."""
    try:
        yield
    except Failure:
        raise
    except (Exception, SystemExit) as error:
        position = error.__traceback__
        while position and position.tb_frame.f_code.co_filename != spec.rpartition(":")[0]:
            position = position.tb_next
        *lines, last = traceback.format_exception(error.with_traceback(position))
        tqdm.write("".join(lines), file=sys.stderr, end="")
        fail(f"{spec} raised {last.strip()}{note}", status=1)


# ---------------------------------------------------------------- 4. Evaluation


def evaluate(policy, reference, prompts: list[Prompt], rewards, micro_batch_size) -> list[dict]:
    """Greedy responses to held-out prompts -> a dict each, on every rank. `rewards`: {name: function of responses}."""
    share = deal_out(prompts)
    first = len(share) if share[0].demonstration else 0  # demonstrations come before the greedy rows
    responses = rollout(policy, share, num_samples=0, greedy=True, demonstrations=first > 0)
    rewards_R = {name: reward(responses) for name, reward in rewards.items()}
    logprobs_RT = forward_all(policy, responses, micro_batch_size)
    greedy = responses[first:]
    ref_logprobs_BT = forward_all(reference, greedy, micro_batch_size)
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


# ================================================================ Nothing below is about reinforcement learning.
# ---------------------------------------------------------------- 5. Models and DeepSpeed


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
    micro_batch_size: int


def load_tokenizer(path):
    """The tokenizer, which also learns the numbers of the model's embeddings and positions."""
    absent = f"no folder {path} here, and no hub model of that name could be reached"
    with fails_with(f"{path}: no tokenizer could be loaded" if Path(path).is_dir() else absent):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not 0 < tokenizer.vocab_size <= config.vocab_size:  # 0 where the tokenizer's files are missing
        fail(f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, but the model {config.vocab_size:,}")
    tokenizer.num_embeddings = config.vocab_size  # added tokens may lie beyond them: `encode` looks
    tokenizer.num_positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return tokenizer


def load_model(path, auto_class, max_length, backend, new_head=False, **kwargs):
    """A model from safetensors, without noise, that takes texts of `max_length` tokens."""
    kwargs |= dict(dtype=getattr(torch, backend.dtype), attn_implementation=backend.attention)
    kwargs |= dict(use_safetensors=True, trust_remote_code=False)
    with fails_with(f"{path}: no model could be loaded"):
        model, info = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"] - ({"score.weight"} if new_head else set())):
        fail(f"{path}: has no weights for {', '.join(missing[:3])}, so it is not saved for {auto_class.__name__}")
    if "score.weight" in info["unexpected_keys"]:
        fail(f"{path}: is a reward model; expected a language model")
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


def load_policy(path, tokenizer, sampling: Sampling, backend) -> ResponseLogprobs:
    """A causal language model, checked to be one that we can train."""
    max_length = sampling.max_prompt_length + sampling.response_length
    model = load_model(path, transformers.AutoModelForCausalLM, max_length, backend)
    policy = ResponseLogprobs(model, tokenizer, sampling, backend.device)
    model.set_attn_implementation("eager")  # flash attention does not run on a CPU
    with fails_with(f"{path}: a {type(model).__name__} is not supported"):
        check_policy(policy)
    model.set_attn_implementation(backend.attention)
    return policy


@torch.no_grad()
def check_policy(policy):
    """Left-padded, in training mode and decoded with a cache, the model must agree with its plain forward."""
    tolerance = 1e-3 if policy.whole.dtype == torch.float32 else 0.1  # nats
    if policy.model.config.model_type == "phimoe":
        raise ValueError("its router is sampled in training and reads its jitter everywhere")
    if policy.model.base_model is policy.model:
        raise ValueError("it has no backbone below its head")
    text_BL = torch.tensor([[0, 1]])
    if policy.whole(text_BL).logits.isnan().any():
        raise ValueError("its weights are not finite")
    prompts_BP = F.pad(text_BL, (6, 0))
    mask_BP = (torch.arange(8) >= 6).long()[None]
    sampling = dataclasses.replace(policy.sampling, response_length=8)
    greedy_BT = generate(policy.whole, prompts_BP, mask_BP, [], sampling, num_samples=0, greedy=True)
    text_BL = torch.cat([text_BL, greedy_BT], 1)
    logits_BTV = policy.whole(text_BL).logits[:, 1:-1].float()
    plain_BTV = (logits_BTV / sampling.temperature).log_softmax(-1)
    plain_BT = plain_BTV.gather(-1, greedy_BT[..., None]).squeeze(-1)
    if not torch.allclose(policy(prompts_BP, mask_BP, greedy_BT), plain_BT, atol=tolerance):
        raise ValueError("it is not causal, minds padding, is noisy, or changes its logits after the output embedding")
    if not torch.allclose(plain_BTV.amax(-1), plain_BT, atol=tolerance):
        raise ValueError("it minds padding when it decodes with a cache")


def load_classifier(path, backend, max_length=0, new_head=False) -> tuple:
    """-> (a sequence classification model with one output, its tokenizer)."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        fail(f"{path}: the tokenizer has no EOS token, which ends what a reward model reads")
    auto_class = transformers.AutoModelForSequenceClassification
    model = load_model(path, auto_class, max_length, backend, new_head, num_labels=1)
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
        fail(f"{path}: {type(model).__name__} has no linear head `score` with one output, so it is no reward model")
    model.score.__class__ = ScalarHead  # the weights stay the same
    if model.config.pad_token_id is None:  # transformers takes batches only with one
        model.config.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


def load_value_model(reward_model, policy, sampling: Sampling, backend) -> ResponseValues:
    """Starts from a reward model that has the policy's tokenizer, else from the policy with a head of zeros."""
    max_length = sampling.max_prompt_length + sampling.response_length
    if reward_model:
        ours, its = load_tokenizer(policy), load_tokenizer(reward_model)
        if (ours.get_vocab(), ours.chat_template) == (its.get_vocab(), its.chat_template):
            return ResponseValues(load_classifier(reward_model, backend, max_length)[0])
    model, _ = load_classifier(policy, backend, max_length, new_head=True)
    nn.init.zeros_(model.score.weight)
    return ResponseValues(model)


def train_engine(module, backend, max_grad_norm):
    """A DeepSpeed engine that trains `module` by AdamW on float32 (master) weights."""
    dist.barrier()  # fails at once where a rank has ended; the engine's new group would wait for it, half an hour
    zero = dict(stage=backend.zero_stage)
    if backend.offload:
        zero["offload_optimizer"] = dict(device="cpu", pin_memory=backend.device.type == "cuda")
    if backend.gradient_checkpointing:
        module.model.activation_checkpointing_enable()
    config = dict(
        train_micro_batch_size_per_gpu=backend.micro_batch_size,
        gradient_accumulation_steps=2,  # several backwards per step (1 is wrong at ZeRO-1 and 2); `backward` ends them
        gradient_clipping=max_grad_norm,
        bf16=dict(enabled=backend.dtype == "bfloat16"),
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    # eps 1e-5: a smaller one lets the rounding differences between ranks and micro-batches grow.
    adamw = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, **adamw)  # optimizer_step sets the rate
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if backend.zero_stage == 0 and backend.world_size == 1:  # one rank need not copy gradients to average them
        engine.enable_backward_allreduce = False
    reset_optimizer(engine)  # bfloat16 ZeRO-0 has taken a step on zeros, which would spoil Adam's bias correction
    return engine


def reset_optimizer(engine):
    """Adam's moments and its count of steps are 0 again; frozen models that nobody uses any more leave the memory."""
    gc.collect()  # modules refer to each other in circles
    for state in engine.basic_optimizer.state.values():
        for value in state.values():
            value.zero_()


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
def whole_model(module) -> Iterator[nn.Module]:
    """The plain Hugging Face model behind an engine or a frozen module; its weights are gathered once for the block."""
    inner = module.module if isinstance(module, deepspeed.DeepSpeedEngine) else module
    sharded = [p for p in inner.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield inner.whole.to(module.device)


def backward(engine, loss, is_last):
    """Accumulates a micro-batch's gradients, unscaled; with the last one the engine averages them over the ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    one = 1 + 0 * loss.detach()  # or NaN: a loss that is not finite may have finite gradients, which must not count
    engine.backward(loss * one, scale_wrt_gas=False)


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


@torch.no_grad()
def save_and_check(engine, tokenizer, folder, load, inputs, backend):
    """A plain Hugging Face folder from any ZeRO stage; read again by load(folder, backend), it gives the same."""
    with whole_model(engine) as model:
        if backend.rank == 0:
            aside = folder.with_name(folder.name + ".tmp")  # then renamed: whole or absent
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            for path in aside.glob("*.safetensors"):  # which only their owner may read, so far
                shutil.copymode(aside / "config.json", path)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    trained = engine(*inputs).cpu()
    if backend.rank == 0:
        attention = backend.attention.replace("flash_attention_2", "sdpa")  # flash attention needs a GPU
        module = load(str(folder), dataclasses.replace(backend, attention=attention))
        saved = module(*(x.cpu() for x in inputs))
        errors = (saved - trained).abs() / trained.abs().clamp(min=1)
        if not errors.mean() < (1e-3 if backend.dtype == "float32" else 0.1):
            fail(f"{folder}: outputs of the saved model are off by {errors.mean():.2g}", status=1)
    dist.barrier()


# ---------------------------------------------------------------- 6. Data
#
# Files become rows, rows become prompts with the answers to learn from, and texts become token ids.
#
# A prompt is a text or chat messages, and so is an answer (chosen, rejected, completion). `load_prompts` tells the
# forms of a row apart by their shape, checks what it assumes, and says in the data's line which form it found:
#
#   prompt     answers                    how they are read
#   text       texts                      as they are; if all answers of a file repeat their prompts, these are cut off
#   text       whole conversations        the conversation is the prompt; the text must be a user's message of it
#   messages   texts, last messages       as they are
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
    if num_others or not num_repeating:  # some may do so by chance, or because the task is to repeat
        return num_repeating
    for exchange in exchanges:
        if isinstance(exchange.prompt, str):
            exchange.form = "texts; answers repeat the prompt, which is cut off"
            for column, answer in exchange.answers.items():
                if answer is not None:
                    exchange.answers[column] = answer.removeprefix(exchange.prompt)
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


# ---- Token ids


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


# ---------------------------------------------------------------- 7. The run


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path) -> list[dict]:
    """The lines of a file of ours, none if there is no file; a last line that was torn off is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def write_whole(path, text):
    """Atomic: readers see the old text or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def model_card(script, args: dict, metrics: dict, usage) -> str:
    """The README.md of a model's folder, as on the hub; `usage`: lines of Python that use the model."""
    text = f"---\nlibrary_name: transformers\n---\n# {args['model']} after {script}\n"
    blocks = {"In this folder": usage, "Flags": json.dumps(args, indent=2), "Metrics": json.dumps(metrics, indent=2)}
    for name, block in blocks.items():
        text += f"\n{name}:\n\n```\n{block.strip()}\n```\n"
    return text


def curve(name) -> str:
    """A metric's name in TensorBoard: its group, then itself."""
    if name.startswith("eval_"):
        return f"eval/{name}"
    if name.startswith(("seconds", "tokens", "peak_memory", "episodes", "update")):
        return f"time/{name}"
    if "reward" in name:
        return f"reward/{name}"
    return f"training/{name}" if name in ("loss", "value_loss", "grad_norm", "learning_rate") else f"policy/{name}"


def troubles(rows: list[dict]) -> dict[str, str]:
    """What has gone wrong, from a run's rows of metrics -> {name: a sentence that names the flag to turn}."""

    def last_are(metric, low, high):
        values = [row[metric] for row in rows[-3:] if metric in row]
        return len(values) == 3 and all(low < value < high for value in values)

    found = {}
    if last_are("entropy", -1, 0.02):
        found["entropy"] = "the policy has collapsed, it has one response to each prompt: lower --learning-rate"
    elif last_are("truncated_fraction", 0.5, 2):
        found["length"] = "most sampled responses are cut off: raise --response-length or --missing-eos-penalty"
    if last_are("kl", 100, math.inf) or rows[-1].get("eval_log_ratio", 0) > 100:
        found["drift"] = "the policy is over 100 nats from the initial one: lower --learning-rate"
    if last_are("reward_std", -1, 1e-6):
        found["reward"] = "all sampled responses have one reward, so nothing can be learned: look at samples.jsonl"
    if {"eval_gold_reward", "eval_reward"} <= rows[-1].keys():
        evaluations = [row for row in rows if "eval_gold_reward" in row]
        golds = [row["eval_gold_reward"] for row in evaluations]
        best = evaluations[golds.index(max(golds))]
        fell = max(golds) - golds[-1] > 0.25 * (max(golds) - min(golds))
        if len(golds) > 2 and fell and rows[-1]["eval_reward"] > best["eval_reward"]:
            change = f"eval_gold_reward fell from {max(golds):.2f} to {golds[-1]:.2f} since update {best['update']}"
            found["gold"] = f"the policy games its reward: {change}, while eval_reward rose; train less"
    return found


class Run:
    """A run's folder (args.json, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoint/) and its console."""

    def __init__(self, args, script, num_updates, *engines):
        name = [args.output_dir or f"runs/{Path(script).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"]
        while not args.output_dir and Path(name[0]).exists():  # another run of this second
            name[0] += "x"
        dist.broadcast_object_list(name)  # the ranks' clocks may differ
        self.folder = Path(name[0]).absolute()
        self.engines, self.is_main, self.signals = engines, dist.get_rank() == 0, []
        self.script = Path(script).name
        self.args = dataclasses.asdict(args) | dict(resume=None, output_dir=None, ranks=dist.get_world_size())
        self.last_checkpoint = 0
        if args.resume:
            with fails_with(f"--resume {self.folder}: there is no checkpoint (a run writes them with --save-every)"):
                self.last_checkpoint = int((self.folder / "checkpoint" / "latest").read_text())
            folder = self.folder / "checkpoint" / f"update-{self.last_checkpoint}"
            for i, engine in enumerate(engines):
                with fails_with(f"--resume {self.folder}: {folder} could not be read"):
                    if engine.load_checkpoint(str(folder), tag=f"engine-{i}")[0] is None:
                        raise OSError("it is not there or not whole")
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            started = (self.folder / "args.json").exists()
            if not started or any(row["update"] for row in read_rows(self.folder / "metrics.jsonl")):
                fail(f"--output-dir {self.folder} already holds a run or other files: choose another, or --resume it")
        dist.barrier()  # every rank has looked before rank 0 writes
        with fails_with(f"--output-dir {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)  # by all ranks, so that all fail alike
            if self.is_main:
                flags = json.dumps(self.args, indent=2) + "\n"
                write_whole(self.folder / "args.json", flags)
                for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
                    kept = [row for row in read_rows(path) if row["update"] <= self.last_checkpoint]
                    write_whole(path, json_lines(kept))  # nothing after the checkpoint
                for path in [] if self.last_checkpoint else self.folder.glob("events.*"):
                    path.unlink()
                self.writer = SummaryWriter(str(self.folder), purge_step=self.last_checkpoint + 1)
                self.writer.add_text("flags", f"```\n{flags}```")
        if self.last_checkpoint:
            print(f"Resumed after update {self.last_checkpoint} of {num_updates}")
        for name in ("model", "reward_model", "reward_function", "gold_reward_function"):
            if self.args.get(name):
                print(f"{name.replace('_', ' ').capitalize()}: {os.path.relpath(self.args[name])}")
        rows = read_rows(self.folder / "metrics.jsonl")
        self.rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        self.warned = set()
        self.bar = tqdm(total=num_updates, initial=self.last_checkpoint, unit="update", disable=not self.is_main)
        self.skipped = sum(engine.skipped_steps for engine in engines)
        self.faults = []  # the updates in a row that have skipped a step
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.hear)

    def hear(self, number, frame):
        self.signals.append(number)
        if self.is_main:
            print("\nStopping after this update …", file=sys.stderr)

    def log(self, update, metrics: dict[str, float]):
        """A row of metrics.jsonl (null for what is not finite), points of TensorBoard's curves, the progress bar."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
        metrics = dict(update=update, peak_memory_bytes=max(gather_rows([peak]))) | metrics
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json_lines([dict.fromkeys(metrics) | finite]))
            for name, value in metrics.items():
                self.writer.add_scalar(curve(name), value, update)
            self.rows.append(finite)
            names = ("reward", "gold_reward", "kl", "entropy") if "reward" in metrics else ("accuracy", "loss")
            self.show({name: metrics[name] for name in names if name in metrics})
            self.bar.update(update > 0)
            for name, sentence in troubles(self.rows).items():
                if name not in self.warned:
                    tqdm.write(f"warning, update {update}: {sentence}")
                    self.warned.add(name)
        skipped = metrics.get("skipped_updates", 0)
        self.faults = [*self.faults, update] if skipped > self.skipped else []
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
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json_lines([dict(update=update) | row for row in rows]))
        lines = []
        for row in rows[:10]:
            reward = f"[{row['reward']:6.2f}] " if "reward" in row else ""
            lines.append(f"    {reward}{row['prompt'][-120:]} ▸{row['response'][:400]}")
        self.writer.add_text("samples", "\n".join(lines), update)
        if not title:
            rewards = [row["reward"] for row in rows if "reward" in row]
            mean = f"mean reward {sum(rewards) / len(rewards):.2f} of " if rewards else ""
            title = f"{mean}greedy responses to held-out prompts"
        tqdm.write("\n".join([f"\nAfter {update} updates: {title}, such as", *lines[:3]]))

    def write_rows(self, name, rows: list[dict], size):
        """All ranks' rows to a file of their own, in groups of `size` that stay together."""
        groups = gather_rows([rows[i : i + size] for i in range(0, len(rows), size)])
        if self.is_main:
            write_whole(self.folder / name, json_lines([row for group in groups for row in group]))

    def save_checkpoint(self, update):
        """Written into a folder of the update's own, then named by `latest` in one atomic step: never torn."""
        folder = self.folder / "checkpoint"
        for i, engine in enumerate(self.engines):
            engine.save_checkpoint(str(folder / f"update-{update}"), tag=f"engine-{i}", save_latest=False)
        dist.barrier()
        if self.is_main:
            write_whole(folder / "latest", str(update))
            for old in folder.glob("update-*"):
                if old.name != f"update-{update}":
                    shutil.rmtree(old)

    def stop_if_asked(self, update):
        """After ctrl-C or SIGTERM at any rank: a checkpoint, a line that says how to go on, exit status 130 or 143."""
        number = max(gather_rows([*self.signals[:1], 0][:1]))
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
        first, last = self.rows[0], self.rows[-1]
        write_whole(self.folder / model / "README.md", model_card(self.script, self.args, last, usage))
        for name in first:
            if name.startswith("eval_") and name in last and not name.endswith(("_length", "_interval")):
                interval = f" ± {last[f'{name}_interval']:.2f}" if f"{name}_interval" in last else ""
                print(f"{name:24} {first[name]:6.2f} → {last[name]:6.2f}{interval}")
        for sentence in troubles(self.rows).values():
            print(f"Warning: {sentence}")
        print(f"Saved:   {self.folder / model} (checked; transformers' from_pretrained reads it)")
        print(f"Samples: {self.folder / 'samples.jsonl'}")
        print(f"Curves:  tensorboard --logdir {self.folder.parent}")

    def close(self):
        self.bar.close()
        if self.is_main:
            self.writer.close()
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------- 8. Flags, errors and processes


def fail(message, status=2) -> typing.NoReturn:
    """End with one line on standard error. Status 2 is bad input, which all ranks of a node see; one reports it."""
    if status != 2 or os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"error: {message}", file=sys.stderr)
    raise Failure(status)


class Failure(SystemExit):
    """The end of a run that `fail` has told of."""


@contextlib.contextmanager
def fails_with(message, status=2) -> Iterator[None]:
    """An error inside, or an exit, ends the run with one line: the message, then the error's first line."""
    try:
        yield
    except Failure:
        raise
    except (Exception, SystemExit) as error:
        text = getattr(error, "strerror", None) or str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""  # the lines of a .jsonl file are read alone
            text = f"no valid JSON: {error.msg} ({line}column {error.colno})"
        if not isinstance(error, (OSError, ValueError)):  # these two speak for themselves
            text = f"{type(error).__name__}: {text}"
        fail(f"{message}: {(text.strip() or type(error).__name__).splitlines()[0]}", status)


PositiveInt = typing.Annotated[int, lambda n: n > 0, "a whole number above 0"]
NonNegativeInt = typing.Annotated[int, lambda n: n >= 0, "a whole number, 0 or above"]
PositiveFloat = typing.Annotated[float, lambda x: 0 < x < math.inf, "a number above 0"]
NonNegativeFloat = typing.Annotated[float, lambda x: 0 <= x < math.inf, "a number, 0 or above"]
Fraction = typing.Annotated[float, lambda x: 0 <= x <= 1, "a number from 0 to 1"]
PathOrName = typing.Annotated[str, lambda path: path != "", "a path"]


def check_flags(args):
    """Refuses values that their types do not accept, and makes paths absolute: --resume works from any folder."""
    for field in dataclasses.fields(args):
        flag = f"--{field.name.replace('_', '-')}"
        value = getattr(args, field.name)
        kinds = [kind for kind in (field.type, *typing.get_args(field.type)) if hasattr(kind, "__metadata__")]
        if value is None or not kinds:
            continue
        accepts, expected = kinds[0].__metadata__
        if not accepts(value):
            fail(f"{flag} {value!r} is not {expected}")
        if kinds[0] == PathOrName:
            folder = HERE if value == field.default else Path.cwd()  # the example lies beside this file
            if (folder / value.partition(":")[0]).exists():  # else it is a hub name
                setattr(args, field.name, os.path.abspath(folder / value))
            elif value.startswith("examples/") and not args.resume:
                fail(f"{flag}: {HERE} has no {value}: give --model, --dataset and a reward of your own")
    if args.attention == "flash_attention_2" and args.dtype == "float32":
        fail("--attention flash_attention_2 computes in 16 bits only: add --dtype bfloat16")
    if args.offload and args.zero_stage == 0:
        fail("--offload keeps the optimizer state in CPU memory, which needs --zero-stage 1, 2 or 3")


def forget_example(args):
    """Takes back the example's paths where they do not fit: beside the user's own model, data or reward."""
    given = [word.partition("=")[0].replace("-", "_") for word in sys.argv]
    values = vars(args)
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    forgotten = []
    if any(values.get(name) != defaults.get(name) for name in ("model", "dataset")):
        forgotten = ["dataset", "eval_dataset", "reward_model"]
    elif values.get("reward_function"):
        forgotten = ["reward_model"]
    for name in forgotten:
        if name in values and f"__{name}" not in given:
            setattr(args, name, None)
    if not args.dataset:
        fail(f"--model {args.model} is your own: give --dataset, too (the example's is for the example's model)")


def parse_args(Args):
    """The command line as an `Args`. `--resume D` takes D/args.json for defaults and refuses a flag that differs."""
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # added by `deepspeed`
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        sys.stdout = open(os.devnull, "w")  # errors of any rank still go to standard error

    def parse(**kwargs):
        with contextlib.redirect_stderr(sys.stderr if is_main else io.StringIO()):  # all ranks see the same flags
            args = tyro.cli(Args, prog=Path(sys.argv[0]).name, **kwargs)
        if not args.resume:
            forget_example(args)
        check_flags(args)
        return args

    args = parse()
    if not args.resume:
        return args
    with fails_with(f"--resume {args.resume}: no readable args.json there"):
        saved = dict(json.loads(Path(args.resume, "args.json").read_text(encoding="utf-8")))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if saved.pop("ranks", ranks) != ranks:
        fail(f"--resume {args.resume}: that run had another number of ranks than {ranks}")
    if saved.keys() != {field.name for field in dataclasses.fields(Args)}:
        fail(f"--resume {args.resume}: its args.json is of another script or version")
    resumed = Args(**saved | dict(resume=args.resume, output_dir=args.resume))
    args = parse(default=resumed)
    for flag, old in dataclasses.asdict(resumed).items():
        if (new := getattr(args, flag)) != old:
            longer = "; to train longer, start a run from its policy" if flag == "total_episodes" else ""
            fail(f"--{flag.replace('_', '-')} {new} differs from the run in {args.resume}, which had {old}{longer}")
    return args


def start_processes(args) -> Backend:
    """Join the process group, also as the only process."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it only speeds up CPUs, and compiles for a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)  # any free port
    for name, value in (alone | dict(TOKENIZERS_PARALLELISM="false")).items():
        os.environ.setdefault(name, str(value))  # set by torchrun and deepspeed
    deepspeed.init_distributed(verbose=False)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(Backend)[3:]}  # flags, too
    return Backend(dist.get_rank(), dist.get_world_size(), device, **settings)


def set_seed(*numbers):
    """Seed torch, numpy and random from several numbers. Each update seeds its own, so no random state is saved."""
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
    """This rank's share. A few items come twice where they do not divide evenly: ranks must take equal steps."""
    world_size = dist.get_world_size()
    share = math.ceil(len(items) / world_size)
    return [items[i % len(items)] for i in range(dist.get_rank(), share * world_size, world_size)]


def gather_rows(rows) -> list:
    """All ranks' lists on every rank; dealt-out items come back in their order, the few that came twice last."""
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
