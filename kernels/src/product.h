// y = W x with 8-bit or 4-bit weights and activations quantised on the way: the loop where nearly all time goes.
//
// Activations lie in tiles of up to 8 rows, [columns/4][rows][4], so that a step through a panel meets them in order.
// They get one scale for every 32 of them (one outlier would flatten a whole row), or, after `hadamard`, which leaves no
// outliers, one a row: sums are then whole numbers from end to end. An unsigned code q stands for q - 128, a signed
// activation for a: sum (q - 128) a = sum q a - 128 sum a, so 8-bit sums start at -128 sum a, and 4-bit ones add minimum
// * sum a.
#pragma once
#include <algorithm>

#include "model.h"
#include "simd.h"

namespace bimo {
namespace BIMO_ISA {

struct Activations {
    int64_t rows = 0, padded = 0, section = 0;  // section: columns that share a scale
    bool transformed = false;
    int8_t* codes = nullptr;    // tile i at 8 * i * padded
    float* scales = nullptr;    // tile i at 8 * i * sections: [sections][width]
    int32_t* starts = nullptr;  // -128 * sum of codes, the same order
    float* sums = nullptr;      // scale * sum of codes

    static int64_t bytes(int64_t rows, int64_t padded) {
        const int64_t whole = (rows + TILE - 1) / TILE * TILE;
        return whole * (padded + 3 * 4 * (padded / GROUP));
    }
    // in_pieces: made a few columns at a time, so that a row's largest is not known.
    Activations(void* memory, int64_t rows_, const Matrix& matrix, bool in_pieces = false)
        : rows(rows_), padded(matrix.padded), transformed(matrix.format == Format::ROW8) {
        section = !transformed ? GROUP : in_pieces ? HADAMARD : padded;
        const int64_t whole = (rows + TILE - 1) / TILE * TILE;
        codes = static_cast<int8_t*>(memory);
        scales = reinterpret_cast<float*>(codes + whole * padded);
        starts = reinterpret_cast<int32_t*>(scales + whole * sections());
        sums = reinterpret_cast<float*>(starts + whole * sections());
    }
    int64_t sections() const { return padded / section; }
    int64_t tiles() const { return (rows + TILE - 1) / TILE; }
    int64_t width(int64_t tile) const {  // rows computed: 1, 2, 4 or 8
        const int64_t left = rows - tile * TILE;
        return left > 4 ? 8 : left > 2 ? 4 : left;
    }
    int64_t padded_rows() const { return (tiles() - 1) * TILE + width(tiles() - 1); }
};

// Quantise a section of a row, whose numbers `read(i)` gives, 16 at a time.
template <typename Read>
INLINE void quantise_section(Activations& to, int64_t row, int64_t s, int64_t vectors, Read&& read) {
    const int64_t tile = row / TILE, width = to.width(tile), place = row % TILE;
    f32x16 sizes = {};
    for (int64_t i = 0; i < vectors; i++) sizes = larger(sizes, size_of(read(i)));
    const float peak = largest(sizes);
    const float scale = peak * (1.0f / 127.0f), inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    int8_t* codes = to.codes + tile * TILE * to.padded + s * to.section * width + 4 * place;
    u32x16 total = {};
    for (int64_t i = 0; i < vectors; i++) {
        const i32x16 whole = nearest(read(i) * inverse);
        total += (u32x16)whole;  // without signs: what a broken model's infinities become must overflow somehow
        int8_t bytes[16];
        store(bytes, lowest_bytes(whole));
        for (int64_t j = 0; j < 4; j++, codes += 4 * width) std::memcpy(codes, bytes + 4 * j, 4);
    }
    const uint32_t sum_codes = sum(total);
    const int64_t at = tile * TILE * to.sections() + s * width + place;
    to.scales[at] = to.transformed ? scale * 0.125f : scale;
    to.starts[at] = int32_t(0u - 128u * sum_codes);
    to.sums[at] = scale * float(int32_t(sum_codes));
}

// room: `padded` floats.
INLINE void quantise_row(Activations& to, int64_t row, const float* x, int64_t columns, float* room) {
    if (to.transformed) {
        hadamard<HADAMARD / LANES>(x, room, columns);
        x = room;
    }
    for (int64_t s = 0; s < to.sections(); s++) {
        const float* from = x + s * to.section;
        alignas(64) float padded[GROUP] = {};  // the rest of the last group counts as zero
        if (columns < (s + 1) * to.section) {
            std::memcpy(padded, from, (columns - s * GROUP) * sizeof(float));
            from = padded;
        }
        quantise_section(to, row, s, to.section / LANES, [&](int64_t i) { return load<f32x16>(from + i * LANES); });
    }
}

// The rows of the last tile that exist only to make its width 2, 4 or 8.
INLINE void clear_padding_rows(Activations& to, int64_t tile) {
    const int64_t first = tile * TILE;
    for (int64_t row = to.rows; row < first + to.width(tile); row++)
        for (int64_t s = 0; s < to.sections(); s++)
            quantise_section(to, row, s, to.section / LANES, [](int64_t) { return f32x16{}; });
}

// Ask for the next panel's codes, a group's at a time. One stream at a time: memory is read fastest in one long run, a run
// that the processor itself sees coming. With 8 rows the products take as long as the reading, and one must go on during
// the other: each tile asks for its share.
template <int PAIR>
INLINE void ask_for_next(const Matrix& w, const uint8_t* codes, int64_t bytes, int64_t tile, int64_t tiles) {
    for (int t = 0; t < PAIR; t++)
        for (int64_t line = 64 * (tile + t); line < bytes; line += 64 * tiles)
            __builtin_prefetch(codes + w.panel_bytes() + line, 0, 2);
}

// One panel by `PAIR` tiles of MB rows -> out [MB][16], a tile's `apart` floats after the other's. Two tiles at once read
// the codes once, 5-10 % faster, as 16 sums fit into 32 registers. Scales every 32 columns.
template <int MB, int PAIR, Format FORMAT>
INLINE void multiply_blocks(const Matrix& w, int64_t panel, const Activations& x, int64_t tile, float* out,
                            int64_t apart) {
    const int64_t groups = x.sections(), tiles = x.tiles();
    constexpr int64_t CODE_BYTES = FORMAT == Format::BLOCK4 ? 256 : 512;  // of a group
    constexpr int64_t HALVES = FORMAT == Format::BLOCK4 ? 2 * LANES : LANES;
    const uint8_t* codes = w.codes + panel * w.panel_bytes();
    const uint16_t* halves = w.scales + panel * w.panel_scales();
    const int8_t* a = x.codes + tile * TILE * x.padded;
    const int64_t next_tile = TILE * x.padded, next_groups = TILE * groups;
    const int64_t first = tile * TILE * groups;
    const float *scales = x.scales + first, *sums = x.sums + first;
    const int32_t* starts = x.starts + first;
    alignas(64) float total[PAIR][MB][LANES] = {};
    for (int64_t g = 0; g < groups; g++, scales += MB, sums += MB, starts += MB, a += GROUP * MB) {
        if constexpr (MB == TILE) {
            ask_for_next<PAIR>(w, codes, CODE_BYTES, tile, tiles);
            if (tile == 0) __builtin_prefetch(halves + groups * HALVES, 0, 2);
        }
        i32x16 part[PAIR][MB];
        for (int t = 0; t < PAIR; t++)
            for (int m = 0; m < MB; m++)
                part[t][m] = FORMAT == Format::BLOCK4 ? i32x16{} : starts[t * next_groups + m] - i32x16{};
        const auto add = [&](const Codes& c, int s) __attribute__((always_inline)) {
            for (int t = 0; t < PAIR; t++)
                for (int m = 0; m < MB; m++) part[t][m] = dot4(part[t][m], c, a + t * next_tile + 4 * (s * MB + m));
        };
        if constexpr (FORMAT == Format::BLOCK4) {
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                Codes low, high;
                load_halves(codes + 64 * s, low, high);
                add(low, s);
                add(high, s + 4);
            }
        } else {
#pragma GCC unroll 4
            for (int s = 0; s < 8; s++) add(load_codes(codes + 64 * s), s);
        }
        const f32x16 scale = half_to_float(halves);
        f32x16 minimum = {};
        if constexpr (FORMAT == Format::BLOCK4) minimum = half_to_float(halves + LANES);
        for (int t = 0; t < PAIR; t++)
            for (int m = 0; m < MB; m++) {
                f32x16 sum = load<f32x16>(total[t][m]);
                sum = multiply_add(to_float(part[t][m]), scale * scales[t * next_groups + m], sum);
                if constexpr (FORMAT == Format::BLOCK4) sum = multiply_add(minimum, splat(sums[t * next_groups + m]), sum);
                store(total[t][m], sum);
            }
        codes += CODE_BYTES, halves += HALVES;
    }
    f32x16 bias = {};
    if (w.bias) bias = load<f32x16>(w.bias + panel * LANES);
    for (int t = 0; t < PAIR; t++)
        for (int m = 0; m < MB; m++) store(out + t * apart + m * LANES, load<f32x16>(total[t][m]) + bias);
}

// The same with a scale a row of the matrix: sums are whole numbers within a section of the activations. Multiplications
// of numbers and of codes share the processor's units: one for 8 products of 4 is 13 % of the time.
template <int MB, int PAIR>
INLINE void multiply_rows(const Matrix& w, int64_t panel, const Activations& x, int64_t tile, float* out,
                          int64_t apart) {
    constexpr int CHAINS = MB <= 2 ? 2 : 1;  // sums that need not wait for each other
    const int64_t sections = x.sections(), tiles = x.tiles(), groups = x.section / GROUP;
    const uint8_t* codes = w.codes + panel * w.panel_bytes();
    const int8_t* a = x.codes + tile * TILE * x.padded;
    const int64_t next_tile = TILE * x.padded, next_sections = TILE * sections;
    const float* scales = x.scales + tile * next_sections;
    const int32_t* starts = x.starts + tile * next_sections;
    alignas(64) float total[PAIR][MB][LANES] = {};
    for (int64_t s = 0; s < sections; s++, scales += MB, starts += MB) {
        i32x16 part[CHAINS][PAIR][MB] = {};
        for (int t = 0; t < PAIR; t++)
            for (int m = 0; m < MB; m++) part[0][t][m] = starts[t * next_sections + m] - i32x16{};
        for (int64_t g = 0; g < groups; g++, a += GROUP * MB, codes += 512) {
            if constexpr (MB == TILE) ask_for_next<PAIR>(w, codes, 512, tile, tiles);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const Codes c = load_codes(codes + 64 * i);
                for (int t = 0; t < PAIR; t++)
                    for (int m = 0; m < MB; m++)
                        part[i % CHAINS][t][m] = dot4(part[i % CHAINS][t][m], c, a + t * next_tile + 4 * (i * MB + m));
            }
        }
        for (int t = 0; t < PAIR; t++)
            for (int m = 0; m < MB; m++) {
                i32x16 whole = part[0][t][m];
                for (int i = 1; i < CHAINS; i++) whole += part[i][t][m];
                const f32x16 scale = splat(scales[t * next_sections + m]);
                store(total[t][m], multiply_add(to_float(whole), scale, load<f32x16>(total[t][m])));
            }
    }
    f32x16 bias = {};
    if (w.bias) bias = load<f32x16>(w.bias + panel * LANES);
    const f32x16 scale = half_to_float(w.scales + panel * LANES);
    for (int t = 0; t < PAIR; t++)
        for (int m = 0; m < MB; m++) store(out + t * apart + m * LANES, multiply_add(load<f32x16>(total[t][m]), scale, bias));
}

