"""The types of a GGUF file: which tensor gets which, its bytes, and whether they are right.

A type stores a row as blocks: codes of a few bits, a scale, for some a minimum. K-quants and IQ4
have blocks of 256 values in parts of 16 or 32; the scales of the parts are codes themselves. Their
rounding is llama.cpp's own function, out of PyPI `xllamacpp`; all others are PyPI `gguf`'s.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import re
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from stablelm_jax.interop.llama_cpp import INSTALL, num_processors
from stablelm_jax.model.config import ModelConfig

FILE_TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs"),
    *("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
)
# In place of a type whose blocks a row is no whole number of; where this fails too, float16.
_FALL_BACK = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
}


class Blocks(NamedTuple):
    """How a type stores a block, and how far off a value within its reach can be."""

    codes: slice  # its bytes that hold the codes of the values
    lowest: int  # such a byte where all codes are the lowest, and where all are the highest
    highest: int
    half_step: float  # half the largest distance of two levels, as a share of lowest to highest
    # What the scale's own rounding moves the levels by, where codes are chosen before it: a share
    # of the level (2^-11 for float16), and where scales are tiny 2^-25 times the highest code.
    # K-quants choose codes after it, so that each is the nearest there is but for float32.
    share: float = 2**-22
    least: float = 0.0


_16, _IQ4_STEP = 2**-11, 12 / 240  # IQ4's 16 levels lie from -127 to 113, at most 24 apart
BLOCKS = {
    Type.Q4_0: Blocks(slice(2, 18), 0x00, 0xFF, 0.5 / 15, _16, 8 * 2**-25),
    Type.Q5_0: Blocks(slice(2, 22), 0x00, 0xFF, 0.5 / 31, _16, 16 * 2**-25),
    Type.Q5_1: Blocks(slice(4, 24), 0x00, 0xFF, 0.5 / 31, 3 * _16, 32 * 2**-25),
    Type.Q8_0: Blocks(slice(2, 34), 0x80, 0x7F, 0.5 / 255, _16, 128 * 2**-25),
    Type.Q2_K: Blocks(slice(16, 80), 0x00, 0xFF, 0.5 / 3),
    Type.Q3_K: Blocks(slice(0, 96), 0x00, 0xFF, 0.5 / 7),
    Type.Q4_K: Blocks(slice(16, 144), 0x00, 0xFF, 0.5 / 15),
    Type.Q5_K: Blocks(slice(16, 176), 0x00, 0xFF, 0.5 / 31),
    Type.Q6_K: Blocks(slice(0, 192), 0x00, 0xFF, 0.5 / 63),
    Type.IQ4_NL: Blocks(slice(2, 18), 0x00, 0xFF, _IQ4_STEP, _16, 127 * 2**-25),
    Type.IQ4_XS: Blocks(slice(8, 136), 0x00, 0xFF, _IQ4_STEP, _16, 32 * 127 * 2**-25),
}
_BY_LLAMA_CPP = set(_FALL_BACK) | {Type.IQ4_NL}
# Given importance, llama.cpp refits the scale of these after it has chosen the codes.
_REFITTED = {Type.Q4_0, Type.Q5_0, Type.Q5_1}
_BLOCKS_AT_ONCE = 1 << 14  # up to 17 MB of values, several times


def plain_type(file_type: str) -> Type:
    """That of the matrices of a file, but for those that `wished_type` makes finer."""
    return Type[re.sub("_[sml]$", "", file_type).upper()]


def wished_type(model: ModelConfig, file_type: str, name: str, weighted: bool) -> Type:
    """The type of the matrix of this name in the file, such as blk.3.attn_v.weight.

    It is llama-quantize's choice (src/llama-quant.cpp) for a model of this architecture: what
    harms most is finer. The head of its q4_0 is q6_K; ours has to do without llama.cpp. Where
    there is an importance matrix (`weighted`) the choice differs a little.
    """
    plain, layers, eighth = plain_type(file_type), model.num_layers, model.num_layers // 8
    *_, layer, part, _ = ("0", *name.split("."))
    layer = int(layer) if layer.isdecimal() else 0
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    shared = model.num_heads >= 4 * model.num_kv_heads
    match file_type, part:
        case "q4_0", "output":
            return Type.Q8_0
        case _, "output":
            whole = model.width % gguf.GGML_QUANT_SIZES[plain][0] == 0
            return (Type.Q6_K if whole else Type.Q8_0) if plain in _BY_LLAMA_CPP else plain
        case "q2_k", "attn_v":
            return Type.Q4_K if shared else Type.Q3_K
        case "q2_k", "attn_output" | "ffn_down":
            return Type.Q3_K
        case "q3_k_m", "attn_v" | "attn_output" | "ffn_down":
            finest = {"attn_v": 2, "ffn_down": layers // 16}.get(part, 0)
            return Type.Q5_K if layer < finest else Type.Q4_K
        case "q3_k_l", "attn_v" | "attn_output" | "ffn_down":
            return Type.Q5_K
        case "q4_k_s", "attn_v" | "ffn_down":
            return Type.Q5_K if layer < {"attn_v": 4, "ffn_down": eighth}[part] else plain
        case "q4_k_m" | "q5_k_m", "attn_v" | "ffn_down":
            return Type.Q6_K if more else plain
        case "iq4_xs", "attn_v":
            return Type.Q5_K if shared else plain
        case "iq4_xs", "ffn_down":
            return Type.Q5_K if layer < eighth and not weighted else plain
    return plain


def fitting_type(wished: Type, columns: int) -> Type:
    """The type itself, or what stands in for it where rows of so many values do not suit it."""
    for found in (wished, _FALL_BACK.get(wished, Type.F16)):
        if columns % gguf.GGML_QUANT_SIZES[found][0] == 0:
            return found
    return Type.F16


def needs_llama_cpp(file_type: str) -> bool:
    """Whether a file of this type has blocks that `gguf` can only read."""
    return plain_type(file_type) in _BY_LLAMA_CPP


def rounded(values: np.ndarray, type_: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """The values in a type, as a file has them.

    Args:
      values: float32 [rows, columns]. importance: float32 [columns], the mean square of what each
        column is multiplied by; a block's scales are chosen for a small weighted error then.

    Raises:
      ValueError: a value is not finite, or too large for float16.
    """
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    if type_ in _BY_LLAMA_CPP or (importance is not None and type_ in _REFITTED):
        return _rounded_by_llama_cpp(values, type_, importance)
    with np.errstate(over="ignore"):
        found = gguf.quants.quantize(values, type_)
    if found.dtype == np.float16 and not np.isfinite(found).all():
        raise ValueError(f"holds {np.abs(values).max():g}, which float16 cannot; write it as bf16")
    return found


def _rounded_by_llama_cpp(
    values: np.ndarray, type_: Type, importance: np.ndarray | None
) -> np.ndarray:
    """Parts of the rows in threads, as many as there are cores."""
    function, (rows, columns), threads = llama_cpp_function(), values.shape, num_processors()
    found = np.empty(gguf.quant_shape_to_byte_shape(values.shape, type_), np.uint8)
    weights = None if importance is None else importance.ctypes.data

    def one(first: int, past: int) -> None:
        source, target = values.ctypes.data, found.ctypes.data
        function(type_, source, target, first * columns, past - first, columns, weights)

    bounds = [rows * i // (4 * threads) for i in range(4 * threads + 1)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, bounds[:-1], bounds[1:]))
    return found


@functools.cache
def llama_cpp_function() -> ctypes._CFuncPtr:
    """ggml_quantize_chunk(type, values, result, first value, rows, columns, importance).

    Raises:
      ValueError: xllamacpp is not there, or its library does not offer the function.
    """
    try:
        import xllamacpp.xllamacpp as library

        function = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (ImportError, AttributeError):
        raise ValueError(
            f"this type is rounded by llama.cpp: `{INSTALL}`, or choose q8_0 or q4_0"
        ) from None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    function.restype = ctypes.c_size_t
    return function


def explains(
    type_: Type, data: np.ndarray, values: np.ndarray, importance: np.ndarray | None = None
) -> bool:
    """Whether `data`, read from a file, is what `rounded` makes of these values.

    A value has the level nearest to it of those that its own block has, by `gguf`'s reading of the
    block: it is off by half a step at most, and beyond the lowest or highest level has that one.
    How far a block reaches is llama.cpp's choice: scales are searched for a small weighted error,
    which may cut a value off. So where a block has lost half of its squares, as one whose scale
    was damaged would have, the whole is rounded again and must be the same bytes. So must types
    without blocks, and those whose codes are not the nearest of the scale as it is in the end.
    """
    if type_ not in BLOCKS or (importance is not None and type_ in _REFITTED):
        return np.array_equal(data, rounded(values, type_, importance))
    layout, (block_values, block_bytes) = BLOCKS[type_], gguf.GGML_QUANT_SIZES[type_]
    blocks, wanted = data.reshape(-1, block_bytes), values.reshape(-1, block_values)
    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(first, first + _BLOCKS_AT_ONCE)
        read, meant = gguf.quants.dequantize(blocks[part], type_), wanted[part]
        ends = []
        for code in (layout.lowest, layout.highest):
            end = blocks[part].copy()
            end[:, layout.codes] = code
            ends.append(gguf.quants.dequantize(end, type_))
        low, high = np.minimum(*ends), np.maximum(*ends)
        reach = np.maximum(np.abs(low), np.abs(high))
        allowed = layout.half_step * (high - low) + layout.share * reach + layout.least
        if not (np.abs(np.clip(meant, low, high) - read) <= allowed).all():
            return False
        lost = np.square(meant - read).sum(-1) > np.square(meant).sum(-1) / 2
        if lost.any():
            return np.array_equal(data, rounded(values, type_, importance))
    return True
