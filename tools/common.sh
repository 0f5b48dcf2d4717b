# Shared by the scripts beside it: a Python to build on, Debian packages, and uv. Sourced, never run.

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

# apt_install PACKAGE…: as root or through a sudo that asks nothing; otherwise says what to install.
apt_install() {
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        as_root=(sudo -n)
        sudo -n true 2>/dev/null || fail "missing: $*. Install with: sudo apt-get install $*"
    fi
    command -v apt-get >/dev/null || fail "missing: $* (Debian's names; there is no apt-get here). Install them and run again"
    say "installing Debian packages: $*"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq ||
        say "apt-get update failed; trying with the package lists already here"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        fail "apt-get could not install: $*. Install them and run again"
}

_first_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        "$name" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.executable)' 2>/dev/null && return
    done
    return 1
}

# Sets PYTHON to an interpreter of 3.11 or newer.
find_python() {
    PYTHON=$(_first_python) && return
    apt_install python3.11
    PYTHON=$(_first_python) || fail "no Python 3.11 or newer: python3 is $(python3 --version 2>&1)"
}

# Sets UV, from the PATH or from an environment of its own in .uv/; gives it pip's find-links, which uv doesn't read.
find_uv() {
    if uv --version >/dev/null 2>&1; then
        UV=uv
    else
        UV=.uv/bin/uv
        "$UV" --version >/dev/null 2>&1 || _install_uv
    fi
    local links=${PIP_FIND_LINKS:-$("$PYTHON" -m pip config get global.find-links 2>/dev/null || true)}
    if [ -z "${UV_FIND_LINKS:-}" ] && [ -n "$links" ]; then
        UV_FIND_LINKS=$(xargs <<<"$links" | tr ' ' ',')
        export UV_FIND_LINKS
    fi
}

_install_uv() {
    say "uv is missing: installing it into .uv"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        apt_install "$("$PYTHON" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")')"
    "$PYTHON" -m venv --clear .uv && .uv/bin/pip install --quiet uv ||
        fail "could not install uv; pip's message is above. Install uv yourself and run again"
}
