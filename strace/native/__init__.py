"""The native CPU runner's library, by ctypes: native.h in Python's words. It is optional; without it torch serves.

ctypes releases the GIL for the time of each call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from typing import Any

ABI = 6
FORMATS = {"fp32": 1, "bf16": 2, "int8": 3, "int4": 4}
NORMS = {"rms": 1, "layer": 2}
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_pytorch_tanh": 3}


class NativeError(RuntimeError):
    """The native library is missing, or has refused a call; the message says why."""


class Matrix(Structure):
    """`st_matrix`."""

    _fields_ = [("format", c_int32), ("rows", c_int32), ("columns", c_int32), ("packed", c_void_p), ("bias", c_void_p)]


class Norm(Structure):
    """`st_norm`."""

    _fields_ = [("kind", c_int32), ("size", c_int32), ("weight", c_void_p), ("bias", c_void_p)]


class Attention(Structure):
    """`st_attention`."""

    _fields_ = [
        *((name, Norm) for name in ("norm", "post_norm", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "o")),
        *((name, c_int32) for name in ("present", "heads", "kv_heads")),
        ("kept", c_void_p),
        ("window", c_int32),
        ("rope", c_int32),
    ]


class MLP(Structure):
    """`st_mlp`."""

    _fields_ = [
        *((name, Norm) for name in ("norm", "post_norm")),
        *((name, Matrix) for name in ("inner", "down")),
        ("present", c_int32),
        ("gated", c_int32),
    ]


class Layer(Structure):
    """`st_layer`."""

    _fields_ = [("attention", Attention), ("mlp", MLP)]


class Rope(Structure):
    """`st_rope`."""

    _fields_ = [("cos", c_void_p), ("signed_sin", c_void_p)]


class GraphDescription(Structure):
    """`st_graph_description`."""

    _fields_ = [
        *((name, c_int32) for name in ("layers", "hidden", "head_dim", "rotary_dim", "vocabulary", "context")),
        *((name, c_int32) for name in ("activation", "parallel", "ropes")),
        *((name, c_float) for name in ("norm_eps", "embed_scale", "attention_scale", "attention_cap", "logit_cap")),
        ("layer", POINTER(Layer)),
        ("rope", POINTER(Rope)),
        ("embed", Matrix),
        ("position_embed", c_void_p),
        ("final_norm", Norm),
        ("head", Matrix),
        ("token_ids", c_void_p),
        ("coverage", c_float),
    ]


class LayerCache(Structure):
    """`st_layer_cache`."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p)]


class Cache(Structure):
    """`st_cache`."""

    _fields_ = [
        *((name, c_int32) for name in ("format", "layers", "blocks", "kv_heads", "head_dim")),
        ("layer", POINTER(LayerCache)),
    ]


class Batch(Structure):
    """`st_batch`."""

    _fields_ = [
        ("sequences", c_int32),
        ("table_stride", c_int32),
        ("tokens", POINTER(c_int64)),
        ("counts", POINTER(c_int32)),
        ("starts", POINTER(c_int32)),
        ("tables", c_void_p),
    ]


class Summary(Structure):
    """`st_summary`."""

    _fields_ = [("token", c_int64), ("probability", c_float), ("gap", c_float), ("entropy", c_float)]


ALLOW = CFUNCTYPE(c_int32, POINTER(c_int64), c_int32, c_void_p)


