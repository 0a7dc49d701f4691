"""What the tests share: tiny models made from configs, and scripts run in processes of their own."""

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' own process computes like the others
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "reviews"
SHARED = ROOT.parent / "shared"  # development data; tests that need it skip where it is missing
sys.path.insert(0, str(ROOT))

EXAMPLE_DATA = ["--dataset", EXAMPLE / "prompts.jsonl", "--eval-dataset", EXAMPLE / "prompts_test.jsonl"]
EXAMPLE_DATA += ["--reward-model", EXAMPLE / "reward_model"]  # to be named beside a model of one's own
EXAMPLE_PAIRS = ["--dataset", EXAMPLE / "preferences.jsonl"]


@dataclasses.dataclass(frozen=True)
class Script:
    """All that the tests need to know of a script. Flags are one text.

    `one_step`: flags under which an update is one optimizer step of each model. `busy`: flags under which all that the
    script can do is at work, in at least three steps of 8 rows; test_engine.py and test_devices.py train with them.
    """

    name: str
    data: str  # "prompts", to which it samples responses, or "pairs"
    one_step: str = ""
    busy: str = ""
    busy_episodes: int = 24
    models: int = 1  # in training


# A new script needs one entry here, and its row in the README.
ENTRIES = [
    Script("remax", data="prompts", busy="--num-samples 2"),
    Script("reinforce", data="prompts", busy="--num-samples 2 --baseline leave-one-out"),
    Script("ppo", data="prompts", one_step="--num-epochs 1", busy="--num-epochs 2", models=2),
    Script(
        "grpo",
        data="prompts",
        one_step="--num-samples 2",
        busy="--num-samples 4 --num-epochs 2",
    ),
    Script(
        "spr",
        data="prompts",
        one_step="--num-epochs 1 --num-minibatches 1 --num-samples 3",
        busy="--num-samples 3 --num-minibatches 1 --num-epochs 3 --beta 0.5",
        busy_episodes=16,
    ),
    Script(
        "spr_token",
        data="prompts",
        one_step="--num-epochs 1 --num-minibatches 1 --num-samples 1 --value-epochs 1",
        busy="--num-samples 1 --num-minibatches 1 --num-epochs 2 --beta 2 --value-epochs 2 --td-lambda 0.5 --gamma 0.9",
        busy_episodes=16,
        models=2,
    ),
    Script("reward_model", data="pairs"),
    Script("dpo", data="pairs"),
]
SCRIPTS = {entry.name: entry for entry in ENTRIES}
PAIRS = [entry.name for entry in ENTRIES if entry.data == "pairs"]
TINY = (
    "--total-episodes 32 --batch-size 8 --response-length 12 --eval-every 2 --eval-size 7 --learning-rate 1e-3".split()
)


@functools.cache
def few_pairs() -> str:
    """A file with the example's first pairs: reading all of them takes seconds."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder, "preferences.jsonl")
    lines = (EXAMPLE / "preferences.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:96]))
    return str(path)


def short_flags(script: str, response_length) -> list[str]:
    """Flags of a run of seconds: few pairs, or short responses."""
    if script in PAIRS:
        return ["--dataset", few_pairs()]
    return ["--response-length", str(response_length)]


def others_are_slow(cases, soon: str) -> list:
    """Cases of a test, scripts or tuples that begin with one: those of the scripts in `soon` run every day."""
    marked = []
    for case in cases:
        script, *more = [case] if isinstance(case, str) else case
        marked.append(pytest.param(script, *more, marks=[] if script in soon.split() else pytest.mark.slow))
    return marked


def fields_of(script: str) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(importlib.import_module(script).Args)}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not run by default; `pytest -q -m slow tests` runs these tests alone")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


# ---------------------------------------------------------------- Processes


def script_environment() -> dict[str, str]:
    """One thread a rank, no network, and nothing of the process group that this process may have joined."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in group}


def launch_command(name: str, *flags, ranks: int = 1, launcher: str = "torchrun") -> list[str]:
    """`python name flags`, or with several ranks a launcher."""
    launchers = dict(
        torchrun=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)],
        deepspeed=["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)],
    )
    return [sys.executable, *(launchers[launcher] if ranks > 1 else []), str(ROOT / name), *map(str, flags)]


