"""A run's folder, its console, its end, and the processes that it consists of."""

import dataclasses
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import huggingface_hub
import pytest
import safetensors
from conftest import (
    EXAMPLE,
    PAIRS,
    ROOT,
    SCRIPTS,
    as_program,
    others_are_slow,
    output_of,
    run_here,
    start_backend,
    started,
)

import common
import remax

SENTIMENT = f"{EXAMPLE}/sentiment.py:reward"
SHORT = "--total-episodes 8 --batch-size 4 --eval-every 0 --response-length 8".split()
SLOW = """
import time
def reward(prompts, responses):
    time.sleep(60 if len(prompts) > 1 else 0)  # the script tries it on one prompt before the run begins
    return [0.0] * len(prompts)
"""


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["remax.py", *map(str, flags)])
    return common.parse_args(remax.Args)


def only_line(capsys) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error: " in line]
    return line


# ---------------------------------------------------------------- Resume knows its inputs


@pytest.fixture
def own_inputs(tmp_path):
    """Copies of the example's files, and the flags that name them."""
    shutil.copytree(EXAMPLE / "policy", tmp_path / "policy")
    shutil.copytree(EXAMPLE / "reward_model", tmp_path / "reward_model")
    for name in ("prompts.jsonl", "prompts_test.jsonl", "sentiment.py"):
        shutil.copy(EXAMPLE / name, tmp_path / name)
    return dict(
        model=tmp_path / "policy",
        dataset=tmp_path / "prompts.jsonl",
        eval_dataset=tmp_path / "prompts_test.jsonl",
        reward_model=tmp_path / "reward_model",
        gold_reward_function=f"{tmp_path}/sentiment.py:reward",
    )


def as_flags(inputs: dict) -> list:
    flags = []
    for name, value in inputs.items():
        flags += [f"--{name.replace('_', '-')}", value]
    return flags


CHANGED = {  # file -> what is said of it
    "prompts.jsonl": "prompts.jsonl has changed since the run began",
    "prompts_test.jsonl": "prompts_test.jsonl has changed since the run began",
    "sentiment.py": "sentiment.py has changed since the run began",
    "policy/generation_config.json": "policy/generation_config.json has changed since the run began",
    "policy/model.safetensors": "policy/model.safetensors has changed since the run began",
    "reward_model/config.json": "reward_model/config.json has changed since the run began",
}


def test_a_resumed_run_reads_what_it_began_with(tmp_path, own_inputs, monkeypatch, capsys):
    flags = [*SHORT, "--save-every", 1, "--output-dir", tmp_path / "r"]
    assert run_here("remax", *flags, *as_flags(own_inputs)) == 0
    for name, message in CHANGED.items():
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before[:-1] + b" ")
        capsys.readouterr()
        assert run_here("remax", "--resume", tmp_path / "r") == 2
        assert message.replace(name, str(tmp_path / name)) in only_line(capsys)
        (tmp_path / name).write_bytes(before)

    (tmp_path / "policy" / "chat_template.jinja").write_text("{{ messages }}")
    assert run_here("remax", "--resume", tmp_path / "r") == 2
    assert "chat_template.jinja was not an input when the run began" in only_line(capsys)
    (tmp_path / "policy" / "chat_template.jinja").unlink()

    (tmp_path / "prompts.jsonl").rename(tmp_path / "moved.jsonl")
    assert run_here("remax", "--resume", tmp_path / "r") == 2
    assert f"{tmp_path / 'prompts.jsonl'} is gone since the run began" in only_line(capsys)
    (tmp_path / "moved.jsonl").rename(tmp_path / "prompts.jsonl")

    (tmp_path / "policy" / "README.md").write_text("not an input")
    os.utime(tmp_path / "prompts.jsonl", (0, 0))
    args = parsed(monkeypatch, "--resume", tmp_path / "r")
    assert args.model == str(tmp_path / "policy") and args.total_episodes == 8


