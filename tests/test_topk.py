"""The k most likely tokens: every implementation against a stable sort."""

import math

import pytest
import torch

from specdec.kernels.topk import topk

VOCABS = (1, 2, 63, 64, 65, 127, 128, 129, 1000, 5003)
NEGATIVE_NAN = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32).item()


def ties(rows, vocab):
    return torch.randint(-2, 3, (rows, vocab)).float()


def signed_zeros(rows, vocab):
    return torch.where(torch.rand(rows, vocab) < 0.5, 0.0, -0.0)


def negative(rows, vocab):
    return torch.log_softmax(torch.randn(rows, vocab), 1)


def masked(rows, vocab):
    return torch.randn(rows, vocab).masked_fill(torch.rand(rows, vocab) < 0.99, -math.inf)


def poisoned(rows, vocab):
    logits = ties(rows, vocab).masked_fill(torch.rand(rows, vocab) < 0.02, math.nan)
    # The processor's own NaN, of inf - inf, has its sign bit set; as an integer it is less than every number.
    bits = torch.where(torch.rand(rows, vocab) < 0.02, -0x400000, logits.view(torch.int32))
    return bits.view(torch.float32).masked_fill(torch.rand(rows, vocab) < 0.02, math.inf)


def ascending(rows, vocab):
    return torch.arange(vocab).float().expand(rows, vocab)


def constant(rows, vocab):
    return torch.full((rows, vocab), -math.inf)


KINDS = (torch.randn, ties, signed_zeros, negative, masked, poisoned, ascending, constant)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_numba_is_the_reference(kind, vocab):
    torch.manual_seed(vocab)
    logits = kind(3, vocab)
    for k in {1, min(8, vocab), min(33, vocab), min(vocab, 200)}:
        got = topk(logits, k, impl="numba")
        assert got.dtype == torch.int64
        assert torch.equal(got, topk(logits, k, impl="reference"))
        assert torch.equal(got[:, 0], logits.argmax(1))


def test_nan_of_either_sign_is_the_greatest():
    logits = torch.tensor([[1.0, NEGATIVE_NAN, math.inf, math.nan, -math.inf]])
    assert math.copysign(1, logits[0, 1]) == -1
    for impl in ("numba", "reference"):
        assert topk(logits, 5, impl=impl).tolist() == [[1, 3, 2, 0, 4]]


@pytest.mark.parametrize(
    "cut",
    [
        lambda logits: logits[::2],
        lambda logits: logits[1:, 5:700],
        lambda logits: logits[:, ::3],
        lambda logits: logits.T,
        lambda logits: logits[:1].expand(4, -1),
        lambda logits: logits.view(3, 2, 1000)[:, -1],
        lambda logits: logits[:0],
        lambda logits: logits.bfloat16(),
        lambda logits: logits.half(),
        lambda logits: logits.clone().requires_grad_(),
    ],
)
def test_any_layout(cut):
    torch.manual_seed(0)
    logits = cut(torch.randn(6, 1000))
    k = min(8, logits.shape[1])
    for impl in ("numba", "auto"):
        assert torch.equal(topk(logits, k, impl=impl), topk(logits, k, impl="reference"))
    assert topk(logits, 0).shape == (logits.shape[0], 0)


def test_torch_finds_the_same_where_nothing_ties():
    logits = torch.stack([torch.randperm(5000) for _ in range(4)]).float()
    for k in (8, 100):
        wanted = topk(logits, k, impl="reference")
        assert torch.equal(topk(logits, k, impl="torch"), wanted)
        assert torch.equal(topk(logits, k), wanted)
        assert torch.equal(topk(logits.double(), k), wanted)


def test_logits_are_not_written():
    logits = torch.randn(2, 300)
    before = logits.clone()
    topk(logits, 8)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("logits", "k", "impl", "words"),
    [
        (torch.zeros(5), 2, "auto", r"\[rows, vocab\]"),
        (torch.zeros(1, 5, dtype=torch.int64), 2, "auto", "int64"),
        (torch.zeros(1, 5), 6, "auto", "k is 6, the vocabulary has 5"),
        (torch.zeros(1, 5), -1, "auto", "k is -1"),
        (torch.zeros(1, 5), 2, "fast", "impl is 'fast'"),
        (torch.zeros(1, 5, dtype=torch.float64), 2, "numba", "float64 on cpu"),
        (torch.zeros(1, 5, device="meta"), 2, "numba", "float32 on meta"),
    ],
)
def test_what_cannot_run_is_refused(logits, k, impl, words):
    with pytest.raises(ValueError, match=words):
        topk(logits, k, impl=impl)
