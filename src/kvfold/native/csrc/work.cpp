#include "work.h"

#include <cmath>

#include <omp.h>

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

Worker& own_worker() {
    static thread_local Worker worker;
    return worker;
}

namespace {

// Rows: a sequence is not cut finer than this, and only where runs end anyway, so that results do not depend on it.
constexpr int kSplit = 2 * kRun;

void load_queries(const Layer& l, const Task& task, Queries& queries) {
    queries.count = 0;
    for (int64_t query = task.query; query < task.query + task.queries; ++query)
        for (int64_t row = task.row; row < task.row + task.rows; ++row)
            queries.add(l, l.steps[task.step], task.head, query, row);
}

void finish(const Layer& l, const Task& task, const Tile& tile, const Queries& queries) {
    const kvfold_step& step = l.steps[task.step];
    for (int m = 0; m < tile.rows; ++m) {
        const int64_t at = queries.out(l, step, task.head, m);
        const float share = 1.f / tile.sum[m];
        l.lse[at] = float((double(tile.most[m]) + std::log2(tile.sum[m])) / kLog2E);
        float numbers[kMaxDim];
        for (int64_t d = 0; d < l.dim; ++d) numbers[d] = tile.out[m][d] * share;
        store_numbers(l.out, l.wide, at * l.dim, l.dim, numbers);
    }
}

// A task in parts that cost about `share` each. Only rows are cut, at multiples of a run's length.
void cut(const Task& whole, double share, std::vector<Task>& parts) {
    Task part = whole;
    part.stretches.clear();
    part.cost = 0;
    for (Stretch left : whole.stretches) {
        while (left.from < left.to) {
            const auto wanted = int64_t((share - part.cost) / left.cost);
            const int64_t end = (left.from + std::max<int64_t>(wanted, kSplit) + kRun - 1) / kRun * kRun;
            const int64_t to = left.to - end < kSplit ? left.to : end;
            part.stretches.push_back({left.source, left.from, to, left.cost});
            part.cost += double(to - left.from) * left.cost;
            left.from = to;
            if (part.cost < share) continue;
            parts.push_back(part);
            part.stretches.clear();
            part.cost = 0;
        }
    }
    if (!part.stretches.empty()) parts.push_back(part);
}

// What there is to do, cut so that all threads have their share; `partials` is the number of results to be merged.
std::vector<Task> plan(const Cache& cache, int threads, int& partials) {
    const Layer& l = cache.l;
    std::vector<Task> whole, tasks;
    double total = 0;
    const int64_t rows = std::min<int64_t>(l.group, kMaxRows);
    for (int64_t step = 0; step < l.count; ++step) {
        const int64_t count = l.steps[step].count, queries = count > 1 ? kMaxRows / rows : 1;
        for (int64_t head = 0; head < l.kv_heads; ++head) {
            for (int64_t row = 0; row < l.group; row += rows) {
                for (int64_t query = 0; query < count; query += queries) {
                    const int64_t n = std::min(queries, count - query), m = std::min(rows, l.group - row);
                    whole.push_back({step, head, query, n, row, m, {}});
                    cache.list(whole.back());
                    for (const Stretch& s : whole.back().stretches) whole.back().cost += double(s.to - s.from) * s.cost;
                    total += whole.back().cost;
                }
            }
        }
    }
    partials = 0;
    const double share = total / (3.0 * threads);
    for (Task& task : whole) {
        if (threads == 1 || task.cost <= share) {
            tasks.push_back(std::move(task));
            continue;
        }
        const size_t before = tasks.size();
        cut(task, task.cost / std::ceil(task.cost / share), tasks);
        if (tasks.size() == before + 1) continue;
        for (size_t i = before; i < tasks.size(); ++i) tasks[i].partial = partials++;
    }
    std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    return tasks;
}

bool same_queries(const Task& a, const Task& b) {
    return a.step == b.step && a.head == b.head && a.row == b.row && a.query == b.query;
}

}  // namespace

void attend_layer(Cache& cache) {
    const Layer& l = cache.l;
    const int heads = int(l.kv_heads), pairs = int(l.count) * heads, threads = omp_get_max_threads();
    int partials = 0;
    const std::vector<Task> tasks = plan(cache, threads, partials);
    std::vector<Tile> found(static_cast<size_t>(partials));
    std::vector<const Task*> owner(static_cast<size_t>(partials));
    const int n = int(tasks.size());
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < pairs; ++i) cache.store(i / heads, i % heads);
        Worker& worker = own_worker();
        Tile straight;
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < n; ++i) {
            const Task& task = tasks[size_t(i)];
            Tile& tile = task.partial < 0 ? straight : found[size_t(task.partial)];
            load_queries(l, task, worker.queries);
            worker.queries.ask(l, tile);
            for (const Stretch& stretch : task.stretches) cache.attend(task, stretch, tile, worker);
            if (task.partial < 0)
                finish(l, task, tile, worker.queries);
            else
                owner[size_t(task.partial)] = &task;
        }
    }
    Queries& queries = own_worker().queries;
    // Parts of one task have consecutive numbers.
    for (size_t i = 0; i < found.size();) {
        size_t next = i + 1;
        for (; next < found.size() && same_queries(*owner[next], *owner[i]); ++next) merge(found[i], found[next]);
        load_queries(l, *owner[i], queries);
        finish(l, *owner[i], found[i], queries);
        i = next;
    }
}

}  // namespace kvfold
