"""SpecDec++'s acceptance head: what it learns from, when it ends a guess, and that the output's law stays."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import specdec
from specdec import cli
from specdec.commands.train_head import drafting_model
from specdec.core import Choice, Context, DraftTree
from specdec.drafters import SmallModelDrafter, distilled, levels
from specdec.drafters.acceptance_head import AcceptanceHead
from specdec.policies import FixedPolicy, ThresholdPolicy
from specdec.training.head import Examples, divergence, guessed, loss, train_head
from specdec.training.samples import Sample
from specdec.verifiers import rules
from tests import enumerated, tiny
from tests.tiny import VOCAB

LIES = torch.arange(VOCAB) % 8 == 1  # tokens that a biased draft says too often


class Biased(nn.Linear):
    """An output head that overrates some tokens."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 2 * LIES


@pytest.fixture(scope="module")
def target() -> Any:
    """A model that knows its last token alone, and says many things after each: few examples teach a head enough."""
    model = tiny.model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 0.2
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    return model


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    biased = copy.deepcopy(target)
    head = Biased(*reversed(biased.lm_head.weight.shape), bias=False)
    head.weight = biased.lm_head.weight
    biased.lm_head = head
    return biased


@pytest.fixture(scope="module")
def samples(target: Any) -> list[Sample]:
    torch.manual_seed(0)
    texts = target.generate(tiny.prompt(4, 24), max_new_tokens=40, do_sample=True, top_k=0, eos_token_id=None)
    nothing = np.zeros((40, 0))
    return [Sample(text.numpy(), 4, nothing.astype(np.int64), nothing.astype(np.float16)) for text in texts]


@pytest.fixture(scope="module")
def trained(target: Any, draft: Any, samples: list[Sample], tmp_path_factory: Any) -> AcceptanceHead:
    """A head that has seen all but the last four samples, and not long."""
    examples = guessed(target, draft, samples[:-4])
    folder = tmp_path_factory.mktemp("head")
    return train_head(examples, examples, folder, steps=150, blocks=1, rejection=1.0, learning_rate=1e-2)


class TestLearning:
    def test_g8_the_loss(self) -> None:
        said = torch.tensor([0.8, 0.4])
        logits = torch.stack([1 - said, said], -1).log()
        assert float(loss(logits, torch.tensor([0.9, 0.2]))) == pytest.approx(0.584879, abs=1e-6)

    @torch.no_grad()
    def test_chances_are_those_of_the_guess_that_was_read(self, target: Any, draft: Any, samples: Any) -> None:
        sample = samples[0]
        examples = guessed(target, draft, [sample], temperature=0.7, mixing=0.0)
        text = torch.from_numpy(sample.tokens)[None]
        p, q = ((model(text).logits[0, 3:-1] / 0.7).softmax(-1) for model in (target, draft))
        ratios = (p / q).clamp(max=1)
        read = torch.cat([text[0, :4], torch.zeros(40, dtype=torch.long)])
        for place, (hidden, accepted) in enumerate(zip(*examples, strict=True)):  # the guess is found by what was read
            tries = read[: 5 + place].repeat(VOCAB, 1)
            tries[:, -1] = torch.arange(VOCAB)
            states = draft(tries, output_hidden_states=True).hidden_states[-1][:, -1]
            guess = int((states - hidden).norm(dim=-1).argmin())
            assert torch.allclose(states[guess], hidden, atol=1e-4)
            assert accepted == pytest.approx(float(ratios[place, guess]), abs=1e-5)
            read[4 + place] = guess

    def test_nothing_is_learnt_where_the_targets_own_token_stays(self, target: Any, draft: Any, samples: Any) -> None:
        whole, mixed = (len(guessed(target, draft, samples, mixing=share).accepted) for share in (0.0, 0.5))
        assert whole == 40 * len(samples)
        assert 0.4 < mixed / whole < 0.7
        with pytest.raises(ValueError, match="no guess to learn from"):
            guessed(target, draft, [])

    def test_of_greedy_text_chances_are_0_or_1(self, target: Any, draft: Any, samples: Any) -> None:
        assert set(guessed(target, draft, samples[:2], temperature=0).accepted.tolist()) == {0.0, 1.0}
        assert set(guessed(target, target, samples[:2], temperature=0).accepted.tolist()) == {1.0}

    def test_tells_right_guesses_from_wrong_ones(self, target: Any, draft: Any, samples: Any, trained: Any) -> None:
        examples = guessed(target, draft, samples[-4:], seed=1)
        said, right = trained.chance(examples.hidden), examples.accepted > 0.9
        assert 0.2 < float(right.float().mean()) < 0.8
        assert float(said[right].mean()) > float(said[~right].mean()) + 0.4
        untrained = AcceptanceHead(32, 1)
        assert divergence(trained, examples) < 0.5 * divergence(untrained, examples)
        exact = Examples(examples.hidden, trained.chance(examples.hidden))
        assert divergence(trained, exact) == pytest.approx(0, abs=1e-5)

    def test_blocks_have_weights_of_their_own(self) -> None:
        head = AcceptanceHead(8, 3)
        assert len({weight.data_ptr() for weight in head.parameters()}) == len(head.state_dict()) == 8


