"""FlexTok against the published implementation's numbers; prefixes, batches, published files and sizes; bad input."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from anytok.codecs import StreamError, WeightsError, list_codecs, load_codec, registry, save_codec
from anytok.codecs.codec import CodecUnavailable
from anytok.codecs.image import flextok as module
from anytok.codecs.image.fitting import PictureOptions
from anytok.codecs.image.flextok import (
    FlexTok,
    FlexTokConfig,
    FlexTokOptions,
    ProjectedGuidance,
    plain_guidance,
)
from anytok.codecs.image.flextok_published import SECTIONS, parse_metadata, read_config
from anytok.modalities import Image
from tests.golden.load import load_golden

TIME, STEPS, KEEP = 0.6, 4, (1, 5)  # what the fixture was computed with
NAME = "flextok/d12-d12-in1k"


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_flextok")


@pytest.fixture(scope="module")
def codec(golden):
    return FlexTok.from_published(golden["state_dict"], golden["config"], name=NAME)


@pytest.fixture(scope="module")
def vectors(golden, codec):
    return list(codec.quantize.vectors(golden["outputs"]["tokens"]))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def fewer(**options):
    return FlexTokOptions(steps=1, guidance=2.0, native=True, **options)


def changed(config, path, **values):
    """A copy of a nested config with other values at `path`; "absent" removes a field."""
    if path:
        head, *rest = path
        return {**config, head: changed(config[head], rest, **values)}
    return {k: v for k, v in {**config, **values}.items() if v != "absent"}


# --- parity ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encoder_and_tokens(golden, codec):
    out, pixels = golden["outputs"], golden["inputs"]["images"] / 2 + 0.5
    close(codec.latents(pixels), out["latents"])
    close(codec.encoder(out["latents"]), out["registers"])
    tokens = codec.tokenize(pixels)
    assert torch.equal(tokens, out["tokens"])
    assert torch.equal(codec.quantize.vectors(tokens), out["quant"])
    for row, wanted in zip(pixels, out["tokens"]):
        assert torch.equal(codec.tokenize(row[None])[0], wanted)


@torch.no_grad()
def test_velocities_with_all_codes_some_and_none(golden, codec, vectors):
    out, x = golden["outputs"], golden["inputs"]["noise"]
    times = torch.full((2,), TIME)
    close(codec.decoder(x, times, vectors), out["velocity_cond"])
    close(codec.decoder(x, times, [v[:3] for v in vectors]), out["velocity_keep3"])
    close(codec.decoder(x, times, [None, None]), out["velocity_null"])
    # ragged rows in one forward, as guidance runs them: one modulation for all
    condition = codec.decoder.condition([vectors[0], vectors[1][:3], None])
    assert condition.kept == (16, 3, 0)
    assert len(condition.registers) == 16 + 4 + 1
    modulation = codec.decoder.modulation(times[:1]).at(0)
    ragged = codec.decoder.velocity(x[[0, 1, 0]], condition, modulation)
    names = ("velocity_cond", "velocity_keep3", "velocity_null")
    close(ragged, torch.stack([out[n][i] for n, i in zip(names, (0, 1, 0))]))


@torch.no_grad()
def test_time_embedding(golden, codec):
    embedder = codec.decoder.module_dict.dec_time_embedder
    close(embedder.waves(golden["temb"]["t"]), golden["temb"]["freq"])
    close(embedder(golden["temb"]["t"]), golden["temb"]["emb"])


def test_guidance(golden):
    g = golden["guidance"]
    close(plain_guidance(g["c1"], g["u1"], 3.0), g["cfg"])
    projected = ProjectedGuidance()
    close(projected(g["c1"], g["u1"], 7.5), g["apg_step1"])
    close(projected(g["c2"], g["u2"], 7.5), g["apg_step2"])


@pytest.mark.parametrize(
    ("name", "guidance", "apg", "keep"),
    [
        ("cfg1", 1.0, False, (16, 16)),
        ("cfg3", 3.0, False, (16, 16)),
        ("apg7.5", 7.5, True, (16, 16)),
        ("apg7.5_keep", 7.5, True, KEEP),
    ],
)
def test_sampler(golden, codec, vectors, name, guidance, apg, keep):
    options = FlexTokOptions(steps=STEPS, guidance=guidance, apg=apg)
    rows = [v[:k] for v, k in zip(vectors, keep)]
    latents = codec.sample(rows, golden["inputs"]["noise"], options=options)
    close(latents, golden["outputs"][f"sample_{name}_latents"])


def test_detokenize_draws_noise_item_by_item(golden, codec):
    rng = torch.Generator().manual_seed(0)
    options = FlexTokOptions(steps=3, guidance=7.5, apg=True)
    tokens = golden["outputs"]["tokens"]
    painted = codec.detokenize(tokens, options=options, rng=[rng, rng])
    close(2 * painted - 1, golden["outputs"]["detokenize_seed0"], atol=1e-4)


def test_frozen_tables_are_what_the_published_code_computes(golden):
    state = golden["state_dict"]
    for key, width in (("encoder.module_dict.enc_posemb_module.posembs", 128),
                       ("decoder.module_dict.dec_patches_posemb_module.posembs", 192)):  # fmt: skip
        fresh = module.Positions("sincos", width, (4, 4))
        close(fresh.posembs, state[key])
        close(fresh(), state[key].flatten(2)[0].T)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_pictures_of_any_size_become_ordered_streams(codec):
    pictures = [Image(torch.rand(3, 50, 90)), Image(torch.rand(3, 1, 1))]
    streams = codec.encode(pictures, options=PictureOptions(fit="resize"))
    assert [len(s) for s in streams] == [16, 16]
    whole = codec.decode(streams, options=FlexTokOptions(steps=1, guidance=1.0))
    assert [p.pixels.shape for p in whole] == [(3, 50, 90), (3, 1, 1)]
    native = codec.decode(streams[:1], options=fewer())
    assert native[0].pixels.shape == (3, 64, 64)
    assert codec.encode([]) == []
    assert codec.decode([]) == []


def test_a_row_never_depends_on_its_neighbours(codec):
    torch.manual_seed(0)
    pictures = [Image(torch.rand(3, 64, 64)) for _ in range(3)]
    streams = codec.encode(pictures)
    for picture, stream in zip(pictures, streams):
        assert torch.equal(codec.encode([picture])[0].codes, stream.codes)
    ragged = [s[:k] for s, k in zip(streams, (1, 5, 16))]
    batch = codec.decode(ragged, options=fewer())
    for stream, painted in zip(ragged, batch):
        (single,) = codec.decode([stream], options=fewer())
        close(painted.pixels, single.pixels)


def test_every_prefix_decodes_and_says_something(codec):
    (stream,) = codec.encode([Image(torch.rand(3, 64, 64))])
    painted = codec.decode([stream[:k] for k in range(1, 17)], options=fewer())
    assert len({p.pixels.sum().item() for p in painted}) == 16


def test_the_seed_decides_and_nothing_else(codec):
    (stream,) = codec.encode([Image(torch.rand(3, 64, 64))])
    (a,), (b,) = (codec.decode([stream], options=fewer()) for _ in range(2))
    (other,) = codec.decode([stream], options=fewer(seed=1))
    (given,) = codec.decode([stream], options=fewer(), rng=[torch.Generator().manual_seed(1)])
    assert torch.equal(a.pixels, b.pixels)
    assert not torch.allclose(a.pixels, other.pixels)
    assert torch.equal(given.pixels, other.pixels)


def test_posterior_as_the_file_says_or_as_asked(golden):
    config = changed(golden["config"], ["vae"], sample_posterior="absent")  # its default: sampled
    codec = FlexTok.from_published(golden["state_dict"], config)
    assert codec.config.sample_posterior
    # random weights have a tiny variance; make it count
    codec.autoencoder.quant_conv.bias.data[4:] = 2.0
    pixels = golden["inputs"]["images"] / 2 + 0.5
    sampled = codec.tokenize(pixels)
    assert torch.equal(sampled, codec.tokenize(pixels))
    assert torch.equal(sampled[1:], codec.tokenize(pixels[1:]))
    seeded = codec.tokenize(pixels, rng=[torch.Generator().manual_seed(s) for s in (5, 6)])
    mean = codec.tokenize(pixels, options=FlexTokOptions(posterior="mean"))
    assert not torch.equal(sampled, seeded)
    assert torch.equal(mean, golden["outputs"]["tokens"])


def test_work_is_skipped_where_guidance_needs_none(codec, vectors, monkeypatch):
    rows = []
    velocity = codec.decoder.velocity

    def counting(x, condition, modulation):
        rows.append(len(x))
        return velocity(x, condition, modulation)

    monkeypatch.setattr(codec.decoder, "velocity", counting)
    noise = torch.randn(2, 4, 8, 8)

    def late(time):
        return 3.0 if time > 0.5 else 1.0

    for guidance, apg, wanted in ((1.0, True, [2, 2]), (3.0, False, [4, 4]), (late, False, [4, 2])):
        rows.clear()
        codec.sample(vectors, noise, options=FlexTokOptions(steps=2, guidance=guidance, apg=apg))
        assert rows == wanted
    # with momentum, an unguided step still feeds the later ones
    rows.clear()
    codec.sample(vectors, noise, options=FlexTokOptions(steps=2, guidance=late, apg=True))
    assert rows == [4, 4]


def test_many_steps_are_modulated_in_chunks(codec, vectors, monkeypatch):
    noise, options = torch.randn(1, 4, 8, 8), FlexTokOptions(steps=5, guidance=2.0)
    whole = codec.sample(vectors[:1], noise, options=options)
    monkeypatch.setattr(module, "STEPS_AT_ONCE", 2)
    close(codec.sample(vectors[:1], noise, options=options), whole)


def test_code_vectors_and_their_digits(codec):
    table = codec.code_vectors()
    assert table.shape == (64_000, 6)
    assert [t.shape for t in codec.digit_vectors()] == [(n, 1) for n in codec.config.levels]
    assert codec.spec.compose == "concat"
    assert codec.spec.vocab == ((64_000,),)


def test_gradients_reach_every_weight(golden):
    codec = FlexTok.from_published(golden["state_dict"], golden["config"])
    noise, times = golden["inputs"]["noise"], torch.tensor([0.2, 0.9])
    codes = codec.quantize(codec.encoder(golden["outputs"]["latents"])).vectors
    full = codec.decoder(noise, times, [codes[0], codes[1][:4]])
    free = codec.decoder(noise[:1], times[:1], [None])
    (full.square().sum() + free.square().sum()).backward()
    weights = [*codec.encoder.named_parameters(), *codec.decoder.named_parameters()]
    frozen = {name for name, weight in weights if not weight.requires_grad}
    assert frozen == {
        f"module_dict.{n}.posembs" for n in ("enc_posemb_module", "dec_patches_posemb_module")
    }
    for name, weight in weights:
        assert name in frozen or weight.grad.abs().sum() > 0, name


def test_a_fresh_codec_starts_at_zero_velocity():
    vae = {"scaling_factor": 1.0, "latent_channels": 2, "channels": (32, 32), "blocks": 1}
    config = FlexTokConfig(
        vae=vae, grid=2, tokens=4, levels=(8, 5), encoder=(64, 1), decoder=(64, 1)
    )
    codec = FlexTok(config)
    x, codes = torch.randn(1, 2, 4, 4), [torch.rand(3, 2)]
    assert codec.config.image_size == 8
    assert codec.decoder(x, torch.tensor([0.5]), codes).abs().max() == 0
    assert codec.encoder(x).shape == (1, 4, 2)


# --- files -----------------------------------------------------------------------------------------------------------


def publish(path, golden, **sections):
    """A file as the authors write them: tensors, and the config's sections as text in the metadata."""
    metadata = {name: str(golden["config"][name]) for name in SECTIONS}
    metadata = {k: v for k, v in {**metadata, **sections}.items() if v is not None}
    state = {k: v.contiguous() for k, v in golden["state_dict"].items()}
    save_file(state, path, metadata=metadata)
    return path


