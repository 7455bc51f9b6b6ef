// Cover rows [from, to) and all tokens with tiles of kRows × kTokens; `tile` belongs to the file that includes this.
//
// A handful of rows stays in the first-level cache while every token passes by; for a single token, four rows at once keep
// several streams from memory in flight.
template <Storage kStorage, int kRows, int kTokens>
void cover(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out, int64_t stride,
           bool add) {
    int64_t r = from;
    if (tokens < kTokens) {
        for (; r + 4 <= to; r += 4)
            for (int64_t t = 0; t < tokens; ++t) tile<kStorage, 4, 1>(m, r, t, rows, out, stride, add);
    } else {
        for (; r + kRows <= to; r += kRows) {
            int64_t t = 0;
            for (; t + kTokens <= tokens; t += kTokens) tile<kStorage, kRows, kTokens>(m, r, t, rows, out, stride, add);
            for (; t < tokens; ++t) tile<kStorage, kRows, 1>(m, r, t, rows, out, stride, add);
        }
    }
    for (; r < to; ++r)
        for (int64_t t = 0; t < tokens; ++t) tile<kStorage, 1, 1>(m, r, t, rows, out, stride, add);
}

template <int kRows, int kTokens>
void multiply_int8(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out, int64_t stride,
                   bool add) {
    const auto run =
        m.storage == Storage::kInt4 ? cover<Storage::kInt4, kRows, kTokens> : cover<Storage::kInt8, kRows, kTokens>;
    run(m, from, to, rows, tokens, out, stride, add);
}
