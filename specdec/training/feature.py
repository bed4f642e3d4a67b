"""Training of a draft on features: from the target's last feature and the token after it to the next feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from specdec.masks import additive
from specdec.training.layers import PULL, apart, cross_entropy, law_of, right
from specdec.training.samples import Sample
from specdec.training.validation import DEPTH, tokens_per_step

UNROLLED = 2  # guesses in a row that training makes


class Texts(NamedTuple):
    """What the target wrote, padded on the right.

    Attributes:
        tokens: from the first to the last but one.
        features: the target's, before each of them.
        next: the target's features after them.
        lengths: of each text.
    """

    tokens: Int[Tensor, "rows length"]
    features: Float[Tensor, "rows length width"]
    next: Float[Tensor, "rows length width"]
    lengths: list[int]

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device) -> Texts:
        """Raises ValueError for samples without features."""
        read = [sample.features for sample in samples if sample.features is not None]
        if len(read) < len(samples):
            raise ValueError("these samples have no features: collect them with features=True")
        lengths = [len(sample.written) - 1 for sample in samples]
        tokens = torch.zeros(len(samples), max(lengths), dtype=torch.long)
        features = torch.zeros(len(samples), 1 + max(lengths), read[0].shape[1])
        for row, (length, sample) in enumerate(zip(lengths, samples, strict=True)):
            tokens[row, :length] = torch.from_numpy(sample.written[:-1])
            features[row, : 1 + length] = torch.from_numpy(read[row])
        features = features.to(device)
        return cls(tokens.to(device), features[:, :-1], features[:, 1:], lengths)

    def places(self, first: int) -> tuple[Int[Tensor, " places"], Int[Tensor, " places"]]:
        """Rows and columns of all tokens but the ``first`` so many of each text."""
        rows = [row for row, length in enumerate(self.lengths) for _ in range(first, length)]
        columns = [column for length in self.lengths for column in range(first, length)]
        return torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


def usable(samples: Sequence[Sample]) -> list[Sample]:
    """Those long enough to learn from."""
    return [sample for sample in samples if len(sample.written) > UNROLLED]


def unrolled(draft: Any, texts: Texts, depth: int) -> list[Float[Tensor, "rows length width"]]:
    """The features that the draft expects after each token, as the first, second, ... of a chain of guesses.

    The first is made of the target's features; each later one of the draft's own feature before its token, while what
    lies before the chain is the target's still: as in drafting. (Li et al. 2025, arXiv 2503.01840, train so.)
    """
    embedded = draft.get_input_embeddings()(texts.tokens)
    length, features, said = embedded.shape[1], texts.features, list[Tensor]()
    cache, positions = DynamicCache(), torch.arange(length, device=embedded.device)[None]
    for made in range(depth):
        outputs = draft.base_model(
            inputs_embeds=draft.fuse(embedded, features),
            position_ids=positions,
            attention_mask=additive(_seen(length, made).to(embedded.device), embedded.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        said.append(outputs.last_hidden_state)
        features = torch.cat([texts.features[:, :1], said[-1][:, :-1]], 1)
    return said


def _seen(length: int, made: int) -> Bool[Tensor, "1 1 length keys"]:
    """Who sees which keys of this pass and those before, where so many guesses have been ``made``: the target's as far
    as the chain's beginning, and of each later pass the chain's own."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    passes = [key <= query - made, *(key == query - made + number for number in range(1, made + 1))]
    return torch.cat(passes, 1)[None, None]


def loss(draft: Any, samples: Sequence[Sample]) -> Float[Tensor, ""]:
    """Mean over tokens and guesses: cross-entropy to the target's law, and how far the feature is from the target's.

    EAGLE: Li et al. 2024, arXiv 2401.15077.
    """
    texts, law = Texts.of(samples, draft.device), law_of(samples, draft.device)
    starts = torch.tensor([0, *(len(sample.written) for sample in samples)]).cumsum(0)
    total = torch.zeros((), device=draft.device)
    for made, said in enumerate(unrolled(draft, texts, UNROLLED)):
        rows, columns = texts.places(made)
        flat = starts[rows] + columns + 1  # the law after a token stands at the next
        guess, true = said[rows, columns], texts.next[rows, columns]
        entropy = cross_entropy(draft, guess, law.take(flat))
        total = total + (entropy + PULL * apart(guess, true)).mean() / UNROLLED
    return total


def validate(draft: Any, samples: Sequence[Sample], depth: int = DEPTH) -> float:
    """Tokens per step of greedy chains."""
    return tokens_per_step(_hits(draft, sample, depth) for sample in samples)


def _hits(draft: Any, sample: Sample, depth: int) -> Bool[np.ndarray, "depth places"]:
    said = unrolled(draft, Texts.of([sample], draft.device), depth)
    return np.stack([right(draft, each[0], sample.written[1:]) for each in said])
