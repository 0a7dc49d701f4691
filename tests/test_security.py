"""No code but the reward function's is loaded, nothing is fetched unasked, and secrets stay where they are."""

import json
import shutil
import socket

import pytest
import torch
from conftest import SCRIPTS
from safetensors.torch import load_file
from script_worker import run

import common

FLAGS = "--total-episodes 8 --batch-size 4 --eval-size 2 --save-every 1".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_network_and_no_secret_in_what_is_written(tmp_path, capsys, monkeypatch, script):
    secrets = dict(HF_TOKEN="hf_s3cr3t", WANDB_API_KEY="k3y-s3cr3t", AWS_SECRET_ACCESS_KEY="aws-s3cr3t")
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    common.start_processes()  # the process group, on the loopback interface
    asked = []

    def refuse(self, address, *args):
        asked.append(address)
        raise OSError(f"no network: {address}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: refuse(None, args))
    assert run(script, [*FLAGS, "--output-dir", tmp_path / "r"])["status"] == 0
    assert not asked
    written = {path.name: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    assert {"args.json", "metrics.jsonl", "samples.jsonl"} <= written.keys() and len(written) > 8
    out, err = capsys.readouterr()
    for text in (*written.values(), out.encode(), err.encode()):
        assert b"s3cr3t" not in text


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(folder, boom):
    """Sound weights, but in a pickle, which could hold anything."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def code_of_a_model(folder, boom):
    """A model that wants classes of its own, under a name that transformers does not know."""
    (folder / "evil.py").write_text(f"open({str(boom)!r}, 'w')\nclass EvilConfig: ...\nclass Evil: ...\n")
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    auto_map = dict(AutoConfig="evil.EvilConfig") | {name: "evil.Evil" for name in names}
    (folder / "config.json").write_text(json.dumps(config | dict(model_type="evil", auto_map=auto_map)))


def code_of_a_tokenizer(folder, boom):
    code_of_a_model(folder, boom)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = dict(tokenizer_class="EvilTokenizer", auto_map=dict(AutoTokenizer=["evil.Evil", None]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))


@pytest.mark.parametrize("make", [pickled, code_of_a_model, code_of_a_tokenizer])
@pytest.mark.parametrize("role", ["--model", "--reward-model"])
def test_models_never_run_code_of_their_own(tmp_path, capsys, monkeypatch, role, make):
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # what transformers asks where it is not told no
    folder, boom = tmp_path / "m", tmp_path / "boom"
    shutil.copytree(common.EXAMPLE / ("policy" if role == "--model" else "reward_model"), folder)
    make(folder, boom)
    assert run("remax", [*FLAGS, role, folder, "--output-dir", tmp_path / "r"])["status"] == 2
    assert str(folder) in capsys.readouterr().err and not boom.exists()


def test_a_resumed_folder_is_the_exception(tmp_path):
    """What the README warns of is so: a checkpoint is a pickle, and loading it runs what it holds."""
    assert run("remax", [*FLAGS, "--output-dir", tmp_path / "r"])["status"] == 0
    (path,) = (tmp_path / "r" / "checkpoint").rglob("mp_rank_00_model_states.pt")
    torch.save(Bomb(tmp_path / "boom"), path)
    run("remax", ["--resume", tmp_path / "r"])
    assert (tmp_path / "boom").exists()
