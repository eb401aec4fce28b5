"""The networks of TiTok's and One-D-Piece's published generators: a class and masked codes in, logits out.

- `ImageBert` (TiTok L-32 and B-64, One-D-Piece S, B and L): transformers' BERT, post-LN, under its names.
- `UViT` (TiTok S-128): pre-LN blocks with long skips; each late block takes the output of its early twin as well.

Both put the class in front of the codes and read one table: codes 0...V-1, the mask V, classes V+1..., no class last.
TiTok arXiv 2406.07550, One-D-Piece arXiv 2501.10064, U-ViT arXiv 2209.12152.

Letters: R rows, N codes, S = N + 1 positions, V codes of the vocabulary, D width, h heads, F inner width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..codecs.published import Weights, WeightsError, load_into
from .generator import Canvas
from .maskgit import MaskGIT, Unmasking
from .published import Row, save_generator


@dataclass(frozen=True, kw_only=True)
class ClassMaskConfig:
    """One network.

    Args:
        network: "bert" or "uvit".
        vocab: V, the codec's codes.
        classes: what can be asked for.
        length: the most codes of a canvas.
        layers: of U-ViT, half of these go in, half come out, and one more stands between.
        dropout: while training; published 0.1 for BERT and 0 for U-ViT.
    """

    network: Literal["bert", "uvit"] = "bert"
    vocab: int
    classes: int
    length: int
    dim: int = 768
    layers: int = 24
    heads: int = 16
    inner: int = 3072
    dropout: float = 0.1

    def __post_init__(self):
        if self.network not in ("bert", "uvit"):
            raise ValueError(f"network is {self.network!r}, expected bert or uvit")
        if self.dim % self.heads:
            raise ValueError(f"dim is {self.dim}, expected a multiple of the {self.heads} heads")
        if self.network == "uvit" and self.layers % 2:
            raise ValueError(f"layers is {self.layers}, expected an even number for uvit")


class ClassMasked(nn.Module):
    """What both networks share: the table of ids, and the class in front."""

    def __init__(self, config: ClassMaskConfig):
        super().__init__()
        self.config = config
        self.vocab = config.vocab

    def check(self, canvas: Canvas) -> None:
        """Raise ValueError where a canvas is too long, or its condition is no class."""
        c = self.config
        if len(canvas.codes) > c.length:
            raise ValueError(
                f"the canvas has {len(canvas.codes)} positions, expected at most {c.length}"
            )
        label = canvas.condition
        if label is not None and (label.ndim or label.is_floating_point()):
            raise ValueError(
                f"the condition is {label.dtype} of shape {tuple(label.shape)}, expected one class (an integer [])"
            )
        if label is not None and not 0 <= int(label) < c.classes:
            raise ValueError(f"the class is {int(label)}, expected 0 to {c.classes - 1}")

    def prepare(self, conditions: Sequence[Tensor | None], grid: tuple[int, ...]) -> Tensor:
        """Labels [R]; no class is the number of classes."""
        labels = [self.config.classes if c is None else int(c) for c in conditions]
        return torch.tensor(labels, device=self.table.weight.device)

    @property
    def table(self) -> nn.Embedding:
        """The embedding of codes, mask and classes."""
        raise NotImplementedError

    def embedded(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Class and codes, [R, S, D] of ids [R, N] (V for the mask) and labels [R]."""
        return self.table(torch.cat([labels[:, None] + self.vocab + 1, ids], 1))


class ImageBert(ClassMasked):
    """BERT over a class and codes."""

    def __init__(self, config: ClassMaskConfig):
        super().__init__(config)
        self.model = Bert(config)
        self.apply(_bert_start)

    @property
    def table(self) -> nn.Embedding:
        """The embedding of codes, mask and classes."""
        return self.model.embeddings.word_embeddings

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Ids [R, N] (V for the mask) and labels [R] to logits [R, N, V]."""
        return self.model(self.embedded(ids, labels))


class Bert(nn.Module):
    """Under transformers' names, with the head that TiTok hung into it."""

    def __init__(self, c: ClassMaskConfig):
        super().__init__()
        self.embeddings = BertEmbeddings(c)
        self.encoder = BertEncoder(c)
        self.lm_head = nn.Linear(c.dim, c.vocab)

    def forward(self, words: Tensor) -> Tensor:
        """Embedded class and codes [R, S, D] to logits [R, N, V] of the codes."""
        return self.lm_head(self.encoder(self.embeddings(words))[:, 1:])


