"""What tuned.py trains: tasks (data, reward, judge), methods (a script and its own flags), and their first grids."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from choice import Axis, Setting
from rows import ENVIRONMENT, ROOT, Run

MADE = "runs/benchmark"  # reward models that the tasks below need
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FINE_RATES = (1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2)
KL_COEFS = (0.0, 0.0125, 0.05, 0.2, 0.8, 3.2, 12.8)
BETAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass
class Task:
    """Paths are relative to the project; `pairs` and `lengths` are flags."""

    dataset: str
    scoring: tuple[str | None, str | None]  # reward model, reward function
    pairs: str
    policy: str
    held_out: str
    gold: str
    most_kl: float  # of settings that may be chosen
    restraints: dict[str, Axis]  # name in Method.restraint -> the grid to begin with
    rates: Axis
    length: int = 48  # tokens of the responses that are measured
    lengths: str = ""
    like: str = ""  # the task whose chosen settings are used
    times: int = 1  # how many times the episodes of METHODS


@dataclass
class Method:
    """A script with its own flags. 6,400 responses are generated, greedy ones included: `episodes` prompts."""

    command: str
    episodes: int  # 0: it learns from pairs
    restraint: str | None = "kl-coef"  # what holds the policy near the initial one: a name in Task.restraints
    rates: tuple | None = None  # the learning rates to begin with, where they are not the task's


def example(folder, lengths="", **more) -> Task:
    return Task(
        dataset=f"{folder}/prompts.jsonl",
        pairs=f"--dataset {folder}/preferences.jsonl{lengths}",
        policy=f"{folder}/policy",
        held_out=f"{folder}/prompts_test.jsonl",
        lengths=lengths,
        **more,
    )


def reviews(reward_model="examples/reviews/reward_model", times=1) -> Task:
    return example(
        "examples/reviews",
        scoring=(reward_model, None),
        gold="examples/reviews/sentiment.py:reward",
        most_kl=20.0,
        restraints={
            "kl-coef": Axis(KL_COEFS, (0.05, 0.2, 0.8)),
            "grpo": Axis(KL_COEFS, (0.05, 0.2, 0.8)),
            "spr": Axis(BETAS, (0.1, 0.3, 1.0)),
            "dpo": Axis(BETAS, (0.03, 0.1, 0.3)),
        },
        rates=Axis(RATES, (1e-4, 3e-4, 1e-3, 3e-3)),
        like="reviews",
        times=times,
    )


RULE, SHARED = "examples/guess_and_check", "../shared"
TASKS = dict(
    reviews=reviews(),
    rule=example(
        RULE,
        lengths=" --response-length 60",
        scoring=(None, f"{RULE}/rule.py:reward"),
        gold=f"{RULE}/rule.py:reward",
        most_kl=5.0,
        restraints={
            "kl-coef": Axis(KL_COEFS, (0.0, 0.0125, 0.05)),
            "grpo": Axis(KL_COEFS, (0.0, 0.0125, 0.05)),
            "spr": Axis(BETAS, (0.1, 0.3, 1.0)),
            "dpo": Axis(BETAS, (0.03, 0.1, 0.3)),
        },
        rates=Axis(RATES, (1e-4, 3e-4, 1e-3, 3e-3)),
        length=60,
        like="rule",
    ),
    # Real text, which is not in the repository: a reward model of real preferences, judged by a counted sentiment.
    imdb=Task(
        dataset=f"{SHARED}/data/imdb_prompts.jsonl",
        scoring=(f"{MADE}/reward_model_imdb", None),
        lengths=" --max-prompt-length 32 --response-length 24",
        pairs=f"--dataset {SHARED}/data/imdb_preferences.jsonl --response-length 96",
        policy=f"{SHARED}/models/imdb-mini",
        held_out=f"{SHARED}/data/imdb_preferences_8words.jsonl",
        gold=f"{SHARED}/rewards/imdb_sentiment.py:reward",
        most_kl=20.0,
        restraints={
            "kl-coef": Axis(KL_COEFS, (0.05, 0.2, 0.8)),
            "grpo": Axis(KL_COEFS, (0.05, 0.2, 0.8)),
            "spr": Axis(BETAS, (0.03, 0.1, 0.3)),
            "dpo": Axis(BETAS, (0.03, 0.1, 0.3)),
        },
        rates=Axis(FINE_RATES, (1e-4, 2e-4, 4e-4, 8e-4)),
        length=24,
        like="imdb",
    ),
)
SHIFTS = {"reviews, rewards + 3.1": 3.1, "reviews, rewards + 9.3": 9.3}  # one and three standard deviations
TASKS |= {task: reviews(f"{MADE}/reward_model_plus_{shift}") for task, shift in SHIFTS.items()}
PAIRS = {"reviews for long, 300 pairs": 300, "reviews for long, 1000 pairs": 1000}
TASKS |= {task: reviews(f"{MADE}/reward_model_of_{pairs}", times=3) for task, pairs in PAIRS.items()}
TASKS["reviews for long, all pairs"] = reviews(times=3)

# 100 updates of 64 responses, or 4 iterations of 1,600.
METHODS = {
    "reinforce": Method("reinforce.py --batch-size 64", 6400),
    "reinforce, normalised": Method("benchmark/normalised.py --batch-size 64 --micro-batch-size 64", 6400),
    "rloo, N = 4": Method("reinforce.py --baseline leave-one-out --num-samples 4 --batch-size 16", 1600),
    "remax": Method("remax.py --batch-size 32", 3200),
    "remax, N = 3": Method("remax.py --num-samples 3 --batch-size 16", 1600),
    "remax, fitted": Method("benchmark/fitted.py --batch-size 32", 3200),
    "remax, LoRA rank 1": Method("remax.py --batch-size 32 --lora-rank 1", 3200, rates=(1e-3, 3e-3, 1e-2)),
    "remax, LoRA rank 8": Method("remax.py --batch-size 32 --lora-rank 8", 3200, rates=(1e-3, 3e-3, 1e-2)),
    "grpo": Method("grpo.py --num-samples 8 --variant grpo --batch-size 8", 800, "grpo"),
    "dr-grpo": Method("grpo.py --num-samples 8 --variant dr-grpo --batch-size 8", 800, "grpo"),
    "ppo, 1 epoch": Method("ppo.py --num-epochs 1 --batch-size 64", 6400),
    "ppo, 4 epochs": Method("ppo.py --num-epochs 4 --batch-size 64", 6400),
    "spr": Method("spr.py --num-samples 8 --batch-size 200", 800, "spr"),
    "spr, token level": Method("spr_token.py --num-samples 8 --batch-size 200", 800, "spr"),
    "best-of-n": Method("spr.py --weighting best-of-n --num-samples 8 --batch-size 200", 800, None),
    "dpo": Method("dpo.py", 0, "dpo"),
}
TITLES = {  # of the tables and figures
    "reinforce": "REINFORCE",
    "reinforce, normalised": "REINFORCE, normalised",
    "rloo, N = 4": "RLOO, N = 4",
    "remax": "ReMax",
    "remax, N = 3": "ReMax, N = 3",
    "remax, fitted": "ReMax, fitted",
    "remax, LoRA rank 1": "ReMax, LoRA rank 1",
    "remax, LoRA rank 8": "ReMax, LoRA rank 8",
    "grpo": "GRPO, N = 8",
    "dr-grpo": "Dr. GRPO, N = 8",
    "ppo, 1 epoch": "PPO, 1 epoch",
    "ppo, 4 epochs": "PPO, 4 epochs",
    "spr": "SPR, N = 8",
    "spr, token level": "SPR, Algorithm 1",
    "best-of-n": "Best-of-N, N = 8",
    "dpo": "DPO",
}
SIZES = {  # at the settings that were chosen for N = 8
    "spr, N = 4": Method("spr.py --num-samples 4 --batch-size 400", 1600, "spr"),
    "spr, N = 16": Method("spr.py --num-samples 16 --batch-size 100", 400, "spr"),
    "best-of-n, N = 4": Method("spr.py --weighting best-of-n --num-samples 4 --batch-size 400", 1600, None),
    "best-of-n, N = 16": Method("spr.py --weighting best-of-n --num-samples 16 --batch-size 100", 400, None),
}


def run_of(task: str, method: str, setting: Setting, seed: int, tuning: bool) -> Run:
    where, how = TASKS[task], (METHODS | SIZES)[method]
    script, _, own_flags = how.command.partition(" ")
    words = [own_flags] if own_flags else []
    if how.episodes:
        model, function = where.scoring
        reward = f"--reward-model {model}" if model else f"--reward-function {function}"
        words.append(f"--total-episodes {how.episodes * where.times} --dataset {where.dataset} {reward}{where.lengths}")
    else:
        words.append(where.pairs)
    if how.restraint:
        name = "--kl-coef" if how.restraint == "kl-coef" else "--beta"
        words.append(f"{name} {setting.restraint}")
    words.append(f"--model {where.policy} --learning-rate {setting.learning_rate} --seed {seed}")
    if how.episodes:
        words.append(f"--eval-dataset {where.held_out}")  # dpo.py's held-out rows are pairs of its data
    return Run(task, method, script, " ".join(words), seed, tuning)


def grid(task: str, method: str) -> tuple[Axis, Axis]:
    """The learning rates and restraints that are tried first."""
    where, how = TASKS[task], METHODS[method]
    rates = Axis(where.rates.scale, how.rates) if how.rates else where.rates
    restraints = where.restraints[how.restraint] if how.restraint else Axis((None,), (None,))
    return rates, restraints


def make_reward_model(task) -> None:
    """The example's reward model with all scores shifted, or one that has learned from other pairs."""
    model = TASKS[task].scoring[0]
    if not model or not model.startswith(MADE) or (ROOT / model).exists():
        return
    folder = ROOT / model
    folder.parent.mkdir(parents=True, exist_ok=True)
    if task in SHIFTS:
        shutil.copytree(ROOT / "examples/reviews/reward_model", folder)
        config = json.loads((folder / "config.json").read_text())
        config["reward_mean"] -= SHIFTS[task]  # which is taken from every score
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        return
    if task in PAIRS:
        pairs = folder.with_suffix(".jsonl")
        lines = (ROOT / "examples/reviews/preferences.jsonl").read_text().splitlines(keepends=True)
        pairs.write_text("".join(lines[: PAIRS[task]]))
        flags = ["--dataset", str(pairs), "--eval-size", "50"]
    else:
        flags = f"--dataset {SHARED}/data/imdb_preferences.jsonl --eval-size 400 --num-epochs 2".split()
        flags += ["--learning-rate", "3e-4"]
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "reward_model.py", *flags, "--output-dir", out, "--model", TASKS[task].policy]
        subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
        shutil.copytree(f"{out}/reward_model", folder)
