"""Reports of sessions, pools and other libraries on top."""

from __future__ import annotations

from pathlib import Path

from tables.markdown import Report, machine, read, table, times


def sessions(directory: Path) -> str:
    """What benchmarks/sessions.py found, in Markdown."""
    return "\n\n".join(map(_sessions_section, read(directory, "sessions"))) or "not measured yet"


def _sessions_section(report: Report) -> str:
    head = (
        f"{machine(report['machine'])}; greedy, at most {report['max_new_tokens']} tokens a turn, medians of "
        f"{report['repeats']}. Speed over eager `generate`, reading prompts included / tokens per pass / share of the "
        "prompts whose rows were kept:"
    )
    cells = {(r["agent"], r["method"]): _session_cell(r) for r in report["sessions"] if r["method"] != "eager"}
    eager = {r["agent"]: f"{r['seconds']:.1f} s" for r in report["sessions"] if r["method"] == "eager"}
    names = list(dict.fromkeys(method for _, method in cells))
    rows = [[agent, seconds, *(cells[agent, name] for name in names)] for agent, seconds in eager.items()]
    over = [f"{agent} {ratio:.2f}x" for agent, ratio in _warm_over_kernels(report["sessions"]).items()]
    said = [f"Warm over kernels only: {', '.join(over)}."] if over else []
    said += [_conversation(each) for each in report.get("recorded", [])]
    return "\n\n".join([head, table(["agent", "eager", *names], rows), *said])


def _warm_over_kernels(runs: list[Report]) -> dict[str, float]:
    """By agent, how much faster warm sessions are than kernels alone; where both ran and texts are equal."""
    seconds = {(r["agent"], r["method"]): r["seconds"] for r in runs if r["equal"]}
    agents = [agent for agent, method in seconds if method == "warm" and (agent, "kernels only") in seconds]
    return {agent: seconds[agent, "kernels only"] / seconds[agent, "warm"] for agent in agents}


def _conversation(r: Report) -> str:
    return (
        f"`{r['agent']}`: the first {r['turns']} turns of the recorded conversation {r['conversation']}, "
        f"prompts of up to {r['longest_prompt']} tokens."
    )


def _session_cell(r: Report) -> str:
    return f"{times(r)} / {r['tokens_per_step']:.2f} / {r['reused']:.0%}"


def pool(directory: Path) -> str:
    """What benchmarks/pool.py found, in Markdown."""
    return "\n\n".join(map(_pool_section, read(directory, "pool"))) or "not measured yet"


def _pool_section(report: Report) -> str:
    head = (
        f"{machine(report['machine'])}; {report['prompts']} prompts, greedy, at most {report['max_new_tokens']} "
        f"tokens, medians of {report['repeats']}. Tokens per second, reading prompts included (speed over one after "
        "another with speculation) / tokens of a row per pass, by requests at a time:"
    )
    cells = {(r["method"], r["sessions"]): _pool_cell(r) for r in report["pool"]}
    counts = sorted({sessions for _, sessions in cells})
    methods = dict.fromkeys(method for method, _ in cells)
    rows = [[method, *(cells.get((method, count), "") for count in counts)] for method in methods]
    missing = [f"`{name}` did not run: {why}." for name, why in report["unavailable"].items()]
    return "\n\n".join([head, table(["", *map(str, counts)], rows), *missing])


def _pool_cell(r: Report) -> str:
    if not r["equal"]:
        return "tokens differ"
    steps = "" if r["tokens_per_step"] is None else f" / {r['tokens_per_step']:.2f}"
    return f"{r['tokens_per_second']:.1f} ({times(r)}){steps}"


def integrations(directory: Path) -> str:
    """What benchmarks/integrations.py found, in Markdown."""
    return "\n\n".join(map(_integrations_section, read(directory, "integrations"))) or "not measured yet"


def _integrations_section(report: Report) -> str:
    head = (
        f"{machine(report['machine'])}; greedy, medians of {report['repeats']}. Seconds without speculation, then "
        "speed over that / tokens per pass:"
    )
    results = report["integrations"]
    cells = {(r["task"], r["method"]): f"{times(r)} / {r['tokens_per_step']:.2f}" for r in results}
    names = [name for name in dict.fromkeys(r["method"] for r in results) if name != "plain"]
    plain = {r["task"]: f"{r['seconds']:.1f} s" for r in results if r["method"] == "plain"}
    rows = [[task, seconds, *(cells.get((task, name), "") for name in names)] for task, seconds in plain.items()]
    missing = [f"`{name}` was left out: {why}." for name, why in report["unavailable"].items()]
    return "\n\n".join([head, table(["", "plain", *names], rows), *missing])
