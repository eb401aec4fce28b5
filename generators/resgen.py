"""ResGen: masked discrete diffusion over the depth of residual codes that predicts summed vectors (arXiv 2412.10208;
the head as in CLaM-TTS and NeMo's EAR-TTS, which is the same construction). No official code is public.

Forward process. Of the L * D codes x, n = ceil(g(r) L D) are masked, r ~ U[0, 1). How many of each position, k_1 ...
k_L, is drawn as balls without replacement from L urns of D (multivariate hypergeometric); masked are the k_i deepest,
so what is visible is always a prefix in depth.

Target. z_i = sum of the masked vectors of position i. What reads the visible sums, a transformer that looks both ways,
gives a mixture of K Gaussians for z_i; -log p(z | visible) bounds -log p(codes | visible) from above, up to a constant.

Mixture. a_k in R^r, shift s, one log-scale v = max(., -4); mean of component k is e^v M_k a_k + s, covariance e^2v I.
Densities expand |M_k a_k - y|^2, so that nothing of size K x d is made for a position.

Loss. q_k = (1 - e) softmax_k(log N_k(z)) + e / K without gradient; -sum q log N + KL(q | pi) bounds -log sum pi N from
above (Jensen) and keeps all components alive. Summed over positions with something masked, divided by masked codes.

Sampling. All masked; T steps: draw z_i, quantise it residually from the first masked depth on (all masked depths of
all positions at once), keep the likeliest so that n' = ceil(g(t/T) L D) stay masked, drop the rest. The number of
passes is T, whatever D is.

`head="discrete"` is the ablation that the paper compares with: the same process, every masked depth predicted as a
distribution of its own, all in parallel.

P positions of all rows, L of one row, D depths, V codes, d width of vectors, K components, r rank, h width of states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs.codec import Rng, item_rngs
from .rvq_body import BodyConfig, CodeEvent, CodeRequest, RVQBody, after

FLOOR = -4.0  # of the log-scale


@dataclass(frozen=True, kw_only=True)
class ResGenConfig(BodyConfig):
    """Sizes of the body, and of the head.

    Args:
        head: "mixture" as in the paper, "discrete" for the ablation.
        components, rank: K, r.
        blocks: gated blocks of the head, each `head_ffn` wide (4 h where None).
        smoothing: e.
        schedule: g: "arc" (1 - r^power)^(1 / power), its own inverse, or "cosine".
        latest: training draws r below it.
        drop: how often training leaves out the condition, so that guidance exists.
    """

    head: Literal["mixture", "discrete"] = "mixture"
    components: int = 1024
    rank: int = 64
    blocks: int = 3
    head_ffn: int | None = None
    smoothing: float = 0.01
    schedule: Literal["arc", "cosine"] = "arc"
    power: float = 2.0
    latest: float = 1.0
    drop: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.vectors is None:
            raise ValueError(
                "vectors is None: ResGen predicts the codec's own vectors, give their width"
            )
        if len(set(self.vocab)) > 1:
            raise ValueError(f"vocab is {self.vocab}, expected one size for all depths")

    def share(self, r: Tensor | float) -> Tensor:
        """g(r): the share that is masked, from 1 at r = 0 to 0 at r = 1."""
        r = torch.as_tensor(r, dtype=torch.float64)
        if self.schedule == "cosine":
            return torch.cos(r * math.pi / 2).clamp(min=0)
        return (1 - r**self.power).clamp(min=0) ** (1 / self.power)

    def masked(self, r: Tensor | float, length: int) -> int:
        """n of the L * D codes."""
        # Rounding first: cos(pi / 2) is not quite 0, which must not leave one code masked.
        return math.ceil(round(float(self.share(r)) * length * self.depth, 6))


def draw_masked(n: int, length: int, depth: int, rng: torch.Generator) -> Tensor:
    """k [L], the masked codes of each position: n balls without replacement from L urns of D."""
    balls = torch.randperm(length * depth, generator=rng, device=rng.device)[:n]
    return torch.bincount(balls // depth, minlength=length)


def draw_less(k: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """From k [L] to counts that sum to n: balls are taken back without replacement (the posterior; x plays no part)."""
    urns = torch.repeat_interleave(torch.arange(len(k)), k.to("cpu"))
    kept = torch.randperm(len(urns), generator=rng, device=rng.device)[:n].to("cpu")
    return torch.bincount(urns[kept], minlength=len(k))


def log_marginal(k: Tensor, depth: int) -> Tensor:
    """log q(k) of counts [..., L] given their sum: prod C(D, k_i) / C(L D, n)."""
    n = k.sum(-1)
    return log_choose(depth, k).sum(-1) - log_choose(k.shape[-1] * depth, n)


def log_forward(after: Tensor, before: Tensor, depth: int) -> Tensor:
    """log q(after | before), more masked: the balls that are added come from those left, all [..., L]."""
    room, added = depth - before, after - before
    return log_choose(room, added).sum(-1) - log_choose(room.sum(-1), added.sum(-1))


def log_posterior(before: Tensor, after: Tensor) -> Tensor:
    """log q(before | after), fewer masked; it needs neither x nor D."""
    gone = after - before
    return log_choose(after, gone).sum(-1) - log_choose(after.sum(-1), gone.sum(-1))


def log_choose(n: Tensor | int, k: Tensor) -> Tensor:
    """log of the binomial coefficient; -inf where k is outside 0 ... n."""
    whole, part = torch.broadcast_tensors(torch.as_tensor(n).double(), k.double())
    possible = (part >= 0) & (part <= whole)
    part = part.clamp(min=0).minimum(whole)
    value = torch.lgamma(whole + 1) - torch.lgamma(part + 1) - torch.lgamma(whole - part + 1)
    return value.masked_fill(~possible, -torch.inf)


class Mixture(NamedTuple):
    """K Gaussians for each of P positions.

    Args:
        logits: [P, K] of the weights.
        low: a, [P, K, r].
        shift: s, [P, d].
        log_scale: v, [P].
        matrices: M, [K, d, r].
    """

    logits: Tensor
    low: Tensor
    shift: Tensor
    log_scale: Tensor
    matrices: Tensor

    def log_densities(self, z: Tensor) -> Tensor:
        """log N_k(z): [P, K], for z [P, d]."""
        y = (z - self.shift) * torch.exp(-self.log_scale)[:, None]
        cross = torch.einsum("pd,kdr,pkr->pk", y, self.matrices, self.low)
        gram = self.matrices.transpose(1, 2) @ self.matrices
        square = torch.einsum("pkr,krs,pks->pk", self.low, gram, self.low)
        distance = y.square().sum(-1, keepdim=True) - 2 * cross + square
        constant = z.shape[-1] * (-0.5 * math.log(2 * math.pi) - self.log_scale)
        return constant[:, None] - distance / 2

    def means(self, component: Tensor) -> Tensor:
        """Means [P, d] of one component each, [P]."""
        low = self.low[torch.arange(len(component), device=component.device), component]
        centre = torch.einsum("pdr,pr->pd", self.matrices[component], low)
        return torch.exp(self.log_scale)[:, None] * centre + self.shift

    def losses(self, z: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """The two terms of the bound on -log sum_k pi_k N_k(z), each [P]: -sum q log N and KL(q | pi)."""
        densities = self.log_densities(z)
        with torch.no_grad():
            q = (1 - smoothing) * densities.softmax(-1) + smoothing / densities.shape[-1]
        entropy = torch.xlogy(q, q).sum(-1)
        return -(q * densities).sum(-1), entropy - (q * self.logits.log_softmax(-1)).sum(-1)


class Norm(nn.Module):
    """x / rms(x) * (1 + w)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [..., h]."""
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


class GatedBlock(nn.Module):
    """x + norm(down(gelu(gate) * up)), over norm(x)."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.before, self.after = Norm(width), Norm(width)
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [..., h]."""
        gate, up = self.gate_up(self.before(x)).chunk(2, -1)
        return x + self.after(self.down(F.gelu(gate, approximate="tanh") * up))


class Head(nn.Module):
    """Gated blocks, then what the mixture needs, or logits of every depth."""

    def __init__(self, config: ResGenConfig):
        super().__init__()
        c, h = config, config.width
        ffn = c.head_ffn or 4 * h
        self.config = c
        self.blocks = nn.Sequential(*(GatedBlock(h, ffn) for _ in range(c.blocks)), Norm(h))
        if c.head == "discrete":
            self.codes = nn.Linear(h, c.depth * c.vocab[0])
            return
        d = c.vectors or 0
        self.logits = nn.Linear(h, c.components)
        self.low = nn.Linear(h, c.components * c.rank, bias=False)
        self.shift = nn.Linear(h, d)
        self.log_scale = nn.Linear(h, 1)
        self.matrices = nn.Parameter(torch.randn(c.components, d, c.rank) / c.rank**0.5)

    def mixture(self, hidden: Tensor) -> Mixture:
        """The mixture of states [P, h], in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = self.blocks(hidden.float())
            low = self.low(x).unflatten(-1, (self.config.components, self.config.rank))
            scale = self.log_scale(x)[:, 0].clamp(min=FLOOR)
            return Mixture(self.logits(x), low, self.shift(x), scale, self.matrices)

    def discrete(self, hidden: Tensor) -> Tensor:
        """Logits [P, D, V] of states [P, h]."""
        return self.codes(self.blocks(hidden)).float().unflatten(-1, (self.config.depth, -1))


