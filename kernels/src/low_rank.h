// What adapters add to a matrix's results, y += B (A x) (LoRA, arXiv:2106.09685), each row its own adapter's.
//
//   A x    a phase of its own before the big product, from the same quantised activations: A has the matrix's format
//   B u    where the big product's results are still at hand, with u = A x rounded to 8 bits as well: with B and u in
//          bfloat16 adapters took half as long again
//
// The rows of a tile that have the same adapter are computed together, up to four, so that A and B are read once for them.
#pragma once
#include <type_traits>

#include "product.h"

namespace bimo {
namespace BIMO_ISA {

// One panel of a matrix by N rows of a tile -> out[N]: `multiply` (product.h) for rows that do not lie side by side.
template <int N, Format FORMAT>
INLINE void multiply_some(const Matrix& w, int64_t panel, const Activations& x, const RowGroup& group, f32x16 (&out)[N]) {
    constexpr int CHAINS = N == 1 ? 4 : 2;  // sums that need not wait for each other
    const int64_t width = x.width(group.tile), sections = x.sections(), first = group.tile * TILE;
    const uint8_t* codes = w.codes + panel * w.panel_bytes();
    const uint16_t* halves = w.scales + panel * w.panel_scales();
    const int8_t* a = x.codes + first * x.padded;
    const int64_t* place = group.rows;
    for (int n = 0; n < N; n++) out[n] = f32x16{};
    for (int64_t s = 0; s < sections; s++) {
        i32x16 part[CHAINS][N] = {};
        for (int n = 0; n < N; n++) part[0][n] = x.starts[first * sections + s * width + place[n]] - i32x16{};
        for (int64_t i = 0; i < x.section / 4; i += CHAINS)
            for (int c = 0; c < CHAINS; c++, codes += 64, a += 4 * width) {
                const Codes four = load_codes(codes);
                for (int n = 0; n < N; n++) part[c][n] = dot4(part[c][n], four, a + 4 * place[n]);
            }
        f32x16 scale = splat(1.0f);
        if constexpr (FORMAT == Format::BLOCK8) scale = half_to_float(halves + s * LANES);
        for (int n = 0; n < N; n++) {
            for (int c = 1; c < CHAINS; c++) part[0][n] += part[c][n];
            out[n] = multiply_add(to_float(part[0][n]), scale * x.scales[first * sections + s * width + place[n]], out[n]);
        }
    }
    if constexpr (FORMAT == Format::ROW8)
        for (int n = 0; n < N; n++) out[n] *= half_to_float(halves);
}

struct LowRow {  // 16 numbers of A x
    int8_t codes[LANES];
    int32_t start;  // -128 * sum of codes
    float scale;
};

class Changes {  // to the results of one matrix, by all adapters of a step
   public:
    // low: [T][m.low_rank] of the step's memory.
    Changes(const Model& m, const Step& step, int64_t layer, Part part, LowRow* low)
        : m_(m), step_(step), place_(layer * NUM_PARTS + part), low_(low) {
        const bool last = layer + 1 == int64_t(m.layers.size()) && part == NUM_PARTS - 1;
        for (int64_t adapter : step.used) {
            panels_ += of(adapter).down.panels;
            if (last) continue;
            const Matrix& next = m.adapters[adapter - 1].parts[place_ + 1].down;
            next_bytes_ += next.panels * next.panel_bytes();
        }
    }
    // Pieces of work of `make`; 0: nobody changes this matrix.
    int64_t pieces(const Activations& x) const { return panels_ * chunks(x); }

    // u = A x, some pieces of it: a panel of an adapter's A by up to TILES tiles.
    void make(const Activations& x, int64_t first, int64_t end) const {
        for (int64_t piece = first; piece < end; piece++) {
            int64_t panel = piece / chunks(x);
            auto adapter = step_.used.begin();
            while (panel >= of(*adapter).down.panels) panel -= of(*adapter++).down.panels;
            const Matrix& down = of(*adapter).down;
            each_group(piece % chunks(x), [&](const RowGroup& group, auto count) __attribute__((always_inline)) {
                if (group.adapter != *adapter) return;
                f32x16 u[count];
                if (down.format == Format::ROW8)
                    multiply_some<count, Format::ROW8>(down, panel, x, group, u);
                else
                    multiply_some<count, Format::BLOCK8>(down, panel, x, group, u);
                for (int n = 0; n < count; n++) keep(u[n], row(group, n)[panel]);
            });
        }
    }

    // multiply_panels (product.h), += B u.
    INLINE void multiply(const Matrix& w, int64_t panel, int64_t count, const Activations& x, int64_t tile,
                         float* out) const {
        multiply_panels(w, panel, count, x, tile, out, [&](int64_t panel) { ask_for(panel, w.panels); });
        if (panels_) add(panel, count, tile, out);
    }

