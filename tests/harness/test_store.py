"""The store: exact round trips, several processes, killed processes, damaged files, disks that refuse."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from harness.store import Store, StoreError, digest, short_digest

GROUP = {"model": "m", "sampling": {"temperature": 1.0, "n": [1, 2]}}
fork = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Start child processes; those that are left at the end of the test are killed."""
    children = []

    def begin(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
        child = fork.Process(target=target, args=args)
        child.start()
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.join()


def segments(store: Store) -> list[Path]:
    return sorted(store.root.glob("*/??/*/*.arrow"))


def files(store: Store) -> set[str]:
    return {path.name for path in store.root.rglob("*") if path.is_file()}


def row(number: int) -> dict[str, Any]:
    """A row that a reader can check by its number alone."""
    noise = random.Random(number)
    return {
        "number": number,
        "tokens": [noise.randrange(150_000) for _ in range(noise.randrange(40))],
        "logprobs": [-noise.expovariate(1.0) for _ in range(40)],
        "text": f"{number}\n" * noise.randrange(5),
    }


# Digest


def test_digest_is_the_sha256_of_canonical_json() -> None:
    # printf '{"a":[1,2.5,null],"b":true}' | sha256sum
    by_hand = "5bfed00731eb76e3e9217d76fb62e4e7e9c588f33fb29cd3234a5204672b3f47"
    assert digest({"b": True, "a": (1, 2.5, None)}) == by_hand
    assert short_digest({"b": True, "a": [1, 2.5, None]}) == by_hand[:12]


def test_digest_tells_apart_what_differs() -> None:
    nearly = [0.1 + 0.2, 0.3, 1, 1.0, True, "1", -0.0, 0.0, [], {}, None, "", [[1], 2], [1, [2]]]
    assert len({digest(value) for value in nearly}) == len(nearly)


@pytest.mark.parametrize(
    "value", [{1: 2}, [{"a": [{None: 1}]}], math.nan, [math.inf], b"x", {1, 2}, Path("a"), object()]
)
def test_digest_refuses_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match="text"):
        digest(value)


# Round trips


def test_rows_come_back_as_they_were(store: Store) -> None:
    rows: dict[str, dict[str, Any]] = {
        "k1": {
            "text": "naïve \U0001f600\0",
            "int": 7,
            "float": 0.1 + 0.2,
            "bool": True,
            "maybe": None,
            "ids": [1, 2, 3],
            "floats": [1.5, 2.0],
            "nested": {"a": [{"b": None}], "c": [1, 2.0]},
            "none": None,
            "empty": [],
            "huge": 2**70,
            "mixed": 1,
            "surrogate": "\ud800",
            "lists": [1, 2.0],
            "key": "a column of this name",
        },
        "k2": {
            "text": "",
            "int": -(2**63),
            "float": -0.0,
            "bool": False,
            "maybe": "x",
            "ids": [],
            "floats": [],
            "nested": [None, True],
            "none": None,
            "empty": [],
            "huge": 1,
            "mixed": 1.0,
            "surrogate": "",
            "lists": [True, False],
            "key": None,
        },
        "k3": {"ids": [2**40], "floats": [-0.0], "only": 3},
        "k4": {"sometimes": None},
        "k5": {"sometimes": 4, "maybe_ids": None},
        "k6": {"maybe_ids": [4]},
        "k7": {},
    }
    store.put("samples", GROUP, rows)
    found = Store(store.root).get("samples", GROUP, rows)
    assert found == rows
    for key, fields in rows.items():  # == does not tell 1 from 1.0 or True
        assert {name: repr(value) for name, value in found[key].items()} == {
            name: repr(value) for name, value in fields.items()
        }
    assert store.get("samples", GROUP, ["k3"])["k3"] == rows["k3"]
    assert list(store.get("samples", GROUP, ["k6", "nowhere", "k2", "k6"])) == ["k6", "k2"]
    assert list(store.get("samples", GROUP, reversed(list(rows)))) == list(reversed(rows))


