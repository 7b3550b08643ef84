// One step of a decoder: all its layers over a row of tokens, in one parallel region. Compiled once for each
// instruction set (BIMO_ISA names it); the formulas are those of bimo/models/{decoder,attention,layers}.py.
//
// A layer, and where a phase ends (|):
//   norm, quantise | q k v, rotate, store in the cache | attend | quantise | out, add | norm, quantise |
//   gate and up, activate, quantise | down, add |
// Before each product, where the step has rows of an adapter that changes it: its A x | (low_rank.h)
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <type_traits>

#include "attention.h"
#include "low_rank.h"
#include "product.h"
#include "team.h"

namespace bimo {
namespace BIMO_ISA {

namespace {

struct Task {  // attention: one head group of some tokens of a sequence
    const Span* span;
    int64_t head, first, tokens;
};

struct Buffers {
    int64_t rows;
    float *x, *attended, *angles, *query_scales;
    int32_t* query_starts;
    char* queries;
    char *normed, *heads, *inner;  // quantised
    LowRow* low;                   // of adapters
    std::vector<Task> tasks;
};

// Memory that is asked for once and grows: a step allocates nothing.
char* scratch(int which, int64_t bytes) {
    struct Byte {  // a type of this instruction set: so are the vector's own functions then
        char value;
    };
    static thread_local std::vector<Byte> memory[11];
    if (int64_t(memory[which].size()) < bytes + 64) memory[which].resize(bytes + 64);
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory[which].data()) + 63) & ~uintptr_t(63));
}

INLINE float reciprocal_rms(const float* x, int64_t size, float eps) {
    f32x16 squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const f32x16 v = load<f32x16>(x + i);
        squares += v * v;
    }
    return 1.0f / std::sqrt(sum(squares) / float(size) + eps);
}

INLINE void normalise(const Model& m, const Norm& norm, const float* x, float* y) {
    const int64_t size = m.hidden;
    if (!m.layer_norm) {
        const float scale = reciprocal_rms(x, size, m.norm_eps);
        for (int64_t i = 0; i < size; i += LANES)
            store(y + i, load<f32x16>(x + i) * scale * load<f32x16>(norm.weight + i));
        return;
    }
    f32x16 total = {}, squares = {};
    for (int64_t i = 0; i < size; i += LANES) total += load<f32x16>(x + i);
    const float mean = sum(total) / float(size);
    for (int64_t i = 0; i < size; i += LANES) {
        const f32x16 v = load<f32x16>(x + i) - mean;
        squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + m.norm_eps);
    for (int64_t i = 0; i < size; i += LANES)
        store(y + i, (load<f32x16>(x + i) - mean) * scale * load<f32x16>(norm.weight + i) + load<f32x16>(norm.bias + i));
}

