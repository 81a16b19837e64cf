// Layers of an encoder block's sublayers, a few rows at a time: LayerNorm, GELU, matmuls with
// packed weights.
//
//   Rows are dense, widths multiples of LANES. T, Fp32 or Bf16: the inputs of matmuls; LayerNorm
//   and sums are fp32.

#pragma once

#include <omp.h>

#include <algorithm>

#include "simd.h"

namespace {

// Rows that go through a sublayer together: their intermediate results fit the L2 cache.
constexpr long BLOCK_ROWS = 64;

// Bytes of a block of rows.
template <typename Element>
inline size_t block_bytes(long width) {
  return round_up_to_lines(BLOCK_ROWS * width * sizeof(Element));
}

// body(first, count, memory) for all rows, at most BLOCK_ROWS at once and evenly over the threads;
// `bytes` of memory a thread. True if memory ran out, and then nothing is done.
template <typename Body>
bool for_row_blocks(long rows, size_t bytes, Body body) {
  const long tiles = (rows + ROWS - 1) / ROWS, each = round_up_to_lines(bytes);
  char* memory = workspace(std::max(64L, each * omp_get_max_threads()));
  if (memory == nullptr) return true;
#pragma omp parallel
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const long start = tiles * thread / threads * ROWS,
               stop = std::min(rows, tiles * (thread + 1) / threads * ROWS);
    for (long first = start; first < stop; first += BLOCK_ROWS)
      body(first, std::min(BLOCK_ROWS, stop - first), memory + thread * each);
  }
  return false;
}

// x W of a few rows, W packed by linear.cpp: finish(row, column, sums) for every register of the
// result (rows, out).
template <typename T, typename Finish>
inline void matmul_packed(const typename T::type* x, long rows, const typename T::type* packed,
                          long in, long out, Finish finish) {
  for_column_blocks<3>(out, [&](auto columns, long first) {
    for (long start = 0; start < rows; start += ROWS) {
      const typename T::type* left[ROWS];
      for (int row = 0; row < ROWS; ++row) left[row] = x + std::min(start + row, rows - 1) * in;
      __m512 sums[ROWS][columns.value];
      matmul_tile<T, columns.value>(left, packed + first * in, columns.value * LANES, in / T::STEP,
                                    sums);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row)
        if (start + row < rows)
#pragma GCC unroll 3
          for (int column = 0; column < columns.value; ++column)
            finish(start + row, first + column * LANES, sums[row][column]);
    }
  });
}

// y = weight (x − mean) rstd + bias;  statistics: (rows, 2), mean and rstd = 1 / √(variance + eps),
// or null.
template <typename Element>
inline void layernorm_rows(const float* x, const float* weight, const float* bias, float eps,
                           Element* y, float* statistics, long rows, long width) {
  for (long row = 0; row < rows; ++row, x += width, y += width) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (long at = 0; at < width; at += LANES) sum = _mm512_add_ps(sum, load(x + at));
    const float mean = _mm512_reduce_add_ps(sum) / width;
    const __m512 means = _mm512_set1_ps(mean);
    for (long at = 0; at < width; at += LANES) {
      const __m512 deviation = _mm512_sub_ps(load(x + at), means);
      squares = _mm512_fmadd_ps(deviation, deviation, squares);
    }
    const float rstd = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
    const __m512 rstds = _mm512_set1_ps(rstd);
    for (long at = 0; at < width; at += LANES)
      store(y + at, _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(load(x + at), means), rstds),
                                    load(weight + at), load(bias + at)));
    if (statistics) {
      statistics[2 * row] = mean;
      statistics[2 * row + 1] = rstd;
    }
  }
}

