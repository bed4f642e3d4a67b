"""Libraries that call ``generate`` for their users: the same results with speculation in it as without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import pipeline

import specdec
from specdec import Memory
from specdec.drafters import NgramDrafter
from specdec.policies import FixedPolicy
from tests import tiny

POLICY = FixedPolicy(12, 5, 6)
TEXTS = ["say it again, say it again", "one two one two one", "abc"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny.model(max_position_embeddings=4096)
    with torch.no_grad():
        made.lm_head.weight[made.config.eos_token_id] = 0  # or most of its texts would end at once
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    made.padding_side = "left"
    return made


@pytest.fixture(scope="module")
def folder(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a directory, for libraries that load it themselves."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


_unhurried = pytest.fixture(autouse=True, scope="module")(tiny.unhurried)


def same(model: Any, run: Callable[[], Any]) -> bool:
    """Whether a ``run`` gives the same twice with speculation as once without, and all of that was speculative.

    The second time all that was written is known, so guesses are accepted. Each run starts with the same seed.
    """
    torch.manual_seed(0)
    plain, ours = run(), []
    with specdec.speculating(model, Memory(), POLICY, on_unsupported="error"):
        for _ in range(2):
            torch.manual_seed(0)
            ours.append(run())
        counts = specdec.stats(model)
    assert counts.fault_count == 0, counts.faults
    assert counts.plain_generations == 0 < counts.generations
    assert counts.accepted > 0
    return bool(ours == [plain, plain])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_pipeline(model: Any, tokenizer: Any, sampled: bool, batch: int) -> None:
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert same(model, lambda: writer(TEXTS, batch_size=batch, max_new_tokens=24, do_sample=sampled))


def test_pipeline_of_conversations(model: Any, tokenizer: Any) -> None:
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert same(model, lambda: writer([{"role": "user", "content": TEXTS[0]}], max_new_tokens=24, do_sample=False))


def test_pipeline_with_adapters_switched_between_turns(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny.model(), config, adapter_name="a").eval()
    adapted.add_adapter("b", config)
    writer = pipeline("text-generation", model=adapted, tokenizer=tokenizer)

    def turns() -> list[str]:
        said = []
        for name in ("a", "b", "a"):
            adapted.set_adapter(name)
            said.append(writer(TEXTS[0], max_new_tokens=24, do_sample=False)[0]["generated_text"])
        return said

    assert same(adapted, turns)
    first, second, third = turns()
    assert first == third != second


class TestLangChain:
    @pytest.fixture
    def written(self, model: Any, tokenizer: Any) -> Any:
        """LangChain's model, around a pipeline around ours."""
        library = pytest.importorskip("langchain_huggingface", reason="langchain-huggingface is not installed")
        writer = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=24)
        return library.HuggingFacePipeline(pipeline=writer, batch_size=2)

    def test_texts(self, written: Any, model: Any) -> None:
        assert same(model, lambda: written.batch(TEXTS))

    def test_sampled(self, written: Any, model: Any) -> None:
        chain = written.bind(pipeline_kwargs={"do_sample": True, "temperature": 0.7})
        assert same(model, lambda: chain.invoke(TEXTS[0]))

    def test_streams(self, written: Any, model: Any) -> None:
        assert same(model, lambda: list(written.stream(TEXTS[0])))

    def test_chat(self, written: Any, model: Any, tokenizer: Any) -> None:
        from langchain_core.messages import HumanMessage, SystemMessage
        from langchain_huggingface import ChatHuggingFace

        chat = ChatHuggingFace(llm=written, tokenizer=tokenizer)
        messages = [SystemMessage("be brief"), HumanMessage(TEXTS[0])]
        assert same(model, lambda: chat.invoke(messages).content)


class TestSmolagents:
    @pytest.fixture
    def engine(self, folder: Path) -> Any:
        """What smolagents makes of a local model."""
        library = pytest.importorskip("smolagents", reason="smolagents is not installed")
        return library.TransformersModel(str(folder), device_map="cpu", max_new_tokens=32)

    @staticmethod
    def messages() -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}]}]

    def test_answers(self, engine: Any) -> None:
        assert same(engine.model, lambda: engine.generate(self.messages()).content)

    def test_answers_that_a_stop_text_ends(self, engine: Any) -> None:
        whole = engine.generate(self.messages()).content
        stop = whole[10:12]

        def answer() -> tuple[str, int]:
            said = engine.generate(self.messages(), stop_sequences=[stop])
            return said.content, said.token_usage.output_tokens

        assert answer()[1] < 32
        assert same(engine.model, answer)

    def test_streams(self, engine: Any) -> None:
        assert same(engine.model, lambda: [each.content for each in engine.generate_stream(self.messages())])

    @pytest.mark.parametrize("kind", ["ToolCallingAgent", "CodeAgent"])
    def test_an_agent(self, engine: Any, kind: str) -> None:
        """What a random model says calls no tool: every step is an error that the next prompt holds."""
        import smolagents

        @smolagents.tool
        def length(text: str) -> int:
            """How long a text is.

            Args:
                text: any text.
            """
            return len(text)

        def steps() -> list[str]:
            agent = getattr(smolagents, kind)([length], engine, max_steps=2, verbosity_level=-1)
            agent.prompt_templates["system_prompt"] = "Tools: length(text). Call them."
            agent.run("How long is this?")
            return [step.model_output for step in agent.memory.steps if getattr(step, "model_output", None)]

        assert len(steps()) == 2
        assert same(engine.model, steps)


class TestLmEval:
    @pytest.fixture
    def judge(self, model: Any, tokenizer: Any) -> Any:
        """The harness's own kind of model around ours."""
        library = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
        return library.HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, max_length=256)

    @staticmethod
    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]

    def test_generate_until(self, judge: Any, model: Any) -> None:
        rules = {"until": ["q", "the end"], "max_gen_toks": 24}
        assert same(
            model, lambda: judge.generate_until(self.requests("generate_until", [(text, rules) for text in TEXTS]))
        )

    def test_loglikelihood(self, judge: Any, model: Any) -> None:
        """Which does not generate, so nothing may change at all."""

        def measured() -> Any:
            return judge.loglikelihood(self.requests("loglikelihood", [(text, " and so on") for text in TEXTS]))

        plain = measured()
        with specdec.speculating(model, NgramDrafter(), POLICY, cpu_kernels=False):
            assert measured() == plain
            assert specdec.stats(model).generations == 0


class TestOutlines:
    @pytest.fixture
    def writer(self, model: Any, tokenizer: Any) -> Any:
        """Outlines' model around ours."""
        library = pytest.importorskip("outlines", reason="outlines is not installed")
        return library.from_transformers(model, tokenizer)

    @pytest.mark.parametrize("backend", ["outlines_core", "xgrammar"])
    @pytest.mark.parametrize("sampled", [False, True])
    def test_a_schema(self, writer: Any, model: Any, backend: str, sampled: bool) -> None:
        import outlines

        pytest.importorskip(backend, reason=f"{backend} is not installed")
        schema = {"type": "object", "properties": {"known": {"type": "boolean"}}, "required": ["known"]}
        shape = outlines.types.JsonSchema(json.dumps({**schema, "additionalProperties": False}))
        generator = outlines.Generator(writer, shape, backend=backend)

        def answer() -> str:
            return generator(TEXTS[0], max_new_tokens=80, do_sample=sampled)

        assert same(model, answer)
        if backend == "outlines_core":  # xgrammar's allows as much white space as there is room for
            assert isinstance(json.loads(answer())["known"], bool)
