"""ckca.py: ckca.h from Python, with ctypes and the standard library alone.

    make shared
    python3 examples/ckca.py classify model.safetensors picture.jpg ...
    python3 examples/ckca.py update model.safetensors new-pictures better.safetensors
    python3 examples/ckca.py onnx model.safetensors model.onnx

As a module (everything of ckca.h is also there under its own name, as in `ckca.lib.ckca_tensor_count`):

    import ckca
    ctx = ckca.Context()
    model = ctx.load("model.safetensors")
    data = ctx.open_folder("new-pictures", model)
    report = model.update(data, epochs=20, augment={"flip": 1, "pad": 4})
    model.save("better.safetensors")
    probabilities = model.predict(ctx.read_picture("picture.jpg", model))

A call that fails raises ckca.Error with the library's sentence. The structures and functions are not written down here:
they are read from ckca.h, and the library is asked for the size of each structure, so a header that does not fit the
library is refused. The two are looked for beside this file's folder; CKCA_LIBRARY and CKCA_HEADER name others.
"""
import ctypes
import os
import re
import sys

_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARY = os.environ.get("CKCA_LIBRARY", os.path.join(_root, "build", "libckca.so"))
HEADER = os.environ.get("CKCA_HEADER", os.path.join(_root, "ckca.h"))


class Error(Exception):
    """A call failed; status is one of CKCA_EINVAL, CKCA_ESHAPE, ..."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


# ---- the header: plain C declarations, one structure or function at a time ----

_types = {"void": None, "char": ctypes.c_char, "unsigned char": ctypes.c_ubyte, "int": ctypes.c_int,
          "float": ctypes.c_float, "double": ctypes.c_double, "size_t": ctypes.c_size_t,
          "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64}


def _pointer(base, depth):
    """The ctypes type of a pointer; bytes and buffers can be passed where C has void * or unsigned char *."""
    if depth == 0:
        return base
    if base in (None, ctypes.c_ubyte):
        inner = ctypes.c_void_p
    elif base is ctypes.c_char:
        inner = ctypes.c_char_p
    else:
        inner = ctypes.POINTER(base)
    for _ in range(depth - 1):
        inner = ctypes.POINTER(inner)
    return inner


def _arguments(text):
    """The types of a list of arguments; one of them may be a function with arguments of its own."""
    return [] if text.strip() == "void" else [_declare(a)[0][1] for a in re.findall(r"(?:[^,(]|\([^)]*\))+", text)]


def _declare(text):
    """[(name, type)] of one declaration such as "const float *mean, *std" or "int dims, shape[4]"."""
    callback = re.fullmatch(r"\s*(.+?)\(\*(\w+)\)\s*\((.*)\)\s*", text)
    if callback:
        result, name, arguments = callback.groups()
        return [(name, ctypes.CFUNCTYPE(_declare(result + " _")[0][1], *_arguments(arguments)))]
    text = re.sub(r"\b(const|struct|enum)\b", " ", text).strip()
    word = re.match(r"unsigned char\b|\w+", text).group(0)
    names = []
    for declarator in text[len(word):].split(","):
        stars, name, length = re.fullmatch(r"\s*((?:\*\s*)*)(\w*)\s*(?:\[(\d+)\])?\s*", declarator).groups()
        kind = _pointer(_types[word], stars.count("*"))
        names.append((name, kind * int(length) if length else kind))
    return names


def _read_header(path):
    """Reads the public part of ckca.h: returns the version, constants, structures, and functions as (result, types)."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    text = text[text.index("#define CKCA_H\n"):text.index("#endif /* CKCA_H */")]
    version = re.search(r'#define CKCA_VERSION "(.*)"', text).group(1)
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S)
    text = re.sub(r"^[ \t]*#[^\n]*", "", text, flags=re.M)
    constants, structures, functions = {}, {}, {}
    pattern = (r"typedef enum (?P<enum>\w+)\s*\{(?P<values>[^}]*)\}|typedef struct (?P<struct>\w+)\s*\{(?P<fields>[^}]*)\}|"
               r"typedef struct (?P<opaque>\w+) \w+;|typedef (?P<callback>[^;{]*\(\*[^;]*\));|"
               r"CKCA_API (?P<result>[^;(]*?)(?P<function>\w+)\((?P<arguments>[^;]*)\);")
    for match in re.finditer(pattern, text):
        if match["enum"]:
            _types[match["enum"]] = ctypes.c_int
            value = -1
            for item in filter(None, (i.strip() for i in match["values"].split(","))):
                name, _, given = (part.strip() for part in item.partition("="))
                value = int(given) if given else value + 1
                constants[name] = value
        elif match["struct"]:
            fields = [f for line in match["fields"].split(";") if line.strip() for f in _declare(line)]
            name = match["struct"]
            structures[name] = _types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        elif match["opaque"]:
            _types[match["opaque"]] = type(match["opaque"], (ctypes.Structure,), {})
        elif match["callback"]:
            _types.update(_declare(match["callback"]))
        else:
            functions[match["function"]] = (_declare(match["result"])[0][1], _arguments(match["arguments"]))
    return version, constants, structures, functions


