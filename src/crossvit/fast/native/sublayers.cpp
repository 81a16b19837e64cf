// The halves of an encoder block on a CPU with AVX-512, forward and backward, between the attention of attention.cpp:
//
//   attention half:  y = x + m · Out(Attention(In(LN x)))        MLP half:  y = x + m · Out(GELU(In(LN x)))
//
//   x, y: R rows of D numbers, fp32, N rows an image; m: one factor an image, or null for 1; In and Out with biases, their weights
//   packed by linear.cpp. What goes into a product or comes out of one is fp32, or bf16 as uint16_t; sums are fp32. F: what In gives.
//
// A block of rows goes through all of a half up to attention before the next does, so what it makes stays in the second cache.

#include "rows.h"

namespace {

struct Norm {
  const float *weight, *bias;
  float eps;
};

// Rows `first` to `first + count` of: y = x + m (read W + bias).
template <typename T>
inline void add_linear(const typename T::type* read, const typename T::type* packed, const float* bias, const float* x, const float* factor, float* y, long first,
                       long count, long tokens, long in, long out) {
  times_packed<T>(read, count, packed, in, out, [&](long row, long at, __m512 sum) {
    const long place = (first + row) * out + at;
    const __m512 own = _mm512_set1_ps(factor ? factor[(first + row) / tokens] : 1.0f);
    store(y + place, _mm512_fmadd_ps(own, _mm512_add_ps(sum, load(bias + at)), load(x + place)));
  });
}

// Rows of m ∘ gradient, as they go into products.
template <typename Number>
inline void scale_rows(const float* gradient, const float* factor, Number* update, long first, long count, long tokens, long width) {
  for (long row = first; row < first + count; ++row) {
    const __m512 own = _mm512_set1_ps(factor ? factor[row / tokens] : 1.0f);
    for (long at = row * width; at < (row + 1) * width; at += LANES) store(update + at, _mm512_mul_ps(own, load(gradient + at)));
  }
}

template <typename T>
int norm_linear(const float* x, Norm norm, const typename T::type* packed, const float* bias, typename T::type* normalised, float* statistics,
                typename T::type* y, long rows, long in, long out) {
  using type = typename T::type;
  return over_rows(rows, block_of<type>(in), [&](long first, long count, char* memory) {
    type* own = normalised ? normalised + first * in : (type*)memory;
    norm_rows(x + first * in, norm.weight, norm.bias, norm.eps, own, statistics ? statistics + 2 * first : nullptr, count, in);
    times_packed<T>(own, count, packed, in, out,
                    [&](long row, long at, __m512 sum) { store(y + (first + row) * out + at, _mm512_add_ps(sum, load(bias + at))); });
  });
}

template <typename T>
int linear_residual(const typename T::type* read, const typename T::type* packed, const float* bias, const float* x, const float* factor, float* y, long rows,
                    long tokens, long in, long out) {
  return over_rows(rows, 0, [&](long first, long count, char*) {
    add_linear<T>(read + first * in, packed, bias, x, factor, y, first, count, tokens, in, out);
  });
}

template <typename T>
int mlp(const float* x, Norm norm, const typename T::type* in_packed, const float* in_bias, const typename T::type* out_packed, const float* out_bias,
        const float* factor, typename T::type* normalised, float* statistics, typename T::type* hidden, float* y, long rows, long tokens, long width, long inner) {
  using type = typename T::type;
  return over_rows(rows, block_of<type>(width) + block_of<type>(inner), [&](long first, long count, char* memory) {
    type *own = normalised ? normalised + first * width : (type*)memory, *activated = (type*)(memory + block_of<type>(width));
    norm_rows(x + first * width, norm.weight, norm.bias, norm.eps, own, statistics ? statistics + 2 * first : nullptr, count, width);
    type* taken = hidden ? hidden + first * inner : activated;
    const float* next = x + (first + BLOCK_ROWS) * width;  // which the norm would wait for
    times_packed<T>(own, count, in_packed, width, inner, [&](long row, long at, __m512 sum) {
      if (at < width) _mm_prefetch((const char*)(next + row * width + at), _MM_HINT_T1);
      store(taken + row * inner + at, _mm512_add_ps(sum, load(in_bias + at)));
    });
    gelu_rows<T>(taken, activated, count * inner);
    add_linear<T>(activated, out_packed, out_bias, x, factor, y, first, count, tokens, inner, width);
  });
}

#ifdef __AVX512BF16__

// dx of `count` rows from the gradient of what the norm gave, times `packed`.
inline void back_through_norm(const uint16_t* y_gradient, const uint16_t* packed, const float* past, const float* x, const float* weight, const float* statistics,
                              float* x_gradient, float* sums, float* memory, long count, long width, long inner) {
  times_packed<Bf16>(y_gradient, count, packed, inner, width, [&](long row, long at, __m512 sum) { store(memory + row * width + at, sum); });
  norm_rows_gradient(memory, past, x, weight, statistics, x_gradient, sums, count, width);
}

// work(first, count, sums, memory) over blocks of up to BLOCK_ROWS rows, as many for each of two or four threads. Where they lie follows from
// the rows alone, and their sums (2, width) are added to the two gradients in their order: the same bits whatever the number of threads.
template <typename Work>
int over_blocks(long rows, size_t bytes, long width, float* weight_gradient, float* bias_gradient, Work work) {
  const long tiles = (rows + ROWS - 1) / ROWS, blocks = (rows + 4 * BLOCK_ROWS - 1) / (4 * BLOCK_ROWS) * 4, each = padded_to_lines(bytes);
  const size_t of_sums = padded_to_lines(blocks * 2 * width * sizeof(float));
  char* memory = workspace(of_sums + each * omp_get_max_threads());
  if (memory == nullptr) return 1;
  float* sums = (float*)memory;
#pragma omp parallel for schedule(dynamic)
  for (long block = 0; block < blocks; ++block) {
    const long first = tiles * block / blocks * ROWS, stop = std::min(rows, tiles * (block + 1) / blocks * ROWS);
    float* own = sums + block * 2 * width;
    std::fill(own, own + 2 * width, 0.0f);
    work(first, stop - first, own, memory + of_sums + omp_get_thread_num() * each);
  }
  for (long block = 0; block < blocks; ++block)
    for (long at = 0; at < width; ++at) {
      weight_gradient[at] += sums[block * 2 * width + at];
      bias_gradient[at] += sums[block * 2 * width + width + at];
    }
  return 0;
}

#endif

}  // namespace