INLINE f32x16 activate(Activation kind, f32x16 x) {
    if (kind == Activation::RELU) return larger(x, f32x16{});
    if (kind == Activation::GELU) {
        for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
        return x;
    }
    // x times sigmoid(z): z = x for SiLU; GELU's tanh form is x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
    const f32x16 z = kind == Activation::SILU ? x : 1.59576912f * (x + 0.044715f * x * x * x);
    const f32x16 e = exp_negative(z < 0.0f ? z : -z);
    return x * (z < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// Norm (or none) and quantisation of rows, tile by tile; `rows` names those of x, none: the first ones.
INLINE void quantise_rows(const Model& m, const Norm* norm, const float* x, int64_t columns, Activations& to,
                          int64_t first, int64_t end, const int64_t* rows = nullptr) {
    float* room = reinterpret_cast<float*>(scratch(0, to.padded * 4));
    for (int64_t tile = first; tile < end; tile++) {
        for (int64_t row = tile * TILE; row < to.rows && row < (tile + 1) * TILE; row++) {
            const float* from = x + (rows ? rows[row] : row) * columns;
            if (norm) {
                normalise(m, *norm, from, room);
                from = room;
            }
            quantise_row(to, row, from, columns, room);
        }
        clear_padding_rows(to, tile);
    }
}

// One head of one token, E floats: q/k norm, rotation by the token's angles (cos, then sin, E/2 each).
INLINE void turn(const Model& m, const float* norm, const float* angles, float* head) {
    const int64_t dim = m.head_dim, half = dim / 2;
    if (norm) {
        const float scale = reciprocal_rms(head, dim, m.norm_eps);
        for (int64_t i = 0; i < dim; i += LANES) store(head + i, load<f32x16>(head + i) * scale * load<f32x16>(norm + i));
    }
    if (!m.frequencies) return;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const f32x16 a = load<f32x16>(head + i), b = load<f32x16>(head + i + half);
        const f32x16 cosine = load<f32x16>(angles + i), sine = load<f32x16>(angles + half + i);
        store(head + i, a * cosine - b * sine);
        store(head + i + half, b * cosine + a * sine);
    }
    for (; i < half; i++) {
        const float a = head[i], b = head[i + half], cosine = angles[i], sine = angles[half + i];
        head[i] = a * cosine - b * sine;
        head[i + half] = b * cosine + a * sine;
    }
}

INLINE float peak_of(const float* x, int64_t size) {
    f32x16 most = {};
    for (int64_t i = 0; i < size; i += LANES) most = larger(most, size_of(load<f32x16>(x + i)));
    return largest(most);
}

// Rounded x * inverse; returns their sum.
INLINE uint32_t to_whole(const float* x, int64_t size, float inverse, int8_t* to) {
    u32x16 total = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const i32x16 whole = nearest(load<f32x16>(x + i) * inverse);
        total += (u32x16)whole;
        store(to + i, lowest_bytes(whole));
    }
    return sum(total);
}

// The queries of a head of keys lie side by side, a token after the other.
INLINE int64_t place_of_query(const Model& m, const Buffers& b, int64_t row, int64_t head) {
    const int64_t group = m.heads / m.kv_heads;
    return (head / group * b.rows + row) * group + head % group;
}

// Spread a head's outliers; returns what products of two such heads are larger by.
INLINE float spread(float* head, int64_t dim) {
    if (dim % HADAMARD == 0) {
        hadamard<HADAMARD / LANES>(head, head, dim);
        return HADAMARD;
    }
    hadamard<1>(head, head, dim);
    return LANES;
}

INLINE void put_query(const Model& m, Buffers& b, int64_t row, int64_t head, float* q) {
    const int64_t dim = m.head_dim, place = place_of_query(m, b, row, head);
    if (!m.kv_int8) {
        auto* to = reinterpret_cast<uint16_t*>(b.queries) + place * dim;
        for (int64_t i = 0; i < dim; i += LANES) store(to + i, to_bf16(load<f32x16>(q + i) * m.attention_scale));
        return;
    }
    const float larger = spread(q, dim), peak = peak_of(q, dim);
    int8_t* codes = reinterpret_cast<int8_t*>(b.queries) + place * dim;
    b.query_starts[place] = int32_t(0u - 128u * to_whole(q, dim, peak > 1e-30f ? 127.0f / peak : 0.0f, codes));
    b.query_scales[place] = m.attention_scale * peak / (127.0f * larger);
}

// A token's key into the block of its slot: bfloat16 [E/2][16][2], int8 [E/4][16][4].
template <typename T>
INLINE void scatter_key(const T* from, int64_t dim, int64_t slot, T* block) {
    constexpr int64_t TOGETHER = 4 / sizeof(T);
    for (int64_t e = 0; e < dim; e += TOGETHER) std::memcpy(block + e * LANES + TOGETHER * slot, from + e, 4);
}

