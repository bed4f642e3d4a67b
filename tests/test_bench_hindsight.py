"""The script that compares the policy with what would have been best: it picks that, and tells of nobody's lies."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import hindsight
import pytest
from hindsight import AUTO, FIXED, PLAIN
from tables import hindsight as tables

from specdec.bench import compare, run
from specdec.bench.disturbance import Disturbance
from specdec.bench.measure import Run
from specdec.bench.methods import Method
from specdec.bench.run import Ask, Comparison
from specdec.bench.workloads import KINDS, Prompt
from tests import tiny

ASKS = [Ask("code", [1]), Ask("code", [2]), Ask("sql", [3])]
BEST, LIAR = FIXED[3], FIXED[-1]
SECONDS = {PLAIN: 10.0, AUTO: 5.0, BEST: 4.0, LIAR: 1.0}
LUCK = 4.0  # how much quicker each method's first run is, the policy's apart


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Two prompts of code, where one choice is the best and another only seems so, and one where nothing helps."""
    ran = Counter[Any]()

    def measure(method: Method, ids: list[int], max_new_tokens: int) -> Run:
        seconds = SECONDS.get(method.name, 20.0) * (10 if ids == [2] else 1)
        seconds = 10.0 + (seconds > 10) if ids == [3] else seconds
        tokens = [9, 8, int(method.name == LIAR and ids != [3])]
        ran[method.name, tuple(ids)] += 1
        lucky = LUCK if method.name != AUTO and ran[method.name, tuple(ids)] == 1 else 1.0
        return Run(tokens, 3, 1.0, seconds / lucky, 2)

    monkeypatch.setattr(run, "prepare", lambda model, name, *rest: Method(name, None))
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "logit_margin", lambda *_: (1.0, False))
    monkeypatch.setattr(Comparison, "_methods", lambda self, names: [Method(name, None) for name in names])
    quiet = Disturbance(load=lambda: 0.004, busy=lambda: None)
    comparison = Comparison(tiny.model(), ASKS, (PLAIN, AUTO, *FIXED), 3, quiet)
    comparison.run()
    comparison.run(3, hindsight.NEVER, names={PLAIN, AUTO, BEST})
    return comparison


def test_the_best_is_the_quickest_that_told_the_truth(made: Comparison) -> None:
    code, sql = hindsight.figures(made)["hindsight"]
    assert (code["best"], code["share"], code["prompts"]) == (BEST, 0.8, 2)
    assert code["speeds"][BEST] == round(4 * LUCK / 44, 4)  # tokens of both over their seconds
    assert LIAR not in code["speeds"]
    assert LIAR in sql["speeds"]
    assert len(made.differences) == 2


def test_that_nothing_is_drafted_may_be_the_best(made: Comparison) -> None:
    assert hindsight.figures(made)["hindsight"][1]["best"] == PLAIN


def test_where_the_policys_own_tokens_differ_nothing_is_told(made: Comparison) -> None:
    made.differences.append(replace(made.differences[0], method=AUTO))
    told: dict[str, Any] = {"workload": "code", "prompts": 2, "best": BEST, "equal": False}
    assert hindsight.compared(made, "code", BEST) == told


def test_how_far_they_are_apart_is_told_by_other_runs_than_those_it_was_chosen_by(made: Comparison) -> None:
    for prompt, factors in ((0, (1, 3)), (1, (1, 3))):
        first, *others = made.runs[BEST, prompt]
        slower = [replace(run, decode=factor * run.decode) for run, factor in zip(others, factors, strict=True)]
        made.runs[BEST, prompt] = [first, *slower]
    code, _ = hindsight.figures(made)["hindsight"]
    assert hindsight.figures(made)["repeats"] == 2
    assert code["share"] == 1.6  # the median's seconds over the policy's
    assert code["again"][BEST] == round(4 / 88, 4)


def test_the_table_shows_what_was_measured(made: Comparison, tmp_path: Path) -> None:
    facts = {"model": "m", "parameters": 1, "dtype": "d", "attention": "a", "device": "c", "threads": 1}
    report: dict[str, Any] = {"machine": facts | {"torch": "1", "transformers": "2"}, "max_new_tokens": 3}
    report |= hindsight.figures(made)
    report["hindsight"].append({"workload": "chat", "prompts": 1, "best": PLAIN, "equal": False})
    assert tables.hindsight(tmp_path) == "not measured yet"
    (tmp_path / "some.json").write_text(json.dumps(report))
    text = tables.hindsight(tmp_path)
    assert f"| code | 2 | 2.00x | `{BEST.removesuffix('+kernels')}` | 2.50x | 0.80 |" in text
    assert "| sql | 1 | 1.00x | `plain` | 1.00x | 1.00 |" in text
    assert "the least 0.80; 1 of 2 reach 0.95" in text
    assert "Tokens differed on chat" in text
    report["disturbance"] |= {"disturbed": True, "text": "somebody compiled"}
    (tmp_path / "some.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="somebody compiled"):
        tables.hindsight(tmp_path)


def test_every_kind_of_work_is_asked_for_and_only_few_long_documents() -> None:
    prompts = hindsight.asked(3)
    assert {prompt.workload for prompt in prompts} == set(KINDS)
    assert len(prompts) == 3 * len(KINDS) - 1
    assert not any(prompt.turns for prompt in prompts)


def test_on_a_model_it_runs_every_choice_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model(eos_token_id=None, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    grid = (f"auto@fixed:2:2:2{hindsight.KERNELS}",)
    monkeypatch.setattr(hindsight, "FIXED", grid)
    monkeypatch.setattr(compare, "Disturbance", lambda: Disturbance(load=lambda: 0.004, busy=lambda: None))
    monkeypatch.setattr(hindsight, "asked", lambda _: [Prompt("code", ({"role": "user", "content": "ababab"},))])
    out = tmp_path / "out.json"
    turn = Comparison._turn
    monkeypatch.setattr(Comparison, "_turn", lambda *rest: (turn(*rest), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        hindsight.main(str(tmp_path / "model"), max_new_tokens=8, json_path=out)
    turns = list[int]()
    monkeypatch.setattr(Comparison, "_turn", lambda *rest: (turns.append(1), turn(*rest)))
    hindsight.main(str(tmp_path / "model"), repeats=1, max_new_tokens=8, json_path=out)
    (row,) = json.loads(out.read_text())["hindsight"]
    assert row["equal"]
    assert set(row["speeds"]) == {PLAIN, AUTO, *grid}
    assert row["share"] > 0
    assert len(turns) == 1  # the best one's; what was measured before is kept
