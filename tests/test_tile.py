"""The innermost loops of the CPU kernels against numpy: every size, awkward lengths, strides, and what lies beside."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
from llvmlite import binding, ir
from numba import njit

from specdec.kernels import tile_numba
from specdec.kernels.layer_numba import exp
from specdec.kernels.linear_numba import LONGEST, product, room
from specdec.kernels.tile_numba import LANES, LINE, MIXES, SIZES, mix, tile

LENGTHS = (0, 1, LANES - 1, LANES, LANES + 1, 63, 64, 65)


@njit
def _tile(outputs, rows, lines, w, x, y, inputs, more=0, tiles=1):
    at = w.ctypes.data, x.ctypes.data, y.ctypes.data
    strides = w.shape[1], x.shape[1], y.shape[1]
    tile(outputs, rows, lines, at[0], strides[0], at[1], strides[1], at[2], strides[2], inputs, more, at[0], tiles)


@njit
def _mix(vectors, rows, p, v, y, terms):
    at = p.ctypes.data, v.ctypes.data, y.ctypes.data
    mix(vectors, rows, at[0], p.shape[1], at[1], v.shape[1], at[2], y.shape[1], terms)


@njit
def _product(w, x, y, rows, inputs, outputs):
    at = w.ctypes.data, x.ctypes.data, y.ctypes.data
    product(at[0], w.shape[1], at[1], x.shape[1], at[2], y.shape[1], rows, inputs, outputs)


@njit
def _exp(x):
    y = np.empty_like(x)
    for i in range(len(x)):
        y[i] = exp(x[i])
    return y


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _within(whole: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A matrix between NaN, which a read beyond it would bring along."""
    whole[rows:] = np.nan
    whole[:, columns:] = np.nan
    return whole


def _is_only(y: np.ndarray, expected: np.ndarray) -> None:
    """``expected`` stands in the corner of ``y``, and nothing was written beside it."""
    rows, columns = expected.shape
    np.testing.assert_allclose(y[:rows, :columns], expected, rtol=1e-5, atol=1e-4)
    assert np.isnan(y[rows:]).all()
    assert np.isnan(y[:, columns:]).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_tile_of_every_size(length: int) -> None:
    for outputs, rows, lines in SIZES:
        w, x = _within(_random(6, length + 3), outputs, length), _within(_random(7, length + 5), rows, length)
        y = np.full((8, 9), np.nan, np.float32)
        _tile(outputs, rows, lines, w, x, y, length)
        _is_only(y, x[:rows, :length] @ w[:outputs, :length].T)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("more", [0, 1])
def test_tiles_of_further_outputs_which_add_to_what_is_there(length: int, more: int) -> None:
    for outputs, rows, lines in SIZES:
        for tiles in (0, 1, 3):
            w, x, before = _random(14, length), _random(7, length), _random(rows, tiles * outputs)
            y = np.full((8, 14), np.nan, np.float32)
            y[:rows, : tiles * outputs] = before
            _tile(outputs, rows, lines, w, x, y, length, more, tiles)
            _is_only(y, more * before + x[:rows] @ w[: tiles * outputs].T)


@pytest.mark.skipif(not binding.get_host_cpu_features().get("fma"), reason="this machine has no fused multiply-add")
def test_a_tile_multiplies_and_adds_in_one_rounding() -> None:
    root = 1 + 2.0**-12  # its square is 1 + 2^-11 + 2^-24, of which a rounded product keeps no 2^-24
    for outputs, rows, lines in SIZES:
        w, x, y = np.zeros((6, 2 * LANES), np.float32), np.zeros((7, 2 * LANES), np.float32), _random(8, 9)
        w[:, 0], x[:, 0], w[:, LANES], x[:, LANES] = -1 - 2.0**-11, 1, root, root
        _tile(outputs, rows, lines, w, x, y, 2 * LANES)
        assert (y[:rows, :outputs] == 2.0**-24).all()


def test_a_tile_of_another_size_does_nothing() -> None:
    y = np.full((8, 9), np.nan, np.float32)
    _tile(3, 1, 1, _random(6, 8), _random(7, 8), y, 8)
    assert np.isnan(y).all()


@pytest.mark.parametrize("terms", LENGTHS)
def test_a_mix_of_every_size(terms: int) -> None:
    for vectors, rows in MIXES:
        columns = vectors * LANES
        p, v = _within(_random(6, terms + 3), rows, terms), _within(_random(terms + 2, columns + 5), terms, columns)
        y = np.full((8, columns + 7), np.nan, np.float32)
        _mix(vectors, rows, p, v, y, terms)
        _is_only(y, p[:rows, :terms] @ v[:terms, :columns])


@pytest.mark.parametrize("rows", [*range(34), 64, 129, 200])
def test_a_product_of_any_rows(rows: int) -> None:
    for outputs, inputs in ((1, 5), (3, LANES), (4, 65), (6, 37), (9, 128), (5, LONGEST + 1), (4, 2 * LONGEST + 37)):
        w, x = _within(_random(outputs + 1, inputs + 3), outputs, inputs), _random(rows + 1, inputs + 2)
        y = np.full((rows + 2, outputs + 3), np.nan, np.float32)
        _product(w, _within(x, rows, inputs), y, rows, inputs, outputs)
        _is_only(y, x[:rows, :inputs] @ w[:outputs, :inputs].T)


@pytest.mark.parametrize(
    ("cpu", "features"), [("znver4", {"avx512f": True}), ("znver3", {"avx2": True}), ("haswell", {"avx2": True})]
)
def test_sums_stay_in_registers(cpu: str, features: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for processors that this may not be one of: no tile keeps a vector on the stack."""
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    spec = importlib.util.spec_from_file_location("tile_of_another_processor", tile_numba.__file__)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu=cpu, opt=3)
    made = {}
    for build, sizes in ((other._tile, other.SIZES), (other._mix, other.MIXES)):
        for size in sizes:
            module = ir.Module()
            build(module, *size).linkage = "external"
            module.triple = target.triple
            made[build.__name__, size] = target.emit_assembly(binding.parse_assembly(str(module)))
    assert all("vfmadd" in code for code in made.values())
    assert [each for each, code in made.items() if re.search(r"[xyz]mm\d+, -?\d*\(%rsp\)", code)] == []


def test_room_begins_where_a_line_of_memory_does() -> None:
    held = [room(rows, columns) for columns in range(40) for rows in (0, 1, 3)]
    assert all(matrix.ctypes.data % LINE == 0 for matrix in held)
    for i, matrix in enumerate(held):
        matrix[:] = i
    assert all((matrix == i).all() and matrix.dtype == np.float32 for i, matrix in enumerate(held))
    assert [matrix.shape for matrix in held] == [(rows, columns) for columns in range(40) for rows in (0, 1, 3)]


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(-87.3, 88.3, 400_001), np.linspace(-1, 1, 100_001), [0.0, -0.0]]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(_exp(x) - expected) / np.spacing(expected.astype(np.float32))).max() <= 2


def test_exp_beyond_what_can_be_told() -> None:
    x = np.array([-np.inf, -1e30, -104, 89, 1e30, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(_exp(x), np.array([0, 0, 0, np.inf, np.inf, np.inf, np.nan], np.float32))
