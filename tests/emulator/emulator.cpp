// The emulated GPU; emulator.h says what it is and what it is not.
#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

// For the tests: what decides the order of events, whether launches are only checked, how many there were.
extern "C" {
__attribute__((visibility("default"))) unsigned emulator_seed = 0, emulator_only_checks = 0;
__attribute__((visibility("default"))) unsigned long long emulator_launches = 0;
__attribute__((visibility("default"))) unsigned emulator_threads = 0, emulator_shared = 0;  // of the last one's blocks
}

namespace emulator {
namespace {

constexpr size_t kStack = 96 << 10;
constexpr unsigned kWarp = 32, kGroup = 128;
constexpr uint32_t kFirstAddress = 1024;  // of shared memory: 0 is nobody's
constexpr unsigned kRegisters = 65536, kMostShared = 227 << 10, kSharedOfAny = 48 << 10, kMostThreads = 1024, kMostBlocks = 8;

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

// All of the cluster that runs.
Index grid, cluster, threads_of_block;
std::vector<std::unique_ptr<Block>> blocks;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<void*> stacks;
std::vector<Event> events;
Meeting everyone;
const std::function<void()>* call_kernel;
std::map<const void*, size_t> allowed;  // bytes of shared memory, of kernels that take more than any may
Thread* current;
jmp_buf scheduler;
std::mt19937 chance;
Haste haste[kKinds];
std::string error, last;
bool failed;

void to_scheduler() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void wait(Until until) {
    // Others come first now and then even where there is nothing to wait for.
    if (until.holds(until.of, until.value) && chance() % 8) return;
    current->until = until;
    to_scheduler();
}

void enter() {
    (*call_kernel)();
    current->done = true;
    _longjmp(scheduler, 1);
}

void meet(Meeting& meeting, unsigned expected, int vote = 0) {
    meeting.votes |= vote;
    const uint64_t mine = meeting.times;
    if (++meeting.arrived == expected) {
        meeting.result = meeting.votes, meeting.votes = 0, meeting.arrived = 0, ++meeting.times;
        return;
    }
    meeting.expected = expected;
    wait({[](const void* of, uint64_t value) { return static_cast<const Meeting*>(of)->times != value; }, &meeting, mine});
}

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

unsigned char* memory_at(Block& block, uint32_t address, size_t bytes) {
    if (address < kFirstAddress || address - kFirstAddress + bytes > block.size) fail("an access outside of shared memory");
    return block.memory + (address - kFirstAddress);
}

// Where element bytes of rows of 128 are, permuted as bulk copies and products have them.
uint32_t permuted(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

Block& peer(uint32_t rank) {
    if (rank >= blocks.size()) fail("there is no block %u in the cluster", rank);
    return *blocks[rank];
}

Warpgroup& group_of(const Thread& thread) { return thread.block->groups[thread.number / kGroup]; }

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

float half_to_float(uint16_t bits) {
    static const std::vector<float> all = [] {
        std::vector<float> values(1 << 16);
        for (uint32_t i = 0; i < values.size(); ++i) {
            const int exponent = i >> 10 & 31, fraction = i & 1023;
            float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + float(fraction), exponent - 25)
                                         : std::ldexp(float(fraction), -24);
            values[i] = i >> 15 ? -value : value;
        }
        return values;
    }();
    return all[bits];
}

float operand(const unsigned char* at, Operand type) {
    uint32_t bits = 0;
    float value;
    if (type == Operand::tfloat32) {
        memcpy(&bits, at, 4);
        bits &= 0xFFFFE000u;  // the tensor cores see no more
    } else {
        uint16_t half;
        memcpy(&half, at, 2);
        if (type == Operand::half) return half_to_float(half);
        bits = uint32_t(half) << 16;
    }
    memcpy(&value, &bits, 4);
    return value;
}

// rows x depth of an operand, as its descriptor says where they are.
void read_operand(Block& block, uint64_t descriptor, bool transposed, Operand type, int rows, int depth, float* to) {
    if (descriptor >> 62 != 1) fail("an operand's descriptor that does not say rows of 128 permuted bytes");
    const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4, leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4, bytes = type == Operand::tfloat32 ? 4 : 2;
    if (transposed && bytes != 2) fail("TF32 operands cannot be transposed");
    for (int i = 0; i < rows; ++i)
        for (int k = 0; k < depth; ++k) {
            const uint32_t at = transposed ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                                           : start + i / 8 * stride + i % 8 * 128 + k * bytes;
            to[i * depth + k] = operand(memory_at(block, permuted(at), bytes), type);
        }
}

// c[rows, columns] += a[rows, depth] b[depth, columns]: where the emulator spends its time.
#ifdef __x86_64__
__attribute__((optimize("O3"), target_clones("avx2", "default")))
#endif
void add_product(const float* a, const float* b, float* c, int rows, int columns, int depth) {
    for (int row = 0; row < rows; ++row)
        for (int k = 0; k < depth; ++k) {
            const float factor = a[row * depth + k];
            for (int column = 0; column < columns; ++column) c[row * columns + column] += factor * b[k * columns + column];
        }
}

void execute(Block& block, Warpgroup& group, size_t number) {
    const Product& p = group.products[number];
    constexpr int kMostColumns = 256, kMostDepth = 16, kRows = 64;
    static float a[kRows * kMostDepth], b[kMostColumns * kMostDepth], transposed[kMostDepth * kMostColumns];
    const int depth = p.type == Operand::tfloat32 ? 8 : 16;
    read_operand(block, p.a, p.a_transposed, p.type, kRows, depth, a);
    read_operand(block, p.b, p.b_transposed, p.type, p.columns, depth, b);
    for (int column = 0; column < p.columns; ++column)
        for (int k = 0; k < depth; ++k) transposed[k * p.columns + column] = b[column * depth + k];
    std::vector<float>& c = group.accumulators.at(group.registers[number * kGroup]);
    if (p.from_zero) std::fill(c.begin(), c.end(), 0.0f);
    add_product(a, transposed, c.data(), kRows, p.columns, depth);
}

// Element i of a thread's accumulators: the fragment's layout, in rows and columns of the product.
int place_of(unsigned thread, int i, int columns) {
    const int row = int(thread) / 32 * 16 + int(thread) % 32 / 4 + (i >> 1 & 1) * 8;
    return row * columns + i / 4 * 8 + int(thread) % 4 * 2 + (i & 1);
}

// All products are done: the accumulators are the threads' again.
void give_back(Warpgroup& group) {
    for (auto& [first, values] : group.accumulators)
        for (size_t number = 0; number < group.products.size(); ++number) {
            if (group.registers[number * kGroup] != first) continue;
            const int columns = group.products[number].columns;
            for (unsigned thread = 0; thread < kGroup; ++thread)
                for (int i = 0; i < columns / 2; ++i)
                    group.registers[number * kGroup + thread][i] = values[place_of(thread, i, columns)];
            break;
        }
    group.accumulators.clear();
}

bool ready(const Thread& thread) { return !thread.until.holds || thread.until.holds(thread.until.of, thread.until.value); }

void resume(Thread& thread) {
    current = &thread;
    thread.until = {};
    if (!_setjmp(scheduler)) {
        if (thread.started) _longjmp(thread.place, 1);
        thread.started = true;
        setcontext(&thread.context);
    }
    if (thread.done && !failed) {
        Warp& warp = thread.block->warps[thread.number / kWarp];
        --thread.block->alive;
        // Those that are left need not wait for it.
        if (--warp.alive && warp.meeting.arrived == warp.alive)
            warp.meeting.arrived = 0, warp.meeting.votes = 0, ++warp.meeting.times;
    }
    current = nullptr;
}

// Whether any of a warp's threads got further.
bool run(Block& block, unsigned warp) {
    bool moved = false;
    for (bool again = true; again && !failed;) {
        again = false;
        const unsigned end = std::min<unsigned>((warp + 1) * kWarp, unsigned(block.threads.size()));
        for (unsigned i = warp * kWarp; i < end && !failed; ++i)
            if (Thread& thread = *block.threads[i]; !thread.done && ready(thread)) resume(thread), again = moved = true;
    }
    return moved;
}

bool comes(Kind kind) {
    return haste[kind] == Haste::at_once || (haste[kind] == Haste::sometime && chance() % 4 == 0);
}

void happen(size_t event) {
    const std::function<void()> what = std::move(events[event].happen);
    events[event] = std::move(events.back());
    events.pop_back();
    what();
}

bool next_product(Block& block, Warpgroup& group) {
    if (group.done == group.products.size() || group.issued[group.done] != kGroup) return false;
    execute(block, group, group.done++);
    return true;
}

// What runs beside the threads. `late`: also what comes last, one of it.
bool run_beside(bool late) {
    bool moved = false;
    for (size_t i = 0; i < events.size() && !failed;)
        if (comes(events[i].kind))
            happen(i), moved = true;
        else
            ++i;
    for (auto& block : blocks)
        for (Warpgroup& group : block->groups)
            while (!failed && comes(kProducts) && next_product(*block, group)) moved = true;
    if (moved || !late || failed) return moved;
    std::vector<std::function<void()>> last;
    for (auto& block : blocks)
        for (Warpgroup& group : block->groups)
            if (group.done < group.products.size() && group.issued[group.done] == kGroup)
                last.push_back([&block = *block, &group] { next_product(block, group); });
    for (size_t i = 0; i < events.size(); ++i) last.push_back([i] { happen(i); });
    if (last.empty()) return false;
    last[chance() % last.size()]();
    return true;
}

bool beside(bool late) {
    if (_setjmp(scheduler)) return true;  // an event that failed ends here
    return run_beside(late);
}

std::string where_all_are() {
    unsigned waiting = 0;
    std::string text;
    for (auto& thread : threads)
        if (!thread->done && thread->number % kWarp == 0 && waiting++ < 8)
            text += " " + std::to_string(thread->block->rank) + "/" + std::to_string(thread->number / kWarp);
    return text;
}

void run_cluster() {
    std::vector<std::pair<Block*, unsigned>> warps;
    for (auto& block : blocks)
        for (unsigned warp = 0; warp < block->warps.size(); ++warp) warps.push_back({block.get(), warp});
    std::shuffle(warps.begin(), warps.end(), chance);
    while (!failed) {
        bool moved = false, left_out = false;
        for (auto& [block, warp] : warps) {
            if (int(chance() % 16) < block->warps[warp].laziness) {
                left_out = true;
                continue;
            }
            moved |= run(*block, warp);
        }
        moved |= beside(false);
        if (moved || failed) continue;
        if (left_out)
            for (auto& [block, warp] : warps) moved |= run(*block, warp);
        if (moved || failed) continue;
        if (beside(true)) continue;
        const bool done = std::all_of(threads.begin(), threads.end(), [](const auto& thread) { return thread->done; });
        if (done) return;
        error = "a deadlock: block/warp" + where_all_are() + " wait";
        failed = true;
    }
}

void prepare(ucontext_t& context, void* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
}

void start_block(Block& block, size_t& fiber) {
    for (unsigned i = 0; i < threads_of_block.x; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->block = &block, thread->number = i;
        if (fiber == stacks.size()) {
            void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED) abort();
            stacks.push_back(stack);
        }
        prepare(thread->context, stacks[fiber++]);
        block.threads.push_back(thread.get());
        threads.push_back(std::move(thread));
    }
}

// Each launch has an order of events of its own: what hurries, what dawdles, which warps and which block lag behind.
void draw(const Index& first) {
    std::seed_seq seeds{emulator_seed, unsigned(emulator_launches), first.x, first.y};
    chance.seed(seeds);
    for (Haste& each : haste) each = std::min(Haste(chance() % 4), Haste::last);  // half of the time as late as can be
}

void start_cluster(const Index& first, size_t shared) {
    draw(first);
    blocks.clear(), threads.clear(), events.clear();
    everyone = {};
    size_t fiber = 0;
    for (unsigned y = 0; y < cluster.y; ++y)
        for (unsigned x = 0; x < cluster.x; ++x) {
            auto block = std::make_unique<Block>();
            block->index = {first.x + x, first.y + y, 0};
            block->in_cluster = {x, y, 0};
            block->rank = x + y * cluster.x;
            block->alive = threads_of_block.x;
            block->size = (shared + 1023) / 1024 * 1024;
            if (shared) block->memory = static_cast<unsigned char*>(aligned_alloc(1024, block->size));
            if (shared) memset(block->memory, 0xFF, block->size);  // what is read before it is written is NaN
            block->warps.resize((threads_of_block.x + kWarp - 1) / kWarp);
            const int lag = int(chance() % 3) * 6;
            for (unsigned warp = 0; warp < block->warps.size(); ++warp) {
                block->warps[warp].alive = std::min(kWarp, threads_of_block.x - warp * kWarp);
                block->warps[warp].laziness = std::min(15, lag + int(chance() % 3) * 5);
            }
            const unsigned a_thread = kRegisters / threads_of_block.x / 8 * 8;
            block->groups.resize((threads_of_block.x + kGroup - 1) / kGroup);
            for (Warpgroup& group : block->groups) group.registers_held = a_thread;
            start_block(*block, fiber);
            blocks.push_back(std::move(block));
        }
}

void end_cluster() {
    if (!failed && !events.empty()) error = "copies are under way when all blocks are gone", failed = true;
    for (auto& block : blocks) {
        for (auto& [address, barrier] : block->barriers)
            if (!failed && barrier.bytes != 0) error = "an mbarrier still expects bytes when its block ends", failed = true;
        free(block->memory);
    }
    blocks.clear(), threads.clear(), events.clear();
}

// What CUDA's driver would say.
const char* refusal(const void* kernel, size_t shared) {
    const auto whole = [](unsigned side, unsigned of) { return of > 0 && side % of == 0; };
    if (!grid.x || !grid.y || grid.x > 2147483647u || grid.y > 65535 || grid.z != 1) return "invalid configuration argument";
    if (!threads_of_block.x || threads_of_block.x > kMostThreads || threads_of_block.y != 1 || threads_of_block.z != 1)
        return "invalid configuration argument: a block's threads";
    if (shared > kSharedOfAny && (!allowed.count(kernel) || shared > allowed[kernel]))
        return "invalid configuration argument: more shared memory than the kernel was allowed";
    if (!whole(grid.x, cluster.x) || !whole(grid.y, cluster.y) || cluster.z != 1) return "the grid is not of whole clusters";
    if (cluster.x * cluster.y > kMostBlocks) return "a cluster of too many blocks";
    return nullptr;
}

}  // namespace

