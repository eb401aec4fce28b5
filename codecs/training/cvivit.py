"""Training C-ViViT: squared and absolute error, and the quantiser's own loss.

- Start values are analytic (`initialise`): tubes go through their principal components, the codebook is k-means on
  them, and pixels come back by least squares. So a run begins where PCA with vector quantisation ends, and the
  transformers, zero at first, only add to it. Minutes of CPU from random weights do not get there.
- LayerNorm would take a linear code's length away. Two constant entries, +c and -c, hold the length nearly fixed, so
  that every LayerNorm and the unit sphere of the cosine codebook pass the components through.

Letters: B batch, F frames, N samples, D width, V codes, P pixels of a tube.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..published import save_codec
from ..quantizers.binary import LFQ, entropy_loss
from ..video.cvivit import CViViT, CViViTConfig
from .data import Clips, find_rows
from .engine import StopRun, Task
from .entry import settings

LENGTH_KEPT = 8.0  # the constants' energy, in units of the components' mean energy
GAIN = 8.0  # at most: branches read each entry of a vector at unit variance
COMPANDING = (
    0.25  # components are divided by their variance to this power: small ones should not drown
)
LEAST_SQUARES_ROWS = 16_384  # that are doubles at one time
KMEANS_ROUNDS = 10
KMEANS_VECTORS = 160_000
FLAT_SHARE = 0.02  # of vectors in the k-means sample that may be drawn evenly; the others by how much is in them


@dataclass(frozen=True, kw_only=True)
class CViViTLoss:
    """What is minimised, and how fast.

    Args:
        lr: of the transformers; embeddings and pixels learn at `linear_lr`, the quantiser at `code_lr`.
        l1: weight of the absolute error beside the squared one.
        code: weight of the cosine codebook's loss, whose numbers are small: a mean over entries of unit vectors.
        commitment: beta of that loss.
        entropy, diversity: weight of LFQ's entropy loss, and of its batch entropy.
        encoder_from: the step at which embeddings, encoder and codebook begin to learn; None for never, so that the
            decoder learns on the codes of the analytic start. (A codebook that followed them alone lost .1 to .3 dB.)
        refit: training clips from which the last linear layers are fitted anew when the run ends, by least squares; 0
            leaves them as they learned. (Worth .1 to .4 dB after 600 steps.)
    """

    lr: float = 5e-4
    linear_lr: float = 5e-5
    code_lr: float = 2e-4
    l1: float = 0.05
    code: float = 20.0
    commitment: float = 0.25
    entropy: float = 0.1
    diversity: float = 1.0
    encoder_from: int | None = 0
    refit: int = 0


class CViViTTask(Task):
    """For the engine; a config has "model" (CViViTConfig), "loss" (CViViTLoss), "data" (root, sets, frames)."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.model = settings(CViViTConfig, config["model"], "model")
        self.loss = settings(CViViTLoss, config.get("loss", {}), "loss")
        self.data = {"frames": 17, "held": 32, **config["data"]}
        self.clips = self._clips(self.data["sets"], "train")

    def _clips(self, sets: Sequence[str], split: str) -> Clips:
        rows = find_rows(self.data["root"], sets, modality="video", splits=(split,))
        if split == "held":
            rows = rows[:: -(-len(rows) // self.data["held"])]
        frames, fps = self.data["frames"], self.model.fps
        return Clips(rows, frames=frames, size=self.model.size, fps=fps)

    @cached_property
    def held(self) -> dict[str, Tensor]:
        """By data set, the held-out clips that `evaluate` measures: uint8 [N, F, 3, H, W]."""
        sets = dict.fromkeys(self.data["sets"])
        clips = {name: self._clips([name], "held") for name in sets}
        return {
            name: torch.stack([found[i] for i in range(len(found))])
            for name, found in clips.items()
        }

    def networks(self) -> dict[str, nn.Module]:
        """One network, no discriminator."""
        codec = CViViT(self.model, name=self.config.get("name", "cvivit/mini"))
        t = self.loss
        self.rates = {id(p): t.lr for p in codec.parameters()}
        for part, rate in (("vq", t.code_lr), ("to_p", t.linear_lr)):
            named = codec.named_parameters()
            self.rates.update({id(p): rate for name, p in named if name.startswith(part)})
        return {"codec": codec}

    def dataset(self) -> Clips:
        """Random clips, uint8 [F, 3, H, W]."""
        return self.clips

    def initialise(self, networks: Mapping[str, nn.Module], dataset: Clips) -> None:
        """Principal components, k-means, least squares."""
        rng = torch.Generator().manual_seed(0)
        n = min(len(dataset), 1500)
        picks = torch.randperm(len(dataset), generator=rng)[:n]
        clips = torch.stack([dataset.draw(int(i), rng) for i in picks])
        initialise(networks["codec"], clips, rng)

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """AdamW with three rates; see `CViViTLoss`. Weights that start at PCA do not decay."""
        parameters, t = list(parameters), self.loss
        groups = [
            {
                "params": [p for p in parameters if self.rates[id(p)] == rate],
                "lr": rate,
                "weight_decay": 0.01 if rate == t.lr else 0.0,
            }
            for rate in sorted(set(self.rates.values()))
        ]
        return AdamW(groups, lr=t.lr, betas=(0.9, 0.99))

    def augment(self, batch: Tensor, rng: torch.Generator) -> Tensor:
        """To floats; mirrored by halves, run backwards by halves, colours swapped by fifths."""
        x = batch.float() / 255
        draw = torch.rand(len(x), 3, generator=rng, device=rng.device)
        x = torch.where(_wide(draw[:, 0] < 0.5), x.flip(-1), x)
        x = torch.where(_wide(draw[:, 1] < 0.5), x.flip(1), x)
        return torch.where(_wide(draw[:, 2] < 0.2), x.roll(1, 2), x)

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: Tensor,
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Reconstruction and quantiser."""
        codec, t = networks["codec"], self.loss
        learns = t.encoder_from is not None and step >= t.encoder_from
        # In half precision the nearest code is another one for every tenth vector: the decoder would learn those.
        exact = torch.autocast(batch.device.type, enabled=False)
        with torch.set_grad_enabled(learns), exact:
            quantised, codes, inner = codec.vq(codec.encode_latents(batch))
        y = codec.decode_latents(quantised)
        mse = nnf.mse_loss(y.float(), batch)
        l1 = nnf.l1_loss(y.float(), batch)
        code = quantiser_loss(codec, inner, codes, t) if learns else mse.new_zeros(())
        return {
            "loss": mse + t.l1 * l1 + code,
            "psnr": -10 * mse.detach().log10(),
            "code": code.detach(),
            "codes_used": torch.tensor(float(len(codes.unique()))),
        }

    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """Mean PSNR of held-out clips by data folder, and the codes that they use."""
        codec = networks["codec"]
        used, scores = set(), {}
        for folder, clips in self.held.items():
            psnrs = []
            for batch in clips.split(8):
                x = batch.float() / 255
                codes = codec.tokenize(x)
                y = codec.detokenize(codes).clamp(0, 1).cpu()
                psnrs.append(psnr(x, y))
                used.update(codes.flatten().tolist())
            scores[f"psnr_{folder}"] = float(torch.cat(psnrs).mean())
        if len(used) < max(2, self.model.codebook_size // 256):
            raise StopRun(f"{len(used)} codes are left in use: the codebook has collapsed")
        return {**scores, "codes_used": float(len(used))}

    def export(self, networks: Mapping[str, nn.Module], path: str | Path) -> None:
        """One file, half precision."""
        if self.loss.refit:
            rng = torch.Generator().manual_seed(1)
            picks = torch.randperm(len(self.clips), generator=rng)[: self.loss.refit]
            refit_pixels(networks["codec"], torch.stack([self.clips[int(i)] for i in picks]))
        about = {"trained_on": sorted(set(self.data["sets"]))}
        name = self.config.get("name", "cvivit/mini")
        save_codec(networks["codec"], path, name=name, dtype=torch.float16, about=about)


def task(config: dict[str, Any]) -> Task:
    """For `anytok.codecs.train`."""
    return CViViTTask(config)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Mean over a clip's frames of each frame's PSNR, in dB; [B, F, C, H, W] twice to [B]."""
    mse = (x - y).square().mean((-1, -2, -3)).clamp_min(1e-10)
    return (-10 * mse.log10()).mean(-1)


def quantiser_loss(codec: CViViT, inner: Tensor, codes: Tensor, t: CViViTLoss) -> Tensor:
    """Commitment and codebook for cosine VQ, entropies for LFQ."""
    if isinstance(codec.vq, LFQ):
        return t.entropy * entropy_loss(inner, codec.vq.config, t.diversity)
    return t.code * codec.vq.loss(inner, codes, t.commitment)


def initialise(codec: CViViT, clips: Tensor, rng: torch.Generator) -> None:
    """Set a codec with linear embeddings and a cosine codebook to PCA with k-means codes.

    Args:
        clips: uint8 [N, F, 3, H, W].
    """
    c = codec.config
    if c.embed_norm or c.quantizer != "vq":
        raise ValueError(
            "the analytic start needs embed_norm=False and quantizer='vq', "
            f"the config has {c.embed_norm} and {c.quantizer!r}"
        )
    codec.eval()
    _silence(codec)
    still, tubes = (_eventful(x, rng) for x in _patches(codec, clips))
    both = torch.cat([repeat_still(still, c), tubes])
    both = both[torch.randperm(len(both), generator=rng)]
    components, scales = _embed_components(codec, both)
    features = _through_norms(codec, both)
    _fit_codebook(codec, features, components, scales, rng)
    _precondition((codec.enc_spatial_transformer, codec.enc_temporal_transformer), features)
    codes = codec.vq(features)[0]
    _precondition((codec.dec_temporal_transformer, codec.dec_spatial_transformer), codes)
    _fit_pixels(codec.to_pixels_first_frame[0], codec, still, repeat_still)
    _fit_pixels(codec.to_pixels[0], codec, tubes)


@torch.no_grad()
def refit_pixels(codec: CViViT, clips: Tensor) -> None:
    """The last linear layers by least squares on what the trained decoder gives for clips, uint8 [N, F, 3, H, W]."""
    codec.eval()
    layers = (codec.to_pixels_first_frame[0], codec.to_pixels[0])
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in clips.split(8):
        x = (batch.float() / 255).to(codec.device)
        z = codec.dec_temporal_transformer(codec.vq.lookup(codec.tokenize(x)))
        z = codec.dec_spatial_transformer(z, codec.spatial_rel_pos_bias(*z.shape[2:4]))
        seen[0].append(z[:, :1].flatten(0, 3).cpu())
        seen[1].append(z[:, 1:].flatten(0, 3).cpu())
    for layer, x, target in zip(layers, seen, _patches(codec, clips)):
        _least_squares(layer, torch.cat(x), target)


def repeat_still(still: Tensor, c: CViViTConfig) -> Tensor:
    """First-frame patches [N, 3 p p] as tubes that do not move [N, 3 F p p]."""
    return repeat(still, "n (c p) -> n (c f p)", c=3, f=c.temporal_patch)


@torch.no_grad()
def _silence(codec: CViViT) -> None:
    """Every residual branch adds nothing."""
    for module in codec.modules():
        if isinstance(module, nn.ModuleDict):
            module["1"].to_out.weight.zero_()
            module["3"][4].weight.zero_()
            if "0" in module:
                module["0"].dsconv.weight.zero_()
                module["0"].dsconv.bias.zero_()


def _patches(codec: CViViT, clips: Tensor) -> tuple[Tensor, Tensor]:
    """First-frame patches [N, 3 p p] and tubes [N, P] of uint8 clips [N, F, 3, H, W]."""
    still = codec.to_patch_emb_first_frame[0](clips[:, :1])
    tubes = codec.to_patch_emb[0](clips[:, 1:])
    return tuple(rearrange(x, "b t h w p -> (b t h w) p").float() / 255 for x in (still, tubes))


def _eventful(patches: Tensor, rng: torch.Generator) -> Tensor:
    """A sample of patches [N, P], those with much in them more often: most of a drawn film is a flat background."""
    spread = patches.var(1)
    chance = spread.sqrt() + FLAT_SHARE * spread.mean().sqrt()
    if len(patches) > 2**22:  # multinomial takes no more
        raise ValueError(f"{len(patches)} patches to begin from, expected at most {2**22}")
    count = min(len(patches), KMEANS_VECTORS)
    return patches[torch.multinomial(chance, count, generator=rng)]


@torch.no_grad()
def _embed_components(codec: CViViT, tubes: Tensor) -> tuple[int, Tensor]:
    """Make both embeddings principal components, companded, beside two constants; how many, and their scales."""
    c = codec.config
    mean = tubes.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov((tubes - mean).T.double()))
    count = min(c.dim - 2, len(mean))
    variance, basis = variance.flip(0)[:count].clamp_min(1e-8).float(), basis.flip(1)[:, :count]
    scale = variance**-COMPANDING
    weight = torch.zeros(c.dim, len(mean))
    weight[:count] = basis.T.float() * scale[:, None]
    bias = -weight @ mean
    constant = (LENGTH_KEPT * (variance * scale**2).sum() / 2).sqrt()
    bias[-2], bias[-1] = constant, -constant
    codec.to_patch_emb[2].weight.copy_(weight)
    codec.to_patch_emb[2].bias.copy_(bias)
    still = rearrange(weight, "d (c f p) -> d c f p", c=3, f=c.temporal_patch).sum(2)
    codec.to_patch_emb_first_frame[2].weight.copy_(still.flatten(1))
    codec.to_patch_emb_first_frame[2].bias.copy_(bias)
    return count, scale


@torch.no_grad()
def _through_norms(codec: CViViT, tubes: Tensor) -> Tensor:
    """What the quantiser receives from tubes [N, P], all branches silent: [N, D]."""
    x = codec.to_patch_emb[2](tubes)
    return codec.enc_temporal_transformer.norm_out(codec.enc_spatial_transformer.norm_out(x))


@torch.no_grad()
def _fit_codebook(
    codec: CViViT, features: Tensor, count: int, scales: Tensor, rng: torch.Generator
) -> None:
    """Project to the leading components (companding undone) and a constant; k-means there; project back."""
    c = codec.config
    kept = min(c.codebook_dim - 1, count)
    back = 1 / scales[:kept]
    energy = (features[:, :kept] * back).square().sum(1).mean()
    constant = (LENGTH_KEPT * energy).sqrt() / features[:, -2].mean()
    into = torch.zeros(c.codebook_dim, c.dim)
    into[range(kept), range(kept)] = back
    into[-1, -2] = constant
    out = torch.zeros(c.dim, c.codebook_dim)
    out[range(kept), range(kept)] = 1 / back
    out[-2, -1], out[-1, -1] = 1 / constant, -1 / constant
    codec.vq.project_in.weight.copy_(into)
    codec.vq.project_in.bias.zero_()
    codec.vq.project_out.weight.copy_(out)
    codec.vq.project_out.bias.zero_()
    unit = nnf.normalize(features @ into.T, dim=-1)
    codec.vq._codebook["embed"][0].copy_(spherical_kmeans(unit, c.codebook_size, rng))


@torch.no_grad()
def spherical_kmeans(unit: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Centres [V, d] of unit vectors [N, d]; a centre that nothing is near moves to a vector that is far from all."""
    first = torch.randperm(len(unit), generator=rng)
    centres = unit[first.repeat(-(-size // len(unit)))[:size]].clone()
    for last in [False] * KMEANS_ROUNDS + [True]:
        near = [(piece @ centres.T).max(-1) for piece in unit.split(4096)]
        nearness, ids = (torch.cat(parts) for parts in zip(*near))
        sums = torch.zeros_like(centres).index_add_(0, ids, unit)
        empty = torch.bincount(ids, minlength=size) == 0
        centres = torch.where(empty[:, None], centres, nnf.normalize(sums, dim=-1))
        if last or not empty.any():
            continue
        far = torch.multinomial(
            (1 - nearness).clamp_min(1e-9), int(empty.sum()), replacement=True, generator=rng
        )
        centres[empty] = unit[far]
    return centres


@torch.no_grad()
def _precondition(transformers: Sequence[nn.Module], x: Tensor) -> None:
    """Let every branch read the entries of its input, seen as x [N, D], at unit variance, without the constants."""
    x = nnf.layer_norm(x, x.shape[-1:])
    gain = (1 / x.std(0).clamp_min(1e-6)).clamp_max(GAIN)
    gain[-2:] = 0
    for layer in (layer for transformer in transformers for layer in transformer.layers):
        layer["1"].norm.gamma.copy_(gain)
        layer["1"].to_kv.weight.mul_(gain)
        layer["3"][0].weight.copy_(gain)


@torch.no_grad()
def _fit_pixels(
    layer: nn.Linear, codec: CViViT, target: Tensor, as_tubes: Callable[..., Tensor] | None = None
) -> None:
    """Least squares from what the silent decoder makes of `target` [N, P] back to it."""
    tubes = as_tubes(target, codec.config) if as_tubes else target
    codes = codec.vq(_through_norms(codec, tubes))[0]
    x = codec.dec_spatial_transformer.norm_out(codec.dec_temporal_transformer.norm_out(codes))
    _least_squares(layer, x, target)


@torch.no_grad()
def _least_squares(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """The layer that maps x [N, D] to y [N, P] with the least squared error, by ridge regression."""
    gram = torch.zeros(x.shape[1] + 1, x.shape[1] + 1, dtype=torch.float64)
    cross = torch.zeros(x.shape[1] + 1, y.shape[1], dtype=torch.float64)
    for a, b in zip(x.split(LEAST_SQUARES_ROWS), y.split(LEAST_SQUARES_ROWS)):
        a = torch.cat([a, a.new_ones(len(a), 1)], 1).double()
        gram += a.T @ a
        cross += a.T @ b.double()
    gram += 1e-5 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, cross).float()
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


def _wide(mask: Tensor) -> Tensor:
    return mask[:, None, None, None, None]
