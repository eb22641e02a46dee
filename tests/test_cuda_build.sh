#!/bin/sh
# test_cuda_build.sh: make CUDA=1 builds every example, test and the bench with nvcc, for one architecture, in a tree of
# links of its own; where there is no GPU, programs say so. Without nvcc nothing is tried, aloud. From the repository's root.
unset MAKEFLAGS MFLAGS # a make of its own, whoever called
dir=build/cuda_build
passed=0
failed=0
check() { # check NAME CONDITION...
    name=$1
    shift
    if "$@"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAIL $name"
    fi
}
# The header with CKCA_CUDA, in both languages (needs no nvcc).
mkdir -p $dir
echo '#define CKCA_IMPLEMENTATION
#include "ckca.h"' > $dir/header.c
flags="-Wall -Wextra -Wpedantic -Werror -DCKCA_CUDA -D_DEFAULT_SOURCE -I. -c -o /dev/null"
check "C99 with CKCA_CUDA" ${CC:-cc} -std=c99 $flags $dir/header.c
check "C++11 with CKCA_CUDA" ${CXX:-c++} -x c++ -std=c++11 $flags $dir/header.c
if ! command -v nvcc > /dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
    echo "note: no nvcc here: ckca_cuda.cu is not compiled for a GPU"
    check "make CUDA=1 without nvcc names what is missing" sh -c 'make CUDA=1 all 2>&1 | grep -q "there is no nvcc"'
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
fi
for file in ckca.h ckca_cuda.cu Makefile examples tests; do
    [ -e $dir/$file ] || ln -s ../../$file $dir/$file
done
programs="all bench"
for source in tests/test_*.c; do programs="$programs build/tests/$(basename "$source" .c)"; done
# The programs' own code is plain C, tested elsewhere: -O0 is enough to compile and link it.
mkdir -p $dir/keep
# (90a alone: 90 would compile the same once more, for the PTX.)
NVCC_APPEND_FLAGS="-Xptxas=-v -Xcompiler=-O0 --keep --keep-dir=keep" make -C $dir CUDA=1 CUDA_ARCH=90a CFLAGS=-O0 ${CC:+CC="$CC"} $programs > $dir/log 2>&1
check "make CUDA=1: $(tail -n 20 $dir/log)" [ $? -eq 0 ]
check "warnings from nvcc: $(grep -i 'warning' $dir/log)" sh -c "! grep -qi warning $dir/log"
# Sums that a kernel indexes by what is not known when it is compiled are kept in memory instead of registers.
frame=$(sed -n 's/^ *\([0-9][0-9]*\) bytes stack frame.*/\1/p' $dir/log | sort -n | tail -n 1)
check "a kernel has ${frame:-an unknown number of} bytes in local memory ($dir/log names it)" [ "${frame:-65}" -le 64 ]
# The harness of kernels holds them all once more: that it compiles, to PTX, and links is enough here.
NVCC_APPEND_FLAGS="-Xcicc -O0 -Xcompiler -O0" make -C $dir CUDA=1 CFLAGS=-O0 ${CC:+CC="$CC"} bench-cuda \
    NVCC_FLAGS="-std=c++17 ${CXX:+-ccbin ${CXX%% *}} -gencode arch=compute_90a,code=compute_90a" > $dir/log_bench 2>&1
check "make CUDA=1 bench-cuda: $(tail -n 20 $dir/log_bench)" [ $? -eq 0 ]
check "warnings from nvcc: $(grep -i 'warning' $dir/log_bench)" sh -c "! grep -qi warning $dir/log_bench"
# Tensor cores cut what is not rounded before: every factor of a TF32 product comes out of a conversion. (nvcc 13 drops a
# loop that follows a discarded "else" without braces.)
factors=$(cat $dir/keep/*.ptx | awk '/\.entry/ { split("", rounded) }
    /cvt\.rna?\.tf32/ { sub(",", "", $2); rounded[$2] = 1 }
    /mma\.sync.*\.tf32\.tf32/ { split($0, group, /[{}]/); count = split(group[4] "," group[6], factor, ",")
        for (i = 1; i <= count; i++) if (rounded[factor[i]]) good++; else bad++ }
    END { print good + 0, bad + 0 }')
check "TF32 factors rounded, and not: $factors" [ "${factors% *}" -gt 0 -a "${factors#* }" -eq 0 ]
# Hopper's kernels: 8, each with the four products of a stage, and two places that ask TMA for its two halves. ptxas puts a
# wait behind each product if the code between them touches the sums, and says so.
hopper=$(cat $dir/keep/*.ptx | awk '/\.entry/ { name = /wgmma_kernel/ ? $NF : ""; if (name) kernels++ }
    name && /wgmma\.mma_async/ { products[name]++ }
    name && /cp\.async\.bulk\.tensor/ { copies[name]++ }
    END { for (k in products) if (products[k] == 4 && copies[k] == 4) good++; print kernels + 0, good + 0 }')
check "kernels with wgmma, and as they must be: $hopper" [ "$hopper" = "8 8" ]
check "wgmma one by one: $(grep -i serialized $dir/log)" sh -c "! grep -qi serialized $dir/log"
spilled=$(awk '/Compiling entry/ { name = $0 } /wgmma_kernel/ { next } name ~ /wgmma_kernel/ && /bytes spill/ && !/ 0 bytes spill stores/' \
    $dir/log)
check "spills around wgmma: $spilled" [ -z "$spilled" ]
for program in $dir/build/incremental $dir/build/train $dir/build/bench $dir/build/tests/test_ops; do
    check "$program does not exist" [ -x $program ]
done
for program in train update incremental; do
    check "$program takes no --precision" sh -c "$dir/build/$program --help | grep -q -- --precision"
done
# Whether there is a GPU is the CUDA runtime's to say: its files in /dev have other names in other places.
echo '#include <cuda_runtime.h>
int main(void) { int count = 0; return cudaGetDeviceCount(&count) != cudaSuccess || count == 0; }' > $dir/count.c
cuda=$(sed -n 's/.*-L\([^ ]*\)\/lib64 .*/\1/p' $dir/build/flags)
check "a program of the CUDA runtime builds" \
    ${CC:-cc} -I"$cuda/include" $dir/count.c -o $dir/count -L"$cuda/lib64" -Wl,-rpath,"$cuda/lib64" -lcudart
if [ -x $dir/count ] && ! $dir/count; then
    said=$(cd $dir && build/train --data nowhere 2>&1)
    check "without a GPU build/train says: $said" sh -c "[ $? -ne 0 ] && echo \"$said\" | grep -q CUDA"
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
