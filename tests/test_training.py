"""What a target wrote, the loop that learns from it, and drafts that came of it: better, and nothing changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import specdec
from specdec import cli
from specdec.attach import attach
from specdec.core import Budget, Choice, Context, DraftTree, Verdict
from specdec.drafters import FeatureDrafter, SmallModelDrafter, distilled
from specdec.drafters.feature import FeatureRows
from specdec.policies import FixedPolicy
from specdec.training import feature, layers, loop
from specdec.training.samples import Sample, collect, name, read, shuffled
from specdec.training.validation import tokens_per_step
from specdec.trees.sampling import Level
from specdec.verifiers import rules
from tests import enumerated, sampling, tiny

NEW = 24
KINDS = {"layers": layers, "feature": feature}


@pytest.fixture(scope="module")
def target() -> Any:
    model = tiny.model()
    model.config.name_or_path = "where/it/lies/Target"
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    lengths = np.random.default_rng(0).integers(5, 12, 24)
    return [tiny.prompt(int(length), seed=seed)[0].tolist() for seed, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def samples(target: Any, prompts: list[list[int]], tmp_path_factory: Any) -> list[Sample]:
    return collect(target, prompts, tmp_path_factory.mktemp("samples"), NEW, 0.0, batch=8, features=True)


def made(target: Any, samples: list[Sample], kind: str, keep: int = 70) -> Any:
    return distilled.distilled(
        target, [1] if kind == "feature" else [0], layers.most_frequent(samples, keep), kind == "feature"
    )


@pytest.fixture(scope="module")
def trained(target: Any, samples: list[Sample], tmp_path_factory: Any) -> dict[str, tuple[Any, loop.State, Path]]:
    """A draft of each kind, how its training went, and its file."""
    drafts = {}
    for kind, how in KINDS.items():
        folder, draft, texts = tmp_path_factory.mktemp(kind), made(target, samples, kind), how.usable(samples)
        batches = shuffled(texts, 8, 0)
        state = loop.train(
            draft, batches, lambda batch, draft=draft, how=how: how.loss(draft, batch), folder, 60, 5e-3,
            validate=lambda draft=draft, how=how, texts=texts: how.validate(draft, texts), every=20,
        )  # fmt: skip
        distilled.save(folder / "draft.safetensors", target, draft, [1] if kind == "feature" else [0], {"kind": kind})
        drafts[kind] = draft, state, folder / "draft.safetensors"
    return drafts


class TestSamples:
    def test_greedy_ones_are_what_generate_writes(self, target: Any, samples: list[Sample]) -> None:
        ended = 0
        for sample in samples[::3]:
            ids = torch.from_numpy(sample.tokens[: sample.prompt])[None]
            plain = target.generate(ids, max_new_tokens=NEW, do_sample=False)[0]
            assert sample.tokens.tolist() == plain.tolist()
            ended += len(sample.written) < NEW
        assert ended, "no text ended early: nothing left its batch"

    def test_candidates_and_features_are_those_of_each_token(self, target: Any, samples: list[Sample]) -> None:
        for sample in samples[:4]:
            with torch.no_grad():
                outputs = target(torch.from_numpy(sample.tokens)[None], output_hidden_states=True)
            law = outputs.logits[0, sample.prompt - 1 : -1].softmax(-1)
            features = outputs.hidden_states[-1][0, sample.prompt - 1 : -1]
            expected = law.topk(sample.candidates.shape[1])
            assert sample.candidates.tolist() == expected.indices.tolist()
            assert torch.allclose(torch.from_numpy(sample.chance).float(), expected.values, atol=1e-3)
            assert sample.features is not None
            assert torch.allclose(torch.from_numpy(sample.features).float(), features, atol=1e-2)

    def test_what_was_stopped_goes_on_to_the_same_samples(
        self, target: Any, prompts: list[list[int]], tmp_path: Path
    ) -> None:
        def stop(written: int, prompts: int) -> None:
            raise KeyboardInterrupt

        whole = collect(target, prompts, tmp_path / "whole", 9, 0.7, seed=3, batch=10)
        with pytest.raises(KeyboardInterrupt):
            collect(target, prompts, tmp_path / "stopped", 9, 0.7, seed=3, batch=10, tell=stop)
        (first,) = (tmp_path / "stopped").glob("*.safetensors")
        made = first.stat().st_mtime_ns
        resumed = collect(target, prompts, tmp_path / "stopped", 9, 0.7, seed=3, batch=10)
        assert first.stat().st_mtime_ns == made, "a batch was made again"
        assert [each.tokens.tolist() for each in resumed] == [each.tokens.tolist() for each in whole]
        assert [each.tokens.tolist() for each in read(tmp_path / "stopped")] == [each.tokens.tolist() for each in whole]

    def test_another_call_s_folder_is_refused(self, target: Any, prompts: list[list[int]], tmp_path: Path) -> None:
        collect(target, prompts[:2], tmp_path, 2)
        with pytest.raises(ValueError, match="another temperature, prompts: give another folder"):
            collect(target, prompts[:3], tmp_path, 2, temperature=0.5)

    def test_after_its_minutes_no_batch_is_begun(self, target: Any, prompts: list[list[int]], tmp_path: Path) -> None:
        assert collect(target, prompts, tmp_path, 2, minutes=0) == []

    def test_a_prompt_of_one_token_is_refused(self, target: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="less than two tokens"):
            collect(target, [[5]], tmp_path)

    def test_a_round_has_every_sample_once(self, samples: list[Sample]) -> None:
        batch = shuffled(samples, 8, 0)
        rounds = [[id(sample) for step in steps for sample in batch(step)] for steps in (range(3), range(3, 6))]
        assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(map(id, samples))
        assert rounds[0] != rounds[1]

    def test_the_most_frequent_tokens_are_those_the_law_expects(self) -> None:
        sample = Sample(
            np.array([1, 2, 3]), 1, np.array([[7, 4], [4, 9]]), np.array([[0.6, 0.4], [0.5, 0.1]], np.float16)
        )
        assert layers.most_frequent([sample], 2).tolist() == [4, 7]
        assert layers.most_frequent([sample], 50).tolist() == [4, 7, 9]


class TestLoop:
    class Noisy(nn.Module):
        """Something that draws while it learns."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.layers(batch) - batch.sum(-1, keepdim=True)).square().mean()

    @staticmethod
    def batches(step: int) -> torch.Tensor:
        return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))

    def run(self, folder: Path, stop: int = -1, steps: int = 30, **more: Any) -> tuple[nn.Module, loop.State]:
        def batches(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return self.batches(step)

        module = self.Noisy()
        return module, loop.train(module, batches, module.loss, folder, steps, 0.05, seed=1, every=7, **more)

    def test_a_stopped_run_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        whole, state = self.run(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "stopped", stop=18)
        resumed, again = self.run(tmp_path / "stopped")
        assert [each["loss"] for each in again.figures] == [each["loss"] for each in state.figures]
        for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_a_run_that_is_done_is_only_read(self, tmp_path: Path) -> None:
        whole, state = self.run(tmp_path)
        again, read = self.run(tmp_path, stop=0)
        assert read == state
        assert all(map(torch.equal, again.parameters(), whole.parameters()))

    def test_validation_changes_nothing(self, tmp_path: Path) -> None:
        plain, _ = self.run(tmp_path / "plain")
        modes = []

        def validate() -> float:
            modes.append(checked.training)
            return float(torch.rand(()))

        checked = self.Noisy()
        loop.train(checked, self.batches, checked.loss, tmp_path / "checked", 30, 0.05, 1, validate=validate, every=7)
        assert all(map(torch.equal, checked.parameters(), plain.parameters()))
        assert modes == [False] * 5

    def test_it_learns(self, tmp_path: Path) -> None:
        _, state = self.run(tmp_path, steps=70)
        assert state.figures[-1]["loss"] < state.figures[0]["loss"] / 4

    def test_its_minutes_end_it(self, tmp_path: Path) -> None:
        _, state = self.run(tmp_path, minutes=1e-9)
        assert state.step == 1

    def test_another_run_s_folder_is_refused(self, tmp_path: Path) -> None:
        self.run(tmp_path, steps=2)
        with pytest.raises(ValueError, match=r"of another run.*give another folder"):
            self.run(tmp_path, steps=3)

    def test_half_precision_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"parameter weight is torch\.float16: training needs float32"):
            loop.train(nn.Linear(2, 2).half(), self.batches, torch.sum, tmp_path, 1)


