"""Agents in sessions beside eager ``generate``, end to end: cold, warm, and with a memory that was saved and loaded.

    python benchmarks/sessions.py [--model PATH] [--repeats N] [--json OUT]

Three scripted agents answer turn after turn, each prompt being all that was said before. "eager" is the model's own
``generate`` on the whole prompt. The sessions keep KV rows from turn to turn; "cold" has an empty memory, "warm" one
that has been through the work once, "loaded" the same from a file; "cold, own layers" goes without our CPU kernels. All
answer each turn one after the other, in another order each time; the median over repeats counts. Where an answer is not
eager's, no speed is given. What a model costs once in a process, self-test and timing, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import Memory, Session, demo
from specdec.bench.machine import machine

MAX_NEW_TOKENS = 96
METHODS = ("eager", "cold, own layers", "cold", "warm", "loaded")
Message = dict[str, str]


@dataclass(frozen=True)
class Agent:
    """A system prompt, examples of exchanges, and what the agent is told turn after turn."""

    name: str
    system: str
    examples: tuple[tuple[str, str], ...]
    turns: tuple[str, ...]

    def start(self) -> list[Message]:
        """The conversation before the first turn."""
        said = [("user", "assistant")[i % 2] for i in range(2 * len(self.examples))]
        texts = [text for example in self.examples for text in example]
        messages = [{"role": role, "content": text} for role, text in zip(said, texts, strict=True)]
        return [{"role": "system", "content": self.system}, *messages]


def call(tool: str, **arguments: str) -> str:
    """A tool call as the operator writes it."""
    return json.dumps({"tool": tool, "arguments": arguments})


CONFIG = "name: shop\nhost: localhost\nport: 8080\ndebug: true\nworkers: 2\ntimeout: 30\nlog: shop.log"
ORDERS = "101, Anna, lamp, open\n102, Boris, chair, open\n103, Clara, desk, open"
AGENTS = (
    Agent(
        "operator",
        "You answer every message with one JSON object: the tool to call and its arguments. Tools: list_files(path), "
        "read_file(path), search(text, path), write_file(path, content), run_tests(path).",
        (
            ("List the files in src.", call("list_files", path="src")),
            ("Result: main.py, config.py, server.py. Read src/main.py.", call("read_file", path="src/main.py")),
            (
                "Result: import config, server. Search for the text 'port' in src/config.py.",
                call("search", text="port", path="src/config.py"),
            ),
        ),
        (
            "Result: line 12: port = 8080. Read src/config.py.",
            "Result: port = 8080, host = 'localhost', debug = True. Search for the text 'debug' in src/server.py.",
            "Result: line 40: if config.debug. Write 'debug = False' to src/config.py.",
            "Result: written. Run the tests in tests/test_server.py.",
            "Result: 3 passed, 1 failed: test_port. Read tests/test_server.py.",
            "Result: assert port == 9090. Write 'port = 9090' to src/config.py.",
            "Result: written. Run the tests in tests/test_server.py.",
        ),
    ),
    Agent(
        "clerk",
        "You keep a list of orders. Answer every message with the whole list, one order per line: number, customer, "
        "item, state.",
        (
            ("101: Anna wants a lamp. 102: Boris wants a chair. 103: Clara wants a desk.", ORDERS),
            ("Order 104: David wants a shelf.", f"{ORDERS}\n104, David, shelf, open"),
        ),
        (
            "Order 105: Emma wants a mirror.",
            "Order 106: Felix wants a carpet.",
            "Order 101 was sent.",
            "Order 107: Gina wants a clock.",
            "Order 104 was sent.",
        ),
    ),
    Agent(
        "editor",
        "You edit a settings file. Answer every message with the whole file after the change, and nothing else.",
        (
            (f"Here is the file. Show it.\n{CONFIG}", CONFIG),
            ("Set port to 9090.", CONFIG.replace("8080", "9090")),
        ),
        (
            "Set debug to false.",
            "Set host to example.org.",
            "Set workers to 8.",
            "Set timeout to 60.",
            "Set log to server.log.",
        ),
    ),
)


@dataclass
class Figures:
    """What one method did in one turn, over the repeats."""

    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    reused: int = 0
    prompt: int = 0
    equal: bool = True


class Bench:
    """All methods through all agents' turns.

    Attributes:
        figures: by method, agent and turn.
        trained: a memory that has been through the work once.
        path: where it was saved.
    """

    def __init__(self, model: Any, eager: Any, tokenizer: Any, path: Path, most: int) -> None:
        self.model, self.eager, self.tokenizer, self.path, self.most = model, eager, tokenizer, path, most
        self.figures: dict[tuple[str, str, int], Figures] = {}
        self.trained = Memory()
        for agent in AGENTS:  # before the first repeat: nothing of it is timed
            messages = agent.start()
            with Session(self.model, self.tokenizer, memory=self.trained, namespace=agent.name) as session:
                for turn in agent.turns[:most]:
                    messages.append({"role": "user", "content": turn})
                    said = session.chat(messages, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
                    messages.append({"role": "assistant", "content": said})
        self.trained.save(path)
        with Session(self.eager, self.tokenizer, cpu_kernels=False) as session:
            session.chat(messages, max_new_tokens=8)

    def repeat(self, number: int) -> None:
        """Every agent once, by every method; then what was cold is warm."""
        cold, loaded = Memory(), Memory()
        loaded.load(self.path)
        for agent in AGENTS:
            sessions = {
                "cold, own layers": Session(self.eager, self.tokenizer, cpu_kernels=False),
                "cold": Session(self.model, self.tokenizer, memory=cold, namespace=agent.name),
                "warm": Session(self.model, self.tokenizer, memory=self.trained, namespace=agent.name),
                "loaded": Session(self.model, self.tokenizer, memory=loaded, namespace=agent.name),
            }
            self._agent(agent, sessions, number)
            for session in sessions.values():
                session.close()
        self.trained = cold

    def _agent(self, agent: Agent, sessions: dict[str, Session], number: int) -> None:
        messages = agent.start()
        for turn, text in enumerate(agent.turns[: self.most]):
            messages.append({"role": "user", "content": text})
            order = [METHODS[(i + turn + number) % len(METHODS)] for i in range(len(METHODS))]
            said = {method: self._timed(method, agent, turn, sessions.get(method), messages) for method in order}
            for method in METHODS:
                self.figures[method, agent.name, turn].equal &= said[method] == said["eager"]
            messages.append({"role": "assistant", "content": said["eager"]})

    def _timed(self, method: str, agent: Agent, turn: int, session: Session | None, messages: list[Message]) -> str:
        figures = self.figures.setdefault((method, agent.name, turn), Figures())
        answer: Callable[..., str] = self._plain if session is None else session.chat
        start = time.perf_counter()
        said = answer(messages, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        figures.seconds.append(time.perf_counter() - start)
        if session is not None:
            counts = session.turns[-1]
            figures.steps, figures.tokens = figures.steps + counts.steps, figures.tokens + counts.new_tokens
            figures.reused, figures.prompt = (
                figures.reused + counts.reused_tokens,
                figures.prompt + counts.prompt_tokens,
            )
        return said

    def _plain(self, messages: list[Message], **arguments: Any) -> str:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = self.eager.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(output, skip_special_tokens=True))

    def results(self) -> list[dict[str, Any]]:
        """A record for each method and agent, and for all agents together."""
        names = [agent.name for agent in AGENTS]
        return [self._record(method, some) for method in METHODS for some in (*([name] for name in names), names)]

    def _record(self, method: str, agents: list[str]) -> dict[str, Any]:
        def of(which: str) -> list[Figures]:
            return [figures for (name, agent, _), figures in self.figures.items() if name == which and agent in agents]

        turns, equal = of(method), all(figures.equal for figures in of(method))
        seconds = [sum(statistics.median(turn.seconds) for turn in of(which)) for which in (method, "eager")]
        steps, prompt = sum(turn.steps for turn in turns), sum(turn.prompt for turn in turns)
        return {
            "method": method,
            "agent": agents[0] if len(agents) == 1 else "all",
            "turns": len(turns),
            "equal": equal,
            "seconds": seconds[0],
            "speedup": seconds[1] / seconds[0] if equal else None,
            "tokens_per_step": sum(turn.tokens for turn in turns) / steps if steps else 1.0,
            "reused": sum(turn.reused for turn in turns) / prompt if prompt else 0.0,
        }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a directory or hub id")
    parser.add_argument("--repeats", type=int, default=3, help="of the whole work")
    parser.add_argument("--turns", type=int, default=9, help="of each agent, at most")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    path = demo.resolve(given.model)
    model, eager = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    with TemporaryDirectory() as folder:
        bench = Bench(model, eager, AutoTokenizer.from_pretrained(path), Path(folder, "memory"), given.turns)
        for number in range(given.repeats):
            bench.repeat(number)
        size = bench.path.stat().st_size
    results = bench.results()
    for record in results:
        speed = f"{record['speedup']:.2f}x" if record["speedup"] else "not equal"
        print(
            f"{record['method']:18} {record['agent']:9} {record['seconds']:7.2f} s {speed:>9} "
            f"{record['tokens_per_step']:5.2f} tokens/step {100 * record['reused']:3.0f}% of the prompts kept"
        )
    if given.json:
        facts = {"machine": machine(model, given.model), "repeats": given.repeats, "max_new_tokens": MAX_NEW_TOKENS}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({**facts, "memory_bytes": size, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
