// Caches whose tokens are near or far by their position: what leaves the window is sealed into pages of codes.
#include <cstring>

#include "encode.h"
#include "work.h"

namespace kvfold {
namespace {

enum Source : int64_t { kFar, kNear };

// A call's numbers with the arithmetic of kvfold.kv.layout.
struct Sealed : kvfold_sealed {
    const Layer l;
    explicit Sealed(const kvfold_sealed& call) : kvfold_sealed(call), l(call.layer) {}

    const Format& near() const { return *static_cast<const Format*>(near_format); }
    const Format& far(int64_t head) const { return *static_cast<const Format*>(far_formats[head]); }

    int64_t sealed(int64_t length) const {
        if (exact) return length;
        return sinks + std::max<int64_t>(0, (length - sinks - recent) / seal) * seal;
    }
    int64_t slot_of(int64_t position) const {
        return position < sinks ? position : sinks + (position - sinks) % ring;
    }
    uint8_t* slot(int64_t step, int64_t head, int64_t index) const {
        const kvfold_sealed_tables& t = tables[step];
        uint8_t* page = l.page(t.near + l.flat(head) * t.near_columns, index / near().capacity);
        return page + index % near().capacity * near().block_bytes;
    }
    uint8_t* far_page(int64_t step, int64_t head, int64_t row) const {
        const kvfold_sealed_tables& t = tables[step];
        return l.page(t.far + l.flat(head) * t.far_columns, row / far(head).capacity);
    }
};

void load_row(const Row& row, const uint8_t* data, float* out) {
    for (int d = 0; d < row.kept; ++d) out[d] = read_raw(data + d * row.raw_bits / 8, row.raw_bits);
}

// Near rows in the order of their positions: the sinks, then what was recent before this step, then the new tokens.
struct Band {
    int64_t sinks = 0, base = 0;  // rows of sinks; position of the first row after them
    std::vector<uint8_t> rows;

    void fill(const Sealed& c, int64_t step, int64_t head) {
        const kvfold_step& s = c.l.steps[step];
        const int64_t end = s.length + s.count, size = c.near().block_bytes;
        sinks = std::min(c.sinks, end);
        base = c.sealed(s.length);
        const int64_t count = sinks + std::max<int64_t>(0, end - base);
        rows.resize(size_t(count * size + 64));  // vectors are read whole
        for (int64_t i = 0; i < count; ++i) {
            const int64_t position = i < sinks ? i : base + i - sinks;
            if (position < s.length)
                std::memcpy(&rows[size_t(i * size)], c.slot(step, head, c.slot_of(position)), size_t(size));
            else
                c.l.store_row(s.first + position - s.length, head, c.near(), &rows[size_t(i * size)]);
        }
    }
    const uint8_t* at(const Sealed& c, int64_t position) const {
        return rows.data() + (position < sinks ? position : sinks + position - base) * c.near().block_bytes;
    }
};

class SealedCache : public Cache {
  public:
    explicit SealedCache(const Sealed& call)
        : Cache(call.l), c(call), bands_(call.exact ? 0 : size_t(call.l.count * call.l.kv_heads)) {}

    // Seals what leaves the window and stores what stays near.
    void store(int64_t step, int64_t head) override {
        const kvfold_step& s = l.steps[step];
        if (Band* band = own_band(step, head)) band->fill(c, step, head);
        const int64_t end = s.length + s.count;
        const Format& fmt = c.far(head);
        if (c.exact) {
            for (int64_t p = s.length; p < end; ++p)
                l.store_row(s.first + p - s.length, head, fmt,
                            c.far_page(step, head, p) + p % fmt.capacity * fmt.block_bytes);
            return;
        }
        for (int64_t p = c.sealed(s.length); p < c.sealed(end); p += fmt.block) seal_block(step, head, p);
        for (int64_t p = s.length; p < end; ++p)
            if (p < c.sinks || p >= c.sealed(end))
                l.store_row(s.first + p - s.length, head, c.near(), c.slot(step, head, c.slot_of(p)));
    }

    void list(Task& task) const override {
        const int64_t t = l.steps[task.step].length + task.query, end = t + task.queries;
        const int64_t to = c.exact ? end : c.sealed(end) - c.sinks;
        const int64_t from = std::min(to, std::max<int64_t>(0, l.visible(t + 1) - c.sinks));
        const Format& fmt = c.far(task.head);
        if (from < to) task.stretches.push_back({kFar, from, to, double(fmt.block_bytes) / fmt.block});
        if (!c.exact) task.stretches.push_back({kNear, 0, 1, 64. * c.near().block_bytes});  // is never cut
    }

