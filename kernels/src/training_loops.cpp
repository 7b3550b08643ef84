// The loops of training.h, compiled once for each instruction set (BIMO_ISA). Numbers that are not, and infinite ones,
// come out as torch's operators give them.
#include "simd.h"
#include "training.h"

namespace bimo {
namespace BIMO_ISA {

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t AT_HAND = 2048;  // exponentials that are kept until their sum is known; a multiple of LANES

INLINE f32x16 widened(u16x16 x) { return (f32x16)(__builtin_convertvector(x, u32x16) << 16); }
INLINE f32x16 read(const float* from) { return load<f32x16>(from); }
INLINE f32x16 read(const uint16_t* from) { return widened(load<u16x16>(from)); }
INLINE void write(float* to, f32x16 x) { store(to, x); }
INLINE void write(uint16_t* to, f32x16 x) {
#if !defined(__AVX512BF16__)
    x = x == x ? x : splat(__builtin_nanf(""));  // rounding would carry some into another number
#endif
    store(to, to_bf16(x));
}

// Sixteen or fewer: what is missing reads as `missing`, and is not written.
#if defined(__AVX512F__)
INLINE f32x16 read(const float* from, int64_t count, float missing = 0) {
    if (count >= LANES) return read(from);
    return (f32x16)_mm512_mask_loadu_ps(_mm512_set1_ps(missing), __mmask16((1u << count) - 1), from);
}
INLINE f32x16 read(const uint16_t* from, int64_t count, float missing = 0) {
    if (count >= LANES) return read(from);
    const __mmask16 mask = __mmask16((1u << count) - 1);
    const f32x16 found = widened((u16x16)_mm256_maskz_loadu_epi16(mask, from));
    return (f32x16)_mm512_mask_mov_ps(_mm512_set1_ps(missing), mask, (__m512)found);
}
INLINE void write(float* to, f32x16 x, int64_t count) {
    if (count >= LANES) return write(to, x);
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)x);
}
INLINE void write(uint16_t* to, f32x16 x, int64_t count) {
    if (count >= LANES) return write(to, x);
    uint16_t lanes[LANES];
    write(lanes, x);
    _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), (__m256i)load<u16x16>(lanes));
}
#else
template <typename T>
INLINE f32x16 read(const T* from, int64_t count, float missing = 0) {
    if (count >= LANES) return read(from);
    f32x16 lanes = splat(missing);
    for (int64_t i = 0; i < count; i++) {
        if constexpr (sizeof(T) == 4) lanes[i] = from[i];
        else lanes[i] = from_bf16(from[i]);
    }
    return lanes;
}
template <typename T>
INLINE void write(T* to, f32x16 x, int64_t count) {
    if (count >= LANES) return write(to, x);
    T lanes[LANES];
    write(lanes, x);
    std::memcpy(to, lanes, count * sizeof(T));
}
#endif

// e^x for x <= 0 or not a number; 0 of minus infinity.
INLINE f32x16 exp_below(f32x16 x) {
    x *= 1.44269504f;
    return exp2_negative(x < -200.0f ? splat(-200.0f) : x);
}
INLINE f32x16 sigmoid(f32x16 x) {
    const f32x16 e = exp_below((f32x16)((u32x16)x | 0x80000000u)), share = 1.0f / (1.0f + e);
    return x < 0.0f ? e * share : share;
}

// Two sums side by side: an addition takes four cycles.
INLINE float sum_of_exps(const uint16_t* x, int64_t count, float most) {
    f32x16 sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        sums[0] += exp_below(read(x + i) - most);
        sums[1] += exp_below(read(x + i + LANES) - most);
    }
    for (; i < count; i += LANES) sums[0] += exp_below(read(x + i, count - i, -HUGE_VALF) - most);
    return sum(sums[0] + sums[1]);
}
INLINE float largest_of(const uint16_t* x, int64_t count) {
    f32x16 most[2] = {splat(-HUGE_VALF), splat(-HUGE_VALF)};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        most[0] = larger(most[0], read(x + i));
        most[1] = larger(most[1], read(x + i + LANES));
    }
    for (; i < count; i += LANES) most[0] = larger(most[0], read(x + i, count - i, -HUGE_VALF));
    return largest(larger(most[0], most[1]));
}

