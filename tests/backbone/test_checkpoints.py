import json

import pytest
import torch

from anytok.backbone import checkpoints, masks
from anytok.backbone.checkpoints import ExportError
from anytok.backbone.transformer import Transformer
from anytok.codecs.published import WeightsError
from tests.backbone.tiny import transformer
from tests.golden.load import load_golden

EXPORTABLE = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "theta": 1e6},
    "qwen3": {"qk_norm": True, "head_width": 12},
    "tied": {"tied": True, "kv_heads": 4},
}


@pytest.mark.parametrize("kind", EXPORTABLE)
@torch.no_grad()
def test_transformers_loads_what_we_save_with_equal_logits(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformer(**EXPORTABLE[kind])
    checkpoints.save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(checkpoints.load(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config"])
@torch.no_grad()
def test_we_load_what_transformers_saves(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind)(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()  # several shards
    ids = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(0))
    ours = checkpoints.load(tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "feature"),
    [
        ({"positions": "learned"}, "learned"),
        ({"positions": "rope2d", "grid": (2, 2)}, "rope2d"),
        ({"classes": 3}, "condition"),
        ({"qkv_bias": True, "qk_norm": True}, "both"),
    ],
)
def test_features_that_transformers_lacks_are_named_and_save_keeps_them(sizes, feature, tmp_path):
    model = transformer(**sizes)
    with pytest.raises(ExportError, match=feature):
        checkpoints.save_pretrained(model, tmp_path)
    checkpoints.save(model, tmp_path)
    again = checkpoints.load(tmp_path)
    assert again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_half_precision_is_stored_and_runs_in_float32(tmp_path):
    checkpoints.save(transformer(), tmp_path, dtype=torch.float16)
    assert checkpoints.load(tmp_path).lm_head.weight.dtype == torch.float32
    again = checkpoints.load(tmp_path, dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert again(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected one of llama, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"attention_bias": True}, "bias on o_proj"),
        ({"mlp_bias": True}, "biases in the feed-forward"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
)
def test_foreign_architectures_are_refused_by_name(change, message, tmp_path):
    config = checkpoints.to_transformers(transformer().config)
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=message):
        checkpoints.load(tmp_path)


def test_damaged_directories_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        checkpoints.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        checkpoints.load(tmp_path)
    checkpoints.save(transformer(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a whole safetensors"):
        checkpoints.load(tmp_path)
    weights.unlink()
    with pytest.raises(WeightsError, match="holds no model"):
        checkpoints.load(tmp_path)
    checkpoints.save(transformer(width=16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["anytok"]["transformer"]["width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="other shapes"):
        checkpoints.load(tmp_path)
    config["anytok"]["format"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="format 99"):
        checkpoints.load(tmp_path)


@torch.no_grad()
def test_llamagen_c2i_logits():
    golden = load_golden("backbone_llamagen")["c2i"]
    model = checkpoints.from_llamagen(golden["state_dict"], heads=4, grid=(4, 4))
    table = torch.stack([model.rotary.cos, model.rotary.sin], -1)
    torch.testing.assert_close(table, golden["freqs"])
    condition = model.model.cls_embedding(golden["cls"])
    embeddings = torch.cat([condition, model.embed(golden["idx"][:, :-1])], 1)
    torch.testing.assert_close(
        model(embeddings=embeddings).logits, golden["logits_eval"], atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_mios_grouped_query_llama_with_left_padding():
    golden = load_golden("backbone_mio")
    config = {**golden["cfg"], "model_type": "llama", "rope_theta": golden["rope_theta"]}
    with torch.device("meta"):
        model = Transformer(checkpoints.from_transformers(config, source="MIO"))
    model = checkpoints.assigned(model, golden["state_dict"], source="MIO")
    valid = golden["mask"].bool()
    out = model(
        golden["ids"],
        positions=masks.padded_positions(valid),
        mask=masks.causal(valid.shape[1], valid=valid),
    ).logits
    torch.testing.assert_close(out[valid], golden["logits"][valid], atol=1e-5, rtol=1e-5)


def test_published_llamagen_sizes():
    """GPT-B has 111M parameters (LlamaGen's README), on the meta device."""
    from anytok.backbone.transformer import TransformerConfig

    with torch.device("meta"):
        model = Transformer(
            TransformerConfig(
                vocab_size=16384,
                positions="rope2d",
                grid=(16, 16),
                prefix=1,
                context=257,
                classes=1000,
            )
        )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(111e6, rel=0.01)
