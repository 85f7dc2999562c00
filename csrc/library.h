// The library's whole contract with the host: plain C, one structure a launcher. Each returns null, or what is wrong.
#pragma once

#include <cstdint>

#define AK_EXPORT __attribute__((visibility("default")))

extern "C" {

enum AkType {
    AK_FLOAT32 = 0,
    AK_FLOAT16 = 1,
    AK_BFLOAT16 = 2,
    AK_INT64 = 3,
    AK_INT32 = 4,
    AK_INT16 = 5,
    AK_INT8 = 6,
    AK_UINT8 = 7,
    AK_TFLOAT32 = 8  // float32 in memory, an operand rounded to ten bits of fraction
};

struct AkMatrix {
    void* data;
    int64_t rows, columns, row_stride, column_stride;  // in elements
    int32_t type, reserved;
};

struct AkWhere {
    void* stream;
    int32_t device, reserved;
};

// s: a number, or a pointer to a float32 on the device; without `normalize` the row's norm takes its place.
struct AkScale {
    const float* pointer;
    float number;
    int32_t normalize;
};

struct AkLabels {
    const void* labels;  // [B] of any integer type
    int64_t *result, *count;  // [B], and the number of rows not ignored, at least 1
    int64_t batch, classes, ignore_index;
    int32_t type, reserved;
};

struct AkRows {
    AkMatrix features, weight;  // [B, D], [C, D]
    AkMatrix x_hat;             // [B, width]
    const int64_t* labels;
    float *cosine, *norm, *factor, *shift;  // [B]
    AkScale scale;
    AkMatrix w_hat;       // [C, width]; data null: not written
    float* inverse_norm;  // [C], with w_hat
    AkLabels raw;         // those that `labels` are made of, and counted; raw.labels null: they are there
};

struct AkCentres {
    AkMatrix weight, w_hat;  // [N, D], [N, width]
    float* inverse_norm;     // [N]
    const float* unless_bounded;  // if given and at most 64: nothing to do
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
    int32_t parts, only_unbounded, reserved;  // parts: of all streams together
};

// How the cosine kernel divides a problem: among blocks (on Hopper clusters of them) of `rows` rows, each with its own
// stream of tiles of `classes` classes, of which it leaves `parts` partial sums a row. As many as `blocks` run at once.
struct AkTiling {
    int64_t batch, width;                  // given
    int32_t rows, classes, parts, blocks;  // the answer
    int32_t type, reserved;                // given: of the operands
};

enum AkKernel { AK_PORTABLE_COSINE = 0, AK_HOPPER_COSINE = 1, AK_HOPPER_GRADIENT = 2 };

// What a block of a kernel takes of an SM, but for its registers; no device is asked.
struct AkBlock {
    int64_t width;           // given
    int32_t type, kernel;    // given: of the operands; an AkKernel
    int32_t threads, bytes;  // the answer; bytes of dynamic shared memory
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
    AkMatrix features, x_factored;         // [B, D], [B, width]; x_factored.data null: not written
    const double* z_parts;                 // [parts, B]: z is written; null: z is read
    float* z;                              // [B]
    const float *shift, *cosine, *norm;    // [B]
    const int64_t *labels, *num_rows;      // [B], and a number
    float *loss, *derivatives;             // [B] or one number; [2 or 3, B]
    double margin;
    int64_t batch, classes, parts;
    AkScale scale;
    int32_t reduce, mean, need_scale, reserved;
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
    const float* upstream;             // a number to multiply by; null: 1
};

// The centres' gradient at once: E's product and the normalization's derivative, where clusters of the kernel fit the GPU.
struct AkGradCentres {
    AkMatrix terms, x_factored, weight, grad;  // [B, N], [B, width], both bfloat16; [N, D] twice
    const float* inverse_norm;                 // [N]
    const float* upstream;                     // a number to multiply by; null: 1
    int32_t clusters, reserved;                // that share the classes
};

struct AkGradTiling {
    int64_t width;           // given
    int32_t type, clusters;  // given: of the centres; the answer: that run at once, 0 where there is no such kernel
};

struct AkFinishRows {
    AkMatrix features, weight, unit_rows, grad_features, grad_weight;  // unit_rows [B, width] float32; null grads: unwanted
    const int64_t* labels;
    const float *norm, *cosine, *row_factor, *grad_cosine, *grad_norm;  // [B]; grad_norm may be null
    double* grad_scale;                                                 // [B], null if not wanted
    const float* upstream;                                              // a number times row_factor and the grads; null: 1
    AkScale scale;
};

AK_EXPORT const char* ak_canonical_labels(const AkLabels*, const AkWhere*);
AK_EXPORT const char* ak_prepare_rows(const AkRows*, const AkWhere*);
AK_EXPORT const char* ak_prepare_centres(const AkCentres*, const AkWhere*);
AK_EXPORT const char* ak_cosine_exp(const AkCosine*, const AkWhere*);
AK_EXPORT const char* ak_reduce(const AkReduce*, const AkWhere*);
AK_EXPORT const char* ak_constant_margin(const AkMargin*, const AkWhere*);
AK_EXPORT const char* ak_factor_rows(const AkFactor*, const AkWhere*);
AK_EXPORT const char* ak_finish_centres(const AkFinishCentres*, const AkWhere*);
AK_EXPORT const char* ak_finish_rows(const AkFinishRows*, const AkWhere*);
AK_EXPORT const char* ak_grad_centres(const AkGradCentres*, const AkWhere*);

AK_EXPORT const char* ak_tiling(AkTiling*, const AkWhere*);
AK_EXPORT const char* ak_grad_tiling(AkGradTiling*, const AkWhere*);
AK_EXPORT const char* ak_block(AkBlock*, const AkWhere*);

// Before anything else on a device: whether the kernels run there.
AK_EXPORT const char* ak_check(const AkWhere*);

// A number for each version of this contract, one made of this file's text as it was compiled (AK_CONTRACT, which the build
// defines), and whether Hopper's own kernels are in this library.
AK_EXPORT int32_t ak_version();
AK_EXPORT int32_t ak_contract();
AK_EXPORT int32_t ak_has_hopper();
}
