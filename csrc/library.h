// The library's whole contract with the host: plain C, one structure a launcher. Each returns null, or what is wrong.
#pragma once

#include <cstdint>

#define AK_EXPORT __attribute__((visibility("default")))

extern "C" {

enum AkType {
    AK_FLOAT32 = 0,
    AK_FLOAT16 = 1,
    AK_BFLOAT16 = 2,
    AK_TFLOAT32 = 3  // float32 in memory, an operand rounded to ten bits of fraction
};

struct AkMatrix {
    void* data;
    int64_t rows, columns, row_stride, column_stride;  // in elements
    int32_t type, reserved;
};

enum AkKernel { AK_COSINE_SM90 = 1, AK_GRADIENT_SM90 = 2 };  // Hopper's own

struct AkWhere {
    void* stream;
    int32_t device, without;  // without: the kernels that are to be left out, each a bit
};

// s: a number, or a pointer to a float32 on the device; without `normalize` the row's norm takes its place.
struct AkScale {
    const float* pointer;
    float number;
    int32_t normalize;
};

struct AkRows {
    AkMatrix features, weight;  // [B, D], [C, D]
    AkMatrix x_hat;             // [B, width]
    const int64_t* labels;
    float *cosine, *norm, *factor, *shift;  // [B]
    AkScale scale;
};

struct AkCentres {
    AkMatrix weight, w_hat;  // [N, D], [N, width]
    float* inverse_norm;     // [N]
};

struct AkCosine {
    AkMatrix x_hat, w_hat, terms;  // [B, width], [N, width], [B, N or a little more]; terms.data null: not stored
    const int64_t* labels;
    const float *factor, *shift;  // [B]; shift null: none
    double* z;                    // [parts, B], null: not summed
    float* best;                  // [parts, B], null: not sought
    int64_t* best_class;          // [parts, B]
    int64_t class_start;
    float filter;  // negatives of a larger cosine are left out
    int32_t parts, only_unbounded;        // parts: of all streams together
    int32_t subcentres, group, reserved;  // each `group` columns are a class, of whose first `subcentres` the nearest counts
};

// How the cosine kernel divides a problem: among blocks (on Hopper clusters of them) of `rows` rows, each with its own
// stream of tiles of `classes` classes, of which it leaves `parts` partial sums a row. As many as `blocks` run at once.
struct AkTiling {
    int64_t batch, width;                  // given
    int32_t rows, classes, parts, blocks;  // the answer
    int32_t type, grouped;                 // given: of the operands, and whether a class is a group of them
};

struct AkReduce {
    const double* z_parts;         // [parts, B]: z is written
    const float* best_parts;       // [parts, B]: best and its class are, or the shift
    const int64_t* class_parts;    // [parts, B]
    const int64_t* labels;         // [B]
    const float* factor;           // [B]
    float *z, *best, *shift;       // [B]
    int64_t* best_class;           // [B]
    int64_t batch, parts;
};

struct AkMargin {
    const float *z, *shift, *cosine, *norm;  // [B]
    const int64_t* labels;                   // [B]
    float *loss, *derivatives;               // [B], and [3, B] by log z, by the cosine and by the scale
    double margin;
    int64_t batch, classes, mean;  // of a mean, all are divided by the number of rows that are not ignored
    AkScale scale;
};

struct AkFactor {
    AkMatrix features, x_factored, x_hat;  // [B, D], [B, width] twice; x_hat.data null: not written
    const int64_t* labels;
    const float *norm, *row_factor;  // [B]
    float* factor;                   // [B], with x_hat
    AkScale scale;
};

struct AkFinishCentres {
    AkMatrix grad_unit, weight, grad;  // [N, width] float32, [N, D], [N, D]; grad may be grad_unit
    const float* inverse_norm;         // [N]
};

// The centres' gradient at once: E's product and the normalization's derivative, where clusters of the kernel fit the GPU.
struct AkGradCentres {
    AkMatrix terms, x_factored, weight, grad;  // [B, N], [B, width], both bfloat16; [N, D] twice
    const float* inverse_norm;                 // [N]
    int32_t clusters, reserved;                // that share the classes
};

struct AkGradTiling {
    int64_t width;           // given
    int32_t type, clusters;  // given: of the centres; the answer: that run at once, 0 where there is no such kernel
};

// The centres' step: of their gradient by ŵ, or of the whole one (`whole`); `out` has data: the whole gradient is left there.
struct AkUpdateCentres {
    AkMatrix grad_unit, centres, target_rows, out;  // [N, width] float32, [N, D], [B, D] float32, [N, D] float32
    AkMatrix weight, first, second;                 // [*, D]: what is written; data null where the rule has no such state
    const float* inverse_norm;                      // [N]
    const int32_t* slots;                           // [N] the row of target_rows with a class's part, -1: none
    const int64_t* rows;                            // [N] where the classes are in weight and state; null: from `start` on
    int32_t* skipped;                               // [N] 1 where the gradient is not finite and nothing was written
    int64_t weight_key, first_key, second_key;      // of random bits
    int64_t start, class_start;
    float loss_scale, lr, decay, first_rate, second_rate, third, correction;
    int32_t whole, nesterov, stochastic;
};

struct AkFinishRows {
    AkMatrix features, weight, unit_rows, grad_features, grad_weight;  // unit_rows [B, width] float32; null grads: unwanted
    const int64_t* labels;
    const float *norm, *cosine, *row_factor, *grad_cosine, *grad_norm;  // [B]; grad_norm may be null
    double* grad_scale;                                                 // [B], null if not wanted
    AkScale scale;
};

AK_EXPORT const char* ak_prepare_rows(const AkRows*, const AkWhere*);
AK_EXPORT const char* ak_prepare_centres(const AkCentres*, const AkWhere*);
AK_EXPORT const char* ak_cosine_exp(const AkCosine*, const AkWhere*);
AK_EXPORT const char* ak_reduce(const AkReduce*, const AkWhere*);
AK_EXPORT const char* ak_constant_margin(const AkMargin*, const AkWhere*);
AK_EXPORT const char* ak_factor_rows(const AkFactor*, const AkWhere*);
AK_EXPORT const char* ak_finish_centres(const AkFinishCentres*, const AkWhere*);
AK_EXPORT const char* ak_update_centres(const AkUpdateCentres*, const AkWhere*);
AK_EXPORT const char* ak_finish_rows(const AkFinishRows*, const AkWhere*);
AK_EXPORT const char* ak_grad_centres(const AkGradCentres*, const AkWhere*);

AK_EXPORT const char* ak_tiling(AkTiling*, const AkWhere*);
AK_EXPORT const char* ak_grad_tiling(AkGradTiling*, const AkWhere*);

// Before anything else on a device: whether the kernels run there.
AK_EXPORT const char* ak_check(const AkWhere*);

// A number for each version of this contract, one made of this file's text as it was compiled (AK_CONTRACT, which the build
// defines), and whether Hopper's own kernels are in this library.
AK_EXPORT int32_t ak_version();
AK_EXPORT int32_t ak_contract();
AK_EXPORT int32_t ak_has_hopper();
}
