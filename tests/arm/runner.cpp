// runner: calls TVM kernels compiled for aarch64, with arrays that come in and go out by pipe.
//
//   aarch64-linux-gnu-g++ -O1 -rdynamic runner.cpp -o runner -ldl -lpthread
//   qemu-aarch64 -L /usr/aarch64-linux-gnu runner THREADS
//
// It stands in for TVM's runtime, whose aarch64 build takes 20 s to start under qemu where this
// takes 0.1: parallel regions run on THREADS threads at once, memory, rounded up to 64 bytes, ends
// at a page that faults when touched, what rounding added is checked for writes, and workspaces are
// filled with poison, so that a kernel that writes past an array, reads well past it, or reads
// workspace it never wrote does not pass by luck.
//
//   request: str library, u32 count, array[count]      array: u8 code, u8 bits, u32 ndim,
//   reply:   str error, and without one bytes[count]          i64 shape[ndim], bytes
//   str:     u32 length, bytes                          numbers little-endian; exits at end of file

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

namespace {

constexpr size_t kPage = 4096, kAlignment = 64;
constexpr uint8_t kPoison = 0xA5;
// No system call: benchmarks/insn_plugin.c prints its count there. The kernel's own instructions lie
// between an odd mark and the next even one.
constexpr long kMark = 5000;

int num_threads = 1;
thread_local std::string raised;  // what the kernel said before it returned non-zero

[[noreturn]] void die(const std::string& reason) {
  std::fprintf(stderr, "runner: %s\n", reason.c_str());
  std::exit(1);
}

// ---- Memory whose end, rounded up to 64 bytes, is followed by a page without access

struct Header {
  size_t mapped, size;
};

Header* header_of(void* data) {
  auto page = (reinterpret_cast<uintptr_t>(data) / kPage - 1) * kPage;
  return reinterpret_cast<Header*>(page);
}

size_t rounded(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

void* allocate(size_t size) {
  size_t body = (rounded(size) + kPage - 1) / kPage * kPage, mapped = body + 2 * kPage;
  auto* base = static_cast<uint8_t*>(
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) die("out of memory");
  if (mprotect(base + kPage + body, kPage, PROT_NONE)) die("cannot protect a page");
  uint8_t* data = base + kPage + body - rounded(size);
  std::memset(base + kPage, kPoison, body);
  *header_of(data) = {mapped, size};
  return data;
}

void release(void* data) {
  Header header = *header_of(data);
  auto* bytes = static_cast<uint8_t*>(data);
  for (size_t i = header.size; i < rounded(header.size); ++i)
    if (bytes[i] != kPoison) die("written past the end of an array");
  for (auto* p = reinterpret_cast<uint8_t*>(header_of(data)) + kPage; p < bytes; ++p)
    if (*p != kPoison) die("written before the start of an array");
  munmap(header_of(data), header.mapped);
}

// ---- What a compiled kernel asks of the runtime (tvm/runtime/c_backend_api.h)

struct ParallelGroup {
  void* sync_handle;
  int32_t num_task;
};
using ParallelBody = int (*)(int task, ParallelGroup* group, void* closure);

int parallel_launch(ParallelBody body, void* closure, int num_task) {
  ParallelGroup group{nullptr, num_task ? num_task : num_threads};
  std::vector<int> failed(group.num_task);
  std::vector<std::string> reasons(group.num_task);
  auto run = [&](int task) {
    failed[task] = body(task, &group, closure);
    if (failed[task]) reasons[task] = raised;
  };
  std::vector<std::thread> threads;
  for (int task = 1; task < group.num_task; ++task) threads.emplace_back(run, task);
  run(0);
  for (auto& thread : threads) thread.join();
  for (int task = 0; task < group.num_task; ++task)
    if (failed[task]) return raised = reasons[task], failed[task];
  return 0;
}

void* alloc_workspace(int, int, uint64_t size, int, int) {
  syscall(kMark);
  void* data = allocate(size);
  syscall(kMark);
  return data;
}

int free_workspace(int, int, void* data) {
  syscall(kMark);
  release(data);
  syscall(kMark);
  return 0;
}

int function_call(void*, TVMFFIAny*, int32_t, TVMFFIAny* result) {  // of runtime.NumThreads
  result->type_index = kTVMFFIInt;
  result->v_int64 = num_threads;
  return 0;
}

int lookup(void*, const char* name, void** found) {
  if (std::strcmp(name, "runtime.NumThreads")) return raised = name, -1;
  *found = &num_threads;  // a handle that nobody looks into
  return 0;
}

int init_once(void** handle, int (*init)(void**)) { return *handle ? 0 : init(handle); }

// ---- A library and its one kernel

TVMFFISafeCallType open_kernel(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) die(dlerror());
  const std::map<const char*, void*> symbols{
      {"__TVMBackendParallelLaunch", reinterpret_cast<void*>(parallel_launch)},
      {"__TVMBackendAllocWorkspace", reinterpret_cast<void*>(alloc_workspace)},
      {"__TVMBackendFreeWorkspace", reinterpret_cast<void*>(free_workspace)},
      {"__TVMFFIFunctionCall", reinterpret_cast<void*>(function_call)},
      {"__TVMFFIEnvModLookupFromImports", reinterpret_cast<void*>(lookup)},
      {"__TVMFFIHandleInitOnce", reinterpret_cast<void*>(init_once)},
  };
  for (auto [name, function] : symbols)
    if (auto** slot = static_cast<void**>(dlsym(library, name))) *slot = function;
  auto kernel = reinterpret_cast<TVMFFISafeCallType>(dlsym(library, "__tvm_ffi_kernel"));
  if (!kernel) die(path + " has no function 'kernel'");
  return kernel;
}

// ---- The pipe

template <typename T>
bool read_all(T* to, size_t count) {
  return std::fread(to, sizeof(T), count, stdin) == count;
}

template <typename T>
T read_one() {
  T value;
  if (!read_all(&value, 1)) die("request ends early");
  return value;
}

void write_string(const std::string& text) {
  auto length = static_cast<uint32_t>(text.size());
  std::fwrite(&length, sizeof length, 1, stdout);
  std::fwrite(text.data(), 1, length, stdout);
}

struct Array {
  DLTensor tensor{};
  std::vector<int64_t> shape;
  size_t size = 1;  // bytes

