#!/usr/bin/env bash
# Writes requirements.lock: the three packages with every extra, and the tools in the root's `dev` group.
# Pins already there stay while they still fit; `make lock UPGRADE=1` takes the newest of everything.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh

find_python
find_uv
"$UV" pip compile libs/minwm/pyproject.toml services/session/pyproject.toml pipelines/pyproject.toml \
    --all-extras --group dev --no-emit-package minwm --python-version 3.11 ${UPGRADE:+--upgrade} \
    --no-annotate --custom-compile-command 'make lock' --quiet --output-file requirements.lock ||
    fail "the requirements do not resolve together; uv's message is above"
# torch's CPU and CUDA builds are one version, and the CUDA build asks for its own libraries: pin neither here.
sed -i -E -e 's/^(torch==[^+]+)\+.*/\1/' -e '/^(nvidia-|cuda-|triton==)/d' requirements.lock
