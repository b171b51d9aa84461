#pragma once

#include <stdexcept>

namespace convllava {

// What a graph, a session option or the environment asks for and these kernels do not have.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace convllava
