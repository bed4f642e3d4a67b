"""The equality grid: what a case is, what plain ``generate`` says about it, and how a speculative run differs.

Plain ``generate`` runs once per prompt and arguments; every drafter's run is compared with that. Stateful arguments are
made afresh for each run. Comparing returns differences in words, so that a broken build can be shown to have some.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteria
from transformers import StoppingCriteriaList as Rules

import specdec
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import MergedDrafter, NgramDrafter, RecyclingDrafter
from specdec.policies import FixedPolicy

VOCAB, PAD, NEW = 97, 1, 20
WINDOW = 4  # drafts are deeper than this
EOS = [2, 11, 23, 37, 52, 68, 80, 95]
LEAST_MARGIN = 1e-4  # prompts at which plain generate chose less clearly are left out: rounding may turn those
EXACT = 1e-5  # of the logits' spread

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "sliding": ("Mistral", {"sliding_window": WINDOW}),
    "mixed": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW}),
    "mixed_gemma": ("Gemma3", {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
}
ATTENTION = ("sdpa", "eager")
BATCHES = (1, 2, 3, 4)


def tiny(layers: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random two-layer model whose output depends on far tokens and whose choices are rarely close."""
    family, extra = LAYERS[layers]
    if "mixed" in layers:
        extra = {**extra, "layer_types": ["sliding_attention", "full_attention"]}
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
        tie_word_embeddings=False, initializer_range=0.2, attn_implementation=attention, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)
    model.lm_head.weight.data *= 3
    return model


# What a call can ask for. Each entry makes the arguments afresh; "eos_token_id" gives way to a stopping rule's own.


