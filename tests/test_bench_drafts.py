"""The script that compares ways to generate with a draft: all of them run, and are told as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import drafts
import pytest
from draft_ways import PLAIN, RIVAL, USUAL, ways
from tables import drafts as tables

from specdec.drafters import distilled
from specdec.drafters.acceptance_head import AcceptanceHead
from tests import tiny

NEW = 6
PROMPTS = [tiny.prompt(length, seed=length)[0].tolist() for length in (5, 8, 6)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: Any) -> drafts.Bench:
    target = tiny.model(eos_token_id=None).requires_grad_(False)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    AcceptanceHead(32).save(path)
    return drafts.Bench(target, lambda: distilled.distilled(target, [0]), {0.0: path}, NEW)


@pytest.fixture(scope="module")
def done(bench: drafts.Bench) -> dict[str, dict[str, drafts.Run]]:
    """Two prompts counted, one of them timed, and two timed at once; at temperatures 0 and 1."""
    turns = [drafts.Turn(0, 0, rows, heat, timed) for heat in (0.0, 1.0) for rows, timed in ((2, False), (1, True))]
    warm = {(turn.temperature, turn.rows) for turn in turns}
    turns.append(drafts.Turn(0, 1, 2, 0.0))
    return {str(turn): drafts.take(bench, turn, PROMPTS, warm) for turn in turns}


def report(done: dict[str, dict[str, drafts.Run]], disturbed: bool) -> dict[str, Any]:
    facts = {"model": "m", "parameters": 1, "dtype": "d", "attention": "a", "device": "c", "threads": 1}
    disturbance = {"disturbed": disturbed, "text": "somebody compiled"}
    return {
        "machine": facts | {"torch": "1", "transformers": "2"}, "max_new_tokens": NEW, "disturbance": disturbance,
        "drafts": drafts.figures(done),
    }  # fmt: skip


def test_every_way_writes_as_much_as_was_asked_for(done: dict[str, dict[str, drafts.Run]]) -> None:
    for key, runs in done.items():
        rows = int(key.split("/")[3])
        for name, run in runs.items():
            assert rows <= run["steps"] + rows <= rows * NEW, (key, name)
            assert RIVAL in name or run["new"] == rows * (NEW - 1), (key, name)
            assert run["tokens"] > 0, (key, name)
            assert run["seconds"] > 0, (key, name)


def test_counts_are_ours_and_heads_are_for_their_temperature(done: dict[str, dict[str, drafts.Run]]) -> None:
    counted, timed = done["counted/0/1.0/2/0"], done["timed/0/0.0/1/0"]
    assert not {PLAIN, RIVAL} & set(counted)
    assert "threshold 0.6, head" in timed
    assert "threshold 0.6, head" not in counted
    assert set(done["timed/0/0.0/2/1"]) == {name for name, way in ways(0.0).items() if way.together}


def test_greedy_answers_are_plain_ones_and_figures_say_so(done: dict[str, dict[str, drafts.Run]]) -> None:
    rows = drafts.figures(done)
    assert all(r["equal"] for r in rows if r["kind"] == "timed")
    (plain,) = (r for r in rows if (r["method"], r["rows"], r["temperature"]) == (PLAIN, 1, 0.0))
    assert (plain["tokens_per_step"], plain["speedup"]) == (1.0, 1.0)
    runs = done["counted/0/0.0/2/0"]["chain, 4 nodes"]
    (chain,) = (r for r in rows if (r["method"], r["kind"], r["temperature"]) == ("chain, 4 nodes", "counted", 0.0))
    assert chain["tokens_per_step"] == round(runs["new"] / runs["steps"], 3)


@pytest.mark.parametrize("disturbed", [False, True])
def test_the_page_has_counts_of_any_run_and_speeds_of_a_quiet_one(
    done: dict[str, dict[str, drafts.Run]], disturbed: bool, tmp_path: Path
) -> None:
    (tmp_path / "drafts.json").write_text(json.dumps(report(done, disturbed)))
    text = tables.drafts(tmp_path)
    assert ("| method | tokens per step |\n" in text) == disturbed
    assert ("over assisted" in text) != disturbed
    assert ("somebody compiled" in text) == disturbed
    assert ("Temperature 0, 2 at once" in text) != disturbed
    assert "tokens per step of 2 answers" in text


def test_a_greedy_answer_that_is_not_plain_s_has_no_speed(
    done: dict[str, dict[str, drafts.Run]], tmp_path: Path
) -> None:
    said = report(done, False)
    (row,) = (r for r in said["drafts"] if (r["method"], r["rows"], r["temperature"]) == (RIVAL, 1, 0.0))
    row["equal"] = False
    (tmp_path / "drafts.json").write_text(json.dumps(said))
    line = next(line for line in tables.drafts(tmp_path).splitlines() if line.startswith(f"| {RIVAL} |"))
    assert line.endswith("| tokens differ | - | - |")


def test_the_usual_ways_are_some_of_all() -> None:
    found = [set(drafts.ways(heat, every=False)) for heat in drafts.TEMPERATURES]
    assert set().union(*found) == set(USUAL)
    for heat, usual in zip(drafts.TEMPERATURES, found, strict=True):
        assert {PLAIN, RIVAL, "auto policy, best-first"} < usual < set(ways(heat))
    assert all(set(turn.ways()) <= set(USUAL) for turn in drafts.turns(4, 4, 1, every=False))


def test_equal_node_budgets_are_kept() -> None:
    for heat in drafts.TEMPERATURES:
        for name, way in ways(heat).items():
            if name.endswith(" nodes"):
                assert way.policy is not None
                assert way.policy.fixed.nodes == int(name.split()[-2]), name  # type: ignore[attr-defined]
                assert way.policy.fixed.width >= max(way.branching), name  # type: ignore[attr-defined]