def _open(library, header):
    version, constants, structures, functions = _read_header(header)
    loaded = ctypes.CDLL(library)
    try:
        loaded.ckca_version.restype = ctypes.c_char_p
        loaded.ckca_struct_size.restype = ctypes.c_size_t
        its_version = loaded.ckca_version().decode()
    except AttributeError as missing:
        raise ImportError("%s: it is no libckca, or one older than %s: %s" % (library, version, missing)) from None
    if its_version != version:
        raise ImportError("%s is version %s, %s is version %s" % (library, its_version, header, version))
    for name, structure in structures.items():
        size = loaded.ckca_struct_size(name.encode())
        if size != ctypes.sizeof(structure):
            raise ImportError("%s: %s has %d bytes, in %s it has %d" % (library, name, size, header,
                                                                       ctypes.sizeof(structure)))
    for name, (result, arguments) in functions.items():
        function = getattr(loaded, name, None)
        if function:  # a library without files (CKCA_NO_STDIO) lacks some
            function.restype, function.argtypes = result, arguments
    return loaded, constants, structures


lib, _constants, _structures = _open(LIBRARY, HEADER)
globals().update(_constants)  # CKCA_OK, CKCA_METHOD_WARM, ...
globals().update(_structures)  # ckca_update_desc, ...
CKCA_OFF = -1.0


# ---- the calls that most programs need, as classes ----

def _fill(structure, values):
    """Sets fields by name; a dict fills a structure inside, a list becomes an array."""
    for name, value in values.items():
        kind = dict(structure._fields_).get(name)
        if kind is None:
            raise TypeError("%s has no field %s" % (type(structure).__name__, name))
        if isinstance(value, dict):
            _fill(getattr(structure, name), value)
        elif isinstance(value, _Object):  # a teacher, say
            setattr(structure, name, value.pointer)
        elif isinstance(value, (list, tuple)):
            item = kind._type_ if hasattr(kind, "_type_") and not isinstance(kind._type_, str) else ctypes.c_char_p
            array = (item * len(value))(*[v.encode() if isinstance(v, str) else v for v in value])
            setattr(structure, name, ctypes.cast(array, kind))
        else:
            setattr(structure, name, os.fsencode(value) if isinstance(value, (str, os.PathLike)) else value)
    return structure


def _as_dict(structure):
    return {name: getattr(structure, name) for name, _ in structure._fields_}


class _Object:
    """Something of the library's, freed when nothing refers to it any more; it keeps its context alive."""

    def __init__(self, ctx, pointer, free):
        self.ctx, self.pointer, self._free = ctx, pointer, free

    def __del__(self):
        if getattr(self, "pointer", None):
            self._free(self.pointer)
            self.pointer = None


class Context(_Object):
    def __init__(self, **desc):
        """desc: fields of ckca_desc, for example threads=2."""
        pointer = ctypes.POINTER(_types["ckca_context"])()
        status = lib.ckca_init(ctypes.byref(pointer), ctypes.byref(_fill(ckca_desc(), desc)))
        super().__init__(self, pointer, lib.ckca_context_free)
        self.ctx = None  # no cycle
        self.check(status)

    def check(self, status):
        if status:
            sentence = lib.ckca_error(self.pointer).decode("utf-8", "replace") if self.pointer else ""
            raise Error(status, sentence or lib.ckca_status_name(status).decode())

    def _model(self, call, *arguments):
        pointer = ctypes.POINTER(_types["ckca_model"])()
        self.check(call(self.pointer, ctypes.byref(pointer), *arguments))
        return Model(self, pointer, lib.ckca_model_free)

    def _data(self, call, *arguments):
        pointer = ctypes.POINTER(_types["ckca_data"])()
        self.check(call(self.pointer, ctypes.byref(pointer), *arguments))
        return Data(self, pointer, lib.ckca_data_free)

    def load(self, path):
        return self._model(lib.ckca_load, os.fsencode(path))

    def resnet(self, arch, **desc):
        """A fresh network; desc: fields of ckca_model_desc."""
        return self._model(lib.ckca_resnet, arch.encode(), ctypes.byref(_fill(ckca_model_desc(), desc)))

    def open_folder(self, folder, like=None, **desc):
        """Pictures in folder/CLASS/, in the size and with the classes of the model like; desc: of ckca_data_desc."""
        fit = lib.ckca_data_like(like.pointer if like else None)
        return self._data(lib.ckca_open_folder, os.fsencode(folder), ctypes.byref(_fill(fit, desc)))

    def open_array(self, pixels, labels, height, width, channels, classes):
        """pixels: bytes, height x width x channels for each of the labels."""
        if len(pixels) != len(labels) * height * width * channels:
            raise ValueError("%d bytes are not %d pictures of %d x %d x %d" % (len(pixels), len(labels), height, width,
                                                                               channels))
        array, pixels = ckca_array(), bytes(pixels)
        array.pixels = ctypes.cast(pixels, ctypes.c_void_p)
        array.labels = (ctypes.c_int * len(labels))(*labels)
        array.count, array.height, array.width, array.channels, array.classes = (len(labels), height, width, channels,
                                                                                 classes)
        return self._data(lib.ckca_open_array, ctypes.byref(array), None)

    def read_picture(self, path, model):
        """The bytes of a JPEG or PNG file, in the model's input size."""
        info = model.info()
        fit = lib.ckca_data_like(model.pointer)
        out = ctypes.create_string_buffer(info["height"] * info["width"] * info["channels"])
        self.check(lib.ckca_read_picture(self.pointer, os.fsencode(path), ctypes.byref(fit), out))
        return out.raw


