// A fake of the CUDA runtime functions that csrc/while_graph.cpp calls: it keeps graphs, records every call with its
// arguments, fails the n-th one on demand, and executes launches, steps being callbacks. Driven by tests/support/fake_cudart.py.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "loop_condition.h"

namespace fastrefine {
namespace {
const char marker = 0;
}
const void* set_condition_kernel() { return &marker; }
}  // namespace fastrefine

using fastrefine::Setter;

struct CUgraphNode_st {
  std::string name;
  cudaGraphNodeType type;
  std::vector<cudaGraphNode_t> after;
  bool cooperative = false;
  bool is_setter = false;
  Setter setter{};
  unsigned long long handle = 0;      // of a conditional
  std::shared_ptr<CUgraph_st> child;  // of a child graph, or the body of a conditional
};

struct CUgraph_st {
  std::string name;
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};

struct CUgraphExec_st {
  std::shared_ptr<CUgraph_st> graph;
};

namespace {

struct State {
  int driver = 13000, device = 0, named = 0, fail_at = 0, counted = 0;
  std::vector<std::string> calls, faults;
  std::map<cudaGraph_t, std::shared_ptr<CUgraph_st>> graphs;  // not those that belong to a node
  std::set<cudaGraphExec_t> execs;
  std::map<unsigned long long, std::pair<unsigned, unsigned>> conditions;  // handle -> value, default
  void (*step)() = nullptr;
  cudaGraph_t array_of_bodies[16] = {};
  int bodies = 0;
  std::string text;
} state;

// Records the call; its error is the injected one or none.
template <class... Parts>
cudaError_t called(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  state.calls.push_back(line.str());
  return ++state.counted == state.fail_at ? cudaErrorInvalidValue : cudaSuccess;
}

std::string list(const cudaGraphNode_t* nodes, std::size_t count) {
  std::string text = "[";
  for (std::size_t i = 0; i < count; ++i) text += (i ? " " : "") + nodes[i]->name;
  return text + "]";
}

std::shared_ptr<CUgraph_st> clone(const CUgraph_st& graph) {
  auto copy = std::make_shared<CUgraph_st>();
  copy->name = graph.name + "'";
  std::map<cudaGraphNode_t, cudaGraphNode_t> twins;
  for (const auto& node : graph.nodes) {  // a node is added after those that it waits for
    copy->nodes.push_back(std::make_unique<CUgraphNode_st>(*node));
    cudaGraphNode_t twin = twins[node.get()] = copy->nodes.back().get();
    for (cudaGraphNode_t& other : twin->after) other = twins.at(other);
    if (node->child) twin->child = clone(*node->child);
  }
  return copy;
}

cudaGraphNode_t add(cudaGraph_t graph, const char* name, cudaGraphNodeType type, const cudaGraphNode_t* after,
                    std::size_t count) {
  auto node = std::make_unique<CUgraphNode_st>();
  node->name = name + std::to_string(++state.named);
  node->type = type;
  node->after.assign(after, after + count);
  graph->nodes.push_back(std::move(node));
  return graph->nodes.back().get();
}

void run(const CUgraph_st& graph);

void run_node(const CUgraphNode_st& node) {
  if (node.is_setter) {
    state.conditions.at(node.setter.handle).first = advance(node.setter);
  } else if (node.type == cudaGraphNodeTypeKernel) {
    state.step();
  } else if (node.type == cudaGraphNodeTypeGraph) {
    run(*node.child);
  } else if (node.type == cudaGraphNodeTypeConditional) {
    for (int turn = 0; state.conditions.at(node.handle).first != 0; ++turn) {
      if (turn == 1000) return state.faults.push_back("the loop does not end");
      run(*node.child);
    }
  }
}

// Of the nodes that may run, always the one added last: an order that only missing dependencies would make possible.
void run(const CUgraph_st& graph) {
  std::set<const CUgraphNode_st*> done;
  while (done.size() < graph.nodes.size()) {
    const auto ready = std::find_if(graph.nodes.rbegin(), graph.nodes.rend(), [&](const auto& node) {
      return !done.count(node.get()) &&
             std::all_of(node->after.begin(), node->after.end(), [&](auto other) { return done.count(other); });
    });
    run_node(**ready);
    done.insert(ready->get());
  }
}

}  // namespace

