import dataclasses

import pytest
import torch

from anytok.backbone.grammar import Grammar
from anytok.backbone.grounded import Grounded, Grounding
from anytok.backbone.interleave import Interleaver, Item
from anytok.backbone.rules import Rule
from anytok.backbone.transformer import TransformerConfig
from anytok.codecs.codec import CodecUnavailable
from anytok.codecs.text import TextCodec
from anytok.modalities.text import Text
from tests.backbone.tiny import Thumbnail


class Positions(Thumbnail):
    """Each position has levels of its own."""

    def __init__(self):
        super().__init__()
        self.spec = dataclasses.replace(self.spec, position_tables=16)

    def position_vectors(self, position):
        vectors = torch.zeros(16, 20)
        vectors[:, position] = self.levels
        vectors[:, position + 1] = self.levels.flip(0) ** 2
        return vectors


@pytest.fixture(params=[Thumbnail, Positions])
def parts(request):
    codec = request.param()
    interleaver = Interleaver.build([Rule.of(TextCodec()), Rule.of(codec, limit=6)], multiple=32)
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=interleaver.vocabulary.size,
        width=16,
        ffn=24,
        layers=2,
        heads=2,
        kv_heads=2,
        context=64,
    )
    network = Grounded(config, Grounding.of(interleaver, codec))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return codec, interleaver, network


def document(codec, interleaver, n):
    text = TextCodec().encode([Text("hi")])[0]
    picture = codec.stream(torch.tensor([3, 9, 14, 0, 1, 7])[:n])
    return interleaver.pack([Item(stream=text), Item(stream=picture)]).ids[None]


@torch.no_grad()
def test_folding_gives_the_same_hidden_states_and_losses(parts):
    codec, interleaver, network = parts
    network.eval()
    folded = network.folded()
    grammar = Grammar(interleaver)
    for n in (6, 4, 1):
        ids = document(codec, interleaver, n)
        out = folded(ids)
        hidden = network(ids)
        torch.testing.assert_close(out.hidden, hidden, atol=1e-5, rtol=1e-4)
        slots = network.slots(ids)[0, 1:]
        losses = network.losses(hidden[0, :-1], ids[0, 1:], slots)
        # The same from the folded model's logits, over what the grammar allows within the picture.
        opening = (ids[0] == interleaver.tags("image")[0]).nonzero().item()
        state = grammar.advance(grammar.start(["image"]), ids[0, opening : opening + 1].tolist())
        for place in range(opening, len(ids[0]) - 2):
            allowed = [i for a, b in grammar.allowed(state) for i in range(a, b)]
            if place == opening:
                allowed.append(interleaver.tags("image")[1])  # never a target there
            target = int(ids[0, place + 1])
            want = torch.logsumexp(out.logits[0, place, allowed], 0) - out.logits[0, place, target]
            if len(allowed) > 1:
                torch.testing.assert_close(losses[place], want, atol=1e-4, rtol=1e-4)
            elif network.by_position:
                assert losses[place] == 0
            state = grammar.advance(state, [target])


def test_slots_say_where_each_id_is_drawn_from(parts):
    codec, interleaver, network = parts
    slots = network.slots(document(codec, interleaver, 3))[0].tolist()
    picture = [0, 1, 2, 3] if network.by_position else [0] * 4
    assert slots == [-1] * 6 + picture + [-1]
    if network.by_position:  # after the last position the closing id is forced
        assert network.slots(document(codec, interleaver, 6))[0, -2] == -2


def test_every_position_has_its_own_block():
    rule = Rule.of(Positions(), limit=6)
    assert len(rule.blocks()) == 6
    interleaver = Interleaver.build([rule])
    stream = Positions().stream(torch.tensor([5, 5, 5]))
    ids = interleaver.ids(stream)
    assert ids.diff().tolist() == [16, 16]
    assert interleaver.stream(ids, "image").codes[:, 0].tolist() == [5, 5, 5]


def test_gradients_reach_the_maps(parts):
    codec, interleaver, network = parts
    ids = document(codec, interleaver, 6)
    hidden = network(ids)[0, :-1]
    network.losses(hidden, ids[0, 1:], network.slots(ids)[0, 1:]).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_a_codec_without_vectors_is_named():
    class Silent(Thumbnail):
        def code_vectors(self, part=0, depth=0):
            raise CodecUnavailable("'thumbnail/tiny' has no table of code vectors")

    interleaver = Interleaver.build([Rule.of(Silent())])
    with pytest.raises(CodecUnavailable, match="no table of code vectors"):
        Grounding.of(interleaver, Silent())
