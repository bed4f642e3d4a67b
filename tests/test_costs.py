"""T(nodes, context, rows): read from a table, moved by what passes take, saved for the next process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec import attach, storage, timing
from specdec.costs import FRESH, LARGEST, SAVED_FOR, SHARED, VERSION, Costs
from tests import tiny
from tests.simulation import KERNELS, QUICK, table
from tests.tiny import prompt


class TestTimes:
    def test_straight_lines_between_and_beyond_what_was_measured(self) -> None:
        costs, seconds = Costs(KERNELS), table(KERNELS)
        assert costs.times(64, 0) == pytest.approx([seconds(n) for n in range(1, 65)])

    def test_larger_passes_are_never_thought_quicker(self) -> None:
        assert (np.diff(Costs({1: 1.0, 16: 2.0, 32: 1.9}).times(500, 0)) >= 0).all()
        assert (Costs({4: 2.0}).times(500, 0) == 2.0).all()

    def test_a_size_that_was_disturbed_does_not_make_a_larger_one_free(self) -> None:
        """A line between its neighbours stands for it."""
        costs = Costs(KERNELS | {4: KERNELS[8]})
        assert costs.time(4, 0) == pytest.approx(KERNELS[2] + (KERNELS[8] - KERNELS[2]) / 3)

    def test_two_tokens_may_cost_as_much_as_four(self) -> None:
        """Libraries multiply a single row in another way than several."""
        assert Costs({1: 1.0, 2: 2.1, 4: 2.0, 8: 2.4}).time(2, 0) == 2.0

    @pytest.mark.parametrize("rows", [1, 4])
    def test_each_node_costs_something_unless_passes_of_all_sizes_take_the_same_time(self, rows: int) -> None:
        costs = Costs({1: 1.0, 4: 1.0, 8: 1.0, 32: 2.24})
        assert np.diff(costs.times(2, 0, rows)) == pytest.approx([rows * 0.01])
        assert set(Costs({1: 1.0, 32: 1.0}).times(8, 0, rows)) == {1.0}

    @pytest.mark.parametrize("rows", [1, 4, 1000, 5000])
    def test_one_time_is_one_of_all(self, rows: int) -> None:
        costs = Costs({1: 1.0, 8: 1.0, 32: 1.5}, read=1e-5, attend=1e-6)
        every = costs.times(9, 300, rows)
        assert [costs.time(n, 300, rows) for n in range(1, len(every) + 1)] == pytest.approx(every)

    def test_the_tokens_of_all_rows_count(self) -> None:
        costs = Costs(KERNELS)
        assert costs.times(10, 0, rows=3) == pytest.approx(costs.times(30, 0)[2::3])

    def test_texts_are_read_once_per_row_and_attended_to_by_each_node(self) -> None:
        longer = Costs(KERNELS, read=1e-5, attend=1e-6).times(4, 1000, rows=2) - Costs(KERNELS).times(4, 0, rows=2)
        assert longer == pytest.approx([0.020 + 0.002 * n for n in (1, 2, 3, 4)])

    @pytest.mark.parametrize(("rows", "sizes"), [(1, 64), (16, 64), (100, 10), (LARGEST, 1), (5000, 1)])
    def test_no_pass_is_too_large(self, rows: int, sizes: int) -> None:
        assert len(Costs(KERNELS).times(64, 0, rows)) == sizes


class TestLearning:
    def test_passes_about_as_large_are_moved_most(self) -> None:
        costs, before = Costs(KERNELS), Costs(KERNELS).curve
        for _ in range(100):
            costs.learn(16, 0, 1, 1.5 * before[15])
        moved = costs.curve / before
        assert moved[15] == pytest.approx(1.5, rel=0.01)
        assert moved[15] > moved[14] > moved[11] > moved[0] > 1.1
        assert moved[15] > moved[16] > moved[20] > moved[100] > 1.1

    def test_rows_and_context_are_told_apart_from_size(self) -> None:
        costs = Costs(KERNELS, read=1e-5, attend=1e-6)
        expected = costs.times(8, 500, rows=2)[-1]
        for _ in range(10):
            costs.learn(8, 500, 2, expected)
        assert costs.curve == pytest.approx(Costs(KERNELS).curve)

    def test_a_long_text_that_was_misjudged_does_not_make_passes_over_short_ones_free(self) -> None:
        """Attention was timed at twice what it costs."""
        quick, read, attend = {1: 0.02, 8: 0.021, 16: 0.03, 32: 0.053}, 1.5e-6, 2.5e-7
        seconds, costs = table(quick), Costs(quick, 2 * read, 2 * attend)
        for nodes in [9, 17, 9] * 40:
            costs.learn(nodes, 7000, 1, seconds(nodes) + 7000 * (read + attend * nodes))
        for nodes in (1, 9, 17):
            assert costs.time(nodes, 300) == pytest.approx(seconds(nodes) + 300 * (read + attend * nodes), rel=0.2)
        assert costs.time(9, 7000) == pytest.approx(seconds(9) + 7000 * (read + attend * 9), rel=0.05)
        assert costs.read / costs.attend == pytest.approx(read / attend)

    def test_a_disturbed_pass_hardly_counts(self) -> None:
        costs = Costs(KERNELS)
        for seconds in (10.0, 1e-6):
            costs.learn(4, 0, 1, seconds)
            assert costs.curve == pytest.approx(Costs(KERNELS).curve, rel=0.08)

    def test_the_first_passes_count_most_and_later_ones_as_much_as_each_other(self) -> None:
        costs, moved = Costs(KERNELS), []
        for _ in range(40):
            before = costs.time(8, 0)
            costs.learn(8, 0, 1, 1.1 * before)
            moved.append(costs.time(8, 0) / before)
        assert moved[0] > moved[1] > moved[2] > moved[20] > 1
        assert moved[20] == pytest.approx(moved[39])

    def test_what_was_seen_is_less_in_doubt_and_the_plain_pass_counts_too(self) -> None:
        costs = Costs(KERNELS)
        doubts = [costs.doubt(2, 4)]
        for nodes in (1, 2):
            for _ in range(50):
                costs.learn(nodes, 0, 4, KERNELS[4 * nodes])
            doubts.append(costs.doubt(2, 4))
        assert doubts[0] > 1.5 * doubts[1] > 2 * doubts[2] > 0

    def test_that_the_machine_is_slower_keeps_what_sizes_cost_beside_each_other(self) -> None:
        """As soon as passes of two sizes have been seen, whatever else has not."""
        costs = Costs(QUICK)
        for step in range(60):
            nodes = 8 if step % 2 else 1
            costs.learn(nodes, 0, 1, 10 * QUICK[nodes])
        assert [costs.time(n, 0) / costs.time(1, 0) for n in (4, 16)] == pytest.approx(
            [QUICK[n] / QUICK[1] for n in (4, 16)], rel=0.3
        )

    def test_no_pass_costs_more_than_a_larger_one(self) -> None:
        costs = Costs({1: 0.02, 4: 0.09, 16: 0.04})
        assert costs.curve[3] == pytest.approx(0.04)
        costs.curve[:8] = 0.5
        costs.learn(16, 0, 1, 0.04)
        assert costs.curve[:16].max() <= 0.04 * 1.01

    def test_each_size_moves_by_how_often_it_was_seen_and_how_alike_it_is(self) -> None:
        costs, rng = Costs(KERNELS), np.random.default_rng(0)
        costs.seen[:] = rng.choice([5.0, 5.0, 20.0, 30.0], LARGEST)
        before, seen, fed = costs.curve.copy(), costs.seen.copy(), np.arange(1, LARGEST + 1)
        costs.learn(12, 0, 1, 1.2 * before[11])
        moved = SHARED + (1 - SHARED) * (np.minimum(fed, 12) / np.maximum(fed, 12)) ** 16
        expected = before * 1.2 ** (np.maximum(FRESH, 1 / (1 + seen)) * moved)
        expected[:12] = np.minimum(expected[:12], expected[11])
        assert costs.curve == pytest.approx(expected, rel=1e-12)
        assert costs.seen == pytest.approx(seen + moved)

    def test_nothing_is_learnt_from_nothing(self) -> None:
        costs = Costs(KERNELS)
        costs.learn(4, 0, 1, 0.0)
        costs.learn(4, 0, LARGEST, 1.0)
        assert np.array_equal(costs.curve, Costs(KERNELS).curve)


GROWTH = {"read": 0.0, "attend": 0.0, "spare": 0.0}


class TestFile:
    def test_it_comes_back_as_it_was(self, tmp_path: Path) -> None:
        costs, path = Costs(KERNELS, 1e-5, 1e-6, 0.1), tmp_path / "deep" / "costs"
        costs.learn(7, 0, 1, 0.1)
        costs.save(path)
        again = Costs.load(path)
        assert np.array_equal(again.curve, costs.curve)
        assert (again.read, again.attend, again.spare, again.path) == (1e-5, 1e-6, 0.1, path)

    @pytest.mark.parametrize("curve", [np.ones(5), np.zeros(LARGEST), np.full(LARGEST, np.nan), np.full(LARGEST, -1.0)])
    def test_what_cannot_be_costs(self, tmp_path: Path, curve: np.ndarray) -> None:
        storage.write(tmp_path / "costs", "costs", VERSION, {"curve": curve}, GROWTH)
        with pytest.raises(ValueError, match="passes cost nothing"):
            Costs.load(tmp_path / "costs")

    @pytest.mark.parametrize(
        "facts",
        [{}, GROWTH | {"read": None}, GROWTH | {"read": -1.0}, GROWTH | {"spare": -1.0}, GROWTH | {"spare": ""}],
    )
    def test_what_cannot_be_growth(self, tmp_path: Path, facts: dict[str, Any]) -> None:
        storage.write(tmp_path / "costs", "costs", VERSION, {"curve": np.ones(LARGEST)}, facts)
        with pytest.raises(ValueError, match=r"cost nothing|what passes cost|could not convert"):
            Costs.load(tmp_path / "costs")

    def test_it_is_kept_fresh_now_and_then(self, tmp_path: Path) -> None:
        costs = Costs(KERNELS)
        costs.keep()
        costs.save(tmp_path / "costs")
        costs.curve *= 2
        costs.keep()
        assert Costs.load(tmp_path / "costs").curve[0] == KERNELS[1]
        costs.saved -= SAVED_FOR
        costs.keep()
        assert Costs.load(tmp_path / "costs").curve[0] == 2 * KERNELS[1]

    def test_a_disk_that_takes_nothing_is_let_be(self, tmp_path: Path) -> None:
        costs = Costs(KERNELS)
        costs.path = tmp_path / "file" / "costs"
        (tmp_path / "file").write_text("")
        costs.saved = -SAVED_FOR
        costs.keep()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where costs are saved, however quick the model."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "WORTH_SAVING", 0.0)
    return tmp_path / "costs"


class TestAttaching:
    def test_a_second_process_does_not_time_again(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = attach.attach(tiny.model()).costs
        monkeypatch.setattr(timing, "measure", None)
        again = attach.attach(tiny.model()).costs
        assert first is not None
        assert again is not None
        assert np.array_equal(again.curve, first.curve)

    def test_what_is_quickly_timed_is_not_saved(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "WORTH_SAVING", 1e9)
        attach.attach(tiny.model())
        assert not home.exists()

    def test_another_model_or_setting_has_costs_of_its_own(self, home: Path) -> None:
        def saved(model: Any) -> set[str]:
            attach.attach(model)
            return {path.name for path in home.glob("*.safetensors")}

        sizes = [len(saved(tiny.model()))]
        sizes.append(len(saved(tiny.model(hidden_size=64))))
        sizes.append(len(saved(tiny.model().double())))
        sizes.append(len(saved(tiny.model(attn_implementation="eager"))))
        changed = tiny.model()
        changed.lm_head.forward = Forward(changed.lm_head)
        sizes.append(len(saved(changed)))
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            sizes.append(len(saved(tiny.model())))
        finally:
            torch.set_num_threads(threads)
        assert sizes == sorted(set(sizes)), "each has added a file"
        assert len(saved(tiny.model())) == sizes[-1]

    def test_a_damaged_file_is_passed_over_and_stats_say_so(self, home: Path) -> None:
        attach.attach(tiny.model())
        for path in home.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-9])
        model = specdec.wrap(tiny.model(), cpu_kernels=False)
        with pytest.warns(specdec.statistics.SpecdecWarning, match="measured anew"):
            model.generate(prompt(), max_new_tokens=4)
        assert any("damaged" in reason for reason in specdec.stats(model).reasons)
        assert attach.attach(tiny.model()).why_timed == ""

    def test_where_nothing_can_be_saved_stats_say_so(self, home: Path) -> None:
        home.write_text("in the way")
        assert "cannot be saved" in attach.attach(tiny.model()).why_timed

    def test_what_a_long_text_costs_is_measured_too(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sliding windows, whose layers hold less than the text, are no hindrance."""
        lengths: list[int] = []
        for limit in ("TIMING_SECONDS", "MOST_SECONDS", "WORTH_SAVING"):  # however slow the machine is just now
            monkeypatch.setattr(timing, limit, 1000.0)
        timed = timing._timed
        monkeypatch.setattr(
            timing, "_timed", lambda model, size: lengths.append(model.lengths[0]) or timed(model, size)
        )
        for changes in ({}, {"kind": "Mistral", "sliding_window": 6}):
            lengths.clear()
            found = attach.attach(tiny.model(**changes, max_position_embeddings=4096))
            assert found.form.level == "tree"
            assert lengths[-2:] == [timing.LONG, timing.LONG + 1]
        lengths.clear()
        attach.attach(tiny.model(max_position_embeddings=512))
        assert max(lengths) < 100

    def test_how_much_longer_plain_generates_own_steps_take_is_measured_too(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def spare(ours: float) -> float:
            monkeypatch.setattr(timing, "_timed", lambda model, size: ours * size)
            costs = attach.attach(tiny.model(max_position_embeddings=512)).costs
            for path in home.glob("*.safetensors"):
                path.unlink()
            assert costs is not None
            return costs.spare

        assert spare(1e-7) > 10
        assert spare(0.07) == 0
        assert spare(1e7) == 0
        timed = list[int]()
        monkeypatch.setattr(timing, "_spare", lambda model: timed.append(1) or 1.0)
        assert spare(1e7) == 0
        assert not timed, "where passes are slow, nobody waits for more of them"

    def test_that_it_cannot_be_measured_is_no_reason_to_draft_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuses(model: Any) -> bool:
            raise RuntimeError("no")

        monkeypatch.setattr(timing, "_lengthen", refuses)
        found = attach.attach(tiny.model())
        assert found.form.level == "tree"
        assert found.costs is not None
        assert (found.costs.read, found.costs.attend) == (0.0, 0.0)


@dataclasses.dataclass
class Forward:
    """A layer's forward replaced, as kernels do."""

    layer: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.layer.weight)
