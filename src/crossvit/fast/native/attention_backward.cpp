// Backward pass of attention.cpp. With S = scale q kᵀ, P = softmax(S), O = P v, dO its gradient:
//
//   dv = Pᵀ dO;   dS = P ∘ (dO vᵀ − δ), δ = rowsum(dO ∘ O);   dq = scale dS k;   dk = scale dSᵀ q
//
//   qkv, grad_qkv: (B, N, 3, H, K);  out, grad_out: (B, N, H, K);  log_sums: (B, H, N).
//
// P is computed again from the log of its sum, so that only vectors are saved between the passes.
// One image's head at a time, ROWS keys against all queries: rows are Pᵀ and dSᵀ, whose sums with
// dO and q stay in registers; dS is stored as pairs of keys for up to CHUNK keys (which fit the
// L2 cache), and gives dqᵀ.

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "simd.h"

extern "C" {

// Scalar reference: fp32, sums in double.
int attention_backward_reference(const AttentionBackwardArgs<float>* args) {
  const long dim = args->heads * args->head_dim, N = args->tokens, K = args->head_dim;
  std::vector<double> grads(3 * N * K);
  for (long b = 0; b < args->batch; ++b)
    for (long h = 0; h < args->heads; ++h) {
      const float* q = args->qkv + b * N * 3 * dim + h * K;  // k: + dim, v: + 2 dim
      const float *out = args->out + b * N * dim + h * K,
                  *grad_out = args->grad_out + b * N * dim + h * K;
      double *dq = grads.data(), *dk = dq + N * K, *dv = dk + N * K;
      std::fill(grads.begin(), grads.end(), 0.0);
      for (long i = 0; i < N; ++i) {
        double delta = 0.0;
        for (long k = 0; k < K; ++k) delta += (double)grad_out[i * dim + k] * out[i * dim + k];
        for (long j = 0; j < N; ++j) {
          double score = 0.0, grad_weight = 0.0;
          for (long k = 0; k < K; ++k) {
            score += (double)q[i * 3 * dim + k] * q[j * 3 * dim + dim + k];
            grad_weight += (double)grad_out[i * dim + k] * q[j * 3 * dim + 2 * dim + k];
          }
          const double weight = std::exp(
              args->scale * score - std::log(2.0) * args->log_sums[(b * args->heads + h) * N + i]);
          const double grad_score = args->scale * weight * (grad_weight - delta);
          for (long k = 0; k < K; ++k) {
            dq[i * K + k] += grad_score * q[j * 3 * dim + dim + k];
            dk[j * K + k] += grad_score * q[i * 3 * dim + k];
            dv[j * K + k] += weight * grad_out[i * dim + k];
          }
        }
      }
      for (long part = 0; part < 3; ++part)
        for (long i = 0; i < N; ++i)
          for (long k = 0; k < K; ++k)
            args->grad_qkv[(b * N + i) * 3 * dim + part * dim + h * K + k] =
                (float)grads[(part * N + i) * K + k];
    }
  return 0;
}
}

namespace {

constexpr long CHUNK = 512;               // keys
constexpr int COLUMNS = 3;                // registers of queries at a time
constexpr float LOG_SUM_PADDING = 1e30f;  // log-sum of padding: its weights are 0

// Buffers of one head, in one piece of memory. Queries are padded to whole registers.
template <typename T>
struct Workspace {
  using type = typename T::type;
  type *queries_transposed, *grad_out_transposed;  // q, dO: (K / STEP, padded) steps
  type *queries, *grad_outs;                       // q, dO: (padded / STEP, K) steps
  type* keys_transposed;                           // (K, padded)
  type *weights, *grad_scores;                     // Pᵀ, dSᵀ of ROWS keys: (ROWS, padded)
  type* grad_score_steps;                          // dS: (CHUNK / STEP, padded) steps of keys
  float* grad_query;                               // dqᵀ: (K, padded)
  float *log_sums, *deltas;                        // (padded)
  float* tile;                                     // (ROWS, COLUMNS, LANES)

