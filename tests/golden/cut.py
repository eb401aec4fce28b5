"""Cut a whole reference fixture down to a golden of at most half a megabyte.

    python tests/golden/cut.py image_onedpiece --from ../shared/parity --drop generator --first outputs/image=1

A path such as `models/*/outputs` is matched against the tree (shell wildcards, a match takes the whole branch).
`--drop` leaves branches out, `--keep` keeps nothing else, `--first PATH=N` keeps the first N rows of each tensor there,
`--every PATH=N` every Nth row and column of each picture there.
Recipes stay recipes; a stored tensor that is a plain multiple of its draw becomes a rule of the recipe.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from load import apply_rule, expand
from torch import Tensor

HERE = Path(__file__).parent
LIMIT = 500_000  # bytes of one golden
FACTORS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0, 16.0, 20.0, 50.0, 100.0)


def cut(
    node: Any,
    keep: list[str],
    drop: list[str],
    first: dict[str, int],
    every: dict[str, int],
    path: str = "",
) -> Any:
    """The tree without dropped branches, with fewer rows where asked; None where nothing is left."""
    if any(fnmatch(path, pattern) for pattern in drop):
        return None
    if any(fnmatch(path, pattern) for pattern in keep):
        keep = []
    if isinstance(node, dict) and "__recipe__" in node:
        return None if keep else compact(node)
    if isinstance(node, dict):
        below = {
            k: cut(v, keep, drop, first, every, f"{path}/{k}".strip("/")) for k, v in node.items()
        }
        return {k: v for k, v in below.items() if v is not None or node[k] is None} or None
    if isinstance(node, (list, tuple)):
        below_list = [cut(v, keep, drop, first, every, f"{path}/{i}") for i, v in enumerate(node)]
        return type(node)(below_list) if any(v is not None for v in below_list) else None
    if keep:
        return None
    if isinstance(node, Tensor):
        step = next((n for pattern, n in every.items() if fnmatch(path, pattern)), None)
        node = node[..., ::step, ::step] if step else node
        rows = next((n for pattern, n in first.items() if fnmatch(path, pattern)), None)
        return node[:rows].clone() if node.ndim else node.clone()
    return node


def compact(node: dict[str, Any]) -> dict[str, Any]:
    """A recipe in which stored multiples of a draw have become rules, with the same tensors bit for bit."""
    recipe, stored = node["__recipe__"], dict(node["stored"])
    rng = torch.Generator().manual_seed(recipe["seed"])
    entries = []
    for name, shape, rule, scale in recipe["entries"]:
        draw = torch.randn(tuple(shape), generator=rng)
        if rule == "stored" and name in stored:
            rule, scale = explain(draw, stored[name]) or (rule, scale)
            if rule != "stored":
                del stored[name]
        entries.append([name, list(shape), rule, scale])
    stored = {name: small(value) for name, value in stored.items()}
    return {**node, "__recipe__": {**recipe, "entries": entries}, "stored": stored}


def small(value: Tensor) -> Tensor:
    """A copy that owns no more than it shows; one number where all are the same."""
    one = value.flatten()[:1].clone()
    return one.expand(value.shape) if value.numel() and (value == one).all() else value.clone()


def explain(draw: Tensor, value: Tensor) -> tuple[str, float] | None:
    """The rule that gives `value` exactly, if there is one."""
    for rule in ("over_sqrt_fan_in", "scaled", "one_plus"):
        for scale in FACTORS:
            if draw.ndim and torch.equal(apply_rule(draw, rule, scale), value):
                return rule, scale
    return None


def same(a: Any, b: Any) -> bool:
    """Whether everything in the cut tree `a` equals what stands in the whole tree `b`, as far as its rows go."""
    if isinstance(a, dict):
        return all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return all(same(x, y) for x, y in zip(a, b) if x is not None)
    if isinstance(a, Tensor):
        if a.ndim > 1 and a.shape[1:] != b.shape[1:]:
            b = b[..., :: b.shape[-1] // a.shape[-1], :: b.shape[-1] // a.shape[-1]]
        return torch.equal(a, b[: len(a)] if a.ndim else b)
    return a == b


def main() -> None:
    """Cut one fixture, check that nothing changed, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--from", dest="source", type=Path, required=True, help="whole fixtures")
    parser.add_argument("--keep", nargs="*", default=[], metavar="PATH")
    parser.add_argument("--drop", nargs="*", default=[], metavar="PATH")
    parser.add_argument("--first", nargs="*", default=[], metavar="PATH=N")
    parser.add_argument("--every", nargs="*", default=[], metavar="PATH=N")
    parser.add_argument("--out", help="another name for the golden")
    args = parser.parse_args()
    whole = torch.load(args.source / f"{args.name}.pt", weights_only=True, map_location="cpu")
    first, every = (
        {path: int(n) for path, n in (item.split("=") for item in items)}
        for items in (args.first, args.every)
    )
    golden = cut(whole, args.keep, args.drop, first, every)
    if golden is None:
        raise SystemExit("nothing is left; look at the paths")
    if not same(expand(golden), expand(whole)):
        raise SystemExit("the cut golden differs from the fixture")
    target = HERE / f"{args.out or args.name}.pt"
    torch.save(golden, target)
    size = target.stat().st_size
    print(
        f"{target.name}: {size:,} bytes" + ("" if size <= LIMIT else f", over {LIMIT:,}: drop more")
    )


if __name__ == "__main__":
    main()
