#!/bin/sh
# run.sh TEST...: runs test programs and scripts, JOBS (2) at a time, from the repository's root, and adds up the lines
# "N passed, N failed" that they end with. One that crashes, or ends without that line, is one more failure. What a test
# left out for want of something on this machine (lines that begin with SKIPPED) is said too, and counted as neither.
logs=build/log
rm -rf $logs
mkdir -p $logs

# Runs a test; says how it went, and "passed failed" in a file.
one() {
    log=$logs/$(echo "$1" | tr / _).log
    start=$(date +%s)
    case $1 in
    *.sh) bash "$1" > "$log" 2>&1 ;;
    *) "$1" > "$log" 2>&1 ;;
    esac
    status=$?
    counts=$(tail -n 1 "$log" | sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p')
    p=${counts% *}
    f=${counts#* }
    if [ -z "$counts" ] || { [ $status -ne 0 ] && [ "$f" -eq 0 ]; }; then
        p=${p:-0}
        f=$((${f:-0} + 1))
        echo "$1 ended with status $status without saying what failed" >> "$log"
    fi
    echo "$p $f" > "$log.counts"
    { # at once, so that two tests' lines do not mix
        [ "$f" -eq 0 ] || tail -n 40 "$log"
        grep '^SKIPPED' "$log"
        echo "$1: $p passed, $f failed ($(($(date +%s) - start)) s)"
    } > "$log.said"
    cat "$log.said"
}

# Takes the next test that nobody has, until there are none.
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
