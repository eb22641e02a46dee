#!/usr/bin/env python3
"""tf32_split.py: would products in three TF32 parts (3xTF32) be as exact as FFMA? Needs numpy; no GPU.

Each factor is x = big + small, both rounded to TF32; x y becomes big big + big small + small big, added to float32 sums
eight values of k at a time, rounded to nearest, or towards zero as tensor cores were measured to do (Ootomo and Yokota
2022; PTX leaves it open). Prints the greatest (and the mean) error of a sum, in 2^-24 of the sum of |x y|."""
import numpy as np

N, rng = 2000, np.random.default_rng(1)


def tf32(x):
    u = x.view(np.uint32).astype(np.uint64)
    rounded = (u + 0xfff + (u >> 13 & 1)) & 0xffffe000
    return np.where((u & 0x7f800000) != 0x7f800000, rounded, u).astype(np.uint32).view(np.float32)


def to_float(v, to_zero):
    f = v.astype(np.float32)
    return np.where(np.abs(f.astype(np.float64)) > np.abs(v), np.nextafter(f, np.float32(0)), f) if to_zero else f


def ffma(x, y):
    s = np.zeros(len(x), np.float32)
    for k in range(x.shape[1]):
        s = (s + x[:, k].astype(np.float64) * y[:, k]).astype(np.float32)
    return s


def split(x, y, to_zero):
    big_x, big_y = tf32(x), tf32(y)
    small_x, small_y = tf32(x - big_x), tf32(y - big_y)
    s = np.zeros(len(x), np.float32)
    for k in range(0, x.shape[1], 8):
        for a, b in ((small_x, big_y), (big_x, small_y), (big_x, big_y)):
            s = to_float(s + (a[:, k:k + 8].astype(np.float64) * b[:, k:k + 8]).sum(1), to_zero)
    return s


def report(name, x, y):
    x, y = x.astype(np.float32), y.astype(np.float32)
    exact, size = (x.astype(np.longdouble) * y).sum(1), np.abs(x.astype(np.longdouble) * y).sum(1)
    errors = [np.abs(s - exact) / size * 2**24 for s in (ffma(x, y), split(x, y, False), split(x, y, True))]
    print("|", name, *("| %.2g (%.2g)" % (e.max(), e.mean()) for e in errors), "|")


def uniform(*shape):
    return rng.uniform(-1, 1, shape)


np.seterr(all="ignore")
print("| factors | FFMA | 3xTF32, to nearest | 3xTF32, towards zero |\n| --- | --- | --- | --- |")
for k in (1, 8, 64, 576, 4608):
    report("in -1..1, %d terms" % k, uniform(N, k), uniform(N, k))
report("in 0..1, 576 terms", abs(uniform(N, 576)), abs(uniform(N, 576)))
x, y = uniform(N, 288).astype(np.float32), uniform(N, 288).astype(np.float32)
report("pairs x y, -x y (1 + 2^-20), 576 terms", np.hstack([x, -x])[:, np.arange(576).reshape(2, 288).T.ravel()],
       np.hstack([y, y * np.float32(1 + 2.0**-20)])[:, np.arange(576).reshape(2, 288).T.ravel()])
report("times 2^-20 to 2^20, 576 terms", *(uniform(N, 576) * 2.0**rng.integers(-20, 21, (N, 576)) for _ in "xy"))
report("x times 2^-120, 64 terms", uniform(N, 64) * 2.0**-120, uniform(N, 64))
report("x denormal (2^-130), y times 2^20, 64 terms", uniform(N, 64) * 2.0**-130, uniform(N, 64) * 2.0**20)
for name, value in (("infinity", np.inf), ("the greatest float", np.finfo(np.float32).max)):
    x, y = np.array([[value]], np.float32), np.ones((1, 1), np.float32)
    print("| %s times 1 | %g | %g | %g |" % (name, ffma(x, y)[0], split(x, y, False)[0], split(x, y, True)[0]))
