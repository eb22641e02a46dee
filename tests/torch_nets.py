#!/usr/bin/env python3
"""Writes tests/reference/nets.safetensors: results of whole networks in PyTorch, for tests/test_nets.c.

    python3 tests/torch_nets.py [--search N] [OUT]

The file is small: weights, momentum, pictures and labels are a formula of (name, index) that both sides evaluate (draw
below); of each result it keeps the norm and a few values at agreed places. Everything is computed in float64; the script
also prints the error of PyTorch's float32.

Where the input of a ReLU or max pool lies at its kink, rounding decides the gradient. The seeds in NETS avoid that: --search N
tries N seeds for each network and prints the one whose nearest kink is farthest away.
"""
import argparse, math, os, sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from torch_train import CifarResNet

# name: architecture, projection, width of the first stage (CIFAR nets), classes, batch, height, width, values kept of each
# gradient and of each other tensor, seed
NETS = {
    "resnet20-a": ("resnet20", 0, 4, 10, 4, 12, 10, 1 << 30, 16, 15),
    "resnet20-b": ("resnet20", 1, 6, 10, 3, 16, 16, 64, 16, 10),
    "resnet18-cifar": ("resnet18-cifar", 1, 64, 10, 4, 16, 16, 16, 8, 3),
    "resnet18": ("resnet18", 1, 64, 37, 4, 48, 64, 16, 8, 3),
    "resnet50": ("resnet50", 1, 64, 1000, 3, 33, 33, 16, 8, 23),
}
LR, MOMENTUM, DECAY, FEATURES = 0.1, 0.9, 5e-4, 0.5


class Subsample(nn.Module):
    """The parameterless shortcut, option A of He et al. 2016: every stride-th pixel, zero channels in front and behind."""

    def __init__(self, stride, inp, out):
        super().__init__()
        self.stride, self.pad = stride, ((out - inp) // 2, out - inp - (out - inp) // 2)

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0) + self.pad)


def build(arch, classes, projection=0, width=16):
    """The same network as ckca_resnet(arch)."""
    name, _, stem = arch.partition("-")
    depth = int(name[len("resnet"):])
    if depth not in (18, 34, 50):
        net = CifarResNet(depth, width, classes)
        for block in net.modules():
            if not projection and getattr(block, "downsample", None) is not None:
                conv = block.downsample[0]
                block.downsample = Subsample(conv.stride[0], conv.in_channels, conv.out_channels)
        return net
    import torchvision

    net = getattr(torchvision.models, name)(num_classes=classes)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
    return net


def mix(x):
    """The 32-bit mixer lowbias32 of C. Wellons, on an array of uint32."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def key(name, seed):
    """FNV-1a hash of a name, offset by the seed."""
    h = 2166136261
    for b in name.encode():
        h = (h ^ b) * 16777619 % 2**32
    return np.uint32((h + seed * 0x9E3779B1) % 2**32)


def bits(name, seed, count):
    return mix(key(name, seed) + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9))


def draw(name, seed, count):
    """count numbers in [-1, 1), exact in float64."""
    return bits(name, seed, count) / 2147483648.0 - 1.0


def formula(name, shape, seed):
    """A parameter or buffer in float32: scaled as Kaiming's for weights, near 1 or 0 for batch norm."""
    u = draw(name, seed, math.prod(shape))
    if name.endswith("running_var"):
        v = 1.0 + 0.3 * u
    elif name.endswith("running_mean"):
        v = 0.1 * u
    elif name.endswith("bias"):
        v = 0.2 * u
    elif len(shape) == 1:
        v = (0.8 + 0.2 * u) * (0.25 if name.endswith("bn3.weight") else 1.0)  # small residual branches in ResNet-50: less sensitive to rounding
    else:
        v = math.sqrt((6.0 if len(shape) == 4 else 3.0) / math.prod(shape[1:])) * u
    return torch.from_numpy(v.astype(np.float32).reshape(shape))


def setup(spec, seed, dtype):
    arch, projection, width, classes, n, h, w = spec[:7]
    net = build(arch, classes, projection, width).to(dtype)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                t.copy_(formula(name, t.shape, seed))
    x = (1.7 * draw("pictures", seed, n * h * w * 3)).astype(np.float32).reshape(n, h, w, 3)
    y = bits("labels", seed, n).astype(np.int64) % classes
    return net, torch.from_numpy(x).permute(0, 3, 1, 2).to(dtype), torch.from_numpy(y)