// With n = (x − mean) rstd and g = weight ∘ dy:
//   dx = residual_grad + rstd (g − mean(g) − n mean(g ∘ n)), residual_grad the gradient of the skip
//   connection;  sums (2, width): += Σ dy ∘ n, Σ dy.
inline void layernorm_backward_rows(const float* grad_out, const float* residual_grad,
                                    const float* x, const float* weight, const float* statistics,
                                    float* grad_inp, float* sums, long rows, long width) {
  float *weight_sums = sums, *bias_sums = sums + width;
  for (long row = 0; row < rows; ++row) {
    const long start = row * width;
    const __m512 mean = _mm512_set1_ps(statistics[2 * row]),
                 rstd = _mm512_set1_ps(statistics[2 * row + 1]);
    __m512 sum = _mm512_setzero_ps(), dot = _mm512_setzero_ps();
    for (long at = 0; at < width; at += LANES) {
      const __m512 grad = load(grad_out + start + at),
                   normalized = _mm512_mul_ps(_mm512_sub_ps(load(x + start + at), mean), rstd);
      const __m512 grad_normalized = _mm512_mul_ps(grad, load(weight + at));
      sum = _mm512_add_ps(sum, grad_normalized);
      dot = _mm512_fmadd_ps(grad_normalized, normalized, dot);
      store(weight_sums + at, _mm512_fmadd_ps(grad, normalized, load(weight_sums + at)));
      store(bias_sums + at, _mm512_add_ps(grad, load(bias_sums + at)));
    }
    const __m512 mean_grad = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width),
                 mean_dot = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / width);
    for (long at = 0; at < width; at += LANES) {
      const __m512 normalized = _mm512_mul_ps(_mm512_sub_ps(load(x + start + at), mean), rstd);
      const __m512 grad_normalized = _mm512_mul_ps(load(grad_out + start + at), load(weight + at));
      const __m512 grad = _mm512_mul_ps(
          rstd, _mm512_fnmadd_ps(normalized, mean_dot, _mm512_sub_ps(grad_normalized, mean_grad)));
      store(grad_inp + start + at, _mm512_add_ps(grad, load(residual_grad + start + at)));
    }
  }
}

// Φ(x), the normal distribution's CDF, and the Gaussian e^(-x²/2). Below 0 the CDF is the Gaussian
// times a polynomial in 1 / (1 + p |x|): Abramowitz and Stegun's 7.1.26 in fp32, to 2e-7; for bf16
// a shorter one, fitted so that x Φ(x) is off by 5e-4 of itself and 1e-6 at most; rounding to bf16
// changes up to 4e-3 of it.
template <typename T>
inline void normal_distribution(__m512 x, __m512& cdf, __m512& gaussian) {
  constexpr bool precise = T::STEP == 1;
  const __m512 size = _mm512_abs_ps(x);
  gaussian = T::exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * LOG2_E)));
  const __m512 t = T::reciprocal(polynomial(size, precise ? 0.231641888f : 0.345f, 1.0f));
  const __m512 tail_ratio = precise ? polynomial(t, 0.5307027145f, -0.7265760135f, 0.7107068705f,
                                                 -0.142248368f, 0.127414796f, 0.0f)
                                    : polynomial(t, 0.31862122f, 0.02177677f, 0.15960201f, 0.0f);
  const __m512 tail = _mm512_mul_ps(tail_ratio, gaussian);  // of |x|
  cdf = _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)),
                             _mm512_sub_ps(_mm512_set1_ps(1.0f), tail), tail);
}

// y = x Φ(x), in place too.
template <typename T>
inline void gelu_rows(const typename T::type* x, typename T::type* y, long count) {
  for (long at = 0; at < count; at += LANES) {
    __m512 cdf, gaussian;
    const __m512 value = load(x + at);
    normal_distribution<T>(value, cdf, gaussian);
    store(y + at, _mm512_mul_ps(value, cdf));
  }
}

// y = x Φ(x) and, in place of grad_y, the gradient of x: times Φ(x) + x e^(-x²/2) / √(2π).
template <typename T>
inline void gelu_backward_rows(const typename T::type* x, typename T::type* y,
                               typename T::type* grad_y, long count) {
  for (long at = 0; at < count; at += LANES) {
    __m512 cdf, gaussian;
    const __m512 value = load(x + at);
    normal_distribution<T>(value, cdf, gaussian);
    store(y + at, _mm512_mul_ps(value, cdf));
    const __m512 grad =
        _mm512_fmadd_ps(_mm512_mul_ps(value, _mm512_set1_ps(0.39894228f)), gaussian, cdf);
    store(grad_y + at, _mm512_mul_ps(load(grad_y + at), grad));
  }
}

}  // namespace
