"""Build hook: the wheel carries the folder presets/ as vllm_kvpca/_presets."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PresetsHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # An editable install reads the folder itself; `vllm_kvpca.preset` looks in both places.
        if version != "editable":
            build_data["force_include"][str(Path(self.root) / "presets")] = "vllm_kvpca/_presets"
