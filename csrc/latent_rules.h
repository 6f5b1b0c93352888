// The rules that know the prior of what they refine, or need sums over it: as rules.h says.
#pragma once
#include <limits>

#include "rules.h"

namespace fastrefine {

// `a` reflected at the bounds until it lies inside; `turned`: an odd number of times.
template <class T>
inline T fold(T a, T low, T high, bool& turned) {
  const T width = high - low, period = 2 * width, above = a - low;
  turned = false;
  if (!std::isfinite(width)) return a;
  T distance = std::abs(above) < period ? above : std::fmod(above, period);  // the same number, mostly without a call
  if (distance < 0) distance += period;
  turned = distance > width;
  return clamp(turned ? high - (distance - width) : low + distance, low, high);
}

template <class T>
inline T energy_gradient(const Element<T>& e) {  // of the loss - log p0
  return e.g + e.precision * e.a;
}

template <class T, bool noisy>
struct Ddls : Rule<T> {  // schedule: eps / 2 and the scale of the noise, of each step
  static constexpr bool noise = noisy, latent = true;
  T size, scale;

  Ddls(const Standing<T>& slot, const double*) {
    const std::int64_t at = std::min<std::int64_t>(slot.step, slot.schedule_length - 1);
    size = slot.schedule[at], scale = slot.schedule[slot.schedule_length + at];
  }
  T propose(Element<T>& e) const {
    const T a = e.position - size * energy_gradient(e);
    bool turned;
    return fold(noisy ? a + scale * e.normal : a, e.low, e.high, turned);
  }
};

// Scalars: energy of the standing point, step size, tests passed. hyper: step size, adapt, target, decay, smallest, largest.
// Sums: precision a^2, elements outside the box, what the proposal's own law adds to the log ratio.
template <class T>
struct Metropolis : Rule<T> {
  static constexpr bool rejects = true, tests = true, noise = true, latent = true, moves = true;
  static constexpr int scalars = 3, sums = 3;

  static Scalars<T> start(T, const double* hyper) { return {0, static_cast<T>(hyper[0]), 0}; }

  static void prior_terms(const Element<T>& e, double* term) {
    term[0] = double(e.precision) * (double(e.a) * double(e.a));
    term[1] = e.a >= e.low && e.a <= e.high ? 0 : 1;
  }

  static bool test(const Trial<T>& trial, int number, Scalars<T>& own, const double* hyper, bool learns = true) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const bool first = trial.step == 0;
    const T energy = trial.loss - static_cast<T>(trial.sums[1] > 0 ? -kInfinity : -0.5 * trial.sums[0]);
    double log_ratio = double(own[0] - energy) + trial.sums[2];
    if (std::isnan(log_ratio)) log_ratio = -kInfinity;
    const bool accept = first || std::log(double(trial.uniform)) < log_ratio;
    if (!first && learns && trial.step <= hyper[1]) {
      const double gain = std::pow(double(number), -hyper[3]) * (std::exp(std::min(log_ratio, 0.0)) - hyper[2]);
      const T low = static_cast<T>(hyper[4] * hyper[0]), high = static_cast<T>(hyper[5] * hyper[0]);
      own[1] = clamp(own[1] * static_cast<T>(std::exp(gain)), low, high);
    }
    if (accept) own[0] = energy;
    own[2] += accept && !first;
    return accept;
  }
};

template <class T>
struct Mala : Metropolis<T> {  // vector: the energy's gradient at the standing point; hyper[6]: global_every, or 0
  static constexpr int vectors = 1;
  T half, root;
  bool accept, anew;

  // Whether the transition of this number proposes from the prior, which is normal.
  static bool global(int number, const double* hyper) { return hyper[6] > 0 && number % static_cast<int>(hyper[6]) == 0; }
  static void terms(const Element<T>& e, const Scalars<T>& own, int step, const double* hyper, double* term) {
    Metropolis<T>::prior_terms(e, term);
    const double before = e.v[0], after = energy_gradient(e), jump = double(e.a) - double(e.position);
    term[2] = global(step, hyper) ? 0.5 * double(e.precision) * jump * (double(e.a) + double(e.position))
                                  : 0.5 * (before + after) * (jump - 0.25 * double(own[1]) * (after - before));
  }
  static bool observe(const Trial<T>& trial, Scalars<T>& own, const double* hyper) {
    return Metropolis<T>::test(trial, trial.step, own, hyper, !global(trial.step, hyper));
  }

  Mala(const Standing<T>& slot, const double* hyper)
      : half(T(0.5) * slot.own[1]), root(std::sqrt(slot.own[1])), accept(slot.accept), anew(global(slot.step + 1, hyper)) {}
  T propose(Element<T>& e) const {
    e.v[0] = accept ? energy_gradient(e) : e.v[0];
    const T local = e.position - half * e.v[0] + root * e.normal;
    return anew ? e.normal : local;
  }
};

