// A resize of fp32 planes along each side, each output the weighted sum of TAPS neighbouring inputs, on a CPU with AVX-512.
//
//   planes: (P, H, W) -> (P, h, w).  row_starts (h), row_weights (h, TAPS), column_starts (w), column_weights (TAPS, w): the first
//   input of each output, and the weights, zeros where an input would lie outside. Every start leaves TAPS inputs.

#include <vector>

#include "tiles.h"

namespace {

constexpr int TAPS = 4;

}  // namespace

extern "C" {

void resize(const float* planes, float* out, long count, long height, long width, long out_height, long out_width, const int32_t* row_starts,
            const float* row_weights, const int32_t* column_starts, const float* column_weights) {
#pragma omp parallel
  {
    std::vector<float> line(padded_to_lanes(width) + TAPS);  // one output row at the input's width
#pragma omp for schedule(static) collapse(2)
    for (long plane = 0; plane < count; ++plane)
      for (long row = 0; row < out_height; ++row) {
        const float *from = planes + (plane * height + row_starts[row]) * width, *weight = row_weights + row * TAPS;
        for (long at = 0; at < width; at += LANES) {
          const __mmask16 real = width - at >= LANES ? 0xFFFF : (__mmask16)((1u << (width - at)) - 1);
          __m512 sum = _mm512_setzero_ps();
          for (int tap = 0; tap < TAPS; ++tap) sum = _mm512_fmadd_ps(_mm512_set1_ps(weight[tap]), _mm512_maskz_loadu_ps(real, from + tap * width + at), sum);
          store(line.data() + at, sum);
        }
        float* to = out + (plane * out_height + row) * out_width;
        for (long at = 0; at < out_width; at += LANES) {
          const __mmask16 real = out_width - at >= LANES ? 0xFFFF : (__mmask16)((1u << (out_width - at)) - 1);
          const __m512i starts = _mm512_maskz_loadu_epi32(real, column_starts + at);
          __m512 sum = _mm512_setzero_ps();
          for (int tap = 0; tap < TAPS; ++tap)
            sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(real, column_weights + tap * out_width + at), _mm512_i32gather_ps(starts, line.data() + tap, 4), sum);
          _mm512_mask_storeu_ps(to + at, real, sum);
        }
      }
  }
}
}
