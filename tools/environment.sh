# Sourced by the other scripts: makes .venv with everything the project needs, unless it is there and up to date.
#   PYTHON=python3.12 bash tools/quickstart.sh   chooses the interpreter (3.11 or newer)
PYTHON=${PYTHON:-python3}
VENV=$PWD/.venv
STAMP=$VENV/.installed-$(sha256sum pyproject.toml | cut -c1-16)

if [ ! -e "$STAMP" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "megavlm needs Python 3.11 or newer, and $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON to another one." >&2
        exit 2
    }
    [ -x "$VENV/bin/python" ] || { echo "making .venv" && "$PYTHON" -m venv "$VENV"; }
    echo "installing megavlm and what it needs into .venv (once; a gigabyte or more)"
    "$VENV/bin/python" -m pip install --editable '.[test,check]'
    touch "$STAMP"
fi
export PATH=$VENV/bin:$PATH
export PYTHONUNBUFFERED=1