class Sampler(Structure):
    """`st_sampler`."""

    _fields_ = [
        *((name, c_float) for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("top_k", c_int32),
        ("shared", c_int32),
        ("key", c_uint64),
        ("position", c_int64),
        ("barred_until", c_int64),
        *((name, c_void_p) for name in ("history", "prompt", "barred", "bias_ids", "bias")),
        *((name, c_int32) for name in ("history_count", "prompt_count", "barred_count", "bias_count")),
        ("allow", ALLOW),
    ]


class Held(Structure):
    """`st_held`."""

    _fields_ = [
        *((name, c_int32) for name in ("row", "count", "emitted", "audited")),
        *((name, c_void_p) for name in ("drafts", "q", "divergences")),
    ]


class Limits(Structure):
    """`st_limits`."""

    _fields_ = [("most_held", c_int32), ("most_emitted", c_int32), ("room", c_int32), ("threshold", c_float)]


class Rule(Structure):
    """`st_rule`."""

    _fields_ = [
        ("always", c_int32),
        ("tokens_per_second", c_double),
        ("full_seconds", POINTER(c_double)),
        ("draft_seconds", POINTER(c_double)),
        *((name, c_int32) for name in ("table", "planned", "stop_count", "bins")),
        ("acceptance", POINTER(c_double)),
        ("stop_ids", POINTER(c_int64)),
    ]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "st_abi": (c_int32, []),
    "st_error": (c_char_p, []),
    "st_isa": (c_char_p, []),
    "st_quantise": (c_int32, [*[c_int32] * 4, c_void_p, c_void_p, c_void_p]),
    "st_packed_bytes": (c_size_t, [c_int32] * 3),
    "st_pack_dense": (c_int32, [*[c_int32] * 3, c_void_p, c_void_p]),
    "st_pack_codes": (c_int32, [*[c_int32] * 3, c_void_p, c_void_p, c_void_p]),
    "st_multiply": (c_int32, [c_void_p, POINTER(Matrix), c_void_p, c_int32, c_void_p]),
    "st_read_bandwidth": (c_double, [c_int32, c_void_p, c_size_t]),
    "st_create": (c_void_p, [POINTER(Cache), c_int32]),
    "st_destroy": (None, [c_void_p]),
    "st_add_graph": (c_int32, [c_void_p, POINTER(GraphDescription)]),
    "st_forward": (c_int32, [c_void_p, c_int32, POINTER(Batch), POINTER(c_int32), c_int32, c_void_p, c_void_p]),
    "st_draft": (
        c_int32,
        [
            c_void_p,
            c_int32,
            POINTER(Batch),
            POINTER(Sampler),
            POINTER(Limits),
            POINTER(Rule),
            c_int32,
            *[c_void_p] * 4,
        ],
    ),
    "st_uniform": (None, [c_uint64, c_int64, c_int32, c_int32, c_void_p]),
    "st_process": (c_int32, [c_void_p, c_void_p, c_int32, c_void_p, c_int32, POINTER(Sampler)]),
    "st_verify_pass": (
        c_int32,
        [
            c_void_p,
            c_int32,
            POINTER(Batch),
            POINTER(c_int32),
            c_int32,
            c_int32,
            POINTER(Held),
            POINTER(Sampler),
            c_void_p,
            c_void_p,
        ],
    ),
    "st_verify": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, POINTER(Held), POINTER(Sampler), c_void_p, c_void_p]),
}


def find_library() -> Path:
    """Where the library lies; STRACE_NATIVE_LIBRARY names another build of it, such as one with sanitizers."""
    return Path(os.environ.get("STRACE_NATIVE_LIBRARY", Path(__file__).parent / "libstrace_native.so"))


def name_build(library: Path) -> str:
    """The first digits of its SHA-256, which tell builds of one version apart."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:8]


@cache
def load() -> ctypes.CDLL:
    """The library that `find_library` finds.

    Raises:
        NativeError: if it was not built, or is that of another version.
    """
    path = find_library()
    if not path.exists():
        raise NativeError("native runner not built (is there a C++ compiler?)")
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeError(f"native runner cannot be loaded: {error}") from error
    if (found := library.st_abi()) != ABI:
        raise NativeError(f"native runner is of another version (interface {found}, this needs {ABI}); install again")
    return library


def why_unavailable() -> str | None:
    """Why the native runner cannot be used here, in one line; None where it can."""
    try:
        load()
    except NativeError as error:
        return str(error)
    return None


def available() -> bool:
    """Whether the native runner can be used here."""
    return why_unavailable() is None


def check(result: int) -> int:
    """What a call gave.

    Raises:
        NativeError: if it failed.
    """
    if result < 0:
        raise NativeError(load().st_error().decode())
    return result
