"""The plugin's logger. vLLM configures the logger "vllm" only, so ours lives below it."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.kvpca")
