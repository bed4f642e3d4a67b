"""What the kernels of trees, caches and sampling mean: their references against the papers and the parts of today."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch

from specdec import trees
from specdec.cache import SlotCache, SlotLayer
from specdec.kernels.ancestors import ancestors
from specdec.kernels.dispatch import resolve
from specdec.kernels.gumbel import gumbel_topk
from specdec.kernels.move_rows import move_rows
from specdec.kernels.residual import sample_residual, swor_step
from specdec.kernels.walk import walk

SIZES = (1, 2, 63, 64, 65, 200)
T, D = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])


def random_parents(nodes: int) -> np.ndarray:
    return np.array([-1, *(np.random.default_rng(nodes).integers(max(0, i - 9), i) for i in range(1, nodes))])


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("impl", ["reference", "numba", "auto"])
def test_ancestors_are_the_closure_of_parents(nodes, impl):
    parents = np.stack([random_parents(nodes), np.arange(-1, nodes - 1), np.full(nodes, -1)])
    words = ancestors(torch.from_numpy(parents), impl=impl).numpy()
    assert words.shape == (3, nodes, -(-nodes // 64))
    for row, bits in zip(parents, words.view(np.uint8), strict=True):
        graph = networkx.DiGraph([(p, i) for i, p in enumerate(row.tolist()) if p >= 0])
        graph.add_nodes_from(range(nodes))
        seen = np.unpackbits(bits, axis=1, bitorder="little")
        for node in range(nodes):
            assert set(np.flatnonzero(seen[node])) == networkx.ancestors(graph, node) | {node}
    assert np.array_equal(words[0].view(np.uint64), trees.ancestor_words(parents[0]))


@pytest.mark.parametrize("nodes", SIZES)
def test_walk_is_the_verifiers(nodes):
    rng = np.random.default_rng(nodes)
    parents = np.stack([random_parents(nodes), np.arange(-1, nodes - 1)])
    tokens, choices = rng.integers(3, size=(2, 2, nodes))
    choices[1] = np.roll(tokens[1], -1)
    paths, bonus = walk(*(torch.from_numpy(array) for array in (tokens, parents, choices)))
    for row in range(2):
        wanted = trees.greedy_path(tokens[row], parents[row], choices[row])
        assert paths[row].tolist() == [*wanted, *[-1] * (nodes - len(wanted))]
        assert bonus[row] == choices[row, wanted[-1]]


def test_what_fills_up_a_smaller_tree_is_not_accepted():
    tokens, parents = torch.tensor([[5, 7, 5, 5]]), torch.tensor([[-1, 0, -1, -1]])
    paths, bonus = walk(tokens, parents, torch.tensor([[7, 5, 5, 5]]))
    assert (paths.tolist(), bonus.tolist()) == ([[0, 1, -1, -1]], [5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("impl", ["reference", "numba", "auto"])
def test_moved_rows_are_those_that_the_cache_keeps(impl, dtype):
    lengths, paths = [3, 7], [[0, 2, 3, 6], [0, 1]]
    layer = SlotLayer()
    layer.lengths = list(lengths)
    layer.update(torch.randn(2, 3, 8, 4).to(dtype), torch.randn(2, 3, 8, 6).to(dtype))
    whole = torch.cat([layer._keys, layer._values], 3)
    keys, values = whole[..., :4], whole[..., 4:]  # slots that do not lie side by side
    padded = torch.tensor([[0, 2, 3, 6], [0, 1, -1, -1]])
    move_rows(keys, values, padded, torch.tensor(lengths), impl=impl)
    SlotCache(layers=[layer]).keep(lengths, paths)
    assert torch.equal(keys, layer._keys)
    assert torch.equal(values, layer._values)


@pytest.mark.parametrize("nodes", SIZES)
def test_any_path_moves_alike(nodes):
    chosen = torch.rand(2, nodes, generator=torch.Generator().manual_seed(nodes)) < 0.5
    chosen[:, 0] = True
    paths = torch.full((2, nodes), -1)
    for row in range(2):
        kept = chosen[row].nonzero()[:, 0]
        paths[row, : len(kept)] = kept
    slots = torch.arange(2 * 3 * (nodes + 9) * 5).view(2, 3, nodes + 9, 5)
    ours, reference = slots.clone(), slots.clone()
    move_rows(ours, ours[..., :2].clone(), paths, torch.tensor([9, 0]), impl="numba")
    move_rows(reference, reference[..., :2].clone(), paths, torch.tensor([9, 0]), impl="reference")
    assert torch.equal(ours, reference)


class TestResidual:
    def test_draws_follow_the_residual(self):
        """G1: norm(max(T - D, 0)) is (.75, .25, 0, 0)."""
        grid = torch.arange(1000) / 1000
        drawn = sample_residual(T.expand(1000, 4), D.expand(1000, 4), grid)
        assert torch.bincount(drawn, minlength=4).tolist() == [750, 250, 0, 0]

    def test_nothing_left_falls_back_to_the_target(self):
        drawn = sample_residual(T.expand(10, 4), T.expand(10, 4), torch.arange(10) / 10 + 0.05)
        assert torch.bincount(drawn, minlength=4).tolist() == [4, 3, 2, 1]

    def test_tokens_without_probability_are_never_drawn(self):
        p = torch.tensor([[0, 0.5, 0, 0.5, 0]])
        uniform = torch.tensor([0, 0.4999, 0.5, 1 - 2**-24])
        drawn = sample_residual(p.expand(4, 5), torch.zeros(4, 5), uniform)
        assert drawn.tolist() == [1, 1, 3, 3]

    def test_siblings_in_turn(self):
        """G2: with draws 3, 2, 1 the target and the drafter become these."""
        p, q = T.clone(), D.clone()
        assert swor_step(p.clone(), q.clone(), torch.tensor([3]), torch.tensor([0.2499])).item()
        for token, target, drafter in (
            (3, [0.75, 0.25, 0, 0], [1 / 6, 1 / 3, 1 / 2, 0]),
            (2, [1, 0, 0, 0], [1 / 3, 2 / 3, 0, 0]),
            (1, [1, 0, 0, 0], [1, 0, 0, 0]),
        ):
            assert not swor_step(p, q, torch.tensor([token]), torch.tensor([0.2501])).item()
            torch.testing.assert_close(p, torch.tensor([target]).float())
            torch.testing.assert_close(q, torch.tensor([drafter]).float())

    @pytest.mark.parametrize("siblings", [1, 2, 3, 4])
    def test_the_law_is_the_targets(self, siblings):
        """Exact enumeration over every ordered draw of siblings."""
        rng = torch.Generator().manual_seed(siblings)
        p, q = (torch.rand(1, 4, generator=rng, dtype=torch.float64).square() for _ in range(2))
        p, q = p / p.sum(), q / q.sum()
        assert (law(p, q, siblings) - p).abs().max() < 1e-12

    def test_an_accepted_row_is_left_alone(self):
        p, q = T.clone(), D.clone()
        assert swor_step(p, q, torch.tensor([0]), torch.tensor([0.99])).item()
        assert torch.equal(p, T)
        assert torch.equal(q, D)

    def test_a_rejection_that_leaves_nothing_leaves_the_target(self):
        p, q = T * (1 - 1e-6), T.clone()
        assert not swor_step(p, q, torch.tensor([0]), torch.tensor([1 - 2**-24])).item()
        assert torch.equal(p, T * (1 - 1e-6))

    def test_a_drafter_with_one_token_left(self):
        q = torch.tensor([[0, 1.0, 0, 0]])
        p = torch.tensor([[1.0, 0, 0, 0]])
        assert not swor_step(p, q, torch.tensor([1]), torch.tensor([0.0])).item()
        assert q.tolist() == [[0, 0, 0, 0]]
        assert p.tolist() == [[1, 0, 0, 0]]

    def test_what_the_target_never_says_is_not_accepted(self):
        p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        assert not swor_step(p, q, torch.tensor([1]), torch.tensor([0.0])).item()


def law(p: torch.Tensor, q: torch.Tensor, siblings: int) -> torch.Tensor:
    """The token's law when siblings are drawn from q without replacement and judged in turn, by ``swor_step``."""
    if siblings == 0:
        return p
    out = torch.zeros_like(p)
    for x in q[0].nonzero()[:, 0].tolist():
        accept = min(1.0, (p[0, x] / q[0, x]).item())
        out[0, x] += q[0, x] * accept
        assert stepped(p, q, x, accept - 1e-9)[0] or accept == 0
        if accept < 1:
            accepted, p_next, q_next = stepped(p, q, x, accept + 1e-9)
            assert not accepted
            out += q[0, x] * (1 - accept) * law(p_next, q_next, siblings - 1)
    return out


