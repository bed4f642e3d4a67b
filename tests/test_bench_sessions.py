"""What the benchmarks of sessions, pool and integrations tell is what their pages show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sessions
from tables import agents

MACHINE = {"model": "m", "parameters": 1, "dtype": "d", "attention": "a", "device": "c", "threads": 1}
REPORT = {"machine": MACHINE | {"torch": "1", "transformers": "2"}, "repeats": 3, "max_new_tokens": 8, "prompts": 4}
RUN = {"seconds": 2.0, "speedup": 1.0, "equal": True, "tokens_per_step": 1.0}


def write(folder: Path, **report: Any) -> Path:
    (folder / "some.json").write_text(json.dumps(REPORT | {"unavailable": {}} | report))
    return folder


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    for section in (agents.sessions, agents.pool, agents.integrations):
        assert section(tmp_path) == "not measured yet"


def test_sessions(tmp_path: Path) -> None:
    run = RUN | {"agent": "clerk", "reused": 0.5}
    ours = run | {"method": "warm", "speedup": 3.25, "tokens_per_step": 4.0}
    other = run | {"method": "cold", "equal": False, "speedup": None}
    text = agents.sessions(write(tmp_path, sessions=[run | {"method": "eager"}, other, ours]))
    assert "| agent | eager | cold | warm |" in text
    assert "| clerk | 2.0 s | tokens differ / 1.00 / 50% | 3.25x / 4.00 / 50% |" in text


def test_pool(tmp_path: Path) -> None:
    rows = [
        RUN | {"method": "in turn", "sessions": 1, "tokens_per_second": 10.0, "tokens_per_step": None},
        RUN | {"method": "pool", "sessions": 1, "equal": False, "speedup": None, "tokens_per_second": None},
        RUN | {"method": "pool", "sessions": 4, "tokens_per_second": 25.0, "speedup": 2.5, "tokens_per_step": 1.5},
    ]
    text = agents.pool(write(tmp_path, pool=rows, unavailable={"generate_batch": "no room"}))
    assert "| in turn | 10.0 (1.00x) |  |" in text
    assert "| pool | tokens differ | 25.0 (2.50x) / 1.50 |" in text
    assert "`generate_batch` did not run: no room." in text


def test_integrations(tmp_path: Path) -> None:
    rows = [RUN | {"task": "outlines", "method": name, "speedup": speed} for name, speed in (("plain", 1), ("ours", 2))]
    text = agents.integrations(write(tmp_path, integrations=rows, unavailable={"langchain": "not installed"}))
    assert "| outlines | 2.0 s | 2.00x / 1.00 |" in text
    assert "`langchain` was left out: not installed." in text


def test_a_recorded_conversation_says_what_came_before_each_answer(tmp_path: Path) -> None:
    said = [("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in said]
    (tmp_path / "some.jsonl").write_text(json.dumps({"session": "x", "messages": messages}) + "\n")
    agent = sessions.recorded(tmp_path / "some.jsonl")
    assert [[message["content"] for message in turn] for turn in agent.turns] == [["s", "a"], ["b", "c"]]
    assert agent.recorded
