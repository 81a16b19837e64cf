// Lazy cross-attention on a CPU with AVX-512: H probes read N tokens once, forward and backward, in time linear in N.
//
//   s_hj = probe_h · z_j,  p_h = softmax(s_h),  mixed_h = Σ_j p_hj z_j
//
//   x: (B, N, D) fp32 or bf16;  probes, mixed: (B, H, D) fp32, the scale in the probes.  Plain: z = x.  Folded (`first` is given):
//   z_0 = first (B, D), and z_j = weight ∘ n_j + bias with n_j = (x_j − mean_j) rstd_j is the LayerNorm of the others, which is
//   never made: probe · z_j = rstd_j (weight ∘ probe) · (x_j − mean_j) + probe · bias, and so on.
//
// Kept for the gradient: shares p (B, H, N), dots (weight ∘ probe) · n_j (B, H, N), statistics (B, N, 2), moments Σ p_hj n_j (B, H, D).

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace {

constexpr int HEADS = 4;  // at a time: 4 x 4 sums

inline float dot(const float* left, const float* right, long width) {
  __m512 sum = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES) sum = _mm512_fmadd_ps(load(left + at), load(right + at), sum);
  return _mm512_reduce_add_ps(sum);
}

// left ∘ right, or left alone
inline void scaled(const float* left, const float* right, float* to, long width) {
  for (long at = 0; at < width; at += LANES) store(to + at, right ? _mm512_mul_ps(load(left + at), load(right + at)) : load(left + at));
}

inline float sum_of(const float* numbers, long width) {
  __m512 sum = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES) sum = _mm512_add_ps(sum, load(numbers + at));
  return _mm512_reduce_add_ps(sum);
}

// (mean, 1 / √(variance + eps))
template <typename T>
inline void statistics_of(const T* token, long width, float eps, float* to) {
  __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (long at = 0; at < width; at += LANES) total = _mm512_add_ps(total, load(token + at));
  const float mean = _mm512_reduce_add_ps(total) / width;
  for (long at = 0; at < width; at += LANES) {
    const __m512 apart = _mm512_sub_ps(load(token + at), _mm512_set1_ps(mean));
    squares = _mm512_fmadd_ps(apart, apart, squares);
  }
  to[0] = mean;
  to[1] = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
}

// to[h][j] = rstd_j vectors_h · (x_j − mean_j) = vectors_h · n_j for the tokens from `start`. The mean is taken away from each
// number: of a product with a large mean little would be left.
template <typename T>
void dots_of(const T* x, const float* statistics, const float* vectors, float* to, long heads, long start, long tokens, long width) {
  for (long token = start; token < tokens; ++token) {
    const __m512 mean = _mm512_set1_ps(statistics[2 * token]);
    for (long head = 0; head < heads; head += HEADS) {
      const int count = (int)std::min<long>(HEADS, heads - head);
      __m512 found[HEADS] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      for (long at = 0; at < width; at += LANES) {
        const __m512 own = _mm512_sub_ps(load(x + token * width + at), mean);
        for (int in = 0; in < count; ++in) found[in] = _mm512_fmadd_ps(own, load(vectors + (head + in) * width + at), found[in]);
      }
      for (int in = 0; in < count; ++in) to[(head + in) * tokens + token] = statistics[2 * token + 1] * _mm512_reduce_add_ps(found[in]);
    }
  }
}

// to_h = Σ_j factors_hj n_j over the tokens from `start`. scratch: (H, N)
template <typename T>
void weighted_sums(const T* x, const float* statistics, const float* factors, float* scratch, float* to, long heads, long start, long tokens, long width) {
  for (long head = 0; head < heads; ++head)
    for (long token = start; token < tokens; ++token) scratch[head * tokens + token] = factors[head * tokens + token] * statistics[2 * token + 1];
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
          __m512 own[4];
          for (int column = 0; column < (wide ? 4 : columns); ++column) own[column] = _mm512_sub_ps(load(x + token * width + at + column * LANES), mean);
          for (int in = 0; in < (all ? HEADS : count); ++in) {
            const __m512 factor = _mm512_set1_ps(scratch[(head + in) * tokens + token]);
            for (int column = 0; column < (wide ? 4 : columns); ++column) sums[in][column] = _mm512_fmadd_ps(factor, own[column], sums[in][column]);
          }
        }
      };
      if (columns == 4 && count == HEADS) add(std::true_type{}, std::true_type{});
      else add(std::false_type{}, std::false_type{});
      for (int in = 0; in < count; ++in)
        for (int column = 0; column < columns; ++column)
          store(to + (head + in) * width + at + column * LANES, sums[in][column]);
    }
  }
}

