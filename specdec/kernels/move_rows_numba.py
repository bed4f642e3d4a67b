"""Rows moved on the CPU, one by one in ascending order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from specdec.kernels.tile_numba import floats


def move_rows(keys: torch.Tensor, values: torch.Tensor, paths: torch.Tensor, base: torch.Tensor) -> None:
    """As ``specdec.kernels.move_rows``, for any type: what moves is bits."""
    _move_rows(_array(keys), _array(values), paths.numpy(), base.numpy())


def move_rows_of_all(buffers: Sequence[torch.Tensor], paths: torch.Tensor, base: torch.Tensor) -> None:
    """As ``specdec.kernels.move_rows_of_all``."""
    addresses = np.array([buffer.data_ptr() for buffer in buffers])
    _move_rows_of_all(addresses, tuple(buffers[0].shape), paths.numpy(), base.numpy())


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _move_rows_of_all(addresses: np.ndarray, shape: Any, paths: np.ndarray, base: np.ndarray) -> None:
    for address in addresses:
        slots = carray(floats(address), shape)
        _move_rows(slots, slots[:, :, :, :0], paths, base)


def _array(slots: torch.Tensor) -> np.ndarray:
    slots = slots.detach()
    return (slots.view(torch.int16) if slots.element_size() == 2 else slots).numpy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _move_rows(keys: np.ndarray, values: np.ndarray, paths: np.ndarray, base: np.ndarray) -> None:
    for row in range(len(paths)):
        for i in range(paths.shape[1]):
            source, target = base[row] + paths[row, i], base[row] + i
            if source > target:  # neither padding nor where it belongs already
                for head in range(keys.shape[1]):
                    for d in range(keys.shape[3]):
                        keys[row, head, target, d] = keys[row, head, source, d]
                    for e in range(values.shape[3]):
                        values[row, head, target, e] = values[row, head, source, e]