def test_tokens_per_step_are_those_of_chains_one_after_another() -> None:
    # Guess d of a chain that begins at place s is about place s + d.
    right = np.array([[1, 0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 1, 1, 1]], bool)
    # 0: both right, with the target's own 3 tokens; 3: 2 of 2 right, 3 tokens; 6: wrong, 1 token.
    assert tokens_per_step([right]) == pytest.approx(7 / 3)
    assert tokens_per_step([np.zeros((4, 9), bool)]) == 1


@pytest.mark.parametrize("kind", KINDS)
class TestDrafts:
    def test_training_makes_it_draft_better(self, target: Any, samples: list[Sample], trained: Any, kind: str) -> None:
        state = trained[kind][1]
        assert state.figures[-1]["loss"] < state.figures[0]["loss"]
        before = KINDS[kind].validate(made(target, samples, kind), KINDS[kind].usable(samples))
        assert state.figures[-1]["figure"] > before + 0.1

    def test_the_figure_is_what_decoding_gives(
        self, target: Any, samples: list[Sample], trained: Any, kind: str
    ) -> None:
        _, _, path = trained[kind]
        drafter = distilled.drafter(path, target, cpu_kernels=False)
        alone = 1 + (kind == "feature")  # passes that judge no draft
        texts, steps = [each for each in samples if len(each.written) == NEW][:3], 0
        for text in texts:
            with specdec.speculating(target, drafter, FixedPolicy(4, 4, 1), cpu_kernels=False):
                target.generate(torch.from_numpy(text.tokens[: text.prompt])[None], max_new_tokens=NEW, do_sample=False)
                steps += specdec.stats(target).steps - alone
        figure = KINDS[kind].validate(trained[kind][0], [after_one(text) for text in texts])
        assert figure == pytest.approx(len(texts) * (NEW - alone) / steps)

    @pytest.mark.parametrize("tree", ["chain", "best-first", "rsd-s"])
    def test_the_tokens_are_the_target_s(self, target: Any, trained: Any, kind: str, tree: Any) -> None:
        drafter = distilled.drafter(trained[kind][2], target, tree=tree, cpu_kernels=False)
        result = tiny.same(target, tiny.padded(9, 5, 7), drafter=drafter, max_new_tokens=20, do_sample=False)
        assert result.stats.drafted > 0


