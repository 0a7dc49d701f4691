"""main() of the scripts, watched and disturbed; many in one process, since a start of its own takes each 4 s."""

import contextlib
import functools
import importlib
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import read_metrics, run_here, without_machine
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file, save_file
from workers.engine_worker import POISONS

import common

LOSSES = ("policy_loss", "value_loss", "preference_loss", "weighted_nll")


def fixed_responses(update):
    """A `generate` whose responses depend on the prompt and the update alone, so on no rank and on no weight."""
    real_generate = common.generate

    def generate(model, prompts_BP, prompt_mask_BP, eos_ids, sampling, num_samples, greedy):
        if not eos_ids:  # the check of a model that was loaded
            return real_generate(model, prompts_BP, prompt_mask_BP, eos_ids, sampling, num_samples, greedy)
        prompts = [ids[mask == 1].tolist() for ids, mask in zip(prompts_BP, prompt_mask_BP)]
        keys = [(*p, sample) for p in prompts for sample in range(num_samples)] + [(*p, -1) for p in prompts] * greedy
        rows = []
        for key in keys:
            generator = torch.Generator().manual_seed(hash((*key, update())) % 2**63)
            row = torch.randint(1, 200, (sampling.response_length,), generator=generator)
            row[torch.randint(sampling.response_length, (), generator=generator) :] = eos_ids[0]
            rows.append(row)
        return torch.stack(rows)

    return generate


def run(script: str, flags: list, fixed=False, poisoned=((), "loss"), spoiled=False) -> dict:
    """main() of a script -> its exit status, what each optimizer step saw, its last weights, and its metrics.

    `gradients`: one flat tensor per step; `moments`: the sum of the sizes of Adam's moments before the step.
    `metrics`: those that do not depend on the machine. `fixed`: the responses do not depend on the policy.
    `poisoned`: (updates, how): in these the last rank's losses or gradients are not finite. `spoiled`: one of the saved
    weights is not quite the trained one.
    """
    module, update = importlib.import_module(script), 0
    seen = dict(gradients=[], moments=[], weights={})
    updates, how = poisoned
    step, set_seed = common.optimizer_step, common.set_seed
    save_and_check, check_saved = common.save_and_check, common.check_saved

    def watched_step(engine, *args):
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        seen["gradients"].append(torch.cat([safe_get_full_grad(p).flatten().clone() for p in trained]))
        states = [value for state in engine.basic_optimizer.state.values() for value in state.values()]
        seen["moments"].append(sum(value.abs().sum().item() for value in states))
        return step(engine, *args)

    def poisoned_loss(loss, *args, **kwargs):
        poison = update in updates and common.dist.get_rank() == common.dist.get_world_size() - 1
        value = loss(*args, **kwargs)
        return POISONS[how](value) if poison else value

    def counted_seed(*numbers):
        nonlocal update
        update = numbers[1]
        set_seed(*numbers)

    def watched_save(engine, *args):
        with common.gathered(engine):
            seen["weights"] = {name: p.detach().clone() for name, p in engine.module.model.named_parameters()}
        save_and_check(engine, *args)

    def check_spoiled(model, folder):
        saved = load_file(folder / "model.safetensors")
        name = list(saved)[-1]
        saved[name].flatten()[-1] += 1e-3
        save_file(saved, folder / "model.safetensors", dict(format="pt"))
        check_saved(model, folder)

    with contextlib.ExitStack() as stack:
        for name, new in (
            ("optimizer_step", watched_step),
            ("set_seed", counted_seed),
            ("save_and_check", watched_save),
            *([("check_saved", check_spoiled)] if spoiled else []),
            *([("generate", fixed_responses(lambda: update))] if fixed else []),
        ):
            stack.enter_context(patch.object(common, name, new))
        for name, loss in [(name, value) for name, value in vars(module).items() if name in LOSSES]:
            stack.enter_context(patch.object(module, name, functools.partial(poisoned_loss, loss)))
        seen["status"] = run_here(script, *flags)
    if "--output-dir" in flags:
        folder = Path(flags[flags.index("--output-dir") + 1])
        if (folder / "metrics.jsonl").exists():
            seen["metrics"] = [without_machine(row) for row in read_metrics(folder)]
    return seen


def run_all(cases: list[dict]) -> list[dict]:
    """For `forked`, with several ranks."""
    return [run(**case) for case in cases]
