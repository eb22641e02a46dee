#!/bin/sh
# test_compile.sh: the header compiles everywhere it says it does. As C99 and C++11, by gcc and clang (one that is not
# here is left out, aloud), without a warning; with every option macro; in two translation units; without threads and
# stb_image; and what such builds can do, they do: the tests that apply are run. Then the size of a program and the time
# it takes to compile. Run from the repository's root.
dir=build/compile
rm -rf $dir
mkdir -p $dir
passed=0
failed=0
std="-D_DEFAULT_SOURCE -I."

pass() { passed=$((passed + 1)); }
fail() {
    failed=$((failed + 1))
    echo "FAIL $*"
}

# try NAME COMMAND...: the command must succeed. Two run at a time; settle waits for what is under way.
under_way=""
try() {
    name=$1
    shift
    { "$@" > "$dir/$name.log" 2>&1 && echo > "$dir/$name.ok"; } &
    under_way="$under_way $name"
    [ $(echo $under_way | wc -w) -lt 2 ] || settle
}
settle() {
    wait
    for name in $under_way; do
        if [ -e "$dir/$name.ok" ]; then
            pass
        else
            fail "$name:"
            head -n 12 "$dir/$name.log"
        fi
    done
    under_way=""
}

found=""
for cc in gcc clang; do
    cxx=$(echo $cc | sed 's/gcc/g++/; s/clang/clang++/')
    if ! command -v $cc > /dev/null || ! command -v $cxx > /dev/null; then
        echo "note: $cc or $cxx is not here: not tried"
    elif ! printf '#include <new>\nint main() { return 0; }\n' | $cxx -x c++ - -o $dir/probe 2> /dev/null; then
        echo "note: $cxx has no C++ library: $cc not tried"
    else
        found="$found $cc"
    fi
done
[ -n "$found" ] || fail "neither gcc with g++ nor clang with clang++ is here"

echo '#include <ckca.h>
int main(void) { return CKCA_OK; }' > $dir/public.c
echo '#define CKCA_IMPLEMENTATION
#include "ckca.h"
int main(void) { return ckca_init(0, 0) == CKCA_OK; }' > $dir/whole.c
echo '#ifdef CKCA_STATIC
#define CKCA_IMPLEMENTATION
#endif
#include "ckca.h"
#ifdef __cplusplus
extern "C"
#endif
const char *other(void);
const char *other(void) { return ckca_status_name(CKCA_OK); }' > $dir/other.c
echo '#define CKCA_IMPLEMENTATION
#include "ckca.h"
#ifdef __cplusplus
extern "C"
#endif
const char *other(void);
int main(void) {
    ckca_context *ctx;
    if (ckca_init(&ctx, NULL) != CKCA_OK || strcmp(other(), ckca_status_name(CKCA_OK))) return 1;
    ckca_free(ctx);
    return 0;
}' > $dir/main.c

