"""SuffixDrafter beside the suffix cache of arctic-inference, on recorded conversations and without a model.

    python benchmarks/suffix_cache.py --tokenizer PATH TRACES.jsonl... --json benchmarks/results/suffix_cache.json

Each assistant message, or row that benchmarks/record.py wrote, is replayed against all that came before it, sessions in
file order, by every drafter in turn. A step drafts, accepts what the recorded response confirms, and commits one token
more. Times are of the drafter's own calls, the reading of prompts included, and not of what hands it the text or reads
its drafts; of each response's times in several passes the least counts, so that other work on the machine does not.
arctic-inference, Snowflake's C++ (Apache-2.0), is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from specdec import trees
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.drafters import NgramDrafter
from specdec.drafters.suffix import SuffixDrafter

Turn = tuple[np.ndarray, np.ndarray]  # what came before, and the response


class Player(Protocol):
    """A drafter under replay; ``start``, ``draft``, ``learn`` and ``stop`` are timed."""

    def start(self, prompt: np.ndarray) -> None:
        """Begin a response."""

    def draft(self) -> Any:
        """A tree, as the drafter makes it."""

    def tree(self, drafted: Any) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens and parents, the root first."""

    def commit(self, tokens: np.ndarray) -> None:
        """Append to the text."""

    def learn(self, tokens: np.ndarray) -> None:
        """Tell what was appended, if the drafter does not look."""

    def stop(self) -> None:
        """End the response."""

    def memory(self) -> int:
        """Bytes held for past responses."""


class Ours:
    """Any drafter of this library."""

    def __init__(self, drafter: Any, budget: Budget):
        self.drafter, self.budgets = drafter, [budget]
        self.root, self.path = DraftTree.root(0), np.zeros(1, np.int64)  # of verdicts, which are no drafter's work

    def start(self, prompt: np.ndarray) -> None:
        self.contexts = [Context(prompt)]

    def draft(self) -> DraftTree:
        tree: DraftTree = self.drafter.draft(self.contexts, self.budgets)[0]
        return tree

    def tree(self, drafted: DraftTree) -> tuple[np.ndarray, np.ndarray]:
        return drafted.tokens, drafted.parents

    def commit(self, tokens: np.ndarray) -> None:
        self.contexts[0].extend(Verdict(self.root, self.path, tokens))

    def learn(self, tokens: np.ndarray) -> None:
        pass

    def stop(self) -> None:
        self.contexts[0].finished = True
        self.drafter.draft(self.contexts, [Budget(0, 0, 0)])
        del self.contexts

    def memory(self) -> int:
        return int(self.drafter.bytes_used)


