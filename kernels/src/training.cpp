// The loops of training.h for Python: sizes are checked here, and rows shared out among torch's own threads.
//
// OpenMP's team of this process is torch's (bimo_kernels/__init__.py loads its libgomp before this library). The threads
// of pool.h would be a second team: torch's spin for a while after each of its operators, on the cores that these want.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "training.h"

namespace nb = nanobind;

namespace bimo {
namespace {

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

const TrainingLoops& loops_named(const std::string& name) {
#ifdef BIMO_X86
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    if (v4 && __builtin_cpu_supports("avx512bf16") && (name.empty() || name == "avx512bf16")) return avx512bf16_training;
    if (v4 && (name.empty() || name == "avx512")) return avx512_training;
    if (v3 && (name.empty() || name == "avx2")) return avx2_training;
#endif
    if (name.empty() || name == "portable") return portable_training;
    throw std::invalid_argument("this processor has no instructions for " + name);
}

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

constexpr int64_t PIECES = 4;          // of each thread: one that a neighbour holds up leaves the rest to others
constexpr int64_t NUMBERS = 1 << 14;   // of a piece, at least: a smaller one is done before another thread has it
constexpr int64_t SUMS = 32;           // of gradients that rows are added to, at most

// work(first, end) over `rows` rows of `width` numbers, in `threads` threads.
template <typename Work>
void share_out(int64_t rows, int64_t width, int threads, const Work& work) {
    nb::gil_scoped_release others_may_run;
    const int64_t least = std::max<int64_t>(1, NUMBERS / std::max<int64_t>(1, width));
    const int64_t pieces = std::min<int64_t>(threads * PIECES, (rows + least - 1) / least);
    if (threads <= 1 || pieces <= 1) {
        if (rows > 0) work(int64_t(0), rows);
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < pieces; i++) work(rows * i / pieces, rows * (i + 1) / pieces);
}

class Training {
   public:
    explicit Training(const std::string& isa) : loops_(loops_named(isa)) {}

    const char* isa() const { return loops_.name; }

    void cross_entropy(uintptr_t logits, uintptr_t targets, uintptr_t losses, int64_t rows, int64_t words,
                       float smoothing, bool slopes, int threads) const {
        for (int64_t row = 0; row < rows; row++)
            require(at<const int64_t>(targets)[row] >= 0 && at<const int64_t>(targets)[row] < words,
                    "a target outside the vocabulary");
        share_out(rows, words, threads, [&](int64_t first, int64_t end) {
            loops_.cross_entropy(at<uint16_t>(logits), at<const int64_t>(targets), at<float>(losses), words, smoothing,
                                 slopes, first, end);
        });
    }

    void swiglu(uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t inner, int threads) const {
        share_out(rows, inner, threads, [&](int64_t first, int64_t end) {
            loops_.swiglu(at<const uint16_t>(gate_up), at<uint16_t>(out), inner, first, end);
        });
    }

    void swiglu_backward(uintptr_t gate_up, uintptr_t d_out, uintptr_t d_gate_up, int64_t rows, int64_t inner,
                         int threads) const {
        share_out(rows, inner, threads, [&](int64_t first, int64_t end) {
            loops_.swiglu_backward(at<const uint16_t>(gate_up), at<const uint16_t>(d_out), at<uint16_t>(d_gate_up),
                                   inner, first, end);
        });
    }

    void copy_heads(bool to_blocks, uintptr_t rows, int64_t width, uintptr_t blocks, int64_t batch, int64_t tokens,
                    int64_t heads, int64_t dim, int64_t block, uintptr_t cos, uintptr_t sin, float scale,
                    int threads) const {
        require(block > 0 && width >= heads * dim, "a row is as wide as its heads, a block has tokens");
        require(!cos == !sin && (!cos || dim % 2 == 0), "a rotation has cos and sin, and pairs of numbers");
        const HeadsCopy copy{at<uint16_t>(rows), at<uint16_t>(blocks), width, heads, tokens, dim, block, batch,
                             at<const float>(cos), at<const float>(sin), scale};
        share_out(batch * tokens, heads * dim, threads, [&](int64_t first, int64_t end) {
            (to_blocks ? loops_.to_blocks : loops_.from_blocks)(copy, first, end);
        });
    }

