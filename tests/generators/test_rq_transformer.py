"""Depth head and RQ-Transformer: distributions, steps that equal whole passes, draws that follow the model."""

import itertools

import pytest
import torch

from anytok.backbone.depth import CodeTables, DepthConfig, DepthHead, stacked_positions
from anytok.backbone.interleave import Packed, Segment
from anytok.codecs.image.rqvae import RQVAE, RQVAEConfig
from anytok.generators.rq_transformer import RQTransformer, RQTransformerConfig
from anytok.generators.rvq_body import CodeRequest
from anytok.generators.sampling import Sampling

SIZES = {
    "vocab": (3, 2), "vectors": 4, "conditions": 5, "longest": 16, "width": 16, "layers": 2,
    "heads": 2, "depth_width": 8, "depth_layers": 1, "depth_heads": 2,
}  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def strong(net):
    for p in net.parameters():
        p.data.add_(torch.randn(p.shape, generator=rng(6)) * 0.3)
    return net.eval()


def model(**changes):
    torch.manual_seed(0)
    return strong(RQTransformer(RQTransformerConfig(**{**SIZES, **changes})))


def draw(net, requests, options=None, rngs=None):
    last = {event.request: event for event in net.run(requests, options, rngs)}
    assert all(event.done for event in last.values())
    return [last[i].codes for i in range(len(requests))]


def test_depths_of_a_position_are_a_distribution():
    torch.manual_seed(0)
    head = strong(DepthHead(DepthConfig(vocab=(3, 2, 4), hidden=6, width=8, layers=1, heads=2)))
    every = torch.tensor(list(itertools.product(range(3), range(2), range(4))))
    hidden = torch.randn(1, 6, generator=rng())
    p = (-head.losses(hidden.expand(24, -1), every).sum(1)).exp()
    assert torch.isclose(p.sum(), torch.tensor(1.0))
    assert p.std() > 1e-3


def test_depth_steps_equal_a_whole_pass():
    torch.manual_seed(0)
    head = strong(DepthHead(DepthConfig(vocab=(5,) * 4, hidden=6, width=8, heads=2, vectors=3)))
    hidden, codes = torch.randn(7, 6, generator=rng()), torch.randint(5, (7, 4), generator=rng())
    whole = head(hidden, codes)
    cache, x = head.begin(7), head.first(hidden)
    for depth in range(4):
        torch.testing.assert_close(head.step(x, cache), whole[depth])
        x = head.tables.sums(codes[:, : depth + 1])[:, -1]


def test_sequences_are_a_distribution_and_what_is_drawn():
    net = model()
    every = torch.tensor(list(itertools.product(range(3), range(2), repeat=2))).view(-1, 2, 2)
    condition = torch.tensor([1, 4])
    losses = net.losses(list(every), [condition] * 36).view(36, -1).sum(1)
    p = (-losses).exp().detach()
    assert torch.isclose(p.sum(), torch.tensor(1.0), atol=1e-5)
    asks = [CodeRequest(length=2, condition=condition)] * 1500
    drawn = torch.stack(draw(net, asks, None, [rng(i) for i in range(1500)]))
    share = (drawn[:, None] == every).flatten(2).all(2).float().mean(0)
    assert (share - p).abs().max() < 0.05


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_rows_do_not_depend_on_their_neighbours(cfg):
    net, options = model(), Sampling(cfg=cfg)
    asks = [CodeRequest(length=n, condition=torch.arange(n % 3)) for n in (3, 6, 1, 4)]
    together = draw(net, asks, options, [rng(i) for i in range(4)])
    alone = [draw(net, [a], options, [rng(i)])[0] for i, a in enumerate(asks)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone))
    assert [len(codes) for codes in together] == [3, 6, 1, 4]


