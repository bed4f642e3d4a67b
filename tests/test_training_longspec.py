"""LongSpec's recipe: positions beyond a text's length, a target read late, and a layer that comes to draft like it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from specdec import cli, storage
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import LongSpecDrafter
from specdec.drafters.lent import Lent
from specdec.drafters.longspec_layer import KIND, VERSION, LongSpecLayer
from specdec.training import longspec
from specdec.training.longspec import Batch, Readings, anchored, blindness, drawn, loss, right
from specdec.training.samples import Sample
from tests import tiny

WINDOW = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model(max_position_embeddings=4096, eos_token_id=None).requires_grad_(False)


@pytest.fixture(scope="module")
def samples(model: Any) -> list[Sample]:
    """What the target likes best after some prompts of different lengths."""
    texts = [model.generate(tiny.prompt(5 + i % 3, seed=i), max_new_tokens=24)[0].numpy() for i in range(6)]
    nothing = np.zeros((0, 1))
    return [Sample(text, 5 + i % 3, nothing, nothing) for i, text in enumerate(texts)]


class TestIndices:
    def test_g20(self) -> None:
        assert anchored(10, anchors=4, offset=100).tolist() == [0, 1, 2, 3, *range(104, 110)]

    def test_law(self) -> None:
        """Up to 4 anchors stay, all else moves together, and any place of a long text comes up as often as another."""
        rng, length, positions = np.random.default_rng(0), 100, 8192
        texts = [drawn(length, positions, rng) for _ in range(2000)]
        offsets = np.array([text[-1] - length + 1 for text in texts])
        anchors = np.array([int((text == np.arange(length)).sum()) if text[-1] >= length else -1 for text in texts])
        for text, offset, anchor in zip(texts, offsets, anchors, strict=True):
            assert offset == 0 or text.tolist() == anchored(length, anchor, offset).tolist()
        assert set(anchors[anchors >= 0]) == {0, 1, 2, 3, 4}
        assert 0 <= offsets.min() <= offsets.max() <= 7192 - length
        counts = np.histogram(offsets, 8, (0, 7193 - length))[0]
        assert counts.min() > 190  # 250 are expected of each eighth
        assert counts.max() < 310

    def test_leave_texts_where_they_are_that_are_as_long_as_the_target_knows(self) -> None:
        assert all(drawn(60, 64, np.random.default_rng(i)).tolist() == list(range(60)) for i in range(20))

    def test_reach_30k_at_most(self) -> None:
        rng = np.random.default_rng(0)
        far = [drawn(100, 131072, rng)[-1] for _ in range(300)]
        assert 29_000 < max(far) < 30_000

    def test_are_the_layers_and_the_targets(self, model: Any, samples: list[Sample]) -> None:
        """Rows and features are those of the target fed the same tokens one by one at the same positions."""
        readings = Readings(model, length=20)
        found = [readings.of(sample) for sample in samples]
        leaps = [int(reading.positions[-1]) - len(reading.positions) + 1 for reading in found]
        reading = found[int(np.argmax(leaps))]
        assert max(leaps) > 2000
        assert len(reading.tokens) == 20
        cache = DynamicCache(config=model.config)
        for token, place in zip(reading.tokens, reading.positions, strict=True):
            output = model(
                token[None, None], position_ids=place[None, None], past_key_values=cache, output_hidden_states=True
            )
        torch.testing.assert_close(reading.keys, cache.layers[-1].keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reading.values, cache.layers[-1].values[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reading.features[-1], output.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)

    def test_are_not_moved_without_offsets(self, model: Any, samples: list[Sample]) -> None:
        readings = Readings(model, offsets=False)
        assert all(torch.equal(readings.of(s).positions, torch.arange(len(s.tokens))) for s in samples)


class TestReadings:
    def test_are_kept_as_far_as_they_fit(self, model: Any, samples: list[Sample]) -> None:
        one = Readings(model).of(samples[0])
        readings = Readings(model, held=one.bytes)
        first, second = readings.of(samples[0]), readings.of(samples[3])
        assert readings.of(samples[0]) is first
        assert readings.of(samples[3]) is not second
        assert torch.equal(readings.of(samples[3]).positions, second.positions)


class TestNoise:
    @pytest.mark.parametrize("blind", [1, 2, 4])
    def test_hides_the_targets_newest_rows(self, model: Any, samples: list[Sample], blind: int) -> None:
        layer, lent, reading = LongSpecLayer.of(model, WINDOW), Lent(model), Readings(model).of(samples[0])
        x, rotation = lent.embed(reading.tokens), lent.rotation(reading.positions)
        keys, values = (rows.clone().requires_grad_() for rows in (reading.keys, reading.values))
        place = 10
        layer(x, rotation, keys, values, blind)[place].sum().backward()
        for rows in (keys, values):
            reached = rows.grad.abs().sum((0, 2)) > 0  # type: ignore[union-attr]
            assert torch.equal(reached, torch.arange(len(x)) <= place - blind)

    def test_is_as_deep_as_chains_are(self) -> None:
        assert {blindness(step, 0) for step in range(40)} == {1, 2, 3, 4}

    def test_leaves_numbers_where_nothing_is_seen(self, model: Any, samples: list[Sample]) -> None:
        layer, lent, reading = LongSpecLayer.of(model, WINDOW), Lent(model), Readings(model, length=3).of(samples[0])
        assert torch.isfinite(loss(layer, lent, Batch([reading], 4)))


def test_the_window_hides_the_layers_own_older_rows(model: Any) -> None:
    layer, lent = LongSpecLayer.of(model, WINDOW), Lent(model)
    x = lent.embed(tiny.prompt(20)[0]).clone().requires_grad_()
    nothing = torch.zeros(2, 20, 8)
    layer(x, lent.rotation(torch.arange(20)), nothing, nothing, 1)[15].sum().backward()
    assert torch.equal(x.grad.abs().sum(-1) > 0, (torch.arange(20) > 15 - WINDOW) & (torch.arange(20) <= 15))


class Noted(LongSpecDrafter):
    """Remembers what it drafted behind which text."""

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        trees = super().draft(contexts, budgets)
        pairs = zip(contexts, trees, strict=True)
        self.noted = [*getattr(self, "noted", []), *((len(context.tokens), tree) for context, tree in pairs)]
        return trees


@pytest.fixture(scope="module")
def trained(model: Any, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    arguments: dict[str, Any] = {"size": 6, "window": WINDOW, "vocabulary": None, "offsets": False}
    longspec.train(model, samples, samples[:2], folder, 40, learning_rate=2e-2, **arguments)
    return folder / "longspec.safetensors"


class TestTraining:
    def test_makes_the_loss_fall(self, model: Any, samples: list[Sample], trained: Path) -> None:
        lent, readings = Lent(model), Readings(model, offsets=False)
        batch = Batch([readings.of(sample) for sample in samples], 2)
        fresh, learnt = (loss(layer, lent, batch) for layer in (LongSpecLayer.of(model, WINDOW), load(trained)))
        assert learnt < fresh / 2

    def test_makes_more_be_accepted(self, model: Any, samples: list[Sample], trained: Path) -> None:
        prompts = [{"input_ids": torch.from_numpy(sample.tokens[None, : sample.prompt])} for sample in samples[:3]]
        accepted = dict[str, int]()
        for name, layer in (("fresh", LongSpecLayer.of(model, WINDOW)), ("trained", load(trained))):
            drafter = LongSpecDrafter(layer, cpu_kernels=False)
            results = [tiny.same(model, prompt, drafter=drafter, max_new_tokens=20) for prompt in prompts]
            accepted[name] = sum(result.stats.accepted for result in results)
        assert accepted["trained"] > 2 * accepted["fresh"]
        assert accepted["trained"] > 15

    def test_says_beforehand_which_guesses_will_be_right(
        self, model: Any, samples: list[Sample], trained: Path
    ) -> None:
        """Of each chain that is drafted, its guesses up to the first wrong one."""
        sample, drafter = samples[0], Noted(load(trained), cpu_kernels=False)
        ids = torch.from_numpy(sample.tokens[None, : sample.prompt])
        tiny.same(model, {"input_ids": ids}, drafter=drafter, max_new_tokens=24)
        told = right(drafter.layer, drafter.lent, Readings(model, offsets=False).of(sample))
        assert told.any()
        for length, tree in drafter.noted:
            for depth, token in enumerate(tree.tokens[1:5]):
                place = length + depth
                if place >= len(sample.tokens):
                    break
                assert told[depth, place - sample.prompt] == (token == sample.tokens[place])
                if token != sample.tokens[place]:
                    break

    def test_of_a_smaller_vocabulary_says_nothing_else(self, model: Any, samples: list[Sample], tmp_path: Path) -> None:
        few = [
            Sample(s.tokens, s.prompt, s.tokens[s.prompt :, None], np.ones((len(s.written), 1), np.float16))
            for s in samples
        ]
        layer = longspec.train(model, few, few[:1], tmp_path, steps=1, window=WINDOW, vocabulary=7)
        assert layer.kept is not None
        assert len(layer.kept) == 7
        assert torch.equal(load(tmp_path / "longspec.safetensors").kept, layer.kept)

    def test_for_a_target_that_cannot_have_one_is_refused(self, samples: list[Sample], tmp_path: Path) -> None:
        target = tiny.build("Mistral", sliding_window=16)
        with pytest.raises(ValueError, match="last layer does not look back without limit"):
            longspec.train(target, samples, samples, tmp_path, steps=1, vocabulary=None)


def test_the_command_makes_a_file_that_drafts(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    questions = [{"question_id": i, "category": "any", "turns": [f"say {i} twice"]} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, questions)))
    arguments = f"train draft --kind longspec --model {tmp_path}/tiny --prompts {tmp_path}/prompts.jsonl --steps 2"
    more = f"--out {tmp_path}/out --held-out 1 --max-new-tokens 8 --vocabulary 30 --window 9 --no-offsets"
    result = CliRunner().invoke(cli.app, f"{arguments} {more}".split(), catch_exceptions=False)
    assert "--drafterlongspec:" in "".join(result.output.split())
    drafter = LongSpecDrafter.load(tmp_path / "out" / "longspec.safetensors", model)
    assert drafter.layer.window == 9
    assert drafter.layer.kept is not None
    assert len(drafter.layer.kept) == 30
    assert storage.read(tmp_path / "out" / "longspec.safetensors", KIND, VERSION)[1]["offsets"] is False


def load(path: Path) -> LongSpecLayer:
    return LongSpecLayer.load(path)
