// Self-attention of a few hundred tokens on a CPU with AVX-512: out = softmax(scale q kᵀ) v.
//
//   qkv: (B, N, 3, H, K) dense, the projection as it comes;  out: (B, N, H, K), as the output projection takes it.
//   log_sums: (B, H, N) fp32, log2 of the sum of e^(scale q·k) over the keys, which the gradient needs; or null.
//   K, the width of a head, is a multiple of 16. fp32, or bf16 as uint16_t: products of bf16 pairs are summed in fp32.
//
// One image's head at a time: its keys and values are laid out once for the registers, then ROWS queries at a time get the
// scores of all N keys (which stay in the first cache), their softmax, and the mixture. Nothing of size N x N is made, no
// head is copied together. Compiled at run time by native.py; docs/performance.md says what it gave.

#include "tiles.h"

namespace {

// Softmax of scale · scores without its division: weights in fp32 as T, their sum. The padding gets weight 0.
template <typename T>
inline float softmax(float* scores, typename T::type* weights, long tokens, long padded, float scale, float* log_sum) {
  const long last = padded - LANES;
  const __mmask16 real = first_lanes(tokens - last);
  __m512 end = _mm512_mask_blend_ps(real, _mm512_set1_ps(-1e30f), load(scores + last));
  store(scores + last, end);
  for (long at = 0; at < last; at += LANES) end = _mm512_max_ps(end, load(scores + at));
  const float most = _mm512_reduce_max_ps(end) * scale * LOG2_E;
  const __m512 factor = _mm512_set1_ps(scale * LOG2_E), largest = _mm512_set1_ps(most);
  __m512 total = _mm512_setzero_ps();
  for (long at = 0; at < padded; at += LANES) {
    __m512 weight = T::exponential(_mm512_fmsub_ps(load(scores + at), factor, largest));
    if (at == last) weight = _mm512_maskz_mov_ps(real, weight);
    total = _mm512_add_ps(total, weight);
    store(weights + at, weight);
  }
  const float sum = _mm512_reduce_add_ps(total);
  if (log_sum) *log_sum = most + __builtin_log2f(sum);
  return sum;
}

template <typename T>
void head(const typename T::type* qkv, typename T::type* out, float* log_sums, long tokens, long heads, long width, float scale,
          typename T::type* keys, typename T::type* values, float* scores, typename T::type* weights) {
  const long padded = padded_to_lanes(tokens), dim = heads * width, stride = 3 * dim;
  lay_transposed<T>(keys, qkv + dim, stride, tokens, padded, width);
  lay_straight<T>(values, qkv + 2 * dim, stride, tokens, padded, width);
  for (long first = 0; first < tokens; first += ROWS) {
    const typename T::type *queries[ROWS], *rows[ROWS];
    typename T::type* outs[ROWS];
    long own[ROWS];
    for (int row = 0; row < ROWS; ++row) {  // the last token is computed more than once where the rows do not fill a block
      own[row] = first + row < tokens ? first + row : tokens - 1;
      queries[row] = qkv + own[row] * stride;
      outs[row] = out + own[row] * dim;
      rows[row] = weights + row * padded;
    }
    in_columns<3>(padded, [&](auto columns, long at) {
      __m512 sums[ROWS][columns.value];
      product<T, columns.value>(queries, keys + at * T::STEP, padded, width / T::STEP, sums);
      for (int row = 0; row < ROWS; ++row)
        for (int column = 0; column < columns.value; ++column) store(scores + row * padded + at + column * LANES, sums[row][column]);
    });
    float total[ROWS];
    for (int row = 0; row < ROWS; ++row)
      total[row] = softmax<T>(scores + row * padded, weights + row * padded, tokens, padded, scale, log_sums ? log_sums + own[row] : nullptr);
    in_columns<2>(width, [&](auto columns, long at) {
      __m512 sums[ROWS][columns.value];
      product<T, columns.value>(rows, values + at * T::STEP, width, padded / T::STEP, sums);
      for (int row = 0; row < ROWS; ++row)
        for (int column = 0; column < columns.value; ++column)
          store(outs[row] + at + column * LANES, _mm512_mul_ps(sums[row][column], _mm512_set1_ps(1.0f / total[row])));
    });
  }
}

template <typename T>
int attention(const typename T::type* qkv, typename T::type* out, float* log_sums, long batch, long tokens, long heads, long width, float scale) {
  const long padded = padded_to_lanes(tokens), dim = heads * width;
  const size_t matrix = padded_to_lines(padded * width * sizeof(typename T::type)), scores = padded_to_lines(ROWS * padded * sizeof(float));
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    using type = typename T::type;
    char* space = workspace(2 * matrix + 2 * scores);
    failed = space == nullptr;
#pragma omp for schedule(static)
    for (long item = 0; item < batch * heads; ++item) {
      if (space == nullptr) continue;
      const long image = item / heads, which = item % heads;
      head<T>(qkv + image * tokens * 3 * dim + which * width, out + image * tokens * dim + which * width,
              log_sums ? log_sums + item * tokens : nullptr, tokens, heads, width, scale, (type*)space, (type*)(space + matrix),
              (float*)(space + 2 * matrix), (type*)(space + 2 * matrix + scores));
    }
  }
  return failed;
}

}  // namespace

extern "C" {

int attention_fp32(const float* qkv, float* out, float* log_sums, long batch, long tokens, long heads, long width, float scale) {
  return attention<Fp32>(qkv, out, log_sums, batch, tokens, heads, width, scale);
}

#ifdef __AVX512BF16__
int attention_bf16(const uint16_t* qkv, uint16_t* out, float* log_sums, long batch, long tokens, long heads, long width, float scale) {
  return attention<Bf16>(qkv, out, log_sums, batch, tokens, heads, width, scale);
}
#endif
}
