"""The vision encoder: a CLIP tower's published attention, any ViT, and the training of our own."""

import json
from functools import partial

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image as Pil

from anytok.backbone import vision
from anytok.backbone.pruning import vtccls
from anytok.backbone.pruning.select import Visual
from anytok.backbone.vision import MiniViTConfig, VisionEncoder, load_vision, mini_vit, save_vision
from anytok.backbone.vision_training import Named, VisionTask
from anytok.codecs.training.engine import RunConfig, run
from anytok.modalities.image import Image
from anytok.modalities.video import Video
from tests.golden.load import load_golden


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state a process; each test begins without."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


class QuickGELU(torch.nn.Module):
    def __init__(self, device=None, dtype=None):
        super().__init__()

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def clip_tower(golden):
    """timm's ViT with the fixture's CLIP weights (transformers' names)."""
    c, state = golden["clip_cfg"], golden["clip_state"]
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=c["image_size"],
        patch_size=c["patch_size"],
        embed_dim=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_ratio=c["intermediate_size"] / c["hidden_size"],
        num_classes=0,
        pre_norm=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
        act_layer=QuickGELU,
    )
    new = {
        "cls_token": state["embeddings.class_embedding"][None, None],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        new[f"norm_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        for i in range(c["num_hidden_layers"]):
            old = f"encoder.layers.{i}."
            parts = [state[f"{old}self_attn.{n}_proj.{kind}"] for n in "qkv"]
            names = {
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "attn.proj": "self_attn.out_proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }
            new[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            new |= {f"blocks.{i}.{a}.{kind}": state[f"{old}{b}.{kind}"] for a, b in names.items()}
    missing, unexpected = model.load_state_dict(new, strict=False)
    assert not unexpected
    assert set(missing) <= {"norm.weight", "norm.bias"}
    return VisionEncoder(model.eval(), layer=-2)


@torch.no_grad()
def test_a_clip_tower_attends_and_prunes_as_published():
    golden = load_golden("backbone_vtccls")
    seen = clip_tower(golden)(golden["img"])
    assert seen.grid == (6, 6)
    torch.testing.assert_close(seen.features, golden["hidden_last2"][:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.cls, golden["hidden_last2"][:, 0], atol=1e-4, rtol=1e-4)
    for case in golden["cases"]:
        score = vtccls.scores(seen.cls_attention, start=case["start"])
        torch.testing.assert_close(score[0], case["score"], atol=1e-6, rtol=1e-4)
        chosen = vtccls.select(seen.visual, case["keep"], start=case["start"])
        assert torch.equal(chosen.indices[0], case["kept"])
        taken = chosen.take(seen.features)
        torch.testing.assert_close(taken, case["features"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pictures_of_a_batch_prune_alone():
    """The published code averages over the batch here."""
    golden = load_golden("backbone_vtccls")
    tower = clip_tower(golden)
    images = torch.cat([golden["img"], golden["img"].flip(3), golden["img"] * 0.3])
    seen = tower(images)
    chosen = vtccls.select(seen.visual, [6, 18, 1])
    for row, keep in enumerate((6, 18, 1)):
        alone = tower(images[row : row + 1])
        torch.testing.assert_close(alone.cls_logits[0], seen.cls_logits[row], atol=1e-4, rtol=1e-4)
        assert torch.equal(vtccls.select(alone.visual, keep).indices[0], chosen.indices[row, :keep])


def by_hand(model, x):
    """Attention of every block with its matrices written out: logits [layers, B, N, T, T]."""
    seen = []
    model = model.eval()
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, g, out: seen.append(out))
    with torch.no_grad():
        hidden = model.forward_features(x)
    return torch.stack(seen), hidden


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("deit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "qk_norm": True}, 4),
    ],
)
def test_any_vit_of_timm(name, options, prefix):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, depth=3, num_classes=0, **options)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        seen = VisionEncoder(model.eval(), layer=-1)(x)
    attention, hidden = by_hand(model, x)
    assert seen.features.shape == (2, 16, 192)
    want = attention[:, :, :, 0, prefix:].mean(2)
    torch.testing.assert_close(seen.cls_attention, want, atol=1e-5, rtol=1e-4)
    last = attention[-1, :, :, 0].clamp(min=1e-30).log()
    # Logits are known from the softmax up to a constant in each head: differences of means are not.
    shifted = (last[:, :, prefix:] - last[:, :, prefix : prefix + 1]).mean(1)
    got = seen.cls_logits - seen.cls_logits[:, :1]
    torch.testing.assert_close(got, shifted, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.norm(seen.features), hidden[:, prefix:], atol=1e-4, rtol=1e-4)
    assert seen.cls is not None
    assert not any(b.attn.q_norm._forward_hooks for b in model.blocks)


@torch.no_grad()
def test_a_vit_without_cls_gives_no_attention():
    model = timm.create_model(
        "vit_base_patch16_siglip_224",
        img_size=32,
        depth=2,
        embed_dim=48,
        num_heads=3,
        num_classes=0,
    )
    seen = VisionEncoder(model.eval())(torch.randn(1, 3, 32, 32))
    assert seen.features.shape == (1, 4, 48)
    assert seen.cls is None
    with pytest.raises(ValueError, match="VTC-CLS needs cls_attention"):
        vtccls.select(seen.visual, 2)


def test_what_is_no_vit_is_named():
    with pytest.raises(ValueError, match="ResNet is no timm VisionTransformer"):
        vision.timm_vit("resnet18")
    with pytest.raises(ValueError, match="layer is 7, the model has 6 blocks"):
        VisionEncoder(mini_vit(MiniViTConfig()).model, layer=7)
    with pytest.raises(ValueError, match="must divide"):
        MiniViTConfig(size=65)


@torch.no_grad()
def test_layers_are_counted_like_hidden_states():
    model = mini_vit(MiniViTConfig(size=16, width=24, layers=3)).model
    x = torch.randn(1, 3, 16, 16)
    states = [VisionEncoder(model, layer=i).eval()(x).features for i in range(4)]
    for back in (-1, -2, -4):
        assert torch.equal(VisionEncoder(model, layer=back).eval()(x).features, states[back])
    assert not torch.equal(states[0], states[1])


def test_our_own_vit_is_small_and_comes_back(tmp_path):
    encoder = mini_vit(MiniViTConfig())
    save_vision(encoder, MiniViTConfig(), tmp_path / "v.safetensors")
    assert (tmp_path / "v.safetensors").stat().st_size <= 2 * 2**20
    again = load_vision(tmp_path / "v.safetensors")
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value.half().float())
    picture = Image(torch.rand(3, 90, 40))
    seen = again.see([picture, Image(torch.rand(3, 64, 64))])
    assert seen.features.shape == (2, 64, 96)
    assert isinstance(seen.visual, Visual)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no vision encoder of anytok"):
        load_vision(tmp_path / "other.safetensors")


def little_data(root):
    """Discs and squares in two styles, and clips of them."""
    colours = {"disc": (230, 40, 40, 255), "square": (40, 60, 230, 255)}
    rows, clips = [], []
    (root / "emoji").mkdir()
    (root / "motion").mkdir()
    for i in range(12):
        name = ("disc", "square")[i % 2]
        picture = Pil.new("RGBA", (20, 20), (0, 0, 0, 0))
        picture.paste(Pil.new("RGBA", (8 + i // 2, 8 + i // 2), colours[name]), (3, 3))
        picture.save(root / "emoji" / f"{i}.png")
        rows.append({"image": f"{i}.png", "name": name, "split": "held" if i >= 10 else "train"})
    for i, name in enumerate(("disc", "square", "disc")):
        frames = torch.tensor(colours[name][:3]).to(torch.uint8)[None, :, None, None]
        Video(frames.expand(4, 3, 32, 32).contiguous(), 8.0).save(root / "motion" / f"{i}.mp4")
        clips.append({"video": f"{i}.mp4", "name": name, "split": "held" if i == 2 else "train"})
    for folder, lines in (("emoji", rows), ("motion", clips)):
        text = "\n".join(json.dumps(line) for line in lines)
        (root / folder / "data.jsonl").write_text(text)


def test_our_own_vit_learns_names(tmp_path):
    little_data(tmp_path)
    config = {
        "model": {"size": 16, "width": 24, "layers": 2, "heads": 2},
        "data": {"root": str(tmp_path)},
        "optimizer": {"lr": 3e-3},
    }
    task = VisionTask(config)
    assert list(task.names) == ["disc", "square"]
    data = task.dataset()
    assert isinstance(data, Named)
    assert len(data) == 12
    sample = data.draw(11, torch.Generator().manual_seed(0))
    assert sample["pixels"].shape == (4, 16, 16)
    assert sample["name"] == task.names["square"]
    made = run(
        task,
        RunConfig(
            out=str(tmp_path / "run"), steps=40, batch_size=12, warmup=5, ema=0.9, tensorboard=False
        ),
    )
    measures = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "top1" in json.dumps(measures)
    encoder = load_vision(made)
    assert encoder.size == (16, 16)


def test_augmented_pictures_stay_inside_and_opaque():
    task = VisionTask.__new__(VisionTask)
    pixels = torch.zeros(64, 4, 16, 16, dtype=torch.uint8)
    pixels[:, 0] = pixels[:, 3] = 255  # red, opaque, all over
    out = task.augment(
        {"pixels": pixels, "name": torch.zeros(64)}, torch.Generator().manual_seed(0)
    )
    x = out["pixels"]
    assert x.shape == (64, 3, 16, 16)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1 + 1e-5
    red = (x[:, 0] > 0.99) & (x[:, 1] < 0.01)
    area = red.flatten(1).float().mean(1)
    # Shown at 60 to 100 % of its size, whole: nothing is pushed out of the picture.
    assert float(area.min()) > 0.25
    assert area.std() > 0.05