template <int MB, int PAIR, Format FORMAT>
INLINE void multiply(const Matrix& w, int64_t panel, const Activations& x, int64_t tile, float* out, int64_t apart) {
    if constexpr (FORMAT == Format::ROW8)
        multiply_rows<MB, PAIR>(w, panel, x, tile, out, apart);
    else
        multiply_blocks<MB, PAIR, FORMAT>(w, panel, x, tile, out, apart);
}

// Returns how many tiles it took.
template <Format FORMAT>
int64_t multiply_panel(const Matrix& w, int64_t panel, const Activations& x, int64_t tile, int64_t end, float* out,
                       int64_t apart) {
#if defined(__AVX512F__)
    if (tile + 1 < end && x.width(tile + 1) == TILE) {
        multiply<TILE, 2, FORMAT>(w, panel, x, tile, out, apart);
        return 2;
    }
#endif
    switch (x.width(tile)) {
        case 1: multiply<1, 1, FORMAT>(w, panel, x, tile, out, apart); break;
        case 2: multiply<2, 1, FORMAT>(w, panel, x, tile, out, apart); break;
        case 4: multiply<4, 1, FORMAT>(w, panel, x, tile, out, apart); break;
        default: multiply<TILE, 1, FORMAT>(w, panel, x, tile, out, apart); break;
    }
    return 1;
}

