"""Names: one explicit table of every codec, its module, its files, its licences, and what the files do not say.

Each module in `SYSTEMS` has one function, `build(files, entry) -> Codec`:
`files` maps a role ("weights" where there is one file) to `Weights`; `entry.config` is what the files do not say.
A file that `save_codec` wrote says everything, so any path to one loads too.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .codec import Codec, CodecUnavailable, UnknownCodec, fingerprint
from .published import FORMAT, File, Weights, WeightsError, check_hash, find, read_weights

Factory = Callable[[str | Path | None], Codec]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row: how a name becomes a codec.

    Args:
        system: the key in `SYSTEMS`.
        modality: what it codes.
        files: role -> published file; {} for codecs without weights.
        config: values that the files do not say, or all of them for our own files.
        code_licence, weights_licence: of the published work (ours is Apache-2.0).
        about: one line for `anytok codecs`.
    """

    system: str
    modality: str
    name: str = ""
    files: Mapping[str, File] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    code_licence: str = "Apache-2.0"
    weights_licence: str = "Apache-2.0"
    about: str = ""


# system -> module below anytok.codecs
SYSTEMS: dict[str, str] = {
    "text": "text",
    "onedpiece": "image.onedpiece",
    "titok": "image.titok",
    "flextok": "image.flextok",
    "kl16": "image.kl16",
    "patches": "image.patches",
    "tokenbridge": "image.tokenbridge",
    "gigatok": "image.gigatok",
    "llamagen": "image.llamagen",
    "rqvae": "image.rqvae",
    "dac": "audio.dac",
    "rvq": "audio.rvq_mini",
    "cosyvoice": "audio.cosyvoice.codec",
    "cosyvoice-s3": "audio.cosyvoice.s3",
    "encodec": "audio.encodec",
    "cvivit": "video.cvivit",
    "octgpt": "shape.octgpt",
}


def _mini(system: str, modality: str, name: str, about: str) -> Entry:
    asset = f"{name.replace('/', '-')}.safetensors"
    return Entry(
        system=system,
        modality=modality,
        files={"weights": File(name=asset, asset=asset)},
        about=about,
    )


