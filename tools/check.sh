#!/usr/bin/env bash
# Checks of the source before the tests run: lint, format, types. Sets up everything.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
ruff check .
ruff format --check .
pyright
