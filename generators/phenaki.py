"""Phenaki (arXiv 2210.02399): a video from a sentence, and a long one from a list of them.

    phenaki = Phenaki(network, critic, codec=load_codec("cvivit/mini"), text=T5Features())
    video = phenaki.make_video([Scene("a cat sits", 11), Scene("the cat jumps", 10)])

Tokens of a clip are filled by the masked loop (`maskgit.py`) over C-ViViT's codes. A long clip goes scene by scene: the
last K frames of one are set, frozen, in front of the next, which is drawn under its own prompt. There are two ways to
get their tokens:

- "pixels", as published: the K frames are decoded and encoded again. They then begin with a frame by itself, as every
  clip does that the network was trained on; but what coding loses is lost once more in every scene.
- "tokens": the tokens are taken as they are, and the whole video is one stream, decoded once. Nothing is coded twice.
  It needs a codec that decodes causally, and a network that was trained on clips cut out of longer streams (`crop`
  of `train`), for the first of these tokens is no frame by itself.

Lengths are in the codec's frames: a first scene has 1 + n * temporal_patch, a later one n * temporal_patch, and K is
1 + n * temporal_patch.

Letters: B videos, T latent frames, h w patches, F frames, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..codecs.codec import item_rngs
from ..codecs.published import Weights, load_into
from ..codecs.registry import load_codec
from ..codecs.stream import TokenStream
from ..codecs.text import TextCodec, TextConfig
from ..codecs.video.cvivit import CViViT, CViViTOptions
from ..codecs.video.frames import to_bytes
from ..modalities.video import Video
from .generator import Canvas
from .maskgit import MaskGIT, Unmasking
from .published import Row, save_generator
from .text_features import TextIds
from .video_maskgit import (
    SelfCritic,
    TokenCritic,
    VideoMaskConfig,
    VideoMaskGIT,
    video_from_published,
)

Prompt = str | Tensor | None
TextEncoder = Callable[[Sequence[str]], list[Tensor]]
Prime = Literal["tokens", "pixels"]


@dataclass(frozen=True)
class Scene:
    """A part of a long video: what it shows (a text, its features or ids; None for anything), and for how long."""

    prompt: Prompt
    frames: int


@dataclass(frozen=True)
class SceneDone:
    """A finished scene.

    Args:
        number: 0, 1, ...
        stream: the codes of the new frames; joined (`+`) they are the video's, where primes are tokens.
        video: the new frames.
    """

    number: int
    stream: TokenStream
    video: Video


def published_options(*, critic: bool) -> Unmasking:
    """How lucidrains' `Phenaki.sample` draws (the paper: 12 to 48 steps, temperatures 4 to 8)."""
    return Unmasking(
        steps=18,
        curve="cosine",
        rounding="round",
        temperature=0.9,
        doubt="critic" if critic else "probability",
        cfg=3.0,
    )


