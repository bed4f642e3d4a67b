"""An agent's loop in one session: each turn reads only what is new, and what was written before is drafted again."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import Memory, Session
from specdec.demo import demo_path

SYSTEM = (
    "You are a careful assistant that keeps a shopping list. Answer every message with the whole list, one per line."
)
OBSERVATIONS = (
    "Add apples, bread, coffee, two lemons and a bag of rice.",
    "Add butter. Repeat the whole list.",
    "The shop has no coffee. Repeat the whole list with tea in its place.",
    "Add a dozen eggs. Repeat the whole list.",
)


def main() -> None:
    """Run the loop twice: the second agent starts from what the first one has written."""
    path = demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    memory = Memory()
    for agent in ("first", "second"):
        with Session(model, tokenizer, memory=memory, namespace="shopping") as session:
            messages = [{"role": "system", "content": SYSTEM}]
            for observation in OBSERVATIONS:
                messages.append({"role": "user", "content": observation})
                messages.append({"role": "assistant", "content": session.chat(messages, max_new_tokens=48)})
                turn = session.turns[-1]
                print(
                    f"{agent} agent: {turn.reused_tokens} of {turn.prompt_tokens} prompt tokens were there, "
                    f"{turn.new_tokens} written in {turn.steps} passes, {turn.wall:.1f} s"
                )
    print(messages[-1]["content"])


if __name__ == "__main__":
    main()
