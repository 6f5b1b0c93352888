#include "normal.h"

#include <cmath>
#include <cstring>

#include "philox.h"

// One clone per vector width, chosen at load time. Contraction to FMA is off (setup.py), so all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FASTREFINE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTREFINE_CLONES
#endif

namespace fastrefine {
namespace {

// Words are cut to 23 bits; the middle of their interval is u = m 2^-24 with m odd: exact, never 0 nor 1.
inline std::int32_t odd(std::uint32_t word) { return static_cast<std::int32_t>((word >> 9) << 1 | 1u); }

// log(m 2^-24): x = 2^e f with f in [sqrt(1/2), sqrt(2)), log f = 2 atanh((f - 1) / (f + 1)).
inline double log_unit(std::int32_t m) {
  const double x = m * 0x1p-24;
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint64_t above = (bits & 0xFFFFFFFFFFFFFull) > 0x6A09E667F3BCDull ? 1 : 0;  // fraction over sqrt(2)
  const std::uint64_t exponent = (bits >> 52) + above;
  const std::uint64_t scaled = (bits & 0xFFFFFFFFFFFFFull) | ((1023 - above) << 52);
  const std::uint64_t shifted = exponent | 0x4330000000000000ull;  // 2^52 + exponent, as a double
  double f, e;
  std::memcpy(&f, &scaled, sizeof f);
  std::memcpy(&e, &shifted, sizeof e);
  const double s = (f - 1) / (f + 1), t = s * s;
  double sum = 1.0 / 19;
  for (int k = 17; k >= 1; k -= 2) sum = sum * t + 1.0 / k;
  return (e - (0x1p52 + 1023)) * 0.693147180559945309417 + 2 * s * sum;
}

// cos and sin of 2 pi m 2^-24: the nearest quarter turn is split off exactly, Taylor for the rest (at most pi / 4).
inline void turn(std::int32_t m, double& cosine, double& sine) {
  const std::int32_t quarter = (m + (1 << 21)) >> 22;
  const double x = (m - quarter * (1 << 22)) * (6.28318530717958647692 * 0x1p-24), t = x * x;
  double s = 1, c = 1;
  for (int k = 16; k >= 2; k -= 2) {
    s = 1 - s * t * (1.0 / (k * (k + 1)));
    c = 1 - c * t * (1.0 / (k * (k - 1)));
  }
  s *= x;
  const double first = quarter & 1 ? s : c, second = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -first : first;
  sine = quarter & 2 ? -second : second;
}

}  // namespace

FASTREFINE_CLONES
void normals(std::uint64_t seed, std::uint32_t id, std::uint32_t step, std::uint32_t stream, std::uint32_t block,
             int lanes, double* out) {
  std::int32_t m0[kLanes], m1[kLanes], m2[kLanes], m3[kLanes];
  for (int i = 0; i < lanes; ++i) {
    const Words r = philox(seed, {block + static_cast<std::uint32_t>(i), step, id, stream});
    m0[i] = odd(r.x), m1[i] = odd(r.y), m2[i] = odd(r.z), m3[i] = odd(r.w);
  }
  double cosine[kLanes], sine[kLanes], radius[kLanes];
  for (int half = 0; half < 2; ++half) {
    const std::int32_t *length = half ? m2 : m0, *angle = half ? m3 : m1;
    for (int i = 0; i < lanes; ++i) radius[i] = std::sqrt(-2 * log_unit(length[i]));
    for (int i = 0; i < lanes; ++i) turn(angle[i], cosine[i], sine[i]);
    for (int i = 0; i < lanes; ++i) {
      out[4 * i + 2 * half] = radius[i] * cosine[i];
      out[4 * i + 2 * half + 1] = radius[i] * sine[i];
    }
  }
}

}  // namespace fastrefine
