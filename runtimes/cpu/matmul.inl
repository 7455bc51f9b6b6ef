// GEMV and GEMM of quantized weights with int8 activations, shared by the instruction sets. The file that includes this
// defines, on its own registers, for a tile of kLanes rows (one 32-bit lane per row, kCodes = 4 · kLanes bytes per register):
//
//   Codes, Ints, Floats                 registers of bytes, int32, float32
//   unpack<kStorage>(row, run)          codes [run · kCodes, + kCodes) of a row in natural order: unsigned, or converted to
//                                       signed if zero_of<kStorage>() is 0
//   zero_of<kStorage>()                 zero point of the unpacked codes
//   kWide<kStorage>                     runs per step, if a group is a multiple of them
//   arrange<kStorage, kRuns>(a, out)    activations of kRuns runs in the order that `step` takes
//   step<kStorage, kRuns>(sums, row, run, a)   sums += kRuns runs of a row times arranged activations
//   dot4<kStorage>(sums, w, a)          sums[lane] += four quads of each lane's row (w[0..3]) times 16 activations
//   repeat(values)                      kPhase = kLanes / 4 int32 or float32, repeated
//   gather_scales(rows, g)              kPhase float16 of each of four rows, as float32
//   sum_phases(v, out)                  sums of four runs of kPhase values each, added pairwise
//   lane_sums(parts)                    lane i: the sum of all lanes of parts[i]
//   transpose(rows)                     kLanes × kLanes 32-bit values in place
//   widen_codes<kStorage>(codes, out)   four registers of unpacked codes as float32, in natural order
//   load_codes, spread, zeros, widen_scales, to_float, load_floats, store_floats, add, multiply, multiply_add
//   prefetch(address), kTokens          kTokens: tokens per register tile
//
// Every output is a sum over groups of float(integer sum of the group) · (weight scale · activation scale): first over every
// kPhase-th group, in order, then over these sums. The result is bit-identical whatever the number of tokens and however rows
// are split.

constexpr int kTogether = 4;                // rows that GEMV reads together
constexpr int kPhase = kLanes / kTogether;  // groups per row that fill a register of sums
constexpr int kAhead = 1024;                // prefetch distance in bytes

struct Tile {
    const uint8_t* rows[kLanes];  // codes
    const uint16_t* scales[kLanes];
    int64_t here;  // number of valid rows; the others repeat the last one
};

static inline Tile tile_at(const Matrix& m, int64_t r, int64_t to) {
    Tile tile;
    tile.here = to - r < kLanes ? to - r : kLanes;
    for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = i < tile.here ? r + i : to - 1;
        tile.rows[i] = m.row(row);
        tile.scales[i] = m.scales + row * m.groups();
    }
    return tile;
}

// Scales of a tile as float32, (groups, kLanes); out has room for the groups rounded up to kLanes.
static inline void scales_by_group(const Tile& tile, int64_t groups, float* out) {
    for (int64_t g = 0; g < groups; g += kLanes) {
        Ints rows[kLanes];
        // The last block overlaps the one before it, if there are enough groups.
        if (g + kLanes > groups && groups > kLanes) g = groups - kLanes;
        for (int i = 0; i < kLanes; ++i) {
            if (groups - g >= kLanes) {
                rows[i] = as_ints(widen_scales(tile.scales[i] + g));
            } else {
                uint16_t rest[kLanes] = {};
                for (int64_t k = g; k < groups; ++k) rest[k - g] = tile.scales[i][k];
                rows[i] = as_ints(widen_scales(rest));
            }
        }
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) store_floats(out + (g + i) * kLanes, as_floats(rows[i]));
    }
}

// The same order of additions as sum_phases, but lane by lane.
static inline Floats add_phases(const Floats* sums) {
    if (kPhase == 1) return sums[0];
    if (kPhase == 2) return add(sums[0], sums[1 % kPhase]);
    return add(add(sums[0], sums[1 % kPhase]), add(sums[2 % kPhase], sums[3 % kPhase]));
}

static inline void write_lanes(Floats values, const Tile& tile, float* out, bool onto) {
    if (tile.here == kLanes) return store_floats(out, onto ? add(load_floats(out), values) : values);
    float lanes[kLanes];
    store_floats(lanes, values);
    for (int64_t i = 0; i < tile.here; ++i) out[i] = onto ? out[i] + lanes[i] : lanes[i];
}