void fail(const char* what, ...) {
    char text[200];
    va_list arguments;
    va_start(arguments, what);
    vsnprintf(text, sizeof(text), what, arguments);
    va_end(arguments);
    error = text;
    if (current) error += ": block " + std::to_string(current->block->rank) + ", thread " + std::to_string(current->number);
    failed = true;
    _longjmp(scheduler, 1);
}

void allow_shared(const void* kernel, size_t bytes) {
    if (bytes > kMostShared)
        error = "invalid argument: shared memory";
    else
        allowed[kernel] = bytes;
}

void launch(const void* kernel, Index grid_, Index cluster_, Index block, size_t shared, const std::function<void()>& call) {
    grid = grid_, cluster = cluster_, threads_of_block = block, call_kernel = &call;
    ++emulator_launches, emulator_threads = block.x, emulator_shared = unsigned(shared);
    failed = false;
    if (const char* refused = refusal(kernel, shared)) {
        error = refused;
        return;
    }
    for (unsigned y = 0; y < grid.y && !emulator_only_checks; y += cluster.y)
        for (unsigned x = 0; x < grid.x && !failed; x += cluster.x) {
            start_cluster({x, y, 0}, shared);
            run_cluster();
            end_cluster();
        }
    if (failed) error = "emulator: " + error;
}

