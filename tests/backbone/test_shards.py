import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from anytok.backbone.corpus import CorpusError
from anytok.backbone.rules import Rule
from anytok.backbone.shards import Shards, plan, tokenize, tokenize_ray
from anytok.codecs.codec import Codec, CodecSpec
from anytok.codecs.layout import Frames
from anytok.modalities.audio import Audio
from anytok.modalities.errors import MediaError
from anytok.modalities.image import Image
from tests.backbone.tiny import Thumbnail

NAMES = ("red apple", "moon", "big cat", "dog", "fish", "tree")


@pytest.fixture
def folder(tmp_path):
    """Six pictures with captions."""
    path = tmp_path / "pictures"
    path.mkdir()
    rng = torch.Generator().manual_seed(0)
    for i, name in enumerate(NAMES):
        Image(torch.rand(3, 8, 8, generator=rng)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(name)
    return path


def documents(path):
    shards = Shards(path)
    return [d for i in range(len(shards)) for d in shards.read(i)]


def content(document):
    return [i if isinstance(i, str) else i.codes.tolist() for i in document.items]


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_folder_becomes_documents_of_text_and_streams(folder, tmp_path):
    report = tokenize([folder], tmp_path / "out", {"image": Thumbnail()}, shard=4)
    assert (report.documents, report.shards, report.errors) == (6, 2, ())
    made = documents(tmp_path / "out")
    assert [d.modalities for d in made] == [("text", "image")] * 6
    assert [d.items[0] for d in made] == list(NAMES)
    want = Thumbnail().encode([Image.load(folder / "3.png")])[0]
    assert torch.equal(made[3].items[1].codes, want.codes)
    Thumbnail().check(made[3].items[1])
    assert {d.split for d in made} <= {"train", "held"}


def test_every_kind_of_source_gives_the_same_documents(folder, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    tokenize([folder], tmp_path / "folder", {"image": Thumbnail()})
    want = [content(d) for d in documents(tmp_path / "folder")]

    recipe = folder / "rows.jsonl"
    rows = [{"image": f"{i}.png", "text": n, "split": "held"} for i, n in enumerate(NAMES)]
    recipe.write_text("\n".join(map(json.dumps, rows)))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for i, name in enumerate(NAMES):
            for extension, data in (
                ("png", (folder / f"{i}.png").read_bytes()),
                ("json", json.dumps({"caption": name}).encode()),
            ):
                member = tarfile.TarInfo(f"a/{i}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    stored = [
        {"image": {"bytes": (folder / f"{i}.png").read_bytes(), "path": None}, "txt": n}
        for i, n in enumerate(NAMES)
    ]
    pa.parquet.write_table(pa.Table.from_pylist(stored), tmp_path / "set.parquet", row_group_size=4)
    features = datasets.Features({"image": datasets.Image(), "txt": datasets.Value("string")})
    made = datasets.Dataset.from_list(stored, features=features)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "saved")

    for name, columns in (
        ("pictures/rows.jsonl", {}),
        ("set.tar", {}),
        ("set.parquet", {"text": "txt"}),
    ):
        out = tmp_path / name.replace("/", "-").replace(".", "-")
        tokenize([tmp_path / name], out, {"image": Thumbnail()}, columns=columns, shard=5)
        assert [content(d) for d in documents(out)] == want, name
    assert documents(tmp_path / "pictures-rows-jsonl")[0].split == "held"
    out = tmp_path / "from-saved"
    tokenize([tmp_path / "saved"], out, {"image": Thumbnail()}, columns={"text": "txt"})
    assert [content(d) for d in documents(out)] == want * 2
    assert [d.split for d in documents(out)] == ["train"] * 6 + ["held"] * 6


def test_interleaved_documents_and_conversations_keep_order_and_roles(folder, tmp_path):
    rows = [
        {"items": [{"image": "0.png"}, {"text": "and"}, {"image": "1.png", "role": "user"}]},
        {"texts": ["first", None, "last"], "images": [None, "2.png", None]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "a dog"},
            ],
            "images": ["3.png"],
        },
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": []},
        {"items": [{"text": "listen"}, {"audio": "0.wav"}]},
    ]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    report = tokenize([folder / "mixed.jsonl"], out, {"image": Thumbnail()})
    a, b, c = documents(out)
    assert a.modalities == ("image", "text", "image")
    assert a.roles == (None, None, "user")
    assert b.modalities == ("text", "image", "text")
    assert c.modalities == ("image", "text", "text")
    assert c.roles == ("user", "user", "assistant")
    assert c.items[2] == "a dog"
    assert [e["document"] for e in report.errors] == ["mixed.jsonl:4", "mixed.jsonl:5"]
    assert "name more images than it has" in report.errors[0]["error"]
    assert "holds audio, expected one of text, image" in report.errors[1]["error"]


