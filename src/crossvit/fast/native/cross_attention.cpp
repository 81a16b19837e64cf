// Lazy cross-attention on a CPU with AVX-512: H probes read N tokens once, forward and backward, in
// time linear in N.
//
//   s_hj = probe_h · z_j,  p_h = softmax(s_h),  context_h = Σ_j p_hj z_j
//
//   x: (B, N, D) fp32 or bf16;  probes, context: (B, H, D) fp32, the scale in the probes.
//   Plain: z = x. With a fused norm (`first` is not null): z_0 = first (B, D), and z_j =
//   weight ∘ n_j + bias with n_j = (x_j − mean_j) rstd_j is the LayerNorm of the other tokens, which is never stored:
//   probe · z_j = rstd_j (weight ∘ probe) · (x_j − mean_j) + probe · bias, and so on.
//
// Saved for the backward pass: weights p (B, H, N), dots (weight ∘ probe) · n_j (B, H, N),
// statistics (B, N, 2), moments Σ_j p_hj n_j (B, H, D).

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "simd.h"

// ------------------------------------------------------------------ scalar references
// fp32, sums in double.

namespace {

// n (N, D) of an image, x itself where there is no norm, and its statistics.
void normalize_reference(const float* inp, bool has_norm, float eps, double* normalized,
                         float* statistics, long tokens, long width) {
  for (long j = 0; j < tokens; ++j, inp += width, normalized += width) {
    double mean = 0.0, variance = 0.0, rstd = 1.0;
    if (has_norm) {
      for (long i = 0; i < width; ++i) mean += inp[i] / (double)width;
      for (long i = 0; i < width; ++i) variance += (inp[i] - mean) * (inp[i] - mean) / width;
      rstd = 1.0 / std::sqrt(variance + eps);
    }
    for (long i = 0; i < width; ++i) normalized[i] = (inp[i] - mean) * rstd;
    statistics[2 * j] = (float)mean;
    statistics[2 * j + 1] = (float)rstd;
  }
}

// z (N, D) of n.
std::vector<double> tokens_reference(const std::vector<double>& normalized, const float* first,
                                     const float* weight, const float* bias, long width) {
  std::vector<double> z = normalized;
  if (first)
    for (size_t at = 0; at < z.size(); ++at) {
      const long i = at % width;
      z[at] = (long)at < width ? first[i] : weight[i] * z[at] + bias[i];
    }
  return z;
}

}  // namespace

