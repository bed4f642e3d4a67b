"""Every causal LM type of the installed transformers, built small: what drafts it takes, and whether output is plain's.

Each type runs in a process of its own with a time limit, since a configuration may hang or crash in many ways.

    python benchmarks/architectures.py                # all types, writes docs/architectures.md
    python benchmarks/architectures.py llama mamba    # some types, prints their rows
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "architectures.md"
LIMIT_SECONDS = 60
LEVELS = ("tree", "chain", "plain", "refused", "not built", "different")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "word_embed_proj_dim": 32,
    "emb_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "dim_ff": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "sliding_window": 8,
    "attention_window": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "ssm_state_size": 8,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rnn_hidden_size": 32,
    "lru_width": 32,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "rotary_dim": 8,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
# For hybrids whose few first layers would all be of one kind: two kinds in turn.
MORE = {"num_key_value_heads": 4, "attn_layer_indices": [1, 3], "hybrid_layer_ids": [1, 3], "mamba_expand": 2}
MIXED = [
    [first, second] * 2
    for first, second in (
        ("linear_attention", "full_attention"),
        ("conv", "full_attention"),
        ("mamba", "attention"),
        ("mamba", "hybrid"),
    )
]


def types() -> list[str]:
    """Model types that transformers maps to a causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str) -> Any:
    """A small random model of the type that plain ``generate`` runs; raises what the first attempt raised."""
    from transformers import AutoConfig

    attempts: list[Callable[[], Any]] = [
        lambda: shrunk(AutoConfig.for_model(model_type), SMALL),
        lambda: shrunk(AutoConfig.for_model(model_type), SMALL | {"num_key_value_heads": 4}),
        lambda: AutoConfig.for_model(model_type, **SMALL),
        lambda: AutoConfig.for_model(model_type, **SMALL | {"num_key_value_heads": 4}),
        *(
            lambda kinds=kinds: AutoConfig.for_model(model_type, **SMALL | MORE | {"layer_types": kinds})
            for kinds in MIXED
        ),
    ]
    first: Exception | None = None
    for attempt in attempts:
        try:
            model = random_model(attempt())
            prompt = prompt_ids()
            model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
            return model
        except Exception as error:  # the next attempt may do
            first = first or error
    assert first is not None
    raise first


def prompt_ids() -> Any:
    """Eleven tokens to go on from."""
    import torch

    return torch.randint(3, 97, (1, 11), generator=torch.Generator().manual_seed(2))


def shrunk(config: Any, sizes: dict[str, Any]) -> Any:
    """A configuration made small in place, wherever it has one of the known names for a size."""
    text = config.get_text_config(decoder=True)
    parts = [config, text, *(getattr(config, name, None) for name in config.sub_configs)]
    for part, (name, value) in itertools.product(parts, sizes.items()):
        with contextlib.suppress(Exception):  # a name that may not be read or set is left as it is
            now = getattr(part, name, None)
            if type(now) is type(value) or (type(now) is int and type(value) is float):
                setattr(part, name, value)
    kinds, name = vars(text).get("layer_types"), text.attribute_map.get("layer_types", "layer_types")
    if kinds and not isinstance(getattr(type(text), name, None), property):
        text.layer_types = (list(dict.fromkeys(kinds)) * sizes["num_hidden_layers"])[: sizes["num_hidden_layers"]]
    return config


def random_model(config: Any) -> Any:
    """The model of a configuration, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
        raise ValueError("cannot be made small from its configuration")
    widen(model)
    return model


def widen(model: Any) -> None:
    """Redraw the matrices large enough that tokens differ clearly; a model that always says the same shows nothing."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)


