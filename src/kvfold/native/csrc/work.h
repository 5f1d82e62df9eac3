// A layer's work, whatever its cache is like: queries meet stretches of rows, shared out to threads and merged.
#pragma once
#include <vector>

#include "layer.h"

namespace kvfold {

// Rows [from, to) of one source of a head (what a source is, the cache knows), and what a row costs, in bytes.
struct Stretch {
    int64_t source, from, to;
    double cost;
};

// Queries [query, query + queries) of a step times heads [row, row + rows) of a KV head's group, and what they meet.
struct Task {
    int64_t step, head, query, queries, row, rows;
    std::vector<Stretch> stretches;
    double cost = 0;
    int partial = -1;  // where the result goes to be merged; -1: straight out
};

// What a thread works with.
struct Worker {
    Scratch scratch;
    Queries queries, turned;  // as they came, and in the coordinates of what they meet
    Tile part;
    std::vector<Run> runs;
    std::vector<float> numbers;
};

// Makes `runs` the rows [from, to) of a head whose pages page_of(row) finds.
template <class Find>
void list_pages(const Format& fmt, int64_t from, int64_t to, std::vector<Run>& runs, Find page_of) {
    // Runs of codes begin at multiples of their length, so that it does not matter who computes them; behind a window's
    // first page there is nothing.
    runs.clear();
    if (!fmt.raw()) from = std::max(from / kRun * kRun, from / fmt.capacity * fmt.capacity);
    while (from < to) {
        const int64_t in_page = from % fmt.capacity, end = std::min(to, from - in_page + fmt.capacity);
        runs.push_back({page_of(from), int(in_page), int(in_page + end - from), from});
        from = end;
    }
}

class Cache {
  public:
    explicit Cache(const Layer& layer) : l(layer) {}
    virtual ~Cache() = default;
    // Puts the new tokens of a head to where queries find them.
    virtual void store(int64_t step, int64_t head) = 0;
    // Names all that a task's queries see, in the order in which it is to be met.
    virtual void list(Task& task) const = 0;
    // Adds what a stretch holds to the tile of the worker's queries.
    virtual void attend(const Task& task, const Stretch& stretch, Tile& tile, Worker& worker) const = 0;

    const Layer& l;
};

// Stores the new tokens and writes the layer's outputs and log-sum-exps.
void attend_layer(Cache& cache);

// The working memory of the calling thread.
Worker& own_worker();

}  // namespace kvfold
