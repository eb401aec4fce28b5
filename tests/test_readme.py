"""The README's Python runs as it stands, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (said,) = re.findall(r"# (torch\.Size.*)", code)
    assert done.stdout.strip() == said
    assert (tmp_path / "sunset-16-tokens.png").stat().st_size > 0
    codes, most = 336, 250
    assert (tmp_path / "sunset.tok").stat().st_size < codes + most


def test_every_command_of_the_readme_exists():
    from typer.testing import CliRunner

    from anytok.cli import app

    commands = set(re.findall(r"^    anytok (\w+)", README, re.MULTILINE))
    assert {"codecs", "encode", "decode", "roundtrip", "generate", "train"} <= commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