constexpr int64_t TILES = 8;  // tiles that a panel, once it is near, is multiplied by before the next one

// `count` panels from `panel` on by up to TILES tiles from `tile` on -> out [tile][panel][TILE][16]. before(panel) is called
// where memory has time for something else.
template <typename Before>
INLINE void multiply_panels(const Matrix& w, int64_t panel, int64_t count, const Activations& x, int64_t tile,
                            float* out, Before&& before) {
    const int64_t end = std::min(tile + TILES, x.tiles()), apart = count * TILE * LANES;
    for (int64_t p = 0; p < count; p++) {
        before(panel + p);
        for (int64_t t = tile; t < end;) {
            float* to = out + (t - tile) * apart + p * TILE * LANES;
            switch (w.format) {
                case Format::BLOCK8: t += multiply_panel<Format::BLOCK8>(w, panel + p, x, t, end, to, apart); break;
                case Format::BLOCK4: t += multiply_panel<Format::BLOCK4>(w, panel + p, x, t, end, to, apart); break;
                case Format::ROW8: t += multiply_panel<Format::ROW8>(w, panel + p, x, t, end, to, apart); break;
            }
        }
    }
}

// Where a row's results of the `panel`th of `count` are in `out`.
INLINE int64_t place_of(int64_t row, int64_t panel, int64_t count) {
    return ((row / TILE % TILES * count + panel) * TILE + row % TILE) * LANES;
}

// One row of the matrix as floats: an embedding that is tied to the head.
inline void read_row(const Matrix& w, int64_t row, float* to) {  // 8 bits only
    const int64_t panel = row / LANES, lane = row % LANES;
    const uint8_t* codes = w.codes + panel * w.panel_bytes() + 4 * lane;
    const uint16_t* halves = w.scales + panel * w.panel_scales();
    const auto value = [&](int64_t c) { return float(int(codes[c / 4 * 64 + c % 4]) - 128); };
    if (w.format != Format::ROW8) {
        for (int64_t c = 0; c < w.columns; c++) to[c] = half_to_float(halves + c / GROUP * LANES)[lane] * value(c);
        return;
    }
    const float scale = half_to_float(halves)[lane] * 0.125f;
    for (int64_t c = 0; c < w.columns; c++) to[c] = scale * value(c);
    hadamard<HADAMARD / LANES>(to, to, w.columns);
}

}  // namespace BIMO_ISA
}  // namespace bimo
