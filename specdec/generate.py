"""Put speculation in front of a model's own ``generate``, and take it away again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerationMixin

from specdec import cpu
from specdec.core import Drafter, Policy, Unsupported
from specdec.recorder import Recorder
from specdec.speculate import DRAFT, EXIT, LONGSPEC, Speculate, make_drafter
from specdec.statistics import Stats
from specdec.verifiers import PathwiseVerifier

POSITIONAL = [name for name in inspect.signature(GenerationMixin.generate).parameters if name not in ("self", "kwargs")]
# Ways of decoding that are somebody else's; the call is passed on as it is.
OTHERS = (
    "custom_generate",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
    "synced_gpus",
    "token_healing",
)

# Set while a plain generate runs, which may call the model's generate again as its own assistant.
PLAIN: ContextVar[bool] = ContextVar("specdec_plain", default=False)


class Generate:
    """What ``model.generate`` is while the model is wrapped: the same call, the same result, fewer target passes."""

    def __init__(self, model: Any, speculate: Speculate, shadowed: Any = None) -> None:
        self.model, self.speculate = model, speculate
        self.shadowed = shadowed  # an attribute of the model itself that stood here before
        self.__doc__ = type(model).generate.__doc__
        self.__signature__ = inspect.signature(self.plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        """A deep copy of the model is wrapped for itself."""
        parts = (self.model, self.speculate, self.shadowed)
        return Generate(*(copy.deepcopy(part, memo) for part in parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self.model, self.speculate, self.shadowed)

    @property
    def plain(self) -> Any:
        """The model's own ``generate``."""
        return self.shadowed or type(self.model).generate.__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``generate``, with every argument it takes."""
        if PLAIN.get():
            return self.plain(*args, **kwargs)
        named = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        other = next((name for name in OTHERS if _asks(self.model, named, name)), None)
        try:
            if other is not None:
                raise Unsupported(f"{other}= asks for another way of decoding")
            return self._speculative(**named)
        except Unsupported as why:
            if self.speculate.on_unsupported == "error":
                raise ValueError(f"specdec cannot run this: {why}") from why
            self.speculate.stats.plain_generations += 1
            self.speculate.stats.reason(f"plain generate: {why}")
        token = PLAIN.set(True)
        try:
            return self.plain(*args, **kwargs)
        finally:
            PLAIN.reset(token)

    def _speculative(self, streamer: Any = None, **kwargs: Any) -> Any:
        """Let ``generate`` prepare everything and decode in its place.

        The streamer, the tokenizer and what needs it never reach a decoding loop of ours, so they are bound here.
        """
        if not _transformers_own(self.plain):
            raise Unsupported(f"{type(self.model).__name__} has a generate of its own")
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise Unsupported("encoder-decoder models are not supported")
        if self.speculate.stats.level == "plain":
            raise Unsupported(self.speculate.why_plain)
        kwargs = _with_stop_strings(self.model, kwargs)
        if hasattr(self.model, "get_base_model"):  # a self-test inside PEFT's generate would meet its per-row hooks
            self.speculate.attach(self.model.get_base_model())

        def loop(
            model: Any,
            input_ids: torch.Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            parts = (input_ids, logits_processor, stopping_criteria, generation_config)
            try:
                return self.speculate.run(model, *parts, model_kwargs, streamer)
            except Unsupported as why:
                return why  # raised only outside: what wraps generate (PEFT) does not clean up after an error

        result: Any = None
        try:
            result = self.plain(custom_generate=loop, **kwargs)
        finally:
            if streamer is not None and not isinstance(result, Unsupported):
                streamer.end()
        if isinstance(result, Unsupported):
            raise result
        return result


def _transformers_own(generate: Any) -> bool:
    """Whether it is transformers' ``generate``, or PEFT's around it, which hand a prepared loop on."""
    function = getattr(generate, "__func__", None)
    return function is GenerationMixin.generate or hasattr(getattr(generate, "__self__", None), "peft_config")


def _asks(model: Any, kwargs: dict[str, Any], name: str) -> bool:
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return bool(kwargs.get(name, getattr(config, name, None)))


def _with_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn ``stop_strings`` into the stopping rule that ``generate`` would make of them."""
    tokenizer, config = kwargs.get("tokenizer"), kwargs.get("generation_config") or model.generation_config
    strings = kwargs.get("stop_strings") or config.stop_strings or model.generation_config.stop_strings
    if not strings or tokenizer is None:
        return kwargs
    rules = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    rules.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    # An explicit None keeps generate from finding strings in a configuration and asking for the tokenizer.
    return {**kwargs, "stopping_criteria": rules, "stop_strings": None}


