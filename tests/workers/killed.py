"""A script that kills itself, for test_resume.py."""

import os
import signal
from pathlib import Path

import torch
from conftest import as_program

import common

# The moment, and the update of the checkpoint that is left.
POINTS = {
    "in a file": 2,  # half of an optimizer's or model's file is written
    "before latest": 2,  # all files are written, but `latest` does not yet name them
    "in an update": 1,  # some of the optimizer steps of the next update are done
    "after latest": 3,  # `latest` names them, but the older checkpoint is not yet removed
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(point: str, script: str, flags: list) -> None:
    save, replace, step = torch.save, Path.replace, common.optimizer_step
    steps = 0

    def torn_save(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if point == "in a file" and "update-3/" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def torn_replace(path, target):
        named = path.name == "latest.tmp" and path.read_text() == "3"
        if named and point == "before latest":
            die()
        replace(path, target)
        if named and point == "after latest":
            die()

    def torn_step(*args):
        nonlocal steps
        steps = (steps + 1) if "checkpoint" in os.listdir(flags[-1]) else 0  # since the first checkpoint
        if steps == 3 and point == "in an update":
            die()
        return step(*args)

    torch.save, Path.replace, common.optimizer_step = torn_save, torn_replace, torn_step
    as_program(script, flags)
