"""What a pass of a model costs on this CPU, beside what reading its weights alone would take: ``make bench-cost``.

    python benchmarks/cost.py [--model PATH] [--quick] [--processes N] [--json OUT]

T(N) is the time of one pass over a tree of N tokens behind a text, as specdec runs it; "plain" with the model's own
layers, "ours" with our CPU kernels in it. They take turns with sums over the weights, which lie in one piece, and of
all the median counts: where memory lies, and what disturbs a machine, touches all alike. Products are of single weights
that no cache holds, in microseconds: torch's, oneDNN's with weights packed beforehand, and ours. The JSON's "seconds"
(ours, behind 1024 tokens) is what ``specdec replay --cost`` reads. Processes differ more than rounds do, in how quickly
they read above all: with ``--processes`` what goals are for is measured in so many of their own first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModelForCausalLM

from specdec import attach, cpu, demo
from specdec.bench.machine import machine
from specdec.core import DraftTree
from specdec.kernels import linear_numba
from specdec.kernels.linear import linear
from specdec.model import Model

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (128, 256, 1024, 4096)
REPLAYED = 1024  # the context of "seconds"
GOALS = (1, 4, 8, 16), (256,)  # nodes and context that goals are for
QUICK, OFTEN = 16, 5  # in each round passes over so few nodes follow each other so often, as in a generation
COLD = 96 << 20  # bytes of weights that a product walks through, so that no cache holds them


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a directory or hub id")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, each timed three times")
    parser.add_argument("--processes", type=int, default=0, help="in how many of their own to measure goals first")
    parser.add_argument("--goals", action="store_true", help="passes that goals are for alone, and in this process")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    others = [in_a_process(given.model) for _ in range(given.processes)]
    report = measured(given.model, given.quick, given.goals) | {"processes": others}
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


def in_a_process(name: str) -> dict[str, Any]:
    """What goals are for, measured by another process."""
    with TemporaryDirectory() as folder:
        written = Path(folder) / "goals.json"
        command = [sys.executable, __file__, "--goals", "--model", name, "--json", str(written)]
        subprocess.run(command, check=True)
        report = json.loads(written.read_text())
    return {key: report[key] for key in ("bandwidth", "limit", "passes")}


def measured(name: str, quick: bool, goals: bool) -> dict[str, Any]:
    """All figures of a model, or of fewer sizes, or of passes that goals are for alone."""
    model = AutoModelForCausalLM.from_pretrained(demo.resolve(name), dtype=torch.float32).eval()
    repeats = 3 if quick else 7
    nodes, contexts = GOALS if goals else (NODES[:5], (128, REPLAYED)) if quick else (NODES, CONTEXTS)
    flat, weights = in_one_piece(model), weight_bytes(model)
    reads, rows = passes(model, flat, contexts, nodes, repeats)
    read = flat.nbytes / statistics.median(reads)
    print(f"{weights / 1e6:.0f} MB of weights at {read / 1e9:.1f} GB/s: {1e3 * weights / read:.1f} ms")
    shapes = dict.fromkeys(tuple(layer.weight.shape) for layer in model.modules() if type(layer) is nn.Linear)
    return {
        "seconds": {str(row["nodes"]): row["ours"] for row in rows if row["context"] == REPLAYED},
        "machine": machine(model, name),
        "repeats": repeats,
        "bandwidth": read,
        "best_bandwidth": flat.nbytes / min(reads),
        "weight_bytes": weights,
        "limit": weights / read,
        "passes": [shown(row, f" ({weights / read / row['ours']:.0%} of that is the limit)") for row in rows],
        "products": [] if goals else [shown(row) for shape in shapes for row in products(shape, nodes, repeats)],
    }


def shown(row: dict[str, Any], more: str = "") -> dict[str, Any]:
    """The row itself, once it is printed; its seconds in milliseconds."""
    cells = (f"{key} {value if isinstance(value, int) else f'{1e3 * value:.3f}'}" for key, value in row.items())
    print(" ".join(cells) + more, flush=True)
    return row


@njit(parallel=True, fastmath={"reassoc", "nsz", "contract"})
def summed(numbers: Any, threads: int) -> Any:
    """The sum of float32 ``numbers``; each thread walks down its own part in four streams."""
    sums = np.zeros(threads, np.float32)
    for t in prange(threads):
        first, quarter = len(numbers) * t // threads, len(numbers) // threads // 4
        total = np.float32(0)
        for i in range(first, first + quarter):
            total += numbers[i] + numbers[i + quarter] + numbers[i + 2 * quarter] + numbers[i + 3 * quarter]
        sums[t] = total
    return sums.sum()


def sums(numbers: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Two ways in which torch's threads read ``numbers`` together: torch's own and numba's."""
    threads = torch.get_num_threads()
    linear_numba.use_threads(threads)
    return {"torch": numbers.sum, "numba": partial(summed, numbers.numpy(), threads)}