def after_one(sample: Sample) -> Sample:
    """The sample of a prompt that had the first written token too."""
    features = None if sample.features is None else sample.features[1:]
    return Sample(sample.tokens, sample.prompt + 1, sample.candidates[1:], sample.chance[1:], features)


def test_layers_learn_from_features_where_there_are_any(target: Any, samples: list[Sample]) -> None:
    draft = made(target, samples, "layers")
    with torch.no_grad():
        both, laws = (
            layers.loss(draft, each) for each in (samples[:3], [replace(s, features=None) for s in samples[:3]])
        )
        said = torch.cat([layers._hidden(draft, [sample]) for sample in samples[:3]]).numpy()
    true = np.concatenate([sample.features for sample in samples[:3] if sample.features is not None]).astype(np.float32)
    apart = ((said - true) ** 2).sum(-1) / (true**2).sum(-1)
    assert float(both - laws) == pytest.approx(apart.mean(), rel=1e-3)


class TestFiles:
    def test_what_is_loaded_is_what_was_saved(self, target: Any, trained: Any) -> None:
        for draft, _, path in trained.values():
            loaded = distilled.load(path, target)
            for part, weight in distilled.own(draft).items():
                assert torch.equal(distilled.own(loaded)[part], weight), part
            assert loaded.get_input_embeddings().weight is target.get_input_embeddings().weight

    def test_only_what_is_the_draft_s_own_is_stored(self, target: Any, trained: Any) -> None:
        shared = target.get_input_embeddings().weight.numel()
        for draft, _, path in trained.values():
            assert path.stat().st_size < 4 * sum(map(torch.numel, distilled.own(draft).values())) + 3 * shared

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"hidden_size": 16}, "of hidden size 32, not 16: train one for this target"),
            ({"vocab_size": 98}, "of vocabulary 97, not 98"),
            ({"num_hidden_layers": 3}, "of layers 2, not 3"),
        ],
    )
    def test_another_target_s_is_refused(self, trained: Any, changes: dict[str, int], told: str) -> None:
        other = tiny.model(**changes)
        other.config.name_or_path = "Target"
        with pytest.raises(ValueError, match=told):
            distilled.load(trained["layers"][2], other)

    def test_another_name_s_is_refused(self, trained: Any) -> None:
        with pytest.raises(ValueError, match="drafts for another target, of name 'Target', not ''"):
            distilled.load(trained["layers"][2], tiny.model())

    def test_names(self, target: Any, trained: Any) -> None:
        assert name(target) == "Target"
        for kind, expected in (("layers", SmallModelDrafter), ("feature", FeatureDrafter)):
            with specdec.speculating(target, f"draft:{trained[kind][2]}", cpu_kernels=False):
                made = target.generate.speculate.drafter
                assert type(made) is expected
                assert (made.tree, made.thrifty) == ("best-first", True)
            with specdec.speculating(target, f"draft:{trained[kind][2]}", FixedPolicy(4, 4, 1), cpu_kernels=False):
                made = target.generate.speculate.drafter
                assert (made.tree, made.thrifty) == ("chain", False)
        with pytest.raises(ValueError, match="which knows its target"):
            specdec.Speculate("draft:x")
        with pytest.raises(FileNotFoundError, match="no file nowhere"):
            specdec.wrap(target, drafter="draft:nowhere")

    def test_a_draft_without_features_is_no_feature_drafter(self, trained: Any) -> None:
        with pytest.raises(ValueError, match="give a draft of kind 'feature'"):
            FeatureDrafter(trained["layers"][0])

    def test_so_many_layers_are_not_there(self) -> None:
        assert layers.evenly(3, 30) == [0, 14, 29]
        assert layers.evenly(1, 30) == [29]
        with pytest.raises(ValueError, match="3 layers: the target has 2"):
            layers.evenly(3, 2)


