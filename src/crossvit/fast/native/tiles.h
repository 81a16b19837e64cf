// What our kernels for CPUs with AVX-512 are made of: registers of fp32, numbers in fp32 or bf16, small products, exponentials.

#pragma once

#include <immintrin.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr long LANES = 16;  // fp32 numbers in a register
constexpr int ROWS = 8;     // rows of a product at a time: 8 x 3 sums fit the 32 registers with 3 of columns and one of a row

constexpr float LOG2_E = 1.44269504f;

inline long padded_to_lanes(long count) { return (count + LANES - 1) / LANES * LANES; }
inline size_t padded_to_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }
inline __mmask16 first_lanes(long count) { return (__mmask16)(count >= LANES ? 0xFFFF : count <= 0 ? 0 : 0xFFFF >> (LANES - count)); }

// This thread's memory for what a kernel makes on the way, kept for the next call: what the system takes back and gives again costs a
// fault for every page. `bytes` of it in whole lines, or null if there is too little.
inline char* workspace(size_t bytes) {
  struct Kept {
    char* start = nullptr;
    size_t size = 0;
    ~Kept() { std::free(start); }
  };
  static thread_local Kept kept;
  if (bytes > kept.size) {
    std::free(kept.start);
    kept.start = (char*)std::aligned_alloc(64, padded_to_lines(bytes));
    kept.size = kept.start ? bytes : 0;
  }
  return kept.start;
}

// Rows that are read soon, `width` numbers each and `stride` apart: while something else is computed, each of `parts` calls brings as many
// of their lines into the first cache.
class Soon {
 public:
  template <typename Number>
  Soon(const Number* rows, long count, long stride, long width, long parts)
      : row((const char*)rows),
        left(count),
        apart(stride * sizeof *rows),
        lines(width * sizeof *rows / 64 + 1),
        each(count * lines / std::max(1L, parts) + 1) {}
  void bring() {
    for (long more = each; more > 0 && left > 0; --more) {
      _mm_prefetch(row + 64 * line, _MM_HINT_T0);
      if (++line == lines) row += apart, line = 0, --left;
    }
  }

 private:
  const char* row;
  long left, apart, lines, each, line = 0;
};

// Squares of sixteen registers, transposed in place.
inline void transpose(__m512 (&square)[LANES]) {
  __m512 pairs[LANES];
  const auto doubles = [](__m512 numbers) { return _mm512_castps_pd(numbers); };
  for (int at = 0; at < LANES; at += 2) {
    pairs[at] = _mm512_unpacklo_ps(square[at], square[at + 1]);
    pairs[at + 1] = _mm512_unpackhi_ps(square[at], square[at + 1]);
  }
  for (int at = 0; at < LANES; at += 4)
    for (int odd = 0; odd < 2; ++odd) {
      square[at + 2 * odd] = _mm512_castpd_ps(_mm512_unpacklo_pd(doubles(pairs[at + odd]), doubles(pairs[at + 2 + odd])));
      square[at + 2 * odd + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(doubles(pairs[at + odd]), doubles(pairs[at + 2 + odd])));
    }
  for (int at = 0; at < LANES; at += 8)
    for (int in = 0; in < 4; ++in) {
      pairs[at + in] = _mm512_shuffle_f32x4(square[at + in], square[at + 4 + in], 0x88);
      pairs[at + 4 + in] = _mm512_shuffle_f32x4(square[at + in], square[at + 4 + in], 0xdd);
    }
  for (int in = 0; in < 8; ++in) {
    square[in] = _mm512_shuffle_f32x4(pairs[in], pairs[8 + in], 0x88);
    square[8 + in] = _mm512_shuffle_f32x4(pairs[in], pairs[8 + in], 0xdd);
  }
}

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, __m512 numbers) { _mm512_storeu_ps(to, numbers); }