def test_greedy_codes_are_the_likeliest_and_forwards_are_counted():
    net = model(longest=40)
    ask = CodeRequest(length=9, condition=torch.tensor([2]))
    events = list(net.run([ask], Sampling(temperature=0)))
    assert [event.forwards for event in events] == [3 * (i + 1) for i in range(9)]
    codes = events[-1].codes
    first = net.losses([codes], [ask.condition])
    for depth, size in enumerate((3, 2)):
        for other in range(size):
            changed = codes.clone()
            changed[:, depth] = other
            for i in range(9):
                one = codes.clone()
                one[i, depth] = changed[i, depth]
                again = net.losses([one], [ask.condition])[i, depth]
                assert again >= first[i, depth] - 1e-5


def test_grounded_in_a_codec_of_pictures():
    sizes = {"channels": 32, "multipliers": (1, 1), "latent_channels": 8, "code_width": 4}
    codec = RQVAE(RQVAEConfig(**sizes, image_size=8, codes=16, depth=3))
    net = model(vocab=(16,) * 3)
    net.ground(codec)
    table = codec.code_vectors(0, 0)
    scale = table.square().mean().sqrt()
    codes = torch.randint(16, (5, 3), generator=rng())
    expected = torch.stack([table[codes[:, j]] for j in range(3)], 1) / scale
    torch.testing.assert_close(net.tables.vectors(codes), expected)
    torch.testing.assert_close(net.head.tables.vectors(codes), expected)
    codec.spec = type(codec.spec)(**{**vars(codec.spec), "compose": "single"})
    with pytest.raises(ValueError, match="expected a residual codec"):
        net.ground(codec)


def test_it_learns_what_hangs_on_condition_and_on_the_depth_above():
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab": (4, 4), "width": 32, "depth_width": 32}
    net, g = RQTransformer(RQTransformerConfig(**sizes)), rng()
    for tables in (net.tables, net.head.tables):
        tables.ground(list(torch.eye(4).expand(2, 4, 4)))
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(150):
        labels = torch.randint(4, (16,), generator=g)
        first = torch.randint(4, (16, 3), generator=g)
        first[:, 0] = labels
        codes = torch.stack([first, 3 - first], -1)
        loss = net.loss(list(codes), list(labels[:, None]), g)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    each = net.losses(list(codes), list(labels[:, None])).view(16, 3, 2).mean(0).detach()
    assert each[:, 1].max() < 0.2  # the depth above tells
    assert each[0, 0] < 0.2  # the condition tells
    assert each[1:, 0].min() > 1.0  # nothing does: log 4 = 1.39


def test_stacked_positions_of_a_sequence():
    data = torch.tensor([[1, 2], [3, 4]])
    segment = Segment(start=2, stop=4, kind="codes", block="audio", data=data)
    line = torch.arange(5)
    packed = Packed(
        ids=line, weights=line.float(), positions=line, documents=line * 0, segments=(segment,)
    )
    places, codes = stacked_positions(packed)
    assert places.tolist() == [1, 2]
    assert torch.equal(codes, data)
    head = DepthHead(DepthConfig(vocab=(5, 5), hidden=6, width=8, layers=1, heads=2)).eval()
    hidden = torch.randn(5, 6, generator=rng())[places]
    partly = codes.masked_fill(codes == 4, -1)
    whole, rest = head.losses(hidden, codes), head.losses(hidden, partly)
    assert rest[1, 1] == 0
    torch.testing.assert_close(rest.flatten()[:3], whole.flatten()[:3])
    with pytest.raises(ValueError, match="no stacked positions"):
        stacked_positions(Packed(ids=line, weights=line, positions=line, documents=line))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="vocab is empty"):
        DepthConfig(vocab=(), hidden=4)
    with pytest.raises(ValueError, match=r"code vectors are \(6, 4\)"):
        CodeTables((3, 2), 8, 4).ground([torch.zeros(3, 4), torch.zeros(3, 4)])
    with pytest.raises(ValueError, match="length 0"):
        model().run([CodeRequest(length=0)])
