// Caches whose sequences hold several tracks of pages per head: new tokens go to the first, queries meet all of them.
#include "frame.h"
#include "work.h"

namespace kvfold {
namespace {

constexpr int64_t kPiece = 8 * kRun;  // rows whose received attention is added up at once

// One track of one sequence and head of the layer.
struct Track {
    int64_t step, index, head;
};

struct Range {
    int64_t from, to;
};

struct Staged : kvfold_staged {
    const Layer l;
    explicit Staged(const kvfold_staged& call) : kvfold_staged(call), l(call.layer) {}

    const Format& format(const Track& t) const { return *static_cast<const Format*>(formats[t.index * l.kv_heads + t.head]); }
    // Rows before this step.
    int64_t held(const Track& t) const { return tables[t.step].rows[t.index * heads + l.flat(t.head)]; }
    uint8_t* page(const Track& t, int64_t row) const {
        const kvfold_tracks& s = tables[t.step];
        return l.page(s.pages + (t.index * heads + l.flat(t.head)) * s.columns, row / format(t).capacity);
    }
    // Rows that the step's query number `query` sees. In layers with a window they are the newest tokens, one after the
    // other, and what follows the stored ones are the new ones.
    Range seen(const Track& t, int64_t query) const {
        const int64_t rows = held(t), end = rows + query + 1;
        return {l.visible(end), t.index ? rows : end};
    }
    const kvfold_frame* frame(const Track& t, int side) const {
        const kvfold_frame* frame = t.index ? tables[t.step].frames + 2 * (t.index - 1) + side : nullptr;
        return frame && (frame->matrix.data || frame->scale.data || frame->index.data) ? frame : nullptr;
    }
};

// The worker's queries as a track's rows take them, and what each of them adds to all of its scores.
Tile& ask(const Staged& c, const Track& track, Worker& worker, float* bias) {
    const Queries& queries = worker.queries;
    std::fill_n(bias, queries.count, 0.f);
    const kvfold_frame* own = c.frame(track, 0);
    if (!own) {
        queries.ask(c.l, worker.part);
        return worker.part;
    }
    const Kernels& kernels = c.l.instructions();
    const Frame frame(*own, c.l.layer, track.head, int(c.l.dim), c.format(track).key.kept, worker.numbers);
    worker.turned.count = queries.count;
    for (int m = 0; m < queries.count; ++m) {
        frame.turn(kernels, queries.plain[m], worker.turned.plain[m]);
        frame.turn(kernels, queries.scaled[m], worker.turned.scaled[m]);
        bias[m] = frame.bias(queries.scaled[m]);
    }
    worker.turned.ask(c.l, worker.part);
    return worker.part;
}

// Lists the rows among `range` that any of the worker's queries sees, and for the tile which of them each does.
bool look(const Staged& c, const Track& track, const Range& range, Tile& tile, Worker& worker) {
    Range any{range.to, range.from};
    for (int m = 0; m < tile.rows; ++m) {
        const Range seen = c.seen(track, worker.queries.query[m]);
        tile.first[m] = std::max(range.from, seen.from);
        tile.last[m] = std::min(range.to, seen.to);
        any = {std::min(any.from, tile.first[m]), std::max(any.to, tile.last[m])};
    }
    list_pages(c.format(track), any.from, any.to, worker.runs, [&](int64_t row) { return c.page(track, row); });
    return !worker.runs.empty();
}

// Brings what was found in a track's coordinates to the model's.
void lift(const Staged& c, const Track& track, const float* bias, Tile& found, Worker& worker) {
    for (int m = 0; m < found.rows; ++m) found.most[m] += bias[m];
    const kvfold_frame* own = c.frame(track, 1);
    if (!own) return;
    const Frame frame(*own, c.l.layer, track.head, found.dim, c.format(track).value.kept, worker.numbers);
    for (int m = 0; m < found.rows; ++m) {
        frame.lift(c.l.instructions(), found.out[m]);
        for (int d = 0; frame.origin() && d < found.dim; ++d) found.out[m][d] += found.sum[m] * frame.origin()[d];
    }
}

class StagedCache : public Cache {
  public:
    explicit StagedCache(const Staged& call) : Cache(call.l), c(call) {}

