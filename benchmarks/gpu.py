"""What ``make gpu`` runs: the tests that need a GPU, then times of kernels and of whole steps. Not yet run on one.

Needs neither a network nor a set-up of its own, and ends within 8 minutes. Figures are refused where a test fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUT = ROOT / "benchmarks" / "results" / "gpu"
TESTS = (
    "test_kernels_*.py",
    "test_topk.py",
    "test_tree_attention*.py",
    "test_shared_prefix_triton.py",
    "test_graph*.py",
)
VOCAB, NODES, K = 128_256, 64, 8
SIZES = (0, 1, 3, 7, 15, 31, 63)  # guessed nodes, which fill recorded passes with their roots
TOKENS = 128


def main() -> None:
    """Test, measure, print, and leave the figures in ``benchmarks/results/gpu``."""
    if not torch.cuda.is_available():
        print("make gpu: no CUDA device here, nothing was run")
        return
    files = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *files], cwd=ROOT, check=True, timeout=240)
    torch.set_default_device("cuda")
    figures = list(kernels())
    torch.set_default_device("cpu")
    report = {"machine": machine(), "kernels": figures, "steps": steps()}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{report['machine']['device'].replace(' ', '-')}.json").write_text(json.dumps(report, indent=1))


def machine() -> dict[str, str]:
    """What the figures hold for."""
    import transformers
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    return {"device": torch.cuda.get_device_name(), **versions}


def kernels() -> Iterator[dict[str, Any]]:
    """Median microseconds of each kernel and its reference, the cache flushed before every run."""
    from triton.testing import do_bench

    from benchmarks.kernel_tables import works

    sizes = {(work.kernel, work.size): work for work in works()}
    for (name, size), run in zip(sizes, calls(), strict=True):
        triton, reference = (1e3 * do_bench(lambda impl=impl, run=run: run(impl), return_mode="median")
                             for impl in ("triton", "reference"))  # fmt: skip
        work = sizes[name, size]
        speed = work.must / triton * 1e6
        print(f"{name:16} {size:42} {triton:9.1f} us, {speed / 1e9:7.0f} GB/s; reference {reference:9.1f} us")
        yield {"kernel": name, "size": size, "us": triton, "reference_us": reference, "bytes_per_second": speed}


def calls() -> Iterator[Callable[[Any], Any]]:
    """Each kernel at the sizes of ``kernel_tables.works``, in its order, as a function of ``impl``."""
    from specdec.kernels.ancestors import ancestors
    from specdec.kernels.gumbel import gumbel_topk
    from specdec.kernels.move_rows import move_rows
    from specdec.kernels.residual import sample_residual, swor_step
    from specdec.kernels.topk import topk
    from specdec.kernels.tree_attention import tree_attention
    from specdec.kernels.walk import walk

    torch.manual_seed(0)
    for nodes, context in ((16, 4096), (64, 4096), (64, 32768)):
        q = torch.randn(1, 32, nodes, 128, dtype=torch.bfloat16)
        k, v = torch.randn(2, 1, 8, context + nodes, 128, dtype=torch.bfloat16)
        seen, length = ancestors(shallow(nodes)), torch.tensor([context])
        yield lambda impl, a=(q, k, v, seen, length): tree_attention(*a, 128**-0.5, impl=impl)
    base, path = torch.tensor([4096]), torch.tensor([[0, 2, 5, 11, 23]])
    yield lambda impl: move_rows(k, v, path, base, impl=impl)
    parents, tokens = shallow(NODES), torch.randint(VOCAB, (1, NODES))
    choices = tokens.roll(-1)
    yield lambda impl: ancestors(parents, impl=impl)
    yield lambda impl: walk(tokens, parents, choices, impl=impl)
    logits = torch.randn(NODES, VOCAB, dtype=torch.bfloat16)
    yield lambda impl: topk(logits, K, impl=impl)
    row, noise = torch.randn(1, VOCAB), torch.empty(1, VOCAB).exponential_()
    yield lambda impl: gumbel_topk(row, noise, K, impl=impl)
    p, q = torch.randn(2, 1, VOCAB).softmax(-1)
    uniform, last = torch.tensor([0.5]), torch.tensor([VOCAB - 1])
    yield lambda impl: sample_residual(p, q, uniform, impl=impl)
    p_x, q_x = torch.zeros_like(p), torch.ones_like(q)  # always rejected, and left so
    yield lambda impl: swor_step(p_x, q_x, last, uniform, impl=impl)


def shallow(nodes: int) -> torch.Tensor:
    """Parents of a tree in which every node has two children."""
    return ((torch.arange(nodes) + 1) // 2 - 1)[None]


def steps() -> list[dict[str, Any]]:
    """Milliseconds of a whole step by tree size, as a graph and without, of a random Llama of 1.2B parameters."""
    import specdec
    from specdec.policies import FixedPolicy

    model, ids = target()
    plain, plain_ms = decoded(model, ids)
    print(f"plain generate: {plain_ms:6.2f} ms a token")
    rows = [{"method": "plain", "nodes": 0, "ms_per_step": plain_ms}]
    for method in ("ordinary", "graph"):
        specdec.wrap(model, Full(), policy := FixedPolicy(0))
        graphs = model.generate.speculate.attach(model)[0].graphs
        graphs.enabled = method == "graph"
        for nodes in SIZES:
            policy.fixed = FixedPolicy(nodes, 8, 2).fixed
            start = perf_counter()
            timed(model, ids, 4)  # compiles and records
            first = perf_counter() - start
            specdec.stats(model).reset()
            tokens, ms = decoded(model, ids)
            ms *= (TOKENS - 1) / (specdec.stats(model).steps - 2)  # two prompts
            same = torch.equal(tokens, plain)
            recorded = method == "graph" and graphs.enabled
            rows.append({"method": method, "nodes": nodes, "ms_per_step": ms, "first_seconds": first,
                         "recorded": recorded, "same_tokens": same})  # fmt: skip
            print(f"{method:8} {nodes:3} nodes: {ms:6.2f} ms a step, {first:5.2f} s the first time, "
                  f"tokens {'equal' if same else 'differ'}")  # fmt: skip
        for reason in specdec.stats(model).reasons:
            print(f"{method}: {reason}")
        specdec.unwrap(model)
    return rows


def target() -> tuple[Any, torch.Tensor]:
    """A random model in bfloat16, and a prompt of 2048 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval(), torch.randint(VOCAB, (1, 2048))


