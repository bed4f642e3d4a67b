"""A trained draft at work: chains, SpecDec++'s stop, trees of as many nodes, and transformers' own assisted generation.

    python benchmarks/drafts.py --draft draft.safetensors [--head head.safetensors] [--held-out SAMPLES/held-out]

All methods answer a prompt one after the other, each time beginning with another, and all with our CPU kernels in
target and draft, but for those that say "own layers". Speed is that of all tokens but the first, for four prompts at
once that of all. Where a greedy answer is not plain ``generate``'s, no speed is given. Runs are kept beside the report:
called again, it goes on, until each prompt has ``--repeats`` runs; ``--seconds`` ends it before.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import specdec
from specdec import storage
from specdec.attach import Attachment, attach
from specdec.bench.counts import Counts
from specdec.bench.disturbance import Disturbance, Probe
from specdec.bench.interval import interval
from specdec.bench.machine import machine
from specdec.bench.measure import Stopwatch
from specdec.bench.quicker import Kernels
from specdec.bench.workloads import encode, first_of_each, own
from specdec.commands import console
from specdec.commands.train_head import drafting_model
from specdec.core import Policy
from specdec.drafters import SmallModelDrafter, acceptance_head
from specdec.policies import FixedPolicy, ThresholdPolicy
from specdec.verifiers import PathwiseVerifier, RejectionVerifier

PLAIN, RIVAL = "plain", "assisted"
TEMPERATURES = (0.0, 0.6, 1.0)
TOGETHER = 4
Run = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to generate with a draft.

    Attributes:
        tree: what is drafted, see ``SmallModelDrafter``; "" where transformers does it.
        policy: how much of it.
        rule: of ``RejectionVerifier``; "" to sample and match.
        width: paths of a tree.
        branching: children at each depth.
        head: whether an acceptance head judges the guesses.
        assisted: settings of transformers' assisted generation; None where that has no part in it.
        kernels: whether our CPU kernels are in target and draft.
        together: whether it is tried with several prompts at once too.
    """

    tree: Any = ""
    policy: Policy | None = None
    rule: Any = ""
    width: int = 4
    branching: tuple[int, ...] = (3, 2, 1, 1)
    head: bool = False
    assisted: tuple[tuple[str, Any], ...] | None = None
    kernels: bool = True
    together: bool = False


def ways(temperature: float) -> dict[str, Way]:
    """All ways at a temperature; those whose names end alike in "nodes" verify as many nodes."""
    five = (("num_assistant_tokens", 5), ("assistant_confidence_threshold", 0.0))
    found = {
        PLAIN: Way(together=True),
        RIVAL: Way(assisted=()),
        f"{RIVAL}, own layers": Way(assisted=(), kernels=False),
        f"{RIVAL}, 5 guesses": Way(assisted=five),
    }
    rule = "block" if temperature else ""
    for guesses in (2, 4, 6, 12):
        found[f"chain, {guesses} nodes"] = Way("chain", FixedPolicy(guesses, guesses, 1), rule, together=guesses == 4)
    for threshold in (0.6, 0.9):
        found[f"threshold {threshold}"] = Way("chain", ThresholdPolicy(threshold, longest=12), rule)
        found[f"threshold {threshold}, head"] = Way(
            "chain", ThresholdPolicy(threshold, longest=12, lag=1), rule, head=True
        )
    for width, depth in ((2, 3), (3, 4)):
        policy, nodes = FixedPolicy(width * depth, depth, width), f"{width * depth} nodes"
        if not temperature:
            found[f"beam {width} x {depth}, {nodes}"] = Way("beam", policy, width=width)
            found[f"best-first, {nodes}"] = Way(
                "best-first", FixedPolicy(width * depth, depth + 1, 4), together=depth == 3
            )
            continue
        for rule in ("swor", "traversal"):
            name = f"rsd-s {width} x {depth}, {rule}, {nodes}"
            found[name] = Way("rsd-s", policy, rule, width=width, together=(rule, depth) == ("traversal", 3))
        branching = (2, 1, 1) if width == 2 else (3, 1, 1, 1)
        found[f"rsd-c, traversal, {nodes}"] = Way("rsd-c", policy, "traversal", branching=branching)
        found[f"iid, traversal, {nodes}"] = Way("iid", policy, "traversal", branching=branching)
    if temperature:
        found["chain, chain rule, 6 nodes"] = Way("chain", FixedPolicy(6, 6, 1), "chain")
    return found


