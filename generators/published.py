"""Names of generators: one explicit table of published files, beside the codecs' (`codecs/registry.py`).

    generator = load_generator("titok/l-32 generator")
    codec = load_codec(generator.codec)
    pictures = codec.decode(generator.streams(codec, [207, 360]))

Each module in `SYSTEMS` has one function, `build(files, row)`, which makes the decoding method with its network. A file
that `save_generator` wrote says everything, so any path to one loads too.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.published import (
    FORMAT,
    KEY,
    File,
    Weights,
    WeightsError,
    check_hash,
    find,
    read_weights,
    write_safetensors,
)


class UnknownGenerator(ValueError):
    """There is no generator of that name; the message offers the nearest."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a name becomes a generator.

    Args:
        system: the key in `SYSTEMS`.
        codec: whose codes it writes, as `load_codec` takes it.
        files: role -> published file.
        config: what the files do not say, or all of it for our own files.
        options: how to draw, as published.
        code_licence, weights_licence: of the published work.
        about: one line.
    """

    system: str
    codec: str = ""
    name: str = ""
    files: Mapping[str, File] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    code_licence: str = "Apache-2.0"
    weights_licence: str = "Apache-2.0"
    about: str = ""


# system -> module below anytok.generators
SYSTEMS: dict[str, str] = {
    "class-maskgit": "image_maskgit",
    "phenaki": "phenaki",
    "octgpt": "octree_files",
    "masked-ar": "masked_ar",
    "xar": "next_x",
}


def _titok(
    variant: str, hub: str, heads: int, options: Mapping[str, Any], about: str
) -> tuple[str, Row]:
    row = Row(
        system="class-maskgit",
        codec=f"titok/{variant}",
        files={
            "weights": File(
                name="model.safetensors",
                repo=f"yucornetto/generator_titok_{hub}_imagenet",
                alternatives=("pytorch_model.bin", f"generator_titok_{hub}.bin"),
            )
        },
        config={"heads": heads},
        # As in the repository's evaluation of FID, which cools the softmax too.
        options={"curve": "arccos", "softmax": (1.3, 0.5), **options},
        weights_licence="Apache-2.0 (hub tag; research only says the README)",
        about=about,
    )
    return f"titok/{variant} generator", row


def _onedpiece(size: str, temperature: float, cfg: float) -> tuple[str, Row]:
    row = Row(
        system="class-maskgit",
        codec=f"onedpiece/{size}-256",
        files={
            "weights": File(
                name="pytorch_model.bin",
                repo=f"turing-motors/MaskGIT_One-D-Piece-{size.upper()}-256",
                alternatives=(f"maskgit_one-d-piece_{size}256.bin",),
            )
        },
        config={"heads": 16},
        options={
            "steps": 16,
            "curve": "arccos",
            "temperature": temperature,
            "cfg": cfg,
            "guidance": "power-cosine",
        },
        weights_licence="unknown (see the hub card)",
        about=f"ImageNet classes to 256 tokens of onedpiece/{size}-256, BERT",
    )
    return f"onedpiece/{size}-256 generator", row


def _octgpt(
    variant: str, file: str, codec: str, config: Mapping[str, Any], about: str
) -> tuple[str, Row]:
    row = Row(
        system="octgpt",
        codec=f"octgpt/{codec}",
        files={"weights": File(name=f"octgpt_{file}.pth", repo="wst2001/OctGPT")},
        config=config,
        code_licence="MIT (file headers; the repository has no licence file)",
        weights_licence="unknown (see the hub card)",
        about=about,
    )
    return f"octgpt/{variant} generator", row


def _tokenbridge(size: str, long: str, options: Mapping[str, Any], about: str) -> tuple[str, Row]:
    row = Row(
        system="masked-ar",
        codec="tokenbridge/kl16-6bit",
        files={
            "weights": File(
                name=f"tokenbridge/tokenbridge_{long}/checkpoint-last.pth",
                repo="Epiphqny/TokenBridge",
                alternatives=(f"tokenbridge_{long}/checkpoint-last.pth", "checkpoint-last.pth"),
            )
        },
        options=options,
        code_licence="MIT",
        weights_licence="unknown (see the hub card)",
        about=about,
    )
    return f"tokenbridge/{size} generator", row


def _xar(size: str, options: Mapping[str, Any], about: str) -> tuple[str, Row]:
    row = Row(
        system="xar",
        codec="kl16/mar",
        files={"weights": File(name=f"xAR-{size.upper()}.pth", repo="OliverRen/xAR")},
        options=options,
        code_licence="none given",
        weights_licence="none given",
        about=about,
    )
    return f"xar/{size} generator", row


OCTGPT_ALONE = {"window": 2048, "dilation": 2, "unconditional": True}

# Where guidance is linear the published scale has an offset of one: theirs 4.5 is our cfg 5.5.
GENERATORS: dict[str, Row] = dict(
    [
        _titok(
            "l-32",
            "l32",
            16,
            {"steps": 8, "temperature": 9.5, "cfg": 5.5, "guidance": "linear"},
            "ImageNet classes to 32 tokens, BERT, gFID 2.77",
        ),
        _titok(
            "b-64",
            "b64",
            16,
            {"steps": 8, "temperature": 11.0, "cfg": 4.0, "guidance": "linear"},
            "ImageNet classes to 64 tokens, BERT, gFID 2.48",
        ),
        _titok(
            "s-128",
            "s128",
            16,
            {"steps": 64, "temperature": 2.8, "cfg": 6.9, "guidance": "power-cosine"},
            "ImageNet classes to 128 tokens, U-ViT, gFID 1.97",
        ),
        _onedpiece("s", 3.0, 12.5),
        _onedpiece("b", 2.5, 8.5),
        _onedpiece("l", 3.0, 5.5),
        _tokenbridge(
            "l",
            "large",
            {"cfg": 3.1, "temperature": 0.96},
            "ImageNet classes to 256 x 16 codes, 487M parameters, gFID 1.76",
        ),
        _tokenbridge(
            "h",
            "huge",
            {"cfg": 3.45, "temperature": 0.91},
            "ImageNet classes to 256 x 16 codes, 910M parameters, gFID 1.55",
        ),
        _xar("b", {"steps": 40, "cfg": 2.7}, "ImageNet classes to KL-16 latents, gFID 1.72"),
        _xar("l", {"steps": 50, "cfg": 2.3}, "ImageNet classes to KL-16 latents, 608M parameters"),
        _xar("h", {"steps": 50, "cfg": 2.2}, "ImageNet classes to KL-16 latents, gFID 1.24"),
        *(
            _octgpt(name, name, "large", OCTGPT_ALONE, f"shapes of one ShapeNet class: {name}")
            for name in ("airplane", "car", "chair", "rifle", "table")
        ),
        _octgpt(
            "category",
            "im5",
            "large-category",
            {"window": 1024, "dilation": 16},
            "five ShapeNet classes to shapes, 170M parameters",
        ),
        _octgpt(
            "text",
            "objv_text",
            "large-objaverse",
            {"window": 1024, "dilation": 8, "prefix": 77},
            "CLIP ViT-L/14 text features [77, 768] to shapes, 440M parameters",
        ),
        _octgpt(
            "room",
            "room",
            "large-room",
            {"window": 1024, "dilation": 4, "unconditional": True},
            "synthetic rooms, 173M parameters",
        ),
    ]
)


def list_generators(pattern: str = "*") -> list[str]:
    """All names that match a pattern such as `titok/*`, sorted."""
    return sorted(fnmatch.filter(GENERATORS, pattern))


def load_generator(
    name_or_path: str | Path,
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a generator by name, or from a file that `save_generator` wrote.

    Args:
        name_or_path: a name of `list_generators()` (the word "generator" may be left out), or a saved file.
        path: the folder or file of the published weights, where they are not to come from the hub.
        device: where the weights go.
        dtype: the floating type to run in.

    Returns:
        The decoding method with its network (`MaskGIT`), whose `codec` names the codec that reads its codes.

    Raises:
        UnknownGenerator: the message offers the nearest name.
        CodecUnavailable: the weights cannot be had here; the message says where they are.
        WeightsError: the weights are another model's or damaged.
    """
    name = str(name_or_path)
    name = f"{name} generator" if f"{name} generator" in GENERATORS else name
    if name not in GENERATORS and Path(name_or_path).is_file():
        weights = read_weights(name_or_path)
        row, files = _saved_row(weights), {"weights": weights}
    else:
        row = replace(GENERATORS[_known(name)], name=name)
        files = _files(row, path)
        if files["weights"].config:
            row = _saved_row(files["weights"])
    generator = importlib.import_module(f"{__package__}.{SYSTEMS[row.system]}").build(files, row)
    for part in (generator.network, generator.critic):
        if isinstance(part, nn.Module):
            part.to(device=device, dtype=dtype).eval()
    return generator


