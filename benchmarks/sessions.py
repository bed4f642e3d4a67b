"""Agents in sessions beside eager ``generate``, end to end: cold, warm, and with a memory that was saved and loaded.

    python benchmarks/sessions.py [--model PATH] [--repeats N] [--json OUT] [--traces FILE,FILE]

Three scripted agents answer turn after turn, each prompt being all that was said before; recorded conversations may be
added, or played alone with ``--agents ""``, in which what was said before is the record and not the model's own.
"eager" is the model's own ``generate`` on the whole prompt, "kernels only" the same with our CPU kernels in its layers.
The sessions keep KV rows from turn to turn; "cold" has an empty memory, "warm" one that has been through the work once,
"loaded" the same from a file; "cold, own layers" goes without our CPU kernels. All answer each turn one after the
other, in another order each time; the median over repeats counts. Where an answer is not eager's, no speed is given.
What a model costs once in a process, self-test and timing, is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import Memory, Session, demo
from specdec.bench.machine import machine

METHODS = ("eager", "kernels only", "cold, own layers", "cold", "warm", "loaded")
Message = dict[str, str]


@dataclass(frozen=True)
class Agent:
    """What is said to an agent.

    Attributes:
        start: the conversation before the first turn.
        turns: what is said before each answer.
        recorded: the conversation it is taken from, earlier answers being among what is said; "" where they are the
            agent's own.
    """

    name: str
    start: tuple[Message, ...]
    turns: tuple[tuple[Message, ...], ...]
    recorded: str = ""


def scripted(name: str, system: str, examples: Sequence[tuple[str, str]], turns: Sequence[str]) -> Agent:
    """An agent with a system prompt, examples of exchanges, and what it is told turn after turn."""
    start = [{"role": "system", "content": system}]
    for asked, answered in examples:
        start += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Agent(name, tuple(start), tuple(({"role": "user", "content": turn},) for turn in turns))


def recorded(path: Path, fits: Callable[[list[Message]], bool], most: int) -> Agent:
    """The first conversation of a file of transcripts (see docs/replay.md) whose first turns, at most so many, all fit.

    Raises:
        ValueError: there is none.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            entry = json.loads(line)
            said = [{"role": each["role"], "content": each["content"]} for each in entry["messages"]]
            answers = [i for i, message in enumerate(said) if i > 0 and message["role"] == "assistant"][:most]
            if answers and fits(said[: answers[-1]]):
                turns = tuple(tuple(said[i:j]) for i, j in pairwise([0, *answers]))
                return Agent(path.stem, (), turns, str(entry.get("session", f"line {number}")))
            why = f"its first {len(answers)} turns do not fit the model" if answers else "nothing is answered in it"
            print(f"{path}, line {number}: passed over, {why}")
    raise ValueError(f"{path}: no conversation of which {most} turns fit; ask for fewer")


def call(tool: str, **arguments: str) -> str:
    """A tool call as the operator writes it."""
    return json.dumps({"tool": tool, "arguments": arguments})


