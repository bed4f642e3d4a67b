"""The examples that belong to sessions, each run whole on the demo model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = {
    "agent_loop": [r"second agent: [1-9]\d* of \d+ prompt tokens were there"],
    "code_edit_with_prediction": ["the same answer: True"],
    "langchain_agent": ['"item": "lamps"}\n.*12', "the same calls and answers: True"],
    "smolagents_agent": ['"stock", "arguments": {"item": "lamps"}', "\n12 lamps\n", "the same steps: True"],
}
NEEDS = {"langchain_agent": ["langchain_huggingface", "xgrammar"], "smolagents_agent": ["smolagents", "xgrammar"]}


@pytest.mark.real
@pytest.mark.parametrize("name", SAID)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The agents' answers hold what a tool returned, and the model was never told otherwise."""
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library, reason=f"{library} is not installed")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for said in SAID[name]:
        assert re.search(said, printed)
