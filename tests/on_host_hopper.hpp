// The machine of kernels/cuda/device_hopper.cuh on a processor; see on_host.hpp.
//
// Products and copies run beside the threads, at any time from their beginning until somebody has waited for them. With
// threads in rising order all run at the last moment, in falling order at once: what is right only with one of both
// lacks a wait. Products read shared memory as it was published: what threads wrote shows up there with `publish` only.
// Operands are read as their 64 bits say.
#pragma once

struct Gate {
  int arrivals, missing;
  long long bytes;
  unsigned openings;
};

namespace on_host {

struct BulkCopy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  Gate* gate;
};

struct Product {
  float* sums;
  int columns;
  Operand a, b;
};

// Of a thread: groups of products that are not done, the last of them still open, and whether one may begin.
struct Products {
  std::vector<std::vector<Product>> groups{1};
  bool ready = false;
};

inline std::vector<Products> products;
inline std::vector<BulkCopy> copies;
inline std::vector<unsigned char> published;
inline Barrier meetings[16];
// Dynamic shared memory begins here: what must lie at a multiple of more than 16, the kernel must put there.
constexpr unsigned FIRST_ADDRESS = 1024 + 16;

inline unsigned char* dynamic_bytes() { return reinterpret_cast<unsigned char*>(dynamic.data()); }
inline bool at_once() { return direction != 1; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "thread %u of block %u: %s\n", current, blockIdx.x, what);
  std::abort();
}

inline void open_if_complete(Gate& gate) {
  if (gate.missing == 0 && gate.bytes == 0) {
    gate.missing = gate.arrivals;
    ++gate.openings;
  }
}

inline void arrive(const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memcpy(published.data() + (copy.to - dynamic_bytes()), copy.from, copy.bytes);
  copy.gate->bytes -= copy.bytes;
  if (copy.gate->bytes < 0) fail("more bytes arrive than were announced");
  open_if_complete(*copy.gate);
}

inline Float16 element(Operand operand, int line, int feature) {
  const unsigned stride = operand >> 32 & 0x3fff;
  if (operand >> 62 != 1 || (operand >> 49 & 7) || stride == 0) fail("an operand that is not swizzled by 128 bytes");
  unsigned address = (operand & 0x3fff) * 16 + line / 8 * stride * 16 + line % 8 * 128 + feature * 2;
  address ^= address >> 3 & 0x70;
  if (address < FIRST_ADDRESS || address - FIRST_ADDRESS + 2 > published.size()) fail("an operand beyond its memory");
  Float16 value;
  std::memcpy(&value, published.data() + (address - FIRST_ADDRESS), 2);
  return value;
}

inline void run(const Product& product) {
  const int lane = current % 32, warp = current % 128 / 32;
  float rows[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      rows[half][k] = quick_float(element(product.a, warp * 16 + lane / 4 + 8 * half, k).bits);
    }
  }
  for (int i = 0; i < product.columns / 4; ++i) {
    float column[16], terms[17];
    for (int k = 0; k < 16; ++k) column[k] = quick_float(element(product.b, i / 2 * 8 + lane % 4 * 2 + i % 2, k).bits);
    for (int half = 0; half < 2; ++half) {
      float* sum = product.sums + i / 2 * 4 + half * 2 + i % 2;
      terms[0] = *sum;
      for (int k = 0; k < 16; ++k) terms[k + 1] = rows[half][k] * column[k];
      *sum = cut_sum(terms, 17);
    }
  }
}

inline void begin_block() {
  products = std::vector<Products>(fibers.size());
  published = std::vector<unsigned char>(dynamic.size() * 16, 0xff);
  for (Barrier& meeting : meetings) meeting = Barrier();
}

inline void end_block() {
  if (!copies.empty()) fail("a block ends before its copies do");
}

inline const bool hopper = (before_block = begin_block, after_block = end_block, true);

}  // namespace on_host

inline unsigned shared_address(const void* shared) {
  return on_host::FIRST_ADDRESS + (unsigned)(static_cast<const unsigned char*>(shared) - on_host::dynamic_bytes());
}

inline void gate_make(Gate* gate, unsigned arrivals) { *gate = {(int)arrivals, (int)arrivals, 0, 0}; }

inline void gate_arrive(Gate* gate) {
  --gate->missing;
  on_host::open_if_complete(*gate);
}

inline void gate_expect(Gate* gate, unsigned bytes) {
  gate->bytes += bytes;
  gate_arrive(gate);
}

inline void gate_wait(Gate* gate, unsigned parity) {
  for (int turns = 0; gate->openings % 2 == parity; ++turns) {
    if (turns == 100000) on_host::fail("waits at a gate that never opens");
    std::vector<on_host::BulkCopy> others;
    for (const on_host::BulkCopy& copy : on_host::copies) {
      if (copy.gate == gate) {
        on_host::arrive(copy);
      } else {
        others.push_back(copy);
      }
    }
    on_host::copies = others;
    if (gate->openings % 2 == parity) on_host::go_on();
  }
}

inline void copy_bulk(void* shared, const void* global, unsigned bytes, Gate* gate) {
  if (bytes % 16 || shared_address(shared) % 16 || reinterpret_cast<size_t>(global) % 16) {
    on_host::fail("a copy that is not of whole 16 bytes");
  }
  const on_host::BulkCopy copy{static_cast<unsigned char*>(shared), global, bytes, gate};
  if (on_host::at_once()) {
    on_host::arrive(copy);
  } else {
    on_host::copies.push_back(copy);
  }
}

// An address that is no memory of this process would end it.
inline void prefetch(const void* global) { *static_cast<volatile const char*>(global); }

inline void publish() { std::memcpy(on_host::published.data(), on_host::dynamic.data(), on_host::published.size()); }

inline void warpgroup_meet(int place) { on_host::wait(on_host::meetings[place], 128); }

inline Operand operand_at(const void* shared) {
  return (Operand)1 << 62 | (Operand)(1024 >> 4) << 32 | (Operand)1 << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}

inline void products_begin() { on_host::products[on_host::current].ready = true; }

template <int columns>
void multiply(float (&sums)[columns / 2], Operand a, Operand b) {
  on_host::Products& mine = on_host::products[on_host::current];
  if (!mine.ready) on_host::fail("a product of sums that may still be written");
  const on_host::Product product{sums, columns, a, b};
  if (on_host::at_once()) {
    on_host::run(product);
  } else {
    mine.groups.back().push_back(product);
  }
}

inline void products_end() { on_host::products[on_host::current].groups.emplace_back(); }

template <int left>
void products_wait() {
  auto& groups = on_host::products[on_host::current].groups;
  while (groups.size() > left + 1) {
    for (const on_host::Product& product : groups.front()) on_host::run(product);
    groups.erase(groups.begin());
  }
}

template <int count>
void products_wait(float (&)[count]) {
  products_wait<0>();
  on_host::products[on_host::current].ready = false;
}

template <int count>
void registers_down() {}
template <int count>
void registers_up() {}

inline int uniform(int value) { return on_host::of_lane<int>(on_host::exchange(value), 0); }
