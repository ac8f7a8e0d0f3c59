#!/bin/sh
# Make the virtual environment. Called by `make setup`; PYTHON and VENV come from the Makefile.
set -eu

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "setup: $PYTHON is missing or older than 3.11; set PYTHON=/path/to/python3.11 or newer" >&2
    exit 2
}
if ! "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -q && apt-get install -qy python3-venv
    else
        echo "setup: this Python cannot make virtual environments; run: sudo apt-get install python3-venv" >&2
        exit 2
    fi
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable '.[sim,lab,validate,dev]'