class BertEmbeddings(nn.Module):
    """Words and places; the type is always the first."""

    def __init__(self, c: ClassMaskConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab + c.classes + 2, c.dim)
        self.position_embeddings = nn.Embedding(c.length + 1, c.dim)
        self.token_type_embeddings = nn.Embedding(2, c.dim)
        self.LayerNorm = nn.LayerNorm(c.dim, eps=1e-12)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, words: Tensor) -> Tensor:
        """[R, S, D] to the same."""
        place = self.position_embeddings.weight[: words.shape[1]]
        x = words + self.token_type_embeddings.weight[0] + place
        return self.dropout(self.LayerNorm(x))


class BertEncoder(nn.Module):
    """The layers, one behind another."""

    def __init__(self, c: ClassMaskConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(c) for _ in range(c.layers))

    def forward(self, x: Tensor) -> Tensor:
        """[R, S, D] to the same."""
        for layer in self.layer:
            x = layer(x)
        return x


class BertAttention(nn.Module):
    """Attention both ways, and the norm of the sum."""

    def __init__(self, c: ClassMaskConfig):
        super().__init__()
        self.heads, self.rate = c.heads, c.dropout
        names = ("query", "key", "value")
        self.self = nn.ModuleDict({name: nn.Linear(c.dim, c.dim) for name in names})
        self.output = BertOutput(c.dim, c)

    def forward(self, x: Tensor) -> Tensor:
        """[R, S, D] to the same."""
        q, k, v = (
            rearrange(linear(x), "r s (h d) -> r h s d", h=self.heads)
            for linear in self.self.values()
        )
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        return self.output(rearrange(y, "r h s d -> r s (h d)"), x)


class BertLayer(nn.Module):
    """Attention and feed-forward under BERT's names."""

    def __init__(self, c: ClassMaskConfig):
        super().__init__()
        self.attention = BertAttention(c)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.dim, c.inner)})
        self.output = BertOutput(c.inner, c)

    def forward(self, x: Tensor) -> Tensor:
        """[R, S, D] to the same."""
        x = self.attention(x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertOutput(nn.Module):
    """Back to the width, and the norm of the sum."""

    def __init__(self, width: int, c: ClassMaskConfig):
        super().__init__()
        self.dense = nn.Linear(width, c.dim)
        self.LayerNorm = nn.LayerNorm(c.dim, eps=1e-12)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y [R, S, width] and the residual x [R, S, D] to [R, S, D]."""
        return self.LayerNorm(self.dropout(self.dense(y)) + x)


class UViT(ClassMasked):
    """A transformer whose late blocks also read the early ones."""

    def __init__(self, config: ClassMaskConfig):
        super().__init__(config)
        c = config
        self.embeddings = nn.Embedding(c.vocab + c.classes + 2, c.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.length + 1, c.dim))
        self.in_blocks = nn.ModuleList(UViTBlock(c) for _ in range(c.layers // 2))
        self.mid_block = UViTBlock(c)
        self.out_blocks = nn.ModuleList(UViTBlock(c, skip=True) for _ in range(c.layers // 2))
        self.norm = nn.LayerNorm(c.dim)
        self.lm_head = nn.Linear(c.dim, c.vocab)
        self.apply(_bert_start)
        nn.init.normal_(self.pos_embed, std=0.02)

    @property
    def table(self) -> nn.Embedding:
        """The embedding of codes, mask and classes."""
        return self.embeddings

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Ids [R, N] (V for the mask) and labels [R] to logits [R, N, V]."""
        x = self.embedded(ids, labels)
        x = x + self.pos_embed[:, : x.shape[1]]
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(torch.cat([x, skips.pop()], -1))
        return self.lm_head(self.norm(x[:, 1:]))


class UViTBlock(nn.Module):
    """Pre-LN attention and feed-forward; with a skip the input is twice as wide."""

    def __init__(self, c: ClassMaskConfig, *, skip: bool = False):
        super().__init__()
        self.heads, self.rate = c.heads, c.dropout
        self.skip_linear = nn.Linear(2 * c.dim, c.dim) if skip else None
        self.norm1 = nn.LayerNorm(c.dim)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(c.dim, 3 * c.dim, bias=False), "proj": nn.Linear(c.dim, c.dim)}
        )
        self.norm2 = nn.LayerNorm(c.dim)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(c.dim, c.inner), "fc2": nn.Linear(c.inner, c.dim)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """[R, S, D] (with a skip 2 D) to [R, S, D]."""
        if self.skip_linear is not None:
            x = self.skip_linear(x)
        q, k, v = rearrange(
            self.attn["qkv"](self.norm1(x)),
            "r s (three h d) -> three r h s d",
            three=3,
            h=self.heads,
        )
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        x = x + self.attn["proj"](rearrange(y, "r h s d -> r s (h d)"))
        y = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](F.dropout(y, rate))


