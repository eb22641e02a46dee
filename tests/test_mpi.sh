#!/usr/bin/env bash
# build/train and build/incremental under mpirun (examples/mpi.h): 2 and 3 ranks repeat and resume bitwise, rank 0 alone
# writes and prints, a killed rank, a failing one and different ones end all. Without mpicc and mpirun it is skipped.
set -u
cd "$(dirname "$0")/.."
passed=0
failed=0
check() { # check STATUS TEXT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAIL: $2"; fi
}
if ! command -v mpicc > /dev/null || ! command -v mpirun > /dev/null; then
    echo "SKIPPED test_mpi.sh: no mpicc or mpirun (Debian: libopenmpi-dev, openmpi-bin)"
    echo "0 passed, 0 failed"
    exit 0
fi
# As root, on fewer processors than ranks, without ssh, in a container: all of that is allowed.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_plm_rsh_agent=sh
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_hwloc_base_binding_policy=none
mkdir -p build
work=build/mpi.$$
rm -rf $work
mkdir $work
trap 'rm -rf $work' EXIT
for program in train incremental; do
    OMPI_CC="${CC:-cc}" MPICH_CC="${CC:-cc}" mpicc -std=c99 -D_DEFAULT_SOURCE -Wall -Wextra -Wpedantic -Werror -O1 -DCKCA_NO_SIMD \
        -DCKCA_MPI -DCKCA_NO_STB_IMAGE -I. examples/$program.c -o $work/$program -lm -pthread
    check $? "mpicc builds $program"
done

# A data set in MNIST's format: 70 and 20 pictures of 16 x 16 bytes, of ten classes.
set_of() { # set_of NAME COUNT
    { printf '\0\0\10\3\0\0\0'"\\$(printf %o $2)"'\0\0\0\20\0\0\0\20' && tail -c +$((1 + 50000 * $3)) ckca.h | head -c $(($2 * 256)); } > "$1-images-idx3-ubyte"
    { printf '\0\0\10\1\0\0\0'"\\$(printf %o $2)" && for _ in $(seq $(($2 / 10))); do printf '\0\1\2\3\4\5\6\7\10\11'; done; } > "$1-labels-idx1-ubyte"
}
mkdir $work/data $work/other
set_of $work/data/train 70 0
set_of $work/data/t10k 20 1
set_of $work/other/train 70 2
set_of $work/other/t10k 20 1

small="--idx $work/data --arch resnet8 --width 4 --batch 32 --threads 1"
ranks() { # ranks N COMMAND...: ends after a minute at the latest; what it prints goes to $work/log
    local n=$1
    shift
    timeout -k 5 60 mpirun -n "$n" "$@" > $work/log 2>&1 < /dev/null
}

for n in 2 3; do
    for run in a b; do
        [ $n$run = 2b ] && continue # the kill below repeats a run of 2
        ranks $n $work/train $small --epochs 2 --save $work/$n$run.safetensors
        check $? "$n ranks train: $(tail -n 3 $work/log)"
        check $(($(grep -c '^test: accuracy' $work/log) != 1)) "$n ranks: one line with the result"
        check $(($(grep -c "^$n ranks; resnet8:" $work/log) != 1)) "$n ranks: the first line tells their number"
    done
done
cmp -s $work/3a.safetensors $work/3b.safetensors
check $? "3 ranks: a second run has the same bits"
$work/train $small --epochs 2 --save $work/1.safetensors > $work/log 2>&1
check $? "alone, without mpirun: $(tail -n 3 $work/log)"
check $(($(stat -c %s $work/1.safetensors) != $(stat -c %s $work/2a.safetensors))) "alone and 2 ranks: checkpoints of one size"

# Killed in the middle: mpirun ends the others; then resumed.
long="$work/train $small --epochs 60"
ranks 2 $long --save $work/whole.safetensors
check $? "a longer run: $(tail -n 3 $work/log)"
timeout 60 mpirun -n 2 $long --state-seconds 0.001 --save $work/killed.safetensors > $work/log 2>&1 < /dev/null &
job=$!
below() { # the processes below $1
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child $(cat /proc/"$child"/comm 2> /dev/null)"
        below "$child"
    done
}
for _ in $(seq 2000); do
    [ -e $work/killed.safetensors.state ] && break
    sleep 0.02
done
victim=$(below $job | awk '$2 == "train" { last = $1 } END { print last }')
kill -9 "$victim"
wait $job
status=$?
check $((status == 0 || status == 124)) "a rank is killed: mpirun ends with $status"
grep -qi 'signal 9\|KILLED' $work/log
check $? "a rank is killed: the message says so: $(tail -n 3 $work/log)"
[ -e $work/killed.safetensors.state ] && [ ! -e $work/killed.safetensors ]
check $? "a rank is killed: the state is there, the checkpoint is not"
ranks 2 $long --save $work/killed.safetensors --resume
check $? "resumed: $(tail -n 3 $work/log)"
cmp -s $work/whole.safetensors $work/killed.safetensors
check $? "resumed: the same bits as without the kill"
check $(($(ls $work | grep -c 'killed.*state') != 0)) "resumed: no state is left"

# A rank that differs, and one that fails by itself; a mistake on the command line is told once.
ranks 1 $work/train $small --epochs 2 : -n 1 $work/train $small --epochs 2 --idx $work/other
check $(($? == 0 || $? == 124)) "other pictures on rank 1 end the run"
check $(($(grep -c 'rank 1 of 2: ckca_update: its pictures or labels differ' $work/log) != 1)) "which is told once: $(tail -n 3 $work/log)"
ranks 1 $work/train $small --epochs 2 : -n 1 $work/train $small --epochs 2 --idx $work/nowhere
check $(($? == 0 || $? == 124)) "no pictures on rank 1 end the run"
grep -q 'nowhere' $work/log
check $? "which is told: $(tail -n 3 $work/log)"
ranks 3 $work/train --no-such-flag
check $(($? == 0 || $? == 124 || $(grep -c 'unknown flag' $work/log) != 1)) "an unknown flag is told once: $(head -n 3 $work/log)"

# The experiment, with files that rank 0 alone writes, and once more when it is complete.
chunks="$work/incremental $small --epochs 1 --chunks 2 --chunk-size 35 --methods warm,ckca --out $work/out"
ranks 3 $chunks
check $? "incremental: $(tail -n 3 $work/log)"
check $(($(grep -c '^Best at the end' $work/log) != 1 || $(grep -vc '^#' $work/out/results.csv) != 5)) "incremental: one table, four rows"
cp $work/out/results.csv $work/first.csv
ranks 2 $chunks --resume
check $? "incremental --resume: $(tail -n 3 $work/log)"
cmp -s $work/first.csv $work/out/results.csv
check $? "incremental --resume: the same rows"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
