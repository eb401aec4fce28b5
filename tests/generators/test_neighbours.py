import pytest
import torch

from anytok.backbone.interleave import Interleaver
from anytok.backbone.rules import Rule
from anytok.codecs.quantizers.fsq import FSQ
from anytok.codecs.text import TextCodec
from anytok.generators.neighbours import NeighbourError, NeighbourTable, Relatives, nearest
from tests.backbone.tiny import Thumbnail


class Positions(Thumbnail):
    """Each of 16 positions has a table of its own."""

    def __init__(self):
        super().__init__("thumbnail/positions")
        object.__setattr__(self.spec, "position_tables", 16)

    def position_vectors(self, position):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(position))
        return self.levels[order][:, None]


def test_nearest_equals_comparing_all_with_all():
    vectors = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 3
    near = nearest(vectors, 12)
    whole = torch.cdist(vectors.double(), vectors.double()).fill_diagonal_(9e9)
    assert torch.allclose(near.distances.double(), whole.sort(-1).values[:, :12], atol=1e-5)
    assert near.ids.long().equal(whole.argsort(-1)[:, :12])


@pytest.mark.parametrize("levels", [(5, 4, 3), (8, 8), (2, 2, 2, 2)])
@pytest.mark.parametrize("k", [1, 13])
def test_neighbourhoods_of_a_lattice(levels, k):
    fsq = FSQ(levels)
    vectors = fsq.vectors(torch.arange(fsq.size))
    near = nearest(vectors, k)
    whole = torch.cdist(vectors.double(), vectors.double()).fill_diagonal_(9e9)
    assert torch.allclose(near.distances.double(), whole.sort(-1).values[:, :k], atol=1e-6)
    assert torch.allclose(whole.gather(1, near.ids.long()), near.distances.double(), atol=1e-6)
    assert all(len(set(row.tolist())) == k for row in near.ids)


def test_bad_tables_are_refused():
    vectors = torch.randn(9, 2)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 8: a codebook of 9 codes"):
            nearest(vectors, k)
    with pytest.raises(NeighbourError, match="not finite"):
        nearest(torch.full((9, 2), torch.nan), 2)


def test_tables_are_kept_and_serve_no_other_codebook(tmp_path):
    codec, other = Thumbnail(), Thumbnail(brightest=0.5)
    table = NeighbourTable.of(codec, 4, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    again = NeighbourTable.of(codec, 4, folder=tmp_path)
    assert again.codec == codec.identity
    assert again.blocks[0, 0, 0].ids.equal(table.blocks[0, 0, 0].ids)
    assert again.cut(2).blocks[0, 0, 0].ids.tolist()[0] == [1, 2]
    with pytest.raises(NeighbourError, match=r"is a table of 'thumbnail/tiny@.*cannot serve"):
        NeighbourTable.load(file, other)
    with pytest.raises(ValueError, match=r"k is 5, the table of .* has 1 to 4"):
        table.cut(5)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(NeighbourError, match="not a whole table"):
        NeighbourTable.load(file)
    interleaver = Interleaver.build([Rule.of(TextCodec(), limit=4), Rule.of(codec)])
    with pytest.raises(NeighbourError, match="the model's codecs are"):
        Relatives(interleaver, NeighbourTable.build(other, 4))


def test_relatives_stay_in_their_block():
    codec = Positions()
    interleaver = Interleaver.build([Rule.of(TextCodec(), limit=4), Rule.of(codec)])
    relatives = Relatives(interleaver, NeighbourTable.build(codec, 3))
    for block in interleaver.vocabulary.of(codec.spec.name):
        near = relatives.of(torch.arange(block.start, block.stop))
        assert bool(((near.ids >= block.start) & (near.ids < block.stop)).all())
        vectors = codec.position_vectors(block.position)
        gaps = (vectors[near.ids - block.start] - vectors[:, None]).norm(dim=-1)
        assert torch.allclose(gaps, near.distances, atol=1e-4)
    outside = relatives.of(torch.tensor([[0, 5], [-1, interleaver.tags("image")[1]]]), 2)
    assert outside.ids.eq(-1).all()
    assert outside.distances.isinf().all()
    assert outside.ids.shape == (2, 2, 2)
