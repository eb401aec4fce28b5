"""CosyVoice's language models: published keys, the recorded trace and losses, cached steps, both orders of reading.

The recorded v2 and v3 traces were not made with the stored weights (`tests/golden/cut_cosyvoice_lm.py`). Their decoder
is held to transformers' Qwen2 in `tests/backbone/test_checkpoints.py`; here steps and orders are held to whole passes.
"""

import pytest
import torch

from anytok.backbone.transformer import TransformerConfig
from anytok.codecs.published import WeightsError
from anytok.generators.cosyvoice_lm import CosyVoiceLM, CosyVoiceLMConfig
from anytok.generators.cosyvoice_lm_v1 import CosyVoiceLMv1
from anytok.generators.speech_decoder import (
    RepetitionAware,
    SpeechDecoder,
    SpeechRequest,
    aware,
)
from tests.golden.load import load_golden

GREEDY = RepetitionAware(top_k=1, window=0)
MARKER = 48  # stands for <|endofprompt|> in the tiny vocabulary


def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def golden():
    return load_golden("audio_cosy_llm")


@pytest.fixture(scope="module")
def v1(golden):
    return CosyVoiceLMv1.from_published(golden["models"]["v1"]["state_dict"])


def tiny(version="v2", seed=0):
    decoder = TransformerConfig(
        vocab_size=64, width=64, ffn=96, layers=2, heads=4, kv_heads=2, context=512,
        qkv_bias=True, tied=True, norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = CosyVoiceLMConfig(transformer=decoder, version=version, codes=60, marker=MARKER)
    model = CosyVoiceLM(config)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape) * 0.2)
    return model.eval()


def decode(model, requests, options=None, rngs=None):
    ids, reasons = [[] for _ in requests], {}
    for event in SpeechDecoder(model).run(requests, options, rngs):
        ids[event.request] += event.ids
        reasons[event.request] = event.reason
        assert event.total == len(ids[event.request])
    return ids, reasons


def request(golden, **changes):
    given = {"text": golden["text"][0], "prompt_text": golden["ptext"][0]}
    return SpeechRequest(**{**given, "prompt_speech": golden["psp"][0], **changes})


def test_repetition_aware_sampling_equals_the_recorded_draws(golden):
    ras, g = golden["models"]["ras"], rng(11)
    options = RepetitionAware()
    assert [aware(ras["logp"], ras["hist"], options, g) for _ in range(20)] == ras["picks"]
    plain = RepetitionAware(window=0)
    assert [aware(ras["logp"], ras["hist"], plain, g) for _ in range(20)] == ras["nucleus"]


def test_v1_loss_and_trace(golden, v1):
    batch, recorded = golden["batch"], golden["models"]["v1"]
    pairs = [("text_token", "text_token_len"), ("speech_token", "speech_token_len")]
    texts, speeches = ([t[:n] for t, n in zip(batch[a], batch[b])] for a, b in pairs)
    assert torch.isclose(v1.loss(texts, speeches, batch["embedding"]), recorded["loss"], atol=1e-5)
    ask = request(golden, speaker=golden["emb"][0])
    ids, reasons = decode(v1, [ask], RepetitionAware(enforce=False, maximum=6), [rng(3)])
    assert ids == [recorded["tokens"]]
    assert reasons == {0: "length"}


def test_v1_steps_equal_a_whole_pass(golden, v1):
    ask = request(golden, speaker=golden["emb"][0])
    ids = torch.tensor(golden["models"]["v1"]["tokens"])
    with torch.no_grad():
        prompt = v1.prompt(ask)
        whole = v1.llm(torch.cat([prompt, v1.speech_embedding(ids)])[None])[0, len(prompt) :]
        cache = v1.begin(1, 8)  # grows
        v1.read(prompt[None], cache, [len(prompt)])
        steps = torch.cat([v1.step(ids[i : i + 1], cache) for i in range(len(ids))])
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("version", "codes"), [("v2", 60), ("v3", 3000)])
def test_published_keys_load(golden, version, codes):
    recorded = golden["models"][version]
    model = CosyVoiceLM.from_published({**recorded["state_dict"], "step": 1}, recorded["qwen_cfg"])
    assert (model.config.version, model.codes) == (version, codes)
    config = model.backbone.config
    assert (config.heads, config.kv_heads, config.theta, config.context) == (4, 2, 1e4, 512)
    (ids,), _ = (
        decode(model, [SpeechRequest(text=golden["text"][0])]) if version == "v2" else ([[1]], 0)
    )
    assert all(0 <= id < codes for id in ids)


