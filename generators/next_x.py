"""Next-X prediction: entity after entity, each by integrating a flow from noise, given all earlier ones (xAR).

- A finished entity enters the cache in the first call of the next one (with time 0, beside the noisy one), so a step
  is one call of the network whatever the entity.
- Guidance grows with the entity as published, from 1 at the first to `cfg` at the last. Where it is 1 the rows without
  a class are not computed: they first run when the second entity begins, which is when their context is needed.
- "sde" is the published sampler, Euler-Maruyama with diffusion 2t down to time .04 and one step without noise from
  there; "ode" is Euler from 1 to 0. The state is float64; the network sees its own type.
- What a row becomes depends on its own generator and condition alone.

B rows, T positions of an entity, C channels, L positions in all, h w sides of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..backbone.cache import KVCache
from ..backbone.entities import Entities
from ..backbone.heads import thousandths
from ..backbone.xar import XAR
from ..codecs.codec import LatentCodec, item_rngs
from ..codecs.published import Weights
from ..modalities.image import Image

if TYPE_CHECKING:
    from .published import Row

LAST = 0.04  # the time from which the SDE ends in one step without noise
SHARED_ROWS = 16  # up to here modulations of all steps are computed at once, since reading weights is what costs


@dataclass(frozen=True, kw_only=True)
class NextXOptions:
    """How entities are drawn; the defaults are those published for xAR-B.

    Args:
        steps: calls of the network an entity.
        cfg: guidance of the last entity; 1 for none.
        schedule: "linear" from 1 at the first entity to `cfg` at the last, as published, or "constant".
        method: "sde" or "ode".
    """

    steps: int = 40
    cfg: float = 2.7
    schedule: Literal["linear", "constant"] = "linear"
    method: Literal["sde", "ode"] = "sde"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected 1 or more")
        if self.cfg < 1:
            raise ValueError(f"cfg is {self.cfg}, expected 1 (no guidance) or more")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}, expected 'linear' or 'constant'")
        if self.method not in ("sde", "ode"):
            raise ValueError(f"method is {self.method!r}, expected 'sde' or 'ode'")

    def guidance(self, entity: int, entities: int) -> float:
        """The weight at one entity of so many; with a single one it is `cfg`."""
        if self.schedule == "constant" or entities == 1:
            return self.cfg
        return 1 + (self.cfg - 1) * entity / (entities - 1)

    def times(self) -> Tensor:
        """Times at which the network is asked, and 0: [steps + 1], float64."""
        if self.method == "ode":
            return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        asked = torch.linspace(1, LAST, self.steps, dtype=torch.float64)
        return torch.cat([asked, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True, kw_only=True)
class LatentRequest:
    """One picture to draw.

    Args:
        labels: its classes (one for the published networks); empty for none.
        latents: [C, h, w], of which the first `keep` entities stand fixed.
    """

    labels: tuple[int, ...] = ()
    latents: Tensor | None = None
    keep: int = 0


class LatentEvent(NamedTuple):
    """An entity of one request is written.

    Args:
        request: its number.
        total: entities that are there, kept ones included.
        latents: [C, h, w] so far, scaled; 0 where nothing is yet (of scales, the last one fills the grid).
        reason: "end" where the picture is finished, else None.
    """

    request: int
    total: int
    latents: Tensor
    reason: str | None = None


class EntityNetwork(Protocol):
    """What gives velocities: an `XAR`, or the shared transformer behind prompts (`backbone.mixed.Prompted`)."""

    entities: Entities

    @property
    def pred(self) -> nn.Linear:
        """The last layer, which says type and device."""
        ...

    @property
    def channels(self) -> int:
        """C."""
        ...

    @property
    def classes(self) -> int:
        """Labels are 0 ... classes - 1; the next one is the null."""
        ...

    def null(self, labels: Tensor) -> Tensor:
        """Labels of the same shape that mean no class."""
        ...

    def modulate(self, labels: Tensor, times: Tensor) -> Tensor | None:
        """What calls with these labels [R, n] and times [R, S] share, steps in the third place; None for nothing."""
        ...

    def open(self, labels: Tensor) -> KVCache:
        """A cache that holds what stands before the first entity of these rows."""
        ...

    def __call__(
        self,
        z: Tensor,
        labels: Tensor,
        times: Tensor,
        *,
        first: int,
        cache: KVCache,
        keep: int,
        modulations: Tensor | None,
    ) -> Tensor:
        """Velocities, as `XAR.forward`."""
        ...


class NextX:
    """Draws latents, entity after entity.

    Args:
        network: in eval mode.
        options: what `run` uses where it is given none.
        codec: the name of the `LatentCodec` whose latents the network writes, where known.
    """

    critic = None  # masked decoding of other systems may have one

    def __init__(
        self,
        network: EntityNetwork,
        *,
        options: NextXOptions | None = None,
        codec: str | None = None,
    ):
        self.network = network
        self.options = options or NextXOptions()
        self.codec = codec
        self.entities = network.entities

    def run(
        self,
        requests: Sequence[LatentRequest],
        options: NextXOptions | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Iterator[LatentEvent]:
        """Events of all requests; requests that keep equally many entities run in one batch.

        Args:
            rng: one generator a request; None draws each from seed 0.

        Raises:
            ValueError: labels that the network does not have, or kept entities without latents.
        """
        for i, request in enumerate(requests):
            self._check(i, request)
        rngs = item_rngs(rng, len(requests))
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.keep, []).append(i)
        return self._all(requests, options or self.options, rngs, groups)

    def sample(
        self,
        requests: Sequence[LatentRequest],
        options: NextXOptions | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """The finished latents of all requests: [B, C, h, w]."""
        done = {
            event.request: event.latents
            for event in self.run(requests, options, rng)
            if event.reason is not None
        }
        return torch.stack([done[i] for i in range(len(requests))])

    @torch.inference_mode()
    def _all(
        self,
        requests: Sequence[LatentRequest],
        options: NextXOptions,
        rngs: list[torch.Generator],
        groups: dict[int, list[int]],
    ) -> Iterator[LatentEvent]:
        for keep, members in groups.items():
            own = [requests[i] for i in members]
            drawn = _Drawing(self.network, own, options, [rngs[i] for i in members])
            count = len(self.entities)
            for total in range(keep + 1, count + 1):
                sequence = drawn.entity(total - 1)
                latents = self.entities.join(sequence)
                reason = "end" if total == count else None
                for i, row in zip(members, latents):
                    yield LatentEvent(i, total, row, reason)

    def _check(self, number: int, request: LatentRequest) -> None:
        classes, count = self.network.classes, len(self.entities)
        if any(not 0 <= label < classes for label in request.labels):
            raise ValueError(
                f"request {number} has the labels {request.labels}, expected some of 0 ... {classes - 1}"
            )
        if not 0 <= request.keep < count:
            raise ValueError(
                f"request {number} keeps {request.keep} entities, expected 0 ... {count - 1}"
            )
        if request.keep and request.latents is None:
            raise ValueError(f"request {number} keeps {request.keep} entities of no latents")


class _Drawing:
    """One batch in progress: [B, n, C] clean positions so far, and what of them the network has read."""

    def __init__(
        self,
        network: EntityNetwork,
        requests: Sequence[LatentRequest],
        options: NextXOptions,
        rngs: list[torch.Generator],
    ):
        self.network, self.options, self.rngs = network, options, rngs
        self.weight = network.pred.weight
        self.labels = self._labels(requests)
        self.conditioned = any(request.labels for request in requests)  # else nothing is to guide
        self.times = options.times()
        self.clean = self._kept(requests)
        self.read = 0  # entities in the cache
        self.rows = 0  # of the last call: B, or 2 B with guidance
        self.shared: Tensor | None = None

    def entity(self, number: int) -> Tensor:
        """Draw entity `number`; returns all positions so far, [B, n, C]."""
        entities = self.network.entities
        guidance = self.options.guidance(number, len(entities)) if self.conditioned else 1.0
        shape = (entities.sizes[number], self.network.channels)
        x = normal(self.rngs, shape, torch.float32).to(self.weight.device).double()
        self._begin(guided=guidance > 1)
        for i, (time, after) in enumerate(pairwise(self.times.tolist())):
            velocity = self._velocity(x, number, i).double()
            if guidance > 1:
                conditional, free = velocity.chunk(2)
                velocity = free + guidance * (conditional - free)
            x = self._step(x, velocity, time, after)
        self.clean = torch.cat([self.clean, x.float()], 1)
        return self.clean

    def _step(self, x: Tensor, velocity: Tensor, time: float, after: float) -> Tensor:
        """From one time to the next."""
        if self.options.method == "ode":
            return x + (after - time) * velocity
        # Half of the diffusion 2t times the score, -(x + (1 - t) v) / t, is what the SDE adds to the velocity.
        x_after = x + (after - time) * (velocity + x + (1 - time) * velocity)
        if after == 0:
            return x_after
        noise = normal(self.rngs, x.shape[1:], torch.float64).to(x.device)
        return x_after + (2 * time * (time - after)) ** 0.5 * noise

    def _begin(self, *, guided: bool) -> None:
        """Rows, cache and modulations of the calls of one entity."""
        labels = torch.cat([self.labels, self.network.null(self.labels)]) if guided else self.labels
        if len(labels) != self.rows:
            # Guidance begins at the first or the second entity: no entity is in the cache yet, none is lost.
            self.cache = self.network.open(labels)
            self.rows, self.all_labels = len(labels), labels
            self.shared = None
            if len(labels) <= SHARED_ROWS:
                times = torch.cat([torch.zeros(1), thousandths(self.times[:-1])]).long()
                times = times.to(self.weight.device).expand(len(labels), -1)
                self.shared = self.network.modulate(labels, times)

    def _velocity(self, x: Tensor, number: int, step: int) -> Tensor:
        """What the network says at one step: [rows, T, C] of the entity in progress."""
        first, count, length = number, 1, x.shape[1]
        z = x.to(self.weight.dtype)
        pending = number - self.read if step == 0 else 0
        if pending:
            start, stop = self.network.entities.span(self.read, number)
            first, count = self.read, pending + 1
            z = torch.cat([self.clean[:, start:stop].to(z), z], 1)
            self.read = number
        times = [0] * pending + [int(thousandths(self.times[step]))]
        places = [0] * pending + [step + 1]  # in the shared modulations
        velocity = self.network(
            z.repeat(self.rows // len(z), 1, 1),
            self.all_labels,
            torch.tensor(times, device=z.device).expand(self.rows, -1),
            first=first,
            cache=self.cache,
            keep=count - 1,
            modulations=None if self.shared is None else self.shared[:, :, places],
        )
        return velocity[:, -length:]

    def _labels(self, requests: Sequence[LatentRequest]) -> Tensor:
        """[B, n], -1 where a row has fewer."""
        null = self.network.classes
        rows = [list(request.labels) or [null] for request in requests]
        most = max(map(len, rows), default=1)
        padded = [row + [-1] * (most - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=self.weight.device)

    def _kept(self, requests: Sequence[LatentRequest]) -> Tensor:
        """Entities that stand fixed: [B, n, C]."""
        keep = requests[0].keep
        stop = self.network.entities.span(0, keep)[1]
        if keep == 0:
            shape = (len(requests), 0, self.network.channels)
            return torch.zeros(shape, device=self.weight.device)
        latents = torch.stack([r.latents for r in requests if r.latents is not None])
        return self.network.entities.split(latents.float().to(self.weight.device))[:, :stop]


def build(files: Mapping[str, Weights], row: Row) -> NextX:
    """The generator of a row of `generators.published`."""
    weights = files["weights"]
    network = XAR.from_published(weights.tensors, row.config, source=weights.source)
    return NextX(network, options=NextXOptions(**row.options), codec=row.codec)


def normal(rngs: Sequence[torch.Generator], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers [B, *shape], each row from its own generator, all on the first one's device."""
    rows = [torch.randn(tuple(shape), generator=g, device=g.device, dtype=dtype) for g in rngs]
    return torch.stack([row.to(rows[0].device) for row in rows])


@torch.inference_mode()
def pictures(latents: Tensor, codec: LatentCodec) -> list[Image]:
    """Pictures of scaled latents [B, C, h, w]."""
    return [
        Image(pixels.float().cpu().clamp(-1, 1) / 2 + 0.5)
        for pixels in codec.decode_latents(latents)
    ]
