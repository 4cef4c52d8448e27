"""The store: write-once segments of finished batches, found by the content of what decided them.

    root / kind / ab / abcdef… / group.json        what the group is (its digest names the folder)
                               / 0123….arrow       one batch, named by the SHA-256 of its bytes
    root / .locks / ….lock                         claims, gone when released

A segment appears by an atomic rename, so a reader sees all of it or nothing. A file whose bytes do not match its name
is ignored. Identical work gives identical files, so two stores are merged by copying one over the other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Fields = Mapping[str, Any]

DAY = 86_400.0  # seconds
NO_LOCKS = {
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
}  # what a file system without locks answers
_ABSENT = object()  # a row that lacks a column which others have
_held: set[int] = set()  # file descriptors of the claims of this process


class StoreError(ValueError):
    """The disk refused."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One group of the store, as `show` lists it."""

    kind: str
    group: dict[str, Any]  # empty if group.json cannot be read
    rows: int  # a key that two segments hold counts twice
    bytes: int
    last_used: float  # seconds since the epoch
    damaged: tuple[str, ...]  # names of files that cannot be read
    folder: Path


@dataclass(slots=True)
class _Index:
    """Where each key of a group lies, as far as its segments have been seen."""

    seen: set[str] = field(default_factory=set)
    rows: dict[str, tuple[str, int]] = field(default_factory=dict)  # key -> segment, row


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value: keys sorted, tuples as lists, floats exact."""
    return hashlib.sha256(_json(value, finite=True).encode()).hexdigest()


def short_digest(value: Any) -> str:
    """The first 12 hexadecimal digits of the digest, for names that people read."""
    return digest(value)[:12]


class Store:
    """Rows of finished work under (kind, group, key), shared by any number of processes.

    Values are str, int, float, bool, None, lists of int or float, or anything else that JSON holds; they come back
    exactly, but for tuples, which come back as lists.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._indexes: dict[Path, _Index] = {}

    def get(self, kind: str, group: Fields, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The rows that are there, in the order of the keys; one that is missing is left out."""
        folder = self._folder(kind, group)
        wanted = list(dict.fromkeys(keys))
        index = self._refresh(folder)
        segments: dict[str, list[int]] = {}
        for key in wanted:
            if key in index.rows:
                name, row = index.rows[key]
                segments.setdefault(name, []).append(row)
        found: dict[str, dict[str, Any]] = {}
        for name, rows in segments.items():
            batch = _read(folder / name)
            if batch is None:  # pruned or damaged since it was indexed: look again
                del self._indexes[folder]
                return self.get(kind, group, wanted)
            found.update(_decode(batch, rows))
        return {key: found[key] for key in wanted if key in found}

    def put(self, kind: str, group: Fields, rows: Mapping[str, Fields]) -> None:
        """Write one finished batch as one segment."""
        folder = self._folder(kind, group)
        if not rows:
            return
        data = _encode(rows)
        name = hashlib.sha256(data).hexdigest() + ".arrow"
        with _explained(folder):
            try:
                _write_segment(folder, group, name, data)
            except FileNotFoundError:  # the folder was pruned while we wrote
                _write_segment(folder, group, name, data)
        if folder in self._indexes:  # a damaged file of this name is whole now
            self._indexes[folder].seen.discard(name)

    @contextlib.contextmanager
    def claim(self, kind: str, group: Fields, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a piece of work; False if another holds it and `wait` is off. It falls with its process."""
        path = self.root / ".locks" / f"{digest([kind, dict(group), name])}.lock"
        locks, descriptor = True, None
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = lock(path, wait)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                locks = False  # work may be done twice there, and is the same
        if not locks:
            yield True
            return
        if descriptor is None:
            yield False
            return
        owner = os.getpid()
        try:
            yield True
        finally:
            if owner == os.getpid():  # not in a child that was forked inside the block
                with contextlib.suppress(OSError):
                    path.unlink()
                release(descriptor)

    def show(self, kind: str | None = None) -> list[Entry]:
        """What the store holds, by kind, the group used last first. Quick: `verify` reads every byte."""
        entries = (_entry(folder) for folder in self._groups(kind))
        return sorted(entries, key=lambda entry: (entry.kind, -entry.last_used))

    def prune(
        self, kind: str | None = None, older_than_days: float | None = None, dry_run: bool = False
    ) -> int:
        """Remove groups (of one kind; not used for some days) and abandoned temporary files; bytes freed."""
        now, freed = time.time(), 0
        for folder in self._groups(kind):
            entry = _entry(folder)
            if older_than_days is None or entry.last_used < now - older_than_days * DAY:
                freed += entry.bytes
                if not dry_run:
                    with _explained(folder):
                        _remove(folder)
                continue
            for path in folder.glob(".*.tmp"):
                with _explained(path), contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if status.st_mtime < now - DAY:
                        freed += status.st_size
                        if not dry_run:
                            path.unlink()
        return freed

    def verify(self) -> list[Path]:
        """Files that are not what their name says: torn, altered or foreign. They are ignored; delete them at will."""
        bad = []
        for folder in self._groups(None):
            bad += [path for path in sorted(folder.glob("*.arrow")) if _read(path) is None]
            if digest(_entry(folder).group) != folder.name:
                bad.append(folder / "group.json")
        return bad

    def _folder(self, kind: str, group: Fields) -> Path:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind):
            raise ValueError(f"kind {kind!r}: use lower-case letters, digits, - and _")
        name = digest(dict(group))
        return self.root / kind / name[:2] / name

    def _groups(self, kind: str | None) -> list[Path]:
        pattern = f"{kind or '[!.]*'}/??/{'[0-9a-f]' * 64}"
        return sorted(folder for folder in self.root.glob(pattern) if folder.is_dir())

    def _refresh(self, folder: Path) -> _Index:
        """Read the keys of segments that are new since the last look; of equal keys the first segment by name wins."""
        names = set()
        with _explained(folder), contextlib.suppress(FileNotFoundError):
            names = {name for name in os.listdir(folder) if name.endswith(".arrow")}
        index = self._indexes.setdefault(folder, _Index())
        for name in sorted(names - index.seen):
            index.seen.add(name)
            batch = _read(folder / name)
            for row, key in enumerate(batch.column(0).to_pylist() if batch is not None else ()):
                if key not in index.rows or name < index.rows[key][0]:
                    index.rows[key] = name, row
        with contextlib.suppress(OSError):  # a store that may only be read serves as well
            os.utime(folder / "group.json")
        return index


