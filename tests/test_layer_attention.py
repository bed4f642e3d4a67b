"""Attention of a whole layer's kernel: every division of heads and slots among threads reads the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.kernels import layer_numba, linear_numba

DIM, NONE = 16, np.empty(0, np.float32)


def seen(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, threads: int
) -> np.ndarray:
    """What ``after_cache`` adds to zeros, its output matrix being one and its MLP saying nothing: [rows, width]."""
    batch, heads, nodes, _ = q.shape
    width = heads * DIM
    x = np.zeros((batch * nodes, width), np.float32)
    zeros, y = np.zeros((1, width), np.float32), np.full_like(x, np.nan)
    hidden = np.empty((0, 0, 0), np.bool_) if mask is None else mask.numpy()
    linear_numba.use_threads(threads)
    layer_numba.after_cache(
        x, q.transpose(1, 2).reshape(batch * nodes, width).contiguous().numpy(), keys.numpy().reshape(-1),
        keys.stride()[:3], values.numpy().reshape(-1), values.stride()[:3], tuple(keys.shape), hidden, 0.3,
        np.eye(width, dtype=np.float32), NONE, np.ones(width, np.float32), 1e-5, zeros, zeros,
        np.zeros((width, 1), np.float32), NONE, NONE, NONE, y, threads,
    )  # fmt: skip
    return y


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("slots", [1, 70, 300, 2500])
def test_is_softmax_attention(slots: int, groups: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    q = torch.randn(2, 2 * groups, 4, DIM, generator=generator) * 3
    keys, values = (torch.randn(2, groups, slots, DIM, generator=generator) for _ in range(2))
    mask = torch.rand(2, 4, slots, generator=generator) < 0.7
    mask[0, :, : slots // 2] = False  # padding, and a part of which nothing is seen
    mask[..., -1] = True
    mask[1, 2] = False  # sees nothing, and gets nothing
    for hidden in (mask, None):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, None if hidden is None else hidden[:, None], scale=0.3, enable_gqa=True
        ).nan_to_num(0.0)
        ours = seen(q, keys, values, hidden, threads)
        np.testing.assert_allclose(ours, expected.transpose(1, 2).reshape(8, -1).numpy(), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("tasks", "slots", "threads", "parts"),
    [(3, 900, 2, 2), (4, 900, 2, 1), (3, 900, 8, 8), (3, 70, 8, 1), (1, 1, 2, 1)],
)
def test_parts_give_all_threads_as_much(tasks: int, slots: int, threads: int, parts: int) -> None:
    assert layer_numba._parts(tasks, slots, threads) == parts
