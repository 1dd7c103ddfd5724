"""Attacks on `params.npz`: the zip directory, its members, and their npy headers."""

import io
import struct
import warnings
import zipfile

import numpy as np

from . import arrays, write

NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
NAMES |= {"threshold": "threshold"}


def npy(array, **header):
    """The bytes of a .npy member; `header` overrides what it declares."""
    stream = io.BytesIO()
    if header:
        fields = np.lib.format.header_data_from_array_1_0(array) | header
        np.lib.format.write_array_header_1_0(stream, fields)
        stream.write(array.tobytes())
    else:
        np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def members(**replaced):
    made = {f"{NAMES[k]}.npy": npy(v) for k, v in arrays().items()}
    return made | {f"{name}.npy": data for name, data in replaced.items()}


def archive(contents, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names
        for name, data in contents if isinstance(contents, list) else contents.items():
            file.writestr(name, data)
    return stream.getvalue()


def patched(data, name, field, value, form="<L"):
    """Set a field (offset in the directory entry) of the member `name`."""
    at = data.rindex(b"PK\1\2", 0, data.rindex(name.encode()))
    out = bytearray(data)
    struct.pack_into(form, out, at + field, value)
    return bytes(out)


def raw_header(text, version=(1, 0), body=b""):
    size = struct.pack("<H" if version == (1, 0) else "<L", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + body


def _big_directory():
    padded = zipfile.ZipInfo("b_dec.npy")
    padded.comment = b"c" * 60_000
    padded.extra = struct.pack("<HH", 0x7777, 60_000) + b"e" * 60_000
    return archive([*members().items(), (padded, b"")])


def _zip64_directory():
    """The ordinary end record is modest, the zip64 one claims a directory of 2^40 bytes."""
    data = archive(members())
    record = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 5, 5, 1 << 40, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) - 22, 1)
    return data[:-22] + record + locator + data[-22:]


def _overlap():
    data = archive(members())
    first = data.index(b"PK\1\2")
    return patched(data, "threshold.npy", 42, struct.unpack_from("<L", data, first + 42)[0])


def _nul_name():
    """Zip readers end a name at NUL: this one would pass for b_dec.npy."""
    made = members()
    made["b_dec.npy#x"] = made.pop("b_dec.npy")
    return archive(made).replace(b"b_dec.npy#x", b"b_dec.npy\0x")


def _bomb():
    zeros = np.zeros((2048, 8192), np.float32)
    return archive(members(W_enc=npy(zeros)), zipfile.ZIP_DEFLATED)


def _deflate_longer():
    """A member that inflates to more than the directory says."""
    data = archive(members(), zipfile.ZIP_DEFLATED)
    return patched(data, "W_enc.npy", 24, len(npy(arrays()["w_enc"])) - 4)


SAE = arrays()
OBJECT = np.array([{"a": 1}, "code"], dtype=object)
SHAPE = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }\n"
DEEP = b"{'descr': " + b"(" * 3000 + b")" * 3000 + b", 'fortran_order': False, 'shape': (1,)}\n"

