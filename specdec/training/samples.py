"""What a target writes after a user's prompts, kept in a folder: the text to train its drafters on."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor, nn

from specdec import storage
from specdec.attach import attach
from specdec.drafters.model_rows import Rows
from specdec.model import Form

KIND, VERSION = "samples", 1
CANDIDATES = 32  # of the target's law after each token: enough of its mass to learn from


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A prompt and what the target wrote after it.

    Attributes:
        tokens: token ids, the prompt's first.
        prompt: how many are the prompt's; those from there on are the target's.
        candidates: the target's likeliest ids for each token that it wrote, best first.
        chance: their probabilities by raw logits, whatever the temperature that was written at.
        features: what the target's head read to choose each token that it wrote; None where not collected.
    """

    tokens: Int[np.ndarray, " length"]
    prompt: int
    candidates: Int[np.ndarray, "written k"]
    chance: Float16[np.ndarray, "written k"]
    features: Float16[np.ndarray, "written width"] | None = None

    @property
    def written(self) -> Int[np.ndarray, " written"]:
        """The target's own tokens."""
        return self.tokens[self.prompt :]


def collect(
    target: Any,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 16,
    features: bool = False,
    minutes: float = math.inf,
    tell: Callable[[int, int], None] = lambda written, prompts: None,
) -> list[Sample]:
    """Let the target write after each prompt; batches are kept as they come, and not made again.

    The same call goes on where an earlier one was stopped, with the same samples as if it had not been. Prompts of
    about the same length are read together, in batches that come in random order.

    Args:
        target: a transformers causal LM whose KV rows can hold trees; an end token of its own ends a text.
        prompts: token ids of each; none may be empty.
        folder: where to keep them; made where it is not there.
        temperature: 0 for the likeliest tokens.
        batch: texts written together.
        features: whether to keep what the head reads, for drafters that work on it.
        minutes: of wall time, in this call, after which no more batch is begun.
        tell: is told how many tokens have been written for how many prompts, a batch at a time.

    Raises:
        ValueError: for a prompt of less than two tokens, a model that takes no trees, or a folder of another call.
    """
    if not all(len(prompt) > 1 for prompt in prompts):
        raise ValueError("a prompt has less than two tokens: nothing can be written after it here")
    form = attach(target, timed=False).form
    if form.level != "tree":
        raise ValueError(f"{type(target).__name__} takes no trees: {form.reason}")
    asked = {"target": name(target), "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    asked |= {"batch": batch, "features": features, "prompts": _digest(prompts)}
    folder.mkdir(parents=True, exist_ok=True)
    samples, end = list[Sample](), time.monotonic() + 60 * minutes
    for number, chosen in enumerate(_batches(prompts, batch, seed)):
        path = folder / f"{number:05}.safetensors"
        if not path.exists():
            if time.monotonic() >= end:
                continue
            texts = [np.array(prompts[i], np.int64) for i in chosen]
            rng = torch.Generator(target.device).manual_seed(
                int(np.random.default_rng([seed, number]).integers(1 << 32))
            )
            _save(path, _write(target, form, texts, max_new_tokens, temperature, features, rng), asked)
        samples += _load(path, asked)
        tell(sum(len(sample.written) for sample in samples), len(samples))
    return samples


def read(folder: Path) -> list[Sample]:
    """All samples of a folder. Raises ValueError for a damaged file."""
    return [sample for path in sorted(folder.glob("*.safetensors")) for sample in _load(path)]


def shuffled(samples: Sequence[Sample], size: int, seed: int) -> Callable[[int], list[Sample]]:
    """What a step's number stands for: the next ``size`` samples of an order that is drawn anew for each round."""
    each = max(1, len(samples) // size)

    def batch(step: int) -> list[Sample]:
        number, place = divmod(step, each)
        order = np.random.default_rng([seed, number]).permutation(len(samples))
        return [samples[i] for i in order[place * size : (place + 1) * size]]

    return batch


def name(model: Any) -> str:
    """What a model is called, wherever it lies."""
    return Path(model.config.name_or_path).name


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(map(int, prompt)) for prompt in prompts]).encode()).hexdigest()


