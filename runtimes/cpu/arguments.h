// What Python hands over, checked and turned into what the kernels take.
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

// Read-only, of any dtype and rank; what it is gets checked.
using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
template <int kRank>
using In = nb::ndarray<const float, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
template <int kRank>
using InOut = nb::ndarray<float, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::numpy, float>;

// The kernels of a name, "auto" for the best. Raises std::invalid_argument with the names there are.
const Kernels& kernels_named(const std::string& name);
std::vector<std::string> kernel_names();

// A new numpy array, not filled.
Out fresh(std::initializer_list<size_t> shape);

inline int64_t dim(const Array& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

// A matrix with `cols` inputs: float values without scales, or packed codes with scales and perhaps clips. Raises
// std::invalid_argument where they do not fit each other.
Matrix matrix_from(const std::string& name, const Array& values, const Array* scales, const Array* clips, int64_t cols);

// The array of a name; raises std::invalid_argument when it is missing or its elements are not aligned.
Array array_of(const nb::dict& tensors, const std::string& name);

// Kernels one by one, for tests: cobra_edge.decode._cpu.kernels.
void bind_kernels(nb::module_& m);

}  // namespace cobra_edge
