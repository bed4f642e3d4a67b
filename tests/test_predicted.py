"""PredictedOutput: a text that the answer resembles is copied, and taken up again after every kind of edit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import trees
from specdec.core import Budget, Context, DraftTree, Verdict
from specdec.drafters import MergedDrafter, NgramDrafter, predicted_numba
from specdec.drafters.predicted import PredictedOutput, prior
from tests import tiny

CHAIN = Budget(nodes=8, depth=8, width=1)
WIDE = Budget(nodes=16, depth=8, width=4)
PROMPT = [900, 901, 902]
RNG = np.random.default_rng(0)
UNIQUE = RNG.permutation(800)[:300].tolist()


def commit(context, tokens):
    context.extend(Verdict(DraftTree.root(int(context.tokens[-1])), np.zeros(1, np.int64), np.array(tokens, np.int64)))


def draft(drafter, context, budget=WIDE):
    [tree] = drafter.draft([context], [budget])
    limits = budget.nodes, budget.depth, budget.width
    assert trees.fault(tree.tokens, tree.parents, tree.probability, int(context.tokens[-1]), 2**62, *limits) is None
    assert (tree.probability[1:] >= budget.least).all()
    return tree


def written(*tokens):
    """A context that has written these tokens."""
    context = Context(PROMPT)
    commit(context, tokens)
    return context


def play(drafter, answer, budget=WIDE):
    """Decode the answer; how many tokens of each step's tree were accepted, and the trees."""
    text, context, drafted = [*PROMPT, *answer], Context(PROMPT), []
    while len(context.tokens) < len(text):
        tree = draft(drafter, context, budget)
        truth = np.asarray(text[len(context.tokens) :])
        path = trees.follow(tree.tokens, tree.parents, truth[:-1])
        context.extend(Verdict(tree, path, truth[: len(path)]))
        drafted.append((tree, len(path) - 1))
    return drafted


def branches(tree):
    """The tokens that the tree has after its root, each with what follows it first."""
    firsts = np.flatnonzero(tree.parents == 0)
    return {int(tree.tokens[i]): int(tree.tokens[tree.parents == i][0]) for i in firsts if (tree.parents == i).any()}