def _batches(prompts: Sequence[Sequence[int]], batch: int, seed: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


@torch.no_grad()
def _write(
    target: Any,
    form: Form,
    prompts: Sequence[Int[np.ndarray, " prompt"]],
    most: int,
    temperature: float,
    features: bool,
    rng: torch.Generator,
) -> list[Sample]:
    """One sample of each prompt, all written together; who has ended leaves the batch."""
    ends = set(np.ravel(target.generation_config.eos_token_id or []).tolist())
    rows, texts, live = Rows(target, form, len(prompts)), list(prompts), list(range(len(prompts)))
    notes: list[list[Note]] = [[] for _ in texts]
    rows.read([text[:-1] for text in texts])  # so that every later pass has one token of each
    with _read_by_head(target) as seen:
        while live:
            logits = rows.read([texts[i] for i in live])
            noted = _note(logits, seen[-1])
            for row, token in reversed(list(enumerate(_choose(logits, temperature, rng)))):
                i = live[row]
                notes[i].append(Note(*(part[row] for part in noted)))
                texts[i] = np.append(texts[i], token)
                if token in ends or len(notes[i]) == most:
                    live[row] = live[-1]  # as rows do when one leaves
                    live.pop()
                    if live:
                        rows.leave(rows.texts[row])
    stacked = [Note(*map(np.stack, zip(*note, strict=True))) for note in notes]
    return [
        Sample(text, len(prompt), note.candidates, note.chance, note.features if features else None)
        for text, prompt, note in zip(texts, prompts, stacked, strict=True)
    ]


class Note(NamedTuple):
    """What is kept of one token, or of one of each row."""

    candidates: Int[np.ndarray, "*rows k"]
    chance: Float16[np.ndarray, "*rows k"]
    features: Float16[np.ndarray, "*rows width"]


def _note(logits: Float[Tensor, "rows vocab"], read: Float[Tensor, "rows last width"]) -> Note:
    chance, candidates = logits.softmax(-1).topk(min(CANDIDATES, logits.shape[1]))
    return Note(candidates.cpu().numpy(), chance.half().cpu().numpy(), read[:, -1].half().cpu().numpy())


def _choose(logits: Float[Tensor, "rows vocab"], temperature: float, rng: torch.Generator) -> list[int]:
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]
    tokens: list[int] = chosen.tolist()
    return tokens


@contextmanager
def _read_by_head(target: Any) -> Iterator[list[Tensor]]:
    """What the target's head has read last, as its passes go by."""
    seen: list[Tensor] = []

    def see(head: nn.Module, read: tuple[Tensor, ...]) -> None:
        seen[:] = read[:1]

    hook = target.get_output_embeddings().register_forward_pre_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def _save(path: Path, samples: Sequence[Sample], asked: dict[str, Any]) -> None:
    parts = {
        field: np.concatenate([getattr(sample, field) for sample in samples]) for field in ("candidates", "chance")
    }
    if samples[0].features is not None:
        parts["features"] = np.concatenate([sample.features for sample in samples if sample.features is not None])
    parts |= {"tokens": np.concatenate([sample.tokens for sample in samples])}
    parts |= {"lengths": np.array([len(sample.tokens) for sample in samples])}
    parts |= {"prompts": np.array([sample.prompt for sample in samples])}
    storage.write(path, KIND, VERSION, parts, asked)


def _load(path: Path, asked: dict[str, Any] | None = None) -> list[Sample]:
    """The samples of a file, which must have been ``asked`` for alike."""
    parts, facts = storage.read(path, KIND, VERSION)
    if asked is not None and (other := [fact for fact in asked if facts.get(fact) != asked[fact]]):
        raise ValueError(f"{path.parent} holds samples made with another {', '.join(other)}: give another folder")
    lengths, prompts = parts["lengths"], parts["prompts"]
    texts = np.split(parts["tokens"], lengths.cumsum()[:-1])
    written = (lengths - prompts).cumsum()[:-1]
    split = {field: np.split(parts[field], written) for field in ("candidates", "chance", "features") if field in parts}
    return [
        Sample(text, int(prompt), **{field: each[i] for field, each in split.items()})
        for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
    ]
