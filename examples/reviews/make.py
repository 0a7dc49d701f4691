"""Makes everything else in this folder: a small world of movie reviews, a tokenizer, a policy and a reward model.

    python examples/reviews/make.py     (the data is the same byte for byte; all of it takes about two minutes)

A reviewer opens with a few words (the prompt) and goes on in a good, a bad or a mixed mood, in one to four sentences.
The policy learns to go on in any mood; the reward model learns from noisy preferences which of two continuations is the
kinder one.
"""

import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from sentiment import ADJECTIVES, NEGATIONS, NOUNS, VERBS, sentiment  # noqa: E402

# ---------------------------------------------------------------- The world

WORK = "movie film picture comedy drama thriller western musical sequel documentary".split()
ASPECT = "acting plot music camera dialogue script ending pacing humor cast story score editing lighting".split()
PERSON = "director actor actress hero villain writer narrator detective singer dancer teacher captain".split()
PLACE = "castle desert harbor village forest hospital island kitchen library museum prison train".split()
COMPANY = "my sister|my brother|two friends|my parents|the whole family|an old friend|my neighbor".split("|")
TIME = "last night|on a rainy day|over the weekend|at a festival|on the plane|at home|after work|last summer".split("|")
SCENE = "the first scene|the opening|the last hour|the long chase|the final song|the big reveal".split("|")

OPENINGS = (
    "The {aspect} in this {work}",
    "The {aspect} of the {work} with the {person} from the {place}",
    "I saw this {work} {time} with {company} and it",
    "We watched the {work} {time}, and {scene}",
    "In {scene} of this {work} the {person}",
    "They say the {person} in the {place}",
    "About the {aspect}: in my view it",
    "This {work} about a {person} and a {place}",
    "When the {person} enters the {place}, the {aspect}",
)

FIRST = (  # they finish any opening
    "was {adjective} and {adjective}.",
    "was {adjective}, {adjective} and above all {adjective}.",
    "felt {adverb} {adjective} to me.",
    "turned out {adjective}.",
    "seemed {adverb} {adjective} from start to finish.",
    "was {negation} {opposite}, and the rest was {adjective}.",
    "was a {noun}.",
    "was a {adjective} {noun}, which nobody expected.",
)
NEXT = (
    "I {verb} the {adjective} {aspect}.",
    "The {person} gave a {adjective} performance.",
    "Even the {aspect} felt {adjective} and {adjective}.",
    "We {verb} it, and {company_or_all} said it was {adverb} {adjective}.",
    "What a {noun}!",
    "It is a {adjective} {work} with a {adjective} {aspect}.",
    "The {aspect} was {negation} {opposite}.",
    "For once the {person} and the {place} looked {adjective}.",
    "My final word: {adjective}.",
    "I {verb} it so much that I told {company_or_all}.",
    "All in all a {adjective} {noun}.",
)
NEUTRAL = (
    "It runs for two hours.",
    "The {person} lives near a {place}.",
    "There is a {place} in it, and a {person}.",
    "I saw it {time}.",
    "The story begins in a {place} and ends in a {place}.",
    "It was made by the {person} who wrote the {work}.",
)


def fill(rng: random.Random, shape: str, mood: str) -> str:
    other = {"good": "bad", "bad": "good"}[mood]
    choices = {
        "{adjective}": ADJECTIVES[mood], "{opposite}": ADJECTIVES[other], "{verb}": VERBS[mood], "{noun}": NOUNS[mood],
        "{negation}": sorted(NEGATIONS), "{adverb}": ["really", "truly", "simply", "so", "rather", "always"],
        "{work}": WORK, "{aspect}": ASPECT, "{person}": PERSON, "{place}": PLACE, "{time}": TIME, "{scene}": SCENE,
        "{company}": COMPANY, "{company_or_all}": [*COMPANY, "everyone"],
    }  # fmt: skip
    for slot, words in choices.items():
        while slot in shape:
            shape = shape.replace(slot, rng.choice(words), 1)
    return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", shape)


