"""A script that measures its process after every update: python tests/measured.py OUT.jsonl script.py FLAGS"""

import json
import os
import runpy
import sys
from pathlib import Path

from conftest import ROOT

import common

out, script, *flags = sys.argv[1:]
log = common.Run.log


def measured_log(self, update, metrics):
    log(self, update, metrics)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open(out, "a") as file:
        file.write(json.dumps(dict(update=update, resident=resident, files=len(os.listdir("/proc/self/fd")))) + "\n")


common.Run.log = measured_log
sys.argv = [str(ROOT / script), *flags]
runpy.run_path(sys.argv[0], run_name="__main__")
