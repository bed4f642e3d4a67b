"""A LangChain conversation, plainly and with speculation in the model below: the same answers, sooner.

pip install langchain-core && pip install --no-deps langchain-huggingface
"""

from __future__ import annotations

import time

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import specdec
from specdec.demo import demo_path

SYSTEM = "You are a careful clerk. Answer every message with the whole list of orders, one per line."
OBSERVATIONS = (
    "Anna wants a lamp, Boris a chair, Clara a desk.",
    "David wants a shelf. Repeat the whole list.",
    "Emma wants a mirror. Repeat the whole list.",
)


def converse(chat: ChatHuggingFace) -> list[str]:
    """What the model answers, each time to all that was said before."""
    messages = [SystemMessage(SYSTEM)]
    for observation in OBSERVATIONS:
        messages.append(HumanMessage(observation))
        messages.append(AIMessage(chat.invoke(messages).content))
    return [message.content for message in messages if isinstance(message, AIMessage)]


def main() -> None:
    """Converse twice."""
    path = demo_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 48, "do_sample": False, "return_full_text": False}
    chat = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=writer, pipeline_kwargs=settings), tokenizer=tokenizer)
    chat = chat.bind(pipeline_kwargs=settings)

    start = time.perf_counter()
    plain = converse(chat)
    print(f"plain: {time.perf_counter() - start:.1f} s")
    specdec.wrap(model)  # the one line that changes
    converse(chat)  # the model is tried and timed once, and what it writes is learnt
    start = time.perf_counter()
    ours = converse(chat)
    print(
        f"with specdec: {time.perf_counter() - start:.1f} s, {specdec.stats(model).tokens_per_step:.1f} tokens a pass"
    )
    print(ours[-1])
    print(f"the same answers: {ours == plain}")


if __name__ == "__main__":
    main()