    void attend(const Task& task, const Stretch& stretch, Tile& tile, Worker& worker) const override {
        stretch.source == kFar ? far(task, stretch, tile, worker) : near(task, tile, worker);
    }

  private:
    // Near rows and new ones of a head; null where a single token is added: near rows are read where they are then.
    Band* own_band(int64_t step, int64_t head) {
        return !c.exact && l.steps[step].count > 1 ? &bands_[size_t(step * l.kv_heads + head)] : nullptr;
    }
    const Band* own_band(int64_t step, int64_t head) const { return const_cast<SealedCache*>(this)->own_band(step, head); }

    void seal_block(int64_t step, int64_t head, int64_t position) {
        const Format& fmt = c.far(head);
        const Band* band = own_band(step, head);
        const int dim = int(l.dim);
        std::vector<float> rows(size_t(2 * fmt.block * dim));
        for (int t = 0; t < fmt.block; ++t) {
            const int64_t p = position + t;
            const uint8_t* data = band ? band->at(c, p) : c.slot(step, head, c.slot_of(p));
            load_row(c.near().key, data, &rows[size_t(t * dim)]);
            load_row(c.near().value, data + c.near().key_bytes, &rows[size_t((fmt.block + t) * dim)]);
        }
        const int64_t row = position - c.sinks;
        encode_block(fmt, rows.data(), &rows[size_t(fmt.block * dim)],
                     c.far_page(step, head, row) + row % fmt.capacity / fmt.block * fmt.block_bytes);
    }

    int64_t position(const Task& task, const Worker& worker, int m) const {
        return l.steps[task.step].length + worker.queries.query[m];
    }

    void far(const Task& task, const Stretch& stretch, Tile& tile, Worker& worker) const {
        const Format& fmt = c.far(task.head);
        int64_t from = stretch.to, to = stretch.from;
        for (int m = 0; m < tile.rows; ++m) {
            const int64_t t = position(task, worker, m);
            tile.first[m] = std::max(stretch.from, l.visible(t + 1) - c.sinks);
            tile.last[m] = std::min(stretch.to, c.exact ? t + 1 : c.sealed(t + 1) - c.sinks);
            from = std::min(from, tile.first[m]);
            to = std::max(to, tile.last[m]);
        }
        list_pages(fmt, from, to, worker.runs, [&](int64_t row) { return c.far_page(task.step, task.head, row); });
        meet(fmt, tile, worker);
    }

    void near(const Task& task, Tile& tile, Worker& worker) const {
        const int64_t start = position(task, worker, 0), last = position(task, worker, tile.rows - 1);
        const int64_t sinks = std::min(c.sinks, last + 1);
        for (int m = 0; m < tile.rows; ++m) {
            const int64_t t = position(task, worker, m);
            tile.first[m] = c.sunk ? 0 : l.visible(t + 1);
            tile.last[m] = t + 1;
        }
        list_near(task, c.sunk ? 0 : l.visible(start + 1), sinks, worker.runs);
        meet(c.near(), tile, worker);
        for (int m = 0; m < tile.rows; ++m) {
            const int64_t t = position(task, worker, m);
            tile.first[m] = std::max(l.visible(t + 1), c.sealed(t + 1));
        }
        list_near(task, std::max(tile.first[0], c.sinks), last + 1, worker.runs);
        meet(c.near(), tile, worker);
    }

    // Makes `runs` the near rows of positions [from, to), which lie on one side of the sinks' end.
    void list_near(const Task& task, int64_t from, int64_t to, std::vector<Run>& runs) const {
        const Format& fmt = c.near();
        const Band* band = own_band(task.step, task.head);
        runs.clear();
        if (band && from < to) {
            runs.push_back({band->at(c, from), 0, int(to - from), from});
            return;
        }
        while (from < to) {
            const int64_t slot = c.slot_of(from), in_page = slot % fmt.capacity;
            int64_t end = std::min(to, from + fmt.capacity - in_page);
            if (from >= c.sinks) end = std::min(end, from + c.sinks + c.ring - slot);
            runs.push_back({c.slot(task.step, task.head, slot - in_page), int(in_page), int(in_page + end - from), from});
            from = end;
        }
    }

    void meet(const Format& fmt, Tile& tile, Worker& worker) const {
        if (!worker.runs.empty()) l.instructions().attend(fmt, tile, worker.runs.data(), int(worker.runs.size()), worker.scratch);
    }

    const Sealed& c;
    std::vector<Band> bands_;
};

}  // namespace
}  // namespace kvfold

extern "C" void kvfold_attend_sealed(const kvfold_sealed* call) {
    const kvfold::Sealed sealed(*call);
    kvfold::SealedCache cache(sealed);
    kvfold::attend_layer(cache);
}
