// A captured step, repeated on the GPU by a WHILE node until the counters in device memory say stop.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#if CUDART_VERSION < 12040
#error "the device loop needs CUDA 12.4 or newer: WHILE nodes"
#endif

namespace fastrefine {

using Handle = std::uintptr_t;  // a pointer or a CUDA handle, as an integer

const void* set_condition_kernel();  // its parameter: Setter of loop_condition.h

// Why this driver cannot run the device loop; empty when it can. Needs no device and creates no context.
std::string unavailable();

// Nodes of a graph and, recursively, of its child graphs: name of the type -> how many.
std::map<std::string, std::int64_t> census(Handle graph);

class WhileGraph {
 public:
  // `step`: a cudaGraph_t, which is cloned; the memory that its nodes use, `counters` and `control` must outlive this.
  // The graph is uploaded on `stream` of `device`.
  // Throws std::invalid_argument for a step that a body may not hold, std::runtime_error for a driver that is too old
  // or an error of CUDA; then nothing stays behind.
  WhileGraph(Handle step, Handle counters, Handle control, int device, Handle stream);

  void launch(Handle stream);
  void destroy() noexcept;  // also by the destructor; a second time does nothing

 private:
  struct Destroy {
    void operator()(cudaGraph_t graph) const noexcept { cudaGraphDestroy(graph); }
    void operator()(cudaGraphExec_t exec) const noexcept { cudaGraphExecDestroy(exec); }
  };

  int device_;
  std::unique_ptr<CUgraph_st, Destroy> graph_;
  std::unique_ptr<CUgraphExec_st, Destroy> exec_;  // after graph_: destroyed first
};

}  // namespace fastrefine
