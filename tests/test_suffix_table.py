"""The page's table of suffix trees: each replay and each million in its place, or nothing was measured."""

import json

from tables.text import suffix_table


def replay(trace, who, steps):
    return {
        "trace": trace,
        "who": who,
        "tokens": 90,
        "tokens_per_step": steps,
        "us_per_token": 9.87,
        "bytes_per_token": 70.4,
    }


def test_each_figure_stands_in_its_row_and_column(tmp_path):
    assert suffix_table(tmp_path) == "not measured yet"
    replays = [replay(trace, who, i) for i, (trace, who) in enumerate((t, w) for t in "ab" for w in ("path", "tree"))]
    (tmp_path / "one.json").write_text(json.dumps({"nodes": 32, "replays": replays}))
    million = {"million": 1, "us_per_token": 1.26, "cpu_us_per_token": 1.13, "bytes_per_token_held": 95.4}
    (tmp_path / "two.json").write_text(json.dumps({"append": {"none": [million]}}))
    lines = suffix_table(tmp_path).splitlines()
    assert "| trace | path | tree |" in lines
    assert "| b (90 tokens) | 2.000 / 9.9 / 70 | 3.000 / 9.9 / 70 |" in lines
    assert lines[-3:] == ["| million | 1 |", "|---|---|", "| none | 1.1 / 95 |"]
    assert "of CPU time" in lines[-5]
    del million["cpu_us_per_token"]  # as reports were before
    (tmp_path / "two.json").write_text(json.dumps({"append": {"none": [million]}}))
    lines = suffix_table(tmp_path).splitlines()
    assert lines[-1] == "| none | 1.3 / 95 |"
    assert "CPU" not in lines[-5]
