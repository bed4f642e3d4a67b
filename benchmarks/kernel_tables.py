"""Write the tables of docs/kernels.md: bytes and rooflines from formulas, registers from compiling without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.compile_triton import TARGETS, Compiled, compiled  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
BANDWIDTH = {"H100 SXM": 3.35e12, "RTX 4090": 1.01e12}  # bytes per second, as their makers state them
SLICE = 4096  # tokens that one program of a kernel over the vocabulary looks at


@dataclass(frozen=True)
class Work:
    """A kernel at a size: bytes that any implementation must move, and bytes that ours moves."""

    kernel: str
    size: str
    must: int
    moves: int


def main() -> None:
    """Rewrite the page's tables; with ``--check`` exit with a message where they are not what would be written."""
    old = PAGE.read_text()
    new = replaced(replaced(old, "bytes", bytes_table()), "machine code", code_table())
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new)
    elif new != old:
        sys.exit(f"{PAGE}: its tables are not what the kernels say; run python benchmarks/kernel_tables.py")


def replaced(text: str, name: str, table: str) -> str:
    """The text with the table between its markers replaced. Raises ValueError where a marker is missing."""
    begin, end = f"<!-- {name}: written by benchmarks/kernel_tables.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def works() -> Iterator[Work]:
    """Typical sizes: one row and one layer of a Llama 3 8B in bfloat16 (32 heads, 8 of keys, 128 wide)."""
    for nodes, context in ((16, 4096), (64, 4096), (64, 32768)):
        yield tree_attention(nodes, context)
    heads, dim, moved = 8, 128, 4
    slots = moved * heads * dim * 2 * 2 * 2  # keys and values, read and written, 2 bytes
    yield Work("move_rows", f"{moved} displaced nodes, one layer", slots, slots + heads * 2 * 64 * 8)
    nodes, depth = 64, 8
    yield Work("ancestors", f"{nodes} nodes, depth {depth}", 16 * nodes, 16 * nodes)
    yield Work("walk", f"{nodes} nodes", 32 * nodes + 8, 32 * nodes + 8 + 8 * depth)
    vocab, k = 128_256, 8
    slices = -(-vocab // SLICE)
    entries = nodes * slices * k * 8  # written by the first launch and read by the second
    must = nodes * (vocab * 2 + k * 8)
    yield Work("topk", f"{nodes} rows of {vocab} bfloat16, k = {k}", must, must + 2 * entries + nodes * k * 4)
    must = vocab * 8 + k * 12
    yield Work("gumbel_topk", f"1 row of {vocab} float32, k = {k}", must, must + 2 * slices * k * 8)
    must = vocab * 8 + 12
    yield Work("sample_residual", f"1 row of {vocab} float32", must, must + slices * 16 + SLICE * 8)
    must = vocab * 16 + 13
    again = vocab * 8 + slices * 8 + slices * slices * 8
    yield Work("swor_step", f"1 row of {vocab} float32, rejected", must, must + again)


def tree_attention(nodes: int, context: int) -> Work:
    """Keys and values once, queries and results; ours also writes and reads each part in float32."""
    heads, kv_heads, dim, tile, processors = 32, 8, 128, 64, 132
    tiles = -(-heads // kv_heads * nodes // tile)
    splits = max(1, min(2 * processors // (tiles * kv_heads), -(-context // 256)))
    kept = 2 * kv_heads * dim * 2 * (context + nodes)
    queries = heads * nodes * dim * 2
    must = kept + 2 * queries + nodes * -(-nodes // 64) * 8
    parts = (splits + 1) * heads * nodes * (dim + 1) * 4
    moves = must + kept * (tiles - 1) + queries * splits + 2 * parts
    return Work("tree_attention", f"{nodes} nodes, context {context}, one layer", must, moves)


def bytes_table() -> str:
    """Bytes and the time that reading and writing the least of them takes at each device's full bandwidth."""
    lines = [_row(["kernel", "size", "bytes it must move", "bytes it moves", *BANDWIDTH]), "|---" * 6 + "|"]
    for work in works():
        times = [_microseconds(work.must / speed * 1e6) for speed in BANDWIDTH.values()]
        lines.append(_row([work.kernel, work.size, f"{work.must:,}", f"{work.moves:,}", *times]))
    return "\n".join(lines)


def _microseconds(time: float) -> str:
    return f"{time:.0f} us" if time >= 10 else f"{time:.1f} us" if time >= 0.1 else "< 0.1 us"


def code_table() -> str:
    """Registers per thread, bytes of shared memory and spills of every kernel on every target."""
    # Not at the top: the compiling process imports this file too, and must find Triton without its interpreter.
    from specdec.kernels import tree_attention_triton as attention
    from tests.kernel_cases import CASES

    lines = [_row(["kernel", "constants", *TARGETS]), "|---" * (2 + len(TARGETS)) + "|"]
    for name, case in CASES.items():
        sizes = ", ".join(f"{key} {value}" for key, value in case.constants.items() if value is not None)
        codes = [compiled(case.kernel, case.signature, case.constants, target, **case.options) for target in TARGETS]
        lines.append(_code_row(name, sizes, codes))
    for kernel in (attention.prefix_kernel, attention.tree_kernel):
        codes = [attention_code(kernel, target) for target in TARGETS]
        name = f"tree_attention: {kernel.fn.__name__.removesuffix('_kernel')}"
        lines.append(_code_row(name, "bfloat16, 128 wide, tiles of its tuning file", codes))
    return "\n".join(lines)


def attention_code(kernel: Any, target: str) -> Compiled:
    """A kernel of tree attention with the tiles that its tuning file has for the target."""
    from specdec.kernels.tree_attention_triton import tiles
    from tests.test_tree_attention_triton import signature

    rows, slots, warps, stages = tiles(target, 2, 128)
    constants = {"SOFTCAP": 0.0, "TILE": rows, "SLOTS": slots, "DIM": 128}
    return compiled(kernel, signature(kernel, "bf16"), constants, target, num_warps=warps, num_stages=stages)


def _code_row(name: str, sizes: str, codes: Sequence[Compiled]) -> str:
    return _row([name, sizes, *(f"{code.registers} / {code.shared} / {code.spills}" for code in codes)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
