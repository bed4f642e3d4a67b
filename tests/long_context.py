"""A model that has read a prompt, just where a decoding loop would begin."""

from __future__ import annotations

from typing import Any

import torch

from specdec.attach import attach
from specdec.model import Model


def started(model: Any, input_ids: torch.Tensor, **arguments: Any) -> Model:
    """The model with its rows."""
    target = Model(model, attach(model, timed=False).form)

    def loop(
        module: Any, ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **more: Any
    ) -> Any:
        target.start(ids, generation_config, more)
        return ids

    model.generate(input_ids, custom_generate=loop, max_new_tokens=9, **arguments)
    return target
