// The sublayers of an encoder block on a CPU with AVX-512, forward and backward, apart from the
// attention of attention.cpp:
//
//   attention:  y = x + m · Out(Attention(In(LN x)))     MLP:  y = x + m · Down(GELU(Up(LN x)))
//
//   x, y: (R, D) fp32, N rows an image; m: drop_path_scale, one an image, or null for 1. Weights
//   are packed by linear.cpp. Inputs and outputs of matmuls are fp32, or bf16 as uint16_t; sums are
//   fp32.
//
// A block of rows goes through all of a sublayer up to attention before the next block does, so
// that intermediate results stay in the L2 cache.

#include <cmath>
#include <vector>

#include "arguments.h"
#include "layers.h"

// ------------------------------------------------------------------ scalar references
// fp32, sums in double. The weights behind `packed` are as torch has them, (out, in).

namespace {

double gelu_cdf(double x) {
  return 0.5 * std::erfc(-x / std::sqrt(2.0));
}

// out = weight (x − mean) rstd + bias of one row.
void layernorm_reference(const float* inp, const float* weight, const float* bias, float eps,
                         double* out, float* statistics, long width) {
  double mean = 0.0, variance = 0.0;
  for (long i = 0; i < width; ++i) mean += inp[i] / (double)width;
  for (long i = 0; i < width; ++i) variance += (inp[i] - mean) * (inp[i] - mean) / width;
  const double rstd = 1.0 / std::sqrt(variance + eps);
  for (long i = 0; i < width; ++i) out[i] = weight[i] * (inp[i] - mean) * rstd + bias[i];
  if (statistics) statistics[0] = (float)mean, statistics[1] = (float)rstd;
}

// The gradient of one row: grad_inp = residual_grad + dLN(grad_out); adds to the parameters' ones.
void layernorm_backward_reference(const double* grad_out, const float* residual_grad,
                                  const float* inp, const float* weight, const float* statistics,
                                  float* grad_inp, float* grad_weight, float* grad_bias,
                                  long width) {
  const double mean = statistics[0], rstd = statistics[1];
  double mean_grad = 0.0, mean_dot = 0.0;
  for (long i = 0; i < width; ++i) {
    const double normalized = (inp[i] - mean) * rstd;
    mean_grad += grad_out[i] * weight[i] / width;
    mean_dot += grad_out[i] * weight[i] * normalized / width;
    grad_weight[i] += (float)(grad_out[i] * normalized);
    grad_bias[i] += (float)grad_out[i];
  }
  for (long i = 0; i < width; ++i)
    grad_inp[i] = (float)(residual_grad[i] + rstd * (grad_out[i] * weight[i] - mean_grad -
                                                     (inp[i] - mean) * rstd * mean_dot));
}

double scale_of(const float* drop_path_scale, long row, long tokens) {
  return drop_path_scale ? drop_path_scale[row / tokens] : 1.0;
}

}  // namespace