class Oracle:
    """Guesses the known answer amid wrong branches, so that every step verifies and keeps a real tree."""

    name, topk, hidden = "oracle", 0, False

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers

    def draft(self, contexts: Any, budgets: Any) -> Any:
        return [self._tree(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def _tree(self, context: Any, budget: Any) -> Any:
        import numpy as np

        from specdec.core import DraftTree

        root = int(context.tokens[-1])
        done = context.tokens.tolist()
        answer = next((a for a in self.answers if a[: len(done)] == done), done)
        true = answer[len(done) : len(done) + min(budget.depth, len(done) % 4)]
        if not budget.nodes or not true:
            return DraftTree.root(root)
        # A less likely wrong sibling before each true node, so that the true path lies at odd places, and a wrong
        # end, so that something is always rejected; both also where only the likeliest path is verified.
        tokens, parents, probability, at = [root], [-1], [1.0], 0
        for token in true:
            tokens += [wrong(token), token]
            parents += [at, at]
            probability += [0.05, 0.9 * probability[at]]
            at = len(tokens) - 1
        if len(true) < budget.depth:
            tokens.append(wrong(answer[min(len(done) + len(true), len(answer) - 1)]))
            parents.append(at)
            probability.append(0.9 * probability[at])
        source = ("oracle",) * len(tokens)
        return DraftTree(np.array(tokens), np.array(parents), np.array(probability, np.float32), source)


def wrong(token: int) -> int:
    """Some other token."""
    return 3 + (token + 5) % 90


def examine(model_type: str) -> dict[str, str]:
    """One row of the table."""
    import torch
    import transformers

    import specdec
    from specdec.policies import FixedPolicy

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        model = build(model_type)
        ids = prompt_ids()
        plain = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    except Exception as error:  # any of two hundred configurations may fail in its own way; the row says how
        return {"type": model_type, "level": "not built", "note": _said(error)}
    model_name = type(model).__name__
    specdec.wrap(model, Oracle([row.tolist() for row in plain]), FixedPolicy(12, 6, 4))
    try:
        ours = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    except Exception as error:  # likewise
        return {"type": model_type, "class": model_name, "level": "refused", "note": _said(error)}
    stats = specdec.stats(model)
    level = (stats.level or "plain") if stats.generations else "plain"
    equal = plain.shape == ours.shape and bool((plain == ours).all())
    note = "; ".join(stats.reasons)
    row = {"type": model_type, "class": model_name, "level": level if equal else "different", "note": note}
    return {**row, "tokens_per_step": f"{stats.tokens_per_step:.2f}" if stats.generations else ""}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def examine_apart(model_type: str) -> dict[str, str]:
    """``examine`` in a process of its own, forked so that nothing is imported twice."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_tell, args=(there, model_type), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(LIMIT_SECONDS):
            return {"type": model_type, "level": "not built", "note": f"no answer within {LIMIT_SECONDS} s"}
        row: dict[str, str] = here.recv()
        return row
    except EOFError:
        process.join()
        return {"type": model_type, "level": "not built", "note": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _tell(pipe: Any, model_type: str) -> None:
    pipe.send(examine(model_type))


def preload() -> None:
    """Import, and compile, what every process needs, before any is forked."""
    import torch

    torch.set_num_threads(1)
    examine("llama")


def report(rows: list[dict[str, str]]) -> str:
    """The table as Markdown."""
    import torch
    import transformers

    counts = ", ".join(f"{sum(row['level'] == level for row in rows)} {level}" for level in LEVELS)
    head = f"""# Architectures

Every causal LM type of transformers {transformers.__version__}, with torch {torch.__version__}, float32 on CPU.
Each is built small from its configuration class with random weights, and generates 24 greedy tokens from 11, once
plain and once wrapped with a drafter that guesses right amid wrong branches. Written by `make architectures`.

{len(rows)} types: {counts}.

- **tree**: any tree in one pass. **chain**: one path at a time. **plain**: runs as plain `generate`; the note says why.
- **refused**: wrapping raised. **not built**: the type could not be made small here, which says nothing about it.
- **different**: the output was not plain `generate`'s. There must be none.

| type | class | level | tokens per step | note |
|---|---|---|---|---|
"""
    return head + "".join(
        f"| {row['type']} | {row.get('class', '')} | {row['level']} | {row.get('tokens_per_step', '')} "
        f"| {row['note'].replace('|', '/')[:300]} |\n"
        for row in rows
    )


def main(arguments: list[str]) -> None:
    """Examine the named types, or all of them and write the report."""
    preload()
    rows = []
    for model_type in arguments or types():
        rows.append(examine_apart(model_type))
        print(*(rows[-1].get(key, "") for key in ("type", "level", "tokens_per_step", "note")), sep=" | ", flush=True)
    if not arguments:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report(rows))
    if any(row["level"] == "different" for row in rows):
        sys.exit("some outputs differ from plain generate")


if __name__ == "__main__":
    main(sys.argv[1:])
