"""Text to speech over tiny model directories: batches, voices, streams, arriving text, bad input."""

import json

import pytest
import torch

from anytok.backbone.transformer import TransformerConfig
from anytok.codecs import CodecUnavailable, WeightsError
from anytok.codecs.audio.cosyvoice.codec import Speech
from anytok.codecs.audio.cosyvoice.voice import Voice
from anytok.codecs.text import TextCodec
from anytok.generators.cosyvoice import CosyVoiceTTS, Hush
from anytok.generators.cosyvoice_lm import CosyVoiceLM, CosyVoiceLMConfig
from anytok.generators.cosyvoice_lm_v1 import CosyVoiceLMv1, CosyVoiceLMv1Config
from anytok.generators.cosyvoice_words import marks, read_words
from anytok.generators.speech_decoder import RepetitionAware
from tests.codecs.audio.test_cosyvoice import sound, tiny_networks

CODES = 81
SHORT = RepetitionAware(minimum=3, maximum=4)


def language_model(version, vocab):
    torch.manual_seed(1)
    if version == "v1":
        sizes = {"text_width": 16, "width": 16, "ffn": 32, "heads": 2, "text_layers": 1}
        return CosyVoiceLMv1(
            CosyVoiceLMv1Config(text_vocab=256, layers=1, codes=CODES, speaker=6, **sizes)
        )
    decoder = TransformerConfig(
        vocab_size=vocab, width=32, ffn=48, layers=1, heads=2, kv_heads=1, context=256, qkv_bias=True,
        tied=True,
    )  # fmt: skip
    return CosyVoiceLM(CosyVoiceLMConfig(transformer=decoder, version=version, codes=CODES))