  void receive() {
    auto code = read_one<uint8_t>(), bits = read_one<uint8_t>();
    shape.resize(read_one<uint32_t>());
    for (auto& extent : shape) size *= extent = read_one<int64_t>();
    size = size * bits / 8;
    tensor.data = allocate(size);
    tensor.device = {kDLCPU, 0};
    tensor.ndim = static_cast<int32_t>(shape.size());
    tensor.dtype = {code, bits, 1};
    tensor.shape = shape.data();
    if (!read_all(static_cast<char*>(tensor.data), size)) die("request ends early");
  }
};

void serve(TVMFFISafeCallType kernel, std::vector<Array>& arrays) {
  std::vector<TVMFFIAny> args(arrays.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = &arrays[i].tensor;
  }
  TVMFFIAny result{};
  raised.clear();
  syscall(kMark);
  bool failed = kernel(nullptr, args.data(), static_cast<int32_t>(args.size()), &result);
  syscall(kMark);
  write_string(failed && raised.empty() ? "the kernel failed" : raised);
  for (auto& array : arrays) {
    if (!failed) std::fwrite(array.tensor.data, 1, array.size, stdout);
    release(array.tensor.data);
  }
  std::fflush(stdout);
}

}  // namespace

extern "C" void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t n) {
  raised = std::string(kind) + ": ";
  for (int32_t i = 0; i < n; ++i) raised += parts[i];
}

int main(int argc, char** argv) {
  if (argc != 2) die("usage: runner THREADS");
  num_threads = std::atoi(argv[1]);
  std::map<std::string, TVMFFISafeCallType> kernels;
  for (uint32_t length; read_all(&length, 1);) {
    std::string path(length, '\0');
    if (!read_all(path.data(), length)) die("request ends early");
    if (!kernels.count(path)) kernels[path] = open_kernel(path);
    std::vector<Array> arrays(read_one<uint32_t>());
    for (auto& array : arrays) array.receive();
    serve(kernels[path], arrays);
  }
}