class Loudness(Codec):
    """A sound as two codes for each hundred samples: its loudness, and how it goes on."""

    def __init__(self):
        super().__init__()
        self.spec = CodecSpec(
            name="loudness/tiny", modality="audio", vocab=((8, 4),), layout=Frames()
        )

    def encode(self, media, *, options=None, rng=None):
        made = []
        for one in media:
            level = one.samples[0].unfold(0, 100, 100).abs().mean(1).clamp(max=0.99)
            codes = torch.stack([(level * 8).long(), (level * 32).long() % 4], 1)
            made.append(
                self.stream(codes, grid=(len(codes),), meta={"length": one.samples.shape[1]})
            )
        return made


def test_speech_with_transcripts_beside_pictures_in_one_corpus(folder, tmp_path):
    for i in range(2):
        samples = torch.rand(1, 500 + 100 * i, generator=torch.Generator().manual_seed(i))
        Audio(samples, 8000).save(folder / f"speech-{i}.wav")
        (folder / f"speech-{i}.txt").write_text(f"sentence {i}")
    Audio(torch.rand(1, 300), 8000).save(folder / "0.wav")  # beside 0.png and 0.txt
    out = tmp_path / "out"
    tokenize([folder], out, {"image": Thumbnail(), "audio": Loudness()}, batch=3)
    made = {d.name: d for d in documents(out)}
    assert made["0"].modalities == ("text", "image", "audio")
    assert made["1"].modalities == ("text", "image")
    assert made["speech-1"].modalities == ("text", "audio")
    stream = made["speech-1"].items[1]
    Loudness().check(stream)
    (want,) = Loudness().encode([Audio.load(folder / "speech-1.wav")])
    assert torch.equal(stream.codes, want.codes)
    assert (stream.grid, stream.meta) == ((6,), {"length": 600})
    only = tmp_path / "sound"
    tokenize([folder], only, {"audio": Loudness()})
    assert [d.name for d in documents(only)] == ["0", "speech-0", "speech-1"]  # no lone captions