extern "C" {

int cross_read_reference(const CrossReadArgs<float>* args) {
  const long H = args->heads, N = args->tokens, D = args->width;
  std::vector<double> normalized(N * D), weights(N);
  for (long b = 0; b < args->batch; ++b) {
    const float* first = args->first ? args->first + b * D : nullptr;
    normalize_reference(args->inp + b * N * D, first != nullptr, args->eps, normalized.data(),
                        args->statistics + b * N * 2, N, D);
    const std::vector<double> z =
        tokens_reference(normalized, first, args->norm_weight, args->norm_bias, D);
    for (long h = 0; h < H; ++h) {
      const float* probe = args->probes + (b * H + h) * D;
      double maximum = -INFINITY, sum = 0.0;
      for (long j = 0; j < N; ++j) {
        weights[j] = 0.0;
        for (long i = 0; i < D; ++i) weights[j] += probe[i] * z[j * D + i];
        maximum = std::max(maximum, weights[j]);
        double dot = 0.0;
        for (long i = 0; i < D; ++i)
          dot += (first ? probe[i] * args->norm_weight[i] : probe[i]) * normalized[j * D + i];
        args->dots[(b * H + h) * N + j] = (float)dot;
      }
      for (double& weight : weights) sum += weight = std::exp(weight - maximum);
      for (long j = 0; j < N; ++j) args->weights[(b * H + h) * N + j] = (float)(weights[j] / sum);
      for (long i = 0; i < D; ++i) {
        double context = 0.0, moment = 0.0;
        for (long j = 0; j < N; ++j) {
          context += weights[j] / sum * z[j * D + i];
          if (j > 0 || !first) moment += weights[j] / sum * normalized[j * D + i];
        }
        args->context[(b * H + h) * D + i] = (float)context;
        args->moments[(b * H + h) * D + i] = (float)moment;
      }
    }
  }
  return 0;
}

int cross_read_backward_reference(const CrossReadBackwardArgs<float>* args) {
  const long H = args->heads, N = args->tokens, D = args->width;
  std::vector<double> normalized(N * D), grad_z(N * D), grad_probe(D), grad_weights(N);
  for (long b = 0; b < args->batch; ++b) {
    const float *first = args->first ? args->first + b * D : nullptr, *inp = args->inp + b * N * D,
                *statistics = args->statistics + b * N * 2;
    for (long j = 0; j < N; ++j)
      for (long i = 0; i < D; ++i)
        normalized[j * D + i] =
            ((double)inp[j * D + i] - statistics[2 * j]) * statistics[2 * j + 1];
    const std::vector<double> z =
        tokens_reference(normalized, first, args->norm_weight, args->norm_bias, D);
    std::fill(grad_z.begin(), grad_z.end(), 0.0);
    for (long h = 0; h < H; ++h) {
      const float *probe = args->probes + (b * H + h) * D,
                  *grad_context = args->grad_context + (b * H + h) * D,
                  *weights = args->weights + (b * H + h) * N;
      double mean = 0.0;
      for (long j = 0; j < N; ++j) {
        grad_weights[j] = 0.0;
        for (long i = 0; i < D; ++i) grad_weights[j] += grad_context[i] * z[j * D + i];
        mean += weights[j] * grad_weights[j];
      }
      std::fill(grad_probe.begin(), grad_probe.end(), 0.0);
      for (long j = 0; j < N; ++j) {
        const double grad_score = weights[j] * (grad_weights[j] - mean);
        for (long i = 0; i < D; ++i) {
          grad_probe[i] += grad_score * z[j * D + i];
          grad_z[j * D + i] += grad_score * probe[i] + weights[j] * (double)grad_context[i];
        }
      }
      for (long i = 0; i < D; ++i) args->grad_probes[(b * H + h) * D + i] = (float)grad_probe[i];
    }
    float* grad_inp = args->grad_inp + b * N * D;
    for (long i = 0; i < D && first; ++i) {
      double grad_weight = 0.0, grad_bias = 0.0;
      for (long j = 1; j < N; ++j) {
        grad_weight += grad_z[j * D + i] * normalized[j * D + i];
        grad_bias += grad_z[j * D + i];
      }
      args->grad_first[b * D + i] = (float)grad_z[i];
      args->grad_norm_weight[b * D + i] = (float)grad_weight;
      args->grad_norm_bias[b * D + i] = (float)grad_bias;
    }
    for (long j = 0; j < N; ++j) {
      double mean_grad = 0.0, mean_dot = 0.0;
      for (long i = 0; i < D && first; ++i) {
        const double grad = args->norm_weight[i] * grad_z[j * D + i];
        mean_grad += grad / D;
        mean_dot += grad * normalized[j * D + i] / D;
      }
      for (long i = 0; i < D; ++i)
        grad_inp[j * D + i] =
            !first ? (float)grad_z[j * D + i]
            : j == 0
                ? 0.0f
                : (float)(statistics[2 * j + 1] * (args->norm_weight[i] * grad_z[j * D + i] -
                                                   mean_grad - normalized[j * D + i] * mean_dot));
    }
  }
  return 0;
}
}

// ------------------------------------------------------------------ kernels

namespace {

constexpr int HEADS = 4;  // at a time: 4 x 4 sums

inline float dot(const float* left, const float* right, long width) {
  __m512 sum = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES)
    sum = _mm512_fmadd_ps(load(left + at), load(right + at), sum);
  return _mm512_reduce_add_ps(sum);
}

// left ∘ right, or left alone
inline void multiply(const float* left, const float* right, float* to, long width) {
  for (long at = 0; at < width; at += LANES)
    store(to + at, right ? _mm512_mul_ps(load(left + at), load(right + at)) : load(left + at));
}

inline float sum_of(const float* numbers, long width) {
  __m512 sum = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES) sum = _mm512_add_ps(sum, load(numbers + at));
  return _mm512_reduce_add_ps(sum);
}

// (mean, 1 / √(variance + eps))
template <typename T>
inline void mean_and_rstd(const T* token, long width, float eps, float* to) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES) sum = _mm512_add_ps(sum, load(token + at));
  const float mean = _mm512_reduce_add_ps(sum) / width;
  for (long at = 0; at < width; at += LANES) {
    const __m512 deviation = _mm512_sub_ps(load(token + at), _mm512_set1_ps(mean));
    squares = _mm512_fmadd_ps(deviation, deviation, squares);
  }
  to[0] = mean;
  to[1] = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
}

