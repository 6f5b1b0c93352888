#include "refine_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "latent_rules.h"
#include "normal.h"
#include "philox.h"
#include "rules.h"

namespace fastrefine {
namespace {

constexpr std::int64_t kBlock = 2048;        // features per task: what a task touches stays in the core's cache
constexpr std::int64_t kBatch = 4 * kLanes;  // features whose normals are made at once
constexpr int kPartial = 16;                 // lanes of the fixed-order sums
static_assert(kBlock % kBatch == 0 && kBatch % kPartial == 0, "a block is whole batches, a batch is whole lanes");
enum Stream : std::uint32_t { kProposal = 0, kAccept = 1, kJitter = 3 };  // as in fastrefine/noise.py

struct Plan {  // what `apply` does to one slot
  bool accept = false, better = false, update = false, done = false, usable = true;
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
        sums(R::sums * p.num_slots),
        threads(static_cast<int>(std::clamp<std::int64_t>(p.num_slots * p.features >> 16, 1, std::max(threads, 1)))) {}

  void run() {
    if (trial_logit) {
      reduce();
      for (std::int64_t s = 0; s < p.num_slots; ++s)
        if (served(s)) observe(s);  // the others wait for a gradient
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

  bool served(std::int64_t s) const { return sample_id[s] >= 0 && (grad || last(s)); }

  // What needs all features of a slot; nothing reads a last gradient but sums and tests.
  void reduce() {
    if (!grad && R::sums == 0) return;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t s = 0; s < p.num_slots; ++s) {
      if (!served(s) || (R::sums == 0 && last(s))) continue;
      if (grad) measure(s);
      if constexpr (R::sums > 0)
        if (R::turns(step[s], p.hyper.data())) sum(s);
    }
  }

  // Largest |gradient| (inf if any is not finite) and, for the clip, its norm.
  void measure(std::int64_t s) {
    const T* g = grad + s * p.features;
    T peak[kPartial] = {};
    double sum[kPartial] = {};
    std::int64_t i = 0;
    for (; i + kPartial <= p.features; i += kPartial)
      for (int k = 0; k < kPartial; ++k) peak[k] = std::max(peak[k], magnitude(g[i + k]));
    for (int k = 0; i + k < p.features; ++k) peak[k] = std::max(peak[k], magnitude(g[i + k]));
    peaks[s] = *std::max_element(peak, peak + kPartial);
    if (p.max_grad_norm < 0) return;
    for (i = 0; i + kPartial <= p.features; i += kPartial)
      for (int k = 0; k < kPartial; ++k) sum[k] += double(g[i + k]) * double(g[i + k]);
    for (int k = 0; i + k < p.features; ++k) sum[k] += double(g[i + k]) * double(g[i + k]);
    double total = 0;
    for (double part : sum) total += part;
    norms[s] = std::sqrt(total);
  }

  // The rule's sums over the features of a slot, in an order that no thread and no other slot changes.
  void sum(std::int64_t s) {
    double lanes[R::sums][kPartial] = {}, drawn[R::recalls ? kBatch : 1] = {};
    const bool first = step[s] == 0;
    const Scalars<T> own = paced(s, sample_id[s], step[s], true);
    const T clip = static_cast<T>(clip_of(s));
    const Row row = row_of(s, 0, grad && std::isfinite(peaks[s]));
    auto add = [&](std::int64_t begin, std::int64_t i, int lane) {
      double term[R::sums];
      R::terms(element(row, begin + i, clip, R::recalls ? drawn[i] : 0), own, step[s], p.hyper.data(), term);
      for (int k = 0; k < R::sums; ++k) lanes[k][lane] += term[k];
    };
    for (std::int64_t begin = 0; begin < p.features; begin += kBatch) {
      const std::int64_t size = std::min(kBatch, p.features - begin);
      if constexpr (R::recalls)
        if (!first) draw(sample_id[s], step[s] - R::length(p.hyper.data()), begin, size, drawn);
      std::int64_t i = 0;
      for (; i + kPartial <= size; i += kPartial)
        for (int lane = 0; lane < kPartial; ++lane) add(begin, i + lane, lane);
      for (int lane = 0; i + lane < size; ++lane) add(begin, i + lane, lane);
    }
    for (int k = 0; k < R::sums; ++k) {
      double& total = sums[s * R::sums + k] = 0;
      for (double part : lanes[k]) total += part;
    }
  }

  double clip_of(std::int64_t s) const {
    return p.max_grad_norm >= 0 && norms[s] > p.max_grad_norm ? p.max_grad_norm / norms[s] : 1;
  }

  // The normals of `size` elements, at most kBatch.
  void draw(std::int64_t id, int at_step, std::int64_t element, std::int64_t size, double* out) const {
    normals(p.seed, static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(at_step), kProposal,
            static_cast<std::uint32_t>(element / 4), static_cast<int>((size + 3) / 4), out);
  }

  double uniform(std::int64_t id, int at_step, Stream stream) const {
    const Words r = philox(p.seed, {0, static_cast<std::uint32_t>(at_step), static_cast<std::uint32_t>(id), stream});
    return (r.x + 0.5) * 0x1p-32;
  }

  // The scalars as they are in the transition that ends with the update `at_step` (over), or else is under way there.
  Scalars<T> paced(std::int64_t s, std::int64_t id, int at_step, bool over) const {
    Scalars<T> own = scalars(s);
    if constexpr (R::varies) {
      const double* hyper = p.hyper.data();
      const int began = over ? std::max(at_step - R::length(hyper), 0) : at_step - at_step % R::length(hyper);
      R::pace(own, uniform(id, began, kJitter), hyper);
    }
    return own;
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
    const bool met = (R::tests || !final) && std::isfinite(peaks[s]);
    const bool finite = std::isfinite(d) && std::isfinite(loss) && (met || (final && !R::tests));
    const bool bad = !finite && (first || !R::rejects);
    T& peak = at<T>(p.grad_peak)[s];
    T& initial = at<T>(p.initial_logit)[s];
    if (met) peak = std::max(peak, peaks[s]);
    at<std::int32_t>(p.logit_falls)[s] += !first && d < logit[s];
    if (first) initial = d;

    Scalars<T> own = scalars(s);
    if (!bad) {
      const T u = R::tests ? static_cast<T>(uniform(sample_id[s], step[s], kAccept)) : 0;
      const Trial<T> trial{finite ? d : -kInfinity, finite ? loss : kInfinity, step[s], sums.data() + s * R::sums, u, p.features};
      plan.accept = R::observe(trial, own, p.hyper.data());
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
    plan.usable = finite;
    plan.id = sample_id[s];
    plan.step = step[s];
    plan.clip = clip_of(s);
    ++counters[kEvaluations];
    const std::int64_t row = plan.output_row = plan.id % p.output_rows;
    if (plan.done)
      for (int k = 0; k < R::scalars; ++k) at<T>(p.output_scalars)[k * (p.output_rows + 1) + row] = own[k];
    else
      R::advance(logit[s], step[s]++, own, p.hyper.data());
    store(s, own);
    if (plan.update) return;
    const bool stalled = final && step[s] > 0 && peak == 0 && !p.noise && !R::latent && !R::moves;
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
    Scalars<T> own{};
    for (int k = 0; k < R::scalars; ++k) own[k] = at<T>(p.scalars)[k * p.num_slots + s];
    return own;
  }

  void store(std::int64_t s, const Scalars<T>& own) {
    for (int k = 0; k < R::scalars; ++k) at<T>(p.scalars)[k * p.num_slots + s] = own[k];
  }

  // Where the features of a slot lie, from `begin` on.
  struct Row {
    T *a, *position, *v[3] = {};
    const T *g, *precision = nullptr, *low = nullptr, *high = nullptr;
    bool usable;
  };

  Row row_of(std::int64_t s, std::int64_t begin, bool usable) const {
    const std::int64_t own = s * p.features + begin;
    Row row;
    row.a = at<T>(p.activation) + own, row.position = at<T>(p.position) + own;
    row.g = grad ? grad + own : row.a, row.usable = usable;
    for (int k = 0; k < R::vectors; ++k) row.v[k] = at<T>(p.vectors) + k * p.num_slots * p.features + own;
    if (p.latent) {
      row.precision = at<const T>(p.latent) + begin;
      row.low = row.precision + p.features, row.high = row.low + p.features;
    }
    return row;
  }

  static Element<T> element(const Row& row, std::int64_t i, T clip, double normal) {
    Element<T> e;  // only what the rule reads
    e.a = row.a[i], e.position = row.position[i], e.g = row.g[i] * clip;
    if constexpr (R::sums > 0) e.g = row.usable ? e.g : 0;
    if constexpr (R::noise) e.normal = static_cast<T>(normal);
    if constexpr (R::latent) e.precision = row.precision[i], e.low = row.low[i], e.high = row.high[i];
    if constexpr (R::vectors > 0) e.v[0] = row.v[0][i];
    if constexpr (R::vectors > 1) e.v[1] = row.v[1][i];
    if constexpr (R::vectors > 2) e.v[2] = row.v[2][i];
    return e;
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
    const std::int64_t size = std::min(kBlock, p.features - begin);
    const Row row = row_of(s, begin, plan.usable);
    T *a = row.a, *position = row.position, *best = p.best ? at<T>(p.best) + s * p.features + begin : nullptr;
    if (plan.accept) std::copy_n(a, size, position);
    if (plan.better) std::copy_n(position, size, best);
    if (plan.done) {
      const T* kept = best ? best : position;
      std::copy_n(kept, size, at<T>(p.output_activation) + plan.output_row * p.features + begin);
      if (plan.pool_row < 0) std::copy_n(kept, size, a);
    }
    if (plan.update) propose(s, begin, size, row);
    if (plan.pool_row >= 0) {
      const T* fresh = at<const T>(p.pool_activation) + plan.pool_row * p.features + begin;
      std::copy_n(fresh, size, a);
      std::copy_n(fresh, size, position);
      for (int k = 0; k < R::vectors; ++k) std::fill_n(row.v[k], size, T(0));
    }
  }

  void propose(std::int64_t s, std::int64_t begin, std::int64_t size, const Row& row) {
    const Plan& plan = plans[s];
    const Scalars<T> own = paced(s, plan.id, plan.step, false);
    const R rule({own, logit[s], plan.step, plan.accept, at<const T>(p.schedule), p.schedule_length}, p.hyper.data());
    const bool draws = R::noise && R::turns(plan.step, p.hyper.data());
    double drawn[R::noise ? kBatch : 1] = {};
    for (std::int64_t from = 0; from < size; from += R::noise ? kBatch : size) {
      const std::int64_t some = R::noise ? std::min(kBatch, size - from) : size;
      if (draws) draw(plan.id, plan.step, begin + from, some, drawn);
      propose(rule, row, from, some, static_cast<T>(plan.clip), drawn);
    }
    if (R::clips && p.latent)
      for (std::int64_t i = 0; i < size; ++i) row.a[i] = clamp(row.a[i], row.low[i], row.high[i]);
    if (p.clamp) {
      const T low = static_cast<T>(p.low), high = static_cast<T>(p.high);
      for (std::int64_t i = 0; i < size; ++i) row.a[i] = clamp(row.a[i], low, high);
    }
  }

  static void propose(const R& rule, const Row row, std::int64_t from, std::int64_t size, T clip, const double* drawn) {
#pragma omp simd
    for (std::int64_t k = 0; k < size; ++k) {
      const std::int64_t i = from + k;
      Element<T> e = element(row, i, clip, R::noise ? drawn[k] : 0);
      row.a[i] = rule.propose(e);
      if constexpr (R::vectors > 0) row.v[0][i] = e.v[0];
      if constexpr (R::vectors > 1) row.v[1][i] = e.v[1];
      if constexpr (R::vectors > 2) row.v[2][i] = e.v[2];
    }
  }

  const Params& p;
  const T *trial_logit, *trial_loss, *grad;
  T* logit;
  std::int32_t* step;
  std::int64_t *sample_id, *counters;
  std::vector<Plan> plans;
  std::vector<T> peaks;
  std::vector<double> norms, sums;
  int threads;
};

template <class T, class R>
void run(const Params& p, Address logit, Address loss, Address grad, int threads) {
  if (p.num_scalars != R::scalars || p.num_vectors != R::vectors || (R::latent && !p.latent))
    throw std::invalid_argument("the tensors are not those of the rule '" + p.rule + "'");
  Step<T, R>(p, logit, loss, grad, threads).run();
}

template <class T>
auto rule_of(const Params& p) {
  if (p.rule == "sgd") return p.noise ? run<T, Sgd<T, true>> : run<T, Sgd<T, false>>;
  if (p.rule == "backtracking") return run<T, Backtracking<T>>;
  if (p.rule == "barzilai_borwein") return run<T, BarzilaiBorwein<T>>;
  if (p.rule == "adaptive") return run<T, Adaptive<T>>;
  if (p.rule == "momentum") return run<T, Momentum<T>>;
  if (p.rule == "adam") return run<T, Adam<T>>;
  if (p.rule == "ladam") return run<T, Ladam<T>>;
  if (p.rule == "ddls") return p.noise ? run<T, Ddls<T, true>> : run<T, Ddls<T, false>>;
  if (p.rule == "mala") return run<T, Mala<T>>;
  if (p.rule == "pcn") return run<T, Pcn<T>>;
  if (p.rule == "hmc") return run<T, Hmc<T>>;
  if (p.rule == "dot_adam") return run<T, Dot<T, true>>;
  if (p.rule == "dot_sgd") return run<T, Dot<T, false>>;
  throw std::invalid_argument("the C++ step has no rule '" + p.rule + "'");
}

}  // namespace

void refine_step(const Params& params, Address logit, Address loss, Address grad, int threads) {
  const auto run = params.real64 ? rule_of<double>(params) : rule_of<float>(params);
  run(params, logit, loss, grad, threads);
}

}  // namespace fastrefine
