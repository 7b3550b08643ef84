// The elementwise parts of a training step on a CPU, each as one pass over memory: what a chain of torch operators reads
// and writes several times. Products stay torch's. Each function works on the rows [first, end), by itself, so that no
// result depends on how rows are shared among threads; training.cpp shares them out.
//
// Residual path and sums are float32, everything that products read or give is bfloat16.
// Legend: V vocabulary, F intermediate_size, D hidden_size, B rows of a batch, T tokens of each, E head_dim.
#pragma once
#include <cstdint>

namespace bimo {

// A part of (B T, width) rows of heads, and the same numbers as products of attention want them: every `block` tokens
// of all B rows and heads together, [T / block][B][heads][block][E] (the last block may be shorter).
struct HeadsCopy {
    uint16_t *rows, *blocks;
    int64_t width, heads, tokens, dim, block;  // width: of a row of `rows`, of which the heads are a part
    int64_t batch;
    const float *cos, *sin;  // (B T, E) each, sin negated in its first half (models/layers.py); none: no rotation
    float scale;
};

// A block of attention: [B][heads][count][from + count], query t of row b being token from + t of T, who sees the keys
// starts[b T + from + t] up to itself.
struct Scores {
    const int32_t* starts;
    int64_t heads, tokens, from, count;
};

struct TrainingLoops {
    const char* name;
    // logits (n, V) become softmax(logits) - target, where `slopes`; losses (n).
    void (*cross_entropy)(uint16_t* logits, const int64_t* targets, float* losses, int64_t words, float smoothing,
                          bool slopes, int64_t first, int64_t end);
    // gate_up (n, 2 F) -> silu(gate) up (n, F); and back.
    void (*swiglu)(const uint16_t* gate_up, uint16_t* out, int64_t inner, int64_t first, int64_t end);
    void (*swiglu_backward)(const uint16_t* gate_up, const uint16_t* d_out, uint16_t* d_gate_up, int64_t inner,
                            int64_t first, int64_t end);
    // Rows of tokens [first, end) of B T: rotate, scale and put into blocks; and back (the transposed rotation).
    void (*to_blocks)(const HeadsCopy& copy, int64_t first, int64_t end);
    void (*from_blocks)(const HeadsCopy& copy, int64_t first, int64_t end);
    // sum = x + delta (none: x itself, sum is not written); normed = sum / rms(sum) * weight; scales: 1 / rms (n).
    void (*add_norm)(const float* x, const uint16_t* delta, const float* weight, float* sum, uint16_t* normed,
                     float* scales, int64_t size, float eps, int64_t first, int64_t end);
    // d_x = d_sum (or none) + what comes through the norm, d_delta the same in bfloat16 (or none); adds to d_weight.
    void (*add_norm_backward)(const float* sum, const float* weight, const float* scales, const float* d_sum,
                              const uint16_t* d_normed, float* d_x, uint16_t* d_delta, float* d_weight, int64_t size,
                              int64_t first, int64_t end);
    // x + delta, d_delta = bfloat16 of d_x: n numbers.
    void (*add)(const float* x, const uint16_t* delta, float* sum, int64_t first, int64_t end);
    void (*round)(const float* from, uint16_t* to, int64_t first, int64_t end);
    // scores become their softmax over the keys that are seen, 0 for others; d_weights become those of the scores.
    void (*softmax)(const Scores& block, uint16_t* scores, int64_t first, int64_t end);
    void (*softmax_backward)(const Scores& block, const uint16_t* weights, uint16_t* d_weights, int64_t first,
                             int64_t end);
};

extern const TrainingLoops portable_training;
#ifdef BIMO_X86
extern const TrainingLoops avx2_training, avx512_training, avx512bf16_training;
#endif

}  // namespace bimo
