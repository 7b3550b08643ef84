// Attention over the paged cache, for any number of query tokens of a sequence: one pass over the keys in stretches of
// 256, with running maxima and sums (the online softmax of FlashAttention, arXiv:2205.14135).
//
// A cache block holds 16 tokens, one a lane: with keys as [E/2][16][2], scores of 16 tokens come from E/2 products of
// pairs and no sum across lanes; with values as [8][E][2], 16 columns of the result from 8. int8 keys and values carry
// a scale a token and head, and lie four by four: keys [E/4][16][4], as codes 128 more than they stand for, and values
// [4][E][4]. Queries are then int8 too (both were spread by `hadamard`, so that no column has outliers), and weights
// are bytes whose step is a 255th of the heaviest in a stretch.
#pragma once
#include <type_traits>

#include "model.h"
#include "simd.h"

namespace bimo {
namespace BIMO_ISA {

constexpr int64_t STRETCH = 256;  // keys at a time
constexpr float UNSEEN = -1e30f;  // score of a key that a query must not see: its weight is 0 exactly
constexpr int64_t QUERY_ROWS = 24;  // query rows (tokens times heads of a group) at a time

// scores[r][16] of R queries with one block of keys. Two sums each, so that one need not wait for the other; the order of
// additions is the same for every R, so that a token's result does not depend on who is computed beside it.
template <int R>
INLINE void score_block(const uint16_t* keys, const uint16_t* queries, const int32_t*, int64_t dim, f32x16* out) {
    f32x16 total[2][R] = {};
    for (int64_t i = 0; i < dim / 2; i += 2)
        for (int c = 0; c < 2; c++)
            for (int r = 0; r < R; r++)
                total[c][r] = dot2(total[c][r], keys + (i + c) * 2 * LANES, queries + r * dim + 2 * (i + c));
    for (int r = 0; r < R; r++) out[r] = total[0][r] + total[1][r];
}
template <int R>  // starts: -128 * sum of a query's codes
INLINE void score_block(const int8_t* keys, const int8_t* queries, const int32_t* starts, int64_t dim, f32x16* out) {
    i32x16 total[2][R] = {};
    for (int r = 0; r < R; r++) total[0][r] = starts[r] - i32x16{};
    for (int64_t i = 0; i < dim / 4; i += 2)
        for (int c = 0; c < 2; c++) {
            const Codes codes = load_codes(reinterpret_cast<const uint8_t*>(keys) + (i + c) * 4 * LANES);
            for (int r = 0; r < R; r++) total[c][r] = dot4(total[c][r], codes, queries + r * dim + 4 * (i + c));
        }
    for (int r = 0; r < R; r++) out[r] = to_float(total[0][r] + total[1][r]);
}

INLINE f32x16 weigh(f32x16 total, const uint16_t* values, const uint16_t* weights) { return dot2(total, values, weights); }
INLINE i32x16 weigh(i32x16 total, const int8_t* values, const uint8_t* weights) { return dot4(total, values, weights); }

// sum[r][64 columns] += weights[r] . values of a stretch's blocks. PARTS: vectors of 16 columns at once.
template <int R, int PARTS, typename KV, typename P>
INLINE void weigh_blocks(const KV* values, const int64_t* blocks, int64_t num_blocks, int64_t block_size,
                         const P* weights, int64_t dim, int64_t column, float* sum, const float* factors) {
    using Sum = typename std::conditional<std::is_same<KV, uint16_t>::value, f32x16, i32x16>::type;
    constexpr int64_t TOGETHER = 4 / sizeof(KV);  // tokens
    Sum total[R][PARTS] = {};
    for (int64_t b = 0; b < num_blocks; b++) {
        const KV* block = values + blocks[b] * block_size + TOGETHER * column;
        for (int64_t t = 0; t < LANES; t += TOGETHER)
            for (int r = 0; r < R; r++)
                for (int c = 0; c < PARTS; c++)
                    total[r][c] = weigh(total[r][c], block + t * dim + TOGETHER * LANES * c,
                                        weights + r * STRETCH + b * LANES + t);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < PARTS; c++) {
            float* at = sum + r * dim + column + LANES * c;
            store(at, load<f32x16>(at) + __builtin_convertvector(total[r][c], f32x16) * factors[r]);
        }
}

template <int R, typename KV, typename P>
INLINE void weigh_rows(const KV* values, const int64_t* blocks, int64_t num_blocks, int64_t block_size,
                       const P* weights, int64_t dim, float* sum, const float* factors) {
    int64_t column = 0;
    for (; column + 64 <= dim; column += 64)
        weigh_blocks<R, 4>(values, blocks, num_blocks, block_size, weights, dim, column, sum, factors);
    for (; column < dim; column += 16)
        weigh_blocks<R, 1>(values, blocks, num_blocks, block_size, weights, dim, column, sum, factors);
}

#define FOR_ROWS(COUNT, LIMIT, CALL)          \
    switch (COUNT) {                          \
        case 1: CALL(1); break;               \
        case 2: CALL(2); break;               \
        case 3: CALL(3); break;               \
        default: CALL(LIMIT); break;          \
    }

struct QueryBlock {  // the query rows of one task: `tokens` consecutive tokens, `group` heads each
    int64_t tokens, group, first_position, window;
    const int64_t* blocks;  // the sequence's cache blocks
};

// KV memory of one layer and head: `keys` and `values` at block 0, and their scales for int8.
template <typename KV>
struct HeadCache {
    const KV *keys, *values;
    const float *key_scales, *value_scales;
};

// queries [rows][E] already scaled, by log2 e too (bfloat16; or int8 with query_scales and query_starts) -> out[row]
// pointers, E floats each.
template <typename KV>
void attend(const QueryBlock& work, const HeadCache<KV>& cache, const KV* queries, const float* query_scales,
            const int32_t* query_starts, int64_t dim, float* const* out) {
    constexpr bool INT8 = std::is_same<KV, int8_t>::value;
    using Weight = typename std::conditional<INT8, uint8_t, uint16_t>::type;
    const int64_t rows = work.tokens * work.group, block_size = dim * LANES;
    alignas(64) float scores[QUERY_ROWS][STRETCH];
    alignas(64) Weight weights[QUERY_ROWS][STRETCH];
    alignas(64) float sum[QUERY_ROWS * 256];
    float most[QUERY_ROWS], total[QUERY_ROWS], factors[QUERY_ROWS];
    for (int64_t i = 0; i < rows * dim; i++) sum[i] = 0;
    for (int64_t r = 0; r < rows; r++) most[r] = -INFINITY, total[r] = 0;
    const int64_t last_end = work.first_position + work.tokens;  // of the last token: what it sees ends here
    const int64_t first_seen =
        work.window > 0 && work.first_position + 1 > work.window ? work.first_position + 1 - work.window : 0;
    for (int64_t from = first_seen / LANES * LANES; from < last_end; from += STRETCH) {
        const int64_t until = from + STRETCH < last_end ? from + STRETCH : last_end;
        const int64_t num_blocks = (until - from + LANES - 1) / LANES;
        const int64_t* blocks = work.blocks + from / LANES;
        f32x16 value_scales[STRETCH / LANES];
        for (int64_t b = 0; INT8 && b < num_blocks; b++)
            value_scales[b] = load<f32x16>(cache.value_scales + blocks[b] * LANES);
        for (int64_t b = 0; b < num_blocks; b++) {
            const KV* keys = cache.keys + blocks[b] * block_size;
            f32x16 key_scale = splat(1.0f);
            if constexpr (INT8) key_scale = load<f32x16>(cache.key_scales + blocks[b] * LANES);
            for (int64_t r = 0; r < rows;) {
                const int64_t count = rows - r;
                f32x16 part[8];
                int64_t done = 0;
#define SCORE(R) score_block<R>(keys, queries + r * dim, query_starts + r, dim, part), done = R
                if (count >= 8) {
                    SCORE(8);
                } else {
                    FOR_ROWS(count, 4, SCORE)
                }
#undef SCORE
                for (int64_t i = 0; i < done; i++) {
                    if constexpr (INT8) part[i] *= key_scale * query_scales[r + i];
                    store(scores[r + i] + b * LANES, part[i]);
                }
                r += done;
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t position = work.first_position + r / work.group;
            const int64_t seen_from = work.window > 0 && position + 1 > work.window ? position + 1 - work.window : 0;
            const int64_t low = seen_from > from ? seen_from - from : 0;
            const int64_t high = position + 1 - from;  // may be beyond the stretch, or before it
            float* s = scores[r];
            for (int64_t i = 0; i < low && i < num_blocks * LANES; i++) s[i] = UNSEEN;
            for (int64_t i = high < 0 ? 0 : high; i < num_blocks * LANES; i++) s[i] = UNSEEN;
            f32x16 peak = splat(most[r]);
            for (int64_t b = 0; b < num_blocks; b++) peak = larger(peak, load<f32x16>(s + b * LANES));
            const float now = largest(peak);
            if (now <= UNSEEN) {  // nothing of this stretch is seen
                std::memset(weights[r], 0, sizeof weights[r]);
                factors[r] = 0;
                continue;
            }
            const float fade = now == most[r] ? 1.0f : std::exp2(most[r] - now);
            f32x16 added = {}, heaviest = {};
            for (int64_t b = 0; b < num_blocks; b++) {
                f32x16 p = exp2_negative(load<f32x16>(s + b * LANES) - now);
                added += p;
                if constexpr (INT8) {
                    p *= value_scales[b];
                    heaviest = larger(heaviest, p);
                    store(s + b * LANES, p);
                } else {
                    store(weights[r] + b * LANES, to_bf16(p));
                }
            }
            factors[r] = 1.0f;
            if constexpr (INT8) {
                const float weight = largest(heaviest), inverse = weight > 1e-30f ? 255.0f / weight : 0.0f;
                for (int64_t b = 0; b < num_blocks; b++) {
                    const i32x16 whole = nearest(load<f32x16>(s + b * LANES) * inverse);
                    store(weights[r] + b * LANES, lowest_bytes(whole));
                }
                factors[r] = weight * (1.0f / 255.0f);
            }
            if (fade != 1.0f)
                for (int64_t e = 0; e < dim; e += LANES) store(sum + r * dim + e, load<f32x16>(sum + r * dim + e) * fade);
            total[r] = total[r] * fade + bimo::BIMO_ISA::sum(added);
            most[r] = now;
        }
        for (int64_t r = 0; r < rows; r += 4) {
#define WEIGH(R) weigh_rows<R>(cache.values, blocks, num_blocks, block_size, weights[r], dim, sum + r * dim, factors + r)
            FOR_ROWS(rows - r, 4, WEIGH)
#undef WEIGH
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const float share = 1.0f / total[r];
        for (int64_t e = 0; e < dim; e += LANES) store(out[r] + e, load<f32x16>(sum + r * dim + e) * share);
    }
}

}  // namespace BIMO_ISA
}  // namespace bimo
