#!/bin/sh
# A set of pictures larger than memory: COUNT drawn JPEGs of 224 x 224 (300,000: 49 GB decoded) in a scratch folder,
# removed at the end, and one epoch of a ResNet-18 at 64 pixels on them, read from disk, in 2 GiB of address space.
#
#   make build/bench && sh tests/large_set.sh [COUNT [FOLDER]]       FOLDER: where the scratch folder goes [/tmp]
#
# A picture takes about 17 KB. BATCH (128), THREADS (2) and BENCH (build/bench) come from the environment.
set -eu
count=${1:-300000}
case $count in '' | *[!0-9]*) echo "large_set.sh: COUNT is \"$count\", not a number" >&2; exit 2 ;; esac
bench=${BENCH:-build/bench}
[ -x "$bench" ] || { echo "large_set.sh: no $bench: run make build/bench" >&2; exit 2; }
dir=$(mktemp -d "${2:-/tmp}/large_set.XXXXXX")
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
free=$(df -Pk "$dir" | awk 'NR == 2 { print $4 }')
if [ "$free" -lt $((count * 18 + 1000000)) ]; then
    echo "large_set.sh: $count pictures need $((count * 18 / 1000)) MB of disk and 1 GB to spare, $dir has $((free / 1000)) MB" >&2
    exit 1
fi
"$bench" pictures "$dir/set" "$count" 224
echo "$(du -sk "$dir/set" | awk '{ print int($1 / 1000) }') MB of JPEG, $((count * 150528 / 1000000)) MB decoded"
(ulimit -v 2097152 && "$bench" stream "$dir/set" resnet18 "${BATCH:-128}" 64 "${THREADS:-2}" 1)
