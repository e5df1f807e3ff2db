"""Ends with an error unless every entry point of the plugin loads."""

from importlib.metadata import entry_points

GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")

for group in GROUPS:
    found = [entry for entry in entry_points(group=group) if entry.name == "kvpca"]
    if not found:
        raise SystemExit(f"no entry point kvpca in {group}: the plugin is not installed.")
    for entry in found:
        print(group, entry.value, entry.load())
