"""Whole scripts many times in one process, watched and disturbed, for the tests: a start of its own takes each 5 s.

python -m torch.distributed.run --nproc_per_node 2 tests/script_worker.py OUT.pt CASES.json
"""

import contextlib
import functools
import importlib
import json
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import ROOT
from deepspeed.utils import safe_get_full_grad
from engine_worker import POISONS
from safetensors.torch import load_file, save_file

import common

LOSSES = ("policy_loss", "value_loss", "preference_loss", "weighted_nll")


def fixed_responses(update):
    """A `generate` whose responses depend on the prompt and the update alone, so on no rank and on no weight."""

    def generate(model, prompts_BP, prompt_mask_BP, *, num_samples, greedy, length, eos_ids, **settings):
        prompts = [ids[mask == 1].tolist() for ids, mask in zip(prompts_BP, prompt_mask_BP, strict=True)]
        keys = [(*p, sample) for p in prompts for sample in range(num_samples)] + [(*p, -1) for p in prompts] * greedy
        rows = []
        for key in keys:
            generator = torch.Generator().manual_seed(hash((*key, update())) % 2**63)
            row = torch.randint(1, 200, (length,), generator=generator)
            row[torch.randint(length, (), generator=generator) :] = eos_ids[0]
            rows.append(row)
        rows = torch.stack(rows)
        return rows[:, : int((rows != eos_ids[0]).sum(1).max()) + 1]  # ranks end at different lengths

    return generate


def run(script: str, flags: list, fixed=False, poisoned=((), "loss"), spoiled=False) -> dict:
    """main() of a script -> its exit status, its gradients (one flat tensor per optimizer step) and its last weights.

    `fixed`: the responses do not depend on the policy. `poisoned`: (updates, how): in these the last rank's losses or
    gradients are not finite. `spoiled`: what is saved is not quite what was trained.
    """
    module, update, seen = importlib.import_module(script), 0, dict(status=0, gradients=[], weights={})
    updates, how = poisoned
    step, set_seed, save_model = common.optimizer_step, common.set_seed, common.save_model

    def watched_step(engine, *args):
        parameters = dict(engine.module.named_parameters())
        seen["gradients"].append(torch.cat([safe_get_full_grad(p).flatten().clone() for p in parameters.values()]))
        return step(engine, *args)

    def poisoned_loss(loss, *args, **kwargs):
        poison = update in updates and common.dist.get_rank() == common.dist.get_world_size() - 1
        value = loss(*args, **kwargs)
        return POISONS[how](value) if poison else value

    def counted_seed(*numbers):
        nonlocal update
        update = numbers[1]
        set_seed(*numbers)

    def watched_save(engine, tokenizer, folder, device):
        with common.whole_model(engine, device) as model:
            seen["weights"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_model(engine, tokenizer, folder, device)
        if spoiled:
            saved = load_file(folder / "model.safetensors")
            save_file({name: p * 1.5 for name, p in saved.items()}, folder / "model.safetensors", dict(format="pt"))

    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (common, "optimizer_step", watched_step),
            (common, "set_seed", counted_seed),
            (common, "save_model", watched_save),
            (common.dist, "destroy_process_group", lambda: None),  # the next run needs it
            (signal, "signal", lambda *args: None),
            (sys, "argv", [str(ROOT / f"{script}.py"), *map(str, flags)]),
            *([(common, "generate", fixed_responses(lambda: update))] if fixed else []),
        ):
            stack.enter_context(patch.object(target, name, new))
        for name, loss in [(name, value) for name, value in vars(module).items() if name in LOSSES]:
            stack.enter_context(patch.object(module, name, functools.partial(poisoned_loss, loss)))
        try:
            module.main()
        except SystemExit as end:
            seen["status"] = end.code
    return seen


if __name__ == "__main__":
    out, cases = sys.argv[1:]
    results = [run(**case) for case in json.loads(Path(cases).read_text())]
    if common.dist.get_rank() == 0:
        torch.save(results, out)
    common.dist.barrier()
    common.dist.destroy_process_group()
