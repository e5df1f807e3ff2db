"""The metadata wheel that mends the `vllm` command of the CPU build."""

import importlib.util
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "deploy" / "local" / "vllm_metadata.py"


def build(folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location("vllm_metadata", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(folder, "0.32.0")


def test_pip_installs_it_as_vllm(tmp_path: Path):
    wheel = build(tmp_path)
    target = tmp_path / "site"
    install = ["install", "-qq", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    found = {dist.metadata["Name"]: dist.version for dist in distributions(path=[str(target)])}
    # vLLM takes itself for the CPU build only if its version says cpu.
    assert found == {"vllm": "0.32.0+cpu"}


def test_it_carries_no_code(tmp_path: Path):
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-e", str(build(tmp_path)), str(target)], check=True
    )
    assert {path.parent.name for path in target.rglob("*") if path.is_file()} == {
        "vllm-0.32.0+cpu.dist-info"
    }
