// Building blocks of the kernels for CPUs with AVX-512: registers of fp32, numbers in fp32 or bf16,
// small matmuls, exponentials.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr long LANES = 16;  // fp32 numbers in a register
// Rows of a matmul tile: 8 x 3 sums fit the 32 registers, with 3 of columns and one of a row.
constexpr int ROWS = 8;

constexpr float LOG2_E = 1.44269504f;

inline long round_up_to_lanes(long count) {
  return (count + LANES - 1) / LANES * LANES;
}
inline size_t round_up_to_lines(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}
inline __mmask16 first_lanes(long count) {
  return (__mmask16)(count >= LANES ? 0xFFFF : count <= 0 ? 0 : 0xFFFF >> (LANES - count));
}

// Scratch memory of this thread, reused by the next call: memory that goes back to the system costs
// a page fault for every page. At least `bytes`, on a cache line, or null if there is too little.
inline char* workspace(size_t bytes) {
  struct Buffer {
    char* start = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(start); }
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    std::free(buffer.start);
    buffer.start = (char*)std::aligned_alloc(64, round_up_to_lines(bytes));
    buffer.size = buffer.start ? bytes : 0;
  }
  return buffer.start;
}

// Prefetches rows of `width` numbers, `stride` apart, into the L1 cache while something else is
// computed: each of `parts` calls fetches an equal part of their cache lines.
class RowPrefetcher {
 public:
  template <typename Element>
  RowPrefetcher(const Element* rows, long count, long stride, long width, long parts)
      : row((const char*)rows),
        rows_left(count),
        stride_bytes(stride * sizeof *rows),
        lines_per_row(width * sizeof *rows / 64 + 1),
        lines_per_call(count * lines_per_row / std::max(1L, parts) + 1) {}
  void prefetch() {
    for (long budget = lines_per_call; budget > 0 && rows_left > 0; --budget) {
      _mm_prefetch(row + 64 * line, _MM_HINT_T0);
      if (++line == lines_per_row) row += stride_bytes, line = 0, --rows_left;
    }
  }

 private:
  const char* row;
  long rows_left, stride_bytes, lines_per_row, lines_per_call, line = 0;
};

// Transposes a square of sixteen registers in place.
inline void transpose(__m512 (&square)[LANES]) {
  __m512 pairs[LANES];
  const auto as_doubles = [](__m512 numbers) { return _mm512_castps_pd(numbers); };
  for (int at = 0; at < LANES; at += 2) {
    pairs[at] = _mm512_unpacklo_ps(square[at], square[at + 1]);
    pairs[at + 1] = _mm512_unpackhi_ps(square[at], square[at + 1]);
  }
  for (int at = 0; at < LANES; at += 4)
    for (int odd = 0; odd < 2; ++odd) {
      square[at + 2 * odd] = _mm512_castpd_ps(
          _mm512_unpacklo_pd(as_doubles(pairs[at + odd]), as_doubles(pairs[at + 2 + odd])));
      square[at + 2 * odd + 1] = _mm512_castpd_ps(
          _mm512_unpackhi_pd(as_doubles(pairs[at + odd]), as_doubles(pairs[at + 2 + odd])));
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

inline __m512 load(const float* from) {
  return _mm512_loadu_ps(from);
}
inline void store(float* to, __m512 numbers) {
  _mm512_storeu_ps(to, numbers);
}

// A polynomial in x, the coefficient of the highest power first.
template <typename... Coefficients>
inline __m512 polynomial(__m512 x, float highest, Coefficients... lower) {
  __m512 sum = _mm512_set1_ps(highest);
  ((sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(lower))), ...);
  return sum;
}

// 2^x = 2^n 2^r with n the nearest integer; 2^r on [-1/2, 1/2] to 8e-5, a twentieth of bf16's
// resolution, or to 2e-7 (Cephes' exp2f).
inline __m512 exp2_approximate(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(_mm512_sub_ps(x, n), 5.51716703e-2f, 2.42611125e-1f,
                                     6.93260985e-1f, 9.99928073e-1f),
                          n);
}
inline __m512 exp2_precise(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(
      polynomial(_mm512_sub_ps(x, n), 1.540353039e-4f, 1.333355814e-3f, 9.618129107e-3f,
                 5.550410866e-2f, 2.402265069e-1f, 6.931471805e-1f, 1.0f),
      n);
}