@contextlib.contextmanager
def cores_for(ranks: int):
    """Several ranks count as two cores: over all workers of pytest-xdist, no more groups run than there is room for."""
    workers = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if ranks == 1 or workers is None:
        yield
        return
    locks = []
    for number in range(max(1, os.cpu_count() // 2)):
        locks.append(FileLock(Path(tempfile.gettempdir(), f"pytest-{workers}-cores-{number}")))
    for lock in itertools.cycle(locks):
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0.1)
            break
    try:
        yield
    finally:
        lock.release()


def launch(name: str, *flags, cwd=ROOT, ranks: int = 1, **launching) -> subprocess.CompletedProcess:
    """A script as a user runs it. It takes 4 s to start, so most tests use `run_script`."""
    command = launch_command(name, *flags, ranks=ranks, **launching)
    with cores_for(ranks):
        return subprocess.run(command, cwd=cwd, env=script_environment(), capture_output=True, text=True, timeout=300)


@functools.cache
def fork_server():
    """A process that has imported everything and computed nothing. Each fork of it is a process that starts at once."""
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("gpt2", "llama")]
    context.set_forkserver_preload(
        [*SCRIPTS, *models, "workers.script_worker", "workers.engine_worker", "workers.first_use"]
    )
    with patch.dict(os.environ, script_environment() | dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"), clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def started(function, *args, ranks: int = 1, cwd=ROOT):
    """Forked processes, one per rank of a group, which call function(*args). Whatever still runs at the end is killed.

    Each has the paths of its output: `out` and `err`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(cores_for(ranks))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = dict(WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=free.getsockname()[1])
        processes = []
        for rank in range(ranks):
            variables = group | dict(RANK=rank, LOCAL_RANK=rank) if ranks > 1 else {}
            environment = script_environment() | {name: str(value) for name, value in variables.items()}
            out, err = folder / f"out-{rank}", folder / f"err-{rank}"
            process = fork_server().Process(target=_forked, args=(environment, str(cwd), out, err, function, args))
            process.out, process.err = out, err
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def _forked(environment, cwd, out, err, function, args) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    function(*args)


def output_of(processes) -> tuple[str, str]:
    return tuple("".join(getattr(p, kind).read_text() for p in processes) for kind in ("out", "err"))


def wait(processes, timeout: float = 300) -> int:
    """-> the first exit status that is not 0. When a rank fails, the others have ten seconds to fail likewise."""
    end = time.monotonic() + timeout
    running = list(processes)
    while running and time.monotonic() < end:
        multiprocessing.connection.wait([p.sentinel for p in running], end - time.monotonic())
        running = [p for p in running if p.exitcode is None]
        if any(p.exitcode for p in processes):
            end = min(end, time.monotonic() + 10)
    codes = [p.exitcode for p in processes if p.exitcode]
    assert codes or not running, f"still running after {timeout} s: {output_of(processes)}"
    return codes[0] if codes else 0


def as_program(name: str, flags: tuple) -> None:
    sys.argv = [str(ROOT / name), *map(str, flags)]
    sys.path.insert(0, str((ROOT / name).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_script(name: str, *flags, ranks: int = 1, cwd=ROOT) -> subprocess.CompletedProcess:
    """A script as a program of its own, in forked processes."""
    with started(as_program, name, flags, ranks=ranks, cwd=cwd) as processes:
        status = wait(processes)
        return subprocess.CompletedProcess([name, *flags], status, *output_of(processes))


def forked(function, *args, ranks: int = 1):
    """What function(*args) returns at rank 0, in forked processes."""
    with tempfile.TemporaryDirectory() as folder:
        with started(_saved_result, folder, function, args, ranks=ranks) as processes:
            assert wait(processes) == 0, output_of(processes)
        return torch.load(Path(folder, "result"), weights_only=False)


def _saved_result(folder, function, args) -> None:
    result = function(*args)
    if os.environ.get("RANK", "0") == "0":
        torch.save(result, Path(folder, "result"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # rank 0 is the others' meeting point


def together(function, *cases: tuple, **kwargs) -> list:
    """function(*case) of every case in processes, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(function, *case, **kwargs) for case in cases]]


def run_here(script: str, *flags) -> int:
    """main() of a script in this process, where others may follow -> its exit status."""
    import common

    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (common.dist, "destroy_process_group", lambda: None),  # the next run needs it
            (signal, "signal", lambda *args: None),
            (sys, "argv", [str(ROOT / f"{script}.py"), *map(str, flags)]),
        ):
            stack.enter_context(patch.object(target, name, new))
        try:
            importlib.import_module(script).main()
        except SystemExit as end:
            return end.code
    return 0


