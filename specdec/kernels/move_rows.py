"""Accepted KV rows moved down to where the next pass expects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from specdec.kernels.dispatch import launching, resolve


def move_rows(
    keys: Float[Tensor, "rows heads slots d"],
    values: Float[Tensor, "rows heads slots e"],
    paths: Int[Tensor, "rows length"],
    base: Int[Tensor, " rows"],
    *,
    impl: Literal["auto", "reference", "numba", "triton"] = "auto",
) -> None:
    """Put the slot of each accepted node right behind the one before it: slot ``base + path[i]`` to ``base + i``.

    ``keys`` and ``values`` are changed in place, in those slots alone. A path's own slots may overlap: nodes ascend,
    so no slot is needed again once it has been written.

    Args:
        paths: int64, accepted nodes of each row in ascending order, hence ``paths[row, i] >= i``; -1 after the last.
        base: int64, slot of each row's node 0.

    Raises:
        ValueError: the batches differ, or an explicit ``impl`` cannot run on these tensors.
    """
    if not len(keys) == len(values) == len(paths) == len(base):
        raise ValueError(f"keys, values, paths, base have {len(keys)}, {len(values)}, {len(paths)}, {len(base)} rows")
    chosen = resolve(impl, keys, cpu="numba")
    if chosen == "triton":
        from specdec.kernels import move_rows_triton

        with launching(keys):
            move_rows_triton.move_rows(keys, values, paths, base)
    elif chosen == "numba":
        from specdec.kernels import move_rows_numba

        move_rows_numba.move_rows(keys, values, paths, base)
    else:
        _reference(keys, values, paths, base)


def move_rows_of_all(
    buffers: Sequence[Float[Tensor, "rows heads slots d"]],
    paths: Int[Tensor, "moved length"],
    base: Int[Tensor, " moved"],
) -> None:
    """``move_rows`` in the first rows of many contiguous float32 buffers on the CPU, all of one shape, in one call."""
    from specdec.kernels import move_rows_numba

    move_rows_numba.move_rows_of_all(buffers, paths, base)


def _reference(keys: Tensor, values: Tensor, paths: Tensor, base: Tensor) -> None:
    for row, first in enumerate(base.tolist()):
        path = paths[row][paths[row] >= 0]
        for slots in (keys[row], values[row]):
            slots[:, first : first + len(path)] = slots[:, first + path]
