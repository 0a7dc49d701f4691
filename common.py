"""Code that the scripts share. Nothing here knows an algorithm, and functions share no state: copy what you need.

About reinforcement learning: 1 rollout · 2 log-probabilities and values · 3 rewards · 4 evaluation.
About everything else: 5 models and DeepSpeed · 6 data · 7 the run · 8 flags, errors and processes.

Names carry their shape: B rows, P prompt tokens (left-padded), T response tokens (right-padded), L both, V vocabulary,
D width, R all rows of a rollout, N any number. Logits at t predict token t + 1. Response masks include the first EOS.
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import datetime
import fcntl
import gc
import hashlib
import io
import json
import logging
import math
import os
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

HERE = Path(__file__).resolve().parent

# What must happen before torch is imported. That takes seconds: where a script of this folder is the program, ctrl-C
# ends it without a traceback, until its run begins.
PROGRAM = getattr(sys.modules["__main__"], "__file__", None)
if PROGRAM and Path(PROGRAM).resolve().parent == HERE:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import huggingface_hub
import pydantic
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
    texts: list[str]  # without special tokens
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
    texts = decode(policy.tokenizer, tokens)
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


def decode(tokenizer, tokens: list[list[int]]) -> list[str]:
    """Texts of responses as they stand after a prompt: some tokenizers drop the leading space of a text alone."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(anchor, skip_special_tokens=True))
    texts = tokenizer.batch_decode([anchor + row for row in tokens], skip_special_tokens=True)
    return [text[start:] for text in texts]


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
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if backend.rank == 0:
            aside = folder.with_name(folder.name + ".tmp")  # then renamed: whole or absent
            with writing(folder.parent, size):
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


def load_rows(path, config=None, split="train") -> list[tuple[str, dict]]:
    """Rows of a local .jsonl, .csv, .json or .parquet file or of a hub data set -> [(where it stands, row)]."""
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".json", ".csv"):  # `datasets` does not know the line of an error, and parses dates
        with fails_with(path):
            data = Path(path).read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            fail(f"{path}:{line}: not UTF-8: convert the file to UTF-8")
        rows = list(read_csv(path, text) if suffix == ".csv" else read_json(path, text, suffix == ".jsonl"))
    else:
        import datasets  # slow to import, and only needed here

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)
        with fails_with(path):
            is_file = suffix == ".parquet"
            table = datasets.Dataset.from_parquet(path) if is_file else datasets.load_dataset(path, config, split=split)
        rows = [(f"{path}: row {number}", row) for number, row in enumerate(table, start=1)]
    if not rows:
        fail(f"{path}: no rows")
    return rows


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


def read_csv(path, text) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                fail(f"{path}:{reader.line_num}: not {len(reader.fieldnames)} columns, as in the first line")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:  # such as a quote that is never closed, which would swallow the rest of the file
        fail(f"{path}:{reader.line_num + 1}: {error}")


def read_column(row, column, where) -> str | list[dict]:
    """A text or chat messages."""
    if column not in row:
        names = ", ".join(map(str, row)) or "no others"
        fail(f"{where}: no column {column!r}; there are: {names} (the flags in -column name them)")
    value = row[column]
    try:
        if not isinstance(value, str):
            [message["role"] + message["content"] for message in value][0]
    except (TypeError, KeyError, IndexError):
        fail(f"{where}: {column!r} is {str(value)[:40]}; expected a text or a list of {{role, content}} messages")
    return value


def read_response(prompt: Prompt, column) -> str:
    """The text in a column of the prompt's row, of chat messages the last content."""
    value = read_column(prompt.columns, column, prompt.where)
    if isinstance(value, str):
        return value
    if len(value) > 1 and not prompt.messages:
        fail(f"{prompt.where}: {column!r} is a conversation, the prompt a text: make its earlier messages the prompt")
    return value[-1]["content"]


def read_prompt(row, column, where, tokenizer) -> tuple[str, list[dict] | None]:
    """-> (text, messages); of a chat, the template's text up to the assistant's turn, without an answer at the end."""
    value = read_column(row, column, where)
    if isinstance(value, str):
        return value, None
    messages = value[:-1] if value[-1]["role"] == "assistant" else value
    if not messages:
        fail(f"{where}: {column!r} holds an answer alone; expected the messages before it")
    return chat_text(tokenizer, messages, f"{where}: {column!r}", add_generation_prompt=True), messages


def chat_text(tokenizer, messages, where, **kwargs) -> str:
    if not tokenizer.chat_template:
        fail(f"{where} holds chat messages, but the model's tokenizer has no chat template")
    with fails_with(f"{where}: the chat template refuses the messages"):  # such as an order of roles
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def load_prompts(path, hub, column, tokenizer, max_length) -> list[Prompt]:
    """Prompts cut on the left to `max_length` tokens (a BOS stays in front). `hub`: (configuration, split)."""
    prompts, lengths, num_empty, num_answers = [], [], 0, 0
    for where, row in load_rows(path, *hub):
        text, messages = read_prompt(row, column, where, tokenizer)
        ids = encode(tokenizer, text, add_special_tokens=messages is None)  # a chat template writes its own
        columns = {name: value for name, value in row.items() if name != column}
        num_answers += messages is not None and len(messages) < len(row[column])
        if text.strip() and ids:
            lengths.append(len(ids))
            prompts.append(Prompt(text, cut_left(ids, max_length, tokenizer.bos_token_id), columns, where, messages))
        else:
            num_empty += 1
    if not prompts:
        fail(f"{path}: every prompt is empty")
    counts = {"empty, dropped": num_empty, "lost the answer at their end": num_answers}
    report(path, len(prompts), "prompts", counts)
    report_lengths(lengths, max_length, "--max-prompt-length", "prompts", "lose their beginning")
    return prompts


