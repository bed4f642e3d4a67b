"""A server on a free port, called by OpenAI's client if it is there, and stopped."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from typing import Any

TOKEN = "only for this run"
LIST = "apples, bread, coffee, lemons, rice, butter, eggs"
QUESTION = f"Repeat this shopping list, one item per line, with tea in place of coffee: {LIST}"


def main() -> None:
    """Start, ask twice, stop."""
    command = [sys.executable, "-m", "specdec.cli", "serve", "demo", "--port", "0", "--token", TOKEN]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        url = next((found[1] for line in lines if (found := re.search(r"running on (http://\S+)", line))), None)
        try:
            for turn in ("first", "second") if url else ():
                answer = ask(f"{url}/v1")
                steps = answer["usage"]["specdec"]["steps"]
                print(f"{turn} time: {answer['usage']['completion_tokens']} tokens in {steps} passes")
            print(answer["choices"][0]["message"]["content"] if url else "the server did not start")
        finally:
            server.send_signal(signal.SIGINT)
            server.stderr.read()


def ask(url: str) -> dict[str, Any]:
    """One chat completion, as plain values."""
    asked: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48}
    try:
        from openai import OpenAI
    except ImportError:
        import httpx

        answer = httpx.post(
            f"{url}/chat/completions", json=asked, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=90
        )
        plain: dict[str, Any] = answer.raise_for_status().json()
        return plain
    with OpenAI(base_url=url, api_key=TOKEN) as client:
        return client.chat.completions.create(**asked).model_dump()


if __name__ == "__main__":
    main()
