"""Guessing what a grammar forces: from matchers of our own, and of xgrammar and outlines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import specdec
from specdec.core import Budget, Context, Verdict
from specdec.drafters import GrammarDrafter, MergedDrafter, NgramDrafter
from specdec.drafters.matchers import matchers
from specdec.policies import FixedPolicy
from tests import tiny

WORDS = ["na", "name", '":', '{"', ' "', "true", "false", "é"]  # beside one token per ASCII character
END = 2
WIDE = Budget(32, 32, 4)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "known": {"type": "boolean"}},
    "required": ["name", "known"],
    "additionalProperties": False,
}


def tokenizer(words: list[str] = WORDS) -> Any:
    """One token per character, and some longer ones."""
    letters = ["<pad>", "<s>", "</s>", *map(chr, range(32, 127)), *words]
    spelling = Tokenizer(models.WordLevel({text: id for id, text in enumerate(letters)}, unk_token="<pad>"))
    longest = sorted(words, key=len, reverse=True)
    spelling.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*longest, "."])), "isolated")
    spelling.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZER = tokenizer()
VOCAB = len(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class OneOf:
    """A matcher of a few whole texts."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.read = texts, [""]

    def accept(self, token: int) -> bool:
        if token not in self.allowed(VOCAB):
            return False
        self.read.append(self.read[-1] + TOKENIZER.decode([token]))
        return True

    def allowed(self, most: int) -> list[int]:
        rest = [text[len(self.read[-1]) :] for text in self.texts if text.startswith(self.read[-1])]
        own = [END] if "" in rest else []
        own += [i for i in range(3, VOCAB) if any(text.startswith(TOKENIZER.decode([i])) for text in rest)]
        return own if len(own) <= most else []

    def rollback(self, tokens: int) -> None:
        del self.read[len(self.read) - tokens :]


def context(*written: str) -> Context:
    """A prompt, and what was committed after it, in a step for each text."""
    made = Context([7])
    for text in written:
        commit(made, ids(text))
    return made


def commit(context: Context, tokens: list[int]) -> None:
    from specdec.core import DraftTree

    root = DraftTree.root(int(context.tokens[-1]))
    context.extend(Verdict(root, np.zeros(1, np.int64), np.array(tokens, np.int64)))


def guess(drafter: GrammarDrafter, context: Context, budget: Budget = WIDE) -> list[int]:
    (tree,) = drafter.draft([context], [budget])
    assert tree.parents.tolist() == list(range(-1, len(tree) - 1))
    return tree.tokens[1:].tolist()


def test_a_forced_text_is_guessed_in_the_longest_tokens_and_its_end_too() -> None:
    drafter = GrammarDrafter(lambda: OneOf('{"name":true}'), TOKENIZER)
    assert guess(drafter, context()) == [*ids('{"name":true}'), END]
    assert len(ids('{"name":true}')) == 5


def test_without_a_tokenizer_only_a_single_allowed_token_is_guessed() -> None:
    drafter = GrammarDrafter(lambda: OneOf("how name"))
    assert guess(drafter, context()) == ids("how ")  # then n, na and name may come


def test_a_choice_ends_the_guess() -> None:
    drafter = GrammarDrafter(lambda: OneOf("say yes", "say no"), TOKENIZER)
    assert guess(drafter, context()) == ids("say ")
    assert guess(drafter, context("say ")) == []
    assert guess(drafter, context("say y")) == [*ids("es"), END]


def test_a_longer_token_that_is_not_forced_is_not_guessed() -> None:
    """After a space both a quote and a digit may come, though a space with a quote is a token."""
    drafter = GrammarDrafter(lambda: OneOf(' "', " 1"), TOKENIZER)
    assert guess(drafter, context()) == ids(" ")


@pytest.mark.parametrize(
    "budget", [Budget(3, 9, 1), Budget(9, 3, 1), Budget(0, 9, 1), Budget(9, 9, 0), Budget(9, 0, 1)]
)
def test_budgets_are_kept(budget: Budget) -> None:
    most = min(budget.nodes, budget.depth) if budget.width else 0
    assert guess(GrammarDrafter(lambda: OneOf("abcdefgh"), TOKENIZER), context(), budget) == ids("abcdefgh")[:most]


def test_what_is_too_unlikely_is_left_out() -> None:
    drafter = GrammarDrafter(lambda: OneOf("name", 'na":'), TOKENIZER)
    (tree,) = drafter.draft([context()], [WIDE])
    (less,) = drafter.draft([context()], [Budget(32, 32, 4, least=float(tree.probability[1]) + 0.01)])
    assert (len(tree), len(less)) == (2, 1)


