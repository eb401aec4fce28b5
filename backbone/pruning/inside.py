"""Running a transformer in which visual tokens leave between layers.

`PrunedTransformer` wraps the backbone, which does not change. A `Pruner` watches the layers of a prompt and says after
some of them which positions stay; deeper layers then see a shorter sequence and their caches hold less. Rows are
right-padded and may cut at different layers and to different lengths: causality keeps padding out of what counts.

Steps that follow (`step`, `extend`) count positions in each layer as its cache says. `extend` also runs trees of
drafted tokens over the pruned cache; `LayeredCache.accept` keeps the branch that was accepted.

B rows, T positions (fewer in deeper layers), D width, N heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..transformer import Transformer
from .cache import LayeredCache
from .select import Positions, compact


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as it stands behind some layer.

    Args:
        x: [B, T, D], hidden states.
        positions: [B, T].
        index: [B, T], each position's place in the sequence that was given; -1 behind a row's last.
        visual: [B, T], True at visual tokens.
    """

    x: Tensor
    positions: Tensor
    index: Tensor
    visual: Tensor

    @property
    def real(self) -> Tensor:
        """[B, T], False behind a row's last position."""
        return self.index >= 0

    @property
    def counts(self) -> list[int]:
        """Positions of each row."""
        return self.real.sum(1).tolist()

    @property
    def text_behind(self) -> Tensor:
        """[B, T], True at what follows a row's last visual token."""
        places = torch.arange(self.visual.shape[1], device=self.visual.device)
        last = places.where(self.visual, -1).amax(1, keepdim=True)
        return (places > last) & self.real & (last >= 0)

    def cut(self, keep: Tensor, positions: Positions) -> Prompt:
        """Only the positions of `keep` [B, T]."""
        short = compact(self.x, keep & self.real, at=self.positions, positions=positions)
        picked = short.index.clamp(min=0)
        return Prompt(
            x=short.x,
            positions=short.positions,
            index=self.index.gather(1, picked).where(short.index >= 0, -1),
            visual=self.visual.gather(1, picked) & (short.index >= 0),
        )


