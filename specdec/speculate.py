"""One speculative generation, from what ``generate`` has prepared to what it returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.ahead import Ahead, useful
from specdec.attach import Attachment, attach
from specdec.attention import TURN
from specdec.compiled import load_compiled
from specdec.core import Choice, Context, Drafter, Policy, Unsupported
from specdec.decoder import Decoder
from specdec.guard import GuardedDrafter
from specdec.limits import room, rotary_change, temperature_change
from specdec.model import Model
from specdec.policies import ThroughputPolicy
from specdec.recorder import Recorder, recorder
from specdec.sampling import Sampler
from specdec.shared_prefix import share
from specdec.statistics import Stats
from specdec.verifiers import PathwiseVerifier, RejectionVerifier
from specdec.verifiers.traced import TracedVerifier

PROMPT_LOGITS_BYTES = 64 << 20  # at most this much is spent on logits of prompt positions, for drafters that learn
PROMPT_LOGITS_ROWS = 32
CORPUS, SMALL, EXIT, DRAFT = "retrieval:", "small:", "early-exit:", "draft:"
LONGSPEC, RAPID = "longspec:", "rapid:"


class Speculate:
    """A decoding loop for ``model.generate(..., custom_generate=Speculate())``.

    Args:
        drafter: a Drafter, or "auto", "ngram", "suffix", "lookahead", "recycling", "triforce", or "retrieval:" and an
            index, or "small:" or "rapid:" and another model, or "early-exit:" and how many of the model's own layers
            (for ``wrap``), or "draft:" or "longspec:" and the file of a draft or a layer trained for the model.
        policy: a Policy, or "auto": the tree size that measured passes say gives most tokens per second.
        verifier: "pathwise", "rejection" for trees that a drafter sampled, or an object with their ``begin``.
        on_unsupported: what to do where speculation cannot give plain ``generate``'s result: "fallback" runs the
            plain loop and says why once, "error" raises.
        namespace: whose memory drafters may use.
        trace: a file, or a ``Recorder`` of one, to which every step is added; see docs/trace.md. Copies do not record.

    Attributes:
        stats: what it has done, over all generations.
        trial: how a model is put to the self-test.
    """

    def __init__(
        self,
        drafter: Drafter | str = "auto",
        policy: Policy | str = "auto",
        verifier: PathwiseVerifier | str = "pathwise",
        on_unsupported: Literal["fallback", "error"] = "fallback",
        namespace: str = "",
        trace: str | Path | Recorder | None = None,
    ) -> None:
        self._arguments = (drafter, policy, verifier, on_unsupported, namespace)
        self.drafter = make_drafter(drafter, measured=isinstance(policy, str))
        self.policy = _checked_policy(policy)
        self.verifier: PathwiseVerifier | TracedVerifier = _checked_verifier(verifier)
        if trace is not None:
            kind = ThroughputPolicy if isinstance(self.policy, str) else type(self.policy)
            self.verifier = TracedVerifier(self.verifier, recorder(trace), self.drafter, kind)
        if on_unsupported not in ("fallback", "error"):
            raise ValueError(f"on_unsupported={on_unsupported!r}: give 'fallback' or 'error'")
        self.on_unsupported = on_unsupported
        self.namespace = namespace
        self.stats = Stats()
        self.why_plain = ""
        self.trial: Callable[[nn.Module], Attachment] = attach
        self._attached: weakref.WeakKeyDictionary[nn.Module, _Attached] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """For a copied or pickled model: the parts it was made with, nothing counted yet."""
        return Speculate, self._arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> Speculate:
        """As ``__reduce__``; parts that were given as objects are shared."""
        return Speculate(*self._arguments)

    def __call__(
        self,
        model: Any,
        input_ids: Int[torch.Tensor, "rows prompt"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """What ``generate`` calls; falls back to its own loop for greedy and sampled decoding."""
        parts = (input_ids, logits_processor, stopping_criteria, generation_config)
        try:
            return self.run(model, *parts, dict(model_kwargs))
        except Unsupported as why:
            if self.on_unsupported == "error" or _mode(generation_config) not in MODES:
                raise ValueError(f"specdec cannot run this: {why}") from why
            self.stats.plain_generations += 1
            self.stats.reason(f"plain decoding: {why}")
            return model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
            )

    def run(
        self,
        model: Any,
        input_ids: Int[torch.Tensor, "rows prompt"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        streamer: Any = None,
    ) -> Any:
        """One generation. Raises Unsupported before anything of the caller's has been touched."""
        check(model, generation_config)
        attachment, policy = self.attach(model)
        if attachment.form.level == "plain":
            self.why_plain = f"{type(model).__name__} takes no drafts ({attachment.form.reason})"
            raise Unsupported(self.why_plain)
        chains = attachment.form.level == "chain"
        rules = (logits_processor, stopping_criteria, generation_config, streamer)
        sampler = Sampler(input_ids, *rules, lockstep=chains)
        target = Model(model, attachment.form)
        stats = Stats(self.stats)
        stats.level = attachment.form.level
        drafter = GuardedDrafter(self.drafter, stats, target.config.vocab_size, chains)
        earlier = _earlier(input_ids, generation_config, model_kwargs)
        changes = rotary_change(target.config, input_ids.shape[1], sampler.max_length, earlier)
        if changes is not None:
            raise Unsupported(f"the text may pass {changes} tokens, where this model's rotary embedding changes")
        changes = temperature_change(target.config, input_ids.shape[1], sampler.max_length, earlier)
        if changes is not None:
            raise Unsupported(f"the text may come near {changes} tokens, where this model scales its queries anew")
        with stats.clock("prefill"):
            rows = _prompt_rows(drafter.topk, target.config.vocab_size, input_ids.shape[0])
            logits = target.start(input_ids, generation_config, model_kwargs, rows)
        if target.prompt_length != input_ids.shape[1] + earlier:
            raise Unsupported("the cache holds tokens that are not in the text (prompt tuning?)")
        if streamer is not None:
            streamer.put(input_ids.cpu())
        longest = None if sampler.max_length is None else sampler.max_length + earlier
        with attachment.graphs.lent(target, longest):
            keeps_rows = bool(generation_config.return_dict_in_generate)
            self._decode(input_ids, logits, target, sampler, drafter, policy, earlier, stats, keeps_rows)
            if attachment.costs is not None:
                attachment.costs.keep()
            return self._output(input_ids, generation_config, sampler, target, stats)

    def _decode(
        self,
        input_ids: Int[torch.Tensor, "rows prompt"],
        logits: Float[torch.Tensor, "rows last vocab"],
        target: Model,
        sampler: Sampler,
        drafter: GuardedDrafter,
        policy: Policy,
        earlier: int,
        stats: Stats,
        keeps_rows: bool,
    ) -> None:
        """Commit the first tokens from the prompt's ``logits``, then step until every row has ended."""
        stats.generations = 1
        self.stats.generations += 1
        verifier = self.verifier.begin(target, sampler, stats, drafter.topk, drafter.hidden)
        self.stats.sources = stats.sources
        asked: Drafter = drafter
        if useful(self.drafter, logits.device) and hasattr(verifier, "meanwhile"):
            asked = ahead = Ahead(drafter, stats)
            verifier.meanwhile = ahead.meanwhile
        contexts, padding = self._contexts(input_ids, target)
        choice = Choice(logits.shape[-1], sampler.sample and self._weighs, sampler.foreseeing)
        for context in contexts:
            context.choice = choice
        bind = getattr(self.drafter, "bind", None)  # of a drafter that works with the target's own weights and rows
        if not (bind or keeps_rows or (target.graphs and sampler.quick)) and share(target, contexts, padding):
            target.graphs = None
        if bind is not None:
            target.graphs = None  # they would move the rows without a word to who reads them
        if bind is not None and (why := bind(target, contexts)):
            stats.reason(f"{drafter.name} does without the target: {why}")
        for context, verdict in zip(contexts, verifier.first(contexts, logits), strict=True):
            context.extend(verdict)
            stats.observe(verdict)
        limit = room(target.config, sampler.max_length, contexts, padding, earlier)
        Decoder(asked, verifier, policy, stats, limit).run(contexts, lambda: sampler.finished)

    @property
    def _weighs(self) -> bool:
        """Whether trees are judged by the law that they were drawn from."""
        return isinstance(getattr(self.verifier, "verifier", self.verifier), RejectionVerifier)

    def attach(self, model: Any) -> tuple[Attachment, Policy]:
        """The model's self-test, done once per attention implementation, and the policy for its pass times."""
        with TURN:  # no other thread's pass may have the attention switched meanwhile
            attention = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
            known = self._attached.get(model)
            if known is None or known[0] != attention:
                found = self.trial(model)
                load_compiled()
                policy = ThroughputPolicy(found.costs) if isinstance(self.policy, str) else self.policy
                known = self._attached[model] = attention, found, policy
                self.stats.level = found.form.level
                if found.form.level == "chain":
                    self.stats.reason(f"{type(model).__name__} takes drafts as chains only: {found.form.reason}")
                if found.why_timed:
                    self.stats.reason(found.why_timed)
        return known[1:]

    def _contexts(self, input_ids: torch.Tensor, target: Model) -> tuple[list[Context], list[int]]:
        """One context per row, without its left padding, and how much padding that was."""
        rows = input_ids.cpu().numpy()
        if target.visible is None or target.visible.shape[1] < rows.shape[1]:
            padding = [0] * len(rows)
        else:
            shown = target.visible[:, -rows.shape[1] :] if rows.shape[1] else target.visible[:, :0]
            padding = (shown.long().cumsum(-1) == 0).sum(-1).tolist()
        return [Context(row[pad:], self.namespace) for row, pad in zip(rows, padding, strict=True)], padding

    def _output(
        self,
        input_ids: torch.Tensor,
        config: GenerationConfig,
        sampler: Sampler,
        target: Model,
        stats: Stats,
    ) -> Any:
        sequences = sampler.sequences(input_ids)
        cache: Cache | None = None
        if config.return_dict_in_generate or target.users_cache is not None:
            cache = target.finish(_missing(sequences, sampler, target))
        if not config.return_dict_in_generate:
            return sequences
        output = GenerateDecoderOnlyOutput(
            sequences=sequences, scores=sampler.scores, logits=sampler.logits, past_key_values=cache
        )
        output.stats = stats
        return output