CODECS: dict[str, Entry] = {
    "text/bytes": Entry(system="text", modality="text", about="UTF-8 bytes, no weights"),
    **{
        f"onedpiece/{size}-256": Entry(
            system="onedpiece",
            modality="image",
            files={
                "weights": File(
                    name="pytorch_model.bin",
                    repo=f"turing-motors/One-D-Piece-{size.upper()}-256",
                    alternatives=(f"one-d-piece_{size}256.bin",),
                )
            },
            weights_licence="unknown (see the hub card)",
            about=f"1-256 ordered tokens, 256x256, ViT-{size.upper()}",
        )
        for size in "sbl"
    },
    **{
        f"titok/{variant}": Entry(
            system="titok",
            modality="image",
            files={
                "weights": File(
                    name="model.safetensors",
                    repo=f"yucornetto/tokenizer_titok_{hub}_imagenet",
                    alternatives=("pytorch_model.bin", f"tokenizer_titok_{hub}.bin"),
                )
            },
            weights_licence="Apache-2.0 (hub tag; research only says the README)",
            about=about,
        )
        for variant, hub, about in (
            ("l-32", "l32", "32 tokens, 256x256"),
            ("b-64", "b64", "64 tokens, 256x256"),
            ("s-128", "s128", "128 tokens, 256x256"),
            ("bl-64", "bl64_vq8k", "64 tokens of 8,192 codes, 256x256"),
            ("bl-128", "bl128_vq8k", "128 tokens of 8,192 codes, 256x256"),
            ("sl-256", "sl256_vq8k", "256 tokens of 8,192 codes, 256x256"),
            ("ll-32-vae", "ll32_vae_c16", "32 Gaussian latents, no tokens"),
            ("bl-64-vae", "bl64_vae_c16", "64 Gaussian latents, no tokens"),
            ("bl-128-vae", "bl128_vae_c16", "128 Gaussian latents, no tokens"),
        )
    },
    "kl16/mar": Entry(
        system="kl16",
        modality="image",
        files={
            "weights": File(
                name="kl16.ckpt",
                url="https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt"
                "?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=0",
                wrapper="model",
                alternatives=("vae/kl16.ckpt",),
            )
        },
        code_licence="MIT",
        weights_licence="MIT",
        about="16 Gaussian latents for 16x16 pixels, no tokens; TokenBridge's and xAR's VAE",
    ),
    **{
        f"tokenbridge/kl16-{bits}bit": Entry(
            system="tokenbridge",
            modality="image",
            files={
                "weights": File(
                    name="vae/kl16.ckpt",
                    repo="Epiphqny/TokenBridge",
                    wrapper="model",
                    alternatives=("kl16.ckpt",),
                )
            },
            config={"bits": bits},
            code_licence="MIT",
            weights_licence="MIT (the VAE is LTH14/mar's; see the hub card)",
            about=f"256 positions of 16 codes of {bits} bits, 256x256",
        )
        for bits in (4, 5, 6, 7, 8, 10)
    },
    **{
        f"gigatok/{variant}": Entry(
            system="gigatok",
            modality="image",
            files={
                "weights": File(
                    name=f"{file}.pt", url=f"https://drive.google.com/file/d/{drive}/view"
                )
            },
            code_licence="MIT",
            weights_licence="unknown (the repository, MIT, links them without a word)",
            about=f"256 tokens, 256x256, {about}",
        )
        for variant, file, drive, about in (
            ("s-s", "VQ_SS256_e100", "1Q_WHCT6mdNnu0GkHCm0CbXaP6kFeTe5h", "136M"),
            ("s-b", "VQ_SB256_e200", "17K-h2Jwep53RUEf6CEOV3ro7Cz_DaIWC", "232M"),
            ("b-l", "VQ_BL256_e200", "1VnBu4aj0N7lFa1_wKBdTgLNZmaNgFvwi", "622M"),
            (
                "b-l-dino",
                "VQ_BL256_dino_disc",
                "11bXyg6y15hIWYnIsl7YbwDtRAJMK7jjn",
                "622M, DINO discriminator",
            ),
            ("xl-xxl", "VQ_XLXXL256_e300", "1HK_bV_zklLfGmIHGE4gMwjfhLLKi6Z3G", "2.9B"),
        )
    },
    **{
        f"llamagen/{variant}": Entry(
            system="llamagen",
            modality="image",
            files={"weights": File(name=f"{variant.replace('-', '_')}.pt", repo=repo)},
            code_licence="MIT",
            weights_licence="MIT",
            about=about,
        )
        for variant, repo, about in (
            ("vq-ds16-c2i", "FoundationVision/LlamaGen", "one id for 16x16 pixels"),
            ("vq-ds16-t2i", "peizesun/llamagen_t2i", "one id for 16x16 pixels, text to image"),
            ("vq-ds8-c2i", "FoundationVision/LlamaGen", "one id for 8x8 pixels"),
        )
    },
    "rqvae/imagenet-8x8x4": Entry(
        system="rqvae",
        modality="image",
        files={
            "weights": File(
                name="stage1/model.pt",
                url="https://arena.kakaocdn.net/brainrepo/models/RQVAE/"
                "6714b47bb9382076923590eff08b1ee5/imagenet_1.4B_rqvae_50e.tar.gz",
                alternatives=("imagenet_1.4B_rqvae_50e/stage1/model.pt",),
            )
        },
        weights_licence="CC-BY-NC-SA-4.0",
        about="8x8 positions, 4 codes deep, 256x256",
    ),
    **{
        f"flextok/{variant}": Entry(
            system="flextok",
            modality="image",
            files={
                "weights": File(
                    name="model.safetensors",
                    repo=f"EPFL-VILAB/flextok_{variant.replace('-', '_')}",
                    alternatives=(f"flextok_{variant.replace('-', '_')}.safetensors",),
                )
            },
            code_licence="Apple sample code licence 1.1 (non-commercial); ours is independent",
            weights_licence="Apple ML research model licence: research only, with attribution",
            about=f"1-256 ordered tokens, 256x256, flow decoder, {data}",
        )
        for variant, data in (
            ("d12-d12-in1k", "ImageNet"),
            ("d18-d18-in1k", "ImageNet"),
            ("d18-d28-in1k", "ImageNet"),
            ("d18-d28-dfn", "DFN"),
        )
    },
    "onedpiece/mini": _mini("onedpiece", "image", "onedpiece/mini", "1-224 ordered tokens, 64x64"),
    **{
        f"dac/{variant}": Entry(
            system="dac",
            modality="audio",
            files={
                "weights": File(
                    name="model.safetensors" if repo else file,
                    repo=repo,
                    url=f"github.com/descriptinc/descript-audio-codec, release {release}",
                    alternatives=(file,),
                )
            },
            config={"sample_rate": rate},
            code_licence="MIT",
            weights_licence="MIT",
            about=about,
        )
        for variant, rate, repo, release, file, about in (
            (
                "44khz",
                44_100,
                "descript/dac_44khz",
                "0.0.1",
                "weights.pth",
                "9 codes, 86 Hz, 8 kbit/s",
            ),
            (
                "44khz-16kbps",
                44_100,
                None,
                "1.0.0",
                "weights_44khz_16kbps.pth",
                "18 codes, 86 Hz, 16 kbit/s",
            ),
            (
                "24khz",
                24_000,
                "descript/dac_24khz",
                "0.0.4",
                "weights_24khz.pth",
                "32 codes, 75 Hz",
            ),
            (
                "16khz",
                16_000,
                "descript/dac_16khz",
                "0.0.5",
                "weights_16khz.pth",
                "12 codes, 50 Hz",
            ),
        )
    },
    **{
        f"encodec/{variant}": Entry(
            system="encodec",
            modality="audio",
            files={
                "weights": File(
                    name="model.safetensors",
                    repo=f"facebook/encodec_{variant}",
                    wrapper="best_state",
                    alternatives=alternatives,
                )
            },
            config=config,
            code_licence="MIT",
            weights_licence=licence,
            about=about,
        )
        for variant, alternatives, config, licence, about in (
            (
                "24khz",
                ("encodec_24khz-d7cc33bc.th",),
                {"sample_rate": 24_000},
                "MIT package; see the hub card",
                "32 codes, 75 Hz, causal",
            ),
            (
                "48khz",
                ("encodec_48khz-7e698e3e.th",),
                {"sample_rate": 48_000, "causal": False, "segment": 1.0, "normalize": True},
                "MIT package; see the hub card",
                "stereo, 16 codes, 150 Hz",
            ),
            (
                "32khz",
                ("compression_state_dict.bin",),
                {"sample_rate": 32_000, "causal": False, "padding": "constant"},
                "CC-BY-NC-4.0",
                "MusicGen's, 4 codes, 50 Hz",
            ),
        )
    },
    "rvq/mini": _mini(
        "rvq", "audio", "rvq/mini", "16 kHz speech, 1-12 residual codes at 50 Hz, 0.5-6 kbit/s"
    ),
    **{
        f"cosyvoice/s3-{variant}": Entry(
            system="cosyvoice-s3",
            modality="audio",
            files={"weights": file},
            config=config,
            weights_licence="Apache-2.0 (model card; for academic purposes, says the README)",
            about=f"{tokens} speech tokens a second of {codes}; encodes only",
        )
        for variant, file, config, tokens, codes in (
            (
                "v1",
                File(
                    name="speech_tokenizer_v1.onnx",
                    repo="FunAudioLLM/CosyVoice-300M",
                    sha256="23b5a723",
                    alternatives=("speech_tokenizer_v1.pt",),
                ),
                {"version": "v1", "rate": 50},
                50,
                "4,096",
            ),
            (
                "v1-25hz",
                File(
                    name="speech_tokenizer_v1.onnx",
                    url="https://www.modelscope.cn/models/iic/CosyVoice-300M-25Hz",
                    sha256="56285ddd",
                    alternatives=("speech_tokenizer_v1_25hz.onnx", "speech_tokenizer_v1.pt"),
                ),
                {"version": "v1", "rate": 25},
                25,
                "4,096",
            ),
            (
                "v2",
                File(
                    name="speech_tokenizer_v2.onnx",
                    repo="FunAudioLLM/CosyVoice2-0.5B",
                    sha256="d43342aa",
                    alternatives=("speech_tokenizer_v2.pt",),
                ),
                {"version": "v2"},
                25,
                "6,561",
            ),
            (
                "v3",
                File(
                    name="speech_tokenizer_v3.onnx",
                    repo="FunAudioLLM/Fun-CosyVoice3-0.5B-2512",
                    sha256="23236a74",
                    alternatives=("speech_tokenizer_v3.pt",),
                ),
                {"version": "v3"},
                25,
                "6,561",
            ),
        )
    },
    **{
        f"cosyvoice/{variant}": Entry(
            system="cosyvoice",
            modality="audio",
            files={
                role: File(
                    name=name,
                    repo=where if "://" not in where else None,
                    url=where if "://" in where else None,
                    alternatives=(f"{name.rsplit('.', 1)[0]}.pt",) if "onnx" in name else (),
                )
                for role, name in (
                    ("tokenizer", f"speech_tokenizer_{version}.onnx"),
                    ("speaker", "campplus.onnx"),
                    ("flow", "flow.pt"),
                    ("vocoder", "hift.pt"),
                )
            },
            config={"version": version, "rate": rate},
            weights_licence="Apache-2.0 (model card; for academic purposes, says the README)",
            about=f"speech to {rate} tokens a second and back in any voice{about}",
        )
        for variant, version, rate, where, about in (
            ("v1", "v1", 50, "FunAudioLLM/CosyVoice-300M", ", 22 kHz"),
            ("v1-sft", "v1", 50, "FunAudioLLM/CosyVoice-300M-SFT", ", 22 kHz, with speakers"),
            ("v1-instruct", "v1", 50, "FunAudioLLM/CosyVoice-300M-Instruct", ", 22 kHz"),
            (
                "v1-25hz",
                "v1",
                25,
                "https://www.modelscope.cn/models/iic/CosyVoice-300M-25Hz",
                ", 22 kHz",
            ),
            ("v2", "v2", 25, "FunAudioLLM/CosyVoice2-0.5B", ", 24 kHz, streams"),
            ("v3", "v3", 25, "FunAudioLLM/Fun-CosyVoice3-0.5B-2512", ", 24 kHz, streams"),
        )
    },
    "cvivit/mini": _mini("cvivit", "video", "cvivit/mini", "C-ViViT, causal in time, 64x64"),
    "cvivit/obvious": Entry(
        system="cvivit",
        modality="video",
        files={
            "weights": File(
                name="CVIVIT/pytorch_model.bin",
                repo="obvious-research/phenaki-cvivit",
                alternatives=("pytorch_model.bin",),
            )
        },
        config={"size": [128, 128], "fps": 8.0, "fit": "crop"},
        code_licence="Unlicense",
        weights_licence="unknown (see the hub card)",
        about="C-ViViT trained on WebVid, 11 frames of 128x128, looks both ways in time",
    ),
    **{
        f"octgpt/{variant}": Entry(
            system="octgpt",
            modality="shape",
            files={"weights": File(name=f"vqvae_large_{hub}_bsq32.pth", repo="wst2001/OctGPT")},
            config={"full_depth": 3},
            code_licence="MIT (file headers; the repository has no licence file)",
            weights_licence="unknown (see the hub card)",
            about=about,
        )
        for variant, hub, about in (
            ("large", "im5_uncond", "256^3 octree, 32 code bits, five ShapeNet classes"),
            ("large-category", "im5_cond", "256^3 octree, 32 code bits, for the category model"),
            ("large-objaverse", "objv", "256^3 octree, 32 code bits, Objaverse"),
            ("large-room", "room", "256^3 octree, 32 code bits, synthetic rooms"),
        )
    },
    "octgpt/mini": _mini("octgpt", "shape", "octgpt/mini", "octree split bits and BSQ codes"),
}

