"""What the benchmarks of sessions, pool and integrations tell is what their pages show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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
    assert "recorded" not in text
    assert "kernels only" not in text


def test_warm_sessions_over_kernels_only(tmp_path: Path) -> None:
    """Where texts differ, neither time is worth anything."""
    runs = [
        RUN | {"agent": agent, "method": method, "seconds": seconds, "reused": 0.0, "equal": (agent, method) != differs}
        for agent, warm in (("clerk", 0.5), ("editor", 1.0), ("all", 1.5))
        for method, seconds in (("eager", 4.0), ("kernels only", 2.0), ("warm", warm))
        for differs in [("editor", "kernels only")]
    ]
    assert "\n\nWarm over kernels only: clerk 4.00x, all 1.33x." in agents.sessions(write(tmp_path, sessions=runs))


def test_recorded_conversations_are_named_below_the_table(tmp_path: Path) -> None:
    """A run of them alone stands in a report of its own, behind that of the scripted agents."""
    played = {"agent": "tau", "conversation": "tau/7", "turns": 5, "longest_prompt": 1234}
    runs = [RUN | {"method": name, "agent": "tau", "reused": 0.5} for name in ("eager", "cold")]
    text = agents.sessions(write(tmp_path, sessions=runs, recorded=[played]))
    assert "| tau | 2.0 s | 1.00x / 1.00 / 50% |" in text
    assert text.endswith("`tau`: the first 5 turns of the recorded conversation tau/7, prompts of up to 1234 tokens.")


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


ROLES = ("system", "user", "assistant", "tool", "assistant", "user")


def transcripts(path: Path, *conversations: tuple[str, str]) -> Path:
    """A file of conversations: a name, and what is said, a letter each."""
    lines = [
        {"session": name, "messages": [{"role": role, "content": c} for role, c in zip(ROLES, said, strict=False)]}
        for name, said in conversations
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_recorded_conversation_says_what_came_before_each_answer(tmp_path: Path) -> None:
    path = transcripts(tmp_path / "some.jsonl", ("x", "sabcde"))
    agent = sessions.recorded(path, lambda messages: True, 9)
    assert [[message["content"] for message in turn] for turn in agent.turns] == [["s", "a"], ["b", "c"]]
    assert (agent.name, agent.recorded) == ("some", "x")
    assert len(sessions.recorded(path, lambda messages: True, 1).turns) == 1


def test_the_first_conversation_that_fits_is_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last prompt counts, up to the turns that are asked for; what is passed over is told."""
    path = transcripts(tmp_path / "some.jsonl", ("unanswered", "sa"), ("long", "SABCDE"), ("short", "sabcde"))

    def fits(messages: list[sessions.Message]) -> bool:
        return sum(message["content"].isupper() for message in messages) <= 2

    assert sessions.recorded(path, fits, 9).recorded == "short"
    told = capsys.readouterr().out
    assert "line 1: passed over, nothing is answered in it" in told
    assert "line 2: passed over, its first 2 turns do not fit the model" in told
    assert sessions.recorded(path, fits, 1).recorded == "long"
    with pytest.raises(ValueError, match="no conversation of which 9 turns fit"):
        sessions.recorded(path, lambda messages: False, 9)