    void store(int64_t step, int64_t head) override {
        const Track track{step, 0, head};
        const Format& fmt = c.format(track);
        const kvfold_step& s = l.steps[step];
        for (int64_t i = 0; i < s.count; ++i) {
            const int64_t row = c.held(track) + i;
            l.store_row(s.first + i, head, fmt, c.page(track, row) + row % fmt.capacity * fmt.block_bytes);
        }
    }

    void list(Task& task) const override {
        for (int64_t index = 0; index < c.tracks; ++index) {
            const Track track{task.step, index, task.head};
            const Format& fmt = c.format(track);
            const int64_t from = c.seen(track, task.query).from, to = c.seen(track, task.query + task.queries - 1).to;
            if (from < to) task.stretches.push_back({index, from, to, double(fmt.block_bytes) / fmt.block});
        }
    }

    void attend(const Task& task, const Stretch& stretch, Tile& tile, Worker& worker) const override {
        const Track track{task.step, stretch.source, task.head};
        float bias[kMaxRows];
        Tile& found = ask(c, track, worker, bias);
        if (!look(c, track, {stretch.from, stretch.to}, found, worker)) return;
        l.instructions().attend(c.format(track), found, worker.runs.data(), int(worker.runs.size()), worker.scratch);
        lift(c, track, bias, found, worker);
        merge(tile, found);
    }

  private:
    const Staged& c;
};

// Some rows of a track whose received attention is wanted.
struct Piece {
    const kvfold_watch* watch;
    Track track;
    Range range;

    float* mass(const Staged& c) const {
        return watch->mass[track.index] + c.l.flat(track.head) * watch->widths[track.index];
    }
};

std::vector<Piece> pieces(const Staged& c) {
    std::vector<Piece> found;
    for (const kvfold_watch* watch = c.watches; watch < c.watches + c.watched; ++watch) {
        for (int64_t i = 0; i < c.tracks * c.l.kv_heads; ++i) {
            const Track track{watch->step, i / c.l.kv_heads, i % c.l.kv_heads};
            const int64_t end = c.seen(track, watch->queries[watch->count - 1]).to;
            for (int64_t from = c.seen(track, watch->queries[0]).from / kPiece * kPiece; from < end; from += kPiece)
                found.push_back({watch, track, {from, std::min(end, from + kPiece)}});
        }
    }
    return found;
}

// How many of the watched queries see each row, for every head of the group.
void count(const Staged& c, const Piece& piece) {
    float* mass = piece.mass(c);
    for (int64_t i = 0; i < piece.watch->count; ++i) {
        const Range seen = c.seen(piece.track, piece.watch->queries[i]);
        const int64_t to = std::min(seen.to, piece.range.to);
        for (int64_t row = std::max(seen.from, piece.range.from); row < to; ++row) mass[row] += float(c.l.group);
    }
}

// Adds the attention that rows received, which is known once all rows have been met.
void receive(const Staged& c, const Piece& piece, Worker& worker) {
    const Track& track = piece.track;
    const int64_t rows = piece.watch->count * c.l.group;
    for (int64_t row = 0; row < rows;) {
        worker.queries.count = 0;
        for (; row < rows && worker.queries.count < kMaxRows; ++row)
            worker.queries.add(c.l, c.l.steps[track.step], track.head, piece.watch->queries[row / c.l.group], row % c.l.group);
        float bias[kMaxRows];
        Tile& tile = ask(c, track, worker, bias);
        if (!look(c, track, piece.range, tile, worker)) continue;
        for (int m = 0; m < tile.rows; ++m) {
            const int64_t at = worker.queries.out(c.l, c.l.steps[track.step], track.head, m);
            tile.most[m] = float(double(c.l.lse[at]) * kLog2E) - bias[m];
        }
        c.l.instructions().receive(c.format(track), tile, worker.runs.data(), int(worker.runs.size()),
                                   float(piece.watch->power), piece.mass(c), worker.scratch);
    }
}

void observe(const Staged& c) {
    const std::vector<Piece> all = pieces(c);
    const int n = int(all.size());
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < n; ++i) {
        if (all[size_t(i)].watch->power)
            receive(c, all[size_t(i)], own_worker());
        else
            count(c, all[size_t(i)]);
    }
}

}  // namespace
}  // namespace kvfold

extern "C" void kvfold_attend_staged(const kvfold_staged* call) {
    const kvfold::Staged staged(*call);
    kvfold::StagedCache cache(staged);
    kvfold::attend_layer(cache);
    if (staged.watched) kvfold::observe(staged);
}
