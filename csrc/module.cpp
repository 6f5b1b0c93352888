// fastrefine._native: pybind11 only, no torch headers; pointers arrive as integers, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "philox.h"
#include "refine_step.h"

namespace py = pybind11;
using namespace fastrefine;

namespace {

py::tuple philox_words(std::uint64_t seed, std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  const Words r = philox(seed, {x, y, z, w});
  return py::make_tuple(r.x, r.y, r.z, r.w);
}

}  // namespace

#define FIELD(name) .def_readwrite(#name, &Params::name)

PYBIND11_MODULE(_native, m) {
  m.doc() = "The step of the engine on the CPU.";
  py::class_<Params>(m, "Params")
      .def(py::init<>())
      FIELD(real64) FIELD(num_slots) FIELD(features) FIELD(pool_rows) FIELD(output_rows)
      FIELD(activation) FIELD(position) FIELD(sample_id) FIELD(source) FIELD(step) FIELD(last_step) FIELD(logit_falls)
      FIELD(threshold) FIELD(reference_logit) FIELD(initial_logit) FIELD(grad_peak) FIELD(logit)
      FIELD(best) FIELD(best_logit) FIELD(scalars) FIELD(vectors) FIELD(num_scalars) FIELD(num_vectors)
      FIELD(pool_activation) FIELD(pool_last_step) FIELD(pool_threshold) FIELD(pool_reference_logit) FIELD(counters)
      FIELD(output_activation) FIELD(output_logit) FIELD(output_initial_logit)
      FIELD(output_steps) FIELD(output_logit_falls) FIELD(output_status) FIELD(output_scalars)
      FIELD(rule) FIELD(hyper) FIELD(noise) FIELD(latent) FIELD(schedule) FIELD(schedule_length) FIELD(max_grad_norm)
      FIELD(clamp) FIELD(low) FIELD(high) FIELD(lockstep) FIELD(seed);
  m.def("refine_step", &refine_step, py::arg("params"), py::arg("logit"), py::arg("loss"), py::arg("grad"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("philox", &philox_words, "Four words of one counter, for the known-answer test.");
}