// A value: bfloat16 [8][E][2], int8 [4][E][4].
template <typename T>
INLINE void scatter_value(const T* from, int64_t dim, int64_t slot, T* block) {
    if (slot == 0) std::memset(block, 0, LANES * dim * sizeof(T));  // a weight of 0 must meet numbers, not leftovers
    constexpr int64_t TOGETHER = 4 / sizeof(T), BITS = 8 * sizeof(T);
    typedef uint32_t Word __attribute__((may_alias));
    typedef typename std::make_unsigned<T>::type Number;
    Word* to = reinterpret_cast<Word*>(block + slot / TOGETHER * TOGETHER * dim);
    const int shift = int(slot % TOGETHER * BITS);
    const uint32_t kept = ~(uint32_t(Number(~Number(0))) << shift);
    for (int64_t e = 0; e < dim; e++) to[e] = (to[e] & kept) | (uint32_t(Number(from[e])) << shift);
}

// A key or value of one head into its slot of the cache.
INLINE void put_cache(const Model& m, int64_t layer, int64_t head, bool is_key, int64_t block, int64_t slot, float* x) {
    const int64_t dim = m.head_dim, place = (layer * m.kv_heads + head) * m.num_blocks + block;
    char* pool = is_key ? m.keys : m.values;
    if (!m.kv_int8) {
        uint16_t rounded[256], *to = reinterpret_cast<uint16_t*>(pool) + place * LANES * dim;
        for (int64_t i = 0; i < dim; i += LANES) store(rounded + i, to_bf16(load<f32x16>(x + i)));
        return is_key ? scatter_key(rounded, dim, slot, to) : scatter_value(rounded, dim, slot, to);
    }
    if (is_key) spread(x, dim);
    const float peak = peak_of(x, dim);
    int8_t whole[256], *to = reinterpret_cast<int8_t*>(pool) + place * LANES * dim;
    to_whole(x, dim, peak > 1e-30f ? 127.0f / peak : 0.0f, whole);
    if (is_key) {
        for (int64_t i = 0; i < dim; i++) whole[i] = int8_t(whole[i] ^ -128);  // an unsigned code, 128 more
        scatter_key(whole, dim, slot, to);
    } else {
        scatter_value(whole, dim, slot, to);
    }
    float* scales = (is_key ? m.key_scales : m.value_scales) + place * LANES;
    if (slot == 0) std::memset(scales, 0, LANES * sizeof(float));
    scales[slot] = peak / 127.0f;
}

// Heads of q, k and v, head_dim / 16 panels of the matrix each. A head of k or v belongs to one thread, whose tokens
// share the cache's blocks and words; heads of q are shared out 64 rows at a time as well.
INLINE int64_t head_parts(const Model& m, int64_t tiles) {
    return 2 * m.kv_heads + m.heads * ((tiles + TILES - 1) / TILES);
}
INLINE void make_heads(const Model& m, int64_t number_of_layer, const Step& step, const Activations& normed,
                       const Changes& changes, Buffers& b, int64_t first, int64_t end) {
    const Layer& layer = m.layers[number_of_layer];
    const int64_t dim = m.head_dim, panels = dim / LANES;
    alignas(64) float out[256 * TILE * TILES], head[256];
    const int64_t chunks = (normed.tiles() + TILES - 1) / TILES;
    for (int64_t part = first; part < end; part++) {
        const int64_t of_query = part - 2 * m.kv_heads;  // keys and values, which are longest, come first
        const bool is_query = of_query >= 0, is_key = part < m.kv_heads;
        const int64_t h = is_query ? of_query / chunks : m.heads + part;
        const int64_t begin = is_query ? of_query % chunks * TILES * TILE : 0;
        const int64_t until = is_query ? std::min(step.num_tokens, begin + TILES * TILE) : step.num_tokens;
        const float* norm = is_query ? layer.q_norm : is_key ? layer.k_norm : nullptr;
        const Span* span = step.spans.data();
        for (int64_t row = begin; row < until; row++) {
            if (row % (TILES * TILE) == 0) changes.multiply(layer.qkv, h * panels, panels, normed, row / TILE, out);
            for (int64_t p = 0; p < panels; p++)
                store(head + p * LANES, load<f32x16>(out + place_of(row, p, panels)));
            if (is_query || is_key) turn(m, norm, b.angles + row * dim, head);
            if (is_query) {
                put_query(m, b, row, h, head);
                continue;
            }
            while (row >= span->row + span->count) span++;
            const int64_t position = span->start + row - span->row;
            put_cache(m, number_of_layer, (h - m.heads) % m.kv_heads, is_key, span->blocks[position / LANES],
                      position % LANES, head);
        }
    }
}

