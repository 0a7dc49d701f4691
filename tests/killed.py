"""A script that kills itself inside a save: python tests/killed.py POINT UPDATE script.py FLAGS

POINT: `in a file` (half of an optimizer's or model's file is written), `before latest` (all files are written, but not
yet named) or `after latest` (named, but the older checkpoint is not yet removed).
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from conftest import ROOT

point, update, script, *flags = sys.argv[1:]
save, replace = torch.save, Path.replace


def die():
    os.kill(os.getpid(), signal.SIGKILL)


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
sys.argv = [str(ROOT / script), *flags]
runpy.run_path(sys.argv[0], run_name="__main__")