extern "C" {

int norm_linear_reference(const NormLinearArgs<float>* args) {
  const long I = args->in_dim, O = args->out_dim;
  std::vector<double> normalized(I);
  for (long r = 0; r < args->rows; ++r) {
    layernorm_reference(args->inp + r * I, args->norm_weight, args->norm_bias, args->eps,
                        normalized.data(), args->statistics ? args->statistics + 2 * r : nullptr,
                        I);
    for (long i = 0; i < I && args->normalized; ++i)
      args->normalized[r * I + i] = (float)normalized[i];
    for (long o = 0; o < O; ++o) {
      double sum = args->bias[o];
      for (long i = 0; i < I; ++i) sum += normalized[i] * args->packed[o * I + i];
      args->out[r * O + o] = (float)sum;
    }
  }
  return 0;
}

int linear_residual_reference(const LinearResidualArgs<float>* args) {
  const long I = args->in_dim, O = args->out_dim;
  for (long r = 0; r < args->rows; ++r)
    for (long o = 0; o < O; ++o) {
      double sum = args->bias[o];
      for (long i = 0; i < I; ++i) sum += (double)args->inp[r * I + i] * args->packed[o * I + i];
      args->out[r * O + o] = (float)(args->residual[r * O + o] +
                                     scale_of(args->drop_path_scale, r, args->tokens) * sum);
    }
  return 0;
}

int mlp_reference(const MlpArgs<float>* args) {
  const long D = args->width, F = args->hidden_dim;
  std::vector<double> normalized(D), activated(F);
  for (long r = 0; r < args->rows; ++r) {
    const float* inp = args->inp + r * D;
    layernorm_reference(inp, args->norm_weight, args->norm_bias, args->eps, normalized.data(),
                        args->statistics ? args->statistics + 2 * r : nullptr, D);
    for (long i = 0; i < D && args->normalized; ++i)
      args->normalized[r * D + i] = (float)normalized[i];
    for (long f = 0; f < F; ++f) {
      double sum = args->up_bias[f];
      for (long i = 0; i < D; ++i) sum += normalized[i] * args->up_packed[f * D + i];
      if (args->hidden) args->hidden[r * F + f] = (float)sum;
      activated[f] = sum * gelu_cdf(sum);
    }
    for (long o = 0; o < D; ++o) {
      double sum = args->down_bias[o];
      for (long f = 0; f < F; ++f) sum += activated[f] * args->down_packed[o * F + f];
      args->out[r * D + o] =
          (float)(inp[o] + scale_of(args->drop_path_scale, r, args->tokens) * sum);
    }
  }
  return 0;
}

int linear_residual_backward_reference(const LinearResidualBackwardArgs<float>* args) {
  const long I = args->in_dim, O = args->out_dim;
  for (long r = 0; r < args->rows; ++r) {
    for (long o = 0; o < O; ++o)
      args->grad_update[r * O + o] =
          (float)(scale_of(args->drop_path_scale, r, args->tokens) * args->grad_out[r * O + o]);
    for (long i = 0; i < I; ++i) {
      double sum = 0.0;
      for (long o = 0; o < O; ++o)
        sum += (double)args->grad_update[r * O + o] * args->packed[o * I + i];
      args->grad_inp[r * I + i] = (float)sum;
    }
  }
  return 0;
}

int norm_linear_backward_reference(const NormLinearBackwardArgs<float>* args) {
  const long I = args->in_dim, O = args->out_dim;
  std::vector<double> grad_normalized(I);
  for (long r = 0; r < args->rows; ++r) {
    for (long i = 0; i < I; ++i) {
      grad_normalized[i] = 0.0;
      for (long o = 0; o < O; ++o)
        grad_normalized[i] += (double)args->grad_out[r * O + o] * args->packed[o * I + i];
    }
    layernorm_backward_reference(grad_normalized.data(), args->residual_grad + r * I,
                                 args->inp + r * I, args->norm_weight, args->statistics + 2 * r,
                                 args->grad_inp + r * I, args->grad_norm_weight,
                                 args->grad_norm_bias, I);
  }
  return 0;
}

int mlp_backward_reference(const MlpBackwardArgs<float>* args) {
  const long D = args->width, F = args->hidden_dim;
  std::vector<double> grad_normalized(D);
  for (long r = 0; r < args->rows; ++r) {
    for (long o = 0; o < D; ++o)
      args->grad_update[r * D + o] =
          (float)(scale_of(args->drop_path_scale, r, args->tokens) * args->grad_out[r * D + o]);
    for (long f = 0; f < F; ++f) {
      const double x = args->hidden[r * F + f], cdf = gelu_cdf(x);
      double grad = 0.0;
      for (long o = 0; o < D; ++o)
        grad += (double)args->grad_update[r * D + o] * args->down_packed[o * F + f];
      args->activated[r * F + f] = (float)(x * cdf);
      args->grad_hidden[r * F + f] =
          (float)(grad * (cdf + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * 3.14159265358979)));
    }
    for (long i = 0; i < D; ++i) {
      grad_normalized[i] = 0.0;
      for (long f = 0; f < F; ++f)
        grad_normalized[i] += (double)args->grad_hidden[r * F + f] * args->up_packed[f * D + i];
    }
    layernorm_backward_reference(grad_normalized.data(), args->grad_out + r * D, args->inp + r * D,
                                 args->norm_weight, args->statistics + 2 * r,
                                 args->grad_inp + r * D, args->grad_norm_weight,
                                 args->grad_norm_bias, D);
  }
  return 0;
}
}

// ------------------------------------------------------------------ kernels

