"""Turn by turn, a session writes what plain ``generate`` writes on the whole prompt, and reads only what is new."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

import specdec
from specdec import Memory, Session, adapters, prefix
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import prompt

POLICY = FixedPolicy(12, 5, 6)
SLIDING = {"sliding_window": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "use_sliding_window": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "sliding": ("Mistral", SLIDING),
    "mixed": ("Qwen3", {**SLIDING, **MIXED}),
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}"
    "{% if tools %}tools {{ tools | length }}\n{% endif %}{% if add_generation_prompt %}<a>{% endif %}"
)


_unhurried = pytest.fixture(autouse=True, scope="module")(tiny.unhurried)


def session(model: Any, **arguments: Any) -> Session:
    return Session(model, **{"policy": POLICY, "cpu_kernels": False, **arguments})


@pytest.fixture
def model() -> Any:
    return tiny.model()


@pytest.fixture
def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


class Script:
    """A conversation whose later prompts build on what was written: appended to, edited, shortened, asked again."""

    def __init__(self, generate: Any, **arguments: Any) -> None:
        self.generate, self.arguments = generate, {"max_new_tokens": 12, "eos_token_id": None, **arguments}
        self.prompts: list[torch.Tensor] = []
        self.outputs: list[list[int]] = []

    def play(self) -> list[list[int]]:
        text = self.turn(prompt(9))
        text = self.turn(self.append(text, 5))
        text = self.turn(self.append(text, 1))
        edited = text.clone()
        edited[0, 14] = 3 + (edited[0, 14] + 1) % 50
        text = self.turn(self.append(edited, 3))
        self.turn(text[:, :20])
        self.turn(text[:, :20])
        self.turn(text)
        self.turn(prompt(7, seed=5))
        self.turn(text)
        return self.outputs

    def turn(self, ids: torch.Tensor) -> torch.Tensor:
        output = tiny.sequences(self.generate(ids, attention_mask=torch.ones_like(ids), **self.arguments))
        self.prompts.append(ids)
        self.outputs.append(output[0].tolist())
        return output

    def append(self, text: torch.Tensor, more: int) -> torch.Tensor:
        return torch.cat([text, prompt(more, seed=len(self.outputs))], dim=1)

    def shared(self) -> list[int]:
        """How many tokens of each prompt stood in the text before."""
        held = [[], *(text[:-1] for text in self.outputs)]
        return [prefix.common(torch.tensor(a).numpy(), b[0].tolist()) for a, b in zip(held, self.prompts, strict=False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", [{}, {"do_sample": True, "temperature": 0.8}], ids=["greedy", "sampled"])
def test_every_turn_is_as_plain_generate_writes_it(kind: str, draw: dict[str, Any]) -> None:
    model = tiny.model(KINDS[kind][0], **KINDS[kind][1])
    torch.manual_seed(7)
    plain = Script(model.generate, **draw)
    plain.play()
    with session(model) as ours:
        torch.manual_seed(7)
        script = Script(ours.generate, **draw)
        assert script.play() == plain.outputs
        assert {turn.why_anew for turn in ours.turns} == {""}
        reused = [turn.reused_tokens for turn in ours.turns]
        possible = [min(n, len(ids[0]) - 1) for n, ids in zip(script.shared(), script.prompts, strict=False)]
        held = list(zip(possible, [[0], *script.outputs], strict=False))
        assert possible[1] == 20
        if kind == "full":
            assert reused == possible
        else:  # what is cut back behind a window that has moved is read anew
            assert reused == [n if n == len(text) - 1 else 0 for n, text in held]
        assert ours.stats.reused_tokens == sum(reused) > 0
        assert ours.stats.prompt_tokens == sum(len(ids[0]) for ids in script.prompts)
        assert ours.stats.new_tokens == ours.stats.tokens == 9 * 12
        assert ours.stats.accepted > 0


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_whole_prompt(kind: str) -> None:
    model = tiny.model(KINDS[kind][0], **KINDS[kind][1])
    model.double()  # in which a wrong row cannot hide behind rounding
    arguments = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    with session(model) as ours:
        text = ours.generate(prompt(20), **arguments).sequences
        for ids in (torch.cat([text, prompt(4)], 1), text[:, :25], text[:, :24]):
            mine, theirs = ours.generate(ids, **arguments), model.generate(ids, **arguments)
            assert mine.sequences.tolist() == theirs.sequences.tolist()
            torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-6, rtol=0)


def test_a_window_that_has_not_moved_is_cut_back() -> None:
    model = tiny.model("Mistral", sliding_window=64)
    with session(model) as ours:
        text = ours.generate(prompt(20), max_new_tokens=8, eos_token_id=None)
        again = ours.generate(text[:, :22], max_new_tokens=8, eos_token_id=None)
        assert ours.turns[-1].reused_tokens == 21
        assert again.tolist() == model.generate(text[:, :22], max_new_tokens=8, eos_token_id=None).tolist()


def test_a_turn_that_ends_early(model: Any) -> None:
    """At an end-of-sequence token, a stop string, or in the middle of a draft."""
    ends = {"eos_token_id": list(range(3, 90, 5)), "max_new_tokens": 30, "return_dict_in_generate": True}
    with session(model) as ours:
        ids = prompt(9)
        for turn in range(6):
            output, plain = ours.generate(ids, **ends), model.generate(ids, **ends)
            assert output.sequences.tolist() == plain.sequences.tolist()
            assert output.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
            ids = torch.cat([output.sequences, prompt(4, seed=turn + 1)], dim=1)
        assert ours.stats.reused_tokens > 0


def test_nothing_is_kept_above_the_cap(model: Any) -> None:
    with session(model, max_cache_bytes=50_000) as small, session(model) as large:
        for ids in (prompt(9), prompt(400), prompt(9)):
            assert small.generate(ids, max_new_tokens=4).tolist() == large.generate(ids, max_new_tokens=4).tolist()
            assert small.cache_bytes <= 50_000
        assert small.cache_bytes == 0 < large.cache_bytes
    with session(model, max_cache_bytes=10_000_000) as ours:
        ours.generate(prompt(100), max_new_tokens=4)
        held = sum(2 * layer.keys.nbytes for layer in ours._prefix.cache.layers)
        assert held <= ours.cache_bytes <= 6 * held
    with pytest.raises(ValueError, match="max_cache_bytes"):
        session(model, max_cache_bytes=-1)


def test_two_sessions_and_a_wrapped_model_do_not_disturb_each_other(model: Any) -> None:
    plain = [Script(model.generate).play(), Script(model.generate, do_sample=True, top_k=1).play()]
    specdec.wrap(model, policy=POLICY, cpu_kernels=False)
    wrapped = model.generate
    with session(model) as one, session(model) as two:
        turns = [Script(one.generate), Script(two.generate, do_sample=True, top_k=1)]
        threads = [threading.Thread(target=script.play) for script in turns]
        for thread in threads:
            thread.start()
        third = Script(model.generate).play()
        for thread in threads:
            thread.join()
        assert [script.outputs for script in turns] == plain
        assert third == plain[0]
        assert one.stats.generations == two.stats.generations == specdec.stats(model).generations == 9
        assert one.stats.reused_tokens > 0
    assert model.generate is wrapped
    assert not specdec.stats(model).reasons
    specdec.unwrap(model)
    assert "generate" not in vars(model)


def test_a_session_leaves_the_model_as_it_is(model: Any) -> None:
    before = dict(vars(model))
    with session(model) as ours:
        ours.generate(prompt(9), max_new_tokens=4)
    assert dict(vars(model)) == before


class Raises(LogitsProcessor):
    """Fails at the third token."""

    def __init__(self, error: BaseException) -> None:
        self.calls, self.error = 0, error

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [ArithmeticError(), KeyboardInterrupt()], ids=repr)
def test_a_failed_turn_costs_nothing_but_itself(model: Any, error: BaseException) -> None:
    with session(model) as ours:
        text = ours.generate(prompt(9), max_new_tokens=12, eos_token_id=None)
        with pytest.raises(type(error)):
            ours.generate(text, max_new_tokens=12, eos_token_id=None, logits_processor=[Raises(error)])
        assert ours.turns[-1].new_tokens == 0
        again = ours.generate(text, max_new_tokens=12, eos_token_id=None)
        assert again.tolist() == model.generate(text, max_new_tokens=12, eos_token_id=None).tolist()
        assert ours.turns[-1].reused_tokens == 20


def test_rows_that_a_failed_turn_has_changed_are_dropped(model: Any) -> None:
    """Plain ``generate``, to which some calls go, writes into the cache it is given."""
    arguments: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "output_hidden_states": True}
    arguments["return_dict_in_generate"] = True
    with session(model) as ours, tiny.quietly():
        text = ours.generate(prompt(9), **arguments).sequences
        assert ours.stats.plain_generations == 1
        with pytest.raises(ArithmeticError):
            ours.generate(text, logits_processor=[Raises(ArithmeticError())], **arguments)
        assert ours.cache_bytes == 0
        again = ours.generate(text, **arguments).sequences
        assert again.tolist() == model.generate(text, **arguments).sequences.tolist()
        assert ours.turns[-1].reused_tokens == 0


def test_text_and_conversations(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "count to ten"}]
    with session(model, tokenizer=tokenizer) as ours:
        for turn in range(3):
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            plain = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
            said = ours.chat(tuple(messages), max_new_tokens=12)
            assert said == tokenizer.decode(plain, skip_special_tokens=True)
            assert len(messages) == 2 * turn + 1
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "go on"}]
        assert ours.stats.reused_tokens > 40
        with_tools = ours.chat(messages, tools=[{"type": "function"}], max_new_tokens=4)
        rendered = tokenizer.apply_chat_template(messages, tools=[{}], add_generation_prompt=True, tokenize=False)
        assert "tools 1" in rendered
        assert with_tools == ours.generate(rendered, max_new_tokens=4)
        assert ours.turns[-1].reused_tokens == ours.turns[-1].prompt_tokens - 1


def test_streams(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "count to ten"}]
    with session(model, tokenizer=tokenizer) as ours:
        whole = ours.generate("one two", max_new_tokens=20)
        assert "".join(ours.stream("one two", max_new_tokens=20)) == whole
        assert ours.turns[-1].reused_tokens == len("one two") - 1
        pieces = list(ours.stream_chat(messages, max_new_tokens=20, eos_token_id=None))
        assert "".join(pieces) == ours.chat(messages, max_new_tokens=20, eos_token_id=None)
        with pytest.raises(ValueError, match="streamer"):
            ours.stream("one", streamer=object())


class Spaces(LogitsProcessor):
    """Lets words end, so that there are pieces, and takes its time."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        if input_ids.shape[1] % 3 == 0:
            scores[:, 3] = 1000.0
        return scores


