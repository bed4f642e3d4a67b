"""What reading a long text costs, all of it, retrieved chunks, or a window; and what TriForce makes of that.

    python benchmarks/long_context.py [--contexts 8192,32768,65536] [--needles 8192,32768,65536] [--quick] [--json OUT]

Passes and bytes are those of Llama's shape with random weights and made-up rows: as quick as a trained model's, but it
says nothing. What a cache forgets, how often TriForce's levels agree and what that gains is measured on a small model
that is trained first, in about a minute, to find records in noise (``needle.py``). Output is compared with plain
decoding's, by the same kernels, before its speed is said. The JSON is written anew after each part; parts are left out
by ``--contexts ""`` or ``--lengths ""``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import needle
import numpy as np
import torch
from cost import held
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import specdec
from specdec import cpu, demo
from specdec.attach import attach
from specdec.bench.machine import machine
from specdec.cache import SlotCache
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import (
    LongSpecDrafter,
    MergedDrafter,
    NgramDrafter,
    RapidDrafter,
    SmallModelDrafter,
    TriForceDrafter,
)
from specdec.drafters.longspec_layer import LongSpecLayer
from specdec.drafters.middle import Middle, narrowed
from specdec.model import Form, Model
from specdec.policies import FixedPolicy, ThroughputPolicy
from specdec.streaming_cache import StreamingCache

NODES = (1, 8)
BUDGET, WINDOW = 2048, 508
CHUNKS = (8, 1)  # tokens that are retrieved together
NEW_TOKENS = 128
RECORDS = 64
SIZE = needle.SIZE


def synthetic(positions: int, layers: int = 4, heads: int = 8) -> Any:
    """Heads of 64 numbers with keys of their own; as is, 17 million weights, and 16 KiB of KV rows for each token."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64 * heads, intermediate_size=176 * heads, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=positions, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def fed(model: Any, ids: torch.Tensor, cache: Any, piece: int) -> Any:
    """A cache with the rows of a text, read in pieces."""
    with torch.no_grad():
        for part in ids.split(piece, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
    return cache


def read(model: Any, form: Form, ids: torch.Tensor, cache: DynamicCache) -> Model:
    """The model with rows of its own of a text but the last token, of which a cache has the beginning."""
    target = Model(model, form)

    def loop(module: Any, ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **more: Any):
        target.start(ids, generation_config, more)
        return ids

    model.generate(ids, past_key_values=cache, custom_generate=loop, max_new_tokens=NEW_TOKENS, do_sample=False)
    return target


def retrieved(full: Model, root: int, chunk: int = CHUNKS[0]) -> Middle:
    """The model over what it retrieves for a text's last token."""
    level = Middle(full, 0, BUDGET, chunk)
    level.refresh(root, anew=True)
    return level


def seconds(target: Model, nodes: int, repeats: int) -> float:
    """The median time of a pass over a chain, of which nothing is kept."""
    chain, times = DraftTree.chain(7, range(8, 7 + nodes), [1.0] * (nodes - 1), ""), list[float]()
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.forward([chain])
        times.append(time.perf_counter() - start)
        target.keep([[]])
    return statistics.median(times[1:])


def passes(model: Any, context: int, repeats: int = 5) -> list[dict[str, Any]]:
    """Seconds per pass and bytes held, for each cache of a made-up text."""
    full = held(model, attach(model, timed=False).form, context)
    start = time.perf_counter()
    level = retrieved(full, 7)
    build = time.perf_counter() - start
    window = narrowed(full, 0, SlotCache(layers=[]))
    window.cache = fed(model, torch.randint(3, 4096, (1, 1024)), StreamingCache(sinks=4, recent=WINDOW), 256)
    window.lengths = [1024]
    rows = list[dict[str, Any]]()
    for name, target in {"full": full, "retrieval": level.model, "streaming": window}.items():
        row: dict[str, Any] = {"context": context, "cache": name, "bytes": target.cache.bytes}
        row |= {f"seconds_{nodes}": seconds(target, nodes, repeats) for nodes in NODES}
        rows.append(row | ({"seconds_build": build} if name == "retrieval" else {}))
    return rows


def memory(model: Any, context: int) -> list[dict[str, Any]]:
    """Bytes that drafters hold for a text of their own after they have drafted, all of one small shape."""
    full, tokens = held(model, attach(model, timed=False).form, context), np.arange(context + 1) % 4000 + 3
    found = {"the target itself": full.cache.bytes, "retrieved rows": retrieved(full, 7).cache.bytes}
    drafters = {
        "n-grams": NgramDrafter(),
        "small model": SmallModelDrafter(model, cpu_kernels=False),
        "small model, window": SmallModelDrafter(model, window=WINDOW, cpu_kernels=False),
        "LongSpec": LongSpecDrafter(LongSpecLayer.of(model, WINDOW), cpu_kernels=False),
        "RAPID": RapidDrafter(model, words(model.config.vocab_size), budget=BUDGET, cpu_kernels=False),
    }
    for name, drafter in drafters.items():
        text = Context(tokens)
        if isinstance(drafter, LongSpecDrafter):
            drafter.bind(full, [text])
        drafter.draft([text], [Budget(4, 4, 1)])
        found[name] = getattr(drafter, "bytes_used", 0) or _rows(text)
    return [{"context": context, "drafter": name, "bytes": size} for name, size in found.items()]


def words(count: int) -> Any:
    """A tokenizer of a text whose words are the numbers of its tokens."""
    spelling = Tokenizer(WordLevel({str(i): i for i in range(count)}, unk_token="0"))
    spelling.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=spelling)


