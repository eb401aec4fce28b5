import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from anytok import bench
from anytok.backbone.directory import save_model
from anytok.codecs.registry import _THIRD_PARTY, register_codec
from anytok.generators.drafter import Drafter, save_drafter
from anytok.generators.trees import Dynamic, Static
from tests.backbone.tiny import Thumbnail, model


@pytest.fixture
def files(tmp_path, monkeypatch):
    register_codec("thumbnail/tiny", lambda path: Thumbnail())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny = model()
    save_model(tiny, tmp_path / "model", dtype=torch.float32)
    save_drafter(Drafter(tiny.transformer), tmp_path / "drafter.safetensors")
    yield tmp_path
    del _THIRD_PARTY["thumbnail/tiny"]


def test_bench_decode_compares_modes_and_keeps_to_delta(files):
    arguments = ["decode", str(files / "model"), "a", "bc"]
    arguments += ["--drafter", str(files / "drafter.safetensors"), "--k", "5", "--json"]
    arguments += ["--tree", "dynamic:3,3,8", "--save", str(files / "out")]
    for mode in ("lossless", "certified:0.2", "lantern:0.2"):
        arguments += ["--mode", mode]
    result = CliRunner().invoke(bench.app, arguments)
    assert result.exit_code == 0, result.output
    rows = {row["mode"]: row for row in json.loads(result.output)}
    assert list(rows) == ["plain", "lossless", "certified:0.2", "lantern:0.2"]
    assert rows["plain"]["compression"] == rows["plain"]["speed-up"] == 1
    assert rows["certified:0.2"]["TV max"] <= 0.2 + 1e-6
    assert rows["lantern:0.2"]["TV max"] > rows["certified:0.2"]["TV max"]
    assert all(row["ids/s"] > 0 for row in rows.values())
    plain = (files / "out" / "plain_1_0.png").read_bytes()
    assert plain == (files / "out" / "lossless_1_0.png").read_bytes()
    table = CliRunner().invoke(bench.app, [a for a in arguments if a != "--json"])
    assert "certified:0.2" in table.output


def test_names_of_modes_and_trees():
    assert bench.speculation("plain", "dynamic:1,1,1", 3) is None
    found = bench.speculation("certified:0.3", "dynamic:2,3,4", 5)
    assert (found.delta, found.k, found.tree) == (0.3, 5, Dynamic(depth=2, width=3, nodes=4))
    found = bench.speculation("lantern++:4", "mc_sim_7b_63", 5)
    assert (found.factor, found.tree) == (4.0, Static(shape="mc_sim_7b_63"))
    with pytest.raises(typer.BadParameter, match="mode is 'fast'"):
        bench.speculation("fast", "chain", 5)
    with pytest.raises(typer.BadParameter, match="the tree 'oak'"):
        bench.speculation("lossless", "oak", 5)