def test_a_published_file_loads_by_name(golden, codec, tmp_path):
    publish(tmp_path / "model.safetensors", golden)
    loaded = load_codec(NAME, path=tmp_path)
    assert loaded.config == codec.config
    assert "research only" in loaded.spec.weights_licence
    pixels = golden["inputs"]["images"] / 2 + 0.5
    with torch.no_grad():
        assert torch.equal(loaded.tokenize(pixels), golden["outputs"]["tokens"])
    save_codec(loaded, tmp_path / "ours.safetensors")
    again = load_codec(tmp_path / "ours.safetensors")
    assert again.config == loaded.config
    assert again.spec.weights_licence == loaded.spec.weights_licence


@pytest.mark.parametrize(
    ("section", "text", "message"),
    [
        ("encoder", "__import__('os').getcwd()", "encoder is not a Python literal"),
        ("pipeline", "[" * 100_000, "pipeline is not a Python literal"),
        ("decoder", " " * 300_000, "has 300000 characters"),
        ("vae", None, "its metadata lacks vae"),
        ("regularizer", "{'_target_': 'os.system'}", "unknown _target_ 'os.system'"),
        ("regularizer", "{'_target_': ['a']}", "unknown _target_"),
        ("pipeline", "[1, 2]", "its config lacks pipeline"),
    ],
)
def test_nothing_in_metadata_is_run(golden, tmp_path, section, text, message):
    metadata = {name: str(golden["config"][name]) for name in SECTIONS}
    metadata[section] = text
    metadata = {k: v for k, v in metadata.items() if v is not None}
    with pytest.raises(WeightsError, match=message.replace("(", r"\(")):
        read_config(parse_metadata(metadata, "file"), "file")