def stepped(p: torch.Tensor, q: torch.Tensor, x: int, uniform: float) -> tuple[bool, torch.Tensor, torch.Tensor]:
    p, q = p.clone(), q.clone()
    accepted = swor_step(p, q, torch.tensor([x]), torch.tensor([max(0.0, uniform)], dtype=torch.float64))
    return bool(accepted), p, q


class TestGumbel:
    @pytest.mark.parametrize("impl", ["reference", "numba", "auto"])
    def test_perturbed_logits_in_order(self, impl):
        """G7: log D and these Gumbels order the tokens 2, 3, 1, 0."""
        noise = (-torch.tensor([[0.3, -0.2, 0.9, 0.1]])).exp()
        tokens, perturbed = gumbel_topk(D.log(), noise, 4, impl=impl)
        assert tokens.tolist() == [[2, 3, 1, 0]]
        torch.testing.assert_close(perturbed, torch.tensor([[-0.303973, -0.816291, -1.809438, -2.002585]]))

    def test_draws_follow_the_law_without_replacement(self):
        torch.manual_seed(0)
        n = 200_000
        tokens, _ = gumbel_topk(T.log().expand(n, 4), torch.empty(n, 4).exponential_(), 2)
        got = torch.zeros(4, 4).index_put_((tokens[:, 0], tokens[:, 1]), torch.tensor(1.0), accumulate=True) / n
        wanted = T.T * T / (1 - T.T) * (1 - torch.eye(4))
        assert (got - wanted).abs().max() < 4 * (0.25 / n) ** 0.5

    def test_no_noise_makes_an_impossible_token_possible(self):
        logits = torch.tensor([[0.0, -torch.inf, -80.0]])
        tokens, perturbed = gumbel_topk(logits, torch.zeros(1, 3), 3)
        assert tokens.tolist() == [[0, 2, 1]]
        assert perturbed[0, :2].isfinite().all()
        assert perturbed[0, 2] == -torch.inf

    def test_one_draw_is_torchs_own(self):
        probabilities = torch.rand(50, 300).softmax(-1)
        torch.manual_seed(3)
        wanted = torch.multinomial(probabilities, 1)
        torch.manual_seed(3)
        tokens, _ = gumbel_topk(probabilities.log(), torch.empty(50, 300).exponential_())
        assert torch.equal(tokens, wanted)


