"""What may be asked of a model, and what a request becomes."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from specdec.pool import SessionPool
from specdec.server import schema
from specdec.server.errors import ApiError
from specdec.server.grammars import Grammars, held_to
from specdec.server.penalties import Penalties
from specdec.server.predictions import Predictions
from specdec.server.schema import Asked, ChatRequest, CompletionRequest, Message, ResponseFormat, dumped, plain
from specdec.server.tenants import namespace
from specdec.server.tools import written_by
from specdec.server.writing import Writing

COLDEST = 0.01  # a lower temperature is none: the likeliest token is taken


class Service:
    """A pool's face to the routes: checks what is asked, and begins to write.

    Args:
        model: the pool's.
        pool: writes; it has a tokenizer.
        predictions: a drafter of the pool's.
        name: of the model.
        max_new_tokens: of one answer.
        max_prompt_tokens: of one prompt; the model's positions limit both together.
        max_choices: answers to one request.
        timeout: seconds until a request that is not answered fails, waiting among them.
    """

    def __init__(
        self,
        model: Any,
        pool: SessionPool,
        predictions: Predictions,
        name: str,
        max_new_tokens: int = 4096,
        max_prompt_tokens: int = 32768,
        max_choices: int = 8,
        timeout: float = 600.0,
    ) -> None:
        self.pool, self.name, self.timeout = pool, name, timeout
        self.max_new_tokens, self.max_prompt_tokens, self.max_choices = max_new_tokens, max_prompt_tokens, max_choices
        self._predictions, self._tokenizer = predictions, pool.tokenizer
        config = model.config.get_text_config(decoder=True)
        self._positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        self._device = model.device
        self._vocab = int(config.vocab_size)
        ends = model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        self._calls = written_by(self._tokenizer)
        self._grammars = Grammars(self._tokenizer, self._vocab, self._ends)

    def check_name(self, name: str) -> None:
        """Raise ApiError if the model has another name."""
        if name != self.name:
            raise ApiError(404, f"there is no model {name!r} here, only {self.name!r}", "model_not_found", "model")

    async def chat(self, asked: ChatRequest, token: bytes) -> Writing:
        """Begin to answer a conversation. Raises ApiError."""
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        best = (asked.top_logprobs or 0) if asked.logprobs else None
        tools = None if asked.tool_choice == "none" else asked.tools
        most = asked.max_completion_tokens or asked.max_tokens
        encode = lambda: [self._rendered(asked.messages, tools)]  # noqa: E731
        return await self._begin(
            asked, token, encode, most, best, bool(tools) and self._calls, format=asked.response_format
        )

    async def complete(self, asked: CompletionRequest, token: bytes) -> Writing:
        """Begin to continue a text, or several. Raises ApiError."""
        encode = lambda: self._encoded(asked.prompt)  # noqa: E731
        return await self._begin(asked, token, encode, asked.max_tokens or 16, asked.logprobs, False)

    async def _begin(
        self,
        asked: Asked,
        token: bytes,
        encode: Callable[[], list[list[int]]],
        most: int | None,
        best: int | None,
        calls: bool,
        format: ResponseFormat | None = None,
    ) -> Writing:
        self.check_name(asked.model)
        prompts = await asyncio.to_thread(encode)
        if not 0 < len(prompts) * (asked.n or 1) <= self.max_choices:
            raise ApiError(400, f"1 to {self.max_choices} answers may be asked for at a time", "invalid_value", "n")
        if not all(ids and max(ids) < self._vocab for ids in prompts):
            raise ApiError(400, f"a prompt has tokens, all below {self._vocab}", "invalid_value", "prompt")
        processors = await asyncio.to_thread(self._processors, asked, format)
        prediction = None
        if asked.prediction is not None:
            prediction = await asyncio.to_thread(self._ids, plain(asked.prediction.content), add_special_tokens=False)
        return Writing(
            self.pool,
            prompts,
            asked.n or 1,
            namespace=namespace(token, asked.user),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            timeout=self.timeout,
            arguments=[{**_draw(asked), **self._extent(len(prompt), most)} for prompt in prompts],
            stops=asked.stops,
            ends=self._ends,
            best=best,
            calls=calls,
            processors=processors,
            predictions=self._predictions,
            prediction=prediction,
        )

    def _processors(self, asked: Asked, format: ResponseFormat | None) -> Callable[[int], list[LogitsProcessor]]:
        """What makes the processors of one answer, given its prompt's length: they keep what they have seen."""
        frequency, presence = asked.frequency_penalty or 0.0, asked.presence_penalty or 0.0
        bias = {int(id): value for id, value in (asked.logit_bias or {}).items()}
        if any(id >= self._vocab for id in bias):
            raise ApiError(400, f"tokens are numbers below {self._vocab}", "invalid_value", "logit_bias")
        grammar = None
        if format is not None and format.type != "text":
            grammar = self._grammars.json(format.json_schema.wanted if format.json_schema is not None else None)

        def made(length: int) -> list[LogitsProcessor]:
            changes = [Penalties(length, frequency, presence, bias)] if frequency or presence or bias else []
            return changes + ([held_to(grammar)] if grammar is not None else [])

        return made

    def _extent(self, length: int, wanted: int | None) -> dict[str, Any]:
        """How far to write, from all of the prompt: what looks like padding in it is text."""
        shown = torch.ones((1, length), dtype=torch.long, device=self._device)
        return {"max_new_tokens": self._most(length, wanted), "attention_mask": shown}

    def _most(self, length: int, wanted: int | None) -> int:
        """How many tokens may be written behind a prompt of some length."""
        if length > self.max_prompt_tokens:
            raise _too_long(f"the prompt has {length} tokens; {self.max_prompt_tokens} is the most")
        if wanted is not None and wanted > self.max_new_tokens:
            raise ApiError(
                400, f"{wanted} tokens were asked for; {self.max_new_tokens} is the most", "invalid_value", "max_tokens"
            )
        left = self._positions - length
        if left < (wanted or 1):
            raise _too_long(
                f"the model knows {self._positions} positions; the prompt has {length} tokens, and {wanted or 1} more"
                " were asked for"
            )
        return wanted or min(left, self.max_new_tokens)

    def _encoded(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        prompts: list[Any] = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else list(prompt)
        if len(prompts) > self.max_choices:  # told before all are encoded
            raise ApiError(400, f"at most {self.max_choices} prompts may be given", "invalid_value", "prompt")
        return [self._ids(each) if isinstance(each, str) else each for each in prompts]

    def _rendered(self, messages: Sequence[Message], tools: Sequence[schema.Tool] | None) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(400, "this model has no chat template: use /v1/completions", "no_chat_template")
        try:
            rendered = self._tokenizer.apply_chat_template(
                [_shown(message) for message in messages],
                tools=[dumped(tool) for tool in tools or []] or None,
                add_generation_prompt=True,
                return_dict=True,
            )
        except Exception as error:  # a template is a program of the model's, which refuses what it does not like
            raise ApiError(400, f"the chat template refuses this: {error}", "invalid_value", "messages") from error
        return list(rendered["input_ids"])

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, **options)["input_ids"])


def _draw(asked: Asked) -> dict[str, Any]:
    """How to choose tokens: as the model's own settings say unless asked otherwise."""
    if asked.temperature is None and asked.top_p is None:
        return {}
    temperature = 1.0 if asked.temperature is None else asked.temperature
    if temperature < COLDEST:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": asked.top_p or 1.0, "top_k": 0}


def _shown(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text in one string, arguments as an object."""
    shown = {**dumped(message), "content": plain(message.content)}
    shown["role"] = "system" if message.role == "developer" else message.role
    for call in shown.get("tool_calls", []):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return shown


def _arguments(written: str) -> Any:
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return written


def _is_ids(prompt: Any) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, "context_length_exceeded")