// Ask for the blocks of keys and values that a task reads first: one of a short sequence is over before memory answers.
INLINE void ask_for(const Model& m, int64_t layer, const Task& task) {
    const int64_t bytes = LANES * m.head_dim * (m.kv_int8 ? 1 : 2);
    const int64_t head = (layer * m.kv_heads + task.head) * m.num_blocks;
    const int64_t position = task.span->start + task.first, window = m.layers[layer].window;
    const int64_t first = (window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0) / LANES;
    for (int64_t b = first; b <= std::min(position / LANES, first + 7); b++) {
        const int64_t at = (head + task.span->blocks[b]) * bytes;
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(m.keys + at + line, 0, 2);
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(m.values + at + line, 0, 2);
        if (m.kv_int8) {
            __builtin_prefetch(m.key_scales + (head + task.span->blocks[b]) * LANES, 0, 2);
            __builtin_prefetch(m.value_scales + (head + task.span->blocks[b]) * LANES, 0, 2);
        }
    }
}

template <typename KV>
INLINE void attend_task(const Model& m, int64_t layer, const Task& task, Buffers& b) {
    const int64_t dim = m.head_dim, group = m.heads / m.kv_heads, rows = task.tokens * group;
    const int64_t first = task.span->row + task.first, place = place_of_query(m, b, first, task.head * group);
    float* out[QUERY_ROWS];
    for (int64_t r = 0; r < rows; r++)
        out[r] = b.attended + ((first + r / group) * m.heads + task.head * group + r % group) * dim;
    const int64_t head = (layer * m.kv_heads + task.head) * m.num_blocks;
    HeadCache<KV> cache{reinterpret_cast<const KV*>(m.keys) + head * LANES * dim,
                        reinterpret_cast<const KV*>(m.values) + head * LANES * dim, m.key_scales + head * LANES,
                        m.value_scales + head * LANES};
    QueryBlock work{task.tokens, group, task.span->start + task.first, m.layers[layer].window, task.span->blocks};
    attend(work, cache, reinterpret_cast<const KV*>(b.queries) + place * dim, b.query_scales + place,
           b.query_starts + place, dim, out);
}

// y += W x for some panels.
INLINE void add_product(const Matrix& w, const Activations& x, const Changes& changes, float* y, int64_t columns,
                        int64_t first, int64_t end) {
    alignas(64) float out[LANES * TILE * TILES];
    for (int64_t panel = first; panel < end; panel++) {
        for (int64_t row = 0; row < x.rows; row++) {
            if (row % (TILES * TILE) == 0) changes.multiply(w, panel, 1, x, row / TILE, out);
            float* at = y + row * columns + panel * LANES;
            store(at, load<f32x16>(at) + load<f32x16>(out + place_of(row, 0, 1)));
        }
    }
}

// The MLP's inner values, made and quantised some columns at a time, so that they are never written as floats.
template <int64_t COLUMNS>
INLINE void make_inner(const Model& m, const Layer& layer, const Activations& normed, const Changes& changes,
                       Activations& inner, int64_t first, int64_t end) {
    constexpr int64_t per_piece = COLUMNS / LANES;
    const int64_t panels = m.gated ? 2 * per_piece : per_piece;
    alignas(64) float out[LANES * TILE * TILES * 2 * per_piece];
    for (int64_t s = first; s < end; s++) {
        for (int64_t row = 0; row < inner.padded_rows(); row++) {
            if (row % (TILES * TILE) == 0) changes.multiply(layer.up, s * panels, panels, normed, row / TILE, out);
            f32x16 values[per_piece];
            for (int64_t p = 0; p < per_piece; p++) {
                const float* at = out + place_of(row, m.gated ? 2 * p : p, panels);
                values[p] = activate(m.activation, load<f32x16>(at));
                if (m.gated) values[p] *= load<f32x16>(at + TILE * LANES);
            }
            if constexpr (COLUMNS == HADAMARD) hadamard(values);
            quantise_section(inner, row, s, per_piece, [&](int64_t i) { return values[i]; });
        }
    }
}

