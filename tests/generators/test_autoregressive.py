import pytest
import torch

from anytok.backbone import checkpoints
from anytok.backbone.grammar import Grammar
from anytok.backbone.interleave import Interleaver
from anytok.backbone.transformer import Transformer
from anytok.generators.autoregressive import Autoregressive
from anytok.generators.generator import Request
from anytok.generators.sampling import Sampling
from tests.backbone.tiny import RULES, transformer
from tests.golden.load import load_golden


def ids_of(events, n):
    written = [[] for _ in range(n)]
    for event in events:
        written[event.request] += event.ids
        assert len(written[event.request]) == event.total
    return written


def rngs(n):
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_whole_sequence():
    model = transformer()
    prompt = torch.tensor([3, 1, 4])
    (ids,) = ids_of(Autoregressive(model).run([Request(ids=prompt, max_tokens=20)]), 1)
    whole = torch.cat([prompt, torch.tensor(ids)])
    assert model(whole[None]).logits[0, 2:-1].argmax(-1).tolist() == ids


@pytest.mark.parametrize(
    "options", [Sampling(temperature=0), Sampling(), Sampling(cfg=2.0, top_k=9)]
)
def test_batch_rows_equal_single_rows(options):
    decoder = Autoregressive(transformer())
    lengths = [(3, 12), (9, 4), (1, 7), (5, 1)]
    requests = [
        Request(
            ids=torch.arange(n) + i, null_ids=torch.arange(1 + n // 3), max_tokens=most, end=7 * i
        )
        for i, (n, most) in enumerate(lengths)
    ]
    together = ids_of(decoder.run(requests, options, rngs(4)), 4)
    alone = [
        ids_of(decoder.run([request], options, [rng]), 1)[0]
        for request, rng in zip(requests, rngs(4))
    ]
    assert together == alone
    assert all(
        ids[-1] == request.end or len(ids) == request.max_tokens
        for ids, request in zip(together, requests)
    )


def test_seeds_repeat_and_differ():
    decoder = Autoregressive(transformer())
    request = Request(ids=torch.tensor([1]), max_tokens=30)

    def run(seed):
        return ids_of(decoder.run([request], Sampling(), [torch.Generator().manual_seed(seed)]), 1)

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert ids_of(decoder.run([request], Sampling()), 1) == run(0)


@pytest.fixture
def interleaver():
    return Interleaver.build(
        [RULES[name] for name in ("text", "prefix", "runs", "frames", "octree")], multiple=16
    )


@pytest.mark.parametrize("plan", [["image", "text"], ["video"], ["shape"], None])
def test_whatever_an_untrained_model_writes_is_valid(interleaver, plan):
    limits = {"text": 5, "video": 2, "audio": 4}
    grammar = Grammar(interleaver, limits=limits)
    model = transformer(interleaver.vocabulary.size, context=400)
    requests = [
        Request(ids=torch.tensor([1]), state=grammar.start(plan), max_tokens=390) for _ in range(6)
    ]
    events = Autoregressive(model, grammar).run(requests, Sampling(temperature=3.0), rngs(6))
    last = {}
    written = [[] for _ in requests]
    for event in events:
        written[event.request] += event.ids
        last[event.request] = event.reason
    for i, ids in enumerate(written):
        if last[i] == "end":
            streams = interleaver.parse(ids)
            assert plan is None or [s.modality for s in streams] == plan
        else:
            grammar.advance(grammar.start(plan), ids)  # valid so far
    assert "end" in last.values() or plan in (None, ["shape"])


def test_forced_ids_cost_no_step(interleaver):
    grammar = Grammar(interleaver, limits={"image": 1})
    model = transformer(interleaver.vocabulary.size)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    request = Request(ids=torch.tensor([1]), state=grammar.start(["image"]), max_tokens=10)
    (ids,) = ids_of(Autoregressive(model, grammar).run([request]), 1)
    assert len(ids) == 4  # opening, one code, closing, end
    assert len(calls) == 1  # the prompt and the opening together; the rest follows from the code


def test_closing_the_iterator_stops_the_work():
    model = transformer()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    events = Autoregressive(model).run([Request(ids=torch.tensor([1]), max_tokens=50)])
    for _ in range(3):
        next(events)
    done = len(calls)
    events.close()
    assert done <= 3
    assert len(calls) == done
    assert next(events, None) is None


def test_requests_that_cannot_run_are_refused():
    decoder = Autoregressive(transformer(context=16))
    ids = torch.arange(10)
    with pytest.raises(ValueError, match=r"a prompt of 10 and up to 8 new.*context is 16"):
        decoder.run([Request(ids=ids, max_tokens=8)])
    assert len(ids_of(decoder.run([Request(ids=ids, max_tokens=7)]), 1)[0]) == 7
    with pytest.raises(ValueError, match="no null condition"):
        decoder.run([Request(ids=ids, max_tokens=2)], Sampling(cfg=2.0))
    with pytest.raises(ValueError, match="is empty"):
        decoder.run([Request(ids=ids[:0], max_tokens=2)])
    interleaver = Interleaver.build([RULES["text"]])
    state = Grammar(interleaver).start(["text"])
    with pytest.raises(ValueError, match="there is no grammar"):
        decoder.run([Request(ids=ids, state=state, max_tokens=2)])
    with pytest.raises(ValueError, match="rng has 1 generators for 2 items"):
        decoder.run([Request(ids=ids, max_tokens=2)] * 2, None, rngs(1))


@pytest.mark.parametrize(("key", "cfg"), [("greedy_nocfg", 1.0), ("greedy", 3.0)])
@torch.no_grad()
def test_llamagen_c2i_writes_the_published_ids(key, cfg):
    golden = load_golden("backbone_llamagen")["c2i"]
    model = checkpoints.from_llamagen(golden["state_dict"], heads=4, grid=(4, 4))
    condition = model.model.cls_embedding
    labels = golden["cls"]
    requests = [
        Request(embeddings=given, null_embeddings=null, max_tokens=16)
        for given, null in zip(condition(labels), condition(condition.null(labels)))
    ]
    found = ids_of(Autoregressive(model).run(requests, Sampling(temperature=0, cfg=cfg)), 2)
    assert found == golden[key].tolist()


@torch.no_grad()
def test_mios_llama_writes_the_published_ids():
    golden = load_golden("backbone_mio")
    config = {**golden["cfg"], "model_type": "llama", "rope_theta": golden["rope_theta"]}
    with torch.device("meta"):
        model = Transformer(checkpoints.from_transformers(config, source="MIO"))
    model = checkpoints.assigned(model, golden["state_dict"], source="MIO")
    prompts = [ids[mask.bool()] for ids, mask in zip(golden["ids"], golden["mask"])]
    new = golden["greedy"].shape[1] - golden["ids"].shape[1]
    requests = [Request(ids=ids, max_tokens=new) for ids in prompts]
    found = ids_of(Autoregressive(model).run(requests), len(prompts))
    assert found == golden["greedy"][:, -new:].tolist()


def many(n=7):
    return [
        Request(ids=torch.arange(2 + i % 3), null_ids=torch.arange(1), max_tokens=3 + 2 * i)
        for i in range(n)
    ]


@pytest.mark.parametrize("options", [Sampling(), Sampling(cfg=2.0), Sampling(cfg=2.0, guide=5)])
def test_refilled_batches_write_the_same(options):
    model = transformer()
    whole = ids_of(Autoregressive(model).run(many(), options, rngs(7)), 7)
    for rows in (1, 3):
        assert ids_of(Autoregressive(model, rows=rows).run(many(), options, rngs(7)), 7) == whole


def test_a_place_that_becomes_free_is_taken():
    model = transformer()
    rows = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["embeddings"])),
        with_kwargs=True,
    )
    decoder = Autoregressive(model, rows=2)
    requests = [Request(ids=torch.tensor([i]), max_tokens=4) for i in range(5)]
    list(decoder.run(requests))
    assert rows == [2, 2, 1]
    with pytest.raises(ValueError, match="rows is 0, expected 1 or more"):
        Autoregressive(model, rows=0)


