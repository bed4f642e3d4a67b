"""Generations by recorded steps: tokens, candidates and rows as without them, and who takes the ordinary path."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import specdec
from specdec import Session
from specdec.attach import attach
from specdec.drafters import MergedDrafter, RecyclingDrafter, SuffixDrafter
from specdec.graphed import GraphedBatch, GraphedSteps, facts, fits
from specdec.graphs import CudaRecording, feed, split
from specdec.kernels.ancestors import ancestors
from specdec.kernels.tree_attention import tree_attention
from specdec.model import Form, Model
from specdec.policies import FixedPolicy
from tests import tiny
from tests.test_batch import random_tree, started
from tests.test_graphs import DEVICE, GPU, Replayed

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def short_and_by_bits(monkeypatch):
    """Slots that soon run out, and on the CPU the attention that a GPU would have."""
    monkeypatch.setattr("specdec.graphed.SPARE", 8)
    monkeypatch.setattr("specdec.graphed.WIDTHS", (1, 2, 4, 8, 16))
    monkeypatch.setattr("specdec.attach.likely", lambda module, config: "bits")


class Counted:
    """Recordings and ordinary passes, as they are made."""

    def __init__(self, monkeypatch):
        self.recordings = self.passes = 0
        self.pool = torch.cuda.graph_pool_handle() if GPU else None
        forward = Model.forward

        def count(model, batch, hidden=False):
            self.passes += 1
            return forward(model, batch, hidden)

        monkeypatch.setattr(Model, "forward", count)

    def record(self, function):
        self.recordings += 1
        return CudaRecording(function, self.pool) if GPU else Replayed(function)


def wrapped(model, drafter, record):
    """Wrap the model, its steps recorded by ``record``; return what holds the recordings."""
    specdec.wrap(model, drafter, FixedPolicy(12, 5, 6), on_unsupported="error")
    found = replace(attach(model, timed=False), graphs=GraphedSteps(record))
    model.generate.speculate.trial = lambda module: found
    return found.graphs


def on_device(arguments):
    return {name: value.to(DEVICE) for name, value in arguments.items()}


def oracle(plain, arguments, topk=0):
    return tiny.Oracle(tiny.texts(plain, arguments["attention_mask"]), topk)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Olmo2", "Gemma"])
@pytest.mark.parametrize("lengths", [(9,), (7, 7), (12, 3, 8)])
@pytest.mark.parametrize("ends", [None, 5])
def test_whole_generations(kind, lengths, ends, monkeypatch):
    model, arguments = tiny.model(kind).to(DEVICE), on_device(tiny.padded(*lengths))
    more = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": ends}
    plain, count = model.generate(**arguments, **more), Counted(monkeypatch)
    wrapped(model, oracle(plain, arguments), count.record)
    count.passes = 0
    assert model.generate(**arguments, **more).tolist() == plain.tolist()
    stats = specdec.stats(model)
    assert stats.accepted > 0
    assert not stats.reasons
    assert stats.fault_count == 0
    assert count.passes == 1  # to try out the slots
    assert 1 < count.recordings <= 5
    assert model.generate(**arguments, **more).tolist() == plain.tolist()
    assert count.passes == 1
    assert count.recordings <= 5  # those of before


def test_drafters_learn_the_same(monkeypatch):
    model, ids, told = tiny.model().to(DEVICE), tiny.prompt(20).to(DEVICE), []

    class Listening(tiny.Oracle):
        def draft(self, contexts, budgets):
            told[-1] += [context.verdict for context in contexts]
            return super().draft(contexts, budgets)

    plain = model.generate(ids, max_new_tokens=40, **GREEDY)
    for record in (Replayed, None):
        told.append([])
        wrapped(model, Listening(plain.tolist(), topk=5), record).enabled = record is not None
        assert torch.equal(model.generate(ids, max_new_tokens=40, **GREEDY), plain)
    for ours, theirs in zip(*told, strict=True):
        assert ours.tree.tokens.tolist() == theirs.tree.tokens.tolist()
        assert ours.path.tolist() == theirs.path.tolist()
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.candidates.tolist() == theirs.candidates.tolist()
    assert len(told[0]) > 10


def test_drafters_of_ours_by_graphs(monkeypatch):
    model, ids = tiny.model().to(DEVICE), tiny.prompt(20).to(DEVICE)
    plain, count = model.generate(ids, max_new_tokens=120, **GREEDY), Counted(monkeypatch)
    wrapped(model, MergedDrafter([SuffixDrafter(), RecyclingDrafter()]), count.record)
    assert torch.equal(model.generate(ids, max_new_tokens=120, **GREEDY), plain)
    assert specdec.stats(model).accepted > 0
    assert count.recordings > 1


def test_slots_grow(monkeypatch):
    monkeypatch.setattr("specdec.graphed.RESERVED", 0)
    model, arguments, made = tiny.model().to(DEVICE), on_device(tiny.padded(9, 4)), []
    plain, count = model.generate(**arguments, max_new_tokens=180, **GREEDY), Counted(monkeypatch)
    init = GraphedBatch.__init__

    def note(batch, model, facts, capacity, record):
        made.append(capacity)
        init(batch, model, facts, capacity, record)

    monkeypatch.setattr(GraphedBatch, "__init__", note)
    wrapped(model, oracle(plain, arguments), count.record)
    assert torch.equal(model.generate(**arguments, max_new_tokens=180, **GREEDY), plain)
    assert made[0] == 56  # twice what is needed first, in eights; then twice what there was
    assert len(made) == 3
    assert all(later >= 2 * former for former, later in pairwise(made))
    assert count.recordings > 5
    assert torch.equal(model.generate(**arguments, max_new_tokens=180, **GREEDY), plain)
    assert len(made) == 3


def test_a_text_of_known_length_needs_no_growth(monkeypatch):
    model, ids, count = tiny.model().to(DEVICE), tiny.prompt().to(DEVICE), Counted(monkeypatch)
    graphs = wrapped(model, tiny.Oracle(), count.record)
    model.generate(ids, max_new_tokens=20, **GREEDY)
    assert [batch.capacity for batch in graphs._batches.values()] == [48]  # 9 + 20 + 16, in eights
    model.generate(ids, max_new_tokens=10, **GREEDY)
    assert [batch.capacity for batch in graphs._batches.values()] == [48]


def test_trees_wider_than_any_recording_take_the_ordinary_path(monkeypatch):
    monkeypatch.setattr("specdec.graphed.WIDTHS", (1, 2, 4))
    model, arguments = tiny.model().to(DEVICE), on_device(tiny.padded(9, 5))
    plain, count = model.generate(**arguments, max_new_tokens=80, **GREEDY), Counted(monkeypatch)
    wrapped(model, oracle(plain, arguments), count.record)
    count.passes = 0
    assert torch.equal(model.generate(**arguments, max_new_tokens=80, **GREEDY), plain)
    assert 1 < count.recordings <= 3
    assert 3 < count.passes < specdec.stats(model).steps / 2 - 3


def test_rows_that_are_handed_back_stay(monkeypatch):
    model, ids, other = tiny.model().to(DEVICE), tiny.prompt(9).to(DEVICE), tiny.prompt(30, seed=1).to(DEVICE)
    more = {"max_new_tokens": 20, "return_dict_in_generate": True, **GREEDY}
    plain, count = model.generate(ids, **more), Counted(monkeypatch)
    wrapped(model, tiny.Oracle(plain.sequences.tolist()), count.record)
    ours = model.generate(ids, **more)
    assert count.recordings
    model.generate(other, max_new_tokens=40, **GREEDY)  # in the same slots
    for mine, theirs in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=0, atol=1e-4)


def test_sessions_read_on_behind_rows_that_were_in_slots(monkeypatch):
    model, ids, count = tiny.model().to(DEVICE), tiny.prompt(9).to(DEVICE), Counted(monkeypatch)
    session = Session(model, drafter=tiny.Oracle(), policy=FixedPolicy(4, 2, 2))
    found = replace(attach(model, timed=False), graphs=GraphedSteps(count.record))
    session._generate.speculate.trial = lambda module: found
    for _ in range(3):
        plain = type(model).generate(model, ids, max_new_tokens=20, **GREEDY)
        ids = session.generate(ids, max_new_tokens=20, **GREEDY)
        assert torch.equal(ids, plain)
        ids = torch.cat([ids, tiny.prompt(5, seed=ids.shape[1]).to(DEVICE)], 1)
    assert session.stats.reused_tokens > 40
    assert count.recordings


def test_a_recording_that_fails_says_so_once(monkeypatch):
    model, arguments = tiny.model().to(DEVICE), on_device(tiny.padded(9, 5))
    plain, made = model.generate(**arguments, max_new_tokens=60, **GREEDY), []

    def record(function):
        made.append(Replayed(function))
        if len(made) > 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        return made[-1]

    wrapped(model, oracle(plain, arguments), record)
    with pytest.warns(specdec.SpecdecWarning, match="stream is capturing"):
        assert torch.equal(model.generate(**arguments, max_new_tokens=60, **GREEDY), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(**arguments, max_new_tokens=60, **GREEDY), plain)
    assert len(made) == 3
    why = "steps are not recorded as graphs: RuntimeError: operation not permitted when stream is capturing"
    assert specdec.stats(model).reasons == [why]


def test_slots_that_do_not_do_as_the_ordinary_pass_are_not_used(monkeypatch):
    model, ids = tiny.model().to(DEVICE), tiny.prompt().to(DEVICE)
    plain, count = model.generate(ids, max_new_tokens=20, **GREEDY), Counted(monkeypatch)
    take = GraphedBatch.take

    def wrong(batch, model):
        take(batch, model)
        batch.shift += 3

    monkeypatch.setattr(GraphedBatch, "take", wrong)
    wrapped(model, tiny.Oracle(plain.tolist()), count.record)
    with pytest.warns(specdec.SpecdecWarning, match="differ by .* from an ordinary pass"):
        assert torch.equal(model.generate(ids, max_new_tokens=20, **GREEDY), plain)
    assert not count.recordings


def test_what_does_not_fit_takes_the_ordinary_path_in_silence(monkeypatch):
    ids, count = tiny.prompt(9).to(DEVICE), Counted(monkeypatch)
    for model, more in (
        (tiny.model("Mistral", sliding_window=6), {}),
        (tiny.model("Gemma2", sliding_window=6), {}),
        (tiny.model(), {"repetition_penalty": 1.2}),
        (tiny.model(), {"do_sample": True}),
        (tiny.model(), {"output_scores": True, "return_dict_in_generate": True}),
    ):
        more = {"max_new_tokens": 12, **GREEDY, **more}
        plain = tiny.both(model.to(DEVICE), {"input_ids": ids}, **more).plain
        wrapped(model, tiny.Oracle(tiny.sequences(plain).tolist()), count.record)
        torch.manual_seed(0)
        assert torch.equal(tiny.sequences(model.generate(ids, **more)), tiny.sequences(plain))
        assert specdec.stats(model).reasons == []
    assert not count.recordings


def test_hooks_are_called(monkeypatch):
    model, ids, calls = tiny.model().to(DEVICE), tiny.prompt(9).to(DEVICE), []
    count = Counted(monkeypatch)
    wrapped(model, tiny.Oracle(), count.record)
    model.generate(ids, max_new_tokens=10, **GREEDY)
    assert count.recordings
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(ids, max_new_tokens=10, **GREEDY)
    assert len(calls) >= 5
    hook.remove()


def test_changed_weights_are_recorded_anew(monkeypatch):
    model, ids, count = tiny.model().to(DEVICE), tiny.prompt(9).to(DEVICE), Counted(monkeypatch)
    wrapped(model, tiny.Oracle(), count.record)
    made = []
    for change in (None, "in place", None, "replaced"):
        weight = model.model.layers[0].mlp.up_proj.weight
        if change == "in place":
            weight.data.mul_(-1)
        elif change == "replaced":
            model.model.layers[0].mlp.up_proj.weight = nn.Parameter(-weight.detach())
        count.recordings = 0
        plain = type(model).generate(model, ids, max_new_tokens=10, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=10, **GREEDY), plain)
        made.append(count.recordings > 0)
    assert made == [True, False, False, True]


def test_one_generation_at_a_time_has_the_slots(monkeypatch):
    model, ids, other = tiny.model().to(DEVICE), tiny.prompt(9).to(DEVICE), tiny.prompt(7, seed=2).to(DEVICE)
    plain = [model.generate(each, max_new_tokens=12, **GREEDY) for each in (ids, other)]
    count, inner = Counted(monkeypatch), []
    wrapped(model, tiny.Oracle(), count.record)

    class Nested:
        def put(self, tokens):
            if len(inner) < 3:
                inner.append(None)
                inner[-1] = model.generate(other, max_new_tokens=12, **GREEDY)

        def end(self):
            pass

    assert torch.equal(model.generate(ids, max_new_tokens=12, streamer=Nested(), **GREEDY), plain[0])
    assert len(inner) == 3
    assert all(torch.equal(each, plain[1]) for each in inner)
    count.passes = 0
    model.generate(ids, max_new_tokens=12, **GREEDY)  # and gives them back
    assert count.passes == 0


def test_after_an_error_the_slots_are_free(monkeypatch):
    model, ids, count = tiny.model().to(DEVICE), tiny.prompt(9).to(DEVICE), Counted(monkeypatch)
    wrapped(model, tiny.Oracle(), count.record)

    class Broken:
        def put(self, tokens):
            raise OSError("pipe")

        def end(self):
            pass

    with pytest.raises(OSError, match="pipe"):
        model.generate(ids, max_new_tokens=12, streamer=Broken(), **GREEDY)
    model.generate(ids, max_new_tokens=12, **GREEDY)
    assert count.recordings


def test_inference_mode_leaves_slots_that_others_may_write(monkeypatch):
    model, ids, count = tiny.model().to(DEVICE), tiny.prompt(9).to(DEVICE), Counted(monkeypatch)
    plain = model.generate(ids, max_new_tokens=20, **GREEDY)
    wrapped(model, tiny.Oracle(plain.tolist()), count.record)
    count.passes = 0
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, max_new_tokens=20, **GREEDY), plain)
    assert torch.equal(model.generate(ids, max_new_tokens=20, **GREEDY), plain)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, max_new_tokens=20, **GREEDY), plain)
    assert specdec.stats(model).reasons == []
    assert count.passes == 1


def test_few_sizes_of_batch_are_kept(monkeypatch):
    model, count = tiny.model().to(DEVICE), Counted(monkeypatch)
    graphs = wrapped(model, tiny.Oracle(), count.record)
    for rows in (1, 2, 3, 4, 3, 2):
        model.generate(tiny.prompt(9, rows).to(DEVICE), max_new_tokens=6, **GREEDY)
    assert sorted(graphs._batches) == [2, 3, 4]


class ReadBack(TorchDispatchMode):
    """Raises where the host looks at a tensor, or hands one to the device: what a capture must not do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        forbidden = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "unique", "equal")
        assert not name.removeprefix("aten::").startswith(forbidden), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Olmo2", "Gemma", "Qwen3"])
