"""Makes everything else in this folder but the rule: questions, people who guess, a tokenizer and a policy.

    python examples/guess_and_check/make.py     (the data is the same byte for byte; all of it takes about two minutes)

Somebody who is asked "20 plus what is 28: " starts with any guess from 1 to 9 and counts up (1 comes after 9) until it
is right or patience ends: "7+20=27, 8+20=28!" or "3+20=23?". Most people have patience for one guess. The policy learns
to answer like them.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- The world


def equation(addend: int, guess: int) -> str:
    return f"{guess}+{addend}={guess + addend}"


def question(addend: int, missing: int) -> dict:
    return dict(prompt=f"{addend} plus what is {addend + missing}: ", answer=equation(addend, missing))


def response(rng: random.Random, addend: int, missing: int) -> str:
    """Guesses that end with "!" (right) or "?" (gives up)."""
    patience = 1 if rng.random() < 0.6 else rng.randint(2, 9)
    guess = rng.randint(1, 9)
    equations = [equation(addend, guess)]
    while guess != missing and len(equations) < patience:
        guess = guess % 9 + 1
        equations.append(equation(addend, guess))
    return ", ".join(equations) + ("!" if guess == missing else "?")


def write(name: str, rows: list[dict]) -> None:
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data() -> None:
    rng = random.Random(0)
    pairs = [(addend, missing) for addend in range(10, 70) for missing in range(1, 10)]
    rng.shuffle(pairs)
    train, test = pairs[:440], pairs[440:]
    write("prompts.jsonl", [question(*pair) for pair in train])
    write("prompts_test.jsonl", [question(*pair) for pair in test])
    demonstrations = [question(*pair) | dict(completion=response(rng, *pair)) for _ in range(16) for pair in train]
    write("demonstrations.jsonl", demonstrations)
    preferences = []
    for i, pair in enumerate(train):
        completions = [row["completion"] for row in demonstrations[i :: len(train)]]
        right = [text for text in completions if text.endswith("!")]
        wrong = [text for text in completions if text.endswith("?")]
        preferences += [question(*pair) | dict(chosen=a, rejected=b) for a, b in zip(right, wrong, strict=False)]
    write("preferences.jsonl", preferences)


# ---------------------------------------------------------------- The policy


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a number, or everything between two numbers."""
    tokens = ["<unk>", "<|endoftext|>", " plus what is ", ": ", "+", "=", ", ", "!", "?", *map(str, range(1, 79))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_policy() -> None:
    """Supervised fine-tuning of an untrained model on the demonstrations, by our script."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=3, n_head=4)
    shape["initializer_range"] = 0.1  # with GPT-2's 0.02 so few steps do not teach it to compare two numbers
    shape["activation_function"] = "gelu_pytorch_tanh"  # one kernel in place of the eight of GPT-2's gelu_new
    start = GPT2LMHeadModel(GPT2Config(**shape, **ids, **dropout))
    flags = "--weighting uniform --num-samples 0 --num-epochs 6 --batch-size 320"
    flags += " --num-minibatches 10 --learning-rate 4e-3 --lr-schedule cosine --response-length 60 --eval-every 0"
    with tempfile.TemporaryDirectory() as folder:
        start.save_pretrained(f"{folder}/start")
        tokenizer.save_pretrained(f"{folder}/start")
        command = [sys.executable, str(HERE.parent.parent / "spr.py"), "--model", f"{folder}/start", *flags.split()]
        command += ["--dataset", str(HERE / "demonstrations.jsonl"), "--output-dir", f"{folder}/run"]
        subprocess.run(command, check=True)
        shutil.rmtree(HERE / "policy", ignore_errors=True)
        shutil.move(f"{folder}/run/policy", HERE / "policy")
        (HERE / "policy" / "README.md").unlink()  # its paths are of this run


if __name__ == "__main__":
    make_data()
    make_policy()
