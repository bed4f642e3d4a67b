"""The report page as a file: what it says, what it may not do, and that text of others stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from specdec.page import headline, plots, write_page
from specdec.page.compact import SCALE, sequences
from tests import page_samples as samples
from tests.page_samples import HOSTILE

STYLE = Path(headline.__file__).with_name("style.css").read_text()


class Page(HTMLParser):
    """Elements with their attributes, the text outside scripts, and what scripts hold."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.texts, self.scripts, self._in = html, [], [], [], ""
        self.feed(html)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self._in = name if name in ("script", "style") else ""

    def handle_endtag(self, name):
        self._in = ""

    def handle_data(self, text):
        if self._in == "script":
            self.scripts.append(text)
        elif not self._in:
            self.texts.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def trace(folder):
    return samples.trace(folder / "trace.jsonl", rows=2)


def written(folder, report=None, trace=None):
    write_page(folder / "page.html", report, trace)
    return Page((folder / "page.html").read_text())


@pytest.fixture(scope="module")
def page(folder, trace):
    return written(folder, samples.report(), trace)


def steps_of(sequence):
    return json.loads(zlib.decompress(base64.b64decode(sequence["data"])))


def test_text_of_others_stays_text(page):
    names = [name for name, _ in page.elements]
    assert names.count("script") == 2
    assert "img" not in names
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert f"Why are there tides? {HOSTILE}" in page.text
    held = json.loads(page.scripts[0])
    assert held[0]["label"].startswith("chat/0 auto </script>")
    assert any(HOSTILE in text for text in steps_of(held[0])["texts"])


def test_nothing_is_asked_of_a_network_and_only_our_script_may_run(page):
    links = [a[key] for _, a in page.elements for key in ("src", "href", "xlink:href", "action") if key in a]
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert re.findall(r"url\((?!#)|@import", page.html) == []
    policy = next(a["content"] for name, a in page.elements if name == "meta" and "http-equiv" in a)
    ours = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{ours}';" in policy


