"""The target's own first layers, or some of them, as the drafter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from specdec import cpu
from specdec.core import Budget, Context, DraftTree
from specdec.drafters.small_model import SmallModelDrafter, Tree
from specdec.drafters.target_rows import TargetKeeper, TargetRows, unfit
from specdec.model import Model


class EarlyExitDrafter(SmallModelDrafter):
    """Guesses what the target would write if it had only some of its layers: they share the target's weights.

    Its KV rows are the target's own of those layers, as far as committed: it reads neither the prompt nor what was
    accepted. Where those cannot serve (padding, windows, no ``generate`` of the target itself), it has rows of its own.

    Self-speculative decoding: Zhang et al. 2023, arXiv 2309.08168 (skipped layers); Elhoushi et al. 2024,
    arXiv 2404.16710 (early exit).

    Args:
        model: the target.
        layers: how many of its first layers, or the numbers of those that are not skipped, ascending.
        lens: turns what the last of them says, after the model's last norm, into what its head reads; None for nothing.
        tree, temperature, branching, width, name, seed, cpu_kernels: as for ``SmallModelDrafter``.

    Raises:
        ValueError: no such layers, or a model whose layers are not found, or that takes no trees.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: int | Sequence[int],
        lens: nn.Module | None = None,
        tree: Tree = "chain",
        temperature: float | None = None,
        branching: Sequence[int] = (3, 2, 1, 1),
        width: int = 4,
        name: str = "early-exit",
        seed: int = 0,
        cpu_kernels: bool = True,
    ) -> None:
        kept = list(range(layers)) if isinstance(layers, int) else list(layers)
        shallow = with_layers(model, kept, lens)
        super().__init__(shallow, tree, temperature, None, None, branching, width, name, seed, cpu_kernels)
        self.layers = kept

    def bind(self, target: Model, contexts: Sequence[Context]) -> str:
        """Draft for these contexts, one for each row of the target, in the target's own rows if those can serve.

        Returns:
            "": it can do without.
        """
        if not unfit(target):
            keeper = TargetKeeper(TargetRows(self.model, self._keeper.form, target, self.layers), contexts)
            for context in contexts:
                context.scratch[self] = keeper
        return ""

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget."""
        keeper: TargetKeeper | None = contexts[0].scratch.get(self) if contexts else None
        if keeper is None or not keeper.current:
            return super().draft(contexts, budgets)
        drafted = dict[int, DraftTree]()
        if any(budget.nodes > 0 for budget in budgets):
            asked = {id(context): budget for context, budget in zip(contexts, budgets, strict=True)}
            every = [(context, asked.get(id(context), Budget(0, 0, 0))) for context in keeper.contexts]
            try:
                drafted = self._draft(every, {id(context): context.tokens for context, _ in every}, keeper)
            finally:
                keeper.rows.release()
        return [drafted.get(id(context)) or DraftTree.root(int(context.tokens[-1])) for context in contexts]


def with_layers(model: Any, kept: Sequence[int], lens: nn.Module | None = None) -> Any:
    """A model of some of another's layers, which shares its weights; the other is left as it is.

    Raises:
        ValueError: the layers are not found, or not numbers of some of them, ascending.
    """
    config = model.config.get_text_config(decoder=True)
    path = _stack(model, config.num_hidden_layers)
    if not kept or list(kept) != sorted(set(kept) & set(range(config.num_hidden_layers))):
        raise ValueError(
            f"layers {list(kept)}: give at least one of 0 to {config.num_hidden_layers - 1}, each once, ascending"
        )
    fewer = copy.deepcopy(model.config)
    text = fewer.get_text_config(decoder=True)
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = [text.layer_types[layer] for layer in kept]
    shallow = _twin(model, {id(model.config): fewer, id(config): text})
    cpu.remove(shallow)  # those run the other's layers
    layers = [shallow.get_submodule(path)[layer] for layer in kept]
    for number, layer in enumerate(layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number  # where in the cache its keys and values are
    _replace(shallow, path, nn.ModuleList(layers))
    if lens is not None:
        head = model.get_output_embeddings()
        path = next(name for name, part in model.named_modules() if part is head)
        _replace(shallow, path, nn.Sequential(lens, shallow.get_submodule(path)))
    return shallow


def _stack(model: Any, layers: int) -> str:
    """Where a model's layers are: the outermost list of so many modules."""
    lists: list[str] = [
        name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == layers
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {layers} layers")
    return min(lists, key=lambda name: name.count("."))


def _replace(module: Any, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner)._modules[name] = part


def _twin(module: nn.Module, configs: dict[int, Any]) -> Any:
    """The same modules anew, of the same weights; ``configs`` has what stands in for each configuration."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {name: None if part is None else _twin(part, configs) for name, part in module._modules.items()}
    vars(twin).pop("generate", None)  # of a model that is wrapped
    if id(getattr(module, "config", None)) in configs:
        twin.config = configs[id(module.config)]
    return twin