template <class T>
struct Pcn : Metropolis<T> {  // the prior is in the proposal. Vector: the loss's gradient at the standing point
  static constexpr int vectors = 1;
  T size, root;
  bool accept;

  static void terms(const Element<T>& e, const Scalars<T>& own, int, const double*, double* term) {
    const double before = e.v[0], after = e.g, z = e.position, trial = e.a;
    const double bent = 0.125 * double(own[1]) * (after - before) * (z + trial + before + after);
    term[0] = term[1] = 0, term[2] = 0.5 * (before + after) * (trial - z) - bent;
  }
  static bool observe(const Trial<T>& trial, Scalars<T>& own, const double* hyper) {
    return Metropolis<T>::test(trial, trial.step, own, hyper);
  }

  Pcn(const Standing<T>& slot, const double*) : size(slot.own[1]), root(4 * std::sqrt(slot.own[1])), accept(slot.accept) {}
  T propose(Element<T>& e) const {
    e.v[0] = accept ? e.g : e.v[0];
    return ((4 - size) * e.position - 2 * size * e.v[0] + root * e.normal) / (4 + size);
  }
};

template <class T>
struct Hmc : Metropolis<T> {  // vectors: the energy's gradient at the standing point, momentum; hyper[6, 7]: leapfrog, jitter
  static constexpr bool recalls = true, varies = true;
  static constexpr int vectors = 2;
  T size;
  bool accept, begins;

  static int length(const double* hyper) { return static_cast<int>(hyper[6]); }
  static bool turns(int step, const double* hyper) { return step % length(hyper) == 0; }
  static void pace(Scalars<T>& own, double uniform, const double* hyper) {
    own[1] *= static_cast<T>(1 + hyper[7] * (2 * uniform - 1));
  }
  static void terms(const Element<T>& e, const Scalars<T>& own, int, const double*, double* term) {
    Metropolis<T>::prior_terms(e, term);
    const double before = e.normal, after = double(e.v[1]) - 0.5 * double(own[1]) * double(energy_gradient(e));
    term[2] = 0.5 * (before - after) * (before + after);
  }
  static bool observe(const Trial<T>& trial, Scalars<T>& own, const double* hyper) {
    return turns(trial.step, hyper) && Metropolis<T>::test(trial, trial.step / length(hyper), own, hyper);
  }

  Hmc(const Standing<T>& slot, const double* hyper)
      : size(slot.own[1]), accept(slot.accept), begins(turns(slot.step, hyper)) {}
  T propose(Element<T>& e) const {
    const T force = energy_gradient(e);
    e.v[0] = accept ? force : e.v[0];
    const T momentum = begins ? e.normal - T(0.5) * size * e.v[0] : e.v[1] - size * force;
    bool turned;
    const T point = fold((begins ? e.position : e.a) + size * momentum, e.low, e.high, turned);
    e.v[1] = turned ? -momentum : momentum;
    return point;
  }
};

// Scalars: 1 / distance from the origin, share of the radial part. Vectors: origin, with Adam both moments.
// hyper: Adam's four, 1 / K_eff, shift, projection. Sums: |offset|^2, g a, offset a, |a|^2.
template <class T, bool adam>
struct Dot : Rule<T> {
  static constexpr bool clips = true, moves = true;
  static constexpr int scalars = 2, vectors = adam ? 3 : 1, sums = 4;
  enum Projection { kNone, kRadial, kPublished };
  AdamUpdate<T> update;
  T size, gain, shift, pull, radial;
  bool first;

  static void terms(const Element<T>& e, const Scalars<T>&, int step, const double* hyper, double* term) {
    const double offset = e.a - (step == 0 ? e.a : e.v[0]) + static_cast<T>(hyper[5]), a = e.a, g = e.g;
    term[0] = offset * offset, term[1] = g * a, term[2] = offset * a, term[3] = a * a;
  }
  static bool observe(const Trial<T>& trial, Scalars<T>& own, const double* hyper) {
    const double *sums = trial.sums, pull = 1 / std::sqrt(sums[0]), along = sums[1] * hyper[4] + sums[2] * pull;
    const int projection = static_cast<int>(hyper[6]);
    own[0] = static_cast<T>(pull), own[1] = 0;
    const double length = projection == kRadial ? sums[3] : std::sqrt(double(trial.features));
    if (projection != kNone && length > 0) own[1] = static_cast<T>(along / length);
    return true;
  }

  Dot(const Standing<T>& slot, const double* hyper)
      : update(slot.step, hyper), size(static_cast<T>(hyper[0])), gain(static_cast<T>(hyper[4])),
        shift(static_cast<T>(hyper[5])), pull(slot.own[0]), radial(slot.own[1]), first(slot.step == 0) {}
  T propose(Element<T>& e) const {
    const T a = e.position;
    e.v[0] = first ? a : e.v[0];
    const T g = e.g * gain + (a - e.v[0] + shift) * pull - a * radial;
    if constexpr (adam) return a - update(g, e.v[1], e.v[2]);
    return a - size * g;
  }
};

}  // namespace fastrefine