namespace {

// Rows `first` to `first + count` of: out = residual + m (inp W + bias). inp starts at row `first`.
template <typename T>
inline void linear_residual_rows(const LinearResidualArgs<typename T::type>& args,
                                 const typename T::type* inp, long first, long count) {
  const long tokens = args.tokens, out = args.out_dim;
  const float *bias = args.bias, *x = args.residual, *drop_path_scale = args.drop_path_scale;
  float* y = args.out;
  matmul_packed<T>(inp, count, args.packed, args.in_dim, out, [&](long row, long at, __m512 sum) {
    const long offset = (first + row) * out + at;
    const __m512 scale =
        _mm512_set1_ps(drop_path_scale ? drop_path_scale[(first + row) / tokens] : 1.0f);
    store(y + offset,
          _mm512_fmadd_ps(scale, _mm512_add_ps(sum, load(bias + at)), load(x + offset)));
  });
}

// Rows of m ∘ grad_out, as they go into matmuls.
template <typename Element>
inline void scale_rows(const float* grad_out, const float* drop_path_scale, Element* grad_update,
                       long first, long count, long tokens, long width) {
  for (long row = first; row < first + count; ++row) {
    const __m512 scale = _mm512_set1_ps(drop_path_scale ? drop_path_scale[row / tokens] : 1.0f);
    for (long at = row * width; at < (row + 1) * width; at += LANES)
      store(grad_update + at, _mm512_mul_ps(scale, load(grad_out + at)));
  }
}

template <typename T>
int norm_linear(const NormLinearArgs<typename T::type>& args) {
  using type = typename T::type;
  const long in = args.in_dim, out = args.out_dim;
  const float* bias = args.bias;
  type* y = args.out;
  return for_row_blocks(
      args.rows, block_bytes<type>(in), [&](long first, long count, char* memory) {
        type* normalized = args.normalized ? args.normalized + first * in : (type*)memory;
        layernorm_rows(args.inp + first * in, args.norm_weight, args.norm_bias, args.eps,
                       normalized, args.statistics ? args.statistics + 2 * first : nullptr, count,
                       in);
        matmul_packed<T>(normalized, count, args.packed, in, out,
                         [&](long row, long at, __m512 sum) {
                           store(y + (first + row) * out + at, _mm512_add_ps(sum, load(bias + at)));
                         });
      });
}

template <typename T>
int linear_residual(const LinearResidualArgs<typename T::type>& args) {
  return for_row_blocks(args.rows, 0, [&](long first, long count, char*) {
    linear_residual_rows<T>(args, args.inp + first * args.in_dim, first, count);
  });
}

template <typename T>
int mlp(const MlpArgs<typename T::type>& args) {
  using type = typename T::type;
  const long width = args.width, hidden_dim = args.hidden_dim;
  const float *x = args.inp, *up_bias = args.up_bias;
  const LinearResidualArgs<type> down{
      nullptr,  args.down_packed, args.down_bias, x,          args.drop_path_scale,
      args.out, args.rows,        args.tokens,    hidden_dim, width};
  return for_row_blocks(
      args.rows, block_bytes<type>(width) + block_bytes<type>(hidden_dim),
      [&](long first, long count, char* memory) {
        type *normalized = args.normalized ? args.normalized + first * width : (type*)memory,
             *activated = (type*)(memory + block_bytes<type>(width));
        layernorm_rows(x + first * width, args.norm_weight, args.norm_bias, args.eps, normalized,
                       args.statistics ? args.statistics + 2 * first : nullptr, count, width);
        type* hidden = args.hidden ? args.hidden + first * hidden_dim : activated;
        const float* next = x + (first + BLOCK_ROWS) * width;  // which the norm would wait for
        matmul_packed<T>(normalized, count, args.up_packed, width, hidden_dim,
                         [&](long row, long at, __m512 sum) {
                           if (at < width)
                             _mm_prefetch((const char*)(next + row * width + at), _MM_HINT_T1);
                           store(hidden + row * hidden_dim + at,
                                 _mm512_add_ps(sum, load(up_bias + at)));
                         });
        gelu_rows<T>(hidden, activated, count * hidden_dim);
        linear_residual_rows<T>(down, activated, first, count);
      });
}

#ifdef __AVX512BF16__

// body(first, count, sums, memory) over blocks of up to BLOCK_ROWS rows, as many for each of two or
// four threads. Their bounds depend on the rows alone, and their sums (2, width) are added to the
// two gradients in order: the same bits whatever the number of threads.
template <typename Body>
int for_fixed_blocks(long rows, size_t bytes, long width, float* grad_weight, float* grad_bias,
                     Body body) {
  const long tiles = (rows + ROWS - 1) / ROWS,
             blocks = (rows + 4 * BLOCK_ROWS - 1) / (4 * BLOCK_ROWS) * 4,
             thread_bytes = round_up_to_lines(bytes);
  const size_t sums_bytes = round_up_to_lines(blocks * 2 * width * sizeof(float));
  char* memory = workspace(sums_bytes + thread_bytes * omp_get_max_threads());
  if (memory == nullptr) return 1;
  float* sums = (float*)memory;
#pragma omp parallel for schedule(dynamic)
  for (long block = 0; block < blocks; ++block) {
    const long first = tiles * block / blocks * ROWS,
               stop = std::min(rows, tiles * (block + 1) / blocks * ROWS);
    float* block_sums = sums + block * 2 * width;
    std::fill(block_sums, block_sums + 2 * width, 0.0f);
    body(first, stop - first, block_sums,
         memory + sums_bytes + omp_get_thread_num() * thread_bytes);
  }
  for (long block = 0; block < blocks; ++block)
    for (long at = 0; at < width; ++at) {
      grad_weight[at] += sums[block * 2 * width + at];
      grad_bias[at] += sums[block * 2 * width + width + at];
    }
  return 0;
}

int linear_residual_backward(const LinearResidualBackwardArgs<uint16_t>& args) {
  const long width = args.out_dim, in = args.in_dim;
  uint16_t* grad_inp = args.grad_inp;
  return for_row_blocks(args.rows, 0, [&](long first, long count, char*) {
    scale_rows(args.grad_out, args.drop_path_scale, args.grad_update, first, count, args.tokens,
               width);
    matmul_packed<Bf16>(
        args.grad_update + first * width, count, args.packed, width, in,
        [&](long row, long at, __m512 sum) { store(grad_inp + (first + row) * in + at, sum); });
  });
}

int norm_linear_backward(const NormLinearBackwardArgs<uint16_t>& args) {
  const long width = args.in_dim, out = args.out_dim;
  return for_fixed_blocks(
      args.rows, block_bytes<float>(width), width, args.grad_norm_weight, args.grad_norm_bias,
      [&](long first, long count, float* sums, char* memory) {
        float* grad_normalized = (float*)memory;
        matmul_packed<Bf16>(
            args.grad_out + first * out, count, args.packed, out, width,
            [&](long row, long at, __m512 sum) { store(grad_normalized + row * width + at, sum); });
        layernorm_backward_rows(grad_normalized, args.residual_grad + first * width,
                                args.inp + first * width, args.norm_weight,
                                args.statistics + 2 * first, args.grad_inp + first * width, sums,
                                count, width);
      });
}

int mlp_backward(const MlpBackwardArgs<uint16_t>& args) {
  const long width = args.width, hidden_dim = args.hidden_dim;
  return for_fixed_blocks(
      args.rows, block_bytes<float>(width), width, args.grad_norm_weight, args.grad_norm_bias,
      [&](long first, long count, float* sums, char* memory) {
        scale_rows(args.grad_out, args.drop_path_scale, args.grad_update, first, count, args.tokens,
                   width);
        uint16_t* grad_hidden = args.grad_hidden + first * hidden_dim;
        matmul_packed<Bf16>(args.grad_update + first * width, count, args.down_packed, width,
                            hidden_dim, [&](long row, long at, __m512 sum) {
                              store(grad_hidden + row * hidden_dim + at, sum);
                            });
        gelu_backward_rows<Bf16>(args.hidden + first * hidden_dim,
                                 args.activated + first * hidden_dim, grad_hidden,
                                 count * hidden_dim);
        float* grad_normalized = (float*)memory;
        matmul_packed<Bf16>(
            grad_hidden, count, args.up_packed, hidden_dim, width,
            [&](long row, long at, __m512 sum) { store(grad_normalized + row * width + at, sum); });
        layernorm_backward_rows(grad_normalized, args.grad_out + first * width,
                                args.inp + first * width, args.norm_weight,
                                args.statistics + 2 * first, args.grad_inp + first * width, sums,
                                count, width);
      });
}

#endif

}  // namespace

