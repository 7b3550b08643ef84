// The fused model as a Python object: it checks every size and index before anything is computed, so that no input
// reads or writes outside, and picks the instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "pool.h"

namespace nb = nanobind;

namespace bimo {
namespace {

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found;
#ifdef BIMO_X86
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    if (v4 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16_kernels);
    if (v4) found.push_back(&avx512_kernels);
    if (v3) found.push_back(&avx2_kernels);
#endif
    found.push_back(&portable_kernels);
    return found;
}

const Kernels* kernels_named(const std::string& name) {
    const auto all = runnable();
    for (const Kernels* kernels : all)
        if (name.empty() || name == kernels->name) return kernels;
    throw std::invalid_argument("this processor has no instructions for " + name);
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// (format, rows, columns, codes, bytes of codes, scales, bytes of scales, bias or 0)
Matrix matrix_of(const nb::tuple& t) {
    require(t.size() == 8, "a matrix has eight fields");
    Matrix w;
    const int format = nb::cast<int>(t[0]);
    require(format >= 0 && format <= 2, "unknown matrix format");
    w.format = static_cast<Format>(format);
    w.rows = nb::cast<int64_t>(t[1]);
    w.columns = nb::cast<int64_t>(t[2]);
    require(w.rows > 0 && w.columns > 0, "a matrix has rows and columns");
    require(w.format != Format::ROW8 || (w.columns % HADAMARD == 0 && w.columns <= MOST_COLUMNS),
            "rows with one scale have a multiple of 64 columns, at most 32,768");
    w.padded = (w.columns + GROUP - 1) / GROUP * GROUP;
    w.panels = (w.rows + LANES - 1) / LANES;
    w.codes = reinterpret_cast<const uint8_t*>(nb::cast<uintptr_t>(t[3]));
    require(nb::cast<int64_t>(t[4]) == w.panels * w.panel_bytes(), "codes of another size than the matrix");
    w.scales = reinterpret_cast<const uint16_t*>(nb::cast<uintptr_t>(t[5]));
    require(nb::cast<int64_t>(t[6]) == w.panels * w.panel_scales() * 2, "scales of another size than the matrix");
    w.bias = floats(nb::cast<uintptr_t>(t[7]));
    return w;
}

Norm norm_of(const nb::tuple& t) { return {floats(nb::cast<uintptr_t>(t[0])), floats(nb::cast<uintptr_t>(t[1]))}; }

class Fused {
   public:
    Fused(const std::string& isa, const nb::dict& sizes) : kernels_(kernels_named(isa)) {
        auto whole = [&](const char* key) { return nb::cast<int64_t>(sizes[key]); };
        auto real = [&](const char* key) { return nb::cast<float>(sizes[key]); };
        m_.hidden = whole("hidden"), m_.heads = whole("heads"), m_.kv_heads = whole("kv_heads");
        m_.head_dim = whole("head_dim"), m_.inner = whole("inner"), m_.vocabulary = whole("vocabulary");
        m_.layer_norm = whole("layer_norm"), m_.gated = whole("gated");
        m_.activation = static_cast<Activation>(whole("activation"));
        m_.norm_eps = real("norm_eps"), m_.attention_scale = real("attention_scale") * 1.44269504f;
        m_.rope_factor = real("rope_factor");
        require(m_.hidden > 0 && m_.hidden % LANES == 0, "hidden_size must be a multiple of 16");
        require(m_.head_dim > 0 && m_.head_dim % LANES == 0 && m_.head_dim <= 256, "head_dim must be 16, 32, ... 256");
        require(m_.kv_heads > 0 && m_.heads % m_.kv_heads == 0 && m_.heads / m_.kv_heads <= 24,
                "heads must be a multiple of kv_heads, at most 24 to one");
        require(whole("activation") >= 0 && whole("activation") <= 3, "unknown activation");
    }

    void add_layer(const nb::tuple& attention_norm, const nb::tuple& mlp_norm, const nb::tuple& qkv,
                   const nb::tuple& out, const nb::tuple& up, const nb::tuple& down, uintptr_t q_norm,
                   uintptr_t k_norm, int64_t window) {
        Layer layer;
        layer.attention_norm = norm_of(attention_norm), layer.mlp_norm = norm_of(mlp_norm);
        layer.qkv = matrix_of(qkv), layer.out = matrix_of(out), layer.up = matrix_of(up), layer.down = matrix_of(down);
        layer.q_norm = floats(q_norm), layer.k_norm = floats(k_norm), layer.window = window;
        require(layer.attention_norm.weight && layer.mlp_norm.weight, "a layer needs its norms");
        require(!m_.layer_norm || (layer.attention_norm.bias && layer.mlp_norm.bias), "LayerNorm needs its biases");
        require(layer.qkv.columns == m_.hidden && layer.qkv.rows == (m_.heads + 2 * m_.kv_heads) * m_.head_dim,
                "qkv of another shape than the model");
        require(layer.out.columns == m_.heads * m_.head_dim && layer.out.rows == m_.hidden,
                "out of another shape than the model");
        require(layer.down.columns == m_.inner && layer.down.rows == m_.hidden, "down of another shape than the model");
        require(layer.up.columns == m_.hidden && layer.up.rows == layer.down.padded * (m_.gated ? 2 : 1),
                "up of another shape than the model");
        require(window >= 0, "a window is positive, or 0 for none");
        m_.layers.push_back(layer);
    }

    void set_ends(const nb::tuple& final_norm, const nb::tuple& head, uintptr_t embedding, uintptr_t positions,
                  int64_t num_positions, uintptr_t frequencies) {
        m_.final_norm = norm_of(final_norm), m_.head = matrix_of(head);
        m_.embedding = reinterpret_cast<const uint16_t*>(embedding);
        m_.positions = floats(positions), m_.num_positions = num_positions, m_.frequencies = floats(frequencies);
        require(m_.final_norm.weight, "the model needs its final norm");
        require(m_.head.rows == m_.vocabulary && m_.head.columns == m_.hidden, "head of another shape than the model");
        require(m_.embedding || m_.head.format != Format::BLOCK4, "a 4-bit head cannot be the embedding");
    }

    // parts: (layer, which of its matrices, A, of B's panels the first 16 columns and how often 16, address and bytes of
    // B). Returns the adapter's number.
    int64_t add_adapter(const nb::list& parts) {
        Adapter adapter;
        adapter.parts.resize(m_.layers.size() * NUM_PARTS);
        int64_t low_rank = m_.low_rank;
        for (nb::handle item : parts) {
            const nb::tuple t = nb::cast<nb::tuple>(item);
            require(t.size() == 7, "an adapter's part has seven fields");
            const int64_t number = nb::cast<int64_t>(t[0]), part = nb::cast<int64_t>(t[1]);
            require(number >= 0 && number < int64_t(m_.layers.size()), "an adapter for a layer that is not there");
            require(part >= 0 && part < NUM_PARTS, "a layer has four matrices");
            const Layer& layer = m_.layers[number];
            const Matrix& w = part == QKV ? layer.qkv : part == OUT ? layer.out : part == UP ? layer.up : layer.down;
            LowRank& change = adapter.parts[number * NUM_PARTS + part];
            change.down = matrix_of(nb::cast<nb::tuple>(t[2]));
            require(change.down.columns == w.columns && !change.down.bias, "an A of another width than its matrix");
            require(change.down.format == (w.format == Format::ROW8 ? Format::ROW8 : Format::BLOCK8),
                    "an A of another format than its matrix");
            const auto first = nb::cast<std::vector<int64_t>>(t[3]), count = nb::cast<std::vector<int64_t>>(t[4]);
            require(int64_t(first.size()) == w.panels && first.size() == count.size(), "a B of other rows than its matrix");
            change.up = reinterpret_cast<const uint8_t*>(nb::cast<uintptr_t>(t[5]));
            int64_t line = 0;
            for (size_t i = 0; i < first.size(); i++) {
                require(first[i] >= 0 && count[i] >= 0 && first[i] + count[i] <= change.down.panels,
                        "a B of more columns than A has rows");
                change.panels.push_back({uint32_t(line), uint16_t(first[i]), uint16_t(count[i])});
                line += LowRank::lines(count[i]);
            }
            require(nb::cast<int64_t>(t[6]) == line * 64, "a B of another size than its panels");
            require(change.down.panels < 1 << 16 && line < int64_t(1) << 32, "an adapter of too many ranks");
            low_rank = std::max(low_rank, change.down.panels);
        }
        m_.low_rank = low_rank;
        m_.adapters.push_back(std::move(adapter));
        return int64_t(m_.adapters.size());
    }

    void set_cache(bool int8, uintptr_t keys, uintptr_t values, uintptr_t key_scales, uintptr_t value_scales,
                   int64_t num_blocks) {
        require(keys && values && num_blocks > 0 && (!int8 || (key_scales && value_scales)), "the cache is not whole");
        m_.kv_int8 = int8, m_.num_blocks = num_blocks;
        m_.keys = reinterpret_cast<char*>(keys), m_.values = reinterpret_cast<char*>(values);
        m_.key_scales = reinterpret_cast<float*>(key_scales), m_.value_scales = reinterpret_cast<float*>(value_scales);
    }

    // spans: (start, count, [blocks]) of each sequence, in the order of their tokens; adapters: the number of each
    // sequence's, 0: none; or an empty list. hidden: [T][D] floats. scored: the
    // rows whose logits are wanted, [scored][V] floats (0: nobody wants them). Returns the likeliest word after each of them.
    //
    // steps > 1: one token a sequence, all scored, and each goes on with its likeliest word, until it is one of `ends`,
    // or `seconds` would have passed after one more step, or somebody interrupts. hidden and logits are the last step's.
    std::vector<int64_t> forward(std::vector<int64_t> token_ids, const nb::list& spans,
                                 const std::vector<int64_t>& adapters, uintptr_t hidden,
                                 const std::vector<int64_t>& scored, uintptr_t logits, int64_t steps, double seconds,
                                 const std::vector<int64_t>& ends) {
        require(m_.head.codes && m_.keys, "the model has no head or no cache yet");
        Step step;
        step.num_tokens = int64_t(token_ids.size());
        step.token_ids = token_ids.data();
        step.hidden = reinterpret_cast<float*>(hidden);
        require(step.num_tokens > 0, "a step has at least one token");
        for (int64_t id : token_ids) require(id >= 0 && id < m_.vocabulary, "a token id outside the vocabulary");
        std::vector<int64_t> blocks;
        std::vector<int64_t> begins;
        int64_t row = 0;
        require(steps > 0 && (steps == 1 || scored.size() == token_ids.size()), "of several steps every row is scored");
        for (nb::handle item : spans) {
            const nb::tuple span = nb::cast<nb::tuple>(item);
            const int64_t start = nb::cast<int64_t>(span[0]), count = nb::cast<int64_t>(span[1]);
            const nb::list table = nb::cast<nb::list>(span[2]);
            const int64_t needed = (start + count + steps - 1 + LANES - 1) / LANES;
            require(start >= 0 && count > 0, "a span has a start and at least one token");
            require(steps == 1 || count == 1, "several steps are for single tokens");
            require(needed <= int64_t(table.size()), "a span reaches beyond its blocks");
            require(!m_.positions || start + count + steps - 1 <= m_.num_positions, "a position beyond the model's");
            begins.push_back(int64_t(blocks.size()));
            for (int64_t i = 0; i < needed; i++) {
                const int64_t block = nb::cast<int64_t>(table[i]);
                require(block >= 0 && block < m_.num_blocks, "a block outside the cache");
                blocks.push_back(block);
            }
            step.spans.push_back({row, start, count, nullptr});
            row += count;
        }
        require(row == step.num_tokens, "spans and tokens differ in number");
        take_adapters(adapters, step);
        for (size_t i = 0; i < begins.size(); i++) step.spans[i].blocks = blocks.data() + begins[i];
        for (size_t i = 0; i < scored.size(); i++)
            require(scored[i] >= 0 && scored[i] < row && (steps == 1 || scored[i] == int64_t(i)),
                    "a scored row outside the step");
        step.scored = scored, step.logits = reinterpret_cast<float*>(logits);
        std::vector<int64_t> best(scored.size() * steps);
        nb::gil_scoped_release others_may_run;
        const auto begun = std::chrono::steady_clock::now();
        for (int64_t done = 1;; done++) {
            step.best = best.data() + (done - 1) * scored.size();
            kernels_->forward(m_, step);
            const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
            bool over = done == steps || elapsed * double(done + 1) / double(done) > seconds;
            for (size_t i = 0; i < scored.size() && !over; i++)
                over = std::find(ends.begin(), ends.end(), step.best[i]) != ends.end();
            if (interrupted_.exchange(false) || over) {
                best.resize(done * scored.size());
                return best;
            }
            std::copy(step.best, step.best + scored.size(), token_ids.begin());
            for (Span& span : step.spans) span.start++;
        }
    }

    void interrupt() { interrupted_.store(true); }

    void logits(uintptr_t hidden, int64_t rows, uintptr_t out) {
        require(m_.head.codes && rows > 0, "no head, or no rows");
        nb::gil_scoped_release others_may_run;
        kernels_->logits(m_, floats(hidden), rows, reinterpret_cast<float*>(out));
    }

    const char* isa() const { return kernels_->name; }

   private:
    void take_adapters(const std::vector<int64_t>& adapters, Step& step) const {
        require(adapters.empty() || adapters.size() == step.spans.size(), "spans and adapters differ in number");
        for (int64_t adapter : adapters) {
            require(adapter >= 0 && adapter <= int64_t(m_.adapters.size()), "an adapter that is not there");
            if (adapter && std::find(step.used.begin(), step.used.end(), adapter) == step.used.end())
                step.used.push_back(adapter);
        }
        constexpr int64_t MOST = sizeof(RowGroup::rows) / sizeof(int64_t);
        size_t begin = 0;  // of the tile's groups
        for (size_t i = 0; i < adapters.size(); i++)
            for (int64_t row = step.spans[i].row; row < step.spans[i].row + step.spans[i].count && adapters[i]; row++) {
                if (!step.groups.empty() && step.groups.back().tile != row / TILE) begin = step.groups.size();
                size_t at = begin;
                while (at < step.groups.size() &&
                       (step.groups[at].adapter != adapters[i] || step.groups[at].count == MOST))
                    at++;
                if (at == step.groups.size()) step.groups.push_back({adapters[i], row / TILE, 0, {}});
                step.groups[at].rows[step.groups[at].count++] = row % TILE;
            }
    }

    Model m_;
    const Kernels* kernels_;
    std::atomic<bool> interrupted_{false};
};

void product(const std::string& isa, const nb::tuple& matrix, uintptr_t x, int64_t rows, uintptr_t y) {
    const Matrix w = matrix_of(matrix);
    require(rows > 0, "at least one row");
    kernels_named(isa)->product(w, floats(x), rows, reinterpret_cast<float*>(y));
}

double read_codes(uintptr_t codes, int64_t bytes) {
    nb::gil_scoped_release others_may_run;
    return runnable().front()->read_codes(reinterpret_cast<const uint8_t*>(codes), bytes);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : runnable()) names.emplace_back(kernels->name);
    return names;
}

}  // namespace

void bind_fused(nb::module_& m) {
    nb::set_leak_warnings(false);  // a model that lives until the process ends is no leak
    nb::class_<Fused>(m, "Fused")
        .def(nb::init<const std::string&, const nb::dict&>())
        .def("add_layer", &Fused::add_layer)
        .def("set_ends", &Fused::set_ends)
        .def("add_adapter", &Fused::add_adapter)
        .def("set_cache", &Fused::set_cache)
        .def("forward", &Fused::forward)
        .def("interrupt", &Fused::interrupt)
        .def("logits", &Fused::logits)
        .def_prop_ro("instruction_set", &Fused::isa);
    m.def("product", &product);
    m.def("parallel_regions", &parallel_regions);
    m.def("read_codes", &read_codes);
    m.def("instruction_sets", &instruction_sets);
}

}  // namespace bimo