def test_every_bit_of_a_float_survives(store: Store) -> None:
    noise = random.Random(0)
    values = [struct.unpack("<d", noise.randbytes(8))[0] for _ in range(5000)]
    values += [math.inf, -math.inf, 5e-324, 2.2250738585072014e-308, -0.0, math.pi]
    rows = {str(i): {"one": value, "many": values[i:]} for i, value in enumerate(values[-30:])}
    store.put("scores", GROUP, rows)
    for key, found in store.get("scores", GROUP, rows).items():
        for name in ("one", "many"):
            expected, actual = rows[key][name], found[name]
            pack = struct.Struct(f"<{1 if name == 'one' else len(expected)}d").pack
            same = (
                pack(expected) == pack(actual)
                if name == "one"
                else pack(*expected) == pack(*actual)
            )
            assert same


def test_tuples_come_back_as_lists(store: Store) -> None:
    store.put("samples", GROUP, {"a": {"ids": (1, 2), "pairs": ((1, "x"),)}})
    assert store.get("samples", GROUP, ["a"]) == {"a": {"ids": [1, 2], "pairs": [[1, "x"]]}}


def test_lists_are_compact_columns(store: Store) -> None:
    store.put(
        "samples",
        GROUP,
        {str(i): {"ids": [7] * 1000, "logprobs": [-0.5] * 1000} for i in range(50)},
    )
    store.put("scores", GROUP, {str(i): {"ids": [7] * 1000 * (i % 2)} for i in range(50)})
    rows = pa.ipc.open_file(segments(store)[1]).read_all()
    assert rows.schema.field("ids").type == pa.list_(pa.int64())  # empty lists among them or not
    assert segments(store)[0].stat().st_size < 50_000  # as JSON text: 350 kB


def test_kinds_and_groups_are_apart(store: Store) -> None:
    store.put("samples", GROUP, {"a": {"x": 1}})
    assert store.get("scores", GROUP, ["a"]) == {}
    assert store.get("samples", {**GROUP, "model": "other"}, ["a"]) == {}
    assert store.get("samples", json.loads(json.dumps(GROUP)), ["a"]) == {"a": {"x": 1}}
    with pytest.raises(ValueError, match="kind"):
        store.put("../up", GROUP, {"a": {}})


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(store: Store) -> None:
    for value in (b"bytes", {1: 2}, object()):
        with pytest.raises(ValueError, match="text"):
            store.put("samples", GROUP, {"a": {"x": value}})
    store.put("samples", GROUP, {})
    assert not store.root.exists()


def test_raising_n_finds_the_old_and_adds_the_new(store: Store) -> None:
    first = {f"s{i}": row(i) for i in range(16)}
    store.put("samples", GROUP, first)
    keys = [f"s{i}" for i in range(64)]
    missing = [key for key in keys if key not in store.get("samples", GROUP, keys)]
    assert missing == keys[16:]
    store.put("samples", GROUP, {key: row(int(key[1:])) for key in missing})
    assert store.get("samples", GROUP, keys) == {key: row(int(key[1:])) for key in keys}
    assert len(segments(store)) == 2


def test_equal_work_is_one_file_and_of_unequal_the_first_name_wins(store: Store) -> None:
    store.put("samples", GROUP, {"a": {"x": 1, "y": 2}, "b": {"x": 3}})
    Store(store.root).put("samples", GROUP, {"b": {"x": 3}, "a": {"y": 2, "x": 1}})
    assert len(segments(store)) == 1
    shutil.rmtree(store.root)
    for x in range(8):  # seen one by one, in an order that is not that of the names
        store.put("samples", GROUP, {"a": {"x": x}})
        seen = store.get("samples", GROUP, ["a"])
        assert seen == Store(store.root).get("samples", GROUP, ["a"])
    first = segments(store)[0]
    first.unlink()  # also one that was indexed and is gone
    assert (
        store.get("samples", GROUP, ["a"]) == Store(store.root).get("samples", GROUP, ["a"]) != seen
    )


# Damage


