"""What rows that begin alike cost when their beginning is held and read once, and when each row has its own.

    python benchmarks/shared_prefix.py [--prefix 2048] [--rows 1,4,16] [--json OUT]

The model has SmolLM2-135M's layers, a third as many, with random weights: passes take as long as a trained one's. Both
ways' logits are compared before any figure is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import cpu
from specdec.attach import attach
from specdec.bench.machine import machine
from specdec.core import Context, DraftTree
from specdec.model import Model
from specdec.shared_prefix import share, spread

NODES = (1, 8)
TOLERANCE = 1e-4  # of the logits' spread


def synthetic(positions: int) -> Any:
    """10 layers of 9 heads with 3 of keys."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=positions, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def read(model: Any, ids: torch.Tensor) -> Model:
    """The model with the rows of a text."""
    target = Model(model, attach(model, timed=False).form)

    def loop(module: Any, ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **more: Any):
        target.start(ids, generation_config, more)
        return ids

    model.generate(ids, custom_generate=loop, max_new_tokens=32, do_sample=False)
    return target


def several(one: Model, text: torch.Tensor, rows: int, shared: bool) -> Model:
    """A Model of one row as one of several that are copies of it, held once or each for itself."""
    target, contexts = copy(one), [Context(text[0].numpy()) for _ in range(rows)]
    target.cache = deepcopy(one.cache)
    spread(torch.zeros(1, 1, 1), target.cache, rows)
    target.lengths = one.lengths * rows
    target.visible = None
    if shared and share(target, contexts, [0] * rows) != text.shape[1]:
        sys.exit("nothing was shared")
    return target


def passes(target: Model, rows: int, nodes: int, repeats: int) -> tuple[float, torch.Tensor]:
    """The median seconds of a pass over chains, of which nothing is kept, and what it says."""
    chains, times = [DraftTree.chain(7 + row, range(8, 7 + nodes), [1.0] * (nodes - 1), "") for row in range(rows)], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        logits = target.forward(chains).logits
        times.append(time.perf_counter() - start)
        target.keep([[]] * rows)
    return statistics.median(times[1:]), logits


def measured(one: Model, text: torch.Tensor, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Bytes and seconds of a pass, apart and shared."""
    found, said = list[dict[str, Any]](), list[list[torch.Tensor]]()
    for shared in (False, True) if rows > 1 else (False,):
        target, row, logits = several(one, text, rows, shared), {"rows": rows, "shared": shared}, []
        for nodes in NODES:
            row[f"seconds_{nodes}"], after = passes(target, rows, nodes, repeats)
            logits.append(after)
        found.append(row | {"bytes": target.cache.bytes})
        said.append(logits)
    for apart, together in zip(said[0], said[-1], strict=True):
        if float((apart - together).abs().max()) > TOLERANCE * float(apart.abs().max()):
            sys.exit(f"{rows} rows: logits differ by {float((apart - together).abs().max())}")
    return found


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", type=int, default=2048, help="tokens")
    parser.add_argument("--rows", default="1,4,16", help="numbers of rows, comma by comma")
    parser.add_argument("--repeats", type=int, default=5, help="passes timed of each kind")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    model = synthetic(2 * given.prefix)
    cpu.install(model)
    text = torch.randint(3, 4096, (1, given.prefix), generator=torch.Generator().manual_seed(0))
    one = read(model, text)
    report: dict[str, Any] = {"machine": machine(model, "synthetic"), "prefix": given.prefix, "shared_prefix": []}
    for rows in map(int, given.rows.split(",")):
        for row in measured(one, text, rows, given.repeats):
            report["shared_prefix"].append(row)
            print(json.dumps(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