def test_a_stream_is_left_in_the_middle(model: Any, tokenizer: Any) -> None:
    with session(model, tokenizer=tokenizer) as ours:
        ours.generate("one two", max_new_tokens=4, eos_token_id=None)
        slow: dict[str, Any] = {"logits_processor": [Spaces()], "stop_strings": ["}}}}"]}
        stream = ours.stream("one two", max_new_tokens=400, eos_token_id=None, **slow)
        assert isinstance(stream, Iterator)
        next(stream)
        with pytest.raises(RuntimeError, match="middle of a turn"):
            ours.generate("one")
        stream.close()
        assert 0 < ours.turns[-1].tokens < 400
        assert "specdec stream" not in [thread.name for thread in threading.enumerate()]
        plain = model.generate(**tokenizer("one two and", return_tensors="pt"), max_new_tokens=20)[0]
        assert ours.generate("one two and", max_new_tokens=20) == tokenizer.decode(plain[11:], skip_special_tokens=True)
        assert ours.turns[-1].reused_tokens == 6  # what the turn before had left of the first one's rows


def test_what_fails_in_a_stream_is_raised_to_its_reader(model: Any, tokenizer: Any) -> None:
    with session(model, tokenizer=tokenizer) as ours:
        with pytest.raises(ArithmeticError):
            list(ours.stream("one two", logits_processor=[Raises(ArithmeticError())]))
        assert ours.generate("one two", max_new_tokens=4)


