// The step of the engine after the networks were evaluated, on the CPU. Specification: fastrefine/ops/refine_step.py.
#pragma once
#include <array>
#include <cstdint>
#include <string>

namespace fastrefine {

using Address = std::uintptr_t;  // of a contiguous tensor; 0: none

enum Counter { kNext, kEnd, kLive, kFinished, kEvaluations, kIterations, kShortest, kLongest };
enum Status : std::int32_t { kReached = 0, kExhausted = 1, kNonFinite = 2, kStalled = 3 };

// All of a run but its evaluations; "real" is float or double. Filled once from Python, names as in fastrefine/slots.py.
struct Params {
  bool real64 = false;
  std::int64_t num_slots = 0, features = 0, pool_rows = 0, output_rows = 0;  // output_rows: without the sink

  Address activation = 0, position = 0;                          // (S, F) real
  Address sample_id = 0, source = 0;                             // (S,) int64
  Address step = 0, last_step = 0, logit_falls = 0;              // (S,) int32
  Address threshold = 0, reference_logit = 0, initial_logit = 0, grad_peak = 0, logit = 0;  // (S,) real
  Address best = 0, best_logit = 0;                              // (S, F), (S,) real; 0 unless keep_best
  Address scalars = 0, vectors = 0;                              // the rule's, (n, S) and (n, S, F) real
  std::int64_t num_scalars = 0, num_vectors = 0;

  Address pool_activation = 0, pool_last_step = 0, pool_threshold = 0, pool_reference_logit = 0, counters = 0;
  Address output_activation = 0, output_logit = 0, output_initial_logit = 0;
  Address output_steps = 0, output_logit_falls = 0, output_status = 0;
  Address output_scalars = 0;                                    // (n, output_rows + 1) real

  std::string rule;
  std::array<double, 8> hyper{};
  bool noise = false;                 // whether the rule reads normals
  Address latent = 0, schedule = 0;   // (3, F), (2, schedule_length) real; 0: the rule has none
  std::int64_t schedule_length = 0;
  double max_grad_norm = -1;  // negative: none
  bool clamp = false, lockstep = false;
  double low = 0, high = 0;
  std::uint64_t seed = 0;
};

// logit, loss (S,) and grad (S, F) of the evaluation at the activations; logit 0: refill only; grad 0: only the
// slots at their last step are served.
// Throws std::invalid_argument for a rule that does not exist or does not fit the tensors. Equal for any number of threads.
void refine_step(const Params& params, Address logit, Address loss, Address grad, int threads);

}  // namespace fastrefine
