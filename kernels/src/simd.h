// Sixteen numbers side by side, and the three products that a processor may have an instruction for. Compiled once for
// each instruction set, in a namespace of its own (BIMO_ISA), so that no copy is taken for another's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace bimo {
namespace BIMO_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

template <typename V, typename T>
INLINE V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <typename V, typename T>
INLINE void store(T* to, V value) {
    std::memcpy(to, &value, sizeof value);
}
INLINE f32x16 splat(float x) { return x - f32x16{}; }
INLINE i32x16 nearest(f32x16 x) {  // below 2^22: 1.5 * 2^23 leaves the nearest whole number in the lowest bits
    return (i32x16)((u32x16)(x + 12582912.0f) - 0x4b400000u);
}
// The lowest byte of each. (Compilers make sixteen insertions of a __builtin_convertvector.)
INLINE i8x16 lowest_bytes(i32x16 x) {
#if defined(__AVX512F__)
    return (i8x16)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
    x &= 255;
    __m256i half[2];
    std::memcpy(half, &x, sizeof x);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
    return (i8x16)_mm256_castsi256_si128(bytes);
#else
    return __builtin_convertvector(x, i8x16);
#endif
}
INLINE f32x16 to_float(i32x16 x) { return __builtin_convertvector(x, f32x16); }
// a b + c, rounded once where the processor can. Said, not left to the compiler: it contracts the same line in one copy of a
// loop and not in another, and a token's result would depend on who is computed beside it.
INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    std::memcpy(&c, z, sizeof c);
    return c;
#else
    return a * b + c;
#endif
}
INLINE f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }
INLINE bool any_larger(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
    int32_t found = 0;
    const i32x16 above = a > b;
    for (int i = 0; i < 16; i++) found |= above[i];
    return found;
#endif
}
INLINE f32x16 size_of(f32x16 x) { return (f32x16)((u32x16)x & 0x7fffffff); }

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

// Across the lanes: halves with halves.
template <typename Eight, typename Four, typename Sixteen>
INLINE auto add_lanes(Sixteen x) {
    Eight eight[2];
    std::memcpy(eight, &x, sizeof x);
    eight[0] += eight[1];
    Four four[2];
    std::memcpy(four, eight, sizeof four);
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}
INLINE float sum(f32x16 x) { return add_lanes<f32x8, f32x4>(x); }
INLINE uint32_t sum(u32x16 x) { return add_lanes<u32x8, u32x4>(x); }
INLINE int32_t sum(i32x16 x) { return int32_t(sum((u32x16)x)); }
INLINE float largest(f32x16 x) {
    f32x8 eight[2];
    std::memcpy(eight, &x, sizeof x);
    eight[0] = eight[0] > eight[1] ? eight[0] : eight[1];
    f32x4 four[2];
    std::memcpy(four, eight, sizeof four);
    four[0] = four[0] > four[1] ? four[0] : four[1];
    const float a = four[0][0] > four[0][2] ? four[0][0] : four[0][2];
    const float b = four[0][1] > four[0][3] ? four[0][1] : four[0][3];
    return a > b ? a : b;
}

// Lanes i and i ^ D in each other's place; and +1 in lanes without the bit D, -1 in those with it.
template <int D>
INLINE f32x16 exchanged(f32x16 x) {
#if defined(__clang__)
    return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D, 8 ^ D, 9 ^ D, 10 ^ D,
                                   11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
#else
    return __builtin_shuffle(x, i32x16{0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D, 8 ^ D, 9 ^ D, 10 ^ D,
                                       11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D});
#endif
}
template <int D>
INLINE f32x16 alternating() {
    f32x16 signs = {};
    for (int i = 0; i < 16; i++) signs[i] = i & D ? -1.0f : 1.0f;
    return signs;
}