def test_a_closed_session_says_so(model: Any, tokenizer: Any) -> None:
    with session(model, tokenizer=tokenizer) as ours:
        ours.generate("one two", max_new_tokens=4)
        assert ours.cache_bytes > 0
        stream = ours.stream("one two", max_new_tokens=40, eos_token_id=None, logits_processor=[Spaces()])
        next(stream)
        ours.close()
        list(stream)
    assert ours.cache_bytes == 0
    ours.close()
    for use in (lambda: ours.generate("one"), lambda: list(ours.stream("one")), ours.reset):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_what_is_refused(model: Any) -> None:
    with session(model) as ours:
        with pytest.raises(ValueError, match="no tokenizer"):
            ours.generate("one")
        with pytest.raises(ValueError, match="no tokenizer"):
            ours.chat([{"role": "user", "content": "one"}])
    with pytest.raises(TypeError, match="give a transformers model"):
        Session(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="NUL"):
        session(model, namespace="a\0b")


def test_ids_as_a_list(model: Any) -> None:
    ids = prompt(9)
    with session(model) as ours:
        plain = model.generate(ids, max_new_tokens=5).tolist()
        assert ours.generate(ids[0].tolist(), max_new_tokens=5).tolist() == plain
        assert ours.generate(ids.tolist(), max_new_tokens=5).tolist() == plain


