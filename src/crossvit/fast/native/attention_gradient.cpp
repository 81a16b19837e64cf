// The gradient of attention.cpp. With S = scale q kᵀ, P = softmax(S), O = P v and dO what is given for O:
//
//   dv = Pᵀ dO;   dS = P ∘ (dO vᵀ − δ), δ = rowsum(dO ∘ O);   dq = scale dS k;   dk = scale dSᵀ q
//
//   qkv, gradient: (B, N, 3, H, K);  out, out_gradient: (B, N, H, K);  log_sums: (B, H, N), of attention.cpp.
//
// P is computed again, from the log of its sum, so that only vectors are kept between the passes. One image's head at a time, ROWS
// keys against all queries: so rows are Pᵀ and dSᵀ, whose sums with dO and q stay in registers; dS is kept as pairs of keys
// for up to CHUNK keys (the second cache holds them), and gives dqᵀ.

#include <algorithm>

#include "tiles.h"

namespace {

constexpr long CHUNK = 512;   // keys
constexpr int COLUMNS = 3;    // registers of queries at a time
constexpr float NEVER = 1e30f;  // log of a sum that leaves no weight

// What one head needs, in one piece of memory. Queries are padded to whole registers.
template <typename T>
struct Space {
  using type = typename T::type;
  type *queries_transposed, *outs_transposed;  // q, dO: (K / STEP, padded) steps
  type *queries, *outs;                        // q, dO: (padded / STEP, K) steps
  type* keys_transposed;                       // (K, padded)
  type *weights, *slopes;                      // Pᵀ, dSᵀ of ROWS keys: (ROWS, padded)
  type* slope_steps;                           // dS: (CHUNK / STEP, padded) steps of keys
  float *query_gradient;                       // dqᵀ: (K, padded)
  float *log_sums, *deltas;                    // (padded)
  float* tile;                                 // (ROWS, COLUMNS, LANES)

  static size_t lay_out(Space* space, char* start, long padded, long width) {
    size_t used = 0;
    const auto take = [&](auto*& place, long count) {
      if (space) place = (std::remove_reference_t<decltype(place)>)(start + used);
      used += padded_to_lines(count * sizeof *place);
    };
    Space none, &own = space ? *space : none;
    for (type** matrix : {&own.queries_transposed, &own.outs_transposed, &own.queries, &own.outs, &own.keys_transposed}) take(*matrix, padded * width);
    for (type** rows : {&own.weights, &own.slopes}) take(*rows, ROWS * padded);
    take(own.slope_steps, std::max(std::min(CHUNK, padded), width) * padded);
    take(own.query_gradient, width * padded);
    take(own.log_sums, padded);
    take(own.deltas, padded);
    take(own.tile, ROWS * COLUMNS * LANES);
    return used;
  }
};

// Pᵀ and dSᵀ of ROWS keys against `columns` registers of queries from `at`. block: these keys' place in the chunk.
template <typename T, int columns>
inline void slopes_of(const Space<T>& space, const typename T::type* const* keys, const typename T::type* const* values, long padded, long width,
                      long at, float factor, long block) {
  __m512 sums[ROWS][columns];
  product<T, columns>(keys, space.queries_transposed + at * T::STEP, padded, width / T::STEP, sums);
  for (int column = 0; column < columns; ++column) {
    const __m512 log_sum = load(space.log_sums + at + column * LANES);
    for (int row = 0; row < ROWS; ++row)
      store(space.tile + (row * columns + column) * LANES, _mm512_fmsub_ps(sums[row][column], _mm512_set1_ps(factor), log_sum));
  }
  product<T, columns>(values, space.outs_transposed + at * T::STEP, padded, width / T::STEP, sums);
  for (int column = 0; column < columns; ++column) {
    const long place = at + column * LANES;
    const __m512 delta = load(space.deltas + place);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row += T::STEP) {
      __m512 weights[T::STEP], slopes[T::STEP];
      for (int in = 0; in < T::STEP; ++in) {
        weights[in] = T::exponential(load(space.tile + ((row + in) * columns + column) * LANES));
        slopes[in] = _mm512_mul_ps(weights[in], _mm512_sub_ps(sums[row + in][column], delta));
      }
      T::store_rows(space.weights + row * padded + place, padded, weights);
      T::store_rows_and_step(space.slopes + row * padded + place, padded, space.slope_steps + ((block + row) / T::STEP * padded + place) * T::STEP, slopes);
    }
  }
}

// factor · rows (ROWS of `padded` numbers) times `right`, into ROWS rows of `width` numbers.
template <typename T>
inline void gradient_of(const typename T::type* rows, const typename T::type* right, long padded, long width, float factor, typename T::type* const* to) {
  const typename T::type* left[ROWS];
  for (int row = 0; row < ROWS; ++row) left[row] = rows + row * padded;
  in_columns<2>(width, [&](auto columns, long at) {
    __m512 sums[ROWS][columns.value];
    product<T, columns.value>(left, right + at * T::STEP, width, padded / T::STEP, sums);
    for (int row = 0; row < ROWS; ++row)
      for (int column = 0; column < columns.value; ++column)
        store(to[row] + at + column * LANES, _mm512_mul_ps(sums[row][column], _mm512_set1_ps(factor)));
  });
}

template <typename T>
inline float dot(const T* left, const T* right, long width) {
  __m512 sum = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES) sum = _mm512_fmadd_ps(load(left + at), load(right + at), sum);
  return _mm512_reduce_add_ps(sum);
}

