"""FlexTok's published config: the metadata of its safetensors file, read as data.

The file's metadata holds six Python dictionaries as text, in the manner of Hydra: nested, with class paths under
`_target_`. They are parsed as literals. Nothing is imported or built by name: `TARGETS` says for every class path which
module of ours does its work, which fields are read (with the published default), which must have one value, and which
have no bearing on inference. Whatever stands in none of these tables is an error.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..published import WeightsError

SECTIONS = (
    "vae",
    "encoder",
    "decoder",
    "regularizer",
    "flow_matching_noise_module",
    "pipeline",
)
MAX_TEXT = 1 << 18  # characters of one section; the published ones have a few thousand
MAX_SIZE = 1 << 16  # of any width, depth or count
REQUIRED = object()
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One class path of the published configs.

    Args:
        ours: what does its work here, for the reader of this table; nothing is looked up by it.
        read: fields that are read, with the published default or `REQUIRED`.
        fixed: fields that must have one of these values.
        free: fields without bearing on inference; so are all that end in `_key` or `_keys` (the wiring).
    """

    ours: str
    read: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    free: tuple[str, ...] = ()


_INIT = ("weight_init_style", "zero_init_query_proj", "use_act_checkpoint", "_partial_")
_WIRING = "the order of tokens in `flextok_layers.Pattern`"
_PATCHES = Target(
    "flextok_layers.PatchEmbed",
    {"patch_sizes": REQUIRED, "dim": REQUIRED, "channels_in": REQUIRED},
    free=(*_INIT, "flatten_patches"),
)
_POSITIONS = Target(
    "flextok_layers.Positions",
    {"dim": REQUIRED, "max_sizes": REQUIRED, "posemb_type": "sincos"},
    # At the full size, the only one that is used, both ways of scaling give the table itself.
    {
        "posemb_scaling": ("absolute", "interpolate"),
        "posemb_type": ("sincos", "learnable_sum", "learnable_prod"),
    },
)
_HEAD = {"use_mup_readout": (False,), "proj_bias": (True,), "adaLN_bias": (True,)}
_FULL = {"dtype_override": (None, "fp32", "float32")}

