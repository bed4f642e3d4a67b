"""Rejection sampling through ``generate``: the target's law, whatever sampled the trees; all else as from plain."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import specdec
from specdec.policies import FixedPolicy
from specdec.trees import sampling as growths
from specdec.verifiers import RejectionVerifier

from . import tiny
from .sampling import GROWTHS, SampledTrees, counts, law, model, p_value, table, unjust

PROMPT = torch.tensor([[1, 2, 3]])
POLICY = FixedPolicy(16, 4, 4)
CASES = {"chain": "chain", "block": "chain", "iid": "twins", "swor": "tree", "traversal": "beam", "auto": "merged"}


def near(target, noise=1.0):
    """Logits of a drafter that knows roughly what the model says after the prompt and one token."""
    with torch.no_grad():
        return target(torch.cat([PROMPT.expand(5, -1), torch.arange(5)[:, None]], 1)).logits[:, -1] + noise * table()


def sample(target, drafter, verifier, runs, tokens=3, rows=100, **arguments):
    """The tokens of many sampled generations, and what they counted."""
    with specdec.speculating(target, drafter, POLICY, verifier=verifier, cpu_kernels=False):
        prompt = PROMPT.expand(min(rows, runs), -1)
        outputs = [
            target.generate(prompt, do_sample=True, max_new_tokens=tokens, top_k=0, **arguments)
            for _ in range(-(-runs // rows))
        ]
        new = [tiny.sequences(output)[:, PROMPT.shape[1] :] for output in outputs]
        padded = [pad(each, (0, tokens - each.shape[1]), value=arguments.get("pad_token_id", 0)) for each in new]
        return torch.cat(padded), specdec.stats(target)


def drafter(growth, table):
    """Of sampled trees that say how they were drawn."""
    return SampledTrees(GROWTHS[growth], table, "iid" if growth == "twins" else "swor")


class TestLaw:
    """Pearson's chi-square of what is sampled against what plain passes say; seeds are fixed, so it never flickers."""

    @pytest.mark.parametrize(
        ("rule", "runs"),
        [
            *((rule, 800) for rule in CASES),
            ("traversal", 5000),
            *(pytest.param(rule, 100000, marks=pytest.mark.slow) for rule in CASES),
        ],
    )
    def test_of_a_model(self, rule, runs):
        """The second of four tokens is the first that is guessed, by trees two guesses deep."""
        torch.manual_seed(0)
        target = model()
        made = drafter(CASES[rule], near(target))
        tokens, stats = sample(target, made, RejectionVerifier(rule), runs, tokens=4)
        assert p_value(counts(tokens), law(target, PROMPT, 4)) > 0.01
        assert len(stats.acceptance_by_depth) == 2
        assert stats.accepted > 0.2 * runs
        assert set(stats.by_rule) <= {"match", "traversal", "block"} if rule == "auto" else {"match", rule}
        assert sum(stats.by_rule.values()) == stats.steps
        assert stats.fault_count == 0
        assert stats.lossless

    @pytest.mark.parametrize("growth", ["beam", "twins"])
    def test_of_trees_that_auto_judges_by_traversal(self, growth):
        torch.manual_seed(0)
        target = model()
        tokens, stats = sample(target, drafter(growth, near(target)), RejectionVerifier(), 800, tokens=4)
        assert p_value(counts(tokens), law(target, PROMPT, 4)) > 0.01
        assert set(stats.by_rule) == {"match", "traversal"}

    @pytest.mark.parametrize("rule", CASES)
    def test_of_a_broken_build_it_does_not_hold(self, rule, monkeypatch):
        torch.manual_seed(0)
        unjust(monkeypatch)
        target = model()
        tokens, _ = sample(target, drafter(CASES[rule], near(target)), RejectionVerifier(rule), 800, tokens=4)
        assert p_value(counts(tokens), law(target, PROMPT, 4)) < 1e-6

    @pytest.mark.parametrize("rule", ["swor", "traversal"])
    def test_with_processors_and_warpers_on_each_path(self, rule):
        torch.manual_seed(0)
        target = model()
        drafter = SampledTrees(GROWTHS["tree"], near(target) / 0.8)
        tokens, stats = sample(
            target, drafter, RejectionVerifier(rule), 800, 4, temperature=0.7, repetition_penalty=1.5, min_new_tokens=1
        )
        parts = [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.7)]
        assert p_value(counts(tokens), law(target, PROMPT, 4, parts)) > 0.01
        assert p_value(counts(tokens), law(target, PROMPT, 4, parts[1:])) < 1e-6
        assert stats.by_rule[rule] > 0

    def test_of_rows_in_lockstep(self):
        """Scores are returned row by row of the whole batch, so that all its rows end a step together."""
        torch.manual_seed(0)
        target = model()
        drafter = SampledTrees(GROWTHS["tree"], near(target))
        arguments = {"return_dict_in_generate": True, "output_scores": True}
        tokens, stats = sample(target, drafter, RejectionVerifier(), 600, rows=3, **arguments)
        assert p_value(counts(tokens), law(target, PROMPT, 3)) > 0.01
        assert stats.accepted > 0

    @pytest.mark.parametrize("lockstep", [False, True])
    def test_of_texts_that_end(self, lockstep):
        torch.manual_seed(0)
        target = model(eos_token_id=4, pad_token_id=0)
        drafter = SampledTrees(GROWTHS["tree"], near(target))
        how = {"rows": 3, "return_dict_in_generate": True, "output_scores": True} if lockstep else {}
        tokens, _ = sample(target, drafter, RejectionVerifier(), 600, pad_token_id=4, **how)
        whole = law(target, PROMPT, 3).reshape(5, 5, 5)
        ended = np.zeros_like(whole)  # what follows the end is padding, here the same token
        for first, second, third in np.ndindex(5, 5, 5):
            second = 4 if first == 4 else second
            ended[first, second, 4 if second == 4 else third] += whole[first, second, third] if first < 4 else 0
        ended[4] = 0
        ended[4, 4, 4] = whole[4].sum()
        for first in range(4):
            ended[first, 4] = 0
            ended[first, 4, 4] = whole[first, 4].sum()
        assert p_value(counts(tokens), ended.flatten()) > 0.01


