// Hopper's loops (schedule_sm90.h) on a CPU: a cluster's blocks of three roles as fibers, barriers as the hardware counts them,
// copies and products that end whenever chance has it. Says what is wrong: a deadlock, a stage overwritten or read too early, a
// turn out of order, a block that others still need gone.
//
// Of the cosine kernel the blocks lie beside one another and share ŵ; x̂ is their own. Of the gradient kernel they share E
// beside and a∘x̂ below, both warpgroups of a block take every stage, and the two halves of a row send one another a sum.
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "schedule_sm90.h"

namespace {

using ak::sm90::Turn;

enum Fault { kNone, kNoTail, kNoWaitForProducts, kReleaseToOneBlock, kNoTurns, kNoWaitForX, kOnePlace };

constexpr int kPieces = 4, kGroups = 2, kMostBlocks = 8;

struct Barrier {
    int count = 1, pending = 1, transactions = 0, phase = 0;

    void settle() {
        if (pending == 0 && transactions == 0) ++phase, pending = count;
    }
    void arrive() { --pending, settle(); }
    void expect(int n) { transactions += n; }
    void complete(int n) { transactions -= n, settle(); }
    bool passed(int parity) const { return (phase & 1) != parity; }
};

struct Contents {
    int tile = -1, step = -1;
    bool operator==(const Contents& other) const { return tile == other.tile && step == other.step; }
};

struct Block {
    std::vector<Barrier> full, empty, x_arrived;
    Barrier order[kGroups], sent[kGroups][2];
    std::vector<Contents> w[2];        // halves of a stage of what is shared beside
    std::vector<Contents> x[kPieces];  // pieces of the other, by stage or by step
    std::vector<int> readers;          // products under way, by stage
    Contents place[kGroups][2][2];     // what the other half has sent, in two parts
    int running = 3, next_tile = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    std::function<void()> body;
    std::function<bool()> until;
    bool done = false;
};

struct World {
    int halves, shares, stages, steps;
    bool stays;
    Fault fault;
    Turn turn;
    std::mt19937 chance;
    Block blocks[kMostBlocks];
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::function<void()>> under_way;  // copies and products that may end at any time
    std::string wrong;
    ucontext_t scheduler;
    Fiber* current = nullptr;

    void fail(const std::string& what) {
        if (wrong.empty()) wrong = what;
    }
    void wait(std::function<bool()> until) {
        current->until = std::move(until);
        swapcontext(&current->context, &scheduler);
    }
    // Others run now and then where nothing has to be waited for, too.
    void pause() {
        if (chance() % 4 == 0) wait([] { return true; });
    }
    int cluster() const { return halves * shares; }
    bool together() const { return shares > 1; }  // no turns
    int parts() const { return together() ? 1 : kGroups; }
    int pieces() const { return together() ? kPieces : 1; }
    Block& alive(int block) {
        if (blocks[block].running == 0) fail("a block that is gone is written or signalled");
        return blocks[block];
    }
};

World* world;

void enter() {
    world->current->body();
    world->current->done = true;
    swapcontext(&world->current->context, &world->scheduler);
}

struct State {
    int n = 0, stages = 1, producer = 0;
    int index() const { return n % stages; }
    int phase() const { return (n / stages & 1) ^ producer; }
    void advance(int k) { n += k; }
    State& operator++() { return ++n, *this; }
};

struct Pipeline {
    int block;

    void producer_acquire(const State& s) {
        Block& mine = world->blocks[block];
        world->wait([&mine, s] { return mine.empty[s.index()].passed(s.phase()); });
        mine.full[s.index()].expect(world->stays ? 2 : 2 + world->pieces());
        mine.full[s.index()].arrive();
        world->pause();
    }
    void producer_tail(State s) {
        if (world->fault == kNoTail) return;
        Block& mine = world->blocks[block];
        for (int i = 0; i < world->stages; ++i, ++s) world->wait([&mine, s] { return mine.empty[s.index()].passed(s.phase()); });
    }
    void consumer_wait(const State& s) {
        Block& mine = world->blocks[block];
        world->wait([&mine, s] { return mine.full[s.index()].passed(s.phase()); });
    }
    void consumer_release(const State& s) {
        const bool one = world->fault == kReleaseToOneBlock;
        const int half = block % world->halves, share = block / world->halves;
        for (int to = 0; to < world->cluster(); ++to)
            if (to == block || (!one && (to % world->halves == half || to / world->halves == share)))
                world->alive(to).empty[s.index()].arrive();
        world->pause();
    }
};

// What a bulk copy does to its place: not to be read from now on, there once it has ended.
void copy(std::vector<Contents>& place, int block, int at, int stage, Contents contents, std::function<void()> signal) {
    world->alive(block);
    auto& where = place[at];
    if (stage >= 0 && world->blocks[block].readers[stage]) world->fail("a copy into a stage that products still read");
    where = {};
    world->under_way.push_back([&where, contents, block, stage, signal] {
        world->alive(block);
        if (stage >= 0 && world->blocks[block].readers[stage]) world->fail("a copy into a stage that products read");
        where = contents;
        signal();
    });
}

struct Copies {
    int block;

