"""A sample of the table that `make architectures` writes: each kind of attention, position and cache once."""

from __future__ import annotations

import architectures
import pytest

SAMPLE = {
    "llama": "tree",
    "gpt2": "tree",  # learnt positions
    "mistral": "tree",  # a sliding window in every layer
    "gemma3_text": "tree",  # a mask for each layer type
    "moshi": "tree",  # a sliding cache under a mask that does not slide
    "bloom": "chain",  # positions read off the columns of the mask
    "qwen3_next": "chain",  # recurrent states, restored and replayed
    "mamba": "plain",  # a pass over several tokens forgets the state before it
}


@pytest.mark.parametrize(("model_type", "level"), SAMPLE.items())
def test_level_and_equal_output(model_type: str, level: str) -> None:
    row = architectures.examine(model_type)
    assert row["level"] == level, row
    assert bool(row["note"]) == (level != "tree")
    if level != "plain":
        assert float(row["tokens_per_step"]) > 1.5


def test_a_different_output_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.sampling import Sampler

    monkeypatch.setattr(Sampler, "sequences", lambda self, ids: ids)
    assert architectures.examine("llama")["level"] == "different"


def test_a_type_that_cannot_be_built_says_why() -> None:
    row = architectures.examine("nonesuch")
    assert row["level"] == "not built"
    assert "nonesuch" in row["note"]