// fp32 multiplies number by number; bf16 two numbers of a sum at once. A "step" is what one
// instruction reads of the sum: 32 bits.
struct Fp32 {
  using type = float;
  static constexpr long STEP = 1;
  static __m512 multiply_add(__m512 sum, __m512 left, __m512 right) {
    return _mm512_fmadd_ps(left, right, sum);
  }
  static __m512 broadcast(const float* at) { return _mm512_set1_ps(*at); }
  static __m512 exponential(__m512 x) { return exp2_precise(x); }
  // By a Newton step: to one or two ulp, in a third of the time of a division.
  static __m512 reciprocal(__m512 x) {
    const __m512 estimate = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.0f)));
  }
  // The first `steps` steps of a row.
  static __m512 load_steps(const float* row, long steps) {
    return _mm512_maskz_loadu_ps(first_lanes(steps), row);
  }
  static void store_first(float* to, __m512 numbers, long count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), numbers);
  }
  // STEP rows of LANES numbers: each into its own row, `stride` apart, and all of them as a step.
  static void store_rows(float* to, long, const __m512 (&row)[1]) { store(to, row[0]); }
  static void store_rows_and_step(float* to, long, float* step, const __m512 (&row)[1]) {
    store(to, row[0]);
    store(step, row[0]);
  }
  // A step of LANES numbers of one row.
  static void pack_step(float* to, const float* row, const float*) { store(to, load(row)); }
  // (steps, padded) steps -> (width, padded) numbers.
  static void unpack_steps(float* to, const float* from, long width, long padded) {
    std::memcpy(to, from, width * padded * sizeof(float));
  }
};

#ifdef __AVX512BF16__
inline __m512 load(const uint16_t* from) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}
inline void store(uint16_t* to, __m512 numbers) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(numbers));
}

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
  static __m512 exponential(__m512 x) { return exp2_approximate(x); }
  static __m512 reciprocal(__m512 x) { return _mm512_rcp14_ps(x); }
  static __m512 load_steps(const float* row, long steps) {
    const long numbers = 2 * steps;
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(numbers), row);
    return (__m512)_mm512_cvtne2ps_pbh(
        _mm512_maskz_loadu_ps(first_lanes(numbers - LANES), row + LANES), low);
  }
  static void store_first(uint16_t* to, __m512 numbers, long count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(numbers));
  }
  static void store_rows(uint16_t* to, long stride, const __m512 (&rows)[2]) {
    store_two_rows(to, stride, narrow(rows));
  }
  static void store_rows_and_step(uint16_t* to, long stride, uint16_t* step,
                                  const __m512 (&rows)[2]) {
    const __m512i pair = narrow(rows);
    store_two_rows(to, stride, pair);
    _mm512_storeu_si512(step, interleave(pair));
  }
  // A step of LANES numbers of two rows, pair by pair.
  static void pack_step(uint16_t* to, const uint16_t* row, const uint16_t* next) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)row);
    const __m256i second = next ? _mm256_loadu_si256((const __m256i*)next) : _mm256_setzero_si256();
    _mm512_storeu_si512(to,
                        interleave(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1)));
  }
  static void pack_step(uint16_t* to, const float* row, const float* next) {
    _mm512_storeu_si512(to, interleave(narrow({load(row), load(next)})));
  }
  static void unpack_steps(uint16_t* to, const uint16_t* from, long width, long padded) {
    for (long row = 0; row < width; row += 2)
      for (long at = 0; at < padded; at += LANES) {
        const __m512i pairs = _mm512_loadu_si512(from + row * padded + 2 * at);
        _mm256_storeu_si256((__m256i*)(to + row * padded + at), _mm512_cvtepi32_epi16(pairs));
        _mm256_storeu_si256((__m256i*)(to + (row + 1) * padded + at),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
      }
  }

 private:
  // The first row in the low 256 bits, the second in the high ones.
  static __m512i narrow(const __m512 (&rows)[2]) {
    return (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
  }
  static void store_two_rows(uint16_t* to, long stride, __m512i pair) {
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(pair));
    _mm256_storeu_si256((__m256i*)(to + stride), _mm512_extracti64x4_epi64(pair, 1));
  }
  static __m512i interleave(__m512i pair) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, pair);
  }
};
#endif

