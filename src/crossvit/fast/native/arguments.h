// Arguments of the kernels, one struct each: pointers, then sizes, then numbers. ARGUMENTS of
// bindings.py has the same fields in the same order; the sizes are asserted here and at load.
//
//   Element: of what goes into a matmul or comes out of one, float, or uint16_t for bf16.
//   B batch, N tokens, D width, H heads, K = D / H width of a head, R = B N rows, F hidden width.
//   packed: a weight as `pack` lays it out; the scalar references read torch's own (out, in).
//   statistics: (R, 2), mean and rstd = 1 / √(variance + eps) of each row.

#pragma once

#include <cstddef>
#include <cstdint>

// A struct of that many pointers, of that many sizes, and a float or none.
#define ASSERT_SIZE(Args, pointers, sizes, numbers) \
  static_assert(sizeof(Args) == 8 * ((pointers) + (sizes) + (numbers)), #Args " and bindings.py")

template <typename Element>
struct AttentionArgs {
  const Element* qkv;  // (B, N, 3, H, K)
  Element* out;        // (B, N, H, K)
  float* log_sums;     // (B, H, N), or null
  long batch, tokens, heads, head_dim;
  float scale;
};
ASSERT_SIZE(AttentionArgs<float>, 3, 4, 1);

template <typename Element>
struct AttentionBackwardArgs {
  const Element *qkv, *out, *grad_out;
  const float* log_sums;
  Element* grad_qkv;  // (B, N, 3, H, K)
  long batch, tokens, heads, head_dim;
  float scale;
};
ASSERT_SIZE(AttentionBackwardArgs<float>, 5, 4, 1);

template <typename Element>
struct PackArgs {
  const float* weight;  // (rows, cols)
  Element* packed;
  long rows, cols, transposed;
};
ASSERT_SIZE(PackArgs<float>, 2, 3, 0);

template <typename Element>
struct LinearBackwardArgs {
  const Element *grad_out, *inp;   // (R, out_dim), (R, in_dim)
  float *grad_weight, *grad_bias;  // (out_dim, in_dim), (out_dim)
  long rows, out_dim, in_dim, accumulate;
};
ASSERT_SIZE(LinearBackwardArgs<float>, 4, 4, 0);

template <typename Element>
struct NormLinearArgs {
  const float *inp, *norm_weight, *norm_bias;  // (R, in_dim), (in_dim), (in_dim)
  const Element* packed;
  const float* bias;
  Element* normalized;  // (R, in_dim), or null
  float* statistics;    // or null
  Element* out;         // (R, out_dim)
  long rows, in_dim, out_dim;
  float eps;
};
ASSERT_SIZE(NormLinearArgs<float>, 8, 3, 1);

template <typename Element>
struct LinearResidualArgs {
  const Element *inp, *packed;                     // (R, in_dim)
  const float *bias, *residual, *drop_path_scale;  // (out_dim), (R, out_dim), (B) or null for 1
  float* out;                                      // (R, out_dim)
  long rows, tokens, in_dim, out_dim;
};
ASSERT_SIZE(LinearResidualArgs<float>, 6, 4, 0);

template <typename Element>
struct MlpArgs {
  const float *inp, *norm_weight, *norm_bias;
  const Element* up_packed;
  const float* up_bias;
  const Element* down_packed;
  const float *down_bias, *drop_path_scale;
  Element* normalized;  // (R, D), or null
  float* statistics;    // or null
  Element* hidden;      // (R, F), the input of GELU, or null
  float* out;           // (R, D)
  long rows, tokens, width, hidden_dim;
  float eps;
};
ASSERT_SIZE(MlpArgs<float>, 12, 4, 1);

template <typename Element>
struct LinearResidualBackwardArgs {
  const float *grad_out, *drop_path_scale;  // (R, out_dim), (B) or null for 1
  const Element* packed;
  Element *grad_update, *grad_inp;  // (R, out_dim), (R, in_dim)
  long rows, tokens, out_dim, in_dim;
};
ASSERT_SIZE(LinearResidualBackwardArgs<float>, 5, 4, 0);

template <typename Element>
struct NormLinearBackwardArgs {
  const Element *grad_out, *packed;  // (R, out_dim)
  const float *residual_grad, *inp, *norm_weight, *statistics;
  float *grad_inp, *grad_norm_weight, *grad_norm_bias;
  long rows, in_dim, out_dim;
};
ASSERT_SIZE(NormLinearBackwardArgs<float>, 9, 3, 0);

template <typename Element>
struct MlpBackwardArgs {
  const float *grad_out, *drop_path_scale;
  const Element *down_packed, *hidden, *up_packed;
  const float *inp, *norm_weight, *statistics;
  Element *grad_update, *activated, *grad_hidden;  // (R, D), (R, F), (R, F)
  float *grad_inp, *grad_norm_weight, *grad_norm_bias;
  long rows, tokens, width, hidden_dim;
};
ASSERT_SIZE(MlpBackwardArgs<float>, 14, 4, 0);

template <typename Element>
struct PatchTokensArgs {
  const float* images;  // (B, C, H, W)
  const Element* packed;
  const float *bias, *positions;  // (D), (N, D)
  Element* patches;               // (B n, C P P), or null
  float* tokens;                  // (B, N, D)
  long batch, channels, height, width, patch, first, dim;
};
ASSERT_SIZE(PatchTokensArgs<float>, 6, 7, 0);

template <typename Element>
struct CrossReadArgs {
  const Element* inp;                            // (B, N, D)
  const float *first, *norm_weight, *norm_bias;  // (B, D), (D), (D), or all null
  const float* probes;                           // (B, H, D)
  float* context;                                // (B, H, D)
  float *weights, *dots, *statistics, *moments;  // (B, H, N), (B, H, N), (B, N, 2), (B, H, D)
  long batch, heads, tokens, width;
  float eps;
};
ASSERT_SIZE(CrossReadArgs<float>, 10, 4, 1);

template <typename Element>
struct CrossReadBackwardArgs {
  const Element* inp;
  const float *first, *norm_weight, *norm_bias, *probes, *weights, *dots, *statistics, *moments;
  const float* grad_context;                   // (B, H, D)
  float *grad_inp, *grad_first, *grad_probes;  // (B, N, D), (B, D) or null, (B, H, D)
  float *grad_norm_weight, *grad_norm_bias;    // (B, D), one part an image, or null
  long batch, heads, tokens, width;
};
ASSERT_SIZE(CrossReadBackwardArgs<float>, 15, 4, 0);

struct ResizeArgs {
  const float* planes;  // (P, H, W)
  float* out;           // (P, h, w)
  const int32_t* row_starts;
  const float* row_weights;  // (h, TAPS)
  const int32_t* column_starts;
  const float* column_weights;  // (TAPS, w)
  long count, height, width, out_height, out_width;
};
ASSERT_SIZE(ResizeArgs, 6, 5, 0);
