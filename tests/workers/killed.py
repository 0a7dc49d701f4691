"""A script that kills itself inside a save, for test_resume.py.

POINTS: half of an optimizer's or model's file is written; all files are written, but not yet named by `latest`; they
are named, but the older checkpoint is not yet removed.
"""

import os
import signal
from pathlib import Path

import torch
from conftest import as_program

POINTS = ("in a file", "before latest", "after latest")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(point: str, update: str, script: str, flags: tuple) -> None:
    save, replace = torch.save, Path.replace

    def torn_save(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if point == "in a file" and f"update-{update}/" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def torn_replace(path, target):
        named = path.name == "latest.tmp" and path.read_text() == update
        if named and point == "before latest":
            die()
        replace(path, target)
        if named and point == "after latest":
            die()

    torch.save, Path.replace = torn_save, torn_replace
    as_program(script, flags)
