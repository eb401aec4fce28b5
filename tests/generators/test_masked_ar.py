"""TokenBridge's generator against the published code's numbers; batches; frozen positions; files."""

import pytest
import torch

from anytok.backbone.heads import DimensionWise, DimensionWiseConfig
from anytok.codecs.image.kl16 import KL16Config
from anytok.codecs.image.tokenbridge import TokenBridge, TokenBridgeConfig
from anytok.codecs.published import WeightsError
from anytok.generators import masked_ar
from anytok.generators.masked_ar import (
    ORDER,
    SIZES,
    CodesRequest,
    MaskedAR,
    MaskedARConfig,
    MaskedARNetwork,
    MaskedAROptions,
    infer_config,
)
from anytok.generators.published import load_generator
from tests.golden.load import load_golden

HEADS = {"heads": 4}  # in no shape, and not the published rule at the fixture's width


@pytest.fixture(scope="module")
def golden():
    return load_golden("image_tokenbridge")


@pytest.fixture(scope="module")
def network(golden):
    return MaskedARNetwork.from_published(golden["state_dict"], HEADS)


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {
        "grid": (3, 3), "width": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "head_width": 16,
        "head_layers": 2, "head_heads": 2, "buffer": 2, "classes": 4, "bits": 3, "order": (2, 0, 1),
    }  # fmt: skip
    network = MaskedARNetwork(MaskedARConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return network


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


@torch.no_grad()
def test_encoder_and_decoder(network, golden):
    out = golden["outputs"]
    known = out["mask"] == 0
    places = network._places(known)
    encoded = network.encode(out["model_quant_idx"], places, out["labels"])
    torch.testing.assert_close(encoded, out["enc"], atol=1e-5, rtol=0)
    features = network(out["model_quant_idx"], known, out["labels"])
    torch.testing.assert_close(features, out["dec"], atol=1e-5, rtol=0)
    # what stands at open positions is not read
    noise = torch.where(known[..., None], out["model_quant_idx"], 5)
    assert torch.equal(network(noise, known, out["labels"]), features)


@torch.no_grad()
def test_head_and_its_training_form(network, golden, monkeypatch):
    out = golden["outputs"]
    open_ = out["mask"] == 1
    features, codes = out["dec"][open_], out["model_quant_idx"][open_][:, list(ORDER)]
    sampled = network.head.sample(features, lambda logits, i: logits.argmax(-1))
    assert torch.equal(sampled, out["head_greedy"])
    # cached steps are what the whole sequence gives at once
    whole = network.head(features, sampled)
    assert torch.equal(whole.argmax(-1), sampled)
    # the published training form feeds the first step without its embedding; the recorded logits are of that form
    head = MaskedARNetwork.from_published(golden["state_dict"], HEADS).head
    head.channel_embed[:, 0] -= head.timesteps_embeddings[:, 0]
    torch.testing.assert_close(head(features, codes), out["head_logits_teacher"], atol=1e-5, rtol=0)
    off = (network.head(features, codes) - out["head_logits_teacher"]).abs().max()
    assert off > 1e-3  # so the two forms do differ


@pytest.mark.parametrize(
    "name", ["greedy_cfg1", "greedy_cfg3_linear", "greedy_cfg3_const", "sampled"]
)
def test_published_samples(network, golden, monkeypatch, name):
    sample, labels = golden["samples"][name], golden["outputs"]["labels"].tolist()
    args = sample["args"]
    orders = iter(golden["samples"]["orders_seed5"])
    monkeypatch.setattr(masked_ar, "random_order", lambda n, rng: next(orders))
    rng = torch.Generator().manual_seed(5)

    def multinomial(logits, sampling, spots):
        laws = (logits / sampling.temperature).softmax(-1)
        return torch.multinomial(laws, 1, generator=rng).squeeze(-1)

    if args["temperature"]:
        monkeypatch.setattr(masked_ar, "choose", multinomial)
    options = MaskedAROptions(
        steps=args["num_iter"],
        cfg=args["cfg"],
        schedule=args.get("cfg_schedule", "linear"),
        temperature=args["temperature"],
    )
    codes = MaskedAR(network).fill([CodesRequest(label=n) for n in labels], options)
    latents = network.quantizer.dequantize(torch.stack(codes)).mT.reshape(sample["latents"].shape)
    torch.testing.assert_close(latents, sample["latents"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_reference_written_out():
    """Positions one by one and prefixes anew, with the numbers that each picture's generator gives."""
    network = tiny()
    steps, cfg, temperature = 4, 2.0, 0.7
    options = MaskedAROptions(steps=steps, cfg=cfg, temperature=temperature)
    (codes,) = MaskedAR(network).fill([CodesRequest(label=1)], options, seeds(3))

    rng = torch.Generator().manual_seed(3)
    order = torch.randperm(9, generator=rng).tolist()
    canvas = torch.zeros(1, 9, 3, dtype=torch.int64)
    closed = []
    for step in range(steps):
        left = int(9 * torch.tensor(torch.pi / 2 * (step + 1) / steps).cos())
        left = max(1, min(9 - len(closed) - 1, left))
        now = order[left:] if step < steps - 1 else order
        now = sorted(set(now) - set(closed))
        known = torch.zeros(1, 9, dtype=torch.bool)
        known[0, closed] = True
        given = [network(canvas, known, torch.tensor([label]))[0] for label in (1, -1)]
        weight = 1 + (cfg - 1) * (9 - left) / 9
        feature = given[1] + weight * (given[0] - given[1])
        spots = torch.rand(len(now), 3, generator=rng, dtype=torch.float64)
        for place, spot in zip(now, spots):
            written = torch.zeros(1, 3, dtype=torch.int64)  # in the head's order
            for i in range(3):
                law = (network.head(feature[None, place], written)[0, i] / temperature).softmax(-1)
                written[0, i] = int((law.double().cumsum(-1) <= spot[i] * law.double().sum()).sum())
            for i, channel in enumerate((2, 0, 1)):
                canvas[0, place, channel] = written[0, i]
        closed += now
    assert torch.equal(codes, canvas[0])


def test_pictures_do_not_depend_on_their_neighbours():
    generator = MaskedAR(tiny())
    frozen = torch.full((9, 3), -1)
    frozen[2] = torch.tensor([1, 7, 0])
    requests = [CodesRequest(label=0), CodesRequest(), CodesRequest(label=3, codes=frozen)]
    options = MaskedAROptions(steps=3)
    together = generator.fill(requests, options, seeds(1, 2, 3))
    for i, request in enumerate(requests):
        assert torch.equal(together[i], generator.fill([request], options, seeds(i + 1))[0])
    assert not torch.equal(together[0], together[1])
    assert together[2][2].tolist() == [1, 7, 0]
    assert all(0 <= int(codes.min()) <= int(codes.max()) < 8 for codes in together)


def test_events_reveal_by_the_cosine_law():
    generator = MaskedAR(tiny(grid=(4, 4)))
    events = list(generator.run([CodesRequest(label=0)] * 2, MaskedAROptions(steps=4)))
    totals = [e.total for e in events if e.request == 0]
    assert totals == [2, 5, 10, 16]  # 16 - floor(16 cos(pi / 2 (k + 1) / 4)), and all at the end
    assert [e.reason for e in events if e.request == 1] == [None] * 3 + ["end"]
    previous = torch.full((16, 3), -1)
    for event in events[::2]:
        stood = previous >= 0
        assert torch.equal(event.codes[stood], previous[stood])
        assert int((event.codes[:, 0] >= 0).sum()) == event.total
        previous = event.codes
    # more steps than positions: one at a time, the rest has nothing to do
    one_by_one = list(generator.run([CodesRequest()], MaskedAROptions(steps=40, cfg=1.0)))
    assert [e.total for e in one_by_one] == list(range(1, 17))


def test_without_guidance_one_half_is_computed(monkeypatch):
    network, rows = tiny(), []
    forward = network.forward
    monkeypatch.setattr(
        network,
        "forward",
        lambda codes, *others: rows.append(len(codes)) or forward(codes, *others),
    )
    generator = MaskedAR(network)
    generator.fill([CodesRequest(label=0)], MaskedAROptions(steps=2, cfg=1.0))
    generator.fill([CodesRequest(label=0)], MaskedAROptions(steps=2))
    generator.fill([CodesRequest()], MaskedAROptions(steps=2))
    assert rows == [1, 1, 2, 2, 1, 1]


def test_everything_frozen_is_given_back():
    codes = torch.randint(8, (9, 3))
    generator = MaskedAR(tiny())
    assert torch.equal(generator.fill([CodesRequest(codes=codes)])[0], codes)


def test_loss_reaches_every_parameter():
    network = tiny().train()
    codes = torch.randint(8, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    known = torch.zeros(2, 9, dtype=torch.bool)
    known[0, :3], known[1, 4:7] = True, True
    loss = network.loss(codes, known, torch.tensor([1, -1]))
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        features = network(codes, known, torch.tensor([1, -1]))[~known]
        logits = network.head(features, codes[~known][:, [2, 0, 1]]).log_softmax(-1)
        picked = [logits[:, i].gather(1, codes[~known][:, [c]]) for i, c in enumerate((2, 0, 1))]
    torch.testing.assert_close(loss, -torch.cat(picked).mean())


@pytest.mark.parametrize(
    ("size", "parameters", "head"),
    [("l", 486.9e6, 81e6), ("h", 910.0e6, 119e6), ("b", 218e6, None)],
)
def test_published_sizes_on_the_meta_device(size, parameters, head):
    with torch.device("meta"):
        network = MaskedARNetwork(SIZES[size])
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=2e-3)
    if head:
        own = sum(p.numel() for p in network.head.parameters())
        assert own == pytest.approx(head, rel=1e-2)
    assert infer_config(published(network.state_dict())) == SIZES[size]


def published(state):
    """Our keys under the published names."""
    return {key.removeprefix("head."): value for key, value in state.items()}


def test_files(network, golden, tmp_path):
    ours = published(network.state_dict())
    tables = ("reconstruction_values", "boundaries", "channel_mask")
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in golden["state_dict"].items() if k not in tables
    }
    big = tiny(width=64, heads=1, head_width=64, head_heads=2, order=(0, 1, 2))
    state = published(big.state_dict())
    # averaged weights hold parameters only
    checkpoint = {"model": {k: torch.zeros_like(v) for k, v in state.items()}, "model_ema": state}
    folder = tmp_path / "tokenbridge_large"
    folder.mkdir()
    torch.save(checkpoint, folder / "checkpoint-last.pth")
    generator = load_generator("tokenbridge/l", tmp_path)
    assert generator.network.config == big.config
    state = generator.network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in big.state_dict().items())
    assert (generator.codec, generator.options.cfg) == ("tokenbridge/kl16-6bit", 3.1)
    assert load_generator("tokenbridge/h", folder).options.temperature == 0.91


def test_files_of_others_are_refused(golden):
    state = golden["state_dict"]
    with pytest.raises(WeightsError, match=r"no masked AR network: class_emb.weight"):
        MaskedARNetwork.from_published({"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"missing \(1\): mask_token"):
        MaskedARNetwork.from_published({k: v for k, v in state.items() if k != "mask_token"}, HEADS)
    shifted = {**state, "reconstruction_values": state["reconstruction_values"] + 1}
    with pytest.raises(WeightsError, match="not those of the 6-bit quantiser"):
        MaskedARNetwork.from_published(shifted, HEADS)
    with pytest.raises(WeightsError, match="channel_mask is not causal"):
        MaskedARNetwork.from_published({**state, "channel_mask": torch.zeros(16, 16)}, HEADS)


def test_streams_decode(network):
    config = TokenBridgeConfig(image_size=64, vae=KL16Config(channels=32).__dict__)
    codec = TokenBridge(config, name="tokenbridge/test").eval()
    options = MaskedAROptions(steps=2)
    streams = MaskedAR(network).streams(codec, [1, None], options=options, rng=seeds(1, 2))
    assert streams[0].grid == (4, 4)
    assert codec.decode(streams)[1].pixels.shape == (3, 64, 64)
    other = TokenBridge(TokenBridgeConfig(image_size=64, bits=5, vae=config.vae))
    with pytest.raises(ValueError, match=r"load 'tokenbridge/kl16-6bit'"):
        MaskedAR(network).streams(other, [1])


def test_bad_input():
    generator = MaskedAR(tiny())
    with pytest.raises(ValueError, match=r"request 0 has label 4, expected 0 ... 3"):
        generator.run([CodesRequest(label=4)])
    with pytest.raises(
        ValueError, match=r"codes \(9,\) of torch.int64, expected integers \[9, 3\]"
    ):
        generator.run([CodesRequest(codes=torch.zeros(9, dtype=torch.int64))])
    for bad in (8, -2):
        codes = torch.zeros(9, 3, dtype=torch.int64)
        codes[0, 0] = bad
        with pytest.raises(ValueError, match=r"a position's codes are 0 ... 7, or all of them -1"):
            generator.run([CodesRequest(codes=codes)])
    known = torch.tensor([[True] + [False] * 8, [False] * 9])
    codes, labels = torch.zeros(2, 9, 3, dtype=torch.int64), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"rows know \[1, 0\] positions"):
        generator.network(codes, known, labels)
    with pytest.raises(ValueError, match="order is"):
        MaskedARConfig(order=(0, 0, 1))
    with pytest.raises(ValueError, match="steps is 0"):
        MaskedAROptions(steps=0)
    with pytest.raises(ValueError, match="schedule is 'cosine'"):
        MaskedAROptions(schedule="cosine")
    with pytest.raises(ValueError, match="multiple of heads"):
        DimensionWiseConfig(width=30, heads=4)
    assert (
        DimensionWise(DimensionWiseConfig(features=8, width=8, heads=2, levels=4)).config.heads == 2
    )
