"""What the scripts share and what does not teach an algorithm: flags, data, models, rollout, rewards, evaluation, logging, checkpoints.

Nothing in this file knows an algorithm, and no function reads a global: copy the functions that you need.

Names carry their shape: B rows, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary, D width, R rows of a
rollout (several per prompt). Logits at position t predict token t + 1. A response mask is 1 up to and including the first EOS.

Sections: 1 flags and errors · 2 processes · 3 data · 4 models and DeepSpeed · 5 rollout · 6 rewards · 7 evaluation · 8 the run's folder
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.util
import itertools
import json
import logging
import math
import os
import resource
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning that no accelerator was found
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_TQDM", "1")  # the libraries' own bars; this file makes its bar with disable=False
import deepspeed  # noqa: E402
import transformers  # noqa: E402

# A C++ op that only makes CPU collectives faster and takes a minute to compile on first use.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE / "examples" / "reviews"


# ---------------------------------------------------------------- 1. Flags and errors


def fail(message: str, status: int = 2) -> NoReturn:
    """End with one line on standard error. Status 2 is for bad input, which every rank sees alike: only rank 0 prints."""
    if status != 2 or os.environ.get("RANK", "0") == "0":
        tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _flag(kind: type, accepts: Callable[[Any], bool], wanted: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """A tyro flag type that says what it wants when it gets something else."""

    def parse(texts: list[str]):
        try:
            value = kind(texts[0])
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise ValueError(f"{texts[0]!r} is not {wanted}")
        return value

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


def _absolute(path: str) -> str:
    """Absolute where it exists (so that --resume works from any folder), else as it is: a hub name."""
    file, suffix, name = path.partition(".py:")
    return os.path.abspath(file + suffix[:3]) + suffix[3:] + name if os.path.exists(file + suffix[:3]) else path


def _shorten(path: str) -> list[str]:
    return [str(Path(path).relative_to(HERE)) if Path(path).is_relative_to(HERE) else path]


PositiveInt = Annotated[int, _flag(int, lambda n: n > 0, "a whole number above 0")]
NonNegativeInt = Annotated[int, _flag(int, lambda n: n >= 0, "a whole number, 0 or above")]
PositiveFloat = Annotated[float, _flag(float, lambda x: 0 < x < math.inf, "a number above 0")]
NonNegativeFloat = Annotated[float, _flag(float, lambda x: 0 <= x < math.inf, "a number, 0 or above")]
Fraction = Annotated[float, _flag(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")]
PathOrName = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: _absolute(texts[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=_shorten,
    ),
]


def parse_args(Args: type):
    """The command line as an `Args`. `--resume D` takes D/args.json for defaults and refuses every flag that differs from it."""
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # added by `deepspeed`
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks; errors go to standard error
    script = Path(sys.argv[0]).stem
    args = tyro.cli(Args, prog=f"{script}.py")
    if not args.resume:
        return args
    folder = os.path.abspath(args.resume)
    try:
        saved = json.loads(Path(folder, "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"--resume {args.resume}: no readable args.json there ({error})")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if saved.pop("ranks", ranks) != ranks:
        fail(f"--resume {args.resume}: that run had another number of ranks than {ranks}")
    try:
        resumed = Args(**saved | {"resume": folder, "output_dir": folder})
    except TypeError as error:
        fail(f"--resume {args.resume}: its args.json is of another script or version ({error})")
    args = tyro.cli(Args, prog=f"{script}.py", default=resumed)
    for field in dataclasses.fields(Args):
        new, old = getattr(args, field.name), getattr(resumed, field.name)
        if new != old and field.name != "resume":
            fail(f"--{field.name.replace('_', '-')} {new} differs from the run in {folder}, which had {old}")
    return dataclasses.replace(args, resume=folder)


# ---------------------------------------------------------------- 2. Processes


def start_processes() -> tuple[int, int, torch.device]:
    """Join the process group, also as the only process -> (rank, number of ranks, this rank's device)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free.getsockname()[1])
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))  # set by torchrun and deepspeed
    deepspeed.init_distributed(verbose=False)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def set_seed(*numbers: int) -> None:
    """Seed torch, numpy and random from several numbers, so that random states need no saving: each update seeds its own."""
    bits = torch.Generator().manual_seed(sum(n * 1_000_003**i for i, n in enumerate(numbers)) % 2**63)
    transformers.set_seed(int(torch.randint(2**32, (), generator=bits)))


def gather_rows(rows: list, world_size: int) -> list:
    """All ranks' lists, interleaved: what was dealt out as `items[rank::world_size]` comes back as `items`, on every rank."""
    parts = [None] * world_size
    dist.all_gather_object(parts, rows)
    return [row for group in itertools.zip_longest(*parts) for row in group if row is not None]


