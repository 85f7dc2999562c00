// What Hopper's kernels have in common: two warpgroups that multiply and one that loads, under CUTLASS's pipeline.
#pragma once

#ifndef NDEBUG
#define NDEBUG  // else CUTLASS's device code asserts
#endif
#include <cute/tensor.hpp>
//
#include <cuda.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "device.cuh"
#include "schedule_sm90.h"

namespace ak {
namespace sm90 {
namespace {

constexpr int kThreads = 384, kGroup = 128;
constexpr uint64_t kCacheHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);

// c plus the products of a stage, on their way when this returns; the first of a tile starts from zero.
template <class Mma, class A, class B, class C>
__device__ inline void multiply_stage(Mma& mma, const A& a, const B& b, C& c) {
    using cute::_;
    cute::warpgroup_fence_operand(c);
    cute::warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(b); ++k) {
        cute::gemm(mma, a(_, _, k), b(_, _, k), c);
        mma.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
}

// Until at most so many stages' products are still under way.
template <int PENDING, class C>
__device__ inline void wait_for_products(C& c) {
    cute::warpgroup_wait<PENDING>();
    cute::warpgroup_fence_operand(c);
}

}  // namespace
}  // namespace sm90
}  // namespace ak
