"""The report as one HTML file: text, tables and plots by a template, the trace as data for the viewer's script."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from specdec.page import headline, plots
from specdec.page.compact import sequences

if TYPE_CHECKING:
    from specdec.trace import Trace

FOLDER = Path(__file__).parent
SCRIPTS = ("page.js", "tree.js", "viewer.js")


def write_page(path: Path, report: dict[str, Any] | None = None, trace: Trace | None = None) -> None:
    """Write a page that shows a benchmark's report, a trace, or both.

    The file needs nothing beside it: no network, no fonts, no other files. Whatever text it is given, from prompts or
    tokens, is shown as text.

    Args:
        path: where; a file that is there is replaced.
        report: what ``specdec bench --json`` writes, version 2.
        trace: what ``specdec.trace.read_trace`` reads.

    Raises:
        ValueError: neither was given, or the report is of another version.
        ImportError: a report needs matplotlib (the extra ``report``); a trace alone does not.
        OSError: the file cannot be written.
    """
    if report is None and trace is None:
        raise ValueError("a page shows a report, a trace or both; neither was given")
    if report is not None and report.get("version") != 2:
        raise ValueError(
            f"the page shows reports of version 2, not {report.get('version', 1)}: run specdec bench again"
        )
    path.write_text(render(report, trace), encoding="utf-8")


def render(report: dict[str, Any] | None, trace: Trace | None) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("specdec.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"times": headline.times, "interval": headline.interval, "verdict": plots.verdict}
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("page.html").render(
        title=title(report, trace),
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode(),
        trace=data(sequences(trace)) if trace else None,
        report=report,
        **(shown(report) if report else {}),
    )


def title(report: dict[str, Any] | None, trace: Trace | None) -> str:
    """The page's name in a browser's tab."""
    model = report["machine"]["model"] if report else trace.model if trace else ""
    return f"specdec: {Path(model).name}"


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of a report besides its own records."""
    records, parts = report["results"], report["parts"]
    workloads = list(dict.fromkeys(record["workload"] for record in records))
    workloads.sort(key=lambda name: name != headline.ALL)
    mine, mark = headline.ours(report), _mark(report["disturbance"])
    over_all = [part for part in parts if part["workload"] == headline.ALL]
    guessed = [part for part in over_all if part["conditional_acceptance"]]
    timed = [part for part in over_all if None not in part["seconds"].values()]
    return {
        "headline": headline.headline(report),
        "setting": headline.setting(report),
        "made_of": headline.made_of(report),
        "losses": headline.losses(report),
        "mark": mark,
        "speeds": [plots.speeds(records, workload, mine, mark) for workload in workloads],
        "where_time_goes": plots.where_time_goes(timed) if timed else None,
        "acceptance": plots.acceptance(guessed) if guessed else None,
        "accepted_lengths": [plots.accepted_lengths(part) for part in over_all if part["accepted_lengths"]],
        "sizes": [plots.sizes(part) for part in over_all if part["sizes"]],
        "pass_cost": plots.pass_cost(report["pass_cost"]) if report["pass_cost"] else None,
        "over_all": over_all,
        "workloads": workloads,
        "baselines": list(dict.fromkeys(record["baseline"] for record in [*records, *report["against"]])),
    }


def _mark(disturbance: dict[str, Any]) -> str:
    """What stands behind speeds that other load disturbed and that are shown all the same."""
    return "†" if disturbance["disturbed"] and not disturbance["refused"] else ""


def data(value: Any) -> Markup:
    """JSON that may stand in a script element: no character of it can end the element."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))
