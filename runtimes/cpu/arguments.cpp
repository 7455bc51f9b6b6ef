#include "arguments.h"

#include <cstdint>

namespace cobra_edge {
namespace {

thread_local char last_error[1024];

int64_t bytes_of_element(int32_t dtype) { return dtype == kCobraFloat32 ? 4 : dtype == kCobraFloat16 ? 2 : 1; }

}  // namespace

void remember_error(const char* message) noexcept { std::snprintf(last_error, sizeof last_error, "%s", message); }

void expect(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

const Kernels& kernels_named(const std::string& name) {
    int count = 0;
    const Kernels* const* found = available_kernels(&count);
    std::string names;
    for (int i = 0; i < count; ++i) {
        if (name == "auto" || name == found[i]->name) return *found[i];
        names += std::string(i ? ", " : "") + found[i]->name;
    }
    throw std::invalid_argument("this processor has no kernels named '" + name + "'; available: " + names);
}

int64_t size_of(const std::string& name, const CobraArray& array) {
    bool fits = array.rank >= 0 && array.rank <= kCobraMaxRank;
    int64_t size = 1;
    for (int i = 0; fits && i < array.rank; ++i) {
        const int64_t n = array.shape[i];
        fits = n >= 0 && (n == 0 || size <= INT64_MAX / 8 / n);
        size *= n;
    }
    if (!fits) throw std::invalid_argument("tensor " + name + " has a shape that no array has");
    if (size > 0 && array.data == nullptr) throw std::invalid_argument("tensor " + name + " has no memory");
    if (reinterpret_cast<uintptr_t>(array.data) % static_cast<uintptr_t>(bytes_of_element(array.dtype)))
        throw std::invalid_argument("tensor " + name + " is not aligned to its element size");
    return size;
}

float* floats_in(const std::string& name, const CobraArray& array) {
    size_of(name, array);
    if (array.dtype != kCobraFloat32) throw std::invalid_argument("tensor " + name + " is not float32");
    return static_cast<float*>(array.data);
}

Matrix matrix_from(const std::string& name, const CobraArray& values, const CobraArray* scales, const CobraArray* clips,
                   int64_t cols) {
    for (const CobraArray* each : {&values, scales, clips})
        if (each != nullptr) size_of(name, *each);
    Matrix m;
    m.values = values.data;
    if (values.rank != 2) throw std::invalid_argument("tensor " + name + " is not a matrix");
    m.rows = values.shape[0];
    m.cols = values.shape[1];
    if (scales == nullptr) {
        if (values.dtype != kCobraFloat32 && values.dtype != kCobraFloat16)
            throw std::invalid_argument("tensor " + name + " is neither float32 nor float16, and has no scales");
        m.storage = values.dtype == kCobraFloat32 ? Storage::kFloat32 : Storage::kFloat16;
        return m;
    }
    if (values.dtype != kCobraUint8 || scales->dtype != kCobraFloat16 || scales->rank != 2)
        throw std::invalid_argument("tensor " + name + " is not uint8 codes with a matrix of float16 scales");
    const int64_t bytes = m.cols, groups = scales->shape[1];
    m.cols = cols;
    for (const auto storage : {Storage::kInt8, Storage::kInt4, Storage::kInt3}) {
        m.storage = storage;
        if (cols % block_of(storage) == 0 && m.row_bytes() == bytes) break;
        m.storage = Storage::kFloat32;
    }
    if (!m.quantized())
        throw std::invalid_argument("tensor " + name + ": " + std::to_string(bytes) +
                                    " bytes per row hold neither 8-, 4- nor " + "3-bit codes of " + std::to_string(cols) +
                                    " inputs");
    const int64_t block = block_of(m.storage);
    if (scales->shape[0] != m.rows || groups < 1 || cols % groups || cols / groups % block)
        throw std::invalid_argument("tensor " + name + ": its scales do not fit its codes in groups of a multiple of " +
                                    std::to_string(block));
    m.scales = static_cast<const uint16_t*>(scales->data);
    m.group = cols / groups;
    if (clips == nullptr) return m;
    if (clips->dtype != kCobraFloat32 || clips->rank != 1 || clips->shape[0] != groups)
        throw std::invalid_argument("tensor " + name + ": its clips are not " + std::to_string(groups) +
                                    " of float32, one per group");
    m.clips = static_cast<const float*>(clips->data);
    return m;
}

}  // namespace cobra_edge

const char* cobra_error() { return cobra_edge::last_error; }
