// Weights of linear layers on a CPU with AVX-512: packed for matmuls, and their gradient in bf16.
//
//   Packed for x M: the columns of M by threes of registers (`for_column_blocks`), each panel
//   contiguous, (in / STEP, columns) steps. M is the weight, or its transpose.
//
// Gradients of a layer's weight and bias:  dW = dyᵀ x,  db = Σ dy over rows, written or added.
//
//   dy: (R, O), x: (R, I) bf16 as uint16_t;  dW: (O, I), db: (O) fp32. O and I: multiples of 16.
//
// dW is shared out among the threads. Each packs what its share reads, PANEL rows at a time, which
// fit the L2 cache: no thread waits for another or reads what another core has packed. Each number
// of dW is summed by one thread in the order of the rows: the same bits whatever the number of
// threads. A "step" is two rows, pair by pair.

#include <omp.h>

#include <algorithm>

#include "arguments.h"
#include "simd.h"

extern "C" {

// Scalar reference: the layout in fp32.
int pack_reference(const PackArgs<float>* args) {
  const long in = args->transposed ? args->cols : args->rows,
             out = args->transposed ? args->rows : args->cols;
  float* packed = args->packed;
  for (long first = 0, columns; first < out; first += columns) {
    const long registers = (out - first) / 16;
    columns = 16 * (registers == 4 || registers == 2 ? 2 : registers == 1 ? 1 : 3);
    for (long row = 0; row < in; ++row)
      for (long column = first; column < first + columns; ++column)
        *packed++ =
            args->transposed ? args->weight[column * in + row] : args->weight[row * out + column];
  }
  return 0;
}

// Scalar reference: fp32, sums in double.
int linear_backward_reference(const LinearBackwardArgs<float>* args) {
  const long O = args->out_dim, I = args->in_dim;
  for (long o = 0; o < O; ++o) {
    double grad_bias = args->accumulate ? args->grad_bias[o] : 0.0;
    for (long r = 0; r < args->rows; ++r) grad_bias += args->grad_out[r * O + o];
    args->grad_bias[o] = (float)grad_bias;
    for (long i = 0; i < I; ++i) {
      double grad_weight = args->accumulate ? args->grad_weight[o * I + i] : 0.0;
      for (long r = 0; r < args->rows; ++r)
        grad_weight += (double)args->grad_out[r * O + o] * args->inp[r * I + i];
      args->grad_weight[o * I + i] = (float)grad_weight;
    }
  }
  return 0;
}
}

namespace {

template <typename T>
void pack(const PackArgs<typename T::type>& args) {
  const float* weight = args.weight;
  auto* packed = args.packed;
  const long rows = args.rows, width = args.cols;
  const bool transposed = args.transposed;
  const long in = transposed ? width : rows, out = transposed ? rows : width, steps = in / T::STEP;
#pragma omp parallel
  {
    long panel = 0;
    for_column_blocks<3>(out, [&](auto columns, long first) {
      if (panel++ % omp_get_num_threads() != omp_get_thread_num()) return;
      for (long column = 0; column < columns.value * LANES; column += LANES) {
        const auto target = [&](long step) {
          return packed + first * in + (step * columns.value * LANES + column) * T::STEP;
        };
        if (transposed)
          for (long start = 0; start < steps; start += LANES) {
            const long count = std::min(LANES, steps - start);
            __m512 square[LANES];
            for (long row = 0; row < LANES; ++row)
              square[row] =
                  T::load_steps(weight + (first + column + row) * width + start * T::STEP, count);
            transpose(square);
            for (long step = 0; step < count; ++step)
              _mm512_storeu_ps((void*)target(start + step), square[step]);
          }
        else
          for (long step = 0; step < steps; ++step) {
            const float* row = weight + step * T::STEP * width + first + column;
            T::pack_step(target(step), row, row + (T::STEP - 1) * width);
          }
      }
    });
  }
}

}  // namespace

extern "C" {

int pack_fp32(const PackArgs<float>* args) {
  pack<Fp32>(*args);
  return 0;
}

#ifdef __AVX512BF16__
int pack_bf16(const PackArgs<uint16_t>* args) {
  pack<Bf16>(*args);
  return 0;
}
#endif
}

