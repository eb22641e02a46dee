#!/usr/bin/env python3
"""Checkpoints both ways: ckca.h's files in torchvision's networks and torchvision's files in ckca.h give the same logits.

    make build/interop && python3 tests/torch_interop.py

For ResNet-18, 34 and 50: safetensors.torch.load_file and load_state_dict (strict) read a file of ckca_save into
torchvision's network, and ckca_load_weights reads torchvision's, saved by safetensors.torch.save_file. Prints the relative
error of the logits, |a - b| / |b|.
"""
import os, subprocess, sys, tempfile

import numpy as np
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CLASSES, SIZE, N, BOUND = 1000, 64, 4, 1e-4
tool = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "build", "interop")


def ours(folder, x, *args):
    x.permute(0, 2, 3, 1).contiguous().numpy().tofile(os.path.join(folder, "in.bin"))
    subprocess.run([tool, *args], check=True, cwd=folder)
    return torch.from_numpy(np.fromfile(os.path.join(folder, "out.bin"), np.float32).reshape(N, CLASSES))


def main():
    failed = 0
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = os.path.join(folder, "net.safetensors")
        for arch in "resnet18", "resnet34", "resnet50":
            x = torch.randn(N, 3, SIZE, SIZE)
            net = getattr(torchvision.models, arch)(num_classes=CLASSES)

            subprocess.run([tool, "save", arch, str(CLASSES), str(SIZE), path], check=True)
            state = load_file(path)
            net.load_state_dict(state, strict=True)
            with safe_open(path, "pt") as f:
                metadata = f.metadata()
            theirs = net.eval()(x)
            error = ((ours(folder, x, "load", str(N), "in.bin", "out.bin", path) - theirs).norm() / theirs.norm()).item()
            print(f"{arch}: ours in torchvision: {len(state)} tensors, strict, metadata {sorted(metadata)}, relative error {error:.1e}")
            failed += not error < BOUND

            net = getattr(torchvision.models, arch)(num_classes=CLASSES)
            net.train()
            for _ in range(3):  # move the running statistics away from their initial values
                net(torch.randn(8, 3, SIZE, SIZE))
            save_file(net.state_dict(), path)
            theirs = net.eval()(x)
            got = ours(folder, x, "logits", arch, str(CLASSES), str(SIZE), path, str(N), "in.bin", "out.bin")
            error = ((got - theirs).norm() / theirs.norm()).item()
            print(f"{arch}: torchvision's in ours: relative error {error:.1e}")
            failed += not error < BOUND
    print("failed:", failed)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
