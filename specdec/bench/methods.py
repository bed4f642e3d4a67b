"""The ways to generate that are compared, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import specdec
from specdec import cpu
from specdec.bench import rivals
from specdec.policies import FixedPolicy

OURS = ("ngram", "recycling", "auto", "fixed:NODES")
RIVALS = ("prompt-lookup", "assisted", "assisted:PATH", "compiled", "economize", "flashspec")
NAMES = ("plain", *OURS, *RIVALS)
KERNELS = "+kernels"


class RivalError(Exception):
    """A rival does not run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to generate.

    Attributes:
        name: what the results call it.
        model: a view of the model, sharing its weights, so that methods may take turns without being attached anew.
        arguments: what its ``generate`` is told besides.
        wrapped: whether the model is a wrapped one, with ``stats``.
        kernels: whether our CPU kernels are in the model while it generates.
        by_step: whether a streamer gets all tokens of a step in one call, so that steps can be counted.
    """

    name: str
    model: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    wrapped: bool = False
    kernels: bool = False
    by_step: bool = True

    def generate(self, *inputs: Any, **arguments: Any) -> Any:
        """The model's ``generate``, with this method's arguments and kernels. Raises RivalError where a rival fails."""
        with _kernels(self.model, self.kernels), _rival(self.name):
            return self.model.generate(*inputs, **arguments, **self.arguments)


def prepare(model: Any, name: str) -> Method:
    """The method of that name, its drafters' memory empty.

    "plain" is transformers' own ``generate``; "ngram", "recycling" and "auto" are drafters under the automatic policy;
    "fixed:64" is the automatic drafter under a policy of 64 nodes at each step. Rivals are transformers' own
    "prompt-lookup" with 10 tokens and "assisted" generation, by the draft model in the directory behind a colon or by
    the target's own first layers; "compiled" is ``generate`` with a static cache, and "economize" and "flashspec" are
    the prompt lookup of those libraries. Any with "+kernels" behind it runs with our CPU kernels in the model.

    Raises:
        ValueError: there is no such method.
        RivalError: a rival is not installed, or does not take the model.
    """
    view, kernels, bare = copy.copy(model), name.endswith(KERNELS), name.removesuffix(KERNELS)
    if bare == "plain":
        return Method(name, view, kernels=kernels)
    if _is_rival(bare):
        with _rival(name):
            return Method(name, *_made(view, bare), kernels=kernels, by_step=bare != "economize")
    drafter, policy = _parts(bare)
    return Method(
        name, specdec.wrap(view, drafter=drafter, policy=policy, cpu_kernels=False), wrapped=True, kernels=kernels
    )


def known(name: str) -> str:
    """The name itself. Raises ValueError when no method has it."""
    bare = name.removesuffix(KERNELS)
    if bare != "plain" and not _is_rival(bare):
        _parts(bare)
    return name


def _is_rival(bare: str) -> bool:
    return bare in RIVALS or bare.startswith("assisted:")


def _made(view: Any, bare: str) -> tuple[Any, dict[str, Any]]:
    """A rival's model and what its ``generate`` is told."""
    kind, _, path = bare.partition(":")
    match kind:
        case "prompt-lookup":
            return view, {"prompt_lookup_num_tokens": 10}
        case "assisted":
            return rivals.assisted(view, path)
        case "compiled":
            return rivals.compiled(view)
        case "economize":
            return rivals.economize(view)
    return rivals.flashspec(view)


def _parts(name: str) -> tuple[str, Any]:
    if name in OURS[:3]:
        return name, "auto"
    kind, _, nodes = name.partition(":")
    if kind == "fixed" and nodes.isdecimal():
        return "auto", FixedPolicy(int(nodes), 8, 8)
    raise ValueError(f"no method named {name!r}; there are {', '.join(NAMES)}, each also with {KERNELS}")


@contextmanager
def _kernels(model: Any, wanted: bool) -> Iterator[None]:
    """Our CPU kernels in the model for a while."""
    if wanted:
        cpu.install(model)
    try:
        yield
    finally:
        if wanted:
            cpu.remove(model)


@contextmanager
def _rival(name: str) -> Iterator[None]:
    """A rival's errors become a RivalError; other methods' are ours, and stay what they are."""
    try:
        yield
    except Exception as error:  # whatever another library raises is its answer
        if not _is_rival(name.removesuffix(KERNELS)):
            raise
        missing = isinstance(error, ModuleNotFoundError)
        message = str(error).partition("\n")[0]
        raise RivalError(f"not installed ({message})" if missing else f"{type(error).__name__}: {message}") from error
