// One layer of one step: what leaves the window is sealed, new tokens are stored, queries meet all that they see.
#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include <omp.h>

#include "encode.h"

namespace kvfold {

void merge(Tile& into, const Tile& other) {
    for (int m = 0; m < into.rows; ++m) {
        if (other.most[m] == kNone) continue;
        const float most = std::max(into.most[m], other.most[m]);
        const float a = into.most[m] == kNone ? 0.f : std::exp2(into.most[m] - most), b = std::exp2(other.most[m] - most);
        for (int d = 0; d < into.dim; ++d) into.out[m][d] = into.out[m][d] * a + other.out[m][d] * b;
        into.sum[m] = into.sum[m] * a + other.sum[m] * b;
        into.most[m] = most;
    }
}

namespace {

constexpr double kLog2E = 1.4426950408889634;
// Rows: a sequence is not cut finer than this, and only where runs end anyway, so that results do not depend on it.
constexpr int kSplit = 2 * kRun;

// A layer's numbers with the arithmetic of kvfold.kv.layout.
struct Layer : kvfold_layer {
    const Format& near() const { return *static_cast<const Format*>(near_format); }
    const Format& far(int64_t head) const { return *static_cast<const Format*>(far_formats[head]); }

    int64_t sealed(int64_t length) const {
        if (exact) return length;
        return sinks + std::max<int64_t>(0, (length - sinks - recent) / seal) * seal;
    }
    // First position inside the window of a query at position t.
    int64_t visible(int64_t t) const { return window ? std::max<int64_t>(0, t - window + 1) : 0; }

    uint8_t* page(const int32_t* table, int64_t columns, int64_t head, int64_t column) const {
        return data + int64_t(table[(layer * kv_heads + head) * columns + column]) * page_bytes;
    }
    uint8_t* far_page(const kvfold_step& s, int64_t head, int64_t row) const {
        return page(s.far, s.far_columns, head, row / far(head).capacity);
    }
    uint8_t* slot(const kvfold_step& s, int64_t head, int64_t index) const {
        return page(s.near, s.near_columns, head, index / near().capacity) + index % near().capacity * near().block_bytes;
    }
    int64_t slot_of(int64_t position) const {
        return position < sinks ? position : sinks + (position - sinks) % ring;
    }
    float number(const void* x, int64_t index) const {
        return wide ? static_cast<const float*>(x)[index] : from_bf16(static_cast<const uint16_t*>(x)[index]);
    }
};

// A raw row from the batch's tensors.
void store_row(const Layer& l, int64_t token, int64_t head, const Format& fmt, uint8_t* out) {
    const struct { const void* x; int64_t at; const Row& row; uint8_t* out; } sides[] = {
        {l.k, token * l.k_token + head * l.k_head, fmt.key, out},
        {l.v, token * l.v_token + head * l.v_head, fmt.value, out + fmt.key_bytes},
    };
    for (const auto& side : sides) {
        const int bits = side.row.raw_bits;
        for (int d = 0; d < side.row.kept; ++d) write_raw(side.out + d * bits / 8, bits, l.number(side.x, side.at + d));
    }
}

void load_row(const Row& row, const uint8_t* data, float* out) {
    for (int d = 0; d < row.kept; ++d) out[d] = read_raw(data + d * row.raw_bits / 8, row.raw_bits);
}

// Near rows in the order of their positions: the sinks, then what was recent before this step, then the new tokens.
struct Band {
    int64_t sinks = 0, base = 0;  // rows of sinks; position of the first row after them
    std::vector<uint8_t> rows;