class TestFiles:
    def test_hold_all_of_it(self, tmp_path: Any, trained: Any) -> None:
        trained.save(tmp_path / "head.safetensors", draft="a tiny one")
        again = AcceptanceHead.load(tmp_path / "head.safetensors")
        hidden = torch.randn(5, 32)
        assert torch.equal(again.chance(hidden), trained.chance(hidden))

    def test_of_another_width_are_refused(self, draft: Any, tmp_path: Any) -> None:
        AcceptanceHead(64).save(tmp_path / "head")
        with pytest.raises(ValueError, match=r"of width 64, and those of this LlamaForCausalLM have 32.*train head"):
            SmallModelDrafter(draft, head=tmp_path / "head")

    def test_go_with_chains(self, draft: Any) -> None:
        with pytest.raises(ValueError, match="judges chains"):
            SmallModelDrafter(draft, "rsd-s", head=AcceptanceHead(32))


class TestCommand:
    def test_trains_the_head_of_a_drafter(self, target: Any, draft: Any, tmp_path: Any) -> None:
        for name, model in (("target", target), ("draft", tiny.model())):
            model.save_pretrained(tmp_path / name)
            tiny.tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / "prompts.txt").write_text("\n\n".join(f"say {word}" for word in ("one", "two", "three", "four")))
        given = {"model": "target", "draft": "draft", "prompts": "prompts.txt", "out": "out"}
        paths = [part for name, path in given.items() for part in (f"--{name}", str(tmp_path / path))]
        limits = ["--steps", "4", "--held-out", "1", "--max-new-tokens", "8", "--blocks", "2", "--guess-at", "0"]
        result = CliRunner().invoke(cli.app, ["train", "head", *paths, *limits], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        head = AcceptanceHead.load(tmp_path / "out" / "head.safetensors")
        assert (head.width, len(head.blocks)) == (32, 2)
        assert SmallModelDrafter(draft, head=tmp_path / "out" / "head.safetensors", cpu_kernels=False).head

    def test_refuses_a_draft_that_reads_features(self, target: Any, tmp_path: Any) -> None:
        path = tmp_path / "draft.safetensors"
        distilled.save(path, target, distilled.distilled(target, [1], fused=True), [1], {})
        with pytest.raises(ValueError, match="drafts of kind layers"):
            drafting_model(str(path), target)


class Says(AcceptanceHead):
    """Believes a guess as often as it is told to, one after the other."""

    def __init__(self, *chances: float) -> None:
        super().__init__(32, 0)
        self.chances, self.asked = chances, 0

    def chance(self, hidden: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.tensor(self.chances[self.asked - 1])


def drafted(model: Any, head: AcceptanceHead, policy: Any, sample: bool = False) -> DraftTree:
    drafter = SmallModelDrafter(model, head=head, cpu_kernels=False)
    context = Context(tiny.prompt()[0].numpy())
    context.choice = Choice(VOCAB, sample)
    return policy.trim([context], drafter.draft([context], policy.budget([context])))[0]


class TestStopping:
    @pytest.mark.parametrize("sample", [False, True])
    def test_g9_as_in_the_papers_code(self, draft: Any, sample: bool) -> None:
        head = Says(0.95, 0.9, 0.8, 0.7, 0.7)
        tree = drafted(draft, head, ThresholdPolicy(0.3, lag=1), sample)
        assert len(tree) == 1 + 4  # at 1 - .95 * .9 * .8 = .316 the fourth is there
        assert head.asked == 3  # and nobody has read it
        assert tree.probability[:4] == pytest.approx([1, 0.95, 0.855, 0.684])
        assert tree.law == ("swor" if sample else None)

    def test_without_lag_what_the_head_has_ended_is_left_out(self, draft: Any) -> None:
        assert len(drafted(draft, Says(0.95, 0.9, 0.8, 0.7), ThresholdPolicy(0.3))) == 1 + 3

    def test_never_and_at_once(self, draft: Any) -> None:
        assert len(drafted(draft, Says(*[0.0] * 9), ThresholdPolicy(1.0, longest=6, lag=1))) == 1 + 6
        assert len(drafted(draft, Says(0.99), ThresholdPolicy(0.0, lag=1))) == 1 + 2

    def test_a_guess_is_what_it_is_without_a_head(self, draft: Any) -> None:
        policy, plain = FixedPolicy(5, 5, 1), SmallModelDrafter(draft, cpu_kernels=False)
        context = Context(tiny.prompt()[0].numpy())
        [tree] = plain.draft([context], policy.budget([context]))
        assert drafted(draft, Says(*[0.5] * 5), policy).tokens.tolist() == tree.tokens.tolist()

    def test_the_last_estimate_does_not_tell_which_token_was_drawn(self, draft: Any) -> None:
        drafter = SmallModelDrafter(draft, head=Says(*[0.5] * 99), cpu_kernels=False)
        context = Context(tiny.prompt()[0].numpy())
        context.choice = Choice(VOCAB, True)
        trees = [drafter.draft([context], FixedPolicy(1, 1, 1).budget([context]))[0] for _ in range(12)]
        assert len({int(tree.tokens[1]) for tree in trees}) > 1
        assert np.ptp([tree.probability[1] for tree in trees]) < 1e-6


class TestOutput:
    @pytest.mark.parametrize("rows", [1, 3])
    def test_greedy_is_plain(self, target: Any, trained: Any, rows: int) -> None:
        drafter = SmallModelDrafter(target, head=trained, cpu_kernels=False)
        arguments = {"do_sample": False, "max_new_tokens": 40}
        plain = target.generate(tiny.prompt(rows=rows), **arguments)
        with specdec.speculating(target, drafter, ThresholdPolicy(0.6, lag=1), cpu_kernels=False):
            assert target.generate(tiny.prompt(rows=rows), **arguments).tolist() == plain.tolist()
            stats = specdec.stats(target)
        assert stats.fault_count == 0
        assert stats.accepted > 0
        assert len(stats.acceptance_by_depth) > 1  # it is not always the same length

    @pytest.mark.parametrize("rule", [rules.recursive, rules.traversal])
    @pytest.mark.parametrize("lag", [0, 1])
    def test_law_is_the_targets_by_enumeration(self, rule: Any, lag: int) -> None:
        """Whatever a head says of a guess, every draft that can come up and every way to judge it add up to it."""
        vocab, depth, policy = 3, 3, ThresholdPolicy(0.5, longest=3, lag=lag)
        target, law = enumerated.random_laws(0, vocab), enumerated.random_laws(1, vocab)
        wanted = enumerated.joint(target, vocab, depth + 1)
        for trust in (lambda path: 0.9 if path[-1] == 1 else 0.4, lambda path: 0.2 + 0.3 * path[-1]):
            trees = list(judged_drafts(law, trust, depth, policy))
            assert sum(weight for weight, _ in trees) == pytest.approx(1)
            assert len({len(tree) for _, tree in trees}) > 1
            got, _ = enumerated.output(rule, trees, target, wanted)
            assert np.abs(got - wanted).max() < 1e-12

    def test_law_would_not_be_if_a_guess_went_for_what_it_is_itself(self, monkeypatch: Any) -> None:
        vocab, depth = 3, 2
        target, law = enumerated.random_laws(0, vocab), enumerated.random_laws(1, vocab)
        wanted = enumerated.joint(target, vocab, depth + 1)

        def hindsight(policy: Any, tree: DraftTree) -> Any:
            return np.flatnonzero(tree.probability >= 0.5)

        monkeypatch.setattr(ThresholdPolicy, "_kept", hindsight)
        trees = judged_drafts(law, lambda path: 0.9 if path[-1] == 1 else 0.4, depth, ThresholdPolicy(0.5, lag=1))
        got, _ = enumerated.output(rules.recursive, trees, target, wanted)
        assert np.abs(got - wanted).max() > 1e-3


def judged_drafts(law: Any, trust: Any, depth: int, policy: ThresholdPolicy) -> Iterator[tuple[float, DraftTree]]:
    """What becomes of every chain that may be drawn to its full length, a head trusting some paths more than others."""
    vocab, [budget] = len(law(())), policy.budget([Context([0])])
    for path in itertools.product(range(vocab), repeat=depth):
        growth = levels.judged(0, depth, budget.least, torch.Generator())
        step = levels.advance(growth)
        while not isinstance(step, levels.Draft):
            drawn = path[: len(step.tokens) - 1]
            next_one = torch.where(torch.arange(vocab) == path[len(drawn)], 0.0, -torch.inf)
            step = levels.advance(growth, next_one[None], trust(drawn) if drawn else 1.0)
        n = len(step.tokens)
        q = torch.stack([law(path[:length]) for length in range(n)])
        tree = DraftTree(step.tokens, step.parents, step.probability, ("",) * n, q, "swor")
        weight = math.prod(float(law(path[:i])[token]) for i, token in enumerate(path))
        if weight:
            yield weight, policy.trim([Context([0])], [tree])[0]
