"""FlexTok (arXiv 2502.13967, apple/ml-flextok): a picture as 1-256 ordered tokens; a flow decoder paints any prefix.

- Encoder: VAE latents as 2x2 patches and 256 registers through a transformer. Patches see patches; a register sees
  all patches and the registers up to itself. Six numbers leave each register, and FSQ rounds them to one of 64,000 ids.
- Decoder: a rectified-flow transformer over noisy patches and the registers of the ids; patches and registers are
  modulated (AdaLN) by separate halves of one time embedding. Absent tokens are a learned mask token without position;
  without a condition all 256 are a learned null token.

Equal results for less work than the published code does:
- Positions that hold the same vector and no position hold the same vector in every block, because attention is full.
  So mask and null tokens are computed once and only repeated as keys: k tokens cost 256 + k + 1 positions and the
  unguided pass 257, not 512 each (`Pattern`).
- Both guidance passes and all rows run in one forward; every linear layer sees one matrix of tokens.
- Time embeddings and their modulations, half of the decoder's weights, are computed for many steps at once.
- The last block of each side computes only what its head reads.

Shapes: B pictures, C latent channels, h w latents (32 x 32), P patches, N registers, D width, R rows (pictures and
guidance passes), n tokens of all rows, S steps, d numbers a code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ...modalities.image import Image
from ..codec import Codec, CodecSpec, Fit, Rng, item_rngs
from ..layout import Prefix
from ..published import File, Weights, find, load_into
from ..quantizers.fsq import FSQ
from ..stream import TokenStream
from .fitting import PictureOptions, fit_pictures, restore_picture
from .flextok_layers import (
    HEAD_WIDTH,
    AdaTrunk,
    Halves,
    MaskToken,
    NullToken,
    PatchEmbed,
    PatchHead,
    Pattern,
    Positions,
    Projection,
    Registers,
    TimeEmbedding,
    Trunk,
    ZeroLinear,
    decoder_patterns,
    encoder_patterns,
    norm,
    register_counts,
    xavier,
)
from .flextok_published import parse_metadata, read_config
from .vae import AutoencoderConfig, AutoencoderKL, draw, infer_autoencoder

if TYPE_CHECKING:
    from ..registry import Entry

STEPS_AT_ONCE = 32  # modulations are computed for so many steps together: 60 MB at the largest size
APG_MOMENTUM, APG_NORM = -0.5, 2.5  # hard-wired in the published sampler
# VAEs that a published config may name in place of its scaling factor.
VAE_REPOS = tuple(f"EPFL-VILAB/flextok_vae_c{n}" for n in (4, 8, 16))
Scale = float | Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class FlexTokConfig:
    """Sizes and published values; the defaults are d12-d12's, as far as they are known without its file.

    Args:
        vae: fields of `AutoencoderConfig`.
        grid: patches along one side.
        patch: latents along one side of a patch.
        tokens: registers.
        levels: of the FSQ, one a number.
        encoder, decoder: (width, blocks) of the two transformers; heads are 64 wide.
        max_timestep: 1000 / max_timestep scales the time embedding's frequencies.
        frequencies: sines and cosines of the time embedding.
        positions: kinds of the position tables of encoder patches, decoder patches and decoder registers.
        sample_posterior: whether the published encoder samples the VAE's posterior; its mean otherwise.
        steps, guidance, apg: what `FlexTokOptions` leave open.
        fit: how pictures that are not square are fitted.
    """

    vae: Mapping[str, Any]
    grid: int = 16
    patch: int = 2
    tokens: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    encoder: tuple[int, int] = (768, 12)
    decoder: tuple[int, int] = (768, 12)
    max_timestep: float = 1000.0
    frequencies: int = 256
    positions: tuple[str, str, str] = ("sincos", "sincos", "learnable_sum")
    sample_posterior: bool = True
    steps: int = 25
    guidance: float = 7.5
    apg: bool = True
    fit: Fit = "crop"

    def __post_init__(self):
        for name in ("levels", "encoder", "decoder", "positions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "vae", asdict(AutoencoderConfig(**self.vae)))
        for width, _ in (self.encoder, self.decoder):
            if width % HEAD_WIDTH:
                raise ValueError(f"a width is {width}, expected a multiple of {HEAD_WIDTH}")

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """The VAE's sizes."""
        return AutoencoderConfig(**self.vae)

    @property
    def latent_side(self) -> int:
        """Latents along one side."""
        return self.grid * self.patch

    @property
    def image_size(self) -> int:
        """Pixels along one side."""
        return self.latent_side * self.autoencoder.stride