def test_drafting_leaves_the_matcher_where_it_was() -> None:
    made: list[OneOf] = []

    def make() -> OneOf:
        made.append(OneOf("name it"))
        return made[-1]

    drafter, text = GrammarDrafter(make, TOKENIZER), context()
    assert guess(drafter, text) == guess(drafter, text) == [*ids("name it"), END]
    assert [matcher.read for matcher in made] == [[""]]


def test_it_catches_up_over_steps_that_it_did_not_see() -> None:
    drafter, text = GrammarDrafter(lambda: OneOf("name it so", "name us"), TOKENIZER), context()
    assert guess(drafter, text, Budget(0, 0, 0)) == []
    commit(text, ids("name "))
    commit(text, ids("i"))
    assert guess(drafter, text) == [*ids("t so"), END]


def test_a_text_that_leaves_the_grammar_gets_no_more_guesses() -> None:
    drafter, text = GrammarDrafter(lambda: OneOf("abcabc"), TOKENIZER), context("ab")
    assert guess(drafter, text) != []
    commit(text, ids("x"))
    assert guess(drafter, text) == []
    commit(text, ids("c"))  # which would have gone on, had the x not come
    assert guess(drafter, text) == []


def test_a_finished_text_gets_no_guesses() -> None:
    text = context()
    text.finished = True
    assert guess(GrammarDrafter(lambda: OneOf("abc"), TOKENIZER), text) == []


def test_each_text_has_its_own_place() -> None:
    drafter, texts = GrammarDrafter(lambda: OneOf("abc"), TOKENIZER), [context("a"), context("ab"), context()]
    trees = drafter.draft(texts, [WIDE] * 3)
    assert [tree.tokens[1:].tolist() for tree in trees] == [[*ids(text), END] for text in ("bc", "c", "abc")]


def test_it_learns_how_a_model_writes_what_is_forced() -> None:
    drafter = GrammarDrafter(lambda: OneOf("name"), TOKENIZER)
    before = drafter.draft([context()], [WIDE])[0].probability[1]
    for _ in range(20):
        text = context()
        drafter.draft([text], [WIDE])
        commit(text, ids("n"))  # a letter where the whole word was allowed
        drafter.draft([text], [WIDE])
    assert drafter.draft([context()], [WIDE])[0].probability[1] < before / 2
    drafter.reset()
    assert drafter.draft([context()], [WIDE])[0].probability[1] == before


def test_what_is_no_grammar_is_refused() -> None:
    with pytest.raises(TypeError, match="got dict"):
        GrammarDrafter(SCHEMA)


def test_several_grammars_are_refused() -> None:
    class Processor:
        compiled_grammars = (object(), object())

    with pytest.raises(ValueError, match="2 grammars"):
        GrammarDrafter(Processor())


class Constrained(NamedTuple):
    """A way to constrain what is written.

    Attributes:
        grammar: what it was compiled to.
        processor: makes a new logits processor.
    """

    grammar: Any
    processor: Callable[[], Any]


def xgrammar_json() -> Constrained:
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    from xgrammar.contrib.hf import LogitsProcessor

    info = xgrammar.TokenizerInfo.from_huggingface(TOKENIZER, vocab_size=VOCAB)
    compact: dict[str, Any] = {"any_whitespace": False, "separators": (",", ":")}
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), **compact)
    return Constrained(grammar, lambda: LogitsProcessor(grammar))


def outlines_json() -> Constrained:
    core = pytest.importorskip("outlines_core", reason="outlines is not installed")
    backend = pytest.importorskip("outlines.backends.outlines_core", reason="outlines is not installed")
    from outlines_core.json_schema import build_regex_from_schema

    vocabulary = backend.OutlinesCoreBackend.create_outlines_core_vocabulary(
        TOKENIZER.get_vocab(), END, "</s>", lambda token: token
    )
    index = core.Index(build_regex_from_schema(json.dumps(SCHEMA), ""), vocabulary)
    return Constrained(index, lambda: backend.OutlinesCoreLogitsProcessor(index, "torch"))


def outlines_xgrammar() -> Constrained:
    backend = pytest.importorskip("outlines.backends.xgrammar", reason="outlines is not installed")
    grammar = xgrammar_json().grammar
    return Constrained(grammar, lambda: backend.XGrammarLogitsProcessor(grammar, "torch"))


@pytest.fixture(params=[xgrammar_json, outlines_json, outlines_xgrammar], ids=lambda make: make.__name__)
def constrained(request: pytest.FixtureRequest) -> Constrained:
    return request.param()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model(vocab_size=VOCAB)