def test_data_in_a_folder_has_any_ending(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(b"one")
    before = common.input_digests(dict(dataset=str(tmp_path)), tmp_path / "run")
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(b"two")
    after = common.input_digests(dict(dataset=str(tmp_path)), tmp_path / "run")
    assert before.keys() == after.keys() == {str(tmp_path / "data" / "train.jsonl.gz")}
    assert before != after
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")  # a run that lies in its model's or its data's folder
    assert common.input_digests(dict(dataset=str(tmp_path)), tmp_path / "run") == after


def test_what_a_reward_function_imports_from_its_folder_is_an_input(tmp_path):
    files = {
        "reward.py": "import json, words.good\nfrom numbers_ import ONE",
        "words/__init__.py": "from . import good",
        "words/good.py": "GOOD = 'good'",
        "numbers_.py": "import sixth",
        "sixth.py": "import reward",
        "other.py": "",
        "words/cache.txt": "written by the package",
    }
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / ".#good.py").symlink_to("nobody@host.1:2")  # as an editor leaves it
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    flags = dict(reward_function=f"{tmp_path}/reward.py:reward")
    digests = common.input_digests(flags, tmp_path / "run")
    assert set(digests) == {str(tmp_path / name) for name in files if name not in ("other.py", "words/cache.txt")}


def test_an_input_that_cannot_be_read_is_not_told_as_a_full_disk(tmp_path, capsys):
    (tmp_path / "notes").symlink_to("/proc/self/mem")  # a file that refuses to be read, also to root
    with pytest.raises(SystemExit) as error, common.writing(tmp_path):
        common.input_digests(dict(model=str(tmp_path)), tmp_path / "run")
    assert error.value.code == 2
    assert only_line(capsys) == f"error: {tmp_path / 'notes'}: Input/output error"


# ---------------------------------------------------------------- One run, one folder


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    """The first has two ranks, which do; SIGKILL frees the folder."""
    (tmp_path / "f.py").write_text(SLOW)
    flags = [*SHORT, "--output-dir", tmp_path / "r"]
    slow = [*flags, "--reward-function", f"{tmp_path}/f.py:reward"]
    with started(as_program, "remax.py", slow, ranks=2) as processes:
        while not (tmp_path / "r" / "args.json").exists():
            time.sleep(0.05)
            assert not any(process.exitcode for process in processes), output_of(processes)
        capsys.readouterr()
        assert run_here("remax", *flags) == 2
        assert "another process is running in this folder" in only_line(capsys)
        for process in processes:
            process.kill()
            process.join()
    assert run_here("remax", *flags) == 0


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_tasks_of_a_scheduler_need_a_launcher(monkeypatch, capsys, name):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "1")
    common.refuse_tasks_without_ranks()
    monkeypatch.setenv(name, "2")
    assert run_here("remax") == 2
    line = only_line(capsys)
    assert f"{name}=2" in line and "torchrun" in line
    monkeypatch.setenv("RANK", "0")  # as torchrun sets it, in one task a node that srun has started
    common.refuse_tasks_without_ranks()


def test_a_stop_does_not_write_over_the_checkpoint_of_its_update(tmp_path, monkeypatch):
    """A kill while it is written again would leave no whole one."""
    saved = []
    save_checkpoint = common.Run.save_checkpoint
    log = common.Run.log

    def watched(run, update):
        saved.append(update)
        save_checkpoint(run, update)

    def log_and_ask(run, *args):
        log(run, *args)
        run.signal = signal.SIGTERM

    monkeypatch.setattr(common.Run, "save_checkpoint", watched)
    monkeypatch.setattr(common.Run, "log", log_and_ask)
    assert run_here("remax", *SHORT, "--save-every", 1, "--output-dir", tmp_path / "r") == 128 + signal.SIGTERM
    assert saved == [1]


# ---------------------------------------------------------------- Full disks


def test_room_is_looked_for_before_training(tmp_path, capsys, monkeypatch):
    left = types.SimpleNamespace(free=4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: left)
    assert run_here("remax", *SHORT, "--output-dir", tmp_path / "a") == 0  # a model of 1.2 MB
    assert run_here("remax", *SHORT, "--save-every", 1, "--output-dir", tmp_path / "b") == 1
    assert "the disk has 4,000,000 bytes left; what is to be saved needs" in only_line(capsys)
    assert "0/2" not in capsys.readouterr().err  # nothing was trained


