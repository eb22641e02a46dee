#!/bin/sh
# test_compile.sh: the header compiles without a warning as C99 and C++11, with gcc and clang (a missing one is reported
# and left out), with every option macro and in two translation units. Builds without vector kernels, threads or
# stb_image run the tests that apply to them. Then: the manual's program, make install, the size of a program and the
# time it takes to compile. Run from the repository's root.
dir=build/compile
rm -rf $dir
mkdir -p $dir
passed=0
failed=0
std="-D_DEFAULT_SOURCE -I."

pass() { # pass NAME
    passed=$((passed + 1))
    echo "ok $1"
}
fail() {
    failed=$((failed + 1))
    echo "FAIL $*"
}

# try NAME COMMAND...: the command must succeed. Two run at a time; settle waits for both.
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
            pass "$name"
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
        echo "note: no $cc or no $cxx: not tested"
    elif ! printf '#include <new>\nint main() { return 0; }\n' | $cxx -x c++ - -o $dir/probe 2> /dev/null; then
        echo "note: $cxx has no C++ library: $cc not tested"
    else
        found="$found $cc"
    fi
done
[ -n "$found" ] || fail "no compiler: neither gcc and g++ nor clang and clang++"

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
    ckca_context_free(ctx);
    return 0;
}' > $dir/main.c

for cc in $found; do
    cxx=$(echo $cc | sed 's/gcc/g++/; s/clang/clang++/')
    for language in "c99 -x c" "c++11 -x c++"; do
        l=${language%% *}
        w="$std -std=$language -Wall -Wextra -Wpedantic -Werror"
        try public_${cc}_$l $cc $w -Wshadow -Wconversion -fsyntax-only $dir/public.c
        strict="" # the implementation too, as C
        [ $l = c99 ] && strict="-Wshadow -Wconversion"
        for options in "" CKCA_STATIC CKCA_NO_STDIO CKCA_NO_SIMD CKCA_NO_THREADS CKCA_NO_STB_IMAGE \
            "CKCA_STATIC CKCA_NO_STDIO CKCA_NO_SIMD CKCA_NO_THREADS CKCA_NO_STB_IMAGE"; do
            d=$(for o in $options; do printf ' -D%s' $o; done)
            try whole_${cc}_${l}_$(echo $options | tr ' ' _) $cc $w $strict $d -fsyntax-only $dir/whole.c
        done
        # Strict C99 or C++11, without the declarations of _DEFAULT_SOURCE
        try whole_${cc}_${l}_strict $cc ${w#-D_DEFAULT_SOURCE} -fsyntax-only $dir/whole.c
        # Two translation units: one implementation, or one in each. Link C++ as C++: the end of a thread may unwind
        link=$cc
        [ $l = c99 ] || link=$cxx
        try two_${cc}_$l $link $w -O0 $dir/main.c $dir/other.c -o $dir/two_${cc}_$l -lm -pthread
        try two_static_${cc}_$l $link $w -O0 -DCKCA_STATIC $dir/main.c $dir/other.c -o $dir/two_static_${cc}_$l \
            -lm -pthread
        settle
        try run_two_${cc}_$l $dir/two_${cc}_$l
        try run_two_static_${cc}_$l $dir/two_static_${cc}_$l
    done
    # The implementation in C, the caller in C++
    try mixed_${cc}_c $cc $std -std=c99 -O0 -c $dir/main.c -o $dir/mixed_${cc}_c.o
    try mixed_${cc}_cxx $cxx $std -std=c++11 -O0 -c -x c++ $dir/other.c -o $dir/mixed_${cc}_cxx.o
    settle
    try mixed_$cc $cxx $dir/mixed_${cc}_c.o $dir/mixed_${cc}_cxx.o -o $dir/mixed_$cc -lm -pthread
    settle
    try run_mixed_$cc $dir/mixed_$cc
done
settle

# The program in the manual and in the README is examples/hello.c, byte for byte (test_examples.sh runs build/hello)
awk '/^ *\/\/ hello\.c: / { inside = 1; indent = index($0, "//") }
     inside { print substr($0, indent) }
     inside && substr($0, indent) == "}" && main { exit }
     /int main/ { main = inside }' ckca.h > $dir/manual.c
sed -n '/^```c$/,/^```$/p' README.md | sed -n '/hello\.c: /,/^```$/p' | sed '/^```$/,$d' > $dir/readme.c
try manual_is_hello cmp examples/hello.c $dir/manual.c
try readme_is_hello cmp examples/hello.c $dir/readme.c
for cc in $found; do
    try manual_$cc $cc -I. -std=c99 -O0 -Wall -Wextra -Wpedantic -Werror $dir/manual.c -o $dir/manual_$cc -lm -pthread
done
settle

# make install: the header, the GPU's source, the licence and the version
root=$PWD/$dir/root
try install env -u MAKEFLAGS -u MFLAGS make install DESTDIR="$root" PREFIX=/usr
settle
try installed_header cmp ckca.h "$root/usr/include/ckca.h"
try installed_cuda cmp ckca_cuda.cu "$root/usr/share/ckca/ckca_cuda.cu"
try installed_licence cmp LICENSE "$root/usr/share/doc/ckca/LICENSE"
try installed_version grep -qx "Version: $(sed -n 's/.*define CKCA_VERSION "\(.*\)".*/\1/p' ckca.h)" \
    "$root/usr/lib/pkgconfig/ckca.pc"
settle

# Without vector kernels, threads or stb_image: build and run the tests that apply
: "${CC:=cc}"
for test in test_conv test_ops test_train test_threads test_files; do
    [ -e tests/$test.c ] || continue
    case $test in
    test_files) options="CKCA_NO_STB_IMAGE" ;;
    test_train | test_threads) options="CKCA_NO_THREADS" ;;
    *) options="CKCA_NO_SIMD" ;;
    esac
    try build_${options}_$test $CC $std -std=c99 -O1 -DCKCA_NO_SIMD -D$options tests/$test.c \
        -o $dir/${options}_$test -lm -pthread
