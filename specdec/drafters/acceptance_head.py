"""How likely a drafted token is to be accepted, as the model that drafted it can tell once it has read it."""

from __future__ import annotations

import os

import torch
from jaxtyping import Float
from torch import Tensor, nn

from specdec import storage

KIND, VERSION = "acceptance-head", 1


class AcceptanceHead(nn.Module):
    """Reads a drafting model's last hidden state at a guess, and says how likely the target accepts that guess.

    Residual blocks ``x + SiLU(W x + b)``, each with weights of its own, then two classes: rejected, accepted. Whatever
    the model's type, they compute in float32. ``specdec train head`` trains one.

    SpecDec++, Huang et al. 2024, arXiv 2405.19715; in its authors' code one block is applied several times.

    Args:
        width: of the hidden states.
        blocks: how many, from 0 on.
    """

    def __init__(self, width: int, blocks: int = 3) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.classes = nn.Linear(width, 2)

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... 2"]:
        """Logits of the two classes."""
        x = hidden.float()
        for block in self.blocks:
            x = x + nn.functional.silu(block(x))
        logits: Tensor = self.classes(x)
        return logits

    @torch.no_grad()
    def chance(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, ...]:
        """That the target accepts a guess at which its drafter had such a hidden state."""
        chance: Tensor = self(hidden).softmax(-1)[..., 1]
        return chance

    def save(self, path: str | os.PathLike[str], **facts: object) -> None:
        """Put it into one safetensors file, with facts for a reader, such as which model it is for."""
        arrays = {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}
        storage.write(path, KIND, VERSION, arrays, {**facts, "width": self.width, "blocks": len(self.blocks)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AcceptanceHead:
        """Read what ``save`` has written.

        Raises:
            FileNotFoundError, ValueError: as ``storage.read``.
        """
        arrays, facts = storage.read(path, KIND, VERSION)
        head = cls(facts["width"], facts["blocks"])
        head.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return head


def head_for(model: nn.Module, head: AcceptanceHead | str | os.PathLike[str]) -> AcceptanceHead:
    """A head, or that of a file, ready for what a model says.

    Raises:
        ValueError: it is for a model of another width.
    """
    head = head if isinstance(head, AcceptanceHead) else AcceptanceHead.load(head)
    width = model.config.get_text_config(decoder=True).hidden_size  # type: ignore[union-attr, operator]
    if head.width != width:
        raise ValueError(
            f"the acceptance head reads hidden states of width {head.width}, and those of this {type(model).__name__}"
            f" have {width}: train one for it with `specdec train head`"
        )
    return head.eval().to(model.device)  # type: ignore[arg-type]