// Integer sums of groups [g, g + count) of kTogether rows times one token's codes: lane i · kPhase + j is row i, group g + j.
// Group g starts `at` bytes into a row and takes `steps` steps. Data `ahead` bytes further on are prefetched step by step: all
// at once they would delay the loads that are needed now.
template <Storage kStorage, int kRuns>
static inline Ints phase_sums(const uint8_t* const* rows, int64_t at, int64_t ahead, int64_t steps, int64_t count,
                              const int8_t* codes, const int32_t* sums) {
    constexpr int64_t kBytes = bytes_of(kStorage, kRuns * kCodes);  // of a step
    Ints parts[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) parts[i] = spread(0);
#pragma GCC unroll 4
    for (int j = 0; j < kPhase; ++j) {
        if (j >= count) break;
        for (int64_t s = j * steps; s < (j + 1) * steps; ++s) {
            Codes a[kRuns];
            arrange<kStorage, kRuns>(codes + s * kRuns * kCodes, a);
#pragma GCC unroll 4
            for (int i = 0; i < kTogether; ++i) {
                for (int64_t line = 0; line < kBytes; line += 64) prefetch(rows[i] + at + ahead + s * kBytes + line);
                parts[i * kPhase + j] = step<kStorage, kRuns>(parts[i * kPhase + j], rows[i] + at, s * kRuns, a);
            }
        }
    }
    if (zero_of<kStorage>() == 0) return lane_sums(parts);
    // Sums after the last group are arbitrary; their scales are zero.
    constexpr int kBits = zero_of<kStorage>() == 4 ? 2 : zero_of<kStorage>() == 8 ? 3 : 7;
    return subtract(lane_sums(parts), shift_left<kBits>(repeat(sums)));
}

// GEMV, one token: weights are streamed from memory, each used once. Hardware prefetchers can follow a few rows at a time, but
// not from the end of a row to the next, so every cache line is also prefetched kAhead bytes before its use.
template <Storage kStorage, int kRuns, bool kOneStep>
static void gemv(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t t, float* out, bool onto) {
    const int64_t groups = m.groups(), row_bytes = m.row_bytes();
    const int64_t group = kOneStep ? kRuns * kCodes : m.group, steps = group / (kRuns * kCodes);
    const int64_t phase_bytes = kPhase * bytes_of(kStorage, group);
    for (int64_t r = from; r < to; r += kTogether) {
        const int64_t here = to - r < kTogether ? to - r : kTogether;
        const uint8_t* row[kTogether];
        const uint16_t* scales[kTogether];
        for (int64_t i = 0; i < kTogether; ++i) {
            row[i] = m.row(i < here ? r + i : to - 1);
            scales[i] = m.scales + (i < here ? r + i : to - 1) * groups;
        }
        prefetch(scales[0] + 8 * kTogether * groups);
        Floats total = zeros();
        const int8_t* codes = rows.codes + t * rows.width;
        const float* code_scales = rows.scales + t * rows.groups;
        const int32_t* sums = rows.sums + t * rows.groups;
        int64_t g = 0, at = 0;
        for (; g + kPhase <= groups; g += kPhase, at += phase_bytes) {
            const int64_t ahead = at + kAhead < row_bytes ? kAhead : kAhead + (kTogether - 1) * row_bytes;
            const Ints sum =
                phase_sums<kStorage, kRuns>(row, at, ahead, kOneStep ? 1 : steps, kPhase, codes + g * group, sums + g);
            total = multiply_add(to_float(sum), multiply(gather_scales(scales, g), repeat(code_scales + g)), total);
        }
        if (g < groups) {  // the remainder; reads nothing beyond the row
            uint16_t last[kTogether][kPhase] = {};
            float last_codes[kPhase] = {};
            for (int64_t j = 0; j < groups - g; ++j) {
                for (int i = 0; i < kTogether; ++i) last[i][j] = scales[i][g + j];
                last_codes[j] = code_scales[g + j];
            }
            for (int i = 0; i < kTogether; ++i) scales[i] = last[i];
            const Ints sum = phase_sums<kStorage, kRuns>(row, at, kAhead, steps, groups - g, codes + g * group, sums + g);
            total = multiply_add(to_float(sum), multiply(gather_scales(scales, 0), repeat(last_codes)), total);
        }
        float values[kTogether];
        sum_phases(total, values);
        for (int64_t i = 0; i < here; ++i) out[r + i] = onto ? out[r + i] + values[i] : values[i];
    }
}

// Pack kLanes rows as (quads of inputs, kLanes, 4): a register holds four inputs of every row.
template <Storage kStorage>
static void pack_panel(const Tile& tile, int64_t cols, uint8_t* panel) {
    for (int64_t run = 0; run < cols / kCodes; ++run) {
        Ints rows[kLanes];
        for (int i = 0; i < kLanes; ++i) rows[i] = as_ints(unpack<kStorage>(tile.rows[i], run));
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) store_codes(panel + (run * kLanes + i) * kCodes, as_codes(rows[i]));
    }
}

