import dataclasses
import json

import pytest
import torch

from anytok.backbone.corpus import Corpus, CorpusError, changed, changed_picture, tokenize
from anytok.codecs.text import TextCodec
from anytok.modalities.image import Image
from tests.backbone.tiny import Thumbnail

NAMES = ("red apple", "moon", "cat", "dog", "sun")


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    rows = []
    for i, name in enumerate(NAMES):
        Image(torch.rand(3, 8, 8, generator=rng)).save(folder / f"{i}.png")
        split = "held" if i == 4 else "train"
        rows.append({"image": f"{i}.png", "text": name, "style": "noto", "split": split})
    rows.append({"text": "words alone", "style": "noto", "split": "train"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def same(a, b):
    def key(d):
        return (d.item, d.copy)

    assert sorted(map(key, a)) == sorted(map(key, b))
    for x, y in zip(sorted(a, key=key), sorted(b, key=key)):
        assert x.row == y.row
        assert x.modalities == y.modalities
        assert all(torch.equal(x.stream(m).codes, y.stream(m).codes) for m in x.modalities)


def build(recipe, out, **options):
    codecs = {"image": Thumbnail(), "text": TextCodec()}
    return tokenize(
        recipe, out, codecs, copies=3, augment={"image": changed_picture}, shard=2, **options
    )


def test_a_corpus_holds_what_the_codecs_say(recipe, tmp_path):
    corpus = Corpus(build(recipe, tmp_path / "corpus"))
    assert len(corpus.documents) == 5 * 3 + 1
    assert [len(copies) for copies in corpus.items("train")] == [3] * 5
    first = corpus.documents[0]
    picture = Image.load(recipe / "0.png")
    want = Thumbnail().encode([picture])[0]
    assert torch.equal(first.stream("image").codes, want.codes)
    Thumbnail().check(first.stream("image"))
    assert TextCodec().decode([first.stream("text")])[0].text == "red apple"
    assert first.row["style"] == "noto"
    assert "image" not in corpus.documents[-1].modalities
    copies = corpus.items("train")[0]
    assert not torch.equal(copies[1].stream("image").codes, copies[2].stream("image").codes)


def test_a_stopped_run_goes_on_and_two_processes_share_the_work(recipe, tmp_path):
    whole = Corpus(build(recipe, tmp_path / "whole"))
    seen = []

    def stop(done, total):
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recipe, tmp_path / "again", progress=stop)
    same(Corpus(build(recipe, tmp_path / "again")).documents, whole.documents)
    for i in range(2):
        build(recipe, tmp_path / "shared", share=(i, 2))
    same(Corpus(tmp_path / "shared").documents, whole.documents)


def test_foreign_and_damaged_corpora_are_named(recipe, tmp_path):
    out = build(recipe, tmp_path / "corpus")
    with pytest.raises(CorpusError, match="other codecs or settings"):
        tokenize(recipe, out, {"image": Thumbnail()})
    corpus = Corpus(out)
    other = dataclasses.replace(corpus.rules["image"], codec="thumbnail/tiny@00000000")
    with pytest.raises(CorpusError, match="was tokenised with 'thumbnail/tiny@"):
        corpus.check([other])
    shard = out / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(CorpusError, match=r"shard-00001\.parquet: not a whole Parquet file"):
        Corpus(out)
    with pytest.raises(CorpusError, match=r"holds no corpus\.json"):
        Corpus(tmp_path)
    about = json.loads((out / "corpus.json").read_text())
    (out / "corpus.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(CorpusError, match="format 9"):
        Corpus(out)


def test_augmentation_repeats_with_its_seed_and_stays_a_picture():
    drawings = torch.rand(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    a, b, c = (changed(drawings, 8, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (5, 3, 8, 8)
    assert a.min() >= 0
    assert a.max() <= 1
    drawings[:, 3] = 0  # nothing drawn: the ground alone is left
    grounds = changed(drawings, 8, torch.Generator().manual_seed(3))
    torch.testing.assert_close(grounds, grounds[:, :, :1, :1].expand_as(grounds))