void cross_entropy(uint16_t* logits, const int64_t* targets, float* losses, int64_t words, float smoothing,
                   bool slopes, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        uint16_t* x = logits + row * words;
        const float most = largest_of(x, words), total = sum_of_exps(x, words, most);
        const float log_total = most + std::log(total), target = from_bf16(x[targets[row]]);
        float loss = (1 - smoothing) * (log_total - target);
        const float spread = smoothing / float(words);
        if (smoothing != 0) {
            f32x16 differences = {};
            for (int64_t i = 0; i < words; i += LANES) differences += log_total - read(x + i, words - i, log_total);
            loss += spread * sum(differences);
        }
        losses[row] = loss;
        if (!slopes) continue;
        const float share = 1.0f / total;
        for (int64_t i = 0; i < words; i += LANES) {
            const f32x16 p = exp_below(read(x + i, words - i, most) - most) * share;
            write(x + i, p - spread, words - i);
        }
        // the target's again: rounding the probability before one is taken from it would lose what is left
        const float p = exp_below(splat(target - most))[0] * share;
        write(x + targets[row], splat(p - spread - (1 - smoothing)), 1);
    }
}

void swiglu(const uint16_t* gate_up, uint16_t* out, int64_t inner, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const uint16_t *gate = gate_up + row * 2 * inner, *up = gate + inner;
        for (int64_t i = 0; i < inner; i += LANES) {
            const int64_t left = inner - i;
            const f32x16 g = read(gate + i, left);
            write(out + row * inner + i, g * sigmoid(g) * read(up + i, left), left);
        }
    }
}

void swiglu_backward(const uint16_t* gate_up, const uint16_t* d_out, uint16_t* d_gate_up, int64_t inner, int64_t first,
                     int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const int64_t at = row * 2 * inner;
        for (int64_t i = 0; i < inner; i += LANES) {
            const int64_t left = inner - i;
            const f32x16 g = read(gate_up + at + i, left), u = read(gate_up + at + inner + i, left);
            const f32x16 d = read(d_out + row * inner + i, left), s = sigmoid(g);
            write(d_gate_up + at + i, d * u * s * (1.0f + g * (1.0f - s)), left);
            write(d_gate_up + at + inner + i, d * g * s, left);
        }
    }
}

// Where a token's first head lies in the blocks, and how far apart its heads are.
struct Place {
    int64_t at, apart;
};
INLINE Place place_of(const HeadsCopy& c, int64_t token) {
    const int64_t b = token / c.tokens, t = token % c.tokens, block = t / c.block, begin = block * c.block;
    const int64_t count = c.tokens - begin < c.block ? c.tokens - begin : c.block;
    return {((begin * c.batch + b * count) * c.heads + t - begin) * c.dim, count * c.dim};
}

// One head of one token. Pairs are (x_i, x_{i + E/2}); sin is negated for the first of them (and for the way back the
// other way round).
INLINE void turn(const uint16_t* from, uint16_t* to, const float* cos, const float* sin, float sign, float scale,
                 int64_t dim) {
    if (cos == nullptr) {
        if (scale == 1.0f) {
            std::memcpy(to, from, dim * sizeof *to);
            return;
        }
        for (int64_t i = 0; i < dim; i += LANES) write(to + i, read(from + i, dim - i) * scale, dim - i);
        return;
    }
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        const f32x16 a = read(from + i, left), b = read(from + half + i, left), c = read(cos + i, left) * scale;
        const f32x16 s = read(sin + half + i, left) * (scale * sign);
        write(to + i, a * c - b * s, left);
        write(to + half + i, b * c + a * s, left);
    }
}

void to_blocks(const HeadsCopy& c, int64_t first, int64_t end) {
    for (int64_t token = first; token < end; token++) {
        const Place place = place_of(c, token);
        const float *cos = c.cos ? c.cos + token * c.dim : nullptr, *sin = c.sin ? c.sin + token * c.dim : nullptr;
        for (int64_t h = 0; h < c.heads; h++)
            turn(c.rows + token * c.width + h * c.dim, c.blocks + place.at + h * place.apart, cos, sin, 1, c.scale,
                 c.dim);
    }
}

void from_blocks(const HeadsCopy& c, int64_t first, int64_t end) {
    for (int64_t token = first; token < end; token++) {
        const Place place = place_of(c, token);
        const float *cos = c.cos ? c.cos + token * c.dim : nullptr, *sin = c.sin ? c.sin + token * c.dim : nullptr;
        for (int64_t h = 0; h < c.heads; h++)
            turn(c.blocks + place.at + h * place.apart, c.rows + token * c.width + h * c.dim, cos, sin, -1, c.scale,
                 c.dim);
    }
}

void add_norm(const float* x, const uint16_t* delta, const float* weight, float* total, uint16_t* normed, float* scales,
              int64_t size, float eps, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const float* from = x + row * size;
        f32x16 squares = {};
        for (int64_t i = 0; i < size; i += LANES) {
            f32x16 v = read(from + i, size - i);
            if (delta) {
                v += read(delta + row * size + i, size - i);
                write(total + row * size + i, v, size - i);
            }
            squares += v * v;
        }
        if (delta) from = total + row * size;
        const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
        scales[row] = scale;
        for (int64_t i = 0; i < size; i += LANES)
            write(normed + row * size + i, read(from + i, size - i) * scale * read(weight + i, size - i), size - i);
    }
}