    void fill(const Layer& l, const kvfold_step& s, int64_t head) {
        const int64_t end = s.length + s.count, size = l.near().block_bytes;
        sinks = std::min(l.sinks, end);
        base = l.sealed(s.length);
        const int64_t count = sinks + std::max<int64_t>(0, end - base);
        rows.resize(size_t(count * size + 64));  // vectors are read whole
        for (int64_t i = 0; i < count; ++i) {
            const int64_t position = i < sinks ? i : base + i - sinks;
            if (position < s.length)
                std::memcpy(&rows[size_t(i * size)], l.slot(s, head, l.slot_of(position)), size_t(size));
            else
                store_row(l, s.first + position - s.length, head, l.near(), &rows[size_t(i * size)]);
        }
    }
    const uint8_t* at(const Layer& l, int64_t position) const {
        return rows.data() + (position < sinks ? position : sinks + position - base) * l.near().block_bytes;
    }
};

// Seals and stores the new tokens of one head. `band` is what near slots held and the new tokens, if it was made.
void store(const Layer& l, const kvfold_step& s, int64_t head, const Band* band) {
    const int64_t end = s.length + s.count;
    const Format& fmt = l.far(head);
    if (l.exact) {
        for (int64_t p = s.length; p < end; ++p)
            store_row(l, s.first + p - s.length, head, fmt,
                      l.far_page(s, head, p) + p % fmt.capacity * fmt.block_bytes);
        return;
    }
    const int dim = int(l.dim);
    std::vector<float> rows;
    for (int64_t p = l.sealed(s.length); p < l.sealed(end); p += fmt.block) {
        rows.assign(size_t(2 * fmt.block * dim), 0.f);
        for (int t = 0; t < fmt.block; ++t) {
            const uint8_t* data = band ? band->at(l, p + t) : l.slot(s, head, l.slot_of(p + t));
            load_row(l.near().key, data, &rows[size_t(t * dim)]);
            load_row(l.near().value, data + l.near().key_bytes, &rows[size_t((fmt.block + t) * dim)]);
        }
        const int64_t row = p - l.sinks;
        encode_block(fmt, rows.data(), &rows[size_t(fmt.block * dim)],
                     l.far_page(s, head, row) + row % fmt.capacity / fmt.block * fmt.block_bytes);
    }
    for (int64_t p = s.length; p < end; ++p)
        if (p < l.sinks || p >= l.sealed(end))
            store_row(l, s.first + p - s.length, head, l.near(), l.slot(s, head, l.slot_of(p)));
}

struct Task {
    int step;
    int64_t head, query, queries, row, rows;  // queries of the step; heads of the group
    int64_t from, to;                         // far rows, [from, to) as far as a query sees them
    bool with_near;
    int partial;  // where the result goes to be merged; -1: straight out
    double cost;
};

struct Queries {
    alignas(64) float plain[kMaxRows][kMaxDim], scaled[kMaxRows][kMaxDim];
};

void load_queries(const Layer& l, const kvfold_step& s, const Task& task, Queries& q, Tile& tile) {
    tile.clear(int(task.queries * task.rows), int(l.dim));
    tile.step = float(l.scale * kLog2E);
    for (int m = 0; m < tile.rows; ++m) {
        const int64_t token = s.first + task.query + m / task.rows;
        const int64_t at = token * l.q_token + (task.head * l.group + task.row + m % task.rows) * l.q_head;
        for (int d = 0; d < l.dim; ++d) {
            q.plain[m][d] = l.number(l.q, at + d);
            q.scaled[m][d] = q.plain[m][d] * tile.step;
        }
        tile.plain[m] = q.plain[m];
        tile.query[m] = q.scaled[m];
    }
}

class Attention {
  public:
    Attention(const Layer& l, const Task& task, Tile& tile, const Band* band, Scratch& scratch)
        : l_(l), s_(l.steps[task.step]), task_(task), tile_(tile), band_(band), scratch_(scratch),
          kernels_(l.wide ? *static_cast<const Kernels*>(l.kernels)->exact : *static_cast<const Kernels*>(l.kernels)) {}

    void far() {
        const Format& fmt = l_.far(task_.head);
        int64_t from = task_.to, to = task_.from;
        for (int m = 0; m < tile_.rows; ++m) {
            const int64_t t = position(m);
            tile_.first[m] = std::max(task_.from, l_.visible(t) - l_.sinks);
            tile_.last[m] = std::min(task_.to, l_.exact ? t + 1 : l_.sealed(t + 1) - l_.sinks);
            from = std::min(from, tile_.first[m]);
            to = std::max(to, tile_.last[m]);
        }
        // Runs begin at multiples of their length, so that it does not matter who computes them; behind a window's first
        // page there is nothing.
        if (!fmt.raw()) from = std::max(from / kRun * kRun, from / fmt.capacity * fmt.capacity);
        for (int64_t row = from; row < to;) {
            const int64_t in_page = row % fmt.capacity, end = std::min(to, row - in_page + fmt.capacity);
            runs_.push_back({l_.far_page(s_, task_.head, row), int(in_page), int(in_page + end - row), row});
            row = end;
        }
        attend(fmt);
    }

