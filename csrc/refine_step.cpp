#include "refine_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "normal.h"
#include "rules.h"

namespace fastrefine {
namespace {

constexpr std::int64_t kBlock = 2048;  // features per task: what a task touches stays in the core's cache
constexpr int kPartial = 16;           // lanes of the fixed-order sums
static_assert(kBlock % (4 * kLanes) == 0, "a block of features is whole batches of noise");

struct Plan {  // what `apply` does to one slot
  bool accept = false, better = false, update = false, done = false;
  int step = 0;
  std::int64_t id = -1, output_row = -1, pool_row = -1;
  double clip = 1;
};

template <class T, class R>
class Step {
 public:
  Step(const Params& params, Address logit, Address loss, Address grad, int threads)
      : p(params), trial_logit(at<const T>(logit)), trial_loss(at<const T>(loss)), grad(at<const T>(grad)),
        logit(at<T>(p.logit)), step(at<std::int32_t>(p.step)), sample_id(at<std::int64_t>(p.sample_id)),
        counters(at<std::int64_t>(p.counters)), plans(p.num_slots), peaks(p.num_slots), norms(p.num_slots),
        threads(static_cast<int>(std::clamp<std::int64_t>(p.num_slots * p.features >> 16, 1, std::max(threads, 1)))) {}

  void run() {
    if (trial_logit) {
      reduce();
      for (std::int64_t s = 0; s < p.num_slots; ++s)
        if (sample_id[s] >= 0 && (grad || last(s))) observe(s);  // the others wait for a gradient
      ++counters[kIterations];
    }
    refill();
    apply();
  }

 private:
  template <class U>
  static U* at(Address address) {
    return reinterpret_cast<U*>(address);
  }

  bool last(std::int64_t s) const { return step[s] >= at<std::int32_t>(p.last_step)[s]; }

  // Largest |gradient| (inf if any is not finite) and, for the clip, its norm. A last gradient is never read.
  void reduce() {
    if (!grad) return;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t s = 0; s < p.num_slots; ++s) {
      if (sample_id[s] < 0 || last(s)) continue;
      const T* g = grad + s * p.features;
      T peak[kPartial] = {};
      double sum[kPartial] = {};
      std::int64_t i = 0;
      for (; i + kPartial <= p.features; i += kPartial)
        for (int k = 0; k < kPartial; ++k) peak[k] = std::max(peak[k], magnitude(g[i + k]));
      for (int k = 0; i + k < p.features; ++k) peak[k] = std::max(peak[k], magnitude(g[i + k]));
      peaks[s] = *std::max_element(peak, peak + kPartial);
      if (p.max_grad_norm < 0) continue;
      for (i = 0; i + kPartial <= p.features; i += kPartial)
        for (int k = 0; k < kPartial; ++k) sum[k] += double(g[i + k]) * double(g[i + k]);
      for (int k = 0; i + k < p.features; ++k) sum[k] += double(g[i + k]) * double(g[i + k]);
      double total = 0;
      for (double part : sum) total += part;
      norms[s] = std::sqrt(total);
    }
  }

  static T magnitude(T g) {
    const T m = std::abs(g);
    return m <= std::numeric_limits<T>::max() ? m : std::numeric_limits<T>::infinity();
  }

  void observe(std::int64_t s) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    Plan& plan = plans[s];
    const bool first = step[s] == 0, final = last(s);
    const T d = trial_logit[s], loss = trial_loss[s];
    const bool met = !final && std::isfinite(peaks[s]);
    const bool finite = std::isfinite(d) && std::isfinite(loss) && (met || final);
    const bool bad = !finite && (first || !R::rejects);
    T& peak = at<T>(p.grad_peak)[s];
    T& initial = at<T>(p.initial_logit)[s];
    if (met) peak = std::max(peak, peaks[s]);
    at<std::int32_t>(p.logit_falls)[s] += !first && d < logit[s];
    if (first) initial = d;

    if (!bad) {
      Scalars<T> own = scalars(s);
      plan.accept = R::observe(finite ? d : -kInfinity, finite ? loss : kInfinity, first, own, p.hyper.data());
      store(s, own);
      if (plan.accept) logit[s] = d;
    } else if (first) {
      logit[s] = d;
    }
    T* best_logit = at<T>(p.best_logit);
    plan.better = best_logit && (first || (!bad && logit[s] > best_logit[s]));
    if (plan.better) best_logit[s] = logit[s];

