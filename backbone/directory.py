"""Model directories: everything that an any-to-any model needs beside its codecs, written down.

config.json         sizes (transformers reads them too, where it can), and under "anytok": format, name, version,
                    codecs (modality -> name@fingerprint), pairs (what it was trained to write from what),
                    generation defaults
model.safetensors   weights, Llama's names; where codes are grounded (`grounded.py`), the maps in place of their rows:
                    "anytok.grounded" names the modality, and its codec is loaded with the model
vocabulary.json     the vocabulary, and each codec's rule
tokenizer.json      of the text, where it is not bytes
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..codecs.codec import Codec
from ..codecs.published import WeightsError, load_into, read_weights, write_safetensors
from ..codecs.registry import load_codec
from ..codecs.text import TextCodec
from . import checkpoints
from .grounded import Grounded, Grounding
from .interleave import Interleaver
from .transformer import Transformer, TransformerConfig


class ModelError(ValueError):
    """A model directory is damaged, or asks for a codec that is not the one here; names file, codec and remedy."""


@dataclass(kw_only=True)
class Model:
    """A transformer with its vocabulary and its codecs.

    Args:
        text: the codec of text.
        pairs: (read, write) modalities that it was trained on.
        generation: defaults of sampling, by written modality.
        codecs: the other modalities' codecs, loaded so far.
        grounded: what `transformer` was folded from, where its codes are grounded.
    """

    name: str
    transformer: Transformer
    interleaver: Interleaver
    text: TextCodec
    pairs: tuple[tuple[str, str], ...]
    generation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    codecs: dict[str, Codec] = field(default_factory=dict)
    grounded: Grounded | None = None

    def codec(self, modality: str) -> Codec:
        """The codec of a modality, loaded when first asked for.

        Raises:
            ValueError: the model knows no such modality.
            ModelError: the codec of that name has other weights than the model was trained with.
        """
        rule = self.interleaver.rule(modality)
        if modality == "text":
            return self.text
        if modality not in self.codecs:
            self.codecs[modality] = load_codec(rule.name)
        codec = self.codecs[modality]
        if codec.identity != rule.codec:
            raise ModelError(
                f"model '{self.name}' was trained with codec '{rule.codec}', here '{codec.identity}' is loaded; "
                f"their codes mean different things: load the other weights, or tokenise and train again"
            )
        return codec


def save_model(model: Model, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the directory `path`.

    Args:
        dtype: what floating weights are stored as.
    """
    from .. import __version__

    path = Path(path)
    if model.grounded is None:
        checkpoints.save(model.transformer, path, dtype=dtype)
        config = _json(path / "config.json")
    else:
        config = _save_grounded(model.grounded, path, dtype)
    config["anytok"] |= {
        "name": model.name,
        "version": __version__,
        "codecs": {m: rule.codec for m, rule in model.interleaver.rules.items()},
        "pairs": [list(pair) for pair in model.pairs],
        "generation": dict(model.generation),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    text = json.dumps(model.interleaver.to_json(), indent=1)
    (path / "vocabulary.json").write_text(text + "\n")
    if model.text.config.tokenizer is not None:
        (path / "tokenizer.json").write_text(model.text.config.tokenizer)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    codecs: Mapping[str, Codec] | None = None,
) -> Model:
    """Read a directory that `save_model` wrote; codecs are loaded by name when they are needed.

    Args:
        codecs: codecs by modality that are loaded already, or that no name finds.

    Raises:
        WeightsError: weights or config are missing or damaged.
        ModelError: the vocabulary does not fit the weights, or the tokenizer is another one.
    """
    path = Path(path)
    about = _json(path / "config.json").get("anytok", {})
    if "codecs" not in about:
        raise ModelError(
            f"{path} holds a transformer without a vocabulary; load it with `checkpoints.load`"
        )
    interleaver = Interleaver.from_json(_json(path / "vocabulary.json"))
    config = checkpoints.config_of(path)
    size = interleaver.vocabulary.size
    if size != config.vocab_size:
        raise ModelError(
            f"{path}: vocabulary.json has {size} ids, the weights have {config.vocab_size}"
        )
    file = path / "tokenizer.json"
    name = interleaver.rule("text").name
    text = TextCodec.from_file(file, name=name) if file.is_file() else TextCodec(name=name)
    if text.identity != interleaver.rule("text").codec:
        raise ModelError(
            f"{file} is '{text.identity}', the model was trained with '{interleaver.rule('text').codec}'"
        )
    model = Model(
        name=about["name"],
        transformer=None,  # type: ignore[arg-type]  # a grounded one needs the codec, which the model checks
        interleaver=interleaver,
        text=text,
        pairs=tuple((read, write) for read, write in about["pairs"]),
        generation=about["generation"],
        codecs=dict(codecs or {}),
    )
    if "grounded" in about:
        model.grounded = _load_grounded(model, about["grounded"], path, config)
        model.transformer = model.grounded.folded().to(dtype=dtype or torch.float32)
    else:
        model.transformer = checkpoints.load(path, dtype=dtype)
    return model


def _save_grounded(grounded: Grounded, path: Path, dtype: torch.dtype | None) -> dict:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", dtype).clone() for k, v in grounded.state_dict().items()}
    del tensors["transformer.lm_head.weight"]  # tied
    write_safetensors(tensors, path / "model.safetensors", {"format": "pt"})
    about = {
        "format": checkpoints.FORMAT,
        "transformer": dataclasses.asdict(grounded.config),
        "grounded": grounded.modality,
    }
    return {"anytok": about}


def _load_grounded(model: Model, modality: str, path: Path, config: TransformerConfig) -> Grounded:
    grounding = Grounding.of(model.interleaver, model.codec(modality))
    grounded = Grounded(config, grounding)
    weights = read_weights(path / "model.safetensors")
    tensors = {k: v.float() for k, v in weights.tensors.items()}
    rows = tensors.get("transformer.model.embed_tokens.weight")
    if rows is not None:
        tensors["transformer.lm_head.weight"] = rows
    load_into(grounded, tensors, source=weights.source)
    return grounded.eval()


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error})") from error