CONFIG = "name: shop\nhost: localhost\nport: 8080\ndebug: true\nworkers: 2\ntimeout: 30\nlog: shop.log"
ORDERS = "101, Anna, lamp, open\n102, Boris, chair, open\n103, Clara, desk, open"
AGENTS = (
    scripted(
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
    scripted(
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
    scripted(
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
        model: has our CPU kernels from its first session on.
        figures: by method, agent and turn.
        trained: a memory that has been through the work once.
        path: where it was saved.
    """

    def __init__(
        self, model: Any, eager: Any, tokenizer: Any, path: Path, agents: Sequence[Agent], most: int, tokens: int
    ) -> None:
        self.model, self.eager, self.tokenizer, self.path = model, eager, tokenizer, path
        self.agents, self.most, self.settings = agents, most, {"max_new_tokens": tokens, "do_sample": False}
        self.figures: dict[tuple[str, str, int], Figures] = {}
        self.trained = Memory()
        for agent in agents:  # before the first repeat: nothing of it is timed
            with Session(self.model, self.tokenizer, memory=self.trained, namespace=agent.name) as session:
                self._converse(agent, lambda turn, messages, ask=session.chat: ask(messages, **self.settings))
        self.trained.save(path)
        with Session(self.eager, self.tokenizer, cpu_kernels=False) as session:
            session.chat([{"role": "user", "content": "Hello."}], max_new_tokens=8)

    def repeat(self, number: int) -> None:
        """Every agent once, by every method; then what was cold is warm."""
        cold, loaded = Memory(), Memory()
        loaded.load(self.path)
        for agent in self.agents:
            sessions = {
                "cold, own layers": Session(self.eager, self.tokenizer, cpu_kernels=False),
                "cold": Session(self.model, self.tokenizer, memory=cold, namespace=agent.name),
                "warm": Session(self.model, self.tokenizer, memory=self.trained, namespace=agent.name),
                "loaded": Session(self.model, self.tokenizer, memory=loaded, namespace=agent.name),
            }
            self._converse(agent, lambda *turn, of=(agent, sessions, number): self._turn(*of, *turn))
            for session in sessions.values():
                session.close()
        self.trained = cold

    def _converse(self, agent: Agent, answer: Callable[[int, list[Message]], str]) -> None:
        messages = list(agent.start)
        for turn, said in enumerate(islice(agent.turns, self.most)):
            messages += said
            answered = answer(turn, messages)
            messages += () if agent.recorded else ({"role": "assistant", "content": answered},)

    def _turn(self, agent: Agent, sessions: dict[str, Session], number: int, turn: int, messages: list[Message]) -> str:
        """Have all methods answer, in another order each time; what eager says."""
        order = [METHODS[(i + turn + number) % len(METHODS)] for i in range(len(METHODS))]
        said = {method: self._timed(method, agent, turn, sessions.get(method), messages) for method in order}
        for method in METHODS:
            self.figures[method, agent.name, turn].equal &= said[method] == said["eager"]
        return said["eager"]

    def _timed(self, method: str, agent: Agent, turn: int, session: Session | None, messages: list[Message]) -> str:
        figures = self.figures.setdefault((method, agent.name, turn), Figures())
        plain = partial(self._plain, self.eager if method == "eager" else self.model)
        answer: Callable[..., str] = plain if session is None else session.chat
        start = time.perf_counter()
        said = answer(messages, **self.settings)
        figures.seconds.append(time.perf_counter() - start)
        if session is not None:
            counts = session.turns[-1]
            figures.steps, figures.tokens = figures.steps + counts.steps, figures.tokens + counts.new_tokens
            figures.reused, figures.prompt = (
                figures.reused + counts.reused_tokens,
                figures.prompt + counts.prompt_tokens,
            )
        return said

    def _plain(self, model: Any, messages: list[Message], **arguments: Any) -> str:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(output, skip_special_tokens=True))

    def results(self) -> list[dict[str, Any]]:
        """A record for each method and agent, and for all scripted agents together."""
        groups = [[agent.name] for agent in self.agents]
        own = [agent.name for agent in self.agents if not agent.recorded]
        groups += [own] if len(own) > 1 else []
        return [self._record(method, some) for method in METHODS for some in groups]

    def recorded(self) -> list[dict[str, Any]]:
        """Which conversations were played, and how long their prompts were, in tokens."""
        return [self._conversation(agent) for agent in self.agents if agent.recorded]

    def _conversation(self, agent: Agent) -> dict[str, Any]:
        turns = [turn for (method, name, _), turn in self.figures.items() if (method, name) == ("cold", agent.name)]
        longest = max(turn.prompt // len(turn.seconds) for turn in turns)
        return {"agent": agent.name, "conversation": agent.recorded, "turns": len(turns), "longest_prompt": longest}

    def _record(self, method: str, agents: list[str]) -> dict[str, Any]:
        def of(which: str) -> list[Figures]:
            return [figures for (name, agent, _), figures in self.figures.items() if name == which and agent in agents]

        turns, equal = of(method), all(figures.equal for figures in of(method))
        seconds = [sum(statistics.median(turn.seconds) for turn in of(which)) for which in (method, "eager")]
        steps, prompt = sum(turn.steps for turn in turns), sum(turn.prompt for turn in turns)
        return {
            "method": method,
            "agent": agents[0] if len(agents) == 1 else "all scripted",
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
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of each answer")
    parser.add_argument(
        "--agents", default=",".join(agent.name for agent in AGENTS), help='names, by commas; "" for none'
    )
    parser.add_argument(
        "--traces",
        default="",
        help="files of recorded conversations, by commas; of each the first one whose turns fit the model's positions",
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    path = demo.resolve(given.model)
    model, eager = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(path)
    longest = model.config.max_position_embeddings - given.max_new_tokens

    def fits(messages: list[Message]) -> bool:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return len(ids) <= longest

    agents = [agent for agent in AGENTS if agent.name in given.agents.split(",")]
    agents += [recorded(Path(name), fits, given.turns) for name in given.traces.split(",") if name]
    if not agents:
        parser.error(f"no agents: --agents knows {', '.join(agent.name for agent in AGENTS)}, --traces takes files")
    with TemporaryDirectory() as folder:
        bench = Bench(model, eager, tokenizer, Path(folder, "memory"), agents, given.turns, given.max_new_tokens)
        for number in range(given.repeats):
            bench.repeat(number)
        size = bench.path.stat().st_size
    results = bench.results()
    for record in results:
        speed = f"{record['speedup']:.2f}x" if record["speedup"] else "not equal"
        print(
            f"{record['method']:18} {record['agent']:12} {record['seconds']:7.2f} s {speed:>9} "
            f"{record['tokens_per_step']:5.2f} tokens/step {100 * record['reused']:3.0f}% of the prompts kept"
        )
    if given.json:
        facts = {"machine": machine(model, given.model), "repeats": given.repeats, **bench.settings}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        report = {**facts, "memory_bytes": size, "recorded": bench.recorded(), "sessions": results}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
