#!/usr/bin/env python3
"""Ours against PyTorch on this machine: `make bench-peers` runs this.

    python3 tests/bench_peers.py BENCH        from the repository's root; BENCH is build/bench
    python3 tests/bench_peers.py BENCH cuda   BENCH of make CUDA=1, PyTorch on the same GPU: make CUDA=1 bench-peers

For every row of the table two programs run in turn, A B A B, each time as a fresh process: build/bench and
tests/torch_bench.py, or build/bench twice in two ways (threads, instruction set, company). What a run gave is appended
to results.csv at once; the table is made of all that file holds of this very BENCH and PyTorch, so rows may be run in
parts, and a run that was killed loses nothing. Set by environment variables, or after `make bench-peers`:

    PEERS=DIR      where PyTorch is installed and results.csv lies (build/peers). Without `import torch` working there,
                   a virtual environment is made and pip installs torch, torchvision and numpy. pip's own settings
                   hold: on Linux its default index gives the CUDA build (several GB; it runs on the processor just
                   as well), PIP_INDEX_URL can name one with the CPU build
    PYTHON=FILE    a Python that has torch, torchvision and numpy already: nothing is installed
    ROWS="W ..."   only the rows that have all these words: ROWS=resnet20, ROWS="train 1"; ROWS=help lists them
    ROUNDS=3       how often A B; 0 only prints the table
    STEPS=N        timed steps in a run; otherwise about ten seconds' worth, 5 to 50
    SETTINGS="W ..."  of PyTorch: tuned, tcmalloc, channels-last, default (see torch_bench.py). All named are run in
                   each round, have a column each, and the fastest counts. Default: tuned, and tcmalloc if it is here

The ratio is of adjacent runs: median [min, max]. Floors are the step's nominal flops over the rate of multiply-adds,
and the bytes it cannot do without over the memory's rate (bench.c, cost), both rates measured here and now with the
same number of threads. On a GPU they are those of PyTorch's matrix products in the same precision and of its copies;
steps are shown waited for (ms: the bars' ratio) and queued without waiting (unsynced), memory is the GPU's, and clocks
are what nvidia-smi said in the last two seconds of the runs. summary.txt, in PEERS, holds every bar, met or not or not
measured.
Leave the machine alone meanwhile: whatever else runs is in the figures.
"""
import csv, ctypes.util, hashlib, os, shutil, statistics, subprocess, sys, threading, time
from collections import defaultdict

HERE = os.path.dirname(os.path.abspath(__file__))
BUSY = [sys.executable, "-c", "import os; p = os.getppid()\nwhile os.getppid() == p:\n    for _ in range(10**6): pass"]
FIELDS = ("when build torch row round side setting median_ms min_ms max_ms images_per_s peak_rss_mb gflop mbyte "
          "threads fma_gflops triad_gbps unsynced_ms device_mb sm_mhz mem_mhz").split()

# What is raced: name, batch, size, PyTorch's milliseconds for a training step with 2 threads as the issue measured them
# (only to estimate how long things take), and its peak memory there in MB.
NETS = [("resnet20", 128, 32, 191, 467), ("resnet18-cifar", 64, 32, 1173, 717), ("resnet18", 32, 224, 1987, 1110),
        ("resnet50", 16, 224, 2617, 1909)]
TRAIN_BARS, INFER_BARS = (1.4, 1.7, 1.5, 1.3), (1.4, 1.4, 1.4, 1.2)


