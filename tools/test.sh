#!/usr/bin/env bash
# Run the tests in the project's own environment; arguments go to pytest:  bash tools/test.sh tests/routing -k stride
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
# two files at a time; -n 0 runs one after the other and shows what tests print
exec python -m pytest -n 2 --dist loadfile "$@"
