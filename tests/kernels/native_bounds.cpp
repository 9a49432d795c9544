// The CPU kernel on buffers of exactly the size it may touch, to be compiled with AddressSanitizer
// and UndefinedBehaviorSanitizer (test_native.py). Spot checks against plain loops.
#include "qgemm.cpp"

#include <cstdio>
#include <vector>

namespace {

int Value(const uint8_t* row, int64_t i, bool int4) {
  if (!int4) return static_cast<int8_t>(row[i]);
  const int nibble = row[i / 2] >> (i % 2 * 4) & 15;
  return nibble > 7 ? nibble - 16 : nibble;
}

// 0 unless a result is wrong.
int Check(int64_t m, int64_t n, int64_t row_bytes, bool int4, bool nz, int output) {
  const int64_t step = (n + 15) / 16 * 512, size[] = {4, 1, 2, 2};
  std::vector<uint8_t> x(m * row_bytes), rows(n * row_bytes), blocks;
  for (auto& value : x) value = std::rand();
  for (auto& value : rows) value = std::rand();
  if (nz) {
    blocks.resize((row_bytes + 31) / 32 * step);
    for (int64_t row = 0; row < n; ++row)
      for (int64_t at = 0; at < row_bytes; ++at)
        blocks[at / 32 * step + row * 32 + at % 32] = rows[row * row_bytes + at];
  }
  std::vector<float> scale(n, 1e-3f), pertoken(m, 1.0f);
  std::vector<int64_t> packed(n, 0x3A83126F);
  std::vector<uint8_t> out(m * n * size[output]);
  const bool integers = output == 1;
  const LqMatmul call{x.data(),
                      nz ? blocks.data() : rows.data(),
                      integers ? static_cast<const void*>(packed.data()) : scale.data(),
                      output > 1 ? pertoken.data() : nullptr,
                      nullptr,
                      nullptr,
                      out.data(),
                      m,
                      n,
                      row_bytes,
                      row_bytes,
                      nz ? 32 : row_bytes,
                      1,
                      nz ? step : 32,
                      int4,
                      integers,
                      output,
                      1};
  if (lq_matmul(&call)) return 1;
  for (int i = 0; output == 0 && i < 40; ++i) {
    const int64_t row = std::rand() % m, column = std::rand() % n;
    int32_t want = 0, got;
    for (int64_t k = 0; k < row_bytes * (int4 ? 2 : 1); ++k)
      want += Value(x.data() + row * row_bytes, k, int4) *
              Value(rows.data() + column * row_bytes, k, int4);
    std::memcpy(&got, out.data() + 4 * (row * n + column), 4);
    if (got != want) return 1;
  }
  return 0;
}

}  // namespace

int main() {
  struct Size {
    int64_t m, row_bytes, n;
  };
  std::vector<Size> sizes = {{1, 16448, 70},
                             {1, 32772, 5},
                             {7, 4100, 130},
                             {33, 2052, 300},
                             {300, 2116, 550}};  // more than one part, and slice, of each kind
  for (int64_t m : {1, 5, 7, 31, 32, 33, 48, 63, 257, 300})
    for (int64_t row_bytes : {1, 4, 32, 33, 64, 65, 96, 256, 257, 512, 516, 1030, 1088, 1093})
      for (int64_t n : {1, 15, 16, 17, 33, 65, 130}) sizes.push_back({m, row_bytes, n});
  int64_t calls = 0;
  for (const auto& [m, row_bytes, n] : sizes)
    for (int kind = 0; kind < 4; ++kind)
      for (int output = 0; output < (m < 100 ? 4 : 1); ++output) {
        const bool int4 = kind % 2, nz = kind / 2;
        if (int4 && row_bytes % 4) continue;
        if (Check(m, n, row_bytes, int4, nz, output)) {
          std::printf("wrong: m %ld, n %ld, row_bytes %ld, int4 %d, nz %d, output %d\n", m, n,
                      row_bytes, int4, nz, output);
          return 1;
        }
        ++calls;
      }
  std::printf("%ld calls\n", calls);
}