def plan_updates(total_episodes: int, batch_size: int, world_size: int) -> tuple[int, int]:
    """-> (rows per rank and update, number of updates)."""
    if batch_size % world_size:
        fail(f"--batch-size {batch_size} cannot be dealt out evenly to {world_size} ranks: take a multiple of {world_size}")
    if total_episodes < batch_size:
        fail(f"--total-episodes {total_episodes} is less than one update of --batch-size {batch_size}")
    return batch_size // world_size, total_episodes // batch_size


def global_means(device: torch.device, **values: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Means over the real entries of all ranks, with one collective. A value is a tensor, or a pair (tensor, mask of its shape)."""
    pairs = [v if isinstance(v, tuple) else (v, torch.ones_like(v)) for v in values.values()]
    sums = torch.stack([torch.stack([(x * mask).sum(), mask.sum()]).double() for x, mask in pairs]).to(device)
    dist.all_reduce(sums)
    return {name: (total / count).item() for name, (total, count) in zip(values, sums.cpu(), strict=True)}


# ---------------------------------------------------------------- 3. Data


def load_rows(path: str, split: str = "train") -> list[tuple[str, dict]]:
    """Rows of a local .jsonl, .json, .csv or .parquet file or of a hub data set -> [(where it stands, row)].

    Local text files are read with the standard library, which knows the line of an error (`datasets` does not).
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".json", ".csv"):
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except OSError as error:
            fail(f"{path}: {error.strerror or error}")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            fail(f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8")
        read = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[suffix]
        rows = list(read(path, text))
    else:
        import datasets  # slow to import, and only wanted here

        datasets.disable_progress_bars()
        try:
            if suffix == ".parquet":
                table = datasets.Dataset.from_parquet(path)
            else:
                table = datasets.load_dataset(path, split=split)
        except Exception as error:  # whatever the hub, the network or the file may raise
            fail(f"--dataset {path}: {str(error).splitlines()[0]}")
        rows = [(f"{path}: row {i + 1}", row) for i, row in enumerate(table)]
    if not rows:
        fail(f"{path}: no rows")
    return rows


def _read_jsonl(path: str, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            fail(f"{path}:{number}: not JSON ({error}): one object per line is wanted")
        if not isinstance(row, dict):
            fail(f"{path}:{number}: a JSON object is wanted, here is a {type(row).__name__}")
        yield f"{path}:{number}", row


def _read_json(path: str, text: str) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        fail(f"{path}: not JSON ({error}); for one object per line name the file .jsonl")
    if not isinstance(rows, list):
        fail(f"{path}: a list of objects is wanted")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            fail(f"{path}: entry {number}: an object is wanted, here is a {type(row).__name__}")
        yield f"{path}: entry {number}", row


def _read_csv(path: str, text: str) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    for row in reader:
        if None in row or None in row.values():
            fail(f"{path}:{reader.line_num}: {len(reader.fieldnames)} columns are wanted")
        yield f"{path}:{reader.line_num}", row


def read_text(row: dict, column: str, where: str, tokenizer) -> str:
    """The text in a column; chat messages become text by the tokenizer's chat template, ready for the assistant's turn."""
    if column not in row:
        fail(f"{where}: no column {column!r}; there are: {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, str):
        return value
    if not (isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)):
        kind = "null" if value is None else f"a {type(value).__name__}"
        fail(f"{where}: column {column!r} is {kind}; a text or a list of {{role, content}} messages is wanted")
    if not tokenizer.chat_template:
        fail(f"{where}: column {column!r} holds chat messages, but the model's tokenizer has no chat template")
    return tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)


@dataclasses.dataclass
class Batch:
    """Prompts of one rank: their texts as the data set has them, the data set's other columns, and left-padded tokens."""

    texts: list[str]
    columns: dict[str, list]
    prompts_BP: torch.Tensor
    prompt_mask_BP: torch.Tensor


@dataclasses.dataclass
class Prompts:
    """Prompts of a data set, in memory."""

    texts: list[str]
    ids: list[list[int]]
    columns: dict[str, list]

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        ids = [self.ids[i] for i in indices]
        width = max(map(len, ids))
        # Padding is told from text by the mask alone, so any id would do, and an EOS id inside a prompt is just a token.
        prompts_BP = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        prompt_mask_BP = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Batch([self.texts[i] for i in indices], columns, prompts_BP.to(device), prompt_mask_BP.to(device))


def load_prompts(path: str, split: str, column: str, tokenizer, max_length: int) -> Prompts:
    """Prompts truncated from the left to `max_length` tokens (a BOS stays in front); empty ones are dropped and counted."""
    prompts, dropped, truncated, names = Prompts([], [], {}), 0, 0, {}
    for where, row in load_rows(path, split):
        text = read_text(row, column, where, tokenizer)
        # A chat template writes its own BOS.
        ids = tokenizer(text, add_special_tokens=isinstance(row[column], str))["input_ids"]
        if not text.strip() or not ids:
            dropped += 1
            continue
        if len(ids) > max_length:
            truncated += 1
            bos = [ids[0]] if ids[0] == tokenizer.bos_token_id and max_length > 1 else []
            ids = bos + ids[len(ids) - max_length + len(bos) :]
        prompts.texts.append(text)
        prompts.ids.append(ids)
        names |= dict.fromkeys(row)
        for name in names:  # a column that only some rows have is None in the others
            prompts.columns.setdefault(name, [None] * (len(prompts.ids) - 1)).append(row.get(name))
    prompts.columns.pop(column, None)
    if not prompts.ids:
        fail(f"{path}: every prompt is empty")
    notes = [f"{n:,} {what}" for n, what in ((dropped, "empty dropped"), (truncated, f"cut to {max_length} tokens")) if n]
    print(f"{len(prompts.ids):,} prompts from {_shorten(path)[0]}" + (f" ({', '.join(notes)})" if notes else ""))
    return prompts


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def shuffled_indices(size: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start … start + count of an endless stream of shuffled epochs: the position in the data is a number, not a state."""
    return [_permutation(size, seed * 1_000_003 + i // size)[i % size] for i in range(start, start + count)]


# ---------------------------------------------------------------- 4. Models and DeepSpeed


def load_tokenizer(path: str):
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a missing folder, a broken file, no network: each library level raises its own
        fail(f"{path}: no tokenizer could be loaded: {str(error).splitlines()[0]}")


def load_model(path: str, auto_class, dtype: str, attention: str, **kwargs):
    """A model of a local folder or a hub name, in safetensors, without dropout, in training mode (for gradient checkpointing)."""
    try:
        model, info = auto_class.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except Exception as error:
        fail(f"{path}: no model could be loaded: {str(error).splitlines()[0]}")
    if info["missing_keys"]:
        fail(f"{path}: has no weights for {', '.join(sorted(info['missing_keys'])[:3])}: not a model for {auto_class.__name__}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # in the modules: config fields differ from one architecture to the next
    return model.train()


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a response: chat models often have several."""
    ids = model.generation_config.eos_token_id
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    if not (ids := sorted(ids - {None})):
        fail("neither the model's generation_config nor its tokenizer names an EOS token: responses could never end")
    return ids


def check_length(model, max_prompt_length: int, response_length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and max_prompt_length + response_length > limit:
        fail(f"--max-prompt-length {max_prompt_length} + --response-length {response_length} exceeds the model's {limit} positions")


def position_ids(mask_BL: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only: without them learned positions are wrong under left padding."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)


class ResponseLogprobs(nn.Module):
    """A causal language model as the function that is trained: prompts and responses -> log-probabilities of the response tokens.

    Policy and reference are both called through it. `whole` is the same model for decoding and saving: it shares every
    Parameter object, but never gets ZeRO-3's hooks or gradient checkpointing.
    """

    def __init__(self, model):
        super().__init__()
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        self.__dict__["whole"] = copy.deepcopy(model, shared).eval()  # __dict__: not a submodule
        self.model = model
        probe = torch.arange(4)[None]
        with torch.no_grad():
            direct = self.whole(probe).logits[:, 1:3].float().log_softmax(-1).gather(-1, probe[:, 2:, None]).squeeze(-1)
            if not torch.allclose(direct, self(probe[:, :2], torch.ones_like(probe[:, :2]), probe[:, 2:], 1.0), atol=0.1):
                fail(f"{type(model).__name__} changes its logits after the output embedding, which is not supported")

    def forward(self, prompts_BP, prompt_mask_BP, responses_BT, temperature: float) -> torch.Tensor:
        """-> logprobs_BT, float32, of the distribution that is sampled: softmax(logits / temperature)."""
        ids_BL = torch.cat([prompts_BP, responses_BT], 1)
        mask_BL = torch.cat([prompt_mask_BP, torch.ones_like(responses_BT)], 1)  # what follows EOS is masked in the loss
        inputs = dict(input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_ids(mask_BL), use_cache=False)
        hidden_BLD = self.model.base_model(**inputs).last_hidden_state
        hidden_ND = hidden_BLD[:, prompts_BP.shape[1] - 1 : -1].flatten(0, 1)  # only what predicts a response token
        head = self.model.get_output_embeddings()

        def logprobs(hidden_ND, tokens_N):
            return -F.cross_entropy(head(hidden_ND).float() / temperature, tokens_N, reduction="none")

        # The vocabulary dwarfs all else, so at most 2^25 logits (128 MiB in float32) are alive; backward computes them again.
        size = max(1, 2**25 // self.model.config.vocab_size)
        chunks = list(zip(hidden_ND.split(size), responses_BT.flatten().split(size), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([logprobs(*chunk) for chunk in chunks]).view_as(responses_BT)
        return torch.cat([checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks]).view_as(responses_BT)


def train_engine(
    module: nn.Module,
    device: torch.device,
    *,
    learning_rate: float,
    max_grad_norm: float,
    dtype: str,
    zero_stage: int,
    offload: bool,
    gradient_checkpointing: bool,
    micro_batch_size: int,
    micro_batches: int,
):
    """A DeepSpeed engine that trains `module` with AdamW on float32 (master) weights."""
    if offload and zero_stage == 0:
        fail("--offload keeps the optimizer state in CPU memory, which needs --zero-stage 1, 2 or 3")
    if gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    zero = dict(stage=zero_stage) | (dict(offload_optimizer=dict(device="cpu", pin_memory=device.type == "cuda")) if offload else {})
    config = dict(
        train_micro_batch_size_per_gpu=micro_batch_size,
        # With 1 here and several backwards per step ZeRO-1 and 2 would keep only the last one's gradients.
        gradient_accumulation_steps=micro_batches,
        gradient_clipping=max_grad_norm,
        bf16=dict(enabled=dtype == "bfloat16"),
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        steps_per_print=None,
    )
    # eps 1e-5: a smaller one lets the rounding differences between ranks and micro-batches grow.
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    for state in optimizer.state.values():
        state["step"].zero_()  # the bfloat16 optimizer of ZeRO-0 warms up with a step, which would spoil Adam's bias correction
    for name, buffer in buffers.items():  # the engine rounds buffers to bfloat16 too, but rotary frequencies need float32
        parent, _, leaf = name.rpartition(".")
        setattr(engine.module.get_submodule(parent), leaf, buffer.to(device))
    return engine


def freeze(module: nn.Module, device: torch.device, zero_stage: int, offload: bool) -> nn.Module:
    """A model that is only read: resident on the device, or in CPU memory between uses, or sharded under ZeRO-3."""
    module.requires_grad_(False).eval()
    if zero_stage == 3:
        zero = dict(stage=3) | (dict(offload_param=dict(device="cpu")) if offload else {})
        return deepspeed.initialize(model=module, config=dict(train_micro_batch_size_per_gpu=1, zero_optimization=zero))[0]
    return module if offload else module.to(device)


@contextlib.contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Bring an offloaded frozen model to the device while it is used."""
    home = next(module.parameters()).device
    moved = home != device and not hasattr(module, "module")  # an engine moves its own weights
    if moved:
        module.to(device)
    yield
    if moved:
        module.to(home)


@contextlib.contextmanager
def whole_model(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The plain Hugging Face model behind an engine or a frozen module, with its weights gathered once for the whole block."""
    inner = getattr(module, "module", module)
    parameters = list(inner.parameters())
    with resident(module, device), deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        yield inner.whole.to(device)


def micro_batches(rows: int, size: int) -> Iterator[tuple[slice, bool]]:
    """-> (slice of rows, whether it is the last)."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows)), start + size >= rows


def backward(engine, loss: torch.Tensor, last: bool) -> None:
    """Add a micro-batch's gradients; with the last one they are averaged over ranks. Nothing is divided by their number."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def optimizer_step(engine, learning_rate: float) -> tuple[float, bool]:
    """Clip and step -> (gradient norm before clipping, whether the step was skipped because the norm was not finite)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():  # here the engine neither tells nor checks the norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            engine.zero_grad()
            return norm.item(), True
        engine.step()
        return norm.item(), False
    engine.step()
    skipped = not engine.was_step_applied()
    return (math.nan if skipped else float(engine.get_global_grad_norm())), skipped


def scheduled(peak: float, schedule: str, warmup_ratio: float, update: int, num_updates: int) -> float:
    """The learning rate of an update (1 … num_updates): linear warm-up from 0, then constant, or down to 0."""
    warmup = math.ceil(warmup_ratio * num_updates)
    if update <= warmup:
        return peak * update / warmup
    progress = (update - 1 - warmup) / max(1, num_updates - warmup)
    return peak * {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]


def save_model(module: nn.Module, tokenizer, folder: Path, device: torch.device) -> None:
    """A plain Hugging Face folder from any ZeRO stage, complete or absent: written aside, then renamed."""
    with whole_model(module, device) as model:
        if dist.get_rank() == 0:
            aside = folder.with_name(folder.name + ".tmp")
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    dist.barrier()


@torch.no_grad()
def check_saved(policy, folder: Path, responses: "Responses", temperature: float, dtype: str, attention: str) -> None:
    """Reload a saved model and compare its log-probabilities with those of the trained one."""
    inputs = (responses.prompts_BP, responses.prompt_mask_BP, responses.tokens_BT, temperature)
    trained_BT = policy(*inputs)
    if dist.get_rank() == 0:
        model = ResponseLogprobs(load_model(str(folder), transformers.AutoModelForCausalLM, dtype, attention))
        difference = ((model.to(trained_BT.device)(*inputs) - trained_BT) * responses.mask_BT).abs().max().item()
        if not difference < (1e-3 if dtype == "float32" else 0.1):
            fail(f"{folder}: the saved model's log-probabilities differ by {difference:.2g} from the trained model's", status=1)
    dist.barrier()


# ---------------------------------------------------------------- 5. Rollout


@dataclasses.dataclass
class Responses:
    """Rows of prompts and responses. Slicing takes rows."""

    batch: Batch
    prompt_index: list[int]  # the prompt in the batch that each row answers
    texts: list[str]  # without special tokens
    prompts_BP: torch.Tensor
    prompt_mask_BP: torch.Tensor
    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor  # 1 up to and including the first EOS
    ended_B: torch.Tensor  # whether there is an EOS

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> "Responses":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return Responses(self.batch, **{name: value[rows] for name, value in values.items()})


@torch.no_grad()
def generate(
    model,
    prompts_BP: torch.Tensor,
    prompt_mask_BP: torch.Tensor,
    *,
    num_samples: int,
    greedy: bool,
    length: int,
    temperature: float,
    eos_ids: list[int],
) -> torch.Tensor:
    """Decode `num_samples` sampled rows per prompt (adjacent), then, if `greedy`, one greedy row per prompt, all in one loop.

    Sampling is from softmax(logits / temperature) itself, without top-k or top-p, so that what is sampled is what is scored.
    -> tokens_RT with R = B · num_samples (+ B) and T ≤ length: decoding stops when every row has ended. A row that has ended repeats its EOS.
    """
    B = len(prompts_BP)
    S = B * num_samples
    device = prompts_BP.device
    prompt_index_R = torch.arange(B, device=device).repeat_interleave(num_samples)
    if greedy:
        prompt_index_R = torch.cat([prompt_index_R, torch.arange(B, device=device)])

    # Prompts go through the model once; then each row gets its own copy of its prompt's cache.
    cache = transformers.DynamicCache(config=model.config)
    positions_BP = position_ids(prompt_mask_BP)
    inputs = dict(input_ids=prompts_BP, attention_mask=prompt_mask_BP, position_ids=positions_BP)
    logits_RV = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1][prompt_index_R]
    cache.reorder_cache(prompt_index_R)

    R = len(prompt_index_R)
    mask_RL = torch.cat([prompt_mask_BP[prompt_index_R], prompt_mask_BP.new_ones(R, length)], 1)
    next_position_R = positions_BP[prompt_index_R, -1] + 1
    eos_E = torch.tensor(eos_ids, device=device)
    ended_R = torch.zeros(R, dtype=torch.bool, device=device)
    tokens = []
    for t in range(length):
        token_R = logits_RV.argmax(-1)
        if S:
            probabilities_SV = (logits_RV[:S].float() / temperature).softmax(-1)
            token_R[:S] = torch.multinomial(probabilities_SV, 1).squeeze(1)
        if tokens:
            token_R = torch.where(ended_R, tokens[-1], token_R)
        tokens.append(token_R)
        ended_R = ended_R | torch.isin(token_R, eos_E)
        if t + 1 == length or ended_R.all():
            break
        logits_RV = model(
            input_ids=token_R[:, None],
            attention_mask=mask_RL[:, : prompts_BP.shape[1] + t + 1],
            position_ids=next_position_R[:, None] + t,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return torch.stack(tokens, 1)


def response_mask(tokens_BT: torch.Tensor, eos_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (mask_BT, 1 up to and including the first EOS; ended_B, whether there is one). Pad ids play no part."""
    is_eos_BT = torch.isin(tokens_BT, torch.tensor(eos_ids, device=tokens_BT.device))
    mask_BT = is_eos_BT.long().cumsum(1) - is_eos_BT.long() == 0
    return mask_BT.long(), is_eos_BT.any(1)


def rollout(
    policy, batch: Batch, tokenizer, *, num_samples: int, greedy: bool, length: int, temperature: float, eos_ids: list[int]
) -> Responses:
    """Responses of the policy as it is now: `num_samples` sampled rows per prompt (adjacent), then one greedy row per prompt."""
    B, device = len(batch.texts), batch.prompts_BP.device
    settings = dict(num_samples=num_samples, greedy=greedy, length=length, temperature=temperature, eos_ids=eos_ids)
    with whole_model(policy, device) as model:
        tokens_RT = generate(model, batch.prompts_BP, batch.prompt_mask_BP, **settings)
    mask_RT, ended_R = response_mask(tokens_RT, eos_ids)
    rows = [i for i in range(B) for _ in range(num_samples)] + (list(range(B)) if greedy else [])
    real = [ids[:n] for ids, n in zip(tokens_RT.tolist(), mask_RT.sum(1).tolist(), strict=True)]
    texts = tokenizer.batch_decode(real, skip_special_tokens=True)
    return Responses(batch, rows, texts, batch.prompts_BP[rows], batch.prompt_mask_BP[rows], tokens_RT, mask_RT, ended_R)


@torch.no_grad()
def response_logprobs(module: nn.Module, responses: Responses, temperature: float, micro_batch_size: int) -> torch.Tensor:
    """-> logprobs_BT of all rows, without gradients, a micro-batch at a time."""
    parts = []
    with resident(module, responses.tokens_BT.device):
        for rows, _ in micro_batches(len(responses), micro_batch_size):
            micro = responses[rows]
            parts.append(module(micro.prompts_BP, micro.prompt_mask_BP, micro.tokens_BT, temperature))
    return torch.cat(parts)


# ---------------------------------------------------------------- 6. Rewards


class LastTokenScore(nn.Module):
    """A reward model as a function: right-padded token ids -> the scalar head's output at the last real token."""

    def __init__(self, model):
        super().__init__()
        if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
            fail(f"{type(model).__name__} has no linear head `score` with one output, so it is no reward model")
        self.model = model

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """-> scores_B, float32. The last real token is found by the mask: transformers' own head is off by one where pad = EOS."""
        inputs = dict(input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_ids(mask_BL), use_cache=False)
        hidden_BLD = self.model.base_model(**inputs).last_hidden_state
        last_BD = hidden_BLD[torch.arange(len(ids_BL), device=ids_BL.device), mask_BL.sum(1) - 1]
        return self.model.score(last_BD).squeeze(-1).float()


def reward_model_ids(tokenizer, prompt: str, response: str, max_length: int | None) -> list[int]:
    """What a reward model reads, in training and in scoring: prompt + response + EOS as one text, cut on the left where too long."""
    ids = tokenizer(prompt + response)["input_ids"]
    ids = ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    if max_length and len(ids) > max_length:
        bos = [ids[0]] if ids[0] == tokenizer.bos_token_id else []
        ids = bos + ids[len(ids) - max_length + len(bos) :]
    return ids


def pad_right(ids: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids_BL, mask_BL)."""
    width = max(map(len, ids))
    mask_BL = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    return torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device), mask_BL


def load_reward_model(path: str, device: torch.device, dtype: str, attention: str, zero_stage: int, offload: bool, micro_batch_size: int):
    """A sequence-classification folder as a reward function of texts. It may have any tokenizer."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        fail(f"{path}: the reward model's tokenizer has no EOS token, which ends what it reads")
    model = load_model(path, transformers.AutoModelForSequenceClassification, dtype, attention, num_labels=1)
    mean, max_length = getattr(model.config, "reward_mean", 0.0), getattr(model.config, "max_position_embeddings", None)
    scorer = freeze(LastTokenScore(model), device, zero_stage, offload)

    @torch.no_grad()
    def reward(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        ids = [reward_model_ids(tokenizer, p, r, max_length) for p, r in zip(prompts, responses, strict=True)]
        with resident(scorer, device):
            scores = [scorer(*pad_right(ids[rows], device)) for rows, _ in micro_batches(len(ids), micro_batch_size)]
        return (torch.cat(scores) - mean).tolist()

    return reward


def load_reward_function(spec: str) -> Callable[..., list[float]]:
    """`path/to/file.py:name` -> the function. This is the only code that is loaded from a path."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"--reward-function {spec}: wanted is an existing file and a function in it, as in path/to/file.py:name")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        fail(f"--reward-function {spec}: importing the file raised {type(error).__name__}: {error}")
    if not callable(getattr(module, name, None)):
        fail(f"--reward-function {spec}: the file has no function {name!r}")
    return getattr(module, name)


class Reward:
    """A reward function of texts, checked, and lowered by a penalty where a response has no EOS."""

    def __init__(self, function: Callable[..., list[float]], name: str, missing_eos_penalty: float):
        self.function, self.name, self.missing_eos_penalty = function, name, missing_eos_penalty

    def __call__(self, responses: Responses) -> torch.Tensor:
        """-> rewards_B, float32."""
        prompts = [responses.batch.texts[i] for i in responses.prompt_index]
        columns = {name: [values[i] for i in responses.prompt_index] for name, values in responses.batch.columns.items()}
        try:
            scores = list(map(float, self.function(prompts, list(responses.texts), **columns)))
        except Exception as error:
            fail(f"{self.name} raised {type(error).__name__}: {error}", status=1)
        if len(scores) != len(prompts):
            fail(f"{self.name} returned {len(scores)} rewards for {len(prompts)} responses", status=1)
        for score, text in zip(scores, responses.texts, strict=True):
            if not math.isfinite(score):
                fail(f"{self.name} returned {score} for the response {text!r}", status=1)
        rewards_B = torch.tensor(scores, device=responses.tokens_BT.device)
        return rewards_B - self.missing_eos_penalty * (~responses.ended_B)


# ---------------------------------------------------------------- 7. Evaluation


@torch.no_grad()
def evaluate(
    policy,
    *,
    prompts: Prompts,
    size: int,
    batch_size: int,
    device: torch.device,
    rollout: Callable[..., Responses],
    reward: Reward,
    gold_reward: Reward | None,
    reference: nn.Module,
    logprobs: Callable[[nn.Module, Responses], torch.Tensor],
) -> list[dict]:
    """Greedy responses to the first `size` held-out prompts -> one row each, the same on every rank.

    The prompts are dealt out to the ranks; some come twice where they do not divide evenly, because the ranks must take equal steps.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = min(size, len(prompts.ids))
    mine = [i % size for i in range(rank, math.ceil(size / world_size) * world_size, world_size)]
    rows = []
    for start in range(0, len(mine), batch_size):
        responses = rollout(policy, prompts.batch(mine[start : start + batch_size], device), num_samples=0, greedy=True)
        log_ratios_BT = logprobs(policy, responses) - logprobs(reference, responses)
        columns = dict(
            prompt=responses.batch.texts,
            response=responses.texts,
            reward=reward(responses).tolist(),
            kl=(log_ratios_BT * responses.mask_BT).sum(1).tolist(),
            response_length=responses.mask_BT.sum(1).tolist(),
        )
        if gold_reward:
            columns["gold_reward"] = gold_reward(responses).tolist()
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return gather_rows(rows, world_size)[:size]


def evaluation_metrics(rows: list[dict], initial_rows: list[dict]) -> dict[str, float]:
    """Means of the rows, and how often they beat the initial policy's response to the same prompt (a tie counts one half)."""
    metrics = {f"eval_{name}": sum(r[name] for r in rows) / len(rows) for name, v in rows[0].items() if not isinstance(v, str)}
    wins = [(r["reward"] > i["reward"]) + 0.5 * (r["reward"] == i["reward"]) for r, i in zip(rows, initial_rows, strict=True)]
    return metrics | {"eval_win_rate": sum(wins) / len(wins)}


# ---------------------------------------------------------------- 8. The run's folder


class Clock:
    """Seconds since the last lap; waits for the GPU's work, so that a lap holds its own."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before, self.last = self.last, time.perf_counter()
        return self.last - before


class Run:
    """A run's folder (args.json, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoint/) and its console. Rank 0 writes.

    `update` is the last update of the checkpoint that is resumed, or None.
    """

    def __init__(self, args, script: str, num_updates: int):
        name = [args.output_dir or f"runs/{Path(script).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"]
        dist.broadcast_object_list(name)
        self.folder, self.num_updates = Path(name[0]).absolute(), num_updates
        self.main = dist.get_rank() == 0
        self.update = self._checkpointed_update() if args.resume else None
        if not args.resume and (self.folder / "args.json").exists():
            fail(f"{self.folder} already holds a run: choose another --output-dir, or continue it with --resume {self.folder}")
        if args.resume and self.update is None:
            fail(f"--resume {self.folder}: no checkpoint there (was the run started with --save-every?)")
        dist.barrier()  # every rank has looked before rank 0 writes
        if self.main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                saved = dataclasses.asdict(args) | dict(resume=None, output_dir=str(self.folder), ranks=dist.get_world_size())
                (self.folder / "args.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
                self._forget_after_checkpoint()
            except OSError as error:
                fail(f"--output-dir {self.folder}: {error.strerror or error}")
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(self.folder), purge_step=None if self.update is None else self.update + 1)
        self.bar = tqdm(total=num_updates, initial=self.update or 0, disable=not self.main, unit="update", dynamic_ncols=True)
        self.stop_signal = 0
        signal.signal(signal.SIGINT, self._remember_signal)
        signal.signal(signal.SIGTERM, self._remember_signal)

    def _remember_signal(self, number, frame) -> None:
        self.stop_signal = self.stop_signal or number

    def _forget_after_checkpoint(self) -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if self.update is not None and path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= self.update]
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(kept), encoding="utf-8")
            aside.replace(path)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text)

    def log(self, update: int, metrics: dict[str, float]) -> None:
        """One row of metrics.jsonl (not-finite values as null), TensorBoard's curves, and the progress bar."""
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks = [0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak)
        metrics = dict(update=update) | metrics | dict(peak_memory_bytes=max(peaks))
        if not self.main:
            return
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, update)
        if update:
            self.bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("reward", "kl") if name in metrics}, refresh=False)
            self.bar.update()

    def log_samples(self, update: int, rows: list[dict], show: int = 2) -> None:
        """All rows go to samples.jsonl, the first few to the console."""
        if not self.main:
            return
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(update=update) | row, ensure_ascii=False) + "\n" for row in rows)
        mean = sum(row["reward"] for row in rows) / len(rows)
        self.say(f"\nupdate {update}: greedy responses to {len(rows)} held-out prompts, mean reward {mean:.3f}")
        for row in rows[:show]:
            self.say(f"  [{row['reward']:+.2f}] …{row['prompt'][-80:]!r} → {row['response'][:300]!r}")

    def save_checkpoint(self, update: int, *engines) -> None:
        """Written under the update's name, then named by `latest` in one atomic step: a torn checkpoint is never resumed from."""
        folder = self.folder / "checkpoint"
        for i, engine in enumerate(engines):
            engine.save_checkpoint(str(folder / f"update-{update}"), tag=f"engine-{i}", save_latest=False)
        dist.barrier()
        if self.main:
            (folder / "latest.tmp").write_text(str(update))
            (folder / "latest.tmp").replace(folder / "latest")
            for old in folder.glob("update-*"):
                if old.name != f"update-{update}":
                    shutil.rmtree(old)
        dist.barrier()

    def _checkpointed_update(self) -> int | None:
        latest = self.folder / "checkpoint" / "latest"
        return int(latest.read_text()) if latest.exists() else None

    def load_checkpoint(self, *engines) -> int:
        """-> the update to begin with: 1, or the one after the checkpoint's."""
        if self.update is None:
            return 1
        for i, engine in enumerate(engines):
            engine.load_checkpoint(str(self.folder / "checkpoint" / f"update-{self.update}"), tag=f"engine-{i}")
        self.say(f"resumed {self.folder} after update {self.update}")
        return self.update + 1

    def stop_if_asked(self, update: int, device: torch.device, *engines) -> None:
        """After ctrl-C or SIGTERM at any rank: checkpoint, say how to go on, exit with 130 or 143."""
        number = torch.tensor(self.stop_signal, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number.item():
            self.save_checkpoint(update, *engines)
            self.say(f"stopped after update {update}; to go on: python {sys.argv[0]} --resume {self.folder}")
            self.close()
            raise SystemExit(128 + number.item())

    def finish(self, model: str) -> None:
        """The last lines of the console: what was learned, where it is, how to look at it."""
        if self.main:
            rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            before, after = rows[0], rows[-1]
            self.bar.close()
            if "eval_reward" in after and before["update"] == 0:
                gold = f", gold reward {before['eval_gold_reward']:.3f} → {after['eval_gold_reward']:.3f}" if "eval_gold_reward" in after else ""
                self.say(
                    f"\nHeld-out prompts, greedy responses: reward {before['eval_reward']:.3f} → {after['eval_reward']:.3f}{gold}, better than "
                    f"the initial policy on {after['eval_win_rate']:.0%} of the prompts, KL {after['eval_kl']:.1f} nats."
                )
            self.say(f"Saved and reloaded: {self.folder / model} (a Hugging Face folder: transformers' from_pretrained reads it)")
            self.say(f"Samples:            {self.folder / 'samples.jsonl'}")
            self.say(f"Curves:             tensorboard --logdir {self.folder}")
        self.close()

    def close(self) -> None:
        self.bar.close()
        if self.main:
            self.writer.close()
        dist.barrier()
        dist.destroy_process_group()