def one_error(capsys) -> str:
    """The error line on standard error, which must be the only one."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


def recorded_batches(monkeypatch) -> list:
    """A list that grows by the batch of each update."""
    import common

    batches = []
    shuffled_batch = common.shuffled_batch

    def recorded(*args):
        batches.append(shuffled_batch(*args))
        return batches[-1]

    monkeypatch.setattr(common, "shuffled_batch", recorded)
    return batches


def assert_ok(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_machine(row: dict) -> dict:
    """A row of metrics without times and memory."""
    return {name: value for name, value in row.items() if "second" not in name and "memory" not in name}


def assert_equal_training(found, expected, learning_rate) -> None:
    """Both are {name: weights} after some steps of Adam from the same weights.

    Weights differ by a hundredth of a step in the root mean square of a tensor, and none by more than a quarter of one.
    Where the terms of a gradient cancel, their rounding is left: some 2^-24 of terms near 1. There Adam's step changes
    by learning_rate / eps, 1e5 learning rates, per unit of gradient. So some weights may be off by more than the rest.
    """
    assert found
    for name, weights in found.items():
        difference = (weights - expected[name]).detach()
        assert difference.abs().max() <= learning_rate / 4, name
        assert difference.square().mean().sqrt() <= learning_rate / 100, name


def assert_equal_gradients(found, expected) -> None:
    """Both are flat gradients, one of each step. The first agree to a relative 1e-5, later ones to 1e-3.

    Later gradients follow weights that differ by rounding. How much of it they magnify depends on the loss: GRPO's
    penalty grows exponentially with the log-ratio.
    """
    for step, (new, old) in enumerate(zip(found, expected, strict=True)):
        assert (new - old).norm() < (1e-3 if step else 1e-5) * old.norm() and old.norm() > 0


# ---------------------------------------------------------------- Models


def tiny_model(kind: str, vocab_size: int = 50, **kwargs):
    """A random causal language model with large weights (so that mistakes show), float32."""
    import transformers

    torch.manual_seed(0)
    ids = dict(vocab_size=vocab_size, bos_token_id=1, eos_token_id=1, pad_token_id=1, initializer_range=0.3) | kwargs
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **ids)
        model = transformers.GPT2LMHeadModel(config)
    else:
        shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        config = transformers.LlamaConfig(**shape, max_position_embeddings=64, **ids)
        model = transformers.LlamaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    return tiny_model(request.param)


def example_tokenizer():
    import common

    tokenizer = common.load_tokenizer(str(EXAMPLE / "policy"))
    tokenizer.num_embeddings = len(tokenizer)  # as load_model does
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return example_tokenizer()


def number_tokenizer(size: int = 50):
    """Its words are its ids, 1 is EOS."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1")
    tokenizer.num_embeddings = size
    tokenizer.eos_ids = [1]
    return tokenizer


def start_backend(**flags):
    """The process group of this process, if it has none yet, and how models compute: like a script without flags."""
    import common

    defaults = dict(dtype="float32", attention="sdpa", zero_stage=0, offload=False, gradient_checkpointing=False)
    return common.start_processes(**defaults | flags)


def policy_of(model, tokenizer, sampling):
    """A policy around a model in memory."""
    import common

    policy = common.new_policy(model, tokenizer, sampling, torch.device("cpu"))
    eos_ids = model.generation_config.eos_token_id or []
    policy.eos_ids = sorted({*policy.eos_ids, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])})
    return policy


def logprobs_of(engine, prompts_BP, prompt_mask_BP, tokens_BT):
    """What an engine or a module around a language model gives to responses of any length."""
    ids_BL = torch.cat([prompts_BP, tokens_BT], 1)
    mask_BL = torch.cat([prompt_mask_BP, torch.ones_like(tokens_BT)], 1)
    return engine(ids_BL, mask_BL, tokens_BT.shape[1])


def values_of(engine, prompts_BP, prompt_mask_BP, tokens_BT):
    """What an engine or a module around a value model gives before each token."""
    ids_BL = torch.cat([prompts_BP, tokens_BT], 1)
    mask_BL = torch.cat([prompt_mask_BP, torch.ones_like(tokens_BT)], 1)
    states_T = torch.arange(tokens_BT.shape[1]) + prompts_BP.shape[1] - 1
    return engine(ids_BL, mask_BL, states_T.expand(len(ids_BL), -1))


def left_padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