// to[h][j] = rstd_j vectors_h · (x_j − mean_j) = vectors_h · n_j for the tokens from `start`. The
// mean is subtracted from each number: after the dot product, a large mean would leave few digits.
template <typename T>
void normalized_dots(const T* x, const float* statistics, const float* vectors, float* to,
                     long heads, long start, long tokens, long width) {
  for (long token = start; token < tokens; ++token) {
    const __m512 mean = _mm512_set1_ps(statistics[2 * token]);
    for (long head = 0; head < heads; head += HEADS) {
      const int count = (int)std::min<long>(HEADS, heads - head);
      __m512 dots[HEADS] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                            _mm512_setzero_ps()};
      for (long at = 0; at < width; at += LANES) {
        const __m512 values = _mm512_sub_ps(load(x + token * width + at), mean);
        for (int in = 0; in < count; ++in)
          dots[in] = _mm512_fmadd_ps(values, load(vectors + (head + in) * width + at), dots[in]);
      }
      for (int in = 0; in < count; ++in)
        to[(head + in) * tokens + token] =
            statistics[2 * token + 1] * _mm512_reduce_add_ps(dots[in]);
    }
  }
}

// to_h = Σ_j coefficients_hj n_j over the tokens from `start`. scratch: (H, N)
template <typename T>
void weighted_sums(const T* x, const float* statistics, const float* coefficients, float* scratch,
                   float* to, long heads, long start, long tokens, long width) {
  for (long head = 0; head < heads; ++head)
    for (long token = start; token < tokens; ++token)
      scratch[head * tokens + token] =
          coefficients[head * tokens + token] * statistics[2 * token + 1];
  for (long head = 0; head < heads; head += HEADS) {
    const int count = (int)std::min<long>(HEADS, heads - head);
    for (long at = 0; at < width; at += 4 * LANES) {
      const int columns = (int)std::min<long>(4, (width - at) / LANES);
      __m512 sums[HEADS][4];
      for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
      const auto add = [&](auto wide, auto all) {
        for (long token = start; token < tokens; ++token) {
          const __m512 mean = _mm512_set1_ps(statistics[2 * token]);
          __m512 values[4];
          for (int column = 0; column < (wide ? 4 : columns); ++column)
            values[column] = _mm512_sub_ps(load(x + token * width + at + column * LANES), mean);
          for (int in = 0; in < (all ? HEADS : count); ++in) {
            const __m512 coefficient = _mm512_set1_ps(scratch[(head + in) * tokens + token]);
            for (int column = 0; column < (wide ? 4 : columns); ++column)
              sums[in][column] = _mm512_fmadd_ps(coefficient, values[column], sums[in][column]);
          }
        }
      };
      if (columns == 4 && count == HEADS)
        add(std::true_type{}, std::true_type{});
      else
        add(std::false_type{}, std::false_type{});
      for (int in = 0; in < count; ++in)
        for (int column = 0; column < columns; ++column)
          store(to + (head + in) * width + at + column * LANES, sums[in][column]);
    }
  }
}

inline void softmax(const float* scores, float* weights, long tokens) {
  float maximum = scores[0];
  for (long token = 1; token < tokens; ++token)
    maximum = scores[token] > maximum ? scores[token] : maximum;
  __m512 sum = _mm512_setzero_ps();
  const __m512 log2_e = _mm512_set1_ps(LOG2_E), shift = _mm512_set1_ps(maximum * LOG2_E);
  for (long at = 0; at < tokens; at += LANES) {
    const __mmask16 valid = tokens - at >= LANES ? 0xFFFF : (__mmask16)((1u << (tokens - at)) - 1);
    const __m512 weight = _mm512_maskz_mov_ps(
        valid,
        exp2_precise(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(valid, scores + at), log2_e, shift)));
    sum = _mm512_add_ps(sum, weight);
    _mm512_mask_storeu_ps(weights + at, valid, weight);
  }
  const float scale = 1.0f / _mm512_reduce_add_ps(sum);
  for (long token = 0; token < tokens; ++token) weights[token] *= scale;
}

// The arguments of one image of a batch.
template <typename Element>
CrossReadArgs<Element> image_of(CrossReadArgs<Element> args, long image) {
  const long heads = args.heads, tokens = args.tokens, width = args.width;
  args.inp += image * tokens * width;
  if (args.first) args.first += image * width;
  for (float** field : {&args.weights, &args.dots}) *field += image * heads * tokens;
  for (float** field : {&args.context, &args.moments}) *field += image * heads * width;
  args.probes += image * heads * width;
  args.statistics += image * tokens * 2;
  return args;
}

