// The only CUDA kernel of the device loop: one thread that reads the counters and sets the WHILE node's condition.
#include <cuda_runtime.h>

#include "loop_condition.h"

namespace fastrefine {

static __global__ void set_condition(const Setter setter) {
  cudaGraphSetConditional(setter.handle, advance(setter) ? 1u : 0u);
}

const void* set_condition_kernel() { return reinterpret_cast<const void*>(&set_condition); }

}  // namespace fastrefine
