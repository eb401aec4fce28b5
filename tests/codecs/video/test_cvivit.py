"""C-ViViT against the published implementations' numbers; streaming; sizes and rates; published files; bad input."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from anytok.codecs import StreamError, TokenStream, WeightsError
from anytok.codecs.codec import CodecUnavailable
from anytok.codecs.published import Weights, save_codec
from anytok.codecs.registry import Entry, entry, load_codec
from anytok.codecs.video.cvivit import (
    CViViT,
    CViViTConfig,
    CViViTOptions,
    alibi_slopes,
    build,
    from_published,
    infer_config,
    paper,
)
from anytok.modalities import Audio, Image, Video
from tests.golden.load import load_golden

TINY = CViViTConfig(
    size=(16, 24),
    patch=(8, 8),
    temporal_patch=2,
    dim=16,
    heads=2,
    head_dim=8,
    encoder_depth=(1, 2),
    decoder_depth=(1, 2),
    quantizer="vq",
    codebook_size=64,
    codebook_dim=8,
    embed_norm=False,
    fit="resize",
)


@pytest.fixture(scope="module")
def phenaki():
    return load_golden("video_phenaki_cvivit")


@pytest.fixture(scope="module")
def obvious():
    return load_golden("video_obvious_cvivit")


def pixels(x):
    """The fixtures' [B, C, F, H, W] (or pictures [B, C, H, W]) as [B, F, C, H, W]."""
    return x[:, None] if x.ndim == 4 else rearrange(x, "b c f h w -> b f c h w")


def tiny(**changes):
    """A codec with fixed random weights whose branches all matter."""
    torch.manual_seed(3)
    codec = CViViT(replace(TINY, **changes)).eval()
    for p in codec.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return codec


def film(frames, size=(16, 24), fps=8.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (frames, 3, *size), generator=rng, dtype=torch.uint8)
    return Video(frames=data, fps=fps)


def assert_agrees(codec, golden, suffix=""):
    x = pixels(golden["video"])
    with torch.no_grad():
        z = codec.encode_latents(x)
    torch.testing.assert_close(z, golden[f"enc{suffix}"], atol=1e-5, rtol=0)
    ids = codec.tokenize(x)
    if f"ids{suffix}" in golden:
        assert torch.equal(ids, golden[f"ids{suffix}"])
    recon = pixels(golden[f"recon{suffix}"])
    torch.testing.assert_close(codec.detokenize(ids), recon, atol=1e-5, rtol=0)


@pytest.mark.parametrize("quantizer", ["lfq", "vq_cosine"])
def test_phenaki_as_published(phenaki, quantizer):
    golden = phenaki[quantizer]
    codec = from_published(golden["state_dict"], {"size": (16, 24)})
    assert_agrees(codec, golden)
    assert not codec.spec.streaming
    assert codec.spec.prefix_step is None


@pytest.mark.parametrize("quantizer", ["lfq", "vq_cosine"])
def test_phenaki_with_peg_repaired(phenaki, quantizer):
    golden = phenaki[quantizer]
    given = {"size": (16, 24), "temporal_peg": "repaired"}
    codec = from_published(golden["state_dict"], given)
    assert_agrees(codec, golden, "_fixed_peg")
    assert codec.spec.streaming
    assert codec.spec.prefix_step == 6


@pytest.mark.parametrize("quantizer", ["lfq", "vq_cosine"])
def test_phenaki_picture_is_a_film_of_one_frame(phenaki, quantizer):
    golden = phenaki[quantizer]
    codec = from_published(golden["state_dict"], {"size": (16, 24)})
    ids = codec.tokenize(pixels(golden["image"]))
    assert torch.equal(ids, golden["ids_image"])
    recon = pixels(golden["recon_image"])
    torch.testing.assert_close(codec.detokenize(ids), recon, atol=1e-5, rtol=0)


def test_obvious_research(obvious):
    codec = from_published(obvious["state_dict"], {"size": (16, 16)})
    assert_agrees(codec, obvious)
    assert not codec.spec.streaming
    with pytest.raises(CodecUnavailable, match="looks ahead"):
        codec.encoder_stream()


