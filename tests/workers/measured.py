"""A script that measures its process after every update, for test_resume.py."""

import json
import os
from pathlib import Path

from conftest import as_program

import common


def measured(out: Path, script: str, flags: tuple) -> None:
    log = common.Run.log

    def measured_log(self, update, metrics):
        log(self, update, metrics)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        row = dict(update=update, resident=resident, files=len(os.listdir("/proc/self/fd")))
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")

    common.Run.log = measured_log
    as_program(script, flags)
