// Hopper's kernels without a GPU: products by plain sums, everything after them by the kernel's own code, for every
// thread, in its layouts and order. What stands for hardware is spelt out anew: the bulk copies' permutation and the quad's
// sums.
#include "gradient_tile_sm90.cuh"
#include "tile_sm90.cuh"
//
#include <vector>

#include "cosine.h"
#include "gradient.h"

namespace ak {
namespace {

using namespace sm90;

constexpr int kGroup = 128;

// Where bulk copies put element (row, column) of rows of 128 bytes: parts of 16 bytes change places.
template <class E>
int permuted(int row, int column) {
    constexpr int kPart = 16 / sizeof(E);
    return row * 8 * kPart + ((column / kPart) ^ (row % 8)) * kPart + column % kPart;
}

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

// What a bulk copy of a box stores: nothing outside the matrix.
template <class E>
void store(const AkMatrix& terms, const E* box, int64_t column, int64_t row) {
    auto* to = static_cast<E*>(terms.data);
    for (int r = 0; r < kBoxRows; ++r)
        for (int c = 0; c < int(128 / sizeof(E)); ++c)
            if (row + r < terms.rows && column + c < terms.columns)
                to[(row + r) * terms.row_stride + column + c] = box[permuted<E>(r, c)];
}

template <class T, bool GENERAL>
void one_tile(const AkCosine& p, const std::vector<float>& all, int64_t first_row, int first, Totals (&totals)[kGroup]) {
    static Sum sums[kGroup][4];
    constexpr int kAcross = kClasses / kBoxColumns<T>;
    static Term<T> boxes[2][kAcross][kBoxRows * kBoxColumns<T>];
    memset(boxes, 0xFF, sizeof(boxes));
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
        const auto leave = [&](int half, int across, const uint32_t(&words)[16]) {
            place_box<T>(where, words, boxes[half][across]);
        };
        for (Sum& sum : sums[thread]) sum = {};
        if (special)
            tile_terms<T, GENERAL, true>(c, where, first, p, rows[thread], sums[thread], leave);
        else
            tile_terms<T, GENERAL, false>(c, where, first, p, rows[thread], sums[thread], leave);
    }
    for (int half = 0; half < 2 && p.terms.data; ++half)
        for (int across = 0; across < kAcross; ++across)
            store(p.terms, boxes[half][across], first + across * kBoxColumns<T>, first_row + half * kBoxRows);
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
                    const Turn turn = {stream, streams, skip ? 0 : int((p.w_hat.rows + kClasses - 1) / kClasses), kClasses};
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
            for (int column = 0; column < kDepth<T>; ++column)
                if (operands(row, column, stage) != stage * kRows * kDepth<T> + permuted<T>(row, column)) return false;
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
    const bool all = layouts_hold<cutlass::half_t>() && layouts_hold<cutlass::bfloat16_t>() &&
                     layouts_hold<cutlass::tfloat32_t>();
    return all ? nullptr : "a layout is not as it was meant";
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
    switch (p.x_hat.type) {
        case AK_FLOAT16: general ? run<cutlass::half_t, true>(p) : run<cutlass::half_t, false>(p); break;
        case AK_BFLOAT16: general ? run<cutlass::bfloat16_t, true>(p) : run<cutlass::bfloat16_t, false>(p); break;
        default: general ? run<cutlass::tfloat32_t, true>(p) : run<cutlass::tfloat32_t, false>(p);
    }
    return nullptr;
}

// Boxes of 64 columns, each as a bulk copy writes it.
template <int COLUMNS>
bool panels_hold() {
    const auto panels = cute::as_position_independent_swizzle_layout(Panels<COLUMNS, 3>{});
    for (int stage = 0; stage < 3; ++stage)
        for (int row = 0; row < kDeep; ++row)
            for (int column = 0; column < COLUMNS; ++column) {
                const int box = stage * COLUMNS / 64 + column / 64;
                if (panels(column, row, stage) != box * 64 * kDeep + permuted<bfloat16_t>(row, column % 64)) return false;
            }
    return true;
}

template <int COLUMNS>
bool gradient_layouts_hold() {
    std::vector<int> seen(kCentres * COLUMNS);
    AkGradCentres p = {};
    std::vector<float> inverse(kCentres);
    p.weight.rows = kCentres, p.weight.columns = COLUMNS, p.inverse_norm = inverse.data();
    for (int thread = 0; thread < kGroup; ++thread) {
        const auto where = gradient_coordinates<COLUMNS>(thread);
        const Part<COLUMNS, float> part(p, thread, 0, 0);
        for (int i = 0; i < 2; ++i) {
            if (part.classes[i] != thread / 32 * 16 + thread % 32 / 4 + 8 * i) return false;
            for (int eight = 0; eight < COLUMNS / 8; ++eight)
                for (int side = 0; side < 2; ++side) {
                    const auto at = where(cute::make_coord(side, i, eight), 0, 0);
                    const int column = cute::get<1>(at);
                    if (cute::get<0>(at) != part.classes[i] || column != part.first[i] + 8 * eight + side) return false;
                    ++seen[cute::get<0>(at) * COLUMNS + cute::get<1>(at)];
                }
        }
    }
    for (int times : seen)
        if (times != 1) return false;
    return panels_hold<COLUMNS>() && panels_hold<kCentres>();
}

const char* check_gradient() {
    return gradient_layouts_hold<128>() && gradient_layouts_hold<256>() ? nullptr : "a layout is not as it was meant";
}

const char* gradient_tiling(AkGradTiling& p) {
    p.clusters = 3;
    return nullptr;
}

template <int COLUMNS, class W>
void centres_tile(const AkGradCentres& p, int first_class) {
    using Products = decltype(cute::partition_fragment_C(GradientMma<COLUMNS>{},
                                                         cute::Shape<cute::Int<kCentres>, cute::Int<COLUMNS>>{}));
    static Products c[2][kGroup];
    static float sums[2][kGroup][2];
    const int halves = halves_of(p.x_factored.columns);
    auto element = [](const AkMatrix& m, int64_t row, int64_t column) {
        const bool there = row < m.rows && column < m.columns;
        return there ? double(float(static_cast<const bfloat16_t*>(m.data)[row * m.row_stride + column])) : 0.0;
    };
    for (int half = 0; half < halves; ++half)
        for (int thread = 0; thread < kGroup; ++thread) {
            const auto where = gradient_coordinates<COLUMNS>(thread);
            for (int k = 0; k < cute::size(where); ++k) {
                double sum = 0;
                for (int64_t b = 0; b < p.terms.rows; ++b)
                    sum += element(p.terms, b, first_class + cute::get<0>(where(k))) *
                           element(p.x_factored, b, half * COLUMNS + cute::get<1>(where(k)));
                c[half][thread](k) = float(sum);
            }
            Part<COLUMNS, W>(p, thread, first_class, half * COLUMNS).along(c[half][thread], sums[half][thread]);
        }
    for (int quad = 0; quad < kGroup; quad += 4) {
        float whole[2] = {};
        for (int half = 0; half < halves; ++half)
            for (int i = 0; i < 2; ++i) {
                const auto& of = sums[half];
                whole[i] += (of[quad][i] + of[quad + 1][i]) + (of[quad + 2][i] + of[quad + 3][i]);
            }
        for (int half = 0; half < halves; ++half)
            for (int thread = quad; thread < quad + 4; ++thread)
                Part<COLUMNS, W>(p, thread, first_class, half * COLUMNS).write(c[half][thread], whole);
    }
}

template <class W>
void centres(const AkGradCentres& p) {
    const int tiles = int((p.weight.rows + kTogether - 1) / kTogether);
    for (int stream = 0; stream < p.clusters; ++stream) {
        const Turn turn = {stream, p.clusters, tiles, kTogether};
        for (int i = 0; i < turn.count(); ++i)
            for (int first = turn.first_class(i); first < turn.first_class(i) + kTogether; first += kCentres) {
                columns_of(p.x_factored.columns) == 256 ? centres_tile<256, W>(p, first) : centres_tile<128, W>(p, first);
            }
    }
}

const char* launch_gradient(const AkGradCentres& p, const AkWhere&) {
    switch (p.weight.type) {
        case AK_FLOAT16: centres<cutlass::half_t>(p); break;
        case AK_BFLOAT16: centres<bfloat16_t>(p); break;
        default: centres<float>(p);
    }
    return nullptr;
}

void block(AkBlock& p) { p.threads = 1, p.bytes = 0; }  // nothing of a GPU is taken

}  // namespace

extern AK_EXPORT const CosineKernel hopper_cosine;
const CosineKernel hopper_cosine = {check, tiling, launch, block};
extern AK_EXPORT const GradientKernel hopper_gradient;
const GradientKernel hopper_gradient = {check_gradient, gradient_tiling, launch_gradient, block, kWidest};

}  // namespace ak
