"""Every Triton kernel against its reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch

from tests.compile_triton import interpret_without_gpu

interpret_without_gpu()  # before anything below imports Triton

from specdec.kernels.ancestors import ancestors  # noqa: E402
from specdec.kernels.dispatch import runs_triton  # noqa: E402
from specdec.kernels.gumbel import gumbel_topk  # noqa: E402
from specdec.kernels.move_rows import move_rows  # noqa: E402
from specdec.kernels.residual import sample_residual, swor_step  # noqa: E402
from specdec.kernels.topk import topk  # noqa: E402
from specdec.kernels.walk import walk  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (1, 2, 63, 64, 65, 1000)
pytestmark = pytest.mark.skipif(
    not runs_triton(torch.empty(0, device=DEVICE)), reason="no GPU, and Triton was imported without its interpreter"
)


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory holds NaN, and the greatest integer: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def random_parents(rows: int, nodes: int, padded: bool = True) -> torch.Tensor:
    """Of random trees, the later rows smaller and filled up."""
    parents = torch.full((rows, nodes), -1)
    for row in range(rows):
        for node in range(1, max(1, nodes - row * nodes // 3 if padded else nodes)):
            parents[row, node] = int(torch.randint(max(0, node - 40), node, ()))
    return parents.to(DEVICE)


def chains(rows: int, nodes: int) -> torch.Tensor:
    return torch.arange(-1, nodes - 1, device=DEVICE).expand(rows, -1)


@pytest.mark.parametrize("nodes", SIZES)
class TestTrees:
    def test_ancestors(self, nodes):
        for parents in (random_parents(2, nodes), chains(1, min(nodes, 66))):
            wanted = ancestors(parents, impl="reference")
            assert torch.equal(ancestors(parents, impl="triton"), wanted)
            assert torch.equal(ancestors(parents), wanted)

    def test_walk(self, nodes):
        for parents in (random_parents(4, nodes), chains(4, min(nodes, 66))):
            tokens = torch.randint(3, parents.shape, device=DEVICE)
            choices = torch.randint(3, parents.shape, device=DEVICE)
            choices[3] = tokens[3].roll(-1)  # a chain is accepted whole
            wanted = walk(tokens, parents, choices, impl="reference")
            for got, right in zip(walk(tokens, parents, choices, impl="triton"), wanted, strict=True):
                assert torch.equal(got, right)

    def test_move_rows(self, nodes):
        rows, heads = 3, 2
        keys = torch.randn(rows, heads, nodes + 20, 24, device=DEVICE)
        values = torch.randn(rows, heads, nodes + 20, 5, device=DEVICE).bfloat16()
        paths = torch.full((rows, nodes), -1, device=DEVICE)
        for row in range(rows):
            path = torch.randperm(nodes)[: max(1, nodes // (row + 1))].sort().values
            path[0] = 0
            paths[row, : len(path)] = path
        base = torch.tensor([3, 0, 20], device=DEVICE)
        wanted = keys.clone(), values.clone()
        move_rows(*wanted, paths, base, impl="reference")
        move_rows(keys, values, paths, base, impl="triton")
        assert torch.equal(keys, wanted[0])
        assert torch.equal(values, wanted[1])


def ties(rows, vocab):
    return torch.randint(-2, 3, (rows, vocab)).float()


def negative(rows, vocab):
    return torch.log_softmax(torch.randn(rows, vocab), 1)


def signed_zeros(rows, vocab):
    return torch.where(torch.rand(rows, vocab) < 0.5, 0.0, -0.0)


def odd(rows, vocab):
    """Zeros of both signs, infinities, and NaN of both signs."""
    few = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -3.0])
    return few[torch.randint(len(few), (rows, vocab))]


@pytest.mark.parametrize("vocab", [*SIZES, 4096, 4097, 9000])
class TestVocabulary:
    @pytest.mark.parametrize("kind", [torch.randn, ties, negative, signed_zeros, odd], ids=lambda kind: kind.__name__)
    def test_topk(self, vocab, kind):
        logits = kind(3, vocab).to(DEVICE)
        for cut in (logits, logits.bfloat16(), logits.half(), logits.T[:vocab].T, logits[::2]):
            for k in {1, min(8, vocab), min(16, vocab)}:
                assert torch.equal(topk(cut, k, impl="triton"), topk(cut, k, impl="reference"))

    def test_gumbel(self, vocab):
        logits = torch.randn(3, vocab, device=DEVICE)
        logits[1, vocab // 3 :] = -math.inf
        noise = torch.empty_like(logits).exponential_()
        noise[2, ::2] = 0
        for k in {1, min(8, vocab), min(16, vocab)}:
            tokens, perturbed = gumbel_topk(logits, noise, k, impl="reference")
            got, values = gumbel_topk(logits, noise, k, impl="triton")
            assert torch.equal(got, tokens)
            torch.testing.assert_close(values, perturbed, rtol=1e-5, atol=1e-5)

    def test_residual(self, vocab):
        p, q, _, uniform = laws(vocab)
        got = sample_residual(p, q, uniform, impl="triton")
        assert torch.equal(got, sample_residual(p, q, uniform, impl="reference"))

    def test_swor_step(self, vocab):
        p, q, tokens, uniform = laws(vocab)
        theirs = p.clone(), q.clone()
        wanted = swor_step(*theirs, tokens, uniform, impl="reference")
        assert torch.equal(swor_step(p, q, tokens, uniform, impl="triton"), wanted)
        torch.testing.assert_close(p, theirs[0], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(q, theirs[1], rtol=1e-5, atol=1e-9)
        assert vocab == 1 or 0 < wanted.sum() < len(wanted)


def laws(vocab: int, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target and drafter, a draw of the drafter's and a uniform number; with rows of the awkward kinds."""
    p, q = torch.randn(2, rows, vocab, device=DEVICE).mul(2).softmax(-1)
    p[0] = q[0] * (1 - 1e-6)  # nothing is left
    p[1, : vocab // 2], q[2, vocab // 2 :] = 0, 0
    q[3] = 0
    p[4] = q[5] = torch.nn.functional.one_hot(torch.tensor(vocab - 1), vocab)
    tokens, uniform = q.argmax(-1), torch.rand(rows, device=DEVICE)
    uniform[0], uniform[1], uniform[7] = 1 - 2**-24, 0, 1 - 2**-24
    tokens[1] = 0
    return p, q, tokens, uniform


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_share_just_reached_goes_to_the_next_token(impl):
    p = torch.tensor([[0.25, 0, 0.25, 0.5, 0]], device=DEVICE).repeat(4, 1)
    uniform = torch.tensor([0, 0.25, 0.5, 0.75], device=DEVICE)
    assert sample_residual(p, torch.zeros_like(p), uniform, impl=impl).tolist() == [0, 2, 3, 3]