# Segments


def _encode(rows: Mapping[str, Fields]) -> bytes:
    """A batch as an Arrow file, all in sorted order so that equal rows give equal bytes."""
    import pyarrow as pa

    keys = sorted(rows)
    names = sorted({name for row in rows.values() for name in row})
    columns = [_column(name, [rows[key].get(name, _ABSENT) for key in keys]) for name in names]
    schema = pa.schema(
        [pa.field("key", pa.string()), *(column[0] for column in columns)],
        metadata={"rows": str(len(keys))},
    )
    arrays = [pa.array(keys, pa.string()), *(column[1] for column in columns)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


def _column(name: str, values: list[Any]) -> tuple[pa.Field, pa.Array]:
    """An Arrow column if the values share a type, else JSON text. Null means None, or absent where a row lacks it."""
    import pyarrow as pa

    types = {
        "NoneType": pa.null(),
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "empty": pa.list_(pa.int64()),
        "ints": pa.list_(pa.int64()),
        "floats": pa.list_(pa.float64()),
    }
    absent = any(value is _ABSENT for value in values)
    forms = {_form(value) for value in values if value is not _ABSENT}
    if forms & {"ints", "floats"}:
        forms.discard("empty")
    if len(forms) > 1 and not absent:
        forms.discard("NoneType")
    form = forms.pop() if len(forms) == 1 else "json"
    if form in types and not (absent and form == "NoneType"):
        plain = [None if value is _ABSENT else value for value in values]
        # Arrow refuses integers beyond 64 bits and lone surrogates; JSON holds them.
        with contextlib.suppress(OverflowError, UnicodeEncodeError, pa.ArrowInvalid):
            array = pa.array(plain, types[form])
            return pa.field(name, array.type, metadata={"absent": "1"} if absent else None), array
    texts = [None if value is _ABSENT else _json(value) for value in values]
    return pa.field(name, pa.string(), metadata={"json": "1"}), pa.array(texts, pa.string())


def _form(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        inside = set(map(type, value))
        if not inside:
            return "empty"
        return "ints" if inside == {int} else "floats" if inside == {float} else "json"
    return type(value).__name__ if type(value) in (str, int, float, bool, type(None)) else "json"


def _decode(batch: pa.RecordBatch, rows: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The rows of a batch by key."""
    if len(rows) < batch.num_rows:
        batch = batch.take(rows)
    keys = batch.column(0).to_pylist()
    found: list[dict[str, Any]] = [{} for _ in keys]
    for spec, column in zip(list(batch.schema)[1:], batch.columns[1:], strict=True):
        marks = spec.metadata or {}
        values = _values(column)
        if b"json" in marks:
            values = [_ABSENT if text is None else json.loads(text) for text in values]
        elif b"absent" in marks:
            values = [_ABSENT if value is None else value for value in values]
        for row, value in zip(found, values, strict=True):
            if value is not _ABSENT:
                row[spec.name] = value
    return dict(zip(keys, found, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """A column as Python values; lists are cut from one flat list, some ten times faster than Arrow's own way."""
    import pyarrow as pa

    if not pa.types.is_list(column.type):
        return column.to_pylist()
    flat = column.values.to_numpy().tolist()
    lists = [flat[start:end] for start, end in itertools.pairwise(column.offsets.to_pylist())]
    if column.null_count:
        valid = column.is_valid().to_pylist()
        return [values if there else None for values, there in zip(lists, valid, strict=True)]
    return lists


def _read(path: Path) -> pa.RecordBatch | None:
    """A segment; None if it is gone or is not, byte for byte, what its name says."""
    import pyarrow as pa

    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            return None
        return pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    except (OSError, pa.ArrowException):
        return None


def _json(value: Any, finite: bool = False) -> str:
    if not _text_keys(value):
        raise ValueError("mapping keys must be text: JSON would turn 1 and '1' into one key")
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=not finite)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cannot store or hash this value ({error}); "
            "use text, finite numbers, bool, None, lists and dicts of them"
        ) from None


PLAIN = frozenset((int, float, str, bool, type(None)))


def _text_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(_text_keys, value.values()))
    if isinstance(value, (list, tuple)):
        if PLAIN.issuperset(map(type, value)):  # thousands of token ids, at the speed of C
            return True
        return all(_text_keys(item) for item in value if isinstance(item, (dict, list, tuple)))
    return True


