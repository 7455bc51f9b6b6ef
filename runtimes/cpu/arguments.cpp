#include "arguments.h"

namespace cobra_edge {
namespace {

constexpr nb::dlpack::dtype kU8{static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 8, 1};
constexpr nb::dlpack::dtype kF16{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
constexpr nb::dlpack::dtype kF32{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 32, 1};

}  // namespace

std::vector<std::string> kernel_names() {
    int count = 0;
    const Kernels* const* found = available_kernels(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(found[i]->name);
    return names;
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

Out fresh(std::initializer_list<size_t> shape) {
    size_t size = 1;
    for (const size_t s : shape) size *= s;
    auto* values = new float[size];
    const nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return Out(values, shape, owner);
}

Array array_of(const nb::dict& tensors, const std::string& name) {
    if (!tensors.contains(name.c_str())) throw std::invalid_argument("tensor " + name + " is missing");
    Array array;  // never a copy: the decoder keeps pointers into it
    if (!nb::try_cast<Array>(tensors[name.c_str()], array, false))
        throw std::invalid_argument("tensor " + name + " is not a contiguous array in this machine's memory");
    const auto align = static_cast<uintptr_t>(array.dtype().bits / 8);
    if (align == 0 || reinterpret_cast<uintptr_t>(array.data()) % align)
        throw std::invalid_argument("tensor " + name + " is not aligned to its element size");
    return array;
}

Matrix matrix_from(const std::string& name, const Array& values, const Array* scales, const Array* clips, int64_t cols) {
    Matrix m;
    m.values = values.data();
    if (values.ndim() != 2) throw std::invalid_argument("tensor " + name + " is not a matrix");
    m.rows = dim(values, 0);
    m.cols = dim(values, 1);
    if (scales == nullptr) {
        if (values.dtype() != kF32 && values.dtype() != kF16)
            throw std::invalid_argument("tensor " + name + " is neither float32 nor float16, and has no scales");
        m.storage = values.dtype() == kF32 ? Storage::kFloat32 : Storage::kFloat16;
        return m;
    }
    if (values.dtype() != kU8 || scales->dtype() != kF16 || scales->ndim() != 2)
        throw std::invalid_argument("tensor " + name + " is not uint8 codes with a matrix of float16 scales");
    const int64_t bytes = m.cols, groups = dim(*scales, 1);
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
    if (dim(*scales, 0) != m.rows || groups < 1 || cols % groups || cols / groups % block)
        throw std::invalid_argument("tensor " + name + ": its scales do not fit its codes in groups of a multiple of " +
                                    std::to_string(block));
    m.scales = static_cast<const uint16_t*>(scales->data());
    m.group = cols / groups;
    if (clips == nullptr) return m;
    if (clips->dtype() != kF32 || clips->ndim() != 1 || dim(*clips, 0) != groups)
        throw std::invalid_argument("tensor " + name + ": its clips are not " + std::to_string(groups) +
                                    " of float32, one per group");
    m.clips = static_cast<const float*>(clips->data());
    return m;
}

}  // namespace cobra_edge
