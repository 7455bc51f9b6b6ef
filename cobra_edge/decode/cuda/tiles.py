"""How the kernels for many tokens are cut into blocks: grids, threads and shared memory, as runtimes/cuda/*.cu ask for them."""

from __future__ import annotations

from dataclasses import dataclass

_STAGE_INPUTS = 128  # a split of a product is a multiple of it
_LEAST_SPLIT = 512
_TOKENS_A_CONVOLUTION = 32
_SCAN_THREADS, _SCAN_STATES = 128, 16
_LEAST_CHUNK = 64
ROW_THREADS, _ROW_WARPS = 256, 8


@dataclass(frozen=True)
class Tile:
    """What one block of a product makes, and takes.

    Attributes:
        name: of its kind, the end of the kernel's name.
        rows: of the matrix.
        tokens: beside each other.
        threads: of a block.
        shared_bytes: of shared memory, dynamic; beyond 48 KiB a function has to be allowed it.
    """

    name: str
    rows: int
    tokens: int
    threads: int
    shared_bytes: int


def _tile(name: str, rows: int, tokens: int, threads: int, stages: int, bits: int) -> Tile:
    inputs = 64 if bits == 16 else 128  # of a stage
    return Tile(name, rows, tokens, threads, stages * (rows * inputs * bits // 8 + tokens * inputs * 2))


# By the bits of a weight, smallest first; the same numbers as at the end of runtimes/cuda/gemm.cu.
TILES: dict[int, tuple[Tile, Tile, Tile]] = {
    3: (_tile("small", 64, 16, 128, 6, 3), _tile("medium", 128, 64, 128, 2, 3), _tile("large", 128, 128, 256, 2, 3)),
    4: (_tile("small", 64, 16, 128, 6, 4), _tile("medium", 128, 64, 128, 2, 4), _tile("large", 256, 128, 256, 2, 4)),
    8: (_tile("small", 64, 16, 128, 4, 8), _tile("medium", 128, 64, 128, 2, 8), _tile("large", 128, 128, 256, 2, 8)),
    16: (_tile("small", 64, 16, 128, 4, 16), _tile("medium", 128, 64, 128, 2, 16), _tile("large", 128, 128, 128, 3, 16)),
}


@dataclass(frozen=True)
class GemmLaunch:
    """One product of a matrix with many tokens.

    Attributes:
        kernel: its name.
        tile: that a block makes.
        grid: (tiles of tokens, tiles of rows, splits).
        inputs_a_split: of each split; several write parts, (splits, tokens, out) float32, that are summed afterwards.
    """

    kernel: str
    tile: Tile
    grid: tuple[int, int, int]
    inputs_a_split: int

    @property
    def splits(self) -> int:
        """How many parts are summed."""
        return self.grid[2]


def gemm_launch(bits: int, n_out: int, n_in: int, tokens: int, multiprocessors: int) -> GemmLaunch:
    """Return how a product is launched.

    Args:
        bits: of a weight, 3, 4, 8 or 16.
        n_out, n_in: of the matrix; n_in a multiple of 8 where it is float16.
        tokens: at least one.
        multiprocessors: of the GPU.
    """
    small, medium, large = TILES[bits]
    tile = small
    if tokens > small.tokens:
        padded = {t: -(-tokens // t.tokens) * t.tokens for t in (medium, large)}
        fills = -(-tokens // large.tokens) * -(-n_out // large.rows) >= multiprocessors
        tile = large if fills and padded[large] <= 1.15 * padded[medium] else medium
    blocks = -(-tokens // tile.tokens) * -(-n_out // tile.rows)
    wanted = multiprocessors if tile is large else 2 * multiprocessors
    splits = max(1, min(wanted // blocks, n_in // _LEAST_SPLIT))
    per_split = -(-n_in // splits // _STAGE_INPUTS) * _STAGE_INPUTS
    grid = (-(-tokens // tile.tokens), -(-n_out // tile.rows), -(-n_in // per_split))
    return GemmLaunch(f"gemm_w{bits}_{tile.name}", tile, grid, per_split)


def most_part_floats(multiprocessors: int) -> int:
    """Return the most float32 numbers that the parts of a product take, however many tokens it has: see `gemm_launch`."""
    tiles = (tile for tiles in TILES.values() for tile in tiles)
    return multiprocessors * max(t.rows * t.tokens * (1 if t.name == "large" else 2) for t in tiles)


@dataclass(frozen=True)
class ScanLaunch:
    """One selective scan.

    Attributes:
        lanes: threads that share a channel, 16 states each.
        length: tokens of a chunk.
        chunks: of them; one needs no scan_chunks, and neither of its results.
        blocks: of channels.
        threads: of a block.
    """

    lanes: int
    length: int
    chunks: int
    blocks: int
    threads: int = _SCAN_THREADS

    @property
    def states(self) -> int:
        """How many states a channel has with the padding: B and C have as many columns each."""
        return self.lanes * _SCAN_STATES

    def local_floats(self, d_inner: int) -> int:
        """Return the float32 numbers that `local` and `sums` take together; none of one chunk."""
        return 0 if self.chunks == 1 else self.chunks * (self.states + 1) * d_inner


def scan_launch(d_inner: int, d_state: int, tokens: int, multiprocessors: int) -> ScanLaunch:
    """Return how a scan is launched. Chunks do the exponentials twice, so only where channels leave parts of a GPU idle.

    Args:
        d_inner, d_state: of the model.
        tokens: at least one.
        multiprocessors: of the GPU, four schedulers each.
    """
    lanes, blocks = _scan_blocks(d_inner, d_state)
    length = -(-tokens // most_scan_chunks(d_inner, d_state, tokens, multiprocessors))
    return ScanLaunch(lanes, length, -(-tokens // length), blocks)


def most_scan_chunks(d_inner: int, d_state: int, tokens: int, multiprocessors: int) -> int:
    """Return the most chunks that a scan of at most so many tokens is cut into; arguments as of `scan_launch`."""
    _, blocks = _scan_blocks(d_inner, d_state)
    warps, schedulers = blocks * _SCAN_THREADS // 32, 4 * multiprocessors
    return 1 if warps >= schedulers else max(1, min(-(-3 * schedulers // warps), tokens // _LEAST_CHUNK))


def _scan_blocks(d_inner: int, d_state: int) -> tuple[int, int]:
    """Return how many threads share a channel, and how many blocks there are of channels."""
    lanes = 1 << (-(-d_state // _SCAN_STATES) - 1).bit_length()
    return lanes, -(-d_inner * lanes // _SCAN_THREADS)


def convolution_launch(d_inner: int, d_conv: int, tokens: int) -> tuple[str, tuple[int, int], int, int]:
    """Return the kernel of a convolution, its grid, its threads and the tokens of a block."""
    threads = 128
    grid = (-(-d_inner // threads), -(-tokens // _TOKENS_A_CONVOLUTION))
    return ("conv_rows_4" if d_conv <= 4 else "conv_rows_8"), grid, threads, _TOKENS_A_CONVOLUTION


def norm_shared_bytes() -> int:
    """Return the shared memory of norm_rows, whose blocks have `ROW_THREADS` threads and take a row each."""
    return 4 * _ROW_WARPS


def rotation_shared_bytes(width: int, *, with_norm: bool = False) -> int:
    """Return the shared memory of rotate_rows, or of norm_between_rotations, whose blocks take a row each."""
    return 4 * (2 * width + _ROW_WARPS) if with_norm else 4 * width