def _rows(text: Context) -> int:
    """Bytes of the rows that a drafter holds for a text."""
    (kept,) = (part for part in text.scratch.values() if not isinstance(part, np.ndarray))  # a shortened prompt
    return int(kept.bytes if hasattr(kept, "bytes") else kept.rows.cache.bytes)


def needles(model: Any, text: needle.Text, cache: DynamicCache, questions: int = 8) -> list[dict[str, Any]]:
    """How much of what is asked for each cache still knows, and of the record after that; given what came before.

    Rows are retrieved once, for the head that is asked for, in chunks; the window has read the text and forgotten most.
    """
    form, streaming = attach(model, timed=False).form, StreamingCache(sinks=4, recent=WINDOW)
    fed(model, torch.from_numpy(text.tokens)[None], streaming, 256)
    hits: dict[str, list[np.ndarray]] = defaultdict(list)
    for record in range(0, RECORDS, RECORDS // questions):
        ids, answer = text.asked(record), text.answer(record, 2 * SIZE)
        full = read(model, form, torch.from_numpy(ids)[None], deepcopy(cache))
        window = copy(full)
        window.cache = fed(model, torch.tensor([[needle.ASK]]), deepcopy(streaming), 1)
        parts = {f"retrieval {chunk}": retrieved(full, int(ids[-1]), chunk).model for chunk in CHUNKS}
        for name, target in ({"full": full} | parts | {"streaming": window}).items():
            hits[name].append(known(target, int(ids[-1]), answer) == answer)
    return [
        {
            "context": len(text.tokens),
            "cache": name,
            "questions": questions,
            "recall": float(np.mean([hit[:SIZE] for hit in each])),
            "recall_next": float(np.mean([hit[SIZE:] for hit in each])),
        }
        for name, each in hits.items()
    ]


def known(target: Model, root: int, answer: np.ndarray) -> np.ndarray:
    """What the model says at each token of an answer that it is shown."""
    chain = DraftTree.chain(root, answer[:-1].tolist(), [1.0] * (len(answer) - 1), "")
    logits = target.forward([chain]).logits[0, : len(answer)]
    target.keep([[]])
    said: np.ndarray = logits.argmax(-1).numpy()
    return said


def decoding(model: Any, text: needle.Text, cache: DynamicCache, repeats: int = 5) -> list[dict[str, Any]]:
    """Plain decoding and drafts from some questions on: the same tokens, and how long they took after the prompt."""
    triforce = partial(TriForceDrafter, NgramDrafter(), BUDGET)
    both = MergedDrafter([NgramDrafter(), triforce()])  # one for all answers, as it would be in use
    methods: dict[str, tuple[Any, Any]] = {
        "plain": (NgramDrafter, FixedPolicy(0, 0, 0)),
        "ngram": (NgramDrafter, FixedPolicy(8, 8, 2)),
        **{f"triforce {chunk}": (partial(triforce, chunk), FixedPolicy(6, 6, 1)) for chunk in CHUNKS},
        "both, by cost": (lambda: both, ThroughputPolicy(attach(model).costs)),
    }
    counts: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for record in range(repeats):
        ids = torch.from_numpy(text.asked(record))[None]
        for name, (drafter, policy) in methods.items():
            counts[name].append(counted(model, ids, deepcopy(cache), drafter(), policy))
        for each in counts.values():
            each[-1]["right"] = float(np.mean(each[-1]["text"] == text.answer(record, NEW_TOKENS)))
            each[-1]["equal"] = bool(np.array_equal(each[-1]["text"], counts["plain"][-1]["text"]))
    plain = sum(each["seconds"] for each in counts["plain"])
    return [{"context": len(text.tokens), "method": name, **summary(each, plain)} for name, each in counts.items()]


def counted(model: Any, ids: torch.Tensor, cache: DynamicCache, drafter: Any, policy: Any) -> dict[str, Any]:
    """One answer: its tokens, what was guessed, and the seconds after the prompt."""
    method = specdec.Speculate(drafter, policy, on_unsupported="error")
    method.trial = partial(attach, timed=False)
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(ids, past_key_values=cache, custom_generate=method, **asked)
    stats = output.stats
    spent = sum(taken for part, taken in stats.seconds.items() if part != "prefill")
    text = output.sequences[0, ids.shape[1] :].numpy()
    return {
        "text": text, "seconds": spent, "steps": stats.steps, "drafted": stats.drafted, "accepted": stats.accepted
    }  # fmt: skip


def summary(counts: list[dict[str, Any]], plain: float) -> dict[str, Any]:
    """Over all answers; a speed only where all are plain decoding's."""
    total = {name: sum(each[name] for each in counts) for name in ("steps", "drafted", "accepted", "seconds")}
    tokens, equal = sum(len(each["text"]) for each in counts), all(each["equal"] for each in counts)
    return {
        "answers": len(counts),
        "equal": equal,
        "right": statistics.mean(each["right"] for each in counts),
        "tokens_per_step": tokens / total["steps"],
        "accepted": total["accepted"] / max(1, total["drafted"]),
        "tokens_per_second": tokens / total["seconds"] if equal else None,
        "speedup": plain / total["seconds"] if equal else None,
    }


def searched(model: Any, context: int, report: dict[str, Any], note: Any) -> None:
    """All that is measured on a text with records."""
    text = needle.text(context, RECORDS, context)
    cache = fed(model, torch.from_numpy(text.tokens)[None], DynamicCache(config=model.config), 2048)
    for part, measure in (("needles", needles), ("decoding", decoding)):
        report[part] += measure(model, text, cache)
        note(part)


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768,65536", help="tokens of which passes are timed")
    parser.add_argument("--needles", default="8192,32768,65536", help="tokens in which records are looked for")
    parser.add_argument("--lengths", default="1024,4096,16384,32768", help="tokens behind which drafters are weighed")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--quick", action="store_true", help="4096 tokens for all")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    asked = ("4096",) * 3 if given.quick else (given.contexts, given.needles, given.lengths)
    contexts, depths, lengths = ([int(each) for each in tokens.split(",") if each] for tokens in asked)
    shape = synthetic(2 * max(contexts, default=1))
    report: dict[str, Any] = {"machine": machine(shape, "synthetic"), "budget": BUDGET, "window": WINDOW}
    report |= {part: [] for part in ("passes", "memory", "needles", "decoding")}
    note = partial(written, report, given.json)
    cpu.install(shape)
    for context in contexts:
        report["passes"] += passes(shape, context)
        note("passes")
    for context in lengths:
        report["memory"] += memory(synthetic(2 * max(lengths), 2, 1), context)
        note("memory")
    if depths:
        model, state = needle.trained(demo.cache_directory() / "benchmarks" / f"needle-{given.steps}", given.steps)
        report["trained"] = machine(model, "needle") | {"steps": given.steps, "loss": state.figures[-1]["loss"]}
        cpu.install(model)
    for context in depths:
        searched(model, context, report, note)


def written(report: dict[str, Any], path: Path | None, part: str) -> None:
    """Print a part's newest rows, and write all there is."""
    newest = report[part][-1]["context"]
    for row in report[part]:
        if row["context"] == newest:
            print(part, json.dumps(row), flush=True)
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
