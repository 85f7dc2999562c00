// What the emulator's parts share: the cluster that runs, its blocks and threads, and what is under way beside them.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr unsigned kWarp = 32, kGroup = 128;
constexpr uint32_t kFirstAddress = 1024;  // of shared memory: 0 is nobody's

// A condition that a thread waits for.
struct Until {
    bool (*holds)(const void* of, uint64_t value) = nullptr;
    const void* of = nullptr;
    uint64_t value = 0;
};

// Threads that wait for one another.
struct Meeting {
    unsigned arrived = 0, expected = 0;
    uint64_t times = 0;
    int votes = 0, result = 0;
};

struct Barrier {
    uint32_t arrivals = 0;
    int pending = 0;
    int64_t bytes = 0;  // expected, not there yet
    uint64_t phase = 0;
};

struct Copy16 {
    void* to;
    const void* from;
};

struct Store {
    int group;
    bool read = false;
};

struct Block;

struct Thread {
    Block* block;
    unsigned number;
    ucontext_t context;
    jmp_buf place;
    bool started = false, done = false;
    Until until;
    bool initialized = false;              // barriers, not fenced yet
    bool fenced = false;                   // its writes, for the next box of its warpgroup
    bool products_fenced = false;
    std::vector<std::vector<Copy16>> copies{1};
    std::vector<std::shared_ptr<Store>> stores;
    int store_group = 0;
    size_t products = 0;                   // issued by this thread
    std::vector<size_t> product_groups;    // how many were issued when each was committed
};

// Products of a warpgroup. Its accumulators are here while any of them is under way.
struct Warpgroup {
    std::vector<Product> products;
    std::vector<float*> registers;  // a thread's, of each product: 128 of them
    std::vector<unsigned> issued;   // by how many threads
    size_t done = 0;
    std::map<const float*, std::vector<float>> accumulators;  // by the first thread's
    int64_t registers_held = 0;
};

struct Warp {
    Meeting meeting;
    unsigned alive = 0;
    alignas(16) unsigned char slots[2][kWarp * 64];
    int laziness = 0;  // of 16 turns that it does not take
};

struct Block {
    Index index, in_cluster;
    unsigned rank = 0, alive = 0;
    unsigned char* memory = nullptr;
    size_t size = 0;
    std::vector<Thread*> threads;
    std::vector<Warp> warps;
    std::vector<Warpgroup> groups;
    Meeting whole, named[16];
    std::map<uint32_t, Barrier> barriers;
    int64_t spare_registers = 0;
};

enum Kind { kLoads, kStores, kSums, kProducts, kKinds };
enum class Haste { at_once, sometime, last };

struct Event {
    Kind kind;
    std::function<void()> happen;
};

extern std::vector<std::unique_ptr<Block>> blocks;  // of the cluster
extern std::vector<Event> events;                   // copies and sums under way
extern Thread* current;
extern std::string error, last;  // of the launch that runs, and what CUDA's runtime has told

// The current thread waits; others come first now and then even where there is nothing to wait for.
void wait(Until until);
Block& peer(uint32_t rank);
unsigned char* memory_at(Block& block, uint32_t address, size_t bytes);
// Where an element of rows of 128 bytes is, permuted as bulk copies and products have them.
inline uint32_t permuted(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
Warpgroup& group_of(const Thread& thread);
// The next of a warpgroup's products, if all of its threads have issued it; whether it was there.
bool has_product(const Warpgroup& group);
void execute_product(Block& block, Warpgroup& group);

}  // namespace emulator
