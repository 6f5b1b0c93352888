// fastrefine._device_loop: pybind11 and the CUDA runtime, no torch headers; graphs, streams and pointers are integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "while_graph.h"

namespace py = pybind11;
using namespace fastrefine;

PYBIND11_MODULE(_device_loop, m) {
  m.doc() = "A captured step, repeated on the GPU by a WHILE node.";
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("unavailable", &unavailable, "Why this driver cannot run it, or nothing.");
  m.def("census", &census, py::arg("graph"), Unlocked(), "Name of a node's type -> how many, with child graphs.");
  py::class_<WhileGraph>(m, "WhileGraph", py::module_local())
      .def(py::init<Handle, Handle, Handle, int, Handle>(), py::arg("step"), py::arg("counters"),
           py::arg("control"), py::arg("device"), py::arg("stream"), Unlocked())
      .def("launch", &WhileGraph::launch, py::arg("stream"), Unlocked())
      .def("destroy", &WhileGraph::destroy);
}