class Full:
    """Drafts as many nodes as it may, two children each: what trees cost, whatever they are worth."""

    name, topk, hidden = "full", 0, False

    def draft(self, contexts: Any, budgets: Any) -> list[Any]:
        """One tree per context, as large as its budget."""
        from specdec.core import DraftTree

        trees = []
        for context, budget in zip(contexts, budgets, strict=True):
            nodes = min(1 + budget.nodes, 2 ** (budget.depth + 1) - 1)
            tokens = np.arange(nodes) + int(context.tokens[-1])
            parents = shallow(nodes)[0].cpu().numpy()
            tokens[1:] %= VOCAB
            trees.append(DraftTree(tokens, parents, np.ones(nodes, np.float32), ("", *["full"] * (nodes - 1))))
        return trees


def decoded(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """``TOKENS`` tokens, and the milliseconds that each after the first took."""
    _, first = timed(model, ids, 1)
    tokens, seconds = timed(model, ids, TOKENS)
    return tokens, 1e3 * (seconds - first) / (TOKENS - 1)


def timed(model: Any, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """What greedy ``generate`` returns, and its seconds."""
    torch.cuda.synchronize()
    start = perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    torch.cuda.synchronize()
    return out, perf_counter() - start


if __name__ == "__main__":
    main()