Index thread_index() { return {current->number, 0, 0}; }
Index block_index() { return current->block->index; }
Index block_size() { return threads_of_block; }
Index grid_size() { return grid; }
Index index_in_cluster() { return current->block->in_cluster; }
Index cluster_size() { return cluster; }
unsigned rank_in_cluster() { return current->block->rank; }
unsigned char* dynamic_shared() { return current->block->memory; }

void exchange(const void* mine, size_t bytes, const unsigned char** all) {
    Warp& warp = current->block->warps[current->number / kWarp];
    unsigned char* slots = warp.slots[warp.meeting.times % 2];
    memcpy(slots + current->number % kWarp * 64, mine, bytes);
    *all = slots;
    meet(warp.meeting, warp.alive);
}

void sync_block() { meet(current->block->whole, unsigned(current->block->threads.size())); }

int sync_block_or(int vote) {
    Meeting& meeting = current->block->whole;
    meet(meeting, unsigned(current->block->threads.size()), vote != 0);
    return meeting.result;
}

void sync_some(unsigned count, unsigned barrier) {
    Meeting& meeting = current->block->named[barrier % 16];
    if (meeting.arrived && meeting.expected != count) fail("a named barrier of two numbers of threads");
    meet(meeting, count);
}

void sync_cluster() {
    if (current->initialized) fail("mbarriers that another block may not see initialized: no fence");
    meet(everyone, unsigned(threads.size()));
}

