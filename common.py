"""What the scripts share and what teaches nothing about an algorithm. Sections that can be skipped:

1 flags and errors · 2 processes · 3 data · 4 models and DeepSpeed · 5 rollout · 6 rewards · 7 evaluation · 8 the run

Nothing in this file knows an algorithm, and no function reads a global: copy the functions that you need.

Names carry their shape: B rows, P prompt tokens (left-padded), T response tokens (right-padded), L both, V vocabulary,
D width, R rows of a rollout (several per prompt). Logits at position t predict token t + 1. A response mask is 1 up to
and including the first EOS.
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning that no accelerator was found
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_TQDM", "1")  # the libraries' own bars; this file makes its bar with disable=False
import deepspeed  # noqa: E402
import transformers  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param  # noqa: E402

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
    """End with one line on standard error. Status 2 is for bad input, which all ranks see alike: rank 0 tells it."""
    if status != 2 or os.environ.get("RANK", "0") == "0":
        tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _flag(kind: Callable, accepts: Callable[[Any], bool], wanted: str, show: Callable[[Any], str] = str):
    """A tyro flag type that says what it wants when it gets something else."""

    def parse(words: list[str]):
        try:
            value = kind(words[0])
        except ValueError:
            value = math.nan  # which nothing accepts
        if not accepts(value):
            raise ValueError(f"{words[0]!r} is not {wanted}")
        return value

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH" if kind is _absolute else "NUMBER",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, (int, float, str)),
        str_from_instance=lambda value: [show(value)],
    )


def _absolute(path: str) -> str:
    """A path that exists becomes absolute, so that --resume works from any folder; else it is a hub name and stays."""
    file, py, name = path.partition(".py:")
    return os.path.abspath(file + py[:3]) + py[3:] + name if os.path.exists(file + py[:3]) else path


def _short(path: str) -> str:
    return str(Path(path).relative_to(HERE)) if Path(path).is_relative_to(HERE) else path


PositiveInt = Annotated[int, _flag(int, lambda n: n > 0, "a whole number above 0")]
NonNegativeInt = Annotated[int, _flag(int, lambda n: n >= 0, "a whole number, 0 or above")]
PositiveFloat = Annotated[float, _flag(float, lambda x: 0 < x < math.inf, "a number above 0")]
NonNegativeFloat = Annotated[float, _flag(float, lambda x: 0 <= x < math.inf, "a number, 0 or above")]
Fraction = Annotated[float, _flag(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")]
PathOrName = Annotated[str, _flag(_absolute, bool, "a path", _short)]


def parse_args(Args: type):
    """The command line as an `Args`. `--resume D` takes D/args.json for defaults and refuses a flag that differs."""
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # added by `deepspeed`
    speaks = os.environ.get("RANK", "0") == "0"
    if not speaks:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks; errors go to standard error

    def parse(**kwargs):
        with contextlib.redirect_stderr(sys.stderr if speaks else io.StringIO()):  # all ranks see the same flags
            return tyro.cli(Args, prog=Path(sys.argv[0]).name, **kwargs)

    args = parse()
    if not args.resume:
        return args
    try:
        saved = dict(json.loads(Path(args.resume, "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fail(f"--resume {args.resume}: no readable args.json there ({error})")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if saved.pop("ranks", ranks) != ranks:
        fail(f"--resume {args.resume}: that run had another number of ranks than {ranks}")
    if saved.keys() != {field.name for field in dataclasses.fields(Args)}:
        fail(f"--resume {args.resume}: its args.json is of another script or version")
    resumed = Args(**saved | dict(resume=args.resume, output_dir=args.resume))
    args = parse(default=resumed)
    for flag, old in dataclasses.asdict(resumed).items():
        if (new := getattr(args, flag)) != old:
            fail(f"--{flag.replace('_', '-')} {new} differs from the run in {args.resume}, which had {old}")
    return args


# ---------------------------------------------------------------- 2. Processes


def start_processes() -> tuple[int, int, torch.device]:
    """Join the process group, also as the only process -> (rank, number of ranks, this rank's device)."""
    alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))  # set by torchrun and deepspeed
    deepspeed.init_distributed(verbose=False)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


class Phases:
    """Runs functions one after the other, each in a process of its own, which leaves nothing in memory.

    All ranks do the same; in the new processes start_processes() joins them to a new group. ctrl-C and SIGTERM are
    handed on; a process dies with the one that has started it.
    """

    def __init__(self):
        import transformers.modeling_utils  # noqa: F401  (seconds, that would be spent in each forked process)

        self.process, self.signal, self.started, self.pid = None, 0, 0, os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hand_on)

    def _hand_on(self, number, frame) -> None:
        if os.getpid() != self.pid:  # a forked process that has not come to _send_result yet
            os._exit(128 + number)
        self.signal = self.signal or number
        if not (self.process and self.process.is_alive()):
            raise SystemExit(128 + number)
        os.kill(self.process.pid, number)

    def run(self, function: Callable, *args):
        """function(*args) in its own process -> what it returns. If it fails, this process ends with its status."""
        environment = {}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # rank 0 finds a port for the new group and tells the others
            store, rank = _launcher_store(), os.environ["RANK"]
            name = f"port of process {store.add(f'processes of rank {rank}', 1)}"
            if rank == "0":
                store.set(name, str(_free_port()))
            environment = dict(MASTER_PORT=store.get(name).decode(), TORCHELASTIC_USE_AGENT_STORE="False")
        # CUDA does not survive a fork. Without CUDA a fork spares the seconds that the imports take.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        ours, theirs = context.Pipe()
        self.process = context.Process(target=_send_result, args=(theirs, environment, function, args))
        self.process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            result, self.cost = ours.recv()
        self.process.join()
        if (status := self.process.exitcode) < 0 and not self.signal:
            fail(f"{function.__name__} was ended by signal {-status}", status=128 - status)
        if status < 0 and self.started:  # a phase that takes no time to say so itself
            print(how_to_go_on(f"in {function.__name__}", self.folder))
        if status:
            raise SystemExit(status if status > 0 else 128 - status)
        return result

    def run_once(self, folder: Path, function: Callable, *args) -> dict:
        """The same for a phase that returns metrics, unless the journal in the run's folder has its line already."""
        self.folder, path = folder, folder / "phases.jsonl"
        if not self.started:
            self.journal = read_rows(path)
        self.started += 1
        if self.started > len(self.journal):
            metrics = self.run(function, *args) or {}
            self.journal.append(dict(phase=function.__name__, **self.cost, metrics=metrics))
            if os.environ.get("RANK", "0") == "0":
                write_whole(path, json_lines(self.journal))
            if self.signal:
                print(how_to_go_on(f"after {function.__name__}", folder))
                raise SystemExit(128 + self.signal)
        peak = max(line["peak_memory_bytes"] for line in self.journal[: self.started])
        return self.journal[self.started - 1]["metrics"] | dict(peak_memory_bytes=peak)


