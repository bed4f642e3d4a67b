"""Quicker float32 passes over few tokens on the CPU, put into a model and taken out again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from specdec.cache import SlotCache
from specdec.kernels.linear import Impl, linear, runs
from specdec.short_layer import Shared, ShortLayer, fits
from specdec.short_stack import ShortStack, alike

ROWS = (16, 32, 64, 128, 256)  # of x, where torch's own product is tried against ours
OUTPUTS = 4096  # of a weight, enough to time it by
SAMPLE = 64 << 20  # bytes of weights to time by
WORTH = 1.25  # how much longer products may take where layers are ours whole, which save more than that around them
TOLERANCE = 1e-4  # share of the logits' spread by which rounding may change them


class ShortPass:
    """A linear layer's ``forward`` that reads each weight once when there are few rows; torch's own for many.

    The layer keeps its weights; nothing is copied. The same result up to float32 rounding.

    Args:
        layer: the layer.
        most: rows up to which ours is quicker.
    """

    def __init__(self, layer: nn.Linear, most: int) -> None:
        self.layer, self.most = layer, most

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for ``x`` [..., inputs]."""
        return linear(x, self.layer.weight, self.layer.bias, most=self.most)


def install(model: nn.Module) -> str:
    """Make the model's float32 layers on the CPU quicker for few rows; what stands in the way, or "".

    Decoder layers of the Llama shape are replaced whole by a ``ShortLayer``, if the model's logits stay what they were;
    other linear layers get a ``ShortPass``. Up to how many rows is measured. Layers of another type (quantised,
    adapted), or with a ``forward`` of somebody else's, are left alone.
    """
    whole, single = [layer for layer in model.modules() if fits(layer)], _linear_layers(model)
    if not single:
        return ""
    from specdec.kernels.linear_numba import check_threading  # compiles or loads: on first use

    try:
        check_threading()
        few, some = _few([layer.weight.detach() for layer in single])
    except ValueError as error:  # numba has no library for threads that many callers may share
        return f"no CPU kernels: {str(error).splitlines()[0]}"
    reason = _replace(model, whole, some) if whole else ""
    inside = {part for layer in model.modules() if _is(layer, ShortLayer) for part in layer.modules()}
    for layer in single:
        if layer not in inside:  # there, its own pass has more rows than pay
            layer.forward = ShortPass(layer, few)  # type: ignore[method-assign, assignment]
    return reason


def _replace(model: nn.Module, layers: Sequence[Any], few: int) -> str:
    """Give ``layers`` a ``ShortLayer`` each, unless that changes what the model says; why not, or ""."""
    before, shared = _logits(model), Shared()
    for layer in layers:
        layer.forward = ShortLayer(layer, few, shared)
    reason = _difference(before, _logits(model)) or ("" if shared.used else "they would not run")
    if reason:
        remove(model)
        return f"decoder layers keep their own passes: {reason}"
    _join(model, before)
    return ""


def _join(model: nn.Module, before: Any) -> None:
    """Let lists of quick layers run in one call, unless that changes what the model says."""
    stacks = []
    for owner in list(model.modules()):
        for modules in owner.children():
            if type(modules) is nn.ModuleList and "forward" not in vars(owner) and alike(modules):
                stacks.append(ShortStack(owner, modules))
                owner.forward = stacks[-1]
    if stacks and _difference(before, _logits(model)):
        for stack in stacks:
            del stack.owner.forward
    elif len(stacks) == 1 and stacks[0].lead(model) and _difference(before, _logits(model, stacks[0])):
        stacks[0].model = None


def installed(model: nn.Module) -> bool:
    """Whether any layer has been changed by ``install``."""
    return any(_is(layer, (ShortPass, ShortLayer, ShortStack)) for layer in model.modules())


def remove(model: nn.Module) -> None:
    """Give every layer changed by ``install`` its own ``forward`` back."""
    for layer in model.modules():
        if _is(layer, (ShortPass, ShortLayer, ShortStack)):
            del layer.forward


def _is(layer: nn.Module, kind: Any) -> bool:
    return isinstance(vars(layer).get("forward"), kind)


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    plain = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    return [layer for layer in plain if runs(layer.weight.detach(), layer.weight.detach())]


@torch.no_grad()
def _few(weights: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Up to how many rows our products, and layers that are ours whole, are quicker than torch's.

    Products alone are timed, over more weights than caches hold.
    """
    sizes = itertools.accumulate(4 * weight.numel() for weight in weights)
    sample = [weight[:OUTPUTS] for weight, before in zip(weights, [0, *sizes], strict=False) if before < SAMPLE]
    few = some = ROWS[0]
    for before, rows in itertools.pairwise(ROWS):
        inputs = [torch.ones(rows, weight.shape[1]) for weight in sample]
        ours, theirs = (_quickest(partial(_products, inputs, sample, impl)) for impl in ("numba", "reference"))
        if ours > WORTH * theirs:
            break
        some = rows
        if few == before and ours <= theirs:
            few = rows
    return few, some


def _products(inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], impl: Impl) -> None:
    for x, weight in zip(inputs, weights, strict=True):
        linear(x, weight, impl=impl)


def _quickest(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def _logits(model: Any, stack: ShortStack | None = None) -> torch.Tensor | str:
    """What the model, or its ``stack``, says of a prompt, a token and a small tree after it; or why it does not."""
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(9)[None] % int(config.vocab_size)
    own = DynamicCache(config=config)
    cache = SlotCache.of(own) or own
    mask = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    mask[0, 0, :, 6:] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])

    def said(tokens: torch.Tensor, mask: torch.Tensor | None, positions: list[int]) -> Any:
        places = torch.tensor([positions])
        if stack is not None:
            return stack.logits(tokens, mask, places, cache)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
        return model(**inputs, past_key_values=cache, use_cache=True).logits

    try:
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        return torch.cat([said(ids[:, 5:6], None, [5]), said(ids[:, 6:], mask, [6, 7, 7])], dim=1)
    except Exception as error:  # any model may refuse in any way: that is an answer
        return f"{type(error).__name__}: {error}"


def _difference(before: Any, after: Any) -> str:
    """What is wrong with what a model says ``after`` its layers were changed, or ""."""
    if isinstance(before, str) or isinstance(after, str):
        return before if isinstance(before, str) else after
    error, spread = float((before - after).abs().max()), float((before - before.mean(-1, keepdim=True)).abs().max())
    return "" if error <= TOLERANCE * spread else f"logits differ by {error:.2g}"
