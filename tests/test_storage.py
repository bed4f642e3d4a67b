"""Files of arrays and facts: what was written is read, damage is told, a killed writer leaves the file as it was."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from specdec import storage

ARRAYS = {
    "tokens": np.arange(12, dtype=np.int32).reshape(3, 4),
    "turned": np.arange(12.0).reshape(3, 4).T,
    "every other": np.arange(9, dtype=np.uint8)[::2],
    "one": np.array(7, np.int64),
    "none": np.empty((0, 4), np.float32),
    "flags": np.array([True, False]),
}
FACTS = {"k": 8, "names": ["", "größer"], "rate": 0.25, "nothing": None}


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "memory"
    storage.write(path, "kind", 3, ARRAYS, FACTS)
    arrays, facts = storage.read(str(path), "kind", 3)
    assert facts == FACTS
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert np.array_equal(arrays[name], array)
        assert arrays[name].flags.writeable


def test_nothing_at_all_is_written_and_read(tmp_path):
    storage.write(tmp_path / "empty", "kind", 1, {}, {})
    assert storage.read(tmp_path / "empty", "kind", 1) == ({}, {})


def test_another_kind_or_version_is_refused(tmp_path):
    path = tmp_path / "memory"
    storage.write(path, "suffix", 1, ARRAYS, FACTS)
    with pytest.raises(ValueError, match=r"memory.*'suffix', wanted is 'trie'"):
        storage.read(path, "trie", 1)
    with pytest.raises(ValueError, match=r"memory.*version '1'.*reads version 2"):
        storage.read(path, "suffix", 2)
    save_file(ARRAYS, path)
    with pytest.raises(ValueError, match=r"memory is not a file of specdec"):
        storage.read(path, "suffix", 1)
    with pytest.raises(FileNotFoundError, match="none"):
        storage.read(tmp_path / "none", "suffix", 1)
    with pytest.raises(FileNotFoundError):
        storage.read(tmp_path, "suffix", 1)


def test_no_byte_can_be_altered_or_missing(tmp_path):
    path = tmp_path / "memory"
    storage.write(path, "kind", 1, {"tokens": np.arange(5), "rates": np.ones(3)}, {"k": 8})
    content = path.read_bytes()
    for at in range(len(content)):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 5]) + content[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="memory"):
                storage.read(path, "kind", 1)
    path.write_bytes(content)
    storage.read(path, "kind", 1)


@pytest.mark.parametrize("said", [{"facts": json.dumps({"k": 9})}, {"version": "2"}, {"more": "said"}])
def test_what_is_said_of_the_arrays_cannot_be_altered(tmp_path, said):
    path = tmp_path / "memory"
    storage.write(path, "kind", 1, ARRAYS, {"k": 8})
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file({name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}, path, metadata | said)
    with pytest.raises(ValueError, match="damaged"):
        storage.read(path, "kind", int(said.get("version", 1)))


def test_arrays_cannot_change_places(tmp_path):
    path = tmp_path / "memory"
    storage.write(path, "kind", 1, {"a": np.zeros(3), "b": np.ones(3)}, {})
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file({"b": np.zeros(3), "a": np.ones(3)}, path, metadata)
    with pytest.raises(ValueError, match="damaged"):
        storage.read(path, "kind", 1)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "memory"
    storage.write(path, "kind", 1, ARRAYS, FACTS)
    before = sorted(tmp_path.iterdir())

    def half(arrays, temporary, metadata):
        temporary.write_bytes(b"half of ")
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        storage.write(path, "kind", 1, {}, {})
    assert sorted(tmp_path.iterdir()) == before
    assert storage.read(path, "kind", 1)[1] == FACTS
    with pytest.raises(TypeError):
        storage.write(path, "kind", 1, {}, {"object": object()})


def test_a_link_goes_on_pointing_at_its_file(tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link", tmp_path / "there" / "memory"
    link.symlink_to(file)
    storage.write(link, "kind", 1, ARRAYS, FACTS)
    assert link.is_symlink()
    assert storage.read(file, "kind", 1)[1] == FACTS


def test_writers_at_once_take_turns(tmp_path):
    path = tmp_path / "memory"
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(storage.write, path, "kind", 1, {"n": np.full(50_000, n)}, {"n": n}) for n in range(16)
        ]:
            done.result()
    arrays, facts = storage.read(path, "kind", 1)
    assert (arrays["n"] == facts["n"]).all()
    assert not list(tmp_path.glob("*.partial"))


# Forks writers that go on until they are killed, after as many seconds as each line of its input says.
WRITERS = """
import itertools, os, signal, sys, time
import numpy as np
from specdec import storage
for line in sys.stdin:
    writer = os.fork()
    if not writer:
        for n in itertools.count():
            storage.write(sys.argv[1], "kind", 1, {"n": np.full(200_000, n)}, {"n": n})
    time.sleep(float(line))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    print("killed", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path, draw = tmp_path / "memory", random.Random(0)
    storage.write(path, "kind", 1, {"n": np.full(200_000, -1)}, {"n": -1})
    command = [sys.executable, "-c", WRITERS, str(path)]
    leftovers = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        for _ in range(40):
            writers.stdin.write(f"{draw.uniform(0.002, 0.03)}\n")
            writers.stdin.flush()
            assert writers.stdout.readline() == "killed\n"
            arrays, facts = storage.read(path, "kind", 1)
            assert (arrays["n"] == facts["n"]).all()
            leftovers += len(list(tmp_path.glob(".*.partial")))
        writers.stdin.close()
    assert leftovers > 0  # else no writer was killed in the middle of its work
    storage.write(path, "kind", 1, ARRAYS, FACTS)
    assert storage.read(path, "kind", 1)[1] == FACTS
    assert not list(tmp_path.glob(".*.partial"))
