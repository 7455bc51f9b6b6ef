"""How kernels read codes out of a bundle's bytes, docs/bundle.md.

A block of a row's codes is RUNS runs of 16 neighbours: one of bytes (8 bits), two of half bytes (4 bits: 32 codes in 16 bytes),
or four whose low two bits lie in 16 bytes and whose top bits lie in the 8 bytes behind them (3 bits: 64 codes in 24 bytes).
Lane j of run s of block b is the row's input 16 · (RUNS · b + s) + j, and lies in byte j of the block.

There are two ways to read. Kernels with tensor cores take bytes: a tile of bytes gives a tile of codes a run. The product for
one token, which a multiprocessor's instructions limit as much as memory does, takes words of four bytes: a code is masked where
it lies, with the exponent of a power of two set above it, and one subtraction leaves the number; neither shift nor conversion.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Runs of a block, by bits; of float16, which has no codes, a "block" is a run.
RUNS = {3: 4, 4: 2, 8: 1, 16: 1}
# The bits of the float32 2^23, whose lowest bit is worth 1. Kernels take it as an argument: as a constant, the compiler
# would load it into a register anew before each use.
EXPONENT = 0x4B000000


@triton.jit
def load_bytes(codes, row_offset, block, lane, mask, BITS: tl.constexpr):
    """Load the bytes that hold lanes of blocks, int16: of the low bits, and for 3 bits of the top bits (else the same).

    Offsets and lanes broadcast against each other; `row_offset` in bytes. Where `mask` is false the bytes are 0. Top bits come
    at the place above that of the low bits: bit 2 · RUN + 2.
    """
    if BITS == 3:
        start = codes + row_offset + block * 24
        low = tl.load(start + lane, mask=mask, other=0).to(tl.int16)
        top = tl.load(start + 16 + lane % 8, mask=mask, other=0).to(tl.int16)
        return low, (top << 2) >> (lane // 8).to(tl.int16)
    else:
        low = tl.load(codes + row_offset + block * 16 + lane, mask=mask, other=0).to(tl.int16)
        return low, low


@triton.jit
def centred_run(low, top, RUN: tl.constexpr, BITS: tl.constexpr):
    """Return code - zero, float16 and exact, of a run of what `load_bytes` gave, as `centred` does: no conversion."""
    place: tl.constexpr = 0 if BITS == 8 else (4 * RUN if BITS == 4 else 2 * RUN)
    exponent: tl.constexpr = 0x6400 - (place << 10)  # of the float16 2^(10 - place)
    zero: tl.constexpr = (1 << (10 - place)) + (1 << (BITS - 1))
    mask: tl.constexpr = ((1 << BITS) - 1) << place
    bits = ((low & (3 << place)) | (top & (4 << place))) if BITS == 3 else low & mask
    return (bits | exponent).to(tl.float16, bitcast=True) - zero


@triton.jit
def four(tile):
    """Return the four slices of a tile along its last axis, which has length 4."""
    even, odd = tl.split(tl.reshape(tile, tile.shape[:-1] + [2, 2]))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def load_words(codes, row_offset, block, BITS: tl.constexpr):
    """Load n blocks as words, int32: (n, 4) of the low bits, and for 3 bits (n, 2) of the top bits (else the same)."""
    words = codes.to(tl.pointer_type(tl.int32)) + tl.expand_dims(row_offset // 4 + block * (6 if BITS == 3 else 4), -1)
    if BITS == 3:
        # Only every other block of 24 bytes begins where 16 bytes may be loaded at once, each where 8 may.
        pair = words + tl.arange(0, 2)
        pairs = tl.trans(tl.join(tl.load(pair), tl.load(pair + 2)), (0, 2, 1))
        return tl.reshape(pairs, pairs.shape[:-2] + [4]), tl.load(pair + 4)
    else:
        low = tl.load(words + tl.arange(0, 4))
        return low, low


@triton.jit
def word_of_run(low, top, WORD: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr):
    """Return the word whose byte m holds lane 4 · WORD + m of a run, at bit `place_of_run`.

    `low` is word WORD of the low bits, `top` the word of the top bits of the same lanes. For 3 bits, two runs each become half
    bytes: bits 0 to 2 and 4 to 6 of each byte, with nothing of worth in bits 3 and 7.
    """
    if BITS == 3:
        # The top bit of lane j lies at bit 2 · RUN + (j >> 3), and goes on top of two low bits at 2 · RUN.
        high: tl.constexpr = WORD // 2
        if RUN % 2 == 0:
            return ((low ^ (top << (2 - high))) & 0x33333333) ^ (top << (2 - high))
        else:
            return (((low >> 2) ^ (top >> high)) & 0x33333333) ^ (top >> high)
    else:
        return low


@triton.jit
def centred(word, exponent, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Return code - zero, float32 and exact, of the codes at bit PLACE of words.

    Below the exponent of 2^(23 - PLACE), bit PLACE is worth 1.
    """
    width: tl.constexpr = 8 if BITS == 8 else 4
    # A code may not reach into the exponent: words are shifted once for all codes that would.
    shift: tl.constexpr = (16 if BITS == 8 else 12) if PLACE + width > 23 else 0
    place: tl.constexpr = PLACE - shift
    mask: tl.constexpr = ((1 << BITS) - 1) << place
    zero: tl.constexpr = (1 << (23 - place)) + (1 << (BITS - 1))
    bits = ((word >> shift) & mask) | (exponent - (place << 23))
    return bits.to(tl.float32, bitcast=True) - zero