   private:
    // += B u
    INLINE void add(int64_t panel, int64_t panels, int64_t tile, float* out) const {
        each_group(tile / TILES, [&](const RowGroup& group, auto count) __attribute__((always_inline)) {
            const LowRank& change = of(group.adapter);
            if (change.panels.empty()) return;
            float* at[count];
            const LowRow* low[count];
            for (int n = 0; n < count; n++) {
                at[n] = out + place_of(group.tile * TILE + group.rows[n], 0, panels);
                low[n] = row(group, n);
            }
            for (int64_t p = 0; p < panels; p++) {
                const LowRank::Panel up = change.panels[panel + p];
                const f32x16 scales = load<f32x16>(change.scales_of(up));
                const uint8_t* codes = change.scales_of(up) + sizeof scales;
                f32x16 y[count];
                for (int n = 0; n < count; n++) y[n] = load<f32x16>(at[n]);
                for (int64_t s = up.first; s < up.first + up.count; s++) {
                    i32x16 part[count];
                    for (int n = 0; n < count; n++) part[n] = low[n][s].start - i32x16{};
                    for (int64_t i = 0; i < LANES; i += 4, codes += 4 * LANES) {
                        const Codes four = load_codes(codes);
                        for (int n = 0; n < count; n++) part[n] = dot4(part[n], four, low[n][s].codes + i);
                    }
                    for (int n = 0; n < count; n++)
                        y[n] = multiply_add(to_float(part[n]), scales * low[n][s].scale, y[n]);
                }
                for (int n = 0; n < count; n++) store(at[n], y[n]), at[n] += TILE * LANES;
            }
        });
    }

    // Ask for a panel's B, and for a share of the next matrix's A's: the product that comes first takes longer than
    // memory's answer. A tenth of what adapters cost is saved.
    INLINE void ask_for(int64_t panel, int64_t panels) const {
        if (!panels_ && !next_bytes_) return;
        int64_t begin = next_bytes_ * panel / panels, end = next_bytes_ * (panel + 1) / panels;
        for (int64_t adapter : step_.used) {
            const std::vector<LowRank>& parts = m_.adapters[adapter - 1].parts;
            if (const LowRank& change = parts[place_]; !change.panels.empty()) {
                const LowRank::Panel& up = change.panels[panel];
                ask(change.scales_of(up), 0, 64 * LowRank::lines(up.count));
            }
            if (!next_bytes_) continue;
            const Matrix& next = parts[place_ + 1].down;
            const int64_t bytes = next.panels * next.panel_bytes();
            ask(next.codes, std::max<int64_t>(begin, 0), std::min(end, bytes));
            begin -= bytes, end -= bytes;
        }
    }
    INLINE static void ask(const uint8_t* numbers, int64_t begin, int64_t end) {
        for (int64_t line = (begin + 63) / 64 * 64; line < end; line += 64) __builtin_prefetch(numbers + line, 0, 2);
    }
    INLINE static void keep(f32x16 u, LowRow& to) {
        const float peak = largest(size_of(u));
        const i32x16 whole = nearest(u * (peak > 1e-30f ? 127.0f / peak : 0.0f));
        store(to.codes, lowest_bytes(whole));
        to.start = int32_t(0u - 128u * sum((u32x16)whole));
        to.scale = peak * (1.0f / 127.0f);
    }
    LowRow* row(const RowGroup& group, int n) const {
        return low_ + (group.tile * TILE + group.rows[n]) * m_.low_rank;
    }
    const LowRank& of(int64_t adapter) const { return m_.adapters[adapter - 1].parts[place_]; }
    static int64_t chunks(const Activations& x) { return (x.tiles() + TILES - 1) / TILES; }

    // Call work(group, number of its rows as a constant) for those of TILES tiles.
    template <typename Work>
    INLINE void each_group(int64_t chunk, Work&& work) const {
        const auto end = step_.groups.end();
        auto group = std::lower_bound(step_.groups.begin(), end, chunk * TILES,
                                      [](const RowGroup& group, int64_t tile) { return group.tile < tile; });
        for (; group != end && group->tile < (chunk + 1) * TILES; group++)
            switch (group->count) {
                case 1: work(*group, std::integral_constant<int, 1>{}); break;
                case 2: work(*group, std::integral_constant<int, 2>{}); break;
                case 3: work(*group, std::integral_constant<int, 3>{}); break;
                default: work(*group, std::integral_constant<int, 4>{}); break;
            }
    }
    const Model& m_;
    const Step& step_;
    const int64_t place_;
    LowRow* const low_;
    int64_t panels_ = 0, next_bytes_ = 0;  // of the A's of all adapters; of the matrix that comes next
};

}  // namespace BIMO_ISA
}  // namespace bimo
