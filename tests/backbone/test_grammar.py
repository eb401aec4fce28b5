import dataclasses
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytok.backbone.grammar import Grammar, GrammarError
from anytok.backbone.interleave import EOS, Interleaver
from anytok.codecs.layout import Octree
from anytok.codecs.stream import Part, StreamError, TokenStream
from tests.backbone.tiny import RULES

SETS = [
    ("text", "prefix", "runs", "frames", "octree"),
    ("text", "grid", "depths"),
    ("fixed", "octree"),
]


def grammar_of(names, **limits):
    interleaver = Interleaver.build([RULES[name] for name in names], multiple=16)
    interleaver = Interleaver.from_json(json.loads(json.dumps(interleaver.to_json())))
    return interleaver, Grammar(interleaver, limits=limits)


def walk(grammar, plan, seed, most=300):
    """Random allowed ids until the document ends; closes as soon as it may after `most` ids."""
    rng, state, ids = random.Random(seed), grammar.start(plan), []
    while not state.done:
        ranges = grammar.allowed(state)
        a, b = ranges[-1] if len(ids) > most else rng.choice(ranges)
        ids.append(rng.randrange(a, b))
        state = grammar.advance(state, ids[-1:])
    return ids


@settings(deadline=None, max_examples=25)
@given(
    which=st.integers(0, len(SETS) - 1),
    seed=st.integers(0, 2**32),
    free=st.booleans(),
    data=st.data(),
)
def test_what_the_grammar_allows_is_valid_and_parses_back(which, seed, free, data):
    interleaver, grammar = grammar_of(SETS[which])
    plan = None
    if not free:
        plan = data.draw(st.lists(st.sampled_from(list(interleaver.rules)), min_size=1, max_size=4))
    ids = walk(grammar, plan, seed)
    streams = interleaver.parse(ids)
    if plan is not None:
        assert [s.modality for s in streams] == plan
    for stream in streams:
        rule = interleaver.rules[stream.modality]
        assert rule.layout.problem([p.codes for p in stream.parts], stream.grid) is None
    framing = {interleaver.vocabulary.special(EOS)}
    framing |= {tag for m in interleaver.rules for tag in interleaver.tags(m)}
    back = [id for stream in streams for id in interleaver.ids(stream).tolist()]
    assert back == [id for id in ids if id not in framing]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_one_wrong_id_is_refused(seed, data):
    interleaver, grammar = grammar_of(SETS[0])
    ids = walk(grammar, list(interleaver.rules), seed)
    at = data.draw(st.integers(0, len(ids) - 1))
    state = grammar.advance(grammar.start(list(interleaver.rules)), ids[:at])
    allowed = {id for a, b in grammar.allowed(state) for id in range(a, b)}
    wrong = data.draw(st.sampled_from(sorted(set(range(interleaver.vocabulary.size)) - allowed)))
    with pytest.raises(GrammarError, match="expected"):
        grammar.advance(state, [wrong])


def test_states_can_be_kept_and_forked():
    interleaver, grammar = grammar_of(["prefix"])
    opening, closing = interleaver.tags("image")
    code = interleaver.vocabulary.of("image/p")[0].start
    before = grammar.advance(grammar.start(["image"]), [opening, code])
    longer = grammar.advance(before, [code, code])
    closed = grammar.advance(before, [closing])
    assert longer.inner == (3,)
    assert closed.plan == ()
    assert before.inner == (1,)  # untouched by both


def test_a_limit_forces_the_end():
    interleaver, grammar = grammar_of(["text", "prefix"], image=2)
    code = interleaver.vocabulary.of("image/p")[0].start
    state = grammar.advance(grammar.start(["image"]), [interleaver.tags("image")[0], code, code])
    assert grammar.forced(state) == interleaver.tags("image")[1]