@pytest.mark.parametrize(
    "script, flags",
    [
        ("remax", ["--zero-stage", 2]),
        ("remax", ["--dtype", "bfloat16"]),
        ("remax", ["--lora-rank", 4]),
        ("ppo", []),
    ],
)
def test_the_room_that_is_looked_for_is_enough_and_little_more(tmp_path, monkeypatch, script, flags):
    sizes = []
    saved_sizes = common.saved_sizes

    def watched(engines):
        sizes.extend(saved_sizes(engines))
        return sizes

    monkeypatch.setattr(common, "saved_sizes", watched)
    assert run_here(script, *SHORT, *flags, "--save-every", 1, "--output-dir", tmp_path / "r") == 0
    model = (tmp_path / "r" / "policy" / "model.safetensors").stat().st_size
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "r" / "checkpoint").rglob("*.pt"))
    print(sizes, model, checkpoint)
    assert sizes[0] == pytest.approx(model, rel=0.05)
    assert 0.95 * checkpoint < sizes[1] < 1.4 * checkpoint


def full(path):
    """What is written there meets a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def test_a_disk_that_is_full_while_metrics_are_written(tmp_path, capsys, monkeypatch):
    log = common.Run.log

    def log_to_a_full_disk(run, *args):
        full(run.folder / "metrics.jsonl")
        log(run, *args)

    monkeypatch.setattr(common.Run, "log", log_to_a_full_disk)
    assert run_here("remax", *SHORT, "--output-dir", tmp_path / "r") == 1
    assert "could not write, the disk has" in only_line(capsys)


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_while_curves_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common.SummaryWriter, "add_scalar", no_room)
    assert run_here("remax", *SHORT, "--output-dir", tmp_path / "r") == 1
    assert "could not write, the disk has" in only_line(capsys)


def test_a_disk_that_is_full_while_an_adapter_is_written_keeps_the_policy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "save_file", no_room)
    assert run_here("remax", *SHORT, "--lora-rank", 2, "--output-dir", tmp_path / "r") == 1
    assert "could not write, the disk has" in only_line(capsys)
    common.load_tokenizer(str(tmp_path / "r" / "policy"))


def test_a_disk_that_is_full_while_a_checkpoint_is_written_keeps_the_last_one(tmp_path, capsys, monkeypatch):
    save_checkpoint = common.Run.save_checkpoint

    def save(run, update):
        if update == 2:
            full(run.folder / "checkpoint" / "update-2" / "engine-0" / "mp_rank_00_model_states.pt")
        save_checkpoint(run, update)

    monkeypatch.setattr(common.Run, "save_checkpoint", save)
    assert run_here("remax", *SHORT, "--save-every", 1, "--output-dir", tmp_path / "r") == 1
    assert "could not write, the disk has" in only_line(capsys)
    monkeypatch.undo()
    assert run_here("remax", "--resume", tmp_path / "r") == 0
    assert "Resumed after update 1 of 2" in capsys.readouterr().out


def test_a_disk_that_is_full_while_the_model_is_saved(tmp_path, capsys, monkeypatch):
    def save_to_a_full_disk(model, folder, **kwargs):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(common.transformers.PreTrainedModel, "save_pretrained", save_to_a_full_disk)
    assert run_here("remax", *SHORT, "--save-every", 1, "--output-dir", tmp_path / "r") == 1
    assert "could not write, the disk has" in only_line(capsys)
    assert (tmp_path / "r" / "checkpoint" / "latest").read_text() == "2"


def test_an_unusable_home_is_not_a_fault_of_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", "/home/nobody/.cache/huggingface")
    with pytest.raises(SystemExit), common.fails_with("data.parquet"):
        raise PermissionError(errno.EACCES, "Permission denied", "/home/nobody/.cache/huggingface/datasets")
    line = only_line(capsys)
    assert "HF_HOME" in line and "data.parquet" not in line


# ---------------------------------------------------------------- The console


def test_an_output_that_is_not_utf_8(tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    flags = [*SHORT, "--eval-every", 2, "--eval-size", 4, "--output-dir", tmp_path / "r"]
    assert run_here("remax", *flags) == 0
    out.flush()
    assert b"eval_reward" in out.buffer.getvalue()


def test_samples_on_screen_show_where_they_are_cut(tmp_path, capsys):
    shown = types.SimpleNamespace(is_main=True, folder=tmp_path)
    row = dict(prompt="a" * 200 + "\nQ:", response="one\ntwo" + "b" * 400, reward=1.0, gold_reward=0.25)
    common.Run.log_samples(shown, 3, [row])
    out = capsys.readouterr().out
    assert f"[  1.00] …{'a' * 117}⏎Q: ▸one⏎two{'b' * 393}…\n" in out
    assert "greedy responses to held-out prompts, mean reward 1.00, mean gold reward 0.25, such as" in out
    common.Run.log_samples(shown, 4, [dict(prompt="Q:", response=" yes")])
    assert "    Q: ▸ yes\n" in capsys.readouterr().out


def test_the_last_lines_show_first_last_and_extreme_values(tmp_path, capsys):
    rewards = [-1.0, 4.0, 2.0]
    rows = [dict(update=10 * i, eval_reward=reward, eval_loss=-reward) for i, reward in enumerate(rewards)]
    rows.insert(1, dict(update=5, reward=9.0))
    (tmp_path / "policy").mkdir()
    flags = dict(model="org/model", dataset="org/data")
    run = types.SimpleNamespace(close=lambda: None, is_main=True, folder=tmp_path, flags=flags, rows=rows)
    common.Run.finish(run, "policy", "")
    reward, loss = capsys.readouterr().out.splitlines()[:2]
    assert reward.split() == "eval_reward -1.00 → 2.00 (from -1.00 to 4.00)".split()
    assert loss.split() == "eval_loss 1.00 → -2.00 (from -4.00 to 1.00)".split()
    assert common.huggingface_hub.ModelCard.load(tmp_path / "policy" / "README.md").data.base_model == "org/model"


def test_a_model_card_names_base_model_and_data_and_no_folder_of_this_machine(tmp_path, own_inputs):
    flags = [*SHORT, *as_flags(own_inputs), "--output-dir", tmp_path / "r"]
    assert run_here("remax", *flags) == 0
    path = tmp_path / "r" / "policy" / "README.md"
    card = huggingface_hub.ModelCard.load(path)
    assert card.data.base_model == "policy" and card.data.datasets == ["prompts.jsonl"]
    assert str(tmp_path) not in path.read_text() and '"sentiment.py:reward"' in path.read_text()


def test_own_data_with_the_example_s_model_is_told(tmp_path, monkeypatch, capsys):
    own = tmp_path / "my_examples" / "p.jsonl"
    own.parent.mkdir()
    own.write_text('{"prompt": "The plot"}\n')
    parsed(monkeypatch, "--dataset", own, "--reward-function", SENTIMENT)
    assert "note: --dataset is your own, but --model is the example's" in capsys.readouterr().out
    parsed(monkeypatch, "--dataset", EXAMPLE / "prompts.jsonl", "--reward-function", SENTIMENT)
    parsed(monkeypatch, "--dataset", own, "--reward-function", SENTIMENT, "--model", tmp_path)
    parsed(monkeypatch)
    assert "note: " not in capsys.readouterr().out


# ---------------------------------------------------------------- The end, and processes


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    (tmp_path / "f.py").write_text(SLOW)
    flags = [*SHORT, "--reward-function", f"{tmp_path}/f.py:reward", "--output-dir", tmp_path / "r"]
    with started(as_program, "remax.py", flags) as (process,):
        while not process.err.exists() or "0/2" not in process.err.read_text():
            time.sleep(0.05)
            assert process.exitcode is None, output_of([process])
        time.sleep(0.5)
        for _ in range(2):  # a launcher passes ctrl-C on, so that it arrives twice
            os.kill(process.pid, signal.SIGINT)
        process.join(1.5)
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGINT)
        process.join(20)
        assert process.exitcode == -signal.SIGINT
        assert process.err.read_text().count("Stopping after this update") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_other_within_a_minute(tmp_path, rank):
    flags = [*SHORT, "--total-episodes", 40_000, "--output-dir", tmp_path / "r"]
    with started(as_program, "remax.py", flags, ranks=2) as processes:
        metrics = tmp_path / "r" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            time.sleep(0.05)
            assert not any(process.exitcode for process in processes), output_of(processes)
        processes[rank].kill()
        other = processes[1 - rank]
        other.join(60)
        assert other.exitcode


def test_ranks_wait_for_each_other_for_hours():
    start_backend()
    group = common.dist.group.WORLD._get_backend(common.torch.device("cpu"))
    assert group.options._timeout.total_seconds() >= 3600


def with_lost_streams(lost: dict, *flags) -> None:
    """remax.py, whose standard output, or error, too, cannot be written. lost: {its name: where it goes}."""
    reader, writer = os.pipe()
    os.close(reader)
    for name, path in lost.items():
        setattr(sys, name, open(path or writer, "w", closefd=bool(path)))
    as_program("remax.py", flags)


def test_help_ends_in_silence_when_its_reader_is_gone():
    """As in `python remax.py --help | head`."""
    with started(with_lost_streams, dict(stdout=None), "--help") as (process,):
        process.join()
        assert process.exitcode == -signal.SIGPIPE, process.err.read_text()
        assert process.err.read_text() == ""


@pytest.mark.parametrize("lost", [dict(stdout=None), dict(stdout="/dev/full"), dict(stdout=None, stderr=None)])
def test_a_run_goes_on_when_its_output_cannot_be_written(tmp_path, lost):
    """As after ctrl-C, which ends `tee`, too. Without standard output, what it has to say goes to standard error."""
    with started(with_lost_streams, lost, *SHORT, "--output-dir", tmp_path / "r") as (process,):
        process.join()
        err = process.err.read_text()
        assert process.exitcode == 0, err
        assert "BrokenPipe" not in err and "OSError" not in err
        assert ("prompts: 1,200" in err and "Saved: " in err) == ("stderr" not in lost)
        assert (tmp_path / "r" / "policy" / "model.safetensors").exists()


def test_ctrl_c_stays_as_it_is_where_a_script_is_not_the_program():
    # Where a shell runs the tests in the background, ctrl-C is ignored already.
    code = "import signal; before = signal.getsignal(signal.SIGINT)\n"
    code += "import common; print(signal.getsignal(signal.SIGINT) is before)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "True\n"


SEEDED = [script for script in SCRIPTS if script not in PAIRS]


@pytest.mark.parametrize("script", others_are_slow(SEEDED, soon="remax"))
def test_every_update_and_rank_draws_its_own_random_numbers(tmp_path, monkeypatch, script):
    """All prompts are the same one, and the policy does not learn."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "The plot"}\n' * 4)
    texts = []
    rollout = common.rollout

    def watched(policy, prompts, *args, **kwargs):
        responses = rollout(policy, prompts, *args, **kwargs)
        if args or kwargs["num_samples"]:
            texts.append(tuple(responses.texts))
        return responses

    monkeypatch.setattr(common, "rollout", watched)
    flags = [*SHORT, "--total-episodes", 12, "--learning-rate", 1e-30, "--dataset", prompts]
    flags += ["--reward-function", SENTIMENT]
    if script == "spr_token":
        flags += "--num-samples 2 --value-epochs 1".split()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_here(script, *flags, "--seed", seed, "--output-dir", tmp_path / name) == 0
    start_processes = common.start_processes

    def as_another_rank(**flags):
        return dataclasses.replace(start_processes(**flags), rank=1)

    monkeypatch.setattr(common, "start_processes", as_another_rank)
    monkeypatch.setattr(common, "save_and_check", lambda *args: None)  # rank 0 would write the model
    monkeypatch.setattr(common.Run, "finish", lambda *args: None)
    assert run_here(script, *flags, "--seed", 1, "--output-dir", tmp_path / "d") == 0
    first, again, other, of_rank_1 = texts[:3], texts[3:6], texts[6:9], texts[9:]
    assert first == again
    assert len({*first, *other, *of_rank_1}) == 9


def test_a_clock_s_laps_are_metrics():
    clock = common.Clock()
    time.sleep(0.02)
    clock.lap("rollout")
    clock.lap("train")
    assert list(clock.seconds) == ["seconds_rollout", "seconds_train"]
    assert clock.seconds["seconds_rollout"] >= 0.02 and clock.total() == sum(clock.seconds.values())
