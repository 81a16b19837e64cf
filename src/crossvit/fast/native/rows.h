// What the halves of an encoder block are made of, for a few rows at a time: LayerNorm, GELU, products with packed weights.
//
//   Rows are dense, widths multiples of LANES. T, Fp32 or Bf16, is of what goes into a product; LayerNorm and sums are fp32.

#pragma once

#include <omp.h>
#include <algorithm>

#include "tiles.h"

namespace {

constexpr long BLOCK_ROWS = 64;  // that go through a half together: the second cache holds what they make

template <typename Number>
inline size_t block_of(long width) { return padded_to_lines(BLOCK_ROWS * width * sizeof(Number)); }  // bytes

// work(first, count, memory) for all rows, at most BLOCK_ROWS at once and evenly over the threads; each has `bytes` of its own.
// Returns whether there was too little memory, and then nothing is done.
template <typename Work>
bool over_rows(long rows, size_t bytes, Work work) {
  const long tiles = (rows + ROWS - 1) / ROWS, each = padded_to_lines(bytes);
  char* memory = workspace(std::max(64L, each * omp_get_max_threads()));
  if (memory == nullptr) return true;
#pragma omp parallel
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const long start = tiles * thread / threads * ROWS, stop = std::min(rows, tiles * (thread + 1) / threads * ROWS);
    for (long first = start; first < stop; first += BLOCK_ROWS) work(first, std::min(BLOCK_ROWS, stop - first), memory + thread * each);
  }
  return false;
}

// x W of a few rows, W packed by linear.cpp: finish(row, column, sums) for every register of the (rows, out) products.
template <typename T, typename Finish>
inline void times_packed(const typename T::type* x, long rows, const typename T::type* packed, long in, long out, Finish finish) {
  in_columns<3>(out, [&](auto columns, long first) {
    for (long start = 0; start < rows; start += ROWS) {
      const typename T::type* left[ROWS];
      for (int row = 0; row < ROWS; ++row) left[row] = x + std::min(start + row, rows - 1) * in;
      __m512 sums[ROWS][columns.value];
      product<T, columns.value>(left, packed + first * in, columns.value * LANES, in / T::STEP, sums);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row)
        if (start + row < rows)
#pragma GCC unroll 3
          for (int column = 0; column < columns.value; ++column) finish(start + row, first + column * LANES, sums[row][column]);
    }
  });
}

// y = weight (x − mean) rstd + bias;  statistics: (rows, 2), mean and rstd = 1 / √(variance + eps), or null.
template <typename Number>
inline void norm_rows(const float* x, const float* weight, const float* bias, float eps, Number* y, float* statistics, long rows, long width) {
  for (long row = 0; row < rows; ++row, x += width, y += width) {
    __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (long at = 0; at < width; at += LANES) total = _mm512_add_ps(total, load(x + at));
    const float mean = _mm512_reduce_add_ps(total) / width;
    const __m512 means = _mm512_set1_ps(mean);
    for (long at = 0; at < width; at += LANES) {
      const __m512 apart = _mm512_sub_ps(load(x + at), means);
      squares = _mm512_fmadd_ps(apart, apart, squares);
    }
    const float rstd = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
    const __m512 rstds = _mm512_set1_ps(rstd);
    for (long at = 0; at < width; at += LANES)
      store(y + at, _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(load(x + at), means), rstds), load(weight + at), load(bias + at)));
    if (statistics) {
      statistics[2 * row] = mean;
      statistics[2 * row + 1] = rstd;
    }
  }
}