def test_runs_are_equally_long():
    interleaver, grammar = grammar_of(["runs"])
    starts = [b.start for b in interleaver.vocabulary.of("audio/m")]
    state = grammar.start(["audio"])
    state = grammar.advance(state, [interleaver.tags("audio")[0], starts[0], starts[0], starts[1]])
    with pytest.raises(GrammarError):
        grammar.advance(state, [starts[2]])  # the second run has one id, the first had two
    grammar.advance(
        state, [starts[1] + 1, *starts[2:3] * 2, *starts[3:] * 2, interleaver.tags("audio")[1]]
    )


def test_mask_is_the_ranges():
    interleaver, grammar = grammar_of(["prefix"])
    ranges = grammar.allowed(grammar.advance(grammar.start(None), [interleaver.tags("image")[0]]))
    mask = grammar.mask(ranges)
    assert (~mask).nonzero().flatten().tolist() == [i for a, b in ranges for i in range(a, b)]
    assert grammar.mask(ranges) is mask


def test_least_is_the_shortest_block():
    for names in SETS:
        interleaver, grammar = grammar_of(names)
        for modality in interleaver.rules:
            lengths = [len(walk(grammar, [modality], seed, most=0)) - 3 for seed in range(30)]
            assert min(lengths) >= grammar.least(modality)


def test_bad_requests_are_named():
    _, grammar = grammar_of(["text"])
    with pytest.raises(ValueError, match="writes no 'smell', only text"):
        grammar.start(["smell"])
    with pytest.raises(ValueError, match="no modality"):
        grammar.start([])
    with pytest.raises(ValueError, match="limits for"):
        grammar_of(["text"], smell=3)
    with pytest.raises(ValueError, match="limit of text is 0"):
        grammar_of(["text"], text=0)


def test_octree_needs_a_node():
    interleaver, grammar = grammar_of(["octree"])
    state = grammar.advance(grammar.start(["shape"]), [interleaver.tags("shape")[0]])
    zero = interleaver.vocabulary.of("shape/o")[0].start
    assert torch.tensor(grammar.allowed(state)).tolist() == [[zero + 1, zero + 256]]


def test_octrees_stay_within_their_limit():
    interleaver, grammar = grammar_of(["octree"], shape=24)
    for seed in range(40):
        (stream,) = interleaver.parse(walk(grammar, ["shape"], seed))
        assert 8 <= len(stream.parts[-1].codes) <= 24
    rule = dataclasses.replace(RULES["octree"], limit=16)
    parts = [torch.ones(8, 1), torch.ones(64, 1), torch.ones(512, 16)]
    big = TokenStream(
        parts=tuple(Part(p.long(), v) for p, v in zip(parts, rule.vocab)),
        codec=rule.codec,
        modality="shape",
    )
    with pytest.raises(StreamError, match=r"512 codes, the model takes 16; larger shapes"):
        Interleaver.build([rule]).ids(big)
    with pytest.raises(ValueError, match="limit of codes is 7, expected 8 or more"):
        grammar_of(["octree"], shape=7)


@pytest.mark.parametrize(("bits", "ids"), [(12, 1), (6, 1), (32, 4), (16, 2)])
def test_octree_codes_pack(bits, ids):
    rule = dataclasses.replace(
        RULES["octree"], layout=Octree(1, 2), vocab=((2,), (2,) * bits), limit=24
    )
    interleaver = Interleaver.build([rule])
    blocks = [b for b in interleaver.vocabulary.blocks if b.part == 1]
    assert [b.size for b in blocks] == [2 ** (bits // ids)] * ids
    grammar = Grammar(interleaver)
    for seed in range(10):
        (stream,) = interleaver.parse(walk(grammar, ["shape"], seed))
        again = interleaver.stream(interleaver.ids(stream).tolist(), "shape")
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(stream.parts, again.parts))
        assert interleaver.ids(stream).shape == (1 + ids * len(stream.parts[1].codes),)
    with pytest.raises(ValueError, match="has 13 bits a node, expected 1 to 12 or a multiple of 8"):
        Interleaver.build([dataclasses.replace(rule, vocab=((2,), (2,) * 13))])