void copy_16(void* to, const void* from) {
    memset(to, 0xFF, 16);
    current->copies.back().push_back({to, from});
}

void commit_copies() { current->copies.emplace_back(); }

void wait_copies(int pending) {
    auto& groups = current->copies;
    for (; groups.size() > size_t(pending) + 1; groups.erase(groups.begin()))
        for (const Copy16& copy : groups.front()) copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
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

void product_fence() { current->products_fenced = true; }

void multiply(const Product& product, float* c) {
    if (!current->products_fenced) fail("products before wgmma.fence");
    Warpgroup& group = group_of(*current);
    const size_t number = current->products++;
    if (number == group.products.size()) {
        group.products.push_back(product);
        group.registers.resize(group.products.size() * kGroup);
        group.issued.push_back(0);
    }
    const Product& same = group.products[number];
    if (same.a != product.a || same.b != product.b || same.from_zero != product.from_zero)
        fail("the threads of a warpgroup differ in a product");
    const unsigned thread = current->number % kGroup;
    group.registers[number * kGroup + thread] = c;
    if (++group.issued[number] < kGroup) return;
    // The last of them: the accumulators are the tensor cores' now, unless they were already.
    auto [found, fresh] = group.accumulators.try_emplace(group.registers[number * kGroup]);
    if (!fresh) return;
    found->second.resize(size_t(64) * product.columns);
    for (unsigned i = 0; i < kGroup; ++i)
        for (int k = 0; k < product.columns / 2; ++k) {
            float& mine = group.registers[number * kGroup + i][k];
            found->second[place_of(i, k, product.columns)] = mine;
            mine = NAN;
        }
}

void product_commit() {
    current->product_groups.push_back(current->products);
    current->products_fenced = false;
}

void product_wait(int pending) {
    const auto& groups = current->product_groups;
    if (groups.size() <= size_t(pending)) return;
    Warpgroup& group = group_of(*current);
    wait({[](const void* of, uint64_t count) { return static_cast<const Warpgroup*>(of)->done >= count; }, &group,
          groups[groups.size() - 1 - pending]});
    if (pending == 0 && !group.accumulators.empty() && group.done == group.products.size()) give_back(group);
}

void give_registers(int count) {
    Warpgroup& group = group_of(*current);
    if (current->number % kGroup) return;
    if (count > group.registers_held) fail("a warpgroup gives up registers that it does not have");
    current->block->spare_registers += group.registers_held - count;
    group.registers_held = count;
}

void take_registers(int count) {
    Warpgroup& group = group_of(*current);
    if (current->number % kGroup) return;
    const int64_t more = count - group.registers_held;
    wait({[](const void* of, uint64_t wanted) { return static_cast<const Block*>(of)->spare_registers >= int64_t(wanted); },
          current->block, uint64_t(more)});
    current->block->spare_registers -= more;
    group.registers_held = count;
}

}  // namespace emulator

