"""From a row of logits to a committed token, exactly as ``generate`` does it."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers.generation import logits_process as process
from transformers.generation import stopping_criteria as stopping
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from specdec.kernels.topk import topk

# Processors that treat each row by itself and remember nothing, so that rows may be at different lengths.
ROWWISE = (
    process.MinLengthLogitsProcessor,
    process.MinNewTokensLengthLogitsProcessor,
    process.TemperatureLogitsWarper,
    process.RepetitionPenaltyLogitsProcessor,
    process.TopPLogitsWarper,
    process.TopKLogitsWarper,
    process.MinPLogitsWarper,
    process.TypicalLogitsWarper,
    process.EpsilonLogitsWarper,
    process.EtaLogitsWarper,
    process.NoRepeatNGramLogitsProcessor,
    process.SequenceBiasLogitsProcessor,
    process.NoBadWordsLogitsProcessor,
    process.ForcedBOSTokenLogitsProcessor,
    process.ForcedEOSTokenLogitsProcessor,
    process.InfNanRemoveLogitsProcessor,
    process.ExponentialDecayLengthPenalty,
    process.LogitNormalization,
    process.SuppressTokensAtBeginLogitsProcessor,
    process.SuppressTokensLogitsProcessor,
)
ROWWISE_CRITERIA = (
    stopping.MaxLengthCriteria,
    stopping.MaxTimeCriteria,
    stopping.EosTokenCriteria,
    stopping.StopStringCriteria,
)

ROOM = 256  # columns for committed tokens, at first
Tokens = Int[torch.Tensor, " rows"]
Group = list[int]  # rows of the batch that commit their tokens together, ascending; all are equally long


class Noise:
    """The random numbers of ``torch.multinomial`` over a whole batch, kept until the last row has used them.

    Plain ``generate`` draws for all rows of a step at once. Rows that run ahead take their share of a later step's
    draw early; drawing whole steps in order leaves every row, and the generator, as plain ``generate`` would.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.steps: dict[int, torch.Tensor] = {}
        self.drawn = 0

    def draw(self, probabilities: Float[torch.Tensor, "drawing vocab"], rows: Group, step: int) -> Tokens:
        """What ``multinomial`` over the batch would draw for ``rows`` at ``step``; ``probabilities`` are used up."""
        if not math.isfinite(float(probabilities.sum())):
            return torch.multinomial(probabilities, 1)[:, 0]  # raises as plain generate does
        while self.drawn <= step:
            whole = probabilities.new_empty(self.rows, probabilities.shape[1])
            self.steps[self.drawn] = whole.exponential_(1)
            self.drawn += 1
        return greatest(probabilities.div_(self.steps[step][_span(rows)]))

    def forget(self, before: int) -> None:
        """Drop the steps that every row has passed; those that no row has drawn by then, none will."""
        self.drawn = max(self.drawn, before)
        for step in [step for step in self.steps if step < before]:
            del self.steps[step]

    @staticmethod
    @cache
    def agrees(device: torch.device) -> bool:
        """Whether this torch draws as assumed here; the generator's state is left as it was."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            probabilities = torch.softmax(torch.linspace(0, 2, 300, device=device).view(3, 100), -1)
            state = torch.cuda.get_rng_state(device) if devices else torch.get_rng_state()
            theirs = torch.multinomial(probabilities, 1).flatten()
            after = torch.rand(1, device=device)
            torch.cuda.set_rng_state(state, device) if devices else torch.set_rng_state(state)
            noise = Noise(3)
            ours = torch.cat([noise.draw(probabilities[row : row + 1].clone(), [row], 0) for row in range(3)])
            return bool((ours == theirs).all() and (torch.rand(1, device=device) == after).all())


class Sampler:
    """Turns rows of logits into committed tokens: processors, choice, stopping rules, streamer, records.

    Every processor is called once per committed token, in order, on that token's own prefix, so stateful ones are
    right. Rows of a batch advance on their own where everything involved treats rows one by one; otherwise in
    lockstep, one group for the whole batch.

    Args:
        input_ids: the prompts, left-padded.
        processors, criteria, config: as ``generate`` prepared them.
        streamer: gets each committed token after the stopping rules have seen it.
        lockstep: keep all rows together whatever the parts allow.
    """

    def __init__(
        self,
        input_ids: Int[torch.Tensor, "rows prompt"],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any = None,
        lockstep: bool = False,
    ) -> None:
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.prompt = input_ids.shape[1]
        self.sample = bool(config.do_sample)
        self.ends = any(hasattr(rule, "eos_token_id") for rule in criteria)
        self.pad = config._pad_token_tensor.to(input_ids.device) if config._pad_token_tensor is not None else None
        self.scores: tuple[torch.Tensor, ...] | None = () if _wanted(config, config.output_scores) else None
        self.logits: tuple[torch.Tensor, ...] | None = () if _wanted(config, config.output_logits) else None
        self.max_length: int | None = getattr(criteria, "max_length", None)
        rows = input_ids.shape[0]
        # A streamer is given whole steps.
        together = rows == 1 or lockstep or streamer is not None or not self._rowwise(input_ids.device)
        self.groups: list[Group] = [list(range(rows))] if together else [[row] for row in range(rows)]
        # On the CPU torch's own multinomial takes longer than this; elsewhere it serves where rows stay together.
        drawn = self.sample and (not together or (input_ids.device.type == "cpu" and Noise.agrees(input_ids.device)))
        self.noise = Noise(rows) if drawn else None
        self.ids = torch.cat([input_ids, input_ids.new_empty(rows, ROOM)], dim=1)  # with room for what will come
        self.generated: list[list[int]] = [[] for _ in range(rows)]
        self.finished = [False] * rows

    def _rowwise(self, device: torch.device) -> bool:
        return (
            self.foresees
            and all(type(rule) in ROWWISE_CRITERIA for rule in self.criteria)
            # Without an end-of-sequence rule, plain generate goes on writing rows that a rule has ended.
            and (self.ends or all(type(rule) is stopping.MaxLengthCriteria for rule in self.criteria))
            and self.scores is None
            and self.logits is None
            and (not self.sample or Noise.agrees(device))
        )

    def length(self, group: Group) -> int:
        """How many tokens each row of a group has, padding included."""
        return self.prompt + len(self.generated[group[0]])

    def committed(self, group: Group) -> Int[torch.Tensor, "rows length"]:
        """A group's tokens, padding included. Not those of ``commit_quick``."""
        return self.ids[_span(group), : self.length(group)]

    def over(self, group: Group) -> bool:
        """Whether every row of a group has ended."""
        return all(self.finished[row] for row in group)

    def abreast(self) -> list[Group]:
        """Groups for a step in which nothing is guessed: rows by themselves go together while they are equally long."""
        going = [row for row, over in enumerate(self.finished) if not over]
        if len(self.groups) == 1 or len({len(self.generated[row]) for row in going}) > 1:
            return self.groups
        return [going, *([row] for row, over in enumerate(self.finished) if over)]

    @property
    def quick(self) -> bool:
        """Whether a token follows from its row's argmax, its length, and the clock alone."""
        return (
            not (self.sample or self.processors)
            and self.scores is None
            and self.logits is None
            and self.brief
            and all(len(group) == 1 for group in self.groups)
        )

    @property
    def brief(self) -> bool:
        """Whether stopping rules look at nothing but the last token, the length, and the clock."""
        known = (stopping.MaxLengthCriteria, stopping.MaxTimeCriteria, stopping.EosTokenCriteria)
        return all(type(rule) in known for rule in self.criteria)

    @property
    def foresees(self) -> bool:
        """Whether processors treat each row by itself and remember nothing, so that they may be shown what may be."""
        return all(type(part) in ROWWISE and _stateless(part) for part in self.processors)

    @property
    def foreseeing(self) -> LogitsProcessorList | None:
        """The processors that may be shown what may be; None if there are none."""
        able = [part for part in self.processors if type(part) in ROWWISE and _stateless(part)]
        return LogitsProcessorList(able) if able else None

    @property
    def records(self) -> bool:
        """Whether scores or logits are to be returned."""
        return self.scores is not None or self.logits is not None

    def foresee(
        self, row: int, path: Int[np.ndarray, " path"], logits: Float[torch.Tensor, " vocab"]
    ) -> Float[torch.Tensor, " vocab"]:
        """What the processors would make of one row's logits if ``path`` had been committed; needs ``foresees``."""
        committed = self.committed([row])
        ids = torch.cat([committed, torch.from_numpy(path[None]).to(committed.device)], dim=1)
        scores: torch.Tensor = self.processors(ids, logits[None].to(copy=True, dtype=torch.float32, device=ids.device))
        return scores[0]

    def choose(self, group: Group, logits: Float[torch.Tensor, "rows vocab"]) -> Tokens:
        """The group's next tokens; rows that have ended get padding. ``logits`` are used up."""
        scores = self.process(group, logits)
        return self.padded(group, self._draw(group, scores) if self.sample else greatest(scores))

    def process(self, group: Group, logits: Float[torch.Tensor, "rows vocab"]) -> Float[torch.Tensor, "rows vocab"]:
        """What the processors make of the logits that choose the group's next tokens; both are recorded if wanted.

        ``logits`` are used up: processors may write to them, as they may to plain ``generate``'s.
        """
        logits = logits.to(dtype=torch.float32, device=self.ids.device)
        scores: torch.Tensor = self.processors(self.committed(group), logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        return scores

    def padded(self, group: Group, tokens: Tokens) -> Tokens:
        """The tokens, but padding for rows that have ended."""
        over = [self.finished[row] for row in group]
        if not self.ends or not any(over):
            return tokens
        assert self.pad is not None, "generate sets a padding token wherever there is an end-of-sequence rule"
        return torch.where(torch.tensor(over, device=tokens.device), self.pad, tokens)

    def _draw(self, group: Group, scores: torch.Tensor) -> Tokens:
        probabilities = torch.softmax(scores, dim=-1)
        if self.noise is None:
            return torch.multinomial(probabilities, num_samples=1).squeeze(1)
        return self.noise.draw(probabilities, group, len(self.generated[group[0]]))

    def commit(self, group: Group, tokens: Tokens) -> None:
        """Add the chosen tokens, ask the stopping rules, and tell the streamer."""
        self._append(group, tokens)
        for row, token in zip(group, tokens.tolist(), strict=True):
            self.generated[row].append(token)
        for row, stopped in zip(group, self._stopped(group), strict=True):
            self.finished[row] |= stopped
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        if self.noise is not None:
            going = [len(row) for row, over in zip(self.generated, self.finished, strict=True) if not over]
            self.noise.forget(min(going, default=0))

    def _append(self, group: Group, tokens: Tokens) -> None:
        length = self.length(group)
        if length == self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.empty_like(self.ids)], dim=1)
        self.ids[_span(group), length] = tokens

    def commit_quick(self, group: Group, token: int) -> bool:
        """``commit`` for a ``quick`` sampler and a group of one row, all on the host; returns whether the row ended."""
        (row,) = group
        self.generated[row].append(token)
        self.finished[row] = over = self._over(row)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        return over

    def _stopped(self, group: Group) -> list[bool]:
        """Which rows a stopping rule ends; found on the host for a row by itself, which takes a tenth of the time."""
        if len(group) == 1 and self.brief:
            return [self._over(group[0])]
        stopped: list[bool] = self.criteria(self.committed(group), self.scores).tolist()
        return stopped

    def _over(self, row: int) -> bool:
        """Whether a ``brief`` rule ends a row."""
        return any(self._ends(rule, row) for rule in self.criteria)

    def _ends(self, rule: Any, row: int) -> bool:
        if type(rule) is stopping.MaxLengthCriteria:
            return bool(self.prompt + len(self.generated[row]) >= rule.max_length)
        if type(rule) is stopping.MaxTimeCriteria:
            return bool(time.time() - rule.initial_timestamp > rule.max_time)
        return self.generated[row][-1] in rule.eos_token_id.tolist()

    def sequences(self, input_ids: Int[torch.Tensor, "rows prompt"]) -> Int[torch.Tensor, "rows length"]:
        """Prompts and generated tokens, rows that ended early padded on the right, as ``generate`` returns them."""
        longest = max(map(len, self.generated))
        pad = 0 if self.pad is None else int(self.pad)
        rows = [row + [pad] * (longest - len(row)) for row in self.generated]
        return torch.cat(
            [input_ids, torch.tensor(rows, dtype=torch.long, device=input_ids.device).view(len(rows), -1)], 1
        )


def greatest(scores: Float[torch.Tensor, "rows vocab"]) -> Tokens:
    """The best token of each row: ``argmax``, for which torch takes three times as long on the CPU."""
    return topk(scores, 1)[:, 0] if scores.device.type == "cpu" else scores.argmax(-1)


def _span(rows: Group) -> slice | Group:
    """The rows as a slice, which copies nothing, if there are none between them."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


def _wanted(config: GenerationConfig, output: bool | None) -> bool:
    return bool(config.return_dict_in_generate and output)


def _stateless(part: Any) -> bool:
    # Its left-padding lengths are one per row of the whole batch.
    return not isinstance(getattr(part, "prompt_ignore_length", None), torch.Tensor)
