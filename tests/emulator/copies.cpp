// mbarriers by their arrivals and bytes, bulk copies and stores of boxes, numbers sent to another block.
#include "machine.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

void settle(Barrier& barrier) {
    if (barrier.pending < 0) fail("an mbarrier gets more arrivals than it counts");
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = int(barrier.arrivals), ++barrier.phase;
}

Barrier& barrier_of(Block& block, uint32_t address) {
    if (!block.alive) fail("an mbarrier of a block that is gone");
    const auto found = block.barriers.find(address);
    if (found == block.barriers.end()) fail("an mbarrier that is not initialized");
    return found->second;
}

void complete(Block& block, uint32_t address, int64_t bytes) {
    Barrier& barrier = barrier_of(block, address);
    barrier.bytes -= bytes;
    settle(barrier);
}

void load_into(Block& block, const Map& map, uint32_t barrier, uint32_t to, int column, int row) {
    if (!block.alive) fail("a bulk copy to a block that is gone");
    const uint32_t bytes = map.box_columns * map.element * map.box_rows;
    memset(memory_at(block, to, bytes), 0xFF, bytes);
    events.push_back({kLoads, [&block, map, barrier, to, column, row, bytes] {
        if (!block.alive) fail("a bulk copy to a block that is gone");
        for (uint32_t r = 0; r < map.box_rows; ++r)
            for (uint32_t c = 0; c < map.box_columns * map.element; c += map.element) {
                const int64_t at_row = row + int64_t(r), at_column = column + int64_t(c / map.element);
                unsigned char* element = memory_at(block, permuted(to + r * 128 + c), map.element);
                if (at_row >= 0 && uint64_t(at_row) < map.rows && at_column >= 0 && uint64_t(at_column) < map.columns)
                    memcpy(element, map.data + at_row * map.stride + at_column * map.element, map.element);
                else
                    memset(element, 0, map.element);
            }
        complete(block, barrier, bytes);
    }});
}

}  // namespace

unsigned char* memory_at(Block& block, uint32_t address, size_t bytes) {
    if (address < kFirstAddress || address - kFirstAddress + bytes > block.size) fail("an access outside of shared memory");
    return block.memory + (address - kFirstAddress);
}

Block& peer(uint32_t rank) {
    if (rank >= blocks.size()) fail("there is no block %u in the cluster", rank);
    return *blocks[rank];
}

uint32_t shared_address(const void* pointer) {
    const auto offset = static_cast<const unsigned char*>(pointer) - current->block->memory;
    if (offset < 0 || size_t(offset) >= current->block->size) fail("an address that is not in the block's shared memory");
    return uint32_t(offset) + kFirstAddress;
}

void barrier_init(const void* barrier, uint32_t arrivals) {
    const bool made = current->block->barriers.emplace(shared_address(barrier), Barrier{arrivals, int(arrivals)}).second;
    if (!made) fail("an mbarrier initialized twice");
    current->initialized = true;
}

void barrier_init_fence() { current->initialized = false; }

bool barrier_passed(const void* barrier, uint32_t parity) {
    return (barrier_of(*current->block, shared_address(barrier)).phase & 1) != parity;
}

void barrier_wait(const void* barrier, uint32_t parity) {
    const Barrier& of = barrier_of(*current->block, shared_address(barrier));
    wait({[](const void* at, uint64_t value) { return (static_cast<const Barrier*>(at)->phase & 1) != value; }, &of, parity});
}

void barrier_arrive(const void* barrier) { barrier_arrive_at(barrier, current->block->rank); }

void barrier_arrive_at(const void* barrier, uint32_t block) {
    Barrier& at = barrier_of(peer(block), shared_address(barrier));
    --at.pending;
    settle(at);
}

void barrier_arrive_and_expect(const void* barrier, uint32_t bytes) {
    Barrier& at = barrier_of(*current->block, shared_address(barrier));
    at.bytes += bytes, --at.pending;
    settle(at);
}

void send_word(uint32_t word, uint32_t to, uint32_t barrier, uint32_t block) {
    Block& other = peer(block);
    if (!other.alive) fail("a number sent to a block that is gone");
    memory_at(other, to, 4);
    events.push_back({kSums, [&other, word, to, barrier] {
        if (!other.alive) fail("a number sent to a block that is gone");
        memcpy(memory_at(other, to, 4), &word, 4);
        complete(other, barrier, 4);
    }});
}

void load_box(const void* map, const void* barrier, void* to, int column, int row) {
    load_box_for(1u << current->block->rank, map, barrier, to, column, row);
}

void load_box_for(uint32_t mask, const void* map, const void* barrier, void* to, int column, int row) {
    Map matrix;
    memcpy(&matrix, map, sizeof(matrix));
    const uint32_t address = shared_address(to), at = shared_address(barrier);
    if (address % 1024) fail("a box that does not start where its rows' permutation does");
    if (!mask || mask >> blocks.size()) fail("a bulk copy for blocks %x of a cluster of %u", mask, unsigned(blocks.size()));
    for (auto& block : blocks)
        if (mask >> block->rank & 1) load_into(*block, matrix, at, address, column, row);
}

void store_box(const void* map, const void* from, int column, int row) {
    Map matrix;
    memcpy(&matrix, map, sizeof(matrix));
    Block& block = *current->block;
    const uint32_t address = shared_address(from);
    if (address % 1024) fail("a box that does not start where its rows' permutation does");
    for (Thread* thread : block.threads) {
        if (thread->number / kGroup != current->number / kGroup) continue;
        if (!thread->fenced) fail("a box is sent, and what thread %u wrote into it is not fenced", thread->number);
        thread->fenced = false;
    }
    auto store = std::make_shared<Store>(Store{current->store_group});
    current->stores.push_back(store);
    events.push_back({kStores, [&block, matrix, address, column, row, store] {
        if (!block.alive) fail("a box is read after its block is gone");
        for (uint32_t r = 0; r < matrix.box_rows; ++r)
            for (uint32_t c = 0; c < matrix.box_columns; ++c) {
                const int64_t at_row = row + int64_t(r), at_column = column + int64_t(c);
                if (at_row < 0 || uint64_t(at_row) >= matrix.rows || at_column < 0 || uint64_t(at_column) >= matrix.columns)
                    continue;
                memcpy(matrix.data + at_row * matrix.stride + at_column * matrix.element,
                       memory_at(block, permuted(address + r * 128 + c * matrix.element), matrix.element), matrix.element);
            }
        store->read = true;
    }});
}

void store_fence() { current->fenced = true; }
void store_commit() { ++current->store_group; }

void store_wait(int pending) {
    wait({[](const void* of, uint64_t groups) {
        const auto& stores = static_cast<const Thread*>(of)->stores;
        return std::all_of(stores.begin(), stores.end(),
                           [&](const auto& store) { return store->read || store->group >= int64_t(groups); });
    }, current, uint64_t(std::max(0, current->store_group - pending))});
}

}  // namespace emulator