class Bench:
    """A target, its draft, and what each way makes of them.

    Args:
        load: makes the draft: once for our kernels, once for a rival on its own layers.
        heads: acceptance heads by the temperature they were trained for.
    """

    def __init__(self, model: Any, load: Callable[[], Any], heads: dict[float, Path], max_new_tokens: int) -> None:
        self.model, self.heads, self.max_new_tokens = model, heads, max_new_tokens
        self.kernels = Kernels(model)
        self.draft, self.rival = load(), load()
        self.rivals_kernels = Kernels(self.rival)
        self.attachment: Attachment | None = None
        self.views: dict[tuple[str, float], tuple[Any, SmallModelDrafter]] = {}

    def has(self, way: Way, temperature: float) -> bool:
        """Whether there is what a way needs."""
        return not way.head or temperature in self.heads

    def run(self, name: str, way: Way, temperature: float, prompts: Sequence[Sequence[int]], seed: int) -> Run:
        """One generation of one prompt, or of several at once."""
        model, arguments, watch = self.model, _inputs(prompts), Stopwatch()
        arguments |= {"max_new_tokens": self.max_new_tokens, "do_sample": temperature > 0}
        arguments |= {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        arguments |= {"streamer": watch} if len(prompts) == 1 else {}
        if way.tree:
            model, drafter = self._view(name, way, temperature)
            drafter.reset()
            vars(model)["generate"].speculate.stats = Counts()
        elif way.assisted is not None:
            arguments["assistant_model"] = self.rival
            self.rival.generation_config = copy.deepcopy(self.model.generation_config)
            self.rival.generation_config.update(**dict(way.assisted))
        torch.manual_seed(seed)
        with ExitStack() as inside:
            for kernels in (self.kernels, self.rivals_kernels) if way.kernels else ():
                inside.enter_context(kernels.inside())
            watch.start()
            output = model.generate(**arguments)
            whole = time.perf_counter() - watch.times[0]
        texts = [self._ended(row) for row in output[:, arguments["input_ids"].shape[1] :].tolist()]
        said, tokens = [] if temperature else texts, sum(map(len, texts))
        steps = specdec.stats(model).steps if way.tree else len(watch.counts) or tokens
        run: Run = {"said": said, "tokens": tokens, "seconds": whole, "steps": steps - len(prompts)}
        run["new"] = tokens - len(prompts)
        if len(prompts) == 1:
            run |= {"tokens": tokens - watch.counts[0], "seconds": watch.times[-1] - watch.times[1]}
        return run

    def _trial(self, view: Any) -> Attachment:
        """All views are of one model, which is tried once; policies of these ways ask for no times."""
        self.attachment = self.attachment or attach(view, timed=False)
        return self.attachment

    def _ended(self, tokens: list[int]) -> list[int]:
        """A text up to its end."""
        end = self.model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def _view(self, name: str, way: Way, temperature: float) -> tuple[Any, SmallModelDrafter]:
        """The target wrapped in a way's parts; made once."""
        if (name, temperature) not in self.views:
            view = copy.copy(self.model)
            parts = {"tree": way.tree, "width": way.width, "branching": way.branching}
            if hasattr(self.draft, "fuse"):
                from specdec.drafters.feature import FeatureDrafter

                drafter: SmallModelDrafter = FeatureDrafter(self.draft, **parts)
            else:
                head = self.heads[temperature] if way.head else None
                drafter = SmallModelDrafter(self.draft, head=head, **parts)
            verifier = RejectionVerifier(way.rule) if way.rule else PathwiseVerifier()
            assert way.policy is not None, "a way with a tree has a policy"
            specdec.wrap(view, drafter, way.policy, verifier, cpu_kernels=False)
            vars(view)["generate"].speculate.trial = self._trial
            self.views[name, temperature] = view, drafter
        return self.views[name, temperature]


def _inputs(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    longest = max(map(len, prompts))
    ids, mask = ([[*[0] * (longest - len(p)), *(p if tokens else [1] * len(p))] for p in prompts] for tokens in (1, 0))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@dataclass(frozen=True)
class Turn:
    """What is run one after the other: all ways, of some prompts, once."""

    repeat: int
    first: int
    rows: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.repeat}/{self.temperature}/{self.rows}/{self.first}"


def turns(prompts: int, repeats: int) -> Iterator[Turn]:
    """Every prompt by itself and in fours, at every temperature."""
    for repeat in range(repeats):
        for first in range(prompts):
            for temperature in TEMPERATURES:
                yield Turn(repeat, first, 1, temperature)
                if first % TOGETHER == 0 and first + TOGETHER <= prompts and temperature != 0.6:
                    yield Turn(repeat, first, TOGETHER, temperature)


def main(
    draft: Annotated[str, typer.Option(help="A draft.safetensors, or a smaller model with the same tokens.")],
    head: Annotated[list[Path] | None, typer.Option(help="An acceptance head for it; one of each temperature.")] = None,
    model: Annotated[str, typer.Option(help="A directory, or 'demo'.")] = "demo",
    held_out: Annotated[Path | None, typer.Option(help="Samples held out of training: their prompts.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many.")] = 12,
    max_new_tokens: int = 96,
    repeats: int = 3,
    seconds: Annotated[float, typer.Option(help="After which no new turn begins.")] = 420.0,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/drafts.json"),
) -> None:
    """Go on where the runs so far have stopped; write the report of all of them."""
    target, tokenizer = console.load(model)
    heads = {
        float(storage.read(path, acceptance_head.KIND, acceptance_head.VERSION)[1]["temperature"]): path
        for path in head or []
    }
    bench = Bench(target, partial(drafting_model, draft, target), heads, max_new_tokens)
    ids = _prompts(tokenizer, held_out)[:prompts]
    file, began, disturbance = json_path.with_suffix(".runs.jsonl"), time.monotonic(), Disturbance()
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {turn: runs for turn, runs, _ in kept}
    disturbance.probes += [Probe(*probe) for *_, probe in kept]
    warm = False
    for turn in turns(len(ids), repeats):
        if str(turn) in done or time.monotonic() - began > seconds:
            continue
        asked = ids[turn.first : turn.first + turn.rows]
        due = {name: way for name, way in ways(turn.temperature).items() if bench.has(way, turn.temperature)}
        due = {name: way for name, way in due.items() if turn.rows == 1 or way.together}
        for name, way in due.items() if not warm or turn.rows > 1 else ():
            bench.run(name, way, turn.temperature, [prompt[:16] for prompt in asked], 0)
        warm = warm or turn.temperature == TEMPERATURES[-1]
        names = list(due)
        shift = (turn.first + turn.repeat) % len(names)
        disturbance.begin()
        runs = {
            name: bench.run(name, due[name], turn.temperature, asked, turn.repeat)
            for name in names[shift:] + names[:shift]
        }
        probe = disturbance.end()
        with file.open("a") as out:
            out.write(json.dumps([str(turn), runs, probe]) + "\n")
        done[str(turn)] = runs
        console.notes.print(f"{turn} after {time.monotonic() - began:.0f} s", highlight=False)
    report = {"machine": machine(target, model), "draft": draft, "max_new_tokens": max_new_tokens, "prompts": len(ids)}
    report |= {"left": sum(str(turn) not in done for turn in turns(len(ids), repeats))}
    report |= {"disturbance": disturbance.report(), "drafts": figures(done)}
    json_path.write_text(json.dumps(report, indent=1) + "\n")
    console.output.print(f"{json_path}: {report['left']} turns left")


def _prompts(tokenizer: Any, held_out: Path | None) -> list[list[int]]:
    """Token ids of each: of samples held out, or the first of each kind of our own, then the second."""
    if held_out is not None:
        from specdec.training.samples import read

        return [sample.tokens[: sample.prompt].tolist() for sample in read(held_out)]
    firsts = first_of_each(own(), 1)
    return [encode(tokenizer, prompt) for prompt in [*firsts, *(each for each in own() if each not in firsts)]]


def figures(done: dict[str, dict[str, Run]]) -> list[dict[str, Any]]:
    """One row of each way, temperature and number of prompts at once."""
    groups: dict[tuple[float, int, str], dict[int, list[tuple[Run, Run, Run | None]]]] = {}
    for key, runs in done.items():
        _, temperature, rows, first = key.split("/")
        for name, run in runs.items():
            place = groups.setdefault((float(temperature), int(rows), name), {}).setdefault(int(first), [])
            place.append((run, runs[PLAIN], runs.get(RIVAL)))
    return [_figure(*group, found) for group, found in sorted(groups.items(), key=lambda item: item[0][:2])]


def _figure(
    temperature: float, rows: int, name: str, found: dict[int, list[tuple[Run, Run, Run | None]]]
) -> dict[str, Any]:
    every = [each for runs in found.values() for each in runs]
    row: dict[str, Any] = {"method": name, "temperature": temperature, "rows": rows, "prompts": len(found)}
    row["equal"] = all(run["said"] == plain["said"] for run, plain, _ in every)
    row["tokens_per_step"] = round(
        sum(run["new"] for run, *_ in every) / max(1, sum(run["steps"] for run, *_ in every)), 3
    )
    row["tokens_per_second"] = round(statistics.median(_speed(run) for run, *_ in every if run["tokens"]), 2)
    for against, place in (("speedup", 1), ("over_assisted", 2)):
        pairs = [[(each[0], each[place]) for each in runs] for runs in found.values()]
        ratios = [
            [
                _speed(run) / _speed(other)
                for run, other in runs
                if other is not None and run["tokens"] and other["tokens"]
            ]
            for runs in pairs
        ]
        if ratios := [each for each in ratios if each]:
            row[against] = round(statistics.median(map(statistics.median, ratios)), 3)
            low, high = interval(ratios)
            row |= {f"{against}_low": round(low, 3), f"{against}_high": round(high, 3)} if low == low else {}
    return row


def _speed(run: Run) -> float:
    return float(run["tokens"] / run["seconds"])


if __name__ == "__main__":
    typer.run(main)