def kink(spec, seed):
    """The smallest distance of a ReLU or max pool input from its kink in the training forward pass."""
    nearest, relu, pool = [1.0], F.relu, F.max_pool2d

    def watch_relu(x, inplace=False):
        nearest.append(x.abs().min().item())
        return relu(x)

    def watch_pool(x, k, stride, padding, *rest, **named):
        windows = F.unfold(x, k, padding=padding, stride=stride).reshape(len(x), x.shape[1], k * k, -1)
        top = windows.topk(2, 2).values
        gap = (top[:, :, 0] - top[:, :, 1])[top[:, :, 0] > 0]
        nearest.append(gap.min().item())
        return pool(x, k, stride, padding)

    net, x, _ = setup(spec, seed, torch.float64)
    F.relu, F.max_pool2d = watch_relu, watch_pool
    try:
        with torch.no_grad():
            net.train()(x)
    finally:
        F.relu, F.max_pool2d = relu, pool
    return min(nearest)


def compute(spec, seed, dtype):
    """An evaluation, a training step from a given momentum, and another evaluation."""
    net, x, y = setup(spec, seed, dtype)
    features = {}
    net.fc.register_forward_pre_hook(lambda _, args: features.update(f=args[0]))
    named = dict(net.named_parameters())
    decays = [p for p in named.values() if p.ndim > 1]
    others = [p for p in named.values() if p.ndim <= 1]
    opt = torch.optim.SGD([{"params": decays, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
                          lr=LR, momentum=MOMENTUM, nesterov=True)
    for name, p in named.items():
        start = 0.01 * draw(name, seed + 1, p.numel())
        opt.state[p]["momentum_buffer"] = torch.from_numpy(start.astype(np.float32).reshape(p.shape)).to(dtype)
    out = {}
    with torch.no_grad():
        out["eval_before"] = net.eval()(x)
    z = net.train()(x)
    loss = F.cross_entropy(z, y) + FEATURES * features["f"].square().mean()
    loss.backward()
    out["logits"], out["loss"] = z.detach(), loss.detach().reshape(1)
    gradient = {k: p.grad for k, p in named.items()}
    opt.step()
    with torch.no_grad():
        out["eval_after"] = net.eval()(x)
    value = {k: t for k, t in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    momentum = {k: opt.state[p]["momentum_buffer"] for k, p in named.items()}
    return out, {"gradient": gradient, "value": value, "momentum": momentum}


def places(name, count, keep):
    """Which elements of a tensor are kept: all, or keep at random."""
    return np.arange(count) if count <= keep else bits(name, 77, keep).astype(np.int64) % count


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", nargs="?", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "reference", "nets.safetensors"))
    ap.add_argument("--search", type=int, default=0)
    a = ap.parse_args()
    from safetensors.numpy import save_file

    torch.set_num_threads(2)
    torch.backends.mkldnn.enabled = False  # oneDNN in PyTorch 2.15 corrupts memory in backward passes with so few channels
    if a.search:
        for net, spec in NETS.items():
            best = max((kink(spec, seed), seed) for seed in range(1, a.search + 1))
            print(f"{net}: seed {best[1]}, nearest kink {best[0]:.2e}", flush=True)
        return
    store = {}
    for net, spec in NETS.items():
        keep, seed = dict(gradient=spec[7], value=spec[8], momentum=spec[8]), spec[9]
        out, tensors = compute(spec, seed, torch.float64)
        out32, tensors32 = compute(spec, seed, torch.float32)
        gap = lambda a, b: ((a - b).norm() / b.norm()).item()
        print(f"{net}: nearest kink {kink(spec, seed):.1e}, loss {out['loss'].item():.4f}; PyTorch's float32 error:",
              ", ".join(f"{k} {gap(out32[k], out[k]):.1e}" for k in out), end="; worst ")
        print(", ".join(f"{s} {max(gap(tensors32[s][k], t) for k, t in g.items()):.1e}" for s, g in tensors.items()), flush=True)
        for k, t in out.items():
            store[f"{net}.{k}"] = t.numpy().astype(np.float32).reshape(-1)
        for slot, group in tensors.items():
            flat = {k: t.numpy().reshape(-1) for k, t in group.items()}
            store[f"{net}.{slot}.names"] = np.frombuffer("".join(k + "\n" for k in flat).encode(), np.uint8)
            store[f"{net}.{slot}.norms"] = np.array([np.linalg.norm(v) for v in flat.values()], np.float32)
            store[f"{net}.{slot}.samples"] = np.concatenate(
                [v[places(k, v.size, keep[slot])] for k, v in flat.items()]).astype(np.float32)
    save_file(store, a.out)
    print(a.out, os.path.getsize(a.out), "bytes")


if __name__ == "__main__":
    main()
