"""What may be asked: OpenAI's fields, those that would change the answer and cannot be honoured refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

INT64 = 2**63
Text = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=INT64)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = dict[
    Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
]


class Strict(BaseModel):
    """Fields of the type that is asked for, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Lenient(BaseModel):
    """Fields of the type that is asked for; others are passed over, as clients send back what they were sent."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Part(Lenient):
    """A part of a message: text is all that a language model reads."""

    type: Literal["text"]
    text: str


Content = str | list[Part]


class Function(Lenient):
    """A function's call, as the model wrote it: ``arguments`` are JSON in a string."""

    name: str
    arguments: str


class Call(Lenient):
    """A call in a message of the assistant's."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Lenient):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class Signature(Lenient):
    """A function that the model may call."""

    name: Text
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None


class Tool(Lenient):
    """A tool, as a chat template shows it."""

    type: Literal["function"]
    function: Signature


class Prediction(Strict):
    """What the answer will resemble."""

    type: Literal["content"]
    content: Content


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Schema(Lenient):
    """What JSON is wanted: ``schema`` as JSON Schema has it."""

    name: str | None = None
    wanted: Annotated[dict[str, JsonValue], Field(alias="schema")]


class ResponseFormat(Strict):
    """Text, any JSON object, or the JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema")
        return self


class Asked(Strict):
    """What both kinds of completions take.

    Fields at the end are taken and change nothing, or taken only where they would change nothing.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    prediction: Prediction | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[Bias, Field(max_length=1024)] | None = None
    metadata: dict[str, JsonValue] | None = None

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, data: Any) -> Any:
        """Refuse halves of characters, which JSON can spell and UTF-8 cannot; no tokenizer takes them."""
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return data

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Asked):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class CompletionRequest(Asked):
    """The body of ``/v1/completions``."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class Fault(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: Fault


def plain(content: Content | None) -> str:
    """The text of a message or a prediction."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def dumped(model: BaseModel) -> dict[str, Any]:
    """The fields that were given."""
    return model.model_dump(exclude_none=True)
