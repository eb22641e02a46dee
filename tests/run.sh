#!/bin/sh
# run.sh TEST...: runs test programs and scripts one after another, from the repository's root, and adds up the lines
# "N passed, N failed" that they end with. One that crashes, or ends without that line, is one more failure. What a test
# left out for want of something on this machine (lines that begin with SKIPPED) is said too, and counted as neither.
passed=0
failed=0
mkdir -p build/log
for test in "$@"; do
    log=build/log/$(echo "$test" | tr / _).log
    start=$(date +%s)
    case $test in
    *.sh) bash "$test" > "$log" 2>&1 ;;
    *) "$test" > "$log" 2>&1 ;;
    esac
    status=$?
    counts=$(tail -n 1 "$log" | sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p')
    p=${counts% *}
    f=${counts#* }
    if [ -z "$counts" ] || { [ $status -ne 0 ] && [ "$f" -eq 0 ]; }; then
        p=${p:-0}
        f=$((${f:-0} + 1))
        echo "$test ended with status $status without saying what failed" >> "$log"
    fi
    [ "$f" -eq 0 ] || tail -n 40 "$log"
    grep '^SKIPPED' "$log"
    echo "$test: $p passed, $f failed ($(($(date +%s) - start)) s)"
    passed=$((passed + p))
    failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