class Row:
    """A race. at_least: the bar for B's time over A's; at_most: a bar from above; memory: MB that A may take."""

    def __init__(self, name, mode, nets, batch, size, threads, ms, other="PyTorch", at_least=None, at_most=None,
                 memory=None, precision=None, setting=None, **ours_b):
        self.name, self.mode, self.nets, self.batch, self.size, self.threads = name, mode, nets, batch, size, threads
        self.ms, self.other, self.at_least, self.at_most, self.memory = ms, other, at_least, at_most, memory
        self.precision, self.setting = precision, setting  # on a GPU: of both, and PyTorch's way there
        self.rate = precision or str(threads)  # which peak rates are this row's
        self.isa = ours_b.get("isa", ("", ""))  # of A and B, where B is ours too
        self.nets_b = ours_b.get("nets_b", nets)  # B's distill, where A trains without a teacher
        self.threads_b = ours_b.get("threads_b", threads)
        self.busy = ours_b.get("busy", False)
        self.steps = int(os.environ.get("STEPS") or max(5, min(50, 10000 / ms)))

    def command(self, side):
        nets = self.nets_b if side == "B" else self.nets
        words = ["distill" if len(nets) > 1 else self.mode, *nets, self.batch, self.size,
                 self.threads_b if side == "B" else self.threads, self.steps, self.precision or self.isa[side == "B"]]
        return [str(w) for w in words if w != ""]

    def estimate(self, settings):
        runs = 1 + (settings if self.other == "PyTorch" else self.threads / self.threads_b)
        return runs * (4 + (self.steps + 3) * self.ms / 1000)


def rows():
    out = []
    for threads in (2, 1):
        for (net, batch, size, ms, mb), bar in zip(NETS, TRAIN_BARS):
            out.append(Row(f"train {net} {threads}", "train", [net], batch, size, threads, ms * 2 / threads,
                           at_least=bar if threads == 2 else 1.3, memory=0.6 * mb))
    for (net, batch, size, ms, _), bar in zip(NETS, INFER_BARS):
        out.append(Row(f"infer {net} 2", "infer", [net], batch, size, 2, ms / 3, at_least=bar))
    for teacher, bar, ms, mb in (("resnet20", 1.5, 255, None), ("resnet56", 1.4, 391, 0.6 * 540)):
        out.append(Row(f"distill resnet20+{teacher} 2", "distill", ["resnet20", teacher], 128, 32, 2, ms, at_least=bar,
                       memory=mb))
    for net, batch, size, ms, _ in NETS:
        out.append(Row(f"scaling {net}", "train", [net], batch, size, 2, ms, "1 thread", at_least=1.85, threads_b=1))
    for net, batch, size, ms, _ in NETS:
        out.append(Row(f"isa {net}", "train", [net], batch, size, 2, ms, "AVX-512 (A is AVX2)", at_least=0.8,
                       isa=("avx2", "avx512")))
    out.append(Row("busy resnet20", "train", ["resnet20"], 128, 32, 2, 400, "beside a busy process", at_most=2.5,
                   busy=True))
    return out


def gpu_rows():
    out = []
    threads = min(4, os.cpu_count())
    for precision in ("float32", "tf32", "bf16"):
        for setting, bar in (("eager", 3), ("graph", 1.2)):
            out.append(Row(f"train resnet20 {precision} {setting}", "train", ["resnet20"], 128, 32, threads, 20,
                           at_least=bar, precision=precision, setting=setting))
    for net, batch, size, bars, ms in (("resnet18-cifar", 512, 32, (None, 1.0), 200),
                                       ("resnet18", 256, 224, (1.0, 1.0), 200), ("resnet50", 128, 224, (1.0, 1.0), 300)):
        for precision, bar in zip(("tf32", "bf16"), bars):
            out.append(Row(f"train {net} {precision} eager", "train", [net], batch, size, threads, ms, at_least=bar,
                           precision=precision, setting="eager"))
    for precision in ("float32", "tf32", "bf16"):
        out.append(Row(f"teacher resnet20 {precision}", "train", ["resnet20"], 128, 32, threads, 20,
                       "with a resnet20 teacher", at_most=1.4, precision=precision, nets_b=["resnet20", "resnet20"]))
    return out


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def works(python):
    code = "import torch, torchvision, numpy; print(torch.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def install(peers):
    """The Python that has PyTorch, and PyTorch's version."""
    given = os.environ.get("PYTHON")
    python = given or os.path.join(peers, "venv", "bin", "python")
    version = works(python)
    if given and not version:
        sys.exit(f"bench-peers: {given} cannot import torch, torchvision and numpy")
    if version:
        return python, version
    say(f"bench-peers: installing PyTorch into {peers}/venv: a virtual environment, then pip install torch torchvision "
        "numpy. A few minutes; several GB where the index holds the CUDA build.")
    start = time.time()
    for command in ([sys.executable, "-m", "venv", os.path.join(peers, "venv")],
                    [python, "-m", "pip", "install", "--quiet", "torch", "torchvision", "numpy"]):
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(f"bench-peers: failed: {' '.join(command)} (Debian: python3-venv must be there)")
    version = works(python) or sys.exit(f"bench-peers: installed, but {python} cannot import torch")
    say(f"bench-peers: PyTorch {version} installed in {time.time() - start:.0f} s")
    return python, version


