"""A comparison packed here and unpacked there; and archives that are not what they should be."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness import cli, compare, export, report
from harness.config import parse
from harness.report import sweep
from harness.store import Store
from tests.harness.test_reproduce import SUITE
from tests.harness.test_sweep_report import data, study, trial

Members = dict[str, bytes]
SETTING = {**SUITE, "methods": {"sft": {"samples": 2}}, "seeds": 1}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A comparison, its sweep's record and what must not travel; and all of it in an archive."""
    root = tmp_path_factory.mktemp("there")
    results, folder = root / "results", root / "results/small"
    compare(parse(SETTING), results=results, quiet=True, track=False)
    (folder / "sweep.json").write_text(
        json.dumps(
            data(
                study(
                    "sft",
                    [
                        trial(0, {"alpha": 1.0, "beta": 1.0}, 0.503),
                        trial(1, {"alpha": 0.4, "beta": 1.7}, 0.521),
                    ],
                )
            )
        )
    )
    sweep.write(folder)
    for junk in (
        "reproduced/x",
        "runs/sft/0/checkpoint.pt",
        "a.1.partial",
        ".b",
        "sweep/models/t/0/w.safetensors",
        "study.log.leases/1",
    ):
        (folder / junk).parent.mkdir(parents=True, exist_ok=True)
        (folder / junk).write_text("x")
    (folder / "runs/models/0").mkdir(parents=True)  # an arm may be called so
    (folder / "runs/models/0/note.txt").write_text("kept")
    archive = export.export(
        "small",
        results=results,
        out=root / "small.retort.tar.gz",
        models=True,
        store=results / "store",
    )
    return folder, archive