def anew(model: Any) -> dict[str, dict[str, Any]]:
    """Calls that must read their whole prompt, by what is said of them."""
    one = prompt(20)
    return {
        "row": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        "hidden": {"attention_mask": torch.cat([torch.zeros(1, 3), torch.ones(1, 17)], 1).long()},
        "own cache": {"past_key_values": DynamicCache(config=model.config)},
        "position_ids": {"position_ids": torch.arange(20)[None] + 1},
        "cache_implementation": {"cache_implementation": "offloaded"}
        if torch.cuda.is_available()
        else {"generation_config": changed(model, cache_implementation="static")},
        "use_cache|own cache": {"use_cache": False},
        "num_beams|row": {"num_beams": 2},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    } | ({"hidden in the text|hidden": {"input_ids": one.index_fill(1, torch.tensor([4]), 0)}})


def changed(model: Any, **changes: Any) -> Any:
    config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    config.update(**changes)
    return config


def test_what_cannot_be_read_on_is_read_anew(model: Any) -> None:
    with session(model) as ours, tiny.quietly():
        for why, arguments in anew(model).items():
            first = ours.generate(prompt(20), max_new_tokens=4, eos_token_id=None)
            arguments = {"max_new_tokens": 6, "eos_token_id": None, **arguments}
            ids = arguments.pop("input_ids", prompt(20))
            mine = ours.generate(ids, **arguments)
            assert ours.turns[-1].reused_tokens == 0, why
            assert why.split("|")[-1] in ours.turns[-1].why_anew
            if "past_key_values" in arguments:
                arguments["past_key_values"] = DynamicCache(config=model.config)
            assert mine.tolist() == model.generate(ids, **arguments).tolist(), why
            ours.generate(torch.cat([first, prompt(2)], 1), max_new_tokens=4)
            assert ours.turns[-1].reused_tokens > 0, why  # what was kept before is still there


