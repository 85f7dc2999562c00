// CUTLASS on a CPU: its headers as they are, but for what they leave to the hardware. That has another name while they are
// read, and is the emulator's afterwards; CUTLASS's pipeline, which is read last, is then built upon it.
#pragma once

#include <cuda_runtime.h>
//
#include "emulator.h"

#define __DEVICE_LAUNCH_PARAMETERS_H__  // the emulator has threadIdx and the like
void __syncthreads();  // device.cuh has them
int __syncthreads_or(int);

#define NDEBUG  // else CUTLASS's device code asserts
// Where a thread is, which the rest of CUTLASS asks for.
#define cast_smem_ptr_to_uint hardware_cast_smem_ptr_to_uint
#define cluster_sync hardware_cluster_sync
#define cluster_shape hardware_cluster_shape
#define block_id_in_cluster hardware_block_id_in_cluster
#define block_rank_in_cluster hardware_block_rank_in_cluster
#define elect_one_sync hardware_elect_one_sync
#define store_shared_remote hardware_store_shared_remote
#define canonical_warp_idx_sync hardware_canonical_warp_idx_sync
#define canonical_warp_group_idx hardware_canonical_warp_group_idx
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/util.hpp>
#include <cutlass/cutlass.h>
#undef cast_smem_ptr_to_uint
#undef cluster_sync
#undef cluster_shape
#undef block_id_in_cluster
#undef block_rank_in_cluster
#undef elect_one_sync
#undef store_shared_remote
#undef canonical_warp_idx_sync
#undef canonical_warp_group_idx

namespace cute {

inline uint32_t cast_smem_ptr_to_uint(const void* pointer) { return emulator::shared_address(pointer); }
inline void cluster_sync() { emulator::sync_cluster(); }
inline dim3 cluster_shape() {
    const emulator::Index size = emulator::cluster_size();
    return dim3(size.x, size.y, size.z);
}
inline dim3 block_id_in_cluster() {
    const emulator::Index index = emulator::index_in_cluster();
    return dim3(index.x, index.y, index.z);
}
inline uint32_t block_rank_in_cluster() { return emulator::rank_in_cluster(); }
inline uint32_t elect_one_sync() { return threadIdx.x % 32 == 0; }
inline void store_shared_remote(uint32_t word, uint32_t to, uint32_t barrier, uint32_t block) {
    emulator::send_word(word, to, barrier, block);
}

}  // namespace cute

namespace cutlass {

inline int canonical_warp_idx_sync() { return int(threadIdx.x / 32); }
inline int canonical_warp_group_idx() { return int(threadIdx.x / 128); }

}  // namespace cutlass

// Barriers, bulk copies, products, registers.
#define SM90_TMA_LOAD_2D hardware_SM90_TMA_LOAD_2D
#define SM90_TMA_LOAD_MULTICAST_2D hardware_SM90_TMA_LOAD_MULTICAST_2D
#define SM90_TMA_STORE_2D hardware_SM90_TMA_STORE_2D
#define tma_store_fence hardware_tma_store_fence
#define tma_store_arrive hardware_tma_store_arrive
#define tma_store_wait hardware_tma_store_wait
#define prefetch_tma_descriptor hardware_prefetch_tma_descriptor
#define warpgroup_arrive hardware_warpgroup_arrive
#define warpgroup_commit_batch hardware_warpgroup_commit_batch
#define warpgroup_wait hardware_warpgroup_wait
#define ClusterBarrier hardware_ClusterBarrier
#define ClusterTransactionBarrier hardware_ClusterTransactionBarrier
#define NamedBarrier hardware_NamedBarrier
#define fence_barrier_init hardware_fence_barrier_init
#define warpgroup_reg_alloc hardware_warpgroup_reg_alloc
#define warpgroup_reg_dealloc hardware_warpgroup_reg_dealloc
#include <cute/tensor.hpp>
//
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#undef SM90_TMA_LOAD_2D
#undef SM90_TMA_LOAD_MULTICAST_2D
#undef SM90_TMA_STORE_2D
#undef tma_store_fence
#undef tma_store_arrive
#undef tma_store_wait
#undef prefetch_tma_descriptor
#undef warpgroup_arrive
#undef warpgroup_commit_batch
#undef warpgroup_wait
#undef ClusterBarrier
#undef ClusterTransactionBarrier
#undef NamedBarrier
#undef fence_barrier_init
#undef warpgroup_reg_alloc
#undef warpgroup_reg_dealloc

