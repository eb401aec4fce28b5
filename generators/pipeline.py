"""AnyToAny: prompts of any media in, media out.

    model = AnyToAny.load("anytok/mini")
    answer = model("noto red apple", to="image")[0]
    answer.items[0].save("apple.png")
    model([Image.load("apple.png")], to="text")[0].items[0].text

A prompt is a string, a medium, or a list of them in order. For each prompt and sample there is one `Answer`. `stream`
gives the same piece by piece, with partial media where the codec decodes prefixes; closing it cancels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone.directory import Model, load_model
from ..backbone.grammar import Grammar
from ..backbone.interleave import BOS, Item, Packed
from ..codecs.codec import Codec, CodecUnavailable
from ..codecs.layout import Prefix
from ..codecs.stream import TokenStream
from ..modalities.media import MODALITIES, Media
from ..modalities.text import Text
from .autoregressive import Autoregressive
from .drafter import Drafter, load_drafter
from .generator import Event, Request
from .neighbours import NeighbourTable, Relatives
from .sampling import Sampling
from .speculative import Speculation, Speculative

Prompt = str | Media | Sequence["str | Media"]
MODELS = {"anytok/mini": "backbone-mini"}
BATCH = 32


class GenerationError(RuntimeError):
    """The context ended within a block that cannot be cut there."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote for one sample of one prompt.

    Args:
        prompt, sample: their numbers.
        items: media, in order.
        streams: the same as tokens.
        seconds: time spent on "encode", "generate" and "decode" of the batch that it was part of.
    """

    prompt: int
    sample: int
    seed: int
    items: tuple[Any, ...]
    streams: tuple[TokenStream, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One event of `AnyToAny.stream`.

    Args:
        prompt, sample: which one went on.
        written: ids so far.
        partial: the medium so far, where its codec decodes prefixes and a new piece is due.
        answer: the whole, once finished.
    """

    prompt: int
    sample: int
    written: int
    partial: Any = None
    answer: Answer | None = None