def test_published_size_has_the_published_parameters():
    sizes = {"hidden_size": 896, "num_hidden_layers": 24}
    with torch.device("meta"):
        decoder = TransformerConfig(
            vocab_size=151936, width=sizes["hidden_size"], ffn=4864, heads=14, kv_heads=2,
            layers=sizes["num_hidden_layers"], context=8, qkv_bias=True, tied=True,
        )  # fmt: skip
        model = CosyVoiceLM(CosyVoiceLMConfig(transformer=decoder))
    assert model.speech_embedding.weight.shape == (6564, 896)
    assert sum(p.numel() for p in model.backbone.parameters()) == 494_032_768  # Qwen2.5-0.5B


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_greedy_steps_are_what_a_whole_pass_says(golden, version):
    model = tiny(version)
    (ids,), _ = decode(model, [request(golden)], GREEDY)
    text = torch.cat([golden["ptext"][0], golden["text"][0]])
    speech = torch.cat([golden["psp"][0], torch.tensor(ids)])
    table, kinds, targets = model.sequence(text, speech)
    with torch.no_grad():
        hidden = model.backbone(embeddings=model.embed(table, kinds)[None], keep=0).hidden[0]
        scores = model.llm_decoder(hidden)[targets >= 0][9:-1]
    scores[:14, 60:] = -torch.inf  # before the least length nothing may end
    assert scores.argmax(-1).tolist() == ids
    assert len(ids) >= 14


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("prompted", [0, 9, 15, 17])
def test_arriving_text_is_read_in_the_order_of_training(golden, version, prompted):
    model = tiny(version, seed=2)
    with torch.no_grad():  # blocks end where they are full, not before
        model.llm_decoder.weight[model.marks.fill] = 0
    words = torch.cat([golden["text"][0], golden["text"][0] + 5])  # 14 ids behind a prompt
    prompt = golden["ptext"][0][1:] if version == "v2" else golden["ptext"][0]
    speech = (torch.arange(prompted) * 7) % 60
    ask = SpeechRequest(text=iter(words.split(3)), prompt_text=prompt, prompt_speech=speech)
    options = RepetitionAware(top_k=1, window=0, maximum=5)
    (ids,), _ = decode(model, [ask], options)
    instruct, spoken = (prompt[:0], prompt) if version == "v2" else (prompt[:1], prompt[1:])
    text, sounds = torch.cat([spoken, words]), torch.cat([speech, torch.tensor(ids)])
    table, kinds, targets = model.sequence(text, sounds, instruct=instruct, blocks=True)
    with torch.no_grad():
        hidden = model.backbone(embeddings=model.embed(table, kinds)[None], keep=0).hidden[0]
    scores, targets = model.llm_decoder(hidden)[targets >= 0], targets[targets >= 0]
    drawn = targets < 60
    scores = scores[drawn][prompted:]
    scores[:, 60:] = -torch.inf
    assert scores.argmax(-1).tolist() == ids
    assert (targets == model.marks.fill).sum() == len(text) // 5


def test_a_token_that_fills_early_brings_the_next_text(golden):
    model = tiny(seed=2)
    with torch.no_grad():
        model.llm_decoder.bias[model.marks.fill] = 1e4
        model.llm_decoder.bias[model.marks.eos] = -1e4
    ask = SpeechRequest(text=[golden["text"][0]])
    (ids,), reasons = decode(model, [ask], GREEDY)
    assert reasons == {0: "length"}
    assert len(ids) == 140


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_rows_do_not_depend_on_their_neighbours(golden, v1, version):
    model = v1 if version == "v1" else tiny(version)
    speaker = golden["emb"][0]
    asks = [
        request(golden, speaker=speaker),
        request(golden, text=golden["text"][0][:2], prompt_speech=torch.arange(3)),
        request(golden, text=golden["text"][0][:4], speaker=-speaker),
    ]
    together, _ = decode(model, asks, None, [rng(i) for i in range(3)])
    alone = [decode(model, [ask], None, [rng(i)])[0][0] for i, ask in enumerate(asks)]
    assert together == alone
    assert len(set(map(tuple, together))) == 3


def test_least_length_is_held_and_published_v3_does_not(golden):
    model = tiny("v3")
    with torch.no_grad():
        model.llm_decoder.weight[61:] *= 30  # ids that end are the likeliest
    ask = request(golden)
    held, _ = decode(model, [ask], RepetitionAware(), [rng(0)])
    published, _ = decode(model, [ask], RepetitionAware(enforce=False), [rng(0)])
    assert len(held[0]) >= 14 > len(published[0])


def test_loss_of_both_orders_has_gradients(golden):
    model = tiny().train()
    batch = golden["batch"]
    text, speech = batch["text_token"][0], batch["speech_token"][0]
    both = [model.sequence(text, speech), model.sequence(text, speech, blocks=True)]
    assert len(both[1][0]) == 1 + 6 + 24 + 1
    assert int((both[1][2] >= 0).sum()) == 24 + 2
    loss = model.loss(both)
    loss.backward()
    assert model.llm_embedding.weight.grad.abs().sum() > 0
    parts = torch.stack([model.loss([one]) * int((one[2] >= 0).sum()) for one in both])
    torch.testing.assert_close(loss, parts.sum() / 51)


def test_bad_input_is_named(golden, v1):
    model = tiny("v3")
    with pytest.raises(ValueError, match="endofprompt"):
        decode(model, [SpeechRequest(text=golden["text"][0][:3])])
    with pytest.raises(ValueError, match=r"prompt_speech reaches .* 60, expected 0\.\.\.59"):
        decode(tiny(), [request(golden, prompt_speech=torch.tensor([60]))])
    with pytest.raises(ValueError, match=r"expected 0\.\.\.63"):
        decode(tiny(), [request(golden, text=torch.tensor([64]))])
    with pytest.raises(ValueError, match="no text"):
        decode(tiny(), [SpeechRequest(text=torch.zeros(0, dtype=torch.int64))])
    with pytest.raises(ValueError, match="no text arrived"):
        decode(tiny(), [SpeechRequest(text=[])])
    with pytest.raises(ValueError, match="only v2 and v3"):
        decode(v1, [SpeechRequest(text=[golden["text"][0]])])
    with pytest.raises(ValueError, match="blocks of 5 and 15 need more"):
        tiny().sequence(torch.arange(6), torch.arange(18), blocks=True)
    with pytest.raises(ValueError, match="has 615 positions before its first token"):
        decode(tiny(), [request(golden, text=torch.arange(600) % 40)])
    with pytest.raises(WeightsError, match="CosyVoice 2 or 3"):
        CosyVoiceLM.from_published({"x": torch.zeros(1)})
    with pytest.raises(WeightsError, match="CosyVoice 1"):
        CosyVoiceLMv1.from_published({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="top_k"):
        RepetitionAware(top_k=0)
