// The weights of linear layers on a CPU with AVX-512: laid out for products, and their gradient in bf16.
//
//   Packed for x M: the columns of M by threes of registers (`in_columns`), each panel in one piece, (in / STEP, columns) steps.
//
// The gradient of a layer's weight and bias:  dW = dyᵀ x,  db = Σ dy over rows, added to what is there or written over it.
//
//   y_gradient: (R, O), x: (R, I) bf16 as uint16_t;  weight_gradient: (O, I), bias_gradient: (O) fp32. O and I are multiples of 16.
//
// PANEL rows at a time are laid out for the registers, which the second cache holds, and added to dW, each number of it by one
// thread and in the order of the rows: the same bits whatever the number of threads. A "step" is two rows, pair by pair.

#include <omp.h>
#include <algorithm>

#include "tiles.h"

namespace {

// weight (rows, width) fp32. M is the weight, or its transpose.
template <typename T>
void pack(const float* weight, typename T::type* packed, long rows, long width, bool transposed) {
  const long in = transposed ? width : rows, out = transposed ? rows : width, steps = in / T::STEP;
#pragma omp parallel
  {
    long panel = 0;
    in_columns<3>(out, [&](auto columns, long first) {
      if (panel++ % omp_get_num_threads() != omp_get_thread_num()) return;
      for (long column = 0; column < columns.value * LANES; column += LANES) {
        const auto place = [&](long step) { return packed + first * in + (step * columns.value * LANES + column) * T::STEP; };
        if (transposed)
          for (long start = 0; start < steps; start += LANES) {
            const long count = std::min(LANES, steps - start);
            __m512 square[LANES];
            for (long row = 0; row < LANES; ++row) square[row] = T::take(weight + (first + column + row) * width + start * T::STEP, count);
            transpose(square);
            for (long step = 0; step < count; ++step) _mm512_storeu_ps((void*)place(start + step), square[step]);
          }
        else
          for (long step = 0; step < steps; ++step) {
            const float* row = weight + step * T::STEP * width + first + column;
            T::lay_step(place(step), row, row + (T::STEP - 1) * width);
          }
      }
    });
  }
}

}  // namespace

extern "C" {

void pack_fp32(const float* weight, float* packed, long rows, long width, int transposed) { pack<Fp32>(weight, packed, rows, width, transposed); }

#ifdef __AVX512BF16__
void pack_bf16(const float* weight, uint16_t* packed, long rows, long width, int transposed) { pack<Bf16>(weight, packed, rows, width, transposed); }
#endif
}

#ifdef __AVX512BF16__

namespace {

constexpr long PANEL = 384;        // rows

// Rows as steps, (width / columns, padded / 2, columns) of them: what a product reads lies in one piece. The padding is 0.
template <long columns>
inline void lay_steps(uint16_t* to, const uint16_t* from, long width, long first, long rows, long padded) {
  for (long at = 0; at < width; at += LANES) {
    uint16_t pairs[2 * LANES];
    const uint16_t* row = from + first * width + at;
    if (first < rows) Bf16::lay_step(pairs, row, first + 1 < rows ? row + width : nullptr);
    else std::memset(pairs, 0, sizeof pairs);
    for (long part = 0; part < LANES; part += columns)
      std::memcpy(to + ((at + part) * padded / 2 + first / 2 * columns) * 2, pairs + 2 * part, columns * 2 * sizeof *to);
  }
}

// ROWS rows of dW from one block of dy's steps and `COLUMNS` blocks of x's, `apart` numbers from each other. adds: to what is there.
template <int COLUMNS>
inline void add_product(const uint16_t* slopes, const uint16_t* inputs, long apart, long steps, float* to, long stride, bool adds) {
  __m512 sums[ROWS][COLUMNS];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (long step = 0; step < steps; ++step) {
    __m512 columns[COLUMNS];
    for (int column = 0; column < COLUMNS; ++column) columns[column] = _mm512_loadu_ps((const void*)(inputs + column * apart + step * 2 * LANES));
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const __m512 one = Bf16::broadcast(slopes + (step * ROWS + row) * 2);
#pragma GCC unroll 4
      for (int column = 0; column < COLUMNS; ++column) sums[row][column] = Bf16::multiply_add(sums[row][column], one, columns[column]);
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int column = 0; column < COLUMNS; ++column) {
      float* sum = to + row * stride + column * LANES;
      store(sum, adds ? _mm512_add_ps(load(sum), sums[row][column]) : sums[row][column]);
    }
}

// Sums over the steps of a block of ROWS columns, in fp32.
inline void add_sums(const uint16_t* slopes, long steps, float* to, bool adds) {
  __m512 sum = _mm512_setzero_ps();
  for (long step = 0; step < steps; ++step) sum = _mm512_add_ps(sum, load(slopes + step * 2 * ROWS));
  alignas(64) float pairs[LANES];
  store(pairs, sum);
  for (int row = 0; row < ROWS; ++row) to[row] = (adds ? to[row] : 0.0f) + (pairs[2 * row] + pairs[2 * row + 1]);
}

}  // namespace

extern "C" {

int linear_gradient(const uint16_t* y_gradient, const uint16_t* x, float* weight_gradient, float* bias_gradient, long rows, long out, long in,
                    int adds) {
  const size_t of_inputs = padded_to_lines(PANEL * in * sizeof *x), of_slopes = padded_to_lines(PANEL * out * sizeof *x);
  char* memory = workspace(of_inputs + of_slopes);
  if (memory == nullptr) return 1;
  uint16_t *inputs = (uint16_t*)memory, *slopes = (uint16_t*)(memory + of_inputs);
#pragma omp parallel
  for (long start = 0; start < rows; start += PANEL) {
    const long count = std::min(PANEL, rows - start), padded = (count + 1) / 2 * 2;
#pragma omp for schedule(static)
    for (long first = 0; first < padded; first += 2) {
      lay_steps<LANES>(inputs, x + start * in, in, first, count, padded);
      lay_steps<ROWS>(slopes, y_gradient + start * out, out, first, count, padded);
    }
    // A panel of columns stays in the cache while a thread's own rows of dW pass by.
    const long blocks = out / ROWS, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const long own = blocks * thread / threads * ROWS, end = blocks * (thread + 1) / threads * ROWS;
    for (long at = own; at < end; at += ROWS) add_sums(slopes + at * padded, padded / 2, bias_gradient + at, adds || start > 0);
    in_columns<3>(in, [&](auto columns, long first) {
      for (long at = own; at < end; at += ROWS)
        add_product<columns.value>(slopes + at * padded, inputs + first * padded, LANES * padded, padded / 2, weight_gradient + at * in + first, in,
                                   adds || start > 0);
    });
#pragma omp barrier
  }
  return 0;
}
}

#endif
