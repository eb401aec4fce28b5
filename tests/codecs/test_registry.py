"""Names, weights files, the hub, and codecs of third parties."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anytok.codecs import (
    Codec,
    CodecSpec,
    CodecUnavailable,
    StreamError,
    WeightsError,
    list_codecs,
    load_codec,
    register_codec,
    registry,
)
from anytok.codecs.codec import fingerprint, item_rngs
from anytok.codecs.layout import Fixed
from anytok.codecs.published import File, check_hash, find, load_into, read_weights
from anytok.modalities import Text


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    width: int = 2


class Toy(Codec):
    """Four bits of a tensor: the smallest codec there is."""

    system = "toy"

    def __init__(self, config=None, name="toy/bits"):
        super().__init__()
        self.config = config or ToyConfig()
        self.linear = nn.Linear(self.config.width, 1)
        self.spec = CodecSpec(name=name, modality="image", vocab=((2,),), layout=Fixed(4))

    def encode(self, media, *, options=None, rng=None):
        return [self.stream((m > 0).long()) for m in media]

    def decode(self, streams, *, options=None, rng=None):
        for s in streams:
            self.check(s)
        return [s.codes[:, 0] * 2.0 - 1 for s in streams]


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_THIRD_PARTY", {})


def test_a_third_party_codec_is_used_like_ours(clean_registry):
    register_codec("toy/bits", lambda path: Toy())
    assert "toy/bits" in list_codecs("toy/*")
    codec = load_codec("toy/bits")
    (stream,) = codec.encode([torch.tensor([1.0, -1, 1, 1])])
    assert stream.codec == codec.identity
    assert codec.decode([stream])[0].tolist() == [1, -1, 1, 1]
    with pytest.raises(ValueError, match="already"):
        register_codec("toy/bits", lambda path: Toy())
    with pytest.raises(ValueError, match="system/variant"):
        register_codec("toybits", lambda path: Toy())


def test_streams_of_another_codec_are_refused():
    a, b = Toy(), Toy()
    (stream,) = a.encode([torch.ones(4)])
    with pytest.raises(StreamError, match=f"'{a.identity}', decode needs '{b.identity}'"):
        b.decode([stream])
    with pytest.raises(StreamError, match="has 3 positions, expected 4"):
        a.stream(torch.ones(3, dtype=torch.long))


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'onedpiece/mini'"):
        load_codec("onedpeice/mini")


def test_every_row_names_a_module_that_builds():
    import importlib

    for name, row in registry.CODECS.items():
        assert name.count("/") == 1
        assert row.system in registry.SYSTEMS, name
        module = importlib.import_module(f"anytok.codecs.{registry.SYSTEMS[row.system]}")
        assert callable(module.build), name
        for file in row.files.values():
            assert file.asset or file.repo or file.url, f"{name}: nowhere to get {file.name}"
        json.loads(registry.describe(name))


def test_bytes_codec_round_trip():
    codec = load_codec("text/bytes")
    texts = [Text("a red apple"), Text("Öl, 油, 🦉")]
    assert codec.decode(codec.encode(texts)) == texts
    with pytest.raises(StreamError, match="empty"):
        codec.encode([Text("")])


def test_weights_files(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    torch.save({"model": {"a": torch.zeros(3)}, "ema": tensors, "epoch": 3}, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.bin", "x.pth"):
        read = read_weights(tmp_path / name)
        assert read.tensors["a"].equal(tensors["a"]), name
    assert read_weights(tmp_path / "x.pth", wrapper="model").tensors["a"].sum() == 0


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"PK\x03\x04" + bytes(40), bytes(8) + b"{" + bytes(30)]
)
def test_unreadable_weights(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pt"):
        read_weights(tmp_path / "w.pt")


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1)}, "args": Evil()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="not a file of tensors"):
        read_weights(tmp_path / "w.pt")
    assert "executed" not in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "n.pt")
    with pytest.raises(WeightsError, match="no tensors found; keys are epoch"):
        read_weights(tmp_path / "n.pt")


def test_strict_loading_lists_what_is_wrong():
    given = {"weight": torch.ones(1, 3), "bogus": torch.ones(1), "loss.x": torch.ones(1)}
    with pytest.raises(WeightsError) as caught:
        load_into(nn.Linear(2, 1), given, source="file.pt", ignore=("loss.",))
    message = str(caught.value)
    for part in (
        "file.pt",
        "missing (1): bias",
        "unexpected (1): bogus",
        "weight is (1, 3), expected (1, 2)",
    ):
        assert part in message
    assert "loss.x" not in message


def test_saved_codecs_load_by_path(tmp_path, monkeypatch, clean_registry):
    import sys
    import types

    from anytok.codecs import save_codec

    module = types.ModuleType("anytok.codecs.toy_module")

    def build(files, entry):
        toy = Toy(ToyConfig(**entry.config), name=entry.name)
        load_into(toy, files["weights"].tensors, source=files["weights"].source)
        return toy

    module.build = build
    monkeypatch.setitem(sys.modules, "anytok.codecs.toy_module", module)
    monkeypatch.setitem(registry.SYSTEMS, "toy", "toy_module")
    toy = Toy(ToyConfig(width=5))
    save_codec(toy, tmp_path / "toy.safetensors", name="toy/mine", about={"steps": 3})
    back = load_codec(tmp_path / "toy.safetensors")
    assert back.spec.name == "toy/mine"
    assert back.linear.weight.equal(toy.linear.weight)
    assert back.fingerprint == load_codec(tmp_path / "toy.safetensors").fingerprint
    save_file({"linear.weight": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="no anytok header"):
        load_codec(tmp_path / "foreign.safetensors")


def test_files_are_found_in_folders_and_on_the_hub(tmp_path, monkeypatch):
    file = File(name="weights.bin", repo="someone/something", alternatives=("other.bin",))
    with pytest.raises(WeightsError, match=r"holds none of weights\.bin, other\.bin"):
        find(file, tmp_path)
    with pytest.raises(WeightsError, match="no such file or folder"):
        find(file, tmp_path / "nowhere")
    (tmp_path / "other.bin").write_bytes(b"x")
    assert find(file, tmp_path) == tmp_path / "other.bin"
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / "other.bin")
    )
    assert find(file) == tmp_path / "other.bin"

    def offline(repo, name):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(CodecUnavailable, match="pass path="):
        find(file)
    nowhere = File(name="kl16.ckpt", url="a drive", sha256="abcd")
    with pytest.raises(CodecUnavailable, match="a drive, sha256 abcd"):
        find(nowhere)
    with pytest.raises(WeightsError, match="the published file has abcd"):
        check_hash(tmp_path / "other.bin", "abcd")


def test_fingerprints_see_every_bit():
    state = {"a": torch.zeros(3), "b": torch.ones(2)}
    other = {"b": torch.ones(2), "a": torch.zeros(3)}
    assert fingerprint(state) == fingerprint(other)
    other["a"] = torch.tensor([0.0, 0.0, -0.0])
    assert fingerprint(state) != fingerprint(other)


def test_one_generator_an_item():
    rngs = item_rngs(None, 2)
    assert torch.rand(1, generator=rngs[0]).equal(torch.rand(1, generator=rngs[1]))
    with pytest.raises(ValueError, match="1 generators for 2 items"):
        item_rngs([torch.Generator()], 2)