template <typename T>
void head(const Space<T>& space, const typename T::type* qkv, const typename T::type* out, const typename T::type* out_gradient, const float* log_sums,
          typename T::type* gradient, long tokens, long heads, long width, float scale) {
  const long padded = padded_to_lanes(tokens), dim = heads * width, stride = 3 * dim;
  lay_transposed<T>(space.queries_transposed, qkv, stride, tokens, padded, width);
  lay_transposed<T>(space.outs_transposed, out_gradient, dim, tokens, padded, width);
  lay_straight<T>(space.queries, qkv, stride, tokens, padded, width);
  lay_straight<T>(space.outs, out_gradient, dim, tokens, padded, width);
  lay_transposed<T>(space.slope_steps, qkv + dim, stride, tokens, padded, width);  // there is room before it is needed
  T::take_steps_apart(space.keys_transposed, space.slope_steps, width, padded);
  for (long token = 0; token < padded; ++token) {
    space.log_sums[token] = token < tokens ? log_sums[token] : NEVER;
    space.deltas[token] = token < tokens ? dot(out + token * dim, out_gradient + token * dim, width) : 0.0f;
  }
  std::fill(space.query_gradient, space.query_gradient + width * padded, 0.0f);

  for (long start = 0; start < tokens; start += CHUNK) {
    const long stop = std::min(start + CHUNK, tokens), count = (stop - start + ROWS - 1) / ROWS * ROWS;
    for (long first = start; first < stop; first += ROWS) {
      const typename T::type *keys[ROWS], *values[ROWS];
      typename T::type *key_gradients[ROWS], *value_gradients[ROWS];
      // The last key is computed more than once where the rows do not fill a block; for dq its copies meet keys of zeros.
      for (int row = 0; row < ROWS; ++row) {
        const long token = std::min(first + row, tokens - 1);
        keys[row] = qkv + token * stride + dim;
        values[row] = keys[row] + dim;
        key_gradients[row] = gradient + token * stride + dim;
        value_gradients[row] = key_gradients[row] + dim;
      }
      in_columns<COLUMNS>(padded, [&](auto columns, long at) {
        slopes_of<T, columns.value>(space, keys, values, padded, width, at, scale * LOG2_E, first - start);
      });
      gradient_of<T>(space.weights, space.outs, padded, width, 1.0f, value_gradients);
      gradient_of<T>(space.slopes, space.queries, padded, width, scale, key_gradients);
    }
    for (long channel = 0; channel < width; channel += ROWS) {
      const typename T::type* keys[ROWS];
      for (int row = 0; row < ROWS; ++row) keys[row] = space.keys_transposed + (channel + row) * padded + start;
      in_columns<COLUMNS>(padded, [&](auto columns, long at) {
        __m512 sums[ROWS][columns.value];
        product<T, columns.value>(keys, space.slope_steps + at * T::STEP, padded, count / T::STEP, sums);
        for (int row = 0; row < ROWS; ++row)
          for (int column = 0; column < columns.value; ++column) {
            float* sum = space.query_gradient + (channel + row) * padded + at + column * LANES;
            store(sum, _mm512_add_ps(load(sum), sums[row][column]));
          }
      });
    }
  }

  for (long first = 0; first < padded; first += LANES)
    for (long channel = 0; channel < width; channel += LANES) {
      __m512 square[LANES];
      for (int row = 0; row < LANES; ++row)
        square[row] = _mm512_mul_ps(_mm512_set1_ps(scale), load(space.query_gradient + (channel + row) * padded + first));
      transpose(square);
      for (int row = 0; row < LANES && first + row < tokens; ++row) store(gradient + (first + row) * stride + channel, square[row]);
    }
}

template <typename T>
int attention_gradient(const typename T::type* qkv, const typename T::type* out, const typename T::type* out_gradient, const float* log_sums,
                       typename T::type* gradient, long batch, long tokens, long heads, long width, float scale) {
  const long padded = padded_to_lanes(tokens), dim = heads * width;
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    char* memory = workspace(Space<T>::lay_out(nullptr, nullptr, padded, width));
    failed = memory == nullptr;
    Space<T> space;
    Space<T>::lay_out(&space, memory, padded, width);
#pragma omp for schedule(static)
    for (long item = 0; item < batch * heads; ++item) {
      if (memory == nullptr) continue;
      const long image = item / heads, one = image * tokens * dim, which = item % heads * width;
      head<T>(space, qkv + 3 * one + which, out + one + which, out_gradient + one + which, log_sums + item * tokens, gradient + 3 * one + which, tokens,
              heads, width, scale);
    }
  }
  return failed;
}

}  // namespace

extern "C" {

int attention_gradient_fp32(const float* qkv, const float* out, const float* out_gradient, const float* log_sums, float* gradient, long batch, long tokens,
                            long heads, long width, float scale) {
  return attention_gradient<Fp32>(qkv, out, out_gradient, log_sums, gradient, batch, tokens, heads, width, scale);
}

#ifdef __AVX512BF16__
int attention_gradient_bf16(const uint16_t* qkv, const uint16_t* out, const uint16_t* out_gradient, const float* log_sums, uint16_t* gradient, long batch,
                            long tokens, long heads, long width, float scale) {
  return attention_gradient<Bf16>(qkv, out, out_gradient, log_sums, gradient, batch, tokens, heads, width, scale);
}
#endif
}
