// What the C++ tests share: a check that is counted and goes on, and random numbers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>

inline int failures = 0;

inline void expect(bool condition, const char* what, int line) {
  if (condition) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

inline std::mt19937 random_bits(0);

inline int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}