CrossReadBackwardArgs<float> image_of(CrossReadBackwardArgs<float> args, long image) {
  const long heads = args.heads, tokens = args.tokens, width = args.width;
  if (args.first) {
    args.first += image * width;
    for (float** field : {&args.grad_first, &args.grad_norm_weight, &args.grad_norm_bias})
      *field += image * width;
  }
  for (const float** field : {&args.weights, &args.dots}) *field += image * heads * tokens;
  for (const float** field : {&args.probes, &args.moments, &args.grad_context})
    *field += image * heads * width;
  args.grad_probes += image * heads * width;
  args.inp += image * tokens * width;
  args.grad_inp += image * tokens * width;
  args.statistics += image * tokens * 2;
  return args;
}

// One image. buffer: H (D + N) numbers.
template <typename T>
void cross_read_image(const CrossReadArgs<T>& args, float* buffer) {
  const long heads = args.heads, tokens = args.tokens, width = args.width;
  const float *first = args.first, *norm_weight = args.norm_weight, *norm_bias = args.norm_bias;
  float *statistics = args.statistics, *weighted_probes = buffer, *scratch = buffer + heads * width;
  const long start = first ? 1 : 0;
  for (long head = 0; head < heads; ++head)
    multiply(args.probes + head * width, norm_weight, weighted_probes + head * width, width);
  for (long token = 0; token < tokens; ++token) {
    statistics[2 * token] = 0.0f;
    statistics[2 * token + 1] = 1.0f;
    if (first) mean_and_rstd(args.inp + token * width, width, args.eps, statistics + 2 * token);
  }
  normalized_dots(args.inp, statistics, weighted_probes, args.dots, heads, start, tokens, width);
  for (long head = 0; head < heads; ++head) {
    const float* probe = args.probes + head * width;
    float* dots = args.dots + head * tokens;
    // probe · bias is in every score and cancels in the softmax.
    const float offset = first ? dot(probe, norm_bias, width) : 0.0f;
    if (first) dots[0] = dot(probe, first, width) - offset;
    softmax(dots, args.weights + head * tokens, tokens);
  }
  weighted_sums(args.inp, statistics, args.weights, scratch, args.moments, heads, start, tokens,
                width);
  for (long head = 0; head < heads; ++head) {
    const float weight = first ? args.weights[head * tokens] : 0.0f;
    for (long at = head * width; at < (head + 1) * width; at += LANES) {
      __m512 values = load(args.moments + at);
      if (first) {
        const long in = at - head * width;
        values =
            _mm512_fmadd_ps(values, load(norm_weight + in),
                            _mm512_mul_ps(load(norm_bias + in), _mm512_set1_ps(1.0f - weight)));
        values = _mm512_fmadd_ps(load(first + in), _mm512_set1_ps(weight), values);
      }
      store(args.context + at, values);
    }
  }
}