// A polynomial in x, the highest power's factor first.
template <typename... Factors>
inline __m512 polynomial(__m512 x, float highest, Factors... lower) {
  __m512 sum = _mm512_set1_ps(highest);
  ((sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(lower))), ...);
  return sum;
}

// 2^x = 2^n 2^r with n the nearest whole number; 2^r on [-1/2, 1/2] to 8e-5, a twentieth of what bf16 can tell, or to 2e-7 (Cephes' exp2f).
inline __m512 power_of_two_roughly(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(_mm512_sub_ps(x, n), 5.51716703e-2f, 2.42611125e-1f, 6.93260985e-1f, 9.99928073e-1f), n);
}
inline __m512 power_of_two(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(
      polynomial(_mm512_sub_ps(x, n), 1.540353039e-4f, 1.333355814e-3f, 9.618129107e-3f, 5.550410866e-2f, 2.402265069e-1f, 6.931471805e-1f, 1.0f), n);
}

// fp32 multiplies number by number; bf16 two numbers of a sum at once. A "step" is what one instruction takes of the sum:
// 32 bits.
struct Fp32 {
  using type = float;
  static constexpr long STEP = 1;
  static __m512 multiply_add(__m512 sum, __m512 left, __m512 right) { return _mm512_fmadd_ps(left, right, sum); }
  static __m512 broadcast(const float* at) { return _mm512_set1_ps(*at); }
  static __m512 exponential(__m512 x) { return power_of_two(x); }
  // By a step of Newton's: to the last bit or the one before, in a third of a division's time.
  static __m512 reciprocal(__m512 x) {
    const __m512 rough = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(rough, _mm512_fnmadd_ps(x, rough, _mm512_set1_ps(2.0f)));
  }
  // The first `steps` steps of a row.
  static __m512 take(const float* row, long steps) { return _mm512_maskz_loadu_ps(first_lanes(steps), row); }
  static void store_first(float* to, __m512 numbers, long count) { _mm512_mask_storeu_ps(to, first_lanes(count), numbers); }
  // STEP rows of LANES numbers: each into its own row, `stride` apart, and all of them as a step.
  static void store_rows(float* to, long, const __m512 (&row)[1]) { store(to, row[0]); }
  static void store_rows_and_step(float* to, long, float* step, const __m512 (&row)[1]) {
    store(to, row[0]);
    store(step, row[0]);
  }
  // A step of LANES numbers of one row.
  static void lay_step(float* to, const float* row, const float*) { store(to, load(row)); }
  // (steps, padded) steps -> (width, padded) numbers.
  static void take_steps_apart(float* to, const float* from, long width, long padded) { std::memcpy(to, from, width * padded * sizeof(float)); }
};

#ifdef __AVX512BF16__
inline __m512 load(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}
inline void store(uint16_t* to, __m512 numbers) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(numbers)); }

