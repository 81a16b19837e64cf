// Self-attention of a few hundred tokens on a CPU with AVX-512: softmax(q kᵀ) v with the scale in q.
//
//   qkv: (B, N, 3, H, K) dense, the projection as it comes;  out: (B, N, H, K), as the output projection takes it.
//   K, the width of a head, is a multiple of 16. fp32, or bf16 as uint16_t: products of bf16 pairs are summed in fp32.
//
// One image's head at a time: its keys and values are laid out once for the registers, then ROWS queries at a time get the
// scores of all N keys (which stay in the first cache), their softmax, and the mixture. Nothing of size N x N is made, no
// head is copied together. Compiled at run time by kernel.py; docs/performance.md says what it gave.

#include <immintrin.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr long LANES = 16;  // fp32 numbers in a register
constexpr int ROWS = 8;     // queries at a time: 8 x 3 sums fit the 32 registers with 3 of keys and one of a query

// fp32 multiplies number by number; bf16 two numbers of a sum at once. A "step" is what one instruction takes of the sum.
struct Fp32 {
  using type = float;
  static constexpr long STEP = 1;
  static __m512 multiply_add(__m512 sum, __m512 left, __m512 right) { return _mm512_fmadd_ps(left, right, sum); }
  static __m512 broadcast(const float* at) { return _mm512_set1_ps(*at); }
  static void store(float* at, __m512 values) { _mm512_storeu_ps(at, values); }
  // A step of LANES numbers of the values: they lie as they are wanted.
  static void lay_values(float* to, const float* from, long, bool) { _mm512_storeu_ps(to, _mm512_loadu_ps(from)); }
};

#ifdef __AVX512BF16__
struct Bf16 {
  using type = uint16_t;
  static constexpr long STEP = 2;
  static __m512 multiply_add(__m512 sum, __m512 left, __m512 right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
  static __m512 broadcast(const uint16_t* at) {
    int32_t pair;
    std::memcpy(&pair, at, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static void store(uint16_t* at, __m512 values) { _mm256_storeu_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh(values)); }
  // A step of LANES numbers of the values: those of a token and of the next one, pair by pair.
  static void lay_values(uint16_t* to, const uint16_t* from, long next, bool has_next) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    const __m512i high = has_next ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + next))) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

// e^x for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2], to about 2e-7.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);  // Cephes' expf
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// sums[row][column vector] of ROWS rows of `left` (one pointer each) times COLUMNS vectors of `right`, over `steps` steps.
// right: (steps, stride) registers' worth, STEP numbers of the sum beside each other.
template <typename T, int COLUMNS>
inline void product(const typename T::type* const* left, const typename T::type* right, long stride, long steps, __m512 (&sums)[ROWS][COLUMNS]) {
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (long step = 0; step < steps; ++step) {
    __m512 columns[COLUMNS];
    for (int column = 0; column < COLUMNS; ++column)
      columns[column] = _mm512_loadu_ps((const void*)(right + (step * stride + column * LANES) * T::STEP));
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const __m512 one = T::broadcast(left[row] + step * T::STEP);
#pragma GCC unroll 4
      for (int column = 0; column < COLUMNS; ++column) sums[row][column] = T::multiply_add(sums[row][column], one, columns[column]);
    }
  }
}

template <typename T, int COLUMNS>
inline void scores_of(const typename T::type* const* queries, const typename T::type* keys, long padded, long width, long first, float* scores) {
  __m512 sums[ROWS][COLUMNS];
  product<T, COLUMNS>(queries, keys + first * T::STEP, padded, width / T::STEP, sums);
  for (int row = 0; row < ROWS; ++row)
    for (int column = 0; column < COLUMNS; ++column) _mm512_storeu_ps(scores + row * padded + first + column * LANES, sums[row][column]);
}

template <typename T, int COLUMNS>
inline void mixture_of(const typename T::type* const* weights, const typename T::type* values, long width, long padded, long first, const float* total,
                       typename T::type* const* out) {
  __m512 sums[ROWS][COLUMNS];
  product<T, COLUMNS>(weights, values + first * T::STEP, width, padded / T::STEP, sums);
  for (int row = 0; row < ROWS; ++row)
    for (int column = 0; column < COLUMNS; ++column)
      T::store(out[row] + first + column * LANES, _mm512_mul_ps(sums[row][column], _mm512_set1_ps(1.0f / total[row])));
}

