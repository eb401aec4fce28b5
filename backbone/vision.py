"""A vision encoder for understanding: features of any timm ViT, and what its CLS token attends to.

- Features are hidden states of one layer, by default the last but one, as LLaVA takes them, without CLS and registers.
- CLS's attention to each token, in every layer after the softmax, and in the last layer before it, is what pruning
  reads (VTC-CLS, GlobalCom2). It costs one row of each attention matrix: hooks see queries and keys on their way, the
  fused attention stays. Models without CLS give none.
- `mini_vit` is our own small model; `vision_training.py` trains it.

B pictures, n tokens of a picture on a grid h x w, d width, T tokens with CLS and registers, N heads.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..modalities.image import Image
from .pruning.select import Visual

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a vision model makes of pictures.

    Args:
        features: [B, n, d].
        grid: (h, w), n = h w, raster order.
        cls: [B, d], the CLS token of the same layer; None without one.
        cls_attention: [layers, B, n], after the softmax over all T tokens, mean over heads.
        cls_logits: [B, n], of the last layer before the softmax, mean over heads.
    """

    features: Tensor
    grid: tuple[int, int]
    cls: Tensor | None
    cls_attention: Tensor | None
    cls_logits: Tensor | None

    @property
    def visual(self) -> Visual:
        """As pruning methods take it."""
        return Visual(
            features=self.features, cls_attention=self.cls_attention, cls_logits=self.cls_logits
        )


class VisionEncoder(nn.Module):
    """A timm vision transformer and the layer that it is read at.

    Args:
        model: timm's `VisionTransformer` (ViT, DeiT, CLIP, SigLIP, DINOv2, ...).
        layer: 0 the embeddings, i behind block i, negative from the end: -1 behind the last block, -2 before it.

    Raises:
        ValueError: another kind of model, or a layer that it does not have.
    """

    def __init__(self, model: nn.Module, *, layer: int = -2):
        super().__init__()
        check_kind(model)
        self.model: Any = model
        blocks = len(self.model.blocks)
        if not -blocks - 1 <= layer <= blocks:
            raise ValueError(f"layer is {layer}, the model has {blocks} blocks")
        self.layer = layer % (blocks + 1)
        given = getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = (tuple(given.get(key) or HALF) for key in ("mean", "std"))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that pictures are brought to."""
        return tuple(self.model.patch_embed.img_size)

    def forward(self, x: Tensor) -> Seen:
        """Prepared pictures [B, 3, H, W], normalised as the model wants them."""
        model = self.model
        with _watched(model) as rows:
            hidden = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
            kept = hidden
            for i, block in enumerate(model.blocks, 1):
                hidden = block(hidden)
                kept = hidden if i == self.layer else kept
        first = model.num_prefix_tokens
        attention = logits = None
        if model.cls_token is not None:
            attention = torch.stack([row.softmax(-1).mean(1) for row in rows])[..., first:]
            logits = rows[-1].mean(1)[:, first:]
        return Seen(
            features=kept[:, first:],
            grid=tuple(model.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))),
            cls=kept[:, 0] if model.cls_token is not None else None,
            cls_attention=attention,
            cls_logits=logits,
        )

    def see(self, pictures: Sequence[Image]) -> Seen:
        """Pictures of any size, squeezed into the model's; alpha is laid over white."""
        weight = next(self.parameters())
        return self(torch.stack([self.prepare(picture) for picture in pictures]).to(weight))

    def prepare(self, picture: Image) -> Tensor:
        """[3, H, W], as `forward` takes it."""
        opaque = picture if picture.alpha is None else picture.over()
        if (opaque.height, opaque.width) != self.size:
            opaque = opaque.resize(*self.size)
        return self.normalise(opaque.pixels)

    def normalise(self, pixels: Tensor) -> Tensor:
        """[..., 3, H, W] in 0 ... 1 to what the model wants."""
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std


@dataclass(frozen=True, kw_only=True)
class MiniViTConfig:
    """Sizes of our own ViT.

    Args:
        size: pixels a side. patch: of one token. width, layers, heads: of the transformer.
    """

    size: int = 64
    patch: int = 8
    width: int = 96
    layers: int = 6
    heads: int = 3

    def __post_init__(self):
        if self.size % self.patch or self.width % self.heads:
            raise ValueError(
                f"size {self.size} must divide by patch {self.patch}, width {self.width} by heads {self.heads}"
            )


def mini_vit(config: MiniViTConfig) -> VisionEncoder:
    """Our own ViT, untrained."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.size,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        num_classes=0,
    )
    return VisionEncoder(model, layer=-2)


def timm_vit(name: str, *, pretrained: bool = False, layer: int = -2) -> VisionEncoder:
    """A ViT of timm by its name; `pretrained` fetches its weights from the hub."""
    import timm

    return VisionEncoder(timm.create_model(name, pretrained=pretrained, num_classes=0), layer=layer)


def save_vision(
    encoder: VisionEncoder,
    config: MiniViTConfig,
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float16,
    about: dict[str, Any] | None = None,
) -> None:
    """Write a mini ViT as one safetensors file, config in its header."""
    state = {
        k: v.detach().to("cpu", dtype).contiguous() for k, v in encoder.model.state_dict().items()
    }
    header = {"config": asdict(config), "about": about or {}}
    save_file(state, str(path), metadata={"anytok.vision": json.dumps(header)})


def load_vision(path: Path | str) -> VisionEncoder:
    """A mini ViT that `save_vision` wrote, in float32 and eval mode.

    Raises:
        ValueError: another kind of file.
    """
    with safe_open(str(path), "pt") as file:
        header = (file.metadata() or {}).get("anytok.vision")
        if header is None:
            raise ValueError(
                f"{path} is no vision encoder of anytok: its header has no 'anytok.vision'"
            )
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    encoder = mini_vit(MiniViTConfig(**json.loads(header)["config"]))
    encoder.model.load_state_dict(state)
    return encoder.eval()


def check_kind(model: nn.Module) -> None:
    """Raise ValueError unless attention can be read off `model`."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{type(model).__name__} is no timm VisionTransformer (vit_*, deit_*, ...)"
        )
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        kind = type(getattr(block, "attn", None))
        if kind is not Attention:
            raise ValueError(f"block {i} has {kind.__name__}, expected timm's plain Attention")


@contextlib.contextmanager
def _watched(model: Any) -> Iterator[list[Tensor]]:
    """CLS's logits [B, N, T] of each block that runs inside."""
    rows: list[Tensor] = []
    handles = []
    if model.cls_token is not None:
        for block in model.blocks:
            handles += _hooks(block.attn, rows)
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _hooks(attention: Any, rows: list[Tensor]) -> list[Any]:
    """Queries come first, then keys; CLS is the first of T."""
    held: list[Tensor] = []

    def queries(module: nn.Module, given: Any, q: Tensor) -> None:
        held.append(q[:, :, :1])

    def keys(module: nn.Module, given: Any, k: Tensor) -> None:
        rows.append((held.pop() @ k.transpose(-2, -1))[:, :, 0] * attention.scale)

    return [
        attention.q_norm.register_forward_hook(queries),
        attention.k_norm.register_forward_hook(keys),
    ]
