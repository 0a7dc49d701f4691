"""A run that is killed and resumed is the run that was not: the same metrics, samples and bits of the weights.

And runs of many updates: they do not leak, and however often they are killed they end with the same weights.
"""

import fcntl
import json
import math
import os
import random
import signal
import subprocess
import termios
import time

import pytest
import torch
from conftest import (
    SCRIPTS,
    as_program,
    assert_ok,
    launch,
    launch_command,
    others_are_slow,
    output_of,
    read_metrics,
    run_script,
    script_environment,
    short_flags,
    started,
    together,
    wait,
    without_machine,
)
from safetensors.torch import load_file
from workers.killed import POINTS, killed
from workers.measured import measured

FLAGS = "--total-episodes 48 --batch-size 8 --eval-size 7 --eval-every 2 --save-every 1".split()


def run_flags(script) -> list:
    more = dict(spr="--num-samples 3", spr_token="--num-samples 2 --value-epochs 1").get(script, "")  # several steps
    return [*FLAGS, *short_flags(script, 12), *more.split()]


def latest(folder) -> int:
    path = folder / "checkpoint" / "latest"
    return int(path.read_text()) if path.exists() else 0


def finish(script, *flags, ranks=1) -> None:
    assert_ok(run_script(f"{script}.py", *flags, ranks=ranks))


def state(folder):
    """-> (metrics without times and memory, the text of all samples, weights)."""
    rows = [without_machine(row) for row in read_metrics(folder)]
    names = ["samples.jsonl", *(path.name for path in sorted(folder.glob("iteration-*.jsonl")))]
    (weights,) = folder.glob("*/model.safetensors")  # merged, where there are adapters
    return rows, {name: (folder / name).read_text() for name in names}, load_file(weights)


def assert_same(found, expected):
    assert found[0] == expected[0] and found[1] == expected[1]
    assert found[2].keys() == expected[2].keys()
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])


def interrupt(script, flags, folder, how, ranks) -> None:
    """`how`: one of POINTS, a signal, or a number of seconds after the first checkpoint within which SIGKILL comes."""
    flags = [*flags, "--output-dir", folder]
    if how in POINTS:
        with started(killed, how, f"{script}.py", flags, ranks=ranks) as processes:
            assert wait(processes) == -signal.SIGKILL, output_of(processes)
        assert latest(folder) == POINTS[how]
        return
    with started(as_program, f"{script}.py", flags, ranks=ranks) as processes:
        while not latest(folder):
            time.sleep(0.01)
            assert not any(process.exitcode for process in processes), output_of(processes)
        if isinstance(how, signal.Signals):
            for process in 2 * processes:  # a second one is ignored
                os.kill(process.pid, how)
            assert wait(processes) == 128 + how, output_of(processes)
            assert f"{script}.py --resume {folder}" in output_of(processes)[0].strip().splitlines()[-1]
            assert latest(folder) == read_metrics(folder)[-1]["update"] < 6
        else:
            time.sleep(random.uniform(0, how))
            for process in random.sample(processes, ranks):
                process.kill()


def interrupted_and_resumed(folder, script, how, ranks=1, zero_stage=0, more=()) -> None:
    flags = [*run_flags(script), "--zero-stage", zero_stage, *more]
    whole, parts = folder / "whole", folder / "parts"

    def in_parts():
        interrupt(script, flags, parts, how, ranks)
        before = [line for line in read_metrics(parts) if line["update"] <= latest(parts)]
        with open(parts / "metrics.jsonl", "a") as file:
            file.write('{"update": 99}\n{"upd')  # a kill may leave half a line, and rows that come after the checkpoint
        finish(script, "--resume", parts, ranks=ranks)
        assert read_metrics(parts)[: len(before)] == before  # with their times: nothing was done again

    together(
        lambda function: function(), (in_parts,), (lambda: finish(script, *flags, "--output-dir", whole, ranks=ranks),)
    )
    assert_same(state(parts), state(whole))
    assert [row["update"] for row in read_metrics(whole)] == list(range(7))
    assert [path.name for path in (parts / "checkpoint").glob("update-*")] == ["update-6"]  # old ones are removed