@dataclass(frozen=True, kw_only=True)
class ResGenSampling:
    """How codes are drawn.

    Args:
        steps: T, passes of the network.
        top_p: of the components (of the codes, for the discrete head).
        cfg: guidance w on hidden states, h = h_c + w (h_c - h_u); 0 for none.
        noise: scales the Gaussian's standard deviation.
        temperature: of the noise on confidence, falling to 0 with t.
        order: "confidence" as in the paper, or "random": the posterior itself.
    """

    steps: int = 16
    top_p: float = 1.0
    cfg: float = 0.0
    noise: float = 1.0
    temperature: float = 1.0
    order: Literal["confidence", "random"] = "confidence"

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"steps {self.steps}, top_p {self.top_p}: expected 1 or more, and 0 < top_p <= 1"
            )


class ResGen(RVQBody):
    """Body and head; `ground` it in a codec before use."""

    config: ResGenConfig

    def __init__(self, config: ResGenConfig):
        super().__init__(config)
        self.head = Head(config)

    @property
    def books(self) -> Tensor:
        """Code vectors [D, V, d]."""
        return self.tables.weight.unflatten(0, (self.config.depth, -1))

    def hidden(
        self, codes: Sequence[Tensor], masked: Sequence[Tensor], conditions: Sequence[Tensor]
    ) -> Tensor:
        """States [P, h] of all rows' positions, one behind another.

        Args:
            codes: [L_i, D] of each row; what is masked is not read.
            masked: k [L_i] of each row.
        """
        rows = [
            torch.cat([self.condition(c), self.tables.mapped(self.visible_sum(x, k))])
            for x, k, c in zip(codes, masked, conditions)
        ]
        states = self.both_ways(rows)
        return after(states, [len(c) for c in conditions], [len(x) for x in codes])

    def visible_sum(self, codes: Tensor, masked: Tensor) -> Tensor:
        """Sum [L, d] of the visible vectors."""
        return self._sum(codes, self._seen(masked))

    def masked_sum(self, codes: Tensor, masked: Tensor) -> Tensor:
        """z [L, d]: the sum of the masked vectors."""
        return self._sum(codes, ~self._seen(masked))

    def loss(
        self, codes: Sequence[Tensor], conditions: Sequence[Tensor], rng: torch.Generator
    ) -> dict[str, Tensor]:
        """The bound at one random r a row, per masked code.

        Args:
            codes: [L_i, D] of each row.
            conditions: ids [P_i] of each row.
        """
        drawn = torch.rand(2, len(codes), generator=rng, device=rng.device).tolist()
        codes = [one.to(self.device) for one in codes]
        masked = []
        for x, r in zip(codes, drawn[0]):
            n = max(1, self.config.masked(r * self.config.latest, len(x)))
            masked.append(draw_masked(n, len(x), self.config.depth, rng).to(self.device))
        kept = [c[:0] if u < self.config.drop else c for c, u in zip(conditions, drawn[1])]
        return self.losses(codes, masked, kept)

    def losses(
        self, codes: Sequence[Tensor], masked: Sequence[Tensor], conditions: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The bound for given masks: "loss" and its terms, per masked code."""
        hidden, k = self.hidden(codes, masked, conditions), torch.cat(list(masked))
        chosen, count = k > 0, k.sum()
        if self.config.head == "discrete":
            logits = self.head.discrete(hidden)
            each = F.cross_entropy(
                logits.flatten(0, 1), torch.cat(list(codes)).flatten(), reduction="none"
            )
            loss = (each.view(len(k), -1) * ~self._seen(k)).sum() / count
            return {"loss": loss}
        z = torch.cat([self.masked_sum(x, m) for x, m in zip(codes, masked)])
        mixture = self.head.mixture(hidden[chosen])
        density, choice = mixture.losses(z[chosen].float(), self.config.smoothing)
        density, choice = density.sum() / count, choice.sum() / count
        return {"loss": density + choice, "density": density.detach(), "choice": choice.detach()}

    def run(
        self,
        requests: Sequence[CodeRequest],
        options: ResGenSampling | None = None,
        rng: Rng | None = None,
    ) -> Iterator[CodeEvent]:
        """One event a row and step; what is masked still is -1. No row depends on its neighbours."""
        for number, request in enumerate(requests):
            self.check(number, request)
        return self._loop(requests, options or ResGenSampling(), item_rngs(rng, len(requests)))

    @torch.inference_mode()
    def _loop(
        self,
        requests: Sequence[CodeRequest],
        options: ResGenSampling,
        rng: Sequence[torch.Generator],
    ) -> Iterator[CodeEvent]:
        depth, lengths = self.config.depth, [r.length for r in requests]
        codes = [torch.zeros(n, depth, dtype=torch.int64, device=self.device) for n in lengths]
        masked = [torch.full((n,), depth, device=self.device) for n in lengths]
        for t in range(1, options.steps + 1) if requests else ():
            hidden = self._guided(requests, codes, masked, options.cfg).split(lengths)
            for i, request in enumerate(requests):
                new, score = self._predict(hidden[i], codes[i], masked[i], options, rng[i])
                left = self.config.masked(t / options.steps, request.length)
                heat = options.temperature * (1 - t / options.steps)
                still = _choose(masked[i], score, left, heat, options.order, rng[i])
                codes[i], masked[i] = new, still
                known = new.masked_fill(~self._seen(still), -1).cpu()
                forwards = t * (2 if options.cfg else 1)
                yield CodeEvent(i, known, forwards, t == options.steps)

    def _guided(
        self,
        requests: Sequence[CodeRequest],
        codes: list[Tensor],
        masked: list[Tensor],
        scale: float,
    ) -> Tensor:
        conditions = [r.condition for r in requests]
        if not scale:
            return self.hidden(codes, masked, conditions)
        both = conditions + [c[:0] for c in conditions]
        with_it, without = self.hidden(codes * 2, masked * 2, both).chunk(2)
        return with_it + scale * (with_it - without)

    def _predict(
        self,
        hidden: Tensor,
        codes: Tensor,
        masked: Tensor,
        options: ResGenSampling,
        rng: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Codes [L, D], the masked ones drawn, and the confidence of each draw, [L, D]."""
        if self.config.head == "discrete":
            logits = self.head.discrete(hidden)
            drawn = _gumbel_max(_nucleus(logits, options.top_p), rng)
            score = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            return torch.where(self._seen(masked), codes, drawn), score
        mixture = self.head.mixture(hidden)
        component = _gumbel_max(_nucleus(mixture.logits, options.top_p), rng)
        noise = torch.randn(mixture.shift.shape, generator=rng, device=rng.device).to(hidden)
        scale = options.noise * torch.exp(mixture.log_scale)
        z = mixture.means(component) + scale[:, None] * noise
        density = mixture.log_densities(z).gather(-1, component[:, None]) / z.shape[-1]
        weight = mixture.logits.log_softmax(-1).gather(-1, component[:, None])
        return residual_codes(z, self.books, codes, masked), (density + weight).expand_as(codes)

    def _seen(self, masked: Tensor) -> Tensor:
        """Which codes are visible: [L, D], of k [L]."""
        depth = self.config.depth
        return torch.arange(depth, device=masked.device) < (depth - masked)[:, None]

    def _sum(self, codes: Tensor, which: Tensor) -> Tensor:
        return (self.tables.vectors(codes) * which[..., None]).sum(-2)


def residual_codes(z: Tensor, books: Tensor, codes: Tensor, masked: Tensor) -> Tensor:
    """Quantise z [L, d] residually with books [D, V, d], from the first masked depth of each position on.

    Args:
        codes: [L, D], kept where they are visible.
        masked: k [L].
    """
    depth, residual, new = len(books), z, []
    for j, book in enumerate(books):
        nearest = (book.square().sum(-1) - 2 * residual @ book.T).argmin(-1)
        own = j >= depth - masked
        new.append(torch.where(own, nearest, codes[:, j]))
        residual = residual - book[nearest] * own[:, None]
    return torch.stack(new, 1)


def _choose(
    masked: Tensor, score: Tensor, left: int, heat: float, order: str, rng: torch.Generator
) -> Tensor:
    """The new k [L], `left` in all: what is likeliest comes first, shallow before deep."""
    if order == "random":
        return draw_less(masked, left, rng).to(masked)
    length, depth = score.shape
    noise = heat * _gumbel((length, depth), rng).to(score)
    own = torch.arange(depth, device=score.device) >= (depth - masked)[:, None]
    # Sorted down the depths, the best codes of a position are always its shallowest.
    ranked = (score + noise).masked_fill(~own, torch.inf).sort(-1, descending=True).values
    shown = ranked.flatten().argsort(descending=True, stable=True)[: length * depth - left]
    return depth - torch.bincount(shown // depth, minlength=length)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [..., K] with -inf outside the likeliest that reach p together."""
    if top_p == 1:
        return logits
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def _gumbel_max(logits: Tensor, rng: torch.Generator) -> Tensor:
    return (logits + _gumbel(logits.shape, rng).to(logits)).argmax(-1)


def _gumbel(shape: Sequence[int], rng: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(min=1e-300)))
