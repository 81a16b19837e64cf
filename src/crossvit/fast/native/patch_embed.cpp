// Patches as tokens on a CPU with AVX-512, where the stem is one convolution whose stride is its kernel:
//
//   tokens (B, first + n, D) from row `first` on = patches W + bias + positions
//
//   images: (B, C, H, W) fp32 dense; a patch: P x P pixels of C channels, in the order of the convolution's weight, which linear.cpp
//   has packed; n = (H / P) (W / P); positions: (first + n, D). What goes into the product is fp32, or bf16 as uint16_t.

#include "rows.h"

namespace {

struct Image {
  long channels, height, width, patch;
  long columns() const { return width / patch; }
  long count() const { return height / patch * columns(); }
  long numbers() const { return channels * patch * patch; }  // of a patch
};

template <typename T>
inline void take_patch(const float* image, const Image& size, long which, typename T::type* to) {
  const long top = which / size.columns() * size.patch, left = which % size.columns() * size.patch;
  for (long channel = 0; channel < size.channels; ++channel)
    for (long row = 0; row < size.patch; ++row) {
      const float* from = image + (channel * size.height + top + row) * size.width + left;
      for (long at = 0; at < size.patch; at += LANES, from += LANES) T::store_first(to + at, _mm512_maskz_loadu_ps(first_lanes(size.patch - at), from), size.patch - at);
      to += size.patch;
    }
}

template <typename T>
int patch_tokens(const float* images, const typename T::type* packed, const float* bias, const float* positions, typename T::type* patches, float* tokens,
                 long batch, Image size, long first, long width) {
  using type = typename T::type;
  const long count = size.count(), numbers = size.numbers();
  return over_rows(batch * count, block_of<type>(numbers), [&](long start, long rows, char* memory) {
    type* own = patches ? patches + start * numbers : (type*)memory;
    const float* shifts[BLOCK_ROWS];
    float* places[BLOCK_ROWS];
    for (long row = 0; row < rows; ++row) {
      const long image = (start + row) / count, which = (start + row) % count;
      take_patch<T>(images + image * size.channels * size.height * size.width, size, which, own + row * numbers);
      shifts[row] = positions + (first + which) * width;
      places[row] = tokens + (image * (first + count) + first + which) * width;
    }
    times_packed<T>(own, rows, packed, numbers, width, [&](long row, long at, __m512 sum) {
      store(places[row] + at, _mm512_add_ps(_mm512_add_ps(sum, load(bias + at)), load(shifts[row] + at)));
    });
  });
}

}  // namespace

extern "C" {

// patches (B n, C P P) is kept if not null.
int patch_tokens_fp32(const float* images, const float* packed, const float* bias, const float* positions, float* patches, float* tokens, long batch,
                      long channels, long height, long across, long patch, long first, long width) {
  return patch_tokens<Fp32>(images, packed, bias, positions, patches, tokens, batch, {channels, height, across, patch}, first, width);
}

#ifdef __AVX512BF16__
int patch_tokens_bf16(const float* images, const uint16_t* packed, const float* bias, const float* positions, uint16_t* patches, float* tokens, long batch,
                      long channels, long height, long across, long patch, long first, long width) {
  return patch_tokens<Bf16>(images, packed, bias, positions, patches, tokens, batch, {channels, height, across, patch}, first, width);
}
#endif
}
