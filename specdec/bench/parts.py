"""Drafters, policies and verifiers by name, anybody's own among them."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import specdec
from specdec.policies import FixedPolicy

DRAFTERS = ("auto", "ngram", "suffix", "lookahead", "recycling", "triforce", "retrieval:PATH", "MODULE:OBJECT")
POLICIES = ("auto", "fixed:NODES[:DEPTH[:WIDTH]]", "MODULE:OBJECT")
VERIFIERS = ("pathwise", "rejection", "MODULE:OBJECT")
AT = "@"


class Parts(NamedTuple):
    """What ``wrap`` is told: each a name it knows, or an object."""

    drafter: Any
    policy: Any = "auto"
    verifier: Any = "pathwise"


def parts(name: str) -> Parts:
    """The parts that ``DRAFTER[@POLICY[@VERIFIER]]`` names; ``fixed:16`` alone is ``auto@fixed:16``.

    ``MODULE:OBJECT`` is imported, from the working directory too. A class or a function of nothing is called, so that
    each repeat has a new one; an object is used as it is, after its ``reset()`` if it has one.

    Raises:
        ValueError: a name is malformed, or its object cannot be imported.
    """
    names = name.split(AT)
    if names[0].partition(":")[0] == "fixed":
        names = ["auto", *names]
    if len(names) > 3:
        raise ValueError(f"{name}: more than a drafter, a policy and a verifier")
    drafter, policy, verifier = names + ["auto", "pathwise"][len(names) - 1 :]
    return Parts(
        drafter if drafter.startswith("retrieval:") else _named(drafter),
        _fixed(policy) if policy.partition(":")[0] == "fixed" else _named(policy),
        _named(verifier),
    )


def load(name: str) -> Any:
    """The object that ``MODULE:OBJECT`` names. Raises ValueError where there is none."""
    module, _, path = name.partition(":")
    try:
        _see_working_directory()
        return attrgetter(path)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def source(names: Iterable[str]) -> str:
    """A digest of our own code and of the files of all modules named, by which runs of other code are told apart."""
    _see_working_directory()
    ours = sorted(Path(specdec.__file__).parent.rglob("*.py"))
    modules = sorted({module for name in names for module in _modules(name)})
    digest = hashlib.sha256()
    for path in [*ours, *map(Path, modules)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _modules(name: str) -> list[str]:
    """The files of what a method's name has imported."""
    fields = name.removeprefix("adapter:").split(AT)
    found = [find_spec(field.partition(":")[0]) for field in fields if "/" not in field and ":" in field]
    return [spec.origin for spec in found if spec is not None and spec.origin and spec.has_location]


def _named(name: str) -> Any:
    if ":" not in name:
        return name
    found = load(name)
    if isinstance(found, type) or inspect.isfunction(found):
        return found()
    if hasattr(found, "reset"):
        found.reset()
    return found


def _fixed(name: str) -> FixedPolicy:
    try:
        return FixedPolicy(*map(int, name.split(":")[1:]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: give fixed:NODES, fixed:NODES:DEPTH or fixed:NODES:DEPTH:WIDTH") from error


def _see_working_directory() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: a file here must not stand in for an installed library
