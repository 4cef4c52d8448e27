"""The file that a run logs its points to: whole lines only, each step once, never an error."""

from __future__ import annotations

import errno
import json
import os
import time

import pytest

from harness import points
from harness.points import Points, read

ABOUT = {"key": "k1", "label": "sft", "seed": 1}


def lines(path):
    return path.read_text().splitlines()


def test_a_run_that_is_taken_up_again_says_each_step_once(tmp_path):
    path = tmp_path / "runs" / "sft" / "1" / "points.jsonl"
    first = Points(path, ABOUT)
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.125)):
        first.log(step=step, loss=loss)  # and then it is killed: nothing is closed
    with Points(path, ABOUT) as again:
        again.log(step=3, loss=float("inf"))
        again.log(step=4, loss=0.0625)
        again.sample("train")
    found = read(path)
    assert found.about == ABOUT and len(lines(path)) == 1 + 5 + 2  # one head, a sample at the end
    assert [(row["step"], row["loss"]) for row in found.steps] == [
        (1, 0.5),
        (2, 0.25),
        (3, float("inf")),
        (4, 0.0625),
    ]
    assert [row["phase"] for row in found.samples] == ["train", "end"]
    used = found.samples[0]["used"]
    assert used.keys() == {"seconds", "cpu_seconds", "memory_mb"} and used["memory_mb"] > 5
    times = [row["time"] for row in found.steps + found.samples]
    assert found.times == [min(times), max(times)]


def test_another_run_does_not_go_on_with_the_file(tmp_path):
    path = tmp_path / "points.jsonl"
    Points(path, ABOUT).log(step=9, loss=1.0)
    Points(path, {**ABOUT, "key": "k2"}).log(step=1, loss=2.0)
    assert read(path).about["key"] == "k2" and [row["step"] for row in read(path).steps] == [1]


def test_a_long_silence_is_no_death(tmp_path, monkeypatch):
    """The file's time goes on without a line, as long as the run does."""
    monkeypatch.setattr(points, "BEAT", 0.01)
    path = tmp_path / "points.jsonl"
    with Points(path, ABOUT) as run:
        run.log(step=1, loss=1.0)
        os.utime(path, (0, 0))
        until = time.monotonic() + 60
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0 and len(lines(path)) == 2
    os.utime(path, (0, 0))
    time.sleep(0.1)
    assert path.stat().st_mtime == 0


def test_a_line_that_was_cut_costs_only_itself(tmp_path):
    path = tmp_path / "points.jsonl"
    Points(path, ABOUT).log(step=1, loss=1.0)
    whole = path.read_text()
    path.write_text(whole + '{"time": 5, "step": 2, "lo')
    assert [row["step"] for row in read(path).steps] == [1]  # it may still be being written
    Points(path, ABOUT).log(step=3, loss=3.0)
    assert [row["step"] for row in read(path).steps] == [1, 3]
    assert lines(path)[2] == '{"time": 5, "step": 2, "lo'
    assert json.loads(lines(path)[3])["step"] == 3


def test_what_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with Points(tmp_path / "file" / "points.jsonl", ABOUT) as points:
        points.log(step=1, loss=1.0)
        points.sample("train")
    assert read(tmp_path / "nowhere").steps == []


def test_a_disk_that_was_full_at_the_first_line_costs_no_later_one(tmp_path, monkeypatch):
    path, write = tmp_path / "points.jsonl", os.write

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    about = {"key": "k"}
    with Points(path, about) as points:
        monkeypatch.setattr(os, "write", full)
        points.log(step=1, loss=3.0)
        monkeypatch.setattr(os, "write", write)
        points.log(step=2, loss=2.0)
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:9]))  # nearly full
        points.log(step=3, loss=1.5)
        monkeypatch.setattr(os, "write", write)
        points.log(step=4, loss=1.0)
    with Points(path, about) as points:
        points.log(step=5, loss=0.5)
    found = read(path)
    assert found.about == about and [row["step"] for row in found.steps] == [2, 4, 5]


@pytest.mark.parametrize("used", [0, 1])
def test_a_run_that_does_nothing_leaves_its_file_alone(tmp_path, used):
    path = tmp_path / "points.jsonl"
    heard = []
    with Points(path, ABOUT) as points:
        report = points.sampling(lambda *event: heard.append(event))
        for _ in range(3 * used):  # one sample at the first word, none for ten seconds
            report("train", 1, 9)
    assert heard == [("train", 1, 9)] * 3 * used
    assert path.exists() == bool(used) and len(read(path).samples) == 2 * used