def wrap(
    model: nn.Module,
    drafter: Drafter | str = "auto",
    policy: Policy | str = "auto",
    verifier: PathwiseVerifier | str = "pathwise",
    on_unsupported: Literal["fallback", "error"] = "fallback",
    namespace: str = "",
    cpu_kernels: bool | None = None,
    trace: str | Path | Recorder | None = None,
) -> Any:
    """Make ``model.generate`` speculative, in place; everything it takes and returns stays the same.

    A model that is wrapped already is wrapped anew with the new parts. A compiled module's own module is wrapped.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        drafter, policy, verifier, on_unsupported, namespace, trace: see ``Speculate``.
        cpu_kernels: whether to make float32 layers on the CPU quicker for short passes too, which every step of
            decoding is; results differ from torch's own by rounding. None: where that can be done, and no word where
            it cannot.

    Returns:
        The same object.

    Raises:
        TypeError: for something that has no ``generate`` of transformers' kind.
    """
    inner = _inner(model)
    if not (isinstance(inner, GenerationMixin) or hasattr(inner, "peft_config")):
        raise TypeError(f"wrap: got {type(model).__name__}; give a transformers model with a generate method")
    if isinstance(drafter, str) and drafter.startswith((EXIT, DRAFT, LONGSPEC)):
        drafter = make_drafter(drafter, inner, measured=isinstance(policy, str))
    parts = Speculate(drafter, policy, verifier, on_unsupported, namespace, trace)
    unwrap(model)
    inner.generate = Generate(inner, parts, vars(inner).get("generate"))
    reason = "" if cpu_kernels is False else cpu.install(inner)
    if reason and cpu_kernels:
        parts.stats.reason(reason)
    return model


def unwrap(model: nn.Module) -> Any:
    """Give the model its own ``generate`` back; does nothing to a model that is not wrapped. Returns the model."""
    inner = _inner(model)
    ours = vars(inner).get("generate")
    if isinstance(ours, Generate):
        cpu.remove(inner)
        del inner.generate
        if ours.shadowed is not None:
            inner.generate = ours.shadowed
    return model


@contextmanager
def speculating(
    model: nn.Module,
    drafter: Drafter | str = "auto",
    policy: Policy | str = "auto",
    verifier: PathwiseVerifier | str = "pathwise",
    on_unsupported: Literal["fallback", "error"] = "fallback",
    namespace: str = "",
    cpu_kernels: bool | None = None,
    trace: str | Path | Recorder | None = None,
) -> Iterator[Any]:
    """The model wrapped inside the ``with`` block, as it was before after it. Takes what ``wrap`` takes."""
    inner = _inner(model)
    before, had_kernels = vars(inner).get("generate"), cpu.installed(inner)
    wrap(model, drafter, policy, verifier, on_unsupported, namespace, cpu_kernels, trace)
    try:
        yield model
    finally:
        unwrap(model)
        if before is not None:
            inner.generate = before
        if had_kernels:
            cpu.install(inner)


def stats(model: nn.Module) -> Stats:
    """What a wrapped model has done so far.

    Raises:
        ValueError: for a model that is not wrapped.
    """
    generate = vars(_inner(model)).get("generate")
    if not isinstance(generate, Generate):
        raise ValueError(f"stats: this {type(model).__name__} is not wrapped; call specdec.wrap(model) first")
    return generate.speculate.stats


def _inner(model: Any) -> Any:
    """The module behind ``torch.compile``'s wrapper, whose ``generate`` is what runs anyway."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"got {type(model).__name__}; give a transformers model")
    return getattr(model, "_orig_mod", model)