def test_remax_on_one_rank(tmp_path):
    interrupted_and_resumed(tmp_path, "remax", 0.5)
    folder = tmp_path / "parts"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    differs = run_script("remax.py", "--resume", folder, "--learning-rate", "0.5")
    assert differs.returncode == 2 and "--learning-rate 0.5 differs" in differs.stderr
    holds = run_script("remax.py", "--output-dir", folder)
    assert holds.returncode == 2 and "already holds a run" in holds.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before  # nothing is lost


def test_remax_on_two_ranks_with_zero_2(tmp_path):
    interrupted_and_resumed(tmp_path, "remax", "in a file", ranks=2, zero_stage=2, more=["--num-samples", "2"])


OTHERS = dict(
    reinforce="in a file",
    ppo="before latest",
    grpo="after latest",
    spr="in an update",
    spr_token="in an update",
    reward_model="after latest",
    dpo="before latest",
)


# reinforce.py and grpo.py have the engines of remax.py, spr_token.py those of ppo.py. reward_model.py is resumed below.
@pytest.mark.parametrize("script, how", others_are_slow(OTHERS.items(), soon="ppo spr"))
def test_the_other_scripts(tmp_path, script, how):
    interrupted_and_resumed(tmp_path, script, how)


# These two have all kinds of engines.
@pytest.mark.parametrize("script, how", others_are_slow([*OTHERS.items(), ("remax", "in a file")], "ppo reward_model"))
def test_with_adapters(tmp_path, script, how):
    interrupted_and_resumed(tmp_path, script, how, more=["--lora-rank", "2"])


@pytest.mark.slow  # remax.py does the same every day
def test_spr_on_two_ranks_with_zero_2(tmp_path):
    interrupted_and_resumed(tmp_path, "spr", "in an update", ranks=2, zero_stage=2)


SIGNALS = [("remax", signal.SIGTERM), ("spr", signal.SIGINT)]


@pytest.mark.parametrize("script, number", others_are_slow(SIGNALS, soon="remax"))
def test_a_signal_ends_the_run_after_its_update_with_a_checkpoint(tmp_path, script, number):
    interrupted_and_resumed(tmp_path, script, number)