    void once(int step) const {
        if (!world->stays) return;
        Barrier& arrived = world->blocks[block].x_arrived[step];
        arrived.expect(1), arrived.arrive();
        copy(world->blocks[block].x[0], block, step, -1, {-1, step}, [&arrived] { arrived.complete(1); });
    }
    void each(const State& s, int first_class, int step) const {
        const int stage = s.index();
        const Contents contents = {first_class, step};
        const int half = block % world->halves, share = block / world->halves;
        const auto load = [stage](std::vector<Contents>& place, int to, Contents what) {
            copy(place, to, stage, stage, what, [to, stage] { world->alive(to).full[stage].complete(1); });
        };
        for (int piece = share; !world->stays && piece < world->pieces(); piece += world->shares)
            for (int s = 0; s < world->shares; ++s) {
                const int to = half + s * world->halves;
                load(world->blocks[to].x[piece], to, {-1, step});
            }
        for (int piece = half; piece < 2; piece += world->halves)
            for (int h = 0; h < world->halves; ++h) {
                const int to = h + share * world->halves;
                load(world->blocks[to].w[piece], to, contents);
            }
        world->pause();
    }
};

struct Order {
    int block, group, turns = 0;

    void wait() {
        Barrier& mine = world->blocks[block].order[group];
        const int parity = (turns & 1) ^ (group == 0);
        if (world->fault != kNoTurns && !world->together()) world->wait([&mine, parity] { return mine.passed(parity); });
    }
    void arrive() {
        if (!world->together()) world->blocks[block].order[1 - group].arrive();
        ++turns;
        world->pause();
    }
};

struct Work {
    int block, group, begun = 0, steps_done = 0, under_way = 0;
    std::deque<std::function<void()>> ends = {};

    int tile() const { return world->together() ? begun - 1 : 2 * (begun - 1) + group; }
    void begin(int first_class) {
        Block& mine = world->blocks[block];
        if (mine.next_tile++ != 2 * begun + group && !world->together()) world->fail("a turn out of order");
        ++begun, steps_done = 0;
        if (first_class != world->turn.first_class(tile())) world->fail("another tile's turn");
    }
    void wait_once(int step) {
        Block& mine = world->blocks[block];
        if (world->stays && world->fault != kNoWaitForX) world->wait([&mine, step] { return mine.x_arrived[step].passed(0); });
    }
    void multiply(int step, int stage) {
        Block& mine = world->blocks[block];
        const Contents w = {world->turn.first_class(tile()), step}, x = {-1, step};
        const int at = world->stays ? step : stage;
        const auto there = [&mine, w, x, at, stage, group = group] {
            for (int piece = 0; piece < world->pieces(); ++piece)
                if (!(mine.x[piece][at] == x)) return false;
            const bool both = mine.w[0][stage] == w && mine.w[1][stage] == w;
            return world->together() ? mine.w[group][stage] == w : both;
        };
        if (step != steps_done++ || !there()) world->fail("products of what is not there");
        ++mine.readers[stage], ++under_way;
        ends.push_back([this, &mine, stage, there] {
            if (!there()) world->fail("a stage changed under its products");
            --mine.readers[stage], --under_way;
        });
        world->under_way.push_back([this] {  // a warpgroup's products end in their order
            const auto end = std::move(ends.front());
            ends.pop_front();
            end();
        });
        world->pause();
    }
    void wait_for_all_but_the_last() {
        if (world->fault != kNoWaitForProducts) world->wait([this] { return under_way <= 1; });
    }
    void wait_for_all() {
        world->wait([this] { return under_way == 0; });
        if (steps_done != world->steps) world->fail("a tile without all of its steps");
    }
    void finish(int first_class) {
        if (first_class != world->turn.first_class(tile())) world->fail("another tile's epilogue");
        for (int i = 0; i < 3; ++i) world->pause();
        if (world->together() && world->halves == 2) exchange(first_class);
    }
    // As the gradient kernel's add_the_other_half: parts are sent, one wait for all, each reads.
    void exchange(int first_class) {
        const bool one = world->fault == kOnePlace;
        const int nth = begun - 1, at = one ? 0 : nth % 2, parity = (one ? nth : nth / 2) % 2;
        const int other = block ^ 1;
        Barrier& mine = world->blocks[block].sent[group][at];
        mine.expect(2), mine.arrive();
        for (int part = 0; part < 2; ++part) {
            world->alive(other);
            Contents& to = world->blocks[other].place[group][at][part];
            world->under_way.push_back([&to, other, at, group = group, first_class] {
                world->alive(other);
                to = {first_class, 0};
                world->blocks[other].sent[group][at].complete(1);
            });
            world->pause();
        }
        world->wait([&mine, parity] { return mine.passed(parity); });
        for (int part = 0; part < 2; ++part) {
            world->pause();
            if (!(world->blocks[block].place[group][at][part] == Contents{first_class, 0})) world->fail("another tile's sum");
        }
    }
};

void start(std::function<void()> body) {
    auto fiber = std::make_unique<Fiber>();
    fiber->body = std::move(body);
    fiber->until = [] { return true; };
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, enter, 0);
    world->fibers.push_back(std::move(fiber));
}

