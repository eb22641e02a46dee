#!/usr/bin/env bash
# test_examples.sh: the examples as a user runs them: help, mistakes, tiny runs, kill -9 and resume. Binaries are in
# $BUILD (build).
set -u
build=$(cd "${BUILD:-build}" && pwd) || exit 1
tmp=$(mktemp -d "$build/examples.XXXXXX") || exit 1
trap 'rm -rf "$tmp"' EXIT
cd "$tmp" || exit 1
passed=0 failed=0

check() { # check WHAT COMMAND...: the command succeeds
    local what=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
        echo "ok $what"
    else
        failed=$((failed + 1))
        echo "FAIL $what: $*"
        sed 's/^/    stderr: /' err 2>/dev/null | head -3
    fi
}
refuses() { # refuses STATUS TEXT COMMAND...: it exits with STATUS and prints one line with TEXT on stderr
    local status=$1 text=$2
    shift 2
    "$@" >out 2>err
    local rc=$?
    check "exit status of '$*' is $rc" [ $rc -eq "$status" ]
    check "one line on stderr from '$*'" [ "$(wc -l <err)" -eq 1 ]
    check "'$*' says why" grep -qF -- "$text" err
}
works() { # works COMMAND...: it exits with 0 and prints nothing on stderr; its output goes to the file out
    "$@" >out 2>err
    local rc=$?
    check "exit status of '$*' is $rc" [ $rc -eq 0 ]
    check "'$*' is quiet on stderr" [ ! -s err ]
}
rows() { grep -v '^#' "$1/results.csv" 2>/dev/null | tail -n +2 | wc -l; }
results() { cut -d, -f1-12 "$1/results.csv"; } # without the column of seconds
kill_when() { # kill_when TEST COMMAND...: kill -9 as soon as the shell test is true; fails if the command ends first
    local test=$1 i
    shift
    "$@" >out 2>err &
    local pid=$!
    for ((i = 0; i < 3000; i++)); do
        if eval "$test"; then break; fi
        kill -0 $pid 2>/dev/null || break
        sleep 0.01
    done
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    [ $? -eq 137 ]
}
stops() { # stops SIGNAL STATUS TEST COMMAND...: the signal as soon as the test holds; that exit status, one line, and a state
    local signal=$1 status=$2 test=$3 i rc
    shift 3
    env --default-signal=INT "$@" >out 2>err & # or the shell has the program ignore SIGINT
    local pid=$!
    for ((i = 0; i < 100000; i++)); do # no sleep: the program may need but a moment
        if eval "$test"; then break; fi
        kill -0 $pid 2>/dev/null || break
    done
    kill -$signal $pid 2>/dev/null
    wait $pid 2>/dev/null
    rc=$?
    check "exit status of '$*' after SIG$signal is $rc" [ $rc -eq $status ]
    check "one line on stderr after SIG$signal" [ "$(wc -l <err)" -eq 1 ]
    check "it says where it goes on from" grep -q 'was stopped in epoch .* goes on$' err
}

# ---- help and mistakes -----------------------------------------------------------------------------------------------
for program in incremental train update classify; do
    works "$build/$program" --help
    check "$program --help prints a text" [ "$(wc -l <out)" -ge 1 ]
done
"$build/incremental" --help >out 2>err
for flag in --data --cifar10 --cifar100 --idx --arch --width --size --projection --chunks --chunk-size --stratified --methods \
    --epochs --batch --lr --weight-decay --seed --threads --out --resume --adakd --w-kd --temperature --featreg --w-feat \
    --shrink --perturb --augment --schedule --warmup --unlabelled --sweep --memory --ewc-lambda; do
    check "incremental --help knows $flag" grep -q -- "^  $flag " out
