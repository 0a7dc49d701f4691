"""Scripts on a device that is no CPU, without one: its tensors hold CPU data, and refuse to meet tensors of the CPU.

DeepSpeed's engine puts its module on the accelerator that it finds, here the CPU. So these tests replace it by a
stand-in: plain AdamW behind the part of an engine's interface that the scripts use. ZeRO, offload, streams and the
kernels of a real device are not tested here.
"""

import contextlib
import dataclasses
from unittest.mock import patch

import pytest
import torch
from conftest import EXAMPLE, PAIRS, SCRIPTS, read_metrics, run_here, short_flags
from torch.overrides import TorchFunctionMode

import common
import remax

DEVICE = torch.device("cuda", 0)
TENSOR = torch.Tensor
MAY_MIX = (TENSOR.copy_, TENSOR.data.__set__, torch._has_compatible_shallow_copy_type)  # as on CUDA
READS_HOST_MEMORY = (TENSOR.numpy, TENSOR.__array__)


def tensors_in(value) -> list:
    if isinstance(value, TENSOR):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def is_there(tensor) -> bool:
    return "on_fake_device" in vars(tensor)


def names_device(value) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value) == DEVICE


class FakeDevice(TorchFunctionMode):
    """Tensors are marked as being on DEVICE: those made there or moved there, and what is computed from them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in([args, kwargs])
        there = [tensor for tensor in tensors if is_there(tensor)]
        if function == TENSOR.device.__get__:
            return DEVICE if there else torch.device("cpu")
        if function == TENSOR.is_cuda.__get__:
            return bool(there)
        if function in READS_HOST_MEMORY and there:
            raise RuntimeError(f"{function.__name__} of a tensor on {DEVICE}")
        if function in (TENSOR.to, TENSOR.cpu, TENSOR.cuda):
            return self.move(function, args, kwargs)
        # Only 0-dimensional tensors of the CPU may meet others; and numbers of rows may be on the CPU.
        here = [tensor for tensor in tensors if not is_there(tensor)]
        if function in (torch.stack, torch.cat):
            mixed = there and here
        elif function == TENSOR.__getitem__ and is_there(args[0]):
            mixed = False
        else:
            mixed = there and any(tensor.dim() > 0 for tensor in here)
        if mixed and function not in MAY_MIX:
            raise RuntimeError(f"{function.__name__}: tensors on {DEVICE} meet tensors on the CPU")
        result_there = bool(there)
        if kwargs.get("device") is not None:
            result_there = names_device(kwargs["device"])
            kwargs["device"] = "cpu"
        if result_there and kwargs.get("generator") is not None:
            raise RuntimeError(f"{function.__name__}: a generator of the CPU for a tensor on {DEVICE}")
        result = function(*args, **kwargs)
        if function == TENSOR.data.__set__:
            mark(args[0], is_there(args[1]))
        elif function != TENSOR.copy_:
            for tensor in tensors_in(result):
                mark(tensor, result_there or is_there(tensor))
        return result

    def move(self, function, args, kwargs):
        tensor, *rest = args
        targets = [value for value in [*rest, *kwargs.values()] if isinstance(value, (str, torch.device, TENSOR))]
        target_there = is_there(tensor)
        for target in targets:
            target_there = is_there(target) if isinstance(target, TENSOR) else names_device(target)
        if function != TENSOR.to:
            target_there = function == TENSOR.cuda
        rest = ["cpu" if isinstance(value, (str, torch.device)) else value for value in rest]
        kwargs = {name: "cpu" if name == "device" and value else value for name, value in kwargs.items()}
        result = tensor.to(*rest, **kwargs) if function == TENSOR.to else tensor
        if result is tensor and target_there == is_there(tensor):
            return tensor
        result = result.clone() if result is tensor or result.data_ptr() == tensor.data_ptr() else result
        return mark(result, target_there)


def mark(tensor, there: bool):
    vars(tensor).pop("on_fake_device", None)
    if there:
        vars(tensor)["on_fake_device"] = True
    return tensor


class Engine:
    """The part of a DeepSpeed engine that the scripts use, for one process, float32 and ZeRO-0."""

    def __init__(self, module, optimizer):
        self.module, self.optimizer, self.basic_optimizer = module.to(DEVICE), optimizer, optimizer
        self.device, self.skipped_steps = DEVICE, 0
        self.set_gradient_accumulation_boundary = lambda is_last: None
        self.zero_optimization_stage, self.bfloat16_enabled = lambda: 0, lambda: False

    def __call__(self, *inputs):
        if not all(map(is_there, tensors_in(inputs))):
            raise RuntimeError("an input of the engine is on the CPU")
        return self.module(*inputs)

    def __getattr__(self, name):  # an engine passes on the attributes of its module
        return getattr(self.module, name)

    def backward(self, loss, scale_wrt_gas):
        torch.autograd.backward(loss)  # no torch function, so activations that it computes again are watched

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextlib.contextmanager
def fake_device():
    """The device of every script is DEVICE; a collective refuses tensors of the CPU, as NCCL does."""
    start_processes, all_reduce = common.start_processes, common.dist.all_reduce

    def checked_all_reduce(tensor, *args, **kwargs):
        if not is_there(tensor):
            raise RuntimeError("all_reduce: a tensor on the CPU")
        return all_reduce(tensor, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (common, "start_processes", lambda **how: dataclasses.replace(start_processes(**how), device=DEVICE)),
            (common.dist, "all_reduce", checked_all_reduce),
            (common.deepspeed, "initialize", lambda model, optimizer, config: (Engine(model, optimizer),)),
            (common.deepspeed, "DeepSpeedEngine", Engine),
            (torch.cuda, "mem_get_info", lambda: (2**40, 2**40)),
        ):
            stack.enter_context(patch.object(target, name, new))
        stack.enter_context(FakeDevice())
        yield


FLAGS = "--batch-size 4 --total-episodes 8 --micro-batch-size 3 --eval-every 1 --eval-size 3".split()
FLAGS += ["--learning-rate", "2e-4"]  # with larger steps rounding decides greedy tokens


def run_flags(script, folder) -> list:
    own = short_flags(script, 6)
    own += ["--max-prompt-length", "12"] if script not in PAIRS else []
    own += ["--gradient-checkpointing"] if script == "ppo" else []
    own += ["--gold-reward-function", EXAMPLE / "sentiment.py:reward"] if script == "dpo" else []
    return [*FLAGS, *own, *SCRIPTS[script].busy.split(), "--output-dir", folder]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_updates_an_evaluation_and_the_final_check(tmp_path, script):
    with fake_device():
        assert run_here(script, *run_flags(script, tmp_path / "r")) == 0
    rows = read_metrics(tmp_path / "r")
    assert [row["update"] for row in rows] == [0, 1, 2] and rows[2]["grad_norm"] > 0
    assert any(name.startswith("eval_") for name in rows[2])


def test_the_device_changes_nothing(tmp_path):
    """The fake device computes: its metrics are those of the CPU and DeepSpeed's engine."""
    with fake_device():
        assert run_here("remax", *run_flags("remax", tmp_path / "fake")) == 0
    assert run_here("remax", *run_flags("remax", tmp_path / "cpu")) == 0
    for fake, cpu in zip(read_metrics(tmp_path / "fake"), read_metrics(tmp_path / "cpu")):
        for name in ("reward", "eval_reward", "eval_log_ratio", "kl", "loss", "grad_norm"):
            if name in cpu:
                assert fake[name] == pytest.approx(cpu[name], rel=1e-3, abs=1e-5), name