TARGETS: dict[str, Target] = {
    "flextok.vae_wrapper.StableDiffusionVAE": Target(
        "vae.AutoencoderKL",
        {
            "latent_channels": 16,
            "scaling_factor": None,
            "dtype_override": "fp32",
            "hf_hub_path": None,
            "sample_posterior": True,
        },
        free=(
            "learnable_logvar",
            "logvar_init",
            "compile_encode_fn",
            "force_vae_encode",
            "frozen",
        ),
    ),
    "flextok.model.utils.wrappers.SequentialModuleDictWrapper": Target(
        "flextok.FlexTokEncoder and FlexTokDecoder", {"module_dict": REQUIRED}
    ),
    "flextok.model.utils.dict_ops.PerSampleOp": Target(_WIRING, {"per_sample_op": REQUIRED}),
    "flextok.model.utils.dict_ops.channels_first_to_last": Target(_WIRING, free=_INIT),
    "flextok.model.utils.dict_ops.channels_last_to_first": Target(_WIRING, free=_INIT),
    "flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker": Target(
        _WIRING,
        {"mask_mode": "full", "per_subseq_embs": False},
        free=("max_seq_len", "pad_to_multiple", "compile_block_mask", "return_materialized_mask"),
    ),
    "flextok.model.postprocessors.seq_unpacking.SequenceUnpacker": Target(_WIRING),
    "flextok.model.preprocessors.patching.PatchEmbedder": _PATCHES,
    "flextok.model.utils.posembs.PositionalEmbeddingAdder": _POSITIONS,
    "flextok.model.preprocessors.registers.Registers1D": Target(
        "flextok_layers.Registers",
        {"dim": REQUIRED, "n_max": REQUIRED, "n_eval": None},
        {"ordering_mode": ("nested",), "extra_registers_dim": (None,)},
        free=("n_min", "size_sampling_mode"),
    ),
    "flextok.model.trunks.transformers.FlexTransformer": Target(
        "flextok_layers.Trunk and AdaTrunk",
        {"dim": 768, "depth": 12, "adaLN_expansion": 1},
        {
            "head_dim": (64,),
            "mlp_ratio": (4, 4.0),
            "qkv_bias": (False,),
            "proj_bias": (False,),
            "mlp_bias": (False,),
            "gated_mlp": (True,),
            "qk_norm": (True,),
            "score_mod_read_key": (None,),
            "rope_forward_read_key": (None,),
        },
        free=(*_INIT, "drop", "drop_path_rate", "intermediate_layers"),
    ),
    "flextok.model.postprocessors.heads.LinearHead": Target(
        "flextok_layers.Projection",
        {"dim": REQUIRED, "dim_out": REQUIRED},
        {**_HEAD, **_FULL, "adaLN_emb_read_key": (None,)},
        free=_INIT,
    ),
    "flextok.model.preprocessors.linear.LinearLayer": Target(
        "flextok_layers.Projection",
        {"dim": REQUIRED, "dim_in": REQUIRED},
        {**_FULL, "proj_bias": (True,)},
        free=_INIT,
    ),
    "flextok.model.preprocessors.token_dropout.MaskedNestedDropout": Target(
        "flextok_layers.MaskToken", {"dim": REQUIRED}, free=("size_sampling_mode",)
    ),
    "flextok.model.preprocessors.nullcond.LearnedNullCond": Target(
        "flextok_layers.NullToken",
        {"dim": REQUIRED},
        {"replace_with_single_token": (False,)},
        free=("dropout_prob",),
    ),
    "flextok.model.preprocessors.time_embedding.TimestepEmbedder": Target(
        "flextok_layers.TimeEmbedding",
        {"dim": REQUIRED, "frequency_embedding_size": 256, "max_timestep": 1000.0},
        {"temb_as_tokens": (False,)},
        free=_INIT,
    ),
    "flextok.model.postprocessors.heads.ToPatchesLinearHead": Target(
        "flextok_layers.PatchHead",
        {"dim": REQUIRED, "channels_out": REQUIRED, "patch_sizes": REQUIRED},
        {**_HEAD, **_FULL},
        free=_INIT,
    ),
    "flextok.regularizers.quantize_fsq.FSQ": Target(
        "quantizers.fsq.FSQ",
        {"levels": REQUIRED},
        free=(
            "drop_quant_p",
            "corrupt_tokens_p",
            "min_corrupt_tokens_p",
            "apply_corrupt_tokens_p",
            "packed_call",
        ),
    ),
    "flextok.flow_matching.noise_modules.MinRFNoiseModule": Target(
        "training only", free=("ln", "stratisfied", "mode_scale")
    ),
    "flextok.flow_matching.pipelines.MinRFPipeline": Target(
        "flextok.FlexTok.sample", {"out_channels": REQUIRED}, free=_INIT
    ),
}

_NAMES = {path.rpartition(".")[2]: path for path in TARGETS}
# Steps that hold weights, in the order in which they run. Steps between them only move tensors.
ENCODER_STEPS = {
    "enc_patch_emb": "PatchEmbedder",
    "enc_posemb_module": "PositionalEmbeddingAdder",
    "enc_register_module": "Registers1D",
    "enc_transformer": "FlexTransformer",
    "enc_to_latents": "LinearHead",
}
DECODER_STEPS = {
    "dec_from_latents": "LinearLayer",
    "dec_registers_posemb_module": "PositionalEmbeddingAdder",
    "dec_nested_dropout": "MaskedNestedDropout",
    "dec_latent_dropout": "LearnedNullCond",
    "dec_noise_patch_emb": "PatchEmbedder",
    "dec_patches_posemb_module": "PositionalEmbeddingAdder",
    "dec_time_embedder": "TimestepEmbedder",
    "dec_transformer": "FlexTransformer",
    "dec_to_patches": "ToPatchesLinearHead",
}
MOVERS = {"PerSampleOp", "BlockWiseSequencePacker", "SequenceUnpacker"}