def test_a_batch(model: Any) -> None:
    inputs = tiny.padded(5, 9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with session(model) as ours:
        mine = ours.generate(ids, attention_mask=mask, max_new_tokens=9)
        assert mine.tolist() == model.generate(ids, attention_mask=mask, max_new_tokens=9).tolist()
        assert "one row" in ours.turns[-1].why_anew


def test_padding_that_is_the_end_of_sequence_hides_nothing(model: Any) -> None:
    model.generation_config.pad_token_id = 2
    with session(model) as ours:
        text = ours.generate(torch.tensor([[5, 2, 7, 8]]), max_new_tokens=4, min_new_tokens=4)
        mine = ours.generate(text, max_new_tokens=4)
        assert ours.turns[-1].reused_tokens == 7
        assert mine.tolist() == model.generate(text, max_new_tokens=4).tolist()


HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2}
HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8, "num_experts": 0}


@pytest.mark.parametrize(("kind", "changes"), [("Qwen3Next", HYBRID), ("Mamba", {"state_size": 4})])
def test_recurrent_states_are_not_reused(kind: str, changes: dict[str, Any]) -> None:
    model = tiny.build(kind, **changes)
    plain = Script(model.generate).play()
    with tiny.quietly(), session(model) as ours:
        assert Script(ours.generate).play() == plain
        assert ours.stats.reused_tokens == 0
        assert any("every prompt anew" in reason and "prefix" in reason for reason in ours.stats.reasons)