// sums[row][column register] of ROWS rows of `left` (one pointer each) times COLUMNS registers of
// `right`, over `steps` steps. right: (steps, stride) steps.
template <typename T, int COLUMNS>
inline void matmul_tile(const typename T::type* const* left, const typename T::type* right,
                        long stride, long steps, __m512 (&sums)[ROWS][COLUMNS]) {
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (long step = 0; step < steps; ++step) {
    __m512 columns[COLUMNS];
    for (int column = 0; column < COLUMNS; ++column)
      columns[column] =
          _mm512_loadu_ps((const void*)(right + (step * stride + column * LANES) * T::STEP));
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const __m512 element = T::broadcast(left[row] + step * T::STEP);
#pragma GCC unroll 4
      for (int column = 0; column < COLUMNS; ++column)
        sums[row][column] = T::multiply_add(sums[row][column], element, columns[column]);
    }
  }
}

// body(Columns, first number) for all registers of a row of `padded` numbers, up to MOST at a time.
// The last four go by two and two: a single one would wait for its row's numbers.
template <int COLUMNS>
struct Columns {
  static constexpr int value = COLUMNS;
};
template <int MOST, typename Body>
inline void for_column_blocks(long padded, Body body) {
  for (long first = 0; first < padded;) {
    const long left = (padded - first) / LANES;
    if (left >= MOST && !(MOST == 3 && left == 4)) {
      body(Columns<MOST>{}, first);
      first += MOST * LANES;
    } else if (left >= 2) {
      body(Columns<2>{}, first);
      first += 2 * LANES;
    } else {
      body(Columns<1>{}, first);
      first += LANES;
    }
  }
}

// Packs rows of `width` numbers, `stride` apart, for a matmul with their transpose:
// (width / STEP, padded) steps, the padding 0.
template <typename T>
void pack_transposed(typename T::type* to, const typename T::type* from, long stride, long rows,
                     long padded, long width) {
  const long steps = width / T::STEP;
  for (long first = 0; first < padded; first += LANES)
    for (long step = 0; step < steps; step += LANES) {
      const long count = steps - step < LANES ? steps - step : LANES;
      __m512 square[LANES];
      for (long row = 0; row < LANES; ++row)
        square[row] = first + row < rows
                          ? _mm512_maskz_loadu_ps(
                                first_lanes(count),
                                (const void*)(from + (first + row) * stride + step * T::STEP))
                          : _mm512_setzero_ps();
      transpose(square);
      for (long row = 0; row < count; ++row)
        _mm512_storeu_ps((void*)(to + ((step + row) * padded + first) * T::STEP), square[row]);
    }
}

// Packs the same rows for a matmul with them as they are: (padded / STEP, width) steps, the
// padding 0.
template <typename T>
void pack_rows(typename T::type* to, const typename T::type* from, long stride, long rows,
               long padded, long width) {
  for (long row = 0; row < padded; row += T::STEP)
    for (long at = 0; at < width; at += LANES) {
      auto* target = to + row * width + at * T::STEP;
      const auto* source = from + row * stride + at;
      if (row < rows)
        T::pack_step(target, source, row + 1 < rows ? source + stride : nullptr);
      else
        _mm512_storeu_si512(target, _mm512_setzero_si512());
    }
}

}  // namespace
