"""Phenaki's networks, critics, draws and long videos against the published code; scenes, files and bad input."""

import sys
from dataclasses import replace

import pytest
import torch
from einops import rearrange

from anytok.codecs.published import WeightsError, load_into
from anytok.codecs.registry import register_codec
from anytok.codecs.text import TextCodec
from anytok.codecs.video.cvivit import CViViT, CViViTConfig
from anytok.codecs.video.cvivit import from_published as codec_from_published
from anytok.generators.generator import Canvas
from anytok.generators.maskgit import Unmasking
from anytok.generators.phenaki import Phenaki, Scene, from_published, published_options, save
from anytok.generators.published import load_generator
from anytok.generators.text_features import T5Features, TextIds
from anytok.generators.video_maskgit import (
    SelfCritic,
    TokenCritic,
    VideoMaskConfig,
    VideoMaskGIT,
    infer_config,
    video_from_published,
)
from tests.golden.load import load_golden

GRID = (3, 2, 3)
TINY = {
    "vocab": 64,
    "length": 60,
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "head_dim": 8,
    "text_dim": 12,
}


@pytest.fixture(scope="module")
def fx():
    return load_golden("video_phenaki_maskgit")


@pytest.fixture(scope="module")
def ours():
    """What the published code did with seeds that are known; it stands in the cut golden alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ANYTOK_PARITY", raising=False)
        return load_golden("video_phenaki_maskgit")


def networks(fx):
    maskgit = video_from_published(fx["maskgit_sd"])
    own = SelfCritic(maskgit)
    load_into(own.to_pred, fx["self_critic_sd"], source="self critic")
    critic = video_from_published(fx["critic_sd"]) if "critic_sd" in fx else None
    return {"conf": None, "self": own.eval(), "critic": critic, "maskgit": maskgit}


def codec_of(fx):
    return codec_from_published(fx["cvivit_sd"], {"size": (16, 24)})


def conditions(fx):
    return [row[there] for row, there in zip(fx["context"], fx["text_mask"])]


def tiny_codec(**changes):
    config = {
        "size": (16, 24),
        "patch": (8, 8),
        "temporal_patch": 2,
        "dim": 16,
        "heads": 2,
        "head_dim": 8,
        "encoder_depth": (1, 1),
        "decoder_depth": (1, 1),
        "quantizer": "lfq",
        "codebook_size": 64,
    }
    torch.manual_seed(2)
    return CViViT(CViViTConfig(**config | changes), name="cvivit/tiny-phenaki").eval()


def tiny(**changes):
    torch.manual_seed(3)
    return VideoMaskGIT(VideoMaskConfig(**TINY | changes)).eval()


def phenaki(**changes):
    options = Unmasking(steps=3, doubt="probability", cfg=2.0)
    return Phenaki(tiny(**changes), codec=tiny_codec(), options=options)


def rngs(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


# Parity.


@torch.inference_mode()
def test_logits_and_doubts_are_the_published_ones(fx):
    nets, ids = networks(fx), fx["ids"].flatten(1)
    network = nets["maskgit"]
    prepared = network.prepare(conditions(fx), GRID)
    null = network(ids, network.prepare([None, None], GRID))
    logits = network(ids, prepared)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(logits, fx["logits"], **close)
    torch.testing.assert_close(null, fx["logits_null"], **close)
    # guidance multiplies differences by up to 5
    guided = null + 3 * (logits - null)
    torch.testing.assert_close(guided, fx["logits_cfg3"], atol=5e-5, rtol=0)
    present = network.prepare(conditions(fx), GRID, present=fx["video_mask"])
    torch.testing.assert_close(network(ids, present), fx["logits_masked"], **close)
    torch.testing.assert_close(nets["self"](ids, prepared), fx["self_critic"], **close)
    critic = nets["critic"]
    found = critic(ids, critic.prepare(conditions(fx), GRID))
    torch.testing.assert_close(found, fx["critic"], **close)


@torch.inference_mode()
def test_zero_features_are_padding(fx):
    network, ids = networks(fx)["maskgit"], fx["ids"].flatten(1)
    padded = network(ids, network.prepare(list(fx["context"]), GRID))
    torch.testing.assert_close(padded, fx["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["critic", "conf", "self", "prime"])
def test_every_step_of_a_trace_is_the_published_one(fx, name):
    trace, nets = fx[f"sample_{name}"], networks(fx)
    critic = nets["critic" if name == "prime" else name]
    generator = Phenaki(nets["maskgit"], critic)
    given = trace["kwargs"]
    options = replace(generator.options, steps=6, cfg=given.get("cond_scale", 3.0))
    start = trace["inputs"][0]
    grid = (start.shape[1] // 6, 2, 3)
    canvases = [
        Canvas(codes=row.where(row < 64, -1), grid=grid, condition=condition)
        for row, condition in zip(start, fx["context"])
    ]
    rng = torch.Generator().manual_seed(123)
    seen = [[start[i]] for i in range(len(start))]
    for event in generator.run(canvases, options, [rng] * len(start)):
        seen[event.request].append(event.codes.where(event.codes >= 0, 64))
    for i, row in enumerate(seen):
        assert torch.equal(torch.stack(row), torch.stack([ids[i] for ids in trace["inputs"]]))
    if "video" in trace:
        codec = codec_of(fx)
        prime = given.get("prime_frames")
        shown = Phenaki(nets["maskgit"], critic, codec=codec, options=options).videos(
            list(fx["context"])[: len(start)],
            given["num_frames"],
            prime=None if prime is None else rearrange(prime, "b c f h w -> b f c h w"),
            rng=[torch.Generator().manual_seed(123)] * len(start),
        )
        wanted = rearrange(trace["video"], "b c f h w -> b f c h w")
        torch.testing.assert_close(shown, wanted, atol=1e-4, rtol=0)


def test_a_long_video_is_the_published_one(ours):
    nets, told = networks(ours), ours["make_video_of"]
    options = replace(published_options(critic=True), steps=6)
    generator = Phenaki(nets["maskgit"], nets["critic"], codec=codec_of(ours), options=options)
    scenes = [
        Scene(ours["context"][text], frames)
        for text, frames in zip(told["texts"], told["num_frames"])
    ]
    rng = torch.Generator().manual_seed(told["seed"])
    done = list(generator.scenes(scenes, prime_frames=3, prime="pixels", rng=rng))
    for scene, codes in zip(done, told["codes"]):
        assert torch.equal(scene.stream.codes[:, 0], codes[0, -len(scene.stream) :])
    assert [len(scene.video.frames) for scene in done] == list(told["num_frames"])


def test_published_keys_and_sizes(fx):
    config = VideoMaskConfig(
        vocab=8192, length=1536, dim=2048, depth=24, heads=32, head_dim=64, text_dim=768
    )
    with torch.device("meta"):
        state = VideoMaskGIT(config).state_dict()
        critic = TokenCritic(replace(config, critic=True)).state_dict()
    assert infer_config(state, {}) == config
    assert infer_config(critic, {}) == replace(config, critic=True)
    total = sum(v.numel() for v in state.values())
    assert 1.5e9 < total < 1.9e9  # the paper's larger model is said to have 1.8 billion
    used = {
        key
        for key, value in fx["maskgit_sd"].items()
        if ".1.context_norm." not in key and value.numel()
    }
    assert set(VideoMaskGIT(infer_config(fx["maskgit_sd"], {})).state_dict()) == used


def test_a_whole_state_dict(fx):
    nets = networks(fx)
    state = {f"maskgit.{k}": v for k, v in fx["maskgit_sd"].items()}
    state |= {"cvivit.x": torch.zeros(1)}
    state |= {f"critic.maskgit.{k}": v for k, v in fx["maskgit_sd"].items()}
    state |= {f"critic.to_pred.{k}": v for k, v in fx["self_critic_sd"].items()}
    loaded = from_published(state)
    assert isinstance(loaded.critic, SelfCritic)
    assert loaded.critic.maskgit is loaded.network
    ids = fx["ids"].flatten(1)
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.critic(ids, loaded.network.prepare(conditions(fx), GRID)),
            nets["self"](ids, nets["maskgit"].prepare(conditions(fx), GRID)),
        )
    with pytest.raises(WeightsError, match="expected the state dict of lucidrains'"):
        from_published({"maskgit.x": torch.zeros(1)})


# Ours.


def test_rows_do_not_depend_on_each_other():
    generator = phenaki()
    prompts = [torch.randn(n, 12, generator=rngs(1)[0]) for n in (1, 5)] + [None]
    together = generator.codes(prompts, 5, rng=rngs(3))
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[i], generator.codes([prompt], 5, rng=[rngs(3)[i]])[0])


def test_tokens_that_prime_are_kept_and_the_whole_is_one_stream():
    generator, codec = phenaki(), None
    codec = generator.video_codec
    scenes = [Scene(None, 5), Scene(torch.randn(2, 12), 4), Scene(None, 2)]
    done = list(generator.scenes(scenes, prime_frames=3, rng=rngs(1)[0]))
    whole = done[0].stream + done[1].stream + done[2].stream
    assert whole.grid == (6, 2, 3)
    frames = torch.cat([scene.video.frames for scene in done])
    assert torch.equal(frames, codec.decode([whole])[0].frames)  # nothing was coded twice
    video = generator.make_video(scenes, prime_frames=3, rng=rngs(1)[0])
    assert torch.equal(video.frames, frames)


def test_what_was_finished_stays_when_a_later_scene_fails():
    generator = phenaki()
    scenes = generator.scenes([Scene(None, 5), Scene("no encoder", 4)], prime_frames=3)
    assert next(scenes).video.frames.shape == (5, 3, 16, 24)
    with pytest.raises(ValueError, match="there is no text encoder"):
        next(scenes)


def test_every_parameter_learns():
    network, critic = tiny(text_vocab=9), TokenCritic(VideoMaskConfig(**TINY, critic=True)).eval()
    ids = torch.randint(65, (2, 18))
    network(ids, network.prepare([torch.tensor([1, 8]), None], GRID)).square().sum().backward()
    critic(ids, critic.prepare([torch.randn(3, 12), None], GRID)).square().sum().backward()
    for part in (network, critic):
        assert [n for n, p in part.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["none", "self", "critic"])
def test_what_is_saved_loads_again(tmp_path, kind):
    codec = tiny_codec()
    name = f"cvivit/saved-{kind}"
    codec.spec = replace(codec.spec, name=name)
    register_codec(name, lambda path: codec)
    network = tiny(text_vocab=256)
    critic = {
        "none": None,
        "self": SelfCritic(network).eval(),
        "critic": TokenCritic(VideoMaskConfig(**TINY, text_vocab=256, critic=True)).eval(),
    }[kind]
    before = Phenaki(network, critic, codec=codec, text=TextIds(TextCodec()))
    before.options = replace(before.options, steps=2)
    save(before, tmp_path / "p.safetensors", name="phenaki/tiny")
    after = load_generator(tmp_path / "p.safetensors")
    assert after.options == before.options
    codes = [g.codes(["a cat"], 3, rng=rngs(1)) for g in (before, after)]
    assert torch.equal(*codes)


# Text.


def test_strings_need_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'anytok\[transformers\]'"):
        T5Features()(["a cat"])


def test_t5_gives_features_without_padding(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "cat": 3}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=8, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    encode = T5Features(tmp_path)
    long, short = encode(["a cat a", "cat"])
    assert (long.shape, short.shape) == ((3, 12), (1, 12))
    torch.testing.assert_close(short, encode(["cat"])[0])
    generator = Phenaki(tiny(), codec=tiny_codec(), text=encode, options=Unmasking(steps=2))
    assert generator.codes(["a cat", None], 3).shape == (2, 2, 2, 3)


# Bad input.


@pytest.mark.parametrize(
    ("scenes", "k", "message"),
    [
        ([], 3, "there are no scenes"),
        ([Scene(None, 4)], 3, r"scene 0 has 4 frames, expected 1 \+ n \* 2 for a first scene"),
        ([Scene(None, 5), Scene(None, 5)], 3, r"scene 1 has 5 frames, expected n \* 2"),
        ([Scene(None, 0)], 3, "scene 0 has 0 frames"),
        ([Scene(None, 5), Scene(None, 4)], 4, "the prime has 4 frames"),
        ([Scene(None, 3), Scene(None, 4)], 5, "scene 0 has 3 frames, the next one is primed"),
        ([Scene(None, 5), Scene(None, 18)], 5, "at most 7 latent frames are new"),
    ],
)
def test_scenes_that_cannot_be(scenes, k, message):
    with pytest.raises(ValueError, match=message):
        phenaki().scenes(scenes, prime_frames=k)


def test_codecs_and_conditions_that_do_not_fit():
    with pytest.raises(ValueError, match="has 64 codes, the network writes 32"):
        Phenaki(tiny(vocab=32), codec=tiny_codec())
    looking_ahead = Phenaki(tiny(), codec=tiny_codec(causal=False))
    with pytest.raises(ValueError, match="give prime='pixels'"):
        looking_ahead.scenes([Scene(None, 5)], prime="tokens")
    with pytest.raises(ValueError, match="there is no codec"):
        Phenaki(tiny()).codes([None], 5)
    with pytest.raises(ValueError, match=r"expected \[1, T, 2, 3\]"):
        phenaki().codes([None], 4, prime=torch.zeros(1, 1, 3, 2, dtype=torch.long))
    canvas = Canvas(codes=torch.full((18,), -1), grid=GRID)
    network = tiny()
    for condition, message in (
        (torch.zeros(3, 5), r"expected features \[L, 12\]"),
        (torch.tensor([1]), r"expected features \[L, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            network.check(replace(canvas, condition=condition))
    with pytest.raises(ValueError, match="outside 0 to 8"):
        tiny(text_vocab=9).check(replace(canvas, condition=torch.tensor([9])))
    with pytest.raises(ValueError, match="made without text"):
        tiny(text_dim=0).check(replace(canvas, condition=torch.tensor([9])))
    with pytest.raises(ValueError, match=r"expected \(T, h, w\)"):
        network.check(Canvas(codes=torch.full((18,), -1)))
