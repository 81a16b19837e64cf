// Patches as tokens on a CPU with AVX-512, where the stem is one convolution of stride P:
//
//   tokens (B, first + n, D) from row `first` on = patches W + bias + positions
//
//   images: (B, C, H, W) fp32 dense; a patch: P x P pixels of C channels, in the order of the
//   convolution's weight, packed by linear.cpp; n = (H / P) (W / P); positions: (first + n, D).
//   Inputs of the matmul are fp32, or bf16 as uint16_t.

#include "arguments.h"
#include "layers.h"

extern "C" {

// Scalar reference: fp32, sums in double. `packed` is the weight as torch has it (D, C P P).
int patch_tokens_reference(const PatchTokensArgs<float>* args) {
  const long P = args->patch, columns = args->width / P, n = args->height / P * columns;
  const long patch_size = args->channels * P * P, D = args->dim;
  for (long b = 0; b < args->batch; ++b)
    for (long patch = 0; patch < n; ++patch)
      for (long d = 0; d < D; ++d) {
        double sum = args->bias[d] + (double)args->positions[(args->first + patch) * D + d];
        for (long i = 0; i < patch_size; ++i) {
          const long channel = i / (P * P), row = patch / columns * P + i / P % P,
                     column = patch % columns * P + i % P;
          const float pixel =
              args->images[((b * args->channels + channel) * args->height + row) * args->width +
                           column];
          if (args->patches) args->patches[(b * n + patch) * patch_size + i] = pixel;
          sum += (double)pixel * args->packed[d * patch_size + i];
        }
        args->tokens[(b * (args->first + n) + args->first + patch) * D + d] = (float)sum;
      }
  return 0;
}
}

namespace {

// Copies a patch (C, P, P) of one image (C, H, W).
template <typename T>
inline void load_patch(const PatchTokensArgs<typename T::type>& args, const float* image,
                       long patch_index, typename T::type* to) {
  const long patch = args.patch, columns = args.width / patch;
  const long top = patch_index / columns * patch, left = patch_index % columns * patch;
  for (long channel = 0; channel < args.channels; ++channel)
    for (long row = 0; row < patch; ++row) {
      const float* from = image + (channel * args.height + top + row) * args.width + left;
      for (long at = 0; at < patch; at += LANES, from += LANES)
        T::store_first(to + at, _mm512_maskz_loadu_ps(first_lanes(patch - at), from), patch - at);
      to += patch;
    }
}

template <typename T>
int patch_tokens(const PatchTokensArgs<typename T::type>& args) {
  using type = typename T::type;
  const long width = args.dim, first = args.first;
  const long patch_count = args.height / args.patch * (args.width / args.patch),
             patch_size = args.channels * args.patch * args.patch;
  const float* bias = args.bias;
  return for_row_blocks(
      args.batch * patch_count, block_bytes<type>(patch_size),
      [&](long start, long rows, char* memory) {
        type* patches = args.patches ? args.patches + start * patch_size : (type*)memory;
        const float* position_rows[BLOCK_ROWS];
        float* out_rows[BLOCK_ROWS];
        for (long row = 0; row < rows; ++row) {
          const long image = (start + row) / patch_count, patch_index = (start + row) % patch_count;
          load_patch<T>(args, args.images + image * args.channels * args.height * args.width,
                        patch_index, patches + row * patch_size);
          position_rows[row] = args.positions + (first + patch_index) * width;
          out_rows[row] =
              args.tokens + (image * (first + patch_count) + first + patch_index) * width;
        }
        matmul_packed<T>(
            patches, rows, args.packed, patch_size, width, [&](long row, long at, __m512 sum) {
              store(out_rows[row] + at, _mm512_add_ps(_mm512_add_ps(sum, load(bias + at)),
                                                      load(position_rows[row] + at)));
            });
      });
}

}  // namespace

extern "C" {

int patch_tokens_fp32(const PatchTokensArgs<float>* args) {
  return patch_tokens<Fp32>(*args);
}

#ifdef __AVX512BF16__
int patch_tokens_bf16(const PatchTokensArgs<uint16_t>* args) {
  return patch_tokens<Bf16>(*args);
}
#endif
}