// CUDA's runtime: one GPU, number 0, of compute capability 9.0 with two multiprocessors.
extern "C" {

enum Result { kFine = 0, kInvalidDevice = 101, kFailed = 719 };

int cudaGetLastError() {
    if (emulator::error.empty()) return kFine;
    emulator::last.swap(emulator::error);  // there until there is another
    emulator::error.clear();
    return kFailed;
}
const char* cudaGetErrorString(int result) {
    return result == kFine ? "no error" : result == kInvalidDevice ? "invalid device ordinal" : emulator::last.c_str();
}
int cudaGetDevice(int* device) { return *device = 0, kFine; }
int cudaSetDevice(int device) { return device == 0 ? kFine : kInvalidDevice; }
int cudaDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 9 : 2, kFine; }

// cuTensorMapEncodeTiled, for matrices of rows that are permuted within 128 bytes.
static int encode(emulator::Map* map, int type, uint32_t rank, void* data, const uint64_t* size, const uint64_t* stride,
                  const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int, int) {
    constexpr int kFloat16 = 6, kFloat32 = 7, kBfloat16 = 9, kSwizzle128 = 3;
    const uint32_t element = type == kFloat32 ? 4 : 2;
    const bool types = type == kFloat16 || type == kFloat32 || type == kBfloat16;
    const bool places = uintptr_t(map) % 64 == 0 && uintptr_t(data) % 16 == 0 && stride[0] % 16 == 0 && !(stride[0] >> 40);
    const bool sizes = size[0] && size[1] && size[0] <= uint64_t(1) << 32 && size[1] <= uint64_t(1) << 32;
    const bool boxes = box[0] && box[1] && box[1] <= 256 && box[0] * element == 128 && step[0] == 1 && step[1] == 1;
    if (!types || rank != 2 || !places || !sizes || !boxes || stride[0] < size[0] * element || interleave || swizzle != kSwizzle128)
        return 1;
    *map = {static_cast<unsigned char*>(data), size[0], size[1], stride[0], element, box[0], box[1]};
    return 0;
}
int cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, int* found) {
    *function = reinterpret_cast<void*>(&encode), *found = 0;
    return kFine;
}
}
