"""``specdec serve``: what it refuses to begin with, and that it serves until it is told to stop."""

from __future__ import annotations

import re
import runpy
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from specdec import cli
from tests import served


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["serve", *arguments], catch_exceptions=False)


def test_other_machines_need_a_token() -> None:
    result = invoke("nowhere", "--host", "0.0.0.0")
    assert result.exit_code == 1
    assert "give a --token" in result.stderr


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("nowhere")
    assert (result.exit_code, "specdec-runtime[serve]" in result.stderr) == (1, True)


@pytest.mark.parametrize("token", ["", " a"])
def test_a_token_must_fit_into_a_header(token: str) -> None:
    result = invoke("nowhere", "--token", token)
    assert (result.exit_code, "a token is" in result.stderr) == (1, True)


def test_it_serves_until_a_signal_and_saves_its_memory(tmp_path: Path) -> None:
    served.model().float().save_pretrained(tmp_path / "model")
    served.tokenizer().save_pretrained(tmp_path / "model")
    memory = tmp_path / "memory"
    command = [sys.executable, "-m", "specdec.cli", "serve", str(tmp_path / "model"), "--name", "tiny", "--port", "0"]
    command += ["--memory", str(memory), "--token", "secret"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ExitStack() as stop:
        stop.callback(process.kill)
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"running on (http://\S+)", line)))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            assert client.completions.create(model="tiny", prompt="abc", max_tokens=5).usage.completion_tokens > 0
        process.send_signal(signal.SIGTERM)
        assert "memory saved" in process.stderr.read()
        process.wait(300)
    assert memory.exists()


@pytest.mark.real
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "serve_and_call.py"), run_name="__main__")
    first, second = map(int, re.findall(r"time: \d+ tokens in (\d+) passes", capsys.readouterr().out))
    assert 0 < second <= first  # how much is drafted goes by the clock
