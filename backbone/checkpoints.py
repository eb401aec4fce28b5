"""Checkpoints of the Llama family: ours, transformers' (Llama, Qwen2, Qwen3), LlamaGen's; by key.

`save_pretrained` writes a directory that `transformers.AutoModelForCausalLM` loads with the same logits, where the
model has no feature that transformers' Llama lacks; otherwise it names the feature. `save` always works: the same
directory, with our own sizes under "anytok" in config.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..codecs.published import WeightsError, load_into, read_weights, write_safetensors
from .transformer import Transformer, TransformerConfig, rotary

FORMAT = 1
# transformers' name of each of our sizes.
_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
_KINDS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class ExportError(ValueError):
    """The model has a feature that transformers' Llama family lacks; the message names it."""


def save(model: Transformer, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `path`/config.json and `path`/model.safetensors.

    Where transformers can load the model, config.json says so too.
    """
    config = {"anytok": {"format": FORMAT, "transformer": dataclasses.asdict(model.config)}}
    if not unexportable(model.config):
        config |= to_transformers(model.config)
        config["dtype"] = str(dtype or model.lm_head.weight.dtype).removeprefix("torch.")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(_tensors(model, dtype), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_pretrained(
    model: Transformer, path: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """As `save`, for `transformers.AutoModelForCausalLM`.

    Raises:
        ExportError: names the feature that transformers' Llama family lacks.
    """
    problem = unexportable(model.config)
    if problem:
        raise ExportError(f"{problem}; `save` writes it for anytok alone")
    save(model, path, dtype=dtype)


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """Load a directory that `save` wrote, or one of transformers' (one file or shards).

    Args:
        dtype: the type to run in; None for float32 where the file holds fp16, else what the file holds.

    Raises:
        WeightsError: a file is missing or damaged, or the architecture is none of ours; the message names it.
    """
    path = Path(path)
    config = config_of(path)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = dict(_read(path))
    if config.tied:
        tensors.setdefault("lm_head.weight", tensors.get("model.embed_tokens.weight", Tensor()))
    stored = next(iter(tensors.values())).dtype
    dtype = dtype or (torch.float32 if stored == torch.float16 else stored)
    tensors = {k: v.to(dtype) for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    return assigned(model, tensors, source=str(path))


def config_of(path: Path) -> TransformerConfig:
    """The sizes that `path`/config.json states."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: config.json cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise WeightsError(f"{path}: config.json is not JSON ({error})") from error
    ours = config.get("anytok")
    if ours is None:
        return from_transformers(config, source=str(path))
    if ours.get("format") != FORMAT:
        raise WeightsError(f"{path}: format {ours.get('format')!r}, this anytok reads {FORMAT}")
    return TransformerConfig(**ours["transformer"])


def unexportable(config: TransformerConfig) -> str | None:
    """The feature that keeps transformers from loading this model, or None."""
    if config.positions != "rope":
        return f"transformers' Llama has rotary 1-D positions, this model has {config.positions!r}"
    if config.classes or config.features is not None:
        return "transformers' Llama has no condition before the sequence, this model has one"
    if config.qkv_bias and config.qk_norm:
        return "transformers has qkv_bias (Qwen2) or qk_norm (Qwen3), this model has both"
    return None


def to_transformers(config: TransformerConfig) -> dict[str, object]:
    """transformers' config.json."""
    kind = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    return {
        "model_type": kind,
        "architectures": [_KINDS[kind]],
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
        "head_dim": config.head_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "rope_theta": config.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def from_transformers(config: Mapping, *, source: str) -> TransformerConfig:
    """Our sizes from transformers' config.json; features that we lack are refused by name."""
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise WeightsError(f"{source}: model_type is {kind!r}, expected one of {', '.join(_KINDS)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        f"rope scaling {scaling!r}": scaling != "default",
        "sliding windows": bool(config.get("use_sliding_window")),
        "a bias on o_proj": bool(config.get("attention_bias")),
        "biases in the feed-forward part": bool(config.get("mlp_bias")),
        f"the activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
    }
    for feature, present in refused.items():
        if present:
            raise WeightsError(f"{source}: {feature} is not supported")
    sizes = {ours: config[theirs] for ours, theirs in _NAMES.items() if theirs in config}
    sizes.setdefault("kv_heads", config["num_attention_heads"])
    return TransformerConfig(
        **sizes,
        head_width=config.get("head_dim"),
        theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def from_llamagen(
    tensors: Mapping[str, Tensor], *, heads: int, grid: tuple[int, int], source: str = "LlamaGen"
) -> Transformer:
    """A LlamaGen checkpoint (c2i or t2i). The file does not say how many heads, nor the grid.

    Its vocabulary is the image codes alone; the condition stands before the sequence (`model.cls_embedding`).
    """
    tensors = {k: v for k, v in tensors.items() if not k.endswith(("_cache", "freqs_cis"))}
    labels = tensors.get("cls_embedding.embedding_table.weight")
    captions = tensors.get("cls_embedding.uncond_embedding")
    vocab_size, width = tensors["tok_embeddings.weight"].shape
    prefix = 1 if captions is None else len(captions)
    config = TransformerConfig(
        vocab_size=vocab_size,
        width=width,
        ffn=len(tensors["layers.0.feed_forward.w1.weight"]),
        layers=1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("layers.")),
        heads=heads,
        kv_heads=heads,
        context=prefix + grid[0] * grid[1],
        positions="rope2d",
        grid=grid,
        prefix=prefix,
        classes=0 if labels is None else len(labels) - 1,
        features=None if captions is None else (captions.shape[0], captions.shape[1]),
    )
    with torch.device("meta"):
        model = Transformer(config)
    return assigned(model, dict(_llama_names(tensors)), source=source)


def assigned(model: Transformer, tensors: dict[str, Tensor], *, source: str) -> Transformer:
    """A model from the meta device, with these tensors as its parameters (nothing is copied)."""
    wanted = model.state_dict()
    whole = {k: v for k, v in tensors.items() if k in wanted and v.shape == wanted[k].shape}
    if len(whole) != len(wanted) or len(whole) != len(tensors):
        load_into(model, tensors, source=source)  # says what is wrong
    model.load_state_dict(whole, assign=True)
    if model.config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rotary = rotary(model.config)
    return model.eval()


def _llama_names(tensors: Mapping[str, Tensor]):
    """LlamaGen's names to Llama's. q, k, v split by rows; the pairs stay interleaved, so no permutation."""
    ends = {
        "attention.wo.weight": "self_attn.o_proj.weight",
        "feed_forward.w1.weight": "mlp.gate_proj.weight",
        "feed_forward.w3.weight": "mlp.up_proj.weight",
        "feed_forward.w2.weight": "mlp.down_proj.weight",
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    }
    whole = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for key, tensor in tensors.items():
        if key.startswith("layers."):
            _, layer, end = key.split(".", 2)
            stem = f"model.layers.{layer}"
            if end == "attention.wqkv.weight":
                for name, part in zip("qkv", tensor.chunk(3)):
                    yield f"{stem}.self_attn.{name}_proj.weight", part
            else:
                yield f"{stem}.{ends.get(end, end)}", tensor
        elif key.startswith("cls_embedding."):
            yield f"model.{key}", tensor
        else:
            yield whole.get(key, key), tensor


def _tensors(model: Transformer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    if model.config.tied:
        del tensors["lm_head.weight"]
    return {k: v.clone() for k, v in tensors.items()}


def _read(path: Path):
    """Name and tensor, file by file, so that shards are never in memory twice."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(p.name for p in path.glob("pytorch_model*.bin"))
        if not names:
            raise WeightsError(
                f"{path}: holds no model.safetensors, no shards of it and no pytorch_model.bin"
            )
    for name in names:
        if name.endswith(".bin"):
            yield from read_weights(path / name).tensors.items()
            continue
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path / name}: not a whole safetensors file ({error})") from error