ENC, DEC = ["encoder", "module_dict"], ["decoder", "module_dict"]


@pytest.mark.parametrize(
    ("path", "values", "message"),
    [
        ([*ENC, "enc_seq_packer"], {"mask_mode": "full"}, "this FlexTok has 'causal_last'"),
        ([*DEC, "dec_seq_packer"], {"mask_mode": "causal"}, "this FlexTok has 'full'"),
        ([*ENC, "enc_transformer"], {"wings": 2}, "enc_transformer has the unknown field wings"),
        ([*ENC, "enc_transformer"], {"head_dim": 32}, "head_dim = 32, this FlexTok has 64"),
        ([*ENC, "enc_transformer"], {"rope_forward_read_key": "r"}, "rope_forward_read_key = 'r'"),
        ([*ENC, "enc_to_latents"], {"use_mup_readout": True}, "use_mup_readout = True"),
        ([*ENC], {"enc_extra": {"_target_": "x"}}, "unknown _target_ 'x'"),
        ([*ENC], {"enc_register_module": "absent"}, "encoder has the steps enc_patch_emb, enc_pos"),
        ([*DEC, "dec_transformer"], {"adaLN_expansion": 1}, "adaLN_expansion are 1, 2"),
        ([*DEC, "dec_time_embedder"], {"max_timestep": "soon"}, "max_timestep is 'soon'"),
        ([*DEC, "dec_noise_patch_emb"], {"patch_sizes": [2, 4]}, "patch_sizes are 2, 2, 2, 4"),
        (["regularizer"], {"levels": "absent"}, "regularizer does not say levels"),
        (["regularizer"], {"levels": [8, -1]}, "expected whole numbers"),
        (["vae"], {"scaling_factor": None}, "does not say scaling_factor"),
        (["vae"], {"dtype_override": "int8"}, "dtype_override = 'int8'"),
    ],
)
def test_configs_of_another_model_are_refused(golden, path, values, message):
    with pytest.raises(WeightsError, match=message):
        read_config(changed(golden["config"], path, **values), "file")


