"""An agent of smolagents that calls tools, plainly and with speculation in its model: the same steps, sooner.

pip install smolagents
"""

from __future__ import annotations

import time

from smolagents import ToolCallingAgent, TransformersModel, tool

import specdec
from specdec.demo import demo_path

STOCK = {"lamps": 12, "chairs": 4, "desks": 7}
SYSTEM = """You call tools. Answer with one JSON object and nothing else.
Tools: stock(item) and final_answer(answer).
Examples:
How many tables are there?
Action: {"name": "stock", "arguments": {"item": "tables"}}
Observation: 31
Action: {"name": "final_answer", "arguments": {"answer": "31 tables"}}"""


@tool
def stock(item: str) -> str:
    """How many of an item there are.

    Args:
        item: its name, in the plural.
    """
    return str(STOCK.get(item, 0))


def steps(engine: TransformersModel) -> list[str]:
    """What the model says in each step of an agent's work."""
    agent = ToolCallingAgent([stock], engine, max_steps=2, verbosity_level=0)
    agent.prompt_templates["system_prompt"] = SYSTEM
    agent.run("How many lamps are there?")
    return [step.model_output for step in agent.memory.steps if getattr(step, "model_output", None)]


def main() -> None:
    """Do the work twice."""
    engine = TransformersModel(str(demo_path()), device_map="cpu", max_new_tokens=48, do_sample=False)
    start = time.perf_counter()
    plain = steps(engine)
    print(f"plain: {time.perf_counter() - start:.1f} s")
    specdec.wrap(engine.model)  # the one line that changes
    steps(engine)  # the model is tried and timed once, and what it writes is learnt
    start = time.perf_counter()
    ours = steps(engine)
    passes = specdec.stats(engine.model).tokens_per_step
    print(f"with specdec: {time.perf_counter() - start:.1f} s, {passes:.1f} tokens a pass")
    print(*ours, sep="\n")
    print(f"the same steps: {ours == plain}")


if __name__ == "__main__":
    main()
