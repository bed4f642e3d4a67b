"""What reading a long text costs, all of it, retrieved chunks, or a window; and what TriForce makes of that.

    python benchmarks/long_context.py [--contexts 8192,16384,32768] [--quick] [--json OUT]

The model is of Llama's shape with random weights, and as much to read in a long text's KV rows as in its weights or
more: passes take as long as a trained model's of that shape, but what it writes means nothing, and how often the full
cache agrees with the retrieved one ("accepted") is these weights' alone. TriForce's output is compared with plain
decoding's, by the same kernels, before its speed is said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import specdec
from specdec.attach import attach
from specdec.bench.machine import machine
from specdec.core import DraftTree
from specdec.drafters import NgramDrafter, TriForceDrafter
from specdec.drafters.middle import Middle
from specdec.model import Model
from specdec.policies import FixedPolicy
from specdec.streaming_cache import StreamingCache

NODES = (1, 8)
BUDGET, WINDOW = 2048, 508
NEW_TOKENS = 48


def synthetic(positions: int) -> Any:
    """4 layers of 8 heads with keys of their own: 17 million weights, and 16 KiB of KV rows for each token."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=positions, rope_theta=500000.0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def repeated(length: int) -> torch.Tensor:
    """A text of random passages, each of which comes again."""
    draw = torch.Generator().manual_seed(length)
    passages = torch.randint(3, 4096, (length // 512, 256), generator=draw)
    return torch.cat([passages, passages[torch.randperm(len(passages), generator=draw)]]).flatten()[None]


def rows_of(model: Any, ids: torch.Tensor) -> DynamicCache:
    """The KV rows of a text but its last token, read once, in pieces."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in ids[:, :-1].split(2048, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
    return cache


def read(model: Any, ids: torch.Tensor, cache: DynamicCache) -> Model:
    """The model with rows of its own of a text."""
    target = Model(model, attach(model, timed=False).form)

    def loop(module: Any, ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **more: Any):
        target.start(ids, generation_config, more)
        return ids

    model.generate(ids, past_key_values=cache, custom_generate=loop, max_new_tokens=NEW_TOKENS, do_sample=False)
    return target


def seconds(target: Model, nodes: int, repeats: int) -> float:
    """The median time of a pass over a chain, of which nothing is kept."""
    chain, times = DraftTree.chain(7, range(8, 7 + nodes), [1.0] * (nodes - 1), ""), list[float]()
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.forward([chain])
        times.append(time.perf_counter() - start)
        target.keep([[]])
    return statistics.median(times[1:])


def passes(model: Any, ids: torch.Tensor, cache: DynamicCache, repeats: int = 5) -> list[dict[str, Any]]:
    """Seconds per pass and bytes held, for each cache."""
    full = read(model, ids, cache)
    level = Middle(full, 0, BUDGET, 8)
    start = time.perf_counter()
    level.refresh(7, anew=True)
    build = time.perf_counter() - start
    window = copy(full)
    window.cache, window.lengths = StreamingCache(sinks=4, recent=WINDOW), [2048]
    with torch.no_grad():
        for piece in ids[:, :2048].split(256, 1):
            model(piece, past_key_values=window.cache, logits_to_keep=1)
    caches = {"full": full, "retrieval": level.model, "streaming": window}
    rows = list[dict[str, Any]]()
    for name, target in caches.items():
        row: dict[str, Any] = {"context": ids.shape[1], "cache": name, "bytes": target.cache.bytes}
        row |= {f"seconds_{nodes}": seconds(target, nodes, repeats) for nodes in NODES}
        rows.append(row | ({"seconds_build": build} if name == "retrieval" else {}))
    return rows


def decoding(model: Any, ids: torch.Tensor, cache: DynamicCache) -> list[dict[str, Any]]:
    """Plain decoding and TriForce from a prompt on: the same tokens, and how long they took after it."""
    methods: dict[str, tuple[Any, Any]] = {
        "plain": (NgramDrafter(), FixedPolicy(0, 0, 0)),
        "ngram": (NgramDrafter(), FixedPolicy(8, 8, 2)),
        "triforce": (TriForceDrafter(NgramDrafter(), BUDGET, guesses=4), FixedPolicy(6, 6, 1)),
    }
    rows, texts = list[dict[str, Any]](), dict[str, list[int]]()
    for name, (drafter, policy) in methods.items():
        with specdec.speculating(model, drafter, policy):
            output = model.generate(ids, past_key_values=deepcopy(cache), max_new_tokens=NEW_TOKENS, do_sample=False)
            texts[name] = output[0, ids.shape[1] :].tolist()
            stats = specdec.stats(model)
        spent = sum(taken for part, taken in stats.seconds.items() if part != "prefill")
        equal = texts[name] == texts["plain"]
        rows.append(
            {
                "context": ids.shape[1],
                "method": name,
                "equal": equal,
                "tokens_per_step": stats.tokens_per_step,
                "accepted": stats.accepted / max(1, stats.drafted),
                "tokens_per_second": len(texts[name]) / spent if equal else None,
            }
        )
    plain = rows[0]["tokens_per_second"]
    return [row | {"speedup": row["tokens_per_second"] / plain if row["equal"] else None} for row in rows]


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,16384,32768", help="tokens, comma by comma")
    parser.add_argument("--quick", action="store_true", help="one context of 4096 tokens")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    contexts = [4096] if given.quick else [int(context) for context in given.contexts.split(",")]
    model = synthetic(2 * max(contexts))
    report: dict[str, Any] = {"machine": machine(model, "synthetic"), "budget": BUDGET, "passes": [], "decoding": []}
    for context in contexts:
        ids = repeated(context)
        cache = rows_of(model, ids)
        for part, measure in (("passes", passes), ("decoding", decoding)):
            for row in measure(model, ids, cache):
                report[part].append(row)
                print(json.dumps(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