class Arctic:
    """The cache of arctic-inference, used as its own engine uses it."""

    def __init__(self, max_depth: int, nodes: int, tree: bool):
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(max_depth)
        self.limits = {"max_spec_tokens": nodes, "use_tree_spec": tree}
        self.depth, self.names = max_depth, count()

    def start(self, prompt: np.ndarray) -> None:
        self.name, self.tail = next(self.names), prompt[-self.depth :]
        self.cache.start_request(self.name, prompt)

    def draft(self) -> Any:
        return self.cache.speculate(self.name, self.tail, **self.limits)

    def tree(self, drafted: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.array([0, *drafted.token_ids]), np.array([-1, *(parent + 1 for parent in drafted.parents)])

    def commit(self, tokens: np.ndarray) -> None:
        self.tail = np.concatenate([self.tail, tokens])[-self.depth :]

    def learn(self, tokens: np.ndarray) -> None:
        self.cache.add_active_response(self.name, tokens)

    def stop(self) -> None:
        self.cache.stop_request(self.name)

    def memory(self) -> int:
        return int(self.cache._global_tree.estimate_memory())


@dataclass
class Result:
    """What a replay came to.

    Attributes:
        seconds: the drafter's, by response.
        memory: bytes held at the end.
    """

    tokens: int
    steps: int
    drafted: int
    seconds: np.ndarray
    memory: int


def replay(player: Player, turns: Sequence[Turn]) -> Result:
    """Play all responses, in order. Raises AssertionError where one does not come out as recorded."""
    played = [play(player, *turn) for turn in turns]
    steps, drafted, seconds = zip(*played, strict=True)
    tokens = sum(len(response) for _, response in turns)
    return Result(tokens, sum(steps), sum(drafted), np.array(seconds), player.memory())


def play(player: Player, prompt: np.ndarray, response: np.ndarray) -> tuple[int, int, float]:
    """Play one response: steps, drafted tokens, and seconds."""
    clock, done, steps, guessed = time.perf_counter, 0, 0, 0
    began = clock()
    player.start(prompt)
    seconds = clock() - began
    while done < len(response):
        began = clock()
        drafted = player.draft()
        seconds += clock() - began
        tokens, parents = player.tree(drafted)
        path = trees.follow(tokens, parents, response[done:-1].astype(np.int64))
        new = response[done : done + len(path)]
        assert (tokens[path[1:]] == new[: len(path) - 1]).all()
        player.commit(new)
        began = clock()
        player.learn(new)
        seconds += clock() - began
        done, steps, guessed = done + len(path), steps + 1, guessed + len(tokens) - 1
    assert done == len(response)
    began = clock()
    player.stop()
    return steps, guessed, seconds + clock() - began


def players(nodes: int, max_depth: int = 64) -> Iterator[tuple[str, Callable[[], Player]]]:
    """Who is compared, by name; each call makes a new one."""
    budget = Budget(nodes, nodes, nodes)
    yield "path", lambda: Ours(SuffixDrafter(max_depth, mode="path"), budget)
    yield "tree", lambda: Ours(SuffixDrafter(max_depth), budget)
    yield "ngram", lambda: Ours(NgramDrafter(), budget)
    try:
        Arctic(max_depth, nodes, tree=False)
    except ImportError as error:
        print(f"arctic-inference is left out: {error}")
        return
    yield "arctic path", lambda: Arctic(max_depth, nodes, tree=False)
    yield "arctic tree", lambda: Arctic(max_depth, nodes, tree=True)


def read_turns(path: Path, tokenizer: Any) -> list[Turn]:
    """The recorded answers of a file, assistant messages among them, each with all that came before it."""
    turns = []
    for line in path.read_text().splitlines():
        entry, before = json.loads(line), list[int]()
        if "response" in entry:
            turns.append((np.array(entry["prompt"], np.int32), np.array(entry["response"], np.int32)))
        for message in entry.get("messages", []):
            ids = [*tokenizer.encode(message["content"] or "", add_special_tokens=False), tokenizer.eos_token_id]
            if message["role"] == "assistant":
                turns.append((np.array(before, np.int32), np.array(ids, np.int32)))
            before += ids
    return [turn for turn in turns if len(turn[0]) and len(turn[1])]


def row(trace: str, who: str, result: Result) -> dict[str, Any]:
    """What is reported of one replay."""
    return {
        "trace": trace,
        "who": who,
        "tokens": result.tokens,
        "tokens_per_step": result.tokens / result.steps,
        "accepted_of_drafted": (result.tokens - result.steps) / max(result.drafted, 1),
        "us_per_token": 1e6 * result.seconds.sum() / result.tokens,
        "bytes_per_token": result.memory / result.tokens,
    }


def main() -> None:
    """Replay the files named on the command line and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--tokenizer", required=True, help="a directory or hub id")
    parser.add_argument("--nodes", type=int, default=32, help="guesses per step at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures, too")
    parser.add_argument("--only", nargs="*", help="names of players")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    rows = []
    print("trace / who: tokens per step, accepted of drafted, us per token, bytes per token")
    for path in arguments.traces:
        turns = read_turns(path, tokenizer)
        who = {name: make for name, make in players(arguments.nodes) if not arguments.only or name in arguments.only}
        for make in who.values():
            replay(make(), turns[:3])  # compiles
        runs = [{name: replay(make(), turns) for name, make in who.items()} for _ in range(arguments.repeats)]
        for name in who:
            result = runs[0][name]
            result.seconds = np.min([run[name].seconds for run in runs], axis=0)
            best = row(path.stem, name, result)
            rows.append(best)
            print(
                f"{path.stem:20} {name:12} {best['tokens_per_step']:6.3f} {best['accepted_of_drafted']:6.3f} "
                f"{best['us_per_token']:8.2f} {best['bytes_per_token']:8.0f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"nodes": arguments.nodes, "replays": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