class AnyToAny:
    """A model that reads and writes media.

    Args:
        model: its parts; see `load`.
    """

    def __init__(self, model: Model):
        self.model = model
        self.interleaver = model.interleaver
        self.decoder: Autoregressive | None = None  # of the last call
        self._leaps: tuple[Drafter, Speculation, Relatives | None, bool] | None = None
        model.transformer.fuse()

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        codecs: Mapping[str, Codec] | None = None,
    ) -> AnyToAny:
        """Load a model that ships with anytok, or a model directory.

        Args:
            codecs: codecs by modality that are loaded already, or that no name finds.

        Raises:
            ValueError: neither a known name nor a directory.
        """
        name = str(name_or_path)
        if name in MODELS:
            path = Path(str(resources.files("anytok.assets") / "weights" / MODELS[name]))
            if not path.is_dir():
                raise CodecUnavailable(f"'{name}' does not ship with this build of anytok")
        else:
            path = Path(name_or_path)
        if not path.is_dir():
            known = ", ".join(MODELS)
            raise ValueError(f"{name!r} is neither a model directory nor one of {known}")
        model = load_model(path, dtype=dtype, codecs=codecs)
        model.transformer.to(device)
        return cls(model)

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        to: str | Sequence[str] | None = None,
        *,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
        options: Sampling | Mapping[str, Sampling] | None = None,
        units: Mapping[str, int] | None = None,
    ) -> list[Answer]:
        """One answer for each prompt and sample, prompts first.

        Args:
            prompts: one prompt, or a list of them; a prompt of several media is a list within the list.
            to: the modalities to write, in order; None leaves it to the model.
            seeds: one for each prompt and sample; 0, 1, 2, ... where None.
            options: how ids are drawn, for all modalities or for each; the model's own where None.
            units: modality -> the most positions (prefix) or frames; the model's own where not given.

        Raises:
            ValueError: a modality that the model does not know or was not trained on; a prompt that is too long.
        """
        events = self.stream(
            prompts, to, samples=samples, seeds=seeds, options=options, units=units, every=None
        )
        answers = [event.answer for event in events if event.answer is not None]
        return sorted(answers, key=lambda answer: (answer.prompt, answer.sample))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        to: str | Sequence[str] | None = None,
        *,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
        options: Sampling | Mapping[str, Sampling] | None = None,
        units: Mapping[str, int] | None = None,
        every: int | None = 8,
    ) -> Iterator[Progress]:
        """As calling, one event after another. `every`: ids between partial media; None for none."""
        lists = _prompts(prompts)
        if samples < 1:
            raise ValueError(f"samples is {samples}, expected 1 or more")
        seeds = range(len(lists) * samples) if seeds is None else seeds
        if len(seeds) != len(lists) * samples:
            raise ValueError(
                f"{len(seeds)} seeds for {len(lists)} prompts and {samples} samples each"
            )
        jobs = [
            _Job(prompt, sample, seeds[prompt * samples + sample])
            for prompt in range(len(lists))
            for sample in range(samples)
        ]
        plan = [to] if isinstance(to, str) else to
        plans = [self._plan(media, plan) for media in lists]
        began = time.perf_counter()
        streams = self._encode(lists)
        spent = {"encode": time.perf_counter() - began}
        drawing = self._options(options)
        settings = self.model.generation.items()
        defaults = {m: int(own["units"]) for m, own in settings if "units" in own}
        grammar = Grammar(self.interleaver, limits={**defaults, **(units or {})})
        # Samples of a prompt share its request, so that it is read once.
        own = [self._request(media, plan, grammar) for media, plan in zip(streams, plans)]
        requests = [own[j.prompt] for j in jobs]
        self.decoder = self._decoder(grammar)
        return self._run(jobs, requests, self.decoder, drawing, spent, every)

    def speculate(
        self,
        drafter: str | Path | Drafter | None,
        speculation: Speculation | None = None,
        *,
        audit: bool = False,
    ) -> AnyToAny:
        """Write in leaps from now on (`speculative.py`), or, with None, id by id again.

        Args:
            drafter: of this model, or its file.
            audit: enumerate how far each id's law is from the model's; costs time.

        Raises:
            DrafterError: a drafter of another model.
        """
        if drafter is None:
            self._leaps = None
            return self
        if not isinstance(drafter, Drafter):
            drafter = load_drafter(drafter, self.model.transformer)
        speculation = Speculation() if speculation is None else speculation
        more = speculation.published is not None  # that rule looks one neighbour further
        relatives = None
        if speculation.mode != "lossless":
            relatives = self._relatives(speculation.k + more)
        self._leaps = (drafter, speculation, relatives, audit)
        return self

    def _decoder(self, grammar: Grammar) -> Autoregressive:
        if self._leaps is None:
            return Autoregressive(self.model.transformer, grammar)
        drafter, speculation, relatives, audit = self._leaps
        return Speculative(
            self.model.transformer,
            drafter,
            grammar,
            speculation=speculation,
            relatives=relatives,
            audit=audit,
        )

    def _relatives(self, k: int) -> Relatives:
        """Neighbours of the codes of every codec that knows its codes' vectors."""
        tables = []
        for modality, rule in self.interleaver.rules.items():
            if modality == "text" or rule.flatten == "octree":
                continue  # words and bits have no neighbours
            smallest = min(size for sizes in rule.vocab for size in sizes)
            try:
                codec = self.model.codec(modality)
                tables.append(NeighbourTable.of(codec, min(k, smallest - 1)))
            except CodecUnavailable:
                continue  # codes without vectors have none either, and are drawn as ever
        return Relatives(self.interleaver, *tables)

    def _run(
        self,
        jobs: list[_Job],
        requests: list[Request],
        decoder: Autoregressive,
        options: Sampling | Mapping[str, Sampling],
        spent: Mapping[str, float],
        every: int | None,
    ) -> Iterator[Progress]:
        for start in range(0, len(jobs), BATCH):
            part = jobs[start : start + BATCH]
            began = time.perf_counter()
            rngs = [torch.Generator().manual_seed(job.seed) for job in part]
            for event in decoder.run(requests[start : start + BATCH], options, rngs):
                job = part[event.request]
                job.ids += event.ids
                if event.reason is None:
                    yield Progress(
                        prompt=job.prompt,
                        sample=job.sample,
                        written=event.total,
                        partial=self._partial(job, event, every),
                    )
                else:
                    job.reason = event.reason
            times = {**spent, "generate": time.perf_counter() - began}
            yield from self._answers(part, times)

    def _answers(self, jobs: list[_Job], spent: dict[str, float]) -> Iterator[Progress]:
        began = time.perf_counter()
        streams = [self._parsed(job) for job in jobs]
        places = [(i, k) for i, several in enumerate(streams) for k in range(len(several))]
        media: dict[tuple[int, int], Any] = {}
        for modality in dict.fromkeys(streams[i][k].modality for i, k in places):
            own = [(i, k) for i, k in places if streams[i][k].modality == modality]
            rngs = [torch.Generator().manual_seed(jobs[i].seed) for i, _ in own]
            with torch.inference_mode():
                codec = self.model.codec(modality)
                decoded = codec.decode([streams[i][k] for i, k in own], rng=rngs)
            media |= dict(zip(own, decoded))
        times = {**spent, "decode": time.perf_counter() - began}
        for i, job in enumerate(jobs):
            answer = Answer(
                prompt=job.prompt,
                sample=job.sample,
                seed=job.seed,
                items=tuple(media[i, k] for k in range(len(streams[i]))),
                streams=tuple(streams[i]),
                seconds=times,
            )
            yield Progress(
                prompt=job.prompt, sample=job.sample, written=len(job.ids), answer=answer
            )

    def _parsed(self, job: _Job) -> list[TokenStream]:
        """The streams that were written; a last block that the context cut is closed where its codec allows it."""
        if job.reason == "end":
            return self.interleaver.parse(job.ids)
        modality, body = self._open_block(job.ids)
        if modality is None:
            return self.interleaver.parse(job.ids)
        if not body:
            raise GenerationError(
                f"prompt {job.prompt}: the context of {self.model.transformer.config.context} ids ended within "
                f"a block of {modality}; ask for fewer units or give a shorter prompt"
            )
        opened = max(i for i, id in enumerate(job.ids) if id == self.interleaver.tags(modality)[0])
        before = self.interleaver.parse(job.ids[:opened])
        return [*before, self.interleaver.stream(body, modality)]

    def _open_block(self, ids: list[int]) -> tuple[str | None, list[int]]:
        """The modality of the block that is still open, and its ids, cut to what decodes ([] if nothing does)."""
        opens = {self.interleaver.tags(m)[0]: m for m in self.interleaver.rules}
        start = max((i for i, id in enumerate(ids) if id in opens), default=None)
        if start is None or self.interleaver.tags(opens[ids[start]])[1] in ids[start:]:
            return None, []
        rule = self.interleaver.rule(opens[ids[start]])
        if rule.prefix_step is None or rule.flatten != "frame":
            return rule.modality, []
        step = rule.prefix_step * rule.depth
        return rule.modality, ids[start + 1 :][: (len(ids) - start - 1) // step * step]

    def _partial(self, job: _Job, event: Event, every: int | None) -> Any:
        """The last block so far, where a piece of `every` ids is due and prefixes decode."""
        if every is None or event.total // every == (event.total - len(event.ids)) // every:
            return None
        modality, body = self._open_block(job.ids)
        if modality is None or not body:
            return None
        with torch.inference_mode():
            stream = self.interleaver.stream(body, modality)
            rng = [torch.Generator().manual_seed(job.seed)]
            return self.model.codec(modality).decode([stream], rng=rng)[0]

    def _plan(self, media: list[Media], to: Sequence[str] | None) -> list[str] | None:
        """The modalities to write; checks what the model was trained on."""
        read = {type(medium).modality for medium in media}
        for modality in [*read, *(to or [])]:
            self.interleaver.rule(modality)
        known = [(r, w) for r, w in self.model.pairs if r in read]
        if to is None:
            writes = list(dict.fromkeys(w for _, w in known))
            if not writes:
                raise ValueError(_untrained(read, "anything", self.model))
            return writes if len(writes) == 1 else None
        for modality in to:
            if not any(w == modality for _, w in known):
                raise ValueError(_untrained(read, modality, self.model))
        return list(to)

    def _encode(self, prompts: list[list[Media]]) -> list[list[TokenStream]]:
        """Streams of all prompts; one call a modality, each cut to what the model reads."""
        streams: list[list[Any]] = [[None] * len(media) for media in prompts]
        places = [(i, k) for i, media in enumerate(prompts) for k in range(len(media))]
        for modality in dict.fromkeys(type(prompts[i][k]).modality for i, k in places):
            own = [(i, k) for i, k in places if type(prompts[i][k]).modality == modality]
            with torch.inference_mode():
                encoded = self.model.codec(modality).encode([prompts[i][k] for i, k in own])
            rule = self.interleaver.rule(modality)
            for (i, k), stream in zip(own, encoded):
                # A shorter prefix of an ordered layout is the same thing, coarser; a shorter text is another text.
                ordered = isinstance(rule.layout, Prefix) and rule.most is not None
                most = (rule.most or 0) * (rule.unit or 1)
                streams[i][k] = stream[:most] if ordered and len(stream) > most else stream
        return streams

    def _request(
        self, streams: list[TokenStream], plan: list[str] | None, grammar: Grammar
    ) -> Request:
        items = [Item(stream=stream, target=False) for stream in streams]
        prompt = self.interleaver.pack(items, end=False)
        context = self.model.transformer.config.context
        room = context - len(prompt)
        need = 1 + sum(2 + grammar.least(modality) for modality in plan or [])
        if room < need:
            raise ValueError(
                f"the prompt has {len(prompt)} ids and the model's context is {context}: of the {need} ids that "
                f"{' and '.join(plan or ['an answer'])} takes at least, only {max(room, 0)} fit"
            )
        bos = torch.tensor([self.interleaver.vocabulary.special(BOS)])
        stacked = prompt.stacked is not None
        return Request(
            ids=None if stacked else prompt.ids,
            embeddings=self._embedded(prompt) if stacked else None,
            null_ids=bos,
            state=grammar.start(plan),
            max_tokens=room,
        )

    @torch.inference_mode()
    def _embedded(self, prompt: Packed) -> Tensor:
        """Input rows [L, D] of a prompt in which several ids share a position."""
        rows = self.model.transformer.embed(prompt.ids)
        for segment in prompt.segments:
            if segment.kind == "codes" and segment.data is not None:
                codes = segment.data
                own = self.model.transformer.embed(codes.clamp(min=0)) * (codes >= 0)[..., None]
                rows[segment.start : segment.stop] = own.sum(1)
        return rows

    def _options(self, options: Sampling | Mapping[str, Sampling] | None):
        if isinstance(options, Sampling):
            return options
        own = {
            m: Sampling(**{k: v for k, v in o.items() if k != "units"})
            for m, o in self.model.generation.items()
        }
        return {**own, **(options or {})} or Sampling()


@dataclass
class _Job:
    prompt: int
    sample: int
    seed: int
    ids: list[int] = field(default_factory=list)
    reason: str | None = None


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[list[Media]]:
    """Each prompt as a list of media."""
    several = [prompts] if isinstance(prompts, (str, *MODALITIES.values())) else [*prompts]  # type: ignore[misc]
    if not several:
        raise ValueError("there are no prompts")
    lists = [p if isinstance(p, (list, tuple)) else [p] for p in several]
    return [[_medium(part) for part in parts] for parts in lists]


def _medium(part: Any) -> Media:
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, tuple(MODALITIES.values())):
        names = ", ".join(cls.__name__ for cls in MODALITIES.values())
        raise TypeError(
            f"a prompt holds a {type(part).__name__}, expected a string or one of {names}"
        )
    return part


def _untrained(read: set[str], write: str, model: Model) -> str:
    known = ", ".join(f"{r} -> {w}" for r, w in model.pairs)
    return f"model '{model.name}' was not trained to write {write} from {' and '.join(sorted(read))}, it knows {known}"
