"""Editing a file: the answer will resemble the file, so the file is what is drafted."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import Session
from specdec.demo import demo_path

CODE = '''\
def area(width, height):
    """The area of a rectangle."""
    return width * height


def perimeter(width, height):
    """The length of a rectangle's border."""
    return 2 * (width + height)


def fits(width, height, limit):
    """Whether both sides are within a limit."""
    return width <= limit and height <= limit
'''
TASK = "Repeat this Python file, but with the name size in place of limit:\n\n```python\n" + CODE + "```"


def main() -> None:
    """Ask for the same edit without the prediction and with it."""
    path = demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    messages = [{"role": "user", "content": TASK}]
    answers = []
    for prediction in (None, "```python\n" + CODE + "```"):
        with Session(model, tokenizer, drafter="recycling") as session:
            answers.append(session.chat(messages, prediction=prediction, max_new_tokens=160))
            print(f"{session.stats.new_tokens} tokens in {session.stats.steps} passes, {session.stats.wall:.1f} s")
    print("the same answer:", answers[0] == answers[1])
    print(answers[1])


if __name__ == "__main__":
    main()