class Clocks:
    """What nvidia-smi says of the GPU's clocks while the body of a with runs."""

    def __init__(self, gpu):
        self.command = shutil.which("nvidia-smi") if gpu else None
        self.seen, self.ended = [], threading.Event()

    def watch(self):
        query = [self.command, "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        query += ["--id=" + visible] if visible else []
        while not self.ended.wait(0.25):
            try:
                said = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
                self.seen.append((time.time(), *(int(v) for v in said[0].split(","))))
            except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
                return  # it does not tell

    def __enter__(self):
        if self.command:
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        if self.command:
            self.thread.join()

    def figures(self):
        """Medians over the last two seconds; nothing where nothing was said."""
        late = [s for s in self.seen if s[0] > time.time() - 2.5] or self.seen[-1:]
        return {k: round(statistics.median(s[i] for s in late)) for i, k in ((1, "sm_mhz"), (2, "mem_mhz")) if late}


def figures(command, gpu=False):
    """Runs it and reads its line of name=value. None if it says that it cannot."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    with Clocks(gpu) as clocks:
        done = subprocess.run(command, capture_output=True, text=True, env=clean)
    if done.returncode:
        say(f"bench-peers: {' '.join(command)} failed ({done.returncode}): {done.stderr.strip()[-300:]}")
        return None
    return {**dict(word.split("=", 1) for word in done.stdout.split()), **clocks.figures()}


def race(row, bench, python, settings, rounds, append):
    torch = row.other == "PyTorch"
    for _ in range(rounds):
        mark = f"{time.time():.0f}"
        ways = [row.setting] if row.setting else settings
        for side, setting in [("A", "")] + [("B", s) for s in (ways if torch else [""])]:
            peer = torch and side == "B"
            command = [python, os.path.join(HERE, "torch_bench.py")] if peer else [bench]
            busy, processors = None, os.sched_getaffinity(0)
            if row.busy:  # it must meet the two threads whatever the number of processors
                os.sched_setaffinity(0, sorted(processors)[:2])
                busy = subprocess.Popen(BUSY) if side == "B" else None
            try:
                found = figures(command + row.command(side) + ([setting] if peer else []), bool(row.precision))
            finally:
                os.sched_setaffinity(0, processors)
                if busy:
                    busy.kill()
                    busy.wait()
            if not found:
                return
            append(row=row.name, round=mark, side=side, setting=setting, **found)


def spread(values, digits):
    """The median; where it is of several values, the least and the greatest too."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle + (f" [{min(values):.{digits}f}, {max(values):.{digits}f}]" if len(values) > 1 else "")


def show(lines):
    """A table, as Markdown reads it; the first line is its head."""
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in width])
    for line in lines:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |")
    print()


def judge(value, at_least, at_most):
    """A bar, and whether it is met."""
    if at_least:
        return f">= {at_least:g}", "yes" if value >= at_least else "NO"
    return (f"<= {at_most:g}", "yes" if value <= at_most else "NO") if at_most else ("", "")


def median_of(records, key):
    """None where there is none."""
    values = [float(r[key]) for r in records if r.get(key)]
    return statistics.median(values) if values else None


