"""The package as a stranger meets it: its names, its weight at import, its wheel, its README."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.policies import FixedPolicy

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "specdec": {
        "Budget", "Context", "DraftTree", "Drafter", "Memory", "Policy", "PoolFull", "Session", "SessionPool",
        "SpecdecWarning", "Speculate", "Stats", "Verdict", "Verifier", "__version__", "speculating", "stats", "unwrap",
        "wrap",
    },
    "specdec.drafters": {
        "EarlyExitDrafter", "FeatureDrafter", "GrammarDrafter", "LongSpecDrafter", "LookaheadDrafter", "MergedDrafter",
        "NgramDrafter", "PredictedOutput", "RapidDrafter", "RecyclingDrafter", "RetrievalDrafter", "SmallModelDrafter",
        "SuffixDrafter", "TriForceDrafter",
    },
    "specdec.verifiers": {"PathwiseVerifier", "RejectionVerifier", "TransferVerifier"},
    "specdec.policies": {"FixedPolicy", "ThresholdPolicy", "ThroughputPolicy"},
}  # fmt: skip
README = (ROOT / "README.md").read_text()


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options).stdout


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package):
    """A name joins or leaves the public face on purpose, here first."""
    shown = run(f"import {package} as p; print(*p.__all__, *(n for n in p.__all__ if getattr(p, n, None) is None))")
    assert sorted(shown.split()) == sorted(PUBLIC[package])


def test_unknown_names_are_said_to_be_missing():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        specdec.nothing  # noqa: B018


def test_import_is_light():
    heavy = "('torch', 'transformers', 'numba', 'networkx', 'triton')"
    assert run(f"import sys, specdec; print([m for m in {heavy} if m in sys.modules])") == "[]\n"
    shown = run(
        "import sys, specdec; specdec.DraftTree; print([m for m in ('transformers', 'numba') if m in sys.modules])"
    )
    assert shown == "[]\n"


def test_names_are_not_hidden_by_modules_of_the_same_name():
    code = "import pkgutil, importlib, specdec\n"
    code += "for m in pkgutil.iter_modules(specdec.__path__): importlib.import_module('specdec.' + m.name)\n"
    code += "print([n for n in specdec.__all__ if type(getattr(specdec, n)).__name__ == 'module'])"
    assert run(code) == "[]\n"


@pytest.mark.parametrize("name", ["drafters", "verifiers", "kernels", "trees"])
def test_the_doors_at_the_top_are_links(name):
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).resolve() == (ROOT / "specdec" / name).resolve()
    assert (ROOT / name).is_dir()


def test_a_kernels_package_of_others_is_not_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]  # by way of the sdist
    subprocess.run([*build, str(ROOT)], capture_output=True, check=True)
    (wheel,) = tmp_path.glob("specdec_runtime-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    patterns = ("*.py", "*.toml", "*.json", "*.html", "*.css", "*.js")
    files = [path for pattern in patterns for path in (ROOT / "specdec").rglob(pattern)]
    sources = {str(path.relative_to(ROOT)) for path in files}
    assert sources <= names
    assert {"specdec/py.typed", "specdec/bench/workloads/chat.toml"} <= names
    assert {name.split("/")[0] for name in names} == {"specdec", f"specdec_runtime-{specdec.__version__}.dist-info"}
    assert not [name for name in names if re.search(r"test|conftest|\.(nbi|nbc|pyc)$", name)]
    assert "specdec = specdec.cli:app" in entry_points
    assert f"specdec_runtime-{specdec.__version__}.dist-info/licenses/LICENSE" in names


def blocks():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readmes_step_is_the_cores():
    assert all(line.strip() in (ROOT / "specdec" / "core.py").read_text() for line in blocks()[1].splitlines())


def test_the_readmes_own_drafter_works():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[3, 4, 5, 3, 4]])
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    scope: dict[str, type] = {}
    exec(next(block for block in blocks() if "class LastSeen" in block), scope)
    specdec.wrap(model, drafter=scope["LastSeen"](), policy=FixedPolicy(4, 4, 1))  # on so small a model none would pay
    assert model.generate(ids, max_new_tokens=30, do_sample=False).tolist() == plain.tolist()
    assert specdec.stats(model).by_drafter["last-seen"]["accepted"] > 0
    assert not specdec.stats(model).faults


@pytest.mark.real
def test_the_readmes_examples_work(capsys):
    scope = {}
    exec(blocks()[0], scope)
    said = capsys.readouterr().out
    assert "def fibonacci(n):" in said
    assert "Stats(level='tree'" in said
    exec(next(block for block in blocks() if "SessionPool" in block), scope)
    assert scope["answer"]
    assert "return" in scope["text"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_files_and_targets_that_exist(page):
    text = (ROOT / page).read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", text)) - {"model"}
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)), targets
    paths = re.findall(r"`((?:specdec|examples|benchmarks|tests|docs)/[a-z_/]*(?:\.[a-z]+)?)`", text)
    assert [path for path in paths if "yours" not in path and not (ROOT / path).exists()] == []