class Data(_Object):
    def info(self):
        info = ckca_data_info()
        lib.ckca_data_info_get(self.pointer, ctypes.byref(info))
        return _as_dict(info)


class Model(_Object):
    def info(self):
        info = ckca_model_info()
        lib.ckca_model_info_get(self.pointer, ctypes.byref(info))
        return _as_dict(info)

    def class_names(self):
        info = self.info()
        return [info["class_names"][i].decode() for i in range(info["classes"])] if info["class_names"] else None

    def update(self, data, **desc):
        """One update; desc: fields of ckca_update_desc. Returns the report as a dict. A function as progress gets
        ckca_progress; if it returns something true, the update stops."""
        failure = []
        progress = desc.pop("progress", None)
        settings = _fill(ckca_update_desc(), desc)

        def call(progress_, _):
            try:
                return bool(progress(progress_.contents))
            except BaseException as error:  # it must not pass through C
                failure.append(error)
                return 1

        if progress:
            settings.progress = dict(ckca_update_desc._fields_)["progress"](call)
        report = ckca_report()
        status = lib.ckca_update(self.pointer, data.pointer, ctypes.byref(settings), ctypes.byref(report))
        if failure:
            raise failure[0]
        self.ctx.check(status)
        return _as_dict(report)

    def evaluate(self, data):
        score = ckca_score()
        self.ctx.check(lib.ckca_evaluate(self.pointer, data.pointer, ctypes.byref(score), None))
        return _as_dict(score)

    def predict(self, pixels):
        """Class probabilities, a list for each of the pictures in pixels (bytes)."""
        info = self.info()
        size, classes = info["height"] * info["width"] * info["channels"], info["classes"]
        if not pixels or len(pixels) % size:
            raise ValueError("%d bytes are no pictures of %d bytes" % (len(pixels), size))
        count = len(pixels) // size
        out = (ctypes.c_float * (count * classes))()
        self.ctx.check(lib.ckca_predict(self.pointer, bytes(pixels), count, out))
        return [out[i * classes:(i + 1) * classes] for i in range(count)]

    def save(self, path):
        self.ctx.check(lib.ckca_save(self.pointer, os.fsencode(path)))

    def save_onnx(self, path, **desc):
        """desc: fields of ckca_onnx_desc."""
        self.ctx.check(lib.ckca_save_onnx(self.pointer, os.fsencode(path),
                                          ctypes.byref(_fill(ckca_onnx_desc(), desc))))


def main(words):
    if len(words) >= 3 and words[0] == "classify":
        ctx = Context()
        model = ctx.load(words[1])
        names = model.class_names() or [str(i) for i in range(model.info()["classes"])]
        for path in words[2:]:
            p = model.predict(ctx.read_picture(path, model))[0]
            best = max(range(len(p)), key=p.__getitem__)
            print("%s\t%s\t%.1f%%" % (path, names[best], 100 * p[best]))
    elif len(words) == 4 and words[0] == "update":
        ctx = Context()
        model = ctx.load(words[1])
        report = model.update(ctx.open_folder(words[2], model), state=words[3] + ".state")
        model.save(words[3])
        print("%d steps in %.1f s, accuracy in training %.1f%%" % (report["steps"], report["seconds"],
                                                                   100 * report["accuracy"]))
    elif len(words) == 3 and words[0] == "onnx":
        Context().load(words[1]).save_onnx(words[2])
    else:
        print("usage: ckca.py classify MODEL PICTURE... | update MODEL PICTURES_DIR OUT | onnx MODEL OUT", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Error, OSError) as error:
        sys.exit("ckca.py: %s" % error)
