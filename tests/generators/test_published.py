"""Names, published sizes and files of generators."""

import pytest
import torch
from safetensors.torch import save_file

from anytok.codecs.codec import CodecUnavailable
from anytok.codecs.published import WeightsError
from anytok.codecs.registry import CODECS
from anytok.generators.generator import Canvas
from anytok.generators.image_maskgit import (
    ClassMaskConfig,
    class_network,
    from_published,
    infer_config,
    save,
)
from anytok.generators.maskgit import MaskGIT, Unmasking
from anytok.generators.published import (
    GENERATORS,
    UnknownGenerator,
    list_generators,
    load_generator,
)

BERT = {"network": "bert", "vocab": 4096, "classes": 1000}
UVIT = {"network": "uvit", "dim": 1024, "layers": 20, "heads": 16, "inner": 4096, "dropout": 0.0}
TINY = {"vocab": 16, "classes": 3, "length": 6, "dim": 16, "layers": 2, "heads": 4, "inner": 32}


def tiny(kind="bert"):
    torch.manual_seed(1)
    return class_network(ClassMaskConfig(network=kind, **TINY)).eval()


@pytest.mark.parametrize("length", [32, 64, 256])
def test_bert_has_the_published_size(length):
    with torch.device("meta"):
        network = class_network(ClassMaskConfig(**BERT, length=length))
    state = network.state_dict()
    assert len(state) == 5 + 24 * 16 + 2
    d, f, v = 768, 3072, 4096
    layer = 4 * (d * d + d) + 4 * d + 2 * d * f + f + d
    table = (v + 1002 + length + 1 + 2 + 2) * d
    assert sum(t.numel() for t in state.values()) == table + 24 * layer + d * v + v
    assert infer_config(state, {"heads": 16}) == network.config


def test_uvit_has_the_published_size():
    with torch.device("meta"):
        network = class_network(ClassMaskConfig(**{**BERT, **UVIT, "length": 128}))
    state = network.state_dict()
    d, f, v = 1024, 4096, 4096
    block, skip = 4 * d * d + d + 4 * d + 2 * d * f + f + d, 2 * d * d + d
    table = (v + 1002 + 129) * d
    total = table + 21 * block + 10 * skip + 2 * d + d * v + v
    assert sum(t.numel() for t in state.values()) == total
    assert len(state) == 2 + 21 * 11 + 10 * 2 + 4
    assert infer_config(state, {"heads": 16}) == network.config


def test_published_names():
    with torch.device("meta"):
        bert = class_network(ClassMaskConfig(**BERT, length=256)).state_dict()
        uvit = class_network(ClassMaskConfig(**{**BERT, **UVIT, "length": 128})).state_dict()
    shapes = {
        "model.embeddings.word_embeddings.weight": (5098, 768),
        "model.embeddings.position_embeddings.weight": (257, 768),
        "model.embeddings.token_type_embeddings.weight": (2, 768),
        "model.encoder.layer.23.attention.self.query.weight": (768, 768),
        "model.encoder.layer.23.attention.output.LayerNorm.bias": (768,),
        "model.encoder.layer.23.intermediate.dense.weight": (3072, 768),
        "model.encoder.layer.0.output.dense.weight": (768, 3072),
        "model.lm_head.bias": (4096,),
    }
    assert {name: tuple(bert[name].shape) for name in shapes} == shapes
    shapes = {
        "pos_embed": (1, 129, 1024),
        "embeddings.weight": (5098, 1024),
        "in_blocks.9.attn.qkv.weight": (3072, 1024),
        "mid_block.mlp.fc1.weight": (4096, 1024),
        "out_blocks.9.skip_linear.weight": (1024, 2048),
        "lm_head.weight": (4096, 1024),
    }
    assert {name: tuple(uvit[name].shape) for name in shapes} == shapes
    assert "in_blocks.9.attn.qkv.bias" not in uvit


def test_rows_name_codecs_that_there_are():
    assert list_generators("titok/*") == [f"titok/{v} generator" for v in ("b-64", "l-32", "s-128")]
    for name, row in GENERATORS.items():
        assert row.codec in CODECS, name
        assert row.code_licence
        assert row.weights_licence


@pytest.mark.parametrize("kind", ["bert", "uvit"])
def test_a_published_file_loads_by_name(tmp_path, kind):
    network = tiny(kind)
    state = {**network.state_dict(), "model.embeddings.position_ids": torch.arange(7)[None]}
    if kind == "uvit":
        del state["model.embeddings.position_ids"]
    torch.save(state, tmp_path / "generator_titok_l32.bin")
    row = GENERATORS["titok/l-32 generator"]
    generator = load_generator("titok/l-32", path=tmp_path)
    assert generator.codec == "titok/l-32"
    assert generator.options == Unmasking(**row.options)
    ids = torch.randint(17, (2, 6))
    with torch.inference_mode():
        mine = generator.network(ids, torch.tensor([0, 3]))
        torch.testing.assert_close(
            mine, from_published(state, {"heads": 16})(ids, torch.tensor([0, 3]))
        )


def test_what_is_saved_loads_again(tmp_path):
    options = Unmasking(steps=3, softmax=(1.3, 0.5), cfg=2.0)
    before = MaskGIT(tiny(), options=options, codec="onedpiece/mini")
    save(before, tmp_path / "g.safetensors", name="onedpiece/mini generator", dtype=torch.float16)
    after = load_generator(tmp_path / "g.safetensors")
    assert after.options == options
    assert after.codec == "onedpiece/mini"
    assert not after.network.training
    before.network.half().float()
    canvas = Canvas(codes=torch.full((6,), -1), condition=torch.tensor(1))
    assert torch.equal(before.fill([canvas])[0], after.fill([canvas])[0])


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownGenerator, match="nearest: titok/l-32 generator"):
        load_generator("titok/l32 generator")


def test_files_of_something_else(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"no key .*word_embeddings"):
        load_generator("titok/b-64 generator", path=tmp_path)
    with pytest.raises(WeightsError, match="published files load by name"):
        load_generator(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="holds none of"):
        load_generator("onedpiece/s-256 generator", path=tmp_path)
    state = tiny().state_dict()
    del state["model.lm_head.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"missing \(1\): model.lm_head.bias"):
        load_generator("onedpiece/s-256 generator", path=tmp_path)


def test_hub_files_that_cannot_be_had(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repo, name):
        assert (repo, name) == ("yucornetto/generator_titok_s128_imagenet", "model.safetensors")
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(CodecUnavailable, match="generator_titok_s128_imagenet"):
        load_generator("titok/s-128 generator")
