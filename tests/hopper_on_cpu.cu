// Hopper's cosine kernel without a GPU: products by plain sums, everything after them by the kernel's own code, for every
// thread, in its layouts and order. What stands for hardware is spelt out anew: the bulk copies' permutation and the quad's
// sums.
#include "tile_sm90.cuh"
//
#include <vector>

#include "cosine.h"

namespace ak {
namespace {

using namespace sm90;

constexpr int kGroup = 128;

// Where bulk copies put element (row, column) of rows of 64 elements of two bytes.
int permuted(int row, int column) { return row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8; }

template <class T>
std::vector<float> cosines(const AkCosine& p) {
    const int64_t B = p.x_hat.rows, N = p.w_hat.rows;
    auto element = [](const AkMatrix& m, int64_t row, int64_t k) {
        return double(float(static_cast<const T*>(m.data)[row * m.row_stride + k]));
    };
    std::vector<float> c(B * N);
    for (int64_t row = 0; row < B; ++row)
        for (int64_t column = 0; column < N; ++column) {
            double sum = 0;
            for (int64_t k = 0; k < p.x_hat.columns; ++k) sum += element(p.x_hat, row, k) * element(p.w_hat, column, k);
            c[row * N + column] = float(sum);
        }
    return c;
}

// What a bulk copy of a square stores: nothing outside the matrix.
void store(const AkMatrix& terms, const bfloat16* square, int64_t column, int64_t row) {
    auto* to = static_cast<bfloat16*>(terms.data);
    for (int r = 0; r < kSquare; ++r)
        for (int c = 0; c < kSquare; ++c)
            if (row + r < terms.rows && column + c < terms.columns)
                to[(row + r) * terms.row_stride + column + c] = square[permuted(r, c)];
}

template <class T, bool GENERAL>
void one_tile(const AkCosine& p, const std::vector<float>& all, int64_t first_row, int first, Totals (&totals)[kGroup]) {
    static Sum sums[kGroup][4];
    static bfloat16 squares[2][2][kSquare * kSquare];
    memset(squares, 0xFF, sizeof(squares));
    static Row rows[kGroup][4];
    for (int thread = 0; thread < kGroup; ++thread)
        for (int i = 0; i < 4; ++i) rows[thread][i] = load_row(p, first_row + row_of_thread(coordinates<T>(thread), i));
    for (int thread = 0; thread < kGroup; ++thread) {
        const auto where = coordinates<T>(thread);
        auto c = cute::partition_fragment_C(Mma<T>{}, Tile{});
        for (int k = 0; k < cute::size(c); ++k) {
            const int64_t row = first_row + cute::get<0>(where(k)), column = first + cute::get<1>(where(k));
            c(k) = row < p.x_hat.rows && column < p.w_hat.rows ? all[row * p.w_hat.rows + column] : 0.0f;
        }
        bool special = false;  // the warp's vote
        for (int lane = 0; lane < 32; ++lane)
            special |= is_special(rows[thread / 32 * 32 + lane], first, int(p.w_hat.rows));
        const auto leave = [&](int half, int right, const uint32_t(&pairs)[16]) {
            place_square(where, pairs, squares[half][right]);
        };
        for (Sum& sum : sums[thread]) sum = {};
        if (special)
            tile_terms<GENERAL, true>(c, where, first, p, rows[thread], sums[thread], leave);
        else
            tile_terms<GENERAL, false>(c, where, first, p, rows[thread], sums[thread], leave);
    }
    for (int half = 0; half < 2 && p.terms.data; ++half)
        for (int right = 0; right < 2; ++right)
            store(p.terms, squares[half][right], first + right * kSquare, first_row + half * kSquare);
    for (int quad = 0; quad < kGroup; quad += 4) {
        Sum whole[4];
        for (int i = 0; i < 4; ++i) {
            const auto& of = sums;
            whole[i].sum = (of[quad][i].sum + of[quad + 1][i].sum) + (of[quad + 2][i].sum + of[quad + 3][i].sum);
            for (int lane = 0; lane < 4; ++lane) whole[i].most = larger(whole[i].most, of[quad + lane][i].most);
        }
        for (int lane = 0; lane < 4; ++lane) totals[quad + lane].add(one_of(whole, lane));
    }
}

template <class T, bool GENERAL>
void run(const AkCosine& p) {
    const auto all = cosines<T>(p);
    const int cluster = cluster_of(p.x_hat.rows), streams = p.parts / kParts;
    for (int64_t first = 0; first < p.x_hat.rows; first += cluster * kRows) {
        bool unbounded = false;
        for (int64_t row = first; row < first + cluster * kRows; ++row) unbounded |= needs_shift(p, row);
        const bool skip = p.only_unbounded && !unbounded;
        for (int rank = 0; rank < cluster; ++rank)
            for (int stream = 0; stream < streams; ++stream)
                for (int group = 0; group < kParts; ++group) {
                    const Turn turn = {stream, streams, skip ? 0 : int((p.w_hat.rows + kClasses - 1) / kClasses)};
                    const int64_t first_row = first + rank * kRows;
                    Totals totals[kGroup];
                    for (int i = group; i < turn.count(); i += kParts)
                        one_tile<T, GENERAL>(p, all, first_row, turn.first_class(i), totals);
                    for (int thread = 0; thread < kGroup; ++thread)
                        totals[thread].write(p, stream * kParts + group,
                                             first_row + row_of_thread(coordinates<T>(thread), thread % 4));
                }
    }
}

// The layouts: that the products read what bulk copies wrote, and that every logit of a tile is some thread's, once.
template <class T>
bool layouts_hold() {
    const auto operands = cute::as_position_independent_swizzle_layout(Operands<T, 3>{});
    for (int stage = 0; stage < 3; ++stage)
        for (int row = 0; row < kRows; ++row)
            for (int column = 0; column < kDepth; ++column)
                if (operands(row, column, stage) != stage * kRows * kDepth + permuted(row, column)) return false;
    std::vector<int> seen(kRows * kClasses);
    for (int thread = 0; thread < kGroup; ++thread) {
        const auto where = coordinates<T>(thread);
        for (int k = 0; k < cute::size(where); ++k) ++seen[cute::get<0>(where(k)) * kClasses + cute::get<1>(where(k))];
        for (int i = 0; i < 4; ++i)
            if (row_of_thread(where, i) != thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8 + i / 2 * 64) return false;
    }
    for (int times : seen)
        if (times != 1) return false;
    return true;
}

const char* check() {
    const bool both = layouts_hold<cutlass::half_t>() && layouts_hold<cutlass::bfloat16_t>();
    return both ? nullptr : "a layout is not as it was meant";
}

const char* tiling(AkTiling& p) {
    p.rows = cluster_of(p.batch) * kRows, p.classes = kClasses, p.parts = kParts, p.blocks = 2;
    return nullptr;
}

const char* launch(const AkCosine& given, const AkWhere&) {
    if (given.parts % kParts) return "an odd number of partial sums";
    AkCosine p = given;
    const bool filter = p.filter <= 1.0f, general = filter || p.best;
    if (!filter) p.filter = INFINITY;
    if (p.x_hat.type == AK_FLOAT16)
        general ? run<cutlass::half_t, true>(p) : run<cutlass::half_t, false>(p);
    else
        general ? run<cutlass::bfloat16_t, true>(p) : run<cutlass::bfloat16_t, false>(p);
    return nullptr;
}

void block(AkBlock& p) { p.threads = 1, p.bytes = 0; }  // nothing of a GPU is taken

}  // namespace

extern AK_EXPORT const CosineKernel hopper_cosine;
const CosineKernel hopper_cosine = {check, tiling, launch, block};

}  // namespace ak
