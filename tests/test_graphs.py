"""Recorded steps: that replays follow their inputs, and that greedy decoding by them is plain ``generate``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.cache_utils import Cache

from specdec.core import DraftTree
from specdec.graphs import CudaRecording, GraphedPass, StaticSlots, greedy_step
from specdec.kernels.ancestors import ancestors
from tests import tiny

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CAPACITY = 96


class Replayed:
    """Stands for a graph: runs the function, and like a graph keeps the address of what it returned."""

    made = 0

    def __init__(self, function):
        Replayed.made += 1
        self.function, self.out = function, function()

    def replay(self):
        self.out.copy_(self.function())


def seen(words, lengths, columns):
    """A dense mask of the ancestor bits, [rows, 1, nodes, columns]."""
    rows, nodes, _ = words.shape
    bits = (words[..., None] >> torch.arange(64, device=words.device) & 1).flatten(2)[:, :, :nodes].bool()
    slot = torch.arange(columns, device=words.device) - lengths[:, None, None]
    inside = (slot >= 0) & (slot < nodes)
    among = bits.gather(2, slot.clamp(0, nodes - 1).expand(rows, nodes, columns))
    return ((slot < 0) | (inside & among))[:, None]


def slots(prefilled, rows):
    """The layers of a prefilled cache, in slots that do not move and hold nonsense behind its tokens."""
    layers = []
    for layer in prefilled.layers:
        pair = []
        for filled in (layer.keys, layer.values):
            whole = torch.full((rows, filled.shape[1], CAPACITY, filled.shape[3]), 1e3, device=DEVICE)
            whole[:, :, : filled.shape[2]] = filled
            pair.append(whole)
        layers.append(StaticSlots(*pair))
    return layers


def drafted(truth, rng):
    """A shuffled tree with a few of the tokens to come on it, among others."""
    right = min(len(truth) - 1, int(rng.integers(0, 5)))
    tokens, parents, last = [truth[0]], [-1], 0
    for token in truth[1 : right + 1]:
        for other in rng.choice(90, int(rng.integers(0, 3)), replace=False):
            if other != token:
                tokens.append(int(other))
                parents.append(last)
        tokens.append(token)
        parents.append(last)
        last = len(tokens) - 1
    nodes = len(tokens)
    return DraftTree(np.array(tokens), np.array(parents), np.ones(nodes, np.float32), ("",) * nodes)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_greedy_decoding_is_plain_generates(kind):
    model, rng, rows = tiny.model(kind).to(DEVICE), np.random.default_rng(0), 2
    ids = tiny.prompt(9, rows).to(DEVICE)
    plain = model.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None)
    layers = slots(model(ids[:, :-1], use_cache=True).past_key_values, rows)
    cache = Cache(layers=layers)

    def forward(tokens, positions, words, lengths):
        mask = seen(words, lengths, CAPACITY)
        return model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, logits_to_keep=0
        ).logits

    Replayed.made = 0
    with torch.no_grad():
        graphed = GraphedPass(greedy_step(forward, layers, 3), rows, DEVICE, record=CudaRecording if GPU else Replayed)
        texts, widths = [row[:9] for row in plain.tolist()], set()
        while min(map(len, texts)) < 50:
            trees = [
                drafted(row[len(text) - 1 :], rng) if len(text) < 50 else DraftTree.root(text[-1])
                for row, text in zip(plain.tolist(), texts, strict=True)
            ]
            widths.add((max(map(len, trees)) - 1).bit_length())
            judged = graphed(trees, [len(text) - 1 for text in texts])
            for row, (tree, text) in enumerate(zip(trees, texts, strict=True)):
                path = judged.paths[row]
                text += [*tree.tokens[path[1:]].tolist(), int(judged.bonus[row])]
                assert judged.candidates[row, path[-1], 0] == judged.bonus[row]
                assert judged.candidates.shape[2] == 3
    for text, row in zip(texts, plain.tolist(), strict=True):
        assert text[:50] == row[:50]
    assert GPU or Replayed.made == len(widths) > 1


def counted(tokens, parents, depth, lengths):
    """A step without a model: the path is the nodes that see all before them, the bonus counts ancestors."""
    sees = sum((ancestors(parents) >> i) & 1 for i in range(parents.shape[1]))[:, :, 0]
    assert torch.equal(sees, depth + 1)
    return torch.cat([tokens, lengths[:, None], parents + 10], 1)


def test_what_differs_goes_in_and_padding_sees_itself_alone():
    graphed = GraphedPass(counted, 1, torch.device("cpu"), record=Replayed)
    for length, tokens in ((5, [7, 8, 9]), (6, [1, 2, 3, 4]), (9, [3, 3, 5])):
        tree = DraftTree.chain(tokens[0], tokens[1:], [1.0] * (len(tokens) - 1), "")
        judged = graphed([tree], [length])
        assert judged.paths[0].tolist() == [*tokens, 0][:4]
        assert judged.bonus.tolist() == [length]
        assert judged.candidates[0, :, 0].tolist() == [9, 10, 11, 12 if len(tokens) == 4 else 9]


def test_what_was_recorded_may_be_forgotten():
    graphed = GraphedPass(counted, 1, torch.device("cpu"), record=Replayed)
    Replayed.made = 0
    for _ in range(3):
        graphed([DraftTree.root(3)], [0])
    assert Replayed.made == 1
    graphed.forget()
    graphed([DraftTree.root(3)], [0])
    assert Replayed.made == 2


def test_a_tree_too_wide_is_refused():
    graphed = GraphedPass(counted, 1, torch.device("cpu"), widths=(1, 2), record=Replayed)
    with pytest.raises(ValueError, match="1 trees of up to 3 nodes; 1 of 2 fit"):
        graphed([DraftTree.chain(1, [2, 3], [1, 1], "")], [0])
    with pytest.raises(ValueError, match="2 trees"):
        graphed([DraftTree.root(1)] * 2, [0, 0])