ADVANTAGES, PAD, GLOBAL_MEANS = remax.advantages, common.pad, common.global_means


def advantages_of_a_cpu_tensor(rewards_B, *others):
    return ADVANTAGES(rewards_B, *others) - torch.zeros(len(rewards_B), 1)


def padded_on_the_cpu(rows, side, device):
    return PAD(rows, side, torch.device("cpu"))


def means_on_the_cpu(**tensors):
    return GLOBAL_MEANS(**{name: tensor.cpu() for name, tensor in tensors.items()})


def sampled_by_numpy(logits_NV):
    return torch.tensor(logits_NV.numpy().argmax(1))


PLANTED = [
    (remax, "advantages", advantages_of_a_cpu_tensor, "sub: tensors on cuda:0 meet tensors on the CPU"),
    (common, "pad", padded_on_the_cpu, "embedding: tensors on cuda:0 meet tensors on the CPU"),
    (common, "global_means", means_on_the_cpu, "all_reduce: a tensor on the CPU"),
    (common, "sample", sampled_by_numpy, "numpy of a tensor on cuda:0"),
]


@pytest.mark.parametrize("target, name, planted, expected", PLANTED, ids=[case[1] for case in PLANTED])
def test_a_planted_mix_is_caught(tmp_path, target, name, planted, expected):
    with fake_device(), patch.object(target, name, planted), pytest.raises(RuntimeError, match=expected):
        run_here("remax", *run_flags("remax", tmp_path / "r"))
