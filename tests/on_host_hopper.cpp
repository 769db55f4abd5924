// The machine of on_host_hopper.hpp.
//
// Products and copies run beside the threads, at any time from their beginning until somebody has waited for them. With
// threads in rising order all run at the last moment, in falling order at once: what is right only with one of both
// lacks a wait. Products read shared memory as it was published: what threads wrote shows up there with `publish` only.
// Operands are read as their 64 bits say.
#include "on_host_machine.hpp"

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

static std::vector<Products> products;
static std::vector<BulkCopy> copies;
static std::vector<unsigned char> published;
static Barrier meetings[16];
// Dynamic shared memory begins here: what must lie at a multiple of more than 16, the kernel must put there.
constexpr unsigned FIRST_ADDRESS = 1024 + 16;

static bool at_once() { return direction != 1; }

static void open_if_complete(Gate& gate) {
  if (gate.missing == 0 && gate.bytes == 0) {
    gate.missing = gate.arrivals;
    ++gate.openings;
  }
}

static void arrive(const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memcpy(published.data() + (copy.to - dynamic), copy.from, copy.bytes);
  copy.gate->bytes -= copy.bytes;
  if (copy.gate->bytes < 0) fail("more bytes arrive than were announced");
  open_if_complete(*copy.gate);
}

// 16 features of a line: two parts of 16 bytes, each where its address says.
static void read(Operand operand, int line, float (&values)[16]) {
  const unsigned stride = operand >> 32 & 0x3fff;
  if (operand >> 62 != 1 || (operand >> 49 & 7) || stride == 0) fail("an operand that is not swizzled by 128 bytes");
  for (int part = 0; part < 2; ++part) {
    unsigned address = (operand & 0x3fff) * 16 + line / 8 * stride * 16 + line % 8 * 128 + part * 16;
    address ^= address >> 3 & 0x70;
    if (address < FIRST_ADDRESS || address - FIRST_ADDRESS + 16 > published.size()) fail("an operand beyond its memory");
    unsigned short bits[8];
    std::memcpy(bits, published.data() + (address - FIRST_ADDRESS), 16);
    for (int k = 0; k < 8; ++k) values[8 * part + k] = quick_float(bits[k]);
  }
}

static void run(const Product& product) {
  const int lane = current % 32, warp = current % 128 / 32;
  float rows[2][16];
  for (int half = 0; half < 2; ++half) read(product.a, warp * 16 + lane / 4 + 8 * half, rows[half]);
  for (int i = 0; i < product.columns / 4; ++i) {
    float column[16], terms[TERMS];
    read(product.b, i / 2 * 8 + lane % 4 * 2 + i % 2, column);
    for (int half = 0; half < 2; ++half) {
      float* sum = product.sums + i / 2 * 4 + half * 2 + i % 2;
      terms[0] = *sum;
      for (int k = 0; k < 16; ++k) terms[k + 1] = rows[half][k] * column[k];
      *sum = cut_sum(terms);
    }
  }
}

void begin_block() {
  products.assign(fibers.size(), Products());
  published.assign(dynamic_size, 0xff);
  for (Barrier& meeting : meetings) meeting = Barrier();
}

void end_block() {
  if (!copies.empty()) fail("a block ends before its copies do");
}

void multiply(float* sums, int columns, Operand a, Operand b) {
  Products& mine = products[current];
  if (!mine.ready) fail("a product of sums that may still be written");
  const Product product{sums, columns, a, b};
  if (at_once()) {
    run(product);
  } else {
    mine.groups.back().push_back(product);
  }
}

void products_wait(unsigned left) {
  auto& groups = products[current].groups;
  while (groups.size() > left + 1) {
    for (const Product& product : groups.front()) run(product);
    groups.erase(groups.begin());
  }
}

void products_ready(bool ready) { products[current].ready = ready; }

}  // namespace on_host

unsigned shared_address(const void* shared) {
  return on_host::FIRST_ADDRESS + (unsigned)(static_cast<const unsigned char*>(shared) - on_host::dynamic);
}

void gate_make(Gate* gate, unsigned arrivals) { *gate = {(int)arrivals, (int)arrivals, 0, 0}; }

void gate_arrive(Gate* gate) {
  --gate->missing;
  on_host::open_if_complete(*gate);
}

void gate_expect(Gate* gate, unsigned bytes) {
  gate->bytes += bytes;
  gate_arrive(gate);
}

void gate_wait(Gate* gate, unsigned parity) {
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

void copy_bulk(void* shared, const void* global, unsigned bytes, Gate* gate) {
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

void publish() { std::memcpy(on_host::published.data(), on_host::dynamic, on_host::published.size()); }

void warpgroup_meet(int place) { on_host::wait(on_host::meetings[place], 128); }

Operand operand_at(const void* shared) {
  return (Operand)1 << 62 | (Operand)(1024 >> 4) << 32 | (Operand)1 << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}

void products_end() { on_host::products[on_host::current].groups.emplace_back(); }
