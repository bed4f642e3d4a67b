"""What a model can do, found by trying: which drafts it takes in one pass, and what a pass costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from specdec.attention import likely
from specdec.core import DraftTree, Unsupported
from specdec.costs import Costs
from specdec.graphed import GraphedSteps
from specdec.model import Form, Model, compiled, reaches
from specdec.timing import costs_of

# Where a pass over several tokens may round differently from single ones, as a share of the logits' own spread.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}

# The trial: a prompt, then a tree whose true path A-B-(C) lies at scattered indices, then a second tree after
# keeping A-B, so that masks, positions and the kept cache rows are all put to the test.
FIRST = DraftTree(
    tokens=np.arange(6), parents=np.array([-1, 0, 0, 2, 2, 4]), probability=np.ones(6, np.float32), source=("",) * 6
)
KEPT = (0, 2, 4)
SECOND = DraftTree(np.arange(6, 9), np.array([-1, 0, 0]), np.ones(3, np.float32), ("",) * 3)
FIRST_CHAIN = DraftTree.chain(0, [2, 4, 5], [1.0] * 3, "")
KEPT_CHAIN = (0, 1, 2)
SECOND_CHAIN = DraftTree.chain(6, [8], [1.0], "")


@dataclass(frozen=True, slots=True)
class Attachment:
    """What the self-test found.

    Attributes:
        form: how drafts are fed.
        costs: what passes cost; None where nothing can be fed.
        why_timed: why pass times saved earlier were not used; empty where nothing is wrong.
        graphs: of its greedy steps, as they get recorded.
    """

    form: Form
    costs: Costs | None = None
    why_timed: str = ""
    graphs: GraphedSteps = field(default_factory=GraphedSteps)


def attach(module: nn.Module, timed: bool = True) -> Attachment:
    """Try a tree, then a chain, on the model itself; time passes of a few sizes, in about a second.

    Logits are compared with plain ``generate`` forced along each path. The random state is left as it was.

    Args:
        timed: whether to time passes; without, there are no costs.
    """
    with torch.random.fork_rng(devices=_devices(module)):
        reasons = []
        for form in _forms(module):
            try:
                costs, why_timed = _trial(module, form, timed)
            except Exception as error:  # any model may refuse a tree in any way: that is the answer sought
                reasons.append(
                    f"{_name(form)}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
                continue
            return Attachment(_with_reason(form, reasons), costs, why_timed)
    return Attachment(Form("plain", reason="; ".join(reasons) or "no cache that can be taken back"))


def _devices(module: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)


def _forms(module: nn.Module) -> list[Form]:
    """The forms worth trying, the likeliest first."""
    config: Any = module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    attention, known = getattr(config, "_attn_implementation", None), reaches(config)
    if known is None:
        return [Form("chain")]
    own_mask = [len(known) > 1] if len(known) > 1 else [False, True]
    ours = "own" if compiled(module) else likely(module, config)
    switched = [Form("tree", each, attention=ours) for each in own_mask if ours != "own"]
    if attention not in ("sdpa", "eager"):  # flash attention takes no masks
        return [*switched, Form("chain")]
    forms = [Form("tree", each, attention == "eager") for each in own_mask]
    return [*switched, *forms, *[Form("tree", form.per_type, not form.additive) for form in forms], Form("chain")]


def _name(form: Form) -> str:
    return (
        form.level
        + (" with one mask per layer type" if form.per_type else "")
        + (" added to scores" if form.additive else "")
        + (f" by {form.attention} of our attention" if form.attention != "own" else "")
    )


def _with_reason(form: Form, reasons: list[str]) -> Form:
    reason = "; ".join(reasons) if form.level == "chain" else ""
    if form.level == "chain" and not reason:
        reason = "its layers or attention implementation have no tree form"
    return replace(form, reason=reason)


def _trial(module: nn.Module, form: Form, timed: bool) -> tuple[Costs | None, str]:
    """Raises where the form does not hold; returns what passes cost, and why saved times were not used."""
    first, kept, second = (FIRST, KEPT, SECOND) if form.level == "tree" else (FIRST_CHAIN, KEPT_CHAIN, SECOND_CHAIN)
    vocab = _vocab(module)
    ids = np.random.default_rng(0).integers(min(3, vocab - 1), vocab, 16)
    prompt, nodes = ids[:7], ids[7:]
    first, second = _spelt(first, nodes), _spelt(second, nodes)
    costs: list[tuple[Costs | None, str]] = []

    def passes(model: Model) -> list[torch.Tensor]:
        logits = [model.forward([first]).logits[0]]
        model.keep([kept])
        logits.append(model.forward([second]).logits[0])
        model.keep([[0]])
        costs.append(costs_of(model) if timed else (None, ""))
        return logits

    ours = _generate(module, form, prompt, passes)
    for path, rows in ((_paths(first), ours[0]), (_paths(second), ours[1])):
        before = [] if rows is ours[0] else first.tokens[list(kept)].tolist()
        for leaf in path:
            theirs = _forced(module, prompt, before + (second if before else first).tokens[leaf].tolist())
            _compare(rows[leaf], theirs[-len(leaf) :], module)
    return costs[0]


def _vocab(module: nn.Module) -> int:
    return int(module.config.get_text_config(decoder=True).vocab_size)  # type: ignore[union-attr, operator]


def _spelt(tree: DraftTree, nodes: np.ndarray) -> DraftTree:
    return DraftTree(nodes[tree.tokens], tree.parents, tree.probability, tree.source)


def _paths(tree: DraftTree) -> list[list[int]]:
    """Every root-to-leaf path."""
    paths = []
    for leaf in sorted(set(range(len(tree))) - set(tree.parents.tolist())):
        path = [leaf]
        while path[0]:
            path.insert(0, int(tree.parents[path[0]]))
        paths.append(path)
    return paths


def _generate(module: Any, form: Form, prompt: np.ndarray, run: Callable[[Model], Any]) -> Any:
    """Call ``run`` on a Model just where a decoding loop would start, with all that ``generate`` prepares."""

    def probe(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        target = Model(model, form)
        target.start(input_ids, generation_config, model_kwargs)
        return run(target)

    return _call(module, prompt, 64, custom_generate=probe)


def _ids(module: Any, tokens: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.tensor([list(map(int, tokens))], device=module.device)


def _call(module: Any, prompt: np.ndarray, new_tokens: int, **parts: Any) -> Any:
    """Greedy ``generate`` of ``new_tokens``; the model's own stop strings, time limits and so on are set aside."""
    own = getattr(module, "generation_config", None) or GenerationConfig()
    usual = GenerationConfig._get_default_generation_params()
    given = [name for name, value in own.to_dict().items() if value is not None and hasattr(GenerationConfig(), name)]
    settings: dict[str, Any] = {name: usual.get(name) for name in given if name not in ("transformers_version", *parts)}
    settings |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    settings |= {"num_return_sequences": 1, "pad_token_id": 0}
    return type(module).generate(module, _ids(module, prompt), **settings, **parts)


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Makes ``generate`` write given tokens."""

    def __init__(self, start: int, tokens: Sequence[int]) -> None:
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[min(at, len(self.tokens) - 1)]] = 0
        return forced


def _forced(module: Any, prompt: np.ndarray, tokens: Sequence[int]) -> torch.Tensor:
    """Plain ``generate``'s own logits after each of ``tokens``."""
    parts: dict[str, Any] = {"logits_processor": LogitsProcessorList([_Forced(len(prompt), tokens)])}
    parts |= {"output_logits": True, "return_dict_in_generate": True}
    output = _call(module, prompt, len(tokens) + 1, **parts)
    return torch.cat(output.logits)[1:]


def _compare(ours: torch.Tensor, theirs: torch.Tensor, module: Any) -> None:
    ours, theirs = ours.float(), theirs.float().to(ours.device)
    spread = float((theirs - theirs.mean(-1, keepdim=True)).abs().max())
    error = float((ours - theirs).abs().max())
    allowed = TOLERANCE.get(module.dtype, 1e-1) * spread
    if not error <= allowed:
        raise Unsupported(f"logits differ by {error:.2g} from plain decoding (allowed {allowed:.2g})")
