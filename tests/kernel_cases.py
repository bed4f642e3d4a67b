"""Every Triton kernel at a typical size, as arguments of ``compiled``: what tests compile and the docs list."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec.kernels import (
    ancestors_triton,
    gumbel_triton,
    move_rows_triton,
    residual_triton,
    topk_triton,
    walk_triton,
)


@dataclass(frozen=True)
class Case:
    """A kernel, the types of its arguments in order, its constants and its options.

    Attributes:
        types: "*fp16", "i32" and so on, for the arguments that are no constants.
    """

    kernel: Any
    types: str
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    @property
    def signature(self) -> dict[str, str]:
        """Type by argument."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return dict(zip(names, self.types.split(), strict=True))


_SLICES = {"SLICES": 32, "BLOCK": 4096}  # of 128k tokens
_WIDE = {"num_warps": 8}
CASES = {
    "move_rows": Case(
        move_rows_triton.move_rows_kernel,
        "*bf16 *bf16 *i64 *i64" + " i32" * 8,
        {"D": 128, "E": 128, "BLOCK_D": 128, "BLOCK_E": 128, "CHUNK": 16},
    ),
    "ancestors": Case(ancestors_triton.ancestors_kernel, "*i64 *i64 i32 i32", {"WORDS": 1, "BLOCK": 64}),
    "walk": Case(walk_triton.walk_kernel, "*i64 *i64 *i64 *i64 *i64 i32", {"BLOCK": 64}),
    "topk: slices": Case(topk_triton.slices_kernel, "*bf16 *i64 i32 i32", {"K": 8, "BLOCK": 4096}, _WIDE),
    "topk: merge": Case(topk_triton.merge_kernel, "*i64 *i64 *fp32 i32", {"K": 8, "BLOCK": 256}),
    "gumbel: slices": Case(
        gumbel_triton.perturbed_slices_kernel, "*fp32 *fp32 *i64 i32 i32 i32", {"K": 8, "BLOCK": 4096}, _WIDE
    ),
    "residual: sums": Case(
        residual_triton.sums_kernel,
        "*fp32 *fp32 *fp32 i32",
        {"tokens": None, "uniform": None, "accepted": None, "STEP": False, "BLOCK": 4096},
        _WIDE,
    ),
    "residual: draw": Case(residual_triton.draw_kernel, "*fp32 *fp32 *fp32 *fp32 *i64 i32 i32 i32", _SLICES, _WIDE),
    "swor_step: sums": Case(
        residual_triton.sums_kernel, "*fp32 *fp32 *i64 *fp32 *fp32 *i1 i32", {"STEP": True, "BLOCK": 4096}, _WIDE
    ),
    "swor_step: step": Case(residual_triton.step_kernel, "*fp32 *fp32 *i64 *fp32 *i1 i32 i32 i32", _SLICES, _WIDE),
}