def gpu_line(name, a, b):
    """What is known of a GPU's runs beside the step that is waited for."""
    ms = [median_of(side, "unsynced_ms") for side in (a, b)]
    ratio = f"{ms[1] / ms[0]:.2f}" if all(ms) else ""
    memory, clock, memory_clock = ([median_of(side, key) for side in (a, b)]
                                   for key in ("device_mb", "sm_mhz", "mem_mhz"))
    both = [" / ".join("?" if v is None else f"{v:.0f}" for v in pair) for pair in (memory, clock, memory_clock)]
    return [name, *("" if v is None else f"{v:.3f}" for v in ms), ratio, *both]


def table(all_rows, records, settings, torch, machine, summary):
    peak = {}  # by threads or precision; the best seen, since other work on the machine can only lower it
    for r in records:
        if r["row"] == "peak":
            seen = peak.setdefault(r["threads"], {"fma_gflops": 0.0, "triad_gbps": 0.0})
            peak[r["threads"]] = {k: max(v, float(r[k])) for k, v in seen.items()}
    times = [["row", "batch, size", "precision" if machine else "threads", "A, ms", "B", "B, ms", "B / A", "bar", "met"]]
    if len(settings) > 1:
        times[0] += [f"PyTorch {s}, ms" for s in settings]
    floors = [["row", "A, ms", "flops' floor, ms", "bytes' floor, ms", "A reaches", "A's peak MB", "bar", "met",
               "B's peak MB"]]
    gpu = [["row", "A unsynced, ms", "B unsynced, ms", "B / A", "GPU MB A / B", "SM MHz A / B", "memory MHz A / B"]]
    verdicts = []
    for row in all_rows:
        mine = [r for r in records if r["row"] == row.name]
        by_setting = defaultdict(list)
        for r in mine:
            if r["side"] == "B" and (row.other != "PyTorch" or row.setting or r["setting"] in settings):
                by_setting[r["setting"]].append(r)
        bar = judge(0, row.at_least, row.at_most)[0]
        if not by_setting:
            verdicts += [f"not measured  {row.name}: {bar}"] * bool(bar)
            continue
        # PyTorch's fastest setting is the one that counts.
        setting = min(by_setting, key=lambda s: statistics.median(float(r["median_ms"]) for r in by_setting[s]))
        b = {r["round"]: r for r in by_setting[setting]}
        a = {r["round"]: r for r in mine if r["side"] == "A" and r["round"] in b}
        ours, other = ([float(r["median_ms"]) for r in side.values()] for side in (a, b))
        ratios = [float(b[k]["median_ms"]) / float(a[k]["median_ms"]) for k in a]
        times.append([row.name, f"{row.batch}, {row.size}", row.rate, spread(ours, 1),
                      f"{row.other} {setting}".strip(), spread(other, 1), spread(ratios, 2),
                      *judge(statistics.median(ratios), row.at_least, row.at_most)])
        met = times[-1][-1]
        verdicts += [f"{'met' if met == 'yes' else 'NOT MET':12}  {row.name}: {statistics.median(ratios):.2f}, "
                     f"bar {bar}"] * bool(bar)
        if row.precision:
            gpu.append(gpu_line(row.name, list(a.values()), list(b.values())))
        if len(settings) > 1:
            times[-1] += [spread([float(r["median_ms"]) for r in by_setting[s]], 1) if s in by_setting else ""
                          for s in settings]
        one, rate = next(iter(a.values())), peak.get(row.rate)
        if row.other == "PyTorch" and rate:
            middle = statistics.median(ours)
            flops, moved = (float(one[k]) / rate[r] for k, r in (("gflop", "fma_gflops"), ("mbyte", "triad_gbps")))
            size = "device_mb" if row.precision else "peak_rss_mb"
            memory = [max(float(r[size] or "nan") for r in side.values()) for side in (a, b)]
            floors.append([row.name, f"{middle:.1f}", f"{1000 * flops:.1f}", f"{moved:.1f}",
                           f"{100000 * flops / middle:.0f}%", f"{memory[0]:.0f}", *judge(memory[0], None, row.memory),
                           f"{memory[1]:.0f}"])
    if not machine:
        model = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        machine = f"{model[0] if model else 'processor unnamed'}, {os.cpu_count()} processors"
    print(f"\n{machine}; PyTorch {torch}. Medians of runs in turn [least, greatest]; A is ours.\n")
    show(times)
    for rate, r in sorted(peak.items()):
        print(f"{rate}{' thread' + 's' * (rate != '1') if rate.isdigit() else ''}: {r['fma_gflops']} GFLOP/s of "
              f"multiply-adds, {r['triad_gbps']} GB/s of {'triad' if rate.isdigit() else 'copying'}")
    print("Floors are of direct convolution; what A reaches is of the flops' floor, which Winograd may pass.\n")
    show(floors)
    if machine:
        if not any(r.get("sm_mhz") for r in records):
            print("Clocks are unknown: there is no nvidia-smi here, or it does not tell.\n")
        show(gpu)
    with open(summary, "w") as f:
        f.write(f"{machine}; PyTorch {torch}; ratios B / A (A is ours) of steps that are waited for\n")
        f.write("".join(line + "\n" for line in verdicts))


