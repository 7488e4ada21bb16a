#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace hotneuron {
namespace {

std::vector<const Kernels*> available_tables() {
  std::vector<const Kernels*> tables;
#ifdef HOTNEURON_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni")) tables.push_back(&kAvx512VnniKernels);
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
