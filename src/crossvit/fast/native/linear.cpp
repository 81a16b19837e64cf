// The weights of linear layers on a CPU with AVX-512: laid out for products, and their gradient in bf16.
//
//   Packed for x M: the columns of M by threes of registers (`in_columns`), each panel in one piece, (in / STEP, columns) steps.
//
// The gradient of a layer's weight and bias:  dW = dyᵀ x,  db = Σ dy over rows, added to what is there or written over it.
//
//   y_gradient: (R, O), x: (R, I) bf16 as uint16_t;  weight_gradient: (O, I), bias_gradient: (O) fp32. O and I are multiples of 16.
//
// dW is shared out among the threads. Each lays out what its share reads, PANEL rows at a time, which the second cache holds: it waits for
// none, and none reads what another core has laid. Each number of dW is summed by one thread and in the order of the
// rows: the same bits whatever the number of threads. A "step" is two rows, pair by pair.

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

constexpr long PANEL = 192;  // rows

// Numbers of a block of `columns` columns: its steps, and a line more, or the same row of many blocks would meet in few sets of the first cache.
inline long laid_of(long padded, long columns) { return padded * columns + 2 * LANES; }

// Where the block of column `at` has the step of `row`.
template <long columns>
inline uint16_t* step_of(uint16_t* laid, long at, long row, long padded) { return laid + at / columns * laid_of(padded, columns) + row * columns; }

// Rows of `width` numbers, `stride` apart, as steps in blocks of LANES columns: what a product reads lies in one piece. The padding is 0.
inline void lay_inputs(uint16_t* to, const uint16_t* from, long stride, long width, long rows, long padded) {
  for (long row = 0; row < padded; row += 2)
    for (long at = 0; at < width; at += LANES) {
      uint16_t* place = step_of<LANES>(to, at, row, padded);
      const uint16_t* here = from + row * stride + at;
      if (row < rows) Bf16::lay_step(place, here, row + 1 < rows ? here + stride : nullptr);
      else _mm512_storeu_si512(place, _mm512_setzero_si512());
    }
}

// The same in blocks of ROWS columns, a line at a time: the pairs of two rows, then those of the next two.
inline void lay_slopes(uint16_t* to, const uint16_t* from, long stride, long width, long rows, long padded) {
  const __m512i low = _mm512_set_epi16(55, 39, 54, 38, 53, 37, 52, 36, 51, 35, 50, 34, 49, 33, 48, 32, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(ROWS));
  for (long row = 0; row < padded; row += 4)
    for (long at = 0; at < width; at += LANES) {
      const auto two = [&](long first) {
        const auto one = [&](long own) { return own < rows ? _mm256_loadu_si256((const __m256i*)(from + own * stride + at)) : _mm256_setzero_si256(); };
        return _mm512_inserti64x4(_mm512_castsi256_si512(one(first)), one(first + 1), 1);
      };
      const __m512i upper = two(row), lower = two(row + 2);
      _mm512_storeu_si512(step_of<ROWS>(to, at, row, padded), _mm512_permutex2var_epi16(upper, low, lower));
      _mm512_storeu_si512(step_of<ROWS>(to, at + ROWS, row, padded), _mm512_permutex2var_epi16(upper, high, lower));
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

// Sums over an even number of steps of a block of ROWS columns, in fp32.
inline void add_sums(const uint16_t* slopes, long steps, float* to, bool adds) {
  const __m512 ones = (__m512)_mm512_set1_epi16(0x3f80);
  __m512 sum = _mm512_setzero_ps();  // of the first of two steps, of the second
  for (long step = 0; step < steps; step += 2) sum = Bf16::multiply_add(sum, _mm512_loadu_ps((const void*)(slopes + step * 2 * ROWS)), ones);
  const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  _mm256_storeu_ps(to, adds ? _mm256_add_ps(_mm256_loadu_ps(to), both) : both);
}

// A thread's share of the rows of dW or of its columns, in whole registers.
struct Share {
  long first, width;
  Share(long all, long which, long shares) : first(all / LANES * which / shares * LANES), width(all / LANES * (which + 1) / shares * LANES - first) {}
};

// Into how many shares the rows of dW go; its columns go into threads / so many. A thread lays what it reads: the less in all, the better.
inline long shares_of_rows(long out, long in, long threads) {
  const auto laid = [&](long shares) { return out / shares + in * shares / threads; };
  long best = 1;
  for (long shares = 2; shares <= threads; ++shares)
    if (threads % shares == 0 && laid(shares) <= laid(best)) best = shares;
  return best;
}

struct Sizes {
  long rows, out, in;
};

// One thread's share of dW, and of db unless it is null.
inline void add_share(const uint16_t* y_gradient, const uint16_t* x, float* weight_gradient, float* bias_gradient, Sizes sizes, Share of_out, Share of_in,
                      uint16_t* slopes, uint16_t* inputs, bool adds) {
  const long rows = sizes.rows, out = sizes.out, in = sizes.in;
  for (long start = 0; start < rows; start += PANEL, adds = true) {
    const long count = std::min(PANEL, rows - start), padded = (count + 3) / 4 * 4;
    lay_inputs(inputs, x + start * in + of_in.first, in, of_in.width, count, padded);
    lay_slopes(slopes, y_gradient + start * out + of_out.first, out, of_out.width, count, padded);
    if (bias_gradient)
      for (long at = 0; at < of_out.width; at += ROWS) add_sums(step_of<ROWS>(slopes, at, 0, padded), padded / 2, bias_gradient + of_out.first + at, adds);
    // Columns of x stay in the cache while the share's rows of dW pass by, and the rows that are laid next come nearer.
    const long tiles = of_out.width / ROWS * ((of_in.width / LANES + 2) / 3), next = start + PANEL, coming = std::max(0L, std::min(PANEL, rows - next));
    Soon inputs_soon(x + next * in + of_in.first, coming, in, of_in.width, tiles);
    Soon slopes_soon(y_gradient + next * out + of_out.first, coming, out, of_out.width, tiles);
    in_columns<3>(of_in.width, [&](auto columns, long first) {
      for (long at = 0; at < of_out.width; at += ROWS) {
        inputs_soon.bring();
        slopes_soon.bring();
        add_product<columns.value>(step_of<ROWS>(slopes, at, 0, padded), step_of<LANES>(inputs, first, 0, padded), laid_of(padded, LANES), padded / 2,
                                   weight_gradient + (of_out.first + at) * in + of_in.first + first, in, adds);
      }
    });
  }
}

}  // namespace

extern "C" {

int linear_gradient(const uint16_t* y_gradient, const uint16_t* x, float* weight_gradient, float* bias_gradient, long rows, long out, long in,
                    int adds) {
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads(), shares = shares_of_rows(out, in, threads);
    const Share of_out(out, thread % shares, shares), of_in(in, thread / shares, threads / shares);
    const size_t of_slopes = laid_of(PANEL, ROWS) * of_out.width / ROWS * sizeof *x, of_inputs = laid_of(PANEL, LANES) * of_in.width / LANES * sizeof *x;
    if (of_out.width && of_in.width) {
      char* memory = workspace(of_slopes + of_inputs);
      failed = memory == nullptr;
      if (memory)
        add_share(y_gradient, x, weight_gradient, of_in.first ? nullptr : bias_gradient, {rows, out, in}, of_out, of_in, (uint16_t*)memory,
                  (uint16_t*)(memory + of_slopes), adds);
    }
  }
  return failed;
}
}

#endif
