"""A run that is killed and resumed is the run that was not: the same metrics, samples and bits of the weights."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, assert_ok, read_metrics, run_script, script_environment, together

FLAGS = "--total-episodes 48 --batch-size 8 --eval-size 7 --eval-every 2 --save-every 1".split()
SAVED = dict(reward_model="reward_model")
POINTS = ("in a file", "before latest", "after latest")


def flags_of(script):
    return FLAGS if script == "reward_model" else [*FLAGS, "--response-length", "12"]


@contextlib.contextmanager
def started(command, ranks):
    """`ranks` processes of one group, without a launcher between them and what is done to them here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = []
    for rank in range(ranks):
        variables = {name: str(value) for name, value in (group | dict(RANK=rank, LOCAL_RANK=rank)).items()}
        environment = script_environment() | variables
        log = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop a long run
        words = [sys.executable, *map(str, command)]
        processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT))
        processes[-1].log = log
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.log.close()


def told(processes) -> str:
    for process in processes:
        process.log.seek(0)
    return "\n".join(process.log.read()[-3000:] for process in processes)


def latest(folder) -> int:
    path = folder / "checkpoint" / "latest"
    return int(path.read_text()) if path.exists() else 0


def finish(command, ranks):
    with started(command, ranks) as processes:
        for process in processes:
            assert process.wait(timeout=600) == 0, told(processes)


def kill_at_random(command, ranks, folder, longest) -> None:
    with started(command, ranks) as processes:
        while not latest(folder):
            time.sleep(0.01)
            assert all(process.poll() is None for process in processes), told(processes)
        time.sleep(random.uniform(0, longest))
        for process in random.sample(processes, ranks):
            process.kill()


def kill_in_a_save(command, ranks, point) -> None:
    killer = ROOT / "tests" / "killed.py"
    with started([killer, point, "3", command[0].name, *command[1:]], ranks) as processes:
        while all(process.poll() is None for process in processes):
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
        assert -signal.SIGKILL in codes, told(processes)


def state(script, folder):
    from safetensors.torch import load_file

    rows = [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in read_metrics(folder)]
    weights = load_file(folder / SAVED.get(script, "policy") / "model.safetensors")
    return rows, (folder / "samples.jsonl").read_text(), weights


def killed_and_resumed(script, folder, how, ranks=1, zero_stage=0) -> None:
    """`how`: one of POINTS, or a number of seconds within which the moment lies."""
    command = [ROOT / f"{script}.py", *flags_of(script), "--zero-stage", zero_stage, "--output-dir"]
    whole, parts = folder / "whole", folder / "parts"

    def in_parts():
        if how in POINTS:
            kill_in_a_save([*command, parts], ranks, how)
            assert latest(parts) == (3 if how == "after latest" else 2)
        else:
            kill_at_random([*command, parts], ranks, parts, how)
        before = [line for line in read_metrics(parts) if line["update"] <= latest(parts)]
        with open(parts / "metrics.jsonl", "a") as file:
            file.write('{"update": 99}\n{"upd')  # a kill may leave half a line, and rows that come after the checkpoint
        finish([command[0], "--resume", parts], ranks)
        assert read_metrics(parts)[: len(before)] == before  # with their times: nothing was done again

    together(lambda function, *args: function(*args), (finish, [*command, whole], ranks), (in_parts,))
    (rows, samples, wanted), (again, samples_again, found) = (state(script, path) for path in (whole, parts))
    assert [row["update"] for row in rows] == list(range(7))
    assert again == rows and samples_again == samples
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [path.name for path in (parts / "checkpoint").glob("update-*")] == ["update-6"]  # old ones are removed


def test_remax_on_one_rank(tmp_path):
    killed_and_resumed("remax", tmp_path, 0.5)
    folder = tmp_path / "parts"
    cases = [("--resume", folder, "--learning-rate", "0.5"), ("--output-dir", folder)]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    differs, holds = together(run_script, *(("remax.py", *flags) for flags in cases))
    assert differs.returncode == 2 and "--learning-rate 0.5 differs" in differs.stderr
    assert holds.returncode == 2 and "already holds a run" in holds.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before  # nothing is lost


def test_remax_on_two_ranks_with_zero_2(tmp_path):
    killed_and_resumed("remax", tmp_path, "in a file", ranks=2, zero_stage=2)


@pytest.mark.parametrize("script, how", zip(SCRIPTS[1:], POINTS, strict=True))
def test_the_other_scripts(tmp_path, script, how):
    killed_and_resumed(script, tmp_path, how)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_a_random_moment(tmp_path, script, zero_stage, ranks):
    killed_and_resumed(script, tmp_path, 2.0, ranks, zero_stage)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", POINTS)
@pytest.mark.parametrize("script", ["remax", "ppo"])
def test_killed_in_a_save(tmp_path, script, how, ranks):
    killed_and_resumed(script, tmp_path, how, ranks, zero_stage=3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_and_its_ranks_are_signalled_together(tmp_path, number):
    """As ctrl-C in a terminal does it: the launcher passes the signal on, so each rank gets it twice."""
    folder, plain = tmp_path / "r", tmp_path / "plain"
    flags = [*flags_of("remax"), "--zero-stage", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "remax.py"), *flags, "--output-dir", str(folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=script_environment(), start_new_session=True, **pipes)
    while not latest(folder):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, number)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and f"remax.py --resume {folder}" in out
    assert latest(folder) == read_metrics(folder)[-1]["update"] < 6
    assert_ok(run_script("remax.py", "--resume", folder, ranks=2))
    assert_ok(run_script("remax.py", *flags, "--output-dir", plain, ranks=2))
    assert state("remax", folder)[:2] == state("remax", plain)[:2]
