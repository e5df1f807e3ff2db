"""Ends with an error unless every entry point of the plugin loads and vLLM is a tested version."""

from importlib.metadata import entry_points, version

from vllm_kvpca.serving.versions import ALLOW_UNTESTED, may_use, shown_range

GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")

for group in GROUPS:
    found = [entry for entry in entry_points(group=group) if entry.name == "kvpca"]
    if not found:
        raise SystemExit(f"no entry point kvpca in {group}: the plugin is not installed.")
    for entry in found:
        print(group, entry.value, entry.load())

if not may_use(version("vllm")):
    raise SystemExit(
        f"vLLM {version('vllm')} is not among the tested {shown_range()}: compression would be "
        f"refused. Build with a tested image, or set {ALLOW_UNTESTED}=1."
    )
