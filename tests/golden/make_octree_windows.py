"""Cut the OctGPT fixture to who sees whom in its windows (all else needs its weights, which no seed gives back).

    python tests/golden/make_octree_windows.py --from ../shared/parity

"seen/KIND" are the fixture's masks inverted, packed to bits and compressed; `unpack` in the test undoes it.
`shape3d_octgpt.pt` itself is tested where ANYTOK_PARITY names its folder.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent


def main() -> None:
    """Write octree_windows.pt."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, required=True)
    source = parser.parse_args().source / "shape3d_octgpt.pt"
    whole = torch.load(source, weights_only=True, map_location="cpu")["uncond"]
    masks = whole["octreeT"]
    seen = {
        "local": ~(masks["patch_mask"] | masks["patch_tf_mask"]),
        "dilated": ~(masks["dilate_mask"] | masks["dilate_tf_mask"]),
        "local shifted": ~(masks["swin_patch_mask"] | masks["swin_patch_tf_mask"]),
    }
    golden = {
        "window": whole["cfg"]["patch_size"],
        "dilation": whole["cfg"]["dilation"],
        "sample": masks["batch_idx"].byte(),
        "level": masks["depth_idx"].byte(),
        "seen": {
            name: {"shape": list(mask.shape), "bits": packed(mask)} for name, mask in seen.items()
        },
    }
    target = HERE / "octree_windows.pt"
    torch.save(golden, target)
    print(f"{target.name}: {target.stat().st_size:,} bytes")


def packed(mask: Tensor) -> Tensor:
    """A mask as compressed bits."""
    data = zlib.compress(np.packbits(mask.numpy()).tobytes(), 9)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


if __name__ == "__main__":
    main()
