// A GPU on one CPU thread, for tests: csrc runs as it stands, with device.cuh of this folder in the place of its own.
//
// Each GPU thread is a fiber. A grid's clusters run one after the other, the blocks of a cluster at once, warp by warp in an
// order that the seed decides. What a GPU does beside its threads ends when the seed has it end, as early or as late as the
// rules allow: bulk copies and their stores, warpgroups' products, sums sent to another block. Until then its destination
// holds NaN: shared memory that a copy is to fill, registers that products are to add to.
//
// An error of the launch, in words: a deadlock; an mbarrier that is not initialized, or gets too many arrivals or a wrong
// number of bytes; anything for a block that is gone; products, copies or matrices described wrongly; a box that is sent
// before its writers' fence; barriers that threads pass before another block can have seen them; more registers than there
// are; a launch that the driver would refuse.
//
// Not modelled: the order in which other threads see writes to memory (what acquire and release give, and their scope);
// which writes a proxy's fence makes visible, beyond that there was one; the registers' side of wgmma.fence; whether an
// instruction's threads have converged; clusters of a grid beside one another; caches, prefetches and banks; the compiler's use
// of registers; time. The machine code's tests look at some of it. Nor are a thread's own loads and stores checked: one outside
// of its array reads or writes what is there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
    unsigned x = 1, y = 1, z = 1;
};

// Runs a grid; what is wrong is CUDA's last error. `kernel`: its address, by which it is allowed more shared memory.
void launch(const void* kernel, Index grid, Index cluster, Index block, size_t shared, const std::function<void()>& call);
void allow_shared(const void* kernel, size_t bytes);
[[noreturn]] void fail(const char* what, ...);

// Where the current thread is.
Index thread_index(), block_index(), block_size(), grid_size(), index_in_cluster(), cluster_size();
unsigned rank_in_cluster();
unsigned char* dynamic_shared();

// Its warp and its block.
void exchange(const void* mine, size_t bytes, const unsigned char** all);  // 64 bytes a lane, until the next exchange
void sync_block();
int sync_block_or(int vote);
void sync_some(unsigned threads, unsigned barrier);  // a named barrier
void sync_cluster();

// Copies of 16 bytes by threads (cp.async): there once waited for. `from` null: zeros.
void copy_16(void* to, const void* from);
void commit_copies();
void wait_copies(int pending);

// mbarriers, by their place in shared memory.
uint32_t shared_address(const void* pointer);
void barrier_init(const void* barrier, uint32_t arrivals);
void barrier_init_fence();
bool barrier_passed(const void* barrier, uint32_t parity);
void barrier_wait(const void* barrier, uint32_t parity);
void barrier_arrive(const void* barrier);
void barrier_arrive_at(const void* barrier, uint32_t block);
void barrier_arrive_and_expect(const void* barrier, uint32_t bytes);
void send_word(uint32_t word, uint32_t to, uint32_t barrier, uint32_t block);  // st.async

// Bulk copies of boxes of a matrix.
struct Map {
    unsigned char* data;
    uint64_t columns, rows, stride;  // stride in bytes
    uint32_t element, box_columns, box_rows;
};
void load_box(const void* map, const void* barrier, void* to, int column, int row);
void load_box_for(uint32_t blocks, const void* map, const void* barrier, void* to, int column, int row);  // a mask
void store_box(const void* map, const void* from, int column, int row);
void store_fence();
void store_commit();
void store_wait(int pending);

// A warpgroup's products, m64nNk of 32 bytes: c += a b.
enum class Operand { half, bfloat16, tfloat32 };
struct Product {
    uint64_t a, b;  // descriptors
    int columns;    // N
    Operand type;
    bool a_transposed, b_transposed, from_zero;
};
void product_fence();
void multiply(const Product& product, float* c);  // this thread's N/2 numbers
void product_commit();
void product_wait(int pending);

void take_registers(int count);  // setmaxnreg
void give_registers(int count);

}  // namespace emulator

// CUDA's built-in variables, whose sides are asked for when they are read.
struct Side {
    unsigned (*of)();
    operator unsigned() const { return of(); }
};
struct Sides {
    Side x, y;
};
inline constexpr Sides threadIdx = {{[] { return emulator::thread_index().x; }}, {[] { return emulator::thread_index().y; }}};
inline constexpr Sides blockIdx = {{[] { return emulator::block_index().x; }}, {[] { return emulator::block_index().y; }}};
inline constexpr Sides blockDim = {{[] { return emulator::block_size().x; }}, {[] { return emulator::block_size().y; }}};
inline constexpr Sides gridDim = {{[] { return emulator::grid_size().x; }}, {[] { return emulator::grid_size().y; }}};