void look_up(const Model& m, const Step& step, Buffers& b, int64_t first, int64_t end) {
    const int64_t half = m.head_dim / 2;
    for (const Span& span : step.spans) {
        for (int64_t i = 0; i < span.count; i++) {
            const int64_t row = span.row + i, position = span.start + i, token = step.token_ids[row];
            if (row < first || row >= end) continue;
            float* x = b.x + row * m.hidden;
            if (m.embedding)
                for (int64_t c = 0; c < m.hidden; c++) x[c] = from_bf16(m.embedding[token * m.hidden + c]);
            else
                read_row(m.head, token, x);
            if (m.positions)
                for (int64_t c = 0; c < m.hidden; c++) x[c] += m.positions[position * m.hidden + c];
            for (int64_t f = 0; m.frequencies && f < half; f++) {
                const float angle = float(position) * m.frequencies[f];
                b.angles[row * m.head_dim + f] = std::cos(angle) * m.rope_factor;
                b.angles[row * m.head_dim + half + f] = std::sin(angle) * m.rope_factor;
            }
        }
    }
}

void list_tasks(const Model& m, const Step& step, int threads, Buffers& b) {
    const int64_t group = m.heads / m.kv_heads, most = std::max<int64_t>(1, QUERY_ROWS / group);
    b.tasks.clear();
    for (const Span& span : step.spans)
        for (int64_t first = 0; first < span.count; first += most)
            for (int64_t head = 0; head < m.kv_heads; head++)
                b.tasks.push_back({&span, head, first, std::min(most, span.count - first)});
    if (threads > 1)  // the longest first, so that none is left over for one thread at the end
        std::stable_sort(b.tasks.begin(), b.tasks.end(), [](const Task& one, const Task& other) {
            return (one.span->start + one.first) * one.tokens > (other.span->start + other.first) * other.tokens;
        });
}

// The largest number of each row and where it is, of equals the first; made of vectors that come in rising order.
struct Largest {
    f32x16 most = splat(-INFINITY);
    i32x16 where = {};
    void take(f32x16 values, int64_t column) {
        if (!any_larger(values, most)) return;  // nearly always, after the first hundreds
        where = values > most ? int32_t(column) + i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} : where;
        most = larger(values, most);
    }
};
// A score and its word as one number: the larger score's is larger, of equal scores the first word's.
INLINE uint64_t rank(float score, int64_t word) {
    score += 0.0f;  // -0 is 0
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    bits = bits >> 31 ? ~bits : bits | 0x80000000;
    return uint64_t(bits) << 32 | uint32_t(~word);
}
typedef std::atomic<uint64_t> Rank;