def test_shapes_tell_the_config(obvious):
    config = infer_config(obvious["state_dict"], {"size": (16, 16)})
    assert (config.heads, config.head_dim, config.dim) == (4, 8, 32)
    assert (config.patch, config.temporal_patch) == ((8, 8), 2)
    assert (config.encoder_depth, config.decoder_depth) == ((2, 2), (2, 2))
    assert config.spatial_peg
    assert not config.causal


def test_training_dump_loads_without_its_losses(obvious):
    extra = {"i3d.x": torch.ones(1), "loss_fn_lpips.y": torch.ones(1), "vgg.z": torch.ones(1)}
    old = {**obvious["state_dict"], **extra, "vq._codebook.initted": torch.tensor([True])}
    old.pop("vq._codebook.embed_avg", None)
    build(
        {"weights": Weights(old, source="pytorch_model.bin")},
        Entry(system="cvivit", modality="video", name="a/b", config={"size": [16, 16]}),
    )


def test_foreign_key_is_refused(obvious):
    with pytest.raises(WeightsError, match="surprise"):
        from_published({**obvious["state_dict"], "surprise": torch.ones(1)}, {"size": (16, 16)})


def test_missing_size_says_so(obvious):
    with pytest.raises(WeightsError, match="give `size`"):
        from_published(obvious["state_dict"])


def test_paper_has_the_papers_size():
    with torch.device("meta"):
        codec = CViViT(paper())
    count = sum(p.numel() for p in codec.parameters())
    assert 48e6 < count < 54e6
    assert codec.config.grid == (16, 16)


def test_published_size_by_key_and_shape():
    """obvious-research's notebook: dim 512, 8 heads, 8192 codes of 32 numbers, 4 + 4 layers each side."""
    config = replace(
        paper(), embed_norm=True, causal=False, spatial_peg=True, temporal_peg="published"
    )
    with torch.device("meta"):
        state = CViViT(config).state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert infer_config(state, entry("cvivit/obvious").config) == config
    assert shapes["vq._codebook.embed"] == (1, 8192, 32)
    assert shapes["to_patch_emb.2.weight"] == (512, 384)
    assert shapes["enc_spatial_transformer.layers.3.3.1.weight"] == (2730, 512)
    assert shapes["dec_temporal_transformer.layers.3.0.dsconv.weight"] == (512, 1, 3, 3, 3)


def test_alibi_slopes():
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    assert alibi_slopes(6)[:4].tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    torch.testing.assert_close(alibi_slopes(6)[4:], torch.tensor([2**-1.0, 2**-3.0]))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pieces", [[1] * 15, [15], [4, 1, 7, 3]])
def test_streaming_gives_the_whole_clips_tokens(window, pieces):
    codec, clip = tiny(temporal_window=window), film(15)
    stream = codec.encoder_stream()
    chunks = [stream.push(Video(frames=f, fps=8.0)) for f in clip.frames.split(pieces)]
    chunks = [c for c in [*chunks, stream.finish()] if c is not None]
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined = joined + chunk
    whole = codec.encode([clip])[0]
    assert torch.equal(joined.codes, whole.codes)
    assert joined.grid == whole.grid == (8, 2, 3)
    assert joined.meta == whole.meta


def test_streaming_a_fast_source():
    codec, clip = tiny(temporal_window=3), film(40, size=(20, 30), fps=25.0)
    encoder, decoder = codec.encoder_stream(), codec.decoder_stream()
    chunks = [encoder.push(Video(frames=f, fps=25.0)) for f in clip.frames.split(7)]
    chunks = [c for c in [*chunks, encoder.finish()] if c is not None]
    whole = codec.encode([clip])[0]
    assert torch.equal(torch.cat([c.codes for c in chunks]), whole.codes)
    pieces = [decoder.push(c).frames for c in chunks]
    decoder.finish()
    offline = codec.decode([whole])[0]
    assert offline.frames.shape == clip.frames.shape
    assert torch.equal(torch.cat(pieces), offline.frames)