// Softmax without its division, in place in fp32, then as T in `weights`. The padding gets weight 0.
template <typename T>
inline float softmax(float* scores, typename T::type* weights, long tokens, long padded) {
  const long last = padded - LANES;
  const __mmask16 real = (__mmask16)(0xFFFFu >> (padded - tokens));
  __m512 end = _mm512_mask_blend_ps(real, _mm512_set1_ps(-1e30f), _mm512_loadu_ps(scores + last));
  _mm512_storeu_ps(scores + last, end);
  for (long at = 0; at < last; at += LANES) end = _mm512_max_ps(end, _mm512_loadu_ps(scores + at));
  const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(end));
  __m512 total = _mm512_setzero_ps();
  for (long at = 0; at < padded; at += LANES) {
    __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + at), most));
    if (at == last) weight = _mm512_maskz_mov_ps(real, weight);
    total = _mm512_add_ps(total, weight);
    T::store(weights + at, weight);
  }
  return _mm512_reduce_add_ps(total);
}

template <typename T>
void head(const typename T::type* qkv, typename T::type* out, long tokens, long heads, long width, typename T::type* packed, float* scores,
          typename T::type* weights) {
  const long padded = (tokens + LANES - 1) / LANES * LANES, dim = heads * width, stride = 3 * dim;
  typename T::type *keys = packed, *values = packed + padded * width;
  // Keys: 32 bits (a step) of sixteen tokens beside each other.
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i apart = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)(stride / T::STEP)));
  for (long first = 0; first < padded; first += LANES) {
    const __mmask16 real = tokens - first >= LANES ? 0xFFFF : (__mmask16)((1u << (tokens - first)) - 1);
    const auto* from = qkv + first * stride + dim;
    for (long step = 0; step < width / T::STEP; ++step)
      _mm512_storeu_si512(keys + (step * padded + first) * T::STEP,
                          _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), real, apart, from + step * T::STEP, 4));
  }
  for (long token = 0; token < padded; token += T::STEP)
    for (long at = 0; at < width; at += LANES) {
      auto* to = values + token * width + at * T::STEP;
      if (token < tokens) T::lay_values(to, qkv + token * stride + 2 * dim + at, stride, token + 1 < tokens);
      else _mm512_storeu_si512(to, _mm512_setzero_si512());
    }
  for (long first = 0; first < tokens; first += ROWS) {
    const typename T::type *queries[ROWS], *rows[ROWS];
    typename T::type* outs[ROWS];
    float total[ROWS];
    for (int row = 0; row < ROWS; ++row) {  // the last rows are computed more than once where they do not fill a block
      const long token = first + row < tokens ? first + row : tokens - 1;
      queries[row] = qkv + token * stride;
      outs[row] = out + token * dim;
      rows[row] = weights + row * padded;
    }
    long at = 0;
    for (; at + 3 * LANES <= padded; at += 3 * LANES) scores_of<T, 3>(queries, keys, padded, width, at, scores);
    if (at + 2 * LANES == padded) scores_of<T, 2>(queries, keys, padded, width, at, scores);
    if (at + LANES == padded) scores_of<T, 1>(queries, keys, padded, width, at, scores);
    for (int row = 0; row < ROWS; ++row) total[row] = softmax<T>(scores + row * padded, weights + row * padded, tokens, padded);
    for (at = 0; at + 2 * LANES <= width; at += 2 * LANES) mixture_of<T, 2>(rows, values, width, padded, at, total, outs);
    if (at < width) mixture_of<T, 1>(rows, values, width, padded, at, total, outs);
  }
}

template <typename T>
int attention(const typename T::type* qkv, typename T::type* out, long batch, long tokens, long heads, long width) {
  const long padded = (tokens + LANES - 1) / LANES * LANES, dim = heads * width;
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    const size_t size = sizeof(typename T::type);
    const size_t packed = 2 * padded * width * size, scores = ROWS * padded * sizeof(float), weights = ROWS * padded * size;
    const auto rounded = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    char* space = (char*)std::aligned_alloc(64, rounded(packed) + rounded(scores) + rounded(weights));
    failed = space == nullptr;
#pragma omp for schedule(static)
    for (long item = 0; item < batch * heads; ++item) {
      if (space == nullptr) continue;
      const long image = item / heads, which = item % heads;
      head<T>(qkv + image * tokens * 3 * dim + which * width, out + image * tokens * dim + which * width, tokens, heads, width,
              (typename T::type*)space, (float*)(space + rounded(packed)), (typename T::type*)(space + rounded(packed) + rounded(scores)));
    }
    std::free(space);
  }
  return failed;
}

}  // namespace

extern "C" {

int attention_fp32(const float* qkv, float* out, long batch, long tokens, long heads, long width) {
  return attention<Fp32>(qkv, out, batch, tokens, heads, width);
}

#ifdef __AVX512BF16__
int attention_bf16(const uint16_t* qkv, uint16_t* out, long batch, long tokens, long heads, long width) {
  return attention<Bf16>(qkv, out, batch, tokens, heads, width);
}
#endif
}
