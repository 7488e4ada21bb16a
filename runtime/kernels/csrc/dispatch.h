// Which instruction set runs. Chosen at first use from what the CPU (and its operating system) can
// do; tests force another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hotneuron {

const Kernels& kernels();
std::vector<std::string> available_isas();  // best first
void force_isa(const std::string& name);    // empty: the best; throws std::invalid_argument

}  // namespace hotneuron
