"""DyVTE (arXiv 2411.19628): behind some layer, found anew for each row, all visual tokens leave.

A gate behind each layer reads the mean hidden state of the text behind the visual tokens, its last position left out,
and that last position's; it is Linear(2 D, 2048), GELU, Linear(2048, 2), without biases. At the first layer where the
second logit is the larger, the row's visual tokens are dropped for all layers that follow.

Rows exit by themselves; positions stay as they were. Where one position of text follows, it stands for both features.
Training: `dyvte_training.py`. Weights have the published names, `visual_gates_router.N.{w1,w2}.weight`.

B rows, T positions, D width, N layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import Transformer
from .inside import Prompt
from .select import Positions

HIDDEN = 2048
PREFIX = "visual_gates_router."


class Gate(nn.Module):
    """[B, 2 D] to logits [B, 2] of staying and of leaving."""

    def __init__(self, width: int, hidden: int = HIDDEN):
        super().__init__()
        self.w1 = nn.Linear(2 * width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return self.w2(F.gelu(self.w1(features)))


class Gates(nn.Module):
    """A gate behind each layer."""

    def __init__(self, *, width: int, layers: int, hidden: int = HIDDEN):
        super().__init__()
        self.width, self.layers = width, layers
        self.visual_gates_router = nn.ModuleList(Gate(width, hidden) for _ in range(layers))

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor]) -> Gates:
        """Gates of a checkpoint, whose other keys are left alone; sizes come from the shapes.

        Raises:
            ValueError: there are none.
        """
        own = {PREFIX + k.split(PREFIX, 1)[1]: v for k, v in state.items() if PREFIX in k}
        if not own:
            raise ValueError(f"no key of {len(state)} contains {PREFIX!r}: no DyVTE gates in it")
        layers = 1 + max(int(key.removeprefix(PREFIX).split(".")[0]) for key in own)
        hidden, doubled = own[f"{PREFIX}0.w1.weight"].shape
        gates = cls(width=doubled // 2, layers=layers, hidden=hidden)
        gates.load_state_dict(own)
        return gates

    def forward(self, layer: int, features: Tensor) -> Tensor:
        """Logits [B, 2] behind `layer` (0 the first)."""
        return self.visual_gates_router[layer](features)


def text_features(prompt: Prompt) -> Tensor:
    """[B, 2 D]: the mean of the text behind the visual tokens without its last position, and that position."""
    text = prompt.text_behind
    count = text.sum(1, keepdim=True)
    number = text.cumsum(1)
    earlier = text & (number < count.clamp(min=2))
    final = text & (number == count)
    mean = (prompt.x * earlier[..., None]).sum(1) / earlier.sum(1, keepdim=True).clamp(min=1)
    last = (prompt.x * final[..., None]).sum(1)
    return torch.cat([mean, last], -1)


class DyVTE:
    """The method, with trained gates.

    Args:
        gates: of a model with as many layers and that width.
    """

    positions: Positions = "kept"

    def __init__(self, gates: Gates):
        self.gates = gates.eval()

    def start(self, model: Transformer, prompt: Prompt) -> _Tracker:
        """Begin a prompt.

        Raises:
            ValueError: gates of another model, or visual tokens that no text follows.
        """
        width, layers = self.gates.width, self.gates.layers
        if (layers, width) != (model.config.layers, model.config.width):
            raise ValueError(
                f"the gates are of a model of {layers} layers and width {width}, "
                f"this one has {model.config.layers} and {model.config.width}"
            )
        mute = prompt.visual.any(1) & ~prompt.text_behind.any(1)
        if bool(mute.any()):
            row = int(mute.nonzero()[0])
            raise ValueError(f"row {row} has no text behind its visual tokens to decide by")
        return _Tracker(self.gates)


class _Tracker:
    def __init__(self, gates: Gates):
        self.gates = gates

    def watches(self, layer: int) -> bool:
        return False

    def see(self, prompt: Prompt, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        raise AssertionError("DyVTE watches no layer")

    def cut(self, layer: int, prompt: Prompt) -> Tensor | None:
        if not bool(prompt.visual.any()):
            return None
        logits = self.gates(layer, text_features(prompt))
        leaves = logits[:, 1] > logits[:, 0]
        return prompt.real & ~(prompt.visual & leaves[:, None])