    void near() {
        const int64_t last = position(tile_.rows - 1);
        const int64_t sinks = std::min(l_.sinks, last + 1);
        for (int m = 0; m < tile_.rows; ++m) {
            tile_.first[m] = l_.sunk ? 0 : l_.visible(position(m));
            tile_.last[m] = position(m) + 1;
        }
        add_positions(l_.sunk ? 0 : l_.visible(position(0)), sinks);
        attend(l_.near());
        for (int m = 0; m < tile_.rows; ++m) tile_.first[m] = std::max(l_.visible(position(m)), l_.sealed(position(m) + 1));
        add_positions(std::max(tile_.first[0], l_.sinks), last + 1);
        attend(l_.near());
    }

  private:
    int64_t position(int m) const { return s_.length + task_.query + m / task_.rows; }

    // Near rows of positions [from, to), which lie on one side of the sinks' end.
    void add_positions(int64_t from, int64_t to) {
        const Format& fmt = l_.near();
        if (band_ && from < to) {
            runs_.push_back({band_->at(l_, from), 0, int(to - from), from});
            return;
        }
        while (from < to) {
            const int64_t slot = l_.slot_of(from), in_page = slot % fmt.capacity;
            int64_t end = std::min(to, from + fmt.capacity - in_page);
            if (from >= l_.sinks) end = std::min(end, from + l_.sinks + l_.ring - slot);
            runs_.push_back({l_.slot(s_, task_.head, slot - in_page), int(in_page), int(in_page + end - from), from});
            from = end;
        }
    }

    // Meets the runs that were collected, which are done with then.
    void attend(const Format& fmt) {
        if (!runs_.empty()) kernels_.attend(fmt, tile_, runs_.data(), int(runs_.size()), scratch_);
        runs_.clear();
    }