@functools.cache
def _launcher_store() -> dist.Store:
    """The key-value store of torchrun, or one that rank 0 opens in its place."""
    return next(dist.rendezvous("env://"))[0]


def _send_result(pipe, environment: dict[str, str], function: Callable, args: tuple) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the process that started this one
    if os.getppid() != multiprocessing.parent_process().pid:  # it is dead already
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(environment)
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
    start, cpu_start = time.perf_counter(), time.process_time()
    result = function(*args)
    seconds = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu_start)
    pipe.send((result, dict(peak_memory_bytes=_peak_bytes()) | seconds))


def set_seed(*numbers: int) -> None:
    """Seed torch, numpy and random from several numbers. Each update seeds its own, so no random state is saved."""
    mixed = torch.Generator().manual_seed(sum(n * 1_000_003**i for i, n in enumerate(numbers)) % 2**63)
    transformers.set_seed(int(torch.randint(2**32, (), generator=mixed)))


def global_sum(x: torch.Tensor) -> torch.Tensor:
    """-> scalar, the sum over all entries and ranks."""
    total = x.sum()
    dist.all_reduce(total)
    return total


def exact_division(total: int, parts: int, parts_name: str, total_name: str) -> int:
    if total % parts:
        fail(f"{parts_name}, {parts}, does not divide {total_name}, {total}")
    return total // parts


def plan_updates(total_episodes: int, batch_size: int, world_size: int) -> tuple[int, int]:
    """-> (rows per rank and update, number of updates)."""
    rows = exact_division(batch_size, world_size, "the number of ranks", "--batch-size")
    if total_episodes < batch_size:
        fail(f"--total-episodes {total_episodes} is less than one update of --batch-size {batch_size}")
    return rows, total_episodes // batch_size


def deal_out(items: list) -> list:
    """This rank's share. A few items come twice where they do not divide evenly: ranks must take equal steps."""
    size, world_size = len(items), dist.get_world_size()
    return [items[i % size] for i in range(dist.get_rank(), math.ceil(size / world_size) * world_size, world_size)]


def gather_rows(rows: list) -> list:
    """All ranks' lists on every rank; what was dealt out comes back in its order, the few that came twice last."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for turn in zip(*parts, strict=True) for row in turn]


def global_means(device: torch.device, **values) -> dict[str, float]:
    """Means over all ranks, in one collective. A value is a tensor, or (tensor, mask) if not all entries are real."""
    pairs = [v if isinstance(v, tuple) else (v, torch.ones_like(v)) for v in values.values()]
    sums = torch.stack([torch.stack([(x * mask).sum(), mask.sum()]).double() for x, mask in pairs]).to(device)
    dist.all_reduce(sums)
    return {name: (total / count).item() for name, (total, count) in zip(values, sums.cpu(), strict=True)}


# ---------------------------------------------------------------- 3. Data


def load_rows(path: str, split: str = "train") -> list[tuple[str, dict]]:
    """Rows of a local .jsonl, .json, .csv or .parquet file or of a hub data set -> [(where it stands, row)].

    Local text files are read with the standard library: it knows the line of an error, `datasets` does not.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".json", ".csv"):
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except OSError as error:
            fail(f"{path}: {error.strerror}")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            fail(f"{path}:{line}: not UTF-8 ({error.reason}): convert the file to UTF-8")
        rows = list(_read_csv(path, text) if suffix == ".csv" else _read_json(path, text, lines=suffix == ".jsonl"))
    else:
        import datasets  # slow to import, and only wanted here

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are told below
        try:
            parquet = suffix == ".parquet"
            table = datasets.Dataset.from_parquet(path) if parquet else datasets.load_dataset(path, split=split)
        except Exception as error:  # whatever the hub, the network or the file may raise
            fail(f"{path}: {_first_line(error)}")
        rows = [(f"{path}: row {i}", row) for i, row in enumerate(table, start=1)]
    if not rows:
        fail(f"{path}: no rows")
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_json(path: str, text: str, lines: bool) -> Iterator[tuple[str, dict]]:
    wanted = "one JSON object per line" if lines else "one list of JSON objects"
    try:
        number, rows = 0, []
        for number, line in enumerate(text.split("\n") if lines else [], start=1):
            if line.strip():
                rows.append((f"{path}:{number}", json.loads(line)))
                json.dumps(rows[-1], ensure_ascii=False).encode()  # half a character (a lone surrogate) is no text
        if not lines:
            entries = json.loads(text)
            rows = [(f"{path}: entry {i}", row) for i, row in enumerate(entries, start=1)]
    except (ValueError, TypeError, RecursionError) as error:
        fail(f"{path}{f':{number}' if number else ''}: {error}; wanted is {wanted}")
    for where, row in rows:
        if not isinstance(row, dict):
            fail(f"{where}: a {type(row).__name__}; wanted is {wanted}")
        yield where, row