extern "C" {

// norm_linear:  y (R, F) = In(LN x). `normalised` (R, D), LN x, and `statistics` (R, 2), its mean and 1 / √(variance + eps), are kept if
// not null.
// linear_residual:  y (R, D) = x + m · Out(read), read (R, F).
// mlp:  the MLP half. hidden (R, F), what GELU takes, is kept if not null, like the norm.
#define EXPORT_HALVES(T, name)                                                                                                                   \
  int norm_linear_##name(const float* x, const float* norm_weight, const float* norm_bias, const T::type* packed, const float* bias,             \
                         T::type* normalised, float* statistics, T::type* y, long rows, long in, long out, float eps) {                          \
    return norm_linear<T>(x, {norm_weight, norm_bias, eps}, packed, bias, normalised, statistics, y, rows, in, out);                             \
  }                                                                                                                                              \
  int linear_residual_##name(const T::type* read, const T::type* packed, const float* bias, const float* x, const float* factor, float* y,       \
                             long rows, long tokens, long in, long out) {                                                                        \
    return linear_residual<T>(read, packed, bias, x, factor, y, rows, tokens, in, out);                                                          \
  }                                                                                                                                              \
  int mlp_##name(const float* x, const float* norm_weight, const float* norm_bias, const T::type* in_packed, const float* in_bias,               \
                 const T::type* out_packed, const float* out_bias, const float* factor, T::type* normalised, float* statistics, T::type* hidden, \
                 float* y, long rows, long tokens, long width, long inner, float eps) {                                                          \
    return mlp<T>(x, {norm_weight, norm_bias, eps}, in_packed, in_bias, out_packed, out_bias, factor, normalised, statistics, hidden, y, rows,   \
                  tokens, width, inner);                                                                                                         \
  }

EXPORT_HALVES(Fp32, fp32)

#ifdef __AVX512BF16__
EXPORT_HALVES(Bf16, bf16)

// Gradients. Weights are packed the other way here: D numbers in and F out of Out, F in and D out of In.

// Of linear_residual:  update (R, D) = m ∘ dy, which dOut needs too;  read_gradient (R, F).
int linear_residual_gradient(const float* y_gradient, const float* factor, const uint16_t* packed, uint16_t* update, uint16_t* read_gradient, long rows,
                             long tokens, long width, long inner) {
  return over_rows(rows, 0, [&](long first, long count, char*) {
    scale_rows(y_gradient, factor, update, first, count, tokens, width);
    times_packed<Bf16>(update + first * width, count, packed, width, inner,
                       [&](long row, long at, __m512 sum) { store(read_gradient + (first + row) * inner + at, sum); });
  });
}

// Of norm_linear, with what goes past it:  x_gradient = past + dLN(dIn(y_gradient)), y_gradient (R, F); to those of the norm (D) is added.
int norm_linear_gradient(const uint16_t* y_gradient, const uint16_t* packed, const float* past, const float* x, const float* norm_weight,
                         const float* statistics, float* x_gradient, float* weight_gradient, float* bias_gradient, long rows, long width, long inner) {
  return over_blocks(rows, block_of<float>(width), width, weight_gradient, bias_gradient, [&](long first, long count, float* sums, char* memory) {
    back_through_norm(y_gradient + first * inner, packed, past + first * width, x + first * width, norm_weight, statistics + 2 * first,
                      x_gradient + first * width, sums, (float*)memory, count, width, inner);
  });
}

// Of mlp:  update = m ∘ dy and `activated` (R, F), GELU again, which dOut needs;  hidden_gradient (R, F), which dIn needs;  x_gradient.
int mlp_gradient(const float* y_gradient, const float* factor, const uint16_t* out_packed, const uint16_t* hidden, const uint16_t* in_packed, const float* x,
                 const float* norm_weight, const float* statistics, uint16_t* update, uint16_t* activated, uint16_t* hidden_gradient, float* x_gradient,
                 float* weight_gradient, float* bias_gradient, long rows, long tokens, long width, long inner) {
  return over_blocks(rows, block_of<float>(width), width, weight_gradient, bias_gradient, [&](long first, long count, float* sums, char* memory) {
    scale_rows(y_gradient, factor, update, first, count, tokens, width);
    uint16_t* slopes = hidden_gradient + first * inner;
    times_packed<Bf16>(update + first * width, count, out_packed, width, inner,
                       [&](long row, long at, __m512 sum) { store(slopes + row * inner + at, sum); });
    gelu_rows_gradient<Bf16>(hidden + first * inner, activated + first * inner, slopes, count * inner);
    back_through_norm(slopes, in_packed, y_gradient + first * width, x + first * width, norm_weight, statistics + 2 * first,
                      x_gradient + first * width, sums, (float*)memory, count, width, inner);
  });
}

#endif
}
