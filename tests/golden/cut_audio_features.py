"""Cut `audio_features.pt`: the sound as 16-bit integers (which it is), and every fourth frame of each mel.

python tests/golden/cut_audio_features.py ../shared/parity
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
STRIDE = 4  # frames
RESAMPLED = slice(None, None, 50)


def main() -> None:
    """Read the whole fixture from the folder named on the command line and write the golden."""
    whole = torch.load(Path(sys.argv[1]) / "audio_features.pt", weights_only=True)
    samples = (whole["wav16k"] * 2**15).to(torch.int16)
    assert torch.equal(samples / 2**15, whole["wav16k"]), "the sound is not 16-bit"
    golden = {
        "wav16k": samples,
        "wav22": whole["wav22"][:, RESAMPLED].clone(),
        "wav24": whole["wav24"][:, RESAMPLED].clone(),
        "s3_logmel128": whole["s3_logmel128"][:, ::STRIDE].clone(),
        "mel_v1": whole["mel_v1"][..., ::STRIDE].clone(),
        "mel_v2": whole["mel_v2"][..., ::STRIDE].clone(),
        "mel_v3": whole["mel_v3"][..., ::STRIDE].clone(),
        "kaldi80": whole["kaldi80"][::STRIDE].clone(),
    }
    torch.save(golden, HERE / "audio_features.pt")


if __name__ == "__main__":
    main()