    void add_norm(uintptr_t x, uintptr_t delta, uintptr_t weight, uintptr_t sum, uintptr_t normed, uintptr_t scales,
                  int64_t rows, int64_t size, float eps, int threads) const {
        require(!delta == !sum, "a sum is of two");
        share_out(rows, size, threads, [&](int64_t first, int64_t end) {
            loops_.add_norm(at<const float>(x), at<const uint16_t>(delta), at<const float>(weight), at<float>(sum),
                            at<uint16_t>(normed), at<float>(scales), size, eps, first, end);
        });
    }

    // The weight's gradient is summed over so many pieces of rows whatever the threads are, then over the pieces in their
    // order: the same bits on every machine with these instructions.
    void add_norm_backward(uintptr_t sum, uintptr_t weight, uintptr_t scales, uintptr_t d_sum, uintptr_t d_normed,
                           uintptr_t d_x, uintptr_t d_delta, uintptr_t d_weight, int64_t rows, int64_t size,
                           int threads) const {
        const int64_t pieces = std::min(rows, SUMS), apart = (size + 63) / 64 * 64;
        std::vector<float> sums(pieces * apart);
        share_out(pieces, rows * size / std::max<int64_t>(1, pieces), threads, [&](int64_t first, int64_t end) {
            for (int64_t i = first; i < end; i++)
                loops_.add_norm_backward(at<const float>(sum), at<const float>(weight), at<const float>(scales),
                                         at<const float>(d_sum), at<const uint16_t>(d_normed), at<float>(d_x),
                                         at<uint16_t>(d_delta), sums.data() + i * apart, size, rows * i / pieces,
                                         rows * (i + 1) / pieces);
        });
        auto* total = at<float>(d_weight);
        std::fill(total, total + size, 0.0f);
        for (int64_t i = 0; i < pieces; i++)
            for (int64_t j = 0; j < size; j++) total[j] += sums[i * apart + j];
    }

    void add(uintptr_t x, uintptr_t delta, uintptr_t sum, int64_t count, int threads) const {
        share_out(count, 1, threads, [&](int64_t first, int64_t end) {
            loops_.add(at<const float>(x), at<const uint16_t>(delta), at<float>(sum), first, end);
        });
    }

    void round(uintptr_t from, uintptr_t to, int64_t count, int threads) const {
        share_out(count, 1, threads, [&](int64_t first, int64_t end) {
            loops_.round(at<const float>(from), at<uint16_t>(to), first, end);
        });
    }

    // weights 0: softmax of `scores`; else `scores` are the weights' gradient.
    void softmax(uintptr_t weights, uintptr_t scores, uintptr_t starts, int64_t batch, int64_t heads, int64_t tokens,
                 int64_t from, int64_t count, int threads) const {
        require(from >= 0 && count > 0 && from + count <= tokens, "a block of queries is a part of the row");
        for (int64_t b = 0; b < batch; b++)
            for (int64_t t = from; t < from + count; t++) {
                const int32_t start = at<const int32_t>(starts)[b * tokens + t];
                require(start >= 0 && start <= t, "a token sees itself, and nothing before its row");
            }
        const Scores block{at<const int32_t>(starts), heads, tokens, from, count};
        share_out(batch * heads * count, from + count, threads, [&](int64_t first, int64_t end) {
            if (weights) loops_.softmax_backward(block, at<const uint16_t>(weights), at<uint16_t>(scores), first, end);
            else loops_.softmax(block, at<uint16_t>(scores), first, end);
        });
    }

   private:
    const TrainingLoops& loops_;
};

}  // namespace

void bind_training(nb::module_& m) {
    nb::class_<Training>(m, "Training")
        .def(nb::init<const std::string&>())
        .def("cross_entropy", &Training::cross_entropy)
        .def("swiglu", &Training::swiglu)
        .def("swiglu_backward", &Training::swiglu_backward)
        .def("copy_heads", &Training::copy_heads)
        .def("add_norm", &Training::add_norm)
        .def("add_norm_backward", &Training::add_norm_backward)
        .def("add", &Training::add)
        .def("round", &Training::round)
        .def("softmax", &Training::softmax)
        .def_prop_ro("instruction_set", &Training::isa);
}

}  // namespace bimo
