"""All decoder layers of the Llama shape for few rows on the CPU, in one call.

Going from one layer to the next in Python takes about 100 us: of a small model's layer, a quarter of its time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from specdec.kernels.layer_numba import after_cache, before_cache, normed
from specdec.kernels.tile_numba import floats


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def stack(
    x: Any, weights: Any, biases: Any, norms: Any, eps: float, cos: Any, sin: Any, slots: Any, strides: Any,
    shape: Any, starts: Any, mask: Any, scale: float, heads: int, inner: int, last: Any, threads: int,
) -> Any:  # fmt: skip
    """What the last layer says of ``x`` [batch * nodes, width]; writes keys and values to the slots of all layers.

    Args:
        weights: addresses [layers, 7] of those of queries, keys, values, output, gate, up and down.
        biases: addresses [layers, 7] of theirs; 0 for none.
        norms: addresses [layers, 4] of the weights of the norms before attention and before the gate, and of each
            query's and each key's head; 0 for none.
        cos, sin: see ``before_cache``.
        slots: addresses [layers, 2] of the first key and the first value.
        strides, shape, mask, scale: see ``after_cache``.
        starts: the slot of each batch row's first node.
        inner: outputs of the gate.
        last: weight of a norm behind the last layer; of length 0 for none.
    """
    (rows, width), groups, dim = x.shape, shape[1], shape[3]
    q = np.empty((rows, heads * dim), np.float32)
    k, v = np.empty((rows, groups * dim), np.float32), np.empty((rows, groups * dim), np.float32)
    held = len(starts) * strides[0]
    for layer in range(len(weights)):
        w, b, norm = weights[layer], biases[layer], norms[layer]
        before_cache(
            x, _vector(norm[0], width), eps, _matrix(w[0], heads * dim, width), _matrix(w[1], groups * dim, width),
            _matrix(w[2], groups * dim, width), _vector(b[0], heads * dim), _vector(b[1], groups * dim),
            _vector(b[2], groups * dim), _vector(norm[2], dim), _vector(norm[3], dim), cos, sin, q, k, v, dim, threads,
        )  # fmt: skip
        keys, values = _vector(slots[layer, 0], held), _vector(slots[layer, 1], held)
        _write(keys, k, strides, starts, groups, dim)
        _write(values, v, strides, starts, groups, dim)
        y = np.empty_like(x)
        after_cache(
            x, q, keys, strides, values, strides, shape, mask, scale, _matrix(w[3], width, heads * dim),
            _vector(b[3], width), _vector(norm[1], width), eps, _matrix(w[4], inner, width),
            _matrix(w[5], inner, width), _matrix(w[6], width, inner), _vector(b[4], inner), _vector(b[5], inner),
            _vector(b[6], width), y, threads,
        )  # fmt: skip
        x = y
    return normed(x, last, eps) if len(last) else x


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write(slots: Any, states: Any, strides: Any, starts: Any, groups: int, dim: int) -> None:
    """Put the nodes' keys, or values, [rows, groups * dim], behind what each batch row holds."""
    nodes = len(states) // len(starts)
    for b in range(len(starts)):
        for group in range(groups):
            first = b * strides[0] + group * strides[1] + starts[b] * strides[2]
            for n in range(nodes):
                at = first + n * strides[2]
                slots[at : at + dim] = states[b * nodes + n, group * dim : (group + 1) * dim]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _matrix(address: int, rows: int, columns: int) -> Any:
    return carray(floats(address), (rows, columns))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _vector(address: int, length: int) -> Any:
    """The numbers at an address; none at 0."""
    return carray(floats(address), (length if address else 0,))
