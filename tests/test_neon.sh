#!/bin/sh
# test_neon.sh [TEST...]: the AArch64 kernels on any machine: cross-compiles test programs (default: test_conv, test_ops
# and test_files; test_train and test_nets take one and three minutes) and runs them with qemu-user. Needs Debian's
# gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user; without them it reports that it was skipped. Run from the
# repository's root.
dir=build/neon
rm -rf $dir
mkdir -p $dir
passed=0
failed=0
tests=${*:-test_conv test_ops test_files}
cc=aarch64-linux-gnu-gcc

qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static)
lacking=""
echo 'int main(void) { return 0; }' > $dir/probe.c
$cc -static $dir/probe.c -o $dir/probe 2> /dev/null || lacking="$cc is missing or cannot link"
[ -n "$qemu" ] || lacking="${lacking:+$lacking, }no qemu-aarch64"
if [ -n "$lacking" ]; then
    echo "SKIPPED the AArch64 kernels: $lacking (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"
    echo "0 passed, 0 failed"
    exit 0
fi

# Static: qemu then needs no AArch64 libraries.
one() {
    $cc -std=c99 -D_DEFAULT_SOURCE -O2 -DCKCA_NO_STB_IMAGE -static -I. "tests/$1.c" -o "$dir/$1" -lm -pthread &&
        SLOW=1 "$qemu" "$dir/$1"
    echo "$1 ended with status $?"
}

under_way=0
for test in $tests; do
    one "$test" > "$dir/$test.log" 2>&1 &
    under_way=$((under_way + 1))
    [ $((under_way % 2)) -eq 0 ] && wait
done
wait
for test in $tests; do
    counts=$(tail -n 2 "$dir/$test.log" | sed -n '1s/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p')
    if [ -n "$counts" ]; then
        echo "$test: ${counts% *} passed, ${counts#* } failed"
        passed=$((passed + ${counts% *}))
        failed=$((failed + ${counts#* }))
        [ "${counts#* }" -eq 0 ] || grep '^FAIL' "$dir/$test.log" | head -n 12
    else
        failed=$((failed + 1))
        echo "FAIL $test did not finish:"
        tail -n 12 "$dir/$test.log"
    fi
done
# Plain loops would pass too: the vector kernels must have run.
if [ -e $dir/test_conv.log ]; then
    if grep -q '^instruction sets up to host base' $dir/test_conv.log; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL test_conv ran no vector kernels"
    fi
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
