#!/usr/bin/env python3
"""The library from Python, through examples/ckca.py: networks, updates, errors, bindings that do not fit; ONNX Runtime on
the models of ckca_save_onnx, and cffi on ckca.h, where these packages are installed. tests/test_python.sh runs it:

    CKCA_LIBRARY=build/libckca.so python3 tests/embed.py
"""
import ctypes
import gc
import os
import random
import re
import subprocess
import sys
import tempfile

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", "examples"))
import ckca  # noqa: E402

passed = failed = 0


def check(good, *what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("FAIL", *what)


def refused(words, call, *arguments, **fields):
    try:
        call(*arguments, **fields)
    except Exception as error:
        check(isinstance(error, ckca.Error) and words in str(error), "expected", repr(words), "got", repr(error))
    else:
        check(False, "expected", repr(words), "but it worked")


def stripes(count):
    """Grey pictures of 16 x 16: label 0: the stripes run across, 1: down."""
    draw = random.Random(7)
    labels = [i % 2 for i in range(count)]
    return bytes(draw.randrange(200) + (x if label else y) // 2 % 2 * 50 for label in labels for y in range(16)
                 for x in range(16)), labels


def test_updates(ctx, folder):
    pixels, labels = stripes(24)
    data = ctx.open_array(pixels, labels, 16, 16, 1, 2)
    model = ctx.resnet("resnet8", height=16, width=16, channels=1, classes=2, class_names=["0", "1"])
    seen = []
    report = model.update(data, epochs=4, batch=12, augment={"pad": 1}, progress=lambda p: seen.append(p.loss))
    check(report["steps"] == 8 and len(seen) == 8 and report["updates"] == 1, report, len(seen))
    check(seen[-1] < seen[0], "the loss went from", seen[0], "to", seen[-1])
    check(model.class_names() == ["0", "1"], model.class_names())
    p = model.predict(pixels[:512])
    check(len(p) == 2 and all(abs(sum(row) - 1) < 1e-5 for row in p), p)
    path = os.path.join(folder, "m.safetensors")
    model.save(path)
    check(ctx.load(path).predict(pixels[:512]) == p, "a loaded model predicts otherwise")
    second = model.update(data, epochs=1, teacher=ctx.load(path), method=ckca.CKCA_METHOD_LWF)
    check(second["updates"] == 2 and second["teacher_accuracy"] >= 0, second)
    check(model.evaluate(data)["count"] == 24, model.evaluate(data))

    refused("none.safetensors: cannot be opened", ctx.load, os.path.join(folder, "none.safetensors"))
    refused("epochs is -4", model.update, data, epochs=-4)
    refused("there are 2 classes", ctx.open_array, pixels[:256], [2], 16, 16, 1, 2)
    refused("was stopped in epoch 1, after batch 1", model.update, data, progress=lambda p: 1)
    for wrong, call in ((TypeError, lambda: model.update(data, epoch=1)), (ValueError, lambda: model.predict(b"123")),
                        (ZeroDivisionError, lambda: model.update(data, progress=lambda p: 1 // 0)),
                        (ctypes.ArgumentError, lambda: ckca.lib.ckca_save(ctx.pointer, b"x"))):
        try:
            call()
            check(False, "expected", wrong)
        except wrong:
            check(True)
    return model


def test_order_of_freeing():
    """Objects may go in any order: each keeps its context."""
    ctx = ckca.Context(threads=1)
    model = ctx.resnet("resnet8", classes=2)
    del ctx
    gc.collect()
    check(model.info()["classes"] == 2)


def test_bindings(folder):
    """A header that does not fit the library is refused before the first call."""
    with open(ckca.HEADER, encoding="utf-8") as file:
        header = file.read()
    for what, old, new, words in (("field", "    int epochs, batch; ", "    int more[2], epochs, batch; ", "ckca_update_desc has"),
                                  ("version", '#define CKCA_VERSION "', '#define CKCA_VERSION "9', "is version")):
        check(old in header, what, "is not in the header")
        path = os.path.join(folder, what + ".h")
        with open(path, "w", encoding="utf-8") as file:
            file.write(header.replace(old, new, 1))
        run = subprocess.run([sys.executable, os.path.join(here, "..", "examples", "ckca.py")], capture_output=True,
                             text=True, env={**os.environ, "CKCA_HEADER": path, "CKCA_LIBRARY": ckca.LIBRARY})
        check(run.returncode == 1 and words in run.stderr, what, run.returncode, run.stderr[-200:])


def test_program(folder, model):
    """The command line: a network for the pictures of a folder, made here."""
    program = os.path.join(here, "..", "examples", "ckca.py")
    path, out = os.path.join(folder, "m.safetensors"), os.path.join(folder, "m.onnx")
    model.save(path)
    for words, status in ((["onnx", path, out], 0), ([], 2), (["onnx", path + "x", out], 1)):
        run = subprocess.run([sys.executable, program, *words], capture_output=True, text=True,
                             env={**os.environ, "CKCA_LIBRARY": ckca.LIBRARY})
        check(run.returncode == status and "Traceback" not in run.stderr, words, run.returncode, run.stderr[-200:])
    check(os.path.exists(out), out, "was not written")


def every_layer(ctx):
    """The network of test_embed.c: every kind of layer."""
    lib, pointer = ckca.lib, ctypes.POINTER(ckca._types["ckca_model"])()
    desc = ckca._fill(ckca.ckca_model_desc(), dict(height=11, width=14, channels=2, classes=5, mean=[0.4, 0.5],
                                                   std=[0.2, 0.3]))
    ctx.check(lib.ckca_model_create(ctx.pointer, ctypes.byref(pointer), ctypes.byref(desc)))

    def conv(name, x, **fields):
        return lib.ckca_layer_conv(pointer, name, x, ckca._fill(ckca.ckca_conv_desc(), fields))

    x = conv(b"shape", lib.ckca_layer_input(pointer), out=6, kernel=5, stride=2, pad=3, bias=1)
    x = lib.ckca_layer_batchnorm(pointer, b"input", x)
    x = lib.ckca_layer_groupnorm(pointer, b"logits", lib.ckca_layer_relu(pointer, x), 3)
    x = lib.ckca_layer_maxpool(pointer, x, 3, 2, 1)
    y = lib.ckca_layer_subsample(pointer, x, 2, 9)
    x = lib.ckca_layer_batchnorm(pointer, b"b", conv(b"a", x, out=9, kernel=1, stride=2))
    x = lib.ckca_layer_batchnorm(pointer, b"alone", lib.ckca_layer_add(pointer, x, y))
    x = lib.ckca_layer_linear(pointer, b"map", lib.ckca_layer_subsample(pointer, x, 1, 9), 7)
    x = lib.ckca_layer_groupnorm(pointer, b"g", lib.ckca_layer_relu(pointer, x), 1)
    ctx.check(lib.ckca_model_finish(pointer, lib.ckca_layer_linear(pointer, b"fc", lib.ckca_layer_avgpool(pointer, x), 5)))
    return ckca.Model(ctx, pointer, lib.ckca_model_free)


def test_onnx(ctx, folder):
    try:
        import numpy
        import onnx
        import onnxruntime
    except ImportError as error:
        print("SKIPPED ONNX Runtime on the library's models: %s (pip install onnx onnxruntime)" % error)
        return
    print("onnx %s, onnxruntime %s" % (onnx.__version__, onnxruntime.__version__))
    norm = dict(mean=[0.48, 0.46, 0.41], std=[0.23, 0.22, 0.25])
    models = [("every layer", every_layer(ctx))]
    models += [(arch, ctx.resnet(arch, height=h, width=w, classes=7, width_base=8, projection=p, **norm))
               for arch, h, w, p in (("resnet8", 32, 32, 0), ("resnet20", 17, 12, 1), ("resnet18", 65, 50, 0),
                                     ("resnet50", 64, 64, 0), ("resnet34-cifar", 16, 16, 0))]
    rng = numpy.random.default_rng(1)
    for name, model in models:
        info = model.info()
        h, w, c = info["height"], info["width"], info["channels"]
        for i in range(ckca.lib.ckca_tensor_count(model.pointer)):  # batch norms as after training
            tensor = ckca.ckca_tensor_info()
            ckca.lib.ckca_tensor_info_get(model.pointer, i, ctypes.byref(tensor))
            if tensor.dims > 1:
                continue
            at = 1 if tensor.name.endswith((b"var", b"weight")) else 0
            values = (at + 0.3 * rng.uniform(-1, 1, tensor.count)).astype(numpy.float32)
            model.ctx.check(ckca.lib.ckca_tensor_write(model.pointer, i, 0, (ctypes.c_float * tensor.count)(*values)))
        pixels = rng.integers(0, 256, (3, h, w, c), dtype=numpy.uint8)
        mean = numpy.array(info["mean"][:c], numpy.float32)
        std = numpy.array(info["std"][:c], numpy.float32)
        normalized = ((pixels.astype(numpy.float32) / 255 - mean) / std).astype(numpy.float32)
        flat = numpy.ascontiguousarray(normalized)
        ctx.check(ckca.lib.ckca_forward(model.pointer, flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 3, 0))
        ours = numpy.zeros((3, info["classes"]), numpy.float32)
        ctx.check(ckca.lib.ckca_node_read(model.pointer, info["logits"],
                                          ours.ctypes.data_as(ctypes.POINTER(ctypes.c_float))))
        for way in range(4):
            path = os.path.join(folder, "a.onnx")
            model.save_onnx(path, fold_batchnorm=way & 1, normalized_input=way >> 1)
            proto = onnx.load(path)
            onnx.checker.check_model(proto, full_check=True)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            x = (normalized if way >> 1 else pixels.astype(numpy.float32)).transpose(0, 3, 1, 2)
            theirs = session.run(["logits"], {"input": numpy.ascontiguousarray(x)})[0]
            far, largest = abs(theirs - ours).max(), abs(ours).max()
            check(far <= 2e-5 * largest, name, "way", way, ": logits", far, "apart, the largest is", largest)
            one = session.run(["logits"], {"input": numpy.ascontiguousarray(x[1:2])})[0]  # the batch is free
            check(one.shape == (1, info["classes"]) and abs(one - theirs[1:2]).max() <= 1e-5 * largest, name, "one picture")


def test_cffi():
    """What binding generators see: cffi (through pycparser) reads the public header and finds the same sizes."""
    try:
        import cffi
    except ImportError as error:
        print("SKIPPED cffi on ckca.h: %s (pip install cffi)" % error)
        return
    with open(ckca.HEADER, encoding="utf-8") as file:
        text = file.read()
    text = text[text.index("#define CKCA_H\n"):text.index("#endif /* CKCA_H */")]
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", "", text, flags=re.M)  # a line may go on after a backslash
    text = text.replace('extern "C" {', "").replace("CKCA_API", "extern")
    text = text[:text.rindex("}\n")] if text.rstrip().endswith("}") else text
    ffi = cffi.FFI()
    ffi.cdef(text)
    lib = ffi.dlopen(ckca.LIBRARY)
    for name in ckca._structures:
        check(lib.ckca_struct_size(name.encode()) == ffi.sizeof(name), name, ffi.sizeof(name))
    ctx = ffi.new("ckca_context **")
    check(lib.ckca_init(ctx, ffi.NULL) == 0 and lib.ckca_load(ctx[0], ffi.NULL, b"x") == ckca.CKCA_EINVAL)
    check(b"model is NULL" in ffi.string(lib.ckca_error(ctx[0])), ffi.string(lib.ckca_error(ctx[0])))
    lib.ckca_context_free(ctx[0])


def main():
    ctx = ckca.Context(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        model = test_updates(ctx, folder)
        test_order_of_freeing()
        test_bindings(folder)
        test_program(folder, model)
        test_onnx(ctx, folder)
        test_cffi()
    print("%d passed, %d failed" % (passed, failed))
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
