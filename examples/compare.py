"""Responses of policies to the same prompts, one above the other, with their rewards.

    python examples/compare.py examples/reviews/policy runs/remax__1__20260131-120000
    python examples/compare.py A B --reward-model R --dataset prompts.jsonl --num-prompts 20 --num-samples 2
    python examples/compare.py A B --typed

A policy is a model's folder, a run's folder (then it is the one in policy/) or a hub name. One alone works, too.
A run's folder also says which data (held-out, where it names a file), reward, lengths and temperature are used. Flags
go first, and where two runs differ, a flag must decide. Prompts, responses and rewards come from the functions that the
scripts train with.
"""

import json
import shutil
import signal
import string
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # ctrl-C, or `| head`, ends the program without a traceback
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from common import NonNegativeFloat, NonNegativeInt, PathOrName, PositiveFloat, PositiveInt  # noqa: E402


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    policies: tuple[str, ...]
    """Policies to compare: folders of models or of runs, or hub names; their tokenizers may differ."""
    seed: int = 1
    """Seed of the sampled responses; each policy starts from it at each prompt."""
    dataset: PathOrName = "examples/reviews/prompts_test.jsonl"
    """Prompts: a .jsonl, .json, .csv or .parquet file, a folder of these, or a hub name."""
    dataset_config: str | None = None
    """Configuration of a folder or hub data set, such as gsm8k's main; files have none."""
    dataset_split: str = "train"
    """Split of a folder or hub data set; files have none."""
    prompt_column: str = "prompt"
    """Column that holds the prompts, as texts or as chat messages."""
    num_prompts: PositiveInt = 5
    """Prompts to show, from the beginning of --dataset."""
    typed: bool = False
    """Read prompts from standard input, one per line, instead of --dataset."""
    chat: bool = False
    """Each typed line is a user's message, which goes through the policies' chat templates."""
    num_samples: NonNegativeInt = 0
    """Sampled responses per prompt and policy, beside the greedy one."""
    max_prompt_length: PositiveInt = 64
    """Prompt tokens; longer prompts lose their beginning."""
    response_length: PositiveInt = 48
    """Maximum number of tokens of a response."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of the sampled responses."""
    reward_model: PathOrName = "examples/reviews/reward_model"
    """Sequence-classification model that scores prompt + response; its tokenizer may be another."""
    reward_function: PathOrName | None = None
    """Python function file.py:name that scores texts in place of the reward model."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Reward units taken from a response that does not end."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""


DATA = "dataset dataset_config dataset_split prompt_column max_prompt_length response_length temperature".split()
DATA += ["missing_eos_penalty"]


def settings_of(run: Path) -> dict:
    """Data and reward in a run's args.json -> {field of Args: value}, and `reward`: (reward model, reward function)."""
    path = run / "args.json"
    with common.fails_with(path):
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    settings = {name: value for name, value in saved.items() if name in DATA}
    settings["dataset"] = saved.get("eval_dataset") or saved["dataset"]
    reward = (saved.get("reward_model"), saved.get("reward_function"))
    if any(reward):  # dpo.py and fine-tuning have none
        settings["reward"] = reward
    return settings


def take_settings_of_runs(args):
    """Fields that no flag has given become those of the runs among the policies; runs that differ are refused."""
    given = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in sys.argv[1:]]
    if "reward_model" in given or "reward_function" in given:
        given.append("reward")
    settings, owners = {}, {}
    for run in map(Path, args.policies):
        if not (run / "policy").is_dir() or not (run / "args.json").is_file():
            continue
        for name, value in settings_of(run).items():
            if name in given:
                continue
            if settings.setdefault(name, value) != value:
                flag = f"--{name.replace('_', '-')}" if name != "reward" else "--reward-model or --reward-function"
                common.fail(f"{owners[name]} and {run} had different values: give {flag}")
            owners.setdefault(name, run)
    if not settings:
        return
    is_own = "dataset" in settings and not Path(settings["dataset"]).is_relative_to(common.HERE / "examples/reviews")
    reward = settings.pop("reward", None)
    if reward:
        args.reward_model, args.reward_function = reward
    elif is_own and "reward" not in given:
        args.reward_model = None  # the example's is not for these prompts
    for name, value in settings.items():
        setattr(args, name, value)
    values = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items() if value is not None]
    print(f"As in {', '.join(map(str, dict.fromkeys(owners.values())))}: {' '.join(values)}")


