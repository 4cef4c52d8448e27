"""The record in MLflow: a mirror of results folders, written by one process at a time and never by one that trains.

Whatever goes wrong costs one line, never a run; `sync` writes later what is missing, `rebuild` makes the whole store again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import mirror, ranks
from harness.config import nearest
from harness.mirror import database
from harness.progress import end_with_parent

DEFAULT = "sqlite:///results/mlflow.db"
EVERY = 20.0  # seconds between two passes over a folder that is being written
SHARE = 0.1  # of one core that these passes take at most


def record(folder: Path, uri: str | None = None) -> str | None:
    """Mirror a comparison, finished or not, and return the parent run's id; on failure say so and return None.

    Without a uri: MLFLOW_TRACKING_URI, else `mlflow.db` beside the folder, which is results/mlflow.db.
    """
    return _recorded(folder, uri, lambda at: mirror.Comparison(at, folder).write())


def record_sweep(folder: Path, uri: str | None = None) -> list[str] | None:
    """Mirror a folder's sweep.json, finished or not, and return the ids of its studies' runs; otherwise as `record`."""
    return _recorded(folder, uri, lambda at: mirror.Sweep(at, folder).write())


def _recorded(folder: Path, uri: str | None, write: Callable[[str], Any]) -> Any:
    uri = _uri(folder.parent, uri)
    try:
        with _one_writer(uri, folder.parent):
            _reachable(uri)
            done = write(uri)
            _let_read(database(uri))
            return done
    except Exception as error:  # a mirror must not break what it shows
        later = f"`retort sync {folder.name}` records it later"
        print(f"retort: not recorded in MLflow ({uri}): {_reason(error)}; {later}", file=sys.stderr)
        return None


@contextlib.contextmanager
def watching(folder: Path, on: bool = True, every: float = EVERY) -> Iterator[None]:
    """Mirror a folder while the block runs, from a process of its own at the lowest priority: training waits for nothing."""
    if not on or not ranks.first():
        yield
        return
    code = f"from pathlib import Path; from harness.tracking import watch; watch(Path({str(folder)!r}), {os.getpid()}, {every})"
    quiet: Any = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    try:
        process = subprocess.Popen([sys.executable, "-c", code], **quiet)
    except OSError as error:  # no memory left for it: it is all shown at the end
        print(f"retort: MLflow is not kept up meanwhile: {error.strerror}", file=sys.stderr)
        yield
        return
    try:
        yield
    finally:
        process.kill()  # anywhere: the next pass completes what this one began
        process.wait()


def watch(folder: Path, parent: int, every: float) -> None:
    """Mirror a folder again and again, as long as the parent lives."""
    end_with_parent()
    os.nice(19)
    pause = every
    while os.getppid() == parent:
        time.sleep(pause)
        begun = time.process_time()
        with contextlib.suppress(Exception):  # told by the last pass, which is the parent's
            _write(_uri(folder.parent, None), folder, wait=False)
        pause = max(every, (time.process_time() - begun) / SHARE)


def sync(
    results: Path,
    name: str | None = None,
    *,
    uri: str | None = None,
    models: bool = False,
) -> list[str]:
    """Mirror whatever is not there yet of one folder, or of all under results; returns their names."""
    uri = _uri(results, uri)
    chosen = _folders(results, name)
    _reachable(uri)
    for folder in chosen:
        try:
            _write(uri, folder, models=models)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: {_reason(error)}") from None
        except Exception as error:
            raise ValueError(
                f"{folder} could not be recorded in MLflow ({uri}): {_reason(error)}"
            ) from None
    return [folder.name for folder in chosen]


def rebuild(
    results: Path, *, uri: str | None = None, models: bool = False, sure: bool = False
) -> list[str]:
    """Make the MLflow store again from a results folder, and return the names of what it holds.

    A local database is made aside and swapped in by one transaction. On a server the runs of these folders are deleted, as
    MLflow deletes (`mlflow gc` erases them), and written anew, if one is `sure`.
    """
    uri = _uri(results, uri)
    chosen = _folders(results, None)
    file = database(uri)
    if file is None:
        _reachable(uri)
        if not sure:
            raise ValueError(
                f"--rebuild deletes the runs of {', '.join(f.name for f in chosen)} on {uri} and writes them again from "
                f"{results}: add --yes to do so"
            )
        with _one_writer(uri, results):
            for folder in chosen:
                mirror.forget(uri, folder)
        return sync(results, uri=uri, models=models)
    with _one_writer(uri, results):
        old = _runs(file)
        mine = {
            "",
            *(str(folder.resolve()) for folder in chosen),
        }  # what is gone from there is lost too
        strange = [place for place in old.values() if place is not None and place not in mine]
        if strange or None in old.values():
            raise ValueError(
                f"{file} also holds runs that are not, or no longer, of {results} "
                f"(such as those of {next(iter(strange), 'another program')}), which --rebuild would lose: "
                "use another database for these, or remove the file yourself"
            )
        aside = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            for folder in chosen:
                _mirrored(f"sqlite:///{aside}", folder, models)
            _swap(aside, file)
        finally:
            for path in file.parent.glob(f"{aside.name}*"):
                path.unlink()
        for run in old.keys() - _runs(file).keys():
            shutil.rmtree(file.parent / "mlartifacts" / run, ignore_errors=True)
    return [folder.name for folder in chosen]


def ui(uri: str | None = None, port: int | None = None) -> None:
    """Start the MLflow UI, print its address, and stay until interrupted."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT
    if uri.startswith(("http://", "https://")):
        print(f"The record is on a server: {uri}")
        return
    file = database(uri)
    if file is not None and not file.is_file():
        raise ValueError(
            f"{file} does not exist: nothing was recorded yet; run `retort compare` first, or `retort sync`"
        )
    port = port or _free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
        address = f"http://127.0.0.1:{port}"
        print(f"MLflow: {address} (ready in some seconds; Ctrl-C ends it)", flush=True)
        try:
            while server.poll() is None and not _answers("127.0.0.1", port):
                time.sleep(0.2)
            if server.poll() is None:
                for name, experiment in _experiments(file):
                    print(f"  {name}: {address}/#/{mirror.page(experiment)}", flush=True)
            if server.wait():
                log.seek(0)
                said = "\n".join(log.read().splitlines()[-5:])
                raise ValueError(f"`mlflow ui` ended with status {server.returncode}:\n{said}")
        except KeyboardInterrupt:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)  # its workers too
            server.wait()