    const bool reached = !bad && logit[s] >= at<T>(p.threshold)[s];
    plan.done = bad || reached || final;
    plan.update = !plan.done;
    plan.id = sample_id[s];
    plan.step = step[s];
    if (p.max_grad_norm >= 0 && norms[s] > p.max_grad_norm) plan.clip = p.max_grad_norm / norms[s];
    ++counters[kEvaluations];
    if (plan.update) {
      ++step[s];
      return;
    }
    const bool stalled = final && step[s] > 0 && peak == 0 && p.noise_scale <= 0;
    const std::int64_t row = plan.output_row = plan.id % p.output_rows;
    at<T>(p.output_logit)[row] = best_logit ? best_logit[s] : logit[s];
    at<T>(p.output_initial_logit)[row] = initial;
    at<std::int32_t>(p.output_steps)[row] = step[s];
    at<std::int32_t>(p.output_logit_falls)[row] = at<std::int32_t>(p.logit_falls)[s];
    at<std::int32_t>(p.output_status)[row] = bad ? kNonFinite : reached ? kReached : stalled ? kStalled : kExhausted;
    ++counters[kFinished];
  }

  // Empty slots take the next proposals in slot order; under lockstep only when no slot is live.
  void refill() {
    auto empty = [&](std::int64_t s) { return sample_id[s] < 0 || plans[s].done; };
    bool may = true;
    if (p.lockstep)
      for (std::int64_t s = 0; s < p.num_slots; ++s) may = may && empty(s);
    std::int64_t* source = at<std::int64_t>(p.source);
    std::int64_t live = 0, shortest = 0, longest = 0;
    for (std::int64_t s = 0; s < p.num_slots; ++s) {
      const bool free = empty(s), take = free && may && counters[kNext] < counters[kEnd];
      source[s] = -1;
      if (take) {
        sample_id[s] = counters[kNext]++;
        source[s] = plans[s].pool_row = sample_id[s] % p.pool_rows;
        admit(s, source[s]);
      } else if (free) {
        sample_id[s] = -1;
      }
      if (sample_id[s] < 0) continue;
      const std::int64_t left = std::int64_t{at<std::int32_t>(p.last_step)[s]} - step[s];
      shortest = live ? std::min(shortest, left) : left;
      longest = live ? std::max(longest, left) : left;
      ++live;
    }
    counters[kLive] = live;
    counters[kShortest] = shortest;
    counters[kLongest] = longest;
  }

  void admit(std::int64_t s, std::int64_t row) {
    const T reference = at<T>(p.pool_reference_logit)[row];
    at<T>(p.reference_logit)[s] = reference;
    at<T>(p.threshold)[s] = at<T>(p.pool_threshold)[row];
    at<std::int32_t>(p.last_step)[s] = at<std::int32_t>(p.pool_last_step)[row];
    at<std::int32_t>(p.logit_falls)[s] = step[s] = 0;
    at<T>(p.grad_peak)[s] = 0;
    logit[s] = std::numeric_limits<T>::quiet_NaN();
    store(s, R::start(reference, p.hyper.data()));
  }

  Scalars<T> scalars(std::int64_t s) const {
    Scalars<T> own;
    if constexpr (R::scalars > 0) own.first = at<T>(p.scalars[0])[s];
    if constexpr (R::scalars > 1) own.second = at<T>(p.scalars[1])[s];
    return own;
  }

  void store(std::int64_t s, const Scalars<T>& own) {
    if constexpr (R::scalars > 0) at<T>(p.scalars[0])[s] = own.first;
    if constexpr (R::scalars > 1) at<T>(p.scalars[1])[s] = own.second;
  }

  void apply() {
    const std::int64_t blocks = (p.features + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t s = 0; s < p.num_slots; ++s)
      for (std::int64_t block = 0; block < blocks; ++block) apply(s, block * kBlock);
  }

