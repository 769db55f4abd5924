// The machine of kernels/cuda/device_hopper.cuh on a processor; see on_host.hpp and on_host_hopper.cpp.
#pragma once

#define ON_HOST_HOPPER true

struct Gate {
  int arrivals, missing;
  long long bytes;
  unsigned openings;
};

namespace on_host {

void multiply(float* sums, int columns, Operand a, Operand b);
void products_wait(unsigned left);
void products_ready(bool ready);

}  // namespace on_host

unsigned shared_address(const void* shared);
void gate_make(Gate* gate, unsigned arrivals);
void gate_arrive(Gate* gate);
void gate_expect(Gate* gate, unsigned bytes);
void gate_wait(Gate* gate, unsigned parity);
void copy_bulk(void* shared, const void* global, unsigned bytes, Gate* gate);
void publish();
void warpgroup_meet(int place);
Operand operand_at(const void* shared);
void products_end();

// An address that is no memory of this process would end it.
inline void prefetch(const void* global) { *static_cast<volatile const char*>(global); }

inline void products_begin() { on_host::products_ready(true); }

template <int columns>
void multiply(float (&sums)[columns / 2], Operand a, Operand b) {
  on_host::multiply(sums, columns, a, b);
}

template <int left>
void products_wait() {
  on_host::products_wait(left);
}

template <int count>
void products_wait(float (&)[count]) {
  on_host::products_wait(0);
  on_host::products_ready(false);
}

template <int count>
void registers_down() {}
template <int count>
void registers_up() {}

inline int uniform(int value) { return on_host::of_lane<int>(on_host::exchange(value), 0); }
