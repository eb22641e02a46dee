#!/bin/sh
# run.sh TEST...: runs test programs and scripts from the repository's root, JOBS (2) at a time, and adds up the lines
# "N passed, N failed" that they end with. A test that crashes, or ends without that line, counts as one more failure.
# Lines that begin with SKIPPED (what a test could not check on this machine) are shown and count as neither.
# build/log/TEST.log has the whole output of each test: the groups of checks it ran and what failed in each.
logs=build/log
rm -rf $logs
mkdir -p $logs

# Runs a test, prints how it went, and writes "passed failed" to a file.
one() {
    log=$logs/$(echo "$1" | tr / _).log
    start=$(date +%s)
    case $1 in
    *.sh) bash "$1" > "$log" 2>&1 ;;
    */asan/*) SLOW=1 "$1" > "$log" 2>&1 ;;
    *) "$1" > "$log" 2>&1 ;;
    esac
    status=$?
    counts=$(tail -n 1 "$log" | sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p')
    p=${counts% *}
    f=${counts#* }
    if [ -z "$counts" ] || { [ $status -ne 0 ] && [ "$f" -eq 0 ]; }; then
        p=${p:-0}
        f=$((${f:-0} + 1))
        group=$(grep '^-- ' "$log" | tail -n 1)
        echo "$1: exit status $status without a matching summary${group:+; it was checking: ${group#-- }}" >> "$log"
    fi
    echo "$p $f" > "$log.counts"
    { # in one piece, so that the lines of two tests do not mix
        [ "$f" -eq 0 ] || grep -v '^ok ' "$log" | tail -n 40
        grep '^SKIPPED' "$log"
        echo "$1: $p passed, $f failed ($(($(date +%s) - start)) s)"
    } > "$log.report"
    cat "$log.report"
}

# Runs tests that no other worker has taken, until none is left.
worker() {
    for test in "$@"; do
        mkdir "$logs/$(echo "$test" | tr / _).taken" 2> /dev/null && one "$test"
    done
}

job=1
while [ $job -lt "${JOBS:-2}" ]; do
    worker "$@" &
    job=$((job + 1))
done
worker "$@"
wait

passed=0
failed=0
for test in "$@"; do
    counts=$(cat "$logs/$(echo "$test" | tr / _).log.counts" 2> /dev/null || echo "0 1")
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
