"""LongSpec's training: short texts at far positions, and a target whose newest rows the layer does not see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div
from transformers.cache_utils import DynamicCache

from specdec.drafters.lent import Lent
from specdec.drafters.longspec_layer import LongSpecLayer, unlike
from specdec.training import loop
from specdec.training.layers import most_frequent
from specdec.training.samples import Sample, name, shuffled
from specdec.training.validation import DEPTH, tokens_per_step

ANCHORS = 4  # first tokens that may stay where they are, at most
BLIND = 4  # newest tokens of which the layer does not see the target's rows, at most
FARTHEST = 30_000
HELD = 2 << 30  # bytes of readings that are kept for the next time


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What the target makes of one text.

    Attributes:
        tokens, positions: of the text, which need not stand at its beginning.
        keys, values: rows of the target's last layer.
        features: what its head reads after each token.
        written: how many of the tokens, its last, are the target's own.
    """

    tokens: Int[Tensor, " length"]
    positions: Int[Tensor, " length"]
    keys: Float[Tensor, "kv_heads length dim"]
    values: Float[Tensor, "kv_heads length dim"]
    features: Float[Tensor, "length hidden"]
    written: int

    @property
    def bytes(self) -> int:
        """What it takes to keep."""
        return sum(part.nbytes for part in (self.tokens, self.positions, self.keys, self.values, self.features))


def anchored(length: int, anchors: int, offset: int) -> Int[np.ndarray, " length"]:
    """Anchor-offset indices: the first ``anchors`` tokens stay where they are, the others come ``offset`` later."""
    place = np.arange(length)
    return np.where(place < anchors, place, place + offset)