# Files


def _write_segment(folder: Path, group: Fields, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    label = folder / "group.json"
    if not label.exists():
        _write(label, json.dumps(dict(group), sort_keys=True, indent=1).encode())
    _write(folder / name, data)


def _write(path: Path, data: bytes) -> None:
    """Make a file appear whole or not at all, also through a power cut."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(folder: Path) -> None:
    """Take a group away in one rename, so that a writer finds all of it or none."""
    trash = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    with contextlib.suppress(FileNotFoundError):  # another process pruned it
        os.rename(folder, trash)
    for path in folder.parent.glob(".*"):  # also what a killed prune left
        shutil.rmtree(path, ignore_errors=True)


def _entry(folder: Path) -> Entry:
    import pyarrow as pa

    size = rows = 0
    group: dict[str, Any] = {}
    last_used, damaged = 0.0, []
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        path = folder / name
        try:
            status = path.stat()
            size, last_used = size + status.st_size, max(last_used, status.st_mtime)
            if path.suffix == ".arrow":
                with pa.OSFile(str(path)) as source:  # the footer alone
                    rows += int(pa.ipc.open_file(source).schema.metadata[b"rows"])
            elif name == "group.json":
                group = dict(json.loads(path.read_bytes()))
        except FileNotFoundError:  # a temporary file that was just renamed
            continue
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
            damaged.append(name)
    kind = folder.parent.parent.name
    return Entry(kind, group, rows, size, last_used, tuple(damaged), folder)


def lock(path: Path, wait: bool) -> int | None:
    """Lock a file that its holder deletes on release: one that was deleted while we waited does not count."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            release(descriptor)
            return None
        except BaseException as error:
            # NFS calls a file stale that another machine deleted.
            if not isinstance(error, OSError) or error.errno not in (errno.ENOENT, errno.ESTALE):
                release(descriptor)
                raise
        release(descriptor)


def release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _leave_claims_to_parent() -> None:
    """A forked child lets go of the parent's locks, or they would outlive the parent."""
    for descriptor in list(_held):
        release(descriptor)


os.register_at_fork(after_in_child=_leave_claims_to_parent)


def draft(path: Path) -> Path:
    """A name beside `path` for a file that is renamed to it when it is whole: no process of any machine has the same."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around other libraries' writers, each with its own way to say that a disk is full: one readable error."""
    try:
        yield
    except Exception as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise StoreError(
            f"{path} could not be written ({reason}); what was finished is kept: "
            "free some space, or make the folder writable, and run the same command again"
        ) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: the store cannot be used here ({error.strerror or error}); "
            "free some space, make the folder writable, or set RETORT_STORE to another folder"
        ) from error