for cc in $found; do
    cxx=$(echo $cc | sed 's/gcc/g++/; s/clang/clang++/')
    for language in "c99 -x c" "c++11 -x c++"; do
        l=${language%% *}
        w="$std -std=$language -Wall -Wextra -Wpedantic -Werror"
        try public_${cc}_$l $cc $w -Wshadow -Wconversion -fsyntax-only $dir/public.c
        for options in "" CKCA_STATIC CKCA_NO_STDIO CKCA_NO_SIMD CKCA_NO_THREADS CKCA_NO_STB_IMAGE \
            "CKCA_STATIC CKCA_NO_STDIO CKCA_NO_SIMD CKCA_NO_THREADS CKCA_NO_STB_IMAGE"; do
            d=$(for o in $options; do printf ' -D%s' $o; done)
            try whole_${cc}_${l}_$(echo $options | tr ' ' _) $cc $w $d -fsyntax-only $dir/whole.c
        done
        # Strictly by the standard, without what _DEFAULT_SOURCE declares besides
        try whole_${cc}_${l}_strict $cc ${w#-D_DEFAULT_SOURCE} -fsyntax-only $dir/whole.c
        # Two translation units: one implementation, or one in each. C++ is linked as C++: a thread's end may unwind
        link=$cc
        [ $l = c99 ] || link=$cxx
        try two_${cc}_$l $link $w -O0 $dir/main.c $dir/other.c -o $dir/two_${cc}_$l -lm -pthread
        try two_static_${cc}_$l $link $w -O0 -DCKCA_STATIC $dir/main.c $dir/other.c -o $dir/two_static_${cc}_$l \
            -lm -pthread
        settle
        try run_two_${cc}_$l $dir/two_${cc}_$l
        try run_two_static_${cc}_$l $dir/two_static_${cc}_$l
    done
    # The implementation in C, its user in C++
    try mixed_${cc}_c $cc $std -std=c99 -O0 -c $dir/main.c -o $dir/mixed_${cc}_c.o
    try mixed_${cc}_cxx $cxx $std -std=c++11 -O0 -c -x c++ $dir/other.c -o $dir/mixed_${cc}_cxx.o
    settle
    try mixed_$cc $cxx $dir/mixed_${cc}_c.o $dir/mixed_${cc}_cxx.o -o $dir/mixed_$cc -lm -pthread
    settle
    try run_mixed_$cc $dir/mixed_$cc
done
settle

# The program in the header's manual, as it stands there
awk '/^ *#define CKCA_IMPLEMENTATION$/ { inside = 1; text = ""; indent = $0; sub(/#.*/, "", indent) }
     inside { text = text $0 "\n" }
     inside && $0 == indent "}" && text ~ /int main/ { printf "%s", text; exit }' ckca.h > $dir/manual.c
if grep -q 'int main' $dir/manual.c; then
    for cc in $found; do
        try manual_$cc $cc -I. -O0 -Wall -Wextra -Werror $dir/manual.c -o $dir/manual_$cc -lm -pthread
    done
    settle
else
    fail "no program in the header's manual"
fi

# Without vector kernels, without threads, without stb_image, by the compiler at hand: build and run what applies
: "${CC:=cc}"
for test in test_conv test_ops test_train test_threads test_files; do
    [ -e tests/$test.c ] || continue
    case $test in
    test_files) options="CKCA_NO_STB_IMAGE" ;;
    test_train | test_threads) options="CKCA_NO_THREADS" ;;
    *) options="CKCA_NO_SIMD" ;;
    esac
    try build_${options}_$test $CC $std -std=c99 -O2 -D$options tests/$test.c -o $dir/${options}_$test -lm -pthread
done
try build_CKCA_NO_STDIO_test_files $CC $std -std=c99 -O1 -DCKCA_NO_STDIO -DCKCA_NO_SIMD tests/test_files.c \
    -o $dir/CKCA_NO_STDIO_test_files -lm -pthread
settle
for program in $dir/CKCA_NO_*_test_*; do
    case $program in *.log | *.ok) continue ;; esac
    if "$program" > "$program.log" 2>&1 && tail -n 1 "$program.log" | grep -q '^[1-9][0-9]* passed, 0 failed$'; then
        pass
    else
        fail "$program:"
        tail -n 12 "$program.log"
    fi
done

# Size, and seconds of processor time to compile, of the smallest program at -O3. The bars are 1 MB and 20 s; the time's is
# checked at twice that, since the machine may be busy with other things.
for cc in $found; do
    if (
        $cc $std -std=c99 -O3 -Wall -Wextra -Wpedantic -Werror $dir/whole.c -o $dir/whole_$cc -lm -pthread || exit 1
        times > $dir/times_$cc
    ) > $dir/O3_$cc.log 2>&1; then
        pass
    else
        fail "$cc -O3:"
        head -n 12 $dir/O3_$cc.log
        continue
    fi
    seconds=$(sed -n '2s/^\([0-9]*\)m\([0-9]*\).*/\1 \2/p' $dir/times_$cc)
    seconds=$((${seconds% *} * 60 + ${seconds#* }))
    size=$(wc -c < $dir/whole_$cc)
    echo "$cc -O3: $size bytes, $seconds s of processor time to compile"
    [ "$size" -lt 1000000 ] && pass || fail "$cc: a program of $size bytes"
    [ "$seconds" -lt 40 ] && pass || fail "$cc: $seconds s to compile"
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
