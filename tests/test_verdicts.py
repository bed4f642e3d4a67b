"""What drafters are shown: the tokens so far, and what the target says at every node, accepted or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import Oracle, padded, prompt, texts

POLICY = FixedPolicy(12, 5, 6)
TOPK = 4


class Watcher(Oracle):
    """Keeps, of every call, what it was shown of each context and asked for."""

    def __init__(self, known: Any, topk: int = TOPK, hidden: bool = False) -> None:
        super().__init__(known, topk)
        self.hidden = hidden
        self.shown: list[tuple[list[int], Verdict, Budget, bool]] = []
        self.contexts: list[Context] = []

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        for context, budget in zip(contexts, budgets, strict=True):
            assert context.verdict is not None
            self.shown.append((context.tokens.tolist(), context.verdict, budget, context.finished))
            if not any(context is each for each in self.contexts):
                self.contexts.append(context)
        return super().draft(contexts, budgets)


def watched(model: Any, batch: dict[str, Any], more: Any = None, **options: Any) -> tuple[Watcher, list[list[int]]]:
    """A watcher of one generation, and the texts that came of it, without padding."""
    arguments = {**batch, **(more or {}), "max_new_tokens": 16, "eos_token_id": None}
    written = texts(model.generate(**arguments), batch.get("attention_mask"))
    watcher = Watcher(written, **options)
    with specdec.speculating(model, watcher, POLICY, on_unsupported="error", namespace="mine"):
        model.generate(**arguments)
    return watcher, written


def paths(tree: DraftTree) -> list[list[int]]:
    """The guesses from the root to each node."""
    found: list[list[int]] = [[]]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        found.append([*found[parent], token])
    return found


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.model(attn_implementation=request.param)


@pytest.mark.parametrize("batch", [padded(9), padded(9, 4)], ids=["one", "two"])
@pytest.mark.parametrize("arguments", [{}, {"repetition_penalty": 1.3}], ids=["quick", "processed"])
def test_candidates_and_hidden_states_at_every_node(
    model: Any, batch: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """From raw logits, each node's as if its path alone had been written."""
    watcher, _ = watched(model, batch, arguments, hidden=True)
    seen = 0
    for tokens, verdict, _, _ in watcher.shown:
        if verdict.prompt:
            continue
        before = tokens[: len(tokens) - len(verdict.tokens)]
        assert before[-1] == verdict.tree.tokens[0]
        for node, guesses in enumerate(paths(verdict.tree)):
            alone = model(torch.tensor([[*before, *guesses]]), output_hidden_states=True)
            assert verdict.candidates[node].tolist() == alone.logits[0, -1].topk(TOPK).indices.tolist()
            torch.testing.assert_close(verdict.hidden[node], alone.hidden_states[-1][0, -1], atol=2e-4, rtol=1e-4)
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
def test_the_prompts_own_verdict(model: Any, more: dict[str, Any]) -> None:
    watcher, written = watched(model, padded(9, 6), more)
    first = [each for each in watcher.shown if each[1].prompt]
    assert len(first) == 2
    for (tokens, verdict, _, _), text in zip(first, written, strict=True):
        n = len(verdict.tree)
        assert tokens == text[: len(tokens)]
        assert verdict.tree.tokens.tolist() == tokens[:-1][-n:]
        assert verdict.path.tolist() == list(range(n))
        assert verdict.tokens.tolist() == tokens[-1:]
        for at in range(n):
            alone = model(torch.tensor([tokens[: len(tokens) - n + at]])).logits[0, -1]
            assert verdict.candidates[at].tolist() == alone.topk(TOPK).indices.tolist()
        assert n == (len(tokens) - 1 if not more else 1)


def test_nothing_is_computed_that_nobody_asked_for(model: Any) -> None:
    watcher, _ = watched(model, {"input_ids": prompt()}, topk=0)
    for _, verdict, _, _ in watcher.shown:
        assert verdict.candidates is None
        assert verdict.hidden is None
        assert len(verdict.tree) == 1 or not verdict.prompt


@pytest.mark.parametrize("batch", [padded(9), padded(9, 4, 7)], ids=["one", "three"])
def test_the_text_as_it_grows(model: Any, batch: dict[str, Any]) -> None:
    watcher, written = watched(model, batch)
    assert len(watcher.contexts) == len(written)
    lengths = batch["attention_mask"].sum(-1).tolist()
    for context, text, length in zip(watcher.contexts, written, lengths, strict=True):
        assert context.tokens.tolist() == text
        assert context.prompt_length == length
        assert context.namespace == "mine"
        grown = [tokens for tokens, *_ in watcher.shown if tokens[:length] == text[:length]]
        assert all(tokens == text[: len(tokens)] for tokens in grown)
        assert [len(tokens) for tokens in grown] == sorted({len(tokens) for tokens in grown})


def test_the_end_is_shown_once_with_an_empty_budget(model: Any) -> None:
    watcher, written = watched(model, padded(9, 4))
    ends = [(tokens, budget) for tokens, _, budget, finished in watcher.shown if finished]
    assert [tokens for tokens, _ in ends] == written
    assert {budget.nodes for _, budget in ends} == {0}


def test_what_was_committed_is_the_path_and_one_more(model: Any) -> None:
    watcher, _ = watched(model, padded(9, 4))
    for tokens, verdict, _, _ in watcher.shown:
        if not verdict.prompt:
            assert len(verdict.path) == len(verdict.tokens)
            assert verdict.tree.tokens[verdict.path[1:]].tolist() == verdict.tokens[:-1].tolist()
            assert tokens[-len(verdict.tokens) :] == verdict.tokens.tolist()
            assert (verdict.tree.parents[verdict.path[1:]] == verdict.path[:-1]).all()
            assert verdict.seconds > 0


def test_a_view_of_the_text_does_not_change_under_its_holder(model: Any) -> None:
    held: list[tuple[np.ndarray, list[int]]] = []

    class Holder(Oracle):
        def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
            held.extend((context.tokens, context.tokens.tolist()) for context in contexts)
            return super().draft(contexts, budgets)

    with specdec.speculating(model, Holder(), POLICY):
        model.generate(prompt(), max_new_tokens=40, eos_token_id=None)
    assert all(view.tolist() == copied for view, copied in held)
