"""Responses of policies to the same prompts, one above the other, with their rewards.

    python examples/compare.py examples/reviews/policy runs/remax__1__20260131-120000
    python examples/compare.py A B --reward-model R --dataset prompts.jsonl --num-prompts 20 --num-samples 2
    python examples/compare.py A B --typed

A policy is a model's folder, a run's folder (then it is the one in policy/) or a hub name. One alone works, too.
Prompts, responses and rewards come from the functions that the scripts train with.
"""

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
from common import NonNegativeInt, PathOrName, PositiveFloat, PositiveInt  # noqa: E402


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    policies: tuple[str, ...]
    """Policies to compare: folders of models or of runs, or hub names; their tokenizers may differ."""
    seed: int = 1
    """Seed of the sampled responses; each policy starts from it at each prompt."""
    dataset: PathOrName = "examples/reviews/prompts_test.jsonl"
    """Prompts: a .jsonl, .json, .csv or .parquet file, or a hub name."""
    dataset_config: str | None = None
    """Configuration of a hub data set, such as gsm8k's main; files have none."""
    dataset_split: str = "train"
    """Split of the hub data sets; files have none."""
    prompt_column: str = "prompt"
    """Column that holds the prompts, as texts or as chat messages."""
    num_prompts: PositiveInt = 5
    """Prompts to show, from the beginning of --dataset."""
    typed: bool = False
    """Read prompts from standard input, one a line, in place of --dataset."""
    chat: bool = False
    """Typed lines are messages of a user, for the chat templates of the policies."""
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""


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
        paths.append(str(Path(path, "policy")) if Path(path, "policy").is_dir() else path)
        tokenizers.append(common.load_tokenizer(paths[-1]))
        if not args.typed:
            hub = (args.dataset_config, args.dataset_split)
            options = (hub, args.prompt_column, tokenizers[-1], args.max_prompt_length)
            data.append({prompt.where: prompt for prompt in common.load_prompts(args.dataset, *options)})
    first_prompt = next(iter(data[0].values())) if data else None
    reward = common.Reward(
        model=args.reward_model,
        function=args.reward_function,
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
        print("Type a prompt a line; ctrl-D ends.", flush=True)
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