class Diary(LogitsProcessor):
    """A user's processor with a memory: its bias depends on every token so far, each of which it must see once."""

    def __init__(self) -> None:
        self.seen: torch.Tensor | None = None
        self.sum = torch.zeros(1, 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            assert torch.equal(input_ids[:, :-1], self.seen), "called out of order"
            self.sum = self.sum + input_ids[:, -1:]
        self.seen = input_ids.clone()
        return scores + 2 * torch.sin(self.sum + torch.arange(VOCAB))


def allowed(row: int, sentence: torch.Tensor) -> list[int]:
    """Which tokens may follow, by batch row and length; always a third of them."""
    return list(range(3 + (row + len(sentence)) % 3, VOCAB, 3))


PROCESSORS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": lambda: {},
    "repetition_penalty": lambda: {"repetition_penalty": 1.4},
    "no_repeat_ngram": lambda: {"no_repeat_ngram_size": 1},
    "bad_words": lambda: {"bad_words_ids": [[token] for token in range(5, 60, 3)] + [[4, 6], [7, 9, 12]]},
    "min_new_tokens": lambda: {"min_new_tokens": 13, "eos_token_id": EOS},
    "exponential_decay": lambda: {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": EOS},
    "suppress_tokens": lambda: {"suppress_tokens": list(range(3, 60, 2)), "begin_suppress_tokens": list(range(60, 80))},
    "forced_eos": lambda: {"forced_eos_token_id": 11, "eos_token_id": 11},
    "sequence_bias": lambda: {"sequence_bias": [[[token], 3.0] for token in range(4, 40, 6)] + [[[10, 16], -9.0]]},
    "renormalize": lambda: {"renormalize_logits": True, "remove_invalid_values": True},
    "user": lambda: {"logits_processor": LogitsProcessorList([Diary()])},
    "prefix_allowed": lambda: {"prefix_allowed_tokens_fn": allowed},
    "guidance": lambda: {"guidance_scale": 1.5},
    "watermark": lambda: {"watermarking_config": transformers.WatermarkingConfig(bias=2.5, seeding_scheme="lefthash")},
    "several": lambda: PROCESSORS["repetition_penalty"]() | PROCESSORS["sequence_bias"]() | {
        "no_repeat_ngram_size": 2, "suppress_tokens": list(range(3, 40, 4)), "min_new_tokens": 5, "eos_token_id": EOS,
    },
    "user_and_more": lambda: PROCESSORS["user"]() | PROCESSORS["bad_words"]() | PROCESSORS["prefix_allowed"]() | {
        "repetition_penalty": 1.2,
    },
}  # fmt: skip


class Third(StoppingCriteria):
    """A user's stopping rule with a memory: each row ends at the third token divisible by four, seen one by one."""

    def __init__(self) -> None:
        self.length, self.count = 0, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert self.length in (0, input_ids.shape[1] - 1), "called out of order"
        self.length = input_ids.shape[1]
        self.count = self.count + (input_ids[:, -1] % 4 == 0).long()
        return self.count >= 3


def tokenizer() -> PreTrainedTokenizerFast:
    """Token ``i`` is two letters, so that a stop string can begin in one token and end in the next."""
    words = {"abcdefghij"[i // 10] + "abcdefghij"[i % 10]: i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="aa"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


TOKENIZER = tokenizer()
STRINGS = ["ab", "cd", "fgh", "ia", "hjb"]

STOPS: dict[str, Callable[[], dict[str, Any]]] = {
    "max_new_tokens": lambda: {},
    "eos_list": lambda: {"eos_token_id": EOS},
    "stop_strings": lambda: {"stop_strings": STRINGS, "tokenizer": TOKENIZER},
    "stop_strings_and_eos": lambda: STOPS["stop_strings"]() | {"eos_token_id": EOS[:2]},
    "custom": lambda: {"stopping_criteria": Rules([Third()])},
    "custom_and_eos": lambda: STOPS["custom"]() | {"eos_token_id": EOS[:3], "max_time": 1000.0},
    "eos": lambda: {"eos_token_id": 11, "max_time": 1000.0},
}

CHOICES: dict[str, dict[str, Any]] = {
    "pure": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 1.6},
    "top_k": {"top_k": 8, "temperature": 1.3},
    "top_p": {"top_k": 0, "top_p": 0.9, "temperature": 1.5},
    "min_p": {"top_k": 0, "min_p": 0.04, "temperature": 1.5},
    "typical": {"top_k": 0, "typical_p": 0.9},
    "epsilon": {"top_k": 0, "epsilon_cutoff": 0.01},
    "eta": {"top_k": 0, "eta_cutoff": 0.02},
    "several": {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "temperature": 1.4},
}
FORMS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "cache": {"return_dict_in_generate": True},
    "all": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


@dataclass(frozen=True)
class Asked:
    """One way of calling ``generate``."""

    processors: str
    stop: str
    choice: str | None  # None is greedy
    rows: int
    seed: int
    new: int = NEW

    def arguments(self, form: str = "all") -> dict[str, Any]:
        """Fresh keyword arguments."""
        choice = {"do_sample": False} if self.choice is None else {"do_sample": True, **CHOICES[self.choice]}
        asked = choice | PROCESSORS[self.processors]() | STOPS[self.stop]() | FORMS[form]
        return {"max_new_tokens": self.new, **asked}

    def prompts(self, seed: int) -> dict[str, torch.Tensor]:
        """Left-padded prompts of different lengths, all longer than the window, with repeats."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (self.rows, 6), generator=draw).repeat(1, 2)[:, :11]
        mask = torch.ones_like(ids)
        for row in range(1, self.rows):
            mask[row, : (0, 3, 1, 5)[row]] = 0
        return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


Cell = tuple[str, str, int, bool]


def cells() -> list[Cell]:
    """Layers, attention, batch size, and whether to sample: what the rest is gone through for."""
    return list(itertools.product(LAYERS, ATTENTION, BATCHES, (False, True)))


def asked(cell: Cell) -> list[Asked]:
    """Three in four processors, with stopping rules and choices: in rotation, all pairs occur over the cells."""
    number, (_, _, rows, sample) = cells().index(cell), cell
    stops, choices = list(STOPS), list(CHOICES)
    return [
        Asked(
            name,
            stops[(i + number // 2) % len(stops)],
            choices[(2 * i + number // 2) % len(choices)] if sample else None,
            rows,
            1000 * number + i,
        )
        for i, name in enumerate(PROCESSORS)
        if (i + number // 2 + number // 8) % 4
    ]


def runs(cell: Cell, number: int) -> list[tuple[str, str]]:
    """Which drafters run the cell's so-manieth: the oracle and two others; and what each is to return."""
    shift, forms = cells().index(cell) + number, list(FORMS)
    return [
        (drafter, forms[(shift + n) % len(forms)])
        for n, drafter in enumerate(DRAFTERS)
        if drafter == "oracle" or (n + shift // 3) % 3
    ]


# The reference.


@dataclass
class Reference:
    """What plain ``generate`` returned, with the random state it left and what it goes on to write from its cache."""

    asked: Asked
    prompts: dict[str, torch.Tensor]
    output: Any
    state: torch.Tensor
    follow_up: torch.Tensor = field(init=False)

    @classmethod
    def of(cls, model: Any, asked: Asked) -> Reference:
        """Run plain ``generate`` at the first seed where every one of its choices is clear."""
        for seed in itertools.count(asked.seed, 100):
            prompts = asked.prompts(seed)
            torch.manual_seed(asked.seed)
            output = model.generate(**prompts, **asked.arguments())
            state = torch.get_rng_state()
            if margin(output.scores, asked) > LEAST_MARGIN:
                break
        reference = cls(asked, prompts, output, state)
        reference.follow_up = follow_up(model, reference, copy.deepcopy(output.past_key_values))
        return reference

    @property
    def texts(self) -> list[np.ndarray]:
        """Each row's tokens, without left padding, and some that would come after the end."""
        pads = (self.prompts["attention_mask"] == 0).sum(-1).tolist()
        return [row[pad:].numpy() for row, pad in zip(self.follow_up, pads, strict=True)]


def margin(scores: Sequence[torch.Tensor], asked: Asked) -> float:
    """By how much, in logits, the closest runner-up lost."""
    torch.manual_seed(asked.seed)
    leads = []
    for each in scores:
        noise = 0 if asked.choice is None else torch.empty_like(each).exponential_(1).log()
        best, second = (each.log_softmax(-1) - noise).topk(2).values.unbind(-1)
        leads.append(float((best - second).min()))
    return min(leads)


def follow_up(model: Any, reference: Reference, cache: Any) -> torch.Tensor:
    """What is written next, greedily, from a returned cache."""
    ids = reference.output.sequences
    mask = torch.ones_like(ids)
    mask[:, : reference.prompts["attention_mask"].shape[1]] = reference.prompts["attention_mask"]
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)


# The drafters.

DRAFTERS: dict[str, Callable[[], Any]] = {
    "oracle": lambda: Oracle(),
    "ngram": lambda: NgramDrafter(),
    "recycling": lambda: RecyclingDrafter(),
    "merged": lambda: MergedDrafter([NgramDrafter(), RecyclingDrafter()]),
}


class Oracle:
    """Knows the texts: hides the true continuation among junk, at any node index, and is now and then wrong.

    Junk is often a true token at a wrong place, which only a right mask, right positions and a right walk tell apart.
    """

    name, topk, hidden = "oracle", 0, False

    def __init__(self, seed: int = 0) -> None:
        self.texts: list[np.ndarray] = []
        self.random = np.random.default_rng(seed)

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        return [self._tree(*pair) for pair in zip(contexts, budgets, strict=True)]

    def _tree(self, context: Context, budget: Budget) -> DraftTree:
        n = len(context.tokens)
        known = (text[n:] for text in self.texts if np.array_equal(text[:n], context.tokens))
        future = next(known, context.tokens[:0])[: budget.depth].tolist()
        path = list(future)
        if path and self.random.random() < 0.3:
            path[self.random.integers(len(path))] = self._token()
        tree = Growing(int(context.tokens[-1]), budget)
        at = 0
        for token in path[: self.random.integers(len(path) + 1)] if self.random.random() < 0.3 else path:
            self._junk(tree, future)
            at = tree.add(at, token)
        self._junk(tree, future)
        return tree.done()

    def _token(self) -> int:
        return int(self.random.integers(3, VOCAB))

    def _junk(self, tree: Growing, future: Sequence[int]) -> None:
        for _ in range(self.random.integers(3)):
            decoy = future and self.random.random() < 0.6
            token = future[self.random.integers(len(future))] if decoy else self._token()
            tree.add(int(self.random.integers(len(tree.tokens))), token)


class Growing:
    """A tree under construction that never passes its budget."""

    def __init__(self, root: int, budget: Budget) -> None:
        self.tokens, self.parents, self.depth, self.budget = [root], [-1], [0], budget

    def add(self, parent: int, token: int) -> int:
        """The child's index: of the one there was, or of a new one; the parent itself where the budget is spent."""
        siblings = [i for i, p in enumerate(self.parents) if p == parent]
        same = [i for i in siblings if self.tokens[i] == token]
        full = len(siblings) >= self.budget.width or len(self.tokens) > self.budget.nodes
        if same or full or self.depth[parent] >= self.budget.depth:
            return same[0] if same else parent
        self.tokens.append(token)
        self.parents.append(parent)
        self.depth.append(self.depth[parent] + 1)
        return len(self.tokens) - 1

    def done(self) -> DraftTree:
        """The tree, with probabilities that fall from parent to child."""
        n = len(self.tokens)
        falling = 0.9 ** np.array(self.depth, np.float32)
        return DraftTree(np.array(self.tokens), np.array(self.parents), falling, ("", *["oracle"] * (n - 1)))


def wrapped(model: nn.Module, drafter: Any) -> Any:
    """A speculative twin that shares the model's weights and refuses rather than fall back."""
    return specdec.wrap(copy.copy(model), drafter, FixedPolicy(16, depth=7, width=4), on_unsupported="error")


# The comparison.


def differences(twin: Any, reference: Reference, form: str = "all") -> list[str]:
    """Run a case speculatively; say in words where it departs from plain ``generate``."""
    drafter = twin.generate.speculate.drafter
    if isinstance(drafter, Oracle):
        drafter.texts = reference.texts
    torch.manual_seed(reference.asked.seed)
    output = twin.generate(**reference.prompts, **reference.asked.arguments(form))
    state = torch.get_rng_state()
    found = list(_differences(output, reference, form))
    if not torch.equal(state, reference.state):
        found.append("random state afterwards")
    if form != "tokens" and isinstance(drafter, Oracle) and not found:
        goes_on = follow_up(twin, reference, output.past_key_values)
        if not torch.equal(goes_on, reference.follow_up):
            found.append("what is written next from past_key_values")
    return [f"{reference.asked} {form}: {each}" for each in found]


def _differences(output: Any, reference: Reference, form: str) -> Iterator[str]:
    sequences, plain = output if form == "tokens" else output.sequences, reference.output
    if not torch.equal(sequences, plain.sequences):
        yield f"tokens {sequences.tolist()} are not {plain.sequences.tolist()}"
        return  # the rest is bound to differ too
    if form == "tokens":
        return
    if not same_cache(output.past_key_values, plain.past_key_values):
        yield "past_key_values"
    for name in ("scores", "logits"):
        ours, theirs = getattr(output, name), getattr(plain, name)
        if form == "all" and error(ours, theirs) > EXACT:
            yield f"{name}, by {error(ours, theirs):.2g} of their spread"
        if form == "cache" and ours is not None:
            yield f"{name} that were not asked for"


def error(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference of two runs' logits as a share of their spread; infinite where not the same are -inf."""
    if len(ours) != len(theirs):
        return torch.inf
    a, b = torch.stack(tuple(ours)), torch.stack(tuple(theirs))
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return torch.inf
    return float((a - b)[finite].abs().max() / (b[finite].max() - b[finite].min()))


def same_cache(ours: Any, theirs: Any) -> bool:
    """Whether two caches have the same kinds of layers with the same rows."""
    return len(ours.layers) == len(theirs.layers) and all(
        type(a) is type(b) and a.get_seq_length() == b.get_seq_length() and close(a.keys, b.keys)
        and close(a.values, b.values)
        for a, b in zip(ours.layers, theirs.layers, strict=True)
    )  # fmt: skip


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding, relative to the largest entry."""
    return a.shape == b.shape and bool((a - b).abs().max() <= EXACT * b.abs().max())