def drawn(length: int, positions: int, rng: np.random.Generator) -> Int[np.ndarray, " length"]:
    """Indices drawn for one text, of a target that knows so many ``positions``: all of them but the last come up.

    So a layer that is trained on short texts has seen the positions of long ones, while the target finds the first
    tokens, to which much of its attention goes, where they always are.
    """
    last = min(FARTHEST, positions - min(1000, positions // 8))
    return anchored(length, int(rng.integers(ANCHORS + 1)), int(rng.integers(max(last - length, 0) + 1)))


class Readings:
    """The target's readings of samples, made when they are first asked for; as many as fit are kept.

    Args:
        target: a transformers causal LM.
        length: of each text, so many of the last tokens.
        offsets: whether each text's indices are drawn, once; else they count from 0.
        seed: of what is drawn.
        held: bytes of readings that are kept.
    """

    def __init__(self, target: Any, length: int = 1024, offsets: bool = True, seed: int = 0, held: int = HELD) -> None:
        self.target, self.length, self.offsets, self.seed, self.left = target, length, offsets, seed, held
        self._kept = dict[Sample, Reading]()

    def of(self, sample: Sample) -> Reading:
        """What the target makes of a sample."""
        reading = self._kept.get(sample) or self._read(sample)
        if sample not in self._kept and reading.bytes <= self.left:
            self._kept[sample] = reading
            self.left -= reading.bytes
        return reading

    @torch.no_grad()
    def _read(self, sample: Sample) -> Reading:
        tokens = sample.tokens[-self.length :]
        config, device = self.target.config.get_text_config(decoder=True), self.target.device
        indices = np.arange(len(tokens))
        if self.offsets:
            rng = np.random.default_rng([self.seed, *sample.tokens.tolist()])
            indices = drawn(len(tokens), config.max_position_embeddings, rng)
        ids, positions = (torch.from_numpy(part.copy()).to(device) for part in (tokens, indices))
        cache = DynamicCache(config=config)
        read = self.target.get_decoder()(ids[None], position_ids=positions[None], past_key_values=cache)
        keys, values = (part[0].float() for part in (cache.layers[-1].keys, cache.layers[-1].values))
        features = read.last_hidden_state[0].float()
        return Reading(ids, positions, keys, values, features, min(len(tokens), len(sample.written)))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some readings, and how many of the newest tokens' rows are hidden in all of them."""

    readings: Sequence[Reading]
    blind: int


def train(
    target: Any,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    folder: Path,
    steps: int,
    minutes: float = math.inf,
    learning_rate: float = 1e-3,
    seed: int = 0,
    size: int = 8,
    window: int = 128,
    length: int = 1024,
    vocabulary: int | None = 8192,
    offsets: bool = True,
    every: int = 100,
    bfloat16: bool = False,
) -> LongSpecLayer:
    """A layer that drafts for a target, trained on what that writes; ``longspec.safetensors`` in ``folder`` at the end.

    The target is read with the same indices as the layer. The loss is taken at all tokens, a prompt's too.

    Args:
        target: a transformers causal LM; it is not trained, and takes no gradients from now on.
        samples, held_out: to learn from, and to say how many tokens a step would give.
        steps, minutes, learning_rate, seed, every: see ``loop.train``.
        size: samples of one step.
        window: see ``LongSpecLayer``.
        length: tokens of each sample.
        vocabulary: how many of the likeliest tokens it can say; None for all.
        offsets: whether it learns positions beyond ``length``.
        bfloat16: whether products are in bfloat16.

    Raises:
        ValueError: the target is none that such a layer can draft for, or the folder holds another run.
    """
    kept = None if vocabulary is None else torch.from_numpy(most_frequent(samples, vocabulary)).to(target.device)
    layer = LongSpecLayer.of(target.requires_grad_(False), window, kept).to(target.device, torch.float32)
    if reason := unlike(layer.shape, target):
        raise ValueError(f"{type(target).__name__} cannot have a layer that drafts for it: {reason}")
    lent, readings = Lent(target, kept), Readings(target, length, offsets, seed)
    own, chosen = Readings(target, length, offsets=False), shuffled(samples, size, seed)

    def mean(batch: Batch) -> Tensor:
        with torch.autocast(target.device.type, torch.bfloat16, enabled=bfloat16):
            return loss(layer, lent, batch)

    state = loop.train(
        layer,
        lambda step: Batch([readings.of(sample) for sample in chosen(step)], blindness(step, seed)),
        mean,
        folder,
        steps,
        learning_rate,
        seed,
        minutes,
        lambda: tokens_per_step(right(layer, lent, own.of(sample)) for sample in held_out),
        every,
    )
    told = {"figures": state.figures, "seconds": state.seconds, "texts": len(samples), "offsets": offsets}
    layer.save(folder / "longspec.safetensors", name(target), told | {"length": length})
    return layer


def blindness(step: int, seed: int) -> int:
    """Flash noisy training: how many of the newest rows are hidden at a step, 1 to 4, as in a chain so deep."""
    return int(np.random.default_rng([seed, step]).integers(1, BLIND + 1))


def loss(layer: LongSpecLayer, lent: Lent, batch: Batch) -> Float[Tensor, ""]:
    """How far what the layer says is from what the target says, in nats per token (Kullback-Leibler)."""
    apart = [_apart(layer, lent, reading, batch.blind) for reading in batch.readings]
    return torch.stack(apart).sum() / sum(len(reading.tokens) for reading in batch.readings)


def _apart(layer: LongSpecLayer, lent: Lent, reading: Reading, blind: int) -> Float[Tensor, ""]:
    """Summed over a text, of what is kept of the vocabulary."""
    said = lent.said(_read_by(layer, lent, reading, blind)).log_softmax(-1)
    with torch.no_grad():
        due = lent.said(reading.features).log_softmax(-1)
    return kl_div(said, due, reduction="sum", log_target=True)


def _read_by(layer: LongSpecLayer, lent: Lent, reading: Reading, blind: int) -> Float[Tensor, "length hidden"]:
    x, rotation = lent.embed(reading.tokens).float(), lent.rotation(reading.positions)
    after: Tensor = layer(x, rotation, reading.keys, reading.values, blind)
    return after


@torch.no_grad()
def right(layer: LongSpecLayer, lent: Lent, reading: Reading, depth: int = DEPTH) -> Bool[np.ndarray, "depth places"]:
    """Whether its guess at each token that the target has written is right, made as each guess of a chain.

    The so-many-th guess of a chain is made with as many of the target's rows hidden.
    """
    first, last = len(reading.tokens) - reading.written, len(reading.tokens)
    hits = []
    for blind in range(1, depth + 1):
        after = _read_by(layer, lent, reading, blind)[max(0, first - 1) : last - 1]
        hits.append(lent.logits(after).argmax(-1) == reading.tokens[max(1, first) :])
    hit: np.ndarray = torch.stack(hits).cpu().numpy()
    return hit
