#!/usr/bin/env bash
# test_python.sh: the shared library as a user gets it (make install-shared into a folder): its names, its soname, a C
# program that links with it by pkg-config's words, CMake's package (tests/cmake), examples/ckca.py and, where they are
# installed, ONNX Runtime and cffi (tests/embed.py). PYTHON: python3. Run from the repository's root.
set -u
tmp=$(mkdir -p build && mktemp -d "$PWD/build/python.XXXXXX") || exit 1
trap 'rm -rf "$tmp"' EXIT
: "${CC:=cc}" "${PYTHON:=python3}"
passed=0
failed=0
check() { # check STATUS TEXT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAIL $2"; fi
}

# In a folder of its own, so that these flags do not make the other tests rebuild
mkdir "$tmp/tree"
ln -s "$PWD"/{ckca.h,ckca_cuda.cu,Makefile,LICENSE,ckca-config.cmake,ckca-config-version.cmake,examples,tests} "$tmp/tree"
env -u MAKEFLAGS -u MFLAGS -u CUDA make -s -C "$tmp/tree" install-shared DESTDIR="$tmp/dest" PREFIX=/usr \
    CC="$CC" CFLAGS="-O1 -DCKCA_NO_SIMD" > "$tmp/log" 2>&1
status=$?
check $status "make install-shared"
[ $status -eq 0 ] || { cat "$tmp/log" && echo "$passed passed, $failed failed" && exit 1; }
version=$(sed -n 's/.*define CKCA_VERSION "\(.*\)".*/\1/p' ckca.h)
library=$tmp/dest/usr/lib/libckca.so.$version

# The public part of the header: what CKCA_API declares is what the library has, no more, no less
sed -n '/^#define CKCA_H$/,/^#endif \/\* CKCA_H \*\//p' ckca.h > "$tmp/public.h"
tr '\n' ' ' < "$tmp/public.h" | sed 's|/\*[^*]*\*\+\([^/*][^*]*\*\+\)*/| |g' | grep -o 'CKCA_API [^;(]*(' |
    grep -o 'ckca_[a-z0-9_]*($' | tr -d '(' | sort > "$tmp/declared"
check $(($(wc -l < "$tmp/declared") < 50)) "only $(wc -l < "$tmp/declared") public functions found"
if command -v nm > /dev/null; then
    nm -D --defined-only "$library" | awk '{print $3}' | sort > "$tmp/exported"
    diff "$tmp/declared" "$tmp/exported" > "$tmp/diff"
    check $? "the library's names (>) are not those that ckca.h declares (<): $(head -n 5 "$tmp/diff" | tr '\n' ' ')"
else
    echo "SKIPPED the library's names: no nm"
fi

# Every public structure has a row in ckca_struct_size; none has a bit-field or a union
for type in $(sed -n 's/^typedef struct \(ckca_[a-z0-9_]*\) {.*/\1/p' "$tmp/public.h"); do
    grep -q "{CKCA__TYPE($type)}," ckca.h
    check $? "ckca_struct_size does not know $type"
done
! grep -qE '^ +(unsigned |int )[^;/*]*:[ 0-9]|^ *(typedef )?union' "$tmp/public.h"
check $? "a bit-field or union in the public header"

# A C program against the installed library, found under its soname
cat > "$tmp/user.c" << 'END'
#include <ckca.h>
#include <stdio.h>
#include <string.h>
int main(void) {
    ckca_context *ctx = 0;
    ckca_model *model = 0;
    int refused = !ckca_init(&ctx, 0) && ckca_load(ctx, &model, "none.safetensors") == CKCA_EIO;
    puts(ckca_error(ctx));
    ckca_context_free(ctx);
    return !refused || strcmp(ckca_version(), CKCA_VERSION) || ckca_struct_size("ckca_desc") != sizeof(ckca_desc);
}
END
words="-I$tmp/dest/usr/include -L$tmp/dest/usr/lib -lckca"
if command -v pkg-config > /dev/null; then
    export PKG_CONFIG_PATH=$tmp/dest/usr/lib/pkgconfig PKG_CONFIG_SYSROOT_DIR=$tmp/dest
    # --define-variable: pkg-config leaves out /usr/include and /usr/lib, and some forks a sysroot
    words=$(pkg-config --define-variable=prefix="$tmp/dest/usr" --cflags --libs ckca-shared)
    header_words=$(pkg-config --define-variable=prefix="$tmp/dest/usr" --cflags --libs ckca)
    unset PKG_CONFIG_SYSROOT_DIR
    case $header_words in *-lm*-pthread*) true ;; *) false ;; esac
    check $? "ckca.pc: \"$header_words\" has no -lm -pthread"
else
    echo "SKIPPED pkg-config: it is not installed"
fi
$CC -std=c99 "$tmp/user.c" -o "$tmp/user" $words 2> "$tmp/log"
check $? "a program with $words: $(head -n 3 "$tmp/log")"
LD_LIBRARY_PATH=$tmp/dest/usr/lib "$tmp/user" > "$tmp/log" 2>&1
check $? "the program with the shared library: $(head -n 3 "$tmp/log")"
soname=libckca.so.$(echo "$version" | sed 's/\.[0-9]*$//; /^0/!s/\..*//')
[ -L "$tmp/dest/usr/lib/$soname" ]
check $? "no link $soname"
mv "$tmp/dest/usr/lib/libckca.so" "$tmp/link" # only needed for linking
LD_LIBRARY_PATH=$tmp/dest/usr/lib "$tmp/user" > /dev/null 2>&1
check $? "the program does not run without the unversioned link"
mv "$tmp/link" "$tmp/dest/usr/lib/libckca.so"

# CMake: find_package with the installed library, FetchContent with the source
if ! command -v cmake > /dev/null; then
    echo "SKIPPED CMake's package: no cmake"
else
    cmake_user() { # cmake_user NAME OPTION...
        cmake -S tests/cmake -B "$tmp/$1" -DCMAKE_C_COMPILER="$CC" -DCMAKE_C_COMPILER_WORKS=1 \
            -DCMAKE_C_FLAGS="-D_DEFAULT_SOURCE -O0 -DCKCA_NO_SIMD -DCKCA_NO_STB_IMAGE" "${@:2}" > "$tmp/log" 2>&1 &&
            cmake --build "$tmp/$1" >> "$tmp/log" 2>&1 && "$tmp/$1/user" >> "$tmp/log" 2>&1
    }
    cmake_user installed -DCMAKE_PREFIX_PATH="$tmp/dest/usr" -DVERSION="${version%.*}"
    check $? "find_package(ckca ${version%.*}) and ckca::shared: $(grep -m 3 -i error "$tmp/log")"
    cmake_user source -DSOURCE="$PWD"
    check $? "FetchContent and ckca::ckca: $(grep -m 3 -i error "$tmp/log")"
    for other in 0.1 9; do
        ! cmake_user "other$other" -DCMAKE_PREFIX_PATH="$tmp/dest/usr" -DVERSION=$other && grep -q "version: $version" "$tmp/log"
        check $? "find_package(ckca $other) found version $version"
    done
fi

# Python
if ! command -v "$PYTHON" > /dev/null; then
    echo "SKIPPED examples/ckca.py: no $PYTHON"
else
    (cd "$tmp" && CKCA_LIBRARY=$library "$PYTHON" -B "$OLDPWD/tests/embed.py" > "$tmp/log" 2>&1)
    status=$?
    grep -v '^[0-9]* passed' "$tmp/log"
    counts=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$tmp/log")
    counts=${counts:-0 0}
    [ "$counts" != "0 0" ]
    check $? "tests/embed.py has no summary, its exit status is $status"
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
