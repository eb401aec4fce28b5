"""Files of OctGPT's transformers: ours (one safetensors file with its config), and the published ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..codecs.published import KEY, WeightsError, load_into, read_weights, write_safetensors
from .octree_network import OctreeNetwork, OctreeNetworkConfig

SYSTEM = "octgpt-generator"
# What the shapes of the published files do not tell.
PUBLISHED: dict[str, dict[str, int | bool]] = {
    **{
        f"octgpt_{name}.pth": {"window": 2048, "dilation": 2, "prefix": 64, "unconditional": True}
        for name in ("airplane", "car", "chair", "rifle", "table")
    },
    "octgpt_im5.pth": {"window": 1024, "dilation": 16, "prefix": 64},
    "octgpt_objv_text.pth": {"window": 1024, "dilation": 8, "prefix": 77},
    "octgpt_room.pth": {"window": 1024, "dilation": 4, "prefix": 64, "unconditional": True},
}
CATEGORIES = ("airplane", "car", "chair", "table", "rifle")  # labels of octgpt_im5.pth


def save_network(
    network: OctreeNetwork,
    path: str | Path,
    *,
    codec: str,
    dtype: torch.dtype | None = None,
    about: Mapping[str, object] | None = None,
) -> None:
    """Write a network as one safetensors file.

    Args:
        codec: the identity (`name@fingerprint`) of the codec whose streams it writes.
        about: what else should travel with the weights: labels, training data, measures.
    """
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in network.state_dict().items()}
    if dtype is not None:
        tensors = {k: v.to(dtype) for k, v in tensors.items()}
    header = {
        "format": 1,
        "system": SYSTEM,
        "config": dataclasses.asdict(network.config),
        "codec": codec,
        **(about or {}),
    }
    write_safetensors(tensors, path, {KEY: json.dumps(header)})


def load_network(
    path: str | Path, config: Mapping[str, object] | None = None
) -> tuple[OctreeNetwork, dict]:
    """A network of ours or a published one, and the header that came with it ({} where there is none).

    Args:
        config: what a published file's shapes do not tell; known for the files in `PUBLISHED` by their names.

    Raises:
        WeightsError: the file is of another model.
    """
    weights = read_weights(path)
    header = weights.config
    if not header:
        known = PUBLISHED.get(Path(path).name, {})
        network = OctreeNetwork.from_published(
            weights.tensors, {**known, **(config or {})}, source=weights.source
        )
        return network, {}
    if header.get("system") != SYSTEM:
        raise WeightsError(
            f"{path}: holds a '{header.get('system')}', expected an '{SYSTEM}' (load_codec reads codecs)"
        )
    network = OctreeNetwork(OctreeNetworkConfig(**header["config"]))
    load_into(network, weights.tensors, source=weights.source)
    return network, header
