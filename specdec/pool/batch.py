"""Rows of many generations in one: they join and leave between passes, each with a length of its own."""

from __future__ import annotations

import torch
from torch import nn

from specdec.cache import SlotCache, SlotLayer
from specdec.core import Unsupported
from specdec.model import Form, Model, compiled


class Batch(Model):
    """A Model whose rows come and go: continuous batching, without padding.

    A generation starts as a Model of its own, which runs the prompt; ``join`` copies its KV rows behind the others'.
    The first one's rows are taken as they are, and when the last row leaves, all memory is given back.

    Orca (Yu et al., OSDI 2022) batches iterations instead of requests; here an iteration verifies trees.

    Args:
        module: a transformers causal LM, in evaluation mode.
        form: what its self-test found; at level "tree".
    """

    cache: SlotCache

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__(module, form)
        self.visible = None
        self.takes_bits = form.attention == "bits"
        self.clear()

    def clear(self) -> None:
        """Forget all rows, and give their memory back."""
        self.lengths = []
        self.cache = SlotCache(layer_class_to_replicate=SlotLayer)

    def join(self, row: Model) -> None:
        """Take in a Model of one row, after its prompt; it must not be used on its own afterwards.

        Raises:
            Unsupported: its inputs cannot stand in one batch with others'; nothing has changed then.
        """
        assert isinstance(row.cache, SlotCache), "only its rows can be ragged"
        if not self.lengths:
            joinable(row)
            self.cache, self.cache_name, self.device = row.cache, row.cache_name, row.device
            self.shift, self.extras = row.shift, row.extras
        else:
            joinable(row, self)
            self.cache.join(row.cache)
            if self.shift is not None and row.shift is not None:
                self.shift = torch.cat([self.shift, row.shift])
        self.lengths = [*self.lengths, *row.lengths]
        self._looked = False  # the module may have been changed since the last one joined

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if not last:
            return self.clear()
        self.cache.leave(row)
        self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]
        if self.shift is not None:
            self.shift[row] = self.shift[last]
            self.shift = self.shift[:last]
        return None


def joinable(row: Model, batch: Batch | None = None) -> None:
    """Raise Unsupported if a Model's row needs inputs that a batch of others' rows does not have."""
    reasons = {
        "some of its prompt is hidden by the attention mask": row.visible is not None and not bool(row.visible.all()),
        "its positions have several axes": row.shift is not None and row.shift.shape != (1, 1),
        "its model takes more inputs than tokens and positions": not all(
            value is None or isinstance(value, (bool, int, float, str)) for value in row.extras.values()
        ),
        "its model is compiled, for every number of rows anew": compiled(row.module),
    }
    if batch is not None:
        alike = (row.form, row.extras, row.cache_name, row.shift is None)
        reasons["its inputs differ from those of the others"] = alike != (
            (batch.form, batch.extras, batch.cache_name, batch.shift is None)
        )
    for reason, applies in reasons.items():
        if applies:
            raise Unsupported(reason)