namespace cute {

struct SM90_TMA_LOAD_2D {
    static void copy(const void* map, uint64_t* barrier, uint64_t, void* to, int column, int row) {
        emulator::load_box(map, barrier, to, column, row);
    }
};
struct SM90_TMA_LOAD_MULTICAST_2D {
    static void copy(const void* map, uint64_t* barrier, uint16_t blocks, uint64_t, void* to, int column, int row) {
        emulator::load_box_for(blocks, map, barrier, to, column, row);
    }
};
struct SM90_TMA_STORE_2D {
    static void copy(const void* map, const void* from, int column, int row) {
        emulator::store_box(map, from, column, row);
    }
};
inline void tma_store_fence() { emulator::store_fence(); }
inline void tma_store_arrive() { emulator::store_commit(); }
template <int PENDING>
void tma_store_wait() {
    emulator::store_wait(PENDING);
}
inline void prefetch_tma_descriptor(const void*) {}

inline void warpgroup_arrive() { emulator::product_fence(); }
inline void warpgroup_commit_batch() { emulator::product_commit(); }
template <int PENDING>
void warpgroup_wait() {
    emulator::product_wait(PENDING);
}

namespace SM90::GMMA {

template <Major MAJOR>
constexpr bool is_transposed(smem_desc<MAJOR>) {
    return MAJOR == Major::MN;
}

// In the place of the instruction, where both operands are descriptors: chosen before CUTLASS's, which takes any.
template <class Op, class... Args, class D, class DLayout, class ALayout, class BLayout, class C, class CLayout>
void mma_unpack(const MMA_Traits<Op, Args...>& traits, Tensor<D, DLayout>& d,
                const Tensor<ViewEngine<DescriptorIterator>, ALayout>& a,
                const Tensor<ViewEngine<DescriptorIterator>, BLayout>& b, const Tensor<C, CLayout>&) {
    using Traits = MMA_Traits<Op, Args...>;
    using Type = typename Traits::ValTypeA;
    constexpr int kColumns = size<1>(typename Traits::Shape_MNK{}), kDepth = size<2>(typename Traits::Shape_MNK{});
    static_assert(size<0>(typename Traits::Shape_MNK{}) == 64 && kDepth * sizeof(Type) == 32);
    static_assert(std::is_same_v<Type, typename Traits::ValTypeB> && cosize_v<DLayout> == kColumns / 2);
    constexpr auto type = sizeof(Type) == 4                ? emulator::Operand::tfloat32
                          : std::is_same_v<Type, half_t> ? emulator::Operand::half
                                                           : emulator::Operand::bfloat16;
    emulator::multiply({a(0).desc_, b(0).desc_, kColumns, type, is_transposed(typename Traits::FrgTypeA{}),
                        is_transposed(typename Traits::FrgTypeB{}), traits.accumulate_ == ScaleOut::Zero},
                       &d(0));
}

}  // namespace SM90::GMMA
}  // namespace cute

namespace cutlass {

namespace arch {

// Only what the pipeline and the kernels call: anything else does not compile.
struct ClusterBarrier {
    using ValueType = uint64_t;

    void init(uint32_t arrivals) const { emulator::barrier_init(this, arrivals); }
    void wait(uint32_t parity) const { emulator::barrier_wait(this, parity); }
    bool try_wait(uint32_t parity) const { return emulator::barrier_passed(this, parity); }
    bool test_wait(uint32_t parity, uint32_t = 1) const { return emulator::barrier_passed(this, parity); }
    void arrive() const { emulator::barrier_arrive(this); }
    void arrive(uint32_t block, uint32_t predicate = 1) const {
        if (predicate) emulator::barrier_arrive_at(this, block);
    }

    ValueType barrier_;
};

struct ClusterTransactionBarrier : ClusterBarrier {
    void arrive_and_expect_tx(uint32_t bytes) const { emulator::barrier_arrive_and_expect(this, bytes); }
    void expect_transaction(uint32_t) const;  // of pipelines that are not used here
};

struct NamedBarrier {
    static void sync(uint32_t threads, uint32_t barrier) {
        emulator::sync_some(threads, barrier + uint32_t(ReservedNamedBarriers::FirstUserBarrier));
    }
};

inline void fence_barrier_init() { emulator::barrier_init_fence(); }
template <uint32_t COUNT>
void warpgroup_reg_alloc() {
    emulator::take_registers(int(COUNT));
}
template <uint32_t COUNT>
void warpgroup_reg_dealloc() {
    emulator::give_registers(int(COUNT));
}

}  // namespace arch
}  // namespace cutlass

#include <cutlass/pipeline/sm90_pipeline.hpp>

#define __CUDA_ARCH_FEAT_SM90_ALL  // the kernels' bodies, and none of CUTLASS's instructions
