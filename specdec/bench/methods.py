"""The ways to generate that are compared, by name."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import specdec
from specdec import cpu
from specdec.policies import FixedPolicy

NAMES = ("plain", "ngram", "recycling", "auto", "fixed:NODES", "prompt-lookup")
KERNELS = "+kernels"


@dataclass(frozen=True, slots=True)
class Method:
    """One way to generate.

    Attributes:
        name: what the results call it.
        model: a view of the model, sharing its weights, so that methods may take turns without being attached anew.
        arguments: what its ``generate`` is told besides.
        wrapped: whether the model is a wrapped one, with ``stats``.
        kernels: whether our CPU kernels are in the model while it generates.
    """

    name: str
    model: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    wrapped: bool = False
    kernels: bool = False

    def generate(self, *inputs: Any, **arguments: Any) -> Any:
        """The model's ``generate``, with this method's arguments and kernels."""
        if not self.kernels:
            return self.model.generate(*inputs, **arguments, **self.arguments)
        cpu.install(self.model)
        try:
            return self.model.generate(*inputs, **arguments, **self.arguments)
        finally:
            cpu.remove(self.model)


def prepare(model: Any, name: str) -> Method:
    """The method of that name, its drafters' memory empty.

    "plain" is transformers' own ``generate``; "prompt-lookup" its prompt-lookup decoding with 10 tokens; "ngram",
    "recycling" and "auto" are drafters under the automatic policy; "fixed:64" is the automatic drafter under a policy
    of 64 nodes at each step. Any of them with "+kernels" behind it runs with our CPU kernels in the model. Raises
    ValueError for another name.
    """
    view = copy.copy(model)
    kernels = name.endswith(KERNELS)
    match name.removesuffix(KERNELS):
        case "plain":
            return Method(name, view, kernels=kernels)
        case "prompt-lookup":
            return Method(name, view, {"prompt_lookup_num_tokens": 10}, kernels=kernels)
        case ours:
            drafter, policy = _parts(ours)
            return Method(name, specdec.wrap(view, drafter=drafter, policy=policy), wrapped=True, kernels=kernels)


def known(name: str) -> str:
    """The name itself. Raises ValueError when no method has it."""
    if name.removesuffix(KERNELS) not in ("plain", "prompt-lookup"):
        _parts(name.removesuffix(KERNELS))
    return name


def _parts(name: str) -> tuple[str, Any]:
    if name in ("ngram", "recycling", "auto"):
        return name, "auto"
    kind, _, nodes = name.partition(":")
    if kind == "fixed" and nodes.isdecimal():
        return "auto", FixedPolicy(int(nodes), 8, 8)
    raise ValueError(f"no method named {name!r}; there are {', '.join(NAMES)}, each also with {KERNELS}")