def main():
    gpu = sys.argv[2:] == ["cuda"]
    if len(sys.argv) != 2 + gpu:
        sys.exit(__doc__)
    bench = os.path.abspath(sys.argv[1])
    all_rows = gpu_rows() if gpu else rows()
    words = os.environ.get("ROWS", "").split()
    chosen = [r for r in all_rows if all(w in r.name.replace("+", " ").split() for w in words)]
    if not chosen:
        sys.exit("bench-peers: ROWS names none of: " + "; ".join(r.name for r in all_rows))
    rounds = int(os.environ.get("ROUNDS") or 3)
    peers = os.environ.get("PEERS") or "build/peers"
    os.makedirs(peers, exist_ok=True)
    python, torch = install(peers)
    machine = None
    if gpu:
        name = subprocess.run([python, "-c", "import torch; print(torch.cuda.get_device_name())"], capture_output=True,
                              text=True)
        machine = name.stdout.strip() or sys.exit(f"bench-peers: PyTorch {torch} in {python} finds no GPU")
    settings = os.environ.get("SETTINGS", "").split() or ["tuned"] + (
        ["tcmalloc"] if ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc") else [])
    build = hashlib.sha256(open(bench, "rb").read()).hexdigest()[:12]
    path = os.path.join(peers, "results.csv")
    if os.path.exists(path):
        with open(path, newline="") as f:
            if next(csv.reader(f), None) != list(FIELDS):  # of a bench_peers.py before this one
                os.replace(path, path + f".{time.time():.0f}")
    if not os.path.exists(path):
        with open(path, "w", newline="") as f:
            csv.writer(f).writerow(FIELDS)

    def append(**values):
        with open(path, "a", newline="") as f:
            csv.DictWriter(f, FIELDS, extrasaction="ignore").writerow(
                dict(values, when=time.strftime("%Y-%m-%d %H:%M:%S"), build=build, torch=torch))

    if rounds:
        if os.getloadavg()[0] > 0.5:
            say(f"bench-peers: the load here is {os.getloadavg()[0]:.1f} already: the figures will carry it")
        for way in sorted({r.precision for r in all_rows} if gpu else {1, 2, os.cpu_count()}):
            peer = [python, os.path.join(HERE, "torch_bench.py")]
            append(row="peak", **(figures((peer if gpu else [bench]) + ["peak", str(way)], gpu) or sys.exit(1)))
    left = rounds * sum(r.estimate(len(settings)) for r in chosen)
    for i, row in enumerate(chosen if rounds else []):
        say(f"bench-peers: {row.name} ({i + 1} of {len(chosen)}), {rounds} rounds; all that is left takes about "
            f"{left / 60:.0f} minutes")
        race(row, bench, python, settings, rounds, append)
        left -= rounds * row.estimate(len(settings))
    with open(path, newline="") as f:
        records = [r for r in csv.DictReader(f) if r["build"] == build and r["torch"] == torch]
    table(all_rows, records, settings, torch, machine, os.path.join(peers, "summary.txt"))


if __name__ == "__main__":
    main()