#ifdef __AVX512BF16__

namespace {

constexpr long PANEL = 192;  // rows

// Numbers of a block of `columns` columns: its steps, and a cache line more, or the same row of
// many blocks would share few sets of the L1 cache.
inline long block_elements(long padded, long columns) {
  return padded * columns + 2 * LANES;
}

// Address of the step of `row` in the block of column `at`.
template <long columns>
inline uint16_t* step_of(uint16_t* packed, long at, long row, long padded) {
  return packed + at / columns * block_elements(padded, columns) + row * columns;
}

// Rows of `width` numbers, `stride` apart, as steps in blocks of LANES columns, so that a matmul
// reads contiguous memory. The padding is 0.
inline void pack_inputs(uint16_t* to, const uint16_t* from, long stride, long width, long rows,
                        long padded) {
  for (long row = 0; row < padded; row += 2)
    for (long at = 0; at < width; at += LANES) {
      uint16_t* target = step_of<LANES>(to, at, row, padded);
      const uint16_t* source = from + row * stride + at;
      if (row < rows)
        Bf16::pack_step(target, source, row + 1 < rows ? source + stride : nullptr);
      else
        _mm512_storeu_si512(target, _mm512_setzero_si512());
    }
}

// The same in blocks of ROWS columns, a cache line at a time: the pairs of two rows, then those of
// the next two.
inline void pack_grads(uint16_t* to, const uint16_t* from, long stride, long width, long rows,
                       long padded) {
  const __m512i low = _mm512_set_epi16(55, 39, 54, 38, 53, 37, 52, 36, 51, 35, 50, 34, 49, 33, 48,
                                       32, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(ROWS));
  for (long row = 0; row < padded; row += 4)
    for (long at = 0; at < width; at += LANES) {
      const auto row_pair = [&](long first) {
        const auto load_row = [&](long index) {
          return index < rows ? _mm256_loadu_si256((const __m256i*)(from + index * stride + at))
                              : _mm256_setzero_si256();
        };
        return _mm512_inserti64x4(_mm512_castsi256_si512(load_row(first)), load_row(first + 1), 1);
      };
      const __m512i upper = row_pair(row), lower = row_pair(row + 2);
      _mm512_storeu_si512(step_of<ROWS>(to, at, row, padded),
                          _mm512_permutex2var_epi16(upper, low, lower));
      _mm512_storeu_si512(step_of<ROWS>(to, at + ROWS, row, padded),
                          _mm512_permutex2var_epi16(upper, high, lower));
    }
}

// ROWS rows of dW from one block of the steps of dy and COLUMNS blocks of those of x, which are
// `block_stride` numbers apart. accumulate: add to dW.
template <int COLUMNS>
inline void add_matmul(const uint16_t* grads, const uint16_t* inputs, long block_stride, long steps,
                       float* to, long stride, bool accumulate) {
  __m512 sums[ROWS][COLUMNS];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (long step = 0; step < steps; ++step) {
    __m512 columns[COLUMNS];
    for (int column = 0; column < COLUMNS; ++column)
      columns[column] =
          _mm512_loadu_ps((const void*)(inputs + column * block_stride + step * 2 * LANES));
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const __m512 element = Bf16::broadcast(grads + (step * ROWS + row) * 2);
#pragma GCC unroll 4
      for (int column = 0; column < COLUMNS; ++column)
        sums[row][column] = Bf16::multiply_add(sums[row][column], element, columns[column]);
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int column = 0; column < COLUMNS; ++column) {
      float* sum = to + row * stride + column * LANES;
      store(sum, accumulate ? _mm512_add_ps(load(sum), sums[row][column]) : sums[row][column]);
    }
}

// Sums over an even number of steps of a block of ROWS columns, in fp32.
inline void add_sums(const uint16_t* grads, long steps, float* to, bool accumulate) {
  const __m512 ones = (__m512)_mm512_set1_epi16(0x3f80);
  __m512 sum = _mm512_setzero_ps();  // of the first of two steps, of the second
  for (long step = 0; step < steps; step += 2)
    sum = Bf16::multiply_add(sum, _mm512_loadu_ps((const void*)(grads + step * 2 * ROWS)), ones);
  const __m256 pair = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  _mm256_storeu_ps(to, accumulate ? _mm256_add_ps(_mm256_loadu_ps(to), pair) : pair);
}

// A thread's share of the rows of dW or of its columns, in whole registers.
struct Share {
  long first, width;
  Share(long total, long index, long shares)
      : first(total / LANES * index / shares * LANES),
        width(total / LANES * (index + 1) / shares * LANES - first) {}
};

// Number of shares of the rows of dW; its columns are split into threads / that number. A thread
// packs what it reads: the less in total, the better.
inline long shares_of_rows(long out, long in, long threads) {
  const auto packed = [&](long shares) { return out / shares + in * shares / threads; };
  long best = 1;
  for (long shares = 2; shares <= threads; ++shares)
    if (threads % shares == 0 && packed(shares) <= packed(best)) best = shares;
  return best;
}

// One thread's share of dW, and of db if has_bias.
inline void add_share(const LinearBackwardArgs<uint16_t>& args, bool has_bias, Share out_share,
                      Share in_share, uint16_t* grads, uint16_t* inputs) {
  const long rows = args.rows, out = args.out_dim, in = args.in_dim;
  bool accumulate = args.accumulate;
  for (long start = 0; start < rows; start += PANEL, accumulate = true) {
    const long count = std::min(PANEL, rows - start), padded = (count + 3) / 4 * 4;
    pack_inputs(inputs, args.inp + start * in + in_share.first, in, in_share.width, count, padded);
    pack_grads(grads, args.grad_out + start * out + out_share.first, out, out_share.width, count,
               padded);
    if (has_bias)
      for (long at = 0; at < out_share.width; at += ROWS)
        add_sums(step_of<ROWS>(grads, at, 0, padded), padded / 2,
                 args.grad_bias + out_share.first + at, accumulate);
    // Columns of x stay in the cache while the rows of dW go by; the next rows are prefetched.
    const long tiles = out_share.width / ROWS * ((in_share.width / LANES + 2) / 3),
               next = start + PANEL, next_count = std::max(0L, std::min(PANEL, rows - next));
    RowPrefetcher inputs_prefetcher(args.inp + next * in + in_share.first, next_count, in,
                                    in_share.width, tiles);
    RowPrefetcher grads_prefetcher(args.grad_out + next * out + out_share.first, next_count, out,
                                   out_share.width, tiles);
    for_column_blocks<3>(in_share.width, [&](auto columns, long first) {
      for (long at = 0; at < out_share.width; at += ROWS) {
        inputs_prefetcher.prefetch();
        grads_prefetcher.prefetch();
        add_matmul<columns.value>(
            step_of<ROWS>(grads, at, 0, padded), step_of<LANES>(inputs, first, 0, padded),
            block_elements(padded, LANES), padded / 2,
            args.grad_weight + (out_share.first + at) * in + in_share.first + first, in,
            accumulate);
      }
    });
  }
}

}  // namespace

extern "C" {

int linear_backward_bf16(const LinearBackwardArgs<uint16_t>* args) {
  const long out = args->out_dim, in = args->in_dim;
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads(),
               shares = shares_of_rows(out, in, threads);
    const Share out_share(out, thread % shares, shares),
        in_share(in, thread / shares, threads / shares);
    const size_t grads_bytes =
                     block_elements(PANEL, ROWS) * out_share.width / ROWS * sizeof(uint16_t),
                 inputs_bytes =
                     block_elements(PANEL, LANES) * in_share.width / LANES * sizeof(uint16_t);
    if (out_share.width && in_share.width) {
      char* memory = workspace(grads_bytes + inputs_bytes);
      failed = memory == nullptr;
      if (memory)
        add_share(*args, in_share.first == 0, out_share, in_share, (uint16_t*)memory,
                  (uint16_t*)(memory + grads_bytes));
    }
  }
  return failed;
}
}

#endif
