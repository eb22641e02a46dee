#!/bin/sh
# test_gpu.sh: tests/gpu.sh tried without a GPU: every step through the shim, and in places that lack something. From
# the repository's root, after make has built build/shim/{bench_cuda,bench,incremental}. (On a machine with a GPU too.)
dir=build/gpu_test
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
says() { printf '%s\n' "$said" | grep -q -- "$1"; }
rm -rf $dir
mkdir -p $dir

said=$(sh tests/gpu.sh 2>&1)
check "without arguments it says how" says 'gpu.sh sanitize   make CUDA=1 sanitize'
said=$(sh tests/gpu.sh all 2>&1; echo "status $?")
check "a step that does not exist: $said" says 'status 2'

if [ -x build/shim/bench_cuda ] && [ -x build/shim/bench ] && [ -x build/shim/incremental ] &&
    command -v python3 > /dev/null; then
    said=$(DRY=1 OUT=$dir/out sh tests/gpu.sh test sanitize kernels wgmma peers real 2>&1; echo "status $?")
    check "the dry run: $said" says '^status 0$'
    for step in test sanitize kernels wgmma peers real; do
        check "$step has no log that says status 0" grep -q "^== $step: status 0" $dir/out/$step.log
    done
    check "kernels are not checked" grep -q '^[1-9][0-9]* passed, 0 failed$' $dir/out/kernels.log
    check "wgmma is not left out" grep -q ', without wgmma' $dir/out/wgmma.log
    check "no bar is met" grep -q '^met *train resnet20 float32 eager: 3.50, bar >= 3$' $dir/out/summary.txt
    check "a bar is not judged" grep -q '^met *teacher resnet20 bf16: 1.00, bar <= 1.4$' $dir/out/summary.txt
    check "clocks are not said" grep -q 'Clocks are unknown\|[0-9] / [0-9]* *|$' $dir/out/peers.log
    check "a device's memory is not in the table" grep -q '| 300 / 300 *|' $dir/out/peers.log
    check "real: no table of results" grep -q 'ckca' $dir/out/real.log
    # A step that fails, and one that takes too long, are told.
    said=$(DRY=1 OUT=$dir/out LIMIT=1 sh tests/gpu.sh real peers 2>&1; echo "status $?")
    check "after the limit: $said" says 'real was stopped after 1 s'
    check "the status after the limit: $said" says '^status 1$'
    check "the next step still runs: $said" says '^== peers'
else
    echo "SKIPPED the dry run of tests/gpu.sh: there must be build/shim/{bench_cuda,bench,incremental} and python3"
fi

# No nvcc; nvcc, but no GPU; a folder that cannot be written to.
mkdir -p $dir/bin
for tool in sh sed grep cat mkdir rm tail head tr date dirname basename ls tee timeout env; do
    ln -sf "$(command -v $tool)" $dir/bin/$tool
done
if [ ! -e /usr/local/cuda/bin/nvcc ]; then
    said=$(PATH=$PWD/$dir/bin OUT=$dir/none sh tests/gpu.sh build test 2>&1; echo "status $?")
    check "without nvcc: $said" says '^SKIPPED build: there is no nvcc'
    check "without nvcc: $said" says '^status 0$'
fi
printf '#!/bin/sh\necho "#!/bin/sh\necho no driver; exit 1" > build/gpu/gpu; chmod +x build/gpu/gpu\n' > $dir/bin/nvcc
chmod +x $dir/bin/nvcc
said=$(NVCC=$dir/bin/nvcc OUT=$dir/none sh tests/gpu.sh kernels real 2>&1; echo "status $?")
check "without a GPU: $said" says '^SKIPPED kernels: no GPU here (no driver)'
said=$(NVCC=/bin/false OUT=/dev/null/logs sh tests/gpu.sh kernels 2>&1; echo "status $?")
check "OUT that is no folder: $said" says 'nothing can be written to /dev/null/logs: logs go to build/gpu'
check "an nvcc that fails: $said" says '^SKIPPED kernels: no GPU here'
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