def members(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def forged(
    path: Path,
    files: Members,
    manifest: dict[str, Any] | None = None,
    more: tuple[tarfile.TarInfo, ...] = (),
) -> Path:
    """An archive by hand; by default its manifest tells the truth."""
    listed = {
        n: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for n, b in files.items()
    }
    said = {"format": 1, "retort": "0", "name": "small", "files": listed, **(manifest or {})}
    with tarfile.open(path, "w:gz") as tar:
        for name, body in {"manifest.json": json.dumps(said).encode(), **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        for member in more:
            tar.addfile(member)
    return path


def test_another_machine_browses_and_goes_on(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command: the same report, a record in MLflow, and nothing to train or to sample."""
    folder, archive = made
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RETORT_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["import", str(archive)], catch_exceptions=False)
    assert done.exit_code == 0 and "Imported: results/small" in done.output
    there, here = contents(folder), contents(tmp_path / "results/small")
    assert set(there) - set(here) == {
        "reproduced/x",
        "runs/sft/0/checkpoint.pt",
        "a.1.partial",
        ".b",
        "study.log.leases/1",
    }
    assert here == {name: there[name] for name in here}  # the reports, written again, among them
    assert {
        "runs/sft/0/capsule.json",
        "problems.jsonl",
        "samples/micro_math--base--0.parquet",
        "runs/models/0/note.txt",
    } <= set(here)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/results/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert {"small", "sft/0", "base/0"} <= names

    monkeypatch.setattr("harness.cell.train", lambda *given, **more: pytest.fail("it trained"))
    monkeypatch.setattr("harness.cell.evaluate", lambda *given, **more: pytest.fail("it answered"))
    again = compare(parse(SETTING), results=tmp_path / "results", quiet=True, track=False)
    assert again["pairs"] == json.loads(there["summary.json"])["pairs"]
    assert again["cells"] == json.loads(there["summary.json"])["cells"]


def test_the_store_travels_where_asked_for(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The teacher's samples, and not the responses of students."""
    folder, archive = made
    Store(folder.parent / "store").put("samples", {"model": "another"}, {"k": {"text": "x"}})
    inside = [name for name in members(archive) if name.startswith("store/")]
    assert inside and all(name.startswith("store/samples/") for name in inside)
    export.unpack(archive, results=tmp_path / "r", store=tmp_path / "store", track=False)
    teacher = json.loads((folder / "runs/sft/0/run.json").read_text())["models"]["teacher"]
    (entry,) = Store(tmp_path / "store").show()
    assert entry.group["model"] == teacher and entry.rows == 24 * 2 and not entry.damaged
    more = tmp_path / "more.tar.gz"
    export.export("small", results=folder.parent, out=more, store=folder.parent / "store")
    assert {n for n in members(more) if n.startswith("store/")} == set(inside)  # not the other's


def test_equal_folders_give_equal_bytes(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = made
    seen: list[tuple[int, int]] = []
    first = export.export(
        "small",
        results=folder.parent,
        out=tmp_path / "a",
        progress=lambda _, done, total: seen.append((done, total)),
    )
    shutil.copytree(folder, tmp_path / "moved/small")  # other times, other place
    second = export.export("small", results=tmp_path / "moved", out=tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == bytes(4)  # gzip's time, which two exports of one second share
    with tarfile.open(first) as tar:
        assert {(member.mtime, member.uname, member.uid) for member in tar} == {(0, "", 0)}
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    inside = members(first)
    assert not any("models/" in n and "runs/models" not in n for n in inside)
    manifest = json.loads(inside.pop("manifest.json"))
    assert {n: e["sha256"] for n, e in manifest["files"].items()} == {
        n: hashlib.sha256(b).hexdigest() for n, b in inside.items()
    }
    assert manifest["retort"] and manifest["models"] is manifest["store"] is False


def test_a_second_import_changes_nothing_and_another_content_is_refused(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, archive = made
    target = export.unpack(archive, results=tmp_path, track=False)
    for name in ("report.html", "cells.csv", "pairs.csv"):  # are written again in any case
        (target / name).write_text("old")
    export.unpack(archive, results=tmp_path, track=False)
    before = contents(tmp_path)
    for name in ("report.html", "cells.csv", "pairs.csv"):
        assert before[f"small/{name}"] == (folder / name).read_bytes()
    (target / "problems.jsonl").write_text("others\n")
    before["small/problems.jsonl"] = b"others\n"
    (target / "summary.json").unlink()
    del before["small/summary.json"]
    with pytest.raises(
        ValueError, match=r"problems.jsonl is there already with another content.*--results"
    ):
        export.unpack(archive, results=tmp_path, track=False)
    assert contents(tmp_path) == before


# -- archives that are not what they should be --------------------------------------------------

GOOD: Members = {"results/summary.json": b"{}", "results/samples/a": b"abc"}


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def hostile(name: str) -> Callable[[Path], Path]:
    return lambda path: forged(path, {**GOOD, name: b"x"})


def listed_link(kind: bytes) -> Callable[[Path], Path]:
    entry = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    sums = {n: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for n, b in GOOD.items()}
    files = {**sums, "results/link": entry}
    return lambda path: forged(path, GOOD, {"files": files}, (link("results/link", kind),))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "up": (hostile("results/../../x"), "outside of its folder"),
    "absolute": (hostile("/tmp/x"), "outside of its folder"),
    "dots": (hostile("results/./x"), "outside of its folder"),
    "elsewhere": (hostile("other/x"), "outside of its folder"),
    "double": (hostile("results//x"), "outside of its folder"),
    "name": (lambda path: forged(path, GOOD, {"name": "../small"}), "cannot be read"),
    "symlink": (listed_link(tarfile.SYMTYPE), "is not as its manifest says"),
    "hard link": (listed_link(tarfile.LNKTYPE), "is not as its manifest says"),
    "pipe": (listed_link(tarfile.FIFOTYPE), "is not as its manifest says"),
    "unlisted": (lambda path: forged(path, GOOD, more=(tarfile.TarInfo("results/b"),)), "'results/b' is not as"),
    "twice": (lambda path: forged(path, GOOD, more=(tarfile.TarInfo("results/samples/a"),)), "'results/samples/a' is not as"),
    "content": (
        lambda path: forged(path, GOOD, {"files": {n: {"sha256": "0" * 64, "bytes": len(b)} for n, b in GOOD.items()}}),
        "is damaged: results/summary.json has another content",
    ),
    "missing": (lambda path: forged(path, {"results/summary.json": b"{}"}, {"files": {
        n: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for n, b in GOOD.items()}}), "lacks results/samples/a"),
    "size": (lambda path: forged(path, GOOD, {"files": {n: {"sha256": "0" * 64, "bytes": 1 << 60} for n in GOOD}}), "MiB, and"),
    "format": (lambda path: forged(path, GOOD, {"format": 2}), "has the format 2, this version reads 1"),
    "manifest": (lambda path: forged(path, GOOD, {"files": 3}), "cannot be read"),
    "empty": (lambda path: forged(path, {}), "cannot be read"),
    "no comparison": (lambda path: forged(path, {"results/a": b""}), "cannot be read"),
    "summary": (lambda path: forged(path, GOOD), "summary.json is not one that this version shows (KeyError: 'cells')"),
    "text": (lambda path: path.write_text("hello"), "is damaged, or no archive"),
    "other gzip": (lambda path: path.write_bytes(gzip.compress(b"hello")), "no archive of `retort export`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    make, words = BAD[name]
    path = tmp_path / "in/bad.tar.gz"
    path.parent.mkdir()
    make(path)
    with pytest.raises(ValueError) as error:
        export.unpack(
            path, results=tmp_path / "in/deep/results", store=tmp_path / "in/store", track=False
        )
    assert (
        words in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)
    )
    assert list(contents(tmp_path)) == ["in/bad.tar.gz"] and not (tmp_path / "in/deep").exists()


def test_the_good_one_among_them_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is refused above is refused for its one defect."""
    monkeypatch.setattr(report, "write", lambda folder: [])  # its summary is empty
    export.unpack(forged(tmp_path / "a", GOOD), results=tmp_path / "results", track=False)
    assert contents(tmp_path / "results/small") == {"summary.json": b"{}", "samples/a": b"abc"}


def test_an_archive_that_was_cut_or_altered_anywhere_is_refused(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    _, archive = made
    whole = archive.read_bytes()
    bad = tmp_path / "bad.tar.gz"
    places = [0, 1, 10, 500, 5000, len(whole) // 2, len(whole) - 5000]
    for cut in places:
        bad.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"damaged|no archive") as error:
            export.unpack(bad, results=tmp_path / "results", track=False)
        assert "\n" not in str(error.value)
    for at in places[3:]:
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with pytest.raises(ValueError) as error:
            export.unpack(bad, results=tmp_path / "results", track=False)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar.gz"]


def test_what_cannot_be_packed_is_one_line(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, archive = made
    results = folder.parent
    with pytest.raises(ValueError, match=r"no finished comparison 'smal' .*did you mean 'small'"):
        export.export("smal", results=results, out=tmp_path / "a")
    with pytest.raises(ValueError, match=r"is there already"):
        export.export("small", results=results, out=archive)
    shutil.copytree(folder, tmp_path / "r/small")
    (tmp_path / "r/small/samples/z").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"samples/z is a link"):
        export.export("small", results=tmp_path / "r", out=tmp_path / "a")
    (tmp_path / "r/small/samples/z").unlink()
    changing = tmp_path / "r/small/problems.jsonl"

    def change(phase: str, done: int, total: int) -> None:
        if (phase, 2 * done) == ("packing", total):  # all digests are taken
            changing.write_bytes(b"#" * changing.stat().st_size)

    with pytest.raises(ValueError, match=r"problems.jsonl changed while it was packed"):
        export.export("small", results=tmp_path / "r", out=tmp_path / "a", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
