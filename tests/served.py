"""A server in a thread, with a tiny model: what the server's tests share."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from specdec import Memory, SessionPool
from specdec.drafters import MergedDrafter, SuffixDrafter
from specdec.policies import FixedPolicy
from specdec.server.app import app
from specdec.server.predictions import Predictions
from specdec.server.service import Service
from tests import tiny

NAME = "tiny"
FOR_EVER = 300.0  # seconds after which something is taken never to come, on the slowest of machines
END = 1
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token per byte; 0 pads, 1 ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = Tokenizer(models.BPE({"<pad>": 0, "<end>": END, **{c: i for i, c in enumerate(alphabet, 2)}}, []))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling.decoder = decoders.ByteLevel()
    spelling.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("<end>", special=True)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=spelling, pad_token="<pad>", eos_token="<end>")
    made.chat_template = template
    return made


def model(**changes: Any) -> Any:
    """A random Llama that mostly writes ASCII, and whose choices do not hang on rounding."""
    ends = {"eos_token_id": END, "bos_token_id": None, "pad_token_id": 0}
    made = tiny.build("Llama", **{"vocab_size": 258, "max_position_embeddings": 1024, **ends, **changes}).double()
    likely = tokenizer().encode("".join(map(chr, range(32, 127))))
    with torch.no_grad():
        for id in set(range(258)) - set(likely):
            made.lm_head.weight[id] = 0
    return made


def slow(seconds: float) -> Any:
    """The same, but every pass takes a while."""
    made = model()
    made.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return made


def scripted(text: str, start: int) -> Any:
    """A model that writes a text behind ``start`` tokens, whatever they are, and then ends."""
    script = [*tokenizer().encode(text, add_special_tokens=False), END]
    width = start + 128
    sizes = {"vocab_size": 258, "n_positions": width, "n_embd": 4 * (width // 4 + 1), "n_layer": 1, "n_head": 1}
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.transformer.ln_f.weight.fill_(1)
        for place in range(width):
            made.transformer.wpe.weight[place, place] = 1
            made.lm_head.weight[script[max(0, place - start + 1) % len(script)], place] = 1
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = END, 0
    return made


def memory(drafter: Any = None) -> Memory:
    """What a server learns; past responses by default."""
    return Memory(max_bytes=8 << 20, drafter=drafter or SuffixDrafter(factor=4.0, min_probability=0.02))


class Served:
    """What runs: its address, and its parts."""

    def __init__(self, model: Any, tokens: list[str], save_to: Any, options: dict[str, Any]) -> None:
        pool = {name: options.pop(name) for name in ("max_rows", "max_waiting", "drafter") if name in options}
        gate = {name: options.pop(name) for name in ("max_body_bytes", "body_seconds") if name in options}
        self.memory, self.model = memory(pool.pop("drafter", None)), model
        predictions, spelling = Predictions(), options.pop("tokenizer", None) or tokenizer()
        drafter = MergedDrafter([predictions, self.memory], clock=lambda: 0.0)  # on which no drafter is too slow
        self.pool = SessionPool(model, spelling, drafter, FixedPolicy(12, 5, 4), cpu_kernels=False, **pool)
        self.service = Service(model, self.pool, predictions, NAME, **options)
        made = app(self.service, tokens, self.memory, save_to, stopping=lambda: self.server.should_exit, **gate)
        self.server = uvicorn.Server(uvicorn.Config(made, log_level="warning", timeout_graceful_shutdown=int(FOR_EVER)))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def settle(self) -> None:
        """Wait until no request is left."""
        self.pool.drain(FOR_EVER)

    def stop(self) -> None:
        """Shut down, as a signal would, and wait for the end."""
        self.server.should_exit = True
        self.thread.join(FOR_EVER)
        assert not self.thread.is_alive()


@contextmanager
def served(model: Any, tokens: list[str] | None = None, save_to: Any = None, **options: Any) -> Iterator[Served]:
    """A server that runs inside the block, and must be empty at its end."""
    made = Served(model, tokens or [], save_to, options)
    made.thread.start()
    try:
        deadline = time.monotonic() + FOR_EVER
        while not made.server.started and made.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made.server.started
        yield made
    finally:
        made.stop()
    assert (made.pool.rows_in_use, made.pool.waiting, made.pool.cache_bytes) == (0, 0, 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "specdec pool"]
