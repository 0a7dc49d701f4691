"""Run by test_spr.py: fits Q and W on a language of three words and compares them with dynamic programming."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from conftest import tiny_model
from test_algorithm import LENGTH, sentences

import common
import spr


def main() -> None:
    folder = Path(sys.argv[1])
    model = tiny_model("gpt2", vocab_size=800, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder / "model")
    tokenizer = common.load_tokenizer(str(common.EXAMPLE / "policy"))  # only saved beside the models, never asked
    tokenizer.save_pretrained(folder / "model")
    args = spr.Args(model=str(folder / "model"), response_length=LENGTH, num_samples=60, prompts_per_iteration=2)
    updates = dict(epochs_per_iteration=60, batch_size=1, micro_batch_size=60, learning_rate=3e-3, beta=0.8)
    phases = common.Phases()
    args = dataclasses.replace(args, **updates, output_dir=str(folder / "run"))
    args.resume = phases.run(common.open_run, args, "spr.py")
    report = {}
    for level in ("token", "sequence"):
        args = dataclasses.replace(args, level=level, reference="learned", gamma=0.9)
        prompts = [common.Prompt("a", [5], {}), common.Prompt("b", [6, 7], {})]
        it = spr.Iteration(args, 1, prompts, [])
        generator = torch.Generator().manual_seed(1)
        rows = []
        for prompt in prompts:
            reward_of = dict(zip(sentences(), torch.randn(len(sentences()), generator=generator).tolist(), strict=True))
            drawn = torch.randint(len(sentences()), (60,), generator=generator).tolist()
            for tokens in (sentences()[i] for i in drawn):
                text = dict(prompt=prompt.text, response="", ended=tokens[-1] == 0, tokens=list(tokens))
                rows.append(text | dict(reward=reward_of[tokens]))
        it.folder.mkdir(exist_ok=True)
        (it.folder / "samples.jsonl").write_text(common.json_lines(rows))

        # Dynamic programming on the buffer: a' is the buffer's next token, so Q is the mean of what followed.
        q, w = {}, {}
        for row in rows:
            for t in range(len(row["tokens"])):
                key = (row["prompt"], *row["tokens"][: t + 1])
                q.setdefault(key, []).append(args.gamma ** (len(row["tokens"]) - 1 - t) * row["reward"])
        q = {key: sum(values) / len(values) for key, values in q.items()}
        for row in rows:
            for t in range(len(row["tokens"])):
                key = (row["prompt"], *row["tokens"][:t])
                value = q[(*key, row["tokens"][t])] if level == "token" else row["reward"]
                w.setdefault(key, []).append(math.exp(value / args.beta))
        w = {key: args.beta * math.log(sum(values) / len(values)) for key, values in w.items()}

        if level == "token":
            for sweep in range(8):
                phases.run(spr.write_targets, args, it, sweep)
                phases.run(spr.fit_action_values, args, it, sweep)
            found = common.read_rows(it.folder / "q_values.jsonl")
            keys = [(row["prompt"], *row["tokens"][: t + 1]) for row in rows for t in range(len(row["tokens"]))]
            errors = [q[key] - value for key, value in zip(keys, sum(found, []), strict=True)]
            report |= dict(q_error=rms(errors), spread=torch.tensor(list(q.values())).std().item())
        phases.run(spr.fit_reference, args, it)
        weighted = common.read_rows(it.folder / "samples.jsonl")
        w_errors, weight_errors = [], []
        for row, values in zip(weighted, found if level == "token" else [[r["reward"]] for r in rows], strict=True):
            weights = row["weight"] if level == "token" else [row["weight"]]
            offset = 0.0 if level == "token" else args.beta * math.log(60)
            for t, (weight, value) in enumerate(zip(weights, values, strict=True)):
                key = (row["prompt"], *row["tokens"][:t])
                w_errors.append(value - args.beta * math.log(weight) - offset - w[key])
                weight_errors.append(weight * math.exp(offset / args.beta) - math.exp((value - w[key]) / args.beta))
        name = "w_error" if level == "token" else "sequence_w_error"
        report |= {name: rms(w_errors), "weight_error": max(report.get("weight_error", 0.0), rms(weight_errors))}
    print(json.dumps(report))


def rms(errors: list[float]) -> float:
    return math.sqrt(sum(e * e for e in errors) / len(errors))


if __name__ == "__main__":
    main()