def test_an_answer_that_is_the_prediction_is_copied_whole():
    assert len(play(PredictedOutput(UNIQUE), UNIQUE, CHAIN)) == -(-300 // 9)


EDITS = {
    "replaced": lambda at, new: [*UNIQUE[:at], *new, *UNIQUE[at + len(new) :]],
    "inserted": lambda at, new: [*UNIQUE[:at], *new, *UNIQUE[at:]],
    "deleted": lambda at, new: [*UNIQUE[:at], *UNIQUE[at + len(new) :]],
}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("length", [1, 3, 20])
def test_an_edit_costs_no_more_steps_than_it_has_tokens_and_a_few(kind, length):
    new = list(range(1000, 1000 + length))
    answer = EDITS[kind](150, new)
    steps = len(play(PredictedOutput(UNIQUE), answer, Budget(16, 16, 2)))
    plain = -(-len(answer) // 17)
    assert steps <= plain + (length if kind != "deleted" else 0) + 3


@given(st.lists(st.tuples(st.sampled_from(sorted(EDITS)), st.integers(1, 4)), max_size=6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_mixture_of_edits_is_survived(edits, seed):
    rng = np.random.default_rng(seed)
    answer, spoilt = [], 0
    for piece, (kind, length) in enumerate(edits):
        block, new = UNIQUE[40 * piece : 40 * piece + 40], rng.integers(1000, 2000, length).tolist()
        rest = block[20:] if kind == "inserted" else block[20 + length :]
        answer += block[:20] + ([] if kind == "deleted" else new) + rest
        spoilt += length
    answer += UNIQUE[40 * len(edits) :]
    steps = len(play(PredictedOutput(UNIQUE), answer, Budget(16, 16, 2)))
    assert steps <= len(answer) / 17 + spoilt + 3 * len(edits) + 1


def test_after_a_new_token_both_a_replacement_and_an_insertion_are_offered():
    tree = draft(PredictedOutput(UNIQUE), written(*UNIQUE[:50], 1000))
    assert branches(tree) == {UNIQUE[51]: UNIQUE[52], UNIQUE[50]: UNIQUE[51]}
    alone = draft(PredictedOutput(UNIQUE, branches=1), written(*UNIQUE[:50], 1000))
    assert branches(alone) == {UNIQUE[51]: UNIQUE[52]}


def test_where_the_last_tokens_occur_twice_the_place_after_the_cursor_comes_first():
    repeat = [700, 701, 702]
    prediction = [*repeat, 10, *range(20, 40), *repeat, 11, *range(40, 60), *repeat, 12]
    drafter = PredictedOutput(prediction)
    tree = draft(drafter, written(*repeat, 10, *range(20, 35), 999, 999, 999, 999, *repeat), Budget(8, 1, 4))
    assert tree.tokens[1] == 11
    back = written(*prediction[: len(prediction) - 4], 999, 999, 999, 999, *repeat)
    assert draft(drafter, back, Budget(8, 1, 4)).tokens[1] == 12


def test_a_place_before_the_cursor_is_found_too():
    context = written(*UNIQUE[:200], 999, 999, 999, 999, *UNIQUE[30:34])
    assert draft(PredictedOutput(UNIQUE), context, CHAIN).tokens[1:].tolist() == UNIQUE[34:42]


def test_an_edit_in_a_far_place_is_guessed_about_there():
    drafter, context = PredictedOutput(UNIQUE), written(*UNIQUE[:20])
    for piece in (UNIQUE[200:210], [1000]):
        draft(drafter, context)
        commit(context, piece)
    draft(drafter, context, Budget(0, 0, 0))
    assert branches(draft(drafter, context)) == {UNIQUE[211]: UNIQUE[212], UNIQUE[210]: UNIQUE[211]}


def test_each_token_that_agrees_makes_the_next_one_surer():
    tree = draft(PredictedOutput(UNIQUE), written(*UNIQUE[:50], 999, 998, 997, 996, UNIQUE[60]), CHAIN)
    conditional = tree.probability[1:] / tree.probability[:-1]
    assert tree.tokens[1:].tolist() == UNIQUE[61:69]
    assert conditional[0] < conditional[1] < conditional[3] < conditional[7]


def test_nothing_is_guessed_when_it_is_lost_at_the_end_or_not_asked():
    drafter = PredictedOutput(UNIQUE)
    assert len(draft(drafter, written(*UNIQUE[:50], 999, 998, 997, 996))) == 1
    assert len(draft(drafter, written(*UNIQUE))) == 1
    assert len(draft(drafter, written(*UNIQUE[:50], 999, 998, 997, 996, UNIQUE[250]))) == 1
    assert len(draft(PredictedOutput([]), written(1))) == 1
    for budget in (Budget(0, 0, 0), Budget(4, 0, 4), Budget(4, 4, 0)):
        assert len(draft(drafter, written(*UNIQUE[:9]), budget)) == 1


def test_calls_may_skip_steps():
    drafter, context = PredictedOutput(UNIQUE), Context(PROMPT)
    draft(drafter, context)
    for piece in (UNIQUE[:20], UNIQUE[20:90]):
        commit(context, piece)
    assert draft(drafter, context, CHAIN).tokens[1:].tolist() == UNIQUE[90:98]


def test_contexts_have_cursors_of_their_own():
    drafter, first, second = PredictedOutput(UNIQUE), written(*UNIQUE[:9]), written(*UNIQUE[:99])
    ours, theirs = drafter.draft([first, second], [CHAIN, CHAIN])
    assert ours.tokens[1:].tolist() == UNIQUE[9:17]
    assert theirs.tokens[1:].tolist() == UNIQUE[99:107]
    first.finished = True
    assert len(draft(drafter, first, Budget(0, 0, 0))) == 1
    assert not first.scratch


def test_a_useless_prediction_is_learnt_to_be_one():
    rng, drafter = np.random.default_rng(1), PredictedOutput(np.arange(8).repeat(40))
    drafted = play(drafter, rng.integers(0, 8, 1500).tolist(), Budget(4, 1, 4))[700:]
    promised = sum(float(tree.probability[1:].sum()) for tree, _ in drafted)
    assert promised == pytest.approx(sum(accepted for _, accepted in drafted), rel=0.25)
    learnt = drafter._acceptance.rate
    drafter.reset()
    assert not np.allclose(drafter._acceptance.rate, learnt)


def test_the_prior_rises_with_the_match_and_falls_with_a_dispute():
    rates = prior().reshape(predicted_numba.MATCHES, predicted_numba.PLACES, 2)
    assert ((rates > 0) & (rates < 1)).all()
    assert (np.diff(rates, axis=0) >= 0).all()
    assert (rates[-1] > rates[0]).all()
    assert (rates[:, :, 1] < rates[:, :, 0]).all()


def test_a_text_is_encoded():
    tokenizer = tiny.tokenizer()
    drafter = PredictedOutput("some text", tokenizer)
    context = written(*tokenizer.encode("some", add_special_tokens=False))
    assert tokenizer.decode(draft(drafter, context, CHAIN).tokens[1:]) == " text"
    assert drafter.bytes_used > 9 * 8


@pytest.mark.parametrize("arguments", [("text",), ([[1, 2]],), ([-1],), ([1], None, 0)])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"tokenizer|row|branches"):
        PredictedOutput(*arguments)


@pytest.mark.parametrize("merged", [False, True])
def test_generation_is_exact_and_an_edited_answer_takes_few_steps(merged):
    model, greedy = tiny.model(), {"input_ids": tiny.prompt(), "max_new_tokens": 40, "do_sample": False}
    [text] = tiny.texts(tiny.sequences(model.generate(**greedy)))
    answer = text[9:]
    edited = [*answer[:12], 5, 6, *answer[14:25], *answer[26:]]
    drafter = PredictedOutput(edited)
    if merged:
        drafter = MergedDrafter([drafter, NgramDrafter()])
    assert tiny.same(model, greedy, drafter=drafter).stats.steps < 18
    tiny.same(model, {**greedy, "do_sample": True, "temperature": 0.7}, drafter=drafter, seed=3)
