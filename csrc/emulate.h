// A GPU's threads on one CPU thread: each is a fiber that runs to its next barrier. For tests: slow, and exact.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

// A machine of one GPU, number 0.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaSuccess) return "no error";
    return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid configuration argument";
}

namespace emulate {
inline cudaError_t last_error = cudaSuccess;
}
// Launches that were checked and not run.
extern "C" {
__attribute__((visibility("default"), weak)) unsigned long long ak_launches = 0;
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = emulate::last_error;
    emulate::last_error = cudaSuccess;
    return error;
}

namespace emulate {

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Copy {
    void* to;
    const void* from;  // null: zeros
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::ready;
    dim3 index;
    std::vector<std::vector<Copy>> copies;  // under way: a group for each commit, the last one still open
};

struct Warp {
    alignas(16) unsigned char exchange[32][64];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline dim3 grid, block, block_index;
inline std::vector<unsigned char> dynamic_shared;
inline const std::function<void()>* body;
inline int votes;

inline void wait(State state) {
    threads[current].state = state;
    swapcontext(&threads[current].context, &scheduler);
}

inline void enter() {
    (*body)();
    wait(State::done);
}

inline void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s\n", what);
    std::abort();
}

inline void run_block(unsigned count) {
    constexpr size_t stack_size = 256 << 10;
    if (threads.size() < count) threads.resize(count);
    warps.resize((count + 31) / 32);
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        if (!thread.stack) thread.stack.reset(new char[stack_size]);
        thread.state = State::ready;
        thread.copies.assign(1, {});
        thread.index = dim3(i % block.x, i / block.x, 0);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = stack_size;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, reinterpret_cast<void (*)()>(enter), 0);
    }
    for (;;) {
        for (unsigned first = 0; first < count; first += 32) {
            unsigned end = first + 32 < count ? first + 32 : count;
            for (;;) {
                for (current = first; current < end; ++current)
                    if (threads[current].state == State::ready) swapcontext(&scheduler, &threads[current].context);
                unsigned waiting = 0, alive = 0;
                for (unsigned i = first; i < end; ++i) {
                    waiting += threads[i].state == State::at_warp_barrier;
                    alive += threads[i].state != State::done;
                }
                if (waiting == 0) break;
                if (waiting != alive) fail("a warp's threads wait for one another at different places");
                for (unsigned i = first; i < end; ++i)
                    if (threads[i].state == State::at_warp_barrier) threads[i].state = State::ready;
            }
        }
        unsigned done = 0, waiting = 0;
        for (unsigned i = 0; i < count; ++i) {
            done += threads[i].state == State::done;
            waiting += threads[i].state == State::at_block_barrier;
        }
        if (done == count) return;
        if (waiting + done != count || done != 0) fail("__syncthreads is not reached by every thread of a block");
        for (unsigned i = 0; i < count; ++i) threads[i].state = State::ready;
    }
}

inline void launch(dim3 grid_, dim3 block_, size_t shared, const std::function<void()>& function) {
    grid = grid_, block = block_, body = &function;
    // Poisoned: what is read before it is written shows.
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            dynamic_shared.assign(shared + 128, 0xFF);
            block_index = dim3(x, y, 0);
            run_block(block.x);
        }
}

// What a GPU of 227 KiB of shared memory a block takes.
inline void check(dim3 grid_, dim3 block_, size_t shared, const std::function<void()>&) {
    ++ak_launches;
    const bool sides = grid_.x > 0 && grid_.x < 1u << 31 && grid_.y > 0 && grid_.y < 1u << 16;
    if (!sides || block_.x == 0 || block_.x > 1024 || shared > 227 << 10) last_error = cudaErrorInvalidConfiguration;
}

inline unsigned char* shared_memory() {
    auto address = reinterpret_cast<uintptr_t>(dynamic_shared.data());
    return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

// What every lane of a warp gives, to be read by all until the next call.
template <class T>
inline const Warp& exchange(const T& value) {
    static_assert(sizeof(T) <= 64);
    Warp& warp = warps[current / 32];
    wait(State::at_warp_barrier);  // all have read what was there
    memcpy(warp.exchange[current % 32], &value, sizeof(T));
    wait(State::at_warp_barrier);
    return warp;
}

template <class T>
inline T from_lane(const Warp& warp, unsigned lane) {
    T value;
    memcpy(&value, warp.exchange[lane], sizeof(T));
    return value;
}

}  // namespace emulate

#define threadIdx (emulate::threads[emulate::current].index)
#define blockIdx (emulate::block_index)
#define blockDim (emulate::block)
#define gridDim (emulate::grid)
#ifdef AK_CHECK_LAUNCHES  // as the driver would, and nothing runs
#define AK_LAUNCH(kernel, grid, block, shared, stream, ...) \
    emulate::check(grid, block, shared, [&] { kernel(__VA_ARGS__); })
#else
#define AK_LAUNCH(kernel, grid, block, shared, stream, ...) \
    emulate::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })
#endif
#define AK_DYNAMIC_SHARED(name) unsigned char* name = emulate::shared_memory()

inline void __syncthreads() { emulate::wait(emulate::State::at_block_barrier); }

inline int __syncthreads_or(int predicate) {
    __syncthreads();
    emulate::votes = 0;
    __syncthreads();
    emulate::votes |= predicate != 0;
    __syncthreads();
    return emulate::votes;
}

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulate::from_lane<T>(emulate::exchange(value), (emulate::current % 32) ^ mask);
}

namespace ak {

inline float exp2_fast(float x) { return std::exp2(x); }

// Sixteen bytes from global to shared memory, zeros if not `inside`: there once their group has been waited for, as late as
// can be. Until then poison is: what is read too early shows.
inline void copy_async(void* shared, const void* global, bool inside) {
    memset(shared, 0xFF, 16);
    emulate::threads[emulate::current].copies.back().push_back({shared, inside ? global : nullptr});
}
inline void commit_copies() { emulate::threads[emulate::current].copies.push_back({}); }
template <int PENDING>
inline void wait_copies() {
    auto& groups = emulate::threads[emulate::current].copies;
    for (; groups.size() > PENDING + 1; groups.erase(groups.begin()))
        for (const emulate::Copy& copy : groups.front()) {
            if (copy.from)
                memcpy(copy.to, copy.from, 16);
            else
                memset(copy.to, 0, 16);
        }
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
    const emulate::Warp& warp = emulate::exchange(row);
    const unsigned lane = emulate::current % 32;
    for (unsigned i = 0; i < 4; ++i) {
        auto address = emulate::from_lane<const unsigned char*>(warp, i * 8 + lane / 4);
        memcpy(&to[i], address + lane % 4 * 4, 4);
    }
}

struct Operands {
    uint32_t a[4], b[2];
};

}  // namespace ak
