// Philox4x32-10 (Salmon et al., SC 2011): counter = (element / 4, step, sample id, stream), key = seed.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTREFINE_HD __host__ __device__
#else
#define FASTREFINE_HD
#endif

namespace fastrefine {

struct Words {
  std::uint32_t x, y, z, w;
};

FASTREFINE_HD inline Words philox(std::uint64_t seed, Words c) {
  auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c.x, p1 = std::uint64_t{0xCD9E8D57u} * c.z;
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c.y ^ key0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c.w ^ key1, static_cast<std::uint32_t>(p0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fastrefine