class TestTrimmed:
    """A head of some tokens gives a law over all of them."""

    def test_law(self, target: Any, trained: Any) -> None:
        draft, kept = trained["layers"][0], distilled.kept(trained["layers"][0])
        with torch.no_grad():
            law = draft(tiny.prompt()).logits.double().softmax(-1)
        assert law.shape[-1] == tiny.VOCAB
        assert torch.allclose(law.sum(-1), torch.ones(()).double())
        outside = torch.ones(tiny.VOCAB, dtype=torch.bool).index_fill(0, kept, False)
        assert outside.any()
        assert not law[..., outside].any()
        assert (law[..., ~outside] > 0).all()

    def test_weights_are_the_target_s(self, target: Any) -> None:
        kept = np.array([3, 9, 40])
        draft = distilled.distilled(target, [0, 1], kept)  # untrained, and of all layers
        with torch.no_grad():
            ours, theirs = draft(tiny.prompt()).logits, target(tiny.prompt()).logits
        assert torch.allclose(ours[..., kept], theirs[..., kept], atol=1e-5)

    def test_a_sampled_tree_says_the_law_that_it_was_drawn_from(self, target: Any, trained: Any) -> None:
        draft = trained["layers"][0]
        drafter = SmallModelDrafter(draft, "rsd-c", branching=(2, 1), cpu_kernels=False)
        context = Context(tiny.prompt()[0].numpy())
        context.choice = Choice(tiny.VOCAB, sample=True)
        (tree,) = drafter.draft([context], [Budget(8, 2, 2)])
        assert tree.law == "swor"
        for node in set(tree.parents[1:].tolist()):
            ids = torch.from_numpy(np.append(context.tokens, enumerated.spelled(tree, node)).astype(np.int64))[None]
            with torch.no_grad():
                law = draft(ids).logits[0, -1].softmax(-1)
            assert torch.allclose(tree.q[node], law, atol=1e-6)

    @pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 1)])
    @pytest.mark.parametrize("rule", [rules.recursive, rules.traversal])
    def test_output_law_is_the_target_s(self, shape: tuple[int, ...], rule: Any) -> None:
        """Of four tokens the draft keeps two: its law is zero at the others, and the target's is not."""
        model = tiny.model(vocab_size=4, eos_token_id=None, bos_token_id=None, pad_token_id=None).double()
        draft = distilled.distilled(model, [0], np.array([0, 2]))

        def laws(module: Any) -> enumerated.Laws:
            def law(path: tuple[int, ...]) -> torch.Tensor:
                with torch.no_grad():
                    return module(torch.tensor([[1, 3, *path]])).logits[0, -1].double().softmax(-1)

            return law

        wanted = enumerated.joint(laws(model), 4, len(shape) + 1)
        got, accepted = enumerated.output(rule, enumerated.drafts(shape, laws(draft), "swor"), laws(model), wanted)
        assert np.abs(got - wanted).max() < 1e-12
        assert accepted > 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_sampled_output_is_distributed_as_the_target_s(self, kind: str) -> None:
        model = sampling.model(num_hidden_layers=1)
        draft = distilled.distilled(model, [0], np.array([0, 2, 3]), fused=kind == "feature")
        made = FeatureDrafter if kind == "feature" else SmallModelDrafter
        drafter, prompt = made(draft, "rsd-c", branching=(2, 1), cpu_kernels=False), torch.tensor([[1, 3, 2, 4]])
        new = 4 if kind == "feature" else 3  # it drafts from the third on
        with specdec.speculating(model, drafter, FixedPolicy(4, 2, 2), verifier="rejection", cpu_kernels=False):
            torch.manual_seed(0)
            output = model.generate(prompt.expand(500, -1), max_new_tokens=new, do_sample=True, top_k=0)
            assert specdec.stats(model).accepted > 100
        law = sampling.law(model, prompt, new)
        assert sampling.p_value(sampling.counts(output[:, 4:]), law) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["GPT2", "Qwen3", "Gemma"])
