// Layers between products in bf16 on a CPU with AVX-512, forward and backward: LayerNorm, GELU, the residual sum.
//
//   Tokens on the residual way are fp32, what goes into a product or comes out of one is bf16 (uint16_t). R rows of D numbers,
//   D a multiple of 16. Without bf16 in the processor there are none of these.

#include <algorithm>
#include <vector>

#include "tiles.h"

#ifdef __AVX512BF16__

namespace {

constexpr long BLOCK = 4096;  // numbers a thread takes at a time
constexpr long PARTS = 32;    // of the rows, whose sums are added in order: the same bits whatever the number of threads

// Φ(x), the normal distribution's share below x, and its bell e^(-x²/2), by Abramowitz and Stegun 7.1.26: to 6e-5 with the
// reciprocal's 14 bits, a sixtieth of what bf16 can tell.
inline void normal(__m512 x, __m512& share, __m512& bell) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  bell = power_of_two_roughly(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-LOG2_E)));
  const __m512 t = _mm512_rcp14_ps(polynomial(z, 0.3275911f, 1.0f));
  const __m512 halves = polynomial(t, 0.5307027145f, -0.7265760135f, 0.7107068705f, -0.142248368f, 0.127414796f, 0.0f);
  const __m512 beyond = _mm512_mul_ps(halves, bell);  // of |x|
  share = _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), _mm512_sub_ps(_mm512_set1_ps(1.0f), beyond), beyond);
}

}  // namespace

extern "C" {

// y = x Φ(x)
void gelu(const uint16_t* x, uint16_t* y, long count) {
#pragma omp parallel for schedule(static)
  for (long block = 0; block < count; block += BLOCK)
    for (long at = block; at < std::min(count, block + BLOCK); at += LANES) {
      __m512 share, bell;
      const __m512 own = load(x + at);
      normal(own, share, bell);
      store(y + at, _mm512_mul_ps(own, share));
    }
}

// dx = dy (Φ(x) + x e^(-x²/2) / √(2π)), and y again, which the gradient of the layer behind needs.
void gelu_gradient(const uint16_t* x, const uint16_t* y_gradient, uint16_t* y, uint16_t* x_gradient, long count) {
#pragma omp parallel for schedule(static)
  for (long block = 0; block < count; block += BLOCK)
    for (long at = block; at < std::min(count, block + BLOCK); at += LANES) {
      __m512 share, bell;
      const __m512 own = load(x + at);
      normal(own, share, bell);
      store(y + at, _mm512_mul_ps(own, share));
      const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(own, _mm512_set1_ps(0.39894228f)), bell, share);
      store(x_gradient + at, _mm512_mul_ps(load(y_gradient + at), slope));
    }
}

// y = x + factor · update: (B, count) with one factor for each of B; factor may be null.
void residual(const float* x, const uint16_t* update, const float* factor, float* y, long batch, long count) {
#pragma omp parallel for schedule(static) collapse(2)
  for (long image = 0; image < batch; ++image)
    for (long block = 0; block < count; block += BLOCK) {
      const __m512 own = _mm512_set1_ps(factor ? factor[image] : 1.0f);
      for (long at = image * count + block; at < image * count + std::min(count, block + BLOCK); at += LANES)
        store(y + at, _mm512_fmadd_ps(own, load(update + at), load(x + at)));
    }
}

// y = weight (x − mean) rstd + bias;  statistics: (R, 2), mean and rstd = 1 / √(variance + eps).
void layer_norm(const float* x, const float* weight, const float* bias, uint16_t* y, float* statistics, long rows, long width, float eps) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < rows; ++row) {
    const float* own = x + row * width;
    __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (long at = 0; at < width; at += LANES) total = _mm512_add_ps(total, load(own + at));
    const float mean = _mm512_reduce_add_ps(total) / width;
    const __m512 means = _mm512_set1_ps(mean);
    for (long at = 0; at < width; at += LANES) {
      const __m512 apart = _mm512_sub_ps(load(own + at), means);
      squares = _mm512_fmadd_ps(apart, apart, squares);
    }
    const float rstd = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
    const __m512 rstds = _mm512_set1_ps(rstd);
    for (long at = 0; at < width; at += LANES)
      store(y + row * width + at, _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(load(own + at), means), rstds), load(weight + at), load(bias + at)));
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = rstd;
  }
}

// With n = (x − mean) rstd and g = weight ∘ dy:  dx = past + rstd (g − mean(g) − n mean(g ∘ n)), where `past` is the gradient that x
// has of what goes past the norm;  dweight += Σ dy ∘ n;  dbias += Σ dy.
void layer_norm_gradient(const uint16_t* y_gradient, const float* past, const float* x, const float* weight, const float* statistics, float* x_gradient,
                         float* weight_gradient, float* bias_gradient, long rows, long width) {
  std::vector<float> sums(PARTS * 2 * width, 0.0f);
  const long each = (rows + PARTS - 1) / PARTS;
#pragma omp parallel for schedule(static)
  for (long part = 0; part < PARTS; ++part) {
    float *weight_sums = sums.data() + part * 2 * width, *bias_sums = weight_sums + width;
    for (long row = part * each; row < std::min(rows, (part + 1) * each); ++row) {
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
  for (long part = 0; part < PARTS; ++part)
    for (long at = 0; at < width; ++at) {
      weight_gradient[at] += sums[part * 2 * width + at];
      bias_gradient[at] += sums[part * 2 * width + width + at];
    }
}
}

#endif
