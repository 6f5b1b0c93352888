// The update rules: formulas only. The PyTorch formulas in fastrefine/samplers are their specification.
//
// start     per slot: the scalars of a sample that enters; its vectors are 0
// terms     per element, for rules with sums: what it adds to each sum over the slot's features, before `observe`
// observe   per slot: takes in an evaluation (loss inf for a trial that is to be rejected), returns "accept"
// advance   per slot that goes on: the scalars that change with the proposal
// pace      per slot, for rules that vary: the scalars as `terms` and `propose` read them in this transition
// propose   per element: the next activation; vectors are updated in place
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace fastrefine {

template <class T>
using Scalars = std::array<T, 4>;  // the rule's, in the order of Kernel.scalars; what is over lives from observe to advance

template <class T>
struct Trial {  // what `observe` takes in
  T logit, loss;
  int step;
  const double* sums;
  T uniform;  // in (0, 1), for rules with a test
  std::int64_t features;
};

template <class T>
struct Standing {  // what `propose` knows of its slot
  Scalars<T> own;
  T logit;
  int step;
  bool accept;  // whether the trial became the standing point
  const T* schedule;
  std::int64_t schedule_length;
};

template <class T>
struct Element {
  T a, position;  // the activation that was evaluated, where the sample stands
  T g;            // gradient of the loss at `a`, clipped
  T normal;       // for rules with noise
  T precision, low, high;  // for rules with a latent
  T v[3];                  // in the order of Kernel.vectors
};

template <class T>
inline T sigmoid(T d) {
  return 1 / (1 + std::exp(-d));
}

template <class T>
inline T clamp(T a, T low, T high) {
  return a < low ? low : a > high ? high : a;  // NaN stays
}

template <class T>
struct Rule {
  static constexpr bool rejects = false, tests = false;  // tests: needs every finite gradient, and a uniform
  static constexpr bool noise = false, recalls = false;  // recalls: `terms` reads the normals of the last transition
  static constexpr bool moves = false;   // without a gradient of D too: by noise or by the prior
  static constexpr bool varies = false;  // its step size is another in each transition
  static constexpr bool latent = false, clips = false;   // reads the table; is clipped to it, where there is one
  static constexpr int scalars = 0, vectors = 0, sums = 0;

  // Whether a transition ends, and the next begins: only then are sums and normals made.
  static bool turns(int, const double*) { return true; }
  static Scalars<T> start(T, const double*) { return {}; }
  static bool observe(const Trial<T>&, Scalars<T>&, const double*) { return true; }
  static void advance(T, int, Scalars<T>&, const double*) {}
};

template <class T, bool noisy>
struct Sgd : Rule<T> {
  static constexpr bool noise = noisy;
  T size, scale;

  Sgd(const Standing<T>&, const double* hyper) : size(static_cast<T>(hyper[0])), scale(static_cast<T>(hyper[1])) {}
  T propose(Element<T>& e) const {
    const T a = e.position - size * e.g;
    return noisy ? a + scale * e.normal : a;
  }
};

template <class T>
struct Backtracking : Rule<T> {  // scalars: loss and step size of the best point; vector: its gradient
  static constexpr bool rejects = true;
  static constexpr int scalars = 2, vectors = 1;
  T size;
  bool accept;

  static Scalars<T> start(T, const double* hyper) { return {0, static_cast<T>(hyper[0])}; }
  static bool observe(const Trial<T>& trial, Scalars<T>& own, const double* hyper) {
    const bool first = trial.step == 0, accept = first || trial.loss <= own[0] + static_cast<T>(hyper[4]);
    const T size = own[1], largest = static_cast<T>(hyper[3] * hyper[0]);
    if (!first) own[1] = accept ? std::min(size * static_cast<T>(hyper[1]), largest) : size * static_cast<T>(hyper[2]);
    if (accept) own[0] = trial.loss;
    return accept;
  }

  Backtracking(const Standing<T>& slot, const double*) : size(slot.own[1]), accept(slot.accept) {}
  T propose(Element<T>& e) const {
    e.v[0] = accept ? e.g : e.v[0];
    return e.position - size * e.v[0];
  }
};

template <class T>
struct BarzilaiBorwein : Backtracking<T> {  // as backtracking; hyper: size, widen, shrink, least, most, largest, slack
  static constexpr int sums = 2;            // s's and s'y of the last move

  static void terms(const Element<T>& e, const Scalars<T>&, int, const double*, double* term) {
    const double move = double(e.a) - double(e.position);
    term[0] = move * move, term[1] = move * (double(e.g) - double(e.v[0]));
  }
  static bool observe(const Trial<T>& trial, Scalars<T>& own, const double* hyper) {
    const bool first = trial.step == 0, accept = first || trial.loss <= own[0] + static_cast<T>(hyper[6]);
    const double size = own[1], moved = trial.sums[0], bent = trial.sums[1];
    const double wanted = bent > 0 && std::isfinite(bent) ? moved / bent : hyper[1] * size;
    const double fitted = std::min(std::min(std::max(wanted, hyper[3] * size), hyper[4] * size), hyper[5] * hyper[0]);
    own[2] = accept ? trial.loss : own[0];
    own[3] = first ? own[1] : static_cast<T>(accept ? fitted : hyper[2] * size);
    return accept;
  }
  static void advance(T, int, Scalars<T>& own, const double*) { own[0] = own[2], own[1] = own[3]; }

  using Backtracking<T>::Backtracking;
};

template <class T>
struct Adaptive : Rule<T> {  // scalar: s(d*) of the sample's real reference
  static constexpr int scalars = 1;
  T size;

  static Scalars<T> start(T reference_logit, const double*) { return {sigmoid(reference_logit)}; }

  Adaptive(const Standing<T>& slot, const double* hyper) {
    const T lead = slot.own[0] - sigmoid(slot.logit);
    size = static_cast<T>(hyper[0]) * (lead < 0 ? 0 : lead);  // a NaN reference stays NaN
  }
  T propose(Element<T>& e) const { return e.position - size * e.g; }
};

template <class T>
struct Momentum : Rule<T> {
  static constexpr int vectors = 1;
  T size, momentum;

  Momentum(const Standing<T>&, const double* hyper)
      : size(static_cast<T>(hyper[0])), momentum(static_cast<T>(hyper[1])) {}
  T propose(Element<T>& e) const {
    e.v[0] = momentum * e.v[0] + size * e.g;
    return e.position - e.v[0];
  }
};

template <class T>
struct AdamUpdate {  // hyper: step size, two decays, epsilon
  T keep1, take1, keep2, take2, epsilon, size, correction;

  AdamUpdate(int step, const double* hyper)
      : keep1(static_cast<T>(hyper[1])), take1(static_cast<T>(1 - hyper[1])), keep2(static_cast<T>(hyper[2])),
        take2(static_cast<T>(1 - hyper[2])), epsilon(static_cast<T>(hyper[3])),
        size(static_cast<T>(hyper[0] / (1 - std::pow(hyper[1], step + 1)))),
        correction(static_cast<T>(1 - std::pow(hyper[2], step + 1))) {}
  T operator()(T g, T& m, T& v) const {
    m = keep1 * m + take1 * g;
    v = keep2 * v + take2 * g * g;
    return size * m / (std::sqrt(v / correction) + epsilon);
  }
};

template <class T>
struct Adam : Rule<T> {
  static constexpr int vectors = 2;
  AdamUpdate<T> update;

  Adam(const Standing<T>& slot, const double* hyper) : update(slot.step, hyper) {}
  T propose(Element<T>& e) const { return e.position - update(e.g, e.v[0], e.v[1]); }
};

template <class T>
struct Ladam : Rule<T> {  // scalar: smoothed gap between the discriminator's mean on real images and on this sample
  static constexpr int scalars = 1, vectors = 2;
  T rate, epsilon;
  bool first;

  static void advance(T logit, int step, Scalars<T>& own, const double* hyper) {
    const T gap = static_cast<T>(hyper[2]) - sigmoid(logit);
    own[0] = step == 0 ? gap : T(0.5) * own[0] + T(0.5) * gap;
  }

  Ladam(const Standing<T>& slot, const double* hyper) : epsilon(static_cast<T>(hyper[1])), first(slot.step == 0) {
    const T lead = std::max(slot.own[0] + T(0.5), T(0));
    rate = static_cast<T>(hyper[0]) * (lead * lead);
  }
  T propose(Element<T>& e) const {
    e.v[0] = first ? e.g : T(0.9) * e.v[0] + T(0.1) * e.g;
    e.v[1] = first ? e.g * e.g : T(0.5) * e.v[1] + T(0.5) * e.g * e.g;
    return e.position - rate * e.v[0] / (std::sqrt(e.v[1]) + epsilon);
  }
};

}  // namespace fastrefine