    const Layer& l_;
    const kvfold_step& s_;
    const Task& task_;
    Tile& tile_;
    const Band* band_;
    Scratch& scratch_;
    const Kernels& kernels_;
    std::vector<Run> runs_;
};

void finish(const Layer& l, const kvfold_step& s, const Task& task, const Tile& tile) {
    for (int m = 0; m < tile.rows; ++m) {
        const int64_t token = s.first + task.query + m / task.rows;
        const int64_t at = token * l.kv_heads * l.group + task.head * l.group + task.row + m % task.rows;
        const float share = 1.f / tile.sum[m];
        l.lse[at] = float((double(tile.most[m]) + std::log2(tile.sum[m])) / kLog2E);
        for (int64_t d = 0; d < l.dim; ++d) {
            const float value = tile.out[m][d] * share;
            if (l.wide)
                static_cast<float*>(l.out)[at * l.dim + d] = value;
            else
                static_cast<uint16_t*>(l.out)[at * l.dim + d] = to_bf16(value);
        }
    }
}

// What there is to do, cut so that all threads have their share; `partials` is the number of results to be merged.
std::vector<Task> plan(const Layer& l, int threads, int& partials) {
    std::vector<Task> tasks;
    double total = 0;
    for (int step = 0; step < l.count; ++step) {
        const kvfold_step& s = l.steps[step];
        const int64_t rows = std::min<int64_t>(l.group, kMaxRows), queries = s.count > 1 ? std::max<int64_t>(1, kMaxRows / rows) : 1;
        for (int64_t head = 0; head < l.kv_heads; ++head) {
            for (int64_t row = 0; row < l.group; row += rows) {
                for (int64_t query = 0; query < s.count; query += queries) {
                    const int64_t n = std::min(queries, s.count - query), t = s.length + query, end = t + n;
                    const int64_t to = l.exact ? end : l.sealed(end) - l.sinks;
                    const int64_t from = std::min(to, std::max<int64_t>(0, l.visible(t) - l.sinks));
                    const double cost = double(to - from) * l.far(head).block_bytes / l.far(head).block + 64 * l.near().block_bytes;
                    tasks.push_back({step, head, query, n, row, std::min(rows, l.group - row), from, to, !l.exact, -1, cost});
                    total += cost;
                }
            }
        }
    }
    // Cut what is too long for one thread; later parts leave the near rows to the first one.
    const double share = total / (3.0 * threads);
    partials = 0;
    if (threads > 1) {
        for (size_t i = 0, n = tasks.size(); i < n; ++i) {
            const int64_t rows = tasks[i].to - tasks[i].from;
            const int64_t parts = std::min<int64_t>(rows / kSplit, int64_t(std::ceil(tasks[i].cost / share)));
            if (parts < 2) continue;
            const int64_t size = (rows / parts + kRun - 1) / kRun * kRun;
            const Task whole = tasks[i];
            const int64_t start = whole.from / kRun * kRun;
            tasks[i].to = start + size;
            tasks[i].cost = whole.cost / double(parts);
            tasks[i].partial = partials++;
            for (int64_t from = start + size; from < whole.to; from += size) {
                Task part = tasks[i];
                part.from = from;
                part.to = std::min(whole.to, from + size);
                part.with_near = false;
                part.partial = partials++;
                tasks.push_back(part);
            }
        }
    }
    std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    return tasks;
}

bool same_queries(const Task& a, const Task& b) {
    return a.step == b.step && a.head == b.head && a.row == b.row && a.query == b.query;
}

void attend(const Layer& l) {
    const int heads = int(l.kv_heads), pairs = int(l.count) * heads, threads = omp_get_max_threads();
    int partials = 0;
    const std::vector<Task> tasks = plan(l, threads, partials);
    std::vector<Band> bands(l.exact ? 0 : size_t(pairs));
    std::vector<Tile> found(static_cast<size_t>(partials));
    std::vector<const Task*> owner(static_cast<size_t>(partials));
    const int n = int(tasks.size());
    // Where a single token is added, near rows are read where they are.
    const auto band_of = [&](int64_t step, int64_t head) {
        return !l.exact && l.steps[step].count > 1 ? &bands[size_t(step * heads + head)] : nullptr;
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < pairs; ++i) {
            const kvfold_step& s = l.steps[i / heads];
            Band* band = band_of(i / heads, i % heads);
            if (band) band->fill(l, s, i % heads);
            store(l, s, i % heads, band);
        }
        static thread_local Scratch scratch;
        Queries queries;
        Tile tile;
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < n; ++i) {
            const Task& task = tasks[size_t(i)];
            const kvfold_step& s = l.steps[task.step];
            load_queries(l, s, task, queries, tile);
            Attention attention(l, task, tile, band_of(task.step, task.head), scratch);
            attention.far();
            if (task.with_near) attention.near();
            if (task.partial < 0) {
                finish(l, s, task, tile);
            } else {
                found[size_t(task.partial)] = tile;
                owner[size_t(task.partial)] = &task;
            }
        }
    }
    // Parts of one task have consecutive numbers.
    for (size_t i = 0; i < found.size();) {
        Tile& whole = found[i];
        size_t next = i + 1;
        for (; next < found.size() && same_queries(*owner[next], *owner[i]); ++next) merge(whole, found[next]);
        finish(l, l.steps[owner[i]->step], *owner[i], whole);
        i = next;
    }
}

}  // namespace
}  // namespace kvfold

extern "C" {

int64_t kvfold_layer_size() { return sizeof(kvfold_layer); }

int64_t kvfold_step_size() { return sizeof(kvfold_step); }

const void* kvfold_format(const int32_t* words) { return new kvfold::Format(kvfold::make_format(words)); }

int64_t kvfold_format_bytes(const void* format, int64_t which) {
    const auto& fmt = *static_cast<const kvfold::Format*>(format);
    return which ? fmt.capacity : fmt.block_bytes;
}

void kvfold_attend(const kvfold_layer* call) {
    kvfold::Layer layer;
    static_cast<kvfold_layer&>(layer) = *call;
    kvfold::attend(layer);
}
}