  // Features begin ... of one slot.
  void apply(std::int64_t s, std::int64_t begin) {
    const Plan& plan = plans[s];
    const std::int64_t size = std::min(kBlock, p.features - begin), own = s * p.features + begin;
    T *a = at<T>(p.activation) + own, *position = at<T>(p.position) + own;
    T* best = p.best ? at<T>(p.best) + own : nullptr;
    if (plan.accept) std::copy_n(a, size, position);
    if (plan.better) std::copy_n(position, size, best);
    if (plan.done) {
      const T* kept = best ? best : position;
      std::copy_n(kept, size, at<T>(p.output_activation) + plan.output_row * p.features + begin);
      if (plan.pool_row < 0) std::copy_n(kept, size, a);
    }
    if (plan.update) propose(s, begin, size, a, position);
    if (plan.pool_row >= 0) {
      const T* fresh = at<const T>(p.pool_activation) + plan.pool_row * p.features + begin;
      std::copy_n(fresh, size, a);
      std::copy_n(fresh, size, position);
      for (int k = 0; k < R::vectors; ++k) std::fill_n(at<T>(p.vectors[k]) + own, size, T(0));
    }
  }

  void propose(std::int64_t s, std::int64_t begin, std::int64_t size, T* __restrict a, const T* __restrict position) {
    const Plan& plan = plans[s];
    const std::int64_t own = s * p.features + begin;
    const T* __restrict g = grad + own;  // without one, all that were served are done
    T* __restrict v = R::vectors > 0 ? at<T>(p.vectors[0]) + own : nullptr;
    T* __restrict w = R::vectors > 1 ? at<T>(p.vectors[1]) + own : nullptr;
    const R rule(p.hyper.data(), scalars(s), logit[s], plan.step);
    const T clip = static_cast<T>(plan.clip);
    const bool accept = plan.accept;
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) {
      T first = 0, second = 0;
      if constexpr (R::vectors > 0) first = v[i];
      if constexpr (R::vectors > 1) second = w[i];
      a[i] = rule.propose(position[i], g[i] * clip, accept, first, second);
      if constexpr (R::vectors > 0) v[i] = first;
      if constexpr (R::vectors > 1) w[i] = second;
    }
    if (p.noise_scale > 0) add_noise(plan, begin, size, a);
    if (p.clamp) {
      const T low = static_cast<T>(p.low), high = static_cast<T>(p.high);
      for (std::int64_t i = 0; i < size; ++i) a[i] = a[i] < low ? low : a[i] > high ? high : a[i];  // NaN stays
    }
  }

  void add_noise(const Plan& plan, std::int64_t begin, std::int64_t size, T* a) {
    double drawn[4 * kLanes];
    const T scale = static_cast<T>(p.noise_scale);
    for (std::int64_t i = 0; i < size; i += 4 * kLanes) {
      normals(p.seed, static_cast<std::uint32_t>(plan.id), static_cast<std::uint32_t>(plan.step), 0,
              static_cast<std::uint32_t>((begin + i) / 4), drawn);
      const std::int64_t count = std::min<std::int64_t>(4 * kLanes, size - i);
      for (std::int64_t k = 0; k < count; ++k) a[i + k] += scale * static_cast<T>(drawn[k]);
    }
  }

  const Params& p;
  const T *trial_logit, *trial_loss, *grad;
  T* logit;
  std::int32_t* step;
  std::int64_t *sample_id, *counters;
  std::vector<Plan> plans;
  std::vector<T> peaks;
  std::vector<double> norms;
  int threads;
};

template <class T>
void dispatch(const Params& p, Address logit, Address loss, Address grad, int threads) {
  auto run = [&](auto step) { step.run(); };
  if (p.rule == "sgd") return run(Step<T, Sgd<T>>(p, logit, loss, grad, threads));
  if (p.rule == "backtracking") return run(Step<T, Backtracking<T>>(p, logit, loss, grad, threads));
  if (p.rule == "adaptive") return run(Step<T, Adaptive<T>>(p, logit, loss, grad, threads));
  if (p.rule == "momentum") return run(Step<T, Momentum<T>>(p, logit, loss, grad, threads));
  if (p.rule == "adam") return run(Step<T, Adam<T>>(p, logit, loss, grad, threads));
  if (p.rule == "ladam") return run(Step<T, Ladam<T>>(p, logit, loss, grad, threads));
  throw std::invalid_argument("the C++ step has no rule '" + p.rule + "'");
}

}  // namespace

void refine_step(const Params& params, Address logit, Address loss, Address grad, int threads) {
  params.real64 ? dispatch<double>(params, logit, loss, grad, threads)
                : dispatch<float>(params, logit, loss, grad, threads);
}

}  // namespace fastrefine