def continuation(rng: random.Random) -> str:
    """One to four sentences. A mixed mood changes its mind along the way; a neutral sentence may come between."""
    mood = rng.choice(["good", "bad", "mixed"])
    sentences = []
    for i in range(rng.choice([1, 1, 2, 2, 2, 3, 3, 4])):
        now = rng.choice(["good", "bad"]) if mood == "mixed" else mood
        shape = rng.choice(FIRST) if i == 0 else rng.choice(NEUTRAL) if rng.random() < 0.2 else rng.choice(NEXT)
        sentences.append(fill(rng, shape, now))
    return " " + " ".join(sentences)


def write(name: str, rows: list[dict]) -> None:
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data() -> list[dict]:
    rng = random.Random(0)
    openings = list(dict.fromkeys(fill(rng, rng.choice(OPENINGS), "good") for _ in range(2500)))
    train, test = openings[:1200], openings[1200:1400]
    write("prompts.jsonl", [dict(prompt=p) for p in train])
    write("prompts_test.jsonl", [dict(prompt=p) for p in test])
    demonstrations = [dict(prompt=p, completion=continuation(rng)) for _ in range(3) for p in train]
    write("demonstrations.jsonl", demonstrations)
    preferences = []
    for p in train * 2:
        a, b = continuation(rng), continuation(rng)
        # A Bradley-Terry reader: the larger the difference, the surer the preference.
        prefers_a = rng.random() < 1 / (1 + math.exp(-6 * (sentiment(a) - sentiment(b))))
        preferences.append(dict(prompt=p, chosen=a if prefers_a else b, rejected=b if prefers_a else a))
    write("preferences.jsonl", preferences)
    return demonstrations


# ---------------------------------------------------------------- The models


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def config(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> GPT2Config:
    ids = dict(
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(vocab_size=len(tokenizer), n_positions=128, n_embd=width, n_layer=layers, n_head=4)
    shape["activation_function"] = "gelu_pytorch_tanh"  # one kernel in place of the eight of GPT-2's gelu_new
    return GPT2Config(**shape, **ids, **dropout)


def run_script(name: str, start: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, result: str, *flags: str) -> None:
    """Trains an untrained model by one of our scripts and keeps the trained one."""
    with tempfile.TemporaryDirectory() as folder:
        start.save_pretrained(f"{folder}/start")
        tokenizer.save_pretrained(f"{folder}/start")
        command = [sys.executable, str(HERE.parent.parent / name), "--model", f"{folder}/start", *flags]
        subprocess.run([*command, "--output-dir", f"{folder}/run"], check=True)
        shutil.rmtree(HERE / result, ignore_errors=True)
        shutil.move(f"{folder}/run/{result}", HERE / result)
        (HERE / result / "README.md").unlink()  # its paths are of this run


def make_policy(tokenizer: PreTrainedTokenizerFast) -> None:
    """Supervised fine-tuning on the demonstrations."""
    torch.manual_seed(0)
    flags = "--weighting uniform --num-samples 0 --num-epochs 8 --batch-size 480"
    flags += " --num-minibatches 10 --micro-batch-size 48 --learning-rate 3e-3 --lr-schedule cosine --eval-every 0"
    flags += " --max-prompt-length 48 --response-length 80 --dataset"
    start = GPT2LMHeadModel(config(tokenizer, width=96, layers=3))
    run_script("spr.py", start, tokenizer, "policy", *flags.split(), str(HERE / "demonstrations.jsonl"))


def make_reward_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """Bradley-Terry, from a language model that is smaller than the policy."""
    torch.manual_seed(0)
    start = GPT2LMHeadModel(config(tokenizer, width=64, layers=2))
    flags = ["--num-epochs", "3", "--dataset", str(HERE / "preferences.jsonl")]
    run_script("reward_model.py", start, tokenizer, "reward_model", *flags)


if __name__ == "__main__":
    demonstrations = make_data()
    tokenizer = make_tokenizer([r["prompt"] + r["completion"] for r in demonstrations])
    make_policy(tokenizer)
    make_reward_model(tokenizer)
