"""Other ways to speculate or to be quick, behind ``generate``'s call; other libraries are imported when asked for."""

from __future__ import annotations

import copy
from typing import Any

import torch

CACHE = 512  # tokens of a static cache, or twice as many until a text fits: torch compiles for each size
FIRST_LAYERS = 3  # of the target, as a draft model that is always at hand


def compiled(view: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' ``generate`` with a static cache, its passes over single tokens compiled by torch."""
    from transformers import CompileConfig

    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # transformers compiles for accelerators alone unless told
    return _Compiled(view), {"cache_implementation": "static", "compile_config": config}


class _Compiled:
    """A model with a view for each size of cache, which is compiled before the time of a run counts."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device
        self.views: dict[int, Any] = {}

    def generate(self, ids: torch.Tensor, streamer: Any, max_new_tokens: int, **arguments: Any) -> Any:
        size = CACHE
        while size < ids.shape[1] + max_new_tokens:
            size *= 2
        if size not in self.views:
            self.views[size] = copy.copy(self.model)
            self.views[size].generate(ids, max_new_tokens=3, max_cache_len=size, **arguments)
            streamer.start()
        more = {"max_new_tokens": max_new_tokens, "max_cache_len": size}
        return self.views[size].generate(ids, streamer=streamer, **more, **arguments)


def assisted(view: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """transformers' assisted generation, by the model in a directory; for no path, by the target's own first layers."""
    from transformers import AutoModelForCausalLM

    if path:
        assistant = AutoModelForCausalLM.from_pretrained(path, dtype=view.dtype).to(view.device).eval()
    else:
        assistant = first_layers(view, FIRST_LAYERS)
    return view, {"assistant_model": assistant}


def first_layers(model: Any, count: int) -> Any:
    """A model of the first layers, their weights shared; norm and head behind them are the whole model's."""
    cut, body = copy.copy(model), copy.copy(model.base_model)
    cut.config = body.config = copy.deepcopy(model.config)
    cut.generation_config = copy.deepcopy(model.generation_config)
    layers = body.layers[:count]
    cut.config.num_hidden_layers = len(layers)
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = cut.config.layer_types[:count]
    cut._modules = {**model._modules, model.base_model_prefix: body}
    body._modules = {**body._modules, "layers": layers}
    return cut


def economize(view: Any) -> tuple[Any, dict[str, Any]]:
    """Prompt lookup of the library economize, with the settings of its documentation."""
    import economize
    from economize.techniques.lookup import LookupConfig

    return economize.apply(view, LookupConfig(max_ngram=3), decoding=economize.DecodeConfig(cycle_length=6)), {}


def flashspec(view: Any) -> tuple[Any, dict[str, Any]]:
    """Prompt lookup of the library flashspec, with the settings of its documentation."""
    return _Flashspec(view), {}


class _Flashspec:
    """Its engine called as ``generate`` is; a streamer hears of each step's tokens."""

    def __init__(self, model: Any) -> None:
        from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
        from flashspec.engine import NgramDrafter, TargetModel

        class Target(TargetModel):  # type: ignore[misc]
            """Notes what every step commits."""

            streamer: Any = None

            def commit(self, n_accepted: int, next_token: torch.Tensor) -> None:
                super().commit(n_accepted, next_token)
                self.streamer.put(torch.empty(n_accepted + 1))

        self.model, self.device = model, model.device
        self.target = Target("", model.device, model.dtype, model)
        greedy, one = SamplingConfig(temperature=0.0), BanditConfig(n_arms=1)
        config = FlashSpecConfig(device=str(model.device), drafter_strategy="bandit", bandit=one, sampling=greedy)
        self.engine = SpeculativeEngine(config, [NgramDrafter()], self.target)

    def generate(
        self, ids: torch.Tensor, *, attention_mask: torch.Tensor, max_new_tokens: int, do_sample: bool, streamer: Any
    ) -> torch.Tensor:
        """Greedy tokens of one row without padding, behind its prompt."""
        assert attention_mask.all(), "no padding"
        assert not do_sample, "greedy alone"
        end = self.model.generation_config.eos_token_id
        ends = [] if end is None else [end] if isinstance(end, int) else end
        self.target.streamer = streamer
        streamer.put(ids)
        result = self.engine.generate(ids, max_new_tokens, ends)
        streamer.end()
        return torch.cat([ids, result.output_ids[:, : result.n_tokens_generated]], dim=1)
