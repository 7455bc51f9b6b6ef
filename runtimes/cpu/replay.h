// A test case of the whole decoder with expected logits, from one plain file: for platforms without Python.
#pragma once

#include "decoder.h"

namespace cobra_edge {

struct Replayed {
    double distance;  // relative RMS error of the logits at every position against those in the file
    bool int8;        // activations were quantized
};

// Run the case in `file`, written by tests/decode/native_case.py, on these kernels. Raises std::runtime_error where it is cut
// short.
Replayed replay(const char* file, const Kernels& kernels);

}  // namespace cobra_edge