def test_damaged_and_foreign_files_are_ignored_and_reported(store: Store) -> None:
    store.put("samples", GROUP, {"good": row(0)})
    good = segments(store)[0]
    whole = good.read_bytes()
    names = {name: digest(name) + ".arrow" for name in ("torn", "flipped", "empty", "foreign")}
    folder = good.parent
    (folder / names["torn"]).write_bytes(whole[: len(whole) // 2])
    (folder / names["empty"]).write_bytes(b"")
    (folder / names["foreign"]).write_bytes(b"PK\3\4 something else")
    (folder / names["flipped"]).write_bytes(whole)  # readable, but not what its name says
    (folder / "notes.txt").write_text("hello")
    (folder / ".renamed.tmp").symlink_to("nowhere")  # a temporary file that is gone when we look
    assert Store(store.root).get("samples", GROUP, ["good"]) == {"good": row(0)}
    assert store.get("samples", GROUP, ["good"]) == {"good": row(0)}
    (entry,) = store.show()
    assert set(entry.damaged) == {names[name] for name in ("torn", "empty", "foreign")}
    assert {path.name for path in store.verify()} == set(names.values())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_flipped_bit_is_a_miss_and_the_next_put_heals_it(store: Store, share: float) -> None:
    rows = {f"s{i}": row(i) for i in range(20)}
    store.put("samples", GROUP, rows)
    assert store.get("samples", GROUP, rows) == rows
    path = segments(store)[0]
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    assert store.get("samples", GROUP, rows) == {}  # this one had indexed it
    assert Store(store.root).get("samples", GROUP, rows) == {}
    store.put("samples", GROUP, rows)
    assert store.get("samples", GROUP, rows) == rows
    assert store.verify() == []


def test_a_second_copy_serves_when_the_first_is_damaged_or_gone(store: Store) -> None:
    for extra in range(3):
        store.put("samples", GROUP, {"a": {"x": 1}, f"extra {extra}": {}})
    assert store.get("samples", GROUP, ["a"]) == {"a": {"x": 1}}
    first, second, _ = segments(store)
    first.write_bytes(first.read_bytes()[:-1])
    assert store.get("samples", GROUP, ["a"]) == {"a": {"x": 1}}
    second.unlink()
    assert store.get("samples", GROUP, ["a"]) == {"a": {"x": 1}}


def test_a_group_that_lost_its_label_still_serves(store: Store) -> None:
    store.put("samples", GROUP, {"a": {"x": 1}})
    label = segments(store)[0].parent / "group.json"
    label.write_text('{"model": "m", "sam')
    assert Store(store.root).get("samples", GROUP, ["a"]) == {"a": {"x": 1}}
    assert store.show()[0].damaged == ("group.json",) and store.verify() == [label]
    label.unlink()
    assert store.get("samples", GROUP, ["a"]) == {"a": {"x": 1}}


# Several processes


def write_some(root: Path, worker: int, batches: int) -> None:
    store = Store(root)
    for batch in range(batches):
        numbers = range(1000 * worker + 10 * batch, 1000 * worker + 10 * batch + 10)
        store.put("samples", GROUP, {f"s{n}": row(n) for n in numbers})


def test_eight_writers_lose_nothing_and_a_reader_sees_only_whole_rows(
    store: Store, start: Any
) -> None:
    workers = [start(write_some, store.root, worker, 12) for worker in range(8)]
    keys = [f"s{1000 * worker + i}" for worker in range(8) for i in range(120)]
    counts = []
    while any(worker.is_alive() for worker in workers):
        found = store.get("samples", GROUP, keys)
        assert all(value == row(int(key[1:])) for key, value in found.items())
        counts.append(len(found))
        assert not any(entry.damaged for entry in store.show())
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert store.get("samples", GROUP, keys) == {key: row(int(key[1:])) for key in keys}
    assert counts == sorted(counts) and all(count % 10 == 0 for count in counts)
    assert len(segments(store)) == 96 and store.show()[0].rows == 960
    assert not [name for name in files(store) if name.endswith(".tmp")]


def answer(root: Path, pipe: Any) -> None:
    """Alternate with the parent: read its row, write the next."""
    store = Store(root)
    for number in range(1, 10, 2):
        pipe.recv()
        found = store.get("samples", GROUP, [f"s{number - 1}"])
        assert found == {f"s{number - 1}": row(number - 1)}
        store.put("samples", GROUP, {f"s{number}": row(number)})
        pipe.send(number)


def test_two_processes_see_each_others_rows(store: Store, start: Any) -> None:
    here, there = fork.Pipe()
    child = start(answer, store.root, there)
    for number in range(0, 10, 2):
        assert store.get("samples", GROUP, [f"s{number}"]) == {}
        store.put("samples", GROUP, {f"s{number}": row(number)})
        here.send(number)
        assert here.poll(10) and here.recv() == number + 1
        assert store.get("samples", GROUP, [f"s{number + 1}"]) == {
            f"s{number + 1}": row(number + 1)
        }
    child.join()
    assert child.exitcode == 0


def write_many(root: Path, first: int) -> None:
    store = Store(root)
    for number in range(first, first + 200):
        store.put("samples", {"group": number % 3}, {f"s{number}-{i}": row(i) for i in range(30)})


def test_a_store_survives_writers_killed_at_any_moment(store: Store, start: Any) -> None:
    noise = random.Random(1)
    for attempt in range(20):
        writer = start(write_many, store.root, 1000 * attempt)
        done, deadline = len(segments(store)), time.monotonic() + 20
        while len(segments(store)) <= done and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05 * noise.random())
        writer.kill()
        writer.join()
    assert store.verify() == [] and all(not entry.damaged for entry in store.show())
    assert len(segments(store)) >= 20
    tried = [1000 * attempt + i for attempt in range(20) for i in range(200)]
    everything = [f"s{number}-{i}" for number in tried for i in range(30)]
    found = [store.get("samples", {"group": group}, everything) for group in range(3)]
    assert sum(map(len, found)) == 30 * len(segments(store))  # whole batches
    assert all(
        value == row(int(key.split("-")[1])) for part in found for key, value in part.items()
    )


def die_in(name: str, call: int, root: Path) -> None:
    """Be killed just before the given call of a function of os, while writing a second batch."""
    store = Store(root)
    store.put("samples", GROUP, {"first": row(1)})
    real, calls = getattr(os, name), iter(range(1, 100))

    def fatal(*args: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(os, name, fatal)
    store.put("samples", GROUP, {"second": row(2)})


@pytest.mark.parametrize("name, call, there", [("fsync", 1, 0), ("replace", 1, 0), ("fsync", 2, 1)])
def test_a_kill_between_two_steps_leaves_all_or_nothing(
    store: Store, start: Any, name: str, call: int, there: int
) -> None:
    writer = start(die_in, name, call, store.root)
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert len(store.get("samples", GROUP, ["first"])) == 1
    assert len(store.get("samples", GROUP, ["second"])) == there
    assert store.verify() == [] and store.show()[0].damaged == ()
    store.put("samples", GROUP, {"second": row(2)})
    assert store.get("samples", GROUP, ["second"]) == {"second": row(2)}
    # What the dead left is swept once it is surely abandoned.
    left = list(store.root.rglob("*.tmp"))
    assert len(left) == 1 - there
    assert store.prune(older_than_days=30) == 0
    for path in left:
        os.utime(path, (0, 0))
    assert (store.prune(older_than_days=30) > 0) == bool(left)
    assert not list(store.root.rglob("*.tmp")) and len(store.get("samples", GROUP, ["second"])) == 1


# Claims


def hold(root: Path, pipe: Any, with_child: bool = False) -> None:
    with Store(root).claim("samples", GROUP, "batch 0") as mine:
        pid = os.fork() if with_child else 0
        if with_child and pid == 0:
            time.sleep(30)
        pipe.send((mine, pid))
        time.sleep(30)


def test_a_claim_excludes_others_and_leaves_no_file(store: Store) -> None:
    other = Store(store.root)
    with store.claim("samples", GROUP, "a") as mine:
        assert mine
        with other.claim("samples", GROUP, "a", wait=False) as theirs:
            assert not theirs
        with other.claim("samples", GROUP, "b", wait=False) as theirs:
            assert theirs
        with other.claim("samples", {}, "a", wait=False) as theirs:
            assert theirs
        store.prune()
        with other.claim("samples", GROUP, "a", wait=False) as theirs:
            assert not theirs
    with pytest.raises(KeyError), other.claim("samples", GROUP, "a", wait=False) as theirs:
        assert theirs
        raise KeyError
    assert files(store) == set()


@pytest.mark.parametrize("with_child", [False, True])
def test_a_claim_falls_with_its_process(store: Store, start: Any, with_child: bool) -> None:
    here, there = fork.Pipe()
    holder = start(hold, store.root, there, with_child)
    assert here.poll(10)
    mine, grandchild = here.recv()
    assert mine
    try:
        with store.claim("samples", GROUP, "batch 0", wait=False) as free:
            assert not free
        holder.kill()
        begun = time.monotonic()
        with store.claim("samples", GROUP, "batch 0") as free:
            assert free
        assert time.monotonic() - begun < 5
    finally:
        if grandchild:
            os.kill(grandchild, signal.SIGKILL)
    assert files(store) == set()


def count_up(root: Path, turns: int) -> None:
    """Read, wait, write: loses counts unless the claim holds."""
    store, counter = Store(root), root / "counter"
    for _ in range(turns):
        with store.claim("samples", GROUP, "counter") as mine:
            assert mine
            value = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(value + 1))


def test_waiting_claims_take_turns(store: Store, start: Any) -> None:
    store.root.mkdir()
    (store.root / "counter").write_text("0")
    workers = [start(count_up, store.root, 50) for _ in range(6)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert (store.root / "counter").read_text() == "300"
    assert files(store) == {"counter"}


# Disks that refuse


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store.put("samples", GROUP, {"a": {"x": 1}})
    before = files(store)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(StoreError, match="No space left on device") as error:
            store.put("samples", GROUP, {"b": {"x": 2}})
    assert str(store.root) in str(error.value) and "\n" not in str(error.value)
    assert "RETORT_STORE" in str(error.value)
    assert files(store) == before
    assert store.get("samples", GROUP, ["a", "b"]) == {"a": {"x": 1}}


def write_beyond_limit(root: Path, pipe: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        noise = random.Random(0)
        Store(root).put("samples", GROUP, {"b": {"x": [noise.random() for _ in range(20_000)]}})
    except StoreError as error:
        pipe.send(str(error))


def test_a_write_that_stops_half_way_leaves_nothing(store: Store, start: Any) -> None:
    store.put("samples", GROUP, {"a": {"x": 1}})
    before = files(store)
    here, there = fork.Pipe()
    start(write_beyond_limit, store.root, there).join()
    assert here.poll() and "File too large" in here.recv()
    assert files(store) == before


def use_read_only(root: Path, pipe: Any) -> None:
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    store = Store(root)
    said: list[Any] = [store.get("samples", GROUP, ["a"]), len(store.show())]
    for attempt in (
        lambda: store.put("samples", GROUP, {"b": {"x": 2}}),
        lambda: store.put("samples", {"new": 1}, {"b": {"x": 2}}),
        lambda: store.claim("samples", GROUP, "a").__enter__(),
        store.prune,
    ):
        try:
            attempt()
        except StoreError as error:
            said.append(str(error))
    pipe.send(said)


def test_a_read_only_folder_serves_reads_and_refuses_writes(start: Any) -> None:
    with tempfile.TemporaryDirectory() as root:  # not tmp_path, which only its owner may enter
        folder = Path(root) / "store"
        Store(folder).put("samples", GROUP, {"a": {"x": 1}})
        folders = [Path(root), folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        try:
            here, there = fork.Pipe()
            start(use_read_only, folder, there).join()
            assert here.poll()
            found, shown, *errors = here.recv()
        finally:
            for path in folders:
                path.chmod(0o755)
        assert found == {"a": {"x": 1}} and shown == 1
        assert len(errors) == 4 and all("make the folder writable" in error for error in errors)
        assert len(files(Store(folder))) == 2 and Store(folder).get("samples", GROUP, ["a"])


def test_a_root_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match="store cannot be used here"):
        store.get("samples", GROUP, ["a"])
    with pytest.raises(StoreError, match="store cannot be used here"):
        store.put("samples", GROUP, {"a": {}})


# Housekeeping


def test_show_tells_what_is_there(store: Store) -> None:
    assert store.show() == []
    store.put("samples", {"model": "one"}, {"a": {"x": 1}, "b": {"x": 1}})
    store.put("samples", {"model": "one"}, {"c": {"x": 1}})
    store.put("scores", {"model": "two"}, {"a": {"x": 1}})
    samples, scores = store.show()
    assert (samples.kind, samples.group, samples.rows) == ("samples", {"model": "one"}, 3)
    assert (scores.kind, scores.group, scores.rows) == ("scores", {"model": "two"}, 1)
    assert samples.bytes == sum(path.stat().st_size for path in samples.folder.iterdir())
    assert abs(samples.last_used - time.time()) < 60
    assert [entry.kind for entry in store.show("scores")] == ["scores"]


def test_prune_frees_what_was_not_used_lately(store: Store) -> None:
    groups: list[tuple[str, dict[str, Any]]] = [
        ("samples", {"g": 1}),
        ("samples", {"g": 2}),
        ("scores", {"g": 1}),
    ]
    for kind, group in groups:
        store.put(kind, group, {"a": {"x": 1}})
    sizes = {(entry.kind, entry.group["g"]): entry.bytes for entry in store.show()}
    for path in store.root.rglob("*"):
        if path.is_file():
            os.utime(path, (1e9, 1e9))
    store.get("samples", {"g": 1}, [])  # used just now
    old = sizes["samples", 2] + sizes["scores", 1]
    assert store.prune(older_than_days=1, dry_run=True) == old
    assert len(store.show()) == 3
    assert store.prune("scores", older_than_days=1) == sizes["scores", 1]
    assert store.prune(older_than_days=1) == sizes["samples", 2]
    assert [store.get(kind, group, ["a"]) for kind, group in groups] == [{"a": {"x": 1}}, {}, {}]
    assert store.prune() == sizes["samples", 1]
    assert files(store) == set() and store.prune() == 0


def test_a_group_pruned_under_a_writer_is_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("samples", GROUP, {"a": {"x": 1}})
    assert len(store.get("samples", GROUP, ["a"])) == 1
    real = os.fsync

    def prune_first(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        Store(store.root).prune()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", prune_first)
    store.put("samples", GROUP, {"b": {"x": 2}})
    assert store.get("samples", GROUP, ["a", "b"]) == {"b": {"x": 2}}
    assert store.show()[0].group == GROUP and store.verify() == []


def test_reading_is_quick(store: Store) -> None:
    rows = {f"s{i}": {"ids": list(range(100)), "logprobs": [-0.1 * i] * 100} for i in range(4000)}
    keys = list(rows)
    for i in range(0, 4000, 250):
        store.put("samples", GROUP, {key: rows[key] for key in keys[i : i + 250]})
    store.get("samples", GROUP, keys[:1])
    begun = time.process_time()
    assert store.get("samples", GROUP, keys) == rows
    assert time.process_time() - begun < 2  # some 0.1 s; Arrow's own to_pylist takes ten times that


def test_importing_the_store_and_the_ledger_loads_nothing_heavy() -> None:
    code = (
        "import sys, harness.store, harness.ledger;"
        "print([name for name in ('pyarrow', 'numpy', 'torch', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_every_claim(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work may be done twice there; a disk that fails in another way is an error still."""

    def refuse(*given: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with Store(tmp_path).claim("cells", {}, "a", wait=False) as claimed:
        assert claimed
    code = errno.EIO
    with (
        pytest.raises(ValueError, match="cannot be used here"),
        Store(tmp_path).claim("c", {}, "a"),
    ):
        pytest.fail("it was claimed")


def test_a_lock_that_another_machine_deleted_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stale = os.fstat, [OSError(errno.ESTALE, "Stale file handle")]
    monkeypatch.setattr("os.fstat", lambda fd: real(fd) if not stale else _raise(stale.pop()))
    with Store(tmp_path).claim("cells", {}, "a") as claimed:
        assert claimed and not stale


def _raise(error: Exception) -> None:
    raise error