def test_other_architectures(kind: str, fused: bool, tmp_path: Path) -> None:
    """Tied and scaled embeddings, learnt positions, norms of heads: they learn, and draft for their target."""
    model = (tiny.gpt2() if kind == "GPT2" else tiny.model(kind)).requires_grad_(False)
    how, prompts = feature if fused else layers, [tiny.prompt(6, seed=i)[0].tolist() for i in range(4)]
    texts = how.usable(collect(model, prompts, tmp_path, 12, batch=4, features=True))
    draft = distilled.distilled(model, [1], layers.most_frequent(texts, 60), fused)
    how.loss(draft, texts).backward()
    assert all(weight.grad is not None for weight in distilled.own(draft).values())
    assert all(weight.grad is None for weight in model.parameters())
    distilled.save(tmp_path / "draft", model, draft, [1], {})
    drafter = distilled.drafter(tmp_path / "draft", model, cpu_kernels=False)
    result = tiny.same(model, {"input_ids": tiny.prompt(6)}, drafter=drafter, max_new_tokens=12, do_sample=False)
    assert result.stats.drafted > 0


class TestFeatureDrafter:
    """Contexts are told of tokens and features by hand, as a target's verdicts would."""

    @staticmethod
    def begun(sample: Sample) -> Context:
        context = Context(sample.tokens[: sample.prompt])
        root = DraftTree.root(int(context.tokens[-1]))
        context.extend(Verdict(root, np.arange(1), sample.written[:1], prompt=True))
        return context

    @staticmethod
    def told(context: Context, sample: Sample, count: int) -> None:
        start = len(context.tokens) - sample.prompt
        tree = DraftTree.chain(
            int(context.tokens[-1]), sample.written[start : start + count - 1], [1.0] * (count - 1), ""
        )
        hidden = torch.from_numpy(sample.features[start : start + count]).float()
        context.extend(Verdict(tree, np.arange(count), sample.written[start : start + count], hidden=hidden))

    def drafts(self, drafter: FeatureDrafter, contexts: list[Context]) -> list[list[int]]:
        return [tree.tokens.tolist() for tree in drafter.draft(contexts, [Budget(6, 3, 2)] * len(contexts))]

    @pytest.fixture
    def texts(self, samples: list[Sample]) -> list[Sample]:
        return [sample for sample in samples if len(sample.written) == NEW][:3]

    def test_what_drafting_computes_is_what_training_did(self, trained: Any, texts: Any) -> None:
        """Of a chain that is right, beside a guess that is wrong."""
        draft, text, at = trained["feature"][0], texts[0], 7
        rows = FeatureRows(draft, attach(draft, timed=False).form)
        rows.texts[0].features = torch.from_numpy(text.features).float()
        root, first, second = text.written[at : at + 3].tolist()
        after = [rows.read([text.written[: at + 1]])[0]]
        for tokens, start in (([root, 5, first], 1), ([root, 5, first, second], 3)):
            level = Level(np.array(tokens), np.array([-1, 0, 0, 2][: len(tokens)]), start)
            after.append(rows.grow([level])[0][-1])
        with torch.no_grad():
            said = feature.unrolled(draft, feature.Texts.of([text], draft.device), 3)
            expected = [distilled.few_logits(draft, each[0, at + made]) for made, each in enumerate(said)]
        for ours, theirs in zip(after, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)

    def test_texts_that_join_and_leave_do_not_disturb_each_other(self, target: Any, trained: Any, texts: Any) -> None:
        def drafter() -> FeatureDrafter:
            return FeatureDrafter(trained["feature"][0], "best-first", cpu_kernels=False)

        counts, alone = (1, 2, 1, 3, 1, 2), []
        for text in texts:
            context, single = self.begun(text), drafter()
            alone.append([])
            for count in counts:
                self.told(context, text, count)
                alone[-1] += self.drafts(single, [context])
        assert all(len(tree) > 1 for trees in alone for tree in trees)
        shared, contexts = drafter(), [self.begun(text) for text in texts]
        for step, count in enumerate(counts):
            live = [0] if step < 2 else [1, 0, 2] if step < 4 else [2, 1]  # the second and third join late
            for i in live:
                for earlier in counts[: step if len(contexts[i].tokens) == texts[i].prompt + 1 else 0]:
                    self.told(contexts[i], texts[i], earlier)
                    shared.draft([contexts[i]], [Budget(0, 0, 0)])
                self.told(contexts[i], texts[i], count)
            assert self.drafts(shared, [contexts[i] for i in live]) == [alone[i][step] for i in live]

    def test_what_follows_a_gap_is_drafted_from_anew(self, trained: Any, texts: Any) -> None:
        text, drafter = texts[0], FeatureDrafter(trained["feature"][0], cpu_kernels=False)
        context, fresh = self.begun(text), self.begun(text)
        assert len(self.drafts(drafter, [context])[0]) == 1, "it has no feature yet"
        for count in (2, 3, 2):  # the second of them it is not shown
            self.told(context, text, count)
            if count == 2:
                after = self.drafts(drafter, [context])
        fresh.extend(Verdict(DraftTree.root(0), np.arange(1), text.written[1:6], prompt=True))
        self.told(fresh, text, 2)
        assert after == self.drafts(FeatureDrafter(trained["feature"][0], cpu_kernels=False), [fresh])
        assert len(after[0]) > 1


