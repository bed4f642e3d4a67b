"""Ten million tokens appended to a suffix tree: time and memory of each million, below a cap and without one.

    python benchmarks/suffix_append.py --cap 256 --json benchmarks/results/suffix_append.json

Responses of 1000 tokens follow a Markov chain: most tokens are one of a few that may follow the one before, the others
any; both by Zipf's law. With a cap two trees share it, and the older half of the tokens goes at once. Each run replaces
the report's entry for its cap. Beside the time that passed stands what the processor worked.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specdec.drafters.generations import Generations
from specdec.drafters.suffix_tree import SuffixTree

MILLION, LENGTH, VOCABULARY, FOLLOWERS = 10**6, 1000, 49_152, 32


def millions(seed: int = 0) -> Iterator[np.ndarray]:
    """A million tokens at a time, int32 [1000 responses, 1000 tokens]."""
    rng = np.random.default_rng(seed)
    follows = zipf(rng, (VOCABULARY, FOLLOWERS), VOCABULARY)
    while True:
        texts = np.empty((MILLION // LENGTH, LENGTH), np.int32)
        texts[:, 0] = zipf(rng, len(texts), VOCABULARY)
        for i in range(1, LENGTH):
            usual = follows[texts[:, i - 1], zipf(rng, len(texts), FOLLOWERS)]
            texts[:, i] = np.where(rng.random(len(texts)) < 0.8, usual, zipf(rng, len(texts), VOCABULARY))
        yield texts


def zipf(rng: np.random.Generator, shape: int | tuple[int, int], most: int) -> np.ndarray:
    """Numbers below ``most``, n about in proportion to 1 / (n + 1)."""
    return (most ** rng.random(shape)).astype(np.int32) - 1


def append(tree: Generations | SuffixTree, count: int) -> Iterator[dict[str, Any]]:
    """Append so many million tokens; what each took."""
    for million, texts in zip(range(1, count + 1), millions(), strict=False):
        began, worked = time.perf_counter(), time.thread_time()
        for text in texts:
            tree.extend(text)
            tree.end()
        seconds, worked, held = time.perf_counter() - began, time.thread_time() - worked, len(tree.tokens)
        yield {
            "million": million,
            "us_per_token": 1e6 * seconds / MILLION,
            "cpu_us_per_token": 1e6 * worked / MILLION,
            "bytes": tree.bytes_used,
            "tokens_held": held,
            "bytes_per_token_held": tree.bytes_used / held,
        }


def main() -> None:
    """Measure one cap, print a row per million, and put the rows into the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", type=int, help="MiB; without it nothing is forgotten")
    parser.add_argument("--millions", type=int, default=10)
    parser.add_argument("--json", type=Path, help="a report to put the rows into")
    arguments = parser.parse_args()
    SuffixTree().extend(next(millions())[0])  # loads or compiles the kernels
    tree, rows = Generations(64, arguments.cap << 20) if arguments.cap else SuffixTree(), []
    print("million: us per token, us of CPU time, MiB held, bytes per token held, tokens held")
    for row in append(tree, arguments.millions):
        rows.append(row)
        print(
            f"{row['million']:4} {row['us_per_token']:8.2f} {row['cpu_us_per_token']:8.2f} {row['bytes'] / 2**20:8.0f} "
            f"{row['bytes_per_token_held']:8.1f} {row['tokens_held']:10}",
            flush=True,
        )
    if arguments.json:
        report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"append": {}}
        report["append"]["none" if arguments.cap is None else f"{arguments.cap} MiB"] = rows
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
