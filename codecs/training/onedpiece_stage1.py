"""One-D-Piece (and legacy TiTok), stage 1: predict a frozen MaskGIT-VQGAN's codes through ordered tokens.

Facts from the published configs: cross-entropy of the 1,024 proxy logits plus 0.25 x commitment plus codebook loss;
in each forward pass one k, uniform in 1...N, and the decoder sees the first k tokens, while the quantiser's losses see
all; AdamW 1e-4 (0.9, 0.99), decay 1e-4 but not on gains, biases, tokens and embeddings; random crop and mirror.
Stage 2 (pixels with a discriminator) starts from what this writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...modalities.image import Image
from ..image.onedpiece import OneDPiece
from ..image.titok import TiTokConfig
from ..image.vqgan import MaskGitVQGAN
from ..published import read_weights, save_codec
from .data import Pictures, find_rows
from .engine import Task
from .entry import settings

MARGIN = 1.125  # pictures are read this much larger than the crop
HELD = 64  # pictures that evaluation looks at


@dataclass(frozen=True, kw_only=True)
class StageOneData:
    """Pictures: `sets` below `root`."""

    root: str = "data"
    sets: tuple[str, ...] = (".",)


@dataclass(frozen=True, kw_only=True)
class StageOneTraining:
    """`teacher` is the file of `maskgit-vqgan-imagenet-f16-256.bin`, or of a VQGAN with its keys."""

    teacher: str
    stage: int = 1
    lr: float = 1e-4
    weight_decay: float = 1e-4
    commitment: float = 0.25


class StageOneTask(Task):
    """Trains encoder, latent tokens, codebook and ViT decoder; the teacher's decoder paints."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.data = settings(StageOneData, config.get("data", {}), "data")
        self.training = settings(StageOneTraining, config["training"], "training")
        self.teacher = MaskGitVQGAN.from_published(read_weights(self.training.teacher).tensors)
        sizes = {**config.get("model", {}), "pixels": _sizes(self.teacher)}
        self.model = settings(TiTokConfig, sizes, "model")
        self.name = config.get("name", "onedpiece/custom")
        self._plain: set[int] = set()

    def networks(self) -> dict[str, nn.Module]:
        """The codec, and the frozen teacher."""
        codec = OneDPiece(self.model, name=self.name)
        codec.pixel_quantize.load_state_dict(self.teacher.quantize.state_dict())
        codec.pixel_decoder.load_state_dict(self.teacher.decoder.state_dict())
        codec.pixel_quantize.requires_grad_(False)
        codec.pixel_decoder.requires_grad_(False)
        words = ("latent_tokens", "embedding", "mask_token")
        self._plain = {id(p) for n, p in codec.named_parameters() if any(w in n for w in words)}
        return {"codec": codec, "teacher": self.teacher.requires_grad_(False)}

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW; only kernels and matrices decay."""
        plain = [p for p in parameters if p.ndim < 2 or id(p) in self._plain]
        decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in self._plain]
        groups = [
            {"params": decayed, "weight_decay": self.training.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.training.lr, betas=(0.9, 0.99))

    def dataset(self) -> Dataset:
        """uint8 [4, H, W], an eighth larger than the crop."""
        rows = find_rows(self.data.root, self.data.sets, modality="image")
        side = int(self.model.image_size * MARGIN)
        return Pictures(rows, (side, side), fit="crop")

    def augment(self, batch: Tensor, rng: torch.Generator) -> Tensor:
        """One random crop a batch, each picture mirrored or not: [B, 3, S, S] in [0, 1], over white."""
        size, room = self.model.image_size, batch.shape[-1] - self.model.image_size + 1
        top, left = (torch.rand(2, generator=rng, device=rng.device) * room).int().tolist()
        pixels = batch[..., top : top + size, left : left + size].float() / 255
        pixels = pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]
        mirrored = torch.rand(len(batch), 1, 1, 1, generator=rng, device=rng.device) < 0.5
        return torch.where(mirrored, pixels.flip(3), pixels)

    def losses(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        batch: Tensor,
        step: int,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Cross-entropy at one k, and the quantiser's losses over all tokens."""
        codec, teacher = networks["codec"], networks["teacher"]
        assert isinstance(codec, OneDPiece)
        assert isinstance(teacher, MaskGitVQGAN)
        with torch.no_grad():
            target = teacher.tokenize(batch)
        quantized = codec.quantize(codec.latents(batch).float())
        k = 1 + int(torch.rand((), generator=rng, device=rng.device) * self.model.tokens)
        logits = codec.decoder(quantized.vectors[:, :k]).float().flatten(2)
        proxy = F.cross_entropy(logits, target)
        vq = self.training.commitment * quantized.commitment + quantized.codebook
        accuracy = (logits.argmax(1) == target).float().mean()
        return {"loss": proxy + vq, "proxy": proxy, "vq": vq, "accuracy": accuracy}

    @torch.no_grad()
    def evaluate(self, networks: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """Proxy accuracy at a sixteenth, a quarter and all of the tokens, and how many codes are used."""
        codec, teacher = networks["codec"], networks["teacher"]
        assert isinstance(codec, OneDPiece)
        assert isinstance(teacher, MaskGitVQGAN)
        rows = find_rows(self.data.root, self.data.sets, modality="image", splits=("held",))
        if not rows:
            return {}
        size = self.model.image_size
        pictures = [Image.load(r["image"]).over().resize(size, size).pixels for r in rows[:HELD]]
        pixels = torch.stack(pictures).to(codec.device)
        target, codes = teacher.tokenize(pixels), codec.tokenize(pixels)
        result = {"codes": float(codes.unique().numel())}
        for k in sorted(
            {max(1, self.model.tokens // 16), self.model.tokens // 4, self.model.tokens}
        ):
            logits = codec.decoder(codec.quantize.vectors(codes[:, :k])).flatten(2)
            result[f"accuracy_{k}"] = (logits.argmax(1) == target).float().mean().item()
        return result

    def export(self, networks: Mapping[str, nn.Module], path: Path) -> None:
        """The codec with the teacher's pixel decoder, under the published keys."""
        codec = networks["codec"]
        assert isinstance(codec, OneDPiece)
        save_codec(codec, path, name=self.name, about={"stage": 1, "trained_on": [*self.data.sets]})


def _sizes(teacher: MaskGitVQGAN) -> dict[str, Any]:
    config = teacher.config
    return {
        "channels": config.channels,
        "multipliers": list(config.multipliers),
        "blocks": config.blocks,
        "code_width": config.code_width,
        "codes": config.codes,
    }
