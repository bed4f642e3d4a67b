"""A trained draft at work: chains, SpecDec++'s stop, trees of as many nodes, and transformers' own assisted generation.

    python benchmarks/drafts.py --draft draft.safetensors [--head head.safetensors] [--held-out SAMPLES/held-out]

Tokens per step are counted first, by answering all prompts at once: other load does not change them. Then some of the
prompts are timed, one at a time and in fours, by all methods one after the other, each time beginning with another, and
all with our CPU kernels in target and draft, but for those that say "own layers". Speed is that of all tokens but the
first, for four prompts at once that of all. Runs are kept beside the report: called again, it goes on, until each timed
prompt has ``--repeats`` runs; ``--seconds`` ends it before. The usual ways only, unless ``--all-ways``.
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
from draft_ways import AUTO, PLAIN, RIVAL, Way, ways

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
from specdec.drafters import SmallModelDrafter, acceptance_head
from specdec.verifiers import PathwiseVerifier, RejectionVerifier

TEMPERATURES = (0.0, 0.6, 1.0)
TOGETHER = 4
WARM = 8  # tokens
Run = dict[str, Any]


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
        self.views: dict[tuple[str, float], Any] = {}
        self.drafters: dict[Path | None, SmallModelDrafter] = {}

    def has(self, way: Way, temperature: float) -> bool:
        """Whether there is what a way needs."""
        return not way.head or temperature in self.heads

    def run(
        self, name: str, way: Way, temperature: float, prompts: Sequence[Sequence[int]], seed: int, most: int
    ) -> Run:
        """One generation of at most so many tokens of one prompt, or of several at once."""
        model, arguments, watch = self.model, _inputs(prompts), Stopwatch()
        arguments |= {"max_new_tokens": most, "do_sample": temperature > 0}
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
        run["new"] = tokens - (watch.counts[0] if watch.counts else len(prompts))
        if len(watch.counts) > 1:
            run |= {"tokens": run["new"], "seconds": watch.times[-1] - watch.times[1]}
        return run

    def _trial(self, view: Any) -> Attachment:
        """All views are of one model, which is tried once where the policy asks for no times."""
        self.attachment = self.attachment or attach(view, timed=False)
        return self.attachment

    def _ended(self, tokens: list[int]) -> list[int]:
        """A text up to its end."""
        end = self.model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def _view(self, name: str, way: Way, temperature: float) -> tuple[Any, SmallModelDrafter]:
        """The target wrapped in a way's parts, made once, and its drafter, about to draft in that way."""
        drafter = self._drafter(self.heads[temperature] if way.head else None)
        drafter.tree, drafter.width, drafter.branching = way.tree, way.width, way.branching
        drafter.thrifty = way.policy == AUTO
        if (name, temperature) not in self.views:
            view = self.views[name, temperature] = copy.copy(self.model)
            verifier = RejectionVerifier(way.rule) if way.rule else PathwiseVerifier()
            assert way.policy is not None, "a way with a tree has a policy"
            specdec.wrap(view, drafter, way.policy, verifier, cpu_kernels=False)
            if way.policy != AUTO:
                vars(view)["generate"].speculate.trial = self._trial
        return self.views[name, temperature], drafter

    def _drafter(self, head: Path | None) -> SmallModelDrafter:
        """One for all ways, as making it tries the draft: with a head or without."""
        if head not in self.drafters:
            if hasattr(self.draft, "fuse"):
                from specdec.drafters.feature import FeatureDrafter

                self.drafters[head] = FeatureDrafter(self.draft)
            else:
                self.drafters[head] = SmallModelDrafter(self.draft, head=head)
        return self.drafters[head]