struct Bf16 {
  using type = uint16_t;
  static constexpr long STEP = 2;
  static __m512 multiply_add(__m512 sum, __m512 left, __m512 right) { return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right); }
  static __m512 broadcast(const uint16_t* at) {
    int32_t pair;
    std::memcpy(&pair, at, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static __m512 exponential(__m512 x) { return power_of_two_roughly(x); }
  static __m512 reciprocal(__m512 x) { return _mm512_rcp14_ps(x); }
  static __m512 take(const float* row, long steps) {
    const long numbers = 2 * steps;
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(numbers), row);
    return (__m512)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first_lanes(numbers - LANES), row + LANES), low);
  }
  static void store_first(uint16_t* to, __m512 numbers, long count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(numbers));
  }
  static void store_rows(uint16_t* to, long stride, const __m512 (&rows)[2]) { store_halves(to, stride, narrow(rows)); }
  static void store_rows_and_step(uint16_t* to, long stride, uint16_t* step, const __m512 (&rows)[2]) {
    const __m512i both = narrow(rows);
    store_halves(to, stride, both);
    _mm512_storeu_si512(step, pair_up(both));
  }
  // A step of LANES numbers of two rows, pair by pair.
  static void lay_step(uint16_t* to, const uint16_t* row, const uint16_t* next) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)row);
    const __m256i second = next ? _mm256_loadu_si256((const __m256i*)next) : _mm256_setzero_si256();
    _mm512_storeu_si512(to, pair_up(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1)));
  }
  static void lay_step(uint16_t* to, const float* row, const float* next) { _mm512_storeu_si512(to, pair_up(narrow({load(row), load(next)}))); }
  static void take_steps_apart(uint16_t* to, const uint16_t* from, long width, long padded) {
    for (long row = 0; row < width; row += 2)
      for (long at = 0; at < padded; at += LANES) {
        const __m512i pairs = _mm512_loadu_si512(from + row * padded + 2 * at);
        _mm256_storeu_si256((__m256i*)(to + row * padded + at), _mm512_cvtepi32_epi16(pairs));
        _mm256_storeu_si256((__m256i*)(to + (row + 1) * padded + at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
      }
  }

 private:
  // The first row in the low half, the second in the high one.
  static __m512i narrow(const __m512 (&rows)[2]) { return (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]); }
  static void store_halves(uint16_t* to, long stride, __m512i both) {
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(to + stride), _mm512_extracti64x4_epi64(both, 1));
  }
  static __m512i pair_up(__m512i both) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
  }
};
#endif

// sums[row][column register] of ROWS rows of `left` (one pointer each) times COLUMNS registers of `right`, over `steps` steps.
// right: (steps, stride) steps.
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

// Visits all registers of a row of `padded` numbers, up to MOST at a time: visit(Columns, first number). Four that are left are
// taken as two and two: one alone waits for its row's numbers more than it computes.
template <int COLUMNS>
struct Columns {
  static constexpr int value = COLUMNS;
};
template <int MOST, typename Visit>
inline void in_columns(long padded, Visit visit) {
  for (long first = 0; first < padded;) {
    const long left = (padded - first) / LANES;
    if (left >= MOST && !(MOST == 3 && left == 4)) {
      visit(Columns<MOST>{}, first);
      first += MOST * LANES;
    } else if (left >= 2) {
      visit(Columns<2>{}, first);
      first += 2 * LANES;
    } else {
      visit(Columns<1>{}, first);
      first += LANES;
    }
  }
}

// Rows of `width` numbers, `stride` apart, so that a product reads their transpose: (width / STEP, padded) steps, the padding 0.
template <typename T>
void lay_transposed(typename T::type* to, const typename T::type* from, long stride, long rows, long padded, long width) {
  const long steps = width / T::STEP;
  for (long first = 0; first < padded; first += LANES)
    for (long step = 0; step < steps; step += LANES) {
      const long count = steps - step < LANES ? steps - step : LANES;
      __m512 square[LANES];
      for (long row = 0; row < LANES; ++row)
        square[row] = first + row < rows ? _mm512_maskz_loadu_ps(first_lanes(count), (const void*)(from + (first + row) * stride + step * T::STEP)) : _mm512_setzero_ps();
      transpose(square);
      for (long row = 0; row < count; ++row) _mm512_storeu_ps((void*)(to + ((step + row) * padded + first) * T::STEP), square[row]);
    }
}

// The same rows so that a product reads them as they are: (padded / STEP, width) steps, the padding 0.
template <typename T>
void lay_straight(typename T::type* to, const typename T::type* from, long stride, long rows, long padded, long width) {
  for (long row = 0; row < padded; row += T::STEP)
    for (long at = 0; at < width; at += LANES) {
      auto* place = to + row * width + at * T::STEP;
      const auto* here = from + row * stride + at;
      if (row < rows) T::lay_step(place, here, row + 1 < rows ? here + stride : nullptr);
      else _mm512_storeu_si512(place, _mm512_setzero_si512());
    }
}

}  // namespace