done
inc=$build/incremental
refuses 2 "unknown flag --foo" "$inc" --foo
refuses 2 "unknown flag --chunk" "$inc" --chunk 3
refuses 2 "--lr needs a value" "$inc" --lr
refuses 2 "--lr needs a value" "$inc" --lr --augment
refuses 2 "--lr abc: it is not a number" "$inc" --lr abc
refuses 2 "--lr 0.1x: it is not a number" "$inc" --lr 0.1x
refuses 2 "--lr nan: it is not a number" "$inc" --lr nan
refuses 2 "--lr -1: it must be between" "$inc" --lr -1
refuses 2 "--epochs 2.5: it must be a whole number" "$inc" --epochs 2.5
refuses 2 "--epochs 0: it must be between 1 and" "$inc" --epochs=0
refuses 2 "--seed -1" "$inc" --seed -1
refuses 2 "--augment takes no value" "$inc" --augment=1
refuses 2 "must be one of growth|constant|class" "$inc" --adakd clas
refuses 2 "--methods: \"warn\" is not one of" "$inc" --methods warm,warn
refuses 2 "warm is given twice" "$inc" --methods warm,warm
refuses 2 "only one of" "$inc" --data a --idx b
refuses 2 "--resume needs --out" "$inc" --resume
refuses 2 "unexpected argument \"word\"" "$inc" word
refuses 1 "nowhere" "$inc" --data nowhere
refuses 1 "nowhere" "$inc" --cifar10 nowhere
refuses 1 "resnet9" "$inc" --arch resnet9 --chunk-size 20
refuses 1 "file/x: Not a directory" "$inc" --chunk-size 20 --out "$(touch file && echo file)/x"
refuses 1 "nowhere/x: cannot be created: No such file" "$build/train" --save nowhere/x
mkdir folder
refuses 1 "folder: it is a folder" "$build/train" --save folder
refuses 1 "file/x: cannot be created: Not a directory" "$build/update" nowhere.safetensors b file/x
refuses 2 "unexpected argument \"--lr\"" "$build/train" -- --lr
refuses 1 "--nowhere: cannot be opened" "$build/update" -- --nowhere b c
refuses 1 "--nowhere: cannot be opened" "$build/classify" -- --nowhere b
check "looking whether files can be written leaves none" [ "$(ls | grep -c -v -e '^out$' -e '^err$' -e '^file$' -e '^folder$')" -eq 0 ]
refuses 2 "--resume needs --save" "$build/train" --resume
refuses 2 "usage: update" "$build/update" a b
refuses 1 "nowhere.safetensors" "$build/update" nowhere.safetensors b c
refuses 2 "usage: classify" "$build/classify" a
refuses 1 "nowhere.safetensors" "$build/classify" nowhere.safetensors a

# ---- incremental: all methods, files, resume -------------------------------------------------------------------------
tiny="--width 4 --size 8 --chunks 3 --chunk-size 60 --epochs 3 --batch 5"
all=scratch-chunk,scratch-all,warm,shrink-perturb,lwf,ckca
works "$inc" $tiny --methods $all --out whole --threads 1
check "a row per method and chunk" [ "$(rows whole)" -eq 18 ]
check "all methods share the first chunk" [ "$(grep -v '^#' whole/results.csv | grep ',1,60,' | cut -d, -f4- | sort -u | wc -l)" -eq 1 ]
check "no file left over" [ "$(ls whole | grep -c -e state -e tmp)" -eq 0 ]
check "the last checkpoint of every method" [ "$(ls whole/*-chunk03.safetensors | wc -l)" -eq 6 ]
check "no older checkpoint" [ ! -e whole/warm-chunk02.safetensors ]
check "svg begins" grep -q '^<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 [0-9]* [0-9]*"' whole/results.svg
check "svg ends" [ "$(tail -n 1 whole/results.svg)" = "</svg>" ]
for tag in g text; do
    check "svg: every <$tag> is closed" [ "$(grep -o "<$tag[ >]" whole/results.svg | wc -l)" -eq \
        "$(grep -o "</$tag>" whole/results.svg | wc -l)" ]
