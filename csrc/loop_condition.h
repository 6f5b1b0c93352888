// Whether the device loop goes on, written once: for the kernel that sets the condition and for the tests' fake runtime.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTREFINE_HOST_DEVICE __host__ __device__
#else
#define FASTREFINE_HOST_DEVICE
#endif

namespace fastrefine {

// The argument of the setter kernel, by value.
struct Setter {
  unsigned long long handle;     // cudaGraphConditionalHandle
  const std::int64_t* counters;  // of the run, order as in fastrefine/slots.py
  std::int64_t* control;         // steps of this launch, cap on them, low-water mark
  bool begins;                   // whether the launch begins here; else a step has just ended
};

// Counts the steps and says whether the body runs (again): while a slot is live, below the cap, and enough ids wait.
FASTREFINE_HOST_DEVICE inline bool advance(const Setter& setter) {
  const std::int64_t next = setter.counters[0], end = setter.counters[1], live = setter.counters[2];
  std::int64_t& steps = setter.control[0];
  const std::int64_t cap = setter.control[1], low = setter.control[2];
  steps = setter.begins ? 0 : steps + 1;
  return live > 0 && steps < cap && end - next >= low;
}

}  // namespace fastrefine
