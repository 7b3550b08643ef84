// What a model looks like to the fused step: sizes, packed matrices, one step's work. Plain data, no instructions of
// any one processor; Python owns the memory behind every pointer (bimo_kernels/fused.py) and keeps it alive.
//
// Legend: T tokens (rows) of a step, D hidden_size, F intermediate_size, H query heads, K key/value heads, G = H / K,
// E head_dim, V vocabulary. A *panel* is 16 output rows of a matrix side by side, the width of one vector of results.
#pragma once
#include <cstdint>
#include <vector>

namespace bimo {

constexpr int64_t LANES = 16;       // results computed side by side; also the tokens of a cache block
constexpr int64_t TILE = 8;         // activation rows that share one pass over a panel
constexpr int64_t GROUP = 32;       // columns that share a scale, of weights (as GGUF's blocks have) and activations
constexpr int64_t HADAMARD = 64;    // columns that are transformed together, of weights that have a scale a row
constexpr int64_t MOST_COLUMNS = 1 << 15;  // of such: with more, and sums of 32 bits would not hold them

// Weights are unsigned codes q; w = scale * (q - 128) for 8 bits, w = scale * q + minimum for 4.
//   BLOCK8   codes [panel][columns/4][16][4], scales float16 [panel][columns/32][16]
//   BLOCK4   codes [panel][columns/32][4][64]: byte b of part i holds column 4i + b%4 (low half) and 16 + 4i + b%4
//            (high half) of row b/4; scales and minima float16 [panel][columns/32][2][16]
//   ROW8     codes as BLOCK8, of W H with H the Hadamard matrix of every 64 columns (product.h, `hadamard`); scales float16
//            [panel][16], one a row of the matrix
enum class Format : int { BLOCK8, BLOCK4, ROW8 };

struct Matrix {
    Format format = Format::BLOCK8;
    int64_t rows = 0, columns = 0;  // of the plain matrix: y[rows] = W x[columns]
    int64_t padded = 0;             // columns rounded up to a whole group; what lies beyond is zero
    int64_t panels = 0;
    const uint8_t* codes = nullptr;
    const uint16_t* scales = nullptr;  // IEEE halves
    const float* bias = nullptr;    // [panels * 16], or none

    int64_t groups() const { return padded / GROUP; }
    int64_t panel_scales() const {  // halves
        return format == Format::ROW8 ? LANES : groups() * (format == Format::BLOCK4 ? 2 : 1) * LANES;
    }
    int64_t panel_bytes() const { return format == Format::BLOCK4 ? padded * LANES / 2 : padded * LANES; }
};

struct Norm {
    const float* weight = nullptr;
    const float* bias = nullptr;  // LayerNorm's; none: RMSNorm
};

struct Layer {
    Norm attention_norm, mlp_norm;
    Matrix qkv, out, up, down;  // `up`: gate and up panels in turn when the MLP is gated
    const float *q_norm = nullptr, *k_norm = nullptr;
    int64_t window = 0;  // 0: all tokens are seen
};

enum Part : int { QKV, OUT, UP, DOWN, NUM_PARTS };  // a layer's matrices

// What an adapter adds to a matrix's results: y += B (A x).
struct LowRank {
    struct Panel {              // of B: where it begins in `up`, in lines of 64 bytes: 16 float scales, then codes
        uint32_t line;          // [count][4][16][4] of every 16 columns from 16 `first` on; the others are zero
        uint16_t first, count;  // small, for there are hundreds a layer, and each is one more thing to wait for
    };
    static int64_t lines(int64_t count) { return 1 + count * LANES * LANES / 64; }
    Matrix down;                // A, its rows filled up to whole panels; ROW8 if the matrix is, else BLOCK8
    std::vector<Panel> panels;  // as many as the matrix has; none: the adapter leaves it as it is
    const uint8_t* up = nullptr;

    const uint8_t* scales_of(const Panel& panel) const { return up + int64_t(panel.line) * 64; }
};
struct Adapter {
    std::vector<LowRank> parts;  // [layer][NUM_PARTS]
};

enum class Activation : int { SILU, GELU, GELU_TANH, RELU };

struct Model {
    int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, inner = 0, vocabulary = 0;
    bool layer_norm = false, gated = true, kv_int8 = false;
    float norm_eps = 1e-5f, rope_factor = 1.0f;
    float attention_scale = 1.0f;  // of a score, times log2 e: weights are powers of two
    Activation activation = Activation::SILU;
    std::vector<Layer> layers;
    Norm final_norm;
    Matrix head;
    const uint16_t* embedding = nullptr;   // bfloat16 [V][D]; none: the rows of `head`, which is tied
    const float* positions = nullptr;      // learned [num_positions][D], or none
    int64_t num_positions = 0;
    const float* frequencies = nullptr;    // rotary [E / 2], or none
    // The cache, a layer after the other. bfloat16: keys [K][block][E/2][16][2], values [K][block][8][E][2]; int8: keys
    // [K][block][E/4][16][4], values [K][block][4][E][4], and one float32 scale a token and head [K][block][16] each.
    char *keys = nullptr, *values = nullptr;
    float *key_scales = nullptr, *value_scales = nullptr;
    int64_t num_blocks = 0;
    std::vector<Adapter> adapters;  // numbered from 1 on
    int64_t low_rank = 0;           // panels of the largest A
};

struct Span {  // a sequence's tokens in a step
    int64_t row, start, count;  // its first row, the position of that token, tokens
    const int64_t* blocks;
};

struct RowGroup {  // rows of a tile that have the same adapter, counted from the tile's first
    int64_t adapter, tile, count, rows[4];
};

struct Step {
    int64_t num_tokens = 0;
    const int64_t* token_ids = nullptr;
    std::vector<Span> spans;
    std::vector<RowGroup> groups;  // rows that have an adapter, tile by tile; none: nobody has
    std::vector<int64_t> used;     // the numbers of the adapters
    float* hidden = nullptr;      // out: [T][D], after the final norm
    std::vector<int64_t> scored;  // the rows whose logits are wanted
    float* logits = nullptr;      // out: [scored][V], or none
    int64_t* best = nullptr;      // out: [scored], the word of the highest logit, of equals the first
};

// What each instruction set provides.
struct Kernels {
    const char* name;
    void (*forward)(const Model&, const Step&);
    void (*logits)(const Model&, const float* hidden, int64_t rows, float* out);
    void (*product)(const Matrix&, const float* x, int64_t rows, float* y);  // for tests: y = W x
    double (*read_codes)(const uint8_t* codes, int64_t bytes);               // for limits: a plain int8 GEMV's pace
};
extern const Kernels portable_kernels;
#ifdef BIMO_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512bf16_kernels;
#endif

}  // namespace bimo
