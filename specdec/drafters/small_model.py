"""A smaller language model as the drafter: chains, the likeliest trees, and trees sampled from its law."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.generation import logits_process

from specdec import cpu, demo
from specdec.allowance import Typical
from specdec.attach import attach
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import levels
from specdec.drafters.acceptance_head import AcceptanceHead, head_for
from specdec.drafters.model_rows import Rows
from specdec.drafters.row_keeper import RowKeeper
from specdec.drafters.translate import Translation
from specdec.drafters.trimmed_head import OUTSIDE
from specdec.trees import sampling
from specdec.trees.sampling import Level

Tree = Literal["chain", "beam", "best-first", "rsd-c", "rsd-s", "iid"]
ANY_WIDTH = 1 << 30
LEAST_WINDOW = 128  # a tree's nodes are among the newest that a window holds
OWN = 7919  # any number
# Warpers that look at how likely tokens are, and not at which they are: they take the logits of a trimmed head.
BY_SIZE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
)


class SmallModelDrafter:
    """Guesses what a smaller causal LM would write, in batches, one pass of it for each level of the trees.

    Its KV rows hold exactly what has been committed: after a step the rows of accepted nodes stay, the others are cut,
    and what it has not seen yet is fed in the pass that makes the next tree's first level. Rows of a text that has
    ended serve the next one that begins alike, in the same namespace.

    Where the target samples and is judged by ``RejectionVerifier``, "chain", "rsd-c", "rsd-s" and "iid" trees are
    sampled, with a random generator of the drafter's own, and say the law that they were sampled from; else the
    likeliest trees of such a shape are drafted, as "beam" and "best-first" always are.

    Speculative decoding: Leviathan et al. 2023, arXiv 2211.17192. Sampled trees: Jeon et al. 2024, arXiv 2402.14160;
    Miao et al. 2023, arXiv 2305.09781. Best first: Li et al. 2024, arXiv 2406.16858.

    Args:
        model: a transformers causal LM whose KV rows can hold trees.
        tree: "chain"; "beam", the ``width`` likeliest paths of each level; "best-first", the likeliest paths that the
            budget has room for; "rsd-c", children sampled without replacement; "rsd-s", ``width`` paths sampled without
            replacement; "iid", children sampled independently.
        temperature: of the drafts, 0 for the likeliest; None follows the target, its processors and warpers too.
        tokenizer, target_tokenizer: both, where the two differ: then chains are drafted through text.
        branching: children of each node, level by level, of "rsd-c" and "iid" trees.
        width: paths of "beam" and "rsd-s" trees, and nodes expanded on each level of "best-first" ones; at most as wide
            as the budget.
        name: what ``stats`` calls it.
        seed: from 0 on, of its random generator; the target may start from the same.
        cpu_kernels: whether to make the model's float32 layers on the CPU quicker for short passes, as ``wrap`` does.
        head: an ``AcceptanceHead``, or the file of one: the probability of a chain's nodes is then what it says of
            them, and not what the model does. For ``ThresholdPolicy(lag=1)``.
        window: newest tokens of a text that the model's rows hold, beside the first four: constant memory, however long
            the text (``StreamingCache``). None for all. Texts of a batch are then drafted one after another. Layers
            with windows or chunks of their own see what of theirs is held: give no less than those.
        thrifty: whether to draft no level that promises fewer tokens than its time is worth, as measured, whatever the
            budget has room for. Then what is drafted hangs on the clock; without, on texts and budgets alone.
        clock: seconds, as ``time.perf_counter``.

    Raises:
        ValueError: for a model that takes no trees, an unknown kind of tree, a head for another model, a window that
            is too short, or arguments that do not go together.
    """

    topk = 0
    hidden = False

    def __init__(
        self,
        model: Any,
        tree: Tree = "chain",
        temperature: float | None = None,
        tokenizer: Any = None,
        target_tokenizer: Any = None,
        branching: Sequence[int] = (3, 2, 1, 1),
        width: int = 4,
        name: str = "small",
        seed: int = 0,
        cpu_kernels: bool = True,
        head: AcceptanceHead | str | os.PathLike[str] | None = None,
        window: int | None = None,
        thrifty: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _check(tree, temperature, tokenizer, target_tokenizer, branching, width)
        if head is not None and tree != "chain":
            raise ValueError(f"tree={tree!r}: an acceptance head judges chains; leave out one of the two")
        self.head = None if head is None else head_for(model, head)
        self.model = model.eval()
        if cpu_kernels:
            cpu.install(model)
        form = attach(model, timed=False).form
        if form.level != "tree":
            raise ValueError(f"{type(model).__name__} takes no trees: {form.reason}")
        self.tree, self.temperature, self.name = tree, temperature, name
        self.branching, self.width = tuple(branching), width
        self.translation = None if tokenizer is None else Translation(tokenizer, target_tokenizer)
        config = model.config.get_text_config(decoder=True)
        if window is not None and window < LEAST_WINDOW:
            raise ValueError(f"window={window}: give {LEAST_WINDOW} or more")
        self.window = window
        self.positions = getattr(config, "max_position_embeddings", None) or ANY_WIDTH
        self.known = int(model.get_input_embeddings().num_embeddings)
        # Not the seed itself: a target that starts from the same one would draw the very numbers of its draft.
        own = np.random.SeedSequence([seed, OWN]).generate_state(1, np.uint32)
        self._generator = torch.Generator(model.device).manual_seed(int(own[0]))
        self._keeper = RowKeeper(model, form, self.head, window)
        self.thrifty, self.clock = thrifty, clock
        self._level, self._step = Typical(0.0), Typical(0.0)  # seconds; the first tree has all its levels

    @classmethod
    def load(cls, path: str, **arguments: Any) -> SmallModelDrafter:
        """The drafter of a model in a directory or on the hub, on a GPU where there is one; ``arguments`` as above."""
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(AutoModelForCausalLM.from_pretrained(demo.resolve(path), dtype="auto").to(device), **arguments)

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where the model cannot read the text."""
        for context in contexts:
            if context.finished:
                self._keeper.end(context, self._text)
        drafted = dict[int, DraftTree]()
        if any(budget.nodes > 0 for budget in budgets):
            last = contexts[0].verdict
            if last is not None and not last.prompt:
                self._step.see(last.seconds)
            texts = {id(context): self._text(context) for context in contexts if not context.finished}
            going = [
                (context, budget)
                for context, budget in zip(contexts, budgets, strict=True)
                if not context.finished and self._reads(texts[id(context)])
            ]
            together = [going] if self.window is None else [[each] for each in going]
            drafted = {row: tree for group in together if group for row, tree in self._draft(group, texts).items()}
        return [drafted.get(id(context)) or DraftTree.root(int(context.tokens[-1])) for context in contexts]

    def reset(self) -> None:
        """Forget the rows of texts that have ended."""
        self._keeper.reset()

    def _text(self, context: Context) -> Int[np.ndarray, " length"]:
        return context.tokens if self.translation is None else self.translation.inward(context)

    def _reads(self, text: Int[np.ndarray, " length"]) -> bool:
        """Whether the model knows all tokens of a text, and a position to say more."""
        return 0 < len(text) < self.positions and int(text.max()) < self.known

    def _draft(
        self,
        going: Sequence[tuple[Context, Budget]],
        texts: dict[int, Int[np.ndarray, " length"]],
        keeper: RowKeeper | None = None,
    ) -> dict[int, DraftTree]:
        """One tree for each of some contexts, by their id; in the rows of another ``keeper`` if one is given."""
        keeper = keeper or self._keeper
        try:
            rows = keeper.gather([context for context, _ in going], texts)
            place = {id(keeper.text(context)): (context, budget) for context, budget in going}
            going = [place[id(text)] for text in rows.texts]
            own = [texts[id(context)] for context, _ in going]
            growths = [self._growth(*pair, text) for pair, text in zip(going, own, strict=True)]
            drafts = self._grow(rows, [context for context, _ in going], growths, rows.read(own))
        except BaseException:  # nobody knows what rows hold that were being written
            keeper.forget(context for context, _ in going)
            raise
        return {
            id(context): self._tree(context, budget, text, draft)
            for (context, budget), text, draft in zip(going, own, drafts, strict=True)
        }

    def _grow(
        self,
        rows: Rows,
        contexts: Sequence[Context],
        growths: Sequence[levels.Drafting],
        logits: Float[Tensor, "rows vocab"],
    ) -> list[levels.Draft]:
        """Feed all growths' levels together, until the last of them has ended."""
        after = list(logits[:, None])
        asked = [levels.advance(growth) for growth in growths]
        while any(isinstance(each, Level) for each in asked):
            began = self.clock()
            asked = [
                levels.advance(growth, *self._read(context, each, levels.Read(ours, text.chance, rows.ids)))
                if isinstance(each, Level)
                else each
                for context, growth, each, ours, text in zip(contexts, growths, asked, after, rows.texts, strict=True)
            ]
            wanted = [each if isinstance(each, Level) else None for each in asked]
            if any(wanted):
                after = rows.grow(wanted)
                self._level.see(self.clock() - began)
        return [each for each in asked if isinstance(each, levels.Draft)]

    @property
    def _cost(self) -> float:
        """What a level takes, in passes of the target; 0 where nobody counts, or knows yet."""
        return self._level.value / self._step.value if self.thrifty and self._step.value else 0.0

    def _growth(self, context: Context, budget: Budget, text: Int[np.ndarray, " length"]) -> levels.Drafting:
        """How this context's tree grows."""
        root, nodes, least, cost = int(text[-1]), budget.nodes, budget.least, self._cost
        depth = min(budget.depth, nodes, self.positions - len(text))
        width = 1 if self.tree == "chain" else min(self.width, budget.width, nodes)
        if depth < 1 or width < 1:
            return levels.likeliest(root, [], 1)
        if self.head is not None:
            return levels.judged(root, depth, least, self._generator if self._samples(context) else None, cost)
        if self.tree == "best-first":
            return levels.best_first(root, nodes, width, depth, least, cost)
        if self.tree in ("rsd-c", "iid"):
            branching = levels.fitted(self.branching, nodes, depth, budget.width)
        else:
            branching = [width] * min(depth, nodes // width)
        if not self._samples(context):
            return levels.likeliest(root, branching, ANY_WIDTH if self.tree in ("rsd-c", "iid") else width, least, cost)
        if self.tree == "rsd-s":
            return levels.sampled(sampling.stochastic_beam(root, width, len(branching), self._generator), least, cost)
        draw = sampling.independent if self.tree == "iid" else sampling.without_replacement
        return levels.sampled(draw(root, branching, self._generator), least, cost)

    def _samples(self, context: Context) -> bool:
        """Whether a context's tree is to be sampled."""
        if self.tree in ("beam", "best-first") or self.translation is not None:
            return False
        if self.temperature is not None:
            return self.temperature > 0
        return context.choice is not None and context.choice.sample

    def _read(self, context: Context, level: Level, read: levels.Read) -> levels.Read:
        """What the drafter says as trees are grown from it: warped, of tokens that the target knows."""
        choice, logits = context.choice, read.logits
        processors = None if choice is None or self.temperature is not None else choice.processors
        if self.temperature:
            logits = logits / self.temperature
        if choice is None or self.translation is not None:
            return read._replace(logits=logits)
        ids = read.ids if _by_size(processors) and self.known <= choice.vocab else None
        if ids is None:
            logits = _widened(logits, read.ids, self.known, OUTSIDE)
            more = choice.vocab - logits.shape[1]
            logits = nn.functional.pad(logits, (0, more), value=-torch.inf) if more else logits
        if processors:
            guessed = levels.newest(level)
            text = np.concatenate([np.broadcast_to(context.tokens, (len(guessed), len(context.tokens))), guessed], 1)
            logits = processors(torch.from_numpy(text).to(logits.device), logits)
        return levels.Read(logits, read.chance, ids)

    def _tree(
        self, context: Context, budget: Budget, text: Int[np.ndarray, " length"], draft: levels.Draft
    ) -> DraftTree:
        """What was grown, as the target's tokens."""
        last, n = int(context.tokens[-1]), len(draft.tokens)
        if n == 1:
            return DraftTree.root(last)
        if self.translation is None:
            source = ("", *[self.name] * (n - 1))
            vocab = self.known if context.choice is None else context.choice.vocab
            q = None if draft.q is None else _widened(draft.q, draft.ids, vocab, 0.0)
            return DraftTree(draft.tokens, draft.parents, draft.probability, source, q, draft.law)
        guesses = self.translation.outward(context, text.tolist(), draft.tokens[1:].tolist())
        share = float(draft.probability[-1]) ** (1 / max(1, len(guesses)))  # as if all its tokens were equally likely
        guesses = guesses[: min(budget.depth, budget.nodes)]
        return DraftTree.chain(last, guesses, [share ** (i + 1) for i in range(len(guesses))], self.name)


def _by_size(processors: object) -> bool:
    """Whether all of them look at how likely tokens are, and not at which they are."""
    return not processors or (isinstance(processors, list) and all(type(each) in BY_SIZE for each in processors))


def _widened(
    few: Float[Tensor, "nodes few"], ids: Int[np.ndarray, " few"] | None, vocab: int, others: float
) -> Float[Tensor, "nodes vocab"]:
    """Numbers of all tokens, given those of the tokens ``ids``."""
    if ids is None:
        return few
    return few.new_full((len(few), vocab), others).index_copy(1, torch.from_numpy(ids).to(few.device), few)


def _check(
    tree: str,
    temperature: float | None,
    tokenizer: Any,
    target_tokenizer: Any,
    branching: Sequence[int],
    width: int,
) -> None:
    if tree not in get_args(Tree):
        raise ValueError(f"tree={tree!r}: give one of {', '.join(get_args(Tree))}")
    if temperature is not None and not temperature >= 0:
        raise ValueError(f"temperature={temperature}: give a number from 0 on, or None to follow the target")
    if (tokenizer is None) != (target_tokenizer is None):
        raise ValueError("give both tokenizer and target_tokenizer, or neither where model and target share one")
    if tokenizer is not None and tree != "chain":
        raise ValueError(f"tree={tree!r}: with a tokenizer of its own, a drafter drafts chains")
    if min(*branching, width) < 1:
        raise ValueError(f"branching={tuple(branching)}, width={width}: give numbers from 1 on")
