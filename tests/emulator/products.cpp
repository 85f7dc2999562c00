// Products of a warpgroup as their descriptors say, on accumulators that are the tensor cores' while they are under way; and
// the registers that warpgroups pass to one another.
#include "machine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace emulator {
namespace {

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

}  // namespace

Warpgroup& group_of(const Thread& thread) { return thread.block->groups[thread.number / kGroup]; }

bool has_product(const Warpgroup& group) {
    return group.done < group.products.size() && group.issued[group.done] == kGroup;
}

void execute_product(Block& block, Warpgroup& group) {
    const size_t number = group.done++;
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