// 16 N numbers times sqrt(16 N) H, H the Hadamard matrix (Sylvester's, divided by that root: its own inverse). An outlier is
// spread over all of them, while products of two such rows stay as they are, but for 16 N (QuaRot, arXiv:2404.00456).
template <int N>
INLINE void hadamard(f32x16 (&x)[N]) {
    for (f32x16& part : x) {
        part = exchanged<1>(part) + part * alternating<1>();
        part = exchanged<2>(part) + part * alternating<2>();
        part = exchanged<4>(part) + part * alternating<4>();
        part = exchanged<8>(part) + part * alternating<8>();
    }
    for (int apart = 1; apart < N; apart *= 2)
        for (int i = 0; i < N; i++)
            if (!(i & apart)) {
                const f32x16 one = x[i], other = x[i + apart];
                x[i] = one + other, x[i + apart] = one - other;
            }
}

// The same for every 16 N of `size` numbers; `from` and `to` may be one.
template <int N>
INLINE void hadamard(const float* from, float* to, int64_t size) {
    for (int64_t at = 0; at < size; at += 16 * N) {
        f32x16 x[N];
        for (int i = 0; i < N; i++) x[i] = load<f32x16>(from + at + 16 * i);
        hadamard(x);
        for (int i = 0; i < N; i++) store(to + at + 16 * i, x[i]);
    }
}

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
INLINE uint16_t to_bf16(float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 64);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE u16x16 to_bf16(f32x16 x) {
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    u32x16 bits = (u32x16)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(bits, u16x16);
#endif
}
INLINE f32x16 half_to_float(const uint16_t* from) {  // 16 IEEE halves
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    f32x16 value;
    float* to = (float*)&value;
    _mm256_store_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
    _mm256_store_ps(to + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8))));
    return value;
#else
    // Halves to floats by exponent arithmetic: shift the bits into place, multiply by 2^112 to correct the bias
    // (subnormals come out right by themselves; weights' scales are never infinite).
    u32x16 bits = __builtin_convertvector(load<u16x16>(from), u32x16);
    f32x16 value = (f32x16)((bits & 0x7fff) << 13) * 5.192296858534828e33f;
    return (f32x16)((u32x16)value | ((bits & 0x8000) << 16));
#endif
}

// 2^x for x <= 0, relative error below 2e-7, 0 below 2^-126: 2^n for the nearest whole n times a polynomial, fitted to
// the least relative error on [-1/2, 1/2].
INLINE f32x16 exp2_negative(f32x16 x) {
#if defined(__AVX512F__)
    const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
#else
    const f32x16 kept = x < -126.0f ? splat(-126.0f) : x;
    const i32x16 whole = __builtin_convertvector(kept - 0.5f, i32x16);  // towards zero: the nearest, as x <= 0
    const f32x16 r = kept - to_float(whole);
#endif
    const f32x16 power =
        1.0f +
        r * (0.693147004f + r * (0.240222424f + r * (0.0555073359f + r * (0.00967151299f + r * 0.00132647273f))));
#if defined(__AVX512F__)
    return (f32x16)_mm512_scalef_ps((__m512)power, (__m512)n);
#else
    const f32x16 result = power * (f32x16)((whole + 127) << 23);
    return x < -126.0f ? splat(0.0f) : result;
#endif
}
INLINE f32x16 exp_negative(f32x16 x) { return exp2_negative(x * 1.44269504f); }

// --- 4 unsigned by 4 signed bytes in each of 16 lanes, added to 32-bit sums -------------------------------------------