def take_terminal():
    """In a new process whose standard input is a terminal: closing that one then sends it SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("prefix", [[], pytest.param(["nohup"], marks=pytest.mark.slow)])
def test_a_closed_terminal_ends_the_run_with_a_checkpoint_but_not_under_nohup(tmp_path, prefix):
    """As when a connection breaks: SIGHUP comes, and nothing can be written to the terminal any more."""
    folder, updates = tmp_path / "r", 60
    flags = ["--total-episodes", 8 * updates, "--batch-size", 8, "--eval-every", 0, *short_flags("remax", 8)]
    command = [*prefix, *launch_command("remax.py", *flags, "--output-dir", folder)]
    ours, theirs = os.openpty()
    pipes = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal)
    process = subprocess.Popen(command, cwd=tmp_path, env=script_environment(), **pipes)
    os.close(theirs)
    begin = time.time()
    while not (folder / "metrics.jsonl").exists() or not read_metrics(folder):
        time.sleep(0.01)
        assert time.time() < begin + 60
        assert process.poll() is None, os.read(ours, 10_000).decode()
    os.close(ours)
    assert process.wait(60) == (0 if prefix else 128 + signal.SIGHUP)
    last = read_metrics(folder)[-1]["update"]
    assert last == updates if prefix else latest(folder) == last < updates


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_a_random_moment(tmp_path, script, zero_stage, ranks):
    interrupted_and_resumed(tmp_path, script, 2.0, ranks, zero_stage)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", POINTS)
@pytest.mark.parametrize("script", ["remax", "ppo", "spr"])
def test_killed_in_a_save(tmp_path, script, how, ranks):
    interrupted_and_resumed(tmp_path, script, how, ranks, zero_stage=3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_and_its_ranks_are_signalled_together(tmp_path, number):
    """As ctrl-C in a terminal does it: the launcher passes the signal on, so each rank gets it twice."""
    folder, plain = tmp_path / "r", tmp_path / "plain"
    flags = [*run_flags("remax"), "--zero-stage", "2"]
    command = launch_command("remax.py", *flags, "--output-dir", folder, ranks=2)
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
    assert_ok(launch("remax.py", "--resume", folder, ranks=2))
    assert_ok(launch("remax.py", *flags, "--output-dir", plain, ranks=2))
    assert state(folder)[:2] == state(plain)[:2]


# ---------------------------------------------------------------- Many updates


def growth(folder, script, updates, *flags) -> list[dict]:
    """-> what the process held after each update."""
    flags = [*flags, "--total-episodes", 4 * updates, "--batch-size", "4", "--eval-size", "4"]
    flags += short_flags(script, 8)
    flags += SCRIPTS[script].one_step.split()
    with started(measured, folder / "m.jsonl", f"{script}.py", [*flags, "--output-dir", folder / "r"]) as processes:
        assert wait(processes, 900) == 0, output_of(processes)
    return {row["update"]: row for row in map(json.loads, (folder / "m.jsonl").read_text().splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--zero-stage 0", "--zero-stage 2", "--zero-stage 3", "--zero-stage 3 --offload"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_leaks(tmp_path, script, flags):
    rows = growth(tmp_path, script, 300, *"--eval-every 10 --save-every 10".split(), *flags.split())
    print([(n, rows[n]["resident"] >> 20, rows[n]["files"]) for n in (1, 50, 100, 200, 300)])
    assert rows[300]["resident"] < 1.02 * rows[50]["resident"]
    files = [max(rows[n]["files"] for n in span) for span in (range(50, 151), range(201, 301))]  # one comes and goes
    assert files[1] <= files[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, zero_stage, updates", [("remax", 2, 240), ("ppo", 2, 240), ("spr", 0, 60), ("spr", 3, 60)]
)
def test_killed_again_and_again(tmp_path, script, zero_stage, updates):
    """Two ranks, at least ten SIGKILLs at random moments: while it starts, trains, evaluates and saves."""
    flags = f"--total-episodes {8 * updates} --batch-size 8 --response-length 16 --eval-every 20 --eval-size 8".split()
    flags += ["--save-every", "3", "--zero-stage", zero_stage]
    whole, parts, kills, begin = tmp_path / "whole", tmp_path / "parts", 0, time.time()
    while latest(parts) < updates:
        if not latest(parts) and parts.exists():  # killed before its first checkpoint: there is nothing to resume
            parts = parts.with_name(f"{parts.name}-again")
        command = ["--resume", parts] if latest(parts) else [*flags, "--output-dir", parts]
        with started(as_program, f"{script}.py", command, ranks=2) as processes:
            seconds, goal = random.uniform(0, 15), updates
            if random.random() < 0.8:
                seconds, goal = math.inf, latest(parts) + random.randint(1, updates // 6)
            end = time.time() + seconds
            while time.time() < end and latest(parts) < goal and None in [process.exitcode for process in processes]:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1))
            codes = [process.exitcode for process in processes]
            assert set(codes) <= {None, 0}, output_of(processes)
            kills += None in codes
            for process in random.sample(processes, 2):
                process.kill()
                time.sleep(random.choice([0, 0.5]))
    finish(script, "--resume", parts, ranks=2)
    seconds, begin = time.time() - begin, time.time()
    finish(script, *flags, "--output-dir", whole, ranks=2)
    print(f"{script}: {kills} kills in {seconds:.0f} s; undisturbed {time.time() - begin:.0f} s")
    assert kills >= 10
    assert_same(state(parts), state(whole))
