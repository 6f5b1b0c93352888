#include "while_graph.h"

#include <set>
#include <stdexcept>
#include <vector>

#include "loop_condition.h"

namespace fastrefine {
namespace {

constexpr int kWhileNodes = 12040;         // driver that knows them
constexpr int kCooperativeInBody = 12060;  // driver that takes cooperative kernels in a body

// What a body may hold, recursively. CUDA takes nested conditionals, but not in a child graph.
const std::set<std::string> kAllowed = {"kernel", "memcpy", "memset", "empty", "child graph"};

void check(cudaError_t error, const std::string& call) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + " in " + call + ": " + cudaGetErrorString(error));
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

int driver_version() {
  int number = 0;
  check(cudaDriverGetVersion(&number), "cudaDriverGetVersion");
  return number;
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

std::string type_name(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel: return "kernel";
    case cudaGraphNodeTypeMemcpy: return "memcpy";
    case cudaGraphNodeTypeMemset: return "memset";
    case cudaGraphNodeTypeHost: return "host function";
    case cudaGraphNodeTypeGraph: return "child graph";
    case cudaGraphNodeTypeEmpty: return "empty";
    case cudaGraphNodeTypeWaitEvent: return "event wait";
    case cudaGraphNodeTypeEventRecord: return "event record";
    case cudaGraphNodeTypeExtSemaphoreSignal: return "semaphore signal";
    case cudaGraphNodeTypeExtSemaphoreWait: return "semaphore wait";
    case cudaGraphNodeTypeMemAlloc: return "memory allocation";
    case cudaGraphNodeTypeMemFree: return "memory free";
    case cudaGraphNodeTypeConditional: return "conditional";
    default: return "type " + std::to_string(static_cast<int>(type));
  }
}

bool is_cooperative(cudaGraphNode_t kernel) {
  cudaKernelNodeAttrValue value = {};
  check(cudaGraphKernelNodeGetAttribute(kernel, cudaLaunchAttributeCooperative, &value),
        "cudaGraphKernelNodeGetAttribute");
  return value.cooperative != 0;
}

void count(cudaGraph_t graph, bool refuses_cooperative, std::map<std::string, std::int64_t>& counts) {
  std::size_t size = 0;
  check(cudaGraphGetNodes(graph, nullptr, &size), "cudaGraphGetNodes");
  std::vector<cudaGraphNode_t> nodes(size);
  if (size > 0) check(cudaGraphGetNodes(graph, nodes.data(), &size), "cudaGraphGetNodes");
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    const bool cooperative = type == cudaGraphNodeTypeKernel && refuses_cooperative && is_cooperative(node);
    ++counts[cooperative ? "cooperative kernel" : type_name(type)];
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;  // belongs to the node
      check(cudaGraphChildGraphNodeGetGraph(node, &child), "cudaGraphChildGraphNodeGetGraph");
      count(child, refuses_cooperative, counts);
    }
  }
}

void refuse_forbidden(Handle step) {
  const auto counts = census(step);
  if (counts.empty()) throw std::invalid_argument("the captured step is empty: the loop would have nothing to do");
  std::string found;
  for (const auto& [name, times] : counts)
    if (kAllowed.count(name) == 0) found += (found.empty() ? "" : ", ") + std::to_string(times) + " x " + name;
  if (found.empty()) return;
  if (counts.count("cooperative kernel")) found += " (needs a driver for CUDA " + version(kCooperativeInBody) + ")";
  throw std::invalid_argument("the captured step holds nodes that a WHILE body may not: " + found);
}

cudaGraphNode_t add_setter(cudaGraph_t graph, const cudaGraphNode_t* after, Setter setter, const char* where) {
  void* arguments[] = {&setter};
  cudaKernelNodeParams params = {};
  params.func = const_cast<void*>(set_condition_kernel());
  params.gridDim = params.blockDim = dim3{1, 1, 1};
  params.kernelParams = arguments;
  cudaGraphNode_t node = nullptr;
  check(cudaGraphAddKernelNode(&node, graph, after, after ? 1 : 0, &params),
        std::string("cudaGraphAddKernelNode, the setter ") + where);
  return node;
}

// The body of the new node, which belongs to it.
cudaGraph_t add_while(cudaGraph_t graph, cudaGraphNode_t after, cudaGraphConditionalHandle handle) {
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaGraphAddNode(&node, graph, &after, nullptr, 1, &params);  // nullptr: no edge data
#else
  const cudaError_t error = cudaGraphAddNode(&node, graph, &after, 1, &params);
#endif
  check(error, "cudaGraphAddNode, the WHILE node");
  return params.conditional.phGraph_out[0];
}

}  // namespace

std::string unavailable() {
  const int driver = driver_version();
  if (driver == 0) return "there is no CUDA driver";
  const std::string has = "the driver is for CUDA " + version(driver) + ", ";
  if (driver < kWhileNodes) return has + "WHILE nodes need " + version(kWhileNodes);
  if (driver / 1000 < CUDART_VERSION / 1000) return has + "fastrefine._device_loop was built with " + version(CUDART_VERSION);
  return "";
}

std::map<std::string, std::int64_t> census(Handle graph) {
  if (graph == 0) throw std::invalid_argument("census: the graph is null");
  std::map<std::string, std::int64_t> counts;
  count(reinterpret_cast<cudaGraph_t>(graph), driver_version() < kCooperativeInBody, counts);
  return counts;
}

WhileGraph::WhileGraph(Handle step, Handle counters, Handle control, int device, Handle stream)
    : device_(device) {
  if (step == 0 || counters == 0 || control == 0) throw std::invalid_argument("step, counters or control is null");
  if (const std::string reason = unavailable(); !reason.empty()) throw std::runtime_error(reason);
  const OnDevice guard(device);
  refuse_forbidden(step);

  cudaGraph_t graph = nullptr;
  check(cudaGraphCreate(&graph, 0), "cudaGraphCreate");
  graph_.reset(graph);
  Setter setter = {};
  setter.begins = true;
  setter.counters = reinterpret_cast<const std::int64_t*>(counters);
  setter.control = reinterpret_cast<std::int64_t*>(control);
  check(cudaGraphConditionalHandleCreate(&setter.handle, graph, 0, cudaGraphCondAssignDefault),
        "cudaGraphConditionalHandleCreate");
  const cudaGraphNode_t before = add_setter(graph, nullptr, setter, "before the loop");
  cudaGraph_t body = add_while(graph, before, setter.handle);
  cudaGraphNode_t child = nullptr;
  check(cudaGraphAddChildGraphNode(&child, body, nullptr, 0, reinterpret_cast<cudaGraph_t>(step)),
        "cudaGraphAddChildGraphNode");
  setter.begins = false;
  add_setter(body, &child, setter, "in the body");  // after the step: it reads what the step wrote

  cudaGraphExec_t exec = nullptr;
  check(cudaGraphInstantiateWithFlags(&exec, graph, 0), "cudaGraphInstantiateWithFlags");
  exec_.reset(exec);
  check(cudaGraphUpload(exec, reinterpret_cast<cudaStream_t>(stream)), "cudaGraphUpload");
}

void WhileGraph::launch(Handle stream) {
  if (!exec_) throw std::invalid_argument("the device loop was destroyed");
  const OnDevice guard(device_);
  check(cudaGraphLaunch(exec_.get(), reinterpret_cast<cudaStream_t>(stream)), "cudaGraphLaunch");
}

void WhileGraph::destroy() noexcept {
  exec_.reset();
  graph_.reset();
}

}  // namespace fastrefine
