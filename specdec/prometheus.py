"""What a wrapped model has done, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.statistics import Stats

ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def exposition(stats: Stats) -> str:
    """Every count, as docs/metrics.md names it. A thread may ask while another generates."""
    drafters = dict(stats.by_drafter)
    drafted, accepted = ({name: of[what] for name, of in drafters.items()} for what in ("drafted", "accepted"))
    kinds = {"speculative": stats.generations, "plain": stats.plain_generations}
    deep, kept = dict(stats.drafted_at_depth), dict(stats.accepted_at_depth)
    deep_kept = {depth: kept.get(depth, 0) for depth in deep}
    families = [
        _counter("generations", "Calls of generate.", kinds, "kind"),
        _counter("steps", "Passes of the target that committed tokens, per sequence.", stats.steps),
        _counter("tokens", "Tokens committed.", stats.tokens),
        _counter("drafted_tokens", "Guessed tokens verified.", drafted, "drafter"),
        _counter("accepted_tokens", "Guessed tokens that became tokens of the text.", accepted, "drafter"),
        _counter("depth_drafted_steps", "Steps that guessed this deep.", deep, "depth"),
        _counter("depth_accepted_steps", "Steps that accepted this deep.", deep_kept, "depth"),
        _counter("reused_tokens", "Tokens of prompts whose KV rows were kept from earlier texts.", stats.reused_tokens),
        _counter("judged_trees", "Trees, by the rule that verified them.", dict(stats.by_rule), "rule"),
        _counter("drafts_ahead", "Drafts made during a pass, for the step after it.", stats.drafts_ahead),
        _counter("drafts_ahead_used", "Drafts of those that a step used.", stats.drafts_ahead_used),
        _counter("seconds", "Wall time by part.", stats.seconds, "part"),
        _counter("faults", "Guesses thrown away because a drafter failed.", stats.fault_count),
    ]
    return "".join(families)


def _counter(
    name: str, meaning: str, values: float | Mapping[str, float] | Mapping[int, float], label: str = ""
) -> str:
    """One family: a single value, or one for each value of the label."""
    name = f"specdec_{name}_total"
    each = values.items() if isinstance(values, Mapping) else [(None, values)]
    lines = [f"{name}{_labels(label, key)} {value!r}" for key, value in each]
    return "\n".join([f"# HELP {name} {meaning}", f"# TYPE {name} counter", *lines, ""])


def _labels(label: str, value: str | int | None) -> str:
    return "" if value is None else f'{{{label}="{str(value).translate(ESCAPED)}"}}'