// One image. With g_h the gradient of context_h, r_hj = (weight ∘ g_h) · n_j and
// t_hj = p_hj (r_hj − Σ_j p_hj r_hj), the gradient of s_hj:
//   dprobe_h = Σ_j t_hj z_j;   dz_j = Σ_h t_hj probe_h + p_hj g_h;   dn = weight ∘ dz;
//   dx = rstd (dn − mean(dn) − n mean(dn ∘ n)),
// where both means are sums of known numbers: mean(dn_j) of the sums of the vectors,
// mean(dn_j ∘ n_j) of dots and r.  buffer: H (2 D + 2 + 3 N) numbers.
void cross_read_backward_image(const CrossReadBackwardArgs<float>& args, float* buffer) {
  const long heads = args.heads, tokens = args.tokens, width = args.width;
  const float *x = args.inp, *first = args.first, *norm_weight = args.norm_weight,
              *norm_bias = args.norm_bias;
  const long start = first ? 1 : 0;
  float *weighted_probes = buffer, *weighted_grads = weighted_probes + heads * width,
        *grad_dots = weighted_grads + heads * width, *grad_scores = grad_dots + heads * tokens,
        *scratch = grad_scores + heads * tokens, *sums = scratch + heads * tokens;
  for (long head = 0; head < heads; ++head) {
    const float *probe = args.probes + head * width, *grad = args.grad_context + head * width;
    multiply(probe, norm_weight, weighted_probes + head * width, width);
    multiply(grad, norm_weight, weighted_grads + head * width, width);
    sums[head] = sum_of(weighted_probes + head * width, width);
    sums[heads + head] = sum_of(weighted_grads + head * width, width);
  }
  normalized_dots(x, args.statistics, weighted_grads, grad_dots, heads, start, tokens, width);
  for (long head = 0; head < heads; ++head) {
    const float *weights = args.weights + head * tokens, *grad = args.grad_context + head * width;
    float *grad_dot = grad_dots + head * tokens, *grad_score = grad_scores + head * tokens;
    float mean = 0.0f;
    if (first) grad_dot[0] = dot(grad, first, width) - dot(grad, norm_bias, width);
    for (long token = 0; token < tokens; ++token) mean += weights[token] * grad_dot[token];
    for (long token = 0; token < tokens; ++token)
      grad_score[token] = weights[token] * (grad_dot[token] - mean);
  }
  // Σ t n, for now
  weighted_sums(x, args.statistics, grad_scores, scratch, args.grad_probes, heads, start, tokens,
                width);
  if (first) {
    float *grad_first = args.grad_first, *grad_weight = args.grad_norm_weight,
          *grad_bias = args.grad_norm_bias;
    for (float* grads : {grad_first, grad_weight, grad_bias}) std::fill(grads, grads + width, 0.0f);
    for (long head = 0; head < heads; ++head) {
      const float first_score = grad_scores[head * tokens],
                  first_weight = args.weights[head * tokens];
      // Of the other tokens together: gradients of scores add up to 0, weights to 1.
      const float rest_score = -first_score, rest_weight = 1.0f - first_weight;
      const float *probe = args.probes + head * width, *grad = args.grad_context + head * width,
                  *moment = args.moments + head * width;
      float* grad_probe = args.grad_probes + head * width;
      for (long at = 0; at < width; ++at) {
        grad_weight[at] += probe[at] * grad_probe[at] + grad[at] * moment[at];
        grad_bias[at] += probe[at] * rest_score + grad[at] * rest_weight;
        grad_first[at] += first_score * probe[at] + first_weight * grad[at];
        grad_probe[at] =
            norm_weight[at] * grad_probe[at] + norm_bias[at] * rest_score + first_score * first[at];
      }
    }
    std::fill(args.grad_inp, args.grad_inp + width, 0.0f);
  }
  for (long token = start; token < tokens; ++token) {
    const float mean = args.statistics[2 * token], rstd = args.statistics[2 * token + 1];
    float grad_sum = 0.0f, grad_dot = 0.0f;
    if (first)
      for (long head = 0; head < heads; ++head) {
        const float grad_score = grad_scores[head * tokens + token],
                    weight = args.weights[head * tokens + token];
        grad_sum += grad_score * sums[head] + weight * sums[heads + head];
        grad_dot += grad_score * args.dots[head * tokens + token] +
                    weight * grad_dots[head * tokens + token];
      }
    const __m512 along = _mm512_set1_ps(-grad_dot / width * rstd),
                 offset = _mm512_set1_ps(-grad_sum / width);
    for (long at = 0; at < width; at += LANES) {
      __m512 grads = _mm512_fmadd_ps(
          along, _mm512_sub_ps(load(x + token * width + at), _mm512_set1_ps(mean)), offset);
      for (long head = 0; head < heads; ++head) {
        grads = _mm512_fmadd_ps(_mm512_set1_ps(grad_scores[head * tokens + token]),
                                load(weighted_probes + head * width + at), grads);
        grads = _mm512_fmadd_ps(_mm512_set1_ps(args.weights[head * tokens + token]),
                                load(weighted_grads + head * width + at), grads);
      }
      store(args.grad_inp + token * width + at, _mm512_mul_ps(grads, _mm512_set1_ps(rstd)));
    }
  }
}

// body(arguments of an image, buffer of `count` numbers) for every image. 1 if memory ran out.
template <typename Args, typename Body>
int for_images(const Args& args, long count, Body body) {
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    float* buffer = (float*)workspace(count * sizeof(float));
    failed = buffer == nullptr;
#pragma omp for schedule(static)
    for (long image = 0; image < args.batch; ++image)
      if (buffer) body(image_of(args, image), buffer);
  }
  return failed;
}

template <typename T>
int cross_read(const CrossReadArgs<T>& args) {
  return for_images(args, args.heads * (args.width + args.tokens), cross_read_image<T>);
}

}  // namespace

extern "C" {

int cross_read_fp32(const CrossReadArgs<float>* args) {
  return cross_read(*args);
}

#ifdef __AVX512BF16__
int cross_read_bf16(const CrossReadArgs<uint16_t>* args) {
  return cross_read(*args);
}
#endif

// grad_inp: (B, N, D), with a fused norm 0 for token 0;  grad_first: (B, D);  grad_norm_weight,
// grad_norm_bias: (B, D), one part an image.
int cross_read_backward_fp32(const CrossReadBackwardArgs<float>* args) {
  return for_images(*args, args->heads * (2 * args->width + 2 + 3 * args->tokens),
                    cross_read_backward_image);
}
}
