#!/usr/bin/env bash
# Gathers what a machine without a network needs beside torch and transformers, as wheels for x86-64 Linux and Python 3.12.
#   bash tools/gpu_wheels.sh          fills wheels/, which git ignores; at most 64 MiB
#   bash tools/gpu_wheels.sh study    fills wheels-study/ with scipy and scikit-learn, which only the section study needs; at most 64 MiB
# There:  python3 -m pip install --no-index --no-deps wheels/*.whl
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

WHEELS=wheels${1:+-$1} LIMIT_MIB=64
rm -rf $WHEELS && mkdir $WHEELS
python -m tools.gpu.wheels "$@" >$WHEELS/list.txt
platforms=()
for glibc in 2_28 2_27 2_26 2_24 2_17 2014 2_12 2010 2_5 1; do
    case $glibc in *_*) name=manylinux_$glibc ;; *) name=manylinux$glibc ;; esac
    platforms+=(--platform "${name}_x86_64")
done
if deepspeed=$(grep '^deepspeed==' $WHEELS/list.txt); then
    # published as source only; without compiled operators its wheel holds nothing but Python
    DS_BUILD_OPS=0 python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $WHEELS "$deepspeed"
fi
python -m pip download --quiet --no-deps --only-binary=:all: --find-links $WHEELS --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest $WHEELS --requirement $WHEELS/list.txt
mib=$(du --summarize --block-size=1M $WHEELS | cut -f1)
echo "$(ls $WHEELS/*.whl | wc -l) wheels, $mib MiB"
[ "$mib" -le $LIMIT_MIB ] || { echo "more than $LIMIT_MIB MiB" >&2 && exit 1; }
