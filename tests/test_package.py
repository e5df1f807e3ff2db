"""The package's front door: cheap to import, and its lazy names are real."""

import subprocess
import sys

import pytest

import vllm_kvpca


@pytest.mark.parametrize("module", ["vllm_kvpca", "vllm_kvpca.cli.main"])
def test_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print({{'torch', 'transformers', 'vllm'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("name", [name for name in vllm_kvpca.__all__ if name != "__version__"])
def test_lazy_name_is_there(name):
    assert callable(getattr(vllm_kvpca, name))
    assert name in dir(vllm_kvpca)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        vllm_kvpca.no_such_name  # noqa: B018
