"""A LangChain agent that calls a tool, plainly and with speculation in the model below: the same answers, sooner.

A small model writes no call by itself: a grammar lets it choose the arguments alone, and what the grammar forces is
guessed for free.

pip install langchain-core xgrammar && pip install --no-deps langchain-huggingface
"""

from __future__ import annotations

import json
import time
from typing import Any

import xgrammar
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from xgrammar.contrib.hf import LogitsProcessor

import specdec
from specdec.demo import demo_path
from specdec.drafters import GrammarDrafter, MergedDrafter, NgramDrafter

STOCK = {"lamps": 12, "chairs": 4, "desks": 7}
CLERK = "You are a clerk in a shop. Look up what you are asked for by one call of stock(item)."
BRIEF = "Answer the question in one short sentence."
QUESTIONS = ("How many lamps are there?", "How many desks are there?")
CALL = {
    "type": "object",
    "properties": {"tool": {"const": "stock"}, "item": {"enum": [*STOCK]}},
    "required": ["tool", "item"],
    "additionalProperties": False,
}
SETTINGS: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "return_full_text": False}


@tool
def stock(item: str) -> str:
    """How many of an item there are."""
    return f"There are {STOCK[item]} {item}."


def work(chat: ChatHuggingFace, grammar: Any) -> list[str]:
    """What the model says: for each question a call, and an answer to what the tool returns."""
    said: list[str] = []
    for question in QUESTIONS:
        calling = chat.bind(pipeline_kwargs={**SETTINGS, "logits_processor": [LogitsProcessor(grammar)]})
        said.append(calling.invoke([SystemMessage(CLERK), HumanMessage(question)]).content)
        result = stock.invoke({"item": json.loads(said[-1])["item"]})
        answering = chat.bind(pipeline_kwargs=SETTINGS)
        said.append(
            answering.invoke([SystemMessage(BRIEF), HumanMessage(f"{question} The list says: {result}")]).content
        )
    return said


def main() -> None:
    """Do the work three times."""
    path = demo_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(CALL), any_whitespace=False)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=writer), tokenizer=tokenizer)

    start = time.perf_counter()
    plain = work(chat, grammar)
    print(f"plain: {time.perf_counter() - start:.1f} s")
    specdec.wrap(model, MergedDrafter([GrammarDrafter(grammar, tokenizer), NgramDrafter()]))  # the line that changes
    work(chat, grammar)  # the model is tried and timed once
    start = time.perf_counter()
    ours = work(chat, grammar)
    passes = specdec.stats(model).tokens_per_step
    print(f"with specdec: {time.perf_counter() - start:.1f} s, {passes:.1f} tokens a pass")
    print(*ours, sep="\n")
    print(f"the same calls and answers: {ours == plain}")


if __name__ == "__main__":
    main()