class Tracker(Protocol):
    """What watches one prompt."""

    def watches(self, layer: int) -> bool:
        """Whether `see` is to be called for this layer."""
        ...

    def see(self, prompt: Prompt, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Input (behind the norm) and output (before the residual) [B, T, D] of attention, then of feed-forward."""
        ...

    def cut(self, layer: int, prompt: Prompt) -> Tensor | None:
        """Which positions [B, T] stay for the layers behind `layer` (0 the first); None for all."""
        ...


class Pruner(Protocol):
    """A method that prunes between layers. `positions`: as it was published."""

    positions: Positions

    def start(self, model: Transformer, prompt: Prompt) -> Tracker:
        """Begin a prompt.

        Raises:
            ValueError: a prompt that the method cannot prune.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A prompt that was run.

    Args:
        hidden: [B, T', D] behind the final norm, of the positions that reached the end.
        index: [B, T'], where they stood in the sequence given; -1 behind a row's last.
        layers: for each layer the places [B, T_l] that its cache holds, likewise.
        cache: to go on with.
    """

    hidden: Tensor
    index: Tensor
    layers: tuple[Tensor, ...]
    cache: LayeredCache

    @property
    def last(self) -> Tensor:
        """[B, D] of each row's last position."""
        counts = (self.index >= 0).sum(1)
        return self.hidden[torch.arange(len(counts), device=counts.device), counts - 1]


class PrunedTransformer:
    """A transformer and a method that prunes inside it.

    Args:
        model: in eval mode.
        pruner: None prunes nothing (the sequence may have been pruned before).
        positions: "kept" or "packed"; None as the method was published. With grid positions (rope2d) take "kept".
    """

    def __init__(
        self,
        model: Transformer,
        pruner: Pruner | None = None,
        *,
        positions: Positions | None = None,
    ):
        self.model, self.pruner = model, pruner
        published: Positions = "packed" if pruner is None else pruner.positions
        self.positions: Positions = positions or published

    @torch.no_grad()
    def prefill(
        self,
        embeddings: Tensor,
        visual: Tensor,
        *,
        counts: Sequence[int] | None = None,
        at: Tensor | None = None,
        room: int = 0,
    ) -> Prefilled:
        """Run prompts.

        Args:
            embeddings: [B, T, D], right-padded.
            visual: [B, T], True at visual tokens.
            counts: real positions of each row; None for all.
            at: [B, T], positions, where the sequence was pruned before and kept its own; None for 0, 1, 2, ...
            room: how many steps the cache is to have room for.

        Raises:
            ValueError: a prompt longer than the context, or one that the method cannot prune.
        """
        model = self.model
        prompt = self._prompt(embeddings, visual, counts, at)
        cache = LayeredCache(layers=len(model.model.layers), room=room)
        tracker = None if self.pruner is None else self.pruner.start(model, prompt)
        turns, held = self._turns(prompt.positions, prompt.x.dtype), []
        behind = self._behind(prompt)
        for i, layer in enumerate(model.model.layers):
            lengths = prompt.counts
            cache.shift[i] = [p - n for p, n in zip(behind, lengths)]
            held.append(prompt.index)
            x, parts = _run(layer, prompt.x, model.rotary, turns, None, cache, lengths)
            prompt = dataclasses.replace(prompt, x=x)
            if tracker is None:
                continue
            if tracker.watches(i):
                tracker.see(prompt, parts)
            keep = tracker.cut(i, prompt)
            if keep is not None and bool((prompt.real & ~keep).any()):
                prompt = prompt.cut(keep, self.positions)
                turns = self._turns(prompt.positions, prompt.x.dtype)
                behind = behind if self.positions == "kept" else self._behind(prompt)
        return Prefilled(
            hidden=model.model.norm(prompt.x), index=prompt.index, layers=tuple(held), cache=cache
        )

    def step(self, ids: Tensor, cache: LayeredCache) -> Tensor:
        """One more id [B] a row; hidden states [B, D] behind the final norm."""
        return self.extend(self.model.embed(ids[:, None]), cache)[:, 0]

    @torch.no_grad()
    def extend(
        self,
        embeddings: Tensor,
        cache: LayeredCache,
        *,
        tree: Tensor | None = None,
        depths: Tensor | None = None,
    ) -> Tensor:
        """Run T more positions over a cache.

        Args:
            embeddings: [B, T, D].
            tree: [T, T] or [B, T, T], True where a new position sees another new one, itself included; None: causal.
            depths: [T], how far each new position is from the first; None: 0, 1, 2, ...

        Returns:
            Hidden states [B, T, D] behind the final norm.
        """
        model, (rows, length, _) = self.model, embeddings.shape
        device = embeddings.device
        if depths is None:
            depths = torch.arange(length, device=device)
        if tree is None:
            tree = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        x, views = embeddings, {}
        for i, layer in enumerate(model.model.layers):
            starts, first = cache.row_lengths(i), cache.next_positions(i)
            key = (*starts, *first)
            if key not in views:
                self.model.check_length(max(first) + int(depths.max()) + 1)
                positions = torch.tensor(first, device=device)[:, None] + depths
                if i == 0 and model.config.positions == "learned":
                    x = x + model.model.embed_positions(positions)
                views[key] = self._turns(positions, x.dtype), _tree_mask(starts, tree, rows)
            turns, mask = views[key]
            x, _ = _run(layer, x, model.rotary, turns, mask, cache, None)
        return model.model.norm(x)

    def _prompt(
        self,
        embeddings: Tensor,
        visual: Tensor,
        counts: Sequence[int] | None,
        at: Tensor | None,
    ) -> Prompt:
        rows, length, _ = embeddings.shape
        if visual.shape != (rows, length):
            raise ValueError(f"visual is {tuple(visual.shape)}, expected [B, T] = {(rows, length)}")
        places = torch.arange(length, device=embeddings.device).expand(rows, -1)
        number = torch.tensor([length] * rows if counts is None else list(counts))
        real = places < number.to(places.device)[:, None]
        positions = places if at is None else at
        self.model.check_length(int(positions[real].max()) + 1, "the prompt")
        x = embeddings
        if self.model.config.positions == "learned":
            x = x + self.model.model.embed_positions(positions)
        return Prompt(x=x, positions=positions, index=places.where(real, -1), visual=visual & real)

    def _turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        return None if self.model.rotary is None else self.model.rotary.at(positions, dtype)

    @staticmethod
    def _behind(prompt: Prompt) -> list[int]:
        """The position behind each row's last."""
        return (prompt.positions.where(prompt.real, -1).amax(1) + 1).tolist()


def _run(layer: Any, x: Tensor, *context: Any) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]:
    """One layer, `context` being what attention takes; also input and output of its two parts."""
    before = layer.input_layernorm(x)
    after = layer.self_attn(before, *context)
    x = x + after
    wide = layer.post_attention_layernorm(x)
    fed = layer.mlp(wide)
    return x + fed, ((before, after), (wide, fed))


def _tree_mask(starts: Sequence[int], tree: Tensor, rows: int) -> Tensor | None:
    """[B, 1, T, S]: every new position sees all that a row held, and of the new ones what the tree says."""
    length = tree.shape[-1]
    if length == 1 and min(starts) == max(starts):
        return None
    columns = torch.arange(max(starts) + length, device=tree.device)
    new = columns - torch.tensor(starts, device=tree.device)[:, None]
    own = tree.expand(rows, length, length).gather(
        2, new.clamp(0, length - 1)[:, None].expand(-1, length, -1)
    )
    return ((new < 0)[:, None] | (own & (new < length)[:, None]))[:, None]
