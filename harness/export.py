"""A comparison in one file, to be browsed elsewhere: `NAME.retort.tar.gz`.

    manifest.json            first: version, name, and SHA-256 and size of every other member
    results/…                what lies in results/NAME: summary, report, samples, runs, problems, a sweep
    store/…                  groups of the store, where asked for

Equal folders give equal bytes: members in order, no times, no owners. Whoever unpacks trusts nothing but regular files that
the manifest names, in folders of their own, and moves them into place only when all of them are what it says.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Any

from harness import report, tracking
from harness.capsule import file_digest
from harness.config import nearest
from harness.report import sweep
from harness.store import writing

Progress = Callable[[str, int, int], None]  # phase, done, total
FORMAT = 1
SUFFIX = ".retort.tar.gz"
MANIFEST = "manifest.json"
KINDS = ("summary.json", "sweep.json")  # a comparison is finished, or its sweep
MANIFEST_BYTES = 64 * 2**20  # a manifest is not larger
CHUNK = 2**20
LEFT_OUT = {"reproduced", "study.log.leases"}  # folders; and checkpoints, partial and hidden files
DERIVED = (  # written again
    *("report.html", "report.md", "table.tex", "cells.csv", "pairs.csv"),
    *("sweep.html", "sweep.md"),
)
DAMAGED = (EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)


def export(
    name: str,
    *,
    results: Path = Path("results"),
    out: Path | None = None,
    models: bool = False,
    store: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Pack a finished comparison, and its sweep; students and the teacher's samples (out of `store`) only where asked for."""
    folder = results / name
    if not any((folder / kind).is_file() for kind in KINDS):
        known = {path.parent.name for kind in KINDS for path in results.glob(f"*/{kind}")}
        raise ValueError(f"no finished comparison {name!r} in {results}: {nearest(name, known)}")
    out = out or Path(f"{folder.name}{SUFFIX}")
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or give another file with --out")
    files = {f"results/{path}": folder / path for path in _files(folder, models)}
    if store is not None:
        files |= {f"store/{path}": store / path for path in _samples(folder, store)}
    told = _counter(progress, "packing", 2 * sum(path.stat().st_size for path in files.values()))
    listed: dict[str, dict[str, Any]] = {}
    for member, path in sorted(files.items()):
        size = path.stat().st_size
        listed[member] = {"sha256": file_digest(path), "bytes": size}
        told(size)
    manifest = {"format": FORMAT, "retort": metadata.version("retort"), "name": folder.name}
    manifest |= {"models": models, "store": store is not None, "files": listed}
    changed: list[Path] = []
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with writing(out), partial.open("wb") as raw, _packed(raw) as tar:
            text = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
            tar.addfile(_member(MANIFEST, len(text)), io.BytesIO(text))
            for member, path in sorted(files.items()):
                size = int(listed[member]["bytes"])
                with path.open("rb") as file:
                    reader = _Digest(file, told)
                    tar.addfile(_member(member, size), reader)
                if reader.digest != listed[member]["sha256"]:
                    changed.append(path)
        if changed:
            raise ValueError(f"{changed[0]} changed while it was packed: is a run going on?")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def unpack(
    file: Path,
    *,
    results: Path = Path("results"),
    store: Path | None = None,
    track: bool = True,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Check and unpack an archive of `export` under results/NAME, write its reports again and mirror it; its folder.

    Whatever is wrong is one error, and nothing stays behind.
    """
    file, results = Path(file), Path(results)
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    made = [path for path in (results, *results.parents) if not path.exists()]
    results.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".import-", dir=results))
    try:
        manifest = _extract(file, fresh, progress)
        folder = results / manifest["name"]
        places = {
            member: (folder if part == "results" else store or results / "store") / rest
            for member in manifest["files"]
            for part, _, rest in [member.partition("/")]
        }
        for member, place in places.items():
            _check_free(place, manifest["files"][member]["sha256"], folder)
        _check_shown(file, fresh / "results")
        if not folder.exists():
            os.rename(fresh / "results", folder)
        for member, place in places.items():
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(fresh / member, place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    for name, mirror in zip(KINDS, (tracking.record, tracking.record_sweep), strict=True):
        if (folder / name).is_file():
            _reports(name)(folder)
            if track:
                mirror(folder)
    return folder


def _reports(kind: str) -> Callable[[Path], object]:
    return report.write if kind == "summary.json" else sweep.write


def _check_shown(file: Path, folder: Path) -> None:
    """Refuse, before anything is in place, what no report can be made of."""
    for name in KINDS:
        if (folder / name).is_file():
            try:
                _reports(name)(folder)
            except OSError:  # a full disk
                raise
            except Exception as error:  # whatever another version, or somebody, put there
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise ValueError(
                    f"{file}: its {name} is not one that this version shows ({why})"
                ) from None


def _files(folder: Path, models: bool) -> Iterator[str]:
    """What of a comparison's folder goes into its archive."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        top = [part for part in inside.parts[:2] if part != "sweep"][:1]  # a sweep has students too
        if {*top} & (LEFT_OUT if models else LEFT_OUT | {"models"}):
            continue
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and an archive holds files: put the file there")
        if path.is_file() and path.suffix not in (".pt", ".partial", ".lock"):
            yield inside.as_posix()


def _samples(folder: Path, store: Path) -> Iterator[str]:
    """The groups of samples that the teachers of the runs wrote."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("run.json")]
    authors = {run["models"]["teacher"] for run in runs if "teacher" in run.get("models", {})}
    for label in sorted(store.glob("samples/??/*/group.json")):
        if json.loads(label.read_text(encoding="utf-8"))["model"] in authors:
            segments = sorted(label.parent.glob("*.arrow"))
            yield from (path.relative_to(store).as_posix() for path in (label, *segments))


def _extract(file: Path, fresh: Path, progress: Progress) -> dict[str, Any]:
    """Unpack into an empty folder, each member checked against the manifest, and return that."""
    try:
        with tarfile.open(file, "r|gz") as tar:
            members = iter(tar)
            manifest = _manifest(file, tar, next(members, None))
            left = dict(manifest["files"])
            total = sum(entry["bytes"] for entry in left.values())
            if shutil.disk_usage(fresh).free < total:
                raise ValueError(f"{file} needs {total >> 20} MiB, and {fresh.parent} has less")
            told = _counter(progress, "unpacking", total)
            for member in members:
                entry = left.pop(member.name, None)
                if entry is None or not member.isreg() or member.size != entry["bytes"]:
                    raise ValueError(
                        f"{file}: the member {member.name!r} is not as its manifest says"
                    )
                source = tar.extractfile(member)
                assert source is not None
                reader, place = _Digest(source, told), fresh / member.name
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("xb") as target:
                    while block := reader.read(CHUNK):
                        with writing(place):
                            target.write(block)
                if reader.digest != entry["sha256"]:
                    raise ValueError(
                        f"{file} is damaged: {member.name} has another content than it had"
                    )
    except DAMAGED as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"{file} is damaged, or no archive of `retort export` ({why})") from None
    if left:
        raise ValueError(f"{file} is damaged: it lacks {min(left)} and {len(left) - 1} more")
    return manifest


def _manifest(file: Path, tar: tarfile.TarFile, first: tarfile.TarInfo | None) -> dict[str, Any]:
    """The first member, refused unless it names plain files in the two folders."""
    wrong = f"{file} is no archive of `retort export`"
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MANIFEST_BYTES:
        raise ValueError(f"{wrong}: it does not begin with a {MANIFEST}")
    source = tar.extractfile(first)
    assert source is not None
    try:
        manifest: dict[str, Any] = json.loads(source.read())
        entries = manifest["files"].items()
        known = manifest["format"] == FORMAT
        named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", manifest["name"])
        plain = {"results/summary.json", "results/sweep.json"} & set(manifest["files"]) and all(
            re.fullmatch(r"[0-9a-f]{64}", e["sha256"]) and e["bytes"] >= 0 for _, e in entries
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{wrong}: its {MANIFEST} cannot be read") from None
    if not known:
        raise ValueError(f"{file} has the format {manifest['format']}, this version reads {FORMAT}")
    if not (named and plain):
        raise ValueError(f"{wrong}: its {MANIFEST} cannot be read")
    for member in manifest["files"]:
        if not _inside(member):
            raise ValueError(
                f"{file} is refused: {member!r} would be written outside of its folder"
            )
    return manifest


def _inside(member: str) -> bool:
    """Whether a path stays in one of the two folders, written as `export` writes it."""
    path = PurePosixPath(member)
    odd = {"..", "."} & set(member.split("/")) or "\\" in member or "\0" in member
    return (
        path.as_posix() == member
        and not odd
        and len(path.parts) > 1
        and path.parts[0] in ("results", "store")
    )


def _check_free(place: Path, sha256: str, folder: Path) -> None:
    """A place is empty, or holds the same file; reports are written again anyway."""
    if place.parent == folder and place.name in DERIVED:
        return
    if place.is_symlink() or (
        place.exists() and not (place.is_file() and file_digest(place) == sha256)
    ):
        raise ValueError(
            f"{place} is there already with another content: import into another folder with --results"
        )


@contextlib.contextmanager
def _packed(raw: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """A tar file through gzip that says no time and no name."""
    with (
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        yield tar


def _member(name: str, size: int) -> tarfile.TarInfo:
    """No time, no owner."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def _counter(progress: Progress, phase: str, total: int) -> Callable[[int], None]:
    """Adds up bytes and shows them."""
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        progress(phase, done, total)

    return told


class _Digest:
    """A file that is read, the SHA-256 of what was read, and somebody who is told the bytes of each block."""

    def __init__(self, file: IO[bytes], told: Callable[[int], None]) -> None:
        self.file, self.told, self.hash = file, told, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.hash.update(block)
        self.told(len(block))
        return block

    @property
    def digest(self) -> str:
        return self.hash.hexdigest()
