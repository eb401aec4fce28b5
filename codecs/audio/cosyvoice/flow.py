"""Flow matching: S3 tokens and a voice to a mel spectrum (CosyVoice 1, 2, 3; Matcha-TTS, arXiv 2309.03199).

    tokens [T'] ─ encoder ─▶ mu [T, M]   what is said, at the mel's rate
    z [T, M] noise ─ steps · (x += dt · velocity(x, t; mu, speaker, prompt)) ─▶ mel [T, M]

The prompt's tokens and mel go in front; the network continues them, and only what follows the prompt is given back.

| version | encoder | velocity | frames of T' tokens | noise |
|---|---|---|---|---|
| v1 | conformer, then stretched in time | UNet with resampling | ⌊T' / rate · 22050 / 256⌋ | fresh |
| v2 | conformer that doubles the rate | causal UNet | 2 T' | columns of one table |
| v3 | lookahead, each token twice | DiT | 2 T' | columns of one table |

- Euler steps at 1 − cos: short ones first. Guidance goes away from the velocity that knows neither tokens nor voice;
  both velocities are one batch, and guidance 0 leaves the second one out.
- The table is `torch.randn(1, 80, 15000)` of seed 0 in the published code, in no checkpoint. It is what `noise_table`
  draws from a generator of seed 0, our default; another generator gives another rendition.
- v2 and v3 stream. In chunks of 25 tokens a frame sees its chunk and all before it (and 3 tokens more), so a prefix's
  mel is final: `generate(..., chunked=True, last=False)`. What `chunked=True` gives for the whole is the same mel.
- Every draw comes from outside, and a batch of unequal lengths equals the single calls.

Letters: B batch, T' tokens, T frames, M mel bands, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...published import WeightsError, load_into
from .conformer import LOOKAHEAD, Encoder, Lookahead, UpsamplingEncoder
from .dit import DiT
from .unet import UNet
from .voice import Voice

CHUNK = 25  # tokens, in streaming
FRAMES = 15_000  # of the noise table: 300 s
TURN = 20  # tokens at either end that v1 stretches by themselves
V1_RATE, V1_HOP = 22_050, 256
V1, V2, V3 = "v1", "v2", "v3"


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Sizes of a flow, those of v2 if nothing is said.

    Args:
        version: which encoder and which velocity network (see the module).
        mels: M.
        vocab: tokens.
        speaker: length of a speaker's vector.
        width: of the encoder; v3's is M.
        heads, hidden, layers, up_layers: of the encoder's blocks (v1, v2).
        lookahead: channels of v3's lookahead.
        channels, blocks, middle: of the UNet: its levels, transformer blocks a level, levels in the middle (v1, v2).
        dit_width, dit_layers, dit_hidden: of the DiT (v3).
        velocity_heads, head_width: of the velocity network's attention.
        token_rate: tokens a second; v1 alone needs it.
    """

    version: Literal["v1", "v2", "v3"] = "v2"
    mels: int = 80
    vocab: int = 6561
    speaker: int = 192
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    layers: int = 6
    up_layers: int = 4
    lookahead: int = 1024
    channels: tuple[int, ...] = (256,)
    blocks: int = 4
    middle: int = 12
    dit_width: int = 1024
    dit_layers: int = 22
    dit_hidden: int = 2048
    velocity_heads: int = 8
    head_width: int = 64
    token_rate: int = 25

    def __post_init__(self):
        if self.version not in (V1, V2, V3):
            raise ValueError(f"version is {self.version!r}, expected v1, v2 or v3")
        if self.token_rate not in (25, 50):
            raise ValueError(f"token_rate is {self.token_rate}, expected 25 or 50")
        if self.version == V3 and self.width != self.mels:
            raise ValueError(f"width is {self.width}, expected mels = {self.mels} for v3")
        if self.version != V3 and self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads = {self.heads}")
        if self.version == V3 and self.dit_width != self.velocity_heads * self.head_width:
            raise ValueError(
                f"dit_width is {self.dit_width}, expected velocity_heads · head_width = "
                f"{self.velocity_heads * self.head_width}"
            )

    @property
    def causal(self) -> bool:
        """Whether it streams."""
        return self.version != V1