class TestCounting:
    """Tokens per step where the answer is known."""

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("rule", CASES)
    def test_a_drafter_that_is_the_target(self, rule, temperature):
        target = model()
        with torch.no_grad():
            for name, weight in target.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()  # so that what follows a token is a table
            exact = target(torch.arange(5)[:, None]).logits[:, 0]
        drafter = SampledTrees(lambda root, depth: growths.without_replacement(root, (1,) * min(depth, 3)), exact)
        if not temperature:
            drafter.table = torch.where(exact == exact.max(-1, keepdim=True).values, 0.0, -torch.inf)
        how = {"do_sample": bool(temperature), "top_k": 0 if temperature else None}
        with specdec.speculating(target, drafter, POLICY, verifier=RejectionVerifier(rule)):
            target.generate(PROMPT, max_new_tokens=1 + 4 * 25, **how)
            assert specdec.stats(target).tokens_per_step == pytest.approx(101 / 26)

    @pytest.mark.parametrize("rule", CASES)
    def test_a_drafter_of_what_the_target_never_says(self, rule):
        target = model()
        made = drafter(CASES[rule], torch.tensor([0, 0, -torch.inf, -torch.inf, -torch.inf]).expand(5, 5))
        torch.manual_seed(0)
        tokens, stats = sample(target, made, RejectionVerifier(rule), 1, 40, 1, suppress_tokens=[0, 1])
        assert stats.tokens_per_step == 1
        assert stats.drafted > 0
        assert not {0, 1} & set(tokens.flatten().tolist())