inline void softmax(const float* scores, float* shares, long tokens) {
  float most = scores[0];
  for (long token = 1; token < tokens; ++token) most = scores[token] > most ? scores[token] : most;
  __m512 total = _mm512_setzero_ps();
  const __m512 factor = _mm512_set1_ps(LOG2_E), largest = _mm512_set1_ps(most * LOG2_E);
  for (long at = 0; at < tokens; at += LANES) {
    const __mmask16 real = tokens - at >= LANES ? 0xFFFF : (__mmask16)((1u << (tokens - at)) - 1);
    const __m512 weight = _mm512_maskz_mov_ps(real, power_of_two(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(real, scores + at), factor, largest)));
    total = _mm512_add_ps(total, weight);
    _mm512_mask_storeu_ps(shares + at, real, weight);
  }
  const float share = 1.0f / _mm512_reduce_add_ps(total);
  for (long token = 0; token < tokens; ++token) shares[token] *= share;
}

struct Sizes {
  long heads, tokens, width;
  float eps;
};

// The LayerNorm that is folded in, and the token that is there already; all null where z = x.
struct Fold {
  const float *first, *weight, *bias;
};

template <typename T>
void read_one(const T* x, Fold fold, const float* probes, float* mixed, float* shares, float* dots, float* statistics, float* moments, Sizes sizes) {
  const auto [heads, tokens, width, eps] = sizes;
  const long start = fold.first ? 1 : 0;
  std::vector<float> vectors(heads * width), scratch(heads * tokens);
  for (long head = 0; head < heads; ++head) scaled(probes + head * width, fold.weight, vectors.data() + head * width, width);
  for (long token = 0; token < tokens; ++token) {
    statistics[2 * token] = 0.0f;
    statistics[2 * token + 1] = 1.0f;
    if (fold.first) statistics_of(x + token * width, width, eps, statistics + 2 * token);
  }
  dots_of(x, statistics, vectors.data(), dots, heads, start, tokens, width);
  for (long head = 0; head < heads; ++head) {
    float* own = dots + head * tokens;
    const float offset = fold.first ? dot(probes + head * width, fold.bias, width) : 0.0f;
    if (fold.first) own[0] = dot(probes + head * width, fold.first, width) - offset;  // an offset that all share cancels
    softmax(own, shares + head * tokens, tokens);
  }
  weighted_sums(x, statistics, shares, scratch.data(), moments, heads, start, tokens, width);
  for (long head = 0; head < heads; ++head) {
    const float share = fold.first ? shares[head * tokens] : 0.0f;
    for (long at = head * width; at < (head + 1) * width; at += LANES) {
      __m512 own = load(moments + at);
      if (fold.first) {
        const long in = at - head * width;
        own = _mm512_fmadd_ps(own, load(fold.weight + in), _mm512_mul_ps(load(fold.bias + in), _mm512_set1_ps(1.0f - share)));
        own = _mm512_fmadd_ps(load(fold.first + in), _mm512_set1_ps(share), own);
      }
      store(mixed + at, own);
    }
  }
}

// What gradient_one reads of the forward pass, and where it writes.
struct Kept {
  const float *probes, *shares, *dots, *statistics, *moments;
};
struct Found {
  float *x, *first, *probes, *weight, *bias;  // weight and bias: this image's part
};

// With g_h the gradient of mixed_h, r_hj = (weight ∘ g_h) · n_j and t_hj = p_hj (r_hj − Σ_j p_hj r_hj), which is that of s_hj:
//   dprobe_h = Σ_j t_hj z_j;   dz_j = Σ_h t_hj probe_h + p_hj g_h;   dn = weight ∘ dz;   dx = rstd (dn − mean(dn) − n mean(dn ∘ n)),
// where both means are sums of what is known: mean(dn_j) of the sums of the vectors, mean(dn_j ∘ n_j) of dots and r.
void gradient_one(const float* x, Fold fold, Kept kept, const float* gradient, Found found, Sizes sizes) {
  const auto [heads, tokens, width, eps] = sizes;
  const long start = fold.first ? 1 : 0;
  std::vector<float> vectors(2 * heads * width), sums(2 * heads), reads(heads * tokens), slopes(heads * tokens), scratch(heads * tokens);
  float *of_probes = vectors.data(), *of_gradient = of_probes + heads * width;
  for (long head = 0; head < heads; ++head) {
    scaled(kept.probes + head * width, fold.weight, of_probes + head * width, width);
    scaled(gradient + head * width, fold.weight, of_gradient + head * width, width);
    sums[head] = sum_of(of_probes + head * width, width);
    sums[heads + head] = sum_of(of_gradient + head * width, width);
  }
  dots_of(x, kept.statistics, of_gradient, reads.data(), heads, start, tokens, width);
  for (long head = 0; head < heads; ++head) {
    const float* share = kept.shares + head * tokens;
    float *read = reads.data() + head * tokens, *slope = slopes.data() + head * tokens, mean = 0.0f;
    if (fold.first) read[0] = dot(gradient + head * width, fold.first, width) - dot(gradient + head * width, fold.bias, width);
    for (long token = 0; token < tokens; ++token) mean += share[token] * read[token];
    for (long token = 0; token < tokens; ++token) slope[token] = share[token] * (read[token] - mean);
  }
  weighted_sums(x, kept.statistics, slopes.data(), scratch.data(), found.probes, heads, start, tokens, width);  // Σ t n, for now
  if (fold.first) {
    std::fill(found.first, found.first + width, 0.0f);
    std::fill(found.weight, found.weight + width, 0.0f);
    std::fill(found.bias, found.bias + width, 0.0f);
    for (long head = 0; head < heads; ++head) {
      const float first_slope = slopes[head * tokens], first_share = kept.shares[head * tokens];
      const float slope = -first_slope, share = 1.0f - first_share;  // of the others together: slopes add up to 0, shares to 1
      const float *probe = kept.probes + head * width, *given = gradient + head * width, *moment = kept.moments + head * width;
      float* own = found.probes + head * width;
      for (long at = 0; at < width; ++at) {
        found.weight[at] += probe[at] * own[at] + given[at] * moment[at];
        found.bias[at] += probe[at] * slope + given[at] * share;
        found.first[at] += first_slope * probe[at] + first_share * given[at];
        own[at] = fold.weight[at] * own[at] + fold.bias[at] * slope + first_slope * fold.first[at];
      }
    }
    std::fill(found.x, found.x + width, 0.0f);
  }
  for (long token = start; token < tokens; ++token) {
    const float mean = kept.statistics[2 * token], rstd = kept.statistics[2 * token + 1];
    float of_sum = 0.0f, of_normal = 0.0f;
    if (fold.first)
      for (long head = 0; head < heads; ++head) {
        const float slope = slopes[head * tokens + token], share = kept.shares[head * tokens + token];
        of_sum += slope * sums[head] + share * sums[heads + head];
        of_normal += slope * kept.dots[head * tokens + token] + share * reads[head * tokens + token];
      }
    const __m512 along = _mm512_set1_ps(-of_normal / width * rstd), offset = _mm512_set1_ps(-of_sum / width);
    for (long at = 0; at < width; at += LANES) {
      __m512 own = _mm512_fmadd_ps(along, _mm512_sub_ps(load(x + token * width + at), _mm512_set1_ps(mean)), offset);
      for (long head = 0; head < heads; ++head) {
        own = _mm512_fmadd_ps(_mm512_set1_ps(slopes[head * tokens + token]), load(of_probes + head * width + at), own);
        own = _mm512_fmadd_ps(_mm512_set1_ps(kept.shares[head * tokens + token]), load(of_gradient + head * width + at), own);
      }
      store(found.x + token * width + at, _mm512_mul_ps(own, _mm512_set1_ps(rstd)));
    }
  }
}