P = torch.zeros(2, 3)
IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: walk(IDS, IDS[:1], IDS), r"\[rows, nodes\] alike"),
        (lambda: walk(IDS, IDS, IDS, impl="numba"), "impl is 'numba'"),
        (lambda: ancestors(IDS.to("meta"), impl="numba"), "'numba' cannot run on meta"),
        (lambda: move_rows(P[None, None], P[None, None], IDS, IDS[0, :1]), "have 1, 1, 2, 1 rows"),
        (lambda: sample_residual(P, P[:1], P[:, 0]), r"\(2, 3\), \(1, 3\) and \(2,\)"),
        (lambda: swor_step(P, P, IDS[:, 0], P[0]), r"uniform \[rows\]"),
        (lambda: gumbel_topk(P, P[:1]), r"\(2, 3\) and \(1, 3\)"),
        (lambda: gumbel_topk(P, P, 4), "k is 4, the vocabulary has 3"),
        (lambda: gumbel_topk(P, P, impl="fast"), "impl is 'fast'; use 'auto', 'reference', 'triton', 'numba'"),
    ],
)
def test_what_cannot_run_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("impl", ["triton", "numba"])
def test_an_explicit_twin_that_cannot_run_is_refused(impl, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run on meta|impl='triton' cannot run on cpu"):
        resolve(impl, torch.empty(0, device="cpu" if impl == "triton" else "meta"), cpu="numba")
    assert resolve("auto", torch.empty(0, device="meta"), cpu="numba") == "reference"
    assert resolve("auto", torch.empty(0), cpu="numba") == "numba"
