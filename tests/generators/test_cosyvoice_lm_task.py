"""Training CosyVoice's language model: a run on a folder of sounds, and a file under the published keys."""

import json

import pytest
import torch

from anytok.codecs import save_codec
from anytok.codecs.audio.cosyvoice.s3 import S3Config, S3Tokenizer
from anytok.codecs.published import read_weights
from anytok.codecs.training.engine import run
from anytok.codecs.training.entry import ConfigError
from anytok.codecs.training.task import RunConfig
from anytok.generators.cosyvoice_lm import CosyVoiceLM
from anytok.generators.cosyvoice_lm_task import task
from anytok.generators.speech_decoder import SpeechDecoder, SpeechRequest
from tests.codecs.audio.test_cosyvoice import sound


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("utterances")
    torch.manual_seed(0)
    codec = S3Tokenizer(S3Config(version="v2", width=64, heads=1, layers=1, codes=81))
    torch.nn.init.normal_(codec.quantizer._codebook.project_down.weight)
    save_codec(codec, root / "codec.safetensors", name="cosyvoice/s3-tiny")
    (root / "said").mkdir()
    rows = []
    for i in range(3):
        sound(1.0 + 0.4 * i, seed=i).save(root / "said" / f"{i}.wav")
        split = "held" if i == 2 else "train"
        rows.append({"audio": f"{i}.wav", "text": "abc def", "seconds": 1.0, "split": split})
    (root / "said" / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def config(folder, **model):
    sizes = {"width": 16, "ffn": 16, "layers": 1, "heads": 2, "kv_heads": 1, "context": 128}
    codec = str(folder / "codec.safetensors")
    return {
        "task": "cosyvoice_lm",
        "model": {**sizes, **model},
        "data": {"root": str(folder), "sets": ["said"], "codec": codec},
    }


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_run_trains_and_its_file_loads_by_published_key(folder, tmp_path, version):
    own = task(config(folder, version=version))
    path = run(own, RunConfig(out=str(tmp_path), steps=2, batch_size=2, tensorboard=False))
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    rest = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    model = CosyVoiceLM.from_published(read_weights(path).tensors, {**sizes, **rest})
    assert model.config.version == version
    assert set(own.evaluate({"lm": model}, 0)) == {"whole", "blocks"}
    if version == "v2":
        request = SpeechRequest(text=own.sample(own.dataset().rows[0])[0])
        *_, last = SpeechDecoder(model).run([request])
        assert last.total >= 14


def test_bad_configs_are_named(folder):
    with pytest.raises(ConfigError, match="layrs"):
        task(config(folder, layrs=2))
