// GEMV and GEMM with float32 activations, on the registers of matmul.inl. Weights are converted to float32 exactly; codes go
// through scratch memory. Every output is kLanes partial sums over the inputs k, k + kLanes, …, added from the first lane to
// the last: bit-identical whatever the number of tokens and however rows are split.

// kLanes values; load_some pads with zeros after `n`.
static inline Floats load(const float* p) { return load_floats(p); }
static inline Floats load(const uint16_t* p) { return widen_scales(p); }

static inline Floats load_some(const float* p, int64_t n) {
    float padded[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
    return load_floats(padded);
}

static inline Floats load_some(const uint16_t* p, int64_t n) {
    uint16_t padded[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
    return widen_scales(padded);
}

// out[i] = sum of the lanes of parts[i], for kLanes registers.
static inline void sum_lanes(const Floats* parts, float* out) {
    Ints columns[kLanes];
    for (int i = 0; i < kLanes; ++i) columns[i] = as_ints(parts[i]);
    transpose(columns);
    Floats total = as_floats(columns[0]);
    for (int i = 1; i < kLanes; ++i) total = add(total, as_floats(columns[i]));
    store_floats(out, total);
}

// sums[t * kRows + r] = weights[r] · x[t], both `cols` wide. kRows · kWide is a multiple of kLanes.
template <typename Weight, int kRows, int kWide>
static inline void float_tile(const Weight* const* weights, const float* x, int64_t x_stride, int64_t cols, float* sums) {
    Floats parts[kRows * kWide];
    for (auto& p : parts) p = zeros();
    const int64_t whole = cols / kLanes * kLanes;
    for (int64_t k = 0; k < whole; k += kLanes) {
        Floats in[kWide];
#pragma GCC unroll 4
        for (int t = 0; t < kWide; ++t) in[t] = load_floats(x + t * x_stride + k);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const Floats w = load(weights[r] + k);
#pragma GCC unroll 4
            for (int t = 0; t < kWide; ++t) parts[t * kRows + r] = multiply_add(w, in[t], parts[t * kRows + r]);
        }
    }
    if (whole < cols)
        for (int r = 0; r < kRows; ++r) {
            const Floats w = load_some(weights[r] + whole, cols - whole);
            for (int t = 0; t < kWide; ++t)
                parts[t * kRows + r] =
                    multiply_add(w, load_some(x + t * x_stride + whole, cols - whole), parts[t * kRows + r]);
        }
    for (int i = 0; i < kRows * kWide; i += kLanes) sum_lanes(parts + i, sums + i);
}

// Rows [r, r + n) of a matrix, n <= kRows; missing rows are replaced by the last one.
template <typename Weight, int kRows>
static void matmul_rows(const Weight* first, int64_t distance, int64_t n, int64_t cols, const float* x, int64_t x_stride,
                        int64_t tokens, float* out, int64_t stride, bool onto) {
    constexpr int kWide = kRows == 4 ? (kLanes == 4 ? 4 : kLanes / 4) : 1;
    const Weight* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = first + (i < n ? i : n - 1) * distance;
    float sums[kRows * kLanes];
    const auto write = [&](int64_t t, const float* values) {
        for (int64_t i = 0; i < n; ++i) out[t * stride + i] = onto ? out[t * stride + i] + values[i] : values[i];
    };
    int64_t t = 0;
    for (; t + kWide <= tokens; t += kWide) {
        float_tile<Weight, kRows, kWide>(rows, x + t * x_stride, x_stride, cols, sums);
        for (int j = 0; j < kWide; ++j) write(t + j, sums + j * kRows);
    }
    for (; t < tokens; ++t) {  // the same tile with one token repeated
        float_tile<Weight, kRows, kWide>(rows, x + t * x_stride, 0, cols, sums);
        write(t, sums);
    }
}

// GEMV with codes streamed from memory and widened in registers: code · scale - zero · scale, rounded once, is
// exactly the value that dequantize_row writes.
template <Storage kStorage>
static void gemv_float(const Matrix& m, int64_t from, int64_t to, const float* x, float* out, bool onto) {
    const int64_t groups = m.groups(), runs = m.group / kCodes, row_bytes = m.row_bytes(), group_bytes = row_bytes / groups;
    for (int64_t r = from; r < to; r += kLanes) {
        const Tile tile = tile_at(m, r, to);
        Floats parts[kLanes];
        for (int first = 0; first < kLanes; first += kTogether) {
            Floats sums[kTogether];
            for (auto& s : sums) s = zeros();
            for (int64_t g = 0; g < groups; ++g) {
                Floats scale[kTogether], zero[kTogether];
                for (int i = 0; i < kTogether; ++i) {
                    const uint8_t* ahead = tile.rows[first + i] + kTogether * row_bytes + g * group_bytes;
                    for (int64_t line = 0; line < group_bytes; line += 64) prefetch(ahead + line);
                    const float value = half_to_float(tile.scales[first + i][g]);
                    scale[i] = spread(value);
                    zero[i] = spread(-static_cast<float>(zero_of<kStorage>()) * value);
                }
                for (int64_t run = g * runs; run < (g + 1) * runs; ++run) {
                    Floats in[4];
                    for (int p = 0; p < 4; ++p) in[p] = load_floats(x + run * kCodes + p * kLanes);
#pragma GCC unroll 4
                    for (int i = 0; i < kTogether; ++i) {
                        Floats w[4];
                        widen_codes<kStorage>(unpack<kStorage>(tile.rows[first + i], run), w);
                        for (int p = 0; p < 4; ++p)
                            sums[i] = multiply_add(multiply_add(w[p], scale[i], zero[i]), in[p], sums[i]);
                    }
                }
            }
            for (int i = 0; i < kTogether; ++i) parts[first + i] = sums[i];
        }
        float sums[kLanes];
        sum_lanes(parts, sums);
        for (int64_t i = 0; i < tile.here; ++i) out[r + i] = onto ? out[r + i] + sums[i] : sums[i];
    }
}

static void matmul_float(const Matrix& m, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                         float* out, int64_t stride, bool onto, float* scratch) {
    const int64_t cols = m.cols;
    if (m.storage == Storage::kFloat16 && tokens == 1) {
        const auto* values = static_cast<const uint16_t*>(m.values);
        for (int64_t r = from; r < to; r += kLanes)
            matmul_rows<uint16_t, kLanes>(values + r * cols, cols, to - r < kLanes ? to - r : kLanes, cols, x, x_stride, 1,
                                          out + r, stride, onto);
        return;
    }
    if (m.quantized() && m.group % kCodes == 0 && tokens == 1) {
        const auto run = m.storage == Storage::kInt8   ? gemv_float<Storage::kInt8>
                         : m.storage == Storage::kInt4 ? gemv_float<Storage::kInt4>
                                                       : gemv_float<Storage::kInt3>;
        return run(m, from, to, x, out, onto);
    }
    for (int64_t r = from; r < to; r += 4) {
        const int64_t n = to - r < 4 ? to - r : 4;
        const float* rows = scratch;
        if (m.storage == Storage::kFloat32)
            rows = static_cast<const float*>(m.values) + r * cols;
        else
            for (int64_t k = 0; k < n; ++k) dequantize_row(m, r + k, scratch + k * cols);
        matmul_rows<float, 4>(rows, cols, n, cols, x, x_stride, tokens, out + r, stride, onto);
    }
}
