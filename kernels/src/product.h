// y = W x with 8-bit or 4-bit weights and activations quantised on the way: the loop where nearly all time goes.
//
// Activations get one scale for every 32 of them (a single one for a whole row lets one outlier flatten the
// rest), and lie in tiles of up to 8 rows, [columns/4][rows][4], so that a step through a panel meets them in order.
// With unsigned codes q and signed activations a: sum (q - 128) a = sum q a - 128 sum a, so 8-bit sums start at
// -128 sum a, and 4-bit ones add minimum * sum a.
#pragma once
#include "model.h"
#include "simd.h"

namespace bimo {
namespace BIMO_ISA {

struct Activations {
    int64_t rows = 0, padded = 0, groups = 0;
    int8_t* codes = nullptr;    // tile i at 8 * i * padded
    float* scales = nullptr;    // tile i at 8 * i * groups: [groups][width]
    int32_t* starts = nullptr;  // -128 * sum of codes, the same order
    float* sums = nullptr;      // scale * sum of codes

    static int64_t bytes(int64_t rows, int64_t padded) {
        const int64_t whole = (rows + TILE - 1) / TILE * TILE;
        return whole * (padded + 3 * 4 * (padded / GROUP));
    }
    Activations(void* memory, int64_t rows_, const Matrix& matrix)
        : rows(rows_), padded(matrix.padded), groups(matrix.groups()) {
        const int64_t whole = (rows + TILE - 1) / TILE * TILE;
        codes = static_cast<int8_t*>(memory);
        scales = reinterpret_cast<float*>(codes + whole * padded);
        starts = reinterpret_cast<int32_t*>(scales + whole * groups);
        sums = reinterpret_cast<float*>(starts + whole * groups);
    }
    int64_t tiles() const { return (rows + TILE - 1) / TILE; }
    int64_t width(int64_t tile) const {  // rows computed: 1, 2, 4 or 8
        const int64_t left = rows - tile * TILE;
        return left > 4 ? 8 : left > 2 ? 4 : left;
    }
};

// Quantise `count` floats (the rest of the group counts as zero) into group `g` of a row.
INLINE void quantise_group(Activations& to, int64_t row, int64_t g, const float* x, int64_t count) {
    alignas(64) float values[GROUP] = {};
    std::memcpy(values, x, count * sizeof(float));
    const int64_t tile = row / TILE, width = to.width(tile), place = row % TILE, vectors = GROUP / LANES;
    f32x16 most = {};
    for (int64_t i = 0; i < vectors; i++) {
        const f32x16 v = load<f32x16>(values + LANES * i);
        most = larger(most, v < 0.0f ? -v : v);
    }
    const float peak = largest(most), scale = peak / 127.0f, inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    int8_t* codes = to.codes + tile * TILE * to.padded + g * GROUP * width + 4 * place;
    i32x16 total = {};
    for (int64_t i = 0; i < vectors; i++) {
        // 1.5 * 2^23 leaves the nearest whole number in the lowest bits
        const f32x16 shifted = load<f32x16>(values + LANES * i) * inverse + 12582912.0f;
        const i32x16 whole = (i32x16)shifted - 0x4b400000;
        total += whole;
        int8_t bytes[16];
        store(bytes, __builtin_convertvector(whole, i8x16));
        for (int64_t j = 0; j < 4; j++) std::memcpy(codes + (4 * i + j) * 4 * width, bytes + 4 * j, 4);
    }
    const int32_t sum_codes = sum(total);
    const int64_t at = tile * TILE * to.groups + g * width + place;
    to.scales[at] = scale;
    to.starts[at] = -128 * sum_codes;
    to.sums[at] = scale * float(sum_codes);
}

INLINE void quantise_row(Activations& to, int64_t row, const float* x, int64_t columns) {
    for (int64_t g = 0; g < to.groups; g++) {
        const int64_t left = columns - g * GROUP;
        quantise_group(to, row, g, x + g * GROUP, left < GROUP ? left : GROUP);
    }
}

// The rows of the last tile that exist only to make its width 2, 4 or 8.
INLINE void clear_padding_rows(Activations& to, int64_t tile) {
    alignas(64) static const float zeros[GROUP] = {};
    const int64_t first = tile * TILE;
    for (int64_t row = to.rows; row < first + to.width(tile); row++)
        for (int64_t g = 0; g < to.groups; g++) quantise_group(to, row, g, zeros, GROUP);
}

// NB panels by one tile of MB rows -> out [NB][MB][16].
template <int MB, int NB, Format FORMAT>
INLINE void multiply(const Matrix& w, int64_t panel, const Activations& x, int64_t tile, float* out) {
    const int64_t groups = x.groups;
    const int8_t* a = x.codes + tile * TILE * x.padded;
    const float *scales = x.scales + tile * TILE * groups, *sums = x.sums + tile * TILE * groups;
    const int32_t* starts = x.starts + tile * TILE * groups;
    const uint8_t* codes[NB];
    const uint16_t* halves[NB];
    constexpr int64_t PER_GROUP = FORMAT == Format::BLOCK4 ? 2 * LANES : LANES;
    for (int n = 0; n < NB; n++) {
        codes[n] = w.codes + (panel + n) * w.panel_bytes();
        halves[n] = w.scales + (panel + n) * groups * PER_GROUP;
    }
    f32x16 total[NB][MB] = {};
    for (int64_t g = 0; g < groups; g++) {
        i32x16 part[NB][MB];
        for (int m = 0; m < MB; m++) {
            const i32x16 start = FORMAT == Format::BLOCK4 ? i32x16{} : starts[g * MB + m] - i32x16{};
            for (int n = 0; n < NB; n++) part[n][m] = start;
        }
        if constexpr (FORMAT == Format::BLOCK4) {
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                for (int n = 0; n < NB; n++) {
                    Codes low, high;
                    load_halves(codes[n] + 64 * s, low, high);
                    for (int m = 0; m < MB; m++) part[n][m] = dot4(part[n][m], low, a + 4 * (s * MB + m));
                    for (int m = 0; m < MB; m++) part[n][m] = dot4(part[n][m], high, a + 4 * ((s + 4) * MB + m));
                }
            }
            for (int n = 0; n < NB; n++) codes[n] += 256;
            a += 32 * MB;
        } else {
            constexpr int STEPS = GROUP / 4;
#pragma GCC unroll 4
            for (int s = 0; s < STEPS; s++) {
                for (int n = 0; n < NB; n++) {
                    const Codes c = load_codes(codes[n] + 64 * s);
                    for (int m = 0; m < MB; m++) part[n][m] = dot4(part[n][m], c, a + 4 * (s * MB + m));
                }
            }
            for (int n = 0; n < NB; n++) codes[n] += 64 * STEPS;
            a += 4 * STEPS * MB;
        }
        for (int n = 0; n < NB; n++) {
            const f32x16 scale = half_to_float(halves[n] + g * PER_GROUP);
            f32x16 minimum = {};
            if constexpr (FORMAT == Format::BLOCK4) minimum = half_to_float(halves[n] + g * PER_GROUP + LANES);
            for (int m = 0; m < MB; m++) {
                total[n][m] += to_float(part[n][m]) * (scale * scales[g * MB + m]);
                if constexpr (FORMAT == Format::BLOCK4) total[n][m] += minimum * sums[g * MB + m];
            }
        }
    }
    for (int n = 0; n < NB; n++) {
        f32x16 bias = {};
        if (w.bias) bias = load<f32x16>(w.bias + (panel + n) * LANES);
        for (int m = 0; m < MB; m++) store(out + (n * MB + m) * LANES, total[n][m] + bias);
    }
}

template <Format FORMAT>
void multiply_panels(const Matrix& w, int64_t panel, int64_t count, const Activations& x, int64_t tile, float* out) {
    const int64_t end = panel + count, width = x.width(tile), size = width * LANES;
    if (width == 1) {  // several panels at once, so that one sum need not wait for the other
        for (; panel + 4 <= end; panel += 4, out += 4 * size) multiply<1, 4, FORMAT>(w, panel, x, tile, out);
        for (; panel < end; panel++, out += size) multiply<1, 1, FORMAT>(w, panel, x, tile, out);
    } else if (width == 2) {
        for (; panel + 4 <= end; panel += 4, out += 4 * size) multiply<2, 4, FORMAT>(w, panel, x, tile, out);
        for (; panel < end; panel++, out += size) multiply<2, 1, FORMAT>(w, panel, x, tile, out);
    } else if (width == 4) {
        for (; panel + 2 <= end; panel += 2, out += 2 * size) multiply<4, 2, FORMAT>(w, panel, x, tile, out);
        for (; panel < end; panel++, out += size) multiply<4, 1, FORMAT>(w, panel, x, tile, out);
    } else {
        for (; panel < end; panel++, out += size) multiply<8, 1, FORMAT>(w, panel, x, tile, out);
    }
}

// `count` panels from `panel` on, by one tile -> out [count][width][16].
INLINE void multiply_panels(const Matrix& w, int64_t panel, int64_t count, const Activations& x, int64_t tile,
                            float* out) {
    switch (w.format) {
        case Format::BLOCK8: return multiply_panels<Format::BLOCK8>(w, panel, count, x, tile, out);
        case Format::BLOCK4: return multiply_panels<Format::BLOCK4>(w, panel, count, x, tile, out);
    }
}

// One row of the matrix as floats: an embedding that is tied to the head.
inline void read_row(const Matrix& w, int64_t row, float* to) {  // 8 bits only
    const int64_t panel = row / LANES, lane = row % LANES;
    const uint8_t* codes = w.codes + panel * w.panel_bytes() + 4 * lane;
    const uint16_t* halves = w.scales + panel * w.groups() * LANES;
    for (int64_t g = 0; g < w.groups(); g++) {
        const float scale = half_to_float(halves + g * LANES)[lane];
        for (int64_t c = g * GROUP; c < (g + 1) * GROUP && c < w.columns; c++)
            to[c] = scale * float(int(codes[c / 4 * 64 + c % 4]) - 128);
    }
}

}  // namespace BIMO_ISA
}  // namespace bimo
