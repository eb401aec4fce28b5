"""ONNX files as tensors: the constants of a graph, each named by the operation that consumes it.

Exporters rename weights (`onnx::MatMul_2536`), split layers (a bias becomes an `Add`, a layer norm a `Mul` and an
`Add`) and fold others away, and another export gives other names. What stays is which operation of which module takes
a constant, and in which order operations run. So a file is read as a list of `Constant` in the order of execution:

    op      slot  scope                     initializer           tensor
    MatMul  1     blocks.0.attn.query       onnx::MatMul_1523     [out, in] (as `nn.Linear` stores it)
    Add     0     blocks.0.attn.query       blocks.0...bias       [out]

Nothing is executed, and no other file is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...codec import CodecUnavailable
from ...published import Weights, WeightsError

CONTAINER = {"container": "onnx"}  # the metadata of `Weights` from a graph
EPSILON = "epsilon"
# Operations that hand a constant on.
_IDENTITY, _TRANSPOSE = "Identity", "Transpose"


@dataclass(frozen=True)
class Constant:
    """A constant input of an operation.

    Args:
        op: "MatMul", "Conv", ...
        slot: which input of the operation it is; -1 for the epsilon of a norm, which is an attribute.
        scope: the module path in the operation's name, dots between: "blocks.0.mlp.0"; "" where it has none.
        initializer: the constant's own name.
        tensor: the values; what MatMul and Gemm multiply with is [out, in].
    """

    op: str
    slot: int
    scope: str
    initializer: str
    tensor: Tensor


def read_onnx(path: str | Path) -> Weights:
    """The constants of an ONNX file as tensors by name (see `constants`), in the order of execution.

    Raises:
        CodecUnavailable: the onnx package is not installed.
        WeightsError: the file is damaged, or keeps its tensors in other files.
    """
    graph = _graph(Path(path))
    known = _constants(graph, str(path))
    tensors = {}
    for index, node in enumerate(graph.node):
        for slot, name in enumerate(node.input):
            if name in known and node.op_type not in (_IDENTITY, _TRANSPOSE):
                key = _key(index, node.op_type, slot, _scope(node.name), name)
                tensors[key] = _oriented(node, slot, known[name]).clone()
        for attribute in node.attribute:
            if attribute.name == EPSILON:
                key = _key(index, node.op_type, -1, _scope(node.name), EPSILON)
                tensors[key] = torch.tensor(attribute.f)
    if not tensors:
        raise WeightsError(f"{path}: the graph holds no constants, expected a model's weights")
    return Weights(tensors, dict(CONTAINER), str(path))


def is_graph(weights: Weights) -> bool:
    """Whether `weights` came from `read_onnx`."""
    return weights.metadata.get("container") == CONTAINER["container"]


def constants(tensors: Mapping[str, Tensor]) -> list[Constant]:
    """The list behind the tensors of `read_onnx`."""
    found = []
    for key, tensor in tensors.items():
        _, op, slot, scope, initializer = key.split(" ", 4)
        found.append(Constant(op, int(slot), scope, initializer, tensor))
    return found


def s3_state_dict(graph: Iterable[Constant]) -> dict[str, Tensor]:
    """The S3 tokenizer's published state dict out of its graph, every version of it.

    Blocks are told by their scopes, `conv1` and `conv2` by their order, the quantiser by what its numbers are for.
    What is not found is missing from the result, and the strict loader names it.
    """
    graph = list(graph)
    tensors: dict[str, Tensor] = {}
    for c in graph:
        block = re.search(r"(?:^|\.)(blocks\.\d+)\.(.+)$", c.scope)
        if "positional_embedding" in c.initializer:
            tensors["encoder.positional_embedding"] = c.tensor.reshape(-1, c.tensor.shape[-1])
        elif block and (parameter := _parameter(c)):
            tensors[f"encoder.{block[1]}.{block[2]}.{parameter}"] = c.tensor
    stem = [c for c in graph if c.op == "Conv" and "blocks." not in c.scope]
    places = [
        f"encoder.{conv}.{name}" for conv in ("conv1", "conv2") for name in ("weight", "bias")
    ]
    tensors.update({key: c.tensor for key, c in zip(places, stem)})
    return tensors | _s3_quantizer(graph)


def s3_epsilon(graph: Iterable[Constant]) -> dict[str, float]:
    """{"attn_eps": the epsilon of the norms before attention}, {} where the graph does not show it."""
    for c in graph:
        split = c.op == "Add" and c.tensor.numel() == 1  # the norm in single operations
        if c.scope.endswith("attn_ln") and (split or c.initializer == EPSILON):
            return {"attn_eps": float(f"{c.tensor.item():.3g}")}  # 1e-05 in float32, written out
    return {}


def _s3_quantizer(graph: list[Constant]) -> dict[str, Tensor]:
    width = next((c.tensor.shape[0] for c in graph if c.op == "Conv"), 0)
    inside = [c for c in graph if "quantizer" in c.scope + c.initializer]
    for c in inside:
        # The codebook is squared for the distances: v1. It is transposed there, rows are codes here.
        if c.op == "Pow" and c.tensor.ndim == 2:
            transposed = c.tensor.shape[0] == width
            return {"quantizer._codebook.embed": c.tensor.T if transposed else c.tensor}
    for i, c in enumerate(inside):
        if c.op in ("MatMul", "Gemm") and c.tensor.ndim == 2:
            found = {"quantizer._codebook.project_down.weight": c.tensor}
            # The bias is added first; later constants of this length belong to the rounding.
            for later in inside[i + 1 :]:
                if later.op in ("Add", "Gemm") and later.tensor.shape == c.tensor.shape[:1]:
                    return {**found, "quantizer._codebook.project_down.bias": later.tensor}
            return found
    return {}


def _parameter(c: Constant) -> str | None:
    """Which parameter of its module a constant is; None for scales, epsilons, tables."""
    if c.op in ("Conv", "Gemm", "LayerNormalization"):
        return {1: "weight", 2: "bias"}.get(c.slot)
    if c.op == "MatMul":
        return "weight" if c.tensor.ndim == 2 else None
    if c.tensor.ndim != 1 or c.tensor.numel() == 1:
        return None
    return {"Mul": "weight", "Add": "bias"}.get(c.op)


def _graph(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise CodecUnavailable(
            f"reading {path.name} needs the onnx package: pip install 'anytok[onnx]'"
        ) from error
    try:
        return onnx.load(path, load_external_data=False).graph
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except DecodeError as error:
        raise WeightsError(f"{path}: not a whole ONNX file ({error})") from error


def _constants(graph: Any, source: str) -> dict[str, Tensor]:
    """Initializers and `Constant` nodes by the name under which operations take them."""
    known = {item.name: _tensor(item, source) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":  # numbers and strings stand in others
                    known[node.output[0]] = _tensor(attribute.t, source)
        elif node.op_type == _IDENTITY and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
        elif node.op_type == _TRANSPOSE and node.input[0] in known:
            tensor = known[node.input[0]]
            order = [list(a.ints) for a in node.attribute if a.name == "perm"]
            known[node.output[0]] = tensor.permute(order[0] if order else range(tensor.ndim)[::-1])
    return known


def _tensor(item: Any, source: str) -> Tensor:
    from onnx import TensorProto, numpy_helper

    if item.data_location == TensorProto.EXTERNAL:
        raise WeightsError(f"{source}: '{item.name}' lies in another file, expected one file")
    return torch.from_numpy(numpy_helper.to_array(item).copy())


def _oriented(node: Any, slot: int, tensor: Tensor) -> Tensor:
    """A matrix that multiplies from the right, turned to [out, in]."""
    if slot != 1 or tensor.ndim != 2:
        return tensor
    if node.op_type == "MatMul":
        return tensor.T
    stored_transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return tensor.T if node.op_type == "Gemm" and not stored_transposed else tensor


def _scope(name: str) -> str:
    """ "/blocks.0/mlp/mlp.0/MatMul" to "blocks.0.mlp.0": the path without the operation and without doubles."""
    path: list[str] = []
    for segment in name.strip("/").split("/")[:-1]:
        if path and segment.startswith(path[-1] + "."):
            path.pop()
        path.append(segment)
    return ".".join(path)


def _key(index: int, *fields: object) -> str:
    return " ".join([str(index), *(str(field).replace(" ", "_") for field in fields)])
