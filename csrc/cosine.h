// The two cosine kernels behind ak_cosine_exp (cosine.cu, which checks the arguments). Each returns null, or what is wrong.
#pragma once

#include "library.h"

namespace ak {

struct CosineKernel {
    const char* (*check)();                                        // loads it on the current device
    const char* (*tiling)(AkTiling&);                              // on the current device
    const char* (*launch)(const AkCosine&, const AkWhere&);
    void (*block)(AkBlock&);
};

extern const CosineKernel portable_cosine;  // cosine_sm80.cu
extern const CosineKernel hopper_cosine;    // cosine_sm90.cu, kernel_sm90.cuh; only where AK_CUTLASS is defined

}  // namespace ak