def report(path, size, rows, counts: dict[str, int]):
    notes = [f"{count:,} {name}" for name, count in counts.items() if count]
    print(f"{os.path.relpath(path)}, {rows}: {size:,}" + (f" ({', '.join(notes)})" if notes else ""))


def report_lengths(lengths: list[int], limit, flag, rows, loss):
    """Says how many rows are too long; if they are more than a tenth, as a warning."""
    count = sum(length > limit for length in lengths)
    if count:
        most = sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]
        sign = "warning: " if count > len(lengths) / 10 else ""
        found = f"{sign}{count:,} of {len(lengths):,} {rows} are longer than {flag} {limit} and {loss}"
        print(f"{found}; 95 % have at most {most:,} tokens")


def train_and_held_out(load, dataset, eval_dataset, size) -> tuple[list, list]:
    """-> (training rows, held-out rows); without an evaluation data set, `size` random rows are held out."""
    print("Data:")
    rows = load(dataset)
    if not size:
        return rows, []
    print("Held-out data:")
    if eval_dataset:
        return rows, load(eval_dataset)[:size]
    if len(rows) < 2:
        fail(f"{dataset}: its one row cannot be both trained on and held out: give --eval-dataset")
    rows = [rows[i] for i in shuffled_indices(len(rows), 0, 0, len(rows))]
    size = min(size, len(rows) // 2)
    print(f"{size:,} of them, which are not trained on")
    return rows[size:], rows[:size]


def encode(tokenizer, text, **kwargs) -> list[int]:
    """The ids of a text, with one BOS at the most: a text that a template has written may begin with its own."""
    ids = tokenizer(text, **kwargs)["input_ids"]
    if max(ids, default=0) >= tokenizer.num_embeddings:
        fail(f"{tokenizer.name_or_path}: has no embedding of {tokenizer.decode([max(ids)])!r}, which a text contains")
    return ids[1:] if ids[:2] == 2 * [tokenizer.bos_token_id] else ids


def encode_response(tokenizer, text) -> list[int]:
    """The ids of a text as it stands after a prompt (alone, some tokenizers begin it with a space), with one EOS."""
    if tokenizer.eos_token_id is None:
        fail(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, which ends a response")
    ids = encode(tokenizer, text, add_special_tokens=False)
    if decode(tokenizer, [ids]) != [text]:
        anchor = encode(tokenizer, "\n", add_special_tokens=False)
        ids = encode(tokenizer, "\n" + text, add_special_tokens=False)
        ids = ids[len(anchor) :]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


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
# A run is a folder. All that a person or --resume needs is there, as text that can be read while the run goes on.
# A process may die at any moment: files are replaced as a whole, or they grow by lines of which the last may be torn.

# The flags whose files --resume reads again, and that a model card shows without their folders.
INPUTS = ("model", "dataset", "eval_dataset", "reward_model", "reward_function", "gold_reward_function")
# In a folder, such as a model's, these files matter. Others, such as a README, may come and go.
INPUT_KINDS = ".json .jsonl .csv .parquet .arrow .safetensors .jinja .model .txt".split()
# What the system, torch and safetensors say when a disk is full.
DISK_IS_FULL = ("No space left", "quota exceeded", "PytorchStreamWriter", "inline_container.cc", "iostream error")
# Evaluations of which the greatest value is the best; of eval_loss it is the smallest.
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


def public_name(value) -> str:
    """A path flag as others may read it: a hub name, a path inside this project, or a last name without its folders."""
    path = file_of(value)
    if not path.is_absolute():
        return value
    shown = path.relative_to(HERE) if path.is_relative_to(HERE) else path.name
    return value.replace(str(path), str(shown))


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


def one_screen_line(text, limit, end=False) -> str:
    """A text on one line, at most `limit` characters of its beginning or its end, with … where it is cut."""
    text = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎")
    if len(text) <= limit:
        return text
    return f"…{text[-limit:]}" if end else f"{text[:limit]}…"


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
                path, _ = engine.load_checkpoint(str(folder), tag=f"engine-{i}")
                if path is None:
                    raise OSError("it is not there or not whole")

    def save_checkpoint(self, update):
        """Written into a folder of the update's own, then named by `latest` in one atomic step: never torn."""
        folder = self.folder / "checkpoint"
        with writing(self.folder, self.checkpoint_bytes):
            for i, engine in enumerate(self.engines):
                engine.save_checkpoint(str(folder / f"update-{update}"), tag=f"engine-{i}", save_latest=False)
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


# ---------------------------------------------------------------- 8. Flags, errors and processes
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
    if own and "model" not in has_own and values.get("model", "").startswith("examples/"):
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


def start_processes(*, dtype, attention, zero_stage, offload, gradient_checkpointing, micro_batch_size) -> Backend:
    """Joins the process group, also as the only process."""
    if attention == "flash_attention_2" and dtype == "float32":
        fail("--attention flash_attention_2 computes in 16 bits only: add --dtype bfloat16")
    if offload and zero_stage == 0:
        fail("--offload keeps the optimizer state in CPU memory, which needs --zero-stage 1, 2 or 3")
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
        micro_batch_size=micro_batch_size,
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
