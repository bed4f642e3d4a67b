"""Answers that are JSON, by xgrammar where that is installed."""

from __future__ import annotations

import json
import threading
from typing import Any

from specdec.server.errors import ApiError


class Grammars:
    """Compiles what an answer must look like; each grammar for one tokenizer, those of late kept.

    Args:
        tokenizer: of the model.
        vocab: how many tokens the model scores.
        ends: tokens that end an answer.
    """

    CACHE_BYTES = 64 << 20

    def __init__(self, tokenizer: Any, vocab: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, ends
        self._lock, self._compiler = threading.Lock(), None

    def json(self, schema: dict[str, Any] | None) -> Any:
        """A compiled grammar: of what a JSON schema allows, or of any JSON object. Takes a while.

        Raises:
            ApiError: xgrammar is not installed, or does not know the schema.
        """
        compiler = self._made()
        try:
            wanted = {"type": "object"} if schema is None else schema
            # Without free white space, of which some models never make an end.
            return compiler.compile_json_schema(
                json.dumps(wanted), any_whitespace=False, strict_mode=schema is not None
            )
        except (RuntimeError, ValueError) as error:
            why = str(error).split(": ", 1)[-1]  # without xgrammar's own file and line
            raise _refused(f"no grammar can be made of the schema: {why}") from error

    def _made(self) -> Any:
        with self._lock:
            if self._compiler is None:
                self._compiler = self._new()
            return self._compiler

    def _new(self) -> Any:
        try:
            import xgrammar
        except ImportError as error:
            raise _refused("only text can be had here: for JSON, install xgrammar beside the server") from error
        info = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab, stop_token_ids=sorted(self._ends) or None
        )
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=self.CACHE_BYTES)


def held_to(grammar: Any) -> Any:
    """What holds one answer to a compiled grammar."""
    from xgrammar.contrib.hf import LogitsProcessor

    return LogitsProcessor(grammar)


def _refused(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", "response_format")
