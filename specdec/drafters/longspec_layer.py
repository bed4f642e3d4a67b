"""LongSpec's drafter as a module: one layer that reads its own newest tokens, then the target's last layer's rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from specdec import storage
from specdec.masks import Reach
from specdec.model import reaches

KIND, VERSION = "longspec", 1
Rotation = tuple[Float[Tensor, "nodes rotated"], Float[Tensor, "nodes rotated"]]  # cosines and sines


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a target that its layer is made for."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Those of a text model with this configuration."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocab=config.vocab_size,
            layers=config.num_hidden_layers,
        )

    def differs(self, other: Shape) -> str:
        """In what this shape is not the other; empty where nowhere."""
        ours, theirs = asdict(self), asdict(other)
        return ", ".join(f"{name} {ours[name]} and not {theirs[name]}" for name in ours if ours[name] != theirs[name])


class LongSpecLayer(nn.Module):
    """Window attention to its own rows, attention to the target's last layer's rows, and an MLP.

    Its own keys and values are made of tokens and their positions alone, since nothing comes before them: no draft can
    leave a trace in them. It has no embedding and no head, which are the target's. Unlike the published layer it has a
    last norm, since the target's head was trained behind one.

    Args:
        shape: of the target.
        inner: width of the MLP.
        window: its own rows that a token sees, itself among them.
        kept: token ids that it can say; None for all.
    """

    kept: Tensor | None

    def __init__(
        self, shape: Shape, inner: int, window: int = 512, eps: float = 1e-6, kept: Int[Tensor, " kept"] | None = None
    ) -> None:
        super().__init__()
        self.shape, self.inner, self.window, self.eps = shape, inner, window, eps
        self.register_buffer("kept", kept)
        hidden, attended, grouped = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.own_norm, self.cross_norm = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        self.mlp_norm, self.last_norm = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        self.own_q, self.own_k, self.own_v = (_matrix(hidden, n) for n in (attended, grouped, grouped))
        self.cross_q = _matrix(hidden, attended)
        self.own_o, self.cross_o = _matrix(attended, hidden), _matrix(attended, hidden)
        self.gate, self.up, self.down = _matrix(hidden, inner), _matrix(hidden, inner), _matrix(inner, hidden)

    def own_rows(
        self, x: Float[Tensor, "nodes hidden"], rotation: Rotation
    ) -> tuple[Float[Tensor, "kv_heads nodes dim"], Float[Tensor, "kv_heads nodes dim"]]:
        """Keys and values of embedded tokens."""
        x = self.own_norm(x)
        return rotated(self._heads(self.own_k(x)), rotation), self._heads(self.own_v(x))

    def own_query(self, x: Float[Tensor, "nodes hidden"], rotation: Rotation) -> Float[Tensor, "heads nodes dim"]:
        """What embedded tokens ask their window."""
        return rotated(self._heads(self.own_q(self.own_norm(x))), rotation)

    def cross_query(self, x: Float[Tensor, "nodes hidden"], rotation: Rotation) -> Float[Tensor, "heads nodes dim"]:
        """What tokens that have read their window ask the target's rows."""
        return rotated(self._heads(self.cross_q(self.cross_norm(x))), rotation)

    def after_own(
        self, x: Float[Tensor, "nodes hidden"], read: Float[Tensor, "heads nodes dim"]
    ) -> Float[Tensor, "nodes hidden"]:
        """Tokens with what they ``read`` in their window."""
        result: Tensor = x + self.own_o(read.transpose(0, 1).flatten(1))
        return result

    def after_cross(
        self, x: Float[Tensor, "nodes hidden"], read: Float[Tensor, "heads nodes dim"]
    ) -> Float[Tensor, "nodes hidden"]:
        """What the head reads, of tokens with what they ``read`` in the target's rows."""
        x = x + self.cross_o(read.transpose(0, 1).flatten(1))
        h = self.mlp_norm(x)
        result: Tensor = self.last_norm(x + self.down(silu(self.gate(h)) * self.up(h)))
        return result

    def forward(
        self,
        x: Float[Tensor, "nodes hidden"],
        rotation: Rotation,
        keys: Float[Tensor, "kv_heads nodes dim"],
        values: Float[Tensor, "kv_heads nodes dim"],
        blind: int,
    ) -> Float[Tensor, "nodes hidden"]:
        """What the head reads after every token of a text, in training.

        Args:
            x: the embedded text.
            keys, values: the target's rows of it.
            blind: each token sees none of the target's rows of itself and of the ``blind - 1`` tokens before it.
        """
        n = len(x)
        back = torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)
        near = (back >= 0) & (back < self.window)
        own = attend(self.own_query(x, rotation), *self.own_rows(x, rotation), mask=near)
        x = self.after_own(x, own)
        q = self.cross_query(x, rotation)
        read = torch.zeros_like(q[:, : min(blind, n)])
        if blind < n:  # the first tokens see nothing; for the others it is causal attention, so many rows earlier
            seen = attend(q[:, blind:], keys[:, : n - blind], values[:, : n - blind], causal=True)
            read = torch.cat([read, seen], 1)
        return self.after_cross(x, read)

    def _heads(self, x: Float[Tensor, "nodes all"]) -> Float[Tensor, "heads nodes dim"]:
        return x.view(len(x), -1, self.shape.head_dim).transpose(0, 1)

    def save(self, path: str | os.PathLike[str], target: str, told: Mapping[str, Any] | None = None) -> None:
        """Write it to one file, which changes at once or, on OSError, not at all.

        Args:
            target: its target's name.
            told: what else is to be known of it.
        """
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.state_dict().items()}
        facts = {"shape": asdict(self.shape), "inner": self.inner, "window": self.window, "eps": self.eps}
        storage.write(path, KIND, VERSION, arrays, facts | {"target": target, **(told or {})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LongSpecLayer:
        """What ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no layer's.
        """
        arrays, facts = storage.read(path, KIND, VERSION)
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        layer = cls(Shape(**facts["shape"]), facts["inner"], facts["window"], facts["eps"], state.get("kept"))
        layer.load_state_dict(state)
        return layer.eval()

    @classmethod
    def of(cls, model: Any, window: int = 512, kept: Int[Tensor, " kept"] | None = None) -> LongSpecLayer:
        """An untrained layer for a target: weights of its first and last layers, where they are named as Llama's."""
        config = model.config.get_text_config(decoder=True)
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        layer = cls(Shape.of(config), inner, window, getattr(config, "rms_norm_eps", 1e-6), kept)
        theirs = {**dict(model.get_decoder().named_modules()), "": model.get_decoder()}
        with torch.no_grad():
            for name, source in _sources(config.num_hidden_layers - 1).items():
                _begin(getattr(layer, name), theirs.get(source))
        return layer


def unlike(shape: Shape, model: Any) -> str:
    """Why a layer of this shape cannot draft for a model; empty if it can."""
    config = model.config.get_text_config(decoder=True)
    types, known = getattr(config, "layer_types", None), reaches(config)
    if differs := shape.differs(Shape.of(config)):
        return f"the layer was trained for another target: {differs}"
    if known is None or known[types[-1] if types else next(iter(known))] != Reach():
        return "the target's last layer does not look back without limit"
    if not hasattr(model.get_decoder(), "rotary_emb"):
        return f"{type(model).__name__} has no rotary embedding"
    return ""


def attend(
    q: Float[Tensor, "heads nodes dim"],
    k: Float[Tensor, "kv_heads slots dim"],
    v: Float[Tensor, "kv_heads slots dim"],
    mask: Tensor | None = None,
    causal: bool = False,
) -> Float[Tensor, "heads nodes dim"]:
    """What queries read in one text's rows, which are not copied for the heads of a group."""
    return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=causal, enable_gqa=True)[0]


def rotated(x: Float[Tensor, "heads nodes dim"], rotation: Rotation) -> Float[Tensor, "heads nodes dim"]:
    """Queries or keys turned to their positions, as Llama turns them: as many of the dimensions as there are angles."""
    cosine, sine = rotation
    n = cosine.shape[-1]
    a, b = x[..., : n // 2], x[..., n // 2 : n]
    return torch.cat([x[..., :n] * cosine + torch.cat([-b, a], -1) * sine, x[..., n:]], -1)


def _matrix(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _sources(last: int) -> dict[str, str]:
    """Which part of the target each part begins as: it meets bare embeddings as the first layer does."""
    own = {f"own_{x}": f"layers.0.self_attn.{x}_proj" for x in "qkvo"}
    cross = {f"cross_{x}": f"layers.{last}.self_attn.{x}_proj" for x in "qo"}
    mlp = {x: f"layers.{last}.mlp.{x}_proj" for x in ("gate", "up", "down")}
    norms = {"own_norm": "layers.0.input_layernorm", "cross_norm": f"layers.{last}.input_layernorm"}
    return own | cross | mlp | norms | {"mlp_norm": f"layers.{last}.post_attention_layernorm", "last_norm": "norm"}


def _begin(part: Any, source: Any) -> None:
    """Copy a matrix, or a norm's gain: what it makes of ones, since some norms keep the gain less one."""
    if isinstance(part, nn.Linear):
        if isinstance(source, nn.Linear) and source.weight.shape == part.weight.shape:
            part.weight.copy_(source.weight)
    elif type(source).__name__.endswith("RMSNorm"):
        part.weight.copy_(source(torch.ones_like(source.weight)))