// With n = (x − mean) rstd and g = weight ∘ dy:  dx = past + rstd (g − mean(g) − n mean(g ∘ n)), where `past` is the gradient that x
// has of what goes past the norm;  sums (2, width): += Σ dy ∘ n, Σ dy.
inline void norm_rows_gradient(const float* y_gradient, const float* past, const float* x, const float* weight, const float* statistics, float* x_gradient,
                               float* sums, long rows, long width) {
  float *weight_sums = sums, *bias_sums = sums + width;
  for (long row = 0; row < rows; ++row) {
    const long start = row * width;
    const __m512 mean = _mm512_set1_ps(statistics[2 * row]), rstd = _mm512_set1_ps(statistics[2 * row + 1]);
    __m512 total = _mm512_setzero_ps(), along = _mm512_setzero_ps();
    for (long at = 0; at < width; at += LANES) {
      const __m512 slope = load(y_gradient + start + at), normal = _mm512_mul_ps(_mm512_sub_ps(load(x + start + at), mean), rstd);
      const __m512 weighted = _mm512_mul_ps(slope, load(weight + at));
      total = _mm512_add_ps(total, weighted);
      along = _mm512_fmadd_ps(weighted, normal, along);
      store(weight_sums + at, _mm512_fmadd_ps(slope, normal, load(weight_sums + at)));
      store(bias_sums + at, _mm512_add_ps(slope, load(bias_sums + at)));
    }
    const __m512 of_total = _mm512_set1_ps(_mm512_reduce_add_ps(total) / width), of_along = _mm512_set1_ps(_mm512_reduce_add_ps(along) / width);
    for (long at = 0; at < width; at += LANES) {
      const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(load(x + start + at), mean), rstd);
      const __m512 weighted = _mm512_mul_ps(load(y_gradient + start + at), load(weight + at));
      const __m512 slope = _mm512_mul_ps(rstd, _mm512_fnmadd_ps(normal, of_along, _mm512_sub_ps(weighted, of_total)));
      store(x_gradient + start + at, _mm512_add_ps(slope, load(past + start + at)));
    }
  }
}

// Φ(x), the normal distribution's share below x, and its bell e^(-x²/2). Below 0 the share is the bell times a polynomial in
// 1 / (1 + p |x|): Abramowitz and Stegun's 7.1.26 in fp32, to 2e-7; for bf16 a shorter one, fitted so that
// x Φ(x) is off by 5e-4 of itself and 1e-6 at most; bf16's rounding changes up to 4e-3 of it.
template <typename T>
inline void normal(__m512 x, __m512& share, __m512& bell) {
  constexpr bool exact = T::STEP == 1;
  const __m512 size = _mm512_abs_ps(x);
  bell = T::exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * LOG2_E)));
  const __m512 t = T::reciprocal(polynomial(size, exact ? 0.231641888f : 0.345f, 1.0f));
  const __m512 halves = exact ? polynomial(t, 0.5307027145f, -0.7265760135f, 0.7107068705f, -0.142248368f, 0.127414796f, 0.0f)
                              : polynomial(t, 0.31862122f, 0.02177677f, 0.15960201f, 0.0f);
  const __m512 beyond = _mm512_mul_ps(halves, bell);  // of |x|
  share = _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), _mm512_sub_ps(_mm512_set1_ps(1.0f), beyond), beyond);
}

// y = x Φ(x), in place too.
template <typename T>
inline void gelu_rows(const typename T::type* x, typename T::type* y, long count) {
  for (long at = 0; at < count; at += LANES) {
    __m512 share, bell;
    const __m512 own = load(x + at);
    normal<T>(own, share, bell);
    store(y + at, _mm512_mul_ps(own, share));
  }
}

// y = x Φ(x) and, in place of the gradient of y, that of x: times Φ(x) + x e^(-x²/2) / √(2π).
template <typename T>
inline void gelu_rows_gradient(const typename T::type* x, typename T::type* y, typename T::type* gradient, long count) {
  for (long at = 0; at < count; at += LANES) {
    __m512 share, bell;
    const __m512 own = load(x + at);
    normal<T>(own, share, bell);
    store(y + at, _mm512_mul_ps(own, share));
    const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(own, _mm512_set1_ps(0.39894228f)), bell, share);
    store(gradient + at, _mm512_mul_ps(load(gradient + at), slope));
  }
}

}  // namespace
