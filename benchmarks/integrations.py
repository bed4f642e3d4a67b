"""What speculation gains behind other libraries, on one model, against the same calls without it.

    python benchmarks/integrations.py [--model PATH] [--tasks A,B] [--repeats N] [--json OUT]

A task is a few calls of one library. "plain" is the model as it is, "own layers" has speculation alone, "specdec" our
CPU kernels too, and in "with grammar" a ``GrammarDrafter`` stands beside the usual ones. All methods do a task one
after the other, in another order each time, and have learnt nothing when they begin; the median over repeats counts.
Where a result is not plain's, no speed is given. What a model costs once, self-test and timing, is not counted. Tasks
whose library is not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import specdec
from specdec import demo
from specdec.bench.machine import machine
from specdec.drafters import GrammarDrafter, MergedDrafter
from specdec.speculate import auto_drafter

SETTINGS: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}
SYSTEM = "You are a careful clerk. Answer every message with the whole list of orders, one per line."
TURNS = (
    "Anna wants a lamp, Boris a chair, Clara a desk.",
    "David wants a shelf. Repeat the whole list.",
    "Emma wants a mirror. Repeat the whole list.",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "occupation": {"enum": ["teacher", "doctor", "engineer"]},
        "is_active": {"type": "boolean"},
    },
    "required": ["first_name", "age", "occupation", "is_active"],
    "additionalProperties": False,
}
PEOPLE = ("Anna, 31, teaches.", "Boris, 54, is a doctor on leave.", "Clara, 27, builds bridges.")

Run = Callable[[], Any]
Task = Callable[[Any, Any, str], Run]  # of a model, its tokenizer and its directory


def transformers_pipeline(model: Any, tokenizer: Any, path: str) -> Run:
    """A conversation by ``pipeline("text-generation")``."""
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)

    def converse() -> list[dict[str, str]]:
        messages = [{"role": "system", "content": SYSTEM}]
        for turn in TURNS:
            messages = writer([*messages, {"role": "user", "content": turn}], **SETTINGS)[0]["generated_text"]
        return messages

    return converse


def langchain(model: Any, tokenizer: Any, path: str) -> Run:
    """The same conversation by ``ChatHuggingFace``."""
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=writer), tokenizer=tokenizer)
    chat = chat.bind(pipeline_kwargs={**SETTINGS, "return_full_text": False})

    def converse() -> list[str]:
        messages: list[Any] = [SystemMessage(SYSTEM)]
        for turn in TURNS:
            messages.append(HumanMessage(turn))
            messages.append(AIMessage(chat.invoke(messages).content))
        return [message.content for message in messages]

    return converse


def smolagents(model: Any, tokenizer: Any, path: str) -> Run:
    """Three steps of a ``ToolCallingAgent``."""
    from smolagents import ToolCallingAgent, TransformersModel, tool

    @tool
    def stock(item: str) -> str:
        """How many of an item there are.

        Args:
            item: its name.
        """
        return str(len(item))

    engine = TransformersModel(path, device_map="cpu", **SETTINGS)
    engine.model = model

    def work() -> list[str]:
        agent = ToolCallingAgent([stock], engine, max_steps=3, verbosity_level=-1)
        agent.prompt_templates["system_prompt"] = (
            'Answer with one tool call: {"name": "stock", "arguments": {"item": "tables"}}, or, when you know, '
            '{"name": "final_answer", "arguments": {"answer": "31 tables"}}.'
        )
        agent.run("How many lamps are there?")
        return [step.model_output for step in agent.memory.steps if getattr(step, "model_output", None)]

    return work


def peft_adapters(model: Any, tokenizer: Any, path: str) -> Run:
    """Turns that two LoRA adapters answer by turns; they change nothing that is written, only who writes."""
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config, adapter_name="first").eval()
    adapted.add_adapter("second", config)

    def switch() -> list[str]:
        said = []
        for turn, text in enumerate(TURNS):
            adapted.set_adapter(("first", "second")[turn % 2])
            inputs = tokenizer(f"Orders: {' '.join(TURNS[:turn])} {text} The list:", return_tensors="pt")
            said.append(tokenizer.decode(adapted.generate(**inputs, **SETTINGS)[0]))
        return said

    return switch


def lm_eval(model: Any, tokenizer: Any, path: str) -> Run:
    """``generate_until`` of the evaluation harness, a few examples in each prompt."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    judge = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
    shots = "Q: 3 lamps and 4 chairs?\nA: There are 3 lamps and 4 chairs, so there are 3 + 4 = 7 things.\n\n"
    questions = [f"{shots}Q: {n} desks and {n + 2} shelves?\nA:" for n in (2, 5, 8)]
    rules = {"until": ["\n\n"], "max_gen_toks": 48}

    def judge_all() -> list[str]:
        return judge.generate_until([Instance("generate_until", {}, (q, rules), i) for i, q in enumerate(questions)])

    return judge_all