_Attached = tuple[str | None, Attachment, Policy]
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def _mode(config: GenerationConfig) -> GenerationMode:
    return config.get_generation_mode()


def check(model: Any, config: GenerationConfig) -> None:
    """Raise Unsupported for what plain ``generate`` must do itself."""
    mode = _mode(config)
    reasons = {
        f"{mode.value} is not greedy search or sampling": mode not in MODES,
        "encoder-decoder models are not supported": bool(model.config.is_encoder_decoder),
        "the model is in training mode": bool(model.training),
        "use_cache=False leaves nothing to keep drafts in": config.use_cache is False,
        "attentions of tree passes are not returned": bool(config.return_dict_in_generate and config.output_attentions),
        "hidden states of tree passes are not returned": bool(
            config.return_dict_in_generate and config.output_hidden_states
        ),
        "token healing needs plain generate": bool(config.token_healing),
    }
    for reason, applies in reasons.items():
        if applies:
            raise Unsupported(reason)


def make_drafter(drafter: Drafter | str, model: Any = None, measured: bool = False) -> Drafter:
    """The drafter itself, or the one a short name stands for.

    Args:
        model: the target, for drafters that are made of it.
        measured: whether its policy measures what pays: then models are thrifty, and a trained draft guesses trees.

    Raises:
        ValueError: for an unknown name.
        TypeError: for something that is no drafter.
    """
    from specdec import drafters

    if not isinstance(drafter, str):
        if not callable(getattr(drafter, "draft", None)):
            raise TypeError(f"drafter: got {drafter!r}; give an object with draft(contexts, budgets), or a name")
        return drafter
    if drafter.startswith(CORPUS):
        return drafters.RetrievalDrafter(drafter.removeprefix(CORPUS))
    if drafter.startswith(SMALL):
        return drafters.SmallModelDrafter.load(drafter.removeprefix(SMALL), thrifty=measured)
    if drafter.startswith(EXIT):
        layers = drafter.removeprefix(EXIT)
        if model is None or not layers.isdecimal():
            raise ValueError(f"drafter={drafter!r}: give wrap(model, drafter='{EXIT}4'), or an EarlyExitDrafter")
        return drafters.EarlyExitDrafter(model, int(layers))
    if drafter.startswith(DRAFT):
        if model is None:
            raise ValueError(f"drafter={drafter!r}: give wrap(model, drafter='{DRAFT}PATH'), which knows its target")
        from specdec.drafters import distilled

        draft = distilled.drafter(Path(drafter.removeprefix(DRAFT)), model, tree="best-first" if measured else "chain")
        draft.thrifty = measured
        return draft
    if drafter.startswith(LONGSPEC):
        return drafters.LongSpecDrafter.load(drafter.removeprefix(LONGSPEC), model)
    if drafter.startswith(RAPID):
        rapid = drafters.RapidDrafter.load(drafter.removeprefix(RAPID))
        rapid.thrifty = measured
        return rapid
    names: dict[str, Any] = {
        "auto": auto_drafter,
        "ngram": drafters.NgramDrafter,
        "suffix": drafters.SuffixDrafter,
        "lookahead": drafters.LookaheadDrafter,
        "recycling": drafters.RecyclingDrafter,
        "triforce": lambda: drafters.TriForceDrafter(drafters.NgramDrafter()),
    }
    if drafter not in names:
        files = [f"{prefix}PATH" for prefix in (CORPUS, SMALL, RAPID, DRAFT, LONGSPEC)]
        known = ", ".join([*names, f"{EXIT}LAYERS", *files])
        raise ValueError(f"drafter={drafter!r}: known names are {known}; or give a Drafter")
    made: Drafter = names[drafter]()
    return made


