// Standard normals by Box-Muller over Philox, in double whatever the state's type: see fastrefine/noise.py.
#pragma once
#include <cstdint>

namespace fastrefine {

constexpr int kLanes = 64;  // most Philox blocks made at once, so that the compiler can use vector units

// Writes 4 * lanes normals, lanes <= kLanes: those of the elements 4 * block ... of one sample.
void normals(std::uint64_t seed, std::uint32_t id, std::uint32_t step, std::uint32_t stream, std::uint32_t block, int lanes,
             double* out);

}  // namespace fastrefine
