"""The bytes that decoding moves when rows leave the batch at once as they end, and when they wait for a tenth.

    python benchmark/leaving.py [--rows 128] [--prompt-length 512] [--response-length 256]

A simulation of what `generate` in common.py does with a cache of one byte per token; nothing is run. A token reads the
cache of each row in the batch; leaving reads and writes the whole cache, room included, of each row that stays. The
last column adds the weights, which each token reads: those of Llama 2 7B, in bytes of the cache of one token.
"""

import argparse
import random

from rows import markdown_table

WEIGHTS = 6.74e9 * 2 / (2 * 32 * 4096 * 2)


def traffic(lengths: list[int], prompt_length: int, room: int, share: float) -> tuple[int, int]:
    """-> (bytes read by attention, bytes moved by leaving rows). Rows leave when more than 1 − `share` has ended."""
    read = 0
    moved = 0
    in_batch = sorted(lengths)
    for t in range(1, room):
        going = sum(length > t for length in in_batch)
        if going == 0:
            break
        if going < len(in_batch) and going <= share * len(in_batch):
            in_batch = in_batch[len(in_batch) - going :]
            moved += 2 * going * (prompt_length + room)
        read += len(in_batch) * (prompt_length + t)
    return read, moved


def lengths_of(kind: str, rows: int, room: int) -> list[int]:
    generator = random.Random(0)
    lengths = []
    for _ in range(rows):
        if kind == "uniform":
            length = generator.randint(1, room)
        elif kind == "geometric, mean a quarter":
            length = 1 + int(generator.expovariate(4 / room))
        elif kind == "geometric, mean a half":
            length = 1 + int(generator.expovariate(2 / room))
        else:
            length = int(generator.gauss(room / 2, room / 8))
        lengths.append(min(max(length, 1), room))
    return lengths


KINDS = ("uniform", "geometric, mean a quarter", "geometric, mean a half", "normal, mean a half")


def table(rows: int, prompt_length: int, response_length: int) -> str:
    lines = []
    for kind in KINDS:
        lengths = lengths_of(kind, rows, response_length)
        at_once = traffic(lengths, prompt_length, response_length, share=1.0)
        by_tenths = traffic(lengths, prompt_length, response_length, share=0.9)
        fewer = sum(by_tenths) / sum(at_once) - 1
        weights = (max(lengths) - 1) * WEIGHTS
        fewer_with_weights = (sum(by_tenths) + weights) / (sum(at_once) + weights) - 1
        shares = [f"{moved / (read + moved):.0%}" for read, moved in (at_once, by_tenths)]
        lines.append(
            [kind, *shares, f"{by_tenths[1] / at_once[1] - 1:.0%}", f"{fewer:.0%}", f"{fewer_with_weights:.0%}"]
        )
    titles = ["lengths", "moved by leaving, at once", "by tenths", "moved", "all of the cache", "and weights"]
    return markdown_table(titles, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--response-length", type=int, default=256)
    args = parser.parse_args()
    print(table(args.rows, args.prompt_length, args.response_length))
