"""Arguments of the compiled operations, as C lays them out: see the files of ``native`` for what each field is."""

from __future__ import annotations

import ctypes
from enum import IntEnum

POINTER, NUMBER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Before(IntEnum):
    """What becomes of a product's input first."""

    NOTHING = 0
    RMS_NORM = 1
    SILU_GATE = 2


class Packed(ctypes.Structure):
    """A quantised weight in tiles: ``tiles.h``."""

    _fields_ = (
        ("tiles", POINTER),
        ("out", NUMBER),
        ("inputs", NUMBER),
        ("group", NUMBER),
        ("bits", NUMBER),
        ("middle", NUMBER),
        ("has_offsets", NUMBER),
        ("halves", NUMBER),
    )


class Dequantize(ctypes.Structure):
    """``tiles.h``."""

    _fields_ = (("weight", Packed), ("out", POINTER))


class Lookup(ctypes.Structure):
    """Rows of a quantised table: ``tiles.h``."""

    _fields_ = (("weight", Packed), ("ids", POINTER), ("out", POINTER), ("rows", NUMBER))


class Copy(ctypes.Structure):
    """Rows of a table as it is: ``tiles.h``."""

    _fields_ = (("table", POINTER), ("ids", POINTER), ("out", POINTER), ("rows", NUMBER), ("size", NUMBER))


class Norm(ctypes.Structure):
    """``rows.h``."""

    _fields_ = (
        ("x", POINTER),
        ("weight", POINTER),
        ("out", POINTER),
        ("rows", NUMBER),
        ("size", NUMBER),
        ("eps", FLOAT),
    )


class Gate(ctypes.Structure):
    """``rows.h``."""

    _fields_ = (("x", POINTER), ("out", POINTER), ("rows", NUMBER), ("size", NUMBER))


class Product(ctypes.Structure):
    """``product.h``."""

    _fields_ = (
        ("weight", Packed),
        ("x", POINTER),
        ("norm", POINTER),
        ("bias", POINTER),
        ("residual", POINTER),
        ("out", POINTER),
        ("rows", NUMBER),
        ("before", NUMBER),
        ("rounds", NUMBER),
        ("eps", FLOAT),
    )


class Rows(ctypes.Structure):
    """The rows of a step: ``attention.h``."""

    _fields_ = (
        ("tables", POINTER),
        ("lengths", POINTER),
        ("positions", POINTER),
        ("rows", NUMBER),
        ("table_stride", NUMBER),
        ("block_size", NUMBER),
    )


class Heads(ctypes.Structure):
    """The heads of an attention layer: ``attention.h``."""

    _fields_ = (
        ("rotary", POINTER),
        ("heads", NUMBER),
        ("kv_heads", NUMBER),
        ("head_size", NUMBER),
        ("rotary_dim", NUMBER),
        ("window", NUMBER),
        ("scale", FLOAT),
    )


class Attend(ctypes.Structure):
    """``attention.h``."""

    _fields_ = (
        ("rows", POINTER),
        ("layer", Heads),
        ("qkv", POINTER),
        ("cache", POINTER),
        ("scales", POINTER),
        ("out", POINTER),
    )


class Operation(ctypes.Structure):
    """What is run, and its arguments: ``kernels.cpp``."""

    _fields_ = (("run", POINTER), ("arguments", POINTER))