extern "C" {

// norm_linear:  out (R, F) = In(LN inp).  linear_residual:  out (R, D) = residual + m · Out(inp).
// mlp:  the MLP sublayer.
int norm_linear_fp32(const NormLinearArgs<float>* args) {
  return norm_linear<Fp32>(*args);
}
int linear_residual_fp32(const LinearResidualArgs<float>* args) {
  return linear_residual<Fp32>(*args);
}
int mlp_fp32(const MlpArgs<float>* args) {
  return mlp<Fp32>(*args);
}

#ifdef __AVX512BF16__
int norm_linear_bf16(const NormLinearArgs<uint16_t>* args) {
  return norm_linear<Bf16>(*args);
}
int linear_residual_bf16(const LinearResidualArgs<uint16_t>* args) {
  return linear_residual<Bf16>(*args);
}
int mlp_bf16(const MlpArgs<uint16_t>* args) {
  return mlp<Bf16>(*args);
}

// Backward passes; weights are packed without transposing.
//
// Of linear_residual:  grad_update = m ∘ grad_out, which dOut needs too, and grad_inp.
int linear_residual_backward_bf16(const LinearResidualBackwardArgs<uint16_t>* args) {
  return linear_residual_backward(*args);
}
// Of norm_linear:  grad_inp = residual_grad + dLN(dIn(grad_out)); adds to those of the norm.
int norm_linear_backward_bf16(const NormLinearBackwardArgs<uint16_t>* args) {
  return norm_linear_backward(*args);
}
// Of mlp:  grad_update = m ∘ grad_out and `activated`, GELU again, which dDown needs; grad_hidden,
// which dUp needs; grad_inp; adds to the gradients of the norm.
int mlp_backward_bf16(const MlpBackwardArgs<uint16_t>* args) {
  return mlp_backward(*args);
}
#endif
}
