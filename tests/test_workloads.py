"""What the benchmark asks: our own prompts are sound, and every form of question is read or refused with its place."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from jinja2 import TemplateError

from specdec.bench import workloads
from specdec.bench.workloads import KINDS, Prompt, encode, first_of_each, own, read, unroll


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def written(tmp_path):
    """A function that writes a file: objects as lines of JSON, or a text as it stands."""

    def write(*lines, name="asked.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return path

    return write


def test_twelve_kinds_of_work_of_eight_prompts_or_more():
    kinds = [prompt.workload for prompt in own()]
    assert len(KINDS) == 12
    assert list(dict.fromkeys(kinds)) == list(KINDS)
    assert min(kinds.count(kind) for kind in KINDS) >= 8
    folder = Path(workloads.__file__).with_name("workloads")
    assert {path.name for path in folder.iterdir()} == {f"{kind}.toml" for kind in KINDS}


def test_no_prompt_or_turn_is_asked_twice():
    prompts = own()
    asked = [json.dumps([prompt.messages, prompt.turns]) for prompt in prompts]
    assert len(set(asked)) == len(asked)
    assert len({(prompt.workload, prompt.id) for prompt in prompts}) == len(prompts)
    turns = [turn for prompt in prompts for turn in prompt.turns]
    assert len(set(turns)) == len(turns)


def test_our_texts_are_whole():
    for prompt in own():
        texts = [message["content"] for message in prompt.messages] + list(prompt.turns)
        assert all(text == text.strip() and len(text) >= 20 for text in texts), prompt.id
        assert all(text.count("```") % 2 == 0 for text in texts) or prompt.workload == "extraction", prompt.id
        assert prompt.messages[-1]["role"] == "user"


def test_named_kinds_come_alone_and_in_the_order_asked_for():
    assert list(dict.fromkeys(prompt.workload for prompt in own(["sql", "chat"]))) == ["sql", "chat"]
    with pytest.raises(ValueError, match=r"no workload named poetry; there are chat, code, "):
        own(["chat", "poetry"])


def test_an_edit_comes_with_the_file_as_prediction():
    for prompt in own(["code_edit"]):
        assert prompt.prediction.count("\n") >= 15
        assert prompt.messages[0]["content"].endswith(f"\n{prompt.prediction}```")


def test_an_agents_steps_send_the_earlier_ones_again():
    prompts = own(["agent"])
    sessions = {}
    for prompt in prompts:
        sessions.setdefault(prompt.id.rpartition("/")[0], []).append(prompt)
    assert len(sessions) >= 8
    for steps in sessions.values():
        assert len(steps) >= 3
        assert steps[0].messages[0]["role"] == "system"
        for earlier, later in pairwise(steps):
            assert later.messages[: len(earlier.messages) + 1] == (*earlier.messages, assistant(earlier.reference))


def test_an_agents_calls_are_json_and_of_tools_that_it_has():
    calls = 0
    for prompt in own(["agent"]):
        text, _, call = prompt.reference.partition("<tool_call>")
        assert text.strip()
        if call:
            name = json.loads(call.removesuffix("</tool_call>"))["name"]
            assert f'"name": "{name}"' in prompt.messages[0]["content"]
            calls += 1
    assert calls >= 20


def test_refinement_is_draft_critique_and_improvement():
    assert all(len(prompt.turns) == 2 for prompt in own(["refine"]))


def test_sql_is_asked_over_one_schema():
    asked = [prompt.messages[0]["content"] for prompt in own(["sql"])]
    schema = asked[0].partition("\n\n")[0]
    assert schema.count("CREATE TABLE") == 4
    assert sum(question.startswith(schema) for question in asked) >= 8


def test_the_page_on_workloads_names_every_kind_and_its_example_is_read(written):
    page = (Path(__file__).parent.parent / "docs" / "workloads.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)[:12] == list(KINDS)
    (example,) = re.findall(r"```toml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    first, second, third = read(written(example, name="boats.toml"))
    assert first.messages[0]["content"].startswith("CREATE TABLE")
    assert second.prediction == "x = 3\nprint(x)\n"
    assert (third.id, third.messages[0]["role"]) == ("mooring/0", "system")


@pytest.mark.real
def test_our_prompts_are_short_but_for_the_long_documents():
    from transformers import AutoTokenizer

    from specdec.demo import demo_path

    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    lengths = {kind: [len(encode(tokenizer, prompt)) for prompt in own([kind])] for kind in KINDS}
    long = lengths.pop("long_document")
    assert min(long) >= 1500
    assert max(long) <= 3500
    short = [length for of_kind in lengths.values() for length in of_kind]
    assert max(short) <= 1000
    assert sum(length <= 400 for length in short) >= 0.8 * len(short)


def test_questions_of_spec_bench_and_mt_bench(written):
    path = written(
        {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": ["first", "second"]},
        {"question_id": 82, "category": "math", "turns": ["three"]},
    )
    assert read(path) == [
        Prompt("writing", (user("one"),), ("two",), id="81", reference="first"),
        Prompt("math", (user("three"),), id="82"),
    ]


def test_questions_of_our_own_form(written):
    path = written(
        {"id": "e/1", "workload": "edit", "messages": [user("a")], "prediction": "p", "reference": "r"},
        "",
        {"prompt": "go on"},
        {"turns": ["one", "two"], "workload": "talk"},
    )
    assert read(path) == [
        Prompt("edit", (user("a"),), id="e/1", prediction="p", reference="r"),
        Prompt("asked", (user("go on"),), id="asked/1"),
        Prompt("talk", (user("one"),), ("two",), id="asked/2"),
    ]


def test_chats_end_before_the_answer(written):
    chat = [{"role": "system", "content": "be brief"}, user("hi"), assistant("hello"), user("who?"), assistant("me")]
    path = written({"messages": chat}, {"messages": chat, "reference": "the known one"})
    assert read(path) == [
        Prompt("asked", tuple(chat[:4]), id="asked/0", reference="me"),
        Prompt("asked", tuple(chat[:4]), id="asked/1", reference="the known one"),
    ]


def test_lines_of_a_batch_of_openais(written):
    body = {"model": "m", "messages": [user([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])]}
    (prompt,) = read(written({"custom_id": "req-7", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    assert prompt == Prompt("asked", (user("one two"),), id="req-7")


def test_calls_of_tools_are_written_into_the_text(written):
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"word": "oak"}'}}
    made = {"role": "assistant", "content": None, "tool_calls": [call]}
    (prompt,) = read(written({"messages": [user("look"), made, {"role": "tool", "content": "none"}]}))
    assert prompt.messages[1:] == (
        assistant('<tool_call>{"name": "find", "arguments": {"word": "oak"}}</tool_call>'),
        {"role": "tool", "content": "none"},
    )


def test_each_answer_of_a_session_is_a_prompt(written):
    said = [
        user("a"),
        assistant("A"),
        user("b"),
        assistant(""),
        user("c"),
        assistant("C"),
        assistant("more"),
        user("d"),
    ]
    path = written({"session": "s", "messages": said}, {"session": "t", "messages": [user("x"), assistant("X")]})
    everything = [
        Prompt("asked", tuple(said[:1]), id="s/0", reference="A"),
        Prompt("asked", tuple(said[:5]), id="s/1", reference="C"),
        Prompt("asked", (user("x"),), id="t/0", reference="X"),
    ]
    assert read(path) == everything
    assert read(path, per_session=1) == [everything[0], everything[2]]


def test_plain_text_is_parted_by_empty_lines(written):
    path = written("\ufeffWrite a poem\nabout soup.\n\n  \n\nAnd one about bread.\n", name="asked.txt")
    assert [prompt.messages for prompt in read(path)] == [
        (user("Write a poem\nabout soup."),),
        (user("And one about bread."),),
    ]
    assert read(path)[1].id == "asked/1"


def test_lines_of_json_are_known_in_a_file_of_any_name(written):
    path = written('{"prompt": "one\u2028still one"}', name="asked.data")
    assert read(path)[0].messages == (user("one\u2028still one"),)


def test_toml_as_our_own_prompts_are_written(written):
    path = written(
        '[texts]\nlaw = "No noise."\ntool = "You have a bell."',
        '[[prompts]]\ntext = "law"\nprompt = "May I sing?"',
        '[[prompts]]\nprompt = "Mend it."\nlanguage = "python"\nfile = "x = 1\\n"',
        '[[prompts]]\nsystem = "tool"\nmessages = [{role = "user", content = "Ring."}]',
        name="rules.toml",
    )
    assert read(path) == [
        Prompt("rules", (user("No noise.\n\nMay I sing?"),), id="rules/0"),
        Prompt("rules", (user("Mend it.\n\n```python\nx = 1\n```"),), id="rules/1", prediction="x = 1\n"),
        Prompt("rules", ({"role": "system", "content": "You have a bell."}, user("Ring.")), id="rules/2"),
    ]


def test_a_folder_is_all_its_lines_of_json(written, tmp_path):
    (tmp_path / "more").mkdir()
    written({"prompt": "three"}, name="more/c.jsonl")
    written({"prompt": "two"}, name="b.jsonl")
    written({"session": "s", "messages": [user("one"), assistant("A"), user("and"), assistant("B")]}, name="a.jsonl")
    written("not a question", name="README.md")
    prompts = read(tmp_path, per_session=1)
    assert [(prompt.workload, prompt.messages[0]["content"]) for prompt in prompts] == [
        ("a", "one"),
        ("b", "two"),
        ("c", "three"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ('"text"', "it is a str"),
        ("[]", "it is a list"),
        ({"question": "?"}, "it has no 'prompt'"),
        ({"prompt": 3}, "a text was due where a int stands"),
        ({"prompt": " "}, "a turn is empty"),
        ({"turns": "one"}, "a list of texts was due where a str stands"),
        ({"messages": []}, "the messages do not end in a question"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, "the messages do not end in a question"),
        ({"messages": [assistant("A")]}, "the messages do not end in a question"),
        ({"messages": [{"role": "user"}]}, "it has no 'content'"),
        ({"messages": [user(None)]}, "a text was due where a NoneType stands"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}])]}, "it has no 'text'"),
        ({"session": "s", "messages": [user("a")]}, "no message of the session is answered"),
        ({"body": {"input": "a"}}, "it has no 'prompt'"),
        ({"prompt": "a", "prediction": 1}, "a text was due where a int stands"),
    ],
)
def test_a_line_that_asks_nothing_is_named(written, line, reason):
    path = written({"prompt": "fine"}, "", line)
    with pytest.raises(ValueError, match="line 3: not a JSON object with turns, messages or prompt") as raised:
        read(path)
    assert str(path) in str(raised.value)
    assert reason in str(raised.value)


def test_files_that_ask_nothing_are_named(written, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"empty\.txt holds no questions"):
        read(written(" \n\n", name="empty.txt"))
    with pytest.raises(ValueError, match=r"bare holds no questions"):
        read(tmp_path / "bare")
    with pytest.raises(OSError, match=r"nowhere\.jsonl"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"bad\.toml: .*line 2"):
        read(written("[texts]", "prompts = oak", name="bad.toml"))
    with pytest.raises(ValueError, match=r"lost\.toml, prompt 1: .* it has no 'law'"):
        read(written('[[prompts]]\ntext = "law"\nprompt = "?"', name="lost.toml"))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "größe"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl: not a text in UTF-8"):
        read(latin)


def test_later_turns_follow_the_models_own_answers():
    prompt = Prompt("talk", (user("one"),), ("two", "three"), id="t", prediction="p", reference="r")
    flat = unroll([prompt], lambda prompt: f"answer {len(prompt.messages)}")
    assert flat == [
        Prompt("talk", (user("one"),), id="t", prediction="p", reference="r"),
        Prompt("talk", (user("one"), assistant("answer 1"), user("two")), id="t/1"),
        Prompt(
            "talk",
            (user("one"), assistant("answer 1"), user("two"), assistant("answer 3"), user("three")),
            id="t/2",
        ),
    ]


def test_first_of_each_keeps_the_order():
    a, b, c = Prompt("x", (user("a"),)), Prompt("y", (user("b"),)), Prompt("x", (user("c"),))
    assert first_of_each([a, b, c], 1) == [a, b]
    assert first_of_each([a, b, c], 2) == [a, c, b]


class Letters:
    """A tokenizer with a token for every letter."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": list(text)}


class Chat(Letters):
    """One with a template that refuses some roles, and then also two messages of one role on end, as many do."""

    chat_template = "a template"

    def __init__(self, *refused):
        self.refused = set(refused)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert not return_dict
        roles = [message["role"] for message in messages]
        if self.refused and (self.refused & set(roles) or any(a == b for a, b in pairwise(roles))):
            raise TemplateError("roles must alternate")
        return list("".join(f"<{message['role']}>{message['content']}" for message in messages))


SAID = ({"role": "system", "content": "s"}, user("a"), assistant("A"), {"role": "tool", "content": "t"}, user("b"))


def test_encoding_by_the_template():
    assert "".join(encode(Chat(), Prompt("x", SAID))) == "<system>s<user>a<assistant>A<tool>t<user>b"


def test_roles_that_a_template_refuses_become_the_users():
    encoded = encode(Chat("system", "tool"), Prompt("x", SAID))
    assert "".join(encoded) == "<user>s\n\na<assistant>A<user>t\n\nb"
    assert SAID[0] == {"role": "system", "content": "s"}


def test_encoding_without_a_template():
    assert "".join(encode(Letters(), Prompt("x", SAID[:3]))) == "s\na\nA\n"
