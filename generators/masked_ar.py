"""TokenBridge's generator (arXiv 2503.16430, YuqingWang1029/TokenBridge): masked autoregression of KL-16 codes.

- A masked autoencoder, as in MAR. The encoder sees the positions that are known, as the 16 numbers that codes stand
  for, behind `buffer` slots that all hold the class. The decoder fills the open ones with a mask token and gives every
  position a feature.
- Positions become known in a random order of each picture's own. The cosine law says how many stay open; those that
  are revealed in a step are drawn side by side, each with its codes one after another (`DimensionWise`).
- Guidance mixes features before the head, not logits, and by default rises with what is known. Both halves of a
  request are one batch; without guidance there is one half.
- Codes stand in the VAE's order everywhere but inside the head, which has its own (from a frequency analysis).

B pictures, R rows (B, or 2 B with guidance), N positions, K known ones, C codes of a position, V levels, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..backbone.heads import DimensionWise, DimensionWiseConfig, Mlp
from ..codecs.codec import Codec, item_rngs
from ..codecs.published import Weights, WeightsError, load_into
from ..codecs.quantizers.gaussian import GaussianConfig, GaussianQuantizer
from ..codecs.stream import TokenStream
from .generator import Event
from .maskgit import open_positions
from .sampling import Sampling, guided, probabilities

if TYPE_CHECKING:
    from .published import Row

ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
HEAD = ("condition_proj", "channel_", "timesteps_", "token_embeddings")  # keys of the head
TABLES = (
    "reconstruction_values",
    "boundaries",
    "channel_mask",
)  # buffers that published files carry


@dataclass(frozen=True, kw_only=True)
class MaskedARConfig:
    """Sizes; the defaults are TokenBridge-L's.

    Args:
        grid: sides of the picture in positions.
        width, heads: W and attention heads of encoder and decoder.
        head_width, head_layers, head_heads: of the dimension-wise head.
        buffer: slots that hold the class.
        bits: a code has 2**bits levels.
        order: the VAE's channel that the head writes first, second, ...
        low, high: the quantiser's range.
    """

    grid: tuple[int, int] = (16, 16)
    width: int = 1024
    encoder_layers: int = 16
    decoder_layers: int = 16
    heads: int = 16
    head_width: int = 1024
    head_layers: int = 4
    head_heads: int = 8
    buffer: int = 64
    classes: int = 1000
    bits: int = 6
    order: tuple[int, ...] = ORDER
    low: float = -5.0
    high: float = 5.0

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "order", tuple(self.order))
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"order is {self.order}, expected each channel once")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads {self.heads}")

    @property
    def positions(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def channels(self) -> int:
        """C."""
        return len(self.order)

    @property
    def head(self) -> DimensionWiseConfig:
        """Sizes of the head."""
        return DimensionWiseConfig(
            features=self.width,
            dimensions=self.channels,
            levels=2**self.bits,
            width=self.head_width,
            layers=self.head_layers,
            heads=self.head_heads,
        )


SIZES = {
    "b": MaskedARConfig(width=768, encoder_layers=12, decoder_layers=12, heads=12, head_width=768),
    "l": MaskedARConfig(),
    "h": MaskedARConfig(width=1280, encoder_layers=20, decoder_layers=20, head_layers=6),
}


@dataclass(frozen=True, kw_only=True)
class MaskedAROptions:
    """How pictures are drawn; the defaults are those published for L, with the faster number of steps.

    Args:
        steps: passes of the network; 256 reveals one position each.
        cfg: guidance on features; 1 for none.
        schedule: "linear" rises from 1 to `cfg` with the share of positions that is known; or "constant".
        temperature, top_k, top_p: of each code, as in `Sampling`.
    """

    steps: int = 64
    cfg: float = 3.1
    schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 0.96
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected 1 or more")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}, expected 'linear' or 'constant'")
        _ = self.sampling  # raises where its numbers are not possible

    @property
    def sampling(self) -> Sampling:
        """How a code is drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def guidance(self, left: int, positions: int) -> float:
        """The weight of a step after which `left` positions are open."""
        if self.schedule == "constant":
            return self.cfg
        return 1 + (self.cfg - 1) * (positions - left) / positions