@dataclass(frozen=True, kw_only=True)
class FlexTokOptions(PictureOptions):
    """Options of `encode` and `decode`; None keeps what the codec's config says.

    Args:
        posterior: "mean" or "sample" of the VAE's posterior. (encode)
        steps: of the sampler. (decode)
        guidance: scale of classifier-free guidance, or a function of the time 1 ... 1/steps; 1 is none. (decode)
        apg: adaptive projected guidance (arXiv 2410.02416) in place of the plain one. (decode)
        seed: of every item's own generator, where no `rng` is given.
    """

    posterior: Literal["mean", "sample"] | None = None
    steps: int | None = None
    guidance: Scale | None = None
    apg: bool | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.posterior not in (None, "mean", "sample"):
            raise ValueError(f"posterior is {self.posterior!r}, expected mean or sample")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps are {self.steps}, expected 1 or more")

    @classmethod
    def of(cls, options: PictureOptions | None) -> FlexTokOptions:
        """`options` with this codec's own fields; those of any picture codec will do."""
        if isinstance(options, cls):
            return options
        return cls(fit=options.fit, native=options.native) if options else cls()

    def rngs(self, rng: Rng | None, n: int) -> list[torch.Generator]:
        """One generator an item: those given, else fresh ones with `seed` on the CPU."""
        if rng is None:
            return [torch.Generator().manual_seed(self.seed) for _ in range(n)]
        return item_rngs(rng, n)


class _EncoderSteps(nn.Module):
    """The encoder's steps under their published names."""

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        width, depth = config.encoder
        grid, channels = (config.grid, config.grid), config.autoencoder.latent_channels
        self.enc_patch_emb = PatchEmbed(channels, config.patch, width)
        self.enc_posemb_module = Positions(config.positions[0], width, grid)
        self.enc_register_module = Registers(config.tokens, width)
        self.enc_transformer = Trunk(width, depth)
        self.enc_to_latents = Projection(ZeroLinear(width, len(config.levels)))
        self.apply(xavier)


class FlexTokEncoder(nn.Module):
    """Latents [B, C, h, w] to unrounded codes [B, N, d]."""

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        self.module_dict = _EncoderSteps(config)

    def forward(self, latents: Tensor) -> Tensor:
        """Row by row; the attention of one picture sees no other."""
        steps, rows = self.module_dict, len(latents)
        patches = steps.enc_patch_emb(latents) + steps.enc_posemb_module()
        registers = steps.enc_register_module.registers
        patterns = encoder_patterns(rows, patches.shape[1], len(registers), latents.device)
        x = torch.cat([repeat(registers, "n d -> (r n) d", r=rows), patches.flatten(0, 1)])
        x = steps.enc_to_latents(norm(steps.enc_transformer(x, *patterns)))
        return rearrange(x, "(r n) d -> r n d", r=rows)


class _DecoderSteps(nn.Module):
    """The decoder's steps under their published names."""

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        width, depth = config.decoder
        grid, channels = (config.grid, config.grid), config.autoencoder.latent_channels
        _, patches, registers = config.positions
        self.dec_from_latents = Projection(nn.Linear(len(config.levels), width))
        self.dec_registers_posemb_module = Positions(registers, width, (config.tokens,))
        self.dec_nested_dropout = MaskToken(width)
        self.dec_latent_dropout = NullToken(width)
        self.dec_noise_patch_emb = PatchEmbed(channels, config.patch, width)
        self.dec_patches_posemb_module = Positions(patches, width, grid)
        self.dec_time_embedder = TimeEmbedding(width, config.frequencies, config.max_timestep)
        self.dec_transformer = AdaTrunk(width, depth)
        self.dec_to_patches = PatchHead(width, channels, config.patch)
        self.apply(xavier)


class Condition(NamedTuple):
    """What the decoder keeps of the codes while it paints: registers [m, D], row by row, and who looks at whom."""

    registers: Tensor
    kept: tuple[int, ...]
    whole: Pattern
    last: Pattern