def auto_drafter(max_bytes: int = 64 << 20, namespaces: int = 16) -> Drafter:
    """All that learn from text alone, and the target's candidates. The policy cuts trees, so these may be large.

    Args:
        max_bytes: of past responses, for each namespace; recycling takes a quarter of it more for each, and lookahead's
            tries for all of them.
        namespaces: how many are kept.
    """
    from specdec import drafters

    suffix = drafters.SuffixDrafter(factor=4.0, min_probability=0.02, max_bytes=max_bytes, namespaces=namespaces)
    lookahead = drafters.LookaheadDrafter(max_bytes=max_bytes // 4)
    recycling = drafters.RecyclingDrafter(namespaces=namespaces, max_bytes=max_bytes // 4)
    return drafters.MergedDrafter([drafters.NgramDrafter(), suffix, lookahead, recycling])


def _checked_policy(policy: Policy | str) -> Policy | str:
    if isinstance(policy, str) and policy != "auto":
        raise ValueError(f"policy={policy!r}: the known name is 'auto'; or give a Policy")
    if not isinstance(policy, str) and not (hasattr(policy, "budget") and hasattr(policy, "trim")):
        raise TypeError(f"policy: got {policy!r}; give an object with budget(contexts) and trim(contexts, trees)")
    return policy


def _checked_verifier(verifier: PathwiseVerifier | str) -> PathwiseVerifier:
    if not isinstance(verifier, str):
        if not callable(getattr(verifier, "begin", None)):
            raise TypeError(f"verifier: got {verifier!r}; give a PathwiseVerifier, a RejectionVerifier, or a name")
        return verifier
    names: dict[str, type[PathwiseVerifier]] = {"pathwise": PathwiseVerifier, "rejection": RejectionVerifier}
    if verifier not in names:
        raise ValueError(f"verifier={verifier!r}: known names are {', '.join(names)}; or give a verifier")
    return names[verifier]()


def _earlier(input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt that are not in ``input_ids``: held by a cache, or given as embeddings."""
    mask = model_kwargs.get("attention_mask")
    whole: int = getattr(config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
    return max(0, whole - input_ids.shape[1])


def _prompt_rows(topk: int, vocab: int, rows: int) -> int:
    """Prompt positions whose logits are worth computing for drafters that learn from candidates."""
    return min(PROMPT_LOGITS_ROWS, max(1, PROMPT_LOGITS_BYTES // (4 * vocab * rows))) if topk else 1


def _missing(sequences: torch.Tensor, sampler: Sampler, target: Model) -> list[list[int]]:
    """Per row, what plain ``generate`` would have fed and we have not: the padding after an early end."""
    due = sequences.shape[1] - 1
    fed = [sampler.prompt + length - target.prompt_length for length in target.lengths]
    return [row[start:due] for row, start in zip(sequences.tolist(), fed, strict=True)]
