// The loops of a decode step that a chain of PyTorch calls is slow at: storing keys and values in a paged cache,
// attention of single queries over it, and RMSNorm, for models that run on torch (the fused step has its own). Plain C++
// that the compiler vectorises; each function is compiled for several processors and the right copy is chosen when it is
// first called. Arguments are addresses: bimo_kernels/__init__.py checks them.
//
// Legend: S sequences, H query heads, K key/value heads, G = H / K, E head_dim, B tokens a block, D row length.
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <vector>

#define BIMO_ISA each_cpu  // simd.h without any processor's own instructions: the compiler makes copies, see EVERY_CPU
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif

namespace bimo {
void bind_fused(nanobind::module_& m);     // fused.cpp
void bind_training(nanobind::module_& m);  // training.cpp
}

namespace {

using namespace bimo::each_cpu;

struct bfloat16 {
    uint16_t bits;
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(bfloat16 x) { return from_bf16(x.bits); }
INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bfloat16* to, float x) { to->bits = to_bf16(x); }

// e^x for x <= 0, relative error below 2e-7 down to e^-87, 0 below: 2^n times a polynomial, so that it vectorises.
inline float exp_negative(float x) {
    float scaled = x * 1.44269504f;
    scaled = scaled < -126.0f ? -126.0f : scaled;
    float whole = std::floor(scaled + 0.5f);
    float r = (scaled - whole) * 0.69314718f;
    float power = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.008333334f + r * 0.0013888889f)))));
    int32_t bits = (int32_t(whole) + 127) << 23;
    float two;
    std::memcpy(&two, &bits, 4);
    return x < -87.0f ? 0.0f : power * two;
}

INLINE f32x16 load16(const float* from) { return load<f32x16>(from); }
INLINE f32x16 load16(const bfloat16* from) {
    return (f32x16)(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
}

// One sequence, one key head and its G query heads: scores over tokens [first, length), softmax, weighted values.
// DIM is a multiple of 16. A key is read once for all G heads; block by block, so that no position is divided.
template <int64_t DIM, typename T>
INLINE void attend_group(
    const T* q, const T* keys, const T* values, const int64_t* table, int64_t block_size, int64_t first,
    int64_t length, int64_t group, float scale, T* out, float* scores, float* query, float* sums) {
    constexpr int64_t PARTS = DIM / 16;
    const int64_t count = length - first;
    for (int64_t i = 0; i < group * DIM; i++) query[i] = to_float(q[i]) * scale;
    for (int64_t i = 0; i < group * DIM; i++) sums[i] = 0;
    for (int64_t position = first; position < length;) {
        const int64_t block = position / block_size;
        const int64_t end = (block + 1) * block_size < length ? (block + 1) * block_size : length;
        const T* key = keys + (table[block] * block_size + position % block_size) * DIM;
        for (; position < end; position++, key += DIM) {
            f32x16 k[PARTS];
            for (int64_t c = 0; c < PARTS; c++) k[c] = load16(key + 16 * c);
            for (int64_t g = 0; g < group; g++) {
                f32x16 products = k[0] * load16(query + g * DIM);
                for (int64_t c = 1; c < PARTS; c++) products += k[c] * load16(query + g * DIM + 16 * c);
                scores[g * count + position - first] = sum(products);
            }
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float* s = scores + g * count;
        float most = s[0], total = 0;
        for (int64_t t = 1; t < count; t++) most = s[t] > most ? s[t] : most;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < count; t++) {
            s[t] = exp_negative(s[t] - most);
            total += s[t];
        }
        const float share = 1.0f / total;
        for (int64_t t = 0; t < count; t++) s[t] *= share;
    }
    for (int64_t position = first; position < length;) {
        const int64_t block = position / block_size;
        const int64_t end = (block + 1) * block_size < length ? (block + 1) * block_size : length;
        const T* value = values + (table[block] * block_size + position % block_size) * DIM;
        const float* weight = scores + position - first;
        for (int64_t g = 0; g < group; g++) {
            f32x16 total[PARTS];
            for (int64_t c = 0; c < PARTS; c++) total[c] = load16(sums + g * DIM + 16 * c);
            for (int64_t t = 0; t < end - position; t++) {
                for (int64_t c = 0; c < PARTS; c++)
                    total[c] += load16(value + t * DIM + 16 * c) * weight[g * count + t];
            }
            std::memcpy(sums + g * DIM, total, sizeof total);
        }
        position = end;
    }
    for (int64_t i = 0; i < group * DIM; i++) put(out + i, sums[i]);
}

#define ATTEND(NAME, DIM, T)                                                                                        \
    EVERY_CPU void NAME(const T* q, const T* keys, const T* values, const int64_t* table, int64_t block_size,       \
                        int64_t first, int64_t length, int64_t group, float scale, T* out, float* scores,          \
                        float* query, float* sum) {                                                                \
        attend_group<DIM>(q, keys, values, table, block_size, first, length, group, scale, out, scores, query, sum); \
    }
ATTEND(attend_16, 16, bfloat16)
ATTEND(attend_32, 32, bfloat16)
ATTEND(attend_64, 64, bfloat16)
ATTEND(attend_80, 80, bfloat16)
ATTEND(attend_96, 96, bfloat16)
ATTEND(attend_128, 128, bfloat16)
ATTEND(attend_256, 256, bfloat16)
ATTEND(attend_16, 16, float)
ATTEND(attend_32, 32, float)
ATTEND(attend_64, 64, float)
ATTEND(attend_80, 80, float)
ATTEND(attend_96, 96, float)
ATTEND(attend_128, 128, float)
ATTEND(attend_256, 256, float)

template <typename T>
using Attend = void (*)(const T*, const T*, const T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, T*,
                        float*, float*, float*);

template <typename T>
Attend<T> attend_of(int64_t dim) {
    switch (dim) {
        case 16: return attend_16;
        case 32: return attend_32;
        case 64: return attend_64;
        case 80: return attend_80;
        case 96: return attend_96;
        case 128: return attend_128;
        case 256: return attend_256;
    }
    throw std::invalid_argument("head_dim without a kernel");
}

template <typename T>
void attend_all(uintptr_t q, uintptr_t keys, uintptr_t values, uintptr_t table, uintptr_t lengths, uintptr_t out,
                int64_t num_sequences, int64_t num_kv, int64_t group, int64_t dim, int64_t num_slots,
                int64_t block_size, int64_t width, int64_t window, float scale) {
    const auto* lengths_ = reinterpret_cast<const int64_t*>(lengths);
    const auto* table_ = reinterpret_cast<const int64_t*>(table);
    const Attend<T> attend = attend_of<T>(dim);
    int64_t most = 0;
    for (int64_t s = 0; s < num_sequences; s++) most = lengths_[s] > most ? lengths_[s] : most;
#pragma omp parallel
    {
        std::vector<float> scratch(group * most + 2 * group * dim);
        float* query = scratch.data() + group * most;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t s = 0; s < num_sequences; s++) {
            for (int64_t k = 0; k < num_kv; k++) {
                const int64_t length = lengths_[s];
                const int64_t first = window > 0 && length > window ? length - window : 0;
                const int64_t place = (s * num_kv + k) * group * dim;
                attend(reinterpret_cast<const T*>(q) + place,
                       reinterpret_cast<const T*>(keys) + k * num_slots * dim,
                       reinterpret_cast<const T*>(values) + k * num_slots * dim, table_ + s * width, block_size,
                       first, length, group, scale, reinterpret_cast<T*>(out) + place, scratch.data(), query,
                       query + group * dim);
            }
        }
    }
}

