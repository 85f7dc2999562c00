// Threads of a cluster as fibers, the order in which they run and in which what is under way ends, and launches.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// For the tests: what decides the order of events, whether launches are only checked, how many there were.
extern "C" {
__attribute__((visibility("default"))) unsigned emulator_seed = 0, emulator_only_checks = 0;
__attribute__((visibility("default"))) unsigned long long emulator_launches = 0;
__attribute__((visibility("default"))) unsigned emulator_threads = 0, emulator_shared = 0;  // of the last one's blocks
}

namespace emulator {

std::vector<std::unique_ptr<Block>> blocks;
std::vector<Event> events;
Thread* current;
std::string error, last;

namespace {

constexpr size_t kStack = 96 << 10;
constexpr unsigned kRegisters = 65536, kMostShared = 227 << 10, kSharedOfAny = 48 << 10, kMostThreads = 1024, kMostBlocks = 8;

Index grid, cluster, threads_of_block;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<void*> stacks;
Meeting everyone;
const std::function<void()>* call_kernel;
std::map<const void*, size_t> allowed;  // bytes of shared memory, of kernels that take more than any may
jmp_buf scheduler;
std::mt19937 chance;
Haste haste[kKinds];
bool failed;

void to_scheduler() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
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
            while (!failed && comes(kProducts) && has_product(group)) execute_product(*block, group), moved = true;
    if (moved || !late || failed) return moved;
    std::vector<std::function<void()>> late_ones;
    for (auto& block : blocks)
        for (Warpgroup& group : block->groups)
            if (has_product(group)) late_ones.push_back([&block = *block, &group] { execute_product(block, group); });
    for (size_t i = 0; i < events.size(); ++i) late_ones.push_back([i] { happen(i); });
    if (late_ones.empty()) return false;
    late_ones[chance() % late_ones.size()]();
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

void wait(Until until) {
    if (until.holds(until.of, until.value) && chance() % 8) return;
    current->until = until;
    to_scheduler();
}

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

}  // namespace emulator