def _uri(results: Path, uri: str | None) -> str:
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results / 'mlflow.db'}"


def _folders(results: Path, name: str | None) -> list[Path]:
    """What can be mirrored: comparisons, sweeps, and those that are still running."""
    found = sorted(path for path in results.glob("*") if _comparison(path) or _sweep(path))
    if name is None:
        if not found:
            raise ValueError(f"{results} holds no comparison and no sweep: nothing to record")
        return found
    chosen = [path for path in found if path.name == name]
    if not chosen:
        raise ValueError(
            f"no comparison or sweep {name!r} in {results}: {nearest(name, [p.name for p in found])}"
        )
    return chosen


def _comparison(folder: Path) -> bool:
    return (folder / "summary.json").is_file() or (folder / "runs").is_dir()


def _sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def _write(uri: str, folder: Path, *, models: bool = False, wait: bool = True) -> None:
    """Mirror all of a folder, as the one writer; if another writes and `wait` is off, leave it to the next pass."""
    with _one_writer(uri, folder.parent, wait) as mine:
        if mine:
            _mirrored(uri, folder, models)
            _let_read(database(uri))


def _mirrored(uri: str, folder: Path, models: bool) -> None:
    if _comparison(folder):
        mirror.Comparison(uri, folder).write(models)
    if _sweep(folder):
        mirror.Sweep(uri, folder).write()


@contextlib.contextmanager
def _one_writer(uri: str, results: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of the database, or of what is written to a server: parallel writers break sqlite, and make runs twice."""
    file = database(uri) or results / "mlflow.db"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{file}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
            )  # falls with the process
        except BlockingIOError:
            yield False
            return
        yield True


def _reachable(uri: str) -> None:
    """Ask a server at once, as MLflow would try for minutes."""
    url = urllib.parse.urlsplit(uri)
    if url.scheme in ("http", "https"):
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        if not _answers(url.hostname or "", port):
            raise ValueError(f"the tracking server {uri} does not answer; start it and try again")


def _runs(file: Path) -> dict[str, str | None]:
    """The runs of a database and the folders they mirror, "" for one that only its parent tells, None for one that is not ours."""
    query = (
        "select r.run_uuid, max(case when t.key = 'retort.key' then '' end), max(case when t.key = 'folder' then t.value end) "
        "from runs r left join tags t on t.run_uuid = r.run_uuid group by r.run_uuid"
    )
    rows = _asked(file, query)
    return {run: folder or mine for run, mine, folder in rows}


def _experiments(file: Path | None) -> list[tuple[str, str]]:
    """The experiments that have our view of their runs, the newest first."""
    query = (
        "select e.name, e.experiment_id from experiments e join experiment_tags t on t.experiment_id = e.experiment_id "
        f"where t.key = 'mlflow.sharedViewState.{mirror.VIEW}' and e.lifecycle_stage = 'active' order by e.last_update_time desc"
    )
    return [] if file is None else [(str(name), str(key)) for name, key in _asked(file, query)]


def _asked(file: Path, query: str) -> list[Sequence[Any]]:
    """What a database answers; nothing if it is none, or damaged. One that is busy or may not be read is not empty."""
    if not file.is_file():
        return []
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as opened:
            return opened.execute(query).fetchall()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "no such table" not in str(error):
            raise ValueError(f"{file} cannot be read: {error}; try again") from None
        return []


def _let_read(file: Path | None) -> None:
    """Let pages be read while one writes; the database keeps this setting."""
    if file is not None:
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(file, timeout=1)) as opened,
        ):
            opened.execute("pragma journal_mode = wal")


def _swap(aside: Path, file: Path) -> None:
    """One transaction, so that a server which has the database open sees the old or the new."""
    with contextlib.closing(sqlite3.connect(aside)) as new:
        try:
            with contextlib.closing(sqlite3.connect(file, timeout=60)) as old:
                new.backup(old)
            return
        except sqlite3.DatabaseError as error:
            if "not a database" not in str(error) and "malformed" not in str(error):
                raise
    for rest in ("-wal", "-shm", "-journal"):
        Path(f"{file}{rest}").unlink(missing_ok=True)
    os.replace(aside, file)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False
