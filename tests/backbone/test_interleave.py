import dataclasses
import json

import pytest
import torch

from anytok.backbone.interleave import BOS, EOS, Interleaver, Item, Packed, fill
from anytok.backbone.rules import Rule
from anytok.backbone.vocabulary import Block, Vocabulary, VocabularyError
from anytok.codecs.layout import Frames, Grid, Octree, Prefix
from anytok.codecs.stream import Part, StreamError, TokenStream
from anytok.codecs.text import TextCodec
from anytok.modalities.text import Text
from tests.backbone.tiny import RULES, Thumbnail


@pytest.fixture
def interleaver():
    return Interleaver.build([Rule.of(TextCodec()), Rule.of(Thumbnail())], multiple=64)


def picture(n=5):
    return Thumbnail().stream(torch.arange(n) % 16)


def text(words="hi"):
    return TextCodec().encode([Text(words)])[0]


def test_a_document_has_blocks_and_its_targets_have_weight(interleaver):
    weights = torch.tensor([3.0, 1, 1, 1, 1])
    packed = interleaver.pack(
        [Item(stream=text(), target=False), Item(stream=picture(), weights=weights)]
    )
    special = interleaver.vocabulary.special
    assert packed.ids.tolist()[:2] == [special(BOS), special("<text>")]
    assert packed.ids[-1] == special(EOS)
    assert packed.weights.tolist() == [0, 0, 0, 0, 0, 1, 3, 1, 1, 1, 1, 1, 1]
    assert [(s.block, s.start, s.stop) for s in packed.segments] == [
        ("text", 2, 4),
        ("image", 6, 11),
    ]
    assert packed.positions.tolist() == list(range(13))


def test_parse_gives_the_streams_back(interleaver):
    streams = [text("red apple"), picture(7), picture(1)]
    packed = interleaver.pack([Item(stream=s) for s in streams])
    found = interleaver.parse(packed.ids)
    assert [s.codes.tolist() for s in found] == [s.codes.tolist() for s in streams]
    assert TextCodec().decode(found[:1])[0].text == "red apple"
    Thumbnail().check(found[1])


def test_json_keeps_everything():
    rules = [RULES[name] for name in ("text", "grid", "frames", "runs", "octree")]
    interleaver = Interleaver.build(rules, multiple=128)
    again = Interleaver.from_json(json.loads(json.dumps(interleaver.to_json())))
    assert again.rules == interleaver.rules
    assert again.vocabulary == interleaver.vocabulary
    assert interleaver.vocabulary.size % 128 == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (lambda i: [i.tags("image")[0], 90], "does not close"),
        (lambda i: [i.tags("image")[0], i.tags("image")[1]], "0 ids"),
        (lambda i: [90], "stands in no block"),
        (lambda i: [i.tags("image")[0], 9, i.tags("image")[1]], "not one of 'thumbnail/tiny'"),
    ],
)
def test_what_is_no_document_is_refused_with_its_place(interleaver, ids, message):
    with pytest.raises(StreamError, match=message):
        interleaver.parse(ids(interleaver))


def test_foreign_streams_are_refused(interleaver):
    stranger = dataclasses.replace(picture(), codec="thumbnail/tiny@00000000")
    with pytest.raises(StreamError, match="written by codec 'thumbnail/tiny@00000000'"):
        interleaver.ids(stranger)
    with pytest.raises(ValueError, match="knows no 'audio', only text, image"):
        interleaver.rule("audio")


def test_more_positions_than_the_rule_takes_are_refused():
    codec = Thumbnail()
    interleaver = Interleaver.build([Rule.of(codec, limit=4)])
    with pytest.raises(StreamError, match="5 positions, the model takes 4"):
        interleaver.ids(picture(5))


def test_rules_refuse_what_has_no_order():
    with pytest.raises(ValueError, match="give `shape`"):
        dataclasses.replace(RULES["grid"], layout=Grid(None))
    with pytest.raises(ValueError, match="octree"):
        dataclasses.replace(RULES["text"], flatten="octree")
    with pytest.raises(ValueError, match="does not decode from its first 1 depths"):
        Rule.of(Thumbnail(), depths=1)
    rule = dataclasses.replace(RULES["grid"], layout=Grid(None), shape=(2, 2))
    assert rule.unit == 4
    assert rule.grid(4) == (2, 2)


def test_depth_first_order_is_mios():
    codes = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    rule = RULES["runs"]
    interleaver = Interleaver.build([rule])
    stream = TokenStream(
        parts=(Part(codes, rule.vocab[0]),), codec=rule.codec, modality="audio", grid=(2,)
    )
    starts = [b.start for b in interleaver.vocabulary.of(rule.name)]
    ids = interleaver.ids(stream)
    assert ids.tolist() == [starts[d] + int(codes[n, d]) for d in range(4) for n in range(2)]
    assert interleaver.stream(ids, "audio").codes.tolist() == codes.tolist()