def test_the_unguided_half_goes_when_its_interval_ends():
    model = transformer()
    decoder = Autoregressive(model)
    rows, step = [], decoder.step
    decoder.step = lambda ids, cache: (rows.append(len(ids)), step(ids, cache))[1]
    request = Request(ids=torch.tensor([1, 2]), null_ids=torch.tensor([3]), max_tokens=8)
    hot = {"cfg": 3.0, "temperature": 0}
    (ids,) = ids_of(decoder.run([request], Sampling(**hot, guide=3)), 1)
    assert rows == [2, 2, 1, 1, 1, 1, 1]
    (all_guided,) = ids_of(decoder.run([request], Sampling(**hot)), 1)
    assert ids[:3] == all_guided[:3]
    more = Request(ids=torch.tensor([1, 2, *ids[:3]]), max_tokens=5)
    assert ids_of(decoder.run([more]), 1) == [ids[3:]]
    with pytest.raises(ValueError, match="guide is -1"):
        Sampling(guide=-1)


def test_the_prompt_of_several_samples_is_read_once():
    model = transformer()
    rows = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["embeddings"])),
        with_kwargs=True,
    )
    request = Request(ids=torch.arange(9), null_ids=torch.tensor([3]), max_tokens=6)
    options = Sampling(cfg=2.0)
    decoder = Autoregressive(model)
    samples = ids_of(decoder.run([request] * 4, options, rngs(4)), 4)
    assert rows == [2]
    for sample, rng in zip(samples, rngs(4)):
        assert ids_of(decoder.run([request], options, [rng]), 1) == [sample]