PUBLISHED = {
    V1: FlowConfig(version="v1", vocab=4096, up_layers=0, channels=(256, 256), token_rate=50),
    V2: FlowConfig(),
    V3: FlowConfig(version="v3", width=80, velocity_heads=16),
}


class Flow(nn.Module):
    """Tokens and voices to mels. `make_flow` chooses the version's class."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = c = config
        self.input_embedding = nn.Embedding(c.vocab, c.width)
        self.spk_embed_affine_layer = nn.Linear(c.speaker, c.mels)
        self.decoder = nn.Module()

    @staticmethod
    def from_published(
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, object] | None = None,
        *,
        source: str = "<memory>",
    ) -> Flow:
        """From `flow.pt`.

        Args:
            config: what the tensors do not say: {"version": ..., "token_rate": 25 or 50 (v1), "head_width": 64}.

        Raises:
            WeightsError: another model's tensors.
        """
        state = {k.removeprefix("module."): v for k, v in state_dict.items()}
        state = {k: v for k, v in state.items() if k not in ("epoch", "step")}
        flow = make_flow(infer_config(state, config or {}, source))
        tables = {k: v for k, v in flow.state_dict().items() if k.endswith("inv_freq")}
        load_into(flow, {**tables, **state}, source=source)
        return flow.eval()

    def frames(self, tokens: int) -> int:
        """T of so many tokens."""
        return 2 * tokens

    def encode(
        self, ids: Tensor, n: Tensor | None, *, chunk: int = 0, last: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T'], of which n [B] count, to mu [B, T, M] and its lengths (v2, v3)."""
        raise NotImplementedError

    def velocity(
        self,
        x: Tensor,
        mu: Tensor,
        speaker: Tensor,
        prompt: Tensor,
        time: Tensor,
        n: Tensor | None = None,
        *,
        chunk: int = 0,
    ) -> Tensor:
        """x, mu, prompt [B, T, M], speaker [B, M], time [] or [B] to [B, T, M]; `chunk` in frames, 0 for none."""
        return self.decoder.estimator(x, mu, speaker, prompt, time, n, chunk)

    def speaker(self, embedding: Tensor) -> Tensor:
        """Speakers' vectors [B, E], of any length, to [B, M]."""
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1))

    def noise_table(self, rng: torch.Generator) -> Tensor:
        """The noise [M, FRAMES] of one item, of which a mel takes the first columns."""
        return torch.randn(self.config.mels, FRAMES, generator=rng, device=rng.device).cpu()

    @torch.no_grad()
    def generate(
        self,
        tokens: Sequence[Tensor],
        voices: Sequence[Voice],
        noise: Sequence[Tensor],
        *,
        steps: int = 10,
        guidance: float = 0.7,
        chunked: bool = False,
        last: bool = True,
    ) -> list[Tensor]:
        """One mel [M, T_i] (float32) for each row of tokens [T'_i].

        Args:
            voices: who speaks.
            noise: [M, at least the frames of prompt and tokens].
            steps: Euler steps.
            guidance: how much further than the conditional velocity to go.
            chunked: in chunks of 25 tokens, as streaming does (v2, v3).
            last: whether the tokens end here; else the last 3 are only looked at.

        Raises:
            ValueError: no tokens, more than 300 s, a voice of another version, or noise that is too short.
        """
        where, kind = self._place()
        ids = [torch.cat([v.tokens, t.reshape(-1).cpu().long()]) for t, v in zip(tokens, voices)]
        self._check(ids, voices, chunked=chunked, last=last)
        mu, n = self._means(ids, voices, CHUNK if chunked else 0, last)
        rows = [z.T[: int(length)] for z, length in zip(noise, n)]
        if short := [i for i, (z, length) in enumerate(zip(rows, n)) if len(z) < length]:
            raise ValueError(
                f"noise of row {short[0]} is too short, expected {int(n[short[0]])} frames"
            )
        z = pad_sequence(rows, batch_first=True).to(where, torch.float32)
        prompt = pad_sequence([v.mel for v in voices], batch_first=True).to(where, kind)
        prompt = F.pad(prompt, (0, 0, 0, mu.shape[1] - prompt.shape[1]))
        speaker = self.speaker(torch.stack([v.embedding for v in voices]).to(where, kind))
        ragged = len(set(n.tolist())) > 1
        chunk = self.frames(CHUNK) if chunked else 0
        x = self.solve(
            z, mu, speaker, prompt, n.to(where) if ragged else None, steps, guidance, chunk
        )
        return [row[len(v.mel) : int(length)].T for row, v, length in zip(x, voices, n)]

    def solve(
        self,
        x: Tensor,
        mu: Tensor,
        speaker: Tensor,
        prompt: Tensor,
        n: Tensor | None,
        steps: int,
        guidance: float,
        chunk: int,
    ) -> Tensor:
        """Noise x [B, T, M] (float32) along the velocities to mels [B, T, M]."""
        kind, both = mu.dtype, guidance != 0
        if both:
            mu, speaker, prompt = (
                torch.cat([y, torch.zeros_like(y)]) for y in (mu, speaker, prompt)
            )
            n = None if n is None else torch.cat([n, n])
        times = 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * math.pi)
        time = times[0]
        for later in times[1:]:
            # The published code adds steps up, so the time that it tells the network is rounded likewise.
            dt = later - time
            given = torch.cat([x, x]) if both else x
            v = self.velocity(
                given.to(kind), mu, speaker, prompt, time.to(x.device), n, chunk=chunk
            ).float()
            if both:
                known, unknown = v.chunk(2)
                v = (1 + guidance) * known - guidance * unknown
            x = x + dt.to(x.device) * v
            time = time + dt
        return x

    def _means(
        self, ids: list[Tensor], voices: Sequence[Voice], chunk: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Rows of prompt and tokens to mu [B, T, M] and lengths [B] (CPU)."""
        where, _ = self._place()
        n = torch.tensor([len(row) for row in ids])
        ragged = len(set(n.tolist())) > 1
        x = pad_sequence(ids, batch_first=True).to(where)
        mu, _ = self.encode(x, n.to(where) if ragged else None, chunk=chunk, last=last)
        return mu, 2 * (n if last else n - LOOKAHEAD)

    def _place(self) -> tuple[torch.device, torch.dtype]:
        weight = self.spk_embed_affine_layer.weight
        return weight.device, weight.dtype

    def _check(
        self, ids: list[Tensor], voices: Sequence[Voice], *, chunked: bool, last: bool
    ) -> None:
        c = self.config
        if (chunked or not last) and not c.causal:
            raise ValueError("a v1 flow sees all frames at once and cannot stream; v2 and v3 can")
        for row, voice in zip(ids, voices):
            fresh = len(row) - len(voice.tokens)
            if fresh < (1 if last else 1 + LOOKAHEAD):
                raise ValueError(f"there are {fresh} tokens to speak, expected more")
            if int(row.max()) >= c.vocab or int(row.min()) < 0:
                raise ValueError(f"a token is outside 0...{c.vocab - 1}: another tokenizer's?")
            if self.frames(len(row)) > FRAMES:
                seconds = FRAMES // 50
                raise ValueError(
                    f"prompt and tokens make {self.frames(len(row))} frames, expected at most {FRAMES} "
                    f"({seconds} s); decode in pieces"
                )
            if len(voice.embedding) != c.speaker or (
                len(voice.mel) and voice.mel.shape[1] != c.mels
            ):
                raise ValueError(
                    f"the voice has a vector of {len(voice.embedding)} and {voice.mel.shape[1]} mel bands, "
                    f"expected {c.speaker} and {c.mels}"
                )
            if c.causal and len(voice.mel) != 2 * len(voice.tokens):
                raise ValueError(
                    f"the voice's prompt has {len(voice.mel)} frames for {len(voice.tokens)} tokens, "
                    f"expected twice as many; make it with this version's `Voice.from_audio`"
                )


class StretchingFlow(Flow):
    """v1."""

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        c = config
        self.encoder = Encoder(c.width, c.heads, c.hidden, c.layers)
        self.encoder_proj = nn.Linear(c.width, c.mels)
        self.length_regulator = LengthRegulator(c.mels)
        self.decoder.estimator = make_unet(c)

    def frames(self, tokens: int) -> int:
        """T of so many tokens."""
        return int(tokens / self.config.token_rate * V1_RATE / V1_HOP)

    def noise_table(self, rng: torch.Generator) -> Tensor:
        """As long as any mel may be, frame after frame: a mel's noise does not hang on the table's length."""
        shape = (FRAMES, self.config.mels)
        return torch.randn(shape, generator=rng, device=rng.device).cpu().T

    def encode(
        self, ids: Tensor, n: Tensor | None, *, chunk: int = 0, last: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T'] to hidden states at their own rate [B, T', M]."""
        return self.encoder_proj(self.encoder(self.input_embedding(ids), n)), n

    def stretch(self, hidden: Tensor, frames: int) -> Tensor:
        """Hidden states [T', M] of one row to mu [T, M], as training does: all at one rate."""
        return self.length_regulator(resize(hidden, frames))

    def _means(
        self, ids: list[Tensor], voices: Sequence[Voice], chunk: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        where, _ = self._place()
        n = torch.tensor([len(row) for row in ids])
        ragged = len(set(n.tolist())) > 1
        x = pad_sequence(ids, batch_first=True).to(where)
        hidden, _ = self.encode(x, n.to(where) if ragged else None)
        rows = []
        for row, voice, length in zip(hidden, voices, n.tolist()):
            start = len(voice.tokens)
            parts = [resize(row[:start], len(voice.mel))] if start else []
            parts += self._turns(row[start:length])
            rows.append(self.length_regulator(torch.cat(parts)))
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(rows, batch_first=True), lengths

    def _turns(self, hidden: Tensor) -> list[Tensor]:
        """Begin and end are stretched by themselves, so that a later piece can take over there."""
        frames = self.frames(len(hidden))
        if len(hidden) <= 2 * TURN:
            return [resize(hidden, frames)]
        edge = self.frames(TURN)
        middle = resize(hidden[TURN:-TURN], frames - 2 * edge)
        return [resize(hidden[:TURN], edge), middle, resize(hidden[-TURN:], edge)]


class LengthRegulator(nn.Module):
    """Convolutions over stretched hidden states of one row: [T, M] -> [T, M]."""

    def __init__(self, channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Conv1d(channels, channels, 3, padding=1), nn.GroupNorm(1, channels)]
            layers.append(nn.Mish())
        self.model = nn.Sequential(*layers, nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The norm takes its statistics over the row."""
        return rearrange(self.model(rearrange(x, "t c -> 1 c t")), "1 c t -> t c")


class DoublingFlow(Flow):
    """v2."""

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        c = config
        self.encoder = UpsamplingEncoder(c.width, c.heads, c.hidden, c.layers, c.up_layers)
        self.encoder_proj = nn.Linear(c.width, c.mels)
        self.decoder.estimator = make_unet(c)

    def encode(
        self, ids: Tensor, n: Tensor | None, *, chunk: int = 0, last: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T'], of which n [B] count, to mu [B, T, M] and its lengths; `chunk` in tokens."""
        x = self.encoder(self.input_embedding(ids), n, chunk, last=last)
        return self.encoder_proj(x), doubled(n, last)


class RepeatingFlow(Flow):
    """v3."""

    def __init__(self, config: FlowConfig):
        super().__init__(config)
        c = config
        self.pre_lookahead_layer = Lookahead(c.width, c.lookahead)
        self.decoder.estimator = DiT(
            c.mels, c.dit_width, c.velocity_heads, c.dit_layers, c.dit_hidden
        )

    def encode(
        self, ids: Tensor, n: Tensor | None, *, chunk: int = 0, last: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T'], of which n [B] count, to mu [B, T, M] and its lengths."""
        x = self.pre_lookahead_layer(self.input_embedding(ids), n)
        x = x if last else x[:, :-LOOKAHEAD]
        return x.repeat_interleave(2, 1), doubled(n, last)


def make_flow(config: FlowConfig) -> Flow:
    """The class of a config's version."""
    classes = {V1: StretchingFlow, V2: DoublingFlow, V3: RepeatingFlow}
    return classes[config.version](config)


def make_unet(config: FlowConfig) -> UNet:
    """The velocity network of v1 and v2."""
    return UNet(
        mels=config.mels,
        channels=config.channels,
        heads=config.velocity_heads,
        head_width=config.head_width,
        blocks=config.blocks,
        middle=config.middle,
        causal=config.causal,
    )


def doubled(n: Tensor | None, last: bool) -> Tensor | None:
    """Frames of n tokens."""
    if n is None:
        return None
    return 2 * (n if last else n - LOOKAHEAD)


def resize(x: Tensor, length: int) -> Tensor:
    """[T, C] interpolated to [length, C]."""
    x = rearrange(x, "t c -> 1 c t")
    return rearrange(F.interpolate(x, size=length, mode="linear"), "1 c t -> t c")


def infer_config(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str = "<memory>"
) -> FlowConfig:
    """The config of a state dict; `config` says what the tensors do not (see `Flow.from_published`)."""
    marks = {
        V1: "length_regulator.model.0.weight",
        V2: "encoder.up_embed.out.0.weight",
        V3: "decoder.estimator.transformer_blocks.0.attn_norm.linear.weight",
    }
    found = [version for version, key in marks.items() if key in tensors]
    if "input_embedding.weight" not in tensors or len(found) != 1:
        raise WeightsError(
            f"{source}: not a CosyVoice flow: input_embedding.weight and one of "
            f"{', '.join(marks.values())} expected"
        )
    version = found[0]
    if (wanted := config.get("version", version)) != version:
        raise WeightsError(f"{source}: a CosyVoice flow {version}, expected {wanted}")
    vocab, width = tensors["input_embedding.weight"].shape
    mels, speaker = tensors["spk_embed_affine_layer.weight"].shape
    rate = int(config.get("token_rate", PUBLISHED[version].token_rate))
    common: dict[str, Any] = {
        "version": version,
        "vocab": vocab,
        "width": width,
        "mels": mels,
        "speaker": speaker,
        "token_rate": rate,
    }
    sizes = dit_sizes(tensors) if version == V3 else unet_sizes(tensors, config)
    return FlowConfig(**common, **sizes)


def unet_sizes(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of encoder and UNet."""
    stem = "decoder.estimator."
    attention = tensors[f"{stem}mid_blocks.0.1.0.attn1.to_q.weight"]
    levels = count(tensors, f"{stem}down_blocks.")
    head_width = int(config.get("head_width", 64))
    first = "encoder.encoders.0."
    return {
        "heads": tensors[f"{first}self_attn.pos_bias_u"].shape[0],
        "hidden": tensors[f"{first}feed_forward.w_1.weight"].shape[0],
        "layers": count(tensors, "encoder.encoders."),
        "up_layers": count(tensors, "encoder.up_encoders."),
        "channels": tuple(
            tensors[f"{stem}down_blocks.{i}.0.block1.block.0.weight"].shape[0]
            for i in range(levels)
        ),
        "blocks": count(tensors, f"{stem}mid_blocks.0.1."),
        "middle": count(tensors, f"{stem}mid_blocks."),
        "velocity_heads": attention.shape[0] // head_width,
        "head_width": head_width,
    }


def dit_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of lookahead and DiT."""
    stem = "decoder.estimator."
    width = tensors[f"{stem}proj_out.weight"].shape[1]
    rates = tensors.get(f"{stem}rotary_embed.inv_freq")
    head_width = 64 if rates is None else 2 * len(rates)
    return {
        "lookahead": tensors["pre_lookahead_layer.conv1.weight"].shape[0],
        "dit_width": width,
        "dit_layers": count(tensors, f"{stem}transformer_blocks."),
        "dit_hidden": tensors[f"{stem}transformer_blocks.0.ff.ff.0.0.weight"].shape[0],
        "velocity_heads": width // head_width,
        "head_width": head_width,
    }


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules stand below a prefix."""
    return len({k[len(prefix) :].split(".")[0] for k in tensors if k.startswith(prefix)})
