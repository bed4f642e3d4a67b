"""Long texts that hide what is asked for, and a small model of Llama's shape that has learnt to find it.

A text is noise with records in it: ``head value ... value pointer ;`` where the pointer is the head of another record.
Asked for a head, the model writes that record's values and pointer, then the record that this names, and so on. Only
the text says what comes next, and at every pointer it is somewhere else in the text.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.training import loop

END, ASK, NOISE, WORDS, VOCABULARY = 1, 2, 3, 64, 1024  # the first noise token, the first one of records, all tokens
SIZE = 8  # tokens that are written of each record
FARTHEST = 1 << 16  # positions that training draws from
BATCH, RECORDS, LENGTH = 8, 8, 192  # of a training step


class Text(NamedTuple):
    """Noise with records, the heads in the order in which records name one another, and what follows each head."""

    tokens: Int[np.ndarray, " length"]
    heads: Int[np.ndarray, " records"]
    chain: Int[np.ndarray, " tokens"]

    def asked(self, record: int) -> Int[np.ndarray, " more"]:
        """The text with a question for one of the records."""
        return np.append(self.tokens, [ASK, self.heads[record]])

    def answer(self, record: int, tokens: int) -> Int[np.ndarray, " tokens"]:
        """What is to follow that question."""
        return np.resize(np.roll(self.chain, -record * SIZE), tokens)


def text(length: int, records: int, seed: int | tuple[int, ...]) -> Text:
    """Noise with so many records at drawn places; no token is in two of them, but as pointer."""
    rng = np.random.default_rng(seed)
    words = rng.permutation(np.arange(WORDS, VOCABULARY))[: records * SIZE].reshape(records, SIZE)
    chain = np.roll(words.flatten(), -1)
    whole = np.column_stack([words, np.roll(words[:, 0], -1), np.full(records, END)])[rng.permutation(records)]
    noise = rng.integers(NOISE, WORDS, length - whole.size)
    pieces = np.split(noise, np.sort(rng.integers(0, len(noise) + 1, records)))
    tokens = np.concatenate([pieces[0], *(part for pair in zip(whole, pieces[1:], strict=True) for part in pair)])
    return Text(tokens, words[:, 0], chain)


def untrained(layers: int = 2, hidden: int = 256) -> Any:
    """A model whose attention begins with a direction: to look one token back, then for what is there now.

    Two such layers find what followed a token, and minutes would not do to come to them from chance. That so
    structured a start spares training: Trockman & Kolter 2023, arXiv 2305.09828. Embeddings begin with a number that
    tells noise from words, by which words look for words; what separates pointers from heads is learnt. The rotary
    base is large: half of each head turns so slowly that far places look like near ones.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, attention_bias=True, max_position_embeddings=2 * FARTHEST,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9}, initializer_range=0.01, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        _begin(model)
    return model


def _begin(model: Any) -> None:
    """The first half of the hidden numbers says what a token is, the second what came before it and what comes."""
    half, layers = model.config.hidden_size // 2, model.model.layers
    words = torch.randn(VOCABULARY, half) / half**0.5
    words[:, [half // 2 - 1, half - 1]] = torch.where(torch.arange(VOCABULARY) < WORDS, -0.4, 0.4)[:, None]
    model.model.embed_tokens.weight[:, :half] = words
    model.lm_head.weight[:, half:] = words
    for head in range(2):
        part, dims = slice(head * half // 2, (head + 1) * half // 2), torch.arange(half) + head * half
        _look_back(layers[0].self_attn, dims, part, model.model.rotary_emb.inv_freq)
        _look_for(layers[1].self_attn, dims, part)


def _look_back(attention: Any, dims: Tensor, part: slice, turns: Float[Tensor, " pairs"]) -> None:
    """One head's biases agree most where a key is one token before, and ``part`` of it moves to the second half."""
    pairs, half = len(turns), attention.o_proj.weight.shape[0] // 2
    strength = 10.0 * (torch.arange(pairs) < pairs * 2 // 5)
    attention.q_proj.bias[dims[:pairs]] = strength
    attention.k_proj.bias[dims[:pairs]] = strength * turns.cos()
    attention.k_proj.bias[dims[pairs:]] = strength * turns.sin()
    to, one = dims[: half // 2], torch.eye(half // 2)
    attention.v_proj.weight[to, part] += one / 16
    attention.o_proj.weight[half + part.start : half + part.stop, to] += one


def _look_for(attention: Any, dims: Tensor, part: slice) -> None:
    """One head's slow pairs compare ``part`` of what is there now with what came before; what is there moves on."""
    quarter, half = len(dims) // 4, len(dims)
    slow, one = torch.cat([dims[quarter : 2 * quarter], dims[3 * quarter :]]), torch.eye(half // 2)
    attention.q_proj.weight[slow, part] += 2.3 * one
    attention.k_proj.weight[slow, half + part.start : half + part.stop] += 2.3 * one
    attention.v_proj.weight[dims, :half] += torch.eye(half) / 11.3
    attention.o_proj.weight[half:, dims] += 2 * torch.eye(half)


def places(tokens: Int[np.ndarray, " length"], rng: np.random.Generator) -> Int[np.ndarray, " length"]:
    """Positions with a few gaps in the noise, so that short texts reach as far as long ones, as LongSpec's training."""
    gaps, noise = np.zeros(len(tokens), np.int64), np.flatnonzero((tokens >= NOISE) & (tokens < WORDS))
    cuts = rng.choice(noise, rng.integers(1, 8), replace=False)
    gaps[cuts] = rng.dirichlet(np.ones(len(cuts))) * (FARTHEST - len(tokens)) * rng.random()
    return np.arange(len(tokens)) + gaps.cumsum()


class Batch(NamedTuple):
    """Texts with their answers, which begin behind ``prompt`` tokens."""

    ids: Int[Tensor, "texts length"]
    positions: Int[Tensor, "texts length"]
    prompt: int


def batch(step: int, size: int = BATCH) -> Batch:
    """The texts of one training step."""
    drawn = [text(LENGTH, RECORDS, (1, step, i)) for i in range(size)]
    ids = [np.append(each.asked(0), each.answer(0, RECORDS * SIZE)) for each in drawn]
    positions = [places(each, np.random.default_rng((2, step, i))) for i, each in enumerate(ids)]
    return Batch(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(positions)), LENGTH + 2)


def loss(model: Any, given: Batch) -> Float[Tensor, ""]:
    """Of the answers' tokens, in nats per token."""
    hidden = model.model(given.ids, position_ids=given.positions).last_hidden_state[:, given.prompt - 1 : -1]
    return cross_entropy(model.lm_head(hidden).flatten(0, 1), given.ids[:, given.prompt :].flatten())


def trained(folder: Path, steps: int = 150, **shape: int) -> tuple[Any, loop.State]:
    """The model after so many steps, and how they went; what is in ``folder`` already is not done again."""
    model = untrained(**shape)
    return model, loop.train(model, batch, partial(loss, model), folder, steps, every=min(25, steps))
