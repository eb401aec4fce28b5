"""Speed of CosyVoice's flow and vocoder: tokens to samples, at published size, beside the official code.

    python benchmarks/cosyvoice_speed.py [--seconds 2] [--prompt 0] [--rounds 1] [--reference PATH] [--json]

v2's published sizes, random weights (seeded), ten Euler steps with guidance, one run. The real-time factor is seconds
of work for a second of speech; CPU seconds stand beside the clock's, since other work on the machine does not lengthen
them. bf16 is the flow's alone (the vocoder stays in float32), with its distance from float32's mel.

`--reference PATH` is a checkout of github.com/FunAudioLLM/CosyVoice with its submodule Matcha-TTS, in an environment
that imports it; without it, its columns say "not run".
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from anytok.codecs.audio.cosyvoice import flow as flows
from anytok.codecs.audio.cosyvoice import hift
from anytok.codecs.audio.cosyvoice.flow import Flow, make_flow
from anytok.codecs.audio.cosyvoice.hift import HiFT
from anytok.codecs.audio.cosyvoice.voice import Voice

RATE = 25  # tokens a second
NOT_RUN = "not run"
Work = Callable[[], Tensor]


def networks() -> tuple[Flow, HiFT]:
    """v2 at its published size; pitch is around 120 Hz, as of a voice."""
    torch.manual_seed(0)
    flow = make_flow(flows.PUBLISHED["v2"]).eval()
    for parameter in flow.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
    vocoder = HiFT(hift.V2).eval()
    torch.nn.init.constant_(vocoder.f0_predictor.classifier.bias, 120.0)
    return flow, vocoder


def given(seconds: float, prompt: float) -> tuple[Tensor, Voice]:
    """Tokens, and a voice with a prompt."""
    rng = torch.Generator().manual_seed(1)
    count, before = max(1, round(seconds * RATE)), round(prompt * RATE)
    tokens = torch.randint(0, 6561, (count,), generator=rng)
    ids = torch.randint(0, 6561, (before,), generator=rng)
    mel = torch.randn(2 * before, 80, generator=rng) - 5
    return tokens, Voice(embedding=torch.randn(192, generator=rng), tokens=ids, mel=mel)


def timed(work: Work, rounds: int) -> tuple[float, float, Tensor]:
    """The best of the rounds: seconds by the clock, of CPU; and the result."""
    clock = cpu = math.inf
    for _ in range(rounds):
        start, spent = time.perf_counter(), time.process_time()
        result = work()
        clock = min(clock, time.perf_counter() - start)
        cpu = min(cpu, time.process_time() - spent)
    return clock, cpu, result


def ours(flow: Flow, tokens: Tensor, voice: Voice) -> Work:
    noise = flow.noise_table(torch.Generator().manual_seed(0))
    return lambda: flow.generate([tokens], [voice], [noise])[0]


def vocoded(vocoder: HiFT, mel: Tensor) -> Work:
    noise = vocoder.draw(mel.shape[1], torch.Generator().manual_seed(0))
    return lambda: vocoder(mel[None], noise)


def official_flow(path: Path, flow: Flow, tokens: Tensor, voice: Voice) -> Work:
    """The official v2 flow with the same weights. ImportError where its environment is not there."""
    sys.path[:0] = [str(path), str(path / "third_party" / "Matcha-TTS")]
    from cosyvoice.flow.decoder import CausalConditionalDecoder
    from cosyvoice.flow.flow import CausalMaskedDiffWithXvec
    from cosyvoice.flow.flow_matching import CausalConditionalCFM
    from cosyvoice.transformer.upsample_encoder import UpsampleConformerEncoder
    from omegaconf import DictConfig

    settings = {"sigma_min": 1e-6, "solver": "euler", "t_scheduler": "cosine"}
    settings |= {"training_cfg_rate": 0.2, "inference_cfg_rate": 0.7, "reg_loss_type": "l1"}
    estimator = CausalConditionalDecoder(
        320, 80, [256], 0.0, 64, 4, 12, 8, "gelu", static_chunk_size=50, num_decoding_left_chunks=-1
    )
    net = CausalMaskedDiffWithXvec(
        vocab_size=6561,
        input_frame_rate=25,
        encoder=UpsampleConformerEncoder(
            512,
            512,
            attention_heads=8,
            linear_units=2048,
            num_blocks=6,
            input_layer="linear",
            pos_enc_layer_type="rel_pos_espnet",
            selfattention_layer_type="rel_selfattn",
            use_cnn_module=False,
            macaron_style=False,
            static_chunk_size=25,
        ),
        decoder=CausalConditionalCFM(240, DictConfig(settings), 1, 80, estimator),
    ).eval()
    net.load_state_dict(flow.state_dict())

    def work() -> Tensor:
        mel, _ = net.inference(
            token=tokens[None],
            token_len=torch.tensor([len(tokens)]),
            prompt_token=voice.tokens[None],
            prompt_token_len=torch.tensor([len(voice.tokens)]),
            prompt_feat=voice.mel[None],
            prompt_feat_len=torch.tensor([len(voice.mel)]),
            embedding=voice.embedding[None],
            streaming=False,
            finalize=True,
        )
        return mel[0]

    return work


def official_vocoder(vocoder: HiFT, mel: Tensor) -> Work:
    """The official v2 vocoder with the same weights; `official_flow` has made it importable."""
    from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
    from cosyvoice.hifigan.generator import HiFTGenerator
    from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

    dilations = [[1, 3, 5]] * 3
    net = HiFTGenerator(
        sampling_rate=24_000,
        upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=dilations,
        f0_predictor=ConvRNNF0Predictor(),
    ).eval()
    for module in net.modules():
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
    net.load_state_dict(vocoder.state_dict())
    return lambda: net.inference(speech_feat=mel[None])[0]


@torch.inference_mode()
def measure(seconds: float, prompt: float, rounds: int, reference: Path | None) -> dict[str, Any]:
    """All measurements of one run, as a flat table."""
    flow, vocoder = networks()
    tokens, voice = given(seconds, prompt)
    spoken = len(tokens) / RATE
    table: dict[str, Any] = {"speech_seconds": spoken, "prompt_seconds": len(voice.tokens) / RATE}

    def note(name: str, work: Work) -> Tensor:
        clock, cpu, result = timed(work, rounds)
        table[f"{name}_rtf"], table[f"{name}_cpu"] = clock / spoken, cpu / spoken
        return result

    # Warm up; the first convolution of a shape compiles, whoever runs it.
    ours(flow, tokens[:5], Voice(embedding=voice.embedding))()
    vocoded(vocoder, torch.zeros(80, flow.frames(len(tokens))))()
    mel = note("flow_fp32", ours(flow, tokens, voice))
    samples = note("vocoder", vocoded(vocoder, mel))
    table["both_fp32_rtf"] = table["flow_fp32_rtf"] + table["vocoder_rtf"]
    others = {"official_flow": NOT_RUN, "official_vocoder": NOT_RUN}
    if reference is not None:
        try:
            theirs = note("official_flow", official_flow(reference, flow, tokens, voice))
            sound = note("official_vocoder", official_vocoder(vocoder, mel))
        except ImportError as error:
            others = dict.fromkeys(others, f"{NOT_RUN}: {error}")
        else:
            others = {}
            table["flow_cpu_ratio"] = table["official_flow_cpu"] / table["flow_fp32_cpu"]
            table["vocoder_cpu_ratio"] = table["official_vocoder_cpu"] / table["vocoder_cpu"]
            table["flow_distance"] = float((theirs - mel).abs().max())
            # Its noise cannot be handed in, so the samples are compared in loudness alone.
            table["vocoder_loudness_ratio"] = float(sound.std() / samples.std())
    half = note("flow_bf16", ours(flow.to(torch.bfloat16), tokens, voice))
    table["bf16_mel_l1"], table["mel_deviation"] = (
        float((half - mel).abs().mean()),
        float(mel.std()),
    )
    return table | others


def main(
    seconds: Annotated[float, typer.Option(help="of speech")] = 2.0,
    prompt: Annotated[float, typer.Option(help="seconds of the voice's prompt")] = 0.0,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int, typer.Option(help="0: torch's choice")] = 2,
    reference: Annotated[Path | None, typer.Option(help="the official code")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Time flow and vocoder."""
    if threads:
        torch.set_num_threads(threads)
    table = {"threads": torch.get_num_threads(), **measure(seconds, prompt, rounds, reference)}
    if as_json:
        typer.echo(json.dumps(table))
        return
    for name, value in table.items():
        typer.echo(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