template <typename T>
void read(const T* x, Fold fold, const float* probes, float* mixed, float* shares, float* dots, float* statistics, float* moments, long batch, Sizes sizes) {
  const auto [heads, tokens, width, eps] = sizes;
#pragma omp parallel for schedule(static)
  for (long image = 0; image < batch; ++image) {
    const Fold own{fold.first ? fold.first + image * width : nullptr, fold.weight, fold.bias};
    const long of_tokens = image * heads * tokens, of_heads = image * heads * width;
    read_one(x + image * tokens * width, own, probes + of_heads, mixed + of_heads, shares + of_tokens, dots + of_tokens,
             statistics + image * tokens * 2, moments + of_heads, sizes);
  }
}

}  // namespace

extern "C" {

void cross_read_fp32(const float* x, const float* first, const float* weight, const float* bias, const float* probes, float* mixed, float* shares, float* dots,
                     float* statistics, float* moments, long batch, long heads, long tokens, long width, float eps) {
  read(x, Fold{first, weight, bias}, probes, mixed, shares, dots, statistics, moments, batch, Sizes{heads, tokens, width, eps});
}

#ifdef __AVX512BF16__
void cross_read_bf16(const uint16_t* x, const float* first, const float* weight, const float* bias, const float* probes, float* mixed, float* shares,
                     float* dots, float* statistics, float* moments, long batch, long heads, long tokens, long width, float eps) {
  read(x, Fold{first, weight, bias}, probes, mixed, shares, dots, statistics, moments, batch, Sizes{heads, tokens, width, eps});
}
#endif

// x_gradient: (B, N, D), in the folded form 0 for token 0;  first_gradient (B, D);  weight_gradients, bias_gradients: (B, D), one
// part an image.
void cross_read_gradient(const float* x, const float* first, const float* weight, const float* bias, const float* probes, const float* shares,
                         const float* dots, const float* statistics, const float* moments, const float* gradient, float* x_gradient,
                         float* first_gradient, float* probe_gradient, float* weight_gradients, float* bias_gradients, long batch, long heads, long tokens,
                         long width) {
#pragma omp parallel for schedule(static)
  for (long image = 0; image < batch; ++image) {
    const long of_tokens = image * heads * tokens, of_heads = image * heads * width, of_one = image * width;
    const auto own = [&](float* part) { return first ? part + of_one : nullptr; };
    gradient_one(x + image * tokens * width, Fold{first ? first + of_one : nullptr, weight, bias},
                 Kept{probes + of_heads, shares + of_tokens, dots + of_tokens, statistics + image * tokens * 2, moments + of_heads}, gradient + of_heads,
                 Found{x_gradient + image * tokens * width, own(first_gradient), probe_gradient + of_heads, own(weight_gradients), own(bias_gradients)},
                 Sizes{heads, tokens, width, 0.0f});
  }
}
}