  static size_t allocate(Workspace* ws, char* start, long padded, long width) {
    size_t used = 0;
    const auto reserve = [&](auto*& field, long count) {
      if (ws) field = (std::remove_reference_t<decltype(field)>)(start + used);
      used += round_up_to_lines(count * sizeof *field);
    };
    Workspace none, &fields = ws ? *ws : none;
    for (type** matrix : {&fields.queries_transposed, &fields.grad_out_transposed, &fields.queries,
                          &fields.grad_outs, &fields.keys_transposed})
      reserve(*matrix, padded * width);
    for (type** rows : {&fields.weights, &fields.grad_scores}) reserve(*rows, ROWS * padded);
    reserve(fields.grad_score_steps, std::max(std::min(CHUNK, padded), width) * padded);
    reserve(fields.grad_query, width * padded);
    reserve(fields.log_sums, padded);
    reserve(fields.deltas, padded);
    reserve(fields.tile, ROWS * COLUMNS * LANES);
    return used;
  }
};

// Pᵀ and dSᵀ of ROWS keys against `columns` registers of queries from `at`.
// block: offset of these keys in the chunk.
template <typename T, int columns>
inline void grad_scores_tile(const Workspace<T>& ws, const typename T::type* const* keys,
                             const typename T::type* const* values, long padded, long width,
                             long at, float scale, long block) {
  __m512 sums[ROWS][columns];
  matmul_tile<T, columns>(keys, ws.queries_transposed + at * T::STEP, padded, width / T::STEP,
                          sums);
  for (int column = 0; column < columns; ++column) {
    const __m512 log_sum = load(ws.log_sums + at + column * LANES);
    for (int row = 0; row < ROWS; ++row)
      store(ws.tile + (row * columns + column) * LANES,
            _mm512_fmsub_ps(sums[row][column], _mm512_set1_ps(scale), log_sum));
  }
  matmul_tile<T, columns>(values, ws.grad_out_transposed + at * T::STEP, padded, width / T::STEP,
                          sums);
  for (int column = 0; column < columns; ++column) {
    const long column_at = at + column * LANES;
    const __m512 delta = load(ws.deltas + column_at);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row += T::STEP) {
      __m512 weights[T::STEP], grad_scores[T::STEP];
      for (int in = 0; in < T::STEP; ++in) {
        weights[in] = T::exponential(load(ws.tile + ((row + in) * columns + column) * LANES));
        grad_scores[in] = _mm512_mul_ps(weights[in], _mm512_sub_ps(sums[row + in][column], delta));
      }
      T::store_rows(ws.weights + row * padded + column_at, padded, weights);
      T::store_rows_and_step(
          ws.grad_scores + row * padded + column_at, padded,
          ws.grad_score_steps + ((block + row) / T::STEP * padded + column_at) * T::STEP,
          grad_scores);
    }
  }
}

// scale · rows (ROWS, padded) · right (padded, width) -> `to`, ROWS rows of `width` numbers.
template <typename T>
inline void matmul_rows(const typename T::type* rows, const typename T::type* right, long padded,
                        long width, float scale, typename T::type* const* to) {
  const typename T::type* left[ROWS];
  for (int row = 0; row < ROWS; ++row) left[row] = rows + row * padded;
  for_column_blocks<2>(width, [&](auto columns, long at) {
    __m512 sums[ROWS][columns.value];
    matmul_tile<T, columns.value>(left, right + at * T::STEP, width, padded / T::STEP, sums);
    for (int row = 0; row < ROWS; ++row)
      for (int column = 0; column < columns.value; ++column)
        store(to[row] + at + column * LANES,
              _mm512_mul_ps(sums[row][column], _mm512_set1_ps(scale)));
  });
}

template <typename T>
inline float dot(const T* left, const T* right, long width) {
  __m512 sum = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES)
    sum = _mm512_fmadd_ps(load(left + at), load(right + at), sum);
  return _mm512_reduce_add_ps(sum);
}