// y [rows][w.rows] = W x, of the rows of x [..][w.columns] that `which` names (none: the first ones); and where the
// largest of each row is. Either may be left out: the scores of 64 rows are 12 MB, all of whose lines would be written.
INLINE void project(Worker& worker, const Matrix& w, const float* x, const int64_t* which, int64_t rows, char* memory,
                    float* y, Rank* best) {
    Activations quantised(memory, rows, w);
    worker.run(quantised.tiles(), [&](int64_t first, int64_t end) {
        quantise_rows(Model{}, nullptr, x, w.columns, quantised, first, end, which);
    });
    worker.run(w.panels, [&](int64_t first, int64_t end) {
        alignas(64) float out[LANES * TILE * TILES];
        Largest* largest = best ? reinterpret_cast<Largest*>(scratch(8, rows * sizeof(Largest))) : nullptr;
        for (int64_t row = 0; best && row < rows; row++) largest[row] = {};
        for (int64_t panel = first; panel < end; panel++) {
            const int64_t column = panel * LANES, left = std::min(LANES, w.rows - column);
            for (int64_t row = 0; row < rows; row++) {
                if (row % (TILES * TILE) == 0) multiply_panels(w, panel, 1, quantised, row / TILE, out, [](int64_t) {});
                float* scores = out + place_of(row, 0, 1);
                if (left < LANES) {
                    if (y) std::memcpy(y + row * w.rows + column, scores, left * sizeof(float));
                    for (int64_t i = left; i < LANES; i++) scores[i] = -INFINITY;
                } else if (y) {
                    store(y + row * w.rows + column, load<f32x16>(scores));
                }
                if (best) largest[row].take(load<f32x16>(scores), column);
            }
        }
        for (int64_t row = 0; best && row < rows; row++) {
            uint64_t known = best[row].load(), mine = 0;
            for (int64_t i = 0; i < LANES; i++)
                mine = std::max(mine, rank(largest[row].most[i], largest[row].where[i]));
            while (mine > known && !best[row].compare_exchange_weak(known, mine)) {}
        }
    });
}

void forward(const Model& m, const Step& step) {
    const int64_t rows = step.num_tokens, width = m.heads * m.head_dim, scored = int64_t(step.scored.size());
    Buffers b;
    b.rows = rows;
    b.x = reinterpret_cast<float*>(scratch(1, rows * m.hidden * 4));
    b.attended = reinterpret_cast<float*>(scratch(2, rows * width * 4));
    b.angles = reinterpret_cast<float*>(scratch(3, rows * (m.head_dim + 2 * m.heads) * 4));
    b.query_scales = b.angles + rows * m.head_dim;
    b.query_starts = reinterpret_cast<int32_t*>(b.query_scales + rows * m.heads);
    b.queries = scratch(4, rows * width * 2);
    int64_t hidden_bytes = Activations::bytes(scored, m.head.padded), heads_bytes = 0, inner_bytes = 0;
    for (const Layer& layer : m.layers) {
        hidden_bytes = std::max(hidden_bytes, Activations::bytes(rows, std::max(layer.qkv.padded, layer.up.padded)));
        heads_bytes = std::max(heads_bytes, Activations::bytes(rows, layer.out.padded));
        inner_bytes = std::max(inner_bytes, Activations::bytes(rows, layer.down.padded));
    }
    b.normed = scratch(5, hidden_bytes);
    b.heads = scratch(6, heads_bytes);
    b.inner = scratch(7, inner_bytes);
    b.low = reinterpret_cast<LowRow*>(scratch(10, step.used.empty() ? 0 : rows * m.low_rank * sizeof(LowRow)));
    Rank* best = reinterpret_cast<Rank*>(scratch(9, scored * sizeof(Rank)));
    for (int64_t i = 0; i < scored; i++) new (best + i) Rank(rank(-INFINITY, 0));
    list_tasks(m, step, omp_get_max_threads(), b);
    as_a_team(rows, [&](Worker& worker) {
        const int64_t tiles = (rows + TILE - 1) / TILE;
        const auto changes_of = [&](int64_t layer, Part part, const Activations& x) {
            const Changes changes(m, step, layer, part, b.low);
            if (const int64_t pieces = changes.pieces(x))
                worker.run(pieces, [&](int64_t first, int64_t end) { changes.make(x, first, end); });
            return changes;
        };
        worker.run(rows, [&](int64_t first, int64_t end) { look_up(m, step, b, first, end); });
        for (int64_t l = 0; l < int64_t(m.layers.size()); l++) {
            const Layer& layer = m.layers[l];
            Activations normed(b.normed, rows, layer.qkv), heads(b.heads, rows, layer.out);
            worker.run(tiles, [&](int64_t first, int64_t end) {
                quantise_rows(m, &layer.attention_norm, b.x, m.hidden, normed, first, end);
            });
            const Changes to_qkv = changes_of(l, QKV, normed);
            worker.run(head_parts(m, tiles),
                       [&](int64_t first, int64_t end) { make_heads(m, l, step, normed, to_qkv, b, first, end); });
            worker.run(int64_t(b.tasks.size()), [&](int64_t first, int64_t end) {
                for (int64_t t = first; t < end; t++) {
                    if (t + 1 < int64_t(b.tasks.size())) ask_for(m, l, b.tasks[t + 1]);
                    if (m.kv_int8)
                        attend_task<int8_t>(m, l, b.tasks[t], b);
                    else
                        attend_task<uint16_t>(m, l, b.tasks[t], b);
                }
            });
            worker.run(tiles, [&](int64_t first, int64_t end) {
                quantise_rows(m, nullptr, b.attended, width, heads, first, end);
            });
            const Changes to_out = changes_of(l, OUT, heads);
            worker.run(layer.out.panels, [&](int64_t first, int64_t end) {
                add_product(layer.out, heads, to_out, b.x, m.hidden, first, end);
            });
            Activations normed_again(b.normed, rows, layer.up), inner(b.inner, rows, layer.down, true);
            worker.run(tiles, [&](int64_t first, int64_t end) {
                quantise_rows(m, &layer.mlp_norm, b.x, m.hidden, normed_again, first, end);
            });
            const Changes to_up = changes_of(l, UP, normed_again);
            worker.run(inner.sections(), [&](int64_t first, int64_t end) {
                if (inner.transformed)
                    make_inner<HADAMARD>(m, layer, normed_again, to_up, inner, first, end);
                else
                    make_inner<GROUP>(m, layer, normed_again, to_up, inner, first, end);
            });
            const Changes to_down = changes_of(l, DOWN, inner);
            worker.run(layer.down.panels, [&](int64_t first, int64_t end) {
                add_product(layer.down, inner, to_down, b.x, m.hidden, first, end);
            });
        }
        worker.run(rows, [&](int64_t first, int64_t end) {
            for (int64_t row = first; row < end; row++)
                normalise(m, m.final_norm, b.x + row * m.hidden, step.hidden + row * m.hidden);
        });
        if (scored) project(worker, m.head, step.hidden, step.scored.data(), scored, b.normed, step.logits, best);
    });
    for (int64_t i = 0; i < scored; i++) step.best[i] = uint32_t(~best[i].load());
}