void run() {
    for (int b = 0; b < world->cluster(); ++b) {
        start([b] {
            Pipeline pipeline = {b};
            load_tiles(pipeline, State{0, world->stages, 1}, world->turn, world->steps, Copies{b});
            --world->blocks[b].running;
        });
        for (int group = 0; group < 2; ++group)
            start([b, group] {
                Pipeline pipeline = {b};
                Order order = {b, group};
                Work work = {b, group};
                multiply_tiles(pipeline, order, State{0, world->stages, 0}, world->turn, world->steps,
                               world->together() ? 0 : group, world->parts(), work);
                --world->blocks[b].running;
            });
    }
    while (world->wrong.empty()) {
        std::vector<int> ready;
        size_t done = 0;
        for (size_t i = 0; i < world->fibers.size(); ++i) {
            done += world->fibers[i]->done;
            if (!world->fibers[i]->done && world->fibers[i]->until()) ready.push_back(int(i));
        }
        const size_t choices = ready.size() + world->under_way.size();
        if (choices == 0 && done == world->fibers.size()) break;
        if (choices == 0) return world->fail("a deadlock");
        const size_t choice = world->chance() % choices;
        if (choice < ready.size()) {
            world->current = world->fibers[ready[choice]].get();
            swapcontext(&world->scheduler, &world->current->context);
        } else {
            auto& chosen = world->under_way[choice - ready.size()];
            const auto end = std::move(chosen);
            chosen = std::move(world->under_way.back());
            world->under_way.pop_back();
            end();
        }
    }
    for (int b = 0; b < world->cluster() && world->wrong.empty(); ++b)
        if (world->blocks[b].next_tile != world->turn.count() * (world->together() ? kGroups : 1)) world->fail("a tile left out");
}

}  // namespace

// Null, or what went wrong in one run of a cluster's stream.
extern "C" const char* simulate(int seed, int halves, int shares, int stages, int steps, int stays, int tiles, int streams,
                                int fault) {
    static std::string message;
    World here;
    world = &here;
    here.halves = halves, here.shares = shares, here.stages = stages, here.steps = steps, here.stays = stays, here.fault = Fault(fault);
    here.turn = {0, streams, tiles, 128};
    here.chance.seed(unsigned(seed));
    for (Block& block : here.blocks) {
        block.full.resize(stages), block.empty.resize(stages), block.x_arrived.resize(steps), block.readers.resize(stages);
        for (Barrier& barrier : block.empty)
            barrier.count = barrier.pending = (here.fault == kReleaseToOneBlock ? 1 : halves + shares - 1) * (here.together() ? kGroups : 1);
        for (auto& half : block.w) half.resize(stages);
        for (auto& piece : block.x) piece.resize(stays ? steps : stages);
    }
    run();
    message = here.wrong;
    return message.empty() ? nullptr : message.c_str();
}
