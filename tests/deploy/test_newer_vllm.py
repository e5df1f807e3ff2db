"""Another vLLM for tests: what is taken from its wheel, and which vLLM these tests run with."""

import importlib.util
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import vllm

FOLDER = Path(__file__).parents[2] / "deploy" / "local"


def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("newer_vllm", FOLDER / "newer_vllm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_python_and_data_are_unpacked_and_nothing_compiled(tmp_path, monkeypatch):
    wheel = tmp_path / "vllm-0.33.0-any.whl"
    kept = {"vllm/_version.py", "vllm/model_executor/configs/N=8.json", "vllm/py.typed"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, "vllm/_C.abi3.so", "vllm/csrc/a.cuh", "vllm-0.33.0.dist-info/METADATA"):
            archive.writestr(name, "text")
    load(monkeypatch).unpack_python(wheel, tmp_path / "to")
    found = {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*.*")}
    assert {name for name in found if (tmp_path / "to" / name).is_file()} == kept


def test_it_says_that_it_is_the_cpu_build(tmp_path, monkeypatch):
    module = load(monkeypatch)
    (tmp_path / "vllm").mkdir()
    file = tmp_path / "vllm" / "_version.py"
    file.write_text("__version__ = version = '0.33.0'\n__version_tuple__ = (0, 33, 0)\n")
    module._name_as_cpu_build(tmp_path, "0.33.0")
    assert "__version__ = version = '0.33.0+cpu'\n" in file.read_text()
    metadata = tmp_path / "vllm-0.33.0+cpu.dist-info" / "METADATA"
    assert "Version: 0.33.0+cpu" in metadata.read_text()


def test_these_tests_run_with_the_vllm_they_are_meant_for():
    """With a newer vLLM on the path both its code and its metadata are in force."""
    assert version("vllm").removesuffix("+cpu") == vllm.__version__.removesuffix("+cpu")
    if any(f"vllm-{vllm.__version__.removesuffix('+cpu')}" in Path(p).name for p in sys.path):
        assert Path(vllm.__file__).parents[1].name.startswith("vllm-")
