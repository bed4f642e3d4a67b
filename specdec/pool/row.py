"""One request while it is decoded: its prompt first, then its row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.attach import Attachment
from specdec.cache import Rows, SlotCache
from specdec.core import Choice, Context, Drafter, DraftTree, Unsupported, Verdict
from specdec.limits import room, rotary_change, temperature_change
from specdec.masks import hides
from specdec.model import Model, Pass
from specdec.pool.batch import Batch
from specdec.pool.kept import fill
from specdec.pool.request import Request
from specdec.prefix import why_not
from specdec.sampling import Group, Sampler
from specdec.speculate import PROMPT_LOGITS_BYTES, PROMPT_LOGITS_ROWS, Speculate, check
from specdec.statistics import Stats
from specdec.verifiers import PathwiseVerifier

USUAL = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}  # inputs of text alone


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that ``generate`` has made ready where decoding would begin."""

    module: Any
    input_ids: Int[torch.Tensor, "rows prompt"]
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    attachment: Attachment


class Preparation(Speculate):
    """A Speculate that hands out what ``generate`` has prepared, instead of decoding."""

    def run(
        self,
        model: Any,
        input_ids: Int[torch.Tensor, "rows prompt"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        streamer: Any = None,
    ) -> Prepared:
        """What was prepared. Raises Unsupported for what only plain ``generate`` can do."""
        check(model, generation_config)
        parts = (input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        return Prepared(model, *parts, self.attach(model)[0])


class SeededSampler(Sampler):
    """A Sampler with a random generator of its own, which draws what the global one would after the same seed."""

    generator: torch.Generator | None = None

    def _draw(self, group: Group, scores: torch.Tensor) -> torch.Tensor:
        if self.generator is None:
            return super()._draw(group, scores)
        probabilities = torch.softmax(scores, dim=-1)
        return torch.multinomial(probabilities, num_samples=1, generator=self.generator).squeeze(1)


class Share:
    """One row's share of a batch's pass: to its verifier, it is the model."""

    passed: Pass
    graphs = None  # its pass is everybody's

    def forward(self, batch: list[DraftTree], hidden: bool = False) -> Pass:
        """The pass that has been made."""
        return self.passed

    def keep(self, paths: list[list[int]]) -> None:
        """The batch keeps what the verdicts say, for all rows at once."""


class Row:
    """One request's sequence: sampler, context, verifier, and until it joins the batch a Model for its prompt.

    Args:
        request: what was asked.
        prepared: what ``generate`` has made of it.
        drafter: who will guess.
        stats: of the pool; it counts what is counted here.
        namespace: whose memory drafters may use.

    Attributes:
        error: what went wrong in this row; the others go on.
        longest: tokens that it may come to.
        reader: whose its KV rows are; "" where they mean something to this request alone.

    Raises:
        Unsupported: it cannot be one row among others.
        ValueError: a token that the model does not know; on a GPU that would be the end of all rows.
    """

    def __init__(self, request: Request, prepared: Prepared, drafter: Drafter, stats: Stats, namespace: str) -> None:
        ids = prepared.input_ids
        self.request, self.prepared, self.drafter = request, prepared, drafter
        self.target = Model(prepared.module, prepared.attachment.form)
        self.error: Exception | None = None
        self.read, self.logits = 0, torch.empty(0)
        self.stats = request.stats = Stats(stats)
        self.stats.level = prepared.attachment.form.level
        rules = (prepared.processors, prepared.criteria, prepared.config, request.streamer)
        self.sampler = SeededSampler(ids, *rules)
        if request.seed is not None:
            self.sampler.generator = torch.Generator(ids.device).manual_seed(request.seed)
        _check(prepared, self.target, self.sampler.max_length)
        _check_tokens(prepared)
        self.longest = self.sampler.max_length or 0
        self.context = Context(ids[0].cpu().numpy(), namespace)
        self.room = room(self.target.config, self.longest, [self.context], [0], 0)
        self.reader = f"{namespace} {prepared.module.dtype} {prepared.module.device}" if self._common() else ""
        self.share = Share()
        model = cast(Model, self.share)
        self.verifier = PathwiseVerifier().begin(model, self.sampler, self.stats, drafter.topk, drafter.hidden)

    @property
    def finished(self) -> bool:
        """Whether a stopping rule has ended it."""
        return self.sampler.finished[0]

    @property
    def ready(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.read == self.prompt_length

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return self.prompt_length - self.read

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self.prepared.input_ids.shape[1]

    def begin_behind(self, layers: Sequence[Rows | None], length: int) -> None:
        """Begin the prompt behind its first tokens, whose rows another text has, if these can be had so short."""
        if fill(self.prepared.model_kwargs["past_key_values"], layers, length):
            self.read = length
            self.stats.reuse(length)

    def read_prompt(self, most: int) -> int:
        """Run the next part of the prompt, of ``most`` tokens at most if it can be divided; how many it was."""
        ids, kwargs = self.prepared.input_ids, self.prepared.model_kwargs
        start, left = self.read, ids.shape[1] - self.read
        part = min(most, left) if self._divisible() else left
        self.read += part
        with self.stats.clock("prefill"):
            if part < left:
                places = kwargs.get("position_ids")
                part_of = {} if places is None else {"position_ids": places[..., start : self.read]}
                part_of["attention_mask"] = None  # it hides nothing, and is as long as the whole prompt
                piece = ids[:, start : self.read]
                self.target.module._prefill(piece, self.prepared.config, {**kwargs, **part_of})
                return part
            self.logits = self.target.start(ids, self.prepared.config, kwargs, self._prompt_logits())
            kwargs.clear()  # among it a cache that has been taken over
        if self.target.prompt_length != ids.shape[1]:
            raise Unsupported("the cache holds tokens that are not in the text (prompt tuning?)")
        return part

    def _divisible(self) -> bool:
        kwargs = self.prepared.model_kwargs
        text = {name for name, value in kwargs.items() if value is not None} <= USUAL
        return text and not hides(kwargs.get("attention_mask")) and type(kwargs.get("past_key_values")) is DynamicCache

    def _common(self) -> bool:
        """Whether any text that begins alike has the same rows."""
        places, module = self.prepared.model_kwargs.get("position_ids"), self.prepared.module
        plain = places is None or torch.equal(places, torch.arange(places.shape[-1], device=places.device)[None])
        changes = rotary_change(self.target.config, 0, self.longest, 0) is not None
        return self._divisible() and plain and not changes and not why_not(module)

    def _prompt_logits(self) -> int:
        """Prompt positions whose logits are worth computing for drafters that learn from candidates."""
        most = max(1, PROMPT_LOGITS_BYTES // (4 * self.target.config.vocab_size))
        return min(PROMPT_LOGITS_ROWS, most) if self.drafter.topk else 1

    @property
    def bytes(self) -> int:
        """Bytes of the KV rows of what was read of its prompt, until that has been read."""
        layers = getattr(self.prepared.model_kwargs.get("past_key_values"), "layers", [])
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)

    @property
    def bytes_of_token(self) -> int:
        """Bytes of one token's keys and values, from when the prompt is read until it joins."""
        assert isinstance(self.target.cache, SlotCache), "trees are kept in no other"
        return self.target.cache.bytes_of_token

    def join(self, batch: Batch) -> None:
        """Become the last row of a batch. Raises Unsupported."""
        batch.join(self.target)
        del self.target  # whose rows would be held twice

    def begin(self) -> None:
        """Commit the first token."""
        if self.request.streamer is not None:
            self.request.streamer.put(self.prepared.input_ids.cpu())
        self.context.choice = Choice(self.logits.shape[-1], processors=self.sampler.foreseeing)
        (verdict,) = self.verifier.first([self.context], self.logits)
        self.context.extend(verdict)
        self.stats.observe(verdict)
        self.stats.generations = 1
        del self.logits

    def judge(self, tree: DraftTree, passed: Pass, seconds: float) -> Verdict:
        """What one pass says of this row's tree; nothing is committed, and ``error`` set, if that fails."""
        self.share.passed = passed
        try:
            (verdict,) = self.verifier.verify([self.context], [tree])
        except Exception as error:  # of a processor, a stopping rule, a streamer: this row's alone
            self.error = error
            return Verdict(tree, np.zeros(0, np.int64), np.zeros(0, np.int64), seconds=seconds)
        verdict = replace(verdict, seconds=seconds)
        self.stats.observe(verdict)
        return verdict

    def output(self) -> Any:
        """What ``generate`` returns; the KV rows are the batch's, so there is no cache in it."""
        config, sampler = self.prepared.config, self.sampler
        sequences = sampler.sequences(self.prepared.input_ids)
        if not config.return_dict_in_generate:
            return sequences
        output = GenerateDecoderOnlyOutput(sequences=sequences, scores=sampler.scores, logits=sampler.logits)
        output.stats = self.stats
        return output


def _check(prepared: Prepared, target: Model, max_length: int | None) -> None:
    """Raise Unsupported for what cannot be one row among others, as far as that shows before the prompt is read."""
    ids, kwargs, config = prepared.input_ids, prepared.model_kwargs, target.config
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    positions = getattr(config, "max_position_embeddings", None)
    reasons = {
        f"{type(prepared.module).__name__} takes no trees ({target.form.reason})": target.form.level != "tree",
        "it is several sequences": len(ids) != 1,
        "it brings a cache of its own": cache is not None and cache.get_seq_length() > 0,
        "its KV rows are to live in the host's memory": getattr(cache, "offloading", False),
        "it brings embeddings": kwargs.get("inputs_embeds") is not None or not ids.shape[1],
        "its attention mask is longer than its text": mask is not None and mask.shape[1] != ids.shape[1],
        "it has no largest length": max_length is None,
        "it may pass the positions that the model knows": isinstance(positions, int) and (max_length or 0) > positions,
        "it may pass where the model's rotary embedding changes": rotary_change(config, ids.shape[1], max_length, 0)
        is not None,
        "it may come near where the model scales its queries anew": temperature_change(config, 0, max_length, 0)
        is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise Unsupported(reason)


def _check_tokens(prepared: Prepared) -> None:
    known = getattr(prepared.module.get_input_embeddings(), "num_embeddings", None)
    least, most = (int(token) for token in prepared.input_ids.aminmax())
    if known is not None and set(prepared.model_kwargs) <= USUAL and not 0 <= least <= most < known:
        raise ValueError(f"the model's token ids are 0 to {known - 1}, got {least} to {most}")