def test_bad_files_are_recorded_and_skipped(folder, tmp_path):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    (folder / "2.txt").write_bytes(b"\xff\xfe bad")
    out = tmp_path / "out"
    report = tokenize([folder], out, {"image": Thumbnail()})
    assert [d.name for d in documents(out)] == ["0", "3", "4", "5"]
    assert [e["document"] for e in report.errors] == ["1", "2"]
    lines = (out / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(report.errors)
    assert "1.png" in report.errors[0]["error"]
    assert "not UTF-8" in report.errors[1]["error"]

    bad = Image.load(folder / "4.png").pixels

    class Fussy(Thumbnail):
        def encode(self, media, *, options=None, rng=None):
            if any(torch.equal(m.pixels, bad) for m in media):
                raise ValueError("too bright")
            return super().encode(media)

    report = tokenize([folder], tmp_path / "fussy", {"image": Fussy()})
    assert [e["document"] for e in report.errors] == ["1", "2", "4"]
    assert report.errors[2]["error"] == "too bright"
    assert [d.name for d in documents(tmp_path / "fussy")] == ["0", "3", "5"]


def test_damaged_sources_are_named(folder, tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 nothing")
    with pytest.raises(MediaError, match="no whole Parquet file"):
        tokenize([bad], tmp_path / "out", {"image": Thumbnail()})
    report = tokenize([bad, folder], tmp_path / "both", {"image": Thumbnail()})
    assert report.documents == 6
    assert "bad.parquet" in report.errors[0]["error"]
    with pytest.raises(MediaError, match="no such file or folder"):
        tokenize([tmp_path / "nowhere"], tmp_path / "out", {"image": Thumbnail()})
    with pytest.raises(CorpusError, match="codes image, it was given for audio"):
        tokenize([folder], tmp_path / "out", {"audio": Thumbnail()})
    for path in folder.glob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(MediaError, match="all 6 documents are bad"):
        tokenize([folder], tmp_path / "none", {"image": Thumbnail()})


SLOW = """
import sys, time
from pathlib import Path
from anytok.backbone.shards import tokenize
from tests.backbone.tiny import Thumbnail

class Slow(Thumbnail):
    def encode(self, media, *, options=None, rng=None):
        time.sleep(0.4)
        return super().encode(media)

tokenize([sys.argv[1]], sys.argv[2], {"image": Slow()}, shard=2)
"""


def test_killed_and_started_again_the_files_are_those_of_one_run(folder, tmp_path):
    tokenize([folder], tmp_path / "whole", {"image": Thumbnail()}, shard=2)
    out = tmp_path / "killed"
    root = Path(__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", SLOW, folder, out], cwd=root)
    end = time.monotonic() + 100
    while not (out / "shard-00000.parquet").is_file():
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / "shard-00002.parquet").is_file()
    with pytest.raises(CorpusError, match=r"lacks . of 3 shards"):
        Shards(out)
    (out / ".shard-00002.0000.parquet").write_bytes(b"half")
    seen = []
    tokenize([folder], out, {"image": Thumbnail()}, shard=2, progress=lambda *x: seen.append(x))
    assert seen[0][0] >= 2  # what was done stays
    assert seen[-1] == (6, 6)
    assert files(out) == files(tmp_path / "whole")


def test_two_workers_write_the_same_files_and_a_dead_one_is_named(folder, tmp_path):
    tokenize([folder], tmp_path / "one", {"image": Thumbnail()}, shard=1)
    tokenize([folder], tmp_path / "two", {"image": Thumbnail()}, shard=1, workers=2)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    with pytest.raises(CorpusError, match=r"a worker died \(exit code 9\) over documents 0 to 5"):
        tokenize([folder], tmp_path / "dead", {"image": Deadly()}, workers=2)


class Deadly(Thumbnail):
    def encode(self, media, *, options=None, rng=None):
        os._exit(9)


def test_another_corpus_in_the_folder_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    tokenize([folder], out, {"image": Thumbnail()}, shard=4)
    with pytest.raises(CorpusError, match="other rules"):
        plan([folder], out, {"image": Thumbnail(brightest=0.5)}, shard=4)
    (folder / "7.txt").write_text("new")
    with pytest.raises(CorpusError, match="other sources"):
        plan([folder], out, {"image": Thumbnail()}, shard=4)
    other = Thumbnail(brightest=0.5)
    with pytest.raises(CorpusError, match=f"the model reads '{other.identity}'"):
        Shards(out).check([Rule.of(other)])
    shard = out / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(CorpusError, match=r"shard-00001\.parquet: not a whole shard"):
        Shards(out).read(1)


def test_a_local_ray_cluster_of_two_workers_writes_the_same_files(folder, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: starves on a crowded machine
    tokenize([folder], tmp_path / "one", {"image": Thumbnail()}, shard=2)
    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=3,  # two for the workers, one for Ray Data's own tasks
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    try:
        tokenize_ray([folder], tmp_path / "ray", {"image": Thumbnail()}, shard=2, workers=2)
    finally:
        ray.shutdown()
    assert files(tmp_path / "ray") == files(tmp_path / "one")
