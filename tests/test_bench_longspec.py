"""What counts LongSpec's tokens per step, and the table that is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import longspec
from tables import long

from specdec.drafters.longspec_layer import LongSpecLayer
from tests import tiny


def test_answers_are_counted_and_compared() -> None:
    target = tiny.model(eos_token_id=None)
    drafter = longspec.Weighed(LongSpecLayer.of(target, 8), cpu_kernels=False)
    methods = {"plain": longspec.speculate(drafter, 0), "fresh": longspec.speculate(drafter, 4)}
    found = longspec.counted(target, tiny.prompt(50), methods, 20)
    assert found["plain"] == {"tokens": 20, "steps": 20, "drafted": 0, "accepted": 0, "equal": True}
    fresh = found["fresh"]
    assert fresh["equal"]
    assert fresh["steps"] + fresh["accepted"] == 20
    assert fresh["drafted"] > 3 * fresh["steps"]
    assert drafter.held == 2 * 2 * 7 * 8 * 4
    assert 50 <= drafter.read / (2 * 2 * 8 * 4) < 70  # tokens behind which was drafted last


def test_the_summary_weighs_steps_alike() -> None:
    one = {"tokens": 30, "steps": 10, "drafted": 40, "accepted": 20, "equal": True}
    other = {"tokens": 10, "steps": 10, "drafted": 40, "accepted": 0, "equal": False}
    assert longspec.summary([one, other]) == {
        "prompts": 2, "equal": False, "tokens_per_step": 2.0, "least": 1.0, "most": 3.0, "accepted": 0.25,
    }  # fmt: skip


def test_the_table_shows_what_was_counted(tmp_path: Path) -> None:
    assert long.longspec(tmp_path) == "not measured yet"
    row = {"prompts": 4, "equal": True, "tokens_per_step": 1.5, "least": 1.25, "most": 2.0, "accepted": 0.125}
    row |= {"layer": "far", "bytes": 2048, "bytes_read": 3 << 20}
    report = {
        "machine": {"model": "tiny", "parameters": 2_000_000, "dtype": "float32"},
        "max_new_tokens": 9,
        "depth": 4,
        "trained": {"far": {"parameters": 1_000_000, "window": 8, "kept": None}},
        "longspec": [row | {"context": 256}, row | {"context": 1024, "equal": False}],
    }
    (tmp_path / "longspec.json").write_text(json.dumps(report))
    assert long.longspec(tmp_path).splitlines()[-1] == (
        "| far (1.0M weights, window 8) | 1.50 (1.25-2.00) / 12% / 2 / 3.0 | tokens differ |"
    )
