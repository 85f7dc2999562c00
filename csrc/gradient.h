// Hopper's gradient kernel behind ak_grad_centres (centres.cu, which checks the arguments). Null, or what is wrong.
#pragma once

#include "library.h"

namespace ak {

struct GradientKernel {
    const char* (*check)();                 // loads it on the current device
    const char* (*tiling)(AkGradTiling&);   // on the current device
    const char* (*launch)(const AkGradCentres&, const AkWhere&);
    void (*block)(AkBlock&);
    int64_t widest;                         // of a∘x̂
};

extern const GradientKernel hopper_gradient;  // gradient_sm90.cu, gradient_sm90.cuh; only where AK_CUTLASS is defined

}  // namespace ak
