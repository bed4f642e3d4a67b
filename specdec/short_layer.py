"""A decoder layer of the Llama shape, quick for short passes in float32 on the CPU."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from specdec.short_stack import ShortStack

PARTS = {
    "": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "act_fn"),
}
NORMS_OF_HEADS = ("q_norm", "k_norm")
# Arguments that say nothing which is not said otherwise; hidden states are taken from outside the layer.
IGNORED = ("position_ids", "use_cache", "cache_position", "output_hidden_states")
TAKEN = ("sdpa", "specdec")  # attention implementations whose masks say True where to attend
NONE = np.empty(0, np.float32)
RECORDING = "transformers.utils.output_capturing"  # its hooks stay for good, and take nothing from sdpa's attention

Part = tuple[
    dict[str, Any], str, nn.Module, dict[int, Any], dict[int, Any]
]  # siblings, name, and hooks before and after
Held = tuple[dict[str, Any], str]  # a module's parameters, and the name of one


class ShortLayer:
    """A layer's ``forward`` in two calls of our own where there are few rows; the layer's own for all else.

    It stands in for layers that are RMSNorm, attention with rotary embeddings (Su et al., arXiv 2104.09864) and grouped
    heads, RMSNorm and SwiGLU, each half added to what came in: Llama, Mistral, Qwen 2 and 3, SmolLM and their like.
    Whether a layer is one is asked of its parts, and ``cpu.install`` asks it of the numbers. Weights are used where
    they lie; nothing is copied. The same result up to float32 rounding.

    Args:
        layer: a layer for which ``fits`` holds.
        most: rows up to which it is quicker.
        shared: what the layers of one model share.

    Attributes:
        stack: runs it together with the others; None where it runs alone.
    """

    stack: ShortStack | None = None

    def __init__(self, layer: Any, most: int, shared: Shared) -> None:
        self.layer, self.most, self.shared = layer, most, shared
        self.attention: Any = layer.self_attn
        places = [(parent._modules, name, parent._modules[name]) for parent, name in _places(layer)]
        self.parts: list[Part] = [(*place, place[2]._forward_pre_hooks, place[2]._forward_hooks) for place in places]
        self._read()

    def _read(self) -> None:
        """Look at the weights where they are now."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        linears: list[Any] = [getattr(attention, name) for name in PARTS["self_attn"]]
        linears += [getattr(mlp, name) for name in PARTS["mlp"][:3]]
        norms = [self.layer.input_layernorm, self.layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in NORMS_OF_HEADS]
        own = [each._parameters for each in (*linears, *norms) if each is not None]
        self.held: list[Held] = [
            (parameters, name) for parameters in own for name in parameters if parameters[name] is not None
        ]
        self.addresses = addresses(self.held)
        self.wq, self.wk, self.wv, self.wo, self.wg, self.wu, self.wd = (_array(each.weight) for each in linears)
        self.bq, self.bk, self.bv, self.bo, self.bg, self.bu, self.bd = (_array(each.bias) for each in linears)
        self.norm, self.second_norm, self.q_norm, self.k_norm = (_array(n and n.weight) for n in norms)
        self.eps = float(_eps(norms[0]))
        self.dim, self.scale = int(attention.head_dim), float(attention.scaling)

    @property
    def tables(self) -> tuple[tuple[np.ndarray, ...], ...]:
        """Weights, biases, and norms; of length 0 where there are none."""
        weights = self.wq, self.wk, self.wv, self.wo, self.wg, self.wu, self.wd
        biases = self.bq, self.bk, self.bv, self.bo, self.bg, self.bu, self.bd
        return weights, biases, (self.norm, self.second_norm, self.q_norm, self.k_norm)

    def __getstate__(self) -> dict[str, Any]:
        """All but the numbers: a copy has its own, and looks at them when it is first called."""
        state = {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}
        return {**state, "addresses": []}

    def __call__(self, hidden_states: Float[torch.Tensor, "batch nodes width"], *args: Any, **kwargs: Any) -> Any:
        """As the layer's own ``forward``; writes the rows' keys and values to the cache."""
        if self.stack is not None and not args:
            done = self.stack.run(self, hidden_states, **kwargs)
            if done is not None:
                return done
        if args or not self.can(hidden_states, **kwargs):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        return self._run(hidden_states, mask, kwargs["position_embeddings"], kwargs["past_key_values"])

    def can(
        self,
        x: torch.Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> bool:
        """Whether this pass may be ours."""
        mask, turns, cache = attention_mask, position_embeddings, past_key_values
        batch, nodes, _ = x.shape
        if not self.runs(batch * nodes) or x.dtype != torch.float32 or x.device.type != "cpu" or cache is None:
            return False
        if self.layer.training or not isinstance(turns, tuple):
            return False
        masked = mask.dtype == torch.bool and mask.shape[1] == 1 if isinstance(mask, torch.Tensor) else nodes == 1
        asked = any(value is not None and name not in IGNORED for name, value in others.items())
        return masked and not asked and self.untouched()

    def runs(self, rows: int) -> bool:
        """Whether so few rows may be ours, where nothing is recorded and attention is not somebody else's just now."""
        others = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        # looking the attribute itself up there runs code
        taken = vars(self.attention.config)["_attn_implementation_internal"] in TAKEN
        return rows <= self.most and taken and not others

    def norms_as(self, norm: Any) -> bool:
        """Whether another norm differs from this layer's in its weight only."""
        alike = type(norm) is type(self.layer.input_layernorm) and "forward" not in vars(norm)
        return alike and _eps(norm) == self.eps and norm.weight.shape == self.norm.shape and plain(norm.weight)

    def untouched(self) -> bool:
        """Whether the parts are still the layer's own, and nobody listens to them."""
        return alone(self.parts) and self.found()

    def found(self) -> bool:
        """Whether the weights are where they were, or have been looked up where they are now."""
        if self.addresses == addresses(self.held):
            return True
        if not all(plain(parameters[name]) for parameters, name in self.held):
            return False
        self._read()
        return True

    def _run(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, turns: tuple[torch.Tensor, torch.Tensor], cache: Any
    ) -> torch.Tensor:
        from specdec.kernels import layer_numba  # compiles or loads: on first use
        from specdec.kernels.linear_numba import room

        batch, nodes, width = hidden.shape
        x = hidden.reshape(batch * nodes, width).contiguous().numpy()
        cos, sin, seen, threads = self.shared.read(turns, mask, batch, nodes)
        q, k, v = (room(len(x), len(w)) for w in (self.wq, self.wk, self.wv))
        layer_numba.before_cache(
            x, self.norm, self.eps, self.wq, self.wk, self.wv, self.bq, self.bk, self.bv, self.q_norm, self.k_norm,
            cos, sin, q, k, v, self.dim, threads,
        )  # fmt: skip
        new = (torch.from_numpy(a).view(batch, nodes, -1, self.dim).transpose(1, 2) for a in (k, v))
        keys, values = cache.update(*new, self.attention.layer_idx)
        assert not len(seen) or seen.shape[2] == keys.shape[2], "a mask has a column for each of the cache's slots"
        y = np.empty_like(x)
        rest = (
            self.wo, self.bo, self.second_norm, self.eps, self.wg, self.wu, self.wd, self.bg, self.bu, self.bd, y,
            threads,
        )  # fmt: skip
        shared = getattr(cache.layers[self.attention.layer_idx], "shared", None)
        if shared is None:
            layer_numba.after_cache(
                x, q, _flat(keys), keys.stride()[:3], _flat(values), values.stride()[:3], tuple(keys.shape), seen,
                self.scale, *rest,
            )  # fmt: skip
        else:  # a beginning that all rows have in common
            read, (first_keys, first_values) = room(*q.shape), shared
            layer_numba.shared_attention(
                q, _flat(first_keys), first_keys.stride()[:3], _flat(first_values), first_values.stride()[:3],
                first_keys.shape[2], _flat(keys), keys.stride()[:3], _flat(values), values.stride()[:3],
                tuple(keys.shape), seen, self.scale, read,
            )  # fmt: skip
            layer_numba.after_attention(x, read, *rest)
        return torch.from_numpy(y).view(batch, nodes, width)


def alone(parts: Sequence[Part]) -> bool:
    """Whether all parts of layers are where they were, with ``forward``s of their own, and nobody listens to them."""
    for siblings, name, part, before, after in parts:
        if siblings[name] is not part or before or "forward" in part.__dict__:
            return False
        if after and any(hook.__module__ != RECORDING for hook in after.values()):
            return False
    return True


def addresses(held: Sequence[Held]) -> list[int]:
    """Where the numbers of parameters are."""
    return [parameters[name].data_ptr() for parameters, name in held]


class Shared:
    """A pass's rotary embeddings and mask, made ready once for all its layers."""

    def __init__(self) -> None:
        self._last: Any = (None, None, ())

    @property
    def used(self) -> bool:
        """Whether any pass has been run."""
        return bool(self._last[2])

    def read(
        self, turns: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None, batch: int, nodes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """cos and sin [batch * nodes, rotated], mask [batch, nodes, slots] or empty, and the number of threads."""
        last = self._last  # read once: another thread's pass may replace it
        if last[0] is turns and last[1] is mask:
            return last[2]  # type: ignore[no-any-return]
        from specdec.kernels import linear_numba

        threads = torch.get_num_threads()
        linear_numba.use_threads(threads)
        cos, sin = (t.expand(batch, nodes, -1).reshape(batch * nodes, -1).contiguous().numpy() for t in turns)
        seen = (
            np.empty((0, 0, 0), np.bool_) if mask is None else mask[:, 0].expand(batch, nodes, -1).contiguous().numpy()
        )
        ready = cos, sin, seen, threads
        self._last = turns, mask, ready
        return ready


def fits(layer: Any) -> bool:
    """Whether a layer has the parts of a ShortLayer, and no others, with float32 weights on the CPU."""
    places = _places(layer)
    if len(places) < sum(map(len, PARTS.values())) or len(list(layer.modules())) != len(places) + 1:
        return False
    parts = {name: parent._modules[name] for parent, name in places}
    linears = [parts[name] for name in (*PARTS["self_attn"], *PARTS["mlp"][:3])]
    norms = [part for name, part in parts.items() if name.endswith("norm")]
    if not all(type(part) is nn.Linear for part in linears) or not all("weight" in part._parameters for part in norms):
        return False
    owned = {id(tensor) for part in (*linears, *norms) for tensor in part._parameters.values()}
    own = all(plain(tensor) and id(tensor) in owned for tensor in layer.parameters())
    untouched = all("forward" not in vars(module) for module in layer.modules())
    alike = len({_eps(part) for part in norms}) == 1 and _eps(norms[0]) > 0
    return own and untouched and alike and not list(layer.buffers()) and _shaped(parts) and _gates(parts["act_fn"])


def _shaped(parts: dict[str, Any]) -> bool:
    """Whether heads and widths are such as the kernels take for granted."""
    from specdec.kernels.tile_numba import LANES

    attention, names = parts["self_attn"], ("head_dim", "scaling", "config", "layer_idx")
    if not all(hasattr(attention, name) for name in names) or attention.head_dim % LANES:
        return False
    if "position_ids" in inspect.signature(type(attention).forward).parameters:  # scores that depend on them
        return False
    q, k, v, o, g, u, d = (tuple(parts[name].weight.shape) for name in (*PARTS["self_attn"], *PARTS["mlp"][:3]))
    heads = k[0] % attention.head_dim == 0 and q[0] % k[0] == 0
    norms = all(parts[name].weight.shape == (attention.head_dim,) for name in NORMS_OF_HEADS if name in parts)
    alike = (parts["gate_proj"].bias is None) == (parts["up_proj"].bias is None)
    return alike and heads and norms and k == v and g == u and o == q[::-1] and d == g[::-1] and g[1] == q[1] == k[1]


def _gates(act: nn.Module) -> bool:
    """Whether it is SiLU."""
    x = torch.linspace(-9, 9, 99)
    with torch.no_grad():
        return torch.allclose(act(x), functional.silu(x), atol=1e-6)


def plain(tensor: torch.Tensor) -> bool:
    """Whether it is float32 numbers in a row on the CPU; a quantised tensor only says so."""
    kind = type(tensor) is nn.Parameter and type(tensor.data) is torch.Tensor and tensor.dtype == torch.float32
    return kind and tensor.device.type == "cpu" and tensor.is_contiguous()


def _places(layer: Any) -> list[tuple[Any, str]]:
    """Where each part hangs; parts that are not there are left out."""
    parents = {name: layer._modules.get(name) if name else layer for name in PARTS}
    places = [(parents[name], part) for name, parts in PARTS.items() for part in parts]
    places += [(parents["self_attn"], part) for part in NORMS_OF_HEADS]
    return [(parent, part) for parent, part in places if parent is not None and parent._modules.get(part) is not None]


def _eps(norm: Any) -> float:
    """A small number that only RMSNorm-like parts have."""
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    """Its numbers where they lie, without keeping them alive once the model has others."""
    if tensor is None:
        return NONE
    numbers = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    return np.ctypeslib.as_array(numbers).reshape(tensor.shape)


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """The memory from a tensor's first number to its last."""
    span = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.as_strided((span,), (1,)).numpy()