_THIRD_PARTY: dict[str, Factory] = {}


def register_codec(name: str, factory: Factory) -> None:
    """Add a codec of your own: `factory(path)` returns it; `path` is what the caller gave `load_codec`, or None.

    Raises:
        ValueError: the name is not `system/variant`, or is taken.
    """
    system, _, variant = name.partition("/")
    if not system or not variant or "|" in name or "@" in name:
        raise ValueError(f"codec name is {name!r}, expected 'system/variant'")
    if name in CODECS or name in _THIRD_PARTY:
        raise ValueError(f"there is a codec '{name}' already")
    _THIRD_PARTY[name] = factory


def list_codecs(pattern: str = "*") -> list[str]:
    """All names that match a pattern such as `onedpiece/*`, sorted."""
    return sorted(fnmatch.filter([*CODECS, *_THIRD_PARTY], pattern))


def entry(name: str) -> Entry | None:
    """The table's row of `name`; None for a codec that a third party registered."""
    return None if name in _THIRD_PARTY else replace(CODECS[_known(name)], name=name)


def load_codec(
    name_or_path: str | Path,
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Codec:
    """Load a codec by name, or from a file that `save_codec` wrote.

    Args:
        name_or_path: `system/variant` (see `list_codecs()`), or the path of a saved codec.
        path: the folder or file of the published weights, where they are not to come from the hub.
        device: where the weights go.
        dtype: the floating type to run in; quantisers keep float32 where the published code does.

    Raises:
        UnknownCodec: an unknown name (a ValueError too); the message offers the nearest.
        CodecUnavailable: the weights cannot be had here; the message says where they are.
        WeightsError: the weights are another model's or damaged.
    """
    name = str(name_or_path)
    if name in _THIRD_PARTY:
        codec = _THIRD_PARTY[name](path)
    elif name not in CODECS and Path(name_or_path).is_file():
        codec = _from_saved(Path(name_or_path))
    else:
        codec = _from_table(_known(name), path)
    return codec.to(device=device, dtype=dtype).eval()


def _from_table(name: str, path: str | Path | None) -> Codec:
    row = replace(CODECS[name], name=name)
    files: dict[str, Weights] = {}
    for role, file in row.files.items():
        where = find(file, path)
        if file.sha256 and path is None:
            check_hash(where, file.sha256)
        files[role] = read_weights(where, wrapper=file.wrapper)
    ours = files["weights"].config if "weights" in files else {}
    if ours:
        row = replace(row, config=_checked(ours, files["weights"].source)["config"])
    return _build(row, files)


def _from_saved(path: Path) -> Codec:
    weights = read_weights(path)
    header = weights.config
    if not header:
        raise WeightsError(
            f"{path}: no anytok header; published files load by name: load_codec('system/variant', path=...)"
        )
    header = _checked(header, str(path))
    row = Entry(
        system=header["system"],
        modality="",
        name=header["name"],
        config=header["config"],
        weights_licence=header.get("weights_licence", "unknown"),
    )
    return _build(row, {"weights": weights})


def _checked(header: dict, source: str) -> dict:
    if header.get("format") != FORMAT:
        raise WeightsError(f"{source}: format {header.get('format')!r}, this anytok reads {FORMAT}")
    missing = {"system", "name", "config"} - set(header)
    if missing:
        raise WeightsError(f"{source}: the anytok header lacks {', '.join(sorted(missing))}")
    if header["system"] not in SYSTEMS:
        raise WeightsError(f"{source}: unknown system {header['system']!r}")
    return header


def _build(row: Entry, files: dict[str, Weights]) -> Codec:
    module = importlib.import_module(f"{__package__}.{SYSTEMS[row.system]}")
    codec = module.build(files, row)
    if files:
        codec._fingerprint = fingerprint(
            {
                f"{role}:{key}": t
                for role, weights in files.items()
                for key, t in weights.tensors.items()
            }
        )
    return codec


def _known(name: str) -> str:
    if name in CODECS:
        return name
    near = difflib.get_close_matches(name, list_codecs(), n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    raise UnknownCodec(f"unknown codec {name!r}{hint} (all: list_codecs())")


def describe(name: str) -> str:
    """One JSON line about a codec, for `anytok codecs --json`."""
    row = entry(name)
    if row is None:
        return json.dumps({"name": name, "registered": "by a third party"})
    return json.dumps(
        {
            "name": name,
            "modality": row.modality,
            "code_licence": row.code_licence,
            "weights_licence": row.weights_licence,
            "about": row.about,
            "files": [f.asset or f.repo or f.url for f in row.files.values()],
        }
    )


__all__ = [
    "CODECS",
    "SYSTEMS",
    "CodecUnavailable",
    "Entry",
    "describe",
    "entry",
    "list_codecs",
    "load_codec",
    "register_codec",
]