def parse_metadata(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """The six sections of a published file's metadata as nested dictionaries.

    Raises:
        WeightsError: a section is missing, or is not a Python literal.
    """
    missing = [name for name in SECTIONS if name not in metadata]
    if missing:
        raise WeightsError(
            f"{source}: its metadata lacks {', '.join(missing)}; a FlexTok file says its config there"
        )
    return {name: _literal(metadata[name], f"{source}: {name}") for name in SECTIONS}


def read_config(tree: Tree, source: str) -> dict[str, Any]:
    """What inference needs of a parsed config, checked against `TARGETS`: fields of `FlexTokConfig`.

    `vae` lacks what the shapes of the weights say.

    Raises:
        WeightsError: an unknown class path or field, or a value that this FlexTok does not have.
    """
    missing = [name for name in SECTIONS if not isinstance(tree.get(name), Mapping)]
    if missing:
        raise WeightsError(f"{source}: its config lacks {', '.join(missing)}")
    read = {name: _read(tree[name], f"{source}: {name}") for name in SECTIONS}
    for name, path in (("vae", "StableDiffusionVAE"), ("regularizer", "FSQ")):
        _expect(tree[name], path, f"{source}: {name}")
    encoder = _steps(tree["encoder"], ENCODER_STEPS, "causal_last", f"{source}: encoder")
    decoder = _steps(tree["decoder"], DECODER_STEPS, "full", f"{source}: decoder")
    grid, patches = encoder["enc_posemb_module"], decoder["dec_patches_posemb_module"]
    ordered, registers = decoder["dec_registers_posemb_module"], encoder["enc_register_module"]
    levels = _sizes(read["regularizer"]["levels"], f"{source}: regularizer.levels")
    widths = (encoder["enc_to_latents"]["dim_out"], decoder["dec_from_latents"]["dim_in"])
    _one(f"{source}: code widths", *widths, len(levels))
    _one(f"{source}: adaLN_expansion", decoder["dec_transformer"]["adaLN_expansion"], 2)
    registers_at_once = registers["n_eval"] or registers["n_max"]
    return {
        "grid": _one(f"{source}: max_sizes", grid["max_sizes"], patches["max_sizes"]),
        "patch": _one(
            f"{source}: patch_sizes",
            encoder["enc_patch_emb"]["patch_sizes"],
            decoder["dec_noise_patch_emb"]["patch_sizes"],
            decoder["dec_to_patches"]["patch_sizes"],
        ),
        "tokens": _one(
            f"{source}: registers", registers["n_max"], registers_at_once, ordered["max_sizes"]
        ),
        "levels": levels,
        "encoder": _trunk(encoder["enc_transformer"], f"{source}: enc_transformer"),
        "decoder": _trunk(decoder["dec_transformer"], f"{source}: dec_transformer"),
        "max_timestep": _number(decoder["dec_time_embedder"]["max_timestep"], source),
        "frequencies": decoder["dec_time_embedder"]["frequency_embedding_size"],
        "positions": tuple(p["posemb_type"] for p in (grid, patches, ordered)),
        "sample_posterior": bool(read["vae"]["sample_posterior"]),
        "vae": {
            "scaling_factor": _scaling(read["vae"], source),
            "autocast": _precision(read["vae"]["dtype_override"], source),
        },
    }


def _literal(text: str, where: str) -> Any:
    if len(text) > MAX_TEXT:
        raise WeightsError(f"{where} has {len(text)} characters, expected at most {MAX_TEXT}")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise WeightsError(f"{where} is not a Python literal ({type(error).__name__})") from error


def _read(node: Tree, where: str) -> dict[str, Any]:
    """The fields of one node that are read, after all its fields have been checked."""
    path = node.get("_target_")
    target = TARGETS.get(path) if isinstance(path, str) else None
    if target is None:
        raise WeightsError(f"{where} has the unknown _target_ {path!r}; known are {_known()}")
    for key, value in node.items():
        if key in target.fixed and value not in target.fixed[key]:
            values = " or ".join(map(repr, target.fixed[key]))
            raise WeightsError(f"{where} has {key} = {value!r}, this FlexTok has {values}")
        wiring = key.endswith(("_key", "_keys")) or key in ("_target_", *target.free)
        if not (wiring or key in target.fixed or key in target.read):
            raise WeightsError(f"{where} has the unknown field {key} = {value!r}")
    missing = [k for k, v in target.read.items() if v is REQUIRED and node.get(k) is None]
    if missing:
        raise WeightsError(f"{where} does not say {', '.join(missing)}")
    for child_where, child in _children(node, where):
        _read(child, child_where)
    return {key: node.get(key, default) for key, default in target.read.items()}


def _children(node: Tree, where: str) -> Iterator[tuple[str, Tree]]:
    for key, value in node.items():
        if key == "module_dict" and isinstance(value, Mapping):
            yield from (
                (f"{where}.{k}", v if isinstance(v, Mapping) else {}) for k, v in value.items()
            )
        elif isinstance(value, Mapping):
            yield f"{where}.{key}", value


def _steps(
    node: Tree, expected: Mapping[str, str], mask: str, where: str
) -> dict[str, dict[str, Any]]:
    """What each step with weights says; the steps must be ours, in our order."""
    _expect(node, "SequentialModuleDictWrapper", where)
    steps = {name: (s["_target_"], s) for name, s in node["module_dict"].items()}
    moving = {name for name, (path, _) in steps.items() if path.rpartition(".")[2] in MOVERS}
    found = [name for name in steps if name not in moving]
    if found != list(expected):
        raise WeightsError(
            f"{where} has the steps {', '.join(found)}; expected {', '.join(expected)}"
        )
    for name, kind in expected.items():
        _expect(steps[name][1], kind, f"{where}.{name}")
    for name in moving:
        said = _read(steps[name][1], f"{where}.{name}")
        if said.get("mask_mode", mask) != mask:
            raise WeightsError(
                f"{where}.{name} has mask_mode = {said['mask_mode']!r}, this FlexTok has {mask!r}"
            )
    return {name: _read(steps[name][1], f"{where}.{name}") for name in expected}


def _expect(node: Tree, kind: str, where: str) -> None:
    if node.get("_target_") != _NAMES[kind]:
        raise WeightsError(
            f"{where} has the _target_ {node.get('_target_')!r}, expected {_NAMES[kind]!r}"
        )


def _one(what: str, *said: Any) -> int:
    """The one size that all of `said`, sizes or lists of them, agree on."""
    values = [n for item in said for n in (item if isinstance(item, (list, tuple)) else [item])]
    if len(set(_sizes(values, what))) != 1:
        raise WeightsError(f"{what} are {', '.join(map(str, values))}, expected one size")
    return values[0]


def _trunk(step: Mapping[str, Any], where: str) -> tuple[int, int]:
    width, depth = _sizes((step["dim"], step["depth"]), where)
    return width, depth


def _sizes(values: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(values, (list, tuple)) and len(values) > 0
    if not whole or not all(type(n) is int and 0 < n <= MAX_SIZE for n in values):
        raise WeightsError(f"{where} is {values!r}, expected whole numbers from 1 to {MAX_SIZE}")
    return tuple(values)


def _number(value: Any, source: str) -> float:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise WeightsError(f"{source}: max_timestep is {value!r}, expected a positive number")
    return float(value)


def _scaling(vae: Mapping[str, Any], source: str) -> float:
    factor = vae["scaling_factor"]
    if isinstance(factor, (int, float)) and 0 < factor < math.inf:
        return float(factor)
    where = vae["hf_hub_path"] or "the VAE's repository"
    raise WeightsError(
        f"{source}: vae does not say scaling_factor; take it from config.json of {where} and pass "
        "the config with vae.scaling_factor set to `from_published`"
    )


def _precision(name: object, source: str) -> str | None:
    names = {None: None, "fp32": None, "float32": None}
    names |= {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
    if not isinstance(name, (str, type(None))) or name not in names:
        raise WeightsError(f"{source}: vae has dtype_override = {name!r}, which is no float type")
    return names[name]


def _known() -> str:
    return ", ".join(sorted(_NAMES))
