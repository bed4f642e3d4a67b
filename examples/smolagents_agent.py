"""An agent of smolagents that calls tools, plainly and with speculation in its model: the same steps, sooner.

A small model writes no call by itself: a grammar lets it choose the arguments alone, of a look-up first and then of the
answer. What the grammar forces is guessed for free.

pip install smolagents xgrammar
"""

from __future__ import annotations

import json
import time
from typing import Any

import xgrammar
from smolagents import MessageRole, ToolCallingAgent, TransformersModel, tool
from xgrammar.contrib.hf import LogitsProcessor

import specdec
from specdec.demo import demo_path
from specdec.drafters import GrammarDrafter, MergedDrafter, NgramDrafter

STOCK = {"lamps": 12, "chairs": 4, "desks": 7}
QUESTION = "How many lamps are there?"
SYSTEM = """You call tools. Answer with one JSON object and nothing else.
Tools: stock(item) and final_answer(answer).
Examples:
How many desks are there?
{"name": "stock", "arguments": {"item": "desks"}}
Observation: 31 desks
{"name": "final_answer", "arguments": {"answer": "31 desks"}}"""


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """The JSON schema of a tool's call, from those of its arguments."""
    inner = {"type": "object", "properties": arguments, "required": [*arguments], "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": inner},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


LOOK_UP, ANSWER = call("stock", item={"enum": [*STOCK]}), call("final_answer", answer={"type": "string"})


class Caller(TransformersModel):
    """A model that writes calls and nothing else: ``first``, and ``then`` when there is a result."""

    first: Any
    then: Any

    def generate(self, messages: list[Any], *others: Any, **settings: Any) -> Any:
        """One call."""
        known = any(message.role == MessageRole.TOOL_RESPONSE for message in messages)
        processor = LogitsProcessor(self.then if known else self.first)
        return super().generate(messages, *others, **settings, logits_processor=[processor])


@tool
def stock(item: str) -> str:
    """How many of an item there are.

    Args:
        item: its name, in the plural.
    """
    return f"{STOCK[item]} {item}"


def work(engine: Caller) -> list[str]:
    """What the model says in each step of an agent's work, and what comes of it."""
    agent = ToolCallingAgent([stock], engine, max_steps=2, verbosity_level=0)
    agent.prompt_templates["system_prompt"] = SYSTEM
    answer = agent.run(QUESTION)
    return [*(step.model_output for step in agent.memory.steps if getattr(step, "model_output", None)), str(answer)]


def main() -> None:
    """Do the work three times."""
    engine = Caller(str(demo_path()), device_map="cpu", max_new_tokens=48, do_sample=False)
    info = xgrammar.TokenizerInfo.from_huggingface(engine.tokenizer, vocab_size=engine.model.config.vocab_size)
    compiler = xgrammar.GrammarCompiler(info)
    engine.first, engine.then, either = (
        compiler.compile_json_schema(json.dumps(calls), any_whitespace=False)
        for calls in (LOOK_UP, ANSWER, {"anyOf": [LOOK_UP, ANSWER]})
    )

    start = time.perf_counter()
    plain = work(engine)
    print(f"plain: {time.perf_counter() - start:.1f} s")
    drafter = MergedDrafter([GrammarDrafter(either, engine.tokenizer), NgramDrafter()])
    specdec.wrap(engine.model, drafter)  # the line that changes
    work(engine)  # the model is tried and timed once
    start = time.perf_counter()
    ours = work(engine)
    passes = specdec.stats(engine.model).tokens_per_step
    print(f"with specdec: {time.perf_counter() - start:.1f} s, {passes:.1f} tokens a pass")
    print(*ours, sep="\n")
    print(f"the same steps: {ours == plain}")


if __name__ == "__main__":
    main()