def save_generator(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    row: Row,
    *,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a generator as one safetensors file, atomically.

    Args:
        tensors: its weights, as `build` of its system reads them.
        row: system, name, codec, config and options, all as JSON values.
        dtype: what floating tensors are stored as.
        about: what else should travel with the weights (training data, steps, measures).
    """
    stored = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    if dtype is not None:
        stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in stored.items()}
    told = {k: v for k, v in asdict(row).items() if k not in ("files", "about")}
    header = {"format": FORMAT, "kind": "generator", **told, **(about or {})}
    write_safetensors(stored, path, {KEY: json.dumps(header)})


def _files(row: Row, path: str | Path | None) -> dict[str, Weights]:
    files = {}
    for role, file in row.files.items():
        where = find(file, path)
        if file.sha256 and path is None:
            check_hash(where, file.sha256)
        files[role] = read_weights(where, wrapper=file.wrapper)
    return files


def _saved_row(weights: Weights) -> Row:
    """What the header of our own file says."""
    header = weights.config
    if header.get("kind") != "generator":
        what = "a codec" if header else "no generator of ours"
        raise WeightsError(
            f"{weights.source}: {what}; published files load by name: "
            "load_generator('system/variant generator', path=...)"
        )
    if header.get("format") != FORMAT:
        raise WeightsError(
            f"{weights.source}: format {header.get('format')!r}, this anytok reads {FORMAT}"
        )
    names = ("system", "name", "codec", "config", "options", "weights_licence")
    missing = [key for key in names if key not in header]
    if missing:
        raise WeightsError(f"{weights.source}: the anytok header lacks {', '.join(missing)}")
    if header["system"] not in SYSTEMS:
        raise WeightsError(f"{weights.source}: unknown system {header['system']!r}")
    return Row(**{key: header[key] for key in names})


def _known(name: str) -> str:
    if name in GENERATORS:
        return name
    near = difflib.get_close_matches(name, GENERATORS, n=3, cutoff=0.3)
    raise UnknownGenerator(
        f"there is no generator '{name}'; nearest: {', '.join(near) or ', '.join(GENERATORS)}"
    )
