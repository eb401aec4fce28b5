"""anytok: any medium in, one discrete token stream in the middle, any medium out.

Everything here is loaded when it is first used, so `import anytok` is quick and silent.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AnyToAny": "generators.pipeline",
    "Audio": "modalities.audio",
    "Image": "modalities.image",
    "MediaError": "modalities.errors",
    "Shape": "modalities.shape",
    "StreamError": "codecs.stream",
    "Text": "modalities.text",
    "TokenStream": "codecs.stream",
    "Video": "modalities.video",
    "list_codecs": "codecs.registry",
    "load_codec": "codecs.registry",
    "register_codec": "codecs.registry",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
