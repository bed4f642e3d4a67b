"""The counts in Prometheus' text format, read back by its own library."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.core import DraftTree, Verdict
from specdec.statistics import Stats

parser = pytest.importorskip("prometheus_client.parser", reason="reads the format")
ODD = 'a "quoted\\\n name"'


@pytest.fixture
def stats() -> Stats:
    """Two generations' worth of counts: five nodes drafted in two trees, of which two in the first came true."""
    stats = Stats()
    tree = DraftTree(np.arange(4), np.array([-1, 0, 1, 0]), np.ones(4, np.float32), ("", "suffix", ODD, "suffix"))
    stats.observe(Verdict(tree, np.array([0, 1, 2]), np.array([1, 2, 9])))
    tree = DraftTree(np.arange(3), np.array([-1, 0, 0]), np.ones(3, np.float32), ("", "suffix", "suffix"))
    stats.observe(Verdict(tree, np.array([0]), np.array([9])))
    stats.observe(Verdict(tree, np.arange(3), np.array([9]), prompt=True))
    stats.generations, stats.plain_generations, stats.fault_count = 2, 1, 3
    stats.judge("match", 2)
    stats.reuse(7)
    stats.ahead(drafted=True)
    stats.ahead(drafted=True, used=True)
    stats.spend("verify", 0.125)
    return stats


def samples(text: str) -> dict[tuple[str, str], float]:
    """Value by name and label value."""
    families = list(parser.text_string_to_metric_families(text))
    assert all(family.type == "counter" and family.documentation for family in families)
    return {(s.name, next(iter(s.labels.values()), "")): s.value for family in families for s in family.samples}


def test_every_count_can_be_read_back(stats):
    assert samples(stats.prometheus()) == {
        ("specdec_generations_total", "speculative"): 2,
        ("specdec_generations_total", "plain"): 1,
        ("specdec_steps_total", ""): 3,
        ("specdec_tokens_total", ""): 5,
        ("specdec_drafted_tokens_total", "suffix"): 4,
        ("specdec_drafted_tokens_total", ODD): 1,
        ("specdec_accepted_tokens_total", "suffix"): 1,
        ("specdec_accepted_tokens_total", ODD): 1,
        ("specdec_depth_drafted_steps_total", "1"): 2,
        ("specdec_depth_drafted_steps_total", "2"): 1,
        ("specdec_depth_accepted_steps_total", "1"): 1,
        ("specdec_depth_accepted_steps_total", "2"): 1,
        ("specdec_reused_tokens_total", ""): 7,
        ("specdec_judged_trees_total", "match"): 2,
        ("specdec_drafts_ahead_total", ""): 2,
        ("specdec_drafts_ahead_used_total", ""): 1,
        ("specdec_faults_total", ""): 3,
        **{("specdec_seconds_total", part): s for part, s in stats.seconds.items()},
    }
    assert stats.seconds["verify"] == 0.125


def test_labels_say_what_they_count(stats):
    labels = {
        name: set(sample.labels)
        for family in parser.text_string_to_metric_families(stats.prometheus())
        for name, sample in ((sample.name, sample) for sample in family.samples)
    }
    assert labels["specdec_accepted_tokens_total"] == {"drafter"}
    assert labels["specdec_seconds_total"] == {"part"}
    assert labels["specdec_depth_accepted_steps_total"] == {"depth"}


def test_acceptance_by_depth_follows_from_the_counters(stats):
    read = samples(stats.prometheus())
    shares = [
        read["specdec_depth_accepted_steps_total", str(d)] / read["specdec_depth_drafted_steps_total", str(d)]
        for d in (1, 2)
    ]
    assert shares == stats.acceptance_by_depth


def test_nothing_counted_is_told_as_nothing():
    read = samples(Stats().prometheus())
    assert read["specdec_tokens_total", ""] == 0
    assert not any(name == "specdec_drafted_tokens_total" for name, _ in read)