def test_the_keys_of_a_schema_are_guessed(constrained: Constrained) -> None:
    drafter = GrammarDrafter(constrained.grammar, TOKENIZER)
    assert guess(drafter, context()) == ids('{"name":"')
    assert guess(drafter, context('{"name":"a')) == ids('da","known":')
    assert guess(drafter, context('{"name":"ada","known":tr')) == [*ids("ue}"), END]


def test_a_processor_stands_for_its_grammar_and_is_not_touched(constrained: Constrained, model: Any) -> None:
    processor = constrained.processor()
    drafter = GrammarDrafter(processor, TOKENIZER)
    assert guess(drafter, context()) == guess(GrammarDrafter(constrained.grammar, TOKENIZER), context())

    def write(processor: Any) -> list[int]:
        output = model.generate(tiny.prompt(), max_new_tokens=60, do_sample=False, logits_processor=[processor])
        return output[0].tolist()

    assert write(processor) == write(constrained.processor())


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_output_is_plain_generates_in_fewer_steps(
    constrained: Constrained, model: Any, sampled: bool, rows: int
) -> None:
    def arguments() -> dict[str, Any]:
        return {
            "inputs": tiny.prompt(rows=rows),
            "max_new_tokens": 60,
            "do_sample": sampled,
            "logits_processor": [constrained.processor()],
        }

    drafter = GrammarDrafter(constrained.grammar, TOKENIZER)
    result = tiny.same(model, arguments, drafter=drafter)
    for row in result.ours:
        said = json.loads(TOKENIZER.decode(row[9:], skip_special_tokens=True))
        assert said["name"] in ("ada", "bob")
    assert result.stats.tokens_per_step > 2, result.stats


def test_processors_see_every_committed_token_once_in_order(constrained: Constrained, model: Any) -> None:
    """With guesses that are true, and others that the grammar forbids."""

    class Watched:
        def __init__(self) -> None:
            self.inner, self.seen = constrained.processor(), list[list[int]]()

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.seen.append(ids[0].tolist())
            return self.inner(ids, scores)

    watched: list[Watched] = []

    def arguments() -> dict[str, Any]:
        watched.append(Watched())
        return {"inputs": tiny.prompt(), "max_new_tokens": 60, "do_sample": False, "logits_processor": [watched[-1]]}

    tiny.same(model, arguments)  # whose drafter knows the answer, and guesses junk beside it
    plain, ours = watched[0].seen, watched[-1].seen
    assert ours == plain
    assert [len(ids) for ids in ours] == list(range(9, 9 + len(ours)))


def test_it_stands_among_others(constrained: Constrained, model: Any) -> None:
    drafters = [GrammarDrafter(constrained.grammar, TOKENIZER), NgramDrafter()]
    drafter = MergedDrafter(drafters, clock=lambda: 0.0)  # none is let rest because a matcher was slow to compile

    def arguments() -> dict[str, Any]:
        return {"inputs": tiny.prompt(), "max_new_tokens": 60, "logits_processor": [constrained.processor()]}

    result = tiny.same(model, arguments, drafter=drafter)
    assert result.stats.by_drafter["grammar"]["accepted"] > 10


def test_xgrammar_forces_text_that_begins_within_a_character() -> None:
    """Byte by byte, as byte-level tokenizers write what is not in their vocabulary."""
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    text = "né"
    vocab = ["<0x00>", "n", "</s>", *(f"<0x{byte:02X}>" for byte in "é".encode())]
    info = xgrammar.TokenizerInfo(vocab, xgrammar.VocabType.BYTE_FALLBACK, stop_token_ids=[END])
    matcher = matchers(xgrammar.GrammarCompiler(info).compile_regex(text))()
    for token in (1, 3, 4, END):
        assert matcher.allowed(4) == [token]
        assert matcher.accept(token)
    assert matcher.allowed(4) == []
    assert not matcher.accept(1)


@pytest.mark.real
def test_a_real_model_writes_what_is_forced_as_guessed() -> None:
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from xgrammar.contrib.hf import LogitsProcessor

    from specdec.demo import demo_path

    path = demo_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    prompt = [{"role": "user", "content": "Do you know Ada? Answer as JSON."}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def write() -> list[int]:
        output = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, logits_processor=[LogitsProcessor(grammar)]
        )
        return output[0].tolist()

    plain = write()
    with specdec.speculating(model, GrammarDrafter(grammar, tokenizer), FixedPolicy(12, 12, 1), on_unsupported="error"):
        assert write() == plain
        assert specdec.stats(model).tokens_per_step > 2