void product(const Matrix& w, const float* x, int64_t rows, float* y) {
    char* memory = scratch(5, Activations::bytes(rows, w.padded));
    as_a_team(rows, [&](Worker& worker) { project(worker, w, x, nullptr, rows, memory, y, nullptr); });
}

void logits(const Model& m, const float* hidden, int64_t rows, float* out) { product(m.head, hidden, rows, out); }

// Read codes as the plainest int8 product of a matrix and one vector does; returns a number that depends on all.
double read_codes(const uint8_t* codes, int64_t bytes) {
    static const int8_t ones[4] = {1, 1, 1, 1};
    std::atomic<int64_t> total{0};
    as_a_team(1, [&](Worker& worker) {
        worker.run(bytes / 256, [&](int64_t first, int64_t end) {
            i32x16 sums[4] = {};
            for (int64_t i = first; i < end; i++)
                for (int j = 0; j < 4; j++) sums[j] = dot4(sums[j], load_codes(codes + 256 * i + 64 * j), ones);
            total += sum(sums[0] + sums[1] + sums[2] + sums[3]);
        });
    });
    return double(total);
}

}  // namespace
}  // namespace BIMO_ISA

#define KERNELS_(isa) isa##_kernels
#define KERNELS(isa) KERNELS_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)
extern const Kernels KERNELS(BIMO_ISA) = {TEXT(BIMO_ISA), BIMO_ISA::forward, BIMO_ISA::logits, BIMO_ISA::product,
                                          BIMO_ISA::read_codes};

}  // namespace bimo
