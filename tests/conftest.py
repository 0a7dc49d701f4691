"""What the tests share: the project on the path, tiny models made from configs, and scripts run as a user runs them."""

import concurrent.futures
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "reviews"
SHARED = ROOT.parent / "shared"  # development data; tests that want it skip where it is missing
sys.path.insert(0, str(ROOT))

SCRIPTS = ("remax", "reinforce", "ppo", "spr", "reward_model")
TINY = (
    "--total-episodes 32 --batch-size 8 --response-length 12 --eval-every 2 --eval-size 7 --learning-rate 1e-3".split()
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not run by default; `pytest -q -m slow tests` runs these tests alone")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


def script_environment() -> dict[str, str]:
    """One thread a rank, no network, and nothing of the process group that this process may have joined."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in group}
    return environment | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def run_script(name: str, *flags, ranks: int = 1, cwd=ROOT) -> subprocess.CompletedProcess:
    """`python name flags`, or torchrun with several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launcher, str(ROOT / name), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=script_environment(), capture_output=True, text=True, timeout=300)


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


def assert_ok(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def together(function, *cases: tuple) -> list:
    """function(*case) of every case, two at a time: most of a short run is start-up on one core."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(function, *case) for case in cases]]


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def start_backend(**flags):
    """The process group of this process, if it has none yet, and how models compute: like a script without flags."""
    import common

    defaults = dict(dtype="float32", attention="sdpa", zero_stage=0, offload=False, gradient_checkpointing=False)
    return common.start_processes(types.SimpleNamespace(**defaults | dict(micro_batch_size=2) | flags))


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
    return tokenizer


def left_padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
