"""Fetching and unpacking: pinned, resumable, safe. Made-up archives and clients, no network."""

import gzip
import io
import re
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

import anytok.assets.recipes as recipes
from anytok.assets.recipes import fetch
from anytok.assets.recipes.fetch import FetchError, apt_deb, npm_pack, pip_wheel, sha256_of, unpack


def tar_bytes(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as bundle:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            bundle.addfile(info)
    return stream.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in files.items():
            bundle.writestr(name, data)
    return stream.getvalue()


def ar_member(name: str, data: bytes) -> bytes:
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    return head + data + b"\n" * (len(data) % 2)


def deb_bytes(files: dict[str, bytes]) -> bytes:
    control = tar_bytes({"./control": b"Package: tiny\nVersion: 1\nArchitecture: all\n"})
    members = [
        ar_member("debian-binary", b"2.0\n"),
        ar_member("control.tar.gz", control),
        ar_member("data.tar.gz", tar_bytes(files)),
    ]
    return b"!<arch>\n" + b"".join(members)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A folder that is the whole PATH, and a way to put a client's imitation into it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!{shutil.which('sh')}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    put.hide = lambda: monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return put


@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_unpack_takes_what_matches(tmp_path, make):
    archive = tmp_path / "tiny.bin"
    archive.write_bytes(make({"package/a/x.json": b"{}", "package/b.txt": b"no"}))
    folder = unpack(archive, ("*.json",))
    assert (folder / "package/a/x.json").read_bytes() == b"{}"
    assert not (folder / "package/b.txt").exists()
    assert unpack(archive, ("*.txt",)) != folder


def test_second_unpack_does_not_read_the_archive(tmp_path):
    archive = tmp_path / "tiny.tgz"
    archive.write_bytes(tar_bytes({"a": b"1"}))
    folder = unpack(archive)
    archive.write_bytes(b"no archive any more")
    assert unpack(archive) == folder


def test_interrupted_unpack_leaves_nothing(tmp_path):
    archive = tmp_path / "tiny.tgz"
    archive.write_bytes(tar_bytes({"good": b"1", "../bad": b"2"}))
    with pytest.raises(FetchError):
        unpack(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.tgz"]


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "c:\\out", "a\\..\\out"])
@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_unsafe_names_are_refused(tmp_path, make, name):
    archive = tmp_path / "evil.bin"
    archive.write_bytes(make({name: b"x"}))
    with pytest.raises(FetchError, match="unsafe name"):
        unpack(archive)


def test_links_are_left_out(tmp_path):
    archive = tmp_path / "links.tgz"
    archive.write_bytes(tar_bytes({"real": b"1"}, links={"link": "/etc/passwd"}))
    folder = unpack(archive)
    assert (folder / "real").exists()
    assert not (folder / "link").is_symlink()


@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_bombs_stop_at_the_limit(tmp_path, make):
    archive = tmp_path / "bomb.bin"
    archive.write_bytes(make({"zeros": bytes(3_000_000)}))
    assert archive.stat().st_size < 100_000
    with pytest.raises(FetchError, match="more than the limit"):
        unpack(archive, max_bytes=2_000_000)


@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_truncated_archives_name_the_file(tmp_path, make):
    archive = tmp_path / "short.bin"
    archive.write_bytes(make({"a": bytes(range(256)) * 200})[:-60])
    with pytest.raises(FetchError, match=r"short\.bin"):
        unpack(archive)


def test_nothing_matches_is_an_error(tmp_path):
    archive = tmp_path / "tiny.tgz"
    archive.write_bytes(tar_bytes({"a": b"1"}))
    with pytest.raises(FetchError, match=r"nothing that matches \*\.png"):
        unpack(archive, ("*.png",))


def test_single_gzip_file(tmp_path):
    archive = tmp_path / "film.mp4.gz"
    archive.write_bytes(gzip.compress(b"film"))
    assert (unpack(archive) / "film.mp4").read_bytes() == b"film"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this system")
def test_debian_archive(tmp_path):
    archive = tmp_path / "tiny.deb"
    archive.write_bytes(deb_bytes({"./usr/share/a.txt": b"1", "./usr/share/b.png": b"2"}))
    folder = unpack(archive, ("*.txt",))
    assert [path.name for path in folder.rglob("*.*") if path.name != fetch.MARKER] == ["a.txt"]


def test_fetch_checks_and_keeps(tmp_path, client):
    client("npm", 'test "$1" = pack && printf content > scope-tiny-1.0.0.tgz')
    expected = sha256_of(_file(tmp_path / "content", b"content"))
    cache = tmp_path / "cache"
    path = npm_pack("@scope/tiny", "1.0.0", expected, cache=cache)
    assert path == cache / "scope-tiny-1.0.0.tgz"
    client("npm", "exit 1")  # from now on the client fails: the cache must do
    assert npm_pack("@scope/tiny", "1.0.0", expected, cache=cache) == path


def test_other_bytes_are_refused(tmp_path, client):
    client("npm", "printf other > tiny-1.0.0.tgz")
    with pytest.raises(FetchError, match=r"tiny-1\.0\.0\.tgz has SHA-256 .*, expected 0000"):
        npm_pack("tiny", "1.0.0", "0" * 64, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_cache_is_fetched_again(tmp_path, client):
    client("npm", "printf content > tiny-1.0.0.tgz")
    expected = sha256_of(_file(tmp_path / "content", b"content"))
    damaged = tmp_path / "cache" / "tiny-1.0.0.tgz"
    damaged.parent.mkdir()
    damaged.write_bytes(b"half a fi")
    assert npm_pack("tiny", "1.0.0", expected, cache=damaged.parent).read_bytes() == b"content"


def test_failing_client_is_quoted(tmp_path, client):
    client("apt-get", "echo 'E: Unable to locate package tiny' >&2; exit 100")
    with pytest.raises(FetchError, match=r"apt-get update.*Unable to locate package tiny"):
        apt_deb("tiny", "1:2.0-1", "0" * 64, cache=tmp_path / "cache")


def test_missing_client_says_what_to_install(tmp_path, client, monkeypatch):
    client.hide()
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="command 'npm' is missing; install Node"):
        npm_pack("tiny", "1.0.0", "0" * 64, cache=tmp_path)
    with pytest.raises(FetchError, match="command 'pip' is missing"):
        pip_wheel("tiny", "1.0.0", "0" * 64, cache=tmp_path)


def test_no_recipe_names_a_registry():
    for path in Path(next(iter(recipes.__path__))).glob("*.py"):
        found = re.findall(r"https?://(?!www\.w3\.org)\S+", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name} holds the address {found}"


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
