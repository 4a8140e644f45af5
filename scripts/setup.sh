#!/bin/sh
# Checks that this machine can build lewm-fast, makes the environment, and installs into it. Run by make; by hand:
#     VENV=.venv PYTHON=python3 TORCH_INDEX= sh scripts/setup.sh
# Everything that is missing is said at once, one line each, before anything is downloaded or written.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
[ -x "$venv/bin/python" ] && python=$venv/bin/python

missing=0
need() { # what is missing; how to install it on Debian and Ubuntu, on macOS, elsewhere
    how=$4
    if command -v apt-get >/dev/null; then how=$2; elif [ "$(uname)" = Darwin ]; then how=$3; fi
    echo "missing: $1. Install: $how" >&2
    missing=1
}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    need "Python 3.10 or newer ($python does not run or is older)" "sudo apt install python3 python3-venv" \
        "brew install python" "Python from your system's packages, then make PYTHON=/path/to/python3"
elif [ ! -e "$venv" ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    need "Python's venv module" "sudo apt install python3-venv" "brew install python" "python3-venv or python3-pip"
fi

# Distributions ship a Rust that is too old, so rustup is the answer everywhere.
rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
cargo=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || true
if [ "$(printf '%s\n' "$rust" "${cargo:-0}" | sort -t . -k 1,1n -k 2,2n | head -n 1)" != "$rust" ]; then
    rustup="curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y && . ~/.cargo/env"
    command -v rustup >/dev/null && rustup="rustup default stable && rustup update stable"
    need "Rust $rust or newer (${cargo:-no cargo} found)" "$rustup" "$rustup" "$rustup"
fi

cc --version >/dev/null 2>&1 ||
    need "a C compiler, cc" "sudo apt install build-essential" "xcode-select --install" "gcc or clang, with cc on PATH"
[ -d python/lewm/kernels ] ||
    need "the symbolic link python/lewm/kernels" "git config core.symlinks true && git checkout python/lewm/kernels" \
        "git config core.symlinks true && git checkout python/lewm/kernels" "CONTRIBUTING.md says how (symbolic links)"
[ "$missing" = 0 ] || exit 1

if [ ! -e "$venv" ]; then
    # A Python that has torch lends it: the new environment sees it and does not download another.
    lend=$("$python" -c 'import importlib.util as i; print("--system-site-packages" * bool(i.find_spec("torch")))')
    "$python" -m venv $lend "$venv"
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
exec "$venv/bin/python" scripts/install.py
