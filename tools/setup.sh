#!/usr/bin/env bash
# Makes .venv from requirements.lock with the three packages of this repository in editable mode.
# Does nothing when the last set-up was of the same files, in the same place.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh

readonly VENV=.venv
readonly STAMP=$VENV/.setup
readonly PACKAGES=(libs/minwm services/session pipelines)

fingerprint() {
    { pwd && cat requirements.lock tools/*.sh "${PACKAGES[@]/%//pyproject.toml}"; } | sha256sum
}

# What the wheels expect of the system and do not bundle (VizDoom, torch, Ray): the C++ runtime and zlib.
check_system_libraries() {
    local library package missing=()
    while read -r library package; do
        "$PYTHON" -c "import ctypes; ctypes.CDLL('$library')" 2>/dev/null || missing+=("$package")
    done <<'LIBRARIES'
libstdc++.so.6 libstdc++6
libgcc_s.so.1 libgcc-s1
libz.so.1 zlib1g
LIBRARIES
    [ ${#missing[@]} -eq 0 ] || apt_install "${missing[@]}"
}

if [ -x $VENV/bin/python ] && [ "$(cat $STAMP 2>/dev/null)" = "$(fingerprint)" ]; then
    exit 0
fi

find_python
find_uv
[ "$(uname -s)" != Linux ] || check_system_libraries
if ! $VENV/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "making $VENV with $("$PYTHON" --version)"
    "$UV" venv --quiet --clear --no-python-downloads --python "$PYTHON" $VENV || fail "uv could not make $VENV"
fi
rm -f $STAMP
say "installing requirements.lock into $VENV"
"$UV" pip install --python $VENV/bin/python --compile-bytecode --requirements requirements.lock ||
    fail "could not install requirements.lock; uv's message is above. Is a package index reachable, is the disk full?"
"$UV" pip install --quiet --python $VENV/bin/python --no-deps "${PACKAGES[@]/#/--editable=}" ||
    fail "could not install this repository's packages (${PACKAGES[*]}); uv's message is above"
fingerprint >$STAMP
say "done"