done
try build_CKCA_NO_STDIO_test_files $CC $std -std=c99 -O1 -DCKCA_NO_STDIO -DCKCA_NO_SIMD tests/test_files.c \
    -o $dir/CKCA_NO_STDIO_test_files -lm -pthread
settle
for program in $dir/CKCA_NO_*_test_*; do
    case $program in *.log | *.ok) continue ;; esac
    if "$program" > "$program.log" 2>&1 && tail -n 1 "$program.log" | grep -q '^[1-9][0-9]* passed, 0 failed$'; then
        pass "$program"
    else
        fail "$program:"
        tail -n 12 "$program.log"
    fi
done

# The smallest program at -O3: its size and the CPU time to compile it. The limits are 1 MB and 20 s; the test allows
# 40 s, since the machine may be busy.
for cc in $found; do
    if (
        $cc $std -std=c99 -O3 -Wall -Wextra -Wpedantic -Werror $dir/whole.c -o $dir/whole_$cc -lm -pthread || exit 1
        times > $dir/times_$cc
    ) > $dir/O3_$cc.log 2>&1; then
        pass "O3_$cc"
    else
        fail "$cc -O3:"
        head -n 12 $dir/O3_$cc.log
        continue
    fi
    seconds=$(sed -n '2s/^\([0-9]*\)m\([0-9]*\).*/\1 \2/p' $dir/times_$cc)
    seconds=$((${seconds% *} * 60 + ${seconds#* }))
    size=$(wc -c < $dir/whole_$cc)
    echo "$cc -O3: $size bytes, $seconds s of CPU time to compile"
    [ "$size" -lt 1000000 ] && pass "size_$cc" || fail "$cc: a program of $size bytes"
    [ "$seconds" -lt 40 ] && pass "compile_time_$cc" || fail "$cc: $seconds s to compile"
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