extern "C" {

cudaError_t cudaDriverGetVersion(int* version) {
  *version = state.driver;
  return called("cudaDriverGetVersion");
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaGetDevice(int* device) {
  *device = state.device;
  return called("cudaGetDevice");
}
cudaError_t cudaSetDevice(int device) {
  const cudaError_t error = called("cudaSetDevice ", device);
  if (error == cudaSuccess) state.device = device;
  return error;
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  const cudaError_t error = called("cudaGraphCreate ", flags);
  if (error != cudaSuccess) return error;
  auto made = std::make_shared<CUgraph_st>();
  made->name = "top";
  *graph = made.get();
  state.graphs[made.get()] = made;
  return error;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  state.calls.push_back("cudaGraphDestroy");
  if (state.graphs.erase(graph) == 0) state.faults.push_back("destroyed a graph that is not");
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  state.calls.push_back("cudaGraphExecDestroy");
  if (state.execs.erase(exec) == 0)
    state.faults.push_back("destroyed an executable graph that is not");
  else
    delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count) {
  if (nodes)
    for (std::size_t i = 0; i < *count; ++i) nodes[i] = graph->nodes.at(i).get();
  *count = graph->nodes.size();
  return called("cudaGraphGetNodes ", graph->name);
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  *type = node->type;
  return called("cudaGraphNodeGetType ", node->name);
}
cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  *graph = node->child.get();
  return called("cudaGraphChildGraphNodeGetGraph ", node->name);
}
cudaError_t cudaGraphKernelNodeGetAttribute(cudaGraphNode_t node, cudaKernelNodeAttrID attribute,
                                            cudaKernelNodeAttrValue* value) {
  if (attribute == cudaLaunchAttributeCooperative) value->cooperative = node->cooperative;
  return called("cudaGraphKernelNodeGetAttribute ", node->name);
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned value,
                                             unsigned flags) {
  const cudaError_t error = called("cudaGraphConditionalHandleCreate ", graph->name, " ", value, " ", flags);
  if (error != cudaSuccess) return error;
  *handle = 100 + state.conditions.size();
  state.conditions[*handle] = {7, flags == cudaGraphCondAssignDefault ? value : 7};  // 7: what was there before
  return error;
}
cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                                   std::size_t count, const cudaKernelNodeParams* params) {
  const bool ours = params->func == fastrefine::set_condition_kernel();
  if (!ours) state.faults.push_back("a kernel that is not the setter");
  const Setter setter = *static_cast<Setter*>(params->kernelParams[0]);
  const auto grid = params->gridDim, block = params->blockDim;
  const unsigned threads = grid.x * grid.y * grid.z * block.x * block.y * block.z;
  const cudaError_t error = called("cudaGraphAddKernelNode ", graph->name, " ", list(after, count), " threads=", threads,
                                   " handle=", setter.handle, setter.begins ? " begins" : " ends a step");
  if (error != cudaSuccess) return error;
  *node = add(graph, "setter", cudaGraphNodeTypeKernel, after, count);
  (*node)->is_setter = ours;
  (*node)->setter = setter;
  return error;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                             const cudaGraphEdgeData*, std::size_t count, cudaGraphNodeParams* params) {
#else
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, std::size_t count,
                             cudaGraphNodeParams* params) {
#endif
  const bool is_while = params->type == cudaGraphNodeTypeConditional &&
                        params->conditional.type == cudaGraphCondTypeWhile && params->conditional.size == 1;
  const cudaError_t error = called("cudaGraphAddNode ", graph->name, " ", list(after, count), is_while ? " while" : " ?",
                                   " handle=", params->conditional.handle);
  if (error != cudaSuccess) return error;
  *node = add(graph, "while", cudaGraphNodeTypeConditional, after, count);
  (*node)->handle = params->conditional.handle;
  (*node)->child = std::make_shared<CUgraph_st>();
  (*node)->child->name = "body";
  params->conditional.phGraph_out = &(state.array_of_bodies[state.bodies++ % 16] = (*node)->child.get());
  return error;
}
cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                                       std::size_t count, cudaGraph_t child) {
  const cudaError_t error =
      called("cudaGraphAddChildGraphNode ", graph->name, " ", list(after, count), " ", child->name);
  if (error != cudaSuccess) return error;
  *node = add(graph, "child", cudaGraphNodeTypeGraph, after, count);
  (*node)->child = clone(*child);
  return error;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  const cudaError_t error = called("cudaGraphInstantiateWithFlags ", graph->name, " ", flags);
  if (error != cudaSuccess) return error;
  *exec = new CUgraphExec_st{clone(*graph)};
  state.execs.insert(*exec);
  return error;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!state.execs.count(exec)) state.faults.push_back("uploaded what is not");
  return called("cudaGraphUpload stream=", reinterpret_cast<std::uintptr_t>(stream));
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const cudaError_t error = called("cudaGraphLaunch stream=", reinterpret_cast<std::uintptr_t>(stream));
  if (!state.execs.count(exec)) state.faults.push_back("launched what is not");
  if (error != cudaSuccess) return error;
  for (auto& [handle, condition] : state.conditions) condition.first = condition.second;
  run(*exec->graph);
  return error;
}

int fake_version() { return CUDART_VERSION; }

// For the tests. A graph made here is the caller's: it is not counted as a leak.
void fake_reset(int driver, void (*step)()) {
  state = State();
  state.driver = driver;
  state.step = step;
}
void* fake_graph(const char* name) {
  auto* graph = new CUgraph_st;
  graph->name = name;
  return graph;
}
void fake_add(void* graph, int type, bool cooperative, void* child) {
  cudaGraphNode_t node = add(static_cast<cudaGraph_t>(graph), "node", static_cast<cudaGraphNodeType>(type), nullptr, 0);
  node->cooperative = cooperative;
  if (child) node->child = clone(*static_cast<cudaGraph_t>(child));
}
void fake_fail_at(int call) {
  state.fail_at = call;
  state.counted = 0;
}
int fake_counted() { return state.counted; }
int fake_alive() { return static_cast<int>(state.graphs.size() + state.execs.size()); }
int fake_device() { return state.device; }
const char* fake_read(bool faults) {  // and forget
  state.text.clear();
  auto& lines = faults ? state.faults : state.calls;
  for (const std::string& line : lines) state.text += line + "\n";
  lines.clear();
  return state.text.c_str();
}
}