def test_values_that_only_the_file_knows_are_read(golden):
    config = golden["config"]
    path = [*DEC, "dec_time_embedder"]
    said = read_config(changed(config, path, max_timestep=1000.0), "file")
    assert said["max_timestep"] == 1000.0
    unsaid = read_config(changed(config, path, max_timestep="absent"), "file")
    assert unsaid["max_timestep"] == 1000.0  # the published default
    assert read_config(config, "file")["max_timestep"] == 1.0
    assert read_config(changed(config, ["vae"], dtype_override="bf16"), "file")["vae"] == {
        "scaling_factor": 0.7,
        "autocast": "bfloat16",
    }
    levels = changed(config, ["regularizer"], levels=[5, 5, 5, 8, 8, 8])
    assert read_config(levels, "file")["levels"] == (5, 5, 5, 8, 8, 8)


def test_scaling_of_a_named_vae_is_looked_up(golden, tmp_path, monkeypatch):
    tree = changed(
        golden["config"], ["vae"], scaling_factor=None, hf_hub_path="EPFL-VILAB/flextok_vae_c16"
    )
    (tmp_path / "config.json").write_text('{"scaling_factor": 0.25}')
    asked = []
    monkeypatch.setattr(module, "find", lambda file: asked.append(file) or tmp_path / "config.json")
    assert module._with_scaling(tree)["vae"]["scaling_factor"] == 0.25
    assert asked[0].repo == "EPFL-VILAB/flextok_vae_c16"
    foreign = changed(tree, ["vae"], hf_hub_path="someone/else")
    assert module._with_scaling(foreign) is foreign
    assert len(asked) == 1