class Phenaki(MaskGIT):
    """Masked generation of video.

    Args:
        network: writes the codes of `codec`.
        critic: decides what is drawn again; without one, the network's own probabilities do.
        codec: tokens to frames and back.
        text: strings to what the network reads; None where prompts are tensors.
        options: defaults; as published where None.
    """

    network: VideoMaskGIT

    def __init__(
        self,
        network: VideoMaskGIT,
        critic: TokenCritic | SelfCritic | None = None,
        *,
        codec: CViViT | None = None,
        text: TextEncoder | None = None,
        options: Unmasking | None = None,
    ):
        name = None if codec is None else codec.spec.name
        options = options or published_options(critic=critic is not None)
        super().__init__(network, critic, options=options, codec=name)
        self.video_codec, self.text = codec, text
        if codec is not None and codec.config.codebook_size != network.vocab:
            raise ValueError(
                f"'{codec.spec.name}' has {codec.config.codebook_size} codes, the network writes {network.vocab}; "
                "load the codec that it was trained with"
            )

    def conditions(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """What the network reads of each prompt."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and self.text is None:
            raise ValueError(
                f"the prompt {texts[0]!r} is a string and there is no text encoder; give Phenaki(text=T5Features()), "
                "or features or ids as prompts"
            )
        read = iter(self.text(texts) if texts and self.text is not None else [])
        return [next(read) if isinstance(prompt, str) else prompt for prompt in prompts]

    def codes(
        self,
        prompts: Sequence[Prompt],
        frames: int,
        *,
        prime: Tensor | None = None,
        options: Unmasking | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Codes [B, T, h, w] of new clips, the prime's included.

        Args:
            prompts: one a clip.
            frames: new frames of each.
            prime: codes [B, T', h, w] of the frames before, which stay.
        """
        codec = self._codec()
        h, w = codec.config.grid
        before = torch.empty(len(prompts), 0, h, w, dtype=torch.int64) if prime is None else prime
        if len(before) != len(prompts) or before.shape[2:] != (h, w):
            raise ValueError(
                f"the prime is {tuple(before.shape)}, expected [{len(prompts)}, T, {h}, {w}]"
            )
        new = self._latents(frames, first=before.shape[1] == 0)
        grid = (before.shape[1] + new, h, w)
        still_open = torch.full((len(prompts), new, h, w), -1)
        whole = rearrange(torch.cat([before.cpu(), still_open], 1), "b t h w -> b (t h w)")
        canvases = [
            Canvas(codes=row, grid=grid, condition=condition)
            for row, condition in zip(whole, self.conditions(prompts))
        ]
        filled = torch.stack(self.fill(canvases, options, rng))
        return rearrange(filled, "b (t h w) -> b t h w", t=grid[0], h=h)

    def videos(
        self,
        prompts: Sequence[Prompt],
        frames: int,
        *,
        prime: Tensor | None = None,
        options: Unmasking | None = None,
        rng: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """New frames [B, F, C, H, W] after those of `prime`, unbounded as the codec gives them.

        Args:
            prime: frames [B, K, C, H, W] in 0...1 that come before, encoded here.
        """
        codec = self._codec()
        before = None
        if prime is not None:
            self._check_prime(prime.shape[1])
            before = codec.tokenize(prime)
        codes = self.codes(prompts, frames, prime=before, options=options, rng=rng)
        shown = codec.detokenize(codes.to(codec.device))
        return shown if prime is None else shown[:, prime.shape[1] :]

    def make_video(
        self,
        scenes: Sequence[Scene],
        *,
        prime_frames: int = 5,
        prime: Prime | None = None,
        options: Unmasking | None = None,
        rng: torch.Generator | None = None,
    ) -> Video:
        """One clip of all scenes; see `scenes`."""
        done = self.scenes(scenes, prime_frames=prime_frames, prime=prime, options=options, rng=rng)
        parts = [scene.video for scene in done]
        frames = torch.cat([part.frames for part in parts])
        return Video(frames=frames, fps=parts[0].fps)

    def scenes(
        self,
        scenes: Sequence[Scene],
        *,
        prime_frames: int = 5,
        prime: Prime | None = None,
        options: Unmasking | None = None,
        rng: torch.Generator | None = None,
    ) -> Iterator[SceneDone]:
        """Scene after scene, as each is finished: what was yielded stays, whatever happens later.

        Args:
            prime_frames: K, frames of a scene that stand before the next one.
            prime: "tokens" where the codec streams, "pixels" as published; None takes tokens where it can.
            rng: draws all scenes, one after another; seed 0 where None.

        Raises:
            ValueError: lengths that the codec cannot have, or a scene that does not fit the network.
        """
        codec = self._codec()
        prime = prime or ("tokens" if codec.spec.streaming else "pixels")
        if prime == "tokens" and not codec.spec.streaming:
            raise ValueError(
                f"'{codec.spec.name}' looks ahead in time, so tokens cannot go on without their "
                "frames; give prime='pixels'"
            )
        self._check_scenes(scenes, prime_frames)
        (generator,) = item_rngs(None if rng is None else [rng], 1)
        run = self._by_tokens if prime == "tokens" else self._by_pixels
        return run(scenes, prime_frames, options, generator)

    def _by_tokens(
        self, scenes: Sequence[Scene], k: int, options: Unmasking | None, rng: torch.Generator
    ) -> Iterator[SceneDone]:
        codec = self._codec()
        decoder = codec.decoder_stream(options=CViViTOptions(restore=False))
        kept = None
        for number, scene in enumerate(scenes):
            codes = self.codes([scene.prompt], scene.frames, prime=kept, options=options, rng=[rng])
            new = codes if kept is None else codes[:, kept.shape[1] :]
            stream = codec.stream(new.flatten(), grid=tuple(new.shape[1:]))
            yield SceneDone(number, stream, decoder.push(stream))
            kept = codes[:, -self._latents(k, first=True) :]

    def _by_pixels(
        self, scenes: Sequence[Scene], k: int, options: Unmasking | None, rng: torch.Generator
    ) -> Iterator[SceneDone]:
        codec = self._codec()
        prime = None
        for number, scene in enumerate(scenes):
            before = None if prime is None else codec.tokenize(prime)
            codes = self.codes(
                [scene.prompt], scene.frames, prime=before, options=options, rng=[rng]
            )
            frames = codec.detokenize(codes.to(codec.device))
            new = codes if before is None else codes[:, before.shape[1] :]
            if prime is not None:
                frames = frames[:, prime.shape[1] :]
            stream = codec.stream(new.flatten(), grid=tuple(new.shape[1:]))
            shown = to_bytes(frames[0].float().cpu())
            yield SceneDone(number, stream, Video(frames=shown, fps=codec.config.fps))
            prime = frames[:, -k:]

    def _codec(self) -> CViViT:
        if self.video_codec is None:
            raise ValueError(
                "there is no codec; give Phenaki(codec=...), or fill a Canvas with `fill`"
            )
        return self.video_codec

    def _latents(self, frames: int, *, first: bool) -> int:
        """Latent frames of `frames`; the first one of a clip is a frame by itself."""
        tube = self._codec().config.temporal_patch
        tubes, rest = divmod(frames - int(first), tube)
        if frames < 1 or rest:
            wanted = f"1 + n * {tube}" if first else f"n * {tube}"
            what = "a first scene or a prime" if first else "a scene that goes on"
            raise ValueError(f"{frames} frames, expected {wanted} for {what}")
        return tubes + int(first)

    def _check_prime(self, k: int) -> None:
        try:
            self._latents(k, first=True)
        except ValueError as error:
            raise ValueError(f"the prime has {error}") from error

    def _check_scenes(self, scenes: Sequence[Scene], k: int) -> None:
        """Everything that can be wrong, before the first scene is drawn."""
        if not scenes:
            raise ValueError("there are no scenes")
        self._check_prime(k)
        h, w = self._codec().config.grid
        primed = self._latents(k, first=True)
        for number, scene in enumerate(scenes):
            try:
                new = self._latents(scene.frames, first=number == 0)
            except ValueError as error:
                raise ValueError(f"scene {number} has {error}") from error
            last = number == len(scenes) - 1
            latents = new + (primed if number else 0)
            if latents * h * w > self.network.config.length:
                most = self.network.config.length // (h * w) - (primed if number else 0)
                raise ValueError(
                    f"scene {number} takes {latents * h * w} positions with its prime, the network has "
                    f"{self.network.config.length}: at most {most} latent frames are new"
                )
            if not last and scene.frames < k:
                raise ValueError(
                    f"scene {number} has {scene.frames} frames, the next one is primed with its last {k}"
                )


def from_published(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    codec: CViViT | None = None,
    text: TextEncoder | None = None,
    source: str = "Phenaki state dict",
) -> Phenaki:
    """From the state dict of lucidrains' `Phenaki` (keys maskgit.*, critic.*; cvivit.* is left to the codec's loader).

    Args:
        config: fields of `VideoMaskConfig` that shapes do not tell.
    """

    def below(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}

    network = video_from_published(below("maskgit."), config, source=source)
    assert isinstance(network, VideoMaskGIT)
    critic = None
    if told := below("critic."):
        critic = video_from_published(told, config, maskgit=network, source=source)
        assert not isinstance(critic, VideoMaskGIT)
    return Phenaki(network, critic, codec=codec, text=text)


def save(
    phenaki: Phenaki,
    path: str | Path,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write networks, options and, where prompts are ids, the tokenizer as one file, which `load_generator` reads."""
    critic = phenaki.critic
    tensors = {f"maskgit.{k}": v for k, v in phenaki.network.state_dict().items()}
    told: dict[str, Any] = {"maskgit": asdict(phenaki.network.config), "critic": None}
    if isinstance(critic, SelfCritic):
        told["critic"] = "self"
        tensors |= {f"critic.to_pred.{k}": v for k, v in critic.to_pred.state_dict().items()}
    elif isinstance(critic, TokenCritic):
        told["critic"] = asdict(critic.config)
        tensors |= {f"critic.{k}": v for k, v in critic.state_dict().items()}
    if isinstance(phenaki.text, TextIds):
        told["tokenizer"] = phenaki.text.codec.config.tokenizer
        told["text"] = phenaki.text.codec.spec.name
    row = Row(
        system="phenaki",
        name=name,
        codec=phenaki.codec or "",
        config=told,
        options=asdict(phenaki.options),
    )
    save_generator(path, tensors, row, dtype=dtype, about=about)


def build(files: Mapping[str, Weights], row: Row) -> Phenaki:
    """Networks and text of a file that `save` wrote, with the codec that it names, where that can be had here."""
    weights, told = files["weights"], row.config
    network = VideoMaskGIT(VideoMaskConfig(**told["maskgit"]))
    critic: TokenCritic | SelfCritic | None = None
    if told["critic"] == "self":
        critic = SelfCritic(network)
    elif told["critic"] is not None:
        critic = TokenCritic(VideoMaskConfig(**told["critic"]))
    told_parts: dict[str, nn.Module] = {"maskgit": network}
    if isinstance(critic, SelfCritic):  # its features are the generator's
        told_parts["critic"] = nn.ModuleDict({"to_pred": critic.to_pred})
    elif critic is not None:
        told_parts["critic"] = critic
    parts = nn.ModuleDict(told_parts)
    load_into(parts, weights.tensors, source=weights.source)
    text = None
    if "text" in told:
        text = TextIds(TextCodec(TextConfig(tokenizer=told["tokenizer"]), name=told["text"]))
    codec = load_codec(row.codec) if row.codec else None
    assert codec is None or isinstance(codec, CViViT)
    options = Unmasking(**row.options)
    return Phenaki(network, critic, codec=codec, text=text, options=options)
