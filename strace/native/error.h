// How a failure inside becomes a return value and a message at the C interface.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

namespace strace {

// The message that st_error gives to this thread.
std::string &last_error();

// What `call` gives; or `failure`, with its exception's text as the last error.
template <class Call, class Result>
Result guarded(Result failure, Call &&call) {
  try {
    return call();
  } catch (const std::exception &error) {
    last_error() = error.what();
    return failure;
  }
}

inline void require(bool holds, const char *message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace strace