def test_damaged_and_foreign_files(golden, tmp_path):
    whole = publish(tmp_path / "model.safetensors", golden).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_codec(NAME, path=tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="its metadata lacks vae, encoder"):
        load_codec(NAME, path=tmp_path / "foreign.safetensors")
    deeper = changed(golden["config"], [*DEC, "dec_transformer"], depth=3)
    with pytest.raises(WeightsError, match=r"missing \(9\).*blocks\.2\."):
        FlexTok.from_published(golden["state_dict"], deeper)
    wider = changed(golden["config"], [*ENC, "enc_transformer"], dim=192)
    with pytest.raises(WeightsError, match="other shapes"):
        FlexTok.from_published(golden["state_dict"], wider)
    with pytest.raises(WeightsError, match="not an AutoencoderKL"):
        FlexTok.from_published({"a": torch.zeros(1)}, golden["config"])


# --- published sizes -------------------------------------------------------------------------------------------------


def published_shapes(e, d, depths, channels=16, tokens=256, grid=16):
    """Keys and shapes of encoder and decoder, from the tables of the published code."""

    def trunk(prefix, width, depth, ada):
        hidden = int(2 * (4 * width) / 3)
        for i in range(depth):
            block = f"{prefix}.blocks.{i}"
            yield from (
                (f"{block}.attn.{w}.weight", (width, width)) for w in ("wq", "wk", "wv", "proj")
            )
            yield from ((f"{block}.mlp.{w}.weight", (hidden, width)) for w in ("fc1", "fc3"))
            yield f"{block}.mlp.fc2.weight", (width, hidden)
            if ada:
                yield f"{block}.adaLN_modulation.1.weight", (12 * width, width)
                yield f"{block}.adaLN_modulation.1.bias", (12 * width,)

    enc, dec = "encoder.module_dict.enc_", "decoder.module_dict.dec_"
    linear = {
        f"{enc}patch_emb.patch_proj": (e, 4 * channels),
        f"{enc}to_latents.proj": (6, e),
        f"{dec}from_latents.proj": (d, 6),
        f"{dec}noise_patch_emb.patch_proj": (d, 4 * channels),
        f"{dec}time_embedder.mlp.0": (d, 256),
        f"{dec}time_embedder.mlp.2": (d, d),
        f"{dec}to_patches.adaLN_modulation.1": (2 * d, d),
        f"{dec}to_patches.proj": (4 * channels, d),
    }
    shapes = {f"{k}.weight": v for k, v in linear.items()}
    shapes |= {f"{k}.bias": v[:1] for k, v in linear.items()}
    shapes |= {
        f"{enc}posemb_module.posembs": (1, e, grid, grid),
        f"{enc}register_module.registers": (tokens, e),
        f"{dec}registers_posemb_module.posembs": (1, 1, d, tokens),
        f"{dec}nested_dropout.dropout_mask_token": (d,),
        f"{dec}latent_dropout.nullcond": (d,),
        f"{dec}patches_posemb_module.posembs": (1, d, grid, grid),
    }
    shapes |= dict(trunk(f"{enc}transformer", e, depths[0], False))
    return shapes | dict(trunk(f"{dec}transformer", d, depths[1], True))