def _read_csv(path: str, text: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                fail(f"{path}:{reader.line_num}: not {len(reader.fieldnames)} columns, as in the first line")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:  # such as a quote that is never closed, which would swallow the rest of the file
        fail(f"{path}:{reader.line_num + 1}: {error}")


def read_text(row: dict, column: str, where: str, tokenizer) -> str:
    """The text in a column; chat messages become text by the tokenizer's template, up to the assistant's turn."""
    if column not in row:
        fail(f"{where}: no column {column!r}; there are: {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, str):
        return value
    messages = value if isinstance(value, list) else []
    is_chat = all(isinstance(m, dict) and isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
    if not is_chat or not messages:
        kind = "null" if value is None else f"a {type(value).__name__}"
        fail(f"{where}: {column!r} is {kind}; wanted is a text or a list of {{role, content}} messages")
    if not tokenizer.chat_template:
        fail(f"{where}: {column!r} holds chat messages, but the model's tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates refuse some orders of roles
        fail(f"{where}: the chat template refuses {column!r}: {_first_line(error)}")


def read_response(row: dict, column: str, where: str) -> str:
    """The text of a response; of chat messages the last one's content."""
    value = row.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        kind = "missing" if column not in row else "null" if value is None else f"a {type(value).__name__}"
        fail(f"{where}: {column!r} is {kind}; wanted is a text or a list of {{role, content}} messages")
    return value


@dataclasses.dataclass
class Prompt:
    """A prompt as rewards see it, whole; as the policy sees it, cut; and the other columns of its row."""

    text: str
    ids: list[int]
    columns: dict[str, Any]
    demonstrations: list[dict] = dataclasses.field(default_factory=list)  # one row as `rows_of` makes them, or none


def load_prompts(
    path: str,
    split: str,
    column: str,
    tokenizer,
    max_length: int,
    completion_column: str | None = None,
    max_completion: int = 0,
) -> list[Prompt]:
    """Prompts cut on the left to `max_length` tokens (a BOS stays in front); empty ones are dropped and counted.

    If the rows have a completion column, it holds demonstrations; one of more than `max_completion` tokens, EOS
    included, is dropped with its prompt, since a response that is cut off teaches not to end.
    """
    prompts, dropped, cut, long = [], 0, 0, 0
    rows = load_rows(path, split)
    has_completions = completion_column is not None and any(completion_column in row for _, row in rows)
    for where, row in rows:
        text = read_text(row, column, where, tokenizer)
        is_chat = text is not row[column]  # a chat template writes its own special tokens
        ids = encode(tokenizer, text, add_special_tokens=not is_chat)
        prompt = Prompt(
            text, cut_left(ids, max_length, tokenizer.bos_token_id), {k: row[k] for k in row if k != column}
        )
        if has_completions:
            response = read_response(row, completion_column, where)
            tokens = encode(tokenizer, response, add_special_tokens=False) + [tokenizer.eos_token_id]
            prompt.demonstrations = [dict(prompt=text, response=response, ended=True, tokens=tokens)]
        if not (text.strip() and ids):
            dropped += 1
        elif has_completions and len(tokens) > max_completion:
            long += 1
        else:
            cut += len(ids) > max_length
            prompts.append(prompt)
    if not prompts:
        fail(f"{path}: every prompt is empty{f' or its {completion_column} too long' if has_completions else ''}")
    counts = {"empty, dropped": dropped, f"cut to {max_length} tokens": cut}
    counts |= {f"with a {completion_column} of more than {max_completion} tokens, dropped": long}
    report(path, f"{len(prompts):,} prompts{' with demonstrations' if has_completions else ''}", counts)
    return prompts


def report(path: str, what: str, counts: dict[str, int]) -> None:
    notes = [f"{count:,} {name}" for name, count in counts.items() if count]
    print(f"{what} from {_short(path)}" + (f" ({', '.join(notes)})" if notes else ""))


def train_and_held_out(load: Callable[[str], list], dataset: str, eval_dataset: str | None, size: int) -> tuple:
    """-> (training rows, held-out rows); without an evaluation data set, `size` random rows are held out."""
    rows = load(dataset)
    if eval_dataset or not size:
        return rows, load(eval_dataset)[:size] if size else []
    if len(rows) < 2:
        fail(f"{dataset}: its one row cannot be both trained on and held out: give --eval-dataset")
    order = shuffled_indices(len(rows), 0, 0, len(rows))
    size = min(size, len(rows) // 2)
    return [rows[i] for i in order[size:]], [rows[i] for i in order[:size]]


def left_pad(ids: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids_BP, mask_BP). The mask alone tells padding from text: an EOS id inside a prompt is just a token."""
    width = max(map(len, ids))
    mask_BP = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return torch.tensor([[0] * (width - len(row)) + row for row in ids], device=device), mask_BP


def right_pad(ids: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids_BL, mask_BL)."""
    width = max(map(len, ids))
    mask_BL = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    return torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device), mask_BL


def encode(tokenizer, text: str, **kwargs) -> list[int]:
    """The ids of a text, with one BOS at the most: a text that a template has written may begin with its own."""
    ids = tokenizer(text, **kwargs)["input_ids"]
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids


def cut_left(ids: list[int], max_length: int, bos_id: int | None) -> list[int]:
    """The last `max_length` ids, of which the first stays the BOS if it was one."""
    if len(ids) <= max_length:
        return ids
    bos = ids[:1] if ids[0] == bos_id and max_length > 1 else []
    return bos + ids[len(ids) - max_length + len(bos) :]


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()


def shuffled_indices(size: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start … start + count of an endless stream of shuffled epochs: a position in the data is a number."""
    return [_permutation(size, seed * 1_000_003 + i // size)[i % size] for i in range(start, start + count)]


# ---------------------------------------------------------------- 4. Models and DeepSpeed


@dataclasses.dataclass
class Placement:
    """Where models are kept and how they compute."""

    device: torch.device
    dtype: str
    attention: str
    zero_stage: int
    offload: bool
    micro_batch_size: int

    def on_cpu(self) -> "Placement":
        """The same computation without a GPU, on which flash attention alone runs, and without DeepSpeed."""
        return dataclasses.replace(self, device=torch.device("cpu"), attention="sdpa", zero_stage=0, offload=False)


def load_tokenizer(path: str):
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a missing folder, a broken file, no network: each raises its own
        fail(f"{path}: no tokenizer could be loaded: {_first_line(error)}")
    if not tokenizer.vocab_size:  # what transformers makes of a folder without the tokenizer's files
        fail(f"{path}: no tokenizer could be loaded: it has no vocabulary")
    return tokenizer


def load_model(path: str, auto_class, placement: Placement, new_head: bool = False, **kwargs):
    """A model of a local folder or a hub name, from safetensors only, without dropout; `new_head`: its head is new."""
    kwargs |= dict(dtype=getattr(torch, placement.dtype), attn_implementation=placement.attention)
    kwargs |= dict(use_safetensors=True, trust_remote_code=False)
    try:
        model, info = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except Exception as error:
        fail(f"{path}: no model could be loaded: {_first_line(error)}")
    if missing := sorted(info["missing_keys"] - ({"score.weight"} if new_head else set())):
        fail(f"{path}: has no weights for {', '.join(missing[:3])}, so it is not saved for {auto_class.__name__}")
    if "score.weight" in info["unexpected_keys"]:
        fail(f"{path}: is a reward model; wanted is a language model")
    for module in model.modules():  # not in the config, whose fields differ from one architecture to the next
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout) and name == "p"):
                setattr(module, name, 0.0)
        for name, child in module.named_children():
            if isinstance(child, transformers.activations.NewGELUActivation):  # eight kernels for what one computes
                setattr(module, name, nn.GELU("tanh"))
    return model


def load_policy(path: str, placement: Placement) -> "ResponseLogprobs":
    return ResponseLogprobs(load_model(path, transformers.AutoModelForCausalLM, placement))


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a response: chat models often have several."""
    ids = model.generation_config.eos_token_id
    ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
    return sorted(ids) or fail(f"{model.name_or_path}: neither generation_config nor tokenizer names an EOS token")


def check_vocabulary(model, tokenizer) -> None:
    embeddings = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > embeddings:
        fail(f"{model.name_or_path}: its tokenizer has {tokenizer.vocab_size:,} tokens, but the model {embeddings:,}")


def check_length(model, max_prompt_length: int, response_length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and max_prompt_length + response_length > limit:
        flags = f"--max-prompt-length {max_prompt_length} + --response-length {response_length}"
        fail(f"{flags} is more than the model's {limit} positions")


def position_ids(mask_BL: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only: without them learned positions are wrong under left padding."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(model, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """-> hidden_BLD, what the model's heads read."""
    inputs = dict(input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_ids(mask_BL), use_cache=False)
    return model.base_model(**inputs).last_hidden_state


def response_hidden_states(model, prompts_BP, prompt_mask_BP, responses_BT) -> torch.Tensor:
    """-> hidden_BTD; entry t has seen the prompt and the tokens before t, so it is where token t is predicted."""
    ids_BL = torch.cat([prompts_BP, responses_BT], 1)
    mask_BL = torch.cat([prompt_mask_BP, torch.ones_like(responses_BT)], 1)  # what follows EOS is masked by the loss
    return hidden_states(model, ids_BL, mask_BL)[:, prompts_BP.shape[1] - 1 : -1]


def _view(model):
    """A copy of the modules that shares every parameter, buffer and the config."""
    shared = itertools.chain(model.parameters(), model.buffers(), [model.config])
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


class ResponseLogprobs(nn.Module):
    """A causal language model as the function that is trained: log-probabilities of response tokens.

    Policy and reference are both called through it. `whole` is the same model for decoding and saving: it shares every
    Parameter object, but never gets ZeRO-3's hooks or gradient checkpointing.
    """

    def __init__(self, model):
        super().__init__()
        self.__dict__["whole"] = _view(model).eval()  # past nn.Module: it is no submodule
        self.model = model.eval()
        ids, ones = torch.arange(4)[None], torch.ones(1, 2, dtype=torch.long)
        attention = model.config._attn_implementation
        model.set_attn_implementation("eager")  # for the check: flash attention does not run on a CPU
        with torch.no_grad():
            direct = self.whole(ids[:, :3]).logits[0, 1:3].float().log_softmax(-1)[[0, 1], [2, 3]]
            if direct.isnan().any():
                fail(f"{model.name_or_path}: has weights that are not finite")
            if not torch.allclose(direct, self(ids[:, :2], ones, ids[:, 2:], 1.0)[0], atol=0.1):
                fault = "is not causal, or changes its logits after the output embedding"
                fail(f"{model.name_or_path}: a {type(model).__name__} {fault}, which is not supported")
        model.set_attn_implementation(attention)
        self.train()  # gradient checkpointing works in training mode only

    def forward(self, prompts_BP, prompt_mask_BP, responses_BT, temperature: float) -> torch.Tensor:
        """-> logprobs_BT, float32, of the distribution that is sampled: softmax(logits / temperature)."""
        hidden_ND = response_hidden_states(self.model, prompts_BP, prompt_mask_BP, responses_BT).flatten(0, 1)
        head = self.model.get_output_embeddings()

        def logprobs(hidden_ND, tokens_N):
            return -F.cross_entropy(head(hidden_ND).float() / temperature, tokens_N, reduction="none")

        # The vocabulary dwarfs all else: at most 2^25 logits (128 MiB) are alive, and backward computes them again.
        size = max(1, 2**25 // self.model.config.vocab_size)
        chunks = list(zip(hidden_ND.split(size), responses_BT.flatten().split(size), strict=True))
        if torch.is_grad_enabled() and len(chunks) > 1:
            logprobs = functools.partial(checkpoint, logprobs, use_reentrant=False)
        return torch.cat([logprobs(*chunk) for chunk in chunks]).view_as(responses_BT)


def train_engine(module, placement: Placement, rows: int, max_grad_norm: float, gradient_checkpointing: bool):
    """A DeepSpeed engine that trains `module` by AdamW on float32 (master) weights, `rows` per rank and step."""
    device, zero = placement.device, dict(stage=placement.zero_stage)
    if placement.offload:
        if placement.zero_stage == 0:
            fail("--offload keeps the optimizer state in CPU memory, which needs --zero-stage 1, 2 or 3")
        zero |= dict(offload_optimizer=dict(device="cpu", pin_memory=device.type == "cuda"))
    if gradient_checkpointing:
        module.model.activation_checkpointing_enable()
    config = dict(
        train_micro_batch_size_per_gpu=placement.micro_batch_size,
        gradient_accumulation_steps=math.ceil(rows / placement.micro_batch_size),  # backwards per step
        gradient_clipping=max_grad_norm,
        bf16=dict(enabled=placement.dtype == "bfloat16"),
        zero_optimization=zero,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    # eps 1e-5: a smaller one lets the rounding differences between ranks and micro-batches grow.
    adamw = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, **adamw)  # optimizer_step sets the rate
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if placement.zero_stage == 0 and dist.get_world_size() == 1:  # one rank need not copy gradients to average them
        engine.enable_backward_allreduce = False
    for state in optimizer.state.values():
        state["step"].zero_()  # bfloat16 ZeRO-0 has taken a step on zeros, which would spoil Adam's bias correction
    return engine


def freeze(module: nn.Module, placement: Placement) -> nn.Module:
    """A model that is only read: on the device, in CPU memory between uses (offload), or sharded (ZeRO-3)."""
    module.requires_grad_(False).eval()
    if placement.zero_stage == 3:
        zero = dict(stage=3) | (dict(offload_param=dict(device="cpu")) if placement.offload else {})
        config = dict(train_micro_batch_size_per_gpu=1, zero_optimization=zero)
        return deepspeed.initialize(model=module, config=config)[0]
    return module if placement.offload else module.to(placement.device)


@contextlib.contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Brings an offloaded frozen model to the device while it is used. (An engine moves its own weights.)"""
    home = next(module.parameters()).device
    moves = home != device and not isinstance(module, deepspeed.DeepSpeedEngine)
    if moves:
        module.to(device)
    yield
    if moves:
        module.to(home)


@contextlib.contextmanager
def whole_model(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The plain Hugging Face model behind an engine or a frozen module; its weights are gathered once for the block."""
    inner = module.module if isinstance(module, deepspeed.DeepSpeedEngine) else module
    sharded = [p for p in inner.parameters() if hasattr(p, "ds_id")]
    with resident(module, device), deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield inner.whole.to(device)


def micro_batches(rows: int, size: int) -> Iterator[tuple[slice, bool]]:
    """-> (slice of rows, whether it is the last)."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows)), start + size >= rows


def micro_batches_by_length(lengths_B: torch.Tensor, size: int) -> Iterator[tuple[list[int], bool]]:
    """Rows of like length together, so that there is little padding -> (row numbers, whether it is the last)."""
    order = lengths_B.argsort(descending=True, stable=True).tolist()  # the longest first, for what memory it takes
    for rows, last in micro_batches(len(order), size):
        yield order[rows], last


def backward(engine, loss: torch.Tensor, last: bool) -> None:
    """Adds a micro-batch's gradients, divided by nothing; the last one makes the engine average over the ranks."""
    engine.set_gradient_accumulation_boundary(last)
    one = 1 + 0 * loss.detach()  # or NaN: a loss that is not finite may have finite gradients, which must not count
    engine.backward(loss * one, scale_wrt_gas=False)


def optimizer_step(engine, learning_rate: float) -> tuple[float, int]:
    """Clips and steps -> (gradient norm before clipping, steps skipped in the whole run since it was not finite)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm()), engine.skipped_steps
    # In float32 without ZeRO the engine neither tells the norm nor minds what it is.
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    if norm.isfinite():
        engine.step()
    else:
        engine.zero_grad()
        engine.skipped_steps += 1  # which checkpoints keep
    return norm.item(), engine.skipped_steps


def _master_weights(engine) -> dict[str, torch.Tensor | None]:
    """Name -> float32 weight behind each bfloat16 parameter; None where DeepSpeed's own functions find it."""
    groups = (getattr(engine.optimizer, name, []) for name in ("fp16_groups", "fp32_groups"))
    pairs = zip(*map(itertools.chain.from_iterable, groups), strict=True)
    known = {id(p): master for p, master in pairs} if engine.zero_optimization_stage() == 0 else {}
    return {name: known.get(id(p)) for name, p in engine.module.named_parameters()}


@torch.no_grad()
def save_master_weights(engine, path: Path) -> None:
    """What a bfloat16 engine has learned, unrounded: rounded at each hand-over, small steps would never add up."""
    masters, parameters = _master_weights(engine), dict(engine.module.named_parameters())
    for name, master in masters.items():
        master = safe_get_full_fp32_param(parameters[name]) if master is None else master
        masters[name] = master.detach().cpu().contiguous()
    if dist.get_rank() == 0:
        save_file(masters, path)
    dist.barrier()


@torch.no_grad()
def load_master_weights(engine, path: Path) -> None:
    parameters = dict(engine.module.named_parameters())
    with safe_open(path, "pt") as file:
        for name, master in _master_weights(engine).items():
            weight = file.get_tensor(name).to(engine.device)
            if master is None:
                safe_set_full_fp32_param(parameters[name], weight)
            else:
                master.copy_(weight)


def scheduled(peak: float, schedule: str, warmup_ratio: float, update: int, num_updates: int) -> float:
    """The learning rate of an update (1 … num_updates): linear warm-up, then constant, or down to 0."""
    warmup = math.ceil(warmup_ratio * num_updates)
    if update <= warmup:
        return peak * update / warmup
    done = (update - 1 - warmup) / (num_updates - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[schedule]


def save_model(module: nn.Module, tokenizer, folder: Path, device: torch.device) -> None:
    """A plain Hugging Face folder from any ZeRO stage: written aside, then renamed, so that it is whole or absent."""
    with whole_model(module, device) as model:
        if dist.get_rank() == 0:
            aside = folder.with_name(folder.name + ".tmp")
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    dist.barrier()


@torch.no_grad()
def check_saved(policy, folder: Path, responses: "Responses", temperature: float, placement: Placement) -> None:
    """Reloads a saved policy, in CPU memory, and compares its log-probabilities with those of the trained one."""
    inputs = (responses.prompts_BP, responses.prompt_mask_BP, responses.tokens_BT)
    trained_BT, mask_BT = policy(*inputs, temperature).cpu(), responses.mask_BT.cpu()
    if dist.get_rank() == 0:
        saved = load_policy(str(folder), placement.on_cpu())
        saved_BT = saved(*(x.cpu() for x in inputs), temperature)
        difference = (((saved_BT - trained_BT) * mask_BT).abs().sum() / mask_BT.sum()).item()
        if not difference < (1e-3 if placement.dtype == "float32" else 0.1):  # nats per token
            fail(f"{folder}: log-probabilities of the saved model are off by {difference:.2g}", status=1)
    dist.barrier()


# ---------------------------------------------------------------- 5. Rollout


@dataclasses.dataclass
class Responses:
    """Rows of a rollout, of which a slice or a list of row numbers takes some."""

    prompts: list[Prompt]
    texts: list[str]  # without special tokens
    prompts_BP: torch.Tensor
    prompt_mask_BP: torch.Tensor
    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor  # 1 up to and including the first EOS
    ended_B: torch.Tensor  # whether there is an EOS

    def __getitem__(self, rows: slice | list[int]) -> "Responses":
        numbers = range(len(self.texts))[rows] if isinstance(rows, slice) else rows
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return Responses(*(v[rows] if torch.is_tensor(v) else [v[i] for i in numbers] for v in values))


@torch.no_grad()
def generate(
    model, prompts_BP, prompt_mask_BP, *, num_samples: int, greedy: bool, length: int, temperature: float, eos_ids: list
) -> torch.Tensor:
    """Decodes `num_samples` sampled rows per prompt (adjacent), then, if `greedy`, one greedy row per prompt.

    Sampling is from softmax(logits / temperature), without top-k or top-p: what is sampled is what is scored.
    -> tokens_RT, T ≤ length: decoding stops when all rows have ended. A row that has ended repeats its EOS.
    """
    device, (B, P) = prompts_BP.device, prompts_BP.shape
    index_R = torch.arange(B, device=device).repeat_interleave(num_samples)  # the prompt of each row
    S = len(index_R)  # the first S rows are sampled
    if greedy:
        index_R = torch.cat([index_R, torch.arange(B, device=device)])
    R = len(index_R)

    # Prompts go through the model once; then each row takes its own copy of its prompt's cache.
    cache = transformers.DynamicCache(config=model.config)
    positions_BP = position_ids(prompt_mask_BP)
    inputs = dict(input_ids=prompts_BP, attention_mask=prompt_mask_BP, position_ids=positions_BP, logits_to_keep=1)
    logits_NV = model(**inputs, past_key_values=cache, use_cache=True).logits[index_R, -1]
    if not logits_NV.amax(-1).isfinite().all():
        fail("the policy's logits are not finite: it has diverged; lower --learning-rate", status=1)
    cache.reorder_cache(index_R)
    mask_NL = torch.cat([prompt_mask_BP[index_R], prompt_mask_BP.new_ones(R, length)], 1)
    next_position_N1 = positions_BP[index_R, -1:] + 1

    eos_E = torch.tensor(eos_ids, device=device)
    rows_N = torch.arange(R, device=device)  # the N rows that have not ended; only they go through the model
    tokens_RT = torch.empty(R, length, dtype=torch.long, device=device)
    for t in range(length):
        token_N = logits_NV.argmax(-1)
        token_N[:S] = sample(logits_NV[:S].float() / temperature)
        tokens_RT[rows_N, t:] = token_N[:, None]  # what follows an EOS repeats it
        going_N = ~torch.isin(token_N, eos_E)
        going = int(going_N.sum())
        if not going or t + 1 == length:
            return tokens_RT[:, : t + 1]
        if going < len(rows_N):
            kept_N = going_N.nonzero().squeeze(1)
            S = int((kept_N < S).sum())
            rows_N, token_N, mask_NL = rows_N[kept_N], token_N[kept_N], mask_NL[kept_N]
            next_position_N1 = next_position_N1[kept_N]
            cache.reorder_cache(kept_N)
        inputs = dict(input_ids=token_N[:, None], position_ids=next_position_N1 + t)
        inputs |= dict(attention_mask=mask_NL[:, : P + t + 1], past_key_values=cache, use_cache=True)
        logits_NV = model(**inputs).logits[:, -1]


def sample(logits_NV: torch.Tensor) -> torch.Tensor:
    """-> tokens_N, by one random number each (`multinomial` draws one for each entry of the vocabulary)."""
    cumulative_NV = logits_NV.softmax(-1).cumsum(-1, dtype=torch.float64)
    points_N1 = cumulative_NV[:, -1:] * torch.rand_like(cumulative_NV[:, -1:])
    return torch.searchsorted(cumulative_NV, points_N1, right=True).squeeze(1)


def response_mask(tokens_BT: torch.Tensor, eos_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (mask_BT, 1 up to and including the first EOS; ended_B, whether there is one). Pad ids play no part."""
    is_eos_BT = torch.isin(tokens_BT, torch.tensor(eos_ids, device=tokens_BT.device)).long()
    return (is_eos_BT.cumsum(1) - is_eos_BT == 0).long(), is_eos_BT.any(1)


def rollout(
    policy, prompts: list[Prompt], device, tokenizer, eos_ids: list[int], num_samples: int, greedy: bool, **settings
) -> Responses:
    """Responses of the policy as it is now: `num_samples` sampled rows per prompt (adjacent), then the greedy ones."""
    prompts_BP, prompt_mask_BP = left_pad([prompt.ids for prompt in prompts], device)
    settings |= dict(num_samples=num_samples, greedy=greedy, eos_ids=eos_ids)
    with whole_model(policy, device) as model:
        tokens_RT = generate(model, prompts_BP, prompt_mask_BP, **settings)
    mask_RT, ended_R = response_mask(tokens_RT, eos_ids)
    B = len(prompts)
    index_R = [i for i in range(B) for _ in range(num_samples)] + list(range(B if greedy else 0))
    texts = tokenizer.batch_decode(to_lists(tokens_RT, mask_RT), skip_special_tokens=True)
    row_prompts = [prompts[i] for i in index_R]
    return Responses(row_prompts, texts, prompts_BP[index_R], prompt_mask_BP[index_R], tokens_RT, mask_RT, ended_R)


def rows_of(responses: Responses, **columns) -> list[dict]:
    """Responses as rows of a file that people can read; `columns`: more lists of their length."""
    columns = dict(prompt=[prompt.text for prompt in responses.prompts], response=responses.texts) | columns
    columns |= dict(ended=responses.ended_B.tolist(), tokens=to_lists(responses.tokens_BT, responses.mask_BT))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def responses_of(prompts: list[Prompt], rows: list[dict], device: torch.device) -> Responses:
    """Rows of such a file, with their prompts, as responses again."""
    prompts_BP, prompt_mask_BP = left_pad([prompt.ids for prompt in prompts], device)
    tokens_BT, mask_BT = right_pad([row["tokens"] for row in rows], device)
    ended_B = torch.tensor([row["ended"] for row in rows], device=device)
    texts = [row["response"] for row in rows]
    return Responses(list(prompts), texts, prompts_BP, prompt_mask_BP, tokens_BT, mask_BT, ended_B)


def to_lists(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[list]:
    """The values of the real tokens of each row."""
    return [values[:n] for values, n in zip(values_BT.tolist(), mask_BT.sum(1).tolist(), strict=True)]


def from_lists(rows: list[list[float]], mask_BT: torch.Tensor) -> torch.Tensor:
    """-> values_BT, 0 where masked."""
    return torch.tensor([row + [0.0] * (mask_BT.shape[1] - len(row)) for row in rows], device=mask_BT.device)


def map_rows(function: Callable, prompts: list[Prompt], rows: list[dict], size: int, device: torch.device) -> list:
    """function(responses) -> list, over all rows, `size` of them at once, each rank its share -> the whole list."""
    mine, found = deal_out(list(zip(prompts, rows, strict=True))), []
    for batch, _ in micro_batches(len(mine), size):
        found += function(responses_of(*zip(*mine[batch], strict=True), device))
    return gather_rows(found)[: len(rows)]


def per_token(module, responses: Responses, **inputs) -> torch.Tensor:
    """What a function of prompts and responses gives for each token -> (B, T), 0 where all rows have ended."""
    width = responses.mask_BT.sum(1).max()
    dist.all_reduce(width, op=dist.ReduceOp.MAX)  # under ZeRO-3 ranks must take equal steps, chunks of logits included
    more = int(width) - responses.tokens_BT.shape[1]  # below 0: padding drops what is too wide
    tokens_BT = F.pad(responses.tokens_BT, (0, more))
    return F.pad(module(responses.prompts_BP, responses.prompt_mask_BP, tokens_BT, **inputs), (0, -more))


@torch.no_grad()
def forward_rows(module, responses: Responses, micro_batch_size: int, **inputs) -> torch.Tensor:
    """`per_token` of all rows, without gradients, by micro-batches -> (B, T)."""
    result_BT = torch.empty_like(responses.tokens_BT, dtype=torch.float32)
    with resident(module, responses.tokens_BT.device):
        for rows, _ in micro_batches_by_length(responses.mask_BT.sum(1), micro_batch_size):
            result_BT[rows] = per_token(module, responses[rows], **inputs)
    return result_BT


# ---------------------------------------------------------------- 6. Rewards


class LastTokenScore(nn.Module):
    """A reward model as a function of right-padded token ids: its scalar head at the last real token."""

    def __init__(self, model):
        super().__init__()
        if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
            fail(f"{type(model).__name__} has no linear head `score` with one output, so it is no reward model")
        self.__dict__["whole"] = _view(model).eval()
        self.model = model.train()

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """-> scores_B, float32. The mask finds the last real token: transformers' own rule misses it if pad = EOS."""
        hidden_BLD = hidden_states(self.model, ids_BL, mask_BL)
        last_BD = hidden_BLD[torch.arange(len(ids_BL), device=ids_BL.device), mask_BL.sum(1) - 1]
        return self.model.score(last_BD).squeeze(-1).float()


class ResponseValues(nn.Module):
    """A sequence classification model as a value of each token of a response: its head where the token is predicted."""

    def __init__(self, model):
        super().__init__()
        self.__dict__["whole"] = _view(model).eval()
        self.model, self.mean = model.train(), getattr(model.config, "reward_mean", 0.0)

    def forward(self, prompts_BP, prompt_mask_BP, responses_BT) -> torch.Tensor:
        """-> values_BT, float32."""
        hidden_BTD = response_hidden_states(self.model, prompts_BP, prompt_mask_BP, responses_BT)
        return self.model.score(hidden_BTD).squeeze(-1).float() - self.mean


def load_classifier(path: str, placement: Placement):
    """A language model with a new scalar head, which the caller sets."""
    tokenizer = load_tokenizer(path)
    classifier = transformers.AutoModelForSequenceClassification
    model = load_model(path, classifier, placement, new_head=True, num_labels=1)
    check_vocabulary(model, tokenizer)
    pad = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad  # else transformers takes no batches
    return model


def average_models(new: Path, old: Path, share: float, folder: Path) -> None:
    """share · new + (1 − share) · old, both saved models, into a folder like theirs; a file at a time in memory."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(new, folder)
    for path in folder.glob("*.safetensors"):
        with safe_open(new / path.name, "pt") as a, safe_open(old / path.name, "pt") as b:
            tensors = {name: b.get_tensor(name).lerp(a.get_tensor(name), share) for name in a.keys()}
        save_file(tensors, path, metadata={"format": "pt"})


def load_value_model(reward_model: str | None, policy: str, placement: Placement) -> ResponseValues:
    """Starts from a reward model that has the policy's tokenizer, else from the policy with a head of zeros."""
    classifier = transformers.AutoModelForSequenceClassification
    if reward_model and load_tokenizer(reward_model).get_vocab() == load_tokenizer(policy).get_vocab():
        return ResponseValues(load_model(reward_model, classifier, placement, num_labels=1))
    model = load_classifier(policy, placement)
    nn.init.zeros_(model.score.weight)
    return ResponseValues(model)


def reward_model_ids(tokenizer, prompt: str, response: str, max_length: int) -> list[int]:
    """What a reward model reads, in training and scoring: prompt + response as one text, then EOS; cut on the left."""
    ids = encode(tokenizer, prompt + response)
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    return cut_left(ids, max_length, tokenizer.bos_token_id)


def reward_model_function(path: str, placement: Placement) -> Callable[..., list[float]]:
    """A sequence-classification folder as a reward function of texts; so its tokenizer may be any."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        fail(f"{path}: the reward model's tokenizer has no EOS token, which ends what it reads")
    model = load_model(path, transformers.AutoModelForSequenceClassification, placement, num_labels=1)
    check_vocabulary(model, tokenizer)
    max_length = getattr(model.config, "max_position_embeddings", sys.maxsize)
    mean = getattr(model.config, "reward_mean", 0.0)
    scorer = freeze(LastTokenScore(model), placement)

    @torch.no_grad()
    def reward(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
        ids = [reward_model_ids(tokenizer, *pair, max_length) for pair in zip(prompts, responses, strict=True)]
        scores_B, lengths_B = torch.empty(len(ids), device=placement.device), torch.tensor([len(row) for row in ids])
        with resident(scorer, placement.device):
            for rows, _ in micro_batches_by_length(lengths_B, placement.micro_batch_size):
                scores_B[rows] = scorer(*right_pad([ids[i] for i in rows], placement.device))
        return (scores_B - mean).tolist()

    return reward


def function_from_file(spec: str) -> Callable[..., list[float]]:
    """`path/to/file.py:name` -> the function. No other code is ever loaded from a path."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{spec}: no such reward function; wanted is an existing file and a name, as in path/to/file.py:name")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fail(f"{spec}: importing the file raised {type(error).__name__}: {_first_line(error)}")
    if not callable(getattr(module, name, None)):
        fail(f"{spec}: the file has no function {name!r}")
    return getattr(module, name)


class Reward:
    """A checked reward function of texts (a file's, else the reward model's), less a penalty where there is no EOS."""

    def __init__(self, model: str | None, function: str | None, missing_eos_penalty: float, placement: Placement):
        self.name, self.missing_eos_penalty = function or model, missing_eos_penalty
        self.function = function_from_file(function) if function else reward_model_function(model, placement)

    def __call__(self, responses: Responses) -> torch.Tensor:
        """-> rewards_B, float32."""
        prompts = [prompt.text for prompt in responses.prompts]
        names = dict.fromkeys(name for prompt in responses.prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in responses.prompts] for name in names}
        try:
            scores = [float(score) for score in self.function(prompts, list(responses.texts), **columns)]
        except (Exception, SystemExit) as error:
            fail(f"{self.name} raised {type(error).__name__}: {_first_line(error)}", status=1)
        if len(scores) != len(prompts):
            fail(f"{self.name} returned {len(scores)} rewards for {len(prompts)} responses", status=1)
        for score, text in zip(scores, responses.texts, strict=True):
            if not abs(score) < torch.finfo(torch.float32).max:  # nor NaN
                fail(f"{self.name} returned {score} for the response {text!r}", status=1)
        rewards_B = torch.tensor(scores, device=responses.ended_B.device)
        return rewards_B - self.missing_eos_penalty * ~responses.ended_B


# ---------------------------------------------------------------- 7. Evaluation


def evaluate(policy, reference, prompts: list[Prompt], batch_size: int, rollout, logprobs, scorers) -> list[dict]:
    """Greedy responses to held-out prompts -> one dict each, the same list on every rank.

    `scorers`: {column: Reward}.
    """
    mine, rows = deal_out(prompts), []
    for batch, _ in micro_batches(len(mine), batch_size):
        responses = rollout(policy, mine[batch], num_samples=0, greedy=True)
        log_ratios_BT = logprobs(policy, responses) - logprobs(reference, responses)
        columns = dict(prompt=[prompt.text for prompt in responses.prompts], response=responses.texts)
        columns |= {name: scorer(responses).tolist() for name, scorer in scorers.items()}
        columns |= dict(kl=(log_ratios_BT * responses.mask_BT).sum(1).tolist())
        columns |= dict(response_length=responses.mask_BT.sum(1).tolist())
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return gather_rows(rows)[: len(prompts)]


def evaluation_metrics(rows: list[dict], initial_rows: list[dict]) -> dict[str, float]:
    """Means of the rows, and how often they beat the initial policy's response to the same prompt."""
    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    means = {f"eval_{name}": sum(row[name] for row in rows) / len(rows) for name in names}
    if "reward" not in names:
        return means
    return means | dict(eval_win_rate=win_rate(rows, initial_rows))


def win_rate(rows: list[dict], others: list[dict]) -> float:
    """How often the first reward of a pair is the greater one; a tie counts ½."""
    pairs = [(row["reward"], other["reward"]) for row, other in zip(rows, others, strict=True)]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


# ---------------------------------------------------------------- 8. The run


def open_run(args, script: str) -> str:
    """Makes the folder of a run whose phases will be processes of their own -> the folder."""
    start_processes()
    run = Run(args, script, 0)
    run.close()
    return str(run.folder)


def how_to_go_on(when: str, folder: Path) -> str:
    launcher = "python" if os.environ.get("WORLD_SIZE", "1") == "1" else "the same launcher and number of ranks,"
    return f"Stopped {when}. To go on: {launcher} {sys.argv[0]} --resume {folder}"


def read_rows(path: Path) -> list:
    """The lines of a file of ours, none if there is no file; a last line that was torn off is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def write_rows(path: Path, rows: list[dict], append: bool = False) -> None:
    """JSON lines, written by rank 0: the whole file at once, or more of it."""
    if dist.get_rank() == 0:
        path.parent.mkdir(exist_ok=True)
        if append:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json_lines(rows))
        else:
            write_whole(path, json_lines(rows))
    dist.barrier()


def json_lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path: Path, text: str) -> None:
    """Written aside, then renamed: whoever reads it finds the old text or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


class Clock:
    """Seconds since the last lap; a lap waits for the GPU to finish what it was given."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before, self.last = self.last, time.perf_counter()
        return self.last - before


class Run:
    """A run's folder (args.json, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoint/) and its console.

    Rank 0 writes. `checkpointed` is the update of the checkpoint that is resumed, or 0. A script that keeps its own
    account of what is done says so by `done`, the update up to which the rows of metrics are final; then only a later
    checkpoint counts.
    """

    def __init__(self, args, script: str, total: int, unit: str = "update", done: int | None = None):
        name = [args.output_dir or f"runs/{Path(script).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"]
        dist.broadcast_object_list(name)
        self.folder, self.main = Path(name[0]).absolute(), dist.get_rank() == 0
        latest = self.folder / "checkpoint" / "latest"
        try:
            self.checkpointed = int(latest.read_text()) if args.resume else 0
        except (OSError, ValueError):
            if done is None:
                fail(f"--resume {self.folder}: there is no checkpoint (a run writes them with --save-every)")
            self.checkpointed = 0
        if done is not None and self.checkpointed <= done:
            self.checkpointed = 0
        if not args.resume and self.folder.is_dir() and any(self.folder.iterdir()):
            fail(f"--output-dir {self.folder} already holds a run or other files: choose another, or --resume the run")
        dist.barrier()  # every rank has looked before rank 0 writes
        fault = [None]
        if self.main:
            try:
                self._open_folder(args, self.checkpointed or (0 if done is None else done))
            except OSError as error:
                fault = [error.strerror]
        dist.broadcast_object_list(fault)  # all ranks end together
        if fault[0]:
            fail(f"--output-dir {self.folder}: {fault[0]}")
        self.bar = tqdm(total=total, unit=unit, disable=not (self.main and total))
        self.bar.update(self.checkpointed)
        self.signal, self.skipped, self.not_finite = 0, 0, []
        if total:  # something whose steps end in stop_if_asked; what has none may end at once
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._remember_signal)

    def _remember_signal(self, number, frame) -> None:
        self.signal = self.signal or number

    def _open_folder(self, args, done: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = dataclasses.asdict(args) | dict(resume=None, output_dir=None, ranks=dist.get_world_size())
        write_whole(self.folder / "args.json", json.dumps(saved, indent=2) + "\n")
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):  # forget what came after `done`
            kept = [row for row in read_rows(path) if args.resume and row["update"] <= done]
            write_whole(path, json_lines(kept))
        self.purge_step = done + 1 if args.resume else None

    @functools.cached_property
    def writer(self):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        return SummaryWriter(str(self.folder), purge_step=self.purge_step)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text)

    def log(self, update: int, metrics: dict[str, float]) -> None:
        """A row of metrics.jsonl (null for what is not finite), points of TensorBoard's curves, the progress bar.

        Ten updates in a row that skipped a step end the run.
        """
        metrics = dict(update=update, peak_memory_bytes=peak_memory_bytes()) | metrics
        if self.main:
            self._write_metrics(update, metrics)
        first = next((name for name, value in metrics.items() if not math.isfinite(value)), "a gradient")
        skipped = metrics.get("skipped_updates", 0)
        self.not_finite = [*self.not_finite, f"{first} in update {update}"] if skipped > self.skipped else []
        self.skipped = skipped
        if len(self.not_finite) == 10:
            fail(f"ten updates in a row were skipped; what was not finite first: {self.not_finite[0]}", status=1)

    def _write_metrics(self, update: int, metrics: dict[str, float]) -> None:
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()}) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, update)
        if update:
            shown = {name: f"{metrics[name]:.2f}" for name in ("reward", "kl", "accuracy") if name in metrics}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def log_samples(self, update: int, rows: list[dict], what: str = "greedy responses to held-out prompts") -> None:
        """All rows of an evaluation to samples.jsonl, three to the console."""
        if not self.main:
            return
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json_lines([dict(update=update) | row for row in rows]))
        scored = "reward" in rows[0]
        mean = f"mean reward {sum(row['reward'] for row in rows) / len(rows):.2f} of " if scored else ""
        self.say(f"\nAfter {update} updates: {mean}{what}, such as")
        for row in rows[:3]:
            reward = f"[{row['reward']:6.2f}] " if scored else ""
            self.say(f"  {reward}{row['prompt'][-120:]} ▸{row['response'][:400]}")

    def save_checkpoint(self, update: int, *engines) -> None:
        """Written into a folder of the update's own, then named by `latest` in one atomic step: never torn."""
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

    def load_checkpoint(self, *engines) -> int:
        """-> the update to begin with."""
        folder = self.folder / "checkpoint" / f"update-{self.checkpointed}"
        for i, engine in enumerate(engines if self.checkpointed else []):
            try:
                loaded, _ = engine.load_checkpoint(str(folder), tag=f"engine-{i}")
            except Exception as error:  # whatever pickle and DeepSpeed make of a broken file
                fail(f"--resume {self.folder}: {folder} could not be read: {_first_line(error)}")
            if not loaded:
                fail(f"--resume {self.folder}: {folder} is not there or not whole")
        self.skipped = sum(engine.skipped_steps for engine in engines)
        return self.checkpointed + 1

    def stop_if_asked(self, update: int, device: torch.device, *engines) -> None:
        """After ctrl-C or SIGTERM at any rank: a checkpoint, a line that says how to go on, exit status 130 or 143."""
        number = torch.tensor(self.signal, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number.item():
            if engines:
                self.save_checkpoint(update, *engines)
            self.close()
            self.say(how_to_go_on(f"after update {update}", self.folder))
            raise SystemExit(128 + number.item())

    def finish(self, model: str) -> None:
        """The console's last lines: what was learned, where it is, how to look at it."""
        self.close()
        if not self.main:
            return
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        first, last = rows[0], rows[-1]
        for name, what in (("reward", "Reward"), ("gold_reward", "Gold reward"), ("accuracy", "Accuracy")):
            if (name := f"eval_{name}") in first and name in last:
                self.say(f"{what + ':':13}{first[name]:.2f} → {last[name]:.2f} on held-out data")
        if "eval_win_rate" in last:
            kl = f"at a KL of {last['eval_kl']:.1f} nats"
            self.say(f"Win rate:    {last['eval_win_rate']:.0%} against the initial policy, {kl}")
        self.say(f"Saved:       {self.folder / model} (checked; transformers' from_pretrained reads it)")
        self.say(f"Samples:     {self.folder / 'samples.jsonl'}")
        self.say(f"Curves:      tensorboard --logdir {self.folder}")

    def close(self) -> None:
        self.bar.close()
        if "writer" in vars(self):
            self.writer.close()
        dist.barrier()
        dist.destroy_process_group()


def peak_memory_bytes() -> int:
    """The most that any rank's process has held so far: allocated on the GPU, or resident."""
    peaks = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, _peak_bytes())
    return max(peaks)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
