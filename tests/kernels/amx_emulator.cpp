// Executes the AMX instructions of targets/amx.cpp on a processor that has AVX-512 VNNI but no AMX: each of
// them raises SIGILL, and the handler does what the instruction does, by Intel's Architecture Instruction
// Set Extensions Programming Reference, with the exceptions it documents. Link it with native_bounds.cpp
// and the kernels, compiled with LQ_HAS_amx and LQ_EMULATED_AMX. At the end it prints how many it executed,
// and fails if a thread did not release its tiles.
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
  int rows, bytes;  // of a row; 0 if it is not configured
  uint8_t data[16][64];
};
// of a thread
thread_local Tile tiles[8];
thread_local bool is_configured = false;
std::atomic<int64_t> executed{0}, threads_with_tiles{0};

[[noreturn]] void Fail(const char* why) {
  char text[200];
  const int size = std::snprintf(text, sizeof(text), "AMX: %s\n", why);
  _exit(write(1, text, size) < 0 ? 3 : 2);
}

void Configure(const uint8_t* config) {
  if (config && config[0] != 1) Fail("palette");
  if (config && (config[1] || std::any_of(config + 2, config + 16, [](uint8_t b) { return b; }) ||
                 std::any_of(config + 32, config + 48, [](uint8_t b) { return b; }) ||
                 std::any_of(config + 56, config + 64, [](uint8_t b) { return b; })))
    Fail("reserved bytes of the configuration");
  threads_with_tiles += int(config != nullptr) - int(is_configured);
  is_configured = config != nullptr;
  std::memset(tiles, 0, sizeof(tiles));
  for (int i = 0; config && i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, 2);
    tiles[i].bytes = bytes;
    tiles[i].rows = config[48 + i];
    if (bytes > 64 || tiles[i].rows > 16 || !bytes != !tiles[i].rows) Fail("size of a tile");
  }
}

Tile& Configured(int number) {
  if (number > 7 || !tiles[number].rows || tiles[number].bytes % 4) Fail("tile not configured");
  return tiles[number];
}

// c (m, n) += a (m, k) unsigned * b (k, n) signed; a word of a and b holds four values along k.
__attribute__((target("avx2"))) void Dpbusd(Tile* c, const Tile& a, const Tile& b) {
  if (c == &a || c == &b || &a == &b) Fail("a tile is an operand twice");
  if (c->bytes != b.bytes || c->rows != a.rows || a.bytes / 4 != b.rows) Fail("sizes of operands");
  for (int m = 0; m < c->rows; ++m) {
    int32_t row[16];
    std::memcpy(row, c->data[m], 64);
    for (int k = 0; k < a.bytes / 4; ++k)
      for (int n = 0; n < c->bytes / 4; ++n) {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i)
          sum += a.data[m][4 * k + i] * static_cast<int8_t>(b.data[k][4 * n + i]);
        row[n] = static_cast<int32_t>(static_cast<uint32_t>(row[n]) + sum);
      }
    std::memcpy(c->data[m], row, c->bytes);
  }
}

// ---- decoding ----

// Executes the instruction at `code` if it is one of AMX's; returns its length, else 0.
int Execute(const uint8_t* code, const greg_t* registers) {
  constexpr int kNumbered[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};
  // a VEX prefix of three bytes, 0F 38, W 0, 128 bits
  if (code[0] != 0xC4 || (code[1] & 31) != 2 || code[2] & 0x84) return 0;
  enum Prefix { kNone, k66, kF3, kF2 } prefix = Prefix(code[2] & 3);
  const int opcode = code[3], mode = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
  const int third = ~code[2] >> 3 & 15, extend = ~code[1] >> 5 & 7;  // R, X, B
  if (mode == 3) {
    if (opcode == 0x5E && prefix == k66) {
      Dpbusd(&Configured(reg), Configured(rm), Configured(third));
    } else if (opcode == 0x49 && prefix == kF2 && rm == 0) {
      std::memset(Configured(reg).data, 0, sizeof(Tile::data));
    } else if (opcode == 0x49 && prefix == kNone && code[4] == 0xC0) {
      Configure(nullptr);
    } else {
      return 0;
    }
    return 5;
  }
  const uint8_t* end = code + 5;
  int64_t address = 0, stride = 0;
  int base = rm;
  if (rm == 4) {
    const int index = (*end >> 3 & 7) | (extend & 2) << 2;
    if (index != 4) stride = registers[kNumbered[index]] << (*end >> 6);
    base = *end++ & 7;
  }
  const bool no_base = mode == 0 && base == 5;
  int32_t displacement = 0;
  if (mode == 1) {
    displacement = static_cast<int8_t>(*end++);
  } else if (mode == 2 || no_base) {
    std::memcpy(&displacement, end, 4);
    end += 4;
  }
  address = displacement;
  if (!no_base)
    address += registers[kNumbered[base | (extend & 1) << 3]];
  else if (rm == 5)
    address += reinterpret_cast<int64_t>(end);  // relative to the next instruction
  if (opcode == 0x49 && prefix == kNone && reg == 0) {
    Configure(reinterpret_cast<const uint8_t*>(address + stride));
  } else if (opcode == 0x4B && rm == 4 && prefix != kNone) {  // F2, 66: load; F3: store
    Tile& tile = Configured(reg);
    if (prefix != kF3) std::memset(tile.data, 0, sizeof(tile.data));
    for (int row = 0; row < tile.rows; ++row) {
      auto* const memory = reinterpret_cast<uint8_t*>(address + row * stride);
      if (prefix == kF3)
        std::memcpy(memory, tile.data[row], tile.bytes);
      else
        std::memcpy(tile.data[row], memory, tile.bytes);
    }
  } else {
    return 0;
  }
  return end - code;
}

void OnIllegalInstruction(int, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  int length = 0, count = 0;
  // a trap takes far longer than the instruction: it executes all that follow one another
  while ((length = Execute(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers))) {
    registers[REG_RIP] += length;
    ++count;
  }
  if (!count) Fail("an illegal instruction that is not AMX's");
  executed += count;
}

void AtExit() {
  std::printf("AMX: %ld instructions executed\n", long(executed));
  std::fflush(stdout);
  if (threads_with_tiles) Fail("a thread has not released its tiles");
}

const int started = [] {
  struct sigaction action = {};
  action.sa_sigaction = OnIllegalInstruction;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr) || std::atexit(AtExit);
}();

}  // namespace
