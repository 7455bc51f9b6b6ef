// Arguments of the C interface, checked and converted to the kernels' types.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "cobra_cpu.h"
#include "kernels.h"

namespace cobra_edge {

void remember_error(const char* message) noexcept;

// Run a function; return what it raised as a code, its message remembered.
template <typename Function>
int guarded(const Function& function) noexcept {
    const auto failed = [](CobraCode code, const char* message) {
        remember_error(message);
        return code;
    };
    try {
        function();
        return kCobraOk;
    } catch (const std::invalid_argument& error) {
        return failed(kCobraInvalid, error.what());
    } catch (const std::out_of_range& error) {
        return failed(kCobraOutOfRange, error.what());
    } catch (const std::bad_alloc&) {
        return failed(kCobraNoMemory, "out of memory");
    } catch (const std::exception& error) {
        return failed(kCobraFailed, error.what());
    } catch (...) {
        return failed(kCobraFailed, "unknown exception");
    }
}

// Raise std::invalid_argument unless `ok`.
void expect(bool ok, const char* what);

// The kernels with that name, "auto" for the best. Raises std::invalid_argument that lists the available names.
const Kernels& kernels_named(const std::string& name);

// The number of an array's elements. Raises std::invalid_argument if its rank or a size is out of range.
int64_t size_of(const std::string& name, const CobraArray& array);

// The values of a float32 array. Raises std::invalid_argument if it is none, or not aligned.
float* floats_in(const std::string& name, const CobraArray& array);

// A matrix with `cols` inputs: float values without scales, or packed codes with scales and optional clips. Raises
// std::invalid_argument if they do not match.
Matrix matrix_from(const std::string& name, const CobraArray& values, const CobraArray* scales, const CobraArray* clips,
                   int64_t cols);

}  // namespace cobra_edge