def typed_prompts(args, tokenizers) -> Iterator[list[common.Prompt]]:
    """Lines of standard input -> a prompt for each policy; a line without tokens is left out."""
    sys.stdin.reconfigure(errors="replace")
    for line in filter(str.strip, sys.stdin):
        prompts = []
        for tokenizer in tokenizers:
            line = line.rstrip("\n")
            value = [dict(role="user", content=line)] if args.chat else line
            prompts.append(common.make_prompt(value, tokenizer, args.max_prompt_length, place="--chat"))
        if all(prompt.ids for prompt in prompts):
            yield prompts


def show(head, text):
    """A text beside its head, in lines as wide as the terminal."""
    width = max(20, shutil.get_terminal_size().columns - len(head))
    for line in text.splitlines() or [""]:
        for part in textwrap.wrap(line, width) or [""]:
            print(head + part)
            head = " " * len(head)


def main() -> None:
    args = common.parse_flags(Args)
    common.forget_example(args)
    common.make_paths_absolute(args)
    if not 1 <= len(args.policies) <= 26:
        common.fail("give 1 to 26 policies, as in: compare.py examples/reviews/policy runs/NAME")
    take_settings_of_runs(args)
    backend = common.start_processes(
        dtype=args.dtype,
        attention="sdpa",
        zero_stage=0,
        offload=False,
        gradient_checkpointing=False,
    )
    paths, tokenizers, data = [], [], []
    for letter, path in zip(string.ascii_uppercase, args.policies):
        print(f"{letter}: {path}")
        if Path(path, "args.json").is_file() and not Path(path, "policy").is_dir():
            common.fail(f"{path}: a run without a policy: it has not ended yet, or it trained a reward model")
        paths.append(str(Path(path, "policy")) if Path(path, "policy").is_dir() else path)
        tokenizers.append(common.load_tokenizer(paths[-1]))
        if not args.typed:
            layout = common.Layout(args.dataset_config, args.dataset_split, args.prompt_column)
            prompts = common.load_prompts(args.dataset, layout, tokenizers[-1], args.max_prompt_length)
            data.append({prompt.where: prompt for prompt in prompts})
    first_prompt = next(iter(data[0].values())) if data else None
    reward = common.Reward(
        model=args.reward_model,
        function=args.reward_function,
        missing_eos_penalty=args.missing_eos_penalty,
        backend=backend,
        prompt=first_prompt,
        micro_batch_size=32,
    )
    print(f"Rewards: {reward.name}; a response that ends in […] was cut off", flush=True)
    sampling = common.Sampling(args.max_prompt_length, args.response_length, args.temperature, 32)
    policies = {}
    for letter, path, tokenizer in zip(string.ascii_uppercase, paths, tokenizers):
        policies[letter] = common.load_policy(path, tokenizer, sampling, backend)

    if args.typed:
        print("Type one prompt per line; ctrl-D ends.", flush=True)
        rows = typed_prompts(args, tokenizers)
    else:
        shared = [where for where in data[0] if all(where in prompts for prompts in data)]
        rows = [[prompts[where] for prompts in data] for where in shared[: args.num_prompts]]
    scores = {}
    for number, prompts in enumerate(rows):
        print()
        show("  prompt         ▸", prompts[0].text)
        for (letter, policy), prompt in zip(policies.items(), prompts):
            common.set_seed(args.seed, number)
            responses = common.rollout(policy, [prompt], args.num_samples, greedy=True)
            kinds = ["sampled"] * args.num_samples + ["greedy"]
            columns = (reward(responses).tolist(), responses.texts, responses.ended_B)
            for kind, score, text, ended in zip(kinds, *columns):
                name = f"{letter} {kind:7}"
                scores.setdefault(name, []).append(score)
                show(f"{name} {score:6.2f} ▸", text if ended else f"{text} […]")
        sys.stdout.flush()
    print("\nMean reward")
    for name, values in scores.items():
        print(f"{name} {sum(values) / len(values):6.2f}")


if __name__ == "__main__":
    main()