def _inputs(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    longest = max(map(len, prompts))
    ids, mask = ([[*[0] * (longest - len(p)), *(p if tokens else [1] * len(p))] for p in prompts] for tokens in (1, 0))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@dataclass(frozen=True)
class Turn:
    """What is run one after the other: ways, of some prompts, once.

    Attributes:
        rows: prompts at once, from the ``first`` on.
        timed: whether it is for its times: if not, for its counts alone.
        every: whether all ways have a part in it, or the usual ones.
    """

    repeat: int
    first: int
    rows: int
    temperature: float
    timed: bool = True
    every: bool = True

    def __str__(self) -> str:
        return f"{'timed' if self.timed else 'counted'}/{self.repeat}/{self.temperature}/{self.rows}/{self.first}"

    def ways(self) -> dict[str, Way]:
        """Those that have a part in it: ours alone are counted, unless they hang on times, and few timed together."""
        found = ways(self.temperature, self.every).items()
        if not self.timed:
            return {name: way for name, way in found if way.tree and way.policy != AUTO}
        return {name: way for name, way in found if self.rows == 1 or way.together}


def turns(prompts: int, timed: int, repeats: int, every: bool) -> Iterator[Turn]:
    """All prompts at once to count; then every timed one by itself and in fours; at every temperature."""
    for temperature in TEMPERATURES:
        yield Turn(0, 0, prompts, temperature, False, every)
    for repeat in range(repeats):
        for first in range(timed):
            for temperature in TEMPERATURES:
                yield Turn(repeat, first, 1, temperature, True, every)
                if first % TOGETHER == 0 and first + TOGETHER <= timed and temperature != 0.6:
                    yield Turn(repeat, first, TOGETHER, temperature, True, every)


def take(bench: Bench, turn: Turn, ids: Sequence[Sequence[int]], warm: set[tuple[float, int]]) -> dict[str, Run]:
    """Run a turn. What is timed for the first time is run for a few tokens before.

    Args:
        warm: temperatures and rows that have been; added to.
    """
    asked = ids[turn.first : turn.first + turn.rows]
    due = {name: way for name, way in turn.ways().items() if bench.has(way, turn.temperature)}
    if turn.timed and (turn.temperature, turn.rows) not in warm:
        warm.add((turn.temperature, turn.rows))
        for name, way in due.items():
            bench.run(name, way, turn.temperature, [prompt[:16] for prompt in asked], 0, WARM)
    names = list(due)
    shift = (turn.first + turn.repeat) % len(names)
    return {
        name: bench.run(name, due[name], turn.temperature, asked, turn.repeat, bench.max_new_tokens)
        for name in names[shift:] + names[:shift]
    }


def main(
    draft: Annotated[str, typer.Option(help="A draft.safetensors, or a smaller model with the same tokens.")],
    head: Annotated[list[Path] | None, typer.Option(help="An acceptance head for it; one of each temperature.")] = None,
    model: Annotated[str, typer.Option(help="A directory, or 'demo'.")] = "demo",
    held_out: Annotated[Path | None, typer.Option(help="Samples held out of training: their prompts.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many are counted.")] = 12,
    timed: Annotated[int, typer.Option(min=0, help="How many of them are timed too; 0: counts alone.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of an answer at most.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of all that is timed.")] = 1,
    all_ways: Annotated[bool, typer.Option("--all-ways", help="Not only the usual ones.")] = False,
    seconds: Annotated[float, typer.Option(help="After which no new turn begins.")] = 570.0,
    json_path: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/drafts.json"),
) -> None:
    """Go on where the runs so far have stopped; write the report of all of them."""
    target, tokenizer = console.load(model)
    kept = (storage.read(path, acceptance_head.KIND, acceptance_head.VERSION) for path in head or [])
    heads = {float(facts["temperature"]): path for path, (_, facts) in zip(head or [], kept, strict=True)}
    bench = Bench(target, partial(drafting_model, draft, target), heads, max_new_tokens)
    ids = _prompts(tokenizer, held_out)[:prompts]
    file, began, disturbance = json_path.with_suffix(".runs.jsonl"), time.monotonic(), Disturbance()
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done: dict[str, dict[str, Run]] = {turn: runs for turn, runs, _ in lines}
    disturbance.probes += [Probe(*probe) for *_, probe in lines if probe]
    warm = set[tuple[float, int]]()
    every = list(turns(len(ids), min(timed, len(ids)), repeats, all_ways))
    for turn in every:
        if str(turn) in done or time.monotonic() - began > seconds:
            continue
        disturbance.begin()
        done[str(turn)] = take(bench, turn, ids, warm)
        probe = disturbance.end() if turn.timed else None
        with file.open("a") as out:
            out.write(json.dumps([str(turn), done[str(turn)], probe]) + "\n")
        console.notes.print(f"{turn} after {time.monotonic() - began:.0f} s", highlight=False)
    report = {"machine": machine(target, model), "draft": Path(draft).name, "max_new_tokens": max_new_tokens}
    report |= {"left": sum(str(turn) not in done for turn in every), "disturbance": disturbance.report()}
    report |= {"drafts": figures(done)}
    json_path.write_text(json.dumps(report, indent=1) + "\n")
    console.output.print(f"{json_path}: {report['left']} turns left")


def _prompts(tokenizer: Any, held_out: Path | None) -> list[list[int]]:
    """Token ids of each: of samples held out, shuffled, or the first of each kind of our own, then the second."""
    if held_out is not None:
        from specdec.training.samples import read

        ids = [sample.tokens[: sample.prompt].tolist() for sample in read(held_out)]
        return [ids[i] for i in torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]  # not by length
    firsts = first_of_each(own(), 1)
    return [encode(tokenizer, prompt) for prompt in [*firsts, *(each for each in own() if each not in firsts)]]


def figures(done: dict[str, dict[str, Run]]) -> list[dict[str, Any]]:
    """One row of each way, temperature and number of prompts at once, those that were counted first."""
    groups: dict[tuple[str, float, int, str], dict[int, list[dict[str, Run]]]] = {}
    for key, runs in done.items():
        kind, _, temperature, rows, first = key.split("/")
        for name in runs:
            place = groups.setdefault((kind, float(temperature), int(rows), name), {})
            place.setdefault(int(first), []).append(runs)
    return [_figure(*group, found) for group, found in sorted(groups.items(), key=lambda item: item[0][:3])]


def _figure(
    kind: str, temperature: float, rows: int, name: str, found: dict[int, list[dict[str, Run]]]
) -> dict[str, Any]:
    every = [runs for each in found.values() for runs in each]
    row: dict[str, Any] = {"method": name, "kind": kind, "temperature": temperature, "rows": rows}
    row |= {"prompts": rows if kind == "counted" else len(found)}
    new, steps = (sum(runs[name][what] for runs in every) for what in ("new", "steps"))
    row["tokens_per_step"] = round(new / max(1, steps), 3)
    if kind == "counted":
        return row
    row["equal"] = all(runs[name]["said"] == runs[PLAIN]["said"] for runs in every)
    row["tokens_per_second"] = round(statistics.median(_speed(runs[name]) for runs in every), 2)
    return row | _over(found, name, PLAIN, "speedup") | _over(found, name, RIVAL, "over_assisted")


def _over(found: dict[int, list[dict[str, Run]]], name: str, other: str, called: str) -> dict[str, float]:
    """The median over prompts of a way's speed over another's, and its interval; nothing where that has no part."""
    ratios = [[_speed(runs[name]) / _speed(runs[other]) for runs in each if other in runs] for each in found.values()]
    if not all(ratios):
        return {}
    low, high = interval(ratios)
    median = round(statistics.median(map(statistics.median, ratios)), 3)
    return {called: median} | ({f"{called}_low": round(low, 3), f"{called}_high": round(high, 3)} if low == low else {})


def _speed(run: Run) -> float:
    return float(run["tokens"] / run["seconds"])


if __name__ == "__main__":
    typer.run(main)
