"""The same tokens with and without speculation, and how many target passes each took."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec.demo import demo_path

PROMPT = "Rewrite in capital letters: the quick brown fox jumps over the lazy dog; the lazy dog sleeps on."


def main() -> None:
    """Generate twice from one prompt and compare."""
    path = demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    conversation = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")

    plain = model.generate(**inputs, max_new_tokens=100)
    with specdec.speculating(model):
        fast = model.generate(**inputs, max_new_tokens=100)
        stats = specdec.stats(model)
    print(tokenizer.decode(fast[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print("the same tokens:", plain.tolist() == fast.tolist())
    print(f"{stats.tokens} tokens in {stats.steps} passes; guessed by", stats.by_drafter)


if __name__ == "__main__":
    main()
