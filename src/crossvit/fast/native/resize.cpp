// A resize of fp32 planes along each side on a CPU with AVX-512: each output is the weighted sum of
// TAPS neighbouring inputs along each side.
//
//   planes: (P, H, W) -> (P, h, w).  row_starts (h), row_weights (h, TAPS), column_starts (w),
//   column_weights (TAPS, w): the first input of each output, and the weights, zeros where an input
//   would lie outside. Every start leaves TAPS inputs.

#include "arguments.h"
#include "simd.h"

namespace {

constexpr int TAPS = 4;

}  // namespace

extern "C" {

// Scalar reference: fp32, sums in double.
int resize_reference(const ResizeArgs* args) {
  for (long plane = 0; plane < args->count; ++plane)
    for (long row = 0; row < args->out_height; ++row)
      for (long column = 0; column < args->out_width; ++column) {
        double sum = 0.0;
        for (long y = 0; y < TAPS; ++y)
          for (long x = 0; x < TAPS; ++x)
            sum += (double)args->row_weights[row * TAPS + y] *
                   args->column_weights[x * args->out_width + column] *
                   args->planes[(plane * args->height + args->row_starts[row] + y) * args->width +
                                args->column_starts[column] + x];
        args->out[(plane * args->out_height + row) * args->out_width + column] = (float)sum;
      }
  return 0;
}

int resize_fp32(const ResizeArgs* args) {
  const long width = args->width, out_width = args->out_width;
  const float* column_weights = args->column_weights;
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    // One output row at the input's width.
    float* buffer = (float*)workspace((round_up_to_lanes(width) + TAPS) * sizeof(float));
    failed = buffer == nullptr;
#pragma omp for schedule(static) collapse(2)
    for (long plane = 0; plane < args->count; ++plane)
      for (long row = 0; row < args->out_height; ++row) {
        if (buffer == nullptr) continue;
        const float *from = args->planes + (plane * args->height + args->row_starts[row]) * width,
                    *weight = args->row_weights + row * TAPS;
        for (long at = 0; at < width; at += LANES) {
          const __mmask16 valid = first_lanes(width - at);
          __m512 sum = _mm512_setzero_ps();
          for (int tap = 0; tap < TAPS; ++tap)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(weight[tap]),
                                  _mm512_maskz_loadu_ps(valid, from + tap * width + at), sum);
          store(buffer + at, sum);
        }
        float* to = args->out + (plane * args->out_height + row) * out_width;
        for (long at = 0; at < out_width; at += LANES) {
          const __mmask16 valid = first_lanes(out_width - at);
          const __m512i starts = _mm512_maskz_loadu_epi32(valid, args->column_starts + at);
          __m512 sum = _mm512_setzero_ps();
          for (int tap = 0; tap < TAPS; ++tap)
            sum =
                _mm512_fmadd_ps(_mm512_maskz_loadu_ps(valid, column_weights + tap * out_width + at),
                                _mm512_i32gather_ps(starts, buffer + tap, 4), sum);
          _mm512_mask_storeu_ps(to + at, valid, sum);
        }
      }
  }
  return failed;
}
}