def class_network(config: ClassMaskConfig) -> ClassMasked:
    """The network of a config."""
    return {"bert": ImageBert, "uvit": UViT}[config.network](config)


def from_published(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "generator state dict",
) -> ClassMasked:
    """TiTok's or One-D-Piece's generator.

    Args:
        state_dict: of `ImageBert` or `UViTBert`.
        config: `heads`, which shapes do not tell (16 where not given).
    """
    built = class_network(infer_config(state_dict, config or {}, source=source))
    # Older transformers stored the numbers 0, 1, ... as a buffer.
    load_into(built, state_dict, source=source, ignore=("model.embeddings.position_ids",))
    return built.eval()


def build(files: Mapping[str, Weights], row: Row) -> MaskGIT:
    """The generator of a row: our own files carry the whole config, published ones need their heads."""
    weights = files["weights"]
    if weights.config:
        network = class_network(ClassMaskConfig(**row.config))
        load_into(network, weights.tensors, source=weights.source)
    else:
        network = from_published(weights.tensors, row.config, source=weights.source)
    return MaskGIT(network, options=Unmasking(**row.options), codec=row.codec)


def save(
    generator: MaskGIT,
    path: str | Path,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a class-conditioned generator as one file, which `load_generator` reads; see `save_generator`."""
    network = generator.network
    assert isinstance(network, ClassMasked)
    row = Row(
        system="class-maskgit",
        name=name,
        codec=generator.codec or "",
        config=asdict(network.config),
        options=asdict(generator.options),
    )
    save_generator(path, network.state_dict(), row, dtype=dtype, about=about)


def infer_config(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any], *, source: str = "state dict"
) -> ClassMaskConfig:
    """The config that the shapes of published tensors tell; `given` where they do not."""
    uvit = "pos_embed" in tensors
    blocks, embeddings = "model.encoder.layer.", "model.embeddings."
    names = (
        ("embeddings.weight", "pos_embed", "lm_head.weight", "mid_block.mlp.fc1.weight")
        if uvit
        else (
            f"{embeddings}word_embeddings.weight",
            f"{embeddings}position_embeddings.weight",
            "model.lm_head.weight",
            f"{blocks}0.intermediate.dense.weight",
        )
    )
    try:
        words, places, head, inner = (tensors[name].shape for name in names)
    except KeyError as error:
        raise WeightsError(
            f"{source}: no key {error}; expected the state dict of TiTok's ImageBert or UViTBert"
        ) from error
    layers = 2 * _count(tensors, "in_blocks.") if uvit else _count(tensors, blocks)
    told = {
        "network": "uvit" if uvit else "bert",
        "vocab": head[0],
        "classes": words[0] - head[0] - 2,
        "length": places[-2] - 1,
        "dim": words[1],
        "layers": layers,
        "inner": inner[0],
        "dropout": 0.0 if uvit else 0.1,
    }
    return ClassMaskConfig(**{**told, **given})


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in tensors if k.startswith(prefix))


def _bert_start(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
