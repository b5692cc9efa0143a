// Kernels for AVX-512 with AMX: bf16 matrices are multiplied in tiles of 16 tokens by 16 output rows, so that 16 tokens
// cost little more arithmetic than one. A single token goes the same way, because AMX adds in another order than AVX-512
// does, and a row's bits must not depend on what shares the pass.
#include <atomic>

#include "kernels_avx512bf16.h"

namespace strace {
namespace {

constexpr int TILE_ROWS = 16;
constexpr size_t SUM_BYTES = PANEL * sizeof(float);

// What `ldtilecfg` reads: per tile register its rows and their bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Sums in tiles 0 to 3, activations in 4 and 5, weights in 6 and 7; the odd ones of activations and sums 2 and 3 are of
  // the tokens past the 16th.
  constexpr explicit TileConfig(int tokens) {
    const int low = tokens < TILE_ROWS ? tokens : TILE_ROWS, high = tokens > TILE_ROWS ? tokens - TILE_ROWS : 1;
    const int of_tile[8] = {low, low, high, high, low, high, TILE_ROWS, TILE_ROWS};
    for (int i = 0; i < 8; i++) rows[i] = static_cast<uint8_t>(of_tile[i]), row_bytes[i] = 64;
  }
};

// Made beforehand: the compiler does not know how much of it the instruction reads, and could leave a local one half made.
struct TileConfigs {
  TileConfig of[2 * TILE_ROWS];
};

template <int... Minus>
constexpr TileConfigs make_configs(std::integer_sequence<int, Minus...>) {
  return {{TileConfig(Minus + 1)...}};
}

constexpr TileConfigs CONFIGS = make_configs(std::make_integer_sequence<int, 2 * TILE_ROWS>{});

// The tile registers of a thread. Loading their shapes costs a tenth of a small panel, so it is done when they change.
class TileRegisters {
 public:
  void fit(int tokens) {
    if (tokens == tokens_) return;
    tokens_ = tokens;
    _tile_loadconfig(&CONFIGS.of[tokens - 1]);
  }
  ~TileRegisters() { _tile_release(); }

 private:
  int tokens_ = 0;
};

struct TiledBf16 : Bf16Pairs {
  static constexpr int TOKENS = 2 * TILE_ROWS;
  using State = TileRegisters;

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums) {
    constexpr bool TWO = T > TILE_ROWS;
    const uint8_t *later = x + TILE_ROWS * stride;
    float *later_sums = sums + TILE_ROWS * PANEL;
    // The compiler does not know either that loading a tile reads memory.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadd(0, sums, SUM_BYTES);
    _tile_loadd(1, sums + 16, SUM_BYTES);
    if (TWO) {
      _tile_loadd(2, later_sums, SUM_BYTES);
      _tile_loadd(3, later_sums + 16, SUM_BYTES);
    }
    for (int g = 0; g < groups; g++, weights += group_bytes(FORMAT), x += ACTIVATION_BYTES, later += ACTIVATION_BYTES) {
      _tile_loadd(4, x, stride);
      _tile_loadd(6, weights, STEP_BYTES);
      _tile_loadd(7, weights + 64, STEP_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (TWO) {
        _tile_loadd(5, later, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, SUM_BYTES);
    _tile_stored(1, sums + 16, SUM_BYTES);
    if (TWO) {
      _tile_stored(2, later_sums, SUM_BYTES);
      _tile_stored(3, later_sums + 16, SUM_BYTES);
    }
  }
};

}  // namespace

extern const Kernels AMX;
const Kernels AMX = make_kernels<Fp32, TiledBf16, Int8, Int4>("avx512amx");

}  // namespace strace