class TestCommand:
    def test_it_trains_and_says_how_to_use_it(self, tmp_path: Path) -> None:
        model = tmp_path / "model"
        tiny.model(eos_token_id=None, bos_token_id=None).save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        (tmp_path / "prompts.txt").write_text("\n\n".join(f"Say {i}." for i in range(9)))
        asked = ["train", "draft", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt")]
        asked += ["--samples", str(tmp_path / "samples"), "--held-out", "2", "--max-new-tokens", "8"]
        for kind in KINDS:
            out = tmp_path / kind
            run = [*asked, "--kind", kind, "--out", str(out), "--layers", "1", "--vocabulary", "50", "--steps", "2"]
            result = CliRunner().invoke(cli.app, run)
            assert result.exit_code == 0, result.output
            assert f"use it as --drafter draft:{out}/draft.safetensors" in result.output
            loaded = AutoModelForCausalLM.from_pretrained(model)
            assert distilled.drafter(out / "draft.safetensors", loaded, cpu_kernels=False).hidden == (kind == "feature")

    def test_stopped_it_goes_on_to_the_draft_of_its_seed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, step, stops = tmp_path / "model", loop._step, [False, False, True]  # before its third step
        tiny.model(eos_token_id=None, bos_token_id=None).save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        (tmp_path / "prompts.txt").write_text("\n\n".join(f"Say {i}." for i in range(9)))
        asked = ["train", "draft", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--held-out", "2"]
        asked += ["--max-new-tokens", "8", "--layers", "1", "--vocabulary", "50", "--steps", "4", "--every", "2"]

        def stopped(*arguments: Any) -> float:
            if stops and stops.pop(0):
                raise KeyboardInterrupt
            return step(*arguments)

        def run(out: str, seed: int) -> Any:
            return CliRunner().invoke(cli.app, [*asked, "--out", str(tmp_path / out), "--seed", str(seed)])

        def weights(out: str) -> list[torch.Tensor]:
            target = AutoModelForCausalLM.from_pretrained(model)
            return list(distilled.own(distilled.load(tmp_path / out / "draft.safetensors", target)).values())

        monkeypatch.setattr(loop, "_step", stopped)
        first = run("stopped", 1)
        assert first.exit_code != 0
        assert "step 2" in first.output
        assert not (tmp_path / "stopped" / "draft.safetensors").exists()
        second = run("stopped", 1)
        assert "step 2" not in second.output
        assert "tokens per step" in second.output.split("step 4")[1]
        for out, seed in (("whole", 1), ("other", 2)):
            assert run(out, seed).exit_code == 0
        assert all(map(torch.equal, weights("stopped"), weights("whole")))
        assert not all(map(torch.equal, weights("stopped"), weights("other")))

    def test_too_few_prompts_are_told(self, tmp_path: Path) -> None:
        tiny.model().save_pretrained(tmp_path)
        tiny.tokenizer().save_pretrained(tmp_path)
        (tmp_path / "prompts.txt").write_text("Say it.")
        asked = ["train", "draft", "--model", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt")]
        result = CliRunner().invoke(cli.app, [*asked, "--out", str(tmp_path / "out")])
        assert result.exit_code == 1
        assert "1 prompts of 2 to 1024 tokens: give more than are held out, 24" in result.output