def test_streamed_decoding_without_a_window():
    codec = tiny()
    whole = codec.encode([film(9)])[0]
    decoder = codec.decoder_stream()
    first = decoder.push(whole[:12])
    assert len(first.frames) == 3
    expected = codec.decode([whole])[0].frames[:3]
    assert (first.frames.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("window", [None, 2])
def test_prefix_decodes_to_the_beginning(window):
    codec = tiny(temporal_window=window)
    stream = codec.encode([film(9)])[0]
    short, whole = codec.decode([stream[:12], stream])
    assert len(short.frames) == 3
    assert (short.frames.int() - whole.frames[:3].int()).abs().max() <= 1


def test_window_is_what_training_sees():
    """The parallel pass under the band mask and the windowed steps agree."""
    codec = tiny(temporal_window=2)
    x = torch.rand(2, 11, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, codes, _ = codec(x)
    assert torch.equal(codec.tokenize(x), codes)
    torch.testing.assert_close(codec.detokenize(codes), y, atol=1e-5, rtol=1e-5)


def test_window_forgets():
    """With a window of 1 and no PEG a latent frame depends on itself alone; with all of time it does not."""
    x = torch.rand(1, 11, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    y = x.clone()
    y[:, 1:9] = 0
    blind, seeing = tiny(temporal_window=1, temporal_peg="none"), tiny(temporal_peg="none")
    with torch.no_grad():
        same = [
            (c.encode_latents(x) - c.encode_latents(y))[:, -1].abs().max() for c in (blind, seeing)
        ]
    assert same[0] < 1e-6
    assert same[1] > 1e-3


def test_memory_is_flat_with_a_window():
    codec = tiny(temporal_window=3)
    state = codec.encoder_state()
    for _ in range(6):
        frames = 1 if state.frames == 0 else 2
        codec.encode_chunk(torch.rand(1, frames, 3, 16, 24), state)
    assert state.frames == 6
    assert all(layer.keys.shape[2] == 3 for layer in state.layers)


def test_memory_without_a_window_is_what_it_says():
    codec = tiny()
    encoder, decoder = codec.encoder_state(), codec.decoder_state()
    codes = codec.encode_chunk(torch.rand(1, 7, 3, 16, 24), encoder)
    codec.decode_chunk(codes, decoder)
    layers = [*encoder.layers, *decoder.layers]
    held = sum(t.numel() * 4 for layer in layers for t in (layer.keys, layer.values))
    assert held == 4 * codec.bytes_per_latent_frame


def test_batch_equals_single():
    codec = tiny()
    clips = [film(5, seed=1), film(9, seed=2), film(5, seed=3)]
    together = codec.encode(clips)
    for clip, stream in zip(clips, together):
        assert torch.equal(codec.encode([clip])[0].codes, stream.codes)


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_any_length_comes_back(frames):
    codec, clip = tiny(), film(frames, size=(33, 50), fps=7.5)
    stream = codec.encode([clip])[0]
    assert stream.grid[0] == 1 + -(-(frames - 1) // 2)
    back = codec.decode([stream])[0]
    assert back.frames.shape == clip.frames.shape
    assert back.fps == clip.fps


@pytest.mark.parametrize("fit", ["resize", "crop", "pad"])
def test_size_comes_back(fit):
    codec, clip = tiny(), film(3, size=(40, 44))
    stream = codec.encode([clip], options=CViViTOptions(fit=fit))[0]
    back = codec.decode([stream])[0].frames.shape[-2:]
    # A crop of 16:24 out of 40x44 keeps the width and 29 rows.
    assert tuple(back) == ((29, 44) if fit == "crop" else (40, 44))
    own = codec.decode([stream], options=CViViTOptions(restore=False))[0]
    assert tuple(own.frames.shape) == (3, 3, 16, 24)


def test_picture_comes_back_as_a_picture():
    codec = tiny()
    picture = Image(pixels=torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)))
    stream = codec.encode([picture])[0]
    assert stream.grid == (1, 2, 3)
    back = codec.decode([stream])[0]
    assert isinstance(back, Image)
    assert back.pixels.shape == picture.pixels.shape


def test_sound_is_noted():
    sound = Audio(samples=torch.zeros(1, 800), rate=8000)
    clip = replace(film(3), audio=sound)
    stream = tiny().encode([clip])[0]
    assert stream.meta["sound"] is True


def test_generated_stream_without_meta():
    codec = tiny()
    stream = codec.stream(torch.zeros(12, dtype=torch.int64), grid=(2, 2, 3))
    video = codec.decode([stream])[0]
    assert tuple(video.frames.shape) == (3, 3, 16, 24)
    assert video.fps == 8.0


def test_tok_file_round_trip(tmp_path):
    codec = tiny()
    stream = codec.encode([film(17)])[0]
    stream.save(tmp_path / "clip.tok")
    loaded = TokenStream.load(tmp_path / "clip.tok")
    assert torch.equal(codec.decode([loaded])[0].frames, codec.decode([stream])[0].frames)
    assert (tmp_path / "clip.tok").stat().st_size < 9 * 6 * 6 / 8 + 270


def test_saved_codec_loads(tmp_path):
    codec = tiny()
    save_codec(codec, tmp_path / "c.safetensors", name="cvivit/tiny")
    again = load_codec(tmp_path / "c.safetensors")
    assert again.config == codec.config
    x = torch.rand(1, 5, 3, 16, 24)
    assert torch.equal(again.tokenize(x), codec.tokenize(x))


def test_other_sizes_where_the_patch_divides():
    codec = tiny()
    ids = codec.tokenize(torch.rand(1, 3, 3, 32, 8))
    assert ids.shape == (1, 2, 4, 1)
    assert codec.detokenize(ids).shape == (1, 3, 3, 32, 8)


def test_code_vectors_are_what_the_decoder_receives():
    codec = tiny()
    table = codec.code_vectors()
    assert table.shape == (64, 16)
    torch.testing.assert_close(table[[5, 9]], codec.vq.lookup(torch.tensor([5, 9])))


def test_gradient_reaches_every_parameter():
    codec = tiny().train()
    y, codes, inner = codec(torch.rand(1, 5, 3, 16, 24))
    (y.square().mean() + codec.vq.loss(inner, codes, 0.25)).backward()
    idle = [n for n, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (20, 24)}, "multiples of the patch"),
        ({"quantizer": "lfq", "codebook_size": 100}, "power of two"),
        ({"causal": False, "temporal_window": 2}, "causal layout"),
        ({"temporal_peg": "published", "temporal_window": 2}, "causal layout"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 3, 16, 24), "1 \\+ a multiple of 2"),
        ((1, 3, 3, 17, 24), "multiples of"),
        ((3, 16, 24), "expected"),
    ],
)
def test_bad_pixels(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny().tokenize(torch.zeros(shape))


@pytest.mark.parametrize(
    "meta",
    [
        {"length": 3, "size": [10**9, 10**9], "fps": 8.0, "fit": "resize"},
        {"length": 3, "size": [16, 24], "fps": -1, "fit": "resize"},
        {"length": 3, "size": [16, 24], "fps": 8.0, "fit": "twist"},
        {"length": 3, "size": "big", "fps": 8.0, "fit": "resize"},
        {"length": 3, "size": [16, 24], "fps": 8.0, "fit": "resize", "every": 1e12},
        {"length": 3},
    ],
)
def test_absurd_meta_is_refused(meta):
    codec = tiny()
    stream = codec.stream(torch.zeros(12, dtype=torch.int64), grid=(2, 2, 3), meta=meta)
    with pytest.raises(StreamError, match="meta"):
        codec.decode([stream])


def test_endless_length_decodes_what_is_there():
    codec = tiny()
    meta = {"length": 10**15, "size": [16, 24], "fps": 8.0, "fit": "resize"}
    stream = codec.stream(torch.zeros(12, dtype=torch.int64), grid=(2, 2, 3), meta=meta)
    assert len(codec.decode([stream])[0].frames) == 3


def test_stream_of_another_codec_is_refused():
    stream = tiny().encode([film(3)])[0]
    with pytest.raises(StreamError, match="was written by codec"):
        tiny(codebook_dim=4).decode([stream])


def test_changing_resolution_is_refused():
    encoder = tiny().encoder_stream()
    encoder.push(film(2))
    with pytest.raises(ValueError, match="the stream began with"):
        encoder.push(film(2, size=(8, 8)))


def test_nothing_pushed():
    with pytest.raises(ValueError, match="no frames were pushed"):
        tiny().encoder_stream().finish()