done
check "svg: a path for each of 6 lines" [ "$(grep -c 'stroke-dasharray' whole/results.svg)" -eq 6 ]
for method in ${all//,/ }; do check "svg names $method" grep -q ">$method [0-9.]*</text>" whole/results.svg; done
check "svg: no NaN and no infinity" [ "$(grep -c -i -e 'nan' -e '[^a-z]inf' whole/results.svg)" -eq 0 ]
"$inc" $tiny --methods $all --threads 2 >memory 2>err # without --out: the same table, no files
grep -A 20 '^Test accuracy' memory | grep -v '^Best' >a
works "$inc" $tiny --methods $all --out whole --resume
grep -A 20 '^Test accuracy' out | grep -v '^Best' >b
check "in memory and through files, with 1 thread and 2: the same table" cmp a b
refuses 2 "add --resume to continue that run" "$inc" $tiny --methods $all --out whole
refuses 2 "was started with --lr=0.05, this command has --lr=0.2" "$inc" $tiny --methods $all --out whole --resume --lr 0.2
refuses 2 "was started with --w-kd=, this command has --w-kd=0" "$inc" $tiny --methods $all --out whole --resume --w-kd 0
cp -r whole cut && head -c -30 whole/results.csv >cut/results.csv
refuses 1 "line 21: not a row" "$inc" $tiny --methods $all --out cut --resume
cp whole/results.csv cut/results.csv && echo "warm,9,60,0,0,0,0,0,0,0,0,0,0" >>cut/results.csv
refuses 1 "no such method and chunk" "$inc" $tiny --methods $all --out cut --resume

works "$inc" $tiny --chunks 2 --methods ckca,ckca-no-feat,ckca-no-growth --w-lwf 0.5 --out parts --unlabelled 30
check "AdaKD's weights: growing with the chunks, or lwf's" [ "$(grep ',2,60,' parts/results.csv | cut -d, -f12 | tr '\n' ' ' |
    sed 's/0\.23076923[0-9]*/0.3 of 1.3/g')" = "0.3 of 1.3 0.3 of 1.3 0.5 " ]
check "the feature term is on, off, on" [ "$(grep ',2,60,' parts/results.csv | awk -F, '{ printf "%d", ($10 > 0) }')" = 101 ]

killed="$inc $tiny --methods $all --out killed --resume --state-seconds 0.001"
check "killed in the first chunk" kill_when '[ -e killed/state.safetensors ]' $killed
check "killed in the second" kill_when '[ $(rows killed) -ge 8 ] && [ -e killed/state.safetensors ]' $killed
check "killed in the third" kill_when '[ $(rows killed) -ge 13 ] && [ -e killed/state.safetensors ]' $killed
check "killed before the end" [ "$(rows killed)" -lt 18 ]
works $killed
check "the same results after three kills" [ "$(results whole)" = "$(results killed)" ]
for file in whole/*.safetensors; do check "bitwise the same checkpoint" cmp $file killed/${file#whole/}; done

# methods with a memory: killed runs, too; and a sweep
kept="$inc $tiny --methods ewc,replay,ckca-replay --memory 20"
works $kept --out kept
check "a memory beside the last checkpoint of each" [ "$(ls kept/*-chunk03.memory.safetensors | wc -l)" -eq 3 ]
check "no older memory" [ "$(ls kept/*.memory.safetensors | wc -l)" -eq 3 ]
$kept >out 2>err
grep -A 20 '^Test accuracy' out | grep -v '^Best' >a
works $kept --out kept --resume
grep -A 20 '^Test accuracy' out | grep -v '^Best' >b
check "memories in memory and through files: the same table" cmp a b
killed="$kept --out keptkilled --resume --state-seconds 0.001"
check "killed with replay under way" kill_when '[ $(rows keptkilled) -ge 4 ] && [ -e keptkilled/state.safetensors ]' $killed
check "killed again" kill_when '[ $(rows keptkilled) -ge 6 ] && [ -e keptkilled/state.safetensors ]' $killed
check "killed before the end" [ "$(rows keptkilled)" -lt 9 ]
works $killed
check "the same results after two kills" [ "$(results kept)" = "$(results keptkilled)" ]
for file in kept/*.safetensors; do check "bitwise the same file" cmp $file keptkilled/${file#kept/}; done
refuses 1 "needs one per class, and there are 10" "$inc" $tiny --methods replay --memory 9
swept="$inc $tiny --chunks 2 --epochs 1 --methods lwf,ckca --sweep --out swept"
works $swept
check "a sweep has a row per setting and chunk" [ "$(rows swept)" -eq 10 ]
check "each setting has its column" [ "$(cut -d, -f1 swept/results.csv | grep -c -x -e 'lwf-w0.25' -e 'lwf-w0.5' -e 'lwf-w1' -e 'lwf-w2')" -eq 8 ]
best=$(awk -F, '/^lwf/ && $2 == 2 && $4 > most { most = $4; name = $1 } END { print name }' swept/results.csv)
check "then a table of the best of each" [ "$(grep -A 2 'of every sweep the setting that is best' out | tail -n 1 | tr -s ' ')" = "chunk $best ckca" ]
check "and a plot of them" [ "$(grep -c 'stroke-dasharray' swept/results.svg)" -eq 2 ]
works $swept --resume
diverges="$inc $tiny --chunks 2 --epochs 20 --lr 0.2 --methods ewc --sweep --out diverges"
check "a sweep goes on when a setting diverges" $diverges >out 2>err
check "and says that it did" grep -q 'ewc-lambda100, chunk 2: the loss is no longer finite.*its checkpoint stays as it was$' err
check "whose accuracy is that of its checkpoint" [ "$(grep -c "$(grep '^ewc-lambda100,1,' diverges/results.csv | cut -d, -f4-6)" diverges/results.csv)" -eq 6 ]
works $diverges --resume

# ---- train, classify, update -----------------------------------------------------------------------------------------
train="$build/train --width 4 --size 8 --count 400 --epochs 4 --batch 32"
works $train --save a.safetensors
check "a line per epoch and one for the test" [ "$(grep -c -e '^epoch ' -e '^test: ' out)" -eq 5 ]
check "train: no state left" [ ! -e a.safetensors.state ]
check "train is killed" kill_when '[ -e b.safetensors.state ]' $train --save b.safetensors --state-seconds 0.001
refuses 2 "add --resume to continue that run" $train --save b.safetensors
refuses 1 "b.safetensors.state" $train --save b.safetensors --resume --lr 0.05
works $train --save b.safetensors --resume
check "train: bitwise the same after a kill" cmp a.safetensors b.safetensors

stops TERM 143 '[ -e c.safetensors.state ]' $train --save c.safetensors --epochs 400 --state-seconds 0.001
check "train: a state, no checkpoint" [ -e c.safetensors.state -a ! -e c.safetensors ]
rm c.safetensors.state
works $train --save c.safetensors --epochs 1
cp c.safetensors before.safetensors
refuses 1 "finite" $train --save c.safetensors --epochs 4 --lr 1000
check "a checkpoint is not lost to a training that failed" cmp before.safetensors c.safetensors
rm -f c.safetensors* before.safetensors
# two with the same output: the second is refused, the first goes on
$train --save c.safetensors --epochs 4000 --state-seconds 0.001 >out1 2>err1 &
first=$!
for ((i = 0; i < 1000; i++)); do [ -e c.safetensors.state ] && break || sleep 0.01; done
refuses 1 "c.safetensors.state: another update is using it" $train --save c.safetensors --epochs 4000 --resume
check "the first goes on" kill -9 $first
wait $first 2>/dev/null
rm -f c.safetensors*
if [ -e /dev/full ]; then
    for command in "$inc --help" "$build/train --help" "$build/update --help" "$build/classify --help" \
        "$train --epochs 1" "$inc $tiny --chunks 1 --epochs 1 --methods warm"; do
        $command >/dev/full 2>err
        check "'$command' fails when its output cannot be written" [ $? -eq 1 ]
        check "and says so" grep -q "standard output cannot be written" err
    done
fi

# weights of others
works "$build/train" --size 8 --count 40 --epochs 1 --save wide.safetensors
for i in 0 1 2 3 4 5 6 7 8 9; do echo name$i; done >names
head -n 3 names >wide.names
works $train --epochs 1 --from a.safetensors --freeze backbone --save head.safetensors
check "train --from tells what it took" grep -q '^a.safetensors: [0-9]* tensors taken$' out
check "train --freeze leaves the backbone" [ "$(cmp a.safetensors head.safetensors >/dev/null; echo $?)" -eq 1 ]
works "$build/train" --size 8 --count 40 --epochs 1 --arch resnet20 --from wide.safetensors --freeze conv1,layer1 --backbone-lr 0.1
check "train --from tells what does not fit" grep -qE '^wide.safetensors: [0-9]+ tensors taken, [0-9]+ missing \([a-z0-9.]+ ...\)$' out
refuses 1 "none of its 44 tensors fits" $train --from wide.safetensors
refuses 1 "no layer's name begins with" $train --from a.safetensors --freeze layer9
refuses 1 "nowhere: cannot be opened" $train --from nowhere

mkdir -p new/disc new/square strange/dodo
base64 -d >new/disc/1.png <<<iVBORw0KGgoAAAANSUhEUgAAAAwAAAAKCAIAAAAPTiitAAAAOklEQVR42mPUsFnAQAiwIHP29XTA2U4lFXA2E1YVaFwmrCrQBJkYiABUV4TsF0wPMmH1MxqXkZjABAAVaREdOCsa7gAAAABJRU5ErkJggg==
base64 -d >new/square/1.png <<<iVBORw0KGgoAAAANSUhEUgAAAAwAAAAKCAIAAAAPTiitAAAAKUlEQVR42mPUsFnAQAgwMRABWOCsLVxz0OR8vqWQYNJgVMSC6RcyTQIAKXMFwonw+n0AAAAASUVORK5CYII=
cp new/disc/1.png strange/dodo
head -c 100 new/disc/1.png >cut.png
"$build/classify" a.safetensors new/disc/1.png >out 2>err
if grep -q CKCA_NO_STB_IMAGE err; then
    echo "SKIPPED classify and update: built without stb_image"
else
    works "$build/classify" a.safetensors new/disc/1.png new/square/1.png
    check "classify: two pictures, five classes each" [ "$(grep -c '%' out)" -eq 10 ]
    check "classify names the classes" grep -qE '^ +[0-9.]+%  (cross|crescent|disc|ell|ring|square|star|stripes|tee|triangle)$' out
    check "classify: five different classes" [ "$(sed -n '2,6p' out | awk '{print $2}' | sort -u | wc -l)" -eq 5 ]
    check "classify: most probable first" sort -c -n -r <(sed -n '2,6s/%.*//p' out)
    refuses 1 "cut.png" "$build/classify" a.safetensors cut.png new/disc/1.png
    check "classify goes on after a bad picture" [ "$(grep -c '%' out)" -eq 5 ]
    refuses 1 "1.png" "$build/classify" new/disc/1.png new/disc/1.png
    works "$build/classify" --arch resnet8 --classes names --size 8 wide.safetensors new/disc/1.png
    check "classify: weights by --arch (names in the file go before those of --classes)" [ "$(grep -c '%' out)" -eq 5 ]
    refuses 2 "go together" "$build/classify" --arch resnet8 wide.safetensors new/disc/1.png
    refuses 1 "nowhere: cannot be opened" "$build/classify" --arch resnet8 --classes nowhere wide.safetensors new/disc/1.png
    refuses 1 "fc.weight is" "$build/classify" --arch resnet8 --classes wide.names wide.safetensors new/disc/1.png

    update="$build/update --holdout 0 a.safetensors new"
    works $update c.safetensors --epochs 4000 --batch 1
    check "update --holdout 0 says that the result is untested" grep -qx 'untested: written to c.safetensors' out
    check "update reports its steps" grep -q 'update 2, 8000 steps' out
    check "update: no state left" [ ! -e c.safetensors.state ]
    check "update makes another checkpoint" [ "$(cmp a.safetensors c.safetensors >/dev/null; echo $?)" -eq 1 ]
    check "update is killed" kill_when '[ -e d.safetensors.state ]' $update d.safetensors --epochs 4000 --batch 1 --state-seconds 0.001
    check "the new checkpoint is not there yet" [ ! -e d.safetensors ]
    works $update d.safetensors --epochs 4000 --batch 1
    check "update: bitwise the same after a kill" cmp c.safetensors d.safetensors
    stops INT 130 '[ -e e.safetensors.state ]' $update e.safetensors --epochs 4000 --batch 1 --state-seconds 0.001
    check "the new checkpoint is not there yet" [ ! -e e.safetensors ]
    works $update e.safetensors --epochs 4000 --batch 1
    check "update: bitwise the same after SIGINT" cmp c.safetensors e.safetensors
    check "update: no state, lock or temporary file left" [ "$(ls | grep -c '^e\.safetensors\.')" -eq 0 ]
    rm e.safetensors
    kept="--holdout 0 --epochs 200 --batch 1 --memory kept.memory"
    works $update e.safetensors $kept --memory-size 10
    cp kept.memory first.memory
    refuses 1 "of a later checkpoint" $update g.safetensors $kept
    refuses 2 "keeps 10 pictures, --memory-size says 11" "$build/update" e.safetensors new g.safetensors $kept --memory-size 11
    refuses 2 "--memory-size needs --memory" $update g.safetensors --memory-size 10
    works "$build/update" e.safetensors new g.safetensors $kept
    check "update with a memory: its two pictures join the two new ones" grep -q 'update 3, 800 steps' out
    mv kept.memory second.memory && cp first.memory kept.memory
    check "update with a memory is killed" kill_when '[ -e h.safetensors.state ]' "$build/update" e.safetensors new h.safetensors \
        $kept --state-seconds 0.001
    check "its memory is the old one" cmp kept.memory first.memory
    works "$build/update" e.safetensors new h.safetensors $kept
    check "update with a memory: bitwise the same after a kill" cmp g.safetensors h.safetensors
    check "and so is the memory" cmp kept.memory second.memory
    rm -f [egh].safetensors *.memory
    refuses 1 "dodo" "$build/update" a.safetensors strange e.safetensors
    refuses 1 "empty" "$build/update" a.safetensors "$(mkdir empty && echo empty)" e.safetensors
    mkdir -p loose && cp -r strange/dodo loose/anything && cp new/square/1.png loose/anything/2.png
    works $update e.safetensors --epochs 50 --batch 2 --unlabelled loose --teacher-pictures 8
    check "update: a weight for 8 old pictures and 2 new ones" grep -q 'weight of the distillation 0.55;' out
    works $update f.safetensors --epochs 50 --batch 2 --teacher-pictures 8
    check "update: pictures without labels matter" [ "$(cmp e.safetensors f.safetensors >/dev/null; echo $?)" -eq 1 ]
    refuses 1 "missing" $update e.safetensors --unlabelled missing
    # Only a better checkpoint is written.
    labelled() { # labelled DIR PICTURE COUNT RANK: copies of new/PICTURE/1.png, labelled with its RANKth most probable class
        local class i
        class=$("$build/classify" a.safetensors new/$2/1.png | sed -n "$(($4 + 1))s/.*  //p")
        mkdir -p "$1/$class"
        for ((i = 0; i < $3; i++)); do cp new/$2/1.png "$1/$class/$2$i.png"; done
    }
    declines() { # declines VERDICT COMMAND...: exit status 3, quiet on stderr, no.safetensors not written
        local verdict=$1
        shift
        "$@" >out 2>err
        local rc=$?
        check "exit status of '$*' is $rc" [ $rc -eq 3 ]
        check "'$*' is quiet on stderr" [ ! -s err ]
        check "'$*' says $verdict" grep -qE "^$verdict.* on [0-9]+ held-out pictures, p = .*; no.safetensors not written" out
        check "'$*' leaves no file" [ "$(ls | grep -c '^no\.safetensors')" -eq 0 ]
    }
    labelled known disc 20 1
    labelled many disc 40 4
    labelled many square 9 2
    many="$build/update a.safetensors many --w-kd 0 --w-feat 0"
    works $many better.safetensors --confusion
    check "update: better" grep -qE '^better: 0\.0% -> [0-9.]+% on 10 held-out pictures, p = 0\.[0-9]+; written to better\.safetensors$' out
    check "update counts the new pictures by class" grep -qE '^ +40 +0\.0%  [a-z]+$' out
    check "update counts the classes" grep -qE '^ +49 +0\.0%  in all, of 2 of the 10 classes it knows$' out
    check "update warns of few pictures" grep -qE '^warning: fewer than ten pictures of [a-z]+: ' out
    check "update: the worst classes" grep -qE '^ +0\.0% -> +[0-9.]+%  [a-z]+$' out
    check "update --confusion" grep -qE '^  [a-z]+ +[0-9]+ right' out
    check "update is killed with a hold-out" kill_when '[ -e no.safetensors.state ]' $many no.safetensors --state-seconds 0.001
    works $many no.safetensors
    check "update with a hold-out: bitwise the same after a kill" cmp better.safetensors no.safetensors
    rm no.safetensors
    declines undecided $many no.safetensors --epochs 1 --lr 1e-9
    declines worse $many no.safetensors --test known
    "$build/update" a.safetensors new no.safetensors >out 2>err
    check "update: too few pictures have a status of their own" [ $? -eq 3 ]
    check "and a message" grep -q '^update: 2 new pictures are too few to hold out a fifth, 10 or more: ' err
    works "$build/update" a.safetensors many --dry-run
    check "update --dry-run measures" grep -qE '^ +49 +0\.0%  in all' out
    works $many no.safetensors --dry-run --test known --confusion
    check "update --dry-run --test measures too" grep -qx 'known: 100.0% of 20 pictures' out
    check "update --dry-run writes nothing" [ "$(ls | grep -c '^no\.safetensors')" -eq 0 ]
    refuses 2 "only one of --holdout and --test" $many no.safetensors --holdout 0.3 --test known
    refuses 1 "patience is 2, but 0 pictures are held out" $many no.safetensors --holdout 0 --patience 2
    "$build/update" --help >out 2>err
    check "update --help states the exit statuses" grep -q '^exit status: 0 written' out
    mkdir -p set && cp -r new set/train && cp -r new set/test
    works "$inc" --data set --size 8 --width 4 --chunks 1 --epochs 2 --methods warm,ckca --out fromfolder
    check "incremental on a folder" [ "$(rows fromfolder)" -eq 2 ]
    refuses 1 "need 27 pictures, there are 2" "$inc" --data set --size 8 --width 4 --chunks 3 --chunk-size 9
fi

works "$build/hello"
check "hello improves its network" awk '/ right, / { found = $1 + 0 < $3 + 0 } END { exit !found }' out
check "hello keeps the better network" [ -e net.safetensors -a ! -e new.safetensors ]
check "hello classifies a picture" grep -qE '^picture 0: [0-9.]+% across, [0-9.]+% down$' out

works "$build/custom_net" 1
check "custom_net reports its test accuracy" grep -q '^epoch  1  focal loss [0-9.]*  test accuracy [0-9.]*%' out

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
