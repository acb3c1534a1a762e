#!/usr/bin/env bash
# Run the tests in the project's own environment; arguments go to pytest:  bash tools/test.sh tests/routing -k stride
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
exec python -m pytest "$@"