def write_words(folder):
    """Byte pairs without merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir()
    letters = sorted(ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def make(folder, version):
    folder.mkdir()
    for name, network in tiny_networks(version).items():
        torch.save(network.state_dict(), folder / name)
    vocab = 256 + len(marks("v3"))
    torch.save(language_model(version, vocab).state_dict(), folder / "llm.pt")
    (
        folder / {"v1": "cosyvoice.yaml", "v2": "cosyvoice2.yaml", "v3": "cosyvoice3.yaml"}[version]
    ).touch()
    write_words(folder / "CosyVoice-BlankEN")
    sizes = {
        "model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "rope_theta": 1e6,
    }  # fmt: skip
    (folder / "CosyVoice-BlankEN" / "config.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return CosyVoiceTTS.load(make(tmp_path_factory.mktemp("tts") / "v2", "v2"))


@pytest.fixture(scope="module")
def voice(v2):
    return Voice.from_audio(sound(1.0), v2.codec, text="low hum")


def test_words_have_the_published_ids_of_marks(tmp_path):
    write_words(tmp_path / "words")
    words = read_words(tmp_path / "words", "v3")
    text = "Ol\u00e1 [breath]<|endofprompt|>[AA0][\u01dc]"
    ids = words.ids(text)
    assert words.text(ids) == text
    # Behind Qwen2's 151,643 byte pairs: <|endofprompt|> is 151646 in the published model.
    assert [i - 256 for i in ids if i >= 256] == [4, 3, 22, len(marks("v3")) - 1]
    assert marks("v3")[:20] == marks("v2")
    with pytest.raises(WeightsError, match=r"neither tokenizer\.json nor vocab\.json"):
        read_words(tmp_path, "v2")


def test_a_batch_speaks_and_equals_single_calls(v2, voice):
    fast, texts = Speech(steps=1), ["Hello there", "No."]
    rngs = [torch.Generator().manual_seed(i) for i in range(2)]
    together = v2(texts, voice=[voice, voice.speaker], sampling=SHORT, speech=fast, rng=rngs)
    again = torch.Generator().manual_seed(1)
    alone = v2(texts[1:], voice=voice.speaker, sampling=SHORT, speech=fast, rng=[again])[0]
    torch.testing.assert_close(together[1].samples, alone.samples, atol=1e-4, rtol=0)
    assert together[0].rate == 24_000
    # 3 to 4 tokens a byte, 25 a second
    for audio, text in zip(together, texts):
        assert 3 * len(text) <= audio.samples.shape[1] // 960 <= 4 * len(text)


@pytest.mark.parametrize("pieces", [None, ["Hello", " there, ", "you two"]])
def test_a_stream_gives_the_sound_of_a_whole_call(v2, voice, pieces):
    whole = "".join(pieces or ["Hello there, you two"])
    options = {"voice": voice, "sampling": SHORT, "speech": Speech(steps=1)}
    parts = list(v2.stream(iter(pieces) if pieces else whole, **options))
    assert len(parts) >= 2
    joined = torch.cat([part.samples for part in parts], 1)
    if pieces is None:
        (ids,) = drawn(v2, whole, voice)
        stream = v2.codec.stream(torch.tensor(ids), grid=(len(ids),), side=voice.side())
        sound_ = v2.codec.decode([stream], options=Speech(steps=1, chunked=True))[0]
        torch.testing.assert_close(joined, sound_.samples, atol=1e-4, rtol=0)
    assert joined.shape[1] % 960 == 0


def drawn(tts, text, voice):
    ids = []
    for event in tts.decoder.run([tts._request(tts._ids(text), voice, None)], SHORT):
        ids += event.ids
    return [ids]


def test_the_three_ways_to_use_a_voice(v2, voice):
    ids = v2._ids("Hi")
    zero_shot = v2._request(ids, voice, None)
    assert v2.words.text(zero_shot.prompt_text.tolist()) == "low hum"
    assert torch.equal(zero_shot.prompt_speech, voice.tokens)
    for request in (v2._request(ids, voice.speaker, None), v2._request(ids, voice, "slowly")):
        assert len(request.prompt_speech) == 0
    assert v2.words.text(request.prompt_text.tolist()) == "slowly<|endofprompt|>"


def test_v3_begins_with_its_system_line_and_v1_speaks_whole(tmp_path, voice):
    v3 = CosyVoiceTTS.load(make(tmp_path / "v3", "v3"))
    v3.model.config.__dict__["marker"] = 259  # here; 151646 in the published vocabulary
    request = v3._request(v3._ids("Hi"), voice.speaker, "slowly")
    line = "You are a helpful assistant. slowly<|endofprompt|>"
    assert v3.words.text(request.prompt_text.tolist()) == line
    own = Voice(embedding=voice.embedding)
    assert len(v3(["Hi."], voice=own, sampling=SHORT, speech=Speech(steps=1))) == 1

    v1 = CosyVoiceTTS.load(make(tmp_path / "v1", "v1"), words=TextCodec())
    assert v1(["Hi."], voice=own, sampling=SHORT, speech=Speech(steps=1))[0].rate == 22_050
    with pytest.raises(CodecUnavailable, match="does not stream"):
        v1.stream("Hi", voice=own)
    with pytest.raises(ValueError, match="v1 takes no instruction"):
        v1(["Hi"], voice=own, instruct="slowly")
    with pytest.raises(WeightsError, match="lies in no model directory"):
        CosyVoiceTTS.load(tmp_path / "v1")


def test_long_silence_is_cut_in_v3_only():
    ids = [5, 1, 2, 28, 29, 55, 248, 1, 7, 1]
    assert Hush("v3").keep(ids) == [5, 1, 2, 28, 29, 55, 7, 1]
    assert Hush("v2").keep(ids) == ids
    one = Hush("v3")
    assert [id for i in ids for id in one.keep([i])] == Hush("v3").keep(ids)


def test_bad_directories_are_named(v2, voice, tmp_path):
    with pytest.raises(WeightsError, match=r"holds 0 of cosyvoice\.yaml"):
        CosyVoiceTTS.load(tmp_path)
    (tmp_path / "cosyvoice2.yaml").touch()
    with pytest.raises(WeightsError, match=r"llm\.pt"):
        CosyVoiceTTS.load(tmp_path)
    with pytest.raises(ValueError, match="1 voices for 2 texts"):
        v2(["a", "b"], voice=[voice])
    decoder = TransformerConfig(vocab_size=9, width=8, ffn=8, layers=1, heads=2, kv_heads=2)
    other = CosyVoiceLM(CosyVoiceLMConfig(transformer=decoder, codes=5))
    with pytest.raises(ValueError, match="has 5 speech tokens, the codec 81"):
        CosyVoiceTTS(v2.codec, other, v2.words, "v2")
    assert v2([], voice=voice) == []
