"""Codecs: every medium to tokens and back. Names are loaded lazily, so importing this costs nothing."""

from importlib import import_module

_HOME = {
    "Codec": "codec",
    "CodecSpec": "codec",
    "CodecUnavailable": "codec",
    "LatentCodec": "codec",
    "Part": "stream",
    "StreamError": "stream",
    "TokenStream": "stream",
    "WeightsError": "published",
    "list_codecs": "registry",
    "load_codec": "registry",
    "register_codec": "registry",
    "save_codec": "published",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