// y = x s w with s = 1 / rms(x): dx = s (w dy - x s^2 mean(x w dy)), dw = sum of x s dy.
void add_norm_backward(const float* total, const float* weight, const float* scales, const float* d_sum,
                       const uint16_t* d_normed, float* d_x, uint16_t* d_delta, float* d_weight, int64_t size,
                       int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const float* x = total + row * size;
        const uint16_t* dy = d_normed + row * size;
        const float scale = scales[row];
        f32x16 products = {};
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t left = size - i;
            const f32x16 v = read(x + i, left), d = read(dy + i, left);
            products += v * d * read(weight + i, left);
            write(d_weight + i, read(d_weight + i, left) + v * scale * d, left);
        }
        const float back = sum(products) / float(size) * scale * scale;
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t left = size - i;
            f32x16 d = scale * (read(dy + i, left) * read(weight + i, left) - read(x + i, left) * back);
            if (d_sum) d += read(d_sum + row * size + i, left);
            write(d_x + row * size + i, d, left);
            if (d_delta) write(d_delta + row * size + i, d, left);
        }
    }
}

void add(const float* x, const uint16_t* delta, float* total, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i += LANES) write(total + i, read(x + i, end - i) + read(delta + i, end - i), end - i);
}

void round(const float* from, uint16_t* to, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i += LANES) write(to + i, read(from + i, end - i), end - i);
}

struct Seen {  // keys
    int64_t first, end;
};
INLINE Seen seen_by(const Scores& block, int64_t row) {
    const int64_t b = row / (block.heads * block.count), t = block.from + row % block.count;
    return {block.starts[b * block.tokens + t], t + 1};
}

void softmax(const Scores& block, uint16_t* scores, int64_t first, int64_t end) {
    const int64_t keys = block.from + block.count;
    for (int64_t row = first; row < end; row++) {
        const Seen seen = seen_by(block, row);
        uint16_t* all = scores + row * keys;
        std::memset(all, 0, seen.first * sizeof *all);
        std::memset(all + seen.end, 0, (keys - seen.end) * sizeof *all);
        uint16_t* x = all + seen.first;
        const int64_t count = seen.end - seen.first;
        const float most = largest_of(x, count);
        if (count > AT_HAND) {
            const float share = 1.0f / sum_of_exps(x, count, most);
            for (int64_t i = 0; i < count; i += LANES)
                write(x + i, exp_below(read(x + i, count - i, most) - most) * share, count - i);
            continue;
        }
        float exps[AT_HAND];
        f32x16 sums = {};
        for (int64_t i = 0; i < count; i += LANES) {
            const f32x16 e = exp_below(read(x + i, count - i, -HUGE_VALF) - most);
            write(exps + i, e);
            sums += e;
        }
        const float share = 1.0f / sum(sums);
        for (int64_t i = 0; i < count; i += LANES) write(x + i, read(exps + i) * share, count - i);
    }
}

void softmax_backward(const Scores& block, const uint16_t* weights, uint16_t* d_weights, int64_t first, int64_t end) {
    const int64_t keys = block.from + block.count;
    for (int64_t row = first; row < end; row++) {
        const Seen seen = seen_by(block, row);
        const uint16_t* w = weights + row * keys + seen.first;
        uint16_t* all = d_weights + row * keys;
        std::memset(all, 0, seen.first * sizeof *all);
        std::memset(all + seen.end, 0, (keys - seen.end) * sizeof *all);
        uint16_t* d = all + seen.first;
        const int64_t count = seen.end - seen.first;
        f32x16 products = {};
        for (int64_t i = 0; i < count; i += LANES) products += read(w + i, count - i) * read(d + i, count - i);
        const float mean = sum(products);
        for (int64_t i = 0; i < count; i += LANES)
            write(d + i, read(w + i, count - i) * (read(d + i, count - i) - mean), count - i);
    }
}

}  // namespace
}  // namespace BIMO_ISA

#define TRAINING_(isa) isa##_training
#define TRAINING(isa) TRAINING_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)
extern const TrainingLoops TRAINING(BIMO_ISA) = {
    TEXT(BIMO_ISA),           BIMO_ISA::cross_entropy, BIMO_ISA::swiglu, BIMO_ISA::swiglu_backward,
    BIMO_ISA::to_blocks,      BIMO_ISA::from_blocks,   BIMO_ISA::add_norm, BIMO_ISA::add_norm_backward,
    BIMO_ISA::add,            BIMO_ISA::round,         BIMO_ISA::softmax, BIMO_ISA::softmax_backward};

}  // namespace bimo
