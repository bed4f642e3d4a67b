"""The ways to generate that are compared, by name.

A method is ``plain``, a rival, or our own: ``DRAFTER[@POLICY[@VERIFIER]]``. ``+kernels`` behind any of them puts our
CPU kernels into the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import specdec
from specdec.bench import rivals
from specdec.bench.counts import Counts
from specdec.bench.parts import DRAFTERS, POLICIES, VERIFIERS, load, parts
from specdec.bench.quicker import Kernels
from specdec.recorder import Recorder
from specdec.speculate import Speculate

RIVALS = ("prompt-lookup", "assisted", "assisted:PATH", "compiled", "economize", "flashspec", "adapter:MODULE:FUNCTION")
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
        counts: what the model counts, if it is a wrapped one.
        kernels: our CPU kernels, which are in the model while it generates; None for its own layers.
        by_step: whether a streamer gets all tokens of a step in one call, so that steps can be counted.
    """

    name: str
    model: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    counts: Counts | None = None
    kernels: Kernels | None = None
    by_step: bool = True

    def generate(self, ids: Any, streamer: Any, **arguments: Any) -> Any:
        """The model's ``generate``, with this method's arguments and kernels; the streamer is started just before.

        Raises RivalError where a rival fails.
        """
        with self.kernels.inside() if self.kernels else nullcontext(), _rival(self.name):
            streamer.start()
            return self.model.generate(ids, streamer=streamer, **arguments, **self.arguments)


def prepare(model: Any, name: str, kernels: Kernels | None = None) -> Method:
    """The method of that name, its drafters' memory empty.

    "plain" is transformers' own ``generate``. Rivals are transformers' own "prompt-lookup" with 10 tokens and
    "assisted" generation, by the draft model in the directory behind a colon or by the target's own first layers;
    "compiled" is ``generate`` with a static cache, "economize" and "flashspec" are the prompt lookup of those
    libraries, and "adapter:MODULE:FUNCTION" is whatever that function makes of the model: something with
    ``generate``. All others are ours, see ``parts``.

    Args:
        kernels: the model's, for names with "+kernels" behind them; made where they are not given.

    Raises:
        ValueError: there is no such method.
        RivalError: a rival is not installed, or does not take the model.
    """
    view, bare = copy.copy(model), name.removesuffix(KERNELS)
    inside = (kernels or Kernels(model)) if name.endswith(KERNELS) else None
    if bare == "plain":
        return Method(name, view, kernels=inside)
    if _is_rival(bare):
        with _rival(name):
            return Method(name, *_made(view, bare), kernels=inside, by_step=bare != "economize")
    return ours(view, name, inside)


def ours(view: Any, name: str, kernels: Kernels | None = None, trace: Recorder | None = None) -> Method:
    """The view wrapped with the parts that are named, and what it counts."""
    drafter, policy, verifier = parts(name.removesuffix(KERNELS))
    specdec.wrap(view, drafter, policy, verifier, cpu_kernels=False, trace=trace)
    counts = vars(view)["generate"].speculate.stats = Counts()
    return Method(name, view, counts=counts, kernels=kernels)


def known(name: str) -> str:
    """The name itself. Raises ValueError when no method has it."""
    bare = name.removesuffix(KERNELS)
    if bare == "plain" or _is_rival(bare):
        return name
    try:
        Speculate(*parts(bare))
    except (ValueError, TypeError) as error:
        raise ValueError(f"no method named {name!r} ({error}). {GRAMMAR}") from error
    return name


GRAMMAR = (
    f"A method is plain, {', '.join(RIVALS)}, or DRAFTER[@POLICY[@VERIFIER]], each also with {KERNELS} behind it. "
    f"DRAFTER is {', '.join(DRAFTERS)}; POLICY {', '.join(POLICIES)}; VERIFIER {', '.join(VERIFIERS)}."
)


def is_ours(name: str) -> bool:
    """Whether a method is a wrapped model."""
    bare = name.removesuffix(KERNELS)
    return bare != "plain" and not _is_rival(bare)


def _is_rival(bare: str) -> bool:
    kind, _, rest = bare.partition(":")
    return bare in RIVALS or (kind in ("assisted", "adapter") and bool(rest))


def _made(view: Any, bare: str) -> tuple[Any, dict[str, Any]]:
    """A rival's model and what its ``generate`` is told."""
    kind, _, rest = bare.partition(":")
    match kind:
        case "prompt-lookup":
            return view, {"prompt_lookup_num_tokens": 10}
        case "assisted":
            return rivals.assisted(view, rest)
        case "compiled":
            return rivals.compiled(view)
        case "economize":
            return rivals.economize(view)
        case "adapter":
            return load(rest)(view), {}
    return rivals.flashspec(view)


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