#if defined(__AVX512VNNI__)
typedef __m512i Codes;
INLINE Codes load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
INLINE i32x16 dot4(i32x16 total, Codes codes, const int8_t* four) {
    int32_t bytes;
    std::memcpy(&bytes, four, 4);
    return (i32x16)_mm512_dpbusd_epi32((__m512i)total, codes, _mm512_set1_epi32(bytes));
}
INLINE void load_halves(const uint8_t* from, Codes& low, Codes& high) {
    const __m512i both = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
#elif defined(__AVX2__)
// vpmaddubsw would saturate: bytes are widened to 16 bits, those at even places apart from those at odd ones.
struct Codes {
    __m256i even[2], odd[2];
};
INLINE Codes split_codes(__m256i a, __m256i b) {
    const __m256i mask = _mm256_set1_epi16(255);
    return {{_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)}, {_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)}};
}
INLINE Codes load_codes(const uint8_t* from) {
    return split_codes(_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 32)));
}
INLINE i32x16 dot4(i32x16 total, const Codes& codes, const int8_t* four) {
    int32_t bytes;
    std::memcpy(&bytes, four, 4);
    const __m256i all = _mm256_set1_epi32(bytes);
    const __m256i odd = _mm256_srai_epi16(all, 8), even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8);
    __m256i sums[2];
    std::memcpy(sums, &total, sizeof total);
    for (int i = 0; i < 2; i++)
        sums[i] = _mm256_add_epi32(sums[i], _mm256_add_epi32(_mm256_madd_epi16(codes.even[i], even),
                                                             _mm256_madd_epi16(codes.odd[i], odd)));
    std::memcpy(&total, sums, sizeof total);
    return total;
}
INLINE void load_halves(const uint8_t* from, Codes& low, Codes& high) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i a = _mm256_loadu_si256((const __m256i*)from), b = _mm256_loadu_si256((const __m256i*)(from + 32));
    low = split_codes(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    high = split_codes(_mm256_and_si256(_mm256_srli_epi16(a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask));
}
#else
struct Codes {
    uint8_t byte[64];
};
INLINE Codes load_codes(const uint8_t* from) { return load<Codes>(from); }
INLINE i32x16 dot4(i32x16 total, const Codes& codes, const int8_t* four) {
    for (int lane = 0; lane < 16; lane++) {
        int32_t sum = 0;
        for (int i = 0; i < 4; i++) sum += int32_t(codes.byte[4 * lane + i]) * four[i];
        total[lane] += sum;
    }
    return total;
}
INLINE void load_halves(const uint8_t* from, Codes& low, Codes& high) {
    for (int i = 0; i < 64; i++) {
        low.byte[i] = from[i] & 15;
        high.byte[i] = from[i] >> 4;
    }
}
#endif

// --- pairs of bfloat16 in each of 16 lanes ---------------------------------------------------------------------------

INLINE f32x16 dot2(f32x16 total, const uint16_t* pairs, const uint16_t* two) {
    uint32_t bits;
    std::memcpy(&bits, two, 4);
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(pairs),
                                    (__m512bh)_mm512_set1_epi32(int32_t(bits)));
#else
    const u32x16 both = load<u32x16>(pairs);
    total += (f32x16)(both << 16) * from_bf16(uint16_t(bits));
    return total + (f32x16)(both & 0xffff0000u) * from_bf16(uint16_t(bits >> 16));
#endif
}

// --- 4 signed by 4 unsigned bytes in each of 16 lanes ----------------------------------------------------------------

INLINE i32x16 dot4(i32x16 total, const int8_t* fours, const uint8_t* four) {
    int32_t bytes;
    std::memcpy(&bytes, four, 4);
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32(bytes), _mm512_loadu_si512(fours));
#elif defined(__AVX2__)
    const __m256i all = _mm256_set1_epi32(bytes);
    const __m256i even = _mm256_and_si256(all, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(all, 8);
    __m256i sums[2];
    std::memcpy(sums, &total, sizeof total);
    for (int i = 0; i < 2; i++) {
        const __m256i x = _mm256_loadu_si256((const __m256i*)(fours + 32 * i));
        const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
        sums[i] = _mm256_add_epi32(
            sums[i], _mm256_add_epi32(_mm256_madd_epi16(x_even, even), _mm256_madd_epi16(x_odd, odd)));
    }
    std::memcpy(&total, sums, sizeof total);
    return total;
#else
    for (int lane = 0; lane < 16; lane++)
        for (int i = 0; i < 4; i++) total[lane] += int32_t(fours[4 * lane + i]) * four[i];
    return total;
#endif
}

}  // namespace BIMO_ISA
}  // namespace bimo