def test_rotary_embeddings_that_change_with_the_length() -> None:
    """Rows of before the change would not be those of plain ``generate`` after it."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.model(max_position_embeddings=40, rope_parameters=rope)
    plain = Script(model.generate).play()
    with tiny.quietly(), session(model) as ours:
        assert Script(ours.generate).play() == plain
        assert [turn.reused_tokens for turn in ours.turns][:4] == [0, 20, 37, 0]


def test_the_rows_of_one_precision_are_not_read_in_another(model: Any) -> None:
    with session(model) as ours:
        text = ours.generate(prompt(9), max_new_tokens=4, eos_token_id=None)
        model.double()
        again = ours.generate(text, max_new_tokens=4, eos_token_id=None)
        assert again.tolist() == model.generate(text, max_new_tokens=4, eos_token_id=None).tolist()
        assert ours.turns[-1].reused_tokens == 0


def test_changed_weights_need_a_reset(model: Any) -> None:
    with session(model) as ours:
        text = ours.generate(prompt(9), max_new_tokens=4, eos_token_id=None)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.neg_()
        ours.reset()
        again = ours.generate(text, max_new_tokens=12, eos_token_id=None)
        assert again.tolist() == model.generate(text, max_new_tokens=12, eos_token_id=None).tolist()


def test_a_prediction_is_drafted(model: Any, tokenizer: Any) -> None:
    class Nothing:
        name, topk, hidden = "nothing", 0, False

        def draft(self, contexts: Any, budgets: Any) -> Any:
            return [specdec.DraftTree.root(int(context.tokens[-1])) for context in contexts]

    plain = model.generate(prompt(9), max_new_tokens=40, eos_token_id=None)
    with session(model, tokenizer=tokenizer, drafter=Nothing()) as ours:
        for prediction in (plain[0, 9:].tolist(), plain[:, 9:], tokenizer.decode(plain[0, 9:])):
            mine = ours.generate(prompt(9), prediction=prediction, max_new_tokens=40, eos_token_id=None)
            assert mine.tolist() == plain.tolist()
            assert ours.turns[-1].by_drafter["predicted"]["accepted"] > 20
        ours.generate(prompt(9), max_new_tokens=40, eos_token_id=None)
        assert ours.turns[-1].drafted == 0


def test_adapters_switched_between_turns(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config, "a").eval()
    adapted.add_adapter("b", config)
    memory = Memory()

    def switch(turn: int) -> None:
        adapted.set_adapter("ab"[turn % 2])

    plain, ours_written, text = [], [], prompt(9)
    for turn in (0, 1, 1, 0):
        switch(turn)
        text = adapted.generate(input_ids=text, max_new_tokens=12, eos_token_id=None)
        plain.append(text.tolist())
    text = prompt(9)
    with session(adapted, memory=memory, namespace="me") as ours:
        for turn in (0, 1, 1, 0):
            switch(turn)
            text = ours.generate(text, max_new_tokens=12, eos_token_id=None)
            ours_written.append(text.tolist())
        assert ours_written == plain
        assert [turn.reused_tokens for turn in ours.turns] == [0, 0, 32, 0]
        with adapted.disable_adapter():
            bare = ours.generate(text, max_new_tokens=12, eos_token_id=None)
            assert bare.tolist() == adapted.generate(input_ids=text, max_new_tokens=12, eos_token_id=None).tolist()
            assert ours.turns[-1].reused_tokens == 0
    assert sorted(memory.namespaces) == ["me", "me\0a", "me\0b"]
    adapted.set_adapter("b")
    adapted.merge_adapter(["a"])
    assert adapters.active(adapted) == "a"
    memory.forget("me")
    assert memory.namespaces == []


def test_prompt_tuning_is_read_anew(model: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    plain = [tuned.generate(input_ids=prompt(n), max_new_tokens=6).tolist() for n in (9, 12)]
    with tiny.quietly(), session(tuned) as ours:
        assert [ours.generate(prompt(n), max_new_tokens=6).tolist() for n in (9, 12)] == plain
        assert ours.stats.reused_tokens == 0
        assert "prompt tuning" in ours.turns[-1].why_anew


def test_cpu_kernels(model: Any) -> None:
    from specdec import cpu

    with session(model):
        assert not cpu.installed(model)
    with Session(model, policy=POLICY) as ours:
        assert cpu.installed(model)
        written = Script(ours.generate).play()
    assert Script(model.generate).play() == written
    cpu.remove(model)


def test_a_model_is_tried_once_for_all_sessions(model: Any) -> None:
    forms = []
    for attention in ("sdpa", "sdpa", "eager"):
        model.set_attn_implementation(attention)
        with session(model) as ours:
            ours.generate(prompt(9), max_new_tokens=3)
            forms.append(ours._generate.speculate.attach(model)[0])
    assert forms[0] is forms[1]
    assert forms[2] is not forms[1]
    assert forms[2].form.additive


def test_a_drafter_beside_a_memory(model: Any) -> None:
    plain = model.generate(prompt(9), max_new_tokens=30, eos_token_id=None)
    oracle = tiny.Oracle(plain.tolist())
    with session(model, drafter=oracle, memory=Memory()) as ours:
        assert ours.generate(prompt(9), max_new_tokens=30, eos_token_id=None).tolist() == plain.tolist()
        assert ours.stats.by_drafter["oracle"]["accepted"] > 10
        assert ours.memory is not None
        assert ours.memory.namespaces == [""]


def test_counts(model: Any, tmp_path: Path) -> None:
    with session(model, trace=tmp_path / "trace.jsonl") as ours:
        for n in range(3):
            ours.generate(prompt(9 + n), max_new_tokens=6, eos_token_id=None)
        counts, turns = ours.stats.as_dict(), [turn.as_dict() for turn in ours.turns]
    assert (tmp_path / "trace.jsonl").stat().st_size > 0
    for name in ("turns", "steps", "tokens", "drafted", "accepted", "generations", "prompt_tokens", "reused_tokens",
                 "new_tokens"):  # fmt: skip
        assert counts[name] == sum(turn[name] for turn in turns), name
    assert counts["turns"] == counts["generations"] == 3
    assert counts["wall"] == pytest.approx(sum(turn["wall"] for turn in turns))
    assert counts["level"] == "tree"
    assert sum(turn["wall"] for turn in turns) > sum(counts["seconds"].values()) > 0