@dataclass(frozen=True, kw_only=True)
class CodesRequest:
    """One picture to draw.

    Args:
        label: its class; None for none.
        codes: [N, C], what stands already and stays; -1 at open positions. None where all are open.
    """

    label: int | None = None
    codes: Tensor | None = None


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "r t (three n h) -> three r n t h", three=3, n=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "r n t h -> r t (n h)"))


class _Block(nn.Module):
    """A vision transformer's block, under timm's names: [R, T, W] -> [R, T, W]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MaskedARNetwork(nn.Module):
    """Known codes and a class to features of all positions, and from features to codes (`head`)."""

    def __init__(self, config: MaskedARConfig | None = None):
        super().__init__()
        self.config = c = config or MaskedARConfig()
        length = c.buffer + c.positions
        self.class_emb = nn.Embedding(c.classes, c.width)
        self.fake_latent = nn.Parameter(torch.randn(1, c.width) * 0.02)
        self.z_proj = nn.Linear(c.channels, c.width)
        self.z_proj_ln = nn.LayerNorm(c.width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.randn(1, length, c.width) * 0.02)
        self.encoder_blocks = nn.ModuleList(
            _Block(c.width, c.heads) for _ in range(c.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.decoder_embed = nn.Linear(c.width, c.width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, c.width) * 0.02)
        self.decoder_pos_embed_learned = nn.Parameter(torch.randn(1, length, c.width) * 0.02)
        self.decoder_blocks = nn.ModuleList(
            _Block(c.width, c.heads) for _ in range(c.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.output_pos_embed = nn.Parameter(torch.randn(1, c.positions, c.width) * 0.02)
        self.head = DimensionWise(c.head)
        self.quantizer = GaussianQuantizer(GaussianConfig(bits=c.bits, low=c.low, high=c.high))
        self.inverse = [c.order.index(i) for i in range(c.channels)]

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        source: str = "state dict",
    ) -> MaskedARNetwork:
        """The network of a published state dict, sizes inferred from its shapes.

        Args:
            config: what shapes do not say (heads, grid where it is not square); fields of `MaskedARConfig`.

        Raises:
            WeightsError: keys or shapes are not these, or its tables are not those of the quantiser.
        """
        network = cls(replace(infer_config(state_dict, source), **(config or {})))
        _check_tables(network, state_dict, source)
        renamed = {
            f"head.{key}" if key.startswith(HEAD) else key: value
            for key, value in state_dict.items()
            if key not in TABLES
        }
        load_into(network, renamed, source=source)
        return network.eval()

    def condition(self, labels: Tensor) -> Tensor:
        """Embeddings [R, W] of labels [R]; -1 means no class."""
        known = self.class_emb(labels.clamp(min=0))
        return torch.where((labels >= 0)[:, None], known, self.fake_latent)

    def forward(self, codes: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        """Features [R, N, W] of all positions.

        Args:
            codes: [R, N, C], in the VAE's order; what stands at open positions is not read.
            known: [R, N], equally many in each row.
            labels: [R]; -1 for none.
        """
        places = self._places(known)
        encoded = self.encode(codes, places, labels)
        return self.decode(encoded, places)

    def encode(self, codes: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        """The buffer and the known positions: [R, buffer + K, W]."""
        dtype, buffer = self.fake_latent.dtype, self.config.buffer
        rows = torch.arange(len(places), device=places.device)[:, None]
        values = self.quantizer.dequantize(codes[rows, places]).to(dtype)
        slots = self.condition(labels)[:, None].expand(-1, buffer, -1)
        x = torch.cat([slots, self.z_proj(values)], 1)
        x = self.z_proj_ln(x + self._positions(self.encoder_pos_embed_learned, places))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, places: Tensor) -> Tensor:
        """Features [R, N, W] of all positions."""
        c = self.config
        x = self.decoder_embed(encoded)
        rows = torch.arange(len(places), device=places.device)[:, None]
        body = self.mask_token.to(x.dtype).repeat(len(x), c.positions, 1)
        body[rows, places] = x[:, c.buffer :]
        x = torch.cat([x[:, : c.buffer], body], 1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, c.buffer :] + self.output_pos_embed

    def logits(self, features: Tensor, codes: Tensor) -> Tensor:
        """Logits [n, C, V] of features [n, W], given codes [n, C]; both in the VAE's order."""
        return self.head(features, codes[:, list(self.config.order)])[:, self.inverse]

    def loss(self, codes: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy [nats a code] of the open positions; arguments as in `forward`."""
        features, wanted = self(codes, known, labels)[~known], codes[~known]
        logits = self.logits(features, wanted).float()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    def _positions(self, table: Tensor, places: Tensor) -> Tensor:
        """[R, buffer + K, W]."""
        buffer = self.config.buffer
        slots = table[:, :buffer].expand(len(places), -1, -1)
        return torch.cat([slots, table[0, buffer:][places]], 1)

    def _places(self, known: Tensor) -> Tensor:
        """Where the known positions are, ascending: [R, K].

        Raises:
            ValueError: rows that know differently many.
        """
        counts = known.sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"rows know {counts} positions, expected equally many in each")
        return known.nonzero()[:, 1].view(len(known), -1)


class MaskedAR:
    """Draws codes with a `MaskedARNetwork`.

    Args:
        options: what `run` uses where it is given none.
        codec: the name of the codec whose codes the network writes, where known.
    """

    critic = None  # masked decoding of other systems may have one

    def __init__(
        self,
        network: MaskedARNetwork,
        *,
        options: MaskedAROptions | None = None,
        codec: str | None = None,
    ):
        self.network = network.eval()
        self.options = options or MaskedAROptions()
        self.codec = codec

    def run(
        self,
        requests: Sequence[CodesRequest],
        options: MaskedAROptions | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Iterator[Event]:
        """One event a step and request; its `codes` [N, C] are -1 where a position is open.

        Requests in which equally many positions stand already run in one batch.

        Args:
            rng: one generator a request; None draws each from seed 0.

        Raises:
            ValueError: a label or codes that the network does not have.
        """
        for i, request in enumerate(requests):
            self._check(i, request)
        rngs = item_rngs(rng, len(requests))
        codes = [self._codes(request) for request in requests]
        groups: dict[int, list[int]] = {}
        for i, own in enumerate(codes):
            groups.setdefault(int((own[:, 0] >= 0).sum()), []).append(i)
        return self._all(requests, codes, options or self.options, rngs, groups)

    def fill(
        self,
        requests: Sequence[CodesRequest],
        options: MaskedAROptions | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> list[Tensor]:
        """The codes [N, C] of each picture, on the CPU."""
        done = {e.request: e.codes for e in self.run(requests, options, rng) if e.reason}
        return [done[i].cpu() for i in range(len(requests))]  # type: ignore[union-attr]

    def streams(
        self,
        codec: Codec,
        labels: Sequence[int | None],
        *,
        options: MaskedAROptions | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> list[TokenStream]:
        """Whole streams of a codec, which decodes them to pictures.

        Raises:
            ValueError: the codec has other codes than the network.
        """
        c = self.network.config
        if codec.spec.vocab != ((2**c.bits,) * c.channels,):
            raise ValueError(
                f"'{codec.spec.name}' has the vocabulary {codec.spec.vocab}, the network writes {c.channels} codes of "
                f"{c.bits} bits a position; load 'tokenbridge/kl16-{c.bits}bit'"
            )
        requests = [CodesRequest(label=label) for label in labels]
        return [codec.stream(codes, grid=c.grid) for codes in self.fill(requests, options, rng)]

    @torch.inference_mode()
    def _all(
        self,
        requests: Sequence[CodesRequest],
        codes: list[Tensor],
        options: MaskedAROptions,
        rngs: list[torch.Generator],
        groups: dict[int, list[int]],
    ) -> Iterator[Event]:
        device = self.network.fake_latent.device
        for members in groups.values():
            given = torch.stack([codes[i] for i in members]).to(device)
            labels = [-1 if (own := requests[i].label) is None else own for i in members]
            own_rngs = [rngs[i] for i in members]
            steps = self._group(given, torch.tensor(labels, device=device), options, own_rngs)
            for now in steps:
                for i, row in zip(members, now):
                    known = int((row[:, 0] >= 0).sum())
                    reason = "end" if known == len(row) else None
                    yield Event(i, (), known, reason, row)

    def _group(
        self,
        codes: Tensor,
        labels: Tensor,
        options: MaskedAROptions,
        rngs: list[torch.Generator],
    ) -> Iterator[Tensor]:
        """Codes [B, N, C] after each step that reveals something."""
        known = codes[..., 0] >= 0
        free = codes.shape[1] - int(known[0].sum())
        order = torch.stack([_ranks(row, g) for row, g in zip(known, rngs)])  # of being opened last
        left, step = free, 0
        while left:
            # at least one is revealed, and one stays for the last step, which takes all that are open
            wanted = open_positions((step + 1) / options.steps, free)
            after = max(1, min(left - 1, wanted))
            reveal = ~known & ((order >= after) | (step == options.steps - 1))
            if reveal.any():
                codes = self._reveal(codes, known, reveal, labels, options, after, rngs)
                known = known | reveal
                left = codes.shape[1] - int(known[0].sum())
                yield codes
            step += 1
        if not free:
            yield codes

    def _reveal(
        self,
        codes: Tensor,
        known: Tensor,
        reveal: Tensor,
        labels: Tensor,
        options: MaskedAROptions,
        left: int,
        rngs: list[torch.Generator],
    ) -> Tensor:
        """One pass: the codes with those of the positions `reveal` [B, N] written."""
        network = self.network
        if options.cfg == 1 or not bool((labels >= 0).any()):  # nothing to guide
            features = network(codes, known, labels)[reveal]
        else:
            both = torch.cat([labels, torch.full_like(labels, -1)])
            whole = network(codes.repeat(2, 1, 1), known.repeat(2, 1), both)
            features, null = (half[reveal] for half in whole.chunk(2))
            weight = options.guidance(left, codes.shape[1])
            features = guided(features, null, weight)
        spots = _spots(reveal, network.config.channels, rngs)
        drawn = network.head.sample(
            features, lambda logits, i: choose(logits, options.sampling, spots[:, i])
        )
        codes = codes.clone()
        codes[reveal] = drawn[:, network.inverse]
        return codes

    def _check(self, number: int, request: CodesRequest) -> None:
        c = self.network.config
        if request.label is not None and not 0 <= request.label < c.classes:
            raise ValueError(
                f"request {number} has label {request.label}, expected 0 ... {c.classes - 1}, or None"
            )
        codes = request.codes
        if codes is None:
            return
        if tuple(codes.shape) != (c.positions, c.channels) or codes.is_floating_point():
            raise ValueError(
                f"request {number} has codes {tuple(codes.shape)} of {codes.dtype}, expected integers "
                f"[{c.positions}, {c.channels}]"
            )
        whole = (codes >= 0).all(1) | (codes == -1).all(1)
        if int(codes.max()) >= 2**c.bits or not bool(whole.all()):
            raise ValueError(
                f"request {number}: a position's codes are 0 ... {2**c.bits - 1}, or all of them -1"
            )

    def _codes(self, request: CodesRequest) -> Tensor:
        c = self.network.config
        if request.codes is None:
            return torch.full((c.positions, c.channels), -1)
        return request.codes.long()


def build(files: Mapping[str, Weights], row: Row) -> MaskedAR:
    """The generator of a row of `generators.published`."""
    weights = files["weights"]
    network = MaskedARNetwork.from_published(weights.tensors, row.config, source=weights.source)
    return MaskedAR(network, options=MaskedAROptions(**row.options), codec=row.codec)


def infer_config(state: Mapping[str, Tensor], source: str = "state dict") -> MaskedARConfig:
    """Sizes from the shapes of a published state dict.

    Heads are in no shape: encoder and decoder have the published ones (64 wide; 16 from a width of 1024 on).
    """
    needed = (
        "class_emb.weight",
        "z_proj.weight",
        "encoder_pos_embed_learned",
        "output_pos_embed",
        "channel_heads.0.weight",
        "channel_blocks.0.attn.q_norm.weight",
    )
    if missing := [key for key in needed if key not in state]:
        raise WeightsError(f"{source}: no masked AR network: {', '.join(missing)} missing")
    classes, entry, table, out, levels, head_size = (state[key].shape for key in needed)
    side = round(out[1] ** 0.5)
    channels = entry[1]
    return MaskedARConfig(
        grid=(side, side),
        width=entry[0],
        heads=min(16, max(1, entry[0] // 64)),
        encoder_layers=_count(state, "encoder_blocks"),
        decoder_layers=_count(state, "decoder_blocks"),
        head_width=levels[1],
        head_layers=_count(state, "channel_blocks"),
        head_heads=levels[1] // head_size[0],
        buffer=table[1] - out[1],
        classes=classes[0],
        bits=levels[0].bit_length() - 1,
        order=ORDER if channels == len(ORDER) else tuple(range(channels)),
    )


def choose(logits: Tensor, sampling: Sampling, spots: Tensor) -> Tensor:
    """One code [n] of logits [n, V]: the likeliest, or where the numbers `spots` [n] in 0 ... 1 fall."""
    if sampling.greedy:
        return logits.argmax(-1)
    below = probabilities(logits, sampling).double().cumsum(-1)
    places = torch.searchsorted(below, (spots * below[:, -1])[:, None], right=True).squeeze(-1)
    return places.clamp(max=logits.shape[-1] - 1)


def random_order(n: int, rng: torch.Generator) -> Tensor:
    """A permutation of n positions; those at its end are revealed first."""
    return torch.randperm(n, generator=rng, device=rng.device)


def _ranks(known: Tensor, rng: torch.Generator) -> Tensor:
    """The place of each open position in a random order of them, [N]; -1 where a position is known."""
    places = (~known).nonzero()[:, 0]
    ranks = torch.full(known.shape, -1, dtype=torch.int64, device=known.device)
    order = random_order(len(places), rng).to(known.device)
    ranks[places[order]] = torch.arange(len(places), device=known.device)
    return ranks


def _spots(reveal: Tensor, channels: int, rngs: Sequence[torch.Generator]) -> Tensor:
    """A number in 0 ... 1 for each code to draw, [n, C], picture after picture."""
    counts = reveal.sum(1).tolist()
    rows = [
        torch.rand(count, channels, generator=g, device=g.device, dtype=torch.float64)
        for count, g in zip(counts, rngs)
    ]
    return torch.cat([row.to(reveal.device) for row in rows])


def _count(state: Mapping[str, Tensor], stem: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{stem}.")})


def _check_tables(network: MaskedARNetwork, state: Mapping[str, Tensor], source: str) -> None:
    """Files of averaged weights have no tables; where there are any, they must be what we compute with."""
    levels = state.get("reconstruction_values")
    ours = network.quantizer.levels
    if levels is not None and (levels.float() - ours).abs().max() > 1e-4:
        raise WeightsError(
            f"{source}: its levels are not those of the {network.config.bits}-bit quantiser"
        )
    mask = state.get("channel_mask")  # 0 where a dimension may look, else -inf
    if mask is not None and not torch.equal(mask == 0, torch.ones_like(mask).tril() == 1):
        raise WeightsError(f"{source}: its channel_mask is not causal")