class TestAsPlain:
    """What does not hang on a rule is as with ``PathwiseVerifier``."""

    def test_greedy(self):
        target = model()
        plain = target.generate(PROMPT, max_new_tokens=40, do_sample=False)
        drafter = SampledTrees(GROWTHS["tree"], near(target))
        with specdec.speculating(target, drafter, POLICY, verifier="rejection"):
            assert target.generate(PROMPT, max_new_tokens=40, do_sample=False).tolist() == plain.tolist()
            assert set(specdec.stats(target).by_rule) == {"match"}

    @pytest.mark.parametrize("rows", [1, 3])
    def test_trees_that_were_not_sampled_leave_the_seed_exact(self, rows):
        target, prompt = tiny.model(), tiny.prompt(rows=rows)
        torch.manual_seed(3)
        plain = target.generate(prompt, max_new_tokens=30, do_sample=True)
        with specdec.speculating(target, tiny.Oracle(tiny.texts(plain)), POLICY, verifier="rejection"):
            torch.manual_seed(3)
            assert target.generate(prompt, max_new_tokens=30, do_sample=True).tolist() == plain.tolist()
            assert specdec.stats(target).accepted > 0

    @pytest.mark.parametrize("growth", ["chain", "beam"])
    @pytest.mark.parametrize("rule", ["auto", "chain", "swor"])
    def test_scores_logits_and_streamer(self, rule, growth):
        if (rule, growth) == ("chain", "beam"):
            pytest.skip("the rule is for chains")
        target, said = model(), []
        drafter = SampledTrees(GROWTHS[growth], near(target, 0.3))
        streamer = SimpleNamespace(put=lambda ids: said.extend(ids.flatten().tolist()), end=lambda: None)
        with specdec.speculating(target, drafter, POLICY, verifier=RejectionVerifier(rule), cpu_kernels=False):
            torch.manual_seed(0)
            output = target.generate(
                PROMPT, max_new_tokens=25, do_sample=True, temperature=0.7, top_k=3, streamer=streamer,
                return_dict_in_generate=True, output_scores=True, output_logits=True,
            )  # fmt: skip
            assert specdec.stats(target).accepted > 0
        with torch.no_grad():
            logits = target(output.sequences).logits[0, 2:-1]
        assert said == output.sequences[0].tolist()
        assert len(output.scores) == len(output.logits) == 25
        torch.testing.assert_close(torch.cat(output.logits), logits, atol=1e-3, rtol=0)
        parts = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)])
        torch.testing.assert_close(torch.cat(output.scores), parts(None, logits), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("rule", ["auto", "swor"])
    def test_stopping_rules_stop_in_the_middle_of_a_path(self, rule):
        target = model()
        drafter = SampledTrees(GROWTHS["beam"], near(target, 0.1))

        def says_3_twice(ids, scores):
            return torch.tensor([bool((row[3:] == 3).sum() >= 2) for row in ids])

        torch.manual_seed(0)
        with specdec.speculating(target, drafter, POLICY, verifier=RejectionVerifier(rule)):
            for _ in range(12):
                text = target.generate(
                    PROMPT, do_sample=True, max_new_tokens=60, stopping_criteria=[says_3_twice], pad_token_id=0
                )
                new = text[0, 3:].tolist()
                assert new.count(3) == 2 or len(new) == 60
                assert new[-1] == 3 or len(new) == 60


class Counts(LogitsProcessor):
    """A processor that remembers: it notes each text that it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        self.seen.append(ids[0].tolist())
        return scores


class TestProcessorsThatRemember:
    @pytest.mark.parametrize(("growth", "instead"), [("chain", "chain"), ("beam", "swor")])
    def test_are_shown_each_committed_text_once_and_in_order(self, growth, instead):
        target, counter = model(), Counts()
        drafter = SampledTrees(GROWTHS[growth], near(target, 0.3))
        with specdec.speculating(target, drafter, POLICY, verifier="rejection"):
            torch.manual_seed(0)
            text = target.generate(PROMPT, do_sample=True, max_new_tokens=30, logits_processor=[counter])[0].tolist()
            assert specdec.stats(target).accepted > 0
            assert set(specdec.stats(target).by_rule) == {"match", instead}
        assert counter.seen == [text[:length] for length in range(3, 33)]

    def test_stand_in_rules_are_said(self):
        target = model()
        drafter = SampledTrees(GROWTHS["beam"], near(target))
        with (
            specdec.speculating(target, drafter, POLICY, verifier=RejectionVerifier("traversal")),
            pytest.warns(specdec.SpecdecWarning, match="'swor' judges in place of 'traversal'"),
        ):
            target.generate(PROMPT, do_sample=True, max_new_tokens=9, logits_processor=[Counts()])


class TestRefusals:
    def test_unknown_rule(self):
        with pytest.raises(ValueError, match="rule='typical'"):
            RejectionVerifier("typical")

    def test_names_of_verifiers(self):
        with pytest.raises(ValueError, match="known names are pathwise, rejection"):
            specdec.Speculate(verifier="typical")
        with pytest.raises(TypeError, match="verifier: got 3"):
            specdec.Speculate(verifier=3)
        assert isinstance(specdec.Speculate(verifier="rejection").verifier, RejectionVerifier)

    @pytest.mark.parametrize(
        ("rule", "growth", "said", "message"),
        [
            ("swor", "tree", None, "says no law"),
            ("chain", "beam", "swor", "several paths"),
            ("block", "beam", "iid", "several paths"),
            ("swor", "beam", "iid", "several paths"),
            ("iid", "beam", "swor", "several paths"),
        ],
    )
    def test_a_tree_that_is_not_for_the_rule(self, rule, growth, said, message):
        target = model()
        drafter = SampledTrees(GROWTHS[growth], near(target), said)
        with (
            specdec.speculating(target, drafter, POLICY, verifier=RejectionVerifier(rule)),
            pytest.raises(ValueError, match=message),
        ):
            target.generate(PROMPT, do_sample=True, max_new_tokens=9)

    def test_a_law_of_another_vocabulary_is_not_judged_by(self):
        target = model()

        class Narrow(SampledTrees):
            def tree(self, root, depth):
                tree = super().tree(root, depth)
                return tree if tree.q is None else replace(tree, q=tree.q[:, :4])

        with (
            specdec.speculating(target, Narrow(GROWTHS["chain"], near(target)), POLICY, verifier="rejection"),
            pytest.warns(specdec.SpecdecWarning, match="it has q of 4 tokens, where the target has 5"),
        ):
            target.generate(PROMPT, do_sample=True, max_new_tokens=9)
