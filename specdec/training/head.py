"""SpecDec++'s training: what a drafter guesses along the target's own texts, and whether that would be accepted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specdec.drafters.acceptance_head import AcceptanceHead
from specdec.training.loop import train
from specdec.training.samples import Sample

MIXING, REJECTION = 0.15, 6.0  # the paper's
BATCH = 256  # guesses


class Examples(NamedTuple):
    """Guesses of a drafter.

    Attributes:
        hidden: what the drafter's head reads once it has read each of them.
        accepted: the chance that the target accepts it.
    """

    hidden: Float[Tensor, "guesses width"]
    accepted: Float[Tensor, " guesses"]

    def take(self, which: Int[Tensor, " some"] | slice) -> Examples:
        """Some of them."""
        return Examples(self.hidden[which], self.accepted[which])


def guessed(
    target: Any, draft: Any, samples: Iterable[Sample], temperature: float = 1.0, mixing: float = MIXING, seed: int = 0
) -> Examples:
    """What a drafter guesses at each place of the target's texts, given what the target wrote before.

    Guesses are drawn as they will be, at the target's own temperature: the chance of one is min(1, p / q) by the laws
    after it. What is then read is the text with its tokens replaced by those guesses, but for a share: as when nearly
    all guesses before have been accepted.

    Args:
        temperature: 0 for the likeliest tokens of both.
        mixing: the share of the target's tokens that stay; nothing is learnt there.

    Raises:
        ValueError: there is no guess to learn from.
    """
    rng = torch.Generator(target.device).manual_seed(seed)
    found = [_guessed(target, draft, sample, temperature, mixing, rng) for sample in samples]
    if not sum(len(each.accepted) for each in found):
        raise ValueError("the samples have no guess to learn from: collect more, or mix less")
    return Examples(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def _guessed(
    target: Any, draft: Any, sample: Sample, temperature: float, mixing: float, rng: torch.Generator
) -> Examples:
    text = torch.from_numpy(sample.tokens).to(target.device)[None]
    before = slice(sample.prompt - 1, len(sample.tokens) - 1)
    p = _law(target(text).logits[0, before], temperature, target.config.vocab_size)
    q = _law(draft(text).logits[0, before], temperature, p.shape[1])
    guesses = q.multinomial(1, generator=rng)
    accepted = (p.gather(1, guesses) / q.gather(1, guesses)).clamp(max=1)[:, 0]
    stays = torch.rand(len(guesses), generator=rng, device=rng.device) < mixing
    read = torch.where(stays, text[0, sample.prompt :], guesses[:, 0])
    whole = torch.cat([text[0, : sample.prompt], read])[None]
    hidden = draft(whole, output_hidden_states=True).hidden_states[-1][0, sample.prompt :].float()
    learnt = read == guesses[:, 0]
    return Examples(hidden[learnt], accepted[learnt])


def _law(logits: Float[Tensor, "places own"], temperature: float, vocab: int) -> Float[Tensor, "places vocab"]:
    """Of the target's vocabulary, as ``SmallModelDrafter`` has it."""
    logits = nn.functional.pad(logits.float(), (0, vocab - logits.shape[1]), value=-torch.inf)
    if temperature == 0:
        return nn.functional.one_hot(logits.argmax(-1), vocab).float()
    return (logits / temperature).softmax(-1)


def loss(
    logits: Float[Tensor, "guesses 2"], accepted: Float[Tensor, " guesses"], rejection: float = REJECTION
) -> Float[Tensor, ""]:
    """Cross-entropy to the chances, a rejection weighing so many times as much as an acceptance.

    So a head that is unsure expects the worse, and what it says is less than a chance.
    """
    said = logits.log_softmax(-1)
    weights = torch.stack([rejection * (1 - accepted), accepted], -1)
    return -(weights * said).sum() / weights.sum()


@torch.no_grad()
def divergence(head: AcceptanceHead, examples: Examples) -> float:
    """Nats, on average, from the chances of acceptance to what a head says: its error where rejections weigh 1."""
    truth = torch.stack([1 - examples.accepted, examples.accepted], -1)
    return float(nn.functional.kl_div(head(examples.hidden).log_softmax(-1), truth, reduction="batchmean"))


def train_head(
    examples: Examples,
    held_out: Examples,
    folder: Path,
    steps: int = 2000,
    blocks: int = 3,
    rejection: float = REJECTION,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> AcceptanceHead:
    """Fit a head to a drafter's guesses; goes on from where the same call was stopped, see ``loop.train``.

    The figure told as it goes is ``divergence`` on what was held out.
    """
    torch.manual_seed(seed)
    head = AcceptanceHead(examples.hidden.shape[1], blocks).to(examples.hidden.device)

    def batch(step: int) -> Examples:
        some = np.random.default_rng([seed, step]).integers(len(examples.accepted), size=BATCH)
        return examples.take(torch.from_numpy(some))

    def of_batch(batch: Examples) -> Tensor:
        return loss(head(batch.hidden), batch.accepted, rejection)

    def off() -> float:
        return divergence(head, held_out)

    every = max(1, steps // 10)
    train(head, batch, of_batch, folder, steps, learning_rate, seed, validate=off, every=every, figure_name="nats off")
    return head