def outlines(model: Any, tokenizer: Any, path: str) -> Run:
    """Facts as JSON, by the automaton of outlines."""
    import outlines

    generator = outlines.Generator(outlines.from_transformers(model, tokenizer), _shape(), backend="outlines_core")
    return lambda: [generator(f"{person} As JSON:", **SETTINGS) for person in PEOPLE]


def xgrammar(model: Any, tokenizer: Any, path: str) -> Run:
    """The same by the processor of xgrammar."""
    from xgrammar.contrib.hf import LogitsProcessor

    grammar = _xgrammar(model, tokenizer)

    def write(person: str) -> list[int]:
        inputs = tokenizer(f"{person} As JSON:", return_tensors="pt")
        return model.generate(**inputs, **SETTINGS, logits_processor=[LogitsProcessor(grammar)])[0].tolist()

    return lambda: [write(person) for person in PEOPLE]


def _shape() -> Any:
    import outlines

    return outlines.types.JsonSchema(json.dumps(SCHEMA))


def _xgrammar(model: Any, tokenizer: Any) -> Any:
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    return xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)


def _outlines(model: Any, tokenizer: Any) -> Any:
    import outlines

    generator = outlines.Generator(outlines.from_transformers(model, tokenizer), _shape(), backend="outlines_core")
    return generator.logits_processor


TASKS: tuple[Task, ...] = (transformers_pipeline, langchain, smolagents, lm_eval, outlines, xgrammar, peft_adapters)
GRAMMARS: dict[Task, Callable[[Any, Any], Any]] = {outlines: _outlines, xgrammar: _xgrammar}


def measure(task: Task, models: dict[str, Any], tokenizer: Any, path: str, repeats: int) -> list[dict[str, Any]]:
    """A record for each method."""
    drafters: dict[str, Any] = {method: auto_drafter() for method in models if method != "plain"}
    if task in GRAMMARS:
        grammar = GrammarDrafter(GRAMMARS[task](models["plain"], tokenizer), tokenizer)
        drafters["with grammar"] = MergedDrafter([grammar, auto_drafter()])
    methods = list(models)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    said: dict[str, list[Any]] = {method: [] for method in methods}
    with ExitStack() as stack:
        for method in methods[1:]:
            kernels = method != "own layers"
            parts = specdec.speculating(models[method], drafters[method], cpu_kernels=kernels, on_unsupported="error")
            stack.enter_context(parts)
        runs = {method: task(models[method], tokenizer, path) for method in methods}
        for run in runs.values():  # nothing of the first time counts
            run()
        counts = {method: specdec.stats(models[method]) for method in methods[1:]}
        for each in counts.values():
            each.reset()
        for number in range(repeats):
            for method in methods[number % len(methods) :] + methods[: number % len(methods)]:
                if method != "plain":
                    drafters[method].reset()
                start = time.perf_counter()
                said[method].append(runs[method]())
                seconds[method].append(time.perf_counter() - start)
    plain = said["plain"][0]
    return [
        {
            "task": task.__name__,
            "method": method,
            "equal": all(each == plain for each in said[method]),
            "seconds": statistics.median(seconds[method]),
            "speedup": _speedup(seconds, method) if all(each == plain for each in said[method]) else None,
            "tokens_per_step": counts[method].tokens_per_step if method in counts else 1.0,
        }
        for method in methods
    ]


def _speedup(seconds: dict[str, list[float]], method: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds["plain"], seconds[method], strict=True))


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a directory or hub id")
    parser.add_argument("--tasks", default=",".join(task.__name__ for task in TASKS), help="names, by commas")
    parser.add_argument("--repeats", type=int, default=3, help="of each task")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    wanted = given.tasks.split(",")
    if unknown := set(wanted) - {task.__name__ for task in TASKS}:
        parser.error(f"there is no task {', '.join(sorted(unknown))}")
    path = str(demo.resolve(given.model))
    tokenizer, results, missing = AutoTokenizer.from_pretrained(path), list[dict[str, Any]](), dict[str, str]()
    for task in TASKS:
        if task.__name__ not in wanted:
            continue
        names = ["plain", "own layers", "specdec", *["with grammar"] * (task in GRAMMARS)]
        models = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for name in names}
        try:
            records = measure(task, models, tokenizer, path, given.repeats)
        except ModuleNotFoundError as error:
            missing[task.__name__] = f"{error.name} is not installed"
            print(f"{task.__name__:22} left out: {missing[task.__name__]}")
            continue
        for record in records:
            speed = f"{record['speedup']:.2f}x" if record["speedup"] else "not equal"
            steps = f"{record['tokens_per_step']:5.2f} tokens/step"
            print(
                f"{record['task']:22} {record['method']:12} {record['seconds']:7.2f} s {speed:>9} {steps}", flush=True
            )
        results += records
        if given.json:  # after each: what is measured stays
            facts = {"machine": machine(models["plain"], given.model), "repeats": given.repeats, **SETTINGS}
            given.json.parent.mkdir(parents=True, exist_ok=True)
            report = {**facts, "unavailable": missing, "integrations": results}
            given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