def test_octree_packs_eight_bits_an_id():
    rule = dataclasses.replace(RULES["octree"], layout=Octree(1, 2), vocab=((2,), (2,) * 16))
    interleaver = Interleaver.build([rule])
    split = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1])[:, None]
    codes = (torch.arange(16 * 16) % 3 == 0).long().view(16, 16)
    stream = TokenStream(
        parts=(Part(split, (2,)), Part(codes, (2,) * 16)), codec=rule.codec, modality="shape"
    )
    ids = interleaver.ids(stream)
    assert len(ids) == 1 + 16 * 2
    assert ids[0] == interleaver.vocabulary.of(rule.name)[0].start + 0b10000001
    back = interleaver.stream(ids, "shape")
    assert torch.equal(back.parts[1].codes, codes)
    with pytest.raises(StreamError, match="needs 32 ids"):
        interleaver.stream(ids[:-1], "shape")


def test_first_depths_of_a_deeper_stream():
    rule = dataclasses.replace(RULES["depths"], vocab=((10, 11),), depth_prefix=True)
    interleaver = Interleaver.build([rule])
    codes = torch.tensor([[1, 2, 3]])
    stream = TokenStream(
        parts=(Part(codes, (10, 11, 12)),),
        codec=rule.codec,
        modality="audio",
        grid=(1,),
        depth_prefix=True,
    )
    assert interleaver.stream(interleaver.ids(stream), "audio").codes.tolist() == [[1, 2]]


def test_packing_joins_documents(interleaver):
    documents = [interleaver.pack([Item(stream=picture(n))]) for n in (3, 9, 2, 4)]
    rows = fill(documents, 20)
    assert sorted(len(row) for row in rows) == [13, 19] or sum(map(len, rows)) == 34
    assert all(len(row) <= 20 for row in rows)
    joined = Packed.join(documents[:2])
    assert joined.documents.tolist() == [0] * 7 + [1] * 13
    assert joined.positions.tolist() == [*range(7), *range(13)]
    assert joined.segments[1].start == 7 + 2
    assert joined.segments[1].document == 1
    with pytest.raises(ValueError, match="13 ids, the context has 10"):
        fill(documents, 10)


def test_vocabulary_refuses_overlaps_and_unknown_names():
    with pytest.raises(VocabularyError, match="id 3 belongs to a/b part 0 depth 0 and to <x>"):
        Vocabulary(size=9, specials={"<x>": 3}, blocks=(Block(codec="a/b", start=2, size=4),))
    with pytest.raises(VocabularyError, match="the vocabulary has 4"):
        Vocabulary(size=4, specials={}, blocks=(Block(codec="a/b", start=2, size=4),))
    vocabulary = Vocabulary.build(["<x>"], [Block(codec="a/b", start=0, size=4)])
    assert vocabulary.name(0) == "<x>"
    assert vocabulary.name(3) == "a/b:2"
    assert vocabulary.name(99) == "unused id 99"
    with pytest.raises(VocabularyError, match="no special '<y>'"):
        vocabulary.special("<y>")
    with pytest.raises(VocabularyError, match="no block of codec 'c/d'"):
        vocabulary.of("c/d")
    with pytest.raises(VocabularyError, match="not a vocabulary"):
        Vocabulary.from_json({"size": 3})


def test_mios_layout_loads():
    """MIO-7B's 76,294 ids (its config.json): text, specials, images, speech in four runs."""
    names = ["[SPCH]", "</spch>", "[IMG]", "<spch>", "</image>", "<image>"]
    sizes = [("text/mio", 0, 64000), ("seed/2", 64006, 8192)]
    blocks = [Block(codec=codec, start=start, size=size) for codec, start, size in sizes]
    blocks += [
        Block(codec="speechtokenizer/mio", depth=d, start=72198 + 1024 * d, size=1024)
        for d in range(4)
    ]
    vocabulary = Vocabulary(
        size=76294, specials={n: 64000 + i for i, n in enumerate(names)}, blocks=tuple(blocks)
    )
    assert vocabulary.name(64005) == "<image>"
    assert vocabulary.name(76293) == "speechtokenizer/mio/0.3:1023"


def test_layout_counts():
    assert RULES["frames"].unit == 4
    assert RULES["frames"].most == 3
    assert dataclasses.replace(RULES["frames"], limit=2).most == 2
    assert dataclasses.replace(RULES["prefix"], layout=Prefix(8), prefix_step=4).most == 2
    assert dataclasses.replace(RULES["text"], layout=Frames((), 7)).most == 7


def test_what_is_only_read_can_share_positions():
    codec = Thumbnail()
    interleaver = Interleaver.build([Rule.of(TextCodec()), Rule.of(codec, stack=4)])
    packed = interleaver.pack(
        [Item(stream=picture(6), target=False), Item(stream=picture(6)), Item(stream=text())]
    )
    place = interleaver.vocabulary.special("<place>")
    assert (packed.ids == place).nonzero().flatten().tolist() == [2, 3]
    ids = interleaver.ids(picture(6)).tolist()
    assert packed.stacked.tolist() == [ids[:4], [*ids[4:], -1, -1]]
    assert [(s.kind, s.stop - s.start) for s in packed.segments] == [
        ("codes", 2),
        ("ids", 6),
        ("ids", 2),
    ]
    assert Packed.join([packed, packed]).stacked.shape == (4, 4)
