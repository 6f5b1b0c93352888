// The update rules: formulas only. The PyTorch formulas in fastrefine/samplers are their specification.
//
// observe   per slot: takes in a finite evaluation (loss inf for a trial that is to be rejected), returns "accept"
// start     per slot: the scalars of a sample that enters
// propose   per element: the next activation, from the standing position and the (clipped) gradient of the loss
#pragma once
#include <algorithm>
#include <cmath>

namespace fastrefine {

template <class T>
struct Scalars {
  T first = 0, second = 0;
};

template <class T>
inline T sigmoid(T d) {
  return 1 / (1 + std::exp(-d));
}

template <class T>
struct Rule {
  static constexpr bool rejects = false;
  static constexpr int scalars = 0, vectors = 0;

  static bool observe(T, T, bool, Scalars<T>&, const double*) { return true; }
  static Scalars<T> start(T, const double*) { return {}; }
};

template <class T>
struct Sgd : Rule<T> {
  T size;

  Sgd(const double* hyper, Scalars<T>, T, int) : size(static_cast<T>(hyper[0])) {}
  T propose(T a, T g, bool, T&, T&) const { return a - size * g; }
};

template <class T>
struct Backtracking : Rule<T> {  // scalars: loss and step size of the best point; vector: its gradient
  static constexpr bool rejects = true;
  static constexpr int scalars = 2, vectors = 1;
  T size;

  static bool observe(T, T loss, bool first, Scalars<T>& own, const double* hyper) {
    const bool accept = first || loss <= own.first + static_cast<T>(hyper[4]);
    const T size = own.second, largest = static_cast<T>(hyper[3] * hyper[0]);
    if (!first) own.second = accept ? std::min(size * static_cast<T>(hyper[1]), largest) : size * static_cast<T>(hyper[2]);
    if (accept) own.first = loss;
    return accept;
  }
  static Scalars<T> start(T, const double* hyper) { return {0, static_cast<T>(hyper[0])}; }

  Backtracking(const double*, Scalars<T> own, T, int) : size(own.second) {}
  T propose(T a, T g, bool accept, T& standing, T&) const {
    standing = accept ? g : standing;
    return a - size * standing;
  }
};

template <class T>
struct Adaptive : Rule<T> {  // scalar: s(d*) of the sample's real reference
  static constexpr int scalars = 1;
  T size;

  static Scalars<T> start(T reference_logit, const double*) { return {sigmoid(reference_logit), 0}; }

  Adaptive(const double* hyper, Scalars<T> own, T logit, int) {
    const T lead = own.first - sigmoid(logit);
    size = static_cast<T>(hyper[0]) * (lead < 0 ? 0 : lead);  // a NaN reference stays NaN
  }
  T propose(T a, T g, bool, T&, T&) const { return a - size * g; }
};

template <class T>
struct Momentum : Rule<T> {
  static constexpr int vectors = 1;
  T size, momentum;

  Momentum(const double* hyper, Scalars<T>, T, int)
      : size(static_cast<T>(hyper[0])), momentum(static_cast<T>(hyper[1])) {}
  T propose(T a, T g, bool, T& velocity, T&) const {
    velocity = momentum * velocity + size * g;
    return a - velocity;
  }
};

template <class T>
struct Adam : Rule<T> {
  static constexpr int vectors = 2;
  T keep1, take1, keep2, take2, epsilon, size, correction;

  Adam(const double* hyper, Scalars<T>, T, int step)
      : keep1(static_cast<T>(hyper[1])), take1(static_cast<T>(1 - hyper[1])), keep2(static_cast<T>(hyper[2])),
        take2(static_cast<T>(1 - hyper[2])), epsilon(static_cast<T>(hyper[3])),
        size(static_cast<T>(hyper[0] / (1 - std::pow(hyper[1], step + 1)))),
        correction(static_cast<T>(1 - std::pow(hyper[2], step + 1))) {}
  T propose(T a, T g, bool, T& m, T& v) const {
    m = keep1 * m + take1 * g;
    v = keep2 * v + take2 * g * g;
    return a - size * m / (std::sqrt(v / correction) + epsilon);
  }
};

template <class T>
struct Ladam : Rule<T> {  // scalar: smoothed gap between the discriminator's mean on real images and on this sample
  static constexpr int scalars = 1, vectors = 2;
  T rate, epsilon;
  bool first;

  static bool observe(T logit, T, bool first, Scalars<T>& own, const double* hyper) {
    const T gap = static_cast<T>(hyper[2]) - sigmoid(logit);
    own.first = first ? gap : T(0.5) * own.first + T(0.5) * gap;
    return true;
  }

  Ladam(const double* hyper, Scalars<T> own, T, int step) : epsilon(static_cast<T>(hyper[1])), first(step == 0) {
    const T lead = std::max(own.first + T(0.5), T(0));
    rate = static_cast<T>(hyper[0]) * (lead * lead);
  }
  T propose(T a, T g, bool, T& m, T& v) const {
    m = first ? g : T(0.9) * m + T(0.1) * g;
    v = first ? g * g : T(0.5) * v + T(0.5) * g * g;
    return a - rate * m / (std::sqrt(v) + epsilon);
  }
};

}  // namespace fastrefine
