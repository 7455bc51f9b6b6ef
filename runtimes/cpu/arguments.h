// Arguments from Python, checked and converted to the kernels' types.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace cobra_edge {

namespace nb = nanobind;

// Read-only, of any dtype and rank; checked later.
using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
template <int kRank>
using In = nb::ndarray<const float, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
template <int kRank>
using InOut = nb::ndarray<float, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::numpy, float>;

// The kernels with that name, "auto" for the best. Raises std::invalid_argument that lists the available names.
const Kernels& kernels_named(const std::string& name);
std::vector<std::string> kernel_names();

// A new numpy array, uninitialized.
Out fresh(std::initializer_list<size_t> shape);

inline int64_t dim(const Array& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

// A matrix with `cols` inputs: float values without scales, or packed codes with scales and optional clips. Raises
// std::invalid_argument if they do not match.
Matrix matrix_from(const std::string& name, const Array& values, const Array* scales, const Array* clips, int64_t cols);

// The array with that name. Raises std::invalid_argument if it is missing or its elements are not aligned.
Array array_of(const nb::dict& tensors, const std::string& name);

// Individual kernels, for tests: cobra_edge.decode._cpu.kernels.
void bind_kernels(nb::module_& m);

}  // namespace cobra_edge
