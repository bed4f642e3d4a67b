"""The linear kernel against torch's own, and its place in a model."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn

import specdec
from specdec import cpu
from specdec.kernels.linear import FEW, linear
from tests.tiny import model as tiny_model
from tests.tiny import prompt

SIZES = [(1, 1), (2, 3), (3, 63), (4, 64), (5, 65), (63, 2), (65, 1000), (1000, 64)]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_reference(outputs: int, inputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    added = torch.randn(outputs, generator=generator) if bias else None
    for rows in (1, 2, 3, 5, 8, 15, 16, 17, 33, 129):
        x = torch.randn(rows, inputs, generator=generator)
        ours, reference = (linear(x, weight, added, impl=impl) for impl in ("numba", "reference"))
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_shapes_and_layouts_of_the_input() -> None:
    weight = torch.randn(6, 10)
    for x in (
        torch.randn(10),
        torch.randn(2, 3, 10),
        torch.randn(10, 4).T,
        torch.randn(3, 20)[:, ::2],
        torch.randn(0, 10),
    ):
        torch.testing.assert_close(linear(x, weight, impl="numba"), nn.functional.linear(x, weight))


def test_what_is_no_number_stays_so() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [-torch.inf, 1.0]])
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    ours, reference = linear(x, weight, impl="numba"), linear(x, weight, impl="reference")
    assert torch.equal(ours, reference) or torch.equal(ours.isnan(), reference.isnan())
    assert torch.equal(ours[1:], reference[1:])


@pytest.mark.parametrize("weight", [torch.randn(4, 8).double(), torch.randn(4, 8).half(), torch.randn(8, 4).T])
def test_an_explicit_kernel_that_cannot_run_says_so(weight: torch.Tensor) -> None:
    x = torch.randn(2, 8, dtype=weight.dtype)
    with pytest.raises(ValueError, match="contiguous float32"):
        linear(x, weight, impl="numba")
    torch.testing.assert_close(linear(x, weight), nn.functional.linear(x, weight))


def test_gradients_go_torchs_way() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(2, 8)
    linear(x, layer.weight, layer.bias).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, -1))


def test_many_rows_are_torchs_own_to_the_bit() -> None:
    weight, x = torch.randn(64, 64), torch.randn(FEW + 1, 64)
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))


def test_threads_may_call_at_once() -> None:
    weight, xs = torch.randn(300, 200), [torch.randn(3, 200) for _ in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.allclose(linear(xs[i], weight, impl="numba"), xs[i] @ weight.T, atol=1e-3):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Quantised(torch.Tensor):
    """Says that it is float32 and holds something else, as quantised tensors do."""


def test_a_tensor_that_only_says_it_is_float32_goes_torchs_way() -> None:
    x, weight = torch.randn(2, 8), Quantised(torch.randn(4, 8))
    with pytest.raises(ValueError, match="contiguous float32"):
        linear(x, weight, impl="numba")
    assert isinstance(linear(x, weight), Quantised)


def test_autocast_goes_torchs_way() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shares", "found"),
    [
        ((0.9, 0.9, 0.9, 0.9), (256, 256)),
        ((0.9, 1.1, 0.9, 1.3), (32, 128)),
        ((1.2, 0.9, 1.3, 0.9), (16, 64)),
        ((1.3, 0.9, 0.9, 0.9), (16, 16)),
    ],
)
def test_whole_layers_are_ours_for_more_rows_than_products_alone(shares, found, monkeypatch) -> None:
    """By what share of torch's time our products take of 32, 64, 128 and 256 rows."""
    taken = dict(zip((32, 64, 128, 256), shares, strict=True))

    def seconds(call: partial[None]) -> float:
        inputs, _, impl = call.args
        return taken[len(inputs[0])] if impl == "numba" else 1.0

    monkeypatch.setattr(cpu, "_quickest", seconds)
    assert cpu._few([torch.ones(8, 8)]) == found


class TestInAModel:
    def test_installed_and_removed(self) -> None:
        model = tiny_model(head_dim=6)  # no whole layer of ours
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
        assert cpu.install(model) == ""
        assert all(isinstance(layer.forward, cpu.ShortPass) for layer in layers)
        ours = [layer.forward for layer in layers]
        assert cpu.install(model) == ""
        assert [layer.forward for layer in layers] == ours
        cpu.remove(model)
        assert not any("forward" in vars(layer) for layer in layers)

    def test_others_layers_are_left_alone(self) -> None:
        class Own(nn.Linear):
            pass

        hooked = nn.Linear(4, 4)
        hooked.forward = hooked.forward  # what accelerate does
        quantised = nn.Linear(4, 4)
        quantised.weight = nn.Parameter(Quantised(torch.randn(4, 4)))
        left = (Own(4, 4), nn.Linear(4, 4).half(), hooked, nn.Linear(4, 4, device="meta"), quantised)
        model = nn.Sequential(*left, nn.Linear(4, 4))
        assert cpu.install(model) == ""
        assert [isinstance(layer.forward, cpu.ShortPass) for layer in model] == [False] * 5 + [True]
        cpu.remove(model)
        assert "forward" in vars(hooked)

    def test_wrapped_generation_is_the_same_and_unwrap_restores(self) -> None:
        model = tiny_model()
        plain = model.generate(prompt(), max_new_tokens=30, do_sample=False)
        specdec.wrap(model, cpu_kernels=True)
        assert any("forward" in vars(layer) for layer in model.modules())
        assert torch.equal(model.generate(prompt(), max_new_tokens=30, do_sample=False), plain)
        specdec.unwrap(model)
        assert not any("forward" in vars(layer) for layer in model.modules())

    def test_a_deep_copy_has_its_own_weights(self) -> None:
        layer = nn.Sequential(nn.Linear(4, 2))
        cpu.install(layer)
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other[0].weight.zero_()
            other[0].bias.zero_()
            assert torch.equal(other(torch.ones(1, 4)), torch.zeros(1, 2))
            assert not torch.equal(layer(torch.ones(1, 4)), torch.zeros(1, 2))