class Modulation(NamedTuple):
    """What S times do to the blocks (halves [6, S, D]) and to the head ([2, S, D])."""

    blocks: tuple[Halves, ...]
    head: Tensor

    def at(self, i: int) -> Modulation:
        """Of the i-th time, for all rows."""
        blocks = (Halves(a[:, i : i + 1], b[:, i : i + 1]) for a, b in self.blocks)
        return Modulation(tuple(blocks), self.head[:, i : i + 1])

    def per_token(self, kept: Sequence[int], patches: int, registers: int) -> Modulation:
        """Of one time a row (S = R), spread over the row's tokens; for training."""
        rows = torch.arange(len(kept), device=self.head.device)
        of_patch = rows.repeat_interleave(patches)
        of_register = rows.repeat_interleave(register_counts(kept, registers, rows.device))
        blocks = (Halves(a[:, of_patch], b[:, of_register]) for a, b in self.blocks)
        return Modulation(tuple(blocks), self.head[:, of_patch])


class FlexTokDecoder(nn.Module):
    """Noisy latents, a time and code vectors to the velocity from clean to noise."""

    def __init__(self, config: FlexTokConfig):
        super().__init__()
        self.patches, self.tokens = config.grid**2, config.tokens
        self.module_dict = _DecoderSteps(config)

    def condition(self, rows: Sequence[Tensor | None]) -> Condition:
        """Code vectors [k, d] of each row, 1 <= k <= N, or None for a row without a condition.

        Raises:
            ValueError: a row has no code or too many.
        """
        steps, parts, kept = self.module_dict, [], []
        positions = steps.dec_registers_posemb_module()
        for vectors in rows:
            k = 0 if vectors is None else len(vectors)
            if vectors is None:
                parts.append(steps.dec_latent_dropout.nullcond[None])
            elif 1 <= k <= self.tokens:
                parts.append(steps.dec_from_latents(vectors.to(positions.dtype)) + positions[:k])
                # One token stands for all that are absent; without any, the slice is empty.
                parts.append(steps.dec_nested_dropout.dropout_mask_token[None][: self.tokens - k])
            else:
                raise ValueError(f"a row has {k} codes, expected 1 to {self.tokens}")
            kept.append(k)
        patterns = decoder_patterns(kept, self.patches, self.tokens, positions.device)
        return Condition(torch.cat(parts), tuple(kept), *patterns)

    def modulation(self, times: Tensor) -> Modulation:
        """Times [S] in [0, 1]."""
        steps = self.module_dict
        time = steps.dec_time_embedder(times)
        return Modulation(
            steps.dec_transformer.modulation(time), steps.dec_to_patches.modulation(time)
        )

    def velocity(self, x: Tensor, condition: Condition, modulation: Modulation) -> Tensor:
        """x [R, C, h, w] to velocities [R, C, h, w]; `modulation` of one time, or per token."""
        steps = self.module_dict
        patches = steps.dec_noise_patch_emb(x.to(condition.registers.dtype))
        patches = patches + steps.dec_patches_posemb_module()
        tokens = torch.cat([patches.flatten(0, 1), condition.registers])
        tokens = steps.dec_transformer(tokens, condition.whole, condition.last, modulation.blocks)
        return steps.dec_to_patches(tokens, modulation.head, len(x))

    def forward(self, x: Tensor, times: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
        """Velocities [R, C, h, w] at one time a row, [R]; what training calls."""
        condition = self.condition(rows)
        modulation = self.modulation(times)
        modulation = modulation.per_token(condition.kept, self.patches, self.tokens)
        return self.velocity(x, condition, modulation)


def plain_guidance(conditional: Tensor, free: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of velocities [B, C, h, w]."""
    return free + scale * (conditional - free)


class ProjectedGuidance:
    """Adaptive projected guidance (arXiv 2410.02416), with the momentum of one sampling run."""

    def __init__(self):
        self.average: Tensor | float = 0.0

    def __call__(self, conditional: Tensor, free: Tensor, scale: float) -> Tensor:
        """Velocities [B, C, h, w] with only what is orthogonal to the conditional one amplified, row by row."""
        # The momentum keeps the difference as it is before its norm is limited.
        self.average = step = conditional - free + APG_MOMENTUM * self.average
        length = step.flatten(1).norm(dim=1)[:, None, None, None]
        step = (step * (APG_NORM / length).clamp(max=1)).double()
        along = conditional.double()
        along = along / along.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        step = step - (step * along).sum(dim=(1, 2, 3), keepdim=True) * along
        return conditional + (scale - 1) * step.to(conditional.dtype)


class _VAE(nn.Module):
    """The level that published keys have above the VAE's own."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.vae = AutoencoderKL(config)


class FlexTok(Codec):
    """Pictures to 1-256 ordered ids and back, with the published state-dict keys."""

    system = "flextok"

    def __init__(self, config: FlexTokConfig, *, name: str = "flextok/custom"):
        super().__init__()
        self.config = config
        self.vae = _VAE(config.autoencoder)
        self.encoder = FlexTokEncoder(config)
        self.decoder = FlexTokDecoder(config)
        self.quantize = FSQ(config.levels)
        self.spec = CodecSpec(
            name=name,
            modality="image",
            vocab=((self.quantize.size,),),
            layout=Prefix(config.tokens),
            compose="concat",
            prefix_step=1,
            fit=config.fit,
            size=(config.image_size, config.image_size),
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        name: str = "flextok/custom",
        source: str = "state dict",
    ) -> FlexTok:
        """The codec of a published state dict.

        Args:
            config: the published config as nested dictionaries (the file's metadata, parsed, or its config.json).

        Raises:
            WeightsError: the config names what this FlexTok does not have, or keys and shapes are another model's.
        """
        published = read_config(config, source)
        vae = {**infer_autoencoder(state_dict, "vae.vae."), **published.pop("vae")}
        return cls._loaded(FlexTokConfig(vae=vae, **published), state_dict, name, source)

    @classmethod
    def _loaded(
        cls, config: FlexTokConfig, tensors: Mapping[str, Tensor], name: str, source: str
    ) -> FlexTok:
        with torch.device("meta"):  # billions of weights are not drawn only to be overwritten
            codec = cls(config, name=name)
        codec.to_empty(device="cpu")
        load_into(codec, tensors, source=source, ignore=("vae.logvar",))
        return codec.eval()

    @property
    def autoencoder(self) -> AutoencoderKL:
        """The VAE, a `LatentCodec`."""
        return self.vae.vae

    def latents(self, pixels: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to latents [B, C, h, w]: the posterior's mean where rng is None, else a sample.

        Raises:
            ValueError: the pixels are not of this codec's size.
        """
        side = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels are {tuple(pixels.shape)}, expected [B, 3, {side}, {side}]")
        # One picture at a time: the VAE is bound by memory, a batch of four took 1.5 times the CPU time of four calls.
        rows = (2 * pixels - 1).split(1)
        rngs = [None] * len(rows) if rng is None else [[g] for g in item_rngs(rng, len(rows))]
        encode = self.autoencoder.encode_latents
        return torch.cat([encode(row, rng=own) for row, own in zip(rows, rngs)])

    def tokenize(
        self, pixels: Tensor, *, options: PictureOptions | None = None, rng: Rng | None = None
    ) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to ids [B, N]; a row depends on no other."""
        options = FlexTokOptions.of(options)
        posterior = options.posterior or ("sample" if self.config.sample_posterior else "mean")
        rngs = options.rngs(rng, len(pixels)) if posterior == "sample" else None
        latents = self.latents(pixels.to(self.dtype), rng=rngs)
        return self.quantize.ids(self.encoder(latents.to(self.dtype)))

    @torch.no_grad()
    def detokenize(
        self,
        codes: Tensor | Sequence[Tensor],
        *,
        options: PictureOptions | None = None,
        rng: Rng | None = None,
    ) -> Tensor:
        """Ids [B, k], or one [k] a row with any 1 <= k <= N, to pixels [B, 3, S, S], not clamped.

        Raises:
            ValueError: a row has no id or too many, or an id is outside the codebook.
        """
        options = FlexTokOptions.of(options)
        vectors = [self.quantize.vectors(row.to(self.device)) for row in codes]
        side, channels = self.config.latent_side, self.config.autoencoder.latent_channels
        like = torch.empty(len(vectors), channels, side, side, device=self.device)
        noise = draw(options.rngs(rng, len(vectors)), like)
        latents = self.sample(vectors, noise, options=options).to(self.dtype)
        rows = [self.autoencoder.decode_latents(row) for row in latents.split(1)]
        return torch.cat(rows) / 2 + 0.5

    @torch.no_grad()
    def sample(
        self, vectors: Sequence[Tensor], noise: Tensor, *, options: FlexTokOptions | None = None
    ) -> Tensor:
        """Noise [B, C, h, w] to clean latents under code vectors [k, d], one tensor a row; Euler steps from 1 to 0."""
        options = options or FlexTokOptions()
        steps = options.steps or self.config.steps
        scale = self.config.guidance if options.guidance is None else options.guidance
        apg = self.config.apg if options.apg is None else options.apg
        guide = ProjectedGuidance() if apg else plain_guidance
        free = [None] * len(vectors) if callable(scale) or scale != 1 else []
        alone = self.decoder.condition(vectors)
        both = self.decoder.condition([*vectors, *free]) if free else alone
        x = noise.float()
        for time, modulation in self._steps(steps):
            value = scale(time) if callable(scale) else scale
            # At scale 1 the free pass would only feed a momentum that a later, guided step reads.
            if free and (value != 1 or apg):
                velocity = self.decoder.velocity(x.repeat(2, 1, 1, 1), both, modulation).float()
                velocity = guide(*velocity.chunk(2), value)
            else:
                velocity = self.decoder.velocity(x, alone, modulation).float()
            x = x - velocity / steps
        return x

    def _steps(self, steps: int) -> Iterator[tuple[float, Modulation]]:
        """Times 1, 1 - 1/S ... 1/S, with what each does to the decoder."""
        times = [i / steps for i in range(steps, 0, -1)]
        for start in range(0, steps, STEPS_AT_ONCE):
            chunk = times[start : start + STEPS_AT_ONCE]
            modulation = self.decoder.modulation(torch.tensor(chunk, device=self.device))
            yield from ((time, modulation.at(i)) for i, time in enumerate(chunk))

    def code_vectors(self, part: int = 0, depth: int = 0) -> Tensor:
        """The six numbers of every id that the decoder receives, [64000, 6]; `digit_vectors` has them by dimension."""
        return self.quantize.vectors(torch.arange(self.quantize.size, device=self.device))

    def digit_vectors(self) -> list[Tensor]:
        """What each digit of an id stands for, [L, 1] each: an id's vector is their concatenation."""
        return [table.to(self.device) for table in self.quantize.tables()]

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[Image],
        *,
        options: PictureOptions | None = None,
        rng: Rng | None = None,
    ) -> list[TokenStream]:
        """Pictures to streams of N ordered ids; random only where the posterior is sampled."""
        if not media:
            return []
        pixels, metas = fit_pictures(
            media, self.config.image_size, (options and options.fit) or self.spec.fit
        )
        codes = self.tokenize(pixels.to(self.device), options=options, rng=rng)
        return [self.stream(row, meta=meta) for row, meta in zip(codes, metas)]

    @torch.no_grad()
    def decode(
        self,
        streams: Sequence[TokenStream],
        *,
        options: PictureOptions | None = None,
        rng: Rng | None = None,
    ) -> list[Image]:
        """Streams of any lengths to pictures, in one batch; each starts from its own generator's noise."""
        for stream in streams:
            self.check(stream)
        if not streams:
            return []
        codes = [stream.codes[:, 0] for stream in streams]
        native = options is not None and options.native
        pixels = self.detokenize(codes, options=options, rng=rng)
        return [restore_picture(p, s.meta, native=native) for p, s in zip(pixels, streams)]


def build(files: Mapping[str, Weights], entry: Entry) -> FlexTok:
    """The codec of a registry row, or of a file that `save_codec` wrote."""
    weights = files["weights"]
    if weights.config:
        config = FlexTokConfig(**entry.config)
        codec = FlexTok._loaded(config, weights.tensors, entry.name, weights.source)
    else:
        tree = parse_metadata(weights.metadata, weights.source)
        codec = FlexTok.from_published(
            weights.tensors, _with_scaling(tree), name=entry.name, source=weights.source
        )
    licences = {"code_licence": entry.code_licence, "weights_licence": entry.weights_licence}
    codec.spec = replace(codec.spec, **licences)
    return codec


def _with_scaling(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the scaling factor of the VAE's own repository, where it names one of `VAE_REPOS` instead."""
    vae = tree["vae"]
    if vae.get("scaling_factor") is not None or vae.get("hf_hub_path") not in VAE_REPOS:
        return tree
    path = find(File(name="config.json", repo=vae["hf_hub_path"]))
    said = json.loads(path.read_text())
    return {**tree, "vae": {**vae, "scaling_factor": said.get("scaling_factor")}}
