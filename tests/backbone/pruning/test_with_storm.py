"""A video goes through STORM, its tokens are pruned, and a transformer reads what is left: alone and in a batch."""

import pytest
import torch

from anytok.backbone.pruning.inside import PrunedTransformer
from anytok.backbone.pruning.methods import select
from anytok.backbone.pruning.select import Visual, budget, compact, kept_places
from anytok.backbone.pruning.transprune import TransPrune
from anytok.codecs.video.storm import Storm, StormConfig
from tests.backbone.tiny import transformer


def understand(model, storm, videos, counts, questions, method):
    """Hidden states [B, D] of each question's last position, and how many visual tokens were kept of how many."""
    reduced = storm(videos, counts=counts, sample=2)
    tokens = Visual(features=reduced.tokens, valid=reduced.valid)
    chosen = select(method, tokens, budget(0.5, tokens.counts))
    text = model.embed(questions)
    # Tokens of a row, then its question, then padding: positions that are real come first.
    x = torch.cat([tokens.features, text], 1)
    real = torch.cat([reduced.valid, torch.ones_like(questions).bool()], 1)
    visual = torch.cat([reduced.valid, torch.zeros_like(questions).bool()], 1)
    keep = kept_places(visual, chosen, real=real)
    short = compact(x, keep)
    left = visual.gather(1, short.index.clamp(min=0)) & (short.index >= 0)
    run = PrunedTransformer(model, TransPrune.scaled(5, 0.25))
    made = run.prefill(short.x, left, counts=short.counts, room=1)
    step = run.step(torch.full((len(x),), 7), made.cache)
    return made.last, step, chosen.counts, made.cache.lengths


@torch.no_grad()
@pytest.mark.parametrize("method", ["divprune", "uniform", "norm"])
def test_storm_then_pruning_then_layers(method):
    model = transformer(layers=5)
    torch.manual_seed(0)
    storm = Storm(StormConfig(width=32, layers=1, state=4, temporal=4, spatial=2)).eval()
    g = torch.Generator().manual_seed(1)
    counts = [17, 9, 30]
    videos = torch.randn(3, 30, 16, 32, generator=g)
    questions = torch.randint(64, (3, 5), generator=g)
    last, step, kept, lengths = understand(model, storm, videos, counts, questions, method)
    # 17 frames: 5 groups, 3 sampled, of 4 tokens each; a half stays
    assert kept == [6, 4, 8]
    assert lengths[0].tolist() == [6 + 5 + 1, 4 + 5 + 1, 8 + 5 + 1]
    for row, n in enumerate(counts):
        one = slice(row, row + 1)
        alone = understand(model, storm, videos[one, :n], [n], questions[one], method)
        torch.testing.assert_close(last[row], alone[0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step[row], alone[1][0], atol=1e-4, rtol=1e-4)
        assert torch.equal(lengths[:, row], alone[3][:, 0])
