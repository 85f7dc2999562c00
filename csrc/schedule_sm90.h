// The order in which Hopper's kernels load, multiply and take turns, apart from what a copy and a product are: tests run
// the same loops on a CPU, in whatever order barriers allow.
#pragma once

#include "arithmetic.h"

namespace ak {
namespace sm90 {

constexpr int kParts = 2;  // warpgroups that multiply

// A stream's tiles of so many classes: every so manieth.
struct Turn {
    int stream, streams, tiles, classes;

    __host__ __device__ int count() const { return tiles > stream ? (tiles - stream - 1) / streams + 1 : 0; }
    __host__ __device__ int first_class(int i) const { return (stream + i * streams) * classes; }
};

// The thread that loads: the stages of every tile.
template <class Pipeline, class State, class Copies>
__host__ __device__ inline void load_tiles(Pipeline& pipeline, State state, const Turn& turn, int steps,
                                           const Copies& copies) {
    const int count = turn.count();
    for (int i = 0; i < count; ++i)
        for (int step = 0; step < steps; ++step, ++state) {
            if (i == 0) copies.once(step);
            pipeline.producer_acquire(state);
            copies.each(state, turn.first_class(i), step);
        }
    pipeline.producer_tail(state);  // the other block's copies and signals still come here
}

// A warpgroup, the `group`th of `parts` that take turns: the products of every so manieth tile, in its turn, then the epilogue
// while another has its own.
template <class Pipeline, class Order, class State, class Work>
__host__ __device__ inline void multiply_tiles(Pipeline& pipeline, Order& order, State state, const Turn& turn, int steps,
                                               int group, int parts, Work& work) {
    state.advance(group * steps);
    const int count = turn.count();
    for (int i = group; i < count; i += parts) {
        order.wait();
        work.begin(turn.first_class(i));
        State before = state;
        for (int step = 0; step < steps; ++step) {
            if (i == group) work.wait_once(step);
            pipeline.consumer_wait(state);
            work.multiply(step, int(state.index()));
            work.wait_for_all_but_the_last();
            if (step > 0) pipeline.consumer_release(before);
            before = state;
            ++state;
        }
        order.arrive();
        work.wait_for_all();
        pipeline.consumer_release(before);
        state.advance((parts - 1) * steps);
        work.finish(turn.first_class(i));
    }
}

// Of warpgroups that all have a part of each tile, and take no turns.
struct NoOrder {
    __host__ __device__ void wait() {}
    __host__ __device__ void arrive() {}
};

}  // namespace sm90
}  // namespace ak
