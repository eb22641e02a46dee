#!/usr/bin/env python3
"""sass.py CUBIN [PATTERN]: what nvcc made of the kernels of ckca_cuda.cu, counted from the disassembly, as a table.

    nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -cubin ckca_cuda.cu -o ckca.cubin
    python3 tests/sass.py ckca.cubin 'gemm|channel_sums|batchnorm'

Of each kernel's main loop (the one with the most products; without any, the one with the most 16-byte loads): its
instructions, products (HGMMA, of a warpgroup; HMMA or FFMA, of a warp), loads from shared memory, copies to it (LDGSTS) and local memory (spills); the most
16-byte loads from memory that are under way before the first of their results is used. Needs cuobjdump, in PATH or named
by CUOBJDUMP."""
import os
import re
import subprocess
import sys

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


def kernels(cubin):
    text = subprocess.run([os.environ.get("CUOBJDUMP", "cuobjdump"), "-sass", cubin], check=True, capture_output=True,
                          text=True).stdout
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), [(int(m[1], 16), m[2]) for m in LINE.finditer(body)]


def resources(cubin):
    text = subprocess.run([os.environ.get("CUOBJDUMP", "cuobjdump"), "-res-usage", cubin], check=True,
                          capture_output=True, text=True)
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", text.stdout + text.stderr)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def registers(code):
    found = set()
    for number, wide in re.findall(r"\bR(\d+)(\.64)?", code):
        found.update(range(int(number), int(number) + (2 if wide else 1)))
    return found


def under_way(loop):
    """The most 16-byte loads issued before one's result is read."""
    most, pending = 0, []
    for _, code in loop:
        code = re.sub(r"^@!?U?P\d+\s+", "", code)
        load = re.match(r"LDG\S*\.128\S*\s+R(\d+)", code)
        read = registers(code.partition(",")[2])
        if any(read & p for p in pending):
            pending = []
        if load:
            pending.append(set(range(int(load[1]), int(load[1]) + 4)))
            most = max(most, len(pending))
    return most


def main_loop(code):
    best, best_score = code, (-1, -1, 0)
    for i, (address, text) in enumerate(code):
        m = re.search(r"BRA\S*\s+.*?0x([0-9a-f]+)", text)
        if not m or int(m[1], 16) >= address:
            continue
        loop = [c for c in code[: i + 1] if c[0] >= int(m[1], 16)]
        count = lambda pattern: sum(bool(re.search(pattern, c[1])) for c in loop)
        wgmma = count("HGMMA") # the shortest loop around it: a wait's retries branch back from far behind
        products, loads = (wgmma, 0) if wgmma else (count(r"\bHMMA|FFMA"), under_way(loop))
        score = (products if wgmma or any("HMMA" in c[1] or "LDGSTS" in c[1] for c in loop) else 0, loads, -len(loop))
        if score > best_score:
            best, best_score = loop, score
    return best


def short(name):
    m = re.search(r"ckca__blockILi(\d)ELi(\d)ELi(\d+)ELi(\d)", name) or \
        re.search(r"ckca__gemm_kernelILi(\d)ELi(\d)ELi(\d+)ELi(\d)", name)
    if m:
        return "gemm %s %s %s%s" % (("FLOAT32", "TF32", "BF16")[int(m[1])], ("FORWARD", "DATA", "WEIGHT")[int(m[2])],
                                    m[3], "" if m[4] == "1" else ", not whole")
    m = re.search(r"ckca__wgmma_blockILi(\d)ELi(\d)ELi(\d+)E", name)
    if m:
        return "gemm %s %s %s, wgmma" % (("FLOAT32", "TF32", "BF16")[int(m[1])], ("FORWARD", "DATA")[int(m[2])], m[3])
    m = re.match(r"_Z\d+ckca__(\w+?)I(\w*?)EE?v", name)
    return (m[1] + " " + m[2].replace("10ckca__bf16", "bf16 ").replace("Li", " ").replace("E", "")) if m else name


def main():
    cubin, pattern = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "."
    used = resources(cubin)
    print("| kernel | registers | stack | loop | products | instructions per product | LDS, LDSM | LDGSTS | local "
          "| loads under way |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, code in sorted(kernels(cubin), key=lambda k: short(k[0])):
        if not re.search(pattern, name):
            continue
        loop = main_loop(code)
        count = lambda p: sum(bool(re.search(p, c[1])) for c in loop)
        products = count(r"\bHGMMA") or count(r"\bHMMA") or count(r"\bFFMA")
        print("| %s | %d | %d | %d | %d | %s | %d | %d | %d | %d |" % (
            short(name), *used.get(name, (0, 0)), len(loop), products,
            "%.2f" % (len(loop) / products) if products else "", count(r"\bLDS"), count(r"LDGSTS"),
            count(r"\b(STL|LDL)"), under_way(loop)))


if __name__ == "__main__":
    main()