@pytest.mark.parametrize(
    ("encoder", "decoder", "millions"),
    [
        ((768, 12), (768, 12), (85, 170)),
        ((1152, 18), (1152, 18), (287, 574)),
        ((1152, 18), (1792, 28), (287, 2158)),
    ],
)
def test_published_sizes_on_the_meta_device(encoder, decoder, millions):
    vae = {"scaling_factor": 1.0, "latent_channels": 16}
    with torch.device("meta"):
        codec = FlexTok(FlexTokConfig(vae=vae, encoder=encoder, decoder=decoder))
    state = codec.state_dict()
    found = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("vae.vae.")}
    assert found == published_shapes(encoder[0], decoder[0], (encoder[1], decoder[1]))
    trunks = ("encoder.module_dict.enc_transformer.", "decoder.module_dict.dec_transformer.")
    counts = [sum(v.numel() for k, v in state.items() if k.startswith(t)) for t in trunks]
    assert tuple(round(n / 1e6) for n in counts) == millions
    assert codec.spec.size == (256, 256)
    assert codec.spec.layout.max_length == 256


def test_every_row_names_its_repository():
    names = list_codecs("flextok/d*")
    assert len(names) == 4
    for name in names:
        row = registry.CODECS[name]
        hub = name.replace("/", "_").replace("-", "_")
        assert row.files["weights"].repo == f"EPFL-VILAB/{hub}"
        assert "research only" in row.weights_licence


# --- bad input -------------------------------------------------------------------------------------------------------


def test_streams_that_cannot_be_decoded(codec):
    (stream,) = codec.encode([Image(torch.rand(3, 64, 64))])
    for k in (0, 17, -1):
        with pytest.raises(StreamError, match=f"k = {k}, expected 1 to 16"):
            stream[:k]
    with pytest.raises(StreamError, match="has 17 positions, expected 1 to 16"):
        codec.stream(torch.zeros(17, dtype=torch.long))
    with pytest.raises(StreamError, match="code 64000 at depth 0 is outside"):
        codec.stream(torch.tensor([64_000]))
    with pytest.raises(StreamError, match="decode needs"):
        codec.decode([dataclasses.replace(stream, codec="onedpiece/mini@00000000")])
    with pytest.raises(ValueError, match="a row has 0 codes, expected 1 to 16"):
        codec.detokenize(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="a row has 17 codes"):
        codec.detokenize(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="expected 0 to 63999"):
        codec.detokenize(torch.tensor([[-1]]))


def test_pictures_and_options_that_do_not_fit(codec):
    with pytest.raises(ValueError, match="picture 0 holds NaN"):
        codec.encode([Image(torch.full((3, 64, 64), float("nan")))])
    with pytest.raises(TypeError, match="item 0 is a Tensor"):
        codec.encode([torch.rand(3, 64, 64)])
    with pytest.raises(ValueError, match=r"pixels are \(1, 3, 32, 64\), expected \[B, 3, 64, 64\]"):
        codec.tokenize(torch.rand(1, 3, 32, 64))
    with pytest.raises(ValueError, match="rng has 1 generators for 2 items"):
        codec.detokenize(torch.zeros(2, 3, dtype=torch.long), rng=[torch.Generator()])
    with pytest.raises(ValueError, match="posterior is 'mode'"):
        FlexTokOptions(posterior="mode")
    with pytest.raises(ValueError, match="steps are 0"):
        FlexTokOptions(steps=0)
    with pytest.raises(ValueError, match="a width is 100, expected a multiple of 64"):
        FlexTokConfig(vae={"scaling_factor": 1.0}, encoder=(100, 2))


def test_without_the_hub_the_error_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(CodecUnavailable, match=r"flextok_d12_d12_in1k/model\.safetensors"):
        load_codec(NAME)