CASES = {  # name: bytes of params.npz, the message that refuses them
    "empty file": (b"", "end record is missing"),
    "not a zip": (b"\x93NUMPY" + bytes(500), "end record is missing"),
    "no members": (archive({}), "lacks w_enc"),
    "cut in half": (archive(members())[:700], "end record is missing"),
    "front cut off": (archive(members())[200:], "W_enc.npy declares|damaged"),
    "directory beyond the limit": (_big_directory(), "zip directory must have at most"),
    "zip64 directory of a TiB": (_zip64_directory(), "zip directory must have at most"),
    "overlapping members": (_overlap(), "overlap the next member"),
    "compressed size beyond the file": (
        patched(patched(archive(members()), "W_dec.npy", 20, 1 << 30), "W_dec.npy", 24, 1 << 30),
        "overlap the next member or exceed",
    ),
    "stored sizes differ": (
        patched(archive(members()), "W_dec.npy", 24, 1 << 31),
        "its two sizes must agree",
    ),
    "deflated size too small": (
        patched(archive(members(), zipfile.ZIP_DEFLATED), "W_enc.npy", 20, 40),
        "W_enc.npy is damaged or truncated",
    ),
    "inflates beyond its size": (_deflate_longer(), "W_enc.npy is damaged|but the archive holds"),
    "bomb": (_bomb(), "a zip bomb"),
    "declared terabytes": (
        patched(archive(members(), zipfile.ZIP_DEFLATED), "W_enc.npy", 24, 0xFFFFFFF0),
        "a zip bomb",
    ),
    "encrypted": (
        patched(archive(members()), "W_enc.npy", 8, 1, "<H"),
        "W_enc.npy is damaged or truncated: RuntimeError.*encrypted",
    ),
    "other method": (archive(members(), zipfile.ZIP_BZIP2), "must be stored or deflated"),
    "checksum": (
        archive(members()).replace(SAE["w_dec"].tobytes(), (SAE["w_dec"] + 1).tobytes()),
        "W_dec.npy is damaged or truncated: BadZipFile: Bad CRC",
    ),
    "duplicate": (
        archive([*members().items(), ("b_enc.npy", npy(SAE["b_enc"]))]),
        "b_enc.npy must occur once",
    ),
    "parent path": (archive({"../W_enc.npy": b""}), r"members must be .* got '\.\./W_enc.npy'"),
    "absolute path": (archive({"/W_enc.npy": b""}), "members must be .* got '/W_enc.npy'"),
    "folder": (archive({"sub/": b""}), "members must be .* got 'sub/'"),
    "backslash": (archive({"..\\W_enc.npy": b""}), "members must be"),
    "no suffix": (archive({"W_enc": b""}), "members must be .* got 'W_enc'"),
    "name with NUL": (_nul_name(), "members must be"),
    "unknown member": (archive(members(extra=npy(SAE["b_dec"]))), "got 'extra.npy'"),
    "missing": (archive({"W_enc.npy": npy(SAE["w_enc"])}), "lacks w_dec, b_enc, b_dec, threshold"),
    "pickle": (archive(members(b_enc=npy(OBJECT))), "b_enc.npy must be float16.*got dtype..O"),
    "integers": (archive(members(b_enc=npy(np.arange(10)))), "must be float16, float32 or float64"),
    "strings": (archive(members(b_enc=npy(np.array(["a"] * 10)))), "must be float16, float32"),
    "records": (archive(members(b_enc=npy(np.zeros(10, "f4,i4")))), "must be float16, float32"),
    "complex": (archive(members(b_enc=npy(np.zeros(10, "c8")))), "must be float16, float32"),
    "huge shape": (
        archive(members(W_enc=npy(SAE["w_enc"], shape=(1 << 40, 1 << 40)))),
        "declares shape .*, but the archive holds",
    ),
    "shape off by one": (
        archive(members(b_dec=npy(SAE["b_dec"], shape=(7,)))),
        "declares shape .*, but the archive holds",
    ),
    "negative shape": (
        archive(members(W_enc=npy(SAE["w_enc"], shape=(-6, -10)))),
        "must have sizes >= 0",
    ),
    "boolean shape": (
        archive(members(b_dec=raw_header((SHAPE % "(True,)").encode(), body=bytes(4)))),
        "must have sizes >= 0|damaged",
    ),
    "shape is no tuple": (
        archive(members(b_dec=raw_header((SHAPE % "[6]").encode(), body=bytes(24)))),
        "b_dec.npy is damaged or truncated",
    ),
    "npy of npz": (archive(members(b_dec=archive({}))), "b_dec.npy is damaged or truncated"),
    "empty member": (archive(members(b_dec=b"")), "b_dec.npy is damaged or truncated"),
    "header calls a function": (
        archive(members(b_dec=raw_header(b"__import__('os').abort()\n"))),
        "b_dec.npy is damaged or truncated",
    ),
    "deep header": (archive(members(b_dec=raw_header(DEEP))), "b_dec.npy is damaged or truncated"),
    "header length lies": (
        archive(members(b_dec=raw_header(b"{}", (2, 0))[:8] + b"\xff\xff\xff\x7f{}")),
        "b_dec.npy is damaged or truncated",
    ),
    "unknown npy version": (
        archive(members(b_dec=raw_header(b"{}", (9, 0)))),
        "version",
    ),
    "empty matrix": (
        archive(members(W_enc=npy(np.zeros((0, 10), "f4")))),
        "w_enc must be a matrix, no size 0",
    ),
    "vector for a matrix": (archive(members(W_dec=npy(SAE["b_dec"]))), "w_dec must be a matrix"),
    "threshold too long": (
        archive(members(threshold=npy(np.zeros(11, "f4")))),
        r"threshold must have shape \[10\]",
    ),
    "NaN": (
        archive(members(W_dec=npy(np.where(SAE["w_dec"] > 1, np.nan, SAE["w_dec"])))),
        "w_dec must be finite, and holds NaN",
    ),
    "infinite threshold": (
        archive(members(threshold=npy(np.full(10, np.inf)))),
        "threshold must be finite",
    ),
    "threshold beyond float32": (
        archive(members(threshold=npy(np.full(10, 1e300)))),
        "threshold has values beyond the range of torch.float32",
    ),
}


def make(name, folder):
    write(folder / "params.npz", CASES[name][0])
