"""What the tests share: small random models, a drafter that knows the answer, and plain ``generate`` beside ours."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import specdec
from specdec import cpu
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import MergedDrafter
from specdec.policies import FixedPolicy

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

transformers.logging.set_verbosity_error()


def build(kind: str, **changes: Any) -> Any:
    """A random model of any architecture; every matrix is drawn anew, wide enough for clear choices."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.4)
    return model


def hybrids(reach: int) -> dict[str, dict[str, Any]]:
    """Settings of kinds some of whose layers look back no further than so many tokens, or within chunks of so many."""
    sliding, full = "sliding_attention", "full_attention"
    return {
        "Gemma3Text": {"layer_types": [sliding, full], "sliding_window": reach, "head_dim": 8},
        "Qwen2": {"layer_types": [full, sliding], "sliding_window": reach, "use_sliding_window": True},
        "Llama4Text": {
            "attention_chunk_size": reach,
            "layer_types": ["chunked_attention", full],
            "no_rope_layers": [1, 0],
            "moe_layers": [],
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
        },
    }


# Settings of kinds with recurrent states beside full attention.
RECURRENT: dict[str, dict[str, Any]] = {
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    # Whose layers have both.
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    "Zaya": {"moe_intermediate_size": 16, "num_experts": 2, "head_dim": 8, "router_hidden_size": 16},
}


def model(kind: str = "Llama", **changes: Any) -> Any:
    """A random causal LM of a kind named as in transformers, the same at every call, in evaluation mode."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def gpt2(**changes: Any) -> Any:
    """A random model with learnt positions."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, **{"n_positions": 64, "initializer_range": 0.6, **changes}
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def prompt(length: int = 9, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left, with their mask."""
    ids, longest = prompt(max(lengths), len(lengths)), max(lengths)
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


class Oracle:
    """Guesses the true next tokens of texts that it knows, at random indices amid junk.

    Args:
        texts: the whole texts, prompts included, without padding.
        topk: how many candidates to ask for, and not use.
    """

    name, hidden = "oracle", False

    def __init__(self, texts: Sequence[Sequence[int]] = (), topk: int = 0) -> None:
        self.texts = [np.array(text) for text in texts]
        self.topk = topk
        self.random = random.Random(0)
        self.calls = 0

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget."""
        self.calls += 1
        return [self.tree(context.tokens, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def known(self, tokens: np.ndarray) -> np.ndarray:
        """How the text goes on, if it is known."""
        n = len(tokens)
        return next((text[n:] for text in self.texts if np.array_equal(text[:n], tokens)), tokens[:0])

    def tree(self, tokens: np.ndarray, budget: Budget) -> DraftTree:
        """The first few true tokens as one path, and other nodes between them."""
        guesses, parents = [int(tokens[-1])], [-1]
        at = 0
        for token in self.known(tokens)[: self.random.randint(0, budget.depth)].tolist():
            self._junk(guesses, parents, budget)
            twins = [i for i in range(1, len(guesses)) if parents[i] == at and guesses[i] == token]
            if not twins and (len(guesses) > budget.nodes or parents.count(at) >= budget.width):
                break
            if not twins:
                guesses.append(token)
                parents.append(at)
            at = twins[0] if twins else len(guesses) - 1
        self._junk(guesses, parents, budget)
        n = len(guesses)
        probability = np.array([0.9 ** _depth(parents, i) for i in range(n)], np.float32)
        return DraftTree(np.array(guesses), np.array(parents), probability, ("", *["oracle"] * (n - 1)))

    def _junk(self, guesses: list[int], parents: list[int], budget: Budget) -> None:
        for _ in range(self.random.randint(0, 2)):
            parent, token = self.random.randrange(len(guesses)), self.random.randrange(3, VOCAB)
            twin = any(p == parent and g == token for p, g in zip(parents, guesses, strict=True))
            room = len(guesses) <= budget.nodes and parents.count(parent) < budget.width
            if room and not twin and _depth(parents, parent) < budget.depth:
                guesses.append(token)
                parents.append(parent)


def _depth(parents: list[int], node: int) -> int:
    depth = 0
    while node > 0:
        node, depth = parents[node], depth + 1
    return depth


def tokenizer() -> Any:
    """One token per character: 0 to 2 are special, the rest spells in ASCII from the space on."""
    letters = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(32 + i): 3 + i for i in range(VOCAB - 3)}}
    spelling = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    spelling.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    spelling.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


class Both(NamedTuple):
    """What plain ``generate`` and ours gave, and what ours counted."""

    plain: Any
    ours: Any
    stats: specdec.Stats


def texts(sequences: torch.Tensor, mask: torch.Tensor | None = None) -> list[list[int]]:
    """Rows of ``generate``'s output without their left padding."""
    skip = [0] * len(sequences) if mask is None else (mask == 0).sum(-1).tolist()
    return [row[n:] for row, n in zip(sequences.tolist(), skip, strict=True)]


def both(
    model: nn.Module,
    arguments: dict[str, Any] | Callable[[], dict[str, Any]],
    *,
    drafter: Any = None,
    seed: int = 0,
    on_unsupported: Any = "error",
    **more: Any,
) -> Both:
    """Run ``generate`` plainly, then with speculation: by default an Oracle of what plain ``generate`` wrote.

    Args:
        arguments: ``generate``'s; a function that makes them where they hold state.
    """
    make = arguments if callable(arguments) else lambda: dict(arguments)
    torch.manual_seed(seed)
    plain = model.generate(**make(), **more)
    if drafter is None:
        drafter = Oracle(texts(sequences(plain), {**make(), **more}.get("attention_mask")))
    with specdec.speculating(model, drafter, FixedPolicy(12, 5, 6), on_unsupported=on_unsupported):
        torch.manual_seed(seed)
        ours = model.generate(**make(), **more)
        return Both(plain, ours, specdec.stats(model))


def same(*args: Any, **kwargs: Any) -> Both:
    """``both``, checked: the same tokens, and guesses among them (an Oracle's are accepted)."""
    result = both(*args, **kwargs)
    assert sequences(result.ours).tolist() == sequences(result.plain).tolist()
    assert result.stats.fault_count == 0, result.stats.faults
    if kwargs.get("drafter") is None:
        assert result.stats.accepted > 0, result.stats
    return result


def sequences(output: Any) -> torch.Tensor:
    """The tokens of what ``generate`` returned."""
    return output if isinstance(output, torch.Tensor) else output.sequences


@contextmanager
def quietly() -> Iterator[None]:
    """Where falling back to plain ``generate`` is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", specdec.SpecdecWarning)
        yield


def outcome(run: Callable[[], Any]) -> Any:
    """What a call returns, or the type and text of what it raises."""
    try:
        result = run()
    except Exception as error:
        return type(error), str(error)
    return sequences(result).tolist()


def unhurried() -> Iterator[None]:
    """For a fixture: no part of a merged drafter is too slow, so that nothing goes by the clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergedDrafter.__init__, "__defaults__", (lambda: 0.0,))
        yield


@contextmanager
def quick_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our layers for up to 256 rows without measuring, in one thread: the same passes are ours on every machine."""
    monkeypatch.setattr(cpu, "_few", lambda weights: (256, 256))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
