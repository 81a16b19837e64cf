// Sizes of the kernels' arguments, for bindings.py to compare with its own.

#include "arguments.h"

#include <cstring>

// Bytes of the arguments of `kernel`, -1 where there is none of that name.
extern "C" long arguments_size(const char* kernel) {
  const struct {
    const char* kernel;
    long size;
  } sizes[] = {
      {"attention", sizeof(AttentionArgs<float>)},
      {"attention_backward", sizeof(AttentionBackwardArgs<float>)},
      {"pack", sizeof(PackArgs<float>)},
      {"linear_backward", sizeof(LinearBackwardArgs<float>)},
      {"norm_linear", sizeof(NormLinearArgs<float>)},
      {"linear_residual", sizeof(LinearResidualArgs<float>)},
      {"mlp", sizeof(MlpArgs<float>)},
      {"linear_residual_backward", sizeof(LinearResidualBackwardArgs<float>)},
      {"norm_linear_backward", sizeof(NormLinearBackwardArgs<float>)},
      {"mlp_backward", sizeof(MlpBackwardArgs<float>)},
      {"patch_tokens", sizeof(PatchTokensArgs<float>)},
      {"cross_read", sizeof(CrossReadArgs<float>)},
      {"cross_read_backward", sizeof(CrossReadBackwardArgs<float>)},
      {"resize", sizeof(ResizeArgs)},
  };
  for (const auto& entry : sizes)
    if (std::strcmp(entry.kernel, kernel) == 0) return entry.size;
  return -1;
}
