// Self-attention of a few hundred tokens on a CPU with AVX-512: out = softmax(scale q kᵀ) v.
//
//   qkv: (B, N, 3, H, K) dense, the output of the projection;  out: (B, N, H, K).
//   log_sums: (B, H, N) fp32, log2 Σ_keys e^(scale q·k), which the backward pass needs; or null.
//   K is a multiple of 16. fp32, or bf16 as uint16_t: products of bf16 pairs are summed in fp32.
//
// One image's head at a time: its keys and values are packed once, then ROWS queries at a time get
// the scores of all N keys (which stay in the L1 cache), their softmax, and the weighted sum of
// the values. No N x N matrix is made and no head is copied. docs/performance.md has the figures.

#include <cmath>
#include <vector>

#include "arguments.h"
#include "simd.h"

extern "C" {

// Scalar reference: fp32, sums in double.
int attention_reference(const AttentionArgs<float>* args) {
  const long dim = args->heads * args->head_dim, N = args->tokens, K = args->head_dim;
  std::vector<double> weights(N);
  for (long b = 0; b < args->batch; ++b)
    for (long h = 0; h < args->heads; ++h)
      for (long i = 0; i < N; ++i) {
        const float* query = args->qkv + (b * N + i) * 3 * dim + h * K;
        double maximum = -INFINITY, sum = 0.0;
        for (long j = 0; j < N; ++j) {
          const float* key = args->qkv + (b * N + j) * 3 * dim + dim + h * K;
          double dot = 0.0;
          for (long k = 0; k < K; ++k) dot += (double)query[k] * key[k];
          weights[j] = args->scale * dot;
          maximum = std::max(maximum, weights[j]);
        }
        for (double& weight : weights) sum += weight = std::exp(weight - maximum);
        if (args->log_sums)
          args->log_sums[(b * args->heads + h) * N + i] =
              (float)((maximum + std::log(sum)) / std::log(2.0));
        for (long k = 0; k < K; ++k) {
          double value = 0.0;
          for (long j = 0; j < N; ++j)
            value += weights[j] * args->qkv[(b * N + j) * 3 * dim + 2 * dim + h * K + k];
          args->out[(b * N + i) * dim + h * K + k] = (float)(value / sum);
        }
      }
  return 0;
}
}

namespace {

// Softmax of scale · scores without its division: stores the weights as T and returns their sum.
// The padding gets weight 0.
template <typename T>
inline float softmax(float* scores, typename T::type* weights, long tokens, long padded,
                     float scale, float* log_sum) {
  const long last = padded - LANES;
  const __mmask16 valid = first_lanes(tokens - last);
  __m512 max_lanes = _mm512_mask_blend_ps(valid, _mm512_set1_ps(-1e30f), load(scores + last));
  store(scores + last, max_lanes);
  for (long at = 0; at < last; at += LANES) max_lanes = _mm512_max_ps(max_lanes, load(scores + at));
  const float maximum = _mm512_reduce_max_ps(max_lanes) * scale * LOG2_E;
  const __m512 log2_scale = _mm512_set1_ps(scale * LOG2_E), shift = _mm512_set1_ps(maximum);
  __m512 total = _mm512_setzero_ps();
  for (long at = 0; at < padded; at += LANES) {
    __m512 weight = T::exponential(_mm512_fmsub_ps(load(scores + at), log2_scale, shift));
    if (at == last) weight = _mm512_maskz_mov_ps(valid, weight);
    total = _mm512_add_ps(total, weight);
    store(weights + at, weight);
  }
  const float sum = _mm512_reduce_add_ps(total);
  if (log_sum) *log_sum = maximum + __builtin_log2f(sum);
  return sum;
}

template <typename T>
void attention_head(const typename T::type* qkv, typename T::type* out, float* log_sums,
                    long tokens, long heads, long width, float scale, typename T::type* keys,
                    typename T::type* values, float* scores, typename T::type* weights) {
  const long padded = round_up_to_lanes(tokens), dim = heads * width, stride = 3 * dim;
  pack_transposed<T>(keys, qkv + dim, stride, tokens, padded, width);
  pack_rows<T>(values, qkv + 2 * dim, stride, tokens, padded, width);
  for (long first = 0; first < tokens; first += ROWS) {
    const typename T::type *queries[ROWS], *weight_rows[ROWS];
    typename T::type* out_rows[ROWS];
    long token[ROWS];
    // The last token is computed more than once where the rows do not fill a block.
    for (int row = 0; row < ROWS; ++row) {
      token[row] = first + row < tokens ? first + row : tokens - 1;
      queries[row] = qkv + token[row] * stride;
      out_rows[row] = out + token[row] * dim;
      weight_rows[row] = weights + row * padded;
    }
    for_column_blocks<3>(padded, [&](auto columns, long at) {
      __m512 sums[ROWS][columns.value];
      matmul_tile<T, columns.value>(queries, keys + at * T::STEP, padded, width / T::STEP, sums);
      for (int row = 0; row < ROWS; ++row)
        for (int column = 0; column < columns.value; ++column)
          store(scores + row * padded + at + column * LANES, sums[row][column]);
    });
    float total[ROWS];
    for (int row = 0; row < ROWS; ++row)
      total[row] = softmax<T>(scores + row * padded, weights + row * padded, tokens, padded, scale,
                              log_sums ? log_sums + token[row] : nullptr);
    for_column_blocks<2>(width, [&](auto columns, long at) {
      __m512 sums[ROWS][columns.value];
      matmul_tile<T, columns.value>(weight_rows, values + at * T::STEP, width, padded / T::STEP,
                                    sums);
      for (int row = 0; row < ROWS; ++row)
        for (int column = 0; column < columns.value; ++column)
          store(out_rows[row] + at + column * LANES,
                _mm512_mul_ps(sums[row][column], _mm512_set1_ps(1.0f / total[row])));
    });
  }
}

template <typename T>
int attention(const AttentionArgs<typename T::type>& args) {
  using type = typename T::type;
  const long tokens = args.tokens, heads = args.heads, width = args.head_dim;
  const long padded = round_up_to_lanes(tokens), dim = heads * width;
  const size_t matrix = round_up_to_lines(padded * width * sizeof(type)),
               scores = round_up_to_lines(ROWS * padded * sizeof(float));
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    char* space = workspace(2 * matrix + 2 * scores);
    failed = space == nullptr;
#pragma omp for schedule(static)
    for (long item = 0; item < args.batch * heads; ++item) {
      if (space == nullptr) continue;
      const long image = item / heads, column = item % heads * width;
      attention_head<T>(args.qkv + image * tokens * 3 * dim + column,
                        args.out + image * tokens * dim + column,
                        args.log_sums ? args.log_sums + item * tokens : nullptr, tokens, heads,
                        width, args.scale, (type*)space, (type*)(space + matrix),
                        (float*)(space + 2 * matrix), (type*)(space + 2 * matrix + scores));
    }
  }
  return failed;
}

}  // namespace

extern "C" {

int attention_fp32(const AttentionArgs<float>* args) {
  return attention<Fp32>(*args);
}

#ifdef __AVX512BF16__
int attention_bf16(const AttentionArgs<uint16_t>* args) {
  return attention<Bf16>(*args);
}
#endif
}
