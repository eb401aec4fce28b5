"""Files of OctGPT's generators, for `load_generator`: our own, and the published transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..codecs.published import Weights, load_into
from .octree import OctreeGenerator, OctreeOptions
from .octree_condition import Labels, from_header
from .octree_network import OctreeNetwork, OctreeNetworkConfig
from .published import Row, save_generator

CATEGORIES = Labels(("airplane", "car", "chair", "table", "rifle"))  # of octgpt_im5.pth, in order


def build(files: Mapping[str, Weights], row: Row) -> OctreeGenerator:
    """The generator of a row: our own files carry the whole config, published ones need what no shape tells."""
    weights = files["weights"]
    if weights.config:
        network = OctreeNetwork(OctreeNetworkConfig(**row.config))
        load_into(network, weights.tensors, source=weights.source)
        reader = from_header(weights.config)
    else:
        network = OctreeNetwork.from_published(weights.tensors, row.config, source=weights.source)
        classes = network.config.classes == len(CATEGORIES.names)
        labelled = not network.config.features and not network.config.unconditional
        reader = CATEGORIES if classes and labelled else None
    return OctreeGenerator(
        network, options=OctreeOptions(**row.options), codec=row.codec, reader=reader
    )


def save(
    generator: OctreeGenerator,
    path: str | Path,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a generator as one file, which `load_generator` reads; see `save_generator`."""
    row = Row(
        system="octgpt",
        name=name,
        codec=generator.codec or "",
        config=asdict(generator.network.config),
        options=asdict(generator.options),
    )
    reads = generator.reader.to_json() if generator.reader else {"kind": "none"}
    save_generator(
        path,
        generator.network.state_dict(),
        row,
        dtype=dtype,
        about={"condition": reads, **(about or {})},
    )
