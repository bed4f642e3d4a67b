"""The examples that belong to sessions, each run whole on the demo model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = {
    "agent_loop": r"second agent: [1-9]\d* of \d+ prompt tokens were there",
    "code_edit_with_prediction": "the same answer: True",
}


@pytest.mark.real
@pytest.mark.parametrize("name", SAID)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(SAID[name], capsys.readouterr().out)