def test_a_pass_is_the_same_work_whatever_its_inputs_hold(kind, monkeypatch):
    """What is recorded once is right for other trees and lengths: nothing of them is read on the host, or kept."""

    def reference(*args, **kwargs):
        return tree_attention(*args, **kwargs, impl="reference")

    monkeypatch.setattr("specdec.attention.tree_attention", reference)
    module, random = tiny.model(kind), np.random.default_rng(0)
    model, _ = started(module, Form("tree", attention="bits"), tiny.prompt(9, 2))
    assert fits(model)
    batch = GraphedBatch(model, facts(model, 1), 64, Replayed)
    batch.take(model)

    def run(tokens, positions, words, lengths):
        for layer in batch.layers:
            layer.lengths = lengths
        return batch.forward(tokens, positions, words, lengths), batch.layers[-1].keys.clone()

    def inputs(*lengths):
        trees = [random_tree(random, int(random.integers(3, 90))) for _ in lengths]
        tokens, parents, depth, longs = split(feed(trees, lengths, 8))
        return tokens, longs[:, None] + depth, ancestors(parents), longs

    with torch.no_grad():
        first = inputs(8, 8)
        with ReadBack():
            run(*first)
        recorded = make_fx(run)(*first)
        for lengths in ((8, 8), (11, 8), (30, 17)):
            given = inputs(*lengths)
            for ours, theirs in zip(recorded(*given), run(*given), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.skipif(GPU, reason="on a GPU they are recorded unasked")
def test_on_a_cpu_nothing_is_recorded_unasked(monkeypatch):
    model, count = tiny.model(), Counted(monkeypatch)
    wrapped(model, tiny.Oracle(), None)
    count.passes = 0
    model.generate(tiny.prompt(), max_new_tokens=10, **GREEDY)
    assert count.passes == specdec.stats(model).steps - 1