void decode_attention(bool is_bfloat16, uintptr_t q, uintptr_t keys, uintptr_t values, uintptr_t table,
                      uintptr_t lengths, uintptr_t out, int64_t num_sequences, int64_t num_kv, int64_t group,
                      int64_t dim, int64_t num_slots, int64_t block_size, int64_t width, int64_t window, float scale) {
    auto run = is_bfloat16 ? attend_all<bfloat16> : attend_all<float>;
    run(q, keys, values, table, lengths, out, num_sequences, num_kv, group, dim, num_slots, block_size, width, window, scale);
}

// Copy each token's keys (or values) of all heads to its slot. Strides and sizes in bytes.
void store_rows(uintptr_t from, uintptr_t slots, uintptr_t pool, int64_t num_tokens, int64_t num_kv,
                int64_t token_stride, int64_t head_bytes, int64_t num_slots) {
    const auto* slots_ = reinterpret_cast<const int64_t*>(slots);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t k = 0; k < num_kv; k++)
            std::memcpy(reinterpret_cast<char*>(pool) + (k * num_slots + slots_[t]) * head_bytes,
                        reinterpret_cast<const char*>(from) + t * token_stride + k * head_bytes, head_bytes);
}

// y = bf16(x / rms(x)) * weight, rounded twice as Llama's reference does.
EVERY_CPU void norm_row(const bfloat16* x, const bfloat16* weight, bfloat16* y, int64_t size, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / std::sqrt(sum / float(size) + eps);
    for (int64_t i = 0; i < size; i++) {
        bfloat16 normed;
        put(&normed, to_float(x[i]) * scale);
        put(y + i, to_float(normed) * to_float(weight[i]));
    }
}

void rms_norm(uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size > 65536)
    for (int64_t r = 0; r < rows; r++) {
        norm_row(reinterpret_cast<const bfloat16*>(x) + r * size, reinterpret_cast<const bfloat16*>(weight),
                 reinterpret_cast<bfloat16*>(y) + r * size, size, eps);
    }
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.def("decode_attention", &decode_attention);
    m.def("store_rows", &store_rows);
    m.def("rms_norm", &rms_norm);
    bimo::bind_fused(m);
    bimo::bind_training(m);
}
