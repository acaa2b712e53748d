// dot_runner: calls a dot product of another engine's library so that benchmarks/insn_plugin.c can
// count it. It contains none of theirs: the library is built by whoever compares, from their sources.
//
//   qemu-aarch64 -plugin insn_plugin.so -L /usr/aarch64-linux-gnu dot_runner LIBRARY FUNCTION K ROWS
//
// The interface is that of ggml's ggml_vec_dot_<a>_<b>: one row of weights by one of activations.
// Blocks are zeros: what is counted does not depend on the data.

#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

using Dot = void (*)(int k, float* sum, size_t, const void* weights, size_t, const void* activations,
                     size_t, int num_rows);

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "usage: dot_runner LIBRARY FUNCTION K ROWS\n"), 2;
  void* library = dlopen(argv[1], RTLD_LAZY);
  auto dot = library ? reinterpret_cast<Dot>(dlsym(library, argv[2])) : nullptr;
  if (!dot) return std::fprintf(stderr, "dot_runner: %s\n", dlerror()), 1;
  int k = std::atoi(argv[3]), rows = std::atoi(argv[4]);
  std::vector<char> weights(4 * k), activations(4 * k);  // no format takes more than 4 bytes
  float sum;
  dot(k, &sum, 0, weights.data(), 0, activations.data(), 0, 1);  // binds the symbols it calls
  constexpr long kMark = 5000;
  syscall(kMark);
  for (int row = 0; row < rows; ++row)
    dot(k, &sum, 0, weights.data(), 0, activations.data(), 0, 1);
  syscall(kMark);
}
