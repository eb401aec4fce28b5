"""CosyVoice 1: text to speech tokens (arXiv 2407.05407; FunAudioLLM/CosyVoice). Drawn from with `SpeechDecoder`.

    [sos] [speaker] text [task] speech ─▶ speech [eos]

Text runs through a causal encoder of its own; both stacks have the relative positions of Transformer-XL
(arXiv 1901.02860): a query meets a key as (q + u) k, and their distance d as (q + v) W sin(d). Both are causal, so only
distances d >= 0 occur, a cached step sees what a whole pass sees, and the stacks share `KVCache` with the backbone.

B rows, T new positions, S visible positions, D width, N heads, H head width. The softmax is over (q k + q d) / sqrt(H).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..backbone.cache import KVCache
from ..codecs.published import WeightsError, load_into
from .cosyvoice_lm import IGNORE
from .speech_decoder import Marks, SpeechRequest, check_codes

LAYER_EPS, END_EPS = 1e-12, 1e-5  # of norms within layers; of the first and the last one


@dataclass(frozen=True, kw_only=True)
class CosyVoiceLMv1Config:
    """Sizes; the defaults are the 300M model's.

    Args:
        text_vocab: 51,866 (Whisper's), 60,515 for the 25 Hz model.
        text_width: of the text embedding.
        codes: S.
        positions: the most positions; nothing is stored for them.
    """

    text_vocab: int = 51866
    text_width: int = 512
    width: int = 1024
    ffn: int = 4096
    heads: int = 16
    text_layers: int = 6
    layers: int = 14
    codes: int = 4096
    speaker: int = 192
    positions: int = 5000


class RelativeAttention(nn.Module):
    """Causal attention with relative positions."""

    def __init__(self, width: int, heads: int, layer: int):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(width, width) for _ in range(3))
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        distance: Tensor,
        cache: KVCache | None,
        counts: Sequence[int] | None,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D].

        Args:
            table: sin of the distances 0 ... S - 1, [S, D].
            distance: of each query from each key, [B or 1, T, S]; negative where a key is not seen.
        """
        q, k, v = (
            rearrange(layer(x), "b t (n h) -> b n t h", n=self.heads)
            for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        if cache is not None:
            k, v = cache.append(self.layer, k, v, counts)
        far = rearrange(self.linear_pos(table), "s (n h) -> n h s", n=self.heads)
        by_distance = (q + self.pos_bias_v[:, None]) @ far
        index = distance.clamp(min=0)[:, None].expand(*by_distance.shape[:3], distance.shape[-1])
        bias = by_distance.gather(-1, index) / math.sqrt(q.shape[-1])
        bias = bias.masked_fill(distance[:, None] < 0, -torch.inf)
        y = F.scaled_dot_product_attention(q + self.pos_bias_u[:, None], k, v, attn_mask=bias)
        return self.linear_out(rearrange(y, "b n t h -> b t (n h)"))


class FeedForward(nn.Module):
    """Two maps with an activation between, "silu" or "relu"."""

    def __init__(self, width: int, ffn: int, activation: str):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.activation = getattr(F, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [..., D]."""
        return self.w_2(self.activation(self.w_1(x)))


class Embed(nn.Module):
    """Linear map and norm: what comes in to D."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width, eps=END_EPS))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to [..., D]."""
        return self.out(x)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward part.

    Args:
        norms: names of the two norms.
        activation: "silu" in the text encoder, "relu" in the language model.
    """

    def __init__(
        self, config: CosyVoiceLMv1Config, layer: int, norms: tuple[str, str], activation: str
    ):
        super().__init__()
        self.self_attn = RelativeAttention(config.width, config.heads, layer)
        self.feed_forward = FeedForward(config.width, config.ffn, activation)
        self.norms = norms
        for name in norms:
            self.add_module(name, nn.LayerNorm(config.width, eps=LAYER_EPS))

    def forward(self, x: Tensor, *context) -> Tensor:
        """x [B, T, D] to [B, T, D]; `context` is what attention takes."""
        first, second = (self.get_submodule(name) for name in self.norms)
        x = x + self.self_attn(first(x), *context)
        return x + self.feed_forward(second(x))


class RelativeStack(nn.Module):
    """A causal stack: linear map, norm, layers, norm.

    Args:
        inputs: width of what comes in.
        text: names and activation of the text encoder.
    """

    def __init__(self, config: CosyVoiceLMv1Config, inputs: int, layers: int, *, text: bool):
        super().__init__()
        self.config, self.text = config, text
        self.embed = Embed(inputs, config.width)
        norms, act = (("norm_mha", "norm_ff"), "silu") if text else (("norm1", "norm2"), "relu")
        self.encoders = nn.ModuleList(Layer(config, i, norms, act) for i in range(layers))
        self.after_norm = nn.LayerNorm(config.width, eps=END_EPS)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, counts: Sequence[int] | None = None
    ) -> Tensor:
        """x [B, T, inputs] to [B, T, D].

        Raises:
            ValueError: more positions than the config has.
        """
        x = self.embed(x)
        x = (x if self.text else F.relu(x)) * math.sqrt(self.config.width)
        starts = torch.tensor([0] if cache is None else cache.row_lengths(), device=x.device)
        seen = int(starts.max()) + x.shape[1]
        if seen > self.config.positions:
            raise ValueError(f"{seen} positions, the model has {self.config.positions}")
        own = starts[:, None] + torch.arange(x.shape[1], device=x.device)
        distance = own[..., None] - torch.arange(seen, device=x.device)
        table = sinusoids(seen, self.config.width, x)
        for layer in self.encoders:
            x = layer(x, table, distance, cache, counts)
        return self.after_norm(x)


class CosyVoiceLMv1(nn.Module):
    """The language model; its keys are those of the published `llm.pt`."""

    def __init__(self, config: CosyVoiceLMv1Config | None = None):
        super().__init__()
        self.config = c = config or CosyVoiceLMv1Config()
        self.text_embedding = nn.Embedding(c.text_vocab, c.text_width)
        self.text_encoder = RelativeStack(c, c.text_width, c.text_layers, text=True)
        self.text_encoder_affine_layer = nn.Linear(c.width, c.width)
        self.llm_embedding = nn.Embedding(2, c.width)
        self.llm = RelativeStack(c, c.width, c.layers, text=False)
        self.llm_decoder = nn.Linear(c.width, c.codes + 1)
        self.speech_embedding = nn.Embedding(c.codes, c.width)
        self.spk_embed_affine_layer = nn.Linear(c.speaker, c.width)
        self.codes = s = c.codes
        self.context = c.positions
        self.marks = Marks(sos=s, task=s + 1, eos=s, fill=None, stops=(s, s + 1))

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Tensor], *, source: str = "llm.pt"
    ) -> CosyVoiceLMv1:
        """The model of a published `llm.pt`; shapes say all."""
        state = {k: v for k, v in state_dict.items() if k not in ("epoch", "step")}
        model = cls(_infer(state, source))
        load_into(model, state, source=source)
        return model.eval()

    def inputs(self) -> Tensor:
        """Input vectors [S + 2, D] of codes, sos and task."""
        return torch.cat([self.speech_embedding.weight, self.llm_embedding.weight])

    def prompt(self, request: SpeechRequest) -> Tensor:
        """[sos] [speaker] text [task] speech, of prompt and request: [L, D]."""
        assert isinstance(request.text, Tensor)
        check_codes(request.prompt_speech, self.codes)
        words = torch.cat([request.prompt_text, request.text]).long()
        if not 0 <= int(words.min()) <= int(words.max()) < self.config.text_vocab:
            raise ValueError(
                f"text ids reach from {int(words.min())} to {int(words.max())}, "
                f"expected 0...{self.config.text_vocab - 1}"
            )
        return self._sequence(words, request.prompt_speech.long(), request.speaker)

    def loss(self, texts: Sequence[Tensor], speeches: Sequence[Tensor], speakers: Tensor) -> Tensor:
        """Mean cross-entropy in nats of speech and its end.

        Args:
            texts, speeches: ids, one tensor an utterance.
            speakers: [B, 192].
        """
        rows = [self._sequence(t, s, e) for t, s, e in zip(texts, speeches, speakers)]
        targets = [
            torch.cat([t.new_full((2 + len(t),), IGNORE), s, t.new_tensor([self.marks.eos])])
            for t, s in zip(texts, speeches)
        ]
        goals = pad_sequence(targets, batch_first=True, padding_value=IGNORE)
        hidden = self.llm(pad_sequence(rows, batch_first=True))
        goals = goals.to(hidden.device)
        chosen = goals != IGNORE
        return F.cross_entropy(self.llm_decoder(hidden[chosen]).float(), goals[chosen])

    def begin(self, rows: int, capacity: int) -> KVCache:
        """An empty cache of the language model."""
        weight, c = self.llm_decoder.weight, self.config
        return KVCache(
            layers=c.layers,
            rows=rows,
            kv_heads=c.heads,
            head_width=c.width // c.heads,
            capacity=min(capacity, c.positions),
            dtype=weight.dtype,
            device=weight.device,
        )

    def read(self, x: Tensor, cache: KVCache, counts: Sequence[int]) -> Tensor:
        """Embeddings [B, T, D], counts[b] of them real, to hidden states [B, T, D]."""
        return self.llm(x, cache, counts)

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Speech tokens [B] to hidden states [B, D]."""
        return self.llm(self.speech_embedding(ids)[:, None], cache)[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [B, S + 1] of codes and the end."""
        return self.llm_decoder(hidden)

    def _sequence(self, text: Tensor, speech: Tensor, speaker: Tensor | None) -> Tensor:
        """[sos] [speaker] text [task] speech: [L, D]."""
        device = self.llm_decoder.weight.device
        encoded = self.text_encoder(self.text_embedding(text.to(device))[None])
        text_rows = self.text_encoder_affine_layer(encoded[0])
        sos, task = self.llm_embedding.weight[:, None]
        voice = text_rows[:0]
        if speaker is not None:
            unit = F.normalize(speaker.to(text_rows), dim=0)
            voice = self.spk_embed_affine_layer(unit)[None]
        return torch.cat([sos, voice, text_rows, task, self.speech_embedding(speech.to(device))])


def sinusoids(count: int, width: int, like: Tensor) -> Tensor:
    """Sine and cosine, interleaved, of the distances 0 ... count - 1: [count, width]."""
    rates = torch.exp(torch.arange(0, width, 2).float() * -(math.log(10000.0) / width))
    angles = torch.outer(torch.arange(count).float(), rates)
    return rearrange([angles.sin(), angles.cos()], "two s w -> s (w two)").to(like)


def _infer(state: Mapping[str, Tensor], source: str) -> CosyVoiceLMv1Config:
    """Sizes, from shapes."""
    first = "llm.encoders.0.self_attn.pos_bias_u"
    missing = [k for k in ("text_embedding.weight", first, "llm_decoder.weight") if k not in state]
    if missing:
        raise WeightsError(
            f"{source}: not a language model of CosyVoice 1, it lacks {', '.join(missing)}"
        )
    layers = {
        stack: 1 + max(int(k.split(".")[2]) for k in state if k.startswith(f"{stack}.encoders."))
        for stack in ("text_encoder", "llm")
    }
    text_vocab, text_width = state["text_embedding.weight"].shape
    return CosyVoiceLMv1Config(
        text_vocab=text_vocab,
        text_width=text_width,
        width=state["llm_decoder.weight"].shape[1],
        ffn=len(state["llm.encoders.0.feed_forward.w_1.weight"]),
        heads=len(state[first]),
        text_layers=layers["text_encoder"],
        layers=layers["llm"],
        codes=len(state["speech_embedding.weight"]),
        speaker=state["spk_embed_affine_layer.weight"].shape[1],
    )