def test_ids_are_unique_and_point_somewhere(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    named = [
        i for _, a in page.elements for key in ("aria-labelledby", "aria-describedby") for i in a.get(key, "").split()
    ]
    targets = re.findall(r'(?:url\(|href=")#([^")]+)', page.html)
    assert set(targets) | set(named) <= set(ids)


def test_plots_take_their_colours_from_the_style_sheet_and_speak(page):
    drawn = page.html.split("</style>")[1]
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []
    assert {f"--{name}" for name in re.findall(r"var\(--([a-z0-9-]+)\)", drawn)} <= set(
        re.findall(r"--[a-z0-9-]+", STYLE)
    )
    spoken = [a["aria-label"] for name, a in page.elements if name == "svg" and a.get("role") == "img"]
    assert any("chat: plain+kernels 2.16×, 1.73 to 2.81" in words for words in spoken)
    assert any("drops-one failed: tokens differ" in words for words in spoken)
    assert "prompt-lookup+kernels</text>" in drawn  # text is text


def test_every_figure_is_in_the_table(page):
    rows = re.findall(
        r'<tr data-workload="(\w+)" data-baseline="([^"]+)">.*?<th scope="row">([^<]+)<', page.html, re.DOTALL
    )
    report = samples.report()
    assert rows == [(r["workload"], r["baseline"], r["method"]) for r in report["results"] + report["against"]]
    assert "✕ failed" in page.text
    assert "not installed" in page.text
    assert "auto+kernels suffix 1900 172 9%" in page.text
    assert "a step takes 2.5 ms of its own (recycling, 64 nodes)" in page.text


def test_headline_takes_the_surest_figure_and_tells_it_apart():
    report = samples.report()
    assert headline.headline(report) == (
        "auto+kernels decodes 4.32× as fast as plain generate, with the same tokens, over 8 prompts of 2 kinds of work "
        "(95% interval 3.46 to 5.62)."
    )
    assert "kernels without guesses 2.88×" in headline.made_of(report)
    lucky = samples.record("suffix", "all", 9.0) | {"speedup_low": 0.5}  # the highest figure, but not a sure one
    assert headline.best(report | {"results": [*report["results"], lucky]})["method"] == "auto+kernels"


def test_losses_are_told():
    report = samples.report()
    slow = samples.record("suffix", "sql", 0.5)
    fast = samples.record("prompt-lookup", "chat", 9.0)
    said = headline.losses(report | {"results": [*report["results"], slow, fast]})
    assert said == [
        "suffix is slower than plain generate: sql 0.60×.",
        "On chat, prompt-lookup is faster than auto+kernels: 9.45× to 3.24×.",
        "drops-one failed: its tokens differ from plain generate's.",
    ]


def test_a_refused_run_shows_no_speed(folder):
    report = samples.report()
    empty = dict.fromkeys(("tokens_per_second", "speedup", "speedup_low", "speedup_high", "speedup_with_prefill"))
    report["results"] = [record | empty for record in report["results"]]
    report["parts"] = [part | {"seconds": dict.fromkeys(part["seconds"])} for part in report["parts"]]
    report["disturbance"] = samples.disturbance(disturbed=True, refused=True)
    page = written(folder, report)
    assert "Speeds refused. Timings spread by 40%." in page.text
    assert "has no speeds" in page.text
    assert not re.search(r"\d×", page.text)


def test_a_disturbed_run_is_marked_at_every_speed(folder):
    report = samples.report()
    report["disturbance"] = samples.disturbance(disturbed=True)
    page = written(folder, report)
    assert "† Disturbed. Timings spread by 40%." in page.text
    assert "4.32×†" in page.text
    assert not re.search(r"\d×(?!†)", "".join(re.findall(r">([^<]*×[^<]*)</text>", page.html)))


def test_a_trace_alone_needs_no_plots(folder, trace, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = written(folder, trace=trace)
    assert [a["id"] for name, a in page.elements if name == "section"] == ["trace"]
    with pytest.raises(ImportError, match=r"specdec-runtime\[report\]"):
        write_page(folder / "page.html", samples.report())


def test_a_report_alone_has_no_viewer(folder):
    page = written(folder, samples.report())
    assert "viewer" not in [a.get("id") for _, a in page.elements]
    assert len(page.scripts) == 1


def test_one_prompt_has_a_figure_but_no_interval(folder):
    report = samples.report()
    alone = {"prompts": 1, "speedup_low": None, "speedup_high": None}
    report["results"] = [record | alone for record in report["results"]]
    report["parts"] = [part | {"drafted": 0, "conditional_acceptance": []} for part in report["parts"]]
    page = written(folder, report)
    assert "(95% interval unknown from one prompt)" in page.text
    assert "4.32×" in page.text
    assert "Acceptance by depth</h3>" not in page.html


def test_reports_may_lack_what_was_not_measured(folder):
    report = samples.report() | {
        "parts": [],
        "pass_cost": [],
        "against": [],
        "differences": [],
        "questions": [],
        "outputs": [],
    }
    assert "Where the time goes" in written(folder, report).text


@pytest.mark.parametrize(("report", "said"), [(None, "neither"), ({"results": []}, "version 2, not 1")])
def test_wrong_arguments_are_refused(folder, report, said):
    with pytest.raises(ValueError, match=said):
        write_page(folder / "none.html", report)
    assert not (folder / "none.html").exists()


def test_the_viewer_gets_the_trace_whole(trace):
    packed = sequences(trace)
    assert [(s["row"], s["rows"]) for s in packed] == [(0, 2), (1, 2)]
    for sequence in packed:
        held, steps = steps_of(sequence), trace.generations[0].of_row(sequence["row"])
        assert len(held["steps"]) == len(steps)
        for row, step in zip(held["steps"], steps, strict=True):
            assert [held["texts"][i] for i in row[0]] == [trace.text(token) for token in step.tokens]
            assert (row[1], row[4]) == (step.parents, step.path)
            assert [held["sources"][i] for i in row[6]] == step.guessed_by
            assert row[2] == [round(p * SCALE) for p in step.probability]
            assert row[10] == step.prompt
        text = "".join(held["texts"][i] for row in held["steps"] for i in row[5])
        assert text == "".join(trace.pieces(trace.generations[0].output(sequence["row"])))


def test_ten_thousand_tokens_make_a_small_page(folder):
    trace = samples.trace(folder / "long.jsonl", tokens=10_000, nodes=16)
    page = written(folder, trace=trace)
    assert len(trace.generations[0].output()) >= 10_000
    assert len(page.html) < 2e6


def test_a_method_of_any_name_can_be_drawn():
    record = samples.record("auto", "all", 1.0) | {"method": "my:<b>$x^2$ \\1"}
    plot = plots.speeds([record], "all")
    assert "my:&lt;b&gt;$x^2$ \\1" in plot.svg


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["paper", "raised", "mark"])
def test_colours_of_text_stand_out(theme, ground):
    """WCAG 2.2, level AA: 4.5 to 1; on the marked step only text of the drafters' colours and ink stands."""
    colours = {n: pair for n, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)}
    texts = ["ink", *(f"series-{i}" for i in range(1, 7))] + (
        ["muted", "accent", "bad", "warn"] if ground != "mark" else []
    )
    poor = {n: contrast(colours[n][theme], colours[ground][theme]) for n in texts}
    assert {n: ratio for n, ratio in poor.items() if ratio < 4.5} == {}
