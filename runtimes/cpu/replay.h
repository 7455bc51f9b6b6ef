// A whole decoder with an answer it has to give, from one plain file: for places without Python.
#pragma once

#include "decoder.h"

namespace cobra_edge {

struct Replayed {
    double distance;  // relative RMS, of the logits at every position from those in the file
    bool int8;        // activations were rounded
};

// Run the case in `file`, written by tests/decode/native_case.py, on these kernels. Raises std::runtime_error where it is cut short.
Replayed replay(const char* file, const Kernels& kernels);

}  // namespace cobra_edge