def in_one_piece(model: Any) -> torch.Tensor:
    """Move a model's parameters into one tensor, which they are views of from then on."""
    flat = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(flat, model.parameters())
    return flat


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a pass must read: of all parameters, but of a table of embeddings only what is tied."""
    read = sum(parameter.nbytes for parameter in model.parameters())
    tables = [layer.weight for layer in model.modules() if type(layer) is nn.Embedding]
    tied = {id(layer.weight) for layer in model.modules() if type(layer) is nn.Linear}
    return read - sum(table.nbytes for table in tables if id(table) not in tied)


def passes(
    model: Any, flat: torch.Tensor, contexts: Sequence[int], nodes: Sequence[int], repeats: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds of sums over ``flat``, and for each context and tree size of a pass with the model's layers and ours.

    All in rounds, the first of which does not count. The sums are those of the quicker way.
    """
    forms = {"plain": attach.attach(model).form}
    if reason := cpu.install(model):
        print(reason)
    forms["ours"] = attach.attach(model).form
    forwards = {layer: layer.forward for layer in model.modules() if "forward" in vars(layer)}
    cpu.remove(model)
    holds = {(context, kind): held(model, form, context) for context in contexts for kind, form in forms.items()}
    ways, calls = sums(flat), {}
    for n in nodes:
        for (context, kind), hold in holds.items():
            calls[context, n, kind] = partial(pass_time, hold, n, forwards if kind == "ours" else {})
        calls |= {(way, n): partial(timed, call) for way, call in ways.items()}
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for counts in [False] + repeats * [True]:
        for key, call in calls.items():
            taken = [call() for _ in range(OFTEN if key[1] <= QUICK else 1)]
            times[key] += taken if counts else []
    reads = min(([seconds for n in nodes for seconds in times[way, n]] for way in ways), key=statistics.median)
    rows = [
        {"context": context, "nodes": n} | {kind: statistics.median(times[context, n, kind]) for kind in forms}
        for context, n in itertools.product(contexts, nodes)
    ]
    return reads, rows


def held(model: Any, form: Any, context: int) -> Model:
    """The model behind a made-up text of some length."""

    def begin(module: Any, input_ids: Any, generation_config: Any, **others: Any) -> Model:
        hold = Model(module, form)
        del others["logits_processor"], others["stopping_criteria"]
        hold.start(input_ids, generation_config, others)
        return hold

    prompt = torch.ones(1, 8, dtype=torch.int64)
    hold: Model = model.generate(prompt, max_new_tokens=8, do_sample=False, custom_generate=begin)
    for layer in hold.cache.slots:
        shape = (*layer.keys.shape[:2], context, layer.keys.shape[3])
        layer.adopt(torch.randn(shape), torch.randn(shape), context)
    hold.lengths = [context]
    return hold


def pass_time(hold: Model, nodes: int, forwards: dict[nn.Module, Any]) -> float:
    """Seconds of a pass over a tree, with other ``forward``s in some layers; model and text are left as they were."""
    tree = DraftTree(np.ones(nodes, np.int64), (np.arange(nodes) - 1) // 2, np.ones(nodes, np.float32), ("",) * nodes)
    for layer, forward in forwards.items():
        vars(layer)["forward"] = forward  # as cpu.install does, which measures anew each time
    seconds = timed(partial(hold.forward, [tree]))
    for layer in forwards:
        del layer.forward
    hold.keep([[]])
    return seconds


@torch.no_grad()
def products(shape: tuple[int, int], rows: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """One record per number of rows: seconds of one product with a weight of that shape."""
    weights = [torch.randn(shape) for _ in range(-(-COLD // (4 * shape[0] * shape[1])))]
    for n in rows:
        x = torch.randn(n, shape[1])
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, n) for weight in weights]
        calls: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
            "torch": (partial(functional.linear, x), weights),
            "prepacked": (
                lambda weight, x=x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
                packed,
            ),
            "ours": (partial(linear, x, impl="numba"), weights),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats + 1):
            for name, (call, operands) in calls.items():
                times[name].append(timed(lambda call=call, operands=operands: [call(each) for each in operands]))
        taken = {name: statistics.median(each[1:]) / len(weights) for name, each in times.items()}
        yield {"outputs": shape[0], "inputs": shape[1], "rows": n, **taken}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