template <Storage kStorage, int kWide>
static void gemm_panel(const uint8_t* panel, const float* scales, const Tile& tile, int64_t group, const Int8Rows& rows,
                       int64_t t, float* out, int64_t stride, bool onto) {
    Floats totals[kWide][kPhase];
    for (auto& total : totals)
        for (auto& phase : total) phase = zeros();
    const int8_t* codes = rows.codes + t * rows.width;
    for (int64_t g = 0; g < rows.groups; ++g) {
        Ints sums[kWide];
        for (int j = 0; j < kWide; ++j) {
            const auto sum = static_cast<uint32_t>(rows.sums[(t + j) * rows.groups + g]);
            sums[j] = spread(static_cast<int32_t>(0u - sum * static_cast<uint32_t>(zero_of<kStorage>())));
        }
        for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
            Codes w[4];
            for (int q = 0; q < 4; ++q) w[q] = load_codes(panel + (k / 4 + q) * kCodes);
            for (int j = 0; j < kWide; ++j) sums[j] = dot4<kStorage>(sums[j], w, codes + j * rows.width + k);
        }
        const Floats scale = load_floats(scales + g * kLanes);
        for (int j = 0; j < kWide; ++j) {
            const Floats both = multiply(scale, spread(rows.scales[(t + j) * rows.groups + g]));
            Floats& total = totals[j][g % kPhase];
            total = multiply_add(to_float(sums[j]), both, total);
        }
    }
    for (int j = 0; j < kWide; ++j) write_lanes(add_phases(totals[j]), tile, out + j * stride, onto);
}

// GEMM, many tokens: the codes of a tile are unpacked once, into the cache, and used for every token.
template <Storage kStorage>
static void gemm(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out, int64_t stride,
                 bool onto, float* scales, uint8_t* panel) {
    for (int64_t r = from; r < to; r += kLanes) {
        const Tile tile = tile_at(m, r, to);
        scales_by_group(tile, m.groups(), scales);
        pack_panel<kStorage>(tile, m.cols, panel);
        int64_t t = 0;
        for (; t + kTokens <= tokens; t += kTokens)
            gemm_panel<kStorage, kTokens>(panel, scales, tile, m.group, rows, t, out + t * stride + r, stride, onto);
        for (; t + 4 <= tokens; t += 4)
            gemm_panel<kStorage, 4>(panel, scales, tile, m.group, rows, t, out + t * stride + r, stride, onto);
        for (; t < tokens; ++t)
            gemm_panel<kStorage, 1>(panel, scales, tile, m.group, rows, t, out + t * stride + r, stride, onto);
    }
}

template <Storage kStorage>
static void matmul_storage(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out,
                           int64_t stride, bool onto, float* scratch) {
    constexpr int64_t kFew = 4;  // with fewer tokens packing a panel does not pay
    const int64_t padded = (m.groups() + kLanes - 1) / kLanes * kLanes;
    auto* panel = reinterpret_cast<uint8_t*>(scratch + padded * kLanes);
    if (tokens >= kFew) return gemm<kStorage>(m, from, to, rows, tokens, out, stride, onto, scratch, panel);
    constexpr int kMost = kWide<kStorage>;
    const auto run = m.group == kMost * kCodes    ? gemv<kStorage, kMost, true>
                     : m.group % (kMost * kCodes) ? gemv<kStorage, 1, false>
                                                  : gemv<kStorage, kMost, false>;
    for (int64_t t = 0; t < tokens; ++t) run(m, from, to, rows, t, out + t * stride, onto);
}

static void matmul_int8(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out,
                        int64_t stride, bool onto, float* scratch) {
    const auto run = m.storage == Storage::kInt8   ? matmul_storage<Storage::kInt8>
                     : m.storage == Storage::kInt4 ? matmul_storage<Storage::kInt4>
                                                   : matmul_storage<Storage::kInt3>;
    run(m, from, to, rows, tokens, out, stride, onto, scratch);
}

// See Kernels::macs_in_registers; the checksum keeps the compiler from removing the work.
static int64_t macs_in_registers(int64_t rounds, int32_t* checksum) {
    constexpr int kChains = 10;
    Ints sums[kChains];
    int8_t ones[16];
    std::memset(ones, 1, sizeof ones);
    Codes w[4];
    uint8_t bytes[kCodes];
    std::memset(bytes, 1, sizeof bytes);
    for (auto& v : w) v = load_codes(bytes);
    for (auto& s : sums) s = spread(0);
    for (int64_t i = 0; i < rounds; ++i)
        for (auto& s : sums) {
            keep_in_register(s);
            for (auto& v : w) keep_in_register(v);
            s = dot4<Storage::kInt4>(s, w, ones);
        }
    float lanes[kLanes];
    Floats all = zeros();
    for (const auto& s : sums) all = add(all, to_float(s));
    store_floats(lanes, all);
    *checksum = static_cast<int32_t>(lanes[0]);
    return rounds * kChains * 4 * kCodes;
}
