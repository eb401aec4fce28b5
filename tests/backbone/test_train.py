"""What the backbone's entry point returns."""

from anytok.backbone import train as entry_point


def test_a_backbone_is_a_directory_and_other_networks_are_a_file(tmp_path, monkeypatch):
    final = tmp_path / "final.safetensors"
    monkeypatch.setattr(entry_point.entry, "train", lambda *given, data: final)
    assert entry_point.train("mini") == tmp_path / "model"
    final.touch()
    assert entry_point.train("vision_mini") == final
