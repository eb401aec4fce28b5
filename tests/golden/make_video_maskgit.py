"""Make the golden of Phenaki's MaskGIT, critics and sampling anew, by the published code, with weights of a recipe.

    python tests/golden/make_video_maskgit.py --code SITE_WITH_PHENAKI_PYTORCH_0.5.0 [--also SITE]

The whole fixture holds weights that no seed explains; this one has the same tree, less most of its videos, and says
what seed drew the long video (`make_video_of`) and the training losses (`losses`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path

import torch
from make_video_cvivit import COMMON, fill_weights, published
from torch import Tensor

HERE = Path(__file__).parent
TEXTS = ["a squirrel examines an acorn", "a cat watches"]
STEPS = 6
SCENES = {"num_frames": (5, 4, 4), "prime_lengths": (3, 3), "seed": 9, "texts": (0, 1, 0)}


class Traced:
    """The ids that the generator sees at each step, and what is decoded at the end."""

    def __init__(self, phenaki):
        self.phenaki, self.seen = phenaki, []

    def __enter__(self):
        maskgit, cvivit = self.phenaki.maskgit, self.phenaki.cvivit
        self.undo = (maskgit.forward_with_cond_scale, cvivit.decode_from_codebook_indices)

        def ask(ids, *args, **kwargs):
            self.seen.append(ids.clone())
            return self.undo[0](ids, *args, **kwargs)

        def decode(ids, *args, **kwargs):
            self.seen.append(ids.clone())
            return self.undo[1](ids, *args, **kwargs)

        maskgit.forward_with_cond_scale, cvivit.decode_from_codebook_indices = ask, decode
        return self.seen

    def __exit__(self, *_):
        maskgit, cvivit = self.phenaki.maskgit, self.phenaki.cvivit
        maskgit.forward_with_cond_scale, cvivit.decode_from_codebook_indices = self.undo


def sampled(phenaki, **kwargs) -> dict:
    """One trace."""
    torch.manual_seed(123)
    with Traced(phenaki) as inputs:
        video = phenaki.sample(**kwargs)
    return {"kwargs": kwargs, "inputs": inputs, "video": video}


def losses(phenaki, ids: Tensor, context: Tensor) -> dict:
    """What training minimises, with the draws of seed 8."""
    found = {}
    for name, only in (("generator", "only_train_generator"), ("critic", "only_train_critic")):
        torch.manual_seed(8)
        kwargs = {"video_codebook_ids": ids, "text_embeds": context, only: True}
        found[name] = phenaki(**kwargs).detach()
    return found


@torch.no_grad()
def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    cvivit, _ = published(args.code, args.also)
    stub = types.ModuleType("phenaki_pytorch.t5")
    stub.t5_encode_text = stub.get_encoded_dim = lambda *_: 24
    stub.DEFAULT_T5_NAME = "none"
    sys.modules["phenaki_pytorch.t5"] = stub
    code = importlib.import_module("phenaki_pytorch.phenaki_pytorch")
    rng = torch.Generator().manual_seed(7)
    text_mask = torch.tensor([[True] * 5 + [False], [True] * 3 + [False] * 3])
    context = torch.randn(2, 6, 24, generator=rng) * text_mask[..., None]
    ids = torch.randint(64, (2, 3, 2, 3), generator=rng)

    torch.manual_seed(0)
    codec = cvivit.CViViT(**COMMON, image_size=(16, 24), patch_size=(8, 8))
    sizes = {"dim": 32, "num_tokens": 64, "max_seq_len": 128, "depth": 2}
    sizes |= {"dim_head": 8, "heads": 4, "dim_context": 24}
    maskgit = code.MaskGit(**sizes)
    critic = code.TokenCritic(**sizes, has_cross_attn=True)
    own = code.SelfCritic(maskgit)
    golden = {"context": context, "text_mask": text_mask, "ids": ids}
    golden["maskgit_sd"] = fill_weights(maskgit, 21)
    golden["critic_sd"] = fill_weights(critic, 22)
    golden["cvivit_sd"] = fill_weights(codec, 23)
    golden["self_critic_sd"] = fill_weights(own.to_pred, 24)

    about = {"context": context, "text_mask": text_mask}
    golden["logits"] = maskgit(ids, **about)
    golden["logits_null"] = maskgit(ids, cond_drop_prob=1.0, **about)
    golden["logits_cfg3"] = maskgit.forward_with_cond_scale(ids, cond_scale=3.0, **about)
    golden["critic"] = critic(ids, cond_drop_prob=0.0, **about)
    golden["self_critic"] = own(ids, **about)
    video_mask = torch.ones(2, 18, dtype=torch.bool)
    video_mask[1, 12:] = False
    golden["video_mask"] = video_mask
    golden["logits_masked"] = maskgit(ids, video_mask=video_mask, **about)

    def whole(critic, **given):
        phenaki = code.Phenaki(
            maskgit=maskgit, cvivit=codec, critic=critic, steps=STEPS, text_embed_dim=24, **given
        ).eval()
        phenaki.encode_texts = lambda texts, **_: context[[TEXTS.index(t) for t in texts]]
        return phenaki

    plain, judged, by_itself = whole(None), whole(critic), whole(None, self_token_critic=True)
    by_itself.critic.load_state_dict(own.state_dict())
    both = {"texts": TEXTS, "num_frames": 5}
    prime = torch.rand(1, 3, 3, 16, 24, generator=rng)
    golden["sample_critic"] = sampled(judged, **both, cond_scale=3.0)
    golden["sample_conf"] = sampled(plain, **both, cond_scale=5.0)
    golden["sample_self"] = sampled(by_itself, texts=TEXTS[:1], num_frames=5)
    golden["sample_prime"] = sampled(judged, texts=TEXTS[:1], prime_frames=prime, num_frames=4)
    for name in ("critic", "conf", "self"):
        del golden[f"sample_{name}"]["video"]
    torch.manual_seed(SCENES["seed"])
    with Traced(judged) as seen:
        texts = [TEXTS[i] for i in SCENES["texts"]]
        code.make_video(judged, texts, SCENES["num_frames"], SCENES["prime_lengths"])
    golden["make_video_of"] = {**SCENES, "codes": seen[STEPS :: STEPS + 1]}
    golden["losses"] = losses(judged, ids, context)
    target = HERE / "video_phenaki_maskgit.pt"
    torch.save(golden, target)
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
