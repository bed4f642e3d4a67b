"""Drafts that were distilled from their target: a few layers of their own between its embedding and its head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from specdec import storage
from specdec.drafters.early_exit import with_layers
from specdec.drafters.feature import FeatureDrafter
from specdec.drafters.small_model import SmallModelDrafter
from specdec.drafters.trimmed_head import TrimmedHead

KIND, VERSION = "draft", 1


class Fuse(nn.Module):
    """One input of a token's embedding and the target's feature before it, each of them brought to unit size.

    Untrained, their sum.

    Args:
        like: says how wide they are, in which number format, and where.
    """

    def __init__(self, like: Float[Tensor, "vocab width"]) -> None:
        super().__init__()
        width = like.shape[1]
        self.mix = nn.Linear(2 * width, width, bias=False, device=like.device, dtype=like.dtype)
        self.mix.weight = nn.Parameter(torch.eye(width).repeat(1, 2).to(like))

    def forward(
        self, embedded: Float[Tensor, "... width"], feature: Float[Tensor, "... width"]
    ) -> Float[Tensor, "... width"]:
        """The layer's input."""
        size = embedded.shape[-1:]
        fused: Tensor = self.mix(torch.cat([rms_norm(embedded, size), rms_norm(feature, size)], -1))
        return fused


def distilled(
    target: Any, layers: Sequence[int], kept: Int[np.ndarray, " kept"] | None = None, fused: bool = False
) -> Any:
    """A causal LM of copies of some of a target's layers; embedding and head are the target's own weights, frozen.

    Args:
        layers: numbers of the target's, ascending.
        kept: ids of the tokens that its head keeps; None for all.
        fused: whether it gets a part ``fuse`` too, to read the target's features with.

    Raises:
        ValueError: no such layers, or a head that is not one matrix.
    """
    shallow = with_layers(target, layers)
    embedding, head = shallow.get_input_embeddings(), shallow.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the head of {type(target).__name__} is not one matrix: {head}")
    frozen = (embedding.weight, head.weight)
    draft = copy.deepcopy(shallow, {id(weight): weight for weight in frozen})  # those are not copied
    if kept is not None:
        draft.set_output_embeddings(TrimmedHead(head.weight, torch.from_numpy(kept).long()))
    if fused:
        draft.fuse = Fuse(head.weight)
    for weight in own(draft).values():
        weight.requires_grad_(True)
    return draft.eval()


def own(draft: Any) -> dict[str, nn.Parameter]:
    """What a draft does not share with its target, by name."""
    shared = {id(part.weight) for part in (draft.get_input_embeddings(), _head(draft))}
    return {name: weight for name, weight in draft.named_parameters() if id(weight) not in shared}


def kept(draft: Any) -> Int[Tensor, " kept"] | None:
    """Ids of the tokens that a draft's head keeps; None for all."""
    head = draft.get_output_embeddings()
    return head.kept if isinstance(head, TrimmedHead) else None


def few_logits(draft: Any, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... kept"]:
    """Logits of the kept tokens alone."""
    logits: Tensor = _head(draft)(hidden)
    return logits


def _head(draft: Any) -> Any:
    head = draft.get_output_embeddings()
    return head.few if isinstance(head, TrimmedHead) else head


def save(path: Path, target: Any, draft: Any, layers: Sequence[int], told: Mapping[str, Any]) -> None:
    """Write what a draft does not share with its target, and which target that is.

    Args:
        layers: numbers of the target's that it began as.
        told: whatever else JSON can say of how it was made.
    """
    arrays = {f"weight.{name}": weight.detach().float().cpu().numpy() for name, weight in own(draft).items()}
    if (ids := kept(draft)) is not None:
        arrays["kept"] = ids.cpu().numpy()
    facts = {"target": _described(target), "layers": list(layers), "fused": hasattr(draft, "fuse"), "told": dict(told)}
    storage.write(path, KIND, VERSION, arrays, facts)


def load(path: Path, target: Any) -> Any:
    """The draft in a file, made of ``target``, in its number format and where it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or was made for another target.
    """
    arrays, facts = storage.read(path, KIND, VERSION)
    made, given = facts["target"], _described(target)
    if wrong := [fact for fact in made if made[fact] != given[fact]]:
        said = ", ".join(f"{fact} {made[fact]!r}, not {given[fact]!r}" for fact in wrong)
        raise ValueError(f"{path} drafts for another target, of {said}: train one for this target")
    draft = distilled(target, facts["layers"], arrays.get("kept"), facts["fused"])
    with torch.no_grad():
        for name, weight in own(draft).items():
            weight.copy_(torch.from_numpy(arrays[f"weight.{name}"]))
            weight.requires_grad_(False)
    return draft


def drafter(path: Path, target: Any, **arguments: Any) -> SmallModelDrafter:
    """The drafter of the draft in a file; ``arguments`` as for ``SmallModelDrafter`` or ``FeatureDrafter``."""
    draft = load(path, target)
    if hasattr(draft, "fuse"):
        return FeatureDrafter(draft, **arguments)
    return SmallModelDrafter(draft, **{"name": "draft", **arguments})


def _described(target: Any) -> dict[str, Any]:
    """What a draft's target must be alike in."""
    config = target.config.get_text_config(decoder=True)
    sizes = {"hidden size": config.hidden_size, "layers": config.num_hidden_layers, "vocabulary": config.vocab_size}
    return {"name": Path(target.config.name_or_path).name, **sizes}
