#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#ifdef HOTNEURON_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hotneuron {
namespace {

#ifdef HOTNEURON_AMX
// Linux lets a process use tiles once it has asked.
bool may_use_tiles() {
#ifdef __linux__
  constexpr int kAskForFeature = 0x1023, kTileData = 18;
  constexpr unsigned kTileBits = 1u << 24 | 1u << 25;  // tiles, and products of their int8
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTileBits) != kTileBits) return false;
  return syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> available_tables() {
  std::vector<const Kernels*> tables;
#ifdef HOTNEURON_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni")) {
#ifdef HOTNEURON_AMX
      if (may_use_tiles()) tables.push_back(&kAmxKernels);
#endif
      tables.push_back(&kAvx512VnniKernels);
    }
    tables.push_back(&kAvx512Kernels);
  }
  if (has_avx2) tables.push_back(&kAvx2Kernels);
#endif
  tables.push_back(&kGenericKernels);
  return tables;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_relaxed);
  if (table == nullptr) {
    table = available_tables().front();
    current.store(table);
  }
  return *table;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : available_tables()) names.emplace_back(table->name);
  return names;
}

void force_isa(const std::string& name) {
  std::string known;
  for (const Kernels* table : available_tables()) {
    if (name.empty() || name == table->name) {
      current.store(table);
      return;
    }
    known += known.empty() ? table->name : std::string(", ") + table->name;
  }
  throw std::invalid_argument("This machine does not run the instruction set '" + name +
                              "'; it runs: " + known + ".");
}

}  // namespace hotneuron
