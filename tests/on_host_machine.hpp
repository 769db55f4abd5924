// What both parts of the machine, on_host.cpp and on_host_hopper.cpp, know of it.
#pragma once
#include "device_hopper.cuh"

#include <csetjmp>
#include <ucontext.h>

#include <vector>

namespace on_host {

struct Barrier {
  unsigned arrived = 0;
  long generation = 0;
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t beginning;
  jmp_buf kept;
  std::vector<char> stack;
  bool begun = false, done;
  int parity;
  std::vector<std::vector<Copy>> groups;
};

extern std::vector<Fiber> fibers;
extern unsigned direction;
extern size_t dynamic_size;

constexpr int TERMS = 17;  // of a sum of the tensor core: what was there, and 16 products

[[noreturn]] void fail(const char* what);
void go_on();
void wait(Barrier& barrier, unsigned members);
float quick_float(unsigned bits);
float cut_sum(const float (&terms)[TERMS]);
void begin_block();
void end_block();

}  // namespace on_host