template <typename T>
void attention_head_backward(const Workspace<T>& ws, const typename T::type* qkv,
                             const typename T::type* out, const typename T::type* grad_out,
                             const float* log_sums, typename T::type* grad_qkv, long tokens,
                             long heads, long width, float scale) {
  const long padded = round_up_to_lanes(tokens), dim = heads * width, stride = 3 * dim;
  pack_transposed<T>(ws.queries_transposed, qkv, stride, tokens, padded, width);
  pack_transposed<T>(ws.grad_out_transposed, grad_out, dim, tokens, padded, width);
  pack_rows<T>(ws.queries, qkv, stride, tokens, padded, width);
  pack_rows<T>(ws.grad_outs, grad_out, dim, tokens, padded, width);
  pack_transposed<T>(ws.grad_score_steps, qkv + dim, stride, tokens, padded,
                     width);  // not used yet
  T::unpack_steps(ws.keys_transposed, ws.grad_score_steps, width, padded);
  for (long token = 0; token < padded; ++token) {
    ws.log_sums[token] = token < tokens ? log_sums[token] : LOG_SUM_PADDING;
    ws.deltas[token] =
        token < tokens ? dot(out + token * dim, grad_out + token * dim, width) : 0.0f;
  }
  std::fill(ws.grad_query, ws.grad_query + width * padded, 0.0f);

  for (long start = 0; start < tokens; start += CHUNK) {
    const long stop = std::min(start + CHUNK, tokens),
               count = (stop - start + ROWS - 1) / ROWS * ROWS;
    for (long first = start; first < stop; first += ROWS) {
      const typename T::type *keys[ROWS], *values[ROWS];
      typename T::type *grad_keys[ROWS], *grad_values[ROWS];
      // The last key is computed more than once where the rows do not fill a block; for dq its
      // copies are multiplied by keys of zeros.
      for (int row = 0; row < ROWS; ++row) {
        const long token = std::min(first + row, tokens - 1);
        keys[row] = qkv + token * stride + dim;
        values[row] = keys[row] + dim;
        grad_keys[row] = grad_qkv + token * stride + dim;
        grad_values[row] = grad_keys[row] + dim;
      }
      for_column_blocks<COLUMNS>(padded, [&](auto columns, long at) {
        grad_scores_tile<T, columns.value>(ws, keys, values, padded, width, at, scale * LOG2_E,
                                           first - start);
      });
      matmul_rows<T>(ws.weights, ws.grad_outs, padded, width, 1.0f, grad_values);
      matmul_rows<T>(ws.grad_scores, ws.queries, padded, width, scale, grad_keys);
    }
    for (long channel = 0; channel < width; channel += ROWS) {
      const typename T::type* keys[ROWS];
      for (int row = 0; row < ROWS; ++row)
        keys[row] = ws.keys_transposed + (channel + row) * padded + start;
      for_column_blocks<COLUMNS>(padded, [&](auto columns, long at) {
        __m512 sums[ROWS][columns.value];
        matmul_tile<T, columns.value>(keys, ws.grad_score_steps + at * T::STEP, padded,
                                      count / T::STEP, sums);
        for (int row = 0; row < ROWS; ++row)
          for (int column = 0; column < columns.value; ++column) {
            float* sum = ws.grad_query + (channel + row) * padded + at + column * LANES;
            store(sum, _mm512_add_ps(load(sum), sums[row][column]));
          }
      });
    }
  }

  for (long first = 0; first < padded; first += LANES)
    for (long channel = 0; channel < width; channel += LANES) {
      __m512 square[LANES];
      for (int row = 0; row < LANES; ++row)
        square[row] = _mm512_mul_ps(_mm512_set1_ps(scale),
                                    load(ws.grad_query + (channel + row) * padded + first));
      transpose(square);
      for (int row = 0; row < LANES && first + row < tokens; ++row)
        store(grad_qkv + (first + row) * stride + channel, square[row]);
    }
}

template <typename T>
int attention_backward(const AttentionBackwardArgs<typename T::type>& args) {
  const long tokens = args.tokens, heads = args.heads, width = args.head_dim;
  const long padded = round_up_to_lanes(tokens), dim = heads * width;
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    char* memory = workspace(Workspace<T>::allocate(nullptr, nullptr, padded, width));
    failed = memory == nullptr;
    Workspace<T> ws;
    if (memory) Workspace<T>::allocate(&ws, memory, padded, width);
#pragma omp for schedule(static)
    for (long item = 0; item < args.batch * heads; ++item) {
      if (memory == nullptr) continue;
      const long image = item / heads * tokens * dim, column = item % heads * width;
      attention_head_backward<T>(ws, args.qkv + 3 * image + column, args.out + image + column,
                                 args.grad_out + image + column, args.log_sums + item * tokens,
                                 args.grad_qkv + 3 * image + column, tokens, heads, width,
                                 args.scale);
    }
  }
  return failed;
}

}  // namespace

extern "C" {

int attention_backward_fp32(const AttentionBackwardArgs<float>* args) {
  return attention_backward<Fp32>(*args);
}

#ifdef __AVX512BF16__
int attention_backward_bf16(const AttentionBackwardArgs<uint16_t>* args) {
  return attention_backward<Bf16>(*args);
}
#endif
}
