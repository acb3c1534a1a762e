#!/usr/bin/env bash
# The documents as a site in build/site, which needs no network and opens from the disk. Broken links end it.
#   bash tools/docs.sh            builds it        bash tools/docs.sh serve      shows it while you write
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = serve ]; then exec mkdocs serve --config-file .mkdocs.yml; fi
mkdocs build --strict --config-file .mkdocs.yml
echo "open build/site/index.html"
