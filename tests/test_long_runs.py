"""Runs of many updates (slow): they do not leak, and however often they are killed they end with the same weights."""

import json
import math
import random
import time

import pytest
import torch
from conftest import SCRIPTS, assert_ok, run_script
from test_resume import ROOT, finish, latest, started, state, told

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_leaks(tmp_path, script, zero_stage):
    flags = "--total-episodes 1200 --batch-size 4 --eval-every 10 --eval-size 4 --save-every 10".split()
    flags += [] if script == "reward_model" else ["--response-length", "8"]
    flags += ["--zero-stage", zero_stage, "--output-dir", tmp_path / "r"]
    assert_ok(run_script("tests/measured.py", tmp_path / "m.jsonl", f"{script}.py", *flags))
    rows = {row["update"]: row for row in map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())}
    print([(n, rows[n]["resident"] >> 20, rows[n]["files"]) for n in (1, 50, 100, 200, 300)])
    assert rows[300]["resident"] < 1.02 * rows[50]["resident"]
    files = [max(rows[n]["files"] for n in span) for span in (range(50, 151), range(201, 301))]  # one comes and goes
    assert files[1] <= files[0]


@pytest.mark.parametrize("script", ["remax", "ppo"])
def test_killed_again_and_again(tmp_path, script):
    """Two ranks, at least ten SIGKILLs at random moments: while it starts, trains, evaluates and saves."""
    updates = 240
    flags = f"--total-episodes {8 * updates} --batch-size 8 --response-length 16 --eval-every 20 --eval-size 8".split()
    command = [ROOT / f"{script}.py", *flags, "--save-every", "3", "--zero-stage", "2", "--output-dir"]
    whole, parts, kills, begin = tmp_path / "whole", tmp_path / "parts", 0, time.time()
    while latest(parts) < updates:
        if not latest(parts) and parts.exists():  # killed before its first checkpoint: there is nothing to resume
            parts = parts.with_name(f"{parts.name}-again")
        resume = [command[0], "--resume", parts]
        with started(resume if latest(parts) else [*command, parts], 2) as processes:
            seconds, goal = random.uniform(0, 15), updates
            if random.random() < 0.8:
                seconds, goal = math.inf, latest(parts) + random.randint(1, updates // 6)
            end = time.time() + seconds
            while time.time() < end and latest(parts) < goal and None in [process.poll() for process in processes]:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1))
            codes = [process.poll() for process in processes]
            assert set(codes) <= {None, 0}, told(processes)
            kills += None in codes
            for process in random.sample(processes, 2):
                process.kill()
                time.sleep(random.choice([0, 0.5]))
    finish([command[0], "--resume", parts], 2)
    seconds, begin = time.time() - begin, time.time()
    finish([*command, whole], 2)
    print(f"{script}: {kills} kills in {seconds:.0f} s; undisturbed {time.time() - begin:.0f} s")
    assert kills >= 10
    (rows, samples, wanted), (again, samples_again, found) = (state(script, path) for path in (whole, parts))
    assert again == rows and samples_again == samples
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
